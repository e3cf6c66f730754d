"""`cupyattn bench cache`: what the caches' bookkeeping, forks, snapshots and swaps take, beside the bare work of each.

An append is compared with the kernel's own call on prepared indices, a snapshot with a plain file of as many bytes, a
swap with a plain copy of as many; each pair in the same run, in turns. Everything takes the array module, so that the
same code runs on NumPy, where there are no streams to wait for.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from ..attention import append_kv
from ..kvcache import BlockAllocator, PagedKVCache
from ..kvcache.snapshot_file import CHUNK
from ..timing import EventTimer
from .bench_common import OURS, Call, Report, choose, first_line, host_time, new_figure
from .bench_prefill import fill
from .device import synchronize, to_host
from .progress import progress_bars

KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 128, 16
POOL_BLOCKS = 1 << 16
BLOCKS_A_CALL = (16, 256, 4096)
BATCH, CALLS = 256, 100  # sequences of an append; appends in a row, before anything waits for the device
ROOM = 512  # tokens that each of these sequences may grow by before it is cut back
CHECKED = 3  # appends whose rows are looked at
SAVED_LAYERS, SAVED_SEQUENCES = 32, 8
SWAP_WARMUP = 3  # pinned memory is slow to allocate, and comes back to its pool one swap late
PERIOD = 8_388_593  # a prime: the bits of a cache repeat, but no two blocks are alike
APPEND, BARE = "PagedKVCache.append", "append_kv"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything is measured."""

    blocks: int  # taken in a round, by each size of call
    batches: int  # of appends, in a round
    held: int  # tokens of a sequence that is appended to
    host_calls: int
    fork_tokens: int
    forks: int  # in a round
    swap_gb: float
    cache_gb: float  # of the snapshot, where none is asked for


FULL = Sizes(
    blocks=1 << 20,
    batches=10,
    held=1024,
    host_calls=2000,
    fork_tokens=128 << 10,
    forks=100,
    swap_gb=1.0,
    cache_gb=8.0,
)
QUICK = Sizes(
    blocks=1 << 16,
    batches=2,
    held=64,
    host_calls=200,
    fork_tokens=16 << 10,
    forks=20,
    swap_gb=0.1,
    cache_gb=0.25,
)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, the median of its rounds, and what it should be."""

    what: str
    unit: str
    rounds: list[float]
    target: float | None = None
    at_most: bool = False  # the target is a bound from above
    wrong: bool = False  # keys and values did not come out as they went in

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def share(self) -> float:
        """How good the figure is in units of its target, 1 where it is just met; NaN without one."""
        if self.target is None:
            return math.nan
        best, other = (self.target, self.value) if self.at_most else (self.value, self.target)
        return best / other if other else math.inf

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def as_record(self) -> dict[str, Any]:
        """Ready for JSON."""
        about = {"what": self.what, "value": self.value, "unit": self.unit, "target": self.target}
        return about | {"at_most": self.at_most, "met": self.met, "wrong": self.wrong, "rounds": self.rounds}


@dataclass(slots=True)
class Measured:
    """All figures, and what kept parts from being measured."""

    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(
    cupy: ModuleType,
    gpu: str,
    contenders: str,
    rounds: int,
    quick: bool,
    host: bool,
    console: Console,
    cache_gb: float | None = None,
) -> Report:
    """Measure and show; `host` leaves out swaps and snapshots."""
    choose(contenders, {OURS: "cupyattn"}, console)
    measured = measure(cupy, QUICK if quick else FULL, rounds, host, cache_gb, console)
    show(measured, console, title=f"KV caches, bfloat16, on {gpu}")
    wrong = [row.what for row in measured.rows if row.wrong]
    return Report(as_record(measured, rounds), wrong, partial(plot, measured.rows))


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    cupy: ModuleType, sizes: Sizes, rounds: int, host: bool, cache_gb: float | None, console: Console
) -> Measured:
    """Every part in turn; one that fails, on a full disk for one, does not cost the figures of the others."""
    measured = Measured()
    parts: dict[str, Callable[[], list[Row]]] = {
        "allocator": partial(allocator_rows, sizes, rounds),
        "append": partial(append_rows, cupy, sizes, rounds),
        "fork": partial(fork_rows, cupy, sizes, rounds),
    }
    if not host:
        parts["swap"] = partial(swap_rows, cupy, int(sizes.swap_gb * 1e9), rounds)
    with progress_bars() as progress:
        task = progress.add_task("", total=len(parts))
        for name, part in parts.items():
            progress.update(task, description=name)
            add(measured, name, part)
            progress.advance(task)
    if not host:  # without a bar around it: saving and loading show their own
        asked = int((sizes.cache_gb if cache_gb is None else cache_gb) * 1e9)
        add(measured, "snapshot", partial(snapshot_part, cupy, asked, rounds, console))
    return measured


def add(measured: Measured, name: str, part: Callable[[], list[Row]]) -> None:
    """The rows of one part, or why there are none."""
    try:
        measured.rows += part()
    except Exception as error:  # of the disk, of either memory: whatever it is, it is what is reported
        measured.failed[name] = first_line(error)


def timed(xp: ModuleType, call: Call, calls: int = 1) -> tuple[float, Any]:
    """Microseconds of a call, host and device, waiting only behind the last of so many; and what that one gave."""
    synchronize(xp)
    started = time.perf_counter_ns()
    for _ in range(calls):
        given = call()
    synchronize(xp)
    return (time.perf_counter_ns() - started) / 1e3 / calls, given


def in_turns(
    calls: Mapping[str, Call], rounds: int, microseconds: Callable[[Call], float], before: Call = lambda: None
) -> dict[str, list[float]]:
    """Microseconds of each call in each round. Every other round goes backwards; `before` is not measured."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            before()
            found[name].append(microseconds(calls[name]))
    return found


