"""How many units each site keeps, so that a budget is met at the least loss: pure arithmetic."""

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
        base: What does not depend on them.
        sites: (units + 1,) of each site with 0, 1, … units left; it never falls.
        layers: What a layer costs beyond its sites, saved only if it goes as a whole; by layer.
    """

    base: float
    sites: Mapping[str, np.ndarray]
    layers: Mapping[str, float] = field(default_factory=dict)

    def total(
        self, kept: Mapping[str, int], gone: Collection[str] = (), members: Mapping[str, Sequence[str]] = {}
    ) -> float:
        """The cost of a model whose sites keep so many units.

        Args:
            kept: Units by site; sites not named keep all.
            gone: Layers that are removed.
            members: The sites of each layer.
        """
        without = {site for layer in gone for site in members[layer]}
        sites = sum(float(c[kept.get(name, len(c) - 1)]) for name, c in self.sites.items() if name not in without)
        return self.base + sites + sum(cost for layer, cost in self.layers.items() if layer not in gone)


@dataclass(frozen=True)
class Choice:
    """What stays.

    Args:
        kept: Units by site; of layers that are removed none.
        layers: The layers that are removed.
    """

    kept: Mapping[str, int]
    layers: frozenset[str]


def allowed_sizes(units: int, minimum: int, round_to: int) -> np.ndarray:
    """The numbers of units that a site may keep: all, none, and multiples.

    Args:
        units: How many it has.
        minimum: How many have to stay.
        round_to: Sizes are multiples of this.
    """
    sizes = np.arange(0, units + 1, round_to)
    least = min(units, -(-minimum // round_to) * round_to)
    return np.unique(np.append(sizes[sizes >= least], units))


def solve_budget(
    losses: Mapping[str, np.ndarray],
    costs: Costs,
    budget: float,
    sizes: Mapping[str, np.ndarray],
    members: Mapping[str, Sequence[str]] | None = None,
    layer_losses: Mapping[str, float] | None = None,
) -> Choice:
    """The sizes with the least sum of losses among those that cost at most the budget.

    Lagrangian relaxation: for a price, each site takes the size with the least loss and price; the price is found by
    bisection, and what it leaves of the budget is spent where it saves most.

    Args:
        losses: (units + 1,) of each site with 0, 1, … units left.
        costs: See :class:`Costs`.
        budget: In the units of the costs.
        sizes: The sizes that each site may have, rising.
        members: The sites of each layer that may be removed as a whole.
        layer_losses: What removing each of these costs.

    Raises:
        PlanError: If even the smallest model costs more.
    """
    members, layer_losses = members or {}, layer_losses or {}
    layer_of = {site: layer for layer, sites in members.items() for site in sites}

    def at(price: float) -> Choice:
        kept: dict[str, int] = {}
        worth: dict[str, float] = {}
        for name, loss in losses.items():
            values = loss[sizes[name]] + price * costs.sites[name][sizes[name]]
            best = len(values) - 1 - int(values[::-1].argmin())  # of equal ones the largest size
            kept[name], worth[name] = int(sizes[name][best]), float(values[best])
        gone = frozenset(
            layer
            for layer, sites in members.items()
            if layer_losses[layer] < sum(worth[s] for s in sites) + price * costs.layers.get(layer, 0.0)
        )
        return Choice({name: 0 if layer_of.get(name) in gone else n for name, n in kept.items()}, gone)

    def cost(choice: Choice) -> float:
        return costs.total(choice.kept, choice.layers, members)

    dense = at(0.0)
    if cost(dense) <= budget:
        return dense
    scale = max((float(loss.max()) for loss in losses.values()), default=0.0) + max(layer_losses.values(), default=0.0)
    low, high = 0.0, max(scale, 1e-30) / max(budget, 1e-30)
    for _ in range(_BISECTIONS):
        if cost(at(high)) <= budget:
            break
        high *= 4
    else:
        least = cost(at(high))
        raise PlanError(
            f"the budget of {budget:g} cannot be met: with all that may be removed gone, the model still costs "
            f"{least:g} of {costs.total({}, (), members):g}; ask for less, or add 'layer' to the granularity"
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) <= budget else (middle, high)
    return _spend(at(high), losses, costs, budget - cost(at(high)), sizes, layer_of)


def _spend(
    choice: Choice,
    losses: Mapping[str, np.ndarray],
    costs: Costs,
    left: float,
    sizes: Mapping[str, np.ndarray],
    layer_of: Mapping[str, str],
) -> Choice:
    """Give back units as long as the budget allows it, the most useful ones first."""
    kept = dict(choice.kept)
    offers: list[tuple[float, int, str, int]] = []  # the best of each site, by what a unit of cost gains, highest first

    def offer(number: int, name: str) -> None:
        n = kept[name]
        larger = sizes[name][sizes[name] > n]
        price = costs.sites[name][larger] - costs.sites[name][n]
        fits, price = larger[price <= left], price[price <= left]
        if not len(fits):
            return
        gain = losses[name][n] - losses[name][fits]
        rate = gain / np.maximum(price, 1e-30)
        i = int(rate.argmax())
        if gain[i] > 0:
            heapq.heappush(offers, (-float(rate[i]), number, name, int(fits[i])))

    for number, name in enumerate(kept):
        if layer_of.get(name) not in choice.layers:
            offer(number, name)
    while offers:
        _, number, name, n = heapq.heappop(offers)
        price = float(costs.sites[name][n] - costs.sites[name][kept[name]])
        if price <= left:  # else it fitted before something else was bought
            left -= price
            kept[name] = n
        offer(number, name)
    return Choice(kept, choice.layers)


def uniform_sizes(
    costs: Costs, budget: float, sizes: Mapping[str, np.ndarray], members: Mapping[str, Sequence[str]] | None = None
) -> dict[str, int]:
    """The same share of every site, as much as the budget allows.

    Args:
        costs: See :class:`Costs`.
        budget: In the units of the costs.
        sizes: The sizes that each site may have, rising.
        members: The sites of each layer, for the message.

    Raises:
        PlanError: If even the smallest model costs more.
    """

    def at(share: float) -> dict[str, int]:
        found = {}
        for name, own in sizes.items():
            wanted = round(share * own[-1])
            found[name] = int(own[np.abs(own - wanted).argmin()])
        return found

    low, high = 0.0, 1.0
    if costs.total(at(1.0)) <= budget:
        return at(1.0)
    if costs.total(at(0.0)) > budget:
        raise PlanError(
            f"the budget of {budget:g} cannot be met: with all that may be removed gone, the model still costs "
            f"{costs.total(at(0.0)):g} of {costs.total({}):g}; ask for less, or add 'layer' to the granularity"
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.total(at(middle)) <= budget else (low, middle)
    return at(low)
