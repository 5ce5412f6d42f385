"""Checkpoints: native dense files that any transformers loads, and the masks in a side file.

The weights are saved exactly as the dense model class would save them. Beside them lies
``pruning_masks.safetensors``: one bit per target weight, and the settings in its header.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import glob
import json
import logging
import math
import os
import re
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
from hf_prune.errors import CheckpointError, DataError, PlanError
from hf_prune.files import (
    MARK,
    atomic_path,
    copy_beside,
    is_left_out,
    read_config,
    read_json_object,
    read_text,
    staged_folder,
)
from hf_prune.masking import MaskStore, warn_regrown
from hf_prune.notices import warn_user
from hf_prune.offloading import values_of
from hf_prune.outputs import SAVE, check_output, output_lock, own_files, refuse_file, say_replaced, write_mark
from hf_prune.packed_files import (
    ADAPTERS,
    INDEX,
    SINGLE,
    PackedFiles,
    adapters_beside,
    read_index,
    refuse_weights_elsewhere,
)
from hf_prune.packed_format import is_packed
from hf_prune.polish import PolishRecord
from hf_prune.quantized import refuse_quantized
from hf_prune.shards import Shards, read_tensor
from hf_prune.shrinking import RECORD, is_shrunk, resize, structure_of
from hf_prune.sources import check_model_source, holds_adapters
from hf_prune.structure import structure_config
from hf_prune.torch_prune import masked_weight
from hf_prune.wrapping import adapters, plain_name

_log = logging.getLogger(__name__)

MASK_FILE = "pruning_masks.safetensors"
MASK_FORMAT = "hf_prune.masks"
MASK_VERSION = 1
_HEADER = "hf_prune"
REPORTS = ("sparsity_report.json", "training_report.json")
CARD_DATA = "pruning_card.json"  # what a card was rendered from
# As transformers names weights, whole, in parts, and in variants: model.fp16-00001-of-00002.safetensors.
_WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>[^/]+?))?(?:-\d{5}-of-\d{5})?\.safetensors|"
    r"model\.safetensors\.index(?:\.(?P<of>[^/]+))?\.json"
)
# What describes the weights it lies beside, and no others.
_OF_WEIGHTS = (
    *REPORTS,
    CARD_DATA,
    "layers.png",
    "weights.png",
    "sparsity_search.json",
    "vocabulary_report.json",
    "lottery.json",
    "ticket.safetensors",
    "modeling_hf_prune.py",
)
# Tokenizers and processors that a card vouches for, by the names that most have.
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
# Weights in forms that are not written here: after a pruning they are those of the model before.
_OTHER_FORMS = (".gguf", ".ggml", ".onnx", ".onnx_data", ".ot", ".safetensors", ".tflite", ".xml")
_LARGEST_COMPANION = 100_000_000  # bytes; a vocabulary has a few tens of millions
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_TENSORS_UNKNOWN = 1000  # taken for the number in a file that is not safetensors; the largest GGUF files have as many
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


@contextlib.contextmanager
def staged_checkpoint(
    folder: str | os.PathLike[str],
    command: str = SAVE,
    *,
    overwrite: bool = False,
    variant: str | None = None,
    beside: Collection[str | os.PathLike[str] | None] = (),
) -> Iterator[Path]:
    """A temporary folder that becomes, or replaces the weights of, a checkpoint; see ``files.staged_folder``.

    Weights of other variants and files of others stay. What describes weights that are replaced goes with them, and so
    does what the same command had written besides.

    Args:
        folder: Where the checkpoint belongs.
        command: What writes it, see ``outputs.check_output``. ``"save_pretrained"`` replaces what it writes, as
            transformers does, and of other weights only what we wrote.
        overwrite: Replace what is in the way.
        variant: Of the weights, as of ``save_pretrained``.
        beside: As of ``outputs.check_output``.

    Raises:
        CheckpointError: If ``folder`` is a file, or weights that somebody else wrote would go. If something got in the
            way of a command in the meantime, its result is kept beside the folder, under the name in the message.
    """
    folder = Path(folder)
    refuse_file(folder)
    stale: list[str] = []
    last: list[str] = []
    wait = 600.0 if command == SAVE else 0.0
    with output_lock(folder, command, wait), staged_folder(folder, stale, last) as staging:
        yield staging
        if command != SAVE:
            try:
                check_output(folder, command, overwrite=overwrite, beside=beside)
            except CheckpointError as error:
                kept = staging.rename(folder.with_name(f"{folder.name}-{staging.name[-10:-4]}"))
                raise CheckpointError(f"{error}. The result is in {kept}") from None
        stale += finish_checkpoint(staging, folder, command, overwrite=overwrite, variant=variant)
        if command != SAVE or _has_weights(staging, variant):  # and not adapters alone, say
            last += completing(variant)


def completing(variant: str | None = None) -> tuple[str, ...]:
    """The files without which nobody loads a checkpoint: a half-replaced one is an error and never a mixture."""
    index = of_variant(INDEX, variant)
    return index, MASK_FILE, "config.json"


def finish_checkpoint(
    staging: Path, folder: Path, command: str, *, overwrite: bool = False, variant: str | None = None
) -> list[str]:
    """Mark a checkpoint that is ready as an output of a command.

    Args:
        staging: The checkpoint.
        folder: Where it belongs.
        command: As of :func:`staged_checkpoint`.
        overwrite: As of :func:`staged_checkpoint`.
        variant: As of :func:`staged_checkpoint`.

    Returns:
        Glob patterns of files that have to go from the folder.

    Raises:
        CheckpointError: As :func:`staged_checkpoint`.
    """
    written = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()} - {MARK}
    present = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    own = own_files(folder)
    replaces = command != SAVE or _has_weights(staging, variant)
    gone = {name for name in present - written if replaces and is_weights(name, variant)}
    foreign = sorted(name for name in gone if name not in own and name.endswith(".safetensors"))
    if command == SAVE and foreign and not overwrite:
        raise CheckpointError(
            f"{folder} holds {', '.join(foreign[:3])}, which this save would delete and did not write: save into "
            f"another folder, take the file out, or pass overwrite=True"
        )
    if command != SAVE:
        gone |= own.keys() - written
        if written & {"tokenizer.json", "tokenizer_config.json"}:  # its files make sense together only
            gone |= (present & tokenizer_files()) - written
    if replaces and (command != SAVE or not _other_variants(folder, variant)):
        gone |= present & {*_OF_WEIGHTS, MASK_FILE} - written
    kept = {name: said for name, said in own.items() if name not in gone} if command == SAVE else None
    write_mark(staging, command, written - set(_OF_WEIGHTS), kept)
    if command != SAVE:  # who calls save_pretrained knows
        say_replaced(folder, {*gone, *written})
    return [glob.escape(name) for name in sorted(gone)]


def is_weights(name: str, variant: str | None = None) -> bool:
    """Whether a file in a checkpoint's folder has weights of a variant, or is the index of its parts."""
    match = _WEIGHTS.fullmatch(name)
    return match is not None and (match["variant"] or match["of"]) == variant


