"""Tensor algebra with a stated contract and no knowledge of models.

Remove exactly k per pool, solve least squares on a mask, sum blocks, view any weight as its (out, in) matrix, set
removed weights to zero. Everything takes and returns tensors. A new kernel is a function here, with a slow twin in
``tests/reference/`` that it is tested against.
"""
