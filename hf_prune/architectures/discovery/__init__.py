"""Finds the heads, neurons and layers of a model of which the table says nothing, and proves what it finds.

Takes a model, builds a small one of the same class and config, and sees from its gradients which rows of which
parameters reach which inputs of which matrix: what reaches different inputs only is a unit. Each finding is tried out
on the small model, where removing a unit must give the outputs of zeroing it, and is given in the words of the table
(``Stack``, ``Units``), so that nothing after it needs to know. ``find.discover`` is the way in. A new layout needs
nothing here as long as its units are slices of parameters.
"""