def _has_weights(folder: Path, variant: str | None) -> bool:
    return any(is_weights(path.name, variant) for path in folder.iterdir())


def _other_variants(folder: Path, variant: str | None) -> list[str]:
    """Weights in a folder that we saved as another variant, with the masks that lie there."""
    names = sorted(own_files(folder))
    return [n for n in names if n.endswith(".safetensors") and _WEIGHTS.fullmatch(n) and not is_weights(n, variant)]


def has_tokenizer(source: str, *, local_files_only: bool = False) -> bool:
    """Whether a checkpoint brings a vocabulary; without one transformers makes up a tokenizer of special tokens.

    Args:
        source: Folder or Hub id.
        local_files_only: Look in the cache only, not on the Hub.

    Raises:
        CheckpointError: If what says so is damaged.
    """
    hub = {"local_files_only": local_files_only}
    path = find_file(source, "tokenizer_config.json", hub)
    config = {} if path is None else read_json_object(path)
    if "AutoTokenizer" in (config.get("auto_map") or ()):  # code of its own reads files of its own
        return True
    names = _vocabulary_names(str(config.get("tokenizer_class") or _tokenizer_of(source, hub)))
    if names is not None and not names:  # bytes or characters are its vocabulary
        return bool(config)
    return any(find_file(source, name, hub) for name in dict.fromkeys(("tokenizer.json", *(names or _VOCABULARIES))))


