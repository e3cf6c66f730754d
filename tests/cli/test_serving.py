"""`cupyattn demo --serve`: the scheduler on a cache that is too small, against the model run without any cache."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from cupyattn import OutOfBlocks, PagedKVCache, apply_rotary, attention_varlen
from cupyattn.cli import app, demo, serving
from cupyattn.cli.model import Config, Decoder, sampling_noise
from cupyattn.cli.serving import Request, Server

CPU = ["--device", "cpu"]
SMALL = [*CPU, "--requests", "6", "--new-tokens", "12"]
FLOAT32 = np.dtype(np.float32)


def invoke(*arguments: object):
    options = ["demo", "--serve", *map(str, arguments)]
    return CliRunner().invoke(app, options, env={"COLUMNS": "200", "NO_COLOR": "1"})


def report(*arguments: object) -> dict:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def usual() -> dict:
    return report(*CPU)


def test_tables_name_everything():
    result = invoke(*SMALL)
    assert result.exit_code == 0, result.output
    for word in ("step", "running", "waiting", "swapped out", "finished", "blocks in use", "saved", "preemptions"):
        assert word in result.stdout, word
    assert re.search(r"^PASS: [\d,]+ attention outputs within \S+ of float64 \(tolerance \S+\)$", result.stdout, re.M)
    assert result.stderr == ""


def test_everything_happens(usual):
    """With the options that it has by itself: sharing, both ways of preemption, and nothing left."""
    assert usual["passed"] and usual["blocks_left"] == 0
    assert usual["requests"] == 16 and usual["generated_tokens"] == 16 * 64
    assert usual["swapped_out"] and usual["recomputed"]
    assert usual["most_blocks_saved"] >= 12 and usual["prompt_tokens_shared"] >= 10 * 192
    assert usual["most_blocks_used"] <= usual["blocks_held"] < 200


def test_moments_add_up(usual):
    moments = usual["moments"]
    assert [moment["step"] for moment in moments] == [*range(1, usual["steps"] + 1)]
    for before, after in zip(moments, moments[1:], strict=False):
        assert after["finished"] >= before["finished"] and after["preemptions"] >= before["preemptions"]
        assert after["running"] + after["waiting"] + after["finished"] <= 16
        assert after["swapped_out"] <= after["waiting"]
    last = moments[-1]
    assert (last["running"], last["waiting"], last["finished"], last["blocks_used"]) == (0, 0, 16, 0)
    assert last["preemptions"] == usual["swapped_out"] + usual["recomputed"]


@pytest.mark.parametrize("block_size", [1, 7, 300])
def test_any_block_size(block_size):
    found = report(*SMALL, "--block-size", block_size)
    assert found["passed"] and found["block_size"] == block_size
    assert bool(found["prompt_tokens_shared"]) == (block_size < 300)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype):
    found = report(*SMALL, "--dtype", dtype)
    assert 1e-5 < found["largest_error"] <= found["tolerance"] < 0.1


def test_one_token_and_one_request():
    found = report(*CPU, "--requests", 1, "--new-tokens", 1)
    assert found["generated_tokens"] == 1 and found["passed"]


def test_short_file(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Hi")
    assert report(path, *SMALL)["prompt_tokens"] == 24


def server_of(prompts: list[bytes], num_blocks: int, new_tokens: int = 8, block_size: int = 8) -> Server:
    """A server with all of these prompts waiting."""
    config = Config()
    model = Decoder(np, config, FLOAT32, seed=3)
    cache = PagedKVCache(
        num_blocks, block_size, config.kv_heads, config.head_dim, num_layers=config.layers, dtype="float32"
    )
    server = Server(model, cache, sampling_noise(np, len(prompts), new_tokens, 3), 1000)
    for index, prompt in enumerate(prompts):
        server.waiting.append(Request(index, 0, np.frombuffer(prompt, np.uint8).astype(np.int32), new_tokens))
    return server


def run(server: Server) -> dict[int, list[int]]:
    for _ in range(1000):
        if not (server.waiting or server.running):
            return {request.index: request.answer for request in server.finished}
        server.step()
    raise AssertionError("the server does not come to an end")


def test_answers_equal_the_model_without_a_cache():
    """Whatever is shared, preempted and resumed: each sampled byte is that of the whole sequence at once."""
    texts = demo.read_texts(None)
    prompts = demo.begin_alike(demo.cut_requests(texts, 6, seed=3), texts)
    server = server_of(prompts, num_blocks=95, new_tokens=20)
    answers = run(server)
    assert server.swapped_out and server.recomputed and server.shared
    for index, prompt in enumerate(prompts):
        tokens = np.concatenate([np.frombuffer(prompt, np.uint8), answers[index][:-1]]).astype(np.int32)
        ends = np.array([0, len(tokens)], np.int32)

        def attend(layer, q, k, v, ends=ends):
            tables = server.cos, server.sin
            q, k = (apply_rotary(x, *tables, cu_seqlens=ends, interleaved=False) for x in (q, k))
            return attention_varlen(q, k, v, ends, ends, causal=True)

        hidden = server.model.forward(tokens, attend)[len(prompt) - 1 :]
        assert server.model.sample(hidden, server.noise[:, index]).tolist() == answers[index]


def test_chunks_hold_no_more_than_one_step_may():
    server = server_of([b"a" * 500, b"b" * 100], num_blocks=100)
    server.step()
    assert [request.computed for request in server.running] == [serving.CHUNK, 0]
    server.step()
    server.step()
    assert [request.computed for request in server.running] == [500, 3 * serving.CHUNK - 500]
    assert [len(request.answer) for request in server.running] == [1, 0]


def test_the_youngest_gives_way_and_comes_back():
    server = server_of([b"first " * 4, b"other " * 4], num_blocks=7)  # 24 + 7 tokens each: 4 blocks, in the end
    server.step()
    first, other = server.running
    while not server.waiting:
        server.step()
    assert server.running == [first] and [*server.waiting] == [other]
    assert server.cache.is_swapped_out(other.seq) and other.answer
    assert run(server).keys() == {0, 1} and server.swapped_out == 1
    assert [request.index for request in server.finished] == [0, 1]


def test_a_prefix_is_computed_once():
    prefix = bytes(range(64))
    server = server_of([prefix + b"first", prefix + b"other"], num_blocks=40)
    waiting = server.waiting.pop()
    server.step()
    server.waiting.append(waiting)
    server.step()
    assert server.shared == 64
    assert server.moments[-1].blocks_saved == 64 // 8
    run(server)


def test_a_request_larger_than_the_pool_is_refused():
    server = server_of([b"a" * 100], num_blocks=3)
    with pytest.raises(OutOfBlocks):
        run(server)


@pytest.mark.parametrize("name", ["attention_varlen", "attention_with_kvcache"])
def test_wrong_attention_is_noticed(monkeypatch, name):
    right = getattr(serving, name)

    def wrong(*arrays, **options):
        out = right(*arrays, **options)
        out[(0,) * out.ndim] += 0.01
        return out

    monkeypatch.setattr(serving, name, wrong)
    result = invoke(*SMALL)
    assert result.exit_code == 1
    assert "too large" in result.stdout and "FAIL: " in result.stdout and "cupyattn doctor" in result.stdout


def test_blocks_that_do_not_come_back_are_noticed(monkeypatch):
    """What a request swaps in is what it had: other contents of its blocks are wrong outputs."""
    right = PagedKVCache.swap_in

    def wrong(cache, seq):
        right(cache, seq)
        cache.v[:, cache.tables[[*cache].index(seq)][-2:]] = 0

    monkeypatch.setattr(PagedKVCache, "swap_in", wrong)
    assert invoke(*CPU).exit_code == 1


def test_a_wrong_prefix_is_noticed(monkeypatch):
    right = PagedKVCache.add

    def wrong(cache, tokens):
        seq = right(cache, tokens)
        if cache.length(seq):
            cache.k[:, cache.tables[-1][0]] = 0
        return seq

    monkeypatch.setattr(PagedKVCache, "add", wrong)
    assert invoke(*SMALL).exit_code == 1


def test_leaked_blocks_are_noticed(monkeypatch):
    right = PagedKVCache.free

    def wrong(cache, seq):
        cache.fork(seq)
        right(cache, seq)

    monkeypatch.setattr(PagedKVCache, "free", wrong)
    result = invoke(*CPU, "--requests", 1, "--new-tokens", 2)
    assert result.exit_code == 1 and "in use though no request is left" in result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gpu(dtype):
    found = report("--device", "cuda", "--dtype", dtype)
    assert found["passed"] and found["swapped_out"] and found["recomputed"] and found["most_blocks_saved"]
