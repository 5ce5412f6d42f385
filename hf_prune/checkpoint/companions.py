"""The files that accompany the weights of a checkpoint: tokenizers, processors, parts of pipelines."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.files import MASK_FILE, OF_WEIGHTS, find_file, is_weights
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.errors import CheckpointError, DataError
from hf_prune.utils.files import read_text
from hf_prune.utils.folders import copy_beside, is_left_out
from hf_prune.utils.json_files import read_config, read_json_object

_log = logging.getLogger(__name__)
# A tokenizer needs one of these, unless bytes or characters are its vocabulary.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_TOKENIZER_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# The tokenizers and processors whose checksums are in a card.
COMPANIONS = (*_VOCABULARIES, "merges.txt", *_TOKENIZER_SETTINGS, *_PROCESSORS)
# Weights in formats that are not written here: after pruning they would still be those of the dense model.
_OTHER_FORMATS = (".gguf", ".ggml", ".onnx", ".onnx_data", ".ot", ".pte", ".safetensors", ".tflite", ".xml")
_BESIDE_OTHERS = (".onnx.data", ".pte.json")  # weights and names of inputs beside such files
_LARGEST_COMPANION = 100_000_000  # bytes; a vocabulary has a few tens of millions


def has_tokenizer(source: str, *, local_files_only: bool = False) -> bool:
    """Whether a checkpoint has a vocabulary; without one transformers makes up a tokenizer of special tokens only.

    Args:
        source: Folder or Hub id.
        local_files_only: Look in the cache only, not on the Hub.

    Raises:
        CheckpointError: If its tokenizer settings are damaged.
    """
    hub = {"local_files_only": local_files_only}
    path = find_file(source, "tokenizer_config.json", hub)
    config = {} if path is None else read_json_object(path)
    if "AutoTokenizer" in (config.get("auto_map") or ()):  # its own code reads its own files
        return True
    names = _vocabulary_names(str(config.get("tokenizer_class") or _tokenizer_of(source, hub)))
    if names is not None and not names:  # its vocabulary are bytes or characters
        return bool(config)
    return any(find_file(source, name, hub) for name in dict.fromkeys(("tokenizer.json", *(names or _VOCABULARIES))))


def _tokenizer_of(source: str, hub: Mapping[str, Any]) -> str | None:
    """The tokenizer class of a checkpoint's model type."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    path = find_file(source, "config.json", hub)
    config = read_config(path) if path is not None else {}
    return config.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(str(config.get("model_type")))


def _vocabulary_names(class_name: str) -> set[str] | None:
    """The files that a tokenizer class reads its vocabulary from; None if the class is unknown."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    for name in (class_name, class_name.removesuffix("Fast")):
        try:
            files = tokenizer_class_from_name(name).vocab_files_names  # type: ignore[union-attr]
        except (AttributeError, ImportError):  # unknown, or a package that it needs is missing
            continue
        return set(files.values()) - {"tokenizer_config.json"}
    return None


@functools.cache
def tokenizer_files() -> frozenset[str]:
    """Names of all files that the tokenizers of transformers write."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    classes = {name for name in TOKENIZER_MAPPING_NAMES.values() if name}
    vocabularies = (file for name in classes for file in _vocabulary_names(name) or ())
    return frozenset({*_VOCABULARIES, *_TOKENIZER_SETTINGS, *vocabularies})


def copy_companions(source: str, folder: Path) -> tuple[str, ...]:
    """Copy the tokenizers, processors, modules and code of a checkpoint, and warn of what is left out.

    Left out are pickles, hidden files, weights in other formats, very large files, and the card, which describes the
    weights as they were. Files that are in ``folder`` already are not replaced.

    Args:
        source: Folder or Hub id.
        folder: The folder to copy into.

    Returns:
        What was left out, without the files that belong to the weights.
    """
    offline = check_model_source(source)
    own = {*(path.name for path in folder.iterdir()), *OF_WEIGHTS, MASK_FILE, "config.json"}
    root, not_downloaded = Path(source), set[str]()
    if not root.is_dir():
        root, not_downloaded = _download_companions(source, own, offline)
    modules = _module_folders(root)
    own |= {path.name for path in root.iterdir() if is_weights(path.name)}
    left_out = copy_beside(root, folder, own, skip=lambda name, path: _stays_behind(name, path.stat().st_size, modules))
    left_out = tuple(sorted({*left_out, *not_downloaded}))
    if left_out:
        _log.warning("Not copied from %s: %s.", source, ", ".join(left_out))
    return left_out


def _download_companions(source: str, own: Collection[str], offline: bool) -> tuple[Path, set[str]]:
    """Download the companions of a Hub id: their folder in the cache, and the names of files that were left out."""
    from huggingface_hub import HfApi

    config = find_file(source, "config.json", {"local_files_only": offline})
    if config is None:
        raise CheckpointError(f"{source} has no config.json: expected a transformers model")
    root = Path(config).parent  # a snapshot, named after its commit
    try:
        siblings = [] if offline else HfApi().model_info(source, revision=root.name, files_metadata=True).siblings
    except Exception as error:  # of whichever HTTP library; the pruned model must not be lost for it
        _log.warning("The Hub does not list the files of %s (%s): only those in the cache are copied.", source, error)
        siblings = []
    sizes = {file.rfilename: file.size or 0 for file in siblings or [] if ".." not in file.rfilename.split("/")}
    hub = {"revision": root.name, "local_files_only": offline}
    if "modules.json" in sizes:
        find_file(source, "modules.json", hub)
    modules, left_out = _module_folders(root), set()
    for name, size in sizes.items():
        if name in own or is_weights(name) or name == ".gitattributes":
            continue
        if is_left_out(Path(name)) or _stays_behind(Path(name), size, modules):
            left_out.add(name)
        elif find_file(source, name, hub) is None:
            left_out.add(name)
    return root, left_out


def _stays_behind(name: Path, size: int, modules: Collection[str]) -> bool:
    """Whether a file describes or holds the weights before pruning, outside the modules of sentence-transformers."""
    if name.parts[0] in modules and len(name.parts) > 1:
        return False
    is_foreign = name.suffix.lower() in _OTHER_FORMATS or name.name.lower().endswith(_BESIDE_OTHERS)
    return name.as_posix() == "README.md" or is_foreign or size > _LARGEST_COMPANION


def _module_folders(root: Path) -> set[str]:
    """Folders of the modules that sentence-transformers runs after a model."""
    try:
        modules = json.loads(read_text(root / "modules.json"))
        return {Path(module["path"]).parts[0] for module in modules if module["path"]}
    except (DataError, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return set()
