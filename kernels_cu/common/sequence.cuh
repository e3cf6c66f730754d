// Which rows a thread block works on: from blockIdx to sequence, head and query tile, all on the device.
//
// Compile-time values: TILE_M rows of a tile; GROUP query heads packed into its rows (1: none); PACKED_Q
// whether q is packed by cu_seqlens_q; CACHE_KIND where keys lie.
//
// Row r of a sequence's tiles is query token r / GROUP under head kv_head * GROUP + r % GROUP, so that with
// packing one tile serves a whole group of query heads from one read of its keys.
#pragma once

#include "common/params.cuh"

struct Tile {
    int sequence;  // -1: nothing to do; `batch`: the rows of a packed q behind its last sequence
    int head;      // query head, or kv head when GROUP > 1
    int first_row; // of the tile, within its sequence
    int q_begin;   // first row of the sequence in a packed q
    int seqlen_q;
    bool bad;      // cu_seqlens_q does not fit q: the result is NaN
};

struct Keys {
    int length;        // keys that the sequence's queries can see
    int needed;        // the first of them that this tile's queries can see
    int padding;       // rows of a paged sequence in front of them
    const KvElement* k; // row 0 of the head; of the whole cache when it is paged
    const KvElement* v;
    const int* table;
    bool bad;          // lengths or indices that do not fit the arrays: the result is NaN
};

// Whether cu_seqlens_q starts at 0, never decreases and stays within q. Every warp looks at all of it.
__device__ __forceinline__ bool offsets_fit(const ForwardParams& p) {
    bool fit = true;
    for (int b = threadIdx.x % WARP_SIZE; b <= p.batch; b += WARP_SIZE) {
        const int begin = p.cu_seqlens_q[b];
        const int end = b < p.batch ? p.cu_seqlens_q[b + 1] : p.total_q;
        fit &= begin <= end && (b > 0 || begin == 0);
    }
    return __all_sync(~0u, fit);
}

// Packed q: every warp scans cu_seqlens_q, 32 sequences at a time, for the sequence that holds tile `tile`. Offsets
// that do not fit would lead outside q or leave rows out: then all rows are one sequence that is bad.
__device__ __forceinline__ Tile find_packed_tile(const ForwardParams& p, int tile) {
    Tile found;
    found.bad = !offsets_fit(p);
    if (found.bad) {
        found.sequence = static_cast<i64>(tile) * TILE_M < static_cast<i64>(p.total_q) * GROUP ? p.batch : -1;
        found.q_begin = 0;
        found.seqlen_q = p.total_q;
        found.first_row = tile * TILE_M;
        return found;
    }
    const int lane = threadIdx.x % WARP_SIZE;
    int tiles_before = 0;
    for (int base = 0; base <= p.batch; base += WARP_SIZE) {
        const int b = base + lane;
        const int begin = b <= p.batch ? p.cu_seqlens_q[b] : p.total_q;
        const int end = b < p.batch ? p.cu_seqlens_q[b + 1] : p.total_q;
        const int length = end - begin;
        const int tiles = ceil_div(length * GROUP, TILE_M);
        int through = tiles;
#pragma unroll
        for (int step = 1; step < WARP_SIZE; step *= 2) {
            const int below = __shfl_up_sync(~0u, through, step);
            if (lane >= step) through += below;
        }
        const u32 holds = __ballot_sync(~0u, tiles_before + through > tile);
        if (holds != 0) {
            const int source = __ffs(holds) - 1;
            const int first = tiles_before + __shfl_sync(~0u, through - tiles, source);
            const int count = __shfl_sync(~0u, tiles, source);
            found.sequence = base + source;
            found.q_begin = __shfl_sync(~0u, begin, source);
            found.seqlen_q = __shfl_sync(~0u, length, source);
            found.first_row = (count - 1 - (tile - first)) * TILE_M;
            return found;
        }
        tiles_before += __shfl_sync(~0u, through, WARP_SIZE - 1);
    }
    found.sequence = -1;
    return found;
}

// The tile of thread block `index`. Tiles with the most keys under a causal mask (the last ones) come first, so
// that short ones fill the tail. Dense q walks one section of (sequence, head) pairs after the other.
__device__ __forceinline__ Tile find_tile(const ForwardParams& p, u32 index) {
    const int heads = GROUP > 1 ? p.num_kv_heads : p.num_heads;
#if PACKED_Q
    Tile tile = find_packed_tile(p, index / heads);
    tile.head = index % heads;
#else
    const u32 pairs = p.batch * heads;
    const u32 full_section = static_cast<u32>(p.pairs_per_section) * p.tiles_per_sequence;
    const u32 section = index / full_section;
    const u32 first_pair = section * p.pairs_per_section;
    const u32 width = min(static_cast<u32>(p.pairs_per_section), pairs - first_pair);
    const u32 within = index - section * full_section;
    const u32 pair = first_pair + within % width;
    Tile tile;
    tile.sequence = pair / heads;
    tile.head = pair % heads;
    tile.first_row = (p.tiles_per_sequence - 1 - within / width) * TILE_M;
    tile.q_begin = 0;
    tile.seqlen_q = p.seqlen_q;
    tile.bad = false;
#endif
    return tile;
}

