// Page tables of compat.flashinfer, which come as flat int32 arrays: what the host must know of them goes to its memory,
// and a block table is made of them, in one launch where all is on the device. Compile-time values: THREADS.

constexpr int ARRAYS = 4;

// The one argument of each kernel. cupyattn/kernels/page_table.py packs the same fields in the same order.
struct ReadParams {
    const int* arrays[ARRAYS];
    int ends[ARRAYS];  // of the arrays in the target, where each begins at the end of the one before
    int* target;  // pinned memory of the host's
};

struct FillParams {
    const int* starts;
    const int* ids;
    const int* last;  // null: the lengths are there already
    int* table;
    int* lengths;
    int columns;
    int page_size;
};

struct TakeParams {
    FillParams fill;  // its table is null, and columns 0, where none is to be made
    int least;  // ids of the sequence that has most: for fewer, the host takes a narrower table
    const int* query_starts;  // null where there are none
    int* target;  // pinned memory of the host's: a Summary in SUMMARY_WORDS, and behind it starts, last and query_starts
    int batch;
    int most_ids;  // that there may be in all
};

constexpr int SUMMARY_WORDS = 8;

enum State { REFUSED, GOOD, FILLED };  // numbers that something is wrong with, good ones, and those of a new table

// What the host plans by.
struct Summary {
    int state;
    int ids;  // of all sequences
    int widest;  // ids of the sequence that has most
    int queries;
    int longest;  // queries of the sequence that has most
};

// One launch in place of a transfer for each array.
extern "C" __global__ void __launch_bounds__(THREADS) read_indices(const __grid_constant__ ReadParams p) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    int begin = 0;
#pragma unroll
    for (int a = 0; a < ARRAYS; a++) {
        if (begin <= i && i < p.ends[a]) p.target[i] = p.arrays[a][i - begin];
        begin = p.ends[a];
    }
}

// Row b of the table becomes ids[starts[b]] to ids[starts[b + 1] - 1]: a column of thread blocks for each row. With
// `last`, the tokens in each sequence's last page, also how many tokens each sequence has.
__device__ void fill_row(const FillParams& p) {
    const int b = blockIdx.x, start = p.starts[b];
    const int count = min(p.starts[b + 1] - start, p.columns);  // is never more, unless somebody has changed the array
    if (p.last && blockIdx.y == 0 && threadIdx.x == 0) p.lengths[b] = count > 0 ? (count - 1) * p.page_size + p.last[b] : 0;
    int* row = p.table + static_cast<long long>(b) * p.columns;
    for (int i = blockIdx.y * THREADS + threadIdx.x; i < count; i += gridDim.y * THREADS) row[i] = p.ids[start + i];
}

extern "C" __global__ void __launch_bounds__(THREADS) fill_table(const __grid_constant__ FillParams p) { fill_row(p); }

// Every thread of a block gets it.
__device__ Summary summarize(const TakeParams& p) {
    __shared__ int widest, longest;
    if (threadIdx.x == 0) widest = longest = 0;
    __syncthreads();
    const int *starts = p.fill.starts, *queries = p.query_starts;
    bool wrong = starts[0] != 0 || starts[p.batch] > p.most_ids || (queries && queries[0] != 0);
    for (int b = threadIdx.x; b < p.batch; b += THREADS) {
        const int start = starts[b], end = starts[b + 1], last = p.fill.last[b];
        wrong |= end < start || (end > start && (last < 1 || last > p.fill.page_size));
        if (end > start) atomicMax(&widest, end - start);
        if (!queries) continue;
        wrong |= queries[b + 1] < queries[b];
        if (queries[b + 1] > queries[b]) atomicMax(&longest, queries[b + 1] - queries[b]);
    }
    wrong = __syncthreads_or(wrong);
    const State state = wrong ? REFUSED : p.least <= widest && widest <= p.fill.columns ? FILLED : GOOD;
    return {state, starts[p.batch], widest, queries ? queries[p.batch] : 0, longest};
}

__device__ void copy(int* target, const int* source, int count) {
    for (int i = threadIdx.x; i < count; i += THREADS) target[i] = source[i];
}

// The table of numbers that nothing is wrong with, if its width is right. The first thread block says what it is made of.
// Each looks at all sequences, so that none waits for another.
extern "C" __global__ void __launch_bounds__(THREADS) take_table(const __grid_constant__ TakeParams p) {
    const Summary found = summarize(p);
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        if (threadIdx.x == 0) *reinterpret_cast<Summary*>(p.target) = found;
        int* behind = p.target + SUMMARY_WORDS;
        copy(behind, p.fill.starts, p.batch + 1);
        copy(behind + p.batch + 1, p.fill.last, p.batch);
        if (p.query_starts) copy(behind + 2 * p.batch + 1, p.query_starts, p.batch + 1);
    }
    if (found.state == FILLED) fill_row(p.fill);
}
