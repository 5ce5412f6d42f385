"""Where models and data come from: a local folder, the local cache, or the Hugging Face Hub.

Without a network the Hugging Face libraries retry for half a minute. The functions here ask once,
for less than a second, and then say what was wanted, what went wrong and what to do instead.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

HUB_TIMEOUT = 0.8  # seconds; a call stays under one second, plus importing huggingface_hub the first time
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_SUBFOLDERS = ("", "data", "SST-2", "sst2")
_TABLES = (".tsv", ".csv", ".jsonl", ".parquet")
_SPLIT_ALIASES = ("validation", "dev", "val", "valid")
_DATA_FILE = re.compile(r"(?P<split>\w+?)(-\d{5}-of-(?P<shards>\d{5}))?\.(?P<format>tsv|csv|jsonl|parquet)")
_TEXT_FILE = re.compile(r"(wiki\.)?(?P<split>\w+)\.(txt|raw|tokens)")
_WIKITEXT_FILE = re.compile(r"wiki\..*\.(raw|tokens)")


def check_model_source(
    model_id: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | Path | None = None
) -> bool:
    """Make sure that a model can be loaded from where it is said to be, before any long work.

    A local folder needs a ``config.json``. A Hub id is fine if its ``config.json`` is in the local
    cache or if the Hub answers; whether the Hub has that model is left to ``from_pretrained``.

    Args:
        model_id: Path of a folder, or a Hub id such as ``"owner/name"``. A folder wins over a Hub id.
        revision: Branch, tag or commit on the Hub; ``main`` if None.
        cache_dir: Cache folder of the Hub client; its default if None.

    Returns:
        Whether to load with ``local_files_only=True``: the Hub does not answer, but the model is cached.

    Raises:
        DataError: If the folder does not exist or holds no model, if the id is malformed, or if the
            model is not cached and the Hub does not answer.

    Example:
        >>> check_model_source("./no-such-model")
        Traceback (most recent call last):
        hf_prune.errors.DataError: no such folder: './no-such-model'. Pass a folder ...
    """
    source = os.fspath(model_id)
    if _local_folder(source, "a model") is not None:
        if not os.path.isfile(os.path.join(source, "config.json")):
            raise DataError(
                f"{source!r} is a folder without config.json (found: {_listing(Path(source))}): "
                "pass the folder that save_pretrained wrote"
            )
        return False
    from huggingface_hub import try_to_load_from_cache

    _check_repo_id(source, "a model")
    try:
        check_hub_reachable(f"model {source!r}")
    except DataError:
        if not isinstance(try_to_load_from_cache(source, "config.json", cache_dir=cache_dir, revision=revision), str):
            raise
        return True
    return False


def check_data_source(source: str | os.PathLike[str]) -> None:
    """Make sure that a data set can be loaded from where it is said to be, before any long work.

    Args:
        source: As for :func:`load_classification`.

    Raises:
        DataError: If the folder does not exist, if the id is malformed, or if the data set is not cached and
            the Hub does not answer.

    Example:
        >>> check_data_source("./no-such-data")
        Traceback (most recent call last):
        hf_prune.errors.DataError: no such folder: './no-such-data'. Pass a folder ...
    """
    source = os.fspath(source)
    if _local_folder(source, "data") is None and _from_cache(*_repository(source)) is None:
        check_hub_reachable(f"data set {source!r}")


def check_text_source(source: str | os.PathLike[str]) -> None:
    """Make sure that texts can be loaded from where they are said to be, before any long work.

    Args:
        source: As for :func:`load_texts`.

    Raises:
        DataError: As :func:`check_data_source`; a file is fine.

    Example:
        >>> check_text_source("./no-such-file.txt")
        Traceback (most recent call last):
        hf_prune.errors.DataError: no such file or folder: './no-such-file.txt'. Pass a text file, ...
    """
    if not os.path.isfile(source):
        if os.fspath(source).endswith((".txt", ".raw", ".tokens", *_TABLES)):
            raise DataError(
                f"no such file or folder: {os.fspath(source)!r}. Pass a text file, a folder that holds data, or a Hub "
                f"id (owner/name)"
            )
        check_data_source(source)


def model_class(source: str | os.PathLike[str]) -> str:
    """The class that a checkpoint's config names, without loading weights or libraries.

    Args:
        source: Folder or Hub id.

    Returns:
        Such as ``"LlamaForCausalLM"``; empty if the config names none.

    Raises:
        DataError: If the checkpoint cannot be found, or its config is no JSON object.

    Example:
        >>> model_class("./model")  # doctest: +SKIP
        'LlamaForCausalLM'
    """
    offline = check_model_source(source)
    path = os.path.join(source, "config.json")
    if not os.path.isdir(source):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            path = hf_hub_download(os.fspath(source), "config.json", local_files_only=offline)
        except HfHubHTTPError as error:
            raise DataError(
                f"model {os.fspath(source)!r} cannot be loaded from the Hugging Face Hub: {error}"
            ) from error
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        names = config.get("architectures") or [""]
    except (ValueError, AttributeError) as error:
        raise DataError(f"the config.json of {os.fspath(source)!r} is no JSON object: {error}") from error
    return str(names[0])


def is_language_model(class_name: str) -> bool:
    """Whether a class of transformers is a causal language model, by its name."""
    return class_name.endswith(("ForCausalLM", "LMHeadModel"))


def check_hub_reachable(what: str) -> None:
    """Ask the Hugging Face Hub for a sign of life, and fail at once if there is none.

    Any HTTP answer counts. The request goes through the client of huggingface_hub, so ``HF_ENDPOINT``
    and proxies are honoured. It runs in a thread of its own because resolving a name cannot be
    timed out otherwise. The environment variable ``HF_PRUNE_HUB_TIMEOUT`` sets the seconds to wait.

    Args:
        what: What is wanted from the Hub, for the message: ``"model 'owner/name'"``.

    Raises:
        DataError: If an offline variable is set or the Hub does not answer in time.

    Example:
        >>> os.environ["HF_HUB_OFFLINE"] = "1"
        >>> check_hub_reachable("model 'owner/name'")
        Traceback (most recent call last):
        hf_prune.errors.DataError: cannot get model 'owner/name' from the Hugging Face Hub: HF_HUB_OFFLINE is set. ...
    """
    from huggingface_hub import constants

    timeout = _hub_timeout()
    if variable := _offline_variable(constants.HF_HUB_OFFLINE):
        raise DataError(
            f"cannot get {what} from the Hugging Face Hub: {variable} is set. Unset it, or pass a local folder"
        )
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    if problem := _request_problem(endpoint, timeout):
        raise DataError(
            f"cannot get {what} from the Hugging Face Hub at {endpoint}: {problem}. "
            "Pass a local folder, or check the network connection"
        )


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
    writes it), ``.csv``, ``.jsonl`` or ``.parquet``. A data set from the Hub that is already cached is
    read from the cache and needs no network. Local files are read into memory.

    Args:
        source: Path of a folder, or a Hub id ``owner/name``, with ``:config`` at the end if it has several
            configurations. ``glue/task`` is short for ``nyu-mll/glue:task``. A folder wins over a Hub id.
        split: Name of the split; ``validation``, ``dev`` and ``val`` mean the same.
        text_columns: The columns that hold text.
        label_column: The column that holds the class: integers from 0, or strings. None for texts without labels.

    Returns:
        A data set with the text columns and the label column only. Labels written as digits become
        integers; other strings are kept.

    Raises:
        DataError: If the data cannot be found or read, a column is missing, or a row is not usable; the
            message has the row number, counted from 1 without the header.

    Example:
        >>> load_classification("glue/mrpc", "train", text_columns=("sentence1", "sentence2"))  # doctest: +SKIP
    """
    source = os.fspath(source)
    folder = _local_folder(source, "data")
    dataset = _load_hub(source, split) if folder is None else _load_folder(folder, split)
    where = f"split {split!r} of {source!r}"
    if label_column is not None and label_column not in dataset.column_names:
        raise DataError(
            f"{where} has no column {label_column!r} (found: {', '.join(dataset.column_names)}), and without labels it "
            "cannot be scored: name the label column, or use a labelled split (train, validation)"
        )
    check_columns(dataset, text_columns, where)
    dataset = dataset.select_columns([*text_columns, *([] if label_column is None else [label_column])])
    if len(dataset) == 0:
        raise DataError(f"{where} has no rows: expected at least one")
    for name in text_columns:
        _check_texts(column(dataset, name), name, where)
    if label_column is None:
        return dataset
    labels = column(dataset, label_column)
    checked = _check_labels(labels, label_column, where)
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
        DataError: If the data cannot be found or read, the column is missing, or a row is no text.

    Example:
        >>> load_texts("wiki.test.raw")[1]  # doctest: +SKIP
        ' = Robert Boulter = \n'
        >>> texts = load_texts("Salesforce/wikitext:wikitext-2-raw-v1", "test")  # doctest: +SKIP
    """
    source = os.fspath(source)
    where = f"split {split!r} of {source!r}"
    if os.path.isfile(source):
        where = repr(source)
        path = Path(source)
        if path.suffix not in _TABLES:
            return _read_text(path)
        dataset = _read([path])
    elif (folder := _local_folder(source, "data")) is None:
        dataset = _load_hub(source, split)
    elif (files := _text_files(folder)) and not _data_files(folder):
        return _read_text(files[_resolve_split(split, list(files), repr(source))])
    else:
        dataset = _load_folder(folder, split)
    if text_column not in dataset.column_names:
        raise DataError(
            f"{where} has no column {text_column!r} (found: {', '.join(dataset.column_names)}): name the text column"
        )
    texts = column(dataset, text_column)
    if not texts:
        raise DataError(f"{where} has no rows: expected at least one")
    _check_texts(texts, text_column, where)
    return texts


def fingerprint(dataset: Dataset, columns: Sequence[str]) -> str:
    """Tell whether two results are on the same data: a hash of the contents, not of names or files.

    Args:
        dataset: Any data set; its format (torch, numpy) does not matter.
        columns: The columns to look at, in this order.

    Returns:
        16 hexadecimal digits of a SHA-256; the order of the rows matters.

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


