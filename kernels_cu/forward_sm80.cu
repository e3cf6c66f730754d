// Attention forward on the tensor cores of sm_75 and later: FlashAttention-2 (arXiv:2307.08691).
//
// One thread block owns TILE_M query rows of one head (or of a packed group of heads) and walks the keys that
// they see from the last tile of TILE_N to the first, so that masked tiles come first and the tail is full:
//
//     S = Q K^T            mma, float32 accumulators in registers
//     scale, cap, bias, mask
//     m, l = running row maximum and sum      (online softmax, in powers of two)
//     O = O * correction + P V                P goes from accumulators to operands without leaving registers
//
// Each of the WARPS warps owns TILE_M / WARPS rows, 16 per m-tile, so no reduction crosses a warp. K and V
// arrive by cp.async. With STAGES = 1 they have one buffer each and each loads while the other is used; with
// STAGES > 1 a ring of K, V pairs runs STAGES - 1 tiles ahead. Turing has no cp.async and copies through registers.
//
// The running maximum is raised only when some row's new one exceeds it by 2^RESCALE_BITS: until then P is at
// most 2^RESCALE_BITS, which 16-bit operands hold, and O needs no correction.
//
// Where there are few rows and many keys (KV_SPLITS), p.kv_splits blocks share the keys of a tile. Each leaves its rows as
// if its keys were all there are, in float32, as those of a sequence `batch` further on; merge_states puts them together.
//
// Shared memory (dynamic, rows of PADDED_DIM 16-bit elements, swizzled as common/copy.cuh says):
//     Q  [TILE_M]           reused for the output tile
//     K  [STAGES][TILE_N]
//     V  [STAGES][TILE_N]
// and, static, what the block knows of its work (Work): the main loop leaves no registers for it.
//
// Compile-time values: DTYPE HEAD_DIM TILE_M TILE_N WARPS STAGES GROUP PACKED_Q CACHE_KIND BLOCK_SIZE
// MASK SOFTCAP ALIBI SCALE_FIRST LOAD_BYTES STORE_BYTES KV_SPLITS.

#include "common/types.cuh"
#include "common/params.cuh"
#include "common/sequence.cuh"
#include "common/key_tiles.cuh"
#include "common/mask.cuh"
#include "common/softmax.cuh"
#include "common/copy.cuh"
#include "common/mma.cuh"

constexpr int THREADS = WARPS * WARP_SIZE;
constexpr int WARP_ROWS = TILE_M / WARPS;
constexpr int M_TILES = WARP_ROWS / 16;
constexpr int N_TILES = TILE_N / 8;
constexpr int D_TILES = PADDED_DIM / 8;
constexpr int D_STEPS = PADDED_DIM / 16;
constexpr int N_STEPS = TILE_N / 16;
constexpr u32 Q_BYTES = TILE_M * ROW_BYTES;
constexpr u32 KV_BYTES = TILE_N * ROW_BYTES;
constexpr float RESCALE_BITS = 8.0f;

static_assert(TILE_M % (WARPS * 16) == 0 && TILE_N % 16 == 0, "a warp owns whole 16-row tiles");

struct Shared {
    u32 q, k, v;
    __device__ __forceinline__ explicit Shared(u32 base) : q(base), k(base + Q_BYTES), v(base + Q_BYTES + STAGES * KV_BYTES) {}
};

// Accumulators and statistics of one warp. Row h of m-tile m is row 16 m + 8 h + lane / 4 of the warp.
struct State {
    float out[M_TILES][D_TILES][4];
    float maximum[M_TILES][2];
    float sum[M_TILES][2]; // of this lane's columns only, until the end
};

// When a pass of all threads covers whole rows, a thread keeps its chunk and steps down PASS_ROWS rows; else 0.
constexpr int PASS_ROWS = THREADS % ROW_CHUNKS == 0 ? THREADS / ROW_CHUNKS : 0;

// Calls visit(row, chunk) for this thread's share of the chunks of a tile of ROWS rows.
template <int ROWS, typename Visit>
__device__ __forceinline__ void for_each_chunk(Visit visit) {
    if constexpr (PASS_ROWS > 0) {
        const int row = threadIdx.x / ROW_CHUNKS, chunk = threadIdx.x % ROW_CHUNKS;
#pragma unroll
        for (int pass = 0; pass < ceil_div(ROWS, PASS_ROWS); ++pass) {
            if (ROWS % PASS_ROWS == 0 || row + pass * PASS_ROWS < ROWS) visit(row + pass * PASS_ROWS, chunk);
        }
    } else {
#pragma unroll
        for (int index = threadIdx.x; index < ROWS * ROW_CHUNKS; index += THREADS) visit(index / ROW_CHUNKS, index % ROW_CHUNKS);
    }
}

