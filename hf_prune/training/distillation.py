"""Distillation: a student is trained to reproduce the outputs of its dense teacher.

Logits as in Hinton et al. 2015, arXiv:1503.02531, hidden states as in Jiao et al. 2020, arXiv:1909.10351.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_prune.calibration.batches import IGNORED
from hf_prune.errors import ConfigError


@dataclass(frozen=True)
class Distillation:
    """Weights of the parts of a distillation loss.

    Args:
        task: Weight of the loss on the labels.
        logits: Weight of T² times the Kullback-Leibler divergence of the predictions.
        hidden: Weight of the relative squared error of hidden states.
        temperature: T, by which logits are divided.
        layers: Which hidden state of the student learns from which hidden state of the teacher: 0 is the output of the
            embeddings, -1 that of the last layer. If layers were removed from the student, its own numbers count.
        dropout: Whether the student's dropout stays on. A pruned student that learns what its dense teacher returns
            does not overfit, and loses less without it: ``docs/guides/train.md`` has the numbers.

    Raises:
        ConfigError: If a number is negative, all weights are zero, or the temperature is not above zero.
    """

    task: float = 0.1
    logits: float = 0.9
    hidden: float = 1.0
    temperature: float = 2.0
    layers: Mapping[int, int] = field(default_factory=lambda: {-1: -1})
    dropout: bool = False

    def __post_init__(self) -> None:
        weights = {"task": self.task, "logits": self.logits, "hidden": self.hidden}
        for name, value in {**weights, "temperature": self.temperature}.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name} of the distillation is {value!r}: expected a number of at least 0")
        if not self.temperature or not any(weights.values()):
            raise ConfigError(
                f"temperature {self.temperature} and weights {weights}: expected a temperature and one weight above 0"
            )
        if not self.layers or not all(isinstance(n, int) for pair in self.layers.items() for n in pair):
            raise ConfigError(
                f"layers of the distillation is {self.layers!r}: expected {{student's: teacher's}} numbers"
            )

    def loss(self, student: Any, teacher: Any, inputs: Mapping[str, Tensor], *, shifts: bool = False) -> Tensor:
        """What to add to the weighted loss on the labels: means over the batch.

        In language models every token has the same weight; otherwise every example, whose tokens are averaged first.

        Args:
            student: Outputs of the student: logits (batch, classes) or (batch, tokens, vocabulary), and hidden states.
            teacher: Outputs of the teacher, of the same shapes.
            inputs: The batch. Padding is left out; in language models, so are tokens whose label is -100.
            shifts: Whether the label of a token belongs to the one before it, as in causal language models.

        Returns:
            A scalar.
        """
        total = student.logits.new_zeros((), dtype=torch.float32)
        if self.logits:
            total = total + self.logits * self._logits(student.logits, teacher.logits, inputs, shifts)
        if self.hidden:
            errors = []
            for layer, teacher_layer in self.layers.items():
                state = _hidden_state(student, layer, "student")
                target = _hidden_state(teacher, teacher_layer, "teacher")
                errors.append(_relative_error(state, target, inputs, shifts))
            total = total + self.hidden * torch.stack(errors).mean()
        return total

    def _logits(self, logits: Tensor, target: Tensor, inputs: Mapping[str, Tensor], shifts: bool) -> Tensor:
        if logits.shape != target.shape:
            raise ConfigError(
                f"the student's logits have shape {tuple(logits.shape)}, the teacher's {tuple(target.shape)}: expected "
                f"a teacher for the same task and vocabulary"
            )
        logits, target = ((x.float() / self.temperature).log_softmax(-1) for x in (logits, target))
        divergence = F.kl_div(logits, target, reduction="none", log_target=True).sum(-1) * self.temperature**2
        return _average(divergence, inputs, shifts)


def _hidden_state(outputs: Any, number: int, who: str) -> Tensor:
    states = outputs.get("hidden_states") or outputs.get("decoder_hidden_states")
    if states is None or not -len(states) <= number < len(states):
        count = "no" if states is None else len(states)
        raise ConfigError(
            f"the {who} has {count} hidden states, and the distillation names number {number}: expected numbers in "
            f"that range; set layers= or hidden=0"
        )
    return states[number]


def _relative_error(state: Tensor, target: Tensor, inputs: Mapping[str, Tensor], shifts: bool) -> Tensor:
    if state.shape != target.shape:
        raise ConfigError(
            f"a hidden state of the student has shape {tuple(state.shape)}, the teacher's {tuple(target.shape)}: "
            f"expected models of the same width; set hidden=0"
        )
    state, target = state.float(), target.float()
    error = (state - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
    return _average(error, inputs, shifts)


def _average(losses: Tensor, inputs: Mapping[str, Tensor], shifts: bool) -> Tensor:
    """The mean of losses (batch,) or (batch, tokens) over the examples or tokens that count."""
    if losses.dim() == 1:
        return losses.mean()
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if labels is not None and labels.shape == losses.shape:  # a language model
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifts else labels
        counted = (labels != IGNORED).float()
        return (losses * counted).sum() / counted.sum().clamp_min(1)
    counted = mask.float() if mask is not None and mask.shape == losses.shape else torch.ones_like(losses)
    losses, counted = losses.flatten(1), counted.flatten(1)
    return ((losses * counted).sum(1) / counted.sum(1).clamp_min(1)).mean()
