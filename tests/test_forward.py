"""The forward pass on every backend against the oracle: one body of tests for NumPy and for each CUDA kernel.

Data is fresh in every run; outputs are NaN before a call, as is every row of a cache that no sequence owns. On CUDA
each new combination of head_dim, dtype, mask features, block size and alignment is compiled on first use, so
that the wide sweeps run under kernel="auto" alone, and everything else keeps to few shapes.
"""

from __future__ import annotations

import warnings

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import cumulative, dense_cache, normal, paged_cache

DTYPES = ("float16", "bfloat16", "float32")
HALF = ("float16", "bfloat16")
HEAD_DIMS = (1, 2, 3, 5, 7, 8, 13, 16, 24, 31, 33, 40, 63, 64, 65, 72, 80, 96, 100, 104, 112, 127, 128, 129, 160)
HEAD_DIMS += (192, 200, 224, 255, 256)

sweep = pytest.mark.backends("numpy", "cuda")  # what compiles many variants runs under kernel="auto" alone


def qkv(rng, dtype, *, batch=2, seqlen_q=70, seqlen_k=100, heads=4, kv_heads=2, head_dim=64):
    """Dense q, k and v."""
    q = normal(rng, (batch, seqlen_q, heads, head_dim), dtype)
    k, v = normal(rng, (2, batch, seqlen_k, kv_heads, head_dim), dtype)
    return q, k, v


def packed(rng, dtype, lengths_q, lengths_k, *, heads=4, kv_heads=2, head_dim=64):
    """Packed q, k and v, and their cu_seqlens."""
    q = normal(rng, (sum(lengths_q), heads, head_dim), dtype)
    k, v = normal(rng, (2, sum(lengths_k), kv_heads, head_dim), dtype)
    return q, k, v, cumulative(lengths_q), cumulative(lengths_k)


def sequences(rng, dtype, lengths, *, kv_heads=2, head_dim=64):
    """(keys, values) of each sequence."""
    return [tuple(normal(rng, (2, length, kv_heads, head_dim), dtype)) for length in lengths]


def paged(backend, rng, pairs, block_size, layout="NHD", combined=True, capacity=0):
    """Paged k and v, combined in one 5-D array or apart, and the block table."""
    cache, table = paged_cache(rng, pairs, block_size, capacity)
    if layout == "HND":
        cache = np.ascontiguousarray(cache.swapaxes(2, 3))
    if combined:
        return backend.place(cache, lambda c: c[:, 0]), backend.place(cache, lambda c: c[:, 1]), table
    return np.ascontiguousarray(cache[:, 0]), np.ascontiguousarray(cache[:, 1]), table


def features(rng, *names, batch=2, heads=4):
    """The options behind short names, with random slopes and sinks."""
    options = {
        "causal": {"causal": True},
        "window": {"window": (17, 5)},
        "softcap": {"softcap": 2.5},
        "alibi": {"alibi_slopes": rng.uniform(-0.1, 0.3, heads).astype(np.float32)},
        "batch_alibi": {"alibi_slopes": rng.uniform(-0.1, 0.3, (batch, heads)).astype(np.float32)},
        "sinks": {"sinks": (2 * rng.standard_normal(heads)).astype(np.float32)},
        "negative_scale": {"softmax_scale": -0.2},
        "zero_scale": {"softmax_scale": 0.0},
        "large_scale": {"softmax_scale": 3.0},
    }
    return {key: value for name in names for key, value in options[name].items()}


# --------------------------------------------------------------------------------------------------- head_dim


ON_CUDA = {(head_dim, HALF[i % 2]) for i, head_dim in enumerate(HEAD_DIMS) if head_dim not in (2, 5, 13, 31, 100, 200)}
ON_CUDA |= {(head_dim, "float32") for head_dim in HEAD_DIMS[4::6]}


@sweep
@pytest.mark.when(holds=lambda backend, head_dim, dtype: not backend.on_gpu or (head_dim, dtype) in ON_CUDA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(backend, rng, head_dim, dtype):
    """Every head_dim in every dtype on NumPy; on CUDA most of them in one half type, and a few in float32."""
    q, k, v = qkv(rng, dtype, batch=1, seqlen_q=37, seqlen_k=75, head_dim=head_dim)
    backend.agrees("attention", q, k, v, causal=True)


@pytest.mark.backends("cuda-simt")
@pytest.mark.parametrize("head_dim", [33, 256])
def test_head_dims_in_half_types_without_tensor_cores(backend, rng, head_dim):
    backend.agrees("attention", *qkv(rng, "bfloat16", head_dim=head_dim), causal=True)


# ------------------------------------------------------------------------------------------------------ heads


@pytest.mark.when(holds=lambda backend, dtype, **_: backend.kernel != "forward_simt" or dtype == "float32")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("seqlen_q", [1, 3, 66])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1), (5, 5), (24, 1)])
def test_heads(backend, rng, heads, kv_heads, seqlen_q, dtype):
    q, k, v = qkv(rng, dtype, seqlen_q=seqlen_q, seqlen_k=90, heads=heads, kv_heads=kv_heads)
    backend.agrees("attention", q, k, v, causal=True)


# -------------------------------------------------------------------------------------- work that fills a large GPU


MANY = {"batch": 4, "seqlen_q": 300, "seqlen_k": 700, "heads": 12, "kv_heads": 12}  # 144 tiles of 128 rows


