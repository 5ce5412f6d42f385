"""One file per command: its options, their help, and what it prints.

A new command is a function in a file here, and a line in ``hf_prune/cli/main.py`` that gives it its place in the help
and an example.
"""
