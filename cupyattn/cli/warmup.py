"""`cupyattn warmup`: compile the kernels of a first session ahead of it, for the GPUs here or for others."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..jit import arch_of, cache, compile
from ..problem import FLOAT_DTYPES, MAX_HEAD_DIM
from .device import why_no_gpu

ALWAYS = ("DTYPE", "HEAD_DIM")
SHORT_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel file to compile for one architecture."""

    kernel: str
    defines: compile.Defines
    arch: str


def warmup(
    arch: Annotated[
        list[str] | None, typer.Option(help="Architecture to compile for, as in 80 or 90. Default: the GPUs here.")
    ] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head dimensions.", show_default="64, 128")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float16, bfloat16 or float32.", show_default="float16, bfloat16")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All supported architectures.")] = False,
) -> None:
    """Compile kernels ahead, so that first calls do not wait. Options can be repeated; no GPU is needed."""
    from ..plan import warmup_variants

    console = Console()
    head_dims = tuple(head_dim or (64, 128))
    dtypes = tuple(SHORT_DTYPES.get(name, name) for name in dtype or ("float16", "bfloat16"))
    if bad := [dim for dim in head_dims if not 1 <= dim <= MAX_HEAD_DIM]:
        raise typer.BadParameter(f"--head-dim: got {bad[0]}, expected 1 to {MAX_HEAD_DIM}")
    if bad := [name for name in dtypes if name not in FLOAT_DTYPES]:
        raise typer.BadParameter(f"--dtype: got {bad[0]}, expected {', '.join(FLOAT_DTYPES)}")
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
    done, failures = compile_all(jobs, console)
    console.print(summary(done))
    compiled = sum(entry.compiled for entry in done.values())
    seconds = time.perf_counter() - start
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
    from ..plan import DEVICES

    known = compile.supported_archs()
    if everything:
        return [arch for arch in DEVICES if int(arch.rstrip("af")) in known]
    if asked:
        archs = [named_arch(name) for name in asked]
    elif reason := why_no_gpu():
        raise typer.BadParameter(
            f"--arch: got none, and there is no GPU here to compile for ({reason}). "
            f"Expected an architecture, as in `cupyattn warmup --arch 90`, or --all"
        )
    else:
        import cupy

        archs = [arch_of(device) for device in range(cupy.cuda.runtime.getDeviceCount())]
    if bad := [arch for arch in archs if arch not in DEVICES]:
        raise typer.BadParameter(f"--arch: got {bad[0]}, expected one of {', '.join(DEVICES)}")
    return list(dict.fromkeys(archs))


def named_arch(name: str) -> str:
    """What a chip called so runs: "90", "9.0", "sm_90" and "90a" are all "90a"."""
    number = re.fullmatch(r"(?:sm_)?(\d{2,3})[af]?", name.replace(".", ""))
    try:
        return compile.target(number[1]) if number else name
    except RuntimeError as error:
        raise typer.BadParameter(f"--{error}") from None


def compile_all(jobs: list[Job], console: Console) -> tuple[dict[Job, cache.Entry], list[Exception]]:
    """Fetch every job's kernel, with a progress bar. Threads are enough: NVRTC runs without the interpreter's lock."""
    done: dict[Job, cache.Entry] = {}
    failures: list[Exception] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(min(cores, 32))  # a compilation takes some hundred MB
    try:
        with Progress(*columns, console=console) as progress:
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


def summary(done: dict[Job, cache.Entry]) -> Table:
    """One row for each kernel."""
    table = Table("kernel", "arch", "defines")
    for heading in ("registers", "spills (bytes)", "seconds", ""):
        table.add_column(heading, justify="right")
    for job, entry in done.items():
        meta = entry.meta
        spills = str(meta["spill_bytes"])
        table.add_row(
            job.kernel,
            job.arch,
            short(job, done),
            str(meta["registers"]),
            f"[red]{spills}[/]" if meta["spill_bytes"] else spills,
            f"{meta['seconds']:.2f}",
            "compiled" if entry.compiled else "cached",
        )
    return table


def short(job: Job, among: Iterable[Job]) -> str:
    """The job's definitions without those that all jobs of its kernel share."""
    shared = set.intersection(*(set(other.defines) for other in among if other.kernel == job.kernel))
    return " ".join(f"{name}={value}" for name, value in job.defines if name in ALWAYS or (name, value) not in shared)
