"""``only``: the parts of composite models, named and chosen, for weights and for units."""

import json

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from hf_prune import ConfigError, PlanError, PruningConfig, prunable, prune, sparsity_report
from hf_prune.cli.settings import read_config
from hf_prune.planning.parts import part_names
from tests import models

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llava():
    vision = CLIPVisionConfig(**SIZES, image_size=32, patch_size=16, projection_dim=16)
    text = LlamaConfig(**SIZES, vocab_size=60, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=59, image_seq_length=4)
    return models.fill(LlavaForConditionalGeneration(config)).eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((2, 4), 59), torch.randint(1, 50, (2, 5), generator=generator)], 1)
    return [{"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)} for _ in range(2)]


def answer(model):
    with torch.no_grad():
        return model(**batches()[0]).logits


def touched(model):
    return {name.split(".")[1] for name, p in model.named_parameters() if bool((p == 0).any())}


@pytest.mark.parametrize(
    "settings",
    [{"criterion": "magnitude"}, {"criterion": "wanda", "scope": "row"}, {"criterion": "magnitude", "scope": "global"}],
)
@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("language_model", {"language_model"}),
        ("model.vision_tower", {"vision_tower"}),
        (("vision_tower", "multi_modal_projector"), {"vision_tower", "multi_modal_projector"}),
        (None, {"language_model", "vision_tower", "multi_modal_projector"}),
    ],
)
def test_only_the_chosen_part_is_pruned(only, expected, settings, tmp_path):
    model = prunable(llava())
    model.prune(0.5, only=only, calibration=batches(), **settings)
    assert touched(model) == expected
    assert {name.split(".")[1] for name in model.masks} == expected
    assert sparsity_report(model).target_sparsity == pytest.approx(0.5, abs=0.01)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(again), answer(model))
    assert prunable(LlavaForConditionalGeneration).from_pretrained(tmp_path).pruning_config == model.pruning_config


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_only_units_of_the_chosen_part_are_removed(part, tmp_path):
    model = prunable(llava())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    model.prune(0.5, granularity=("head", "neuron"), criterion="fisher", only=part, calibration=batches())
    masked = answer(model)
    model.shrink()
    assert torch.allclose(answer(model), masked, atol=1e-5)
    smaller = {name.split(".")[1] for name, p in model.named_parameters() if p.numel() < sizes[name]}
    assert smaller == {part}
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()), answer(model))


@pytest.mark.parametrize("settings", [{}, {"granularity": ("head", "neuron"), "criterion": "magnitude"}])
def test_an_unknown_part_is_refused_with_the_names_of_those_that_there_are(settings):
    model = llava()
    before = models.snapshot(model)
    message = (
        r"only='vision' names no module of LlavaForConditionalGeneration: expected one or several of "
        r"'model.vision_tower' \(CLIPVisionModel\), 'model.language_model' \(LlamaModel\)"
    )
    with pytest.raises(PlanError, match=message):
        prune(model, 0.5, only="vision", **settings)
    models.assert_unchanged(model, before)
    with pytest.raises(PlanError, match=r"expected one or several of 'bert' \(BertModel\)"):
        prune(models.tiny_bert(), 0.5, only="language_model")


def test_a_part_without_targets_is_refused():
    with pytest.raises(PlanError, match=r"no target matched target_modules='all-linear' .* and only=\('model.norm',\)"):
        prune(models.tiny_llama(), 0.5, only="model.norm")


@pytest.mark.parametrize("only", ["", (), ("a", 3), 5, "model.", [""]])
def test_what_is_no_name_is_refused(only):
    with pytest.raises(ConfigError, match=r"only is .*: expected the name of a part of the model, such as"):
        PruningConfig(only=only)


def test_parts_are_the_innermost_models():
    assert part_names(llava()) == {"model.vision_tower": "CLIPVisionModel", "model.language_model": "LlamaModel"}
    assert list(part_names(models.tiny_t5())) == ["encoder", "decoder"]


def test_configs_without_it_are_written_as_before():
    assert "only" not in PruningConfig().to_dict()
    config = PruningConfig(only="language_model")
    assert config.only == ("language_model",)
    assert PruningConfig.from_dict(json.loads(config.to_json())) == config
    assert read_config(None, only="vision_tower, text_model").only == ("vision_tower", "text_model")
