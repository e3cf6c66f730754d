// Attention over keys that were looked at in several pieces: the pieces' outputs weighted by their log-sum-exp.
//
//     lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i
//
// One thread merges VECTOR elements of one row over all states, in their order, so that results do not depend on how
// work is scheduled. A state with lse_i = -inf saw no key and has no part, whatever its out_i holds.
//
// Compile-time values: DTYPE of the result; SOURCE_FLOAT32, TARGET_FLOAT32 whether the states and the result are float32
// instead, as between rounds; HEAD_DIM VECTOR; CAPACITY, room for states; THREADS.

#include "common/types.cuh"
#include "common/lse.cuh"
#include "common/params.cuh"
#include "common/rows.cuh"

#if SOURCE_FLOAT32
typedef float Source;
__device__ __forceinline__ float source_float(Source value) { return value; }
#else
typedef Element Source;
__device__ __forceinline__ float source_float(Source value) { return to_float(value); }
#endif

#if TARGET_FLOAT32
typedef float Target;
__device__ __forceinline__ Target target(float value) { return value; }
#else
typedef Element Target;
__device__ __forceinline__ Target target(float value) { return from_float(value); }
#endif

// The one argument. cupyattn/kernels/merge.py packs the same fields in the same order. A packed array is a batch of 1.
struct MergeParams {
    const Source* outs[CAPACITY];
    const float* lses[CAPACITY]; // (batch, num_heads, seqlen), contiguous
    Target* out;
    float* lse;
    Strides source_strides, out_strides;
    int count, batch, num_heads, seqlen;
    LseForm lse_form; // of the result; the states' are natural
};

// Four blocks for a multiprocessor: registers to hold the loads of four states that are under way.
extern "C" __global__ void __launch_bounds__(THREADS, 4) merge_states(const __grid_constant__ MergeParams p) {
    const i64 index = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= static_cast<i64>(p.batch) * p.seqlen * p.num_heads * PARTS) return;
    const int part = index % PARTS;
    const int head = index / PARTS % p.num_heads;
    const int row = index / PARTS / p.num_heads;
    const i64 sequence = row / p.seqlen, token = row % p.seqlen;
    const auto offset = [&](const Strides& s) { return sequence * s.outer + token * s.row + head * s.head; };
    const i64 lse_at = (sequence * p.num_heads + head) * p.seqlen + token;

    float top = -infinity();
#pragma unroll 4
    for (int i = 0; i < p.count; ++i) top = fmaxf(top, p.lses[i][lse_at]);
    const float base = top == -infinity() ? 0.0f : top; // a NaN among the states still comes out below

    float sum = 0.0f;
    float sums[VECTOR] = {};
    const i64 source_at = offset(p.source_strides);
#pragma unroll 4
    for (int i = 0; i < p.count; ++i) {
        const float lse = p.lses[i][lse_at];
        Part<Source> values = load_part(p.outs[i] + source_at, part);
        const float weight = exp2_approx((lse - base) * LOG2_E);
        sum += weight;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            const float value = source_float(values[j]);
            sums[j] = fmaf(weight, lse == -infinity() ? 0.0f : value, sums[j]); // the weight is 0, but 0 * NaN is NaN
        }
    }

    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    Part<Target> merged;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) merged[j] = target(sums[j] * scale);
    store_part(p.out + offset(p.out_strides), part, merged);
    if (part == 0) p.lse[lse_at] = lse_in_form(p.lse_form, sum == 0.0f ? -infinity() : base + logf(sum));
}
