"""DistilBERT."""

from __future__ import annotations

from hf_prune.architectures.base import Heads, Neurons, Stack, register_architecture

_HEADS = Heads(
    "attention",
    query="q_lin",
    key="k_lin",
    value="v_lin",
    out="out_lin",
    size="attention_head_size",
    counts=("n_heads",),
)

register_architecture(
    "distilbert",
    Stack("transformer.layer", (_HEADS,), Neurons(("ffn.lin1",), "ffn.lin2", "hidden_dim"), "n_layers"),
)
