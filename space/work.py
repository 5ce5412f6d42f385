"""One model and what is made of it: what can be chosen, pruning, counting, timing, scoring."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_prune import (
    CRITERIA,
    ConfigError,
    DataError,
    Evaluation,
    HfPruneError,
    LatencyResult,
    PruningConfig,
    SparsityReport,
    StructureReport,
    compare,
    evaluate_classification,
    load_classification,
    measure_latency,
    prunable,
    shrink,
    sparsity_report,
    structure_report,
    text_batches,
    weight_histogram,
)
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.kinds.registry import unit_descriptions
from hf_prune.checkpoint.building import limited_building
from hf_prune.cli.workflows.loading import load_classifier
from hf_prune.criteria.base import CURVATURE, LABELLED, TRAINED
from hf_prune.evaluation.data.classification import context_length
from hf_prune.evaluation.weight_statistics import WeightHistogram
from hf_prune.planning.choices import UNIT_CRITERIA_OF

Tell = Callable[[str, float], object]
_MOST_CLASSES, _LONGEST_LABEL = 100, 100
_MOST_MODULES, _MOST_BUFFER_BYTES = 20_000, 200_000_000  # a classifier of 24 layers has 500, and next to no buffers
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "can't start new thread")

WHAT: Mapping[str, str | tuple[str, ...]] = {
    "Single weights": "unstructured",
    "Two of every four weights (2:4)": "2:4",
    "Blocks of sixteen weights": "block:1x16",
    "Attention heads": ("head",),
    "Neurons": ("neuron",),
    "Heads and neurons": ("head", "neuron"),
    "Whole layers": ("layer",),
}


class Weights:
    """What a dense and a pruned model have in common."""

    model: Any

    @property
    def parameters(self) -> int:
        """Of the whole model, zeros included."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def memory(self) -> int:
        """Bytes of its weights in memory."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


@dataclass(frozen=True)
class Dense(Weights):
    """A model as it came. Its weights are never changed."""

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
class Pruned(Weights):
    """What a visitor made of one, with everything that was counted and measured of it."""

    dense: Dense
    model: Any
    config: PruningConfig
    folder: Path
    report: SparsityReport
    structure: StructureReport | None
    units: Mapping[str, list[bool]]
    gone: Mapping[str, float]
    histograms: tuple[WeightHistogram, WeightHistogram]
    seconds: float
    file_bytes: int

    @property
    def tokenizer(self) -> Any:
        """That of the dense model."""
        return self.dense.tokenizer

    def facts(self) -> dict[str, Any]:
        """The numbers, for programs."""
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
            "latency": None,
            "score": None,
        }


def criteria_for(what: str) -> dict[str, str]:
    """The criteria that can choose what goes, with a line on each.

    Left out are those that need labels or a training, and the block Fisher criterion, which takes minutes.
    """
    if isinstance(WHAT[what], tuple):
        found = {name: why for name, (_, why, _) in UNIT_CRITERIA_OF.items() if name != "movement"}
    else:
        slow = LABELLED | TRAINED | CURVATURE
        found = {n: CRITERIA.get(n).description for n in CRITERIA.names() if not CRITERIA.get(n).needs & slow}
    return {name: why for name, why in found.items() if _config(what, name) is not None}


def can_repair(what: str, how: str) -> bool:
    """Whether a least-squares repair fits to it: after whole layers there is nothing to repair."""
    return WHAT[what] != ("layer",) and _config(what, how, repair="least_squares") is not None


def fixed_sparsity(what: str) -> float | None:
    """The sparsity that follows from what goes, as in 2:4."""
    return 0.5 if WHAT[what] == "2:4" else None


def _config(what: str, how: str, **more: Any) -> PruningConfig | None:
    scope = "global" if isinstance(WHAT[what], tuple) else None
    try:
        return PruningConfig(granularity=WHAT[what], criterion=how, scope=scope, **more)
    except ConfigError:
        return None


def make_config(what: str, how: str, repair: bool, sparsity: float) -> PruningConfig:
    """The settings of a pruning.

    Raises:
        ConfigError: If they contradict one another, or are unknown.
    """
    if what not in list(WHAT):
        raise ConfigError(f"{str(what)[:40]!r} cannot be removed: expected one of {', '.join(WHAT)}")
    if how not in list(criteria_for(what)):
        raise ConfigError(f"{str(how)[:40]!r} cannot choose them: expected one of {', '.join(criteria_for(what))}")
    if repair and not can_repair(what, how):
        raise ConfigError(f"a repair does not fit to {how!r} and {what!r}: leave it out")
    if not isinstance(sparsity, int | float) or not 0 <= sparsity <= 0.95:
        raise ConfigError(f"the sparsity is {str(sparsity)[:20]}: expected a number from 0 to 0.95")
    fixed = fixed_sparsity(what)
    config = _config(
        what, how, sparsity=sparsity if fixed is None else fixed, repair="least_squares" if repair else None
    )
    assert config is not None
    return config


def load_dense(name: str, folder: Path, base_model: str | None, most: int) -> Dense:
    """The model and the tokenizer in a folder.

    Args:
        name: What it is called.
        folder: Where it is.
        base_model: Its id on the Hub, if it has one.
        most: Parameters that it may have.

    Raises:
        DataError: If it does not choose one of several classes, is too large, or cannot be loaded.
    """
    try:
        check_size(name, folder, most)
        model, tokenizer = load_classifier(str(folder))
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from None
        reason = " ".join(str(error).split())[:400].replace(str(folder), name)  # in the visitor's words
        if isinstance(error, HfPruneError):
            raise DataError(reason) from None
        raise DataError(f"{name} cannot be loaded: {type(error).__name__}: {reason}") from None
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Dense(name, prunable(model).eval(), tokenizer, folder, base_model, size)


def check_size(name: str, folder: Path, most: int) -> None:
    """Refuse a model by what its config would build, and one that is no classifier: on the meta device, counting.

    Raises:
        DataError: If it has more parameters, modules or buffers, or its outputs are no probabilities of classes.
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
    """Whether there was not enough memory, in the words of Python, PyTorch or the system."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def held_out(data: str, n: int) -> Any:
    """Labelled sentences that the demo's model was not trained on, at most so many."""
    found = load_classification(data, "dev")
    return found.select(range(min(len(found), n)))


