"""Calibration: labelled batches through the model, gradients of its targets out."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.criteria.base import WeightStats
from hf_prune.errors import CalibrationError
from hf_prune.plan import PruningPlan
from hf_prune.targets import is_finite

Batches = Iterable[Mapping[str, Any]]


def collect_stats(
    model: nn.Module, plan: PruningPlan, calibration: Batches | None = None, progress: bool = False
) -> dict[str, WeightStats]:
    """Gather what the plan's criterion needs to know of every target.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        plan: Which targets and which criterion.
        calibration: Batches with labels: mappings of tensors that the model takes as keyword arguments, as a
            DataLoader yields them. Only read if the criterion needs it.
        progress: Show a progress bar.

    Returns:
        Statistics by parameter name; matrices are canonical (out, in).

    Raises:
        CalibrationError: If batches are needed and missing, empty, without labels, or give a loss or
            gradients that are not finite.
    """
    needs = plan.criterion.needs
    gradients: dict[str, dict[str, Tensor]] = {}
    if needs:
        if calibration is None:
            raise CalibrationError(
                f"criterion {plan.config.criterion!r} needs calibration data, and got none: pass calibration=batches, "
                f"an iterable of dicts with the model's inputs and labels"
            )
        gradients = _gradients(model, plan, calibration, needs, progress)
    return {
        t.target.name: WeightStats(
            seed=zlib.crc32(f"{plan.config.seed}:{t.target.name}".encode()),
            **{need: t.target.matrix(gradients[need][t.target.name]) for need in needs},
        )
        for t in plan.tensors
    }


def _gradients(
    model: nn.Module, plan: PruningPlan, calibration: Batches, needs: frozenset[str], progress: bool
) -> dict[str, dict[str, Tensor]]:
    """Mean gradients and mean absolute gradients of the targets, weighted by the examples in each batch."""
    parameters = dict(model.named_parameters())
    wanted = [t.target.name for t in plan.tensors]
    sums = {n: {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in wanted} for n in needs}
    examples = 0
    modes = {module: module.training for module in model.modules()}
    required = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        model.eval()
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in sums[next(iter(needs))])
        hidden = None if progress else True  # None: shown on a terminal
        for batch in tqdm(calibration, desc="Calibrating", unit="batch", leave=False, disable=hidden):
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
    finally:
        for module, training in modes.items():
            module.training = training
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
    if examples == 0:
        raise CalibrationError("calibration has no batches: expected at least one; a used-up generator yields none")
    for tensors in sums.values():
        for name, tensor in tensors.items():
            if not is_finite(tensor.div_(examples)):
                raise CalibrationError(
                    f"the gradient of {name} is not finite: expected finite values; calibrate in float32 or bfloat16, "
                    f"and check the batches"
                )
    return sums


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[int, Tensor]:
    if not isinstance(batch, Mapping):
        raise CalibrationError(f"a calibration batch is a {type(batch).__name__}: expected a dict of model inputs")
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    with torch.enable_grad():
        loss = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise CalibrationError(
            f"the model returned no loss for a batch with {', '.join(sorted(inputs))}: "
            f"expected the labels among them, usually under 'labels'"
        )
    if not torch.isfinite(loss):
        raise CalibrationError(f"the loss of a calibration batch is {loss.item()}: expected a finite number")
    if not loss.requires_grad:
        raise CalibrationError(
            "the loss of a calibration batch depends on none of the weights to be pruned: check target_modules, and "
            "that the model computes with gradients"
        )
    return len(_batched(inputs)), loss


def _batched(inputs: Mapping[str, Any]) -> Tensor:
    """An input whose first dimension counts the examples: the labels, or else the first tensor."""
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 0}
    if not tensors:
        raise CalibrationError(
            f"a calibration batch holds no tensors (found: {', '.join(inputs)}): expected model inputs"
        )
    return tensors.get("labels", next(iter(tensors.values())))
