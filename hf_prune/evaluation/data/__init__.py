"""Texts and labels from files, folders and the Hub, checked before anything is measured.

Takes the name of a source and gives columns, batches, and splits that calibration and scoring do not share. A new
file type is a reader in ``files``.
"""
