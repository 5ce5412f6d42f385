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
from hf_prune.calibration.batches import IGNORED, NO_BATCHES, Batches
from hf_prune.calibration.losses import NOT_FINITE, LabelledLoss, example_loss, split_examples
from hf_prune.calibration.output_head import HeadFinder
from hf_prune.criteria.base import derived_seed
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import is_finite
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, eval_mode, run_model
from hf_prune.utils.progress import Bar


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
    by_name = dict(model.named_parameters())
    parameters = {name: by_name[name] for name in names}
    sums = GradientSums(parameters, needs)
    sizes = []
    find_head = HeadFinder(model)
    with differentiable(model, names), fail_together():
        for batch in Bar(rank_items(batches), desc="Calibrating", progress=progress):
            size, gradients = _loss_gradients(model, batch, list(parameters.values()), find_head)
            sizes.append(size)
            sums.add(gradients, size)
    return sums.means(count_labelled(sizes))


def count_labelled(sizes: Collection[int]) -> int:
    """The number of examples of this process, given those of each of its batches: 0 where no label counts.

    Raises:
        CalibrationError: If no label counts in any batch of any process.
    """
    examples = sum(sizes)
    labelled, unlabelled = all_reduce_sum(torch.tensor([examples, sum(size == 0 for size in sizes)])).tolist()
    if unlabelled and not labelled:
        raise CalibrationError(
            f"{NOT_FINITE.format(math.nan)}, and no label counts in any of the {unlabelled} batches: expected token "
            f"ids as labels, and {IGNORED} only where a token is not to be predicted"
        )
    return examples


class GradientSums:
    """Sums of the gradients of some parameters.

    Args:
        parameters: The parameters by name.
        needs: What is added up: ``"gradient"``, ``"absolute_gradient"``, ``"squared_gradient"`` or several of them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], needs: Collection[str]) -> None:
        self._totals = {
            need: {name: torch.zeros_like(p, dtype=accumulate_dtype(p.device)) for name, p in parameters.items()}
            for need in needs
        }

    def add(self, gradients: Sequence[Tensor | None], size: int = 1) -> None:
        """Add gradients, in the order of the parameters, None where there is none.

        Args:
            gradients: Of one batch, or of one example.
            size: How many examples they stand for.
        """
        for need, totals in self._totals.items():
            for total, gradient in zip(totals.values(), gradients, strict=True):
                if gradient is None:
                    continue
                if need == "squared_gradient":
                    total.add_(gradient.float() ** 2)
                else:
                    total.add_(gradient if need == "gradient" else gradient.abs(), alpha=size)

    def means(self, examples: int) -> dict[str, dict[str, Tensor]]:
        """By what is needed, :func:`mean_over_examples`; the sums are gone then."""
        return {need: mean_over_examples(totals, examples) for need, totals in self._totals.items()}


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
    by_name = dict(model.named_parameters())
    sums = GradientSums({name: by_name[name] for name in names}, ["squared_gradient"])
    examples = 0
    with differentiable(model, names), fail_together():
        for _, gradients in example_gradients(model, names, batches, seed, progress):
            examples += 1
            sums.add(gradients)
    return sums.means(examples)["squared_gradient"]


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
        for i, example in enumerate(split_examples(model, batch_to_device(model, batch))):
            generator = torch.Generator().manual_seed(derived_seed(seed, number, i))
            loss = example_loss(model, partial(run_model, model), example, generator, find_head(example))
            yield number, torch.autograd.grad(loss, parameters, allow_unused=True)


def _loss_gradients(
    model: nn.Module, batch: Mapping[str, Any], parameters: Sequence[Tensor], find_head: HeadFinder
) -> tuple[int, Sequence[Tensor | None]]:
    """The number of examples in a batch, 0 if no label counts, and the gradients of the loss."""
    inputs = batch_to_device(model, batch)
    loss = LabelledLoss(model, inputs, find_head(inputs))
    gradients: list[Tensor | None] = [None] * len(parameters)
    for window in loss.windows:
        if (value := loss.of(partial(run_model, model), window)) is None:
            return 0, gradients
        for i, part in enumerate(torch.autograd.grad(value, parameters, allow_unused=True)):
            if part is not None:
                gradients[i] = part if (total := gradients[i]) is None else total.add_(part)
    return loss.examples, gradients
