"""Score a checkpoint."""

from __future__ import annotations

from typing import Any

from hf_prune.cli.workflows.loading import load_for_task
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.perplexity_result import Perplexity
from hf_prune.evaluation.sentence_result import SentenceScore
from hf_prune.evaluation.tasks import Task
from hf_prune.utils.formatting import display_name

Score = Evaluation | Perplexity | SentenceScore


def evaluate_checkpoint(source: str, task: Task, split: str, **options: Any) -> Score:
    """Score a checkpoint on a task.

    Args:
        source: Folder or Hub id.
        task: What the model is for, and the data to score it on.
        split: Which split, where there are splits.
        **options: Passed to :func:`hf_prune.evaluate_classification`, :func:`hf_prune.evaluate_perplexity` or
            :func:`hf_prune.evaluate_sentences`.
    """
    model, tokenizer = load_for_task(source, task)
    return task.score(model, tokenizer, split, progress=display_name(source), **options)
