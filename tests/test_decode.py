"""Decoding steps: attention_with_kvcache with few queries, appends, rotary embedding and FP8 caches, on both backends
against the oracle.

Every call is checked whole: out and lse within the oracle's bounds, and the caches afterwards number by number, NaN
wherever no sequence's row lies. Data is fresh in every run. On CUDA a decode kernel is compiled for each head_dim,
dtype, kind of cache, block size, group of heads, mask and rotation, so that the sweeps there keep to some of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import normal
from test_forward import DTYPES, HALF, LSE_FORMS, features, masks

import cupyattn

FP8 = ("float8_e4m3fn", "float8_e5m2")
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 100)  # none, one, and both sides of blocks and tiles

pytestmark = pytest.mark.backends("numpy", "cuda")


# ------------------------------------------------------------------------------------------------- caches


@dataclass(frozen=True)
class Cache:
    """Keys and values in one array, as on its axis `axis`, and the options that say where sequences lie."""

    array: np.ndarray
    axis: int
    places: dict

    def split(self, array):
        """Keys and values as views of self.array, or of its copy on a backend."""
        return (array[:, 0], array[:, 1]) if self.axis else (array[0], array[1])


def dense(pairs, rows, entries=None):
    """Sequences of (keys, values) in entries of a dense cache."""
    parts = [oracle.dense_cache([pair[i] for pair in pairs], rows, entries) for i in range(2)]
    places = {} if entries is None else {"cache_batch_idx": np.array(entries, np.int32)}
    return Cache(np.stack(parts), 0, places)


def paged(rng, pairs, block_size, layout="NHD", combined=True, capacity=0):
    """The same in shuffled blocks, keys and values in one 5-D array or apart."""
    array, table = oracle.paged_cache(rng, pairs, block_size, capacity)
    array = array.swapaxes(2, 3) if layout == "HND" else array
    array = array if combined else array.swapaxes(0, 1)
    return Cache(np.ascontiguousarray(array), int(combined), {"block_table": table, "layout": layout})


def held(rng, dtype, lengths, *, kv_heads=2, head_dim=64, kv_dtype=None):
    """(keys, values) of each sequence that a cache holds already; the bytes of FP8 stand for normal numbers."""
    pairs = [tuple(normal(rng, (2, length, kv_heads, head_dim), dtype)) for length in lengths]
    return pairs if kv_dtype is None else [tuple(oracle.to_fp8(rows, kv_dtype) for rows in pair) for pair in pairs]


def ints(*values):
    return np.array(values, np.int32)


def tables(rng, positions, half, dtype):
    """Cosines and sines of random angles, another one at each position."""
    angles = rng.uniform(0, 2 * np.pi, (positions, half))
    return {"rotary_cos": np.cos(angles).astype(np.dtype(dtype)), "rotary_sin": np.sin(angles).astype(np.dtype(dtype))}


NOT_AN_APPENDS = ("k", "v", "cache_leftpad", "num_splits", "causal", "window", "softmax_scale", "softcap")
NOT_AN_APPENDS += ("alibi_slopes", "sinks", "check", "return_lse")


def step(backend, q, cache, **options):
    """Run attention_with_kvcache: the result must be within bounds, the cache as it must be. Returns (out, lse)."""
    options |= cache.places
    here = backend.put(cache.array.copy())
    out, lse = backend.call("attention_with_kvcache", q, *cache.split(here), **options)
    stored = backend.get(here)
    if "k" in options:
        appended = {name: value for name, value in options.items() if name not in NOT_AN_APPENDS}
        low, high = oracle.append_range(*cache.split(cache.array), options["k"], options["v"], **appended)
        oracle.check_caches(cache.split(stored), low, high, options.get("kv_dtype"))
    else:
        assert stored.tobytes() == cache.array.tobytes()
    options.pop("check", None)
    form = options.pop("return_lse", True)
    split = cache.split(cache.array)
    expected = oracle.attention_with_kvcache(q, *split, stored=cache.split(stored), **options)
    expected.check(out, lse, q.dtype.name, form)
    return out, lse


# -------------------------------------------------------------------------------------------- shapes of a step

HEAD_DIMS = (1, 3, 7, 8, 16, 20, 24, 33, 40, 56, 63, 64, 65, 72, 80, 96, 100, 112, 120, 128, 129, 144, 160, 192, 200)
HEAD_DIMS += (224, 248, 255, 256)
ON_CUDA = {(d, HALF[i % 2]) for i, d in enumerate((8, 24, 33, 40, 65, 72, 80, 96, 128, 160, 192, 256))}
ON_CUDA |= {(64, "float16"), (128, "bfloat16"), (256, "float16")}


@pytest.mark.when(holds=lambda backend, head_dim, dtype: not backend.on_gpu or (head_dim, dtype) in ON_CUDA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(backend, rng, head_dim, dtype):
    lengths = [0, 5, 70]
    cache = paged(rng, held(rng, dtype, lengths, head_dim=head_dim), 16)
    step(backend, normal(rng, (3, 1, 8, head_dim), dtype), cache, cache_seqlens=ints(*lengths))


def group_compiles(backend, group, seqlen_q):
    return not backend.on_gpu or group in (1, 4) or seqlen_q in (1, 3, 16)


@pytest.mark.when(holds=group_compiles)
@pytest.mark.parametrize("seqlen_q", range(1, 17))
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16])
def test_groups_and_query_lengths(backend, rng, group, seqlen_q):
    """Several new tokens, causal among themselves; short sequences have fewer keys than queries."""
    lengths = [0, 1, 9, 40, 129]
    cache = dense(held(rng, "float16", lengths), 130)
    step(
        backend, normal(rng, (5, seqlen_q, 2 * group, 64), "float16"), cache, cache_seqlens=ints(*lengths), causal=True
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 5), (24, 1), (12, 3), (40, 8)])
def test_heads(backend, rng, heads, kv_heads):
    lengths = [33, 100]
    cache = paged(rng, held(rng, "bfloat16", lengths, kv_heads=kv_heads, head_dim=128), 16)
    q = normal(rng, (2, 1, heads, 128), "bfloat16")
    step(backend, q, cache, cache_seqlens=ints(*lengths))


# ------------------------------------------------------------------------------------------ where keys lie


@pytest.mark.parametrize("combined", [True, False], ids=["combined", "apart"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 64, 256])
def test_paged(backend, rng, block_size, layout, combined):
    cache = paged(rng, held(rng, "float16", LENGTHS), block_size, layout, combined)
    q = normal(rng, (len(LENGTHS), 1, 8, 64), "float16")
    step(backend, q, cache, cache_seqlens=ints(*LENGTHS))


@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("block_size", [0, 16], ids=["dense", "paged"])
def test_leftpad(backend, rng, block_size, seqlen_q):
    lengths, padding = [0, 1, 17, 130, 64, 90], ints(0, 1, 4, 127, 0, 33)
    pairs = held(rng, "float16", lengths)
    for pair, skipped in zip(pairs, padding, strict=True):
        for rows in pair:
            rows[:skipped] = np.nan
    cache = paged(rng, pairs, block_size) if block_size else dense(pairs, 130)
    q = normal(rng, (6, seqlen_q, 8, 64), "float16")
    for options in ({}, {"causal": True}, {"window": (20, 0)}):
        step(backend, q, cache, cache_seqlens=ints(*lengths), cache_leftpad=padding, **options)


def test_entries_in_any_order_and_more_than_once(backend, rng):
    """Several sequences may read one entry, each as much of it as it uses."""
    cache = dense(held(rng, "float16", [90, 70, 80]), 90, [3, 0, 2])
    q = normal(rng, (5, 1, 8, 64), "float16")
    cache.places["cache_batch_idx"] = ints(2, 3, 3, 0, 2)
    step(backend, q, cache, cache_seqlens=ints(80, 90, 17, 70, 0))


@pytest.mark.parametrize("length", [None, 0, 1, 77, 100])
@pytest.mark.parametrize("block_size", [0, 20], ids=["dense", "paged"])
def test_one_length_for_all_or_none(backend, rng, block_size, length):
    pairs = held(rng, "float16", [100, 100])
    cache = paged(rng, pairs, block_size) if block_size else dense(pairs, 100)
    if length is None and block_size:
        cache.places["block_table"] = cache.places["block_table"][:, :5].copy()
    step(backend, normal(rng, (2, 3, 8, 64), "float16"), cache, cache_seqlens=length, causal=True)


def test_many_short_sequences_and_a_long_one(backend, rng):
    """What splits the work by tokens must find each sequence's share of it."""
    lengths = [*rng.integers(0, 40, 150).tolist(), 3000, *rng.integers(0, 40, 20).tolist()]
    cache = dense(held(rng, "float16", lengths, kv_heads=1), 3000)
    step(backend, normal(rng, (len(lengths), 1, 4, 64), "float16"), cache, cache_seqlens=ints(*lengths))


