"""What commands print, besides results of their own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import typer

from hf_prune.utils.formatting import printable


def echo(message: object = "", *, err: bool = False) -> None:
    """Print a line, with control characters escaped: names and texts from elsewhere cannot control the terminal.

    Args:
        message: What to print.
        err: Print to standard error.
    """
    typer.echo(printable(str(message)), err=err)


class _Notices(logging.Handler):
    """Prints notices of the library: to stderr where results are JSON."""

    err = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        echo(self.format(record), err=self.err)


_NOTICES = _Notices()


def show_notices(as_json: bool = False) -> bool:
    """Print notices of the library, such as which files were replaced or not copied.

    Args:
        as_json: Whether results are printed as JSON; notices then go to stderr.

    Returns:
        ``as_json``, as a callback of the option has to.
    """
    _NOTICES.err = as_json
    logging.getLogger("hf_prune").addHandler(_NOTICES)  # adding it again changes nothing
    return as_json


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Where results so far are on disk: tell a user who interrupts that the command can be resumed."""
    try:
        yield
    except KeyboardInterrupt:
        echo("\nInterrupted. The same command continues where it was.", err=True)
        raise typer.Exit(130) from None


def say_if_continuing(out: Path, restart: bool) -> None:
    """Tell the user that an earlier run is continued."""
    if (out / "results.json").exists() and not restart:
        echo(f"Continuing with what {out} has; --restart measures everything again.", err=True)


def sweep_files(out: Path) -> str:
    """One line that names the files of a sweep."""
    return "Saved: " + ", ".join(str(out / name) for name in ("results.json", "results.csv", "tradeoff.png"))
