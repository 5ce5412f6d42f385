"""What a search scores on, and what its candidates learn from: data of one split that does not overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_prune.calibration.batches import Batches
from hf_prune.calibration.texts import token_windows
from hf_prune.errors import ConfigError
from hf_prune.evaluation.allowed_loss import AllowedLoss, Loss
from hf_prune.evaluation.perplexity import compare_perplexity, evaluate_perplexity
from hf_prune.evaluation.scores import score_doubt, score_model
from hf_prune.evaluation.tasks import (
    ClassificationTask,
    ExampleTask,
    LanguageModelingTask,
    RawTask,
    SentenceTask,
    Task,
)
from hf_prune.evaluation.tasks.examples import LANGUAGE
from hf_prune.evaluation.tasks.raw import NO_TASK
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.formatting import display_name


@dataclass(frozen=True)
class HeldOut:
    """How a search scores a model of one kind.

    Args:
        score: Scores a model, with a title for the progress bar.
        loss: What a pruned model lost against the dense one, from their two scores.
        calibration: Batches for a config, None if it needs none.
        polish_data: Batches for its polish, if others.
        doubt: Why a loss says nothing, from the score of the dense model; empty if it does.
        unit: What is lost, in words.
        description: What was scored, in words.
        identity: What results must agree on to stand in one table, besides the description.
        texts: What was scored, of a language model.
        recipe: By what it can be held out again, for a card.
    """

    score: Callable[[Any, str], Any]
    loss: Callable[[Any, Any], Loss]
    calibration: Callable[[PruningConfig], Batches | None]
    polish_data: Callable[[PruningConfig], Batches | None]
    doubt: Callable[[Any], str]
    unit: str
    description: str
    identity: Mapping[str, Any]
    texts: Sequence[str] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)


def held_out_data(
    task: Task,
    model: Any,
    tokenizer: Any,
    configs: Sequence[PruningConfig],
    n: int,
    *,
    allowed: AllowedLoss,
    **options: Any,
) -> HeldOut:
    """Split the data of a task into what is scored and what is learned from.

    Args:
        task: Texts for a causal language model, or examples with what a model should say of them.
        model: The dense model.
        tokenizer: Its tokenizer or processor.
        configs: All settings that may be tried.
        n: The most examples, or windows of tokens, that are scored.
        allowed: What is counted as lost.
        **options: Of the evaluation, such as ``batch_size``.

    Raises:
        ConfigError: If models of the task are not searched, or not by answers that change, or there is no such metric.
        DataError: If too little data remains to score.
    """
    if isinstance(task, LanguageModelingTask):
        if allowed.flips:
            raise ConfigError(
                f"max_flips is {allowed.most:g}, and {type(model).__name__} is a language model, whose loss is in per "
                f"cent of perplexity: use max_drop"
            )
        return _windows(task, model, tokenizer, n, options)
    if isinstance(task, RawTask):
        raise ConfigError(f"{type(model).__name__} has no task that is scored: {NO_TASK}")
    if isinstance(task, ExampleTask) and task.kind == LANGUAGE:
        raise ConfigError(
            f"the task is an ExampleTask of {LANGUAGE}, which holds out no texts: pass a LanguageModelingTask"
        )
    return _examples(task, model, tokenizer, configs, n, allowed, options)


def _examples(
    task: ClassificationTask | ExampleTask | SentenceTask,
    model: Any,
    tokenizer: Any,
    configs: Sequence[PruningConfig],
    n: int,
    allowed: AllowedLoss,
    options: dict[str, Any],
) -> HeldOut:
    seen = max(task.samples_seen(config, n, model) for config in configs)
    data = task.held_out(n, seen, model)
    metric, source = task.metric_label(data), display_name(task.source)
    if allowed.flips and not task.has_answers:
        raise ConfigError(
            f"max_flips is {allowed.most:g}, a share of answers that are classes, which {type(model).__name__} does "
            f"not give: it is scored by {metric}; use max_drop, in points of it"
        )
    units = "rows" if isinstance(task, SentenceTask) else "examples"
    named = {"source": source, "split": task.calibration_split, **task.columns, **options}
    columns = {name: list(value) if isinstance(value, tuple) else value for name, value in task.columns.items()}

    def loss(dense: Any, pruned: Any) -> Loss:
        return allowed.loss(task.compare(dense, pruned))

    return HeldOut(
        score=lambda scored, title: score_model(scored, tokenizer, data, **named, progress=title),
        loss=loss,
        calibration=lambda config: task.calibration_batches([config], model, tokenizer),
        polish_data=lambda config: task.polish_batches([config], model, tokenizer, seen),
        doubt=score_doubt,
        unit="% of answers changed" if allowed.flips else f"points of {metric}",
        description=f"{len(data):,} held-out {units} of {source} {task.calibration_split}",
        recipe={"n": n, "seen": seen},
        identity={"task": {**columns, "metric": metric}},
    )


def _windows(task: LanguageModelingTask, model: Any, tokenizer: Any, n: int, options: dict[str, Any]) -> HeldOut:
    learned, scored = task.learned_and_held_out()
    length = task.window_of(model)
    windows = token_windows(learned, tokenizer, length=length, n=task.calibration_samples)
    named = {"source": display_name(task.source), "split": task.calibration_split, **options}

    def loss(dense: Any, pruned: Any) -> Loss:
        found = compare_perplexity(dense, pruned)
        high = found.ratio if found.interval is None else found.interval[1]
        return Loss(100 * (found.ratio - 1), 100 * (found.ratio_standard_error or 0.0), 100 * (high - 1))

    return HeldOut(
        score=lambda model, title: evaluate_perplexity(
            model, tokenizer, scored, window=length, limit=n, progress=title, **named
        ),
        loss=loss,
        calibration=lambda config: windows if config.needs_data else None,
        polish_data=lambda config: None,
        doubt=lambda score: "",
        unit="per cent of perplexity",
        description=f"at most {n:,} windows of {length} tokens from the last quarter of the texts of "
        f"{display_name(task.source)} {task.calibration_split}",
        texts=scored,
        recipe={"n": n, "window": length},
        identity={"task": {"text_column": task.text_column}},
    )
