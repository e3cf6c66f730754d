// Which keys a query sees, and what is done to a score before the softmax.
//
// Compile-time values: MASK whether causal or window masks exist; SOFTCAP, ALIBI whether those apply; SCALE_FIRST
// whether scores are multiplied by the scale here (otherwise inside the exponent, which saves an instruction).
//
// Masks align to the bottom right: with shift = seqlen_k - seqlen_q, query i stands at key i + shift.
#pragma once

#include "common/params.cuh"

// Keys [begin, end) that one query token sees.
struct KeyRange {
    int begin, end;
};

__device__ __forceinline__ KeyRange visible_keys(const ForwardParams& p, int token, int shift, int seqlen_k) {
    KeyRange range = {0, seqlen_k};
#if MASK
    if (p.window_left >= 0) range.begin = max(0, token + shift - p.window_left);
    if (p.window_right >= 0) range.end = min(seqlen_k, token + shift + p.window_right + 1);
#endif
    return range;
}

// tanh for 16-bit results, relative error about 1e-6: two special-function instructions, and a series near zero,
// where the difference from 1 would cancel (a large cap puts every score there).
__device__ __forceinline__ float tanh_score(float x) {
#if DTYPE == DTYPE_FLOAT32
    return tanhf(x);
#else
    const float square = x * x;
    const float near_zero = x * fmaf(square, fmaf(square, 2.0f / 15.0f, -1.0f / 3.0f), 1.0f);
    const float far = 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(x * (2.0f * LOG2_E)));
    return fabsf(x) < 0.1f ? near_zero : far;
#endif
}

// Everything between the dot product and the softmax, except masks. Afterwards the score counts in units of
// `score_unit` (in powers of two).
__device__ __forceinline__ float transform_score(const ForwardParams& p, float dot, float slope, int distance) {
#if SOFTCAP
    dot = tanh_score(dot * (p.softmax_scale / p.softcap));
#elif SCALE_FIRST
    dot *= p.softmax_scale;
#endif
#if ALIBI
    dot = (SOFTCAP ? dot * p.softcap : dot) - slope * abs(distance);
#endif
    return dot;
}

__device__ __forceinline__ float score_unit(const ForwardParams& p) {
#if ALIBI
    return LOG2_E;
#elif SOFTCAP
    return p.softcap * LOG2_E;
#elif SCALE_FIRST
    return LOG2_E;
#else
    return p.softmax_scale * LOG2_E;
#endif
}
