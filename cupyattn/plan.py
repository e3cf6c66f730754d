"""Problem + device -> Plan: which kernel, which tile, which grid. Every heuristic of the library lives here.

A `Plan` holds no pointer and depends on nothing but its two arguments, so it can be made, read and tested for a
chip that is not present. The measurements that justify a choice stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from .problem import Append, Cache, Problem, refuse

Defines = tuple[tuple[str, int], ...]

DTYPE_CODES = {"float16": 0, "bfloat16": 1, "float32": 2}
CACHE_CODES = {"dense": 0, "packed": 1, "paged": 2}
KERNELS = ("forward_sm80", "forward_simt")
UNBOUNDED = -1


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan needs to know of a GPU. Sizes in bytes."""

    arch: str  # as NVRTC names it behind "sm_": "80", "90a"
    multiprocessors: int
    shared_per_block: int  # the most that a block can ask for
    shared_per_multiprocessor: int
    name: str = ""

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
STATIC_SHARED = 1 << 10  # a forward kernel's own, which aligns the tiles behind it


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
SIMT_TILE = Tile(64, 64, 8, 1)
# (sequence, head) pairs of a dense batch that are worked on together. Under a mask the long tiles of all of them
# come first, and 16 pairs are enough to even out the load; without one, a pair at a time keeps its keys in the L2
# cache. Sections of all pairs lose up to 0.15 of the speed (notebooks/results/tiles.json).
CAUSAL_SECTION = 16
FULL_SECTION = 1
# Of the 255 registers of a thread: what accumulators may take without spills, as the compile tests see it: less from
# sm_100 on. A soft cap or ALiBi needs registers for each score, and there for each row: a warp then gets 16 rows.
MAX_ACCUMULATORS = 192
MAX_ACCUMULATORS_SM100 = 160
MAX_ACCUMULATORS_SHAPED = 160
MAX_KEYS_SHAPED = 64


