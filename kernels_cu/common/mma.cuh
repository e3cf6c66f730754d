// Warp-level matrix products on 16-bit inputs with float32 accumulators.
//
// Operands are of DTYPE, or float16 beside 8-bit keys and values, which it holds exactly.
#pragma once

#include "common/types.cuh"

#define BFLOAT16_OPERANDS (DTYPE == DTYPE_BFLOAT16 && !KV_FLOAT8)

// c (16x8) += a (16x16, row) * b (16x8, column): in one instruction from sm_80 on, in two halves of k on Turing.
// Lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next: c[0], c[1] of the first row, c[2], c[3]
// of the second.
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BFLOAT16_OPERANDS
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// Two floats to two packed operands, `low` in the lower half.
__device__ __forceinline__ u32 pack_operands(float low, float high) {
#if KV_FLOAT8
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return pack(low, high);
#endif
}

// An 8x8 matrix of 16-bit elements transposed: lane l holds elements 2 (l % 4) and the next of row l / 4, before and after.
__device__ __forceinline__ u32 transpose_matrix(u32 elements) {
    u32 transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(elements));
    return transposed;
}
