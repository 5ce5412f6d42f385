"""Choose how many units each group keeps, so that a budget is met at the least loss: pure arithmetic."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_prune.errors import PlanError

_BISECTIONS = 60


@dataclass(frozen=True)
class Costs:
    """What a model costs as a function of its sizes, in parameters, operations or seconds.

    Args:
        base: The part that does not depend on them.
        groups: (units + 1,) the cost of each group with 0, 1, … units; it never falls.
        layers: What each layer costs beyond its groups, which is saved only if the layer is removed.
        inside: Groups whose units are parts of the units of another group, such as neurons of experts, with that group:
            what they cost is proportional to how many of its units stay.
    """

    base: float
    groups: Mapping[str, np.ndarray]
    layers: Mapping[str, float] = field(default_factory=dict)
    inside: Mapping[str, str] = field(default_factory=dict)

    def total(
        self, kept: Mapping[str, int], removed: Collection[str] = (), members: Mapping[str, Sequence[str]] = {}
    ) -> float:
        """The cost of a model with some sizes.

        Args:
            kept: Units by group; groups that are not named keep all.
            removed: Layers that are removed.
            members: The groups in each layer.
        """
        in_removed = {group for layer in removed for group in members[layer]}

        def share(name: str) -> float:
            if (outer := self.inside.get(name)) is None:
                return 1.0
            most = len(self.groups[outer]) - 1
            return kept.get(outer, most) / most

        staying = {name: c for name, c in self.groups.items() if name not in in_removed}
        groups = sum(share(name) * float(c[kept.get(name, len(c) - 1)]) for name, c in staying.items())
        return self.base + groups + sum(cost for layer, cost in self.layers.items() if layer not in removed)


@dataclass(frozen=True)
class Choice:
    """What stays.

    Args:
        kept: Units by group; none in layers that are removed.
        layers: The layers that are removed.
    """

    kept: Mapping[str, int]
    layers: frozenset[str]


def allowed_sizes(units: int, minimum: int, round_to: int) -> np.ndarray:
    """The numbers of units that a group may keep: all of them, and multiples of ``round_to`` from the minimum on.

    Args:
        units: How many it has.
        minimum: How many must stay.
        round_to: Sizes are multiples of this.
    """
    sizes = np.arange(0, units + 1, round_to)
    smallest = min(units, -(-minimum // round_to) * round_to)
    return np.unique(np.append(sizes[sizes >= smallest], units))


def solve_budget(
    losses: Mapping[str, np.ndarray],
    costs: Costs,
    budget: float,
    sizes: Mapping[str, np.ndarray],
    members: Mapping[str, Sequence[str]] | None = None,
    layer_losses: Mapping[str, float] | None = None,
    hint: str = "",
) -> Choice:
    """The sizes with the least sum of losses among those that cost at most the budget.

    Lagrangian relaxation: at a price for each unit of cost, the groups are independent, and each takes the size with
    the least loss plus price. Bisection finds the lowest price at which the budget is met. Since sizes jump as the
    price changes, some of the budget is then left over; it is spent where it saves the most loss.

    Args:
        losses: (units + 1,) the loss of each group with 0, 1, … units.
        costs: See :class:`Costs`.
        budget: In the unit of the costs.
        sizes: The sizes that each group may have, rising.
        members: The groups in each layer that may be removed as a whole.
        layer_losses: The loss of removing each of these layers.
        hint: What else to do about a budget that cannot be met.

    Raises:
        PlanError: If even the smallest model costs more.
    """
    members, layer_losses = members or {}, layer_losses or {}
    layer_of = {group: layer for layer, groups in members.items() for group in groups}

    def best_at(price: float) -> Choice:
        kept: dict[str, int] = {}
        keeping: dict[str, float] = {}  # loss plus price of each group at its best size
        for name, loss in losses.items():
            values = loss[sizes[name]] + price * costs.groups[name][sizes[name]]
            best = len(values) - 1 - int(values[::-1].argmin())  # the largest of equally good sizes
            kept[name], keeping[name] = int(sizes[name][best]), float(values[best])
        removed = frozenset(
            layer
            for layer, groups in members.items()
            if layer_losses[layer] < sum(keeping[g] for g in groups) + price * costs.layers.get(layer, 0.0)
        )
        return Choice({name: 0 if layer_of.get(name) in removed else n for name, n in kept.items()}, removed)

    def cost(choice: Choice) -> float:
        return costs.total(choice.kept, choice.layers, members)

    free = best_at(0.0)
    if cost(free) <= budget:
        return free
    scale = max((float(loss.max()) for loss in losses.values()), default=0.0) + max(layer_losses.values(), default=0.0)
    low, high = 0.0, max(scale, 1e-30) / max(budget, 1e-30)
    for _ in range(_BISECTIONS):  # raise the upper end until it meets the budget
        if cost(best_at(high)) <= budget:
            break
        high *= 4
    else:
        raise _out_of_reach(budget, cost(best_at(high)), costs.total({}, (), members), hint)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(best_at(middle)) <= budget else (middle, high)
    choice = best_at(high)
    return _spend(choice, losses, costs, budget - cost(choice), sizes, layer_of)


def _spend(
    choice: Choice,
    losses: Mapping[str, np.ndarray],
    costs: Costs,
    remaining: float,
    sizes: Mapping[str, np.ndarray],
    layer_of: Mapping[str, str],
) -> Choice:
    """Give units back as long as the budget allows, the ones that save the most loss per cost first."""
    kept = dict(choice.kept)
    offers: list[tuple[float, int, str, int]] = []  # a heap with the best offer of each group, highest rate first

    def offer(number: int, name: str) -> None:
        current = kept[name]
        larger = sizes[name][sizes[name] > current]
        price = costs.groups[name][larger] - costs.groups[name][current]
        affordable, price = larger[price <= remaining], price[price <= remaining]
        if not len(affordable):
            return
        gain = losses[name][current] - losses[name][affordable]
        rate = gain / np.maximum(price, 1e-30)
        best = int(rate.argmax())
        if gain[best] > 0:
            heapq.heappush(offers, (-float(rate[best]), number, name, int(affordable[best])))

    for number, name in enumerate(kept):
        if layer_of.get(name) not in choice.layers:
            offer(number, name)
    while offers:
        _, number, name, size = heapq.heappop(offers)
        price = float(costs.groups[name][size] - costs.groups[name][kept[name]])
        if price <= remaining:  # it was when it was offered, but others have spent since
            remaining -= price
            kept[name] = size
        offer(number, name)
    return Choice(kept, choice.layers)


def uniform_sizes(costs: Costs, budget: float, sizes: Mapping[str, np.ndarray], hint: str = "") -> dict[str, int]:
    """The same share of every group, as large as the budget allows.

    Args:
        costs: See :class:`Costs`.
        budget: In the unit of the costs.
        sizes: The sizes that each group may have, rising.
        hint: What else to do about a budget that cannot be met.

    Raises:
        PlanError: If even the smallest model costs more.
    """

    def at(share: float) -> dict[str, int]:
        closest = {}
        for name, allowed in sizes.items():
            closest[name] = int(allowed[np.abs(allowed - round(share * allowed[-1])).argmin()])
        return closest

    low, high = 0.0, 1.0
    if costs.total(at(1.0)) <= budget:
        return at(1.0)
    if costs.total(at(0.0)) > budget:
        raise _out_of_reach(budget, costs.total(at(0.0)), costs.total({}), hint)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.total(at(middle)) <= budget else (low, middle)
    return at(low)


def _out_of_reach(budget: float, smallest: float, dense: float, hint: str) -> PlanError:
    return PlanError(
        f"the budget of {budget:g} cannot be met: with all that may be removed gone, the model still costs "
        f"{smallest:g} of {dense:g}; ask for less{hint}"
    )
