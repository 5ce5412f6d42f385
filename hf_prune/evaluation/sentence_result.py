"""How well a model of sentence-transformers orders texts, and the comparison of two on the same data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.divergence import Divergence
from hf_prune.evaluation.saved_scores import check_counted, check_error, check_fields, data_name, is_finite_number
from hf_prune.evaluation.statistics import check_confidence, spearman, standard_error_of_mean
from hf_prune.utils.results import Result

SPEARMAN, NDCG = "Spearman", "nDCG@10"
METRICS = {"spearman": SPEARMAN, "ndcg": NDCG}  # by the names that options have


@dataclass(frozen=True, repr=False)
class SentenceScore(Result):
    """How well a model orders pairs of texts by their similarity, or documents by their relevance to queries.

    Attributes:
        metric: ``"Spearman"``, the rank correlation of the model's scores with those of the data; or ``"nDCG@10"``
            (Järvelin and Kekäläinen 2002), the mean over queries of the discounted gain of the first ten documents.
        value: The score: -1 to 1 for Spearman, 0 to 1 for nDCG.
        n: Number of pairs, or of queries.
        standard_error: Of the value: by bootstrap over the pairs, or from the variance between queries.
        values: Of each pair the model's score, or of each query its nDCG@10, in the order of the data.
        references: Of each pair the score in the data; of each query the reciprocal rank of the first relevant document
            among ten, whose mean is MRR@10.
        split: Name of the split.
        source: Where the data came from.
        data_fingerprint: Hash of texts and scores, see ``evaluation.data.loading.fingerprint``.
        seconds: Wall time of tokenizing and predicting.
        dtype: Of the weights, such as ``float32``.
        max_length: Longer texts were cut to this many tokens.
        batch_size: Texts per forward pass.
        n_rows: Number of rows of the data, several of a query; None if an earlier version scored it.
    """

    bars = ("value",)

    metric: str
    value: float
    n: int
    standard_error: float
    values: tuple[float, ...]
    references: tuple[float, ...]
    split: str
    source: str
    data_fingerprint: str
    seconds: float
    dtype: str
    max_length: int
    batch_size: int
    n_rows: int | None = None

    @property
    def mrr(self) -> float | None:
        """MRR@10 (Voorhees 1999), 0 to 1; None for Spearman."""
        return math.fsum(self.references) / self.n if self.metric == NDCG else None

    def __str__(self) -> str:
        """One line: the score and its standard error, n, and the data."""
        what = "pairs" if self.mrr is None else "queries"
        second = "" if self.mrr is None else f", MRR@10 {self.mrr:.4f}"
        data = data_name(self)
        return f"{self.metric} {self.value:.4f} ± {self.standard_error:.4f}{second} (n = {self.n:,} {what}, {data})"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "values": list(self.values), "references": list(self.references)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SentenceScore:
        """The inverse of ``to_dict``; the score is computed again from the values.

        Raises:
            DataError: If a field is missing or unknown, or the score is not what the values give.
        """
        check_fields(cls, values, "score of sentences", optional=("n_rows",))
        if values["metric"] not in METRICS.values():
            raise DataError(f"metric is {values['metric']!r}: expected one of {', '.join(METRICS.values())}")
        lists: dict[str, Any] = {}
        for name in ("values", "references"):
            numbers = values[name]
            if not isinstance(numbers, list | tuple) or not all(is_finite_number(number) for number in numbers):
                raise DataError(f"not a saved score of sentences: {name} is no list of finite numbers")
            lists[name] = tuple(map(float, numbers))
        if not 0 < len(lists["values"]) == len(lists["references"]) == values["n"]:
            raise DataError(
                f"not a saved score of sentences: n is {values['n']!r}, with {len(lists['values'])} values and "
                f"{len(lists['references'])} references"
            )
        counted = summarise(values["metric"], lists["values"], lists["references"])
        check_counted(values, counted, "the values that are saved with it give", 1e-6)
        return cls(**{**values, **counted, **lists})


def check_sentences(values: Mapping[str, Any]) -> None:
    """Check that a score can be true, also one whose values of single pairs or queries were left out.

    Args:
        values: Of :meth:`SentenceScore.to_dict`.

    Raises:
        DataError: If it cannot.
    """
    metric, value = values["metric"], values["value"]
    if metric not in METRICS.values():
        raise DataError(f"metric is {metric!r:.60}: expected one of {', '.join(METRICS.values())}")
    least = -1 if metric == SPEARMAN else 0
    if not is_finite_number(value) or not least <= value <= 1:
        raise DataError(f"value is {value!r}: expected a number from {least} to 1")
    check_error(values)
    rows = values.get("n_rows")
    if rows is not None and (type(rows) is not int or rows < values["n"]):
        raise DataError(f"n_rows is {rows!r:.60}: expected a whole number, at least n, {values['n']!r}")
    if values.get("values") is not None or values.get("references") is not None:
        SentenceScore.from_dict(values)


@dataclass(frozen=True, repr=False)
class SentenceComparison(Result):
    """A pruned model compared with the dense one on the same pairs or queries.

    Attributes:
        metric: As of :class:`SentenceScore`.
        dense_value: The score of the dense model.
        pruned_value: The score of the pruned model.
        drop: Points lost, ``100 (dense - pruned)``; positive if the pruned model is worse.
        drop_standard_error: Of the drop, paired, in points.
        interval: Two-sided confidence interval of the drop, in points.
        upper_bound: One-sided upper confidence bound of the drop, in points.
        p_value: Of the two-sided test that both are equally good.
        n: Number of pairs or queries.
        confidence: Of the interval and of the bound, 0 to 1.
        doubt: Why the drop means nothing, in words; empty if it does. See :func:`order_doubt`.
        divergence: How far the predictions are from the dense model's; None where there are no distributions.
    """

    bars = ("dense_value", "pruned_value")

    metric: str
    dense_value: float
    pruned_value: float
    drop: float
    drop_standard_error: float
    interval: tuple[float, float]
    upper_bound: float
    p_value: float
    n: int
    confidence: float
    doubt: str = ""
    divergence: Divergence | None = None

    @classmethod
    def of(
        cls,
        dense: Any,
        pruned: Any,
        error: float,
        confidence: float,
        doubt: str,
        divergence: Divergence | None = None,
        at_stake: float = 100.0,
    ) -> SentenceComparison:
        """The comparison of two scores by the same metric, whose drop is taken as normally distributed.

        Where no example changes, the spread of the examples is 0, and says nothing of those that were not seen.
        Interval and bound are therefore those with half an example more that loses everything, and half a one that wins
        as much, as in :func:`hf_prune.compare`.

        Args:
            dense: The score of the dense model.
            pruned: That of the pruned model.
            error: The standard error of the drop, paired, in points.
            confidence: Of the two-sided interval and of the one-sided bound, between 0 and 1.
            doubt: Why the drop means nothing; empty if it does.
            divergence: How far the predictions are from each other, if that is known.
            at_stake: How many points one example can lose; 0 where there is no limit, and the spread has to do.
        """
        drop = 100 * (dense.value - pruned.value)
        spread = math.hypot(error, at_stake / (dense.n + 2))
        two_sided = NormalDist().inv_cdf((1 + confidence) / 2) * spread
        return cls(
            metric=dense.metric,
            dense_value=dense.value,
            pruned_value=pruned.value,
            drop=drop,
            drop_standard_error=error,
            interval=(drop - two_sided, drop + two_sided),
            upper_bound=drop + NormalDist().inv_cdf(confidence) * spread,
            p_value=2 * NormalDist().cdf(-abs(drop) / error) if error else float(drop == 0),
            n=dense.n,
            confidence=confidence,
            doubt=doubt,
            divergence=divergence,
        )

    def __str__(self) -> str:
        """One line: both scores, the drop with interval and bound, the test, and n; a doubt comes first."""
        low, high = self.interval
        warning = f"Warning: {self.doubt}.\n" if self.doubt else ""
        moved = "" if self.divergence is None else f"\npredictions: {self.divergence.summary()}"
        return (
            f"{warning}{self.metric} {self.dense_value:.4f} -> {self.pruned_value:.4f}: drop {self.drop:.2f} points "
            f"({100 * self.confidence:g} % interval {low:.2f} to {high:.2f}, one-sided upper bound "
            f"{self.upper_bound:.2f}; p = {self.p_value:.3g}, paired, n = {self.n:,}){moved}"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "interval": list(self.interval)}


def compare_sentences(dense: SentenceScore, pruned: SentenceScore, *, confidence: float = 0.95) -> SentenceComparison:
    """Compare two models on the same pairs or queries: the drop, and how sure it is.

    The standard error of a drop in Spearman is that of 1,000 bootstrap samples of pairs, the same for both models
    (Efron 1979); that of a drop in nDCG comes from the differences of the queries. Interval, bound and test take the
    drop as normally distributed.

    Args:
        dense: Result of the dense model.
        pruned: Result of the pruned model on the same data.
        confidence: Of the two-sided interval and of the one-sided bound, between 0 and 1.

    Raises:
        ConfigError: If ``confidence`` is not between 0 and 1.
        DataError: If the two are not on the same data, or not of the same metric.
    """
    check_confidence(confidence)
    same = dense.metric == pruned.metric and dense.n == pruned.n and dense.data_fingerprint == pruned.data_fingerprint
    if not same or (dense.metric == SPEARMAN and dense.references != pruned.references):
        raise DataError(
            f"found {dense.metric} on {dense.n} examples (fingerprint {dense.data_fingerprint}) and {pruned.metric} on "
            f"{pruned.n} ({pruned.data_fingerprint}): expected the same score on the same data"
        )
    if dense.metric == SPEARMAN:
        samples = [resampled_spearman(score.values, score.references) for score in (dense, pruned)]
        error = 100 * float((samples[0] - samples[1]).std(ddof=1))
    else:
        differences = [a - b for a, b in zip(dense.values, pruned.values, strict=True)]
        error = 100 * standard_error_of_mean(differences)
    return SentenceComparison.of(dense, pruned, error, confidence, order_doubt(dense, confidence))


def order_doubt(dense: SentenceScore, confidence: float = 0.95) -> str:
    """Why a drop from a score says nothing about what pruning costs; empty if it does.

    Args:
        dense: The score of the dense model.
        confidence: How sure it must be that the model orders better than chance, between 0 and 1.
    """
    bound = dense.value - NormalDist().inv_cdf(confidence) * dense.standard_error
    if bound > 0:
        return ""
    return (
        f"the dense model has {dense.metric} {dense.value:.4f} ± {dense.standard_error:.4f} (n = {dense.n:,}): it is "
        f"not shown to order better than chance, so a drop says nothing; check the columns of texts and score, or "
        f"score more"
    )


def summarise(metric: str, values: tuple[float, ...], references: tuple[float, ...]) -> dict[str, float | int]:
    """The score of some pairs or queries, its standard error, and how many there are."""
    n = len(values)
    if metric == NDCG:
        return {"value": math.fsum(values) / n, "standard_error": standard_error_of_mean(values), "n": n}
    error = float(resampled_spearman(values, references).std(ddof=1))
    return {"value": spearman(values, references), "standard_error": error, "n": n}


def resampled_spearman(values: Any, references: Any, samples: int = 1000) -> Any:
    """Spearman's correlation in bootstrap samples of the pairs; the same samples in each call with as many pairs.

    Returns:
        (samples,) float64.
    """
    import numpy as np
    from scipy.stats import rankdata

    rng, n = np.random.default_rng(0), len(values)
    found = np.empty(samples)
    pairs = np.asarray([values, references], dtype=np.float64)
    for i in range(samples):
        ranks = rankdata(pairs[:, rng.integers(0, n, n)], axis=1)  # (2, n)
        ranks -= ranks.mean(1, keepdims=True)
        norm = math.sqrt(float((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
        found[i] = (ranks[0] * ranks[1]).sum() / norm if norm else 0.0
    return found
