"""How much a model's predictions depend on the outputs of each target, token by token; no labels are needed.

Let y be the output of a target for one token, and g the gradient of the predictions with respect to it. A small change
d of y then changes the predictions by (g · d)² in the mean, the Gauss-Newton (or Fisher) approximation. Here g² is kept
as a product of two shares, one of the token and one of the output (the diagonal of the factors of Martens and Grosse
2015, arXiv:1503.05671), which is all that a layer-wise method can use without giving up its one Gram matrix for all
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import CACHE_BYTES, InputReader
from hf_prune.calibration.padding import first_input
from hf_prune.calibration.predictions import sampled_prediction, token_mask
from hf_prune.calibration.slabs import slab_number
from hf_prune.criteria.base import derived_seed
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import Target, is_finite, output_rows
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar


class Sensitivity:
    """Squared gradients of the predictions with respect to the outputs of targets.

    Attributes:
        outputs: (out,) mean over the tokens, by parameter name, float32.
        misplaced: Names of targets whose tokens cannot be told apart: those of experts, which get any of them.
    """

    def __init__(self, cache_bytes: int) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.misplaced: set[str] = set()
        self._means: dict[str, float] = {}
        self._tokens = OffloadCache(cache_bytes)

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

    def weights(self, name: str, batch: int, call: int) -> Tensor:
        """(tokens,) how much each token of a call counts, 1 in the mean over all batches."""
        values: Tensor = self._tokens.get((name, batch))[call]
        return values / self._means[name] if self._means[name] else torch.ones_like(values)

    def close(self) -> None:
        """Forget the tokens."""
        self._tokens.close()


def measure_sensitivity(
    reader: InputReader, seed: int, progress: bool = False, cache_bytes: int = CACHE_BYTES
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
    gradients = _OutputGradients(reader)
    with ExitStack() as context:
        context.enter_context(_no_parameter_gradients(reader.model))
        for t in reader.targets:
            for module in reader.holders[t.name]:
                Watcher(module, gradients.hook(t), after=True).install(context, None)
        context.enter_context(fail_together())
        bar = Bar(rank_items(range(len(reader.batches))), desc="Sensitivity", progress=progress)
        for index in bar:
            gradients.start_batch()
            generator = torch.Generator().manual_seed(derived_seed(seed, index))
            _run_backwards(reader, index, generator)
            for name, calls in gradients.calls.items():
                sensitivity.add_tokens(name, index, calls)
            gradients.end_batch()
    totals = all_reduce_sum(gradients.totals)
    for t, (total, tokens, routed) in zip(reader.targets, totals.tolist(), strict=True):
        if routed:
            sensitivity.misplaced.add(t.name)
        mean = gradients.output_means(t)
        if not is_finite(mean):
            raise CalibrationError(
                f"the gradient of the predictions at {t.name} is not finite: expected finite values; calibrate in "
                f"float32 or bfloat16, and check the batches"
            )
        sensitivity.add_means(t.name, mean, total / max(1, tokens))
    return sensitivity


def _run_backwards(reader: InputReader, index: int, generator: torch.Generator) -> None:
    batch = reader.batches[index]
    with torch.enable_grad():
        outputs = reader.forward(batch)
        mask = token_mask(reader.model, batch_to_device(reader.model, batch))
        value = sampled_prediction(outputs, mask, generator)
        if not value.requires_grad:
            raise CalibrationError(
                "the model's outputs for a calibration batch depend on none of the weights to be pruned: check "
                "target_modules, and that the model computes with gradients"
            )
        value.backward()


class _OutputGradients:
    """Reads the gradients of the outputs of targets, and adds up their squares.

    Attributes:
        totals: (targets, 3) sum over the tokens, number of tokens, and number of calls on tokens that a router chose.
        calls: By target, (tokens,) squared gradients of each call in the batch that is running.
    """

    def __init__(self, reader: InputReader) -> None:
        self._reader = reader
        self._row = {t.name: i for i, t in enumerate(reader.targets)}
        self._device = next(reader.model.parameters()).device
        self._dtype = accumulate_dtype(self._device)
        self._output_sums: dict[str, Tensor] = {}
        self._slab_tokens = {t.name: torch.zeros(t.slabs, dtype=torch.float64) for t in reader.targets}
        self.totals = torch.zeros(len(reader.targets), 3, dtype=torch.float64)
        self.calls: dict[str, list[Tensor]] = {}

    def start_batch(self) -> None:
        self.calls = {}

    def end_batch(self) -> None:
        for name, calls in self.calls.items():
            self.totals[self._row[name], :2] += torch.tensor(
                [sum(float(values.sum()) for values in calls), sum(map(len, calls))]
            )

    def output_means(self, target: Target) -> Tensor:
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

    def hook(self, target: Target) -> Callable[..., Tensor]:
        """A hook on the output of a target."""
        name, layout, padding = target.name, target.layout, self._reader.padding

        def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
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


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient; afterwards the same ones do as before."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
