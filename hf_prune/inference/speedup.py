"""How many times as fast a smaller model is, measured on a workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import PlanError
from hf_prune.inference.passes import timed, workload_passes
from hf_prune.inference.timing import speedup, time_together
from hf_prune.pruning.records import SpeedRecord
from hf_prune.utils.forward import device_of, eval_mode, is_encoder_decoder

_CHECK_SECONDS = 3.0
_IMAGE = 224  # pixels in each direction, if the config does not say


def workload_inputs(model: nn.Module, workload: Mapping[str, int] | None) -> dict[str, Tensor]:
    """Make the inputs of a workload for a model from its config: random tokens, pixels or sound.

    Args:
        model: A transformers model.
        workload: ``batch_size`` and ``length``; or ``batch_size``, ``prompt`` and ``new_tokens``, of which the inputs
            are the prompt.

    Raises:
        PlanError: If the inputs of the model are unknown, or the workload is longer than it allows.
    """
    assert workload is not None
    config: Any = getattr(model, "config", None)
    if config is None:
        raise PlanError(f"a {type(model).__name__} has no config, so inputs for it are unknown: pass inputs=")
    batch, length = workload["batch_size"], _length(workload)
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        text = config.get_text_config()
        most = getattr(text, "max_position_embeddings", None)
        total = length + workload.get("new_tokens", 0)
        if isinstance(most, int) and total > most:
            raise PlanError(
                f"a workload of length {total} is longer than the {most} positions of the model; use a shorter one"
            )
        ids = torch.randint(1, text.vocab_size, (batch, length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif name == "pixel_values":
        size = getattr(config, "image_size", None) or _IMAGE  # convolutions take images of any size
        size = size if isinstance(size, tuple | list) else (size, size)
        inputs = {"pixel_values": torch.randn(batch, config.num_channels, *size, generator=generator)}
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions
        inputs = {"input_features": torch.randn(batch, config.num_mel_bins, frames, generator=generator)}
    else:
        raise PlanError(
            f"{type(model).__name__} takes {name!r}, for which no workload can be made: expected a model of text, "
            f"images or sound; use target_params or sparsity to prune it, or inputs= of measure_latency to time it"
        )
    if is_encoder_decoder(model):
        start = torch.full((batch, min(length, 16)), config.decoder_start_token_id or 0)
        inputs["decoder_input_ids"] = start
    dtype = next(model.parameters()).dtype
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def size_of(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Examples in a batch and tokens of each; 0 tokens of images and sound, and 0 examples where nothing tells."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    ids = tensors.get("input_ids")
    length = 0 if ids is None or ids.ndim < 2 else ids.shape[1]
    return len(next(iter(tensors.values()), ())), length


def measured_speedup(
    model: nn.Module, smaller: nn.Module, inputs: Mapping[str, Any], workload: Mapping[str, int] | None
) -> SpeedRecord:
    """Measure how many times as fast a smaller model is, timing both in turns.

    Args:
        model: The model.
        smaller: The smaller model.
        inputs: Keyword arguments of a forward pass.
        workload: What is run, see :func:`~hf_prune.inference.passes.workload_passes`.
    """
    assert workload is not None
    with eval_mode(model), eval_mode(smaller):
        passes = {
            name: workload_passes(each, inputs, workload) for name, each in (("dense", model), ("smaller", smaller))
        }
        times = {name: one.times for name, one in passes["dense"].items()}
        runs = {
            f"{name} {part}": timed(each, passes[name][part].run)
            for part in times
            for name, each in (("dense", model), ("smaller", smaller))
        }
        timings = time_together(runs, rounds=200, warmup=2, seconds=_CHECK_SECONDS)
    by_part = {part: [timings[f"{name} {part}"].wall for name in ("dense", "smaller")] for part in times}
    dense, short = (
        [sum(times[part] * by_part[part][who][i] for part in times) for i in range(len(rounds))]
        for who, rounds in enumerate(next(iter(by_part.values())))
    )
    ratio = speedup(dense, short)
    apart = {part: speedup(*walls).value for part, walls in by_part.items() if len(by_part) > 1}
    parameter = next(model.parameters())
    return SpeedRecord(
        asked=ratio.value,
        predicted=ratio.value,
        measured=ratio.value,
        low=ratio.low,
        high=ratio.high,
        rounds=len(dense),
        batch_size=workload["batch_size"],
        length=size_of(inputs)[1],
        threads=torch.get_num_threads(),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
        new_tokens=workload.get("new_tokens", 0),
        **apart,
    )


def _length(workload: Mapping[str, int]) -> int:
    return workload["prompt"] if "new_tokens" in workload else workload["length"]


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """A function that runs a model once, and waits until it is done."""
    return timed(model, lambda: model(**inputs))
