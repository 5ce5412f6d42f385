"""Fresh processes in milliseconds: forks of one that has imported torch and transformers, and nothing of ours.

For tests that need a process without ``hf_prune`` or without the state of the other tests. A test of what an
interpreter does from its first import on starts one itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[2])
LONGEST = 280  # seconds that a process may take: less than the limit of a test


class ForkServer:
    """A context in which :meth:`run` is ``subprocess.run([sys.executable, "-c", code, ...])`` without the imports.

    What libraries read from the environment while they are imported is what the server has: ``env`` sets it, and
    ``None`` takes a variable out. ``modules`` are imported as well, with all that is in them, for processes
    that need not import them themselves.
    """

    def __init__(self, *modules: str, **env: str | None) -> None:
        settings = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **env}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fresh_process", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={name: value for name, value in settings.items() if value is not None},
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()  # closes its input, which ends it

    def run(
        self, code: str, *arguments: object, cwd: str | Path = ROOT, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``code`` in the folder ``cwd`` with ``sys.argv[1:] == arguments``, and capture both outputs."""
        with tempfile.TemporaryDirectory() as folder:
            argv = ["-c", *map(str, arguments)]
            request = {"code": code, "argv": argv, "cwd": str(cwd), "env": env, "folder": folder}
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            print(json.dumps(request), file=self._server.stdin, flush=True)
            status = int(self._server.stdout.readline())
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(argv, status, out, err)


def _execute(request: dict[str, Any]) -> int:
    """Run the code of a request in this process, as ``python -c`` does, and return its exit code."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(request["folder"], name), os.O_WRONLY | os.O_CREAT), stream)
    signal.alarm(LONGEST)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(request["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        if end.code is not None:
            print(end.code, file=sys.stderr)
        return end.code is not None
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.models.bert import modeling_bert

    assert all((AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, modeling_bert))
    assert "hf_prune" not in sys.modules
    for name in sys.argv[1:]:
        found = importlib.import_module(name)
        for each in pkgutil.walk_packages(getattr(found, "__path__", []), f"{name}."):
            if not each.name.endswith("__main__"):
                importlib.import_module(each.name)
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        if (child := os.fork()) == 0:
            status = 1
            with contextlib.suppress(BaseException):
                status = _execute(json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
