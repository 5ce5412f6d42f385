"""Load data sets and texts from files, local folders, the local cache or the Hugging Face Hub, and check every row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import DataError
from hf_prune.evaluation.data.checks import check_columns, check_labels, check_texts, column
from hf_prune.evaluation.data.files import (
    TABLES,
    data_files,
    load_folder,
    read_tables,
    read_text,
    resolve_split,
    same_split,
    text_files,
)
from hf_prune.evaluation.data.hub import hub_repository
from hf_prune.evaluation.data.media import read_media
from hf_prune.evaluation.data.sources import cached_splits, check_table
from hf_prune.utils.hub_access import check_hub_reachable, local_folder

if TYPE_CHECKING:
    from datasets import Dataset


def load_sst2(split: str = "validation", source: str | os.PathLike[str] = "glue/sst2") -> Dataset:
    """Load SST-2, sentences from film reviews labelled 0 (negative) or 1 (positive).

    SST-2 is due to Socher et al., "Recursive Deep Models for Semantic Compositionality Over a Sentiment
    Treebank", EMNLP 2013; the splits to Wang et al., "GLUE", ICLR 2019.

    Args:
        split: ``train`` (67,349 rows) or ``validation`` (872 rows; ``dev`` and ``val`` mean the same).
        source: ``"glue/sst2"`` for the Hub (or the local cache), or a folder with GLUE TSV files
            (``train.tsv``, ``dev.tsv``) or parquet files, directly or in ``data/``, ``SST-2/`` or ``sst2/``.

    Returns:
        A data set with the columns ``sentence`` (str) and ``label`` (int).

    Raises:
        DataError: If the data cannot be found or read, or if the split has no labels (``test``).

    Example:
        >>> load_sst2("dev", source="data/sst2")[0]  # doctest: +SKIP
        {'sentence': "it 's a charming and often affecting journey . ", 'label': 1}
    """
    return load_classification(source, split, text_columns=("sentence",), label_column="label")


def load_classification(
    source: str | os.PathLike[str],
    split: str,
    *,
    text_columns: Sequence[str] = ("sentence",),
    label_column: str | None = "label",
) -> Dataset:
    """Load labelled texts from a local folder, the cache of ``datasets``, or the Hub, and check every row.

    A folder holds one file, or a set of shards, per split: ``train.tsv`` (tabs, no quoting, as GLUE
    writes it), ``.csv``, ``.jsonl`` or ``.parquet``. Such a file by itself is a split, whatever its name.
    A data set from the Hub that is already cached is read from the cache and needs no network. Local
    files are read into memory.

    Args:
        source: Path of a folder or a file, or a Hub id ``owner/name``, with ``:config`` at the end if it has several
            configurations. ``glue/task`` is short for ``nyu-mll/glue:task``. A folder wins over a Hub id.
        split: Name of the split; ``validation``, ``dev`` and ``val`` mean the same.
        text_columns: The columns that hold text.
        label_column: The column that holds the class: integers from 0, or strings. None for texts without labels: then
            text files do as well, in which every line that is not blank is a text.

    Returns:
        A data set with the text columns and the label column only. Labels written as digits become
        integers; other strings are kept.

    Raises:
        DataError: If the data cannot be found or read, a column is missing, or a row is not usable; the
            message has the row number, counted from 1 without the header.

    Example:
        >>> load_classification("glue/mrpc", "train", text_columns=("sentence1", "sentence2"))  # doctest: +SKIP
    """
    content, where = read_split(os.fspath(source), split, texts=label_column is None)
    if isinstance(content, Path):
        return _lines(content, text_columns)
    dataset = content
    if label_column is not None and label_column not in dataset.column_names:
        raise DataError(
            f"{where} has no column {label_column!r} (found: {', '.join(dataset.column_names)}), and without labels it "
            "cannot be scored: name it with label_column, or use a labelled split (train, validation)"
        )
    check_columns(dataset, text_columns, where)
    dataset = dataset.select_columns([*text_columns, *([] if label_column is None else [label_column])])
    if len(dataset) == 0:
        raise DataError(f"{where} has no rows: expected at least one")
    for name in text_columns:
        check_texts(column(dataset, name), name, where)
    if label_column is None:
        return dataset
    labels = column(dataset, label_column)
    checked = check_labels(labels, label_column, where)
    if checked == labels:
        return dataset
    return dataset.remove_columns(label_column).add_column(label_column, checked)


def load_texts(source: str | os.PathLike[str], split: str = "train", *, text_column: str = "text") -> list[str]:
    r"""Load plain text, for language models, from a file, a local folder, the cache of ``datasets``, or the Hub.

    A text file is one text. The files of WikiText (Merity et al. 2016, arXiv:1609.07843), ``wiki.*.raw`` and
    ``wiki.*.tokens``, give a text for each line, empty where the line is blank and else with its line end, as the data
    set on the Hub does: so a file and the Hub lead to the same perplexity. TSV, CSV, JSONL and parquet files give a
    text for each row.

    Args:
        source: A file; or a folder or Hub id as for :func:`load_classification`, where a folder may also hold text
            files, such as ``test.txt`` or ``wiki.test.raw``.
        split: Name of the split; a file is one by itself, whatever its name.
        text_column: The column that holds text, where there are columns.

    Returns:
        The texts, in the order of the data.

    Raises:
        DataError: If the data cannot be found or read, the column is missing, or a row is not a text.

    Example:
        >>> load_texts("wiki.test.raw")[1]  # doctest: +SKIP
        ' = Robert Boulter = \n'
        >>> texts = load_texts("Salesforce/wikitext:wikitext-2-raw-v1", "test")  # doctest: +SKIP
    """
    content, where = read_split(os.fspath(source), split, texts=True)
    if isinstance(content, Path):
        return read_text(content)
    texts = filled_column(content, text_column, where)
    check_texts(texts, text_column, where)
    return texts


def filled_column(dataset: Dataset, name: str, where: str) -> list[Any]:
    """One column of texts or conversations, with at least one row.

    Raises:
        DataError: If it is missing or has no rows.
    """
    if name not in dataset.column_names:
        raise DataError(
            f"{where} has no column {name!r} (found: {', '.join(dataset.column_names)}): name it with text_column"
        )
    if not (values := column(dataset, name)):
        raise DataError(f"{where} has no rows: expected at least one")
    return values


def fingerprint(dataset: Dataset, columns: Sequence[str]) -> str:
    """Hash the contents of a data set, to tell whether two results are on the same data.

    Args:
        dataset: Any data set; its format (torch, numpy) does not matter.
        columns: The columns to hash, in this order.

    Returns:
        16 hexadecimal digits of a SHA-256; the order of the rows matters, file names do not.

    Raises:
        DataError: If a column is missing.

    Example:
        >>> from datasets import Dataset
        >>> fingerprint(Dataset.from_dict({"sentence": ["good"], "label": [1]}), ["sentence", "label"])
        '3df74fb1e67a1618'
    """
    check_columns(dataset, columns, "the data set")
    digest = hashlib.sha256()
    for name in columns:
        digest.update(json.dumps(column(dataset, name), separators=(",", ":"), default=str).encode())
    return digest.hexdigest()[:16]


def read_split(source: str, split: str, *, texts: bool) -> tuple[Dataset | Path, str]:
    """One split of a source: its table, or the path of its text file.

    Args:
        source: A file, a folder or a Hub id.
        split: Name of the split; a file is one by itself.
        texts: Whether text files will do.

    Returns:
        The split, and how to refer to it in messages.

    Raises:
        DataError: If it cannot be found or read.
    """
    if os.path.isfile(source):
        if texts and not source.endswith(TABLES):
            return Path(source), repr(source)
        check_table(source)
        return read_tables([Path(source)]), repr(source)
    where = f"split {split!r} of {source!r}"
    if (folder := local_folder(source, "data")) is None:
        return _load_hub(source, split), where
    if texts and (files := text_files(folder)) and not data_files(folder):
        return files[resolve_split(split, list(files), repr(source))], where
    return load_folder(folder, split), where


def column_names(source: str) -> list[str] | None:
    """The columns of a source, as its first split has them; None for texts without columns.

    Raises:
        DataError: If it cannot be found or read.
    """
    if os.path.isfile(source):
        return read_tables([Path(source)]).column_names if source.endswith(TABLES) else None
    if (folder := local_folder(source, "data")) is None:
        return next(iter(_load_splits(source).values())).column_names
    if files := data_files(folder):
        return read_tables(sorted(files.items())[0][1][:1]).column_names
    return None if text_files(folder) else next(iter(read_media(folder).values())).column_names


def has_split(source: str, split: str) -> bool:
    """Whether a source has splits, and this one among them; a file has none.

    Raises:
        DataError: If it cannot be found or read.
    """
    if os.path.isfile(source):
        return False
    if (folder := local_folder(source, "data")) is None:
        names = list(_load_splits(source))
    else:
        names = list(data_files(folder) or text_files(folder) or read_media(folder))
    return any(same_split(split, name) for name in names)


def _load_hub(source: str, split: str) -> Dataset:
    splits = _load_splits(source)
    return splits[resolve_split(split, list(splits), repr(source))]


def _load_splits(source: str) -> Mapping[str, Dataset]:
    repo_id, config = hub_repository(source)
    splits = cached_splits(repo_id, config)
    if splits is None:
        check_hub_reachable(f"data set {source!r}")
        splits = _download(repo_id, config)
    return splits


def _download(repo_id: str, config: str | None) -> Mapping[str, Dataset]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    from hf_prune.evaluation.data.hub import check_data_card

    try:
        check_data_card(repo_id)
        splits: Mapping[str, Dataset] = load_dataset(repo_id, config)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        name = f"{repo_id}:{config}" if config else repo_id
        raise DataError(f"data set {name!r} cannot be loaded from the Hugging Face Hub: {error}") from error
    return splits


def _lines(path: Path, text_columns: Sequence[str]) -> Dataset:
    """The lines of a text file as rows."""
    from datasets import Dataset

    if len(text_columns) != 1:
        raise DataError(
            f"{str(path)!r} is a text file, which has no columns, and text_columns names {len(text_columns)} of them: "
            f"name one, or pass a table"
        )
    lines = [line for text in read_text(path) for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{str(path)!r} has no text: expected at least one line that is not blank")
    return Dataset.from_dict({text_columns[0]: lines})
