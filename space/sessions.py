"""Visitors, the pruned models that they have, and everything the Space does for them, without its pages.

Models are loaded and run in child processes, see :mod:`children`: each job in a new one, which ends with the job and
which a visitor can cancel. A pruned model stays in its process until its visitor leaves. :class:`limits.Limits` bounds
what anybody may use.
"""

from __future__ import annotations

import functools
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from children import Children, EndedError
from downloads import Downloads
from jobs import Jobs
from limits import Limits
from runner import Progress, Runner
from session import Session, Shelf

from hf_prune import DataError, PruningConfig, load_classification

DEMO = "Demo model (film reviews)"
LISTED = (
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "lxyuan/distilbert-base-multilingual-cased-sentiments-student",
)


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
        downloads = Downloads(folder / "hub", self.limits.downloads) if public else None
        own = None if demo is None else (name, Path(demo))
        self._runner = Runner(children or Children(secrets=not public), self.jobs, self.limits, downloads, own)
        self._shelf = Shelf(self.limits)

    def close(self) -> None:
        """End all jobs and sessions."""
        for visitor in [*self.jobs.visitors(), *self._shelf.visitors()]:
            self.forget(visitor)

    # --- models ---------------------------------------------------------------------------------------

    def check_own_model(self) -> None:
        """Make sure that the first model on the list can be loaded.

        Raises:
            DataError: If it is not a text classifier, too large, or cannot be fetched.
        """
        child, _, _ = self._runner.run("", self.names[0], "check", {}, lambda *_: None)
        child.end()

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
            child, model, shown = self._runner.run(visitor, name, "prune", arguments, progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        session = Session(child, model, folder, config, **shown)
        self._shelf.keep(visitor, session)
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
        return self._shelf.of(visitor)

    def has(self, visitor: str) -> bool:
        """Whether a visitor has a session."""
        return visitor in self._shelf.visitors()

    def forget(self, visitor: str) -> None:
        """End a visitor's job and session."""
        self.jobs.cancel(visitor)
        self._shelf.drop(visitor)

    def drop_idle(self) -> None:
        """Drop sessions that have been idle for too long, and those that there is no memory for."""
        self._shelf.drop_idle()

    def _ask(self, visitor: str, session: Session, command: str, arguments: Mapping[str, Any]) -> Any:
        """Have the process with a visitor's model answer something short."""
        try:
            return session.child.ask(command, arguments, seconds=self.limits.answer_seconds)
        except EndedError as error:
            self._shelf.drop(visitor, session)
            raise EndedError(f"{error}. Your pruned model went with it: prune one again") from None

    # --- measuring ---------------------------------------------------------------

    def measure(self, visitor: str, progress: Progress) -> Session:
        """Measure the dense and the pruned model side by side: how right they are, and how fast.

        Only the first model on the list has labelled sentences that fit it. For others, it is counted on how many
        sentences both give the same answer. What was measured before an error is kept.
        """
        session = self.of(visitor)
        arguments = {
            "folder": str(session.folder),
            "data": self.data if self._is_own(session.name) else None,
            "data_name": self._data_name,
            "n": self.limits.scored,
            "texts": self.sentences,
            "zeros": not session.config.removes_units,
        }
        parts: list[dict[str, Any]] = []
        try:
            with session.reading:
                child, _, _ = self._runner.run(visitor, session.name, "measure", arguments, progress, parts)
            child.end()
        finally:  # also if it was cancelled, or out of time
            session.measured |= {name: value for part in parts for name, value in part.items()}
        return session

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
            child, _, _ = self._runner.run(visitor, self.names[0], "sweep", arguments, progress, points)
            child.end()
        finally:
            shutil.rmtree(root, ignore_errors=True)

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
        return str(self._ask(visitor, session, "card", session.card_arguments(name))), session.folder

    def archive(self, visitor: str, name: str) -> Path:
        """Pack the checkpoint with its card into a zip file, which replaces the one before."""
        session = self._to_publish(visitor, name)
        path = session.archive_folder / f"{name.rpartition('/')[2]}.zip"
        self._ask(visitor, session, "archive", {"path": str(path), **session.card_arguments(name)})
        return path

    def push(self, visitor: str, repo: str, token: str, private: bool) -> dict[str, Any]:
        """Upload the checkpoint to the account of a token, from a process that has not run the model.

        Raises:
            HfPruneError: If that fails, or a private repository is asked for and a public one exists.
        """
        session = self._to_publish(visitor, repo)
        with session.reading:
            self.card(visitor, repo)
            child = self._runner.children.start(self.limits.memory_bytes)
            try:
                arguments = {"folder": str(session.folder), "repo": repo, "token": token, "private": private}
                return dict(child.ask("push", arguments, seconds=self.limits.upload_seconds))
            finally:
                child.end()

    def _to_publish(self, visitor: str, name: str) -> Session:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", name):
            raise DataError(f"{name[:100]!r} is not a name for a model: expected letters, digits, '-', '_', '.'")
        return self.of(visitor)
