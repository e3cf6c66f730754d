"""`cupyattn bench cache`: what its parts do to a cache, what counts as wrong, and what is made of the times.

All parts run here with NumPy in CuPy's place; only what asks the device for its times, and pinned memory, are stood in
for. No test looks at how fast anything is.
"""

from __future__ import annotations

import json
import math
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from rich.console import Console

from cupyattn import PagedKVCache
from cupyattn.cli import bench_cache
from cupyattn.cli.bench_cache import APPEND, BARE, Measured, Row, Sizes

SIZES = Sizes(
    blocks=64, batches=2, held=20, host_calls=3, fork_tokens=1024, forks=2, swap_gb=0.0, cache_gb=0.0
)  # 0 GB: one block for each sequence
PARTS = {"allocator": 3, "append": 7, "fork": 2, "swap": 4, "snapshot": 4}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Caches of few heads and layers, made-up device times, plain copies that are NumPy's, and a folder to be in."""

    def copies(xp, cache):
        held = cache.k.copy(), cache.v.copy()

        def copy(targets, sources):
            for target, source in zip(targets, sources, strict=True):
                np.copyto(target, source)

        sides = cache.k, cache.v
        return partial(copy, held, sides), partial(copy, sides, held)

    sizes = {"KV_HEADS": 2, "HEAD_DIM": 8, "BATCH": 5, "CALLS": 4, "ROOM": 6, "SAVED_LAYERS": 2, "PERIOD": 1009}
    for name, value in (sizes | {"POOL_BLOCKS": 4096, "CHUNK": 1000}).items():
        monkeypatch.setattr(bench_cache, name, value)
    monkeypatch.setattr(bench_cache, "EventTimer", lambda xp: lambda call: call() or 0.002)
    monkeypatch.setattr(bench_cache, "host_time", lambda xp, call, calls: call() or {"median_us": 30.0})
    monkeypatch.setattr(bench_cache, "pinned_copies", copies)
    monkeypatch.setattr(bench_cache, "snapshot_part", lambda xp, asked, rounds, console: snapshot(tmp_path, rounds))
    monkeypatch.chdir(tmp_path)


def snapshot(folder, rounds=1):
    return bench_cache.snapshot_rows(np, folder, 1 << 16, rounds)


def ticking(monkeypatch, step_us: float) -> None:
    """A clock on which so much passes from one look to the next."""
    looks = iter(range(10**6))
    clock = SimpleNamespace(perf_counter_ns=lambda: int(next(looks) * step_us * 1e3))
    monkeypatch.setattr(bench_cache, "time", clock)


def printed(function, *arguments, **options) -> str:
    console = Console(width=220, no_color=True)
    with console.capture() as capture:
        function(*arguments, console, **options)
    return capture.get()


# --- times -----------------------------------------------------------------------------------------------------------


def test_timed_is_of_one_call(monkeypatch):
    ticking(monkeypatch, 60.0)
    made = []
    assert bench_cache.timed(np, lambda: made.append(0) or len(made), 4) == (15.0, 4)


def test_the_device_is_waited_for_before_and_behind_a_row_of_calls():
    happened = []
    device = SimpleNamespace(synchronize=lambda: happened.append("wait"))
    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda: device))
    bench_cache.timed(cupy, lambda: happened.append("call"), 2)
    assert happened == ["wait", "call", "call", "wait"]


def test_calls_take_turns_forwards_and_backwards():
    order, readied = [], []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = bench_cache.in_turns(calls, 3, lambda call: call() or len(order), lambda: readied.append(len(order)))
    assert order == ["a", "b", "b", "a", "a", "b"] and readied == list(range(6))
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_gb_per_s():
    assert bench_cache.gb_per_s(8_000_000_000, [1e6, 4e6]) == pytest.approx([8.0, 2.0])


# --- allocator -------------------------------------------------------------------------------------------------------


def test_a_block_taken_and_one_given_back_are_an_operation_each(small, monkeypatch):
    ticking(monkeypatch, 1000.0)
    rows = bench_cache.allocator_rows(SIZES, rounds=2)
    assert [row.what for row in rows] == [f"allocate and free, {n} blocks a call" for n in (16, 256, 4096)]
    # 64 blocks in a millisecond by 4 calls of 16, and one call of the others.
    assert [row.rounds for row in rows] == [[2 * n * 1e3] * 2 for n in (64, 256, 4096)]
    assert [row.met for row in rows] == [False, False, True]


