"""Processes in which models of strangers are loaded and run: limited in memory and time, and ended at a word.

On Linux they are forked from one that has imported everything, so that a visitor waits for none of it; elsewhere one is
kept ready. What goes between them and the app are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import hf_prune.errors
from hf_prune import ConfigError, HfPruneError

_PROGRAM = [sys.executable, str(Path(__file__).parent / "child.py")]
_LONGEST_LINE = 64_000_000  # of what a child says
_PATIENCE = 5.0  # seconds that somebody waits for their turn: nobody keeps many waiting
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
FORKS = sys.platform == "linux"


class EndedError(HfPruneError):
    """A child was ended, or ended by itself."""


class Child:
    """One process.

    Args:
        requests: What it reads.
        answers: What it writes.
        kill: Ends it.
        memory_bytes: What it may use.
    """

    def __init__(self, requests: IO[bytes], answers: IO[bytes], kill: Callable[[], None], memory_bytes: int) -> None:
        self.memory = 0  # bytes that it has for itself, as of its last answer
        self.turn = threading.Lock()  # held by who asks it something
        self._requests, self._answers, self._kill = requests, answers, kill
        self._limit, self._ended = memory_bytes, False
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._write({"memory_bytes": memory_bytes})

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError, RecursionError), self._answers:
            while (line := self._answers.readline(_LONGEST_LINE)).endswith(b"\n"):
                self._said.put(json.loads(line))
        self._said.put(None)

    def _write(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone, which is seen when it is listened to
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()

    def ask(
        self,
        what: str,
        given: Mapping[str, Any],
        *,
        seconds: float,
        stopped: threading.Event | None = None,
        hear: Callable[[str, Any], object] | None = None,
    ) -> Any:
        """Have it do something.

        Args:
            what: Which of the functions of ``child.py``.
            given: Its arguments.
            seconds: How long it may take; then the process ends.
            stopped: Ends the process once it is set.
            hear: Gets what the child says before it is done: of which kind, and what.

        Raises:
            ConfigError: If it is busy with something else.
            HfPruneError: What the function raised.
            EndedError: If the process ended: it was stopped, took too long, or needed too much memory.
            RuntimeError: If something went wrong in the child that nobody foresaw.
        """
        if not self.turn.acquire(timeout=_PATIENCE):
            raise ConfigError("something of yours is still running: wait for it")
        try:
            if self._ended:
                raise EndedError("this was stopped with what you had running before")
            self._write({"do": what, "with": dict(given)})
            answer = self._answer(seconds, stopped, hear)
        except BaseException:
            self.end()  # what it would still say belongs to nobody
            raise
        finally:
            self.turn.release()
        if "error" in answer:
            name, text = answer["error"]
            kind = getattr(hf_prune.errors, name, None)
            raise kind(text) if name and kind is not None else RuntimeError(text)
        self.memory = answer["memory"]
        return answer["done"]

    def _answer(
        self, seconds: float, stopped: threading.Event | None, hear: Callable[[str, Any], object] | None
    ) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            if stopped is not None and stopped.is_set():
                raise EndedError("cancelled; nothing has changed")
            if (left := end - time.monotonic()) <= 0:
                raise EndedError(
                    f"this took longer than the {seconds:.0f} seconds that one visitor may use, and was stopped; "
                    f"nothing has changed. Choose another criterion or a smaller model"
                )
            try:
                message = self._said.get(timeout=min(0.05, left))
            except queue.Empty:
                continue
            if message is None:
                raise EndedError(
                    f"this was stopped: most likely it needs more than the {self._limit / 1e9:.1f} GB of memory that "
                    f"one visitor may use; choose a smaller model"
                )
            if "said" not in message:
                return message
            if hear is not None:
                hear(*message["said"])

    def end(self) -> None:
        """Kill it, at once."""
        if self._ended:
            return
        self._ended = True
        self._kill()
        with contextlib.suppress(OSError, ValueError):
            self._requests.close()


class Children:
    """Starts them.

    Args:
        secrets: Whether they may know the tokens of this machine.
    """

    def __init__(self, *, secrets: bool) -> None:
        self._environment = {k: v for k, v in os.environ.items() if secrets or not _SECRET.search(k)}
        own = [str(Path(hf_prune.__file__).parents[1]), os.environ.get("PYTHONPATH")]  # the same hf_prune as here
        self._environment["RUST_BACKTRACE"] = "0"  # of tokenizers that ran out of memory
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, own))
        self._lock = threading.Lock()
        self._control: socket.socket | None = None  # where forking is asked for
        self._ready: subprocess.Popen[Any] | None = None  # what forks, or is the next one itself
        self.prepare()

    def prepare(self) -> None:
        """Have one import everything, meanwhile."""
        with self._lock:
            if FORKS and self._control is None:
                self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    self._ready = self._popen("--fork", stdin=theirs)
            elif not FORKS and self._ready is None:
                self._ready = self._popen(stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, memory_bytes: int) -> Child:
        """A new one, which may use so much memory."""
        if FORKS:
            try:
                return self._forked(memory_bytes)
            except OSError:  # what forks them is gone: another one
                self.close()
                self.prepare()
                return self._forked(memory_bytes)
        self.prepare()
        with self._lock:
            process, self._ready = self._ready, None
        self.prepare()
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        return Child(process.stdin, process.stdout, lambda: _kill(process), memory_bytes)

    def close(self) -> None:
        """End them all."""
        with self._lock:
            control, self._control = self._control, None
            process, self._ready = self._ready, None
            if control is not None:
                control.close()  # it then ends what it forked, and itself
            if process is not None:
                with process:  # waits for it
                    if control is None:
                        process.kill()

    def _popen(self, *words: str, **streams: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen([*_PROGRAM, *words], env=self._environment, **({"stdout": 2} | streams))

    def _forked(self, memory_bytes: int) -> Child:
        (theirs, requests), (answers, ours) = os.pipe(), os.pipe()
        control = self._control
        try:
            number = self._command(control, b"start", [theirs, ours])
        except OSError:
            os.close(requests)
            os.close(answers)
            raise
        finally:
            os.close(theirs)
            os.close(ours)

        def kill() -> None:
            with contextlib.suppress(OSError):  # with what forked it, it went itself
                self._command(control, number, [])

        return Child(os.fdopen(requests, "wb"), os.fdopen(answers, "rb"), kill, memory_bytes)

    def _command(self, control: socket.socket | None, word: bytes, files: list[int]) -> bytes:
        with self._lock:
            if control is None or control is not self._control:
                raise OSError("there is nothing that forks")
            socket.send_fds(control, [word], files)
            if not (answer := control.recv(64)):
                raise OSError("what forks has ended")
            return answer


def _kill(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
