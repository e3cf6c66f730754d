// The copy engine of sm_90: boxes of an array in global memory, to and from tiles in shared memory.
//
// A tile is in blocks of 64 columns (128 bytes): all rows of the first block, then all of the second. Chunk c of 16
// bytes of row r of a block lies at chunk c ^ (r % 8), which is the engine's own swizzle of 128 bytes and wgmma's.
// What lies outside the array is read as zero and not written.
#pragma once

#include "common/types.cuh"

constexpr int BLOCK_COLUMNS = 64;
constexpr u32 BLOCK_ROW_BYTES = 128;
constexpr u32 SWIZZLE_BYTES = 1024; // the pattern repeats, so every block begins at a multiple of this

__device__ __forceinline__ u32 swizzled(int row, int chunk) { return row * BLOCK_ROW_BYTES + (chunk ^ row % 8) * 16; }

struct alignas(64) TensorMap {
    u8 opaque[128];
};

// What L2 is to keep: keys and values are read again by other blocks, queries and results are not. As CUTLASS has them.
#define EVICT_FIRST 0x12F0000000000000ull
#define EVICT_LAST 0x14F0000000000000ull

// A box of rows of keys or values: (column, row, head, entry), innermost first.
__device__ __forceinline__ void load_box(u32 to, const TensorMap& map, u32 barrier, int column, int row, int head, int entry) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(entry), "l"(EVICT_LAST) : "memory");
}

// A box of query rows: (column, head of the group, token, kv head, sequence).
__device__ __forceinline__ void load_query_box(u32 to, const TensorMap& map, u32 barrier, int column, int token, int head, int sequence) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;"
                 ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(0), "r"(token), "r"(head), "r"(sequence), "l"(EVICT_FIRST) : "memory");
}
__device__ __forceinline__ void store_query_box(const TensorMap& map, u32 from, int column, int token, int head, int sequence) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5, %6}], [%1], %7;"
                 ::"l"(&map), "r"(from), "r"(column), "r"(0), "r"(token), "r"(head), "r"(sequence), "l"(EVICT_FIRST) : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read their tiles.
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
