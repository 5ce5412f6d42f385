"""Run the command line in this process."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from hf_prune.cli.main import main


class Done(NamedTuple):
    """How a command ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def exit_code(*words: object) -> int:
    """Run a command as the console script does; returns its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def run_command(capsys: Any, *words: object) -> Done:
    """Run a command and catch what it prints."""
    capsys.readouterr()
    return Done(exit_code(*words), *capsys.readouterr())
