"""`cupyattn bench decode`: cells, their bytes and tables, what is made of the times, and the record.

`measure` runs here with NumPy in CuPy's place, so that its checks of results are real, and with times that are made up.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from cupyattn.cli import bench_decode
from cupyattn.cli.bench_common import OURS, Result, Results, wrong_cells
from cupyattn.cli.bench_decode import (
    APPENDS,
    BLOCKS,
    FLASHINFER,
    FLASHINFER_TC,
    FP8,
    FP8S,
    FULL,
    GRID,
    PLAN_RUN,
    QUICK,
    SHARED,
    STREAM,
    UNEVEN,
    Cell,
    Measured,
    Pool,
)

CELLS = [cell for group in FULL for cell in group]
HOST = {PLAN_RUN.format("cupy"): {"median_us": 7.5, "p90_us": 8.0}}


def results() -> Results:
    """The whole grid: cupyattn at 1.25 of the stream's time; FlashInfer's kernels at 2 and 3 times ours, in turns."""
    made: Results = {}
    for index, cell in enumerate(CELLS):
        ms = 1e-3 * (4 + cell.kv_bytes / 4.0e6)
        row = made[cell] = {OURS: Result([1.25 * ms])}
        if cell.section not in ("append", "shared"):
            first, second = (2.0, 3.0) if index % 2 else (3.0, 2.0)
            row[FLASHINFER] = Result([1.25 * first * ms])
            row[FLASHINFER_TC] = Result([1.25 * second * ms])
            row["fa4"] = Result(refused="NotImplementedError: no split-KV")
        row[STREAM] = Result([ms])
    return made


def finding(made: Results, words: str):
    found = [line for line in bench_decode.findings(made, HOST) if words in line.what]
    assert len(found) == 1, [line.what for line in found]
    return found[0]


def set_ms(made: Results, cell: Cell, *rounds: float) -> None:
    made[cell][OURS] = Result(list(rounds))


def printed(function, *arguments, **options) -> str:
    console = Console(width=220, no_color=True)
    with console.capture() as capture:
        function(*arguments, console, **options)
    return capture.get()


# --- cells -----------------------------------------------------------------------------------------------------------


def test_grid():
    grid = [cell for group in GRID for cell in group]
    assert len(grid) == len(set(grid)) == 40
    assert {(cell.heads, cell.kv_heads) for cell in grid} == {(32, 8), (32, 32), (64, 8), (16, 1)}
    assert all(cell.block_size == 16 and cell.kv_dtype == "bfloat16" for cell in grid)
    assert len(CELLS) == len(set(CELLS)) == 60
    assert {cell for group in QUICK for cell in group} < set(CELLS)


def test_kv_bytes():
    assert Cell("grid", 1, 1024, 32, 8).kv_bytes == 2 * 1024 * 8 * 128 * 2
    assert Cell("grid", 64, 8192, 32, 32).kv_bytes == 1 << 33
    assert Cell("fp8", 64, 8192, kv_dtype=FP8).kv_bytes == 1 << 30
    shared, alone = SHARED
    assert shared.kv_bytes == (32768 + 64 * 256) * 4096
    assert alone.kv_bytes == 64 * (32768 + 256) * 4096


def test_uneven_batch_has_the_bytes_of_the_even_one():
    uneven, even = UNEVEN
    lengths = uneven.lengths()
    assert uneven.kv_bytes == even.kv_bytes
    assert lengths.sum() == even.lengths().sum() == 128 * 4096
    assert lengths.min() >= 1 and lengths.max() > 3 * 4096
    assert np.log(lengths).std() == pytest.approx(1.0, abs=0.2)
    assert (lengths == uneven.lengths()).all()


@pytest.mark.parametrize("cell", [*UNEVEN, *BLOCKS, SHARED[0], GRID[0][0]], ids=str)
def test_block_tables_hold_every_block_once(cell):
    table, blocks = bench_decode.block_table(cell), cell.blocks()
    assert table.dtype == np.int32 and table.shape == (cell.batch, blocks.max())
    used = np.concatenate([row[:count] for row, count in zip(table, blocks, strict=True)])
    assert sorted(used) == list(range(blocks.sum()))
    assert not (used == np.arange(used.size)).all()
    assert (blocks * cell.block_size >= cell.lengths()).all()
    assert cell.pool_elements == (cell.prefix + blocks.sum() * cell.block_size) * cell.kv_heads * 128


def test_names_are_told_apart_within_a_section():
    assert str(GRID[0][0]) == "1 × 1k 32/8"
    assert str(BLOCKS[0]) == "64 × 8k 32/8, block size 1"
    for group in (UNEVEN, BLOCKS, SHARED, *FP8S, *APPENDS):
        assert len({str(cell) for cell in group}) == len(group)


def test_a_pool_serves_all_cells(monkeypatch):
    monkeypatch.setattr(Pool, "PERIOD", 1009)
    small, large = Cell("grid", 2, 20, 4, 2, block_size=4), Cell("shared", 3, 24, 2, 1, block_size=2, prefix=16)
    pool = Pool(np, "bfloat16", [small, large])
    assert pool.size == max(small.pool_elements, large.pool_elements)
    for cell in (small, large):
        case = bench_decode.place(np, cell, pool)
        assert case.k_cache.shape == case.v_cache.shape == (cell.blocks().sum(), cell.block_size, cell.kv_heads, 128)
        assert case.k_cache.dtype == ml_dtypes.bfloat16
        assert np.isfinite(case.k_cache.astype(np.float32)).all()
        assert not np.array_equal(case.k_cache, case.v_cache)
    assert case.k_prefix.shape == (16, 1, 128)
    assert case.cache_seqlens.tolist() == [8, 8, 8]


def test_groups_that_do_not_fit_are_left_out():
    room = SimpleNamespace(runtime=SimpleNamespace(memGetInfo=lambda: (1 << 30, 1 << 30)))
    console = Console(width=400)
    with console.capture() as capture:
        fitting = bench_decode.that_fit(SimpleNamespace(cuda=room), FULL, console)
    assert 0 < len(fitting) < len(FULL)
    assert SHARED not in fitting and GRID[0] in fitting
    assert "64 × 33024 32/8, nothing shared" in capture.get()


# --- measuring, on NumPy ---------------------------------------------------------------------------------------------

TINY = dict(heads=4, kv_heads=2, block_size=4)


@pytest.fixture
def stand_in(monkeypatch):
    """Contenders are cupyattn's NumPy backend and one that refuses; a call takes 2 ms, a read 1 ms."""

    class FakeStream:
        def __init__(self, cupy, timer, data):
            self.data = data

        def best(self, nbytes):
            assert nbytes <= self.data.nbytes
            return self.best

        def as_record(self, nbytes):
            return {"blocks": 1}

        def empty_launch_ms(self):
            return 0.003

    def refuse(case):
        raise RuntimeError("no")

    monkeypatch.setattr(Pool, "PERIOD", 1009)
    monkeypatch.setattr(bench_decode, "Stream", FakeStream)
    monkeypatch.setattr(bench_decode, "EventTimer", lambda cupy: lambda call: 1.0 if "best" in str(call) else 2.0)
    monkeypatch.setattr(bench_decode, "clocks", lambda cupy: None)
    ours = {OURS: bench_decode._one_call}
    monkeypatch.setattr(bench_decode, "CONTENDERS", {OURS: ("cupyattn", ours), "no": ("cupyattn", {"no": refuse})})
    return SimpleNamespace(contenders=bench_decode.CONTENDERS)


