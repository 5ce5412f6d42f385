"""Products with sparse matrices on the CPU, by a kernel of our own.

``SparseRows`` holds what is left of a matrix and multiplies with it; ``build`` compiles ``operators.cpp`` at first
use. Nothing else depends on it: without a compiler the same products run on torch's own sparse matrices.
"""
