"""Small configs that ask for huge models: they are counted while they are built, and stopped."""

import json
import shutil
import threading

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_prune import AutoPrunedModelForSequenceClassification, CheckpointError, DataError
from hf_prune.auto import load_native
from hf_prune.checkpoint.building import limited_building
from hf_prune.checkpoint.load import limited_to_files
from hf_prune.conversion.streaming.meta_model import load_meta_model
from tests import models

SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
GPT = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 1}
MANY, SQUARED, WIDE = "more than 2,000 (modules|tensors)", "bytes of buffers", "more than 150,000,000 parameters"
BOMBS = {
    "albert groups": (transformers.AlbertConfig(num_hidden_groups=10**6, embedding_size=8, **SMALL), MANY),
    "albert inner groups": (transformers.AlbertConfig(inner_group_num=10**6, embedding_size=8, **SMALL), MANY),
    "mobilebert networks": (transformers.MobileBertConfig(num_feedforward_networks=10**6, **SMALL), MANY),
    "funnel blocks": (transformers.FunnelConfig(vocab_size=48, block_sizes=[10**6], d_model=16, d_inner=16), MANY),
    "bert layers": (transformers.BertConfig(**{**SMALL, "num_hidden_layers": 10**6}), MANY),
    "gpt-neo positions": (
        transformers.GPTNeoConfig(
            max_position_embeddings=50_000, hidden_size=16, num_layers=2, attention_types=[[["global"], 2]], **GPT
        ),
        SQUARED,
    ),
    "gpt-bigcode positions": (
        transformers.GPTBigCodeConfig(n_positions=50_000, n_embd=16, n_head=2, n_layer=1, **GPT),
        SQUARED,
    ),
    "bert width": (transformers.BertConfig(**{**SMALL, "hidden_size": 100_000}), WIDE),
    "bert positions": (transformers.BertConfig(max_position_embeddings=10**9, **SMALL), WIDE),
    "distilbert positions": (
        transformers.DistilBertConfig(vocab_size=48, max_position_embeddings=10**7, n_layers=1),
        WIDE,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_stopped_while_they_are_built(name):
    config, said = BOMBS[name]
    limits = {"parameters": 150_000_000, "modules": 2_000, "buffer_bytes": 200_000_000}
    with (
        pytest.raises(DataError, match=f"the config of it builds {said if said != SQUARED else '.*' + said}.*: advice"),
        torch.device("meta"),
        limited_building("it", "advice", **limits),
    ):
        AutoModelForSequenceClassification.from_config(config)


def test_what_is_counted():
    def build(**limits):
        with limited_building("it", "advice", **limits):
            model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))  # 9 + 6 values, 3 + 3 + 1 of buffers
            model[0] = nn.Linear(2, 3)  # in the place of the first
            return model

    assert len(build(parameters=15 + 9, modules=6, buffer_bytes=2 * 12 + 8)) == 2
    for limits, said in (
        ({"parameters": 23}, "more than 23 parameters"),
        ({"modules": 5}, "more than 5 tensors"),
        ({"buffer_bytes": 31}, "more than 31 bytes of buffers"),
    ):
        with pytest.raises(DataError, match=f"the config of it builds {said}, and was stopped there: advice"):
            build(**limits)
    with limited_building("it", "advice", modules=0):
        other = threading.Thread(target=lambda: found.append(nn.Sequential(nn.Linear(1, 1))))
        found = []
        other.start()
        other.join()
    assert len(found) == 1  # another thread builds what it likes
    assert len(nn.Sequential(nn.Linear(1, 1))) == 1  # and so does this one, afterwards


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A downloaded repository, and what is at the same time a Hub id and its folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--me--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    folder = repo / "snapshots" / "abc"
    models.tiny_classifier().save_pretrained(folder)
    return tmp_path, folder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10_000}, "builds more than 14,100 (modules|tensors)"),
        ({"vocab_size": 10**9}, "builds more than 100,[0-9]+,[0-9]+ parameters"),
    ],
)
def test_a_repository_builds_no_more_than_its_files_can_fill(cache, values, said):
    root, folder = cache
    where = {"cache_dir": root, "local_files_only": True}
    assert AutoPrunedModelForSequenceClassification.from_pretrained("me/tiny", **where).num_parameters() < 10_000
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match=f"the config of me/tiny {said}.*weight files hold 41 tensors in"):
        AutoPrunedModelForSequenceClassification.from_pretrained("me/tiny", **where)
    for load in (load_native, load_meta_model):
        with pytest.raises(DataError, match=said):
            load(str(folder))  # as verify has it
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_no_folder_builds_more_whatever_its_name_and_the_name_of_its_files(cache, tmp_path, variant):
    load = AutoPrunedModelForSequenceClassification.from_pretrained
    mine = tmp_path / "mine"
    shutil.copytree(cache[1], mine)
    if variant is not None:
        (mine / "model.safetensors").rename(mine / f"model.{variant}.safetensors")
    assert load(mine, variant=variant).num_parameters() < 10_000
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "vocab_size": 10**9}))
    with pytest.raises(DataError, match=r"builds more than 100,[0-9]+,[0-9]+ parameters.*load it with its tr"):
        load(mine, variant=variant)


def test_a_pickle_of_a_variant_is_refused(cache):
    (cache[1] / "model.safetensors").rename(cache[1] / "pytorch_model.fp16.bin")
    with pytest.raises(CheckpointError, match=r"weights in pytorch_model\.fp16\.bin, .*expected model\.fp16\.safetens"):
        AutoPrunedModelForSequenceClassification.from_pretrained(cache[1], variant="fp16")


def test_files_of_other_kinds_limit_by_their_size(tmp_path):
    (tmp_path / "model.gguf").write_bytes(bytes(1 << 20))
    said = "more than 116,777,216 parameters.* 1,000 tensors in 1,048,576 bytes"
    with pytest.raises(DataError, match=said), limited_to_files("it", [str(tmp_path / "model.gguf")]):
        nn.Linear(10**5, 10**5, device="meta")
    with pytest.raises(DataError, match="more than 100,000,000 parameters"), limited_to_files("it", []):
        nn.Linear(10**5, 10**5, device="meta")
