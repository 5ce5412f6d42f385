"""Helpers that know nothing about pruning.

Atomic writes of files and folders, locks, progress bars, tables, several processes, running a model on a batch,
tensors that spill to disk, and wrappers around models. Nothing here takes or returns masks or plans. A helper belongs
here if two packages need it and it would make sense in a library that does not prune; a helper of one package stays
in that package.
"""
