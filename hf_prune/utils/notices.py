"""Warnings that point at the line that the user wrote, however deep in the package they come up."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

_NOBODYS = {"hf_prune", "torch", "transformers", "accelerate", "contextlib"}  # whose lines no user can change


class CoverageWarning(UserWarning):
    """What settings mean and leave dense all the same."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and name as the place the innermost line outside of this package and of what calls it back.

    Args:
        message: What to say.
        category: Of the warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_globals.get("__name__", "").partition(".")[0] in _NOBODYS and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Do not warn of what the report that is made here says anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        yield
