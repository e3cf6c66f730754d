// Attention forward for Hopper: FlashAttention-3 (arXiv:2407.08608), with the copy engine, wgmma and warps of two trades.
//
// A block stays on its multiprocessor and takes tiles of TILE_M query rows of one head (or of a packed group of heads)
// from a common counter. One warp loads: it finds the tile, and its rows of Q and tiles of TILE_N keys and values
// arrive through rings of buffers. CONSUMERS warpgroups compute, 64 rows each, from the last tile of keys to the first,
// and for each of them a warp stores its results:
//
//     S' = Q K^T                   wgmma, under way together with
//     O  = O + P V                 that of the tile before, whose P lies in registers
//     mask S'; m, l = running row maximum and sum;  O = O * correction;  P = 2^(S' - m)
//
// So it goes on from one query tile to the next: the first product of the next one is under way together with the last
// of this one, whose rows then leave (join). The softmax of one warpgroup runs while the products of another do: they
// take turns at issuing them (wait_turn, pass_turn), so that the tensor cores always have work.
//
// The running maximum is raised only when some row's new one exceeds it by 2^RESCALE_BITS: until then P is at
// most 2^RESCALE_BITS, which 16-bit operands hold, and O needs no correction. Where registers allow (GUESSES), the old
// maximum is taken for granted, and P computed without looking for a new one; a sum of 2^RESCALE_BITS or more tells
// that it was not, and P is computed anew.
//
// Shared memory (dynamic; tiles of common/tma.cuh: blocks of 64 columns, 128 bytes to a row):
//     Q  [QUERY_STAGES][CONSUMERS][D_BLOCKS][64 rows]
//     K  [STAGES][D_BLOCKS][TILE_N]
//     V  [STAGES][V_BLOCKS][TILE_N]
//     O  [CONSUMERS][OUT_BLOCKS][64 rows]    the columns leave so many blocks at a time
//
// Keys in blocks of few rows (GATHER) are no boxes for the copy engine: the loading warp's lanes copy their chunks.
//
// Static shared memory: the barriers and what is known of the present tile and the next (Work).
//
// Compile-time values: DTYPE HEAD_DIM HEAD_DIM_V TILE_M TILE_N CONSUMERS STAGES QUERY_STAGES OUT_BLOCKS GROUP PACKED_Q
// CACHE_KIND BLOCK_SIZE GATHER BOX_ROWS MASK LEFT SOFTCAP ALIBI SCALE_FIRST RAGGED_KEYS KV_SPLITS PRODUCER_REGISTERS
// CONSUMER_REGISTERS LOAD_BYTES.

#include "common/types.cuh"
#include "common/params.cuh"
#include "common/sequence.cuh"
#include "common/key_tiles.cuh"
#include "common/mask.cuh"
#include "common/softmax.cuh"
#include "common/copy.cuh"
#include "common/mbarrier.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

constexpr int WARPGROUP = 128;
constexpr int WARPGROUP_WARPS = WARPGROUP / WARP_SIZE;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
constexpr int SERVANTS = CONSUMERS; // the last warpgroup: its first warp loads, the others store
constexpr int PRODUCT_ROWS = 64;    // of a warpgroup's product
constexpr int ROWS = TILE_M / CONSUMERS; // of them in use: whole groups of heads

// The widths of products with V, and of the output's accumulators.
constexpr int OUT_DIM = HEAD_DIM_V <= 64 ? 64 : HEAD_DIM_V <= 96 ? 96 : HEAD_DIM_V <= 128 ? 128 : HEAD_DIM_V <= 192 ? 192 : 256;
constexpr int D_STEPS = ceil_div(HEAD_DIM, 16);
constexpr int N_STEPS = TILE_N / 16;
constexpr int D_BLOCKS = ceil_div(HEAD_DIM, BLOCK_COLUMNS);
constexpr int V_BLOCKS = ceil_div(HEAD_DIM_V, BLOCK_COLUMNS);

constexpr u32 Q_BLOCK_BYTES = PRODUCT_ROWS * BLOCK_ROW_BYTES;
constexpr u32 Q_BYTES = D_BLOCKS * Q_BLOCK_BYTES; // of one warpgroup
constexpr u32 OUT_BYTES = OUT_BLOCKS * Q_BLOCK_BYTES;
constexpr u32 KEY_BLOCK_BYTES = TILE_N * BLOCK_ROW_BYTES;
constexpr u32 K_BYTES = D_BLOCKS * KEY_BLOCK_BYTES; // of one stage
constexpr u32 V_BYTES = V_BLOCKS * KEY_BLOCK_BYTES;
constexpr int BOXES = TILE_N / BOX_ROWS;
constexpr float RESCALE_BITS = 8.0f;

// Whether a warpgroup that sees no more than half of a tile's keys leaves the others out. Shaping takes much code already.
constexpr bool HALVES = MASK && !SOFTCAP && !ALIBI && TILE_N % 32 == 0;

constexpr int WORKS = QUERY_STAGES + 3; // the next, those that Q is there for, one that Q has left, and one whose rows leave

// Whether scores, two tiles' weights and the output fit the registers together, with what else a thread needs, which is
// more where scores are shaped.
constexpr bool GUESSES = !SOFTCAP && !ALIBI && TILE_N + OUT_DIM / 2 + 24 <= CONSUMER_REGISTERS;

