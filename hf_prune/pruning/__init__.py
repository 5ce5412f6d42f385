"""From statistics to masks and repaired weights, one strategy a file.

Takes a ``CalibrationRun`` (a model, its plan, the data) and keeps the masks in a ``MaskStore``; a
``Transaction`` undoes all changes after an error. A new way of going through the layers is a new file beside
``one_pass``, ``sequential`` and ``iterative``, and a line in ``strategy_for`` of ``hf_prune.pipeline``.
"""
