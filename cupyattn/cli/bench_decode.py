"""`cupyattn bench decode`: one new token a sequence over a paged cache, against peers and against a plain read.

Decode reads every cached key and value once, so each cell is measured beside the fastest read of as many bytes, in the
same rounds. Cells that are compared with one another, as an uneven batch with an even one, share their rounds too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console

from ..attention import attention, attention_with_kvcache
from ..timing import MEASURE_MS, WARMUP_MS, EventTimer
from .bench_common import (
    OURS,
    TIMING,
    Call,
    Report,
    Result,
    Results,
    attempt,
    choose,
    clocks,
    host_time,
    new_figure,
    ratio_table,
    ratios,
    show_host,
    show_refusals,
    show_summary,
    summary,
    wrong_cells,
)
from .bench_stream import Stream
from .device import to_host
from .progress import progress_bars
from .tolerance import tolerance_of

HEAD_DIM, BLOCK_SIZE = 128, 16
ROWS = (
    (1, 1024),
    (1, 8192),
    (1, 65536),
    (1, 131072),
    (8, 8192),
    (16, 2048),
    (32, 4096),
    (64, 8192),
    (128, 2048),
    (256, 1024),
)
HEADS = ((32, 8), (32, 32), (64, 8), (16, 1))
FP8 = "float8_e4m3fn"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, FP8: ml_dtypes.float8_e4m3fn}
STREAM, FLASHINFER, FLASHINFER_TC = "stream", "flashinfer", "flashinfer_tc"
LARGE_BYTES, SMALL_BYTES = 1e9, 34e6  # cells that the memory's stream bounds, and those that latency bounds
PLAN_RUN = "DecodePlan.run on {} arrays"
Q_SCALE = 3.0  # makes the softmax sharp, so that outputs are of the size of values and a wrong one shows


@dataclass(frozen=True, slots=True)
class Cell:
    """One decode step: a batch of sequences, each with one query, over a paged cache in bfloat16 or FP8."""

    section: str
    batch: int
    seqlen: int  # keys of each sequence, their mean if uneven
    heads: int = 32
    kv_heads: int = 8
    block_size: int = BLOCK_SIZE
    kv_dtype: str = "bfloat16"
    uneven: bool = False
    append: bool = False  # the last key and value are appended in the same call, with rotary
    prefix: int = 0  # tokens at the beginning that all sequences share and that are to be read once

    @property
    def itemsize(self) -> int:
        return np.dtype(DTYPES[self.kv_dtype]).itemsize

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that have to be read."""
        tokens = self.prefix + self.batch * (self.seqlen - self.prefix)
        return 2 * tokens * self.kv_heads * HEAD_DIM * self.itemsize

    def lengths(self) -> np.ndarray:
        """Keys of each sequence behind the prefix; uneven ones are log-normal, with the same sum as even ones."""
        if not self.uneven:
            return np.full(self.batch, self.seqlen - self.prefix, np.int32)
        drawn = np.random.default_rng(0).lognormal(sigma=1.0, size=self.batch)
        lengths = np.maximum(1, drawn * (self.batch * self.seqlen / drawn.sum())).astype(np.int32)
        lengths[lengths.argmax()] += self.batch * self.seqlen - lengths.sum()
        return lengths

    def blocks(self) -> np.ndarray:
        """Cache blocks of each sequence."""
        return -(-self.lengths() // self.block_size)

    @property
    def pool_elements(self) -> int:
        """Elements of its k_cache, with the prefix before it; as many again are its v_cache."""
        rows = self.prefix + int(self.blocks().sum()) * self.block_size
        return rows * self.kv_heads * HEAD_DIM

    def __str__(self) -> str:
        words = [f"{self.batch} × {_short(self.seqlen)} {self.heads}/{self.kv_heads}"]
        words += [f"block size {self.block_size}"] if self.section == "blocks" else []
        words += [self.kv_dtype] if self.section == "fp8" else []
        words += ["uneven" if self.uneven else "even"] if self.section == "uneven" else []
        words += ["append + rotary" if self.append else "attention alone"] if self.section == "append" else []
        words += ["prefix read once" if self.prefix else "nothing shared"] if self.section == "shared" else []
        return ", ".join(words)


def _short(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


Group = tuple[Cell, ...]
"""Cells that share their rounds, because they are compared with one another."""

GRID: tuple[Group, ...] = tuple((Cell("grid", *row, *heads),) for heads, row in product(HEADS, ROWS))
UNEVEN: Group = (Cell("uneven", 128, 4096, uneven=True), Cell("uneven", 128, 4096))
BLOCKS: Group = tuple(Cell("blocks", 64, 8192, block_size=size) for size in (1, 16, 64, 256))
FP8S: tuple[Group, ...] = tuple(
    (Cell("fp8", *row, kv_dtype=FP8), Cell("fp8", *row)) for row in ((1, 8192), (32, 4096), (64, 8192))
)
APPENDS: tuple[Group, ...] = tuple(
    (Cell("append", *row, append=True), Cell("append", *row)) for row in ((16, 2048), (32, 4096), (64, 8192))
)
PREFIX, SUFFIX = 32768, 256
SHARED: Group = (Cell("shared", 64, PREFIX + SUFFIX, prefix=PREFIX), Cell("shared", 64, PREFIX + SUFFIX))
FULL = (*GRID, UNEVEN, BLOCKS, *FP8S, *APPENDS, SHARED)
QUICK = (
    *(group for group in GRID if group[0].batch * group[0].seqlen <= 8192),
    BLOCKS[1::2],
    FP8S[0],
    APPENDS[0],
)


def run(cupy: ModuleType, gpu: str, contenders: str, rounds: int, quick: bool, host: bool, console: Console) -> Report:
    """Measure and show; `host` leaves out all cells."""
    names = choose(contenders, {name: module for name, (module, _) in CONTENDERS.items()}, console)
    host_us = host_times(cupy, names)
    measured = Measured()
    if not host:
        measured = measure(cupy, that_fit(cupy, QUICK if quick else FULL, console), names, rounds)
        show(measured.results, names, console, title=f"Decode, head_dim {HEAD_DIM}, bfloat16, TB/s of KV on {gpu}")
        for finding in findings(measured.results, host_us):
            console.print(str(finding), style="green" if finding.met else "red", highlight=False)
        console.print(f"an empty launch takes {measured.empty_launch_us:.1f} µs", highlight=False)
    show_host(host_us, console)
    record = as_record(measured, host_us, rounds)
    return Report(record, wrong_cells(measured.results), partial(plot, measured.results))


# --- what a cell looks like in memory --------------------------------------------------------------------------------


@dataclass(slots=True)
class Case:
    """A cell's arrays on the GPU."""

    cell: Cell
    q: Any
    k_cache: Any
    v_cache: Any
    block_table: Any
    cache_seqlens: Any
    out: Any
    k: Any = None
    v: Any = None
    rotary_cos: Any = None
    rotary_sin: Any = None
    k_prefix: Any = None
    v_prefix: Any = None

    def map(self, function: Callable[[Any], Any]) -> Case:
        """The same case with another library's arrays."""
        arrays = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "cell"}
        return replace(self, **{name: function(x) for name, x in arrays.items() if x is not None})


class Pool:
    """Random numbers on the GPU, allocated once, of which every cell's caches are slices."""

    PERIOD = 8_388_593  # a prime: the numbers repeat, but no two blocks are alike

    def __init__(self, cupy: ModuleType, dtype: str, cells: Iterable[Cell]) -> None:
        self.dtype = np.dtype(DTYPES[dtype])
        self.size = max(cell.pool_elements for cell in cells)
        bits = f"uint{8 * self.dtype.itemsize}"
        numbers = np.random.default_rng(0).standard_normal(self.PERIOD, np.float32).astype(self.dtype)
        numbers = cupy.asarray(numbers.view(bits))
        self.bits = cupy.empty(2 * self.size, bits)
        for start in range(0, self.bits.size, self.PERIOD):
            part = self.bits[start : start + self.PERIOD]
            part[...] = numbers[: part.size]

    def rows(self, cell: Cell) -> tuple[Any, Any]:
        """Keys and values (rows, kv_heads, head_dim): bfloat16, or the bits of FP8."""
        parts = self.bits[: cell.pool_elements], self.bits[self.size : self.size + cell.pool_elements]
        parts = [part.reshape(-1, cell.kv_heads, HEAD_DIM) for part in parts]
        return tuple(part if self.dtype.itemsize == 1 else part.view(self.dtype) for part in parts)


def block_table(cell: Cell) -> np.ndarray:
    """Blocks of each sequence: a random permutation of all that there are, rows padded with block 0."""
    blocks = cell.blocks()
    table = np.zeros((cell.batch, blocks.max()), np.int32)
    table[np.arange(blocks.max()) < blocks[:, None]] = np.random.default_rng(1).permutation(blocks.sum())
    return table


def place(cupy: ModuleType, cell: Cell, pool: Pool) -> Case:
    """The cell's arrays on the GPU."""
    rng = np.random.default_rng(2)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return cupy.asarray((scale * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16))

    rows = pool.rows(cell)
    k_cache, v_cache = (x[cell.prefix :].reshape(-1, cell.block_size, cell.kv_heads, HEAD_DIM) for x in rows)
    q = normal(cell.batch, 1, cell.heads, HEAD_DIM, scale=Q_SCALE)
    lengths = cupy.asarray(cell.lengths() - cell.append)
    case = Case(cell, q, k_cache, v_cache, cupy.asarray(block_table(cell)), lengths, cupy.empty_like(q))
    if cell.append:
        case.k, case.v = (normal(cell.batch, 1, cell.kv_heads, HEAD_DIM) for _ in "kv")
        angles = np.arange(cell.seqlen)[:, None] * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        case.rotary_cos, case.rotary_sin = (cupy.asarray(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    if cell.prefix:
        case.k_prefix, case.v_prefix = (x[: cell.prefix] for x in rows)
    return case


def that_fit(cupy: ModuleType, groups: tuple[Group, ...], console: Console) -> tuple[Group, ...]:
    """The groups whose caches fit the GPU's memory, with a tenth of it left for everything else."""
    free = 0.9 * cupy.cuda.runtime.memGetInfo()[0]
    fitting = tuple(group for group in groups if all(2 * c.pool_elements * c.itemsize < free for c in group))
    left_out = [str(cell) for group in groups if group not in fitting for cell in group]
    if left_out:
        console.print(f"too large for the memory that is free: {'; '.join(left_out)}", markup=False, style="dim")
    return fitting


# --- contenders: a case -> a call that gives (batch, 1, heads, head_dim) or (batch, heads, head_dim) -----------------


def _options(case: Case) -> dict[str, Any]:
    scales = dict(kv_dtype=FP8, k_scale=1.0, v_scale=1.0) if case.cell.kv_dtype == FP8 else {}
    return dict(block_table=case.block_table, cache_seqlens=case.cache_seqlens, **scales)


def _cupyattn(case: Case) -> Call:
    import cupyattn

    caches = case.q, case.k_cache, case.v_cache
    if case.cell.prefix:
        shared = case.k_prefix, case.v_prefix, case.k_cache, case.v_cache
        return partial(cupyattn.attention_with_shared_prefix, case.q, *shared, **_options(case))
    if case.cell.append or not hasattr(cupyattn, "DecodePlan"):
        return _one_call(case)
    plan = cupyattn.DecodePlan(*caches, **_options(case))
    now = dict(block_table=case.block_table, cache_seqlens=case.cache_seqlens, out=case.out)
    return partial(plan.run, *caches, **now)


def _one_call(case: Case) -> Call:
    """attention_with_kvcache, without a plan."""
    new = {}
    if case.cell.append:
        rotary = dict(rotary_cos=case.rotary_cos, rotary_sin=case.rotary_sin, rotary_interleaved=False)
        new = dict(k=case.k, v=case.v, **rotary)
    caches = case.q, case.k_cache, case.v_cache
    return partial(attention_with_kvcache, *caches, **_options(case), **new, out=case.out)


def _flashinfer(case: Case, *, tensor_cores: bool = False) -> Call:
    plan, planned = _flashinfer_calls(case, tensor_cores)
    plan()
    return planned


def _flashinfer_calls(case: Case, tensor_cores: bool) -> tuple[Call, Call]:
    """FlashInfer's plan for this step, and its run, which needs the plan first."""
    import flashinfer
    import torch

    cell = case.cell
    case = case.map(torch.from_dlpack)
    q, caches, out = case.q.flatten(0, 1), (case.k_cache, case.v_cache), case.out.flatten(0, 1)
    if cell.kv_dtype == FP8:
        caches = tuple(x.view(torch.float8_e4m3fn) for x in caches)
    blocks, lengths = cell.blocks(), cell.lengths()
    starts = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int32)
    used = torch.from_numpy(np.arange(blocks.max()) < blocks[:, None]).cuda()
    last = ((lengths - 1) % cell.block_size + 1).astype(np.int32)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=tensor_cores
    )
    plan = partial(
        wrapper.plan,
        torch.from_numpy(starts),
        case.block_table[used],
        torch.from_numpy(last),
        cell.heads,
        cell.kv_heads,
        HEAD_DIM,
        cell.block_size,
        q_data_type=q.dtype,
        kv_data_type=caches[0].dtype,
    )
    return plan, partial(wrapper.run, q, caches, out=out)


def _fa4(case: Case) -> Call:
    import torch
    from flash_attn.cute import flash_attn_varlen_func

    longest = int(case.cell.lengths().max())
    case = case.map(torch.from_dlpack)

    def call() -> Any:
        out = flash_attn_varlen_func(
            case.q,
            case.k_cache,
            case.v_cache,
            max_seqlen_k=longest,
            seqused_k=case.cache_seqlens,
            page_table=case.block_table,
            num_splits=0,
        )
        return out[0] if isinstance(out, tuple) else out

    return call


CONTENDERS: dict[str, tuple[str, Mapping[str, Callable[[Case], Call]]]] = {
    OURS: ("cupyattn", {OURS: _cupyattn}),
    FLASHINFER: (
        "flashinfer",
        {FLASHINFER: _flashinfer, FLASHINFER_TC: partial(_flashinfer, tensor_cores=True)},
    ),
    "fa4": ("flash_attn.cute", {"fa4": _fa4}),
}
"""Name -> (module that must be importable, how each of its kernels' calls is prepared)."""


def kernels_for(cell: Cell, names: list[str]) -> dict[str, Callable[[Case], Call]]:
    """The kernels to time in this cell: peers only where they have what is measured."""
    if cell.section in ("append", "shared"):
        names = [name for name in names if name == OURS]
    return {kernel: prepare for name in names for kernel, prepare in CONTENDERS[name][1].items()}


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """Results, which hold the plain read as one more contender, and what was around them."""

    results: Results = field(default_factory=dict)
    grids: dict[Cell, dict[str, Any]] = field(default_factory=dict)  # of the plain read
    clocks: dict[Cell, dict[str, float] | None] = field(default_factory=dict)  # right behind the last call
    empty_launch_us: float | None = None


def measure(cupy: ModuleType, groups: tuple[Group, ...], names: list[str], rounds: int) -> Measured:
    """Check and time every contender in every cell; one that raises is recorded as refused."""
    cells = [cell for group in groups for cell in group]
    dtypes = dict.fromkeys(cell.kv_dtype for cell in cells)
    pools = {dtype: Pool(cupy, dtype, (c for c in cells if c.kv_dtype == dtype)) for dtype in dtypes}
    timer = EventTimer(cupy)
    stream = Stream(cupy, timer, max((pool.bits for pool in pools.values()), key=lambda bits: bits.nbytes))
    measured = Measured(empty_launch_us=1e3 * stream.empty_launch_ms())
    with progress_bars() as progress:
        task = progress.add_task("", total=len(cells))
        for group in groups:
            timed: list[tuple[Result, Call]] = []
            for cell in group:
                progress.update(task, description=str(cell))
                case = place(cupy, cell, pools[cell.kv_dtype])
                row = measured.results[cell] = {}
                for name, prepare in kernels_for(cell, names).items():
                    case.out.view(np.uint16)[...] = 0xFFFF  # NaN: what was left unwritten is not taken for a result
                    call, row[name] = attempt(partial(prepare, case), partial(spot_check, cupy, case))
                    if call is not None:
                        timed.append((row[name], call))
                row[STREAM] = Result()
                timed.append((row[STREAM], stream.best(cell.kv_bytes)))
                measured.grids[cell] = stream.as_record(cell.kv_bytes)
            for _ in range(rounds):
                for result, call in timed:
                    result.rounds.append(timer(call))
            measured.clocks |= dict.fromkeys(group, clocks(cupy))
            progress.advance(task, len(group))
    return measured


def spot_check(cupy: ModuleType, case: Case, out: Any) -> float:
    """Error against float64 of one head of one sequence, in units of the tolerance; inf if any output is not finite."""
    cell = case.cell
    out = (out if isinstance(out, cupy.ndarray) else cupy.from_dlpack(out)).reshape(case.q.shape)
    if not bool(cupy.isfinite(out.astype(np.float32)).all()):
        return math.inf
    rng = np.random.default_rng(cell.seqlen)
    b, h = int(rng.integers(cell.batch)), int(rng.integers(cell.heads))
    kv_head = h // (cell.heads // cell.kv_heads)
    keys = rows_of(case, case.k_prefix, case.k_cache, b, kv_head)
    values = rows_of(case, case.v_prefix, case.v_cache, b, kv_head)
    q = to_host(case.q[b : b + 1, :, h : h + 1])
    if cell.append:  # the reference appends the same row to its copy once more, and rotates the query
        new = [to_host(x[b : b + 1, :, kv_head : kv_head + 1]) for x in (case.k, case.v)]
        exact = attention_with_kvcache(
            q,
            keys,
            values,
            k=new[0],
            v=new[1],
            rotary_cos=to_host(case.rotary_cos),
            rotary_sin=to_host(case.rotary_sin),
            rotary_interleaved=False,
            cache_seqlens=keys.shape[1] - 1,
            kernel="numpy_float64",
        )
    else:
        exact = attention(q, keys, values, kernel="numpy_float64")
    got = to_host(out[b : b + 1, :, h : h + 1]).astype(np.float64)
    return float(np.abs(got - exact).max()) / tolerance_of(values)


def rows_of(case: Case, prefix: Any, cache: Any, sequence: int, kv_head: int) -> np.ndarray:
    """All keys (or values) of one head of one sequence, on the host as (1, seqlen, 1, head_dim) in bfloat16."""
    cell = case.cell
    blocks = case.block_table[sequence, : int(cell.blocks()[sequence])]
    bits = f"uint{8 * cell.itemsize}"
    rows = to_host(cache.view(bits)[:, :, kv_head][blocks]).reshape(-1, HEAD_DIM)[: int(cell.lengths()[sequence])]
    if prefix is not None:
        rows = np.concatenate([to_host(prefix.view(bits)[:, kv_head]), rows])
    return rows.view(DTYPES[cell.kv_dtype]).astype(ml_dtypes.bfloat16)[None, :, None]


def host_times(cupy: ModuleType, names: list[str]) -> dict[str, dict[str, float]]:
    """Microseconds that the calls of one step on a small shape keep the host busy, peers' planning beside them."""
    cell = Cell("host", 1, 1024)
    case = place(cupy, cell, Pool(cupy, cell.kv_dtype, [cell]))
    cases = {"cupy": case}
    try:
        import torch

        cases["torch"] = case.map(torch.from_dlpack)
    except ImportError:
        pass
    times = {}
    for library, arrays in cases.items():
        times[PLAN_RUN.format(library)] = host_time(cupy, _cupyattn(arrays))
        times[f"attention_with_kvcache on {library} arrays"] = host_time(cupy, _one_call(arrays))
    if FLASHINFER in names:
        with suppress(Exception):  # what it refuses is named where cells are measured
            plan, planned = _flashinfer_calls(case, tensor_cores=False)
            times["flashinfer's plan"] = host_time(cupy, plan, calls=200)
            times["flashinfer's run"] = host_time(cupy, planned)
    return times


# --- reporting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure beside what it should be."""

    what: str
    value: float
    target: float
    met: bool
    at_most: bool = False
    cell: str = ""  # where the figure comes from, if it is the worst of several

    def __str__(self) -> str:
        where = f" ({self.cell})" if self.cell else ""
        bound = "most" if self.at_most else "least"
        return (
            f"{self.what}: {self.value:.3f}{where}, target at {bound} {self.target:g}{'' if self.met else ', missed'}"
        )


def findings(results: Results, host_us: dict[str, dict[str, float]]) -> list[Finding]:
    """Everything that has a target and was measured."""
    results = {cell: row for cell, row in better_of_kernels(results).items() if OURS in row and row[OURS].rounds}
    ours = {cell: row[OURS].ms for cell, row in results.items()}
    share = {cell: row[STREAM].ms / row[OURS].ms for cell, row in results.items()}
    grid = {cell: row for cell, row in results.items() if cell.section == "grid"}
    peer = ratios(grid, FLASHINFER)
    found: list[Finding] = []

    def worst(what: str, values: Mapping[Cell, float], target: float, *, at_most: bool = False) -> None:
        if values:
            cell = (max if at_most else min)(values, key=values.get)
            met = values[cell] <= target if at_most else values[cell] >= target
            found.append(Finding(what, values[cell], target, met, at_most, str(cell)))

    def mean(what: str, values: Iterable[float], target: float) -> None:
        if values := list(values):
            value = statistics.geometric_mean(values)
            found.append(Finding(f"{what}, {len(values)} cells", value, target, value >= target))

    def twins(section: str, **other: Any) -> dict[Cell, float]:
        """Time of the cell that differs in `other` over time of the cell itself."""
        pairs = {cell: replace(cell, **other) for cell in ours if cell.section == section}
        return {cell: ours[twin] / ours[cell] for cell, twin in pairs.items() if twin in ours and twin != cell}

    mean("grid against FlashInfer, geometric mean", peer.values(), 1.25)
    if peer:
        lowest = min(peer, key=peer.get)
        # A tie within the spread of the run is a tie.
        lost = [c for c, ratio in peer.items() if ratio < 1 - max(grid[c][OURS].spread, grid[c][FLASHINFER].spread)]
        what = f"grid against FlashInfer, lowest; {len(lost)} cells lost"
        found.append(Finding(what, peer[lowest], 1.0, not lost, cell=str(lowest)))
    gqa = {c: r for c, r in peer.items() if c.batch == 1 and c.seqlen <= 8192 and 1 < c.kv_heads < c.heads}
    worst("1 × 1k and 1 × 8k with GQA against FlashInfer", gqa, 1.5)
    mean("16/1 against FlashInfer, geometric mean", (r for c, r in peer.items() if c.kv_heads == 1), 1.6)
    large = {c: share[c] for c in grid if c.kv_bytes >= LARGE_BYTES}
    worst("share of the stream, cells of 1 GB and more", large, 0.985)
    small = {c: 1 / share[c] for c in grid if c.kv_bytes <= SMALL_BYTES}
    worst("time over the floor, cells up to 34 MB", small, 1.4, at_most=True)
    worst("uneven batch against even", twins("uneven", uneven=False), 0.95)
    blocks = twins("blocks", block_size=256)
    worst("block size 16 against 256", {c: r for c, r in blocks.items() if c.block_size == 16}, 0.97)
    worst("block size 1 against 256", {c: r for c, r in blocks.items() if c.block_size == 1}, 0.8)
    fp8 = twins("fp8", kv_dtype="bfloat16")
    worst(
        "FP8 against bfloat16, cells of 1 GB and more", {c: r for c, r in fp8.items() if c.kv_bytes >= LARGE_BYTES}, 1.8
    )
    peer_fp8 = {cell: ratio for cell, ratio in ratios(results, FLASHINFER).items() if cell.kv_dtype == FP8}
    worst("FP8 against FlashInfer's", peer_fp8, 1.5)
    append = {cell: 1 / ratio for cell, ratio in twins("append", append=False).items()}
    worst("append and rotary over attention alone", append, 1.05, at_most=True)
    worst("shared prefix against nothing shared", twins("shared", prefix=0), 10.0)
    label = PLAN_RUN.format("cupy")
    if label in host_us:
        median = host_us[label]["median_us"]
        found.append(Finding(f"host time of {label}, µs", median, 8.0, median <= 8.0, at_most=True))
    return found


def better_of_kernels(results: Results) -> Results:
    """The results with one entry for FlashInfer: the faster of its two kernels, cell by cell."""
    merged: Results = {}
    for cell, row in results.items():
        both = [row[name] for name in (FLASHINFER, FLASHINFER_TC) if name in row]
        merged[cell] = {name: result for name, result in row.items() if name != FLASHINFER_TC}
        if both:
            merged[cell][FLASHINFER] = min(both, key=lambda result: result.ms if result.rounds else math.inf)
    return merged


def as_record(measured: Measured, host_us: dict[str, dict[str, float]], rounds: int) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    cells = []
    for cell, row in measured.results.items():
        contenders = {name: result.as_record("tb_per_s", cell.kv_bytes / 1e9) for name, result in row.items()}
        about = asdict(cell) | {"name": str(cell), "kv_bytes": cell.kv_bytes}
        around = {"stream_grid": measured.grids[cell], "clocks": measured.clocks[cell]}
        cells.append(about | {"contenders": contenders} | around)
    return {
        "protocol": {
            "head_dim": HEAD_DIM,
            "q_dtype": "bfloat16",
            "seqlen_q": 1,
            "layout": "NHD, random block tables",
            "kv_bytes": "2 * tokens * kv_heads * head_dim * itemsize, a shared prefix counted once",
            "stream": "the fastest plain read of as many bytes, over grids, unrolls and orders",
            "timing": TIMING,
            "warmup_ms": WARMUP_MS,
            "measure_ms": MEASURE_MS,
            "rounds": rounds,
            "ratio": "time of the peer (FlashInfer: of the faster of its two kernels) / time of cupyattn",
        },
        "empty_launch_us": measured.empty_launch_us,
        "cells": cells,
        "summary": summary(_against_peers(measured.results)),
        "targets": [asdict(finding) for finding in findings(measured.results, host_us)],
        "host": host_us,
    }


def _against_peers(results: Results) -> Results:
    """The grid, without the plain read, which is no peer."""
    return {
        cell: {name: result for name, result in row.items() if name != STREAM}
        for cell, row in better_of_kernels(results).items()
        if cell.section == "grid"
    }


def show(results: Results, names: list[str], console: Console, title: str) -> None:
    """All cells in TB/s with ratios, slowest cells first, then one line for each peer."""
    merged = better_of_kernels(results)

    def speed(cell: Cell, result: Result) -> str:
        return f"{cell.kv_bytes / result.ms / 1e9:.2f}"

    def share(cell: Cell) -> float:
        ours = merged[cell].get(OURS)
        return merged[cell][STREAM].ms / ours.ms if ours and ours.rounds else math.nan

    columns = {
        "MB": lambda cell: f"{cell.kv_bytes / 1e6:.1f}",
        "µs": lambda cell: f"{1e3 * merged[cell][STREAM].ms / share(cell):.1f}",
        "of stream": lambda cell: f"{share(cell):.1%}",
    }
    console.print(ratio_table(merged, names, title, speed, columns, without_peer=share))
    show_summary(_against_peers(results), console)
    show_refusals(results, console)


def plot(results: Results, path: Path, gpu: str) -> None:
    """Time over bytes of the grid, one panel for each pair of head counts, with the plain read's times as roofline."""
    merged = better_of_kernels(results)
    pairs = dict.fromkeys((cell.heads, cell.kv_heads) for cell in merged if cell.section == "grid")
    figure = new_figure(4 * len(pairs), 4)
    axes = figure.subplots(1, len(pairs), sharex=True, sharey=True, squeeze=False)
    floor: dict[int, float] = {}
    for cell, row in merged.items():
        floor[cell.kv_bytes] = min(1e3 * row[STREAM].ms, floor.get(cell.kv_bytes, math.inf))
    for axis, heads in zip(axes.flat, pairs, strict=True):
        cells = [c for c in merged if c.section == "grid" and (c.heads, c.kv_heads) == heads]
        cells.sort(key=lambda cell: cell.kv_bytes)
        axis.plot(*zip(*sorted(floor.items()), strict=True), color="0.6", lw=1.2, label="fastest plain read")
        for name in merged[cells[0]]:
            timed = [c for c in cells if merged[c][name].rounds]
            if name != STREAM and timed:
                axis.plot([c.kv_bytes for c in timed], [1e3 * merged[c][name].ms for c in timed], "o", label=name)
        axis.set(title=f"{heads[0]} heads, {heads[1]} of keys", xscale="log", yscale="log", xlabel="bytes of KV")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("µs")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=9)
    figure.suptitle(f"Decode, head_dim {HEAD_DIM}, bfloat16, {gpu}")
    figure.savefig(path, dpi=120)
