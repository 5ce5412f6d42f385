"""Compressed checkpoints: loaded by plain transformers, bit for bit, and refused when a byte is wrong."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import zstandard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    pipeline,
)
from typer.testing import CliRunner

from hf_prune import (
    AutoPrunedModelForImageClassification,
    AutoPrunedModelForSequenceClassification,
    ConfigError,
    prunable,
    push_checkpoint,
    shrink,
)
from hf_prune.auto import load_native
from hf_prune.checkpoint.files import INDEX, MASK_FILE, SINGLE, file_paths
from hf_prune.checkpoint.mask_file import StoredMasks
from hf_prune.checkpoint.packed import files as packed_files
from hf_prune.checkpoint.packed import quantizer as packed_loading
from hf_prune.checkpoint.packed import seal
from hf_prune.checkpoint.packed.files import PackedFiles
from hf_prune.checkpoint.packed.format import CODECS, HEAD, LAYOUTS, MAGIC, read_header
from hf_prune.checkpoint.packed.remote_code import modeling_source
from hf_prune.checkpoint.packed.seal import is_packed
from hf_prune.checkpoint.shards import header_bytes
from hf_prune.cli.main import app
from hf_prune.conversion.compression import compress_checkpoint
from hf_prune.conversion.decompression import decompress_checkpoint
from hf_prune.conversion.migration import migrate_checkpoint
from hf_prune.conversion.streaming.meta_model import load_meta_model
from hf_prune.errors import CheckpointError
from hf_prune.hub.describe import describe_model
from hf_prune.hub.folder_facts import counted_facts
from hf_prune.hub.verify import verify_checkpoint
from hf_prune.utils.folders import MARK
from tests import models
from tests.models import assert_unchanged, same_bits, snapshot, tiny_batches
from tests.support.damaged_files import replace_bytes

SETTINGS: Any = {"sparsity": 0.7, "scope": "global"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MARK}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bert(seed: int = 0, **settings: Any) -> Any:
    return prunable(models.tiny_bert(seed, hidden_size=32, intermediate_size=64, **settings)).prune(**SETTINGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One pruned BERT dense and compressed, in one file and in several."""
    root = tmp_path_factory.mktemp("compressed")
    model = bert()
    model.save_pretrained(root / "dense")
    models.tiny_tokenizer().save_pretrained(root / "dense")
    compress_checkpoint(root / "dense", root / "small")
    compress_checkpoint(root / "dense", root / "sharded", shard_bytes=8000)
    return {name: root / name for name in ("dense", "small", "sharded")}


@pytest.fixture
def small(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["small"], tmp_path / "small"))


@pytest.fixture
def sharded(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["sharded"], tmp_path / "sharded"))


# --- round trips -----------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", sorted(models.TRANSFORMERS))
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_every_kind_of_model_comes_back(tmp_path, kind, codec):
    model = prunable(models.TRANSFORMERS[kind]()).prune(**SETTINGS)
    model.save_pretrained(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "small", codec=codec)
    assert MASK_FILE not in names(tmp_path / "small")
    loaded = type(model).from_pretrained(tmp_path / "small")
    assert_unchanged(loaded, snapshot(model))
    assert loaded.masks.keys() == model.masks.keys()
    assert all(torch.equal(mask, model.masks[name]) for name, mask in loaded.masks.items())
    assert loaded.pruning_config == model.pruning_config
    decompress_checkpoint(tmp_path / "small", tmp_path / "again")
    dense, again = load_file(tmp_path / "dense" / SINGLE), load_file(tmp_path / "again" / SINGLE)
    assert dense.keys() == again.keys()
    assert all(same_bits(tensor, again[name]) for name, tensor in dense.items())
    for name in (MASK_FILE, "config.json"):
        assert json_or_bytes(tmp_path / "again" / name) == json_or_bytes(tmp_path / "dense" / name)


def json_or_bytes(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["small", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
def test_plain_transformers_loads_it(folders, kind, dtype, device_map):
    loaded = AutoModelForSequenceClassification.from_pretrained(folders[kind], dtype=dtype, device_map=device_map)
    dense = AutoModelForSequenceClassification.from_pretrained(folders["dense"], dtype=dtype)
    assert_unchanged(loaded, snapshot(dense))
    assert not hasattr(loaded.config, "quantization_config")
    batch = {name: value for name, value in tiny_batches(dense)[0].items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, dense(**batch).logits)


def test_other_classes_and_pipelines_load_it(folders, tmp_path):
    encoder, dense = (AutoModel.from_pretrained(folders[kind]) for kind in ("sharded", "dense"))
    assert_unchanged(encoder, {n: t for n, t in snapshot(dense).items()})
    shutil.copytree(folders["sharded"], tmp_path / "repo" / "inner")
    inner = AutoModelForSequenceClassification.from_pretrained(tmp_path / "repo", subfolder="inner")
    assert_unchanged(inner, snapshot(AutoModelForSequenceClassification.from_pretrained(folders["dense"])))
    answers = [pipeline("text-classification", str(folders[kind]))("w1 w2 w3") for kind in ("small", "dense")]
    assert answers[0] == answers[1]


def test_saved_again_it_is_dense_and_has_the_same_names(folders, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(folders["small"]).save_pretrained(tmp_path / "again")
    dense, again = (load_file(folder / SINGLE) for folder in (folders["dense"], tmp_path / "again"))
    assert dense.keys() == again.keys()
    assert all(same_bits(tensor, again[name]) for name, tensor in dense.items())
    assert "quantization_config" not in json_or_bytes(tmp_path / "again" / "config.json")


def test_save_pretrained_compressed(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / "out", compressed=True, max_shard_size="8KB")
    assert names(tmp_path) == {"out"}
    assert len(file_paths(tmp_path / "out")[0]) > 1
    before = snapshot(model)
    loaded = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_unchanged(loaded, before)
    assert loaded.masks.keys() == model.masks.keys()
    model.save_pretrained(tmp_path / "out")  # dense again, over it
    assert names(tmp_path / "out") == {"config.json", SINGLE, MASK_FILE}
    assert_unchanged(AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "out"), before)
    (tmp_path / "out" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "out", compressed=True, values="int8")
    assert names(tmp_path / "out") == {"config.json", SINGLE, "README.md"}
    rounded = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(mask, model.masks[name]) for name, mask in rounded.masks.items())
    name = "bert.encoder.layer.0.output.dense.weight"
    error = (rounded.state_dict()[name] - model.state_dict()[name]).abs()
    assert 0 < float(error.max()) <= 0.51 / 127 * float(model.state_dict()[name].abs().max())


def test_kept_zeros_stay_kept(tmp_path):
    model = bert()
    name = "bert.encoder.layer.0.output.dense.weight"
    weight, mask = model.get_parameter(name), model.masks[name]
    with torch.no_grad():
        weight[mask] = torch.where(torch.arange(int(mask.sum())) % 3 == 0, -0.0, weight[mask])
        weight[mask] = torch.where(torch.arange(int(mask.sum())) % 3 == 1, 0.0, weight[mask])
    model.save_pretrained(tmp_path / "out", compressed=True)
    loaded = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.masks[name], mask)
    assert_unchanged(loaded, snapshot(model))