# Of a single sequence each kv head is cut into as many shares as the chip has for it: from many down to one.
@pytest.mark.parametrize("length", [0, 1, 33, 600])
@pytest.mark.parametrize("kv_heads", [1, 8, 30, 44, 66, 100])
def test_one_sequence(backend, rng, kv_heads, length):
    """With fewer keys than shares among others, in a table that reaches far beyond them."""
    cache = paged(rng, held(rng, "float16", [length], kv_heads=kv_heads), 16, capacity=2100)
    step(backend, normal(rng, (1, 1, kv_heads, 64), "float16"), cache, cache_seqlens=ints(length))


@pytest.mark.parametrize("capacity", [700, 2100, 9000])
@pytest.mark.parametrize("heads", [4, 16, 32])
def test_one_sequence_of_long_caches(backend, rng, heads, capacity):
    """Clusters and blocks by themselves, one and several of them to a kv head; the same bits when called again."""
    for length in (capacity - 37, 50):
        cache = paged(rng, held(rng, "bfloat16", [length], head_dim=128), 16, capacity=capacity)
        q = normal(rng, (1, 1, heads, 128), "bfloat16")
        first = step(backend, q, cache, cache_seqlens=ints(length))
        for one, other in zip(first, step(backend, q, cache, cache_seqlens=ints(length)), strict=True):
            assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("names", [("window",), ("causal", "softcap", "alibi"), ("sinks", "causal")], ids="-".join)
@pytest.mark.parametrize("block_size", [0, 3, 64], ids=["dense", "blocks of 3", "blocks of 64"])
def test_one_sequence_with_features(backend, rng, block_size, names):
    """New tokens and padding besides, and queries by the dozen."""
    pairs = held(rng, "float16", [900])
    cache = paged(rng, pairs, block_size, "HND", capacity=920) if block_size else dense(pairs, 920, [2])
    for seqlen_q in (1, 13):
        q, k, v = normal(rng, (1, seqlen_q, 8, 64), "float16"), *normal(rng, (2, 1, seqlen_q, 2, 64), "float16")
        options = {"cache_seqlens": ints(900)} | features(rng, *names, batch=1, heads=8)
        step(backend, q, cache, **options)
        step(backend, q, cache, **options, k=k, v=v, **tables(rng, 920, 16, "float16"))
        step(backend, q, cache, **options, cache_leftpad=ints(35))


def test_one_sequence_in_fp8(backend, rng):
    pairs = held(rng, "bfloat16", [1500], kv_dtype=FP8[0])
    q, k, v = normal(rng, (1, 2, 8, 64), "bfloat16"), *normal(rng, (2, 1, 2, 2, 64), "bfloat16")
    options = {"k": k, "v": v, "cache_seqlens": ints(1500), "causal": True, "kv_dtype": FP8[0]} | SCALES["heads"](2)
    step(backend, q, paged(rng, pairs, 16, capacity=1600), **options)


# Enough kv heads in all for a thread block to read several of a sequence's side by side.
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "seqlen_q"), [(64, 8, 8, 1), (64, 32, 8, 3), (130, 8, 8, 1), (150, 12, 6, 2)]
)
@pytest.mark.parametrize("block_size", [0, 16], ids=["dense", "paged"])
def test_heads_side_by_side(backend, rng, block_size, batch, heads, kv_heads, seqlen_q):
    lengths = [*rng.integers(0, 90, batch - 1).tolist(), 300]
    pairs = held(rng, "float16", lengths, kv_heads=kv_heads)
    layout = "HND" if heads > 8 else "NHD"
    cache = paged(rng, pairs, block_size, layout, capacity=304) if block_size else dense(pairs, 304)
    q = normal(rng, (batch, seqlen_q, heads, 64), "float16")
    k, v = normal(rng, (2, batch, seqlen_q, kv_heads, 64), "float16")
    options = {"cache_seqlens": ints(*lengths)}
    step(backend, q, cache, **options, window=(70, 0))
    step(backend, q, cache, **options, k=k, v=v, causal=True, **tables(rng, 304, 32, "float16"))
    step(backend, q, cache, **options, **features(rng, "softcap", "batch_alibi", "sinks", batch=batch, heads=heads))


def test_heads_side_by_side_in_fp8(backend, rng):
    lengths = rng.integers(0, 90, 64).tolist()
    cache = paged(rng, held(rng, "bfloat16", lengths, kv_heads=8, kv_dtype=FP8[0]), 16, capacity=96)
    q, k, v = normal(rng, (64, 1, 32, 64), "bfloat16"), *normal(rng, (2, 64, 1, 8, 64), "bfloat16")
    options = {"k": k, "v": v, "cache_seqlens": ints(*lengths), "kv_dtype": FP8[0]} | SCALES["heads"](8)
    step(backend, q, cache, **options)


@pytest.mark.parametrize(("batch", "seqlen_q", "rows"), [(0, 1, 7), (2, 0, 7), (2, 1, 0), (2, 4, 0)])
def test_nothing_to_see(backend, rng, batch, seqlen_q, rows):
    cache = Cache(normal(rng, (2, batch, rows, 2, 64), "float16"), 0, {})
    step(backend, normal(rng, (batch, seqlen_q, 8, 64), "float16"), cache, cache_seqlens=ints(*[0] * batch))
    step(backend, normal(rng, (batch, seqlen_q, 8, 64), "float16"), cache, causal=True)


@pytest.mark.parametrize("form", LSE_FORMS)
@pytest.mark.parametrize("num_splits", [0, 1, 5])
def test_forms_of_the_lse(backend, rng, num_splits, form):
    """Of sequences shorter than their queries, of none, and of one that many thread blocks share."""
    lengths = [0, 1, 3, 17, 1500]
    cache = paged(rng, held(rng, "float16", lengths), 16, capacity=1510)
    q = normal(rng, (5, 3, 8, 64), "float16")
    options = {"cache_seqlens": ints(*lengths), "causal": True, "num_splits": num_splits, "return_lse": form}
    step(backend, q, cache, **options)
    step(backend, q, cache, **options, **features(rng, "sinks", heads=8))
    k, v = normal(rng, (2, 5, 1, 2, 64), "float16")
    step(backend, q, cache, **options, k=k, v=v)


