"""The calls of small projects: attention with heads before tokens against the oracle, and their snippets as written."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys

import numpy as np
import oracle
import pytest
from oracle import normal
from test_arrays import in_library

from cupyattn import arrays, kvcache
from cupyattn.compat import incremental
from cupyattn.compat.incremental import flash_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cupy", "torch-cuda")]
LIBRARIES = ["numpy", "torch", "jax", *ON_GPU]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def put(library, array):
    if library == "cupy":
        return pytest.importorskip("cupy").asarray(array)
    return in_library("torch", array).cuda() if library == "torch-cuda" else in_library(library, array.copy())


def get(array):
    return np.array(arrays.host_array(arrays.view(array)))


def heads_first(rng, dtype, batch=2):
    """q, k and v with heads before tokens, of random lengths."""
    seqlen_q, seqlen_k = rng.integers(1, 40, 2)
    q = normal(rng, (batch, HEADS, seqlen_q, HEAD_DIM), dtype)
    return q, *normal(rng, (2, batch, KV_HEADS, seqlen_k, HEAD_DIM), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_flash_attention(rng, library, dtype, causal):
    q, k, v = heads_first(rng, dtype)
    given = [put(library, x) for x in (q, k, v)]
    out = flash_attention(*given, causal)
    assert type(out) is type(given[0]) and arrays.view(out).dtype == dtype and tuple(out.shape) == q.shape
    again, lse = flash_attention(*given, causal=causal, return_lse=True)
    assert (get(out) == get(again)).all()
    expected = oracle.attention(*(x.swapaxes(1, 2) for x in (q, k, v)), causal=causal)
    expected.check(get(out).swapaxes(1, 2), get(lse), dtype)


@pytest.mark.parametrize("library", ["numpy", "torch", *ON_GPU])
def test_options_and_out(rng, library):
    q, k, v = heads_first(rng, "float16")
    masks = {"window": (5, 1), "softcap": 3.0, "softmax_scale": 0.3}
    slopes, sinks = rng.uniform(0, 1, (2, HEADS)).astype(np.float32), normal(rng, (HEADS,), "float32")
    out = put(library, np.full(q.shape, np.nan, np.float16))
    given = {"alibi_slopes": put(library, slopes), "sinks": put(library, sinks)} | masks
    result, lse = flash_attention(*(put(library, x) for x in (q, k, v)), out=out, return_lse=True, **given)
    assert result is out
    turned = (x.swapaxes(1, 2) for x in (q, k, v))
    expected = oracle.attention(*turned, alibi_slopes=slopes, sinks=sinks, **masks)
    expected.check(get(out).swapaxes(1, 2), get(lse), "float16")


def test_the_arrays_are_not_copied(rng, monkeypatch):
    passed = []

    def attention(*given, out=None, **options):
        passed.extend(given)
        return np.empty((2, 4, 3, 32))

    monkeypatch.setattr(incremental, "attention", attention)
    given = heads_first(rng, "float16")
    flash_attention(*given)
    assert len(passed) == 3
    for seen, array in zip(passed, given, strict=True):
        assert seen.array is array and np.shares_memory(seen.base, array)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"q": None}, "q: got None, expected an array"),
        ({"k": [1]}, "k: got a list, expected an array"),
        ({"q": np.ones((4, 3, 32))}, r"q: got 3-D shape \(4, 3, 32\), expected 4-D \(batch, heads, seqlen, head_dim\)"),
        ({"v": np.ones((2, 2, 4, 32))}, r"v: got shape \(2, 2, 4, 32\), expected k's shape \(2, 2, 5, 32\)"),
        ({"q": np.ones((2, 3, 4, 32), np.float32)}, "k: got 2 heads where q has 3"),
        ({"q": np.ones((3, 4, 4, 32), np.float32)}, "k: got batch 2, expected q's batch 3"),
        ({"causal": 3}, "causal: got 3, expected True or False"),
        ({"out": np.ones((2, 4, 32), np.float32)}, "out: got 3-D shape"),
        ({"dropout_p": 0.1}, ".*unexpected keyword argument 'dropout_p'"),
    ],
)
def test_refusals(wrong, complaint):
    given = {"q": np.ones((2, 4, 3, 32), np.float32), "k": np.ones((2, 2, 5, 32), np.float32)}
    given["v"] = given["k"]
    with pytest.raises((TypeError, ValueError), match=f"^{complaint}"):
        flash_attention(**given | wrong)


def test_the_others_are_this_librarys_own():
    for name in set(incremental.__all__) - {"flash_attention"}:
        assert getattr(incremental, name) is getattr(kvcache, name)


SIGNATURES = {
    "flash_attention": "q k v causal",
    "initialize_kv_cache": "batch_size num_heads max_seqlen head_dim",
    "update_kv_cache": "kv_cache k v",
    "incremental_attention": "q kv_cache",
    "flash_attention_with_kv_cache": "q k v kv_cache causal",
    "reorder_kv_cache": "kv_cache beam_idx",
    "KVCache": "keys values lengths",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_positional_arguments(name):
    parameters = inspect.signature(getattr(incremental, name)).parameters.values()
    assert " ".join(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD) == SIGNATURES[name]
    assert set(incremental.__all__) == set(SIGNATURES)


def test_no_array_library_is_imported():
    code = "import sys, cupyattn.compat.incremental\nprint(sorted({'torch', 'jax', 'cupy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ----------------------------------------------------------------------------------------- snippets as people know them


BASIC = """
import torch
from flashattention.flash_attention_v3 import flash_attention

