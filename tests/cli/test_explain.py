"""`cupyattn explain`: shapes on the command line, an explanation on the screen."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize("arguments", [["--kv-heads", 7], ["--head-dim", 300], ["--arch", "1"], ["--dtype", "int8"]])
def test_bad_shapes(arguments):
    assert invoke(*arguments).exit_code == 2