@pytest.mark.backends("cuda")
@pytest.mark.parametrize(
    ("head_dim", "dtype", "names", "sizes"),
    [
        (64, "float16", (), {}),
        (64, "bfloat16", ("causal",), {}),
        (64, "float16", ("softcap", "window"), {}),
        (40, "float16", ("causal",), {}),
        (96, "bfloat16", ("causal",), {}),
        (128, "bfloat16", (), {}),
        (128, "float16", ("causal",), {}),
        (128, "float16", ("window", "sinks"), {}),
        (128, "float16", ("softcap", "alibi", "causal"), {}),
        (128, "float16", ("causal",), {"heads": 24, "kv_heads": 6}),
        (128, "bfloat16", ("causal",), {"batch": 2, "heads": 25, "kv_heads": 25, "seqlen_k": 2500}),  # more than L2
        (192, "float16", ("causal",), {}),
        (256, "bfloat16", ("causal",), {}),
    ],
    ids=str,
)
def test_large_tiles(backend, rng, head_dim, dtype, names, sizes):
    """Tiles of 128 rows are chosen only when there are enough of them for every multiprocessor."""
    q, k, v = qkv(rng, dtype, head_dim=head_dim, **(MANY | sizes))
    backend.agrees("attention", q, k, v, **features(rng, *names, heads=q.shape[2]))


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("is_paged", [False, True], ids=["packed", "paged"])
def test_large_tiles_of_packed_sequences(backend, rng, is_paged):
    lengths_q, lengths_k = [300, 17, 0, 450, 210], [300, 700, 90, 450, 20]
    q, k, v, cu_seqlens_q, cu_seqlens_k = packed(rng, "float16", lengths_q, lengths_k, heads=16, kv_heads=16)
    options = {}
    if is_paged:
        pairs = [
            (k[start:stop], v[start:stop]) for start, stop in zip(cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
        ]
        k, v, options["block_table"] = paged(backend, rng, pairs, 16)
    backend.agrees("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True, **options)


# ------------------------------------------------------------------------------------------------------ masks


WINDOWS = [None, (0, 0), (5, 0), (-1, 3), (7, -1), (3, 9), (64, 64), (127, 0), (128, 128), (10**6, 10**6), (-1, -1)]


@pytest.mark.when(holds=lambda backend, dtype, **_: not backend.on_gpu or dtype != "bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(backend, rng, window, causal, dtype):
    for seqlen_q, seqlen_k in ((1, 1), (1, 77), (33, 33), (130, 130), (64, 200), (200, 64), (129, 257)):
        q, k, v = qkv(rng, dtype, batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=2, kv_heads=1)
        backend.agrees("attention", q, k, v, causal=causal, window=window)


def features_compile_in(backend, dtype, names):
    """On CUDA float16 on tensor cores and float32 without, and every dtype for the longest lists; on NumPy all."""
    usual = ("float32",) if backend.kernel == "forward_simt" else ("float16", "float32")
    return not backend.on_gpu or dtype in usual or len(names) >= 4


@pytest.mark.when(holds=features_compile_in)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "names",
    [
        ("softcap",),
        ("softcap", "causal"),
        ("alibi",),
        ("alibi", "causal"),
        ("batch_alibi", "window"),
        ("sinks",),
        ("sinks", "causal"),
        ("negative_scale", "causal"),
        ("zero_scale",),
        ("large_scale", "causal"),
        ("softcap", "negative_scale"),
        ("softcap", "alibi", "sinks", "window"),
        ("softcap", "batch_alibi", "sinks", "causal", "negative_scale"),
        ("alibi", "sinks", "zero_scale", "causal"),
    ],
    ids="-".join,
)
def test_features(backend, rng, names, dtype):
    q, k, v = qkv(rng, dtype, seqlen_q=70, seqlen_k=140)
    backend.agrees("attention", q, k, v, **features(rng, *names))
    if len(names) >= 4 or not backend.on_gpu:
        q, k, v, cu_seqlens_q, cu_seqlens_k = packed(rng, dtype, [20, 33], [41, 30])
        backend.agrees("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, **features(rng, *names))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_softcap_hardly_changes_anything_but_is_not_lost(backend, rng, dtype):
    backend.agrees("attention", *qkv(rng, dtype), softcap=50.0, causal=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("softcap", [1e4, 1e6])
def test_a_softcap_far_above_the_scores_costs_no_accuracy(backend, rng, softcap, dtype):
    """Bounded as if there were no cap: c * tanh(s / c) must not lose the digits of a small s."""
    q, k, v = qkv(rng, dtype)
    expected = oracle.attention(q, k, v, softcap=softcap, causal=True)
    expected.size = oracle.attention(q, k, v, causal=True).size
    expected.check(*backend.call("attention", q, k, v, softcap=softcap, causal=True), dtype)


def test_lse_is_not_returned_unless_asked_for(backend, rng):
    import cupyattn

    q, k, v = (backend.put(array) for array in qkv(rng, "float16"))
    out = cupyattn.attention(q, k, v, causal=True, kernel=backend.kernel)
    with_lse, lse = cupyattn.attention(q, k, v, causal=True, kernel=backend.kernel, return_lse=True)
    assert (backend.get(out) == backend.get(with_lse)).all()
    assert lse.shape == (2, 4, 70) and lse.dtype == np.float32


LSE_FORMS = (True, "log2", "flash_attn")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("form", LSE_FORMS)
def test_forms_of_the_lse(backend, rng, form, dtype):
    """Of rows with and without keys; a sink alone does not make an lse."""
    options = {"causal": True, "return_lse": form}
    sinks = features(rng, "sinks")
    q, k, v = qkv(rng, dtype, seqlen_q=70, seqlen_k=50)
    backend.agrees("attention", q, k, v, **options)
    backend.agrees("attention", q, k, v, **options, **sinks)
    backend.agrees("attention_with_kvcache", q, k, v, **options, cache_seqlens=np.array([50, 0], np.int32))
    q, k, v, ends_q, ends_k = packed(rng, dtype, [5, 0, 70, 7, 3], [9, 4, 33, 0, 3])
    backend.agrees("attention_varlen", q, k, v, ends_q[:-1].copy(), ends_k[:-1].copy(), **options)
    backend.agrees("attention_varlen", q, k, v, np.zeros(1, np.int32), np.zeros(1, np.int32), **options)
    pairs = sequences(rng, dtype, [0, 33, 130])
    k, v, table = paged(backend, rng, pairs, 16)
    q = normal(rng, (3, 70, 4, 64), dtype)
    lengths = {"cache_seqlens": np.array([0, 33, 130], np.int32), "block_table": table}
    backend.agrees("attention_with_kvcache", q, k, v, **options, **lengths, **sinks)


@pytest.mark.backends("numpy", "cuda")
def test_forms_of_the_lse_are_those_of_the_natural_one(backend, rng):
    """The natural one times log2(e) in float32, and the same to the bit but for rows without keys."""
    q, k, v = qkv(rng, "float16", seqlen_q=70, seqlen_k=50)
    natural, base2, flash = (backend.call("attention", q, k, v, causal=True, return_lse=form)[1] for form in LSE_FORMS)
    assert natural.dtype == base2.dtype == flash.dtype == np.float32
    assert (natural[..., :20] == -np.inf).all() and np.isfinite(natural[..., 20:]).all()
    assert base2.tobytes() == (natural * np.float32(np.log2(np.e))).tobytes()
    assert flash.tobytes() == np.where(natural == -np.inf, np.float32(np.inf), natural).tobytes()


@pytest.mark.parametrize("form", LSE_FORMS)
def test_forms_of_an_lse_that_is_no_number(backend, rng, form):
    """NaN stays NaN, and what is infinite because of the scores stays as it is."""
    q, k, v = qkv(rng, "float16", seqlen_q=70, seqlen_k=50)
    q[0, 60, 1, 3] = np.nan
    _, lse = backend.call("attention", q, k, v, causal=True, return_lse=form)
    assert np.isnan(lse[0, 1, 60])
    assert (lse[..., :20] == (np.inf if form == "flash_attn" else -np.inf)).all()


# ---------------------------------------------------------------------------------------------------- lengths


LENGTHS = [
    ([5], [9]),
    ([1, 1, 1], [3, 200, 64]),
    ([0, 7, 0, 3], [4, 7, 0, 90]),
    ([7, 0, 70], [0, 0, 33]),
    ([130, 64, 1], [128, 70, 1]),
    ([0, 0], [0, 0]),
    ([0], [12]),
    ([12], [0]),
    ([2] * 40, [3] * 40),
]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS, ids=lambda lengths: "-".join(map(str, lengths[:4])))
def test_packed_lengths(backend, rng, lengths_q, lengths_k, causal, dtype):
    arrays = packed(rng, dtype, lengths_q, lengths_k)
    backend.agrees("attention_varlen", *arrays, causal=causal)
    hints = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
    backend.agrees("attention_varlen", *arrays, causal=causal, **hints)
    backend.agrees("attention_varlen", *arrays, window=(2, 1), max_seqlen_q=max(lengths_q) + 5)


def test_packed_rows_behind_the_last_sequence(backend, rng):
    q, k, v, cu_seqlens_q, cu_seqlens_k = packed(rng, "float16", [5, 3, 150], [9, 70, 20])
    for sequences_left in (2, 1, 0):
        shorter = cu_seqlens_q[: sequences_left + 1].copy(), cu_seqlens_k[: sequences_left + 1].copy()
        backend.agrees("attention_varlen", q, k, v, *shorter, causal=True)


def test_packed_self_attention_needs_one_cu_seqlens(backend, rng):
    q, k, v, cu_seqlens, _ = packed(rng, "float16", [5, 3, 60], [5, 3, 60])
    backend.agrees("attention_varlen", q, k, v, cu_seqlens, causal=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "seqlen_k"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (2, 0, 0), (1, 70, 1), (3, 90, 7)]
)
def test_empty_and_short(backend, rng, batch, seqlen_q, seqlen_k, dtype):
    q, k, v = qkv(rng, dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    backend.agrees("attention", q, k, v)
    backend.agrees("attention", q, k, v, causal=True)
    backend.agrees("attention", q, k, v, causal=True, **features(rng, "sinks"))


def test_seqused_k_of_packed_keys(backend, rng):
    q, k, v, cu_seqlens_q, cu_seqlens_k = packed(rng, "float16", [5, 40, 7, 3], [9, 70, 130, 4])
    used = np.array([9, 33, 128, 0], np.int32)
    for b, length in enumerate(used):
        k[cu_seqlens_k[b] + length : cu_seqlens_k[b + 1]] = np.nan
        v[cu_seqlens_k[b] + length : cu_seqlens_k[b + 1]] = np.nan
    backend.agrees("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k=used, causal=True)
    backend.agrees("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k=used)


# ----------------------------------------------------------------------------------------------------- caches


CACHE_LENGTHS = [0, 1, 17, 130, 64]


@sweep
@pytest.mark.parametrize("combined", [True, False], ids=["combined", "apart"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 17, 64, 256])
def test_paged_prefill(backend, rng, block_size, layout, combined):
    """q is packed; lengths come as cu_seqlens_k or as seqused_k."""
    lengths_q, lengths_k = [3, 1, 40, 66, 0], [3, 1, 70, 130, 64]
    q = normal(rng, (sum(lengths_q), 4, 64), "float16")
    k, v, table = paged(backend, rng, sequences(rng, "float16", lengths_k), block_size, layout, combined)
    options = {"block_table": table, "layout": layout, "causal": True}
    cu_seqlens_q = cumulative(lengths_q)
    backend.agrees("attention_varlen", q, k, v, cu_seqlens_q, cumulative(lengths_k), **options)
    used = np.array(lengths_k, np.int32)
    backend.agrees("attention_varlen", q, k, v, cu_seqlens_q, seqused_k=used, **options)


def decode_compiles_in(backend, dtype, seqlen_q, block_size, layout):
    """bfloat16 and, without tensor cores, the half types are covered by few of these on CUDA."""
    if backend.on_gpu and dtype == "bfloat16":
        return backend.kernel == "auto" and block_size == 16 and seqlen_q == 1
    return backend.kernel != "forward_simt" or dtype == "float32"


@pytest.mark.when(holds=decode_compiles_in)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 5, 70])
@pytest.mark.parametrize(("block_size", "layout"), [(16, "NHD"), (3, "HND"), (256, "HND")])
def test_paged_decode(backend, rng, block_size, layout, seqlen_q, dtype):
    """q is dense; lengths come as cache_seqlens."""
    lengths = CACHE_LENGTHS
    q = normal(rng, (len(lengths), seqlen_q, 8, 64), dtype)
    k, v, table = paged(backend, rng, sequences(rng, dtype, lengths), block_size, layout)
    options = {"block_table": table, "layout": layout, "cache_seqlens": np.array(lengths, np.int32)}
    backend.agrees("attention_with_kvcache", q, k, v, **options)
    backend.agrees("attention_with_kvcache", q, k, v, **options, causal=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dense_cache(backend, rng, dtype):
    lengths, entries = CACHE_LENGTHS, [6, 2, 0, 5, 1]
    q = normal(rng, (len(lengths), 3, 4, 64), dtype)
    pairs = sequences(rng, dtype, lengths)
    options = {"cache_seqlens": np.array(lengths, np.int32)}
    for where in (None, entries):
        k, v = (dense_cache([pair[i] for pair in pairs], 150, where) for i in range(2))
        if where is not None:
            options["cache_batch_idx"] = np.array(where, np.int32)
        backend.agrees("attention_with_kvcache", q, k, v, **options)
        backend.agrees("attention_with_kvcache", q, k, v, **options, causal=True, **features(rng, "sinks"))


def test_dense_cache_with_one_length_for_all_or_none(backend, rng):
    q, k, v = qkv(rng, "float16", seqlen_q=3)
    backend.agrees("attention_with_kvcache", q, k, v, causal=True)
    for length in (0, 1, 77, 100):
        backend.agrees("attention_with_kvcache", q, k, v, cache_seqlens=length, causal=True)


def test_whole_paged_cache_is_in_use_without_lengths(backend, rng):
    q = normal(rng, (2, 3, 4, 64), "float16")
    k, v, table = paged(backend, rng, sequences(rng, "float16", [48, 48]), 16)
    backend.agrees("attention_with_kvcache", q, k, v, block_table=table[:, :3].copy(), causal=True)


# ------------------------------------------------------------------------------------------- keys shared by blocks

splitting = pytest.mark.backends("numpy", "cuda-sm80")


@splitting
@pytest.mark.parametrize("num_splits", [1, 2, 7, 64, 2**40])
@pytest.mark.parametrize("block_size", [0, 16], ids=["dense", "paged"])
def test_splits(backend, rng, block_size, num_splits):
    """More splits than a sequence has tiles, and sequences without a key, among others."""
    lengths = [0, 3, 700, 300, 64]
    pairs = sequences(rng, "float16", lengths)
    options = {"cache_seqlens": np.array(lengths, np.int32), "num_splits": num_splits}
    if block_size:
        k, v, options["block_table"] = paged(backend, rng, pairs, block_size)
    else:
        k, v = (dense_cache([pair[i] for pair in pairs], 700) for i in range(2))
    for seqlen_q, causal in ((70, True), (3, False)):
        q = normal(rng, (5, seqlen_q, 4, 64), "float16")
        backend.agrees("attention_with_kvcache", q, k, v, **options, causal=causal)


@splitting
@pytest.mark.parametrize("head_dim", [33, 40, 128])
@pytest.mark.parametrize("names", [("window", "softcap"), ("causal", "alibi"), ("sinks",)], ids="-".join)
def test_splits_with_features(backend, rng, head_dim, names):
    """Into an output of other strides; sinks count once, whatever the number of splits that is asked for."""
    q, k, v = qkv(rng, "bfloat16", seqlen_q=20, seqlen_k=400, head_dim=head_dim)
    out = backend.place(np.full((2, 4, 20, head_dim), np.nan, q.dtype), lambda array: array.swapaxes(1, 2))
    backend.agrees("attention_with_kvcache", q, k, v, num_splits=3, out=out, **features(rng, *names))


@pytest.mark.backends("numpy", "cuda", "cuda-sm90", "cuda-sm80")
@pytest.mark.parametrize("form", LSE_FORMS)
def test_forms_of_the_lse_of_splits(backend, rng, form):
    """The splits' own are merged; a split without keys beside one that has some, and rows that have none at all."""
    lengths = [0, 3, 700, 40, 300]
    pairs = sequences(rng, "float16", lengths)
    k, v, table = paged(backend, rng, pairs, 16)
    options = {"cache_seqlens": np.array(lengths, np.int32), "num_splits": 4, "causal": True, "return_lse": form}
    for seqlen_q in (70, 3):
        q = normal(rng, (5, seqlen_q, 4, 64), "float16")
        backend.agrees("attention_with_kvcache", q, k, v, block_table=table, **options)


@splitting
def test_few_rows_over_many_keys_are_split_by_themselves(backend, rng):
    q, k, v = qkv(rng, "float16", batch=1, seqlen_q=60, seqlen_k=5000)
    backend.agrees("attention", q, k, v, causal=True)


@pytest.mark.gpu
def test_splits_without_lse_and_in_a_graph(rng):
    """What was captured reads lengths and arrays as they are when it is replayed; other calls come in between."""
    import cupy

    import cupyattn

    q, k, v = (cupy.asarray(x) for x in qkv(rng, "float16", batch=1, seqlen_q=60, seqlen_k=5000))
    length = cupy.asarray(np.array([5000], np.int32))
    options = {"cache_seqlens": length, "kernel": "forward_sm80", "causal": True}
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        cupyattn.attention_with_kvcache(q, k, v, **options)
        stream.begin_capture()
        out = cupyattn.attention_with_kvcache(q, k, v, **options)
        graph = stream.end_capture()
        for used in (5000, 61, 3000):
            length.fill(used)
            expected, _ = cupyattn.attention_with_kvcache(q, k, v, **options, return_lse=True)
            cupyattn.attention_with_kvcache(-q, k, v, **options)
            out.fill(np.nan)
            graph.launch(stream)
            assert (out == expected).all()


@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "paged"])
def test_leftpad(backend, rng, is_paged):
    lengths, padding = [0, 1, 17, 130, 64, 90], np.array([0, 1, 4, 127, 0, 33], np.int32)
    pairs = sequences(rng, "float16", lengths)
    for (keys, values), skipped in zip(pairs, padding, strict=True):
        keys[:skipped] = values[:skipped] = np.nan
    options = {"cache_seqlens": np.array(lengths, np.int32), "cache_leftpad": padding}
    if is_paged:
        k, v, options["block_table"] = paged(backend, rng, pairs, 16)
    else:
        k, v = (dense_cache([pair[i] for pair in pairs], 150) for i in range(2))
    q = normal(rng, (len(lengths), 3, 4, 64), "float16")
    for masks in ({}, {"causal": True}, {"window": (20, 0)}, features(rng, "alibi", "softcap")):
        backend.agrees("attention_with_kvcache", q, k, v, **options, **masks)


# ------------------------------------------------------------------------------------------- strides of all kinds


def in_order(order):
    """A 4-D array that lies in memory with its axes in another order."""

    def place(backend, array):
        base = np.ascontiguousarray(array.transpose(order))
        return backend.place(base, lambda x: x.transpose(tuple(np.argsort(order))))

    return place


def with_gaps(left, right):
    """An array whose rows have NaN beside them, `left` elements before and `right` behind."""

    def place(backend, array):
        base = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(left, right)], constant_values=np.nan)
        return backend.place(base, lambda x: x[..., left : left + array.shape[-1]])

    return place


