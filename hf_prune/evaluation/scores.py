"""Scores of whatever kind a model has: the one place that asks whether it classifies texts or compares them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_prune.evaluation.accuracy import evaluate_classification
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.comparison import Comparison, compare, reason_to_doubt
from hf_prune.evaluation.data.classification import class_numbers
from hf_prune.evaluation.data.loading import fingerprint
from hf_prune.evaluation.data.sentences import sentence_columns
from hf_prune.evaluation.divergence import MOST_STORED
from hf_prune.evaluation.examples.base import Columns, ExampleKind
from hf_prune.evaluation.examples.evaluate import data_fingerprint, encoded_examples, evaluate_examples
from hf_prune.evaluation.examples.kinds import find_kind
from hf_prune.evaluation.examples.score import ExampleScore, compare_examples, example_doubt
from hf_prune.evaluation.labels import class_doubt
from hf_prune.evaluation.sentence_result import SentenceComparison, SentenceScore, compare_sentences, order_doubt
from hf_prune.evaluation.sentences import evaluate_sentences
from hf_prune.utils.digests import tensors_digest
from hf_prune.utils.wrapping import is_sentence_model

if TYPE_CHECKING:
    from datasets import Dataset

Score = Evaluation | SentenceScore | ExampleScore
ScoreComparison = Comparison | SentenceComparison
_READ = 64  # examples by which a tokenizer is recognised


def score_model(model: Any, tokenizer: Any, dataset: Dataset, **options: Any) -> Score:
    """Score a classifier by accuracy, a model of sentence-transformers by how it orders texts, or another by its kind.

    Args:
        model: The model.
        tokenizer: Its tokenizer; one of sentence-transformers has its own.
        dataset: The data.
        **options: Of :func:`evaluate_classification` or :func:`evaluate_sentences`; with a ``kind``, of
            :func:`evaluate_examples`.
    """
    if "kind" in options:
        return evaluate_examples(model, tokenizer, dataset, **options)
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
    if isinstance(dense, ExampleScore) and isinstance(pruned, ExampleScore):
        return compare_examples(dense, pruned, confidence=confidence)
    assert isinstance(dense, SentenceScore)
    assert isinstance(pruned, SentenceScore)
    return compare_sentences(dense, pruned, confidence=confidence)


def score_doubt(dense: Score, confidence: float = 0.95) -> str:
    """Why a drop from a score says nothing about what pruning costs; empty if it does."""
    if isinstance(dense, ExampleScore):
        return example_doubt(dense, confidence)
    return reason_to_doubt(dense, confidence) if isinstance(dense, Evaluation) else order_doubt(dense, confidence)


def has_distributions(score: Score) -> bool:
    """Whether models that are scored like this predict a distribution for each example."""
    if isinstance(score, ExampleScore):
        return find_kind(score.kind).has_distributions
    return isinstance(score, Evaluation)


def left_out_distributions(score: Score, classes: int) -> bool:
    """Whether a score that was read lacks its distributions since they were too many for its file.

    Args:
        score: As :func:`read_score` gave it.
        classes: How many the model has.
    """
    return has_distributions(score) and not getattr(score, "distributions", ()) and score.n * classes > MOST_STORED


def changed_answers(dense: Score, pruned: Score) -> int:
    """For how many examples two scores of one kind, with distributions, have other answers."""
    return sum(a != b for a, b in zip(_answers(dense), _answers(pruned), strict=True))


def _answers(score: Score) -> list[tuple[float, ...]]:
    if isinstance(score, ExampleScore):  # each row has what was said, and then as many numbers that are true
        return [row[: len(row) // 2] for row in score.kept]
    assert isinstance(score, Evaluation)
    return [(prediction,) for prediction in score.predictions]


def read_score(values: Mapping[str, Any]) -> Score:
    """The score that ``to_dict`` described.

    Raises:
        DataError: If it is damaged or was edited.
    """
    if "kept" in values:
        return ExampleScore.from_dict(values)
    return (SentenceScore if "metric" in values else Evaluation).from_dict(values)


def data_identity(model: Any, tokenizer: Any, dataset: Dataset, options: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of what is scored, and of how a tokenizer or processor reads it.

    Args:
        model: The model.
        tokenizer: Its tokenizer or processor.
        dataset: The data.
        options: Of :func:`score_model`.
    """
    if "kind" in options:
        task, columns = _kind_and_columns(dataset, options)
        few = encoded_examples(task, model, tokenizer, dataset.select(range(min(len(dataset), _READ))), columns)
        batch = task.collate(model, tokenizer, few[:_READ], False)
        return {
            "data": data_fingerprint(task, dataset, columns),
            "tokenizer": tensors_digest(sorted(batch.items()))[:16],
        }
    texts, truth = scored_columns(model, dataset, options)
    tokens = tokenizer(*(list(dataset[name])[:_READ] for name in texts))["input_ids"]
    digest = hashlib.sha256(json.dumps(tokens, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return {"tokenizer": digest, "data": fingerprint(dataset, [*texts, *([truth] if truth else [])])}


def _kind_and_columns(dataset: Dataset, options: Mapping[str, Any]) -> tuple[ExampleKind, Columns]:
    task = find_kind(options["kind"])
    named = (options.get("text_columns"), options.get("label_column"))
    return task, task.columns(dataset.column_names, "the data set", *named)


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
    if "kind" in options:
        task = find_kind(options["kind"])
        return {"kind": task.name, "metric": task.metric(options.get("metric")).label}, named
    texts, truth = scored_columns(model, dataset, options)
    if not is_sentence_model(model):
        assert truth is not None
        labels = class_numbers(dataset, truth, model)
        return {"labels": tuple(labels)}, {"classes": class_doubt(dataset, truth, labels, model.config), **named}
    columns = sentence_columns(dataset.column_names, "the data set", texts, truth, options.get("metric"))
    if columns.metric != "Spearman":  # of queries, the data gives nothing that a score repeats
        return {"metric": columns.metric}, named
    return {"metric": columns.metric, "references": tuple(map(float, dataset[truth]))}, named
