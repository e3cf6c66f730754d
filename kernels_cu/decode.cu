// Attention of a few queries over long caches, split over the whole chip, in one launch, from sm_80 on.
//
// All keys of the batch form one line: sequence by sequence, HEAD_TEAMS kv heads by as many, tile by tile of TILE_N keys.
// A sequence's tiles under some heads are a *unit*. Workers (thread blocks, or clusters of CLUSTER of them) take equal
// shares of that line, so that one long sequence among short ones costs no tail (stream-K, arXiv:2301.03598). Every warp
// works out the shares from the lengths on the device, of which the host knows nothing. The tiles that a worker has of
// one unit are a *portion*. Of a single sequence each unit is in UNIT_SHARES shares, which take its tiles in turns.
//
// Within a worker there are HEAD_TEAMS times KEY_TEAMS teams of TEAM_WARPS warps: for each head as many, which take the
// tiles of a portion in turns. Heads read side by side are adjacent in memory, which reads such rows faster. A team
// has a ring of STAGES tiles of its own, filled by cp.async STAGES tiles ahead and across portions, so that memory
// never waits for arithmetic. (Hopper's bulk copies do not pay: of single rows a warp issues one after the other, and
// rows of eight heads at once come without the swizzle; padded instead, they arrive more slowly.) It computes with the
// keys as rows of the matrix product and 8 ROW_TILES queries as columns: the whole group of query heads that share a kv
// head, and every new token of them:
//
//     S^T = K Q^T          16 keys x 8 queries; Q stays in registers
//     m, l = maximum and sum over keys    (one vote a tile: a maximum is raised only when it must be)
//     O^T += V^T P^T       P^T comes from S^T by movmatrix, without shared memory
//
// At the end of a portion the teams' results are merged: first those of a block, then those of a cluster, whose blocks
// send each other slices of them through distributed shared memory. If the portion is the whole of the unit, that
// is the result. Otherwise the slice goes to the workspace, and the last worker to arrive merges it with those
// of the others in their order in the line, whoever came first: results do not depend on timing.
//
// New keys and values (APPEND) are read from where the caller has them, rotated and rounded on the way, into the tile
// that waits for them. They are also put into the cache, from which nobody reads them in this launch.
//
// An 8-bit cache (KV_DTYPE) is widened to float16 between shared memory and the product, queries are brought to
// float16 by a power of two of their own, and scales go into scores and sums.
//
// Shared memory (dynamic):
//     ring      [TEAMS][STAGES]{K [TILE_N], V [TILE_N]} rows of PADDED_DIM elements, swizzled as common/copy.cuh says
//               (rows at another pitch would have the copies fetch more from L2 than they need)
//     queries   [TEAMS][QUERY_SLOTS][USED_ROWS] rows of PADDED_DIM elements and 16 bytes, with the first tile of a portion
//     outputs   [TEAMS][USED_ROWS][OUT_STRIDE] float32; with SUMS_IN_RING each at the start of its team's ring
//     stats     [TEAMS][USED_ROWS]{maximum, sum}
//     sent      [2][CLUSTER] sums of this block's slice, from every block of the cluster; of two portions in turns
//     sequences [batch] where each lies in the line and in the cache
//
// Compile-time values: DTYPE KV_DTYPE HEAD_DIM TILE_N HEAD_TEAMS KEY_TEAMS TEAM_WARPS STAGES ROW_TILES USED_ROWS
// ROW_BLOCKS GROUP KV_HEADS CLUSTER BLOCKS UNIT_SHARES LEFTPAD WIDE_OFFSETS POSITION_TILES SPLITS LEAST_POSITIONS
// CACHE_KIND BLOCK_SIZE MASK SOFTCAP ALIBI SCALE_FIRST APPEND LOAD_BYTES STORE_BYTES; of common/rotary.cuh ROTARY
// ROTARY_DIM ROTARY_FLOAT32; and for common/sequence.cuh PACKED_Q (0) and TILE_M (the rows of a unit).

#include "common/types.cuh"
#include "common/decode_params.cuh"
#include "common/sequence.cuh"
#include "common/mask.cuh"
#include "common/softmax.cuh"
#include "common/copy.cuh"
#include "common/mma.cuh"
#include "common/fp8.cuh"
#include "common/widen.cuh"
#include "common/cluster.cuh"

constexpr int TEAMS = HEAD_TEAMS * KEY_TEAMS;
constexpr int WARPS = TEAMS * TEAM_WARPS;
constexpr int THREADS = WARPS * WARP_SIZE;
constexpr int TEAM_THREADS = TEAM_WARPS * WARP_SIZE;
constexpr int WARP_ROWS = 8 * ROW_TILES;
constexpr int ROWS = WARP_ROWS * TEAM_WARPS; // of a unit; TILE_M
constexpr int BLOCK_ROWS = HEAD_TEAMS * USED_ROWS; // that are merged: those of one head, then of the next
constexpr int M_TILES = TILE_N / 16;
constexpr int STEPS = ROW_CHUNKS / 2;        // two 16-byte chunks at a time
constexpr int D_TILES = PADDED_DIM / 16;
constexpr u32 TILE_BYTES = TILE_N * ROW_BYTES;
constexpr u32 QUERY_PITCH = PADDED_DIM * 2 + 16; // an odd number of chunks: eight rows meet eight different groups of banks
constexpr u32 STAGE_BYTES = 2 * TILE_BYTES;
constexpr u32 QUERY_BYTES = USED_ROWS * QUERY_PITCH;
// UNIT_SHARES: a worker has one portion. Then a team needs one place for queries, and its ring is free for its sums.
constexpr int QUERY_SLOTS = UNIT_SHARES ? 1 : STAGES;
constexpr u32 RING_BYTES = STAGES * STAGE_BYTES; // of a team
constexpr int OUT_STRIDE = PADDED_DIM + 4;   // floats: the lanes of a column of queries then meet different banks
constexpr u32 OUTPUT_BYTES = USED_ROWS * OUT_STRIDE * 4; // of a team
constexpr bool SUMS_IN_RING = UNIT_SHARES && OUTPUT_BYTES <= RING_BYTES;
constexpr int OUT_QUADS = PADDED_DIM / 4;
constexpr int SLICE = ceil_div(BLOCK_ROWS * OUT_QUADS, CLUSTER); // quads of the rows that each block of a cluster merges
constexpr float RESCALE_BITS = 8.0f;
constexpr int PARTS_AT_ONCE = 16;            // of other workers, on the way from L2 together

static_assert(TILE_N % 16 == 0 && TILE_N <= WARP_SIZE, "a lane looks up the block of each key of a tile");
static_assert(TILE_M == ROWS, "rows of a unit");
static_assert(KV_HEADS % HEAD_TEAMS == 0, "every unit has as many heads");

// What the block knows of a sequence: every warp needs it at each new portion, and memory is busy then.
struct Sequence {
    u32 end;    // position in the line behind it
    int length; // as in Rows; ~length of rows that are bad
    int first, entry;
};

// What the blocks of a cluster have sent to one of them: the sums of its slice.
struct Sent {
    float4 out[SLICE];
    float2 stats[round_up(BLOCK_ROWS, 2)];
};

struct Shared {
    u32 ring, queries;
    char* outputs;
    float2* stats;
    Sent* sent;
    Sequence* sequences;

    __device__ __forceinline__ explicit Shared(uint4* base) {
        char* bytes = reinterpret_cast<char*>(base);
        ring = shared_address(base);
        queries = ring + TEAMS * RING_BYTES;
        outputs = bytes + (SUMS_IN_RING ? 0 : TEAMS * (RING_BYTES + QUERY_SLOTS * QUERY_BYTES));
        stats = reinterpret_cast<float2*>(bytes + TEAMS * (RING_BYTES + QUERY_SLOTS * QUERY_BYTES + (SUMS_IN_RING ? 0 : OUTPUT_BYTES)));
        sent = reinterpret_cast<Sent*>(stats + round_up(TEAMS * USED_ROWS, 2));
        sequences = reinterpret_cast<Sequence*>(sent + (CLUSTER > 1 ? 2 * CLUSTER : 0));
    }

