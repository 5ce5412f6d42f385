"""Checkpoints side by side: loaded alike, and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_prune.auto import load_native
from hf_prune.calibration_data import LabelledData
from hf_prune.checkpoint import has_tokenizer
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation import evaluate_classification
from hf_prune.sources import check_model_source


def load_alike(sources: Sequence[str], dtype: str, device: str) -> dict[str, Any]:
    """Models of one dtype on one device, by short names that tell them apart.

    Args:
        sources: Folders or Hub ids.
        dtype: Such as ``"float32"``.
        device: Such as ``"cpu"``.

    Raises:
        ConfigError: If there is no such device.
        DataError: If a source cannot be found.
    """
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return {
        name: load_native(source).to(where, getattr(torch, dtype)).eval()
        for name, source in zip(short_names(sources), sources, strict=True)
    }


def short_names(sources: Sequence[str]) -> list[str]:
    """The last parts of names, as many as it takes to tell them apart; numbered if they are the same.

    Example:
        >>> short_names(["runs/a/model", "runs/b/model"])
        ['a/model', 'b/model']
        >>> short_names(["model", "model"])
        ['model', 'model (2)']
    """
    parts = [source.rstrip("/").split("/") for source in sources]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    seen = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, seen, strict=True)]


def score_all(models: Mapping[str, Any], sources: Sequence[str], data: LabelledData, split: str) -> dict[str, float]:
    """Accuracy of each classifier, 0 to 1, on the same examples.

    Args:
        models: Models by name.
        sources: Where each came from, for its tokenizer.
        data: What to score.
        split: Which split of it.

    Raises:
        DataError: If a checkpoint has no tokenizer, or the data does not fit.
    """
    found = {}
    for (name, model), source in zip(models.items(), sources, strict=True):
        local = check_model_source(source)
        if not has_tokenizer(source, local_files_only=local):
            raise DataError(f"{source!r} has no tokenizer, which scoring needs: save one beside the model")
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        dataset = data.load(split)
        found[name] = evaluate_classification(
            model, tokenizer, dataset, text_columns=data.text_columns, label_column=data.label_column
        ).accuracy
    return found
