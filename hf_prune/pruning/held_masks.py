"""Where masks live: beside the weights, in the modules that hold these.

Each module has the masks and dense values of its own parameters as a plain attribute, invisible to state dicts. Copies
and pickles of a module therefore take its masks along, and it does not matter through which wrapper or holder a model
was pruned. A roster at the module that was pruned lists the masks that were handed out below it, so that a mask whose
module was replaced is noticed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_prune.errors import MaskError
from hf_prune.kernels.packed_masks import PackedMask, PackedMasks
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.records import PolishRecord, SpeedRecord
from hf_prune.utils.wrapping import plain_name

Value = TypeVar("Value")
ATTRIBUTE = "_hf_prune_masks"  # of modules that hold weights with masks
_ROSTER = "_hf_prune_roster"  # of modules that were pruned


@dataclass(eq=False)
class PruningOrigin:
    """How masks came about; all masks of one pruning share it.

    Args:
        config: The settings, None if the masks came from elsewhere.
        polishes: What each training after a pruning did, the first one first.
        speed: The speed-up that the pruning aimed at, and what was measured.
        time: When the masks were handed out; the latest counts where parts of a model were pruned separately.
    """

    config: PruningConfig | None
    polishes: tuple[PolishRecord, ...]
    speed: SpeedRecord | None
    time: int = field(default_factory=time.time_ns)


@dataclass(eq=False)
class HeldMasks:
    """The masks that one module holds, and dense weights, by the names of its own parameters.

    ``trained_by`` is the optimizer, by the name of its class, whose steps would have filled the zeros in a training
    that nobody told of masks; empty once that was said.
    """

    pruning: PruningOrigin
    masks: PackedMasks = field(default_factory=PackedMasks)
    dense: dict[str, Tensor] = field(default_factory=dict)
    trained_by: str = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Masks that earlier versions pickled are bool tensors."""
        self.__dict__.update(state)
        if not isinstance(self.masks, PackedMasks):
            self.masks = PackedMasks(self.masks)


_Holders = list[tuple[HeldMasks, str]]  # of one mask, each with the name that it has for the weight


@dataclass
class GatheredMasks:
    """The masks inside a model, by the names that it gives its parameters.

    Args:
        masks: Of parameters that the model has.
        dense: Dense weights, where they were kept.
        lost: Masks whose module is not part of the model any more.
        origins: The prunings that made them, the last one last.
    """

    masks: PackedMasks
    dense: dict[str, Tensor]
    lost: PackedMasks
    origins: list[PruningOrigin]


def held_by(module: nn.Module) -> HeldMasks | None:
    """The masks that a module itself holds."""
    held: HeldMasks | None = module.__dict__.get(ATTRIBUTE)
    return held


def mask_of(model: nn.Module, name: str) -> PackedMask | None:
    """The mask of one parameter, as bits, without a walk through the whole model."""
    path, _, key = name.rpartition(".")
    held = held_by(model.get_submodule(path))
    return None if held is None else held.masks.packed.get(key)


