"""Settings of a config that may count the experts of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_prune.architectures.unit_groups import numbered

_EXPERTS = re.compile(r"expert|moe|mixture|router|gate|gating", re.IGNORECASE)


def expert_settings(model: Any) -> list[tuple[str, int]]:
    """Whole numbers in a config, and in the configs inside it, that may count experts, with their dotted names.

    Those that are called so come first. Another number may count them where a list of modules, or a parameter of
    matrices, has as many parts, and a matrix beside it has as many rows: a router.

    Args:
        model: A transformers model.
    """
    every = list(_numbers(model.config))
    named = [(path, number) for path, number in every if is_named(path)]
    if not (others := {number for path, number in every if not is_named(path)}):
        return named
    counted = _numbers_of_parts(model, others)
    return named + [(path, number) for path, number in every if not is_named(path) and number in counted]


def is_named(path: str) -> bool:
    """Whether the name of a setting says that it counts experts."""
    return "expert" in path.rpartition(".")[2]


def _numbers(config: Any, before: str = "") -> Iterator[tuple[str, int]]:
    from transformers import PreTrainedConfig

    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _numbers(value, f"{before}{key}.")
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1 and not key.startswith("_"):
            yield before + key, value


def _numbers_of_parts(model: nn.Module, numbers: set[int]) -> set[int]:
    """Those of some numbers of which a list or a packed parameter has as many parts, and a matrix beside it rows."""
    found: set[int] = set()
    for name, module in model.named_modules():
        parts = {
            len(child._modules)
            for child in module.children()
            if _is_list(child) and len(numbered(child)) == len(child._modules)
        }
        if _EXPERTS.search(name.rpartition(".")[2]):  # heads may be packed as well, beside a matrix with rows for them
            packed = [p for child in (module, *module.children()) for p in child._parameters.values()]
            parts |= {len(p) for p in packed if p is not None and p.dim() == 3}
        for number in parts & numbers - found:
            beside = [module, *(m for child in module.children() if not _is_list(child) for m in child.modules())]
            matrices = [p for m in beside for p in m._parameters.values() if p is not None and p.dim() == 2]
            if any(len(p) == number for p in matrices):
                found.add(number)
    return found


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)
