"""What the benchmarks share: jobs in child processes, results on disk, paired drops, pictures, and memory.

A benchmark is a list of jobs, dicts that JSON can hold. Each job is measured in a process of its own and written to
``OUT/results.jsonl`` at once, so that an interrupted benchmark continues where it was.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]
Result = dict[str, Any]


# --- jobs and results -----------------------------------------------------------------------------------


def classifier_parser(doc: str | None, *, out: str, held_out: int) -> ArgumentParser:
    """A parser with the arguments of all benchmarks that prune a classifier.

    Args:
        doc: The script's docstring.
        out: Default folder for the results.
        held_out: Default number of training sentences that are only scored.
    """
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a classifier")
    parser.add_argument("data", help="folder with train and dev splits, columns sentence and label")
    parser.add_argument("--sentences", type=int, default=512, help="for calibration")
    parser.add_argument("--min-words", type=int, default=15, help="of a calibration sentence")
    parser.add_argument(
        "--held-out", type=int, default=held_out, help="training sentences that are scored and used for nothing else"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for the results")
    parser.add_argument("--table", action="store_true", help="only print what has been measured")
    parser.add_argument("--child", help=SUPPRESS)
    return parser


def is_child(args: Namespace, measure: Callable[[Namespace, Job], Result]) -> bool:
    """In a child process, measure its job and print the result; returns whether this is one."""
    if args.child:
        print(json.dumps(measure(args, json.loads(args.child))))
    return bool(args.child)


def run_child(job: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run this script again for one job; :func:`last_json` of its output is the result.

    Args:
        job: The job.
        **options: Passed to ``subprocess.run``.
    """
    command = [sys.executable, *sys.argv, "--child", json.dumps(job)]
    return subprocess.run(command, text=True, **{"stdout": subprocess.PIPE, **options})


def last_json(output: str) -> Result:
    """The JSON in the last line of an output."""
    result: Result = json.loads(output.splitlines()[-1])
    return result


