// Attention forward for Hopper: FlashAttention-3 (arXiv:2407.08608), with the copy engine, wgmma and warps of two trades.
//
// A block stays on its multiprocessor and takes tiles of TILE_M query rows of one head (or of a packed group of heads)
// from a common counter. Some warps load: one of them finds the tile, and its rows of Q and tiles of TILE_N keys and
// values arrive through rings of buffers. CONSUMERS warpgroups compute, 64 rows each, from the last tile of keys to the
// first:
//
//     S' = Q K^T                   wgmma, under way together with
//     O  = O + P V                 that of the tile before, whose P lies in registers
//     mask S'; m, l = running row maximum and sum;  O = O * correction;  P = 2^(S' - m)
//
// So it goes on from one query tile to the next: the first product of the next one is under way together with the last
// of this one, whose rows then leave (start). The softmax of one warpgroup runs while the products of another do: they
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
// Keys in blocks of few rows (GATHER) are no boxes for the copy engine: four warps copy their chunks.
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
constexpr int SERVANTS = CONSUMERS; // the last warpgroup, of which some warps load
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

// The warps that load: one keys and one values, because a warp takes long to ask for many boxes, or four of them both.
constexpr int LOADERS = GATHER ? WARPGROUP_WARPS : 2;

// How they gather a tile: so many lanes copy the chunks of a row, and each lane looks up where one row lies.
constexpr int K_CHUNKS = 2 * D_STEPS, V_CHUNKS = 2 * ceil_div(HEAD_DIM_V, 16); // of 16 bytes of a row, up to what products read
constexpr int ROW_LANES = (K_CHUNKS | V_CHUNKS) % 8 == 0 ? 8 : (K_CHUNKS | V_CHUNKS) % 4 == 0 ? 4 : 2;
constexpr int WARP_ROWS = WARP_SIZE / ROW_LANES; // that a warp copies at once
constexpr int PASS_ROWS = LOADERS * WARP_ROWS;   // that all of them do
constexpr float RESCALE_BITS = 8.0f;

// Whether a warpgroup that sees no more than half of a tile's keys leaves the others out. Shaping takes much code already.
constexpr bool HALVES = MASK && !SOFTCAP && !ALIBI && TILE_N % 32 == 0;
constexpr bool NARROW_START = HALVES && HEAD_DIM <= 64; // of keys too, where their exponentials take as long as products

constexpr int WORKS = QUERY_STAGES + 3; // the next, those that Q is there for, one that Q has left, and one whose rows leave

// Whether scores, two tiles' weights and the output fit the registers together, with what else a thread needs, which is
// more where scores are shaped.
constexpr bool GUESSES = !SOFTCAP && !ALIBI && TILE_N + OUT_DIM / 2 + 24 <= CONSUMER_REGISTERS;

static_assert(V_BLOCKS % OUT_BLOCKS == 0, "the columns leave in equal parts");
static_assert(ROWS <= PRODUCT_ROWS && ROWS % GROUP == 0 && ROWS * CONSUMERS == TILE_M, "whole groups of heads in a product");
static_assert(TILE_N % 16 == 0 && TILE_N % BOX_ROWS == 0 && BOXES <= WARP_SIZE, "a tile of keys is whole boxes");
static_assert(CACHE_KIND != CACHE_PAGED || GATHER || BLOCK_SIZE % BOX_ROWS == 0, "a box lies within a block");
static_assert(!GATHER || TILE_N <= LOADERS * WARP_SIZE, "a lane for each row that is looked up");
static_assert(!GATHER || PASS_ROWS % 8 == 0, "a lane's rows are swizzled alike");

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
    int seen[CONSUMERS]; // by each warpgroup's rows: twice the end of the tiles of keys, and 1 if it is but half of the last
};

