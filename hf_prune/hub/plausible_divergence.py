"""Whether what a card says of how far predictions moved can be true."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hf_prune.errors import DataError
from hf_prune.evaluation.divergence import saved_divergence, upper_bound_of_share
from hf_prune.evaluation.examples.kinds import find_kind
from hf_prune.hub.plausible_numbers import NEAR, is_same, real, whole

_MOST = {
    "kl": math.inf,
    "kl_standard_error": math.inf,
    "flips": 100,
    "flips_standard_error": 100,
    "flips_upper_bound": 100,
    "confidence": 1,
}


def check_divergence(
    divergence: Mapping[str, Any], score: Mapping[str, Any], dense: Mapping[str, Any], changed: int | None
) -> None:
    """Check that the numbers are in range, and agree with the scores.

    Args:
        divergence: ``Divergence.to_dict()``.
        score: The score of the pruned model, perhaps without its distributions.
        dense: That of the dense model.
        changed: How many examples only one of the models gets right, if that is known: all of these changed.

    Raises:
        DataError: If they cannot be true.
    """
    for name, most in _MOST.items():
        real(divergence, name, 0, most)
    n = whole(divergence, "n", 1)
    if n != score["n"]:
        raise DataError(f"the divergence has n = {n!r}, and the scores {score['n']}: expected the same examples")
    flips = divergence["flips"] * n / 100
    is_same("flips times n", flips, round(flips), "the nearest number of examples is", NEAR)
    if changed is not None and round(flips) < changed:
        raise DataError(f"{round(flips):,} answers changed, and {changed:,} became right or wrong: expected no fewer")
    if (divergence["kl"] == 0) and flips:
        raise DataError(f"kl is 0, and {round(flips):,} answers changed: expected a number above 0")
    share = flips / n
    is_same(
        "flips_standard_error",
        divergence["flips_standard_error"],
        100 * math.sqrt(share * (1 - share) / n),
        "flips and n give",
        NEAR,
    )
    bound = 100 * upper_bound_of_share(share, n, divergence["confidence"])
    is_same("flips_upper_bound", divergence["flips_upper_bound"], bound, "flips and n give", NEAR)
    labels = "kind" in score and find_kind(str(score["kind"])).several_labels
    saved = (dense.get("distributions") or (), score.get("distributions") or ())
    counted = saved_divergence(*saved, labels=labels, confidence=divergence["confidence"])
    for name, value in ({} if counted is None else counted.to_dict()).items():
        is_same(name, divergence[name], value, "the distributions give", NEAR * max(1.0, value))
