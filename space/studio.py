"""What the Space does, without its pages: models, what visitors prune of them, and what is measured of both.

Dense models are shared and never changed; each visitor has at most one pruned copy, under a key of their own. Memory,
inputs and time are bounded by :class:`Limits`.
"""

from __future__ import annotations

import functools
import re
import shutil
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fetch import check_size, fetch_model
from work import Dense, Pruned, Tell, make_pruned, probabilities_of, score, scores, time_both

from hf_prune import (
    ConfigError,
    DataError,
    HfPruneError,
    LatencyResult,
    PruningConfig,
    listen_to_progress,
    load_classification,
    plot_layer_sparsity,
    plot_weight_histogram,
    prunable,
    push_checkpoint,
)
from hf_prune.cards import describe_model
from hf_prune.plots import save_figure
from hf_prune.push import PushResult
from hf_prune.workflows import load_classifier

DEMO = "Demo model (film reviews)"
LISTED = (
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "lxyuan/distilbert-base-multilingual-cased-sentiments-student",
)


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
    calibration: int = 64
    scored: int = 400


class Studio:
    """Models and visitors.

    Args:
        folder: For what visitors make; emptied with them.
        demo: Folder of the demo's model, or of one's own; None leaves only those of the Hub.
        data: Folder with labelled sentences that fit the demo's model: ``dev`` to score on, ``train`` to calibrate
            with; None if there are none.
        sentences: Sentences to look at, and to calibrate with where there are no others.
        limits: What visitors may ask for.
        name: What the model of ``demo`` is called.
        data_name: What its sentences are called.
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
        name: str = DEMO,
        data_name: str = "Rotten Tomatoes",
    ) -> None:
        self.limits = limits or Limits()
        self.sentences = list(sentences)
        self.data = None if data is None else str(data)
        self._split = functools.cache(functools.partial(load_classification, self.data or ""))
        self.public = public
        self.names = [*([] if demo is None else [name]), *LISTED]
        self._data_name = data_name
        self._demo, self.folder = demo, folder
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
                        shutil.rmtree(gone.folder.parents[1], ignore_errors=True)  # with what its links point to
            self._dense.move_to_end(name)
            return self._dense[name]

    def _is_own(self, name: str) -> bool:
        return self._demo is not None and name == self.names[0]

    def _read(self, name: str) -> Dense:
        base_model = None
        if self._is_own(name):
            folder = Path(str(self._demo))
        else:
            token, cache = (False, self.folder / "hub") if self.public else (None, None)
            folder, base_model = fetch_model(name, self.limits.download_bytes, token, cache), name
        try:
            check_size(name, folder, self.limits.parameters)
            model, tokenizer = load_classifier(str(folder))
        except BaseException as error:
            if self.public and base_model is not None:
                shutil.rmtree(folder.parents[1], ignore_errors=True)
            if isinstance(error, HfPruneError):  # in the visitor's words, not the machine's
                raise DataError(str(error).replace(str(folder), name)) from None
            if not isinstance(error, Exception):
                raise
            reason = " ".join(str(error).split())[:300].replace(str(folder), name)
            raise DataError(f"{name} cannot be loaded: {type(error).__name__}: {reason}") from None
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return Dense(name, prunable(model).eval(), tokenizer, folder, base_model, size)

    # --- pruning --------------------------------------------------------------------------------------

    def prune(self, visitor: str, name: str, config: PruningConfig, tell: Tell) -> Pruned:
        """Prune a copy of a model for a visitor, in place of the one that they had.

        Raises:
            HfPruneError: If it cannot be done, was cancelled or took too long; the visitor keeps what they had.
        """
        with self.job(visitor, tell):
            tell("Loading the model", 0.0)
            dense = self.load(name)
            pruned = make_pruned(dense, config, self.texts(), self.folder, tell)
        try:
            self._keep(visitor, pruned)
        except BaseException:
            shutil.rmtree(pruned.folder, ignore_errors=True)
            raise
        return pruned

    def texts(self) -> list[str]:
        """What calibrated criteria learn from."""
        if self.data is None:
            return self.sentences[: self.limits.calibration]
        return self._split("train")["sentence"][: self.limits.calibration]

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
            while len(self._pruned) > 1 and self._held() > self.limits.pruned_bytes:
                self._drop(next(iter(self._pruned)))

    def _held(self) -> int:
        """Bytes of all that visitors have, dense models that are kept for them alone included."""
        dense = {id(p.dense): p.dense.memory for p in self._pruned.values()}
        shared = {id(each) for each in self._dense.values()}
        return sum(p.memory for p in self._pruned.values()) + sum(n for i, n in dense.items() if i not in shared)

    def drop_idle(self) -> None:
        """Let go what nobody has used for long."""
        with self._changing:
            self._drop_idle()

    def _drop_idle(self) -> None:
        now = time.monotonic()
        for visitor in [v for v, p in self._pruned.items() if now - p.used > self.limits.idle_seconds]:
            self._drop(visitor)

    def _drop(self, visitor: str) -> None:
        gone = self._pruned.pop(visitor, None)
        if gone is not None and gone.files.locked():  # it is being packed or uploaded: afterwards
            threading.Thread(target=_remove, args=(gone,), daemon=True).start()
        elif gone is not None:
            _remove(gone)

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
        if not self._is_own(pruned.dense.name):
            raise DataError(f"the held-out sentences fit {self.names[0]} only: other models know other labels")
        with self.job(visitor, tell):
            data, name = self.held_out(), self._data_name
            pruned.evaluation = scores(score(pruned.dense, data, name), score(pruned, data, name))
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
        return pruned, *(probabilities_of(model, tokenizer, texts) for model in (pruned.dense.model, pruned.model))

    # --- publishing -------------------------------------------------------------------------------------

    def card(self, visitor: str, name: str) -> tuple[str, Path]:
        """Write the card, with what has been measured, beside the checkpoint; its text, and where that is.

        Raises:
            HfPruneError: If there is no model, or the name is none.
        """
        pruned = self._named(visitor, name)
        with pruned.files:
            return _write_card(pruned, name), pruned.folder

    def archive(self, visitor: str, name: str) -> Path:
        """The checkpoint with its card, as a zip file; the one before goes."""
        pruned = self._named(visitor, name)
        with pruned.files:
            _write_card(pruned, name)
            shutil.rmtree(_archives(pruned.folder), ignore_errors=True)
            path = _archives(pruned.folder) / f"{name.rpartition('/')[2]}.zip"
            path.parent.mkdir()
            with zipfile.ZipFile(path, "w") as file:  # the weights are packed already
                for each in sorted(pruned.folder.iterdir()):
                    file.write(each, each.name)
            return path

    def push(self, visitor: str, repo: str, token: str, private: bool) -> PushResult:
        """Upload it to the account that a token belongs to.

        Raises:
            HfPruneError: If it cannot be, or the repository is there and public, and a private one was asked for.
        """
        pruned = self._named(visitor, repo)
        with pruned.files:
            _write_card(pruned, repo)
            return push_checkpoint(pruned.folder, repo, private=private, token=token)

    def _named(self, visitor: str, name: str) -> Pruned:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name):
            raise DataError(f"{name[:100]!r} is no name for a model: expected letters, digits, '-', '_', '.'")
        return self.pruned(visitor)


def _write_card(pruned: Pruned, name: str) -> str:
    (pruned.folder / "README.md").unlink(missing_ok=True)
    title = f"{pruned.dense.name}, {pruned.config.criterion}"
    before, after = pruned.histograms
    save_figure(plot_weight_histogram(before, after, title), pruned.folder / "weights.png")
    if pruned.structure is None:
        save_figure(plot_layer_sparsity(pruned.report, title), pruned.folder / "layers.png")
    return describe_model(
        pruned.model,
        pruned.folder,
        plots=False,
        name=name.rpartition("/")[2],
        config=pruned.config,
        base_model=pruned.dense.base_model,
        evaluation=pruned.evaluation,
        latency=None if pruned.latency is None else pruned.latency.to_dict(),
    )


def _remove(pruned: Pruned) -> None:
    with pruned.files:
        shutil.rmtree(pruned.folder, ignore_errors=True)
        shutil.rmtree(_archives(pruned.folder), ignore_errors=True)


def _archives(folder: Path) -> Path:
    return folder.parent / f"{folder.name}-zip"
