"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from hf_prune.checkpoint.sources import check_model_source
from hf_prune.errors import ConfigError, HfPruneError
from hf_prune.evaluation.data.sources import check_data_source, check_text_source
from hf_prune.evaluation.tasks import ClassificationTask, LanguageModelingTask, Task
from hf_prune.planning.choices import ALLOCATIONS, OBJECTIVES, POLISHES, REPAIRS, SCOPES
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.formatting import printable
from hf_prune.utils.registry import meant_by

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder with a checkpoint, or a Hub id.", show_default=False)
]
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


class _Notices(logging.Handler):
    """Prints what the library has to say besides results: not into JSON."""

    err = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        echo(self.format(record), err=self.err)


_NOTICES = _Notices()


def show_notices(as_json: bool = False) -> bool:
    """Print what the library has to say besides results, such as what it replaced and did not copy.

    Args:
        as_json: Whether results are printed for programs; then it goes to stderr.
    """
    _NOTICES.err = as_json
    logging.getLogger("hf_prune").addHandler(_NOTICES)  # which is there once, however often it is added
    return as_json


AsJson = Annotated[bool, typer.Option("--json", callback=show_notices, help="Print JSON for programs instead of text.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace what is in the way; otherwise only an earlier output of this command is replaced."
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Measure everything anew instead of resuming.")]
Config = Annotated[Path | None, typer.Option(help="JSON file with a PruningConfig; other options override it.")]
Granularity = Annotated[
    str | None,
    typer.Option(
        help="unstructured, N:M (2:4), block:RxC (block:16x1), row, column, channel; or what is taken out as a whole, "
        "one or several of head,neuron,layer."
    ),
]
Scope = Annotated[str | None, typer.Option(help=f"{', '.join(SCOPES)}: which weights compete.")]
Allocation = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(ALLOCATIONS)}, or module=sparsity pairs: query=0.8,key=0.8."),
]
Targets = Annotated[
    str | None,
    typer.Option(help="all-linear, module names separated by commas, or re:REGEX for whole module names."),
]
Exclude = Annotated[str | None, typer.Option(help="Modules to leave alone, in the same form.")]
Repair = Annotated[str | None, typer.Option(help=f"{', '.join(REPAIRS)}: solve anew for the weights that stay.")]
Objective = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(OBJECTIVES)}: what calibrated criteria and repairs minimise. [default: layer]"),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Prune in so many steps, with new gradients before each. [default: 1]")
]
Polish = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(POLISHES)}: afterwards, train for a short while to put out what the dense model did."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of what is random.")]
CalibrationSplit = Annotated[str, typer.Option(help="Split that calibrated criteria learn from; never the scored one.")]
CalibrationSamples = Annotated[int, typer.Option(min=1, help="How many sentences, or windows of tokens, they see.")]

SST2 = "glue/sst2"
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"


def echo(message: object = "", *, err: bool = False) -> None:
    """Print a line, in which names and texts of strangers cannot control the terminal.

    Args:
        message: What to print.
        err: To standard error.
    """
    typer.echo(printable(str(message)), err=err)


class Command(typer.core.TyperCommand):
    """A command that knows what other tools call its options."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Read the arguments, once none of them is an option of another tool."""
        options = {option for param in self.get_params(ctx) for option in (*param.opts, *param.secondary_opts)}
        for option in (arg.partition("=")[0] for arg in args[: args.index("--") if "--" in args else None]):
            if option.startswith("--") and option not in options:
                meant = meant_by("setting", option[2:], [name[2:].replace("-", "_") for name in options])
                ours = re.sub(r"^'(\w+)'", lambda name: f"--{name[1].replace('_', '-')}", meant or "")
                if ours.split(",")[0] in options:
                    ctx.fail(f"No such option: {option} (did you mean {ours}?)")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command; errors name its options and not what they are called in Python."""
        try:
            return super().invoke(ctx)
        except HfPruneError as error:
            names = {param.name: param.opts[0] for param in self.get_params(ctx) if "_" in (param.name or "")}
            names |= {"text_columns": names["text_column"]} if "text_column" in names else {}
            spelled = re.compile(rf"(?<![\w.'/\"-])({'|'.join(names)})(?![\w.'/\"(-]|=True)")
            if names:
                error.args = tuple(
                    spelled.sub(lambda name: names[name[1]], arg) if isinstance(arg, str) else arg for arg in error.args
                )
            raise


def check_texts(models: Sequence[str], data: str, *, labelled: bool) -> None:
    """Make sure that models can do something with texts, and then that these are there.

    Args:
        models: Folders or Hub ids.
        data: Where the texts are.
        labelled: Whether their labels are needed.
    """
    from hf_prune.cli.workflows.loading import check_reads_texts

    for model in models:
        check_reads_texts(model, labelled=labelled)
    (check_data_source if labelled else check_text_source)(data)


def start(models: Sequence[str], data: str | None = None) -> None:
    """Look for what is asked for, labelled data too, before the libraries are loaded; then silence their chatter."""
    for model in models:
        check_model_source(model)
    if data is not None:
        check_texts(models, data, labelled=True)
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()


def read_config(path: Path | None, **settings: Any) -> PruningConfig:
    """The settings of a file, if there is one, and of the options that were given."""
    values = {key: value for key, value in settings.items() if value is not None}
    for key in ("target_modules", "exclude_modules"):
        if key in values:
            values[key] = read_modules(values[key])
    if "," in values.get("granularity", ""):
        values["granularity"] = split_names(values["granularity"])
    if "=" in values.get("allocation", ""):
        pairs = [pair.partition("=") for pair in split_names(values["allocation"])]
        values["allocation"] = {name: split_numbers(f"--allocation {name}", value)[0] for name, _, value in pairs}
    if path is None:
        return PruningConfig.from_dict(values)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is no text file: {error}") from error
    return PruningConfig.from_json(text).replace(**values)


def read_modules(text: str) -> str | tuple[str, ...]:
    """Modules as a config takes them: ``re:`` begins a regular expression."""
    if text.startswith("re:"):
        return text.removeprefix("re:")
    return text if text == "all-linear" else split_names(text)


def split_names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name.strip() for name in text.split(","))


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
    """The task that options describe: language modelling, or classification."""
    if of_language:
        return LanguageModelingTask(source, text_column or "text", calibration_split, calibration_samples, window)
    columns = split_names(text_column or "sentence")
    return ClassificationTask(source, columns, label_column, calibration_split, calibration_samples)


def split_numbers(option: str, text: str) -> list[float]:
    """Numbers between commas.

    Raises:
        ConfigError: If one is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}: expected numbers separated by commas, such as 0.3,0.5") from None


def read_workload(text: str) -> dict[str, int]:
    """What ``"32x64"`` spells."""
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit()):
        raise ConfigError(f"--workload is {text!r}: expected the batch size and the number of tokens, such as 32x64")
    return {"batch_size": int(batch), "length": int(length)}
