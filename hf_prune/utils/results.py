"""What every result can do: a short text in a shell, a table with bars in a notebook, a data frame, a picture."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_LINES = 10  # of a text in a shell
_ROWS = 40  # of a table in a notebook
_HEAD = 3  # lines of a longer text before the gap
_STYLE = (
    "background:linear-gradient(to right,rgba(0,114,178,.35) {share:.1f}%,transparent {share:.1f}%);text-align:right"
)


class Result:
    """Base of results: subclasses have ``to_dict()`` and a text, and get everything else from these.

    The table is the list of objects in ``to_dict()``, nested ones flattened as ``outer.inner``; a result without such
    a list is a table of one row, of its numbers and texts.

    Attributes:
        bars: Columns of shares, scores or sizes that are drawn as bars; the first of them is plotted.
        listed: A column that says which rows the table has; empty for all.
    """

    bars: ClassVar[tuple[str, ...]] = ()
    listed: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, Any]]:
        """The table, as flat rows with the same columns."""
        values = self.to_dict()
        for value in values.values():
            if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
                found = [flat(row) for row in value if row.get(self.listed, True)]
                columns = dict.fromkeys(name for row in found for name in row)
                return [{name: row.get(name) for name in columns} for row in found]
        return [flat({name: value for name, value in values.items() if not isinstance(value, list)})]

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a data frame."""
        import pandas

        return pandas.DataFrame(self.rows())

    def plot(self) -> Figure:
        """A bar for each row of the table.

        Raises:
            ValueError: If nothing in the table can be drawn.
        """
        from hf_prune.utils.figures import bar_chart

        rows = self.rows()
        if len(rows) == 1:
            drawn = [(name.replace("_", " "), rows[0][name]) for name in self.bars if _is_number(rows[0].get(name))]
            measure = ""
        else:
            measure = next((name for name in self.bars if any(_is_number(row.get(name)) for row in rows)), "")
            names = [name for name, value in rows[0].items() if isinstance(value, str)][:2] if rows else []
            labels = [", ".join(str(row[name]) for name in names) for row in rows]
            drawn = [
                (label, row[measure]) for label, row in zip(labels, rows, strict=True) if _is_number(row.get(measure))
            ]
        if not drawn:
            raise ValueError(f"{type(self).__name__} has no numbers to draw: print it")
        names, values = [label for label, _ in drawn], [float(value) for _, value in drawn]
        return bar_chart(names, values, measure.replace("_", " "), type(self).__name__)

    def __str__(self) -> str:
        values = {name: value for name, value in self.rows()[0].items() if isinstance(value, int | float)}
        return f"{type(self).__name__}({', '.join(f'{name} {value:.6g}' for name, value in values.items())})"

    def __repr__(self) -> str:
        lines = str(self).splitlines()
        if len(lines) <= _LINES:
            return "\n".join(lines)
        left_out = len(lines) - _LINES + 1
        gap = f"… {left_out} more lines: print() shows them"
        return "\n".join([*lines[:_HEAD], gap, *lines[_HEAD + left_out :]])

    def _repr_html_(self) -> str:
        rows = self.rows()
        columns = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
        most = {name: max((abs(row[name]) for row in rows if _is_number(row[name])), default=0) for name in self.bars
                if name in columns}  # fmt: skip
        head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(_cell(row[name], most.get(name)) for name in columns) + "</tr>" for row in rows[:_ROWS]
        )
        more = f"<p>… and {len(rows) - _ROWS} more rows: to_pandas() has them</p>" if len(rows) > _ROWS else ""
        said = html.escape(repr(self)) if len(rows) == 1 else html.escape(_last_words(str(self)))
        table = "" if len(rows) == 1 else f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"
        return f"<b>{type(self).__name__}</b>{table}<pre>{said}</pre>"


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values without nesting: inner names follow the outer one and a dot; lists of more than four are left out.

    Args:
        values: Plain values.
        before: What their names begin with.

    Example:
        >>> flat({"shape": [2, 3], "after": {"mean": 0.5}})
        {'shape': '2×3', 'after.mean': 0.5}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        elif not (isinstance(value, list | tuple) and len(value) > 4):
            found[before + name] = "×".join(map(str, value)) if isinstance(value, list | tuple) else value
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any, most: float | None) -> str:
    if not _is_number(value):
        return f"<td style='text-align:left'>{'' if value is None else html.escape(str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if not most:
        return f"<td style='text-align:right'>{text}</td>"
    return f"<td style='{_STYLE.format(share=100 * abs(value) / most)}'>{text}</td>"


def _last_words(text: str) -> str:
    """What a text says after its table."""
    lines = text.splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("--") and set(line) <= {"-", " "}]
    if not rules:
        return "\n".join(lines[:_LINES])
    after = next((i for i in range(rules[-1], len(lines)) if not lines[i].strip() or lines[i].endswith(".")), None)
    return "" if after is None else "\n".join(lines[after:]).strip()
