"""Whether the facts of a card can be true: numbers in range, and no contradiction between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.comparison import interval_of, mcnemar

_ROUNDING = 0.005  # error of a number written with two decimal places
_MOST = 10**12  # examples and tokens
_MAX_CHARACTERS = 4_000  # of a name or a path
_NOISE = 1.5  # factor by which a speed-up, a median of ratios, may differ from the ratio of the medians


def check_report(report: Mapping[str, Any]) -> None:
    """Check that the counts of a report add up.

    Args:
        report: ``SparsityReport.to_dict()``.

    Raises:
        DataError: If they do not.
    """
    total = _whole(report, "parameters", 0)
    _whole(report, "nonzero", 0, total)
    _whole(report, "removed", 0, _whole(report, "target_parameters", 0, total))
    tensors = [tensor for tensor in report["tensors"] if tensor["is_target"]]
    for tensor in report["tensors"]:
        _whole(tensor, "nonzero", 0, _whole(tensor, "parameters", 0))
    for name, counted in (
        ("parameters", sum(t["parameters"] for t in report["tensors"])),
        ("nonzero", sum(t["nonzero"] for t in report["tensors"])),
        ("target_parameters", sum(t["parameters"] for t in tensors)),
        ("removed", sum(t["parameters"] - t["nonzero"] for t in tensors)),
    ):
        if report[name] != counted:
            raise DataError(f"{name} is {report[name]!r}, and the tensors of the report have {counted:,}: count again")
    patterns = report.get("nm_patterns") or []
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise DataError(f"nm_patterns is {patterns!r:.100}: expected a list of patterns such as '2:4'")
    if (structure := report.get("structure")) is not None:
        check_structure(structure)


def check_training(training: Mapping[str, Any]) -> None:
    """Check the steps, the report and the scores of a training.

    Args:
        training: The content of ``training_report.json``.

    Raises:
        DataError: If they cannot be true.
    """
    _whole(training, "steps", 0)
    check_report(training["sparsity"])
    check_evaluation(
        {"evaluation": training["pruned"], "dense": training["dense"], "comparison": training["comparison"]}
    )


def check_structure(structure: Mapping[str, Any]) -> None:
    """Check the numbers of units before and after shrinking.

    Args:
        structure: ``StructureReport.to_dict()``.

    Raises:
        DataError: If they cannot be true.
    """
    _whole(structure, "parameters_before", _whole(structure, "parameters", 0))
    _whole(structure, "bytes", 0)
    for site in structure["sites"]:
        _whole(site, "units", 0, _whole(site, "before", 0))
    if (speed := structure.get("speed")) is not None:
        _real(speed, "measured", 0, open_=True)
        for name in ("rounds", "batch_size", "threads"):
            _whole(speed, name, 1)


def check_evaluation(evaluation: Mapping[str, Any]) -> None:
    """Check that scores are in range and agree with their predictions and their comparison.

    Args:
        evaluation: The output of ``hf-prune evaluate --json``.

    Raises:
        DataError: If they cannot be true.
    """
    score, dense, comparison = (evaluation.get(name) for name in ("evaluation", "dense", "comparison"))
    for part in (score, dense):
        if part is not None:
            (_check_perplexity if "perplexity" in part else _check_accuracy)(part)
            _are_texts(part, "split", "source", "data_fingerprint", "dtype")
    if score is not None and dense is not None and ("perplexity" in score) != ("perplexity" in dense):
        raise DataError("dense has another kind of score: expected two accuracies or two perplexities")
    if score is not None and dense is not None and score.get("n") != dense.get("n"):
        raise DataError(
            f"n is {score.get('n')!r}, and {dense.get('n')!r} for the dense model: expected the same examples"
        )
    if comparison is None or score is None:
        return
    if dense is None or not isinstance(comparison, Mapping):
        raise DataError("there is a comparison without the score of the dense model: expected both")
    _are_texts(comparison, "doubt")
    if "perplexity" in score:
        return
    n = _whole(comparison, "n", 1) if "n" in comparison else score["n"]
    if n != score["n"]:
        raise DataError(f"the comparison has n = {n}, and the scores {score['n']}: expected the same examples")
    p_value = _real(comparison, "p_value", 0, 1)
    _real(comparison, "confidence", 0.5, 1, open_=True)
    drop = _real(comparison, "drop", -100, 100)
    _is_same("drop", drop, 100 * (dense["accuracy"] - score["accuracy"]), "the accuracies give")
    if type(comparison["interval"]) not in (list, tuple) or len(comparison["interval"]) != 2:
        raise DataError(f"interval is {comparison['interval']!r:.60}: expected two numbers")
    low, high = (_real({"interval": bound}, "interval", -100, 100) for bound in comparison["interval"])
    if low > high:
        raise DataError(f"interval is {[low, high]!r}: expected two numbers from -100 to 100, the smaller one first")
    if dense["accuracy"] == score["accuracy"] and p_value < 1:
        raise DataError(f"p_value is {p_value!r}, and the drop is 0: expected 1")
    lost, won = (comparison.get(name) for name in ("only_dense_right", "only_pruned_right"))
    if lost is not None and won is not None:
        _whole(comparison, "only_dense_right", 0, n)
        _whole(comparison, "only_pruned_right", 0, n - lost)
        which = "the examples that only one model gets right give"
        _is_same("drop", drop, 100 * (lost - won) / n, which)
        if abs(p_value - mcnemar(lost, won)) > 0.01 * mcnemar(lost, won):
            raise DataError(f"p_value is {p_value!r}, and {which} {mcnemar(lost, won):.3g}: measure again")
        for bound, counted in zip((low, high), interval_of(lost, won, n, comparison["confidence"])[0], strict=True):
            _is_same("an end of the interval", bound, counted, which)
    if not low - _ROUNDING <= drop <= high + _ROUNDING:
        raise DataError(f"interval is {[low, high]!r}: expected one around the drop, {drop:g}")


def check_latency(latency: Mapping[str, Any]) -> None:
    """Check that timings are in range, and that speed-ups agree with them up to noise.

    Args:
        latency: The output of ``hf-prune bench --json``.

    Raises:
        DataError: If they cannot be true.
    """
    for name in ("rounds", "threads"):
        _whole(latency, name, 1, _MOST)
    _are_texts(latency, "dtype", "device", "torch")
    if not isinstance(latency["points"], list | tuple):
        raise DataError(f"points is {latency['points']!r:.60}: expected a list of timings")
    if not latency["points"]:
        raise DataError("points is []: expected at least one timing")
    first: dict[Any, float] = {}
    for point in latency["points"]:
        _whole(point, "batch_size", 1, _MOST)
        _whole(point, "length", 0, _MOST)
        median = _real(point, "median", 0, open_=True)
        if "low" in point and not _real(point, "low", 0) <= median <= _real(point, "high", 0):
            raise DataError(f"median is {median!r}: expected it between {point['low']!r} and {point['high']!r}")
        _are_texts(point, "model", "task")
        if not isinstance(point["model"], str):
            raise DataError(f"model is {point['model']!r}: expected the name of the model that was timed")
        workload = (point["batch_size"], point["length"], point.get("task"))
        is_first = workload not in first
        dense = first.setdefault(workload, median)
        if (against := point.get("against")) is not None:
            value = _real(against, "value", 0, open_=True)
            if is_first:
                raise DataError(f"the speed-up is {value!r}, and the model that it is against has no time: time both")
            if type(against["is_real"]) is not bool:
                raise DataError(f"is_real is {against['is_real']!r}: expected true or false")
            if not 1 / _NOISE <= value / (dense / median) <= _NOISE:
                raise DataError(f"the speed-up is {value!r}, and the times give {dense / median:.3g}: measure again")


def check_sizes(files: Mapping[str, Any]) -> None:
    """Check that the sizes of files are whole numbers.

    Raises:
        DataError: If they are not.
    """
    for name in files:
        _whole(files, name, 0)


CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {  # by field of PruningCardData
    "report": check_report,
    "files": check_sizes,
    "evaluation": check_evaluation,
    "latency": check_latency,
    "training": check_training,
}


def check_fact(name: str, value: Any, where: str) -> None:
    """Check one fact of a card.

    Args:
        name: A key of ``CHECKS``.
        value: The fact.
        where: What to call it in messages, such as the path of its file.

    Raises:
        DataError: If it cannot be true, or has another form than hf_prune writes.
    """
    try:
        CHECKS[name](value)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = error if isinstance(error, DataError) else f"it is not as hf_prune writes it: {error!r}"
        raise DataError(f"{where} cannot be true: {reason}") from error


def _classes(score: Mapping[str, Any], name: str) -> Sequence[int]:
    classes = score.get(name)
    if not isinstance(classes, list | tuple) or not all(type(label) is int for label in classes):
        raise DataError(f"{name} is {classes!r:.60}: expected a list of class numbers")
    return classes


def _check_accuracy(score: Mapping[str, Any]) -> None:
    accuracy = _real(score, "accuracy", 0, 1)
    n = _whole(score, "n", 1, _MOST)
    if "perplexity" in score:
        raise DataError("it has an accuracy and a perplexity: expected one of them")
    if score.get("predictions") is not None or score.get("labels") is not None:
        predictions, labels = _classes(score, "predictions"), _classes(score, "labels")
        if len(predictions) != len(labels) or len(labels) != n:
            raise DataError(f"n is {n!r}, and there are {len(predictions)} predictions of {len(labels)} labels")
        correct = sum(a == b for a, b in zip(predictions, labels, strict=True)) / n
        _is_same("accuracy", accuracy, correct, "the predictions give", 1e-9)
    _is_same("accuracy", accuracy, round(accuracy * n) / n, f"the nearest share of {n:,} examples is", 1e-9)
    error = _real(score, "standard_error", 0, 0.5)
    _is_same("standard_error", error, math.sqrt(accuracy * (1 - accuracy) / n), "accuracy and n give")


def _check_perplexity(score: Mapping[str, Any]) -> None:
    perplexity = _real(score, "perplexity", 1)
    if "accuracy" in score:
        raise DataError("it has an accuracy and a perplexity: expected one of them")
    for name in ("n", "n_tokens", "window"):
        if score.get(name) is not None:
            _whole(score, name, 1, _MOST)
    if score.get("standard_error") is not None:
        _real(score, "standard_error", 0)
    nlls, tokens = score.get("window_nll"), score.get("window_tokens")
    if nlls and tokens and len(nlls) == len(tokens):
        mean = math.fsum(nll * count for nll, count in zip(nlls, tokens, strict=True)) / sum(tokens)
        _is_same("perplexity", perplexity / math.exp(min(mean, 700)), 1.0, "the windows give", 1e-6)


def _are_texts(values: Mapping[str, Any], *names: str) -> None:
    for name in names:
        value = values.get(name)
        if value is not None and (
            not isinstance(value, str) or len(value) > _MAX_CHARACTERS or not value.isprintable()
        ):
            raise DataError(f"{name} is {value!r:.60}: expected one line of at most {_MAX_CHARACTERS:,} characters")


def _is_same(name: str, claimed: float, counted: float, what: str, tolerance: float = _ROUNDING) -> None:
    if abs(claimed - counted) > tolerance:
        raise DataError(f"{name} is {claimed!r}, and {what} {counted:.6g}: measure again")


def _whole(values: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int:
    value = values[name]
    if type(value) is not int or value < low or (high is not None and value > high):
        end = "or more" if high is None else f"to {high:,}"
        raise DataError(f"{name} is {value!r}: expected a whole number, {low:,} {end}")
    return value


def _real(values: Mapping[str, Any], name: str, low: float, high: float = math.inf, *, open_: bool = False) -> float:
    value = values[name]
    inside = type(value) in (int, float) and math.isfinite(value)
    if not inside or not (low < value < high if open_ else low <= value <= high):
        end = (
            f"from {low:g} to {high:g}" if math.isfinite(high) else f"above {low:g}" if open_ else f"of {low:g} or more"
        )
        raise DataError(f"{name} is {value!r}: expected a number {end}")
    return float(value)
