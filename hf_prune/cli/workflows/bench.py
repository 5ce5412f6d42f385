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
from hf_prune.evaluation.explain import SOME_ZEROS
from hf_prune.evaluation.sparsity_report import sparsity_report
from hf_prune.evaluation.tasks import ClassificationTask
from hf_prune.inference.backends import SUFFIXES, ExportedModel


def load_alike(sources: Sequence[str], dtype: str, device: str, threads: int | None = None) -> dict[str, Any]:
    """Models of one dtype on one device, by short names that tell them apart.

    Args:
        sources: Folders or Hub ids, and exported files.
        dtype: Such as ``"float32"``.
        device: Such as ``"cpu"``.
        threads: Threads of exported models; None for as many as PyTorch uses.

    Raises:
        ConfigError: If there is no such device.
        DataError: If a source cannot be found.
    """
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
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
    """The tokenizer of each classifier.

    Args:
        models: Models by name.
        sources: Where each came from.

    Raises:
        DataError: If one is not a sequence classifier, or has no tokenizer.
    """
    tokenizers = {}
    for (name, model), source in zip(models.items(), sources, strict=True):
        if not type(model).__name__.endswith("ForSequenceClassification"):
            raise DataError(
                f"{source!r} is a {type(model).__name__}: expected a …ForSequenceClassification to score by accuracy; "
                f"leave out --data to time it"
            )
        offline = check_model_source(source)
        if not has_tokenizer(source, local_files_only=offline):
            raise DataError(f"{source!r} has no tokenizer, which scoring needs: save one beside the model")
        tokenizers[name] = load_tokenizer(source, local_files_only=offline)
    return tokenizers


def score_all(
    models: Mapping[str, Any], tokenizers: Mapping[str, Any], task: ClassificationTask, split: str
) -> dict[str, float]:
    """Accuracy of each classifier, 0 to 1, on the same examples.

    Args:
        models: Models by name.
        tokenizers: Theirs.
        task: What to score.
        split: Which split of it.
    """
    dataset = task.load(split)
    return {
        name: evaluate_classification(model, tokenizers[name], dataset, **task.columns).accuracy
        for name, model in models.items()
    }


def zero_notes(models: Mapping[str, Any]) -> list[str]:
    """A sentence for each model that has many zeros and no fewer parameters than the first one.

    Args:
        models: Models by name; exported and quantized ones get no sentence.
    """
    counted: dict[str, Any] = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
    size = next((model.num_parameters() for model in counted.values()), 0)
    shares: dict[str, float] = {}
    for name, model in counted.items():
        with contextlib.suppress(PlanError):  # quantized weights, which can be timed all the same
            shares[name] = sparsity_report(model).target_sparsity
    return [
        f"In {name}, {100 * share:.1f} % of the weights that can be pruned are zero, and it is no smaller: zeros alone "
        f"bring no speed on dense kernels."
        for name, share in shares.items()
        if share >= SOME_ZEROS and models[name].num_parameters() >= size
    ]
