"""How many times as fast a smaller model is, measured on the inputs of a workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import PlanError
from hf_prune.inference.timing import speedup, time_together
from hf_prune.pruning.records import SpeedRecord
from hf_prune.utils.forward import device_of, eval_mode

_CHECK_SECONDS = 3.0
_IMAGE = 224  # pixels in each direction, if the config does not say


def workload_inputs(model: nn.Module, workload: Mapping[str, int] | None) -> dict[str, Tensor]:
    """Make the inputs of a workload for a model from its config: random tokens, pixels or sound.

    Args:
        model: A transformers model.
        workload: ``batch_size`` and ``length``.

    Raises:
        PlanError: If the inputs of the model are unknown, or the workload is longer than it allows.
    """
    assert workload is not None
    config: Any = getattr(model, "config", None)
    if config is None:
        raise PlanError(f"a {type(model).__name__} has no config, so inputs for it are unknown: pass inputs=")
    batch, length = workload["batch_size"], workload["length"]
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        text = config.get_text_config()
        most = getattr(text, "max_position_embeddings", None)
        if isinstance(most, int) and length > most:
            raise PlanError(
                f"a workload of length {length} is longer than the {most} positions of the model; use a shorter one"
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
    if getattr(config, "is_encoder_decoder", False):
        start = torch.full((batch, min(length, 16)), config.decoder_start_token_id or 0)
        inputs["decoder_input_ids"] = start
    dtype = next(model.parameters()).dtype
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def measured_speedup(
    model: nn.Module, smaller: nn.Module, inputs: Mapping[str, Any], workload: Mapping[str, int] | None
) -> SpeedRecord:
    """Measure how many times as fast a smaller model is, timing both in turns.

    Args:
        model: The model.
        smaller: The smaller model.
        inputs: Keyword arguments of a forward pass.
        workload: Their batch size and length, for the record.
    """
    assert workload is not None
    with eval_mode(model), eval_mode(smaller):
        runs = {"dense": forward(model, inputs), "smaller": forward(smaller, inputs)}
        timings = time_together(runs, rounds=200, warmup=2, seconds=_CHECK_SECONDS)
    ratio = speedup(timings["dense"].wall, timings["smaller"].wall)
    parameter = next(model.parameters())
    return SpeedRecord(
        asked=ratio.value,
        predicted=ratio.value,
        measured=ratio.value,
        low=ratio.low,
        high=ratio.high,
        rounds=len(timings["dense"].wall),
        batch_size=workload["batch_size"],
        length=workload["length"],
        threads=torch.get_num_threads(),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
    )


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """A function that runs a model once, and waits until it is done."""
    cuda = device_of(model).type == "cuda"

    def run() -> None:
        with torch.inference_mode():
            model(**inputs)
        if cuda:
            torch.cuda.synchronize()

    return run
