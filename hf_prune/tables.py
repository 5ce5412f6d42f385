"""Plain-text tables and numbers for people."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align cells under a header and a rule.

    Args:
        header: Column titles.
        rows: Cells, as many per row as there are titles.
        left: How many leading columns are aligned left; the others are numbers, aligned right.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in [header, *rows]
    ]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def format_count(number: float) -> str:
    """A number with a decimal unit prefix, three significant digits: 54037406 -> '54.0 M'."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:.3g} {unit}" if abs(number) < 100 else f"{number:.0f} {unit}"
        number /= 1000
    raise AssertionError
