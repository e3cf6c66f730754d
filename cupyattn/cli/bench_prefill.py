"""`cupyattn bench prefill`: TFLOP/s of attention with many queries, cell by cell, in four sections.

The grid is self-attention in 36 shapes of one size. Beside it stand sequences with fewer heads of keys than of queries,
packed sequences of different lengths, and queries over a paged cache. Cells that are compared with one another, as
packed sequences with equal ones of as many FLOPs, share their rounds.

Times are taken of standard normal arrays. What a contender computes is checked with larger queries: over thousands of
keys plain ones average all values away, and a wrong result would be as small as a right one.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console

from ..attention import attention, attention_varlen, attention_with_kvcache
from ..plan import warmup_variants
from ..prefill_plan import PrefillPlan
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
    clocks_under_load,
    host_time,
    new_figure,
    ratio_table,
    show_host,
    show_refusals,
    show_summary,
    summary,
    wrong_cells,
)
from .device import to_host
from .progress import progress_bars
from .tolerance import tolerance_of

TOKENS, WIDTH = 16384, 2048  # every cell of the grid: 16k tokens in all, heads * head_dim = 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
SIGMA = 1.0  # of the logarithms of uneven lengths
BLOCK_SIZES = (1, 16, 64)  # of paged caches, beside peers
LARGE_BLOCK = 128  # only beside the same keys in one piece
PAGED_ROWS = ((4, 4096, 4096), (1, 16384, 16384), (4, 1024, 16384), (16, 128, 8192), (1, 128, 65536))
FLASHINFER, FLASHINFER_FA2 = "flashinfer", "flashinfer_fa2"
CHECK_SCALE = 3.0  # of the queries with which results are checked: makes the softmax sharp
HOST_SHAPE = (1, 128, 8, 64)


@dataclass(frozen=True, slots=True)
class Cell:
    """One shape: `batch` sequences, each with `seqlen` queries over `seqlen_k` keys."""

    section: str
    head_dim: int
    causal: bool
    batch: int
    seqlen: int  # the mean if uneven
    seqlen_k: int
    heads: int
    kv_heads: int
    uneven: bool = False  # packed sequences of different lengths
    block_size: int = 0  # of a paged cache with a random block table; 0 for keys in one piece

    def lengths(self) -> np.ndarray:
        """Queries of each sequence; uneven ones are log-normal, with the same sum as even ones."""
        if not self.uneven:
            return np.full(self.batch, self.seqlen)
        drawn = np.random.default_rng(0).lognormal(sigma=SIGMA, size=self.batch)
        lengths = np.maximum(1, drawn * (self.batch * self.seqlen / drawn.sum())).astype(int)
        lengths[lengths.argmax()] += self.batch * self.seqlen - lengths.sum()
        return lengths

    def starts(self) -> np.ndarray:
        """Where each sequence begins in packed queries, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.lengths())]).astype(np.int32)

    @property
    def q_shape(self) -> tuple[int, ...]:
        if self.uneven:
            return int(self.lengths().sum()), self.heads, self.head_dim
        return self.batch, self.seqlen, self.heads, self.head_dim

    @property
    def k_shape(self) -> tuple[int, ...]:
        """That of the values too."""
        tail = self.kv_heads, self.head_dim
        if self.uneven:
            return int(self.lengths().sum()), *tail
        if self.block_size:
            return self.batch * self.seqlen_k // self.block_size, self.block_size, *tail
        return self.batch, self.seqlen_k, *tail

    @property
    def flops(self) -> float:
        """Floating-point operations of both products; a causal mask takes half a square of the queries off."""
        queries = self.lengths().astype(float)
        keys = queries if self.uneven else float(self.seqlen_k)
        pairs = queries * keys - (queries**2 / 2 if self.causal else 0.0)
        return 4.0 * self.heads * self.head_dim * float(pairs.sum())

    @property
    def dense(self) -> Cell:
        """The cell that shows what packing or paging costs: equal lengths with as many FLOPs, keys in one piece."""
        if not self.uneven:
            return replace(self, block_size=0)
        length = 8 * round(math.sqrt(float((self.lengths() ** 2.0).mean())) / 8)
        return replace(self, uneven=False, seqlen=length, seqlen_k=length)

    @property
    def form(self) -> str:
        return "packed" if self.uneven else "paged" if self.block_size else "dense"

    @property
    def beside_peers(self) -> bool:
        """Whether peers are measured too: not where a cell only serves others of ours as a measure."""
        return self.section in ("grid", "gqa") or self.uneven or self.block_size in BLOCK_SIZES

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        if self.section == "grid":
            return f"hd {self.head_dim} {mask} {self.seqlen}"
        sizes = [self.batch, self.seqlen] + [self.seqlen_k] * (self.section == "paged")
        words = [f"{' × '.join(map(_short, sizes))} {self.heads}/{self.kv_heads}"]
        words += [mask, "uneven" if self.uneven else "even"] if self.section == "varlen" else []
        words += [f"block size {self.block_size}" if self.block_size else "one piece"] * (self.section == "paged")
        return ", ".join(words)


