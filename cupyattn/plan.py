"""Problem + device -> Plan: which kernel, which tile, which grid. Every heuristic of the library lives here.

A `Plan` holds no pointer and depends on nothing but its two arguments, so it can be made, read and tested for a
chip that is not present. The measurements that justify a choice stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from .problem import Append, Cache, Problem, Rotary, refuse

if TYPE_CHECKING:
    from .rotary import Rotation
    from .states import Merge

Defines = tuple[tuple[str, int], ...]

DTYPE_CODES = {"float16": 0, "bfloat16": 1, "float32": 2, "float8_e4m3fn": 3, "float8_e5m2": 4}
CACHE_CODES = {"dense": 0, "packed": 1, "paged": 2}
KERNELS = ("forward_sm90", "forward_sm80", "forward_simt", "decode")
UNBOUNDED = -1


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan needs to know of a GPU. Sizes in bytes."""

    arch: str  # as NVRTC names it behind "sm_": "80", "90a"
    multiprocessors: int
    shared_per_block: int  # the most that a block can ask for
    shared_per_multiprocessor: int
    name: str = ""

    def clusters(self, blocks: int) -> int:
        """How many clusters of so many blocks run at once for sure, one block to a multiprocessor.

        A cluster lies within one group of multiprocessors, whose sizes differ from chip to chip: an H200 of 132 holds
        30 clusters of 4 or 15 of 8 (cuOccupancyMaxActiveClusters). More than fit would wait for a second turn.
        """
        all_of_them = self.multiprocessors // blocks
        return all_of_them if blocks == 1 else all_of_them - all_of_them // 8

    @property
    def capability(self) -> int:
        """Compute capability times ten: 75, 80, 90, …"""
        return int(self.arch.rstrip("af"))


# Shared-memory limits and a typical member of every generation, for compiling and planning ahead of any device
# (CUDA programming guide, compute capabilities).
DEVICES = {
    "70": Device("70", 80, 96 << 10, 96 << 10, "V100"),
    "75": Device("75", 40, 64 << 10, 64 << 10, "T4"),
    "80": Device("80", 108, 163 << 10, 164 << 10, "A100"),
    "86": Device("86", 84, 99 << 10, 100 << 10, "A10"),
    "89": Device("89", 128, 99 << 10, 100 << 10, "RTX 4090"),
    "90a": Device("90a", 132, 227 << 10, 228 << 10, "H100, H200"),
    "100a": Device("100a", 148, 227 << 10, 228 << 10, "B200"),
    "120a": Device("120a", 170, 99 << 10, 100 << 10, "RTX 5090"),
}
SHARED_RESERVED = 1 << 10  # the system's share of every block
STATIC_SHARED = 1 << 10  # a kernel's own, which also aligns the tiles behind it


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of one thread block's work in forward_sm80."""

    rows: int  # query rows
    keys: int  # keys per step
    warps: int
    stages: int  # K, V buffers

    def shared_bytes(self, padded_dim: int) -> int:
        return (self.rows + 2 * self.stages * self.keys) * padded_dim * 2

    def accumulators(self, padded_dim: int) -> int:
        """Registers of a thread that hold scores and output through the main loop."""
        return self.rows // self.warps * (self.keys + padded_dim) // 32


