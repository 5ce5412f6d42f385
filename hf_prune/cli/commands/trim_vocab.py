"""hf-prune trim-vocab: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.model_options import MACHINE, SOURCE, UNSEEDED, loads_model
from hf_prune.cli.options import AnyText, AsJson, Model, Overwrite, split_names
from hf_prune.cli.startup import start
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.sources import check_text_source


@loads_model(SOURCE, MACHINE, UNSEEDED)
def trim_vocab(
    model: Model,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            help="A text or table file, a folder with such files, or a Hub data set: texts as the model will see them. "
            "Can be given several times.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Splits of folders and data sets, separated by commas.")] = "train",
    text_column: AnyText = None,
    keep_tokens: Annotated[
        Path | None, typer.Option(help="File with one token per line, as the tokenizer spells it: these stay.")
    ] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Also remove tokens that are used less often.")] = 1,
    round_to: Annotated[int, typer.Option(min=1, help="Make the number of tokens a multiple of this.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Folder for the smaller checkpoint.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be left, and write nothing.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Remove embedding rows that no text uses, and rebuild the tokenizer to match."""
    if out is None and not dry_run:
        raise ConfigError("no --out: name the folder for the smaller checkpoint, or pass --dry-run to see the numbers")
    if not texts and keep_tokens is None:
        raise ConfigError("neither --texts nor --keep-tokens: name texts of the kind that the model will see")
    start([model])
    for source in texts or []:
        check_text_source(source)
    keep = [] if keep_tokens is None else _read_lines(keep_tokens)
    from hf_prune.cli.workflows.trim_vocab import read_corpus, trim_checkpoint

    columns = None if text_column is None else split_names(text_column)
    corpus = read_corpus(texts, split_names(split), columns) if texts else None
    target = None if dry_run else out
    result = trim_checkpoint(
        model, target, corpus, keep=keep, min_count=min_count, round_to=round_to, overwrite=overwrite
    )
    saved = "Nothing was written." if dry_run else f"Saved in {out}."
    echo(json.dumps(result.to_dict(), indent=2) if as_json else f"{result}\n{saved}")


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except UnicodeDecodeError as error:
        raise DataError(f"--keep-tokens {path} is not a text file: {error}") from error
