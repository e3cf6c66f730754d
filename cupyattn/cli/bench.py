"""`cupyattn bench`: the speed of prefill or decode against every peer that can be imported, and of KV caches."""

from __future__ import annotations

import json
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..timing import EventTimer
from . import bench_cache, bench_compat, bench_decode, bench_integrations, bench_prefill
from .bench_common import clocks, describe_machine, new_figure
from .device import NO_GPU, see_doctor, why_no_gpu
from .tiles import sweep

TILE_WARMUP_MS, TILE_MEASURE_MS = 3.0, 15.0  # for each of some hundred variants


class Kind(str, Enum):
    """What is measured."""

    prefill = "prefill"
    decode = "decode"
    cache = "cache"
    compat = "compat"
    integrations = "integrations"


def bench(
    kind: Annotated[
        Kind,
        typer.Argument(
            metavar="[prefill|decode|cache|compat|integrations]",
            help="prefill: 36 shapes of 16k tokens, heads * head_dim = 2048, and GQA, packed sequences, paged caches, "
            "in TFLOP/s. decode: 40 shapes of a paged cache, block sizes, FP8, uneven lengths, append and shared "
            "prefix, beside the fastest read of as many bytes. cache: allocation of blocks, append, fork, swaps and "
            "snapshots of a PagedKVCache, beside plain calls, copies and files. compat: host times of what has the "
            "names of flash_attn and FlashInfer, beside the calls that serve it and FlashInfer itself. integrations: "
            "what the ways in through PyTorch and JAX cost.",
        ),
    ] = Kind.prefill,
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
            help=f"With commas between, some of {', '.join(bench_prefill.CONTENDERS)}; for decode of "
            f"{', '.join(bench_decode.CONTENDERS)}. For compat of {', '.join(bench_compat.CONTENDERS)}. auto: all "
            "that can be imported, but for prefill flashinfer, which compiles for minutes, only where "
            "FLASHINFER_DISABLE_JIT is set.",
        ),
    ] = "auto",
    cells: Annotated[
        str,
        typer.Option(
            "--cells",
            metavar="NAMES",
            help=f"Of prefill, with commas between, some of {', '.join(bench_prefill.SECTIONS)}, or all.",
        ),
    ] = "all",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, metavar="N", help="Times that each cell is gone through.")
    ] = 3,
    cache_gb: Annotated[
        float | None,
        typer.Option(
            "--cache-gb",
            min=0.0,
            metavar="GB",
            help=f"Of cache, the size of the snapshot, by default {bench_cache.FULL.cache_gb:g}, with --quick "
            f"{bench_cache.QUICK.cache_gb:g}; less where memory or the current disk have no room for it.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only a few cells; of cache small ones.")] = False,
    host: Annotated[
        bool, typer.Option("--host", help="Only the host time of a call; of cache no swaps and snapshots.")
    ] = False,
    tiles_path: Annotated[
        Path | None,
        typer.Option(
            "--tiles",
            metavar="FILE",
            help="Compare tiles and grid orders of this GPU's prefill kernel instead, and write what came here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure speed against every peer that can be imported, and the host time of a call.

    bfloat16. A ratio to a peer over 1 means that cupyattn is faster.

    Exit code 1 means that a result of cupyattn was wrong.
    """
    console = Console()
    if tiles_path is not None and kind is not Kind.prefill:
        raise typer.BadParameter(f"got it with {kind.value}, expected it with prefill alone", param_hint="--tiles")
    sections = bench_prefill.sections_of(cells)
    if cells != "all" and kind is not Kind.prefill:
        raise typer.BadParameter(f"got it with {kind.value}, expected it with prefill alone", param_hint="--cells")
    if cache_gb is not None and kind is not Kind.cache:
        raise typer.BadParameter(f"got it with {kind.value}, expected it with cache alone", param_hint="--cache-gb")
    if plot_path is not None:
        new_figure()  # refused now, not after minutes of measuring
    if (reason := why_no_gpu()) is not None:
        nothing = (
            " There is nothing to mend. `cupyattn explain --arch 90` needs CuPy, but no GPU."
            if reason == NO_GPU
            else ""
        )
        text = f"bench needs an NVIDIA GPU; {reason}.{see_doctor(reason)}{nothing}"
        console.print(text, markup=False, highlight=False)
        raise typer.Exit(2)
    import cupy

    machine = describe_machine(cupy)
    if tiles_path is not None:
        brief = partial(EventTimer(cupy), warmup_ms=TILE_WARMUP_MS, measure_ms=TILE_MEASURE_MS)
        record = {"machine": machine, **sweep(cupy, brief, console)}
        tiles_path.write_text(json.dumps(record, indent=1) + "\n")
        return
    runs = {
        Kind.prefill: partial(bench_prefill.run, sections=sections),
        Kind.decode: bench_decode.run,
        Kind.cache: partial(bench_cache.run, cache_gb=cache_gb),
        Kind.compat: bench_compat.run,
        Kind.integrations: bench_integrations.run,
    }
    report = runs[kind](cupy, machine["gpu"], contenders, rounds, quick, host, console)
    if json_path is not None:
        record = {"machine": machine | {"clocks_after": clocks(cupy)}, **report.record}
        json_path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"Written to {json_path}.", markup=False)
    if plot_path is not None and report.record.get("cells") != []:
        report.plot(plot_path, machine["gpu"])
    if report.wrong:
        console.print(f"[red]cupyattn is wrong in {', '.join(report.wrong)}[/]")
        raise typer.Exit(1)
