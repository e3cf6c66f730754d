// Element types without CUDA headers: 16-bit values travel as bits and are converted with PTX.
//
// Compile-time values: DTYPE (one of the first three below); KV_DTYPE of the keys and values (DTYPE unless given).
#pragma once

#define DTYPE_FLOAT16 0
#define DTYPE_BFLOAT16 1
#define DTYPE_FLOAT32 2
#define DTYPE_FLOAT8_E4M3 3
#define DTYPE_FLOAT8_E5M2 4

#ifndef KV_DTYPE
#define KV_DTYPE DTYPE
#endif
#define KV_FLOAT8 (KV_DTYPE >= DTYPE_FLOAT8_E4M3)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#if DTYPE == DTYPE_FLOAT32
typedef float Element;
#else
typedef u16 Element;
#endif

#if KV_FLOAT8
typedef u8 KvElement;
#else
typedef Element KvElement;
#endif

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr int WARP_SIZE = 32;

// A value that is part of a type, for lambdas.
template <auto VALUE>
struct Constant {
    static constexpr auto value = VALUE;
};

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7fffffff); }

__host__ __device__ constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
__host__ __device__ constexpr int ceil_div(int value, int divisor) { return (value + divisor - 1) / divisor; }

__device__ __forceinline__ int clamp(int value, int low, int high) { return min(max(value, low), high); }

// One element to float, exact.
__device__ __forceinline__ float to_float(Element bits) {
#if DTYPE == DTYPE_FLOAT32
    return bits;
#elif DTYPE == DTYPE_BFLOAT16
    return __uint_as_float(static_cast<u32>(bits) << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

// One float to an element, round to nearest even.
__device__ __forceinline__ Element from_float(float value) {
#if DTYPE == DTYPE_FLOAT32
    return value;
#elif DTYPE == DTYPE_BFLOAT16
    // By hand, because chips before sm_80 have no such conversion.
    const u32 bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#else
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#endif
}

#if DTYPE != DTYPE_FLOAT32
// Two floats to two packed elements, `low` in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 packed;
#if __CUDA_ARCH__ < 800
    packed = static_cast<u32>(from_float(low)) | static_cast<u32>(from_float(high)) << 16;
#elif DTYPE == DTYPE_BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}
#endif

// 2^x in one instruction: two units in the last place, 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
