"""Prune Hugging Face models: load, prune, measure what it cost and gained, save.

Importing this package is cheap: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from hf_prune import import_hook

__version__ = "0.1.0"

_MODULES = {
    "architectures.base": (
        "Channels",
        "Heads",
        "Neurons",
        "Stack",
        "list_architectures",
        "register_architecture",
    ),
    "auto": (
        "AutoPrunedModel",
        "AutoPrunedModelForAudioClassification",
        "AutoPrunedModelForCTC",
        "AutoPrunedModelForCausalLM",
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
    "calibration.sentences": ("sentence_batches",),
    "calibration.texts": (
        "text_batches",
        "token_windows",
    ),
    "conversion.compression": ("compress_checkpoint",),
    "conversion.compression_report": ("CompressionReport",),
    "conversion.decompression": ("decompress_checkpoint",),
    "conversion.export": (
        "ExportReport",
        "export_model",
    ),
    "conversion.gguf.write": (
        "GGUFReport",
        "export_gguf",
    ),
    "conversion.migration": (
        "MigrationReport",
        "migrate_checkpoint",
    ),
    "conversion.streaming.prune_stream": (
        "plan_stream",
        "prune_stream",
    ),
    "criteria.base": (
        "Criterion",
        "WeightStats",
    ),
    "criteria.registry": ("CRITERIA",),
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
        "KernelError",
        "MaskError",
        "ModelTypeError",
        "PlanError",
        "SweepError",
        "UnknownNameError",
    ),
    "evaluation.accuracy": (
        "accuracy_metric",
        "evaluate_classification",
        "evaluate_sst2",
    ),
    "evaluation.accuracy_result": ("Evaluation",),
    "evaluation.comparison": (
        "Comparison",
        "compare",
    ),
    "evaluation.divergence": ("Divergence",),
    "evaluation.data.classification": (
        "classification_batches",
        "classification_examples",
    ),
    "evaluation.data.loading": (
        "load_classification",
        "load_sst2",
        "load_texts",
    ),
    "evaluation.data.sentences": ("load_sentences",),
    "evaluation.examples.evaluate": ("evaluate_examples",),
    "evaluation.examples.score": (
        "ExampleScore",
        "compare_examples",
    ),
    "evaluation.benchmark_result": (
        "BenchmarkComparison",
        "BenchmarkScores",
    ),
    "evaluation.benchmarks": (
        "compare_benchmarks",
        "evaluate_benchmarks",
    ),
    "evaluation.explain": ("explain_speed",),
    "evaluation.generation": (
        "compare_generation",
        "evaluate_generation",
    ),
    "evaluation.generation_result": (
        "Generation",
        "GenerationComparison",
    ),
    "evaluation.perplexity": (
        "compare_perplexity",
        "evaluate_perplexity",
    ),
    "evaluation.perplexity_result": (
        "Perplexity",
        "PerplexityComparison",
    ),
    "evaluation.plots": (
        "plot_latency",
        "plot_layer_sparsity",
        "plot_weight_histogram",
    ),
    "evaluation.sentence_result": (
        "SentenceComparison",
        "SentenceScore",
        "compare_sentences",
    ),
    "evaluation.sentences": ("evaluate_sentences",),
    "evaluation.sparsity_report": (
        "SparsityReport",
        "sparsity_report",
    ),
    "evaluation.sparsity_search": (
        "SparsitySearch",
        "find_sparsity",
    ),
    "evaluation.structure_report": (
        "StructureReport",
        "structure_report",
    ),
    "evaluation.sweep": ("run_sweep",),
    "evaluation.sweep_point": ("SweepPoint",),
    "evaluation.sweep_result": ("SweepResult",),
    "evaluation.tradeoff_plots": ("plot_tradeoff",),
    "evaluation.unit_description": (
        "UnitDescription",
        "UnitsOfKind",
        "describe_units",
    ),
    "evaluation.tasks": (
        "ClassificationTask",
        "ExampleTask",
        "LanguageModelingTask",
        "SentenceTask",
    ),
    "evaluation.weight_statistics": ("weight_histogram",),
    "granularities.base": ("Granularity",),
    "granularities.registry": ("GRANULARITIES",),
    "hub.card": (
        "render_card",
        "write_card",
    ),
    "hub.card_data": (
        "PruningCardData",
        "read_card_data",
    ),
    "hub.push": ("push_checkpoint",),
    "hub.upload": ("PushResult",),
    "hub.verification": ("Verification",),
    "hub.verify": ("verify_checkpoint",),
    "inference.acceleration.accelerate": ("accelerate",),
    "inference.acceleration.install": ("decelerate",),
    "inference.acceleration.report": ("AccelerationReport",),
    "inference.backends": ("ExportedModel",),
    "inference.latency": ("measure_latency",),
    "inference.latency_result": (
        "LatencyPoint",
        "LatencyResult",
    ),
    "mixin": (
        "PrunedModelMixin",
        "prunable",
        "shrink",
    ),
    "pipeline": ("prune",),
    "planning.config": ("PruningConfig",),
    "planning.plan": ("PruningPlan",),
    "planning.presets": (
        "PRESETS",
        "Preset",
    ),
    "planning.schedule": (
        "Schedule",
        "register_schedule",
    ),
    "pruning.adopt_zeros": (
        "AdoptionReport",
        "adopt_zeros",
    ),
    "pruning.mask_store": (
        "MaskStore",
        "drop_masks",
    ),
    "pruning.torch_prune": ("from_torch_prune",),
    "search.result": (
        "SearchPoint",
        "SearchResult",
    ),
    "search.run": ("auto_prune",),
    "structured.hidden.trim": (
        "HiddenResult",
        "trim_hidden",
    ),
    "structured.unit_plan": ("UnitPlan",),
    "structured.vocabulary.trim": (
        "TrimResult",
        "trim_vocabulary",
    ),
    "training.callback": ("PruningCallback",),
    "training.distillation": ("Distillation",),
    "pruning.optimizer_hook": ("keep_sparse",),
    "training.lora": (
        "MergeReport",
        "merge_lora",
    ),
    "training.lottery": (
        "LotteryResult",
        "LotteryRound",
        "find_ticket",
    ),
    "training.trainer": ("PruningTrainer",),
    "utils.progress": ("listen_to_progress",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)

import_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
