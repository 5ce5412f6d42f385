"""Running sums of inputs and of their products, over calibration batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_prune.kernels.matrix import Target
from hf_prune.utils.distributed import all_reduce_sum

_ROWS = 256  # of a matrix of products that are added at a time


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """The dtype to add up float32 values in: float64, which almost never rounds away a bit of them.

    So the result depends neither on the order of the batches nor on how they are shared between processes.
    """
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class InputAccumulator:
    """Sums over tokens of inputs, of their products, and of the changes that the outputs are to undergo.

    The products of a batch are computed in float32; see :func:`accumulate_dtype` for how they are added up.

    Args:
        needs: Names of statistics of inputs, see :class:`~hf_prune.criteria.base.WeightStats`.
        inputs: How many inputs.
        outputs: How many outputs, if :meth:`add` gets their changes.

    Attributes:
        tokens: How many tokens were added.
    """

    def __init__(self, needs: Iterable[str], inputs: int, outputs: int = 0) -> None:
        needs = frozenset(needs)
        self.inputs = inputs
        shapes: dict[str, tuple[int, ...]] = {"squares": (inputs,)}
        if "input_gram" in needs:
            shapes = {"products": (inputs, inputs)}
        if "input_mean" in needs:
            shapes["mean"] = (inputs,)
        if outputs:
            shapes |= {"changes": (outputs,), "change_products": (outputs, inputs)}
        self._shapes = shapes
        self.tokens = 0
        self._totals: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] | None = None

    @torch.no_grad()
    def add(self, x: Tensor, weight: Tensor | None = None, change: Tensor | None = None) -> None:
        """Add some tokens.

        Args:
            x: (tokens, in).
            weight: (tokens,) how much each counts; 1 if None.
            change: (tokens, out) what is to be added to the outputs.
        """
        x = x.float()
        totals = self._start(x.device)
        weighted = x if weight is None else x * weight[:, None].float()
        if "products" in totals:
            _add_products(totals["products"], weighted, x)
        else:
            totals["squares"].add_((weighted * x).sum(0))
        if "mean" in totals:
            totals["mean"].add_(weighted.sum(0))
        if change is not None:
            change = change.float() if weight is None else change.float() * weight[:, None].float()
            totals["changes"].add_(change.sum(0))
            _add_products(totals["change_products"], change, x)
        self.tokens += len(x)

    def _start(self, device: torch.device) -> dict[str, Tensor]:
        if not self._totals:
            dtype = accumulate_dtype(device)
            self._totals = {
                name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in self._shapes.items()
            }
        return self._totals

    def add_others(self, device: torch.device) -> None:
        """Add the sums of the other processes."""
        self.tokens = int(all_reduce_sum(torch.tensor(self.tokens)))
        if self.tokens:
            self._totals = {name: all_reduce_sum(tensor) for name, tensor in self._start(device).items()}

    def means(self, device: torch.device) -> dict[str, Tensor]:
        """The means over the tokens, float32. Without any token, inputs count as independent and of the same size.

        The sums are given up: nothing can be added afterwards.
        """
        if self._means is None:  # targets with the same inputs share it
            if self.tokens == 0:
                means = {name: torch.zeros(shape, device=device) for name, shape in self._shapes.items()}
                if "products" in means:
                    means["products"] = torch.eye(self.inputs, device=device)
                else:
                    means["squares"] = torch.ones(self.inputs, device=device)
                self._means = means
            else:
                self._means = {name: tensor.div_(self.tokens).float() for name, tensor in self._totals.items()}
            self._totals = {}
        return self._means

    def statistics(self, needs: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """The statistics of the inputs that are asked for, by name."""
        means = self.means(device)
        square = means["products"].diagonal() if "products" in means else means["squares"]
        values = {"input_gram": means.get("products"), "input_norm": square.sqrt(), "input_mean": means.get("mean")}
        return {need: value for need in needs if (value := values[need]) is not None}


class SlabAccumulators:
    """The sums of each matrix in a target, which has inputs of its own; most targets have one.

    Args:
        needs: See :class:`InputAccumulator`.
        target: The target.
        changes: Whether :meth:`add` gets the changes of its outputs.

    Attributes:
        parts: The sums of each matrix.
    """

    def __init__(self, needs: Iterable[str], target: Target, changes: bool = False) -> None:
        outputs, inputs = target.slab_shape
        self.parts = [InputAccumulator(needs, inputs, outputs if changes else 0) for _ in range(target.slabs)]

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens were added to each matrix."""
        return tuple(part.tokens for part in self.parts)

    def add(self, x: Tensor, weight: Tensor | None = None, change: Tensor | None = None, slab: int = 0) -> None:
        """Add some tokens; see :meth:`InputAccumulator.add`.

        Args:
            x: (tokens, in) of one matrix, or (matrices, tokens, in) of all.
            weight: (tokens,).
            change: (tokens, out) of the matrix, or (tokens, matrices * out).
            slab: The matrix that they are for.
        """
        if x.dim() == 2:
            self.parts[slab].add(x, weight, change)
            return
        changes = [None] * len(self.parts) if change is None else change.chunk(len(self.parts), dim=1)
        for part, rows, of_part in zip(self.parts, x, changes, strict=True):
            part.add(rows, weight, of_part)

    def add_others(self, device: torch.device) -> None:
        """Add the sums of the other processes."""
        for part in self.parts:
            part.add_others(device)

    def statistics(self, needs: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """The statistics of the inputs that are asked for, by name; several matrices are the first dimension."""
        own = [part.statistics(needs, device) for part in self.parts]
        return own[0] if len(own) == 1 else {name: torch.stack([of[name] for of in own]) for name in own[0]}

    def changes(self, device: torch.device) -> dict[str, Tensor]:
        """``output_change`` and ``change_products`` of all outputs."""
        means = [part.means(device) for part in self.parts]
        names = {"output_change": "changes", "change_products": "change_products"}
        return {name: torch.cat([of_part[key] for of_part in means]) for name, key in names.items()}


def _add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``leftᵀ right`` to a matrix, a few rows at a time, so that the products of a batch take little memory."""
    for rows in range(0, len(total), _ROWS):
        total[rows : rows + _ROWS].add_(left[:, rows : rows + _ROWS].t() @ right)
