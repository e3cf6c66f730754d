"""`cupyattn bench compat`: the calls that it times, what counts as wrong, and what is made of the times.

The calls run here with NumPy in CuPy's place, and where PyTorch is installed on its tensors; only the clock is stood in
for. No test looks at how fast anything is.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from cupyattn.cli import bench_compat
from cupyattn.cli.bench_compat import OURS, Row, Side

FRONT_DOORS = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "incremental.flash_attention",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "flash_attn_with_kvcache, append",
    "flash_attn_with_kvcache, with its lse",
]
OF_A_WRAPPER = ["run", "run, with its lse", "plan", "plan, index arrays on the host", "plan and run"]
WRAPPERS = [f"{kind} wrapper.{what}" for kind in ("decode", "prefill") for what in OF_A_WRAPPER]


def of_torch():
    torch = pytest.importorskip("torch")

    def put(host):
        tensor = torch.from_numpy(host.view(np.int16) if host.dtype == bench_compat.DTYPE else host)
        return tensor.view(torch.bfloat16) if host.dtype == bench_compat.DTYPE else tensor

    return Side("torch", put)


@pytest.fixture(params=["numpy", "torch"])
def side(request, monkeypatch):
    for name, value in {"SEQLEN": 48, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 16}.items():
        monkeypatch.setattr(bench_compat, name, value)
    return Side("numpy", lambda host: host) if request.param == "numpy" else of_torch()


@pytest.fixture
def clock(monkeypatch):
    """Every call is made, and takes 3 µs, or what was set."""
    times = {}

    def host_time(xp, call, calls):
        call()
        us = next((us for what, us in times.items() if what is call), 3.0)
        return {"median_us": us, "p90_us": us + 1}

    monkeypatch.setattr(bench_compat, "host_time", host_time)
    return times


def test_all_calls_and_their_results(side):
    rows = bench_compat.rows_of(side, with_peer=False)
    assert [row.what for row in rows] == FRONT_DOORS + WRAPPERS
    assert {row.library for row in rows} == {side.library}
    for row in rows:
        assert not bench_compat.differs(row), row
        row.call()
    beside = [row.what for row in rows if row.native is not None]
    assert beside == [*FRONT_DOORS, "decode wrapper.run", "prefill wrapper.run"]


def test_a_wrong_result_is_seen(side):
    row = next(row for row in bench_compat.rows_of(side, with_peer=False) if row.what == "decode wrapper.run")
    right = row.call
    row.call = lambda: right() + 1
    assert bench_compat.differs(row)
    row.call = lambda: right()[:1]
    assert bench_compat.differs(row)


def test_a_peer_is_called_with_the_same_arrays(side, monkeypatch):
    """With this library's own module in FlashInfer's place."""
    monkeypatch.setattr(bench_compat.importlib, "import_module", lambda name: bench_compat.flashinfer)
    rows = bench_compat.rows_of(side, with_peer=True)
    beside = [row.what for row in rows if row.peer is not None]
    without = [what for what in WRAPPERS if not what.endswith("host")]
    assert beside == (without if side.library == "torch" else [])
    for row in rows:
        if row.peer is not None:
            row.peer()
            assert not row.refused


def test_a_peer_that_refuses_is_named(monkeypatch, clock):
    def refuse(*given, **options):
        raise RuntimeError("not compiled\nmore")

    theirs = SimpleNamespace(**{
        name: lambda workspace: SimpleNamespace(plan=refuse, run=refuse)
        for name in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")
    })  # fmt: skip
    monkeypatch.setattr(bench_compat.importlib, "import_module", lambda name: theirs)
    rows = bench_compat.rows_of(of_torch(), with_peer=True)
    assert {row.refused for row in rows if "wrapper" in row.what} == {"RuntimeError: not compiled"}
    assert all(row.peer is None for row in rows)


def made(what, at_most=None, over=False, **times):
    return Row(what, "cupy", print, at_most_us=at_most, over_native=over, times=times)


def test_findings():
    rows = [
        made("a", 5.0, True, call=[9.0, 10.0, 11.0], native=[8.0, 7.0, 9.0]),
        made("b", 5.0, True, call=[20.0], native=[14.0]),
        made("run", 12.0, call=[12.0]),
        made("plan", 40.0, call=[41.0]),
        made("no target", call=[99.0]),
    ]
    found = bench_compat.findings(rows)
    assert [(one.value, one.target, one.met) for one in found] == [
        (6.0, 5.0, False),
        (12.0, 12.0, True),
        (41.0, 40.0, False),
    ]
    assert found[0].cell == "b" and "missed" in str(found[0]) and "missed" not in str(found[1])
    assert rows[0].over == 2.0 and rows[2].over is None


@pytest.mark.parametrize("quick", [False, True])
def test_a_run(monkeypatch, clock, side, quick):
    monkeypatch.setattr(bench_compat, "sides", lambda cupy: [side])
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        report = bench_compat.run(np, "X", OURS, 2, quick, True, console)
    assert not report.wrong and json.dumps(report.record)
    rows = report.record["rows"]
    assert [row["what"] for row in rows] == FRONT_DOORS + WRAPPERS
    spells = 2 * bench_compat.SPELLS
    assert all(row["spells_us"]["call"] == [3.0] * spells for row in rows)
    assert all(row["us"] == 3.0 and row["p90_us"] == 4.0 for row in rows)
    assert rows[0]["over_native_us"] == 0.0 and rows[-1]["native_us"] is None
    assert len(report.record["targets"]) == 1 + 2 * 3 and all(target["met"] for target in report.record["targets"])
    assert "Host time of a call in µs, X" in capture.get() and "decode wrapper.plan" in capture.get()


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [made("a", 5.0, True, call=[9.0], native=[8.0]), made("plan", 40.0, call=[41.0], peer=[400.0])]
    bench_compat.plot(rows, tmp_path / "compat.png", "X")
    assert (tmp_path / "compat.png").stat().st_size


def test_a_wrong_row_is_reported(monkeypatch, clock):
    row = Row("run", "cupy", lambda: np.zeros(3), lambda: np.ones(3))
    monkeypatch.setattr(bench_compat, "sides", lambda cupy: ["one"])
    monkeypatch.setattr(bench_compat, "rows_of", lambda side, with_peer: [row])
    with Console().capture():
        report = bench_compat.run(np, "X", OURS, 1, True, False, Console(quiet=True))
    assert report.wrong == ["run on cupy arrays"]


@pytest.mark.gpu
def test_a_short_run_on_a_gpu():
    import cupy

    report = bench_compat.run(cupy, "X", "auto", 1, True, True, Console(quiet=True))
    assert not report.wrong and report.record["rows"]


def test_spells_at_a_lower_clock_are_left_out():
    """Both of a pair are taken from the spells in which the native call tells of a full clock."""
    times = {"call": [12.0, 19.0, 13.0, 40.0], "native": [10.0, 16.0, 11.0, 16.5], "peer": [20.0, 33.0, 22.0, 34.0]}
    row = bench_compat.Row("a", "x", call=None, times=times)
    assert (row.us(), row.us("native"), row.us("peer"), row.over) == (12.5, 10.5, 21.0, 2.0)
    assert row.as_record()["spells_at_full_clock"] == 2
