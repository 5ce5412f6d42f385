"""Options that the commands which train share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="Folder for the trained checkpoint.", show_default=False)]
Sparsity = Annotated[float | None, typer.Option(help="Share of the weights removed in the end. [default: 0.5]")]
TrainSplit = Annotated[str, typer.Option(help="What it learns from.")]
ScoreSplit = Annotated[str, typer.Option(help="What it is scored on, before and after.")]
Epochs = Annotated[float, typer.Option(min=0.0, help="Passes over the data.")]
LearningRate = Annotated[float, typer.Option(min=0.0, help="Highest learning rate of AdamW.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sentences, or windows of tokens, in a batch.")]
ReportTo = Annotated[
    str | None,
    typer.Option(help="Trackers of the Trainer, separated by commas: wandb, tensorboard, … or all. [default: none]"),
]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")]
