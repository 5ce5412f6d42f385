"""What can be removed from a model as a whole: layers, heads, neurons, experts, and what cannot, with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_prune.architectures.base import Stack
from hf_prune.architectures.discovery.find import discover
from hf_prune.architectures.entries import entries_of, is_in_table
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.kinds.registry import all_kinds
from hf_prune.architectures.layers import layer_lists
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.errors import ArchitectureError
from hf_prune.utils.formatting import format_table
from hf_prune.utils.results import Result

_NUMBERS = re.compile(r"\b\d+\b")


@dataclass(frozen=True)
class UnitsOfKind:
    """Groups of units in the same place of several layers.

    Args:
        name: What reads the units, with ``*`` for the numbers of layers.
        kind: The kind of unit, such as ``"head"``.
        units: How many units each group has, layer by layer.
        parameters: Parameters that belong to all of them.
        config: The settings of the config that can tell another number of units for all of them at once; empty if
            other sizes are recorded beside the config.
        together: Whether all layers must lose the same units.
        origin: ``"found and proven"`` or ``"from the table"``.
    """

    name: str
    kind: str
    units: tuple[int, ...]
    parameters: int
    config: tuple[str, ...]
    together: bool
    origin: str


@dataclass(frozen=True, repr=False)
class UnitDescription(Result):
    """What can be removed from a model as a whole. ``print(description)`` shows it as a table.

    Args:
        model_name: The model's class.
        model_type: ``config.model_type``.
        parameters: Its parameters, tied ones once.
        layers: By list of layers: how many there are, and how many of them can be removed, leaving one.
        units: Its units by place.
        embeddings: The shape of each embedding table, by name.
        tied: Names of parameters that are the same, each after the one whose place they take.
        refused: Why something that looks like units or layers cannot be removed, by its name.
    """

    bars = ("parameters",)

    model_name: str
    model_type: str
    parameters: int
    layers: Mapping[str, tuple[int, int]]
    units: tuple[UnitsOfKind, ...]
    embeddings: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "format_version": 1,
            "model": self.model_name,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "layers": {name: {"number": n, "removable": removable} for name, (n, removable) in self.layers.items()},
            "units": [
                {
                    "name": place.name,
                    "kind": place.kind,
                    "units": list(place.units),
                    "parameters": place.parameters,
                    "config": list(place.config),
                    "same_in_all_layers": place.together,
                    "origin": place.origin,
                }
                for place in self.units
            ],
            "embeddings": {name: list(shape) for name, shape in self.embeddings.items()},
            "tied": [list(names) for names in self.tied],
            "refused": dict(self.refused),
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [f"{self.model_name} ({self.model_type}): {self.parameters:,} parameters"]
        for name, (number, removable) in self.layers.items():
            can = f"up to {removable} of them can be removed" if removable else "none can be removed as a whole"
            lines.append(f"{name}: {number} layers; {can}")
        rows = [
            [
                place.name,
                f"{place.kind}s",
                _range(place.units),
                f"{100 * place.parameters / max(self.parameters, 1):.1f} %",
                _saved_by(place),
                place.origin,
            ]
            for place in self.units
        ]
        if rows:
            header = ["read by", "units", "in each layer", "of all parameters", "other numbers in", "known"]
            lines += ["", format_table(header, rows, left=2)]
        if self.embeddings:
            tables = [f"{name} ({rows:,} x {columns:,})" for name, (rows, columns) in self.embeddings.items()]
            lines += ["", f"Embeddings, which are not units: {', '.join(tables)}"]
        lines += [f"Tied: {' = '.join(names)}" for names in self.tied]
        if self.refused:
            lines += ["", "Not removable:", *(f"  {name}: {reason}" for name, reason in self.refused.items())]
        return "\n".join(lines)


def describe_units(model: nn.Module) -> UnitDescription:
    """Find what can be removed from a model as a whole. Only shapes matter, so a model on the meta device will do.

    Args:
        model: A transformers model.

    Returns:
        Its layers, heads, neurons, channels and experts, and what cannot be removed, with the reason.

    Raises:
        ArchitectureError: If the model carries adapters, or its modules are not where the table says.
        PlanError: If it is quantized, or torch.nn.utils.prune holds masks.

    Example:
        >>> import torch, transformers
        >>> with torch.device("meta"):
        ...     model = transformers.BertModel(transformers.BertConfig())
        >>> [(place.kind, place.units[0]) for place in describe_units(model).units]
        [('head', 12), ('neuron', 3072)]
    """
    prefix, config = base_prefix(model), getattr(model, "config", None)
    parameters = dict(model.named_parameters())
    refused: dict[str, str] = {}
    groups: list[UnitGroup] = []
    layers: dict[str, tuple[int, int]] = {}
    try:
        groups = find_unit_groups(model)
        removable = [name for kind in all_kinds() for name in kind.removable_layers(model, lambda name: False)]
        for stack in layer_lists(model):
            can = sum(name.rpartition(".")[0] == stack.name for name in removable)
            layers[stack.name.removeprefix(prefix)] = (len(stack.layers), can)
        if not is_in_table(model) and entries_of(model, Stack):
            refused |= discover(model).refused
    except ArchitectureError as error:
        if is_in_table(model):
            raise
        refused[type(model).__name__] = str(error)
    for kind in all_kinds():
        refused |= {f"{kind.name}s {number}".removesuffix(" 0"): r for number, r in enumerate(kind.obstacles(model))}
    return UnitDescription(
        model_name=type(model).__name__,
        model_type=getattr(config, "model_type", "") or "",
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        layers=layers,
        units=_places(groups, dict(model.named_parameters(remove_duplicate=False))),
        embeddings={
            name: (module.num_embeddings, module.embedding_dim)
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
        },
        tied=_tied(model),
        refused=refused,
    )


def _places(groups: Sequence[UnitGroup], parameters: Mapping[str, Any]) -> tuple[UnitsOfKind, ...]:
    """Groups of the same place in several layers as one."""
    by_place: dict[tuple[str, str], list[UnitGroup]] = {}
    for group in groups:
        by_place.setdefault((group.kind, _NUMBERS.sub("*", group.name)), []).append(group)
    return tuple(
        UnitsOfKind(
            name=name,
            kind=kind,
            units=tuple(group.units for group in members for _ in group.layers or (None,)),
            parameters=sum(group.units * group.parameters_per_unit(parameters) for group in members),
            config=members[0].config,
            together=any(len(group.layers) > 1 for group in members),
            origin=members[0].origin,
        )
        for (kind, name), members in by_place.items()
    )


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of parameters that are one and the same."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(same) for same in names.values() if len(same) > 1)


def _range(units: Sequence[int]) -> str:
    low, high = min(units), max(units)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _saved_by(place: UnitsOfKind) -> str:
    """Where a checkpoint says that there are fewer."""
    if place.together and place.config:
        return f"config ({', '.join(place.config)}), the same in all layers"
    if place.together:
        return "our record, the same in all layers"
    return f"config ({', '.join(place.config)}) if equal" if place.config else "our record"
