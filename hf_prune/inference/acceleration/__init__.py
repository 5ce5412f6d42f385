"""Run the linear layers of a model by whichever kernel is fastest on this machine.

``accelerate`` times the kernels in ``kernels`` on the model's own weights, gives each layer the fastest for every
number of tokens (``layers``), and reports what it brought; ``decelerate`` gives the plain model back. A new kernel is a
class in ``kernels`` and a line in its ``candidates``.
"""
