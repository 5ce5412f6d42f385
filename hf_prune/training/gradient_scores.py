"""Scores of weights, learned from the gradients of each training step.

``movement`` adds up how far each weight moves from zero (Sanh et al. 2020, arXiv:2005.07683); ``soft_movement`` does so
in normalised steps and pulls all scores down; ``taylor`` keeps a running average of absolute gradients. The first two
also let removed weights come back, so the values of these are kept here while the model holds zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_prune.pruning.local_masks import gather_parts, local_part, local_tensor
from hf_prune.utils.wrapping import plain_name

_AVERAGE_DECAY = 0.9  # per step, of running averages
_SCORE_PATH = 6.6  # how far soft movement can pull a score over a whole schedule: far enough in half of it


class GradientScores:
    """Scores of a model's weights, and the values of removed weights that may come back.

    Tensors are this process's parts where FSDP has sharded the parameters; :meth:`whole_scores` and
    :meth:`whole_weight` put them together, and every process has to call those.

    Args:
        model: The model that is trained.
        averages: Keep running averages of absolute gradients instead of movement.
        soft: Learn as ``soft_movement`` does.
        last_update: The step of the schedule's last update, over which a soft score is spread.
        regularization: How hard soft scores are pulled down, relative to the typical size of a gradient's pull.
    """

    def __init__(
        self, model: nn.Module, *, averages: bool, soft: bool, last_update: int, regularization: float
    ) -> None:
        self.model = model
        self.averages, self.soft = averages, soft
        self.regularization = regularization
        self.scores: dict[str, Tensor] = {}
        #: Values of removed weights by parameter name, zero where a weight is kept.
        self.latent: dict[str, Tensor] = {}
        self._step_size = _SCORE_PATH / max(1, last_update)

    def learn(self, name: str, weight: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        """Update the scores of one parameter.

        Args:
            name: Its name.
            weight: Its values.
            gradient: Its gradient in float32, of the same shape.
            mask: Its mask, True = keep; None if it has none.
        """
        score = self.scores.setdefault(name, torch.zeros_like(weight, dtype=torch.float32))
        if self.averages:
            score.lerp_(gradient.abs(), 1 - _AVERAGE_DECAY)
            return
        latent = self.latent.get(name)
        value = weight if latent is None or mask is None else torch.where(mask, weight, latent)
        change = value.float() * gradient
        if self.soft:
            # Normalised, so that scores move equally fast in every layer and at every learning rate.
            change.div_(change.square().mean().sqrt().clamp_min(1e-30)).mul_(self._step_size)
            kept = torch.sigmoid(score)
            change.add_(kept * (1 - kept), alpha=4 * self._step_size * self.regularization)
        score.sub_(change)

    def swap_values(self, name: str, parameter: nn.Parameter, old: Tensor | None, mask: Tensor) -> None:
        """Set aside the values of weights that a new mask removes, and give back the values of those that return.

        Args:
            name: Name of the parameter.
            parameter: The parameter, changed in place.
            old: This process's part of its present mask; None if it has none.
            mask: The whole new mask.
        """
        weight, new = local_tensor(parameter.detach()), local_part(mask, parameter)
        latent = self.latent.setdefault(name, torch.zeros_like(weight))
        value = weight if old is None else torch.where(old, weight, latent)
        weight.copy_(value.masked_fill(~new, 0))
        latent.copy_(value.masked_fill(new, 0))

    def whole_scores(self) -> dict[str, Tensor]:
        """The scores of all parameters that have some."""
        return {name: self.whole(score, name) for name, score in self.scores.items()}

    def whole_weight(self, name: str) -> Tensor:
        """A weight with the values of removed entries, where they are kept."""
        parameter = self.model.get_parameter(name)
        whole = gather_parts(local_tensor(parameter.detach()), parameter)
        latent = self.latent.get(name)
        return whole if latent is None else whole + self.whole(latent, name)

    def cut(self, cut: Callable[[str, Tensor], Tensor]) -> None:
        """Make every tensor as small as its parameter has become.

        Args:
            cut: Takes the name of a parameter and a tensor of its former shape, and returns what is left.
        """
        for tensors in (self.scores, self.latent):
            tensors.update({name: cut(name, tensor) for name, tensor in tensors.items()})

    def state(self) -> dict[str, Tensor]:
        """Whole tensors for a checkpoint, on the CPU; every process has to call this."""
        # Wrappers inside the model may differ when the training goes on, so their parts of names are left out.
        return {
            f"{kind}:{plain_name(name)}": self.whole(tensor, name).cpu().contiguous()
            for kind, tensors in (("score", self.scores), ("latent", self.latent))
            for name, tensor in tensors.items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Replace all tensors by those that :meth:`state` returned."""
        parameters = dict(self.model.named_parameters())
        names = {plain_name(name): name for name in parameters}
        self.scores, self.latent = {}, {}
        kinds = {"score": self.scores, "latent": self.latent}
        for key, tensor in state.items():
            kind, _, plain = key.partition(":")
            name = names[plain]
            kinds[kind][name] = local_part(tensor, parameters[name])

    def whole(self, part: Tensor, name: str) -> Tensor:
        """The parts that all processes have of a tensor shaped like a parameter; every process has to call this."""
        return gather_parts(part, self.model.get_parameter(name))
