"""A tiny random model for every entry in the table of architectures, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

Inputs = Callable[[], dict[str, Tensor]]

_ENCODER = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 24}
_VISION = {**_ENCODER, "image_size": 16, "patch_size": 8}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {**_ENCODER, **_SPECIAL, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 50}
_T5 = {"d_model": 32, "num_heads": 4, "d_kv": 8, "num_layers": 3, "d_ff": 24, "vocab_size": 50}
_T5 |= {"decoder_start_token_id": 0}
_WHISPER = {
    **_SPECIAL,
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 60,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def _text(**more: Tensor) -> Inputs:
    ids = torch.arange(12).view(2, 6) + 3
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])  # padded on the left, as for generation
    return lambda: {"input_ids": ids, "attention_mask": mask, **more}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}


def _sound() -> dict[str, Tensor]:
    features = torch.linspace(-1, 1, 2 * 8 * 40).view(2, 8, 40)
    return {"input_features": features, "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}


_SEQ2SEQ = _text(decoder_input_ids=torch.tensor([[0, 5, 6], [0, 7, 8]]))

# model_type -> (name of the class, settings of its config, inputs)
MODELS: Mapping[str, tuple[str, Mapping[str, Any], Inputs]] = {
    "bert": ("BertForSequenceClassification", {**_ENCODER, "vocab_size": 50}, _text()),
    "camembert": ("CamembertForSequenceClassification", {**_ENCODER, "vocab_size": 50}, _text()),
    "data2vec-text": ("Data2VecTextForSequenceClassification", {**_ENCODER, "vocab_size": 50}, _text()),
    "deit": ("DeiTForImageClassification", _VISION, _image),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 24, "vocab_size": 50},
        _text(),
    ),
    "electra": ("ElectraForSequenceClassification", {**_ENCODER, "embedding_size": 16, "vocab_size": 50}, _text()),
    "ernie": ("ErnieForSequenceClassification", {**_ENCODER, "vocab_size": 50}, _text()),
    "gemma": ("GemmaForCausalLM", {**_LLAMA, "head_dim": 4}, _text()),
    "gpt2": ("GPT2LMHeadModel", {**_SPECIAL, "n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 50}, _text()),
    "granite": ("GraniteForCausalLM", _LLAMA, _text()),
    "llama": ("LlamaForCausalLM", _LLAMA, _text()),
    "mistral": ("MistralForCausalLM", _LLAMA, _text()),
    "mt5": ("MT5ForConditionalGeneration", _T5, _SEQ2SEQ),
    "opt": (
        "OPTForCausalLM",
        {**_ENCODER, "intermediate_size": 24, "ffn_dim": 24, "vocab_size": 50, "word_embed_proj_dim": 32},
        _text(),
    ),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA, _text()),
    "qwen3": ("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}, _text()),
    "roberta": ("RobertaForSequenceClassification", {**_ENCODER, "vocab_size": 50}, _text()),
    "smollm3": ("SmolLM3ForCausalLM", _LLAMA, _text()),
    "t5": ("T5ForConditionalGeneration", _T5, _SEQ2SEQ),
    "vit": ("ViTForImageClassification", _VISION, _image),
    "whisper": ("WhisperForConditionalGeneration", _WHISPER, _sound),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {**_ENCODER, "vocab_size": 50}, _text()),
}


def tiny(model_type: str, attention: str = "sdpa", **settings: Any) -> tuple[Any, Inputs]:
    """A model of an architecture, every weight random and large enough to matter, and what makes inputs for it."""
    name, own, inputs = MODELS[model_type]
    cls: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(cls.config_class(**{**own, **settings}, attn_implementation=attention))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval(), inputs
