"""Requests to the Hub: repeated where a failure may be temporary, with clear messages where it refuses."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_prune.errors import DataError, HubError
from hf_prune.utils.folders import PICKLES
from hf_prune.utils.front_matter import read_card
from hf_prune.utils.hub_access import check_hub_reachable

Result = TypeVar("Result")
MAX_ATTEMPTS = 4
_TOKEN = re.compile(r"hf_\w{6,}")


def card_of(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> str | None:
    """The card of a repository; None if it has no card, or does not exist."""
    path = call_hub(
        lambda: hf_hub_download(repo_id, "README.md", revision=revision, token=token), repo_id, missing=True
    )
    return None if path is None else read_card(path)


def download_checkpoint(repo_id: str, revision: str | None = None) -> Path:
    """Download the files of a repository, without pickles, and return their folder.

    Raises:
        HubError: If the repository does not exist, or the Hub cannot be reached.
    """
    ignored = [f"*{suffix}" for suffix in PICKLES]
    return Path(call_hub(lambda: snapshot_download(repo_id, revision=revision, ignore_patterns=ignored), repo_id))


def full_repo_id(repo_id: str, token: str | bool | None = None) -> str:
    """Complete a name without an owner by the name of the user who is logged in.

    Raises:
        HubError: If nobody is logged in, or the Hub cannot be reached.
    """
    return repo_id if "/" in repo_id else f"{call_hub(lambda: HfApi(token=token).whoami(), repo_id)['name']}/{repo_id}"


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a repository id, ``owner/name`` or ``name``."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def check_repo_id(repo_id: str) -> None:
    """Make sure that a text has the form of a repository id, without asking the Hub.

    Raises:
        HubError: If it does not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a valid repository name: {_clean(error)}") from None


def hub_answers(repo_id: str) -> bool:
    """Whether the Hub answers at all; takes less than a second."""
    try:
        check_hub_reachable(f"repository {repo_id!r}")
    except DataError:
        return False
    return True


def is_downloaded(source: str) -> bool:
    """Whether a source is a repository whose config is in the local cache, and not a folder."""
    if not is_repo_id(source) or Path(source).exists():
        return False
    return isinstance(try_to_load_from_cache(source, "config.json"), str)


def card_of_base(repo_id: str) -> str | None:
    """The card of a base model, requested once; None if it has no card, or the Hub does not answer.

    Raises:
        DataError: If the card is too large.
    """
    try:
        check_hub_reachable(f"the card of {repo_id!r}")
        offline = False
    except DataError:
        offline = True  # a card in the cache will do
    try:
        path = hf_hub_download(repo_id, "README.md", local_files_only=offline)
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled):
        return None
    except Exception as error:
        if not _is_network(error):
            raise
        return None
    return read_card(path, errors="replace")


def call_hub(ask: Callable[[], Result], repo_id: str, *, missing: bool = False, attempts: int = MAX_ATTEMPTS) -> Any:
    """Call the Hub, and repeat the call where a failure may be temporary.

    Args:
        ask: Makes the request.
        repo_id: The repository, for messages.
        missing: Return None for a repository, revision or file that does not exist, instead of raising.
        attempts: How often to try; 1 for a request that must not arrive twice.

    Returns:
        What ``ask`` returned.

    Raises:
        HubError: If the Hub refuses, or cannot be reached.
    """
    for attempt in range(attempts):
        try:
            return ask()
        except LocalEntryNotFoundError:  # not in the cache, and a download has tried for half a minute by itself
            raise HubError("the Hub cannot be reached: check the network connection, and try again") from None
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if missing and status != 401:
                return None
            if missing and isinstance(
                error, RepositoryNotFoundError
            ):  # 401: missing, or private and nobody is logged in
                return None
            raise HubError(f"{repo_id} does not exist, or is private: check its name, and `hf auth whoami`") from None
        except LocalTokenNotFoundError:
            raise HubError("nobody is logged in: run `hf auth login`, or set HF_TOKEN") from None
        except HFValidationError as error:
            raise HubError(f"{repo_id!r} is not a valid repository name: {_clean(error)}") from None
        except OfflineModeIsEnabled:
            raise HubError("HF_HUB_OFFLINE is set: unset it to reach the Hub") from None
        except HfHubHTTPError as error:
            status = int(getattr(error.response, "status_code", 0))
            if status == 401:
                raise HubError(
                    "nobody is logged in, or the Hub does not know this token: run `hf auth login`, or set HF_TOKEN"
                ) from None
            if status == 403:
                raise HubError(
                    f"this token may not write to {repo_id}: use one with write access, or a repository of your own"
                ) from None
            if status == 412:
                raise HubError(
                    f"{repo_id} was changed in the meantime, or has this commit already: check it, and try again"
                ) from None
            if status < 500 or attempt == attempts - 1:
                raise HubError(f"the Hub refused the request for {repo_id}: {_clean(error)}") from None
        except Exception as error:
            if not _is_network(error):
                raise
            if attempt == attempts - 1:
                raise HubError(
                    f"the Hub cannot be reached ({type(error).__name__}): check the network connection, and try again; "
                    f"files that have arrived are not sent again"
                ) from None
        time.sleep(0.5 * 2**attempt)
    raise AssertionError("unreachable")


def _is_network(error: Exception) -> bool:
    """Whether an error comes from the network connection."""
    names = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return bool(names & {"httpx", "httpx2", "httpcore", "requests", "urllib3"}) or isinstance(
        error, ConnectionError | TimeoutError
    )


def _clean(error: Exception) -> str:
    """A message on one line, without anything that looks like a token."""
    return _TOKEN.sub("hf_…", " ".join(str(error).split()))[:300]
