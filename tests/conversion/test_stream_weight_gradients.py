"""Streaming of criteria that need the gradient of every weight: the masks of a pruning in memory."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_prune import CalibrationError, PlanError, PruningConfig, prune_stream
from hf_prune.auto import load_native
from hf_prune.calibration import descent
from hf_prune.calibration.gradients import mean_gradients
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.conversion.streaming import fisher_stream
from hf_prune.conversion.streaming.lazy_weights import LazyWeights
from hf_prune.conversion.streaming.output import Output
from hf_prune.conversion.streaming.weight_gradients import WeightGradients
from hf_prune.kernels import chunked_logits
from hf_prune.mixin import prunable
from tests import models
from tests.moe_models import tiny_mixture
from tests.pruning.test_packed_experts import batches as mixture_batches
from tests.support.streams import stop_at_weight

SETTINGS: dict[str, dict[str, Any]] = {
    "taylor": {"criterion": "taylor"},
    "taylor, global": {"criterion": "taylor", "scope": "global"},
    "snip, row": {"criterion": "snip", "scope": "row"},
    "snip, repaired by loss": {"criterion": "snip", "repair": "least_squares", "objective": "loss"},
    "taylor, repaired": {"criterion": "taylor", "repair": "least_squares"},
    "fisher_diagonal": {"criterion": "fisher_diagonal"},
    "fisher_diagonal, 2:4": {"criterion": "fisher_diagonal", "granularity": "2:4"},
    "fisher_diagonal, blocks by fisher": {
        "criterion": "fisher_diagonal", "granularity": "block:2x2", "allocation": "fisher",
    },
    "fisher": {"criterion": "fisher"},
    "fisher, global": {"criterion": "fisher", "scope": "global"},
    "fisher, 2:4": {"criterion": "fisher", "granularity": "2:4"},
    "fisher, repaired by loss": {"criterion": "fisher", "repair": "least_squares", "objective": "loss"},
    "taylor, owl": {"criterion": "taylor", "allocation": "owl"},
}  # fmt: skip
KINDS = {kind: models.TRANSFORMERS[kind] for kind in ("llama", "gpt2", "bert", "bert_mlm", "resnet")}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="5KB")
    return folder


def both_ways(source: Path, config: PruningConfig, batches: Any, folder: Path) -> Any:
    """Prune in memory and as a stream, make sure that the masks have the same bytes, and return what is in memory."""
    expected = load_native(str(source))
    expected.prune(config, calibration=batches).save_pretrained(folder / "expected")
    prune_stream(source, config, folder / "out", calibration=batches, cache_bytes=0)
    assert filecmp.cmp(folder / "expected" / MASK_FILE, folder / "out" / MASK_FILE, False)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return expected


@pytest.mark.filterwarnings("ignore:Left dense, since granularity")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_a_pruning_in_memory(kind, settings, tmp_path):
    model = KINDS[kind]()
    source, config = saved(model, tmp_path / "source"), PruningConfig(**{"sparsity": 0.5, **settings})
    expected = both_ways(source, config, models.tiny_batches(model), tmp_path).state_dict()
    found = load_native(str(tmp_path / "out")).state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["taylor", "snip", "fisher"])
def test_a_mask_of_an_earlier_pruning_stays(criterion, scope, tmp_path):
    model = models.tiny_llama()
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    prune_stream(source, 0.3, tmp_path / "first", criterion="magnitude")
    both_ways(tmp_path / "first", PruningConfig(0.6, criterion=criterion, scope=scope), batches, tmp_path)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_many_rounds_of_fisher_blocks_find_what_one_finds(kind, scope, tmp_path, monkeypatch):
    """Each block of the model runs several times before the gradient goes on to the one below."""
    model = KINDS[kind]()
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    config, run = PruningConfig(0.6, criterion="fisher", scope=scope), descent.run_block
    passes = [0]

    def counted(*arguments: Any) -> Any:
        passes[0] += 1
        return run(*arguments)

    prune_stream(source, config, tmp_path / "one", calibration=batches)
    monkeypatch.setattr(fisher_stream, "FISHER_BYTES", 20_000)
    monkeypatch.setattr(descent, "run_block", counted)
    prune_stream(source, config, tmp_path / "many", calibration=batches, cache_bytes=0)
    assert passes[0] > 5 * 2 * 5 * model.config.num_hidden_layers  # five examples
    assert filecmp.cmp(tmp_path / "one" / MASK_FILE, tmp_path / "many" / MASK_FILE, False)
    one, many = (load_native(str(tmp_path / name)).state_dict() for name in ("one", "many"))
    for name, weight in one.items():
        torch.testing.assert_close(many[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the predictions depend on no weight of", "ignore:.*experts that saw (fewer|no)")
@pytest.mark.parametrize("criterion", ["taylor", "snip", "fisher_diagonal", "fisher"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_packed_experts(family, criterion, tmp_path):
    tiny_mixture(family).save_pretrained(tmp_path / "source", max_shard_size="12KB")
    config, batches = PruningConfig(0.5, criterion=criterion), mixture_batches()
    model = prunable(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    model.config._experts_implementation = "eager"
    model.prune(config, calibration=batches)
    prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=batches)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(found[name] == 0, weight == 0), name
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_experts_without_tokens_are_pruned_by_magnitude_with_the_same_warning(tmp_path):
    tiny_mixture("mixtral").save_pretrained(tmp_path / "source")
    batches = [{name: values[:1, :1].repeat(1, 2) for name, values in mixture_batches()[0].items()}]
    config, message = PruningConfig(0.5, criterion="snip"), "depend on no weight of .*pruned by magnitude"
    model = prunable(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    model.config._experts_implementation = "eager"
    with pytest.warns(UserWarning, match=message) as in_memory:
        model.prune(config, calibration=batches)
    with pytest.warns(UserWarning, match=message) as streamed:
        prune_stream(tmp_path / "source", config, tmp_path / "out", calibration=batches)
    assert [str(warning.message) for warning in streamed] == [str(warning.message) for warning in in_memory]
    models.assert_unchanged(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), models.snapshot(model))


def large_vocabulary() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return models.fill(LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, **sizes)))


@pytest.mark.parametrize("criterion", ["taylor", "snip", "fisher_diagonal", "fisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_labels_that_do_not_count_and_a_large_vocabulary(criterion, dtype, in_chunks, tmp_path, monkeypatch):
    """Windows one by one in the output layer, which is pruned as well; a batch without labels that count has no say."""
    if in_chunks:
        monkeypatch.setattr(chunked_logits, "CHUNK", 96 * 5)
        monkeypatch.setattr("hf_prune.calibration.batches._MOST_LOGITS", 96 * 10)
    source = saved(large_vocabulary().to(dtype), tmp_path / "source")
    ids = torch.randint(0, 96, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 3:] = -100
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels},
        {"input_ids": ids.flip(1), "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)},
        {"input_ids": ids[:2], "attention_mask": torch.ones_like(ids[:2]), "labels": ids[:2]},
    ]
    config = PruningConfig(0.5, criterion=criterion, target_modules=["lm_head", "down_proj", "q_proj"])
    assert "lm_head.weight" in both_ways(source, config, batches, tmp_path).masks


def test_gradients_are_those_of_one_backward_pass(tmp_path, monkeypatch):
    """Not only the masks: each gradient, to the last bits, so that no weight of the examples is lost."""
    model = models.tiny_llama()
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model, sizes=(3, 1))
    found: dict[str, torch.Tensor] = {}
    real = WeightGradients.stats

    def kept(self: WeightGradients, name: str) -> Any:
        stats = real(self, name)
        assert stats.gradient is not None
        found[name] = stats.gradient
        return stats

    monkeypatch.setattr(WeightGradients, "stats", kept)
    prune_stream(source, 0.5, tmp_path / "out", criterion="snip", calibration=batches)
    expected = mean_gradients(load_native(str(source)), list(found), batches, frozenset({"gradient"}))["gradient"]
    assert len(found) == 14
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("settings", [{"scope": "global"}, {"repair": "least_squares"}, {}], ids=str)
@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_an_interrupted_run_takes_gradients_of_the_dense_weights_again(criterion, settings, tmp_path, monkeypatch):
    model = models.tiny_llama()
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    config = PruningConfig(0.6, criterion=criterion, **settings)
    prune_stream(source, config, tmp_path / "whole", calibration=batches)
    write = Output.write
    stop_at_weight(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        prune_stream(source, config, tmp_path / "out", calibration=batches)
    again: list[str] = []
    monkeypatch.setattr(Output, "write", lambda self, tensor, *rest: (again.append(tensor), write(self, tensor, *rest)))
    prune_stream(source, config, tmp_path / "out", calibration=batches)
    assert len(again) == 14 - 8
    assert filecmp.cmp(tmp_path / "whole" / MASK_FILE, tmp_path / "out" / MASK_FILE, False)
    whole, resumed = (load_native(str(tmp_path / name)).state_dict() for name in ("whole", "out"))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("criterion", ["taylor", "fisher_diagonal", "fisher"])
def test_weights_of_one_block_at_a_time_are_in_memory(criterion, tmp_path, monkeypatch):
    """Whatever is read or run, and those of the block are held with gradients once it comes down."""
    model = models.TRANSFORMERS["llama"](num_hidden_layers=3)
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    largest, blocks, with_gradients = [0], set[str](), set[str]()
    put = LazyWeights._put

    def watched(self: LazyWeights, name: str, parameter: Any) -> None:
        put(self, name, parameter)
        held = {n: p for n, p in self.model.named_parameters() if not p.is_meta and "layers." in n and p.dim() == 2}
        with_gradients.update(n for n, p in held.items() if p.requires_grad)
        blocks.update(of := {n.split("layers.")[1].split(".")[0] for n in held})
        assert len(of) <= 1, held
        largest[0] = max(largest[0], len(held))

    monkeypatch.setattr(LazyWeights, "_put", watched)
    prune_stream(source, 0.5, tmp_path / "out", criterion=criterion, calibration=batches)
    assert blocks == {"0", "1", "2"}
    assert largest[0] == 7
    assert len(with_gradients) == 21


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "found 2 lists of blocks, expected one that every batch uses"),
        ("albert", "found 0 lists of blocks, expected one that every batch uses"),
    ],
)
def test_models_without_one_row_of_blocks_are_refused(kind, message, tmp_path):
    model = models.TRANSFORMERS[kind]()
    source = saved(model, tmp_path / "source")
    with pytest.raises(PlanError, match=message):
        prune_stream(source, 0.5, tmp_path / "out", criterion="taylor", calibration=models.tiny_batches(model))
    assert not (tmp_path / "out").exists()


def test_a_weight_before_the_blocks_and_after_them_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = models.fill(LlamaForCausalLM(LlamaConfig(vocab_size=96, tie_word_embeddings=True, **sizes)))
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    settings = {"criterion": "snip", "target_modules": ["lm_head", "q_proj"]}
    load_native(str(source)).prune(0.5, calibration=batches, **settings)  # which the whole model in memory can do
    with pytest.raises(
        PlanError, match=r"since .* is used between the blocks, or before and after them: name it in exclude"
    ):
        prune_stream(source, 0.5, tmp_path / "out", calibration=batches, **settings)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda batch: batch.pop("labels"), "the model returned no loss for a batch with attention_mask, input_ids"),
        (lambda batch: batch["labels"].fill_(-100), "no label counts in any of the 2 batches"),
    ],
)
def test_batches_without_a_loss_are_refused_as_in_memory(harm, message, tmp_path):
    model = models.tiny_llama()
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    for batch in batches:
        harm(batch)
    with pytest.raises(CalibrationError, match=message):
        load_native(str(source)).prune(0.5, criterion="taylor", calibration=batches)
    with pytest.raises(CalibrationError, match=message):
        prune_stream(source, 0.5, tmp_path / "out", criterion="taylor", calibration=batches)
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_not_finite_is_refused(tmp_path):
    model = models.tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("inf")
    source, batches = saved(model, tmp_path / "source"), models.tiny_batches(model)
    with pytest.raises(CalibrationError, match="the loss of a calibration batch is nan"):
        prune_stream(source, 0.5, tmp_path / "out", criterion="taylor", calibration=batches)