__device__ __forceinline__ void load_queries(const ForwardParams& p, const Tile& tile, u32 shared) {
    for_each_chunk<TILE_M>([&](int row, int chunk) {
        const QueryRow at = find_query_row(tile, row);
        copy_chunk(shared + chunk_offset(row, chunk), p.q + (at.exists ? query_offset(p.q_strides, tile, at) : 0), chunk, at.exists);
    });
}

// One tile of keys or of values. A block id outside the cache marks the keys as bad.
template <bool VALUES>
__device__ __forceinline__ void load_keys(const ForwardParams& p, Keys& keys, int first, u32 shared) {
    const Strides& strides = VALUES ? p.v_strides : p.k_strides;
    const Element* base = VALUES ? keys.v : keys.k;
    if constexpr (PASS_ROWS > 0 && CACHE_KIND != CACHE_PAGED) {
        // One pointer steps down the rows: an address of its own for each would not fit the registers.
        const Element* from = base + (first + static_cast<int>(threadIdx.x) / ROW_CHUNKS) * strides.row;
        if (first + TILE_N <= keys.length) {
            for_each_chunk<TILE_N>([&](int row, int chunk) {
                copy_chunk<true>(shared + chunk_offset(row, chunk), from, chunk);
                from += PASS_ROWS * strides.row;
            });
        } else {
            for_each_chunk<TILE_N>([&](int row, int chunk) {
                const bool exists = first + row < keys.length;
                copy_chunk(shared + chunk_offset(row, chunk), exists ? from : base, chunk, exists);
                from += PASS_ROWS * strides.row;
            });
        }
    } else {
        for_each_chunk<TILE_N>([&](int row, int chunk) {
            bool exists = first + row < keys.length;
            i64 offset = 0;
            if (exists) {
                offset = key_offset(p, keys, strides, first + row, exists);
                if (!exists && first + row >= keys.needed) keys.bad = true;
            }
            copy_chunk(shared + chunk_offset(row, chunk), base + offset, chunk, exists);
        });
    }
}

// scores = Q K^T for the warp's rows.
__device__ __forceinline__ void multiply_keys(float (&scores)[M_TILES][N_TILES][4], u32 q, u32 k) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int q_row = threadIdx.x / WARP_SIZE * WARP_ROWS + lane % 16;
    const int k_row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < D_STEPS; ++step) {
        u32 a[M_TILES][4];
        const u32 q_address = step_address(q, q_row, lane / 16, step);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) load_matrices(a[m], q_address + m * 16 * ROW_BYTES);
        const u32 k_address = step_address(k, k_row, lane / 8 % 2, step);
#pragma unroll
        for (int n = 0; n < N_STEPS; ++n) {
            u32 b[4];
            load_matrices(b, k_address + n * 16 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_16x8x16(scores[m][2 * n], a[m], b[0], b[1]);
                mma_16x8x16(scores[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// out += P V, with P packed from the accumulators that hold it.
__device__ __forceinline__ void multiply_values(State& state, const float (&weights)[M_TILES][N_TILES][4], u32 v) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int step = 0; step < N_STEPS; ++step) {
        u32 a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                a[m][2 * half] = pack(weights[m][2 * step + half][0], weights[m][2 * step + half][1]);
                a[m][2 * half + 1] = pack(weights[m][2 * step + half][2], weights[m][2 * step + half][3]);
            }
#pragma unroll
        for (int d = 0; d < D_STEPS; ++d) {
            u32 b[4];
            load_matrices_transposed(b, step_address(v, lane % 16, lane / 16, d) + step * 16 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_16x8x16(state.out[m][2 * d], a[m], b[0], b[1]);
                mma_16x8x16(state.out[m][2 * d + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// The tile row of row h of m-tile m for this lane, and the first of the two columns of n-tile n.
__device__ __forceinline__ int lane_row(int m, int h) {
    return threadIdx.x / WARP_SIZE * WARP_ROWS + m * 16 + h * 8 + threadIdx.x % WARP_SIZE / 4;
}
__device__ __forceinline__ int lane_column(int n) { return n * 8 + threadIdx.x % 4 * 2; }

// Soft cap, bias and, where `masked`, -infinity for the keys that a row does not see.
__device__ __forceinline__ void shape_scores(const ForwardParams& p, const Tile& tile, int seqlen_k, int first_key, bool masked, float (&scores)[M_TILES][N_TILES][4]) {
    const int shift = seqlen_k - tile.seqlen_q;
    if (SOFTCAP || ALIBI || SCALE_FIRST) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const QueryRow at = find_query_row(tile, lane_row(m, h));
                const float slope = alibi_slope(p, tile, at);
#pragma unroll
                for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float& score = scores[m][n][2 * h + i];
                        score = transform_score(p, score, slope, at.token + shift - (first_key + lane_column(n) + i));
                    }
            }
    }
    if (!masked) return;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const KeyRange range = visible_keys(p, find_query_row(tile, lane_row(m, h)).token, shift, seqlen_k);
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int key = first_key + lane_column(n) + i;
                    if (key >= range.end || (MASK && key < range.begin)) scores[m][n][2 * h + i] = -infinity();
                }
        }
}

// The four lanes that share a row.
__device__ __forceinline__ float row_maximum(float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}
__device__ __forceinline__ float row_sum(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

// Turns scores into weights, and brings the running maximum, sum and output to the same footing.
__device__ __forceinline__ void online_softmax(State& state, float (&scores)[M_TILES][N_TILES][4], float unit) {
    float raised[M_TILES][2];
    bool rescale = false;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float best = state.maximum[m][h];
#pragma unroll
            for (int n = 0; n < N_TILES; ++n) best = fmaxf(best, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
            raised[m][h] = row_maximum(best);
            rescale |= (raised[m][h] - state.maximum[m][h]) * unit > RESCALE_BITS;
        }
    if (__any_sync(~0u, rescale)) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // A row that has seen no key yet holds only zeros: any finite correction will do.
                const float correction = raised[m][h] == -infinity() ? 1.0f : exp2_approx((state.maximum[m][h] - raised[m][h]) * unit);
                state.maximum[m][h] = raised[m][h];
                state.sum[m][h] *= correction;
#pragma unroll
                for (int d = 0; d < D_TILES; ++d) {
                    state.out[m][d][2 * h] *= correction;
                    state.out[m][d][2 * h + 1] *= correction;
                }
            }
    }
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float offset = state.maximum[m][h] == -infinity() ? 0.0f : state.maximum[m][h] * unit;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < N_TILES; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& score = scores[m][n][2 * h + i];
                    score = exp2_approx(fmaf(score, unit, -offset));
                    sum += score;
                }
            state.sum[m][h] += sum;
        }
}

