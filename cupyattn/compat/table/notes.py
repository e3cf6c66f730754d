"""What is not the same here as there, argument by argument, and why. An argument without a note is the same.

Notes are (calls, arguments, verdict, why), for all calls that a glob pattern names; the first that fits counts. The
verdicts are "same" (it may say more), "wider" (all that theirs takes, and more), "narrower" (some of what theirs takes
is refused, by name) and "own" (theirs does not have it). The argument RETURNS stands for what a call returns.
"""

from __future__ import annotations

RETURNS = "returns"
Notes = tuple[tuple[str, str, str, str], ...]

_ARRAYS = "of every library; float32 too, and any headdim up to 256; no gradients"
_ANY_BLOCKS = "blocks of any size, theirs of multiples of 256"
_TABLES = "float32 tables; any even rotary_dim, theirs multiples of 16"
_NO_EFFECT = "accepted, without effect"

FLASH_ATTN: Notes = (
    ("flash_attn_with_kvcache", "q", "wider", _ARRAYS),
    (
        "flash_attn_with_kvcache",
        "k_cache v_cache",
        "wider",
        f"{_ARRAYS}; FP8; blocks of any size, theirs of multiples of 256",
    ),
    ("flash_attn*", "q k v kv qkv", "wider", f"{_ARRAYS}; v's headdim may be its own"),
    ("flash_attn*", "dropout_p", "narrower", "0.0 alone: dropout belongs to training, and there is no backward pass"),
    ("flash_attn*", "deterministic", "same", f"{_NO_EFFECT}: there is no backward pass"),
    (
        "flash_attn*",
        "window_size",
        "wider",
        "any negative side is unbounded; with more queries than keys too, where FlashAttention-2 hides keys behind an "
        "unbounded right side beside a bounded left one",
    ),
    ("flash_attn*", "return_attn_probs", "wider", "S_dmask is computed, of the true lengths; theirs is empty"),
    ("flash_attn_varlen_func", "block_table", "wider", _ANY_BLOCKS),
    (
        "flash_attn_with_kvcache",
        "rotary_cos rotary_sin",
        "wider",
        "float32 tables; any even rotary_dim, theirs multiples of 16",
    ),
    ("flash_attn_with_kvcache", "k v", "wider", f"{_ARRAYS}; not of JAX, whose arrays nobody may write to"),
    ("flash_attn_with_kvcache", "cache_batch_idx", "narrower", "no entry twice where k and v are appended"),
    ("flash_attn_with_kvcache", "cache_leftpad", "wider", "with block_table too"),
    ("flash_attn_with_kvcache", "block_table", "wider", _ANY_BLOCKS),
    ("flash_attn_with_kvcache", "page_table seqused_k", "own", "FlashAttention-3's name for it"),
    ("flash_attn_with_kvcache", "cu_seqlens_q max_seqlen_q", "own", "FlashAttention-3's, without k and v"),
    ("flash_attn_with_kvcache", "learnable_sink", "own", "FlashAttention-4's"),
    ("flash_attn_with_kvcache", "k_descale v_descale", "own", "FlashAttention-3's, for an FP8 cache"),
    ("flash_attn_with_kvcache", "scheduler_metadata pack_gqa sm_margin", "own", f"FlashAttention-3's; {_NO_EFFECT}"),
    ("flash_attn_with_kvcache", "*", "own", "FlashAttention-3's, refused if it asks for anything"),
    (
        "flash_attn_with_kvcache",
        RETURNS,
        "same",
        "rows without keys give zeros and +inf; under causal and ALiBi softmax_lse is that of the scores, where theirs "
        "leaves out a term that every key of a row shares",
    ),
    (
        "flash_attn*",
        RETURNS,
        "same",
        "rows without keys give zeros and +inf; under causal and ALiBi softmax_lse is that of the scores, where theirs "
        "leaves out a term that every key of a row shares",
    ),
    ("bert_padding.*", "hidden_states input values", "wider", "of NumPy, CuPy, PyTorch (with gradients) and JAX"),
    ("utils.generation.allocate_inference_cache", "device dtype", "wider", "NumPy's and CuPy's too; names of dtypes"),
    ("layers.rotary.apply_rotary_emb", "x", "wider", "of every library; no gradients"),
    ("layers.rotary.apply_rotary_emb", "cos sin", "wider", "float32 tables"),
    ("layers.rotary.apply_rotary_emb", "seqlen_offsets", "narrower", "int32, theirs int64 too"),
    ("layers.rotary.apply_rotary_emb", "max_seqlen", "same", _NO_EFFECT),
)

_NOTHING_LIKE_IT = "None or 0 alone: there is nothing like it here"

