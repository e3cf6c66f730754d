"""Appending to caches in place, alone and inside attention_with_kvcache, on both backends against the oracle.

Caches are NaN wherever no sequence's row lies, and are compared bit for bit as a whole: what must not change is
seen as well as what must. Appending has one kernel, so that `backend` runs over kernel="auto".
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import cumulative, normal, paged_cache

import cupyattn

DTYPES = ("float16", "bfloat16", "float32")

pytestmark = pytest.mark.backends("numpy", "cuda")


def held(rng, dtype, lengths, *, kv_heads=2, head_dim=64):
    """(keys, values) of each sequence that a cache holds already."""
    return [tuple(normal(rng, (2, length, kv_heads, head_dim), dtype)) for length in lengths]


def dense_caches(pairs, rows, entries=None):
    return tuple(oracle.dense_cache([pair[i] for pair in pairs], rows, entries) for i in range(2))


def append(backend, k_cache, v_cache, k, v, **options):
    """Append on the backend and in the oracle, and compare the whole caches' bytes.

    Caches are arrays, or pairs (base, view) for caches that are views. Returns nothing.
    """
    bases, views = [], []
    for given_cache in (k_cache, v_cache):
        base, view = given_cache if isinstance(given_cache, tuple) else (given_cache, lambda x: x)
        shared = next((i for i, other in enumerate(bases) if other[0] is base), None)
        bases.append(bases[shared] if shared is not None else (base, backend.put(base.copy())))
        views.append(view)
    expected = oracle.append_kv(*(view(base) for (base, _), view in zip(bases, views, strict=True)), k, v, **options)
    here = {name: backend.put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    caches = [view(moved) for (_, moved), view in zip(bases, views, strict=True)]
    assert cupyattn.append_kv(*caches, backend.put(k), backend.put(v), **here) is None
    wanted = [base.copy() for base, _ in bases]
    for i, view in enumerate(views):
        for j, (base, _) in enumerate(bases):
            if base is bases[i][0]:
                view(wanted[j])[...] = expected[i]
    for (_, moved), want in zip(bases, wanted, strict=True):
        assert backend.get(moved).tobytes() == want.tobytes()


# ------------------------------------------------------------------------------------------------- append_kv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entries", [None, [4, 0, 2]], ids=["in order", "cache_batch_idx"])
def test_dense(backend, rng, entries, dtype):
    lengths = [0, 7, 20]
    k_cache, v_cache = dense_caches(held(rng, dtype, lengths), 30, entries)
    k, v = normal(rng, (2, 3, 5, 2, 64), dtype)
    options = {} if entries is None else {"cache_batch_idx": np.array(entries, np.int32)}
    append(backend, k_cache, v_cache, k, v, cache_seqlens=np.array(lengths, np.int32), **options)


@pytest.mark.parametrize("head_dim", [1, 3, 7, 8, 12, 40, 64, 100, 255, 256])
def test_head_dims(backend, rng, head_dim):
    for dtype in ("float16", "float32"):
        k_cache, v_cache = dense_caches(held(rng, dtype, [3, 0], head_dim=head_dim, kv_heads=3), 9)
        k, v = normal(rng, (2, 2, 4, 3, head_dim), dtype)
        append(backend, k_cache, v_cache, k, v, cache_seqlens=np.array([3, 0], np.int32))


@pytest.mark.parametrize("length", [None, 0, 11])
def test_one_length_for_all_or_none(backend, rng, length):
    k_cache, v_cache = dense_caches(held(rng, "float16", [length or 0] * 2), 30)
    append(backend, k_cache, v_cache, *normal(rng, (2, 2, 5, 2, 64), "float16"), cache_seqlens=length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 17, 256])
def test_paged(backend, rng, block_size, layout, dtype):
    """Keys and values in one 5-D array; the new rows begin, cross and end in blocks everywhere."""
    lengths = [0, 15, 16, 70]
    cache, table = paged_cache(rng, held(rng, dtype, lengths), block_size, capacity=90)
    if layout == "HND":
        cache = np.ascontiguousarray(cache.swapaxes(2, 3))
    k, v = normal(rng, (2, 4, 20, 2, 64), dtype)
    pair = (cache, lambda c: c[:, 0]), (cache, lambda c: c[:, 1])
    options = {"block_table": table, "layout": layout, "cache_seqlens": np.array(lengths, np.int32)}
    append(backend, *pair, k, v, **options)


@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "paged"])
def test_packed_new_rows(backend, rng, is_paged):
    """Sequences that gain different numbers of rows, some of them none; rows behind the last one are left out."""
    lengths, new = [3, 0, 40, 8], [5, 0, 33, 1]
    pairs = held(rng, "float16", lengths)
    k, v = normal(rng, (2, sum(new) + 3, 2, 64), "float16")
    options = {"cu_seqlens_new": cumulative(new), "cache_seqlens": np.array(lengths, np.int32)}
    if is_paged:
        cache, options["block_table"] = paged_cache(rng, pairs, 16, capacity=80)
        append(backend, (cache, lambda c: c[:, 0]), (cache, lambda c: c[:, 1]), k, v, **options)
    else:
        append(backend, *dense_caches(pairs, 80), k, v, **options)


def test_packed_new_rows_into_empty_caches(backend, rng):
    k, v = normal(rng, (2, 12, 2, 64), "float16")
    k_cache, v_cache = np.full((2, 3, 9, 2, 64), np.nan, np.float16)
    append(backend, k_cache, v_cache, k, v, cu_seqlens_new=cumulative([5, 0, 7]))
    append(backend, k_cache, v_cache, k, v, cu_seqlens_new=cumulative([5, 0, 7]), cache_seqlens=2)


def test_up_to_the_last_row(backend, rng):
    k_cache, v_cache = dense_caches(held(rng, "float16", [3, 9]), 10)
    k, v = normal(rng, (2, 8, 2, 64), "float16")
    ends, lengths = cumulative([7, 1]), np.array([3, 9], np.int32)
    append(backend, k_cache, v_cache, k, v, cu_seqlens_new=ends, cache_seqlens=lengths)


@pytest.mark.parametrize(("batch", "seqlen_new"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_append(backend, rng, batch, seqlen_new):
    k_cache, v_cache = dense_caches(held(rng, "float16", [3, 9][:batch] or [3]), 10)
    k, v = normal(rng, (2, batch, seqlen_new, 2, 64), "float16")
    lengths = np.zeros(batch, np.int32)
    append(backend, k_cache[:batch], v_cache[:batch], k, v, cache_seqlens=lengths)


def test_strided_caches_and_rows(backend, rng):
    """Heads before rows in memory, gaps beside the rows, new rows cut from one projection."""
    pairs = held(rng, "float16", [5, 2])
    lengths = np.array([5, 2], np.int32)
    projection = normal(rng, (2, 4, 8, 64), "float16")
    k, v = projection[:, :, 4:6], projection[:, :, 6:8]
    k_cache, v_cache = dense_caches(pairs, 20)
    append(
        backend,
        (np.ascontiguousarray(k_cache.swapaxes(1, 2)), lambda x: x.swapaxes(1, 2)),
        (np.pad(v_cache, [(0, 0)] * 3 + [(3, 5)], constant_values=np.nan), lambda x: x[..., 3:67]),
        k,
        v,
        cache_seqlens=lengths,
    )


def test_appending_row_by_row_equals_appending_all(backend, rng):
    cache, table = paged_cache(rng, held(rng, "float16", [0, 0]), 3, capacity=20)
    k, v = normal(rng, (2, 2, 20, 2, 64), "float16")
    once, often = backend.put(cache.copy()), backend.put(cache.copy())
    blocks = backend.put(table)
    cupyattn.append_kv(once[:, 0], once[:, 1], backend.put(k), backend.put(v), block_table=blocks)
    for i in range(20):
        row = [backend.put(np.ascontiguousarray(x[:, i : i + 1])) for x in (k, v)]
        cupyattn.append_kv(often[:, 0], often[:, 1], *row, block_table=blocks, cache_seqlens=i)
    assert backend.get(once).tobytes() == backend.get(often).tobytes()


# ------------------------------------------------------------------------ append inside attention_with_kvcache


def attend(backend, q, k_cache, v_cache, *, k, v, **options):
    """attention_with_kvcache with an append: the result within bounds, and the caches bit for bit."""
    places = ("cache_seqlens", "cache_batch_idx", "block_table", "layout")
    wanted = oracle.append_kv(k_cache, v_cache, k, v, **{name: options[name] for name in places if name in options})
    expected = oracle.attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, **options)
    caches = [backend.put(cache.copy()) for cache in (k_cache, v_cache)]
    out, lse = backend.call("attention_with_kvcache", q, *caches, k=k, v=v, **options)
    expected.check(out, lse, q.dtype.name)
    for cache, want in zip(caches, wanted, strict=True):
        assert backend.get(cache).tobytes() == want.tobytes()


@pytest.mark.when(holds=lambda backend, dtype, **_: not backend.on_gpu or dtype != "bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_new"), [(1, 1), (5, 5), (2, 7), (7, 2), (3, 0)])
def test_attend_dense(backend, rng, seqlen_q, seqlen_new, dtype):
    lengths = [0, 17, 70]
    q = normal(rng, (3, seqlen_q, 4, 64), dtype)
    k, v = normal(rng, (2, 3, seqlen_new, 2, 64), dtype)
    caches = dense_caches(held(rng, dtype, lengths), 80)
    attend(backend, q, *caches, k=k, v=v, cache_seqlens=np.array(lengths, np.int32), causal=True)
    attend(backend, q, *dense_caches(held(rng, dtype, [9] * 3), 80), k=k, v=v, cache_seqlens=9)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("block_size", [3, 16])
def test_attend_paged(backend, rng, block_size, layout):
    lengths = [0, 16, 70]
    q = normal(rng, (3, 2, 4, 64), "float16")
    k, v = normal(rng, (2, 3, 2, 2, 64), "float16")
    cache, table = paged_cache(rng, held(rng, "float16", lengths), block_size, capacity=75)
    if layout == "HND":
        cache = cache.swapaxes(2, 3)
    k_cache, v_cache = np.ascontiguousarray(cache.swapaxes(0, 1))
    options = {"block_table": table, "layout": layout, "cache_seqlens": np.array(lengths, np.int32)}
    attend(backend, q, k_cache, v_cache, k=k, v=v, causal=True, **options)


def test_attend_with_entries_and_padding(backend, rng):
    lengths, entries, padding = [4, 17, 70], [3, 0, 2], [4, 5, 66]
    q = normal(rng, (3, 2, 4, 64), "float16")
    k, v = normal(rng, (2, 3, 2, 2, 64), "float16")
    options = {
        "cache_seqlens": np.array(lengths, np.int32),
        "cache_batch_idx": np.array(entries, np.int32),
        "cache_leftpad": np.array(padding, np.int32),
    }
    caches = dense_caches(held(rng, "float16", lengths), 80, entries)
    attend(backend, q, *caches, k=k, v=v, causal=True, **options)


def test_lengths_are_not_changed(backend, rng):
    """The caller advances cache_seqlens: other layers of a model need the old ones too."""
    q = normal(rng, (2, 1, 4, 64), "float16")
    k, v = (backend.put(x) for x in normal(rng, (2, 2, 1, 2, 64), "float16"))
    caches = [backend.put(x) for x in dense_caches(held(rng, "float16", [5, 9]), 20)]
    lengths = backend.put(np.array([5, 9], np.int32))
    cupyattn.attention_with_kvcache(backend.put(q), *caches, k=k, v=v, cache_seqlens=lengths)
    assert backend.get(lengths).tolist() == [5, 9]


def test_decoding_step_by_step_equals_one_causal_pass(backend, rng):
    """Twelve tokens, one by one through a paged cache, against attention over all of them at once."""
    q = normal(rng, (2, 12, 4, 64), "float16")
    k, v = normal(rng, (2, 2, 12, 2, 64), "float16")
    cache, table = paged_cache(rng, held(rng, "float16", [0, 0]), 5, capacity=12)
    cache, table = backend.put(cache), backend.put(table)
    expected = oracle.attention(q, k, v, causal=True)
    out, lse = np.empty_like(q), np.empty((2, 4, 12), np.float32)
    for i in range(12):
        new_q, new_k, new_v = (backend.put(np.ascontiguousarray(x[:, i : i + 1])) for x in (q, k, v))
        step, step_lse = cupyattn.attention_with_kvcache(
            new_q, cache[:, 0], cache[:, 1], k=new_k, v=new_v, cache_seqlens=i, block_table=table, return_lse=True
        )
        out[:, i : i + 1], lse[:, :, i : i + 1] = backend.get(step), backend.get(step_lse)
    expected.check(out, lse, "float16")


# ------------------------------------------------------------------------------------------------- refusals


REFUSED = {
    "too long": ({"cache_seqlens": [5, 19]}, "^cache_seqlens: got 19 tokens for sequence 1 plus 2 new"),
    "negative": ({"cache_seqlens": [5, -1]}, "^cache_seqlens: got -1 for sequence 1"),
    "entry out of range": ({"cache_batch_idx": [0, 2]}, "^cache_batch_idx: got 2 for sequence 1"),
    "negative entry": ({"cache_batch_idx": [0, -1]}, "^cache_batch_idx: got -1 for sequence 1"),
    "one entry twice": ({"cache_batch_idx": [1, 1]}, "^cache_batch_idx: got the same cache entry twice"),
}


@pytest.mark.parametrize("function", ["append_kv", "attention_with_kvcache"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_calls_leave_the_cache_alone(backend, rng, name, function):
    bad, message = REFUSED[name]
    options = {"cache_seqlens": np.array([5, 9], np.int32)}
    options |= {key: np.array(value, np.int32) for key, value in bad.items()}
    options = {key: backend.put(value) for key, value in options.items()}
    caches = dense_caches(held(rng, "float16", [5, 9]), 20)
    here = [backend.put(cache.copy()) for cache in caches]
    k, v = (backend.put(x) for x in normal(rng, (2, 2, 2, 2, 64), "float16"))
    q = backend.put(normal(rng, (2, 2, 4, 64), "float16"))
    with pytest.raises(ValueError, match=message):
        if function == "append_kv":
            cupyattn.append_kv(*here, k, v, **options, check=True)
        else:
            cupyattn.attention_with_kvcache(q, *here, k=k, v=v, **options, check=True)
    for cache, original in zip(here, caches, strict=True):
        assert backend.get(cache).tobytes() == original.tobytes()


def test_refused_masks_leave_the_cache_alone(backend, rng):
    caches = dense_caches(held(rng, "float16", [5, 9]), 20)
    here = [backend.put(cache.copy()) for cache in caches]
    k, v = (backend.put(x) for x in normal(rng, (2, 2, 2, 2, 64), "float16"))
    q = backend.put(normal(rng, (2, 2, 4, 64), "float16"))
    for bad in ({"window": (-2, 0)}, {"softmax_scale": float("nan")}, {"kernel": "fast"}, {"softcap": -1.0}):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(bad))}: got "):
            cupyattn.attention_with_kvcache(q, *here, k=k, v=v, cache_seqlens=5, **bad)
    for cache, original in zip(here, caches, strict=True):
        assert backend.get(cache).tobytes() == original.tobytes()


@pytest.mark.parametrize("block", [-1, "behind", 2**31 - 1])
def test_bad_block(backend, rng, block):
    """Refused when checked; unchecked on CUDA, its rows are written nowhere and all others are."""
    pairs = held(rng, "float16", [10, 30])
    cache, table = paged_cache(rng, pairs, 16, capacity=60)
    bad = table.copy()
    bad[1, 2] = len(cache) if block == "behind" else block
    k, v = normal(rng, (2, 2, 20, 2, 64), "float16")
    here = backend.put(cache.copy())
    moved = [here[:, 0], here[:, 1], backend.put(k), backend.put(v)]
    options = {"block_table": backend.put(bad), "cache_seqlens": backend.put(np.array([10, 30], np.int32))}
    with pytest.raises(ValueError, match=r"^block_table: got block .* at \[1, 2\]"):
        cupyattn.append_kv(*moved, **options, check=True)
    assert backend.get(here).tobytes() == cache.tobytes()
    if backend.on_gpu:
        cupyattn.append_kv(*moved, **options)
        wanted = cache.copy()
        lengths = np.array([10, 30], np.int32)
        parts = oracle.append_kv(wanted[:, 0], wanted[:, 1], k, v, block_table=table, cache_seqlens=lengths)
        wanted[:, 0], wanted[:, 1] = parts
        wanted[table[1, 2]] = cache[table[1, 2]]
        assert backend.get(here).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("length", [-1, -3, -(2**31)])
def test_negative_lengths_of_an_append_that_is_attended_to(backend, rng, length):
    """The new rows do not make up for a negative length: refused, or on CUDA unchecked NaN in the sequence's rows."""
    q = normal(rng, (3, 2, 4, 64), "float16")
    k, v = normal(rng, (2, 3, 2, 2, 64), "float16")
    caches = dense_caches(held(rng, "float16", [5, 9, 7]), 20)
    good, bad = np.array([5, 9, 7], np.int32), np.array([5, length, 7], np.int32)
    here = [backend.put(cache.copy()) for cache in caches]
    with pytest.raises(ValueError, match=f"^cache_seqlens: got {length} for sequence 1, expected a length"):
        backend.call("attention_with_kvcache", q, *here, k=k, v=v, cache_seqlens=bad, check=True)
    for cache, original in zip(here, caches, strict=True):
        assert backend.get(cache).tobytes() == original.tobytes()
    if not backend.on_gpu:
        return
    expected = oracle.attention_with_kvcache(q, *caches, k=k, v=v, cache_seqlens=good)
    expected.out[1] = expected.lse[1] = np.nan
    expected.check(*backend.call("attention_with_kvcache", q, *here, k=k, v=v, cache_seqlens=bad), "float16")
    written = oracle.append_kv(*caches, k, v, cache_seqlens=good)
    for cache, want in zip(here, written, strict=True):
        assert backend.get(cache)[[0, 2]].tobytes() == want[[0, 2]].tobytes()