// Two elements of a row in float32, those that exist.
__device__ __forceinline__ void store_pair(float* row, int d, float first, float second) {
    if (HEAD_DIM % 2 == 0) {
        if (d < HEAD_DIM) *reinterpret_cast<float2*>(row + d) = make_float2(first, second);
    } else {
        if (d < HEAD_DIM) row[d] = first;
        if (d + 1 < HEAD_DIM) row[d + 1] = second;
    }
}

// Divides by the sums, writes lse, and leaves the 16-bit rows of this warp in shared memory, or those of a split of the
// keys in float32 where they belong.
__device__ __forceinline__ void finish_rows(const ForwardParams& p, const Tile& tile, State& state, float unit, bool poison, u32 shared) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = lane_row(m, h);
            const QueryRow at = find_query_row(tile, row);
            const RowResult result = finish_row(p, at.exists ? at.head : 0, state.maximum[m][h] * unit, row_sum(state.sum[m][h]), poison);
#pragma unroll
            for (int d = 0; d < D_TILES; ++d) {
                if constexpr (KV_SPLITS) {
                    float* to = reinterpret_cast<float*>(p.out) + query_offset(p.o_strides, tile, at);
                    if (at.exists) store_pair(to, 8 * d + threadIdx.x % 4 * 2, state.out[m][d][2 * h] * result.scale, state.out[m][d][2 * h + 1] * result.scale);
                    continue;
                }
                // One m-tile's row of 8 columns is one chunk: four lanes fill its four words.
                const u32 to = shared + chunk_offset(row, d) + lane % 4 * 4;
                const u32 packed = pack(state.out[m][d][2 * h] * result.scale, state.out[m][d][2 * h + 1] * result.scale);
                asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(packed) : "memory");
            }
            if (p.lse != nullptr && at.exists && lane % 4 == 0) p.lse[lse_offset(p, tile, at)] = result.lse;
        }
}

__device__ __forceinline__ void store_chunk(Element* to, uint4 value, int elements) {
    if (STORE_BYTES == 16 && elements == CHUNK) {
        *reinterpret_cast<uint4*>(to) = value;
        return;
    }
    const u32 words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
        if (i < elements) to[i] = static_cast<Element>(words[i / 2] >> 16 * (i % 2));
    }
}

// Each warp stores its own rows, whole chunks side by side.
__device__ __forceinline__ void store_rows(const ForwardParams& p, const Tile& tile, u32 shared) {
    const int first = threadIdx.x / WARP_SIZE * WARP_ROWS;
#pragma unroll
    for (int index = threadIdx.x % WARP_SIZE; index < WARP_ROWS * ROW_CHUNKS; index += WARP_SIZE) {
        const int row = first + index / ROW_CHUNKS, chunk = index % ROW_CHUNKS;
        const QueryRow at = find_query_row(tile, row);
        if (at.exists && chunk * CHUNK < HEAD_DIM) {
            Element* to = p.out + query_offset(p.o_strides, tile, at) + chunk * CHUNK;
            store_chunk(to, load_shared(shared + chunk_offset(row, chunk)), min(CHUNK, HEAD_DIM - chunk * CHUNK));
        }
    }
}

