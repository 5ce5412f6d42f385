"""A model's own predictions as a scalar to differentiate; no labels are needed.

Its squared gradients are those of the Fisher matrix in the mean: for a language model, with labels sampled from the
predicted distributions of the next token (the Fisher information); for any other model, of its logits, or else of its
first output, projected on random directions (the Gauss-Newton matrix of their squared change, by Hutchinson's
estimator). The second does not fade where a classifier is sure of itself, as on sentences that it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.padding import first_tensor
from hf_prune.errors import CalibrationError
from hf_prune.kernels.chunked_logits import draw, rows_of_chunk
from hf_prune.kernels.matrix import is_finite
from hf_prune.utils.forward import is_encoder_decoder


def sampled_prediction(outputs: Any, mask: Tensor | None, generator: torch.Generator) -> Tensor:
    """A scalar whose squared gradients have the Fisher or Gauss-Newton matrix as their mean.

    Args:
        outputs: What a model returned.
        mask: (batch, seq), 0 for the tokens whose predictions do not count; None if all do.
        generator: Draws labels and directions, on the CPU.

    Raises:
        CalibrationError: If the outputs are not finite.
    """
    by_name = _by_name(outputs)
    has_logits = any(key.endswith("logits") for key in by_name)
    total: Tensor = torch.zeros(())
    for values in named_logits(outputs):
        y = values.float()
        check_finite(y.detach())
        if has_logits and y.dim() == 3 and y.shape[-1] > 1:  # (batch, seq, classes)
            y = _SampledLogProbability.apply(y, generator)  # (batch, seq, 1)
            direction = torch.ones_like(y)
        else:
            direction = torch.randn(y.shape, generator=generator).to(y.device)
            if has_logits and y.dim() == 2 and y.shape[-1] > 1:  # (batch, classes): a shift of all classes is no change
                direction = direction - direction.mean(-1, keepdim=True)
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        if mask is not None and y.dim() == 3 and mask.shape == y.shape[:2]:
            direction = direction * mask.to(y.device)[..., None]
        total = total.to(y.device) + (y * direction).sum()
    return total


class _SampledLogProbability(torch.autograd.Function):
    """Log-probabilities of classes drawn from logits, a few rows at a time: of many classes, a copy fills memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(batch, seq, 1) from (batch, seq, classes)."""
        rows = logits.reshape(-1, logits.shape[-1])
        drawn, logs = [], []
        for part in rows.split(rows_of_chunk(rows.shape[1])):
            log_softmax = part.log_softmax(-1)
            drawn.append(draw(log_softmax.exp(), generator))
            logs.append(log_softmax.gather(1, drawn[-1]))
        labels = torch.cat(drawn)
        ctx.save_for_backward(logits, labels)
        return torch.cat(logs).view(*logits.shape[:2], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of a log-probability: one for the class that was drawn, minus all probabilities."""
        logits, labels = ctx.saved_tensors
        scale = gradients[0].reshape(-1, 1)
        result = logits.reshape(-1, logits.shape[-1]).softmax(-1).mul_(-scale)
        return result.scatter_add_(1, labels, scale).view(logits.shape), None


def check_finite(outputs: Tensor) -> None:
    """Make sure that what a model returned is finite.

    Raises:
        CalibrationError: If it is not.
    """
    if not is_finite(outputs):
        raise CalibrationError(
            "the model's outputs for a calibration batch are not finite: calibrate in float32 or bfloat16, and "
            "check the batches"
        )


def token_mask(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """The mask of the tokens that a model makes predictions for: (batch, seq), or None if the batch has none."""
    side = "decoder_" if is_encoder_decoder(model) else ""
    mask = batch.get(f"{side}attention_mask")
    return mask if isinstance(mask, Tensor) else None


def named_logits(outputs: Any) -> list[Tensor]:
    """All logits that a model returned, or else its first output."""
    by_name = _by_name(outputs)
    logits = [value for key, value in by_name.items() if key.endswith("logits") and isinstance(value, Tensor)]
    return logits or [first_tensor(next(iter(by_name.values())) if by_name else outputs)]


def _by_name(outputs: Any) -> Mapping[str, Any]:
    if isinstance(outputs, Mapping):
        return outputs
    return {} if isinstance(outputs, Tensor | tuple | list) else getattr(outputs, "__dict__", {})