    // A row of a team's sums.
    __device__ __forceinline__ float* output(int team, int row) const {
        return reinterpret_cast<float*>(outputs + team * (SUMS_IN_RING ? RING_BYTES : OUTPUT_BYTES)) + row * OUT_STRIDE;
    }

    __device__ __forceinline__ Rows rows(int sequence) const {
        const Sequence& found = sequences[sequence];
        const bool bad = found.length < 0;
        return {bad ? ~found.length : found.length, found.first, found.entry, bad};
    }
};

__device__ __forceinline__ int team() { return threadIdx.x / TEAM_THREADS; }
__device__ __forceinline__ int team_thread() { return threadIdx.x % TEAM_THREADS; }
__device__ __forceinline__ int head_team() { return team() / KEY_TEAMS; }
__device__ __forceinline__ int key_team() { return team() % KEY_TEAMS; }

// ---------------------------------------------------------------------------------------------- the line and its shares

// One sequence's stretch of the line, the same for each of its units.
struct Span {
    int begin;     // first tile that any query sees
    int tiles;     // at least one, so that a sequence without keys is still written
    int size;      // tiles of one position: where a unit may be cut
    int positions; // of one unit
};

// What a unit's queries are under the first of its kv heads, and under that of this thread's team.
__device__ __forceinline__ Tile unit_tile(const DecodeParams& p, int sequence, int unit) {
    return {sequence, unit / ROW_BLOCKS * HEAD_TEAMS, unit % ROW_BLOCKS * ROWS, 0, p.seqlen_q, false};
}
__device__ __forceinline__ Tile team_unit_tile(const DecodeParams& p, int sequence, int unit) {
    Tile tile = unit_tile(p, sequence, unit);
    tile.head += head_team();
    return tile;
}

constexpr int SEQUENCE_UNITS = KV_HEADS / HEAD_TEAMS * ROW_BLOCKS;

__device__ __forceinline__ Span find_span(const DecodeParams& p, int length) {
    const int shift = length - p.seqlen_q;
    const int first = visible_keys(p, 0, shift, length).begin;
    const int end = visible_keys(p, p.seqlen_q - 1, shift, length).end;
    Span span;
    span.begin = first / TILE_N;
    span.tiles = max(ceil_div(max(end, 0), TILE_N) - span.begin, 1);
    // NVRTC 12.9 and 13.0 never finish where they know that this is at least 1 and see it bounded by 2.
    asm volatile("" : "+r"(span.tiles));
    span.size = SPLITS ? max(POSITION_TILES, ceil_div(span.tiles, p.num_splits)) : POSITION_TILES;
    span.positions = ceil_div(span.tiles, span.size);
    return span;
}

// Which of the shares hold a unit.
struct UnitShares {
    u32 first, others;
};

#if !UNIT_SHARES
// The line in shares, one for each worker, or fewer of a short line; as even as whole numbers allow. (Small shares that
// workers take as they get done were tried: what they even out, their ends cost.)
struct Deal {
    u32 shares;
    u32 each, more; // positions of a share, one more for the first `more`

    __device__ __forceinline__ u32 start(u32 share) const { return share * each + min(share, more); }
    // The share that holds a position.
    __device__ __forceinline__ u32 owner(u32 position) const {
        const u32 larger = more * (each + 1);
        return position < larger ? position / (each + 1) : more + (position - larger) / each;
    }
};
#endif

// A place in the line, and what is left of a share from there on.
struct Cursor {
    Rows rows; // of the sequence
    Span span;
    int sequence, unit; // unit: kv heads and block of rows
    int from, to;       // positions of the unit that belong to the share
    int left;           // positions of the share from `from` on
    u32 line;           // position of `from` in the whole line
    int part;           // UNIT_SHARES: of which the share takes every tile that leaves this remainder
};

__device__ __forceinline__ u32 lane_index() { return threadIdx.x % WARP_SIZE; }

// The sum over the lanes up to this one.
__device__ __forceinline__ u32 sum_through(u32 value) {
#pragma unroll
    for (int step = 1; step < WARP_SIZE; step *= 2) {
        const u32 below = __shfl_up_sync(~0u, value, step);
        if (lane_index() >= step) value += below;
    }
    return value;
}

__device__ __forceinline__ void bound_portion(Cursor& at) { at.to = min(at.span.positions, at.from + at.left); }

// Brings a small block table into L2 while nobody knows yet which of its entries are in use.
__device__ __forceinline__ void prefetch_table(const DecodeParams& p, int first_thread) {
#if CACHE_KIND == CACHE_PAGED
    constexpr int LINE_ENTRIES = 128 / sizeof(int);
    constexpr int MOST_LINES = 4096;
    const int lines = ceil_div(p.cache_rows / BLOCK_SIZE, LINE_ENTRIES);
    const int index = blockIdx.x * (THREADS - first_thread) + threadIdx.x - first_thread;
    if (lines > MOST_LINES / p.batch || index >= lines * p.batch) return;
    const int sequence = p.batch == 1 ? 0 : index / lines;
    prefetch(p.block_table + static_cast<i64>(sequence) * p.table_stride + (index - sequence * lines) * LINE_ENTRIES);
#endif
}

#if UNIT_SHARES
// A single sequence: each of its units in UNIT_SHARES shares, which take tiles in turns. Which tiles those are depends on
// no length, so that block ids are looked up while the length is still on its way.
__device__ __forceinline__ Cursor find_share(const DecodeParams& p, u32 share) {
    Cursor at;
    at.sequence = 0;
    at.unit = share / UNIT_SHARES;
    at.part = share % UNIT_SHARES;
    at.rows = find_rows(p, at.sequence);
    at.span = find_span(p, at.rows.length);
    at.from = 0;
    at.to = at.span.positions;
    at.left = at.part < at.span.tiles ? at.to : 0;
    return at;
}

__device__ __forceinline__ UnitShares shares_of_unit(const Cursor& at, u32 share) {
    return {share - at.part, static_cast<u32>(min(at.span.tiles, UNIT_SHARES)) - 1};
}
#else
// By one warp: where every sequence lies, in shared memory.
__device__ __forceinline__ void lay_line(const DecodeParams& p, const Shared& shared) {
    u32 before = 0;
#pragma unroll 1
    for (int base = 0; base < p.batch; base += WARP_SIZE) {
        const int b = base + lane_index();
        const bool exists = b < p.batch;
        const Rows rows = find_rows(p, exists ? b : 0);
        const u32 end = before + sum_through(exists ? find_span(p, rows.length).positions * SEQUENCE_UNITS : 0);
        if (exists) shared.sequences[b] = {end, rows.bad ? ~rows.length : rows.length, rows.first, rows.entry};
        before = __shfl_sync(~0u, end, WARP_SIZE - 1);
    }
}

__device__ __forceinline__ Deal find_deal(const DecodeParams& p, const Shared& shared) {
    const u32 total = shared.sequences[p.batch - 1].end;
    Deal deal;
    deal.shares = min(gridDim.x / CLUSTER, (total + LEAST_POSITIONS - 1) / LEAST_POSITIONS);
    deal.each = total / deal.shares;
    deal.more = total - deal.each * deal.shares;
    return deal;
}

// The start of a share.
__device__ __forceinline__ Cursor find_share(const DecodeParams& p, const Shared& shared, const Deal& deal, u32 share) {
    Cursor at;
    at.line = deal.start(share);
    at.left = deal.start(share + 1) - at.line;
    u32 holds = 0;
    int base = -WARP_SIZE;
    while (holds == 0) {
        base += WARP_SIZE;
        holds = __ballot_sync(~0u, shared.sequences[min(base + static_cast<int>(lane_index()), p.batch - 1)].end > at.line);
    }
    at.sequence = base + __ffs(holds) - 1;
    at.rows = shared.rows(at.sequence);
    at.span = find_span(p, at.rows.length);
    const u32 within = at.line - (at.sequence > 0 ? shared.sequences[at.sequence - 1].end : 0);
    at.unit = within / at.span.positions;
    at.from = within % at.span.positions;
    bound_portion(at);
    return at;
}

