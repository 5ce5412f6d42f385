"""Where the heads, neurons, channels and layers of a model are.

Takes a model, and gives its groups of units: which slices of which parameters go together, and in which layers. The
table is in ``base``; ``find_unit_groups`` reads it off one model. A new family of architectures is one call of
``register_architecture``; see ``ADDING.md``.
"""