FLASH_ATTN_3: Notes = (
    ("flash_attn_with_kvcache", "k_cache v_cache", "wider", f"{_ARRAYS}; FP8 beside queries that are not"),
    ("flash_attn_with_kvcache", "k_descale v_descale", "narrower", "() or (nheads_k,), theirs (batch, nheads_k)"),
    ("flash_attn_with_kvcache", "cu_seqlens_q", "narrower", "without k and v: append them before"),
    ("flash_attn_with_kvcache", "cu_seqlens_k_new", "narrower", "None where k is given: no packed new rows"),
    ("flash_attn_with_kvcache", "cache_batch_idx", "narrower", "no entry twice where k and v are appended"),
    (
        "flash_attn_with_kvcache",
        "rotary_cos rotary_sin",
        "wider",
        "float32 tables; any even rotary_dim, theirs multiples of 16",
    ),
    ("flash_attn_with_kvcache", "scheduler_metadata", "same", f"{_NO_EFFECT}: work is shared out on the device"),
    ("flash_attn_with_kvcache", "num_splits", "same", ""),
    ("flash_attn_with_kvcache", RETURNS, "narrower", "(out, softmax_lse), without theirs two partial results"),
    ("get_scheduler_metadata", RETURNS, "same", "None, which flash_attn_with_kvcache takes"),
    ("get_scheduler_metadata", "*", "same", _NO_EFFECT),
    ("flash_attn*", "q k v qkv", "narrower", f"no FP8 queries; else {_ARRAYS}"),
    ("flash_attn*", "qv q_descale k_descale v_descale attention_chunk", "narrower", _NOTHING_LIKE_IT),
    ("flash_attn*", "rotary_seqlens seqused_q", "narrower", _NOTHING_LIKE_IT),
    ("flash_attn*", "num_splits pack_gqa deterministic sm_margin", "same", _NO_EFFECT),
    ("flash_attn*", "return_attn_probs", "same", "later than 2.8.3"),
    ("flash_attn*", RETURNS, "same", "rows without keys give zeros and -inf"),
)

_NONE = "None alone"
_LIBRARIES = "of NumPy, CuPy and PyTorch; float32 too"
_THEIR_KERNELS = f"{_NO_EFFECT}: kernels are chosen here by themselves"
_LSE = "the lse to base 2, -inf for rows without keys, as there"

