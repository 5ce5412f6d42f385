"""What a unit is, in terms of the parameters of one model: a slice from each of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_prune.errors import ArchitectureError


@dataclass(frozen=True)
class UnitSlice:
    """Where the units of a site lie in one parameter.

    Args:
        name: The parameter.
        dim: The dimension along which they lie.
        width: How many neighbours along it belong to one unit.
        offsets: Where the first unit begins; several where one matrix holds several projections.
    """

    name: str
    dim: int
    width: int
    offsets: tuple[int, ...] = (0,)

    def index(self, units: Tensor) -> Tensor:
        """Positions along :attr:`dim` that belong to units.

        Args:
            units: (n,) int64.

        Returns:
            (offsets * n * width,) int64.
        """
        inside = torch.arange(self.width, device=units.device)
        starts = torch.tensor(self.offsets, device=units.device)[:, None, None]
        return (starts + units[:, None] * self.width + inside).reshape(-1)

    def by_unit(self, tensor: Tensor, units: int) -> Tensor:
        """(units, rest): what of a tensor shaped like the parameter belongs to each unit."""
        flat = tensor.movedim(self.dim, 0).reshape(tensor.shape[self.dim], -1)
        index = self.index(torch.arange(units, device=tensor.device)).view(len(self.offsets), units, self.width)
        return flat[index].movedim(1, 0).reshape(units, -1)  # (offsets, units, width, rest) -> (units, all of it)


@dataclass(frozen=True)
class UnitGroup:
    """One attention or feed-forward network, or the inside of a convolutional block.

    Where all layers share their heads, a site is those of a whole stack.

    Args:
        name: The matrix that consumes what the units compute, from the base model; of several layers, the first one's.
        kind: ``"head"``, ``"neuron"`` or ``"channel"``.
        layers: The layers that it is in, as (list of layers, number).
        units: How many there are.
        producers: Weights and biases whose outputs the units are.
        consumers: Weights whose inputs they are.
        values: Of the producers those without which a unit puts out zero; none are named for neurons.
        counts: Attributes of modules that grow with the number of units.
        minimum: How many units have to stay.
        config: Attributes of the model's config that can tell another number of units.
        per_unit: What one unit adds to each of these.
        size: The size of a head, and the attribute of the config that holds it; None for others.
        buffers: Buffers with a part for each unit, such as the running mean of a norm.
    """

    name: str
    kind: str
    layers: tuple[tuple[str, int], ...]
    units: int
    producers: tuple[UnitSlice, ...]
    consumers: tuple[UnitSlice, ...]
    values: tuple[UnitSlice, ...]
    counts: tuple[tuple[str, str], ...]
    minimum: int
    config: tuple[str, ...]
    per_unit: tuple[int, ...]
    size: tuple[int, str] | None
    buffers: tuple[UnitSlice, ...] = ()

    @property
    def parts(self) -> tuple[UnitSlice, ...]:
        """All parts."""
        return self.producers + self.consumers

    def parameters_per_unit(self, parameters: Mapping[str, Tensor]) -> int:
        """How many parameters go with one unit, also where none is left."""
        shapes = {part: list(parameters[part.name].shape) for part in self.parts}
        for part, shape in shapes.items():
            del shape[part.dim]
        return sum(len(part.offsets) * part.width * math.prod(shape) for part, shape in shapes.items())


def plain_weights(name: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """The weight and the bias of a module, as far as it has them.

    Args:
        name: Of the module, for the message.
        module: The module.

    Raises:
        ArchitectureError: If one is there, but is no parameter: units could not be taken out of it.
    """
    found = {}
    for key in ("weight", "bias"):
        parameter = module._parameters.get(key)
        if parameter is not None:
            found[key] = parameter
        elif isinstance(getattr(module, key, None), Tensor):
            raise ArchitectureError(
                f"{key} of {name} ({type(module).__name__}) is computed from others or a buffer, so no heads, neurons "
                f"or channels can be counted in it or taken out of it: expected a parameter; "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, {key!r}) makes one of what is parametrized"
            )
    return found
