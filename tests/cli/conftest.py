"""What tests of several commands share."""

import pytest

from tests.support.command_line import run_command


@pytest.fixture
def hf_prune(capsys):
    """Run the command line; returns what it printed, to stderr if it was to fail with a code."""

    def run(*arguments, code=0):
        done = run_command(capsys, *arguments)
        assert done.code == code, done.err
        return done.err if code else done.out

    return run
