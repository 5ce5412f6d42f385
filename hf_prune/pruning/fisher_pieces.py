"""Pieces of weights whose blocks of the Fisher matrix are gathered together, and the sums that become these blocks.

Blocks of B neighbouring weights take B numbers for each weight: all of them together would take many times the memory
of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.gradients import mean_over_examples
from hf_prune.criteria.base import FISHER_BLOCK
from hf_prune.planning.plan import PlannedTensor, PruningPlan

FISHER_BYTES = 2**29  # of sums that are gathered in one run of the batches
_TOGETHER = 16  # examples whose gradients are multiplied at a time
_PRODUCTS = 256  # blocks that are multiplied at a time


@dataclass(frozen=True)
class Piece:
    """Some outputs of one weight.

    Args:
        tensor: What the plan says of the weight.
        start: The first output.
        stop: One past the last.
        size: Weights of a block.
    """

    tensor: PlannedTensor
    start: int
    stop: int
    size: int

    @property
    def rows(self) -> slice:
        """The outputs, as an index."""
        return slice(self.start, self.stop)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of its blocks: (outputs, blocks, size, size)."""
        blocks = math.ceil(self.tensor.target.matrix_shape[1] / self.size)
        return self.stop - self.start, blocks, self.size, self.size

    @property
    def is_last(self) -> bool:
        """Whether no output of the weight comes after it."""
        return self.stop == self.tensor.target.matrix_shape[0]


def block_size(inputs: int, width: int = 1) -> int:
    """How many neighbouring inputs share a block: at most 50 as in the paper, and equally many in nearly every block.

    Args:
        inputs: Of the weight.
        width: Neighbours that must share one; if that is more than 50, they alone do.

    Returns:
        A multiple of ``width``. The last block is smaller where it does not divide ``inputs``.

    Example:
        >>> block_size(384), block_size(1536), block_size(384, width=4)
        (48, 50, 48)
    """
    units = inputs // width
    blocks = math.ceil(units / max(1, FISHER_BLOCK // width))
    return width * math.ceil(units / blocks)


def runs(plan: PruningPlan, budget: int = FISHER_BYTES) -> list[list[Piece]]:
    """What is gathered in each run of the batches, in the order of the model.

    Args:
        plan: The plan.
        budget: Bytes of sums that a run may hold; it holds one row of units at least.
    """
    piece_runs: list[list[Piece]] = [[]]
    remaining = budget
    for tensor in plan.tensors:
        out, inputs = tensor.target.matrix_shape
        height, width = plan.granularity.block_in(tensor.target.slab_shape)
        width = plan.granularity.pool or width
        size = block_size(inputs, width)
        cost = height * math.ceil(inputs / size) * size**2 * torch.float64.itemsize
        start = 0
        while start < out:
            outputs = min(out - start, remaining // cost * height)
            if outputs == 0 and piece_runs[-1]:  # full
                piece_runs.append([])
                remaining = budget
                continue
            outputs = max(outputs, height)
            piece_runs[-1].append(Piece(tensor, start, start + outputs, size))
            start += outputs
            remaining = max(0, remaining - outputs // height * cost)
    return piece_runs


class BlockSums:
    """Sums over examples of the products of neighbouring gradients.

    Products of up to 16 examples of a batch are computed in float32; see :func:`accumulate_dtype` for the rest.

    Args:
        pieces: Which outputs.
        weights: The weights that they are of, by name.
    """

    def __init__(self, pieces: Sequence[Piece], weights: Mapping[str, Tensor]) -> None:
        self._pieces, self._places = pieces, {name: place for place, name in enumerate(weights)}
        devices = [weights[piece.tensor.target.name].device for piece in pieces]
        self._sums = [
            torch.zeros(piece.shape, dtype=accumulate_dtype(device), device=device)
            for piece, device in zip(pieces, devices, strict=True)
        ]
        self._together: list[list[Tensor | None]] = []
        self._examples, self._batch = 0, -1

    def add(self, batch: int, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one example, in the order of the weights.

        Args:
            batch: The number of its batch.
            gradients: None where the predictions depend on none.
        """
        if batch != self._batch or len(self._together) == _TOGETHER:
            self._add_products()
        parts: list[Tensor | None] = []
        for piece in self._pieces:
            target = piece.tensor.target
            gradient = gradients[self._places[target.name]]
            parts.append(None if gradient is None else target.matrix(gradient)[piece.rows].float().clone())
        self._together.append(parts)
        self._examples, self._batch = self._examples + 1, batch

    def means(self) -> Iterator[Tensor]:
        """For each piece (outputs, blocks, size, size), float32, of the gradients' mean ggᵀ; the sums are gone then.

        Raises:
            CalibrationError: If there were no examples, or a gradient is not finite.
        """
        self._add_products()
        self._sums.reverse()
        for piece in self._pieces:
            name = piece.tensor.target.name
            yield mean_over_examples({name: self._sums.pop()}, self._examples)[name]

    def _add_products(self) -> None:
        for place, (total, piece) in enumerate(zip(self._sums, self._pieces, strict=True)):
            rows = [part for parts in self._together if (part := parts[place]) is not None]
            if not rows:
                continue
            outputs, blocks, size, _ = piece.shape
            padding = blocks * size - piece.tensor.target.matrix_shape[1]
            every = torch.nn.functional.pad(torch.stack(rows), (0, padding))
            every = every.view(len(rows), outputs * blocks, size).transpose(0, 1)  # (outputs * blocks, examples, size)
            for part, gradients in zip(total.flatten(0, 1).split(_PRODUCTS), every.split(_PRODUCTS), strict=True):
                part.add_(gradients.mT @ gradients)
        self._together.clear()