__device__ __forceinline__ UnitShares shares_of_unit(const Deal& deal, const Cursor& at) {
    const u32 first = deal.owner(at.line - at.from);
    return {first, deal.owner(at.line - at.from + at.span.positions - 1) - first};
}
#endif

// On to the next unit of the share; `left` becomes 0 behind its end.
__device__ __forceinline__ void advance(const DecodeParams& p, const Shared& shared, Cursor& at) {
    at.left -= at.to - at.from;
#if !UNIT_SHARES
    at.line += at.to - at.from;
    at.from = 0;
    if (at.left == 0) return;
    if (++at.unit == SEQUENCE_UNITS) {
        at.unit = 0;
        at.rows = shared.rows(++at.sequence);
        at.span = find_span(p, at.rows.length);
    }
    bound_portion(at);
#endif
}

__device__ __forceinline__ int first_tile(const Cursor& at) { return at.from * at.span.size; }
__device__ __forceinline__ int end_tile(const Cursor& at) { return min(at.to * at.span.size, at.span.tiles); }

// ---------------------------------------------------------------------------------------------- loading

#if TEAM_WARPS > 1
__shared__ unsigned long long team_barriers[TEAMS];
#endif

// By one thread of each team, before a barrier of the block.
__device__ __forceinline__ void init_team_sync() {
#if TEAM_WARPS > 1
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(team_barriers + team())), "n"(TEAM_THREADS) : "memory");
#endif
}

// Barriers in shared memory and not the numbered ones, which racecheck does not follow when several are in use.
__device__ __forceinline__ void team_sync() {
#if TEAM_WARPS > 1
    asm volatile(
        "{\n"
        ".reg .b64 phase;\n"
        ".reg .pred all;\n"
        "mbarrier.arrive.shared.b64 phase, [%0];\n"
        "again:\n"
        "mbarrier.test_wait.shared.b64 all, [%0], phase;\n"
        "@!all bra again;\n"
        "}" ::"r"(shared_address(team_barriers + team())) : "memory");
#else
    __syncwarp();
#endif
}

// Teams take the tiles of a portion in turns over shares, blocks and teams.
constexpr int TURN = UNIT_SHARES ? UNIT_SHARES : 1;
constexpr int TILE_STEP = TURN * CLUSTER * KEY_TEAMS; // from one of a team's tiles to its next

__device__ __forceinline__ int team_tile(const Cursor& at) {
    return first_tile(at) + (key_team() * CLUSTER + cluster_rank()) * TURN + (UNIT_SHARES ? at.part : 0);
}

// The key teams of this block that have tiles of a portion.
__device__ __forceinline__ int active_teams(const Cursor& at) {
    const int behind = end_tile(at) - first_tile(at) - cluster_rank() * TURN - (UNIT_SHARES ? at.part : 0);
    return clamp(ceil_div(behind, CLUSTER * TURN), 0, KEY_TEAMS);
}

// Blocks that a tile may touch, a power of two; and how many tiles one look-up of a warp covers.
constexpr int power_above(int value) { return value <= 1 ? 1 : 2 * power_above((value + 1) / 2); }
constexpr bool ALIGNED_TILES = CACHE_KIND == CACHE_PAGED && BLOCK_SIZE % TILE_N == 0 && !LEFTPAD; // within one block each
constexpr int MOST_BLOCKS = ALIGNED_TILES ? 1 : power_above((TILE_N - 1) / BLOCK_SIZE + 2);
constexpr int TILE_BLOCKS = MOST_BLOCKS < WARP_SIZE ? MOST_BLOCKS : WARP_SIZE;
constexpr int LOOK_UP_TILES = WARP_SIZE / TILE_BLOCKS;

// The team's next tile to load. Block ids are looked up for LOOK_UP_TILES of the team's tiles at once, and for as many
// behind them: a load takes as long as a tile's copies when memory is busy.
struct Loader {
    Cursor at;
    Keys keys;
    bool fresh;    // at the start of the share, where nothing has been looked at
    bool ready;    // stands at a tile
    bool first;    // of the team's tiles of the unit
    int tile;
    int early_blocks; // EARLY_BLOCKS
    int blocks, next_blocks, used; // paged: ids, those behind them, and how many of the tiles that they cover are loaded
    u32 loaded;    // tiles
};

// Keys of the cache, without those that this launch appends.
__device__ __forceinline__ int cached_keys(const DecodeParams& p, const Keys& keys) {
    return APPEND ? max(keys.length - p.seqlen_new, 0) : keys.length;
}

// The block ids of LOOK_UP_TILES of the team's tiles from `tile` on, TILE_BLOCKS lanes for each; -1 where none is needed.
__device__ __forceinline__ int look_up_blocks(const DecodeParams& p, const Loader& load, int tile) {
    int block = -1;
#if CACHE_KIND == CACHE_PAGED
    tile += static_cast<int>(lane_index()) / TILE_BLOCKS * TILE_STEP;
    const int index = ((load.at.span.begin + tile) * TILE_N + load.keys.padding) / BLOCK_SIZE + static_cast<int>(lane_index()) % TILE_BLOCKS;
    const int first = (load.keys.needed + load.keys.padding) / BLOCK_SIZE, end = cached_keys(p, load.keys) + load.keys.padding;
    if (tile < end_tile(load.at) && index >= first && index * BLOCK_SIZE < end) block = __ldg(load.keys.table + index);
#endif
    return block;
}

// The block ids of the team's first tiles of a share, whatever the sequence's length, if no window hides its first keys.
constexpr bool EARLY_BLOCKS = UNIT_SHARES && ALIGNED_TILES;

__device__ __forceinline__ int look_up_early(const DecodeParams& p, u32 share) {
    const int tile = (key_team() * CLUSTER + cluster_rank()) * TURN + share % TURN + static_cast<int>(lane_index()) * TILE_STEP;
    const int index = tile * TILE_N / BLOCK_SIZE;
    return index < p.cache_rows / BLOCK_SIZE ? __ldg(p.block_table + index) : -1;
}

// Go on until the loader stands at a tile of this team, or the share ends.
__device__ __forceinline__ void find_tile(const DecodeParams& p, const Shared& shared, Loader& load) {
    while (!load.ready && load.at.left > 0) {
        if (!load.fresh) advance(p, shared, load.at);
        if (load.at.left == 0) return;
        load.fresh = false;
        load.tile = team_tile(load.at);
        load.ready = load.first = load.tile < end_tile(load.at);
        const Tile tile = team_unit_tile(p, load.at.sequence, load.at.unit);
        load.keys = place_keys(p, tile.sequence, load.at.rows, tile.head);
        load.keys.needed = visible_keys(p, 0, load.keys.length - p.seqlen_q, load.keys.length).begin;
        load.blocks = EARLY_BLOCKS && load.keys.needed == 0 ? load.early_blocks : look_up_blocks(p, load, load.tile);
        load.next_blocks = look_up_blocks(p, load, load.tile + LOOK_UP_TILES * TILE_STEP);
        load.used = 0;
    }
}

// Offsets of rows from Keys::k and Keys::v, in 16 bytes where that makes them 32-bit numbers: they go from lane to lane.
#if WIDE_OFFSETS
typedef i64 RowOffset;
constexpr int OFFSET_ITEMS = 1;
#else
typedef int RowOffset;
constexpr int OFFSET_ITEMS = CHUNK;
#endif