# ---------------------------------------------------------------------------------------------------- masks


def features_compile(backend, dtype, names):
    return not backend.on_gpu or dtype == ("float16" if len(names) < 4 else "bfloat16")


@pytest.mark.when(holds=features_compile)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "names",
    [
        ("softcap",),
        ("alibi",),
        ("batch_alibi", "causal"),
        ("sinks",),
        ("sinks", "window"),
        ("negative_scale", "causal"),
        ("zero_scale",),
        ("large_scale", "causal"),
        ("softcap", "negative_scale"),
        ("softcap", "alibi", "sinks", "window"),
    ],
    ids="-".join,
)
def test_features(backend, rng, names, dtype):
    cache = paged(rng, held(rng, dtype, LENGTHS), 16)
    q = normal(rng, (len(LENGTHS), 3, 4, 64), dtype)
    step(backend, q, cache, cache_seqlens=ints(*LENGTHS), **features(rng, *names, batch=len(LENGTHS)))


@pytest.mark.parametrize("seqlen_q", [1, 5])
@pytest.mark.parametrize("window", [(0, 0), (5, 0), (-1, 3), (7, -1), (3, 2), (63, 0), (64, 0), (10**6, 0)], ids=str)
def test_windows_read_nothing_before_them(backend, rng, window, seqlen_q):
    """Blocks that no query sees are gone, as engines with a sliding window leave them."""
    cache = paged(rng, held(rng, "float16", LENGTHS), 16)
    table = cache.places["block_table"]
    if window[0] >= 0:
        for b, length in enumerate(LENGTHS):
            table[b, : max(length - seqlen_q - window[0], 0) // 16] = -1
    q = normal(rng, (len(LENGTHS), seqlen_q, 8, 64), "float16")
    here = [backend.put(part) for part in cache.split(cache.array)]
    options = {"cache_seqlens": ints(*LENGTHS), "window": window}
    keep = np.where(table == -1, 0, table)  # the oracle reads every row, and then leaves it out
    expected = oracle.attention_with_kvcache(q, *cache.split(np.nan_to_num(cache.array)), block_table=keep, **options)
    for check in (True, False):
        result = backend.call("attention_with_kvcache", q, *here, block_table=table, check=check, **options)
        expected.check(*result, "float16")


# ---------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("num_splits", [0, 1, 2, 5, 64, 2**31 - 1, 2**40, np.int64(3)])
@pytest.mark.parametrize("block_size", [0, 16], ids=["dense", "paged"])
def test_splits_change_no_result(backend, rng, block_size, num_splits):
    lengths = [0, 3, 700, 1500, 64]
    pairs = held(rng, "float16", lengths, kv_heads=1)
    cache = paged(rng, pairs, block_size) if block_size else dense(pairs, 1500)
    q = normal(rng, (5, 2, 4, 64), "float16")
    options = {"cache_seqlens": ints(*lengths), "num_splits": num_splits, "causal": True}
    first = step(backend, q, cache, **options)
    for one, other in zip(first, step(backend, q, cache, **options), strict=True):
        assert one.tobytes() == other.tobytes(), "the same call twice, bit for bit"


# ---------------------------------------------------------------------------------------- appending and rotation


def append_compiles(backend, dtype, seqlen_q, seqlen_new):
    return not backend.on_gpu or dtype == "float16" or (dtype == "bfloat16" and (seqlen_q, seqlen_new) == (1, 1))


@pytest.mark.when(holds=append_compiles)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_new"), [(1, 1), (5, 5), (2, 7), (7, 2), (3, 0), (1, 40)])
def test_append(backend, rng, seqlen_q, seqlen_new, dtype):
    q = normal(rng, (len(LENGTHS), seqlen_q, 2, 64), dtype)
    k, v = normal(rng, (2, len(LENGTHS), seqlen_new, 2, 64), dtype)
    pairs, options = held(rng, dtype, LENGTHS), {"k": k, "v": v, "cache_seqlens": ints(*LENGTHS), "causal": True}
    step(backend, q, paged(rng, pairs, 16, capacity=144), **options)
    step(backend, q, dense(pairs, 140, rng.permutation(len(LENGTHS) + 2)[: len(LENGTHS)].tolist()), **options)
    step(backend, q, dense(held(rng, dtype, [9] * len(LENGTHS)), 9 + seqlen_new), **options | {"cache_seqlens": 9})


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_append_to_blocks(backend, rng, block_size, layout):
    """New rows begin, cross and end in blocks everywhere, and heads of q outnumber those of the cache or do not."""
    for heads in (2, 8) if block_size == 3 or not backend.on_gpu else (8,):
        q = normal(rng, (len(LENGTHS), 3, heads, 64), "float16")
        k, v = normal(rng, (2, len(LENGTHS), 4, 2, 64), "float16")
        cache = paged(rng, held(rng, "float16", LENGTHS), block_size, layout, capacity=128)
        step(backend, q, cache, k=k, v=v, cache_seqlens=ints(*LENGTHS))


def test_append_behind_padding(backend, rng):
    lengths, padding = [0, 4, 17, 70], ints(0, 4, 5, 66)
    q = normal(rng, (4, 2, 4, 64), "float16")
    k, v = normal(rng, (2, 4, 2, 2, 64), "float16")
    pairs = held(rng, "float16", lengths)
    options = {"k": k, "v": v, "cache_seqlens": ints(*lengths), "cache_leftpad": padding, "causal": True}
    step(backend, q, dense(pairs, 80, [3, 0, 2, 5]), **options)
    step(backend, q, paged(rng, pairs, 16, capacity=80), **options)
    step(backend, q, dense(pairs, 80), **options, **tables(rng, 80, 32, "float16"))


def test_append_of_strided_rows(backend, rng):
    """New rows cut from one projection of queries, keys and values."""
    joint = normal(rng, (3, 2, 12, 64), "float16")
    q, k, v = (
        backend.place(joint, lambda x, cut=cut: x[:, :, cut]) for cut in (slice(0, 8), slice(8, 10), slice(10, 12))
    )
    lengths = [0, 33, 64]
    cache = paged(rng, held(rng, "float16", lengths), 16, capacity=80)
    here = backend.put(cache.array.copy())
    options = cache.places | tables(rng, 80, 16, "float16") | {"cache_seqlens": ints(*lengths), "causal": True}
    result = backend.call("attention_with_kvcache", q, *cache.split(here), k=k, v=v, **options)
    stored = cache.split(backend.get(here))
    options |= {"k": k.array, "v": v.array}
    expected = oracle.attention_with_kvcache(q.array, *cache.split(cache.array), stored=stored, **options)
    expected.check(*result, "float16")


ROTARY_ON_CUDA = [
    (32, True, "own", "float16"),
    (32, False, "float32", "bfloat16"),
    (20, True, "float32", "float16"),
    (8, False, "own", "float16"),
    (3, True, "own", "bfloat16"),
    (1, False, "own", "float16"),
]


@pytest.mark.when(holds=lambda backend, **case: not backend.on_gpu or tuple(case.values()) in ROTARY_ON_CUDA)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", ["own", "float32"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("half", [1, 3, 8, 20, 32])
def test_rotary(backend, rng, half, interleaved, table_dtype, dtype):
    """Whole heads and parts of them; queries along positions under causal or a window, else all at one."""
    lengths = [0, 5, 63, 100]
    q = normal(rng, (4, 3, 8, 64), dtype)
    k, v = normal(rng, (2, 4, 3, 2, 64), dtype)
    rotary = tables(rng, 110, half, dtype if table_dtype == "own" else table_dtype)
    cache = paged(rng, held(rng, dtype, lengths), 16, capacity=110)
    options = {"k": k, "v": v, "cache_seqlens": ints(*lengths), "rotary_interleaved": interleaved} | rotary
    step(backend, q, cache, **options, causal=True)
    if half == 32 or not backend.on_gpu:
        step(backend, q, cache, **options)
    if not backend.on_gpu:
        for window in ((20, 0), (-1, 2), (-1, -1)):
            step(backend, q, cache, **options, window=window)


@pytest.mark.parametrize(("seqlen_q", "seqlen_new"), [(1, 1), (4, 2), (2, 5), (3, 0)])
def test_rotary_of_dense_caches(backend, rng, seqlen_q, seqlen_new):
    """Queries need not be as many as new keys; without any the queries are rotated all the same."""
    lengths = [0, 5, 63, 60]
    q = normal(rng, (4, seqlen_q, 4, 128), "bfloat16")
    k, v = normal(rng, (2, 4, seqlen_new, 4, 128), "bfloat16")
    options = {"k": k, "v": v} | tables(rng, 68, 64, "bfloat16") | {"rotary_interleaved": False, "causal": True}
    step(
        backend,
        q,
        dense(held(rng, "bfloat16", lengths, kv_heads=4, head_dim=128), 70),
        cache_seqlens=ints(*lengths),
        **options,
    )
    pairs = held(rng, "bfloat16", [33] * 4, kv_heads=4, head_dim=128)
    step(backend, q, dense(pairs, 70), cache_seqlens=33, **options)


@pytest.mark.parametrize("head_dim", [40, 80, 256])
def test_rotary_of_other_head_dims(backend, rng, head_dim):
    lengths = [0, 50]
    q = normal(rng, (2, 1, 8, head_dim), "float16")
    k, v = normal(rng, (2, 2, 1, 2, head_dim), "float16")
    options = {"k": k, "v": v, "cache_seqlens": ints(*lengths)} | tables(rng, 51, head_dim // 4, "float32")
    step(backend, q, paged(rng, held(rng, "float16", lengths, head_dim=head_dim), 16, capacity=51), **options)


def test_the_position_of_a_row_is_its_number_in_the_sequence(backend, rng):
    """A key and a query at equal positions turn alike: their product is that of the unrotated ones."""
    q = normal(rng, (1, 1, 1, 64), "float16")
    k, v = q.copy(), np.zeros_like(q)
    rotary = tables(rng, 200, 32, "float32")
    for length in (0, 1, 77, 199):
        cache = dense(held(rng, "float16", [length], kv_heads=1), 200)
        cache.array[1] = 1  # values of older keys: the new key's share of the softmax shows in the output
        moved = [backend.put(part.copy()) for part in cache.split(cache.array)]
        options = {"k": k, "v": v, "cache_seqlens": length, "window": (0, 0)} | rotary
        _, lse = backend.call("attention_with_kvcache", q, *moved, **options)
        np.testing.assert_allclose(lse.item(), (q.astype(np.float64) ** 2).sum() / 8, rtol=2e-3)


def test_decoding_step_by_step_equals_one_causal_pass(backend, rng):
    """Twelve tokens, one by one through a paged cache with rotary, against attention over all of them at once."""
    q = normal(rng, (2, 12, 4, 64), "float16")
    k, v = normal(rng, (2, 2, 12, 2, 64), "float16")
    rotary = tables(rng, 12, 32, "float32")
    array, table = oracle.paged_cache(rng, held(rng, "float16", [0, 0]), 5, capacity=12)
    here = backend.put(array.copy())
    out, lse = np.empty_like(q), np.empty((2, 4, 12), np.float32)
    for i in range(12):
        now = slice(i, i + 1)
        new = {name: np.ascontiguousarray(rows[:, now]) for name, rows in (("k", k), ("v", v))}
        options = {"block_table": table, "cache_seqlens": i} | new | rotary
        out[:, now], lse[:, :, now] = backend.call(
            "attention_with_kvcache", np.ascontiguousarray(q[:, now]), here[:, 0], here[:, 1], **options
        )
    stored = backend.get(here)
    options = {"k": k, "v": v, "block_table": table, "cache_seqlens": 0, "causal": True} | rotary
    parts = stored[:, 0], stored[:, 1]
    oracle.check_caches(parts, *oracle.append_range(array[:, 0], array[:, 1], k, v, block_table=table, **rotary))
    oracle.attention_with_kvcache(q, *parts, stored=parts, **options).check(out, lse, "float16")


# ------------------------------------------------------------------------------------------------ FP8 caches

SCALES = {
    "number": lambda heads: {"k_scale": 0.7, "v_scale": 1.3},
    "tensor": lambda heads: {"k_scale": np.array(0.03, np.float32), "v_scale": np.array([20.0], np.float32)},
    "heads": lambda heads: {
        "k_scale": np.linspace(0.1, 2, heads, dtype=np.float32),
        "v_scale": np.linspace(3, 0.2, heads, dtype=np.float32),
    },
    "number and heads": lambda heads: {"k_scale": 1, "v_scale": np.linspace(3, 0.2, heads, dtype=np.float32)},
}


def fp8_compiles(backend, kv_dtype, scales, dtype):
    return not backend.on_gpu or (kv_dtype, dtype) in zip(FP8, ("bfloat16", "float16"), strict=True)


@pytest.mark.when(holds=fp8_compiles)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kv_dtype", FP8)
def test_fp8(backend, rng, kv_dtype, scales, dtype):
    cache = paged(rng, held(rng, dtype, LENGTHS, kv_dtype=kv_dtype), 16)
    q = normal(rng, (len(LENGTHS), 2, 8, 64), dtype)
    step(backend, q, cache, cache_seqlens=ints(*LENGTHS), kv_dtype=kv_dtype, **SCALES[scales](2))


@pytest.mark.when(holds=fp8_compiles)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kv_dtype", FP8)
def test_fp8_append(backend, rng, kv_dtype, scales, dtype):
    """With rotation and without; values far beyond what the format holds are stored as its largest."""
    q = normal(rng, (len(LENGTHS), 2, 8, 64), dtype)
    k, v = normal(rng, (2, len(LENGTHS), 2, 2, 64), dtype)
    v[0, 0, 0, :4] = [6e4, -6e4, 1e-3, -1e-6]
    pairs = held(rng, dtype, LENGTHS, kv_dtype=kv_dtype)
    options = {"k": k, "v": v, "cache_seqlens": ints(*LENGTHS), "causal": True, "kv_dtype": kv_dtype}
    options |= SCALES[scales](2)
    step(backend, q, paged(rng, pairs, 16, capacity=103), **options)
    step(backend, q, dense(pairs, 103), **options, **tables(rng, 103, 32, "float32"), rotary_interleaved=False)


@pytest.mark.when(
    holds=lambda backend, head_dim, kv_dtype: (
        not backend.on_gpu or (head_dim in (16, 80, 128, 256) and kv_dtype == FP8[head_dim < 100])
    )
)
@pytest.mark.parametrize("kv_dtype", FP8)
@pytest.mark.parametrize("head_dim", [8, 16, 40, 72, 80, 96, 100, 128, 192, 256])
def test_fp8_head_dims(backend, rng, head_dim, kv_dtype):
    lengths = [0, 3, 100]
    pairs = held(rng, "bfloat16", lengths, head_dim=head_dim, kv_dtype=kv_dtype)
    q = normal(rng, (3, 1, 8, head_dim), "bfloat16")
    k, v = normal(rng, (2, 3, 1, 2, head_dim), "bfloat16")
    options = {"cache_seqlens": ints(*lengths), "kv_dtype": kv_dtype, "k_scale": 0.5, "v_scale": 2.0}
    step(backend, q, paged(rng, pairs, 16, capacity=101), k=k, v=v, **options)
    if head_dim == 128 or not backend.on_gpu:
        step(backend, q, paged(rng, pairs, 16), **options)


@pytest.mark.parametrize(
    "names", [("softcap", "causal"), ("alibi", "sinks"), ("negative_scale", "window")], ids="-".join
)
def test_fp8_features(backend, rng, names):
    cache = paged(rng, held(rng, "float16", LENGTHS, kv_dtype=FP8[0]), 16)
    q = normal(rng, (len(LENGTHS), 3, 4, 64), "float16")
    options = {"kv_dtype": FP8[0], "k_scale": 0.5, "v_scale": 2.0} | features(rng, *names)
    step(backend, q, cache, cache_seqlens=ints(*LENGTHS), **options)


@pytest.mark.when(holds=lambda backend, block_size, kv_dtype: not backend.on_gpu or kv_dtype == FP8[block_size == 1])
@pytest.mark.parametrize("kv_dtype", FP8)
@pytest.mark.parametrize("block_size", [0, 1, 64], ids=["dense", "1", "64"])
def test_fp8_in_other_caches(backend, rng, block_size, kv_dtype):
    pairs = held(rng, "float16", LENGTHS, kv_dtype=kv_dtype)
    cache = paged(rng, pairs, block_size, "HND") if block_size else dense(pairs, 100)
    options = {"cache_seqlens": ints(*LENGTHS), "kv_dtype": kv_dtype, "k_scale": 0.5, "v_scale": 2.0}
    step(backend, normal(rng, (len(LENGTHS), 1, 8, 64), "float16"), cache, **options)


@pytest.mark.parametrize("kv_dtype", FP8)
def test_every_fp8_number_is_read_and_written(backend, rng, kv_dtype):
    """One key alone hands its value out: every byte that is a number, also the smallest, comes out times the scale."""
    numbers = np.arange(256, dtype=np.uint8)
    values = numbers.view(oracle.FP8[kv_dtype]).astype(np.float32)
    finite = np.isfinite(values)
    stored = np.where(finite, numbers, 0).astype(np.uint8).reshape(4, 1, 1, 64)
    cache = Cache(np.stack([np.zeros_like(stored), stored]), 0, {})
    q = normal(rng, (4, 1, 1, 64), "bfloat16")
    options = {"kv_dtype": kv_dtype, "k_scale": 1.0, "v_scale": 2.0**-3}
    out, _ = step(backend, q, cache, **options)
    wanted = np.where(finite, values, 0) / 8
    assert (out.ravel().astype(np.float32) == wanted).all(), "of 3 bits and more than float16's range: exact"
    v = (np.where(finite, values, 0) / 8).astype(np.float32).astype(q.dtype).reshape(4, 1, 1, 64)
    here = [backend.put(np.full_like(stored, 0x11)) for _ in range(2)]
    backend.call("attention_with_kvcache", q, *here, k=np.zeros_like(v), v=v, cache_seqlens=0, **options)
    assert (backend.get(here[1])[..., :] == stored).all(), "and back"


@pytest.mark.parametrize("kv_dtype", FP8)
def test_what_is_no_number_is_stored_as_none(backend, rng, kv_dtype):
    """NaN stays NaN; infinity is too large, and becomes the largest number."""
    k, v = np.zeros((2, 1, 1, 1, 64), np.float16)
    v[..., :3] = [np.nan, np.inf, -np.inf]
    here = [backend.put(np.zeros((1, 4, 1, 64), np.uint8)) for _ in range(2)]
    fp8 = {"kv_dtype": kv_dtype, "k_scale": 1.0, "v_scale": 1.0}
    cupyattn.append_kv(*here, backend.put(k), backend.put(v), cache_seqlens=2, **fp8)
    got = backend.get(here[1])[0, 2, 0, :4].view(oracle.FP8[kv_dtype]).astype(np.float32)
    largest = 448.0 if kv_dtype == FP8[0] else 57344.0
    np.testing.assert_array_equal(got, [np.nan, largest, -largest, 0])


@pytest.mark.backends("numpy")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize(("kv_dtype", "alias"), [("float8_e4m3fn", "e4m3"), ("float8_e5m2", "e5m2")])
def test_the_librarys_own_fp8(backend, rng, kv_dtype, alias, library):
    """Bytes with kv_dtype by either name, and the library's own dtype with or without: the same, bit for bit."""
    lengths = ints(0, 3, 17)
    stored = np.stack([oracle.to_fp8(normal(rng, (3, 20, 2, 64), "float16"), kv_dtype) for _ in range(2)])
    q, k, v = normal(rng, (3, 1, 4, 64), "float16"), *normal(rng, (2, 3, 1, 2, 64), "float16")

    def run(form, **named):
        caches = stored.copy()
        if library == "torch":
            torch = pytest.importorskip("torch")
            own = torch.from_numpy(caches).view(getattr(torch, kv_dtype)) if form == "own" else torch.from_numpy(caches)
            arrays = [torch.from_numpy(array) for array in (q, k, v)]
        else:
            own = caches.view(oracle.FP8[kv_dtype]) if form == "own" else caches
            arrays = [q, k, v]
        options = {"k": arrays[1], "v": arrays[2], "cache_seqlens": lengths, "k_scale": 0.5, "v_scale": 0.25}
        out = cupyattn.attention_with_kvcache(arrays[0], own[0], own[1], **options, **named)
        return np.asarray(out), caches

    results = [run("bytes", kv_dtype=kv_dtype), run("bytes", kv_dtype=alias), run("own"), run("own", kv_dtype=kv_dtype)]
    assert (results[0][1] != stored).any()
    for out, caches in results[1:]:
        assert out.tobytes() == results[0][0].tobytes() and caches.tobytes() == results[0][1].tobytes()


# ----------------------------------------------------------------------------------------------- the other append


def append_alone(backend, cache, k, v, **options):
    here = backend.put(cache.array.copy())
    moved = {name: backend.put(x) if isinstance(x, np.ndarray) else x for name, x in (options | cache.places).items()}
    assert cupyattn.append_kv(*cache.split(here), backend.put(k), backend.put(v), **moved) is None
    return backend.get(here)


@pytest.mark.when(
    holds=lambda backend, dtype, kv_dtype: (
        not backend.on_gpu or (dtype, kv_dtype) in (("float16", None), ("float16", FP8[0]), ("bfloat16", FP8[1]))
    )
)
@pytest.mark.parametrize("kv_dtype", [None, *FP8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_kv_rotates_and_rounds(backend, rng, dtype, kv_dtype):
    new, lengths = [3, 0, 1, 40], [0, 9, 63, 20]
    k, v = normal(rng, (2, sum(new) + 2, 2, 64), dtype)
    options = {"cu_seqlens_new": oracle.cumulative(new), "cache_seqlens": ints(*lengths)}
    options |= {"kv_dtype": kv_dtype} | SCALES["heads"](2) if kv_dtype else {}
    pairs = held(rng, dtype, lengths, kv_dtype=kv_dtype)
    caches = dense(pairs, 64), paged(rng, pairs, 16, capacity=70)
    for cache in caches[backend.on_gpu :]:
        for rotary in ({}, tables(rng, 64, 8, dtype), tables(rng, 64, 32, "float32") | {"rotary_interleaved": False}):
            stored = append_alone(backend, cache, k, v, **options, **rotary)
            low, high = oracle.append_range(*cache.split(cache.array), k, v, **options, **rotary, **cache.places)
            oracle.check_caches(cache.split(stored), low, high, kv_dtype)


def test_append_inside_and_alone_leave_the_same_cache(backend, rng):
    """Bit for bit, whoever appends: rows rotated by either may be mixed in one cache."""
    lengths = [0, 9, 63, 20]
    q = normal(rng, (4, 3, 8, 64), "float16")
    k, v = normal(rng, (2, 4, 3, 2, 64), "float16")
    for kv_dtype in (None, FP8[0]) if backend.on_gpu else (None, *FP8):
        options = {"cache_seqlens": ints(*lengths)} | tables(rng, 80, 32, "float32")
        options |= {"kv_dtype": kv_dtype, "k_scale": 0.3, "v_scale": 1.7} if kv_dtype else {}
        cache = paged(rng, held(rng, "float16", lengths, kv_dtype=kv_dtype), 16, capacity=70)
        here = backend.put(cache.array.copy())
        backend.call("attention_with_kvcache", q, *cache.split(here), k=k, v=v, causal=True, **options, **cache.places)
        assert backend.get(here).tobytes() == append_alone(backend, cache, k, v, **options).tobytes()


# ------------------------------------------------------------------------------------------------ bad input


def bad_step(rng, kv_dtype=None, block_size=0):
    """A good step of two sequences: q, the cache and the options; rows for 20 tokens each."""
    lengths = [5, 17]
    pairs = held(rng, "float16", lengths, kv_dtype=kv_dtype)
    q = normal(rng, (2, 2, 4, 64), "float16")
    k, v = normal(rng, (2, 2, 2, 2, 64), "float16")
    cache = paged(rng, pairs, block_size, capacity=20) if block_size else dense(pairs, 20)
    options = {"k": k, "v": v, "cache_seqlens": ints(*lengths)} | cache.places
    if kv_dtype:
        options |= {"kv_dtype": kv_dtype, "k_scale": 0.5, "v_scale": 2.0}
    else:
        options |= tables(rng, 19, 16, "float16")
    return q, cache, options


def array(*shape, dtype="float16"):
    return np.ones(shape, np.dtype(dtype))


def every_other(*shape, dtype):
    """An array whose last dimension is not contiguous, on a backend."""
    return lambda backend: backend.place(array(*shape, dtype=dtype), lambda x: x[..., ::2])


def bad_views(options):
    """The options that `every_other` made."""
    return [(name, x) for name, x in options.items() if hasattr(x, "base") and not isinstance(x, np.ndarray)]


def table_like(*shape, dtype="float16"):
    return {"rotary_cos": array(*shape, dtype=dtype), "rotary_sin": array(*shape, dtype=dtype)}


NO_ROWS = {"k": None, "v": None}
REFUSED = {
    "too long": (None, {"cache_seqlens": ints(5, 19)}, "cache_seqlens: got 19 tokens for sequence 1 plus 2 new"),
    "one length too long": (None, {"cache_seqlens": 19}, "cache_seqlens: got 19 tokens plus 2 new"),
    "more than the cache has": (None, {"k": array(2, 21, 2, 64), "v": array(2, 21, 2, 64)}, "k: got 21 new rows"),
    "negative": (None, {"cache_seqlens": ints(5, -1)}, "cache_seqlens: got -1 for sequence 1"),
    "no lengths": (None, {"cache_seqlens": None}, "cache_seqlens: got None, expected how many tokens"),
    "one entry twice": (None, {"cache_batch_idx": ints(1, 1)}, "cache_batch_idx: got the same cache entry twice"),
    "padding": (None, {"cache_leftpad": ints(8, 0)}, "cache_leftpad: got 8 for sequence 0, expected 0 to its length 7"),
    "splits": (None, {"num_splits": -1}, "num_splits: got -1, expected 0"),
    "half a split": (None, {"num_splits": 0.5}, "num_splits: got 0.5, expected an int"),
    "splits that are none": (None, {"num_splits": None}, "num_splits: got None, expected an int"),
    "positions": (None, table_like(18, 16), "rotary_cos: got 18 positions, expected at least 19: sequence 1"),
    "positions for one length": (None, table_like(18, 16) | {"cache_seqlens": 17}, "rotary_cos: got 18 positions"),
    "cosines without sines": (None, {"rotary_sin": None}, "rotary_sin: got None, expected rotary_cos and rotary_sin"),
    "sines without cosines": (None, {"rotary_cos": None}, "rotary_cos: got None"),
    "rotary without rows": (None, NO_ROWS, "k: got None, expected the new keys"),
    "rotary_dim too large": (None, table_like(40, 33), "rotary_cos: got 33 columns, .* expected 1 to 32"),
    "no rotary_dim": (None, table_like(40, 0), "rotary_cos: got 0 columns"),
    "tables of three dimensions": (None, table_like(40, 16, 1), "rotary_cos: got 3-D shape"),
    "tables of another dtype": (
        None,
        table_like(40, 16, dtype="bfloat16"),
        "rotary_cos: got bfloat16, expected float16",
    ),
    "tables of two dtypes": (None, {"rotary_sin": array(19, 16, dtype="float32")}, "rotary_sin: got float32"),
    "tables of two shapes": (None, {"rotary_sin": array(18, 16)}, r"rotary_sin: got shape \(18, 16\)"),
    "tables with gaps": (None, {"rotary_cos": every_other(19, 32, dtype="float16")}, "rotary_cos: got strides"),
    "a style that is none": (None, {"rotary_interleaved": "yes"}, "rotary_interleaved: got 'yes', expected True or"),
    "k without v": (None, {"v": None}, "v: got None, expected k and v together"),
    "scale for 16 bits": (None, {"k_scale": 0.5}, "k_scale: got a scale, expected None: the cache is float16"),
    "scales for 16 bits": (None, {"v_scale": array(2, dtype="float32")}, "v_scale: got a scale, expected None"),
    "kv_dtype for 16 bits": (None, {"kv_dtype": "e4m3"}, "k_cache: got float16, expected uint8 or float8_e4m3fn"),
    "kv_dtype of no format": (None, {"kv_dtype": "int8"}, "kv_dtype: got 'int8', expected 'float8_e4m3fn' or"),
    "kv_dtype of no kind": (None, {"kv_dtype": 8}, "kv_dtype: got 8, expected 'float8_e4m3fn' or"),
    "bytes of what": (
        FP8[0],
        {"kv_dtype": None, "k_scale": None},
        "k_cache: got uint8, .* or kv_dtype='float8_e4m3fn'",
    ),
    "no key scale": (FP8[0], {"k_scale": None}, "k_scale: got None, expected a number, or a float32 array"),
    "no value scale": (FP8[1], {"v_scale": None}, "v_scale: got None, expected a number, or a float32 array"),
    "scale of 0": (FP8[0], {"k_scale": 0.0}, "k_scale: got 0.0, expected a number above 0"),
    "negative scale": (FP8[0], {"v_scale": -1}, "v_scale: got -1.0, expected a number above 0"),
    "infinite scale": (FP8[0], {"v_scale": float("inf")}, "v_scale: got inf, expected a finite number"),
    "scale that is none": (FP8[0], {"v_scale": float("nan")}, "v_scale: got nan, expected a finite number"),
    "scale that is true": (FP8[0], {"v_scale": True}, "v_scale: got True, expected a number"),
    "scale of text": (FP8[0], {"v_scale": "1"}, "v_scale: got a str, expected an array"),
    "scale in 16 bits": (FP8[0], {"k_scale": array(2)}, "k_scale: got float16, expected float32"),
    "scales of other heads": (
        FP8[0],
        {"k_scale": array(4, dtype="float32")},
        r"k_scale: got shape \(4,\), expected \(\)",
    ),
    "scales of 0": (
        FP8[0],
        {"k_scale": np.array([1, 0], np.float32)},
        r"k_scale: got 0.0 at \[1\], expected finite numbers above 0",
    ),
    "scale that is no number": (FP8[1], {"v_scale": np.array(np.nan, np.float32)}, r"v_scale: got nan at \[0\]"),
    "scales with gaps": (FP8[0], {"k_scale": every_other(4, dtype="float32")}, "k_scale: got strides"),
    "rows of 32 bits": (
        FP8[0],
        {"k": array(2, 2, 2, 64, dtype="float32")},
        "k: got float32, expected q's dtype float16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_steps_write_nothing(backend, rng, name):
    kv_dtype, bad, message = REFUSED[name]
    q, cache, options = bad_step(rng, kv_dtype)
    here, out = backend.put(cache.array.copy()), backend.put(np.full_like(q, 7))
    options |= {argument: value(backend) if callable(value) else value for argument, value in bad.items()}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        backend.call("attention_with_kvcache", q, *cache.split(here), out=out, **options, check=True)
    assert backend.get(here).tobytes() == cache.array.tobytes()
    assert (backend.get(out) == 7).all()


NOT_OF_AN_APPEND = ("padding", "splits", "half a split", "splits that are none", "no lengths", "rotary without rows")
NOT_OF_AN_APPEND += ("k without v", "rows of 32 bits")


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in NOT_OF_AN_APPEND])
def test_refused_appends_write_nothing(backend, rng, name):
    kv_dtype, bad, message = REFUSED[name]
    _, cache, options = bad_step(rng, kv_dtype)
    here = backend.put(cache.array.copy())
    options |= {argument: value(backend) if callable(value) else value for argument, value in bad.items()}
    there = {name: backend.put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    there |= {name: x.view(backend.put(x.base)) for name, x in bad_views(options)}
    message = message.replace("expected float16", "expected (k's dtype )?float16")
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        cupyattn.append_kv(*cache.split(here), **there, check=True)
    assert backend.get(here).tobytes() == cache.array.tobytes()


@pytest.mark.parametrize("block", [-1, 1000])
def test_a_bad_block_under_a_step_is_refused(backend, rng, block):
    q, cache, options = bad_step(rng, block_size=8)
    here = backend.put(cache.array.copy())
    for column in (0, 2):  # read; read and written
        table = cache.places["block_table"].copy()
        table[1, column] = block
        with pytest.raises(ValueError, match=rf"^block_table: got block {block} at \[1, {column}\]"):
            backend.call(
                "attention_with_kvcache", q, *cache.split(here), **options | {"block_table": table}, check=True
            )
    table = cache.places["block_table"].copy()
    table[1, 2] = table[0, 0]
    options |= {"block_table": table, "cache_seqlens": ints(1, 17)}
    with pytest.raises(ValueError, match="^block_table: got block .* written twice"):
        backend.call("attention_with_kvcache", q, *cache.split(here), **options, check=True)
    assert backend.get(here).tobytes() == cache.array.tobytes()


def test_results_and_rows_must_lie_apart(backend, rng):
    """What a step writes may not be what it reads."""
    q, cache, options = bad_step(rng)
    q, k, v = (backend.put(x) for x in (q, options.pop("k"), options.pop("v")))
    here = backend.put(cache.array.copy())
    caches = cache.split(here)
    rest = {name: backend.put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    room = backend.put(np.zeros((2, 2, 4, 64), np.float16))

    def refused(name, came, **changes):
        arrays = {"q": q, "k": k, "v": v} | rest | changes
        with pytest.raises(ValueError, match=f"^{name}: got an array whose memory range meets {came}'s"):
            cupyattn.attention_with_kvcache(arrays.pop("q"), *caches, **arrays)

    refused("out", "k", k=room[:, :, :2], out=room)
    refused("out", "v", v=room[:, :, 2:], out=room)
    refused("out", "k_cache", out=here.reshape(2, -1)[0][: q.size].reshape(q.shape))
    refused("k", "v_cache", k=caches[1][:, :2])
    refused("q", "k_cache", q=here.reshape(2, -1)[0][: q.size].reshape(q.shape))
    assert backend.get(here).tobytes() == cache.array.tobytes()


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("name", ["positions", "long", "negative", "block", "entry"])
def test_unchecked_contents_spoil_their_own_sequence_alone(backend, rng, name):
    """Sequence 1's index does not fit: its rows are NaN, all others right, and nothing is written where it must not."""
    lengths = [5, 33, 20]
    q, k, v = normal(rng, (3, 2, 8, 64), "float16"), *normal(rng, (2, 3, 2, 2, 64), "float16")
    pairs = held(rng, "float16", lengths)
    cache = paged(rng, pairs, 16, capacity=35) if name == "block" else dense(pairs, 40, [2, 0, 1])
    good = {"k": k, "v": v, "cache_seqlens": ints(*lengths), "causal": True} | cache.places
    good |= tables(rng, 34 if name == "positions" else 40, 32, "float16")
    bad = dict(good)
    if name == "block":
        bad["block_table"] = good["block_table"].copy()
        bad["block_table"][1, 2] = len(cache.array)
    elif name == "entry":
        bad["cache_batch_idx"] = ints(2, 3, 1)
    elif name != "positions":
        bad["cache_seqlens"] = ints(5, 39 if name == "long" else -1, 20)
    here = backend.put(cache.array.copy())
    out, lse = backend.call("attention_with_kvcache", q, *cache.split(here), **bad)
    assert np.isnan(out[1, -1]).all() and np.isnan(lse[1, :, -1]).all()
    stored = cache.split(backend.get(here))
    good |= {name: np.pad(good[name], [(0, 6), (0, 0)]) for name in ("rotary_cos", "rotary_sin")}
    expected = oracle.attention_with_kvcache(q, *cache.split(cache.array), stored=stored, **good)
    expected.out[1] = out[1] = expected.lse[1] = lse[1] = np.nan
    expected.check(out, lse, "float16")
    if name != "positions":
        appended = {key: value for key, value in good.items() if key not in NOT_AN_APPENDS}
        low, high = oracle.append_range(*cache.split(cache.array), k, v, **appended)
        for part, original, *ends in zip(stored, cache.split(cache.array), low, high, strict=True):
            own = good["block_table"][1, :3] if name == "block" else [good["cache_batch_idx"][1]]
            others = np.setdiff1d(np.arange(len(part)), own)
            oracle.check_caches((part[others],) * 2, *((end[others],) * 2 for end in ends))
            if name in ("negative", "entry"):
                assert part[own].tobytes() == original[own].tobytes()


# ------------------------------------------------------------------------------------------- random steps


@st.composite
def steps(draw, on_gpu):
    """(q, cache, options) of any step. On CUDA fewer of what makes another compiled variant."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(0, 70) | st.sampled_from([0, 1, 16, 63, 64]), min_size=1, max_size=5))
    batch, seqlen_q, seqlen_new = len(lengths), draw(st.integers(1, 2 if on_gpu else 6)), draw(st.integers(0, 6))
    dtype, head_dim, kv_heads, group, block_size = "float16", 64, 2, 4, 16
    kv_dtype = draw(st.sampled_from([None, FP8[0]] if on_gpu else [None, None, *FP8]))
    if not on_gpu:
        dtype, block_size = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 20))
        head_dim, kv_heads, group = (draw(st.integers(1, most)) for most in (40, 3, 4))
    heads = kv_heads * group
    pairs = held(rng, dtype, lengths, kv_heads=kv_heads, head_dim=head_dim, kv_dtype=kv_dtype)
    appends = draw(st.booleans())
    if draw(st.booleans()) or (on_gpu and kv_dtype is not None):
        layout, combined = draw(st.sampled_from(["NHD", "HND"])), draw(st.booleans())
        cache = paged(rng, pairs, block_size, layout, combined, capacity=76)
    else:
        entries = draw(st.permutations(range(batch + 1)))[:batch]
        cache = dense(pairs, 76, entries)
        if not appends and draw(st.booleans()):  # to read, sequences may share entries
            shared = [draw(st.integers(0, batch - 1)) for _ in range(batch)]
            cache.places["cache_batch_idx"] = ints(*(entries[owner] for owner in shared))
            lengths = [draw(st.integers(0, lengths[owner])) for owner in shared]
    options = draw(masks(batch, heads, on_gpu)) | {"cache_seqlens": ints(*lengths)}
    if on_gpu:
        options = {name: value for name, value in options.items() if name not in ("softcap", "alibi_slopes")}
    options["num_splits"] = draw(st.sampled_from([0, 1, 2, 5, 64]))
    if appends:
        options |= dict(zip("kv", normal(rng, (2, batch, seqlen_new, kv_heads, head_dim), dtype), strict=True))
        if head_dim > 1 and draw(st.booleans()):
            half = 32 if on_gpu else draw(st.integers(1, head_dim // 2))
            options |= tables(rng, 76, half, "float32" if on_gpu else draw(st.sampled_from([dtype, "float32"])))
            options["rotary_interleaved"] = draw(st.just(True) if on_gpu else st.booleans())
    if draw(st.booleans()):
        seen = [length + (seqlen_new if appends else 0) for length in lengths]
        options["cache_leftpad"] = ints(*(draw(st.integers(0, length)) for length in seen))
    if kv_dtype is not None:
        options |= {"kv_dtype": kv_dtype} | SCALES[draw(st.sampled_from(sorted(SCALES)))](kv_heads)
    return normal(rng, (batch, seqlen_q, heads, head_dim), dtype), cache, options


def test_random_steps(backend):
    @settings(max_examples=60 if backend.on_gpu else 300)
    @given(st.data())
    def holds(data):
        q, cache, options = data.draw(steps(backend.on_gpu))
        step(backend, q, cache, **options)

    holds()


def test_a_sequence_does_not_depend_on_where_its_pages_lie(backend):
    """Any permutation of the blocks gives the same, bit for bit."""

    @settings(max_examples=10 if backend.on_gpu else 50)
    @given(st.data())
    def holds(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        lengths = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=4))
        cache = paged(rng, held(rng, "float16", lengths), 16)
        table = cache.places["block_table"]
        order = np.array(data.draw(st.permutations(range(len(cache.array)))))
        moved = np.empty_like(cache.array)
        moved[order] = cache.array
        renamed = np.where(table == oracle.JUNK_BLOCK, table, order[np.minimum(table, len(order) - 1)]).astype(np.int32)
        q = normal(rng, (len(lengths), 1, 8, 64), "float16")
        results = []
        for array, blocks in ((cache.array, table), (moved, renamed)):
            here = backend.put(array)
            options = {"block_table": blocks, "cache_seqlens": ints(*lengths)}
            results.append(backend.call("attention_with_kvcache", q, here[:, 0], here[:, 1], **options))
        for one, other in zip(*results, strict=True):
            assert one.tobytes() == other.tobytes()

    holds()


# ------------------------------------------------------------------------------------- does the check notice?


def test_the_bound_notices_a_wrong_rotation(rng):
    """A position off by one, the other style, rotated values, queries all at one position, no rotation."""
    q = normal(rng, (1, 3, 4, 64), "float16")
    k, v = normal(rng, (2, 1, 3, 2, 64), "float16")
    cache = dense(held(rng, "float16", [20]), 30)
    options = {"k": k, "v": v, "cache_seqlens": 20, "causal": True} | tables(rng, 30, 32, "float16")
    right = oracle.attention_with_kvcache(q, *cache.split(cache.array), **options)
    right.check(right.out.astype(np.float16), right.lse, "float16")
    shifted = {name: np.roll(options[name], 1, axis=0) for name in ("rotary_cos", "rotary_sin")}
    none = {"rotary_cos": None, "rotary_sin": None}
    for wrong in (shifted, {"rotary_interleaved": False}, {"causal": False, "window": (-1, -1)}, none):
        other = oracle.attention_with_kvcache(q, *cache.split(cache.array), **options | wrong)
        with pytest.raises(AssertionError, match="^out: "):
            right.check(other.out.astype(np.float16), None, "float16")
        with pytest.raises(AssertionError, match="^lse: "):
            right.check(right.out, other.lse, "float16")


@pytest.mark.parametrize("kv_dtype", FP8)
def test_the_check_notices_wrong_fp8(rng, kv_dtype):
    """A scale that is off, one head's for another's, the other format, a stored byte off by one."""
    q, k, v = normal(rng, (1, 1, 4, 64), "float16"), *normal(rng, (2, 1, 1, 2, 64), "float16")
    cache = dense(held(rng, "float16", [20], kv_dtype=kv_dtype), 30)
    options = {"kv_dtype": kv_dtype, "cache_seqlens": 20} | SCALES["heads"](2)
    right = oracle.attention_with_kvcache(q, *cache.split(cache.array), **options)
    off = {name: options[name] * np.float32(1.01) for name in ("k_scale", "v_scale")}
    swapped = {name: options[name][::-1] for name in ("k_scale", "v_scale")}
    for wrong in (off, swapped, {"kv_dtype": FP8[FP8[0] == kv_dtype]}):
        other = oracle.attention_with_kvcache(q, *cache.split(cache.array), **options | wrong)
        with pytest.raises(AssertionError, match="^out: "):
            right.check(other.out.astype(np.float16), None, "float16")
    low, high = oracle.append_range(*cache.split(cache.array), k, v, **options)
    stored = oracle.append_kv(*cache.split(cache.array), k, v, **options)
    oracle.check_caches(stored, low, high, kv_dtype)
    for at in ((0, 20, 1, 5), (0, 19, 0, 0), (0, 25, 0, 0)):
        stored[1][at] ^= 1
        with pytest.raises(AssertionError, match="^v_cache: 1 of"):
            oracle.check_caches(stored, low, high, kv_dtype)
        stored[1][at] ^= 1


@pytest.mark.parametrize("kv_dtype", FP8)
def test_the_oracle_rounds_to_fp8_as_ml_dtypes_does(rng, kv_dtype):
    numbers = np.concatenate([rng.standard_normal(5000) * 10.0 ** rng.integers(-9, 5, 5000), [0.0, -0.0]])
    held_numbers = np.arange(256, dtype=np.uint8).view(oracle.FP8[kv_dtype]).astype(np.float64)
    held_numbers = np.sort(held_numbers[np.isfinite(held_numbers)])
    numbers = np.concatenate([numbers, held_numbers, (held_numbers[1:] + held_numbers[:-1]) / 2])
    numbers = numbers[np.abs(numbers) <= held_numbers[-1]].astype(np.float32)
    wanted = numbers.astype(oracle.FP8[kv_dtype])
    assert oracle.to_fp8(numbers, kv_dtype).tobytes() == wanted.tobytes()
