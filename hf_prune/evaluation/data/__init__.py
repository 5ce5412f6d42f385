"""Load texts and labels from files, folders and the Hub, and check them before anything is measured.

Takes the name of a source and a split, and returns columns, padded batches or windows of tokens. A new file type is a
reader in ``files``.
"""