static_assert(V_BLOCKS % OUT_BLOCKS == 0, "the columns leave in equal parts");
static_assert(ROWS <= PRODUCT_ROWS && ROWS % GROUP == 0 && ROWS * CONSUMERS == TILE_M, "whole groups of heads in a product");
static_assert(TILE_N % 16 == 0 && TILE_N % BOX_ROWS == 0 && BOXES <= WARP_SIZE, "a tile of keys is whole boxes");
static_assert(CACHE_KIND != CACHE_PAGED || GATHER || BLOCK_SIZE % BOX_ROWS == 0, "a box lies within a block");

struct TensorMaps {
    TensorMap q, k, v, out;
    u32* counters; // tiles taken beyond the first of each block; blocks that are done. Both are left at zero.
};

struct Work {
    Tile tile; // sequence -1: no more
    Rows rows;
    KeyTiles tiles;
    int kv_head;
    int split;
    // For each warpgroup: the end of the tiles of keys that its rows see, and whether they see but half of the last.
    int seen_end[CONSUMERS];
    bool half[CONSUMERS];
};

// Barriers and tiles in shared memory, by their addresses there.
struct Shared {
    u32 q, k, v, out;
    __device__ __forceinline__ explicit Shared(u32 base)
        : q(base), k(base + QUERY_STAGES * CONSUMERS * Q_BYTES), v(k + STAGES * K_BYTES), out(v + STAGES * V_BYTES) {}
};

// Whose rows a warpgroup has left for the warp that stores them: sequence -1 if no more will come. A copy, because work
// gives way to other work before it has stored them.
struct Outgoing {
    Tile tile[CONSUMERS];
};

struct Barriers {
    u64 q_full[QUERY_STAGES][CONSUMERS], q_empty[QUERY_STAGES][CONSUMERS]; // a warpgroup's rows come as it is done with others
    u64 k_full[STAGES], k_empty[STAGES];
    u64 v_full[STAGES], v_empty[STAGES];
};

// The barriers of the block: 0 is __syncthreads', then each warpgroup has one for its turn, one of its own, and two that
// it shares with the warp that stores its rows.
__device__ __forceinline__ void sync_warpgroup(int warpgroup) { sync_threads(1 + CONSUMERS + warpgroup, WARPGROUP); }
__device__ __forceinline__ void wait_out_full(int warpgroup) { sync_threads(1 + 2 * CONSUMERS + warpgroup, WARPGROUP + WARP_SIZE); }
__device__ __forceinline__ void signal_out_full(int warpgroup) { signal_threads(1 + 2 * CONSUMERS + warpgroup, WARPGROUP + WARP_SIZE); }
__device__ __forceinline__ void wait_out_free(int warpgroup) { sync_threads(1 + 3 * CONSUMERS + warpgroup, WARPGROUP + WARP_SIZE); }
__device__ __forceinline__ void signal_out_free(int warpgroup) { signal_threads(1 + 3 * CONSUMERS + warpgroup, WARPGROUP + WARP_SIZE); }

// ------------------------------------------------------------------------------------------------------- loading

__device__ __forceinline__ bool has_rows(const Tile& tile, int warpgroup) { return tile.first_row + warpgroup * ROWS < tile.seqlen_q * GROUP; }

// What the rows of one warpgroup see of the tile's keys: it lets the tiles behind pass.
__device__ __forceinline__ void find_seen(const ForwardParams& p, Work& work, int warpgroup) {
    const KeyTiles& tiles = work.tiles;
    int end = tiles.begin;
    work.half[warpgroup] = false;
    if (tiles.end > tiles.begin && has_rows(work.tile, warpgroup)) {
        const int last_row = min(work.tile.first_row + (warpgroup + 1) * ROWS, work.tile.seqlen_q * GROUP) - 1;
        const int key_end = visible_keys(p, last_row / GROUP, work.rows.length - work.tile.seqlen_q, work.rows.length).end;
        // No more pass than a ring holds beside the values that are still to be multiplied, for which nothing would be loaded.
        end = MASK ? clamp(ceil_div(key_end, TILE_N), max(tiles.begin + 1, tiles.end - (STAGES - 1)), tiles.end) : tiles.end;
        work.half[warpgroup] = HALVES && key_end <= (end - 1) * TILE_N + TILE_N / 2;
    }
    work.seen_end[warpgroup] = end;
}

__device__ __forceinline__ Work find_work(const ForwardParams& p, u32 index) {
    Work work;
    work.tile.sequence = -1;
    if (index >= p.total_tiles) return work;
    work.split = KV_SPLITS ? index % p.kv_splits : 0;
    work.tile = find_tile(p, KV_SPLITS ? index / p.kv_splits : index);
    if (work.tile.sequence < 0) return work;
    work.kv_head = GROUP > 1 ? work.tile.head : work.tile.head / (p.num_heads / p.num_kv_heads);
    work.rows = {0, 0, 0, false};
    if (work.tile.sequence < p.batch) work.rows = find_rows(p, work.tile.sequence);
    work.rows.bad |= work.tile.bad;
    work.tiles = find_key_tiles(p, work.tile, work.rows.length, work.split);
    return work;
}

// The first token of a warpgroup's rows, along the axis of q and out that holds all of them.
__device__ __forceinline__ int first_token(const Tile& tile, int warpgroup) {
    return (PACKED_Q ? tile.q_begin : 0) + (tile.first_row + warpgroup * ROWS) / GROUP;
}

