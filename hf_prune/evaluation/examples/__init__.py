"""Score a model example by example, by a metric that can be computed again from what is kept of each example.

Takes a model, what reads its data, and a data set; gives a score whose bootstrap samples of examples say how sure it
is, and which compares with that of another model on the same examples. A new kind of task is one class in a file here,
and its name in ``kinds``.
"""
