"""Calibration in several processes: each runs its share of the batches, and what they find is added up.

Everything here does nothing in a single process, and nothing here starts a process group: that is for whoever starts
the processes (``accelerate.PartialState()``, ``torch.distributed.init_process_group``).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from hf_prune.errors import CalibrationError

Item = TypeVar("Item")


def rank_and_world_size() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank_and_world_size()[0] == 0


def rank_items(items: Iterable[Item]) -> Iterable[Item]:
    """What this process does of a list that all have: every n-th item, perhaps none; all of it in a single process."""
    rank, size = rank_and_world_size()
    return items if size == 1 else list(items)[rank::size]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each; the tensor itself may be changed."""
    if rank_and_world_size()[1] == 1:
        return tensor
    moved = _reachable(tensor)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def broadcast(tensor: Tensor) -> Tensor:
    """What the first process has, bit for bit; every process has a tensor of that shape and dtype."""
    if rank_and_world_size()[1] == 1:
        return tensor
    moved = _reachable(tensor).contiguous()
    dist.broadcast(moved.view(-1).view(torch.uint8), 0)
    return moved.to(tensor.device)


@contextmanager
def fail_together() -> Iterator[None]:
    """What is done inside succeeds in every process, or fails in every process, so that none waits for another.

    Inside, processes must not wait for one another.

    Raises:
        CalibrationError: Where this process succeeded and another one failed.
    """
    failed = 1
    try:
        yield
        failed = 0
    except Exception:
        all_reduce_sum(torch.tensor(failed))
        raise
    if others := int(all_reduce_sum(torch.tensor(failed))):
        raise CalibrationError(
            f"{others} of {rank_and_world_size()[1]} processes failed, and so all stop: nothing was changed; "
            "see what they said"
        )


def check_same_batches(batches: Iterable[Any]) -> None:
    """Make sure that all processes have the same batches.

    Raises:
        CalibrationError: If they have not.
    """
    rank, size = rank_and_world_size()
    if size == 1:
        return
    every = list(batches)
    found = torch.zeros(size, 2, dtype=torch.int64)
    found[rank] = torch.tensor([len(every), _checksum(every)])
    found = all_reduce_sum(found)
    if bool((found != found[0]).any()):
        raise CalibrationError(
            f"the {size} processes have different calibration batches ({', '.join(map(str, found[:, 0].tolist()))} of "
            f"them): pass the same list in all of them; each takes its own share, so give no sampler or prepared "
            f"loader that splits them"
        )


def _checksum(batches: Iterable[Any]) -> int:
    total = 0
    for batch in batches:
        pairs = sorted(batch.items()) if isinstance(batch, Mapping) else [("", batch)]
        for name, value in pairs:
            known = (name, value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else (name, type(value))
            total = zlib.crc32(str(known).encode(), total)
            if isinstance(value, Tensor):
                total = zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, total)
    return total


def _reachable(tensor: Tensor) -> Tensor:
    """The tensor where the processes can exchange it: NCCL knows GPUs only."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
