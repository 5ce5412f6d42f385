"""Safetensors files tensor by tensor, against the safetensors library."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_prune.checkpoint import shards
from hf_prune.checkpoint.shards import Shards, header_bytes, read_parts, read_rows, read_tensor, write_tensor
from hf_prune.errors import CheckpointError

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).reshape(4, 6),
    "bf16": torch.randn(3, 5).bfloat16(),
    "f16": torch.randn(7).half(),
    "f64": torch.randn(2, 2, 2).double(),
    "scalar": torch.tensor(5),
    "none": torch.empty(0, 3),
    "flags": torch.tensor([True, False, True]),
    "ключ": torch.ones(1),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_every_tensor_is_read_as_the_library_reads_it(folder):
    found = Shards([folder / "model.safetensors"])
    assert found.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = read_tensor(folder, found.entries[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("rows", [[0], [3, 1, 1], [], [0, 1, 2, 3]])
def test_rows(folder, rows):
    entry = Shards([folder / "model.safetensors"]).entries["a"]
    assert torch.equal(read_rows(folder, entry, rows), TENSORS["a"][rows])


@pytest.mark.parametrize("size", [8, 16, 40, 96, 1 << 20])
def test_parts_are_the_bytes(folder, size, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", size)
    for entry in Shards([folder / "model.safetensors"]).entries.values():
        data = (folder / "model.safetensors").read_bytes()[entry.start : entry.start + entry.size]
        assert b"".join(bytes(part) for part in read_parts(folder, entry)) == data


def test_a_tensor_is_written_in_its_place(folder):
    found = Shards([folder / "model.safetensors"])
    write_tensor(folder, found.entries["bf16"], torch.zeros(3, 5, dtype=torch.bfloat16))
    after = load_file(folder / "model.safetensors")
    assert not after.pop("bf16").any()
    assert all(torch.equal(after[name], TENSORS[name]) for name in after)


def test_a_header_is_what_the_library_writes(tmp_path):
    tensors = {"b": torch.arange(3, dtype=torch.uint8), "a": torch.arange(5, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "expected", {"kind": "x"})
    data = header_bytes(
        {name: ("U8", (len(tensors[name]),), len(tensors[name])) for name in sorted(tensors)}, {"kind": "x"}
    )
    (tmp_path / "found").write_bytes(data + bytes(tensors["a"].tolist()) + bytes(tensors["b"].tolist()))
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
    with safe_open(tmp_path / "found", "pt") as opened:
        assert opened.metadata() == {"kind": "x"}


def test_the_fingerprint_changes_with_names_sizes_headers_and_times(folder):
    path = folder / "model.safetensors"
    first = Shards([path]).fingerprint()
    assert Shards([path]).fingerprint() == first
    os.utime(path, ns=(1, 1))
    second = Shards([path]).fingerprint()
    save_file({"other": torch.ones(3)}, path)
    os.utime(path, ns=(1, 1))
    assert len({first, second, Shards([path]).fingerprint()}) == 3


def test_a_tensor_in_two_files_is_refused(folder):
    save_file({"a": torch.ones(1)}, folder / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in model.safetensors and in more.safetensors: expected it once"):
        Shards([folder / "model.safetensors", folder / "more.safetensors"])


def test_quantized_types_are_refused_when_read(tmp_path):
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    entry = Shards([tmp_path / "model.safetensors"]).entries["a"]
    with pytest.raises(
        CheckpointError, match=r"a in model.safetensors has type F8_E4M3: expected one of .*; prune bef"
    ):
        read_tensor(tmp_path, entry)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 16, b"\x02" + b"\0" * 7 + b"{]"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as safetensors: .*; download or save"):
        Shards([tmp_path / "model.safetensors"])


@pytest.mark.parametrize("shape", [[1 << 63, 0], [0, (1 << 64) - 1]])
def test_shapes_that_torch_cannot_hold_are_refused(tmp_path, shape):
    (tmp_path / "model.safetensors").write_bytes(header_bytes({"a": ("F32", shape, 0)}, {}))
    with pytest.raises(CheckpointError, match=r"a has the shape \[\d+, \d+\]: expected sizes below 2\^63; download"):
        Shards([tmp_path / "model.safetensors"])
