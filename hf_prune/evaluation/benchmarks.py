"""Score language models by tasks of lm-eval (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.benchmark_result import (
    BenchmarkComparison,
    BenchmarkScores,
    TaskComparison,
    TaskScore,
    is_mean,
)
from hf_prune.evaluation.statistics import check_confidence, standard_error_of, student_t
from hf_prune.planning.checks import check_positive
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.forward import eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> BenchmarkScores:
    """Score a language model by tasks of lm-eval, in memory: ``pip install "hf_prune[lm-eval]"``.

    Most tasks load their data from the Hub. One of your own is a YAML file in ``include_path``, with ``dataset_path:
    json`` and local ``data_files``, and needs no network. A task is multiple choice (the likelihood of given answers)
    or generation; training-free pruning harms the second much earlier than the first, see
    :func:`hf_prune.evaluate_generation`.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups of tasks, such as ``"hellaswag"`` or ``"gsm8k"``.
        include_path: A folder with YAML files of more tasks.
        limit: Use only this many examples of each task, the first ones.
        batch_size: Examples per forward pass.

    Returns:
        Every metric of every task, with its value for each example.

    Raises:
        ConfigError: If lm-eval is not installed, a setting is out of range, or there is no such task or folder.
        DataError: If lm-eval cannot load the data of a task or run the model on it.

    Example:
        >>> print(evaluate_benchmarks(model, tokenizer, ["arc_easy", "gsm8k"], limit=100))  # doctest: +SKIP
        arc_easy: acc 0.5300 ± 0.0502 (n = 100, 0 shots, lm-eval 0.4.13)
        ...
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    check_benchmarks_run(names, include_path)
    check_positive("batch_size", batch_size)
    if limit is not None:
        check_positive("limit", limit)
    warn_regrown(model, "what is scored is not the model that save_pretrained() writes, in which they are zero")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    start = time.perf_counter()
    manager = _task_manager(None if include_path is None else os.fspath(include_path))
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigError(
            f"lm-eval has no task {unknown[0]!r}: expected one that `lm-eval ls tasks` lists, or one in include_path"
        )
    try:
        with eval_mode(model), _random_states_kept():
            found = simple_evaluate(
                # A copy of the tokenizer, since lm-eval gives it a padding token.
                model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
                tasks=names,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise DataError(f"lm-eval cannot run {', '.join(names)}: {type(error).__name__}: {error}") from error
    assert found is not None  # of other processes
    scores, rows = _read(found)
    return BenchmarkScores(
        scores=tuple(scores),
        by_example=tuple(rows),
        version=importlib.metadata.version("lm-eval"),
        limit=limit,
        seconds=time.perf_counter() - start,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch_size=batch_size,
    )


def check_benchmarks_run(tasks: Sequence[str], include_path: str | os.PathLike[str] | None) -> None:
    """Make sure, before a model is loaded, that tasks of lm-eval can be run.

    Raises:
        ConfigError: If lm-eval is not installed, no task is named, or there is no such folder.
    """
    if not tasks or not all(tasks):
        raise ConfigError(f"the tasks of lm-eval are {list(tasks)!r}: expected names, such as arc_easy")
    if include_path is not None and not os.path.isdir(include_path):
        raise ConfigError(f"include_path is {os.fspath(include_path)!r}: expected a folder with YAML files of tasks")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('lm-eval is not installed: pip install "hf_prune[lm-eval]"')


def compare_benchmarks(
    dense: BenchmarkScores, pruned: BenchmarkScores, *, confidence: float = 0.95
) -> BenchmarkComparison:
    """Compare two models on the same examples of the same tasks.

    The interval of a change is paired: from how the difference varies between examples, by Student's t.

    Args:
        dense: Result of the dense model.
        pruned: Result of the pruned model.
        confidence: Of the two-sided intervals, between 0 and 1.

    Raises:
        ConfigError: If ``confidence`` is not between 0 and 1.
        DataError: If the two are of different tasks or examples.

    Example:
        >>> print(compare_benchmarks(dense, pruned))  # doctest: +SKIP
    """
    check_confidence(confidence)
    asked = [[(s.task, s.metric, s.n, s.shots) for s in result.scores] for result in (dense, pruned)]
    if asked[0] != asked[1] or dense.version != pruned.version:
        raise DataError(f"the results are of different tasks ({asked[0]} and {asked[1]}): run both in the same way")
    for one, other in zip(dense.scores, pruned.scores, strict=True):
        if one.data_fingerprint != other.data_fingerprint:
            raise DataError(
                f"the results of {one.task} are on different examples (fingerprints {one.data_fingerprint} and "
                f"{other.data_fingerprint}): run both models on the same data"
            )
    tasks = []
    for one, other, a, b in zip(dense.scores, pruned.scores, dense.by_example, pruned.by_example, strict=True):
        change, interval = other.value - one.value, None
        differences = [y - x for x, y in zip(a, b, strict=True)] if a and b else []
        if (error := standard_error_of(differences, [1] * len(differences))) is not None:
            half = student_t(confidence, len(differences) - 1) * error
            interval = change - half, change + half
        tasks.append(TaskComparison(one.task, one.metric, one.value, other.value, change, interval, one.n))
    return BenchmarkComparison(tuple(tasks), confidence)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """The random states after are those before: lm-eval seeds Python, NumPy and PyTorch, GPUs included."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@functools.lru_cache(maxsize=1)
def _task_manager(include_path: str | None) -> Any:
    """The tasks that lm-eval knows; finding them takes it seconds, and two models are scored on the same ones."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _read(found: Mapping[str, Any]) -> tuple[list[TaskScore], list[tuple[float, ...]]]:
    """The scores in what lm-eval returns, and the values of their examples."""
    scores, rows = [], []
    samples, shots = found["samples"], found.get("n-shot") or {}
    for task, values in found["results"].items():
        for key, value in values.items():
            name, _, filter_ = key.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or not filter_ or name.endswith("_stderr"):
                continue
            own = [sample for sample in samples.get(task, []) if sample.get("filter", filter_) == filter_]
            row = _row(own, name)
            n = len(own) or _examples_of_group(found, task)
            error = values.get(f"{name}_stderr,{filter_}")
            metric = name if filter_ == "none" else f"{name}, {filter_}"
            known = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            scores.append(TaskScore(task, metric, float(value), known, n, int(shots.get(task) or 0), _digest(own)))
            rows.append(row if row and is_mean(float(value), row) else ())
    return scores, rows


def _examples_of_group(found: Mapping[str, Any], group: str) -> int:
    """The number of examples of all tasks in a group."""
    tasks = {group}
    while groups := [name for name in tasks if name not in found["samples"]]:
        inner = {name for group in groups for name in found["group_subtasks"][group]}
        tasks = tasks - {*groups} | inner
    return sum(found["n-samples"][task]["effective"] for task in tasks)


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """A hash of examples, from the hashes that lm-eval gives them; empty if there are none."""
    hashes = [sample["doc_hash"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16] if hashes else ""


def _row(samples: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, ...]:
    """The value of a metric for each example; empty if it is not a number for each."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return tuple(float(sample[metric]) for sample in sorted(samples, key=lambda sample: sample["doc_id"]))
    return ()
