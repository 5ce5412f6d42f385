"""UnitPlan: which heads, neurons and layers of a model will be removed, decided before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.architectures.find_unit_groups import find_unit_groups, in_model_order
from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.architectures.unit_groups import UnitGroup, overlapping_kinds, weight_names
from hf_prune.errors import ConfigError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.parts import is_chosen
from hf_prune.planning.targets import module_matches, quick_pattern
from hf_prune.pruning.records import SpeedRecord
from hf_prune.structured.budget import Choice, Costs
from hf_prune.utils.formatting import format_table
from hf_prune.utils.results import Result


@dataclass(frozen=True, repr=False)
class UnitPlan(Result):
    """What is removed from one model as whole heads, neurons and layers. ``print(plan)`` shows it as a table.

    Args:
        config: The settings.
        model_name: The model's class.
        sites: The groups of units that may lose some: attentions, feed-forward networks.
        layers: The layers that may be removed as a whole, each with the names of the groups in it.
        parameters: How many parameters the model has at which sizes.
        choice: What stays; None until calibration data decides.
        kept: The units that stay, by group.
        speed: The predicted speed-up, for ``target_speedup``.
    """

    bars = ("kept", "units")

    config: PruningConfig
    model_name: str
    sites: tuple[UnitGroup, ...]
    layers: Mapping[str, tuple[str, ...]]
    parameters: Costs
    choice: Choice | None
    kept: Mapping[str, Tensor]
    speed: SpeedRecord | None = None

    @property
    def weights(self) -> list[str]:
        """Names of the weight matrices that may lose units."""
        return weight_names(self.sites)

    @property
    def parameters_before(self) -> int:
        """Parameters of the model."""
        return round(self.parameters.total({}, (), self.layers))

    @property
    def parameters_after(self) -> int | None:
        """Parameters of the model once it is shrunk; None if that is not known yet."""
        if self.choice is None:
            return None
        return round(self.parameters.total(self.choice.kept, self.choice.layers, self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        choice = self.choice
        return {
            "config": self.config.to_dict(),
            "model": self.model_name,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "speed": None if self.speed is None else self.speed.to_dict(),
            "removed_layers": None if choice is None else sorted(choice.layers),
            "sites": [
                {
                    "name": group.name,
                    "kind": group.kind,
                    "origin": group.origin,
                    "units": group.units,
                    "kept": None if choice is None else self._kept_units(group),
                }
                for group in self.sites
            ],
        }

    def _kept_units(self, group: UnitGroup) -> int:
        assert self.choice is not None
        return 0 if self.is_gone(group) else self.choice.kept.get(group.name, group.units)

    def is_gone(self, site: UnitGroup) -> bool:
        """Whether the layer that holds a group of units is removed as a whole."""
        if self.choice is None or not site.layers:
            return False
        return all(f"{name}.{number}" in self.choice.layers for name, number in site.layers)

    def __str__(self) -> str:
        config = self.config
        rows = [[group.name, f"{group.kind}s", f"{group.units:,}", self._outcome(group)] for group in self.sites]
        with_groups = {f"{name}.{number}" for group in self.sites for name, number in group.layers}
        for layer in self.layers:
            if layer not in with_groups:
                stays = "by data" if self.choice is None else "gone" if layer in self.choice.layers else "stays"
                rows.append([layer, "layer", "1", stays])
        budget = next(
            (f"{key} {getattr(config, key):g}" for key in ("target_params", "target_flops", "target_speedup")
             if getattr(config, key) is not None),
            f"sparsity {config.sparsity:g}" if config.sparsity is not None else "",
        )  # fmt: skip
        before, after = self.parameters_before, self.parameters_after
        lines = [
            f"Plan for {self.model_name}: {', '.join(config.granularity)}; {config.criterion}, scope {config.scope}, "
            f"{budget}{'' if config.repair is None else ', repair ' + config.repair}"
            f"{'' if config.polish is None else f', then trained (polish {config.polish})'}",
            format_table(["site", "units", "now", "left"], rows, left=2),
            f"The model has {before:,} parameters"
            + ("." if after is None else f", and {after:,} ({100 * after / before:.1f} %) once it is shrunk."),
        ]
        for origin in dict.fromkeys(group.origin for group in self.sites):
            kinds = dict.fromkeys(f"{group.kind}s" for group in self.sites if group.origin == origin)
            lines.append(f"Where its {' and '.join(kinds)} are: {origin}.")
        if self.speed is not None:
            lines.append(str(self.speed))
        return "\n".join(lines)

    def _outcome(self, group: UnitGroup) -> str:
        """What the table says is left of a group."""
        if self.choice is None:
            return "by data"
        return "layer gone" if self.is_gone(group) else f"{self._kept_units(group):,}"


def unit_groups_of(model: nn.Module, config: PruningConfig) -> list[UnitGroup]:
    """The groups of units that a config prunes in a model; groups that are empty are left out.

    Args:
        model: A transformers model of an architecture in the table.
        config: Its ``granularity``, ``exclude_modules`` and ``only``.

    Raises:
        ArchitectureError: If the architecture is not registered, or its modules are not where the table says.
        ConfigError: If two kinds of the granularity hold the same slices.
    """
    excluded, in_part = quick_pattern(config.exclude_modules), is_chosen(model, config)

    def is_excluded(group: UnitGroup) -> bool:
        names = {piece.name.rpartition(".")[0] for piece in group.slices}
        names |= {f"{name}.{number}" for name, number in group.layers}
        named = bool(excluded) and any(module_matches(name, excluded) for name in names)
        return named or not all(map(in_part, names))

    groups = find_unit_groups(model)  # of all kinds: an error of any of them would come from shrink() as well
    for kind in map(kind_named, config.granularity):
        if kind.cut_as is not None:
            groups += kind.groups(model)
    groups = [g for g in in_model_order(model, groups) if g.kind in config.granularity]
    groups = [group for group in groups if group.units and not is_excluded(group)]
    if (pair := overlapping_kinds(groups)) is not None:
        raise ConfigError(
            f"granularity {config.granularity} names {pair[0].kind!r} and {pair[1].kind!r}, which both divide "
            f"{pair[1].name}: choose one of them"
        )
    return groups
