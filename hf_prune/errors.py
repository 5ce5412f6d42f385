"""Every error that hf_prune raises on purpose.

::

    HfPruneError
    ├── ConfigError       (ValueError)    a setting is unknown, out of range, or contradicts another
    │   └── UnknownNameError              a name that no registry entry has
    ├── PlanError         (ValueError)    the settings do not fit this model
    ├── ModelTypeError    (TypeError)     the argument is not a model, or not of the needed kind
    ├── ArchitectureError (ValueError)    where this model's heads, neurons and layers are is not known
    ├── CalibrationError  (ValueError)    calibration data is missing or unusable
    ├── MaskError         (RuntimeError)  the masks do not allow the operation
    ├── CheckpointError   (RuntimeError)  files on disk are damaged, written by others, or do not fit the model
    ├── BudgetError       (RuntimeError)  no sparsity keeps the requested accuracy
    ├── DataError         (ValueError)    a model or data set cannot be found or read
    ├── HubError          (RuntimeError)  the Hub cannot be reached, or refuses the request
    ├── ExportError       (RuntimeError)  a model cannot be written for another runtime
    ├── KernelError       (RuntimeError)  the compiled sparse kernel cannot be used on this machine
    └── SweepError        (RuntimeError)  results of different settings would be mixed

A message says what was found, what was expected and what to do. After an error, the model and the files are as they
were before the call.
"""

from __future__ import annotations


class HfPruneError(Exception):
    """Base class of all errors raised by hf_prune."""


class ConfigError(HfPruneError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class UnknownNameError(ConfigError):
    """A name without a registry entry; the message lists the valid names."""


class PlanError(HfPruneError, ValueError):
    """The settings do not fit this model; nothing was changed."""


class ModelTypeError(HfPruneError, TypeError):
    """The argument is not a model, or not of the needed kind."""


class ArchitectureError(HfPruneError, ValueError):
    """The places of a model's heads, neurons and layers are not known, or its modules cannot be resized."""


class CalibrationError(HfPruneError, ValueError):
    """Calibration data is missing or cannot be used; nothing was changed."""


class MaskError(HfPruneError, RuntimeError):
    """The masks do not allow the operation."""


class CheckpointError(HfPruneError, RuntimeError):
    """Files on disk are damaged, written by others, or do not fit the model."""


class BudgetError(HfPruneError, RuntimeError):
    """No sparsity keeps the requested accuracy, or there is too little data to show it."""


class DataError(HfPruneError, ValueError):
    """A model or data set cannot be found or read."""


class HubError(HfPruneError, RuntimeError):
    """The Hub cannot be reached or refuses the request, or a repository holds something else; it is unchanged."""


class ExportError(HfPruneError, RuntimeError):
    """A model cannot be written for another runtime, or gives other results there."""


class KernelError(HfPruneError, RuntimeError):
    """The compiled sparse kernel cannot be used on this machine, or not for what is asked."""


class SweepError(HfPruneError, RuntimeError):
    """A sweep would mix results of different settings."""
