"""Polish: a short distillation from the dense model after pruning, on unlabelled calibration batches.

This is training, and is reported as such. The masks stay as they are. What the dense model puts out, its logits and
what its blocks hand on, is recorded before it is pruned, so that no second model is held; the pruned model is then
trained to put out the same (Hinton et al. 2015, arXiv:1503.02531; hidden states as in Jiao et al. 2020,
arXiv:1909.10351). No labels are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.activations import CACHE_BYTES, Batches, InputReader, Watcher, first_input, first_tensor, outer_lists
from hf_prune.config import PruningConfig
from hf_prune.distributed import add_up, all_or_none, processes
from hf_prune.errors import CalibrationError
from hf_prune.masking import Undo, zero_removed_
from hf_prune.plan import PruningPlan
from hf_prune.sensitivity import named_logits
from hf_prune.spill import Shelf

_WARMUP = 0.1  # share of the steps in which the learning rate rises
_BETAS = (0.9, 0.98)
_CLIP = 1.0  # largest norm of a gradient
_HELD_OUT = 16  # one batch in so many


@dataclass(frozen=True)
class PolishRecord:
    """What a polish did: how much it trained, on what, and how close it came.

    Args:
        steps: Steps of the optimiser.
        epochs: Passes over the batches.
        examples: Examples in the batches.
        trained: Parameters that were trained.
        before: Distance to the dense model on batches that were held out, 0 is equal; see
            :meth:`DenseOutputs.distance`.
        after: The same after the training.
        kept: Whether the trained weights were kept; they are not where the distance did not fall.
    """

    steps: int
    epochs: int
    examples: int
    trained: int
    before: float
    after: float
    kept: bool

    def __str__(self) -> str:
        """One sentence."""
        what = (
            f"{self.trained:,} parameters were trained for {self.steps:,} steps to put out what the dense model does, "
            f"on {self.examples:,} unlabelled examples, {self.epochs} times"
        )
        if not self.kept:
            return f"Polish given up: {what}, and the distance on held-out batches did not fall; nothing was kept."
        return f"Polished: {what}; on held-out batches the distance fell from {self.before:.3g} to {self.after:.3g}."


class DenseOutputs:
    """What a dense model puts out for some batches: a context, with what was recorded on disk beyond a budget.

    Args:
        model: The model, dense.
        plan: Its plan, whose targets say what its blocks are.
        batches: Calibration batches, the same in every process; each records its share.
        cache_bytes: How much is kept in memory.
        progress: Show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        batches: Batches,
        cache_bytes: int = CACHE_BYTES,
        progress: bool = False,
    ) -> None:
        self.batches = list(batches)
        self._reader = InputReader(model, plan, self.batches)
        targets = {id(module) for modules in self._reader.holders.values() for module in modules}
        self._blocks = [block for blocks in outer_lists(model, targets) for block in blocks]
        self.head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
        self._shelf = Shelf(cache_bytes)
        self._progress = progress
        self.sizes: Tensor = torch.zeros(0)

    def __enter__(self) -> DenseOutputs:
        try:
            self._record()
        except BaseException:
            self._shelf.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._shelf.close()

    @property
    def mine(self) -> range:
        """Numbers of the batches of this process."""
        rank, size = processes()
        return range(rank, len(self.batches), size)

    def running(self) -> InputReader:
        """A context in which :meth:`distance` may be asked for."""
        return self._reader

    @torch.no_grad()
    def _record(self) -> None:
        hidden = None if self._progress else True  # None: shown on a terminal
        total = torch.zeros(1 + len(self._blocks), dtype=torch.float64)
        with self._reader, all_or_none():
            for index in tqdm(self.mine, desc="Dense outputs", unit="batch", leave=False, disable=hidden):
                seen = self._run(index)
                total += torch.tensor([float(x.float().square().sum(dtype=torch.float64)) for x in seen])
                self._shelf.put(index, [x.to(torch.bfloat16) if i else x for i, x in enumerate(seen)])
        self.sizes = add_up(total)
        if not bool(torch.isfinite(self.sizes).all()):
            raise CalibrationError(
                "what the dense model puts out for the batches of the polish is not finite: expected finite values; "
                "use float32 or bfloat16, and check the batches"
            )

    def _run(self, index: int) -> list[Tensor]:
        """What comes out at the end, flat, and what each block hands on; without padding."""
        states: dict[int, Tensor] = {}
        last: list[Tensor] = []

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            state = first_tensor(output)
            if isinstance(state, Tensor) and state.is_floating_point():
                states[id(module)] = self._reader.rows(module, state)

        def keep(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            last.append(self._reader.rows(module, first_input(args, kwargs)))

        with ExitStack() as hooks:
            for block in self._blocks:
                Watcher(block, see, after=True).install(hooks, None)
            if self.head is not None:
                Watcher(self.head, keep).install(hooks, None)
            outputs = self._reader.forward(self.batches[index])
        if not last:
            last = [_centred(values.float()) for values in named_logits(outputs)]
        empty = last[0].new_zeros(0)
        return [torch.cat([x.reshape(-1) for x in last]), *(states.get(id(block), empty) for block in self._blocks)]

    def distance(self, index: int) -> Tensor:
        """How far the model's outputs for a batch are from the dense ones.

        The squared distance of the logits (of a language model: of what its output embedding gets) and, averaged over
        the blocks, of what they hand on, each in units of the sum of the squares of the dense ones over all batches.
        """
        now, then = self._run(index), self._shelf.get(index)
        parts = [
            (a.float() - b.float()).square().sum() / size
            for a, b, size in zip(now, then, self.sizes.clamp_min(1e-30).tolist(), strict=True)
        ]
        return parts[0] + (torch.stack(parts[1:]).mean() if parts[1:] else 0.0)


def polish(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    dense: DenseOutputs,
    undo: Undo,
    config: PruningConfig,
    progress: bool = False,
) -> PolishRecord:
    """Train a pruned model, in place, to put out what the dense one did; removed weights stay zero.

    Everything but embeddings is trained, with AdamW in float32 (products in bfloat16 where the processor has
    instructions for them), a learning rate that rises and then falls linearly to zero, and without dropout. One batch
    in sixteen is held out; if the distance there does not fall, the weights are as before.

    Args:
        model: The model, pruned.
        masks: Bool masks by parameter name, True = keep.
        dense: What the dense model put out.
        undo: Gets every parameter before it changes.
        config: Its ``polish`` says for how many epochs and with which learning rate, its ``seed`` in which order.
        progress: Show a progress bar.

    Returns:
        What was done.

    Raises:
        CalibrationError: If the distance becomes infinite or NaN.
    """
    assert isinstance(config.polish, Mapping)
    epochs, rate = int(config.polish["epochs"]), config.polish["learning_rate"]
    fixed = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    frozen = {
        id(p) for module in [*fixed, *([dense.head] if dense.head is not None else [])] for p in module.parameters()
    }
    trained = {n: p for n, p in model.named_parameters() if id(p) not in frozen and p.is_floating_point()}
    every = range(len(dense.batches))
    held = every[::_HELD_OUT] if len(every) >= _HELD_OUT else every
    used = [index for index in every if index not in held] or list(every)
    pruned = Shelf(0)
    try:
        for name, parameter in trained.items():
            undo.save(name, parameter)
            pruned.put(name, parameter.detach())
        with dense.running(), _training(model, trained):
            before = _distance(dense, held)
            steps = _train(trained, masks, dense, used, epochs, rate, config.seed, progress)
            after = _distance(dense, held)
        kept = after < before
        if not kept:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(pruned.get(name))
    finally:
        pruned.close()
    examples = sum(_examples(dense.batches[index]) for index in used)
    return PolishRecord(steps, epochs, examples, sum(p.numel() for p in trained.values()), before, after, kept)


def _train(
    trained: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    dense: DenseOutputs,
    batches: Sequence[int],
    epochs: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> int:
    masters = {n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in trained.items()}
    optimiser = torch.optim.AdamW(masters.values(), lr=learning_rate, betas=_BETAS, weight_decay=0.0)
    order = _order(batches, epochs, seed)
    warmup = max(1, round(_WARMUP * len(order)))
    hidden = None if progress else True  # None: shown on a terminal
    device = next(iter(trained.values())).device
    for step, together in enumerate(tqdm(order, desc="Polishing", unit="step", leave=False, disable=hidden)):
        with all_or_none():
            for index in together:
                if index in dense.mine:
                    with torch.enable_grad(), _fast(device):
                        loss = dense.distance(index) * (len(dense.batches) / len(together))
                    if not torch.isfinite(loss):
                        raise CalibrationError(
                            f"the polish diverged at step {step + 1} of {len(order)}: lower its learning rate, now "
                            f"{learning_rate:g}; nothing was changed"
                        )
                    loss.backward()
        for name, parameter in trained.items():
            found = torch.zeros_like(masters[name]) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
            masters[name].grad = add_up(found)
            if name in masks:
                masters[name].grad.mul_(masks[name].to(device))  # type: ignore[union-attr]
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
                    zero_removed_(parameter, masks[name].to(device))
    return len(order)


def _order(batches: Sequence[int], epochs: int, seed: int) -> list[list[int]]:
    """The batches of each step, one for every process as far as there are."""
    generator = torch.Generator().manual_seed(seed)
    size = processes()[1]
    groups = [list(batches[start : start + size]) for start in range(0, len(batches), size)]
    return [groups[i] for _ in range(epochs) for i in torch.randperm(len(groups), generator=generator).tolist()]


@torch.no_grad()
def _distance(dense: DenseOutputs, batches: Sequence[int]) -> float:
    """The mean over some batches, in the units of the whole."""
    with all_or_none():
        total = sum(float(dense.distance(index)) for index in batches if index in dense.mine)
    return float(add_up(torch.tensor(total, dtype=torch.float64))) * len(dense.batches) / len(batches)


def _centred(logits: Tensor) -> Tensor:
    """What all classes gain changes nothing."""
    return logits - logits.mean(-1, keepdim=True) if logits.dim() == 2 and logits.shape[-1] > 1 else logits


def _examples(batch: Mapping[str, Any]) -> int:
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 0)


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


def _fast(device: torch.device) -> Any:
    """Products in bfloat16 inside, where the processor has instructions for them."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16(device))


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks: Sequence[Callable[[], bool] | None] = [
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return device.type == "cpu" and any(check is not None and check() for check in checks)
