"""Score a checkpoint."""

from __future__ import annotations

from pathlib import Path

from hf_prune.cli.workflows.loading import load_classifier, load_language_model
from hf_prune.evaluation.accuracy import evaluate_classification
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.data.splits import LabelledData, TextData
from hf_prune.evaluation.perplexity import evaluate_perplexity
from hf_prune.evaluation.perplexity_result import Perplexity
from hf_prune.utils.formatting import display_name


def evaluate_checkpoint(source: str, data: LabelledData, split: str, *, batch_size: int = 32) -> Evaluation:
    """Score a sequence classifier; see :func:`hf_prune.evaluate_classification`.

    Args:
        source: Folder or Hub id.
        data: What to score it on.
        split: Which split.
        batch_size: Examples scored at once.
    """
    model, tokenizer = load_classifier(source)
    return evaluate_classification(
        model,
        tokenizer,
        data.load(split),
        text_columns=data.text_columns,
        label_column=data.label_column,
        batch_size=batch_size,
        source=data.source,
        split="" if Path(data.source).is_file() else split,
        progress=display_name(source),
    )


def evaluate_language_model(
    source: str,
    data: TextData,
    split: str,
    *,
    window: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Score a causal language model; see :func:`hf_prune.evaluate_perplexity`.

    Args:
        source: Folder or Hub id.
        data: What to score it on.
        split: Which split, where there are some.
        window: Tokens that the model sees at once; None for its context, at most 2048.
        limit: Use only the first so many windows.
        batch_size: Windows scored at once.
    """
    model, tokenizer = load_language_model(source)
    return evaluate_perplexity(
        model,
        tokenizer,
        data.load(split),
        window=window,
        limit=limit,
        batch_size=batch_size,
        source=display_name(data.source),
        split="" if Path(data.source).is_file() else split,
        progress=display_name(source),
    )
