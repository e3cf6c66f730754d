"""Decoding behind a prefix that all sequences share, against the oracle with the prefix put before each sequence's own
keys, on both backends."""

from __future__ import annotations

import doctest
import sys

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import FLOAT32, TINIEST, UNIT_ROUNDOFF, normal
from test_arrays import at_address
from test_decode import DTYPES, FP8, SCALES, array, dense, held, ints, paged
from test_forward import features
from test_launch import launches  # noqa: F401 (a fixture)

import cupyattn
from cupyattn import attention_with_shared_prefix
from cupyattn.plan import DEVICES

module = sys.modules["cupyattn.shared_prefix"]
SEQLEN = 100  # of the prefix


def put(backend, options):
    return {name: backend.put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def shared(backend, q, prefix, cache, **options):
    """Run it, the output poisoned beforehand. Returns (out, lse, the cache afterwards)."""
    here, out = backend.put(cache.array.copy()), backend.put(np.full(q.shape, np.nan, q.dtype))
    options = put(backend, options | cache.places)
    caches = cache.split(here)
    prefix = (backend.put(x) for x in prefix)
    result, lse = attention_with_shared_prefix(backend.put(q), *prefix, *caches, **options, out=out, return_lse=True)
    assert result is out
    return backend.get(result), backend.get(lse), backend.get(here)


def concatenated(q, prefix, pairs, **options):
    """What the oracle says where every sequence's keys begin with the prefix's."""
    whole = [tuple(np.concatenate([before, own]) for before, own in zip(prefix, pair, strict=True)) for pair in pairs]
    lengths = ints(*(len(keys) for keys, _ in whole))
    rows = int(lengths.max(initial=1)) + (options["k"].shape[1] if "k" in options else 0)
    return oracle.attention_with_kvcache(q, *dense(whole, rows).array, cache_seqlens=lengths, **options)


def check(expected, out, lse, dtype):
    """Within the bounds of one attention, plus one more rounding of each part to dtype, and float32's in the merge."""
    out_bound, lse_bound = expected.bounds(dtype)
    out_bound = out_bound + (UNIT_ROUNDOFF[dtype] + 32 * FLOAT32) * expected.weight + TINIEST[dtype]
    lse_bound = lse_bound + 32 * FLOAT32 * (1 + np.abs(expected.lse))
    assert (np.abs(out.astype(np.float64) - expected.out) <= out_bound).all()
    with np.errstate(invalid="ignore"):
        assert ((np.abs(lse - expected.lse) <= lse_bound) | (lse == expected.lse)).all()


def agrees(backend, q, prefix, cache, pairs, prefix_given=None, prefix_seqlen=None, **options):
    """Results as the oracle has them, and the cache as it was. prefix_given holds more rows than the prefix has."""
    given = prefix if prefix_given is None else prefix_given
    out, lse, stored = shared(backend, q, given, cache, **options, prefix_seqlen=prefix_seqlen)
    if "k" not in options:
        assert stored.tobytes() == cache.array.tobytes()
    masks = {name: x for name, x in options.items() if name not in ("cache_seqlens", "num_splits")}
    check(concatenated(q, prefix, pairs, **masks), out, lse, q.dtype.name)


LENGTHS = [5, 1, 17, 64, 100]


def case(rng, dtype="float16", seqlen_q=1, heads=8, kv_heads=2, head_dim=64, kv_dtype=None, lengths=LENGTHS):
    """(q, the prefix's keys and values, those of each sequence)."""
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype}
    (prefix,) = held(rng, dtype, [SEQLEN], **sizes)
    pairs = held(rng, dtype, lengths, **sizes)
    return normal(rng, (len(lengths), seqlen_q, heads, head_dim), dtype), prefix, pairs


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.when(holds=lambda backend, dtype, seqlen_q: not backend.on_gpu or dtype == "bfloat16" or seqlen_q == 1)
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(backend, rng, dtype, seqlen_q):
    """Queries see the whole prefix, and their own tokens up to themselves or all of them."""
    lengths = [5, 4, 17, 64, 100]
    q, prefix, pairs = case(rng, dtype, seqlen_q, lengths=lengths)
    for causal in (False, True):
        options = {"cache_seqlens": ints(*lengths), "causal": causal}
        agrees(backend, q, prefix, dense(pairs, 100), pairs, **options)
        agrees(backend, q, prefix, dense(pairs, 100, [3, 6, 0, 5, 1]), pairs, **options)


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_paged(backend, rng, layout):
    """A prefix in blocks of a pool of its own, or of the cache's, all of it or so many tokens."""
    q, prefix, pairs = case(rng)
    cache = paged(rng, pairs, 16, layout)
    agrees(backend, q, prefix, cache, pairs, cache_seqlens=ints(*LENGTHS))
    both = paged(rng, [*pairs, prefix], 16, layout)
    table = both.places["block_table"]
    both.places["block_table"] = table[:-1].copy()
    options = {"prefix_block_table": table[-1].copy(), "cache_seqlens": ints(*LENGTHS)}
    blocks = both.split(both.array)
    for seqlen in (SEQLEN, ints(SEQLEN)):
        out, lse, stored = shared(backend, q, blocks, both, **options, prefix_seqlen=seqlen)
        assert stored.tobytes() == both.array.tobytes()
        check(concatenated(q, prefix, pairs), out, lse, "float16")
    whole = [rows[:96] for rows in prefix]  # six blocks
    options["prefix_block_table"] = table[-1, :6].copy()
    out, lse, _ = shared(backend, q, blocks, both, **options)
    check(concatenated(q, whole, pairs), out, lse, "float16")


