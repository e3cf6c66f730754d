// Page tables of compat.flashinfer, which come as flat int32 arrays: what the host must know of them goes to its memory,
// and a block table is made of them. Compile-time values: THREADS.

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
extern "C" __global__ void __launch_bounds__(THREADS) fill_table(const __grid_constant__ FillParams p) {
    const int b = blockIdx.x, start = p.starts[b];
    const int count = min(p.starts[b + 1] - start, p.columns);  // is never more, unless somebody has changed the array
    if (p.last && blockIdx.y == 0 && threadIdx.x == 0) p.lengths[b] = count > 0 ? (count - 1) * p.page_size + p.last[b] : 0;
    int* row = p.table + static_cast<long long>(b) * p.columns;
    for (int i = blockIdx.y * THREADS + threadIdx.x; i < count; i += gridDim.y * THREADS) row[i] = p.ids[start + i];
}
