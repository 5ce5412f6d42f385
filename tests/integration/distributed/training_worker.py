"""One of several processes that train together; ``test_trainer.py`` starts them.

``python -m tests.integration.distributed.training_worker FOLDER`` trains in every case and writes
weights and masks, which are read there.
accelerate has no FSDP on a CPU: there the model is sharded by hand, and the steps are those of the Trainer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from hf_prune import Distillation, MaskStore, PruningConfig, PruningTrainer, Schedule, prunable
from hf_prune.errors import CheckpointError
from hf_prune.training.pruner import TrainingPruner
from hf_prune.training.run_record import _digest, model_facts
from hf_prune.training.state import check_same_run
from tests.training.test_trainer import Sentences, arguments, still

BATCH, STEPS = 8, 10
SCHEDULE = Schedule("cubic", begin=2, end=8, every=2)
TARGETS = {"target_modules": ("query", "dense"), "sparsity": 0.75}
CASES = {
    "magnitude": {"schedule": SCHEDULE, "criterion": "magnitude"},
    "2:4": {"schedule": SCHEDULE, "criterion": "magnitude", "granularity": "2:4", "sparsity": None},
    "no method": {"schedule": SCHEDULE},
    "movement": {"schedule": SCHEDULE, "criterion": "movement"},
    "taylor": {"schedule": SCHEDULE, "criterion": "taylor", "scope": "global"},
    "rigl": {"schedule": Schedule("rigl", begin=0, end=8, every=2)},
}


def config(case: str) -> PruningConfig:
    """The settings of a case."""
    return PruningConfig(**{**TARGETS, **CASES[case]})


def by_trainer(case: str, folder: Path, teacher: bool) -> torch.nn.Module:
    """PruningTrainer, which accelerate wraps with DDP where there are several processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    more = {"teacher": still(seed=9), "distillation": Distillation(hidden=0.5)} if teacher else {}
    run = PruningTrainer(
        model=still(),
        args=arguments(
            folder / case,
            per_device_train_batch_size=BATCH // size // 2,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            optim="sgd",
            learning_rate=0.02 if case == "no method" else 0.2,  # equations are solved: large steps magnify rounding
            save_strategy="steps",
            save_steps=5,
        ),
        train_dataset=Sentences(),
        pruning_config=config(case),
        **more,
    )
    run.train()
    return run.model


def by_hand(case: str, sharded: bool, folder: Path | None) -> torch.nn.Module:
    """The steps of the Trainer on a model that FSDP2 has sharded, or on a whole one."""
    model = still().train()
    rank, size = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    if sharded:
        mesh = dist.init_device_mesh("cpu", (size,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner = TrainingPruner(model, config(case), STEPS)
    if SCHEDULE.is_due(0, STEPS) or case == "rigl":
        pruner.after_step(0)
    data = Sentences()
    for step in range(1, STEPS + 1):
        first = step * BATCH % len(data)
        rows = [data[(first + i) % len(data)] for i in range(rank, BATCH, size)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        model(**batch).loss.backward()
        pruner.after_backward(step)
        optimizer.step()
        pruner.after_step(step)
        optimizer.zero_grad()
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    if sharded:
        check_weights_are_told(model, whole)
    if folder is not None:  # as the Trainer saves a sharded model: from its whole state
        prunable(model).save_pretrained(folder, state_dict={n: p.detach().clone() for n, p in whole.items()})
    state = pruner.state()
    pruner.restore(state, MaskStore.of(model))
    assert all(torch.equal(value, state[name]) for name, value in pruner.state().items())
    return model


def check_weights_are_told(model: torch.nn.Module, whole: dict[str, torch.Tensor]) -> None:
    """A training knows sharded weights as those of a whole model, in each process, and notices others."""
    plain, now = still(), json.loads(json.dumps(model_facts(model)))
    plain.load_state_dict({name: weight.detach() for name, weight in whole.items()}, strict=False)
    reached = {"weights": _digest(dict(plain.named_parameters()))}
    assert now["weights"] == reached["weights"]
    check_same_run(Path(), {"run": {**now, "weights": "0"}, "weights_now": reached}, now)
    first = next(model.parameters())
    with torch.no_grad():
        first.mul_(-1)  # each process its part
        with pytest.raises(CheckpointError, match="weights was"):
            check_same_run(Path(), {"run": now, "weights_now": reached}, model_facts(model))
        first.mul_(-1)


def save(model: torch.nn.Module, path: Path) -> None:
    """Whole weights and masks."""
    masks = {f"mask {name}": mask.to(torch.uint8) for name, mask in MaskStore.of(model).masks.items()}
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**{n: w.detach().contiguous().clone() for n, w in weights.items()}, **masks}, path)


def main(folder: Path) -> None:
    """Train in every case."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = os.environ.get("RANK", "0")
    for case in CASES:
        save(by_trainer(case, folder, teacher=case == "magnitude"), folder / "trainer" / case / f"{rank}.safetensors")
    for case in CASES:
        writes = folder / "saved" / case if rank == "0" else None
        save(by_hand(case, together, writes), folder / "by_hand" / case / f"{rank}.safetensors")
    if together:
        dist.barrier()
        dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # torch's own threads (gloo, autograd) sometimes abort while the interpreter goes down; all is written


if __name__ == "__main__":
    main(Path(sys.argv[1]))
