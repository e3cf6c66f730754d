// The one argument of every forward kernel. cupyattn/kernels/params.py packs the same fields in the same order.
#pragma once

#include "common/types.cuh"
#include "common/lse.cuh"

// Values of CACHE_KIND.
#define CACHE_DENSE 0
#define CACHE_PACKED 1
#define CACHE_PAGED 2

// Steps in elements. `outer` is the sequence (dense) or the block (paged), 0 for a packed array.
struct Strides {
    i64 outer, row, head;
};

struct ForwardParams {
    const Element* q;
    const KvElement* k;
    const KvElement* v;
    Element* out;
    float* lse;                    // null: not asked for
    const int* cu_seqlens_q;       // PACKED_Q
    const int* cu_seqlens_k;       // null: lengths come from elsewhere
    const int* seqused_k;          // null: uniform_length holds, if any does
    const int* block_table;        // CACHE_PAGED
    const int* cache_batch_idx;    // null: sequence b lies in entry b
    const int* cache_leftpad;      // null: no padding
    const float* alibi_slopes;     // ALIBI
    const float* sinks;            // null: none
    i64 uniform_length;            // keys in use of every sequence; -1: every row is used, or seqused_k tells
    Strides q_strides, k_strides, v_strides, o_strides;
    i64 alibi_batch_stride;        // 0 when all sequences share the slopes
    int batch;
    int num_heads, num_kv_heads;
    int total_q;                   // rows of a packed q
    int seqlen_q;                  // rows of one sequence when q is dense
    int seqlen_new;                // keys appended by this call, added to the used length
    int cache_entries, cache_rows; // sequences or blocks held; rows one sequence can hold
    int table_stride;
    int window_left, window_right; // -1: unbounded
    int tiles_per_sequence;        // dense q
    int pairs_per_section;         // dense q: (sequence, head) pairs that are worked on together
    float softmax_scale;
    float softcap;
    LseForm lse_form;              // KV_SPLITS: the natural one, which the merge goes by
    int kv_splits;                 // KV_SPLITS: blocks that share the keys of a tile
    int total_tiles;               // forward_sm90: that its blocks take in turn
};
