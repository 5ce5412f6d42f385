"""What a card says of a language model beside its perplexity: what it writes, and its benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_prune.evaluation.generation_result import percent

# Of what is compared, the numbers among the facts of a card.
_WRITTEN = ("equal_tokens", "token_f1", "identical")
_SCORE = (
    "distinct",
    "standard_error",
    "n",
    "short",
    "mean_tokens",
    "new_tokens",
    "prompt_tokens",
    "chat",
    "data_fingerprint",
)


def language_facts(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers for programs.

    Args:
        evaluation: The output of ``hf-prune evaluate --json``.
    """
    facts: dict[str, Any] = {}
    if (generation := evaluation.get("generation")) is not None:
        score, comparison = generation["evaluation"], generation.get("comparison") or {}
        facts["generation"] = {
            **{key: score[key] for key in _SCORE if score.get(key) is not None},
            **{key: comparison[key] for key in _WRITTEN if key in comparison},
        }
    if (benchmarks := evaluation.get("benchmarks")) is not None:
        rows = benchmarks["evaluation"]["scores"]
        facts["benchmarks"] = {f"{row['task']} {row['metric']}": row["value"] for row in rows}
    return facts


def perplexity_ratio(evaluation: Mapping[str, Any]) -> str:
    """How many times the dense model's the perplexity is, with its interval; empty where it was not compared."""
    comparison = evaluation.get("comparison")
    if comparison is None or comparison.get("interval") is None:
        return ""
    low, high = comparison["interval"]
    return (
        f" It is {comparison['ratio']:.4f} times that of the dense model on the same windows "
        f"({100 * comparison['confidence']:g} % interval {low:.4f} to {high:.4f}, paired, n = {comparison['n']:,})."
    )


def written(evaluation: Mapping[str, Any], plain: Callable[[str], str]) -> dict[str, Any] | None:
    """What the template shows of the texts that a model wrote: a sentence, and samples; None if there are none.

    Args:
        evaluation: The output of ``hf-prune evaluate --json``.
        plain: Escapes a text.
    """
    generation = evaluation.get("generation")
    if generation is None:
        return None
    score, comparison = generation["evaluation"], generation.get("comparison")
    how = "in the chat template, " if score["chat"] else ""
    text = f"After {score['n']:,} prompts ({how}greedy, at most {score['new_tokens']} tokens each), "
    if comparison is None:
        text += f"{percent(score['distinct'])} of the 4-grams are distinct; it writes {_length(score)}."
        return {"text": text, "samples": []}
    parts = [
        f"{_with_error(comparison, 'equal_tokens', 1)} tokens are those of the dense model until the two texts part "
        f"({comparison['identical']} of {comparison['n']:,} texts wholly)",
        f"the F1 of their tokens is {_with_error(comparison, 'token_f1', 3)}",
        f"{percent(comparison['pruned_distinct'])} of the 4-grams are distinct, and "
        f"{percent(comparison['dense_distinct'])} of the dense model's",
        f"it writes {_length(score)}, and the dense model {_length(generation['dense'])}",
    ]
    names = ("prompt", "dense", "pruned")
    samples = [{name: plain(sample[name]) for name in names} for sample in comparison["samples"]]
    return {"text": f"{text}{'; '.join(parts)}. ± is one standard error.", "samples": samples}


def benchmark_rows(evaluation: Mapping[str, Any], plain: Callable[[str], str]) -> dict[str, Any] | None:
    """What the template shows of the tasks of lm-eval: a row for each metric, and a note; None if there are none.

    Args:
        evaluation: The output of ``hf-prune evaluate --json``.
        plain: Escapes a text.
    """
    benchmarks = evaluation.get("benchmarks")
    if benchmarks is None:
        return None
    score = benchmarks["evaluation"]
    compared = {(t["task"], t["metric"]): t for t in (benchmarks.get("comparison") or {}).get("tasks", [])}
    rows = []
    for row in score["scores"]:
        both = compared.get((row["task"], row["metric"]))
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
        cells = [plain(row["task"]), plain(row["metric"]), f"{row['n']:,}", f"{row['value']:.4f}{error}"]
        rows.append([*cells, "" if both is None else f"{both['dense']:.4f}", "" if both is None else _change(both)])
    limit = "" if score["limit"] is None else f", the first {score['limit']:,} examples of each task"
    return {"rows": rows, "note": plain(f"lm-eval {score['version']}{limit}; changes paired over the same examples.")}


def _change(both: Mapping[str, Any]) -> str:
    if both["interval"] is None:
        return f"{both['change']:+.4f}"
    return f"{both['change']:+.4f} ({both['interval'][0]:+.4f} to {both['interval'][1]:+.4f})"


def _length(score: Mapping[str, Any]) -> str:
    short = f" ({score['short']:,} of the texts are too short to have 4-grams)" if score["short"] else ""
    return f"{score['mean_tokens']:.1f} tokens a text{short}"


def _with_error(comparison: Mapping[str, Any], name: str, digits: int) -> str:
    error = comparison.get(f"{name}_standard_error")
    return f"{comparison[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
