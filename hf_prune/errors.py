"""Every error that hf_prune raises on purpose.

::

    HfPruneError
    ├── ConfigError       (ValueError)    a setting is unknown, out of range, or contradicts another
    │   └── UnknownNameError              a name that no registry entry has
    ├── PlanError         (ValueError)    the settings do not fit this model
    ├── ModelTypeError    (TypeError)     what was passed is no model, or none of the kind that is needed
    ├── ArchitectureError (ValueError)    nobody has said where this model's heads, neurons and layers are
    ├── CalibrationError  (ValueError)    calibration data is missing or unusable
    ├── MaskError         (RuntimeError)  the masks do not allow what was asked
    ├── CheckpointError   (RuntimeError)  files on disk are damaged, foreign, or do not fit the model
    ├── BudgetError       (RuntimeError)  no sparsity keeps the accuracy that was asked for
    ├── DataError         (ValueError)    a model or data set cannot be found or read
    ├── HubError          (RuntimeError)  the Hub cannot be reached, or refuses what was asked
    ├── ExportError       (RuntimeError)  a model cannot be written for another runtime
    └── SweepError        (RuntimeError)  results of different settings would be mixed

A message says what was found, what was expected and what to do. When one is raised, the model and the
files are as they were before the call.
"""

from __future__ import annotations


class HfPruneError(Exception):
    """Base of all errors raised by hf_prune."""


class ConfigError(HfPruneError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class UnknownNameError(ConfigError):
    """A name that no registry entry has; the message lists the valid ones."""


class PlanError(HfPruneError, ValueError):
    """The settings do not fit this model; nothing was changed."""


class ModelTypeError(HfPruneError, TypeError):
    """What was passed is no model, or none of the kind that is needed."""


class ArchitectureError(HfPruneError, ValueError):
    """Where a model's heads, neurons and layers are is not known, or its modules cannot be resized."""


class CalibrationError(HfPruneError, ValueError):
    """Calibration data is missing or cannot be used; nothing was changed."""


class MaskError(HfPruneError, RuntimeError):
    """The masks do not allow what was asked."""


class CheckpointError(HfPruneError, RuntimeError):
    """Files on disk are damaged, foreign, or do not fit the model."""


class BudgetError(HfPruneError, RuntimeError):
    """No sparsity keeps the accuracy that was asked for, or too little data to show it."""


class DataError(HfPruneError, ValueError):
    """A model or data set cannot be found or read."""


class HubError(HfPruneError, RuntimeError):
    """The Hub cannot be reached or refuses, or a repository holds something else; it is as it was."""


class ExportError(HfPruneError, RuntimeError):
    """A model cannot be written for another runtime, or would not do the same there."""


class SweepError(HfPruneError, RuntimeError):
    """A sweep would mix results of different settings."""
