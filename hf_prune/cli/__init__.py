"""The command line: it reads settings, calls the library, and prints.

``main`` lists the commands in the order of the help. Each is a file in ``commands/``; options that several share
are in ``options``, settings of a ``PruningConfig`` in ``settings``. What a command does, from checkpoint to files, is a
function in ``workflows/``, callable from Python.
"""
