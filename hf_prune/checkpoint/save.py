"""Save a pruned model with its masks."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import StoredMasks, save_masks
from hf_prune.checkpoint.packed.quantization_config import structure_config
from hf_prune.checkpoint.staging import other_variants, staged_checkpoint
from hf_prune.errors import CheckpointError
from hf_prune.pruning.bypass import bypassed_layers
from hf_prune.pruning.mask_store import MaskStore, warn_regrown
from hf_prune.structured.shrink import resize, structure_of
from hf_prune.structured.shrink_record import RECORD, is_shrunk
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
    **kwargs: Any,
) -> None:
    """Save a model as its dense class would, with the masks beside it.

    Args:
        model: The pruned model.
        dense_class: The class that the checkpoint names, so that plain transformers loads it.
        save: The class's own unbound ``save_pretrained``.
        folder: Where to; files of other names stay.
        overwrite: Also delete weights in the way that were written by others.
        **kwargs: Passed to ``save``.

    Raises:
        CheckpointError: If ``folder`` is a file, a layer is switched off and not taken out, or the model carries
            adapters of a ``PeftModel`` around it; if a part of it is shrunk in a way that cannot be described; or if
            weights that others wrote would be deleted, or masks differ from those of another variant in the folder.
        MaskError: If the masks no longer fit the model.
        PlanError: If weights were never loaded.
    """
    pruned_class = model.__class__
    if bypassed := bypassed_layers(model):
        raise CheckpointError(
            f"layers are switched off, which a checkpoint cannot say: {', '.join(bypassed)}; call shrink() first, "
            f"which takes them out"
        )
    places = set(getattr(model, "hf_device_map", {}).values())
    if kwargs.get("state_dict") is None and not places & {"cpu", "disk"} and any(p.is_meta for p in model.parameters()):
        # transformers reads offloaded weights only where from_pretrained has offloaded them
        kwargs["state_dict"] = {name: values_of(model, name, tensor) for name, tensor in model.state_dict().items()}
    only_adapters = getattr(model, "_hf_peft_config_loaded", False)  # what transformers then saves
    if (adapted := adapters(model)) and not only_adapters:
        raise CheckpointError(
            f"{next(iter(adapted.values()))} carries adapters, and no {dense_class.__name__} could load what would be "
            f"saved: merge them first, with hf_prune.merge_lora, or save the adapters alone, with the PeftModel's own "
            f"save_pretrained"
        )
    store = MaskStore.of(model)
    variant = kwargs.get("variant")
    if not only_adapters:
        _check_variants(store, Path(folder), variant)
    elif store is not None:
        warn_user(
            f"this {dense_class.__name__} carries adapters, so transformers saves these alone: neither its other "
            f"weights nor its {len(store.masks)} masks are in {folder}. hf_prune.merge_lora(model) before saving "
            f"makes one sparse model of both, and model.delete_adapter(...) takes the adapters out",
        )
    if store is not None:
        store.check(model)
        warn_regrown(
            model,
            "they are zero in what is saved, which is not the model that was trained or evaluated",
            kwargs.get("state_dict"),
        )
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            store.apply(model)  # training steps may have moved what the masks remove
        if kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = _masked(kwargs["state_dict"], store.masks)
    if not only_adapters:
        if any(plain_name(f"{name}.") != f"{name}." for name, _ in model.named_modules()):
            kwargs["state_dict"] = kwargs.get("state_dict") or model.state_dict()
        if kwargs.get("state_dict") is not None:  # names are those of the class, without what wrappers add
            kwargs["state_dict"] = {plain_name(name): tensor for name, tensor in kwargs["state_dict"].items()}
    model.__class__ = dense_class
    try:
        with staged_checkpoint(folder, overwrite=overwrite, variant=variant) as staging:
            save(model, staging, **kwargs)
            if only_adapters and (path := staging / "adapter_model.safetensors").is_file():
                tensors = load_file(path)
                if any(plain_name(name) != name for name in tensors):  # PEFT looks for them by the names of modules
                    save_file({plain_name(name): t for name, t in tensors.items()}, path, {"format": "pt"})
            if not only_adapters:
                _describe_structure(model, dense_class, staging)
                if store is not None:
                    save_masks(store, staging / MASK_FILE)
    finally:
        model.__class__ = pruned_class


def refuse_adapters_alone(model: Any, what: str) -> None:
    """Make sure that saving a model saves a model, and not the adapters that ``add_adapter`` has put inside it.

    Args:
        model: The model.
        what: What is asked of its checkpoint, for the message.

    Raises:
        CheckpointError: If it carries adapters.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"{what} is for whole models, and of this {type(model).__name__}, which carries adapters, transformers "
            f"saves these alone: merge them first, with hf_prune.merge_lora(model), or take them out, with "
            f"model.delete_adapter(...)"
        )


def _check_variants(store: MaskStore | None, folder: Path, variant: str | None) -> None:
    """Make sure that masks are those of the other variants of the weights that stay in a folder."""
    if not (others := other_variants(folder, variant)):
        return
    path = folder / MASK_FILE
    stored = dict(StoredMasks(path)) if path.is_file() else {}
    masks = {} if store is None else store.masks
    if stored.keys() != masks.keys() or not all(torch.equal(stored[name], mask.cpu()) for name, mask in masks.items()):
        raise CheckpointError(
            f"{folder} holds {others[0]}, whose masks are not those of this model, and both would share {MASK_FILE}: "
            f"save into another folder"
        )


def _describe_structure(model: Any, dense_class: Any, folder: Path) -> None:
    """Write into a saved config what it alone does not tell; nothing if it does."""
    if not is_shrunk(model):
        return
    path = folder / "config.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    told |= {key: part.config.to_dict() for key, part in _stray_configs(model).items()}
    described = type(model.config).from_dict(copy.deepcopy(told))
    structure = structure_of(model, lambda: dense_class(copy.deepcopy(described)))
    with torch.device("meta"):
        again = dense_class(described)
        resize(again, structure)
    shapes = {plain_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    others = {name: tuple(parameter.shape) for name, parameter in again.named_parameters()}
    if differing := [name for name in {**shapes, **others} if shapes.get(name) != others.get(name)]:
        name = differing[0]
        raise CheckpointError(
            f"{name} has the shape {shapes.get(name)}, and {others.get(name)} in the {dense_class.__name__} that "
            f"config.json can describe (None: there is none): nothing was saved, since it could not be loaded; save "
            f"the part that was shrunk by itself, with its own save_pretrained"
        )
    if structure:
        told["quantization_config"] = structure_config(structure)
    path.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stray_configs(model: Any) -> dict[str, Any]:
    """The shrunk models inside a model whose configs its own does not hold but copies of, by the key of the copy."""
    own = {key: getattr(model.config, key, None) for key in getattr(model.config, "sub_configs", {})}
    found: dict[str, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, RECORD, None) is None or config is model.config or any(config is c for c in own.values()):
            continue
        if len(keys := [key for key, copied in own.items() if type(copied) is type(config)]) == 1:
            found.setdefault(keys[0], module)
    return found


def _masked(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    masks = {**masks, **{plain_name(name): mask for name, mask in masks.items()}}
    return {
        name: tensor.masked_fill(~masks[name].to(tensor.device), 0) if name in masks else tensor
        for name, tensor in state.items()
    }
