"""Gradients of a loss or of what the model predicts, batch by batch or example by example."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.input_reader import NO_BATCHES, Batches
from hf_prune.calibration.sensitivity import prediction, token_mask
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import is_finite
from hf_prune.planning.plan import PruningPlan
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, eval_mode, run_model
from hf_prune.utils.progress import Bar

_IGNORED = -100  # a label that is padding


def sum_gradients(
    model: nn.Module, plan: PruningPlan, calibration: Batches, needs: frozenset[str], progress: bool
) -> dict[str, dict[str, Tensor]]:
    """Mean gradients and mean absolute gradients of the targets, weighted by the examples in each batch."""
    parameters = dict(model.named_parameters())
    wanted = [t.target.name for t in plan.tensors]
    dtype = accumulate_dtype(parameters[wanted[0]].device)
    sums = {n: {name: torch.zeros_like(parameters[name], dtype=dtype) for name in wanted} for n in needs}
    examples = 0
    with differentiable(model, wanted), fail_together():
        for batch in Bar(rank_items(calibration), desc="Calibrating", progress=progress):
            size, loss = _loss(model, batch)
            batch_gradients = torch.autograd.grad(loss, [parameters[name] for name in wanted], allow_unused=True)
            examples += size
            for name, gradient in zip(wanted, batch_gradients, strict=True):
                if gradient is None:
                    continue
                if "gradient" in sums:
                    sums["gradient"][name].add_(gradient, alpha=size)
                if "absolute_gradient" in sums:
                    sums["absolute_gradient"][name].add_(gradient.abs(), alpha=size)
    return {need: mean_over_examples(tensors, examples) for need, tensors in sums.items()}


@contextmanager
def differentiable(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Eval mode inside, and gradients for the named parameters alone; everything as it was afterwards."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        with eval_mode(model):
            yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)


def mean_over_examples(sums: Mapping[str, Tensor], examples: int) -> dict[str, Tensor]:
    """Sums of what gradients give, over all processes and divided by the number of examples, float32.

    Args:
        sums: By parameter name; they may be changed.
        examples: How many this process has seen.

    Raises:
        CalibrationError: If there were none, or a sum is not finite.
    """
    every = int(all_reduce_sum(torch.tensor(examples)))
    if every == 0:
        raise CalibrationError(NO_BATCHES)
    means = {}
    for name, total in sums.items():
        means[name] = all_reduce_sum(total).div_(every).float()
        if not is_finite(means[name]):
            raise CalibrationError(
                f"the gradient of {name} is not finite: expected finite values; calibrate in float32 or bfloat16, "
                f"and check the batches"
            )
    return means


def squared_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, seed: int = 0, progress: bool = False
) -> dict[str, Tensor]:
    """The diagonal of the Fisher matrix: squared gradients of each example's predictions, averaged.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        names: Parameters.
        batches: See :func:`example_gradients`.
        seed: Seed of what is drawn.
        progress: Show a progress bar.

    Returns:
        Tensors like the parameters, float32, by name.

    Raises:
        CalibrationError: As :func:`example_gradients`, or if there are no batches.
    """
    parameters = dict(model.named_parameters())
    dtype = accumulate_dtype(parameters[names[0]].device)
    sums = {name: torch.zeros_like(parameters[name], dtype=dtype) for name in names}
    examples = 0
    with differentiable(model, names), fail_together():
        for _, gradients in example_gradients(model, names, batches, seed, progress):
            examples += 1
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    sums[name].add_(gradient.float() ** 2)
    return mean_over_examples(sums, examples)


def example_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, seed: int = 0, progress: bool = False
) -> Iterator[tuple[int, tuple[Tensor | None, ...]]]:
    """The gradient of each example's predictions, this process's share of the batches, one example after the other.

    The predictions are the model's own, see :func:`prediction`: tokens drawn from a language
    model, and of a classifier its logits along random directions. Labels have no say: where a model was fine-tuned on
    them, next to no gradient of their loss is left. A weight that the model uses several times has one gradient, the
    sum over its uses.

    Args:
        model: The model, in eval mode, whose named parameters require gradients.
        names: Parameters.
        batches: Mappings of tensors that the model takes as keyword arguments; those with several examples are split
            along the first dimension of every tensor.
        seed: With the number of the batch and of the example in it, the seed of what is drawn.
        progress: Show a progress bar.

    Yields:
        The number of the batch, and the gradients in the order of ``names``, None where the loss depends on none.

    Raises:
        CalibrationError: If a batch cannot be split, or what the model puts out is not finite or depends on no weight.
    """
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    numbered = rank_items(enumerate(batches))
    for number, batch in Bar(numbered, desc="Calibrating", progress=progress):
        for i, example in enumerate(_examples(batch_to_device(model, batch))):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{number}:{i}".encode()))
            loss = _example_loss(model, example, generator)
            yield number, torch.autograd.grad(loss, wanted, allow_unused=True)


def _examples(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A batch as batches of one example each."""
    size = len(batched(batch))
    for key, value in batch.items():
        if size > 1 and isinstance(value, Tensor) and value.dim() > 0 and len(value) != size:
            raise CalibrationError(
                f"a calibration batch of {size} examples holds {key!r} of shape {tuple(value.shape)}, and gradients "
                f"are needed of each example: expected {size} as the first dimension of every tensor; pass batches of "
                f"one example"
            )
    for i in range(size):
        split = slice(i, i + 1) if size > 1 else slice(None)
        yield {k: v[split] if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in batch.items()}


def _example_loss(model: nn.Module, inputs: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    inputs = _without_labels(model, inputs)
    with torch.enable_grad():
        return _checked(prediction(run_model(model, inputs), token_mask(model, inputs), generator))


def _without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model needs for its predictions; the inputs of a decoder beside an encoder are the labels, shifted."""
    found = {name: value for name, value in inputs.items() if name != "labels"}
    labels = inputs.get("labels")
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if labels is None or not decodes or {"decoder_input_ids", "decoder_inputs_embeds"} & found.keys():
        return found
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:  # the model shifts them itself, or reads something else: its predictions are as they are
        return dict(inputs)
    found["decoder_input_ids"] = shift(labels=labels)
    if "decoder_attention_mask" not in found and bool((labels == _IGNORED).any()):
        found["decoder_attention_mask"] = (labels != _IGNORED).long()
    return found


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[int, Tensor]:
    inputs = batch_to_device(model, batch)
    with torch.enable_grad():
        loss = getattr(run_model(model, inputs), "loss", None)
    if loss is None:
        raise CalibrationError(
            f"the model returned no loss for a batch with {', '.join(sorted(inputs))}: "
            f"expected the labels among them, usually under 'labels'"
        )
    return len(batched(inputs)), _checked(loss)


def _checked(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss):
        raise CalibrationError(f"the loss of a calibration batch is {loss.item()}: expected a finite number")
    if not loss.requires_grad:
        raise CalibrationError(
            "the loss of a calibration batch depends on none of the weights to be pruned: check target_modules, and "
            "that the model computes with gradients"
        )
    return loss


def batched(inputs: Mapping[str, Any]) -> Tensor:
    """An input whose first dimension counts the examples: the labels, or else the first tensor."""
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 0}
    if not tensors:
        raise CalibrationError(
            f"a calibration batch holds no tensors (found: {', '.join(inputs) or 'nothing'}): expected model inputs"
        )
    return tensors.get("labels", next(iter(tensors.values())))
