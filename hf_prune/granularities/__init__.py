"""What is removed together: one file per granularity, registered under its name.

Takes the shape of a weight's (out, in) matrix, and gives the grid of units on it and the pools in which they compete,
or the reason why the weight cannot be divided. A new granularity is one file here: see ADDING.md.
"""