def plan(
    problem: Problem,
    device: Device,
    kernel: str = "auto",
    tile: Tile | None = None,
    pairs_per_section: int | None = None,
) -> Plan:
    """Choose kernel, tile and grid for one problem on one device.

    kernel: "auto", or one of `KERNELS` to insist; ValueError when it cannot serve the problem there.
    tile, pairs_per_section: insist on these for forward_sm80, as `cupyattn bench --tiles` does to compare them.
    """
    name, why = choose_kernel(problem, device, kernel)
    typical_rows = _typical_rows(problem)
    window = effective_window(problem)
    masked = window != (UNBOUNDED, UNBOUNDED)
    if name == "forward_simt":
        tile = SIMT_TILE
        group = _packed_group(problem, tile.rows, typical_rows)
        reasons = [why]
        shared = 0
    else:
        padded = _round_up(problem.head_dim, 16)
        if tile is None:
            tile, group, reason = _choose_tile(problem, device, padded, typical_rows)
        else:
            group, reason = _packed_group(problem, tile.rows, typical_rows), "the caller insists on the tile"
        reasons = [why, reason]
        shared = tile.shared_bytes(padded)
    if group > 1:
        reasons.append(f"the {group} query heads of a group share a tile, so their keys are read once")

    heads = problem.num_kv_heads if group > 1 else problem.num_heads
    pairs = problem.batch * heads
    if problem.packed_q:
        # An upper bound that needs no lengths: full tiles, and one more for each sequence and for rows behind the last.
        tiles_per_sequence, pairs_per_section = 0, 1
        grid = (problem.total_q * group // tile.rows + problem.batch + 1) * heads
        reasons.append(
            "lengths stay on the device: the grid covers any split of the rows, and spare blocks leave at once"
        )
    else:
        tiles_per_sequence = _ceil_div(problem.seqlen_q * group, tile.rows)
        if pairs_per_section is None:
            pairs_per_section = CAUSAL_SECTION if masked else FULL_SECTION
        pairs_per_section = max(1, min(pairs, pairs_per_section))
        grid = tiles_per_sequence * pairs
        if masked:
            reasons.append(
                f"long tiles come first within every {pairs_per_section} heads, and short ones fill the gaps"
            )
    if grid >= 2**31:
        refuse(
            "q", f"{problem.total_q} rows of {heads} heads, which take {grid} thread blocks", "at most 2**31 - 1 blocks"
        )
    return Plan(
        kernel=name,
        defines=_defines(problem, name, tile, group, masked),
        grid=grid,
        threads=tile.warps * 32,
        shared_bytes=shared,
        tile_rows=tile.rows,
        tile_keys=tile.keys,
        warps=tile.warps,
        stages=tile.stages,
        group=group,
        window=window,
        tiles_per_sequence=tiles_per_sequence,
        pairs_per_section=pairs_per_section,
        reasons=tuple(reasons),
    )


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
    if kernel == "forward_sm80" and obstacle:
        refuse("kernel", "'forward_sm80'", f"'auto' or 'forward_simt': {obstacle}")
    if kernel != "auto":
        return kernel, "asked for by name"
    if obstacle:
        return "forward_simt", obstacle
    return "forward_sm80", f"{problem.dtype} on sm_{device.arch} takes the tensor cores"


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


def plan_append(append: Append) -> tuple[Defines, int, int]:
    """Compile-time values, grid and threads of one append."""
    threads = 256
    itemsize = 4 if append.dtype == "float32" else 2
    piece = math.gcd(append.alignment, append.head_dim * itemsize)
    pieces = append.total_new * append.num_kv_heads * (append.head_dim * itemsize // piece)
    defines = (
        ("DTYPE", DTYPE_CODES[append.dtype]),
        ("HEAD_DIM", append.head_dim),
        ("PACKED_NEW", int(append.packed_new)),
        ("CACHE_KIND", CACHE_CODES[append.cache.kind]),
        ("BLOCK_SIZE", append.cache.block_size or 1),
        ("COPY_BYTES", piece),
        ("THREADS", threads),
    )
    return defines, _ceil_div(pieces, threads), threads


def warmup_variants(
    arch: str, head_dims: tuple[int, ...] = (64, 128), dtypes: tuple[str, ...] = ("float16", "bfloat16")
) -> list[tuple[str, Defines]]:
    """The variants that a first session usually meets, for compiling ahead: prefill of dense and packed batches,
    full and causal, and prefill and decode against a paged cache of 16-row blocks with 4 query heads to a kv head."""
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
                append = Append(dtype, 8, 8, head_dim, packed, 1024, 128, cache, strides, strides, False, 16)
                found[("append_kv", plan_append(append)[0])] = None
    return list(found)


def _typical_problems(dtype: str, head_dim: int) -> list[Problem]:
    strides = (0, 0, 0)

    def problem(packed_q: bool, kind: str, seqlen_q: int, window: tuple[int, int], lse: bool = False) -> Problem:
        batch, block = 64, 16 if kind == "paged" else 0
        cache = Cache(kind, 1024, 4096, block, 256 if block else 0, 256 if block else 0, strides, strides)
        return Problem(
            dtype=dtype, batch=batch, num_heads=32, num_kv_heads=8, head_dim=head_dim, packed_q=packed_q,
            total_q=batch * seqlen_q, seqlen_q=seqlen_q, seqlen_k=4096, seqlen_new=0, cache=cache, q_strides=strides,
            o_strides=strides, window=window, softmax_scale=1.0, softcap=0.0, alibi="", sinks=False, lse=lse,
            cu_seqlens_k=kind == "packed", seqused_k=kind == "paged", cache_batch_idx=False, leftpad=False,
            alignment=16, out_alignment=16,
        )  # fmt: skip

    full, causal = (UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0)
    return [
        problem(False, "dense", 4096, full),
        problem(False, "dense", 4096, causal),
        problem(True, "packed", 4096, causal),
        problem(True, "paged", 4096, causal),
        problem(False, "paged", 1, full),
    ]


def _choose_tile(problem: Problem, device: Device, padded_dim: int, typical_rows: int) -> tuple[Tile, int, str]:
    shaped = bool(problem.softcap or problem.alibi)
    large, small = (_fitting(table, padded_dim, device, shaped) for table in (LARGE_TILES, SMALL_TILES))
    group = _packed_group(problem, large.rows, typical_rows)
    heads = problem.num_kv_heads if group > 1 else problem.num_heads
    rows = typical_rows * group
    if rows <= small.rows < large.rows:
        reason = f"{rows} rows fill one tile of {small.rows}"
        return small, _packed_group(problem, small.rows, typical_rows), reason
    blocks = _ceil_div(rows, large.rows) * problem.batch * heads
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


def _defines(problem: Problem, kernel: str, tile: Tile, group: int, masked: bool) -> Defines:
    common = (
        ("DTYPE", DTYPE_CODES[problem.dtype]),
        ("HEAD_DIM", problem.head_dim),
        ("TILE_M", tile.rows),
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
        return (*common, ("SCALE_FIRST", 1))
    # A scale of 0 or less would turn the running maximum of unscaled scores into a minimum.
    scale_first = bool(problem.alibi) or problem.softmax_scale <= 0
    return (
        *common,
        ("SCALE_FIRST", int(scale_first)),
        ("WARPS", tile.warps),
        ("STAGES", tile.stages),
        ("LOAD_BYTES", problem.alignment),
        ("STORE_BYTES", problem.out_alignment),
    )


def _refuse_device(device: Device, expected: str) -> NoReturn:
    refuse("device", f"{device.name or 'a GPU'} (sm_{device.arch})", expected)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _round_up(value: int, multiple: int) -> int:
    return _ceil_div(value, multiple) * multiple