GROUPS = (
    (Cell("grid", 2, 40, **TINY),),
    (Cell("uneven", 5, 30, uneven=True, **TINY), Cell("uneven", 5, 30, **TINY)),
    (Cell("fp8", 2, 33, kv_dtype=FP8, **TINY), Cell("fp8", 2, 33, **TINY)),
    (Cell("append", 3, 21, append=True, **TINY), Cell("append", 3, 21, **TINY)),
)


def test_measure(stand_in):
    measured = bench_decode.measure(np, GROUPS, [OURS, "no"], rounds=2)
    assert list(measured.results) == [cell for group in GROUPS for cell in group]
    for cell, row in measured.results.items():
        assert row[OURS].rounds == [2.0, 2.0] and row[STREAM].rounds == [1.0, 1.0], row[OURS].refused
        assert 0 < row[OURS].error <= 1
        assert ("no" in row) == (cell.section != "append")
        assert "no" not in row or row["no"].refused == "RuntimeError: no"
    assert not wrong_cells(measured.results)
    record = json.loads(json.dumps(bench_decode.as_record(measured, {}, 2)))
    assert [cell["name"] for cell in record["cells"]] == list(map(str, measured.results))


@pytest.mark.parametrize("cell", [group[0] for group in GROUPS], ids=str)
def test_wrong_results_are_seen(stand_in, cell):
    def swapped_blocks(case):
        wrong = replace(case, block_table=case.block_table[::-1].copy())
        return bench_decode._one_call(wrong)

    def nothing_written(case):
        return lambda: case.out

    for kernel in (swapped_blocks, nothing_written):
        stand_in.contenders[OURS] = ("cupyattn", {OURS: kernel})
        measured = bench_decode.measure(np, ((cell,),), [OURS], rounds=1)
        assert wrong_cells(measured.results) == [str(cell)], kernel


