"""Models from the Hub: checked before their large files are fetched, and deleted when others need the room.

No code and no pickle is ever fetched.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from hf_prune import DataError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = (
    "*.safetensors", "config.json", "tokenizer*.json", "special_tokens_map.json", "vocab*", "merges.txt", "*.model",
    "*.spm", "bpe.codes", "dict.txt", "normalizer.json", "added_tokens.json", "chat_template.jinja"
)  # fmt: skip
_LARGEST_TEXT = 1_000_000  # of config.json and README.md
_LARGEST_NUMBER, _MOST_LAYERS, _MOST_CLASSES = 2_000_000, 128, 100  # in a config: more is no model that fits here


class Downloads:
    """The models that visitors of a public Space had downloaded, in a cache of their own.

    Args:
        cache: The cache folder.
        most: How many models are kept.
    """

    def __init__(self, cache: Path, most: int) -> None:
        self.cache, self._most = cache, most
        self._kept: OrderedDict[str, None] = OrderedDict()  # the most recently used one last
        self._readers: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Keep a model while it is read.

        Afterwards, the least recently used ones beyond the limit are deleted, and a new one if reading it failed.
        """
        with self._lock:
            self._readers[name] += 1
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            with self._lock:
                self._readers -= Counter([name])  # drops names without readers
                self._tidy(name, succeeded)

    def _tidy(self, name: str, succeeded: bool) -> None:
        if succeeded:
            self._kept[name] = None
            self._kept.move_to_end(name)
        unwanted = [] if succeeded or name in self._kept else [name]
        unwanted += list(self._kept)[: max(0, len(self._kept) - self._most)]
        for old in unwanted:
            if not self._readers[old]:
                self._kept.pop(old, None)
                shutil.rmtree(self.cache / repo_folder_name(repo_id=old, repo_type="model"), ignore_errors=True)


def fetch_model(name: str, most_bytes: int, token: str | bool | None, cache: Path | None) -> Path:
    """Download a text classifier.

    Args:
        name: ``owner/name``.
        most_bytes: The most bytes that its files may have.
        token: Token for the Hub; False for none.
        cache: The cache folder; None for the user's own cache.

    Returns:
        The folder that holds it.

    Raises:
        DataError: If it is of another kind, too large, or cannot be fetched.
    """
    check_name(name)
    try:
        info = HfApi(token=token).model_info(name, files_metadata=True, timeout=15)
        files = {f.rfilename: f.size for f in info.siblings or [] if "/" not in f.rfilename}
        wanted = {
            path: size for path, size in files.items() if any(fnmatch.fnmatch(path, pattern) for pattern in _FILES)
        }
        if not any(path.endswith(".safetensors") for path in wanted):
            raise DataError(f"{name} has no weights as safetensors, and pickles are never opened: choose another one")
        if sum(math.inf if size is None else size for size in wanted.values()) > most_bytes:
            raise DataError(f"{name} is too large for this page: its files take more than {most_bytes / 1e6:.0f} MB")
        largest = max(files.get(path) or 0 for path in ("README.md", "config.json"))
        if any(set(path) & set("*?[]") for path in wanted) or largest > _LARGEST_TEXT:
            raise DataError(f"{name} has files with names or sizes that no model needs: choose another one")
        options: dict[str, Any] = {"revision": info.sha, "token": token, "cache_dir": cache}
        path = Path(hf_hub_download(name, "config.json", **options))
        check_config(name, _read_json(name, path))
        return Path(snapshot_download(name, allow_patterns=list(wanted), **options))
    except DataError:
        raise
    except RepositoryNotFoundError:
        raise DataError(f"{name} is not on the Hub, or is private: check its name") from None
    except OfflineModeIsEnabled:
        raise DataError(f"{name} cannot be fetched: this page runs without the Hub (HF_HUB_OFFLINE)") from None
    except (HFValidationError, HfHubHTTPError, ValueError) as error:
        raise DataError(f"the Hub refuses {name}: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # the client passes on whatever its transport raises
        raise DataError(f"the Hub cannot be reached for {name} ({type(error).__name__}): try again later") from None


def check_name(name: str) -> None:
    """Make sure that a name can be the id of a model.

    Raises:
        DataError: If it is not of the form ``owner/name``.
    """
    if not _ID.fullmatch(name) or ".." in name:
        raise DataError(
            f"{name[:100]!r} is not a model on the Hub: expected owner/name, such as "
            f"distilbert/distilbert-base-uncased-finetuned-sst-2-english"
        )


def _read_json(name: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DataError(f"the config.json of {name} cannot be read: choose another model") from None


def check_config(name: str, config: Any) -> None:
    """Make sure that a model is a text classifier, and not so large that merely building it takes too much.

    Raises:
        DataError: If it is not one, or too large.
    """
    kinds = (config.get("architectures") if isinstance(config, dict) else None) or ["a model without a class"]
    kind = str(kinds[0] if isinstance(kinds, list) else kinds)
    if not kind.endswith("ForSequenceClassification"):
        raise DataError(f"{name} is {kind[:80]}: expected a text classifier (…ForSequenceClassification)")
    try:
        numbers = list(_numbers_in("", config))
    except RecursionError:
        raise DataError(f"the config.json of {name} is nested too deeply for any model: choose another model") from None
    for key, value in numbers:
        most = _MOST_CLASSES if key == "num_labels" else _MOST_LAYERS if "layer" in key else _LARGEST_NUMBER
        if abs(value) > _LARGEST_NUMBER or value > most:  # a class is a string, made before anything is built
            raise DataError(f"{name} is too large for this page: its config says {key[:60]} = {str(value)[:20]}")


def _numbers_in(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every finite number in a config, with the key closest to it."""
    if isinstance(value, dict):
        for inner_key, inner_value in value.items():
            yield from _numbers_in(inner_key, inner_value)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers_in(key, item)
    elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        yield key, value
