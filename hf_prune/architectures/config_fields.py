"""What fields of transformers' configs mean, by their names: layers, heads, widths, tokens, experts."""

from __future__ import annotations

import re

# Names of fields, each matched as a whole, without a prefix such as ``encoder_``.
LAYERS = re.compile(r"(num_|n_)?(\w+_)?(layers?|depth|blocks|hidden_groups)|num_layers_\w+")
HEAD_COUNT = re.compile(r"(\w+_)?(heads?|attention_heads\w*)")
GROUPS = re.compile(r"(\w+_)?(key_value_heads|kv_heads|n_head_kv|query_groups|query_group_num|n_groups|num_groups)")
HEAD_SIZE = re.compile(r"(\w+_)?(head_dim|head_size|d_kv|dim_head|d_head|kv_channels|dim_key)")
WIDTH = re.compile(
    r"(\w+_)?(size|sizes|dim|dims|d_model|n_embd|n_embed|n_inner|d_ff|width|channels|rank|units|features|filters|units"
    r"|embed_dim_per_stage|channel_list|emb_size|hidden|conv_dim|d_inner|num_pos_feats|chunk_dims|planes)"
)
NO_WIDTH = re.compile(
    r"\w*(vocab|image|patch|window|kernel|chunk|merge|codebook|position|buffer|queue|bucket|tile|sample|group|block|crop"
    r"|grid|input_size|context|batch|max_|num_channels|in_channels|in_chans|roi|feat_sizes|background|stack|pool|beam"
    r"|frame|hop|fft|mel|stride|cache|conv_kernel|d_conv|feature_size|audio_channels|query_dim|quant|bins|mm_tokens"
    r"|min_|pretrain|memory_size|kernel|dilat|static|time_features|categorical|anchor|output_dim_|entity)\w*"
)
VOCAB = re.compile(r"(\w+_)?(vocab_size|vocabulary_size)(_\w+)?")
TOKEN = re.compile(r"(\w+_)?(id|ids|index|token|idx)")
POSITION = re.compile(r"\w*max_\w*position\w*|n_positions|\w*max_seq_len|\w*max_sequence_length|n_ctx|block_size")
EXPERTS = re.compile(r"(\w+_)?(num_experts|n_routed_experts|num_local_experts|num_routed_experts|n_experts)")
TOP_K = re.compile(r"(\w+_)?(experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|experts_top_k|top_k|topk)")
PERIOD = re.compile(
    r"(\w+_)?(period|interval|pattern|sparse_step|layer_frequency|attention_frequency|layer_freq|every_n)"
)
LAYER_INDEXES = re.compile(
    r"\w*(_indexes|_indices|attention_blocks|_layers|_layer_ids|feature_layers?|layer_idx|layer_id)"
)
