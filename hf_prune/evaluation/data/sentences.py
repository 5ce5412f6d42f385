"""Load pairs of texts with scores, and queries with documents, for models of sentence-transformers."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.checks import check_columns, check_texts, column
from hf_prune.evaluation.data.loading import load_classification, read_split
from hf_prune.evaluation.sentence_result import METRICS, NDCG, SPEARMAN

if TYPE_CHECKING:
    from datasets import Dataset

_PAIRS = (("sentence1", "sentence2"), ("query", "document"))
_TEXTS = (("sentence",), ("text",))
_SCORES = ("score", "label")
_QUERIES = ("query", "question")  # the first text of a pair whose second one is looked for


@dataclass(frozen=True)
class SentenceColumns:
    """Which columns hold the texts and their score, and how a model is scored on them.

    Args:
        texts: The two columns of texts.
        score: The column of the score; None if every row is a query with a relevant document.
        metric: ``"Spearman"`` or ``"nDCG@10"``.
    """

    texts: tuple[str, str]
    score: str | None
    metric: str

    @property
    def names(self) -> list[str]:
        """All columns."""
        return [*self.texts, *([self.score] if self.score else [])]


def sentence_columns(
    available: Collection[str],
    where: str,
    text_columns: Sequence[str] | None = None,
    score_column: str | None = None,
    metric: str | None = None,
) -> SentenceColumns:
    """Find the columns of scored texts.

    Args:
        available: The columns of the data.
        where: The data, for messages.
        text_columns: The two columns of texts; None for ``sentence1`` and ``sentence2``, or ``query`` and ``document``.
        score_column: The column of the score; None for ``score`` or ``label``.
        metric: ``"spearman"`` or ``"ndcg"``; None for ``"ndcg"`` where the first text is a query or a question.

    Raises:
        ConfigError: If the metric is unknown, or not two columns are named.
        DataError: If a column is missing.
    """
    if metric is not None and metric not in METRICS:
        raise ConfigError(f"metric is {metric!r}: expected one of {', '.join(METRICS)}")
    found = ", ".join(available)
    if text_columns is None:
        text_columns = next((pair for pair in _PAIRS if set(pair) <= set(available)), None)
        if text_columns is None:
            raise DataError(
                f"{where} has the columns {found}: expected {' or '.join(' and '.join(pair) for pair in _PAIRS)}; name "
                f"the two columns of texts with text_columns (--text-column first,second)"
            )
    if isinstance(text_columns, str) or len(text_columns) != 2:
        raise ConfigError(f"text_columns is {text_columns!r}: expected two columns, of the texts to compare")
    first, second = text_columns
    chosen = METRICS[metric] if metric else (NDCG if first.startswith(_QUERIES) else SPEARMAN)
    names = [score_column] if score_column else [name for name in _SCORES if name in available]
    if missing := [name for name in (first, second, *names[:1]) if name not in available]:
        raise DataError(f"{where} has no column {missing[0]!r} (found: {found}): name the columns")
    if not names and chosen == SPEARMAN:
        raise DataError(
            f"{where} has no column {' or '.join(map(repr, _SCORES))} (found: {found}): name the one that says how "
            f"similar the texts are with score_column (--label-column)"
        )
    return SentenceColumns((first, second), names[0] if names else None, chosen)


def load_sentences(
    source: str | os.PathLike[str],
    split: str,
    *,
    text_columns: Sequence[str] | None = None,
    score_column: str | None = None,
    metric: str | None = None,
) -> Dataset:
    """Load pairs of texts with a score, as STS has them, or queries with documents, and check every row.

    Args:
        source: A file, a folder or a Hub id, as for :func:`hf_prune.load_classification`.
        split: Name of the split; a file is one by itself.
        text_columns: As for :func:`sentence_columns`.
        score_column: The same; of queries and documents, how relevant a document is, 0 or more. Without such a column
            the document of every row is relevant.
        metric: The same.

    Returns:
        A data set with the columns of texts (str) and, if there is one, the column of scores (float).

    Raises:
        ConfigError: As of :func:`sentence_columns`.
        DataError: If the data cannot be found or read, a column is missing, or a row is not usable; the message has the
            row number, counted from 1 without the header.

    Example:
        >>> load_sentences("stsb.tsv", "validation")[0]  # doctest: +SKIP
        {'sentence1': 'A man is playing.', 'sentence2': 'A man plays.', 'score': 4.2}
    """
    content, where = read_split(os.fspath(source), split, texts=False)
    dataset: Any = content
    columns = sentence_columns(dataset.column_names, where, text_columns, score_column, metric)
    check_columns(dataset, columns.names, where)
    dataset = dataset.select_columns(columns.names)
    if len(dataset) == 0:
        raise DataError(f"{where} has no rows: expected at least one")
    for name in columns.texts:
        check_texts(column(dataset, name), name, where)
    if columns.score is None:
        return dataset
    scores = [_number(value, row, columns, where) for row, value in enumerate(column(dataset, columns.score), start=1)]
    return dataset.remove_columns(columns.score).add_column(columns.score, scores)


def load_unscored(
    source: str | os.PathLike[str], split: str, text_columns: Sequence[str] | None = None, *, pairs: bool = False
) -> list[Any]:
    """The texts of a split to calibrate on, each once, whatever their scores; in a text file, every line is a text.

    Args:
        source: As for :func:`load_sentences`.
        split: The same.
        text_columns: The columns of texts; None for those of :func:`load_sentences`, ``sentence`` or ``text``.
        pairs: Whether a model reads the two texts of a row together.

    Returns:
        Texts, or pairs of them.

    Raises:
        DataError: If the data cannot be found or read, a column is missing, or a row is not usable.
    """
    content, where = read_split(os.fspath(source), split, texts=not pairs)
    names = text_columns
    if not isinstance(content, Path) and names is None:
        known = [*_PAIRS, *(() if pairs else _TEXTS)]
        names = next((some for some in known if set(some) <= set(content.column_names)), None)
        if names is None:
            raise DataError(
                f"{where} has the columns {', '.join(content.column_names)}: expected "
                f"{' or '.join(' and '.join(some) for some in known)}; name the columns of texts with text_columns "
                f"(--text-column)"
            )
    if pairs and (names is None or len(names) != 2):
        raise DataError(
            f"text_columns is {names!r}: expected two columns, since a CrossEncoder reads pairs of texts "
            f"(--text-column first,second)"
        )
    chosen = names or _TEXTS[-1]
    data = load_classification(source, split, text_columns=chosen, label_column=None)
    rows = list(zip(*(column(data, name) for name in chosen), strict=True))
    return list(dict.fromkeys(rows if pairs else (text for row in rows for text in row)))


def _number(value: object, row: int, columns: SentenceColumns, where: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (columns.metric == NDCG and number < 0):
        expected = "a number" if columns.metric == SPEARMAN else "a number, 0 or more"
        raise DataError(f"row {row} of {where}: {columns.score!r} is {value!r}, expected {expected}")
    return number
