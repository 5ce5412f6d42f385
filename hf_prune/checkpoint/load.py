"""Load a checkpoint with its masks."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_prune.checkpoint.building import limited_building
from hf_prune.checkpoint.files import MASK_FILE, SINGLE, find_file, tensor_names, weight_files
from hf_prune.checkpoint.mask_file import load_masks, read_pruning
from hf_prune.checkpoint.packed.files import PackedFiles
from hf_prune.checkpoint.packed.seal import is_packed
from hf_prune.checkpoint.sources import check_model_source, holds_adapters
from hf_prune.errors import CheckpointError, PlanError
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning.torch_prune import masked_weight
from hf_prune.utils.json_files import read_config
from hf_prune.utils.number_formats import refuse_quantized

_UNKNOWN_TENSORS = 1000  # assumed number of tensors in a file of another format; the largest GGUF files have as many
_HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def load_pruned(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint with its masks.

    Masks are read from the mask file, from packed weights, or from ``weight_orig`` and ``weight_mask`` tensors, which a
    model pruned with ``torch.nn.utils.prune`` saves (transformers alone initializes such weights randomly).

    Args:
        load: A ``from_pretrained`` method.
        source: Folder or Hub id; None if ``load`` gets a state dict.
        *args: Passed to ``load``.
        **kwargs: Passed to ``load``.

    Returns:
        What ``load`` returns, with masks attached to the model.

    Raises:
        CheckpointError: If masks or the config are damaged, masks do not fit the weights, or the weights would be
            quantized.
        DataError: If the checkpoint cannot be found, or holds only adapters.
    """
    if source is None:
        return load(source, *args, **kwargs)
    if not os.path.isdir(source) and not kwargs.get("local_files_only"):
        place = {key: kwargs[key] for key in ("revision", "cache_dir") if key in kwargs}
        kwargs["local_files_only"] = check_model_source(source, **place)
    hub = {key: kwargs[key] for key in _HUB_KEYS if kwargs.get(key) is not None}
    if (config := find_file(source, "config.json", hub)) is not None:
        if kwargs.get("config") is None:
            read_config(config)
    elif (adapter_config := find_file(source, "adapter_config.json", hub)) is not None:
        raise holds_adapters(os.fspath(source), adapter_config)
    files = weight_files(source, hub, kwargs.get("variant"))
    if requested := [key for key in ("quantization_config", "load_in_4bit", "load_in_8bit") if kwargs.get(key)]:
        if find_file(source, MASK_FILE, hub) is not None or (files and is_packed(files[0])):
            raise _sparse_and_quantized(source, requested[0])
    returns_info = kwargs.pop("output_loading_info", False)
    packed = PackedFiles(files, unsealed=True) if files and is_packed(files[0]) else None  # loading unseals them
    gguf = find_file(source, kwargs["gguf_file"], hub) if kwargs.get("gguf_file") else None

    def limited(*args: Any, **kwargs: Any) -> Any:
        try:
            with limited_to_files(source, files if gguf is None else [gguf]):
                return load(*args, **kwargs)
        except StrictDataclassError as error:
            raise CheckpointError(
                f"the config.json of {source} is damaged: {error}; download or save it again"
            ) from error

    with _converted_from_torch_prune(source, files, hub) as converted:
        if converted is None:
            path = find_file(source, MASK_FILE, hub)
            store = load_masks(path) if path is not None else None
            if returns_info or store is not None or packed is not None:
                kwargs["output_loading_info"] = True
            loaded = limited(source, *args, **kwargs)
        else:
            weights, masks = converted
            kwargs = {key: value for key, value in kwargs.items() if key not in _HUB_KEYS}
            loaded = limited(weights, *args, **kwargs, output_loading_info=True)
            markers, marker_info = limited(masks, *args, **kwargs, output_loading_info=True)
            store = MaskStore(PackedMasks(_masks_from_markers(markers, marker_info)))
    model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
    if packed is not None:
        store = _with_packed_masks(store, packed, model)
    if store is not None:
        if kwargs.get("ignore_mismatched_sizes"):  # mismatched weights are newly initialized, and have no mask
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            fitting = {n: m for n, m in store.masks.packed.items() if shapes.get(n, m.shape) == m.shape}
            store.masks = PackedMasks.sharing(fitting)
        _attach(model, store, source, info)
    return loaded if returns_info else model