// Barriers and tiles in shared memory, by their addresses there.
struct Shared {
    u32 q, k, v, out;
    __device__ __forceinline__ explicit Shared(u32 base)
        : q(base), k(base + QUERY_STAGES * CONSUMERS * Q_BYTES), v(k + STAGES * K_BYTES), out(v + STAGES * V_BYTES) {}
};

struct Barriers {
    u64 q_full[QUERY_STAGES][CONSUMERS], q_empty[QUERY_STAGES][CONSUMERS]; // a warpgroup's rows come as it is done with others
    u64 k_full[STAGES], k_empty[STAGES];
    u64 v_full[STAGES], v_empty[STAGES];
};

// The barriers of the block by number: 0 is __syncthreads', then each warpgroup has one for its turn and one of its own;
// the last is the loaders'.
__device__ __forceinline__ void sync_warpgroup(int warpgroup) { sync_threads(1 + CONSUMERS + warpgroup, WARPGROUP); }
__device__ __forceinline__ void sync_loaders() { sync_threads(1 + 2 * CONSUMERS, LOADERS * WARP_SIZE); }

// ------------------------------------------------------------------------------------------------------- loading

__device__ __forceinline__ bool has_rows(const Tile& tile, int warpgroup) { return tile.first_row + warpgroup * ROWS < tile.seqlen_q * GROUP; }

