"""Layers that are timed as one, and the kernels that were chosen for them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_prune.inference.acceleration.choose import Choice

_MOST_TOKENS = 1 << 24  # of a batch


@dataclass(frozen=True)
class LayerKind:
    """Layers that were timed as one: of one shape, precision and sparsity.

    Args:
        layers: Their names.
        shape: (out, in).
        dtype: Such as ``"float32"``.
        sparsity: The share of zeros, rounded to 5 %.
        choices: The kernels, by numbers of tokens in rising order.
    """

    layers: tuple[str, ...]
    shape: tuple[int, int]
    dtype: str
    sparsity: float
    choices: tuple[Choice, ...]

    @property
    def gains(self) -> bool:
        """Whether another kernel than torch's default is the fastest for some number of tokens."""
        return any(choice.kernel != "dense" for choice in self.choices)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "choices": [choice.to_dict() for choice in self.choices]}


def read_kinds(saved: Sequence[Mapping[str, Any]]) -> list[LayerKind]:
    """The inverse of :meth:`LayerKind.to_dict`, for several.

    Raises:
        AttributeError, KeyError, OverflowError, TypeError, ValueError: If others have written something else.
    """
    return [
        LayerKind(
            layers=tuple(map(str, kind["layers"])),
            shape=_shape(kind["shape"]),
            dtype=str(kind["dtype"]),
            sparsity=float(kind["sparsity"]),
            choices=_choices(kind["choices"]),
        )
        for kind in saved
    ]


def _shape(saved: Sequence[int]) -> tuple[int, int]:
    if len(saved) != 2:
        raise ValueError(f"shape is {saved!r:.60}, expected two numbers")
    return int(saved[0]), int(saved[1])


def _choices(saved: Sequence[Mapping[str, Any]]) -> tuple[Choice, ...]:
    choices = tuple(_choice(choice) for choice in saved)
    tokens = [choice.tokens for choice in choices]
    rising = tokens and all(a < b for a, b in itertools.pairwise(tokens))
    if not rising or tokens[0] < 1 or tokens[-1] > _MOST_TOKENS:
        raise ValueError(f"choices for {tokens!s:.60} tokens, expected rising numbers from 1 to {_MOST_TOKENS}")
    return choices


def _choice(saved: Mapping[str, Any]) -> Choice:
    numbers: Sequence[float] = [float(saved[key]) for key in ("dense_seconds", "seconds", "ratio")]
    return Choice(int(saved["tokens"]), str(saved["kernel"]), *numbers)
