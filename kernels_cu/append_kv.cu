// New keys and values written into a cache, in place: one thread a piece of COPY_BYTES of k and the same of v.
//
// New row i of sequence b goes to row cache_seqlens[b] + i. A row whose place the cache does not have (past its
// capacity, a block id or entry outside it) is not written; attention over it gives NaN.
//
// Compile-time values: DTYPE HEAD_DIM PACKED_NEW CACHE_KIND BLOCK_SIZE COPY_BYTES THREADS.

#include "common/types.cuh"
#include "common/append_params.cuh"

#if COPY_BYTES == 16
typedef uint4 Piece;
#elif COPY_BYTES == 8
typedef uint2 Piece;
#elif COPY_BYTES == 4
typedef u32 Piece;
#else
typedef u16 Piece;
#endif

constexpr int PIECES = HEAD_DIM * static_cast<int>(sizeof(Element)) / COPY_BYTES;

// Which sequence a new row belongs to, and which of its rows it is; sequence -1 for a row of none.
struct NewRow {
    int sequence, index;
};

__device__ __forceinline__ NewRow find_new_row(const AppendParams& p, int row) {
#if PACKED_NEW
    int low = 0, high = p.batch; // the first sequence that ends behind `row`
    while (low < high) {
        const int middle = (low + high) / 2;
        if (p.cu_seqlens_new[middle + 1] > row) high = middle;
        else low = middle + 1;
    }
    if (low == p.batch) return {-1, 0};
    return {low, row - p.cu_seqlens_new[low]};
#else
    return {row / p.seqlen_new, row % p.seqlen_new};
#endif
}

// The outer index (entry or block) and the row in it where a sequence's row lies; outer -1 where there is none.
struct Place {
    int outer, row;
};

__device__ __forceinline__ Place find_place(const AppendParams& p, const NewRow& at) {
    const int used = p.cache_seqlens != nullptr ? p.cache_seqlens[at.sequence] : 0;
    if (used < 0 || used > p.cache_rows || at.index < 0 || at.index >= p.cache_rows - used) return {-1, 0};
    const int row = used + at.index;
#if CACHE_KIND == CACHE_PAGED
    const int outer = p.block_table[static_cast<i64>(at.sequence) * p.table_stride + row / BLOCK_SIZE];
    const int inner = row % BLOCK_SIZE;
#else
    const int outer = p.cache_batch_idx != nullptr ? p.cache_batch_idx[at.sequence] : at.sequence;
    const int inner = row;
#endif
    if (outer < 0 || outer >= p.cache_entries) return {-1, 0};
    return {outer, inner};
}

__device__ __forceinline__ void copy_piece(Element* to, const Element* from, int piece) {
    reinterpret_cast<Piece*>(to)[piece] = reinterpret_cast<const Piece*>(from)[piece];
}

extern "C" __global__ void __launch_bounds__(THREADS) append_kv(const __grid_constant__ AppendParams p) {
    const i64 index = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= static_cast<i64>(p.total_new) * p.num_kv_heads * PIECES) return;
    const int piece = index % PIECES;
    const int head = index / PIECES % p.num_kv_heads;
    const NewRow at = find_new_row(p, index / PIECES / p.num_kv_heads);
    if (at.sequence < 0) return;
    const Place place = find_place(p, at);
    if (place.outer < 0) return;
    const i64 row = PACKED_NEW ? index / PIECES / p.num_kv_heads : at.index;
    const i64 outer = PACKED_NEW ? 0 : at.sequence;
    const auto offset = [&](const Strides& s, i64 o, i64 r) { return o * s.outer + r * s.row + head * s.head; };
    copy_piece(p.k_cache + offset(p.k_cache_strides, place.outer, place.row), p.k + offset(p.k_strides, outer, row), piece);
    copy_piece(p.v_cache + offset(p.v_cache_strides, place.outer, place.row), p.v + offset(p.v_strides, outer, row), piece);
}
