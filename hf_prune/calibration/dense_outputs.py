"""The outputs of a dense model, recorded before it is pruned, so that a polish needs no second model.

Compared are the model's predictions (its logits; of a language model the inputs of its output embedding, which are far
smaller; or else its first output) and the outputs of its blocks. Padding does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batches, small_batches, without_labels
from hf_prune.calibration.block_sequence import outer_lists, replaced_forward
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import CACHE_BYTES, InputReader
from hf_prune.calibration.padding import first_input, first_tensor
from hf_prune.calibration.predictions import named_logits
from hf_prune.errors import CalibrationError, PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_and_world_size
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar

_MAX_BLOCKS = 6  # of a list, whose outputs are compared: of a deep model the outputs of all would fill a disk


class DenseOutputs:
    """The outputs of a dense model for some batches: a context, with what was recorded on disk beyond a budget.

    Args:
        model: The model, dense.
        targets: The weights that will be pruned, which tell what its blocks are, and what is trained.
        batches: Calibration batches, the same in every process; each records its share. Labels are left out, but for
            models with a decoder beside an encoder, which may make its inputs from them.
        cache_bytes: How much is kept in memory.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If there are fewer than two batches.
        PlanError: If nothing can be trained, since all targets are embeddings.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Iterable[Target],
        batches: Batches,
        cache_bytes: int = CACHE_BYTES,
        progress: bool | None = None,
    ) -> None:
        self.batches = list(batches)
        self._reader = InputReader(model, targets, self.batches)
        if len(self.batches) == 1:
            raise CalibrationError(
                "a polish got 1 batch: expected at least 2, of which one is held out to see whether it helps; pass "
                "more batches, or smaller ones"
            )
        modules = {id(module): module for of_target in self._reader.places.values() for module in of_target}
        self.trained = trainable(model, modules.values())
        if not self.trained:
            raise PlanError(
                "a polish has nothing to train: all targets are embeddings, which it leaves alone; name other targets, "
                "or leave polish out"
            )
        self._blocks = [block for blocks in outer_lists(model, set(modules)) for block in _spread(blocks, _MAX_BLOCKS)]
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head: nn.Module | None = (
            None if head is None or any(p is q for p in head.parameters() for q in self.trained.values()) else head
        )
        self._last: Any = cast("Any", model).get_decoder() if self._reader.padding.encoder is not None else model
        config = getattr(model, "config", None)
        self._centre = getattr(config, "problem_type", None) != "multi_label_classification"
        self._cache = OffloadCache(cache_bytes)
        self._progress = progress
        self.sizes: Tensor = torch.zeros(0)
        self.seconds = 0.0

    def __enter__(self) -> DenseOutputs:
        start = time.perf_counter()
        try:
            self._record()
        except BaseException:
            self._cache.close()
            raise
        self.seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.close()

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
        """A context in which :meth:`distances` may be called."""
        return self._reader

    @torch.no_grad()
    def _record(self) -> None:
        total = torch.zeros(1 + len(self._blocks), dtype=torch.float64)
        with self._reader, fail_together():
            for index in Bar(self.mine, desc="Dense outputs", progress=self._progress):
                for number, window in enumerate(self._windows(index)):
                    outputs = self._run(window)
                    total += torch.tensor([float(x.float().square().sum(dtype=torch.float64)) for x in outputs])
                    self._cache.put((index, number), [x.to(torch.bfloat16) if i else x for i, x in enumerate(outputs)])
        self.sizes = all_reduce_sum(total)
        if not bool(torch.isfinite(self.sizes).all()):
            raise CalibrationError(
                "the outputs of the dense model for the batches of the polish are not finite: expected finite values; "
                "use float32 or bfloat16, and check the batches"
            )

    def _windows(self, index: int) -> list[dict[str, Any]]:
        """The parts of a batch that run one after the other; those of a language model are single windows."""
        batch = self.batches[index]
        if self._reader.padding.encoder is None:
            batch = without_labels(self._reader.model, batch)
        splits = self._head is not None and "labels" not in batch
        return small_batches(self._reader.model, batch) if splits else [dict(batch)]

    def _run(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """The predictions for a batch, flat, and the output of each block; without padding."""
        states: dict[int, Tensor] = {}
        last: list[Tensor] = []

        def keep_state(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            state = first_tensor(output)
            if isinstance(state, Tensor) and state.is_floating_point():
                states[id(module)] = self._copied_rows(module, state)

        def keep_last(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            last.append(self._copied_rows(module, first_input(args, kwargs)))

        with ExitStack() as hooks:
            for block in self._blocks:
                Watcher(block, keep_state, after=True).install(hooks, None)
            if self._head is not None:
                Watcher(self._head, keep_last).install(hooks, None)
                if "labels" not in batch:  # then nobody looks at the logits, which are large
                    hooks.enter_context(replaced_forward(self._head, lambda x: x[..., :1]))
            outputs = self._reader.forward(batch)
        if not last:
            last = self._predictions(outputs, batch)
        empty = last[0].new_zeros(0)
        return [torch.cat([x.reshape(-1) for x in last]), *(states.get(id(block), empty) for block in self._blocks)]

    def _copied_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """(tokens, in): a copy without padding, since what runs next may change ``x`` in place."""
        rows = self._reader.padding.rows(module, x)
        is_view = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        return rows.clone() if is_view else rows

    def _predictions(self, outputs: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        """The logits, or else the first output, in float32 and without padding.

        A shift of all classes changes no prediction: their mean is subtracted.
        """
        logits = [values.float() for values in named_logits(outputs)]
        mask = batch.get("attention_mask")
        if len(logits) > 1 and isinstance(mask, Tensor):  # of the start and the end of an answer: (batch, seq)
            counts = (mask != 0).to(logits[0].device)
            logits = [values[counts] if values.shape == counts.shape else values for values in logits]
        centred = [
            x - x.mean(-1, keepdim=True) if self._centre and x.dim() == 2 and x.shape[1] > 1 else x for x in logits
        ]
        return [self._reader.padding.rows(self._last, x) if x.dim() == 3 else x for x in centred]

    def distances(self, index: int) -> Iterator[Tensor]:
        """How far the model's outputs for a batch are from the dense ones, in parts that add up to it.

        The squared distance of the logits (of a language model: of the inputs of its output embedding), plus the mean
        over the blocks of the squared distances of their outputs; each in units of the sum of the squares of the dense
        values over all batches. Each part is a run of the model on one window of text.
        """
        for number, window in enumerate(self._windows(index)):
            now, dense = self._run(window), self._cache.get((index, number))
            parts = [
                (a.float() - b.float()).square().sum() / size
                for a, b, size in zip(now, dense, self.sizes.clamp_min(1e-30).tolist(), strict=True)
            ]
            yield parts[0] + (torch.stack(parts[1:]).mean() if parts[1:] else 0.0)


def trainable(model: nn.Module, modules: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that a polish trains: targets, their biases, and the norms beside them, but no embeddings.

    A norm is beside a target if the module that it is a child of holds one: those of a block without targets stay.

    Args:
        model: The model.
        modules: The modules that are pruned.
    """
    pruned = [module for module in modules if not isinstance(module, nn.Embedding)]
    ids = {id(module) for module in pruned}
    trained = list(pruned)
    for parent in model.modules():
        if any(id(module) in ids for module in parent.modules()):
            trained += [child for child in parent.children() if _is_norm(child)]
    fixed = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    wanted = {id(p) for module in trained for p in module.parameters(recurse=False) if p.is_floating_point()} - fixed
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has nothing but vectors: scales and shifts."""
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(p.dim() == 1 for p in parameters)


def _spread(blocks: Sequence[nn.Module], most: int) -> list[nn.Module]:
    """At most so many blocks, evenly spread, the last one among them."""
    number = min(most, len(blocks))
    return [blocks[round((i + 1) * len(blocks) / number) - 1] for i in range(number)]
