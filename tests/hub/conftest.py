"""What tests of cards share."""

import pytest

from tests.support.command_line import run_command


@pytest.fixture
def run(capsys):
    """Run the command line; returns what it printed. A code of None is any."""

    def run(*words, code=0):
        done = run_command(capsys, *words)
        assert code in (None, done.code), done.err
        return done.out if not code or done.out else done.err

    return run