def test_shared_prefix_is_checked_with_its_prefix(stand_in):
    cell = Cell("shared", 2, 24, prefix=16, **TINY)
    case = bench_decode.place(np, cell, Pool(np, "bfloat16", [cell]))
    rows = bench_decode.rows_of(case, case.k_prefix, case.k_cache, 1, 1)
    suffix = np.concatenate([case.k_cache[block, :, 1] for block in case.block_table[1]])
    assert rows.shape == (1, 24, 1, 128)
    assert np.array_equal(rows[0, :, 0], np.concatenate([case.k_prefix[:, 1], suffix]))


# --- what is made of the times ---------------------------------------------------------------------------------------


def test_flashinfer_is_the_better_of_its_kernels():
    merged = bench_decode.better_of_kernels(results())
    for row in merged.values():
        assert FLASHINFER_TC not in row
        assert FLASHINFER not in row or row[FLASHINFER].ms == pytest.approx(2 * row[OURS].ms)
    cell = GRID[0][0]
    row = {OURS: Result([1.0]), FLASHINFER: Result(refused="no"), FLASHINFER_TC: Result([3.0])}
    assert bench_decode.better_of_kernels({cell: row})[cell][FLASHINFER].ms == 3.0


def test_findings_against_flashinfer():
    made = results()
    assert finding(made, "grid against FlashInfer, geometric mean, 40 cells").value == pytest.approx(2.0)
    assert finding(made, "16/1 against FlashInfer, geometric mean, 10 cells").value == pytest.approx(2.0)
    assert finding(made, "1 × 1k and 1 × 8k with GQA").met
    assert finding(made, "FP8 against FlashInfer's").value == pytest.approx(2.0)
    lowest = finding(made, "lowest; 0 cells lost")
    assert lowest.value == pytest.approx(2.0) and lowest.met


def test_a_tie_within_the_spread_is_a_tie():
    made, cell = results(), GRID[3][0]
    ms = min(made[cell][name].ms for name in (FLASHINFER, FLASHINFER_TC))
    set_ms(made, cell, 1.02 * ms)
    lost = finding(made, "lowest; 1 cells lost")
    assert not lost.met and lost.value == pytest.approx(1 / 1.02) and lost.cell == str(cell)
    set_ms(made, cell, 1.01 * ms, 1.02 * ms, 1.04 * ms)
    tie = finding(made, "lowest; 0 cells lost")
    assert tie.met and tie.value == pytest.approx(1 / 1.02)


def test_findings_against_the_plain_read():
    made = results()
    large = finding(made, "share of the stream")
    assert large.value == pytest.approx(0.8) and not large.met and "missed" in str(large)
    small = finding(made, "time over the floor")
    assert small.value == pytest.approx(1.25) and small.met and "at most 1.4" in str(small)
    for cell in CELLS:  # only cells of the grid of 1 GB and more, or up to 34 MB, have a part in it
        if cell.section != "grid" or 34e6 < cell.kv_bytes < 1e9:
            set_ms(made, cell, 1e6)
    assert finding(made, "share of the stream").value == pytest.approx(0.8)
    assert finding(made, "time over the floor").value == pytest.approx(1.25)


