"""Count what a config removes from a model, before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from hf_prune.architectures.kinds.channel import coupled_parameters, find_channel_groups
from hf_prune.criteria.base import CURVATURE, WIDEST_FISHER_BLOCK
from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import PlanError
from hf_prune.granularities.base import Granularity
from hf_prune.granularities.registry import parse_granularity
from hf_prune.kernels.matrix import Target, is_finite
from hf_prune.planning.allocation import allocate
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.coverage import left_dense, owner_of, parametrized, passed_over, uncovered_matrices
from hf_prune.planning.plan import PlannedTensor, PruningPlan, least_weights, percent
from hf_prune.planning.targets import divisible, resolve_targets
from hf_prune.utils.notices import CoverageWarning, warn_user
from hf_prune.utils.offloaded_weights import weight_of
from hf_prune.utils.wrapping import copied_modules

_MUCH = 0.1  # warn from this share on of weights that a config names and that stay dense
_ROUNDING = 0.005  # the same sparsity in another scope may round to a count that is smaller by this share


def make_plan(
    model: nn.Module,
    config: PruningConfig,
    learned: Mapping[str, float] | None = None,
    *,
    loaded: bool = True,
    masks: Mapping[str, Tensor] | None = None,
    only: Collection[str] | None = None,
) -> PruningPlan:
    """Resolve a config on a model; the model is not changed.

    Args:
        model: Any torch module.
        config: The settings.
        learned: The sparsity of every target, or of each of the matrices in one, by name, for an allocation that is
            learned from data.
        loaded: Whether the weights are loaded. False for a model on the meta device, whose weights cannot be checked
            for NaN and infinity.
        masks: The masks of earlier prunings, by parameter name.
        only: Whole names of modules to choose from; None for all that the config names.

    Raises:
        PlanError: If no target matches, no weight can be divided into units, a weight has NaN or infinite values, or
            the model is already sparser than the config asks for.
        MaskError: If the masks of an earlier pruning no longer fit the model.
    """
    targets = resolve_targets(model, config, loaded=loaded, only=only)
    granularity = parse_granularity(config.granularity)
    if granularity.spec == "channel":
        coupled = coupled_parameters(
            find_channel_groups(model)
        )  # they lose the channels of the convolution before them
        targets = [t for t in targets if t.name not in coupled] or targets
    total = len(targets)
    targets, left_out = divisible(targets, config)
    if not targets:
        misfits = [f"{name} {why}" for name, why in left_out.items()]
        raise PlanError(
            f"granularity {granularity.spec!r} does not divide {len(misfits)} of {total} targets: "
            f"{_some(misfits)}. Choose another granularity, or list those modules in exclude_modules"
        )
    parameters = dict(model.named_parameters())
    if loaded:
        refuse_infinite((t.name, weight_of(model, t.name).detach()) for t in targets)
    _refuse_wide_units(targets, granularity, config)
    tensors, remove = _count(targets, config, granularity, masks or {}, learned)
    _refuse_regrowth(tensors, remove, config)
    return PruningPlan(
        config=config,
        tensors=tensors,
        remove=remove,
        model_name=type(model).__name__,
        total_parameters=sum(p.numel() for p in parameters.values()),
        total_bytes=sum(p.numel() * p.element_size() for p in parameters.values()),
        element_size=parameters[targets[0].name].element_size(),
        uncovered=uncovered_matrices(model),
        left_dense=left_dense(model, config, targets),
        notes=coverage_notes(model, config, targets, left_out),
    )


def warn_of(notes: Sequence[str]) -> None:
    """Warn once, with all notes of a plan."""
    if notes:
        warn_user(" ".join(notes), CoverageWarning)


def coverage_notes(
    model: nn.Module,
    config: PruningConfig,
    targets: Sequence[Target],
    left_out: Mapping[str, str],
    masked: Collection[str] = (),
) -> tuple[str, ...]:
    """Sentences about matrices that a config names and that stay dense all the same.

    Position embeddings and class tokens are matrices too. In common models they are up to 6 % of the weights, too few
    for a sentence.

    Args:
        model: Any torch module.
        config: The settings.
        targets: The weights that are pruned.
        left_out: Why the granularity does not divide other weights, by module name.
        masked: Parameters that have masks already.
    """
    notes = []
    if left_out:
        misfits = _some([f"{name} {why}" for name, why in left_out.items()])
        notes.append(f"Left dense, since granularity {config.granularity!r} does not divide them: {misfits}.")
    missed = {name: size for name, size in passed_over(model, config, targets).items() if name not in masked}
    copies = copied_modules(model)
    owners = {owner_of(name): model.get_submodule(owner_of(name)) for name in missed}
    if copied := {owner: copies[module] for owner, module in owners.items() if module in copies}:
        notes.append(
            f"Not pruned, since modules_to_save trains copies of them: {_some(sorted(set(copied.values())))}; prune "
            f"before the adapters are added, or after they are merged."
        )
    if computed := parametrized(missed, model):
        notes.append(
            f"Left dense, since their weights are computed from others (weight norm or another parametrization): "
            f"{_some(computed)}; torch.nn.utils.parametrize.remove_parametrizations makes plain weights of them."
        )
    dense = sum(missed.values())
    whole = sum(t.size for t in targets) + dense
    if dense and dense >= _MUCH * whole:
        explained = {*left_out, *computed, *copied}
        unexplained = {name: size for name, size in missed.items() if not {name, owner_of(name)} & explained}
        covers = "pruning covers Linear, Conv1D, convolutions, recurrent layers, attention and experts that it knows"
        reason = (
            f": {covers}" if unexplained == missed else f". Of {_largest(unexplained)}: {covers}" if unexplained else ""
        )
        notes.append(
            f"{percent(dense, whole)} of the {whole:,} weights in matrices of {type(model).__name__} stay dense, the "
            f"largest {_largest(missed)}{reason}."
        )
    return tuple(notes)


def _largest(sizes: Mapping[str, int]) -> str:
    """The first three names with their sizes, which are sorted by size already."""
    return ", ".join(f"{name} ({size:,})" for name, size in list(sizes.items())[:3])


def refuse_infinite(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Make sure that weights are finite.

    Args:
        weights: Names and values, of which one at a time is held.

    Raises:
        PlanError: If one is not.
    """
    bad = [name for name, weight in weights if not is_finite(weight)]
    if bad:
        raise PlanError(f"NaN or infinite values in {_some(bad)}: expected finite weights; check how they were made")


