"""Remove whole heads, neurons and layers.

Takes a model, its groups of units and a budget in parameters, operations or seconds. ``choose_units`` weighs what units
cost against what their removal loses, ``prune_units`` masks and repairs, and ``shrink`` cuts what was masked, so that
the matrices become smaller. A new measure of what losing a unit costs is a curve in ``loss_curves``; a new kind of unit
is a file in ``architectures/kinds``.
"""