def _short(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


def grid_cell(head_dim: int, causal: bool, seqlen: int) -> Cell:
    """Self-attention without GQA, of the grid's size."""
    heads = WIDTH // head_dim
    return Cell("grid", head_dim, causal, TOKENS // seqlen, seqlen, seqlen, heads, heads)


Group = tuple[Cell, ...]
"""Cells that share their rounds, because they are compared with one another."""

GRID: Group = tuple(grid_cell(d, causal, n) for d in (64, 128, 256) for causal in (False, True) for n in SEQLENS)
QUICK: Group = tuple(cell for cell in GRID if cell.seqlen == 2048)
GQA: Group = tuple(Cell("gqa", 128, True, 1, n, n, 32, 8) for n in (4096, 16384, 65536))
VARLEN: Group = tuple(Cell("varlen", 128, causal, 64, 2048, 2048, 16, 16, uneven=True) for causal in (False, True))
PAGED: tuple[Group, ...] = tuple(
    tuple(Cell("paged", 128, True, *row, *heads, block_size=size) for size in (*BLOCK_SIZES, LARGE_BLOCK))
    for heads, row in product(((32, 8), (16, 16)), PAGED_ROWS)
)
SECTIONS: dict[str, tuple[Group, ...]] = {
    "grid": tuple((cell,) for cell in GRID),
    "gqa": tuple((cell,) for cell in GQA),
    "varlen": tuple((cell, cell.dense) for cell in VARLEN),
    "paged": tuple((*cells, cells[0].dense) for cells in PAGED),
}
QUICK_SECTIONS: dict[str, tuple[Group, ...]] = {
    "grid": tuple((cell,) for cell in QUICK),
    "gqa": SECTIONS["gqa"][:1],
    "varlen": SECTIONS["varlen"][1:],
    "paged": SECTIONS["paged"][3:4],
}
TITLES = {
    "grid": "Prefill, bfloat16, TFLOP/s",
    "gqa": "Fewer heads of keys, head_dim 128, causal, TFLOP/s",
    "varlen": "Packed sequences, head_dim 128, TFLOP/s",
    "paged": "Queries over a paged cache, head_dim 128, causal, TFLOP/s",
}


def sections_of(cells: str) -> list[str]:
    """The sections that --cells asks for; what is none is a typer.BadParameter."""
    names = list(SECTIONS) if cells == "all" else [name.strip() for name in cells.split(",")]
    for name in names:
        if name not in SECTIONS:
            raise typer.BadParameter(
                f"got {name!r}, expected all or some of {', '.join(SECTIONS)}", param_hint="--cells"
            )
    return [name for name in SECTIONS if name in names]


def run(
    cupy: ModuleType,
    gpu: str,
    contenders: str,
    rounds: int,
    quick: bool,
    host: bool,
    console: Console,
    sections: Iterable[str] = tuple(SECTIONS),
) -> Report:
    """Measure and show; `host` leaves out all cells."""
    modules = {name: module for name, (module, _) in CONTENDERS.items()}
    names = choose(contenders, modules, console, unasked(os.environ))
    host_us = host_times(cupy)
    compiled = compile_times(cupy)
    measured = Measured()
    if not host:
        groups = [group for name in sections for group in (QUICK_SECTIONS if quick else SECTIONS)[name]]
        measured = measure(cupy, that_fit(cupy, groups, console), names, rounds)
        for name, results in by_section(measured.results).items():
            show(results, kernels_of(name, names), console, title=f"{TITLES[name]} on {gpu}")
            show_load([measured.clocks[cell] for cell in results], console)
    plain = {name: line for name, line in host_us.items() if name.isalpha()}
    show_host({f"attention(q, k, v) on {library} arrays": line for library, line in plain.items()}, console)
    show_host({name: line for name, line in host_us.items() if name not in plain}, console)
    show_compiled(compiled, console)
    record = as_record(measured, host_us, rounds) | {"compile": compiled}
    grid = by_section(measured.results).get("grid", {})
    return Report(record, wrong_cells(measured.results), partial(plot, grid))


# --- what a cell looks like in memory --------------------------------------------------------------------------------


@dataclass(slots=True)
class Case:
    """A cell's arrays on the GPU."""

    cell: Cell
    q: Any
    k: Any  # or the blocks of a paged cache
    v: Any
    cu_seqlens: Any = None
    block_table: Any = None
    cache_seqlens: Any = None

    def map(self, function: Callable[[Any], Any]) -> Case:
        """The same case with another library's arrays."""
        arrays = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "cell"}
        return replace(self, **{name: function(x) for name, x in arrays.items() if x is not None})


class Numbers:
    """Random numbers on the GPU: queries, plain and for checks, and one allocation of all keys and values."""

    PERIOD = 8_388_593  # a prime: the numbers repeat, but no two rows are alike

    def __init__(self, cupy: ModuleType, cells: Iterable[Cell]) -> None:
        def bits(numbers: np.ndarray) -> Any:
            return cupy.asarray(numbers.astype(ml_dtypes.bfloat16).view(np.uint16))

        rng = np.random.default_rng(0)
        queries = rng.standard_normal(self.PERIOD, np.float32)
        self.queries, self.check_queries = bits(queries), bits(CHECK_SCALE * queries)
        self.keys_values = cupy.empty(2 * max(math.prod(cell.k_shape) for cell in cells), ml_dtypes.bfloat16)
        fill(self.keys_values, bits(rng.standard_normal(self.PERIOD, np.float32)))


def fill(array: Any, bits: Any) -> None:
    """Write the numbers into the array, over and over."""
    flat = array.reshape(-1).view(np.uint16)
    for start in range(0, flat.size, bits.size):
        part = flat[start : start + bits.size]
        part[...] = bits[: part.size]


def place(cupy: ModuleType, cell: Cell, numbers: Numbers) -> Case:
    """The cell's arrays on the GPU, its queries those for checks."""
    size = math.prod(cell.k_shape)
    k, v = (numbers.keys_values[start : start + size].reshape(cell.k_shape) for start in (0, size))
    case = Case(cell, cupy.empty(cell.q_shape, ml_dtypes.bfloat16), k, v)
    fill(case.q, numbers.check_queries)
    if cell.uneven:
        case.cu_seqlens = cupy.asarray(cell.starts())
    if cell.block_size:
        blocks = np.random.default_rng(1).permutation(cell.k_shape[0])
        case.block_table = cupy.asarray(blocks.reshape(cell.batch, -1).astype(np.int32))
        case.cache_seqlens = cupy.full(cell.batch, cell.seqlen_k, np.int32)
    return case


def that_fit(cupy: ModuleType, groups: list[Group], console: Console) -> list[Group]:
    """The groups whose arrays fit half of the memory that is free; the rest is for outputs and what contenders need."""
    free = cupy.cuda.runtime.memGetInfo()[0] / 2

    def needed(group: Group) -> int:
        return 2 * sum(math.prod(cell.q_shape) for cell in group) + 4 * max(math.prod(cell.k_shape) for cell in group)

    left_out = [str(cell) for group in groups if needed(group) >= free for cell in group]
    if left_out:
        console.print(f"too large for the memory that is free: {'; '.join(left_out)}", markup=False, style="dim")
    return [group for group in groups if needed(group) < free]


# --- contenders: a case -> a call that gives an array of q's shape ---------------------------------------------------


def _attention(case: Case) -> Call:
    return partial(attention, case.q, case.k, case.v, causal=case.cell.causal)


def _attention_varlen(case: Case) -> Call:
    longest = int(case.cell.lengths().max())
    options = dict(max_seqlen_q=longest, max_seqlen_k=longest, causal=case.cell.causal)
    return partial(attention_varlen, case.q, case.k, case.v, case.cu_seqlens, case.cu_seqlens, **options)


def _attention_with_kvcache(case: Case) -> Call:
    options = dict(block_table=case.block_table, cache_seqlens=case.cache_seqlens, causal=case.cell.causal)
    return partial(attention_with_kvcache, case.q, case.k, case.v, **options)


def _sdpa(backend: str) -> Callable[[Case], Call]:
    def prepare(case: Case) -> Call:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in (case.q, case.k, case.v))
        kernel = SDPBackend.__members__[backend]
        options = dict(is_causal=case.cell.causal)
        if case.cell.heads != case.cell.kv_heads:
            options["enable_gqa"] = True  # torch before 2.5 has no such argument

        def call() -> Any:
            with sdpa_kernel(kernel):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

        return call

    return prepare


