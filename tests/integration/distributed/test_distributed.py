"""Two processes that calibrate together find what one finds, and none waits for one that failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.integration.distributed.distributed_worker import SAME

pytestmark = pytest.mark.distributed
ROOT = str(Path(__file__).parents[3])
# Gloo looks for an address of its own, which a machine without a network does not have.
ENVIRONMENT = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes says about every case."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "tests.integration.distributed.distributed_worker"]
    running = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder)], env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [*SAME, "another opinion"])
def test_masks_and_weights_are_those_of_one_process(said, case):
    """Bit for bit; also where the processes compute different masks from the same statistics."""
    assert [one[case] for one in said] == [[], []]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("in a batch", "out of luck"),
        ("in a gradient", "out of luck"),
        ("in an example", "out of luck"),
        ("in an update", "out of luck"),
        ("in a layer", "out of luck"),
        ("in the iterable", "the reader broke"),
        (
            "no batches",
            "criterion 'snip' needs calibration data, and got none: pass calibration=, a list of texts, a "
            "datasets.Dataset, a DataLoader or batches (dicts with the model's inputs and labels)",
        ),
    ],
)
def test_an_error_in_one_process_is_one_in_both(said, case, message):
    """The worker has made sure that the models are as they were."""
    other = "1 of 2 processes failed, so all of them stop and nothing was changed: see their messages"
    assert [one[case] for one in said] == [other, message]


def test_different_batches_are_refused(said):
    message = "the 2 processes have different calibration batches (5, 3 of them): pass the same list in all "
    assert all(one["other batches"].startswith(message) for one in said)
    assert all(one["empty"].startswith("calibration has no batches") for one in said)


def test_a_polish_is_the_same_in_all(said):
    """Each process trains on its share, a batch a step; the weights are those of all of them."""
    assert said[0]["polish"] == said[1]["polish"]
    assert said[0]["polished"] == said[1]["polished"]
    assert said[0]["polished"][1] < said[0]["polished"][0]
    assert said[0]["polished"][2:] == [2 * 2, True]  # two processes, five batches, one of them held out


def test_without_calibration_nobody_waits(said):
    assert said[1]["magnitude"] == 16


def test_one_process_initialises_nothing():
    code = """
    import sys, torch
    from hf_prune import prune
    from tests import models
    model = models.tiny_bert()
    prune(model, criterion="wanda", calibration=models.tiny_batches(model))
    assert not torch.distributed.is_initialized()
    assert "hf_prune.utils.distributed" in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=ENVIRONMENT, cwd=ROOT, check=True, timeout=100)
