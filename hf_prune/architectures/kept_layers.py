"""Which layers a small model keeps: one of each kind that the lists and rules of a config describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_prune.architectures import config_fields as fields


def numbers_layers(name: str, value: Sequence[Any], layers: int) -> bool:
    """Whether a list holds the numbers of some layers, in order."""
    whole = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    ordered = whole and len(value) > 0 and list(value) == sorted(set(value)) and 0 <= value[0] and value[-1] < layers
    return bool(fields.LAYER_NUMBERS.fullmatch(name)) and ordered


def kept_layers(values: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Which layers stay: the first of each kind, and as many as the config's rules and lists of outputs need."""
    lists = {n: v for n, v in values.items() if isinstance(v, list | tuple) and layers > 1}
    chosen = [v for n, v in lists.items() if numbers_layers(n, v, layers)]
    per_layer = [v for v in lists.values() if len(v) == layers and v not in chosen]
    kinds = [(*(str(v[i]) for v in per_layer), *(i in v for v in chosen)) for i in range(layers)]
    firsts = {kinds.index(kind) for kind in dict.fromkeys(kinds)} if per_layer or chosen else set()
    dense_first = any(fields.FIRST_DENSE.fullmatch(n) and v for n, v in values.items())
    outputs = max((len(v) for n, v in values.items() if "out_indices" in n and isinstance(v, list | tuple)), default=0)
    pattern = values.get("block_types")
    repeated = len(pattern) if isinstance(pattern, list | tuple) else 0
    least = min(max(3 if dense_first else 2, outputs, repeated), layers)
    for number in range(layers):
        if len(firsts) < least:
            firsts.add(number)
    return tuple(sorted(firsts))
