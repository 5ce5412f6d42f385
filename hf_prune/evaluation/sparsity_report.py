"""Report what is zero in a model, tensor by tensor and in total, counted from the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_prune.errors import HfPruneError
from hf_prune.evaluation.structure_report import StructureReport
from hf_prune.evaluation.weight_statistics import WeightStatistics, nm_patterns
from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import coverage_notes
from hf_prune.planning.targets import divisible, every_target, resolve_targets
from hf_prune.planning.traits import weight_granularity
from hf_prune.pruning.mask_store import MaskStore, warn_regrown
from hf_prune.utils.formatting import format_count, format_table
from hf_prune.utils.number_formats import refuse_quantized
from hf_prune.utils.offloaded_weights import values_of
from hf_prune.utils.progress import working
from hf_prune.utils.results import Result
from hf_prune.utils.torch_masks import refuse_torch_masks


@dataclass(frozen=True)
class TensorReport:
    """One parameter.

    Args:
        name: Its name in the model.
        shape: Its shape.
        is_target: Whether pruning covers it.
        parameters: How many numbers it holds.
        nonzero: How many of them are not zero.
        nm_patterns: The N:M patterns that it satisfies along its inputs, such as ``("2:4",)``; targets only.
        bytes: Its dense size.
        after: Statistics of its values; targets only.
        before: The same before pruning, where known.
    """

    name: str
    shape: tuple[int, ...]
    is_target: bool
    parameters: int
    nonzero: int
    nm_patterns: tuple[str, ...]
    bytes: int
    after: WeightStatistics | None
    before: WeightStatistics | None = None

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.nonzero / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, repr=False)
class SparsityReport(Result):
    """What is zero in a model. ``print(report)`` shows it as a table; :meth:`to_dict` has everything.

    Args:
        model_name: The model's class.
        tensors: Every parameter once, tied ones under their first name.
        polish: What each polish did, a sentence each; empty if there was none.
        structure: What remains after whole units were cut out; None if none were.
        notes: Sentences about weights that the settings cover and yet leave dense, such as fused experts.
        file_bytes: Size of the files that weights and masks were loaded from, if known.
    """

    bars, listed = ("sparsity",), "is_target"

    model_name: str
    tensors: tuple[TensorReport, ...]
    polish: str = ""
    structure: StructureReport | None = None
    notes: tuple[str, ...] = ()
    file_bytes: int | None = None

    @property
    def targets(self) -> tuple[TensorReport, ...]:
        """The parameters that pruning covers."""
        return tuple(t for t in self.tensors if t.is_target)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(t.parameters for t in self.tensors)

    @property
    def nonzero(self) -> int:
        """Parameters of the whole model that are not zero."""
        return sum(t.nonzero for t in self.tensors)

    @property
    def target_parameters(self) -> int:
        """Parameters of the targets."""
        return sum(t.parameters for t in self.targets)

    @property
    def removed(self) -> int:
        """Zeros in the targets."""
        return sum(t.parameters - t.nonzero for t in self.targets)

    @property
    def remaining(self) -> int:
        """Parameters of the whole model less the zeros in the targets.

        A zero elsewhere, such as an initial bias or a padding row, was not removed by pruning.
        """
        return self.parameters - self.removed

    @property
    def target_sparsity(self) -> float:
        """Share of the target weights that are zero."""
        return self.removed / self.target_parameters if self.target_parameters else 0.0

    @property
    def model_sparsity(self) -> float:
        """Zeros in the targets as a share of all parameters of the model."""
        return self.removed / self.parameters if self.parameters else 0.0

    @property
    def bytes(self) -> int:
        """Dense size of the whole model: zeros are stored like any other number."""
        return sum(t.bytes for t in self.tensors)

    @property
    def nm_patterns(self) -> tuple[str, ...]:
        """The N:M patterns that every target satisfies."""
        if not self.targets:
            return ()
        return tuple(p for p in self.targets[0].nm_patterns if all(p in t.nm_patterns for t in self.targets))

    def with_before(self, before: SparsityReport) -> SparsityReport:
        """This report, with the statistics of an earlier one as those before pruning.

        Args:
            before: A report of the same model before pruning.
        """
        known = {t.name: t.after for t in before.tensors}
        return dataclasses.replace(
            self, tensors=tuple(dataclasses.replace(t, before=known.get(t.name)) for t in self.tensors)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format_version": 1,
            "model": self.model_name,
            "parameters": self.parameters,
            "nonzero": self.nonzero,
            "remaining": self.remaining,
            "target_parameters": self.target_parameters,
            "removed": self.removed,
            "target_sparsity": self.target_sparsity,
            "model_sparsity": self.model_sparsity,
            "nm_patterns": list(self.nm_patterns),
            "bytes": self.bytes,
            "file_bytes": self.file_bytes,
            "polish": self.polish,
            "notes": list(self.notes),
            "structure": None if self.structure is None else self.structure.to_dict(),
            "tensors": [{**dataclasses.asdict(t), "sparsity": t.sparsity} for t in self.tensors],
        }

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def _values(self) -> str:
        """Table of the statistics of the targets' values, now and before pruning."""
        moments = ("min", "max", "mean", "std")
        before = [m for m in moments if any(t.before for t in self.targets)]
        rows = [
            [t.name]
            + ["-" if t.after is None else f"{getattr(t.after, m):.4f}" for m in moments]
            + ["-" if t.before is None else f"{getattr(t.before, m):.4f}" for m in before]
            for t in self.targets
        ]
        return format_table(["values, zeros included", *moments, *(f"{m} before" for m in before)], rows)

    def __str__(self) -> str:
        header = ["weight", "shape", "weights", "non-zero", "sparsity", "N:M", "bytes"]
        rows = [
            [
                t.name,
                "x".join(map(str, t.shape)),
                f"{t.parameters:,}",
                f"{t.nonzero:,}",
                f"{100 * t.sparsity:.2f} %",
                t.nm_patterns[0] if t.nm_patterns else "-",
                f"{t.bytes:,}",
            ]
            for t in self.targets
        ]
        table = format_table(header, rows, left=2)
        if self.structure is not None:
            return "\n".join([str(self.structure), *self._outcome()])
        return "\n".join([f"Sparsity of {self.model_name}", table, "", self._values(), "", self.summary()])

    def summary(self) -> str:
        """The totals, without the tables."""
        if self.structure is not None:  # its masks covered whole units, which are gone
            return "\n".join([self.structure.summary(), *self._outcome()])
        lines = [
            f"Targets: {self.removed:,} of {self.target_parameters:,} weights are zero "
            f"({100 * self.target_sparsity:.2f} %). Whole model: {self.remaining:,} of {self.parameters:,} parameters "
            f"remain ({100 * self.model_sparsity:.2f} % removed)."
        ]
        if empty := [t.name for t in self.targets if t.parameters and not t.nonzero]:
            lines.append(f"Nothing is left of {', '.join(empty)}.")
        if elsewhere := self.remaining - self.nonzero:
            lines.append(f"{elsewhere:,} more are zero in tensors that pruning does not cover.")
        if self.nm_patterns:
            lines.append(f"N:M: every target satisfies {', '.join(self.nm_patterns)}.")
        return "\n".join([*lines, *self._outcome()])

    def _outcome(self) -> list[str]:
        """Sentences about polishing, coverage and size."""
        lines = [*([self.polish] if self.polish else []), *self.notes]
        if self.structure is None:
            files = "" if self.file_bytes is None else f"{format_count(self.file_bytes)}B in files, "
            stored = "" if files else "; zeros are stored like any other number"
            lines.append(f"Size: {files}{format_count(self.bytes)}B dense{stored}.")
        elif self.file_bytes is not None:
            lines.append(f"Size: {format_count(self.file_bytes)}B in files.")
        return lines


