"""One of several processes that calibrate together; ``test_distributed.py`` starts them and reads what they say.

Each first prunes by itself, then in company, and writes per case whether the two agree in every bit, or the error.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn

from hf_prune import prune
from hf_prune.calibration import batch_runner, gradients
from hf_prune.criteria.fisher import Fisher
from hf_prune.errors import CalibrationError
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.pruning import compute_masks as scoring
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.models import same_bits, snapshot, tiny_batches

SIZES = (3, 2, 4, 1, 2)  # examples per batch: not as many batches for each process


class Skips(nn.Module):
    """The last block sees the output of the first one too: finished blocks must not be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, labels=None):
        """(batch, 8) -> (batch, 8)."""
        first = torch.tanh(self.blocks[0](x))
        return self.blocks[3](torch.tanh(self.blocks[2](torch.tanh(self.blocks[1](first)))) + 2 * first)


def skips() -> nn.Module:
    """Weights large enough that a replayed block would be noticed."""
    model = models.fill(Skips())
    for parameter in model.parameters():
        parameter.data.mul_(10)
    return model


MODELS: dict[str, Callable[[], Any]] = {**models.TRANSFORMERS, "moe": models.tiny_moe, "skips": skips}
UNITS = {"granularity": ("head", "neuron"), "scope": "global"}
SAME: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    f"{kind} {settings}": (kind, sizes, settings)
    for kind, sizes, settings in [
        *(
            ("bert", SIZES, {"criterion": criterion, "calibration_order": order})
            for criterion in ("wanda", "sparsegpt", "alps", "taylor", "snip")
            for order in ("sequential", "one_pass")
        ),
        ("bert", (3,), {"criterion": "alps", "granularity": "2:4"}),  # fewer batches than processes
        ("bert", SIZES, {"criterion": "taylor", "repair": "least_squares"}),
        ("bert", SIZES, {"criterion": "wanda", "scope": "row"}),
        ("gpt2", SIZES, {"criterion": "sparsegpt", "granularity": "block:2x2"}),
        ("llama", SIZES, {"criterion": "alps"}),
        ("t5", SIZES, {"repair": "least_squares"}),
        ("albert", SIZES, {"criterion": "wanda"}),
        ("moe", SIZES, {"criterion": "sparsegpt"}),
        ("moe", (2,), {"criterion": "alps", "calibration_order": "one_pass"}),
        ("skips", SIZES, {"criterion": "alps"}),
        ("bert", SIZES, {"criterion": "fisher"}),
        ("bert", SIZES, {"criterion": "fisher", "scope": "global", "steps": 3}),
        ("gpt2", (3,), {"criterion": "fisher", "granularity": "block:2x2", "scope": "row"}),
        ("bert", SIZES, {"criterion": "fisher_diagonal", "steps": 2}),
        ("bert", SIZES, {"criterion": "alps", "objective": "loss", "allocation": "fisher"}),
        ("gpt2", SIZES, {"criterion": "sparsegpt", "objective": "loss", "repair": "least_squares"}),
        ("llama", (3,), {"criterion": "wanda", "objective": "loss", "allocation": "owl"}),
        ("moe", SIZES, {"criterion": "sparsegpt", "objective": "loss"}),
        ("skips", SIZES, {"criterion": "alps", "objective": "loss"}),
        ("bert", SIZES, {**UNITS, "criterion": "fisher", "repair": "least_squares"}),
        ("llama", SIZES, {**UNITS, "criterion": "reconstruction", "repair": "least_squares"}),
        ("gpt2", (3,), {"granularity": ("layer",), "scope": "global", "criterion": "fisher"}),
    ]
}