def test_blocks_are_as_scattered_as_in_a_pool_long_in_use(small, monkeypatch):
    taken = []

    class Spy(bench_cache.BlockAllocator):
        def allocate(self, count):
            taken.append(super().allocate(count))
            return taken[-1]

    monkeypatch.setattr(bench_cache, "BlockAllocator", Spy)
    bench_cache.blocks_per_s(256, 3)
    everything, *calls = taken
    assert len(everything) == 4096 and [len(blocks) for blocks in calls] == [256] * 3
    assert np.abs(np.diff(calls[0])).mean() > 256


# --- append ----------------------------------------------------------------------------------------------------------


def test_growing_sequences_are_cut_back_when_there_is_no_room(small):
    growing = bench_cache.Growing(np, 20)
    start = [20, 21, 22, 23, 24]
    for count in (*range(1, 7), 1):
        growing.append()
        assert growing.cache.lengths.tolist() == [n + count for n in start]
    growing.cut_back()
    assert growing.cache.lengths.tolist() == start and growing.left == 6


def test_every_sequence_can_grow_by_all_of_its_room(small):
    growing = bench_cache.Growing(np, 42)  # one of them ends with a block, four begin another
    for _ in range(6):
        growing.append()
    assert growing.cache.allocator.num_free == 0


def test_the_bare_call_writes_the_same_rows_into_the_same_memory(small):
    growing = bench_cache.Growing(np, 20)
    for _ in range(3):
        growing.append()
    growing.cut_back()
    before = growing.cache.k.copy()
    growing.bare()
    assert not np.array_equal(growing.cache.k, before)
    for seq, key, value in zip(growing.seqs, growing.k, growing.v, strict=True):
        k, v = growing.cache[seq, -1:]
        assert np.array_equal(k, key) and np.array_equal(v, value)


def test_append_rows(small, monkeypatch):
    ticking(monkeypatch, 100.0)
    rows = {row.what: row for row in bench_cache.append_rows(np, SIZES, rounds=3)}
    ratio = rows.pop(f"{APPEND} over {BARE}, 5 sequences, a token each")
    assert ratio.rounds == [1.0] * 6 and ratio.met and not ratio.wrong
    for name in (APPEND, BARE):
        assert rows[f"{name}, 5 sequences, a token each"].rounds == [25.0] * 6
        assert rows[f"{name}, host time"].value == 30.0
        assert rows[f"{name}, device time"].rounds == [2.0] * 3
    assert len(rows) == 6


def test_the_ratio_is_of_neighbouring_batches(small, monkeypatch):
    wall = {APPEND: [10.0, 30.0, 60.0], BARE: [10.0, 20.0, 30.0]}
    turns = iter([wall, {APPEND: [5.0], BARE: [4.0]}])
    monkeypatch.setattr(bench_cache, "in_turns", lambda *arguments: next(turns))
    ratio = bench_cache.append_rows(np, SIZES, rounds=3)[0]
    assert ratio.rounds == [1.0, 1.5, 2.0] and ratio.value == 1.5 and ratio.met is False


def grow_only(cache, k, v, seqs):
    cache.extend(seqs, 1)


def append_in_the_wrong_order(cache, k, v, seqs, append=PagedKVCache.append):
    append(cache, k, v, seqs[::-1])


def append_keys_as_values(cache, k, v, seqs, append=PagedKVCache.append):
    append(cache, k, k, seqs)


def append_twice(cache, k, v, seqs, append=PagedKVCache.append):
    append(cache, np.tile(k, (1, 2, 1, 1)), np.tile(v, (1, 2, 1, 1)), seqs)


def append_only_the_first_rightly(cache, k, v, seqs, append=PagedKVCache.append):
    append(cache, k if cache.length(seqs[0]) == 20 else v, v, seqs)


WRONG = [grow_only, append_in_the_wrong_order, append_keys_as_values, append_twice, append_only_the_first_rightly]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_append_is_seen(small, monkeypatch, wrong):
    monkeypatch.setattr(bench_cache, "ROOM", 12)  # for those that append too much
    monkeypatch.setattr(PagedKVCache, "append", wrong)
    assert not bench_cache.Growing(np, 20).right()


