"""The speed-ups of a sweep: on which workload they are measured, one in a table, and its columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_prune.errors import SweepError
from hf_prune.inference.acceleration.machine import this_machine
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.acceleration.workload import WITH_THREADS, WORKLOAD, check_workload
from hf_prune.inference.speedup import size_of, workload_inputs
from hf_prune.utils.wrapping import sole_model


def timed_workload(accelerate: bool | Mapping[str, int]) -> dict[str, int] | None:
    """The workload that an argument names; None if nothing is to be timed.

    Args:
        accelerate: See :func:`hf_prune.run_sweep`.

    Raises:
        ConfigError: If it is anything else.
    """
    if isinstance(accelerate, bool):
        return {} if accelerate else None
    return check_workload(accelerate, WITH_THREADS, "accelerate", "True, or ")


def check_same_workload(
    path: Path | None, earlier: Iterable[AccelerationReport | None], model: nn.Module, workload: Mapping[str, int]
) -> None:
    """Make sure that earlier speed-ups can stand in one table with those that are measured now.

    Args:
        path: The file that they are from.
        earlier: What was measured.
        model: The model.
        workload: What is measured now.

    Raises:
        SweepError: If one is of another workload, number of threads or machine.
    """
    reports = [report for report in earlier if report is not None]
    if not reports:
        return
    batch_size, length = size_of(workload_inputs(sole_model(model), {**WORKLOAD, **workload}))
    threads = workload.get("threads", torch.get_num_threads())
    now: dict[str, Any] = {"batch_size": batch_size, "length": length, **this_machine(), "threads": str(threads)}
    for report in reports:
        then = {"batch_size": report.batch_size, "length": report.length, **report.machine}
        if differing := [name for name in now if then.get(name) != now[name]]:
            details = "; ".join(f"{name} was {then.get(name)}, now {now[name]}" for name in differing)
            raise SweepError(
                f"{path} holds speed-ups of another workload or machine ({details}), which cannot stand in one table: "
                f"give the same, choose another folder, or pass --restart (restart=True) to measure everything again"
            )


def speed_columns(acceleration: AccelerationReport | None) -> dict[str, Any]:
    """Columns of the measured speed-up and its workload; without numbers where it was not measured."""
    if acceleration is None:
        return dict.fromkeys(("speedup", "speedup_low", "speedup_high", "batch_size", "length", "threads"))
    gain = acceleration.gain
    return {
        "speedup": gain.value,
        "speedup_low": gain.low,
        "speedup_high": gain.high,
        "batch_size": acceleration.batch_size,
        "length": acceleration.length,
        "threads": acceleration.threads,
    }


def speed_cells(row: Mapping[str, Any]) -> list[str]:
    """The same as a text; 1 where nothing gains."""
    if "speedup" not in row:
        return []
    if row["speedup"] is None:
        return ["-"]
    if row["speedup"] == row["speedup_high"] == 1:
        return ["1 (no gain)"]
    return [f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"]
