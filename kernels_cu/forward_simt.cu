// Attention forward in plain float32 arithmetic: exact products for float32 inputs, and any chip from sm_70.
//
// One thread block owns TILE_M = 64 query rows of one head (or of a packed group of heads) and walks the keys that
// they see in tiles of TILE_N = 64, with an online softmax. 256 threads stand in a 16 x 16 square; thread (y, x)
// holds rows 4 y .. 4 y + 3 against keys 4 x .. 4 x + 3, and of the output the columns 2 x, 2 x + 1 of every
// slice of DEPTH = 32 dimensions. Slices pass through shared memory one after the other, so its size does not
// depend on the head dimensions.
//
// Shared memory (static, float32, rows padded by four):
//     queries [DEPTH][TILE_M]   slice of Q, dimension first
//     keys    [DEPTH][TILE_N]   slice of K, dimension first
//     weights [TILE_M][TILE_N]  P
//     values  [TILE_N][DEPTH]   slice of V
//
// Compile-time values: DTYPE HEAD_DIM HEAD_DIM_V TILE_M TILE_N GROUP PACKED_Q CACHE_KIND BLOCK_SIZE MASK SOFTCAP ALIBI SCALE_FIRST (1).

#include "common/types.cuh"
#include "common/params.cuh"
#include "common/sequence.cuh"
#include "common/mask.cuh"
#include "common/softmax.cuh"

constexpr int SIDE = 16;
constexpr int THREADS = SIDE * SIDE;
constexpr int DEPTH = 32;
constexpr int PER_THREAD = 4;
constexpr int SLICES = ceil_div(HEAD_DIM, DEPTH);
constexpr int V_SLICES = ceil_div(HEAD_DIM_V, DEPTH);
constexpr int OUT_PER_SLICE = DEPTH / SIDE;
constexpr int PAD = 4;

static_assert(TILE_M == SIDE * PER_THREAD && TILE_N == SIDE * PER_THREAD, "a thread owns a 4 x 4 block of scores");
static_assert(SCALE_FIRST, "scores are kept in natural units");

struct State {
    float out[PER_THREAD][V_SLICES * OUT_PER_SLICE];
    float maximum[PER_THREAD];
    float sum[PER_THREAD];
};

// Each warp takes one row at a time, a lane to a dimension, so that global reads are side by side.
template <int ROWS, typename Visit>
__device__ __forceinline__ void for_each_element(Visit visit) {
#pragma unroll
    for (int row = threadIdx.x / DEPTH; row < ROWS; row += THREADS / DEPTH) visit(row, threadIdx.x % DEPTH);
}

// Of a row of K or V, which has DIMS columns.
template <int DIMS>
__device__ __forceinline__ float load_key_element(const ForwardParams& p, const Keys& keys, const Element* base, const Strides& strides, int row, int dim, bool& valid) {
    if (row >= keys.length || dim >= DIMS) return 0.0f;
    bool exists;
    const i64 offset = key_offset(p, keys, strides, row, exists);
    valid &= exists || row < keys.needed;
    return exists ? to_float(base[offset + dim]) : 0.0f;
}

