// New keys and values written into a cache, in place: one thread a part of a row of k and the same of v.
//
// New row i of sequence b goes to row cache_seqlens[b] + i, which is also the position that its key is rotated for. A
// row whose place the cache does not have (past its capacity, a block id or entry outside it) is not written;
// attention over it gives NaN. An 8-bit cache holds value / scale, rounded to nearest even and saturated; keys are
// rounded to their own dtype after the rotation first.
//
// Compile-time values: DTYPE KV_DTYPE HEAD_DIM HEAD_DIM_V VECTOR PACKED_NEW CACHE_KIND BLOCK_SIZE ROTARY ROTARY_DIM
// ROTARY_FLOAT32 THREADS. INLINE_INDICES: room for the index arrays of a paged append in the kernel's own argument, so that
// a host that has them need not copy them to the device first; 0 unless given.

#include "common/types.cuh"
#include "common/fp8.cuh"
#include "common/append_params.cuh"
#include "common/rows.cuh"

#ifndef INLINE_INDICES
#define INLINE_INDICES 0
#endif

#if INLINE_INDICES
// cache_seqlens, then the rows of block_table, then cu_seqlens_new: PreparedAppend.inline puts them there.
struct Indices {
    int at[INLINE_INDICES];
};
#endif

struct IndexArrays {
    const int* cache_seqlens; // null: uniform_length holds
    const int* block_table;
    const int* cu_seqlens_new;
};

__device__ __forceinline__ Row find_new_row(const AppendParams& p, const IndexArrays& arrays, int row) {
#if PACKED_NEW
    return find_packed_row(arrays.cu_seqlens_new, p.batch, row);
#else
    return {row / p.seqlen_new, row % p.seqlen_new};
#endif
}

// Where a row of a sequence lies: the outer index (entry or block) and the row in it; outer -1 where there is none.
struct Place {
    int outer, row;
    int position; // the row's number within its sequence
};

__device__ __forceinline__ Place find_place(const AppendParams& p, const IndexArrays& arrays, const Row& at) {
    const i64 used = arrays.cache_seqlens != nullptr ? arrays.cache_seqlens[at.sequence] : p.uniform_length;
    if (used < 0 || at.index < 0 || used + at.index >= p.cache_rows) return {-1, 0, 0};
    const int row = used + at.index;
#if CACHE_KIND == CACHE_PAGED
    const int outer = arrays.block_table[static_cast<i64>(at.sequence) * p.table_stride + row / BLOCK_SIZE];
    const int inner = row % BLOCK_SIZE;
#else
    const int outer = p.cache_batch_idx != nullptr ? p.cache_batch_idx[at.sequence] : at.sequence;
    const int inner = row;
#endif
    if (outer < 0 || outer >= p.cache_entries) return {-1, 0, 0};
    return {outer, inner, row};
}

// What the cache holds of a part.
__device__ __forceinline__ Part<KvElement> to_cache(Part<Element>& row, float scale) {
#if KV_FLOAT8
    Part<KvElement> stored;
#pragma unroll
    for (int i = 0; i < PIECES * VECTOR; ++i) stored[i] = to_fp8(__fdiv_rn(to_float(row[i]), scale));
    return stored;
#else
    return row;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) append_kv(
    const __grid_constant__ AppendParams p
#if INLINE_INDICES
    , const __grid_constant__ Indices indices
#endif
) {
#if INLINE_INDICES
    const int* table = indices.at + p.batch;
    const IndexArrays arrays = {indices.at, table, table + p.batch * p.table_stride};
#else
    const IndexArrays arrays = {p.cache_seqlens, p.block_table, p.cu_seqlens_new};
#endif
    const i64 index = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= static_cast<i64>(p.total_new) * p.num_kv_heads * PARTS) return;
    const int part = index % PARTS;
    const int head = index / PARTS % p.num_kv_heads;
    const int new_row = index / PARTS / p.num_kv_heads;
    const Row at = find_new_row(p, arrays, new_row);
    if (at.sequence < 0) return;
    const Place place = find_place(p, arrays, at);
    if (place.outer < 0) return;
    const i64 row = PACKED_NEW ? new_row : at.index;
    const i64 outer = PACKED_NEW ? 0 : at.sequence;
    const auto offset = [&](const Strides& s, i64 o, i64 r) { return o * s.outer + r * s.row + head * s.head; };
    Part<Element> k = load_part(p.k + offset(p.k_strides, outer, row), part);
    Part<Element> v = load_part<HEAD_DIM_V>(p.v + offset(p.v_strides, outer, row), part);
#if ROTARY != ROTARY_NONE
    rotate_part(k, part, p.rotary_cos, p.rotary_sin, place.position, p.positions);
#endif
    const float k_scale = p.k_scales != nullptr ? p.k_scales[head * p.k_scale_stride] : p.k_scale;
    const float v_scale = p.v_scales != nullptr ? p.v_scales[head * p.v_scale_stride] : p.v_scale;
    store_part(p.k_cache + offset(p.k_cache_strides, place.outer, place.row), part, to_cache(k, k_scale));
    store_part<HEAD_DIM_V>(p.v_cache + offset(p.v_cache_strides, place.outer, place.row), part, to_cache(v, v_scale));
}
