"""Two processes that train together, with DDP and with FSDP2, end where one process with the same batches does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import default_data_collator

from hf_prune import AutoPrunedModelForSequenceClassification, MaskStore
from hf_prune.training.state import STATE_FILE
from tests.integration.distributed.training_worker import CASES
from tests.training.test_trainer import Sentences, still

pytestmark = pytest.mark.distributed
ROOT = str(Path(__file__).parents[3])
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def start(folder, **environment):
    command = [sys.executable, "-m", "tests.integration.distributed.training_worker", str(folder)]
    return subprocess.Popen(
        command,
        env={**ENVIRONMENT, **environment},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of one process, and of two."""
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    running = [start(together, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank in range(2)]
    running.append(start(alone))
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * 3, "\n".join(error[-3000:] for error in errors)
    return alone, together


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["trainer", "by_hand"])
def test_two_processes_end_where_one_does(trained, way, case):
    alone, together = (folder / way / case for folder in trained)
    expected = load_file(alone / "0.safetensors")
    ranks = [load_file(together / f"{rank}.safetensors") for rank in range(2)]
    masks = [name for name in expected if name.startswith("mask ")]
    kept = torch.cat([expected[name].flatten() for name in masks]).float().mean()
    assert 0.2 < kept < 0.6
    assert ranks[0].keys() == ranks[1].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        if name in masks:
            assert torch.equal(ranks[0][name], value), name
        elif (way, case) != ("trainer", "no method"):
            torch.testing.assert_close(ranks[0][name], value, rtol=1e-3, atol=2e-5)
    if (way, case) == ("trainer", "no method"):  # equations, some of whose unknowns hardly matter: these are rounding
        for one, two in zip(hidden_states(expected), hidden_states(ranks[0]), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=2e-5)


def hidden_states(tensors):
    """What every layer returns for the sentences of the training, in a model with these weights."""
    model = still().eval()
    before = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("mask ")})
    assert not all(map(torch.equal, before, model.parameters()))
    data = Sentences()
    with torch.no_grad():
        return model(
            **default_data_collator([data[i] for i in range(len(data))]), output_hidden_states=True
        ).hidden_states


def test_one_process_writes_the_checkpoints(trained):
    for case in CASES:
        files = {path.name for path in (trained[1] / case / "checkpoint-10").iterdir()}
        assert {STATE_FILE, "pruning_masks.safetensors", "model.safetensors", "trainer_state.json"} <= files


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_is_saved_with_its_masks(trained, case):
    model = AutoPrunedModelForSequenceClassification.from_pretrained(trained[1] / "saved" / case)
    expected = load_file(trained[1] / "by_hand" / case / "0.safetensors")
    masks = MaskStore.of(model).masks
    assert masks
    for name, mask in masks.items():
        assert torch.equal(mask, expected[f"mask {name}"].bool())
        assert torch.equal(model.get_parameter(name).detach(), expected[name])