def attach_saved_masks(model: Any, source: Any, hub: Mapping[str, Any]) -> None:
    """Attach the masks of a checkpoint to a model that another library has loaded from it.

    Args:
        model: The model.
        source: Folder or Hub id.
        hub: Options for downloads, and ``subfolder``.

    Raises:
        CheckpointError: If masks are damaged or do not fit the weights, or were saved as ``torch.nn.utils.prune`` does,
            which other libraries load as random weights.
    """
    files = weight_files(source, hub)
    names = {name for file in files for name in tensor_names(file)}
    if lone := sorted(name for name in names if name.endswith("_orig") and name.removesuffix("_orig") not in names):
        raise CheckpointError(
            f"{source} has {lone[0]}, a weight that torch.nn.utils.prune has masked, which was loaded as random "
            f"numbers: convert it first, with hf-prune migrate"
        )
    path = find_file(source, MASK_FILE, hub)
    store = load_masks(path) if path is not None else None
    if files and is_packed(files[0]):
        store = _with_packed_masks(store, PackedFiles(files, unsealed=True), model)
    if store is not None:
        _attach(model, store, source, {})


@contextlib.contextmanager
def limited_to_files(source: Any, files: Sequence[str]) -> Iterator[None]:
    """Refuse to build a model far larger than its weight files can fill, within this context.

    The limits are far above what any checkpoint needs: 16 values for each byte (1,024 for packed files), 100 modules
    for each tensor.

    Args:
        source: Folder or Hub id, for messages.
        files: Its weight files.

    Raises:
        DataError: If the config asks for a larger model.
    """
    size = sum(map(os.path.getsize, files))
    tensors = sum(len(tensor_names(file)) if file.endswith(".safetensors") else _UNKNOWN_TENSORS for file in files)
    with limited_building(
        str(source),
        f"its weight files hold {tensors:,} tensors in {size:,} bytes; if you trust it, load it with its transformers "
        f"class, and make it prunable with hf_prune.prunable(model)",
        parameters=(1024 if files and is_packed(files[0]) else 16) * size + 100_000_000,
        modules=100 * tensors + 10_000,
        buffer_bytes=4 * size + 4_000_000_000,
    ):
        yield


def _with_packed_masks(store: MaskStore | None, packed: PackedFiles, model: Any) -> MaskStore | None:
    """Add the masks that are in packed weights to those of the mask file, which holds masks of other weights.

    A mask that does not fit the model is not unpacked: the error message needs only its shape.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    masks = PackedMasks()
    for name, header in packed.headers.items():
        if header.masked:
            names = (name, name.removeprefix(prefix), prefix + name.removeprefix(prefix))
            fits = any(shapes.get(candidate) == header.shape for candidate in names)
            masks[name] = packed.mask(name) if fits else torch.ones((), dtype=torch.bool).expand(header.shape)
    if not masks:
        return store
    config, polishes = read_pruning(packed.header.get("pruning", {}), packed.shards.folder)
    return MaskStore(masks | (store.masks if store is not None else {}), config=config, polishes=polishes)


def _sparse_and_quantized(source: Any, how: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is sparse, and {how} would quantize it; quantized weights have no masks, and need not keep their "
        f"zeros: load it without {how}, or with its transformers class, which ignores masks"
    )


def _attach(model: Any, store: MaskStore, source: Any, info: Mapping[str, Any]) -> None:
    try:
        refuse_quantized(model)
    except PlanError as error:
        raise _sparse_and_quantized(source, "its config") from error
    parameters = dict(model.named_parameters())
    saved = model.config.architectures or []
    if saved and not any(cls.__name__ in saved for cls in type(model).__mro__):
        store.masks = PackedMasks(_masks_of_base_model(model, store.masks, parameters)) or store.masks
    if random := sorted(store.masks.keys() & set(info.get("missing_keys", ()))):
        unexpected = sorted(info.get("unexpected_keys", ()))
        raise CheckpointError(
            f"{source} has masks for {len(random)} weights that are not in its files, such as {random[0]!r}, so they "
            f"would be random{f', and {unexpected[0]!r}, which the model does not have' if unexpected else ''}: load "
            f"the class that was saved; if it is this one, save the checkpoint again"
        )
    for name, mask in store.masks.packed.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            actual = "no such parameter" if name not in parameters else f"shape {tuple(parameters[name].shape)}"
            raise CheckpointError(
                f"the masks of {source} do not fit the model: {name!r} has a mask of shape {tuple(mask.shape)}, the "
                f"model has {actual}; load the class that was saved, or delete {MASK_FILE} to load without masks"
            )
        weight = parameters[name].detach()
        # two bytes per weight
        if not weight.is_meta and bool((weight.ne(0) & ~mask.to(weight.device).unpacked()).any()):
            raise CheckpointError(
                f"the masks of {source} are not those of its weights: {name!r} has non-zero weights that its mask "
                f"removes; restore the matching {MASK_FILE}, or delete it to load without masks"
            )
    store.attach(model)


def _masks_of_base_model(
    model: Any, masks: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The masks that a model of another class shares with the saved one: those of the base model, not of the head."""
    prefix = f"{model.base_model_prefix}."
    names = {name: (name.removeprefix(prefix), prefix + name.removeprefix(prefix)) for name in masks}
    in_base = {name for name, parameter in parameters.items() if model.base_model is model or name.startswith(prefix)}
    return {name: masks[old] for old, both in names.items() for name in both if name in in_base}


