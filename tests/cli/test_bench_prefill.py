"""`cupyattn bench prefill`: the grid, the arithmetic of ratios and the record."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from cupyattn.cli import bench_prefill
from cupyattn.cli.bench_common import OURS, Result, Results, summary
from cupyattn.cli.bench_prefill import GRID, Cell


def results() -> Results:
    """Three cells: in the second, fa2 is twice as fast; in the third, it refuses."""
    cells = [Cell(64, False, 512), Cell(128, True, 1024), Cell(256, False, 2048)]
    ours = {OURS: Result([2.0, 2.0, 2.2])}
    return {
        cells[0]: ours | {"fa2": Result([4.0, 3.9, 4.2])},
        cells[1]: ours | {"fa2": Result([1.0])},
        cells[2]: ours | {"fa2": Result(refused="RuntimeError: no")},
    }


def printed(function, *arguments, **options) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        function(*arguments, console, **options)
    return capture.get()


def test_grid():
    assert len(GRID) == len(set(GRID)) == 36
    assert {cell.head_dim for cell in GRID} == {64, 128, 256}
    assert {cell.seqlen for cell in GRID} == {512, 1024, 2048, 4096, 8192, 16384}
    for cell in GRID:
        batch, seqlen, heads, head_dim = cell.shape
        assert batch * seqlen == 16384 and heads * head_dim == 2048
    assert set(bench_prefill.QUICK) < set(GRID) and len(bench_prefill.QUICK) == 6


def test_flops():
    assert Cell(128, False, 16384).flops == 4 * 1 * 16 * 16384**2 * 128
    assert Cell(128, True, 16384).flops == Cell(128, False, 16384).flops / 2


def test_summary():
    line = summary(results())["fa2"]
    assert line["geometric_mean"] == pytest.approx(math.sqrt(2.0 * 0.5))
    assert line["minimum"] == 0.5
    assert line["minimum_cell"] == "hd 128 causal 1024"
    assert line["cells"] == 2


def test_record_is_json_and_says_how_it_was_measured():
    host = {"cupy": {"median_us": 20.0, "p90_us": 22.0}}
    record = json.loads(json.dumps(bench_prefill.as_record(results(), host, rounds=3)))
    assert record["protocol"]["rounds"] == 3
    first, _, third = (cell["contenders"] for cell in record["cells"])
    assert first[OURS]["tflops"] == pytest.approx(Cell(64, False, 512).flops / 2.0e-3 / 1e12)
    assert first[OURS]["spread"] == pytest.approx(0.1)
    assert third["fa2"] == {"refused": "RuntimeError: no"}
    assert record["host"]["cupy"] == host["cupy"]


def test_table_has_slow_cells_first_and_marks_refusals():
    text = printed(lambda console: bench_prefill.show(results(), [OURS, "fa2"], console, title="T"))
    rows = [line for line in text.splitlines() if " hd " in line and "─" not in line]
    assert ["hd 128 causal 1024", "hd 64 full 512", "hd 256 full 2048"] == [
        row.split("│")[1].strip() for row in rows[:3]
    ]
    assert "—" in rows[2]
    assert "geometric mean 1.000, lowest 0.500" in text
    assert "refused by fa2: RuntimeError: no" in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "grid.png"
    bench_prefill.plot(results(), path, "X")
    assert path.read_bytes().startswith(b"\x89PNG")
