"""What all kinds of `cupyattn bench` share: contenders, ratios, and the machine that it ran on.

Times are those of `cupyattn.timing`. All contenders of a cell are timed one after the other, in several rounds, so that
a change of clocks meets all of them alike. Absolute figures move from machine to machine; the ratios of one run are
what to quote.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from .device import device_label

OURS = "cupyattn"
TIMING = "CUDA events around each call, L2 flushed before it; median of a round, then of the rounds"

Call = Callable[[], Any]


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

    def as_record(self, unit: str, amount: float) -> dict[str, Any]:
        """What was measured, ready for JSON; `amount` over the milliseconds is the speed, called `unit`."""
        if not self.rounds:
            return {"refused": self.refused}
        return {
            "ms": self.ms,
            unit: amount / self.ms,
            "spread": self.spread,
            "rounds_ms": self.rounds,
            "error_over_tolerance": self.error,
        }


Results = dict[Any, dict[str, Result]]
"""Cell -> contender -> result."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that a kind of bench has to hand over: the record, the cells where cupyattn is wrong, how to plot them."""

    record: dict[str, Any]
    wrong: list[str]
    plot: Callable[[Path, str], None]


# --- contenders ------------------------------------------------------------------------------------------------------


def choose(asked: str, modules: Mapping[str, str], console: Console, unasked: tuple[str, ...] = ()) -> list[str]:
    """The contenders to time, out of the names in `modules`, each with the module that must be importable for it.

    "auto" is all of them but those in `unasked`. Those that were asked for by name and cannot be imported are a
    typer.BadParameter.
    """
    names = (
        [name for name in modules if name not in unasked] if asked == "auto" else [n.strip() for n in asked.split(",")]
    )
    chosen = []
    for name in names:
        if name not in modules:
            raise typer.BadParameter(f"contenders: got {name!r}, expected some of {', '.join(modules)}")
        try:
            __import__(modules[name])
            chosen.append(name)
        except Exception as error:  # a broken peer may raise anything when it is imported
            if asked != "auto":
                raise typer.BadParameter(
                    f"contenders: got {name!r}, which cannot be imported ({first_line(error)})"
                ) from None
            console.print(f"{name} is left out: {first_line(error)}", markup=False, style="dim")
    return chosen


def attempt(prepare: Callable[[], Call], check: Callable[[Any], float]) -> tuple[Call | None, Result]:
    """A contender's call, made once, and the error of its output; None and the reason if it refused."""
    try:
        call = prepare()
        return call, Result(error=check(call()))
    except Exception as error:  # peers refuse a shape in their own ways, and a refusal is a result
        return None, Result(refused=first_line(error))


def first_line(error: Exception) -> str:
    """The kind of an exception and the first line of its message, if not too long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


# --- measuring -------------------------------------------------------------------------------------------------------


def host_time(cupy: ModuleType, call: Call, calls: int = 2000, batch: int = 100) -> dict[str, float]:
    """Microseconds that a call keeps the host busy: median and 90th percentile.

    Its kernel must be so short that the device is never far behind; nothing waits for it between the calls of a batch.
    """
    spent = []
    for index in range(calls + batch):
        if index % batch == 0:
            cupy.cuda.Device().synchronize()
        started = time.perf_counter_ns()
        call()
        spent.append((time.perf_counter_ns() - started) / 1e3)
    spent = spent[batch:]  # the first batch warms up
    return {"median_us": float(np.median(spent)), "p90_us": float(np.percentile(spent, 90))}


FULL_CLOCK = 1.15  # of its fastest spell's time, at most, a call takes where the host's clock is not throttled


def at_full_clock(reference: list[float], *others: list[float]) -> list[list[float]]:
    """Times of spells, of a call and of others beside it, but only of the spells in which the host ran at full clock.

    A shared host's clock falls by a third for seconds at a time. reference: what tells that, by its times.
    """
    limit = FULL_CLOCK * min(reference)
    kept = [i for i, time_us in enumerate(reference) if time_us <= limit]
    return [[times[i] for i in kept] for times in (reference, *others)]


# --- reporting -------------------------------------------------------------------------------------------------------


def ratios(results: Results, peer: str) -> dict[Any, float]:
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


def wrong_cells(results: Results) -> list[str]:
    """The cells where cupyattn's result is not within its tolerance."""
    return [str(cell) for cell, row in results.items() if OURS in row and not row[OURS].error <= 1.0]


def ratio_table(
    results: Results,
    names: list[str],
    title: str,
    speed: Callable[[Any, Result], str],
    columns: Mapping[str, Callable[[Any], str]] | None = None,
    without_peer: Callable[[Any], float] = lambda cell: math.inf,
) -> Table:
    """A table of speeds and ratios, lowest ratio first.

    `columns` stand behind the shape. `without_peer` ranks the cells that no peer took.
    """
    peers = [name for name in names if name != OURS]
    per_peer = {peer: ratios(results, peer) for peer in peers}
    table = Table(
        title=title, caption="ratio: time of the peer / time of cupyattn; slowest cells first", title_justify="left"
    )
    table.add_column("shape")
    for header in (*(columns or ()), *names, *(f"ratio to {peer}" for peer in peers)):
        table.add_column(header, justify="right")

    def rank(cell: Any) -> float:
        return min((values[cell] for values in per_peer.values() if cell in values), default=without_peer(cell))

    for cell in sorted(results, key=rank):
        row = results[cell]
        more = [column(cell) for column in (columns or {}).values()]
        speeds = [speed(cell, row[name]) if name in row and row[name].rounds else "—" for name in names]
        against = [f"{values[cell]:.2f}" if cell in values else "—" for values in per_peer.values()]
        table.add_row(str(cell), *more, *speeds, *against)
    return table


def show_summary(results: Results, console: Console) -> None:
    """One line for each peer."""
    for peer, line in summary(results).items():
        console.print(
            f"against {peer}: geometric mean {line['geometric_mean']:.3f}, lowest {line['minimum']:.3f}"
            f" ({line['minimum_cell']}), {line['cells']} cells",
            highlight=False,
        )


def show_refusals(results: Results, console: Console) -> None:
    """One line for each reason that a contender had."""
    refusals = {f"{name}: {result.refused}" for row in results.values() for name, result in row.items()}
    for refusal in sorted(line for line in refusals if not line.endswith(": ")):
        console.print(f"refused by {refusal}", markup=False, style="dim")


def show_host(host_us: Mapping[str, dict[str, float]], console: Console) -> None:
    """One line for each call that was measured."""
    for label, line in host_us.items():
        console.print(
            f"host time of {label}: {line['median_us']:.1f} µs (90th percentile {line['p90_us']:.1f})",
            highlight=False,
        )


def new_figure(width: float = 6, height: float = 4) -> Any:
    """A matplotlib figure, so many inches wide and high. Without matplotlib a typer.BadParameter."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise typer.BadParameter(
            "plot: got no matplotlib, expected it to be installed (the extra notebooks brings it)"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


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


def clocks_under_load(cupy: ModuleType, call: Call, ms: float, seconds: float = 0.25) -> dict[str, float] | None:
    """The same after a call, which takes so many milliseconds, has run over and over, and while it still does."""
    if clocks(cupy) is None:
        return None
    calls = max(1, int(50 / ms))  # as many are always ahead of the one that is waited for
    running = None
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(calls):
            call()
        ahead = cupy.cuda.Event()
        ahead.record()
        if running is not None:
            running.synchronize()
        running = ahead
    sample = clocks(cupy)
    cupy.cuda.Device().synchronize()
    return sample