FLASHINFER: Notes = (
    # of wrappers as they are made
    ("*__init__", "float_workspace_buffer workspace_buffer", "same", "refused if smaller than a run on a GPU needs"),
    ("*__init__", "use_tensor_cores backend", "same", _THEIR_KERNELS),
    (
        "*__init__",
        "jit_args jit_kwargs variant_owns_mask",
        "narrower",
        f"{_NONE}: kernels of the caller's do not exist",
    ),
    ("*__init__", "custom_mask_buf mask_indptr_buf", "narrower", "accepted; no custom masks under CUDA graphs"),
    ("*__init__", "max_pages_per_request", "own", "under CUDA graphs, how wide the block table is"),
    ("*__init__", "*buf *buffer *buf_arr", "same", "only their sizes count"),
    ("*reset_workspace_buffer", "int_workspace*", "same", f"{_NO_EFFECT}: none is needed"),
    # of plans
    ("*plan", "head_dim head_dim_qk head_dim_vo", "narrower", "any from 1 to 256, theirs a few, but 512 among them"),
    ("*begin_forward", "head_dim", "narrower", "any from 1 to 256, theirs a few, but 512 among them"),
    ("*plan", "page_size", "narrower", "1 to 512"),
    ("*begin_forward", "page_size", "narrower", "1 to 512"),
    ("*plan", "indices paged_kv_indices", "same", "compared with the cache where they are on the host"),
    ("*plan", "q_data_type", "wider", "float32 too; NumPy's dtypes"),
    ("*begin_forward", "data_type", "wider", "float32 too; NumPy's dtypes"),
    ("*plan", "kv_data_type", "narrower", "q_data_type or FP8; no NVFP4"),
    ("*plan", "o_data_type", "narrower", "q_data_type alone"),
    ("*plan", "data_type", "wider", "stands in for q_data_type where that is left at its default"),
    ("BatchDecode*plan", "pos_encoding_mode", "narrower", "ALIBI not beside a soft cap, ROPE_LLAMA not beside FP8"),
    (
        "*plan",
        "pos_encoding_mode",
        "narrower",
        "ALIBI with causal or single queries, not beside a soft cap or a custom mask; ROPE_LLAMA not beside FP8",
    ),
    ("*plan", "custom_mask packed_custom_mask", "narrower", "read on the host, and slow for many queries; no ALIBI"),
    ("*plan", "use_fp16_qk_reduction", "same", f"{_NO_EFFECT}: sums are float32"),
    ("*plan", "non_blocking", "same", _NO_EFFECT),
    ("BatchPrefillWithRagged*plan", "disable_split_kv", "same", f"{_NO_EFFECT}: nothing is split here"),
    ("BatchPrefillWithRagged*plan", "seq_lens v_indptr o_indptr", "narrower", _NONE),
    ("*plan", "block_tables", "wider", "for all backends: read instead of the page ids"),
    ("*plan", "seq_lens_q max_token_per_sequence max_sequence_kv", "same", f"{_NO_EFFECT}: they follow from indptr"),
    ("*plan", "fixed_split_size", "narrower", f"{_NONE}: the same form is always split in the same way"),
    ("*plan", "prefix_len_ptr token_pos_in_items_ptr max_item_len_ptr", "narrower", f"{_NONE}: no multi-item scoring"),
    ("*plan", "token_pos_in_items_len", "narrower", "0 alone: no multi-item scoring"),
    ("*plan", "q_len_per_req", "wider", "without tensor cores too"),
    ("*plan", "window_right", "narrower", "0 alone"),
    # of runs
    ("*run", "*args", "narrower", "none: the caller has no kernels here"),
    ("*run", "q", "wider", f"{_LIBRARIES}; no FP8 queries"),
    ("*forward*", "q", "wider", f"{_LIBRARIES}; no FP8 queries"),
    ("*run", "paged_kv_cache", "wider", f"{_LIBRARIES}; uint8 arrays are read as FP8 here, as NVFP4 there"),
    ("*forward*", "paged_kv_cache unique_kv_cache", "wider", _LIBRARIES),
    ("BatchPrefillWithRagged*", "k v", "wider", f"{_LIBRARIES}; FP8"),
    ("BatchPrefillWithRagged*run", "q_scale k_scale v_scale", "wider", "for all dtypes"),
    ("*run", "k_scale v_scale", "wider", "of FP8 also one for each head"),
    ("*run", "sinks", "wider", "for all backends"),
    ("*run", "out", "wider", "any strides"),
    ("*run", "enable_pdl", "same", _NO_EFFECT),
    ("*run", "kv_cache_sf o_scale", "narrower", _NONE),
    ("*run", "skip_softmax_threshold_scale_factor use_fp16_softmax uses_spcompress", "narrower", _NONE),
    (
        "*Batch*run",
        "return_lse",
        "narrower",
        "under ALIBI, where the bias counts from the first query as there, not in wrappers for CUDA graphs",
    ),
    ("*run", RETURNS, "same", _LSE),
    ("*forward_return_lse", RETURNS, "same", _LSE),
    ("*SharedPrefix*forward", "k_shared v_shared", "wider", _LIBRARIES),
    ("*forward*", "use_fp16_qk_reduction", "same", f"{_NO_EFFECT}: sums are float32"),
    ("*SharedPrefix*forward", "rope_scale rope_theta", "same", f"{_NO_EFFECT}, as there"),
    # of functions
    ("single_*", "q k v", "wider", f"{_LIBRARIES}; k and v in FP8"),
    ("single_*", "scale_q kv_cache_sf", "narrower", _NONE),
    ("single_*", "scale_k scale_v", "narrower", "for k and v in FP8"),
    ("single_*", "o_dtype", "narrower", "q's alone"),
    ("single_*", "custom_mask packed_custom_mask", "narrower", "read on the host, and slow for many queries; no ALIBI"),
    ("single_prefill*", "pos_encoding_mode", "narrower", "ALIBI with causal or a single query; ROPE_LLAMA without FP8"),
    ("single_*", "use_tensor_cores backend use_fp16_qk_reduction", "same", _THEIR_KERNELS),
    ("single_*", RETURNS, "same", _LSE),
    ("merge_state*", "v_a v_b v v_other", "wider", _LIBRARIES),
    ("append_paged_kv_cache", "append_key append_value", "wider", f"{_LIBRARIES}; rounded to an FP8 cache"),
    ("append_paged_kv_cache", "batch_indices", "wider", "-1 passes a row over"),
    ("append_paged_kv_cache", "paged_kv_cache", "wider", _LIBRARIES),
    ("get_seq_lens", RETURNS, "same", "int32 always"),
    ("apply_*", "q k query key", "wider", _LIBRARIES),
    ("*packbits", "x", "wider", "of NumPy, CuPy and PyTorch; of numbers those that are not 0"),
)

NOT_HERE = {
    "flash_attn": "flash_blocksparse_attention, losses, models, modules, ops, other layers; flash_attn.cute; "
    "bert_padding.index_first_axis_residual; of utils.generation all but the two above; all backward passes.",
    "flash_attn_interface": "flash_attn_combine (cupyattn.merge_states does it).",
    "flashinfer": "multi-head latent attention, sparse, POD and BatchAttention wrappers, fast_decode_plan, jit "
    "modules, FP4, and what is not attention: sampling, norms, gemm, mixtures of experts, communication. Of wrappers "
    "workspace_size, resolved_backend and prewarm_paged_kv_stride_variant.",
}
