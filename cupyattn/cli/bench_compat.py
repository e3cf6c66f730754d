"""`cupyattn bench compat`: what the front doors cost the host over this library's own calls, beside FlashInfer's calls.

Every call is made on CuPy arrays and on PyTorch tensors, so small that the device is never far behind, and beside the
call of this library that serves it. FlashInfer takes PyTorch's alone.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import sub
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

import cupyattn

from ..compat import flash_attn, flashinfer, incremental
from .bench_common import OURS, Call, Report, at_full_clock, choose, first_line, host_time, new_figure
from .bench_decode import Finding
from .device import to_host

FLASHINFER = "flashinfer"
CONTENDERS = {OURS: "cupyattn", FLASHINFER: "flashinfer"}
BATCH, SEQLEN, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, QUERIES = 8, 512, 32, 8, 128, 16, 4
DTYPE = ml_dtypes.bfloat16
CALLS, QUICK_CALLS, SPELLS = 2000, 200, 5
FRONT_DOOR_US, RUN_US, PLAN_US = 5.0, 12.0, 40.0  # at most: over the native call, and in all
TOLERANCE = 0.02  # between two ways to one result, of the size of standard normal values


@dataclass(slots=True)
class Row:
    """One call of a front door on one library's arrays: microseconds of every round, and of what it is beside."""

    what: str
    library: str
    call: Call = field(repr=False)
    native: Call | None = field(default=None, repr=False)  # of this library, for the same result
    peer: Call | None = field(default=None, repr=False)  # FlashInfer's own
    at_most_us: float | None = None  # over the native call if it is a front door's, else in all
    over_native: bool = False
    times: dict[str, list[float]] = field(default_factory=dict)  # of every spell, of the call and what it is beside
    p90_us: float = 0.0  # the highest of a spell
    refused: str = ""
    wrong: bool = False

    def us(self, name: str = "call") -> float | None:
        """The median over the spells at full clock."""
        if not self.times.get(name):
            return None
        _, times = at_full_clock(self._reference, self.times[name])
        return statistics.median(times)

    @property
    def over(self) -> float | None:
        """Microseconds over the native call right behind it, the median over the same spells."""
        if not self.times.get("native"):
            return None
        return statistics.median(
            map(sub, *at_full_clock(self._reference, self.times["call"], self.times["native"])[1:])
        )

    @property
    def _reference(self) -> list[float]:
        return self.times.get("native") or self.times["call"]

    def as_record(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        return {
            "what": self.what,
            "library": self.library,
            "us": self.us(),
            "p90_us": self.p90_us,
            "native_us": self.us("native"),
            "over_native_us": self.over,
            "flashinfer_us": self.us("peer"),
            "spells_us": self.times,
            "spells_at_full_clock": len(at_full_clock(self._reference)[0]),
            "flashinfer_refused": self.refused,
        }

    def __str__(self) -> str:
        return f"{self.what} on {self.library} arrays"


def run(cupy: ModuleType, gpu: str, contenders: str, rounds: int, quick: bool, host: bool, console: Console) -> Report:
    """Measure and show. There is nothing but host times, so that `host` changes nothing."""
    names = choose(contenders, CONTENDERS, console)
    rows = [row for side in sides(cupy) for row in rows_of(side, FLASHINFER in names)]
    for row in rows:
        row.wrong = differs(row)
    measure(cupy, rows, rounds, QUICK_CALLS if quick else CALLS)
    console.print(as_table(rows, f"Host time of a call in µs, {gpu}"))
    for finding in findings(rows):
        console.print(str(finding), style="green" if finding.met else "red", highlight=False)
    for refused in sorted({row.refused for row in rows if row.refused}):
        console.print(f"refused by flashinfer: {refused}", markup=False, style="dim")
    return Report(as_record(rows, rounds), [str(row) for row in rows if row.wrong], partial(plot, rows))


# --- the arrays ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Side:
    """One library's arrays on the GPU."""

    library: str
    put: Callable[[np.ndarray], Any]

    def normal(self, *shape: int) -> Any:
        return self.put(np.random.default_rng(0).standard_normal(shape, np.float32).astype(DTYPE))


def sides(cupy: ModuleType) -> Iterator[Side]:
    """CuPy, and PyTorch where it is installed."""
    yield Side("cupy", cupy.asarray)
    try:
        import torch
    except ImportError:
        return
    yield Side("torch", lambda host: torch.from_dlpack(cupy.asarray(host)))


def rows_of(side: Side, with_peer: bool) -> list[Row]:
    """All calls on one library's arrays, ready to be made."""
    theirs = importlib.import_module("flashinfer") if with_peer and side.library == "torch" else None
    return [*front_doors(side), *decode_rows(side, theirs), *prefill_rows(side, theirs)]


def front_doors(side: Side) -> Iterator[Row]:
    """flash_attn's functions and `incremental.flash_attention`, each with the native call that it is."""
    row = partial(Row, library=side.library, at_most_us=FRONT_DOOR_US, over_native=True)
    q, k, v = side.normal(2, 64, HEADS, HEAD_DIM), *(side.normal(2, 64, KV_HEADS, HEAD_DIM) for _ in "kv")
    native = partial(cupyattn.attention, q, k, v, causal=True)
    yield row("flash_attn_func", call=partial(flash_attn.flash_attn_func, q, k, v, causal=True), native=native)
    qkv = side.normal(2, 64, 3, HEADS, HEAD_DIM)
    native = partial(cupyattn.attention, qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], causal=True)
    packed = partial(flash_attn.flash_attn_qkvpacked_func, qkv, causal=True)
    yield row("flash_attn_qkvpacked_func", call=packed, native=native)
    turned = [x.swapaxes(1, 2) for x in (q, k, v)]
    native = partial(_heads_first, q, k, v)
    front = partial(incremental.flash_attention, *turned, causal=True)
    yield row("incremental.flash_attention", call=front, native=native)
    ends = side.put(np.array([0, 50, 128], np.int32))
    rows = [x.reshape(128, *x.shape[2:]) for x in (q, k, v)]
    native = partial(cupyattn.attention_varlen, *rows, ends, ends, max_seqlen_q=78, max_seqlen_k=78, causal=True)
    packed = partial(flash_attn.flash_attn_varlen_func, *rows, ends, ends, 78, 78, causal=True)
    yield row("flash_attn_varlen_func", call=packed, native=native)
    yield from cache_doors(side, row)


