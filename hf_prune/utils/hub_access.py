"""Whether the Hub can be reached, and whether a source is a folder or a Hub id."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

from hf_prune.errors import DataError

HUB_TIMEOUT = 0.8  # seconds, so that a call takes less than one, plus the first import of huggingface_hub
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def local_folder(source: str, what: str) -> Path | None:
    """The folder that a source names, or None if it can only be a Hub id.

    Args:
        source: Folder or Hub id.
        what: What the folder holds, for messages: ``"a model"``.

    Raises:
        DataError: If it is a file, or the path of a folder that does not exist, as it is if its first part is a
            folder.
    """
    if os.path.isdir(source):
        return Path(source)
    if os.path.exists(source):
        raise DataError(f"{source!r} is a file: pass the folder that holds {what}")
    if not source or source.startswith((".", "/", "~")) or os.path.isabs(source) or source.count("/") > 1:
        home = " (write the home folder in full: '~' is not expanded)" if source.startswith("~") else ""
        raise DataError(f"no such folder: {source!r}{home}. Pass a folder that holds {what}, or a Hub id (owner/name)")
    first, slash, _ = source.partition("/")
    if slash and os.path.isdir(first) and not source.startswith("glue/"):  # which is short for a data set of the Hub
        raise DataError(
            f"no such folder: {source!r}, though {first!r} is one. Pass a folder that holds {what}; for the Hub "
            f"id, run this where there is no folder {first!r}"
        )
    return None


def check_hub_reachable(what: str) -> None:
    """Make sure that the Hugging Face Hub answers, and fail at once if it does not.

    Any HTTP answer will do. The request uses the client of huggingface_hub, so it respects ``HF_ENDPOINT`` and
    proxies. It runs in its own thread, since there is no other way to limit the time of a name lookup. The environment
    variable ``HF_PRUNE_HUB_TIMEOUT`` sets the seconds to wait.

    Args:
        what: What to get from the Hub, for messages: ``"model 'owner/name'"``.

    Raises:
        DataError: If an offline variable is set, or the Hub does not answer in time.

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
    """Why the endpoint does not answer, or None if it does."""
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
    thread.join(timeout + 0.05)  # a little longer, so that the client times out first and closes its socket
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
    """Make sure that a source has the form of a Hub id.

    Args:
        source: The id.
        what: What it would hold, for messages: ``"a model"``.

    Raises:
        DataError: If it does not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise DataError(f"{source!r} is neither a folder nor a Hub id of {what}: {error}") from None
