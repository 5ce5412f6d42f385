"""Whisper."""

from __future__ import annotations

from hf_prune.architectures.base import Heads, Neurons, Stack, register_architecture


def _heads(module: str) -> Heads:
    return Heads(
        module,
        query="q_proj",
        key="k_proj",
        value="v_proj",
        out="out_proj",
        counts=("num_heads",),
        minimum=1,
    )


register_architecture(
    "whisper",
    Stack(
        "encoder.layers",
        (_heads("self_attn"),),
        Neurons(("fc1",), "fc2", "encoder_ffn_dim"),
        "encoder_layers",
    ),
    Stack(
        "decoder.layers",
        (_heads("self_attn"), _heads("encoder_attn")),
        Neurons(("fc1",), "fc2", "decoder_ffn_dim"),
        "decoder_layers",
        first_heads=True,
    ),
)
