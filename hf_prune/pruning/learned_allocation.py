"""Allocations that are learned from calibration data: how much each target can give, seen on the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import SlabAccumulators
from hf_prune.calibration.input_reader import InputReader, check_finite
from hf_prune.calibration.padding import first_input
from hf_prune.calibration.sensitivity import Sensitivity, measure_sensitivity, measured_batches
from hf_prune.calibration.slabs import slab_number
from hf_prune.kernels.blocks import spread_blocks
from hf_prune.kernels.least_squares import damped, layer_errors, least_squares
from hf_prune.kernels.matrix import Target
from hf_prune.kernels.selection import keep_highest
from hf_prune.planning.allocation import minimize_total_error, outlier_sparsities
from hf_prune.planning.plan import PruningPlan, targets_of
from hf_prune.pruning.run import CalibrationRun
from hf_prune.pruning.selector import unit_scores
from hf_prune.pruning.weight_norm import effective_weight
from hf_prune.utils.distributed import broadcast, fail_together
from hf_prune.utils.offloaded_weights import weight_of

Read = Callable[[str], Tensor]  # a weight by its name
_SHARES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # at which the error of a target is estimated
_ITERATIONS = 3  # of least squares: enough to see what a repair will bring
_ROWS = 128  # of a matrix whose errors are computed; they stand for the others
_TOGETHER = 2**27  # bytes of the Gram matrices of a block, up to which they are gathered in one pass
_OUTLIER = 5.0  # times the mean of a block


def learn_sparsities(run: CalibrationRun[PruningPlan]) -> tuple[dict[str, float], Sensitivity | None]:
    """The sparsity of every target by the plan's allocation, ``"fisher"`` or ``"owl"``; the model is not changed.

    Args:
        run: The model, its plan, with sparsities yet unknown, and the data.

    Returns:
        Sparsities by parameter name, or by that of each of several matrices in one, and the sensitivity if it was
        measured on the way; to be closed.
    """
    plan, cache_bytes = run.plan, run.memory.shared
    data = run.data if plan.config.allocation == "owl" else measured_batches(run.model, run.data)
    with InputReader(run.model, targets_of(plan), data, cache_bytes=cache_bytes, trials=run.trials) as reader:
        steps = reader.order()
        measure = partial(measure_sensitivity, reader, plan.config.seed, run.progress, cache_bytes)
        sparsities, sensitivity = allocate(
            reader, steps, plan, measure, run.previous_masks, partial(weight_of, run.model)
        )
    if sensitivity is not None and len(data) < len(run.data):
        sensitivity.forget_tokens()
    return sparsities, sensitivity


def allocate(
    reader: InputReader,
    steps: list[list[Target]],
    plan: PruningPlan,
    measure: Callable[[], Sensitivity],
    masks: Mapping[str, Tensor],
    weight: Read,
) -> tuple[dict[str, float], Sensitivity | None]:
    """:func:`learn_sparsities` for a model that somebody else runs.

    Args:
        reader: Runs it.
        steps: The targets in the order of their calls.
        plan: Its plan.
        measure: Measures the sensitivities, where they are needed.
        masks: Masks of earlier prunings, by parameter name.
        weight: Gives a weight by its name.
    """
    if plan.config.allocation == "owl":
        return _owl(reader, steps, plan, weight), None
    sensitivity = measure()
    try:
        return _fisher(reader, steps, plan, sensitivity, masks, weight), sensitivity
    except BaseException:
        sensitivity.close()
        raise


def _fisher(
    reader: InputReader,
    steps: list[list[Target]],
    plan: PruningPlan,
    sensitivity: Sensitivity,
    masks: Mapping[str, Tensor],
    read: Read,
) -> dict[str, float]:
    """Sparsities that minimise the change of the predictions, as the Fisher information estimates it.

    For each matrix the Fisher information is taken to be the product of a diagonal over the outputs and the Gram
    matrix of the inputs, both weighted by squared gradients (K-FAC: Martens and Grosse 2015, arXiv:1503.05671). At some
    sparsities the best weights by the Optimal Brain Surgeon are kept (Hassibi and Stork 1992) and solved for again; the
    error that remains is a point of the matrix's curve; see :func:`hf_prune.planning.allocation.minimize_total_error`.
    """
    errors: dict[str, list[tuple[float, float]]] = {}  # by the name of each matrix
    removed_before: dict[str, int] = {}
    for step in gathered_together(reader, steps):
        reader.finish(step)  # nothing changes here, so what a block returns is recorded in the pass that looks into it
        for target, gram in weighted_grams(reader, step, sensitivity):
            name = target.name
            weight = target.matrix(effective_weight(name, read)).to(gram.dtype)
            old = None if name not in masks else target.matrix(masks[name]).to(gram.device)
            outputs = sensitivity.outputs[name].to(gram)
            with fail_together():
                block = plan.granularity.block_in(target.slab_shape)
                curves = {}
                for number, of_slab in enumerate(gram if target.slabs > 1 else gram[None]):
                    rows = target.rows(number)
                    kept = None if old is None else old[rows]
                    curve = _error_curve(weight[rows], of_slab, outputs[rows], block, kept)
                    curves[target.slab(number).name] = curve
                    removed_before[target.slab(number).name] = 0 if kept is None else int((~kept).sum())
                if target.layout == "conv" and target.slabs > 1:  # the groups of a convolution are one layer
                    shares = [share for share, _ in next(iter(curves.values()))]
                    totals = [sum(error for _, error in points) for points in zip(*curves.values(), strict=True)]
                    curves = {name: list(zip(shares, totals, strict=True))}
                    removed_before[name] = sum(removed_before.pop(target.slab(n).name) for n in range(target.slabs))
                errors |= curves
    units: dict[str, int] = {}
    pools: dict[str, int] = {}
    for t in plan.tensors:
        slabs = [t.target.slab(number).name for number in range(t.target.slabs)]
        names = slabs if slabs[0] in errors else [t.target.name]
        units |= {name: t.units // len(names) for name in names}
        pools |= {name: max(1, t.units // len(names) // t.pool) for name in names}
        for name in names:
            removed_before[name] //= t.target.size // t.units
    counts = minimize_total_error(errors, units, plan.remove, removed_before, pools=pools)
    agreed = broadcast(torch.tensor(list(counts.values()))).tolist()
    return {name: count / units[name] for name, count in zip(counts, agreed, strict=True)}


def gathered_together(reader: InputReader, steps: list[list[Target]]) -> Iterator[list[Target]]:
    """The steps of a block as one, as far as their Gram matrices are small: a pass through the block less for each.

    Args:
        reader: Runs the model, which does not change in between.
        steps: The targets in the order of their calls.
    """
    block: nn.Module | None = None
    step: list[Target] = []
    size = 0
    for following in steps:
        blocks = {reader.block_of(target.name) for target in following}
        its = blocks.pop() if len(blocks) == 1 else None
        more = sum(8 * target.slabs * target.slab_shape[1] ** 2 for target in following)
        if step and (its is None or its is not block or size + more > _TOGETHER):
            yield step
            step, size = [], 0
        block, step, size = its, step + following, size + more
    if step:
        yield step


def weighted_grams(
    reader: InputReader, step: list[Target], sensitivity: Sensitivity
) -> Iterator[tuple[Target, Tensor]]:
    """The Gram matrix of what flows into each target, tokens weighed by how much the predictions depend on them."""
    sums = reader.repeated(lambda: _weighted_sums(reader, step, sensitivity))
    for t in step:
        accumulator = sums.pop(t.name)
        accumulator.add_others(reader.device)
        gram = accumulator.statistics({"input_gram"}, reader.device)["input_gram"]
        check_finite(t.name, {"input_gram": gram})
        yield t, gram


def _weighted_sums(reader: InputReader, step: list[Target], sensitivity: Sensitivity) -> dict[str, SlabAccumulators]:
    sums = {t.name: SlabAccumulators({"input_gram"}, t) for t in step}
    calls: dict[tuple[str, int], int] = {}

    def watch(name: str, layout: str) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
            key = (name, reader.current)
            call = calls[key] = calls.get(key, -1) + 1
            rows = reader.padding.rows(module, first_input(args, kwargs), layout)
            known = name not in sensitivity.misplaced
            weights = sensitivity.weights(*key, call) if known else None
            sums[name].add(rows, None if weights is None else weights.to(rows.device), slab=slab_number(module))

        return read

    watchers = [watcher for t in step for watcher in reader.watchers(t.name, watch(t.name, t.layout))]
    reader.run(watchers, range(len(reader.batches)))
    return sums


@torch.no_grad()
def _error_curve(
    weight: Tensor, gram: Tensor, outputs: Tensor, block: tuple[int, int], old: Tensor | None
) -> list[tuple[float, float]]:
    """(share removed, error) of one matrix.

    Of a large matrix, only some rows are solved for, evenly spaced among all in the order of how much they are worth.
    What the others lose is taken to be the same share of what their removed weights are worth.

    Args:
        weight: (out, in).
        gram: (in, in).
        outputs: (out,) weights of the outputs.
        block: (outputs, inputs) of one unit.
        old: (out, in) bool mask of earlier prunings.
    """
    gram = damped(gram)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double())).diagonal().to(gram.dtype)
    worth = weight.square() * outputs[:, None] / inverse
    scores = unit_scores(worth.float(), block, old)
    by_worth, count = worth.sum(1).argsort(), min(_ROWS, len(weight))
    rows = by_worth[(torch.arange(count) * len(weight) + len(weight) // 2) // count]
    weight, outputs, of_rows = weight[rows], outputs[rows], worth[rows]
    curve = [(0.0, 0.0)]
    for share in _SHARES:
        kept = keep_highest([lambda: [scores]], [scores.numel()], round(share * scores.numel()))[0]
        keep = spread_blocks(kept.view(scores.shape), block)
        keep = keep if old is None else keep & old
        lost, lost_by_rows = float(worth[~keep].sum()), float(of_rows[~keep[rows]].sum())
        repaired = least_squares(weight, keep[rows], gram, iterations=_ITERATIONS)
        error = float((layer_errors(weight, repaired, gram) * outputs).sum())
        curve.append((share, error * lost / lost_by_rows if lost_by_rows else lost))
    return curve


def _owl(reader: InputReader, steps: list[list[Target]], plan: PruningPlan, read: Read) -> dict[str, float]:
    """Sparsities that spare blocks with many outliers among |w| times the norm of its input (Yin et al. 2024)."""
    sizes = {t.target.name: t.target.size for t in plan.tensors}
    blocks: dict[object, list[Target]] = {}
    for target in (t for step in steps for t in step):
        blocks.setdefault(reader.block_of(target.name) or target.name, []).append(target)
    outliers: dict[str, float] = {}
    for targets in blocks.values():
        statistics = reader.gather(targets, frozenset({"input_norm"}))
        products = {}
        for t in targets:
            weight = t.matrix(effective_weight(t.name, read)).float()
            norms = statistics[t.name]["input_norm"].view(t.slabs, -1)  # of each expert, in an own row
            products[t.name] = weight.abs() * norms.repeat_interleave(t.slab_shape[0], 0)
        size = sum(sizes[name] for name in products)
        limit = _OUTLIER * sum(float(product.sum()) for product in products.values()) / size
        share = sum(int((product > limit).sum()) for product in products.values()) / size
        outliers |= dict.fromkeys(products, share)
        reader.finish(targets)
    assert plan.config.sparsity is not None
    return outlier_sparsities(outliers, sizes, plan.config.sparsity)
