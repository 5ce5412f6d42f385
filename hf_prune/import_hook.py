"""Import hooks that ``import hf_prune`` installs.

One makes plain ``from_pretrained`` of transformers recognise our checkpoints. transformers is heavy and
``import hf_prune`` is not, so our quantizer is registered when transformers imports its own list of quantizers, or at
once if it has already done so. The other finds modules under the names they had in earlier versions, which pickled
models contain.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AFTER = "transformers.quantizers.auto"
_REGISTERS = "hf_prune.quantizer"
# Modules that pickles of pruned models name, and where what was in them is now.
_MOVED = {
    "hf_prune.masking": "hf_prune.pruning.mask_store",
    "hf_prune.polish": "hf_prune.pruning.records",
    "hf_prune.speed": "hf_prune.pruning.records",
    "hf_prune.bypass": "hf_prune.architectures.bypass",
    "hf_prune.pruning.bypass": "hf_prune.architectures.bypass",
    "hf_prune.config": "hf_prune.planning.config",
    "hf_prune.schedules": "hf_prune.planning.schedule",
}
# Results and settings that may have been pickled too: by former module, where each class is now.
_MOVED_CLASSES = {
    "adoption": {"AdoptionReport": "pruning.adopt_zeros.AdoptionReport"},
    "architectures": {
        "Heads": "architectures.base.Heads",
        "Neurons": "architectures.base.Neurons",
        "Stack": "architectures.base.Stack",
        "Channels": "architectures.base.Channels",
    },
    "budget": {"SparsitySearch": "evaluation.sparsity_search.SparsitySearch"},
    "card_data": {"PruningCardData": "hub.card_data.PruningCardData"},
    "comparison": {"Comparison": "evaluation.comparison.Comparison"},
    "compressed": {"CompressionReport": "conversion.compression_report.CompressionReport"},
    "distillation": {"Distillation": "training.distillation.Distillation"},
    "evaluation": {"Evaluation": "evaluation.accuracy_result.Evaluation"},
    "export": {"ExportReport": "conversion.export.ExportReport", "ExportedModel": "inference.backends.ExportedModel"},
    "latency": {
        "LatencyPoint": "inference.latency_result.LatencyPoint",
        "LatencyResult": "inference.latency_result.LatencyResult",
    },
    "latency_inputs": {"Workload": "inference.workloads.Workload"},
    "lora": {"MergeReport": "training.lora.MergeReport"},
    "lottery": {"LotteryRound": "training.lottery.LotteryRound", "LotteryResult": "training.lottery.LotteryResult"},
    "migration": {"MigrationReport": "conversion.migration.MigrationReport"},
    "parts": {"Part": "architectures.unit_groups.UnitSlice", "Site": "architectures.unit_groups.UnitGroup"},
    "perplexity": {
        "Perplexity": "evaluation.perplexity_result.Perplexity",
        "PerplexityComparison": "evaluation.perplexity_result.PerplexityComparison",
    },
    "plan": {"PlannedTensor": "planning.plan.PlannedTensor", "PruningPlan": "planning.plan.PruningPlan"},
    "push": {"PushResult": "hub.upload.PushResult"},
    "report": {
        "WeightStatistics": "evaluation.weight_statistics.WeightStatistics",
        "TensorReport": "evaluation.sparsity_report.TensorReport",
        "SparsityReport": "evaluation.sparsity_report.SparsityReport",
        "WeightHistogram": "evaluation.weight_statistics.WeightHistogram",
    },
    "structures": {
        "SiteReport": "evaluation.structure_report.SiteReport",
        "StructureReport": "evaluation.structure_report.StructureReport",
    },
    "sweep": {"SweepPoint": "evaluation.sweep_point.SweepPoint", "SweepResult": "evaluation.sweep_result.SweepResult"},
    "targets": {"Target": "kernels.matrix.Target"},
    "timing": {"Timings": "inference.timing.Timings", "Ratio": "inference.timing.Ratio"},
    "unit_budget": {"Costs": "structured.budget.Costs", "Choice": "structured.budget.Choice"},
    "unit_curves": {"Curve": "structured.loss_curves.Curve"},
    "unit_plan": {"UnitPlan": "structured.unit_plan.UnitPlan"},
    "units": {"Slice": "kernels.blocks.Slice", "Group": "kernels.blocks.Group"},
    "verification": {"Difference": "hub.verification.Difference", "Verification": "hub.verification.Verification"},
    "vocabulary": {"TrimResult": "structured.vocabulary.trim.TrimResult"},
}


class _QuantizersFinder(importlib.abc.MetaPathFinder):
    """Finds transformers' list of quantizers as usual, and imports ours after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AFTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_REGISTERS)


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their former names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_former = fullname in _MOVED or fullname.removeprefix("hf_prune.") in _MOVED_CLASSES
        return ModuleSpec(fullname, self) if is_former else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = functools.partial(moved, module.__name__)


def moved(module: str, name: str) -> Any:
    """What a module of an earlier version held under a name, from where it is now.

    Raises:
        AttributeError: If it held nothing of that name that may have been pickled.
    """
    if module in _MOVED:
        return getattr(importlib.import_module(_MOVED[module]), name)
    try:
        home, _, now = _MOVED_CLASSES[module.removeprefix("hf_prune.")][name].rpartition(".")
    except KeyError:
        raise AttributeError(f"module {module!r} has no attribute {name!r}") from None
    return getattr(importlib.import_module(f"hf_prune.{home}"), now)


def install() -> None:
    """Register the quantizer now if transformers is loaded, or as soon as it is; find moved modules."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
    if _AFTER in sys.modules:
        importlib.import_module(_REGISTERS)
    elif not any(isinstance(finder, _QuantizersFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuantizersFinder())