@pytest.mark.backends("numpy", "cuda")
def test_a_part_of_a_dense_prefix(backend, rng):
    q, prefix, pairs = case(rng)
    longer = [np.pad(x, [(0, 9), (0, 0), (0, 0)], constant_values=np.nan) for x in prefix]
    options = {"cache_seqlens": ints(*LENGTHS), "prefix_given": longer}
    for seqlen in (SEQLEN, ints(SEQLEN), np.int64(SEQLEN)):
        agrees(backend, q, prefix, dense(pairs, 100), pairs, **options, prefix_seqlen=seqlen)


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize("block_size", [0, 16], ids=["dense", "paged"])
def test_many_queries_over_a_long_prefix(backend, rng, block_size):
    """So many that the forward kernel reads the prefix, and splits its keys."""
    lengths = rng.integers(3, 40, 24).tolist()
    q = normal(rng, (24, 3, 8, 64), "bfloat16")
    (prefix,) = held(rng, "bfloat16", [4500], kv_heads=2)
    pairs = held(rng, "bfloat16", lengths, kv_heads=2)
    cache = paged(rng, pairs, block_size) if block_size else dense(pairs, 40)
    options = {"cache_seqlens": ints(*lengths), "causal": True}
    agrees(backend, q, prefix, cache, pairs, **options)
    shorter = [rows[:3001] for rows in prefix]
    agrees(backend, q, shorter, cache, pairs, **options, prefix_given=prefix, prefix_seqlen=ints(3001))


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize(
    "names", [("sinks",), ("softcap",), ("sinks", "softcap", "causal"), ("negative_scale",)], ids="-".join
)
def test_features(backend, rng, names):
    q, prefix, pairs = case(rng)
    options = {"cache_seqlens": ints(*LENGTHS)} | features(rng, *names, heads=8)
    agrees(backend, q, prefix, paged(rng, pairs, 16), pairs, **options)


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize("sinks", [False, True])
def test_one_part_may_be_empty(backend, rng, sinks):
    """Without a prefix the call is attention_with_kvcache; without own keys it is attention over the prefix."""
    lengths = [5, 0, 17, 0, 100]
    q, prefix, pairs = case(rng, seqlen_q=3, lengths=lengths)
    options = {"cache_seqlens": ints(*lengths)} | (features(rng, "sinks", heads=8) if sinks else {})
    cache = dense(pairs, 100)
    agrees(backend, q, prefix, cache, pairs, **options)
    none = [rows[:0] for rows in prefix]
    for causal in (False, True):
        agrees(backend, q, none, cache, pairs, **options, causal=causal)
    agrees(backend, q, none, cache, pairs, **options, prefix_seqlen=0, prefix_given=prefix)
    out, lse, _ = shared(backend, q, prefix, cache, **options | {"cache_seqlens": 0}, causal=True)
    del options["cache_seqlens"]
    check(concatenated(q, prefix, [(rows[:0], rows[:0]) for rows, _ in pairs], **options), out, lse, "float16")


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kv_dtype", FP8)
def test_fp8(backend, rng, kv_dtype, scales):
    q, prefix, pairs = case(rng, kv_dtype=kv_dtype)
    options = {"cache_seqlens": ints(*LENGTHS), "kv_dtype": kv_dtype} | SCALES[scales](2)
    agrees(backend, q, prefix, paged(rng, pairs, 16), pairs, **options)


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize("block_size", [0, 16], ids=["dense", "paged"])
def test_append(backend, rng, block_size):
    q, prefix, pairs = case(rng, seqlen_q=3)
    k, v = normal(rng, (2, 5, 3, 2, 64), "float16")
    cache = paged(rng, pairs, 16, capacity=103) if block_size else dense(pairs, 103)
    new = {"k": k, "v": v}
    options = new | {"cache_seqlens": ints(*LENGTHS), "causal": True}
    agrees(backend, q, prefix, cache, pairs, **options)
    stored = shared(backend, q, prefix, cache, **options)[2]
    expected = oracle.append_kv(*cache.split(cache.array), **new, cache_seqlens=ints(*LENGTHS), **cache.places)
    for got, wanted in zip(cache.split(stored), expected, strict=True):
        assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(wanted).tobytes()


