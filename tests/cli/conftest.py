"""What tests of several commands share."""

import pytest

from hf_prune.cli.main import main


@pytest.fixture
def hf_prune(capsys):
    """Run the command line; returns what it printed, to stderr if it was to fail with a code."""

    def run(*arguments, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert int(exit_.value.code or 0) == code, err
        return err if code else out

    return run
