"""What the Space does, without its pages: models, what visitors prune of them, and what is measured of both.

Dense models are shared and never changed; each visitor has at most one pruned copy, under a key of their own. Memory,
inputs and time are bounded by :class:`Limits`.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import threading
import time
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from hf_prune import (
    CRITERIA,
    ConfigError,
    DataError,
    HfPruneError,
    LatencyResult,
    PruningConfig,
    SparsityReport,
    StructureReport,
    compare,
    evaluate_classification,
    explain_speed,
    listen_to_progress,
    load_classification,
    measure_latency,
    plot_layer_sparsity,
    plot_weight_histogram,
    prunable,
    push_checkpoint,
    shrink,
    sparsity_report,
    structure_report,
    text_batches,
    weight_histogram,
)
from hf_prune.cards import describe_model
from hf_prune.config import UNIT_CRITERIA_OF, UNITS
from hf_prune.criteria.base import CURVATURE, LABELLED, TRAINED
from hf_prune.evaluation import context_length
from hf_prune.hub import PushResult
from hf_prune.plots import save_figure
from hf_prune.report import WeightHistogram
from hf_prune.sites import find_sites
from hf_prune.workflows import load_classifier

DEMO = "Demo model (film reviews)"
LISTED = (
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "lxyuan/distilbert-base-multilingual-cased-sentiments-student",
)
WHAT: Mapping[str, str | tuple[str, ...]] = {
    "Single weights": "unstructured",
    "Two of every four weights (2:4)": "2:4",
    "Blocks of sixteen weights": "block:1x16",
    "Attention heads": ("head",),
    "Neurons": ("neuron",),
    "Heads and neurons": ("head", "neuron"),
    "Whole layers": ("layer",),
}
Tell = Callable[[str, float], object]

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = (
    "*.safetensors",
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
_LARGEST_NUMBER, _MOST_LAYERS = 2_000_000, 128  # in a config: more is no model that fits here


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Args:
        parameters: Of a model.
        download_bytes: Of a model's files.
        dense_models: How many are kept in memory.
        pruned_bytes: Of all visitors' pruned models together; the one not used for longest goes first.
        idle_seconds: After which a visitor's model goes.
        seconds: That one job may take.
        characters: Of a sentence.
        sentences: At once.
        calibration: Sentences that calibrated criteria see.
        scored: Held-out sentences that a score is of.
    """

    parameters: int = 150_000_000
    download_bytes: int = 700_000_000
    dense_models: int = 2
    pruned_bytes: int = 2_000_000_000
    idle_seconds: float = 1800
    seconds: float = 180
    characters: int = 1000
    sentences: int = 200
    calibration: int = 128
    scored: int = 400


