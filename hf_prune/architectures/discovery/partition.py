"""Divide the inputs of a matrix into units: what the rows of its producers reach without touching the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_prune.architectures.discovery.blocks import matrix_dims
from hf_prune.architectures.discovery.flow import BATCH_NORMS, Flow
from hf_prune.architectures.discovery.refusals import Refusal
from hf_prune.architectures.modules import is_saved


@dataclass(frozen=True)
class FoundSlices:
    """A tensor with a slice for each unit.

    Args:
        name: Its name in the model.
        dim: The dimension along which the units lie.
        widths: The width of a unit in each part; parts lie one after another.
        fixed: Before which part, or behind all, lie positions that belong to no unit; None if there are none.
    """

    name: str
    dim: int
    widths: tuple[int, ...]
    fixed: int | None = None


@dataclass(frozen=True)
class FoundUnits:
    """Units of one layer, in the numbers of a small model.

    Args:
        units: How many there are.
        width: How many inputs of the consumers belong to one.
        producers: Parameters whose outputs they are.
        consumers: Weights that read them.
        buffers: Buffers with a slice for each.
    """

    units: int
    width: int
    producers: tuple[FoundSlices, ...]
    consumers: tuple[FoundSlices, ...]
    buffers: tuple[FoundSlices, ...]

    @property
    def kind(self) -> str:
        """Which kind of unit they are: a neuron is a single feature."""
        return "head" if self.width > 1 else "neuron"


def find_units(model: nn.Module, flows: Iterable[Flow]) -> tuple[list[FoundUnits], dict[str, str]]:
    """The units between the matrices of one layer.

    Args:
        model: The small model.
        flows: What reaches each matrix of the layer.

    Returns:
        The units, and for matrices that read something like units, why these are none.
    """
    found: list[FoundUnits] = []
    refused: dict[str, str] = {}
    for flow in flows:
        units = _units_of(model, flow)
        if isinstance(units, str):
            refused[flow.consumer] = units
        elif units is not None:
            same = next((u for u in found if (u.producers, u.units) == (units.producers, units.units)), None)
            if same is not None:  # two matrices read the same units
                found.remove(same)
                units = FoundUnits(
                    units.units, same.width, same.producers, same.consumers + units.consumers, same.buffers
                )
            found.append(units)
    return found, refused


def _units_of(model: nn.Module, flow: Flow) -> FoundUnits | str | None:
    """The units that one matrix reads; a sentence if something stands against them, None if there is no sign of any."""
    labels = _labels(model, flow)
    if labels is None:
        return None
    units = int(labels.max()) + 1
    width = len(labels) // units
    if not torch.equal(labels, torch.arange(units).repeat_interleave(width)):
        return "its inputs are divided, but not into neighbours of the same number"
    parameters = dict(model.named_parameters())
    producers: list[FoundSlices] = []
    buffers: list[FoundSlices] = []
    for name, by_dim in flow.reaches.items():
        if _matrix_of_bias(model, name) in flow.reaches:
            continue  # it goes with the matrix; that of keys has no derivative but rounding
        slices = [_slices(name, dim, touched, labels, units) for dim, touched in enumerate(by_dim)]
        whole = next((piece for piece in slices if isinstance(piece, FoundSlices)), None)
        if whole is not None:
            (producers if name in parameters else buffers).append(whole)
        elif any(piece == "partial" for piece in slices):
            return Refusal(
                f"{name} has rows for these units, and others that do something else", "head" if width > 1 else ""
            )
    if not any(_is_matrix(model, piece) for piece in producers):
        return None
    producers = [
        with_bias
        for piece in producers
        for with_bias in (piece, replace(piece, name=piece.name.removesuffix("weight") + "bias", dim=0))
        if with_bias is piece or (with_bias.name in parameters and _is_matrix(model, piece))
    ]
    buffers += [statistics for piece in producers for statistics in _running_statistics(model, piece)]
    if (lost := next((piece.name for piece in buffers if not is_saved(model, piece.name)), None)) is not None:
        return Refusal(
            f"{lost} has a part for each of these units and is not saved with the model", "head" if width > 1 else ""
        )
    dims = matrix_dims(model.get_submodule(flow.consumer))
    assert dims is not None
    consumer = FoundSlices(f"{flow.consumer}.weight", dims[1], (width,))
    return FoundUnits(units, width, tuple(producers), (consumer,), tuple(buffers))


def _labels(model: nn.Module, flow: Flow) -> Tensor | None:
    """(inputs,) the number of the unit of each input; None if the inputs cannot be divided."""
    partitions = []
    for name, by_dim in flow.reaches.items():
        module_name, _, key = name.rpartition(".")
        dims = matrix_dims(model.get_submodule(module_name))
        if dims is not None and key == "weight":
            touched = by_dim[dims[0]]
            if bool(touched.any(1).all()):
                partitions.append(_components(touched))
                if int(partitions[-1].max()) == 0:  # one key and value beside all queries, which reach neighbours only
                    runs = touched[:, _are_runs(touched) & ~touched.all(0)]
                    partitions += [_components(runs)] if bool(runs.any(1).all()) else []
    # The coarsest first: heads of queries are joined to those of the key that they share. What then would join all is
    # shared by the units (one key for all queries) and belongs to none.
    partitions = sorted((p for p in partitions if int(p.max()) > 0), key=lambda p: int(p.max()))
    labels: Tensor | None = None
    for partition in partitions:
        joint = partition if labels is None else _joined(labels, partition)
        if int(joint.max()) > 0:
            labels = joint
    return labels


def _components(touched: Tensor) -> Tensor:
    """(inputs,) which inputs are reached together, from (inputs, rows) bool: connected ones have the same number."""
    reach = (touched.float() @ touched.float().T) > 0
    while True:
        further = (reach.float() @ reach.float()) > 0
        if torch.equal(further, reach):
            break
        reach = further
    firsts = reach.float().argmax(1)  # the first input of the component
    return torch.unique(firsts, return_inverse=True)[1]


def _are_runs(touched: Tensor) -> Tensor:
    """(rows,) whether the inputs that a row reaches are neighbours, from (inputs, rows) bool."""
    places = torch.arange(len(touched))[:, None].expand_as(touched)
    first = places.where(touched, len(touched)).amin(0)
    last = places.where(touched, -1).amax(0)
    return last - first + 1 == touched.sum(0)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """The finest division that both divisions refine."""
    both = torch.cat([nn.functional.one_hot(first), nn.functional.one_hot(second)], 1)
    return _components(both > 0)


def _slices(name: str, dim: int, touched: Tensor, labels: Tensor, units: int) -> FoundSlices | str | None:
    """The slices of the units along one dimension of a tensor.

    Returns:
        ``"partial"`` if only some positions belong to units, and None if a position belongs to several.
    """
    by_unit = torch.zeros(units, touched.shape[1]).index_add_(0, labels, touched.float()) > 0  # (units, positions)
    owners = by_unit.sum(0)
    is_fixed = (owners == 0) | (owners == units)
    if bool((owners[~is_fixed] > 1).any()) or not bool(by_unit[:, ~is_fixed].any(1).all()):
        return None
    numbers = by_unit.float().argmax(0)
    if not bool(is_fixed.any()):
        widths = _part_widths(numbers.tolist(), units)
        return None if widths is None else FoundSlices(name, dim, widths)
    return _beside_others(name, dim, numbers, is_fixed, labels) or ("partial" if bool((owners == 0).any()) else None)


def _beside_others(name: str, dim: int, numbers: Tensor, is_fixed: Tensor, labels: Tensor) -> FoundSlices | None:
    """Slices in a tensor that holds something else in one run: a key that all queries share, another projection."""
    units = int(labels.max()) + 1
    runs = torch.nonzero(is_fixed).flatten()
    start, length = int(runs[0]), len(runs)
    if not bool(is_fixed[start : start + length].all()):
        return None
    widths = _part_widths(numbers[~is_fixed].tolist(), units)
    size = len(labels)
    if widths is None or set(widths) != {size // units} or start % size:
        return None
    return FoundSlices(name, dim, widths, start // size)


def _part_widths(owners: Sequence[int], units: int) -> tuple[int, ...] | None:
    """The widths of a unit in each part, from the unit of each position; None if the positions are in another order."""
    widths, start = [], 0
    while start < len(owners):
        width = 0
        while start + width < len(owners) and owners[start + width] == 0:
            width += 1
        expected = [unit for unit in range(units) for _ in range(width)]
        if not width or list(owners[start : start + len(expected)]) != expected:
            return None
        widths.append(width)
        start += len(expected)
    return tuple(widths)


def _matrix_of_bias(model: nn.Module, name: str) -> str | None:
    """The weight of the matrix that a parameter is the bias of; None if it is no such bias."""
    module_name, _, key = name.rpartition(".")
    is_bias = key == "bias" and matrix_dims(model.get_submodule(module_name)) is not None
    return f"{module_name}.weight" if is_bias else None


def _running_statistics(model: nn.Module, piece: FoundSlices) -> list[FoundSlices]:
    """What a batch norm keeps of the features that a weight of it scales."""
    module_name, _, key = piece.name.rpartition(".")
    module = model.get_submodule(module_name)
    if key != "weight" or not isinstance(module, BATCH_NORMS):
        return []
    return [
        FoundSlices(f"{module_name}.{name}", 0, piece.widths)
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dim() == 1
    ]


def _is_matrix(model: nn.Module, piece: FoundSlices) -> bool:
    module_name, _, key = piece.name.rpartition(".")
    dims = matrix_dims(model.get_submodule(module_name))
    return key == "weight" and dims is not None and dims[0] == piece.dim
