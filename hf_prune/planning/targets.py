"""Which weights are pruned, and the one canonical (out_features, in_features) view of them.

Layouts differ: ``nn.Linear`` stores (out, in), the ``Conv1D`` of GPT-2 (in, out), convolutions
(out, in / groups, *kernel), packed experts one such matrix after the other. Everything after this module sees a matrix
with outputs as rows and inputs as columns; experts, and the groups of a convolution, lie in it one above the other. The
columns of a convolution run over kernel positions and, fastest, over input channels, so that M consecutive columns are
M consecutive inputs.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import regex
import torch
from torch import Tensor, nn

from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import PlanError
from hf_prune.granularities.registry import parse_granularity
from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.parts import in_parts, is_chosen
from hf_prune.planning.prunable import WEIGHT_NORM, PrunableWeight, output_embeddings, prunable_weights, stays_dense
from hf_prune.utils.number_formats import refuse_quantized
from hf_prune.utils.offloaded_weights import is_offloaded
from hf_prune.utils.registry import unknown_name
from hf_prune.utils.torch_masks import refuse_torch_masks
from hf_prune.utils.wrapping import adapters, copied_modules, unadapted_name

ALL_LINEAR = "all-linear"
_MATCH_SECONDS = 1.0  # time limit for matching a regular expression with one name


def every_target(model: nn.Module) -> list[Target]:
    """All weights of a model that can be pruned, whether they are loaded or not."""
    return resolve_targets(model, PruningConfig(target_modules=".*"), loaded=False)


def resolve_targets(
    model: nn.Module, config: PruningConfig, *, loaded: bool = True, only: Collection[str] | None = None
) -> list[Target]:
    """Find the weights that a config names on a model, in the order of its modules.

    Tied weights and shared modules appear once, under the name that ``named_parameters()`` gives them. Adapters are not
    targets; the layers that they adapt are found by their names, with or without ``.base_layer``. Modules that
    ``modules_to_save`` copies are not targets either: the copies run in their place.

    Args:
        model: Any torch module.
        config: Its ``target_modules``, ``exclude_modules`` and ``only``.
        loaded: Whether the weights must be loaded. False for a model on the meta device, whose weights come later.
        only: Whole names of modules to choose from; None for all that the config names.

    Raises:
        ModelTypeError: If ``model`` is not a torch module.
        PlanError: If a name matches no module, if nothing remains to prune, if a weight is not loaded or not of a plain
            floating-point type, if the model is quantized, or if torch.nn.utils.prune holds masks of its own.
    """
    refuse_quantized(model)
    refuse_torch_masks(model)
    prunable = list(prunable_weights(model))
    known = [name for weight in prunable for name in weight.names]
    every_name = [name for name, _ in model.named_modules(remove_duplicate=False)]
    every_name += [weight.path for weight in prunable if weight.attribute != "weight"]
    if adapted := bool(adapters(model)):
        every_name += [unadapted_name(name) for name in every_name]
    for setting in ("target_modules", "exclude_modules"):
        _check_matches(setting, getattr(config, setting), every_name, known)
    heads = output_embeddings(model)
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).extend({name, unadapted_name(name)} if adapted else {name})

    included, excluded = quick_pattern(config.target_modules), quick_pattern(config.exclude_modules)
    in_part = is_chosen(model, config)

    def means(pattern: str | Collection[str], weight: PrunableWeight) -> bool:
        if pattern == ALL_LINEAR:
            return not stays_dense(weight) and weight.module not in heads
        modules = aliases[id(weight.module)]
        names = modules if weight.attribute == "weight" else [*modules, *(f"{m}.{weight.attribute}" for m in modules)]
        return any(module_matches(name, pattern) for name in names)

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    targets: dict[int, Target] = {}
    for weight in prunable:
        if means(excluded, weight) or not means(included, weight) or not any(map(in_part, aliases[id(weight.module)])):
            continue
        if only is not None and not any(name in only for name in aliases[id(weight.module)]):
            continue
        parameter = weight.weight
        if weight.layout == "linear" and _is_removed(weight):
            continue
        if id(parameter) not in targets:
            _check_weight(model, weight.path, parameter, loaded)
            targets[id(parameter)] = weight.target(names[id(parameter)])
    if not targets:
        copied = ", ".join(dict.fromkeys(copied_modules(model).values()))
        raise PlanError(
            f"no target matched target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r}{in_parts(config)}: {type(model).__name__} has {_available(prunable)}"
            f"{f', and modules_to_save trains copies of {copied}' if copied else ''}"
        )
    return list(targets.values())


def quick_pattern(pattern: str | Collection[str]) -> str | frozenset[str]:
    """A setting of modules in the form in which :func:`module_matches` is fast, however many names it lists."""
    return pattern if isinstance(pattern, str) else frozenset(pattern)


def module_matches(name: str, pattern: str | Collection[str]) -> bool:
    """Whether a module name matches a regular expression as a whole, or ends in one of some suffixes.

    Args:
        name: The name.
        pattern: The regular expression, or the suffixes, fastest as a set.

    Raises:
        PlanError: If the regular expression exceeds the time limit.
    """
    if not isinstance(pattern, str):
        return any(suffix in pattern for suffix in suffixes(name))
    try:
        return regex.fullmatch(pattern, name, timeout=_MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise PlanError(
            f"{pattern[:60]!r} takes longer than {_MATCH_SECONDS:g} s to match with {name!r}: list the modules instead"
        ) from error


def suffixes(name: str) -> Iterator[str]:
    """A dotted name, and the rest of it after each dot: ``a.b.c``, ``b.c``, ``c``."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _check_matches(setting: str, pattern: str | tuple[str, ...], names: list[str], prunable: Collection[str]) -> None:
    """Refuse a name that matches no module: a typing error would silently prune or protect nothing."""
    if pattern == ALL_LINEAR or not pattern:
        return
    known = sorted({unadapted_name(name).rsplit(".", 1)[-1] for name in prunable})
    if isinstance(pattern, str):
        if not any(module_matches(name, pattern) for name in names):
            raise PlanError(
                f"{setting}={pattern!r} is a regular expression for whole module names, and none matches: expected "
                f"one such as '.*{known[0] if known else 'dense'}', or a list of last names, such as [{pattern!r}]; "
                f"there are {', '.join(known)}"
            )
        return
    known_suffixes = {suffix for name in names for suffix in suffixes(name)}
    for suffix in pattern:
        if suffix not in known_suffixes:
            raise PlanError(f"{setting}: {unknown_name('module', suffix, known)}")


