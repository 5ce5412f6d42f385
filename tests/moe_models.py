"""Tiny mixtures, one for each way in which transformers packs experts, and their twins with lists of Linears."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.models import VOCAB, fill

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

#: By family: the class, and what differs from the sizes that all have.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 24}),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK),
    "deepseek_v2": ("DeepseekV2", _DEEPSEEK),
    "olmoe": ("Olmoe", {"num_experts": 4}),
    "phimoe": ("Phimoe", {"num_local_experts": 4}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}),
    "jetmoe": ("JetMoe", {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 1}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}),  # transposed, with biases
    "llama4": ("Llama4Text", {"num_local_experts": 4, "intermediate_size_mlp": 24, "attention_chunk_size": 64}),
    "nemotron_h": (  # no gate
        "NemotronH",
        {
            "layers_block_type": ["attention", "moe"],
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}


def tiny_mixture(family: str, seed: int = 0) -> Any:
    """A language model of one family with four experts in a layer, which multiplies them one by one."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **settings})
    config._experts_implementation = "eager"
    model = fill(
        getattr(transformers, "Llama4ForCausalLM" if name == "Llama4Text" else f"{name}ForCausalLM")(config), seed
    )
    with torch.no_grad():  # as different from one another as routers that were trained
        for parameter_name, parameter in model.named_parameters():
            if "router" in parameter_name or ".gate." in parameter_name:
                parameter.mul_(20)
    return model.eval()


def packed(model: nn.Module) -> list[str]:
    """The names of the packed experts of a model."""
    return [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]


class ListOfExperts(nn.Module):
    """What a module of packed experts computes, with a Linear for each matrix of each expert."""

    def __init__(self, packed_experts: Any) -> None:
        super().__init__()
        self.__dict__["packed"] = packed_experts  # for its activation, and no submodule
        first = "gate_up_proj" if hasattr(packed_experts, "gate_up_proj") else "up_proj"
        self.batched = "Llama4" in type(packed_experts).__name__
        transposed = self.batched or packed_experts.is_transposed
        self.first, self.second = (
            nn.ModuleList(
                _linear(matrix.t() if transposed else matrix, None if biases is None else biases[number])
                for number, matrix in enumerate(getattr(packed_experts, name).detach())
            )
            for name in (first, "down_proj")
            for biases in [getattr(packed_experts, f"{name}_bias", None)]
        )

    def forward(self, x: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """As the packed module does it, on the tokens that are routed to each expert."""
        total = torch.zeros_like(x)
        if self.batched:
            each = len(x) // len(self.first)
            for number in range(len(self.first)):
                rows = number * each + x[number * each : (number + 1) * each].ne(0).any(-1).nonzero().squeeze(1)
                total = total.index_copy(0, rows, self._expert(number, x[rows])) if len(rows) else total
            return total
        for number in range(len(self.first)):
            token, place = torch.where(index == number)
            if len(token):
                total = total.index_add(0, token, self._expert(number, x[token]) * weights[token, place, None])
        return total

    def _expert(self, number: int, x: Tensor) -> Tensor:
        hidden = self.first[number](x)
        if self.batched:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = up * self.packed.act_fn(gate)
        else:
            hidden = self.packed._apply_gate(hidden) if self.packed.has_gate else self.packed.act_fn(hidden)
        return self.second[number](hidden)


def _linear(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(matrix)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def twin(family: str) -> nn.Module:
    """The same model as :func:`tiny_mixture` with lists of Linears in place of its packed experts."""
    model = tiny_mixture(family)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if (
                any(key in child._parameters for key in ("gate_up_proj", "up_proj"))
                and "down_proj" in child._parameters
            ):
                setattr(module, name, ListOfExperts(child))
    return model


def experts_of(model: nn.Module, name: str, transposed: bool) -> Tensor:
    """The weights of a twin in the layout of a packed parameter.

    Args:
        model: The twin.
        name: Of the parameter.
        transposed: Whether it holds (in, out).
    """
    module, _, attribute = name.rpartition(".")
    experts: Any = model.get_submodule(module)
    linears = experts.second if attribute == "down_proj" else experts.first
    return torch.stack([linear.weight.detach().t() if transposed else linear.weight.detach() for linear in linears])
