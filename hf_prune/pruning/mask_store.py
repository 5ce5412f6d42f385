"""MaskStore: the masks of a model in one place, to look at them, to add to them, and to apply them.

Weights stay plain parameters with zeros, and each mask lives beside its weight (see :mod:`.held_masks`), so state-dict
keys never change, and ``save_pretrained``, ``deepcopy``, tied weights and ``torch.compile`` work as on any model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hf_prune.architectures.bypass import bypassed_layers, restore
from hf_prune.architectures.switched_off import switch_all_on
from hf_prune.errors import MaskError
from hf_prune.kernels.packed_masks import PackedMask, PackedMasks
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.dense_weights import can_keep_dense, restore_dense
from hf_prune.pruning.held_masks import (
    ATTRIBUTE,
    HeldMasks,
    PruningOrigin,
    gather_masks,
    hand_out,
    remove_masks,
    replace_masks,
)
from hf_prune.pruning.mask_fit import check_fit, resize_like, zero_weight
from hf_prune.pruning.optimizer_guard import guard_masks, unguard_masks
from hf_prune.pruning.records import PolishRecord, SpeedRecord
from hf_prune.pruning.regrown import unwatch_state_dict, warn_of_regrown, watch_state_dict
from hf_prune.utils.interrupts import run_to_the_end
from hf_prune.utils.offloaded_weights import values_of, write_weight
from hf_prune.utils.registry import unknown_name
from hf_prune.utils.wrapping import check_is_model

_Held, _Pruning = HeldMasks, PruningOrigin  # what pickles of earlier versions call them


@dataclass
class MaskStore:
    """The masks of one model, or of a part or a holder of one: what :meth:`of` gathers and :meth:`attach` hands out.

    Args:
        masks: Bool masks shaped like their parameters, by parameter name; True = keep. Kept as bits.
        dense: The weights as they were before pruning, where they were kept.
        config: The settings of the last pruning, None if the masks came from elsewhere.
        polishes: What each training after a pruning did, the first one first.
        speed: The speed-up that the last pruning was to bring, and what was measured.
        replaced: Names of masks whose module is not part of the model any more; they fit nothing.
    """

    masks: PackedMasks = field(default_factory=PackedMasks)
    dense: dict[str, Tensor] | None = None
    config: PruningConfig | None = None
    polishes: tuple[PolishRecord, ...] = ()
    speed: SpeedRecord | None = None
    replaced: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.masks = PackedMasks(self.masks)

    @staticmethod
    def of(model: nn.Module) -> MaskStore | None:
        """The masks of the weights inside a module, by the names that it gives them; None if there are none.

        Raises:
            ModelTypeError: If it is no model.
        """
        check_is_model(model)
        _update_old_pickles(model)
        gathered = gather_masks(model)
        if not gathered.masks and not gathered.lost:
            return None
        origins = gathered.origins
        return MaskStore(
            gathered.masks | gathered.lost,
            gathered.dense or None,
            config=origins[-1].config if origins else None,
            polishes=tuple(dict.fromkeys(record for origin in origins for record in origin.polishes)),
            speed=origins[-1].speed if origins else None,
            replaced=frozenset(gathered.lost),
        )

    def attach(self, model: nn.Module) -> None:
        """Hand the masks out to the modules that hold the weights; modules inside the model have no others afterwards.

        Args:
            model: The model by whose names the masks go; names may leave out wrappers inside it.

        Raises:
            MaskError: If a mask has the name of no parameter.
        """
        _update_old_pickles(model)
        origin = PruningOrigin(self.config, self.polishes, self.speed)
        hand_out(model, self.masks, self.dense or {}, self.replaced, origin)
        guard_masks(model)
        watch_state_dict(model)

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Leave a model without masks; its weights stay as they are."""
        _update_old_pickles(model)
        unguard_masks(model)
        unwatch_state_dict(model)
        remove_masks(model)

    def update(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        config: PruningConfig | None,
        keep_dense: bool,
        dense: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Add masks, attach the store, and zero what they remove.

        Args:
            model: The model.
            masks: New masks; where one exists already, only what both keep stays.
            weights: New values of repaired weights.
            config: The settings that made them.
            keep_dense: Keep a copy of the dense weights, so that :meth:`discard` works.
            dense: Dense weights that the model does not hold any more.

        Raises:
            MaskError: If ``keep_dense`` is asked for but a weight was pruned before without it.
        """
        parameters = dict(model.named_parameters())
        if keep_dense:
            self.check_dense()
        if keep_dense or self.dense is not None:
            self.dense = self.dense or {}
            for name in dict.fromkeys([*masks, *weights, *dense]):
                if name not in self.dense and name not in self.masks:
                    weight = dense[name] if name in dense else values_of(model, name, parameters[name]).clone()
                    self.dense[name] = weight
        for name, mask in PackedMasks(masks).packed.items():
            before = self.masks.packed.get(name)
            self.masks.packed[name] = mask if before is None else mask.common(before)
        self.config = config

        @torch.no_grad()
        def commit() -> None:
            self.attach(model)
            for name, weight in weights.items():
                write_weight(model, name, weight)
            self.apply(model)

        run_to_the_end(commit)

    def check_dense(self) -> None:
        """:func:`can_keep_dense` of these masks."""
        can_keep_dense(self.masks, self.dense or {})

    def check(self, model: nn.Module) -> None:
        """Make sure that the masks fit the model.

        Raises:
            MaskError: If a masked parameter is missing or has another shape.
        """
        check_fit(model, self.masks, self.replaced)

    def apply(self, model: nn.Module) -> None:
        """Set every removed weight to exact zero; needed after anything that writes weights, such as a training step.

        Raises:
            MaskError: If a mask does not fit the model.
        """
        self.check(model)
        parameters = dict(model.named_parameters())
        moved: dict[int, PackedMask] = {}
        for name, mask in (packed := self.masks.packed).items():
            device = torch.device("cpu") if parameters[name].is_meta else parameters[name].device
            if mask.device != device:
                moved[id(mask)] = packed[name] = mask.to(device)
            zero_weight(model, name, packed[name])
        replace_masks(model, moved)

    def make_permanent(self, model: nn.Module) -> None:
        """Drop the masks and leave the zeros; warns if some are not zero any more."""
        self.check(model)
        warn_regrown(model, "they become zero now")
        self.apply(model)
        self.detach(model)

    def drop(self, model: nn.Module, names: Collection[str]) -> None:
        """Drop the masks and dense values of some weights, which stay as they are.

        Args:
            model: The model.
            names: Names of parameters, which the model need not have any more.

        Raises:
            UnknownNameError: If one has no mask.
        """
        if unknown := [name for name in names if name not in self.masks]:
            raise unknown_name("mask", unknown[0], self.masks)
        for name in names:
            del self.masks[name]
            (self.dense or {}).pop(name, None)
        if self.masks:
            self.attach(model)
        else:
            self.detach(model)

    def follow_resize(self, model: nn.Module, before: Mapping[str, torch.Size]) -> None:
        """Have masks follow weights that grew or shrank at the end; new weights are kept.

        Args:
            model: The model.
            before: The shapes of its parameters when the masks fitted them.
        """
        self.replaced -= resize_like(model, before, self.masks, is_mask=True)
        self.replaced -= resize_like(model, before, self.dense or {}, is_mask=False)
        self.attach(model)

    def discard(self, model: nn.Module) -> None:
        """Drop the masks and give the dense weights back, bit for bit.

        Raises:
            MaskError: If the dense weights were not kept, or the masks no longer fit the model.
        """
        self.check(model)
        restore_dense(model, self.masks, self.dense)
        for layer in bypassed_layers(model):
            restore(model.get_submodule(layer))
        switch_all_on(model)
        self.detach(model)

    def view(self) -> Mapping[str, Tensor]:
        """The masks, read-only as a mapping."""
        return MappingProxyType(self.masks)


def checked_masks(model: nn.Module) -> Mapping[str, Tensor]:
    """The masks that a model has, by parameter name; none if it was not pruned.

    Raises:
        MaskError: If they no longer fit the model.
    """
    if (store := MaskStore.of(model)) is None:
        return {}
    store.check(model)
    return store.masks


def drop_masks(model: nn.Module, *names: str) -> None:
    """Drop the masks of some weights, as after one of them was replaced; the others stay.

    The weights keep their values, and are like any others from then on: a training may change their zeros.

    Args:
        model: Any module with masks.
        *names: Of parameters, as in ``model.masks``.

    Raises:
        MaskError: If there are no masks.
        UnknownNameError: If one has no mask.

    Example:
        >>> from hf_prune import prune
        >>> model = prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 0.5)
        >>> model[1] = nn.Linear(4, 3)
        >>> drop_masks(model, "1.weight")
        >>> list(MaskStore.of(model).masks)
        ['0.weight']
    """
    if (store := MaskStore.of(model)) is None:
        raise MaskError(f"this {type(model).__name__} has no masks, so there are none to drop")
    store.drop(model, names)


def warn_regrown(model: nn.Module, consequence: str, weights: Mapping[str, Tensor] | None = None) -> None:
    """Warn of what a training that knows nothing of masks did: see :func:`hf_prune.pruning.regrown.warn_of_regrown`.

    Args:
        model: The model; nothing happens without masks.
        consequence: What that means for what is done now.
        weights: In place of the model's own parameters, by their names.
    """
    if (store := MaskStore.of(model)) is not None:
        warn_of_regrown(model, store.masks, weights, consequence)


def _update_old_pickles(model: nn.Module) -> None:
    """Hand out the masks of models that early versions pickled, in which one module holds the whole store."""
    stores = [
        (m, m.__dict__.pop(ATTRIBUTE)) for m in model.modules() if isinstance(m.__dict__.get(ATTRIBUTE), MaskStore)
    ]
    for module, store in reversed(stores):  # a module comes after those that hold it, and is to be updated before them
        inside = MaskStore.of(module)
        store.masks = (inside.masks if inside is not None else PackedMasks()) | store.masks
        store.replaced = frozenset(store.masks) - {name for name, _ in module.named_parameters()}
        store.attach(module)
