"""Calibration: batches through the dense model, statistics of its targets out."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.activations import NO_BATCHES, Batches, InputReader
from hf_prune.criteria.base import GRADIENTS, INPUTS, LABELLED, WeightStats
from hf_prune.distributed import add_up, all_or_none, check_same_batches, processes, share
from hf_prune.errors import CalibrationError
from hf_prune.plan import PruningPlan
from hf_prune.progress import Bar
from hf_prune.running import batches_of, eval_mode, on_device, run_model
from hf_prune.sensitivity import prediction, token_mask
from hf_prune.sums import sum_dtype
from hf_prune.targets import is_finite

_IGNORED = -100  # a label that is padding


def collect_stats(
    model: nn.Module, plan: PruningPlan, calibration: Batches | None = None, progress: bool = False
) -> dict[str, WeightStats]:
    """Gather what the plan needs to know of every target, on the model as it is.

    Statistics of the inputs are gathered for all targets at once, whatever the plan's ``calibration_order``; see
    :func:`hf_prune.sequential.prune_in_order` for the other one. Blocks of the Fisher matrix are not gathered here, but
    a few weights at a time by :func:`hf_prune.fisher.prune_by_fisher`.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        plan: Which targets and which criterion.
        calibration: Mappings of tensors that the model takes as keyword arguments, as a DataLoader yields them;
            with labels where the gradients of whole batches are needed. Only read if the plan needs them.
        progress: Show a progress bar.

    Returns:
        Statistics by parameter name; matrices are canonical (out, in).

    Raises:
        CalibrationError: If batches are needed and missing, empty, without labels, or give a loss or
            gradients that are not finite.
    """
    needs = plan.needs
    found: dict[str, dict[str, Any]] = {t.target.name: {} for t in plan.tensors}
    if needs:
        batches = require_batches(plan, calibration)
        if needs & GRADIENTS and needs & INPUTS:
            batches = list(batches)  # read twice
        sums: dict[str, dict[str, Tensor]] = {}
        if gradients := needs & LABELLED:
            sums = _gradients(model, plan, batches, gradients, progress)
        if "squared_gradient" in needs:
            names = [t.target.name for t in plan.tensors]
            sums["squared_gradient"] = squared_gradients(model, names, batches, plan.config.seed, progress)
        for t in plan.tensors:
            for need, tensors in sums.items():
                found[t.target.name][need] = t.target.matrix(tensors[t.target.name])
        if inputs := needs & INPUTS:
            with InputReader(model, plan, batches) as reader:
                reader.order()
                for name, tensors in reader.gather(plan.tensors, inputs, progress=progress).items():
                    found[name].update(tensors)
    return {name: WeightStats(seed=weight_seed(plan, name), **values) for name, values in found.items()}


def weight_seed(plan: PruningPlan, name: str) -> int:
    """A weight's own seed, from the config's seed and the parameter's name."""
    return zlib.crc32(f"{plan.config.seed}:{name}".encode())


def require_batches(plan: PruningPlan, calibration: Batches | None) -> Batches:
    """The batches, if there are any; the same ones in every process.

    Raises:
        CalibrationError: If there are none, or the processes have different ones.
    """
    with all_or_none():
        found = _require_batches(plan, calibration)
    check_same_batches(found)
    return found


def _require_batches(plan: PruningPlan, calibration: Batches | None) -> Batches:
    if calibration is None:
        config = plan.config
        who = f"criterion {config.criterion!r}" if plan.criterion.needs else f"repair={config.repair!r}"
        who = who if plan.needs else f"allocation={config.allocation!r}" if config.learns_allocation else "polish"
        labels = " and labels" if plan.needs & LABELLED else ""
        raise CalibrationError(
            f"{who} needs calibration data, and got none: pass calibration=batches, "
            f"an iterable of dicts with the model's inputs{labels}"
        )
    batches: Batches = batches_of(calibration)
    return batches if processes()[1] == 1 else list(batches)


def _gradients(
    model: nn.Module, plan: PruningPlan, calibration: Batches, needs: frozenset[str], progress: bool
) -> dict[str, dict[str, Tensor]]:
    """Mean gradients and mean absolute gradients of the targets, weighted by the examples in each batch."""
    parameters = dict(model.named_parameters())
    wanted = [t.target.name for t in plan.tensors]
    dtype = sum_dtype(parameters[wanted[0]].device)
    sums = {n: {name: torch.zeros_like(parameters[name], dtype=dtype) for name in wanted} for n in needs}
    examples = 0
    with differentiable(model, wanted), all_or_none():
        for batch in Bar(share(calibration), desc="Calibrating", progress=progress):
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
    every = int(add_up(torch.tensor(examples)))
    if every == 0:
        raise CalibrationError(NO_BATCHES)
    means = {}
    for name, total in sums.items():
        means[name] = add_up(total).div_(every).float()
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
    dtype = sum_dtype(parameters[names[0]].device)
    sums = {name: torch.zeros_like(parameters[name], dtype=dtype) for name in names}
    examples = 0
    with differentiable(model, names), all_or_none():
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

    The predictions are the model's own, see :func:`hf_prune.sensitivity.prediction`: tokens drawn from a language
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
    numbered = share(enumerate(batches))
    for number, batch in Bar(numbered, desc="Calibrating", progress=progress):
        for i, example in enumerate(_examples(on_device(model, batch))):
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
    inputs = on_device(model, batch)
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
