"""Gradients of the weights of a model that are read block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_prune.calibration.descent import Descent, Stage, Window
from hf_prune.calibration.gradients import GradientSums, count_labelled, no_parameter_gradients
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.losses import LabelledLoss, example_loss, split_examples
from hf_prune.calibration.output_head import HeadFinder
from hf_prune.criteria.base import LABELLED, derived_seed
from hf_prune.kernels.matrix import Target
from hf_prune.utils.forward import batch_to_device

Hold = Callable[[Iterable[str]], Mapping[str, Tensor]]
"""Puts the weights of these names into the model and no others, with gradients, and returns them."""


class Losses(Protocol):
    """What gradients are taken of."""

    def windows(self, batch: Window) -> Sequence[Window]:
        """A batch as what runs at once."""

    def gradients(
        self, stage: Stage, weights: Sequence[Tensor], again: bool = False
    ) -> Iterator[tuple[int, int, list[Tensor | None]]]:
        """The number of each batch, the number of examples, and the gradients of the weights, of a batch or an example.

        Args:
            stage: The stage that holds the weights.
            weights: The weights.
            again: Whether the stage runs once more afterwards.
        """


class BatchLosses:
    """The loss of each batch with its labels, see :func:`~hf_prune.calibration.gradients.mean_gradients`.

    Args:
        reader: Runs the model.
        batches: With labels.
    """

    def __init__(self, reader: InputReader, batches: Sequence[Window]) -> None:
        self._reader, self._batches = reader, batches
        self._find_head = HeadFinder(reader.model, reader.forward)
        self._sizes: dict[int, int] = {}

    def windows(self, batch: Window) -> Sequence[Window]:
        """A batch, window by window if only the inputs of the output layer are needed."""
        return self._loss(batch).windows

    def gradients(
        self, stage: Stage, weights: Sequence[Tensor], again: bool = False
    ) -> Iterator[tuple[int, int, list[Tensor | None]]]:
        """One for each batch; 0 examples if no label counts.

        Raises:
            CalibrationError: If a loss is missing or not finite, or no label counts in any batch.
        """
        for index, calls in stage.batches(again):
            loss = self._loss(batch_to_device(self._reader.model, self._batches[index], self._reader.device))
            self._sizes.setdefault(index, loss.examples)
            for call in calls:
                call.run(partial(self._backwards, index, loss, call.window))
            yield index, self._sizes[index], _taken(weights)
        count_labelled(self._sizes.values())

    def _loss(self, batch: Window) -> LabelledLoss:
        return LabelledLoss(self._reader.model, batch, self._find_head(batch))

    def _backwards(self, index: int, loss: LabelledLoss, window: Window) -> None:
        if (value := loss.of(self._reader.forward, window)) is None:
            self._sizes[index] = 0
        else:
            value.backward()


class ExampleLosses:
    """The predictions of one example at a time, see :func:`~hf_prune.calibration.gradients.example_gradients`.

    Args:
        reader: Runs the model.
        seed: Seed of random labels and directions.
    """

    def __init__(self, reader: InputReader, seed: int) -> None:
        self._reader, self._seed = reader, seed
        self._find_head = HeadFinder(reader.model, reader.forward)

    def windows(self, batch: Window) -> Sequence[Window]:
        """The examples of a batch."""
        return list(split_examples(self._reader.model, batch))

    def gradients(
        self, stage: Stage, weights: Sequence[Tensor], again: bool = False
    ) -> Iterator[tuple[int, int, list[Tensor | None]]]:
        """One for each example.

        Raises:
            CalibrationError: If an output is not finite.
        """
        for index, calls in stage.batches(again):
            for call in calls:
                head = self._find_head(call.window)  # which may run the model: not while blocks are replayed
                generator = torch.Generator().manual_seed(derived_seed(self._seed, index, call.part))
                call.run(partial(self._backwards, call.window, generator, head))
                yield index, 1, _taken(weights)

    def _backwards(self, example: Window, generator: torch.Generator, head: Any) -> None:
        example_loss(self._reader.model, self._reader.forward, example, generator, head).backward()


def gradients_by_blocks(
    reader: InputReader,
    batches: Sequence[Window],
    needs: frozenset[str],
    seed: int,
    hold: Hold,
    progress: bool | None = None,
    cache_bytes: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[tuple[Target, dict[str, Tensor]]]:
    """The gradients that :func:`~hf_prune.calibration.statistics.collect_stats` gathers, one block at a time.

    Args:
        reader: As of :class:`~hf_prune.calibration.descent.Descent`.
        batches: Those of the reader, with their labels where these are needed.
        needs: Which gradients, see :class:`~hf_prune.criteria.base.WeightStats`.
        seed: Seed of random labels and directions.
        hold: Puts weights into the model.
        progress: Show a progress bar.
        cache_bytes: How much of what blocks return is kept in memory.
        folder: Where the rest goes; None for the system's temporary folder.

    Yields:
        Targets, and (out, in) means over the examples by what is needed; a target comes several times if what is
        needed takes several passes.

    Raises:
        PlanError: If the model is no single sequence of blocks, each of which reads what the one before it returned.
        CalibrationError: If batches are unusable, or a gradient is not finite.
    """
    passes: list[tuple[Losses, frozenset[str]]] = []
    if labelled := needs & LABELLED:
        passes.append((BatchLosses(reader, batches), labelled))
    if rest := needs - LABELLED:
        passes.append((ExampleLosses(reader, seed), rest))
    for losses, needed in passes:
        descent = Descent(reader, cache_bytes, folder, losses.windows, batches)
        with no_parameter_gradients(reader.model):
            for stage in descent.stages(progress, "Calibrating"):
                weights = hold([t.name for t in stage.targets])
                sums = GradientSums(weights, needed)
                examples = 0
                for _, size, gradients in losses.gradients(stage, list(weights.values())):
                    sums.add(gradients, size)
                    examples += size
                means = sums.means(examples)
                for t in stage.targets:
                    yield t, {need: t.matrix(means[need].pop(t.name)) for need in needed}
                hold(())


def _taken(weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that were added up in some weights, which have none then."""
    gradients = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return gradients
