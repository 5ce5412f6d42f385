"""Calibration in several processes: each one runs its share of the batches, and the statistics are summed.

In a single process these functions do nothing. None of them starts a process group: the script that starts the
processes does (``accelerate.PartialState()``, ``torch.distributed.init_process_group``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from hf_prune.errors import CalibrationError
from hf_prune.utils.digests import batches_digest

Item = TypeVar("Item")


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of processes; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_main_process() -> bool:
    """Whether this process has rank 0, and so prints and writes."""
    return rank_and_world_size()[0] == 0


def rank_items(items: Iterable[Item]) -> Iterable[Item]:
    """The share of this process in a list that all processes have: every n-th item, possibly none."""
    rank, size = rank_and_world_size()
    return items if size == 1 else list(items)[rank::size]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, with the same bits in each; may change the tensor in place."""
    if rank_and_world_size()[1] == 1:
        return tensor
    shared = _on_backend_device(tensor)
    dist.all_reduce(shared)
    return shared.to(tensor.device)


def broadcast(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, bit for bit; every process passes a tensor of the same shape and dtype."""
    if rank_and_world_size()[1] == 1:
        return tensor
    shared = _on_backend_device(tensor).contiguous()
    dist.broadcast(shared.view(-1).view(torch.uint8), 0)
    return shared.to(tensor.device)


@contextmanager
def fail_together() -> Iterator[None]:
    """Make the block fail in every process if it fails in one, so that none waits forever for another.

    The block itself must not communicate between processes.

    Raises:
        CalibrationError: In a process that succeeded, if another one failed.
    """
    failed = 1
    try:
        yield
        failed = 0
    except Exception:
        all_reduce_sum(torch.tensor(failed))
        raise
    if failures := int(all_reduce_sum(torch.tensor(failed))):
        raise CalibrationError(
            f"{failures} of {rank_and_world_size()[1]} processes failed, so all of them stop and nothing was changed: "
            "see their messages"
        )


def check_same_batches(batches: Iterable[Any]) -> None:
    """Make sure that all processes have the same batches.

    Raises:
        CalibrationError: If they do not.
    """
    rank, size = rank_and_world_size()
    if size == 1:
        return
    own = list(batches)
    counts_and_digests = torch.zeros(size, 2, dtype=torch.int64)
    counts_and_digests[rank] = torch.tensor([len(own), int(batches_digest(own)[:15], 16)])
    counts_and_digests = all_reduce_sum(counts_and_digests)
    if bool((counts_and_digests != counts_and_digests[0]).any()):
        counts = ", ".join(map(str, counts_and_digests[:, 0].tolist()))
        raise CalibrationError(
            f"the {size} processes have different calibration batches ({counts} of them): pass the same list in all "
            f"processes; each takes its own share, so do not use a sampler or a prepared loader that splits them"
        )


def _on_backend_device(tensor: Tensor) -> Tensor:
    """The tensor on a device from which the backend can send it: NCCL needs a GPU."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor
