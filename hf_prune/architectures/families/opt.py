"""OPT."""

from __future__ import annotations

from hf_prune.architectures.base import Heads, Neurons, Stack, register_architecture

_HEADS = Heads(
    "self_attn",
    query="q_proj",
    key="k_proj",
    value="v_proj",
    out="out_proj",
    counts=("num_heads",),
    minimum=1,
)

register_architecture(
    "opt",
    Stack("decoder.layers", (_HEADS,), Neurons(("fc1",), "fc2", "ffn_dim"), "num_hidden_layers", first_heads=True),
)
