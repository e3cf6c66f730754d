// The one argument of append_kv. cupyattn/kernels/params.py packs the same fields in the same order.
#pragma once

#include "common/params.cuh"
#include "common/rotary.cuh"

struct AppendParams {
    const Element* k;
    const Element* v;
    KvElement* k_cache;
    KvElement* v_cache;
    const int* cu_seqlens_new;         // PACKED_NEW
    const int* cache_seqlens;          // null: uniform_length for all
    const int* block_table;            // CACHE_PAGED
    const int* cache_batch_idx;        // null: sequence b lies in entry b
    const RotaryElement* rotary_cos;   // ROTARY
    const RotaryElement* rotary_sin;
    const float* k_scales;             // null: k_scale
    const float* v_scales;
    i64 uniform_length;
    Strides k_strides, v_strides, k_cache_strides, v_cache_strides;
    int batch, total_new, seqlen_new, num_kv_heads;
    int cache_entries, cache_rows, table_stride;
    int positions;                     // rows of the rotary tables
    int k_scale_stride, v_scale_stride; // from one head's scale to the next
    float k_scale, v_scale;
};
