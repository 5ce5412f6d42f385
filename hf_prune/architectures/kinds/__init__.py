"""The kinds of units that pruning removes as a whole: one file for each.

A kind takes a model, and says where its units are (which slices of which parameters), when a unit no longer does
anything and may be cut, and how the model's config tells their number. ``granularity=``, the budgets, ``shrink()``,
checkpoints and ``hf-prune list`` ask the registry, so a new kind is one new file: see ``ADDING.md``.
"""
