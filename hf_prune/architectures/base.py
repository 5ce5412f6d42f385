"""Where the heads, the neurons and the layers of an architecture are: one table entry each.

An entry names modules and attributes as transformers does; sizes are read off the weights, so that a model whose layers
differ, or that was shrunk before, is described as well. A new architecture is one call of
:func:`register_architecture`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import ArchitectureError


@dataclass(frozen=True)
class Heads:
    """An attention in each layer of a stack. Of grouped queries, a unit is a group: a key head and its query heads.

    Args:
        module: The attention, from the layer.
        query: Its projections, from the attention. Where ``query``, ``key`` and ``value`` name the same module, its
            outputs are those of the three, one after the other.
        key: See ``query``.
        value: See ``query``.
        out: The projection of what the heads put out.
        size: The attention's attribute that holds the size of one head.
        counts: Its attributes that grow with the number of heads; of those it lacks, nothing is said.
        minimum: How few heads the code of the model can do with.
        config: Attributes of the model's config that give the number of heads, where a config may have fewer heads of
            the same size; first the query heads, then the key heads if they have one of their own.
        config_size: The attribute of the config that holds the size of a head then.
        shared: Whether all layers have to have the same heads: they add one table of position biases to the scores.
        bias: That table, from the attention of the first layer, with a column for each head; None where it is zero.
    """

    module: str
    query: str
    key: str
    value: str
    out: str
    size: str = "head_dim"
    counts: tuple[str, ...] = ()
    minimum: int = 0
    config: tuple[str, ...] = ()
    config_size: str | None = None
    shared: bool = False
    bias: str | None = None


@dataclass(frozen=True)
class Neurons:
    """A feed-forward network in each layer of a stack.

    Args:
        up: The matrices whose outputs are the neurons: of a gated network two. Those that a layer lacks are left out.
        down: The matrix whose inputs they are.
        config: The attribute of the model's config that gives their number.
    """

    up: tuple[str, ...]
    down: str
    config: str


@dataclass(frozen=True)
class Stack:
    """Layers that run one after the other.

    Args:
        layers: Their list, from the base model.
        attentions: What attends in a layer.
        neurons: The feed-forward network of a layer.
        config: The attribute of the model's config that gives the number of layers.
        fixed: How many layers at the start cannot be removed as a whole.
        per_layer: Attributes of the config with an entry for each layer.
        first_heads: Whether the first layer has to keep a head: a cache counts tokens there.
        not_below: Another list of layers, which this one must not be shorter than: transformers makes caches for as
            many layers as this one has.
    """

    layers: str
    attentions: tuple[Heads, ...]
    neurons: Neurons
    config: str
    fixed: int = 0
    per_layer: tuple[str, ...] = ()
    first_heads: bool = False
    not_below: str | None = None


@dataclass(frozen=True)
class Channels:
    """Channels inside the blocks of a convolutional model: nothing but the next module of the block reads them.

    Those that a block adds to its input are not inside it: they can be masked, and stay.

    Args:
        blocks: The blocks, from the base model; ``*`` stands for a number. Empty: the base model itself.
        links: What computes the channels, and what reads them, as modules of a block. The first one that computes them
            decides which of them go; norms and depthwise convolutions, which come next, follow. Links whose first or
            last module a block lacks are left out, as are other modules that it lacks.
    """

    blocks: str
    links: tuple[tuple[tuple[str, ...], str], ...]


_TABLE: dict[str, tuple[Stack | Channels, ...]] = {}


def register_architecture(model_type: str | Iterable[str], *parts: Stack | Channels) -> None:
    """Say where the units of an architecture are.

    Args:
        model_type: ``config.model_type``, or several.
        *parts: Its stacks of layers, or of a convolutional model the channels of its blocks.

    Raises:
        ArchitectureError: If one is registered already.

    Example:
        >>> heads = Heads("attn", "q", "k", "v", "o")
        >>> register_architecture("mine", Stack("layers", (heads,), Neurons(("up",), "down", "d_ff"), "n_layers"))
    """
    names = [model_type] if isinstance(model_type, str) else list(model_type)
    for name in names:
        if name in _TABLE:
            raise ArchitectureError(f"the architecture {name!r} is registered already: choose another model_type")
    for name in names:
        _TABLE[name] = parts


def list_architectures() -> tuple[str, ...]:
    """All registered model types, sorted."""
    return tuple(sorted(_TABLE))


_BERT_HEADS = Heads(
    "attention",
    query="self.query",
    key="self.key",
    value="self.value",
    out="output.dense",
    size="self.attention_head_size",
    counts=("self.num_attention_heads", "self.all_head_size"),
)
_BERT = Stack(
    "encoder.layer",
    (_BERT_HEADS,),
    Neurons(("intermediate.dense",), "output.dense", "intermediate_size"),
    "num_hidden_layers",
)
register_architecture(("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text", "ernie"), _BERT)
register_architecture(
    "distilbert",
    Stack(
        "transformer.layer",
        (
            Heads(
                "attention",
                query="q_lin",
                key="k_lin",
                value="v_lin",
                out="out_lin",
                size="attention_head_size",
                counts=("n_heads",),
            ),
        ),
        Neurons(("ffn.lin1",), "ffn.lin2", "hidden_dim"),
        "n_layers",
    ),
)
register_architecture(
    "gpt2",
    Stack(
        "h",
        (
            Heads(
                "attn",
                query="c_attn",
                key="c_attn",
                value="c_attn",
                out="c_proj",
                minimum=1,
                counts=("num_heads", "split_size"),
            ),
        ),
        Neurons(("mlp.c_fc",), "mlp.c_proj", "n_inner"),
        "n_layer",
        first_heads=True,
    ),
)


def _projections(module: str, out: str, **settings: Any) -> Heads:
    return Heads(module, query="q_proj", key="k_proj", value="v_proj", out=out, **settings)


register_architecture(
    "opt",
    Stack(
        "decoder.layers",
        (_projections("self_attn", "out_proj", counts=("num_heads",), minimum=1),),
        Neurons(("fc1",), "fc2", "ffn_dim"),
        "num_hidden_layers",
        first_heads=True,
    ),
)
register_architecture(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "granite"),
    Stack(
        "layers",
        (
            _projections(
                "self_attn",
                "o_proj",
                counts=("num_heads", "num_key_value_heads"),
                config=("num_attention_heads", "num_key_value_heads"),
                config_size="head_dim",
            ),
        ),
        Neurons(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size"),
        "num_hidden_layers",
        per_layer=("layer_types", "no_rope_layers"),
        first_heads=True,
    ),
)
register_architecture(
    ("vit", "deit"),
    Stack(
        "layers",
        (_projections("attention", "o_proj", counts=("num_attention_heads",)),),
        Neurons(("mlp.fc1",), "mlp.fc2", "intermediate_size"),
        "num_hidden_layers",
    ),
)


def _t5_heads(module: str, bias: str | None) -> Heads:
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


_T5_HEADS = _t5_heads("layer.0.SelfAttention", "relative_attention_bias")
_T5_UP = ("wi", "wi_0", "wi_1")
register_architecture(
    ("t5", "mt5"),
    Stack(
        "encoder.block",
        (_T5_HEADS,),
        Neurons(tuple(f"layer.1.DenseReluDense.{name}" for name in _T5_UP), "layer.1.DenseReluDense.wo", "d_ff"),
        "num_layers",
        fixed=1,
        not_below="decoder.block",
    ),
    Stack(
        "decoder.block",
        (_T5_HEADS, _t5_heads("layer.1.EncDecAttention", None)),
        Neurons(tuple(f"layer.2.DenseReluDense.{name}" for name in _T5_UP), "layer.2.DenseReluDense.wo", "d_ff"),
        "num_decoder_layers",
        fixed=1,
        first_heads=True,
    ),
)
_WHISPER_HEADS = _projections("self_attn", "out_proj", counts=("num_heads",), minimum=1)
register_architecture(
    "whisper",
    Stack(
        "encoder.layers",
        (_WHISPER_HEADS,),
        Neurons(("fc1",), "fc2", "encoder_ffn_dim"),
        "encoder_layers",
    ),
    Stack(
        "decoder.layers",
        (_WHISPER_HEADS, _projections("encoder_attn", "out_proj", counts=("num_heads",), minimum=1)),
        Neurons(("fc1",), "fc2", "decoder_ffn_dim"),
        "decoder_layers",
        first_heads=True,
    ),
)


def _convolution(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("convolution", "normalization"))


register_architecture(
    "resnet",
    Channels(
        "encoder.stages.*.layers.*",
        tuple((_convolution(f"layer.{i}"), f"layer.{i + 1}.convolution") for i in range(2)),
    ),
)
register_architecture(
    "mobilenet_v1",  # pairs of a depthwise convolution and one of single positions, from the stem to the classifier
    Channels("", ((_convolution("conv_stem", "layer.0"), "layer.1.convolution"),)),
    Channels(
        "", tuple((_convolution(f"layer.{i}", f"layer.{i + 1}"), f"layer.{i + 2}.convolution") for i in range(1, 25, 2))
    ),
)
_INVERTED = (_convolution("expand_1x1", "conv_3x3"), "reduce_1x1.convolution")
register_architecture("mobilenet_v2", Channels("layer.*", (_INVERTED,)), Channels("conv_stem", (_INVERTED,)))
register_architecture("convnext", Channels("encoder.stages.*.layers.*", ((("pwconv1",), "pwconv2"),)))


def architecture_of(model_type: str, model_name: str) -> tuple[Stack | Channels, ...]:
    """The table's entry for an architecture.

    Args:
        model_type: ``config.model_type``.
        model_name: The model's class, for the message.

    Raises:
        ArchitectureError: If there is none.
    """
    if model_type not in _TABLE:
        raise ArchitectureError(
            f"the table of architectures has no entry for {model_type or 'a model without config.model_type'!r} "
            f"({model_name}): expected one of {', '.join(list_architectures())}; say where its layers, heads and "
            f"neurons are with hf_prune.register_architecture({model_type!r}, Stack(...)), or its channels with "
            f"Channels(...), or prune it with another granularity"
        )
    return _TABLE[model_type]
