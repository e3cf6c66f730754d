"""`cupyattn warmup`: compile the kernels of a first session ahead of it, for the GPUs here or for others."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..jit import arch_of, cache, compile
from ..plan import CACHE_CODES, DEVICES, DTYPE_CODES
from ..problem import FLOAT_DTYPES, MAX_HEAD_DIM
from .arch import HELP, named_arch
from .device import see_doctor, why_no_gpu
from .progress import progress_bars

SHORT_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel file to compile for one architecture."""

    kernel: str
    defines: compile.Defines
    arch: str


def warmup(
    arch: Annotated[
        list[str] | None, typer.Option("--arch", metavar="ARCH", help=HELP, show_default="the GPUs here")
    ] = None,
    head_dim: Annotated[
        list[int] | None,
        typer.Option("--head-dim", metavar="N", help="Head dimension, 1 to 256.", show_default="64, 128"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype", metavar="DTYPE", help="float16, bfloat16 or float32.", show_default="float16, bfloat16"
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All supported architectures.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Every kernel with all of its compile-time values.")
    ] = False,
) -> None:
    """Compile kernels ahead, so that first calls do not wait.

    --arch, --head-dim and --dtype can be repeated. No GPU is needed to compile for one. Of decode these are steps
    without append over 8 kv heads, 4 query heads to each, in blocks of 16; others compile at their first call, and a
    DecodePlan that is made ahead of time compiles what it runs.
    """
    from ..plan import warmup_variants

    console = Console()
    head_dims = tuple(head_dim or (64, 128))
    dtypes = tuple(SHORT_DTYPES.get(name, name) for name in dtype or ("float16", "bfloat16"))
    if bad := [dim for dim in head_dims if not 1 <= dim <= MAX_HEAD_DIM]:
        raise typer.BadParameter(f"got {bad[0]}, expected 1 to {MAX_HEAD_DIM}", param_hint="--head-dim")
    if bad := [name for name in dtypes if name not in FLOAT_DTYPES]:
        raise typer.BadParameter(f"got {bad[0]}, expected {', '.join(FLOAT_DTYPES)}", param_hint="--dtype")
    try:
        archs = choose_archs(arch or [], everything)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = cache.folder() == cache.location()
        if not kept:  # what is compiled into a temporary folder is lost when this ends
            raise PermissionError(
                f"cache folder {cache.location()}: cannot be written, so nothing compiled here would be kept. "
                f'Choose another: export {cache.VARIABLE}="$HOME/.cupyattn"'
            )
    except (ImportError, PermissionError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    jobs = [
        Job(kernel, defines, target)
        for target in archs
        for kernel, defines in dict.fromkeys(warmup_variants(target, head_dims, dtypes))
    ]
    start = time.perf_counter()
    done, failures = compile_all(jobs)
    compiled = sum(entry.compiled for entry in done.values())
    seconds = time.perf_counter() - start
    for line in summary(done, verbose) if compiled or verbose else ():
        console.print(line, soft_wrap=True)
    console.print(
        f"{compiled} compiled, {len(done) - compiled} were there already, {len(failures)} failed, "
        f"in {seconds:.1f} s; kept in {cache.location()}",
        soft_wrap=True,
        highlight=False,
    )
    for error in failures:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise typer.Exit(1)


def choose_archs(asked: list[str], everything: bool) -> list[str]:
    """The architectures to compile for: those asked for, all that can be planned for, or those of the GPUs here."""
    known = compile.supported_archs()
    if everything:
        return [arch for arch in DEVICES if int(arch.rstrip("af")) in known]
    if asked:
        archs = [named_arch(name) for name in asked]
        for arch in archs:
            try:
                compile.target(arch.rstrip("af"))
            except RuntimeError as error:  # this NVRTC knows no such chip, and says which one does
                raise typer.BadParameter(str(error).removeprefix("arch: "), param_hint="--arch") from None
    elif reason := why_no_gpu():
        raise typer.BadParameter(
            f"compiling for the GPU here needs an NVIDIA GPU; {reason}.{see_doctor(reason)} "
            f"Say what to compile for: `cupyattn warmup --arch 90`, or --all",
            param_hint="--arch",
        )
    else:
        import cupy

        archs = [arch_of(device) for device in range(cupy.cuda.runtime.getDeviceCount())]
    if bad := [arch for arch in archs if arch not in DEVICES]:
        raise typer.BadParameter(f"got {bad[0]}, expected one of {', '.join(DEVICES)}", param_hint="--arch")
    return list(dict.fromkeys(archs))


def compile_all(jobs: list[Job]) -> tuple[dict[Job, cache.Entry], list[Exception]]:
    """Fetch every job's kernel, with a progress bar. Threads are enough: NVRTC runs without the interpreter's lock."""
    done: dict[Job, cache.Entry] = {}
    failures: list[Exception] = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(min(cores, 32))  # a compilation takes some hundred MB
    try:
        with progress_bars() as progress:
            task = progress.add_task("compiling", total=len(jobs))
            waiting = {pool.submit(cache.fetch, job.kernel, job.defines, job.arch): job for job in jobs}
            for future in as_completed(waiting):
                job = waiting[future]
                try:
                    done[job] = future.result()
                except compile.CompileError as error:
                    failures.append(error)
                progress.update(task, advance=1, description=f"{job.kernel} sm_{job.arch}")
            progress.update(task, description="done")
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits only for what has begun
    return {job: done[job] for job in jobs if job in done}, failures


def summary(done: dict[Job, cache.Entry], verbose: bool) -> list[Text]:
    """One line for each kernel, in words, narrow enough for most terminals; all of its definitions if asked for."""
    described = {job: describe(job) for job in done}
    known = Counter((job.kernel, job.arch, words) for job, words in described.items())
    rows = []
    for job, entry in done.items():
        defines, meta, words = dict(job.defines), entry.meta, described[job]
        if known[job.kernel, job.arch, words] > 1:  # alike in words: then they differ in their tiles
            words += f", {defines.get('TILE_M')} x {defines.get('TILE_N')}"
        took = f"{meta['seconds']:.1f} s" if entry.compiled else "cached"
        rows.append((job.kernel, f"sm_{job.arch}", words, f"{meta['registers']} regs", took))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for (job, entry), row in zip(done.items(), rows, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[3:] = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
        line = Text("  ".join(cells))
        if entry.meta["spill_bytes"]:
            line.append(f"  {entry.meta['spill_bytes']} bytes spilled", "red")
        if verbose:
            line.append("\n    " + " ".join(f"{name}={value}" for name, value in job.defines), "dim")
        lines.append(line)
    return lines


def describe(job: Job) -> str:
    """What a kernel is compiled for, as in "float16  hd 64  packed, paged, masked"."""
    defines = dict(job.defines)
    code = defines.get("DTYPE")
    dtype = next((name for name, number in DTYPE_CODES.items() if number == code), f"dtype {code}")
    packed = defines.get("PACKED_Q") or defines.get("PACKED_NEW")
    kind = next((name for name, number in CACHE_CODES.items() if number == defines.get("CACHE_KIND")), "")
    traits = dict.fromkeys(["packed"] if packed else [])
    traits |= dict.fromkeys([kind] if kind else [])
    for name in ("MASK", "SOFTCAP", "ALIBI"):
        if defines.get(name):
            traits["masked" if name == "MASK" else name.lower()] = None
    if int(defines.get("GROUP", 1)) > 1:
        traits[f"group {defines['GROUP']}"] = None
    return f"{dtype:8}  hd {defines.get('HEAD_DIM'):<3}  {', '.join(traits)}"
