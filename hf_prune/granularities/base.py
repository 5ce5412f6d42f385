"""The interface of a granularity: the units of a regular grid, and the pools in which they compete."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from hf_prune.kernels.blocks import Group, grid_groups
from hf_prune.kernels.matrix import Target

ANY_SCOPE = frozenset({"row", "layer", "global"})


class Granularity(ABC):
    """A grid of units over a canonical (out, in) matrix.

    A subclass sets the class attributes, reads its own spelling in :meth:`parse`, and sets the instance attributes.
    Everything else follows from them.

    Attributes:
        name: The registered name.
        usage: How it is spelled in a config.
        description: One line for ``hf-prune list``.
        paper: The paper that it comes from.
        scopes: The scopes that it can be used with.
        spec: The canonical spelling of this instance.
        block: (outputs, inputs) of one unit, if that does not depend on the matrix.
        pool: How many consecutive units of a row form a pool; None where the scope decides.
        fixed_sparsity: The sparsity that the spelling fixes, or None.
    """

    name: ClassVar[str]
    usage: ClassVar[str]
    description: ClassVar[str]
    paper: ClassVar[str]
    scopes: ClassVar[frozenset[str]] = ANY_SCOPE

    spec: str
    block: tuple[int, int] = (1, 1)
    pool: int | None = None
    fixed_sparsity: float | None = None

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Granularity | None:
        """The instance that ``text`` spells, or None if it spells another granularity.

        Raises:
            ConfigError: If it spells this one, with invalid numbers.
        """

    def misfit(self, target: Target) -> str | None:
        """Why a target cannot be divided into these units, or None if it can."""
        out, inputs = target.slab_shape
        rows, columns = self.block_in(target.slab_shape)
        if out % rows:
            return f"its {out} outputs are not a multiple of {rows}"
        if columns != inputs and target.inputs % columns:
            return f"its {target.inputs} inputs are not a multiple of {columns}"
        if self.pool is not None and target.inputs % self.pool:
            return f"its {target.inputs} inputs are not a multiple of {self.pool}"
        return None

    def block_in(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(outputs, inputs) of one unit of a matrix of the given shape."""
        return self.block

    def units(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many units lie along the outputs and the inputs of a matrix of the given shape."""
        rows, columns = self.block_in(shape)
        return shape[0] // rows, shape[1] // columns

    def grid(self, target: Target) -> tuple[int, int]:
        """How many units lie along the outputs and the inputs of a target's matrix; none lies in two slabs."""
        rows, columns = self.units(target.slab_shape)
        return target.slabs * rows, columns

    def groups(self, tensor: str, shape: tuple[int, int]) -> Iterator[Group]:
        """The units one by one: the definition, for tests and small tensors."""
        return grid_groups(tensor, shape, self.block_in(shape), self.pool)
