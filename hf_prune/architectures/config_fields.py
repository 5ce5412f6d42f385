"""What fields of transformers' configs mean, by their names: layers, heads, widths, tokens, experts."""

from __future__ import annotations

import re

# Each pattern matches the whole name of a field; most allow a prefix such as ``encoder_``.
LAYERS = re.compile(
    r"(num_|n_)?(\w+_)?(layers?(?!_)|depth|blocks|hidden_groups|resnets|attends_per_block)|num_layers_\w+|\w*layers_per_block"
    r"|max_window_layers|n_layers?"
)
FIXED = (
    re.compile(  # counts of layers that the lengths of lists or the code fix, and settings that only look like sizes
        r"num_feat_extract_layers|\w*postnet\w*|iou_head_depth|no_rope_layers|num_upsampling_layers|num_feature_levels"
        r"|num_ssl_layers|\w*_stage_layers|chunk_size_feed_forward|\w*ignore_index|\w*latent_stride|num_lstm_layers"
        r"|max_num_frames|\w*num_kv_shared_layers"
    )
)
HEAD_COUNT = re.compile(r"(\w+_)?(heads?|attention_heads\w*)")
GROUPS = re.compile(
    r"(\w+_)?(key_value_heads|kv_heads|n_head_kv|query_groups|query_group_num|n_groups|kv_n_heads|num_attention_groups"
    r"|num_ssm_groups|ssm_groups)"
)
HEAD_SIZE = re.compile(
    r"(\w+_)?(head_dim|head_size|d_kv|dim_head|d_head|kv_channels|dim_key|rotary_dim|rope_dim|attention_head_dim)"
)
WIDTH = re.compile(
    r"(\w+_)?(size|sizes|dim|dims|d_model|n_embd|n_embed|n_inner|d_ff|dff|dim_ff|n_ff|ffn?|width|channels|rank|units|features|filters"
    r"|embed_dim_per_stage|channel_list|emb_size|hidden|conv_dim|d_inner|num_pos_feats|planes|d_ssm|embed_dims?"
    r"|lru_width|hidden_size_global|hidden_size_per_layer_input|d_latents|upsample_groups|hidden_dimension|upsample_initial_channel)"
)
NO_WIDTH = re.compile(
    r"\w*(vocab|image|patch|window|kernel|chunk|merge|codebook_s|codebooks|position|buffer|queue|bucket|tile|sample_size|group_size"
    r"|block|crop|grid|input_size|context|batch|max_|num_channels|in_chans|roi|feat_sizes|background|stack"
    r"|pool_|beam|frame|hop|fft|mel|stride|cache|conv_kernel|d_conv|feature_size|audio_channels|query_dim|quantizer"
    r"|bins|mm_tokens|min_|spec_|input_dim|pretrain|memory_size|dilat|static|time_features|categorical|anchor|entity|num_groups)\w*"
)
VOCAB = re.compile(r"(\w+_)?(vocab_size|vocabulary_size|vocab_sizes|group_vocab)(_\w+)?|\w*vocab_offset|ngram_vocab\w*")
TOKEN = re.compile(r"(\w+_)?(id|ids|index|token|idx)")
TABLE = re.compile(r"max_length")
POSITION = re.compile(
    r"\w*max_\w*position\w*|n_positions|\w*max_seq_len|\w*max_sequence_length|n_ctx|block_size|seq_length|position_embedding_size|max_length|pos_emb_(height|width)|\w*num_position_embeddings"
)
EXPERTS = re.compile(
    r"(\w+_)?(num_experts|n_routed_experts|num_local_experts|num_routed_experts|n_experts|num_moe_experts)"
)
EXPERT_GROUPS = re.compile(r"n_groups?|num_expert_groups?")
TOP_GROUPS = re.compile(r"topk_groups?|num_limited_groups")
TOP_K = re.compile(r"(\w+_)?(experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|experts_top_k|top_k)")
PERIOD = re.compile(
    r"(\w+_)?(period|interval|pattern|sparse_step|layer_frequency|attention_frequency|layer_freq|every_n|every_n_layers|layer_group_size)"
)
OFFSET = re.compile(r"(attn|expert|moe)_layer_offset")
FIRST_DENSE = re.compile(r"first_k_dense_replace|\w*num_kv_shared_layers|num_dense_layers|moe_layer_start_index")
LAYER_NUMBERS = re.compile(
    r"\w*(_indexes|attention_blocks|_layer_ids|_layers|_layer_idx|_attn_idxs|_layer_indices|_at_layers)"
)
LAYER_INDEXES = re.compile(
    r"\w*(_indexes|_indices|attention_blocks|_layer_ids|feature_layers?|layer_idx|layer_id|mlp_only_layers"
    r"|merge_index|intermediate_\w*_indices|_hook_ids)"
)
PIXELS = re.compile(r"(\w+_)?image_size")
WINDOW = re.compile(r"window_size|attention_window")
QUERIES = re.compile(
    r"num_queries|two_stage_num_proposals|num_latents|latent_query_num|num_latent_queries|mm_tokens_per_image"
)
NORM_GROUPS = re.compile(r"num_groups")
AT_LEAST_32 = re.compile(r"base_channels")  # of image tokenizers, whose norms have 32 groups