def test_shrunk_and_compressed(tmp_path):
    model = prunable(models.tiny_bert(hidden_size=32, num_attention_heads=4, intermediate_size=64))
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, :20] = 0
        model.bert.encoder.layer[1].attention.output.dense.weight[:, :8] = 0
    shrink(model).prune(0.6)
    model.save_pretrained(tmp_path / "out", compressed=True)
    assert json_or_bytes(tmp_path / "out" / "config.json")["quantization_config"]["structure"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_unchanged(loaded, snapshot(model))
    decompress_checkpoint(tmp_path / "out", tmp_path / "dense")
    assert_unchanged(AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense"), snapshot(model))


def test_two_of_four(tmp_path):
    for kind in ("bert", "gpt2"):
        model = prunable(models.TRANSFORMERS[kind]()).prune(granularity="2:4")
        model.save_pretrained(tmp_path / kind, compressed=True)
        files = PackedFiles([tmp_path / kind / SINGLE])
        assert {files.headers[name].group for name in model.masks} == {(2, 4)}
        assert_unchanged(type(model).from_pretrained(tmp_path / kind), snapshot(model))


def mixtral() -> Any:
    config = MixtralConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=24,
    )  # fmt: skip
    return models.fill(MixtralForCausalLM(config)).eval()


def test_experts_are_unpacked_before_they_are_merged(tmp_path):
    model = mixtral()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "experts" in name:
                parameter.view(-1)[: int(0.8 * parameter.numel())] = 0  # some experts wholly, some not at all
    model.save_pretrained(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    packed = PackedFiles([tmp_path / "small" / SINGLE]).packed
    assert any(".experts." in name for name in packed)
    assert_unchanged(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), snapshot(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    assert_unchanged(loaded, snapshot(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)))
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / SINGLE).keys() == load_file(tmp_path / "dense" / SINGLE).keys()


def test_masks_under_other_names_stay_beside_the_weights(tmp_path):
    """Checkpoints of a ViT have names of transformers 4, masks those of the parameters."""
    model = prunable(models.tiny_vit()).prune(**SETTINGS)
    model.save_pretrained(tmp_path / "small", compressed=True)
    assert_unchanged(AutoModelForImageClassification.from_pretrained(tmp_path / "small"), snapshot(model))
    loaded = AutoPrunedModelForImageClassification.from_pretrained(tmp_path / "small")
    assert loaded.masks.keys() == model.masks.keys()
    assert all(torch.equal(mask, model.masks[name]) for name, mask in loaded.masks.items())
    decompress_checkpoint(tmp_path / "small", tmp_path / "dense")
    loaded = AutoPrunedModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert loaded.masks.keys() == model.masks.keys()


def test_without_masks_what_is_zero_goes_by_itself(tmp_path):
    model = bert().make_permanent()
    model.save_pretrained(tmp_path / "dense")
    report = compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    assert report.after < 0.6 * report.before
    loaded = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert loaded.masks == {}
    assert_unchanged(loaded, snapshot(model))


def test_what_would_not_get_smaller_stays_plain_and_comes_first(folders):
    with safe_open(folders["small"] / SINGLE, "np") as file:
        header = {name: file.get_slice(name).get_shape() for name in file.keys()}
    plain = [name for name in header if f"{name}_packed" not in header and not name.endswith("_packed")]
    assert "bert.embeddings.LayerNorm.weight" in plain
    raw = (folders["small"] / SINGLE).read_bytes()
    offsets = {n: v["data_offsets"] for n, v in json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).items()
               if n != "__metadata__"}  # fmt: skip
    assert max(offsets[name][1] for name in plain) <= min(o[0] for n, o in offsets.items() if n.endswith("_packed"))
    assert all(header[name] == [0] for name in header if f"{name}_packed" in header)