def _tokenizer_of(source: str, hub: Mapping[str, Any]) -> str | None:
    """The class of tokenizers that goes with a checkpoint's kind of model."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    path = find_file(source, "config.json", hub)
    config = read_config(path) if path is not None else {}
    return config.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(str(config.get("model_type")))


def _vocabulary_names(class_name: str) -> set[str] | None:
    """The files that a class of tokenizers reads its vocabulary from; None if the class is not known."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for name in (class_name, class_name.removesuffix("Fast")):
        try:
            found = tokenizer_class_from_name(name).vocab_files_names  # type: ignore[union-attr]
        except (AttributeError, ImportError):  # unknown, or a package that it needs is missing
            continue
        return set(found.values()) - {"tokenizer_config.json"}
    return None


@functools.cache
def tokenizer_files() -> frozenset[str]:
    """Names of all files that tokenizers of transformers write."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    classes = {name for name in TOKENIZER_MAPPING_NAMES.values() if name}
    more = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
    return frozenset({*_VOCABULARIES, *more, *(file for name in classes for file in _vocabulary_names(name) or ())})


def copy_companions(source: str, folder: Path) -> tuple[str, ...]:
    """Copy what a checkpoint has beside its weights: tokenizers, processors, modules, code; and say what stays behind.

    Those are pickles, hidden files, weights in other forms, what is very large, and its card, which describes the
    weights as they were. What is in ``folder`` already is not replaced.

    Args:
        source: Folder or Hub id.
        folder: Where to.

    Returns:
        What was not copied, apart from what belongs to the weights.
    """
    offline = check_model_source(source)
    own = {*(path.name for path in folder.iterdir()), *_OF_WEIGHTS, MASK_FILE, "config.json"}
    root, more = Path(source), set[str]()
    if not root.is_dir():
        root, more = _download_companions(source, own, offline)
    modules = _module_folders(root)
    own |= {path.name for path in root.iterdir() if is_weights(path.name)}
    left = copy_beside(root, folder, own, skip=lambda name, path: _stays_behind(name, path.stat().st_size, modules))
    left = tuple(sorted({*left, *more}))
    if left:
        _log.warning("Not copied from %s: %s.", source, ", ".join(left))
    return left


def _download_companions(source: str, own: Collection[str], offline: bool) -> tuple[Path, set[str]]:
    """The folder of a Hub id in the cache, with its companions, and names of what was not downloaded."""
    from huggingface_hub import HfApi

    config = find_file(source, "config.json", {"local_files_only": offline})
    if config is None:
        raise CheckpointError(f"{source} has no config.json: expected a model of transformers")
    root = Path(config).parent  # named like the commit
    try:
        siblings = [] if offline else HfApi().model_info(source, revision=root.name, files_metadata=True).siblings
    except Exception as error:  # of whichever HTTP library: what was made is not lost for it
        _log.warning("The Hub does not list the files of %s (%s): only those in the cache are copied.", source, error)
        siblings = []
    found = {each.rfilename: each.size or 0 for each in siblings or [] if ".." not in each.rfilename.split("/")}
    hub = {"revision": root.name, "local_files_only": offline}
    if "modules.json" in found:
        find_file(source, "modules.json", hub)
    modules, left = _module_folders(root), set()
    for name, size in found.items():
        if name in own or is_weights(name) or name == ".gitattributes":
            continue
        if is_left_out(Path(name)) or _stays_behind(Path(name), size, modules):
            left.add(name)
        elif find_file(source, name, hub) is None:
            left.add(name)
    return root, left


def _stays_behind(name: Path, size: int, modules: Collection[str]) -> bool:
    """Whether a file describes or holds weights as they were before; modules of sentence-transformers do not."""
    if name.parts[0] in modules and len(name.parts) > 1:
        return False
    return name.as_posix() == "README.md" or name.suffix.lower() in _OTHER_FORMS or size > _LARGEST_COMPANION


def _module_folders(root: Path) -> set[str]:
    """Folders of the modules that sentence-transformers puts behind a model."""
    try:
        modules = json.loads(read_text(root / "modules.json"))
        return {Path(module["path"]).parts[0] for module in modules if module["path"]}
    except (DataError, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return set()


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
    if not (others := _other_variants(folder, variant)):
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
    files = weight_files(source, hub, kwargs.get("variant"))
    if asked := [key for key in ("quantization_config", "load_in_4bit", "load_in_8bit") if kwargs.get(key)]:
        if find_file(source, MASK_FILE, hub) is not None or (files and is_packed(files[0])):
            raise _sparse_and_quantized(source, asked[0])
    asked_for_info = kwargs.pop("output_loading_info", False)
    packed = PackedFiles(files) if files and is_packed(files[0]) else None
    gguf = find_file(source, kwargs["gguf_file"], hub) if kwargs.get("gguf_file") else None

    def limited(*args: Any, **kwargs: Any) -> Any:
        with limited_to_files(source, files if gguf is None else [gguf]):
            return load(*args, **kwargs)

    with _without_torch_prune(source, files, hub) as converted:
        if converted is None:
            path = find_file(source, MASK_FILE, hub)
            store = load_masks(path) if path is not None else None
            if asked_for_info or store is not None or packed is not None:
                kwargs["output_loading_info"] = True
            loaded = limited(source, *args, **kwargs)
        else:
            weights, masks = converted
            kwargs = {key: value for key, value in kwargs.items() if key not in _HUB_KEYS}
            loaded = limited(weights, *args, **kwargs, output_loading_info=True)
            markers, found = limited(masks, *args, **kwargs, output_loading_info=True)
            store = MaskStore(_masks_from_markers(markers, found))
    model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
    if packed is not None:
        store = _with_packed_masks(store, packed, model)
    if store is not None:
        if kwargs.get("ignore_mismatched_sizes"):  # those weights are new, and have no mask
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            store.masks = {name: m for name, m in store.masks.items() if shapes.get(name, m.shape) == m.shape}
        _attach(model, store, source, info)
    return loaded if asked_for_info else model


@contextlib.contextmanager
def limited_to_files(source: Any, files: Sequence[str]) -> Iterator[None]:
    """Within this context, a config builds no model far larger than its weight files can fill.

    The limits are far above what any checkpoint needs: 16 values for each byte (1,024 of packed files), 100 modules for
    each tensor.

    Args:
        source: Folder or Hub id, for messages.
        files: Those with its weights.

    Raises:
        DataError: If it would build more.
    """
    size = sum(map(os.path.getsize, files))
    tensors = sum(len(_tensor_names(file)) if file.endswith(".safetensors") else _TENSORS_UNKNOWN for file in files)
    with limited_building(
        str(source),
        f"its weight files hold {tensors:,} tensors in {size:,} bytes; if you trust it, load it with transformers' own "
        f"class, and make that prunable with hf_prune.prunable(model)",
        parameters=(1024 if files and is_packed(files[0]) else 16) * size + 100_000_000,
        modules=100 * tensors + 10_000,
        buffer_bytes=4 * size + 4_000_000_000,
    ):
        yield


def _with_packed_masks(store: MaskStore | None, packed: PackedFiles, model: Any) -> MaskStore | None:
    """A compressed checkpoint has the masks in its weights, and in a side file only those of other weights.

    A mask that does not fit the model gets no memory: all that is ever said of it is its shape.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    masks = {}
    for name, header in packed.headers.items():
        if header.masked:
            names = (name, name.removeprefix(prefix), prefix + name.removeprefix(prefix))
            fits = any(shapes.get(each) == header.shape for each in names)
            masks[name] = packed.mask(name) if fits else torch.ones((), dtype=torch.bool).expand(header.shape)
    if not masks:
        return store
    config, polishes = read_pruning(packed.described.get("pruning", {}), packed.shards.folder)
    return MaskStore(masks | (store.masks if store is not None else {}), config=config, polishes=polishes)