@contextlib.contextmanager
def _converted_from_torch_prune(
    source: Any, files: Sequence[str], hub: Mapping[str, Any]
) -> Iterator[tuple[Path, Path] | None]:
    """Convert a checkpoint with ``*_orig`` and ``*_mask`` tensors into two native ones: masked weights, and markers.

    The markers are loaded as if they were weights, so that transformers renames and converts the masks of old
    checkpoints just like the weights: 0 is removed, 1 is kept, 2 was never pruned.

    Yields:
        The folders of both; None for any other checkpoint.
    """
    names = [name for file in files for name in tensor_names(file)]
    originals = {name.removesuffix("_orig") for name in names if name.endswith("_orig")}
    pruned = {name for name in originals if f"{name}_mask" in names}
    lone = {name for name in originals - pruned if name.endswith((".weight", ".bias"))}
    for name in sorted(lone):
        if name not in names and f"{name}_u" not in names:  # a spectral norm has _orig too
            raise CheckpointError(
                f"{source} has {name}_orig and no {name}_mask, so transformers would initialize {name} randomly: "
                f"convert it with hf-prune migrate, which keeps the weight"
            )
    if not pruned:
        yield None
        return
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    weights = {n: t for n, t in tensors.items() if n.removesuffix("_orig").removesuffix("_mask") not in pruned}
    markers = {n: torch.full_like(t, 2) if t.is_floating_point() else t for n, t in weights.items()}
    for name in pruned:
        weights[name], keep = masked_weight(name, tensors[f"{name}_orig"], tensors[f"{name}_mask"])
        markers[name] = keep.to(weights[name].dtype)
    with tempfile.TemporaryDirectory() as folder:
        folders = []
        for kind, content in (("weights", weights), ("markers", markers)):
            folders.append(Path(folder) / kind)
            folders[-1].mkdir()
            for extra in ("config.json", "generation_config.json"):
                if (path := find_file(source, extra, hub)) is not None:
                    shutil.copyfile(path, folders[-1] / extra)
            contiguous = {name: tensor.contiguous() for name, tensor in content.items()}
            save_file(contiguous, folders[-1] / SINGLE, {"format": "pt"})
        yield folders[0], folders[1]


def _masks_from_markers(markers: nn.Module, info: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks of the parameters that were in the checkpoint; a newly initialized head has none."""
    new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    loaded = {name: p.detach() for name, p in markers.named_parameters() if name not in new}
    return {name: values > 0.5 for name, values in loaded.items() if bool((values < 1.5).any())}
