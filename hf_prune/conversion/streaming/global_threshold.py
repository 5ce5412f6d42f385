"""Where scores of all weights are cut in scope global, in an interrupted run once and for all."""

from __future__ import annotations

from collections.abc import Sequence

from hf_prune.conversion.streaming.journal import Journal
from hf_prune.kernels.selection import Chunks, find_threshold
from hf_prune.planning.plan import PruningPlan


def global_threshold(journal: Journal, plan: PruningPlan, sources: Sequence[Chunks]) -> tuple[float, list[int]]:
    """The score above which units are kept, and for each weight the number of kept units with exactly that score.

    Args:
        journal: Remembers both.
        plan: The plan.
        sources: Scores of the units of each of its weights; not read if the journal knows the answer.
    """
    for record in journal.records:
        if "cut" in record:
            return record["cut"], record["ties"]
    threshold, ties = find_threshold(sources, [tensor.units for tensor in plan.tensors], plan.remove)
    journal.add({"cut": threshold, "ties": ties})
    return threshold, ties
