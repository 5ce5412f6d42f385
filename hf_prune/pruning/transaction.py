"""A model as it was, to go back to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.pruning.mask_store import MaskStore, to_the_end
from hf_prune.utils.offload_cache import OffloadCache


class WeightBackup:
    """Weights as they were before an operation; a context that gives them back, bit for bit, if it ends in an error.

    So it does with the masks, if it has put a weight aside.

    Args:
        model: The model.
        in_memory: Keep the copies in memory, as :attr:`dense`. Otherwise they go to a temporary folder on the disk,
            which is gone afterwards.
    """

    def __init__(self, model: nn.Module, in_memory: bool = False) -> None:
        self.dense: dict[str, Tensor] = {}
        self._model = model
        self._in_memory = in_memory
        self._files = OffloadCache(0)
        self._names: dict[str, None] = {}  # in their order
        self._before = MaskStore.of(model)
        self._calls: list[Callable[[], None]] = []

    def calls(self, do: Callable[[], None]) -> None:
        """Have something else undone as well, by what may be done twice, or in vain."""
        self._calls.append(do)

    def save(self, name: str, weight: Tensor) -> None:
        """Put a copy of a weight aside, before it changes; later changes leave that copy."""
        if name in self._names:
            return
        if self._in_memory:
            self.dense[name] = weight.detach().clone()
        else:
            self._files.put(name, weight.detach())
        self._names[name] = None

    @torch.no_grad()
    def write(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Give weights new values and set those that are not kept to zero.

        Args:
            masks: Bool masks by parameter name, True = keep.
            weights: New values by parameter name.
        """
        parameters = dict(self._model.named_parameters())
        for name in dict.fromkeys([*masks, *weights]):
            self.save(name, parameters[name])
            if name in weights:
                parameters[name].copy_(weights[name])
            if name in masks:
                zero_removed_(parameters[name], masks[name])

    def __enter__(self) -> WeightBackup:
        return self

    @torch.no_grad()
    def restore(self) -> None:
        """Give back every weight that was put aside, and the masks, and do what :meth:`calls` got; the copies stay."""
        for do in self._calls:
            do()
        parameters = dict(self._model.named_parameters())
        for name in self._names:
            parameters[name].copy_(self.dense[name] if self._in_memory else self._files.get(name))
        if self._names and self._before is None:
            MaskStore.detach(self._model)
        elif self._names and self._before is not None:
            self._before.attach(self._model)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                to_the_end(self.restore)
        finally:
            self._files.close()
