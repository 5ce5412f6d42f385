"""What commands print, besides results of their own."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from hf_prune.errors import ConfigError, DataError
from hf_prune.utils.formatting import printable
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.progress import without_bars


def echo(message: object = "", *, err: bool = False) -> None:
    """Print a line, with control characters escaped: names and texts from elsewhere cannot control the terminal.

    Args:
        message: What to print.
        err: Print to standard error.
    """
    typer.echo(printable(str(message)), err=err)


def note(message: object) -> None:
    """Print what is worth knowing beside a result to standard error, unless the user wants results and errors only."""
    if not is_quiet():
        echo(f"note: {message}", err=True)


_LOG = logging.getLogger("hf_prune")


def show(result: Any, as_json: bool, *lines: str) -> None:
    """Print a result: as JSON for programs and nothing else, or as text.

    Args:
        result: Has ``to_dict()`` and a text of its own, or is a dict of plain values.
        as_json: Print JSON.
        *lines: Printed after the text.
    """
    if as_json:
        echo(json.dumps(result if isinstance(result, dict) else result.to_dict(), indent=2))
    else:
        echo("\n".join([str(result), *lines]))


class _Notices(logging.Handler):
    """Prints notices of the library: to stderr where results are JSON."""

    err = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        echo(self.format(record), err=self.err)


_NOTICES = _Notices()
_CHOSEN = {"verbose": False, "quiet": False}


def is_verbose() -> bool:
    """Whether the user wants to see what libraries log."""
    return _CHOSEN["verbose"]


def is_quiet() -> bool:
    """Whether the user wants to see results and errors only."""
    return _CHOSEN["quiet"]


@contextlib.contextmanager
def verbosity(verbose: bool, quiet: bool) -> Iterator[None]:
    """Print more or less than usual within this context.

    Raises:
        ConfigError: If both are asked for.
    """
    if verbose and quiet:
        raise ConfigError("--verbose and --quiet contradict each other: leave one out")
    before, level = dict(_CHOSEN), _LOG.level
    _CHOSEN.update(verbose=verbose, quiet=quiet)
    _LOG.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else level)
    try:
        with without_bars() if quiet else contextlib.nullcontext():
            yield
    finally:
        _CHOSEN.update(before)
        _LOG.setLevel(level)


def prints_json(arguments: Sequence[str]) -> bool:
    """Whether the results of a command line are JSON, be it that the line says so or its ``--config``."""
    return _NOTICES.err or "--json" in arguments


def show_notices(as_json: bool = False) -> bool:
    """Print notices of the library, such as which files were replaced or not copied.

    Args:
        as_json: Whether results are printed as JSON; notices then go to stderr.

    Returns:
        ``as_json``, as a callback of the option has to.
    """
    _NOTICES.err = as_json
    _LOG.addHandler(_NOTICES)  # adding it again changes nothing
    return as_json


@contextlib.contextmanager
def resumable(kept: str) -> Iterator[None]:
    """Where results so far are on disk: tell a user who interrupts what was kept, and that the command can be resumed.

    Args:
        kept: What was kept, such as ``"The scores so far are in OUT"``.
    """
    try:
        yield
    except KeyboardInterrupt:
        echo(f"\nInterrupted. {kept}; the same command continues where it was.", err=True)
        raise typer.Exit(130) from None


def say_if_continuing(out: Path, restart: bool, key: str) -> None:
    """Tell the user that an earlier run is continued.

    Args:
        out: Its folder.
        restart: Whether everything is measured again.
        key: What ``results.json`` of such a run has besides its points.
    """
    try:
        values = {} if restart else read_json_object(out / "results.json", DataError)
    except (DataError, OSError):  # none, or of something else: refused, or replaced, by who writes it
        return
    if isinstance(values.get("points"), list) and key in values:
        echo(f"Continuing with what {out} has; --restart measures everything again.", err=True)
