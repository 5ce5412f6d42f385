"""Options that several commands share; those that are settings of a PruningConfig are in settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.checkpoint.sources import has_classes, is_language_model, model_class, sentence_class
from hf_prune.cli.console import show_notices
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import ClassificationTask, LanguageModelingTask, SentenceTask, Task

LANGUAGE, SENTENCES, CLASSES = "language", "sentences", "classes"  # what a model is for
SST2 = "glue/sst2"
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
STSB = "sentence-transformers/stsb"
DATA = {LANGUAGE: WIKITEXT, SENTENCES: STSB, CLASSES: SST2}  # where none is named

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
        "[default: glue/sst2, WikiText-2 for language models, or STS-B for those of sentence-transformers]"
    ),
]
AnyText = Annotated[
    str | None,
    typer.Option(
        help="Text column, or two separated by a comma. [default: sentence; text for language models; for those of "
        "sentence-transformers sentence1,sentence2 or query,document]"
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="Models of sentence-transformers: spearman, for pairs of texts with a score, or ndcg, for queries with "
        "documents. [default: ndcg where the first column is a query or question]"
    ),
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


def task_kind(model: str, metric: str | None = None) -> str:
    """What a checkpoint is for: ``"language"``, ``"sentences"`` or ``"classes"``.

    Args:
        model: Folder or Hub id.
        metric: The value of ``--metric``, which only models of sentence-transformers have.

    Raises:
        DataError: If it cannot be found, or its config does not describe a model.
    """
    name, sentences = model_class(model), sentence_class(model)
    if metric is not None or (sentences and not (sentences == "CrossEncoder" and has_classes(model))):
        return SENTENCES
    return LANGUAGE if is_language_model(name) else CLASSES


def read_task(
    kind: str,
    source: str | None,
    text_column: str | None,
    label_column: str,
    calibration_split: str = "train",
    calibration_samples: int = 128,
    *,
    window: int = 512,
    metric: str | None = None,
) -> Task:
    """The task that options describe.

    Args:
        kind: What the model is for, see :func:`task_kind`.
        source: Where the data is; None for that of ``DATA``.
        text_column: The value of ``--text-column``.
        label_column: The value of ``--label-column``.
        calibration_split: The value of ``--calibration-split``.
        calibration_samples: The value of ``--calibration-samples``.
        window: The value of ``--window``.
        metric: The value of ``--metric``.
    """
    source = source or DATA[kind]
    seen = (calibration_split, calibration_samples)
    if kind == LANGUAGE:
        return LanguageModelingTask(source, text_column or "text", *seen, window)
    if kind == SENTENCES:
        columns = None if text_column is None else split_names(text_column)
        return SentenceTask(source, columns, None if label_column == "label" else label_column, metric, *seen)
    return ClassificationTask(source, split_names(text_column or "sentence"), label_column, *seen)


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
