"""hf-prune lottery: options, help, and what it prints."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.model_options import loads_model
from hf_prune.cli.options import (
    CLASSES,
    USEFUL,
    AnyText,
    AsJson,
    Config,
    Data,
    Label,
    Model,
    Overwrite,
    read_task,
    split_names,
)
from hf_prune.cli.settings import SEED, SELECTION, read_config, takes_settings
from hf_prune.cli.startup import check_texts, start
from hf_prune.cli.training_options import (
    BatchSize,
    Bf16,
    Epochs,
    LearningRate,
    Out,
    ReportTo,
    ScoreSplit,
    Sparsity,
    TrainSplit,
)
from hf_prune.evaluation.tasks import ClassificationTask


@loads_model()
@takes_settings(
    out={"sparsity": Sparsity},
    rewind_to={name: SELECTION[name] for name in ("scope", "target_modules", "exclude_modules")},
    bf16=SEED,
)
def lottery(
    model: Model,
    out: Out,
    rounds: Annotated[int, typer.Option(min=1, help="How many times to prune; each round trains again.")] = 5,
    rewind_to: Annotated[int, typer.Option(min=0, help="Step after which the early weights are taken.")] = 0,
    data: Data = None,
    text_column: AnyText = None,
    label_column: Label = None,
    split: TrainSplit = "train",
    score_split: ScoreSplit = "validation",
    epochs: Epochs = 1.0,
    learning_rate: LearningRate = 5e-5,
    batch_size: BatchSize = 32,
    bf16: Bf16 = False,
    report_to: ReportTo = None,
    config: Config = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Search for a lottery ticket: train, prune, rewind to early weights, and repeat."""
    pruning = read_config(config, **settings)
    start([model])
    check_texts([model], data, labelled=True, why="a lottery", useful=USEFUL[CLASSES])
    from hf_prune.cli.workflows.lottery import lottery_checkpoint
    from hf_prune.cli.workflows.train import TrainingSettings

    task = read_task(CLASSES, data, text_column, label_column, split)
    assert isinstance(task, ClassificationTask)
    result = lottery_checkpoint(
        model,
        pruning,
        out,
        task,
        settings=TrainingSettings(
            split=split,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            bf16=bf16,
            seed=pruning.seed,
            report_to=split_names(report_to) if report_to else (),
        ),
        score_split=score_split,
        rounds=rounds,
        rewind_to=rewind_to,
        overwrite=overwrite,
    )
    echo(json.dumps(result.to_dict(), indent=2) if as_json else f"{result}\nSaved in {out}.")
