"""ViT and DeiT."""

from __future__ import annotations

from hf_prune.architectures.base import Heads, Neurons, Stack, register_architecture

_HEADS = Heads(
    "attention",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="o_proj",
    counts=("num_attention_heads",),
)

register_architecture(
    ("vit", "deit"),
    Stack("layers", (_HEADS,), Neurons(("mlp.fc1",), "mlp.fc2", "intermediate_size"), "num_hidden_layers"),
)
