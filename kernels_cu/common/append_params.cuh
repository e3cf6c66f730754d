// The one argument of append_kv. cupyattn/kernels/params.py packs the same fields in the same order.
#pragma once

#include "common/params.cuh"

struct AppendParams {
    const Element* k;
    const Element* v;
    Element* k_cache;
    Element* v_cache;
    const int* cu_seqlens_new;   // PACKED_NEW
    const int* cache_seqlens;    // null: the caches are empty
    const int* block_table;      // CACHE_PAGED
    const int* cache_batch_idx;  // null: sequence b lies in entry b
    Strides k_strides, v_strides, k_cache_strides, v_cache_strides;
    int batch, total_new, seqlen_new, num_kv_heads;
    int cache_entries, cache_rows, table_stride;
};
