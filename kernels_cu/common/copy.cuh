// Moving rows between global and shared memory: swizzled tiles, asynchronous copies, ldmatrix.
//
// Compile-time values: HEAD_DIM; LOAD_BYTES (16, 8, 4, 2 or 1), which divides every global row address; KV_DTYPE.
//
// A tile is rows of PADDED_DIM elements of a cache, in chunks of 16 bytes. Chunk c of row r is stored at chunk
// c ^ swizzle(r): then the eight rows that one ldmatrix phase reads at one chunk lie in eight different groups
// of four banks. Elements from HEAD_DIM to PADDED_DIM are zero. PADDED_DIM makes an even number of chunks.
#pragma once

#include "common/types.cuh"

constexpr int ITEM_BYTES = sizeof(KvElement);
constexpr int CHUNK = 16 / ITEM_BYTES;
constexpr int PADDED_DIM = round_up(HEAD_DIM, 2 * CHUNK);
constexpr int ROW_CHUNKS = PADDED_DIM / CHUNK;
constexpr int ROW_BYTES = PADDED_DIM * ITEM_BYTES;

// The largest power of two, at most 8, that divides the chunks of a row: chunks move within groups of as many.
constexpr int SWIZZLE_GROUP = ROW_CHUNKS % 8 == 0 ? 8 : ROW_CHUNKS % 4 == 0 ? 4 : 2;

__device__ __forceinline__ int swizzle(int row) { return row / (8 / SWIZZLE_GROUP) % SWIZZLE_GROUP; }

// Byte offset of a chunk within a tile.
__device__ __forceinline__ u32 chunk_offset(int row, int chunk) { return row * ROW_BYTES + (chunk ^ swizzle(row)) * 16; }

// The address of the chunk 2 * step after the one at `address`, an even-odd pair later in the same row. Where rows
// are powers of two this is one exclusive or, which keeps the address of every step out of the registers.
__device__ __forceinline__ u32 step_address(u32 tile, int row, int chunk, int step) {
    if constexpr ((ROW_BYTES & (ROW_BYTES - 1)) == 0) return (tile + chunk_offset(row, chunk)) ^ (step * 32);
    return tile + chunk_offset(row, chunk + 2 * step);
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared(u32 address, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
}

__device__ __forceinline__ void store_shared_half(u32 address, u16 value) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory"); }
__device__ __forceinline__ void store_shared_byte(u32 address, u16 value) { asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "h"(value) : "memory"); }

__device__ __forceinline__ u16 load_shared_half(u32 address) {
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
    return value;
}

__device__ __forceinline__ u32 load_shared_word(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

constexpr bool ASYNC_COPIES =
#if __CUDA_ARCH__ >= 800
    LOAD_BYTES >= 4;
#else
    false;
#endif

// SIZE bytes, of which the first `bytes` are read and the rest is zero. Through L2 only where the size allows it.
template <int SIZE>
__device__ __forceinline__ void copy_async(u32 to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
    if constexpr (SIZE == 16) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(SIZE), "r"(bytes) : "memory");
    }
#endif
}

__device__ __forceinline__ void copy_async_16(u32 to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}

// Brings the line of this address into L2.
__device__ __forceinline__ void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most PENDING of this thread's latest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Whether every chunk of a row that exists is a whole one, so that nothing need be counted.
constexpr bool WHOLE_CHUNKS = HEAD_DIM == PADDED_DIM && LOAD_BYTES == 16;

// One chunk of a global row into shared memory: elements past HEAD_DIM, and all of a row that is not there,
// become zero and are not read. EXISTS: the caller knows that the row is there.
template <bool EXISTS = false>
__device__ __forceinline__ void copy_chunk(u32 to, const KvElement* row, int chunk, bool exists = true) {
    const KvElement* from = row + chunk * CHUNK;
    if constexpr (EXISTS && WHOLE_CHUNKS && ASYNC_COPIES) {
        copy_async_16(to, from);
        return;
    }
    const int bytes = exists ? clamp((HEAD_DIM - chunk * CHUNK) * ITEM_BYTES, 0, 16) : 0;
    if constexpr (ASYNC_COPIES) {
#pragma unroll
        for (int piece = 0; piece < 16; piece += LOAD_BYTES) {
            copy_async<LOAD_BYTES>(to + piece, from + piece / ITEM_BYTES, clamp(bytes - piece, 0, LOAD_BYTES));
        }
    } else {
        uint4 value = make_uint4(0, 0, 0, 0);
        if (LOAD_BYTES == 16 && bytes == 16) {
            value = *reinterpret_cast<const uint4*>(from);
        } else {
            u32 words[4] = {};
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) {
                const int at = i * ITEM_BYTES;
                if (at < bytes) words[at / 4] |= static_cast<u32>(from[i]) << at % 4 * 8;
            }
            value = make_uint4(words[0], words[1], words[2], words[3]);
        }
        store_shared(to, value);
    }
}

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&fragment)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address) : "memory");
}

// Two of them; lanes 0 to 15 give the addresses.
__device__ __forceinline__ void load_matrix_pair(u32 (&fragment)[2], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(fragment[0]), "=r"(fragment[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&fragment)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address) : "memory");
}
