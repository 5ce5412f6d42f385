"""What a kind of task has to say of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.classification import check_padding, longest_input, pad
from hf_prune.evaluation.examples.metrics import Metric
from hf_prune.utils.column_names import usual_column
from hf_prune.utils.forward import run_model


@dataclass(frozen=True)
class Columns:
    """Which columns hold what a model reads, and what it should say.

    Args:
        inputs: What it reads.
        label: What it should say.
    """

    inputs: tuple[str, ...]
    label: str

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.inputs, self.label]


class ExampleKind:
    """A kind of task; each is a class of its own that says what is read, predicted and kept of an example."""

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]  # by the names that options have; the first is the default
    reads_media: ClassVar[bool] = False  # a processor reads the inputs, and no tokenizer
    least_rows: ClassVar[int] = 2  # of data that say how sure a score is
    several_labels: ClassVar[bool] = False  # whether distributions are logits, of labels that do not exclude each other
    chunk: ClassVar[int] = 1  # forward passes that an example may take, at most

    @property
    def has_distributions(self) -> bool:
        """Whether :meth:`distributions` says what is predicted for each example."""
        return type(self).distributions is not ExampleKind.distributions

    def metric(self, name: str | None) -> Metric:
        """The metric with a name; the default one for None.

        Raises:
            ConfigError: If this kind of task has no such metric.
        """
        name = next(iter(self.metrics)) if name is None else name
        if name not in self.metrics:
            raise ConfigError(f"metric is {name!r}: of {self.name}, expected one of {', '.join(self.metrics)}")
        return self.metrics[name]

    def guesses(self, rows: Any) -> list[Any]:
        """What would be kept of the examples from models that give the same answer whatever they read.

        Args:
            rows: (n, columns) what is kept.

        Returns:
            Arrays like it; empty where such a model scores nothing.
        """
        return []

    def columns(self, available: Sequence[str], where: str, texts: Sequence[str] | None, label: str | None) -> Columns:
        """The columns, as named or by their usual names.

        Raises:
            DataError: If one is not there.
        """
        raise NotImplementedError

    def check(self, model: Any, reader: Any) -> None:
        """Make sure that a model is for this kind of task, and that its tokenizer fits.

        Raises:
            DataError: If not.
        """
        check_padding(reader, model)

    def longest(self, model: Any, reader: Any, wanted: int | None) -> int:
        """The maximum number of tokens of an input."""
        return longest_input(reader, model, wanted)

    def encode(
        self, model: Any, reader: Any, rows: Sequence[Mapping[str, Any]], columns: Columns, longest: int
    ) -> list[dict[str, Any]]:
        """One dict per example: its ``inputs``, not padded, its ``labels`` as a loss takes them, and what judges it.

        Raises:
            DataError: If a row is of no use; the message has its number, counted from 1.
        """
        raise NotImplementedError

    def collate(
        self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]], labels: bool
    ) -> dict[str, Tensor]:
        """Examples as one batch, with their labels for a loss if they are asked for."""
        batch = pad(reader, [example["inputs"] for example in examples], "right")
        if labels:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch

    def scored_batch(self, model: Any, reader: Any, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Examples as the batch that :meth:`answer` reads."""
        return self.collate(model, reader, examples, False)

    def answer(self, model: Any, reader: Any, batch: Mapping[str, Tensor]) -> Any:
        """What the model says of a batch."""
        return run_model(model, batch, DataError)

    def judge(
        self, model: Any, reader: Any, outputs: Any, examples: Sequence[Mapping[str, Any]]
    ) -> list[Sequence[float]]:
        """What is kept of each example, see the metrics of this kind."""
        raise NotImplementedError

    def distributions(self, model: Any, outputs: Any) -> Tensor | None:
        """What the model predicts for each example, (batch, classes): log-probabilities, or logits of several labels.

        None where an example has no single distribution; then nothing is said about how far predictions moved.
        """
        return None


def choose_column(available: Sequence[str], where: str, named: str | None, usual: Sequence[str], option: str) -> str:
    """The column that is named, or else the first with a usual name.

    Args:
        available: The columns of the data.
        where: The data, for messages.
        named: The name, if one is given.
        usual: The usual names.
        option: What names it, for messages.

    Raises:
        DataError: If it is not there.
    """
    if named is not None and named in available:
        return named
    found = None if named is not None else usual_column(available, usual)
    if found is None:
        wanted = repr(named) if named is not None else f"with a usual name ({', '.join(usual)})"
        raise DataError(f"{where} has no column {wanted} (found: {', '.join(available)}): name it with {option}")
    return found


def class_distributions(model: Any, outputs: Any) -> Tensor:
    """(batch, classes) float32 log-probabilities, of logits (batch, classes)."""
    return logits_of(outputs, model, 2).double().log_softmax(-1).float()


def logits_of(outputs: Any, model: Any, dims: int) -> Tensor:
    """The logits of a batch, on the CPU in float32.

    Raises:
        DataError: If there are none, or they are not finite.
    """
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != dims:
        returned = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no logits"
        raise DataError(f"{type(model).__name__} returns {returned}: expected {dims} dimensions")
    if not bool(torch.isfinite(logits).all()):
        raise DataError(
            f"{type(model).__name__} returns NaN or infinity: its weights are broken, or {logits.dtype} overflows: "
            f"load it in float32 or bfloat16"
        )
    return logits.float().cpu()
