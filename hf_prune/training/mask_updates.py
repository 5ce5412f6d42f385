"""The masks of one update of a schedule: which weights of a model in training are removed from now on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set

from torch import Tensor, nn

from hf_prune.architectures.kinds.channel import find_channel_groups, propagate_channel_masks
from hf_prune.criteria.base import WeightStats, derived_seed
from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import ConfigError, MaskError
from hf_prune.planning.choices import MOVEMENT
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import coverage_notes, make_plan, warn_of
from hf_prune.planning.targets import divisible, resolve_targets
from hf_prune.planning.traits import nm_pattern, removed_kinds
from hf_prune.pruning.compute_masks import compute_masks
from hf_prune.pruning.local_masks import is_sharded
from hf_prune.pruning.weight_norm import lengths_name
from hf_prune.structured.choose_units import choose_units
from hf_prune.structured.prune_units import unit_masks
from hf_prune.structured.unit_plan import unit_groups_of
from hf_prune.training.gradient_scores import GradientScores


def pruned_parameters(model: nn.Module, config: PruningConfig) -> frozenset[str]:
    """Names of the parameters whose zeros are counted: the targets, or the matrices of heads and neurons."""
    if removed_kinds(config):
        return frozenset(piece.name for group in unit_groups_of(model, config) for piece in group.slices)
    targets, left_out = divisible(resolve_targets(model, config, loaded=not is_sharded(model)), config)
    warn_of(coverage_notes(model, config, targets, left_out))
    return frozenset(target.name for target in targets)


def config_of_update(config: PruningConfig, sparsity: float) -> PruningConfig:
    """The settings of one update: a config without its schedule, at a sparsity on the way to the final one.

    Args:
        config: The settings of the training.
        sparsity: What the update aims at; without meaning where the config has no sparsity.
    """
    config = config.replace(schedule=None)
    if config.sparsity is None:
        return config
    if (pattern := nm_pattern(config)) is None:
        return config.replace(sparsity=sparsity)
    # A pattern such as 2:4 fixes the sparsity. On the way there it goes through weaker patterns, 3:4 first.
    pool = pattern[1]
    removed = round(pool * sparsity)
    if not removed:
        return config.replace(granularity="unstructured", sparsity=0.0)
    return config.replace(granularity=f"{pool - removed}:{pool}")


def choose_masks(
    model: nn.Module,
    config: PruningConfig,
    masks: Mapping[str, Tensor],
    learned: GradientScores,
    watched: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """Masks by magnitude, at random, or by what was learned from gradients.

    Args:
        model: The model.
        config: The settings of this update, from :func:`config_of_update`.
        masks: The present masks. By movement, what they remove may come back.
        learned: The scores.
        watched: Parameters that must have scores by now.

    Returns:
        Whole masks by parameter name, True = keep.

    Raises:
        ConfigError: If a watched parameter has no scores yet, or units are to be removed under FSDP.
        MaskError: If the masks do not remove what the plan says.
    """
    scores = learned.whole_scores()
    if unseen := sorted(watched - scores.keys()):
        raise ConfigError(
            f"criterion {config.criterion!r} has seen no gradient of {unseen[0]} yet: begin the schedule after the "
            f"first step, and train that weight, or list its module in exclude_modules"
        )
    if removed_kinds(config):
        return _choose_unit_masks(model, config, scores, averages=learned.averages)
    fixed: Mapping[str, Tensor] = {} if config.criterion in MOVEMENT else masks
    plan = make_plan(model, config, loaded=not is_sharded(model), masks=fixed)
    needs = CRITERIA.get(config.criterion).needs
    stats = {}
    for tensor in plan.tensors:
        name = tensor.target.name
        seed = derived_seed(config.seed, name)
        statistics = {need: tensor.target.matrix(scores[name]) for need in needs}
        stats[name] = dataclasses.replace(WeightStats(seed=seed), **statistics)  # type: ignore[arg-type]
    names = [tensor.target.name for tensor in plan.tensors]
    names += [lengths for name in names if (lengths := lengths_name(name)) is not None]
    whole = {name: learned.whole_weight(name) for name in names}
    chosen, _ = compute_masks(model, plan, stats, fixed, whole=whole)
    removed = sum(int((~mask).sum()) for mask in chosen.values())
    if plan.is_exact and removed != plan.removed_parameters:
        raise MaskError(f"the masks remove {removed:,} weights, the plan {plan.removed_parameters:,}: nothing was set")
    if config.granularity == "channel":
        chosen = propagate_channel_masks(chosen, find_channel_groups(model), model)
    return dict(chosen)


def _choose_unit_masks(
    model: nn.Module, config: PruningConfig, scores: dict[str, Tensor], *, averages: bool
) -> dict[str, Tensor]:
    if is_sharded(model):
        raise ConfigError("heads and neurons are not pruned under FSDP: train with DDP, or prune them before")
    if averages:
        scores = {name: score * model.get_parameter(name).detach().abs() for name, score in scores.items()}
    learns = averages or config.criterion in MOVEMENT
    units, _ = choose_units(model, config, scores=scores if learns else None)
    return unit_masks(model, units)


def exchange_masks(
    masks: Mapping[str, Tensor], gradients: Mapping[str, Tensor], learned: GradientScores, share: float
) -> dict[str, Tensor]:
    """Masks that remove as many weights as before, but others (RigL, Evci et al. 2020, arXiv:1911.11134).

    In each parameter the smallest weights are removed, and removed ones with the largest gradients come back.

    Args:
        masks: The present masks of the parameters to change.
        gradients: This process's parts of the absolute gradients, of the same parameters.
        learned: Gives whole weights.
        share: Share of the weights that are kept to exchange, 0 to 1.
    """
    exchanged = {}
    for name in sorted(masks):
        mask = masks[name].flatten()
        weight, gradient = learned.whole_weight(name).flatten(), learned.whole(gradients[name], name).flatten()
        removed, kept = (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)
        number = min(math.floor(share * len(kept)), len(removed))
        smallest = weight[kept].abs().sort(stable=True).indices[:number]
        returning = gradient[removed].sort(descending=True, stable=True).indices[:number]
        new = mask.clone()
        new[kept[smallest]], new[removed[returning]] = False, True
        exchanged[name] = new.view(masks[name].shape)
    return exchanged
