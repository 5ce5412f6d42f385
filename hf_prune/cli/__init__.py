"""The command line: it reads settings, calls the library, and prints.

``main`` lists the commands in the order of the help; each is a file in ``commands/``, with what several share in
``options``. What a command does, from checkpoint to files, is a function in ``workflows/``, callable from Python.
"""
