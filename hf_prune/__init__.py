"""Prune Hugging Face models: load, prune, measure what it cost and gained, save.

Importing this package is cheap: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from hf_prune import loading_hook

__version__ = "0.1.0"

_MODULES = {
    "adoption": ("AdoptionReport", "adopt_zeros"),
    "architectures": ("Channels", "Heads", "Neurons", "Stack", "list_architectures", "register_architecture"),
    "auto": (
        "AutoPrunedModel",
        "AutoPrunedModelForAudioClassification",
        "AutoPrunedModelForCausalLM",
        "AutoPrunedModelForCTC",
        "AutoPrunedModelForImageClassification",
        "AutoPrunedModelForImageTextToText",
        "AutoPrunedModelForMaskedLM",
        "AutoPrunedModelForMultipleChoice",
        "AutoPrunedModelForObjectDetection",
        "AutoPrunedModelForPreTraining",
        "AutoPrunedModelForQuestionAnswering",
        "AutoPrunedModelForSemanticSegmentation",
        "AutoPrunedModelForSeq2SeqLM",
        "AutoPrunedModelForSequenceClassification",
        "AutoPrunedModelForSpeechSeq2Seq",
        "AutoPrunedModelForTokenClassification",
    ),
    "budget": ("SparsitySearch", "find_sparsity"),
    "card_data": ("PruningCardData", "read_card_data"),
    "cards": ("render_card", "write_card"),
    "comparison": ("Comparison", "compare"),
    "compressed": ("CompressionReport", "compress_checkpoint", "decompress_checkpoint"),
    "config": ("PruningConfig",),
    "criteria.base": ("Criterion", "WeightStats"),
    "data_loading": ("load_classification", "load_sst2", "load_texts"),
    "errors": (
        "ArchitectureError",
        "BudgetError",
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "ExportError",
        "HfPruneError",
        "HubError",
        "MaskError",
        "ModelTypeError",
        "PlanError",
        "SweepError",
        "UnknownNameError",
    ),
    "evaluation": (
        "Evaluation",
        "accuracy_metric",
        "classification_batches",
        "classification_examples",
        "evaluate_classification",
        "evaluate_sst2",
    ),
    "explain": ("explain_speed",),
    "export": ("ExportReport", "ExportedModel", "export_model"),
    "granularities.base": ("Granularity",),
    "latency": ("LatencyPoint", "LatencyResult", "measure_latency"),
    "masking": ("MaskStore", "drop_masks"),
    "mixin": ("PrunedModelMixin", "prunable", "shrink"),
    "perplexity": ("Perplexity", "PerplexityComparison", "compare_perplexity", "evaluate_perplexity"),
    "pipeline": ("prune",),
    "plan": ("PruningPlan",),
    "plots": ("plot_latency", "plot_layer_sparsity", "plot_tradeoff", "plot_weight_histogram"),
    "progress": ("listen_to_progress",),
    "push": ("PushResult", "push_checkpoint"),
    "registry": ("CRITERIA", "GRANULARITIES"),
    "report": ("SparsityReport", "sparsity_report", "weight_histogram"),
    "stream": ("plan_stream", "prune_stream"),
    "structures": ("StructureReport", "structure_report"),
    "sweep": ("SweepPoint", "SweepResult", "run_sweep"),
    "texts": ("text_batches", "token_windows"),
    "torch_prune": ("from_torch_prune",),
    "distillation": ("Distillation",),
    "migration": ("MigrationReport", "migrate_checkpoint"),
    "lottery": ("LotteryResult", "LotteryRound", "find_ticket"),
    "lora": ("MergeReport", "merge_lora"),
    "schedules": ("Schedule", "register_schedule"),
    "training": ("keep_sparse",),
    "trainer": ("PruningCallback", "PruningTrainer"),
    "unit_plan": ("UnitPlan",),
    "verification": ("Verification", "verify_checkpoint"),
    "vocabulary": ("TrimResult", "trim_vocabulary"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)

loading_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
