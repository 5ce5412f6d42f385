"""Visitors, the pruned models that they have, and everything the Space does for them, without its pages.

Models are loaded and run in child processes, see :mod:`children`: each job in a new one, which ends with the job and
which a visitor can cancel. A pruned model stays in its process until its visitor leaves. :class:`limits.Limits` bounds
what anybody may use.
"""

from __future__ import annotations

import functools
import re
import shutil
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from children import Child, Children, EndedError
from downloads import Downloads, check_name
from jobs import Jobs
from limits import Limits

from hf_prune import DataError, PruningConfig, load_classification

Progress = Callable[[str, float], object]  # what is being done, and which share of it is done

DEMO = "Demo model (film reviews)"
LISTED = (
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "lxyuan/distilbert-base-multilingual-cased-sentiments-student",
)


@dataclass
class Session:
    """A visitor's pruned model: its process and folder, and what is shown of it."""

    child: Child
    model: Mapping[str, Any]
    folder: Path
    config: PruningConfig
    facts: Mapping[str, Any]
    labels: Sequence[str]
    removed_units: Mapping[str, int]  # by kind
    layers: Sequence[Sequence[int]] | None  # (now, before) of each list of layers
    histograms: Sequence[Mapping[str, Any]]
    units: Mapping[str, list[bool]]
    removed_shares: Mapping[str, float]  # by matrix
    reasons: Sequence[str]
    used: float = field(default_factory=time.monotonic)
    reading: threading.Lock = field(default_factory=threading.Lock)  # held while others read its folder
    latency: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The dense model's name."""
        return str(self.model["name"])

    @property
    def memory(self) -> int:
        """Bytes it takes: the weights of both models, or what its process reports if that is more."""
        return max(self.child.memory, self.facts["memory_bytes_before"] + self.facts["memory_bytes"])


