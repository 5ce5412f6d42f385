"""hf-prune evaluate: options, help, and what it prints."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hf_prune.checkpoint.sources import model_class
from hf_prune.cli.console import echo
from hf_prune.cli.options import (
    CLASSES,
    DATA,
    LANGUAGE,
    SENTENCES,
    AnyData,
    AnyText,
    AsJson,
    Label,
    Metric,
    Model,
    read_task,
    task_kind,
)
from hf_prune.cli.startup import check_texts, start
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.sources import check_data_source


def evaluate(
    model: Model,
    data: AnyData = None,
    split: Annotated[
        str | None, typer.Option(help="The split to score. [default: validation, or test for language models]")
    ] = None,
    against: Annotated[str | None, typer.Option(help="A dense checkpoint to compare with, example by example.")] = None,
    text_column: AnyText = None,
    label_column: Label = "label",
    metric: Metric = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Language models: tokens seen at once. [default: what the model has positions for, at most 2048]",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Language models: score only this many windows.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Texts or windows scored at once. [default: 32, or 1 for language models]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a classifier by accuracy, a causal language model by perplexity, or a sentence encoder by how it orders.

    Alone, or against another one on the same examples.
    """
    checkpoints = [model, *([against] if against else [])]
    classes = [model_class(name) for name in checkpoints]
    kinds = [task_kind(name, metric) for name in checkpoints]
    if len(set(kinds)) > 1:
        raise DataError(f"{model!r} is a {classes[0]}, {against!r} a {classes[1]}: expected two of the same kind")
    of_language = kinds[0] == LANGUAGE
    if not of_language and (window or limit):
        raise ConfigError(
            f"--window and --limit are for language models, and {model!r} is a {classes[0]}: leave them out"
        )
    source = data or DATA[kinds[0]]
    check_texts(checkpoints, source, labelled=kinds[0] == CLASSES)
    if kinds[0] == SENTENCES:
        check_data_source(source)
    start([])
    from hf_prune.cli.workflows.evaluate import evaluate_checkpoint
    from hf_prune.evaluation.comparison import reason_to_doubt

    task = read_task(kinds[0], source, text_column, label_column, metric=metric)
    options: dict[str, Any] = {"window": window, "limit": limit} if of_language else {}
    options["batch_size"] = batch_size or (1 if of_language else 32)
    split = split or task.default_split
    scores: list[Any] = [evaluate_checkpoint(name, task, split, **options) for name in checkpoints]
    comparison: Any = task.compare(scores[1], scores[0]) if against else None
    if kinds[0] == CLASSES and (doubt := reason_to_doubt(scores[-1])):
        echo(f"warning: {doubt if against else doubt.replace('the dense model', model, 1)}", err=True)
    if as_json:
        from hf_prune.hub.checksums import measured_weights

        weights = measured_weights(model)
        values: dict[str, Any] = {"model": model, "weights": weights, "evaluation": scores[0].to_dict()}
        if comparison is not None:
            values |= {
                "against": against,
                "against_weights": measured_weights(str(against)),
                "dense": scores[1].to_dict(),
                "comparison": comparison.to_dict(),
            }
        echo(json.dumps(values, indent=2))
        return
    for name, score in zip(checkpoints, scores, strict=True):
        echo(f"{name}: {score}")
    if comparison is not None:
        echo(str(comparison))
