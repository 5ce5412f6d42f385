"""Checkpoints that were pruned in memory and by streams, compared, and streams that are interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from hf_prune import PruningConfig
from hf_prune.auto import load_native
from hf_prune.checkpoint.files import SPARSITY_REPORT
from hf_prune.cli.workflows.prune import pruned_into
from hf_prune.conversion.streaming.journal import Journal
from hf_prune.conversion.streaming.output import Output


class Stop(Exception):
    """A stream is interrupted."""


def prune_in_memory(source: Path, config: PruningConfig, batches: Sequence[dict[str, Tensor]], out: Path) -> None:
    """What the command writes without ``--stream``."""
    data = batches if config.needs_data else None
    with pruned_into(out, load_native(str(source)), config, data, None, source=str(source), plots=False, name=""):
        pass


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the weight files of a folder."""
    return {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_files(expected: Path, found: Path) -> None:
    """The files of a pruning in memory and of a stream have the same names, weights, config and report."""
    assert {path.name for path in expected.iterdir()} == {path.name for path in found.iterdir()}
    for name in ("model.safetensors", "config.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes()
    in_memory, streamed = (json.loads((folder / SPARSITY_REPORT).read_text()) for folder in (expected, found))
    for tensor in in_memory["tensors"]:
        if not tensor["is_target"]:
            tensor["before"] = None  # in memory, all weights are described before pruning
    assert streamed == in_memory


def stop_at_record(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[dict[str, Any]]]:
    """Interrupt streams: a number of records, in a list of one, after which they stop, and the records so far."""
    add, left, records = Journal.add, [0], list[dict[str, Any]]()

    def counted(self: Journal, record: dict[str, Any], *written: Path) -> None:
        if left[0] == 0:
            raise Stop
        left[0] -= 1
        records.append(record)
        add(self, record, *written)

    monkeypatch.setattr(Journal, "add", counted)
    return left, records


def stop_at_weight(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt the next stream by Ctrl-C when it is about to write a weight."""
    write, left = Output.write, [number]

    def stop(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(Output, "write", stop)