// Work::seen of a warpgroup: it lets the tiles behind pass.
__device__ __forceinline__ int find_seen(const ForwardParams& p, const Work& work, int warpgroup) {
    const KeyTiles& tiles = work.tiles;
    if (tiles.end <= tiles.begin || !has_rows(work.tile, warpgroup)) return 2 * tiles.begin;
    const int last_row = min(work.tile.first_row + (warpgroup + 1) * ROWS, work.tile.seqlen_q * GROUP) - 1;
    const int key_end = visible_keys(p, last_row / GROUP, work.rows.length - work.tile.seqlen_q, work.rows.length).end;
    // No more pass than a ring holds beside the values that are still to be multiplied, for which nothing would be loaded.
    const int end = MASK ? clamp(ceil_div(key_end, TILE_N), max(tiles.begin + 1, tiles.end - (STAGES - 1)), tiles.end) : tiles.end;
    return 2 * end + (HALVES && key_end <= (end - 1) * TILE_N + TILE_N / 2);
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

// The key that a lane looks up for a tile: the first of its box, or its row.
__device__ __forceinline__ int lookup_key(int n) {
    const int warp = threadIdx.x / WARP_SIZE % WARPGROUP_WARPS, lane = threadIdx.x % WARP_SIZE;
    return n * TILE_N + (GATHER ? lane / WARP_ROWS * PASS_ROWS + warp * WARP_ROWS + lane % WARP_ROWS : lane * BOX_ROWS);
}
__device__ __forceinline__ bool looks_up(int n) { return lookup_key(n) < (n + 1) * TILE_N; }

// The block of the cache that holds that key, which is asked for long before it is needed.
__device__ __forceinline__ int look_up(const ForwardParams& p, const Work& work, int n) {
    const int key = lookup_key(n);
    if (CACHE_KIND != CACHE_PAGED || !looks_up(n) || key >= work.rows.length) return work.rows.entry;
    return __ldg(p.block_table + static_cast<i64>(work.tile.sequence) * p.table_stride + (key + work.rows.first) / BLOCK_SIZE);
}

// Whether that block is one of the cache's; if not, and some query needs its keys, the work is marked as bad.
__device__ __forceinline__ bool is_there(const ForwardParams& p, Work& work, int n, int entry) {
    const int key = lookup_key(n);
    if (!looks_up(n) || key >= work.rows.length) return false;
    if (static_cast<u32>(entry) < static_cast<u32>(p.cache_entries)) return true;
    if (min(key + (GATHER ? 1 : BOX_ROWS), work.rows.length) > work.tiles.needed) {
        work.rows.bad = true;
        __threadfence_block(); // who waits for the tile sees the mark
    }
    return false;
}

// The rows of a tile that a warp copies, of which each lane knows where one lies: bytes behind `from`, or -1 for one that
// is not there, whose elements are zero. ALL: all are there.
template <bool ALL, int CHUNKS, int DIM>
__device__ __forceinline__ void copy_rows(const u8* from, i64 offset, u32 shared) {
    constexpr int PASSES = ceil_div(TILE_N, PASS_ROWS);
    const int warp = threadIdx.x / WARP_SIZE % WARPGROUP_WARPS, lane = threadIdx.x % WARP_SIZE;
    const int first_row = warp * WARP_ROWS + lane / ROW_LANES, first_chunk = lane % ROW_LANES; // that this lane copies
    from += first_chunk * 16;
#pragma unroll (ALL ? 4 : 1)
    for (int pass = 0; pass < PASSES; ++pass) {
        const i64 at = __shfl_sync(~0u, offset, pass * WARP_ROWS + lane / ROW_LANES);
        if (TILE_N % PASS_ROWS != 0 && pass * PASS_ROWS + first_row >= TILE_N) continue;
#pragma unroll
        for (int past = 0; past < CHUNKS; past += ROW_LANES) {
            const int chunk = first_chunk + past;
            const u32 to = shared + chunk / 8 * KEY_BLOCK_BYTES + swizzled(first_row, chunk % 8) + pass * PASS_ROWS * BLOCK_ROW_BYTES;
            if constexpr (ALL && CHUNKS * 8 == DIM) copy_async_16(to, from + at + past * 16);
            else copy_async<16>(to, from + (at < 0 ? 0 : at + past * 16), at < 0 || chunk * 8 >= DIM ? 0 : 16);
        }
    }
}

// One tile of keys or of values, row by row.
template <bool VALUES>
__device__ __forceinline__ void gather_keys(const ForwardParams& p, Work& work, int n, int entry, u32 shared, u32 barrier) {
    constexpr int CHUNKS = VALUES ? V_CHUNKS : K_CHUNKS, DIM = VALUES ? HEAD_DIM_V : HEAD_DIM;
    const Strides& strides = VALUES ? p.v_strides : p.k_strides;
    const auto* from = reinterpret_cast<const u8*>((VALUES ? p.v : p.k) + work.kv_head * strides.head);
    i64 offset = looks_up(n) ? -1 : 0;
    if (is_there(p, work, n, entry)) offset = (entry * strides.outer + (lookup_key(n) + work.rows.first) % BLOCK_SIZE * strides.row) * static_cast<i64>(sizeof(KvElement));
    if (__all_sync(~0u, offset >= 0)) copy_rows<true, CHUNKS, DIM>(from, offset, shared);
    else copy_rows<false, CHUNKS, DIM>(from, offset, shared);
    arrive_copied(barrier);
}

// The same by the copy engine, a lane for each box.
template <int BLOCKS>
__device__ __forceinline__ void load_keys(const ForwardParams& p, const TensorMap& map, Work& work, int n, int entry, u32 shared, u32 barrier) {
    const int lane = threadIdx.x % WARP_SIZE;
    int row = work.rows.first + lookup_key(n);
    if (CACHE_KIND == CACHE_PAGED) {
        row = lookup_key(n) % BLOCK_SIZE;
        if (!is_there(p, work, n, entry)) entry = p.cache_entries; // outside, which gives zeros
    }
    __syncwarp(); // work may be marked as bad
    if (lane == 0) arrive_expecting(barrier, BLOCKS * KEY_BLOCK_BYTES);
    __syncwarp();
    if (lane >= BOXES) return;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        load_box(shared + block * KEY_BLOCK_BYTES + lane * BOX_ROWS * BLOCK_ROW_BYTES, map, barrier, block * BLOCK_COLUMNS, row, work.kv_head, entry);
    }
}

