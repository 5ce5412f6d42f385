"""UnitPlan: which heads, neurons and layers of one model go, chosen before anything is touched, and printable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.input_reader import NO_BATCHES, Batches
from hf_prune.errors import CalibrationError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.targets import module_matches, quick_pattern
from hf_prune.pruning.records import SpeedRecord
from hf_prune.structured.budget import Choice, Costs
from hf_prune.utils.distributed import check_same_batches, fail_together
from hf_prune.utils.formatting import format_table
from hf_prune.utils.forward import as_batches


@dataclass(frozen=True)
class UnitPlan:
    """What goes of one model, by whole heads, neurons and layers. ``print(plan)`` shows it as a table.

    Args:
        config: The settings.
        model_name: The model's class.
        sites: All attentions and feed-forward networks that may lose units.
        layers: The sites in each layer that may go as a whole, by its name.
        parameters: How many parameters the model costs at which sizes.
        choice: What stays; None until calibration data tells.
        kept: The units that stay, by site.
        speed: The speed-up that is foretold, for ``target_speedup``.
    """

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
        return list(dict.fromkeys(p.name for site in self.sites for p in site.parts if p.name.endswith(".weight")))

    @property
    def parameters_before(self) -> int:
        """Parameters of the model."""
        return round(self.parameters.total({}, (), self.layers))

    @property
    def parameters_after(self) -> int | None:
        """Parameters of the model once it is shrunk; None if it is not known yet."""
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
                    "name": site.name,
                    "kind": site.kind,
                    "units": site.units,
                    "kept": None if choice is None else self._left(site),
                }
                for site in self.sites
            ],
        }

    def _left(self, site: UnitGroup) -> int:
        assert self.choice is not None
        return 0 if self.is_gone(site) else self.choice.kept.get(site.name, site.units)

    def is_gone(self, site: UnitGroup) -> bool:
        """Whether the layer that holds a site goes as a whole."""
        return self.choice is not None and all(f"{name}.{i}" in self.choice.layers for name, i in site.layers)

    def __str__(self) -> str:
        config = self.config
        rows = []
        for site in self.sites:
            left = "by data" if self.choice is None else "layer gone" if self.is_gone(site) else f"{self._left(site):,}"
            rows.append([site.name, site.kind + "s", f"{site.units:,}", left])
        with_sites = {f"{place}.{i}" for site in self.sites for place, i in site.layers}
        for name in self.layers:
            if name not in with_sites:
                left = "by data" if self.choice is None else "gone" if name in self.choice.layers else "stays"
                rows.append([name, "layer", "1", left])
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
        if self.speed is not None:
            lines.append(str(self.speed))
        return "\n".join(lines)


def unit_batches(
    config: PruningConfig, calibration: Batches | None, polish_data: Batches | None = None
) -> list[Mapping[str, Any]] | None:
    """The batches as a list, if there are any; the same ones in every process.

    Args:
        config: The settings, which may need them.
        calibration: The batches.
        polish_data: Those of a polish, if others.

    Raises:
        CalibrationError: If they are needed and missing, or the processes have different ones.
    """
    with fail_together():
        batches = None if calibration is None else list(as_batches(calibration))
        who = f"criterion {config.criterion!r}" if config.learns_units else ""
        who = who or (f"repair={config.repair!r}" if config.repair is not None else "")
        who = who or ("polish" if config.polish is not None and polish_data is None else "")
        if who and batches is None:
            raise CalibrationError(
                f"{who} needs calibration data, and got none: pass calibration=batches, an iterable of dicts with the "
                f"model's inputs"
            )
        if who and not batches:
            raise CalibrationError(NO_BATCHES)
    if batches is not None:
        check_same_batches(batches)
    return batches


def unit_groups_of(model: nn.Module, config: PruningConfig) -> list[UnitGroup]:
    """Where a config prunes heads and neurons of a model; empty sites are none.

    Args:
        model: A transformers model of an architecture in the table.
        config: Its ``granularity`` and ``exclude_modules``.
    """
    sites, excluded = [], quick_pattern(config.exclude_modules)
    for site in find_unit_groups(model):
        modules = {part.name.rpartition(".")[0] for part in site.parts} | {f"{name}.{i}" for name, i in site.layers}
        spared = excluded and any(module_matches(name, excluded) for name in modules)
        if site.kind in config.granularity and site.units and not spared:
            sites.append(site)
    return sites
