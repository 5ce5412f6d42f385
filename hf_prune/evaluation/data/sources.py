"""Check that data exists where it is said to be: in a file or folder, the local cache, or on the Hugging Face Hub.

Without a network the Hugging Face libraries retry for half a minute. The functions here ask once, for less than a
second, and then say what was asked for, what went wrong and what to do instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_prune.errors import DataError
from hf_prune.evaluation.data.files import TABLES
from hf_prune.evaluation.data.hub import hub_repository
from hf_prune.utils.hub_access import check_hub_reachable, local_folder

if TYPE_CHECKING:
    from datasets import Dataset


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
    """Make sure that a file is a table, by its name.

    Raises:
        DataError: If it does not end in one of the known suffixes.
    """
    if not path.endswith(TABLES):
        raise DataError(
            f"{path!r} is not a table, and labels are needed: expected a file that ends in {', '.join(TABLES)}, or a "
            f"folder with one per split"
        )


def _refuse_missing_file(source: str, what: str) -> None:
    if source.endswith((".txt", ".raw", ".tokens", *TABLES)) and not os.path.exists(source):
        raise DataError(
            f"no such file or folder: {source!r}. Pass {what}, a folder that holds data, or a Hub id (owner/name)"
        )


def cached_splits(repo_id: str, config: str | None) -> Mapping[str, Dataset] | None:
    """The splits that ``datasets`` has cached, without a request to the Hub; None if there are none."""
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
