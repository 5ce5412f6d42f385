"""Columns of tables by their usual names, whatever their case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "document"),
    ("first", "second"),
)
TEXTS = ("sentence", "text", "content", "review", "document", "comment", "title", "data")
LABELS = ("label", "labels", "class", "target", "category", "sentiment", "score")


def usual_texts(available: Iterable[str]) -> tuple[str, ...]:
    """The columns of texts among some: two for pairs, or one; empty if none has a usual name.

    Example:
        >>> usual_texts(["Id", "Question", "Context"])
        ('Question', 'Context')
    """
    names = _by_lower_case(available)
    wanted = (each for each in (*PAIRS, *((name,) for name in TEXTS)) if set(each) <= names.keys())
    return tuple(names[name] for name in next(wanted, ()))


def usual_column(available: Iterable[str], usual: Sequence[str]) -> str | None:
    """The column among some that has the first of the usual names, None if none has one.

    Args:
        available: The columns of a table.
        usual: Names in lower case, the likeliest first.

    Example:
        >>> usual_column(["Text", "Label"], LABELS)
        'Label'
    """
    names = _by_lower_case(available)
    return next((names[name] for name in usual if name in names), None)


def _by_lower_case(available: Iterable[str]) -> dict[str, str]:
    """Names by their lower case; a name that is in lower case comes before others that differ from it in case only."""
    names = list(available)
    return {name.lower(): name for name in [*reversed(names), *(n for n in names if n == n.lower())]}
