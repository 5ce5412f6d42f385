"""The granularities, by name and by how they are spelled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.utils.registry import Registry, unknown_name

if TYPE_CHECKING:
    from hf_prune.granularities.base import Granularity

GRANULARITIES: Registry[Granularity] = Registry("granularity", "hf_prune.granularities")


def parse_granularity(text: object) -> Granularity:
    """The granularity that ``text`` spells, such as ``"unstructured"``, ``"2:4"`` or ``"block:16x1"``.

    Raises:
        UnknownNameError: If it spells no registered granularity.
        ConfigError: If it spells one, with invalid numbers.
    """
    entries = [GRANULARITIES.get(name) for name in GRANULARITIES.names()]
    if isinstance(text, str):
        for entry in entries:
            if (granularity := entry.parse(text)) is not None:
                return granularity
    raise unknown_name("granularity", text, [entry.usage for entry in entries])
