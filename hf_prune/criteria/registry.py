"""The criteria, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.utils.registry import Registry

if TYPE_CHECKING:
    from hf_prune.criteria.base import Criterion

CRITERIA: Registry[Criterion] = Registry("criterion", "hf_prune.criteria")
