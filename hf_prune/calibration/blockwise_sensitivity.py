"""Sensitivities of a model whose weights are read block by block."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from hf_prune.calibration.descent import Descent
from hf_prune.calibration.gradients import no_parameter_gradients
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.output_head import HeadFinder, join_windows
from hf_prune.calibration.sensitivity import OutputGradients, Sensitivity, run_backwards
from hf_prune.criteria.base import derived_seed
from hf_prune.kernels.matrix import Target


def measure_by_blocks(
    reader: InputReader,
    seed: int,
    progress: bool | None = None,
    cache_bytes: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Sensitivity:
    """What :func:`~hf_prune.calibration.sensitivity.measure_sensitivity` measures, one block at a time.

    Args:
        reader: As of :class:`~hf_prune.calibration.descent.Descent`.
        seed: Seed of random labels and directions.
        progress: Show a progress bar.
        cache_bytes: How much of what blocks return is kept in memory, and again of the sensitivities.
        folder: Where the rest goes; None for the system's temporary folder.

    Raises:
        PlanError: If the model is no single sequence of blocks, each of which reads what the one before it returned.
        CalibrationError: If a gradient is not finite, or the predictions depend on no target.
    """
    descent = Descent(reader, cache_bytes, folder)
    sensitivity = Sensitivity(cache_bytes, folder)
    gradients = OutputGradients(reader)
    seen = itertools.chain(*(reader.holders[t.name] for t in descent.outside))
    find_head = HeadFinder(reader.model, reader.forward, seen)
    try:
        with no_parameter_gradients(reader.model):
            for stage in descent.stages(progress):
                with _watching(reader, stage.targets, gradients):
                    for index, calls in stage.batches():
                        generator = torch.Generator().manual_seed(derived_seed(seed, index))
                        found: list[dict[str, list[Tensor]]] = []
                        for call in calls:
                            head = find_head(call.window)
                            gradients.start()
                            call.run(partial(run_backwards, reader, call.window, head, generator))
                            found.append(gradients.stop())
                        for name, of_calls in join_windows(found).items():
                            sensitivity.add_tokens(name, index, of_calls)
            gradients.hand_on(sensitivity)
    except BaseException:
        sensitivity.close()
        raise
    return sensitivity


@contextmanager
def _watching(reader: InputReader, targets: Iterable[Target], gradients: OutputGradients) -> Iterator[None]:
    """Inside, the gradients at the outputs of some targets are read."""
    with ExitStack() as hooks:
        for t in targets:
            for module in reader.holders[t.name]:
                Watcher(module, gradients.hook(t), after=True).install(hooks, None)
        yield