// Rows of a product that no box fills take part in what a warp decides together: they are zero, not what was there before.
__device__ __forceinline__ void clear_unused_rows(u32 q) {
    for (int block = 0; block < QUERY_STAGES * CONSUMERS * D_BLOCKS; ++block)
        for (u32 byte = ROWS * BLOCK_ROW_BYTES + threadIdx.x * 16; byte < Q_BLOCK_BYTES; byte += THREADS * 16) {
            store_shared(q + block * Q_BLOCK_BYTES + byte, make_uint4(0, 0, 0, 0));
        }
    fence_async_proxy();
}

// The rows of one warpgroup.
__device__ __forceinline__ void load_queries(const TensorMaps& maps, const Tile& tile, int warpgroup, u32 shared, u32 barrier) {
    constexpr u32 BOX_BYTES = ROWS * BLOCK_ROW_BYTES;
    arrive_expecting(barrier, D_BLOCKS * BOX_BYTES);
    for (int block = 0; block < D_BLOCKS; ++block) {
        load_query_box(shared + block * Q_BLOCK_BYTES, maps.q, barrier, block * BLOCK_COLUMNS, first_token(tile, warpgroup), tile.head, PACKED_Q ? 0 : tile.sequence);
    }
}

// One tile of keys or of values, row by row, by all lanes. A block id outside the cache marks the work as bad, and its
// keys are zero.
template <bool VALUES>
__device__ __forceinline__ void gather_keys(const ForwardParams& p, Work& work, int n, u32 shared, u32 barrier) {
    constexpr int CHUNKS = 2 * (VALUES ? ceil_div(HEAD_DIM_V, 16) : D_STEPS); // of a row, up to what products read
    constexpr int DIM = VALUES ? HEAD_DIM_V : HEAD_DIM;
    const int lane = threadIdx.x % WARP_SIZE;
    const Keys keys = place_keys(p, work.tile.sequence, work.rows, work.kv_head);
    for (int first = 0; first < TILE_N; first += WARP_SIZE) {
        const int row = n * TILE_N + first + lane;
        i64 offset = -1; // of the row that this lane looks up
        if (row < work.rows.length) {
            bool valid = true;
            offset = key_offset(p, keys, VALUES ? p.v_strides : p.k_strides, row, valid);
            if (!valid) offset = -1;
            if (!valid && row >= work.tiles.needed) work.rows.bad = true;
        }
#pragma unroll 2
        for (int index = lane; index < min(WARP_SIZE, TILE_N - first) * CHUNKS; index += WARP_SIZE) {
            const int within = index / CHUNKS, chunk = index % CHUNKS;
            const i64 from = __shfl_sync(~0u, offset, within);
            const u32 to = shared + chunk / 8 * KEY_BLOCK_BYTES + swizzled(first + within, chunk % 8);
            copy_async<16>(to, (VALUES ? keys.v : keys.k) + (from < 0 ? 0 : from + chunk * 8), from < 0 || chunk * 8 >= DIM ? 0 : 16);
        }
    }
    __threadfence_block(); // who waits for the tile sees the mark
    arrive_copied(barrier);
}

// The same by the copy engine, a lane for each box.
template <int BLOCKS>
__device__ __forceinline__ void load_keys(const ForwardParams& p, const TensorMap& map, Work& work, int n, u32 shared, u32 barrier) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int first = n * TILE_N + lane * BOX_ROWS;
    int row = work.rows.first + first, entry = work.rows.entry;
    if (CACHE_KIND == CACHE_PAGED && lane < BOXES) {
        row = first % BLOCK_SIZE;
        entry = p.cache_entries; // outside, which gives zeros
        if (first < work.rows.length) {
            entry = __ldg(p.block_table + static_cast<i64>(work.tile.sequence) * p.table_stride + first / BLOCK_SIZE);
            if (static_cast<u32>(entry) >= static_cast<u32>(p.cache_entries)) {
                entry = p.cache_entries;
                if (min(first + BOX_ROWS, work.rows.length) > work.tiles.needed) work.rows.bad = true;
            }
        }
    }
    __syncwarp(); // who waits for the tile sees the mark
    if (lane == 0) arrive_expecting(barrier, BLOCKS * KEY_BLOCK_BYTES);
    __syncwarp();
    if (lane >= BOXES) return;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        load_box(shared + block * KEY_BLOCK_BYTES + lane * BOX_ROWS * BLOCK_ROW_BYTES, map, barrier, block * BLOCK_COLUMNS, row, work.kv_head, entry);
    }
}

