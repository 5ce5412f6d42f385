"""Check that a model can be found, and which transformers class loads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.files import find_file
from hf_prune.errors import CheckpointError, DataError
from hf_prune.utils.files import read_text
from hf_prune.utils.formatting import listing
from hf_prune.utils.hub_access import check_hub_reachable, check_repo_id, local_folder
from hf_prune.utils.json_files import read_config, read_json_object
from hf_prune.utils.load_options import load_options
from hf_prune.utils.quantization_method import METHOD


def check_model_source(
    model_id: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | Path | None = None
) -> bool:
    """Make sure, before any long work, that a model can be found.

    A local folder needs a ``config.json``. For a Hub id, the Hub must answer, or the model's ``config.json`` must be
    in the local cache; whether the Hub has that model is left to ``from_pretrained``.

    Args:
        model_id: Path of a folder, or a Hub id such as ``"owner/name"``. An existing folder takes precedence.
        revision: Branch, tag or commit on the Hub; ``main`` if None.
        cache_dir: Cache folder of the Hub client; its default if None.

    Returns:
        Whether to load with ``local_files_only=True``: the Hub does not answer, but the model is cached.

    Raises:
        DataError: If the folder does not exist or holds no model, if the id is malformed, or if the model is not
            cached and the Hub does not answer.

    Example:
        >>> check_model_source("./no-such-model")
        Traceback (most recent call last):
        hf_prune.errors.DataError: no such folder: './no-such-model'. Pass a folder ...
    """
    source = os.fspath(model_id)
    if local_folder(source, "a model") is not None:
        if not os.path.isfile(os.path.join(source, "config.json")):
            if os.path.isfile(adapters := os.path.join(source, "adapter_config.json")):
                raise holds_adapters(source, adapters)
            if modules := sentence_modules(source):
                raise DataError(
                    f"{source!r} is a model of sentence-transformers whose weights are in "
                    f"{modules[0].get('path')!r}, as early versions of that library wrote them: load it with it and "
                    f"save it again, SentenceTransformer({source!r}).save(folder)"
                )
            raise DataError(
                f"{source!r} is a folder without config.json (found: {listing(Path(source))}): "
                "pass the folder that save_pretrained wrote"
            )
        return False
    from huggingface_hub import try_to_load_from_cache

    check_repo_id(source, "a model")
    try:
        check_hub_reachable(f"model {source!r}")
    except DataError:
        revision = revision or load_options().revision_of(source)
        if not isinstance(try_to_load_from_cache(source, "config.json", cache_dir=cache_dir, revision=revision), str):
            raise
        return True
    return False


def holds_adapters(source: str, adapter_config: str | os.PathLike[str]) -> DataError:
    """The error for a checkpoint that holds only adapters, with the name of their base model.

    Args:
        source: Folder or Hub id.
        adapter_config: Its ``adapter_config.json``.
    """
    try:
        base = read_json_object(adapter_config).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    return DataError(
        f"{source!r} holds the adapters of a PeftModel and no model (no config.json): load their base model, "
        f"{base or 'which adapter_config.json does not name'}, add them with "
        f"peft.PeftModel.from_pretrained(model, {source!r}), merge them with hf_prune.merge_lora, or with "
        f"merge_and_unload() if the model is dense, and save the result"
    )


def model_class(source: str | os.PathLike[str]) -> str:
    """The name of the class in a checkpoint's config, without loading weights or transformers.

    Args:
        source: Folder or Hub id.

    Returns:
        For example ``"LlamaForCausalLM"``; empty if the config names none.

    Raises:
        DataError: If the checkpoint cannot be found, or its config is not a JSON object.

    Example:
        >>> model_class("./model")  # doctest: +SKIP
        'LlamaForCausalLM'
    """
    names: list[str] = described_model(source).get("architectures") or [""]
    return names[0]


def has_classes(source: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is of a classifier with several classes, by its config.

    Args:
        source: Folder or Hub id.
    """
    config = described_model(source)
    return str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification") and (
        len(config.get("id2label") or {0: "", 1: ""}) > 1  # transformers leaves out what is two
    )


def check_unquantized(source: str | os.PathLike[str]) -> None:
    """Make sure that the weights of a checkpoint are plain numbers by its config, before any library is loaded.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If they are quantized, or the checkpoint cannot be found.
    """
    described = described_model(source)
    parts = [described, *(part for part in described.values() if isinstance(part, dict))]
    for settings in (part.get("quantization_config") for part in parts):
        if isinstance(settings, dict) and (method := settings.get("quant_method", "an unnamed method")) != METHOD:
            from hf_prune.utils.number_formats import EXPECTED

            raise DataError(f"{os.fspath(source)!r} is quantized with {method!r}: {EXPECTED}")


def described_model(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of a checkpoint, without loading transformers."""
    offline = check_model_source(source)
    path = os.path.join(source, "config.json")
    if not os.path.isdir(source):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            options = load_options().hub(source)
            path = hf_hub_download(os.fspath(source), "config.json", local_files_only=offline, **options)
        except RepositoryNotFoundError:
            raise DataError(
                f"model {os.fspath(source)!r} does not exist, or is private: check its name, and `hf auth whoami`"
            ) from None
        except HfHubHTTPError as error:
            raise DataError(
                f"model {os.fspath(source)!r} cannot be loaded from the Hugging Face Hub: {error}"
            ) from error
    try:
        return read_config(path, DataError)
    except DataError as error:
        raise DataError(f"the config.json of {os.fspath(source)!r} does not describe a model: {error}") from error


def sentence_class(source: str | os.PathLike[str]) -> str:
    """The class of sentence-transformers that a checkpoint is made for; empty for a model of transformers alone.

    Args:
        source: Folder or Hub id.

    Returns:
        For example ``"SentenceTransformer"`` or ``"CrossEncoder"``.

    Raises:
        DataError: If the checkpoint cannot be found.
        CheckpointError: If its description is damaged.
    """
    offline = check_model_source(source)
    if not sentence_modules(source, offline):
        return ""
    path = _find(source, "config_sentence_transformers.json", offline)
    config = {} if path is None else read_json_object(path)
    return str(config.get("model_type") or "SentenceTransformer")  # earlier versions wrote no other


def sentence_modules(source: str | os.PathLike[str], local_files_only: bool = False) -> list[dict[str, Any]]:
    """The modules of a checkpoint of sentence-transformers, the transformers model first; empty for any other.

    Args:
        source: Folder or Hub id.
        local_files_only: Look in the cache only, not on the Hub.
    """
    path = _find(source, "modules.json", local_files_only)
    if path is None:
        return []
    try:
        modules = json.loads(read_text(path))
    except (RecursionError, ValueError):
        return []
    usable = isinstance(modules, list) and all(isinstance(module, dict) for module in modules)
    return modules if usable else []


def _find(source: str | os.PathLike[str], name: str, local_files_only: bool) -> str | None:
    """The path of a file of a checkpoint; without transformers, which takes a second to load, for a folder."""
    if os.path.isdir(source):
        return path if os.path.isfile(path := os.path.join(source, name)) else None
    return find_file(source, name, {"local_files_only": local_files_only})


def class_of_transformers(name: object) -> Any | None:
    """The model class of transformers with a name from a config; None if there is no such model.

    The author of a config chooses the name, so that it could be that of an Auto class, which runs code from the
    checkpoint, or of a pipeline or config: only models are returned.

    Args:
        name: For example ``"BertForSequenceClassification"``.
    """
    import transformers
    from torch import nn

    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if is_model and cls.forward is not nn.Module.forward else None  # base classes cannot run
