"""KVCache and the calls around it, against plain concatenation and the oracle, on NumPy and CUDA.

`Twin` keeps a list of rows for each sequence beside a cache: whatever is done to one is done to the other, and the
oracle attends to the list. Shapes in tests are (batch, seqlen, heads, head_dim) and turned for "BHSD" on the way.
"""

from __future__ import annotations

import doctest
import re

import numpy as np
import oracle
import pytest
from oracle import normal

from cupyattn import (
    CacheFull,
    KVCache,
    flash_attention_with_kv_cache,
    incremental_attention,
    initialize_kv_cache,
    reorder_kv_cache,
    update_kv_cache,
)
from cupyattn.kvcache import dense

pytestmark = pytest.mark.backends("numpy", "cuda")

DTYPES = ("float16", "bfloat16", "float32")
FORMS = ("BHSD", "BSHD", "packed")  # packed: in one array, "BSHD"
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


def turned(array, layout):
    return array.swapaxes(1, 2) if layout == "BHSD" else array


class Twin:
    """A cache on a backend, and the same as lists of rows."""

    def __init__(self, backend, form="BHSD", batch=3, dtype="float16", max_seqlen=None, window=None, device=False):
        self.backend, self.dtype, self.window = backend, dtype, window
        layout = "BSHD" if form == "packed" else form
        given = {"layout": layout, "packed": form == "packed", "window": window}
        if device:
            given |= {"dtype": np.dtype(dtype), "device": "cuda" if backend.on_gpu else "cpu"}
        self.cache = initialize_kv_cache(batch, KV_HEADS, max_seqlen, HEAD_DIM, **given)
        self.pairs = [(np.zeros((0, KV_HEADS, HEAD_DIM), dtype),) * 2 for _ in range(batch)]

    def put(self, array):
        return turned(self.backend.put(array), self.cache.layout)

    def get(self, array):
        return turned(np.asarray(self.backend.get(array)), self.cache.layout)

    def new(self, rng, seqlen, heads=KV_HEADS):
        return normal(rng, (len(self.pairs), seqlen, heads, HEAD_DIM), self.dtype)

    def grow(self, k, v, lengths=None):
        lengths = [k.shape[1]] * len(k) if lengths is None else lengths
        self.pairs = [
            tuple(np.concatenate([old, new[b, : lengths[b]]]) for old, new in zip(pair, (k, v), strict=True))
            for b, pair in enumerate(self.pairs)
        ]

    def append(self, rng, seqlen, lengths=None):
        k, v = self.new(rng, seqlen), self.new(rng, seqlen)
        self.cache.append(self.put(k), self.put(v), lengths=lengths)
        self.grow(k, v, lengths)

    def attend(self, rng, seqlen_q, seqlen_new=0, **masks):
        """Attend on both sides, with new tokens or without, and compare."""
        q = self.new(rng, seqlen_q, HEADS)
        k, v = (self.new(rng, seqlen_new), self.new(rng, seqlen_new)) if seqlen_new else (None, None)
        given = [None if array is None else self.put(array) for array in (q, k, v)]
        here = {name: self.backend.put(x) if isinstance(x, np.ndarray) else x for name, x in masks.items()}
        out, lse = self.cache.attend(*given, return_lse=True, **here)
        if seqlen_new:
            self.grow(k, v)
        out, lse = self.get(out), self.backend.get(lse)
        masks = {"window": self.window} | masks
        for b, pair in enumerate(self.pairs):
            own = {name: x[b : b + 1] if np.ndim(x) == 2 else x for name, x in masks.items() if name != "num_splits"}
            expected = oracle.attention(q[b : b + 1], *(rows[None] for rows in pair), **own)
            expected.check(out[b : b + 1], lse[b : b + 1], self.dtype)

    def check(self):
        """The cache holds what it should, bit for bit."""
        assert self.cache.lengths.tolist() == [len(keys) for keys, _ in self.pairs]
        if self.cache.capacity == 0:
            return
        for got, which in ((self.cache.keys, 0), (self.cache.values, 1)):
            got = self.get(got)
            kept = got.shape[1]
            for rows, pair in zip(got, self.pairs, strict=True):
                expected = pair[which][-kept:] if kept else pair[which][:0]
                assert rows[: len(expected)].tobytes() == expected.tobytes()


