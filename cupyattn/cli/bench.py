"""`cupyattn bench`: prefill speed against every peer that can be imported, in one process, cell by cell.

Timing is that of Triton's do_bench: the L2 cache is flushed before each call, CUDA events stand around it, the median
counts. All contenders of a cell are timed one after the other, in several rounds, so that a change of clocks meets all
of them alike. Absolute figures move from machine to machine; the ratios of one run are what to quote.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ..attention import attention
from ..plan import warmup_variants
from .device import NO_GPU, device_label, see_doctor, why_no_gpu
from .progress import progress_bars
from .tiles import sweep
from .tolerance import tolerance_of

TOKENS, WIDTH = 16384, 2048  # every cell: 16k tokens in all, heads * head_dim = 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
FLUSH_BYTES = 256 << 20  # several times any chip's L2
WARMUP_MS, MEASURE_MS = 15.0, 60.0
OURS = "cupyattn"
HOST_SHAPE = (1, 128, 8, 64)

Call = Callable[[], Any]


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


@dataclass(slots=True)
class Result:
    """One contender in one cell: milliseconds of each round, or why it refused."""

    rounds: list[float] = field(default_factory=list)
    error: float = 0.0
    refused: str = ""

    @property
    def ms(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median over the rounds."""
        return (max(self.rounds) - min(self.rounds)) / self.ms


Results = dict[Cell, dict[str, Result]]


