"""The inputs that models are timed on: the same for all, made from their configs or passed by the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.errors import ConfigError, PlanError
from hf_prune.inference.speedup import forward, size_of, workload_inputs
from hf_prune.utils.forward import device_of, generates


@dataclass(frozen=True)
class Workload:
    """One batch that every model runs.

    Args:
        batch_size: Number of examples.
        length: Tokens of each example; 0 for images and sound.
        inputs: Keyword arguments of a forward pass.
    """

    batch_size: int
    length: int
    inputs: dict[str, Any]


def find_workloads(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Any] | None,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
) -> list[Workload]:
    """Make batches that all models can run, and check that comparing the models on them is fair.

    Args:
        models: Models by name.
        inputs: Keyword arguments of a forward pass; None makes them: random tokens that all models know, random pixels
            or sound.
        batch_sizes: Sizes of the batches that are made.
        lengths: Their lengths in tokens; for images and sound the config decides.

    Raises:
        ConfigError: If the models differ in dtype, device or inputs, or ``inputs`` holds no tensor.
        PlanError: If the inputs of a model are unknown.
    """
    _check_alike({name: (dtypes(model), device(model)) for name, model in models.items()})
    if inputs is not None:
        return [_from_inputs(inputs, next(iter(models.values())))]
    workloads: dict[tuple[int, int], Workload] = {}
    for batch_size in batch_sizes:
        for length in lengths:
            made = {name: _make(name, model, batch_size, length) for name, model in models.items()}
            _check_alike({name: tuple((k, *v.shape) for k, v in batch.items()) for name, batch in made.items()})
            batch = made[min(models, key=lambda name: _vocabulary(models[name]))]  # tokens that every model knows
            tokens = length if "input_ids" in batch else 0
            workloads.setdefault((batch_size, tokens), Workload(batch_size, tokens, batch))
    return list(workloads.values())


def check_runs(models: Mapping[str, nn.Module], workload: Workload) -> None:
    """Make sure that each model runs on a workload.

    Args:
        models: Models by name, in eval mode.
        workload: The batch.

    Raises:
        PlanError: If a model does not run.
    """
    for name, model in models.items():
        try:
            forward(model, workload.inputs)()
        except Exception as error:
            shapes = {k: tuple(v.shape) for k, v in workload.inputs.items() if isinstance(v, Tensor)}
            reason = next(iter(str(error).splitlines()), "")
            raise PlanError(
                f"{name} does not run on {shapes} ({type(error).__name__}: {reason}): make the workload smaller, or "
                f"pass inputs= that it takes to measure_latency"
            ) from error


def check_generation(models: Mapping[str, Any], workloads: Sequence[Workload], new_tokens: int) -> None:
    """Make sure that each model can generate the tokens that are to be timed.

    Args:
        models: Models by name.
        workloads: The prompts.
        new_tokens: How many tokens to generate after each prompt; 0 is always fine.

    Raises:
        ConfigError: If a model is not a causal language model, or has too few positions.
    """
    if not new_tokens:
        return
    unable = [name for name, model in models.items() if not generates(model)]
    if unable:
        raise ConfigError(f"new_tokens={new_tokens} is for causal language models, which {', '.join(unable)} is not")
    longest = max(workload.length for workload in workloads)
    for name, model in models.items():
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(most, int) and longest + new_tokens > most:
            raise ConfigError(
                f"a prompt of {longest} tokens and {new_tokens} new ones are more than the {most} positions of {name}: "
                f"expected at most {most} together"
            )


def dtypes(model: nn.Module) -> str:
    """The dtypes of a model's weights, such as ``"float32"``."""
    return "+".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}))


def device(model: nn.Module) -> str:
    """The devices of a model's weights, such as ``"cpu"``; accelerated layers have some on none, as ``"meta"``."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    return "+".join(sorted(devices - {"meta"} or devices))


def _check_alike(kinds: Mapping[str, object]) -> None:
    if len(set(kinds.values())) > 1:
        raise ConfigError(
            f"models of different dtypes, devices or inputs cannot be compared: found {dict(kinds)}; load them alike, "
            f"or time each alone"
        )


def _from_inputs(inputs: Mapping[str, Any], model: nn.Module) -> Workload:
    if not any(isinstance(value, Tensor) and value.ndim for value in inputs.values()):
        raise ConfigError(f"inputs= holds no tensor: found {dict(inputs)}, expected keyword arguments of the models")
    where = device_of(model)
    return Workload(
        *size_of(inputs),
        inputs={k: v.to(where) if isinstance(v, Tensor) else v for k, v in inputs.items()},
    )


def _make(name: str, model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
    if not hasattr(model, "config"):
        raise PlanError(f"{name} is a {type(model).__name__} without a config, so its inputs are unknown: pass inputs=")
    try:
        return workload_inputs(model, {"batch_size": batch_size, "length": length})
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from error


def _vocabulary(model: Any) -> int:
    return getattr(model.config.get_text_config(), "vocab_size", None) or 0
