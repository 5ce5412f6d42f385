"""Gradients of a loss or of the model's own predictions, batch by batch or example by example."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.batches import IGNORED, NO_BATCHES, Batches, count_examples, small_batches, without_labels
from hf_prune.calibration.output_head import HeadFinder, sampled_by
from hf_prune.calibration.predictions import token_mask
from hf_prune.criteria.base import derived_seed
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import is_finite
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, eval_mode, run_model
from hf_prune.utils.progress import Bar

_NOT_FINITE = "the loss of a calibration batch is {}: expected a finite number"


def mean_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, needs: frozenset[str], progress: bool | None = None
) -> dict[str, dict[str, Tensor]]:
    """Mean gradients and mean absolute gradients of the loss of labelled batches, weighted by their examples.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        names: Parameters.
        batches: With labels; each process takes its share.
        needs: ``"gradient"``, ``"absolute_gradient"`` or both.
        progress: Show a progress bar.

    Returns:
        By each of ``needs``, tensors like the parameters, float32, by name.

    Raises:
        CalibrationError: If there are no batches, or one gives no loss, or no label counts in any (all are -100), or a
            gradient is not finite.
    """
    parameters = dict(model.named_parameters())
    dtype = accumulate_dtype(parameters[names[0]].device)
    totals = {need: {name: torch.zeros_like(parameters[name], dtype=dtype) for name in names} for need in needs}
    examples = ignored = 0
    find_head = HeadFinder(model)
    with differentiable(model, names), fail_together():
        for batch in Bar(rank_items(batches), desc="Calibrating", progress=progress):
            size, gradients = _loss_gradients(model, batch, [parameters[name] for name in names], find_head)
            examples += size
            ignored += size == 0
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    continue
                if "gradient" in totals:
                    totals["gradient"][name].add_(gradient, alpha=size)
                if "absolute_gradient" in totals:
                    totals["absolute_gradient"][name].add_(gradient.abs(), alpha=size)
    labelled, unlabelled = all_reduce_sum(torch.tensor([examples, ignored])).tolist()
    if unlabelled and not labelled:
        raise CalibrationError(
            f"{_NOT_FINITE.format(math.nan)}, and no label counts in any of the {unlabelled} batches: expected token "
            f"ids as labels, and {IGNORED} only where a token is not to be predicted"
        )
    return {need: mean_over_examples(tensors, examples) for need, tensors in totals.items()}


@contextmanager
def differentiable(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside, eval mode and gradients for the named parameters alone; afterwards everything is as it was."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        with eval_mode(model):
            yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)


@contextmanager
def no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient; afterwards the same ones do as before."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


def mean_over_examples(totals: Mapping[str, Tensor], examples: int) -> dict[str, Tensor]:
    """Add up the sums of all processes, and divide by the number of examples.

    Args:
        totals: Sums over the examples of this process, by parameter name; they may be changed.
        examples: How many examples this process has seen.

    Returns:
        Means by parameter name, float32.

    Raises:
        CalibrationError: If there were no examples, or a sum is not finite.
    """
    all_examples = int(all_reduce_sum(torch.tensor(examples)))
    if all_examples == 0:
        raise CalibrationError(NO_BATCHES)
    means = {}
    for name, total in totals.items():
        means[name] = all_reduce_sum(total).div_(all_examples).float()
        if not is_finite(means[name]):
            raise CalibrationError(
                f"the gradient of {name} is not finite: expected finite values; calibrate in float32 or bfloat16, "
                f"and check the batches"
            )
    return means


def squared_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, seed: int = 0, progress: bool | None = None
) -> dict[str, Tensor]:
    """The diagonal of the Fisher matrix: the mean squared gradient of each example's predictions.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        names: Parameters.
        batches: See :func:`example_gradients`.
        seed: Seed of random labels and directions.
        progress: Show a progress bar.

    Returns:
        Tensors like the parameters, float32, by name.

    Raises:
        CalibrationError: As :func:`example_gradients`, or if there are no batches.
    """
    parameters = dict(model.named_parameters())
    dtype = accumulate_dtype(parameters[names[0]].device)
    totals = {name: torch.zeros_like(parameters[name], dtype=dtype) for name in names}
    examples = 0
    with differentiable(model, names), fail_together():
        for _, gradients in example_gradients(model, names, batches, seed, progress):
            examples += 1
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    totals[name].add_(gradient.float() ** 2)
    return mean_over_examples(totals, examples)


def example_gradients(
    model: nn.Module, names: Sequence[str], batches: Batches, seed: int = 0, progress: bool | None = None
) -> Iterator[tuple[int, tuple[Tensor | None, ...]]]:
    """The gradient of each example's predictions, one example after the other, for this process's share of the batches.

    The predictions are the model's own, see :func:`~hf_prune.calibration.predictions.sampled_prediction`: tokens drawn
    from a language model, and the logits of a classifier along random directions. Labels are ignored: a model that was
    fine-tuned on them has next to no gradient of their loss left. A weight that the model uses several times has one
    gradient, the sum over its uses.

    Args:
        model: The model, in eval mode, whose named parameters require gradients.
        names: Parameters.
        batches: Mappings of tensors that the model takes as keyword arguments; those with several examples are split
            along the first dimension of every tensor.
        seed: With the number of the batch and of the example in it, the seed of random labels and directions.
        progress: Show a progress bar.

    Yields:
        The number of the batch, and the gradients in the order of ``names``, None where the loss depends on none.

    Raises:
        CalibrationError: If a batch cannot be split, or the outputs are not finite or depend on no weight.
    """
    by_name = dict(model.named_parameters())
    parameters = [by_name[name] for name in names]
    find_head = HeadFinder(model)
    numbered = rank_items(enumerate(batches))
    for number, batch in Bar(numbered, desc="Calibrating", progress=progress):
        for i, example in enumerate(_examples(batch_to_device(model, batch))):
            generator = torch.Generator().manual_seed(derived_seed(seed, number, i))
            loss = _example_loss(model, example, generator, find_head)
            yield number, torch.autograd.grad(loss, parameters, allow_unused=True)


def _examples(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A batch as batches of one example each."""
    size = count_examples(batch)
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


