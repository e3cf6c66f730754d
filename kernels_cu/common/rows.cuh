// Rows of a head in parts, one thread to a part, and the sequence that a row belongs to.
//
// Compile-time values: HEAD_DIM; HEAD_DIM_V, of other rows that threads take along with these (HEAD_DIM unless given);
// VECTOR, a power of two, how many elements move at once: it divides every row's address, HEAD_DIM, HEAD_DIM_V,
// ROTARY_DIM / 2 and so what lies behind them; ROTARY and ROTARY_DIM as in common/rotary.cuh.
//
// A part is one piece of VECTOR elements. Where rows are rotated it is two, so that one thread holds both elements
// of each of its VECTOR pairs: side by side, or ROTARY_DIM / 2 apart within the rotated half-and-half.
#pragma once

#include "common/types.cuh"
#include "common/rotary.cuh"

#ifndef HEAD_DIM_V
#define HEAD_DIM_V HEAD_DIM
#endif

constexpr int PIECES = ROTARY == ROTARY_NONE ? 1 : 2;
constexpr int PARTS = ceil_div(HEAD_DIM > HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V, PIECES * VECTOR);
constexpr int ROTATED_PARTS = ROTARY_DIM / 2 / VECTOR;

template <typename Type>
struct alignas(sizeof(Type) * VECTOR) Piece {
    Type at[VECTOR];
};

// What moves BYTES in one instruction.
template <int BYTES> struct Word { typedef uint4 Type; };
template <> struct Word<8> { typedef uint2 Type; };
template <> struct Word<4> { typedef u32 Type; };
template <> struct Word<2> { typedef u16 Type; };
template <> struct Word<1> { typedef u8 Type; };

template <typename Type>
constexpr int WORDS = sizeof(Piece<Type>) / sizeof(typename Word<sizeof(Piece<Type>)>::Type);

template <typename Type>
__device__ __forceinline__ void load_piece(Piece<Type>& piece, const Type* from) {
    typedef typename Word<sizeof(Piece<Type>)>::Type Whole;
#pragma unroll
    for (int i = 0; i < WORDS<Type>; ++i) reinterpret_cast<Whole*>(piece.at)[i] = reinterpret_cast<const Whole*>(from)[i];
}

// The plain store by its name: an assignment would be taken apart into one for each element.
template <typename Type>
__device__ __forceinline__ void store_piece(Type* to, const Piece<Type>& piece) {
    typedef typename Word<sizeof(Piece<Type>)>::Type Whole;
#pragma unroll
    for (int i = 0; i < WORDS<Type>; ++i) __stwb(reinterpret_cast<Whole*>(to) + i, reinterpret_cast<const Whole*>(piece.at)[i]);
}

template <typename Type>
struct Part {
    Piece<Type> pieces[PIECES];
    __device__ __forceinline__ Type& operator[](int i) { return pieces[i / VECTOR].at[i % VECTOR]; }
};

// The element of the row at which a piece of a part begins.
__device__ __forceinline__ int piece_start(int part, int piece) {
    if (ROTARY == ROTARY_HALVES && part < ROTATED_PARTS) return part * VECTOR + piece * (ROTARY_DIM / 2);
    return (part * PIECES + piece) * VECTOR;
}

// The last part may want its second piece, and a row of fewer elements than another its last parts.
template <int DIMS>
__device__ __forceinline__ bool piece_exists(int start) { return DIMS == PARTS * PIECES * VECTOR || start < DIMS; }

template <int DIMS = HEAD_DIM, typename Type>
__device__ __forceinline__ Part<Type> load_part(const Type* row, int part) {
    Part<Type> loaded = {};
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int start = piece_start(part, piece);
        if (piece_exists<DIMS>(start)) load_piece(loaded.pieces[piece], row + start);
    }
    return loaded;
}

template <int DIMS = HEAD_DIM, typename Type>
__device__ __forceinline__ void store_part(Type* row, int part, const Part<Type>& stored) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
        const int start = piece_start(part, piece);
        if (piece_exists<DIMS>(start)) store_piece(row + start, stored.pieces[piece]);
    }
}

#if ROTARY != ROTARY_NONE
// Turn the pairs of one part of a row at `position`. A row whose position the tables lack becomes NaN.
__device__ __forceinline__ void rotate_part(Part<Element>& row, int part, const RotaryElement* cos, const RotaryElement* sin, i64 position, i64 positions) {
    if (position < 0 || position >= positions) {
#pragma unroll
        for (int i = 0; i < PIECES * VECTOR; ++i) row[i] = from_float(quiet_nan());
        return;
    }
    if (part >= ROTATED_PARTS) return;
    const i64 entry = position * (ROTARY_DIM / 2) + part * VECTOR;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        Element& a = row[ROTARY == ROTARY_HALVES ? i : 2 * i];
        Element& b = row[ROTARY == ROTARY_HALVES ? VECTOR + i : 2 * i + 1];
        const float2 turned = rotate_pair(to_float(a), to_float(b), rotary_float(cos[entry + i]), rotary_float(sin[entry + i]));
        a = from_float(turned.x);
        b = from_float(turned.y);
    }
}
#endif

// Which sequence a row of a batch belongs to, and which of its rows it is; sequence -1 for a row of none.
struct Row {
    int sequence, index;
};

// A row of a packed array: the first sequence that ends behind it. Whatever cu_seqlens holds, the search ends.
__device__ __forceinline__ Row find_packed_row(const int* cu_seqlens, int batch, int row) {
    int low = 0, high = batch;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (cu_seqlens[middle + 1] > row) high = middle;
        else low = middle + 1;
    }
    if (low == batch) return {-1, 0};
    return {low, row - cu_seqlens[low]};
}
