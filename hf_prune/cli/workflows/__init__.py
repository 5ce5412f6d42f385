"""What the commands do, from checkpoint to files, callable from Python.

Each function takes folders or Hub ids and settings, loads, calls the library, and saves; it raises before anything is
written. Nothing here prints. A new workflow is a function in a file here, called by the command of its name.
"""
