"""Folder in, folder out: compress, decompress, migrate, prune as a stream; and export a model to another runtime.

Takes the folder of a checkpoint and writes another one; the source is never changed. Each conversion returns a report
to print. A new conversion is a file with one function that takes both folders.
"""