def every_other(backend, array):
    base = np.full((array.shape[0], 2 * array.shape[1], *array.shape[2:]), np.nan, array.dtype)
    base[:, ::2] = array
    return backend.place(base, lambda x: x[:, ::2])


def backwards(backend, array):
    return backend.place(np.ascontiguousarray(array[:, ::-1]), lambda x: x[:, ::-1])


MEMORY = {
    "heads-first": in_order((0, 2, 1, 3)),
    "rows-first": in_order((1, 0, 2, 3)),
    "rows-heads-batch": in_order((1, 2, 0, 3)),
    "heads-batch-rows": in_order((2, 0, 1, 3)),
    "16-byte gaps": with_gaps(8, 8),
    "8-byte offset": with_gaps(4, 8),
    "one-element offset": with_gaps(1, 2),
    "every other row": every_other,
    "backwards": backwards,
}


@sweep
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("memory", MEMORY)
def test_strided_inputs_and_outputs(backend, rng, memory, dtype):
    place = MEMORY[memory]
    q, k, v = qkv(rng, dtype, seqlen_q=37, seqlen_k=90)
    out = place(backend, np.full(q.shape, np.nan, q.dtype))
    around = np.ones(out.base.shape, bool)
    out.view(around)[...] = False
    base = backend.put(out.base)
    arrays = [place(backend, array) for array in (q, k, v)]
    backend.agrees("attention", *arrays, causal=True, out=out.view(base))
    assert np.isnan(backend.get(base)[around]).all(), "something was written beside the output"


