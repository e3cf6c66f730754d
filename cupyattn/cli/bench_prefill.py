"""`cupyattn bench prefill`: TFLOP/s on 36 shapes of self-attention, cell by cell."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console

from ..attention import attention
from ..plan import warmup_variants
from .bench_common import (
    MEASURE_MS,
    OURS,
    TIMING,
    WARMUP_MS,
    Call,
    EventTimer,
    Report,
    Result,
    Results,
    attempt,
    choose,
    host_time,
    new_figure,
    ratio_table,
    show_host,
    show_refusals,
    show_summary,
    summary,
    wrong_cells,
)
from .progress import progress_bars
from .tolerance import tolerance_of

TOKENS, WIDTH = 16384, 2048  # every cell: 16k tokens in all, heads * head_dim = 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
HOST_SHAPE = (1, 128, 8, 64)


@dataclass(frozen=True, slots=True)
class Cell:
    """One shape of the grid: self-attention without GQA, (batch, seqlen, heads, head_dim)."""

    head_dim: int
    causal: bool
    seqlen: int

    @property
    def batch(self) -> int:
        return TOKENS // self.seqlen

    @property
    def heads(self) -> int:
        return WIDTH // self.head_dim

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.seqlen, self.heads, self.head_dim

    @property
    def flops(self) -> float:
        """Floating-point operations of both products; a causal mask halves them."""
        return 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        return f"hd {self.head_dim} {'causal' if self.causal else 'full'} {self.seqlen}"


GRID = tuple(Cell(d, causal, n) for d in (64, 128, 256) for causal in (False, True) for n in SEQLENS)
QUICK = tuple(cell for cell in GRID if cell.seqlen == 2048)


def run(cupy: ModuleType, gpu: str, contenders: str, rounds: int, quick: bool, host: bool, console: Console) -> Report:
    """Measure and show; `host` leaves out all cells."""
    names = choose(contenders, {name: module for name, (module, _) in CONTENDERS.items()}, console, UNASKED)
    host_us = host_times(cupy)
    compiled = compile_times(cupy)
    results: Results = {}
    if not host:
        results = measure(cupy, QUICK if quick else GRID, names, rounds)
        show(results, names, console, title=f"Prefill, bfloat16, TFLOP/s on {gpu}")
    show_host({f"attention(q, k, v) on {library} arrays": line for library, line in host_us.items()}, console)
    show_compiled(compiled, console)
    record = as_record(results, host_us, rounds) | {"compile": compiled}
    return Report(record, wrong_cells(results), partial(plot, results))


# --- contenders: (cell, q, k, v as CuPy arrays) -> a call that gives (batch, seqlen, heads, head_dim) ----------------


def _cupyattn(cell: Cell, q: Any, k: Any, v: Any) -> Call:
    return lambda: attention(q, k, v, causal=cell.causal)


def _sdpa(backend: str) -> Callable[..., Call]:
    def prepare(cell: Cell, q: Any, k: Any, v: Any) -> Call:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (torch.from_dlpack(x).transpose(1, 2) for x in (q, k, v))
        kernel = SDPBackend.__members__[backend]

        def call() -> Any:
            with sdpa_kernel(kernel):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=cell.causal)
            return out.transpose(1, 2)

        return call

    return prepare


def _fa4(cell: Cell, q: Any, k: Any, v: Any) -> Call:
    import torch
    from flash_attn.cute import flash_attn_func

    q, k, v = (torch.from_dlpack(x) for x in (q, k, v))

    def call() -> Any:
        out = flash_attn_func(q, k, v, causal=cell.causal)
        return out[0] if isinstance(out, tuple) else out

    return call


def _flashinfer(cell: Cell, q: Any, k: Any, v: Any) -> Call:
    import flashinfer
    import torch

    q, k, v = (torch.from_dlpack(x).flatten(0, 1) for x in (q, k, v))
    starts = torch.arange(0, TOKENS + 1, cell.seqlen, dtype=torch.int32, device="cuda")
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
    wrapper.plan(starts, starts, cell.heads, cell.heads, cell.head_dim, causal=cell.causal, q_data_type=q.dtype)
    return lambda: wrapper.run(q, k, v).view(cell.shape)


CONTENDERS: dict[str, tuple[str, Callable[..., Call]]] = {
    OURS: ("cupyattn", _cupyattn),
    "fa2": ("torch", _sdpa("FLASH_ATTENTION")),
    "cudnn": ("torch", _sdpa("CUDNN_ATTENTION")),
    "fa4": ("flash_attn.cute", _fa4),
    "flashinfer": ("flashinfer", _flashinfer),
}
"""Name -> (module that must be importable, how its call is prepared)."""
UNASKED = ("flashinfer",)  # compiles for minutes


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(cupy: ModuleType, grid: tuple[Cell, ...], names: list[str], rounds: int) -> Results:
    """Check and time every contender in every cell; a contender that raises is recorded as refused."""
    rng = np.random.default_rng(0)
    # Every cell has the same number of elements, so one set of random numbers serves all of them.
    numbers = [
        cupy.asarray(rng.standard_normal(TOKENS * WIDTH, dtype=np.float32).astype(ml_dtypes.bfloat16)) for _ in range(3)
    ]
    timer = EventTimer(cupy)
    results: Results = {}
    with progress_bars() as progress:
        task = progress.add_task("", total=len(grid))
        for cell in grid:
            progress.update(task, description=str(cell))
            q, k, v = (x.reshape(cell.shape) for x in numbers)
            row = results[cell] = {}
            calls: dict[str, Call] = {}
            for name in names:
                prepare = partial(CONTENDERS[name][1], cell, q, k, v)
                call, row[name] = attempt(prepare, partial(spot_check, cupy, cell, q, k, v))
                if call is not None:
                    calls[name] = call
            for _ in range(rounds):
                for name, call in calls.items():
                    row[name].rounds.append(timer(call))
            progress.advance(task)
    return results


def spot_check(cupy: ModuleType, cell: Cell, q: Any, k: Any, v: Any, out: Any, spots: int = 3, rows: int = 16) -> float:
    """Largest error against float64 in a few places, in units of the tolerance; inf if any output is not finite."""
    out = out if isinstance(out, cupy.ndarray) else cupy.from_dlpack(out)
    if not bool(cupy.isfinite(out.astype(np.float32)).all()):
        return math.inf
    rng = np.random.default_rng(cell.seqlen)
    worst = 0.0
    for _ in range(spots):
        b, h = int(rng.integers(cell.batch)), int(rng.integers(cell.heads))
        start = int(rng.integers(cell.seqlen - rows + 1))
        stop = start + rows
        keys = stop if cell.causal else cell.seqlen
        at = (slice(b, b + 1), slice(start, stop), slice(h, h + 1))
        host_q, host_out = (cupy.ascontiguousarray(x[at]).get() for x in (q, out))
        host_k, host_v = (cupy.ascontiguousarray(x[b : b + 1, :keys, h : h + 1]).get() for x in (k, v))
        exact = attention(host_q, host_k, host_v, causal=cell.causal, kernel="numpy_float64")
        worst = max(worst, float(np.abs(host_out.astype(np.float64) - exact).max()) / tolerance_of(host_v))
    return worst


def host_times(cupy: ModuleType) -> dict[str, dict[str, float]]:
    """Microseconds that `attention(q, k, v)` on a small shape keeps the host busy, per library."""
    host = np.random.default_rng(0).standard_normal((3, *HOST_SHAPE)).astype(np.float16)
    arrays: dict[str, Any] = {"cupy": tuple(cupy.asarray(x) for x in host)}
    try:
        import torch

        arrays["torch"] = tuple(torch.from_dlpack(x) for x in arrays["cupy"])
    except ImportError:
        pass
    return {library: host_time(cupy, partial(attention, *qkv)) for library, qkv in arrays.items()}


def compile_times(cupy: ModuleType) -> dict[str, Any]:
    """What a first session waits for: NVRTC's seconds for each usual variant; milliseconds from disk to a kernel."""
    from ..jit import arch_of, module
    from ..jit.compile import compile_cubin

    device = cupy.cuda.Device().id
    arch = arch_of(device)
    cold, warm = {}, {}
    for name, defines in warmup_variants(arch, (64, 128, 256), ("bfloat16",)):
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


