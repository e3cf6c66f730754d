// What is left of a row when its keys have been seen: the factor for its sums, and its log-sum-exp.
#pragma once

#include "common/params.cuh"
#include "common/sequence.cuh"

struct RowResult {
    float scale; // for the accumulated output
    float lse;   // in the form that was asked for
};

// `maximum` counts in powers of two and is -infinity, with sum 0, for a row that saw no key: its output is 0. A
// sink is one more term of the sum without a value. `poison` marks rows whose indices did not fit.
__device__ __forceinline__ RowResult finish_row(const ForwardParams& p, int head, float maximum, float sum, bool poison) {
    RowResult result = {0.0f, -infinity()};
    const bool sees_keys = !(maximum == -infinity() && sum == 0.0f);
    if (sees_keys) {
        const float sink = p.sinks != nullptr ? p.sinks[head] * LOG2_E : -infinity();
        const float top = fmaxf(maximum, sink); // keeps the sum finite when the sink outweighs every key
#if DTYPE == DTYPE_FLOAT32
        const float shrink = exp2f(maximum - top);
        sum = sum * shrink + exp2f(sink - top);
        result.scale = shrink / sum;
        result.lse = top * LN_2 + logf(sum);
#else
        const float shrink = exp2_approx(maximum - top);
        sum = sum * shrink + exp2_approx(sink - top);
        result.scale = shrink * __frcp_rn(sum);
        result.lse = (top + __log2f(sum)) * LN_2;
#endif
    }
    result.lse = lse_in_form(p.lse_form, result.lse);
    if (poison) result.scale = result.lse = quiet_nan();
    return result;
}

__device__ __forceinline__ float alibi_slope(const ForwardParams& p, const Tile& tile, const QueryRow& at) {
#if ALIBI
    const int sequence = min(tile.sequence, p.batch - 1);
    return at.exists ? p.alibi_slopes[sequence * p.alibi_batch_stride + at.head] : 0.0f;
#else
    return 0.0f;
#endif
}
