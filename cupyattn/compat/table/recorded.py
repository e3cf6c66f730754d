"""Signatures of other libraries, as they are in their sources: names, order and defaults, which are facts.

A dtype that is a default there is its name here, and `<factory>` is a default that a call makes.
"""

from __future__ import annotations

import re

FLASH_ATTN_VERSION, FLASHINFER_VERSION = "2.8.3", "0.7.2"

# flash_attn 2.8.3.
FLASH_ATTN = """
flash_attn_func: q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False
flash_attn_kvpacked_func: q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False
flash_attn_qkvpacked_func: qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False
flash_attn_varlen_func: q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None
flash_attn_varlen_kvpacked_func: q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False
flash_attn_varlen_qkvpacked_func: qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False
flash_attn_with_kvcache: q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1,
    -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False
bert_padding.unpad_input: hidden_states, attention_mask, unused_mask=None
bert_padding.unpad_input_for_concatenated_sequences: hidden_states, attention_mask_in_length
bert_padding.pad_input: hidden_states, indices, batch, seqlen
bert_padding.index_first_axis: input, indices
bert_padding.index_put_first_axis: values, indices, first_axis_dim
utils.generation.allocate_inference_cache: max_batch_size, max_seqlen, nheads, headdim, layers, device,
    dtype='float16'
utils.generation.InferenceParams: max_seqlen, max_batch_size, seqlen_offset=0, batch_size_offset=0,
    key_value_memory_dict=<factory>, lengths_per_sample=None
layers.rotary.apply_rotary_emb: x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None,
    max_seqlen=None
"""

# flash_attn_interface, FlashAttention-3 at its version of August 2026. What 2.8.3 was released with lacks
# return_attn_probs.
FLASH_ATTN_3 = """
flash_attn_func: q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False
flash_attn_qkvpacked_func: qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0,
    return_attn_probs=False
flash_attn_varlen_func: q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False
flash_attn_with_kvcache: q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
    cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None,
    softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False
get_scheduler_metadata: batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
    qkv_dtype='bfloat16', headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,
    page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False,
    num_splits=0, pack_gqa=None, sm_margin=0
"""

