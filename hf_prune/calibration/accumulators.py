"""Products of what flows into a weight, added up over calibration batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hf_prune.utils.distributed import all_reduce_sum

_ROWS = 256  # of a matrix of products that are added at a time


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """In what to add up what each batch gives in float32: float64, which keeps nearly always every bit of the sum.

    So the order of the batches does not matter, nor how they are shared between processes.
    """
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


class InputAccumulator:
    """Sums of inputs and their products, and of the changes that the outputs are to undergo.

    Those of a batch are computed in float32; see :func:`accumulate_dtype` for the rest.

    Args:
        needs: Names of statistics of inputs, see :class:`~hf_prune.criteria.base.WeightStats`.
        inputs: How many inputs.
        outputs: How many outputs, if :meth:`add` gets their changes.
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
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        self._means: dict[str, Tensor] | None = None

    @torch.no_grad()
    def add(self, x: Tensor, weight: Tensor | None = None, change: Tensor | None = None) -> None:
        """Add some tokens.

        Args:
            x: (tokens, in).
            weight: (tokens,) how much each counts; 1 if None.
            change: (tokens, out) what the outputs lack.
        """
        x = x.float()
        sums = self._start(x.device)
        weighted = x if weight is None else x * weight[:, None].float()
        if "products" in sums:
            _add_products(sums["products"], weighted, x)
        else:
            sums["squares"].add_((weighted * x).sum(0))
        if "mean" in sums:
            sums["mean"].add_(weighted.sum(0))
        if change is not None:
            change = change.float() if weight is None else change.float() * weight[:, None].float()
            sums["changes"].add_(change.sum(0))
            _add_products(sums["change_products"], change, x)
        self.tokens += len(x)

    def _start(self, device: torch.device) -> dict[str, Tensor]:
        if not self.sums:
            dtype = accumulate_dtype(device)
            self.sums = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in self._shapes.items()}
        return self.sums

    def add_others(self, device: torch.device) -> None:
        """Add what the other processes have seen."""
        self.tokens = int(all_reduce_sum(torch.tensor(self.tokens)))
        if self.tokens:
            self.sums = {name: all_reduce_sum(tensor) for name, tensor in self._start(device).items()}

    def means(self, device: torch.device) -> dict[str, Tensor]:
        """The means over the tokens, float32; as if inputs were independent and alike where none was ever seen."""
        if self._means is None:  # targets with the same inputs share it
            if self.tokens == 0:
                empty = {name: torch.zeros(shape, device=device) for name, shape in self._shapes.items()}
                if "products" in empty:
                    empty["products"] = torch.eye(self.inputs, device=device)
                else:
                    empty["squares"] = torch.ones(self.inputs, device=device)
                self._means = empty
            else:
                self._means = {name: tensor.div_(self.tokens).float() for name, tensor in self.sums.items()}
            self.sums = {}
        return self._means

    def statistics(self, needs: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """The statistics that were asked for, by name."""
        means = self.means(device)
        square = means["products"].diagonal() if "products" in means else means["squares"]
        values = {"input_gram": means.get("products"), "input_norm": square.sqrt(), "input_mean": means.get("mean")}
        return {need: value for need in needs if (value := values[need]) is not None}


def _add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    for rows in range(0, len(total), _ROWS):  # so that the products of a batch take little memory
        total[rows : rows + _ROWS].add_(left[:, rows : rows + _ROWS].t() @ right)