// What the loading warps do, with all their lanes: everything in the order in which it is needed. The first of them
// finds the work and loads the queries.
__device__ __forceinline__ void produce(const ForwardParams& p, const TensorMaps& maps, const Shared& shared, Barriers& barriers, Work (&works)[WORKS]) {
    const int lane = threadIdx.x % WARP_SIZE;
    const int warp = __shfl_sync(~0u, threadIdx.x / WARP_SIZE % WARPGROUP_WARPS, 0);
    const bool leads = warp == 0, loads_keys = GATHER || leads, loads_values = GATHER || !leads;
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
    const auto load_key_tile = [&](int slot, int n, int entry) {
        if (!loads_keys) return;
        wait_barrier(k_empty + k_place.stage() * BARRIER_BYTES, k_place.parity() ^ 1);
        const u32 to = shared.k + k_place.stage() * K_BYTES, full = k_full + k_place.stage() * BARRIER_BYTES;
        if constexpr (GATHER) gather_keys<false>(p, works[slot], n, entry, to, full);
        else load_keys<D_BLOCKS>(p, maps.k, works[slot], n, entry, to, full);
        k_place.advance();
    };
    const auto load_value_tile = [&](int slot, int n, int entry) {
        if (!loads_values) return;
        wait_barrier(v_empty + v_place.stage() * BARRIER_BYTES, v_place.parity() ^ 1);
        const u32 to = shared.v + v_place.stage() * V_BYTES, full = v_full + v_place.stage() * BARRIER_BYTES;
        if constexpr (GATHER) gather_keys<true>(p, works[slot], n, entry, to, full);
        else load_keys<V_BLOCKS>(p, maps.v, works[slot], n, entry, to, full);
        v_place.advance();
    };
    // Work is kept in shared memory by its loader too, for whom few registers are left.
    const auto note_work = [&](int slot, u32 index) {
        if (leads) {
            const Work found = find_work(p, index);
            if (lane == 0) works[slot] = found;
            __syncwarp();
            const int seen = lane < CONSUMERS && found.tile.sequence >= 0 ? find_seen(p, works[slot], lane) : 0;
            for (int warpgroup = 0; warpgroup < CONSUMERS; ++warpgroup) {
                const int by_it = __shfl_sync(~0u, seen, warpgroup);
                if (lane == 0) works[slot].seen[warpgroup] = by_it; // the lane that then tells them of the work
            }
            __syncwarp();
        }
        sync_loaders();
    };
    const auto look_up_first = [&](int slot) {
        const Work& work = works[slot];
        return work.tile.sequence >= 0 && work.tiles.end > work.tiles.begin ? look_up(p, work, work.tiles.end - 1) : 0;
    };
    note_work(0, blockIdx.x);
    int first = look_up_first(0); // where the first tile of keys lies of the work to come,
    int entry = 0;                // and the tile whose values are to be loaded next
    int before = -1;              // the slot of the work before, if its last values are still to be loaded
    for (int slot = 0;;) {
        const bool any = works[slot].tile.sequence >= 0;
        u32 index = 0;
        if (leads) {
            if (any && lane == 0) index = atomicAdd(maps.counters, 1) + gridDim.x;
            load_query_tile(slot, any);
        }
        const int begin = works[slot].tiles.begin;
        int n = works[slot].tiles.end - 1;
        const bool keys = any && n >= begin;
        if (keys) load_key_tile(slot, n, first);
        if (before >= 0) load_value_tile(before, works[before].tiles.begin, entry);
        if (!any) return;
        entry = first;
        int ahead = n > begin ? look_up(p, works[slot], n - 1) : 0;
        const int next = slot == WORKS - 1 ? 0 : slot + 1;
        note_work(next, __shfl_sync(~0u, index, 0));
        first = look_up_first(next);
        for (; n > begin; --n) {
            load_key_tile(slot, n - 1, ahead);
            load_value_tile(slot, n, entry);
            entry = ahead;
            if (n > begin + 1) ahead = look_up(p, works[slot], n - 2);
        }
        before = keys ? slot : -1;
        slot = next;
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

// Raises the running maximum where some score exceeds it by more than 2^room: `correction` is what sums and output must
// be multiplied by, and the result is true.
template <int COUNT>
__device__ __forceinline__ bool raise_maximum(Statistics& rows, const float (&scores)[COUNT], float unit, float room, float (&correction)[2]) {
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
    return rescale;
}

// From scaled scores. A row that has seen no key has nothing but -infinity.
__device__ __forceinline__ float subtracted(float maximum, float unit) { return maximum == -infinity() ? 0.0f : maximum * unit; }

// Turns scores into weights, in place, and counts them.
template <int COUNT>
__device__ __forceinline__ void weigh(Statistics& rows, float (&scores)[COUNT], float unit) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float offset = subtracted(rows.maximum[h], unit);
        float sum = 0.0f;
#pragma unroll
        for (int i = 2 * h; i < COUNT; i += 4) {
            scores[i] = exp2_approx(fmaf(scores[i], unit, -offset));
            scores[i + 1] = exp2_approx(fmaf(scores[i + 1], unit, -offset));
            sum += scores[i] + scores[i + 1];
        }
        rows.sum[h] += sum;
    }
}

