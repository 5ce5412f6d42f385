"""Llama and the decoders with gated networks and grouped queries that are built like it."""

from __future__ import annotations

from hf_prune.architectures.base import Heads, Neurons, Stack, register_architecture

_HEADS = Heads(
    "self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="o_proj",
    counts=("num_heads", "num_key_value_heads"),
    config=("num_attention_heads", "num_key_value_heads"),
    config_size="head_dim",
)

register_architecture(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "granite"),
    Stack(
        "layers",
        (_HEADS,),
        Neurons(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size"),
        "num_hidden_layers",
        per_layer=("layer_types", "no_rope_layers"),
        first_heads=True,
    ),
)