def _heads_first(q: Any, k: Any, v: Any) -> Any:
    """The result of causal attention in the form in which incremental.flash_attention gives it."""
    return cupyattn.attention(q, k, v, causal=True).swapaxes(1, 2)


def cache_doors(side: Side, row: Callable[..., Row]) -> Iterator[Row]:
    """flash_attn_with_kvcache over pages: reading alone, with new rows appended, and with the lse."""
    pages, q = Pages(side), side.normal(BATCH, 1, HEADS, HEAD_DIM)
    where = {"cache_seqlens": pages.lengths, "block_table": pages.table}
    new = dict(zip("kv", (side.normal(BATCH, 1, KV_HEADS, HEAD_DIM) for _ in "kv"), strict=True))
    arrays = q, *pages.caches
    for what, options in (("", {}), (", append", new)):
        native = partial(cupyattn.attention_with_kvcache, *arrays, **where, **options)
        front = partial(flash_attn.flash_attn_with_kvcache, *arrays, **where, **options)
        yield row(f"flash_attn_with_kvcache{what}", call=front, native=native)
    native = partial(_output, cupyattn.attention_with_kvcache, *arrays, **where, return_lse=True)
    front = partial(_output, flash_attn.flash_attn_with_kvcache, *arrays, **where, return_softmax_lse=True)
    yield row("flash_attn_with_kvcache, with its lse", call=front, native=native)


def _output(function: Callable[..., tuple[Any, Any]], *arrays: Any, **options: Any) -> Any:
    return function(*arrays, **options)[0]


class Pages:
    """Sequences of SEQLEN keys in pages, one token of each still free."""

    def __init__(self, side: Side) -> None:
        each = SEQLEN // PAGE_SIZE
        ids = np.random.default_rng(1).permutation(BATCH * each).astype(np.int32)
        ends = np.arange(0, BATCH * each + 1, each, dtype=np.int32)
        last = np.full(BATCH, PAGE_SIZE - 1, np.int32)
        self.caches = tuple(side.normal(BATCH * each, PAGE_SIZE, KV_HEADS, HEAD_DIM) for _ in "kv")
        self.table, self.lengths = side.put(ids.reshape(BATCH, each)), side.put(np.full(BATCH, SEQLEN - 1, np.int32))
        self.on_host, self.on_device = (ends, ids, last), tuple(map(side.put, (ends, ids, last)))

    @staticmethod
    def sizes() -> tuple[int, ...]:
        return HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE


