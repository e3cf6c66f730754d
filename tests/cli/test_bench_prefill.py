"""`cupyattn bench prefill`: its cells and their FLOPs, the arithmetic of ratios and the record.

`measure` runs here with NumPy in CuPy's place, so that its checks of results are real, and with times that are made up.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from typer import BadParameter
from typer.testing import CliRunner

from cupyattn.cli import app, bench_common, bench_prefill
from cupyattn.cli.bench_common import OURS, Result, Results, summary, wrong_cells
from cupyattn.cli.bench_prefill import (
    CONTENDERS,
    FLASHINFER,
    FLASHINFER_FA2,
    GRID,
    QUICK_SECTIONS,
    SECTIONS,
    Cell,
    Measured,
    Numbers,
    grid_cell,
)

CELLS = [cell for groups in SECTIONS.values() for group in groups for cell in group]
UNEVEN = SECTIONS["varlen"][1][0]
PAGED = SECTIONS["paged"][2]  # 4 × 1k × 16k 32/8


def results() -> Results:
    """Three cells: in the second, fa2 is twice as fast; in the third, it refuses."""
    cells = [grid_cell(64, False, 512), grid_cell(128, True, 1024), grid_cell(256, False, 2048)]
    ours = {OURS: Result([2.0, 2.0, 2.2])}
    return {
        cells[0]: ours | {"fa2": Result([4.0, 3.9, 4.2])},
        cells[1]: ours | {"fa2": Result([1.0])},
        cells[2]: ours | {"fa2": Result(refused="RuntimeError: no")},
    }


def other_results() -> Results:
    """Packed sequences at 0.8 of the speed of dense ones; a paged cache, the slower the smaller its blocks."""
    made: Results = {UNEVEN: {OURS: Result([UNEVEN.flops / 0.8]), "fa4": Result([UNEVEN.flops])}}
    made[UNEVEN.dense] = {OURS: Result([UNEVEN.dense.flops])}
    for cell in PAGED:
        made[cell] = {OURS: Result([2.0 + 1.0 / max(cell.block_size, 1) if cell.block_size else 2.0])}
        if cell.beside_peers:
            made[cell] |= {FLASHINFER: Result([4.0]), FLASHINFER_FA2: Result(refused="RuntimeError: no")}
    return made


def printed(function, *arguments, **options) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        function(*arguments, console, **options)
    return capture.get()


# --- cells -----------------------------------------------------------------------------------------------------------


def test_grid():
    assert len(GRID) == len(set(GRID)) == 36
    assert {cell.head_dim for cell in GRID} == {64, 128, 256}
    assert {cell.seqlen for cell in GRID} == {512, 1024, 2048, 4096, 8192, 16384}
    for cell in GRID:
        batch, seqlen, heads, head_dim = cell.q_shape
        assert cell.k_shape == cell.q_shape
        assert batch * seqlen == 16384 and heads * head_dim == 2048
    assert set(bench_prefill.QUICK) < set(GRID) and len(bench_prefill.QUICK) == 6


def test_sections():
    assert [cell.seqlen for (cell,) in SECTIONS["gqa"]] == [4096, 16384, 65536]
    assert [len(group) for group in SECTIONS["varlen"]] == [2, 2]
    assert {cell.causal for group in SECTIONS["varlen"] for cell in group} == {False, True}
    assert len(SECTIONS["paged"]) == 10
    for group in SECTIONS["paged"]:
        assert [cell.block_size for cell in group] == [1, 16, 64, 128, 0]
        assert len({replace(cell, block_size=0) for cell in group}) == 1
    for name, groups in QUICK_SECTIONS.items():
        assert set(groups) < set(SECTIONS[name])


def test_names_are_told_apart_within_a_section():
    for groups in SECTIONS.values():
        cells = [cell for group in groups for cell in group]
        assert len({str(cell) for cell in cells}) == len(cells)


def test_flops():
    assert grid_cell(128, False, 16384).flops == 4 * 1 * 16 * 16384**2 * 128
    assert grid_cell(128, True, 16384).flops == grid_cell(128, False, 16384).flops / 2


@pytest.mark.parametrize("cell", [SECTIONS["gqa"][0][0], UNEVEN, PAGED[1], SECTIONS["paged"][4][0]], ids=str)
def test_flops_are_those_of_the_pairs_that_are_seen(cell):
    queries, keys = cell.lengths(), cell.lengths() if cell.uneven else np.full(cell.batch, cell.seqlen_k)
    seen = sum(int(np.arange(m - n + 1, m + 1).sum()) for n, m in zip(queries, keys, strict=True))
    assert cell.causal
    assert cell.flops == pytest.approx(4 * cell.heads * cell.head_dim * seen, rel=1e-2)


def test_uneven_lengths():
    lengths = UNEVEN.lengths()
    assert len(lengths) == 64 and lengths.sum() == 64 * 2048 and lengths.min() >= 1
    assert np.array_equal(lengths, UNEVEN.lengths())
    assert 0.7 < np.log(lengths).std() < 1.3
    assert UNEVEN.q_shape == UNEVEN.k_shape == (64 * 2048, 16, 128)
    assert UNEVEN.starts()[-1] == 64 * 2048 and np.array_equal(np.diff(UNEVEN.starts()), lengths)


def test_dense_cells_have_the_flops_of_what_is_compared_with_them():
    assert UNEVEN.dense.seqlen % 8 == 0 and UNEVEN.dense.batch == 64
    assert UNEVEN.dense.flops == pytest.approx(UNEVEN.flops, rel=5e-3)
    for cell in CELLS:
        assert cell.form == "dense" or cell.dense in CELLS
        assert cell.flops == pytest.approx(cell.dense.flops, rel=5e-3)


def test_sections_of():
    assert bench_prefill.sections_of("all") == list(SECTIONS)
    assert bench_prefill.sections_of(" paged,grid") == ["grid", "paged"]
    with pytest.raises(BadParameter, match="got 'fp8', expected all or some of grid, gqa, varlen, paged"):
        bench_prefill.sections_of("grid,fp8")


def test_cells_are_of_prefill():
    result = CliRunner().invoke(app, ["bench", "decode", "--cells", "gqa"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 2
    assert "got it with decode, expected it with prefill alone" in result.output


# --- contenders ------------------------------------------------------------------------------------------------------


def test_kernels_are_timed_where_they_have_the_form():
    names = list(CONTENDERS)

    def kernels(cell: Cell) -> list[str]:
        return list(bench_prefill.kernels_for(cell, names))

    everyone = [OURS, "fa2", "cudnn", "fa4", FLASHINFER]
    assert all(kernels(cell) == everyone for cell in CELLS if cell.section in ("grid", "gqa"))
    assert kernels(UNEVEN) == [OURS, "fa4", FLASHINFER]
    assert kernels(UNEVEN.dense) == [OURS]
    assert [kernels(cell) for cell in PAGED] == [[OURS, FLASHINFER, FLASHINFER_FA2]] * 3 + [[OURS]] * 2
    assert bench_prefill.kernels_of("paged", [OURS, "fa4", FLASHINFER]) == [OURS, FLASHINFER, FLASHINFER_FA2]
    assert not bench_prefill.kernels_for(PAGED[-1], ["fa4"])


def test_flashinfer_is_asked_only_where_it_does_not_compile():
    assert bench_prefill.unasked({}) == bench_prefill.unasked({"FLASHINFER_DISABLE_JIT": ""}) == (FLASHINFER,)
    assert bench_prefill.unasked({"FLASHINFER_DISABLE_JIT": "1"}) == ()


# --- measuring -------------------------------------------------------------------------------------------------------

SIZES = dict(head_dim=32, heads=4, kv_heads=2, batch=3)
GROUPS = [
    (Cell("gqa", causal=True, seqlen=40, seqlen_k=40, **SIZES),),
    (Cell("varlen", causal=False, seqlen=24, seqlen_k=24, uneven=True, **SIZES),),
    (Cell("varlen", causal=True, seqlen=24, seqlen_k=24, uneven=True, **SIZES),),
    tuple(Cell("paged", causal=True, seqlen=20, seqlen_k=48, block_size=size, **SIZES) for size in (1, 16, 0)),
]


@pytest.fixture
def stand_in(monkeypatch):
    """Numbers of a small period, made-up times, no clocks, and one peer that refuses."""

    def refuse(case):
        raise RuntimeError("no")

    monkeypatch.setattr(Numbers, "PERIOD", 1009)
    monkeypatch.setattr(bench_prefill, "EventTimer", lambda cupy: lambda call: 2.0)
    monkeypatch.setattr(bench_prefill, "clocks_under_load", lambda cupy, call, ms: {"sm_mhz": 1700, "power_w": 690.0})
    forms = ("dense", "packed", "paged")
    contenders = {OURS: CONTENDERS[OURS], "no": ("cupyattn", {"no": dict.fromkeys(forms, refuse)})}
    monkeypatch.setattr(bench_prefill, "CONTENDERS", contenders)
    return contenders


def test_measure(stand_in):
    measured = bench_prefill.measure(np, GROUPS, [OURS, "no"], rounds=2)
    assert list(measured.results) == [cell for group in GROUPS for cell in group]
    for cell, row in measured.results.items():
        assert row[OURS].rounds == [2.0, 2.0], row[OURS].refused
        assert 0 < row[OURS].error <= 1
        assert ("no" in row) == cell.beside_peers
        assert "no" not in row or row["no"].refused == "RuntimeError: no"
    assert not wrong_cells(measured.results)
    record = json.loads(json.dumps(bench_prefill.as_record(measured, {}, 2)))
    assert record["cells"] == [] and {"gqa", "varlen", "paged"} < set(record)
    assert record["gqa"]["cells"][0]["clocks"]["sm_mhz"] == 1700


def test_measure_without_cells():
    assert bench_prefill.measure(None, [], [OURS], rounds=1) == Measured()


def test_times_are_taken_of_plain_queries_and_checks_of_larger_ones(stand_in):
    seen = []

    def spy(case):
        seen.append(case)
        return lambda: seen.append(case.q.astype(np.float32)) or bench_prefill._attention(case)()

    stand_in[OURS] = ("cupyattn", {OURS: {"dense": spy}})
    bench_prefill.measure(np, GROUPS[:1], [OURS], rounds=1)
    case, checked = seen
    assert checked.std() / case.q.astype(np.float32).std() == pytest.approx(bench_prefill.CHECK_SCALE, rel=0.02)


def unmasked(case):
    call = bench_prefill.CONTENDERS["right"][1]["right"][case.cell.form]
    return call(replace(case, cell=replace(case.cell, causal=not case.cell.causal)))


def swapped(case):
    """The next sequence's keys."""
    call = bench_prefill.CONTENDERS["right"][1]["right"][case.cell.form]
    if case.cell.form == "paged":
        return call(replace(case, block_table=np.roll(case.block_table, 1, axis=0)))
    k, v = (np.roll(x, 1, axis=0) for x in (case.k, case.v))
    return call(replace(case, k=k, v=v))


