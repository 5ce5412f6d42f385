"""How fast models are, beside one another: timed in turns, with what is noise called noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_prune.errors import ConfigError
from hf_prune.export import ExportedModel
from hf_prune.latency_inputs import check_generation, check_runs, device, dtypes, find_workloads
from hf_prune.masking import warn_regrown
from hf_prune.running import eval_mode
from hf_prune.speed import forward
from hf_prune.tables import format_table
from hf_prune.timing import Ratio, Timings, quantile, speedup, time_together
from hf_prune.wrapping import check_is_model


@dataclass(frozen=True)
class LatencyPoint:
    """One model on one workload.

    Args:
        model: Its name.
        batch_size: Examples at once.
        length: Tokens of each; 0 for images and sound, which have none.
        task: ``"forward"``, or ``"generate"`` with the tokens that are made included.
        median: Seconds by the clock.
        low: Lower quartile.
        high: Upper quartile.
        p95: 95th percentile.
        cpu: Median of the seconds of this process, over all of its threads.
        tokens_per_second: Of all examples together; tokens that are read, or of ``"generate"`` those that are made;
            None where there are no tokens.
        against: How many times as fast as the first model; None for that one.
    """

    model: str
    batch_size: int
    length: int
    task: str
    median: float
    low: float
    high: float
    p95: float
    cpu: float
    tokens_per_second: float | None
    against: Ratio | None

    @property
    def workload(self) -> str:
        """What was run, such as ``"forward, 1 x 128 tokens"``."""
        size = f"{self.batch_size} x {self.length} tokens" if self.length else f"batch of {self.batch_size}"
        return f"{self.task}, {size}"

    @property
    def verdict(self) -> str:
        """What the difference to the first model is worth."""
        if self.against is None:
            return "-"
        if math.isinf(self.against.high):
            return "too few rounds"
        return _ratio(self.against) if self.against.is_real else "within the noise"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an end that an interval of too few rounds does not have is None."""
        if self.against is None:
            return dict(vars(self))
        high = None if math.isinf(self.against.high) else self.against.high
        return {**vars(self), "against": {**vars(self.against), "high": high, "is_real": self.against.is_real}}


@dataclass(frozen=True)
class LatencyResult:
    """Models timed in turns. ``print(result)`` shows them as a table.

    Args:
        points: One for each model and workload.
        rounds: How many rounds were timed.
        threads: Of PyTorch.
        dtype: Of the weights.
        device: Of the models.
        torch: Its version.
    """

    points: tuple[LatencyPoint, ...]
    rounds: int
    threads: int
    dtype: str
    device: str
    torch: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"format_version": 1, **vars(self), "points": [p.to_dict() for p in self.points]}

    def doubts(self) -> list[str]:
        """A sentence for each model that was not told apart from the first one, with the workloads and the numbers."""
        found: dict[str, list[str]] = {}
        for p in self.points:
            if p.against is not None and math.isinf(p.against.high):
                found.setdefault(p.model, []).append(f"{p.workload} (too few rounds for an interval, which takes six)")
            elif p.against is not None and not p.against.is_real:
                found.setdefault(p.model, []).append(f"{p.workload} ({_ratio(p.against)}, within the noise)")
        return [
            f"{model} and {self.points[0].model} are not told apart at {'; '.join(where)}."
            for model, where in found.items()
        ]

    def __str__(self) -> str:
        rows = [
            [
                p.model,
                p.task,
                f"{p.batch_size} x {p.length}" if p.length else str(p.batch_size),
                f"{1e3 * p.median:.2f}",
                f"{1e3 * p.low:.2f} to {1e3 * p.high:.2f}",
                f"{1e3 * p.p95:.2f}",
                f"{1e3 * p.cpu:.2f}",
                "-" if p.tokens_per_second is None else f"{p.tokens_per_second:,.0f}",
                p.verdict,
            ]
            for p in self.points
        ]
        header = ["model", "task", "batch x tokens", "median ms", "quartiles", "p95", "CPU ms", "tokens/s", "speed-up"]
        setting = (
            f"{self.rounds} rounds in turns, {self.dtype}, {self.device}, {self.threads} thread(s), torch {self.torch}."
        )
        if any(p.against is not None for p in self.points):
            setting += f" Speed-up: median over the rounds, and its 95 % interval, against {self.points[0].model}."
        lines = [format_table(header, rows, left=2), setting]
        if doubts := self.doubts():
            lines += [*doubts, "More rounds, or a quieter machine, may tell."]
        return "\n".join(lines)


