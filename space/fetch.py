"""A model's files from the Hub, checked before the large ones are fetched. No code and no pickle is."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from hf_prune import DataError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = (
    "*.safetensors", "config.json", "tokenizer*.json", "special_tokens_map.json", "vocab*", "merges.txt", "*.model",
    "*.spm", "bpe.codes", "dict.txt", "normalizer.json", "added_tokens.json", "chat_template.jinja"
)  # fmt: skip
_LARGEST_TEXT = 1_000_000  # of config.json and README.md
_LARGEST_NUMBER, _MOST_LAYERS = 2_000_000, 128  # in a config: more is no model that fits here


def fetch_model(name: str, most_bytes: int, token: str | bool | None, cache: Path | None) -> Path:
    """The folder of a text classifier.

    Args:
        name: ``owner/name``.
        most_bytes: Of its files.
        token: Of the Hub; False for none.
        cache: Where to; None for the user's own cache.

    Raises:
        DataError: If it is of another kind, too large, or cannot be had.
    """
    check_name(name)
    try:
        info = HfApi(token=token).model_info(name, files_metadata=True, timeout=15)
        files = {f.rfilename: f.size for f in info.siblings or [] if "/" not in f.rfilename}
        wanted = {path: size for path, size in files.items() if any(fnmatch.fnmatch(path, each) for each in _FILES)}
        if not any(path.endswith(".safetensors") for path in wanted):
            raise DataError(f"{name} has no weights as safetensors, and pickles are never opened: choose another one")
        if sum(math.inf if size is None else size for size in wanted.values()) > most_bytes:
            raise DataError(f"{name} is too large for this page: its files take more than {most_bytes / 1e6:.0f} MB")
        largest = max(files.get(path) or 0 for path in ("README.md", "config.json"))
        if any(set(path) & set("*?[]") for path in wanted) or largest > _LARGEST_TEXT:
            raise DataError(f"{name} has files with names or of sizes that no model needs: choose another one")
        where: dict[str, Any] = {"revision": info.sha, "token": token, "cache_dir": cache}
        path = Path(hf_hub_download(name, "config.json", **where))
        check_config(name, _read_json(name, path))
        return Path(snapshot_download(name, allow_patterns=list(wanted), **where))
    except DataError:
        raise
    except RepositoryNotFoundError:
        raise DataError(f"{name} is not on the Hub, or is private: check its name") from None
    except OfflineModeIsEnabled:
        raise DataError(f"{name} cannot be had: this page runs without the Hub (HF_HUB_OFFLINE)") from None
    except (HFValidationError, HfHubHTTPError, ValueError) as error:
        raise DataError(f"the Hub does not give {name}: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # the client passes on whatever its transport raises
        raise DataError(f"the Hub cannot be reached for {name} ({type(error).__name__}): try again later") from None


def check_name(name: str) -> None:
    """Refuse what cannot be the id of a model.

    Raises:
        DataError: If it is no ``owner/name``.
    """
    if not _ID.fullmatch(name) or ".." in name:
        raise DataError(
            f"{name[:100]!r} is no model of the Hub: expected owner/name, such as "
            f"distilbert/distilbert-base-uncased-finetuned-sst-2-english"
        )


def _read_json(name: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise DataError(f"the config.json of {name} cannot be read: choose another model") from None


def check_config(name: str, config: Any) -> None:
    """Refuse what is no text classifier, or so large that building it would already be too much.

    Raises:
        DataError: If it is one of those.
    """
    kinds = (config.get("architectures") if isinstance(config, dict) else None) or ["a model without a class"]
    kind = str(kinds[0] if isinstance(kinds, list) else kinds)
    if not kind.endswith("ForSequenceClassification"):
        raise DataError(f"{name} is {kind[:80]}: expected a text classifier (…ForSequenceClassification)")
    try:
        numbers = list(_numbers("", config))
    except RecursionError:
        raise DataError(f"the config.json of {name} is too deep for any model: choose another model") from None
    for key, value in numbers:
        if abs(value) > _LARGEST_NUMBER or ("layer" in key and value > _MOST_LAYERS):
            raise DataError(f"{name} is too large for this page: its config says {key[:60]} = {str(value)[:20]}")


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number in a config, with the name nearest to it; infinities aside."""
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from _numbers(inner, each)
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(key, each)
    elif isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        yield key, value
