"""hf-prune list: options, help, and what it prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hf_prune.architectures.kinds.registry import unit_descriptions
from hf_prune.cli.console import echo
from hf_prune.cli.options import AsJson
from hf_prune.criteria.registry import CRITERIA, unit_rankings
from hf_prune.granularities.registry import GRANULARITIES
from hf_prune.planning.choices import UNIT_SCOPES
from hf_prune.utils.formatting import format_table

if TYPE_CHECKING:
    from hf_prune.criteria.base import Criterion


def list_(as_json: AsJson = False) -> None:
    """List criteria and granularities, with a description and the paper."""
    criteria = [CRITERIA.get(name) for name in CRITERIA.names()]
    granularities = [GRANULARITIES.get(name) for name in GRANULARITIES.names()]
    if as_json:
        values = {
            "criteria": [
                {
                    "name": c.name,
                    "description": c.description,
                    "paper": c.paper,
                    "needs": sorted(c.needs),
                    "scopes": sorted(c.scopes),
                }
                for c in criteria
            ],
            "granularities": [
                {
                    "name": g.name,
                    "usage": g.usage,
                    "description": g.description,
                    "paper": g.paper,
                    "scopes": sorted(g.scopes),
                }
                for g in granularities
            ],
            "units": [{"name": name, "description": text} for name, text in unit_descriptions().items()],
            "unit_criteria": [
                {"name": name, "needs": r.needs, "description": r.description, "paper": r.paper}
                for name, r in unit_rankings().items()
            ],
        }
        echo(json.dumps(values, indent=2))
        return
    rows = [[c.name, _needs(c), c.description, c.paper] for c in criteria]
    echo(format_table(["criterion", "needs", "what it keeps", "paper"], rows, left=4) + "\n")
    rows = [[g.usage, ", ".join(sorted(g.scopes)), g.description, g.paper] for g in granularities]
    echo(format_table(["granularity", "scopes", "what goes together", "paper"], rows, left=4) + "\n")
    rows = [[name, ", ".join(UNIT_SCOPES), text] for name, text in unit_descriptions().items()]
    echo(format_table(["removed as a whole", "scopes", "what it is"], rows, left=3) + "\n")
    rows = [[name, r.needs, r.description, r.paper] for name, r in unit_rankings().items()]
    echo(format_table(["their criterion", "needs", "what it keeps", "paper"], rows, left=4))


def _needs(criterion: type[Criterion]) -> str:
    from hf_prune.criteria.base import LABELLED

    if criterion.needs & LABELLED:
        return "labelled data"
    return "texts" if criterion.needs else "no data"
