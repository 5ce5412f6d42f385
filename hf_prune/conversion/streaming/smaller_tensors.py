"""Which tensors of a checkpoint a shrunk model has: where each comes from, what is cut out of it, and its new name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_prune.architectures.unit_groups import selected
from hf_prune.checkpoint.shards import Entry, read_rows, read_tensor
from hf_prune.conversion.streaming.merged import Index
from hf_prune.conversion.streaming.meta_model import MetaModel
from hf_prune.errors import PlanError
from hf_prune.structured.shrink import Move
from hf_prune.structured.shrink_record import layer_of, new_name

Cut = tuple[int, Tensor]
"""A dimension, and the positions along it that stay; (choices, n) if each slab along the first one has its own."""


@dataclass(frozen=True)
class SmallerTensor:
    """A tensor in the files of a shrunk model.

    Args:
        key: Its name there.
        name: The parameter or buffer of the dense model that it comes from, or is a part of.
        source: Where that lies in the files of the dense model.
        cuts: What stays of it; empty where all does.
    """

    key: str
    name: str
    source: Entry
    cuts: tuple[Cut, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        shape = list(self.source.shape)
        for dim, index in self.cuts:
            shape[dim] = index.shape[-1]
        return tuple(shape)

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.source.torch_dtype.itemsize if self.cuts else self.source.size

    def read(self, folder: Path) -> Tensor:
        """Read what stays of it; of a matrix that only loses rows, nothing else."""
        cuts = self.cuts
        if cuts and cuts[0][0] == 0 and cuts[0][1].ndim == 1 and len(self.source.shape) > 1:
            tensor = read_rows(folder, self.source, cuts[0][1].tolist())
            cuts = cuts[1:]
        else:
            tensor = read_tensor(folder, self.source)
        return _cut(tensor, cuts)

    def of(self, values: Tensor) -> Tensor:
        """What stays of new values of the parameter, in the dtype of the file."""
        return _cut(values, self.cuts).to(self.source.torch_dtype)


def _cut(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    for dim, index in cuts:
        tensor = selected(tensor, dim, index)
    return tensor.contiguous()


def tensors_that_stay(
    meta_model: MetaModel,
    cuts: Mapping[str, Sequence[Cut]],
    moves: Sequence[Move],
) -> list[SmallerTensor]:
    """The tensors that the files of a shrunk model have. What does not belong to the model is left out.

    Args:
        meta_model: The dense model.
        cuts: What stays of parameters and buffers, by name.
        moves: Modules that were taken out, and those that moved up.

    Raises:
        PlanError: If a module moves up into the place of one that has no such tensor.
    """
    entries, tensors = meta_model.shards.entries, []
    keys = {**meta_model.keys, **{name: (key,) for name, key in meta_model.buffers.items()}}
    for name, of_tensor in keys.items():
        if any(layer_of(name, gone) is not None for gone, _ in moves):
            continue
        name_now = name
        for _, renamed in moves:
            name_now = new_name(name_now, renamed)
        if len(keys.get(name_now, ())) != len(of_tensor):
            raise PlanError(
                f"{name} becomes {name_now}, of which {type(meta_model.model).__name__} has no tensor in its files, "
                f"since its layers are not alike: prune without streaming"
            )
        if name in meta_model.parts and name in cuts:
            tensors += _parts_that_stay(meta_model, name, name_now, cuts[name])
            continue
        for key, new in zip(of_tensor, keys[name_now], strict=True):
            tensors.append(SmallerTensor(new, name, entries[key], tuple(cuts.get(name, ()))))
    return tensors


def _parts_that_stay(meta_model: MetaModel, name: str, name_now: str, cuts: Sequence[Cut]) -> list[SmallerTensor]:
    """Of a parameter that is merged from tensors, the tensors of the experts that stay, numbered without gaps."""
    new_keys = _by_place(meta_model.parts[name_now])
    tensors = []
    for rows, keys in _by_place(meta_model.parts[name]).items():
        staying = next((index.tolist() for dim, index in cuts if dim == 0), sorted(keys))
        for new, old in enumerate(staying):
            inside = []
            for dim, index in cuts:
                if dim == 0:
                    continue
                positions = index[old] if index.ndim == 2 else index
                if dim == 1 and rows is not None:
                    positions = positions[(positions >= rows[0]) & (positions < rows[1])] - rows[0]
                inside.append((dim - 1, positions))
            source = meta_model.shards.entries[keys[old]]
            tensors.append(SmallerTensor(new_keys[rows][new], name, source, tuple(inside)))
    return tensors


def _by_place(parts: Mapping[str, Index]) -> dict[tuple[int, int] | None, dict[int, str]]:
    """By the rows of an expert's matrix, the tensors of the files by the number of the expert."""
    by_place: dict[tuple[int, int] | None, dict[int, str]] = {}
    for key, place in parts.items():
        by_place.setdefault(_rows(place), {})[_number(place)] = key
    return by_place


def _number(index: Index) -> int:
    assert isinstance(index[0], int)
    return index[0]


def _rows(index: Index) -> tuple[int, int] | None:
    """The rows of an expert's matrix that a tensor of the files is; None for all."""
    rows = index[1] if len(index) > 1 else None
    return (rows.start, rows.stop) if isinstance(rows, slice) else None