@pytest.mark.parametrize("wrong", [unmasked, swapped])
@pytest.mark.parametrize("cell", [group[0] for group in GROUPS], ids=lambda cell: f"{cell.section}-{cell.causal}")
def test_wrong_results_are_seen(stand_in, cell, wrong):
    stand_in["right"] = ("cupyattn", {"right": stand_in[OURS][1][OURS]})
    stand_in[OURS] = ("cupyattn", {OURS: {cell.form: wrong}})
    measured = bench_prefill.measure(np, [(cell,)], [OURS], rounds=1)
    assert wrong_cells(measured.results) == [str(cell)]


def test_paged_cases_hold_every_block_once(stand_in):
    cell = GROUPS[3][1]
    case = bench_prefill.place(np, cell, Numbers(np, [cell]))
    assert sorted(case.block_table.flat) == list(range(cell.k_shape[0]))
    assert not np.array_equal(case.block_table.flat, np.sort(case.block_table.flat))
    rows = bench_prefill.rows_of(case, case.k, 1, 1, 40)
    assert rows.shape == (1, 40, 1, 32) and rows.dtype == ml_dtypes.bfloat16
    assert np.array_equal(rows[0, 16:32, 0], case.k[case.block_table[1, 1], :, 1])


def test_groups_that_do_not_fit_are_left_out():
    groups = [group for groups in SECTIONS.values() for group in groups]
    room = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(memGetInfo=lambda: (2 << 30, 2 << 30))))
    console = Console(width=2000)
    with console.capture() as capture:
        fitting = bench_prefill.that_fit(room, groups, console)
    assert set(SECTIONS["grid"]) < set(fitting) < set(groups)
    assert str(UNEVEN) in capture.get() and "hd 64" not in capture.get()


