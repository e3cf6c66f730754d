"""FlashInfer's cascade names against the float64 oracle: merges, levels, and prefixes that sequences share."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from compat.test_flashinfer_common import FLOAT32, LOG2E, Paged, over_libs, paged, slopes, starts
from oracle import UNIT_ROUNDOFF, normal

from cupyattn.compat import flashinfer

# ---------------------------------------------------------------------------------------------------------- merges


def draw_states(rng, states, dtype, rows=6, heads=4, head_dim=64):
    v, s = normal(rng, (rows, states, heads, head_dim), dtype), 10 * normal(rng, (rows, states, heads), "float32")
    s[1, 0], s[2] = -np.inf, -np.inf  # one state saw no key; none did
    v[2] = 0
    return v, s


def merged(v, s):
    """(v, s) over all states, in float64, with s to base 2."""
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.exp2(s.astype(np.float64))
        total = weight.sum(axis=1)
        mean = np.einsum("nsh,nshd->nhd", weight, v.astype(np.float64)) / total[..., None]
        return np.nan_to_num(mean), np.log2(total)


def check_merge(lib, got, v, s, dtype):
    out, lse = (lib.get(array).astype(np.float64) for array in got)
    exact, total = merged(v, s)
    size = np.abs(v.astype(np.float64)).max(axis=1)
    assert (np.abs(out - exact) <= UNIT_ROUNDOFF[dtype] * np.abs(exact) + 300 * FLOAT32 * size).all()
    with np.errstate(invalid="ignore"):
        near = np.abs(lse - total) <= 8 * FLOAT32 * (1 + np.abs(total))
    assert ((lse == total) | near).all()


@over_libs()
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge_state(rng, lib, dtype):
    v, s = draw_states(rng, 2, dtype)
    parts = [np.ascontiguousarray(x) for x in (v[:, 0], s[:, 0], v[:, 1], s[:, 1])]
    got = flashinfer.merge_state(*lib.put(parts))
    check_merge(lib, got, v, s, dtype)
    assert lib.get(got[0]).dtype == v.dtype and lib.get(got[1]).dtype == np.float32
    there, weights = lib.put(v), lib.put(s)
    views = flashinfer.merge_state(there[:, 0], weights[:, 0], lib.put(parts[2]), weights[:, 1])
    assert lib.get(views[0]).tobytes() == lib.get(got[0]).tobytes()
    assert lib.get(views[1]).tobytes() == lib.get(got[1]).tobytes()


@over_libs()
@pytest.mark.parametrize("states", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merge_states(rng, lib, states, dtype):
    v, s = draw_states(rng, states, dtype)
    check_merge(lib, flashinfer.merge_states(*lib.put((v, s))), v, s, dtype)


@over_libs()
@pytest.mark.parametrize("chosen", [None, [1, 0, 1, 1, 0, 1]])
def test_merge_state_in_place(rng, lib, chosen):
    v, s = draw_states(rng, 2, "float32")
    own, weights, other, others = lib.put([np.ascontiguousarray(x) for x in (v[:, 0], s[:, 0], v[:, 1], s[:, 1])])
    mask = None if chosen is None else lib.put(np.array(chosen, bool))
    assert flashinfer.merge_state_in_place(own, weights, other, others, mask) is None
    rows = np.ones(6, bool) if chosen is None else np.array(chosen, bool)
    check_merge(lib, (own[lib.put(rows)], weights[lib.put(rows)]), v[rows], s[rows], "float32")
    assert lib.get(own)[~rows].tobytes() == v[~rows, 0].tobytes()
    assert lib.get(weights)[~rows].tobytes() == s[~rows, 0].tobytes()
    assert lib.get(other).tobytes() == np.ascontiguousarray(v[:, 1]).tobytes()


@over_libs()
def test_merging_what_the_functions_return(rng, lib):
    """Attention over two halves of the keys, merged, is attention over all of them."""
    q, (k, v) = normal(rng, (5, 8, 64), "float32"), normal(rng, (2, 30, 2, 64), "float32")
    parts = [
        flashinfer.single_prefill_with_kv_cache(lib.put(q), *lib.put((k[own], v[own])), return_lse=True)
        for own in (slice(0, 11), slice(11, 30))
    ]
    out, lse = flashinfer.merge_state(*parts[0], *parts[1])
    expected = oracle.attention(q[None], k[None], v[None])
    assert np.allclose(lib.get(out), expected.out[0], rtol=0, atol=5e-6)
    assert np.allclose(lib.get(lse), expected.lse[0].T * LOG2E, rtol=0, atol=5e-6)


# --------------------------------------------------------------------------------------------------------- cascades


def levels(rng, queries, shared, own, page_size, dtype):
    """A pool with a prefix of `shared` tokens, or one for each of several groups, and what is each sequence's own."""
    return paged(rng, [*shared, *own], page_size, dtype=dtype)