# --- FlashInfer's wrappers -------------------------------------------------------------------------------------------


def decode_rows(side: Side, theirs: ModuleType | None) -> Iterator[Row]:
    """A decode wrapper's plan and run, beside `DecodePlan.run` and FlashInfer's own."""
    pages, q = Pages(side), side.normal(BATCH, HEADS, HEAD_DIM)
    where = {"cache_seqlens": pages.lengths, "block_table": pages.table}
    native = partial(cupyattn.DecodePlan(q, *pages.caches, **where).run, q, *pages.caches, **where)
    wrappers = _wrappers(side, "BatchDecodeWithPagedKVCacheWrapper", theirs)
    yield from _wrapper_rows(side, "decode", pages, (), (q, pages.caches), wrappers, native)


def prefill_rows(side: Side, theirs: ModuleType | None) -> Iterator[Row]:
    """The same of a prefill wrapper, over sequences of different numbers of queries, beside `PrefillPlan.run`."""
    pages, counts = Pages(side), np.arange(BATCH) % QUERIES + 1
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    q, there = side.normal(int(ends[-1]), HEADS, HEAD_DIM), side.put(ends)
    where = {"seqused_k": pages.lengths, "block_table": pages.table}
    prefill_plan = cupyattn.PrefillPlan(q, *pages.caches, there, **where, max_seqlen_q=QUERIES, causal=True)
    native = partial(prefill_plan.run, q, *pages.caches, there, **where)
    wrappers = _wrappers(side, "BatchPrefillWithPagedKVCacheWrapper", theirs)
    yield from _wrapper_rows(side, "prefill", pages, (ends, there), (q, pages.caches), wrappers, native)


def _wrappers(side: Side, name: str, theirs: ModuleType | None) -> tuple[Any, Any]:
    """(ours, FlashInfer's or None)."""
    peer = None if theirs is None else getattr(theirs, name)(side.put(np.zeros(128 << 20, np.uint8)))
    return getattr(flashinfer, name)(side.put(np.zeros(64 << 20, np.uint8))), peer


def _wrapper_rows(
    side: Side,
    kind: str,
    pages: Pages,
    ends: tuple[Any, ...],
    arrays: tuple[Any, ...],
    wrappers: tuple[Any, Any],
    native: Call,
) -> Iterator[Row]:
    """run without and with the lse, plan with index arrays on the device and on the host, and a plan with its run.

    ends: of the queries on the host and on the device, for a prefill.
    """
    options = {"q_data_type": arrays[0].dtype} | ({"causal": True} if ends else {})
    there, here = (*ends[1:], *pages.on_device, *pages.sizes()), (*ends[:1], *pages.on_host, *pages.sizes())
    mine, other = wrappers
    calls, refused = _Calls(mine, there, arrays, options), ""
    calls.plan()
    peer = None if other is None else _Calls(other, there, arrays, options)
    if peer is not None and (refused := peer.refusal()):
        peer = None
    row = partial(Row, library=side.library, refused=refused)

    def beside(name: str) -> Call | None:
        return None if peer is None else getattr(peer, name)

    yield row(f"{kind} wrapper.run", call=calls.run, native=native, peer=beside("run"), at_most_us=RUN_US)
    yield row(f"{kind} wrapper.run, with its lse", call=calls.run_with_lse, peer=beside("run_with_lse"))
    yield row(f"{kind} wrapper.plan", call=calls.plan, peer=beside("plan"), at_most_us=PLAN_US)
    on_host = partial(mine.plan, *here, **options)
    yield row(f"{kind} wrapper.plan, index arrays on the host", call=on_host, at_most_us=PLAN_US)
    yield row(f"{kind} wrapper.plan and run", call=calls.plan_and_run, peer=beside("plan_and_run"))