@dataclass(frozen=True)
class Dense:
    """A model as it came. Its weights are never changed."""

    name: str
    model: Any
    tokenizer: Any
    folder: Path
    base_model: str | None

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def file_bytes(self) -> int:
        """Of its weights on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]


@dataclass
class Pruned:
    """What a visitor made of one, with everything that was counted and measured of it."""

    dense: Dense
    model: Any
    config: PruningConfig
    folder: Path
    report: SparsityReport
    structure: StructureReport | None
    units: Mapping[str, list[bool]]
    histograms: tuple[WeightHistogram, WeightHistogram]
    seconds: float
    file_bytes: int
    used: float = field(default_factory=time.monotonic)
    latency: LatencyResult | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def parameters(self) -> int:
        """Of the whole model, zeros included."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def memory(self) -> int:
        """Bytes of its weights in memory."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def facts(self) -> dict[str, Any]:
        """The numbers, for programs."""
        return {
            "model": self.dense.name,
            "settings": self.config.to_dict(),
            "parameters_before": self.dense.parameters,
            "parameters": self.parameters,
            "nonzero": self.report.nonzero,
            "target_sparsity": self.report.target_sparsity,
            "memory_bytes_before": sum(p.numel() * p.element_size() for p in self.dense.model.parameters()),
            "memory_bytes": self.memory,
            "file_bytes_before": self.dense.file_bytes,
            "file_bytes_compressed": self.file_bytes,
            "seconds": round(self.seconds, 2),
            "latency": None if self.latency is None else self.latency.to_dict(),
            "score": None if self.evaluation is None else self.evaluation["comparison"],
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
    if what not in WHAT:
        raise ConfigError(f"{what!r} cannot be removed: expected one of {', '.join(WHAT)}")
    if how not in criteria_for(what):
        raise ConfigError(f"{how!r} cannot choose them: expected one of {', '.join(criteria_for(what))}")
    if repair and not can_repair(what, how):
        raise ConfigError(f"a repair does not fit to {how!r} and {what!r}: leave it out")
    if not 0 <= sparsity <= 0.95:
        raise ConfigError(f"the sparsity is {sparsity:g}: expected 0 to 0.95")
    fixed = fixed_sparsity(what)
    config = _config(
        what, how, sparsity=sparsity if fixed is None else fixed, repair="least_squares" if repair else None
    )
    assert config is not None
    return config


class Studio:
    """Models and visitors.

    Args:
        folder: For what visitors make; emptied with them.
        demo: Folder of the demo's model, or of one's own; None leaves only those of the Hub.
        data: Folder with labelled sentences that fit the demo's model: ``dev`` to score on, ``train`` to calibrate
            with; None if there are none.
        sentences: Sentences and labels to look at.
        limits: What visitors may ask for.
        public: Whether strangers visit: then no token of the machine is used, and downloads are deleted when the
            model goes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        demo: str | Path | None,
        data: str | Path | None,
        sentences: Sequence[str],
        limits: Limits | None = None,
        public: bool = True,
    ) -> None:
        self.limits = limits or Limits()
        self.sentences = list(sentences)
        self.data = None if data is None else str(data)
        self.public = public
        self.names = [*([] if demo is None else [DEMO]), *LISTED]
        self._demo, self._folder = demo, folder
        self._dense: OrderedDict[str, Dense] = OrderedDict()
        self._pruned: OrderedDict[str, Pruned] = OrderedDict()
        self._jobs: dict[str, threading.Event] = {}
        self._loading, self._changing = threading.Lock(), threading.Lock()

    # --- jobs -----------------------------------------------------------------------------------------

    @contextmanager
    def job(self, visitor: str, tell: Tell) -> Iterator[None]:
        """Something long: it tells how far it is, can be cancelled, and ends when its time is over."""
        stopped = threading.Event()
        with self._changing:
            if visitor in self._jobs:
                raise ConfigError("something of yours is still running: wait for it, or cancel it")
            self._jobs[visitor] = stopped
        end = time.monotonic() + self.limits.seconds

        def listen(title: str, done: int, total: int | None) -> None:
            if stopped.is_set():
                raise ConfigError("cancelled; nothing has changed")
            if time.monotonic() > end:
                raise ConfigError(
                    f"this took longer than the {self.limits.seconds:.0f} seconds that one visitor may use, and was "
                    f"stopped; nothing has changed. Choose another criterion or a smaller model"
                )
            tell(title, done / total if total else 0.0)

        try:
            with listen_to_progress(listen):
                yield
        finally:
            with self._changing:
                del self._jobs[visitor]

    def cancel(self, visitor: str) -> bool:
        """Stop what a visitor has running; says whether there was anything."""
        with self._changing:
            job = self._jobs.get(visitor)
        if job is not None:
            job.set()
        return job is not None

    # --- models ---------------------------------------------------------------------------------------

    def load(self, name: str) -> Dense:
        """A dense model, from memory if it is there.

        Raises:
            DataError: If it is no text classifier, too large, or cannot be had.
        """
        with self._loading:
            if name not in self._dense:
                self._dense[name] = self._read(name)
                while len(self._dense) > self.limits.dense_models:
                    _, gone = self._dense.popitem(last=False)
                    if self.public and gone.base_model is not None:
                        shutil.rmtree(gone.folder, ignore_errors=True)
            self._dense.move_to_end(name)
            return self._dense[name]

    def _read(self, name: str) -> Dense:
        base_model = None
        if name == DEMO and self._demo is not None:
            folder = Path(self._demo)
        else:
            folder, base_model = self._download(name), name
        try:
            model, tokenizer = load_classifier(str(folder))
        except HfPruneError:
            raise
        except Exception as error:
            raise DataError(
                f"{name} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from None
        if sum(p.numel() for p in model.parameters()) > self.limits.parameters:
            raise DataError(self._too_large(name))
        return Dense(name, prunable(model).eval(), tokenizer, folder, base_model)

    def _too_large(self, name: str) -> str:
        return (
            f"{name} is too large for this page: expected at most {self.limits.parameters / 1e6:.0f} million "
            f"parameters and {self.limits.download_bytes / 1e6:.0f} MB; prune it on your own machine with "
            f"`hf-prune prune`"
        )

    def _download(self, name: str) -> Path:
        """The files of a model of the Hub, checked before the large ones are fetched. No code and no pickle is."""
        if not _ID.fullmatch(name) or ".." in name:
            raise DataError(f"{name[:100]!r} is no model of the Hub: expected owner/name, such as {LISTED[0]}")
        token = False if self.public else None
        try:
            info = HfApi(token=token).model_info(name, files_metadata=True, timeout=15)
            weights = [
                f for f in info.siblings or [] if f.rfilename.endswith(".safetensors") and "/" not in f.rfilename
            ]
            if not weights:
                raise DataError(
                    f"{name} has no weights as safetensors, and pickles are never opened: choose another one"
                )
            if sum(math.inf if f.size is None else f.size for f in weights) > self.limits.download_bytes:
                raise DataError(self._too_large(name))
            where: dict[str, Any] = {"revision": info.sha, "token": token}
            if self.public:
                where["cache_dir"] = self._folder / "hub"
            config = json.loads(Path(hf_hub_download(name, "config.json", **where)).read_text(encoding="utf-8"))
            self._check_config(name, config)
            return Path(snapshot_download(name, allow_patterns=list(_FILES), **where))
        except RepositoryNotFoundError:
            raise DataError(f"{name} is not on the Hub, or is private: check its name") from None
        except OfflineModeIsEnabled:
            raise DataError(f"{name} cannot be had: this page runs without the Hub (HF_HUB_OFFLINE)") from None
        except (HFValidationError, HfHubHTTPError, ValueError) as error:
            raise DataError(f"the Hub does not give {name}: {' '.join(str(error).split())[:200]}") from None
        except DataError:
            raise
        except Exception as error:  # the client passes on whatever its transport raises
            raise DataError(f"the Hub cannot be reached for {name} ({type(error).__name__}): try again later") from None

    def _check_config(self, name: str, config: Any) -> None:
        kinds = (config.get("architectures") if isinstance(config, dict) else None) or ["a model without a class"]
        if not str(kinds[0]).endswith("ForSequenceClassification"):
            raise DataError(f"{name} is {kinds[0]}: expected a text classifier (…ForSequenceClassification)")
        for key, value in config.items():
            if isinstance(value, int) and (value > _LARGEST_NUMBER or ("layer" in key and value > _MOST_LAYERS)):
                raise DataError(f"{name} says {key} = {value}: {self._too_large(name)}")

    # --- pruning --------------------------------------------------------------------------------------

    def prune(self, visitor: str, name: str, config: PruningConfig, tell: Tell) -> Pruned:
        """Prune a copy of a model for a visitor, in place of the one that they had.

        Raises:
            HfPruneError: If it cannot be done, was cancelled or took too long; the visitor keeps what they had.
        """
        with self.job(visitor, tell):
            tell("Loading the model", 0.0)
            dense = self.load(name)
            pruned = self.make(dense, config, tell)
        try:
            self._keep(visitor, pruned)
        except BaseException:
            shutil.rmtree(pruned.folder, ignore_errors=True)
            raise
        return pruned

    def make(self, dense: Dense, config: PruningConfig, tell: Tell) -> Pruned:
        """A pruned copy, counted and saved. Heads, neurons and layers are taken out."""
        tell("Reading sentences to learn from", 0.0)
        texts = text_batches(self._texts(), dense.tokenizer, batch_size=16, max_length=64)
        model = copy.deepcopy(dense.model)
        tell("Pruning", 0.0)
        start = time.perf_counter()
        model.prune(config, calibration=texts)
        units = unit_map(model) if config.removes_units else {}
        if config.removes_units:
            shrink(model)
        seconds = time.perf_counter() - start
        tell("Counting", 0.9)
        report = sparsity_report(model)
        names = [t.name for t in report.targets]
        there = set(dict(dense.model.named_parameters()))
        before = weight_histogram(dense.model, [n for n in names if n in there])
        after = weight_histogram(model, names, limit=float(before.edges[-1]))
        tell("Saving", 0.95)
        folder = self._folder / uuid.uuid4().hex
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
            histograms=(before, after),
            seconds=seconds,
            file_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        )

    def _texts(self) -> list[str]:
        if self.data is None:
            return self.sentences[: self.limits.calibration]
        return self._split("train")["sentence"][: self.limits.calibration]

    def _split(self, name: str) -> Any:
        assert self.data is not None
        return load_classification(self.data, name)

    def held_out(self, n: int | None = None) -> Any:
        """Labelled sentences that the demo's model was not trained on.

        Raises:
            DataError: If there are none.
        """
        if self.data is None:
            raise DataError("there are no labelled sentences to score on")
        data = self._split("dev")
        return data.select(range(min(len(data), n or self.limits.scored)))

    def pruned(self, visitor: str) -> Pruned:
        """What a visitor has.

        Raises:
            DataError: If they have nothing, or no longer.
        """
        with self._changing:
            self._drop_idle()
            if visitor not in self._pruned:
                raise DataError(
                    f"there is no pruned model of yours: prune one first (it goes after "
                    f"{self.limits.idle_seconds / 60:.0f} minutes without use, or when many others come)"
                )
            found = self._pruned[visitor]
            found.used = time.monotonic()
            self._pruned.move_to_end(visitor)
            return found

    def forget(self, visitor: str) -> None:
        """A visitor has left."""
        self.cancel(visitor)
        with self._changing:
            self._drop(visitor)

    def _keep(self, visitor: str, pruned: Pruned) -> None:
        with self._changing:
            self._drop(visitor)
            self._drop_idle()
            self._pruned[visitor] = pruned
            while len(self._pruned) > 1 and sum(p.memory for p in self._pruned.values()) > self.limits.pruned_bytes:
                self._drop(next(iter(self._pruned)))

    def _drop_idle(self) -> None:
        now = time.monotonic()
        for visitor in [v for v, p in self._pruned.items() if now - p.used > self.limits.idle_seconds]:
            self._drop(visitor)

    def _drop(self, visitor: str) -> None:
        gone = self._pruned.pop(visitor, None)
        if gone is not None:
            shutil.rmtree(gone.folder, ignore_errors=True)

    # --- what it cost and what it brought ---------------------------------------------------------------

    def measure(self, visitor: str, tell: Tell) -> LatencyResult:
        """Time the dense and the pruned model in turns."""
        pruned = self.pruned(visitor)
        with self.job(visitor, tell):
            tell("Timing both in turns", 0.3)
            pruned.latency = time_both(pruned)
        return pruned.latency

    def score(self, visitor: str, tell: Tell) -> dict[str, Any]:
        """Score both on the same held-out sentences; the demo's model only, whose labels they have."""
        pruned = self.pruned(visitor)
        if pruned.dense.name != DEMO:
            raise DataError("the held-out sentences fit the demo's model only: other models know other labels")
        with self.job(visitor, tell):
            pruned.evaluation = score_both(pruned, self.held_out())
        return pruned.evaluation

    def probabilities(self, visitor: str, texts: Sequence[str]) -> tuple[Pruned, torch.Tensor, torch.Tensor]:
        """What both models make of sentences: (sentences, classes) each.

        Raises:
            DataError: If there are too many sentences, or they are too long.
        """
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise DataError("there is no sentence: type one")
        if len(texts) > self.limits.sentences:
            raise DataError(f"these are {len(texts)} sentences: expected at most {self.limits.sentences}")
        if (longest := max(map(len, texts))) > self.limits.characters:
            raise DataError(f"a sentence has {longest} characters: expected at most {self.limits.characters}")
        pruned = self.pruned(visitor)
        tokenizer = pruned.dense.tokenizer
        return pruned, *(_probabilities(model, tokenizer, texts) for model in (pruned.dense.model, pruned.model))

    # --- publishing -------------------------------------------------------------------------------------

    def card(self, visitor: str, name: str) -> str:
        """Write the card, with what has been measured, beside the checkpoint.

        Raises:
            HfPruneError: If there is no model, or the name is none.
        """
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name):
            raise DataError(f"{name[:100]!r} is no name for a model: expected letters, digits, '-', '_', '.'")
        pruned = self.pruned(visitor)
        (pruned.folder / "README.md").unlink(missing_ok=True)
        title = f"{pruned.dense.name}, {pruned.config.criterion}"
        before, after = pruned.histograms
        save_figure(plot_weight_histogram(before, after, title), pruned.folder / "weights.png")
        save_figure(plot_layer_sparsity(pruned.report, title), pruned.folder / "layers.png")
        return describe_model(
            pruned.model,
            pruned.folder,
            name=name.rpartition("/")[2],
            config=pruned.config,
            base_model=pruned.dense.base_model,
            evaluation=pruned.evaluation,
            latency=None if pruned.latency is None else pruned.latency.to_dict(),
        )

    def archive(self, visitor: str, name: str) -> Path:
        """The checkpoint with its card, as a zip file."""
        self.card(visitor, name)
        folder = self.pruned(visitor).folder
        path = folder.parent / f"{folder.name}-zip" / f"{name.rpartition('/')[2]}.zip"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as file:  # the weights are packed already
            for each in sorted(folder.iterdir()):
                file.write(each, each.name)
        return path

    def push(self, visitor: str, repo: str, token: str, private: bool) -> PushResult:
        """Upload it to the account that a token belongs to."""
        self.card(visitor, repo)
        return push_checkpoint(self.pruned(visitor).folder, repo, private=private, token=token)


