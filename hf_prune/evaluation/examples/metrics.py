"""Metrics as functions of what is kept of each example, one row each, so that samples of examples have scores too."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        label: What it is called in results.
        of: The value, 1 or 0 at best, of rows (n, columns).
        choose: The function whose values on samples of some rows can be compared, where ``of`` depends on what occurs.
        is_bounded: Whether it lies between -1 and 1, so that 0 is what chance gives and one example loses 1 at most.
    """

    label: str
    of: Callable[[Any], float]
    choose: Callable[[Any], Callable[[Any], float]] | None = None
    is_bounded: bool = True


def accuracy(rows: Any) -> float:
    """The share of equal pairs: rows (n, 2) of class numbers."""
    return float((rows[:, 0] == rows[:, 1]).mean())


def macro_f1(rows: Any) -> float:
    """The mean over the classes that occur of the F1 of each: rows (n, 2), predicted and true class numbers."""
    scores = [_f1(rows[:, 0] == c, rows[:, 1] == c) for c in np.unique(rows)]
    return float(np.mean(scores))


def class_f1(rows: Any) -> float:
    """F1 of class 1 where the true classes are 0 and 1, and :func:`macro_f1` where there are others."""
    return choose_f1(rows)(rows)


def choose_f1(rows: Any) -> Callable[[Any], float]:
    """The function that :func:`class_f1` is on some rows."""
    return _second_class_f1 if rows[:, 1].max() <= 1 else macro_f1


def _second_class_f1(rows: Any) -> float:
    return _f1(rows[:, 0] == 1, rows[:, 1] == 1)


def matthews(rows: Any) -> float:
    """The correlation of predicted and true classes (Matthews 1975; Gorodkin 2004 for more than two): rows (n, 2)."""
    known = np.unique(rows)
    predicted, true = (rows[:, i, None] == known for i in (0, 1))  # (n, classes)
    n, right = len(rows), float((rows[:, 0] == rows[:, 1]).sum())
    p, t = predicted.sum(0).astype(float), true.sum(0).astype(float)
    norm = math.sqrt((n**2 - float(p @ p)) * (n**2 - float(t @ t)))
    return (right * n - float(p @ t)) / norm if norm else 0.0


def pearson(rows: Any) -> float:
    """The correlation of predicted and true numbers: rows (n, 2)."""
    centred = rows - rows.mean(0)
    norm = math.sqrt(float((centred[:, 0] ** 2).sum() * (centred[:, 1] ** 2).sum()))
    return float(centred[:, 0] @ centred[:, 1]) / norm if norm else 0.0


def spearman(rows: Any) -> float:
    """The correlation of the ranks of predicted and true numbers, ties in the middle: rows (n, 2)."""
    return pearson(np.stack([_ranks(rows[:, i]) for i in (0, 1)], axis=1))


def subset_accuracy(rows: Any) -> float:
    """The share of examples with all labels right: rows (n, 2 labels), predicted and then true ones as 0 and 1."""
    half = rows.shape[1] // 2
    return float((rows[:, :half] == rows[:, half:]).all(1).mean())


def micro_f1(rows: Any) -> float:
    """F1 over all labels of all examples: rows as for :func:`subset_accuracy`."""
    half = rows.shape[1] // 2
    return _f1(rows[:, :half] == 1, rows[:, half:] == 1)


def label_f1(rows: Any) -> float:
    """The mean over labels of the F1 of each: rows as for :func:`subset_accuracy`."""
    half = rows.shape[1] // 2
    return float(np.mean([_f1(rows[:, i] == 1, rows[:, half + i] == 1) for i in range(half)]))


def entity_f1(rows: Any) -> float:
    """F1 over entities: rows (n, 5), entities that are right, predicted and true, then tokens right and all."""
    right, predicted, true = rows[:, :3].sum(0)
    return float(2 * right / (predicted + true)) if predicted + true else 0.0


def token_accuracy(rows: Any) -> float:
    """The share of tokens with the right label: rows as for :func:`entity_f1`."""
    return float(rows[:, 3].sum() / rows[:, 4].sum())


def mean_of(place: int) -> Callable[[Any], float]:
    """The mean of one column."""
    return functools.partial(_mean, place=place)


def log_likelihood(rows: Any) -> float:
    """The mean log-likelihood of a token in nats, minus the log of the perplexity: rows (n, 2), sum and count."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def _mean(rows: Any, place: int) -> float:
    return float(rows[:, place].mean())


CLASSES: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", accuracy),
    "f1": Metric("F1", class_f1, choose_f1),
    "macro_f1": Metric("macro F1", macro_f1),
    "matthews": Metric("Matthews", matthews),
}
LABELS: Mapping[str, Metric] = {
    "f1": Metric("F1", micro_f1),
    "macro_f1": Metric("macro F1", label_f1),
    "accuracy": Metric("subset accuracy", subset_accuracy),
}
NUMBERS: Mapping[str, Metric] = {"spearman": Metric("Spearman", spearman), "pearson": Metric("Pearson", pearson)}
ENTITIES: Mapping[str, Metric] = {"f1": Metric("entity F1", entity_f1), "accuracy": Metric("accuracy", token_accuracy)}
ANSWERS: Mapping[str, Metric] = {
    "f1": Metric("answer F1", mean_of(1)),
    "exact_match": Metric("exact match", mean_of(0)),
}
TEXTS: Mapping[str, Metric] = {
    "rouge_l": Metric("ROUGE-L", mean_of(1)),
    "exact_match": Metric("exact match", mean_of(0)),
}
TOKENS: Mapping[str, Metric] = {"log_likelihood": Metric("log-likelihood", log_likelihood, is_bounded=False)}


def constant_answers(rows: Any) -> list[Any]:
    """Rows (n, 2) of class numbers with the same first one, for each of the three commonest true classes."""
    classes, counts = np.unique(rows[:, 1], return_counts=True)
    common = classes[np.argsort(-counts, kind="stable")[:3]]
    return [np.stack([np.full(len(rows), each), rows[:, 1]], axis=1) for each in common]


def resampled(metric: Metric, rows: Any) -> Any:
    """The metric of bootstrap samples of the examples (Efron 1979): the same samples for as many examples.

    Returns:
        (samples,) float64.
    """
    rng, n = np.random.default_rng(0), len(rows)
    of = metric.of if metric.choose is None else metric.choose(rows)
    return np.array([of(rows[rng.integers(0, n, n)]) for _ in range(SAMPLES)])


def _f1(predicted: Any, true: Any) -> float:
    both = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / both) if both else 0.0


def _ranks(values: Any) -> Any:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]
