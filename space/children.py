"""Child processes in which strangers' models are loaded and run, limited in memory and time.

On Linux they are forked from a process that has imported everything, so that visitors do not wait for imports;
elsewhere one process is kept ready. The app and its children exchange lines of JSON.
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

import hf_prune
from hf_prune import ConfigError, HfPruneError

_PROGRAM = [sys.executable, str(Path(__file__).parent / "child.py")]
_LONGEST_LINE = 64_000_000  # bytes of a message from a child
_PATIENCE = 5.0  # seconds to wait for a busy child: nobody keeps many requests waiting
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
FORKS = sys.platform == "linux"


class EndedError(HfPruneError):
    """A child process has ended."""


class Child:
    """One child process, as the app sees it.

    Args:
        requests: The pipe that it reads.
        answers: The pipe that it writes.
        kill: Kills it.
        memory_bytes: How much memory it may use.
    """

    def __init__(self, requests: IO[bytes], answers: IO[bytes], kill: Callable[[], None], memory_bytes: int) -> None:
        self.memory = 0  # bytes that it shares with no other process, as of its last answer
        self.turn = threading.Lock()  # held while it works on a request
        self._requests, self._answers, self._kill = requests, answers, kill
        self._limit, self._ended = memory_bytes, False
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._write({"memory_bytes": memory_bytes})

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError, RecursionError), self._answers:
            while (line := self._answers.readline(_LONGEST_LINE)).endswith(b"\n"):
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _write(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has ended, which _answer reports
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()

    def ask(
        self,
        command: str,
        arguments: Mapping[str, Any],
        *,
        seconds: float,
        cancelled: threading.Event | None = None,
        on_message: Callable[[str, Any], object] | None = None,
    ) -> Any:
        """Run a command in the child, and wait for its result.

        Args:
            command: A method of ``child.Worker``.
            arguments: Its arguments.
            seconds: How long it may take; then the process is killed.
            cancelled: The process is killed when this is set.
            on_message: Gets the kind and value of each message before the result.

        Raises:
            ConfigError: If it is busy with something else.
            HfPruneError: What the command raised.
            EndedError: If the process ended: it was cancelled, took too long, or ran out of memory.
            RuntimeError: If the command failed unexpectedly.
        """
        if not self.turn.acquire(timeout=_PATIENCE):
            raise ConfigError("something of yours is still running: wait for it")
        try:
            if self._ended:
                raise EndedError("this was stopped with what you had running before")
            self._write({"command": command, "arguments": dict(arguments)})
            answer = self._answer(seconds, cancelled, on_message)
        except BaseException:
            self.end()  # nobody will read the rest of its messages
            raise
        finally:
            self.turn.release()
        if "error" in answer:
            name, text = answer["error"]
            kind = getattr(hf_prune, name, None) if name.endswith("Error") else None
            raise kind(text) if kind is not None else RuntimeError(text)
        self.memory = answer["memory"]
        return answer["result"]

    def _answer(
        self,
        seconds: float,
        cancelled: threading.Event | None,
        on_message: Callable[[str, Any], object] | None,
    ) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            if cancelled is not None and cancelled.is_set():
                raise EndedError("cancelled; nothing has changed")
            if (remaining := end - time.monotonic()) <= 0:
                raise EndedError(
                    f"this took longer than the {seconds:.0f} seconds that one visitor may use, and was stopped; "
                    f"nothing has changed. Choose another criterion or a smaller model"
                )
            try:
                message = self._messages.get(timeout=min(0.05, remaining))
            except queue.Empty:
                continue
            if message is None:
                raise EndedError(
                    f"this was stopped: most likely it needs more than the {self._limit / 1e9:.1f} GB of memory that "
                    f"one visitor may use; choose a smaller model"
                )
            if "message" not in message:
                return message
            if on_message is not None:
                on_message(*message["message"])

    def end(self) -> None:
        """Kill it, at once."""
        if self._ended:
            return
        self._ended = True
        self._kill()
        with contextlib.suppress(OSError, ValueError):
            self._requests.close()


class Children:
    """Starts child processes.

    Args:
        secrets: Whether they get the tokens in this machine's environment.
    """

    def __init__(self, *, secrets: bool) -> None:
        self._environment = {k: v for k, v in os.environ.items() if secrets or not _SECRET.search(k)}
        python_path = [
            str(Path(hf_prune.__file__).parents[1]),
            os.environ.get("PYTHONPATH"),
        ]  # the same hf_prune as here
        self._environment["RUST_BACKTRACE"] = "0"  # for tokenizers that run out of memory
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, python_path))
        self._lock = threading.Lock()
        self._control: socket.socket | None = None  # takes requests to fork
        self._ready: subprocess.Popen[Any] | None = None  # the process that forks, or the next child itself
        self.prepare()

    def prepare(self) -> None:
        """Let a process import everything in the background."""
        with self._lock:
            if FORKS and self._control is None:
                self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    self._ready = self._popen("--fork", stdin=theirs)
            elif not FORKS and self._ready is None:
                self._ready = self._popen(stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, memory_bytes: int) -> Child:
        """Start a child that may use this much memory."""
        if FORKS:
            try:
                return self._forked(memory_bytes)
            except OSError:  # the process that forks has ended: start another one
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
        """End all children."""
        with self._lock:
            control, self._control = self._control, None
            process, self._ready = self._ready, None
            if control is not None:
                control.close()  # it then kills what it forked, and ends
            if process is not None:
                with process:  # waits for its end
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
            with contextlib.suppress(OSError):  # it ended with the process that had forked it
                self._command(control, number, [])

        return Child(os.fdopen(requests, "wb"), os.fdopen(answers, "rb"), kill, memory_bytes)

    def _command(self, control: socket.socket | None, word: bytes, files: list[int]) -> bytes:
        with self._lock:
            if control is None or control is not self._control:
                raise OSError("no process that forks is running")
            socket.send_fds(control, [word], files)
            if not (answer := control.recv(64)):
                raise OSError("the process that forks has ended")
            return answer


def _kill(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
