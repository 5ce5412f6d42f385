"""What depends on the insides of other packages, once each; ``make compat`` runs it with other versions."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

import hf_prune  # so that plain transformers loads shrunk and compressed models
from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    PruningCallback,
    PruningConfig,
    classification_examples,
    compare,
    describe_units,
    evaluate_classification,
    export_model,
    load_classification,
    prunable,
    text_batches,
)
from hf_prune.inference.passes import workload_passes
from tests import models, moe_models


@pytest.fixture
def folder(tmp_path):
    """A classifier with its tokenizer, and data."""
    models.save_classifier_and_data(tmp_path, seed=0)
    (tmp_path / "data" / "train.tsv").write_text((tmp_path / "data" / "dev.tsv").read_text())
    return tmp_path


@pytest.mark.parametrize("compressed", [False, True])
def test_prune_save_load(folder, compressed):
    model = AutoPrunedModelForSequenceClassification.from_pretrained(folder / "dense").prune(0.5)
    model.save_pretrained(folder / "pruned", compressed=compressed)
    again = AutoPrunedModelForSequenceClassification.from_pretrained(folder / "pruned")
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "pruned")
    for other in (again, plain):
        for (name, value), copied in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(value, copied), name
    assert again.masks.keys() == model.masks.keys()


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "alps", "fisher"])
def test_calibrated_criteria(folder, criterion):
    texts = text_batches(models.tiny_sentences()["sentence"], models.tiny_tokenizer())
    model = AutoPrunedModelForSequenceClassification.from_pretrained(folder / "dense")
    model.prune(0.5, criterion=criterion, calibration=texts)
    assert model.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("make", ["tiny_bert", "tiny_distilbert", "tiny_gpt2", "tiny_llama", "tiny_t5", "tiny_vit"])
def test_shrink_and_reload(make, tmp_path):
    model = prunable(getattr(models, make)())
    kinds = ("head", "neuron")
    batch = models.tiny_batches(model)[0] if make != "tiny_vit" else {"pixel_values": torch.rand(2, 3, 16, 16)}
    if make == "tiny_vit":
        size = model.config.image_size
        batch = {"pixel_values": torch.rand(2, model.config.num_channels, size, size)}
    batch = {name: value for name, value in batch.items() if name != "labels" or make == "tiny_t5"}
    model.prune(0.5, granularity=kinds)
    with torch.no_grad():
        before = model(**batch).logits
        model.shrink()
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, before, rtol=1e-4, atol=1e-5)


def test_generation_continues_a_cache(tmp_path):
    model, ids = models.tiny_llama().eval(), torch.tensor([[5, 6, 7, 8]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # what caches are called has changed once
        passes = workload_passes(model, {"input_ids": ids}, {"batch_size": 1, "prompt": 4, "new_tokens": 2})
        decoded = passes["decode"].run()
        report = export_model(model, tmp_path / "llama.onnx", cache=True)
    whole = model(input_ids=torch.cat([ids, ids[:, :1], ids[:, -1:]], 1))  # the middle of the generation, and a token
    torch.testing.assert_close(decoded.logits[:, -1], whole.logits[:, -1])
    assert report.difference < 1e-5


def test_units_are_found():
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ModernBertConfig(vocab_size=48, pad_token_id=0, **settings)
    kinds = {units.kind for units in describe_units(AutoModel.from_config(config)).units}
    assert {"head", "neuron"} <= kinds


def test_experts(tmp_path):
    model = prunable(moe_models.tiny_mixture("qwen3_moe")).prune(0.5, granularity="expert")
    model.shrink().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == model.num_parameters()


def test_compressed_experts_are_rounded_as_others(tmp_path):
    model = prunable(moe_models.tiny_mixture("qwen3_moe")).prune(0.5)
    for compressed in (False, True):
        model.save_pretrained(tmp_path / str(compressed), compressed=compressed)
    expected, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).state_dict()
        for name in ("False", "True")
    )
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_train(folder):
    model = AutoPrunedModelForSequenceClassification.from_pretrained(folder / "dense")
    tokenizer = models.tiny_tokenizer()
    examples = classification_examples(load_classification(str(folder / "data"), "train"), tokenizer)
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    callback = PruningCallback(PruningConfig(0.5, schedule="one_shot"))
    collate = transformers.DataCollatorWithPadding(tokenizer)
    Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[callback]).train()
    assert model.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)


def test_score(folder):
    model = AutoPrunedModelForSequenceClassification.from_pretrained(folder / "dense")
    tokenizer = models.tiny_tokenizer()
    data = load_classification(str(folder / "data"), "validation")
    assert isinstance(data, Dataset)
    dense = evaluate_classification(model, tokenizer, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        comparison = compare(dense, evaluate_classification(model.prune(0.9), tokenizer, data))
    assert comparison.n == dense.n == 40


def test_the_command_line(folder, capsys):
    from hf_prune.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["prune", str(folder / "dense"), "--sparsity", "0.5", "--out", str(folder / "out"), "--json"])
    assert end.value.code in (0, None)
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])
    assert hf_prune.__version__
