"""hf-prune evaluate: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.checkpoint.sources import model_class
from hf_prune.cli.console import echo, note
from hf_prune.cli.model_options import loads_model
from hf_prune.cli.options import (
    CLASSES,
    LANGUAGE,
    USEFUL,
    AnyText,
    AsJson,
    Data,
    Label,
    Metric,
    Model,
    NewTokens,
    Prompts,
    read_task,
    split_names,
    task_kind,
)
from hf_prune.cli.startup import check_task_data, start
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.tasks import LanguageModelingTask


@loads_model()
def evaluate(
    model: Model,
    data: Data = None,
    split: Annotated[
        str | None, typer.Option(help="The split to score. [default: validation, or test for language models]")
    ] = None,
    against: Annotated[str | None, typer.Option(help="A dense checkpoint to compare with, example by example.")] = None,
    text_column: AnyText = None,
    label_column: Label = None,
    metric: Metric = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Language models: tokens seen at once. [default: what the model has positions for, at most 2048]",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Score only this many examples, or windows of tokens: the first ones."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Texts or windows scored at once. [default: 32, or 1 for language models]"),
    ] = None,
    prompts: Prompts = None,
    new_tokens: NewTokens = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Language models: also score them by these tasks of lm-eval, separated by commas; needs the extra "
            "hf_prune[lm-eval].",
            show_default=False,
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --lm-eval: a folder with YAML files of more tasks.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a model by the metric of its task, alone or against another one on the same examples.

    Accuracy of classifiers, F1 of entities and answers, ROUGE-L of texts that are written, correlation of numbers and
    of similarities. Language models by their perplexity, and by what they write after prompts from the data.
    """
    checkpoints = [model, *([against] if against else [])]
    classes = [model_class(name) for name in checkpoints]
    kinds = [task_kind(name, metric) for name in checkpoints]
    if len(set(kinds)) > 1:
        raise DataError(f"{model!r} is a {classes[0]}, {against!r} a {classes[1]}: expected two of the same kind")
    of_language = kinds[0] == LANGUAGE
    of_languages = {"--window": window, "--prompts": prompts, "--new-tokens": new_tokens, "--lm-eval": lm_eval}
    for option, value in of_languages.items():
        if not of_language and value is not None:
            raise ConfigError(f"{option} is for language models, and {model!r} is a {classes[0]}: leave it out")
    named = {"why": "evaluate", "useful": USEFUL[kinds[0]]}
    if include_path is not None and lm_eval is None:
        raise ConfigError(f"--include-path is {str(include_path)!r} without --lm-eval: name its tasks, or leave it out")
    benchmarks: dict[str, Any] | None = (
        None if lm_eval is None else {"tasks": split_names(lm_eval), "include_path": include_path}
    )
    source = check_task_data(checkpoints, kinds[0], data, labelled=kinds[0] != LANGUAGE, **named)
    start([])
    from hf_prune.cli.workflows.evaluate import (
        compare_parts,
        evaluate_checkpoint,
        evaluate_language_model,
    )
    from hf_prune.evaluation.benchmarks import check_benchmarks_run
    from hf_prune.evaluation.comparison import reason_to_doubt
    from hf_prune.evaluation.saved_scores import scores_to_dict

    task = read_task(kinds[0], source, text_column, label_column, metric=metric, limit=limit)
    assert task is not None
    split = split or task.default_split
    if isinstance(task, LanguageModelingTask):
        options: dict[str, Any] = {"window": window, "limit": limit, "batch_size": batch_size or 1}
        options |= {"prompts": prompts, "new_tokens": new_tokens, "say": note}
        if benchmarks is not None:
            check_benchmarks_run(**benchmarks)
            options["benchmarks"] = {**benchmarks, "limit": limit, "batch_size": batch_size or 1}
        scores = [evaluate_language_model(name, task, split, **options) for name in checkpoints]
    else:
        scores = [
            {"evaluation": evaluate_checkpoint(name, task, split, batch_size=batch_size or 32)} for name in checkpoints
        ]
    dense: dict[str, Any] = scores[1] if against else {}
    compared = compare_parts(task, dense, scores[0])
    if kinds[0] == CLASSES and (doubt := reason_to_doubt(scores[-1]["evaluation"])):
        echo(f"warning: {doubt if against else doubt.replace('the dense model', model, 1)}", err=True)
    if as_json:
        from hf_prune.hub.checksums import measured_weights

        values: dict[str, Any] = {"model": model, "weights": measured_weights(model)}
        if against:
            values |= {"against": against, "against_weights": measured_weights(against)}
        echo(json.dumps({**values, **scores_to_dict(scores[0], dense, compared)}, indent=2))
        return
    for part in scores[0]:
        for name, score in zip(checkpoints, scores, strict=True):
            if part in score:
                echo(f"{name}: {score[part]}")
        if part in compared:
            echo(str(compared[part]))