@working("Counting zeros")
def sparsity_report(model: nn.Module, config: PruningConfig | None = None) -> SparsityReport:
    """Count what is zero in a model.

    Args:
        model: Any torch module.
        config: The config whose targets are reported; by default the tensors that have masks, or else the targets of
            the default config. A model without any is reported with no targets.

    Returns:
        The report, which has statistics of the dense weights as well if they were kept.

    Raises:
        PlanError: If ``config`` is given and does not match the model, or weights are quantized, masked by
            ``torch.nn.utils.prune`` or not loaded; those that accelerate has offloaded are read.

    Example:
        >>> import torch
        >>> print(sparsity_report(torch.nn.Linear(4, 2)).target_parameters)
        8
    """
    refuse_quantized(model)
    refuse_torch_masks(model)
    store = MaskStore.of(model)
    warn_regrown(model, "they are counted as they are")
    targets = _targets(model, config, store)
    pruned_by = config or (store.config if store is not None else None)
    dense = store.dense if store is not None and store.dense is not None else {}
    tensors = []
    for name, parameter in model.named_parameters():
        weight, target = values_of(model, name, parameter), targets.get(name)
        is_target = name in (targets if store is None or config is not None else store.masks)
        tensors.append(
            TensorReport(
                name=name,
                shape=tuple(weight.shape),
                is_target=is_target,
                parameters=weight.numel(),
                nonzero=int(weight.count_nonzero()),
                nm_patterns=() if target is None else nm_patterns(target, weight, pruned_by),
                bytes=weight.numel() * weight.element_size(),
                after=WeightStatistics.of(weight) if is_target else None,
                before=WeightStatistics.of(dense[name]) if name in dense else None,
            )
        )
    covered_by = config or (PruningConfig() if store is None else store.config)
    notes: tuple[str, ...] = ()
    if covered_by is not None and weight_granularity(covered_by) is not None:
        with contextlib.suppress(HfPruneError):  # the modules of the settings may be gone
            left_out = divisible(resolve_targets(model, covered_by), covered_by)[1]
            masked = store.masks.keys() if store is not None else ()
            notes = coverage_notes(model, covered_by, list(targets.values()), left_out, masked)
    polishes = " ".join(map(str, store.polishes)) if store is not None else ""
    return SparsityReport(type(model).__name__, tuple(tensors), polishes, notes=notes)


def _targets(model: nn.Module, config: PruningConfig | None, store: MaskStore | None) -> dict[str, Target]:
    if config is None and store is not None:
        everything = every_target(model)
        return {t.name: t for t in everything if t.name in store.masks}
    try:
        return {t.name: t for t in resolve_targets(model, config or PruningConfig(), loaded=False)}
    except HfPruneError:
        if config is not None:
            raise
        return {}
