"""How much it costs to remove the units of a group, the cheapest first: pure tensor algebra.

A curve lists the units of a group in the order in which they would be removed, and the loss after each. A group with
any number of units left is thus one point of its curve, and groups compete by their curves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_prune.kernels.least_squares import cholesky_factor

_STEPS = 192  # after how many steps a group has lost all its units; large groups lose several in each


@dataclass(frozen=True)
class Curve:
    """What removing units of a group costs.

    Args:
        order: (units,) int64, the unit that is removed first comes first; (choices, units) where several slabs lose as
            many units, but others.
        losses: (units + 1,) float64, after the first n units have been removed; it never falls.
    """

    order: Tensor
    losses: Tensor

    def kept(self, number: int) -> Tensor:
        """The ``number`` units that stay longest, in rising order, for each choice."""
        return self.order[..., self.order.shape[-1] - number :].sort().values


def additive_curve(scores: Tensor, runs: int = 1) -> Curve:
    """The curve whose loss is the sum of the scores of the removed units.

    Args:
        scores: (units,) not negative; of equal scores, the first unit is removed first. (choices, units) where several
            slabs lose as many units, but others.
        runs: Into how many runs of neighbouring units the group is divided: each loses one unit, then each another.

    Example:
        >>> additive_curve(torch.tensor([3.0, 1.0])).losses
        tensor([0., 1., 4.], dtype=torch.float64)
    """
    if scores.ndim == 2:
        by_slab = scores.double().cpu().sort(dim=1, stable=True)
        return Curve(by_slab.indices, torch.cat([torch.zeros(1).double(), by_slab.values.sum(0).cumsum(0)]))
    by_run = scores.double().cpu().view(runs, -1).sort(dim=1, stable=True)
    order = by_run.indices + torch.arange(runs)[:, None] * by_run.indices.shape[1]  # (runs, units of a run)
    return Curve(order.t().reshape(-1), torch.cat([torch.zeros(1).double(), by_run.values.t().reshape(-1).cumsum(0)]))


def curves_of_slabs(curves: Sequence[Curve]) -> Curve:
    """The curve of slabs that lose as many units, but others, from the curves of each."""
    return Curve(torch.stack([curve.order for curve in curves]), torch.stack([curve.losses for curve in curves]).sum(0))


def fisher_curve(fisher: Tensor) -> Curve:
    """The curve whose loss is the second-order change when a set of gates closes: ``1ᵀF1`` over the set, with pairs.

    Greedy: each step removes the unit that adds least to the set. Two units that do the same thing in opposite ways are
    both removed; of two that do it in the same way, only one. This is the mask search of Kwon et al. (2022,
    arXiv:2204.09656) with its block-diagonal Fisher matrix; the greedy search takes the place of the rearrangement.

    Args:
        fisher: (units, units) mean product of the gradients of the gates, by pairs.

    Example:
        >>> fisher_curve(torch.tensor([[1.0, 0.9], [0.9, 1.1]])).losses
        tensor([0.0000, 1.0000, 3.9000], dtype=torch.float64)
    """
    matrix = fisher.double().cpu()
    cost = matrix.diagonal().clone()  # what each unit would add to the loss of the set
    order, added = [], [0.0]
    for _ in range(len(matrix)):
        unit = int(cost.argmin())
        added.append(float(cost[unit]))
        order.append(unit)
        cost += 2 * matrix[unit]  # from now on, each unit also adds its pairs with this one
        cost[unit] = torch.inf  # it is in the set
    losses = torch.tensor(added, dtype=torch.float64).cumsum(0).cummax(0).values
    return Curve(torch.tensor(order, dtype=torch.int64), losses)


def reconstruction_curve(weight: Tensor, gram: Tensor, outputs: Tensor, units: int) -> Curve:
    """The curve whose loss is the change of the consumer's outputs, once the remaining weights have made up for it.

    The optimal brain surgeon on groups of columns (ZipLM: Kurtic et al. 2023, arXiv:2302.04089): each step removes the
    columns S with the least ``Σ w_S ([H⁻¹]_SS)⁻¹ w_Sᵀ``, updates the remaining weights, and takes S out of H⁻¹. Large
    groups lose several units in one step.

    Args:
        weight: (out, in) of the consumer, the columns of one unit side by side.
        gram: (in, in) mean product of its inputs.
        outputs: (out,) how much each output counts.
        units: How many units there are.
    """
    width = weight.shape[1] // max(units, 1)
    inverse = torch.cholesky_inverse(cholesky_factor(gram.double())).float()
    remaining = weight.float() * outputs.float().sqrt()[:, None]  # (out, in), shrinks with every step
    alive = torch.arange(units)
    order, losses = [], [0.0]
    chunk = max(1, units // _STEPS)
    while len(alive):
        scores = _group_scores(remaining, inverse, width)
        number = min(chunk, len(alive))
        chosen = scores.argsort(stable=True)[:number].cpu()
        columns = (chosen[:, None] * width + torch.arange(width)).reshape(-1).to(remaining.device)
        corner = inverse[columns][:, columns].double()
        factor = cholesky_factor(corner, 1e-6)
        solved = torch.cholesky_solve(inverse[columns].double(), factor).float()  # (removed, in)
        removed = remaining[:, columns]
        joint_loss = float((torch.cholesky_solve(removed.double().t(), factor).t() * removed).sum())
        # The exact loss is known for all units of the step together; it is divided among them by their own scores.
        single = scores[chosen.to(scores.device)].double().clamp_min(0).cpu()
        shares = single.cumsum(0) / single.sum() if float(single.sum()) > 0 else torch.ones(number).cumsum(0) / number
        losses += [losses[-1] + max(0.0, joint_loss) * float(share) for share in shares]
        order.append(alive[chosen])
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[chosen] = False
        kept = stays.to(remaining.device).repeat_interleave(width)
        remaining = remaining[:, kept] - removed @ solved[:, kept]
        inverse = inverse[kept][:, kept] - inverse[kept][:, columns] @ solved[:, kept]
        alive = alive[stays]
    return Curve(_concatenated(order), torch.tensor(losses, dtype=torch.float64))


def redundancy_curve(fisher: Tensor, gram: Tensor, units: int) -> Curve:
    """The curve whose loss is the Fisher information of the gates, times the share that no other unit can make up for.

    The information is measured end to end; the share is what least squares cannot repair: of the variance of what a
    unit computes, the part that the remaining units do not explain, ``1 / (H_uu [H⁻¹]_uu)`` for a single input. It is
    computed again as units are removed. Large groups lose several units in one step.

    Args:
        fisher: (units,) mean squared gradients of the gates.
        gram: (in, in) mean product of the inputs of the consumer, the inputs of one unit side by side.
        units: How many units there are.

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
        share = _unexplained(inverse, width) / variance[alive].clamp_min(torch.finfo(torch.float64).tiny)
        scores = fisher[alive] * share.clamp(0, 1)
        chosen = scores.argsort(stable=True)[:chunk]
        added += scores[chosen].tolist()
        order.append(alive[chosen])
        stays = torch.ones(len(alive), dtype=torch.bool)
        stays[chosen] = False
        kept = stays.to(inverse.device).repeat_interleave(width)
        corner = cholesky_factor(inverse[~kept][:, ~kept].double(), 1e-6)
        solved = torch.cholesky_solve(inverse[~kept][:, kept].double(), corner).float()
        inverse = inverse[kept][:, kept] - inverse[kept][:, ~kept] @ solved
        alive = alive[stays]
    return Curve(_concatenated(order), torch.tensor(added, dtype=torch.float64).cumsum(0))


def _concatenated(order: list[Tensor]) -> Tensor:
    return torch.cat(order) if order else torch.zeros(0, dtype=torch.int64)


def _unexplained(inverse: Tensor, width: int) -> Tensor:
    """(units,) the variance of what each unit computes that the other units do not explain."""
    if width == 1:
        return inverse.diagonal().double().cpu().reciprocal()
    return torch.linalg.inv(_corners(inverse, width).cpu()).diagonal(dim1=1, dim2=2).sum(1)


def _group_scores(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """(units,) the loss of removing each unit alone."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    corners = _corners(inverse, width)
    by_unit = weight.view(len(weight), len(corners), width).permute(1, 2, 0).double()  # (units, width, out)
    damping = 1e-6 * corners.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    corners = corners + damping * torch.eye(width, dtype=corners.dtype, device=corners.device)
    solved = torch.cholesky_solve(by_unit, torch.linalg.cholesky(corners))
    return (solved * by_unit).sum((1, 2)).float()


def _corners(inverse: Tensor, width: int) -> Tensor:
    """(units, width, width) float64, the block of each unit on the diagonal."""
    units = len(inverse) // width
    index = torch.arange(units, device=inverse.device)
    return inverse.view(units, width, units, width)[index, :, index].double()