class _Calls:
    """What is timed of one wrapper."""

    def __init__(
        self, wrapper: Any, planned: tuple[Any, ...], arrays: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.plan = partial(wrapper.plan, *planned, **options)
        self.run = partial(wrapper.run, *arrays)
        self.run_with_lse = partial(wrapper.run, *arrays, return_lse=True)

    def plan_and_run(self) -> Any:
        self.plan()
        return self.run()

    def refusal(self) -> str:
        """Why it refuses, or "" where it is planned and has run."""
        try:
            self.plan_and_run()
        except Exception as error:  # peers refuse a shape in their own ways, and a refusal is a result
            return first_line(error)
        return ""


# --- measuring -------------------------------------------------------------------------------------------------------


def differs(row: Row) -> bool:
    """Whether a call and its native one give different results. Appending twice writes the same rows."""
    if row.native is None:
        return False
    got, expected = (_numbers(call()) for call in (row.call, row.native))
    return got.shape != expected.shape or not np.allclose(got, expected, rtol=0, atol=TOLERANCE)


def _numbers(array: Any) -> np.ndarray:
    if not hasattr(array, "get") and hasattr(array, "cpu"):
        return array.float().cpu().numpy()
    return to_host(array).astype(np.float32)


def measure(cupy: ModuleType, rows: list[Row], rounds: int, calls: int) -> None:
    """Time every call, and right behind it those that it is beside, in so many spells of every round.

    Spells are short, as the host's clock can change at any time, and both of what is compared are to run at one clock.
    """
    for _ in range(rounds):
        for row in rows:
            for _ in range(SPELLS):
                for name, call in (("call", row.call), ("native", row.native), ("peer", row.peer)):
                    if call is not None:
                        found = host_time(cupy, call, calls=calls // SPELLS)
                        row.times.setdefault(name, []).append(found["median_us"])
                        if name == "call":
                            row.p90_us = max(row.p90_us, found["p90_us"])


# --- reporting -------------------------------------------------------------------------------------------------------


def findings(rows: list[Row]) -> list[Finding]:
    """Everything that has a target, the front doors by the worst of each library."""
    found = []
    for library in dict.fromkeys(row.library for row in rows):
        doors = [row for row in rows if row.library == library and row.over_native]
        if doors:
            worst = max(doors, key=lambda row: row.over)
            what = f"front doors over the native call on {library} arrays, µs"
            met = worst.over <= worst.at_most_us
            found.append(Finding(what, worst.over, worst.at_most_us, met, at_most=True, cell=worst.what))
    for row in rows:
        if row.at_most_us is not None and not row.over_native:
            us = row.us()
            found.append(Finding(f"{row}, µs", us, row.at_most_us, us <= row.at_most_us, at_most=True))
    return found


def as_record(rows: list[Row], rounds: int) -> dict[str, Any]:
    """Everything that was measured, ready for JSON."""
    return {
        "protocol": {
            "dtype": "bfloat16",
            "batch": BATCH,
            "keys": SEQLEN,
            "heads": [HEADS, KV_HEADS],
            "head_dim": HEAD_DIM,
            "page_size": PAGE_SIZE,
            "timing": "host time of a call, median of a spell, then of those at full clock; differences in a spell",
            "spells": SPELLS,
            "rounds": rounds,
        },
        "rows": [row.as_record() for row in rows],
        "targets": [asdict(finding) for finding in findings(rows)],
    }


def as_table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left", caption="native: this library's own call for the same result")
    for header in ("call", "arrays"):
        table.add_column(header)
    for header in ("µs", "native", "over it", "flashinfer"):
        table.add_column(header, justify="right")
    for row in rows:
        figures = row.us(), row.us("native"), row.over, row.us("peer")
        table.add_row(row.what, row.library, *("—" if us is None else f"{us:.1f}" for us in figures))
    return table


def plot(rows: list[Row], path: Path, gpu: str) -> None:
    """Bars of every call, with the native call's and FlashInfer's beside it."""
    figure = new_figure(8, 0.35 * len(rows) + 1.5)
    axis = figure.subplots()
    places = np.arange(len(rows))
    for name, label, shift in (("call", "front door", -0.27), ("native", "native", 0.0), ("peer", "flashinfer", 0.27)):
        shown = [(place, row.us(name)) for place, row in zip(places, rows, strict=True) if row.us(name) is not None]
        if shown:
            at, us = zip(*shown, strict=True)
            axis.barh(np.array(at) + shift, us, height=0.25, label=label)
    axis.set_yticks(places, [str(row) for row in rows])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="µs of the host", title=f"Front doors, {gpu}")
    axis.legend()
    figure.savefig(path, dpi=120)
