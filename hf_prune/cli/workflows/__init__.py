"""What the commands do, from checkpoint to files, callable from Python.

Each takes folders or Hub ids and settings, loads, calls the library, and saves; errors come before anything is
written. Nothing here prints.
"""