# --------------------------------------------------------------------------------------- calls as people know them


SEED = """
import torch
batch_size, num_heads, seq_len, head_dim = 2, 8, 1024, 64
{imports}

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
assert torch.allclose(output, v_first)

# Initial forward pass to build cache
q = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')
k = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')
v = torch.randn(batch_size, num_heads, seq_len, head_dim, device='cuda')
output, kv_cache = flash_attention_with_kv_cache(q, k, v, kv_cache=None, causal=True)
first = output

# Expand cache for beam search (beam_size=3)
beam_size = 3
expanded_keys = kv_cache.keys.repeat_interleave(beam_size, dim=0)
expanded_values = kv_cache.values.repeat_interleave(beam_size, dim=0)
kv_cache = KVCache(expanded_keys, expanded_values)

# Reorder KV cache based on beam selection
beam_idx = torch.tensor([1, 0, 2, 5, 3, 4], device='cuda')  # Example beam indices
reorder_kv_cache(kv_cache, beam_idx)
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_beam_search_calls_as_written(device):
    torch = pytest.importorskip("torch")
    names = "KVCache, flash_attention_with_kv_cache, incremental_attention, initialize_kv_cache, reorder_kv_cache"
    code = SEED.format(imports=f"from cupyattn import {names}, update_kv_cache")
    scope = {}
    exec(re.sub("'cuda'", repr(device), code), scope)
    q, k, v, cache = (scope[name] for name in ("q", "k", "v", "kv_cache"))
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert (scope["first"] - expected).abs().max() < 1e-5
    parents = [0, 0, 0, 1, 1, 1]  # of beams before they are reordered, within one parent
    assert torch.equal(cache.keys, k[parents]) and torch.equal(cache.values, v[parents])
    assert cache.keys.device.type == device and isinstance(scope["output"], torch.Tensor)


# ----------------------------------------------------------------------------------------- appending, attending


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_steps(backend, rng, form, dtype):
    """A prompt, single tokens and a chunk, appended in the call that attends or before it."""
    twin = Twin(backend, form, dtype=dtype, max_seqlen=64)
    twin.attend(rng, 20, 20, causal=True)
    for _ in range(3):
        twin.attend(rng, 1, 1, causal=True)
    twin.attend(rng, 7, 7, causal=True, softcap=20.0)
    twin.append(rng, 5)
    twin.attend(rng, 5, causal=True)
    twin.attend(rng, 2, window=(9, 0))
    twin.check()
    assert twin.cache.capacity == 64


@pytest.mark.parametrize("form", FORMS)
def test_memory_taken_at_once(backend, rng, form):
    twin = Twin(backend, form, max_seqlen=40, device=True)
    assert twin.cache.capacity == 40 and twin.cache.nbytes == 2 * 3 * 40 * KV_HEADS * HEAD_DIM * 2
    twin.attend(rng, 30, 30, causal=True)
    twin.attend(rng, 1, 1)
    twin.check()


def test_one_launch_a_step(rng, monkeypatch):
    """A step is one call of one function, with lengths by value where they are alike."""
    calls = []

    def counted(name, function):
        def call(*arrays, **options):
            calls.append(name)
            return function(*arrays, **options)

        return call

    for name in ("append_kv", "attention_with_kvcache"):
        monkeypatch.setattr(dense, name, counted(name, getattr(dense, name)))
    for window in (None, (15, 0)):
        cache = initialize_kv_cache(2, 1, 64, 8, window=window)
        for _ in range(40):
            calls.clear()
            cache.attend(*normal(rng, (3, 2, 1, 1, 8), "float32"))
            assert calls == ["attention_with_kvcache"]
        calls.clear()
        cache.append(*normal(rng, (2, 2, 1, 20, 8), "float32"))
        assert calls == ["append_kv"]


def test_out_is_written_and_returned(backend, rng):
    for form in ("BHSD", "BSHD"):
        twin = Twin(backend, form)
        twin.append(rng, 6)
        out = twin.put(np.full((3, 2, HEADS, HEAD_DIM), np.nan, np.float16))
        q = twin.put(twin.new(rng, 2, HEADS))
        assert twin.cache.attend(q, out=out) is out
        assert twin.backend.get(out).tobytes() == twin.backend.get(twin.cache.attend(q)).tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_grows_without_a_limit(backend, rng, form):
    twin = Twin(backend, form)
    capacities = set()
    for seqlen in (3, *[1] * 40):
        twin.attend(rng, seqlen, seqlen, causal=True)
        capacities.add(twin.cache.capacity)
    twin.check()
    assert sorted(capacities) == [3, 6, 12, 24, 48]


def test_growth_stops_at_the_limit(backend, rng):
    keys, values = normal(rng, (2, 1, 2, 5, 16), "float32")
    cache = KVCache(backend.put(keys), backend.put(values), max_seqlen=8)
    cache.append(*(backend.put(x) for x in normal(rng, (2, 1, 2, 1, 16), "float32")))
    assert cache.capacity == 8
    with pytest.raises(CacheFull, match="k: got 3 new tokens for sequence 0, which has 6, expected at most 8 in all"):
        cache.append(*(backend.put(x) for x in normal(rng, (2, 1, 2, 3, 16), "float32")))


def test_takes_over_arrays(backend, rng):
    """The caller's arrays are written into as long as there is room."""
    keys, values = (backend.put(x) for x in normal(rng, (2, 2, 9, 1, 16), "float16"))
    cache = KVCache(keys, values, [4, 7], layout="BSHD")
    k, v = (backend.put(x) for x in normal(rng, (2, 2, 2, 1, 16), "float16"))
    cache.append(k, v)
    assert cache.lengths.tolist() == [6, 9]
    assert (keys[0, 4:6] == k[0]).all() and (values[1, 7:9] == v[1]).all()
    before = backend.get(keys).copy()
    cache.append(k, v)
    assert (backend.get(keys) == before).all() and cache.capacity == 18