// Whether the rows of a whole tile lie evenly spaced in memory, and each pass over them is as many rows further on.
constexpr int PASS_ROWS = TEAM_THREADS / ROW_CHUNKS;
constexpr bool EVEN_ROWS = (ALIGNED_TILES || CACHE_KIND != CACHE_PAGED) && WHOLE_CHUNKS && ASYNC_COPIES && PASS_ROWS > 0 && TEAM_THREADS % ROW_CHUNKS == 0 &&
                           (PASS_ROWS & (PASS_ROWS - 1)) == 0 && TILE_N % PASS_ROWS == 0;

// A tile whose rows all exist, from its first row on. The swizzle of a later pass's row differs in bits of its own.
__device__ __forceinline__ void copy_even_rows(const DecodeParams& p, const KvElement* k, const KvElement* v, u32 stage) {
    const int row = team_thread() / ROW_CHUNKS, chunk = team_thread() % ROW_CHUNKS;
    const u32 to = stage + chunk_offset(row, chunk);
    k += row * p.k_strides.row + chunk * CHUNK;
    v += row * p.v_strides.row + chunk * CHUNK;
    const i64 k_step = PASS_ROWS * p.k_strides.row, v_step = PASS_ROWS * p.v_strides.row;
#pragma unroll
    for (int first = 0; first < TILE_N; first += PASS_ROWS) {
        const u32 there = (to ^ (swizzle(first) * 16)) + first * ROW_BYTES;
        copy_async_16(there, k);
        copy_async_16(there + TILE_BYTES, v);
        k += k_step;
        v += v_step;
    }
}

// One tile of keys and values into the ring; rows that do not exist become 0, and keys of blocks outside the cache NaN.
// Each lane finds one row, which then as many lanes copy as it has chunks.
__device__ __forceinline__ void load_tile(const DecodeParams& p, const Loader& load, u32 stage) {
    constexpr int CHUNKS = TILE_N * ROW_CHUNKS;
    constexpr int UNROLLED_PASSES = LOAD_BYTES == 16 ? CHUNKS / WARP_SIZE + 1 : 2; // small pieces take more registers
    const int first_key = (load.at.span.begin + load.tile) * TILE_N;
    if constexpr (EVEN_ROWS) {
        const bool whole = first_key >= load.keys.needed && first_key + TILE_N <= cached_keys(p, load.keys);
        const int block = ALIGNED_TILES ? __shfl_sync(~0u, load.blocks, load.used) : 0;
        if (whole && (!ALIGNED_TILES || static_cast<u32>(block) < static_cast<u32>(p.cache_entries))) {
            const int row = ALIGNED_TILES ? first_key % BLOCK_SIZE : first_key;
            const i64 k_offset = block * p.k_strides.outer + row * p.k_strides.row, v_offset = block * p.v_strides.outer + row * p.v_strides.row;
            copy_even_rows(p, load.keys.k + k_offset, load.keys.v + v_offset, stage);
            return;
        }
    }
    const int key = first_key + static_cast<int>(threadIdx.x) % TILE_N;
    const bool exists = key >= load.keys.needed && key < cached_keys(p, load.keys);
    bool valid = exists;
    i64 outer = 0;
    int inner = key;
    if (CACHE_KIND == CACHE_PAGED) {
        const int row = key + load.keys.padding;
        const int first_row = first_key + load.keys.padding;
        const int block = __shfl_sync(~0u, load.blocks, load.used * TILE_BLOCKS + row / BLOCK_SIZE - first_row / BLOCK_SIZE);
        valid = exists && static_cast<u32>(block) < static_cast<u32>(p.cache_entries);
        outer = block;
        inner = row % BLOCK_SIZE;
    }
    const RowOffset k_row = valid ? static_cast<RowOffset>((outer * p.k_strides.outer + inner * p.k_strides.row) / OFFSET_ITEMS) : 0;
    const RowOffset v_row = valid ? static_cast<RowOffset>((outer * p.v_strides.outer + inner * p.v_strides.row) / OFFSET_ITEMS) : 0;
    const u32 there = __ballot_sync(~0u, valid), bad = __ballot_sync(~0u, exists && !valid);
    if (!EVEN_ROWS && there == ~0u) {
#pragma unroll UNROLLED_PASSES
        for (int pass = 0; pass < ceil_div(CHUNKS, TEAM_THREADS); ++pass) {
            const int index = pass * TEAM_THREADS + team_thread();
            const int row = index / ROW_CHUNKS, chunk = index % ROW_CHUNKS;
            const i64 k_offset = static_cast<i64>(__shfl_sync(~0u, k_row, row)) * OFFSET_ITEMS;
            const i64 v_offset = static_cast<i64>(__shfl_sync(~0u, v_row, row)) * OFFSET_ITEMS;
            if (CHUNKS % TEAM_THREADS != 0 && index >= CHUNKS) continue;
            const u32 to = stage + chunk_offset(row, chunk);
            copy_chunk<true>(to, load.keys.k + k_offset, chunk);
            copy_chunk<true>(to + TILE_BYTES, load.keys.v + v_offset, chunk);
        }
    } else {
#pragma unroll 1
        for (int first = 0; first < CHUNKS; first += TEAM_THREADS) {
            const int index = first + team_thread();
            const int row = index / ROW_CHUNKS, chunk = index % ROW_CHUNKS;
            const i64 k_offset = static_cast<i64>(__shfl_sync(~0u, k_row, row)) * OFFSET_ITEMS;
            const i64 v_offset = static_cast<i64>(__shfl_sync(~0u, v_row, row)) * OFFSET_ITEMS;
            if (CHUNKS % TEAM_THREADS != 0 && index >= CHUNKS) continue;
            const u32 to = stage + chunk_offset(row, chunk);
            if (bad >> row & 1) store_shared(to, make_uint4(~0u, ~0u, ~0u, ~0u)); // NaN in every format
            else copy_chunk(to, load.keys.k + k_offset, chunk, there >> row & 1);
            copy_chunk(to + TILE_BYTES, load.keys.v + v_offset, chunk, there >> row & 1);
        }
    }
}

// A chunk of 16 bytes of a query row; elements past HEAD_DIM and rows that do not exist become 0.
__device__ __forceinline__ void copy_query_chunk(u32 to, const Element* row, int chunk, bool exists) {
    const Element* from = row + chunk * 8;
    if (LOAD_BYTES >= 4 && HEAD_DIM % 8 == 0) {
        const bool there = exists && chunk * 8 < HEAD_DIM;
#pragma unroll
        for (int piece = 0; piece < 16; piece += LOAD_BYTES) copy_async<LOAD_BYTES>(to + piece, there ? from + piece / 2 : row, there ? LOAD_BYTES : 0);
        return;
    }
    u32 words[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (exists && chunk * 8 + i < HEAD_DIM) words[i / 2] |= static_cast<u32>(from[i]) << i % 2 * 16;
    }
    store_shared(to, make_uint4(words[0], words[1], words[2], words[3]));
}

__device__ __forceinline__ void copy_queries(const DecodeParams& p, const Tile& tile, u32 shared) {
    constexpr int QUERY_CHUNKS = PADDED_DIM / 8;
#pragma unroll 4
    for (int index = team_thread(); index < USED_ROWS * QUERY_CHUNKS; index += TEAM_THREADS) {
        const int row = index / QUERY_CHUNKS, chunk = index % QUERY_CHUNKS;
        const QueryRow at = find_query_row(tile, row);
        copy_query_chunk(shared + row * QUERY_PITCH + chunk * 16, p.q + (at.exists ? query_offset(p.q_strides, tile, at) : 0), chunk, at.exists);
    }
}

// Where the queries of a portion are whose first tile is a team's `tile`th.
__device__ __forceinline__ u32 query_place(const Shared& shared, u32 tile) {
    return shared.queries + (team() * QUERY_SLOTS + tile % QUERY_SLOTS) * QUERY_BYTES;
}