def measure_latency(
    models: Mapping[str, nn.Module | ExportedModel],
    inputs: Mapping[str, Any] | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    lengths: Sequence[int] = (128,),
    rounds: int = 30,
    warmup: int = 3,
    threads: int | None = None,
    new_tokens: int = 0,
) -> LatencyResult:
    """Time models in turns on the same inputs.

    Each round runs every model once, in an order drawn anew, and what is compared are the times within a round: what
    else the machine does hits all alike. A difference counts if the interval of the median ratio, that of the sign
    test, excludes 1.

    Args:
        models: Models by name, all of one dtype on one device; the others are compared with the first. Exported models
            may be among the others.
        inputs: Keyword arguments of a forward pass, in place of ``batch_sizes`` and ``lengths``. None makes them up
            from the configs of transformers models: random tokens that all of them know, random pixels or sound.
        batch_sizes: Examples at once.
        lengths: Tokens of each; of models of images and sound the config decides.
        rounds: How many timings of each.
        warmup: How many before those.
        threads: Of PyTorch while timing; None leaves them.
        new_tokens: Causal language models: also time the greedy generation of so many.

    Raises:
        ConfigError: If there are no models, they differ in dtype, device or in what they take, or a number is too small
            or too large for them.
        PlanError: If it is not known what a model takes, or it does not run on that.

    Example:
        >>> print(measure_latency({"dense": dense, "pruned": pruned}, batch_sizes=[1, 32]))  # doctest: +SKIP
    """
    native = {name: model for name, model in models.items() if not isinstance(model, ExportedModel)}
    for model in native.values():
        check_is_model(model)
    _check(models, batch_sizes, lengths, rounds, warmup, threads, new_tokens)
    _check_exported(models, next(iter(native.values())))
    workloads = find_workloads(native, inputs, batch_sizes, lengths)
    check_generation(native, workloads, new_tokens)
    for model in native.values():
        warn_regrown(model, "what is timed is not the model that save_pretrained() writes, in which they are zero")
    points: list[LatencyPoint] = []
    with ExitStack() as context:
        context.enter_context(_threads(threads))
        for model in native.values():
            context.enter_context(eval_mode(model))
        for workload in workloads:
            check_runs(native, workload)
            tasks = {"forward": {name: _forward(model, workload.inputs) for name, model in models.items()}}
            if new_tokens:
                tasks["generate"] = {
                    name: _generation(model, workload.inputs, new_tokens) for name, model in native.items()
                }
            for task, runs in tasks.items():
                found = time_together(runs, rounds=rounds, warmup=warmup)
                points += _points(found, workload.batch_size, workload.length, task, new_tokens)
        first = next(iter(native.values()))
        return LatencyResult(
            points=tuple(points),
            rounds=rounds,
            threads=torch.get_num_threads(),
            dtype=dtypes(first),
            device=device(first),
            torch=torch.__version__,
        )


def _points(
    found: Mapping[str, Timings], batch_size: int, length: int, task: str, new_tokens: int
) -> Iterator[LatencyPoint]:
    first = next(iter(found))
    tokens = batch_size * (length if task == "forward" else new_tokens)
    for name, times in found.items():
        median = statistics.median(times.wall)
        yield LatencyPoint(
            model=name,
            batch_size=batch_size,
            length=length,
            task=task,
            median=median,
            low=quantile(times.wall, 0.25),
            high=quantile(times.wall, 0.75),
            p95=quantile(times.wall, 0.95),
            cpu=statistics.median(times.cpu),
            tokens_per_second=tokens / median if tokens else None,
            against=None if name == first else speedup(found[first].wall, times.wall),
        )


def _forward(model: nn.Module | ExportedModel, inputs: Mapping[str, Any]) -> Callable[[], object]:
    return forward(model, inputs) if isinstance(model, nn.Module) else partial(model, **inputs)


def _generation(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> Any:
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}

    def run() -> None:
        with torch.inference_mode():
            model.generate(**inputs, **settings)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _check(
    models: Mapping[str, nn.Module | ExportedModel],
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    rounds: int,
    warmup: int,
    threads: int | None,
    new_tokens: int,
) -> None:
    if not models:
        raise ConfigError("there is no model to time: expected at least one")
    if not isinstance(next(iter(models.values())), nn.Module):
        raise ConfigError(
            "the first model is an exported one, which does not say what it takes: name a checkpoint first"
        )
    for name, values in (("batch_sizes", batch_sizes), ("lengths", lengths), ("rounds", [rounds])):
        if not values or min(values) < 1:
            raise ConfigError(f"{name} is {list(values)}: expected numbers of at least 1")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}: expected at least 1")
    for name, number in (("warmup", warmup), ("new_tokens", new_tokens)):
        if number < 0:
            raise ConfigError(f"{name} is {number}: expected at least 0")


def _check_exported(models: Mapping[str, nn.Module | ExportedModel], first: nn.Module) -> None:
    """Exported models are in float32 on the CPU: nothing else is compared with them."""
    exported = [name for name, model in models.items() if not isinstance(model, nn.Module)]
    if exported and (dtypes(first), device(first)) != ("float32", "cpu"):
        raise ConfigError(
            f"{', '.join(exported)} is exported, in float32 on the CPU, and the others are in {dtypes(first)} on "
            f"{device(first)}, which is not compared: expected float32 on the CPU for all"
        )


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
