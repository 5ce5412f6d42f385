"""Calibrated pruning of causal language models: grouped heads, shared inputs, replayed blocks, and a trained model."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.replay import Replay
from hf_prune.calibration.statistics import collect_stats
from hf_prune.calibration.texts import token_windows
from hf_prune.criteria.base import INPUTS
from hf_prune.evaluation.perplexity import compare_perplexity, evaluate_perplexity
from hf_prune.evaluation.perplexity_result import Perplexity
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.offload_cache import OffloadCache
from tests import models
from tests.evaluation.test_perplexity import sharp, words
from tests.models import same_bits
from tests.pruning.test_sequential import holders, spied_grams

SHARED = os.environ.get("HF_PRUNE_SHARED")

METHODS = {
    "wanda": {"criterion": "wanda", "scope": "row"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "alps": {"criterion": "alps"},
    "repair": {"repair": "least_squares"},
}


def sharp_gpt2() -> nn.Module:
    model = models.tiny_gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12)
    return model


def deep() -> nn.Module:
    return sharp(num_hidden_layers=4)


def windows(seed: int = 0, **options) -> list[dict]:
    return token_windows([words(900, seed)], models.tiny_tokenizer(), **{"n": 24, "length": 20, **options})


def change_of_outputs(model: nn.Module, dense: nn.Module, batches: list[dict]) -> float:
    with torch.no_grad():
        return sum(float((model(**b).logits - dense(**b).logits).pow(2).sum()) for b in batches)


# --- tiny models -----------------------------------------------------------------------------------


@pytest.mark.covering(2)
@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [sharp, sharp_gpt2], ids=["llama", "gpt2"])
def test_windows_calibrate_every_method(make, method, granularity):
    settings = dict(METHODS[method])
    if granularity != "unstructured":
        settings.pop("scope", None)
    dense, batches = make(), windows()
    config = PruningConfig(granularity=granularity, **settings)
    model = prune(make(), config, calibration=batches)
    planned = make_plan(dense, config).tensors
    masks = MaskStore.of(model).masks
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {
        t.target.name: t.target.size // 2 for t in planned
    }
    if make is sharp:  # four query heads share two of key and value
        assert masks["model.layers.0.self_attn.q_proj.weight"].shape == (16, 16)
        assert masks["model.layers.0.self_attn.k_proj.weight"].shape == (8, 16)
        assert len(masks) == 2 * 7
    again = prune(make(), config, calibration=[{"input_ids": b["input_ids"]} for b in batches])
    for name, parameter in model.named_parameters():  # a mask that hides nothing changes nothing
        assert same_bits(again.get_parameter(name), parameter)
    magnitude = prune(make(), granularity=granularity)
    held_out = windows(seed=1)
    if method != "wanda":  # a score alone is no promise about a random model
        assert change_of_outputs(model, dense, batches) < change_of_outputs(magnitude, dense, batches)
        assert change_of_outputs(model, dense, held_out) < change_of_outputs(magnitude, dense, held_out)


@pytest.mark.parametrize("criterion", ["taylor", "snip"])
def test_criteria_with_gradients_learn_from_the_next_tokens(criterion):
    model = prune(sharp(), 0.5, criterion=criterion, calibration=windows(labels=True))
    magnitude = prune(sharp(), 0.5)
    name = "model.layers.1.mlp.up_proj.weight"
    assert int((model.get_parameter(name) == 0).sum()) == 16 * 32 // 2
    assert not torch.equal(MaskStore.of(model).masks[name], MaskStore.of(magnitude).masks[name])


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", [deep, lambda: models.tiny_gpt2(n_layer=4)], ids=["llama", "gpt2"])
@pytest.mark.parametrize("criterion", ["wanda", "alps"])
def test_blocks_that_are_not_run_again_change_no_bit(make, criterion, monkeypatch):
    once = prune(make(), 0.5, criterion=criterion, calibration=windows())
    monkeypatch.setattr(Replay, "pending", lambda self: [])
    whole = prune(make(), 0.5, criterion=criterion, calibration=windows())
    for name, parameter in whole.named_parameters():
        assert same_bits(once.get_parameter(name), parameter)


def test_what_finished_blocks_put_out_is_read_twice_a_batch_not_once_a_block(monkeypatch):
    model, batches = sharp(num_hidden_layers=6), windows(batch_size=12)
    reads: list[int] = []
    read = OffloadCache.get
    monkeypatch.setattr(OffloadCache, "get", lambda cache, key: reads.append(key) or read(cache, key))
    with InputReader(model, targets_of(make_plan(model, PruningConfig(criterion="alps"))), batches) as reader:
        for step in reader.order():
            (sequence,) = reader.replay.sequences
            reader.verify()  # which reads too
            reads.clear()
            reader.gather(step, INPUTS)
            assert len(reads) <= 2 * len(batches)
            reader.finish(step)
        assert sequence.replayed == 5
        assert reads == [0, 0, 1, 1]


def test_calibration_computes_no_cache_and_only_one_logit_that_nobody_looks_at():
    model, seen = sharp(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    plan = make_plan(model, PruningConfig(criterion="alps"))
    batches = windows()
    found = collect_stats(model, plan, batches)
    assert {(kwargs["use_cache"], kwargs["logits_to_keep"]) for kwargs in seen} == {(False, 1)}
    plain = sharp()
    for name, gram in spied_grams(plain, batches, holders(plain, plan)).items():
        torch.testing.assert_close(found[name].input_gram, gram.float(), rtol=1e-4, atol=1e-6)
    seen.clear()
    collect_stats(model, plan, windows(labels=True))
    assert seen
    assert all("logits_to_keep" not in kwargs for kwargs in seen)  # labels are compared with all of them
    seen.clear()
    collect_stats(model, plan, [{**batch, "use_cache": True} for batch in batches])
    assert all(kwargs["use_cache"] for kwargs in seen)


def test_a_head_that_is_pruned_sees_every_token():
    model, batches = sharp(), windows()
    plan = make_plan(model, PruningConfig(criterion="alps", target_modules=["lm_head", "down_proj"]))
    clone = sharp()
    expected = spied_grams(clone, batches, holders(clone, plan))
    found = collect_stats(model, plan, batches)
    assert "lm_head.weight" in found
    for name, gram in expected.items():
        torch.testing.assert_close(found[name].input_gram, gram.float(), rtol=1e-4, atol=1e-6)


# --- a trained model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    """A Llama of 260,000 parameters that tells stories, and windows of its own: to calibrate on, and held out."""
    if not SHARED:
        pytest.skip("HF_PRUNE_SHARED names no folder with models/stories260k")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(SHARED) / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    starts = torch.full((96, 1), tokenizer.bos_token_id)
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 192, "pad_token_id": tokenizer.eos_token_id}
    told = model.generate(starts, attention_mask=torch.ones_like(starts), **options)
    texts = tokenizer.batch_decode(told, skip_special_tokens=True)
    batches = token_windows(texts[:64], tokenizer, n=64, length=128, batch_size=16)

    def score(pruned: nn.Module) -> Perplexity:
        return evaluate_perplexity(pruned, tokenizer, texts[64:], window=128, batch_size=8)

    return model, batches, score, score(model)


def test_dense_perplexity_of_stories(stories):
    _, batches, _, dense = stories
    assert sum(len(b["input_ids"]) for b in batches) == 64
    assert 3.5 < dense.perplexity < 6  # 4.5 on the stories that it learnt from
    assert dense.n > 30
    assert 0 < dense.standard_error < 0.4


@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_calibrated_methods_are_better_than_magnitude_on_held_out_stories(stories, granularity):
    model, batches, score, dense = stories
    found = {}
    for name, settings in {"magnitude": {}, **METHODS}.items():
        settings = {k: v for k, v in settings.items() if k != "scope" or granularity == "unstructured"}
        pruned = prune(copy.deepcopy(model), granularity=granularity, calibration=batches, **settings)
        found[name] = score(pruned)
        assert compare_perplexity(dense, found[name]).interval[0] > 1  # half of a model this small is not free
    for name in METHODS:
        assert compare_perplexity(found["magnitude"], found[name]).interval[1] < 0.9, name
    assert compare_perplexity(found["sparsegpt"], found["alps"]).interval[1] < 1
