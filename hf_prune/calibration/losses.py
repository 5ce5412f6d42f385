"""What gradients are taken of: the loss of labelled batches, or an example's own predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import IGNORED, count_examples, small_batches, without_labels
from hf_prune.calibration.output_head import OutputHead, Run, sampled_by
from hf_prune.calibration.predictions import token_mask
from hf_prune.errors import CalibrationError

NOT_FINITE = "the loss of a calibration batch is {}: expected a finite number"


def split_examples(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A batch as batches of one example each, without labels.

    Raises:
        CalibrationError: If a tensor in it cannot be split.
    """
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
        example = {k: v[split] if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in batch.items()}
        yield without_labels(model, example)


def example_loss(
    model: nn.Module, run: Run, example: Mapping[str, Any], generator: torch.Generator, head: OutputHead | None
) -> Tensor:
    """What :func:`example_gradients` takes gradients of.

    Args:
        model: The model.
        run: Runs it on an example.
        example: As :func:`split_examples` gives it.
        generator: Draws labels and directions.
        head: What a :class:`HeadFinder` finds for the example.

    Raises:
        CalibrationError: If the outputs are not finite, or depend on no weight.
    """
    with torch.enable_grad():
        return _checked(sampled_by(head, run, example, token_mask(model, example), generator))


class LabelledLoss:
    """The loss that a model computes from the labels of a batch, one window after the other where its head is known.

    Args:
        model: The model.
        inputs: The batch, on its device.
        head: What a :class:`HeadFinder` finds for the batch.

    Attributes:
        windows: What runs at once: their losses add up to that of the batch.
        examples: How many there are in the batch.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], head: OutputHead | None) -> None:
        self._head = head if "labels" in inputs else None
        self.windows = [dict(inputs)] if self._head is None else small_batches(model, inputs)
        self.examples = count_examples(inputs)
        self._counted = 0 if self._head is None else int((inputs["labels"][:, 1:] != IGNORED).sum())

    def of(self, run: Run, window: Mapping[str, Any]) -> Tensor | None:
        """The part of the loss that a window has; None if no label of the batch counts, which then has no weight.

        Args:
            run: Runs the model.
            window: One of :attr:`windows`.

        Raises:
            CalibrationError: If there is no loss, or it is not finite, or depends on no weight.
        """
        if self._head is not None:
            if self._counted == 0:
                return None
            with torch.enable_grad():
                return _checked(self._head.cross_entropy(run, window)[0] / self._counted)
        with torch.enable_grad():
            loss = getattr(run(window), "loss", None)
        if loss is None:
            raise CalibrationError(
                f"the model returned no loss for a batch with {', '.join(sorted(window))}: "
                f"expected the labels among them, usually under 'labels'"
            )
        if loss.isnan().all() and _all_ignored(window.get("labels")):
            return None
        return _checked(loss)


def _all_ignored(labels: Any) -> bool:
    """Whether no label is one that a token is to be predicted for; the first of a causal language model is not."""
    return isinstance(labels, Tensor) and labels.dim() == 2 and bool((labels[:, 1:] == IGNORED).all())


def _checked(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss):
        raise CalibrationError(NOT_FINITE.format(loss.item()))
    if not loss.requires_grad:
        raise CalibrationError(
            "the loss of a calibration batch depends on none of the weights to be pruned: check target_modules, and "
            "that the model computes with gradients"
        )
    return loss
