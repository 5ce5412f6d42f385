"""A child process: a visitor's model is loaded, pruned and run here, within limits.

With ``--fork``, it imports everything and then only forks children; see :mod:`children`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import traceback
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import measuring
import models
import tradeoff
import transformers.models.bert.modeling_bert
import transformers.models.distilbert.modeling_distilbert
import transformers.models.roberta.modeling_roberta  # noqa: F401  (what most text classifiers are)
from downloads import fetch_model

from hf_prune import (
    HfPruneError,
    PruningConfig,
    explain_speed,
    listen_to_progress,
    plot_layer_sparsity,
    plot_weight_histogram,
    push_checkpoint,
)
from hf_prune.hub.checksums import checksums, weights_digest
from hf_prune.hub.describe import describe_model
from hf_prune.utils.figures import save_figure

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Send = Callable[[str, Any], None]  # a message of a kind
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Worker:
    """The commands of a child, and the model that it has pruned.

    Args:
        send: Sends the app a message before the result.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._kept: models.PrunedModel | None = None

    def progress(self, title: str, share: float) -> None:
        """Report what is being done, and which share of it is done."""
        self._send("progress", [title, share])

    def _dense(self, model: Mapping[str, Any]) -> models.DenseModel:
        self.progress("Loading the model", 0.0)
        name = model["name"]
        if model["folder"] is not None:
            return models.load_dense(name, Path(model["folder"]), None, model["parameters"])
        cache = None if model["cache"] is None else Path(model["cache"])
        folder = fetch_model(name, model["download_bytes"], model["token"], cache)
        return models.load_dense(name, folder, name, model["parameters"])

    def _pair(self, model: Mapping[str, Any], folder: str) -> tuple[models.DenseModel, models.DenseModel]:
        dense = self._dense(model)
        return dense, models.load_dense(dense.name, Path(folder), None, model["parameters"])

    def check(self, model: Mapping[str, Any]) -> None:
        """Make sure that a model can be loaded."""
        self._dense(model)

    def prune(
        self, model: Mapping[str, Any], config: Mapping[str, Any], texts: list[str], folder: str
    ) -> dict[str, Any]:
        """Prune a copy of a model into a folder, and keep it; returns what is shown of it."""
        dense = self._dense(model)
        pruned = models.prune_copy(dense, PruningConfig.from_dict(config), texts, Path(folder), self.progress)
        self._kept = pruned
        return {
            "facts": pruned.facts(),
            "labels": dense.labels,
            "removed_units": models.count_removed_units(pruned.units),
            "layers": None
            if pruned.structure is None
            else [list(counts) for counts in pruned.structure.layers.values()],
            "histograms": [
                {"edges": part.edges.tolist(), "counts": part.counts.tolist(), "zeros": int(part.zeros)}
                for part in pruned.histograms
            ],
            "units": dict(pruned.units),
            "removed_shares": dict(pruned.removed_shares),
            "reasons": _speed_reasons(pruned.model),
        }

    def probabilities(self, texts: list[str]) -> list[list[list[float]]]:
        """The probabilities that both models give: (models, sentences, classes)."""
        pruned = self._pruned()
        both = (pruned.dense.model, pruned.model)
        return [measuring.probabilities_of(model, pruned.tokenizer, texts).tolist() for model in both]

    def card(self, name: str, latency: dict[str, Any] | None, evaluation: dict[str, Any] | None) -> str:
        """Write the card beside the checkpoint."""
        pruned = self._pruned()
        (pruned.folder / "README.md").unlink(missing_ok=True)
        title = f"{pruned.dense.name}, {pruned.config.criterion}"
        before, after = pruned.histograms
        save_figure(plot_weight_histogram(before, after, title), pruned.folder / "weights.png")
        if pruned.structure is None:
            save_figure(plot_layer_sparsity(pruned.report, title), pruned.folder / "layers.png")
        weights = weights_digest(checksums(pruned.folder))  # what the measurements are of
        if evaluation is not None:
            evaluation = {**evaluation, "weights": weights}
        if latency is not None:
            latency = {**latency, "weights": {point["model"]: weights for point in latency["points"][1:]}}
        return describe_model(
            pruned.model,
            pruned.folder,
            plots=False,
            name=name.rpartition("/")[2],
            config=pruned.config,
            base_model=pruned.dense.base_model,
            evaluation=evaluation,
            latency=latency,
        )

    def archive(self, path: str, **more: Any) -> None:
        """Write the card, and pack the checkpoint into a zip file in a folder of its own, which is emptied before."""
        self.card(**more)
        folder, file = self._pruned().folder, Path(path)
        shutil.rmtree(file.parent, ignore_errors=True)
        file.parent.mkdir()
        with zipfile.ZipFile(file, "w") as packed:  # not deflated: the weights are compressed already
            for part in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
                packed.write(part, part.name)

    def measure(self, model: Mapping[str, Any], folder: str, **settings: Any) -> None:
        """Measure the dense model and the pruned one in a folder, and send a message with each result."""
        for part in measuring.measure_both(*self._pair(model, folder), **settings, progress=self.progress):
            self._send("point", part)

    def sweep(
        self,
        model: Mapping[str, Any],
        methods: list[list[Any]],
        sparsities: list[float],
        texts: list[str],
        data: str,
        n: int,
        root: str,
    ) -> None:
        """Prune a model in several ways, and send a message with each measured point."""
        dense, sentences = self._dense(model), measuring.held_out(data, n)
        chosen = [(what, how, repair) for what, how, repair in methods]
        for point in tradeoff.measure(dense, chosen, sparsities, sentences, texts, Path(root), self.progress):
            self._send("point", point)

    def push(self, folder: str, repo: str, token: str, private: bool) -> dict[str, Any]:
        """Upload a checkpoint."""
        return push_checkpoint(folder, repo, private=private, token=token).to_dict()

    def _pruned(self) -> models.PrunedModel:
        assert self._kept is not None
        return self._kept


