"""What runs in a process of its own: a visitor's model is loaded, pruned and asked here, within limits.

With ``--fork``, it imports everything and then only makes copies of itself; see :mod:`children`.
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

import tradeoff
import transformers.models.bert.modeling_bert
import transformers.models.distilbert.modeling_distilbert
import transformers.models.roberta.modeling_roberta  # noqa: F401  (what most text classifiers are)
import work
from fetch import fetch_model

from hf_prune import (
    HfPruneError,
    PruningConfig,
    listen_to_progress,
    plot_layer_sparsity,
    plot_weight_histogram,
    push_checkpoint,
)
from hf_prune.evaluation.explain import speed_reasons
from hf_prune.evaluation.plots import save_figure
from hf_prune.hub.checksums import checksums, weights_digest
from hf_prune.hub.describe import describe_model

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Say = Callable[[str, Any], None]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Desk:
    """What one child does, and the model that it has pruned.

    Args:
        say: Tells the app something on the way.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._pruned: work.Pruned | None = None

    def tell(self, title: str, share: float) -> None:
        """Say how far it is."""
        self._say("progress", [title, share])

    def _dense(self, model: Mapping[str, Any]) -> work.Dense:
        self.tell("Loading the model", 0.0)
        name, own = model["name"], model["folder"]
        folder = Path(own) if own else fetch_model(name, model["download_bytes"], model["token"], _path(model["cache"]))
        return work.load_dense(name, folder, None if own else name, model["parameters"])

    def _pair(self, model: Mapping[str, Any], folder: str) -> tuple[work.Dense, work.Dense]:
        dense = self._dense(model)
        return dense, work.load_dense(dense.name, Path(folder), None, model["parameters"])

    def check(self, model: Mapping[str, Any]) -> None:
        """See that a model can be loaded."""
        self._dense(model)

    def prune(
        self, model: Mapping[str, Any], config: Mapping[str, Any], texts: list[str], folder: str
    ) -> dict[str, Any]:
        """Prune a copy of a model into a folder, and keep it; what is shown of it."""
        dense = self._dense(model)
        pruned = work.make_pruned(dense, PruningConfig.from_dict(config), texts, Path(folder), self.tell)
        self._pruned = pruned
        return {
            "facts": pruned.facts(),
            "labels": dense.labels,
            "parts": work.removed_parts(pruned.units),
            "layers": None if pruned.structure is None else [list(each) for each in pruned.structure.layers.values()],
            "histograms": [
                {"edges": each.edges.tolist(), "counts": each.counts.tolist(), "zeros": int(each.zeros)}
                for each in pruned.histograms
            ],
            "units": dict(pruned.units),
            "gone": dict(pruned.gone),
            "reasons": [line.strip() for line in speed_reasons(pruned.model)],
        }

    def ask(self, texts: list[str]) -> list[list[list[float]]]:
        """The probabilities that both models give: (models, sentences, classes)."""
        pruned = self._kept()
        both = (pruned.dense.model, pruned.model)
        return [work.probabilities_of(model, pruned.dense.tokenizer, texts).tolist() for model in both]

    def card(self, name: str, latency: dict[str, Any] | None, evaluation: dict[str, Any] | None) -> str:
        """Write the card beside the checkpoint."""
        pruned = self._kept()
        (pruned.folder / "README.md").unlink(missing_ok=True)
        title = f"{pruned.dense.name}, {pruned.config.criterion}"
        before, after = pruned.histograms
        save_figure(plot_weight_histogram(before, after, title), pruned.folder / "weights.png")
        if pruned.structure is None:
            save_figure(plot_layer_sparsity(pruned.report, title), pruned.folder / "layers.png")
        weights = weights_digest(checksums(pruned.folder))  # what was measured here is of these
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
        """Write the card, and all of it into a zip file, in a folder made for that; the one before goes."""
        self.card(**more)
        folder, file = self._kept().folder, Path(path)
        shutil.rmtree(file.parent, ignore_errors=True)
        file.parent.mkdir()
        with zipfile.ZipFile(file, "w") as packed:  # the weights are packed already
            for each in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
                packed.write(each, each.name)

    def measure(self, model: Mapping[str, Any], folder: str) -> dict[str, Any]:
        """Time a dense model and the pruned one in a folder in turns."""
        dense, pruned = self._pair(model, folder)
        self.tell("Timing both in turns", 0.3)
        result = work.time_both(dense.model, pruned.model)
        shown = [
            {"model": p.model, "median": p.median, "low": p.low, "high": p.high, "verdict": p.verdict}
            for p in result.points
        ]
        return {"latency": result.to_dict(), "points": shown, "doubts": result.doubts()}

    def score(self, model: Mapping[str, Any], folder: str, data: str, data_name: str, n: int) -> dict[str, Any]:
        """Score both on the same held-out sentences."""
        both, sentences = self._pair(model, folder), work.held_out(data, n)
        return work.scores(*(work.score(each, sentences, data_name) for each in both))

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
        """Measure points of a model, and say each."""
        dense, sentences = self._dense(model), work.held_out(data, n)
        chosen = [(what, how, repair) for what, how, repair in methods]
        for point in tradeoff.measure(dense, chosen, sparsities, sentences, texts, Path(root), self.tell):
            self._say("point", point)

    def push(self, folder: str, repo: str, token: str, private: bool) -> dict[str, Any]:
        """Upload a checkpoint."""
        return push_checkpoint(folder, repo, private=private, token=token).to_dict()

    def _kept(self) -> work.Pruned:
        assert self._pruned is not None
        return self._pruned


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Do what is asked, line by line, until nobody asks any more."""
    settings = json.loads(requests.readline())
    _limit_memory(settings["memory_bytes"])

    def write(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    desk = Desk(lambda kind, value: write({"said": [kind, value]}))
    while line := requests.readline():
        request = json.loads(line)
        try:
            with listen_to_progress(lambda title, done, total: desk.tell(title, done / total if total else 0.0)):
                done = getattr(desk, request["do"])(**request["with"])
            write({"done": done, "memory": _private_bytes()})
        except BrokenPipeError:
            return
        except Exception as error:
            if work.is_out_of_memory(error):
                raise  # what is left of the heap is good for nothing; the app says it in words
            if isinstance(error, HfPruneError):
                write({"error": [type(error).__name__, str(error)]})
            else:
                traceback.print_exc()
                write({"error": ["", type(error).__name__]})


def _limit_memory(most: int) -> None:
    """Let this process have so much more than it has now; where the system can do that."""
    if resource is None or not sys.platform.startswith("linux"):
        return
    status = Path("/proc/self/status").read_text(encoding="ascii")
    now = 1024 * int(status.partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (now + most, now + most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short all the same, this one goes first


def _private_bytes() -> int:
    """Memory that this process shares with no other; 0 where nobody tells."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def fork(control: socket.socket) -> None:
    """Make copies of this process that serve, and end them, until the app is gone; then end them all."""
    children: dict[int, int] = {}  # process ids by number: those are given again
    for number in itertools.count():
        word, files, _, _ = socket.recv_fds(control, 64, 2)
        if not word:
            break
        for each, pid in list(children.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del children[each]
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
    if pid is not None:  # and so still ours: it was not waited for
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the app's, which then ends this
    given, taken = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print is no answer
    if "--fork" in sys.argv:
        fork(socket.socket(fileno=given))
    else:
        serve(os.fdopen(given, "rb"), os.fdopen(taken, "wb"))
