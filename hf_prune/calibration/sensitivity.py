"""How much a model's predictions depend on the outputs of each target, token by token; no labels are needed.

Let y be the output of a target for one token, and g the gradient of the predictions with respect to it. A small change
d of y then changes the predictions by (g · d)² in the mean, the Gauss-Newton (or Fisher) approximation. Here g² is kept
as a product of two shares, one of the token and one of the output (the diagonal of the factors of Martens and Grosse
2015, arXiv:1503.05671), which is all that a layer-wise method can use without giving up its one Gram matrix for all
outputs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.batches import Batches, small_batches, without_labels
from hf_prune.calibration.gradients import no_parameter_gradients
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import CACHE_BYTES, InputReader
from hf_prune.calibration.output_head import HeadFinder, OutputHead, join_windows, sampled_by
from hf_prune.calibration.padding import first_input
from hf_prune.calibration.predictions import token_mask
from hf_prune.calibration.slabs import slab_number
from hf_prune.criteria.base import derived_seed
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import Target, is_finite, output_rows
from hf_prune.planning.expectations import is_language_model
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar

_MOST_TOKENS = 4096  # that are measured of a language model: backward passes are dear, and more change next to nothing


class Sensitivity:
    """Squared gradients of the predictions with respect to the outputs of targets.

    Args:
        cache_bytes: How much of those of the tokens is kept in memory.
        folder: Where the rest goes; None for the system's temporary folder.

    Attributes:
        outputs: (out,) mean over the tokens, by parameter name, float32.
        misplaced: Names of targets whose tokens cannot be told apart: those of experts, which get any of them.
        tokens_alike: Whether all tokens count the same.
    """

    def __init__(self, cache_bytes: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.misplaced: set[str] = set()
        self._means: dict[str, float] = {}
        self._tokens = OffloadCache(cache_bytes, folder)
        self.tokens_alike = False

    def add_tokens(self, name: str, batch: int, calls: list[Tensor]) -> None:
        """Keep the squared gradients of a target in one batch.

        Args:
            name: The target.
            batch: Its number.
            calls: (tokens,) for each call.
        """
        self._tokens.put((name, batch), calls)

    def add_means(self, name: str, outputs: Tensor, token_mean: float) -> None:
        """Keep the means of a target over all batches.

        Args:
            name: The target.
            outputs: (out,) mean over the tokens.
            token_mean: Mean of the tokens' squared gradients.
        """
        self.outputs[name] = outputs.float()
        self._means[name] = token_mean

    def weights(self, name: str, batch: int, call: int) -> Tensor | None:
        """(tokens,) how much each token of a call counts, 1 in the mean over all batches; None if all are alike."""
        if self.tokens_alike:
            return None
        values: Tensor = self._tokens.get((name, batch))[call]
        return values / self._means[name] if self._means[name] else torch.ones_like(values)

    def forget_tokens(self) -> None:
        """Have all tokens count the same from now on, as where only some batches were measured."""
        self.tokens_alike = True
        self._tokens.close()

    def close(self) -> None:
        """Forget the tokens."""
        self._tokens.close()


def measured_batches(model: nn.Module, batches: Batches) -> list[Mapping[str, Any]]:
    """The batches that sensitivities are measured on: of a language model some, spread over all of them.

    Args:
        model: The model.
        batches: All batches.
    """
    every = list(batches)
    tokens = sum(map(_count_tokens, every))
    if not is_language_model(type(model).__name__) or tokens <= _MOST_TOKENS:
        return every
    number = max(1, len(every) * _MOST_TOKENS // tokens)
    return [every[i * len(every) // number] for i in range(number)]


def _count_tokens(batch: Mapping[str, Any]) -> int:
    ids = batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else 0


def sensitivity_of(
    reader: InputReader, seed: int, progress: bool | None = None, cache_bytes: int = CACHE_BYTES
) -> Sensitivity:
    """:func:`measure_sensitivity` on those of the batches that :func:`measured_batches` chooses."""
    some = measured_batches(reader.model, reader.batches)
    if len(some) == len(reader.batches):
        return measure_sensitivity(reader, seed, progress, cache_bytes)
    with InputReader(reader.model, reader.targets, some, cache_bytes=cache_bytes) as part:
        part.order(warn=False)
        sensitivity = measure_sensitivity(part, seed, progress, cache_bytes)
        part.tokens.clear()
    sensitivity.forget_tokens()
    return sensitivity


def measure_sensitivity(
    reader: InputReader, seed: int, progress: bool | None = None, cache_bytes: int = CACHE_BYTES
) -> Sensitivity:
    """Run all batches forwards and backwards once, on the model as it is.

    Args:
        reader: Has the model, the targets and the batches, inside its context; blocks are all computed.
        seed: Seed of random labels and directions.
        progress: Show a progress bar.
        cache_bytes: How much is kept in memory; the rest goes to a temporary folder.

    Raises:
        CalibrationError: If a gradient is not finite, or the predictions depend on no target.
    """
    sensitivity = Sensitivity(cache_bytes)
    gradients = OutputGradients(reader)
    with ExitStack() as context:
        context.enter_context(no_parameter_gradients(reader.model))
        for t in reader.targets:
            for module in reader.holders[t.name]:
                Watcher(module, gradients.hook(t), after=True).install(context, None)
        context.enter_context(fail_together())
        find_head = HeadFinder(reader.model, reader.forward, itertools.chain(*reader.holders.values()))
        bar = Bar(rank_items(range(len(reader.batches))), desc="Sensitivity", progress=progress)
        for index in bar:
            generator = torch.Generator().manual_seed(derived_seed(seed, index))
            for name, calls in _batch_gradients(reader, index, gradients, find_head, generator).items():
                sensitivity.add_tokens(name, index, calls)
    gradients.hand_on(sensitivity)
    return sensitivity


def _batch_gradients(
    reader: InputReader, index: int, gradients: OutputGradients, find_head: HeadFinder, generator: torch.Generator
) -> dict[str, list[Tensor]]:
    """By target, (tokens,) squared gradients of each call in a batch, which runs window by window where it is large."""
    of_windows: list[dict[str, list[Tensor]]] = []
    for window in small_batches(reader.model, batch_to_device(reader.model, reader.batches[index])):
        head = find_head(without_labels(reader.model, window))
        gradients.start()
        run_backwards(reader, window, head, generator)
        of_windows.append(gradients.stop())
    return join_windows(of_windows)


def run_backwards(
    reader: InputReader, batch: Mapping[str, Any], head: OutputHead | None, generator: torch.Generator
) -> None:
    """Run a batch forwards, and the gradient of what the model predicts backwards.

    Raises:
        CalibrationError: If the predictions depend on nothing that has a gradient.
    """
    mask = token_mask(reader.model, batch)
    with torch.enable_grad():
        value = sampled_by(head, reader.forward, batch, mask, generator)
        if not value.requires_grad:
            raise CalibrationError(
                "the model's outputs for a calibration batch depend on none of the weights to be pruned: check "
                "target_modules, and that the model computes with gradients"
            )
        value.backward()


class OutputGradients:
    """Reads the gradients of the outputs of targets, and adds up their squares.

    Attributes:
        totals: (targets, 3) sum over the tokens, number of tokens, and number of calls on tokens that a router chose.
        calls: By target, (tokens,) squared gradients of each call in the batch that is running.
    """

    def __init__(self, reader: InputReader) -> None:
        self._reader = reader
        self._row = {t.name: i for i, t in enumerate(reader.targets)}
        self._device = reader.device
        self._dtype = accumulate_dtype(self._device)
        self._output_sums: dict[str, Tensor] = {}
        self._slab_tokens = {t.name: torch.zeros(t.slabs, dtype=torch.float64) for t in reader.targets}
        self.totals = torch.zeros(len(reader.targets), 3, dtype=torch.float64)
        self.calls: dict[str, list[Tensor]] = {}
        self._watches = False

    def start(self) -> None:
        """Watch what runs next."""
        self.calls, self._watches = {}, True

    def stop(self) -> dict[str, list[Tensor]]:
        """Add up what was seen, and return it."""
        self._watches = False
        for name, calls in self.calls.items():
            self.totals[self._row[name], :2] += torch.tensor(
                [sum(float(values.sum()) for values in calls), sum(map(len, calls))]
            )
        return self.calls

    def hand_on(self, sensitivity: Sensitivity) -> None:
        """Give the means over the batches of all processes to a sensitivity.

        Raises:
            CalibrationError: If one is not finite.
        """
        totals = all_reduce_sum(self.totals)
        for t, (total, tokens, routed) in zip(self._reader.targets, totals.tolist(), strict=True):
            if routed:
                sensitivity.misplaced.add(t.name)
            mean = self._output_means(t)
            if not is_finite(mean):
                raise CalibrationError(
                    f"the gradient of the predictions at {t.name} is not finite: expected finite values; calibrate in "
                    f"float32 or bfloat16, and check the batches"
                )
            sensitivity.add_means(t.name, mean, total / max(1, tokens))

    def _output_means(self, target: Target) -> Tensor:
        """(out,) squared gradients: their mean over the tokens that each output sees."""
        tokens = all_reduce_sum(self._slab_tokens[target.name]).clamp_min(1)
        total = all_reduce_sum(self._output_sum(target)).view(target.slabs, -1)
        return (total / tokens.to(total)[:, None]).flatten()

    def _output_sum(self, target: Target) -> Tensor:
        """(out,) squared gradients, summed over the tokens."""
        if target.name not in self._output_sums:
            zeros = torch.zeros(target.matrix_shape[0], dtype=self._dtype, device=self._device)
            self._output_sums[target.name] = zeros
        return self._output_sums[target.name]

    def hook(self, target: Target) -> Callable[..., Tensor | None]:
        """A hook on the output of a target."""
        name, layout, padding = target.name, target.layout, self._reader.padding

        def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            if not self._watches:
                return None
            x = first_input(args, kwargs)
            mask = None if layout == "conv" else padding.mask(module, x)
            if not padding.in_place(x, layout):
                self.totals[self._row[name], 2] += 1
            calls = self.calls.setdefault(name, [])
            call = len(calls)
            # A call that the predictions do not depend on gets no gradient: its tokens are known and count 0.
            calls.append(torch.zeros(int(mask.sum()) if mask is not None else len(output_rows(output, layout))))

            slab = slab_number(module)
            self._slab_tokens[name][slice(None) if layout == "conv" else slab] += len(calls[call])

            def read(gradient: Tensor) -> None:
                rows = output_rows(gradient, layout)
                square = (rows if mask is None else rows[mask]).float().square()  # (tokens, out)
                calls[call] = square.sum(1).cpu()
                outputs = slice(None) if layout == "conv" else target.rows(slab)
                self._output_sum(target)[outputs] += square.sum(0, dtype=self._dtype)

            leaf = output if output.requires_grad else output.detach().requires_grad_()
            watched = leaf.clone()  # a later operation in place does not change which tensor the gradient is for
            watched.register_hook(read)
            return watched

        return replace
