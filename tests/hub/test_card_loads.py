"""The first block of code on a card is what loads that checkpoint, where hf_prune was not imported before."""

import re

import pytest

from tests import models
from tests.support.command_line import exit_code

#: How each is made: the options of prune, and whether it is then packed; and whether it needs hf_prune to load.
KINDS = {
    "masked": (["--sparsity", "0.5"], False, False),
    "uniform": (["--sparsity", "0.5", "--granularity", "neuron", "--scope", "layer"], False, False),
    "ragged": (["--sparsity", "0.5", "--granularity", "head,neuron", "--scope", "global"], False, True),
    "packed": (["--sparsity", "0.5"], True, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_block_of_a_card_loads_it(kind, tmp_path, fresh_process):
    models.save_classifier_and_data(tmp_path, seed=4)
    options, packs, needs = KINDS[kind]
    commands = [["prune", tmp_path / "dense", *options, "--out", tmp_path / "out"]]
    if packs:
        commands.append(["compress", tmp_path / "out", tmp_path / "packed"])
    for words in commands:
        assert exit_code(*words) == 0
    card = (tmp_path / ("packed" if packs else "out") / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert ("import hf_prune" in block[1]) == needs
    begin = "import sys\nassert 'hf_prune' not in sys.modules\n"
    done = fresh_process.run(f"{begin}{block[1]}\nprint('loaded', type(model).__name__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "loaded" in done.stdout
    assert "newly initialized" not in done.stderr
