"""`cupyattn demo`: the main job, checked from the outside and against the model run without any cache."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from cupyattn import DecodePlan, apply_rotary, attention_varlen
from cupyattn.cli import app, demo, device
from cupyattn.cli.device import why_no_gpu
from cupyattn.cli.model import Config, Decoder, sampling_noise

SMALL = ["--requests", "5", "--new-tokens", "6"]
CPU = ["--device", "cpu"]


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def report(*arguments: object) -> dict:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_table_names_everything():
    result = invoke(*CPU, *SMALL)
    assert result.exit_code == 0, result.output
    for word in (
        "requests",
        "prompt tokens",
        "generated tokens",
        "prefill",
        "decode",
        "tokens/s",
        "blocks in the pool used",
        "rotary, append and attention in one call of a DecodePlan",
        "kernels",
        "largest error",
        "tolerance",
        "weights are random",
        "Next: cupyattn demo FILE",
    ):
        assert word in result.stdout, word
    assert re.search(
        r"^PASS: [\d,]+ attention outputs within \d\.\de-\d\d of float64 \(tolerance \d\.\de-\d\d\)$",
        result.stdout,
        re.M,
    )
    assert result.stderr == "", "no progress bars where standard error is no terminal"


def test_report_adds_up():
    found = report(*CPU, *SMALL)
    assert found["requests"] == 5
    assert found["generated_tokens"] == 30
    assert 0 < found["blocks_used"] <= found["blocks_held"]
    assert found["prefill_kernel"] == found["decode_kernel"] == "numpy"
    config = Config()
    rows = found["prompt_tokens"] + found["generated_tokens"] - found["requests"]  # the last token is never fed back
    assert found["checked_outputs"] == rows * config.layers * config.heads * config.head_dim
    assert found["largest_error"] <= found["tolerance"] < 1e-3
    assert found["repeatable"] and found["passed"]
    assert len(found["sample_answer"]) == 6 and found["sample_answer"].isprintable()


def test_defaults_are_quick_and_varied():
    found = report(*CPU)
    assert found["prefill_seconds"] + found["decode_seconds"] < 30
    lengths = [len(prompt) for prompt in demo.cut_requests(demo.read_texts(None), 16, 0)]
    assert max(lengths) > 4 * min(lengths)


@pytest.mark.parametrize("block_size", [1, 7, 300])
def test_block_size_does_not_matter(block_size):
    usual, other = report(*CPU, *SMALL), report(*CPU, *SMALL, "--block-size", block_size)
    assert other["sample_answer"] == usual["sample_answer"]
    assert other["block_size"] == block_size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype):
    found = report(*CPU, *SMALL, "--dtype", dtype)
    assert found["dtype"] == dtype
    assert 1e-5 < found["largest_error"] <= found["tolerance"] < 0.1


def test_seed_changes_the_answers():
    assert report(*CPU, *SMALL)["sample_answer"] != report(*CPU, *SMALL, "--seed", 1)["sample_answer"]


def test_one_token_and_one_request():
    found = report(*CPU, "--requests", 1, "--new-tokens", 1)
    assert found["generated_tokens"] == 1 and found["decode_tokens_per_second"] == 0
    table = invoke(*CPU, "--requests", 1, "--new-tokens", 1).stdout
    assert "none: prefill gives" in table and "(decode)" not in table and " 0 tokens/s" not in table


def test_serving_equals_the_model_without_a_cache():
    """Feed each prompt and its answer through the model at once: every sampled byte must come out the same."""
    prompts = demo.cut_requests(demo.read_texts(None), 4, seed=3)
    config, dtype, steps = Config(), np.dtype(np.float32), 5
    model = Decoder(np, config, dtype, seed=3)
    noise = sampling_noise(np, len(prompts), steps, seed=3)
    pool = demo.BlockPool(np, config, num_blocks=300, block_size=16, dtype=dtype)
    served = demo.serve(model, prompts, noise, pool, None, lambda: None)
    tables = model.rotary_tables(1000)
    for row, prompt in enumerate(prompts):
        tokens = np.concatenate([np.frombuffer(prompt, np.uint8), served.tokens[row, :-1]]).astype(np.int32)
        ends = np.array([0, len(tokens)], np.int32)

        def attend(layer, q, k, v, ends=ends):
            q, k = (apply_rotary(x, *tables, cu_seqlens=ends, interleaved=False) for x in (q, k))
            return attention_varlen(q, k, v, ends, ends, causal=True)

        hidden = model.forward(tokens, attend)[len(prompt) - 1 :]
        expected = model.sample(hidden, noise[:, row])
        assert (expected == served.tokens[row]).all()


def test_wrong_attention_is_noticed(monkeypatch):
    right = DecodePlan.run

    def wrong(plan, *arrays, **options):
        out = right(plan, *arrays, **options)
        out[0, 0, 0, 0] += 0.01
        return out

    monkeypatch.setattr(DecodePlan, "run", wrong)
    result = invoke(*CPU, *SMALL)
    assert result.exit_code == 1
    assert "too large" in result.stdout and "FAIL: " in result.stdout and "cupyattn doctor" in result.stdout


def test_wrong_append_is_noticed(monkeypatch):
    right = demo.append_kv
    monkeypatch.setattr(demo, "append_kv", lambda kc, vc, k, v, **options: right(kc, vc, v, k, **options))
    assert invoke(*CPU, *SMALL).exit_code == 1


@pytest.mark.parametrize("name", ["append_kv", "apply_rotary"])
def test_wrong_rotation_is_noticed(monkeypatch, name):
    right, style = getattr(demo, name), {"append_kv": "rotary_interleaved", "apply_rotary": "interleaved"}[name]
    monkeypatch.setattr(demo, name, lambda *arrays, **options: right(*arrays, **options | {style: True}))
    assert invoke(*CPU, *SMALL).exit_code == 1


def test_nan_is_an_error(monkeypatch):
    monkeypatch.setattr(demo, "attention_varlen", _with_nan(demo.attention_varlen))
    assert invoke(*CPU, *SMALL).exit_code == 1


def _with_nan(function):
    def spoiled(*arrays, **options):
        out = function(*arrays, **options)
        if options.get("kernel") != "numpy_float64":
            out[-1] = np.nan
        return out

    return spoiled


def test_own_files(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("aaaa " * 300)
    second.write_text("Größe 日本語 " * 100)
    found = report(first, second, *CPU, *SMALL)
    assert set(found["sample_prompt"]) <= set("a Größe 日本語\ufffd")


def test_short_file(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Hi")
    assert report(path, *CPU, *SMALL)["prompt_tokens"] == 10


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "No such file"), (b"", "empty file"), (b" \n", "empty file"), (b"\x7fELF\0\0", "binary file")],
)
def test_bad_file(tmp_path, content, complaint):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    result = invoke(path, *CPU)
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert complaint in words and "expected" in words


def test_folder_is_refused(tmp_path):
    assert invoke(tmp_path, *CPU).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [["--requests", "0"], ["--new-tokens", "0"], ["--block-size", "0"], ["--dtype", "float8"], ["--device", "tpu"]],
)
def test_bad_options(arguments):
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("reason", "advice"),
    [(device.NO_GPU, "--device cpu works"), ("CuPy is broken", "`cupyattn doctor` says what to do")],
)
def test_cuda_without_a_gpu(monkeypatch, reason, advice):
    monkeypatch.setattr(device, "why_no_gpu", lambda: reason)
    result = invoke("--device", "cuda")
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    assert "--device: cuda needs an NVIDIA GPU" in words and f"{reason}. {advice}" in words


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_auto_falls_back_to_numpy():
    assert report(*SMALL)["device"].startswith("CPU")


def test_pool_hands_out_each_block_once():
    pool = demo.BlockPool(np, Config(layers=1), num_blocks=6, block_size=4, dtype=np.dtype(np.float32))
    first, second = [], []
    assert pool.grow(first, 9) and pool.grow(second, 4)
    assert not pool.grow(first, 12)
    assert pool.grow(first, 13)
    assert (len(first), len(second), pool.used) == (4, 1, 5)
    assert len({*first, *second, *pool.free}) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gpu(dtype):
    found = report("--device", "cuda", "--dtype", dtype)
    assert found["passed"]
    import cupy

    tensor_cores = "forward_sm90" if cupy.cuda.Device().compute_capability == "90" else "forward_sm80"
    assert found["prefill_kernel"] == ("forward_simt" if dtype == "float32" else tensor_cores)