# --- fork ------------------------------------------------------------------------------------------------------------


def test_fork_rows(small, monkeypatch):
    ticking(monkeypatch, 40.0)
    time, copied = bench_cache.fork_rows(np, SIZES, rounds=3)
    assert time.what == "fork of 1k tokens" and time.rounds == [40.0] * 3 and time.met and not time.wrong
    assert copied.value == 0 and copied.met


def fork_by_copy(cache, seq):
    new = cache.add()
    cache.append(*(side[None] for side in cache[seq]), [new])
    return new


def test_a_fork_that_copies_is_seen(small, monkeypatch):
    monkeypatch.setattr(PagedKVCache, "fork", fork_by_copy)
    time, copied = bench_cache.fork_rows(np, SIZES, rounds=1)
    assert copied.value == 2 * 1024 * 2 * 8 * 2 and copied.met is False and not time.wrong


def test_a_fork_of_another_length_is_wrong(small, monkeypatch):
    monkeypatch.setattr(PagedKVCache, "fork", lambda cache, seq: cache.add())
    time, _ = bench_cache.fork_rows(np, SIZES, rounds=1)
    assert time.wrong


# --- swap ------------------------------------------------------------------------------------------------------------


def test_a_full_cache_is_full_of_different_bits(small):
    cache = bench_cache.full_cache(np, 100_000)
    assert cache.nbytes == 6 * 8 * 2048  # 6 blocks of 2 kB for each sequence: as many as 100 kB hold
    assert cache.allocator.num_free == 0 and cache.lengths.tolist() == [96] * 8
    k, v = (side.view(np.uint16) for side in (cache.k, cache.v))
    assert k.any(axis=(-3, -2, -1)).all() and not np.array_equal(k, v)
    found = bench_cache.tails(cache)
    assert len(found) == 16 and len({bits.tobytes() for bits in found}) == 16
    assert bench_cache.full_cache(np, 0).lengths.tolist() == [16] * 8


def test_swap_rows(small, monkeypatch):
    ticking(monkeypatch, 10.0)
    rows = bench_cache.swap_rows(np, 100_000, rounds=2)
    calls = "swap_out", "swap_in", "plain copy to pinned memory", "plain copy from pinned memory"
    assert [row.what.partition(",")[0] for row in rows] == [*calls]
    for row in rows:
        assert row.rounds == pytest.approx([98_304 / 1e4] * 2) and not row.wrong and row.met is None


def test_a_swap_that_mixes_sequences_up_is_wrong(small, monkeypatch):
    def swap_in(cache, seqs, swap_in=PagedKVCache.swap_in):
        swap_in(cache, seqs)
        cache.reorder([1, 0, *range(2, 8)], seqs)

    monkeypatch.setattr(PagedKVCache, "swap_in", swap_in)
    assert all(row.wrong for row in bench_cache.swap_rows(np, 0, rounds=2))


@pytest.mark.gpu
def test_gpu_plain_copies_carry_keys_and_values_out_and_back(monkeypatch):
    import cupy

    monkeypatch.setattr(bench_cache, "SAVED_LAYERS", 2)
    cache = bench_cache.full_cache(cupy, 0)
    before = bench_cache.tails(cache)
    out, back = bench_cache.pinned_copies(cupy, cache)
    out()
    cache.k[...] = 0
    cache.v[...] = 0
    assert not bench_cache.same(bench_cache.tails(cache), before)
    back()
    assert bench_cache.same(bench_cache.tails(cache), before)


# --- snapshot --------------------------------------------------------------------------------------------------------


def test_snapshot_rows(small, monkeypatch, tmp_path):
    ticking(monkeypatch, 10.0)
    rows = snapshot(tmp_path, rounds=2)
    assert [row.what.partition(",")[0] for row in rows] == ["save", "load", "plain read", "plain write"]
    for row in rows:
        assert row.rounds == pytest.approx([65_536 / 1e4] * 2, rel=0.2)  # a header and an index are in the file too
        assert row.unit == "GB/s" and not row.wrong
    assert [row.target for row in rows] == [1.0, 1.0, None, None]
    assert list(tmp_path.iterdir()) == []