def _sparse_and_quantized(source: Any, how: str) -> CheckpointError:
    return CheckpointError(
        f"{source} is sparse, and would be loaded quantized, as {how} says; quantized weights have no masks, and their "
        f"zeros need not stay: load it without {how}, or with transformers' own class, which knows nothing of masks"
    )


def _attach(model: Any, store: MaskStore, source: Any, info: Mapping[str, Any]) -> None:
    try:
        refuse_quantized(model)
    except PlanError as error:
        raise _sparse_and_quantized(source, "its config") from error
    parameters = dict(model.named_parameters())
    saved = model.config.architectures or []
    if saved and not any(cls.__name__ in saved for cls in type(model).__mro__):
        store.masks = _masks_of_base_model(model, store.masks, parameters) or store.masks
    if random := sorted(store.masks.keys() & set(info.get("missing_keys", ()))):
        others = sorted(info.get("unexpected_keys", ()))
        raise CheckpointError(
            f"{source} has masks for {len(random)} weights that are not in its files, such as {random[0]!r}, so they "
            f"would be random{f', and {others[0]!r}, which the model has not' if others else ''}: load the class that "
            f"was saved, and if it is this one, save the checkpoint again"
        )
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
def _without_torch_prune(
    source: Any, files: Sequence[str], hub: Mapping[str, Any]
) -> Iterator[tuple[Path, Path] | None]:
    """Two native checkpoints for one with ``*_orig`` and ``*_mask`` tensors: the masked weights, and marks.

    The marks are loaded as if they were weights, so that whatever transformers does to names and layouts of
    old checkpoints happens to the masks too: 0 removed, 1 kept, 2 never pruned.
    """
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