# Create input tensors
batch_size, num_heads, seq_len, head_dim = 2, 8, 1024, 64
q = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')
k = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')
v = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')

# Run flash attention
output = flash_attention(q, k, v, causal=True)
"""
CACHING = """
from flashattention.flash_attention_v3 import initialize_kv_cache, update_kv_cache, incremental_attention

# Initialize KV cache
max_seq_len = 1024
kv_cache = initialize_kv_cache(batch_size, num_heads, max_seq_len, head_dim)

# Update cache with first token
k_first = torch.randn(batch_size, num_heads, 1, head_dim, device='cuda')
v_first = torch.randn(batch_size, num_heads, 1, head_dim, device='cuda')
update_kv_cache(kv_cache, k_first, v_first)

# Process query with cache
q = torch.randn(batch_size, num_heads, 1, head_dim, device='cuda')
output = incremental_attention(q, kv_cache, causal=True)
"""
BEAMS = """
from flashattention.flash_attention_v3 import flash_attention_with_kv_cache, reorder_kv_cache, KVCache

# Initial forward pass to build cache
q = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')
k = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')
v = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')
output, kv_cache = flash_attention_with_kv_cache(q, k, v, kv_cache=None, causal=True)

# Expand cache for beam search (beam_size=3)
beam_size = 3
expanded_keys = kv_cache.keys.repeat_interleave(beam_size, dim=0)
expanded_values = kv_cache.values.repeat_interleave(beam_size, dim=0)
kv_cache = KVCache(expanded_keys, expanded_values)

# Reorder KV cache based on beam selection
beam_idx = torch.tensor([1, 0, 2, 5, 3, 4], device='cuda')  # Example beam indices
reorder_kv_cache(kv_cache, beam_idx)
"""


def run(snippet, scope, device):
    """Run a snippet as it is but for its import and the device."""
    code = snippet.replace("flashattention.flash_attention_v3", "cupyattn.compat.incremental")
    exec(code.replace("'cuda'", repr(device)), scope)


@pytest.mark.parametrize("device", DEVICES)
def test_snippets(device):
    torch = pytest.importorskip("torch")
    exact = torch.nn.functional.scaled_dot_product_attention
    scope = {}
    run(BASIC, scope, device)
    q, k, v, output = (scope[name] for name in ("q", "k", "v", "output"))
    assert output.shape == q.shape and output.device == q.device
    assert (output - exact(q.double(), k.double(), v.double(), is_causal=True)).abs().max() < 1e-5

    run(CACHING, scope, device)
    assert torch.allclose(scope["output"], scope["v_first"]) and scope["kv_cache"].lengths.tolist() == [1, 1]

    run(BEAMS, scope, device)
    q, k, v, output, cache = (scope[name] for name in ("q", "k", "v", "output", "kv_cache"))
    assert (output - exact(q.double(), k.double(), v.double(), is_causal=True)).abs().max() < 1e-5
    parents = [0, 0, 0, 1, 1, 1]  # beams change places within what they began as
    assert torch.equal(cache.keys, k[parents]) and torch.equal(cache.values, v[parents])
    cache.keys[0], cache.values[0] = 0, 0  # so that beams differ
    incremental.reorder_kv_cache(cache, [1, 0, 2, 5, 3, 4])
    assert not cache.keys[1].any() and torch.equal(cache.keys[0], k[0])


def test_examples():
    results = doctest.testmod(incremental)
    assert results.attempted and not results.failed