// The same, the scores kept; false if some exceeds the maximum by too much, or there is none yet.
template <int COUNT>
__device__ __forceinline__ bool guess_weights(const Statistics& rows, const float (&scores)[COUNT], float unit, u32 (&weights)[COUNT / 2], float (&sum)[2]) {
    const float most = exp2f(RESCALE_BITS);
    bool good = true;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float offset = subtracted(rows.maximum[h], unit);
        sum[h] = 0.0f;
#pragma unroll
        for (int i = 2 * h; i < COUNT; i += 4) {
            const float first = exp2_approx(fmaf(scores[i], unit, -offset)), second = exp2_approx(fmaf(scores[i + 1], unit, -offset));
            sum[h] += first + second;
            weights[i / 2] = pack(first, second);
        }
        good &= sum[h] < most && rows.maximum[h] > -infinity();
    }
    return __all_sync(~0u, good);
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

// Of a warpgroup's rows those that are the sequence's.
__device__ __forceinline__ void store_some_rows(const ForwardParams& p, const Tile& tile, int warpgroup, int first_block, u32 shared) {
    constexpr int CHUNKS = OUT_BLOCKS * BLOCK_COLUMNS / 8;
    for (int index = threadIdx.x % WARPGROUP; index < ROWS * CHUNKS; index += WARPGROUP) {
        const int row = index / CHUNKS, chunk = index % CHUNKS, column = first_block * BLOCK_COLUMNS + chunk * 8;
        const QueryRow at = find_query_row(tile, warpgroup * ROWS + row);
        if (at.exists && column < HEAD_DIM_V) {
            const uint4 value = load_shared(shared + chunk / 8 * Q_BLOCK_BYTES + swizzled(row, chunk % 8));
            *reinterpret_cast<uint4*>(p.out + query_offset(p.o_strides, tile, at) + column) = value;
        }
    }
}

