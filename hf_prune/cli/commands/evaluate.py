"""hf-prune evaluate: options, help, and what it prints."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hf_prune.checkpoint.sources import is_language_model, model_class
from hf_prune.cli.console import echo
from hf_prune.cli.options import SST2, WIKITEXT, AnyData, AnyText, AsJson, Label, Model, read_task
from hf_prune.cli.startup import check_texts, start
from hf_prune.errors import ConfigError, DataError


def evaluate(
    model: Model,
    data: AnyData = None,
    split: Annotated[
        str | None, typer.Option(help="The split to score. [default: validation, or test for language models]")
    ] = None,
    against: Annotated[str | None, typer.Option(help="A dense checkpoint to compare with, example by example.")] = None,
    text_column: AnyText = None,
    label_column: Label = "label",
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
        typer.Option(min=1, help="Sentences or windows scored at once. [default: 32, or 1 for language models]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a sequence classifier by accuracy or a causal language model by perplexity, alone or against another."""
    checkpoints = [model, *([against] if against else [])]
    classes = [model_class(name) for name in checkpoints]
    of_language = is_language_model(classes[0])
    if is_language_model(classes[-1]) != of_language:
        raise DataError(f"{model!r} is a {classes[0]}, {against!r} a {classes[1]}: expected two of the same kind")
    if not of_language and (window or limit):
        raise ConfigError(
            f"--window and --limit are for language models, and {model!r} is a {classes[0]}: leave them out"
        )
    source = data or (WIKITEXT if of_language else SST2)
    check_texts(checkpoints, source, labelled=not of_language)
    start([])
    from hf_prune.cli.workflows.evaluate import evaluate_checkpoint
    from hf_prune.evaluation.comparison import reason_to_doubt

    task = read_task(of_language, source, text_column, label_column)
    options: dict[str, Any] = {"window": window, "limit": limit} if of_language else {}
    options["batch_size"] = batch_size or (1 if of_language else 32)
    split = split or task.default_split
    scores: list[Any] = [evaluate_checkpoint(name, task, split, **options) for name in checkpoints]
    comparison: Any = task.compare(scores[1], scores[0]) if against else None
    if not of_language and (doubt := reason_to_doubt(scores[-1])):
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
