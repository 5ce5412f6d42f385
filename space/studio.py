"""What the Space does, without its pages: models, what visitors prune of them, and what is measured of both.

Models are loaded and run in processes of their own, see :mod:`children`: a job in a new one, which ends with it,
and which a visitor can end; what was pruned stays in its process until the visitor goes. What anybody may use is
bounded by :class:`Limits`.
"""

from __future__ import annotations

import functools
import re
import shutil
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from children import Child, Children, EndedError
from fetch import check_name
from huggingface_hub.file_download import repo_folder_name

from hf_prune import ConfigError, DataError, PruningConfig, load_classification

Tell = Callable[[str, float], object]

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
        downloads: How many models' files are kept, where strangers visit.
        memory_bytes: That one process may use, where the system can limit that (Linux).
        visitors: Whose pruned models are kept; the one not used for longest goes first.
        kept_bytes: Memory of all visitors' models together.
        idle_seconds: After which a visitor's model goes.
        seconds: That one job may take.
        answer_seconds: That an answer of what was pruned may take.
        upload_seconds: That a push may take.
        characters: Of a sentence.
        sentences: At once.
        calibration: Sentences that calibrated criteria see.
        scored: Held-out sentences that a score is of.
    """

    parameters: int = 150_000_000
    download_bytes: int = 700_000_000
    downloads: int = 4
    memory_bytes: int = 3_000_000_000
    visitors: int = 24
    kept_bytes: int = 4_000_000_000
    idle_seconds: float = 1800
    seconds: float = 180
    answer_seconds: float = 120
    upload_seconds: float = 900
    characters: int = 1000
    sentences: int = 200
    calibration: int = 64
    scored: int = 400


@dataclass
class Pruned:
    """What a visitor made of a model: where it is, and what is shown of it."""

    child: Child
    model: Mapping[str, Any]
    folder: Path
    config: PruningConfig
    facts: Mapping[str, Any]
    labels: Sequence[str]
    parts: Mapping[str, int]
    layers: Sequence[Sequence[int]] | None
    histograms: Sequence[Mapping[str, Any]]
    units: Mapping[str, list[bool]]
    gone: Mapping[str, float]
    reasons: Sequence[str]
    used: float = field(default_factory=time.monotonic)
    reading: threading.Lock = field(default_factory=threading.Lock)  # held while others read its folder
    latency: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Of the dense model."""
        return str(self.model["name"])

    @property
    def memory(self) -> int:
        """Bytes that are kept for it: the weights of both models, or what its process says if that is more."""
        return max(self.child.memory, self.facts["memory_bytes_before"] + self.facts["memory_bytes"])


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
        public: Whether strangers visit: then no token of the machine is used, and downloads are deleted when others
            come.
        children: Start the processes; None for those of this studio alone.
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
        children: Children | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.sentences = list(sentences)
        self.data = None if data is None else str(data)
        self._train = functools.cache(functools.partial(load_classification, self.data or "", "train"))
        self.public = public
        self.names = [*([] if demo is None else [name]), *LISTED]
        self._data_name = data_name
        self._demo, self.folder = demo, folder
        self._children = children or Children(secrets=not public)
        self._pruned: OrderedDict[str, Pruned] = OrderedDict()
        self._jobs: dict[str, threading.Event] = {}
        self._busy: set[str] = set()  # addresses
        self._downloads: OrderedDict[str, None] = OrderedDict()
        self._reading: Counter[str] = Counter()
        self._changing = threading.RLock()

    def close(self) -> None:
        """All visitors leave, and their jobs end."""
        for visitor in [*self._jobs, *self._pruned]:
            self.forget(visitor)

    # --- jobs -----------------------------------------------------------------------------------------

    @contextmanager
    def job(self, visitor: str) -> Iterator[threading.Event]:
        """Something long, of which a visitor has one at a time; what is yielded is set when it is cancelled."""
        stopped = threading.Event()
        with self._changing:
            if visitor in self._jobs:
                raise ConfigError("something of yours is still running: wait for it, or cancel it")
            self._jobs[visitor] = stopped
        try:
            yield stopped
        finally:
            with self._changing:
                del self._jobs[visitor]

    @contextmanager
    def place(self, address: str | None) -> Iterator[None]:
        """Where strangers visit, one at a time of those at an address has something long running: there are few places.

        Args:
            address: None if nobody knows it.

        Raises:
            ConfigError: If somebody there has.
        """
        if not self.public or address is None:
            yield
            return
        with self._changing:
            if address in self._busy:
                raise ConfigError(
                    "something is still running for your address, in this window or another one, yours or that of "
                    "somebody who shares it: wait for it, or cancel it"
                )
            self._busy.add(address)
        try:
            yield
        finally:
            with self._changing:
                self._busy.discard(address)

    def cancel(self, visitor: str) -> bool:
        """Stop what a visitor has running; says whether there was anything."""
        with self._changing:
            job = self._jobs.get(visitor)
        if job is not None:
            job.set()
        return job is not None

    def _work(
        self, visitor: str, name: str, what: str, given: Mapping[str, Any], tell: Tell, points: list[Any] | None = None
    ) -> tuple[Child, dict[str, Any], Any]:
        """A job with a model, in a new process: that, how the model is had, and what came of it."""

        def hear(kind: str, value: Any) -> None:
            if kind == "progress":
                tell(*value)
            elif points is not None:
                points.append(value)

        with self.job(visitor) as stopped, self._source(name) as model:
            child = self._children.start(self.limits.memory_bytes)
            try:
                wanted = {"model": model, **given}
                return child, model, child.ask(what, wanted, seconds=self.limits.seconds, stopped=stopped, hear=hear)
            except BaseException:
                child.end()
                raise

    # --- models ---------------------------------------------------------------------------------------

    def check_own(self) -> None:
        """See that the first model can be loaded.

        Raises:
            DataError: If it is no text classifier, too large, or cannot be had.
        """
        child, _, _ = self._work("", self.names[0], "check", {}, lambda *_: None)
        child.end()

    @contextmanager
    def _source(self, name: str) -> Iterator[dict[str, Any]]:
        """How a process has a model. Where strangers visit, downloads that few want are deleted afterwards."""
        own = self._is_own(name)
        cache = self.folder / "hub" if self.public and not own else None
        if not own:
            check_name(name)
        with self._changing:
            self._reading[name] += 1
        found = False
        try:
            yield {
                "name": name,
                "folder": str(self._demo) if own else None,
                "download_bytes": self.limits.download_bytes,
                "token": False if self.public else None,
                "cache": None if cache is None else str(cache),
                "parameters": self.limits.parameters,
            }
            found = True
        finally:
            with self._changing:
                self._reading -= Counter([name])  # names that nobody reads are forgotten
                if cache is not None:
                    self._tidy(cache, name, found)

    def _tidy(self, cache: Path, name: str, found: bool) -> None:
        if found:
            self._downloads[name] = None
            self._downloads.move_to_end(name)
        gone = [] if found or name in self._downloads else [name]
        gone += [each for each in list(self._downloads)[: max(0, len(self._downloads) - self.limits.downloads)]]
        for each in gone:
            if not self._reading[each]:
                self._downloads.pop(each, None)
                shutil.rmtree(cache / repo_folder_name(repo_id=each, repo_type="model"), ignore_errors=True)

    def _is_own(self, name: str) -> bool:
        return self._demo is not None and name == self.names[0]

    # --- pruning --------------------------------------------------------------------------------------

    def prune(self, visitor: str, name: str, config: PruningConfig, tell: Tell) -> Pruned:
        """Prune a copy of a model for a visitor, in place of the one that they had.

        Raises:
            HfPruneError: If it cannot be done, was cancelled or took too long; the visitor keeps what they had.
        """
        folder = self.folder / uuid.uuid4().hex
        try:
            given = {"config": config.to_dict(), "texts": self.texts(), "folder": str(folder)}
            child, model, shown = self._work(visitor, name, "prune", given, tell)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        pruned = Pruned(child, model, folder, config, **shown)
        self._keep(visitor, pruned)
        return pruned

    def texts(self) -> list[str]:
        """What calibrated criteria learn from."""
        found = self.sentences if self.data is None else self._train()["sentence"]
        return list(found[: self.limits.calibration])

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
            self._pruned[visitor] = pruned
            self._drop_idle()

    def drop_idle(self) -> None:
        """Let go what nobody has used for long, and what there is no memory for."""
        with self._changing:
            self._drop_idle()

    def _drop_idle(self) -> None:
        now = time.monotonic()
        for visitor in [v for v, p in self._pruned.items() if now - p.used > self.limits.idle_seconds]:
            self._drop(visitor)
        while len(self._pruned) > 1 and (
            len(self._pruned) > self.limits.visitors
            or sum(p.memory for p in self._pruned.values()) > self.limits.kept_bytes
        ):
            self._drop(next(iter(self._pruned)))

    def _drop(self, visitor: str) -> None:
        gone = self._pruned.pop(visitor, None)
        if gone is not None and (gone.child.turn.locked() or gone.reading.locked()):  # afterwards
            threading.Thread(target=_remove, args=(gone,), daemon=True).start()
        elif gone is not None:
            _remove(gone)

    def _ask(self, visitor: str, pruned: Pruned, what: str, given: Mapping[str, Any]) -> Any:
        """Have the process with a visitor's model do something short."""
        try:
            return pruned.child.ask(what, given, seconds=self.limits.answer_seconds)
        except EndedError as error:
            with self._changing:
                if self._pruned.get(visitor) is pruned:
                    self._drop(visitor)
            raise EndedError(f"{error}. Your pruned model went with it: prune one again") from None

    # --- what it cost and what it brought ---------------------------------------------------------------

    def measure(self, visitor: str, tell: Tell) -> dict[str, Any]:
        """Time the dense and the pruned model in turns: the points, what is doubtful, and the whole of it."""
        pruned = self.pruned(visitor)
        pruned.latency = self._with_both(visitor, pruned, "measure", {}, tell)
        return pruned.latency

    def score(self, visitor: str, tell: Tell) -> dict[str, Any]:
        """Score both on the same held-out sentences; the demo's model only, whose labels they have."""
        pruned = self.pruned(visitor)
        if not self._is_own(pruned.name):
            raise DataError(f"the held-out sentences fit {self.names[0]} only: other models know other labels")
        given = {"data": self._labelled(), "data_name": self._data_name, "n": self.limits.scored}
        pruned.evaluation = self._with_both(visitor, pruned, "score", given, tell)
        return pruned.evaluation

    def _with_both(
        self, visitor: str, pruned: Pruned, what: str, given: Mapping[str, Any], tell: Tell
    ) -> dict[str, Any]:
        with pruned.reading:
            child, _, found = self._work(visitor, pruned.name, what, {**given, "folder": str(pruned.folder)}, tell)
        child.end()
        return dict(found)

    def _labelled(self) -> str:
        if self.data is None:
            raise DataError("there are no labelled sentences to score on")
        return self.data

    def sweep(
        self,
        visitor: str,
        methods: Sequence[tuple[str, str, bool]],
        sparsities: Sequence[float],
        n: int,
        tell: Tell,
        points: list[dict[str, Any]],
    ) -> None:
        """Measure points of the first model.

        Args:
            visitor: Whose job it is.
            methods: What goes, how it is chosen, and whether what stays is repaired.
            sparsities: Of each.
            n: Held-out sentences to score on.
            tell: Hears what is being done.
            points: Gets each as soon as it is measured, also where an error ends it.
        """
        root = self.folder / uuid.uuid4().hex
        given = {"methods": methods, "sparsities": sparsities, "texts": self.texts(), "data": self._labelled(), "n": n}
        try:
            child, _, _ = self._work(visitor, self.names[0], "sweep", {**given, "root": str(root)}, tell, points)
            child.end()
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def own_bytes(self) -> int:
        """Of the files of the first model's weights."""
        return sum(path.stat().st_size for path in Path(str(self._demo)).glob("*.safetensors"))

    def probabilities(self, visitor: str, texts: Sequence[str]) -> tuple[Pruned, list[list[float]], list[list[float]]]:
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
        dense, after = self._ask(visitor, pruned, "ask", {"texts": texts})
        return pruned, dense, after

    # --- publishing -------------------------------------------------------------------------------------

    def card(self, visitor: str, name: str) -> tuple[str, Path]:
        """Write the card, with what has been measured, beside the checkpoint; its text, and where that is.

        Raises:
            HfPruneError: If there is no model, or the name is none.
        """
        pruned = self._named(visitor, name)
        return str(self._ask(visitor, pruned, "card", _measured(pruned, name))), pruned.folder

    def archive(self, visitor: str, name: str) -> Path:
        """The checkpoint with its card, as a zip file; the one before goes."""
        pruned = self._named(visitor, name)
        path = _archives(pruned.folder) / f"{name.rpartition('/')[2]}.zip"
        self._ask(visitor, pruned, "archive", {"path": str(path), **_measured(pruned, name)})
        return path

    def push(self, visitor: str, repo: str, token: str, private: bool) -> dict[str, Any]:
        """Upload it to the account that a token belongs to, from a process that has not seen the model.

        Raises:
            HfPruneError: If it cannot be, or the repository is there and public, and a private one was asked for.
        """
        pruned = self._named(visitor, repo)
        with pruned.reading:
            self.card(visitor, repo)
            child = self._children.start(self.limits.memory_bytes)
            try:
                given = {"folder": str(pruned.folder), "repo": repo, "token": token, "private": private}
                return dict(child.ask("push", given, seconds=self.limits.upload_seconds))
            finally:
                child.end()

    def _named(self, visitor: str, name: str) -> Pruned:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name):
            raise DataError(f"{name[:100]!r} is no name for a model: expected letters, digits, '-', '_', '.'")
        return self.pruned(visitor)


def _measured(pruned: Pruned, name: str) -> dict[str, Any]:
    """What a card is given."""
    latency = None if pruned.latency is None else pruned.latency["latency"]
    return {"name": name, "latency": latency, "evaluation": pruned.evaluation}


def _remove(pruned: Pruned) -> None:
    with pruned.reading, pruned.child.turn:
        pruned.child.end()
        shutil.rmtree(pruned.folder, ignore_errors=True)
        shutil.rmtree(_archives(pruned.folder), ignore_errors=True)


def _archives(folder: Path) -> Path:
    return folder.parent / f"{folder.name}-zip"