// Stores a warpgroup's rows, some blocks of columns at a time.
__device__ __forceinline__ void store_rows(const ForwardParams& p, const TensorMaps& maps, const State& state, const float (&scale)[2], const Tile& tile, int warpgroup, u32 shared) {
    const int thread = threadIdx.x % WARPGROUP;
#pragma unroll
    for (int first_block = 0; first_block < V_BLOCKS; first_block += OUT_BLOCKS) {
        if (thread == 0) wait_stores(); // of what was there before
        sync_warpgroup(warpgroup);
        leave_in_shared(state, scale, first_block, shared);
        fence_async_proxy();
        sync_warpgroup(warpgroup);
        if (PACKED_Q && tile.first_row + (warpgroup + 1) * ROWS > tile.seqlen_q * GROUP) {
            store_some_rows(p, tile, warpgroup, first_block, shared);
        } else if (thread == 0) {
            for (int block = 0; block < OUT_BLOCKS; ++block) {
                store_query_box(maps.out, shared + block * Q_BLOCK_BYTES, (first_block + block) * BLOCK_COLUMNS, first_token(tile, warpgroup), tile.head, PACKED_Q ? 0 : tile.sequence);
            }
            commit_stores();
        }
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
__device__ __forceinline__ void finish_rows(const ForwardParams& p, const TensorMaps& maps, const Work& work, const State& state, float unit, int warpgroup, u32 shared) {
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
    if constexpr (!KV_SPLITS) store_rows(p, maps, state, scale, tile, warpgroup, shared);
}

// What a computing warpgroup does.
__device__ __forceinline__ void consume(const ForwardParams& p, const TensorMaps& maps, const Shared& shared, Barriers& barriers, const Work (&works)[WORKS]) {
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
    const auto wait_keys = [&] { wait_barrier(k_full + k_place.stage() * BARRIER_BYTES, k_place.parity()); };
    const auto wait_values = [&] { wait_barrier(v_full + v_place.stage() * BARRIER_BYTES, v_place.parity()); };
    // What lanes have copied and wgmma reads needs a fence, which would wait for products that are under way: then both
    // operands are waited for before any, else values not before the products of keys are.
    const auto wait_operands = [&](bool any_values) {
        wait_keys();
        if constexpr (GATHER) {
            if (any_values) wait_values();
            fence_async_proxy();
        }
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
    int place = 0; // of its work

    // The first `count` keys of tile n, a query tile's first, together with the values of the query tile before. Where
    // none are pending, what lies there is multiplied all the same, and the product forgotten.
    const auto start = [&](const Work& next, int n, Statistics& rows, u32 (&weights)[TILE_N / 4], auto count) {
        float scores[count.value / 2];
        wait_operands(pending);
        begin_products();
        multiply_keys(scores, queries(), keys());
        commit_products();
        if (!GATHER && pending) wait_values();
        multiply_values(state, values(), half);
        commit_products();
        wait_products<1>();
        pin(scores);
        release_keys();
        if (n == next.tiles.begin) release_queries();
        shape_scores<true>(p, next, warpgroup, n, scores);
        raise_maximum(rows, scores, unit, RESCALE_BITS, correction);
        weigh(rows, scores, unit);
        wait_behind(scores, p);
        pin(state.out);
        pin(state.weights);
        if (pending) release_values();
        pack_weights(weights, scores);
    };

    // The products of tile n, then those of the values of tile n + 1; its softmax.
    const auto step = [&](int n, bool last, auto masked) {
        float scores[TILE_N / 2];
        wait_operands(true);
        wait_turn(warpgroup);
        begin_products();
        multiply_keys(scores, queries(), keys());
        commit_products();
        if (!GATHER) wait_values();
        multiply_values(state, values(), half);
        commit_products();
        half = false;
        pass_turn(warpgroup);
        wait_products<1>();
        pin(scores);
        release_keys();
        if (last) release_queries();
        shape_scores<masked.value>(p, works[place], warpgroup, n, scores);
        bool rescale = false;
        if constexpr (GUESSES) {
            u32 weights[TILE_N / 4];
            float sum[2];
            bool again = false; // no more than once: rows of NaN, and those that see no key, are never good
            while (!guess_weights(state.rows, scores, unit, weights, sum) && !again) {
                rescale = raise_maximum(state.rows, scores, unit, 0.0f, correction); // without room, or the next tile's guess would fail too
                again = true;
            }
            state.rows.sum[0] += sum[0];
            state.rows.sum[1] += sum[1];
            wait_behind(weights, p);
            pin(state.out);
            if (rescale) rescale_out(state, correction);
            pin(state.weights);
            release_values();
#pragma unroll
            for (int i = 0; i < TILE_N / 4; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(state.weights[i]) : "r"(weights[i]));
        } else {
            rescale = raise_maximum(state.rows, scores, unit, RESCALE_BITS, correction);
            weigh(state.rows, scores, unit);
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
        const int seen = more ? next.seen[warpgroup] / 2 : begin;
        const bool narrow = HALVES && more && next.seen[warpgroup] % 2 == 1;
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
        Statistics rows;
        u32 weights[TILE_N / 4] = {};
        if (seen > begin) {
#pragma unroll 1
            for (int n = end; n > seen; --n) skip_keys(true);
            if (NARROW_START && narrow) start(next, seen - 1, rows, weights, Constant<NARROW_START ? TILE_N / 2 : TILE_N>());
            else start(next, seen - 1, rows, weights, Constant<TILE_N>());
        } else if (pending) {
            wait_values();
            if (GATHER) fence_async_proxy();
            begin_products();
            multiply_values(state, values(), half);
            commit_products();
            wait_products<0>();
            pin(state.out);
            release_values();
        }
        if (!pending) {
#pragma unroll
            for (int i = 0; i < OUT_DIM / 2; ++i) state.out[i] = 0.0f;
        }
        if (open) finish_rows(p, maps, works[place], state, unit, warpgroup, shared.out + warpgroup * OUT_BYTES);
        if (!more) break;
        state = State();
        state.rows = rows;
#pragma unroll
        for (int i = 0; i < TILE_N / 4; ++i) state.weights[i] = weights[i];
        place = slot;
        open = has_rows(next.tile, warpgroup);
        pending = seen > begin;
        half = narrow;
        if (!pending) {
            release_queries();
#pragma unroll 1
            for (int n = end; n > begin; --n) {
                skip_keys(n > begin + 1);
                skip_values();
            }
            continue;
        }
#pragma unroll 1
        for (int n = end; n > seen; --n) skip_values();
        if constexpr (RAGGED_KEYS) {
            const int behind = next.rows.length - (seen - 1) * TILE_N;
            if (behind < TILE_N) {
                wait_values();
                clear_values(values(), behind, warpgroup);
            }
        }
        const int whole_begin = LEFT ? max(begin, next.tiles.whole_begin) : begin, whole_end = next.tiles.whole_end;
        int n = seen - 2;
        if constexpr (MASK) {
#pragma unroll 1
            for (const int first = max(begin, whole_end); n >= first; --n) step(n, n == begin, Constant<true>());
        }
#pragma unroll 1
        for (; n >= whole_begin; --n) step(n, n == begin, Constant<false>());
        if constexpr (LEFT) {
#pragma unroll 1
            for (; n >= begin; --n) step(n, n == begin, Constant<true>());
        }
    }
    if (threadIdx.x % WARPGROUP == 0) wait_stores();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) forward_sm90(const __grid_constant__ ForwardParams p, const __grid_constant__ TensorMaps maps) {
    extern __shared__ __align__(1024) uint4 shared_memory[];
    __shared__ Barriers barriers;
    __shared__ Work works[WORKS];
    const Shared shared(round_up(shared_address(shared_memory), SWIZZLE_BYTES));
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);
    if (threadIdx.x == 0) {
        for (int place = 0; place < QUERY_STAGES * CONSUMERS; ++place) {
            init_barrier(shared_address(barriers.q_full[0] + place), 1);
            init_barrier(shared_address(barriers.q_empty[0] + place), WARPGROUP_WARPS);
        }
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(shared_address(barriers.k_full + stage), GATHER ? LOADERS * WARP_SIZE : 1);
            init_barrier(shared_address(barriers.v_full + stage), GATHER ? LOADERS * WARP_SIZE : 1);
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
        if (warp < LOADERS) produce(p, maps, shared, barriers, works);
        // The last block to get here leaves the counters as it found them.
        if (threadIdx.x % WARPGROUP == 0 && atomicInc(maps.counters + 1, gridDim.x - 1) == gridDim.x - 1) maps.counters[0] = 0;
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        consume(p, maps, shared, barriers, works);
    }
}
