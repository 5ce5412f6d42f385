"""Whether what kernels bring, as a card says it, can be true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_prune.hub.plausible_numbers import are_texts
from hf_prune.inference.acceleration.report import AccelerationReport


def check_acceleration(acceleration: Mapping[str, Any]) -> None:
    """Check that times are in range and agree with the speed-up, and that the names are single lines.

    Args:
        acceleration: The output of ``hf-prune accelerate --json``.

    Raises:
        DataError: If they cannot be true.
    """
    report = AccelerationReport.from_dict(acceleration)
    are_texts(report.machine, *report.machine)
    for kind in report.kinds:
        are_texts(dict(enumerate(kind.layers)), *range(len(kind.layers)))  # type: ignore[arg-type]
    are_texts({f"kernel {name!r:.40}": name for name in report.kernels}, *(f"kernel {n!r:.40}" for n in report.kernels))
