"""Fewer dimensions of the hidden states: exactly what the dense model computes without them, in plain transformers."""

import copy
import json

import pytest
import torch
from transformers import BertForSequenceClassification

import hf_prune
from hf_prune import (
    ArchitectureError,
    CalibrationError,
    ConfigError,
    PlanError,
    PruningConfig,
    prune,
    shrink,
    trim_hidden,
)
from hf_prune.cli.main import main
from tests.architecture_models import tiny
from tests.models import assert_unchanged, snapshot, tiny_tokenizer
from tests.support.command_line import run_command

SIZE = 32  # of the hidden states of tiny models


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def without(dense, kept):
    """A pre-norm decoder that writes nothing into dimensions, with RMSNorms of the others: by hand.

    Over all dimensions, of which the others are 0, the mean of squares is smaller by the share that stays; weights and
    epsilons make up for that.
    """
    model, share = copy.deepcopy(dense), len(kept) / SIZE
    gone = torch.ones(SIZE, dtype=torch.bool).index_fill(0, torch.tensor(kept), False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, gone] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm") and len(module.weight) == SIZE:
                module.weight *= share**0.5
                module.variance_epsilon *= share
    return model


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("llama", False), ("llama", True), ("mistral", False), ("qwen2", False), ("qwen3", True)],
)
def test_a_decoder_is_the_dense_one_that_writes_nothing_else_and_has_norms_of_what_stays(model_type, tied, tmp_path):
    model, inputs = tiny(model_type, tie_word_embeddings=tied)
    batch, dense, heads = inputs(), copy.deepcopy(model), model.model.layers[0].self_attn.head_dim
    result = trim_hidden(model, 16, calibration=batch)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert (len(result.kept), result.before, model.config.hidden_size) == (16, SIZE, 16)
    assert logits(model, batch) == pytest.approx(logits(without(dense, result.kept), batch), rel=1e-4, abs=1e-5)
    assert not torch.allclose(logits(model, batch), logits(dense, batch), atol=0.01)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert again.model.layers[0].self_attn.head_dim == heads
    assert str(again) == str(model)  # sizes of modules
    assert result.parameters == again.num_parameters() < result.parameters_before == dense.num_parameters()
    assert "16 of 32 dimensions" in str(result)
    assert result.to_dict()["kept"] == list(result.kept)


def test_the_dimensions_with_the_largest_outputs_of_norms_stay():
    model, inputs = tiny("llama")
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.weight[[1, 5, 6, 30]] = 1e-3
    batch, sums = inputs(), []
    tokens = batch["attention_mask"].bool()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.register_forward_hook(lambda m, x, y: sums.append(y[tokens].abs().mean(0)))
    logits(model, batch)
    expected = sum(sums).topk(24).indices.sort().values.tolist()
    kept = trim_hidden(model, 24, calibration=[batch]).kept
    assert list(kept) == expected
    assert {1, 5, 6, 30}.isdisjoint(kept)


def test_each_token_counts_once_however_batches_are_made():
    model, inputs = tiny("llama")
    batch = inputs()
    other = copy.deepcopy(model)
    kept = trim_hidden(model, 16, calibration=batch).kept
    assert (
        trim_hidden(other, 16, calibration=[{k: v[i : i + 1] for k, v in batch.items()} for i in (0, 1)]).kept == kept
    )


def test_a_share_is_rounded_up_to_what_the_config_accepts():
    model, inputs = tiny("llama")  # of 8 heads
    assert len(trim_hidden(model, 0.6, calibration=inputs()).kept) == 24
    with pytest.raises(ConfigError, match=r"size is 0\.99, and from 24 on, the config accepts no number below 24"):
        trim_hidden(model, 0.99, calibration=inputs())


