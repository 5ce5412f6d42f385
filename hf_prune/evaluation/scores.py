"""Scores of whatever kind a model has: the one place that asks whether it classifies texts or compares them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_prune.evaluation.accuracy import evaluate_classification
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.comparison import Comparison, compare, reason_to_doubt
from hf_prune.evaluation.data.classification import class_numbers
from hf_prune.evaluation.data.sentences import sentence_columns
from hf_prune.evaluation.labels import class_doubt
from hf_prune.evaluation.sentence_result import SentenceComparison, SentenceScore, compare_sentences, order_doubt
from hf_prune.evaluation.sentences import evaluate_sentences
from hf_prune.utils.wrapping import is_sentence_model

if TYPE_CHECKING:
    from datasets import Dataset

Score = Evaluation | SentenceScore
ScoreComparison = Comparison | SentenceComparison


def score_model(model: Any, tokenizer: Any, dataset: Dataset, **options: Any) -> Score:
    """Score a classifier by accuracy, or a model of sentence-transformers by how it orders texts.

    Args:
        model: The model.
        tokenizer: Its tokenizer; one of sentence-transformers has its own.
        dataset: The data.
        **options: Of :func:`evaluate_classification` or :func:`evaluate_sentences`.
    """
    if is_sentence_model(model):
        return evaluate_sentences(model, dataset, **options)
    return evaluate_classification(model, tokenizer, dataset, **options)


def compare_scores(dense: Score, pruned: Score, *, confidence: float = 0.95) -> ScoreComparison:
    """Two scores of one kind on the same examples, compared in pairs.

    Raises:
        DataError: If they are not.
    """
    if isinstance(dense, Evaluation) and isinstance(pruned, Evaluation):
        return compare(dense, pruned, confidence=confidence)
    assert isinstance(dense, SentenceScore)
    assert isinstance(pruned, SentenceScore)
    return compare_sentences(dense, pruned, confidence=confidence)


def score_doubt(dense: Score, confidence: float = 0.95) -> str:
    """Why a drop from a score says nothing about what pruning costs; empty if it does."""
    return reason_to_doubt(dense, confidence) if isinstance(dense, Evaluation) else order_doubt(dense, confidence)


def read_score(values: Mapping[str, Any]) -> Score:
    """The score that ``to_dict`` described.

    Raises:
        DataError: If it is damaged or was edited.
    """
    return (SentenceScore if "metric" in values else Evaluation).from_dict(values)


def scored_columns(model: Any, dataset: Dataset, options: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """The columns of texts, and that of what the model is compared with.

    Args:
        model: The model.
        dataset: The data.
        options: Of :func:`score_model`.
    """
    if not is_sentence_model(model):
        return list(options.get("text_columns", ("sentence",))), options.get("label_column", "label")
    asked = {name: options.get(name) for name in ("text_columns", "score_column", "metric")}
    columns = sentence_columns(dataset.column_names, "the data set", **asked)
    return list(columns.texts), columns.score


def known_truth(model: Any, dataset: Dataset, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a score must say of the data, whatever the model: fields that are checked, and texts that are replaced.

    Args:
        model: A dense model.
        dataset: The data.
        options: Of :func:`score_model`, with ``source`` and ``split``.
    """
    named = {"source": options["source"], "split": options["split"]}
    texts, truth = scored_columns(model, dataset, options)
    if not is_sentence_model(model):
        assert truth is not None
        labels = class_numbers(dataset, truth, model)
        return {"labels": tuple(labels)}, {"classes": class_doubt(dataset, truth, labels, model.config), **named}
    columns = sentence_columns(dataset.column_names, "the data set", texts, truth, options.get("metric"))
    if columns.metric != "Spearman":  # of queries, the data gives nothing that a score repeats
        return {"metric": columns.metric}, named
    return {"metric": columns.metric, "references": tuple(map(float, dataset[truth]))}, named
