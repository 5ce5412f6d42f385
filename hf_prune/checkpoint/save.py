"""Save a pruned model with its masks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.architectures.bypass import bypassed_layers
from hf_prune.architectures.switched_off import layers_without_units
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import StoredMasks, save_masks
from hf_prune.checkpoint.module_changes import module_changes
from hf_prune.checkpoint.packed.quantization_config import structure_config
from hf_prune.checkpoint.packed.remote_code import add_remote_code, auto_classes
from hf_prune.checkpoint.staging import other_variants, staged_checkpoint
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.pruning.mask_store import MaskStore, warn_regrown
from hf_prune.structured.shrink import resize, structure_of
from hf_prune.structured.shrink_record import RECORD, is_shrunk
from hf_prune.utils.json_files import read_json_object, write_config
from hf_prune.utils.notices import warn_user
from hf_prune.utils.offloaded_weights import values_of
from hf_prune.utils.wrapping import adapters, plain_name


def save_pruned(
    model: nn.Module,
    dense_class: type,
    save: Callable[..., Any],
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    remote_code: bool = False,
    **kwargs: Any,
) -> None:
    """Save a model as its dense class would, with its masks in a file beside the weights.

    Args:
        model: The pruned model.
        dense_class: The class that the checkpoint names, so that plain transformers loads it.
        save: The unbound ``save_pretrained`` of that class.
        folder: The folder to save into; files with other names stay.
        overwrite: Also delete weights in the way that others wrote.
        remote_code: Add a file that builds a shrunk model where hf_prune is not installed.
        **kwargs: Passed to ``save``.

    Raises:
        CheckpointError: If ``folder`` is a file; if a layer is switched off but not removed; if the model carries
            adapters of a surrounding ``PeftModel``; if a part is shrunk in a way that the config cannot describe; if
            weights that others wrote would be deleted; or if another variant in the folder has other masks.
        MaskError: If the masks do not fit the model.
        PlanError: If weights were never loaded.
    """
    pruned_class = model.__class__
    if bypassed := bypassed_layers(model):
        raise CheckpointError(
            f"layers are switched off, which a checkpoint cannot express: {', '.join(bypassed)}; call shrink() first, "
            f"which removes them"
        )
    if without := layers_without_units(model):
        raise CheckpointError(
            f"experts are switched off, which a checkpoint cannot express: {', '.join(without)} would send tokens to "
            f"them again; call shrink() first, which removes them"
        )
    places = set(getattr(model, "hf_device_map", {}).values())
    if kwargs.get("state_dict") is None and not places & {"cpu", "disk"} and any(p.is_meta for p in model.parameters()):
        # transformers reads offloaded weights only where from_pretrained has offloaded them
        kwargs["state_dict"] = {name: values_of(model, name, tensor) for name, tensor in model.state_dict().items()}
    only_adapters = getattr(model, "_hf_peft_config_loaded", False)  # then transformers saves nothing else
    if (adapted := adapters(model)) and not only_adapters:
        raise CheckpointError(
            f"{next(iter(adapted.values()))} carries adapters, and {dense_class.__name__} could not load the result: "
            f"merge them first, with hf_prune.merge_lora, or save only the adapters, with save_pretrained of the "
            f"PeftModel"
        )
    store = MaskStore.of(model)
    variant = kwargs.get("variant")
    if not only_adapters:
        _check_variants(store, Path(folder), variant)
    elif store is not None:
        warn_user(
            f"this {dense_class.__name__} carries adapters, so transformers saves only these: neither its other "
            f"weights nor its {len(store.masks)} masks are in {folder}. Before saving, hf_prune.merge_lora(model) "
            f"merges both into one sparse model, and model.delete_adapter(...) removes the adapters",
        )
    if store is not None:
        store.check(model)
        warn_regrown(
            model,
            "they are zero in the saved model, which is not the model that was trained or evaluated",
            kwargs.get("state_dict"),
        )
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            store.apply(model)  # training steps may have changed removed weights
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = _masked(kwargs["state_dict"], store.masks)
    if not only_adapters:
        if any(plain_name(f"{name}.") != f"{name}." for name, _ in model.named_modules()):
            kwargs["state_dict"] = kwargs.get("state_dict") or model.state_dict()
        if kwargs.get("state_dict") is not None:  # under the names of the class, without parts that wrappers add
            kwargs["state_dict"] = {plain_name(name): tensor for name, tensor in kwargs["state_dict"].items()}
    model.__class__ = dense_class
    try:
        with staged_checkpoint(folder, overwrite=overwrite, variant=variant) as staging:
            save(model, staging, **kwargs)
            if only_adapters and (path := staging / "adapter_model.safetensors").is_file():
                tensors = load_file(path)
                if any(plain_name(name) != name for name in tensors):  # PEFT looks them up by module names
                    save_file({plain_name(name): t for name, t in tensors.items()}, path, {"format": "pt"})
            if not only_adapters:
                describe_structure(model, dense_class, staging, remote_code)
                if store is not None:
                    save_masks(store, staging / MASK_FILE)
    finally:
        model.__class__ = pruned_class


def refuse_adapters_alone(model: Any, what: str) -> None:
    """Make sure that saving saves the model, and not only the adapters that ``add_adapter`` put into it.

    Args:
        model: The model.
        what: The option that needs a whole model, for messages.

    Raises:
        CheckpointError: If the model carries adapters.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{what} is for whole models, and this {type(model).__name__} carries adapters, of which transformers "
            f"saves nothing else: merge them first, with hf_prune.merge_lora(model), or remove them, with "
            f"model.delete_adapter(...)"
        )