// Which rows of the cache hold a sequence's keys. Contents that do not fit set `bad` and are clamped.
struct Rows {
    int length; // keys that the sequence's queries can see
    int first;  // row of the first of them: within the sequence when it is paged, else within the entry
    int entry;  // of a dense cache
    bool bad;
};

__device__ __forceinline__ Rows find_rows(const ForwardParams& p, int sequence) {
    Rows rows = {0, 0, 0, false};
    int capacity = p.cache_rows;
    int length = p.cache_rows;
    if (PACKED_Q && p.cu_seqlens_k != nullptr) {
        const int begin = p.cu_seqlens_k[sequence], end = p.cu_seqlens_k[sequence + 1];
        length = end - begin;
        if (CACHE_KIND == CACHE_PACKED) {
            rows.first = clamp(begin, 0, p.cache_rows);
            capacity = clamp(end, rows.first, p.cache_rows) - rows.first;
            rows.bad = rows.first != begin || length != capacity;
        }
    }
    if (p.seqused_k != nullptr || p.uniform_length >= 0) {
        const int used = p.seqused_k != nullptr ? p.seqused_k[sequence] : static_cast<int>(p.uniform_length);
        rows.bad |= used < 0 || used > capacity - p.seqlen_new;
        length = clamp(used, 0, max(capacity - p.seqlen_new, 0)) + p.seqlen_new;
    }
    if (CACHE_KIND == CACHE_DENSE) {
        rows.entry = p.cache_batch_idx != nullptr ? p.cache_batch_idx[sequence] : sequence;
        if (rows.entry < 0 || rows.entry >= p.cache_entries) {
            rows.bad = true;
            rows.entry = capacity = 0;
        }
    }
    rows.length = clamp(length, 0, capacity);
    rows.bad |= rows.length != length;
    if (p.cache_leftpad != nullptr) {
        const int given = p.cache_leftpad[sequence];
        const int padding = clamp(given, 0, rows.length);
        rows.bad |= padding != given;
        rows.length -= padding;
        rows.first += padding;
    }
    return rows;
}

// The keys of one kv head in these rows.
__device__ __forceinline__ Keys place_keys(const ForwardParams& p, int sequence, const Rows& rows, int kv_head) {
    Keys keys = {rows.length, 0, 0, p.k + kv_head * p.k_strides.head, p.v + kv_head * p.v_strides.head, nullptr, rows.bad};
    if (CACHE_KIND == CACHE_PAGED) {
        keys.table = p.block_table + static_cast<i64>(sequence) * p.table_stride;
        keys.padding = rows.first;
    } else {
        keys.k += rows.entry * p.k_strides.outer + rows.first * p.k_strides.row;
        keys.v += rows.entry * p.v_strides.outer + rows.first * p.v_strides.row;
    }
    return keys;
}

__device__ __forceinline__ Keys find_keys(const ForwardParams& p, const Tile& tile, int kv_head) {
    const bool none = tile.sequence >= p.batch; // rows of a packed q behind the last sequence
    Rows rows = {0, 0, 0, false};
    if (!none) rows = find_rows(p, tile.sequence);
    rows.bad |= tile.bad;
    return place_keys(p, none ? 0 : tile.sequence, rows, kv_head);
}

// The element offset of visible key `row` from Keys::k or Keys::v, whose strides these are. `valid` becomes false,
// and the offset 0, for a block id outside the cache: an error, unless no query of the tile needs the row, as of
// blocks that a sliding window has left behind.
__device__ __forceinline__ i64 key_offset(const ForwardParams& p, const Keys& keys, const Strides& strides, int row, bool& valid) {
#if CACHE_KIND == CACHE_PAGED
    row += keys.padding;
    const int block = __ldg(keys.table + row / BLOCK_SIZE);
    valid = static_cast<u32>(block) < static_cast<u32>(p.cache_entries);
    return valid ? block * strides.outer + row % BLOCK_SIZE * strides.row : 0;
#else
    valid = true;
    return row * strides.row;
#endif
}

// The query row that tile row `row` stands for.
struct QueryRow {
    int token; // within its sequence
    int head;
    bool exists;
};

__device__ __forceinline__ QueryRow find_query_row(const Tile& tile, int row) {
    const int index = tile.first_row + row;
    QueryRow at;
    at.token = index / GROUP;
    at.head = GROUP > 1 ? tile.head * GROUP + index % GROUP : tile.head;
    at.exists = at.token < tile.seqlen_q;
    return at;
}

__device__ __forceinline__ i64 query_offset(const Strides& strides, const Tile& tile, const QueryRow& at) {
    const i64 row = PACKED_Q ? tile.q_begin + at.token : at.token;
    return (PACKED_Q ? 0 : tile.sequence * strides.outer) + row * strides.row + at.head * strides.head;
}

// lse is (batch, heads, seqlen_q) dense and (heads, total_q) packed, contiguous.
__device__ __forceinline__ i64 lse_offset(const ForwardParams& p, const Tile& tile, const QueryRow& at) {
    if (PACKED_Q) return static_cast<i64>(at.head) * p.total_q + tile.q_begin + at.token;
    return (static_cast<i64>(tile.sequence) * p.num_heads + at.head) * p.seqlen_q + at.token;
}
