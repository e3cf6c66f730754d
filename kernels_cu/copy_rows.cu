// Rows of keys and values from one place to another, where either may be blocks of a paged cache: a block copied before
// it is written to, a sequence gathered, blocks moved to host memory and back. Bits are moved, whatever they stand for.
//
// Token i of a side lies in row i % block_size of its block i / block_size, or of the block whose number the side's list
// has there. One thread moves a word of a key and of its value; blockIdx.y is the layer.
//
// Compile-time values: WORD_BYTES, that move at once: they divide every address; THREADS.

typedef long long i64;
typedef unsigned int u32;

#if WORD_BYTES == 16
typedef uint4 Word;
#elif WORD_BYTES == 8
typedef uint2 Word;
#elif WORD_BYTES == 4
typedef u32 Word;
#elif WORD_BYTES == 2
typedef unsigned short Word;
#else
typedef unsigned char Word;
#endif

// Keys and values have the same strides, in words.
struct Side {
    Word* k;
    Word* v;
    const int* blocks; // null: in order
    i64 layer, outer, row, head;
};

// The one argument. cupyattn/kernels/copy_rows.py packs the same fields in the same order.
struct CopyParams {
    Side source, target;
    i64 first;  // token of the source that is token 0 of the target
    i64 tokens;
    int chunk;  // tokens of a thread block
    int block_size, heads, words; // words of a head
};

__device__ __forceinline__ i64 find_word(const Side& side, int block_size, i64 token, int head) {
    const i64 block = token / block_size;
    const i64 outer = side.blocks != nullptr ? side.blocks[block] : block;
    return blockIdx.y * side.layer + outer * side.outer + (token - block * block_size) * side.row + head * side.head;
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_rows(const __grid_constant__ CopyParams p) {
    const i64 start = static_cast<i64>(blockIdx.x) * p.chunk;
    const u32 row_words = p.heads * p.words;
    const u32 count = min(static_cast<i64>(p.chunk), p.tokens - start) * row_words;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        const u32 token = i / row_words, within = i - token * row_words;
        const int head = within / p.words, word = within % p.words;
        const i64 from = find_word(p.source, p.block_size, p.first + start + token, head) + word;
        const i64 to = find_word(p.target, p.block_size, start + token, head) + word;
        const Word k = p.source.k[from], v = p.source.v[from];
        p.target.k[to] = k;
        p.target.v[to] = v;
    }
}