def _check_variants(store: MaskStore | None, folder: Path, variant: str | None) -> None:
    """Make sure that other variants of the weights, which stay in a folder, have the same masks."""
    if not (variants := other_variants(folder, variant)):
        return
    path = folder / MASK_FILE
    stored = dict(StoredMasks(path)) if path.is_file() else {}
    masks = {} if store is None else store.masks
    if stored.keys() != masks.keys() or not all(torch.equal(stored[name], mask.cpu()) for name, mask in masks.items()):
        raise CheckpointError(
            f"{folder} holds {variants[0]}, whose masks are not those of this model, and both would share {MASK_FILE}: "
            f"save into another folder"
        )


def describe_structure(model: Any, dense_class: Any, folder: Path, remote_code: bool = False) -> None:
    """Add the sizes of a shrunk model to its saved config, where the config alone does not give them.

    Args:
        model: The model, of which only the shapes are looked at.
        dense_class: The class that the checkpoint names.
        folder: Where its ``config.json`` is.
        remote_code: Add a file that builds the model where hf_prune is not installed.

    Raises:
        CheckpointError: If a part is shrunk in a way that the config cannot describe.
        ConfigError: If code is asked for that nothing needs.
    """
    if not is_shrunk(model):
        return
    saved = read_json_object(folder / "config.json")
    saved |= {key: part.config.to_dict() for key, part in _stray_configs(model).items()}
    config_class: Any = type(model.config)
    # JSON has no infinity, and transformers writes an object in its place.
    described = config_class.from_dict(config_class._decode_special_floats(copy.deepcopy(saved)))
    structure = structure_of(model, lambda: dense_class(copy.deepcopy(described)))
    # Build what a loader will build, and compare its shapes.
    with torch.device("meta"):
        rebuilt = dense_class(described)
        resize(rebuilt, structure)
    shapes = {plain_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    rebuilt_shapes = {name: tuple(parameter.shape) for name, parameter in rebuilt.named_parameters()}
    if differing := [n for n in {**shapes, **rebuilt_shapes} if shapes.get(n) != rebuilt_shapes.get(n)]:
        name = differing[0]
        raise CheckpointError(
            f"{name} has the shape {shapes.get(name)}, and {rebuilt_shapes.get(name)} in the {dense_class.__name__} "
            f"that config.json can describe (None: it is missing), so the checkpoint could not be loaded: nothing was "
            f"saved; save the shrunk part alone, with its own save_pretrained"
        )
    if remote_code and not structure:
        raise ConfigError("remote_code=True for a model whose config tells all its sizes: any transformers loads it")
    if remote_code:
        add_remote_code(folder, saved, auto_classes(saved), module_changes(dense_class, described, structure))
    if structure:
        saved["quantization_config"] = structure_config(structure)
    write_config(folder, saved)


def _stray_configs(model: Any) -> dict[str, Any]:
    """Shrunk models inside a model whose configs are only copied in its own config, by the key of the copy."""
    sub_configs = {key: getattr(model.config, key, None) for key in getattr(model.config, "sub_configs", {})}
    strays: dict[str, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        known = config is model.config or any(config is sub_config for sub_config in sub_configs.values())
        if getattr(config, RECORD, None) is None or known:
            continue
        if len(keys := [key for key, copied in sub_configs.items() if type(copied) is type(config)]) == 1:
            strays.setdefault(keys[0], module)
    return strays


def _masked(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masks = {**masks, **{plain_name(name): mask for name, mask in masks.items()}}
    return {
        name: tensor.masked_fill(~masks[name].to(tensor.device), 0) if name in masks else tensor
        for name, tensor in state.items()
    }