def gather_masks(model: nn.Module) -> GatheredMasks:
    """Collect the masks of all modules inside a model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, PackedMask] = {}
    dense: dict[str, Tensor] = {}
    origins: dict[int, PruningOrigin] = {}
    rosters: dict[str, _Holders] = {}
    present = set()
    for prefix, module in model.named_modules():
        roster: dict[str, _Holders] = module.__dict__.get(_ROSTER, {})
        rosters |= {f"{prefix}.{name}".removeprefix("."): holders for name, holders in roster.items()}
        if (held := held_by(module)) is None:
            continue
        present.add(id(held))
        if held.masks:
            origins[id(held.pruning)] = held.pruning

        def name_of(key: str, module: nn.Module = module, prefix: str = prefix) -> str:
            return names.get(id(module._parameters.get(key)), f"{prefix}.{key}".removeprefix("."))

        dense |= {name_of(key): tensor for key, tensor in held.dense.items()}
        for key, mask in held.masks.packed.items():
            other = masks.get(name_of(key), mask)  # of a tied weight that was pruned through another module as well
            masks[name_of(key)] = mask if other is mask else mask.common(other)
    lost: dict[str, PackedMask] = {}
    for name, holders in rosters.items():
        held, key = holders[0]
        if name not in masks and key in held.masks and not any(id(holder) in present for holder, _ in holders):
            lost[name] = held.masks.packed[key]
            dense |= {name: held.dense[key]} if key in held.dense else {}
    in_order = sorted(origins.values(), key=lambda origin: origin.time)
    return GatheredMasks(PackedMasks.sharing(masks), dense, PackedMasks.sharing(lost), in_order)


def hand_out(
    model: nn.Module,
    masks: PackedMasks,
    dense: Mapping[str, Tensor],
    replaced: Collection[str],
    origin: PruningOrigin,
) -> None:
    """Give each module the masks of its parameters; modules inside the model have no others afterwards.

    Args:
        model: The model by whose names the masks go; names may leave out wrappers inside it.
        masks: Bool masks, as bits.
        dense: Dense weights.
        replaced: Names of masks whose module is not part of the model any more: only the roster keeps them.
        origin: How the masks came about.

    Raises:
        MaskError: If a mask has the name of no parameter.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = set(names.values()) | {plain_name(name) for name in names.values()}
    if missing := [name for name in masks if name not in known and name not in replaced]:
        raise MaskError(f"{missing[0]!r} has a mask, and {type(model).__name__} has no such parameter")
    clear_masks(model)
    roster: dict[str, _Holders] = {}
    for name in (name for name in replaced if name in masks):
        key = name.rpartition(".")[2]
        roster[name] = [(HeldMasks(origin, PackedMasks.sharing({key: masks.packed[name]})), key)]
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if (name := names.get(id(parameter), "")) in replaced:
                continue
            mask, weight = _by_name(masks.packed, name), _by_name(dense, name)
            if mask is None and weight is None:
                continue
            held: HeldMasks = module.__dict__.setdefault(ATTRIBUTE, HeldMasks(origin))
            held.pruning, held.trained_by = origin, ""
            if mask is not None:
                held.masks.packed[key] = mask
                roster.setdefault(name, []).append((held, key))  # several, where a weight is tied
            if weight is not None:
                held.dense[key] = weight
    model.__dict__[_ROSTER] = roster


def clear_masks(model: nn.Module) -> None:
    """Empty what the modules inside a model hold; rosters around it see that these masks are gone on purpose."""
    for module in model.modules():
        module.__dict__.pop(_ROSTER, None)
        if (held := held_by(module)) is not None:
            held.masks.clear()
            held.dense.clear()


def remove_masks(model: nn.Module) -> None:
    """Leave no trace of masks at a model; its weights stay as they are."""
    clear_masks(model)
    for module in model.modules():
        module.__dict__.pop(ATTRIBUTE, None)


def take_trained_by(model: nn.Module) -> set[str]:
    """The optimizers that trained weights with masks unasked, which are forgotten with that."""
    found = {held for module in model.modules() if (held := held_by(module)) is not None and held.trained_by}
    names = {held.trained_by for held in found}
    for held in found:
        held.trained_by = ""
    return names


def replace_masks(model: nn.Module, moved: Mapping[int, PackedMask]) -> None:
    """Have all modules hold copies of masks on other devices, by the ``id`` of the mask that each one replaces."""
    for module in model.modules() if moved else ():
        if (held := held_by(module)) is not None:
            packed = held.masks.packed
            held.masks = PackedMasks.sharing({key: moved.get(id(mask), mask) for key, mask in packed.items()})


def _by_name(tensors: Mapping[str, Value], name: str) -> Value | None:
    return tensors.get(name, tensors.get(plain_name(name)))