def bench(
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all results here.", show_default=False)
    ] = None,
    plot_path: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="FILE", help="Draw the grid into this file (needs matplotlib).", show_default=False
        ),
    ] = None,
    contenders: Annotated[
        str,
        typer.Option(
            "--contenders",
            metavar="NAMES",
            help="Some of cupyattn, fa2, cudnn, fa4 and flashinfer, with commas between; auto: all that can be "
            "imported except flashinfer, which compiles for minutes.",
        ),
    ] = "auto",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, metavar="N", help="Times that each cell is gone through.")
    ] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Only the six cells of 2048 tokens a sequence.")] = False,
    host: Annotated[bool, typer.Option("--host", help="Only the host time of a call.")] = False,
    tiles_path: Annotated[
        Path | None,
        typer.Option(
            "--tiles",
            metavar="FILE",
            help="Compare tiles and grid orders instead, and write what came here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure prefill on 36 shapes against every peer that can be imported, and the host time of a call.

    bfloat16, 16k tokens, heads * head_dim = 2048. A ratio over 1 means that cupyattn is faster.

    Exit code 1 means that a result of cupyattn was wrong.
    """
    console = Console()
    if (reason := why_no_gpu()) is not None:
        nothing = " There is nothing to mend. `cupyattn explain --arch 90` works here." if reason == NO_GPU else ""
        text = f"bench needs an NVIDIA GPU; {reason}.{see_doctor(reason)}{nothing}"
        console.print(text, markup=False, highlight=False)
        raise typer.Exit(2)
    import cupy

    machine = describe_machine(cupy)
    if tiles_path is not None:
        record = {"machine": machine, **sweep(cupy, EventTimer(cupy), console)}
        tiles_path.write_text(json.dumps(record, indent=1) + "\n")
        return
    host_us = host_times(cupy)
    compiled = compile_times(cupy)
    results: Results = {}
    if not host:
        names = choose(contenders, console)
        results = measure(cupy, QUICK if quick else GRID, names, rounds)
        show(results, names, console, title=f"Prefill, bfloat16, TFLOP/s on {machine['gpu']}")
    show_host(host_us, console)
    show_compiled(compiled, console)
    if json_path is not None:
        record = as_record(results, host_us, machine | {"clocks_after": clocks(cupy)}, rounds) | {"compile": compiled}
        json_path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"Written to {json_path}.", markup=False)
    if plot_path is not None and results:
        plot(results, plot_path, machine["gpu"])
    wrong = [str(cell) for cell, row in results.items() if OURS in row and not row[OURS].error <= 1.0]
    if wrong:
        console.print(f"[red]cupyattn is wrong in {', '.join(wrong)}[/]")
        raise typer.Exit(1)


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


def choose(asked: str, console: Console) -> list[str]:
    """The contenders to time. Those that were asked for by name and cannot be imported are a typer.BadParameter."""
    names = (
        [name for name in CONTENDERS if name != "flashinfer"]
        if asked == "auto"
        else [n.strip() for n in asked.split(",")]
    )
    chosen = []
    for name in names:
        if name not in CONTENDERS:
            raise typer.BadParameter(f"contenders: got {name!r}, expected some of {', '.join(CONTENDERS)}")
        try:
            __import__(CONTENDERS[name][0])
            chosen.append(name)
        except Exception as error:  # a broken peer may raise anything when it is imported
            if asked != "auto":
                raise typer.BadParameter(
                    f"contenders: got {name!r}, which cannot be imported ({_line(error)})"
                ) from None
            console.print(f"{name} is left out: {_line(error)}", markup=False, style="dim")
    return chosen


# --- measuring -------------------------------------------------------------------------------------------------------


class EventTimer:
    """Median milliseconds of a call with a cold L2, by CUDA events on the current stream, as Triton's do_bench does."""

    def __init__(self, cupy: ModuleType) -> None:
        self.cuda = cupy.cuda
        self.flush = cupy.cuda.alloc(FLUSH_BYTES)

    def __call__(self, call: Call) -> float:
        call()
        estimate = statistics.median(self._times(call, 5))
        self._times(call, max(1, int(WARMUP_MS / estimate)))
        return statistics.median(self._times(call, max(5, int(MEASURE_MS / estimate))))

    def _times(self, call: Call, count: int) -> list[float]:
        pairs = [(self.cuda.Event(), self.cuda.Event()) for _ in range(count)]
        for start, stop in pairs:
            self.flush.memset_async(0, FLUSH_BYTES)
            start.record()
            call()
            stop.record()
        pairs[-1][1].synchronize()
        return [self.cuda.get_elapsed_time(start, stop) for start, stop in pairs]


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
                try:
                    calls[name] = CONTENDERS[name][1](cell, q, k, v)
                    row[name] = Result(error=spot_check(cupy, cell, q, k, v, calls[name]()))
                except Exception as error:  # peers refuse a shape in their own ways, and a refusal is a result
                    calls.pop(name, None)
                    row[name] = Result(refused=_line(error))
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


def host_times(cupy: ModuleType, calls: int = 2000, batch: int = 100) -> dict[str, dict[str, float]]:
    """Microseconds that `attention(q, k, v)` keeps the host busy, per library: median and 90th percentile.

    The shape is small enough that the device is never behind, and nothing waits for it between the calls of a batch.
    """
    host = np.random.default_rng(0).standard_normal((3, *HOST_SHAPE)).astype(np.float16)
    arrays: dict[str, Any] = {"cupy": tuple(cupy.asarray(x) for x in host)}
    try:
        import torch

        arrays["torch"] = tuple(torch.from_dlpack(x) for x in arrays["cupy"])
    except ImportError:
        pass
    times = {}
    for library, (q, k, v) in arrays.items():
        spent = []
        for index in range(calls + batch):
            if index % batch == 0:
                cupy.cuda.Device().synchronize()
            started = time.perf_counter_ns()
            attention(q, k, v)
            spent.append((time.perf_counter_ns() - started) / 1e3)
        spent = spent[batch:]  # the first batch warms up
        times[library] = {"median_us": float(np.median(spent)), "p90_us": float(np.percentile(spent, 90))}
    return times


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


def ratios(results: Results, peer: str) -> dict[Cell, float]:
    """Time of `peer` over time of cupyattn, in the cells that both took: over 1 means that cupyattn is faster."""
    return {
        cell: row[peer].ms / row[OURS].ms
        for cell, row in results.items()
        if peer in row and OURS in row and row[peer].rounds and row[OURS].rounds
    }


def summary(results: Results) -> dict[str, dict[str, Any]]:
    """For every peer: geometric mean and minimum of the ratios, the cell of the minimum, and the number of cells."""
    peers = dict.fromkeys(name for row in results.values() for name in row if name != OURS)
    lines = {}
    for peer in peers:
        if values := ratios(results, peer):
            lowest = min(values, key=values.get)
            lines[peer] = {
                "geometric_mean": statistics.geometric_mean(values.values()),
                "minimum": values[lowest],
                "minimum_cell": str(lowest),
                "cells": len(values),
            }
    return lines


def as_record(results: Results, host_us: dict, machine: dict, rounds: int) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    cells = []
    for cell, row in results.items():
        contenders = {}
        for name, result in row.items():
            contenders[name] = (
                {
                    "ms": result.ms,
                    "tflops": cell.flops / result.ms / 1e9,
                    "spread": result.spread,
                    "rounds_ms": result.rounds,
                    "error_over_tolerance": result.error,
                }
                if result.rounds
                else {"refused": result.refused}
            )
        cells.append(asdict(cell) | {"batch": cell.batch, "heads": cell.heads, "contenders": contenders})
    return {
        "protocol": {
            "dtype": "bfloat16",
            "tokens": TOKENS,
            "heads_times_head_dim": WIDTH,
            "flops": "4 * batch * heads * seqlen**2 * head_dim, half of it when causal",
            "timing": "CUDA events around each call, L2 flushed before it; median of a round, then of the rounds",
            "warmup_ms": WARMUP_MS,
            "measure_ms": MEASURE_MS,
            "rounds": rounds,
            "ratio": "time of the peer / time of cupyattn",
        },
        "machine": machine,
        "cells": cells,
        "summary": summary(results),
        "host": {"shape": list(HOST_SHAPE), "dtype": "float16", **host_us},
    }


def show(results: Results, names: list[str], console: Console, title: str) -> None:
    """The grid in TFLOP/s with ratios, slowest cells first, then one line per peer."""
    peers = [name for name in names if name != OURS]
    table = Table(
        title=title, caption="ratio: time of the peer / time of cupyattn; slowest cells first", title_justify="left"
    )
    table.add_column("shape")
    for name in names:
        table.add_column(name, justify="right")
    for peer in peers:
        table.add_column(f"ratio to {peer}", justify="right")
    per_peer = {peer: ratios(results, peer) for peer in peers}

    def lowest(cell: Cell) -> float:
        return min((values[cell] for values in per_peer.values() if cell in values), default=math.inf)

    for cell in sorted(results, key=lowest):
        row = results[cell]
        speeds = [f"{cell.flops / row[name].ms / 1e9:.0f}" if row[name].rounds else "—" for name in names]
        table.add_row(str(cell), *speeds, *(f"{per_peer[p][cell]:.2f}" if cell in per_peer[p] else "—" for p in peers))
    console.print(table)
    for peer, line in summary(results).items():
        console.print(
            f"against {peer}: geometric mean {line['geometric_mean']:.3f}, lowest {line['minimum']:.3f}"
            f" ({line['minimum_cell']}), {line['cells']} cells",
            highlight=False,
        )
    refusals = {f"{name}: {row[name].refused}" for row in results.values() for name in names if row[name].refused}
    for refusal in sorted(refusals):
        console.print(f"refused by {refusal}", markup=False, style="dim")


def show_host(host_us: dict[str, dict[str, float]], console: Console) -> None:
    """One line per library."""
    for library, line in host_us.items():
        console.print(
            f"host time of attention(q, k, v) on {library} arrays: {line['median_us']:.1f} µs"
            f" (90th percentile {line['p90_us']:.1f})",
            highlight=False,
        )


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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise typer.BadParameter(
            "plot: got no matplotlib, expected it to be installed (the extra notebooks brings it)"
        ) from None
    masks = sorted({cell.causal for cell in results})
    head_dims = sorted({cell.head_dim for cell in results})
    figure = Figure(figsize=(4 * len(head_dims), 3 * len(masks)), layout="constrained")
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


def describe_machine(cupy: ModuleType) -> dict[str, Any]:
    """GPU, driver, clocks and the versions of whatever takes part."""
    versions = {"python": platform.python_version(), "cupy": cupy.__version__}
    for package in ("cupyattn", "numpy", "torch", "flash-attn-4", "flashinfer-python"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "gpu": device_label(cupy).partition(" (")[0],
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "versions": versions,
        "clocks_before": clocks(cupy),
    }


def clocks(cupy: ModuleType) -> dict[str, float] | None:
    """SM and memory clocks in MHz, power in W, temperature in °C; None without pynvml."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(cupy.cuda.Device().pci_bus_id.encode())
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    except Exception:  # without pynvml, or in a container that hides the management interface, nothing is lost
        return None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
