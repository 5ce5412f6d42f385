"""What a dense model puts out, recorded before it is pruned, so that a polish needs no second model.

Compared are the model's predictions (its logits; of a language model what its output embedding gets, which is far
smaller; or else its first output) and what its blocks hand on. Padding does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_prune.calibration.block_sequence import outer_lists, replaced_forward
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import CACHE_BYTES, Batches, InputReader
from hf_prune.calibration.padding import first_input, first_tensor
from hf_prune.calibration.sensitivity import named_logits
from hf_prune.errors import CalibrationError, PlanError
from hf_prune.planning.plan import PruningPlan
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_and_world_size
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar

_BLOCKS = 6  # of a stack, whose outputs are compared: of a deep model the outputs of all would fill a disk


class DenseOutputs:
    """What a dense model puts out for some batches: a context, with what was recorded on disk beyond a budget.

    Args:
        model: The model, dense.
        plan: Its plan, whose targets say what its blocks are, and what is trained.
        batches: Calibration batches, the same in every process; each records its share. Labels are left out, but for
            models with a decoder, which may make its inputs of them.
        cache_bytes: How much is kept in memory.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If there is but one batch, or none.
        PlanError: If nothing can be trained, since all targets are embeddings.
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
        if len(self.batches) == 1:
            raise CalibrationError(
                "a polish got 1 batch: expected at least 2, of which one is held out to see whether it helps; pass "
                "more batches, or smaller ones"
            )
        targets = {id(module): module for modules in self._reader.holders.values() for module in modules}
        self.trained = trainable(model, targets.values())
        if not self.trained:
            raise PlanError(
                "a polish has nothing to train: all targets are embeddings, which it leaves alone; name other targets, "
                "or leave polish out"
            )
        self._blocks = [block for blocks in outer_lists(model, set(targets)) for block in _spread(blocks, _BLOCKS)]
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head: nn.Module | None = (
            None if head is None or any(p is q for p in head.parameters() for q in self.trained.values()) else head
        )
        self._last: Any = cast("Any", model).get_decoder() if self._reader.padding.encoder is not None else model
        config = getattr(model, "config", None)
        self._shift = getattr(config, "problem_type", None) != "multi_label_classification"
        self._shelf = OffloadCache(cache_bytes)
        self._progress = progress
        self.sizes: Tensor = torch.zeros(0)
        self.seconds = 0.0

    def __enter__(self) -> DenseOutputs:
        start = time.perf_counter()
        try:
            self._record()
        except BaseException:
            self._shelf.close()
            raise
        self.seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self._shelf.close()

    @property
    def mine(self) -> range:
        """Numbers of the batches of this process."""
        rank, size = rank_and_world_size()
        return range(rank, len(self.batches), size)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._reader.device

    def running(self) -> InputReader:
        """A context in which :meth:`distance` may be asked for."""
        return self._reader

    @torch.no_grad()
    def _record(self) -> None:
        total = torch.zeros(1 + len(self._blocks), dtype=torch.float64)
        with self._reader, fail_together():
            for index in Bar(self.mine, desc="Dense outputs", progress=self._progress):
                seen = self._run(index)
                total += torch.tensor([float(x.float().square().sum(dtype=torch.float64)) for x in seen])
                self._shelf.put(index, [x.to(torch.bfloat16) if i else x for i, x in enumerate(seen)])
        self.sizes = all_reduce_sum(total)
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
                states[id(module)] = self._own_rows(module, state)

        def keep(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            last.append(self._own_rows(module, first_input(args, kwargs)))

        batch = self.batches[index]
        if self._reader.padding.encoder is None:
            batch = {name: value for name, value in batch.items() if name != "labels"}
        with ExitStack() as hooks:
            for block in self._blocks:
                Watcher(block, see, after=True).install(hooks, None)
            if self._head is not None:
                Watcher(self._head, keep).install(hooks, None)
                if "labels" not in batch:  # then nobody looks at the logits, which are large
                    hooks.enter_context(replaced_forward(self._head, lambda x: x[..., :1]))
            outputs = self._reader.forward(batch)
        if not last:
            last = self._predictions(outputs, batch)
        empty = last[0].new_zeros(0)
        return [torch.cat([x.reshape(-1) for x in last]), *(states.get(id(block), empty) for block in self._blocks)]

    def _own_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """(tokens, in): a copy without padding, since what runs next may change ``x`` in place."""
        rows = self._reader.padding.rows(module, x)
        is_view = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        return rows.clone() if is_view else rows

    def _predictions(self, outputs: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        """Logits, or else the first output, in float32 and without padding; what all classes gain changes nothing."""
        found = [values.float() for values in named_logits(outputs)]
        mask = batch.get("attention_mask")
        if len(found) > 1 and isinstance(mask, Tensor):  # of the start and the end of an answer: (batch, seq)
            seen = (mask != 0).to(found[0].device)
            found = [values[seen] if values.shape == seen.shape else values for values in found]
        centred = [
            x - x.mean(-1, keepdim=True) if self._shift and x.dim() == 2 and x.shape[1] > 1 else x for x in found
        ]
        return [self._reader.padding.rows(self._last, x) if x.dim() == 3 else x for x in centred]

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


def trainable(model: nn.Module, targets: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """What a polish trains: targets, their biases, and the norms beside them; embeddings are left alone.

    A norm is beside a target if the module that it is a part of holds one: those of a block without targets stay.

    Args:
        model: The model.
        targets: The modules that are pruned.
    """
    own = [module for module in targets if not isinstance(module, nn.Embedding)]
    holding = {id(module) for module in own}
    parts = list(own)
    for parent in model.modules():
        if any(id(module) in holding for module in parent.modules()):
            parts += [child for child in parent.children() if _is_norm(child)]
    fixed = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    wanted = {id(p) for module in parts for p in module.parameters(recurse=False) if p.is_floating_point()} - fixed
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has nothing but vectors: scales and shifts."""
    own = list(module.parameters())
    return bool(own) and not list(module.children()) and all(p.dim() == 1 for p in own)


def _spread(blocks: Sequence[nn.Module], most: int) -> list[nn.Module]:
    """At most so many blocks, evenly spread, the last one among them."""
    number = min(most, len(blocks))
    return [blocks[round((i + 1) * len(blocks) / number) - 1] for i in range(number)]
