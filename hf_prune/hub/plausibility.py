"""Whether the facts of a card can be true: numbers in range, and no contradiction between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.comparison import interval_of, mcnemar
from hf_prune.evaluation.examples.score import check_examples
from hf_prune.evaluation.sentence_result import check_sentences
from hf_prune.hub.plausible_acceleration import check_acceleration
from hf_prune.hub.plausible_divergence import check_divergence
from hf_prune.hub.plausible_language import check_benchmarks, check_generation, check_perplexity_ratio
from hf_prune.hub.plausible_numbers import ROUNDING, are_texts, is_same, real, whole
from hf_prune.inference.timing import MEDIAN_NOISE

# What is measured of language models beside their perplexity: a score, that of the dense model, and both compared.
BESIDE_SCORES: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "generation": check_generation,
    "benchmarks": check_benchmarks,
}
_MOST = 10**12  # examples and tokens


def check_report(report: Mapping[str, Any]) -> None:
    """Check that the counts of a report add up.

    Args:
        report: ``SparsityReport.to_dict()``.

    Raises:
        DataError: If they do not.
    """
    total = whole(report, "parameters", 0)
    whole(report, "nonzero", 0, total)
    whole(report, "removed", 0, whole(report, "target_parameters", 0, total))
    tensors = [tensor for tensor in report["tensors"] if tensor["is_target"]]
    for tensor in report["tensors"]:
        whole(tensor, "nonzero", 0, whole(tensor, "parameters", 0))
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
    whole(training, "steps", 0)
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
    whole(structure, "parameters_before", whole(structure, "parameters", 0))
    whole(structure, "bytes", 0)
    for site in structure["sites"]:
        whole(site, "units", 0, whole(site, "before", 0))
    if (speed := structure.get("speed")) is not None:
        real(speed, "measured", 0, open_=True)
        for name in ("rounds", "batch_size", "threads"):
            whole(speed, name, 1)
        whole(speed, "length", 0)


def check_evaluation(evaluation: Mapping[str, Any]) -> None:
    """Check that scores are in range and agree with their predictions and their comparison.

    Args:
        evaluation: The output of ``hf-prune evaluate --json``.

    Raises:
        DataError: If they cannot be true.
    """
    for name, check in BESIDE_SCORES.items():
        if evaluation.get(name) is not None:
            check(evaluation[name])
    score, dense, comparison = (evaluation.get(name) for name in ("evaluation", "dense", "comparison"))
    for part in (score, dense):
        if part is not None:
            other = check_examples if "kind" in part else check_sentences
            {"perplexity": _check_perplexity, "accuracy": _check_accuracy}.get(_kind(part), other)(part)
            are_texts(part, "split", "source", "data_fingerprint", "dtype")
    if score is not None and dense is not None and _kind(score) != _kind(dense):
        raise DataError("dense has another kind of score: expected two accuracies or two perplexities, or one metric")
    if score is not None and dense is not None and score.get("n") != dense.get("n"):
        raise DataError(
            f"n is {score.get('n')!r}, and {dense.get('n')!r} for the dense model: expected the same examples"
        )
    if comparison is None or score is None:
        return
    if dense is None or not isinstance(comparison, Mapping):
        raise DataError("there is a comparison without the score of the dense model: expected both")
    are_texts(comparison, "doubt")
    if (kind := _kind(score)) == "perplexity":
        check_perplexity_ratio(score, dense, comparison)
        return
    n = whole(comparison, "n", 1) if "n" in comparison else score["n"]
    if n != score["n"]:
        raise DataError(f"the comparison has n = {n}, and the scores {score['n']}: expected the same examples")
    p_value = real(comparison, "p_value", 0, 1)
    real(comparison, "confidence", 0.5, 1, open_=True)
    most = 100 if kind == "accuracy" else 200  # Spearman goes from -1 to 1
    drop = real(comparison, "drop", -most, most)
    key, scores = ("accuracy", "accuracies") if kind == "accuracy" else ("value", "values")
    is_same("drop", drop, 100 * (dense[key] - score[key]), f"the {scores} give")
    if type(comparison["interval"]) not in (list, tuple) or len(comparison["interval"]) != 2:
        raise DataError(f"interval is {comparison['interval']!r:.60}: expected two numbers")
    low, high = (real({"interval": bound}, "interval", -2 * most, 2 * most) for bound in comparison["interval"])
    if low > high or (kind == "accuracy" and (low < -most or high > most)):
        raise DataError(f"interval is {[low, high]!r}: expected two numbers from -100 to 100, the smaller one first")
    if dense[key] == score[key] and p_value < 1:
        raise DataError(f"p_value is {p_value!r}, and the drop is 0: expected 1")
    lost, won = (comparison.get(name) for name in ("only_dense_right", "only_pruned_right"))
    if lost is not None and won is not None:
        whole(comparison, "only_dense_right", 0, n)
        whole(comparison, "only_pruned_right", 0, n - lost)
        which = "the examples that only one model gets right give"
        is_same("drop", drop, 100 * (lost - won) / n, which)
        if abs(p_value - mcnemar(lost, won)) > 0.01 * mcnemar(lost, won):
            raise DataError(f"p_value is {p_value!r}, and {which} {mcnemar(lost, won):.3g}: measure again")
        for bound, counted in zip((low, high), interval_of(lost, won, n, comparison["confidence"])[0], strict=True):
            is_same("an end of the interval", bound, counted, which)
    if not low - ROUNDING <= drop <= high + ROUNDING:
        raise DataError(f"interval is {[low, high]!r}: expected one around the drop, {drop:g}")
    if comparison.get("divergence") is not None:
        changed = None if lost is None or won is None else lost + won
        check_divergence(comparison["divergence"], score, dense, changed)


def check_latency(latency: Mapping[str, Any]) -> None:
    """Check that timings are in range, and that speed-ups agree with them up to noise.

    Args:
        latency: The output of ``hf-prune bench --json``.

    Raises:
        DataError: If they cannot be true.
    """
    for name in ("rounds", "threads"):
        whole(latency, name, 1, _MOST)
    are_texts(latency, "dtype", "device", "torch")
    if not isinstance(latency["points"], list | tuple):
        raise DataError(f"points is {latency['points']!r:.60}: expected a list of timings")
    if not latency["points"]:
        raise DataError("points is []: expected at least one timing")
    first: dict[Any, float] = {}
    for point in latency["points"]:
        whole(point, "batch_size", 1, _MOST)
        whole(point, "length", 0, _MOST)
        median = real(point, "median", 0, open_=True)
        if "low" in point and not real(point, "low", 0) <= median <= real(point, "high", 0):
            raise DataError(f"median is {median!r}: expected it between {point['low']!r} and {point['high']!r}")
        are_texts(point, "model", "task")
        if not isinstance(point["model"], str):
            raise DataError(f"model is {point['model']!r}: expected the name of the model that was timed")
        workload = (point["batch_size"], point["length"], point.get("task"))
        is_first = workload not in first
        dense = first.setdefault(workload, median)
        if (against := point.get("against")) is not None:
            value = real(against, "value", 0, open_=True)
            if is_first:
                raise DataError(f"the speed-up is {value!r}, and the model that it is against has no time: time both")
            if type(against["is_real"]) is not bool:
                raise DataError(f"is_real is {against['is_real']!r}: expected true or false")
            if not 1 / MEDIAN_NOISE <= value / (dense / median) <= MEDIAN_NOISE:
                raise DataError(f"the speed-up is {value!r}, and the times give {dense / median:.3g}: measure again")


def check_sizes(files: Mapping[str, Any]) -> None:
    """Check that the sizes of files are whole numbers.

    Raises:
        DataError: If they are not.
    """
    for name in files:
        whole(files, name, 0)


CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {  # by field of PruningCardData
    "report": check_report,
    "files": check_sizes,
    "evaluation": check_evaluation,
    "latency": check_latency,
    "acceleration": check_acceleration,
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
    accuracy = real(score, "accuracy", 0, 1)
    n = whole(score, "n", 1, _MOST)
    if "perplexity" in score:
        raise DataError("it has an accuracy and a perplexity: expected one of them")
    if score.get("predictions") is not None or score.get("labels") is not None:
        predictions, labels = _classes(score, "predictions"), _classes(score, "labels")
        if len(predictions) != len(labels) or len(labels) != n:
            raise DataError(f"n is {n!r}, and there are {len(predictions)} predictions of {len(labels)} labels")
        correct = sum(a == b for a, b in zip(predictions, labels, strict=True)) / n
        is_same("accuracy", accuracy, correct, "the predictions give", 1e-9)
    is_same("accuracy", accuracy, round(accuracy * n) / n, f"the nearest share of {n:,} examples is", 1e-9)
    error = real(score, "standard_error", 0, 0.5)
    is_same("standard_error", error, math.sqrt(accuracy * (1 - accuracy) / n), "accuracy and n give")


def _check_perplexity(score: Mapping[str, Any]) -> None:
    perplexity = real(score, "perplexity", 1)
    if "accuracy" in score:
        raise DataError("it has an accuracy and a perplexity: expected one of them")
    for name in ("n", "n_tokens", "window"):
        if score.get(name) is not None:
            whole(score, name, 1, _MOST)
    if score.get("standard_error") is not None:
        real(score, "standard_error", 0)
    nlls, tokens = score.get("window_nll"), score.get("window_tokens")
    if nlls and tokens and len(nlls) == len(tokens):
        mean = math.fsum(nll * count for nll, count in zip(nlls, tokens, strict=True)) / sum(tokens)
        is_same("perplexity", perplexity / math.exp(min(mean, 700)), 1.0, "the windows give", 1e-6)


def _kind(score: Mapping[str, Any]) -> str:
    """``"perplexity"``, ``"accuracy"``, or the metric of another score."""
    if "metric" in score:
        return f"{score['metric']} by example"
    return "perplexity" if "perplexity" in score else "accuracy"
