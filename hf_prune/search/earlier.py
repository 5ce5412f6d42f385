"""The results of an earlier search in the folder of a new one, and whether it may replace or continue them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_prune.errors import ConfigError, DataError, SweepError
from hf_prune.search.point import SearchPoint
from hf_prune.search.result import FORMAT_VERSION
from hf_prune.utils.earlier_results import own_results
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.output_folder import check_output

_REMEDY = "choose another folder, or restart to measure everything again"


@dataclass(frozen=True)
class EarlierSearch:
    """What an earlier search left.

    Args:
        path: Its ``results.json``.
        settings: What a search that continues it must agree on.
        points: What it measured.
        saved: The name of the candidate whose checkpoint it saved, None if it saved none.
    """

    path: Path
    settings: Mapping[str, Any]
    points: tuple[SearchPoint, ...]
    saved: str | None

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Make sure that a search of these settings can continue this one.

        Raises:
            SweepError: If it cannot.
        """
        differing = [key for key, value in settings.items() if self.settings.get(key) != value]
        if differing:
            details = "; ".join(f"{key} was {self.settings.get(key)!r}, now {settings[key]!r}" for key in differing)
            raise SweepError(f"{self.path} holds a search of other settings ({details}): {_REMEDY}")


def check_folders(folder: Path, checkpoint: Path, *, overwrite: bool) -> EarlierSearch | None:
    """Make sure, before any work, that a search replaces only what a search wrote.

    Args:
        folder: Where it writes.
        checkpoint: The folder of its winner.
        overwrite: Whether anything may be replaced.

    Returns:
        The earlier search in ``folder``; None if there is none.

    Raises:
        CheckpointError: If one of the folders holds something else.
        SweepError: If ``results.json`` is not the result of a search.
    """
    earlier = own_results(folder / "results.json", _read, overwrite=overwrite)
    check_output(folder, "auto", overwrite=overwrite or earlier is not None)
    check_output(checkpoint, "auto", overwrite=overwrite)
    return earlier


def _read(path: Path) -> EarlierSearch:
    try:
        values = read_json_object(path, DataError)
        if values.get("format_version") != FORMAT_VERSION or not isinstance(values.get("points"), list):
            raise DataError(f"expected an object with format_version {FORMAT_VERSION} and points")
        if not isinstance(values.get("goal"), str) or not isinstance(values.get("settings"), dict):
            raise DataError("expected an object with a goal and settings")
        points = tuple(SearchPoint.from_dict(point) for point in values["points"])
    except (ConfigError, DataError, TypeError, ValueError) as error:
        raise SweepError(
            f"{path} is not the result of a search: {error}; choose another folder, or pass --overwrite "
            f"(overwrite=True) to replace it"
        ) from error
    saved = values.get("saved")
    settings = {"goal": values["goal"], **values["settings"]}
    return EarlierSearch(path, settings, points, saved if isinstance(saved, str) else None)