def _fa4(case: Case) -> Call:
    import torch
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    cell = case.cell
    case = case.map(torch.from_dlpack)
    arrays = case.q, case.k, case.v
    if cell.uneven:
        longest = int(cell.lengths().max())
        lengths = dict(cu_seqlens_q=case.cu_seqlens, cu_seqlens_k=case.cu_seqlens)
        lengths |= dict(max_seqlen_q=longest, max_seqlen_k=longest)
        call = partial(flash_attn_varlen_func, *arrays, **lengths, causal=cell.causal)
    else:
        call = partial(flash_attn_func, *arrays, causal=cell.causal)

    def output() -> Any:
        out = call()
        return out[0] if isinstance(out, tuple) else out

    return output


def _flashinfer_ragged(case: Case) -> Call:
    import flashinfer
    import torch

    cell = case.cell
    q, k, v = (torch.from_dlpack(x).view(-1, *x.shape[-2:]) for x in (case.q, case.k, case.v))
    starts = torch.from_numpy(cell.starts()).cuda()
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_flashinfer_workspace(), "NHD", backend="fa3")
    heads = cell.heads, cell.kv_heads, cell.head_dim
    wrapper.plan(starts, starts, *heads, causal=cell.causal, q_data_type=q.dtype)
    return lambda: wrapper.run(q, k, v).view(cell.q_shape)


