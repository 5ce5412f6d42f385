"""What is measured of a dense and a pruned model: accuracy, answers in common, time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from models import DenseModel, Progress, PrunedModel, length_for

from hf_prune import (
    Evaluation,
    KernelError,
    LatencyResult,
    accelerate,
    compare,
    evaluate_classification,
    load_classification,
    measure_latency,
)


def measure_both(
    dense: DenseModel,
    pruned: DenseModel,
    data: str | None,
    data_name: str,
    n: int,
    texts: Sequence[str],
    zeros: bool,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Everything that the page shows of two models, ready for JSON, as soon as it is measured.

    Args:
        dense: The model.
        pruned: What became of it.
        data: Folder with labelled sentences; None if there are none, and answers are compared.
        data_name: What to call them.
        n: How many of them to score on.
        texts: Sentences whose answers are compared.
        zeros: Whether to time kernels that skip zeros as well.
        progress: Called with what is being done.
    """
    progress("Scoring both", 0.1)
    if data is None:
        yield {"agreement": count_same_answers(dense, pruned, texts)}
    else:
        sentences = held_out(data, n)
        yield {"evaluation": compare_scores(*(score(model, sentences, data_name) for model in (dense, pruned)))}
    progress("Timing both in turns", 0.5)
    result = time_both(dense.model, pruned.model)
    yield {
        "latency": result.to_dict(),
        "points": [
            {"model": p.model, "median": p.median, "low": p.low, "high": p.high, "verdict": p.verdict}
            for p in result.points
        ],
        "doubts": result.doubts(),
        "plain": ratio_of(result),
    }
    if zeros:
        progress("Choosing kernels that skip zeros", 0.7)
        yield {"kernels": time_with_kernels(dense.model, pruned.model)}


def held_out(data: str, n: int) -> Any:
    """At most ``n`` labelled sentences that the demo's model was not trained on."""
    sentences = load_classification(data, "dev")
    return sentences.select(range(min(len(sentences), n)))


def time_both(dense: Any, pruned: Any) -> LatencyResult:
    """Time two models in turns on a sentence of 64 tokens, or of as many as the model can read."""
    models = {"dense": dense, "pruned": pruned}
    return measure_latency(models, batch_sizes=[1], lengths=[length_for(dense, 64)], rounds=30)


def time_with_kernels(dense: Any, pruned: Any) -> dict[str, Any]:
    """Time both models with the fastest kernels for each of their layers, which they keep; or why there are none."""
    workload = {"batch_size": 1, "length": length_for(dense, 64)}
    try:
        report = accelerate(pruned, workload=workload)
        if report.speedup is None:
            return {"reason": report.sentence}
        accelerate(dense, workload=workload)  # so that the comparison is of zeros, and not of kernels
    except KernelError as error:
        return {"reason": str(error)}
    return {**ratio_of(time_both(dense, pruned)), "cpu": report.machine["cpu"], "difference": report.difference}


def ratio_of(timed: LatencyResult) -> dict[str, Any]:
    """How many times as fast the second model is as the first one, with its 95 % interval."""
    dense, pruned = timed.points
    ratio = pruned.against
    assert ratio is not None
    seconds = {"dense_seconds": dense.median, "seconds": pruned.median}
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high, "is_real": ratio.is_real, **seconds}


def score(model: DenseModel | PrunedModel, data: Any, source: str) -> Evaluation:
    """The accuracy on labelled sentences."""
    return evaluate_classification(model.model, model.tokenizer, data, source=source, split="held out")


def compare_scores(dense: Evaluation, pruned: Evaluation) -> dict[str, Any]:
    """Two scores on the same sentences, in the format of ``hf-prune evaluate --against --json``."""
    comparison = compare(dense, pruned)
    return {"dense": dense.to_dict(), "evaluation": pruned.to_dict(), "comparison": comparison.to_dict()}


def count_same_answers(dense: DenseModel, pruned: DenseModel, texts: Sequence[str]) -> tuple[int, int]:
    """On how many sentences two models choose the same class, and how many there are."""
    first, second = (probabilities_of(m.model, dense.tokenizer, texts).argmax(-1) for m in (dense, pruned))
    return int((first == second).sum()), len(texts)


@torch.inference_mode()
def probabilities_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """The probabilities that a model gives: (sentences, classes)."""
    batches = []
    for start in range(0, len(texts), 16):
        batch = tokenizer(
            list(texts[start : start + 16]),
            truncation=True,
            max_length=length_for(model, 256),
            padding=True,
            return_tensors="pt",
        )
        batches.append(model(**batch).logits.float().softmax(-1))
    return torch.cat(batches)