def weight_files(source: Any, hub: Mapping[str, Any], variant: str | None = None) -> list[str]:
    """The safetensors files of a checkpoint; none for formats of other kinds.

    Args:
        source: Folder or Hub id.
        hub: How the Hub is asked.
        variant: Of the weights, as of ``from_pretrained``.

    Raises:
        CheckpointError: If all it has is a pickle, its config names other files, or adapters lie beside them.
    """
    one, several = of_variant(SINGLE, variant), of_variant(INDEX, variant)
    single = find_file(source, one, hub)
    if find_file(source, ADAPTERS, hub) is not None and (single or find_file(source, several, hub)) is not None:
        raise adapters_beside(source)
    if (config := find_file(source, "config.json", hub)) is not None:
        refuse_weights_elsewhere(Path(config), several if single is None else one)
    if single is not None:
        return [single]
    if (index := find_file(source, several, hub)) is not None:
        weight_map = read_index(Path(index))
        shards = sorted(set(weight_map.values()))
        paths = {shard: find_file(source, shard, hub) for shard in shards}
        if missing := [shard for shard, path in paths.items() if path is None]:
            name = next(name for name, shard in weight_map.items() if shard == missing[0])
            raise CheckpointError(
                f"{missing[0]} is missing from {source}, and the index says that weights are in it: it names {name}, "
                f"and no file has it: download or save the checkpoint again"
            )
        return [path for path in paths.values() if path is not None]
    for name in (of_variant(each, variant) for each in ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if find_file(source, name, hub) is not None:
            raise CheckpointError(
                f"{source} has its weights in {name}, a pickle, which can run code when it is opened: expected "
                f"{one}; if you trust it, convert it once with transformers' "
                f"from_pretrained(...).save_pretrained(...)"
            )
    return []


def of_variant(name: str, variant: str | None) -> str:
    """What transformers calls a file of weights, or their index, in a variant."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


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