def test_clocks_are_read_while_the_device_works(monkeypatch):
    calls, read, waited = [], [], []

    class Event:
        def record(self):
            self.at = len(calls)

        def synchronize(self):
            waited.append(self.at)

    cuda = SimpleNamespace(Event=Event, Device=lambda: SimpleNamespace(synchronize=lambda: waited.append("all")))
    monkeypatch.setattr(bench_common, "clocks", lambda cupy: read.append(len(calls)) or {"sm_mhz": 1500})
    sample = bench_common.clocks_under_load(SimpleNamespace(cuda=cuda), lambda: calls.append(0), 10.0, seconds=0.01)
    assert sample == {"sm_mhz": 1500}
    assert read == [0, len(calls)] and len(calls) % 5 == 0
    *_, last, everything = waited
    assert everything == "all" and last == len(calls) - 5
    monkeypatch.setattr(bench_common, "clocks", lambda cupy: None)
    assert bench_common.clocks_under_load(SimpleNamespace(), calls.append, 10.0) is None


# --- reporting -------------------------------------------------------------------------------------------------------


def test_summary():
    line = summary(results())["fa2"]
    assert line["geometric_mean"] == pytest.approx(math.sqrt(2.0 * 0.5))
    assert line["minimum"] == 0.5
    assert line["minimum_cell"] == "hd 128 causal 1024"
    assert line["cells"] == 2


