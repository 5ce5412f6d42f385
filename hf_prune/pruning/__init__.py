"""From statistics to masks and repaired weights, one strategy a file.

Takes a model, its plan and calibration data, writes the pruned weights, and keeps the masks in a ``MaskStore``; a
``WeightBackup`` brings everything back after an error. A new way of going through the layers is a new file beside
``sequential`` and ``iterative``, and a line in ``hf_prune.pipeline``.
"""
