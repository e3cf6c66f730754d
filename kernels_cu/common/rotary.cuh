// Rotary embeddings (Su et al. 2021, arXiv:2104.09864): pairs of elements turned by an angle that grows with the
// token's position. The first ROTARY_DIM elements of a head are turned, the others are left as they are.
//
// Compile-time values: ROTARY (one of the three below); ROTARY_DIM, even; ROTARY_FLOAT32 whether cos and sin are
// float32 tables, else of DTYPE. All 0 unless given. The tables are (positions, ROTARY_DIM / 2), contiguous.
#pragma once

#include "common/types.cuh"

#define ROTARY_NONE 0
#define ROTARY_HALVES 1      // pair i is elements i and i + ROTARY_DIM / 2
#define ROTARY_INTERLEAVED 2 // pair i is elements 2 i and 2 i + 1

#ifndef ROTARY
#define ROTARY ROTARY_NONE
#define ROTARY_DIM 0
#define ROTARY_FLOAT32 0
#endif

#if ROTARY_FLOAT32
typedef float RotaryElement;
__device__ __forceinline__ float rotary_float(RotaryElement value) { return value; }
#else
typedef Element RotaryElement;
__device__ __forceinline__ float rotary_float(RotaryElement value) { return to_float(value); }
#endif

// Each operation is rounded by itself, so that every kernel, and NumPy in float32, finds the same bits.
__device__ __forceinline__ float2 rotate_pair(float a, float b, float cos, float sin) {
    return {__fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin)), __fadd_rn(__fmul_rn(a, sin), __fmul_rn(b, cos))};
}
