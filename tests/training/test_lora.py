"""LoRA on a sparse model: zeros stay zeros, in training and when the adapters are merged."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from hf_prune import CheckpointError, MaskError, MaskStore, PruningTrainer, merge_lora, prunable, prune
from tests import models
from tests.training.test_trainer import Sentences, arguments

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft


def adapted(model):
    settings = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    return peft.get_peft_model(model, settings)


def test_training_and_merging_keep_the_zeros(tmp_path):
    model = prune(models.tiny_bert(), 0.5)
    masks = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    wrapped = adapted(model)
    PruningTrainer(model=wrapped, args=arguments(tmp_path), train_dataset=Sentences()).train()
    batch = models.tiny_batches(model)[0]
    plain = copy.deepcopy(wrapped).merge_and_unload()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert plain.get_parameter(name)[~masks[name]].any()  # merging fills them

    scores = []

    def evaluate(scored):
        with torch.no_grad():
            scores.append(float(scored.eval()(**batch).logits.sum()))
        return scores[-1]

    report = merge_lora(wrapped, evaluate=evaluate)
    merged = report.model
    for key, mask in masks.items():
        weight = merged.get_parameter(key).detach()
        assert not weight[~mask].any()
        torch.testing.assert_close(weight[mask], plain.get_parameter(key).detach()[mask])
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert 0 < report.kept < 1
    assert (report.before, report.after) == tuple(scores)
    assert f"{report.after:.4f}" in str(report)
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "pruning_masks.safetensors").exists()


def injected(model, **settings):
    """With adapters as transformers puts them in by itself."""
    settings = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], **settings}
    model.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, **settings))
    return model


def test_adapters_without_a_peft_model_are_merged_as_well(tmp_path):
    """The trained copy of the head that ``modules_to_save`` makes takes its place."""
    model = injected(prunable(models.tiny_bert()).prune(0.5))
    model.classifier.modules_to_save["default"].weight.data += 1
    masks = {name.replace(".base_layer", ""): mask for name, mask in model.masks.items() if "classifier" not in name}
    twin = copy.deepcopy(model)
    wrapper = adapted(prune(models.tiny_bert(), 0.5))
    for name, parameter in wrapper.get_base_model().named_parameters():
        if "lora" in name:
            parameter.data.copy_(twin.get_parameter(name))
    expected = merge_lora(wrapper).model
    batch = models.tiny_batches(model)[0]
    scores = []

    def evaluate(scored):
        with torch.no_grad():
            scores.append(float(scored.eval()(**batch).logits.sum()))
        return scores[-1]

    report = merge_lora(model, evaluate=evaluate)
    assert report.model is model
    assert (report.before, report.after) == tuple(scores)
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), expected.get_parameter(name))
        assert torch.equal(model.masks[name], mask)
    kept = model.masks["classifier.weight"]
    assert torch.equal(model.classifier.weight[kept], twin.classifier.modules_to_save["default"].weight[kept])
    assert not model.classifier.weight[~kept].any()
    model.save_pretrained(tmp_path, compressed=True)
    models.assert_unchanged(type(expected).from_pretrained(tmp_path), models.snapshot(model))


def test_saving_with_adapters_says_what_is_not_saved(tmp_path):
    model = injected(prunable(models.tiny_bert()).prune(0.5))
    with pytest.warns(UserWarning, match=r"neither its other weights nor its \d+ masks are in .*merge_lora\(model\)"):
        model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    match = "is for whole models, and this BertForSequenceClassification carries adapters, of which transformers saves"
    for refused in (
        lambda: model.save_pretrained(tmp_path / "other", compressed=True),
        lambda: model.save_pretrained(tmp_path / "other", push_to_hub=True),
        lambda: model.push_to_hub("owner/name"),
    ):
        with pytest.raises(CheckpointError, match=match):
            refused()
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:this BertForSequenceClassification carries adapters:UserWarning")
def test_adapters_inside_compiled_layers_are_saved_under_their_own_names(tmp_path):
    model = injected(prunable(models.tiny_bert()).prune(0.5))
    expected = model.get_adapter_state_dict()
    layers = model.bert.encoder.layer
    layers[0] = torch.compile(layers[0], backend="eager")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == {f"base_model.model.{name}" for name in expected}
    assert all(torch.equal(saved[f"base_model.model.{name}"], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # by peft, of the second
def test_deleting_the_last_adapter_leaves_the_model_as_it_was(tmp_path):
    model = prunable(models.tiny_bert()).prune(0.5)
    before, masks = models.snapshot(model), dict(model.masks)
    injected(model).delete_adapter("default")
    models.assert_unchanged(model, before)
    injected(model, modules_to_save=None).add_adapter(peft.LoraConfig(r=2, target_modules=["query"]), "second")
    model.delete_adapter("default")
    assert any("base_layer" in name for name in model.masks)
    model.delete_adapter("second")
    models.assert_unchanged(model, before)
    assert all(torch.equal(mask, masks[name]) for name, mask in model.masks.items())
    assert model.masks.keys() == masks.keys()
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).masks.keys() == masks.keys()


def test_what_cannot_be_merged():
    with pytest.raises(
        MaskError, match=r"expected a PeftModel with LoRA adapters, or .* add_adapter\(\), found a Bert"
    ):
        merge_lora(models.tiny_bert())
    with pytest.raises(MaskError, match="has no masks"):
        merge_lora(adapted(models.tiny_bert()))
    assert "was not measured" in str(merge_lora(adapted(prune(models.tiny_bert(), 0.5))))
