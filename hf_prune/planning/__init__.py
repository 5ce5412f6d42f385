"""From settings to a plan: which weights are pruned, and how many of each.

Takes a ``PruningConfig`` and a model, checks that they fit, and gives a ``PruningPlan``; nothing is changed, and no
data is read. A new setting is a field of ``config``, with its values in ``choices`` and its check in ``checks``.
"""
