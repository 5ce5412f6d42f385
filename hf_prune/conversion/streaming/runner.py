"""Run batches through a model whose weights are read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hf_prune.calibration.batches import without_labels
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.trial import NotAlikeError
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.meta_model import explaining_meta_errors
from hf_prune.conversion.streaming.output import Output
from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.plan import targets_of
from hf_prune.utils.forward import is_encoder_decoder

Batches = Sequence[Mapping[str, Any]]


class Runner:
    """A model that runs with weights that are read when they are used.

    Args:
        output: Where they are read from.
        batches: Mappings of model inputs.
        cache_bytes: Most bytes of block outputs that are kept in memory.

    Attributes:
        reader: Runs the model, inside a context of weights.
        steps: The targets in the order of their calls.
    """

    def __init__(self, output: Output, batches: Batches, cache_bytes: int) -> None:
        self._output = output
        model = output.meta_model.model
        # An encoder-decoder makes decoder inputs from labels; other models only compute a loss from them.
        self._needs_labels = is_encoder_decoder(model)
        self.batches = list(batches)
        if not self._needs_labels:
            self.batches = [without_labels(model, b) if isinstance(b, Mapping) else b for b in self.batches]
        output.meta_model.load_buffers()
        targets = targets_of(output.plan)
        self.reader = InputReader(
            model, targets, self.batches, cache_bytes=cache_bytes, folder=output.journal.scratch
        )  # fmt: skip
        self.steps: list[list[Target]] = []

    @contextmanager
    def weights(self, with_head: bool = False) -> Iterator[LazyWeights]:
        """The weights are read inside.

        Args:
            with_head: Whether predictions are looked at; otherwise an output embedding that is not pruned is skipped.
        """
        skip = not self._needs_labels and not with_head
        output = self._output
        with LazyWeights(output.meta_model, output.read, output.read_rows, output.targets, skip) as lazy:
            if not self.steps:
                self.steps = self.reader.order()
            yield lazy

    @contextmanager
    def reading_dense(self) -> Iterator[None]:
        """Weights are read as the source has them inside, also where an interrupted run has pruned them."""
        self._output.reads_dense = True
        try:
            yield
        finally:
            self._output.reads_dense = False

    @contextmanager
    def dense(self, with_head: bool = False) -> Iterator[LazyWeights]:
        """The weights of the source are read inside."""
        with self.reading_dense(), self.weights(with_head) as lazy:
            yield lazy

    def recorded(self, lazy: LazyWeights, segments: Iterator[list[list[Target]]]) -> Iterator[list[list[Target]]]:
        """Segments of which each is recorded with the weights of the source."""
        while True:
            lazy.release()
            with self.reading_dense():
                segment = next(segments, None)
            lazy.release()
            if segment is None:
                return
            yield segment


@contextmanager
def running(output: Output, batches: Batches, cache_bytes: int) -> Iterator[Runner]:
    """A model that runs inside with weights that are read when they are used; explains what it cannot do that way."""
    model = output.meta_model.model
    runner = Runner(output, batches, cache_bytes)
    try:
        with explaining_meta_errors(model), runner.reader:
            yield runner
    except NotAlikeError as error:
        raise PlanError(
            f"{type(model).__name__} does not run its blocks alike for every batch, so its dense outputs cannot be "
            f"recorded block by block: choose objective 'layer', or prune without streaming"
        ) from error
