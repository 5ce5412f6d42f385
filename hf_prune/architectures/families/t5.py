"""T5 and mT5: all layers of a stack share one table of position biases, and so must keep the same heads."""

from __future__ import annotations

from hf_prune.architectures.base import Heads, Neurons, Stack, register_architecture


def _heads(module: str, bias: str | None) -> Heads:
    return Heads(
        module,
        query="q",
        key="k",
        value="v",
        out="o",
        size="key_value_proj_dim",
        counts=("n_heads", "inner_dim"),
        config=("num_heads",),
        config_size="d_kv",
        shared=True,
        bias=bias,
    )


def _neurons(module: str) -> Neurons:
    return Neurons(tuple(f"{module}.{name}" for name in ("wi", "wi_0", "wi_1")), f"{module}.wo", "d_ff")


_SELF_ATTENTION = _heads("layer.0.SelfAttention", "relative_attention_bias")

register_architecture(
    ("t5", "mt5"),
    Stack(
        "encoder.block",
        (_SELF_ATTENTION,),
        _neurons("layer.1.DenseReluDense"),
        "num_layers",
        fixed=1,
        not_below="decoder.block",
    ),
    Stack(
        "decoder.block",
        (_SELF_ATTENTION, _heads("layer.1.EncDecAttention", None)),
        _neurons("layer.2.DenseReluDense"),
        "num_decoder_layers",
        fixed=1,
        first_heads=True,
    ),
)
