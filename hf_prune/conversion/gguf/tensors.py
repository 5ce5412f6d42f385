"""The weights of a model, under llama.cpp's names and in its order."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hf_prune.conversion.gguf.layout import LayerSize, Layout
from hf_prune.errors import ExportError

_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_FEED_FORWARD = {
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def named_tensors(model: Any, layout: Layout) -> dict[str, tuple[Tensor, LayerSize | None]]:
    """The parameters of a model by their names in llama.cpp, each with the size of its layer.

    Raises:
        ExportError: If the architecture has no place for one.
    """
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    sizes: dict[str, LayerSize] = {}
    left_out = set()
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    names |= {} if tied else {"lm_head.weight": "output.weight"}
    prefixes = {number: f"model.layers.{number}." for number in range(len(model.model.layers))}
    for position, size in enumerate(layout.layers):
        prefix = prefixes.pop(size.number)
        for table, present in ((_ATTENTION, size.heads), (_FEED_FORWARD, size.neurons)):
            for module, name in table.items():
                for kind in ("weight", "bias"):
                    ours = f"{prefix}{module}.{kind}"
                    if present:
                        names[ours] = f"blk.{position}.{name}.{kind}"
                        sizes[ours] = size
                    else:
                        left_out.add(ours)
    empty = tuple(prefixes.values())  # layers without heads and neurons
    found: dict[str, tuple[Tensor, LayerSize | None]] = {}
    for ours, parameter in model.named_parameters():
        if ours in left_out or ours.startswith(empty):
            continue
        if ours not in names:
            raise ExportError(
                f"GGUF: llama.cpp's {layout.architecture!r} has no place for {ours}: merge adapters, and export the "
                f"plain model"
            )
        found[names[ours]] = parameter, sizes.get(ours)
    return found


def as_written(name: str, weight: Tensor, size: LayerSize | None, layout: Layout) -> Tensor:
    """A weight as llama.cpp expects it: rows of queries and keys in its order, and heads and neurons added.

    Args:
        name: Its name in llama.cpp.
        weight: The parameter.
        size: Of its layer.
        layout: The model's.
    """
    weight = weight.detach()
    if size is None:
        return weight
    _, _, part, kind = name.split(".")
    if layout.adjacent_pairs and part in ("attn_q", "attn_k") and weight.numel():
        halves = weight.unflatten(0, (-1, 2, layout.head_dim // 2))  # (heads, 2, half, ...)
        weight = halves.transpose(1, 2).flatten(0, 2)
    queries, keys = size.heads * layout.head_dim, size.kv_heads * layout.head_dim
    rows = {"attn_q": queries, "attn_k": keys, "attn_v": keys, "ffn_gate": size.neurons, "ffn_up": size.neurons}
    columns = {"attn_output": queries, "ffn_down": size.neurons} if kind == "weight" else {}
    missing = rows.get(part, weight.shape[0]) - weight.shape[0]
    if kind == "bias" or weight.dim() == 1:
        return F.pad(weight, (0, missing))
    return F.pad(weight, (0, columns.get(part, weight.shape[1]) - weight.shape[1], 0, missing))
