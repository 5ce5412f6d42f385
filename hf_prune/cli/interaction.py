"""What several commands say while they run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer

from hf_prune.cli.options import (
    echo,
)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """What is measured is on disk: say so when the user interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        echo("\nInterrupted. The same command continues where it was.", err=True)
        raise typer.Exit(130) from None


def say_if_continuing(out: Path, restart: bool) -> None:
    """Tell the user that an earlier run is continued."""
    if (out / "results.json").exists() and not restart:
        echo(f"Continuing with what {out} has; --restart measures everything anew.", err=True)


def sweep_files(out: Path) -> str:
    """One line that names the files of a sweep."""
    return "Saved: " + ", ".join(str(out / name) for name in ("results.json", "results.csv", "tradeoff.png"))
