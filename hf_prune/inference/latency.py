"""Compare the speed of models: timed in turns, with a test of whether a difference is more than noise."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_prune.errors import ConfigError
from hf_prune.inference.backends import ExportedModel
from hf_prune.inference.latency_result import LatencyPoint, LatencyResult
from hf_prune.inference.speedup import forward
from hf_prune.inference.subnormals import subnormal_layer, subnormal_note
from hf_prune.inference.timing import Timings, quantile, speedup, time_together
from hf_prune.inference.workloads import check_generation, check_runs, device, dtypes, find_workloads
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.forward import eval_mode
from hf_prune.utils.notices import warn_user
from hf_prune.utils.wrapping import check_is_model


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

    Each round runs every model once, in a new random order, and times are compared within a round: whatever else the
    machine does affects all models alike. A difference counts if the interval of the median ratio, by the sign test,
    excludes 1.

    Args:
        models: Models by name, all of one dtype on one device; the others are compared with the first. Exported models
            may be among the others.
        inputs: Keyword arguments of a forward pass, in place of ``batch_sizes`` and ``lengths``. None makes inputs from
            the configs of transformers models: random tokens that all of them know, random pixels or sound.
        batch_sizes: Numbers of examples in a batch.
        lengths: Tokens of each example; for images and sound the config decides.
        rounds: How many timings of each model.
        warmup: How many runs before the first timing.
        threads: PyTorch threads while timing; None leaves the number as it is.
        new_tokens: For causal language models: also time the greedy generation of so many tokens; of exported ones, by
            those with a key-value cache.

    Raises:
        ConfigError: If there are no models, they differ in dtype, device or inputs, or a number is too small or too
            large for them.
        PlanError: If the inputs of a model are unknown, or it does not run on them.

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
        for number, workload in enumerate(workloads):
            check_runs(native, workload)
            if number == 0:
                _warn_of_subnormals(native, workload.inputs)
            tasks = {"forward": {name: _forward(model, workload.inputs) for name, model in models.items()}}
            if new_tokens:
                tasks["generate"] = {
                    name: _generation(model, workload.inputs, new_tokens)
                    for name, model in models.items()
                    if isinstance(model, nn.Module) or model.has_cache
                }
            for task, runs in tasks.items():
                timings = time_together(runs, rounds=rounds, warmup=warmup)
                points += _points(timings, workload.batch_size, workload.length, task, new_tokens)
        first = next(iter(native.values()))
        return LatencyResult(
            points=tuple(points),
            rounds=rounds,
            threads=torch.get_num_threads(),
            dtype=dtypes(first),
            device=device(first),
            torch=torch.__version__,
        )


def _warn_of_subnormals(models: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> None:
    for name, model in models.items():
        if (layer := subnormal_layer(model, inputs)) is not None:
            warn_user(f"{name}: {subnormal_note(layer)}")


def _points(
    timings: Mapping[str, Timings], batch_size: int, length: int, task: str, new_tokens: int
) -> Iterator[LatencyPoint]:
    first = next(iter(timings))
    tokens = batch_size * (length if task == "forward" else new_tokens)
    for name, times in timings.items():
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
            against=None if name == first else speedup(timings[first].wall, times.wall),
        )


def _forward(model: nn.Module | ExportedModel, inputs: Mapping[str, Any]) -> Callable[[], object]:
    return forward(model, inputs) if isinstance(model, nn.Module) else partial(model, **inputs)


def _generation(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> Any:
    if isinstance(model, ExportedModel):
        return partial(model.generate, inputs["input_ids"], new_tokens)
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
            "the first model is an exported one, which does not say what inputs it takes: name a checkpoint first"
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
    """Refuse to compare exported models, which run in float32 on the CPU, with others."""
    exported = [name for name, model in models.items() if not isinstance(model, nn.Module)]
    if exported and (dtypes(first), device(first)) != ("float32", "cpu"):
        raise ConfigError(
            f"{', '.join(exported)} is exported, in float32 on the CPU, and the others are in {dtypes(first)} on "
            f"{device(first)}, which cannot be compared: expected float32 on the CPU for all"
        )


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
