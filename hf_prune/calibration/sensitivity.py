"""How much a model's predictions depend on what each target puts out, token by token; no labels are needed.

Let y be what a target puts out for one token, and g the gradient of the predictions with respect to it. A small change
d of y then changes the predictions by (g · d)² in the mean, the Gauss-Newton (or Fisher) approximation. Here g² is kept
as a product of two shares, one of the token and one of the output (the diagonal of the factors of Martens and Grosse
2015, arXiv:1503.05671), which is all that a layer-wise method can use without giving up its one Gram matrix for all
outputs.

"The predictions" are what comes out at the end: for a language model the distribution of the next token, with labels
sampled from the model itself (the Fisher information); for any other model its logits, or else its first output,
projected on random directions (the Gauss-Newton matrix of their squared change, by Hutchinson's estimator). The second
does not fade where a classifier is sure of itself, as it is on sentences that it was trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import CACHE_BYTES, InputReader
from hf_prune.calibration.padding import first_input, first_tensor
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import is_finite, output_rows
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar


class Sensitivity:
    """Squared gradients of the predictions with respect to what targets put out.

    Attributes:
        outputs: (out,) mean over the tokens, by parameter name, float32.
        misplaced: Names of targets whose tokens cannot be told apart: those of experts, which get any of them.
    """

    def __init__(self, cache_bytes: int) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.misplaced: set[str] = set()
        self._means: dict[str, float] = {}
        self._tokens = OffloadCache(cache_bytes)

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
    """One pass forwards and backwards over all batches, on the model as it is.

    Args:
        reader: Has the model, the targets and the batches, inside its context; blocks are all computed.
        seed: Of labels and directions.
        progress: Show a progress bar.
        cache_bytes: How much is kept in memory; the rest goes to a temporary folder.

    Raises:
        CalibrationError: If a gradient is not finite, or the predictions depend on no target.
    """
    found = Sensitivity(cache_bytes)
    dtype = accumulate_dtype(next(reader.model.parameters()).device)
    sums: dict[str, Tensor] = {}
    # Sum over the tokens, how many, and how many calls got tokens that a router chose.
    totals = torch.zeros(len(reader.tensors), 3, dtype=torch.float64)
    calls: dict[str, list[Tensor]] = {}
    number = {t.target.name: i for i, t in enumerate(reader.tensors)}

    def watch(name: str, layout: str) -> Callable[..., Tensor]:
        def put(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
            x = first_input(args, kwargs)
            mask = None if layout == "conv" else reader.padding.mask(module, x)
            if not reader.padding.in_place(x, layout):
                totals[number[name], 2] += 1
            position, seen = len(calls.setdefault(name, [])), calls[name]
            tokens = output_rows(output, layout)
            seen.append(torch.zeros(int(mask.sum()) if mask is not None else len(tokens)))

            def read(gradient: Tensor) -> None:
                rows = output_rows(gradient, layout)
                square = (rows if mask is None else rows[mask]).float().square()  # (tokens, out)
                seen[position] = square.sum(1).cpu()
                sums[name] = sums.get(name, 0) + square.sum(0, dtype=dtype)

            own = output if output.requires_grad else output.detach().requires_grad_()
            own = own.clone()  # a later operation in place does not change what the gradient is of
            own.register_hook(read)
            return own

        return put

    with ExitStack() as context:
        context.enter_context(_no_parameter_gradients(reader.model))
        for t in reader.tensors:
            for module in reader.holders[t.target.name]:
                Watcher(module, watch(t.target.name, t.target.layout), after=True).install(context, None)
        context.enter_context(fail_together())
        bar = Bar(rank_items(range(len(reader.batches))), desc="Sensitivity", progress=progress)
        for index in bar:
            calls.clear()
            batch = reader.batches[index]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{index}".encode()))
            with torch.enable_grad():
                outputs = reader.forward(batch)
                value = prediction(outputs, token_mask(reader.model, batch_to_device(reader.model, batch)), generator)
                if not value.requires_grad:
                    raise CalibrationError(
                        "what the model puts out for a calibration batch depends on none of the weights to be pruned: "
                        "check target_modules, and that the model computes with gradients"
                    )
                value.backward()
            for name, values in calls.items():
                found._tokens.put((name, index), values)
                totals[number[name], :2] += torch.tensor([sum(float(v.sum()) for v in values), sum(map(len, values))])
    totals = all_reduce_sum(totals)
    for t in reader.tensors:
        name = t.target.name
        total, tokens, routed = totals[number[name]].tolist()
        if routed:
            found.misplaced.add(name)
        zeros = torch.zeros(t.target.matrix_shape[0], dtype=dtype, device=next(reader.model.parameters()).device)
        mean = all_reduce_sum(sums.get(name, zeros)) / max(1, tokens)
        if not is_finite(mean):
            raise CalibrationError(
                f"the gradient of the predictions at {name} is not finite: expected finite values; calibrate in "
                f"float32 or bfloat16, and check the batches"
            )
        found.outputs[name] = mean.float()
        found._means[name] = total / max(1, tokens)
    return found


def prediction(outputs: Any, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """A scalar whose squared gradients have the mean that :class:`Sensitivity` is after.

    Args:
        outputs: What a model returned.
        mask: (batch, seq), 0 for the tokens whose predictions do not count; None if all do.
        generator: Draws labels and directions, on the CPU.

    Raises:
        CalibrationError: If there is nothing finite to draw labels from.
    """
    known = _by_name(outputs)
    named = any(key.endswith("logits") for key in known)
    total: Tensor = torch.zeros(())
    for values in named_logits(outputs):
        y = values.float()
        if not bool(torch.isfinite(y.detach()).all()):
            raise CalibrationError(
                "what the model puts out for a calibration batch is not finite: calibrate in float32 or bfloat16, and "
                "check the batches"
            )
        if named and y.dim() == 3 and y.shape[-1] > 1:  # (batch, seq, classes)
            logs = y.log_softmax(-1)
            flat = logs.detach().exp().reshape(-1, y.shape[-1]).cpu()
            labels = torch.multinomial(flat, 1, generator=generator).view(*y.shape[:2], 1).to(y.device)
            y = logs.gather(-1, labels)  # (batch, seq, 1)
            direction = torch.ones_like(y)
        else:
            direction = torch.randn(y.shape, generator=generator).to(y.device)
            if named and y.dim() == 2 and y.shape[-1] > 1:  # (batch, classes): what all classes gain changes nothing
                direction = direction - direction.mean(-1, keepdim=True)
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        if mask is not None and y.dim() == 3 and mask.shape == y.shape[:2]:
            direction = direction * mask.to(y.device)[..., None]
        total = total.to(y.device) + (y * direction).sum()
    return total


def token_mask(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Which of the tokens that a model makes predictions for are no padding: (batch, seq), None if it is not said."""
    side = "decoder_" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else ""
    mask = batch.get(f"{side}attention_mask")
    return mask if isinstance(mask, Tensor) else None


def named_logits(outputs: Any) -> list[Tensor]:
    """All logits that a model returned, or else its first output."""
    known = _by_name(outputs)
    logits = [value for key, value in known.items() if key.endswith("logits") and isinstance(value, Tensor)]
    return logits or [first_tensor(next(iter(known.values())) if known else outputs)]


def _by_name(outputs: Any) -> Mapping[str, Any]:
    if isinstance(outputs, Mapping):
        return outputs
    return {} if isinstance(outputs, Tensor | tuple | list) else getattr(outputs, "__dict__", {})


@contextmanager
def _no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; afterwards those that did ask again."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
