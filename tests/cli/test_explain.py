"""`cupyattn explain`: shapes on the command line, an explanation on the screen."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from cupyattn.cli import app, explain
from cupyattn.cli.device import why_no_gpu


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["explain", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_it_is_numpy():
    result = invoke("--causal")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("numpy on cpu")


def test_options_reach_the_call(monkeypatch):
    seen = {}

    def spy(q, k, v, **options):
        seen.update(options, q=q, k=k)
        raise ValueError("that is enough")

    monkeypatch.setattr(explain, "explain_call", spy)
    shape = ["--batch", 3, "--seqlen-q", 1, "--seqlen-k", 100, "--heads", 8, "--kv-heads", 2, "--head-dim", 64]
    result = invoke(
        *shape, "--block-size", 16, "--window", -1, 5, "--softcap", 30, "--arch", "80", "--dtype", "float16"
    )
    assert result.exit_code == 2 and "that is enough" in result.output
    assert seen["q"].shape == (3, 1, 8, 64) and seen["q"].dtype == "float16"
    assert seen["k"].shape == (21, 16, 2, 64) and seen["block_table"].shape == (3, 7)
    assert seen["cache_seqlens"].tolist() == [100] * 3
    assert (seen["window"], seen["softcap"], seen["arch"], seen["causal"]) == ((-1, 5), 30.0, "80", False)


def test_a_cache_in_fp8_that_is_appended_to(monkeypatch):
    seen = {}

    def spy(*arrays, **options):
        seen.update(options, k_cache=arrays[1], v_cache=arrays[2])
        raise ValueError("that is enough")

    monkeypatch.setattr(explain, "explain_call", spy)
    shape = ["--batch", 3, "--seqlen-q", 2, "--seqlen-k", 100, "--kv-heads", 2, "--head-dim", 64, "--head-dim-v", 32]
    cache = ["--kv-dtype", "float8_e4m3fn", "--seqlen-new", 2, "--num-splits", 4]
    invoke(*shape, *cache, "--arch", "90")
    assert seen["k_cache"].shape == (3, 100, 2, 64) and seen["k_cache"].dtype == np.uint8
    assert seen["v_cache"].shape == (3, 100, 2, 32)
    assert seen["k"].shape == (3, 2, 2, 64) and seen["v"].shape == (3, 2, 2, 32) and seen["k"].dtype == "bfloat16"
    assert seen["cache_seqlens"].tolist() == [98] * 3, "the new ones are the last of the keys"
    assert (seen["kv_dtype"], seen["num_splits"]) == ("float8_e4m3fn", 4)
    assert (seen["k_scale"], seen["v_scale"]) == (1.0, 1.0)


def test_what_is_measured_is_full_of_numbers():
    for dtype, stored in ((np.dtype("float16"), "float16"), (np.dtype(ml_dtypes.float8_e5m2), "uint8")):
        array = np.zeros((3, 5, 7), stored)
        explain._fill(np, array, dtype)
        numbers = array.view(dtype).astype(float)
        assert np.isfinite(numbers).all() and 0.5 < numbers.std() < 1.5
    explain._fill(np, np.zeros((0, 3), "float16"), np.dtype("float16"))


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured():
    result = invoke("--measure")
    assert result.exit_code == 2
    assert "Invalid value for --measure: it needs an NVIDIA GPU" in result.output
    result = invoke("--measure", "--arch", "90")
    assert result.exit_code == 2 and "got it with --arch 90a, expected the GPU here" in result.output


@pytest.mark.gpu
@pytest.mark.parametrize("cache", [[], ["--seqlen-q", 1, "--kv-dtype", "float8_e4m3fn", "--seqlen-new", 1]])
def test_measured_on_the_gpu_here(cache):
    result = invoke("--seqlen-k", 2048, *cache, "--measure", "--json")
    assert result.exit_code == 0, result.output
    assert 0 < json.loads(result.stdout)["roofline_share"] < 1.2


@pytest.mark.parametrize("name", ["90", "90a", "sm_90", "sm_90a", "9.0"])
def test_an_architecture_has_many_names(monkeypatch, name):
    def spy(*arrays, **options):
        raise ValueError(f"asked for {options['arch']}")

    monkeypatch.setattr(explain, "explain_call", spy)
    assert "asked for 90a" in invoke("--arch", name).output


def test_absent_chip_as_json():
    pytest.importorskip("cupy")
    result = invoke("--arch", "80", "--seqlen-q", 512, "--causal", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kernel"] == "forward_sm80" and found["spill_bytes"] == 0
    assert found["flops"] == 4 * 32 * 128 * 512 * 513 // 2


def test_missing_compiler_is_said(monkeypatch):
    def spy(*arrays, **options):
        raise ImportError("compiling kernels needs CuPy")

    monkeypatch.setattr(explain, "explain_call", spy)
    result = invoke("--arch", "80")
    assert result.exit_code == 1 and "needs CuPy" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kv-heads", 7],
        ["--head-dim", 300],
        ["--arch", "1"],
        ["--dtype", "int8"],
        ["--kv-dtype", "int4"],
        ["--seqlen-new", 2049],
    ],
)
def test_bad_shapes(arguments):
    assert invoke(*arguments).exit_code == 2
