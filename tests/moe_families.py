"""A tiny random model for each of several families with mixtures of experts, and inputs for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from tests.architecture_models import Inputs

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1}
_GROUPED |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
_SEQ2SEQ = {"vocab_size": 64, "d_model": 32, "num_experts": 8}

# model_type -> (name of the class, settings of its config)
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {**_TEXT, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_TEXT, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
         "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_TEXT, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    ),
    "olmoe": ("OlmoeForCausalLM", {**_TEXT, "num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        {**_TEXT, **_LATENT, **_GROUPED, "num_key_value_heads": 4, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**_TEXT, **_LATENT, **_GROUPED, "num_key_value_heads": 4}),
    "glm4_moe": ("Glm4MoeForCausalLM", {**_TEXT, **_GROUPED, "head_dim": 8, "n_group": 1}),
    "gpt_oss": ("GptOssForCausalLM", {**_TEXT, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4ForCausalLM",
        {**_TEXT, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 24,
         "interleave_moe_layer_step": 1},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", {**_TEXT, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {**_TEXT, **_MAMBA, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 16,
         "layer_types": ["mamba", "attention"], "mamba_chunk_size": 8},
    ),
    "jetmoe": ("JetMoeForCausalLM", {**_TEXT, "num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 8}),
    "phimoe": ("PhimoeForCausalLM", {**_TEXT, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {**_TEXT, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 20, "moe_layer_start_index": 0},
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {**_TEXT, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "num_dense_layers": 1,
         "layer_types": ["conv", "full_attention"]},
    ),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        {**_TEXT, "head_dim": 8, "global_head_dim": 8, "num_experts": 8, "top_k_experts": 2,
         "moe_intermediate_size": 20, "enable_moe_block": True, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {**_TEXT, "head_dim": 8, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {**_TEXT, "head_dim": 8, "num_experts": 8, "moe_topk": 2}),
    "dbrx": (
        "DbrxForCausalLM",
        {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "pad_token_id": 0,
         "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
         "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32}},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {**_TEXT, "layers_block_type": ["mamba", "moe", "attention", "moe"], "n_routed_experts": 8,
         "num_experts_per_tok": 2, "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 16,
         "n_group": 1, "topk_group": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
         "n_groups": 1, "head_dim": 8, "chunk_size": 8},
    ),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {**_SEQ2SEQ, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
         "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0,
         "pad_token_id": 0},
    ),
}  # fmt: skip

# Those whose code does not let experts go: its own numbers do not follow the router's.
REFUSED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "nllb-moe": (
        "NllbMoeForConditionalGeneration",
        {**_SEQ2SEQ, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_sparse_step": 2,
         "decoder_sparse_step": 2, "expert_capacity": 64, "decoder_start_token_id": 2, "pad_token_id": 1},
    ),
}  # fmt: skip


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(24).view(2, 12) % 60 + 3}


def _translation() -> dict[str, torch.Tensor]:
    return {**_text(), "decoder_input_ids": _text()["input_ids"][:, :6]}


def tiny_moe(model_type: str, **settings: Any) -> tuple[Any, Inputs]:
    """A model of a family, every weight and correction random and large enough to matter, and what makes inputs."""
    name, own = {**MODELS, **REFUSED}[model_type]
    cls: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(cls.config_class(**{**own, **settings}))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    for key, buffer in model.named_buffers():
        if key.endswith(("correction_bias", "expert_bias")):
            buffer.normal_(0, 0.05, generator=generator)
    return model.eval(), _translation if model.config.is_encoder_decoder else _text
