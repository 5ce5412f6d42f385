"""Whether models and data are where they are said to be: a local folder, the local cache, or the Hugging Face Hub.

Without a network the Hugging Face libraries retry for half a minute. The functions here ask once,
for less than a second, and then say what was wanted, what went wrong and what to do instead.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.data_files import TABLES, listing
from hf_prune.errors import CheckpointError, DataError
from hf_prune.files import read_config, read_json_object

if TYPE_CHECKING:
    from datasets import Dataset

HUB_TIMEOUT = 0.8  # seconds; a call stays under one second, plus importing huggingface_hub the first time
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


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

    _check_repo_id(source, "a model")
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


def check_data_source(source: str | os.PathLike[str]) -> None:
    """Make sure that a data set can be loaded from where it is said to be, before any long work.

    Args:
        source: As for :func:`hf_prune.load_classification`.

    Raises:
        DataError: If the folder does not exist, if the id is malformed, or if the data set is not cached and
            the Hub does not answer.

    Example:
        >>> check_data_source("./no-such-data")
        Traceback (most recent call last):
        hf_prune.errors.DataError: no such folder: './no-such-data'. Pass a folder ...
    """
    source = os.fspath(source)
    if os.path.isfile(source):
        check_table(source)
        return
    _refuse_missing_file(source, "a file")
    if local_folder(source, "data") is None and cached_splits(*hub_repository(source)) is None:
        check_hub_reachable(f"data set {source!r}")


def check_text_source(source: str | os.PathLike[str]) -> None:
    """Make sure that texts can be loaded from where they are said to be, before any long work.

    Args:
        source: As for :func:`hf_prune.load_texts`.

    Raises:
        DataError: As :func:`check_data_source`; a file is fine.

    Example:
        >>> check_text_source("./no-such-file.txt")
        Traceback (most recent call last):
        hf_prune.errors.DataError: no such file or folder: './no-such-file.txt'. Pass a text file, ...
    """
    if not os.path.isfile(source):
        _refuse_missing_file(os.fspath(source), "a text file")
        check_data_source(source)


def check_table(path: str) -> None:
    """Make sure that a file is a table.

    Raises:
        DataError: If its name ends otherwise.
    """
    if not path.endswith(TABLES):
        raise DataError(
            f"{path!r} is no table, and labels are needed: expected a file that ends in {', '.join(TABLES)}, or a "
            f"folder with one per split"
        )


def _refuse_missing_file(source: str, what: str) -> None:
    if source.endswith((".txt", ".raw", ".tokens", *TABLES)) and not os.path.exists(source):
        raise DataError(
            f"no such file or folder: {source!r}. Pass {what}, a folder that holds data, or a Hub id (owner/name)"
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


def local_folder(source: str, what: str) -> Path | None:
    """The folder that ``source`` names, or None if it can only be a Hub id."""
    if os.path.isdir(source):
        return Path(source)
    if os.path.exists(source):
        raise DataError(f"{source!r} is a file: pass the folder that holds {what}")
    if not source or source.startswith((".", "/", "~")) or os.path.isabs(source) or source.count("/") > 1:
        home = " (write the home folder in full: '~' is not expanded)" if source.startswith("~") else ""
        raise DataError(f"no such folder: {source!r}{home}. Pass a folder that holds {what}, or a Hub id (owner/name)")
    return None


# --- the Hub ---------------------------------------------------------------------------------------


def check_hub_reachable(what: str) -> None:
    """Ask the Hugging Face Hub for a sign of life, and fail at once if there is none.

    Any HTTP answer counts. The request goes through the client of huggingface_hub, so ``HF_ENDPOINT``
    and proxies are honoured. It runs in a thread of its own because resolving a name cannot be
    timed out otherwise. The environment variable ``HF_PRUNE_HUB_TIMEOUT`` sets the seconds to wait.

    Args:
        what: What is wanted from the Hub, for the message: ``"model 'owner/name'"``.

    Raises:
        DataError: If an offline variable is set or the Hub does not answer in time.

    Example:
        >>> os.environ["HF_HUB_OFFLINE"] = "1"
        >>> check_hub_reachable("model 'owner/name'")
        Traceback (most recent call last):
        hf_prune.errors.DataError: cannot get model 'owner/name' from the Hugging Face Hub: HF_HUB_OFFLINE is set. ...
    """
    from huggingface_hub import constants

    timeout = _hub_timeout()
    if variable := _offline_variable(constants.HF_HUB_OFFLINE):
        raise DataError(
            f"cannot get {what} from the Hugging Face Hub: {variable} is set. Unset it, or pass a local folder"
        )
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    if problem := _request_problem(endpoint, timeout):
        raise DataError(
            f"cannot get {what} from the Hugging Face Hub at {endpoint}: {problem}. "
            "Pass a local folder, or check the network connection"
        )


def _hub_timeout() -> float:
    text = os.environ.get("HF_PRUNE_HUB_TIMEOUT", str(HUB_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise DataError(f"HF_PRUNE_HUB_TIMEOUT is {text!r}: expected a positive number of seconds")
    return seconds


def _offline_variable(read_at_import: bool) -> str | None:
    for name in _OFFLINE_VARIABLES:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return "HF_HUB_OFFLINE" if read_at_import else None


def _request_problem(endpoint: str, timeout: float) -> str | None:
    """What keeps the endpoint from answering, or None."""
    from huggingface_hub import get_session

    session = get_session()
    no_answer = f"no answer within {timeout:g} s (HF_PRUNE_HUB_TIMEOUT sets the seconds to wait)"
    problems: list[str | None] = []

    def ask() -> None:
        try:
            session.head(f"{endpoint}/robots.txt", timeout=timeout, follow_redirects=False)  # small and static
        except Exception as error:  # of whichever HTTP library the installed huggingface_hub uses
            problems.append(_describe(error, no_answer))
        else:
            problems.append(None)

    thread = threading.Thread(target=ask, name="hf_prune-hub-check", daemon=True)
    thread.start()
    thread.join(timeout + 0.05)  # lets the client's own time-out close its socket first
    return problems[0] if problems else no_answer


def _describe(error: BaseException, no_answer: str) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return "the host name cannot be resolved"
        if isinstance(cause, ConnectionRefusedError):
            return "the connection was refused"
        if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            return no_answer
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


def _check_repo_id(source: str, what: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise DataError(f"{source!r} is neither a folder nor a Hub id of {what}: {error}") from None


def hub_repository(source: str) -> tuple[str, str | None]:
    """Repository and configuration of a Hub id."""
    if source.startswith("glue/"):
        source = source.replace("glue/", "nyu-mll/glue:", 1)
    repo_id, _, config = source.partition(":")
    _check_repo_id(repo_id, "data")
    return repo_id, config or None


def cached_splits(repo_id: str, config: str | None) -> Mapping[str, Dataset] | None:
    """The splits that ``datasets`` has cached, without a request: load_dataset would retry first."""
    from datasets.packaged_modules.cache.cache import Cache

    name = repo_id.split("/")[-1]
    try:
        builder = Cache(dataset_name=name, repo_id=repo_id, config_name=config, version="auto", hash="auto")
    except (ValueError, FileNotFoundError):  # not cached, or not this configuration
        return None
    try:
        splits: Mapping[str, Dataset] = builder.as_dataset()
    except Exception as error:
        raise DataError(
            f"the cached copy of data set {repo_id!r} in {builder.cache_dir} cannot be read ({error}): "
            "delete that folder and load it again"
        ) from error
    return splits
