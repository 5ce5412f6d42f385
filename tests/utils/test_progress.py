"""Progress on a terminal, in a notebook and in a log."""

from __future__ import annotations

import builtins
import io
import itertools
import sys
import time
from types import SimpleNamespace

import pytest

from hf_prune import listen_to_progress
from hf_prune.utils import progress
from hf_prune.utils.progress import Bar, is_interactive, showing_progress, working


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def log(monkeypatch, capsys):
    """What is written where there is no terminal, by a clock that goes on by five seconds whenever one looks at it."""
    clock = itertools.count(0.0, 5.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    return lambda: capsys.readouterr().err


def test_a_log_gets_a_line_every_ten_seconds_with_the_time_left(log):
    list(Bar(range(4), desc="Calibrating", progress=True))
    assert log().splitlines() == [
        "Calibrating: 2 of 4 batches, 00:10 so far, 00:10 left",
        "Calibrating: 4 of 4 batches, 00:20 so far, 00:00 left",
    ]


def test_steps_without_a_total_have_no_time_left(log):
    with Bar(desc="Pruning", unit="weight", progress=True) as bar:
        bar.update(3)
        bar.update(3)
    assert log() == "Pruning: 6 weights, 00:10 so far\n"


def test_nothing_is_shown_in_a_script_unless_asked_for(log):
    list(Bar(range(9), desc="Calibrating"))
    list(Bar(range(9), desc="Calibrating", progress=False))
    with working("Loading"):
        pass
    assert not is_interactive()
    assert log() == ""


def test_the_command_line_and_interactive_sessions_show_it(log, monkeypatch):
    with showing_progress():
        list(Bar(range(2), desc="Scoring"))
        list(Bar(range(9), desc="Silent", progress=False))
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    list(Bar(range(2), desc="Timing", unit="round"))
    assert [line.partition(",")[0] for line in log().splitlines()] == [
        "Scoring: 2 of 2 batches",
        "Timing: 2 of 2 rounds",
    ]


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch):
    terminal = Screen(terminal=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_DELAY", 0)
    for _ in Bar(range(3), desc="Calibrating", progress=True):
        time.sleep(0.11)
    assert "Calibrating:  33%" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


def test_a_notebook_gets_a_bar_although_its_output_is_no_terminal(monkeypatch):
    shell = type("ZMQInteractiveShell", (), {})
    output = Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    monkeypatch.setattr(progress, "_DELAY", 0)
    for _ in Bar(range(3), desc="Calibrating"):
        time.sleep(0.11)
    assert "Calibrating:  33%" in output.getvalue()


def test_work_without_steps_shows_that_it_goes_on(monkeypatch):
    log = Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "_EVERY", 0.5)
    with working("Loading the model", progress=True):
        time.sleep(1.2)
    assert log.getvalue() == "Loading the model: 00:01 so far\n"


def test_listeners_hear_of_every_step():
    heard = []
    with listen_to_progress(lambda *step: heard.append(step)):
        list(Bar("ab", desc="Scoring"))
    assert heard == [("Scoring", 1, 2), ("Scoring", 2, 2)]
