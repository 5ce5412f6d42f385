"""Which cases of a test ``make test`` runs, and which stay on one worker.

``@pytest.mark.covering(2)`` on a test with several ``parametrize`` marks keeps a sample of the cases in which
every two values meet that meet in any case; ``covering(1)`` a sample in which every value occurs. The other cases get
the mark ``matrix``, or the one that is named: ``make test`` leaves them out, ``make test-all`` runs them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest

Case = Sequence[tuple[int, str]]  # the id of the value of each parametrize mark, with the index of the mark


def cover(cases: Sequence[Case], strength: int) -> list[int]:
    """Indices of cases that together contain every combination of ``strength`` values found in any case.

    Greedy and deterministic: the case that adds the most combinations is next, and the first one wins a tie.
    """
    combined = [set(combinations(case, min(strength, len(case)))) for case in cases]
    missing = set().union(*combined)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(combined[index] & missing))
        chosen.append(best)
        missing -= combined[best]
    return sorted(chosen)


def mark_beyond_sample(items: Iterable[pytest.Item]) -> None:
    """Mark the cases of ``covering`` tests that are not in the sample."""
    tests: dict[tuple[object, str], list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering") and hasattr(item, "callspec"):
            tests[item.parent, item.originalname].append(item)
    for cases in tests.values():
        strength, *others = cases[0].get_closest_marker("covering").args
        kept = set(cover([list(enumerate(item.callspec._idlist)) for item in cases], strength))
        for index, item in enumerate(cases):
            if index not in kept:
                item.add_marker(*others or ["matrix"])


def keep_modules_together(items: Iterable[pytest.Item]) -> None:
    """Group tests that use a fixture of module scope by their file, so that only one worker sets it up."""
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("xdist_group") is None:
            definitions = item._fixtureinfo.name2fixturedefs.values()
            if any(definition.scope == "module" for found in definitions for definition in found):
                item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(item.config.rootpath))))