def test_records_and_precision_stay_and_masks_are_refused(tmp_path):
    model, inputs = tiny("llama")
    model, batch = model.bfloat16(), inputs()
    dense = model.num_parameters()
    shrink(prune(model, 0.5, granularity="neuron", scope="global"))
    assert len({len(layer.mlp.up_proj.weight) for layer in model.model.layers}) > 1
    sizes = [len(layer.mlp.up_proj.weight) for layer in model.model.layers]
    trim_hidden(model, 24, calibration=batch)
    trim_hidden(model, 16, calibration=batch)
    record = model.config.pruned_structure
    assert record["parameters_before"] == dense
    assert record["hidden_size"] == {"before": SIZE, "kept": 16}
    assert record["units"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    hf_prune.prunable(model).save_pretrained(tmp_path)
    again = hf_prune.AutoPrunedModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert [len(layer.mlp.up_proj.weight) for layer in again.model.layers] == sizes
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert hf_prune.structure_report(again).parameters_before == dense
    prune(again, 0.5, criterion="wanda", calibration=[batch])  # it is a model like others
    with pytest.raises(PlanError, match="the model has masks"):
        trim_hidden(again, 8, calibration=batch)


def test_cards_of_trimmed_models_verify(tmp_path):
    model, inputs = tiny("llama", tie_word_embeddings=True)
    shrink(prune(model, 0.25, granularity="neuron", scope="layer"))
    trim_hidden(model, 8, calibration=inputs())
    model = hf_prune.prunable(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "sparsity_report.json").write_text(json.dumps(model.sparsity_report().to_dict()))
    with pytest.raises(SystemExit, match="0"):
        main(["card", str(tmp_path), "--write"])
    found = hf_prune.verify_checkpoint(tmp_path)
    assert found.is_right, str(found)
    assert "parameters before, in config.json" in [fact.name for fact in found.facts]


def test_bert_needs_heads_of_the_same_size_in_all(tmp_path):
    model, inputs = tiny("bert")
    batch = inputs()
    before = snapshot(model)
    with pytest.raises(ArchitectureError, match=r"size of the heads would change \(at bert\.enc.*; first remove heads"):
        trim_hidden(model, 16, calibration=batch)
    assert_unchanged(model, before)
    assert model.config.hidden_size == SIZE
    shrink(prune(model, 0.5, granularity="head", scope="layer"))
    with pytest.raises(ArchitectureError, match="size of the heads would change"):
        trim_hidden(model, 24, calibration=batch)
    dense = copy.deepcopy(model)
    kept = torch.tensor(trim_hidden(model, 0.5, calibration=batch).kept)
    model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_attention_heads == 2
    assert torch.equal(logits(again, batch), logits(model, batch))
    cut = dense.bert.embeddings.word_embeddings.weight[:, kept]
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, cut)
    query = dense.bert.encoder.layer[1].attention.self.query.weight[:, kept]
    assert torch.equal(again.bert.encoder.layer[1].attention.self.query.weight, query)
    assert torch.equal(again.bert.pooler.dense.weight, dense.bert.pooler.dense.weight[kept][:, kept])


def test_base_models_give_fewer_dimensions():
    model, inputs = tiny("llama")
    result = trim_hidden(model.model, 24, calibration=inputs())
    with torch.no_grad():
        assert model.model(**inputs()).last_hidden_state.shape[-1] == len(result.kept) == 24


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gemma", "differs from what it should compute by .* depends on the hidden size in another way"),
        ("gpt2", "would change .at transformer.h.0.attn.c_attn.weight"),
        ("t5", "depends on the hidden size in another way"),
        ("opt", "size of the heads would change"),
    ],
)
def test_models_that_depend_on_the_size_in_another_way_are_refused(model_type, message):
    model, inputs = tiny(model_type)
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(ArchitectureError, match=message):
        trim_hidden(model, 0.75, calibration=inputs())
    assert_unchanged(model, before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (32, "size is 32: expected less than the 32 dimensions"),
        (0, "size is 0: expected an integer of at least 1"),
        (1.0, r"size is 1\.0: expected a share between 0 and 1, or a whole number below 32"),
        (21, r"refuses a hidden size of 21 \(The hidden size \(21\) is not a multiple .*\): it accepts 16 and 24"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    model, inputs = tiny("llama")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        trim_hidden(model, size, calibration=inputs())
    assert_unchanged(model, before)


def test_what_cannot_be_told_is_refused():
    model, inputs = tiny("llama")
    norm = model.model.norm.weight.detach().clone()
    with pytest.raises(CalibrationError, match="no batches"):
        trim_hidden(model, 24, calibration=[])
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match="hidden states are not finite"):
        trim_hidden(model, 24, calibration=inputs())
    with torch.no_grad():
        model.model.norm.weight.copy_(norm)
    model.config.hidden_act = "relu"  # the config builds another model than this one
    with pytest.raises(ArchitectureError, match="depends on the hidden size in another way"):
        trim_hidden(model, 24, calibration=inputs())
    model.config.num_hidden_layers = 1
    with pytest.raises(ArchitectureError, match="its config does not describe the model as it is"):
        trim_hidden(model, 24, calibration=inputs())
    with pytest.raises(ArchitectureError, match=r"Linear has no config\.hidden_size"):
        trim_hidden(torch.nn.Linear(2, 2), 1, calibration=inputs())


def test_it_is_no_granularity():
    with pytest.raises(ConfigError, match=r"granularity 'hidden': .* call hf_prune\.trim_hidden"):
        PruningConfig(0.5, granularity="hidden")


def test_the_command_writes_what_the_function_leaves(capsys, tmp_path):
    model, _ = tiny("qwen3")
    model.config.vocab_size = model.get_input_embeddings().num_embeddings
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * 4)
    data = ("--data", tmp_path / "texts.txt", "--window", 8, "--calibration-samples", 2)
    command = ("trim-hidden", tmp_path / "model", "--size", 0.5, *data)
    done = run_command(capsys, *command, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"16 of {SIZE} dimensions of the hidden states stay" in done.out
    texts = [torch.tensor([tiny_tokenizer()("w1 w2 w3 w4 w5 w6 w7 w8\n" * 4)["input_ids"][:8]])]
    result = trim_hidden(model, 0.5, calibration=[{"input_ids": ids} for ids in texts])
    report = json.loads((tmp_path / "out" / "hidden_report.json").read_text())
    assert report["size"] == len(result.kept) == 16
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert loaded.config.hidden_size == 16
    assert loaded.num_parameters() == report["parameters"] == result.parameters
    again = run_command(capsys, *command, "--out", tmp_path / "model")
    assert (again.code, again.err[:7]) == (1, "error: ")
