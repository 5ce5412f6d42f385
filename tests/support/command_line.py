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


def run_command(capsys: Any, *words: object) -> Done:
    """Run a command as the console script does."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return Done(int(ended.value.code or 0), *capsys.readouterr())
