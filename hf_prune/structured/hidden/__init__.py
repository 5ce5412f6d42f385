"""Dimensions of the hidden states, removed from a whole model at once.

``cuts`` finds where they lie, ``proof`` computes what has to be left, and ``trim`` chooses and removes them.
"""
