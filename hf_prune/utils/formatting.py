"""Plain-text tables, CSV, numbers with units, and texts that are safe to print."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Characters that control a terminal, reverse the direction of text, have no width or end lines, and lone surrogates,
# which cannot be printed; without line ends and tabs.
_HIDDEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    r"\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f"
)
_CONTROLS = re.compile(f"[{_HIDDEN}]")
_CONTROLS_OF_A_LINE = re.compile(rf"[{_HIDDEN}\n\t]")
_FORMULAS = tuple("=+-@\t\r\n＝＋－＠")  # a spreadsheet runs cells that begin with these


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align cells under a header and a rule.

    Args:
        header: Column titles.
        rows: Cells, one for each title.
        left: Number of leading columns that are aligned left; the others are aligned right, as numbers.
    """
    rows = [[in_one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in [header, *rows]
    ]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def first_few(values: Sequence[object], most: int = 3) -> str:
    """The first few values separated by commas, with an ellipsis if there are more.

    Args:
        values: The values.
        most: How many to list.
    """
    return ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")


def format_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows as CSV; a text that a spreadsheet would run as a formula gets a leading apostrophe.

    Args:
        columns: The columns, in order.
        rows: Numbers and texts by column.

    Example:
        >>> print(format_csv(["name", "drop"], [{"name": "=1+1", "drop": -0.5}]), end="")
        name,drop
        '=1+1,-0.5
    """

    def safe(cell: Any) -> Any:
        if not isinstance(cell, str):
            return cell
        mark = "'" if cell.lstrip(" ").startswith(_FORMULAS) else ""
        return mark + cell.replace("\r", " ")  # the csv module of older Pythons does not quote it

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for cells in (columns, *([row[name] for name in columns] for row in rows)):
        writer.writerow([safe(cell) for cell in cells])
    return text.getvalue()


def format_workload(batch_size: int, length: int) -> str:
    """What is timed: ``"1 x 128 tokens"``, or of images and sound, whose length is 0, ``"batch of 1"``."""
    return f"{batch_size} x {length} tokens" if length else f"batch of {batch_size}"


def format_count(number: float) -> str:
    """A number with three significant digits and a decimal unit prefix: 54037406 -> '54.0 M'."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:.3g} {unit}" if abs(number) < 100 else f"{number:.0f} {unit}"
        number /= 1000
    raise AssertionError


def printable(text: str) -> str:
    r"""Escape everything in a text that controls a terminal, except line ends and tabs.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return _CONTROLS.sub(_escaped, text)


def in_one_line(text: str) -> str:
    r"""Escape everything in a text that controls a terminal, including line ends and tabs.

    Example:
        >>> in_one_line("a\nerror: b")
        'a\\nerror: b'
    """
    return _CONTROLS_OF_A_LINE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def listing(folder: Path) -> str:
    """The first names in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def display_name(source: str) -> str:
    """The name of a model or data set in tables and plots: that of its folder, or the Hub id."""
    return Path(source).resolve().name if Path(source).exists() else source


def format_duration(seconds: float) -> str:
    """A time as people say it.

    Args:
        seconds: How long.

    Example:
        >>> format_duration(9.25), format_duration(119.7), format_duration(5400)
        ('9.2 s', '2 min 0 s', '1 h 30 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