@dataclass(frozen=True, slots=True)
class HopperTile:
    """The shape of one thread block's work in forward_sm90: so many computing warpgroups, and one that loads."""

    consumers: int
    keys: int  # per step
    stages: int  # buffers of K, and of V
    query_stages: int  # buffers of Q
    out_columns: int  # of the output that at most lie in shared memory on their way to memory

    @property
    def rows(self) -> int:
        """Query rows, where no heads are packed into them."""
        return PRODUCT_ROWS * self.consumers

    @property
    def warps(self) -> int:
        return 4 * (self.consumers + 1)

    def registers(self, indexed: bool, gather: bool) -> tuple[int, int]:
        """Of a thread that loads, and of one that computes: the multiprocessor's 64 Ki shared out in units of 8."""
        if self.consumers == 3:
            return (56, 152) if indexed and self.keys <= 96 else (32, 160)
        return (72, 216) if gather else (56, 224) if indexed else (40, 232)

    def out_blocks(self, head_dim_v: int) -> int:
        """The output's columns in shared memory in blocks, of which those of a row are a multiple."""
        return math.gcd(self.out_columns // BLOCK_COLUMNS, _ceil_div(head_dim_v, BLOCK_COLUMNS))

    def shared_bytes(self, head_dim: int, head_dim_v: int) -> int:
        columns, v_columns = (_round_up(dim, BLOCK_COLUMNS) for dim in (head_dim, head_dim_v))
        keys = self.stages * self.keys
        rows = (self.query_stages * self.rows + keys) * columns + keys * v_columns
        return (rows + self.rows * self.out_blocks(head_dim_v) * BLOCK_COLUMNS) * 2 + SWIZZLE_BYTES


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """Tiles of forward_sm90 for keys and values of up to so many dimensions."""

    head_dim: int
    few: HopperTile  # with few keys to a sequence, or few queries
    many: HopperTile  # with at least so many:
    many_queries: int
    many_full: int | None  # keys without a mask,
    many_masked: int | None  # and with one
    paged: HopperTile  # the same in blocks that boxes bring
    packed: HopperTile  # where lengths stay on the device
    lean: HopperTile  # else: in blocks, for few rows, and to shape scores or count splits, which takes registers

    def choose(self, problem: Problem, masked: bool) -> HopperTile:
        """By what is known of the lengths."""
        most = self.many_masked if masked else self.many_full
        many = most is not None and problem.seqlen_k >= most and problem.seqlen_q >= self.many_queries
        paged = problem.cache.kind == "paged"
        if problem.packed_q:
            tile = self.lean if paged else self.packed
        elif paged:
            tile = self.paged if many and _box_rows(problem, self.paged.keys) else self.lean
        else:
            tile = self.many if many else self.few
        shaped = problem.softcap or problem.alibi
        few_rows = not problem.packed_q and problem.seqlen_q * problem.group <= self.lean.rows
        if tile.consumers == 3 and (shaped or few_rows):
            tile = self.lean
        return replace(tile, keys=min(tile.keys, HOPPER_KEYS_SHAPED)) if shaped else tile


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """How the warps of one thread block share work in decode, and how many blocks form a worker."""

    teams: int  # each takes tiles of its own
    heads: int  # kv heads whose tiles different teams take side by side
    team_warps: int  # that share a team's tiles, each with rows of its own
    row_tiles: int  # of 8 query rows, of one warp
    keys: int  # of one team's tile
    stages: int  # tiles in a team's ring
    cluster: int  # blocks
    blocks: int  # of one multiprocessor
    least: int  # tiles of a share

    @property
    def rows(self) -> int:
        """Query rows of a unit: of one kv head of one sequence, as many as are worked on together."""
        return 8 * self.row_tiles * self.team_warps

    @property
    def warps(self) -> int:
        return self.teams * self.team_warps

    def shared_bytes(self, padded_dim: int, itemsize: int, rows: int, batch: int, one_portion: bool) -> int:
        """rows: how many of a unit's are in use. one_portion: of each worker, as with UNIT_SHARES."""
        ring = self.stages * 2 * self.keys * padded_dim * itemsize
        queries = (1 if one_portion else self.stages) * rows * (padded_dim * 2 + 16)
        sums = rows * (padded_dim + 4) * 4
        if one_portion and sums <= ring:
            sums = 0  # the ring is free by then
        teams = self.teams * (ring + queries + sums) + _round_up(self.teams * rows, 2) * 8
        rows *= self.heads
        sent = 2 * self.cluster * (_ceil_div(rows * padded_dim // 4, self.cluster) * 16 + _round_up(rows, 2) * 8)
        return teams + (sent if self.cluster > 1 else 0) + 16 * batch


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch, but for its addresses."""

    kernel: str
    defines: Defines
    grid: int  # thread blocks
    threads: int  # per block
    shared_bytes: int  # dynamic, per block
    tile_rows: int
    tile_keys: int
    warps: int
    stages: int
    group: int  # query heads packed into a tile's rows; 1 is none
    window: tuple[int, int]  # as the kernel takes it: sides that hide nothing are -1
    tiles_per_sequence: int  # dense q
    pairs_per_section: int  # dense q: (sequence, head) pairs that are worked on together
    reasons: tuple[str, ...]  # why, in sentences
    cluster: int = 1  # blocks that work on one share of the keys
    row_blocks: int = 1  # decode: units of rows that the queries of one kv head make
    workspace_bytes: int = 0  # for the sums of keys that several blocks share, behind decode's counters
    kv_splits: int = 1  # forward kernels: blocks that share the keys of a tile, whose results are then merged
    total_tiles: int = 0  # forward_sm90: that its blocks take in turn
    query_box: tuple[int, int] = (0, 0)  # forward_sm90: heads of a group and tokens that one copy brings
    key_box: int = 0  # forward_sm90: rows of the cache that one copy brings


# Tiles in order of preference, by the largest padded head dimension that they serve: the first of which two
# blocks fit a multiprocessor, else the first that fits at all. None spills, on any supported chip: 128 rows over
# four warps (32 each) read K and V from shared memory once per 32 rows instead of once per 16; past 128 dimensions
# their accumulators no longer fit the registers.
LARGE_TILES = (
    (64, (Tile(128, 128, 4, 1), Tile(128, 64, 4, 2), Tile(128, 64, 4, 1), Tile(64, 64, 4, 1))),
    (128, (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(128, 32, 4, 1), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1))),
    (256, (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 2, 1))),
)
# For few rows: when a sequence fills no more than one of these, or when large tiles would leave chips idle.
SMALL_TILES = (
    (64, (Tile(64, 64, 4, 2), Tile(64, 64, 4, 1))),
    (128, (Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 32, 4, 1))),
    (256, (Tile(64, 64, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 2, 1))),
)
PRODUCT_ROWS = 64  # of one warpgroup's product on Hopper
BLOCK_COLUMNS = 64  # of a tile's rows, which lie side by side
SWIZZLE_BYTES = 1 << 10  # what tiles of forward_sm90 are aligned to
SMALLEST_BOX = 8  # rows of a block of the cache that one copy must bring at least
# notebooks/results/hopper_tiles.json and hopper_sweep.json: with 64 dimensions and a causal mask, tiles of 96 keys have
# 0.94 of the speed of 128 at 512 keys, 1.03 times at 1024, 1.09 at 8192; without one they gain from 4096 keys on, 1.03
# times at 16k. With 192 dimensions 64 keys have 1.12 times the speed of 96 at 512 keys, and 0.96 at 8192. Three
# warpgroups have 1.05 times the speed of two with 96 dimensions and 8192 keys, and with 128, a causal mask and 16k keys
# 1.06, in blocks of 128 too, but 0.91 to 1.00 in blocks with 1k queries, and 0.95 to 0.98 in blocks of 1. None of the
# other tiles there is faster than these.
HOPPER_TILES = (
    HopperTiles(
        head_dim=64,
        few=HopperTile(3, 128, 3, 2, 64),
        many=HopperTile(3, 96, 4, 2, 64),
        many_queries=1,
        many_full=4096,
        many_masked=1024,
        paged=HopperTile(2, 128, 3, 2, 64),
        packed=HopperTile(3, 96, 4, 2, 64),
        lean=HopperTile(2, 128, 3, 2, 64),
    ),
    HopperTiles(
        head_dim=96,
        few=HopperTile(2, 128, 2, 2, 128),
        many=HopperTile(3, 80, 2, 2, 128),
        many_queries=1024,
        many_full=1024,
        many_masked=4096,
        paged=HopperTile(2, 128, 2, 2, 128),
        packed=HopperTile(2, 128, 2, 2, 128),
        lean=HopperTile(2, 128, 2, 2, 128),
    ),
    HopperTiles(
        head_dim=128,
        few=HopperTile(2, 128, 2, 2, 128),
        many=HopperTile(3, 64, 2, 2, 128),
        many_queries=4096,
        many_full=None,
        many_masked=8192,
        paged=HopperTile(3, 64, 2, 2, 128),
        packed=HopperTile(2, 128, 2, 2, 128),
        lean=HopperTile(2, 128, 2, 2, 128),
    ),
    HopperTiles(
        head_dim=192,
        few=HopperTile(2, 64, 2, 2, 64),
        many=HopperTile(2, 96, 2, 1, 64),
        many_queries=1,
        many_full=4096,
        many_masked=4096,
        paged=HopperTile(2, 96, 2, 1, 64),
        packed=HopperTile(2, 96, 2, 1, 64),
        lean=HopperTile(2, 96, 2, 1, 64),
    ),
    HopperTiles(
        head_dim=256,
        few=HopperTile(2, 64, 2, 1, 128),
        many=HopperTile(2, 64, 2, 1, 128),
        many_queries=1,
        many_full=None,
        many_masked=None,
        paged=HopperTile(2, 64, 2, 1, 128),
        packed=HopperTile(2, 64, 2, 1, 128),
        lean=HopperTile(2, 64, 2, 1, 128),
    ),
)
PART_THREADS = 256  # of a block, in kernels where one thread works on part of a row
_MOST_DOWN = 65535  # blocks of a grid in its second direction, which CUDA allows
COPY_WORDS = 4 * PART_THREADS  # of keys, and as many of values, that a thread block of a copy moves
INLINE_CAPACITIES = (64, 256, 928)  # indices of an append that fit the 4 KB of a kernel's argument
MERGE_CAPACITIES = (8, 64, 200)  # states: room for their addresses in the 4 KB of a kernel's argument
DECODE_BATCH = 2048  # sequences whose lengths a block of decode keeps in shared memory
COUNTER_BYTES = 4 << 10  # at the start of a workspace: one for each share and block of a cluster in decode
# The longest step of a decoder, drafts of speculative decoding included.
MOST_DECODE_QUERIES = 16
# (stages, blocks of a multiprocessor, warps) in order of preference: the first that fits. The figures here are of an
# H200, and all of decode's are in notebooks/results/decode_tiles.json. Deeper rings are slower: 64 x 8k has 0.98 of the
# speed with 3 stages, 0.95 with 5.
DECODE_SHAPES = ((2, 1, 8), (2, 1, 4), (2, 1, 2), (1, 1, 8), (2, 1, 1), (1, 1, 1))
# Where several warps share a team's tiles, and there are units for twice as many workers, two blocks hide each other's
# ends of units (256 x 1k, 16/1 heads: 1.03 times the speed); of fewer they double the parts to merge (128 x 2k: 0.93).
TWO_BLOCKS = (2, 2, 4)
# In clusters fewer warps have fewer sums to merge (1 x 1k, 32/8 heads: 8 warps have 0.88 of the speed). Without a limit
# of the keys there is more to have on the way (1 x 64k, 16/1 heads: 1.07 times the speed).
SHORT_CLUSTER_SHAPES = ((2, 2, 4), (2, 1, 4), (2, 1, 2), (2, 1, 1), (1, 1, 1), (2, 1, 8), (1, 1, 8))
LONG_CLUSTER_SHAPES = ((4, 1, 4), *SHORT_CLUSTER_SHAPES)
# Of so many workers may one go without work, so that the others have as much as one another: 64 x 8k has 1.02 times
# the speed with 128 blocks that have whole units, beside 132 that have as many keys.
SPARE_WORKERS = 8
# Bytes of keys and values up to which merging within a cluster, and not through memory, gains more than the
# multiprocessors cost that no cluster fills: 1.15 times the speed at 4 MB, 0.97 at 8 MB, 0.77 at 17 MB.
SMALL_CACHE = 6 << 20
SIMT_TILE = Tile(64, 64, 8, 1)
# (sequence, head) pairs of a dense batch that are worked on together. Under a mask the long tiles of all of them
# come first, and 16 pairs are enough to even out the load; without one, a pair at a time keeps its keys in the L2
# cache. Sections of all pairs lose up to 0.134 of the speed (notebooks/results/tiles.json).
CAUSAL_SECTION = 16
# Of forward_sm90 under a mask: so many pairs, if their keys fit L2 together, where long tiles and short ones find them;
# of whole sequences, whose heads lie side by side in memory. Sections of 128 pairs have 1.02 times the speed at 64
# dimensions and 512 keys, but 0.90 to 0.95 at 128 and 256 (notebooks/results/hopper_tiles.json).
HOPPER_SECTION = (8, 64)  # at least, at most
HOPPER_SECTION_BYTES = 32 << 20
FULL_SECTION = 1
# Blocks that share the keys of a tile, where tiles leave half of the multiprocessors idle: as many as run at once, two
# to a multiprocessor (one of forward_sm90), and none with fewer keys than pay for the merge (a launch, and float32 rows
# written and read). On an H200, 128 queries of 32/8 heads by forward_sm80: 1.5 times the speed over 2k keys in 4 parts,
# 1.9 times over 4k, 3.2 over 64k in 8.
SPLIT_BLOCKS = 2
SPLIT_KEYS = 512
# Query rows of a kv head from which a shared prefix is a forward kernel's: of 2k tokens forward_sm80 has 0.94 of the
# speed of decode with 64 rows and 1.3 times with 128, of 16k 1.8 and 1.9 times; forward_sm90 is faster again, at 16k
# tokens 1.0 to 1.3 times with 64 and 128 rows and 1.8 times from 512 on (notebooks/results/hopper_tiles.json, prefix).
PREFIX_ROWS = 64
MOST_FORWARD_SPLITS = 64
# Of the 255 registers of a thread: what accumulators may take without spills, as the compile tests see it: less from
# sm_100 on. A soft cap or ALiBi needs registers for each score, and there for each row: a warp then gets 16 rows.
MAX_ACCUMULATORS = 192
MAX_ACCUMULATORS_SM100 = 160
MAX_ACCUMULATORS_SHAPED = 160
MAX_KEYS_SHAPED = 64
HOPPER_KEYS_SHAPED = 96


def plan(
    problem: Problem,
    device: Device,
    kernel: str = "auto",
    tile: Tile | HopperTile | None = None,
    pairs_per_section: int | None = None,
    decode_tile: DecodeTile | None = None,
) -> Plan:
    """Choose kernel, tile and grid for one problem on one device.

    kernel: "auto", or one of `KERNELS` to insist; ValueError when it cannot serve the problem there.
    tile, pairs_per_section: insist on these for a forward kernel, as `cupyattn bench --tiles` does to compare them;
    decode_tile for decode.
    """
    name, why = choose_kernel(problem, device, kernel)
    if name == "decode":
        return _plan_decode(problem, device, why, decode_tile)
    typical_rows = _typical_rows(problem)
    window = effective_window(problem)
    masked = window != (UNBOUNDED, UNBOUNDED)
    splits, insists = 1, tile is not None
    if name == "forward_simt":
        tile = SIMT_TILE
        group = _packed_group(problem, tile.rows, typical_rows)
        reasons = [why]
        shared = 0
    elif name == "forward_sm90":
        splits = _most_splits(problem)
        tiles = _hopper_tiles(problem)
        tile = tile or tiles.choose(problem, masked)
        group = _packed_group(problem, tile.rows, typical_rows)
        group = group if group <= PRODUCT_ROWS else 1
        reasons = [
            why,
            f"{tile.consumers} warpgroups compute {PRODUCT_ROWS} rows each, and warps of another load keys up to "
            f"{tile.stages} tiles of {tile.keys} ahead",
        ]
        shared = tile.shared_bytes(problem.head_dim, problem.head_dim_v)
    else:
        padded = _round_up(problem.head_dim, 16)
        splits = _most_splits(problem)
        if tile is None:
            tile, group, reason = _choose_tile(problem, device, padded, typical_rows, splits > 1)
        else:
            group, reason = _packed_group(problem, tile.rows, typical_rows), "the caller insists on the tile"
        reasons = [why, reason]
        shared = tile.shared_bytes(padded)
    if group > 1:
        reasons.append(f"the {group} query heads of a group share a tile, so their keys are read once")

    rows = tile.rows // PRODUCT_ROWS * (PRODUCT_ROWS // group * group) if name == "forward_sm90" else tile.rows
    heads = problem.num_kv_heads if group > 1 else problem.num_heads
    pairs = problem.batch * heads
    if problem.packed_q:
        # An upper bound that needs no lengths: full tiles, and one more for each sequence and for rows behind the last.
        tiles_per_sequence, pairs_per_section = 0, 1
        grid = (problem.total_q * group // rows + problem.batch + 1) * heads
        reasons.append(
            "lengths stay on the device: the grid covers any split of the rows, and spare blocks leave at once"
        )
    else:
        tiles_per_sequence = _ceil_div(problem.seqlen_q * group, rows)
        if pairs_per_section is None:
            pairs_per_section = CAUSAL_SECTION if masked else FULL_SECTION
            if masked and name == "forward_sm90":
                pairs_per_section = _hopper_section(problem, heads)
        pairs_per_section = max(1, min(pairs, pairs_per_section))
        grid = tiles_per_sequence * pairs
        most = (1 if name == "forward_sm90" else SPLIT_BLOCKS) * device.multiprocessors // max(grid, 1)
        splits = min(splits, most) if _leaves_idle(grid, device) else 1
        if masked:
            reasons.append(
                f"long tiles come first within every {pairs_per_section} heads, and short ones fill the gaps"
            )
    workspace_bytes = COUNTER_BYTES if name == "forward_sm90" else 0
    if splits > 1 and name == "forward_sm90" and tile.consumers == 3 and not insists:
        return plan(problem, device, kernel, tiles.lean, pairs_per_section)
    if splits > 1:
        grid *= splits
        results = problem.total_q * problem.num_heads
        workspace_bytes = COUNTER_BYTES + 4 * results * (splits * problem.head_dim_v + splits + 1)
        reasons.append(f"{splits} blocks share the keys of a tile, and a second kernel merges what they find")
    if grid >= 2**31:
        refuse(
            "q", f"{problem.total_q} rows of {heads} heads, which take {grid} thread blocks", "at most 2**31 - 1 blocks"
        )
    total_tiles, query_box, key_box = 0, (0, 0), 0
    if name == "forward_sm90":
        total_tiles, query_box, key_box = grid, (group, PRODUCT_ROWS // group), _box_rows(problem, tile.keys)
        grid = min(grid, device.multiprocessors)
        reasons.append(f"{grid} blocks stay and take {total_tiles} tiles in turn")
    return Plan(
        kernel=name,
        defines=_defines(problem, name, tile, group, masked, splits),
        grid=grid,
        threads=tile.warps * 32,
        shared_bytes=shared,
        tile_rows=rows,
        tile_keys=tile.keys,
        warps=tile.warps,
        stages=tile.stages,
        group=group,
        window=window,
        tiles_per_sequence=tiles_per_sequence,
        pairs_per_section=pairs_per_section,
        reasons=tuple(reasons),
        workspace_bytes=workspace_bytes,
        kv_splits=splits,
        total_tiles=total_tiles,
        query_box=query_box,
        key_box=key_box,
    )


def _hopper_tiles(problem: Problem) -> HopperTiles:
    wider = max(problem.head_dim, problem.head_dim_v)
    return next(tiles for tiles in HOPPER_TILES if wider <= tiles.head_dim)


def _hopper_section(problem: Problem, heads: int) -> int:
    """(sequence, head) pairs whose tiles the blocks of forward_sm90 take together under a mask."""
    pair_bytes = 2 * problem.cache.rows * (problem.head_dim + problem.head_dim_v) * problem.num_kv_heads // heads
    least, most = HOPPER_SECTION
    pairs = max(least, min(most, HOPPER_SECTION_BYTES // max(pair_bytes, 1)))
    return pairs // heads * heads if pairs > heads else pairs


def _leaves_idle(blocks: int, device: Device) -> bool:
    """Whether so many blocks leave half of the multiprocessors without work."""
    return 0 < 2 * blocks <= device.multiprocessors


def _most_splits(problem: Problem) -> int:
    """How many blocks of a forward kernel may share the keys of a tile: 1 where parts cannot be put together.

    A sink must be counted once, and rows packed by cu_seqlens are as many as fill the chip.
    """
    if problem.packed_q or problem.sinks:
        return 1
    if problem.num_splits:
        return min(problem.num_splits, MOST_FORWARD_SPLITS)
    return max(1, min(problem.cache.rows // SPLIT_KEYS, MOST_FORWARD_SPLITS))


def choose_kernel(problem: Problem, device: Device, kernel: str = "auto") -> tuple[str, str]:
    """The kernel's name and the reason for it."""
    if kernel not in ("auto", *KERNELS):
        refuse("kernel", repr(kernel), "'auto', " + ", ".join(map(repr, KERNELS)) + " on a GPU")
    if device.capability < 70:
        _refuse_device(device, "compute capability 7.0 or later")
    obstacle = ""
    if problem.dtype == "float32":
        obstacle = "tensor cores would round float32 inputs"
    elif device.capability < 75:
        obstacle = f"sm_{device.arch} has no 16-bit matrix instructions that the tensor-core kernel knows"
    elif device.capability < 80 and problem.dtype == "bfloat16":
        obstacle = f"sm_{device.arch} has no bfloat16 matrix instructions"
    no_sm80 = obstacle or ("head_dim_v differs from head_dim" if problem.head_dim_v != problem.head_dim else "")
    no_decode = no_sm80
    if device.capability < 80:
        no_decode = f"sm_{device.arch} has no asynchronous copies"
    elif problem.batch > DECODE_BATCH:
        no_decode = f"decode keeps the lengths of at most {DECODE_BATCH} sequences at hand"
    elif problem.seqlen_q * problem.group >= 2**31:
        no_decode = "decode counts the query rows of a kv head in 32 bits"
    elif problem.packed_q:
        no_decode = "decode takes the same number of queries of each sequence, not cu_seqlens_q"
    fp8 = problem.kv_itemsize == 1
    if fp8 and no_decode:
        expected = f"a cache of q's dtype: FP8 caches need the decode kernel, and {no_decode}"
        refuse("kv_dtype", repr(problem.kv_dtype), expected)
    if kernel == "decode" and no_decode:
        refuse("kernel", "'decode'", f"'auto': {no_decode}")
    if kernel not in ("auto", "decode") and fp8:
        refuse("kernel", repr(kernel), "'auto' or 'decode', which alone reads FP8 caches")
    no_hopper = obstacle or _hopper_obstacle(problem, device)
    if kernel == "forward_sm90" and no_hopper:
        refuse("kernel", "'forward_sm90'", f"'auto' or another kernel: {no_hopper}")
    if kernel == "forward_sm80" and no_sm80:
        refuse("kernel", "'forward_sm80'", f"'auto' or 'forward_simt': {no_sm80}")
    if kernel != "auto":
        return kernel, "asked for by name"
    if not no_decode and problem.seqlen_q <= MOST_DECODE_QUERIES:
        return "decode", f"with seqlen_q {problem.seqlen_q} all time goes into reading keys, which it shares out"
    if fp8:
        return "decode", "FP8 caches are read by decode alone"
    if obstacle:
        return "forward_simt", obstacle
    instead = f", not decode: {no_decode}" if no_decode and problem.seqlen_q <= MOST_DECODE_QUERIES else ""
    if not no_hopper:
        return "forward_sm90", f"{problem.dtype} on sm_{device.arch} takes wgmma and the copy engine{instead}"
    if device.capability == 90:
        instead += f", not forward_sm90: {no_hopper}"
    if no_sm80:
        return "forward_simt", f"{no_sm80}, not forward_sm90: {no_hopper}" if device.capability == 90 else no_sm80
    return "forward_sm80", f"{problem.dtype} on sm_{device.arch} takes the tensor cores{instead}"


def _hopper_obstacle(problem: Problem, device: Device) -> str:
    """Why forward_sm90 cannot serve this problem there, or ""."""
    cache = problem.cache
    if device.capability != 90:
        return f"sm_{device.arch} is no Hopper"
    dims = problem.head_dim, problem.head_dim_v
    if any(dim % 8 for dim in dims) or max(dims) > HOPPER_TILES[-1].head_dim:
        return f"its head dimensions are multiples of 8 up to {HOPPER_TILES[-1].head_dim}"
    if problem.alignment < 16 or problem.out_alignment < 16:
        return "the copy engine wants rows at multiples of 16 bytes"
    if not cache.entries or not cache.rows:
        return "there are no keys"
    if min(*problem.q_strides, *problem.o_strides, *cache.k_strides, *cache.v_strides) < 0:
        return "the copy engine knows no negative strides"
    return ""


def _box_rows(problem: Problem, keys: int) -> int:
    """Rows of a tile of keys that one copy brings: all, or as many as lie in one block of a paged cache; 0 where those
    are too few, or left padding shifts them against the blocks."""
    if problem.cache.kind != "paged":
        return keys
    rows = math.gcd(keys, problem.cache.block_size)
    return rows if rows >= SMALLEST_BOX and not problem.leftpad else 0


def prefix_kernel(own: Problem, device: Device, sinks: bool) -> str:
    """The kernel that reads a prefix which all sequences of `own` share, whose queries are then those of one.

    decode is made for few query rows: it reads keys from shared memory once for every 8 or 16 of them. From
    `PREFIX_ROWS` rows of a kv head on the forward kernels' larger tiles are faster, and split the keys too. "auto" is
    the best of these for more queries than decode's.
    """
    if own.dtype == "float32" or own.head_dim_v != own.head_dim or device.capability < 80:
        return "auto"
    queries = own.batch * own.seqlen_q
    if queries * own.group < PREFIX_ROWS or sinks or own.kv_itemsize == 1:
        return "decode"
    return "auto" if queries > MOST_DECODE_QUERIES else "forward_sm80"


def effective_window(problem: Problem) -> tuple[int, int]:
    """The window with every side that cannot hide a key set to -1, so that the kernel need not look at it.

    Bounds come from the arrays' shapes, never from the caller's hints: a wrong hint may cost time, not correctness.
    """
    left, right = problem.window
    longest_q = problem.total_q if problem.packed_q else problem.seqlen_q
    if left >= problem.cache.rows + longest_q:
        left = UNBOUNDED
    if right >= longest_q - 1:
        right = UNBOUNDED  # query i sees keys up to i + seqlen_k - seqlen_q + right, which is past the last
    return left, right


def _plan_decode(problem: Problem, device: Device, why: str, tile: DecodeTile | None) -> Plan:
    itemsize = problem.kv_itemsize
    padded = _round_up(problem.head_dim, 32 // itemsize)
    rows = problem.seqlen_q * problem.group
    reasons = [why]
    if tile is None:
        tile = _choose_decode_tile(problem, device, padded)
    row_blocks = _ceil_div(rows, tile.rows)
    used_rows = min(rows, tile.rows)
    # Places of tiles in the line of all keys count in 32 bits, whatever the lengths turn out to be.
    most_tiles = problem.batch * problem.num_kv_heads * row_blocks * (problem.cache.rows // tile.keys + 2)
    position_tiles = _ceil_div(most_tiles, 2**31)
    workers = device.clusters(tile.cluster) * tile.blocks
    units = problem.batch * (problem.num_kv_heads // tile.heads) * row_blocks
    unit_shares = _unit_shares(problem, tile, workers, units)
    workers = units * unit_shares or _even_workers(workers, units)
    window = effective_window(problem)
    who = f"{workers} thread blocks" if tile.cluster == 1 else f"{workers} clusters of {tile.cluster} thread blocks"
    ahead = tile.teams * tile.stages
    reasons.append(f"{who} share all keys evenly, in tiles of {tile.keys}; each block has {ahead} tiles on their way")
    if workers < device.clusters(tile.cluster) * tile.blocks:
        reasons.append("there could be more, but so many have as much work as one another where lengths are alike")
    if tile.heads > 1:
        reasons.append(f"a block reads the keys of {tile.heads} kv heads side by side")
    if problem.group > 1:
        reasons.append(f"the {problem.group} query heads of a group share a read of their keys")
    if row_blocks > 1:
        reasons.append(f"{rows} query rows of a kv head make {row_blocks} units, each of which reads its keys")
    if problem.append is not None:
        turned = "rotated, stored" if problem.rotary is not None else "stored"
        reasons.append(f"new keys and values are {turned} and attended to in this one launch")
    rotary = problem.rotary
    defines = (
        ("DTYPE", DTYPE_CODES[problem.dtype]),
        ("KV_DTYPE", DTYPE_CODES[problem.kv_dtype]),
        ("HEAD_DIM", problem.head_dim),
        ("TILE_M", tile.rows),
        ("TILE_N", tile.keys),
        ("USED_ROWS", used_rows),
        ("HEAD_TEAMS", tile.heads),
        ("KEY_TEAMS", tile.teams // tile.heads),
        ("TEAM_WARPS", tile.team_warps),
        ("ROW_TILES", tile.row_tiles),
        ("STAGES", tile.stages),
        ("CLUSTER", tile.cluster),
        ("BLOCKS", tile.blocks),
        ("ROW_BLOCKS", row_blocks),
        ("POSITION_TILES", position_tiles),
        ("SPLITS", int(problem.num_splits > 0)),
        ("LEAST_POSITIONS", 1 if problem.num_splits else _ceil_div(tile.least, position_tiles)),
        ("WIDE_OFFSETS", int(_wide_offsets(problem))),
        ("GROUP", problem.group),
        ("KV_HEADS", problem.num_kv_heads),
        ("UNIT_SHARES", unit_shares),
        ("LEFTPAD", int(problem.leftpad)),
        ("PACKED_Q", 0),
        ("CACHE_KIND", CACHE_CODES[problem.cache.kind]),
        ("BLOCK_SIZE", problem.cache.block_size or 1),
        ("MASK", int(window != (UNBOUNDED, UNBOUNDED))),
        ("SOFTCAP", int(problem.softcap > 0)),
        ("ALIBI", int(bool(problem.alibi))),
        ("SCALE_FIRST", int(bool(problem.alibi) or problem.softmax_scale <= 0)),
        ("APPEND", int(problem.append is not None)),
        *_rotary_defines(rotary),
        ("LOAD_BYTES", problem.alignment),
        ("STORE_BYTES", problem.out_alignment),
    )
    return Plan(
        kernel="decode",
        defines=defines,
        grid=workers * tile.cluster if problem.batch and problem.seqlen_q else 0,
        threads=tile.warps * 32,
        shared_bytes=tile.shared_bytes(padded, itemsize, used_rows, problem.batch, unit_shares > 0),
        tile_rows=tile.rows,
        tile_keys=tile.keys,
        warps=tile.warps,
        stages=tile.stages,
        group=problem.group,
        window=window,
        tiles_per_sequence=0,
        pairs_per_section=0,
        reasons=tuple(reasons),
        cluster=tile.cluster,
        row_blocks=row_blocks,
        workspace_bytes=COUNTER_BYTES + workers * 2 * tile.heads * used_rows * (padded + 4) * 4,
    )


def _wide_offsets(problem: Problem) -> bool:
    """Whether a row's offset, in units of 16 bytes, may need more than 32 bits, or is no multiple of 16 bytes."""
    cache = problem.cache
    rows = cache.block_size or cache.rows
    reach = max(abs(outer) * cache.entries + abs(row) * rows for outer, row, _ in (cache.k_strides, cache.v_strides))
    return problem.alignment < 16 or reach * problem.kv_itemsize >= 2**31 * 16


def _choose_decode_tile(problem: Problem, device: Device, padded_dim: int) -> DecodeTile:
    rows = problem.seqlen_q * problem.group
    columns = _ceil_div(rows, 8)
    itemsize = problem.kv_itemsize
    # Rows of few bytes make larger tiles, but not where a single sequence has few tiles to share (1 x 8k in FP8: 0.96).
    keys = 32 if padded_dim * itemsize <= 128 and problem.batch > 1 else 16
    # Two warps with 8 rows each are faster than one with 16, whose registers leave little room to overlap anything
    # (256 x 1k, 16/1 heads: 1.18 times the speed), but where there is little to overlap: in clusters.
    team_warps = 1
    while team_warps < 8 and team_warps < columns:
        team_warps *= 2
    while team_warps:
        row_tiles = 2 if columns > team_warps and padded_dim <= 128 else 1
        units = problem.batch * problem.num_kv_heads * _ceil_div(columns, row_tiles * team_warps)
        cluster = _choose_cluster(problem, device, units)
        if cluster > 1 and team_warps == columns == 2 and padded_dim <= 128:
            team_warps, row_tiles = 1, 2
        least = 4 if cluster == 1 else 8 * cluster
        if cluster > 1:
            shapes = SHORT_CLUSTER_SHAPES if rows <= 8 else LONG_CLUSTER_SHAPES
        else:
            shapes = (TWO_BLOCKS, *DECODE_SHAPES) if team_warps > 1 else DECODE_SHAPES
        for stages, blocks, warps in shapes:
            workers = device.clusters(cluster) * blocks
            if warps < team_warps or (blocks > 1 and cluster == 1 and units < _fewest(workers)):
                continue
            teams = warps // team_warps
            heads = _side_by_side(problem.num_kv_heads, teams, units, workers)
            tile = DecodeTile(teams, heads, team_warps, row_tiles, keys, stages, cluster, blocks, least)
            one_portion = _unit_shares(problem, tile, workers, units // heads) > 0
            used = min(rows, tile.rows)
            need = tile.shared_bytes(padded_dim, itemsize, used, problem.batch, one_portion) + STATIC_SHARED
            fits = blocks * (need + SHARED_RESERVED) <= device.shared_per_multiprocessor
            if fits and need <= device.shared_per_block:
                return tile
        team_warps //= 2  # fewer rows at a time
    raise AssertionError("one warp's tiles and the lengths of DECODE_BATCH sequences fit every chip")


def _choose_cluster(problem: Problem, device: Device, units: int) -> int:
    """Blocks of a cluster: where units are few, each is split over many blocks, which then merge without memory."""
    if device.capability < 90 or not device.clusters(8):
        return 1
    if problem.seqlen_q * problem.group > 8:
        return 8 if units <= 4 else 1
    small = units * problem.cache.rows * problem.head_dim * 2 * problem.kv_itemsize <= SMALL_CACHE
    return 8 if small and units <= 16 else 1


def _unit_shares(problem: Problem, tile: DecodeTile, workers: int, units: int) -> int:
    """Shares of each unit of a single sequence; 0 where there are more, or too many workers would go without."""
    if problem.batch != 1 or problem.num_splits or not units:
        return 0
    shares, most = workers // units, _ceil_div(problem.cache.rows, tile.keys) // tile.least
    if shares > most:
        return 1 << most.bit_length() - 1 if most else 1  # a cache that grows is not to make ever new kernels
    return shares if units * shares >= _fewest(workers) else 0


def _even_workers(workers: int, units: int) -> int:
    """As many workers as share units out evenly, if not too many are spared: where lengths are alike, each then has
    whole units, or each unit whole workers, and fewest results are left to merge."""
    even = (n for n in range(workers, _fewest(workers) - 1, -1) if units and (units % n == 0 or n % units == 0))
    return next(even, workers)


def _fewest(workers: int) -> int:
    """How many of these must have work."""
    return workers - workers // SPARE_WORKERS


def _side_by_side(num_kv_heads: int, teams: int, units: int, workers: int) -> int:
    """How many kv heads a worker's teams read side by side: as many as leave each worker a unit of its own."""
    heads = teams
    while heads > 1 and (num_kv_heads % heads or units < heads * _fewest(workers)):
        heads //= 2
    return heads


def _rotary_defines(rotary: Rotary | None) -> Defines:
    if rotary is None:
        return ()
    return (
        ("ROTARY", 2 if rotary.interleaved else 1),
        ("ROTARY_DIM", rotary.dim),
        ("ROTARY_FLOAT32", int(rotary.dtype == "float32")),
    )


def plan_append(append: Append, inline: int = 0) -> tuple[Defines, int, int]:
    """Compile-time values, grid and threads of one append; with room for `inline` indices in the kernel's argument."""
    vector, parts = _parts(append.head_dim, append.alignment // append.itemsize, append.rotary, append.head_dim_v)
    defines = (
        ("DTYPE", DTYPE_CODES[append.dtype]),
        ("KV_DTYPE", DTYPE_CODES[append.kv_dtype]),
        ("HEAD_DIM", append.head_dim),
        ("HEAD_DIM_V", append.head_dim_v),
        ("VECTOR", vector),
        ("PACKED_NEW", int(append.packed_new)),
        ("CACHE_KIND", CACHE_CODES[append.cache.kind]),
        ("BLOCK_SIZE", append.cache.block_size or 1),
        *_rotary_defines(append.rotary),
        *((("INLINE_INDICES", inline),) if inline else ()),
        ("THREADS", PART_THREADS),
    )
    return defines, _ceil_div(append.total_new * append.num_kv_heads * parts, PART_THREADS), PART_THREADS


def inline_capacity(indices: int) -> int:
    """The room that is compiled for so many indices in the argument of an append; 0 where there is none."""
    return next((capacity for capacity in INLINE_CAPACITIES if indices <= capacity), 0)


def plan_rotary(rotation: Rotation) -> tuple[Defines, int, int]:
    """Compile-time values, grid and threads of one rotation."""
    vector, parts = _parts(rotation.head_dim, rotation.alignment // rotation.itemsize, rotation.rotary)
    defines = (
        ("DTYPE", DTYPE_CODES[rotation.dtype]),
        ("HEAD_DIM", rotation.head_dim),
        ("VECTOR", vector),
        ("PACKED", int(rotation.packed)),
        ("PER_ROW", int(rotation.rotary.per_query)),
        *_rotary_defines(rotation.rotary),
        ("THREADS", PART_THREADS),
    )
    return defines, _ceil_div(rotation.total * rotation.num_heads * parts, PART_THREADS), PART_THREADS


def plan_merge(merge: Merge, states: int, from_float32: bool, to_float32: bool) -> tuple[Defines, int, int]:
    """Compile-time values, grid and threads of one round of a merge, of the states or of their float32 sums."""
    vector, parts = _parts(merge.head_dim, merge.alignment // merge.itemsize)
    defines = (
        ("DTYPE", DTYPE_CODES[merge.dtype]),
        ("SOURCE_FLOAT32", int(from_float32)),
        ("TARGET_FLOAT32", int(to_float32)),
        ("HEAD_DIM", merge.head_dim),
        ("VECTOR", vector),
        ("CAPACITY", next(capacity for capacity in MERGE_CAPACITIES if states <= capacity)),
        ("THREADS", PART_THREADS),
    )
    rows = merge.batch * merge.seqlen * merge.num_heads
    return defines, _ceil_div(rows * parts, PART_THREADS), PART_THREADS


def plan_copy(tokens: int, layers: int, heads: int, head_bytes: int) -> tuple[Defines, int, int, tuple[int, int], int]:
    """Compile-time values, bytes of a word, tokens of a thread block, grid and threads of one copy of rows."""
    word = math.gcd(head_bytes, 16)
    chunk = max(COPY_WORDS * word // (heads * head_bytes), 1)
    defines = (("WORD_BYTES", word), ("THREADS", PART_THREADS))
    return defines, word, chunk, (_ceil_div(tokens, chunk), layers), PART_THREADS


def plan_write(entries: int) -> tuple[Defines, int, int]:
    """Compile-time values, grid and threads of writing single entries of an array."""
    return (("THREADS", PART_THREADS),), _ceil_div(entries, PART_THREADS), PART_THREADS


def plan_fill_table(batch: int, widest: int) -> tuple[Defines, tuple[int, int], int]:
    """The same of making a block table, of at most `widest` page ids in a row."""
    return (("THREADS", PART_THREADS),), (batch, min(_ceil_div(widest, PART_THREADS), _MOST_DOWN)), PART_THREADS


def _parts(head_dim: int, aligned: int, rotary: Rotary | None = None, head_dim_v: int = 0) -> tuple[int, int]:
    """Elements that a thread moves at once, up to the `aligned` ones that addresses allow, and the threads of a row, or
    of a pair of rows, of which head_dim_v is the other's."""
    vector = math.gcd(max(aligned, 1), head_dim, head_dim_v, rotary.dim // 2 if rotary is not None else 0)
    return vector, _ceil_div(max(head_dim, head_dim_v), vector if rotary is None else 2 * vector)


def warmup_variants(
    arch: str, head_dims: tuple[int, ...] = (64, 128), dtypes: tuple[str, ...] = ("float16", "bfloat16")
) -> list[tuple[str, Defines]]:
    """The variants that a first session usually meets, for compiling ahead: prefill of dense and packed batches,
    full and causal, and prefill and decode against a paged cache of 16-row blocks with 4 query heads to each of 8 kv
    heads; decode for every size of batch that makes another kernel on the device that `DEVICES` names."""
    device = DEVICES[arch]
    found: dict[tuple[str, Defines], None] = {}
    for dtype in dtypes:
        for head_dim in head_dims:
            for problem in _typical_problems(dtype, head_dim):
                made = plan(problem, device)
                found[(made.kernel, made.defines)] = None
            for packed in (False, True):
                strides = (0, 0, 0)
                cache = Cache("paged", 1024, 4096, 16, 256, 256, strides, strides)
                dims, plain = (head_dim, head_dim), (dtype, 1.0, "", 1.0, "", None)
                append = Append(dtype, 8, 8, *dims, packed, 1024, 128, cache, strides, strides, False, 16, *plain)
                found[("append_kv", plan_append(append)[0])] = None
    return list(found)


def _typical_problems(dtype: str, head_dim: int) -> list[Problem]:
    strides = (0, 0, 0)

    def problem(packed_q: bool, kind: str, seqlen_q: int, window: tuple[int, int], batch: int = 64) -> Problem:
        block = 16 if kind == "paged" else 0
        cache = Cache(kind, 1024, 4096, block, 256 if block else 0, 256 if block else 0, strides, strides)
        return Problem(
            dtype=dtype, kv_dtype=dtype, batch=batch, num_heads=32, num_kv_heads=8, head_dim=head_dim,
            head_dim_v=head_dim, packed_q=packed_q, total_q=batch * seqlen_q, seqlen_q=seqlen_q, seqlen_k=4096,
            seqlen_new=0, cache=cache, q_strides=strides, o_strides=strides, window=window, softmax_scale=1.0,
            softcap=0.0, alibi="", sinks=False, lse=False, cu_seqlens_k=kind == "packed", seqused_k=kind == "paged",
            cache_batch_idx=False, leftpad=False, alignment=16, out_alignment=16, k_scale=1.0, k_scales="", v_scale=1.0,
            v_scales="", num_splits=0, rotary=None, append=None,
        )  # fmt: skip

    full, causal = (UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0)
    return [
        problem(False, "dense", 4096, full),
        problem(False, "dense", 4096, causal),
        problem(True, "packed", 4096, causal),
        problem(True, "paged", 4096, causal),
        *(problem(False, "paged", 1, full, batch=batch) for batch in (1, 8, 32, 64, 128)),
    ]


def _choose_tile(
    problem: Problem, device: Device, padded_dim: int, typical_rows: int, may_split: bool
) -> tuple[Tile, int, str]:
    shaped = bool(problem.softcap or problem.alibi)
    large, small = (_fitting(table, padded_dim, device, shaped) for table in (LARGE_TILES, SMALL_TILES))
    group = _packed_group(problem, large.rows, typical_rows)
    heads = problem.num_kv_heads if group > 1 else problem.num_heads
    rows = typical_rows * group
    if rows <= small.rows < large.rows:
        reason = f"{rows} rows fill one tile of {small.rows}"
        return small, _packed_group(problem, small.rows, typical_rows), reason
    blocks = _ceil_div(rows, large.rows) * problem.batch * heads
    if may_split and _leaves_idle(blocks, device):
        return large, group, f"{large.rows} x {large.keys} is the largest tile, of which {blocks} take all rows"
    if blocks < device.multiprocessors and small.rows < large.rows:
        reason = f"tiles of {large.rows} rows would make {blocks} blocks for {device.multiprocessors} multiprocessors"
        return small, _packed_group(problem, small.rows, typical_rows), reason
    return (
        large,
        group,
        f"{large.rows} x {large.keys} is the first tile for head_dim {problem.head_dim} to fit sm_{device.arch} well",
    )


def _fitting(table: tuple[tuple[int, tuple[Tile, ...]], ...], padded_dim: int, device: Device, shaped: bool) -> Tile:
    """The best tile of a table whose registers and shared memory this device has."""
    tiles = next(tiles for limit, tiles in table if padded_dim <= limit)
    newer = device.capability >= 100
    most = MAX_ACCUMULATORS_SHAPED if shaped else MAX_ACCUMULATORS_SM100 if newer else MAX_ACCUMULATORS
    tiles = tuple(tile for tile in tiles if tile.accumulators(padded_dim) <= most)
    if shaped:
        tiles = tuple(tile for tile in tiles if tile.keys <= MAX_KEYS_SHAPED)
    if shaped and newer:
        tiles = tuple(tile for tile in tiles if tile.rows == 16 * tile.warps)

    def blocks(tile: Tile) -> int:
        need = tile.shared_bytes(padded_dim) + STATIC_SHARED
        return device.shared_per_multiprocessor // (need + SHARED_RESERVED) if need <= device.shared_per_block else 0

    return next((tile for tile in tiles if blocks(tile) >= 2), None) or next(
        tile for tile in tiles if blocks(tile) >= 1
    )


def _packed_group(problem: Problem, tile_rows: int, typical_rows: int) -> int:
    """Pack the query heads of a kv head into one tile's rows when that makes fewer tiles."""
    group = problem.group
    fits_int32 = (problem.total_q if problem.packed_q else problem.seqlen_q) * group < 2**31
    fewer = _ceil_div(typical_rows * group, tile_rows) < group * _ceil_div(typical_rows, tile_rows)
    return group if group > 1 and fewer and fits_int32 else 1


def _typical_rows(problem: Problem) -> int:
    """Query rows of one sequence; of packed ones the mean, since their lengths are on the device."""
    if problem.packed_q:
        return min(problem.seqlen_q, _ceil_div(problem.total_q, max(problem.batch, 1)))
    return problem.seqlen_q


def _defines(problem: Problem, kernel: str, tile: Tile | HopperTile, group: int, masked: bool, splits: int) -> Defines:
    hopper = kernel == "forward_sm90"
    common = (
        ("DTYPE", DTYPE_CODES[problem.dtype]),
        ("HEAD_DIM", problem.head_dim),
        ("TILE_M", tile.consumers * (PRODUCT_ROWS // group * group) if hopper else tile.rows),
        ("TILE_N", tile.keys),
        ("GROUP", group),
        ("PACKED_Q", int(problem.packed_q)),
        ("CACHE_KIND", CACHE_CODES[problem.cache.kind]),
        ("BLOCK_SIZE", problem.cache.block_size or 1),
        ("MASK", int(masked)),
        ("SOFTCAP", int(problem.softcap > 0)),
        ("ALIBI", int(bool(problem.alibi))),
    )
    if kernel == "forward_simt":
        return (*common, ("HEAD_DIM_V", problem.head_dim_v), ("SCALE_FIRST", 1))
    # A scale of 0 or less would turn the running maximum of unscaled scores into a minimum.
    scale_first = bool(problem.alibi) or problem.softmax_scale <= 0
    if hopper:
        # Rows behind the last key are zeros where the array ends there, else whatever memory holds.
        ragged = problem.cache.kind != "dense" or problem.seqused_k or problem.leftpad
        box = _box_rows(problem, tile.keys)
        producer, consumer = tile.registers(problem.packed_q or problem.cache.kind == "paged", not box)
        return (
            *common,
            ("HEAD_DIM_V", problem.head_dim_v),
            ("SCALE_FIRST", int(scale_first)),
            ("CONSUMERS", tile.consumers),
            ("STAGES", tile.stages),
            ("QUERY_STAGES", tile.query_stages),
            ("OUT_BLOCKS", tile.out_blocks(problem.head_dim_v)),
            ("GATHER", int(not box)),
            ("BOX_ROWS", box or tile.keys),
            ("LEFT", int(effective_window(problem)[0] != UNBOUNDED)),
            ("RAGGED_KEYS", int(bool(ragged and box))),
            ("PRODUCER_REGISTERS", producer),
            ("CONSUMER_REGISTERS", consumer),
            ("LOAD_BYTES", 16),
            ("KV_SPLITS", int(splits > 1)),
        )
    return (
        *common,
        ("SCALE_FIRST", int(scale_first)),
        ("WARPS", tile.warps),
        ("STAGES", tile.stages),
        ("LOAD_BYTES", problem.alignment),
        ("STORE_BYTES", problem.out_alignment if splits == 1 else 4),
        ("KV_SPLITS", int(splits > 1)),
    )


def _refuse_device(device: Device, expected: str) -> NoReturn:
    refuse("device", f"{device.name or 'a GPU'} (sm_{device.arch})", expected)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _round_up(value: int, multiple: int) -> int:
    return _ceil_div(value, multiple) * multiple
