"""Report which heads, neurons, channels and layers a model has left, and how it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.layers import layer_lists
from hf_prune.architectures.modules import base_prefix
from hf_prune.pruning.mask_store import MaskStore, warn_regrown
from hf_prune.pruning.records import SpeedRecord
from hf_prune.structured.shrink import structure_of
from hf_prune.structured.shrink_record import RECORD
from hf_prune.utils.formatting import format_count, format_table
from hf_prune.utils.results import Result


@dataclass(frozen=True)
class SiteReport:
    """One attention, feed-forward network or convolutional block.

    Args:
        name: The matrix that consumes its units.
        kind: ``"head"``, ``"neuron"`` or ``"channel"``.
        units: How many there are.
        before: How many there were when the model was dense.
    """

    name: str
    kind: str
    units: int
    before: int


@dataclass(frozen=True, repr=False)
class StructureReport(Result):
    """The structure of a model. ``print(report)`` shows it as a table.

    Args:
        model_name: The model's class.
        sites: Its attentions, feed-forward networks and convolutional blocks.
        layers: By list of layers: how many there are now, and how many there were.
        parameters: Parameters of the whole model, tied ones once.
        parameters_before: The same for the dense model.
        bytes: Size in memory.
        needs_plugin: Whether it loads only after ``import hf_prune``, because its config cannot express its sizes.
        speed: The target and the measured speed-up, if there was a target.
    """

    bars = ("units", "before")

    model_name: str
    sites: tuple[SiteReport, ...]
    layers: dict[str, tuple[int, int]]
    parameters: int
    parameters_before: int
    bytes: int
    needs_plugin: bool
    speed: SpeedRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format_version": 1,
            "model": self.model_name,
            "parameters": self.parameters,
            "parameters_before": self.parameters_before,
            "bytes": self.bytes,
            "needs_plugin": self.needs_plugin,
            "layers": {name: {"now": now, "before": before} for name, (now, before) in self.layers.items()},
            "sites": [vars(site) for site in self.sites],
            "speed": None if self.speed is None else self.speed.to_dict(),
        }

    def summary(self) -> str:
        """The totals, without the table."""
        lines = [
            f"Shrunk: {self.parameters:,} of {self.parameters_before:,} parameters are left "
            f"({100 * self.parameters / self.parameters_before:.1f} %), {format_count(self.bytes)}B in memory."
        ]
        for name, (now, before) in self.layers.items():
            if now < before:
                lines.append(f"{name} has {now} of {before} layers left.")
        if self.speed is not None:
            lines.append(str(self.speed))
        differ = len({(site.kind, site.units) for site in self.sites}) > len({site.kind for site in self.sites})
        why = "its layers have different sizes, which" if differ else "it has sizes that"
        lines.append(
            f"It loads with plain from_pretrained after `import hf_prune`: {why} the config of such a model cannot "
            f"tell."
            if self.needs_plugin
            else "It loads with plain transformers, without hf_prune."
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        rows = [[site.name, f"{site.kind}s", f"{site.before:,}", f"{site.units:,}"] for site in self.sites]
        table = format_table(["site", "units", "dense", "left"], rows, left=2)
        return f"Structure of {self.model_name}\n{table}\n\n{self.summary()}"


def structure_from_dict(values: Mapping[str, Any]) -> StructureReport:
    """The report that :meth:`StructureReport.to_dict` returned as a dict, of a model without a target for its speed."""
    return StructureReport(
        model_name=values["model"],
        sites=tuple(SiteReport(**site) for site in values["sites"]),
        layers={name: (entry["now"], entry["before"]) for name, entry in values["layers"].items()},
        parameters=values["parameters"],
        parameters_before=values["parameters_before"],
        bytes=values["bytes"],
        needs_plugin=values["needs_plugin"],
    )


def structure_report(model: nn.Module) -> StructureReport:
    """Count the heads, neurons, channels and layers of a model.

    Args:
        model: A transformers model of an architecture in the table.

    Raises:
        ArchitectureError: If the architecture is not known.
    """
    warn_regrown(model, "where a whole unit was removed, shrink() would not take it out")
    store = MaskStore.of(model)
    config: Any = getattr(model, "config", None)
    record = getattr(config, RECORD, None) or {}
    parameters = sum(p.numel() for p in model.parameters())
    before = {name: entry["before"] for name, entry in record.get("units", {}).items()}
    speed = store.speed if store is not None and store.speed is not None else record.get("speed")
    prefix, layers = base_prefix(model), {}
    for stack in layer_lists(model):
        name, count = stack.name.removeprefix(prefix), len(stack.layers)
        layers[name] = (count, record.get("layers", {}).get(name, {"before": count})["before"])
    structure = structure_of(model, lambda: type(model)(copy.deepcopy(config))) if record else {}
    return StructureReport(
        model_name=type(model).__name__,
        sites=tuple(SiteReport(s.name, s.kind, s.units, before.get(s.name, s.units)) for s in find_unit_groups(model)),
        layers=layers,
        parameters=parameters,
        parameters_before=record.get("parameters_before", parameters),
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        needs_plugin=bool(structure),
        speed=SpeedRecord(**speed) if isinstance(speed, dict) else speed,
    )