def _example_loss(
    model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator, find_head: HeadFinder
) -> Tensor:
    inputs = without_labels(model, batch)
    mask, head = token_mask(model, inputs), find_head(inputs)
    with torch.enable_grad():
        return _checked(sampled_by(head, partial(run_model, model), inputs, mask, generator))


def _loss_gradients(
    model: nn.Module, batch: Mapping[str, Any], parameters: Sequence[Tensor], find_head: HeadFinder
) -> tuple[int, Sequence[Tensor | None]]:
    """The number of examples in a batch, and the gradients of the loss that the model computes from its labels.

    A batch in which no label counts has no loss, and therefore no weight: 0 examples.
    """
    nothing: list[Tensor | None] = [None] * len(parameters)
    inputs = batch_to_device(model, batch)
    size = count_examples(inputs)
    if (head := find_head(inputs)) is None or "labels" not in inputs:
        with torch.enable_grad():
            loss = getattr(run_model(model, inputs), "loss", None)
        if loss is None:
            raise CalibrationError(
                f"the model returned no loss for a batch with {', '.join(sorted(inputs))}: "
                f"expected the labels among them, usually under 'labels'"
            )
        if loss.isnan().all() and _all_ignored(inputs.get("labels")):
            return 0, nothing
        return size, torch.autograd.grad(_checked(loss), parameters, allow_unused=True)
    if (counted := int((inputs["labels"][:, 1:] != IGNORED).sum())) == 0:
        return 0, nothing
    gradients = nothing
    for window in small_batches(model, inputs):
        with torch.enable_grad():
            loss = _checked(head.cross_entropy(partial(run_model, model), window)[0] / counted)
        for i, part in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
            if part is not None:
                gradients[i] = part if (total := gradients[i]) is None else total.add_(part)
    return size, gradients


def _all_ignored(labels: Any) -> bool:
    """Whether no label is one that a token is to be predicted for; the first of a causal language model is not."""
    return isinstance(labels, Tensor) and labels.dim() == 2 and bool((labels[:, 1:] == IGNORED).all())


def _checked(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss):
        raise CalibrationError(_NOT_FINITE.format(loss.item()))
    if not loss.requires_grad:
        raise CalibrationError(
            "the loss of a calibration batch depends on none of the weights to be pruned: check target_modules, and "
            "that the model computes with gradients"
        )
    return loss