class Sessions:
    """All visitors.

    Args:
        folder: Where files of visitors go; they are deleted when the visitors leave.
        demo: Folder of the first model on the list; None leaves only models of the Hub.
        data: Folder with labelled sentences that fit this model: ``dev`` to score on, ``train`` to calibrate with;
            None if there are none.
        sentences: Sentences to look at, and to calibrate with where there are no others.
        limits: What visitors may ask for.
        name: What to call the model in ``demo``.
        data_name: What to call its sentences.
        public: Whether strangers visit: then the machine's token is not used, and downloads are deleted when others
            need the room.
        children: Starts the child processes; None for those of these sessions alone.
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
        self._load_train = functools.cache(functools.partial(load_classification, self.data or "", "train"))
        self.public = public
        self.names = [*([] if demo is None else [name]), *LISTED]
        self.jobs = Jobs(public=public)
        self._data_name = data_name
        self._demo, self.folder = demo, folder
        self._children = children or Children(secrets=not public)
        self._downloads = Downloads(folder / "hub", self.limits.downloads) if public else None
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # by visitor, the most recently used one last
        self._changing = threading.RLock()

    def close(self) -> None:
        """End all jobs and sessions."""
        for visitor in [*self.jobs.visitors(), *self._sessions]:
            self.forget(visitor)

    def _run_job(
        self,
        visitor: str,
        name: str,
        command: str,
        arguments: Mapping[str, Any],
        progress: Progress,
        points: list[Any] | None = None,
    ) -> tuple[Child, dict[str, Any], Any]:
        """Run a job on a model in a new process; returns the process, how the model is loaded, and the result."""

        def on_message(kind: str, value: Any) -> None:
            if kind == "progress":
                progress(*value)
            elif points is not None:
                points.append(value)

        with self.jobs.run(visitor) as cancelled, self._source(name) as model:
            child = self._children.start(self.limits.memory_bytes)
            try:
                result = child.ask(
                    command,
                    {"model": model, **arguments},
                    seconds=self.limits.seconds,
                    cancelled=cancelled,
                    on_message=on_message,
                )
                return child, model, result
            except BaseException:
                child.end()
                raise

    # --- models ---------------------------------------------------------------------------------------

    def check_own_model(self) -> None:
        """Make sure that the first model on the list can be loaded.

        Raises:
            DataError: If it is not a text classifier, too large, or cannot be fetched.
        """
        child, _, _ = self._run_job("", self.names[0], "check", {}, lambda *_: None)
        child.end()

    @contextmanager
    def _source(self, name: str) -> Iterator[dict[str, Any]]:
        """How a process gets a model, whose files stay for as long as it needs them."""
        source = {
            "name": name,
            "folder": None,
            "download_bytes": self.limits.download_bytes,
            "token": False if self.public else None,
            "cache": None,
            "parameters": self.limits.parameters,
        }
        if self._is_own(name):
            yield {**source, "folder": str(self._demo)}
            return
        check_name(name)
        if self._downloads is None:
            yield source
            return
        with self._downloads.reading(name):
            yield {**source, "cache": str(self._downloads.cache)}

    def _is_own(self, name: str) -> bool:
        return self._demo is not None and name == self.names[0]

    # --- pruning --------------------------------------------------------------------------------------

    def prune(self, visitor: str, name: str, config: PruningConfig, progress: Progress) -> Session:
        """Prune a copy of a model for a visitor, which replaces the one that they had.

        Raises:
            HfPruneError: If it failed, was cancelled or took too long; the visitor keeps what they had.
        """
        folder = self.folder / uuid.uuid4().hex
        try:
            arguments = {"config": config.to_dict(), "texts": self.calibration_texts(), "folder": str(folder)}
            child, model, shown = self._run_job(visitor, name, "prune", arguments, progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        session = Session(child, model, folder, config, **shown)
        self._keep(visitor, session)
        return session

    def calibration_texts(self) -> list[str]:
        """The sentences that calibrated criteria learn from."""
        sentences = self.sentences if self.data is None else self._load_train()["sentence"]
        return list(sentences[: self.limits.calibration])

    def of(self, visitor: str) -> Session:
        """A visitor's session.

        Raises:
            DataError: If they have none, or no longer.
        """
        with self._changing:
            self._drop_idle()
            if visitor not in self._sessions:
                raise DataError(
                    f"there is no pruned model of yours: prune one first (it goes after "
                    f"{self.limits.idle_seconds / 60:.0f} minutes without use, or when many others come)"
                )
            session = self._sessions[visitor]
            session.used = time.monotonic()
            self._sessions.move_to_end(visitor)
            return session

    def forget(self, visitor: str) -> None:
        """End a visitor's job and session."""
        self.jobs.cancel(visitor)
        with self._changing:
            self._drop(visitor)

    def _keep(self, visitor: str, session: Session) -> None:
        with self._changing:
            self._drop(visitor)
            self._sessions[visitor] = session
            self._drop_idle()

    def drop_idle(self) -> None:
        """Drop sessions that have been idle for too long, and those that there is no memory for."""
        with self._changing:
            self._drop_idle()

    def _drop_idle(self) -> None:
        now = time.monotonic()
        for visitor in [v for v, session in self._sessions.items() if now - session.used > self.limits.idle_seconds]:
            self._drop(visitor)
        while len(self._sessions) > 1 and (
            len(self._sessions) > self.limits.visitors
            or sum(session.memory for session in self._sessions.values()) > self.limits.kept_bytes
        ):
            self._drop(next(iter(self._sessions)))

    def _drop(self, visitor: str) -> None:
        session = self._sessions.pop(visitor, None)
        if session is not None and (session.child.turn.locked() or session.reading.locked()):  # in use: do not wait
            threading.Thread(target=_remove, args=(session,), daemon=True).start()
        elif session is not None:
            _remove(session)

    def _ask(self, visitor: str, session: Session, command: str, arguments: Mapping[str, Any]) -> Any:
        """Have the process with a visitor's model answer something short."""
        try:
            return session.child.ask(command, arguments, seconds=self.limits.answer_seconds)
        except EndedError as error:
            with self._changing:
                if self._sessions.get(visitor) is session:
                    self._drop(visitor)
            raise EndedError(f"{error}. Your pruned model went with it: prune one again") from None

    # --- measuring ---------------------------------------------------------------

    def measure(self, visitor: str, progress: Progress) -> dict[str, Any]:
        """Time the dense and the pruned model in turns; returns the points, doubts, and the whole result."""
        session = self.of(visitor)
        session.latency = self._with_both(visitor, session, "measure", {}, progress)
        return session.latency

    def score(self, visitor: str, progress: Progress) -> dict[str, Any]:
        """Score both on the same held-out sentences, whose labels only the first model on the list knows."""
        session = self.of(visitor)
        if not self._is_own(session.name):
            raise DataError(f"the held-out sentences fit {self.names[0]} only: other models know other labels")
        arguments = {"data": self._labelled_data(), "data_name": self._data_name, "n": self.limits.scored}
        session.evaluation = self._with_both(visitor, session, "score", arguments, progress)
        return session.evaluation

    def _with_both(
        self, visitor: str, session: Session, command: str, arguments: Mapping[str, Any], progress: Progress
    ) -> dict[str, Any]:
        """Run a job on the dense and the pruned model, which is read from its folder."""
        arguments = {**arguments, "folder": str(session.folder)}
        with session.reading:
            child, _, result = self._run_job(visitor, session.name, command, arguments, progress)
        child.end()
        return dict(result)

    def _labelled_data(self) -> str:
        if self.data is None:
            raise DataError("there are no labelled sentences to score on")
        return self.data

    def sweep(
        self,
        visitor: str,
        methods: Sequence[tuple[str, str, bool]],
        sparsities: Sequence[float],
        n: int,
        progress: Progress,
        points: list[dict[str, Any]],
    ) -> None:
        """Prune the first model on the list in several ways, and measure each.

        Args:
            visitor: Whose job it is.
            methods: What is removed, how it is chosen, and whether the rest is repaired.
            sparsities: The sparsities to measure for each method.
            n: How many held-out sentences to score on.
            progress: Called with what is being done.
            points: Gets each point as soon as it is measured, also if an error ends the job.
        """
        root = self.folder / uuid.uuid4().hex
        arguments = {
            "methods": methods,
            "sparsities": sparsities,
            "texts": self.calibration_texts(),
            "data": self._labelled_data(),
            "n": n,
            "root": str(root),
        }
        try:
            child, _, _ = self._run_job(visitor, self.names[0], "sweep", arguments, progress, points)
            child.end()
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def own_model_bytes(self) -> int:
        """Size of the weights' files of the first model on the list."""
        return sum(path.stat().st_size for path in Path(str(self._demo)).glob("*.safetensors"))

    def probabilities(self, visitor: str, texts: Sequence[str]) -> tuple[Session, list[list[float]], list[list[float]]]:
        """The probabilities that both models give to sentences: (sentences, classes) each.

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
        session = self.of(visitor)
        dense, pruned = self._ask(visitor, session, "probabilities", {"texts": texts})
        return session, dense, pruned

    # --- publishing -------------------------------------------------------------------------------------

    def card(self, visitor: str, name: str) -> tuple[str, Path]:
        """Write the card, with what has been measured, beside the checkpoint; returns its text and the folder.

        Raises:
            HfPruneError: If there is no model, or it cannot have this name.
        """
        session = self._to_publish(visitor, name)
        return str(self._ask(visitor, session, "card", _card_arguments(session, name))), session.folder

    def archive(self, visitor: str, name: str) -> Path:
        """Pack the checkpoint with its card into a zip file, which replaces the one before."""
        session = self._to_publish(visitor, name)
        path = _archive_folder(session.folder) / f"{name.rpartition('/')[2]}.zip"
        self._ask(visitor, session, "archive", {"path": str(path), **_card_arguments(session, name)})
        return path

    def push(self, visitor: str, repo: str, token: str, private: bool) -> dict[str, Any]:
        """Upload the checkpoint to the account of a token, from a process that has not run the model.

        Raises:
            HfPruneError: If that fails, or a private repository is asked for and a public one exists.
        """
        session = self._to_publish(visitor, repo)
        with session.reading:
            self.card(visitor, repo)
            child = self._children.start(self.limits.memory_bytes)
            try:
                arguments = {"folder": str(session.folder), "repo": repo, "token": token, "private": private}
                return dict(child.ask("push", arguments, seconds=self.limits.upload_seconds))
            finally:
                child.end()

    def _to_publish(self, visitor: str, name: str) -> Session:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name):
            raise DataError(f"{name[:100]!r} is not a name for a model: expected letters, digits, '-', '_', '.'")
        return self.of(visitor)


def _card_arguments(session: Session, name: str) -> dict[str, Any]:
    latency = None if session.latency is None else session.latency["latency"]
    return {"name": name, "latency": latency, "evaluation": session.evaluation}


def _remove(session: Session) -> None:
    with session.reading, session.child.turn:
        session.child.end()
        shutil.rmtree(session.folder, ignore_errors=True)
        shutil.rmtree(_archive_folder(session.folder), ignore_errors=True)


def _archive_folder(folder: Path) -> Path:
    return folder.parent / f"{folder.name}-zip"
