"""How important each weight is: one file per criterion, registered under its name.

Takes a weight as its (out, in) matrix and the statistics that calibration gathered for it, and gives a score for every
weight, larger = keep; some criteria also give new values for the weights that stay. A new criterion is one file here:
see ADDING.md.
"""
