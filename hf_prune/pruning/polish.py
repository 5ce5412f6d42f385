"""Polish: a short distillation from the dense model after pruning, on unlabelled calibration batches.

This is training, and is reported as such. The masks stay as they are. The outputs of the dense model, its logits and
the hidden states between blocks, are recorded before it is pruned, so that no second model is held; the pruned model
is then trained to reproduce them (Hinton et al. 2015, arXiv:1503.02531; hidden states as in Jiao et al. 2020,
arXiv:1909.10351). No labels are used.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.dense_outputs import DenseOutputs
from hf_prune.errors import CalibrationError
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.pruning.records import PolishRecord
from hf_prune.pruning.run import CalibrationRun
from hf_prune.pruning.transaction import Transaction
from hf_prune.utils.distributed import all_reduce_sum, broadcast, fail_together, rank_and_world_size
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar

_WARMUP = 0.1  # share of the steps in which the learning rate rises
_BETAS = (0.9, 0.98)
_CLIP = 1.0  # largest norm of a gradient
_HELD_OUT = 15  # one batch in so many; an odd number, so that two processes share them
_CHECKS = 4  # looks at the held-out batches while training; the best weights are kept


def polish(run: CalibrationRun[Any], teacher: DenseOutputs, change: Transaction) -> PolishRecord:
    """Train a pruned model, in place, to return what the dense one did; removed weights stay zero.

    See :func:`trainable` for what is trained: with AdamW in float32 (products in bfloat16
    where the processor has instructions for them), a learning rate that rises and then falls linearly to zero, and
    without dropout. One batch in fifteen is held out, and looked at four times: the weights that are closest to the
    dense model there are kept, which may be those from before.

    Args:
        run: The model; the ``polish`` of its config says for how many epochs and with which learning rate, the ``seed``
            in which order.
        teacher: The outputs of the dense model.
        change: Has written the pruned weights, and copies every parameter before it changes.

    Returns:
        What was done.

    Raises:
        CalibrationError: If the distance becomes infinite or NaN.
    """
    model, config, masks, dense = run.model, run.plan.config, change.masks, teacher
    assert isinstance(config.polish, Mapping)
    start = time.perf_counter()
    epochs, rate = int(config.polish["epochs"]), config.polish["learning_rate"]
    held = held_out(len(dense.batches))
    used = [index for index in range(len(dense.batches)) if index not in held]
    order = _order(used, epochs, config.seed)
    checks = {round((i + 1) * len(order) / _CHECKS) for i in range(_CHECKS)}
    best_weights = OffloadCache(0)
    best_step = 0

    def keep(step: int) -> None:
        nonlocal best_step
        best_step = step
        for name, parameter in dense.trained.items():
            best_weights.put(name, parameter.detach())

    try:
        for name in dense.trained:
            change.save(name)
        with dense.running(), _training(model, dense.trained):
            before = best = after = _distance(dense, held)
            keep(0)
            for step in _train(masks, dense, order, rate, run.progress):
                if step in checks:
                    after = _distance(dense, held)
                    if after < best:
                        best = after
                        keep(step)
        with torch.no_grad():
            for name, parameter in dense.trained.items():
                if best_step != len(order):
                    parameter.copy_(best_weights.get(name))
                parameter.copy_(broadcast(parameter.detach()))
    finally:
        best_weights.close()
    batches = [dense.batches[index] for index in used]
    return PolishRecord(
        steps=len(order),
        epochs=epochs,
        examples=sum(map(_examples, batches)),
        tokens=sum(map(_tokens, batches)),
        trained=sum(int(masks[n].count_nonzero()) if n in masks else p.numel() for n, p in dense.trained.items()),
        seconds=round(dense.seconds + time.perf_counter() - start, 1),
        before=before,
        after=best if best_step else after,
        kept=best_step > 0,
    )


def held_out(batches: int) -> range:
    """Numbers of the batches that are not trained on: at least one, and spread over short and long texts.

    Example:
        >>> list(held_out(4)), list(held_out(40))
        ([2], [7, 22, 37])
    """
    gap = min(_HELD_OUT, batches)
    return range(gap // 2, batches, gap)


def _train(
    masks: Mapping[str, Tensor],
    dense: DenseOutputs,
    order: Sequence[Sequence[int]],
    learning_rate: float,
    progress: bool | None,
) -> Iterator[int]:
    """Steps, after each of which the weights are those to look at; yields its number, from 1."""
    trained = dense.trained
    wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in trained.items()}
    masters = {n: p if p.dtype == wide[n] else nn.Parameter(p.detach().to(wide[n])) for n, p in trained.items()}
    optimiser = torch.optim.AdamW(masters.values(), lr=learning_rate, betas=_BETAS, weight_decay=0.0)
    warmup = max(1, round(_WARMUP * len(order)))
    for step, together in enumerate(Bar(order, desc="Polishing", unit="step", progress=progress)):
        with fail_together():
            for index in together:
                for loss in _losses(dense, index, len(dense.batches) / len(together)):
                    if not torch.isfinite(loss):
                        raise CalibrationError(
                            f"the polish diverged at step {step + 1} of {len(order)}: lower its learning rate, now "
                            f"{learning_rate:g}; nothing was changed"
                        )
                    loss.backward()
        for name, parameter in trained.items():
            gradient = torch.zeros_like(masters[name]) if parameter.grad is None else parameter.grad.to(wide[name])
            parameter.grad = None
            gradient = all_reduce_sum(gradient)
            if name in masks:
                gradient.mul_(masks[name].to(gradient.device))
            masters[name].grad = gradient
        nn.utils.clip_grad_norm_(masters.values(), _CLIP)
        factor = min((step + 1) / warmup, (len(order) - step) / (len(order) - warmup + 1))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * factor
        optimiser.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                masters[name].grad = None
                if masters[name] is not parameter:
                    parameter.copy_(masters[name])
                if name in masks:
                    zero_removed_(parameter, masks[name].to(parameter.device))
        yield step + 1


def _losses(dense: DenseOutputs, index: int, scale: float) -> Iterator[Tensor]:
    """What a batch of this process adds to the loss of a step, window by window: each before the next one runs."""
    parts = dense.distances(index) if index in dense.mine else iter(())
    while True:
        with torch.enable_grad(), fast(dense.device, dense.trained.values()):
            if (loss := next(parts, None)) is None:
                return
            loss = loss * scale
        yield loss


def _order(batches: Sequence[int], epochs: int, seed: int) -> list[list[int]]:
    """The batches of each step: one of every process, as far as it has any left."""
    generator = torch.Generator().manual_seed(seed)
    size = rank_and_world_size()[1]
    shares = [[index for index in batches if index % size == rank] for rank in range(size)]
    groups = [[index for index in group if index is not None] for group in itertools.zip_longest(*shares)]
    return [groups[i] for _ in range(epochs) for i in torch.randperm(len(groups), generator=generator).tolist()]


@torch.no_grad()
def _distance(dense: DenseOutputs, batches: Sequence[int]) -> float:
    """The mean over some batches, in the units of the whole; the same bits in every process."""
    with fail_together():
        total = sum(float(part) for index in batches if index in dense.mine for part in dense.distances(index))
    agreed = broadcast(all_reduce_sum(torch.tensor(total, dtype=torch.float64)))
    return float(agreed) * len(dense.batches) / len(batches)


def _examples(batch: Mapping[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)


def _tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens a text model reads, without padding."""
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        return int(mask.count_nonzero())
    ids = batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else 0


@contextmanager
def _training(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for some parameters inside; every flag and every gradient as it was afterwards."""
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in trained.values()}
    try:
        for parameter, _, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def fast(device: torch.device, parameters: Iterable[Tensor]) -> Any:
    """Products of a float32 model in bfloat16 inside, where the processor has instructions for them."""
    single = all(parameter.dtype == torch.float32 for parameter in parameters)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=single and has_bf16(device))


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks: Sequence[Callable[[], bool] | None] = [
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return device.type == "cpu" and any(check is not None and check() for check in checks)
