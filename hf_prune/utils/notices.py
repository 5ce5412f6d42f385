"""Warnings that point at the user's line of code, however deep in the package they are raised."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

_LIBRARIES = {"hf_prune", "torch", "transformers", "accelerate", "contextlib"}  # not the user's code


class CoverageWarning(UserWarning):
    """The settings ask for weights that stay dense all the same."""


class QualityWarning(UserWarning):
    """The settings are known to cost much more quality than others would."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the innermost line outside of this package and of the libraries that call it back.

    Args:
        message: The text.
        category: Class of the warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Suppress coverage warnings while a report is made that contains them anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        yield
