"""Matrices of a model that a config does not prune."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.parts import is_chosen
from hf_prune.planning.prunable import (
    Convolution,
    output_embeddings,
    prunable_weights,
    router_weights,
    stays_dense,
    tables,
)
from hf_prune.planning.targets import ALL_LINEAR, module_matches, quick_pattern
from hf_prune.utils.wrapping import adapters, copied_modules


def uncovered_matrices(model: nn.Module) -> dict[str, int]:
    """Matrices that no config can target, such as experts of an unknown kind: sizes by parameter name.

    Embeddings and position tables are left out: they are looked up or added, not multiplied. So are routers, which are
    left alone.

    Args:
        model: Any torch module.
    """
    covered = {id(weight.weight) for weight in prunable_weights(model)}
    covered |= {id(weight.module._parameters.get(weight.bias or "")) for weight in prunable_weights(model)}
    covered |= {id(p) for p in (router_weights(model) | tables(model)).values()}
    covered |= {id(p) for module in adapters(model) for p in module.parameters(recurse=False)}
    covered |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {name: p for name, p in model.named_parameters() if id(p) not in covered}
    return {name: p.numel() for name, p in matrices.items() if sum(size > 1 for size in p.shape) > 1}


def left_dense(model: nn.Module, config: PruningConfig, targets: Collection[Target]) -> dict[str, int]:
    """Weights that the default targets leave dense by choice, routers, and tables: sizes by parameter name.

    Args:
        model: Any torch module.
        config: Its ``target_modules``; if they name modules, nothing is left by our choice.
        targets: The targets that the config leads to.
    """
    if config.target_modules != ALL_LINEAR:
        return {}
    names, pruned = {id(parameter): name for name, parameter in model.named_parameters()}, {t.name for t in targets}
    chosen = {names[id(w.weight)]: w.weight.numel() for w in prunable_weights(model) if stays_dense(w)}
    chosen |= {names[id(weight)]: weight.numel() for weight in (router_weights(model) | tables(model)).values()}
    return {name: size for name, size in chosen.items() if name not in pruned}


def passed_over(model: nn.Module, config: PruningConfig, targets: Collection[Target]) -> dict[str, int]:
    """Matrices that a config asks to prune and that are not among the targets: sizes by parameter name, largest first.

    By default these are parametrized layers, experts of an unknown kind and the like, and matrices that the granularity
    does not divide. Embeddings, what is left dense by choice, the output embedding and modules in ``exclude_modules``
    are not counted.

    Args:
        model: Any torch module.
        config: Its ``target_modules``, ``exclude_modules`` and ``only``.
        targets: The targets that the config leads to.
    """
    heads = output_embeddings(model) if config.target_modules == ALL_LINEAR else set()
    target_names = {t.name for t in targets}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sizes = {n: size for n, size in uncovered_matrices(model).items() if model.get_submodule(owner_of(n)) not in heads}
    copied = copied_modules(model)
    owner: dict[str, tuple[str, ...]] = {}
    for name in sizes:
        owner[name] = (copied.get(model.get_submodule(owner_of(name)), owner_of(name)),)
    for weight in prunable_weights(model):
        name = names[id(weight.weight)]
        all_excluded = config.exclude_modules == ALL_LINEAR and not stays_dense(weight)
        chosen = config.target_modules == ALL_LINEAR and stays_dense(weight)
        if name not in target_names and weight.module not in heads and not chosen and not all_excluded:
            owner[name], sizes[name] = weight.names, weight.weight.numel()

    def means(pattern: str | Collection[str], names: tuple[str, ...]) -> bool:
        return pattern != ALL_LINEAR and any(module_matches(name, pattern) for name in names)

    included, excluded = quick_pattern(config.target_modules), quick_pattern(config.exclude_modules)
    in_part = is_chosen(model, config)
    names_meant = [
        name
        for name in sizes
        if (included == ALL_LINEAR or means(included, owner[name]))
        and not (excluded and means(excluded, owner[name]))
        and any(map(in_part, owner[name]))
    ]
    return {name: sizes[name] for name in sorted(names_meant, key=lambda name: -sizes[name])}


def owner_of(name: str) -> str:
    """The module that a parameter belongs to: ``x`` for ``x.weight`` and ``x.parametrizations.weight.original1``."""
    return re.split(r"\.?parametrizations\.", name)[0] if "parametrizations." in name else name.rpartition(".")[0]


def parametrized(names: Collection[str], model: nn.Module) -> list[str]:
    """The Linears and convolutions whose weight is computed from some of the named parameters."""
    owners = {owner: model.get_submodule(owner) for owner in map(owner_of, names)}
    return [n for n, m in owners.items() if isinstance(m, nn.Linear | Convolution) and "weight" not in m._parameters]