// Fill the ring. `done` tiles are used up; each tile is a group of copies. The next unit is found before there is room
// for its tiles, so that its first blocks are looked up in time.
__device__ __forceinline__ void fill_ring(const DecodeParams& p, const Shared& shared, u32 done, Loader& load) {
#pragma unroll 1
    while (true) {
        find_tile(p, shared, load);
        if (!load.ready || load.loaded - done == STAGES) return;
        load_tile(p, load, shared.ring + team() * RING_BYTES + load.loaded % STAGES * STAGE_BYTES);
        if (load.first) copy_queries(p, team_unit_tile(p, load.at.sequence, load.at.unit), query_place(shared, load.loaded));
        commit_copies();
        ++load.loaded;
        load.first = false;
        load.tile += TILE_STEP;
        load.ready = load.tile < end_tile(load.at);
        if (++load.used == LOOK_UP_TILES) {
            load.used = 0;
            load.blocks = load.next_blocks;
            load.next_blocks = look_up_blocks(p, load, load.tile + LOOK_UP_TILES * TILE_STEP);
        }
    }
}

// Wait until the oldest of `pending` tiles has arrived.
__device__ __forceinline__ void wait_tile(u32 pending) {
    if (pending == STAGES) wait_copies<STAGES - 1>();
    else if (STAGES > 3 && pending == 3) wait_copies<2>();
    else if (pending == 2) wait_copies<1>();
    else wait_copies<0>();
}

// ---------------------------------------------------------------------------------------------- queries

// What a warp holds of a unit's queries: column 8 r + lane / 4 of its products is row `row(r)` of the unit.
struct Queries {
    u32 fragment[D_TILES][ROW_TILES][2];
};

__device__ __forceinline__ int warp_row() { return threadIdx.x / WARP_SIZE % TEAM_WARPS * WARP_ROWS; }

// The row of the unit in column i of accumulator column tile r of this lane.
__device__ __forceinline__ int lane_row(int r, int i) { return warp_row() + 8 * r + threadIdx.x % 4 * 2 + i; }

#if ROTARY
// Turns the queries of a unit where they lie.
__device__ __forceinline__ void rotate_queries(const DecodeParams& p, const Tile& tile, int used, u32 shared) {
    constexpr int PAIRS = ROTARY_DIM / 2;
#pragma unroll 4 // so that the tables' latency is paid once
    for (int index = team_thread(); index < USED_ROWS * PAIRS; index += TEAM_THREADS) {
        const int row = index / PAIRS, pair = index % PAIRS;
        const QueryRow at = find_query_row(tile, row);
        if (!at.exists) continue;
        const float2 angle = rotary_angle(p, used + (p.rotary_per_query ? at.token : 0), pair);
        const int2 dims = rotary_pair(pair);
        const u32 a = shared + row * QUERY_PITCH + dims.x * 2, b = shared + row * QUERY_PITCH + dims.y * 2;
        const float2 turned = rotate_pair(to_float(load_shared_half(a)), to_float(load_shared_half(b)), angle.x, angle.y);
        store_shared_half(a, from_float(turned.x));
        store_shared_half(b, from_float(turned.y));
    }
    team_sync();
}
#endif

#if KV_FLOAT8
// The power of two that brings a row's largest element to 1..2, so that float16 holds its elements; 1 for float16.
__device__ __forceinline__ float query_power(float largest) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const u32 exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
    return DTYPE == DTYPE_BFLOAT16 ? __uint_as_float((254 - exponent) << 23) : 1.0f;
}
#endif

// The fragments of a warp's rows. For an 8-bit cache rows become float16, times a power of two that `factor` undoes.
__device__ __forceinline__ void load_queries(const DecodeParams& p, const Tile& tile, u32 shared, Queries& queries, float (&factor)[ROW_TILES][2]) {
    const u32 lane = lane_index();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
        // Columns past the rows in use repeat the last of them, and nobody looks at what they give.
        const u32 row = shared + min(warp_row() + 8 * r + (KV_FLOAT8 ? lane / 4 : lane % 8), USED_ROWS - 1) * QUERY_PITCH;
#if !KV_FLOAT8
#pragma unroll
        for (int d = 0; d < D_TILES; ++d) load_matrix_pair(queries.fragment[d][r], row + lane / 8 % 2 * 16 + d * 32);
#else
        float largest = 0.0f;
#pragma unroll
        for (int d = 0; d < D_TILES; ++d)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 word = load_shared_word(row + d * 32 + lane % 4 * 8 + half * 4);
                queries.fragment[d][r][half] = word;
                largest = fmaxf(largest, fmaxf(fabsf(to_float(word & 0xffff)), fabsf(to_float(word >> 16))));
            }
        const float up = query_power(largest);
#pragma unroll
        for (int d = 0; d < D_TILES; ++d)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 word = queries.fragment[d][r][half];
                queries.fragment[d][r][half] = pack_operands(to_float(word & 0xffff) * up, to_float(word >> 16) * up);
            }
        const float own = key_scale(p, tile.head) / up; // of query lane / 4; a lane's products are of two others
#pragma unroll
        for (int i = 0; i < 2; ++i) factor[r][i] = __shfl_sync(~0u, own, (lane % 4 * 2 + i) * 4);
#endif
    }
}

// ---------------------------------------------------------------------------------------------- arithmetic

// A warp's accumulators. Index [r][i] is query lane_row(r, i); out[d][r][2 h + i] is element out_dim(d, h) of it.
struct State {
    float out[D_TILES][ROW_TILES][4];
    float maximum[ROW_TILES][2]; // alike in all lanes of a query
    float sum[ROW_TILES][2];     // of this lane's keys only, until the end
};

__device__ __forceinline__ int out_dim(int d, int h) {
    const int lane = threadIdx.x % WARP_SIZE;
    return !KV_FLOAT8 ? 16 * d + 8 * h + lane / 4 : 16 * d + lane / 4 * 2 + h;
}

__device__ __forceinline__ void clear(State& state) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            state.maximum[r][i] = -infinity();
            state.sum[r][i] = 0.0f;
        }
#pragma unroll
        for (int d = 0; d < D_TILES; ++d)
#pragma unroll
            for (int i = 0; i < 4; ++i) state.out[d][r][i] = 0.0f;
    }
}

// scores[m][r][2 h + i]: key 16 m + 8 h + lane / 4 of the tile for query lane_row(r, i).
__device__ __forceinline__ void multiply_keys(float (&scores)[M_TILES][ROW_TILES][4], const Queries& queries, u32 k) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) scores[m][r][i] = 0.0f;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 raw[4];
            load_matrices(raw, step_address(k, lane % 16, lane / 16, step) + m * 16 * ROW_BYTES);
#if !KV_FLOAT8
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) mma_16x8x16(scores[m][r], raw, queries.fragment[step][r][0], queries.fragment[step][r][1]);
#else
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 a[4];
                widen_adjacent(raw[2 * half], a[0], a[2]);
                widen_adjacent(raw[2 * half + 1], a[1], a[3]);
                const int d = 2 * step + half;
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) mma_16x8x16(scores[m][r], a, queries.fragment[d][r][0], queries.fragment[d][r][1]);
            }
#endif
        }
    }
}

__device__ __forceinline__ void multiply_values(State& state, const float (&weights)[M_TILES][ROW_TILES][4], u32 v) {
    const int lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        u32 b[ROW_TILES][2];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) b[r][h] = transpose_matrix(pack_operands(weights[m][r][2 * h], weights[m][r][2 * h + 1]));
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 raw[4];
            load_matrices_transposed(raw, step_address(v, lane % 8 + lane / 16 * 8, lane / 8 % 2, step) + m * 16 * ROW_BYTES);
#if !KV_FLOAT8
#pragma unroll
            for (int r = 0; r < ROW_TILES; ++r) mma_16x8x16(state.out[step][r], raw, b[r][0], b[r][1]);
