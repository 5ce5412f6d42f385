"""Distillation: a student is trained to put out what its dense teacher does.

Logits as in Hinton et al. 2015, arXiv:1503.02531, hidden states as in Jiao et al. 2020, arXiv:1909.10351.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_prune.errors import ConfigError

_IGNORED = -100  # labels that do not count


@dataclass(frozen=True)
class Distillation:
    """How much of the loss comes from where.

    Args:
        task: Weight of the loss on the labels.
        logits: Weight of T² times the Kullback-Leibler divergence of the predictions.
        hidden: Weight of the relative squared error of hidden states.
        temperature: T, by which logits are divided.
        layers: Which hidden state of the student learns from which one of the teacher: 0 is what the embeddings put
            out, -1 what the last layer does. Where layers were taken out of the student, the numbers are its own.

    Raises:
        ConfigError: If a number is negative, all weights are zero, or the temperature is not above zero.
    """

    task: float = 0.1
    logits: float = 0.9
    hidden: float = 1.0
    temperature: float = 2.0
    layers: Mapping[int, int] = field(default_factory=lambda: {-1: -1})

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
        """What is added to the weighted loss on the labels: means of the batch.

        In language models each token counts once; in others each example, over whose tokens is averaged first.

        Args:
            student: Its outputs: logits (batch, classes) or (batch, tokens, vocabulary), and hidden states.
            teacher: The same of the teacher.
            inputs: The batch; tokens whose label is -100 do not count in language models, padding in no model.
            shifts: Whether a token's label is that of the next one, as in causal language models.

        Returns:
            A scalar.
        """
        total = student.logits.new_zeros((), dtype=torch.float32)
        if self.logits:
            total = total + self.logits * self._logits(student.logits, teacher.logits, inputs, shifts)
        if self.hidden:
            errors = []
            for own, other in self.layers.items():
                mine, theirs = _state(student, own, "student"), _state(teacher, other, "teacher")
                errors.append(_relative_error(mine, theirs, inputs, shifts))
            total = total + self.hidden * torch.stack(errors).mean()
        return total

    def _logits(self, own: Tensor, goal: Tensor, inputs: Mapping[str, Tensor], shifts: bool) -> Tensor:
        if own.shape != goal.shape:
            raise ConfigError(
                f"the student's logits have shape {tuple(own.shape)}, the teacher's {tuple(goal.shape)}: expected a "
                f"teacher of the same task and vocabulary"
            )
        own, goal = ((x.float() / self.temperature).log_softmax(-1) for x in (own, goal))
        each = F.kl_div(own, goal, reduction="none", log_target=True).sum(-1) * self.temperature**2
        return _average(each, inputs, shifts)


def _state(outputs: Any, number: int, who: str) -> Tensor:
    states = outputs.get("hidden_states") or outputs.get("decoder_hidden_states")
    if states is None or not -len(states) <= number < len(states):
        found = "none" if states is None else f"{len(states)}"
        raise ConfigError(
            f"the {who} has {found} hidden states, and the distillation names number {number}: expected numbers in "
            f"that range; set layers= or hidden=0"
        )
    return states[number]


def _relative_error(own: Tensor, goal: Tensor, inputs: Mapping[str, Tensor], shifts: bool) -> Tensor:
    if own.shape != goal.shape:
        raise ConfigError(
            f"a hidden state of the student has shape {tuple(own.shape)}, the teacher's {tuple(goal.shape)}: expected "
            f"models of the same width; set hidden=0"
        )
    own, goal = own.float(), goal.float()
    each = (own - goal).square().sum(-1) / goal.square().sum(-1).clamp_min(1e-12)
    return _average(each, inputs, shifts)


def _average(each: Tensor, inputs: Mapping[str, Tensor], shifts: bool) -> Tensor:
    """The mean over what counts."""
    if each.dim() == 1:
        return each.mean()
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if labels is not None and labels.shape == each.shape:  # a language model
        labels = F.pad(labels[:, 1:], (0, 1), value=_IGNORED) if shifts else labels
        counted = (labels != _IGNORED).float()
        return (each * counted).sum() / counted.sum().clamp_min(1)
    counted = mask.float() if mask is not None and mask.shape == each.shape else torch.ones_like(each)
    each, counted = each.flatten(1), counted.flatten(1)
    return ((each * counted).sum(1) / counted.sum(1).clamp_min(1)).mean()