def test_record_is_json_and_says_how_it_was_measured():
    host = {"cupy": {"median_us": 20.0, "p90_us": 22.0}}
    record = json.loads(json.dumps(bench_prefill.as_record(Measured(results()), host, rounds=3)))
    assert record["protocol"]["rounds"] == 3
    assert not {"gqa", "varlen", "paged"} & set(record)
    assert record["summary"]["fa2"]["cells"] == 2
    first, _, third = (cell["contenders"] for cell in record["cells"])
    assert first[OURS]["tflops"] == pytest.approx(grid_cell(64, False, 512).flops / 2.0e-3 / 1e12)
    assert first[OURS]["spread"] == pytest.approx(0.1)
    assert third["fa2"] == {"refused": "RuntimeError: no"}
    assert record["host"]["cupy"] == host["cupy"]
    keys = {"head_dim", "causal", "seqlen", "batch", "heads", "contenders"}  # what notebooks and the README read
    assert all(keys < set(cell) for cell in record["cells"])


def test_record_has_other_sections_beside_the_grid():
    measured = Measured(results() | other_results(), {PAGED[0]: {"sm_mhz": 1700}})
    record = json.loads(json.dumps(bench_prefill.as_record(measured, {}, rounds=1)))
    assert len(record["cells"]) == 3 and "gqa" not in record
    uneven, even = record["varlen"]["cells"]
    assert uneven["of_dense"] == pytest.approx(0.8) and "of_dense" not in even
    assert sum(uneven["lengths"]) == 64 * 2048 and "lengths" not in even
    assert [cell.get("of_dense") for cell in record["paged"]["cells"]] == [
        pytest.approx(2 / 3),
        pytest.approx(2 / (2 + 1 / 16)),
        pytest.approx(2 / (2 + 1 / 64)),
        pytest.approx(2 / (2 + 1 / 128)),
        None,
    ]
    assert record["paged"]["summary"][FLASHINFER]["minimum_cell"] == "4 × 1k × 16k 32/8, block size 1"
    assert FLASHINFER_FA2 not in record["paged"]["summary"]
    assert record["paged"]["cells"][0]["clocks"] == {"sm_mhz": 1700}


def test_shares_need_both_cells():
    made = other_results()
    del made[UNEVEN.dense]
    made[PAGED[-1]] = {OURS: Result(refused="RuntimeError: no")}
    assert bench_prefill.shares_of_dense(made) == {}


def test_table_has_slow_cells_first_and_marks_refusals():
    text = printed(lambda console: bench_prefill.show(results(), [OURS, "fa2"], console, title="T"))
    rows = [line for line in text.splitlines() if " hd " in line and "─" not in line]
    assert ["hd 128 causal 1024", "hd 64 full 512", "hd 256 full 2048"] == [
        row.split("│")[1].strip() for row in rows[:3]
    ]
    assert "—" in rows[2] and "of dense" not in text
    assert "geometric mean 1.000, lowest 0.500" in text
    assert "refused by fa2: RuntimeError: no" in text


def test_table_shows_the_share_of_dense_speed():
    text = printed(lambda console: bench_prefill.show(other_results(), [OURS, FLASHINFER], console, title="T"))
    assert "of dense" in text
    (row,) = (line for line in text.splitlines() if "block size 16 " in line and "│" in line)
    assert [word.strip() for word in row.split("│")[1:3]] == ["4 × 1k × 16k 32/8, block size 16", "0.970"]


def test_load_is_shown_in_one_line():
    samples = [{"sm_mhz": 1755, "power_w": 640.2}, None, {"sm_mhz": 1410, "power_w": 699.7}]
    assert (
        printed(lambda console: bench_prefill.show_load(samples, console))
        == "under load: 1410 to 1755 MHz, up to 700 W\n"
    )
    assert printed(lambda console: bench_prefill.show_load([None], console)) == ""


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "grid.png"
    bench_prefill.plot(results(), path, "X")
    assert path.read_bytes().startswith(b"\x89PNG")