def tables_of(p: Paged, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The page table of sequences first to first + count - 1 of the pool."""
    ends = p.indptr[first : first + count + 1]
    return ends - ends[0], p.indices[ends[0] : ends[-1]], p.last[first : first + count]


def rows_of(p: Paged, b: int) -> tuple[np.ndarray, np.ndarray]:
    at = np.arange(p.lengths[b])
    place = p.block_table[b, at // p.page_size], at % p.page_size
    return p.k[place], p.v[place]


def whole(p: Paged, q, queries, prefixes, first_own, causal, **options):
    """Each sequence over its prefix (which one by `prefixes`) and its own keys, out (rows, heads, head_dim)."""
    out, bound = [], []
    for b in range(len(queries)):
        k, v = (np.concatenate(x) for x in zip(rows_of(p, prefixes[b]), rows_of(p, first_own + b), strict=True))
        own = slice(starts(queries)[b], starts(queries)[b + 1])
        one = oracle.attention(q[None, own], k[None], v[None], causal=causal, **options)
        out.append(one.out[0])
        bound.append(one.bounds(q.dtype.name)[0][0])
    return np.concatenate(out), np.concatenate(bound)


@over_libs()
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("queries", [[1, 1, 1, 1], [3, 1, 4, 2]], ids=["decode", "append"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_levels(rng, lib, layout, page_size, queries, dtype):
    own = [7, 20, 4, 33]
    p = levels(rng, queries, [37], own, page_size, dtype)
    q = normal(rng, (sum(queries), 8, 64), dtype)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, lib.workspace(), layout)
    ends = [np.array([0, sum(queries)], np.int32), starts(queries)]
    tables = zip(tables_of(p, 0, 1), tables_of(p, 1, 4), strict=True)
    arrays = [lib.put(ends), *(lib.put(list(pair)) for pair in tables)]
    wrapper.plan(*arrays, 8, 2, 64, page_size, causal=True, q_data_type=dtype, logits_soft_cap=6.0)
    for form in ("pair", "one"):
        out = lib.get(wrapper.run(lib.put(q), p.cache(lib, layout, form)))
        exact, bound = whole(p, q, queries, [0] * 4, 1, True, softcap=6.0)
        size = 4 * UNIT_ROUNDOFF[dtype]  # parts are rounded before they are merged
        assert (np.abs(out.astype(np.float64) - exact) <= 2 * bound + size).all()


@over_libs()
def test_three_levels(rng, lib):
    """One prefix for all, one for each half, and what is each sequence's own. Later plans go on from there."""
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(3, lib.workspace())
    for own in ([7, 20, 4, 33], [8, 21, 5, 34]):
        p = paged(rng, [30, 12, 9, *own], 5)
        q = normal(rng, (4, 8, 64), "float32")
        ends = [np.array(x, np.int32) for x in ([0, 4], [0, 2, 4], [0, 1, 2, 3, 4])]
        tables = zip(tables_of(p, 0, 1), tables_of(p, 1, 2), tables_of(p, 3, 4), strict=True)
        wrapper.begin_forward(
            lib.put(ends), *(lib.put(list(level)) for level in tables), 8, 2, 64, 5, q_data_type="float32"
        )  # fmt: skip
        out = lib.get(wrapper.forward(lib.put(q), p.cache(lib)))
        wrapper.end_forward()
        for b in range(4):
            k, v = (
                np.concatenate(parts)
                for parts in zip(rows_of(p, 0), rows_of(p, 1 + b // 2), rows_of(p, 3 + b), strict=True)
            )
            one = oracle.attention(q[None, b : b + 1], k[None], v[None])
            assert np.allclose(out[b], one.out[0, 0], rtol=0, atol=1e-5)


@over_libs()
def test_alibi_in_levels(rng, lib):
    """As in FlashInfer, where every level's bias is slope * key, counted from the level's own first key."""
    p, q = paged(rng, [12, 9], 5), normal(rng, (1, 8, 64), "float32")
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, lib.workspace())
    ends = [np.array([0, 1], np.int32)] * 2
    tables = zip(tables_of(p, 0, 1), tables_of(p, 1, 1), strict=True)
    wrapper.plan(
        lib.put(ends), *(lib.put(list(x)) for x in tables), 8, 2, 64, 5, q_data_type="float32",
        pos_encoding_mode="ALIBI",
    )  # fmt: skip
    out = lib.get(wrapper.run(lib.put(q), p.cache(lib)))
    (k, v), (more_k, more_v) = rows_of(p, 0), rows_of(p, 1)
    keys, values = (np.repeat(np.concatenate(x), 4, axis=1).astype(float) for x in ((k, more_k), (v, more_v)))
    bias = slopes(8)[:, None] * np.concatenate([np.arange(12), np.arange(9)])
    weight = np.exp(np.einsum("hd,khd->hk", q[0], keys) / 8 + bias)
    exact = np.einsum("hk,khd->hd", weight / weight.sum(axis=1, keepdims=True), values)
    assert np.allclose(out[0], exact, rtol=0, atol=1e-5)


@over_libs()
def test_cascades_for_graphs(rng, lib):
    sizes = [(2, 2, 20, 1), (5, 5, 60, 4)]
    buffers = [[lib.put(np.zeros(level[i], np.int32)) for level in sizes] for i in range(4)]
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, lib.workspace(), "NHD", True, *buffers)
    assert wrapper.is_cuda_graph_enabled
    for prefix, own in ((60, [20, 20, 20, 20]), (33, [7, 20, 4, 33])):
        p, q = paged(rng, [prefix, *own], 5), normal(rng, (4, 8, 64), "float32")
        ends = [np.array([0, 4], np.int32), np.arange(5, dtype=np.int32)]
        tables = zip(tables_of(p, 0, 1), tables_of(p, 1, 4), strict=True)
        wrapper.plan(lib.put(ends), *(lib.put(list(pair)) for pair in tables), 8, 2, 64, 5, q_data_type="float32")
        exact, bound = whole(p, q, [1] * 4, [0] * 4, 1, False)
        assert (np.abs(lib.get(wrapper.run(lib.put(q), p.cache(lib))) - exact) <= 2 * bound + 1e-6).all()


@over_libs()
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_with_shared_prefix(rng, lib, layout, dtype):
    own = [7, 0, 4, 33]
    p, q = paged(rng, [37, *own], 5, dtype=dtype), normal(rng, (4, 8, 64), dtype)
    prefix = [np.ascontiguousarray(x.swapaxes(0, 1) if layout == "HND" else x) for x in rows_of(p, 0)]
    wrapper = flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(lib.workspace(), layout)
    wrapper.begin_forward(*lib.put(tables_of(p, 1, 4)), 8, 2, 64, 5, data_type=dtype)
    out = lib.get(wrapper.forward(lib.put(q), *lib.put(prefix), p.cache(lib, layout)))
    wrapper.end_forward()
    exact, bound = whole(p, q, [1] * 4, [0] * 4, 1, False)
    assert (np.abs(out.astype(np.float64) - exact) <= 2 * bound + 4 * UNIT_ROUNDOFF[dtype]).all()


@over_libs()
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_with_shared_prefix(rng, lib, layout, causal):
    queries, own = [3, 1, 4, 2], [7, 20, 4, 33]
    p, q = paged(rng, [37, *own], 5), normal(rng, (10, 8, 64), "float32")
    prefix = [np.ascontiguousarray(x.swapaxes(0, 1) if layout == "HND" else x) for x in rows_of(p, 0)]
    wrapper = flashinfer.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(lib.workspace(), layout)
    wrapper.begin_forward(lib.put(starts(queries)), *lib.put(tables_of(p, 1, 4)), 8, 2, 64, 5)
    for scale in (None, 0.3):
        here = lib.put(q), *lib.put(prefix), p.cache(lib, layout)
        out = lib.get(wrapper.forward(*here, causal=causal, sm_scale=scale))
        exact, bound = whole(p, q, queries, [0] * 4, 1, causal, softmax_scale=scale)
        assert (np.abs(out - exact) <= 2 * bound + 1e-6).all()
    wrapper.end_forward()
