"""What an acceleration chose and brought."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError, DataError
from hf_prune.inference.acceleration.kernels import PRECISIONS
from hf_prune.inference.acceleration.layer_kinds import LayerKind, read_kinds
from hf_prune.inference.timing import MEDIAN_NOISE, Ratio
from hf_prune.utils.files import write_json
from hf_prune.utils.formatting import format_count, format_table, format_workload
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.results import Result

FORMAT = 1
_UNREADABLE = (AttributeError, KeyError, OverflowError, TypeError, ValueError)  # what values of others raise


@dataclass(frozen=True, repr=False)
class AccelerationReport(Result):
    """Which kernels the layers of a model run on, and what that brought.

    Args:
        kinds: The layers.
        speedup: How many times as fast the model is as before, end to end on the inputs; None if no layer gains.
        before: Median seconds of a forward pass before.
        after: Median seconds of a forward pass after.
        difference: The largest change of an output, as a share of the largest output.
        bytes_before: Bytes of the layers' weights before.
        bytes_after: Bytes of what is kept in their place.
        batch_size: Examples of the inputs.
        length: Tokens of each example; 0 for images and sound.
        threads: PyTorch threads.
        machine: The processor, and what its kernels were chosen for.
        notes: What else there is to know.
        tolerance: The largest change of an output that was allowed.
        dtypes: Precisions besides that of each layer that were allowed.
        without_sparse: Why no sparse kernel could be timed, such as no compiler; empty if they were, or nothing is
            sparse.
    """

    bars = ("ratio", "seconds")

    kinds: tuple[LayerKind, ...]
    speedup: Ratio | None
    before: float
    after: float
    difference: float
    bytes_before: int
    bytes_after: int
    batch_size: int
    length: int
    threads: int
    machine: Mapping[str, str]
    notes: tuple[str, ...] = ()
    tolerance: float = 1e-4
    dtypes: tuple[str, ...] = ()
    without_sparse: str = ""

    @property
    def accelerated(self) -> tuple[str, ...]:
        """Names of the layers that run on another kernel than torch's default."""
        changed = [kind for kind in self.kinds if kind.gains]
        return tuple(name for kind in changed for name in kind.layers) if self.speedup is not None else ()

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that layers run on besides torch's default, each once."""
        chosen = [choice.kernel for kind in self.kinds for choice in kind.choices if choice.kernel != "dense"]
        return tuple(dict.fromkeys(chosen)) if self.speedup is not None else ()

    @property
    def gain(self) -> Ratio:
        """The speed-up, which is 1 where no layer gains."""
        return self.speedup or Ratio(1.0, 1.0, 1.0)

    @property
    def sentence(self) -> str:
        """What came of it, in one sentence."""
        without = f" Its sparse kernels could not be used: {self.without_sparse}." if self.without_sparse else ""
        if self.speedup is None:
            return f"accelerate() finds no kernels that make the model faster on {self.machine['cpu']}.{without}"
        return (
            f"accelerate() makes the model {self.speedup.value:.2f} times as fast (95 % interval "
            f"{self.speedup.low:.2f} to {self.speedup.high:.2f}) on {self.machine['cpu']}, threads: {self.threads}."
            f"{without}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers and names, no weights."""
        ratio = None if self.speedup is None else dict(vars(self.speedup))
        return {
            "format": FORMAT,
            **vars(self),
            "kinds": [kind.to_dict() for kind in self.kinds],
            "speedup": ratio,
            "machine": dict(self.machine),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AccelerationReport:
        """The inverse of :meth:`to_dict`.

        Raises:
            DataError: If a number is missing, or cannot be true.
        """
        try:
            return _checked(cls(**{f.name: _read(f.name, values[f.name]) for f in dataclasses.fields(cls)}))
        except _UNREADABLE as error:
            reason = error if isinstance(error, DataError) else f"found {error!r}"
            raise DataError(f"an acceleration cannot be read: {reason}; measure it again") from error

    def rows(self) -> list[dict[str, Any]]:
        """A row for each kind of layer and number of tokens."""
        return [
            {
                "layer": f"{kind.shape[1]}→{kind.shape[0]}",
                "layers": len(kind.layers),
                "sparsity": kind.sparsity,
                **{name: value for name, value in choice.to_dict().items() if not isinstance(value, dict)},
            }
            for kind in self.kinds
            for choice in kind.choices
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the choices to a file, for ``accelerate(saved=path)`` on the same kind of machine."""
        write_json(path, self.to_dict())

    def __str__(self) -> str:
        rows = []
        for kind in self.kinds:
            for choice in kind.choices:
                rows.append(
                    [
                        f"{kind.shape[1]}→{kind.shape[0]}",
                        str(len(kind.layers)),
                        f"{100 * kind.sparsity:.0f} %",
                        str(choice.tokens),
                        choice.kernel,
                        f"{1e6 * choice.dense_seconds:.0f}" if choice.dense_seconds else "",
                        f"{1e6 * choice.seconds:.0f}" if choice.seconds else "",
                        f"{choice.ratio:.2f}×",
                    ]
                )
        header = ["layer", "count", "zeros", "tokens", "kernel", "default µs", "µs", "gain"]
        lines = [format_table(header, rows)] if rows else []
        if not any(kind.gains for kind in self.kinds):
            lines.append("No layer gains: every one stays as it is.")
        if (ratio := self.speedup) is not None:
            lines += [
                f"End to end: {ratio.value:.2f} times as fast (95 % interval {ratio.low:.2f} to {ratio.high:.2f}), "
                f"{1e3 * self.before:.2f} ms -> {1e3 * self.after:.2f} ms, "
                f"{format_workload(self.batch_size, self.length)}, threads: {self.threads}, {self.machine['cpu']}.",
                f"Largest change of an output: {self.difference:.1e} of the largest output.",
                f"Weights of these layers in memory: {format_count(self.bytes_before)}B -> "
                f"{format_count(self.bytes_after)}B.",
            ]
        if self.without_sparse:
            lines.append(f"The sparse kernels could not be used, and were not timed: {self.without_sparse}.")
        return "\n".join([*lines, *self.notes])


def read_choices(path: str | os.PathLike[str]) -> tuple[list[LayerKind], dict[str, str]]:
    """The layers and the machine of a saved report.

    Raises:
        CheckpointError: If the file is missing, damaged, or of another format.
    """
    expected = "what AccelerationReport.save() or hf-prune accelerate --out writes"
    saved = read_json_object(Path(path), expected=expected)
    try:
        if saved["format"] != FORMAT:
            raise KeyError(f"format {saved['format']}")
        return read_kinds(saved["kinds"]), _machine(saved["machine"])
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path} is not a record of an acceleration ({type(error).__name__}: {error}): expected {expected}"
        ) from error


def _machine(saved: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in saved.items()}


_REALS = ("before", "after", "difference", "tolerance")
_NUMBERS = (*_REALS, "bytes_before", "bytes_after", "batch_size", "length", "threads")
_MOST = 1e15  # of any number
_LONGEST = 1000  # characters of a text
_BEYOND = 2.0  # factor by which a model may gain more than its layers did alone, where caches are warm


def _read(name: str, value: Any) -> Any:
    """The value of a field from what JSON has for it."""
    if name == "kinds":
        return tuple(read_kinds(value))
    if name == "speedup":
        return None if value is None else Ratio(*(float(value[end]) for end in ("value", "low", "high")))
    if name == "machine":
        return _machine({"cpu": value["cpu"], **value})
    return tuple(map(str, value)) if name in ("notes", "dtypes") else value


def _checked(report: AccelerationReport) -> AccelerationReport:
    """The same report, if it can be true.

    Raises:
        DataError: If it cannot.
    """
    for name in _NUMBERS:
        value = getattr(report, name)
        types = (int, float) if name in _REALS else (int,)
        least, most = int(name in ("batch_size", "threads")), 1 if name == "difference" else _MOST
        if type(value) not in types or not least <= value <= most:
            raise DataError(f"{name} is {value!r:.60}: expected a number from {least} to {most:g}")
    if not isinstance(report.without_sparse, str) or len(report.without_sparse) > _LONGEST:
        raise DataError(f"without_sparse is {report.without_sparse!r:.60}: expected a short text")
    if unknown := [name for name in report.dtypes if name not in PRECISIONS]:
        raise DataError(f"dtypes has {unknown[0]!r:.60}: expected some of {', '.join(PRECISIONS)}")
    if (ratio := report.speedup) is not None:
        if report.difference > report.tolerance:
            raise DataError(
                f"difference is {report.difference!r}: expected at most the tolerance, {report.tolerance!r}"
            )
        if not 1 < ratio.low <= ratio.value <= ratio.high < math.inf:
            raise DataError(f"speedup is {vars(ratio)}: expected an interval above 1 around its value")
        if not (report.before > 0 < report.after):
            raise DataError(f"before is {report.before!r} and after {report.after!r}: expected seconds above 0")
        if not 1 / MEDIAN_NOISE <= ratio.value / (report.before / report.after) <= MEDIAN_NOISE:
            times = f"{report.before / report.after:.3g}"
            raise DataError(f"the speed-up is {ratio.value!r}, and the times give {times}: they contradict each other")
        layers = max([1.0, *(choice.ratio for kind in report.kinds for choice in kind.choices)])
        if not ratio.value <= _BEYOND * layers:
            raise DataError(f"the speed-up is {ratio.value!r}, and no layer gains more than {layers:.3g} times")
    return report
