"""The sentences at the top of a card: what the model is for, and what pruning brought, in measured numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune.hub.card_data import PruningCardData
from hf_prune.hub.card_speed import kernels_of
from hf_prune.inference.acceleration.report import AccelerationReport

#: What models with these endings are for: the task on the Hub, and in words.
TASKS = {
    "ForSequenceClassification": ("text-classification", "text classification"),
    "ForTokenClassification": ("token-classification", "token classification"),
    "ForQuestionAnswering": ("question-answering", "question answering"),
    "ForCausalLM": ("text-generation", "text generation"),
    "LMHeadModel": ("text-generation", "text generation"),
    "ForMaskedLM": ("fill-mask", "filling in masked words"),
    "ForImageClassification": ("image-classification", "image classification"),
    "ForAudioClassification": ("audio-classification", "audio classification"),
    "ForCTC": ("automatic-speech-recognition", "speech recognition"),
    "ForSpeechSeq2Seq": ("automatic-speech-recognition", "speech recognition"),
}
_SMALLER = 0.95  # of the bytes in memory: files at most this large are called smaller


def task_of(model_class: str) -> tuple[str, str] | None:
    """The Hub's name of the task of a class, and the task in words; None if it is not in the table."""
    return next((task for ending, task in TASKS.items() if model_class.endswith(ending)), None)


def headline(data: PruningCardData) -> str:
    """What pruning brought and cost, such as ``"2.0× as fast, 99.1 % of the dense model's accuracy"``.

    Only from what was timed, scored and counted; empty if that is nothing.
    """
    parts = [_speed(data), _size(data), _score(data.evaluation or {})]
    return ", ".join(part for part in parts if part)


def _speed(data: PruningCardData) -> str:
    """The speed-up where it was measured to be real; of several workloads the smallest."""
    points = (data.latency or {}).get("points") or []
    ratios = [p["against"] for p in points if p.get("against") is not None]
    if ratios:
        least = min(ratios, key=lambda ratio: ratio["value"])
        if least["is_real"] and least["value"] > 1:
            return f"{least['value']:.1f}× as fast"
    elif (speed := (data.report.get("structure") or {}).get("speed")) is not None and speed["low"] > 1:
        return f"{speed['measured']:.1f}× as fast"
    report = None if data.acceleration is None else AccelerationReport.from_dict(data.acceleration)
    if report is None or report.speedup is None:
        return ""
    return f"{report.speedup.value:.1f}× as fast on {kernels_of(report)}"


def _size(data: PruningCardData) -> str:
    structure, files = data.report.get("structure"), sum(data.files.values())
    if structure is not None and structure["parameters"] < structure["parameters_before"]:
        return f"{100 * structure['parameters'] / structure['parameters_before']:.0f} % of the parameters"
    memory = data.report["bytes"]
    if structure is None and 0 < files < _SMALLER * memory:
        return f"files {memory / files:.1f}× smaller"
    share = data.report["removed"] / data.report["target_parameters"] if data.report["removed"] else 0
    return f"{100 * share:.0f} % of the pruned weights are zero" if share else ""


def _score(evaluation: Mapping[str, Any]) -> str:
    score, dense = evaluation.get("evaluation") or {}, evaluation.get("dense") or {}
    if dense.get("accuracy") and "accuracy" in score:
        return f"{100 * score['accuracy'] / dense['accuracy']:.1f} % of the dense model's accuracy"
    if dense.get("perplexity") and "perplexity" in score:
        return f"{score['perplexity'] / dense['perplexity']:.2f} times the dense model's perplexity"
    return ""