def test_plain_files_have_the_bytes_of_the_snapshot(small, monkeypatch, tmp_path):
    written, read = [], []

    def write(path, piece, nbytes, write=bench_cache.write_plainly):
        write(path, piece, nbytes)
        written.append((path.parent, path.stat().st_size))

    def read_all(path, room, read_plainly=bench_cache.read_plainly):
        read.append((path.parent, read_plainly(path, room)))

    monkeypatch.setattr(bench_cache, "write_plainly", write)
    monkeypatch.setattr(bench_cache, "read_plainly", read_all)
    found = bench_cache.snapshot_round(np, bench_cache.full_cache(np, 1 << 16), tmp_path)
    assert found.right and found.file_bytes > 1 << 16
    assert written == read == [(tmp_path, found.file_bytes)]


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 1001, 2999])
def test_plain_files(tmp_path, nbytes):
    piece, path = np.arange(1000).astype(np.uint8), tmp_path / "plain"
    bench_cache.write_plainly(path, piece, nbytes)
    assert path.read_bytes() == (3 * piece.tobytes())[:nbytes]
    room = np.zeros(1000, np.uint8)
    assert bench_cache.read_plainly(path, room) == nbytes
    assert room[: nbytes % 1000].tobytes() == piece[: nbytes % 1000].tobytes()


def test_a_plain_file_is_on_the_disk_when_it_is_done(monkeypatch, tmp_path):
    flushed = []
    monkeypatch.setattr(bench_cache.os, "fsync", lambda file: flushed.append(os.fstat(file).st_size))
    bench_cache.write_plainly(tmp_path / "plain", np.zeros(1000, np.uint8), 2500)
    assert flushed == [2500]


@pytest.mark.parametrize("lost", [lambda cache: cache.free(list(cache)[-1]), lambda cache: cache.k.fill(1)])
def test_a_load_of_something_else_is_wrong(small, monkeypatch, tmp_path, lost):
    def load(path, *, device, load=PagedKVCache.load):
        cache = load(path, device=device)
        lost(cache)
        return cache

    monkeypatch.setattr(PagedKVCache, "load", load)
    assert all(row.wrong for row in snapshot(tmp_path))


def test_a_snapshot_is_no_larger_than_there_is_room():
    fits = bench_cache.that_fits
    assert fits(8, 100, 100) == 8
    assert fits(8, 21, 100) == 7
    assert fits(8, 100, 10) == 5


def test_snapshots_are_made_on_the_current_disk(monkeypatch, tmp_path):
    freed, asked = [], []
    pool = SimpleNamespace(free_all_blocks=lambda: freed.append(True))
    runtime = SimpleNamespace(memGetInfo=lambda: (3_000, 9_000))
    cupy = SimpleNamespace(get_default_memory_pool=lambda: pool, cuda=SimpleNamespace(runtime=runtime))

    def rows(xp, folder, nbytes, rounds):
        asked.append((folder.resolve().parent, folder.is_dir(), nbytes, rounds))
        return []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_cache, "snapshot_rows", rows)
    assert "a cache of 1e-06 GB is saved, not of 8 GB" in printed(
        partial(bench_cache.snapshot_part, cupy, 8 * 10**9, 2)
    )
    assert printed(partial(bench_cache.snapshot_part, cupy, 500, 2)) == ""
    assert asked == [(tmp_path, True, 1000, 2), (tmp_path, True, 500, 2)] and freed == [True] * 2
    assert list(tmp_path.iterdir()) == []


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_run(small, monkeypatch):
    monkeypatch.setattr(bench_cache, "QUICK", SIZES)

    def run(*, host=False, contenders="auto"):
        console = Console(width=200, no_color=True)
        with console.capture() as capture:
            report = bench_cache.run(np, "X", contenders, 2, True, host, console)
        return report, capture.get()

    return run


def test_run(small_run):
    report, text = small_run()
    record = json.loads(json.dumps(report.record, allow_nan=False))
    assert len(record["rows"]) == sum(PARTS.values()) and record["failed"] == {} and not report.wrong
    assert {"what", "value", "unit", "target", "at_most", "met", "rounds"} < set(record["rows"][0])
    assert record["protocol"]["rounds"] == 2
    assert all(row["what"] in text for row in record["rows"])


