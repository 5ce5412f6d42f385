"""Masked == shrunk == reloaded for the families of transformers, whose units are found: heads, neurons and layers.

Each family is built small from the defaults of its config, so that its structure is the one of its checkpoints.
"""

import copy
import json
from collections import Counter

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from benchmarks.conformance_checks import SETTINGS
from hf_prune import shrink
from hf_prune.architectures.bypass import bypass
from hf_prune.architectures.discovery.find import discover
from hf_prune.architectures.discovery.sample import Sample, make_sample
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.layers import layer_lists
from hf_prune.architectures.small_configs import small_config

# model_type -> the kinds of units that must be found; "layer" if layers can be removed
FAMILIES = {
    "modernbert": "head neuron layer",
    "eurobert": "head neuron layer",
    "nomic_bert": "head neuron layer",
    "jina_embeddings_v3": "head neuron layer",
    "deberta-v2": "head neuron layer",
    "mpnet": "head neuron layer",
    "gemma2": "head neuron layer",
    "gemma3_text": "head neuron layer",
    "gpt_neox": "head neuron layer",
    "qwen3_5_text": "head neuron layer",
    "glm4": "head neuron layer",
    "phi3": "head neuron layer",
    "siglip": "head neuron layer",
    "dinov2": "head neuron layer",
    "wav2vec2": "head neuron layer",
    "bart": "head neuron layer",
    "lfm2": "head neuron layer",
    "gpt_oss": "head layer",
    "dinov3_vit": "head neuron layer",
    "wav2vec2-conformer": "head neuron layer",
    "parakeet_encoder": "head neuron layer",
    "moonshine": "neuron layer",
    "albert": "head neuron",
    "bloom": "neuron layer",
    "llama4_text": "head neuron layer",
    "qwen3_next": "head neuron layer",
    "qwen3_5_moe_text": "head neuron layer",
    "deepseek_v2": "head neuron layer",
    "deepseek_v3": "head neuron layer",
    "granitemoehybrid": "neuron layer",
    "nemotron_h": "head neuron",
    "falcon_h1": "head neuron",
    "clip": "head neuron layer",
    "siglip2": "head neuron layer",
    "falcon": "head neuron layer",
    "gpt_bigcode": "head neuron layer",
    "gemma4_text": "head neuron",
    "embedding_gemma2_text": "head neuron",
    "kimi_linear": "head neuron layer",
    "deepseek_v4": "neuron layer",
    "sam_vision_model": "head neuron",
    "sam3_vit_model": "head neuron",
}
EVERY_DAY = ("modernbert", "mpnet", "phi3", "qwen3_5_text", "albert")


def small(model_type: str) -> Sample:
    config = AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}))
    classes = MODEL_MAPPING[type(config)]
    return make_sample(classes[0] if isinstance(classes, tuple) else classes, small_config(config))


@torch.no_grad()
def cut(model: torch.nn.Module, groups: list, equally: bool) -> None:
    """Zero what reads some units of every group: half of them, or another number in each group."""
    generator = torch.Generator().manual_seed(1)
    for number, group in enumerate(groups):
        number_gone = group.units // 2 if equally else max(group.units // 2 - number % 3, 1)
        gone = torch.randperm(group.units, generator=generator)[:number_gone]
        for piece in group.consumers:
            model.get_parameter(piece.name).data.index_fill_(piece.dim, piece.index(gone), 0)


@pytest.mark.parametrize("equally", [True, False])
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.matrix) for name in FAMILIES],
)
def test_masked_is_shrunk_is_reloaded(model_type, equally, tmp_path):
    sample = small(model_type)
    model = sample.model
    groups = [group for group in find_unit_groups(model) if group.consumers]
    removable = [layers for layers in layer_lists(model) if layers.stack.config]
    kinds = Counter(group.kind for group in groups) | Counter(layer=len(removable))
    assert set(FAMILIES[model_type].split()) <= {kind for kind, number in kinds.items() if number}, kinds
    dense = sample.outputs()
    cut(model, groups, equally)
    for layers in removable:
        if len(layers.layers) > layers.stack.fixed + (layers.stack.fixed == 0):
            bypass(layers.layers[-1])
    masked, parameters = sample.outputs(), model.num_parameters()
    assert not all(torch.allclose(one, other) for one, other in zip(dense, masked, strict=True))

    shrunk = shrink(copy.deepcopy(model))

    assert shrunk.num_parameters() < 0.9 * parameters
    outputs = sample.outputs(shrunk)
    for one, other in zip(outputs, masked, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    shrunk.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert all(torch.equal(one, other) for one, other in zip(sample.outputs(loaded), outputs, strict=True))
    assert {g.name: g.units for g in find_unit_groups(loaded)} == {g.name: g.units for g in find_unit_groups(shrunk)}
    config = json.loads((tmp_path / "config.json").read_text())
    needs_us = any(not group.config for group in groups) or model_type == "gemma4_text"  # heads of two widths
    assert ("quantization_config" in config) == (needs_us or (not equally and "quantization_config" in config))


def test_sdpa_computes_what_eager_attention_computes_after_heads_are_gone():
    sample = small("modernbert")
    cut(sample.model, [group for group in find_unit_groups(sample.model) if group.kind == "head"], equally=False)
    shrunk = shrink(copy.deepcopy(sample.model))
    eager = sample.outputs(shrunk)
    shrunk.set_attn_implementation("sdpa")
    for one, other in zip(sample.outputs(shrunk), eager, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_hybrids_leave_the_rest_with_a_sentence():
    found = discover(small("qwen3_5_text").model)
    assert "units of width" in found.refused["layers.0.linear_attn.out_proj"]