def _flashinfer_paged(case: Case, *, backend: str) -> Call:
    import flashinfer
    import torch

    cell = case.cell
    case = case.map(torch.from_dlpack)
    q, caches = case.q.flatten(0, 1), (case.k, case.v)
    blocks = cell.seqlen_k // cell.block_size  # all of them full
    block_starts = torch.arange(0, cell.batch * blocks + 1, blocks, dtype=torch.int32, device="cuda")
    last = torch.full((cell.batch,), cell.block_size, dtype=torch.int32, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_flashinfer_workspace(), "NHD", backend=backend)
    wrapper.plan(
        torch.from_numpy(cell.starts()).cuda(),
        block_starts,
        case.block_table.flatten(),
        last,
        cell.heads,
        cell.kv_heads,
        cell.head_dim,
        cell.block_size,
        causal=cell.causal,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return lambda: wrapper.run(q, caches).view(cell.q_shape)


def _flashinfer_workspace() -> Any:
    import torch

    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


CONTENDERS: dict[str, tuple[str, Mapping[str, Mapping[str, Callable[[Case], Call]]]]] = {
    OURS: (
        "cupyattn",
        {OURS: {"dense": _attention, "packed": _attention_varlen, "paged": _attention_with_kvcache}},
    ),
    "fa2": ("torch", {"fa2": {"dense": _sdpa("FLASH_ATTENTION")}}),
    "cudnn": ("torch", {"cudnn": {"dense": _sdpa("CUDNN_ATTENTION")}}),
    "fa4": ("flash_attn.cute", {"fa4": {"dense": _fa4, "packed": _fa4}}),
    FLASHINFER: (
        "flashinfer",
        {
            FLASHINFER: {
                "dense": _flashinfer_ragged,
                "packed": _flashinfer_ragged,
                "paged": partial(_flashinfer_paged, backend="fa3"),
            },
            FLASHINFER_FA2: {"paged": partial(_flashinfer_paged, backend="fa2")},
        },
    ),
}
"""Name -> (module that must be importable, kernel -> form of cell -> how its call is prepared)."""


def unasked(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Contenders that "auto" leaves out: FlashInfer compiles for minutes, unless it has been told not to compile."""
    return () if environment.get("FLASHINFER_DISABLE_JIT") else (FLASHINFER,)


def kernels_for(cell: Cell, names: list[str]) -> dict[str, Callable[[Case], Call]]:
    """The kernels to time in this cell, out of those that have its form."""
    names = names if cell.beside_peers else [name for name in names if name == OURS]
    kernels = {kernel: forms for name in names for kernel, forms in CONTENDERS[name][1].items()}
    return {kernel: forms[cell.form] for kernel, forms in kernels.items() if cell.form in forms}


def kernels_of(section: str, names: list[str]) -> list[str]:
    """The kernels that take part in a section."""
    return list(dict.fromkeys(k for group in SECTIONS[section] for cell in group for k in kernels_for(cell, names)))


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """Results, and the clocks under each cell's load."""

    results: Results = field(default_factory=dict)
    clocks: dict[Cell, dict[str, float] | None] = field(default_factory=dict)


def measure(cupy: ModuleType, groups: list[Group], names: list[str], rounds: int) -> Measured:
    """Check and time every contender in every cell; a contender that raises is recorded as refused."""
    measured = Measured()
    cells = [cell for group in groups for cell in group]
    if not cells:
        return measured
    numbers = Numbers(cupy, cells)
    timer = EventTimer(cupy)
    with progress_bars() as progress:
        task = progress.add_task("", total=len(cells))
        for group in groups:
            timed: list[tuple[Result, Call]] = []
            for cell in group:
                progress.update(task, description=str(cell))
                case = place(cupy, cell, numbers)
                row = measured.results[cell] = {}
                for name, prepare in kernels_for(cell, names).items():
                    call, row[name] = attempt(partial(prepare, case), partial(spot_check, cupy, case))
                    if call is not None:
                        timed.append((row[name], call))
                fill(case.q, numbers.queries)
            for index in range(rounds):
                for result, call in timed[:: -1 if index % 2 else 1]:  # who comes first finds the chip cooler
                    result.rounds.append(timer(call))
            load = clocks_under_load(cupy, timed[0][1], timed[0][0].ms) if timed else None
            measured.clocks |= dict.fromkeys(group, load)
            progress.advance(task, len(group))
    return measured


def spot_check(cupy: ModuleType, case: Case, out: Any, spots: int = 3, rows: int = 16) -> float:
    """Largest error against float64 in a few places, in units of the tolerance; inf if any output is not finite."""
    cell = case.cell
    out = out if isinstance(out, cupy.ndarray) else cupy.from_dlpack(out)
    if not bool(cupy.isfinite(out.astype(np.float32)).all()):
        return math.inf
    q, out = (x.reshape(-1, cell.heads, cell.head_dim) for x in (case.q, out))
    rng = np.random.default_rng(cell.seqlen)
    worst = 0.0
    for _ in range(spots):
        b, h = int(rng.integers(cell.batch)), int(rng.integers(cell.heads))
        queries = int(cell.lengths()[b])
        keys = queries if cell.uneven else cell.seqlen_k
        start = int(rng.integers(max(1, queries - rows + 1)))
        stop = min(start + rows, queries)
        if cell.causal:
            keys += stop - queries
        first = int(cell.starts()[b])
        at = slice(first + start, first + stop), slice(h, h + 1)
        host_q, host_out = (to_host(x[at])[None] for x in (q, out))
        host_k, host_v = (rows_of(case, x, b, h // (cell.heads // cell.kv_heads), keys) for x in (case.k, case.v))
        exact = attention(host_q, host_k, host_v, causal=cell.causal, kernel="numpy_float64")
        worst = max(worst, float(np.abs(host_out.astype(np.float64) - exact).max()) / tolerance_of(host_v))
    return worst


def rows_of(case: Case, array: Any, sequence: int, kv_head: int, count: int) -> np.ndarray:
    """The first keys (or values) of one head of one sequence, on the host as (1, count, 1, head_dim)."""
    cell = case.cell
    heads = array.view(np.uint16)[..., kv_head, :]
    if cell.block_size:
        rows = heads[case.block_table[sequence]].reshape(-1, cell.head_dim)
    elif cell.uneven:
        rows = heads[int(cell.starts()[sequence]) :]
    else:
        rows = heads[sequence]
    return to_host(rows[:count]).view(ml_dtypes.bfloat16)[None, :, None]


def host_times(cupy: ModuleType) -> dict[str, dict[str, float]]:
    """Microseconds of the host on a small shape: `attention(q, k, v)` by library, `PrefillPlan.run` by its name."""
    host = np.random.default_rng(0).standard_normal((3, *HOST_SHAPE)).astype(np.float16)
    arrays: dict[str, Any] = {"cupy": tuple(cupy.asarray(x) for x in host)}
    try:
        import torch

        arrays["torch"] = tuple(torch.from_dlpack(x) for x in arrays["cupy"])
    except ImportError:
        pass
    times = {library: host_time(cupy, partial(attention, *qkv)) for library, qkv in arrays.items()}
    planned = {library: partial(PrefillPlan(*qkv).run, *qkv) for library, qkv in arrays.items()}
    return times | {f"PrefillPlan.run on {library} arrays": host_time(cupy, run) for library, run in planned.items()}


def compile_times(cupy: ModuleType) -> dict[str, Any]:
    """What a first prefill waits for: NVRTC's seconds for each usual variant; milliseconds from disk to a kernel."""
    from ..jit import arch_of, module
    from ..jit.compile import compile_cubin

    device = cupy.cuda.Device().id
    arch = arch_of(device)
    cold, warm = {}, {}
    for name, defines in warmup_variants(arch, (64, 128, 256), ("bfloat16",)):
        if not name.startswith("forward"):
            continue
        label = f"{name} {' '.join(f'{key}={value}' for key, value in defines)}"
        cold[label] = compile_cubin(name, defines, arch).seconds
        module.load_again(name, defines, arch, name, device)  # what the disk cache lacks is compiled here
        started = time.perf_counter()
        module.load_again(name, defines, arch, name, device)
        warm[label] = (time.perf_counter() - started) * 1e3
    slowest = max(cold, key=cold.get)
    return {
        "variants": len(cold),
        "cold_seconds": {"median": statistics.median(cold.values()), "highest": cold[slowest], "slowest": slowest},
        "warm_load_ms": {"median": statistics.median(warm.values()), "highest": max(warm.values())},
    }


# --- reporting -------------------------------------------------------------------------------------------------------


def by_section(results: Results) -> dict[str, Results]:
    """The results of each section that was measured."""
    names = dict.fromkeys(cell.section for cell in results)
    return {name: {cell: row for cell, row in results.items() if cell.section == name} for name in names}


def shares_of_dense(results: Results) -> dict[Cell, float]:
    """Speed of ours over that of the dense cell of as many FLOPs, where packed or paged."""

    def speed(cell: Cell) -> float:
        ours = results.get(cell, {}).get(OURS, Result())
        return cell.flops / ours.ms if ours.rounds else math.nan

    shares = {cell: speed(cell) / speed(cell.dense) for cell in results if cell.form != "dense"}
    return {cell: share for cell, share in shares.items() if not math.isnan(share)}


def as_record(measured: Measured, host_us: dict[str, dict[str, float]], rounds: int) -> dict[str, Any]:
    """Everything that was measured, ready for JSON; the grid stands for itself, other sections by their names."""
    sections = by_section(measured.results)
    records = {name: section_record(results, measured.clocks) for name, results in sections.items()}
    grid = records.pop("grid", {"cells": [], "summary": {}})
    return {
        "protocol": {
            "dtype": "bfloat16",
            "tokens": TOKENS,
            "heads_times_head_dim": WIDTH,
            "flops": "4 * heads * head_dim * pairs, where the pairs of a sequence are seqlen * seqlen_k, "
            "less seqlen**2 / 2 when causal",
            "uneven": f"log-normal lengths, sigma {SIGMA:g}, all of one seed",
            "of_dense": "TFLOP/s of cupyattn over its own with equal lengths, as many FLOPs, and keys in one piece",
            "checks": f"in a few places against float64, with queries {CHECK_SCALE:g} times as large as those timed",
            "timing": TIMING,
            "warmup_ms": WARMUP_MS,
            "measure_ms": MEASURE_MS,
            "rounds": rounds,
            "ratio": "time of the peer / time of cupyattn",
            "clocks": "while the first contender of the cell, or of the cells it is compared with, runs on and on",
        },
        **grid,
        **records,
        "host": {"shape": list(HOST_SHAPE), "dtype": "float16", **host_us},
    }


def section_record(results: Results, clocks: Mapping[Cell, dict[str, float] | None]) -> dict[str, Any]:
    """The cells of one section, and the summary of its ratios."""
    shares = shares_of_dense(results)
    cells = []
    for cell, row in results.items():
        contenders = {name: result.as_record("tflops", cell.flops / 1e9) for name, result in row.items()}
        about = asdict(cell) | {"name": str(cell), "flops": cell.flops, "clocks": clocks.get(cell)}
        about |= {"of_dense": shares[cell]} if cell in shares else {}
        about |= {"lengths": cell.lengths().tolist()} if cell.uneven else {}
        cells.append(about | {"contenders": contenders})
    return {"cells": cells, "summary": summary(results)}


def show(results: Results, names: list[str], console: Console, title: str) -> None:
    """One section in TFLOP/s with ratios, slowest cells first, then one line per peer."""
    shares = shares_of_dense(results)

    def speed(cell: Cell, result: Result) -> str:
        return f"{cell.flops / result.ms / 1e9:.0f}"

    def share(cell: Cell) -> str:
        return f"{shares[cell]:.3f}" if cell in shares else "—"

    console.print(ratio_table(results, names, title, speed, {"of dense": share} if shares else None))
    show_summary(results, console)
    show_refusals(results, console)


def show_load(samples: list[dict[str, float] | None], console: Console) -> None:
    """One line of the clocks and the power under a section's loads."""
    if samples := [sample for sample in samples if sample is not None]:
        low, high = (int(pick(sample["sm_mhz"] for sample in samples)) for pick in (min, max))
        watts = max(sample["power_w"] for sample in samples)
        console.print(f"under load: {low} to {high} MHz, up to {watts:.0f} W", highlight=False)


def show_compiled(compiled: dict[str, Any], console: Console) -> None:
    """One line for the compiler, one for the disk cache."""
    cold, warm = compiled["cold_seconds"], compiled["warm_load_ms"]
    console.print(
        f"cold compile of {compiled['variants']}: median {cold['median']:.2f} s, highest {cold['highest']:.2f} s\n"
        f"load from the disk cache: median {warm['median']:.1f} ms, highest {warm['highest']:.1f} ms",
        highlight=False,
    )


def plot(results: Results, path: Path, gpu: str) -> None:
    """One panel for each head_dim and mask, TFLOP/s over the sequence length."""
    masks = sorted({cell.causal for cell in results})
    head_dims = sorted({cell.head_dim for cell in results})
    figure = new_figure(4 * len(head_dims), 3 * len(masks))
    axes = figure.subplots(len(masks), len(head_dims), sharex=True, sharey=True, squeeze=False)
    for axis, (causal, head_dim) in zip(axes.flat, product(masks, head_dims), strict=True):
        for name in next(iter(results.values())):
            cells = [c for c in results if (c.causal, c.head_dim) == (causal, head_dim) and results[c][name].rounds]
            speeds = [cell.flops / results[cell][name].ms / 1e9 for cell in cells]
            axis.plot([cell.seqlen for cell in cells], speeds, marker="o", label=name, lw=2.5 if name == OURS else 1.2)
        axis.set(title=f"head_dim {head_dim}, {'causal' if causal else 'full'}", xscale="log")
        axis.set_xticks(SEQLENS, [f"{n}" for n in SEQLENS], rotation=45)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=9)
    figure.supxlabel("sequence length (16k tokens in all)")
    figure.supylabel("TFLOP/s")
    figure.suptitle(f"Prefill forward, bfloat16, {gpu}")
    figure.savefig(path, dpi=120)
