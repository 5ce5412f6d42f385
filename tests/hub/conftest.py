"""What tests of cards share."""

import pytest

from hf_prune.cli.main import main


@pytest.fixture
def run(capsys):
    """Run the command line; returns what it printed. A code of None is any."""

    def run(*words, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code is None or (ended.value.code or 0) == code, err
        return out if not code or out else err

    return run
