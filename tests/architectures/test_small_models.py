"""Small models made from configs alone."""

import pytest
import torch
import transformers

from hf_prune.architectures.discovery.blocks import idle_parts
from hf_prune.architectures.discovery.sample import Sample
from hf_prune.architectures.small_configs import small_config
from hf_prune.architectures.small_models import example_inputs, small_model
from hf_prune.errors import ArchitectureError

TYPES = (
    "bert",
    "llama",
    "qwen2",
    "gpt2",
    "t5",
    "vit",
    "whisper",
    "mixtral",
    "clip",
    "llava",
    "qwen2_vl",
    "wav2vec2",
    "swin",
)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_small_model_of_the_same_class_runs_on_its_example_inputs(model_type):
    config = transformers.CONFIG_MAPPING[model_type]()
    before = config.to_dict()
    model = small_model(transformers.MODEL_MAPPING[type(config)], config)
    assert type(model.config) is type(config)
    assert config.to_dict() == before
    assert sum(p.numel() for p in model.parameters()) < 3e6
    first, second = example_inputs(model), example_inputs(model)
    assert first.keys() == second.keys()
    assert all(torch.equal(v, second[k]) for k, v in first.items() if isinstance(v, torch.Tensor))
    with torch.no_grad():
        outputs = model(**first)
    assert all(bool(v.isfinite().all()) for v in outputs.values() if isinstance(v, torch.Tensor))


def test_images_reach_the_text_of_a_vision_language_model():
    config = transformers.CONFIG_MAPPING["llava"]()
    model = small_model(transformers.MODEL_MAPPING[type(config)], config)
    inputs = example_inputs(model)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) > 0
    assert "pixel_values" in inputs


def test_structure_stays():
    config = transformers.Qwen3MoeConfig(num_attention_heads=32, num_key_value_heads=4, mlp_only_layers=[0])
    small = small_config(config)
    assert 1 < small.num_key_value_heads < small.num_attention_heads
    assert small.num_experts > small.num_experts_per_tok > 1
    assert small.mlp_only_layers == [0]
    assert small.num_hidden_layers > 1


def test_lists_of_layer_numbers_are_those_of_the_layers_that_stay():
    config = transformers.Qwen3MoeConfig(mlp_only_layers=[])
    assert small_config(config).mlp_only_layers == []
    config = transformers.Qwen3MoeConfig(mlp_only_layers=[3, 7])
    small = small_config(config)
    assert small.mlp_only_layers == [1]
    assert small.num_hidden_layers == 2


def test_every_kind_of_layer_stays():
    config = transformers.CONFIG_MAPPING["gemma3_text"]()
    small = small_config(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert len(small.layer_types) == small.num_hidden_layers < config.num_hidden_layers


def test_layers_of_another_size_keep_the_ratio():
    """Every sixth layer of Gemma 4 has heads that are twice as wide."""
    config = transformers.CONFIG_MAPPING["gemma4_text"]()
    small = small_config(config)
    model = transformers.Gemma4TextModel(small)
    assert small.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.head_dim for layer in model.layers] == [32, 64]
    wide = small_config(config, widths=True)
    assert [wide.per_layer_config[number].head_dim for number in (0, 1)] == [256, 512]
    alike = small_config(transformers.CONFIG_MAPPING["gemma4_text"](global_head_dim=256))
    assert [alike.per_layer_config[number].head_dim for number in (0, 1)] == [32, 32]


def test_sizes_of_some_layers_that_add_up_do_so_in_the_small_model():
    """Of sliding layers, the size of a head is that of its two parts together, which the class checks."""
    small = small_config(transformers.CONFIG_MAPPING["dots3_note"]()).get_text_config()
    own = small.per_layer_config["sliding_attention"]
    assert own.head_dim == own.qk_nope_head_dim + own.qk_rope_head_dim < 64


def test_a_model_without_known_inputs_is_refused():
    class Odd(torch.nn.Module):
        main_input_name = "states"

        def __init__(self):
            super().__init__()
            self.config = transformers.BertConfig()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, states):
            raise ValueError("nothing will do")

    with pytest.raises(ArchitectureError, match="no example inputs are known for Odd"):
        example_inputs(Odd())


def _llava() -> transformers.LlavaConfig:
    """Of which a token that stands for images is among the first ones."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    return transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**sizes, vocab_size=64), image_token_id=63
    )


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (transformers.LlavaForConditionalGeneration, _llava),
        (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config),
        (transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig),
        (transformers.PaliGemmaForConditionalGeneration, transformers.PaliGemmaConfig),
    ],
)
def test_models_of_images_and_text_are_tried_on_both(cls, config):
    assert "pixel_values" in example_inputs(small_model(cls, config()))


def test_a_tower_that_inputs_do_not_reach_is_named():
    model = transformers.LlavaForConditionalGeneration(_llava()).eval()
    assert idle_parts(Sample(model, example_inputs(model))) == {}
    reasons = idle_parts(Sample(model, {"input_ids": torch.arange(3, 9)[None]}))
    assert list(reasons) == ["model.vision_tower"]
    assert "run on input_ids alone" in reasons["model.vision_tower"]