@pytest.mark.backends("numpy", "cuda")
def test_leftpad_and_splits(backend, rng):
    q, prefix, pairs = case(rng)
    padding = [0, 1, 4, 63, 33]
    own = [tuple(rows[skipped:] for rows in pair) for pair, skipped in zip(pairs, padding, strict=True)]
    options = {"cache_seqlens": ints(*LENGTHS), "cache_leftpad": ints(*padding), "num_splits": 3}
    out, lse, _ = shared(backend, q, prefix, dense(pairs, 100), **options)
    check(concatenated(q, prefix, own), out, lse, "float16")


@pytest.mark.backends("numpy", "cuda")
def test_strides(backend, rng):
    """Queries cut from a projection, a prefix and an output with heads before rows."""
    q, prefix, pairs = case(rng, seqlen_q=2)
    joint = backend.put(np.concatenate([q, q[:, :, :4]], axis=2))[:, :, :8]
    turned = [backend.put(np.ascontiguousarray(x.swapaxes(0, 1))).swapaxes(0, 1) for x in prefix]
    cache = backend.put(dense(pairs, 100).array)
    lengths = backend.put(ints(*LENGTHS))
    out = backend.put(np.full((5, 8, 2, 64), np.nan, np.float16)).swapaxes(1, 2)
    result = attention_with_shared_prefix(joint, *turned, *cache, cache_seqlens=lengths, out=out)
    assert result is out
    expected = concatenated(q, prefix, pairs)
    check(expected, backend.get(out), expected.lse, "float16")
    every_other = backend.put(np.concatenate([q, q], axis=1))
    with pytest.raises(ValueError, match=r"^q: got strides .*, queries that are not evenly spaced over the batch"):
        attention_with_shared_prefix(every_other[:, :2], *turned, *cache, cache_seqlens=lengths)
    single = every_other[:, :1]
    assert attention_with_shared_prefix(single, *turned, *cache, cache_seqlens=lengths).shape == (5, 1, 8, 64)


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize(("batch", "seqlen_q"), [(0, 1), (2, 0), (1, 3)])
def test_few_queries(backend, rng, batch, seqlen_q):
    q, prefix, pairs = case(rng, seqlen_q=seqlen_q, lengths=[9] * max(batch, 1))
    arrays = q[:batch], *prefix, *dense(pairs, 9).array[:, :batch]
    out, lse = attention_with_shared_prefix(*(backend.put(x) for x in arrays), return_lse=True)
    assert out.shape == (batch, seqlen_q, 8, 64) and lse.shape == (batch, 8, seqlen_q)
    if batch == 1:
        check(concatenated(q, prefix, pairs), backend.get(out), backend.get(lse), "float16")


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_other_libraries(rng, library):
    made = pytest.importorskip("torch" if library == "torch" else "jax.numpy")
    convert = made.from_numpy if library == "torch" else made.asarray
    q, prefix, pairs = case(rng, "float32", seqlen_q=2)
    arrays = [q, *prefix, *dense(pairs, 100).array]
    expected = attention_with_shared_prefix(*arrays, cache_seqlens=ints(*LENGTHS), return_lse=True)
    lengths = convert(ints(*LENGTHS))
    got = attention_with_shared_prefix(*(convert(x) for x in arrays), cache_seqlens=lengths, return_lse=True)
    for one, other in zip(got, expected, strict=True):
        assert type(one) is type(convert(q))
        np.testing.assert_array_equal(np.asarray(one), other)