def gb_per_s(nbytes: int, microseconds: list[float]) -> list[float]:
    """The speed at which so many bytes were moved, in each round."""
    return [nbytes / us / 1e3 for us in microseconds]


# --- allocator -------------------------------------------------------------------------------------------------------


def allocator_rows(sizes: Sizes, rounds: int) -> list[Row]:
    """Blocks taken and given back in a second, by the number of blocks in a call. Host only, one thread."""
    return [
        Row(
            f"allocate and free, {count} blocks a call",
            "operations/s",
            [blocks_per_s(count, max(1, sizes.blocks // count)) for _ in range(rounds)],
            target=2e6,
        )
        for count in BLOCKS_A_CALL
    ]


def blocks_per_s(count: int, calls: int) -> float:
    """Blocks taken in calls of `count` each, and given back in as many, by second."""
    allocator = BlockAllocator(POOL_BLOCKS, BLOCK_SIZE)
    taken = allocator.allocate(POOL_BLOCKS)
    allocator.free(np.random.default_rng(0).permutation(taken))  # as scattered as in a pool long in use
    us, _ = timed(np, lambda: allocator.free(allocator.allocate(count)), calls)
    return 2 * count / us * 1e6


# --- append ----------------------------------------------------------------------------------------------------------


def new_cache(xp: ModuleType, num_blocks: int, num_layers: int = 1) -> PagedKVCache:
    """An empty cache where xp has its arrays."""
    device = None if xp is np else xp.cuda.Device().id
    return PagedKVCache(
        num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, num_layers=num_layers, dtype="bfloat16", device=device
    )


class Growing:
    """A batch of sequences that grow by a token a call, and the same rows written by the kernel's own function."""

    def __init__(self, xp: ModuleType, held: int) -> None:
        rng = np.random.default_rng(0)
        # Sequences come and go, so that a sixteenth of them needs a new block in each step.
        self.lengths = held + np.arange(BATCH) % BLOCK_SIZE
        self.cache = new_cache(xp, int((-(-(self.lengths + ROOM) // BLOCK_SIZE)).sum()))
        self.seqs = [self.cache.add() for _ in range(BATCH)]
        self.cache.extend(self.seqs, self.lengths)
        rows = rng.standard_normal((2, BATCH, 1, KV_HEADS, HEAD_DIM), np.float32).astype(ml_dtypes.bfloat16)
        self.k, self.v = (xp.asarray(side) for side in rows)
        self.left = ROOM
        # In place of each sequence's last token, which stays its own however often the sequence is cut back.
        self.bare = partial(
            append_kv,
            self.cache.k,
            self.cache.v,
            self.k,
            self.v,
            block_table=self.cache.block_table(self.seqs).array,
            cache_seqlens=xp.asarray((self.lengths - 1).astype(np.int32)),
        )

    def append(self) -> None:
        """A token to each sequence; all are cut back where there is no room, which is seldom."""
        if not self.left:
            self.cut_back()
        self.cache.append(self.k, self.v, self.seqs)
        self.left -= 1

    def cut_back(self) -> None:
        """Every sequence as long as in the beginning. Host only."""
        self.cache.truncate(self.seqs, self.lengths)
        self.left = ROOM

    def right(self) -> bool:
        """Whether appends put each sequence's row behind what it holds: the first one, and others that follow it."""
        self.cut_back()
        for _ in range(CHECKED):
            self.append()
        rows = [to_host(side[i]).view(np.uint16).repeat(CHECKED, 0) for i in range(BATCH) for side in (self.k, self.v)]
        return same(tails(self.cache, CHECKED), rows) and np.array_equal(self.cache.lengths, self.lengths + CHECKED)


def tails(cache: PagedKVCache, tokens: int = BLOCK_SIZE) -> list[np.ndarray]:
    """Keys and values of the last tokens of each sequence, as bits on the host."""
    return [to_host(side).view(np.uint16) for seq in cache for side in cache[seq, -tokens:]]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """Whether these arrays are equal, one by one."""
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def append_rows(xp: ModuleType, sizes: Sizes, rounds: int) -> list[Row]:
    """A token to each of 256 sequences, by the cache and by `append_kv` with prepared indices."""
    growing = Growing(xp, sizes.held)
    calls: dict[str, Call] = {APPEND: growing.append, BARE: growing.bare}
    for call in calls.values():  # compiles, and fills the pools
        timed(xp, call, CALLS)
    wall = in_turns(calls, rounds * sizes.batches, lambda call: timed(xp, call, CALLS)[0], growing.cut_back)
    timer = EventTimer(xp)
    device = in_turns(calls, rounds, lambda call: 1e3 * timer(call))
    ratio = [ours / bare for ours, bare in zip(wall[APPEND], wall[BARE], strict=True)]
    what = f"{BATCH} sequences, a token each"
    rows = [Row(f"{APPEND} over {BARE}, {what}", "ratio", ratio, 1.2, at_most=True, wrong=not growing.right())]
    for name, call in calls.items():
        host = host_time(xp, call, sizes.host_calls)["median_us"]
        rows.append(Row(f"{name}, {what}", "µs", wall[name]))
        rows.append(Row(f"{name}, host time", "µs", [host]))
        rows.append(Row(f"{name}, device time", "µs", device[name]))
    return rows


# --- fork ------------------------------------------------------------------------------------------------------------


def fork_rows(xp: ModuleType, sizes: Sizes, rounds: int) -> list[Row]:
    """A fork of one long sequence, and what it copied. The device is waited for, so that a copy would show."""
    blocks = -(-sizes.fork_tokens // BLOCK_SIZE)
    cache = new_cache(xp, 2 * blocks)  # room for a copy too
    seq = cache.add()
    cache.extend(seq, sizes.fork_tokens)
    spent, copied, wrong = [], 0, False
    for _ in range(rounds):
        taken = []
        for _ in range(sizes.forks):
            us, fork = timed(xp, partial(cache.fork, seq))
            taken.append(us)
            copied = max(copied, cache.allocator.num_used - blocks)
            wrong |= cache.length(fork) != sizes.fork_tokens
            cache.free(fork)
        spent.append(statistics.median(taken))
    what = f"fork of {sizes.fork_tokens >> 10}k tokens"
    copied_bytes = copied * cache.nbytes // cache.num_blocks
    return [
        Row(what, "µs", spent, 50.0, at_most=True, wrong=wrong),
        Row(f"{what}, copied", "bytes of KV", [copied_bytes], 0.0, at_most=True),
    ]


# --- swap ------------------------------------------------------------------------------------------------------------


def full_cache(xp: ModuleType, nbytes: int) -> PagedKVCache:
    """A cache of about so many bytes, all of its blocks full of bits that do not compress."""
    block = 2 * SAVED_LAYERS * BLOCK_SIZE * KV_HEADS * HEAD_DIM * 2
    blocks = max(1, nbytes // (block * SAVED_SEQUENCES))
    cache = new_cache(xp, blocks * SAVED_SEQUENCES, SAVED_LAYERS)
    seqs = [cache.add() for _ in range(SAVED_SEQUENCES)]
    cache.extend(seqs, blocks * BLOCK_SIZE)
    bits = xp.asarray(np.random.default_rng(0).integers(0, 1 << 16, PERIOD, np.uint16))
    fill(cache.k, bits)
    fill(cache.v, bits[::-1])
    return cache


def pinned_copies(cupy: ModuleType, cache: PagedKVCache) -> tuple[Call, Call]:
    """All bytes of a cache to pinned memory, and back: each a plain copy of its keys and one of its values."""
    import cupyx

    runtime = cupy.cuda.runtime
    sides = [(side, cupyx.empty_pinned(side.shape, side.dtype)) for side in (cache.k, cache.v)]

    def out() -> None:
        stream = cupy.cuda.get_current_stream().ptr
        for side, held in sides:
            runtime.memcpyAsync(held.ctypes.data, side.data.ptr, held.nbytes, runtime.memcpyDeviceToHost, stream)

    def back() -> None:
        stream = cupy.cuda.get_current_stream().ptr
        for side, held in sides:
            runtime.memcpyAsync(side.data.ptr, held.ctypes.data, held.nbytes, runtime.memcpyHostToDevice, stream)

    return out, back


def swap_rows(xp: ModuleType, nbytes: int, rounds: int) -> list[Row]:
    """All sequences of a cache to the host's pinned memory and back, beside plain copies of as many bytes."""
    cache = full_cache(xp, nbytes)
    seqs, before = list(cache), tails(cache)
    plain_out, plain_in = pinned_copies(xp, cache)
    # What goes out must come back before the next call: these stay in this order in every round.
    calls: dict[str, Call] = {
        "swap_out": partial(cache.swap_out, seqs),
        "swap_in": partial(cache.swap_in, seqs),
        "plain copy to pinned memory": plain_out,
        "plain copy from pinned memory": plain_in,
    }
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SWAP_WARMUP + rounds):
        for name, call in calls.items():
            spent[name].append(timed(xp, call)[0])
    wrong = not same(tails(cache), before)
    return [
        Row(f"{name}, {_size(cache.nbytes)}", "GB/s", gb_per_s(cache.nbytes, us[SWAP_WARMUP:]), wrong=wrong)
        for name, us in spent.items()
    ]


# --- snapshot --------------------------------------------------------------------------------------------------------


def snapshot_part(cupy: ModuleType, asked: int, rounds: int, console: Console) -> list[Row]:
    """`snapshot_rows` in a temporary directory of the current disk, with as much of what was asked for as fits."""
    with TemporaryDirectory(prefix=".cupyattn-bench-", dir=".") as folder:
        cupy.get_default_memory_pool().free_all_blocks()
        nbytes = that_fits(asked, cupy.cuda.runtime.memGetInfo()[0], shutil.disk_usage(folder).free)
        if nbytes < asked:
            console.print(f"a cache of {_size(nbytes)} is saved, not of {_size(asked)}: no room", style="dim")
        return snapshot_rows(cupy, Path(folder), nbytes, rounds)


def that_fits(asked: int, memory: int, disk: int) -> int:
    """Bytes of a cache that has room twice in the memory that is free, and of whose file half of the disk has."""
    return min(asked, memory // 3, disk // 2)


def snapshot_rows(xp: ModuleType, folder: Path, nbytes: int, rounds: int) -> list[Row]:
    """Saving and loading a cache of so many bytes, beside plain files of as many bytes in the same folder."""
    snapshot_round(xp, full_cache(xp, 0), folder)  # a small one: compiles, and fills the pools
    cache = full_cache(xp, nbytes)
    found = [snapshot_round(xp, cache, folder) for _ in range(rounds)]
    file_bytes = found[0].file_bytes
    wrong = not all(one.right for one in found)
    speeds = {name: gb_per_s(file_bytes, [one.spent[name] for one in found]) for name in found[0].spent}
    return [
        Row(f"{name}, {_size(file_bytes)}", "GB/s", values, None if "plain" in name else 1.0, wrong=wrong)
        for name, values in speeds.items()
    ]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One save and load, and plain files beside them."""

    spent: dict[str, float]  # microseconds
    file_bytes: int
    right: bool  # what came back has the bits of what was saved


def snapshot_round(xp: ModuleType, cache: PagedKVCache, folder: Path) -> Snapshot:
    """Save, load and the plain twins of both. One file is there at a time; all are flushed to the disk."""
    saved, plain, spent = folder / "cache.safetensors", folder / "plain", {}
    spent["save"], _ = timed(xp, partial(cache.save, saved))
    spent["load"], loaded = timed(xp, partial(PagedKVCache.load, saved, device=cache.device))
    file_bytes = saved.stat().st_size
    right = same(tails(loaded), tails(cache))
    piece = np.random.default_rng(0).integers(0, 256, CHUNK, np.uint8)
    spent["plain read"], _ = timed(np, partial(read_plainly, saved, piece.copy()))
    saved.unlink()
    spent["plain write"], _ = timed(np, partial(write_plainly, plain, piece, file_bytes))
    plain.unlink()
    return Snapshot(spent, file_bytes, right)


def write_plainly(path: Path, piece: np.ndarray, nbytes: int) -> None:
    """A new file of so many bytes, the piece over and over, on the disk when this returns."""
    with open(path, "wb") as file, progress_bars() as progress:
        for start in progress.track(range(0, nbytes, len(piece)), description="plain write"):
            file.write(piece[: nbytes - start])
        file.flush()
        os.fsync(file.fileno())


def read_plainly(path: Path, room: np.ndarray) -> int:
    """All bytes of a file into the same room, over and over. Returns how many there were."""
    count = 0
    pieces = range(0, path.stat().st_size, len(room))
    with open(path, "rb") as file, progress_bars() as progress:
        for _ in progress.track(pieces, description="plain read"):
            count += file.readinto(room)
    return count


# --- reporting -------------------------------------------------------------------------------------------------------


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"


def slowest_first(rows: list[Row]) -> list[Row]:
    """Those farthest behind their target first, those without one last."""
    return sorted(rows, key=lambda row: (row.target is None, 0.0 if row.target is None else row.share))


def as_record(measured: Measured, rounds: int) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    return {
        "protocol": {
            "dtype": "bfloat16",
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "block_size": BLOCK_SIZE,
            "rounds": rounds,
            "value": "median of the rounds",
            "operations": "a block taken is one and a block given back is another; one thread; a pool of "
            f"{POOL_BLOCKS} blocks in random order",
            "append": f"wall-clock of {CALLS} calls in a row over {CALLS}, the device waited for behind the last; "
            "append_kv has its block table and lengths on the device; ratio of neighbouring batches",
            "host time": "of one call, nothing waited for",
            "device time": "CUDA events around each call, L2 flushed before it; where the host takes longer than the "
            "flush, what it is late by is in it",
            "fork": "wall-clock, the device waited for; copied: blocks in use after it and not before",
            "swap": f"wall-clock with the device waited for, {SAVED_LAYERS} layers, {SAVED_SEQUENCES} sequences; "
            "plain: cudaMemcpyAsync of keys and of values",
            "snapshot": f"wall-clock, {SAVED_LAYERS} layers; save and plain write end with fsync; load and plain read "
            "read what was just written, from the page cache as far as it holds it",
        },
        "rows": [row.as_record() for row in slowest_first(measured.rows)],
        "failed": measured.failed,
    }


def show(measured: Measured, console: Console, title: str) -> None:
    """All figures, those farthest behind their target first, then what could not be measured."""
    table = Table(title=title, caption="farthest behind its target first", title_justify="left")
    table.add_column("what")
    for header in ("value", "unit", "target"):
        table.add_column(header, justify="left" if header == "unit" else "right")
    for row in slowest_first(measured.rows):
        bound = "" if row.target is None else f"{'≤' if row.at_most else '≥'} {_number(row.target)}"
        style = {True: "green", False: "red", None: None}[row.met]
        table.add_row(row.what, _number(row.value), row.unit, bound, style=style)
    console.print(table)
    for name, reason in measured.failed.items():
        console.print(f"{name} could not be measured: {reason}", markup=False, style="red")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plot(rows: list[Row], path: Path, gpu: str) -> None:
    """How far each figure is from its target, as a bar; over 1 is better."""
    shown = [row for row in reversed(slowest_first(rows)) if math.isfinite(row.share) and row.share > 0]
    figure = new_figure(9, 1 + 0.4 * len(shown))
    axis = figure.subplots()
    axis.barh([row.what for row in shown], [row.share for row in shown])
    axis.axvline(1, color="0.3", lw=1)
    axis.set(xscale="log", xlabel="times better than the target", title=f"KV caches, bfloat16, {gpu}")
    axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120)
