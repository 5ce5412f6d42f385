"""How fast models are, beside one another: timed in turns, with what is noise called noise."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_prune.errors import ConfigError
from hf_prune.running import eval_mode
from hf_prune.speed import forward, workload_inputs
from hf_prune.tables import format_table
from hf_prune.timing import Ratio, Timings, quantile, speedup, time_together


@dataclass(frozen=True)
class LatencyPoint:
    """One model on one workload.

    Args:
        model: Its name.
        batch_size: Examples at once.
        length: Tokens of each.
        task: ``"forward"``, or ``"generate"`` with the tokens that are made included.
        median: Seconds by the clock.
        low: Lower quartile.
        high: Upper quartile.
        p95: 95th percentile.
        cpu: Median of the seconds of this process, over all of its threads.
        tokens_per_second: Of all examples together; tokens that are read, or of ``"generate"`` those that are made.
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
    tokens_per_second: float
    against: Ratio | None

    @property
    def verdict(self) -> str:
        """What the difference to the first model is worth."""
        if self.against is None:
            return "-"
        if not self.against.is_real:
            return "within the noise"
        return f"{self.against.value:.2f}x ({self.against.low:.2f} to {self.against.high:.2f})"


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
        points = [
            {**vars(p), "against": None if p.against is None else {**vars(p.against), "is_real": p.against.is_real}}
            for p in self.points
        ]
        return {"format_version": 1, **{**vars(self), "points": points}}

    def __str__(self) -> str:
        rows = [
            [
                p.model,
                p.task,
                f"{p.batch_size} x {p.length}",
                f"{1e3 * p.median:.2f}",
                f"{1e3 * p.low:.2f} to {1e3 * p.high:.2f}",
                f"{1e3 * p.p95:.2f}",
                f"{1e3 * p.cpu:.2f}",
                f"{p.tokens_per_second:,.0f}",
                p.verdict,
            ]
            for p in self.points
        ]
        header = ["model", "task", "batch x tokens", "median ms", "quartiles", "p95", "CPU ms", "tokens/s", "speed-up"]
        lines = [
            format_table(header, rows, left=2),
            f"{self.rounds} rounds in turns, {self.dtype}, {self.device}, {self.threads} thread(s), torch "
            f"{self.torch}. Speed-up: median over the rounds, and its 95 % interval, against {self.points[0].model}.",
        ]
        if noise := sorted({p.model for p in self.points if p.against is not None and not p.against.is_real}):
            lines.append(
                f"Not told apart from {self.points[0].model} on every workload: {', '.join(noise)}. More rounds, or a "
                f"quieter machine, may tell."
            )
        return "\n".join(lines)


def measure_latency(
    models: Mapping[str, nn.Module],
    *,
    batch_sizes: Sequence[int] = (1,),
    lengths: Sequence[int] = (128,),
    rounds: int = 30,
    warmup: int = 3,
    threads: int | None = None,
    new_tokens: int = 0,
) -> LatencyResult:
    """Time models in turns on the same random inputs.

    Args:
        models: Transformers models by name, all of one dtype on one device; the others are compared with the first.
        batch_sizes: Examples at once.
        lengths: Tokens of each; of models of images and sound the config decides.
        rounds: How many timings of each.
        warmup: How many before those.
        threads: Of PyTorch while timing; None leaves them.
        new_tokens: Causal language models: also time the greedy generation of so many.

    Raises:
        ConfigError: If there are no models, they differ in dtype, device or in what they take, or a number is below 1.
        PlanError: If it is not known what a model takes.
    """
    _check(models, batch_sizes, lengths, rounds, threads, new_tokens)
    first = next(iter(models.values()))
    vocabulary = min(models.values(), key=_vocabulary)  # random tokens that all of them have
    points: list[LatencyPoint] = []
    with ExitStack() as context:
        context.enter_context(_threads(threads))
        for model in models.values():
            context.enter_context(eval_mode(model))
        for batch_size, length in itertools.product(batch_sizes, lengths):
            inputs = workload_inputs(vocabulary, {"batch_size": batch_size, "length": length})
            tasks = {"forward": {name: forward(model, inputs) for name, model in models.items()}}
            if new_tokens:
                tasks["generate"] = {name: _generation(model, inputs, new_tokens) for name, model in models.items()}
            for task, runs in tasks.items():
                found = time_together(runs, rounds=rounds, warmup=warmup)
                tokens = batch_size * (length if task == "forward" else new_tokens)
                points += _points(found, batch_size, length, task, tokens)
        parameter = next(first.parameters())
        return LatencyResult(
            points=tuple(points),
            rounds=rounds,
            threads=torch.get_num_threads(),
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            torch=torch.__version__,
        )


def _points(
    found: Mapping[str, Timings], batch_size: int, length: int, task: str, tokens: int
) -> Iterator[LatencyPoint]:
    first = next(iter(found))
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
            tokens_per_second=tokens / median,
            against=None if name == first else speedup(found[first].wall, times.wall),
        )


def _generation(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> Any:
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}

    def run() -> None:
        with torch.inference_mode():
            model.generate(**inputs, **settings)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _check(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    rounds: int,
    threads: int | None,
    new_tokens: int,
) -> None:
    if not models:
        raise ConfigError("there is no model to time: expected at least one")
    for name, values in (("batch_sizes", batch_sizes), ("lengths", lengths), ("rounds", [rounds])):
        if not values or min(values) < 1:
            raise ConfigError(f"{name} is {list(values)}: expected numbers of at least 1")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}: expected at least 1")
    kinds = {}
    for name, model in models.items():
        parameter = next(model.parameters())
        kinds[name] = (str(parameter.dtype), str(parameter.device), getattr(model, "main_input_name", "input_ids"))
    if len(set(kinds.values())) > 1:
        raise ConfigError(
            f"models of different dtypes, devices or inputs are not compared: found {kinds}; load them alike"
        )
    if new_tokens:
        unable = [name for name, m in models.items() if not _generates(m)]
        if unable:
            raise ConfigError(
                f"new_tokens={new_tokens} is for causal language models, which {', '.join(unable)} is not"
            )


def _generates(model: Any) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can and can()) and not model.config.is_encoder_decoder


def _vocabulary(model: Any) -> int:
    return getattr(model.config.get_text_config(), "vocab_size", None) or 0


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
