"""Search: try the presets that make sense for a goal, cheapest first, measure each, and keep the best within a drop.

Takes a model, a task with held-out data and a goal; gives the measured points, the chosen checkpoint and why it won.
A new goal is a row in ``goals.py``; what is measured of a model is in ``measure.py``.
"""
