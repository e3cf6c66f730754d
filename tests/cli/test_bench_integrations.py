"""`cupyattn bench integrations`: what it makes of times, what counts as wrong, and its record; on a GPU a short run.

JAX's calls run here on the CPU, so that what is timed is what is checked; no test looks at how fast anything is.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import cupyattn
from cupyattn.cli import app, bench_integrations
from cupyattn.cli.bench_integrations import Measured, Step, as_record, idle_share


def printed(function, *arguments) -> str:
    console = Console(width=220, no_color=True)
    with console.capture() as capture:
        function(*arguments, console)
    return capture.get()


def full() -> Measured:
    measured = Measured({"native": {"median_us": 20.0, "p90_us": 22.0}, "entry": {"median_us": 30.0, "p90_us": 31.0}})
    measured.jax_prefill = {"flops": 10**12, "cudnn": {"ms": 2.0, "tflops": 500.0}, "cupyattn": {"refused": "no"}}
    measured.graph = {"layers": 32, "batch": 8, "seqlen": 8192, "replay_us": 2000.0, "busy_us": 1990.0, "tb_per_s": 4.3}
    measured.add("added, µs", 10.0, 15.0, at_most=True)
    measured.add("ratio", 0.9, 1.0, at_most=False)
    return measured


@pytest.mark.parametrize(
    "ranges, share",
    [
        ([(0, 10)], 0.0),
        ([(0, 10), (12, 20)], 0.1),
        ([(12, 20), (0, 10)], 0.1),
        ([(0, 10), (2, 5), (10, 20)], 0.0),
        ([(5, 10), (5, 20), (30, 30), (25, 40)], 5 / 35),
    ],
)
def test_idle_is_what_no_kernel_covers(ranges, share):
    assert math.isclose(idle_share(ranges), share)


def test_idle_of_nothing_meets_no_target():
    measured = Measured()
    for ranges in ([], [(3, 3)]):
        measured.add("idle", idle_share(ranges), 0.02, at_most=True)
    assert not any(finding.met for finding in measured.findings)


def test_time_is_that_of_one_call(monkeypatch):
    looks = iter(range(10**6))
    monkeypatch.setattr(bench_integrations.time, "perf_counter_ns", lambda: next(looks) * 600_000)
    made, waited = [], []
    found = bench_integrations.time_of_calls(lambda: made.append(0) or len(made), waited.append, batches=3, calls=4)
    assert found == {"median_us": 150.0, "p90_us": 150.0}
    assert len(made) == 5 * 5 and waited == [1 + 5 * (i // 2) + 4 * (i % 2) for i in range(10)]


def test_findings_say_which_targets_are_missed():
    text = printed(bench_integrations.show, full(), "X")
    assert "host time of entry: 30.0 µs (90th percentile 31.0)" in text
    assert "added, µs: 10.000, target at most 15" in text and "ratio: 0.900, target at least 1, missed" in text
    assert "causal prefill by cudnn: 2.000 ms, 500 TFLOP/s" in text and "by cupyattn" not in text
    assert "a step of 32 layers, 8 × 8192: 2000 µs a replay, kernels 1990 µs of it, 4.30 TB/s" in text


def test_the_record_is_json():
    record = json.loads(json.dumps(as_record(full())))
    assert record["host"]["entry"]["median_us"] == 30.0
    assert [finding["met"] for finding in record["findings"]] == [True, False] and record["wrong"] == []


@pytest.mark.parametrize("error, wrong", [(0.5, []), (1.5, ["it"]), (math.nan, ["it"])])
def test_what_counts_as_wrong(error, wrong):
    measured = Measured()
    measured.check("it", error)
    assert measured.wrong == wrong


def test_bytes_of_a_step():
    assert Step().cache_bytes == 2 * 8 * 8192 * 8 * 128 * 2


def test_jax_calls_are_timed_beside_empty_ones(monkeypatch):
    pytest.importorskip("jax")
    timed = []

    def time_of(call, wait, batches):
        """At a clock that falls by half after some spells."""
        timed.append(wait(call()).shape)
        slower = 1 + (len(timed) > bench_integrations.SPELLS)
        return {"median_us": slower * 40.0 + (0.0 if len(timed) % 2 else 5.0), "p90_us": 60.0 + len(timed)}

    monkeypatch.setattr(bench_integrations, "time_of_calls", time_of)
    measured = Measured()
    bench_integrations.time_jax_calls(measured)
    spells = 2 * bench_integrations.SPELLS
    assert timed == [(1, 128, 8, 64)] * spells + [(8, 1, 8, 64)] * spells
    found = measured.host_us["an empty callback of attention's form"]
    assert found["median_us"] == 40.0 and found["p90_us"] == 60.0 + spells - 1
    assert len(found["spells_us"]) == found["spells"] and max(found["spells_us"]) == 80.0
    assert (found["spells"], found["spells_at_full_clock"]) == (spells // 2, spells // 4)
    assert [finding.value for finding in measured.findings] == [5.0, 5.0]


def test_prefill_in_jax_without_cudnn(monkeypatch):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "cpu":
        pytest.skip("cuDNN may be there")
    brief = bench_integrations.time_of_calls
    monkeypatch.setattr(bench_integrations, "time_of_calls", lambda call, wait, batches, calls: brief(call, wait, 1, 1))
    measured = Measured()
    text = printed(bench_integrations.time_jax_prefill, measured, 2, (2, 96, 2, 32))
    assert "refused by cudnn in JAX" in text
    assert measured.jax_prefill["cupyattn"]["ms"] > 0 and len(measured.jax_prefill["cupyattn"]["rounds_ms"]) == 2
    assert measured.wrong == [] and measured.findings == []


def test_a_wrong_prefill_is_seen(rng):
    q, k, v = (rng.standard_normal((2, 96, 2, 32)).astype(np.float16) for _ in range(3))
    out = cupyattn.attention(q, k, v, causal=True)
    assert bench_integrations._prefill_error(out, q, k, v) <= 1
    assert bench_integrations._prefill_error(cupyattn.attention(q, k, v), q, k, v) > 1


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    bench_integrations.plot(full(), tmp_path / "times.png", "X")
    assert (tmp_path / "times.png").stat().st_size > 1000


def test_what_cannot_be_imported_is_left_out(monkeypatch):
    import sys

    for name in ("torch", "jax"):
        monkeypatch.setitem(sys.modules, name, None)
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        report = bench_integrations.run(object(), "X", "auto", 1, True, False, console)
    assert "torch is left out" in capture.get() and "jax is left out" in capture.get()
    assert report.record["findings"] == [] and report.wrong == []


@pytest.mark.gpu
def test_a_short_run(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "integrations.json"
    result = CliRunner().invoke(app, ["bench", "integrations", "--quick", "--rounds", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert record["graph"]["kernels"] >= 4 and 0 <= record["graph"]["idle_share"] < 1
    assert record["host"]["integrations.torch.attention"]["median_us"] > 0
