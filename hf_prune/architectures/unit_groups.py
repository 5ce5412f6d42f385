"""What a unit is, in terms of the parameters of one model: a slice of each of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.errors import ArchitectureError

FOUND = "found and proven"  # the origin of units that discovery gives


@dataclass(frozen=True)
class UnitSlice:
    """Where the units of a group lie in one parameter.

    Args:
        name: The parameter.
        dim: The dimension along which the units lie.
        width: How many neighbouring positions along it belong to one unit.
        offsets: Where the first unit begins; several if one matrix holds several projections.
        slab: How many positions along it belong to each of several slabs, such as experts in the rows of one matrix,
            that choose for themselves; 0 if slabs lie along the first of three dimensions, or there are none.
        fixed: A run of positions that belong to no unit: where it begins, and its length.
    """

    name: str
    dim: int
    width: int
    offsets: tuple[int, ...] = (0,)
    slab: int = 0
    fixed: tuple[int, int] = (0, 0)

    def index(self, units: Tensor) -> Tensor:
        """Positions along :attr:`dim` that belong to some units.

        Args:
            units: (n,) int64, or (choices, n), where each slab along the first dimension chooses for itself.

        Returns:
            (offsets * n * width,) int64, or (choices, offsets * n * width); one after the other if slabs lie along the
            same dimension.
        """
        inside = torch.arange(self.width, device=units.device)
        starts = torch.tensor(self.offsets, device=units.device)[:, None, None]
        index = (starts + units[..., None, :, None] * self.width + inside).flatten(-3)
        if self.slab and units.ndim == 2:
            return (index + torch.arange(len(units), device=units.device)[:, None] * self.slab).flatten()
        return index

    def by_unit(self, tensor: Tensor, units: int, choices: int = 0) -> Tensor:
        """(units, rest): the entries of a tensor shaped like the parameter that belong to each unit.

        Args:
            tensor: The tensor.
            units: How many units there are.
            choices: How many slabs lie along the first dimension, if each chooses for itself; then (choices, units,
                rest) is returned.
        """
        if choices:
            along = tensor.movedim(self.dim, 0 if self.slab else 1)
            slabs = along.reshape(choices, self.slab or tensor.shape[self.dim], -1)
            places = self.index(torch.arange(units, device=tensor.device)).view(len(self.offsets), units, self.width)
            return slabs[:, places].movedim(2, 1).reshape(choices, units, -1)
        flat = tensor.movedim(self.dim, 0).reshape(tensor.shape[self.dim], -1)
        index = self.index(torch.arange(units, device=tensor.device)).view(len(self.offsets), units, self.width)
        return flat[index].movedim(1, 0).reshape(units, -1)  # (offsets, units, width, rest) -> (units, all of it)


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind that are computed together: an attention, a feed-forward network, the inside of a block.

    What a unit computes flows from the *producers*, whose outputs it is, into the *consumers*, whose inputs it is.
    Removing a unit takes its slice from all of them. Where all layers must keep the same heads, one group spans the
    whole stack.

    Args:
        name: The matrix that consumes what the units compute, relative to the base model; the first one of several.
        kind: The name of the kind of unit, such as ``"head"``.
        units: How many there are.
        producers: Weights and biases whose outputs the units are.
        consumers: Weights whose inputs they are.
        layers: The layers that the group is in, as (list of layers, number).
        values: The producers that make a unit compute zero once its slice of them is zero. Empty if that cannot be
            told from slices alone.
        counts: Attributes of modules that are proportional to the number of units, as (module, attribute).
        minimum: How many units must stay.
        config: Attributes of the model's config that can tell another number of units.
        per_unit: What one unit adds to each of these.
        size: The size of a unit and the attribute of the config that holds it; None if there is none.
        buffers: Buffers with a slice for each unit, such as the running mean of a norm.
        lists: Lists or dicts with one numbered module for each unit, of which no other unit has a part.
        runs: Into how many runs of neighbouring units the group is divided; each of them must keep as many units as
            every other.
        choices: How many slabs lie along the first dimension of every tensor, such as packed experts, if each slab
            keeps as many units as every other one, but others of them; 0 where there is one choice.
        step: The number of units that stay is a multiple of this, or all of them: kernels refuse others.
        origin: How it is known where the units are.
    """

    name: str
    kind: str
    units: int
    producers: tuple[UnitSlice, ...]
    consumers: tuple[UnitSlice, ...]
    layers: tuple[tuple[str, int], ...] = ()
    values: tuple[UnitSlice, ...] = ()
    counts: tuple[tuple[str, str], ...] = ()
    minimum: int = 0
    config: tuple[str, ...] = ()
    per_unit: tuple[int, ...] = ()
    size: tuple[int, str] | None = None
    buffers: tuple[UnitSlice, ...] = ()
    lists: tuple[str, ...] = ()
    runs: int = 1
    choices: int = 0
    step: int = 1
    origin: str = "from the table"

    @property
    def is_found(self) -> bool:
        """Whether discovery found and proved it."""
        return self.origin == FOUND

    @property
    def slices(self) -> tuple[UnitSlice, ...]:
        """All slices of parameters."""
        return self.producers + self.consumers

    def parameters_per_unit(self, parameters: Mapping[str, Tensor]) -> int:
        """How many parameters go with one unit, also if none is left."""
        total = 0
        for piece in self.slices:
            shape = list(parameters[piece.name].shape)
            length = shape.pop(piece.dim)
            slabs = length // piece.slab if piece.slab else 1
            total += len(piece.offsets) * piece.width * slabs * math.prod(shape)
        for name in self.lists:
            inside = sum(p.numel() for key, p in parameters.items() if key.startswith(f"{name}."))
            total += inside // max(1, self.units)
        return total

    def own_parameters(self, model: nn.Module, units: Iterable[int]) -> list[list[str]]:
        """Names of the parameters that belong to some units alone, unit by unit: those of modules in :attr:`lists`."""
        keys = {name: numbered(model.get_submodule(name)) for name in self.lists}
        modules = [[f"{name}.{keys[name][unit]}" for name in self.lists] for unit in units]
        return [
            [f"{m}.{key}" for m in inside for key, _ in model.get_submodule(m).named_parameters()] for inside in modules
        ]

    def is_zero(self, model: nn.Module, slices: Iterable[UnitSlice]) -> Tensor:
        """(units,) bool, or (choices, units): whether the slices of a unit are zero, all of them."""
        units = [p.by_unit(model.get_parameter(p.name).detach(), self.units, self.choices) for p in slices]
        return torch.stack([(entries == 0).all(-1) for entries in units]).all(0)


