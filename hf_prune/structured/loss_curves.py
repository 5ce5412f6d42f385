"""How much it costs to remove the units of a site, the cheapest first: pure tensor algebra.

A curve lists the units of a site in the order in which they would go, and the loss after each. So a site with any
number of units left is one point of it, and sites compete by their curves alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.kernels.least_squares import cholesky_factor

_STEPS = 192  # in how many steps a site loses all its units by reconstruction error


@dataclass(frozen=True)
class Curve:
    """What removing units of a site costs.

    Args:
        order: (units,) int64, the unit that goes first first.
        losses: (units + 1,) float64, after the first n units have gone; it never falls.
    """

    order: Tensor
    losses: Tensor

    def kept(self, number: int) -> Tensor:
        """The units that stay if so many do, in rising order."""
        return self.order[len(self.order) - number :].sort().values


def additive_curve(scores: Tensor) -> Curve:
    """The loss is the sum of the scores of what is gone.

    Args:
        scores: (units,) not negative; of equal ones the first goes first.

    Example:
        >>> additive_curve(torch.tensor([3.0, 1.0])).losses
        tensor([0., 1., 4.], dtype=torch.float64)
    """
    ordered = scores.double().cpu().sort(stable=True)
    return Curve(ordered.indices, torch.cat([torch.zeros(1).double(), ordered.values.cumsum(0)]))


def fisher_curve(fisher: Tensor) -> Curve:
    """The loss is the second-order change when a set of gates closes, ``1ᵀF1`` over the set, pairs included.

    Greedy: each time the unit goes that adds least to what has gone, so that of two units that do the same in opposite
    ways both go, and of two that do the same in the same way only one. This is the mask search of Kwon et al. (2022,
    arXiv:2204.09656) with its block-diagonal Fisher matrix, in which the search itself takes the place of the
    rearrangement.

    Args:
        fisher: (units, units) mean product of the gradients of the gates, by pairs.

    Example:
        >>> fisher_curve(torch.tensor([[1.0, 0.9], [0.9, 1.1]])).losses
        tensor([0.0000, 1.0000, 3.9000], dtype=torch.float64)
    """
    matrix = fisher.double().cpu()
    cost = matrix.diagonal().clone()
    order, added = [], [0.0]
    for _ in range(len(matrix)):
        unit = int(cost.argmin())
        added.append(float(cost[unit]))
        order.append(unit)
        cost += 2 * matrix[unit]
        cost[unit] = torch.inf
    losses = torch.tensor(added, dtype=torch.float64).cumsum(0).cummax(0).values
    return Curve(torch.tensor(order, dtype=torch.int64), losses)


def reconstruction_curve(weight: Tensor, gram: Tensor, outputs: Tensor, units: int) -> Curve:
    """The loss is what the outputs of the consumer change by, once the weights of the other units have made up for it.

    The optimal brain surgeon on groups of columns (ZipLM: Kurtic et al. 2023, arXiv:2302.04089): the group S goes whose
    ``Σ w_S ([H⁻¹]_SS)⁻¹ w_Sᵀ`` is least, the weights that stay are updated, and H⁻¹ loses S. Of sites with very many
    units several go in one step.

    Args:
        weight: (out, in) of the consumer, the columns of one unit side by side.
        gram: (in, in) mean product of its inputs.
        outputs: (out,) how much each output counts.
        units: How many.
    """
    width = weight.shape[1] // max(units, 1)
    inverse = torch.cholesky_inverse(cholesky_factor(gram.double())).float()
    left = weight.float() * outputs.float().sqrt()[:, None]  # (out, in)
    alive = torch.arange(units)
    order, losses = [], [0.0]
    chunk = max(1, units // _STEPS)
    while len(alive):
        scores = _group_scores(left, inverse, width)
        number = min(chunk, len(alive))
        chosen = scores.argsort(stable=True)[:number].cpu()
        columns = (chosen[:, None] * width + torch.arange(width)).reshape(-1).to(left.device)
        corner = inverse[columns][:, columns].double()
        factor = cholesky_factor(corner, 1e-6)
        solved = torch.cholesky_solve(inverse[columns].double(), factor).float()  # (gone, in)
        taken = left[:, columns]
        joint = float((torch.cholesky_solve(taken.double().t(), factor).t() * taken).sum())
        each = scores[chosen.to(scores.device)].double().clamp_min(0).cpu()
        shares = each.cumsum(0) / each.sum() if float(each.sum()) > 0 else torch.ones(number).cumsum(0) / number
        losses += [losses[-1] + max(0.0, joint) * float(share) for share in shares]
        order.append(alive[chosen])
        stay = torch.ones(len(alive), dtype=torch.bool)
        stay[chosen] = False
        kept = stay.to(left.device).repeat_interleave(width)
        left = left[:, kept] - taken @ solved[:, kept]
        inverse = inverse[kept][:, kept] - inverse[kept][:, columns] @ solved[:, kept]
        alive = alive[stay]
    found = torch.cat(order) if order else torch.zeros(0, dtype=torch.int64)
    return Curve(found, torch.tensor(losses, dtype=torch.float64))


def redundancy_curve(fisher: Tensor, gram: Tensor, units: int) -> Curve:
    """The loss is what a gate's Fisher information says, times the share that no other unit can make up for.

    The first is measured end to end, the second is what least squares will not repair: of the variance of what a unit
    computes, the part that the units that are left do not explain, ``1 / (H_uu [H⁻¹]_uu)`` for a single input. It is
    taken anew as units go. Of sites with very many units several go in one step.

    Args:
        fisher: (units,) mean squared gradients of the gates.
        gram: (in, in) mean product of the inputs of the consumer, those of one unit side by side.
        units: How many.

    Example:
        >>> gram = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # the first two are twins
        >>> redundancy_curve(torch.tensor([2.0, 3.0, 1.0]), gram, 3).order
        tensor([0, 2, 1])
    """
    width = gram.shape[1] // max(units, 1)
    inverse = torch.cholesky_inverse(cholesky_factor(gram.double())).float()
    variance = gram.diagonal().view(units, width).sum(1).double().cpu()
    fisher, alive = fisher.double().cpu(), torch.arange(units)
    order, added = [], [0.0]
    chunk = max(1, units // _STEPS)
    while len(alive):
        left = _unexplained(inverse, width) / variance[alive].clamp_min(torch.finfo(torch.float64).tiny)
        scores = fisher[alive] * left.clamp(0, 1)
        chosen = scores.argsort(stable=True)[:chunk]
        added += scores[chosen].tolist()
        order.append(alive[chosen])
        stay = torch.ones(len(alive), dtype=torch.bool)
        stay[chosen] = False
        kept = stay.to(inverse.device).repeat_interleave(width)
        corner = cholesky_factor(inverse[~kept][:, ~kept].double(), 1e-6)
        solved = torch.cholesky_solve(inverse[~kept][:, kept].double(), corner).float()
        inverse = inverse[kept][:, kept] - inverse[kept][:, ~kept] @ solved
        alive = alive[stay]
    found = torch.cat(order) if order else torch.zeros(0, dtype=torch.int64)
    return Curve(found, torch.tensor(added, dtype=torch.float64).cumsum(0))


def _unexplained(inverse: Tensor, width: int) -> Tensor:
    """(units,) variance of what each unit computes that the others do not explain."""
    if width == 1:
        return inverse.diagonal().double().cpu().reciprocal()
    groups = len(inverse) // width
    index = torch.arange(groups, device=inverse.device)
    corners = inverse.view(groups, width, groups, width)[index, :, index].double().cpu()  # (groups, width, width)
    return torch.linalg.inv(corners).diagonal(dim1=1, dim2=2).sum(1)


def _group_scores(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """(units,) of the columns that are left."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    groups = len(inverse) // width
    index = torch.arange(groups, device=inverse.device)
    corners = inverse.view(groups, width, groups, width)[index, :, index].double()  # (groups, width, width)
    parts = weight.view(len(weight), groups, width).permute(1, 2, 0).double()  # (groups, width, out)
    tiny = 1e-6 * corners.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    corners = corners + tiny * torch.eye(width, dtype=corners.dtype, device=corners.device)
    solved = torch.cholesky_solve(parts, torch.linalg.cholesky(corners))
    return (solved * parts).sum((1, 2)).float()