def unit_map(model: Any) -> dict[str, list[bool]]:
    """Of each attention and feed-forward network of a masked model: which heads and neurons are left."""
    parameters, found = dict(model.named_parameters()), {}
    for site in find_sites(model):
        part = site.consumers[0]
        weight = parameters[part.name].detach().movedim(part.dim, 0)
        found[f"{site.kind} {site.name}"] = weight.reshape(site.units, -1).ne(0).any(1).tolist()
    return found


def time_both(pruned: Pruned) -> LatencyResult:
    """One sentence of 64 tokens, or what the model can read if that is less; the two models in turns."""
    models = {"dense": pruned.dense.model, "pruned": pruned.model}
    length = min(64, context_length(pruned.dense.model) or 64)
    return measure_latency(models, batch_sizes=[1], lengths=[length], rounds=30)


def score_both(pruned: Pruned, data: Any) -> dict[str, Any]:
    """Both on the same sentences, as ``hf-prune evaluate --against --json`` says it."""
    models = {"dense": pruned.dense.model, "evaluation": pruned.model}
    found = {
        key: evaluate_classification(model, pruned.dense.tokenizer, data, source="Rotten Tomatoes", split="held out")
        for key, model in models.items()
    }
    comparison = compare(found["dense"], found["evaluation"])
    return {**{k: v.to_dict() for k, v in found.items()}, "comparison": comparison.to_dict()}


def speed_in_words(pruned: Pruned) -> str:
    """Whether it is faster, and why not."""
    return explain_speed(pruned.model, pruned.latency)


def removed_parts(units: Mapping[str, list[bool]]) -> dict[str, int]:
    """How many of each kind are gone."""
    return {kind: sum(n.startswith(kind) and not kept for n, left in units.items() for kept in left) for kind in UNITS}


@torch.inference_mode()
def _probabilities(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    parts = []
    for start in range(0, len(texts), 16):
        batch = tokenizer(
            list(texts[start : start + 16]), truncation=True, max_length=256, padding=True, return_tensors="pt"
        )
        parts.append(model(**batch).logits.float().softmax(-1))
    return torch.cat(parts)