def test_host_leaves_out_swaps_and_snapshots(small_run):
    report, _ = small_run(host=True)
    assert len(report.record["rows"]) == sum(PARTS[name] for name in ("allocator", "append", "fork"))
    assert not [row for row in report.record["rows"] if row["unit"] == "GB/s"]


def test_a_part_that_fails_costs_no_other(small_run, monkeypatch):
    def full(cache, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PagedKVCache, "save", full)
    report, text = small_run()
    assert report.record["failed"] == {"snapshot": "OSError: [Errno 28] No space left on device"}
    assert len(report.record["rows"]) == sum(PARTS.values()) - PARTS["snapshot"]
    assert "snapshot could not be measured: OSError" in text


def test_what_is_wrong_is_named(small_run, monkeypatch):
    monkeypatch.setattr(PagedKVCache, "append", grow_only)
    report, _ = small_run(host=True)
    assert report.wrong == [f"{APPEND} over {BARE}, 5 sequences, a token each"]


def test_there_are_no_other_contenders(small_run):
    with pytest.raises(typer.BadParameter, match="got 'fa4', expected some of cupyattn"):
        small_run(contenders="fa4")


@pytest.mark.parametrize(("asked", "expected"), [(None, 8_000_000_000), (0.5, 500_000_000)])
def test_the_size_of_the_snapshot(small, monkeypatch, asked, expected):
    given = []
    monkeypatch.setattr(bench_cache, "swap_rows", lambda xp, nbytes, rounds: [])
    monkeypatch.setattr(bench_cache, "snapshot_part", lambda xp, nbytes, rounds, console: given.append(nbytes) or [])
    sizes = Sizes(**{name: getattr(SIZES, name) for name in Sizes.__slots__} | {"cache_gb": 8.0})
    bench_cache.measure(np, sizes, 1, False, asked, Console(quiet=True))
    assert given == [expected]


# --- what is made of the figures -------------------------------------------------------------------------------------

ROWS = [
    Row("no target", "µs", [3.0, 1.0, 2.0]),
    Row("twice as good", "µs", [25.0], 50.0, at_most=True),
    Row("half as good", "GB/s", [0.5, 0.4, 0.6], 1.0),
    Row("nothing copied", "bytes of KV", [0], 0.0, at_most=True),
    Row("something copied", "bytes of KV", [4096], 0.0, at_most=True),
    Row("just met", "ratio", [1.2], 1.2, at_most=True),
    Row("many", "operations/s", [6e6], 2e6),
]


def test_rows_against_their_targets():
    shares = {row.what: row.share for row in ROWS}
    assert math.isnan(shares.pop("no target"))
    assert shares == {
        "twice as good": 2.0,
        "half as good": 0.5,
        "nothing copied": math.inf,
        "something copied": 0.0,
        "just met": 1.0,
        "many": 3.0,
    }
    assert [row.met for row in ROWS] == [None, True, False, True, False, True, True]
    assert ROWS[0].value == 2.0
    assert ROWS[2].as_record() == {
        "what": "half as good",
        "value": 0.5,
        "unit": "GB/s",
        "target": 1.0,
        "at_most": False,
        "met": False,
        "wrong": False,
        "rounds": [0.5, 0.4, 0.6],
    }


def test_table_has_what_is_farthest_behind_first():
    text = printed(partial(bench_cache.show, Measured(ROWS)), title="T")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [
        "something copied",
        "half as good",
        "just met",
        "twice as good",
        "many",
        "nothing copied",
        "no target",
    ]
    assert rows[4] == ["many", "6,000,000", "operations/s", "≥ 2,000,000"]
    assert rows[2] == ["just met", "1.2", "ratio", "≤ 1.2"]
    assert rows[-1] == ["no target", "2", "µs", ""]


@pytest.mark.parametrize("rows", [ROWS, []])
def test_plot(tmp_path, monkeypatch, rows):
    pytest.importorskip("matplotlib")
    figures, path = [], tmp_path / "cache.png"
    new_figure = bench_cache.new_figure
    monkeypatch.setattr(bench_cache, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    bench_cache.plot(rows, path, "X")
    assert path.read_bytes().startswith(b"\x89PNG")
    bars = [bar.get_width() for bar in figures[0].axes[0].patches]
    assert bars == ([3.0, 2.0, 1.0, 0.5] if rows else [])