// What the loading warp does, with all its lanes: everything in the order in which it is needed.
__device__ __forceinline__ void produce(const ForwardParams& p, const TensorMaps& maps, const Shared& shared, Barriers& barriers, Work (&works)[WORKS]) {
    const int lane = threadIdx.x % WARP_SIZE;
    const u32 q_full = shared_address(barriers.q_full), q_empty = shared_address(barriers.q_empty);
    const u32 k_full = shared_address(barriers.k_full), k_empty = shared_address(barriers.k_empty);
    const u32 v_full = shared_address(barriers.v_full), v_empty = shared_address(barriers.v_empty);
    Place<QUERY_STAGES> q_place;
    Place<STAGES> k_place, v_place;
    const auto load_query_tile = [&](int slot, bool any) {
        for (int warpgroup = 0; warpgroup < CONSUMERS; ++warpgroup) {
            const int place = q_place.stage() * CONSUMERS + warpgroup;
            const u32 full = q_full + place * BARRIER_BYTES;
            wait_barrier(q_empty + place * BARRIER_BYTES, q_place.parity() ^ 1);
            if (lane != 0) continue;
            if (any) load_queries(maps, works[slot].tile, warpgroup, shared.q + place * Q_BYTES, full);
            else arrive(full);
        }
        q_place.advance();
    };
    const auto load_key_tile = [&](int slot, int n) {
        wait_barrier(k_empty + k_place.stage() * BARRIER_BYTES, k_place.parity() ^ 1);
        const u32 to = shared.k + k_place.stage() * K_BYTES, full = k_full + k_place.stage() * BARRIER_BYTES;
        if constexpr (GATHER) gather_keys<false>(p, works[slot], n, to, full);
        else load_keys<D_BLOCKS>(p, maps.k, works[slot], n, to, full);
        k_place.advance();
    };
    const auto load_value_tile = [&](int slot, int n) {
        wait_barrier(v_empty + v_place.stage() * BARRIER_BYTES, v_place.parity() ^ 1);
        const u32 to = shared.v + v_place.stage() * V_BYTES, full = v_full + v_place.stage() * BARRIER_BYTES;
        if constexpr (GATHER) gather_keys<true>(p, works[slot], n, to, full);
        else load_keys<V_BLOCKS>(p, maps.v, works[slot], n, to, full);
        v_place.advance();
    };
    // Work is kept in shared memory by its loader too, for whom few registers are left.
    const auto note_work = [&](int slot, u32 index) {
        const Work found = find_work(p, index);
        if (lane == 0) works[slot] = found;
        __syncwarp();
        if (lane < CONSUMERS && found.tile.sequence >= 0) find_seen(p, works[slot], lane);
        __syncwarp();
    };
    note_work(0, blockIdx.x);
    int before = -1; // the slot of the tile before, if its last values are still to be loaded
    for (int slot = 0;;) {
        const bool any = works[slot].tile.sequence >= 0;
        u32 index = 0;
        if (any && lane == 0) index = atomicAdd(maps.counters, 1) + gridDim.x;
        load_query_tile(slot, any);
        const int begin = works[slot].tiles.begin;
        int n = works[slot].tiles.end - 1;
        const bool keys = any && n >= begin;
        if (keys) load_key_tile(slot, n);
        if (before >= 0) load_value_tile(before, works[before].tiles.begin);
        if (!any) return;
        const int next = slot == WORKS - 1 ? 0 : slot + 1;
        note_work(next, __shfl_sync(~0u, index, 0));
        for (; n > begin; --n) {
            load_key_tile(slot, n - 1);
            load_value_tile(slot, n);
        }
        before = keys ? slot : -1;
        slot = next;
    }
}

// ------------------------------------------------------------------------------------------------------- storing

// Of a warpgroup's rows those that are the sequence's.
__device__ __forceinline__ void store_some_rows(const ForwardParams& p, const Tile& tile, int warpgroup, int first_block, u32 shared) {
    constexpr int CHUNKS = OUT_BLOCKS * BLOCK_COLUMNS / 8;
    for (int index = threadIdx.x % WARP_SIZE; index < ROWS * CHUNKS; index += WARP_SIZE) {
        const int row = index / CHUNKS, chunk = index % CHUNKS, column = first_block * BLOCK_COLUMNS + chunk * 8;
        const QueryRow at = find_query_row(tile, warpgroup * ROWS + row);
        if (at.exists && column < HEAD_DIM_V) {
            const uint4 value = load_shared(shared + chunk / 8 * Q_BLOCK_BYTES + swizzled(row, chunk % 8));
            *reinterpret_cast<uint4*>(p.out + query_offset(p.o_strides, tile, at) + column) = value;
        }
    }
}

// What the warp does that stores the rows of one warpgroup.
__device__ __forceinline__ void store(const ForwardParams& p, const TensorMaps& maps, int warpgroup, u32 shared, const Outgoing& outgoing) {
    const bool first_lane = threadIdx.x % WARP_SIZE == 0;
    signal_out_free(warpgroup);
    for (int first_block = 0;; first_block = first_block + OUT_BLOCKS == V_BLOCKS ? 0 : first_block + OUT_BLOCKS) {
        wait_out_full(warpgroup);
        const Tile tile = outgoing.tile[warpgroup];
        if (tile.sequence < 0) return;
        if (PACKED_Q && tile.first_row + (warpgroup + 1) * ROWS > tile.seqlen_q * GROUP) {
            store_some_rows(p, tile, warpgroup, first_block, shared);
        } else if (first_lane) {
            for (int block = 0; block < OUT_BLOCKS; ++block) {
                store_query_box(maps.out, shared + block * Q_BLOCK_BYTES, (first_block + block) * BLOCK_COLUMNS, first_token(tile, warpgroup), tile.head, PACKED_Q ? 0 : tile.sequence);
            }
            commit_stores();
            wait_stores();
        }
        __syncwarp();
        signal_out_free(warpgroup);
    }
}

// ----------------------------------------------------------------------------------------------------- computing

// One thread's part of its warpgroup's rows. Row h is row 16 warp + 8 h + lane / 4 of the product.
struct Statistics {
    float maximum[2] = {-infinity(), -infinity()};
    float sum[2] = {}; // of this lane's columns only, until the end
};
struct State {
    float out[OUT_DIM / 2] = {};
    u32 weights[TILE_N / 4] = {}; // P of the latest tile, as operands
    Statistics rows;
};

