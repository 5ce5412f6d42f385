"""The result of compressing or decompressing a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_prune.utils.formatting import format_count
from hf_prune.utils.results import Result


@dataclass(frozen=True, repr=False)
class CompressionReport(Result):
    """Sizes before and after a compression. Print it.

    Args:
        before: Size of the weights and masks that were read, in bytes.
        after: Size of the weights and masks that were written, in bytes.
        lossy: Whether values were rounded.
        left: Files and folders beside the weights that were not copied.
        card: What happened to our part of the model card; empty if there was none.
    """

    bars = ("before", "after")

    before: int
    after: int
    lossy: bool = False
    left: tuple[str, ...] = ()
    card: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "left": list(self.left)}

    def __str__(self) -> str:
        times = self.before / self.after if self.after else 0.0
        text = f"{format_count(self.before)}B of weights and masks are now {format_count(self.after)}B: {times:.2f}×"
        lines = [text + (", rounded to int8: measure what that costs" if self.lossy else ", bit for bit the same")]
        lines += [self.card] if self.card else []
        lines += [f"Not copied: {', '.join(self.left)}."] if self.left else []
        return "\n".join(lines)
