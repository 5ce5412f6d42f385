"""Matrices of a model that a config does not prune."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.targets import (
    ALL_LINEAR,
    module_matches,
    output_embeddings,
    prunable_modules,
    quick_pattern,
)
from hf_prune.utils.wrapping import adapters, copied_modules

_RAW_CHANNELS = 4  # a convolution of at most so many channels reads pixels or samples


def uncovered_matrices(model: nn.Module) -> dict[str, int]:
    """Matrices that no config can target, such as fused experts: sizes by parameter name.

    Embeddings are left out: their rows are looked up, not multiplied.

    Args:
        model: Any torch module.
    """
    covered = {id(p) for _, (module, _) in prunable_modules(model) for p in module.parameters(recurse=False)}
    covered |= {id(p) for module in adapters(model) for p in module.parameters(recurse=False)}
    covered |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {name: p for name, p in model.named_parameters() if id(p) not in covered}
    return {name: p.numel() for name, p in matrices.items() if sum(size > 1 for size in p.shape) > 1}


def passed_over(model: nn.Module, config: PruningConfig, targets: Collection[Target]) -> dict[str, int]:
    """Matrices that a config asks to prune and that are not among the targets: sizes by parameter name, largest first.

    By default these are fused experts and the like, convolutions, parametrized layers, and matrices that the
    granularity does not divide. Embeddings (also by convolutions of pixels), the output embedding and modules in
    ``exclude_modules`` are not counted.

    Args:
        model: Any torch module.
        config: Its ``target_modules`` and ``exclude_modules``.
        targets: The targets that the config leads to.
    """
    heads = output_embeddings(model) if config.target_modules == ALL_LINEAR else set()
    target_names = {t.name for t in targets}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sizes = {n: size for n, size in uncovered_matrices(model).items() if model.get_submodule(owner_of(n)) not in heads}
    copied = copied_modules(model)
    owner = {name: copied.get(model.get_submodule(owner_of(name)), owner_of(name)) for name in sizes}
    for module_name, (module, layout) in prunable_modules(model):
        weight = module._parameters["weight"]
        assert weight is not None
        name = names[id(weight)]
        embeds = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.in_channels <= _RAW_CHANNELS
        all_excluded = config.exclude_modules == ALL_LINEAR and layout != "conv"
        if name not in target_names and module not in heads and not embeds and not all_excluded:
            owner[name], sizes[name] = module_name, weight.numel()

    def means(pattern: str | Collection[str], name: str) -> bool:
        return pattern != ALL_LINEAR and module_matches(name, pattern)

    included, excluded = quick_pattern(config.target_modules), quick_pattern(config.exclude_modules)
    names_meant = [
        name
        for name in sizes
        if (included == ALL_LINEAR or means(included, owner[name])) and not (excluded and means(excluded, owner[name]))
    ]
    return {name: sizes[name] for name in sorted(names_meant, key=lambda name: -sizes[name])}


def owner_of(name: str) -> str:
    """The module that a parameter belongs to: ``x`` for ``x.weight`` and ``x.parametrizations.weight.original1``."""
    return re.split(r"\.?parametrizations\.", name)[0] if "parametrizations." in name else name.rpartition(".")[0]


def parametrized_linears(names: Collection[str], model: nn.Module) -> list[str]:
    """The Linear modules whose weight is computed from some of the named parameters."""
    owners = {owner: model.get_submodule(owner) for owner in map(owner_of, names)}
    return [n for n, m in owners.items() if isinstance(m, nn.Linear) and "weight" not in m._parameters]
