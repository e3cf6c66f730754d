// Pairs of 8-bit elements to packed float16, exactly, as operands of a product: four bytes make two words.
//
// Compile-time values: KV_DTYPE, of 8 bits.
#pragma once

#include "common/types.cuh"

#if KV_FLOAT8

// Bytes 0 and 1 of `bytes`, to float16 in the lower and the upper half.
__device__ __forceinline__ u32 widen_pair(u32 bytes) {
    u32 halves;
#if KV_DTYPE == DTYPE_FLOAT8_E5M2
    halves = __byte_perm(bytes, 0, 0x1404); // e5m2 is the upper byte of a float16
#elif __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<u16>(bytes)));
#else
    // Exponent and mantissa in a float16's places; the bias is put right by a factor of 2^8, which subnormals need too.
    const u32 spread = __byte_perm(bytes, 0, 0x4140);
    const u32 magnitude = spread & 0x007f007f;
    u32 scaled;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(scaled) : "r"(magnitude << 7), "r"(0x5c005c00));
    if ((magnitude & 0xffff) == 0x7f) scaled |= 0x7fff;
    if (magnitude >> 16 == 0x7f) scaled |= 0x7fff0000;
    halves = scaled | (spread & 0x00800080) << 8;
#endif
    return halves;
}

// Bytes 0, 1 to `low` and 2, 3 to `high`.
__device__ __forceinline__ void widen_adjacent(u32 bytes, u32& low, u32& high) {
    low = widen_pair(bytes);
    high = widen_pair(bytes >> 16);
}

// Bytes 0, 2 to `even` and 1, 3 to `odd`.
__device__ __forceinline__ void widen_alternate(u32 bytes, u32& even, u32& odd) {
    const u32 sorted = __byte_perm(bytes, 0, 0x3120);
    widen_adjacent(sorted, even, odd);
}

#endif