def test_findings_between_cells():
    made = results()
    set_ms(made, UNEVEN[0], 2.0)
    set_ms(made, UNEVEN[1], 1.8)
    assert finding(made, "uneven batch").value == pytest.approx(0.9) and not finding(made, "uneven batch").met
    for cell, ms in zip(BLOCKS, (1.2, 1.02, 1.01, 1.0), strict=True):
        set_ms(made, cell, ms)
    assert finding(made, "block size 1 ").value == pytest.approx(1 / 1.2) and finding(made, "block size 1 ").met
    assert finding(made, "block size 16").value == pytest.approx(1 / 1.02)
    for fp8, plain in FP8S:
        set_ms(made, fp8, 1.0)
        set_ms(made, plain, 1.9 if plain.batch == 64 else 1.1)
    assert finding(made, "FP8 against bfloat16").value == pytest.approx(1.9)
    for index, (appending, alone) in enumerate(APPENDS):
        set_ms(made, appending, 1.0 + 0.02 * index)
        set_ms(made, alone, 1.0)
    append = finding(made, "append and rotary")
    assert append.value == pytest.approx(1.04) and append.met and append.cell == str(APPENDS[2][0])
    set_ms(made, SHARED[0], 0.05)
    set_ms(made, SHARED[1], 2.0)
    assert finding(made, "shared prefix").value == pytest.approx(40)
    assert finding(made, "host time").met


def test_findings_of_what_was_measured_only():
    ours_alone = {GRID[0][0]: {OURS: Result([0.01]), STREAM: Result([0.008])}}
    assert [line.what for line in bench_decode.findings(ours_alone, {})] == ["time over the floor, cells up to 34 MB"]
    refused = {GRID[0][0]: {OURS: Result(refused="no"), STREAM: Result([0.008])}}
    assert bench_decode.findings(refused, {}) == []


# --- record, table, plot ---------------------------------------------------------------------------------------------


def test_record_is_json_and_says_how_it_was_measured():
    made = results()
    around = Measured(made, dict.fromkeys(made, {"blocks": 132}), dict.fromkeys(made), 3.0)
    record = json.loads(json.dumps(bench_decode.as_record(around, HOST, rounds=3), allow_nan=False))
    assert record["protocol"]["rounds"] == 3 and record["empty_launch_us"] == 3.0
    assert len(record["cells"]) == 60
    cell, first = GRID[0][0], record["cells"][0]
    assert (first["batch"], first["seqlen"], first["heads"], first["kv_heads"]) == (1, 1024, 32, 8)
    assert first["kv_bytes"] == cell.kv_bytes and first["stream_grid"] == {"blocks": 132}
    assert first["contenders"][OURS]["tb_per_s"] == pytest.approx(cell.kv_bytes / made[cell][OURS].ms * 1e3 / 1e12)
    assert first["contenders"]["fa4"] == {"refused": "NotImplementedError: no split-KV"}
    assert {FLASHINFER, FLASHINFER_TC, STREAM} < set(first["contenders"])
    assert list(record["summary"]) == [FLASHINFER]
    assert record["summary"][FLASHINFER]["cells"] == 40
    assert {line["met"] for line in record["targets"]} == {True, False}
    assert record["host"] == HOST


def test_record_of_host_times_alone_is_json():
    json.dumps(bench_decode.as_record(Measured(), HOST, rounds=3), allow_nan=False)


def test_table_has_slow_cells_first_and_marks_refusals():
    made = results()
    set_ms(made, GRID[7][0], 1e3)
    made[SHARED[0]][OURS] = Result(refused="ImportError: not there")
    text = printed(lambda console: bench_decode.show(made, [OURS, FLASHINFER, "fa4"], console, title="T"))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if " × " in line and "│" in line
    ]
    assert len(rows) == 60
    assert rows[0][0] == str(GRID[7][0])
    lost = next(row for row in rows if row[0] == str(SHARED[0]))
    assert lost[4] == "—"
    first = next(row for row in rows if row[0] == "1 × 1k 32/8")
    assert first[1] == "4.2" and first[3] == "80.0%" and first[-2:] == ["2.00", "—"]
    assert "against flashinfer: geometric mean" in text
    assert "refused by fa4: NotImplementedError: no split-KV" in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "decode.png"
    bench_decode.plot(results(), path, "X")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plan_is_what_is_measured_where_there_is_one(monkeypatch):
    cell = Cell("grid", 2, 40, **TINY)
    case = bench_decode.place(np, cell, Pool(np, "bfloat16", [cell]))

    class DecodePlan:
        def __init__(self, q, k_cache, v_cache, *, block_table, cache_seqlens):
            self.planned = q.shape, k_cache.shape

        def run(self, q, k_cache, v_cache, *, block_table, cache_seqlens, out):
            assert self.planned == (q.shape, k_cache.shape)
            return out

    import cupyattn

    monkeypatch.setattr(cupyattn, "DecodePlan", DecodePlan, raising=False)
    assert bench_decode._cupyattn(case)() is case.out