// This lane's row h of its warpgroup's product, whether that is in use, and the row of the tile that it is then.
__device__ __forceinline__ int product_row(int h) {
    return static_cast<int>(threadIdx.x) % WARPGROUP / WARP_SIZE * 16 + h * 8 + static_cast<int>(threadIdx.x) % WARP_SIZE / 4;
}
__device__ __forceinline__ bool in_use(int h) { return ROWS == PRODUCT_ROWS || product_row(h) < ROWS; }
__device__ __forceinline__ int lane_row(int warpgroup, int h) { return warpgroup * ROWS + product_row(h); }

// scores = Q K^T for the first KEYS of the tile, two of which a thread holds for each row.
template <int COUNT, int KEYS = 2 * COUNT>
__device__ __forceinline__ void multiply_keys(float (&scores)[COUNT], u32 q, u32 k) {
    const u64 queries = describe_rows(q), keys = describe_rows(k);
#pragma unroll
    for (int step = 0; step < D_STEPS; ++step) {
        constexpr int BLOCK_STEPS = BLOCK_COLUMNS / 16;
        const u32 within = step % BLOCK_STEPS * 32;
        Wgmma<KEYS>::multiply(scores, step_bytes(queries, step / BLOCK_STEPS * Q_BLOCK_BYTES + within), step_bytes(keys, step / BLOCK_STEPS * KEY_BLOCK_BYTES + within), step > 0);
    }
}

// out += P V, of the first half of the tile's values where that is all that the rows see.
__device__ __forceinline__ void multiply_values(State& state, u32 v, bool half) {
    const u64 values = describe_columns(v, KEY_BLOCK_BYTES);
#pragma unroll
    for (int step = 0; step < N_STEPS; ++step) {
        if (HALVES && step == N_STEPS / 2 && half) break;
        Wgmma<OUT_DIM>::multiply(state.out, state.weights + 4 * step, step_bytes(values, step * 16 * BLOCK_ROW_BYTES), 1);
    }
}

// Soft cap, bias and, in a tile that some row does not see whole, -infinity for the keys that a row does not see.
template <bool MAY_MASK, int COUNT>
__device__ __forceinline__ void shape_scores(const ForwardParams& p, const Work& work, int warpgroup, int n, float (&scores)[COUNT]) {
    const int column = n * TILE_N + threadIdx.x % 4 * 2; // of scores[0]
    const int shift = work.rows.length - work.tile.seqlen_q;
    if constexpr (SOFTCAP || ALIBI || SCALE_FIRST) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const QueryRow at = find_query_row(work.tile, lane_row(warpgroup, h));
            const float slope = alibi_slope(p, work.tile, at);
#pragma unroll
            for (int i = 2 * h; i < COUNT; i += i % 2 == 0 ? 1 : 3) {
                scores[i] = transform_score(p, scores[i], slope, at.token + shift - (column + i / 4 * 8 + i % 2));
            }
        }
    }
    if (MAY_MASK && (n >= work.tiles.whole_end || (LEFT && n < work.tiles.whole_begin))) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int token = find_query_row(work.tile, lane_row(warpgroup, h)).token;
            const KeyRange range = visible_keys(p, token, shift, work.rows.length);
#pragma unroll
            for (int i = 2 * h; i < COUNT; i += i % 2 == 0 ? 1 : 3) {
                const int key = i / 4 * 8 + i % 2; // from `column`
                if (key >= range.end - column || (LEFT && key < range.begin - column)) scores[i] = -infinity();
            }
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

// Turns scores into weights and counts them. Where some exceeds the running maximum by more than 2^room, that is raised:
// `correction` is what the output must be multiplied by, and the result is true.
template <int COUNT>
__device__ __forceinline__ bool online_softmax(Statistics& rows, float (&scores)[COUNT], float unit, float room, float (&correction)[2]) {
    float raised[2];
    bool rescale = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float best = scores[2 * h];
#pragma unroll
        for (int i = 2 * h; i < COUNT; i += 4) best = fmaxf(best, fmaxf(scores[i], scores[i + 1]));
        raised[h] = fmaxf(rows.maximum[h], row_maximum(best));
        rescale |= (raised[h] - rows.maximum[h]) * unit > room;
    }
    rescale = __any_sync(~0u, rescale);
    if (rescale) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            // A row that has seen no key yet holds only zeros: any finite correction will do.
            correction[h] = raised[h] == -infinity() ? 1.0f : exp2_approx((rows.maximum[h] - raised[h]) * unit);
            rows.maximum[h] = raised[h];
            rows.sum[h] *= correction[h];
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float offset = rows.maximum[h] == -infinity() ? 0.0f : rows.maximum[h] * unit;
        float sum = 0.0f;
#pragma unroll
        for (int i = 2 * h; i < COUNT; i += 4) {
            scores[i] = exp2_approx(fmaf(scores[i], unit, -offset));
            scores[i + 1] = exp2_approx(fmaf(scores[i + 1], unit, -offset));
            sum += scores[i] + scores[i + 1];
        }
        rows.sum[h] += sum;
    }
    return rescale;
}