def pruned(kind: str, sizes: tuple[int, ...], settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights and masks by name."""
    model, batches = MODELS[kind](), tiny_batches(MODELS[kind](), sizes=sizes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration")  # experts that see few tokens, or none
        prune(model, calibration=batches, **settings)
    store = MaskStore.of(model)
    assert store is not None
    return {**snapshot(model), **{f"mask of {name}": mask for name, mask in store.masks.items()}}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """What is not the same in both."""
    return [name for name in one.keys() | other.keys() if not same_bits(one[name], other[name])]


@contextlib.contextmanager
def failing(rank: int, owner: object, name: str, after: int) -> Iterator[None]:
    """In the second process, a function raises once it has been called that often."""
    calls, function = [0], getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if rank == 1 and calls[0] > after:
            raise CalibrationError("out of luck")
        return function(*args, **kwargs)

    with mock.patch.object(owner, name, fail):
        yield


def message(prune_it: Callable[[nn.Module], object]) -> str:
    """What an attempt says that must leave the model alone."""
    model = models.tiny_bert()
    before = snapshot(model)
    try:
        prune_it(model)
    except CalibrationError as error:
        assert not differing(before, snapshot(model))
        assert MaskStore.of(model) is None
        return str(error)
    return "no error"


def main(rank: int, size: int, folder: str) -> None:
    """Run every case and write ``RANK.json``."""
    torch.set_num_threads(1)
    alone = {case: pruned(*arguments) for case, arguments in SAME.items()}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found: dict[str, object] = {case: differing(alone[case], pruned(*SAME[case])) for case in SAME}
    batches = tiny_batches(models.tiny_bert(), sizes=SIZES)
    with failing(rank, batch_runner, "batch_to_device", 12):
        found["in a batch"] = message(lambda m: prune(m, criterion="alps", calibration=batches))
    with failing(rank, gradients, "_loss_gradients", 1):
        found["in a gradient"] = message(lambda m: prune(m, criterion="taylor", calibration=batches))
    with failing(rank, gradients, "example_loss", 2):
        found["in an example"] = message(lambda m: prune(m, criterion="fisher", calibration=batches))
    with failing(rank, Fisher, "update", 3):
        found["in an update"] = message(lambda m: prune(m, criterion="fisher", calibration=batches))
    with failing(rank, scoring, "compute_masks", 3):
        found["in a layer"] = message(lambda m: prune(m, criterion="wanda", calibration=batches))
    mine = batches if rank == 0 else batches[:3]
    found["other batches"] = message(lambda m: prune(m, criterion="wanda", calibration=mine))
    none = batches if rank == 0 else None
    found["no batches"] = message(lambda m: prune(m, criterion="snip", calibration=none))
    found["empty"] = message(lambda m: prune(m, criterion="snip", calibration=[]))

    def broken():
        yield batches[0]
        if rank == 1:
            raise CalibrationError("the reader broke")

    found["in the iterable"] = message(lambda m: prune(m, criterion="wanda", calibration=broken()))

    model = models.tiny_bert()
    compute = scoring.compute_masks

    def opinion(*arguments: Any, **keywords: Any) -> tuple[PackedMasks, dict[str, torch.Tensor]]:
        masks, weights = compute(*arguments, **keywords)
        return PackedMasks({name: mask ^ (rank == 1) for name, mask in masks.items()}), weights

    with mock.patch.object(scoring, "compute_masks", opinion):
        prune(model, criterion="wanda", calibration=batches)
    with mock.patch.object(dist, "is_initialized", return_value=False):
        expected = prune(models.tiny_bert(), criterion="wanda", calibration=batches)
    found["another opinion"] = differing(snapshot(expected), snapshot(model))
    model = prune(
        models.tiny_bert(), criterion="wanda", calibration=batches, polish={"epochs": 2, "learning_rate": 1e-3}
    )
    store = MaskStore.of(model)
    assert store is not None
    found["polish"] = [zlib.crc32(p.detach().numpy().tobytes()) for p in model.parameters()]
    (record,) = store.polishes
    found["polished"] = [record.before, record.after, record.steps, record.kept]
    if rank == 1:  # without calibration, nobody waits
        found["magnitude"] = int((prune(models.tiny_bert(), 0.5).classifier.weight == 0).sum())
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