def make_pruned(dense: Dense, config: PruningConfig, sentences: Sequence[str], folder: Path, tell: Tell) -> Pruned:
    """A pruned copy, counted and saved. Heads, neurons and layers are taken out.

    Args:
        dense: Of which; it is not changed.
        config: How.
        sentences: What calibrated criteria learn from.
        folder: Where it is saved.
        tell: Hears what is being done.
    """
    tell("Reading sentences to learn from", 0.0)
    texts = text_batches(list(sentences), dense.tokenizer, batch_size=16, max_length=_length(dense.model, 64))
    model = copy.deepcopy(dense.model)
    tell("Pruning", 0.0)
    start = time.perf_counter()
    model.prune(config, calibration=texts)
    seconds = time.perf_counter() - start
    tell("Counting", 0.9)
    report, masked = sparsity_report(model), dict(model.named_parameters())
    names = [t.name for t in sparsity_report(dense.model).targets]  # which it has until something is taken out
    gone = {name: 1 - int(masked[name].count_nonzero()) / masked[name].numel() for name in names}
    before = weight_histogram(dense.model, names)
    units = unit_map(model) if config.removes_units else {}
    if config.removes_units:
        start = time.perf_counter()
        shrink(model)
        seconds += time.perf_counter() - start
        report = sparsity_report(model)
    after = weight_histogram(model, [t.name for t in report.targets], limit=float(before.edges[-1]))
    tell("Saving", 0.95)
    try:
        model.save_pretrained(folder, compressed=True)
        dense.tokenizer.save_pretrained(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Pruned(
        dense=dense,
        model=model,
        config=config,
        folder=folder,
        report=report,
        structure=structure_report(model) if config.removes_units else None,
        units=units,
        gone=gone,
        histograms=(before, after),
        seconds=seconds,
        file_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


def unit_map(model: Any) -> dict[str, list[bool]]:
    """Of each attention and feed-forward network of a masked model: which heads and neurons are left."""
    parameters, found = dict(model.named_parameters()), {}
    for site in find_unit_groups(model):
        part = site.consumers[0]
        weight = parameters[part.name].detach().movedim(part.dim, 0)
        found[f"{site.kind} {site.name}"] = weight.reshape(site.units, -1).ne(0).any(1).tolist()
    return found


def time_both(dense: Any, pruned: Any) -> LatencyResult:
    """One sentence of 64 tokens, or what the model can read if that is less; the two models in turns."""
    models = {"dense": dense, "pruned": pruned}
    return measure_latency(models, batch_sizes=[1], lengths=[_length(dense, 64)], rounds=30)


def score(model: Dense | Pruned, data: Any, source: str) -> Evaluation:
    """The accuracy on labelled sentences."""
    return evaluate_classification(model.model, model.tokenizer, data, source=source, split="held out")


def scores(dense: Evaluation, pruned: Evaluation) -> dict[str, Any]:
    """Both on the same sentences, as ``hf-prune evaluate --against --json`` says it."""
    comparison = compare(dense, pruned)
    return {"dense": dense.to_dict(), "evaluation": pruned.to_dict(), "comparison": comparison.to_dict()}


def removed_parts(units: Mapping[str, list[bool]]) -> dict[str, int]:
    """How many of each kind are gone."""
    return {
        kind: sum(n.startswith(kind) and not kept for n, left in units.items() for kept in left)
        for kind in unit_descriptions()
    }


@torch.inference_mode()
def probabilities_of(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """(sentences, classes)."""
    parts = []
    for start in range(0, len(texts), 16):
        batch = tokenizer(
            list(texts[start : start + 16]),
            truncation=True,
            max_length=_length(model, 256),
            padding=True,
            return_tensors="pt",
        )
        parts.append(model(**batch).logits.float().softmax(-1))
    return torch.cat(parts)


def _length(model: Any, wanted: int) -> int:
    return min(wanted, context_length(model) or wanted)
