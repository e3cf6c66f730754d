"""`cupyattn bench`: what it refuses, its contenders and its help; on a GPU, short runs of the real thing."""

from __future__ import annotations

import json
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cupyattn.cli import app, bench, bench_cache, bench_common, bench_decode, bench_prefill
from cupyattn.cli.bench_common import OURS, Result
from cupyattn.cli.device import NO_GPU

MODULES = {OURS: "cupyattn", "missing": "no_such_module_anywhere", "slow": "json"}


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "250", "NO_COLOR": "1"})


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(bench, "why_no_gpu", lambda: NO_GPU)


@pytest.mark.parametrize("kind", [(), ("prefill",), ("decode",), ("cache",)])
def test_without_a_gpu_it_says_so(no_gpu, kind):
    result = invoke(*kind, "--quick")
    assert result.exit_code == 2
    assert f"bench needs an NVIDIA GPU; {NO_GPU}. There is nothing to mend." in result.output
    assert "cupyattn explain --arch 90" in result.output and "doctor" not in result.output


def test_with_a_gpu_that_does_not_work_it_names_the_doctor(monkeypatch):
    monkeypatch.setattr(bench, "why_no_gpu", lambda: "CuPy finds no CUDA device")
    result = invoke("--quick")
    assert result.exit_code == 2
    assert "CuPy finds no CUDA device. `cupyattn doctor` says what to do." in result.output


def test_unknown_kind(no_gpu):
    result = invoke("backward")
    assert result.exit_code == 2
    assert "'prefill', 'decode', 'cache'" in result.output


def test_tiles_are_of_prefill(no_gpu):
    result = invoke("decode", "--tiles", "never_written.json")
    assert result.exit_code == 2
    assert "got it with decode, expected it with prefill alone" in result.output


def test_the_size_of_a_snapshot_is_of_cache(no_gpu):
    result = invoke("decode", "--cache-gb", "1")
    assert result.exit_code == 2
    assert "got it with decode, expected it with cache alone" in result.output


@pytest.mark.parametrize(("record", "drawn"), [({"cells": []}, False), ({"cells": [1]}, True), ({"rows": [1]}, True)])
def test_each_kind_is_run_with_its_options_and_drawn_if_there_is_something(monkeypatch, tmp_path, record, drawn):
    given, plots = {}, []

    def run(cupy, gpu, contenders, rounds, quick, host, console, cache_gb=None):
        given.update(gpu=gpu, rounds=rounds, quick=quick, host=host, cache_gb=cache_gb)
        return bench_common.Report(record, [], lambda path, gpu: plots.append(path))

    monkeypatch.setitem(sys.modules, "cupy", object())
    monkeypatch.setattr(bench, "why_no_gpu", lambda: None)
    monkeypatch.setattr(bench, "describe_machine", lambda cupy: {"gpu": "X"})
    monkeypatch.setattr(bench, "new_figure", lambda: None)
    monkeypatch.setattr(bench_cache, "run", run)
    path = tmp_path / "cache.png"
    result = invoke("cache", "--cache-gb", "2.5", "--rounds", 2, "--plot", path)
    assert result.exit_code == 0, result.output
    assert given == {"gpu": "X", "rounds": 2, "quick": False, "host": False, "cache_gb": 2.5}
    assert plots == [path] * drawn


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(no_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("decode", "--plot", "never_written.png")
    assert result.exit_code == 2
    assert "got no matplotlib" in result.output


def test_help_names_the_kinds_and_their_contenders():
    words = " ".join(invoke("--help").output.replace("│", " ").split())
    assert "prefill|decode|cache" in words
    assert "some of cupyattn, fa2, cudnn, fa4, flashinfer; for decode of cupyattn, flashinfer, fa4." in words


def test_unknown_contender():
    with pytest.raises(bench.typer.BadParameter, match="expected some of cupyattn, missing, slow"):
        bench_common.choose("cupyattn,fa9", MODULES, Console())


def test_missing_contender():
    with pytest.raises(bench.typer.BadParameter, match="cannot be imported"):
        bench_common.choose("missing", MODULES, Console())
    quiet = Console(quiet=True)
    assert bench_common.choose("auto", MODULES, quiet) == [OURS, "slow"]
    assert bench_common.choose("auto", MODULES, quiet, unasked=("slow",)) == [OURS]
    assert bench_common.choose(" slow, cupyattn", MODULES, quiet, unasked=("slow",)) == ["slow", OURS]


def test_attempt_takes_a_refusal_for_a_result():
    def refuse():
        raise RuntimeError("no such shape\nand more")

    assert bench_common.attempt(refuse, float) == (None, Result(refused="RuntimeError: no such shape"))
    call, result = bench_common.attempt(lambda: lambda: 7, lambda out: out / 14)
    assert call() == 7 and result == Result(error=0.5)


@pytest.mark.gpu
def test_gpu_quick_prefill(tmp_path):
    path = tmp_path / "bench.json"
    result = invoke("--quick", "--rounds", 1, "--contenders", "cupyattn", "--json", path)
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert len(record["cells"]) == len(bench_prefill.QUICK)
    assert all(cell["contenders"][OURS]["error_over_tolerance"] <= 1 for cell in record["cells"])
    assert record["host"]["cupy"]["median_us"] > 0


@pytest.mark.gpu
def test_gpu_quick_decode(tmp_path):
    path = tmp_path / "bench.json"
    result = invoke("decode", "--quick", "--rounds", 1, "--contenders", "cupyattn", "--json", path)
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert len(record["cells"]) == sum(map(len, bench_decode.QUICK))
    for cell in record["cells"]:
        assert cell["contenders"][OURS]["error_over_tolerance"] <= 1, cell["name"]
        # A read of as many bytes is never slower than attention, but for noise.
        assert 0 < cell["contenders"]["stream"]["ms"] < 1.1 * cell["contenders"][OURS]["ms"], cell["name"]
    assert record["empty_launch_us"] > 0 and record["host"]


@pytest.mark.gpu
def test_gpu_quick_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the snapshots go there
    path = tmp_path / "bench.json"
    result = invoke("cache", "--quick", "--rounds", 1, "--cache-gb", 0.1, "--json", path)
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert record["failed"] == {}
    assert len(record["rows"]) == 20 and not any(row["wrong"] for row in record["rows"])
    assert [row["value"] for row in record["rows"] if row["unit"] == "bytes of KV"] == [0]
    assert all(row["value"] > 0 for row in record["rows"] if row["unit"] != "bytes of KV")
    assert list(tmp_path.iterdir()) == [path]
