"""The interface of a criterion: statistics in, scores out."""

from __future__ import annotations

import dataclasses
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor

ANY_SCOPE = frozenset({"row", "layer", "global"})

#: Statistics that calibration gathers from labelled batches, one number for each weight.
LABELLED = frozenset({"gradient", "absolute_gradient"})
#: These, and one that it gathers from the model's own predictions for one example at a time, without labels.
GRADIENTS = LABELLED | {"squared_gradient"}
#: The same for pairs of neighbouring weights, too large to hold for a whole model: see ``pruning/fisher.py``.
CURVATURE = frozenset({"fisher"})
#: Statistics of the inputs of a weight: no labels are needed.
INPUTS = frozenset({"input_gram", "input_norm", "input_mean"})
#: Statistics that come with the objective "loss"; criteria do not ask for them.
DIFFERENCES = frozenset({"output_change", "change_products", "output_weight"})
#: How many neighbouring weights share a block of ``fisher``, as in the paper, and the widest unit that fits in one.
FISHER_BLOCK, WIDEST_FISHER_BLOCK = 50, 128
#: Statistics that only a training gathers.
TRAINED = frozenset({"training_score"})
STATISTICS = GRADIENTS | CURVATURE | INPUTS | DIFFERENCES | TRAINED


class Select(Protocol):
    """Turns scores into masks with the exact count that the plan asks for; weights removed earlier stay removed.

    Attributes:
        width: The smallest number of neighbouring columns that are decided together: M of N:M, C of RxC blocks, else 1.
        pools: Whether every ``width`` columns are a pool of their own, as in N:M.
    """

    @property
    def width(self) -> int:
        """The smallest number of neighbouring columns that are decided together."""

    @property
    def pools(self) -> bool:
        """Whether every ``width`` columns are a pool of their own."""

    def __call__(self, scores: Tensor) -> Tensor:
        """(out, in) scores -> (out, in) bool, True = keep."""

    def columns(self, scores: Tensor, start: int) -> Tensor:
        """Decide on some columns, a multiple of ``width``, before the scores of the later ones are known.

        Args:
            scores: (out, columns) scores of the columns from ``start`` on.
            start: The first column.

        Returns:
            (out, columns) bool. Each call removes its share, and after the last one exactly as many weights are removed
            as the plan asks for.
        """


@dataclass(frozen=True)
class WeightStats:
    """The statistics of one weight matrix; those that a criterion does not need are None.

    Where experts lie in one parameter, statistics of the inputs have one part for each of them, as a first dimension,
    until :meth:`slab` takes one expert's. Criteria never see more than one.

    Args:
        seed: The seed of this matrix, see :func:`derived_seed`.
        gradient: (out, in) gradient of the loss, averaged over all calibration examples, float32.
        absolute_gradient: (out, in) absolute gradient of each batch's loss, averaged over the examples, float32.
        squared_gradient: (out, in) squared gradient of each example's predictions, averaged over the examples: the
            diagonal of the Fisher matrix, float32.
        fisher: (out, blocks, size, size) blocks of that matrix on its diagonal: mean of ggᵀ over the examples, with
            g the gradients of ``size`` neighbouring inputs of an output. The last block of each row is padded with
            zeros, float32.
        training_score: (out, in) score that a training has gathered for each weight, float32.
        columns: How many neighbouring inputs are removed together: C of RxC blocks.
        input_gram: (in, in) mean of xxᵀ over the calibration tokens x that the weight multiplies, without padding,
            float32.
        input_norm: (in,) root mean square of each input over the same tokens, float32.
        input_mean: (in,) mean of each input over the same tokens, float32.
        output_change: (out,) mean of d, the outputs of the dense model minus those of the pruned one, float32. This
            and the following are known for the objective "loss" only; all means then weigh tokens by how much the
            predictions depend on them.
        change_products: (out, in) mean of dxᵀ, float32.
        output_weight: (out,) mean squared gradient of the predictions with respect to each output, float32.
    """

    seed: int
    gradient: Tensor | None = None
    absolute_gradient: Tensor | None = None
    squared_gradient: Tensor | None = None
    fisher: Tensor | None = None
    input_gram: Tensor | None = None
    input_norm: Tensor | None = None
    input_mean: Tensor | None = None
    output_change: Tensor | None = None
    change_products: Tensor | None = None
    output_weight: Tensor | None = None
    training_score: Tensor | None = None
    columns: int = 1

    def rows(self, rows: slice) -> WeightStats:
        """The statistics of some outputs; statistics of the inputs are the same for every output."""
        parts = {
            name: value[rows] for name in GRADIENTS | CURVATURE | TRAINED if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **parts)

    def slab(self, number: int, rows: slice) -> WeightStats:
        """The statistics of one of several matrices that lie one above the other, each with inputs of its own.

        Args:
            number: Of the matrix: statistics of the inputs have one part for each.
            rows: Its outputs.
        """
        own = {name: value[number] for name in INPUTS if (value := getattr(self, name)) is not None}
        shared = GRADIENTS | CURVATURE | TRAINED | DIFFERENCES
        parts = {name: value[rows] for name in shared if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, seed=derived_seed(self.seed, number), **own, **parts)


