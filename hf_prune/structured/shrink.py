"""shrink(): take out of a model what has been pruned, so that its tensors become smaller and it computes less.

A unit is taken out if that changes nothing: if nothing reads what it computes, since all weights that consume it are
zero, or if it only ever computes zero. So it does not matter how the zeros came about, and a unit that is zero in part
stays. A layer goes if it is bypassed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_prune.architectures.base import list_architectures
from hf_prune.architectures.find_unit_groups import LayerList, base_prefix, find_unit_groups, layer_lists
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.errors import ArchitectureError
from hf_prune.pruning.bypass import is_bypassed
from hf_prune.pruning.mask_store import MaskStore, warn_regrown
from hf_prune.structured.liveness import surviving_units
from hf_prune.structured.shrink_record import RECORD, layer_of, new_name, record_structure, simplify_config
from hf_prune.utils.offloaded_weights import refuse_offloaded

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def shrink_modules(model: Model, cuts: list[tuple[str, int, Tensor]] | None = None) -> Model:
    """Remove from a model, in place, every head, neuron, channel and layer that has been pruned as a whole.

    Weights that are zero elsewhere stay, and so do their masks. ``num_parameters()`` falls; the outputs are the same.
    Dense weights that ``keep_dense`` kept are given up, since they no longer fit.

    Args:
        model: A transformers model of an architecture in the table; see ``hf_prune.register_architecture``.
        cuts: Gets what became smaller, as (parameter or buffer, dimension, positions that stay).

    Returns:
        The same model; ``model.config.pruned_structure`` says what was taken out since it was dense.

    Raises:
        ArchitectureError: If its architecture is not registered, or a module cannot be resized, such as one whose
            weight another module uses as well; the model is as before.
        PlanError: If weights are offloaded.
        MaskError: If the masks no longer fit the model.
    """
    refuse_offloaded(model, "shrink()")
    warn_regrown(model, "the heads, neurons and channels that they belong to stay")
    lists = layer_lists(model)
    gone = {f"{layers.name}.{i}" for layers in lists for i, layer in enumerate(layers.layers) if is_bypassed(layer)}
    _check_layers(model, lists, gone)
    sites = [
        site
        for site in find_unit_groups(model)
        if not site.layers or not all(f"{name}.{i}" in gone for name, i in site.layers)
    ]
    before = sum(p.numel() for p in model.parameters())
    units = {site.name: site.units for site in sites}
    kept = {site.name: index for site in sites if (index := surviving_units(model, site)) is not None}
    changes = _resized(model, sites, kept)
    if (store := MaskStore.of(model)) is not None:
        store.check(model)
    MaskStore.detach(model)
    _commit(model, sites, kept, changes)
    if cuts is not None:
        cuts += _cuts(sites, kept)
    renamed = _remove_layers(model, lists, gone)
    speed, settings = (None, None) if store is None else (store.speed, store.config)
    if store is not None:
        _cut_masks(store, sites, kept, gone, renamed)
        store.attach(model)
    record_structure(model, before, units, kept, lists, gone, renamed)
    if speed is not None and (record := getattr(model.config, RECORD, None)) is not None:
        record["speed"] = speed.to_dict()
    if settings is not None and (record := getattr(model.config, RECORD, None)) is not None:
        record["pruning_config"] = settings.to_dict()
    simplify_config(model)
    return model


def resize(model: nn.Module, units: Mapping[str, int]) -> None:
    """Give sites of a model that has yet to get its weights other sizes, in place.

    Args:
        model: The model, on the meta device or with weights that do not matter.
        units: Numbers of units by site, as :func:`structure_of` gives them.

    Raises:
        ArchitectureError: If a site is unknown, or has fewer units.
    """
    parts = _parts(model)
    known = {prefix + site.name: site.units for prefix, (_, sites) in parts.items() for site in sites}
    for name, number in units.items():
        if not 0 <= number <= known.get(name, -1):
            found = f"{known[name]} units" if name in known else "no such site"
            raise ArchitectureError(
                f"the checkpoint has {number} units at {name}, and {type(model).__name__} has {found} there: its "
                f"config and its structure do not belong together"
            )
    for prefix, (part, sites) in parts.items():
        kept = {site.name: torch.arange(units[prefix + site.name]) for site in sites if prefix + site.name in units}
        _commit(part, sites, kept, _resized(part, sites, kept))


def _parts(model: nn.Module) -> dict[str, tuple[nn.Module, list[UnitGroup]]]:
    """The model and its sites, or the models inside one that is not in the table of architectures: by their names."""
    from transformers import PreTrainedModel

    found: dict[str, tuple[nn.Module, list[UnitGroup]]] = {}
    inside: set[nn.Module] = set()
    for name, part in model.named_modules():
        if part in inside or not isinstance(part, PreTrainedModel):
            continue
        if part.config.model_type in list_architectures():
            prefix = f"{name}.".removeprefix(base_prefix(model)) if name else ""
            found[prefix] = part, find_unit_groups(part)
            inside.update(part.modules())
    return found or {"": (model, find_unit_groups(model))}


def take_out_layers(model: nn.Module) -> None:
    """Take the bypassed layers out of a model whose masks do not matter, in place; nothing else."""
    lists = layer_lists(model)
    gone = {f"{layers.name}.{i}" for layers in lists for i, layer in enumerate(layers.layers) if is_bypassed(layer)}
    _remove_layers(model, lists, gone)


def _resized(model: nn.Module, sites: list[UnitGroup], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters and buffers that become smaller, by name; the model is not touched."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{name}.{key}".removeprefix("."))
    changes: dict[str, Tensor] = {}
    for part_name, dim, index in _cuts(sites, kept):
        tensor = _tensor(model, part_name)
        if len(users := holders.get(id(tensor), [])) > 1:
            raise ArchitectureError(
                f"{part_name} cannot be made smaller: it is shared by {', '.join(users)}; give each a weight of "
                f"its own first"
            )
        weight = changes.get(part_name, tensor.detach())
        changes[part_name] = weight.index_select(dim, index.to(weight.device))
    return changes


def _cuts(sites: list[UnitGroup], kept: Mapping[str, Tensor]) -> list[tuple[str, int, Tensor]]:
    """(parameter, dimension, positions that stay) of everything that becomes smaller."""
    return [
        (part.name, part.dim, part.index(kept[site.name]))
        for site in sites
        if site.name in kept
        for part in site.parts + site.buffers
    ]


def _commit(
    model: nn.Module, sites: list[UnitGroup], kept: Mapping[str, Tensor], changes: Mapping[str, Tensor]
) -> None:
    for name, tensor in changes.items():
        holder, _, key = name.rpartition(".")
        module = model.get_submodule(holder)
        if key in module._buffers:
            module._buffers[key] = tensor.contiguous()
            continue
        old = module._parameters[key]
        assert old is not None
        module._parameters[key] = nn.Parameter(tensor.contiguous(), requires_grad=old.requires_grad)
        if key == "weight" and tensor.ndim == 2:
            _set_features(module, tensor)
    for site in sites:
        if site.name in kept:
            for holder, attribute in site.counts:
                module = model.get_submodule(holder)
                setattr(module, attribute, getattr(module, attribute) * len(kept[site.name]) // site.units)


def _tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    holder, _, key = name.rpartition(".")
    module = model.get_submodule(holder)
    found = module._buffers.get(key) if key in module._buffers else module._parameters[key]
    assert found is not None
    return found


def _set_features(module: nn.Module, weight: Tensor) -> None:
    """What a module says of its own shape."""
    first, second = weight.shape
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = first, second
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = first, second
    else:  # Conv1D
        setattr(module, "nx", first)  # noqa: B010
        setattr(module, "nf", second)  # noqa: B010


def _check_layers(model: nn.Module, lists: list[LayerList], gone: set[str]) -> None:
    left = {each.name: [i for i in range(len(each.layers)) if f"{each.name}.{i}" not in gone] for each in lists}
    for each in lists:
        stay = left[each.name]
        if stay[: each.stack.fixed] != list(range(each.stack.fixed)) or not stay:
            first = next(i for i in range(len(each.layers)) if i not in stay)
            raise ArchitectureError(
                f"{each.name}.{first} cannot be removed: other layers of {type(model).__name__} need it; undo it with "
                f"discard_masks(), or reload the model"
            )
        other = base_prefix(model) + (each.stack.not_below or "")
        if each.stack.not_below and len(stay) < len(each.layers) and len(stay) < len(left.get(other, ())):
            raise ArchitectureError(
                f"{each.name} would be left with {len(stay)} layers and {other} with {len(left[other])}: transformers "
                f"cannot generate with such a {type(model).__name__}; remove as many layers of {other}"
            )


def _remove_layers(model: nn.Module, lists: list[LayerList], gone: set[str]) -> dict[str, str]:
    """Take bypassed layers out of their lists; the new names of the layers that stay, by the old ones."""
    renamed: dict[str, str] = {}
    for layers in lists:
        total = len(layers.layers)
        stay = [i for i in range(total) if f"{layers.name}.{i}" not in gone]
        renamed |= {f"{layers.name}.{old}": f"{layers.name}.{new}" for new, old in enumerate(stay)}
        if len(stay) == total:
            continue
        holder, _, attribute = layers.name.rpartition(".")
        parent = model.get_submodule(holder)
        setattr(parent, attribute, nn.ModuleList([layers.layers[i] for i in stay]))
        for number, index in enumerate(stay):
            for module in layers.layers[index].modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    setattr(module, "layer_idx", number)  # noqa: B010
        configs = {id(c): c for c in (model.config, getattr(parent, "config", None)) if c is not None}
        for config in configs.values():
            for key in layers.stack.per_layer:
                if isinstance(values := getattr(config, key, None), list) and len(values) == total:
                    setattr(config, key, [values[i] for i in stay])
        setattr(model.config, layers.stack.config, len(stay))
        for holder_of_count in (parent, *(c for c in configs.values() if c is not model.config)):
            for key in ("num_layers", "num_hidden_layers", "n_layers"):
                if getattr(holder_of_count, key, None) == total:
                    setattr(holder_of_count, key, len(stay))
    return renamed


def _cut_masks(
    store: MaskStore, sites: list[UnitGroup], kept: Mapping[str, Tensor], gone: set[str], renamed: Mapping[str, str]
) -> None:
    """Have the masks follow their weights."""
    masks = dict(store.masks)
    for name, dim, index in _cuts(sites, kept):
        if name in masks:
            masks[name] = masks[name].index_select(dim, index.to(masks[name].device))
    masks = {new_name(name, renamed): mask for name, mask in masks.items() if layer_of(name, gone) is None}
    store.dense = None
    store.masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}


def structure_of(model: nn.Module, dense: Callable[[], nn.Module]) -> dict[str, int]:
    """The numbers of units that the config does not tell.

    Args:
        model: The model.
        dense: Makes a model of the same class from the config alone; called on the meta device.

    Returns:
        Units by site, of those sites that differ.
    """
    with torch.device("meta"):
        told = _sizes(dense())
    return {name: units for name, units in _sizes(model).items() if units != told.get(name)}


def _sizes(model: nn.Module) -> dict[str, int]:
    return {prefix + site.name: site.units for prefix, (_, sites) in _parts(model).items() for site in sites}