@sweep
def test_strides_that_differ_between_arrays(backend, rng):
    q, k, v = qkv(rng, "float16")
    places = MEMORY["heads-first"], MEMORY["every other row"], MEMORY["16-byte gaps"]
    backend.agrees("attention", *(place(backend, array) for place, array in zip(places, (q, k, v), strict=True)))


@sweep
def test_broadcast_keys(backend, rng):
    """One sequence's keys for the whole batch, and one head's for all heads, without a copy."""
    q, k, v = qkv(rng, "float16", batch=1, kv_heads=1)
    q = normal(rng, (3, 70, 4, 64), "float16")
    k, v = (backend.place(x, lambda base: np.broadcast_to(base, (3, 100, 2, 64))) for x in (k, v))
    backend.agrees("attention", q, k, v)


@sweep
@pytest.mark.parametrize("axis_order", ["heads-first", "gaps"])
def test_strided_packed_arrays(backend, rng, axis_order):
    q, k, v, cu_seqlens_q, cu_seqlens_k = packed(rng, "float16", [20, 0, 70], [33, 5, 70])
    if axis_order == "heads-first":
        placed = [backend.place(np.ascontiguousarray(x.swapaxes(0, 1)), lambda y: y.swapaxes(0, 1)) for x in (q, k, v)]
    else:
        placed = [with_gaps(8, 16)(backend, x) for x in (q, k, v)]
    backend.agrees("attention_varlen", *placed, cu_seqlens_q, cu_seqlens_k, causal=True)