// The same for the maximum that is known already; false, and nothing is done, if some score exceeds it by too much, or
// there is none yet.
template <int COUNT>
__device__ __forceinline__ bool guess_softmax(Statistics& rows, const float (&scores)[COUNT], float unit, u32 (&weights)[COUNT / 2]) {
    const float most = exp2f(RESCALE_BITS);
    float sum[2];
    bool good = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float offset = rows.maximum[h] * unit; // -infinity makes infinite weights, or NaN
        sum[h] = 0.0f;
#pragma unroll
        for (int i = 2 * h; i < COUNT; i += 4) {
            const float first = exp2_approx(fmaf(scores[i], unit, -offset)), second = exp2_approx(fmaf(scores[i + 1], unit, -offset));
            sum[h] += first + second;
            weights[i / 2] = pack(first, second);
        }
        good &= sum[h] < most;
    }
    good = __all_sync(~0u, good);
    if (good) {
        rows.sum[0] += sum[0];
        rows.sum[1] += sum[1];
    }
    return good;
}

__device__ __forceinline__ void rescale_out(State& state, const float (&correction)[2]) {
#pragma unroll
    for (int i = 0; i < OUT_DIM / 2; ++i) state.out[i] *= correction[i / 2 % 2];
}

// Waits for all products, but not before the exponentials: the assembler would move them behind the wait for the very
// products that they are to be done beside. It does not move code over a branch, so here is one; both ways wait.
template <typename Type, int COUNT>
__device__ __forceinline__ void wait_behind(Type (&weights)[COUNT], const ForwardParams& p) {
    pin(weights);
    if (p.total_tiles > 0) {
        wait_products<0>();
    } else {
        wait_products<0>();
        pin(weights);
    }
}

// Accumulators of the scores are laid out as operands are.
template <int COUNT>
__device__ __forceinline__ void pack_weights(u32 (&weights)[TILE_N / 4], const float (&scores)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) weights[i] = pack(scores[2 * i], scores[2 * i + 1]);
}

// Warpgroups issue their products in turn.
__device__ __forceinline__ void wait_turn(int warpgroup) {
    if (CONSUMERS > 1) sync_threads(1 + warpgroup, 2 * WARPGROUP);
}
__device__ __forceinline__ void pass_turn(int warpgroup) {
    if (CONSUMERS > 1) signal_threads(1 + (warpgroup + 1) % CONSUMERS, 2 * WARPGROUP);
}

// The rows of a tile of values behind the last key hold whatever memory does: 0 * NaN would reach the output.
__device__ __forceinline__ void clear_values(u32 v, int first_row, int warpgroup) {
    constexpr int CHUNKS = V_BLOCKS * 8;
    for (int index = threadIdx.x % WARPGROUP; index < (TILE_N - first_row) * CHUNKS; index += WARPGROUP) {
        const int row = first_row + index / CHUNKS, chunk = index % CHUNKS;
        store_shared(v + chunk / 8 * KEY_BLOCK_BYTES + row * BLOCK_ROW_BYTES + chunk % 8 * 16, make_uint4(0, 0, 0, 0));
    }
    fence_async_proxy();
    sync_warpgroup(warpgroup);
}

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Blocks of columns from `first_block` on.
__device__ __forceinline__ void leave_in_shared(const State& state, const float (&scale)[2], int first_block, u32 shared) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int row = threadIdx.x % WARPGROUP / WARP_SIZE * 16 + lane % 16;
#pragma unroll
    for (int block = 0; block < OUT_BLOCKS; ++block)
#pragma unroll
        for (int pair = 0; pair < BLOCK_COLUMNS / 16; ++pair) {
            const int column = ((first_block + block) * (BLOCK_COLUMNS / 16) + pair) * 16;
            if (column >= OUT_DIM) break;
            const float* at = state.out + column / 2;
            store_matrices(shared + block * Q_BLOCK_BYTES + swizzled(row, 2 * pair + lane / 16), pack(at[0] * scale[0], at[1] * scale[0]),
                           pack(at[2] * scale[1], at[3] * scale[1]), pack(at[4] * scale[0], at[5] * scale[0]), pack(at[6] * scale[1], at[7] * scale[1]));
        }
}

// Hands the rows to the warp that stores them, some blocks of columns at a time.
__device__ __forceinline__ void hand_over(const State& state, const float (&scale)[2], const Tile& tile, int warpgroup, u32 shared, Outgoing& outgoing) {
#pragma unroll
    for (int first_block = 0; first_block < V_BLOCKS; first_block += OUT_BLOCKS) {
        wait_out_free(warpgroup);
        leave_in_shared(state, scale, first_block, shared);
        if (threadIdx.x % WARPGROUP == 0) outgoing.tile[warpgroup] = tile;
        fence_async_proxy();
        signal_out_full(warpgroup);
    }
}

// A row's part of a split of the keys, in float32.
__device__ __forceinline__ void store_split_row(const State& state, int h, float scale, float* row) {
#pragma unroll
    for (int i = 2 * h; i < OUT_DIM / 2; i += 4) {
        const int column = i / 4 * 8 + threadIdx.x % 4 * 2;
        if (column < HEAD_DIM_V) *reinterpret_cast<float2*>(row + column) = make_float2(state.out[i] * scale, state.out[i + 1] * scale);
    }
}

