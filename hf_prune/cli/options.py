"""Options that several commands share; those that are settings of a PruningConfig are in settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.checkpoint.sources import (
    described_model,
    has_classes,
    model_class,
    sentence_class,
)
from hf_prune.cli.console import show_notices
from hf_prune.errors import ConfigError
from hf_prune.evaluation.examples.kinds import KINDS, kind_of_model
from hf_prune.evaluation.tasks import (
    ClassificationTask,
    ExampleTask,
    LanguageModelingTask,
    RawTask,
    SentenceTask,
    Task,
)
from hf_prune.planning.expectations import is_language_model

LANGUAGE, SENTENCES, CLASSES, RAW = "language", "sentences", "classes", "raw"  # what a model is for
# What data would be of use where none is named, and an example on the Hub.
USEFUL = {
    LANGUAGE: "texts of the kind that the model will see, such as Salesforce/wikitext:wikitext-2-raw-v1",
    SENTENCES: "pairs of texts with a score, or queries with documents, such as sentence-transformers/stsb",
    CLASSES: "texts with labels that are classes of the model, such as glue/sst2",
    RAW: "images or sounds, in a folder",
    "image-classification": "images, in a folder with a subfolder for each class",
    "token-classification": "lists of words and of their labels (columns tokens and ner_tags)",
    "question-answering": "questions, texts and answers (columns question, context and answers)",
    "text-generation": "texts and what should be written for them (columns document and summary)",
    "multi-label-classification": "texts with lists of labels",
    "regression": "texts with numbers (columns text and score)",
    "classification": "texts with labels that are classes of the model, such as glue/sst2",
    "language-modeling": "texts of the kind that the model will see, such as Salesforce/wikitext:wikitext-2-raw-v1",
}

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder with a checkpoint, or a Hub id.", show_default=False)
]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)]
Data = Annotated[
    str | None,
    typer.Option(
        help="A folder with a file for each split (TSV, CSV, JSON, JSON lines, parquet, text, or images and sounds), "
        "one file, or a Hub data set (owner/name, owner/name:config).",
        show_default=False,
    ),
]
AnyText = Annotated[
    str | None,
    typer.Option(help="Text column, or two separated by a comma. [default: the one with a usual name]"),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="accuracy, f1, macro_f1 or matthews of classes; f1 or accuracy of entities; f1 or exact_match of answers; "
        "rouge_l of texts; spearman or pearson of numbers; spearman or ndcg of models of sentence-transformers. "
        "[default: the first one that fits the model]",
        callback=lambda name: name and name.lower(),
    ),
]
Prompts = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Language models: how many prompts from the data they continue, to be judged by what they write; 0: none. "
        "[default: 32]",
    ),
]
NewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Language models: the most tokens written after a prompt. [default: 48]"),
]
Split = Annotated[str, typer.Option(help="The split to score.")]
Label = Annotated[str | None, typer.Option(help="Label column. [default: the one with a usual name]")]
Limit = Annotated[int | None, typer.Option(min=1, help="Score only this many examples, the first ones.")]
MaxFlips = Annotated[
    float | None,
    typer.Option(
        help="Instead: the largest share of answers that may change, right or not, in percent, shown with 95 % "
        "confidence; for classifiers. A finer ruler than the accuracy."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Sentences scored at once.")]
CalibrationSplit = Annotated[str, typer.Option(help="Split that calibrated criteria learn from; never the scored one.")]
CalibrationSamples = Annotated[int, typer.Option(min=1, help="How many sentences, or windows of tokens, they see.")]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML or JSON file with settings of this command, or a PruningConfig; options override it."),
]
AsJson = Annotated[bool, typer.Option("--json", callback=show_notices, help="Print JSON for programs instead of text.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace what is in the way; otherwise only an earlier output of this command is replaced."
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Measure everything again instead of resuming.")]


def task_kind(model: str, metric: str | None = None) -> str:
    """What a checkpoint is for: ``"language"``, ``"sentences"``, ``"classes"``, ``"raw"``, or a kind of examples.

    Args:
        model: Folder or Hub id.
        metric: The value of ``--metric``.

    Raises:
        DataError: If it cannot be found, or its config does not describe a model.
    """
    name, sentences = model_class(model), sentence_class(model)
    if (sentences and not (sentences == "CrossEncoder" and has_classes(model))) or metric == "ndcg":
        return SENTENCES
    if is_language_model(name):
        return LANGUAGE
    kind = kind_of_model(name, described_model(model))
    if kind == "classification":
        return CLASSES if metric in (None, "accuracy") else kind
    return kind or (RAW if _reads_media_alone(model) else CLASSES)


def _reads_media_alone(model: str) -> bool:
    from hf_prune.cli.workflows.loading import other_inputs

    return bool(other_inputs(model))


def read_task(
    kind: str,
    source: str | None,
    text_column: str | None,
    label_column: str | None,
    calibration_split: str = "train",
    calibration_samples: int = 128,
    *,
    window: int = 512,
    metric: str | None = None,
    limit: int | None = None,
) -> Task | None:
    """The task that options describe.

    Args:
        kind: What the model is for, see :func:`task_kind`.
        source: Where the data is; None if nothing is needed.
        text_column: The value of ``--text-column``.
        label_column: The value of ``--label-column``.
        calibration_split: The value of ``--calibration-split``.
        calibration_samples: The value of ``--calibration-samples``.
        window: The value of ``--window``.
        metric: The value of ``--metric``.
        limit: The value of ``--limit``.
    """
    if source is None:
        return None
    seen = (calibration_split, calibration_samples)
    if kind == LANGUAGE:
        return LanguageModelingTask(source, text_column, *seen, window)
    if kind == SENTENCES:
        columns = None if text_column is None else split_names(text_column)
        return SentenceTask(source, columns, label_column, metric, *seen, limit)
    if kind == RAW:
        return RawTask(source, *seen)
    names = None if text_column is None else split_names(text_column)
    if kind in KINDS:
        return ExampleTask(kind, source, names, label_column, metric, *seen, limit)
    return ClassificationTask(source, names, label_column, *seen, limit)


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