def selected(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Some positions of a tensor along a dimension.

    Args:
        tensor: The tensor.
        dim: The dimension.
        index: (n,) int64, or (slabs, n) with other positions for each slab along the first dimension.
    """
    index = index.to(tensor.device)
    if index.ndim == 1:
        return tensor.index_select(dim, index)
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = index.shape
    sizes = [*tensor.shape]
    sizes[dim] = index.shape[1]
    return tensor.gather(dim, index.view(shape).expand(sizes))


def staying_mask(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Bool, shaped like a tensor: True at some positions along a dimension; arguments as :func:`selected`."""
    shape = [1] * tensor.ndim
    shape[dim] = -1
    along = torch.zeros(tensor.shape[dim], dtype=torch.bool)
    if index.ndim == 2:  # for each slab along the first dimension its own
        shape[0] = len(index)
        along = along.repeat(len(index), 1).scatter(1, index.cpu(), True)
    else:
        along[index.cpu()] = True
    return along.view(shape).expand(tensor.shape).to(tensor.device)


def numbered(container: nn.Module) -> list[str]:
    """The keys of a list or dict of modules that end in a number; a dict may hold something else as well."""
    return [key for key in container._modules if key[-1:].isdecimal()]


def weight_names(groups: Iterable[UnitGroup], consumers_only: bool = False) -> list[str]:
    """Names of the weight matrices of some groups, without repetition.

    Args:
        groups: The groups.
        consumers_only: Leave out the matrices that compute the units.
    """
    slices = [piece for group in groups for piece in (group.consumers if consumers_only else group.slices)]
    return list(dict.fromkeys(piece.name for piece in slices if piece.name.endswith(".weight")))


def overlapping_kinds(groups: Sequence[UnitGroup]) -> tuple[UnitGroup, UnitGroup] | None:
    """Two groups of different kinds that hold slices of the same dimension of a parameter, or that share a name."""
    owners: dict[tuple[str, int, bool], UnitGroup] = {}
    for group in groups:
        # A matrix that names what belongs to none of these units may hold units of another kind there.
        slices = [piece for piece in group.slices if not piece.fixed[1]]
        for key in [(group.name, -1, False), *((piece.name, piece.dim, piece.slab > 0) for piece in slices)]:
            owner = owners.setdefault(key, group)
            if owner.kind != group.kind:
                return owner, group
    return None


def plain_weights(name: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """The weight and the bias of a module, as far as it has them.

    Args:
        name: The name of the module, for the message.
        module: The module.

    Raises:
        ArchitectureError: If one of them exists but is not a parameter, so that units could not be cut out of it.
    """
    weights = {}
    for key in ("weight", "bias"):
        parameter = module._parameters.get(key)
        if parameter is not None:
            weights[key] = parameter
        elif isinstance(getattr(module, key, None), Tensor):
            raise ArchitectureError(
                f"{key} of {name} ({type(module).__name__}) is computed from others or a buffer, so no heads, neurons "
                f"or channels can be counted in it or taken out of it: expected a parameter; "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {key!r}) makes one of what is parametrized"
            )
    return weights