def _speed_reasons(model: Any) -> list[str]:
    """What the shapes and the zeros of a model mean for its speed: the lines between its name and the timing."""
    return [line.strip() for line in explain_speed(model).splitlines()[1:-1]]


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests, one per line, until there are no more."""
    settings = json.loads(requests.readline())
    _limit_memory(settings["memory_bytes"])

    def write(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    worker = Worker(lambda kind, value: write({"message": [kind, value]}))
    while line := requests.readline():
        request = json.loads(line)
        try:
            with listen_to_progress(lambda title, done, total: worker.progress(title, done / total if total else 0.0)):
                result = getattr(worker, request["command"])(**request["arguments"])
            write({"result": result, "memory": _private_bytes()})
        except BrokenPipeError:
            return
        except Exception as error:
            if models.is_out_of_memory(error):
                raise  # the heap cannot be trusted any more; the app explains it
            if isinstance(error, HfPruneError):
                write({"error": [type(error).__name__, str(error)]})
            else:
                traceback.print_exc()
                write({"error": ["", type(error).__name__]})


def _limit_memory(most: int) -> None:
    """Let this process allocate at most this much more than it has now, where the system can limit that."""
    if resource is None or not sys.platform.startswith("linux"):
        return
    status = Path("/proc/self/status").read_text(encoding="ascii")
    now = 1024 * int(status.partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (now + most, now + most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out all the same, kill this one first


def _private_bytes() -> int:
    """Bytes that this process shares with no other; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def fork(control: socket.socket) -> None:
    """Fork and kill children as the app asks, until it closes the socket; then kill them all."""
    children: dict[int, int] = {}  # process ids by number: ids are reused
    for number in itertools.count():
        word, files, _, _ = socket.recv_fds(control, 64, 2)
        if not word:
            break
        for ended, pid in list(children.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del children[ended]
        if files:
            pid = os.fork()
            if pid == 0:
                control.close()
                ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
                try:
                    serve(os.fdopen(files[0], "rb"), os.fdopen(files[1], "wb"))
                finally:
                    os._exit(0)
            children[number] = pid
            for file in files:
                os.close(file)
            control.send(b"%d" % number)
        else:
            _end(children.pop(int(word), None))
            control.send(b"ended")
    for pid in children.values():
        _end(pid)


def _end(pid: int | None) -> None:
    if pid is not None:  # not waited for yet, so the id is still that of our child
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the app, which then ends this process
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # libraries that print must not write into the answers
    if "--fork" in sys.argv:
        fork(socket.socket(fileno=requests))
    else:
        serve(os.fdopen(requests, "rb"), os.fdopen(answers, "wb"))
