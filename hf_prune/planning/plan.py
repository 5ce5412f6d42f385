"""PruningPlan: a config resolved on one model, checked and printed before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_prune.criteria.base import INPUTS, Criterion
from hf_prune.criteria.registry import CRITERIA
from hf_prune.granularities.base import Granularity
from hf_prune.granularities.registry import parse_granularity
from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.formatting import format_count, format_table
from hf_prune.utils.results import Result


@dataclass(frozen=True)
class PlannedTensor:
    """What a plan removes from one weight matrix.

    Args:
        target: The weight matrix.
        sparsity: Share of its units that will be removed; None in global scope, where the scores decide, and for an
            allocation that is still to be learned from data.
        units: How many units it has.
        pool: How many of them compete with one another; in global scope they also compete with units of other tensors.
        remove: How many units will be removed in all, including those removed earlier; None if ``sparsity`` is None.
        already: How many of its weights were removed earlier.
        by_slab: How many units will be removed from each of several matrices in it, such as packed experts, where an
            allocation gives them sparsities of their own; empty where all lose as many.
    """

    target: Target
    sparsity: float | None
    units: int
    pool: int
    remove: int | None
    already: int
    by_slab: tuple[int, ...] = ()

    def slab(self, number: int) -> PlannedTensor:
        """What the plan removes from one of several experts in the weight; earlier prunings are not counted.

        Args:
            number: Of the expert.
        """
        target, slabs = self.target, self.target.slabs
        units = self.units // slabs
        remove = None if self.remove is None else self.remove // slabs
        sparsity, pool = self.sparsity, min(self.pool, units)
        if self.by_slab:
            remove = self.by_slab[number]
            sparsity = remove / units
        return PlannedTensor(target.slab(number), sparsity, units, pool, remove, already=0)

    @property
    def grain(self) -> int:
        """Into how many pools each of several matrices in it is divided, which lose as many units each."""
        return max(1, self.units // self.target.slabs // self.pool)


@dataclass(frozen=True, repr=False)
class PruningPlan(Result):
    """What a config removes from one model. ``print(plan)`` shows it as a table.

    Args:
        config: The settings.
        tensors: The weights that will be pruned, in the order of the model's modules.
        remove: How many units will be removed from all targets together.
        model_name: The model's class.
        total_parameters: Parameters of the whole model, tied ones once.
        total_bytes: Their size in memory.
        element_size: Bytes of one target weight (of the first target).
        uncovered: Sizes of matrices that no config can target, by name (see ``coverage.uncovered_matrices``).
        notes: Sentences about matrices that the settings name and that stay dense all the same.
        left_dense: Sizes of weights that are left dense by choice, by name (see ``coverage.left_dense``).
    """

    bars = ("sparsity", "units")

    config: PruningConfig
    tensors: tuple[PlannedTensor, ...]
    remove: int
    model_name: str
    total_parameters: int
    total_bytes: int
    element_size: int
    uncovered: Mapping[str, int]
    notes: tuple[str, ...] = ()
    left_dense: Mapping[str, int] = field(default_factory=dict)

    @property
    def criterion(self) -> Criterion:
        """A new instance of the config's criterion."""
        return CRITERIA.get(self.config.criterion)()

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the criterion and the repair need from calibration."""
        return self.config.needs

    @property
    def granularity(self) -> Granularity:
        """The config's granularity."""
        return parse_granularity(self.config.granularity)

    @property
    def target_parameters(self) -> int:
        """How many weights the targets have."""
        return sum(t.target.size for t in self.tensors)

    @property
    def removed_parameters(self) -> int:
        """How many weights will be removed in all, including those removed earlier.

        A lower bound if weights were removed earlier, since they need not be among those that this plan removes.
        """
        if any(t.remove is None for t in self.tensors):
            return max(least_weights(self.tensors, self.remove), sum(t.already for t in self.tensors))
        return sum(max((t.remove or 0) * (t.target.size // t.units), t.already) for t in self.tensors)

    @property
    def is_exact(self) -> bool:
        """Whether :attr:`removed_parameters` is the exact number, and not a lower bound."""
        same_size = len({t.target.size // t.units for t in self.tensors}) == 1
        counted = same_size or all(t.remove is not None for t in self.tensors)
        return counted and not any(t.already for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "config": self.config.to_dict(),
            "model": self.model_name,
            "total_parameters": self.total_parameters,
            "target_parameters": self.target_parameters,
            "removed_parameters": self.removed_parameters,
            "removed_parameters_is_exact": self.is_exact,
            "uncovered_parameters": sum(self.uncovered.values()),
            "left_dense_parameters": sum(self.left_dense.values()),
            "notes": [*self.notes, *sparsity_notes(self.config)],
            "tensors": [
                {
                    "name": t.target.name,
                    "shape": list(t.target.shape),
                    "units": t.units,
                    "sparsity": t.sparsity,
                    "remove": t.remove,
                    "already_removed": t.already,
                }
                for t in self.tensors
            ],
        }

    def __str__(self) -> str:
        unknown = "by score" if self.config.scope == "global" else "by data"
        rows = [
            [
                t.target.name,
                "x".join(map(str, t.target.shape)),
                f"{t.target.size:,}",
                unknown if t.sparsity is None else f"{100 * t.sparsity:.2f} %",
                unknown if t.remove is None else f"{t.remove:,}",
                f"{t.already:,}",
            ]
            for t in self.tensors
        ]
        table = format_table(
            ["weight", "shape", "weights", "sparsity", "units to remove", "removed already"], rows, left=2
        )
        config, removed, targets = self.config, self.removed_parameters, self.target_parameters
        at_least = "" if self.is_exact else "At least "
        packed = targets // 8 + (targets - removed) * self.element_size
        lines = [
            f"Plan for {self.model_name}: {config.criterion}, {config.granularity}, scope {config.scope}, "
            f"allocation {config.allocation if isinstance(config.allocation, str) else 'explicit'}"
            f"{'' if config.repair is None else ', repair ' + config.repair}"
            f"{'' if config.objective == 'layer' else f', objective {config.objective}'}"
            f"{', ' + config.calibration_order + ' calibration' if self.needs & INPUTS else ''}"
            f"{f', in {config.steps} steps' if config.steps > 1 else ''}"
            f"{f', then trained (polish {config.polish})' if config.polish is not None else ''}",
            table,
            f"{at_least}{removed:,} of {targets:,} target weights go ({percent(removed, targets)}), "
            f"{percent(removed, self.total_parameters)} of the model's {self.total_parameters:,} parameters.",
            f"Targets: {format_count(targets * self.element_size)}B dense; the same as bit mask and surviving "
            f"values: {format_count(packed)}B.",
            f"Multiply-adds per token or position in the targets: {format_count(targets).strip()} dense, "
            f"{format_count(targets - removed).strip()} with a non-zero weight. "
            f"Dense kernels compute the zeros too: zeros alone bring no speed-up.",
        ]
        if self.left_dense:
            count, first = sum(self.left_dense.values()), next(iter(self.left_dense))
            lines.append(
                f"Left dense by choice: {count:,} weights in {len(self.left_dense)} first or depthwise convolutions, "
                f"routers, and tables that are looked up or added, such as {first}."
            )
        if self.uncovered:
            count, first = sum(self.uncovered.values()), next(iter(self.uncovered))
            lines.append(
                f"Not covered: {count:,} parameters in {len(self.uncovered)} matrices of no kind that can be pruned, "
                f"such as {first}."
            )
        lines += [*self.notes, *sparsity_notes(config)]
        return "\n".join(lines)


def targets_of(plan: PruningPlan) -> tuple[Target, ...]:
    """The weights that a plan prunes, in the order of the model's modules."""
    return tuple(t.target for t in plan.tensors)


def least_weights(tensors: Sequence[PlannedTensor], units: int) -> int:
    """The smallest number of weights in any ``units`` units of some tensors."""
    weights = 0
    for size, available in sorted((t.target.size // t.units, t.units) for t in tensors):
        weights += size * min(available, units)
        units -= min(available, units)
    return weights


def percent(part: int, whole: int) -> str:
    """A share in per cent, as text."""
    return f"{100 * part / whole:.2f} %"


def sparsity_notes(config: PruningConfig) -> list[str]:
    """A sentence about a sparsity of 0 or 1."""
    if config.sparsity == 0:
        return ["A sparsity of 0 removes nothing."]
    if config.sparsity == 1:
        return ["A sparsity of 1 removes everything that may go: only the biases of the targets remain."]
    return []
