// Rows turned for their positions (common/rotary.cuh), in place or into another array: one thread a part of a row.
//
// Row i of sequence b is at position offsets[b] + i, or with PER_ROW 0 at offsets[b]. Rows of a packed array behind its
// last sequence are copied as they are. A row whose position the tables do not have becomes NaN.
//
// Compile-time values: DTYPE HEAD_DIM VECTOR PACKED PER_ROW ROTARY ROTARY_DIM ROTARY_FLOAT32 THREADS.

#include "common/types.cuh"
#include "common/params.cuh"
#include "common/rotary.cuh"
#include "common/rows.cuh"

// The one argument. cupyattn/kernels/rotary.py packs the same fields in the same order.
struct RotaryParams {
    const Element* x;
    Element* out;              // x itself, or apart from it
    const RotaryElement* cos;
    const RotaryElement* sin;
    const int* offsets;        // null: uniform_offset for all
    const int* cu_seqlens;     // PACKED
    i64 uniform_offset;
    Strides x_strides, out_strides;
    int batch, total, seqlen, num_heads;
    int positions;             // rows of the tables
};

extern "C" __global__ void __launch_bounds__(THREADS) rotary(const __grid_constant__ RotaryParams p) {
    const i64 index = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= static_cast<i64>(p.total) * p.num_heads * PARTS) return;
    const int part = index % PARTS;
    const int head = index / PARTS % p.num_heads;
    const int row = index / PARTS / p.num_heads;
#if PACKED
    const Row at = find_packed_row(p.cu_seqlens, p.batch, row);
    const auto offset = [&](const Strides& s) { return row * s.row + head * s.head; };
#else
    const Row at = {row / p.seqlen, row % p.seqlen};
    const auto offset = [&](const Strides& s) { return at.sequence * s.outer + at.index * s.row + head * s.head; };
#endif
    Part<Element> x = load_part(static_cast<const Element*>(p.x + offset(p.x_strides)), part);
    if (at.sequence >= 0) {
        const i64 first = p.offsets != nullptr ? p.offsets[at.sequence] : p.uniform_offset;
        rotate_part(x, part, p.cos, p.sin, PER_ROW ? first + at.index : first, p.positions);
    }
    store_part(p.out + offset(p.out_strides), part, x);
}
