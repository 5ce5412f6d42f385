"""BERT and the encoders that are built like it."""

from __future__ import annotations

from hf_prune.architectures.base import Heads, Neurons, Stack, register_architecture

_HEADS = Heads(
    "attention",
    query="self.query",
    key="self.key",
    value="self.value",
    out="output.dense",
    size="self.attention_head_size",
    counts=("self.num_attention_heads", "self.all_head_size"),
)

register_architecture(
    ("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "ernie"),
    Stack(
        "encoder.layer",
        (_HEADS,),
        Neurons(("intermediate.dense",), "output.dense", "intermediate_size"),
        "num_hidden_layers",
    ),
)
