"""The command line in two processes, as ``torchrun`` and ``accelerate launch`` start it: the masks of one process."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.cli.main import main
from tests import models
from tests.integration.distributed.test_distributed import ENVIRONMENT, ROOT

pytestmark = pytest.mark.distributed
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0", "-m"],
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> tuple[Path, Path]:
    """A folder with a causal language model, and a file of texts."""
    folder = tmp_path_factory.mktemp("launched")
    models.tiny_llama().save_pretrained(folder / "dense")
    models.tiny_tokenizer().save_pretrained(folder / "dense")
    words = models.tiny_tokenizer().get_vocab()
    plain = sorted(word for word in words if not word.startswith("["))
    lines = [" ".join(plain[(7 * row + place) % len(plain)] for place in range(10)) for row in range(30)]
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder / "dense", folder / "texts.txt"


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("torchrun", ["--criterion", "taylor"]),
        ("accelerate", ["--criterion", "sparsegpt", "--objective", "loss", "--allocation", "fisher"]),
    ],
)
def test_two_processes_write_what_one_writes(launcher, settings, language_model, tmp_path):
    dense, texts = language_model
    arguments = ["prune", str(dense), "--sparsity", "0.5", *settings, "--data", str(texts)]
    arguments += ["--window", "8", "--calibration-samples", "11"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path / "one")])
    assert ended.value.code == 0
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "hf_prune", *arguments, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert filecmp.cmp(tmp_path / "one" / MASK_FILE, tmp_path / "two" / MASK_FILE, shallow=False)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
