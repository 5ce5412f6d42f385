"""Options that several commands share; those that are settings of a PruningConfig are in settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import show_notices
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import ClassificationTask, LanguageModelingTask, Task

SST2 = "glue/sst2"
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder with a checkpoint, or a Hub id.", show_default=False)
]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)]
Data = Annotated[
    str, typer.Option(help="A folder with train/dev files, or a file (TSV, CSV, JSONL, parquet), or a Hub data set.")
]
AnyData = Annotated[
    str | None,
    typer.Option(
        help="A folder with train/dev files, a file, or a Hub data set; where no labels are needed, text files too. "
        "[default: glue/sst2, or WikiText-2 for language models]"
    ),
]
AnyText = Annotated[
    str | None,
    typer.Option(help="Text column, or two separated by a comma. [default: sentence, or text for language models]"),
]
Split = Annotated[str, typer.Option(help="The split to score.")]
Text = Annotated[str, typer.Option(help="Text column, or two separated by a comma.")]
Label = Annotated[str, typer.Option(help="Label column.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sentences scored at once.")]
CalibrationSplit = Annotated[str, typer.Option(help="Split that calibrated criteria learn from; never the scored one.")]
CalibrationSamples = Annotated[int, typer.Option(min=1, help="How many sentences, or windows of tokens, they see.")]
Config = Annotated[Path | None, typer.Option(help="JSON file with a PruningConfig; other options override it.")]
AsJson = Annotated[bool, typer.Option("--json", callback=show_notices, help="Print JSON for programs instead of text.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace what is in the way; otherwise only an earlier output of this command is replaced."
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Measure everything again instead of resuming.")]


def read_task(
    of_language: bool,
    source: str,
    text_column: str | None,
    label_column: str,
    calibration_split: str = "train",
    calibration_samples: int = 128,
    *,
    window: int = 512,
) -> Task:
    """The task that options describe: language modeling, or classification."""
    if of_language:
        return LanguageModelingTask(source, text_column or "text", calibration_split, calibration_samples, window)
    columns = split_names(text_column or "sentence")
    return ClassificationTask(source, columns, label_column, calibration_split, calibration_samples)


def split_names(text: str) -> tuple[str, ...]:
    """The names in a text, which are separated by commas."""
    return tuple(name.strip() for name in text.split(","))


def split_numbers(option: str, text: str) -> list[float]:
    """The numbers in a text, which are separated by commas.

    Raises:
        ConfigError: If one is not a number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}: expected numbers separated by commas, such as 0.3,0.5") from None
