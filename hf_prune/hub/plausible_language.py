"""Whether what a card says of a language model's own text and of its benchmarks can be true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.benchmark_result import BenchmarkScores
from hf_prune.evaluation.generation import distinct_share
from hf_prune.hub.plausible_numbers import NEAR, are_texts, around, is_same, real, whole

_MOST_TOKENS = 10**6


def check_perplexity_ratio(score: Mapping[str, Any], dense: Mapping[str, Any], comparison: Mapping[str, Any]) -> None:
    """Check the comparison of two perplexities.

    Args:
        score: Of the pruned model.
        dense: Of the dense model.
        comparison: ``PerplexityComparison.to_dict()``.

    Raises:
        DataError: If it cannot be true.
    """
    for name, part in (("pruned_perplexity", score), ("dense_perplexity", dense)):
        known = part["perplexity"]
        is_same(name, real(comparison, name, 1), known, "the score is", NEAR * known)
    ratio, counted = real(comparison, "ratio", 0, open_=True), score["perplexity"] / dense["perplexity"]
    is_same("ratio", ratio, counted, "the perplexities give", NEAR * counted)
    if comparison.get("interval") is not None:
        around("interval of the ratio", comparison["interval"], ratio)


def check_generation(generation: Mapping[str, Any]) -> None:
    """Check the scores of what a model wrote, that of the dense model, and their comparison.

    Args:
        generation: ``"generation"`` of the output of ``hf-prune evaluate --json``.

    Raises:
        DataError: If they cannot be true.
    """
    score, dense, comparison = (generation.get(name) for name in ("evaluation", "dense", "comparison"))
    for part in (score, dense):
        if part is not None:
            _check_written(part)
    if comparison is None or score is None:
        return
    if dense is None:
        raise DataError("there is a comparison without what the dense model wrote: expected both")
    n, most = whole(comparison, "n", 1), whole(comparison, "new_tokens", 1, _MOST_TOKENS)
    if {score["n"], dense["n"]} != {n} or {score["new_tokens"], dense["new_tokens"]} != {most}:
        raise DataError(f"the comparison is of {n} prompts and {most} tokens: expected those of both models")
    real(comparison, "equal_tokens", 0, most)
    f1 = real(comparison, "token_f1", 0, 1)
    identical = whole(comparison, "identical", 0, n)
    if f1 < identical / n - NEAR:
        raise DataError(
            f"token_f1 is {f1!r}, and {identical} of {n} texts are identical: expected no less than that share"
        )
    for name, key in (("distinct", "distinct"), ("short", "short"), ("tokens", "mean_tokens")):
        for model, part in (("pruned", score), ("dense", dense)):
            if (found := comparison[f"{model}_{name}"]) is None or part[key] is None:
                if found is not part[key]:
                    raise DataError(f"{model}_{name} is {found!r}, and the score is {part[key]!r}: measure again")
            else:
                is_same(f"{model}_{name}", real(comparison, f"{model}_{name}", 0), part[key], "the score is", NEAR)
    change = comparison["distinct_change"]
    if change is not None:
        real(comparison, "distinct_change", -1, 1)
        if not score["short"] and not dense["short"]:
            is_same("distinct_change", change, score["distinct"] - dense["distinct"], "the two shares give", NEAR)
    elif score["short"] + dense["short"] < n:
        raise DataError("distinct_change is None, and both models write longer texts: expected a number")
    if comparison["interval"] is not None:
        around("interval", comparison["interval"], change)
    for sample in comparison["samples"]:
        if not all(isinstance(sample[name], str) for name in ("prompt", "dense", "pruned")):
            raise DataError(f"a sample is {sample!r:.80}: expected a prompt and two texts")


def check_benchmarks(benchmarks: Mapping[str, Any]) -> None:
    """Check the scores of benchmarks, those of the dense model, and their comparison.

    Args:
        benchmarks: ``"benchmarks"`` of the output of ``hf-prune evaluate --json``.

    Raises:
        DataError: If they cannot be true.
    """
    score, dense, comparison = (benchmarks.get(name) for name in ("evaluation", "dense", "comparison"))
    values = []
    for part in (score, dense):
        if part is not None:
            are_texts(part, "version", "dtype")
            rows = part["scores"]
            for row in rows:
                are_texts(row, "task", "metric", "data_fingerprint")
                whole(row, "n", 1)
                real(row, "value", -1e12, 1e12)
            if "by_example" in part:
                BenchmarkScores.from_dict(part)
            values.append({(row["task"], row["metric"]): row["value"] for row in rows})
    if comparison is None or score is None:
        return
    if dense is None:
        raise DataError("there is a comparison without the benchmarks of the dense model: expected both")
    for row in comparison["tasks"]:
        key = row["task"], row["metric"]
        for name, known in zip(("pruned", "dense"), values, strict=True):
            is_same(f"{name} at {key}", row[name], known[key], "the score is", 1e-9)
        is_same(f"change at {key}", row["change"], row["pruned"] - row["dense"], "the scores give", 1e-9)
        if row["interval"] is not None:
            around(f"interval at {key}", row["interval"], row["change"])


def _check_written(score: Mapping[str, Any]) -> None:
    n = whole(score, "n", 1)
    short = whole(score, "short", 0, n)
    distinct = None if score["distinct"] is None else real(score, "distinct", 0, 1)
    if (distinct is None) != (short == n):
        raise DataError(f"distinct is {distinct!r}, and {short} of {n} texts are too short: expected None if all are")
    most = whole(score, "new_tokens", 1, _MOST_TOKENS)
    real(score, "mean_tokens", 0, most)
    are_texts(score, "split", "source", "data_fingerprint", "dtype")
    if (rows := score.get("tokens")) is not None:
        if len(rows) != n:
            raise DataError(f"n is {n}, and there are {len(rows)} texts: expected one for each prompt")
        shares = [share for row in rows if (share := distinct_share(row)) is not None]
        if len(rows) - len(shares) != short:
            raise DataError(f"short is {short}, and {len(rows) - len(shares)} texts are too short: measure again")
        if distinct is not None:
            is_same("distinct", distinct, sum(shares) / len(shares), "the texts give", 1e-9)
        is_same("mean_tokens", score["mean_tokens"], sum(map(len, rows)) / n, "the texts give", NEAR)
