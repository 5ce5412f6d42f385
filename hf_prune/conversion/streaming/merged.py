"""Weights that lie in the files as several tensors, which transformers merges while it loads a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from hf_prune.checkpoint.shards import Shards
from hf_prune.errors import CheckpointError

Index = tuple[int | slice, ...]
"""Where a tensor of the files lies in the parameter."""


class MergedWeights:
    """The tensors that a checkpoint has for merged parameters, such as each matrix of each expert.

    Args:
        converters: How transformers merges tensors.
        shards: The files.
        source: Their name, for messages.
    """

    def __init__(self, converters: Sequence[WeightConverter], shards: Shards, source: str) -> None:
        self._converters, self._shards, self._source = converters, shards, source
        self._keys: dict[str, dict[str, list[str]]] = {}

    def add(self, name: str, pattern: str, key: str) -> None:
        """Note a tensor.

        Args:
            name: The parameter that it becomes a part of.
            pattern: The pattern of transformers that its name matches.
            key: Its name in the files; those of one pattern in the order of their numbers.

        Raises:
            CheckpointError: If they are assembled in another way than by stacking experts.
        """
        if self._converter(name, pattern) is None:
            raise CheckpointError(
                f"{key} of {self._source!r} is part of a weight that transformers assembles while it loads the model "
                f"({name}), so it cannot be pruned in its file: prune without streaming"
            )
        self._keys.setdefault(name, {}).setdefault(pattern, []).append(key)

    def _converter(self, name: str, pattern: str) -> WeightConverter | None:
        """The rule that stacks the tensors of each pattern, and joins the outputs of several patterns."""
        for converter in self._converters:
            if pattern not in converter.source_patterns or len(converter.target_patterns) != 1:
                continue
            steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
            stacked, joined = [(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]
            if name.endswith(converter.target_patterns[0].lstrip("^.")) and steps in (stacked, joined):
                return converter
        return None

    def parts(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Index]]:
        """By parameter, where each of its tensors lies in it.

        Args:
            parameters: Those of the model, by the names that the tensors were added for.

        Raises:
            CheckpointError: If tensors are missing, or do not fit the parameter.
        """
        return {name: self._parts(name, by_pattern, parameters) for name, by_pattern in self._keys.items()}

    def _parts(
        self, name: str, by_pattern: Mapping[str, Sequence[str]], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Index]:
        converter: Any = self._converter(name, next(iter(by_pattern)))
        parts: dict[str, Index] = {}
        shapes, start = [], 0
        for pattern in converter.source_patterns:
            keys = by_pattern.get(pattern, ())
            of_pattern = {self._shards.entries[key].shape for key in keys}
            shapes.append((len(keys), sorted(of_pattern)))
            rows = next(iter(of_pattern))[0] if len(of_pattern) == 1 else 0
            index: Index = (slice(start, start + rows),) if len(converter.source_patterns) > 1 else ()
            parts |= {key: (number, *index) for number, key in enumerate(keys)}
            start += rows
        expected = tuple(parameters[name].shape) if name in parameters else ()
        same = len({count for count, _ in shapes}) == 1 and all(len(found) == 1 for _, found in shapes)
        if not same or expected != (shapes[0][0], start, *shapes[0][1][0][1:]):
            found = ", ".join(f"{count} of {' or '.join(map(str, of_pattern))}" for count, of_pattern in shapes)
            raise CheckpointError(
                f"{name} of {self._source!r} is merged from tensors in its files, {found}, and the model that its "
                f"config describes has {expected} there: the weights do not fit the config"
            )
        return parts
