"""Checkpoints side by side: loaded with one dtype on one device, scored, and with notes on their zeros."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_prune.auto import load_native
from hf_prune.checkpoint.companions import has_tokenizer
from hf_prune.checkpoint.native import load_tokenizer
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.errors import ConfigError, DataError, PlanError
from hf_prune.evaluation.accuracy import evaluate_classification
from hf_prune.evaluation.explain import MANY_ZEROS, SOME_ZEROS
from hf_prune.evaluation.sparsity_report import sparsity_report
from hf_prune.evaluation.tasks import ClassificationTask, LanguageModelingTask
from hf_prune.inference.acceleration.accelerate import measure_acceleration
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.backends import SUFFIXES, ExportedModel
from hf_prune.planning.expectations import is_language_model
from hf_prune.utils.load_options import resolve_device

_ELSEWHERE = "; hf-prune accelerate measures what sparse ones bring on a CPU"


def load_alike(sources: Sequence[str], dtype: str, device: str, threads: int | None = None) -> dict[str, Any]:
    """Models of one dtype on one device, by short names that tell them apart.

    Args:
        sources: Folders or Hub ids, and exported files.
        dtype: Such as ``"float32"``.
        device: Such as ``"cpu"``, or ``"auto"``.
        threads: Threads of exported models; None for as many as PyTorch uses.

    Raises:
        ConfigError: If there is no such device.
        DataError: If a source cannot be found.
    """
    target = resolve_device(device)
    models: dict[str, Any] = {}
    for name, source in zip(short_names(sources), sources, strict=True):
        if source.endswith(SUFFIXES):
            models[name] = ExportedModel(source, threads or torch.get_num_threads())
        else:
            models[name] = load_native(source).to(target, getattr(torch, dtype)).eval()
    return models


def short_names(sources: Sequence[str]) -> list[str]:
    """The last parts of names, as many as are needed to tell them apart; equal names are numbered.

    Example:
        >>> short_names(["runs/a/model", "runs/b/model"])
        ['a/model', 'b/model']
        >>> short_names(["model", "model"])
        ['model', 'model (2)']
    """
    parts = [source.rstrip("/").split("/") for source in sources]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    seen = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, seen, strict=True)]


def load_tokenizers(models: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """The tokenizer of each classifier, or of each language model.

    Args:
        models: Models by name.
        sources: Where each came from.

    Raises:
        DataError: If one is neither, or of another kind than the first, or has no tokenizer.
    """
    tokenizers = {}
    of_language = of_language_models(models)
    for (name, model), source in zip(models.items(), sources, strict=True):
        cls = type(model).__name__
        if not (is_language_model(cls) if of_language else cls.endswith("ForSequenceClassification")):
            known = (
                "a …ForCausalLM like the first" if of_language else "a …ForSequenceClassification to score by accuracy"
            )
            raise DataError(f"{source!r} is a {cls}: expected {known}; leave out --data to time it")
        offline = check_model_source(source)
        if not has_tokenizer(source, local_files_only=offline):
            raise DataError(f"{source!r} has no tokenizer, which scoring needs: save one beside the model")
        tokenizers[name] = load_tokenizer(source, local_files_only=offline)
    return tokenizers


def of_language_models(models: Mapping[str, Any]) -> bool:
    """Whether the first of some models is a language model, which is scored by its perplexity."""
    return is_language_model(type(next(iter(models.values()))).__name__)


def score_all(
    models: Mapping[str, Any],
    tokenizers: Mapping[str, Any],
    task: ClassificationTask | LanguageModelingTask,
    split: str | None,
) -> dict[str, float]:
    """Accuracy of each classifier, 0 to 1, or perplexity of each language model, on the same examples.

    Args:
        models: Models by name.
        tokenizers: Theirs.
        task: What to score.
        split: Which split of it; by default the one that such tasks are scored on.
    """
    split = split or task.default_split
    if isinstance(task, LanguageModelingTask):
        return {name: task.score(model, tokenizers[name], split).perplexity for name, model in models.items()}
    dataset = task.load(split)
    return {
        name: evaluate_classification(model, tokenizers[name], dataset, **task.columns).accuracy
        for name, model in models.items()
    }


def measure_accelerations(models: Mapping[str, Any], workload: Mapping[str, int]) -> dict[str, AccelerationReport]:
    """What the fastest kernels bring each model, which keeps its own; exported files have no layers to choose for.

    Args:
        models: Models by name.
        workload: As for :func:`~hf_prune.inference.acceleration.accelerate.measure_acceleration`.

    Raises:
        ConfigError: If all are exported files.
        HfPruneError: As :func:`hf_prune.accelerate` does.
    """
    native = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
    if not native:
        raise ConfigError(f"--accelerate is for checkpoints: found exported files alone, {', '.join(models)}")
    return {name: measure_acceleration(model, workload, progress=True) for name, model in native.items()}


def zero_notes(models: Mapping[str, Any], measured: bool = False) -> list[str]:
    """A sentence for each model that has many zeros and no fewer parameters than the first one.

    Args:
        models: Models by name; exported and quantized ones get no sentence.
        measured: Whether it was measured what other kernels bring; otherwise a sentence says how to.
    """
    counted: dict[str, Any] = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
    size = next((model.num_parameters() for model in counted.values()), 0)
    shares: dict[str, float] = {}
    for name, model in counted.items():
        with contextlib.suppress(PlanError):  # quantized weights, which can be timed all the same
            shares[name] = sparsity_report(model).target_sparsity
    return [
        f"In {name}, {100 * share:.1f} % of the weights that can be pruned are zero, and it is no smaller: zeros alone "
        f"bring no speed on dense kernels{_ELSEWHERE if share >= MANY_ZEROS and not measured else ''}."
        for name, share in shares.items()
        if share >= SOME_ZEROS and models[name].num_parameters() >= size
    ]
