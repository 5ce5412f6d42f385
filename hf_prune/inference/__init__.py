"""How fast a model runs, measured.

Takes models and inputs, times them in turns, and gives ratios with their intervals; exported models are timed by
their own runtimes. A new runtime is a method of ``ExportedModel`` in ``backends``.
"""
