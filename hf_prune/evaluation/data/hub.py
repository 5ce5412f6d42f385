"""Data sets on the Hub: their ids, and a check of their metadata before other libraries read it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from hf_prune.utils.front_matter import read_card, read_yaml, split_card
from hf_prune.utils.hub_access import check_repo_id


def hub_repository(source: str) -> tuple[str, str | None]:
    """Split the id of a data set into repository and configuration, such as ``"owner/name:config"``.

    ``"glue/sst2"`` is short for ``"nyu-mll/glue:sst2"``.

    Raises:
        DataError: If it is not a valid Hub id.
    """
    if source.startswith("glue/"):
        source = source.replace("glue/", "nyu-mll/glue:", 1)
    repo_id, _, config = source.partition(":")
    check_repo_id(repo_id, "data")
    return repo_id, config or None


def check_data_card(repo_id: str) -> None:
    """Make sure that other libraries can safely read the YAML in a data set's repository.

    Raises:
        DataError: If they cannot.
        OSError: If the Hub does not provide it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name, read in (("README.md", split_card), (".huggingface.yaml", _read_settings)):
        with contextlib.suppress(EntryNotFoundError):
            path = Path(hf_hub_download(repo_id, name, repo_type="dataset"))
            read(read_card(path, errors="replace"), f"{name} of data set {repo_id!r}")


def _read_settings(text: str, what: str) -> Any:
    return read_yaml(text, what, "use another data set, or download it and name the folder of its files")