def test_torchs_own_fp8(rng):
    torch = pytest.importorskip("torch")
    q, prefix, pairs = case(rng, kv_dtype=FP8[0])
    scales = {"cache_seqlens": ints(*LENGTHS), "k_scale": 0.5, "v_scale": 2.0}
    caches = dense(pairs, 100).array
    expected = attention_with_shared_prefix(q, *prefix, *caches, **scales, kv_dtype="e4m3")
    own = (torch.from_numpy(x).view(torch.float8_e4m3fn) for x in (*prefix, *caches))
    got = attention_with_shared_prefix(torch.from_numpy(q), *own, **scales)
    assert got.numpy().tobytes() == expected.tobytes()


@pytest.mark.backends("numpy", "cuda")
def test_random_calls(backend):
    @settings(max_examples=10 if backend.on_gpu else 150)
    @given(st.data())
    def holds(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        seqlen_q = data.draw(st.integers(1, 3))
        lengths = data.draw(st.lists(st.integers(seqlen_q, 90), min_size=1, max_size=6))
        sizes, heads = {}, 8
        if not backend.on_gpu:
            sizes = {name: data.draw(st.integers(1, most)) for name, most in (("head_dim", 33), ("kv_heads", 3))}
            heads = sizes["kv_heads"] * data.draw(st.integers(1, 3))
        q, prefix, pairs = case(rng, seqlen_q=seqlen_q, heads=heads, lengths=lengths, **sizes)
        cache = paged(rng, pairs, 16) if data.draw(st.booleans()) else dense(pairs, 90)
        names = data.draw(st.sets(st.sampled_from(["causal", "sinks"])))
        options = {"cache_seqlens": ints(*lengths)} | features(rng, *names, heads=heads)
        agrees(backend, q, prefix, cache, pairs, **options)

    holds()


# ------------------------------------------------------------------------------------------------ bad input

REFUSED = {
    "window": ({"window": (5, 0)}, r"window: got \(5, 0\), expected None: every query sees the whole prefix"),
    "slopes": ({"alibi_slopes": array(8, dtype="float32")}, "alibi_slopes: got an array, expected None: the bias"),
    "float64": ({"kernel": "numpy_float64"}, "kernel: got 'numpy_float64', expected .* merged in float32"),
    "no kernel": ({"kernel": "fast"}, "kernel: got 'fast'"),
    "four dimensions": ({"k_prefix": array(1, 100, 2, 64)}, r"k_prefix: got 4-D shape .*, or prefix_block_table"),
    "other heads": (
        dict.fromkeys(("k_prefix", "v_prefix"), array(100, 4, 64)),
        "k_prefix: got 4 heads, expected k_cache",
    ),
    "other head_dim": ({"k_prefix": array(100, 2, 32)}, "k_prefix: got head_dim 32, expected 64"),
    "other values": ({"v_prefix": array(99, 2, 64)}, "v_prefix: got shape .*, expected k_prefix's shape"),
    "other dtype": ({"v_prefix": array(100, 2, 64, dtype="float32")}, "v_prefix: got float32, expected q's dtype"),
    "too long": ({"prefix_seqlen": 101}, "prefix_seqlen: got 101, expected 0 to 100"),
    "negative": ({"prefix_seqlen": ints(-1)}, "prefix_seqlen: got -1, expected 0 to 100"),
    "two lengths": ({"prefix_seqlen": ints(50, 50)}, r"prefix_seqlen: got shape \(2,\), expected \(1,\)"),
    "half a token": ({"prefix_seqlen": 0.5}, "prefix_seqlen: got 0.5, expected an int"),
    "no keys": (
        {"prefix_seqlen": ints(0), "sinks": array(8, dtype="float32")},
        "prefix_seqlen: got an array that holds 0",
    ),
    "tables of two dimensions": ({"prefix_block_table": array(1, 7, dtype="int32")}, "prefix_block_table: got 2-D"),
    "table of int64": ({"prefix_block_table": array(7, dtype="int64")}, "prefix_block_table: got int64, expected"),
    "lengths": ({"cache_seqlens": ints(5, 20)}, "cache_seqlens: got 20 tokens for sequence 1 plus 2 new"),
    "scale": ({"k_scale": 1.0}, "k_scale: got a scale"),
    "out": ({"out": array(2, 2, 8, 63)}, "out: got shape"),
    "lse": ({"return_lse": "yes"}, "return_lse: got 'yes', expected True or False"),
}


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_calls_write_nothing(backend, rng, name):
    bad, message = REFUSED[name]
    q, prefix, pairs = case(rng, seqlen_q=2, lengths=[5, 17])
    cache = backend.put(dense(pairs, 20).array)
    before = backend.get(cache).tobytes()
    k, v = normal(rng, (2, 2, 2, 2, 64), "float16")
    arguments = {"q": q, "k_prefix": prefix[0], "v_prefix": prefix[1], "k_cache": cache[0], "v_cache": cache[1]}
    arguments |= {"k": k, "v": v, "cache_seqlens": ints(5, 17)}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        attention_with_shared_prefix(**put(backend, arguments | bad), check=True)
    assert backend.get(cache).tobytes() == before


@pytest.mark.backends("numpy", "cuda")
def test_blocks_of_the_prefix_must_exist(backend, rng):
    q, prefix, pairs = case(rng)
    blocks = paged(rng, [prefix], 16)
    cache = backend.put(dense(pairs, 100).array)
    given = [backend.put(x) for x in blocks.split(blocks.array)]
    for place in (0, 6):
        table = blocks.places["block_table"][0].copy()
        table[place] = len(blocks.array)
        options = put(backend, {"prefix_block_table": table, "cache_seqlens": ints(*LENGTHS)})
        with pytest.raises(ValueError, match=rf"^prefix_block_table: got block {len(blocks.array)} at \[{place}\]"):
            attention_with_shared_prefix(backend.put(q), *given, *cache, **options, prefix_seqlen=SEQLEN, check=True)


@pytest.mark.backends("numpy", "cuda")
def test_out_must_not_lie_on_an_input(backend, rng):
    q, prefix, pairs = case(rng)
    room = backend.put(np.zeros((2, 100, 2, 64), np.float16))
    cache = backend.put(dense(pairs, 100).array)
    arrays = {"q": backend.put(q), "k_prefix": room[0], "v_prefix": room[1], "k_cache": cache[0], "v_cache": cache[1]}
    for name in arrays:
        out = arrays[name].reshape(-1)[: q.size].reshape(q.shape)
        with pytest.raises(ValueError, match=f"^out: got an array whose memory range meets {name}'s"):
            attention_with_shared_prefix(**arrays, out=out)


# ---------------------------------------------------------------------------------- launches, CUDA stood in for


@pytest.mark.parametrize(
    ("arch", "dtype", "kernel"),
    [("90a", "float16", "decode"), ("75", "float16", "forward_sm80"), ("90a", "float32", "forward_simt")],
)
def test_the_prefix_is_one_sequence_of_all_queries(launches, monkeypatch, arch, dtype, kernel):  # noqa: F811
    monkeypatch.setattr("cupyattn.kernels.merge.enqueue", launches.enqueue)
    monkeypatch.setattr("cupyattn.kernels.merge.describe_device", lambda device: DEVICES[arch])
    launches.arch = arch
    q = at_address(0x100000, (40, 1, 1, 64), dtype)
    prefix = (at_address(at, (100, 1, 64), dtype) for at in (0x200000, 0x300000))
    caches = (at_address(at, (40, 80, 1, 64), dtype) for at in (0x400000, 0x500000))
    attention_with_shared_prefix(q, *prefix, *caches)
    assert launches.kernels == [kernel, kernel, "merge_states"]


@pytest.mark.gpu
def test_a_graph_sees_the_prefix_grow(rng):
    import cupy

    q, prefix, pairs = case(rng, seqlen_q=2)
    arrays = [cupy.asarray(x) for x in (q, *prefix, *dense(pairs, 100).array)]
    options = {"cache_seqlens": cupy.asarray(ints(*LENGTHS)), "prefix_seqlen": cupy.asarray(ints(1)), "causal": True}
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        attention_with_shared_prefix(*arrays, **options)
        stream.begin_capture()
        out, lse = attention_with_shared_prefix(*arrays, **options, return_lse=True)
        graph = stream.end_capture()
        for seqlen in (1, 17, 64, 100):
            options["prefix_seqlen"].fill(seqlen)
            out.fill(np.nan)
            graph.launch(stream)
            expected = attention_with_shared_prefix(*arrays, **options, return_lse=True)
            for one, other in zip((out, lse), expected, strict=True):
                assert one.get().tobytes() == other.get().tobytes()


def test_examples():
    results = doctest.testmod(module)
    assert results.attempted and not results.failed
    assert "attention_with_shared_prefix" in cupyattn.__all__
