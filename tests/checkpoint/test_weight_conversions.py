"""Compressed checkpoints of types whose files are not laid out as the model: transformers converts them as it loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from hf_prune import CheckpointError, compress_checkpoint, decompress_checkpoint, prunable
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import load_masks, save_masks
from hf_prune.checkpoint.packed.files import PackedFiles
from hf_prune.checkpoint.packed.quantizer import round_renamed
from hf_prune.conversion.streaming.meta_model import load_meta_model
from hf_prune.hub.folder_facts import counted_facts
from hf_prune.mixin import pruned_class
from hf_prune.pruning.mask_store import MaskStore

_TEXT = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
_TEXT |= {"pad_token_id": 0, "max_position_embeddings": 64}
_VISION = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 32, "patch_size": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}
_INKLING = {**_TEXT, **_ROUTED, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# class -> settings of its config
MODELS: Mapping[str, Mapping[str, Any]] = {
    "CLIPVisionModel": _VISION,
    "Dinov2Model": _VISION,
    "Ernie4_5_VLMoeModel": {
        "text_config": {
            **_TEXT,
            "head_dim": 16,
            "hidden_size": 64,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [24, 16],
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        },
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "intermediate_size": 24},
    },
    "GraniteMoeForCausalLM": {**_TEXT, **_EXPERTS},
    "Inkling2TextModel": _INKLING,
    "InklingModel": {
        "text_config": {**_INKLING, "mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"patch_size": 8, "text_hidden_size": 32, "n_layers": 2, "hidden_size": 32},
        "audio_config": {"text_hidden_size": 32, "n_mel_bins": 8, "mel_vocab_size": 16},
    },
    "Kimi_K25Model": {
        "text_config": {**_TEXT, **_ROUTED, **_LATENT, "first_k_dense_replace": 1},
        "vision_config": _VISION,
    },
    "MistralLarge4Model": {
        "text_config": {**_TEXT, **_ROUTED, **_LATENT},
        "vision_config": {**_VISION, "head_dim": 8},
    },
    "MixtralForCausalLM": {**_TEXT, **_EXPERTS},
    "Molmo2TextModel": {**_TEXT, "additional_vocab_size": 8},
    "Qwen4ExpTextModel": {
        **_TEXT,
        "layer_types": ["linear_attention", "linear_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
    },
    "Qwen3VLMoeModel": {
        "text_config": {**_TEXT, **_EXPERTS},
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "out_hidden_size": 32},
    },
    "RadioModel": {**_VISION, "max_img_size": 32},
}

SINGLE = "model.safetensors"
# Experts are one tensor, which is not pruned; how it is loaded is what matters here.
pytestmark = pytest.mark.filterwarnings("ignore:.* stay dense, the largest")


def tiny(name: str) -> Any:
    """A pruned model of a class, every weight random."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**MODELS[name]))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return prunable(model).prune(0.6)


def kinds(conversions: Iterable[Any]) -> Iterator[tuple[str, ...]]:
    """What transformers does to tensors: a class of renaming, or from how many to how many by which operations."""
    for each in conversions:
        if isinstance(each, WeightConverter):
            many = (len(names) > 1 for names in (each.source_patterns, each.target_patterns))
            sides = ("many" if several else "one" for several in many)
            yield (*sides, *(type(operation).__name__ for operation in each.operations))
        else:
            yield (type(each).__name__,)


def test_every_kind_of_conversion_is_among_them():
    """A new kind in transformers wants a model here."""
    known: set[tuple[str, ...]] = set()
    for name, settings in MODELS.items():
        cls = getattr(transformers, name)
        with torch.device("meta"):
            known |= set(kinds(get_model_conversion_mapping(cls(cls.config_class(**settings)))))
    table = _build_checkpoint_conversion_mapping().values()
    assert set(kinds(each for conversions in table for each in conversions)) <= known


def bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def of_files(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return bits(load_file(folder / SINGLE))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_is_compressed_loads_as_the_dense_checkpoint_does(tmp_path, name):
    model = tiny(name)
    dense, small, again = tmp_path / "dense", tmp_path / "small", tmp_path / "again"
    model.save_pretrained(dense)
    compress_checkpoint(dense, small)
    assert PackedFiles([small / SINGLE]).packed
    load = getattr(transformers, name).from_pretrained
    expected, info = load(dense, output_loading_info=True)
    loaded, found = load(small, output_loading_info=True)
    assert bits(loaded.state_dict()) == bits(expected.state_dict())
    assert found == info
    assert bits(expected.state_dict()) == bits(model.state_dict())
    half = partial(load, dtype=torch.bfloat16, device_map="cpu")
    assert bits(half(small).state_dict()) == bits(half(dense).state_dict())
    pruned = pruned_class(type(expected)).from_pretrained(small)
    assert bits(pruned.masks) == bits(model.masks)
    loaded.save_pretrained(again)
    assert of_files(again) == of_files(dense)
    decompress_checkpoint(small, tmp_path / "back")
    assert of_files(tmp_path / "back") == of_files(dense)
    assert bits(load_masks(tmp_path / "back" / MASK_FILE).masks) == bits(model.masks)


def test_weights_that_are_offloaded_to_the_disk(tmp_path):
    model = tiny("MixtralForCausalLM")
    model.save_pretrained(tmp_path / "small", compressed=True, max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 2
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    load = transformers.MixtralForCausalLM.from_pretrained
    loaded = load(tmp_path / "small", device_map=places, offload_folder=tmp_path / "offloaded")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_mask_whose_weight_is_laid_out_otherwise_in_the_files_stays_beside_them(tmp_path):
    model = tiny("MixtralForCausalLM")
    model.save_pretrained(tmp_path / "dense")
    name = "model.layers.0.self_attn.o_proj.weight"
    weights = load_file(tmp_path / "dense" / SINGLE)
    save_file({**weights, name: weights[name].t().contiguous()}, tmp_path / "dense" / SINGLE, {"format": "pt"})
    compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    experts = {name for name in model.masks if ".experts." in name}  # the files have each expert by itself
    assert set(load_masks(tmp_path / "small" / MASK_FILE).masks) == {name, *experts}
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    assert of_files(tmp_path / "back") == of_files(tmp_path / "dense")
    assert bits(load_masks(tmp_path / "back" / MASK_FILE).masks) == bits(model.masks)


def test_masks_of_other_weights_are_refused_when_they_are_loaded(tmp_path):
    model = tiny("CLIPVisionModel")
    model.save_pretrained(tmp_path / "dense")
    save_masks(MaskStore({name: ~mask for name, mask in model.masks.items()}), tmp_path / "dense" / MASK_FILE)
    compress_checkpoint(tmp_path / "dense", tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"the masks of .* are not those of its weights"):
        pruned_class(transformers.CLIPVisionModel).from_pretrained(tmp_path / "small")


def test_the_dtype_is_that_of_the_weights_where_the_config_has_none(tmp_path):
    model = tiny("MixtralForCausalLM").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    config = tmp_path / "dense" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "dtype"}))
    compress_checkpoint(tmp_path / "dense", tmp_path / "small", shard_bytes=1)
    load = transformers.MixtralForCausalLM.from_pretrained
    assert bits(load(tmp_path / "small").state_dict()) == bits(load(tmp_path / "dense").state_dict())


def test_weights_that_the_config_says_are_elsewhere_are_refused_by_all(tmp_path):
    """transformers would load one file, and everything here another one."""
    source = tmp_path / "source"
    model = tiny("CLIPVisionModel")
    model.save_pretrained(source)
    (source / "other.safetensors").write_bytes((source / SINGLE).read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    load = pruned_class(transformers.CLIPVisionModel).from_pretrained
    verify = lambda folder: counted_facts(Path(folder))  # noqa: E731  # what cards and verify count
    for use in (load, partial(compress_checkpoint, folder=tmp_path / "out"), load_meta_model, verify):
        with pytest.raises(CheckpointError, match=r"are in 'other.safetensors' .*, and not in model.safetensors"):
            use(str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": SINGLE}))
    assert bits(load(source).masks) == bits(model.masks)


def test_what_early_releases_rename_is_rounded_as_the_rest():
    """They load it in the dtype of the files; what is planned in another dtype stays in that."""
    model = torch.nn.ModuleDict({"inner": torch.nn.Linear(2, 2), "kept": torch.nn.Linear(2, 2)})
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_renamed(model, dict.fromkeys(values, torch.bfloat16), {"kept": torch.float32})
    for name, tensor in model.state_dict().items():
        expected = values[name] if name.startswith("kept") else values[name].bfloat16()
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
