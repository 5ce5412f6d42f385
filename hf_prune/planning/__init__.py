"""From settings to a plan: which weights are pruned, and how many of each.

Takes a ``PruningConfig`` and a model, checks that they fit, and gives a ``PruningPlan``; nothing is changed and no
data is looked at. A new setting is a field of ``config``, its values in ``choices`` and its check in ``checks``.
"""