def _refuse_wide_units(targets: list[Target], granularity: Granularity, config: PruningConfig) -> None:
    """Refuse units too wide for a block of the Fisher matrix, whose size is that of the unit squared."""
    width = granularity.pool or max(granularity.block_in(t.slab_shape)[1] for t in targets)
    if config.needs & CURVATURE and width > WIDEST_FISHER_BLOCK:
        raise PlanError(
            f"criterion {config.criterion!r} inverts blocks of neighbouring inputs, and granularity "
            f"{granularity.spec!r} decides on {width} of them at once: expected at most {WIDEST_FISHER_BLOCK}; choose "
            f"another granularity, or criterion 'fisher_diagonal'"
        )


def _count(
    targets: list[Target],
    config: PruningConfig,
    granularity: Granularity,
    masks: Mapping[str, Tensor],
    learned: Mapping[str, float] | None,
) -> tuple[tuple[PlannedTensor, ...], int]:
    """Count the units of each target, and those to remove: exactly round(sparsity * n) in every pool of n."""
    assert config.sparsity is not None
    unknown = config.scope == "global" or (config.learns_allocation and learned is None)
    sparsities = learned or allocate(config.allocation, config.sparsity, targets)
    tensors = []
    for target in targets:
        rows, columns = granularity.grid(target)
        names = [target.slab(number).name for number in range(target.slabs)]
        shares = [sparsities[name] for name in names] if names[0] in sparsities else [sparsities[target.name]]
        units, sparsity = rows * columns, sum(shares) / len(shares)
        mask = masks.get(target.name)
        already = 0 if mask is None else mask.numel() - int(mask.count_nonzero())
        pool = granularity.pool or (columns if config.scope == "row" else units // pools_of(target, config))
        each = units // len(shares)
        counts = tuple(round(share * min(pool, each)) * max(1, each // pool) for share in shares)
        if unknown:
            tensors.append(PlannedTensor(target, None, units, pool, None, already))
        else:
            by_slab = counts if len(counts) > 1 else ()
            tensors.append(PlannedTensor(target, sparsity, units, pool, sum(counts), already, by_slab))
    if unknown:
        return tuple(tensors), round(config.sparsity * sum(t.units for t in tensors))
    return tuple(tensors), sum(t.remove or 0 for t in tensors)


def pools_of(target: Target, config: PruningConfig) -> int:
    """In how many pools the units of a target compete in scope layer: those of each expert among themselves.

    The groups of a convolution are one layer, unless a criterion repairs: then each is decided on by itself.
    """
    together = target.layout == "conv" and not CRITERIA.get(config.criterion).repairs
    return 1 if together else target.slabs


def _refuse_regrowth(tensors: tuple[PlannedTensor, ...], remove: int, config: PruningConfig) -> None:
    """Refuse a config that asks for fewer zeros than there are: pruning only ever adds zeros."""
    already = sum(t.already for t in tensors)
    if any(t.remove is None for t in tensors):
        planned = least_weights(tensors, remove)
    else:
        planned = sum((t.remove or 0) * (t.target.size // t.units) for t in tensors)
    size = sum(t.target.size for t in tensors)
    if already > planned + _ROUNDING * size:
        raise PlanError(
            f"sparsity={config.sparsity:g} is below what earlier pruning already removed from these targets "
            f"({already:,} of {size:,} weights, {percent(already, size)}), and pruning only adds zeros: "
            f"ask for more, or call discard_masks() first"
        )


def _some(items: list[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + more