# FlashInfer 0.7.2. What follows page_size in the decode wrapper's plan stands in the order in which it may still be
# given by position, and then what is by keyword only.
FLASHINFER = """
single_decode_with_kv_cache: q, k, v, kv_layout='NHD', pos_encoding_mode='NONE', use_tensor_cores=False, q_scale=None,
    k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None,
    return_lse=False
BatchDecodeWithPagedKVCacheWrapper.__init__: float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False,
    use_tensor_cores=False, paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None,
    paged_kv_last_page_len_buffer=None, backend='auto', jit_args=None
BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer: float_workspace_buffer, int_workspace_buffer
BatchDecodeWithPagedKVCacheWrapper.plan: indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim,
    page_size, pos_encoding_mode='NONE', window_left=-1, logits_soft_cap=None, q_data_type='float16',
    kv_data_type=None, o_data_type=None, data_type=None, sm_scale=None, rope_scale=None, rope_theta=None,
    non_blocking=True, block_tables=None, seq_lens=None, fixed_split_size=None, disable_split_kv=False,
    q_len_per_req=1, *, window_right=0, is_causal=None
BatchDecodeWithPagedKVCacheWrapper.forward: q, paged_kv_cache, pos_encoding_mode='NONE', q_scale=None, k_scale=None,
    v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None
BatchDecodeWithPagedKVCacheWrapper.run: q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
    lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None, q_len_per_req=None,
    skip_softmax_threshold_scale_factor=None, kv_cache_sf=None
BatchDecodeWithPagedKVCacheWrapper.forward_return_lse: q, paged_kv_cache, pos_encoding_mode='NONE', q_scale=None,
    k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None
CUDAGraphBatchDecodeWithPagedKVCacheWrapper.__init__: workspace_buffer, indptr_buffer, indices_buffer,
    last_page_len_buffer, kv_layout='NHD', use_tensor_cores=False
single_prefill_with_kv_cache: q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
    packed_custom_mask=None, causal=False, kv_layout='NHD', pos_encoding_mode='NONE', use_fp16_qk_reduction=False,
    sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, backend='auto',
    return_lse=False, kv_cache_sf=None, k_scale=None, v_scale=None
BatchPrefillWithPagedKVCacheWrapper.__init__: float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False,
    qo_indptr_buf=None, paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
    custom_mask_buf=None, mask_indptr_buf=None, backend='auto', jit_args=None, jit_kwargs=None,
    variant_owns_mask=False
BatchPrefillWithPagedKVCacheWrapper.reset_workspace_buffer: float_workspace_buffer, int_workspace_buffer
BatchPrefillWithPagedKVCacheWrapper.plan: qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
    num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None,
    causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, window_left=-1,
    logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type='float16', kv_data_type=None,
    o_data_type=None, non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0,
    max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None,
    max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False
BatchPrefillWithPagedKVCacheWrapper.forward: q, paged_kv_cache, causal=False, pos_encoding_mode='NONE',
    use_fp16_qk_reduction=False, k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None,
    rope_scale=None, rope_theta=None
BatchPrefillWithPagedKVCacheWrapper.run: q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
    lse=None, return_lse=False, lse_base='log2', lse_layout='NH', enable_pdl=None, window_left=None, sinks=None,
    kv_cache_sf=None, skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, uses_spcompress=None
BatchPrefillWithPagedKVCacheWrapper.forward_return_lse: q, paged_kv_cache, causal=False, pos_encoding_mode='NONE',
    use_fp16_qk_reduction=False, k_scale=None, v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None,
    rope_scale=None, rope_theta=None
BatchPrefillWithRaggedKVCacheWrapper.__init__: float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False,
    qo_indptr_buf=None, kv_indptr_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend='auto', jit_args=None,
    jit_kwargs=None, variant_owns_mask=False
BatchPrefillWithRaggedKVCacheWrapper.reset_workspace_buffer: float_workspace_buffer, int_workspace_buffer
BatchPrefillWithRaggedKVCacheWrapper.plan: qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk,
    head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode='NONE',
    use_fp16_qk_reduction=False, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None,
    rope_theta=None, q_data_type='float16', kv_data_type=None, o_data_type=None, non_blocking=True,
    prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None,
    fixed_split_size=None, disable_split_kv=False, seq_lens=None, seq_lens_q=None, max_token_per_sequence=None,
    max_sequence_kv=None, v_indptr=None, o_indptr=None
BatchPrefillWithRaggedKVCacheWrapper.forward: q, k, v, causal=False, pos_encoding_mode='NONE',
    use_fp16_qk_reduction=False, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None
BatchPrefillWithRaggedKVCacheWrapper.run: q, k, v, *args, q_scale=None, k_scale=None, v_scale=None, o_scale=None,
    out=None, lse=None, return_lse=False, lse_base='log2', lse_layout='NH', enable_pdl=None, kv_cache_sf=None
BatchPrefillWithRaggedKVCacheWrapper.forward_return_lse: q, k, v, causal=False, pos_encoding_mode='NONE',
    use_fp16_qk_reduction=False, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None
merge_state: v_a, s_a, v_b, s_b
merge_state_in_place: v, s, v_other, s_other, mask=None
merge_states: v, s
MultiLevelCascadeAttentionWrapper.__init__: num_levels, float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False,
    qo_indptr_buf_arr=None, paged_kv_indptr_buf_arr=None, paged_kv_indices_buf_arr=None,
    paged_kv_last_page_len_buf_arr=None
MultiLevelCascadeAttentionWrapper.reset_workspace_buffer: float_workspace_buffer, int_workspace_buffers
MultiLevelCascadeAttentionWrapper.plan: qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr,
    paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, causal=False, pos_encoding_mode='NONE',
    use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None,
    rope_theta=None, q_data_type='float16', kv_data_type=None
MultiLevelCascadeAttentionWrapper.run: q, paged_kv_cache
BatchDecodeWithSharedPrefixPagedKVCacheWrapper.__init__: float_workspace_buffer, kv_layout='NHD'
BatchDecodeWithSharedPrefixPagedKVCacheWrapper.reset_workspace_buffer: float_workspace_buffer, int_workspace_buffer
BatchDecodeWithSharedPrefixPagedKVCacheWrapper.begin_forward: unique_kv_indptr, unique_kv_indices,
    unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, data_type='float16'
BatchDecodeWithSharedPrefixPagedKVCacheWrapper.forward: q, k_shared, v_shared, unique_kv_cache
BatchPrefillWithSharedPrefixPagedKVCacheWrapper.__init__: float_workspace_buffer, kv_layout='NHD'
BatchPrefillWithSharedPrefixPagedKVCacheWrapper.reset_workspace_buffer: float_workspace_buffer, int_workspace_buffer
BatchPrefillWithSharedPrefixPagedKVCacheWrapper.begin_forward: qo_indptr, paged_kv_indptr, paged_kv_indices,
    paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size
BatchPrefillWithSharedPrefixPagedKVCacheWrapper.forward: q, k_shared, v_shared, unique_kv_cache, causal=False,
    use_fp16_qk_reduction=False, sm_scale=None, rope_scale=None, rope_theta=None
get_batch_indices_positions: append_indptr, seq_lens, nnz, batch_indices=None, positions=None
get_seq_lens: kv_indptr, kv_last_page_len, page_size
append_paged_kv_cache: append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr,
    kv_last_page_len, kv_layout='NHD'
packbits: x, bitorder='big'
segment_packbits: x, indptr, bitorder='big'
apply_rope_inplace: q, k, indptr, offsets, rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0
apply_rope_pos_ids_inplace: q, k, pos_ids, rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0
apply_llama31_rope_inplace: q, k, indptr, offsets, rotary_dim=None, interleave=False, rope_scale=8,
    rope_theta=500000.0, low_freq_factor=1, high_freq_factor=4, old_context_len=8192
apply_llama31_rope_pos_ids_inplace: q, k, pos_ids, rotary_dim=None, interleave=False, rope_scale=8,
    rope_theta=500000.0, low_freq_factor=1, high_freq_factor=4, old_context_len=8192
apply_rope: q, k, indptr, offsets, rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0
apply_rope_pos_ids: q, k, pos_ids, rotary_dim=None, interleave=False, rope_scale=1, rope_theta=10000.0
apply_llama31_rope: q, k, indptr, offsets, rotary_dim=None, interleave=False, rope_scale=8, rope_theta=500000.0,
    low_freq_factor=1, high_freq_factor=4, old_context_len=8192
apply_llama31_rope_pos_ids: q, k, pos_ids, rotary_dim=None, interleave=False, rope_scale=8, rope_theta=500000.0,
    low_freq_factor=1, high_freq_factor=4, old_context_len=8192
apply_rope_with_cos_sin_cache: positions, query, key, head_size, cos_sin_cache, is_neox=True
apply_rope_with_cos_sin_cache_inplace: positions, query, key, head_size, cos_sin_cache, is_neox=True
"""

