"""How fast a model of other sizes would be: a table of measured times, and the speed-up that comes of it, measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import PlanError
from hf_prune.running import device_of, eval_mode
from hf_prune.sites import LayerList, Site
from hf_prune.timing import quantile, speedup, time_together
from hf_prune.unit_budget import Costs
from hf_prune.unit_costs import COARSE, FINE, measured_costs

_TABLE_SECONDS = 12.0  # for a table of times, if its rounds allow it
_CHECK_SECONDS = 3.0
_SLOW = 0.1  # seconds of a forward pass from which on fewer sizes are measured
_QUANTILE = 0.1  # of the times of one size: what else the machine does only ever makes it slower
_IMAGE = 224  # pixels in each direction, if the config does not say
_FAR = 0.1  # share by which a measured speed-up may miss the predicted one before that is said


@dataclass(frozen=True)
class SpeedRecord:
    """A speed-up that was asked for, foretold and measured.

    Args:
        asked: What was asked for.
        predicted: What the table of times foretells.
        measured: What was measured, dense and pruned in turns.
        low: Lower end of its 95 % interval.
        high: Upper end.
        rounds: How many rounds.
        batch_size: Of the workload.
        length: Of the workload, in tokens.
        threads: Of PyTorch.
        dtype: Of the weights.
        device: The kind of device.
    """

    asked: float
    predicted: float
    measured: float
    low: float
    high: float
    rounds: int
    batch_size: int
    length: int
    threads: int
    dtype: str
    device: str

    def with_prediction(self, asked: float, predicted: float) -> SpeedRecord:
        """The same with what was asked for and foretold."""
        return dataclasses.replace(self, asked=asked, predicted=predicted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One or two sentences."""
        few = self.low == 0 and math.isinf(self.high)
        interval = "too few rounds for an interval" if few else f"{self.low:.2f} to {self.high:.2f}"
        text = (
            f"Speed-up asked for: {self.asked:.2f}; foretold by the table of times: {self.predicted:.2f}; measured: "
            f"{self.measured:.2f} ({interval}, {self.rounds} rounds in turns, batch "
            f"{self.batch_size} x {self.length}, {self.dtype}, {self.device}, {self.threads} thread(s))."
        )
        if abs(self.measured / self.predicted - 1) > _FAR:
            text += " Foretold and measured differ by more than 10 %: the machine is busy, or sizes add up otherwise."
        return text


def workload_inputs(model: nn.Module, workload: Mapping[str, int] | None) -> dict[str, Tensor]:
    """Inputs of a workload for a model, as its config describes them: random tokens, pixels or sound.

    Args:
        model: A transformers model.
        workload: ``batch_size`` and ``length``.

    Raises:
        PlanError: If it is not known what the model takes.
    """
    assert workload is not None
    config: Any = getattr(model, "config", None)
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
            f"{type(model).__name__} takes {name!r}, for which no workload can be made up: expected a model of text, "
            f"images or sound; use target_params or sparsity to prune it, pass inputs= to measure_latency to time it"
        )
    if getattr(config, "is_encoder_decoder", False):
        start = torch.full((batch, min(length, 16)), config.decoder_start_token_id or 0)
        inputs["decoder_input_ids"] = start
    dtype = next(model.parameters()).dtype
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def latency_costs(
    model: nn.Module,
    sites: Sequence[Site],
    lists: Sequence[LayerList],
    layers: Mapping[str, Sequence[str]],
    inputs: Mapping[str, Any],
) -> Costs:
    """Seconds of a forward pass on this machine as a function of the sizes, from interleaved runs.

    Args:
        model: The model.
        sites: Those that may lose units.
        lists: Its stacks of layers.
        layers: The sites in each layer that may go as a whole, by its name.
        inputs: Keyword arguments of a forward pass.
    """
    start = time.perf_counter()
    with eval_mode(model):
        forward(model, inputs)()
    slow = time.perf_counter() - start > _SLOW

    def measure(models: Mapping[str, nn.Module]) -> dict[str, float]:
        with eval_mode(model):
            runs = {name: forward(each, inputs) for name, each in models.items()}
            found = time_together(runs, rounds=60, warmup=1 if slow else 2, seconds=_TABLE_SECONDS)
        return {name: quantile(times.wall, _QUANTILE) for name, times in found.items()}

    return measured_costs(model, sites, lists, layers, measure, COARSE if slow else FINE)


def measured_speedup(
    model: nn.Module, smaller: nn.Module, inputs: Mapping[str, Any], workload: Mapping[str, int] | None
) -> SpeedRecord:
    """How many times as fast a smaller model is, both in turns.

    Args:
        model: The model.
        smaller: The other one.
        inputs: Keyword arguments of a forward pass.
        workload: What to say of these.
    """
    assert workload is not None
    with eval_mode(model), eval_mode(smaller):
        runs = {"dense": forward(model, inputs), "smaller": forward(smaller, inputs)}
        found = time_together(runs, rounds=200, warmup=2, seconds=_CHECK_SECONDS)
    ratio = speedup(found["dense"].wall, found["smaller"].wall)
    parameter = next(model.parameters())
    return SpeedRecord(
        asked=ratio.value,
        predicted=ratio.value,
        measured=ratio.value,
        low=ratio.low,
        high=ratio.high,
        rounds=len(found["dense"].wall),
        batch_size=workload["batch_size"],
        length=workload["length"],
        threads=torch.get_num_threads(),
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
    )


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """A call that runs a model once, and waits until it has."""
    cuda = device_of(model).type == "cuda"

    def run() -> None:
        with torch.inference_mode():
            model(**inputs)
        if cuda:
            torch.cuda.synchronize()

    return run
