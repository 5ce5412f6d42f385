"""GPT-2, whose projections are one ``Conv1D``."""

from __future__ import annotations

from hf_prune.architectures.base import Heads, Neurons, Stack, register_architecture

_HEADS = Heads(
    "attn",
    query="c_attn",
    key="c_attn",
    value="c_attn",
    out="c_proj",
    minimum=1,
    counts=("num_heads", "split_size"),
)

register_architecture(
    "gpt2",
    Stack("h", (_HEADS,), Neurons(("mlp.c_fc",), "mlp.c_proj", "n_inner"), "n_layer", first_heads=True),
)