def _is_removed(weight: PrunableWeight) -> bool:
    """Whether shrink() has removed all of a weight."""
    if isinstance(weight.module, nn.Linear):
        return 0 in (weight.module.out_features, weight.module.in_features)
    return not weight.called and weight.weight.numel() == 0


def _check_weight(model: nn.Module, name: str, weight: Tensor, loaded: bool) -> None:
    if weight.is_meta and loaded and not is_offloaded(model, name):
        raise PlanError(
            f"{name} is on the meta device, and no hook of accelerate holds its values: load the model's weights "
            f"before pruning it"
        )
    if weight.numel() == 0:
        raise PlanError(
            f"{name} has no elements (shape {tuple(weight.shape)}): gather partitioned weights before "
            f"pruning, or list the module in exclude_modules"
        )


def _available(prunable: Sequence[PrunableWeight]) -> str:
    if not prunable:
        return "no Linear, Conv1D or convolution at all"
    kinds: dict[str, set[str]] = {}
    for weight in prunable:
        kinds.setdefault(type(weight.module).__name__, set()).add(weight.names[-1].rsplit(".", 1)[-1])
    return "; ".join(f"{kind} named {', '.join(sorted(names))}" for kind, names in sorted(kinds.items()))


def refuse_read_only(model: nn.Module) -> None:
    """Make sure that weights can be written to: in a file that is mapped read-only, writing would kill the process.

    Only Linux lists the mapped files; elsewhere nothing is checked.

    Raises:
        PlanError: If a weight cannot be written to.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return
    ends, writable = [], []
    for line in maps.read_text().splitlines():
        addresses, permissions, *_ = line.split()
        ends.append(int(addresses.partition("-")[2], 16))
        writable.append("w" in permissions)
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided
        if plain and parameter.device.type == "cpu" and parameter.numel():
            mapping = bisect.bisect_right(ends, parameter.data_ptr())
            if mapping < len(ends) and not writable[mapping]:
                raise PlanError(
                    f"{name} lies in memory that cannot be written to, such as a file that was mapped read-only: "
                    f"give the model a copy of it first, parameter.data = parameter.data.clone()"
                )


def divisible(targets: list[Target], config: PruningConfig) -> tuple[list[Target], dict[str, str]]:
    """Split targets into those that the granularity divides into units and the reasons for others, by module name."""
    granularity = parse_granularity(config.granularity)
    reasons = {t.name: granularity.misfit(t) or _lone_units(t, config) or _computed(t, config) for t in targets}
    misfits = {t.name: (t, why) for t in targets if (why := reasons[t.name]) is not None}
    left_out = {t.label: f"{t.shape}: {why}" for t, why in misfits.values()}
    return [t for t in targets if t.name not in misfits], left_out


def _lone_units(target: Target, config: PruningConfig) -> str | None:
    """Why the groups of a convolution cannot be decided on one by one, as a criterion that repairs does."""
    if target.layout != "conv" or target.slabs == 1 or not CRITERIA.get(config.criterion).repairs:
        return None
    rows, columns = parse_granularity(config.granularity).units(target.slab_shape)
    if rows * columns > 1:
        return None
    return f"each of its {target.slabs} groups is a single unit, and criterion {config.criterion!r} needs several"


def _computed(target: Target, config: PruningConfig) -> str | None:
    """Why the values of a weight cannot be changed, as repairs do."""
    if not target.name.endswith(WEIGHT_NORM) or (config.repair is None and not CRITERIA.get(config.criterion).repairs):
        return None
    return "weight norm computes it, so it cannot be repaired unless parametrize.remove_parametrizations was called"


def bias_names(model: nn.Module, targets: Collection[Target]) -> dict[str, str]:
    """The names of the biases that belong to one target alone, by the target's name.

    A weight that several modules share has none, nor has a weight whose bias another module shares.

    Args:
        model: Any torch module.
        targets: Some of its weights.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    target_names = {t.name for t in targets}
    biases: dict[str, list[Tensor | None]] = {}
    users: dict[int, int] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and "bias" in attribute:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    for weight in prunable_weights(model):  # a tied embedding does not count
        if (name := names.get(id(weight.weight))) in target_names:
            assert name is not None
            bias = None if weight.bias is None else weight.module._parameters.get(weight.bias)
            biases.setdefault(name, []).append(bias)
    single = {name: of_target[0] for name, of_target in biases.items() if len(of_target) == 1}
    return {name: names[id(b)] for name, b in single.items() if b is not None and users[id(b)] == 1}
