"""Models as the child processes have them: loaded, pruned, counted, timed and scored."""

from __future__ import annotations

import copy
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_prune import (
    DataError,
    HfPruneError,
    PruningConfig,
    SparsityReport,
    StructureReport,
    prunable,
    shrink,
    sparsity_report,
    structure_report,
    text_batches,
    weight_histogram,
)
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.checkpoint.building import limited_building
from hf_prune.cli.workflows.loading import load_for_task
from hf_prune.evaluation.data.classification import context_length
from hf_prune.evaluation.tasks import ClassificationTask

Progress = Callable[[str, float], object]  # what is being done, and which share of it is done
_MOST_CLASSES, _LONGEST_LABEL = 100, 100
_MOST_MODULES, _MOST_BUFFER_BYTES = 20_000, 200_000_000  # a classifier of 24 layers has 500, and next to no buffers
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "can't start new thread")


class Sized:
    """The sizes of a dense or a pruned model."""

    model: Any

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, zeros included."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def memory(self) -> int:
        """Bytes of its weights in memory."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


@dataclass(frozen=True)
class DenseModel(Sized):
    """A model as it was loaded. Its weights are never changed."""

    name: str
    model: Any
    tokenizer: Any
    folder: Path
    base_model: str | None
    file_bytes: int

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return [str(self.model.config.id2label[i])[:_LONGEST_LABEL] for i in range(self.model.config.num_labels)]


@dataclass
class PrunedModel(Sized):
    """A pruned copy of a dense model, with everything that was counted."""

    dense: DenseModel
    model: Any
    config: PruningConfig
    folder: Path
    report: SparsityReport
    structure: StructureReport | None
    units: Mapping[str, list[bool]]
    removed_shares: Mapping[str, float]  # by matrix
    histograms: tuple[Any, Any]  # of the weights before and after
    seconds: float
    file_bytes: int

    @property
    def tokenizer(self) -> Any:
        """The dense model's."""
        return self.dense.tokenizer

    def facts(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        return {
            "model": self.dense.name,
            "settings": self.config.to_dict(),
            "parameters_before": self.dense.parameters,
            "parameters": self.parameters,
            "nonzero": self.report.nonzero,
            "target_sparsity": self.report.target_sparsity,
            "memory_bytes_before": self.dense.memory,
            "memory_bytes": self.memory,
            "file_bytes_before": self.dense.file_bytes,
            "file_bytes_compressed": self.file_bytes,
            "seconds": round(self.seconds, 2),
        }


def load_dense(name: str, folder: Path, base_model: str | None, most: int) -> DenseModel:
    """The model and the tokenizer in a folder.

    Args:
        name: What to call it.
        folder: The folder.
        base_model: Its id on the Hub, if it has one.
        most: The most parameters that it may have.

    Raises:
        DataError: If it does not choose one of several classes, is too large, or cannot be loaded.
    """
    try:
        check_size(name, folder, most)
        model, tokenizer = load_for_task(str(folder), ClassificationTask())
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from None
        reason = " ".join(str(error).split())[:400].replace(str(folder), name)  # as the visitor knows it
        if isinstance(error, HfPruneError):
            raise DataError(reason) from None
        raise DataError(f"{name} cannot be loaded: {type(error).__name__}: {reason}") from None
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return DenseModel(name, prunable(model).eval(), tokenizer, folder, base_model, size)


def check_size(name: str, folder: Path, most: int) -> None:
    """Make sure, from the config alone, that a model is a classifier and not too large: it is built on the meta device.

    Raises:
        DataError: If it has too many parameters, modules or buffers, or its outputs are not probabilities of classes.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
        raise DataError(f"{name} does not choose one of several classes: expected a classifier with two or more")
    if config.num_labels > _MOST_CLASSES:
        raise DataError(f"{name} knows {config.num_labels} classes: expected at most {_MOST_CLASSES} on this page")
    advice = "it is too large for this page; prune it on your own machine with `hf-prune prune`"
    limits = {"parameters": most, "modules": _MOST_MODULES, "buffer_bytes": _MOST_BUFFER_BYTES}
    with torch.device("meta"), limited_building(name, advice, **limits):
        AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, PyTorch or the system says that memory ran out."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def prune_copy(
    dense: DenseModel, config: PruningConfig, sentences: Sequence[str], folder: Path, progress: Progress
) -> PrunedModel:
    """Prune a copy of a model, count, and save it. Heads, neurons and layers are cut out.

    Args:
        dense: The model; it is not changed.
        config: The settings.
        sentences: What calibrated criteria learn from.
        folder: Where to save the copy.
        progress: Called with what is being done.
    """
    progress("Reading sentences to learn from", 0.0)
    texts = text_batches(list(sentences), dense.tokenizer, batch_size=16, max_length=length_for(dense.model, 64))
    model = copy.deepcopy(dense.model)
    progress("Pruning", 0.0)
    start = time.perf_counter()
    model.prune(config, calibration=texts)
    seconds = time.perf_counter() - start
    progress("Counting", 0.9)
    report, masked = sparsity_report(model), dict(model.named_parameters())
    names = [t.name for t in sparsity_report(dense.model).targets]  # the matrices that exist before anything is cut out
    removed_shares = {name: 1 - int(masked[name].count_nonzero()) / masked[name].numel() for name in names}
    before = weight_histogram(dense.model, names)
    units = unit_map(model) if config.removes_units else {}
    if config.removes_units:
        start = time.perf_counter()
        shrink(model)
        seconds += time.perf_counter() - start
        report = sparsity_report(model)
    after = weight_histogram(model, [t.name for t in report.targets], limit=float(before.edges[-1]))
    progress("Saving", 0.95)
    try:
        model.save_pretrained(folder, compressed=True)
        dense.tokenizer.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return PrunedModel(
        dense=dense,
        model=model,
        config=config,
        folder=folder,
        report=report,
        structure=structure_report(model) if config.removes_units else None,
        units=units,
        removed_shares=removed_shares,
        histograms=(before, after),
        seconds=seconds,
        file_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


def unit_map(model: Any) -> dict[str, list[bool]]:
    """Which heads and neurons remain in each attention and feed-forward network of a masked model."""
    parameters, remaining = dict(model.named_parameters()), {}
    for group in find_unit_groups(model):
        consumer = group.consumers[0]
        weight = parameters[consumer.name].detach().movedim(consumer.dim, 0)
        remaining[f"{group.kind} {group.name}"] = weight.reshape(group.units, -1).ne(0).any(1).tolist()
    return remaining


def count_removed_units(units: Mapping[str, list[bool]]) -> dict[str, int]:
    """How many units of each kind were removed, from a :func:`unit_map`."""
    removed: Counter[str] = Counter()
    for name, remaining in units.items():
        removed[name.partition(" ")[0]] += remaining.count(False)
    return dict(removed)


def length_for(model: Any, wanted: int) -> int:
    """How many tokens a model is given: as many as wanted, or as it can read."""
    return min(wanted, context_length(model) or wanted)
