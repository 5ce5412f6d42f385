"""The command line app that commands belong to."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from hf_prune import __version__
from hf_prune.cli.options import (
    Command,
    echo,
    show_notices,
)

app = typer.Typer(
    name="hf-prune",
    help="Prune Hugging Face models, see what it costs and what it brings, and save the result.",
    epilog="Start with: hf-prune demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
command = functools.partial(app.command, cls=Command)


def _version(asked: bool) -> None:
    if asked:
        echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Prune Hugging Face models, see what it costs and what it brings, and save the result."""
    show_notices()
