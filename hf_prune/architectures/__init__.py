"""Where the heads, neurons, channels and layers of a model are.

Takes a model, and gives its groups of units: which slices of which parameters go together, and in which layers. A
family of architectures is one file in ``families/`` (or one call of ``register_architecture``), a kind of unit is one
file in ``kinds/``; ``find_unit_groups`` asks every kind. ``ADDING.md`` and ``kinds/ADDING.md`` show how to add either.
``small_models`` builds a small model of any class from its config, on which what was found is proven.
"""

from __future__ import annotations

from typing import Any

from hf_prune.import_hook import moved


def __getattr__(name: str) -> Any:  # pickles of earlier versions name classes here
    return moved(__name__, name)