def test_takes_over_a_packed_array(backend, rng):
    kv = backend.put(normal(rng, (2, 9, 2, 1, 16), "float16"))
    for layout in ("BSHD", "BHSD"):
        cache = KVCache.from_packed(kv, [4, 4], layout=layout)
        k, v = (backend.put(x) for x in normal(rng, (2, 2, 3, 1, 16), "float16"))
        cache.append(turned(k, layout), turned(v, layout))
        assert (kv[:, 4:7, 0] == k).all() and (kv[:, 4:7, 1] == v).all()
        assert cache.kv.shape == (2, 7, 2, 1, 16) and (turned(cache.values, layout) == cache.kv[:, :, 1]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, (20, 0)])
def test_prompts_of_different_lengths(backend, rng, form, window):
    """Padding is neither stored nor seen; the sequences go on from where each of them ends."""
    twin = Twin(backend, form, window=window)
    twin.append(rng, 50, lengths=[50, 0, 17])
    twin.check()
    for _ in range(20):
        twin.attend(rng, 1, 1, causal=True)
    twin.append(rng, 4, lengths=np.array([0, 4, 1]))
    twin.attend(rng, 3, 3, causal=True)
    twin.check()


def test_head_dim_of_values(backend, rng):
    cache = initialize_kv_cache(1, 2, 32, 48, head_dim_v=16, layout="BSHD")
    q, k = normal(rng, (1, 5, 4, 48), "float16"), normal(rng, (1, 5, 2, 48), "float16")
    v = normal(rng, (1, 5, 2, 16), "float16")
    out = cache.attend(*(backend.put(x) for x in (q, k, v)), causal=True)
    oracle.attention(q, k, v, causal=True).check(backend.get(out), None, "float16")


def test_fp8_bytes(backend, rng):
    scales = {"kv_dtype": "float8_e4m3fn", "k_scale": 0.5, "v_scale": 0.25}
    cache = initialize_kv_cache(2, KV_HEADS, 32, HEAD_DIM, layout="BSHD", dtype="uint8")
    q, k, v = normal(rng, (2, 3, HEADS, HEAD_DIM), "float16"), *normal(rng, (2, 2, 3, KV_HEADS, HEAD_DIM), "float16")
    out, lse = cache.attend(*(backend.put(x) for x in (q, k, v)), return_lse=True, **scales)
    stored = tuple(backend.get(array).copy() for array in (cache.keys, cache.values))
    expected = oracle.attention_with_kvcache(q, *stored, stored=stored, cache_seqlens=3, **scales)
    expected.check(backend.get(out), backend.get(lse), "float16")
    reorder_kv_cache(cache, [1, 0])
    assert (backend.get(cache.keys) == stored[0][::-1]).all()