#else
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 a[4];
                widen_alternate(raw[half], a[0], a[1]);
                widen_alternate(raw[2 + half], a[2], a[3]);
#pragma unroll
                for (int r = 0; r < ROW_TILES; ++r) mma_16x8x16(state.out[2 * step + half][r], a, b[r][0], b[r][1]);
            }
#endif
        }
    }
}

// Scale, soft cap, bias and, where `masked`, -infinity for the keys that a query does not see.
__device__ __forceinline__ void shape_scores(const DecodeParams& p, const Tile& tile, int seqlen_k, int first_key, bool masked, const float (&factor)[ROW_TILES][2], const float (&slope)[ROW_TILES][2], float (&scores)[M_TILES][ROW_TILES][4]) {
    const int shift = seqlen_k - p.seqlen_q;
    const int lane_key = first_key + threadIdx.x % WARP_SIZE / 4;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = find_query_row(tile, lane_row(r, i)).token;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float& score = scores[m][r][2 * h + i];
                    if (KV_FLOAT8) score *= factor[r][i];
                    if (SOFTCAP || ALIBI || SCALE_FIRST) score = transform_score(p, score, slope[r][i], token + shift - (lane_key + 16 * m + 8 * h));
                }
            if (masked) {
                const KeyRange range = visible_keys(p, token, shift, seqlen_k);
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int key = lane_key + 16 * m + 8 * h;
                        if (key >= range.end || (MASK && key < range.begin)) scores[m][r][2 * h + i] = -infinity();
                    }
            }
        }
}

// Over the eight lanes that hold the same queries.
__device__ __forceinline__ float query_maximum(float value) {
#pragma unroll
    for (int step = 4; step < WARP_SIZE; step *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}
__device__ __forceinline__ float query_sum(float value) {
#pragma unroll
    for (int step = 4; step < WARP_SIZE; step *= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// Turns scores into weights, and brings the running maximum, sum and output to the same footing.
__device__ __forceinline__ void online_softmax(State& state, float (&scores)[M_TILES][ROW_TILES][4], float unit) {
    float best[ROW_TILES][2];
    bool raise = false;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            best[r][i] = fmaxf(scores[0][r][i], scores[0][r][2 + i]);
#pragma unroll
            for (int m = 1; m < M_TILES; ++m) best[r][i] = fmaxf(best[r][i], fmaxf(scores[m][r][i], scores[m][r][2 + i]));
            raise |= (best[r][i] - state.maximum[r][i]) * unit > RESCALE_BITS;
        }
    if (__any_sync(~0u, raise)) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float raised = fmaxf(state.maximum[r][i], query_maximum(best[r][i]));
                // A row that has seen no key yet holds only zeros: any finite correction will do.
                const float correction = raised == -infinity() ? 1.0f : exp2_approx((state.maximum[r][i] - raised) * unit);
                state.maximum[r][i] = raised;
                state.sum[r][i] *= correction;
#pragma unroll
                for (int d = 0; d < D_TILES; ++d) {
                    state.out[d][r][i] *= correction;
                    state.out[d][r][2 + i] *= correction;
                }
            }
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float offset = state.maximum[r][i] == -infinity() ? 0.0f : state.maximum[r][i] * unit;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float& score = scores[m][r][2 * h + i];
                    score = exp2_approx(fmaf(score, unit, -offset));
                    state.sum[r][i] += score;
                }
        }
}

// ---------------------------------------------------------------------------------------------- new keys and values

#if APPEND
#if KV_FLOAT8
__device__ __forceinline__ KvElement stored(Element value, float scale) { return to_fp8(__fdiv_rn(to_float(value), scale)); }
__device__ __forceinline__ void put_element(u32 to, KvElement value) { store_shared_byte(to, value); }
#else
__device__ __forceinline__ KvElement stored(Element value, float) { return value; }
__device__ __forceinline__ void put_element(u32 to, KvElement value) { store_shared_half(to, value); }
#endif

// The two elements that are turned together, or adjacent ones past the rotary dimensions, of a new key and value.
struct NewPair {
    int2 dims;
    bool both; // the second exists
    KvElement key[2], value[2];
};

constexpr int NEW_PAIRS = ceil_div(HEAD_DIM, 2);

__device__ __forceinline__ NewPair find_new_pair(const DecodeParams& p, const Tile& tile, int before, int row, int pair) {
    const auto row_of = [&](const Element* base, const Strides& strides) { return base + tile.sequence * strides.outer + row * strides.row + tile.head * strides.head; };
    const Element* k_row = row_of(p.k_new, p.k_new_strides);
    const Element* v_row = row_of(p.v_new, p.v_new_strides);
    NewPair found;
    found.dims = make_int2(2 * pair, 2 * pair + 1);
#if ROTARY
    const bool turns = pair < ROTARY_DIM / 2;
    if (turns) found.dims = rotary_pair(pair);
#endif
    found.both = found.dims.y < HEAD_DIM;
    Element k0 = k_row[found.dims.x], k1 = found.both ? k_row[found.dims.y] : 0;
    const Element v0 = v_row[found.dims.x], v1 = found.both ? v_row[found.dims.y] : 0;
#if ROTARY
    if (turns) {
        const float2 angle = rotary_angle(p, before + row, pair);
        const float2 turned = rotate_pair(to_float(k0), to_float(k1), angle.x, angle.y);
        k0 = from_float(turned.x);
        k1 = from_float(turned.y);
    }
#endif
    found.key[0] = stored(k0, key_scale(p, tile.head));
    found.key[1] = stored(k1, key_scale(p, tile.head));
    found.value[0] = stored(v0, value_scale(p, tile.head));
    found.value[1] = stored(v1, value_scale(p, tile.head));
    return found;
}

// Whether the cache has a place for row `row` of a paged sequence, and where; dense rows always have one.
__device__ __forceinline__ i64 new_row_offset(const DecodeParams& p, const Keys& keys, const Strides& strides, int row, bool& valid) {
    Keys whole = keys;
    whole.padding = 0;
    return key_offset(p, whole, strides, row, valid);
}

// Puts the new rows of a tile into shared memory.
__device__ __forceinline__ void insert_new_rows(const DecodeParams& p, const Tile& tile, const Keys& keys, int before, int first, u32 stage) {
    const int cached = cached_keys(p, keys), hidden = p.seqlen_new - (keys.length - cached); // behind the padding
    const int begin = max(first, cached), end = min(first + TILE_N, keys.length);
#pragma unroll 2
    for (int index = team_thread(); index < (end - begin) * NEW_PAIRS; index += TEAM_THREADS) {
        const int key = begin + index / NEW_PAIRS;
        const NewPair pair = find_new_pair(p, tile, before, key - cached + hidden, index % NEW_PAIRS);
        bool valid;
        key_offset(p, keys, p.k_strides, key, valid);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int d = i == 0 ? pair.dims.x : pair.dims.y;
            if (i == 1 && !pair.both) break;
            const u32 to = stage + chunk_offset(key - first, d / CHUNK) + d % CHUNK * ITEM_BYTES;
            put_element(to, valid ? pair.key[i] : static_cast<KvElement>(~0u)); // or NaN
            put_element(to + TILE_BYTES, pair.value[i]);
        }
    }
    team_sync();
}

