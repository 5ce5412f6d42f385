"""A pruning of a model that happens as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_prune.architectures.bypass import bypass, is_bypassed, restore
from hf_prune.architectures.switched_off import switch_off, switch_on, units_that_run
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.targets import refuse_read_only
from hf_prune.pruning.mask_fit import zero_weight
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning.records import PolishRecord
from hf_prune.utils.interrupts import run_to_the_end
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.offloaded_weights import refuse_accelerated, values_of, way_back, write_weight


def check_changeable(model: nn.Module, keep_dense: bool) -> None:
    """Make sure that a model can be pruned, before anything is computed for it.

    Args:
        model: The model.
        keep_dense: Whether its dense weights are to be kept.

    Raises:
        PlanError: If its weights cannot be written to, or layers keep copies of them for faster kernels.
        MaskError: If the masks of an earlier pruning do not fit the model, or it did not keep dense weights.
    """
    refuse_accelerated(model, "pruning")
    refuse_read_only(model)
    store = MaskStore.of(model) or MaskStore()
    store.check(model)
    if keep_dense:
        store.check_dense()


class WeightBackup:
    """Copies of weights as they were before they changed.

    Args:
        in_memory: Keep the copies in memory, as :attr:`dense`. Otherwise they go to a temporary folder on the disk,
            which :meth:`close` removes.
    """

    def __init__(self, in_memory: bool) -> None:
        self.dense: dict[str, Tensor] = {}
        self.names: dict[str, None] = {}  # in the order of the first changes
        self._saved: dict[int, nn.Parameter] = {}  # by identity: layers that share a weight name it each in their way
        self._in_memory = in_memory
        self._files = OffloadCache(0)
        self._ways_back: dict[str, Callable[[], None]] = {}

    def save(self, model: nn.Module, name: str) -> None:
        """Copy a weight before it changes; later calls for the same weight do nothing, whatever they call it."""
        parameter = model.get_parameter(name)
        if name in self.names or id(parameter) in self._saved:
            return
        if not parameter.is_meta:  # a placeholder stands for one name only, and hooks replace it
            self._saved[id(parameter)] = parameter
        if (back := way_back(model, name)) is not None:  # what is on the disk stays there, beside the new values
            self._ways_back[name] = back
        if self._in_memory or back is None:
            weight = values_of(model, name, parameter)
            if self._in_memory:
                self.dense[name] = weight.clone()
            else:
                self._files.put(name, weight)
        self.names[name] = None

    def restore(self, model: nn.Module) -> None:
        """Give every saved weight its values back, bit for bit; the copies stay."""
        for name in self.names:
            if (back := self._ways_back.get(name)) is not None:
                back()
            else:
                write_weight(model, name, self.dense[name] if self._in_memory else self._files.get(name))

    def close(self) -> None:
        """Remove the copies on the disk."""
        self._files.close()


class Transaction:
    """All changes that one pruning makes to a model; a context that undoes them, bit for bit, if it ends in an error.

    Changes are weights, masks and layers that are switched off. They last once :meth:`commit` has returned, which
    therefore is the last statement inside the context. Whenever an error or Ctrl-C comes, also again while changes are
    undone, the model is as before or as after the pruning, and nothing in between.

    Args:
        model: The model; see :func:`check_changeable`.
        keep_dense: Keep a copy of the dense weights in the mask store.
    """

    def __init__(self, model: nn.Module, keep_dense: bool = False) -> None:
        self.model = model
        self.store = MaskStore.of(model) or MaskStore()
        self.backup = WeightBackup(in_memory=keep_dense or self.store.dense is not None)
        self._before = MaskStore.of(model)
        self._keep_dense = keep_dense
        self._bypassed: list[nn.Module] = []
        self._switched: list[tuple[UnitGroup, Tensor | None]] = []  # with the units that ran before
        self._zeroed: set[str] = set()  # names of the weights that have had their masks applied
        self._masks: Mapping[str, Tensor] = {}
        self._weights: Mapping[str, Tensor] = {}

    def __enter__(self) -> Transaction:
        return self

    @property
    def masks(self) -> PackedMasks:
        """The masks of the model after the pruning, those of earlier ones included."""
        earlier, own = self.store.masks, PackedMasks(self._masks).packed
        return earlier | PackedMasks.sharing({n: m.common(earlier.packed.get(n, m)) for n, m in own.items()})

    def save(self, name: str) -> None:
        """Copy a weight that is about to change."""
        self.backup.save(self.model, name)

    def bypass(self, layer: nn.Module) -> None:
        """Switch a layer off."""
        if not is_bypassed(layer):
            self._bypassed.append(layer)
            bypass(layer)

    def switch_off(self, group: UnitGroup, kept: Tensor) -> None:
        """Have the layer of a group run with some units only, and of these with those that it runs with now."""
        before = units_that_run(self.model, group)
        self._switched.append((group, before))
        switch_off(self.model, group, kept if before is None else kept[torch.isin(kept, before)])

    @torch.no_grad()
    def overwrite(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Write to the model at once, for whoever goes on from the changed weights.

        Args:
            masks: Bool masks by parameter name, True = keep; other weights become zero.
            weights: New values by parameter name, written before the masks.
        """
        for name in dict.fromkeys([*masks, *weights]):
            self.save(name)
            if name in weights:
                write_weight(self.model, name, weights[name])
            if name in masks:
                zero_weight(self.model, name, masks[name])
                self._zeroed.add(name)

    def write(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], at_once: bool = False) -> None:
        """Take over the result of a pruning.

        Args:
            masks: Bool masks by parameter name, True = keep.
            weights: New values by parameter name.
            at_once: Write them to the model now, as training goes on from them. Otherwise :meth:`commit` does, which
                costs no copies; but if anything was changed before, or lies on the disk, where writing can fail, all
                is written now, so that all can be undone.
        """
        self._masks, self._weights = masks, weights
        at_once = at_once or any(self.model.get_parameter(name).is_meta for name in {*masks, *weights})
        if at_once or self.backup.names or self._bypassed or self._switched:
            self.overwrite({name: mask for name, mask in masks.items() if name not in self._zeroed}, weights)
            self._weights = {}

    def record(self, polish: PolishRecord) -> None:
        """Note what a polish did."""
        self.store.polishes = (*self.store.polishes, polish)

    def commit(self, config: PruningConfig) -> None:
        """Make the changes last, and hand the masks out.

        Args:
            config: The settings of the pruning.
        """
        self.store.update(self.model, self._masks, self._weights, config, self._keep_dense, self.backup.dense)

    def restore_weights(self) -> None:
        """Undo changes of weights, to start over."""
        self.backup.restore(self.model)
        self._zeroed.clear()

    def _roll_back(self) -> None:
        for layer in self._bypassed:
            restore(layer)
        for group, before in reversed(self._switched):
            if before is None:
                switch_on(self.model, group)
            else:
                switch_off(self.model, group, before)
        self.restore_weights()
        if self.backup.names and self._before is None:
            MaskStore.detach(self.model)
        elif self.backup.names and self._before is not None:
            self._before.attach(self.model)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                run_to_the_end(self._roll_back)
        finally:
            self.backup.close()
