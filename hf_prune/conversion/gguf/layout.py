"""Which of llama.cpp's architectures fits a model, and the sizes that it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_prune.architectures.bypass import bypassed_layers
from hf_prune.errors import ExportError

_ARCHITECTURES = {  # of uniform models, by model type and class
    ("llama", "LlamaForCausalLM"): "llama",
    ("mistral", "MistralForCausalLM"): "llama",
    ("qwen2", "Qwen2ForCausalLM"): "qwen2",
    ("qwen3", "Qwen3ForCausalLM"): "qwen3",
}
_NON_UNIFORM = "deci"  # the architecture of llama.cpp that reads sizes for each layer
_ADJACENT_PAIRS = ("llama", _NON_UNIFORM)  # rotary embeddings turn components 2i and 2i+1 there, and i and i+d/2 here
BLOCK = 32  # values that share a scale in q8_0


@dataclass(frozen=True)
class LayerSize:
    """The sizes of one layer, as they are written.

    Args:
        number: The number of the layer in the model.
        heads: Query heads, 0 for a layer without attention.
        kv_heads: Key and value heads.
        neurons: Neurons of the FFN, 0 for a layer without one.
        added: How many of these were added, all zero, since llama.cpp needs them.
    """

    number: int
    heads: int
    kv_heads: int
    neurons: int
    added: int


@dataclass(frozen=True)
class Layout:
    """What llama.cpp is told of a model's shape.

    Args:
        architecture: Its name in llama.cpp.
        layers: The sizes of each layer that does something.
        head_dim: The size of one head.
        adjacent_pairs: Whether rotary embeddings turn neighbouring components there: rows of queries and keys move.
    """

    architecture: str
    layers: tuple[LayerSize, ...]
    head_dim: int
    adjacent_pairs: bool

    def per_layer(self, name: str) -> int | list[int]:
        """One of the sizes of all layers: a number if it is the same everywhere and the architecture expects one."""
        values = [getattr(layer, name) for layer in self.layers]
        return values if self.architecture == _NON_UNIFORM else values[0]


def read_layout(model: Any, *, whole_blocks: bool = False) -> Layout:
    """Find the architecture of llama.cpp that computes what a model does.

    Args:
        model: A causal language model of transformers, shrunk or not.
        whole_blocks: Write a whole number of blocks of neurons, so that all matrices can be quantized.

    Raises:
        ExportError: If no architecture fits.
    """
    kind = str(model.config.model_type), type(model).__name__
    if kind not in _ARCHITECTURES:
        names = ", ".join(dict.fromkeys(name for _, name in _ARCHITECTURES))
        raise ExportError(f"GGUF: found a {kind[1]} of type {kind[0]!r}: expected one of {names}")
    if bypassed := bypassed_layers(model):
        raise ExportError(f"layers are switched off: {', '.join(bypassed)}; call shrink() first, which removes them")
    _check_computation(model)
    blocks = model.model.layers
    dims = {block.self_attn.head_dim for block in blocks}
    if len(dims) != 1:
        raise ExportError(f"GGUF: layers have heads of the sizes {sorted(dims)}: llama.cpp has one for all")
    head_dim = dims.pop()
    layers = _layer_sizes(blocks, head_dim, whole_blocks)
    first = layers[0]
    uniform = all((s.heads, s.kv_heads, s.neurons) == (first.heads, first.kv_heads, first.neurons) for s in layers)
    own = _ARCHITECTURES[kind]
    if own == "qwen2" and first.heads * head_dim != model.config.hidden_size:  # which it takes for granted
        uniform = False
    architecture = own if uniform and first.neurons else _NON_UNIFORM
    if architecture == _NON_UNIFORM and kind[0] == "qwen3":
        raise ExportError(
            "GGUF: the layers of this Qwen3ForCausalLM have different numbers of heads or neurons, and llama.cpp's "
            f"only architecture for such models, {_NON_UNIFORM!r}, has no norms of queries and keys: prune with "
            "scope='layer' and allocation='uniform', which keeps layers alike"
        )
    return Layout(architecture, layers, head_dim, architecture in _ADJACENT_PAIRS)


def _layer_sizes(blocks: Any, head_dim: int, whole_blocks: bool) -> tuple[LayerSize, ...]:
    sizes: list[LayerSize] = []
    for number, block in enumerate(blocks):
        attention = block.self_attn
        heads, kv_heads = (p.weight.shape[0] // head_dim for p in (attention.q_proj, attention.k_proj))
        neurons = found = block.mlp.down_proj.weight.shape[1]
        if heads and (not kv_heads or heads % kv_heads):
            raise ExportError(f"GGUF: {heads} query heads share {kv_heads} key heads: expected a multiple")
        if not heads and not neurons:  # it passes on what it is given
            continue
        if not sizes and not heads:  # llama.cpp takes sizes of heads from the first layer: one that is all zero
            heads = kv_heads = 1
        if whole_blocks:
            neurons = -(-neurons // BLOCK) * BLOCK
        if heads and not neurons:  # llama.cpp skips what the attention of such a layer adds
            neurons = BLOCK
        sizes.append(LayerSize(number, heads, kv_heads, neurons, neurons - found))
    if not sizes:
        raise ExportError("GGUF: the model has no layers with heads or neurons")
    return tuple(sizes)


def _check_computation(model: Any) -> None:
    """Refuse what the architectures of llama.cpp would compute otherwise."""
    config = model.config
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"GGUF: found the activation {config.hidden_act!r}: llama.cpp computes SiLU for these models")
    for block in model.model.layers:
        attention = block.self_attn
        if abs(attention.scaling * attention.head_dim**0.5 - 1) > 1e-6:
            raise ExportError(
                f"GGUF: attention is scaled by {attention.scaling:.4g}: llama.cpp computes "
                f"1/sqrt(head_dim) = {attention.head_dim**-0.5:.4g}"
            )
        if not attention.q_proj.weight.numel():
            for linear in (attention.o_proj, *(() if block.mlp.down_proj.weight.numel() else (block.mlp.down_proj,))):
                if getattr(linear, "bias", None) is not None and linear.bias.any():
                    raise ExportError("GGUF: a layer that lost all its inputs still adds a bias, which llama.cpp omits")


def context_length(config: Any) -> int:
    """The longest text that llama.cpp computes as the model does: where attention slides, that of its window."""
    limits = [int(config.max_position_embeddings)]
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) and (kinds is None or "sliding_attention" in kinds)
    if slides and getattr(config, "use_sliding_window", True):
        limits.append(int(config.sliding_window))
    return min(limits)


def rope_settings(model: Any, layout: Layout) -> dict[str, Any]:
    """What llama.cpp is told of the rotary embeddings.

    Returns:
        ``base`` and, where they are scaled, ``type``, ``factor``, ``original`` and, of YaRN, ``beta_fast``,
        ``beta_slow``; ``frequencies`` are factors that every frequency is divided by.

    Raises:
        ExportError: If llama.cpp computes no such scaling.
    """
    rope = dict(model.config.rope_parameters)
    kind = rope.get("rope_type", "default")
    settings: dict[str, Any] = {"base": float(rope["rope_theta"])}
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ExportError("GGUF: only a part of each head is rotated, which llama.cpp does not do for these models")
    if kind == "default":
        return settings
    if kind == "linear":
        return {**settings, "type": "linear", "factor": float(rope["factor"])}
    if kind == "llama3" and layout.adjacent_pairs:
        inverse = model.model.rotary_emb.inv_freq.detach().double().cpu()
        steps = 2 * inverse.new_tensor(range(len(inverse))) / layout.head_dim
        return {**settings, "frequencies": (settings["base"] ** -steps / inverse).float().numpy()}
    plain = {"rope_theta", "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    if kind == "yarn" and set(rope) <= plain:
        original = rope.get("original_max_position_embeddings") or model.config.max_position_embeddings
        betas = {key: float(rope.get(key) or default) for key, default in (("beta_fast", 32), ("beta_slow", 1))}
        return {**settings, "type": "yarn", "factor": float(rope["factor"]), "original": int(original), **betas}
    raise ExportError(
        f"GGUF: rotary embeddings are scaled by {kind!r} with {', '.join(sorted(rope))}, which llama.cpp does not "
        f"compute for {layout.architecture!r}: expected default, linear, llama3 (of Llama and Mistral) or plain yarn"
    )
