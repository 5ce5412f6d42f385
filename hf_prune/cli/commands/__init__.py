"""One file per command: its options, their help, and what it prints.

A new command is a file here with a function, and a line in ``hf_prune/cli/main.py`` that gives it its place and its
example.
"""