// By the teams of a kv head: writes all new rows of a sequence into the cache, whether a query sees them or not.
__device__ __forceinline__ void store_new_rows(const DecodeParams& p, const Tile& tile, const Rows& rows, const Keys& keys, int before) {
    if (rows.bad) return;
    // Rows count from the sequence's start here, padding included.
    KvElement* k = const_cast<KvElement*>(keys.k) - (CACHE_KIND == CACHE_PAGED ? 0 : rows.first * p.k_strides.row);
    KvElement* v = const_cast<KvElement*>(keys.v) - (CACHE_KIND == CACHE_PAGED ? 0 : rows.first * p.v_strides.row);
#pragma unroll 1
    for (int index = key_team() * TEAM_THREADS + team_thread(); index < p.seqlen_new * NEW_PAIRS; index += KEY_TEAMS * TEAM_THREADS) {
        const int row = index / NEW_PAIRS;
        bool valid;
        const i64 k_offset = new_row_offset(p, keys, p.k_strides, before + row, valid);
        const i64 v_offset = new_row_offset(p, keys, p.v_strides, before + row, valid);
        if (!valid) continue;
        const NewPair pair = find_new_pair(p, tile, before, row, index % NEW_PAIRS);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int d = i == 0 ? pair.dims.x : pair.dims.y;
            if (i == 1 && !pair.both) break;
            k[k_offset + d] = pair.key[i];
            v[v_offset + d] = pair.value[i];
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------- merging

// Sums of four output elements of one row.
struct Sums {
    float4 out;
    float maximum, sum; // the maximum in powers of two
};

// Adds up the first `count` of at most MOST parts; stats(i) gives a part's maximum and sum, out(i) its output.
template <int MOST, typename Stats, typename Out>
__device__ __forceinline__ Sums merge_parts(int count, Stats stats, Out out) {
    float2 part[MOST];
    Sums sums = {make_float4(0, 0, 0, 0), -infinity(), 0};
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        part[i] = i < count ? stats(i) : make_float2(-infinity(), 0);
        sums.maximum = fmaxf(sums.maximum, part[i].x);
    }
    const float offset = sums.maximum == -infinity() ? 0.0f : sums.maximum;
#pragma unroll
    for (int i = 0; i < MOST; ++i) {
        const float4 value = i < count ? out(i) : make_float4(0, 0, 0, 0);
        const float weight = exp2_approx(part[i].x - offset);
        sums.sum = fmaf(part[i].y, weight, sums.sum);
        sums.out = make_float4(fmaf(value.x, weight, sums.out.x), fmaf(value.y, weight, sums.out.y), fmaf(value.z, weight, sums.out.z), fmaf(value.w, weight, sums.out.w));
    }
    return sums;
}

__device__ __forceinline__ float warp_maximum(float value) {
#pragma unroll
    for (int step = 1; step < WARP_SIZE; step *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 1; step < WARP_SIZE; step *= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// Leaves a team's sums in shared memory.
__device__ __forceinline__ void put_state(const Shared& shared, State& state, float unit) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = lane_row(r, i);
            const float sum = query_sum(state.sum[r][i]);
            if (row >= USED_ROWS) continue;
            if (lane_index() < 4) shared.stats[team() * USED_ROWS + row] = make_float2(state.maximum[r][i] * unit, sum);
#pragma unroll
            for (int d = 0; d < D_TILES; ++d)
#pragma unroll
                for (int h = 0; h < 2; ++h) shared.output(team(), row)[out_dim(d, h)] = state.out[d][r][2 * h + i];
        }
}

// Divides the sums of one of BLOCK_ROWS and writes four elements of its output, if it is a query's.
__device__ __forceinline__ void write_result(const DecodeParams& p, const Tile& unit, int block_row, int quad, const Sums& sums, bool poison) {
    Tile tile = unit;
    tile.head += block_row / USED_ROWS;
    const QueryRow at = find_query_row(tile, block_row % USED_ROWS);
    if (!at.exists) return;
    const RowResult result = finish_row(p, at.head, sums.maximum, sums.sum, poison);
    const float scale = result.scale * (!KV_FLOAT8 ? 1.0f : value_scale(p, tile.head));
    Element* to = p.out + query_offset(p.o_strides, tile, at) + 4 * quad;
    const float values[4] = {sums.out.x * scale, sums.out.y * scale, sums.out.z * scale, sums.out.w * scale};
    if (STORE_BYTES >= 8 && 4 * quad + 4 <= HEAD_DIM) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack(values[0], values[1]), pack(values[2], values[3]));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (4 * quad + i < HEAD_DIM) to[i] = from_float(values[i]);
        }
    }
    if (p.lse != nullptr && quad == 0) p.lse[lse_offset(p, tile, at)] = result.lse;
}

// Sums of a portion in the workspace: a share has at most two that are not whole, the head of a unit that goes on in
// the next share, and what precedes it.
struct Partial {
    float4* out;   // [BLOCK_ROWS][OUT_QUADS]
    float2* stats; // [BLOCK_ROWS]
};

__device__ __forceinline__ Partial find_partial(const DecodeParams& p, u32 share, bool head) {
    float* base = p.partials + (2 * static_cast<i64>(share) + head) * BLOCK_ROWS * (PADDED_DIM + 4); // whole 16 bytes
    return {reinterpret_cast<float4*>(base), reinterpret_cast<float2*>(base + BLOCK_ROWS * PADDED_DIM)};
}

// Calls visit(block row, quad) for this thread's share of this block's slice.
template <typename Visit>
__device__ __forceinline__ void for_each_quad(Visit visit) {
    const int begin = cluster_rank() * SLICE, end = min(begin + SLICE, BLOCK_ROWS * OUT_QUADS);
#pragma unroll 1
    for (int index = begin + threadIdx.x; index < end; index += THREADS) visit(index / OUT_QUADS, index % OUT_QUADS);
}

// The sums of the teams of this block that had tiles.
__device__ __forceinline__ Sums sum_teams(const Shared& shared, int block_row, int quad, int active) {
    const int first = block_row / USED_ROWS * KEY_TEAMS, row = block_row % USED_ROWS;
    return merge_parts<KEY_TEAMS>(
        active, [&](int source) { return shared.stats[(first + source) * USED_ROWS + row]; },
        [&](int source) { return *reinterpret_cast<const float4*>(shared.output(first + source, row) + 4 * quad); });
}

#if CLUSTER > 1
// Each block sends every other its slice of the block's sums. Of two portions that follow one another each has its own
// place: one who still reads the former has not yet come to the barrier behind the latter.
__device__ __forceinline__ void send_block_sums(const Shared& shared, Sent* place, int active) {
#pragma unroll 4
    for (int item = threadIdx.x; item < BLOCK_ROWS * OUT_QUADS; item += THREADS) {
        const int row = item / OUT_QUADS, quad = item % OUT_QUADS;
        const Sums sums = sum_teams(shared, row, quad, active);
        store_cluster_quad(cluster_address(shared_address(place->out + item % SLICE), item / SLICE), sums.out);
        for (int rank = quad; rank < CLUSTER; rank += OUT_QUADS) {
            store_cluster_pair(cluster_address(shared_address(place->stats + row), rank), make_float2(sums.maximum, sums.sum));
        }
    }
}

__device__ __forceinline__ Sums sum_blocks(const Sent* sent, int row, int quad) {
    const int item = (row * OUT_QUADS + quad) % SLICE;
    return merge_parts<CLUSTER>(
        CLUSTER, [&](int rank) { return sent[rank].stats[row]; }, [&](int rank) { return sent[rank].out[item]; });
}
#endif

// Adds 1 to a counter that goes from `most` back to 0, and returns what it was. What this block wrote before is seen by
// whoever counts later.
__device__ __forceinline__ u32 increment_wrapping(u32* counter, u32 most) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(most) : "memory");
    return before;
}

