"""Jobs on models: each in a new process, within limits, which its visitor can cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from children import Child, Children
from downloads import Downloads, check_name
from jobs import Jobs
from limits import Limits

Progress = Callable[[str, float], object]  # what is being done, and which share of it is done


class Runner:
    """Runs jobs.

    Args:
        children: Starts the processes.
        jobs: Who has something running.
        limits: What visitors may ask for.
        downloads: Where models of the Hub are kept; None for the cache of this machine, which is read with its token.
        own: Name and folder of the first model on the list; None if there is none.
    """

    def __init__(
        self,
        children: Children,
        jobs: Jobs,
        limits: Limits,
        downloads: Downloads | None,
        own: tuple[str, Path] | None,
    ) -> None:
        self.children, self._jobs, self.limits, self._downloads = children, jobs, limits, downloads
        self._own_name, self._own = own or (None, None)

    def run(
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

        with self._jobs.run(visitor) as cancelled, self.source(name) as model:
            child = self.children.start(self.limits.memory_bytes)
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

    @contextmanager
    def source(self, name: str) -> Iterator[dict[str, Any]]:
        """How a process gets a model, whose files stay for as long as it needs them."""
        source = {
            "name": name,
            "folder": None,
            "download_bytes": self.limits.download_bytes,
            "token": None if self._downloads is None else False,
            "cache": None,
            "parameters": self.limits.parameters,
        }
        if name == self._own_name:
            yield {**source, "folder": str(self._own)}
            return
        check_name(name)
        if self._downloads is None:
            yield source
            return
        with self._downloads.reading(name):
            yield {**source, "cache": str(self._downloads.cache)}
