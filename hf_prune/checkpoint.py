"""Checkpoints: native dense files that any transformers loads, and the masks in a side file.

The weights are saved exactly as the dense model class would save them. Beside them lies
``pruning_masks.safetensors``: one bit per target weight, and the settings in its header.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.building import limited_building
from hf_prune.bypass import bypassed_layers
from hf_prune.config import PruningConfig
from hf_prune.errors import CheckpointError, PlanError
from hf_prune.files import atomic_path, move_into, refuse_file, staged_folder
from hf_prune.masking import MaskStore, warn_regrown
from hf_prune.offloading import values_of
from hf_prune.packed_files import PackedFiles, read_index
from hf_prune.packed_format import is_packed
from hf_prune.polish import PolishRecord
from hf_prune.quantized import refuse_quantized
from hf_prune.shards import Shards, read_tensor
from hf_prune.shrinking import RECORD, is_shrunk, resize, structure_of
from hf_prune.sources import check_model_source, holds_adapters
from hf_prune.structure import structure_config
from hf_prune.torch_prune import masked_weight
from hf_prune.wrapping import adapters, plain_name

MASK_FILE = "pruning_masks.safetensors"
MASK_FORMAT = "hf_prune.masks"
MASK_VERSION = 1
_HEADER = "hf_prune"
REPORTS = ("sparsity_report.json", "training_report.json")
CARD_DATA = "pruning_card.json"  # what a card was rendered from
_WEIGHTS = ("model*.safetensors",)
# Without its config.json nobody loads a checkpoint, so a half-replaced one is an error and never a mixture.
_COMPLETES = ("model*.safetensors.index.json", MASK_FILE, "config.json")
# What a checkpoint has besides weights and config: tokenizers and processors.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def save_masks(store: MaskStore, path: str | os.PathLike[str]) -> None:
    """Write masks as packed bits, at once or not at all.

    Args:
        store: The masks and the settings that made them.
        path: The file.
    """
    masks = {plain_name(name): mask for name, mask in store.masks.items()}  # as state dicts have it
    packed = {name: torch.from_numpy(pack(mask)) for name, mask in masks.items()}
    entries = {name: {"shape": list(m.shape), "kept": int(m.count_nonzero())} for name, m in masks.items()}
    with atomic_path(path) as temporary:
        save_file(packed, temporary, mask_metadata(entries, store.config, store.polishes))


def pack(mask: Tensor) -> np.ndarray:
    """A mask as bits, eight in a byte."""
    return np.packbits(mask.cpu().numpy())


def mask_metadata(
    entries: Mapping[str, Mapping[str, Any]], config: PruningConfig | None, polishes: Iterable[PolishRecord] = ()
) -> dict[str, str]:
    """What a file of masks says of them.

    Args:
        entries: ``shape`` and ``kept``, the number of weights that stay, by parameter name.
        config: The settings that made them, if they are known.
        polishes: What each training after a pruning did.
    """
    header = {"format": MASK_FORMAT, "version": MASK_VERSION, "masks": entries, **pruning_of(config, polishes)}
    # one key, since safetensors writes several in an order of its own
    return {_HEADER: json.dumps(header, sort_keys=True)}


def pruning_of(config: PruningConfig | None, polishes: Iterable[PolishRecord]) -> dict[str, Any]:
    """How masks came about, for JSON: what is known of it."""
    described: dict[str, Any] = {} if config is None else {"config": config.to_dict()}
    if trained := [record.to_dict() for record in polishes]:
        described["polishes"] = trained
    return described


def read_pruning(
    described: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[PruningConfig | None, tuple[PolishRecord, ...]]:
    """What :func:`pruning_of` described.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        config = PruningConfig.from_dict(described["config"]) if "config" in described else None
        return config, tuple(PolishRecord(**record) for record in described.get("polishes", ()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {error!r}; restore it, or delete it to load without masks")


def load_masks(path: str | os.PathLike[str]) -> MaskStore:
    """Read what :func:`save_masks` wrote.

    Raises:
        CheckpointError: If the file is damaged, of another kind, or of a newer version.
    """
    stored = StoredMasks(path)
    return MaskStore(dict(stored), config=stored.config, polishes=stored.polishes)


class StoredMasks(Mapping[str, Tensor]):
    """The masks in a file, each read when it is asked for.

    Args:
        path: What :func:`save_masks` wrote.

    Raises:
        CheckpointError: If the file is damaged, of another kind, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            shards = Shards([self.path])  # its header has all names: safetensors would read it again for each mask
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
        self._places = shards.entries
        names = set(self._places)
        try:
            header = json.loads(shards.shards[self.path.name].metadata.get(_HEADER, "{}"))
            found = (header.get("format"), header.get("version"))
        except (AttributeError, RecursionError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: its header is no JSON object: {error}") from error
        if found != (MASK_FORMAT, MASK_VERSION):
            raise CheckpointError(
                f"{path} has format and version {found}: expected {(MASK_FORMAT, MASK_VERSION)}; update hf_prune, or "
                f"delete the file to load the weights without masks"
            )
        self.config, self.polishes = read_pruning(header, path)
        try:
            self._entries = {name: dict(entry) for name, entry in header["masks"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        if unknown := names - set(self._entries):
            raise CheckpointError(f"{path} is damaged: its header does not know {', '.join(sorted(unknown))}")
        if missing := sorted(set(self._entries) - names):
            raise _damaged(path, KeyError(missing[0]))

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        try:
            return _unpack(read_tensor(self.path.parent, self._places[name]).numpy(), **entry)
        except (AttributeError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(self.path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _unpack(bits: np.ndarray, shape: list[int], kept: int) -> Tensor:
    size = math.prod(shape)
    if bits.dtype != np.uint8 or bits.shape != ((size + 7) // 8,):
        raise ValueError(f"{bits.dtype} bits of shape {bits.shape} for a mask of shape {shape}")
    mask = np.unpackbits(bits, count=size).astype(bool)
    if int(mask.sum()) != kept:
        raise ValueError(f"{int(mask.sum())} kept weights where the header says {kept}")
    return torch.from_numpy(mask).view(shape)


def staged_checkpoint(folder: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Path]:
    """A temporary folder that becomes, or replaces the weights of, a checkpoint; see ``files.staged_folder``.

    Reports on weights that are replaced go with them.

    Raises:
        CheckpointError: If ``folder`` is a file.
    """
    refuse_file(folder)
    return staged_folder(folder, stale=(*_WEIGHTS, *REPORTS, CARD_DATA), last=_COMPLETES)


def place_checkpoint(staging: Path, folder: Path, arrived: Collection[Path] = ()) -> None:
    """Have a folder become, or replace the weights of, a checkpoint; see ``files.move_into``."""
    move_into(staging, folder, _WEIGHTS, _COMPLETES, arrived)


def has_tokenizer(source: str, *, local_files_only: bool = False) -> bool:
    """Whether a checkpoint brings a vocabulary; without one transformers makes up a tokenizer of special tokens.

    Args:
        source: Folder or Hub id.
        local_files_only: Look in the cache only, not on the Hub.
    """
    return any(find_file(source, name, {"local_files_only": local_files_only}) for name in _VOCABULARIES)


def copy_companions(source: str, folder: Path, *, local_files_only: bool = False) -> None:
    """Copy a checkpoint's tokenizer and processor files, whichever it has.

    Args:
        source: Folder or Hub id.
        folder: Where to.
        local_files_only: Look in the cache only, not on the Hub.
    """
    for name in COMPANIONS:
        if (path := find_file(source, name, {"local_files_only": local_files_only})) is not None:
            shutil.copyfile(path, folder / name)


def save_pruned(
    model: nn.Module, dense_class: type, save: Callable[..., Any], folder: str | os.PathLike[str], **kwargs: Any
) -> None:
    """Save a model as its dense class would, with the masks beside it.

    Args:
        model: The pruned model.
        dense_class: The class that the checkpoint names, so that plain transformers loads it.
        save: The class's own unbound ``save_pretrained``.
        folder: Where to; files of other names stay.
        **kwargs: Passed to ``save``.

    Raises:
        CheckpointError: If ``folder`` is a file, a layer is switched off and not taken out, or the model carries
            adapters of a ``PeftModel`` around it; or if a part of it is shrunk in a way that cannot be described.
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
    model.__class__ = dense_class
    try:
        with staged_checkpoint(folder) as staging:
            save(model, staging, **kwargs)
            if not only_adapters:
                _describe_structure(model, dense_class, staging)
                if store is not None:
                    save_masks(store, staging / MASK_FILE)
    finally:
        model.__class__ = pruned_class


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


def load_pruned(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint with its masks, wherever they are.

    Masks come from the side file, or from ``weight_orig`` and ``weight_mask`` tensors as a model pruned with
    ``torch.nn.utils.prune`` saves them (transformers alone leaves such weights random).

    Args:
        load: A ``from_pretrained``.
        source: Folder or Hub id, or None where ``load`` is given a state dict.
        *args: Passed to ``load``.
        **kwargs: Passed to ``load``.

    Returns:
        What ``load`` returned, its model with masks attached.

    Raises:
        CheckpointError: If masks are damaged or do not fit the weights, or the weights would be quantized.
        DataError: If it holds adapters and no model; or if it cannot be found, at once also where there is no network.
    """
    if source is None:
        return load(source, *args, **kwargs)
    if not os.path.isdir(source) and not kwargs.get("local_files_only"):
        place = {key: kwargs[key] for key in ("revision", "cache_dir") if key in kwargs}
        kwargs["local_files_only"] = check_model_source(source, **place)
    hub = {key: kwargs[key] for key in _HUB_KEYS if kwargs.get(key) is not None}
    if find_file(source, "config.json", hub) is None:
        if (adapter_config := find_file(source, "adapter_config.json", hub)) is not None:
            raise holds_adapters(os.fspath(source), adapter_config)
    if asked := [key for key in ("quantization_config", "load_in_4bit", "load_in_8bit") if kwargs.get(key)]:
        files = weight_files(source, hub)
        if find_file(source, MASK_FILE, hub) is not None or (files and is_packed(files[0])):
            raise _sparse_and_quantized(source, asked[0])
    with _without_torch_prune(source, hub) as converted:
        if converted is None:
            with limited_to_files(source, hub):
                loaded = load(source, *args, **kwargs)
            path = find_file(source, MASK_FILE, hub)
            store = load_masks(path) if path is not None else None
            store = _with_packed_masks(store, weight_files(source, hub))
        else:
            weights, masks = converted
            kwargs = {key: value for key, value in kwargs.items() if key not in _HUB_KEYS}
            with limited_to_files(source, hub):
                loaded = load(weights, *args, **kwargs)
            markers, info = load(masks, *args, **{**kwargs, "output_loading_info": True})
            store = MaskStore(_masks_from_markers(markers, info))
    if store is not None:
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if kwargs.get("ignore_mismatched_sizes"):  # those weights are new, and have no mask
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            store.masks = {name: m for name, m in store.masks.items() if shapes.get(name, m.shape) == m.shape}
        _attach(model, store, source)
    return loaded


@contextlib.contextmanager
def limited_to_files(source: Any, hub: Mapping[str, Any]) -> Iterator[None]:
    """Within this context, a config of the Hub builds no model far larger than its weight files can fill.

    The limits are far above what any checkpoint needs: 16 values for each byte (1,024 of packed files), 100 modules for
    each tensor. A user's own folder is not limited.

    Args:
        source: Folder or Hub id.
        hub: How the Hub is asked.

    Raises:
        DataError: If it would build more.
    """
    own = os.path.isdir(source) and Path(source).absolute().parent.name != "snapshots"  # what the Hub's client made
    files = [] if own else weight_files(source, hub)
    if not files:
        yield
        return
    size, tensors = sum(map(os.path.getsize, files)), sum(len(_tensor_names(file)) for file in files)
    with limited_building(
        str(source),
        f"its weight files hold {tensors:,} tensors in {size:,} bytes; if you trust it, load a folder that it is in",
        parameters=(1024 if is_packed(files[0]) else 16) * size + 100_000_000,
        modules=100 * tensors + 10_000,
        buffer_bytes=4 * size + 4_000_000_000,
    ):
        yield


def _with_packed_masks(store: MaskStore | None, files: Sequence[str]) -> MaskStore | None:
    """A compressed checkpoint has the masks in its weights, and in a side file only those of other weights."""
    if not files or not is_packed(files[0]):
        return store
    packed = PackedFiles(files)
    if not (masks := packed.masks()):
        return store
    config, polishes = read_pruning(packed.described.get("pruning", {}), files[0])
    return MaskStore(masks | (store.masks if store is not None else {}), config=config, polishes=polishes)


def _sparse_and_quantized(source: Any, how: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is sparse, and would be loaded quantized, as {how} says; quantized weights have no masks, and their "
        f"zeros need not stay: load it without {how}, or with transformers' own class, which knows nothing of masks"
    )


def _attach(model: Any, store: MaskStore, source: Any) -> None:
    try:
        refuse_quantized(model)
    except PlanError as error:
        raise _sparse_and_quantized(source, "its config") from error
    parameters = dict(model.named_parameters())
    saved = model.config.architectures or []
    if saved and not any(cls.__name__ in saved for cls in type(model).__mro__):
        store.masks = _masks_of_base_model(model, store.masks, parameters) or store.masks
    for name, mask in store.masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            found = "no such parameter" if name not in parameters else f"shape {tuple(parameters[name].shape)}"
            raise CheckpointError(
                f"the masks of {source} do not fit the model: {name!r} has a mask of shape {tuple(mask.shape)}, the "
                f"model has {found}; load the class that was saved, or delete {MASK_FILE} to load without masks"
            )
        weight = parameters[name].detach()
        if not weight.is_meta and bool((weight.ne(0) & ~mask.to(weight.device)).any()):  # two bytes for each weight
            raise CheckpointError(
                f"the masks of {source} are not those of its weights: {name!r} has non-zero weights that its mask "
                f"removes; restore the matching {MASK_FILE}, or delete it to load without masks"
            )
    store.attach(model)


def _masks_of_base_model(
    model: Any, masks: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The masks that a model of another class shares with the one saved: those of the encoder, not of the head."""
    prefix = f"{model.base_model_prefix}."
    names = {name: (name.removeprefix(prefix), prefix + name.removeprefix(prefix)) for name in masks}
    in_base = {name for name, parameter in parameters.items() if model.base_model is model or name.startswith(prefix)}
    return {name: masks[old] for old, both in names.items() for name in both if name in in_base}


def find_file(source: Any, filename: str, hub: Mapping[str, Any]) -> str | None:
    """The local path of a checkpoint's file, downloaded if need be; None if the checkpoint has none."""
    from transformers.utils import cached_file

    return cached_file(source, filename, _raise_exceptions_for_missing_entries=False, **hub)


@contextlib.contextmanager
def _without_torch_prune(source: Any, hub: Mapping[str, Any]) -> Iterator[tuple[Path, Path] | None]:
    """Two native checkpoints for one with ``*_orig`` and ``*_mask`` tensors: the masked weights, and marks.

    The marks are loaded as if they were weights, so that whatever transformers does to names and layouts of
    old checkpoints happens to the masks too: 0 removed, 1 kept, 2 never pruned.
    """
    files = weight_files(source, hub)
    names = [name for file in files for name in _tensor_names(file)]
    originals = {name.removesuffix("_orig") for name in names if name.endswith("_orig")}
    pruned = {name for name in originals if f"{name}_mask" in names}
    lone = {name for name in originals - pruned if name.endswith((".weight", ".bias"))}
    for name in sorted(lone):
        if name not in names and f"{name}_u" not in names:  # which spectral norms have
            raise CheckpointError(
                f"{source} has {name}_orig and no {name}_mask, so transformers would make {name} up: write it anew by "
                f"hf-prune migrate, which carries it over"
            )
    if not pruned:
        yield None
        return
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    weights = {n: t for n, t in tensors.items() if n.removesuffix("_orig").removesuffix("_mask") not in pruned}
    marks = {n: torch.full_like(t, 2) if t.is_floating_point() else t for n, t in weights.items()}
    for name in pruned:
        weights[name], keep = masked_weight(name, tensors[f"{name}_orig"], tensors[f"{name}_mask"])
        marks[name] = keep.to(weights[name].dtype)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for kind, content in (("weights", weights), ("marks", marks)):
            results.append(Path(folder) / kind)
            results[-1].mkdir()
            for extra in ("config.json", "generation_config.json"):
                if (path := find_file(source, extra, hub)) is not None:
                    shutil.copyfile(path, results[-1] / extra)
            contiguous = {name: tensor.contiguous() for name, tensor in content.items()}
            save_file(contiguous, results[-1] / "model.safetensors", {"format": "pt"})
        yield results[0], results[1]


def size_of_weights(source: str | os.PathLike[str]) -> int | None:
    """How many bytes the files of weights and masks of a checkpoint have; None where it has no safetensors files."""
    files = weight_files(source, {})
    masks = find_file(source, MASK_FILE, {})
    return sum(os.path.getsize(file) for file in [*files, *([masks] if masks else [])]) if files else None


def weight_files(source: Any, hub: Mapping[str, Any]) -> list[str]:
    """The safetensors files of a checkpoint; none for formats of other kinds.

    Raises:
        CheckpointError: If all it has is a pickle.
    """
    if (single := find_file(source, "model.safetensors", hub)) is not None:
        return [single]
    if (index := find_file(source, "model.safetensors.index.json", hub)) is not None:
        shards = sorted(set(read_index(Path(index)).values()))
        return [path for shard in shards if (path := find_file(source, shard, hub)) is not None]
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if find_file(source, name, hub) is not None:
            raise CheckpointError(
                f"{source} has its weights in {name}, a pickle, which can run code when it is opened: expected "
                f"model.safetensors; if you trust it, convert it once with transformers' "
                f"from_pretrained(...).save_pretrained(...)"
            )
    return []


def _tensor_names(file: str) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; download or save it again") from error


def _masks_from_markers(markers: nn.Module, info: Mapping[str, Any]) -> dict[str, Tensor]:
    """Masks of the parameters that were in the checkpoint; a new head is random and has none."""
    new = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    found = {name: p.detach() for name, p in markers.named_parameters() if name not in new}
    return {name: values > 0.5 for name, values in found.items() if bool((values < 1.5).any())}
