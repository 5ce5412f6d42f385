"""Targets that calibration batches do not reach, or hardly reach: refused, or warned of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import Target
from hf_prune.utils.formatting import first_few
from hf_prune.utils.notices import warn_user

_NUMBER = re.compile(r"\d+")


def report_unreached(
    model: nn.Module, targets: Sequence[Target], unreached: Sequence[Target], called: set[int], warn: bool = True
) -> None:
    """Warn of targets that no batch reaches, and say where the module around them ran without calling them.

    Args:
        model: The model.
        targets: All targets.
        unreached: Those that no batch called.
        called: Ids of all modules that were called.
        warn: Whether to warn; what cannot be calibrated at all is refused in any case.

    Raises:
        CalibrationError: If adapters around a target read its weight without calling it.
    """
    problem = (
        f"no calibration batch reached {len(unreached)} of {len(targets)} targets "
        f"({first_few([t.name for t in unreached])}): "
    )
    passed, reasons = {}, []
    modules = {t.name: model.get_submodule(t.module) for t in unreached}
    if recurrent := [t.module for t in unreached if isinstance(modules[t.name], nn.RNNBase | nn.RNNCellBase)]:
        reasons.append(f"recurrent layers ({first_few(list(dict.fromkeys(recurrent)))}) multiply inside one operator")
    others = [t for t in unreached if t.module not in recurrent]
    if inside := {type(m).__name__ for t in others if id(m := modules[t.name]) in called}:
        reasons.append(f"{', '.join(sorted(inside))} ran, and multiplies in a way that calibration cannot follow")
    for t in others:
        if id(modules[t.name]) in called:
            continue
        parent = model.get_submodule(t.module.rpartition(".")[0])
        if id(parent) in called and t.module:
            passed[t.module] = f"{type(parent).__module__}.{type(parent).__name__}"
    kinds = ", ".join(sorted(set(passed.values())))
    if any(module.endswith(".base_layer") for module in passed):
        raise CalibrationError(
            f"{problem}the adapters around them ({kinds}) read their weights without calling them, so nothing flows "
            f"into them; prune before get_peft_model(), or merge_and_unload() first, or choose a criterion without "
            f"data"
        )
    if warn:
        if passed:
            reasons.append(f"{kinds} ran without calling {', '.join(list(passed)[:3])}")
        warn_user("; ".join([f"{problem}they are pruned as if all their inputs were alike", *reasons]))


def warn_of_few_tokens(targets: Sequence[Target], tokens: Mapping[str, Sequence[int]]) -> None:
    """Warn of experts that saw no token at all, or fewer than they have inputs.

    Experts are told by their names: matrices of the same shape, whose names differ in numbers only, and that saw
    different numbers of tokens. All others see every token, or heads one per text: how many is the caller's choice.

    Args:
        targets: All targets.
        tokens: How many tokens each matrix of each of them saw.
    """
    by_name = {t.name: t for t in targets}
    seen = {
        (target.slab(i).name, target.slab_shape): number
        for name, numbers in tokens.items()
        for i, number in enumerate(numbers)
        if (target := by_name[name]) and not name.endswith("in_proj_weight")  # a query, a key and a value
    }
    counts: dict[tuple[str, tuple[int, int]], set[int]] = {}
    for (name, shape), number in seen.items():
        counts.setdefault((_NUMBER.sub("#", name), shape), set()).add(number)
    routed = {k: n for k, n in seen.items() if len(counts[_NUMBER.sub("#", k[0]), k[1]]) > 1}
    matrices = sum(t.slabs if t.layout != "conv" else 1 for t in targets)
    if missed := [name for (name, _), number in routed.items() if not number]:
        warn_user(
            f"{len(missed)} of {matrices} targets are experts that saw no calibration token ({first_few(missed)}): "
            f"they are pruned by magnitude; calibrate on more texts, or name them in exclude_modules"
        )
    few = [f"{name}: {n} for {shape[1]} inputs" for (name, shape), n in routed.items() if 0 < n < shape[1]]
    if few:
        warn_user(
            f"{len(few)} of {matrices} targets are experts that saw fewer calibration tokens than they "
            f"have inputs ({'; '.join(few[:3])}{'; …' if len(few) > 3 else ''}): their statistics are uncertain, "
            f"and only damping makes up for it; calibrate on more texts, or name them in exclude_modules",
        )