// Divides by the sums, writes lse, and sends the rows on their way.
__device__ __forceinline__ void finish_rows(const ForwardParams& p, const Work& work, const State& state, float unit, int warpgroup, u32 shared, Outgoing& outgoing) {
    Tile tile = work.tile;
    if (KV_SPLITS) tile.sequence += work.split * p.batch; // where this part of the keys leaves its result
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const QueryRow at = find_query_row(tile, lane_row(warpgroup, h));
        const bool exists = at.exists && in_use(h);
        const RowResult result = finish_row(p, exists ? at.head : 0, state.rows.maximum[h] * unit, row_sum(state.rows.sum[h]), work.rows.bad);
        scale[h] = result.scale;
        if (p.lse != nullptr && exists && threadIdx.x % 4 == 0) p.lse[lse_offset(p, tile, at)] = result.lse;
        if (KV_SPLITS && exists) store_split_row(state, h, result.scale, reinterpret_cast<float*>(p.out) + query_offset(p.o_strides, tile, at));
    }
    if constexpr (!KV_SPLITS) hand_over(state, scale, tile, warpgroup, shared, outgoing);
}

// What a computing warpgroup does.
__device__ __forceinline__ void consume(const ForwardParams& p, const Shared& shared, Barriers& barriers, Outgoing& outgoing, const Work (&works)[WORKS]) {
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
    const bool speaks = threadIdx.x % WARP_SIZE == 0; // for its warp
    const u32 k_full = shared_address(barriers.k_full), k_empty = shared_address(barriers.k_empty);
    const u32 v_full = shared_address(barriers.v_full), v_empty = shared_address(barriers.v_empty);
    const float unit = score_unit(p);
    Place<QUERY_STAGES> q_place;
    Place<STAGES> k_place, v_place;
    if (warpgroup == CONSUMERS - 1) pass_turn(warpgroup); // to the first

    const auto query_place = [&] { return q_place.stage() * CONSUMERS + warpgroup; };
    const auto queries = [&] { return shared.q + query_place() * Q_BYTES; };
    const auto keys = [&] { return shared.k + k_place.stage() * K_BYTES; };
    const auto values = [&] { return shared.v + v_place.stage() * V_BYTES; };
    const auto wait_keys = [&] {
        wait_barrier(k_full + k_place.stage() * BARRIER_BYTES, k_place.parity());
        if (GATHER) fence_async_proxy(); // lanes have copied, wgmma reads
    };
    const auto wait_values = [&] {
        wait_barrier(v_full + v_place.stage() * BARRIER_BYTES, v_place.parity());
        if (GATHER) fence_async_proxy();
    };
    const auto release_queries = [&] {
        if (speaks) arrive(shared_address(barriers.q_empty) + query_place() * BARRIER_BYTES);
        q_place.advance();
    };
    const auto release_keys = [&] {
        if (speaks) arrive(k_empty + k_place.stage() * BARRIER_BYTES);
        k_place.advance();
    };
    const auto release_values = [&] {
        if (speaks) arrive(v_empty + v_place.stage() * BARRIER_BYTES);
        v_place.advance();
    };

    State state;
    float correction[2];
    bool open = false;    // rows of a tile are still to leave,
    bool pending = false; // and values to be multiplied before:
    bool half = false;    // half a tile of them
    constexpr int HALF = HALVES ? TILE_N / 2 : TILE_N;
    int place = 0; // of its work

    const auto finish = [&] { finish_rows(p, works[place], state, unit, warpgroup, shared.out + warpgroup * OUT_BYTES, outgoing); };

    // The first `count` keys of tile n, a query tile's first.
    const auto start = [&](const Work& next, int n, auto count) {
        float scores[count.value / 2];
        wait_keys();
        begin_products();
        multiply_keys(scores, queries(), keys());
        commit_products();
        wait_products<0>();
        pin(scores);
        release_keys();
        if (n == next.tiles.begin) release_queries();
        shape_scores<true>(p, next, warpgroup, n, scores);
        online_softmax(state.rows, scores, unit, RESCALE_BITS, correction);
        pack_weights(state.weights, scores);
    };

    // The same together with the values of the query tile before, whose rows then leave.
    const auto join = [&](const Work& next, int n, auto count) {
        float scores[count.value / 2];
        Statistics rows;
        wait_keys();
        begin_products();
        multiply_keys(scores, queries(), keys());
        commit_products();
        wait_values();
        multiply_values(state, values(), half);
        commit_products();
        wait_products<1>();
        pin(scores);
        release_keys();
        if (n == next.tiles.begin) release_queries();
        shape_scores<true>(p, next, warpgroup, n, scores);
        online_softmax(rows, scores, unit, RESCALE_BITS, correction);
        wait_behind(scores, p);
        pin(state.out);
        pin(state.weights);
        release_values();
        finish();
        state = State();
        state.rows = rows;
        pack_weights(state.weights, scores);
    };

    // The products of tile n, then those of the values of tile n + 1; its softmax.
    const auto step = [&](int n, bool last, auto masked) {
        float scores[TILE_N / 2];
        wait_keys();
        wait_turn(warpgroup);
        begin_products();
        multiply_keys(scores, queries(), keys());
        commit_products();
        wait_values();
        multiply_values(state, values(), half);
        commit_products();
        half = false;
        pass_turn(warpgroup);
        wait_products<1>();
        pin(scores);
        release_keys();
        if (last) release_queries();
        shape_scores<masked.value>(p, works[place], warpgroup, n, scores);
        if constexpr (GUESSES) {
            u32 weights[TILE_N / 4];
            bool rescale = false;
            if (!guess_softmax(state.rows, scores, unit, weights)) {
                rescale = online_softmax(state.rows, scores, unit, 0.0f, correction); // or the next guess would fail too
                pack_weights(weights, scores);
            }
            wait_behind(weights, p);
            pin(state.out);
            if (rescale) rescale_out(state, correction);
            pin(state.weights);
            release_values();
#pragma unroll
            for (int i = 0; i < TILE_N / 4; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(state.weights[i]) : "r"(weights[i]));
        } else {
            const bool rescale = online_softmax(state.rows, scores, unit, RESCALE_BITS, correction);
            wait_behind(scores, p);
            pin(state.out);
            if (rescale) rescale_out(state, correction);
            pin(state.weights);
            release_values();
            pack_weights(state.weights, scores);
        }
    };

    for (int slot = 0;; slot = slot == WORKS - 1 ? 0 : slot + 1) {
        wait_barrier(shared_address(barriers.q_full) + query_place() * BARRIER_BYTES, q_place.parity());
        const Work& next = works[slot];
        const bool more = next.tile.sequence >= 0;
        const int begin = next.tiles.begin, end = next.tiles.end;
        const int seen = more ? next.seen_end[warpgroup] : begin;
        const bool narrow = HALVES && more && next.half[warpgroup];
        const auto skip_keys = [&](bool turn) {
            wait_keys();
            release_keys();
            if (turn) {
                wait_turn(warpgroup);
                pass_turn(warpgroup);
            }
        };
        const auto skip_values = [&] {
            wait_values();
            release_values();
        };
        if (pending && seen > begin) {
            for (int n = end; n > seen; --n) skip_keys(true);
            if (HALVES && narrow) join(next, seen - 1, Constant<HALF>());
            else join(next, seen - 1, Constant<TILE_N>());
        } else {
            if (pending) {
                wait_values();
                begin_products();
                multiply_values(state, values(), half);
                commit_products();
                wait_products<0>();
                pin(state.out);
                release_values();
            }
            if (open) finish();
            state = State();
            if (!more) break;
            if (seen > begin) {
                for (int n = end; n > seen; --n) skip_keys(true);
                if (HALVES && narrow) start(next, seen - 1, Constant<HALF>());
                else start(next, seen - 1, Constant<TILE_N>());
            } else {
                release_queries();
                for (int n = end; n > begin; --n) {
                    skip_keys(n > begin + 1);
                    skip_values();
                }
            }
        }
        place = slot;
        open = has_rows(next.tile, warpgroup);
        pending = seen > begin;
        half = narrow;
        if (!pending) continue;
        for (int n = end; n > seen; --n) skip_values();
        if constexpr (RAGGED_KEYS) {
            const int behind = next.rows.length - (seen - 1) * TILE_N;
            if (behind < TILE_N) {
                wait_values();
                clear_values(values(), behind, warpgroup);
            }
        }
        int n = seen - 2;
        if constexpr (MASK) {
            for (const int first = max(begin, min(next.tiles.whole_end, end)); n >= first; --n) step(n, n == begin, Constant<true>());
        }
        for (const int first = LEFT ? max(begin, next.tiles.whole_begin) : begin; n >= first; --n) step(n, n == begin, Constant<false>());
        if constexpr (LEFT) {
            for (; n >= begin; --n) step(n, n == begin, Constant<true>());
        }
    }
    if constexpr (!KV_SPLITS) {
        wait_out_free(warpgroup);
        if (threadIdx.x % WARPGROUP == 0) outgoing.tile[warpgroup].sequence = -1;
        signal_out_full(warpgroup);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward_sm90(const __grid_constant__ ForwardParams p, const __grid_constant__ TensorMaps maps) {
    extern __shared__ __align__(1024) uint4 shared_memory[];
    __shared__ Barriers barriers;
    __shared__ Work works[WORKS];
    __shared__ Outgoing outgoing;
    const Shared shared(round_up(shared_address(shared_memory), SWIZZLE_BYTES));
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
    if (threadIdx.x == 0) {
        for (int place = 0; place < QUERY_STAGES * CONSUMERS; ++place) {
            init_barrier(shared_address(barriers.q_full[0] + place), 1);
            init_barrier(shared_address(barriers.q_empty[0] + place), WARPGROUP_WARPS);
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(shared_address(barriers.k_full + stage), GATHER ? WARP_SIZE : 1);
            init_barrier(shared_address(barriers.v_full + stage), GATHER ? WARP_SIZE : 1);
            init_barrier(shared_address(barriers.k_empty + stage), CONSUMERS * WARPGROUP_WARPS);
            init_barrier(shared_address(barriers.v_empty + stage), CONSUMERS * WARPGROUP_WARPS);
        }
        publish_barriers();
    }
    if constexpr (ROWS < PRODUCT_ROWS) clear_unused_rows(shared.q);
    __syncthreads();
    if (warpgroup == SERVANTS) {
        shrink_registers<PRODUCER_REGISTERS>();
        const int warp = __shfl_sync(~0u, threadIdx.x / WARP_SIZE % WARPGROUP_WARPS, 0);
        if (warp == 0) {
            produce(p, maps, shared, barriers, works);
            // The last block to get here leaves the counters as it found them.
            if (threadIdx.x % WARP_SIZE == 0 && atomicInc(maps.counters + 1, gridDim.x - 1) == gridDim.x - 1) maps.counters[0] = 0;
        } else if (warp <= CONSUMERS && !KV_SPLITS) {
            store(p, maps, warp - 1, shared.out + (warp - 1) * OUT_BYTES, outgoing);
        }
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        consume(p, shared, barriers, outgoing, works);
    }
}