def test_other_files_come_along_and_what_does_not_is_named(folders, tmp_path):
    source = Path(shutil.copytree(folders["dense"], tmp_path / "dense"))
    (source / "README.md").write_text("mine")
    left = {"pytorch_model.bin", "model.fp16.safetensors", ".gitattributes", "2_Dense/pytorch_model.bin", "a.msgpack"}
    for name in (
        *left,
        "checkpoint-7/model.safetensors",
        "1_Pooling/config.json",
        "2_Dense/deep/a.json",
        "model_card.md",
    ):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_text(name)
    (source / "out.txt").symlink_to(tmp_path)
    report = compress_checkpoint(source, tmp_path / "small")
    left |= {"checkpoint-7", "out.txt"}
    assert set(report.left) == left
    assert str(report).endswith(f"Not copied: {', '.join(report.left)}.")
    assert names(tmp_path / "small") == names(source) - {MASK_FILE} - left
    again = decompress_checkpoint(tmp_path / "small", tmp_path / "again")
    assert again.left == ()
    for folder in (tmp_path / "small", tmp_path / "again"):
        assert (folder / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"
        assert names(folder / "2_Dense") == {"deep"}


def test_files_of_the_hubs_cache_are_followed_and_others_are_not(folders, tmp_path):
    """A snapshot is a folder of links to blobs."""
    blobs, snapshot_ = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    (snapshot_ / "sub").mkdir(parents=True)
    shutil.copytree(folders["dense"], blobs)
    for path in blobs.iterdir():
        (snapshot_ / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    (blobs / "b").write_text("b")
    (snapshot_ / "sub" / "b.json").symlink_to(blobs / "b")
    (tmp_path / "secret").write_text("secret")
    (snapshot_ / "c.json").symlink_to(tmp_path / "secret")
    (snapshot_ / "d.json").symlink_to("nowhere")
    (snapshot_ / "e.json").symlink_to("e.json")
    report = compress_checkpoint(snapshot_, tmp_path / "small")
    assert report.left == ("c.json", "d.json", "e.json")
    assert names(tmp_path / "small") == names(folders["small"]) | {"sub"}
    assert (tmp_path / "small" / "sub" / "b.json").read_text() == "b"
    assert not any(path.is_symlink() for path in (tmp_path / "small").rglob("*"))


# --- without hf_prune, and by others ---------------------------------------------------------------

VANILLA = """
import sys
from transformers import AutoModelForSequenceClassification
assert "hf_prune" not in sys.modules
AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("config", ["with", "without"])
def test_without_hf_prune_it_is_refused_and_never_random(small, config, fresh_process):
    """Whether or not transformers minds the config, the empty weights do not fit."""
    if config == "without":
        values = json_or_bytes(small / "config.json")
        del values["quantization_config"]
        (small / "config.json").write_text(json.dumps(values))
    done = fresh_process.run(VANILLA, small)
    assert done.returncode == 1
    assert re.search("hf_prune|mismatch|size", done.stderr.splitlines()[-1] + done.stderr)


# --- remote code -----------------------------------------------------------------------------------

REMOTE = """
import sys
sys.modules["hf_prune"] = None  # whoever imports it gets an ImportError
import torch
import transformers
small, dense, out = sys.argv[1:4]
for name in sys.argv[4:]:
    auto = getattr(transformers, name)
    for settings in ({}, {"dtype": torch.bfloat16, "device_map": "cpu"}):
        model = auto.from_pretrained(small, trust_remote_code=True, **settings)
        same = auto.from_pretrained(dense, **settings)
        assert type(model) is type(same), type(model)
        found, expected = model.state_dict(), same.state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            assert (found[key].view(torch.uint8) == value.view(torch.uint8)).all(), key
model.save_pretrained(out)
auto.from_pretrained(out)
assert not hasattr(model.config, "auto_map")
"""


@pytest.fixture
def run_remote(fresh_process, tmp_path) -> Callable[..., str]:
    """Run :data:`REMOTE`, or other code, in a process of its own; the errors it prints, if it fails."""

    def run(small: Path, dense: Path, *autos: str, code: str = REMOTE) -> str:
        done = fresh_process.run(code, small, dense, tmp_path / "again", *autos)
        return "" if done.returncode == 0 else done.stderr

    return run


def test_remote_code_loads_it_without_hf_prune(folders, tmp_path, run_remote):
    compress_checkpoint(folders["dense"], tmp_path / "small", remote_code=True, shard_bytes=8000)
    autos = ("AutoModel", "AutoModelForSequenceClassification")
    assert run_remote(tmp_path / "small", folders["dense"], *autos) == ""
    assert names(tmp_path / "again") == {"config.json", SINGLE}
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")  # and with hf_prune as always
    assert_unchanged(plain, snapshot(AutoModelForSequenceClassification.from_pretrained(folders["dense"])))
    assert not hasattr(plain.config, "auto_map")
    decompress_checkpoint(tmp_path / "small", tmp_path / "dense")
    assert names(tmp_path / "dense") == names(folders["dense"])
    assert json_or_bytes(tmp_path / "dense" / "config.json") == json_or_bytes(folders["dense"] / "config.json")
    shard = max((tmp_path / "small").glob("model-*.safetensors"))
    replace_bytes(shard, shard.read_bytes()[:-1] + b"?")
    said = run_remote(tmp_path / "small", folders["dense"], *autos)
    assert "CheckpointError" in said
    assert "its bytes do not match its checksum" in said


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_remote_code_of_other_kinds(tmp_path, kind, run_remote):
    """Names of old checkpoints are converted as always, tied weights stay tied."""
    build = {"vit": models.tiny_vit, "llama": models.tiny_llama}[kind]
    auto = {"vit": "AutoModelForImageClassification", "llama": "AutoModelForCausalLM"}[kind]
    model = prunable(build()).prune(**SETTINGS)
    model.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "small", compressed=True, remote_code=True)
    assert run_remote(tmp_path / "small", tmp_path / "dense", auto) == ""


@pytest.mark.parametrize("compressed", [False, True])
def test_remote_code_builds_layers_that_differ(tmp_path, compressed, run_remote):
    model = prunable(models.tiny_llama())
    model.prune(0.3, granularity=("head", "neuron"), criterion="magnitude", scope="global").shrink()
    model.save_pretrained(tmp_path / "shrunk", compressed=compressed, remote_code=True)
    code = """
import sys, torch
from transformers import AutoModelForCausalLM as A
model = A.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "hf_prune" not in sys.modules
torch.save(model.state_dict(), sys.argv[3])
try:
    A.from_pretrained(sys.argv[1])
except RuntimeError as error:
    assert "pip install hf_prune, and import it first" in str(error)
else:
    raise AssertionError
"""
    assert run_remote(tmp_path / "shrunk", tmp_path, code=code) == ""
    found = torch.load(tmp_path / "again")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shrunk")  # and with hf_prune as always
    assert_unchanged(again, snapshot(model))


def test_remote_code_and_hf_prune_in_one_process(folders, tmp_path, run_remote):
    """Whoever comes first, the library's own reader is used once it is imported."""
    compress_checkpoint(folders["dense"], tmp_path / "small", remote_code=True)
    code = """
import sys
from transformers import AutoModelForSequenceClassification as A
A.from_pretrained(sys.argv[1], trust_remote_code=True)
import hf_prune
for settings in ({}, {"trust_remote_code": True}):
    assert hasattr(A.from_pretrained(sys.argv[1], **settings), "sparsity_report")
"""
    assert run_remote(tmp_path / "small", folders["dense"], code=code) == ""


def test_the_remote_file_says_each_thing_once():
    tree = ast.parse(modeling_source(["BertModel"]))
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    found += [ast.unparse(t) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    assert len(found) == len(set(found)) > 40
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "hf_prune" not in {name.partition(".")[0] for name in modules}


def test_remote_code_is_refused_where_it_cannot_work(folders, tmp_path):
    model = prunable(models.tiny_bert(hidden_size=32, num_attention_heads=4, intermediate_size=64))
    with pytest.raises(ConfigError, match="remote_code=True without compressed=True"):
        model.save_pretrained(tmp_path / "out", remote_code=True)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight[:, :20] = 0
    with pytest.raises(ConfigError, match="whose config tells all its sizes: any transformers loads it"):
        shrink(model).save_pretrained(tmp_path / "out", remote_code=True)
    source = Path(shutil.copytree(folders["dense"], tmp_path / "dense"))
    config = json_or_bytes(source / "config.json")
    for change, message in (
        ({"auto_map": {"AutoModel": "mine.Model"}}, "has its own remote code"),
        ({"architectures": ["Mine"]}, r"no AutoModel of transformers loads \['Mine'\] of type 'bert'"),
        ({"model_type": "mine"}, "of type 'mine'"),
    ):
        (source / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            compress_checkpoint(source, tmp_path / "out", remote_code=True)
    assert names(tmp_path) == {"dense"}


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "gzip"}, "codec is 'gzip': expected one of none, zstd"),
        ({"values": "int4"}, "values is 'int4': expected one of exact, int8"),
    ],
)
def test_unknown_settings(folders, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        compress_checkpoint(folders["dense"], tmp_path / "out", **settings)
    with pytest.raises(ConfigError, match=message):
        bert().save_pretrained(tmp_path / "out", compressed=True, **settings)
    assert names(tmp_path) == set()


def test_sources_that_do_not_fit(folders, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="is compressed already: expected a dense checkpoint"):
        compress_checkpoint(folders["small"], out)
    with pytest.raises(CheckpointError, match="its header does not describe packed weights"):
        decompress_checkpoint(folders["dense"], out)
    with pytest.raises(CheckpointError, match=r"is not a folder: expected one with config\.json"):
        compress_checkpoint(tmp_path / "nowhere", out)
    with pytest.raises(CheckpointError, match="would replace itself: name another folder"):
        compress_checkpoint(folders["dense"], folders["dense"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"has no weights: expected {SINGLE} or {INDEX}"):
        compress_checkpoint(tmp_path / "empty", out)
    source = Path(shutil.copytree(folders["dense"], tmp_path / "dense"))
    save_file({"classifier.weight": torch.ones(2), "classifier.weight_packed": torch.ones(2)}, source / SINGLE)
    with pytest.raises(CheckpointError, match=r"has a tensor named classifier\.weight_packed"):
        compress_checkpoint(source, out)
    shutil.copyfile(folders["dense"] / SINGLE, source / SINGLE)
    (source / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(CheckpointError, match="is quantized with 'awq': expected plain weights"):
        compress_checkpoint(source, out)
    structure = {"quant_method": "hf_prune", "structure": True}
    damaged = ("{", "[" * 100_000, "[]", '{"quantization_config": [1]}', json.dumps({"quantization_config": structure}))
    for text in (*(damage.encode() for damage in damaged), b"\xff"):
        (source / "config.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            compress_checkpoint(source, out)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing: expected a whole checkpoint"):
        compress_checkpoint(source, out)
    assert not out.exists()


def test_masks_that_do_not_fit(folders, tmp_path):
    source = Path(shutil.copytree(folders["dense"], tmp_path / "dense"))
    weights = load_file(source / SINGLE)
    name = "classifier.weight"
    save_file({**weights, name: torch.ones(2, 32)}, source / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} cannot be packed: its mask removes weights"):
        compress_checkpoint(source, tmp_path / "out")
    save_file({**weights, name: torch.zeros(2, 16)}, source / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"the mask of {name} has shape \(2, 32\), the weight \(2, 16\)"):
        compress_checkpoint(source, tmp_path / "out")
    assert names(tmp_path) == {"dense"}


# --- damage ----------------------------------------------------------------------------------------


def refused(folder: Path, message: str) -> None:
    """By plain transformers and by decompress."""
    with pytest.raises(CheckpointError, match=message):
        AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=message):
        decompress_checkpoint(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def reseal(data: bytes, **changes: Any) -> bytes:
    """A file whose checksum is right again, after whatever was done to it: what an attacker would send."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = {**json.loads(header["__metadata__"]["hf_prune"]), **changes, "checksum": "0" * 64}
    header["__metadata__"]["hf_prune"] = json.dumps(described)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text + data[8 + length :]
    return whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1)


def test_a_resealed_file_is_accepted(small):
    replace_bytes(small / SINGLE, reseal((small / SINGLE).read_bytes()))
    PackedFiles([small / SINGLE])


def test_one_flipped_bit_anywhere_is_refused(small):
    data = (small / SINGLE).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    places = [8, 100, length - 1, length, length + 1, len(data) // 2, len(data) - 1]
    for place in places:
        replace_bytes(small / SINGLE, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match="download or save"):
            PackedFiles([small / SINGLE])
    refused(small, "its bytes do not match its checksum")


def test_a_flipped_bit_is_found_by_the_checksum_while_the_weights_are_read(small):
    """Whatever it does to them: to a value, which no other check would find, or to the positions or the header."""
    data = (small / SINGLE).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = [data.rindex(b"hfp1") + 5, data.rindex(b"hfp1") + 120, *range(start, len(data), (len(data) - start) // 9)]
    for place in places:
        replace_bytes(small / SINGLE, data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        for load in (AutoModelForSequenceClassification, AutoPrunedModelForSequenceClassification):
            with pytest.raises(CheckpointError, match="download or save"):
                load.from_pretrained(small)


def test_a_file_is_hashed_once(small, monkeypatch):
    hashed = []
    check = seal._check_digest
    monkeypatch.setattr(seal, "_check_digest", lambda *args: (hashed.append(args[0]), check(*args)))
    AutoPrunedModelForSequenceClassification.from_pretrained(small)
    assert hashed == [small / SINGLE]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_that_of_the_dense_checkpoint_rounded(folders, dtype):
    dense = AutoModelForSequenceClassification.from_pretrained(folders["dense"], dtype=dtype).state_dict()
    small = AutoModelForSequenceClassification.from_pretrained(folders["small"], dtype=dtype).state_dict()
    assert {tensor.dtype for tensor in small.values() if tensor.is_floating_point()} == {dtype}
    assert all(same_bits(small[name], dense[name]) for name in dense)


def test_truncated_files_are_refused(small):
    data = (small / SINGLE).read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        replace_bytes(small / SINGLE, data[:length])
        with pytest.raises(CheckpointError):
            PackedFiles([small / SINGLE])


def test_other_versions_are_refused(small):
    data = (small / SINGLE).read_bytes()
    replace_bytes(small / SINGLE, reseal(data, version=2))
    refused(small, r"has format and version \('hf_prune.packed', 2\): expected \('hf_prune.packed', 1\); update")
    replace_bytes(small / SINGLE, reseal(data, tensors=7))
    refused(small, "the files have 41 tensors, expected 7")
    replace_bytes(small / SINGLE, data)
    config = json_or_bytes(small / "config.json")
    config["quantization_config"]["compressed"] = 2
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="compressed 2, expected 1"):
        AutoModelForSequenceClassification.from_pretrained(small)


def test_a_packed_weight_that_lies_is_named(small):
    data = (small / SINGLE).read_bytes()
    place = data.index(b"hfp1", 8 + int.from_bytes(data[:8], "little"))
    changed = data[: place + 24] + (1 << 50).to_bytes(8, "little") + data[place + 32 :]
    replace_bytes(small / SINGLE, reseal(changed))
    refused(small, r"weight in model\.safetensors: a packed weight is damaged: .* claim to be a weight of shape")


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop(QUERY), "tensors, bert.*_packed without bert.*query.weight, expected 41"),
        (lambda header: header[QUERY + "_packed"].update(dtype="F8_E4M3"), "neither packed nor plain|it is of F8_E4M3"),
        (lambda header: header[QUERY].update(data_offsets=[0, 1 << 60]), "invalid offset for tensor"),
        (lambda header: header[QUERY].pop("dtype"), "missing field|does not describe tensors"),
        (lambda header: header.update({QUERY: []}), "invalid|does not describe tensors"),
    ],
)
def test_a_header_that_is_none_of_safetensors_is_refused(small, monkeypatch, change, message):
    """Nothing of it is loaded, nothing is random, and the error is ours, also of the reader beside a checkpoint."""
    data = (small / SINGLE).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    change(header)
    text = json.dumps(header).encode()
    changes = {"tensors": 42} if b"F8" in text else {}
    replace_bytes(small / SINGLE, reseal(len(text).to_bytes(8, "little") + text + data[length:], **changes))
    refused(small, message)
    reader = ModuleType("modeling_of_a_checkpoint")
    monkeypatch.setitem(sys.modules, reader.__name__, reader)  # where dataclasses look
    exec(modeling_source([]), vars(reader))
    with pytest.raises(reader.CheckpointError, match=message):  # type: ignore[attr-defined]
        [read([small / SINGLE]) for read in (reader.check_files, reader.dense_tensors)]


@pytest.mark.parametrize("shard", ["../small/model.safetensors", "/etc/model.safetensors", "..\\m.safetensors", "m", 3])
def test_an_index_that_leads_elsewhere_is_refused(sharded, shard):
    index = json_or_bytes(sharded / INDEX)
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file in the same folder"):
        decompress_checkpoint(sharded, sharded.parent / "out")
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file in the same folder"):
        AutoPrunedModelForSequenceClassification.from_pretrained(sharded)
    with pytest.raises(Exception):  # noqa: B017, PT011 # transformers reads the index before we do
        AutoModelForSequenceClassification.from_pretrained(sharded)


def test_an_index_of_other_files_is_refused(sharded):
    index = json_or_bytes(sharded / INDEX)
    weight_map = dict(index["weight_map"])
    lost = next(name for name in weight_map if name.endswith("LayerNorm.bias"))
    (sharded / INDEX).write_text(
        json.dumps({**index, "weight_map": {n: s for n, s in weight_map.items() if n != lost}})
    )
    refused(sharded, f"it does not name {lost}")
    first = weight_map[lost]
    (sharded / INDEX).write_text(
        json.dumps({**index, "weight_map": {n: s for n, s in weight_map.items() if s != first}})
    )
    refused(sharded, "tensors, expected 41")
    (sharded / INDEX).write_text(json.dumps({**index, "weight_map": {**weight_map, lost: max(weight_map.values())}}))
    refused(sharded, "the index says that")
    (sharded / INDEX).write_text(json.dumps(index))
    paths, _ = file_paths(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(INDEX)} is missing"):
        PackedFiles(paths)
    (sharded / INDEX).write_text(json.dumps(index))
    (sharded / first).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        decompress_checkpoint(sharded, sharded.parent / "out")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        "[" * 100_000,
        '{"weight_map": {"a": "a.safetensors"}, "metadata": 3}',
        '{"weight_map": {"a": "a.safetensors"}, "metadata": []}',
        '{"weight_map": {"a": "a.safetensors"}, "metadata": null}',
        '{"weight_map": {"a": "a.safetensors"}}',
    ],
)
def test_a_damaged_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        decompress_checkpoint(sharded, sharded.parent / "out")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, insert, copy, or write numbers that are as large as can be."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(changed))
        kind = rng.randrange(6)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.randrange(256)
        elif kind == 2:
            del changed[place : place + rng.randrange(1, 64)]
        elif kind == 3:
            changed[place:place] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 4:
            start = rng.randrange(len(changed))
            changed[place : place + 16] = changed[start : start + 16]
        else:
            changed[place : place + 8] = rng.choice([(1 << 64) - 1, 1 << 63, 1 << 40, 0]).to_bytes(8, "little")
        if not changed:
            break
    return bytes(changed)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory) -> Path:
    """A packed file of a few kilobytes with every layout in it."""
    root = tmp_path_factory.mktemp("tiny")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(8, 32, generator=generator).masked_fill_(torch.rand(8, 32, generator=generator) < sparsity, 0)
        for name, sparsity in (("a.weight", 0.0), ("b.weight", 0.5), ("c.weight", 0.9), ("d.weight", 1.0))
    }
    tensors["e.weight"] = tensors["a.weight"].clone()
    tensors["e.weight"].view(-1, 4)[:, 1:3] = 0
    (root / "dense").mkdir()
    save_file({**tensors, "a.bias": torch.ones(3)}, root / "dense" / SINGLE)
    (root / "dense" / "config.json").write_text("{}")
    compress_checkpoint(root / "dense", root / "small")
    layouts = {header.layout for header in PackedFiles([root / "small" / SINGLE]).headers.values()}
    assert layouts == {"full", "bits", "gaps", "groups"}
    return root / "small" / SINGLE


def read_all(path: Path) -> dict[str, torch.Tensor]:
    from hf_prune.checkpoint.packed.unpack import unpack

    files = PackedFiles([path])
    return {name: unpack(files.data(name), files.headers[name]) for name in files.packed}


@pytest.mark.parametrize("sealed", [pytest.param(False, marks=pytest.mark.crash), True])
def test_many_damaged_files_are_refused_or_harmless(tiny_file, tmp_path, sealed):
    """Damage is refused. With a checksum that is made right again, it is refused or gives weights of that size."""
    data = tiny_file.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    path = tmp_path / SINGLE
    outcomes = {"refused": 0, "read": 0}
    for _ in range(1500):
        if sealed:  # the contents are damaged, the header with the checksum is not
            body = mutate(data[length:], rng)[: len(data) - length].ljust(len(data) - length, b"\0")
            changed = reseal(data[:length] + body)
        else:
            changed = mutate(data, rng)
        replace_bytes(path, changed)
        try:
            tensors = read_all(path)
        except CheckpointError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert sealed or changed == data
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 1024 * len(changed)
    assert outcomes["refused"] > 500
    assert (outcomes["read"] > 50) == sealed


def test_damaged_masks_are_refused_or_harmless(folders, tmp_path):
    """Mask files have no checksum: what can be read has the counts that its header says."""
    data = (folders["dense"] / MASK_FILE).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    path = tmp_path / MASK_FILE
    refused = 0
    for number in range(1500):
        head = data[:length] if number % 3 else mutate(data[:length], rng)  # at times only the bits are damaged
        replace_bytes(path, head + (mutate(data[length:], rng) if number % 3 else data[length:]))
        try:
            masks = dict(StoredMasks(path))
        except CheckpointError:
            refused += 1
            continue
        assert sum(mask.numel() for mask in masks.values()) <= 8 * len(data)
    assert 750 < refused < 1500


# --- killed ----------------------------------------------------------------------------------------

KILLED = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from hf_prune import AutoPrunedModelForSequenceClassification
from hf_prune.conversion.compression import compress_checkpoint
from hf_prune.utils import staging

kind, dense, old, out, count = sys.argv[1], *map(Path, sys.argv[2:])
model = AutoPrunedModelForSequenceClassification.from_pretrained(dense)
write = {
    "compress": lambda: compress_checkpoint(dense, out, shard_bytes=20_000, overwrite=True),
    "save compressed": lambda: model.save_pretrained(out, compressed=True, max_shard_size="20KB"),
    "save dense": lambda: model.save_pretrained(out, max_shard_size="20KB"),
}[kind]
CHANGES = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile")
swap = staging._swap_names()

def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None

def start(steps):
    shutil.rmtree(out, ignore_errors=True)
    if old.exists():
        shutil.copytree(old, out)
    if child := os.fork():
        return child
    done = 0

    def step():
        nonlocal done
        if done == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1

    def hook(event, arguments):
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            step()

    def exchange(*arguments):
        step()
        result = swap(*arguments)
        step()
        return result

    staging._swap_names = lambda: exchange
    os.fsync = lambda file: step()  # a killed process loses nothing that it has written
    sys.addaudithook(hook)
    write()
    total = done
    done = -1 << 60
    count.write_text(str(total))
    os._exit(0)

def state(child):
    code = os.waitpid(child, 0)[1]
    found = contents(out)
    shutil.rmtree(out, ignore_errors=True)
    for left in out.parent.glob(".out*"):
        shutil.rmtree(left)
    return "old" if found == before else "new" if found == after else "broken", code

before = contents(old)
write()  # so that no fork imports anything
began = time.perf_counter()
child = start(-1)
os.waitpid(child, 0)
duration = time.perf_counter() - began
after, total = contents(out), int(count.read_text())
states = []
for steps in sorted({*range(0, total, max(1, total // 25)), *range(max(0, total - 8), total)}):
    states.append(state(start(steps))[0])
at_random = []
for number in range(10):
    child = start(-1)
    time.sleep(random.Random(number).random() * duration)
    os.kill(child, signal.SIGKILL)
    at_random.append(state(child)[0])
print(json.dumps({"total": total, "states": states, "random": at_random, "files": sorted(after)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")
@pytest.mark.covering(1, "crash")
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("kind", ["compress", "save compressed", "save dense"])
def test_killed_while_writing_the_old_checkpoint_or_the_new_one_is_there(
    folders, tmp_path, kind, exists, fresh_process
):
    """By a signal before each of many changes to the disk, and at random moments; byte for byte one or the other."""
    if exists:
        bert(seed=1, num_labels=3).save_pretrained(tmp_path / "old", compressed=True)
        (tmp_path / "old" / "notes").write_text("mine")
    done = fresh_process.run(KILLED, kind, folders["dense"], tmp_path / "old", tmp_path / "out", tmp_path / "n")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    states = found["states"]
    assert set(states + found["random"]) <= {"old", "new"}
    assert states.count("old") > 10
    assert "new" in states or not exists  # killed right after the exchange; without an old folder, a rename is the end
    assert states == sorted(states, key=["old", "new"].index)
    assert {"config.json", INDEX, *(["notes"] if exists else [])} <= set(found["files"])


# --- memory ----------------------------------------------------------------------------------------

PEAK = """
import sys, tempfile, threading
import hf_prune, transformers
from tests import models

def anonymous():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

load = getattr(hf_prune if sys.argv[1].startswith("AutoPruned") else transformers, sys.argv[1]).from_pretrained
with tempfile.TemporaryDirectory() as folder:  # imports and caches
    hf_prune.prunable(models.tiny_bert()).prune(0.5).save_pretrained(folder, compressed=True)
    load(folder)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[2], dtype=sys.argv[3])
done.set()
thread.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """100 MB dense, 80 % zeros, compressed."""
    root = tmp_path_factory.mktemp("large")
    config = BertConfig(vocab_size=4000, num_hidden_layers=3)
    prunable(BertForSequenceClassification(config)).prune(0.8).save_pretrained(root / "small", compressed=True)
    return root / "small"


@pytest.mark.matrix
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("AutoModelForSequenceClassification", "float32"), ("AutoPrunedModelForSequenceClassification", "bfloat16")],
)
def test_loading_takes_the_dense_model_and_one_tensor(large, kind, dtype):
    """In the dtype that is asked for, and the masks, a bit for each weight, where they are kept."""
    headers = PackedFiles([large / SINGLE]).headers.values()
    size = getattr(torch, dtype).itemsize
    tensors = [header.numel * size for header in headers]
    plain = sum(entry.size for entry in PackedFiles([large / SINGLE]).plain()) * size // 4
    masks = sum(header.numel // 8 for header in headers if header.masked) if "Pruned" in kind else 0
    words = [sys.executable, "-c", PEAK, kind, str(large), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    dense = sum(tensors) + plain
    assert dense > 22e6 * size
    spare = max(tensors) if not masks else 8 * max(tensors) // size  # bytes of comparing a mask
    threads = 4 * (2 << 20)  # pieces that each thread works on, and its allocator does not give back
    assert 0.9 * dense < int(done.stdout) <= dense + masks + spare + threads


# --- the command line ------------------------------------------------------------------------------


def test_commands(folders, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["compress", str(folders["dense"]), str(tmp_path / "small")])
    assert done.exit_code == 0, done.output
    assert re.search(r"of weights and masks are now .*×, bit for bit the same\nSaved: ", done.output)
    assert is_packed(tmp_path / "small" / SINGLE)
    done = runner.invoke(app, ["compress", str(folders["dense"]), str(tmp_path / "int8"), "--values", "int8"])
    assert "rounded to int8: measure what that costs" in done.output
    done = runner.invoke(app, ["decompress", str(tmp_path / "small"), str(tmp_path / "dense")])
    assert done.exit_code == 0
    assert contents(tmp_path / "dense")[MASK_FILE] == contents(folders["dense"])[MASK_FILE]
    done = runner.invoke(app, ["decompress", str(folders["dense"]), str(tmp_path / "no")])
    assert isinstance(done.exception, CheckpointError)
    assert os.listdir(tmp_path).sort() == ["dense", "int8", "small"].sort()


def test_adapters_beside_a_model_are_named(tmp_path):
    """By them transformers loads other weights than the files of the model have."""
    model = tmp_path / "model"
    prunable(models.tiny_bert()).prune(0.5).save_pretrained(model)
    (model / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "acme/other", "peft_type": "LORA"})
    )
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for read in (load_native, load_meta_model, counted_facts, AutoPrunedModelForSequenceClassification.from_pretrained):
        with pytest.raises(CheckpointError, match=r"holds a model and adapter_config.json, .*: expected one of"):
            read(model if read is counted_facts else str(model))
    with pytest.raises(CheckpointError, match=r"holds a model and adapter_config.json"):
        compress_checkpoint(model, tmp_path / "small")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_an_index_that_transformers_does_not_load_is_refused_everywhere(tmp_path, compressed):
    """Without metadata: else what loads here, or is written from it, loads nowhere else."""
    folder = tmp_path / "model"
    prunable(models.tiny_classifier()).prune(0.5).save_pretrained(folder, max_shard_size="10KB", compressed=compressed)
    describe_model(load_native(str(folder)), folder)
    index = json_or_bytes(folder / INDEX)
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"], "metadata": {}}))
    assert load_native(str(folder))  # which is enough
    (folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    before = contents(folder)
    reads = {
        "load": lambda: AutoPrunedModelForSequenceClassification.from_pretrained(folder),
        "load native": lambda: load_native(str(folder)),
        "verify": lambda: verify_checkpoint(str(folder)),
        "push": lambda: push_checkpoint(folder, "me/model", dry_run=True),
        "stream": lambda: load_meta_model(str(folder)),
        "migrate": lambda: migrate_checkpoint(folder, tmp_path / "out"),
        "rewrite": lambda: (decompress_checkpoint if compressed else compress_checkpoint)(folder, tmp_path / "out"),
    }
    for name in reads if not compressed else reads.keys() - {"stream", "migrate"}:  # which refuse what is compressed
        message = r'index\.json is damaged: its metadata is None.*add "metadata": \{\}'
        if name == "push":  # looks at the card first
            message = r"describes other files than those beside it \(model\.safetensors\.index\.json\)"
        with pytest.raises(CheckpointError, match=message):
            reads[name]()
    assert contents(folder) == before
    assert not (tmp_path / "out").exists()


def zeros(shape: tuple[int, ...]) -> bytes:
    """An honest packed weight that is all zeros, of any size, made without the memory for it."""
    frame = zstandard.ZstdCompressor().compress(b"")
    layout = LAYOUTS.index("gaps")
    head = HEAD.pack(MAGIC, CODECS.index("zstd"), 0, layout, 0, 1, 0, 0, 0, 0, len(shape), 0)
    head += struct.pack(f"<{len(shape) + 5}Q", *shape, *[len(frame)] * 5)
    body = b"".join(part + bytes(-len(part) % 8) for part in [head, *[frame] * 5])
    return body + bytes(max(0, -(-4 * math.prod(shape) // 1024) - len(body)))


def with_claims(folder: Path, claims: dict[str, tuple[int, ...]]) -> None:
    """Put weights of zeros into a compressed checkpoint."""
    data = (folder / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    parts = {name: data[8 + length + start : 8 + length + end] for name, (start, end) in offsets(header).items()}
    tensors = {name: (each["dtype"], each["shape"], len(parts[name])) for name, each in header.items()}
    for name, shape in claims.items():
        parts |= {name: b"", name + "_packed": zeros(shape)}
        tensors |= {
            name: ("F32", (0,), 0),
            name + "_packed": ("U8", (len(parts[name + "_packed"]),), len(zeros(shape))),
        }
    whole = header_bytes(tensors, metadata) + b"".join(parts[name] for name in tensors)
    count = len(tensors) - sum(name.endswith("_packed") for name in tensors)
    replace_bytes(folder / SINGLE, reseal(whole, tensors=count))


def offsets(header: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: tuple(each["data_offsets"]) for name, each in header.items()}


WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def none_is_large(monkeypatch):
    """An error where memory for more than a million values is asked for."""

    def small_only(read: Any) -> Any:
        def checked(data: Any, *args: Any, **kwargs: Any) -> Any:
            assert read_header(data).numel < 1_000_000, "memory was taken for a weight that the model does not have"
            return read(data, *args, **kwargs)

        return checked

    monkeypatch.setattr(packed_loading, "unpack", small_only(packed_loading.unpack))
    monkeypatch.setattr(packed_files, "unpack_mask", small_only(packed_files.unpack_mask))


@pytest.mark.usefixtures("none_is_large")
def test_a_weight_that_the_model_does_not_have_takes_no_memory(small):
    """A megabyte of an honest file can stand for a gigabyte, which is taken only where the model has it."""
    with_claims(
        small, {WORDS: (1 << 20, 256), "other.weight": (1 << 28,), "cls.predictions.weight": (1 << 14, 1 << 14)}
    )
    assert (small / SINGLE).stat().st_size < 4 << 20
    for auto in (AutoModelForSequenceClassification, AutoPrunedModelForSequenceClassification):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            auto.from_pretrained(small)
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load_native(str(small))
    again, info = AutoModelForSequenceClassification.from_pretrained(
        small, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {(name, tuple(found)) for name, found, _ in info["mismatched_keys"]} == {(WORDS, (1 << 20, 256))}
    assert not info["missing_keys"]
    assert again.get_parameter(WORDS).numel() < 100_000


@pytest.mark.usefixtures("none_is_large")
def test_a_mask_that_the_model_does_not_have_takes_no_memory(small):
    with_claims(small, {"other.weight": (1 << 28,)})
    with pytest.raises(
        CheckpointError, match=r"'other.weight' has a mask of shape \(268435456,\), the model has no such"
    ):
        AutoPrunedModelForSequenceClassification.from_pretrained(small)


@pytest.mark.usefixtures("none_is_large")
def test_weights_that_are_joined_are_no_larger_than_the_model(tmp_path):
    """Experts have no shape of their own in the model: all of them together are compared with it."""
    mixtral().save_pretrained(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    name = next(name for name in PackedFiles([tmp_path / "small" / SINGLE]).shards.entries if ".experts." in name)
    with_claims(tmp_path / "small", {name.removesuffix("_packed"): (1 << 14, 1 << 14)})
    with pytest.raises(CheckpointError, match=r"the packed weights stand for 268,.* the model .* describes has"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_model_of_zeros_is_loaded(tmp_path):
    """The honest extreme: a thousandth of its size, and all of it is the model's."""
    model = prunable(BertForSequenceClassification(BertConfig(vocab_size=4000, num_hidden_layers=1)))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.prune(0.999).save_pretrained(tmp_path / "small", compressed=True)
    size = (tmp_path / "small" / SINGLE).stat().st_size
    assert sum(p.numel() * 4 for p in model.parameters() if p.dim() > 1) > 200 * size
    again = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert not any(parameter.any() for parameter in again.parameters())


def test_a_missing_shard_is_named(tmp_path):
    models.tiny_bert().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = max(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    for read in (load_native, load_meta_model, AutoPrunedModelForSequenceClassification.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"{shard.name} is missing from .*, and the index says that weights"):
            read(str(tmp_path))