# --------------------------------------------------------------------------------------------- random appends


def test_random_appends(backend):
    @settings(max_examples=15 if backend.on_gpu else 150)
    @given(st.data())
    def holds(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        dtype = data.draw(st.sampled_from(["float16"] if backend.on_gpu else DTYPES))
        head_dim = 64 if backend.on_gpu else data.draw(st.integers(1, 40))
        kv_heads = data.draw(st.integers(1, 3))
        lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
        batch = len(lengths)
        pairs = held(rng, dtype, lengths, kv_heads=kv_heads, head_dim=head_dim)
        options = {"cache_seqlens": np.array(lengths, np.int32)}
        if data.draw(st.booleans()):
            new = [data.draw(st.integers(0, 20)) for _ in lengths]
            k, v = normal(rng, (2, sum(new), kv_heads, head_dim), dtype)
            options["cu_seqlens_new"] = cumulative(new)
        else:
            k, v = normal(rng, (2, batch, data.draw(st.integers(0, 20)), kv_heads, head_dim), dtype)
        if data.draw(st.booleans()):
            layout = data.draw(st.sampled_from(["NHD", "HND"]))
            block_size = 16 if backend.on_gpu else data.draw(st.integers(1, 20))
            cache, table = paged_cache(rng, pairs, block_size, capacity=60)
            cache = np.ascontiguousarray(cache.swapaxes(2, 3)) if layout == "HND" else cache
            caches = (cache, lambda c: c[:, 0]), (cache, lambda c: c[:, 1])
            append(backend, *caches, k, v, block_table=table, layout=layout, **options)
        else:
            entries = data.draw(st.permutations(range(batch + 1)))[:batch]
            caches = dense_caches(pairs, 60, entries)
            append(backend, *caches, k, v, cache_batch_idx=np.array(entries, np.int32), **options)

    holds()