# ------------------------------------------------------------------------------------------------------- rings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_ring_equals_the_whole_cache(backend, rng, form, dtype):
    """Steps and chunks shorter and longer than the ring, many times around it."""
    twin = Twin(backend, form, dtype=dtype, window=(37, 0))
    for seqlen in (1, 30, 1, 1, 100, 1, 11, 12, 48, 1, 200, *[1] * 60):
        twin.attend(rng, seqlen, seqlen)
        twin.check()
        assert twin.cache.capacity == 48
    assert twin.cache.keys.shape[2 if twin.cache.layout == "BHSD" else 1] == 38
    assert twin.cache.nbytes == 2 * 3 * 48 * KV_HEADS * HEAD_DIM * np.dtype(dtype).itemsize


@pytest.mark.parametrize("left", [0, 1, 15, 16, 17, 31])
def test_rings_of_any_window(backend, rng, left):
    twin = Twin(backend, window=(left, 0))
    for seqlen in (5, *[1] * 40, 3, 40, 1, 1):
        twin.attend(rng, seqlen, seqlen)
    twin.append(rng, 90)
    twin.attend(rng, 1)
    twin.check()


def test_ring_with_alibi(backend, rng):
    """Distances are between true positions."""
    slopes = np.linspace(0.05, 0.4, HEADS).astype(np.float32)
    twin = Twin(backend, window=(20, 0))
    for seqlen in (60, 1, 1, 9, 1, 100, 1):
        twin.attend(rng, seqlen, seqlen, alibi_slopes=slopes)


@pytest.mark.parametrize("lengths", [None, [40, 3, 0]], ids=["alike", "ragged"])
def test_ring_with_rotary(backend, rng, lengths):
    """Rotated as in a cache that keeps everything, at positions far beyond the ring."""
    angles = np.outer(np.arange(400), 100.0 ** -(np.arange(16) / 16)).astype(np.float32)
    tables = {"rotary_cos": backend.put(np.cos(angles)), "rotary_sin": backend.put(np.sin(angles))}
    caches = [initialize_kv_cache(3, KV_HEADS, 400, HEAD_DIM, window=window) for window in (None, (20, 0))]
    k, v = (backend.put(x) for x in normal(rng, (2, 3, KV_HEADS, 40, HEAD_DIM), "float32"))
    for cache in caches:
        cache.append(k, v, lengths=lengths, **tables)
    for seqlen in (1, 1, 7, 90, 1, 30, 1):
        q = backend.put(normal(rng, (3, HEADS, seqlen, HEAD_DIM), "float32"))
        k, v = (backend.put(x) for x in normal(rng, (2, 3, KV_HEADS, seqlen, HEAD_DIM), "float32"))
        whole, ring = (backend.get(cache.attend(q, k, v, window=(20, 0), **tables)) for cache in caches)
        assert np.allclose(whole, ring, rtol=0, atol=2e-6)
    kept = backend.get(caches[1].keys)
    for b, length in enumerate(caches[0].lengths):
        assert (backend.get(caches[0].keys)[b, :, length - 21 : length] == kept[b]).all()


def test_ring_over_given_arrays(backend, rng):
    """The last tokens are copied out of them."""
    lengths = [50, 7]
    keys, values = normal(rng, (2, 2, KV_HEADS, 50, HEAD_DIM), "float16")
    cache = KVCache(backend.put(keys), backend.put(values), lengths, window=(15, 0))
    q = normal(rng, (2, HEADS, 1, HEAD_DIM), "float16")
    out = backend.get(cache.attend(backend.put(q)))
    assert cache.capacity == 16
    for b, length in enumerate(lengths):
        rows = (turned(x[b : b + 1, :, :length], "BHSD") for x in (keys, values))
        expected = oracle.attention(turned(q[b : b + 1], "BHSD"), *rows, window=(15, 0))
        expected.check(turned(out[b : b + 1], "BHSD"), None, "float16")


def test_ring_with_a_right_side_and_a_narrower_window(backend, rng):
    twin = Twin(backend, window=(30, -1))
    twin.attend(rng, 40, 40)
    twin.attend(rng, 5, 5)
    twin.attend(rng, 1, 1, window=(10, 0))
    twin.attend(rng, 20, 20, window=(10, 2))
    with pytest.raises(ValueError, match=r"window: got \(31, 0\), expected one within the cache's own, \(30, -1\)"):
        twin.cache.attend(twin.put(twin.new(rng, 1, HEADS)), window=(31, 0))