def derived_seed(seed: int, *place: object) -> int:
    """A seed from the config's seed and what it is for: the name of a parameter, or the number of a batch."""
    return zlib.crc32(":".join(map(str, (seed, *place))).encode())


@dataclass(frozen=True)
class UnitRanking:
    """How a criterion ranks whole units, such as heads, neurons, experts and layers.

    Args:
        needs: What it learns from, for ``hf-prune list``.
        description: One line for ``hf-prune list``.
        paper: Where it comes from.
        kinds: The kinds of units that it ranks; None for all that do not name their criteria.
    """

    needs: Literal["no data", "texts", "a training"]
    description: str
    paper: str
    kinds: frozenset[str] | None = None


class UnitCriterion:
    """A criterion that ranks whole units only; ``structured`` computes what removing each of them costs.

    Attributes:
        name: The registered name.
        units: How it ranks units.
    """

    name: ClassVar[str]
    units: ClassVar[UnitRanking]


class Criterion(ABC):
    """A score for every weight, larger = keep.

    A subclass sets the class attributes and implements :meth:`scores`. It must be pure: the same inputs give the same
    scores, and no input is changed. A weight that is already exactly zero must get the lowest score, since removing it
    costs nothing.

    Attributes:
        name: The registered name.
        units: How it ranks whole units, if it does.
        description: One line for ``hf-prune list``.
        paper: Where it comes from.
        needs: The :class:`WeightStats` fields that it needs from calibration.
        scopes: The scopes in which its scores can be compared.
        rowwise: Whether the scores of an output depend only on the weights and statistics of that output, so that a
            few outputs can be scored at a time.
        repairs: Whether it changes weights that are kept; :meth:`prune_weight` then gets whole matrices. For global
            scope, where the masks follow only from all scores, it overrides :meth:`update`.
    """

    name: ClassVar[str]
    units: ClassVar[UnitRanking | None] = None
    description: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    scopes: ClassVar[frozenset[str]] = ANY_SCOPE
    rowwise: ClassVar[bool] = True
    repairs: ClassVar[bool] = False

    @abstractmethod
    def scores(self, weight: Tensor, stats: WeightStats) -> Tensor:
        """Score a weight.

        Args:
            weight: (out, in), of any floating-point dtype.
            stats: What calibration gathered for it.

        Returns:
            (out, in) float32, on the weight's device.
        """

    def prune_weight(self, weight: Tensor, stats: WeightStats, select: Select) -> tuple[Tensor, Tensor]:
        """Choose the mask of one weight matrix, and new values for the weights that stay.

        Args:
            weight: (out, in).
            stats: What calibration gathered for it.
            select: Turns scores into masks, see :class:`Select`.

        Returns:
            The mask and the weights, both (out, in). The default scores, selects, and calls :meth:`update`.
        """
        keep = select(self.scores(weight, stats))
        return keep, self.update(weight, keep, stats)

    def update(self, weight: Tensor, keep: Tensor, stats: WeightStats) -> Tensor:
        """New values for the weights that stay under any mask.

        Args:
            weight: (out, in), or only some outputs if the criterion is ``rowwise``.
            keep: Bool of the same shape.
            stats: What calibration gathered for it.

        Returns:
            A tensor like the weight. The default changes nothing.
        """
        return weight
