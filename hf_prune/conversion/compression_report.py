"""What a compression or its reverse came to."""

from __future__ import annotations

from dataclasses import dataclass

from hf_prune.utils.formatting import format_count


@dataclass(frozen=True)
class CompressionReport:
    """What became of a checkpoint's weights.

    Args:
        before: Bytes of the weights and masks that were read.
        after: Bytes of those that were written.
        lossy: Whether values were rounded.
        left: Files and folders beside the weights that were not copied.
        card: What became of the part of the model card that hf_prune wrote; empty if it had none.
    """

    before: int
    after: int
    lossy: bool = False
    left: tuple[str, ...] = ()
    card: str = ""

    def __str__(self) -> str:
        times = self.before / self.after if self.after else 0.0
        text = f"{format_count(self.before)}B of weights and masks are now {format_count(self.after)}B: {times:.2f}×"
        lines = [text + (", rounded to int8: measure what that costs" if self.lossy else ", bit for bit the same")]
        lines += [self.card] if self.card else []
        lines += [f"Not copied: {', '.join(self.left)}."] if self.left else []
        return "\n".join(lines)