def check_columns(dataset: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise a DataError that lists the columns found if any of ``columns`` is missing."""
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))} (found: {', '.join(dataset.column_names)}): "
            "name the columns with text_columns and label_column"
        )


def column(dataset: Dataset, name: str) -> list[Any]:
    """One column as a list of plain Python values, whatever the format of the data set."""
    return list(dataset.with_format(None)[name][:])


# --- the Hub ---------------------------------------------------------------------------------------


def _hub_timeout() -> float:
    text = os.environ.get("HF_PRUNE_HUB_TIMEOUT", str(HUB_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise DataError(f"HF_PRUNE_HUB_TIMEOUT is {text!r}: expected a positive number of seconds")
    return seconds


def _offline_variable(read_at_import: bool) -> str | None:
    for name in _OFFLINE_VARIABLES:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return "HF_HUB_OFFLINE" if read_at_import else None


def _request_problem(endpoint: str, timeout: float) -> str | None:
    """What keeps the endpoint from answering, or None."""
    from huggingface_hub import get_session

    session = get_session()
    no_answer = f"no answer within {timeout:g} s (HF_PRUNE_HUB_TIMEOUT sets the seconds to wait)"
    problems: list[str | None] = []

    def ask() -> None:
        try:
            session.head(f"{endpoint}/robots.txt", timeout=timeout, follow_redirects=False)  # small and static
        except Exception as error:  # of whichever HTTP library the installed huggingface_hub uses
            problems.append(_describe(error, no_answer))
        else:
            problems.append(None)

    thread = threading.Thread(target=ask, name="hf_prune-hub-check", daemon=True)
    thread.start()
    thread.join(timeout + 0.05)  # lets the client's own time-out close its socket first
    return problems[0] if problems else no_answer


def _describe(error: BaseException, no_answer: str) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return "the host name cannot be resolved"
        if isinstance(cause, ConnectionRefusedError):
            return "the connection was refused"
        if isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:
            return no_answer
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


def _check_repo_id(source: str, what: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise DataError(f"{source!r} is neither a folder nor a Hub id of {what}: {error}") from None


def _load_hub(source: str, split: str) -> Dataset:
    repo_id, config = _repository(source)
    splits = _from_cache(repo_id, config)
    if splits is None:
        check_hub_reachable(f"data set {source!r}")
        splits = _download(repo_id, config)
    return splits[_resolve_split(split, list(splits), repr(source))]


def _repository(source: str) -> tuple[str, str | None]:
    """Repository and configuration of a Hub id."""
    if source.startswith("glue/"):
        source = source.replace("glue/", "nyu-mll/glue:", 1)
    repo_id, _, config = source.partition(":")
    _check_repo_id(repo_id, "data")
    return repo_id, config or None


def _from_cache(repo_id: str, config: str | None) -> Mapping[str, Dataset] | None:
    """The splits that ``datasets`` has cached, without a request: load_dataset would retry first."""
    from datasets.packaged_modules.cache.cache import Cache

    name = repo_id.split("/")[-1]
    try:
        builder = Cache(dataset_name=name, repo_id=repo_id, config_name=config, version="auto", hash="auto")
    except (ValueError, FileNotFoundError):  # not cached, or not this configuration
        return None
    try:
        splits: Mapping[str, Dataset] = builder.as_dataset()
    except Exception as error:
        raise DataError(
            f"the cached copy of data set {repo_id!r} in {builder.cache_dir} cannot be read ({error}): "
            "delete that folder and load it again"
        ) from error
    return splits


def _download(repo_id: str, config: str | None) -> Mapping[str, Dataset]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        splits: Mapping[str, Dataset] = load_dataset(repo_id, config)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        name = f"{repo_id}:{config}" if config else repo_id
        raise DataError(f"data set {name!r} cannot be loaded from the Hugging Face Hub: {error}") from error
    return splits


# --- local folders ---------------------------------------------------------------------------------


def _local_folder(source: str, what: str) -> Path | None:
    """The folder that ``source`` names, or None if it can only be a Hub id."""
    if os.path.isdir(source):
        return Path(source)
    if os.path.exists(source):
        raise DataError(f"{source!r} is a file: pass the folder that holds {what}")
    if not source or source.startswith((".", "/", "~")) or os.path.isabs(source) or source.count("/") > 1:
        home = " (write the home folder in full: '~' is not expanded)" if source.startswith("~") else ""
        raise DataError(f"no such folder: {source!r}{home}. Pass a folder that holds {what}, or a Hub id (owner/name)")
    return None


def _load_folder(folder: Path, split: str) -> Dataset:
    files = _data_files(folder)
    if not files:
        raise DataError(
            f"no data files in {str(folder)!r} (found: {_listing(folder)}): expected one file per split, such as "
            "train.tsv, with ending .tsv, .csv, .jsonl or .parquet, in it or in data/, SST-2/ or sst2/"
        )
    name = _resolve_split(split, list(files), repr(str(folder)))
    return _read(_one_set(files[name], name))


def _data_files(folder: Path) -> dict[str, list[Path]]:
    """The data files by split, of the first subfolder that has any."""
    for subfolder in _SUBFOLDERS:
        files: dict[str, list[Path]] = {}
        for path in sorted((folder / subfolder).glob("*")):
            if (match := _DATA_FILE.fullmatch(path.name)) and path.is_file():
                files.setdefault(match["split"], []).append(path)
        if files:
            return files
    return {}


def _text_files(folder: Path) -> dict[str, Path]:
    """The text files by split, of the first subfolder that has any.

    Raises:
        DataError: If two files are the same split.
    """
    for subfolder in _SUBFOLDERS[:2]:
        files: dict[str, Path] = {}
        for path in sorted((folder / subfolder).glob("*")):
            if (match := _TEXT_FILE.fullmatch(path.name)) and path.is_file():
                if (other := files.setdefault(match["split"], path)) != path:
                    raise DataError(
                        f"split {match['split']!r} is in {path.parent} more than once ({other.name}, {path.name}): "
                        f"pass one of the files, or keep one of them"
                    )
        if files:
            return files
    return {}


def _one_set(paths: list[Path], split: str) -> list[Path]:
    """Check that the files of a split are one file, or all shards of one set."""
    matches = [match for path in paths if (match := _DATA_FILE.fullmatch(path.name))]
    kinds = {(match["format"], match["shards"]) for match in matches}
    names = ", ".join(path.name for path in paths)
    if len(kinds) > 1:
        raise DataError(f"split {split!r} is in {paths[0].parent} more than once ({names}): keep one of them")
    expected = int(matches[0]["shards"] or 1)
    if len(paths) != expected:
        raise DataError(f"split {split!r} in {paths[0].parent} has {len(paths)} of {expected} files: found {names}")
    return paths


def same_split(one: str, other: str) -> bool:
    """Whether two names mean the same split."""
    return one == other or {one, other} <= set(_SPLIT_ALIASES)


def _resolve_split(split: str, available: Sequence[str], where: str) -> str:
    if split in available:
        return split
    for alias in _SPLIT_ALIASES if split in _SPLIT_ALIASES else ():
        if alias in available:
            return alias
    raise DataError(f"no split {split!r} in {where}: it has {', '.join(sorted(available))}")


def _read(paths: list[Path]) -> Dataset:
    from datasets import Dataset

    kind = paths[0].suffix
    if kind == ".parquet":
        return _read_parquet(paths)
    columns: dict[str, list[Any]] = {}
    for path in paths:
        try:
            part = _read_jsonl(path) if kind == ".jsonl" else _read_table(path, tabs=kind == ".tsv")
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} cannot be read as UTF-8 {kind[1:].upper()}: {error}") from error
        if columns and list(part) != list(columns):
            raise DataError(f"{path} has the columns {', '.join(part)}, but {paths[0].name} has {', '.join(columns)}")
        columns = {name: columns.get(name, []) + values for name, values in part.items()}
    try:
        return Dataset.from_dict(columns)
    except (ValueError, TypeError) as error:  # ArrowInvalid and ArrowTypeError: JSON values of mixed types
        raise DataError(f"{paths[0]}: a column mixes types ({error}): write text and labels as strings") from error


def _read_text(path: Path) -> list[str]:
    """A text file as one text; a file of WikiText line by line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            if _WIKITEXT_FILE.fullmatch(path.name):
                return [line if line.strip() else "" for line in file]
            return [file.read()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_parquet(paths: list[Path]) -> Dataset:
    import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
    import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
    from datasets import Dataset

    try:
        return Dataset(pa.concat_tables([pq.read_table(path) for path in paths]))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{paths[0]} cannot be read as parquet: {error}") from error


def _read_table(path: Path, *, tabs: bool) -> dict[str, list[Any]]:
    """Columns of a TSV file, where a quote is a character like any other, or of a CSV file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if tabs:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            reader = csv.reader(file)
        header = next(reader, [])
        rows = []
        for number, fields in enumerate(reader, start=1):
            if len(fields) != len(header):
                raise DataError(
                    f"row {number} of {path} has {len(fields)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}): repair that row"
                )
            rows.append(fields)
    return {name: [fields[i] for fields in rows] for i, name in enumerate(header)}


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    """Columns of a file with one JSON object a line; None where an object lacks a key."""
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"row {number} of {path} is not JSON ({error}): expected one object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"row {number} of {path} is {line.strip()[:40]!r}: expected a JSON object")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


# --- rows ------------------------------------------------------------------------------------------


def _check_texts(texts: list[Any], name: str, where: str) -> None:
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(f"row {number} of {where}: {name!r} is {text!r}, expected text")


def _check_labels(labels: list[Any], name: str, where: str) -> list[int] | list[str]:
    """Labels as integers, or as strings if the first one is a string that is no integer."""
    integers = _as_integer(labels[0]) is not None or not isinstance(labels[0], str)
    checked: list[Any] = []
    for number, label in enumerate(labels, start=1):
        integer = _as_integer(label)
        if label is None or label == "":
            raise DataError(f"row {number} of {where}: {name!r} is empty, expected a label: fill it in or drop the row")
        if integers and integer is None:
            raise DataError(f"row {number} of {where}: label {label!r} is not an integer: repair or drop that row")
        if not integers and (integer is not None or not isinstance(label, str)):
            raise DataError(
                f"row {number} of {where}: label {label!r} is a number, but row 1 has the string {labels[0]!r}: "
                "write all labels the same way"
            )
        checked.append(integer if integers else label)
    if integers and min(checked) < 0:
        _raise_unlabelled(checked, where)
    return checked


def _as_integer(label: Any) -> int | None:
    if isinstance(label, int):
        return int(label)
    return int(label) if isinstance(label, str) and re.fullmatch(r"-?[0-9]+", label.strip()) else None


def _raise_unlabelled(labels: list[int], where: str) -> None:
    if max(labels) < 0:
        raise DataError(
            f"{where} is unlabelled (every label is {labels[0]}), as the test splits of GLUE are, and cannot be "
            "scored: use a labelled split (train, validation)"
        )
    row, label = next((row, label) for row, label in enumerate(labels, start=1) if label < 0)
    raise DataError(f"row {row} of {where}: label {label} is negative, expected 0 or more: drop unlabelled rows")
