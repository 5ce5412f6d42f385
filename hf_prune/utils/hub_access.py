"""Whether the Hub can be reached, and whether a name can be one of its repositories."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

from hf_prune.errors import DataError
from hf_prune.utils.front_matter import read_card, read_yaml, split_card

HUB_TIMEOUT = 0.8  # seconds; a call stays under one second, plus importing huggingface_hub the first time
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


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


def check_repo_id(source: str, what: str) -> None:
    """Raises :class:`DataError` if a source can be no repository of the Hub."""
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
    check_repo_id(repo_id, "data")
    return repo_id, config or None


def check_data_card(repo_id: str) -> None:
    """See that other libraries can safely read what a data set's repository says of itself in YAML.

    Raises:
        DataError: If they cannot.
        OSError: If the Hub does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name, read in (("README.md", split_card), (".huggingface.yaml", _read_settings)):
        with contextlib.suppress(EntryNotFoundError):
            path = Path(hf_hub_download(repo_id, name, repo_type="dataset"))
            read(read_card(path, errors="replace"), f"{name} of data set {repo_id!r}")


def _read_settings(text: str, what: str) -> Any:
    return read_yaml(text, what, "use another data set, or download it and name the folder of its files")
