"""How much each tensor loses: from the config's sparsity to a sparsity or a number of units per tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.targets import suffixes
from hf_prune.utils.registry import unknown_name

CAP = 0.98  # the largest share of one tensor that an allocation learned from data removes


def allocate(allocation: str | Mapping[str, float], sparsity: float, targets: Sequence[Target]) -> dict[str, float]:
    """The sparsity of every target.

    Args:
        allocation: ``"uniform"``, ``"erk"``, or sparsities by module name or suffix; the longest match counts.
        sparsity: The overall sparsity; with a mapping, that of the modules it does not name.
        targets: The weights that are pruned.

    Returns:
        Sparsity by parameter name.

    Raises:
        PlanError: If a name in the mapping matches no target.
    """
    if isinstance(allocation, Mapping):
        return _explicit(allocation, sparsity, targets)
    if allocation == "erk":
        return erdos_renyi_kernel(sparsity, targets)
    return {target.name: sparsity for target in targets}


def erdos_renyi_kernel(sparsity: float, targets: Sequence[Target]) -> dict[str, float]:
    """Erdős–Rényi kernel sparsities: density in proportion to (sum of dimensions) / (product of dimensions).

    Tensors whose density would exceed 1 stay dense, and the others make up for it (Evci et al. 2020, arXiv:1911.11134).
    The mean of the result, weighted by size, is ``sparsity``.

    Args:
        sparsity: Overall sparsity, 0 to 1.
        targets: The weights that are pruned.

    Returns:
        Sparsity by parameter name.
    """
    raw = {target.name: _density(target) for target in targets}
    dense: set[str] = set()
    while True:
        budget = (1 - sparsity) * sum(t.size for t in targets) - sum(t.size for t in targets if t.name in dense)
        mass = sum(raw[t.name] * t.size for t in targets if t.name not in dense)
        scale = budget / mass if mass else 0.0
        full = {t.name for t in targets if t.name not in dense and raw[t.name] * scale > 1}
        if not full:
            return {t.name: 0.0 if t.name in dense else 1 - raw[t.name] * scale for t in targets}
        dense |= full


def _density(target: Target) -> float:
    """(sum of dimensions) / (product of dimensions) of a weight, or of each expert in it."""
    shape = target.shape if target.layout == "conv" else target.slab_shape
    return sum(shape) / math.prod(shape)


def _explicit(allocation: Mapping[str, float], sparsity: float, targets: Sequence[Target]) -> dict[str, float]:
    result = {target.name: sparsity for target in targets}
    named: dict[str, list[str]] = {}
    for target in targets:
        for suffix in {*suffixes(target.module), *suffixes(target.label)}:
            named.setdefault(suffix, []).append(target.name)
    for module, value in sorted(allocation.items(), key=lambda item: len(item[0])):  # longer names win
        if not (matched := named.get(module)):
            raise PlanError(f"allocation: {unknown_name('target module', module, [t.label for t in targets])}")
        result.update(dict.fromkeys(matched, value))
    return result


def minimize_total_error(
    errors: Mapping[str, Sequence[tuple[float, float]]],
    units: Mapping[str, int],
    remove: int,
    at_least: Mapping[str, int] | None = None,
    cap: float = CAP,
    pools: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Choose how many units each tensor loses, so that the sum of their errors is smallest.

    Errors between known points are interpolated exponentially, and each curve is replaced by the largest convex
    function below it. On convex curves the greedy choice is optimal: remove where the next units cost least, one per
    cent of a tensor at a time.

    Args:
        errors: Known points (share removed, error) of each tensor, shares from 0 to 1 in rising order, the first 0.
        units: How many units each tensor has.
        remove: How many units to remove in all.
        at_least: How many units of each tensor were removed before.
        cap: The largest share that one tensor loses, unless the mean is larger.
        pools: The number of pools of each tensor, each of which loses the same number of units; 1 by default.

    Returns:
        Units to remove by tensor. Their sum is ``remove``, or differs by less than one unit per pool of one tensor.
    """
    total = sum(units.values())
    cap = max(cap, remove / total)
    grain = dict.fromkeys(units, 1) | dict(pools or {})  # a tensor loses a multiple of this
    least = {name: grain[name] * -(-(at_least or {}).get(name, 0) // grain[name]) for name in units}
    most = {name: max(least[name], _floor(cap * size, grain[name])) for name, size in units.items()}
    steps: list[tuple[float, int, str, int]] = []
    for number, (name, size) in enumerate(units.items()):
        stride = max(1, size // 100 // grain[name]) * grain[name]
        cuts = np.unique(np.append(np.arange(0, most[name], stride), most[name]))
        cuts = cuts[cuts >= least[name]]
        cost = _convex(cuts / size, _interpolated(cuts / size, errors[name]))
        slopes = np.diff(cost) / np.diff(cuts) if len(cuts) > 1 else np.array([])
        steps += [(float(slope), number, name, int(n)) for slope, n in zip(slopes, np.diff(cuts), strict=True)]
    # Slopes of a convex curve rise, so that sorting by slope keeps the steps of each tensor in order.
    removed = dict(least)
    remaining = remove - sum(removed.values())
    for _, _, name, n in sorted(steps):
        if remaining <= 0:
            break
        n = min(n, _floor(remaining, grain[name]))
        removed[name] += n
        remaining -= n
    for name in removed:  # caps are rounded down to the grain, so a few units may remain
        extra = max(0, _floor(min(remaining, units[name] - removed[name]), grain[name]))
        removed[name] += extra
        remaining -= extra
    return removed


def _floor(number: float, grain: int) -> int:
    """The largest multiple of ``grain`` that is not above ``number``."""
    return math.floor(number / grain) * grain


def _interpolated(shares: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
    """Errors at some shares, exponential between known points and quadratic before the first one."""
    x, y = np.array(points, dtype=np.float64).T
    y = np.maximum.accumulate(np.maximum(y, 0))
    tiny = max(float(y.max()) * 1e-12, 1e-300)
    log = np.exp(np.interp(shares, x[1:], np.log(np.maximum(y[1:], tiny))))
    start = shares < x[1]  # the first few weights cost next to nothing
    return np.where(start, y[1] * (shares / x[1]) ** 2, log)


def _convex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The largest convex function below some points, at the same places: their lower hull."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) <= (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return np.interp(x, x[hull], y[hull])


def outlier_sparsities(
    outliers: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, reach: float = 0.08
) -> dict[str, float]:
    """OWL: tensors with more outliers lose less (Yin et al. 2024, arXiv:2310.05175).

    Args:
        outliers: Share of outliers in the block of each tensor, by tensor.
        sizes: Number of weights of each tensor.
        sparsity: The mean, weighted by size.
        reach: Half the distance between the largest and the smallest sparsity; smaller close to 0 or 1.

    Returns:
        Sparsities by tensor.
    """
    reach = min(reach, sparsity / 2, (1 - sparsity) / 2)
    total = sum(sizes.values())
    mean = sum(outliers[name] * size for name, size in sizes.items()) / total
    spread = max(outliers.values()) - min(outliers.values())
    scale = 2 * reach / spread if spread else 0.0
    return {name: sparsity - scale * (outliers[name] - mean) for name in sizes}
