// Which tiles of keys the rows of a query tile see, and which of them need no mask.
//
// Compile-time values: TILE_M, GROUP, TILE_N keys of a tile; KV_SPLITS whether p.kv_splits blocks share a tile's keys.
#pragma once

#include "common/sequence.cuh"
#include "common/mask.cuh"

struct KeyTiles {
    int begin, end;             // tiles of keys that any row sees
    int whole_begin, whole_end; // among them those that every row sees whole
    int needed;                 // the first key that any row sees
};

__device__ __forceinline__ KeyTiles find_key_tiles(const ForwardParams& p, const Tile& tile, int seqlen_k, int split) {
    const int shift = seqlen_k - tile.seqlen_q;
    const int last_row = min(tile.first_row + TILE_M, tile.seqlen_q * GROUP) - 1;
    const KeyRange first_sees = visible_keys(p, tile.first_row / GROUP, shift, seqlen_k);
    const KeyRange last_sees = visible_keys(p, last_row / GROUP, shift, seqlen_k);
    KeyTiles tiles;
    tiles.needed = first_sees.begin;
    tiles.begin = first_sees.begin / TILE_N;
    tiles.end = ceil_div(max(last_sees.end, 0), TILE_N);
    tiles.whole_begin = ceil_div(last_sees.begin, TILE_N);
    tiles.whole_end = max(first_sees.end, 0) / TILE_N;
    if constexpr (KV_SPLITS) {
        const int begin = tiles.begin;
        const i64 count = max(tiles.end - begin, 0);
        tiles.begin = begin + static_cast<int>(count * split / p.kv_splits);
        tiles.end = begin + static_cast<int>(count * (split + 1) / p.kv_splits);
    }
    return tiles;
}
