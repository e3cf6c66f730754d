// 8-bit floats of a cache: conversion from float (Micikevicius et al. 2022, arXiv:2209.05433).
//
// Compile-time values: KV_DTYPE. Nothing is defined here unless it is one of the two 8-bit types: e4m3 has no
// infinity and NaN 0x7f, e5m2 is the upper half of a float16.
#pragma once

#include "common/types.cuh"

#if KV_FLOAT8

constexpr int FLOAT8_MANTISSA = KV_DTYPE == DTYPE_FLOAT8_E4M3 ? 3 : 2;
constexpr int FLOAT8_BIAS = KV_DTYPE == DTYPE_FLOAT8_E4M3 ? 7 : 15;
constexpr u32 FLOAT8_MAX = KV_DTYPE == DTYPE_FLOAT8_E4M3 ? 0x43e00000 : 0x47600000; // 448 and 57344, as floats
constexpr u8 FLOAT8_NAN = 0x7f;

// One float rounded to nearest even; what is too large, infinity too, becomes the largest finite number.
__device__ __forceinline__ u8 to_fp8(float value) {
#if __CUDA_ARCH__ >= 890
    u16 packed;
#if KV_DTYPE == DTYPE_FLOAT8_E4M3
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(0.0f), "f"(value));
#else
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(0.0f), "f"(value));
#endif
    return packed;
#else
    constexpr int DROPPED = 23 - FLOAT8_MANTISSA;
    constexpr u32 SMALLEST_NORMAL = (128 - FLOAT8_BIAS) << 23;
    // Its last place is the smallest subnormal, so that adding it rounds to a multiple of that.
    constexpr u32 ROUNDER = (128 - FLOAT8_BIAS - FLOAT8_MANTISSA + 23) << 23;
    const u32 bits = __float_as_uint(value);
    const u32 magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return FLOAT8_NAN;
    const u32 kept = min(magnitude, FLOAT8_MAX);
    const u32 nearest = kept + (1u << (DROPPED - 1)) - 1 + (kept >> DROPPED & 1);
    const u32 normal = (nearest >> DROPPED) - ((127 - FLOAT8_BIAS) << FLOAT8_MANTISSA);
    const u32 subnormal = __float_as_uint(__fadd_rn(__uint_as_float(kept), __uint_as_float(ROUNDER))) - ROUNDER;
    return (kept < SMALLEST_NORMAL ? subnormal : normal) | (bits >> 24 & 0x80);
#endif
}

#endif
