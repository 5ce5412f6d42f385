"""Whether a model is where it is said to be, and which class of transformers loads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError, DataError
from hf_prune.utils.formatting import listing
from hf_prune.utils.hub_access import check_hub_reachable, check_repo_id, local_folder
from hf_prune.utils.json_files import read_config, read_json_object


def check_model_source(
    model_id: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | Path | None = None
) -> bool:
    """Make sure that a model can be loaded from where it is said to be, before any long work.

    A local folder needs a ``config.json``. A Hub id is fine if its ``config.json`` is in the local
    cache or if the Hub answers; whether the Hub has that model is left to ``from_pretrained``.

    Args:
        model_id: Path of a folder, or a Hub id such as ``"owner/name"``. A folder wins over a Hub id.
        revision: Branch, tag or commit on the Hub; ``main`` if None.
        cache_dir: Cache folder of the Hub client; its default if None.

    Returns:
        Whether to load with ``local_files_only=True``: the Hub does not answer, but the model is cached.

    Raises:
        DataError: If the folder does not exist or holds no model, if the id is malformed, or if the
            model is not cached and the Hub does not answer.

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
        if not isinstance(try_to_load_from_cache(source, "config.json", cache_dir=cache_dir, revision=revision), str):
            raise
        return True
    return False


def holds_adapters(source: str, adapter_config: str | os.PathLike[str]) -> DataError:
    """The error for a checkpoint of adapters alone, which says where the model is that they belong to.

    Args:
        source: Folder or Hub id.
        adapter_config: Its ``adapter_config.json``.
    """
    try:
        base = read_json_object(adapter_config).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    return DataError(
        f"{source!r} holds the adapters of a PeftModel and no model (no config.json): load the model that they belong "
        f"to, {base or 'which adapter_config.json does not name'}, lay them on it with "
        f"peft.PeftModel.from_pretrained(model, {source!r}), and merge them with hf_prune.merge_lora, or with "
        f"merge_and_unload() if the model is dense; what then is saved is a model"
    )


def model_class(source: str | os.PathLike[str]) -> str:
    """The class that a checkpoint's config names, without loading weights or libraries.

    Args:
        source: Folder or Hub id.

    Returns:
        Such as ``"LlamaForCausalLM"``; empty if the config names none.

    Raises:
        DataError: If the checkpoint cannot be found, or its config is no JSON object.

    Example:
        >>> model_class("./model")  # doctest: +SKIP
        'LlamaForCausalLM'
    """
    offline = check_model_source(source)
    path = os.path.join(source, "config.json")
    if not os.path.isdir(source):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            path = hf_hub_download(os.fspath(source), "config.json", local_files_only=offline)
        except HfHubHTTPError as error:
            raise DataError(
                f"model {os.fspath(source)!r} cannot be loaded from the Hugging Face Hub: {error}"
            ) from error
    try:
        names: list[str] = read_config(path, DataError).get("architectures") or [""]
    except DataError as error:
        raise DataError(f"the config.json of {os.fspath(source)!r} is no JSON object of a model: {error}") from error
    return names[0]


def class_of_transformers(name: object) -> Any | None:
    """The class of models that a config names, or None if transformers has no model by that name.

    Whoever writes a config chooses the name: Auto classes run code that lies beside it, and pipelines and configs are
    no models.

    Args:
        name: Such as ``"BertForSequenceClassification"``.
    """
    import transformers
    from torch import nn

    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return cls if is_model and cls.forward is not nn.Module.forward else None  # bases compute nothing


def is_language_model(class_name: str) -> bool:
    """Whether a class of transformers is a causal language model, by its name."""
    return class_name.endswith(("ForCausalLM", "LMHeadModel"))
