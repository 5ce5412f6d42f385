"""How much each tensor gives: from the config's sparsity to a count of units per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_prune.errors import PlanError
from hf_prune.registry import unknown_name
from hf_prune.targets import Target, module_matches


def allocate(allocation: str | Mapping[str, float], sparsity: float, targets: Sequence[Target]) -> dict[str, float]:
    """The sparsity of every target.

    Args:
        allocation: ``"uniform"``, ``"erk"``, or sparsities by module name or suffix; the longest name counts.
        sparsity: The overall sparsity; with a mapping, that of modules not named in it.
        targets: What is pruned.

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

    Tensors whose density would exceed 1 stay dense, and the others carry their share
    (Evci et al. 2020, arXiv:1911.11134). The weighted mean of the result is ``sparsity``.

    Args:
        sparsity: Overall sparsity, 0 to 1.
        targets: What is pruned.

    Returns:
        Sparsity by parameter name.
    """
    raw = {target.name: sum(target.shape) / target.size for target in targets}
    dense: set[str] = set()
    while True:
        budget = (1 - sparsity) * sum(t.size for t in targets) - sum(t.size for t in targets if t.name in dense)
        mass = sum(raw[t.name] * t.size for t in targets if t.name not in dense)
        scale = budget / mass if mass else 0.0
        full = {t.name for t in targets if t.name not in dense and raw[t.name] * scale > 1}
        if not full:
            return {t.name: 0.0 if t.name in dense else 1 - raw[t.name] * scale for t in targets}
        dense |= full


def _explicit(allocation: Mapping[str, float], sparsity: float, targets: Sequence[Target]) -> dict[str, float]:
    result = {target.name: sparsity for target in targets}
    for module, value in sorted(allocation.items(), key=lambda item: len(item[0])):  # the more specific comes last
        matched = [target.name for target in targets if module_matches(target.module, (module,))]
        if not matched:
            raise PlanError(f"allocation: {unknown_name('target module', module, [t.module for t in targets])}")
        result.update(dict.fromkeys(matched, value))
    return result
