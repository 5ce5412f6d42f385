"""The interface of a criterion: statistics in, scores out."""

from __future__ import annotations

import dataclasses
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

ANY_SCOPE = frozenset({"row", "layer", "global"})

#: What calibration can gather from labelled batches, one number for each weight.
LABELLED = frozenset({"gradient", "absolute_gradient"})
#: The same, and what it can gather from one example at a time, of the model's own predictions: labels have no say.
GRADIENTS = LABELLED | {"squared_gradient"}
#: What it gathers in the same way of neighbouring weights, too large to hold for all of them: see fisher.py.
CURVATURE = frozenset({"fisher"})
#: What calibration can gather from what flows into a weight: labels are not needed.
INPUTS = frozenset({"input_gram", "input_norm", "input_mean"})
#: What is known besides where the objective is "loss"; criteria do not ask for it.
DIFFERENCES = frozenset({"output_change", "change_products", "output_weight"})
#: How many neighbouring weights share a block of ``fisher``, as in the paper, and where wider units become too large.
FISHER_BLOCK, WIDEST_FISHER_BLOCK = 50, 128
#: What only a training can gather.
TRAINED = frozenset({"training_score"})
STATISTICS = GRADIENTS | CURVATURE | INPUTS | DIFFERENCES | TRAINED


class Select(Protocol):
    """Turns scores into masks with the exact count that the plan asks for; earlier masks are respected.

    Attributes:
        width: How many neighbouring columns are decided together at least: M of N:M, C of RxC blocks, else 1.
        pools: Whether every ``width`` columns have a count of their own, as in N:M.
    """

    @property
    def width(self) -> int:
        """Neighbouring columns in a decision."""

    @property
    def pools(self) -> bool:
        """Counts for every ``width`` columns."""

    def __call__(self, scores: Tensor) -> Tensor:
        """(out, in) scores -> (out, in) bool, True = keep."""

    def columns(self, scores: Tensor, start: int) -> Tensor:
        """Decide some columns, a multiple of ``width``, before the scores of the rest are known.

        Args:
            scores: (out, columns) scores of columns ``start`` and following.
            start: The first of them.

        Returns:
            (out, columns) bool. They lose their share of what the matrix loses; all columns together lose exactly
            what the plan asks for.
        """


@dataclass(frozen=True)
class WeightStats:
    """What is known of one weight besides its values; what a criterion does not need stays None.

    Args:
        seed: A seed of this weight's own, from the config's seed and the parameter's name.
        gradient: (out, in) gradient of the loss, averaged over all calibration examples, float32.
        absolute_gradient: (out, in) absolute gradient of each batch's loss, averaged over the examples, float32.
        squared_gradient: (out, in) squared gradient of each example's predictions, averaged over the examples: the
            diagonal of the Fisher matrix, float32.
        fisher: (out, blocks, size, size) blocks of that matrix on its diagonal: mean of ggᵀ over the examples, with
            g the gradients of ``size`` neighbouring inputs of an output. The last block of each row is padded with
            zeros, float32.
        training_score: (out, in) what a training has learned of each weight, float32.
        columns: How many neighbouring inputs are removed together: C of RxC blocks.
        input_gram: (in, in) mean of xxᵀ over the calibration tokens x that flow into the weight, padding left
            out, float32.
        input_norm: (in,) root mean square of each input over the same tokens, float32.
        input_mean: (in,) mean of each input over the same tokens, float32.
        output_change: (out,) mean of what the outputs lack of those of the dense model, d, float32. This and the
            following are known for the objective "loss" only; tokens then count as much as the predictions depend on
            them, in all means.
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
        """The statistics of some outputs only; those of the inputs serve every output."""
        parts = {
            name: value[rows] for name in GRADIENTS | CURVATURE | TRAINED if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **parts)


def weight_seed(seed: int, name: str) -> int:
    """The seed of one weight, from the config's seed and the parameter's name."""
    return zlib.crc32(f"{seed}:{name}".encode())


class Criterion(ABC):
    """A score for every weight, larger = keep.

    An entry sets the class attributes and implements :meth:`scores`. It must be pure: the same inputs
    give the same scores, and none is changed. A weight that is already exactly zero must get the lowest
    score, since removing it costs nothing.

    Attributes:
        name: The registered name.
        description: One line for ``hf-prune list``.
        paper: Where it comes from.
        needs: The :class:`WeightStats` fields that it needs from calibration.
        scopes: The scopes in which its scores can be compared.
        rowwise: Whether the scores of an output depend on that output's weights and statistics alone, so that a
            few outputs can be scored at a time.
        repairs: Whether :meth:`prune_weight` changes weights that are kept; then it is called with whole matrices.
            In global scope, which knows no mask before it has seen every score, it overrides :meth:`update`.
    """

    name: ClassVar[str]
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
        """Choose the mask of one weight, and repair what is kept where the criterion can.

        Args:
            weight: (out, in).
            stats: What calibration gathered for it.
            select: Turns scores into masks, see :class:`Select`.

        Returns:
            The mask and the weight, both (out, in). The default scores, selects, and calls :meth:`update`.
        """
        keep = select(self.scores(weight, stats))
        return keep, self.update(weight, keep, stats)

    def update(self, weight: Tensor, keep: Tensor, stats: WeightStats) -> Tensor:
        """New values for the weights that stay, whoever chose them.

        Args:
            weight: (out, in), or some of its outputs if the criterion is ``rowwise``.
            keep: Bool of the same shape.
            stats: What calibration gathered for it.

        Returns:
            A tensor like the weight. The default changes nothing.
        """
        return weight
