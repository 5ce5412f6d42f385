"""Helpers that know nothing of pruning.

Files written atomically, folders swapped whole, locks, progress bars, tables, several processes, one batch run
through a model, tensors that spill to disk, what wraps a model. A helper belongs here when two packages need it and
it would make sense in a library that does not prune; what only one package needs stays in that package.
"""
