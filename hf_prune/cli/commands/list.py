"""hf-prune list: options, help, and what it prints."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.options import AsJson
from hf_prune.errors import ConfigError
from hf_prune.planning.choices import UNIT_SCOPES
from hf_prune.planning.presets import MEASURED_HOW, PRESETS
from hf_prune.utils.formatting import format_table
from hf_prune.utils.registry_source import read_entries


def list_(
    what: Annotated[
        str | None, typer.Argument(metavar="[presets]", help="Only the presets.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List presets, criteria and granularities, with a description and the paper."""
    if what not in (None, "presets"):
        raise ConfigError(f"found {what!r}: expected presets, or nothing, which lists everything else")
    if what == "presets":
        echo(
            json.dumps({name: preset.to_dict() for name, preset in PRESETS.items()}, indent=2)
            if as_json
            else _presets()
        )
        return
    registered = read_entries("hf_prune.criteria", {"name", "units", "description", "paper", "needs", "scopes"})
    criteria = [c for c in registered.values() if "description" in c]  # the others rank whole units only
    rankings = {name: c["units"] for name, c in registered.items() if c["units"]}
    rankings = dict(sorted(rankings.items(), key=lambda item: (item[1]["needs"] == "a training", item[0])))
    granularities = read_entries("hf_prune.granularities", {"name", "usage", "description", "paper", "scopes"}).values()
    kinds = read_entries("hf_prune.architectures.kinds", {"name", "description", "position", "is_granularity"}).values()
    units = sorted((kind for kind in kinds if kind["is_granularity"]), key=lambda kind: kind["position"])
    if as_json:
        values = {
            "criteria": [{**c, "needs": sorted(c["needs"]), "scopes": sorted(c["scopes"])} for c in criteria],
            "granularities": [{**g, "scopes": sorted(g["scopes"])} for g in granularities],
            "units": [{"name": kind["name"], "description": kind["description"]} for kind in units],
            "unit_criteria": [
                {"name": name, **{key: ranking[key] for key in ("needs", "description", "paper")}}
                for name, ranking in rankings.items()
            ],
        }
        for entry in values["criteria"]:
            del entry["units"]
        echo(json.dumps(values, indent=2))
        return
    rows = [[c["name"], _needs(c), c["description"], c["paper"]] for c in criteria]
    echo(format_table(["criterion", "needs", "what it keeps", "paper"], rows, left=4) + "\n")
    rows = [[g["usage"], ", ".join(sorted(g["scopes"])), g["description"], g["paper"]] for g in granularities]
    echo(format_table(["granularity", "scopes", "what goes together", "paper"], rows, left=4) + "\n")
    rows = [[kind["name"], ", ".join(UNIT_SCOPES), kind["description"]] for kind in units]
    echo(format_table(["removed as a whole", "scopes", "what it is"], rows, left=3) + "\n")
    rows = [[name, ranking["needs"], ranking["description"], ranking["paper"]] for name, ranking in rankings.items()]
    echo(format_table(["their criterion", "needs", "what it keeps", "paper"], rows, left=4) + "\n")
    echo(f"Methods by name: --preset {', '.join(PRESETS)}; see: hf-prune list presets")


def _presets() -> str:
    """The table of presets, and what each was measured to cost."""
    header = ["preset", "needs", "for", "settings", "measured"]
    rows = []
    for name, preset in PRESETS.items():
        for goal, settings in (("zeros", preset.weights), ("heads and neurons", preset.units)):
            options = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in settings.items())
            rows.append([name, preset.needs, goal, options, preset.measured[goal]])
    return format_table(header, rows, left=5) + f"\n\n{_own_criteria()}\n{MEASURED_HOW}"


def _own_criteria() -> str:
    """Which kinds of units have a criterion of their own in place of the table's."""
    named = [name for name, preset in PRESETS.items() if preset.needs == "texts"]
    kinds = read_entries("hf_prune.architectures.kinds", {"name", "preferred"}).values()
    own = [f'granularity="{kind["name"]}" alone uses {kind["preferred"]}' for kind in kinds if kind["preferred"]]
    return f"With texts ({', '.join(named)}), {'; '.join(own)} in place of {PRESETS[named[0]].units['criterion']}."


def _needs(criterion: dict[str, Any]) -> str:
    labelled = ("gradient", "absolute_gradient")
    if any(name in labelled for name in criterion["needs"]):
        return "labelled data"
    return "texts" if criterion["needs"] else "no data"