// Largest or total over the 16 threads that share rows.
__device__ __forceinline__ float row_maximum(float value) {
#pragma unroll
    for (int step = SIDE / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
    for (int step = SIDE / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

__device__ __forceinline__ float4 read4(const float* from) { return *reinterpret_cast<const float4*>(from); }

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward_simt(const __grid_constant__ ForwardParams p) {
    __shared__ __align__(16) float queries[DEPTH][TILE_M + PAD];
    __shared__ __align__(16) float keys_slice[DEPTH][TILE_N + PAD];
    __shared__ __align__(16) float weights[TILE_M][TILE_N + PAD];
    __shared__ __align__(16) float values[TILE_N][DEPTH + PAD];

    const Tile tile = find_tile(p, blockIdx.x);
    if (tile.sequence < 0) return;
    const int kv_head = GROUP > 1 ? tile.head : tile.head / (p.num_heads / p.num_kv_heads);
    Keys keys = find_keys(p, tile, kv_head);
    const int shift = keys.length - tile.seqlen_q;
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;

    const int last_row = min(tile.first_row + TILE_M, tile.seqlen_q * GROUP) - 1;
    keys.needed = visible_keys(p, tile.first_row / GROUP, shift, keys.length).begin;
    const int begin = keys.needed / TILE_N;
    const int end = ceil_div(max(visible_keys(p, last_row / GROUP, shift, keys.length).end, 0), TILE_N);

    bool valid = !keys.bad;
    QueryRow rows[PER_THREAD];
    float slopes[PER_THREAD];
    State state;
#pragma unroll
    for (int r = 0; r < PER_THREAD; ++r) {
        rows[r] = find_query_row(tile, y * PER_THREAD + r);
        slopes[r] = alibi_slope(p, tile, rows[r]);
        state.maximum[r] = -infinity();
        state.sum[r] = 0.0f;
#pragma unroll
        for (int d = 0; d < V_SLICES * OUT_PER_SLICE; ++d) state.out[r][d] = 0.0f;
    }

    for (int n = begin; n < end; ++n) {
        const int first_key = n * TILE_N;
        float scores[PER_THREAD][PER_THREAD] = {};
        for (int slice = 0; slice < SLICES; ++slice) {
            __syncthreads(); // all are done with the last slices
            for_each_element<TILE_M>([&](int row, int d) {
                const QueryRow at = find_query_row(tile, row);
                const int dim = slice * DEPTH + d;
                queries[d][row] = at.exists && dim < HEAD_DIM ? to_float(p.q[query_offset(p.q_strides, tile, at) + dim]) : 0.0f;
            });
            for_each_element<TILE_N>([&](int row, int d) {
                keys_slice[d][row] = load_key_element<HEAD_DIM>(p, keys, keys.k, p.k_strides, first_key + row, slice * DEPTH + d, valid);
            });
            __syncthreads();
#pragma unroll 8
            for (int d = 0; d < DEPTH; ++d) {
                const float4 a = read4(&queries[d][y * PER_THREAD]), b = read4(&keys_slice[d][x * PER_THREAD]);
                const float left[PER_THREAD] = {a.x, a.y, a.z, a.w}, right[PER_THREAD] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int r = 0; r < PER_THREAD; ++r)
#pragma unroll
                    for (int c = 0; c < PER_THREAD; ++c) scores[r][c] = fmaf(left[r], right[c], scores[r][c]);
            }
        }

#pragma unroll
        for (int r = 0; r < PER_THREAD; ++r) {
            const KeyRange range = visible_keys(p, rows[r].token, shift, keys.length);
            float best = state.maximum[r];
#pragma unroll
            for (int c = 0; c < PER_THREAD; ++c) {
                const int key = first_key + x * PER_THREAD + c;
                const float score = transform_score(p, scores[r][c], slopes[r], rows[r].token + shift - key);
                scores[r][c] = key >= range.begin && key < range.end ? score : -infinity();
                best = fmaxf(best, scores[r][c]);
            }
            best = row_maximum(best);
            // A row that has seen no key yet holds only zeros: any finite correction will do.
            const float correction = best == -infinity() ? 1.0f : exp2f((state.maximum[r] - best) * score_unit(p));
            const float offset = best == -infinity() ? 0.0f : best;
            state.maximum[r] = best;
            float sum = 0.0f;
#pragma unroll
            for (int c = 0; c < PER_THREAD; ++c) {
                scores[r][c] = exp2f((scores[r][c] - offset) * score_unit(p));
                sum += scores[r][c];
            }
            state.sum[r] = state.sum[r] * correction + row_sum(sum);
#pragma unroll
            for (int d = 0; d < V_SLICES * OUT_PER_SLICE; ++d) state.out[r][d] *= correction;
            // The last tile's readers passed this tile's first barrier.
            *reinterpret_cast<float4*>(&weights[y * PER_THREAD + r][x * PER_THREAD]) = make_float4(scores[r][0], scores[r][1], scores[r][2], scores[r][3]);
        }

#pragma unroll
        for (int slice = 0; slice < V_SLICES; ++slice) {
            __syncthreads(); // weights are written, and all are done with the last slice of values
            for_each_element<TILE_N>([&](int row, int d) {
                values[row][d] = load_key_element<HEAD_DIM_V>(p, keys, keys.v, p.v_strides, first_key + row, slice * DEPTH + d, valid);
            });
            __syncthreads();
#pragma unroll 4
            for (int key = 0; key < TILE_N; key += PER_THREAD) {
                float2 column[PER_THREAD];
#pragma unroll
                for (int i = 0; i < PER_THREAD; ++i) column[i] = *reinterpret_cast<const float2*>(&values[key + i][x * OUT_PER_SLICE]);
#pragma unroll
                for (int r = 0; r < PER_THREAD; ++r) {
                    const float4 w = read4(&weights[y * PER_THREAD + r][key]);
                    const float weight[PER_THREAD] = {w.x, w.y, w.z, w.w};
                    float* out = &state.out[r][slice * OUT_PER_SLICE];
#pragma unroll
                    for (int i = 0; i < PER_THREAD; ++i) {
                        out[0] = fmaf(weight[i], column[i].x, out[0]);
                        out[1] = fmaf(weight[i], column[i].y, out[1]);
                    }
                }
            }
        }
    }

    const bool poison = __syncthreads_or(!valid);
#pragma unroll
    for (int r = 0; r < PER_THREAD; ++r) {
        if (!rows[r].exists) continue;
        const RowResult result = finish_row(p, rows[r].head, state.maximum[r] * score_unit(p), state.sum[r], poison);
        Element* out = p.out + query_offset(p.o_strides, tile, rows[r]);
#pragma unroll
        for (int d = 0; d < V_SLICES * OUT_PER_SLICE; ++d) {
            const int dim = d / OUT_PER_SLICE * DEPTH + x * OUT_PER_SLICE + d % OUT_PER_SLICE;
            if (dim < HEAD_DIM_V) out[dim] = from_float(state.out[r][d] * result.scale);
        }
        if (p.lse != nullptr && x == 0) p.lse[lse_offset(p, tile, rows[r])] = result.lse;
    }
}
