"""Keep the routers of a model from choosing some experts, without removing anything: what the model should then give.

The scores of such experts are set far below all others where the router's weight has been multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_prune.architectures.modules import find_tensor
from hf_prune.architectures.moe_block import MoeBlock

_PRODUCTS = frozenset("linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm einsum tensordot".split())
_ADDED = re.compile(r"bias|correction")  # what is added to the scores afterwards
_NEVER = -1e4  # as a score: its softmax and its sigmoid are zero


class BarredExperts(TorchFunctionMode):
    """While this mode is on, routers give some experts scores with which no token chooses them.

    Args:
        model: The model.
        gone: (n,) int64, the experts that must not be chosen, by the name of the router's weight.

    Attributes:
        unseen: Names of the routers whose products have not been seen yet.
    """

    def __init__(self, model: nn.Module, gone: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._gone: dict[int, tuple[str, Tensor, int, Tensor]] = {}  # by storage: name, weight, experts, gone
        for name, units in gone.items():
            weight = model.get_parameter(name)
            self._gone[weight.untyped_storage().data_ptr()] = name, weight.data, len(weight), units
        self.unseen = set(gone)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function; lower the scores if it multiplies with a router's weight."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        operands = [x for x in (*args, *(kwargs or {}).values()) for x in (x if isinstance(x, list | tuple) else [x])]
        for x in operands:
            found = self._find(x)
            if found is None:
                continue
            name, weight, experts, gone = found
            if getattr(func, "__name__", "") not in _PRODUCTS:
                if result.shape in (weight.shape, weight.t().shape):  # such as rows of length one
                    self._gone.setdefault(result.untyped_storage().data_ptr(), (name, result.detach(), experts, gone))
                continue
            axes = [axis for axis, size in enumerate(result.shape) if size == experts]
            if axes:
                self.unseen.discard(name)
                result = result.index_fill(axes[-1], gone, _NEVER)
        return result

    def _find(self, x: Any) -> tuple[str, Tensor, int, Tensor] | None:
        return self._gone.get(x.untyped_storage().data_ptr()) if isinstance(x, Tensor) and x.numel() else None


@torch.no_grad()
def lower_vectors(model: nn.Module, block: MoeBlock, gone: Tensor, named: bool) -> None:
    """Lower what a router may add to the scores of some experts, in place: vectors with a number for each.

    Args:
        model: A model whose tensors may be replaced.
        block: A mixture in it.
        gone: (n,) int64, the experts that must not be chosen.
        named: Only those that are called so; others may be factors.
    """
    for piece in (*block.buffers, *block.parameters):
        holder, _, key = piece.name.rpartition(".")
        tensor = find_tensor(model, piece.name)
        if tensor is None or tensor.numel() != tensor.shape[piece.dim] or piece.width != 1:
            continue
        if named and not _ADDED.search(key):
            continue
        module, lowered = model.get_submodule(holder), tensor.detach().index_fill(piece.dim, gone, _NEVER)
        if key in module._buffers:
            module._buffers[key] = lowered
        else:
            module._parameters[key] = nn.Parameter(lowered, requires_grad=False)