def as_record(results: Results, host_us: dict[str, dict[str, float]], rounds: int) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    cells = []
    for cell, row in results.items():
        contenders = {name: result.as_record("tflops", cell.flops / 1e9) for name, result in row.items()}
        cells.append(asdict(cell) | {"batch": cell.batch, "heads": cell.heads, "contenders": contenders})
    return {
        "protocol": {
            "dtype": "bfloat16",
            "tokens": TOKENS,
            "heads_times_head_dim": WIDTH,
            "flops": "4 * batch * heads * seqlen**2 * head_dim, half of it when causal",
            "timing": TIMING,
            "warmup_ms": WARMUP_MS,
            "measure_ms": MEASURE_MS,
            "rounds": rounds,
            "ratio": "time of the peer / time of cupyattn",
        },
        "cells": cells,
        "summary": summary(results),
        "host": {"shape": list(HOST_SHAPE), "dtype": "float16", **host_us},
    }


def show(results: Results, names: list[str], console: Console, title: str) -> None:
    """The grid in TFLOP/s with ratios, slowest cells first, then one line per peer."""

    def speed(cell: Cell, result: Result) -> str:
        return f"{cell.flops / result.ms / 1e9:.0f}"

    console.print(ratio_table(results, names, title, speed))
    show_summary(results, console)
    show_refusals(results, console)


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