// What a block knows of its work. It stays in shared memory, because the main loop's accumulators leave no
// registers for it.
struct Work {
    Tile tile;
    Keys keys;
    KeyTiles tiles;
};

__device__ __forceinline__ Work find_work(const ForwardParams& p) {
    Work work;
    work.tile = find_tile(p, KV_SPLITS ? blockIdx.x / p.kv_splits : blockIdx.x);
    if (work.tile.sequence < 0) return work;
    const int kv_head = GROUP > 1 ? work.tile.head : work.tile.head / (p.num_heads / p.num_kv_heads);
    work.keys = find_keys(p, work.tile, kv_head);
    work.tiles = find_key_tiles(p, work.tile, work.keys.length, KV_SPLITS ? blockIdx.x % p.kv_splits : 0);
    work.keys.needed = work.tiles.needed;
    return work;
}

__device__ __forceinline__ void clear(State& state) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            state.maximum[m][h] = -infinity();
            state.sum[m][h] = 0.0f;
        }
#pragma unroll
        for (int d = 0; d < D_TILES; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) state.out[m][d][i] = 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward_sm80(const __grid_constant__ ForwardParams p) {
    extern __shared__ __align__(1024) uint4 shared_memory[];
    __shared__ Work work;
    const Shared shared(shared_address(shared_memory));
    Work found = find_work(p);
    if (found.tile.sequence < 0) return;
    if (threadIdx.x == 0) work = found;
    if (CACHE_KIND == CACHE_PAGED) __syncthreads(); // before anybody marks the keys as bad

    const auto load_pair = [&](Work& from, int n, int stage) {
        if (n >= from.tiles.begin) {
            load_keys<false>(p, from.keys, n * TILE_N, shared.k + stage * KV_BYTES);
            load_keys<true>(p, from.keys, n * TILE_N, shared.v + stage * KV_BYTES);
        }
        commit_copies();
    };
    Work& first = CACHE_KIND == CACHE_PAGED ? work : found; // the first loads need not wait for the shared copy
    load_queries(p, found.tile, shared.q);
    if constexpr (STAGES == 1) {
        if (found.tiles.end > found.tiles.begin) load_keys<false>(p, first.keys, (found.tiles.end - 1) * TILE_N, shared.k);
        commit_copies();
    } else {
#pragma unroll
        for (int ahead = 0; ahead < STAGES - 1; ++ahead) load_pair(first, found.tiles.end - 1 - ahead, ahead);
    }
    __syncthreads(); // the shared copy is complete

    State state;
    clear(state);
    const float unit = score_unit(p);
    int stage = 0;
    for (int n = work.tiles.end - 1; n >= work.tiles.begin; --n) {
        float scores[M_TILES][N_TILES][4];
        wait_copies<STAGES == 1 ? 0 : STAGES - 2>();
        __syncthreads(); // tile n has arrived for all, and all are done with the buffers of tile n + 1
        if constexpr (STAGES == 1) {
            load_keys<true>(p, work.keys, n * TILE_N, shared.v);
            commit_copies();
        } else {
            load_pair(work, n - (STAGES - 1), stage == 0 ? STAGES - 1 : stage - 1);
        }
        multiply_keys(scores, shared.q, shared.k + stage * KV_BYTES);
        if constexpr (STAGES == 1) {
            wait_copies<0>();
            __syncthreads(); // V has arrived, and all are done with K
            if (n > work.tiles.begin) load_keys<false>(p, work.keys, (n - 1) * TILE_N, shared.k);
            commit_copies();
        }
        const bool masked = n >= work.tiles.whole_end || n < work.tiles.whole_begin;
        shape_scores(p, work.tile, work.keys.length, n * TILE_N, masked, scores);
        online_softmax(state, scores, unit);
        multiply_values(state, scores, shared.v + stage * KV_BYTES);
        if constexpr (STAGES > 1) stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    wait_copies<0>();
    __syncthreads(); // whoever met a bad block id has said so
    if constexpr (KV_SPLITS) {
        Tile place = work.tile;
        place.sequence += blockIdx.x % p.kv_splits * p.batch;
        finish_rows(p, place, state, unit, work.keys.bad, shared.q);
        return;
    }
    finish_rows(p, work.tile, state, unit, work.keys.bad, shared.q);
    __syncwarp();
    store_rows(p, work.tile, shared.q);
}