class Results:
    """Results by job, in a file with one JSON object per line.

    Args:
        folder: Folder of ``results.jsonl``.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._results: dict[str, Result] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            record = json.loads(line)
            result = record.pop("found")
            self._results[_key(record.get("job", record))] = result  # bench_accuracy once wrote the job's fields flat

    def get(self, job: Job) -> Result | None:
        """The result of a job, if it has been measured."""
        return self._results.get(_key(job))

    def measure(self, jobs: Iterable[Job], describe: Callable[[Job, Result], str | None]) -> None:
        """Measure jobs that have no result yet, each in a process of its own.

        Args:
            jobs: The jobs.
            describe: A line to print about a new result; None for none.
        """
        for job in jobs:
            if self.get(job) is not None:
                continue
            result = last_json(run_child(job, check=True).stdout)
            self._results[_key(job)] = result
            with self._path.open("a") as file:
                file.write(json.dumps({"job": job, "found": result}) + "\n")
            if (line := describe(job, result)) is not None:
                print(line, flush=True)

    def where(self, **fields: Any) -> list[Result]:
        """Results of all jobs that have these fields, in the order in which they were measured."""
        jobs = ((json.loads(key), result) for key, result in self._results.items())
        return [result for job, result in jobs if fields.items() <= job.items()]


def _key(job: Job) -> str:
    return json.dumps(job, sort_keys=True)


# --- sentences and drops --------------------------------------------------------------------------------


def split_sentences(sentences: Sequence[str], held_out: int, min_words: int) -> tuple[list[int], list[int]]:
    """Split training rows: some are held out, and calibration draws from the rest.

    Args:
        sentences: All training sentences; short ones are used for neither.
        held_out: How many to hold out.
        min_words: Words that a sentence must have.

    Returns:
        Rows that are held out, and rows for calibration, which share no five words in a row with them.
    """
    import torch

    from hf_prune.evaluation.data.overlap import overlapping

    long = [i for i, text in enumerate(sentences) if len(text.split()) >= min_words]
    order = [long[i] for i in torch.randperm(len(long), generator=torch.Generator().manual_seed(2**31))]
    held, rest = order[:held_out], order[held_out:]
    overlaps = overlapping([sentences[i] for i in rest], [sentences[i] for i in held])
    return held, [i for i, shared in zip(rest, overlaps, strict=True) if not shared]


def without_overlap(sentences: Sequence[str], held: Sequence[int]) -> list[int]:
    """Rows that share no five words in a row with those that are held out."""
    from hf_prune.evaluation.data.overlap import overlapping

    overlaps = overlapping(sentences, [sentences[i] for i in held])
    return [i for i, shared in enumerate(overlaps) if not shared]


def shuffled(rows: Sequence[int], seed: int) -> list[int]:
    """Rows in a random order."""
    import torch

    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def score_splits(model: Any, tokenizer: Any, dev: Any, held_out: Any) -> dict[str, str]:
    """Which sentences of both splits a classifier gets right, as a digit each."""
    from hf_prune import evaluate_classification

    right = {}
    for name, data in (("dev", dev), ("held out", held_out)):
        score = evaluate_classification(model, tokenizer, data)
        right[name] = "".join(str(int(p == y)) for p, y in zip(score.predictions, score.labels, strict=True))
    return right


def accuracy(right: str) -> float:
    """Percent right, of the digits of :func:`score_splits`."""
    return 100 * statistics.mean(map(int, right))


def paired_drop(dense: str, runs: Sequence[str]) -> tuple[float, float]:
    """The mean drop over several runs, in points, with its standard error.

    The error is that of the mean over the sentences of what each lost, averaged over the runs, so it is paired.

    Args:
        dense: What the dense model gets right, as :func:`score_splits` writes it.
        runs: The same for each run, such as one per seed.
    """
    by_sentence = zip(*runs, strict=True)
    lost = [int(d) - statistics.mean(map(int, right)) for d, right in zip(dense, by_sentence, strict=True)]
    return 100 * statistics.mean(lost), 100 * statistics.stdev(lost) / len(lost) ** 0.5


def draw_curves(
    path: Path,
    dense: float,
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    x_label: str,
    y_label: str,
) -> None:
    """Draw accuracies, a line for each method, for light and for dark pages; those named "best" are bold.

    Args:
        path: The picture; the one for dark pages stands beside it.
        dense: Accuracy of the dense model, in percent.
        curves: Points (x, drop, standard error) by method, at most six methods; those with fewer than two points are
            left out.
        x_label: What x is.
        y_label: What the accuracy is of.
    """
    from hf_prune.utils.figures import GREY, MARKERS, PALETTE, figure, save_pair

    lines = {method: sorted(points) for method, points in curves.items() if len(points) > 1}
    drawn, axes = figure(8.0, 4.6)
    axes.axhline(dense, color=GREY, linewidth=1, linestyle=":")
    for (method, points), color, marker in zip(lines.items(), PALETTE, MARKERS, strict=False):
        x, drops, errors = zip(*points, strict=True)
        is_best = method.startswith("best")
        axes.errorbar(
            x,
            [dense - drop for drop in drops],
            errors,
            color=color,
            marker=marker,
            markersize=5,
            linewidth=2.5 if is_best else 1.4,
            capsize=2,
            zorder=3 if is_best else 2,
        )
    ends = {f"dense, {dense:.2f} %": dense, **{name: dense - points[-1][1] for name, points in lines.items()}}
    name_lines(axes, max(points[-1][0] for points in lines.values()), ends)
    axes.set(xlabel=x_label, ylabel=y_label)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_pair(drawn, path)
    print(f"Drawn: {path}")


def name_lines(axes: Any, last: float, ends: Mapping[str, float]) -> None:
    """Write the names of lines at their ends, in their colors, apart from each other; those named "best" are bold.

    Args:
        axes: Where the lines are drawn.
        last: The largest x.
        ends: The last y of each line by its name, the dense model first.
    """
    from hf_prune.utils.figures import GREY, PALETTE, spread_labels

    low, high = axes.get_ylim()
    heights = spread_labels(list(ends.values()), (high - low) / 24)
    for name, color, height in zip(ends, [GREY, *PALETTE], heights, strict=False):
        weight = "bold" if name.startswith("best") else "normal"
        place = {"xy": (last, height), "xytext": (10, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name.partition(":")[0], **place, color=color, fontsize=9, weight=weight, annotation_clip=False)


# --- memory (Linux) -------------------------------------------------------------------------------------


def memory(field: str) -> int:
    """Memory of this process in bytes: resident now (VmRSS), at its peak (VmHWM), or private (VmData)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def start_of_peak() -> int:
    """Let the peak of resident memory start from now, with free memory returned to the system; returns what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")
