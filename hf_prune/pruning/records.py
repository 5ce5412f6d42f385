"""What a pruning says of itself afterwards: the speed that was reached, the polish."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hf_prune.utils.formatting import format_duration


@dataclass(frozen=True)
class PolishRecord:
    """What a polish did: how much it trained, on what, and how close it came.

    Args:
        steps: Steps of the optimiser.
        epochs: Passes over the batches.
        examples: Examples in the batches that were trained on.
        tokens: Tokens in them, without padding; 0 where inputs are no texts.
        trained: Parameters that were trained, removed weights not counted.
        seconds: How long it took, the dense model's outputs included.
        before: Distance to the dense model on batches that were held out, 0 is equal; see
            :meth:`DenseOutputs.distance`.
        after: The same of the weights that were kept, or, where none were, after the training.
        kept: Whether trained weights were kept; they are not where the distance did not fall.
    """

    steps: int
    epochs: int
    examples: int
    tokens: int
    trained: int
    seconds: float
    before: float
    after: float
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One sentence."""
        tokens = f" ({self.tokens:,} tokens)" if self.tokens else ""
        what = (
            f"{self.trained:,} parameters were trained for {self.steps:,} steps and {format_duration(self.seconds)} to "
            f"put out what the model did before this pruning, on {self.examples:,} unlabelled examples{tokens}, "
            f"{self.epochs} times"
        )
        if not self.kept:
            return f"Polish given up: {what}, and the distance on held-out batches did not fall; nothing was kept."
        return f"Polished: {what}; on held-out batches the distance fell from {self.before:.3g} to {self.after:.3g}."


_OF_GENERATION = ("new_tokens", "prefill", "decode")
_FAR = 0.1  # share by which a measured speed-up may miss the predicted one before that is said


@dataclass(frozen=True)
class SpeedRecord:
    """A speed-up that was asked for, predicted and measured.

    Args:
        asked: What was asked for.
        predicted: What the table of measured times predicts.
        measured: What was measured, dense and pruned in turns.
        low: Lower end of its 95 % interval.
        high: Upper end.
        rounds: How many rounds.
        batch_size: Of the workload.
        length: Of the workload, in tokens; of its prompt, if it generates; 0 for images and sound.
        threads: Of PyTorch.
        dtype: Of the weights.
        device: The kind of device.
        new_tokens: How many tokens the workload generates.
        prefill: How many times as fast the prompt is read, if the workload generates.
        decode: How many times as fast each new token is.
    """

    asked: float
    predicted: float
    measured: float
    low: float
    high: float
    rounds: int
    batch_size: int
    length: int
    threads: int
    dtype: str
    device: str
    new_tokens: int = 0
    prefill: float | None = None
    decode: float | None = None

    @property
    def missed(self) -> str:
        """Why this is not the speed-up that was asked for, in a sentence; empty if it is, to within a tenth."""
        if self.measured >= self.asked * (1 - _FAR):
            return ""
        return (
            f"the model is {self.measured:.2f} times as fast, and {self.asked:g} were asked for: too little of its "
            f"time is spent in what may be removed, or the machine is busy; ask for less, for a larger workload, or "
            f"remove layers as well"
        )

    def with_prediction(self, asked: float, predicted: float) -> SpeedRecord:
        """The same record with the speed-up that was asked for and the predicted one."""
        return dataclasses.replace(self, asked=asked, predicted=predicted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without what only a generation has, if it is none."""
        values = dataclasses.asdict(self)
        return values if self.new_tokens else {k: v for k, v in values.items() if k not in _OF_GENERATION}

    @property
    def workload(self) -> str:
        """What was timed: ``"batch 1 x 128"``, for a generation also the new tokens; ``"batch of 1"`` of images."""
        new = f", {self.new_tokens} new tokens" if self.new_tokens else ""
        return f"batch {self.batch_size} x {self.length}{new}" if self.length else f"batch of {self.batch_size}"

    def __str__(self) -> str:
        """One or two sentences."""
        few = self.low == 0 and math.isinf(self.high)
        interval = "too few rounds for an interval" if few else f"{self.low:.2f} to {self.high:.2f}"
        text = (
            f"Speed-up asked for: {self.asked:.2f}; foretold by the table of times: {self.predicted:.2f}; measured: "
            f"{self.measured:.2f} ({interval}, {self.rounds} rounds in turns, {self.workload}, {self.dtype}, "
            f"{self.device}, {self.threads} thread(s))."
        )
        if self.prefill is not None and self.decode is not None:
            text += f" Apart: the prompt {self.prefill:.2f}, each new token {self.decode:.2f} times as fast."
        if abs(self.measured / self.predicted - 1) > _FAR:
            text += " Foretold and measured differ by more than 10 %: the machine is busy, or sizes add up otherwise."
        return text