@sweep
def test_q_k_v_cut_from_one_projection(backend, rng):
    joint = normal(rng, (90, 8, 64), "float16")
    cuts = (slice(0, 4), slice(4, 6), slice(6, 8))
    q, k, v = (backend.place(joint, lambda x, cut=cut: x[:, cut]) for cut in cuts)
    backend.agrees("attention_varlen", q, k, v, cumulative([40, 50]), causal=True)


@sweep
def test_block_table_with_a_longer_stride(backend, rng):
    lengths = [33, 70]
    k, v, table = paged(backend, rng, sequences(rng, "float16", lengths), 16)
    wide = np.full((2, table.shape[1] + 9), oracle.JUNK_BLOCK, np.int32)
    wide[:, 2 : 2 + table.shape[1]] = table
    placed = backend.place(wide, lambda x: x[:, 2 : 2 + table.shape[1]])
    q = normal(rng, (2, 1, 4, 64), "float16")
    options = {"block_table": placed, "cache_seqlens": np.array(lengths, np.int32)}
    backend.agrees("attention_with_kvcache", q, k, v, **options)


# ------------------------------------------------------------------------------------------------ hard numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_large_scores(backend, rng, dtype, causal):
    """Scores of several thousand: softmax is nearly one-hot, and an exponential without its maximum would overflow."""
    q, k, v = qkv(rng, dtype)
    backend.agrees("attention", q * q.dtype.type(30), k * k.dtype.type(30), v, causal=causal)
    backend.agrees("attention", q, k, v, causal=causal, softmax_scale=100.0)
    backend.agrees("attention", q, k, v * v.dtype.type(1000), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_rise_and_fall_along_the_keys(backend, rng, dtype):
    """Maxima that come late make an online softmax rescale again and again; early ones leave only tiny weights."""
    q, k, v = qkv(rng, dtype, seqlen_k=300)
    ramp = np.linspace(-40, 40, 300, dtype=np.float32)[:, None]
    q[..., 0] = 8
    for slope in (ramp, -ramp, np.abs(ramp), -np.abs(ramp)):
        k[..., 0] = slope.astype(k.dtype)
        backend.agrees("attention", q, k, v)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_equal_scores_give_the_mean(backend, rng, dtype):
    q, k, v = qkv(rng, dtype)
    backend.agrees("attention", np.zeros_like(q), k, v, causal=True)


@pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 1e4, -np.inf])
def test_extreme_sinks(backend, rng, value):
    sinks = np.array([value, 0, value, 1], np.float32)
    backend.agrees("attention", *qkv(rng, "float16"), sinks=sinks, causal=True)
    backend.agrees("attention", *qkv(rng, "float16", seqlen_q=90, seqlen_k=30), sinks=sinks, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("which", ["q", "k"])
def test_not_finite_stays_in_its_own_rows(backend, rng, which, value, dtype):
    """A bad query spoils its own row alone; a bad key only the rows that see it, and for -inf scores not even those."""
    q, k, v = qkv(rng, dtype, seqlen_q=100)
    if which == "q":
        q[1, 33, 2, 5] = value
    else:
        k[1, 60, 1, 7] = value
    backend.agrees("attention", q, k, v, causal=True)
    backend.agrees("attention", q, k, v)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_not_finite_values(backend, rng, value):
    """A bad value spoils its own column of the rows that see it."""
    q, k, v = qkv(rng, "float16")
    v[1, 60, 1, 7] = value
    backend.agrees("attention", q, k, v)


@pytest.mark.backends("numpy")
def test_not_finite_values_of_hidden_keys(backend, rng):
    """Tensor cores multiply a hidden key's weight of 0 with its value; the NumPy backend does not."""
    q, k, v = qkv(rng, "float16", seqlen_q=100)
    v[0, 60:, 0, 3] = np.inf
    v[1, 60:] = np.nan
    backend.agrees("attention", q, k, v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_bit_for_bit(backend, rng, dtype):
    arrays = qkv(rng, dtype, seqlen_q=300, seqlen_k=500)
    first = backend.call("attention", *arrays, causal=True)
    for _ in range(4):
        again = backend.call("attention", *arrays, causal=True)
        for one, other in zip(first, again, strict=True):
            assert one.tobytes() == other.tobytes()


def test_inputs_stay_as_they_are(backend, rng):
    arrays = qkv(rng, "float16")
    here = [backend.put(array.copy()) for array in arrays]
    import cupyattn

    cupyattn.attention(*here, causal=True, softcap=5.0, kernel=backend.kernel)
    for array, original in zip(here, arrays, strict=True):
        assert backend.get(array).tobytes() == original.tobytes()


@pytest.mark.backends("numpy")
def test_a_sequence_does_not_depend_on_its_neighbours(backend, rng):
    """Bit for bit, whatever else is in the batch and wherever the sequence lies. (On CUDA tiles go by the batch.)"""
    q, k, v, cu_seqlens_q, cu_seqlens_k = packed(rng, "float16", [20, 70, 5], [33, 140, 70])
    out, lse = backend.call("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True)
    for b in range(3):
        own, keys = slice(*cu_seqlens_q[b : b + 2]), slice(*cu_seqlens_k[b : b + 2])
        ends = cumulative([own.stop - own.start]), cumulative([keys.stop - keys.start])
        one_out, one_lse = backend.call("attention_varlen", q[own], k[keys], v[keys], *ends, causal=True)
        assert (one_out == out[own]).all() and (one_lse == lse[:, own]).all()


# ------------------------------------------------------------------------------------ blocks that nobody can see


@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("gone", [-1, 2**31 - 1])
def test_blocks_before_the_window_may_be_gone(backend, rng, gone, seqlen_q):
    """Engines with a sliding window evict the blocks behind it; whatever their entries are, they are not read."""
    lengths, left, block_size = [40, 100, 7, 33], 20, 16
    q = normal(rng, (4, seqlen_q, 4, 64), "float16")
    k, v, table = paged(backend, rng, sequences(rng, "float16", lengths), block_size)
    used = np.array(lengths, np.int32)
    options = {"cache_seqlens": used, "window": (left, 0)}
    expected = oracle.attention_with_kvcache(q, k.array, v.array, block_table=table, **options)
    evicted = table.copy()
    for b, length in enumerate(lengths):
        evicted[b, : max(length - seqlen_q - left, 0) // block_size] = gone
    assert (evicted != table).any()
    expected.check(
        *backend.call("attention_with_kvcache", q, k, v, block_table=evicted, **options, check=True), "float16"
    )
    expected.check(*backend.call("attention_with_kvcache", q, k, v, block_table=evicted, **options), "float16")


def test_blocks_of_padding_may_be_gone(backend, rng):
    q = normal(rng, (2, 3, 4, 64), "float16")
    k, v, table = paged(backend, rng, sequences(rng, "float16", [40, 100]), 16)
    options = {"cache_seqlens": np.array([40, 100], np.int32), "cache_leftpad": np.array([17, 64], np.int32)}
    expected = oracle.attention_with_kvcache(q, k.array, v.array, block_table=table, **options)
    table = table.copy()
    table[0, :1] = table[1, :4] = -1
    expected.check(
        *backend.call("attention_with_kvcache", q, k, v, block_table=table, **options, check=True), "float16"
    )
    expected.check(*backend.call("attention_with_kvcache", q, k, v, block_table=table, **options), "float16")


# ----------------------------------------------------------------------------------------------- bad index arrays


def bad_paged(rng, block):
    """Three sequences, the second of which needs a block that does not exist."""
    pairs = sequences(rng, "float16", [40, 100, 33])
    cache, table = paged_cache(rng, pairs, 16)
    table[1, 3] = len(cache) if block == "behind" else block
    q = normal(rng, (3, 1, 4, 64), "float16")
    k, v = np.ascontiguousarray(cache.swapaxes(0, 1))
    return q, k, v, pairs, {"block_table": table, "cache_seqlens": np.array([40, 100, 33], np.int32)}


def expect_nan_in(expected, out, lse, b):
    """Sequence b's rows are NaN and all others are right."""
    expected.out[b] = expected.lse[b] = np.nan
    expected.check(out, lse, "float16")


@pytest.mark.parametrize("block", [-1, "behind", 2**31 - 1, -(2**31)])
def test_bad_block(backend, rng, block):
    q, k, v, pairs, options = bad_paged(rng, block)
    if not backend.on_gpu:
        with pytest.raises(ValueError, match=r"^block_table: got block .* at \[1, 3\]"):
            backend.call("attention_with_kvcache", q, k, v, **options)
        return
    with pytest.raises(ValueError, match=r"^block_table: got block .* at \[1, 3\]"):
        backend.call("attention_with_kvcache", q, k, v, **options, check=True)
    lengths = options["cache_seqlens"]
    dense = (dense_cache([pair[i] for pair in pairs], 100) for i in range(2))
    expected = oracle.attention_with_kvcache(q, *dense, cache_seqlens=lengths)
    expect_nan_in(expected, *backend.call("attention_with_kvcache", q, k, v, **options), 1)


BAD_CONTENTS = {
    "cache_seqlens": (101, "^cache_seqlens: got 101 tokens for sequence 1"),
    "negative cache_seqlens": (-1, "^cache_seqlens: got -1 for sequence 1"),
    "cache_batch_idx": (7, "^cache_batch_idx: got 7 for sequence 1"),
    "negative cache_batch_idx": (-1, "^cache_batch_idx: got -1 for sequence 1"),
    "cache_leftpad": (41, "^cache_leftpad: got 41 for sequence 1"),
    "negative cache_leftpad": (-3, "^cache_leftpad: got -3 for sequence 1"),
}


@pytest.mark.parametrize("name", BAD_CONTENTS)
def test_bad_contents(backend, rng, name):
    """One sequence's index does not fit: NumPy and check=True refuse, CUDA unchecked makes its rows NaN."""
    value, message = BAD_CONTENTS[name]
    q, k, v = qkv(rng, "float16", batch=3, seqlen_q=5)
    good = {
        "cache_seqlens": np.array([30, 40, 50], np.int32),
        "cache_batch_idx": np.array([2, 0, 1], np.int32),
        "cache_leftpad": np.array([3, 4, 5], np.int32),
    }
    bad = {key: array.copy() for key, array in good.items()}
    bad[name.removeprefix("negative ")][1] = value
    with pytest.raises(ValueError, match=message):
        backend.call("attention_with_kvcache", q, k, v, **bad, check=True)
    if not backend.on_gpu:
        with pytest.raises(ValueError, match=message):
            backend.call("attention_with_kvcache", q, k, v, **bad)
        return
    expected = oracle.attention_with_kvcache(q, k, v, **good)
    expect_nan_in(expected, *backend.call("attention_with_kvcache", q, k, v, **bad), 1)


BAD_CU_SEQLENS = {
    "late start": ([1, 20, 90], "^cu_seqlens_[qk]: got 1 as its first entry"),
    "falling": ([0, 70, 20], "^cu_seqlens_[qk]: got 70 followed by 20"),
    "too far": ([0, 20, 91], "^cu_seqlens_[qk]: got 91 as its last entry"),
    "negative": ([0, -20, 90], "^cu_seqlens_[qk]: got 0 followed by -20"),
}


@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("name", BAD_CU_SEQLENS)
def test_bad_cu_seqlens(backend, rng, name, argument):
    contents, message = BAD_CU_SEQLENS[name]
    q, k, v, cu_seqlens, _ = packed(rng, "float16", [20, 70], [20, 70])
    ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, argument: np.array(contents, np.int32)}
    with pytest.raises(ValueError, match=message):
        backend.call("attention_varlen", q, k, v, **ends, check=True)
    if backend.on_gpu:  # unchecked, it must end and touch nothing else
        out, lse = backend.call("attention_varlen", q, k, v, **ends)
        if argument == "cu_seqlens_q":
            assert np.isnan(out).all() and np.isnan(lse).all(), "nobody can say whose row a row is"
        backend.agrees("attention_varlen", q, k, v, cu_seqlens, cu_seqlens)


@pytest.mark.parametrize("hint", ["max_seqlen_q", "max_seqlen_k"])
def test_hints_that_are_too_small(backend, rng, hint):
    """Refused where contents are checked; on CUDA they change no result."""
    arrays = packed(rng, "float16", [20, 170], [20, 270])
    with pytest.raises(ValueError, match=f"^{hint}: got 3, expected at least the longest sequence"):
        backend.call("attention_varlen", *arrays, **{hint: 3}, check=True)
    if backend.on_gpu:
        backend.agrees("attention_varlen", *arrays, **{hint: 3}, causal=True)
        backend.agrees("attention_varlen", *arrays, **{hint: 0})


# --------------------------------------------------------------------------------------------- random problems


@st.composite
def masks(draw, batch, heads, on_gpu):
    """Any combination of masks. On CUDA fewer of those that make another compiled variant."""
    sides = st.integers(-1, 12) | st.sampled_from([63, 64, 65])
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(sides, sides)),
        "softcap": draw(st.sampled_from([None, 2.5] if on_gpu else [None, 0.0, 0.7, 2.5, 30.0])),
        "softmax_scale": draw(st.none() | st.floats(1e-3, 2))
        if on_gpu
        else draw(st.none() | st.floats(-2, 2, width=32)),
    }
    seed = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if alibi := draw(st.sampled_from([(), (heads,), (batch, heads)])):
        options["alibi_slopes"] = seed.uniform(-0.5, 0.5, alibi).astype(np.float32)
    if draw(st.booleans()):
        options["sinks"] = seed.normal(0, 3, heads).astype(np.float32)
    return options


@st.composite
def shapes(draw, on_gpu):
    """(rng, dtype, heads, kv_heads, head_dim) of a random problem."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if on_gpu:
        return rng, "float16", 4, 2, 64
    group, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return rng, draw(st.sampled_from(DTYPES)), group * kv_heads, kv_heads, draw(st.integers(1, 48) | st.just(64))


def examples(backend):
    return settings(max_examples=10 if backend.on_gpu else 150)


@sweep
def test_random_dense_problems(backend):
    @examples(backend)
    @given(st.data())
    def holds(data):
        rng, dtype, heads, kv_heads, head_dim = data.draw(shapes(backend.on_gpu))
        batch, seqlen_q, seqlen_k = (data.draw(st.integers(0, most)) for most in (3, 40, 70))
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        arrays = qkv(rng, dtype, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **sizes)
        backend.agrees("attention", *arrays, **data.draw(masks(batch, heads, backend.on_gpu)))

    holds()


@sweep
def test_random_packed_problems(backend):
    @examples(backend)
    @given(st.data())
    def holds(data):
        rng, dtype, heads, kv_heads, head_dim = data.draw(shapes(backend.on_gpu))
        lengths = data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 50)), min_size=1, max_size=5))
        lengths_q, lengths_k = zip(*lengths, strict=True)
        cu_seqlens_q = cumulative(lengths_q)
        q = normal(rng, (sum(lengths_q) + data.draw(st.integers(0, 3)), heads, head_dim), dtype)
        options = data.draw(masks(len(lengths), heads, backend.on_gpu))
        if data.draw(st.booleans()):
            layout = data.draw(st.sampled_from(["NHD", "HND"]))
            block_size = 16 if backend.on_gpu else data.draw(st.integers(1, 20))
            pairs = sequences(rng, dtype, lengths_k, kv_heads=kv_heads, head_dim=head_dim)
            k, v, table = paged(backend, rng, pairs, block_size, layout, data.draw(st.booleans()))
            options |= {"block_table": table, "layout": layout}
        else:
            k, v = normal(rng, (2, sum(lengths_k), kv_heads, head_dim), dtype)
        if data.draw(st.booleans()):
            options["seqused_k"] = np.array([data.draw(st.integers(0, length)) for length in lengths_k], np.int32)
        backend.agrees("attention_varlen", q, k, v, cu_seqlens_q, cumulative(lengths_k), **options)

    holds()


@sweep
def test_random_cache_problems(backend):
    @examples(backend)
    @given(st.data())
    def holds(data):
        rng, dtype, heads, kv_heads, head_dim = data.draw(shapes(backend.on_gpu))
        lengths = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
        batch, seqlen_q = len(lengths), data.draw(st.integers(1, 5))
        q = normal(rng, (batch, seqlen_q, heads, head_dim), dtype)
        pairs = sequences(rng, dtype, lengths, kv_heads=kv_heads, head_dim=head_dim)
        options = data.draw(masks(batch, heads, backend.on_gpu)) | {"cache_seqlens": np.array(lengths, np.int32)}
        if data.draw(st.booleans()):
            padding = [data.draw(st.integers(0, length)) for length in lengths]
            options["cache_leftpad"] = np.array(padding, np.int32)
        if data.draw(st.booleans()):
            layout = data.draw(st.sampled_from(["NHD", "HND"]))
            block_size = 16 if backend.on_gpu else data.draw(st.integers(1, 20))
            k, v, table = paged(backend, rng, pairs, block_size, layout)
            options |= {"block_table": table, "layout": layout}
        else:
            entries = data.draw(st.permutations(range(batch + 1)))[:batch]
            k, v = (dense_cache([pair[i] for pair in pairs], 64, entries) for i in range(2))
            options["cache_batch_idx"] = np.array(entries, np.int32)
        backend.agrees("attention_with_kvcache", q, k, v, **options)

    holds()


# ------------------------------------------------------------------------------------------ arrays past 2**31


def far_apart(xp, shape, step, fill):
    """A CuPy array (1, rows, heads, head_dim) whose rows lie `step` elements apart, and all that it spans."""
    base = xp.full((shape[1] - 1) * step + shape[2] * shape[3], fill, xp.float16)
    strides = (0, 2 * step, 2 * shape[3], 2)
    return xp.lib.stride_tricks.as_strided(base, shape, strides), base


def need_memory(gigabytes):
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")
    return cupy


@pytest.mark.backends("cuda-sm80", "cuda-simt")
def test_dense_arrays_past_2_31_elements(backend, rng):
    import cupyattn

    cupy = need_memory(24)
    q, k, v = qkv(rng, "float16", batch=1, seqlen_q=20, seqlen_k=20)
    step = 2**27  # 19 steps of it exceed 2**31
    arrays = []
    for host in (q, k, v, np.full(q.shape, np.nan, np.float16)):
        array, _ = far_apart(cupy, host.shape, step, np.nan)
        array[...] = cupy.asarray(host)
        arrays.append(array)
    out, lse = cupyattn.attention(*arrays[:3], out=arrays[3], causal=True, return_lse=True, kernel=backend.kernel)
    oracle.attention(q, k, v, causal=True).check(cupy.ascontiguousarray(out).get(), lse.get(), "float16")


@pytest.mark.backends("cuda-sm80", "cuda-simt")
def test_blocks_past_2_31_elements(backend, rng):
    """Block ids so high that the elements before them number more than 2**31; an append writes there too."""
    import cupyattn

    cupy = need_memory(14)
    block_size, kv_heads, head_dim = 16, 2, 64
    num_blocks = 2**31 // (block_size * kv_heads * head_dim) + 50
    k_cache, v_cache = (cupy.full((num_blocks, block_size, kv_heads, head_dim), np.nan, np.float16) for _ in range(2))
    blocks = num_blocks - 1 - rng.permutation(8).reshape(2, 4).astype(np.int32)
    table, lengths = cupy.asarray(blocks), [50, 37]
    pairs = sequences(rng, "float16", lengths)
    for b, pair in enumerate(pairs):
        new = [cupy.asarray(rows[None]) for rows in pair]
        cupyattn.append_kv(k_cache, v_cache, *new, block_table=table[b : b + 1])
    q = normal(rng, (2, 3, 4, 64), "float16")
    options = {"block_table": table, "cache_seqlens": cupy.asarray(np.array(lengths, np.int32)), "causal": True}
    out, lse = cupyattn.attention_with_kvcache(
        cupy.asarray(q), k_cache, v_cache, **options, return_lse=True, kernel=backend.kernel
    )
    dense = (dense_cache([pair[i] for pair in pairs], 50) for i in range(2))
    expected = oracle.attention_with_kvcache(q, *dense, cache_seqlens=np.array(lengths), causal=True)
    expected.check(out.get(), lse.get(), "float16")


# --------------------------------------------------------------------------------------------- other libraries


def torch_array(host, on_gpu):
    torch = pytest.importorskip("torch")
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    if host.dtype.name == "bfloat16":
        tensor = torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(host)
    return tensor.cuda() if on_gpu else tensor


def jax_array(host, on_gpu):
    jax = pytest.importorskip("jax")
    try:
        return jax.device_put(host, jax.devices("gpu" if on_gpu else "cpu")[0])
    except RuntimeError:
        pytest.skip("JAX has no such device")


def to_numpy(array):
    """An array of torch or JAX as float64."""
    if type(array).__module__.startswith("torch"):
        return array.double().cpu().numpy()
    return np.asarray(array).astype(np.float64)


@sweep
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [torch_array, jax_array])
def test_arrays_of_other_libraries(backend, rng, make, dtype):
    import cupyattn

    q, k, v, cu_seqlens_q, cu_seqlens_k = packed(rng, dtype, [20, 33], [41, 30])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an import of another library says is not ours
        arrays = [make(array, backend.on_gpu) for array in (q, k, v, cu_seqlens_q, cu_seqlens_k)]
    out, lse = cupyattn.attention_varlen(*arrays, causal=True, return_lse=True)
    assert type(out) is type(arrays[0]) and out.dtype == arrays[0].dtype and out.shape == arrays[0].shape
    expected = oracle.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=True)
    expected.check(to_numpy(out), to_numpy(lse), dtype)


# ------------------------------------------------------------------------------------- does the bound notice?


MUTATIONS = {
    "one key more to the right": ({"causal": True}, {"window": (-1, 1)}),
    "one key fewer to the right": ({"window": (-1, 4)}, {"window": (-1, 3)}),
    "one key more to the left": ({"window": (6, 0)}, {"window": (7, 0)}),
    "one key fewer to the left": ({"window": (6, 0)}, {"window": (5, 0)}),
    "window for none": ({"window": (30, 30)}, {}),
    "no softcap": ({"softcap": 2.5}, {}),
    "another softcap": ({"softcap": 2.5}, {"softcap": 2.6}),
    "no alibi": ({"alibi": 0.3}, {}),
    "alibi of the other sign": ({"alibi": 0.1}, {"alibi": -0.1}),
    "no sinks": ({"sink": 3.0}, {}),
    "another sink": ({"sink": 3.0}, {"sink": 3.3}),
    "scale 5 % off": ({}, {"softmax_scale": 1.05 / np.sqrt(32)}),
    "opposite scale": ({"softmax_scale": -0.2}, {"softmax_scale": 0.2}),
}


def mutated_masks(short, heads=4):
    options = dict(short)
    if "alibi" in options:
        options["alibi_slopes"] = np.full(heads, options.pop("alibi"), np.float32)
    if "sink" in options:
        options["sinks"] = np.full(heads, options.pop("sink"), np.float32)
    return options


def assert_noticed(right, wrong, dtype):
    """The wrong out and the wrong lse are each out of bounds by themselves, and the right ones, rounded, are not."""
    right.check(right.out.astype(np.dtype(dtype)), right.lse.astype(np.float32), dtype)
    with pytest.raises(AssertionError, match="^out: "):
        right.check(wrong.out.astype(np.dtype(dtype)), None, dtype)
    with pytest.raises(AssertionError, match="^lse: "):
        right.check(right.out, wrong.lse.astype(np.float32), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_bound_notices_wrong_masks(rng, mutation, dtype):
    right, wrong = (mutated_masks(short) for short in MUTATIONS[mutation])
    q, k, v = qkv(rng, dtype, batch=1, seqlen_q=50, seqlen_k=70, head_dim=32)
    assert_noticed(oracle.attention(q, k, v, **right), oracle.attention(q, k, v, **wrong), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [20, 100, 250])
def test_bound_notices_one_missing_key(rng, length, dtype):
    q, k, v = qkv(rng, dtype, batch=1, seqlen_q=50, seqlen_k=length)
    assert_noticed(oracle.attention(q, k, v), oracle.attention(q, k[:, 1:], v[:, 1:]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_notices_a_swapped_head_and_a_shifted_value(rng, dtype):
    q, k, v = qkv(rng, dtype, batch=1, head_dim=32)
    right = oracle.attention(q, k, v)
    assert_noticed(right, oracle.attention(q, k[:, :, ::-1], v[:, :, ::-1]), dtype)
    shifted = oracle.attention(q, k, np.roll(v, 1, axis=1))
    with pytest.raises(AssertionError, match="^out: "):
        right.check(shifted.out.astype(np.dtype(dtype)), None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_notices_an_element_left_unwritten(rng, dtype):
    q, k, v = qkv(rng, dtype, batch=1)
    right = oracle.attention(q, k, v)
    out = right.out.astype(np.dtype(dtype))
    out[0, 3, 1, 7] = np.nan
    with pytest.raises(AssertionError, match=r"^out: 1 of .* \(0, 3, 1, 7\)"):
        right.check(out, None, dtype)


def test_bound_wants_exact_zeros_where_nothing_is_seen(rng):
    q, k, v = qkv(rng, "float16", batch=1, seqlen_q=30, seqlen_k=10)
    right = oracle.attention(q, k, v, causal=True)
    out = right.out.astype(np.float16)
    out[0, 0, 0, 0] = 1e-7
    with pytest.raises(AssertionError, match="^out: 1 of"):
        right.check(out, None, "float16")
