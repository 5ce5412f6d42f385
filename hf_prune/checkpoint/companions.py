"""What lies beside the weights and goes along: tokenizers, processors, parts of pipelines."""

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
    own = {*(path.name for path in folder.iterdir()), *OF_WEIGHTS, MASK_FILE, "config.json"}
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