// Merges what `count` shares from `first` on left of a unit: a warp takes a row, whose statistics its lanes read
// together, and each lane quads of it.
__device__ __forceinline__ void merge_shares(const DecodeParams& p, const Tile& unit, u32 first, u32 count, bool poison) {
    const int begin = cluster_rank() * SLICE, end = min(begin + SLICE, BLOCK_ROWS * OUT_QUADS);
    const u32 lane = lane_index();
#pragma unroll 1
    for (int row = begin / OUT_QUADS + threadIdx.x / WARP_SIZE; row * OUT_QUADS < end; row += WARPS) {
#pragma unroll 1
        for (int quad = lane; quad < round_up(OUT_QUADS, WARP_SIZE); quad += WARP_SIZE) {
            const int item = row * OUT_QUADS + quad;
            const bool mine = quad < OUT_QUADS && item >= begin && item < end;
            Sums sums = {make_float4(0, 0, 0, 0), -infinity(), 0};
#pragma unroll 1
            for (u32 base = 0; base < count; base += WARP_SIZE) {
                float4 value[PARTS_AT_ONCE];
                const auto load_parts = [&](u32 batch) {
#pragma unroll
                    for (u32 i = 0; i < PARTS_AT_ONCE; ++i) {
                        const u32 other = base + batch + i;
                        value[i] = mine && other < count ? __ldcg(find_partial(p, first + other, other == 0).out + item) : make_float4(0, 0, 0, 0);
                    }
                };
                const float2 part = base + lane < count ? __ldcg(find_partial(p, first + base + lane, base + lane == 0).stats + row) : make_float2(-infinity(), 0);
                load_parts(0); // on their way together with the statistics
                const float raised = fmaxf(sums.maximum, warp_maximum(part.x));
                const float offset = raised == -infinity() ? 0.0f : raised;
                const float before = exp2_approx(sums.maximum - offset), weight = exp2_approx(part.x - offset);
                sums = {make_float4(sums.out.x * before, sums.out.y * before, sums.out.z * before, sums.out.w * before), raised, sums.sum * before + warp_sum(part.y * weight)};
#pragma unroll 1
                for (u32 batch = 0; batch < WARP_SIZE && base + batch < count; batch += PARTS_AT_ONCE) {
                    if (batch > 0) load_parts(batch);
#pragma unroll
                    for (u32 i = 0; i < PARTS_AT_ONCE; ++i) {
                        const float factor = __shfl_sync(~0u, weight, batch + i);
                        sums.out = make_float4(fmaf(value[i].x, factor, sums.out.x), fmaf(value[i].y, factor, sums.out.y), fmaf(value[i].z, factor, sums.out.z), fmaf(value[i].w, factor, sums.out.w));
                    }
                }
            }
            if (mine) write_result(p, unit, row, quad, sums, poison);
        }
    }
}

// Merge a finished portion, the worker's `portion`th, over teams, blocks and workers, and write what is complete.
__device__ __forceinline__ void merge_portion(const DecodeParams& p, const Shared& shared, const Cursor& at, const UnitShares& held, u32 share, u32 portion, bool poison) {
    __shared__ bool last;
    const Tile unit = unit_tile(p, at.sequence, at.unit);
    const int active = active_teams(at);
    __syncthreads(); // all teams have put their sums
#if CLUSTER > 1
    Sent* sent = shared.sent + portion % 2 * CLUSTER;
    if (portion == 0) cluster_wait(); // all blocks are there
    send_block_sums(shared, sent + cluster_rank(), active);
    cluster_arrive();
    cluster_wait();
#endif
    const bool whole = held.others == 0;
    const Partial own = find_partial(p, share, share == held.first);
    for_each_quad([&](int row, int quad) {
#if CLUSTER > 1
        const Sums sums = sum_blocks(sent, row, quad);
#else
        const Sums sums = sum_teams(shared, row, quad, active);
#endif
        if (whole) {
            write_result(p, unit, row, quad, sums, poison);
        } else {
            __stcg(own.out + row * OUT_QUADS + quad, sums.out);
            __stcg(own.stats + row, make_float2(sums.maximum, sums.sum)); // each slice that has some of the row
        }
    });
    __syncthreads();
    if (whole) return;
    // The counter wraps to 0 for the next launch.
    if (threadIdx.x == 0) last = increment_wrapping(p.counters + held.first * CLUSTER + cluster_rank(), held.others) == held.others;
    __syncthreads();
    if (last) merge_shares(p, unit, held.first, held.others + 1, poison);
}

// ---------------------------------------------------------------------------------------------- the kernel

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, BLOCKS) decode(const __grid_constant__ DecodeParams p) {
    extern __shared__ __align__(1024) uint4 shared_memory[];
    const Shared shared(shared_memory);

    const u32 worker = blockIdx.x / CLUSTER;
    cluster_arrive();
    if (team_thread() == 0) init_team_sync();
#if UNIT_SHARES
    Loader load;
    if constexpr (EARLY_BLOCKS) load.early_blocks = look_up_early(p, worker);
    else prefetch_table(p, 0);
    Cursor at = find_share(p, worker);
    if (at.left == 0) {
        cluster_wait();
        return;
    }
    if constexpr (TEAM_WARPS > 1) __syncthreads();
#else
    if (threadIdx.x < WARP_SIZE) lay_line(p, shared);
    else prefetch_table(p, WARP_SIZE);
    __syncthreads();
    const Deal deal = find_deal(p, shared);
    if (worker >= deal.shares) {
        cluster_wait();
        return;
    }
    Cursor at = find_share(p, shared, deal, worker);
    Loader load;
#endif

    const float unit = score_unit(p);
    load.at = at;
    load.fresh = true;
    load.ready = false;
    load.loaded = 0;
    u32 done = 0; // tiles
    for (u32 portion = 0; at.left > 0; advance(p, shared, at), ++portion) {
        const Tile tile = team_unit_tile(p, at.sequence, at.unit);
        const Rows& rows = at.rows;
        const Keys keys = place_keys(p, tile.sequence, rows, tile.head);
        const int seqlen_k = keys.length, shift = seqlen_k - p.seqlen_q;
        const int before = rows.first + rows.length - p.seqlen_new; // tokens ahead of the new ones, padding counted
        const KeyRange first_sees = visible_keys(p, tile.first_row / GROUP, shift, seqlen_k);
        const KeyRange last_sees = visible_keys(p, min((tile.first_row + ROWS - 1) / GROUP, p.seqlen_q - 1), shift, seqlen_k);
        Queries queries;
        float factor[ROW_TILES][2], slope[ROW_TILES][2];
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int i = 0; i < 2; ++i) slope[r][i] = alibi_slope(p, tile, find_query_row(tile, lane_row(r, i)));
        State state;
        clear(state);
        const int own_first = team_tile(at);
        for (int t = own_first;; t += TILE_STEP) {
            fill_ring(p, shared, done, load);
#if APPEND
            // While the first tiles are on their way.
            if (t == own_first && at.to == at.span.positions && tile.first_row == 0 && cluster_rank() == 0 && (!UNIT_SHARES || at.part == 0)) {
                store_new_rows(p, tile, rows, keys, before);
            }
#endif
            if (t >= end_tile(at)) break;
            const u32 from = shared.ring + team() * RING_BYTES + done % STAGES * STAGE_BYTES;
            const int first_key = (at.span.begin + t) * TILE_N;
            wait_tile(load.loaded - done);
            team_sync(); // the tile has arrived for all of the team
            if (t == own_first) {
#if ROTARY
                rotate_queries(p, tile, before, query_place(shared, done));
#endif
                load_queries(p, tile, query_place(shared, done), queries, factor);
            }
#if APPEND
            if (first_key + TILE_N > cached_keys(p, keys)) insert_new_rows(p, tile, keys, before, first_key, from);
#endif
            float scores[M_TILES][ROW_TILES][4];
            multiply_keys(scores, queries, from);
            const bool masked = first_key + TILE_N > first_sees.end || first_key < last_sees.begin;
            shape_scores(p, tile, seqlen_k, first_key, masked, factor, slope, scores);
            online_softmax(state, scores, unit);
            multiply_values(state, scores, from + TILE_BYTES);
            team_sync(); // all of the team are done with the tile
            ++done;
        }
        if (own_first < end_tile(at)) put_state(shared, state, unit);
#if UNIT_SHARES
        const UnitShares held = shares_of_unit(at, worker);
#else
        const UnitShares held = shares_of_unit(deal, at);
#endif
        merge_portion(p, shared, at, held, worker, portion, keys.bad);
    }
    wait_copies<0>();
}
