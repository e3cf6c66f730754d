// The one argument of the decode kernel: what a forward kernel takes, then the fields below.
// cupyattn/kernels/params.py packs the same fields in the same order.
#pragma once

#include "common/params.cuh"
#include "common/rotary.cuh"

struct DecodeParams : ForwardParams {
    const Element* k_new;          // APPEND
    const Element* v_new;
    const RotaryElement* rotary_cos; // ROTARY
    const RotaryElement* rotary_sin;
    const float* k_scales;         // KV_FLOAT8; null: k_scale holds for all heads
    const float* v_scales;
    float* partials;               // [2 * shares] sums of portions, see decode.cu
    u32* counters;                 // [shares * CLUSTER] of blocks whose sums have arrived, 0 between launches
    Strides k_new_strides, v_new_strides;
    float k_scale, v_scale;
    int k_scale_stride, v_scale_stride; // 0: one number for all heads
    int rotary_positions;
    int rotary_per_query;          // 0: all queries stand at the length before this call
    int num_splits;                // the most pieces of one unit, SPLITS
};

__device__ __forceinline__ float key_scale(const DecodeParams& p, int kv_head) {
    return p.k_scales != nullptr ? p.k_scales[kv_head * p.k_scale_stride] : p.k_scale;
}

__device__ __forceinline__ float value_scale(const DecodeParams& p, int kv_head) {
    return p.v_scales != nullptr ? p.v_scales[kv_head * p.v_scale_stride] : p.v_scale;
}

#if ROTARY
// The elements of a pair, and its angle's cosine and sine; NaN at a position that the tables do not have.
__device__ __forceinline__ int2 rotary_pair(int pair) {
    return ROTARY == ROTARY_INTERLEAVED ? make_int2(2 * pair, 2 * pair + 1) : make_int2(pair, pair + ROTARY_DIM / 2);
}

__device__ __forceinline__ float2 rotary_angle(const DecodeParams& p, int position, int pair) {
    if (position < 0 || position >= p.rotary_positions) return make_float2(quiet_nan(), quiet_nan());
    const i64 at = static_cast<i64>(position) * (ROTARY_DIM / 2) + pair;
    return make_float2(rotary_float(p.rotary_cos[at]), rotary_float(p.rotary_sin[at]));
}
#endif
