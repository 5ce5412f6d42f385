"""Pruning of whole heads, neurons and layers, and taking them out.

Takes a model, its groups of units and a budget in parameters, operations or seconds; chooses what goes by what it
costs and what it saves, masks and repairs it, and ``shrink`` makes the matrices smaller. A new way to say what losing
a unit costs is a curve in ``loss_curves``.
"""
