"""Accuracy against sparsity, size and time: measured live, or beforehand by ``make_results.py``."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from choices import WHAT, criteria_for, fixed_sparsity, make_config
from measuring import score, time_both
from models import DenseModel, Progress, prune_copy

from hf_prune import DataError, compare
from hf_prune.utils.formatting import format_csv

FIELDS = (
    "method", "sparsity", "accuracy", "drop", "drop_standard_error", "drop_bound", "n", "parameters", "nonzero",
    "file_bytes", "speedup", "speedup_low", "speedup_high", "faster", "seconds", "here",
)  # fmt: skip
_LARGEST = 1e15  # of any number
SURELY_FASTER = 1.05  # with 95 % confidence; some of many points would reach less by chance


def method_name(what: str, how: str, repair: bool) -> str:
    """The name of a line in the chart."""
    return f"{how}{' + repair' if repair else ''}, {what.lower()}"


def measure(
    dense: DenseModel,
    methods: Sequence[tuple[str, str, bool]],
    sparsities: Sequence[float],
    data: Any,
    texts: Sequence[str],
    root: Path,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield a point for every method and sparsity, each pruned from the dense weights.

    Args:
        dense: The model.
        methods: What is removed, how it is chosen, and whether the rest is repaired.
        sparsities: The sparsities to measure for each method.
        data: Labelled sentences to score on.
        texts: Texts to calibrate with.
        root: Where pruned models are saved for a moment.
        progress: Called with what is being done.
    """
    done = 0
    dense_score = score(dense, data, "held out")
    total = len(methods) * len(sparsities)
    for what, how, repair in methods:
        fixed = fixed_sparsity(what)
        for sparsity in sparsities if fixed is None else [fixed]:
            name, share = method_name(what, how, repair), done / total

            def step(title: str, _: float, name: str = name, sparsity: float = sparsity, share: float = share) -> None:
                progress(f"{name} at {100 * sparsity:.0f} %: {title.lower()}", share)

            config = make_config(what, how, repair, sparsity)
            pruned = prune_copy(dense, config, texts, root / uuid.uuid4().hex, step)
            try:
                step("scoring", 0.0)
                drop = compare(dense_score, score(pruned, data, "held out"))
                step("timing", 0.0)
                timed = time_both(dense.model, pruned.model)
            finally:
                shutil.rmtree(pruned.folder, ignore_errors=True)
            ratio = timed.points[1].against
            assert ratio is not None
            done += 1
            yield {
                "method": name,
                "sparsity": pruned.config.sparsity,
                "accuracy": 100 * drop.pruned_accuracy,
                "drop": drop.drop,
                "drop_standard_error": drop.drop_standard_error,
                "drop_bound": drop.upper_bound,
                "n": len(data),
                "parameters": pruned.parameters,
                "nonzero": pruned.report.nonzero,
                "file_bytes": pruned.file_bytes,
                "speedup": ratio.value,
                "speedup_low": ratio.low,
                "speedup_high": ratio.high,
                "faster": ratio.low > SURELY_FASTER,
                "seconds": round(pruned.seconds, 2),
                "doubt": drop.doubt,
            }


def read_results(path: Path) -> dict[str, Any]:
    """Read what ``make_results.py`` wrote; numbers are checked for range, and against each other.

    Raises:
        DataError: If it is damaged, or a number cannot be true.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results, dict):
            raise DataError(f"it holds a JSON {type(results).__name__}, expected an object")
        if results["format_version"] != 1 or not isinstance(results["note"], str):
            raise DataError(f"format_version is {results['format_version']!r}: expected 1, and a note")
        accuracy = _number(results["dense"], "accuracy", 0, 100)
        _number(results["dense"], "file_bytes", 1, _LARGEST)
        for point in results["points"]:
            _check_point(point, accuracy)
        if not results["points"]:
            raise DataError("there are no points")
    except (AttributeError, DataError, KeyError, OSError, TypeError, ValueError) as error:
        what = error if isinstance(error, DataError) else repr(error)
        raise DataError(f"{path} is damaged: {what}; measure it again with make_results.py") from error
    return results


def _check_point(point: Mapping[str, Any], accuracy: float) -> None:
    name = point["method"]
    parse_method(name)  # or an error
    for key, least, most in (
        ("sparsity", 0, 1), ("accuracy", 0, 100), ("drop", -100, 100), ("drop_standard_error", 0, 100),
        ("drop_bound", -100, 200), ("n", 1, _LARGEST), ("parameters", 1, _LARGEST), ("nonzero", 0, _LARGEST),
        ("file_bytes", 1, _LARGEST), ("speedup", 0, 1000), ("speedup_low", 0, 1000), ("speedup_high", 0, 1000),
        ("seconds", 0, _LARGEST),
    ):  # fmt: skip
        _number(point, key, least, most)
    right = {
        "drop": math.isclose(point["drop"], accuracy - point["accuracy"], abs_tol=1e-6),
        "drop_bound": point["drop_bound"] >= point["drop"],
        "nonzero": point["nonzero"] <= point["parameters"],
        "speedup": point["speedup_low"] <= point["speedup"] <= point["speedup_high"],
        "faster": point["faster"] is (point["speedup_low"] > SURELY_FASTER),
        "doubt": isinstance(point.get("doubt", ""), str),
    }
    if wrong := [key for key, fits in right.items() if not fits]:
        raise DataError(f"{wrong[0]} of {name} is {point.get(wrong[0])!r}, which the other numbers contradict")


def _number(values: Mapping[str, Any], key: str, least: float, most: float) -> float:
    value = values[key]
    if type(value) not in (int, float) or not least <= value <= most:
        raise DataError(f"{key} is {value!r}: expected a number from {least} to {most:g}")
    return float(value)


def sweet_spot(points: Sequence[Mapping[str, Any]], axis: str, tolerance: float) -> Mapping[str, Any] | None:
    """The sparsest, smallest or fastest point whose drop is at most the tolerance, with 95 % confidence; or None.

    Also None if the drops mean nothing because the dense model does not do the task.

    Args:
        points: The points to choose from.
        axis: ``"sparsity"``, ``"size"`` or ``"time"``.
        tolerance: Points of accuracy.
    """
    within = [p for p in points if p["drop_bound"] <= tolerance and not p.get("doubt")]
    rank = {
        "sparsity": lambda p: p["sparsity"],
        "size": lambda p: -p["file_bytes"],
        "time": lambda p: p["speedup"] if p["faster"] else 0.0,
    }[axis]
    if axis == "time":
        within = [p for p in within if p["faster"]]
    return max(within, key=lambda p: (rank(p), -p["drop"]), default=None)


def to_csv(points: Sequence[Mapping[str, Any]]) -> str:
    """The points as CSV."""
    return format_csv(FIELDS, [{"here": False, **point} for point in points])


def write_csv(points: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the points to a file; files older than an hour are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.csv"):
        with suppress(FileNotFoundError):  # another thread was faster
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    text = to_csv(points)
    path = folder / f"tradeoff-{hashlib.sha256(text.encode()).hexdigest()[:12]}.csv"
    path.write_text(text, encoding="utf-8")
    return path


def parse_method(name: str) -> tuple[str, str, bool]:
    """The settings behind a :func:`method_name`."""
    how, _, what = name.partition(", ")
    repair = how.endswith(" + repair")
    how = how.removesuffix(" + repair")
    choice = next((label for label in WHAT if label.lower() == what), None)
    if choice is None or how not in criteria_for(choice):
        raise DataError(f"{name[:100]!r} is not a method: expected one of those on the page")
    return choice, how, repair