# FlashInfer 0.2.14, where it is another one.
FLASHINFER_0_2 = """
BatchDecodeWithPagedKVCacheWrapper.plan: indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim,
    page_size, pos_encoding_mode='NONE', window_left=-1, logits_soft_cap=None, q_data_type='float16',
    kv_data_type=None, data_type=None, sm_scale=None, rope_scale=None, rope_theta=None, non_blocking=True,
    block_tables=None, seq_lens=None
BatchDecodeWithPagedKVCacheWrapper.run: q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
    lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None
single_prefill_with_kv_cache: q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
    packed_custom_mask=None, causal=False, kv_layout='NHD', pos_encoding_mode='NONE', use_fp16_qk_reduction=False,
    sm_scale=None, window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, backend='auto',
    return_lse=False
BatchPrefillWithPagedKVCacheWrapper.__init__: float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False,
    qo_indptr_buf=None, paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None,
    custom_mask_buf=None, mask_indptr_buf=None, backend='auto', jit_args=None, jit_kwargs=None
BatchPrefillWithPagedKVCacheWrapper.plan: qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
    num_qo_heads, num_kv_heads, head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None,
    causal=False, pos_encoding_mode='NONE', use_fp16_qk_reduction=False, sm_scale=None, window_left=-1,
    logits_soft_cap=None, rope_scale=None, rope_theta=None, q_data_type='float16', kv_data_type=None,
    non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0,
    max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None,
    max_sequence_kv=None
BatchPrefillWithPagedKVCacheWrapper.run: q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None,
    lse=None, return_lse=False, enable_pdl=None, window_left=None, sinks=None
BatchPrefillWithRaggedKVCacheWrapper.__init__: float_workspace_buffer, kv_layout='NHD', use_cuda_graph=False,
    qo_indptr_buf=None, kv_indptr_buf=None, custom_mask_buf=None, mask_indptr_buf=None, backend='auto', jit_args=None,
    jit_kwargs=None
BatchPrefillWithRaggedKVCacheWrapper.plan: qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk,
    head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode='NONE',
    use_fp16_qk_reduction=False, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None,
    rope_theta=None, q_data_type='float16', kv_data_type=None, non_blocking=True, prefix_len_ptr=None,
    token_pos_in_items_ptr=None, token_pos_in_items_len=0, max_item_len_ptr=None
BatchPrefillWithRaggedKVCacheWrapper.run: q, k, v, *args, out=None, lse=None, return_lse=False, enable_pdl=None
get_batch_indices_positions: append_indptr, seq_lens, nnz
"""


def signatures(record: str) -> dict[str, str]:
    """By call: the parameters with their defaults, in one line."""
    joined = re.sub(r"\n +", " ", record.strip())
    return dict(line.split(": ", 1) for line in joined.splitlines())


def parameters(signature: str) -> list[str]:
    """The parameters of a signature with their defaults; a star before those by keyword only."""
    return re.split(r", (?![^(]*\))", signature)
