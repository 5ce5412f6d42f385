"""Folder in, folder out: compress, decompress, export, migrate.

Takes a checkpoint and writes another one beside it; the source is never changed. A new conversion is a file with a
function that takes both folders, and a report of what it did.
"""
