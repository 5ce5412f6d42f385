"""Run the linear layers of a model by whichever kernel is fastest on this machine.

``accelerate`` times the kernels that ``kernels`` names on the model's own weights, gives each layer the fastest for
every number of tokens (``layers``), and reports what it brought; ``decelerate`` gives the plain model back. A kernel
is a class in ``dense_kernels`` or ``sparse_kernels``, and a line in ``candidates`` and ``make_kernel`` of ``kernels``.
"""