def test_ring_refuses_queries_that_look_too_far_back(backend, rng):
    """Tokens that were appended before the call can have pushed out what their queries see."""
    twin = Twin(backend, window=(20, 0))  # 32 rows
    twin.append(rng, 20)
    twin.attend(rng, 20)  # nothing is lost yet
    twin.append(rng, 30)
    twin.attend(rng, 12)
    twin.attend(rng, 13, 1)
    with pytest.raises(ValueError, match="q: got 13 queries of tokens that are in the cache already, which holds 32"):
        twin.cache.attend(twin.put(twin.new(rng, 13, HEADS)))
    twin.check()


def test_ring_with_a_limit(backend, rng):
    twin = Twin(backend, max_seqlen=30, window=(100, 0))
    assert twin.cache.capacity == 0
    twin.attend(rng, 29, 29)
    assert twin.cache.capacity == 32
    twin.attend(rng, 1, 1)
    with pytest.raises(CacheFull):
        twin.append(rng, 1)
    twin.check()


# ------------------------------------------------------------------------------------------------------- beams


@pytest.mark.parametrize("window", [None, (9, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_beam_search(backend, rng, form, window):
    """Expanded after the prompts, then reordered at every step."""
    twin = Twin(backend, form, batch=2, window=window)
    twin.append(rng, 12, lengths=[12, 5])
    twin.cache = twin.cache.expand(3)
    twin.pairs = [pair for pair in twin.pairs for _ in range(3)]
    twin.check()
    for step in range(6):
        twin.attend(rng, 1, 1, causal=True)
        beam_idx = rng.integers(0, 6, 6)
        given = [beam_idx.tolist(), beam_idx, backend.put(beam_idx.astype(np.int32))][step % 3]
        twin.cache.reorder(given)
        twin.pairs = [twin.pairs[i] for i in beam_idx]
        twin.check()


def test_reorder_is_in_place(backend, rng):
    keys, values = (backend.put(x) for x in normal(rng, (2, 3, 2, 4, 8), "float16"))
    cache, before = KVCache(keys, values), backend.get(keys).copy()
    assert reorder_kv_cache(cache, [2, 1, 1]) is cache
    assert (backend.get(keys) == before[[2, 1, 1]]).all()


def test_select(backend, rng):
    twin = Twin(backend, batch=4)
    twin.append(rng, 6, lengths=[6, 0, 3, 1])
    chosen = twin.cache.select([3, 0, 0, 2, 1])
    twin.append(rng, 1)
    assert chosen.lengths.tolist() == [1, 6, 6, 3, 0]
    k = twin.backend.get(twin.cache.keys)
    assert (backend.get(chosen.keys)[1, :, :6] == k[0, :, :6]).all()
    assert twin.cache.select([]).batch_size == 0


def test_clear(backend, rng):
    twin = Twin(backend, window=(10, 0))
    twin.append(rng, 40)
    twin.cache.clear()
    assert twin.cache.seqlen == 0 and twin.cache.capacity == 16
    twin.pairs = [(keys[:0], values[:0]) for keys, values in twin.pairs]
    twin.attend(rng, 5, 5)
    twin.check()


def test_a_cache_that_holds_nothing(backend, rng):
    twin = Twin(backend)
    twin.cache.reorder([2, 1, 0])
    twin.attend(rng, 2)
    with pytest.raises(ValueError, match="cache: got one that has no memory yet"):
        twin.cache.keys  # noqa: B018
    twin.attend(rng, 1, 1)


# --------------------------------------------------------------------------------------- anything, in any order


@pytest.mark.parametrize("window", [None, (18, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_random_operations(backend, rng, form, window):
    for _ in range(4):
        twin = Twin(backend, form, batch=int(rng.integers(1, 5)), dtype="float16", max_seqlen=150, window=window)
        for _ in range(25):
            batch, room = len(twin.pairs), 150 - twin.cache.seqlen
            seqlen = min(int(rng.choice([1, 1, 1, 2, 8, 40])), room)
            match rng.integers(6):
                case 0:
                    twin.append(rng, seqlen, lengths=rng.integers(0, seqlen + 1, batch))
                case 1:
                    index = rng.integers(0, batch, batch)
                    twin.cache.reorder(index)
                    twin.pairs = [twin.pairs[i] for i in index]
                case 2:
                    index = rng.integers(0, batch, int(rng.integers(1, 5)))
                    twin.cache = twin.cache.select(index)
                    twin.pairs = [twin.pairs[i] for i in index]
                case 3:
                    twin.attend(rng, 1)
                case _ if seqlen:
                    twin.attend(rng, seqlen, seqlen, causal=bool(rng.integers(2)))
            twin.check()


# ------------------------------------------------------------------------------------------------ other libraries


@pytest.mark.parametrize("window", [None, (9, 0)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch(rng, device, form, window):
    torch = pytest.importorskip("torch")
    layout = "BSHD" if form == "packed" else form
    given = {"packed": form == "packed", "layout": layout, "window": window}
    lazy = initialize_kv_cache(2, 2, 64, 32, **given)
    eager = initialize_kv_cache(2, 2, 64, 32, dtype=torch.bfloat16, device=device, **given)
    for seqlen in (20, 1, 1, 12):
        q, k, v = (torch.randn(2, seqlen, heads, 32, dtype=torch.bfloat16, device=device) for heads in (4, 2, 2))
        q, k, v = (turned(x, layout) for x in (q, k, v))
        for cache in (lazy, eager):
            out = cache.attend(q, k, v, causal=True)
            assert isinstance(out, torch.Tensor) and out.shape == q.shape and out.dtype == torch.bfloat16
            cache.reorder(torch.tensor([1, 0], device=device))
        assert torch.equal(lazy.keys, eager.keys) and torch.equal(lazy.values, eager.values)
    lazy.append(k, v, lengths=torch.tensor([2, 5], device=device))
    assert lazy.lengths.tolist() == [36, 39] and lazy.expand(2).keys.device.type == device
    assert repr(lazy).startswith("KVCache(2 sequences of 36 to 39 tokens")


@pytest.mark.parametrize("window", [None, (9, 0)])
def test_jax(rng, window):
    """The cache itself is NumPy's or CuPy's, results are JAX's."""
    jax = pytest.importorskip("jax")
    host = [normal(rng, (2, 2, 20, 32), "float32") for _ in "qkv"]
    twin_cache = initialize_kv_cache(2, 2, 64, 32, window=window)
    cache = initialize_kv_cache(2, 2, 64, 32, window=window)
    for rows in (slice(0, 12), slice(12, 20)):
        given = [np.ascontiguousarray(x[:, :, rows]) for x in host]
        out = cache.attend(*(jax.numpy.asarray(x) for x in given), causal=True)
        assert isinstance(out, jax.Array)
        assert np.allclose(np.asarray(out), twin_cache.attend(*given, causal=True), rtol=0, atol=1e-5)
    cache.append(*(jax.numpy.asarray(x) for x in host[1:]), lengths=[1, 3])
    cache.reorder(jax.numpy.asarray([1, 1]))
    assert cache.lengths.tolist() == [23, 23]


# ------------------------------------------------------------------------------------------------------- refused


def state(backend, cache):
    arrays = [backend.get(x).tobytes() for x in (cache.keys, cache.values)] if cache.capacity else []
    return cache.lengths.tolist(), cache.capacity, arrays


def zeros(*shape, dtype=np.float16):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize("window", [None, (20, 0)])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, p: c.append(p(zeros(2, 2, 31, 8)), p(zeros(2, 2, 31, 8))), CacheFull, "k: got 31 new tokens"),
        (lambda c, p: c.append(p(zeros(2, 3, 1, 8)), p(zeros(2, 3, 1, 8))), ValueError, r"k: got shape \(2, 3, 1, 8\)"),
        (lambda c, p: c.append(p(zeros(3, 2, 1, 8)), p(zeros(3, 2, 1, 8))), ValueError, r"expected \(2, 2, 1, 8\)"),
        (lambda c, p: c.append(p(zeros(2, 2, 1, 9)), p(zeros(2, 2, 1, 9))), ValueError, r"k: got shape \(2, 2, 1, 9\)"),
        (lambda c, p: c.append(p(zeros(2, 2, 1, 8)), p(zeros(2, 2, 2, 8))), ValueError, "v: got 2 tokens"),
        (lambda c, p: c.append(p(zeros(2, 2, 8)), p(zeros(2, 2, 8))), ValueError, "k: got 3-D shape"),
        (lambda c, p: c.append([[1]], p(zeros(2, 2, 1, 8))), TypeError, "k: got a list"),
        (lambda c, p: c.append(p(zeros(2, 2, 1, 8)), None), TypeError, "v: got None"),
        (
            lambda c, p: c.append(p(zeros(2, 2, 1, 8, dtype=np.int32)), p(zeros(2, 2, 1, 8, dtype=np.int32))),
            TypeError,
            "k: got int32",
        ),
        (lambda c, p: c.append(p(zeros(2, 2, 4, 8)), p(zeros(2, 2, 4, 8)), lengths=[5, 1]), ValueError, "lengths: got"),
        (
            lambda c, p: c.append(p(zeros(2, 2, 4, 8)), p(zeros(2, 2, 4, 8)), lengths=[1]),
            ValueError,
            "lengths: got 1 l",
        ),
        (
            lambda c, p: c.append(p(zeros(2, 2, 4, 8)), p(zeros(2, 2, 4, 8)), lengths=[1.5, 1]),
            TypeError,
            "lengths: got float64",
        ),
        (lambda c, p: c.attend(p(zeros(2, 3, 1, 8)), *[p(zeros(2, 2, 1, 8))] * 2), ValueError, "heads"),
        (lambda c, p: c.attend(p(zeros(2, 2, 1, 8)), p(zeros(2, 2, 1, 8))), TypeError, "v: got None"),
        (lambda c, p: c.attend(*[p(zeros(2, 2, 1, 8))] * 3, softcap=-1), ValueError, "softcap"),
        (lambda c, p: c.attend(*[p(zeros(2, 2, 1, 8))] * 3, kernel="none"), ValueError, "kernel"),
        (lambda c, p: c.attend(*[p(zeros(2, 2, 31, 8))] * 3), CacheFull, "k: got 31 new tokens"),
        (lambda c, p: c.attend(p(zeros(2, 2, 1))), ValueError, "q: got 3-D"),
        (lambda c, p: c.attend(*[p(zeros(2, 2, 1, 8))] * 3, window="x"), (TypeError, ValueError), "window"),
        (lambda c, p: c.reorder([0, 2]), IndexError, r"beam_idx: got 2 at \[1\], expected 0 to 1"),
        (lambda c, p: c.reorder([-1, 0]), IndexError, r"beam_idx: got -1 at \[0\]"),
        (lambda c, p: c.reorder(p(np.array([0, 9]))), IndexError, r"beam_idx: got 9 at \[1\]"),
        (lambda c, p: c.reorder([0, 1, 1]), ValueError, "beam_idx: got 3 indices"),
        (lambda c, p: c.reorder([0.0, 1.0]), TypeError, "beam_idx: got float64"),
        (lambda c, p: c.reorder([[0, 1]]), ValueError, "beam_idx: got 2-D"),
        (lambda c, p: c.reorder(None), TypeError, "beam_idx"),
        (lambda c, p: c.select([5]), IndexError, "sequences: got 5"),
        (lambda c, p: c.expand(0), ValueError, "beam_size: got 0"),
        (lambda c, p: c.expand(1.5), TypeError, "beam_size"),
        (lambda c, p: c.kv, ValueError, "kv: got a cache with keys and values apart"),
    ],
)
def test_refused_and_unchanged(backend, rng, call, error, message, filled, window):
    cache = initialize_kv_cache(2, 2, 30, 8, window=window)
    if filled:
        cache.append(*(backend.put(x) for x in normal(rng, (2, 2, 2, 25, 8), "float16")), lengths=[25, 3])
    before = state(backend, cache)
    with pytest.raises(error, match=message):
        call(cache, backend.put)
    assert state(backend, cache) == before


def test_another_dtype_or_device_than_the_cache(backend, rng):
    cache = initialize_kv_cache(1, 1, None, 8)
    cache.append(*(backend.put(x) for x in normal(rng, (2, 1, 1, 3, 8), "float16")))
    before = state(backend, cache)
    with pytest.raises(TypeError, match="k_cache: got float16, expected k's dtype float32"):
        cache.append(*(backend.put(x) for x in normal(rng, (2, 1, 1, 30, 8), "float32")))
    if backend.on_gpu:
        with pytest.raises(ValueError, match="device"):
            cache.append(*normal(rng, (2, 1, 1, 1, 8), "float16"))
    assert state(backend, cache) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: initialize_kv_cache(0, 1, 8, 8), ValueError, "batch_size: got 0"),
        (lambda: initialize_kv_cache(1, 1.5, 8, 8), TypeError, "num_heads"),
        (lambda: initialize_kv_cache(1, 1, 0, 8), ValueError, "max_seqlen: got 0"),
        (lambda: initialize_kv_cache(1, 1, 8, 8, layout="NHD"), ValueError, "layout: got 'NHD'"),
        (lambda: initialize_kv_cache(1, 1, 8, 8, window=(-1, 0)), ValueError, "window"),
        (lambda: initialize_kv_cache(1, 1, 8, 8, window=5), TypeError, "window: got 5"),
        (lambda: initialize_kv_cache(1, 1, 8, 8, dtype="float17"), TypeError, "dtype: got 'float17'"),
        (lambda: initialize_kv_cache(1, 1, 8, 8, device="cpu"), ValueError, "dtype: got None"),
        (lambda: initialize_kv_cache(1, 1, 8, 8, dtype="float16", device="tpu"), ValueError, "device: got 'tpu'"),
        (lambda: initialize_kv_cache(1, 1, 8, 8, dtype="float16", device=1.5), TypeError, "device: got 1.5"),
        (lambda: initialize_kv_cache(1, 1, 8, 8, packed=True, head_dim_v=4), ValueError, "head_dim_v: got 4"),
        (lambda: KVCache(zeros(1, 1, 4, 8), zeros(1, 1, 5, 8)), ValueError, "values: got shape"),
        (lambda: KVCache(zeros(1, 1, 4, 8), zeros(1, 1, 4, 8, dtype=np.float32)), TypeError, "values: got float32"),
        (lambda: KVCache(zeros(1, 4, 8), zeros(1, 4, 8)), ValueError, "keys: got 3-D"),
        (lambda: KVCache([1], zeros(1, 1, 4, 8)), TypeError, "keys: got a list"),
        (lambda: KVCache(*[np.broadcast_to(np.float16(0), (1, 1, 4, 8))] * 2), TypeError, "keys: got a read-only"),
        (lambda: KVCache(*[zeros(1, 1, 4, 8)] * 2, [5]), ValueError, "lengths: got 5 to 5"),
        (lambda: KVCache(*[zeros(1, 1, 4, 8)] * 2, max_seqlen=3), CacheFull, "lengths: got 0 new tokens"),
        (lambda: KVCache.from_packed(zeros(1, 4, 1, 8)), ValueError, "kv: got shape"),
        (lambda: KVCache.from_packed(zeros(1, 4, 3, 1, 8)), ValueError, "kv: got shape"),
        (lambda: incremental_attention(zeros(1, 1, 1, 8), {}), TypeError, "kv_cache: got a dict"),
        (lambda: update_kv_cache(None, None, None), TypeError, "kv_cache: got a NoneType"),
        (lambda: reorder_kv_cache(None, [0]), TypeError, "kv_cache"),
        (
            lambda: flash_attention_with_kv_cache(
                *[zeros(1, 1, 1, 8)] * 3, initialize_kv_cache(1, 1, 8, 8), max_seqlen=9
            ),
            ValueError,
            "kv_cache: got a cache with layout or max_seqlen",
        ),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr(backend, rng):
    cache = initialize_kv_cache(2, 2, None, 8, window=(20, 0), packed=True, layout="BSHD")
    assert repr(cache) == ("KVCache(2 sequences of 0 tokens, room for 0, 2 heads of 8, BSHD, packed, window (20, 0))")
    cache.append(*(backend.put(x) for x in normal(rng, (2, 2, 3, 2, 8), "float16")), lengths=[1, 3])
    where = "cuda:0" if backend.on_gpu else "cpu"
    expected = f"2 sequences of 1 to 3 tokens, room for 32, 2 heads of 8, float16, {where}, BSHD, packed"
    assert repr(cache) == f"KVCache({expected}, window (20, 0))"


def test_docstring_examples():
    assert doctest.testmod(dense).failed == 0
