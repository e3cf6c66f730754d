"""FlashInfer's prefill names against the float64 oracle: paged and ragged keys, custom masks, encodings, scales."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from compat.test_flashinfer_common import (
    LOG2E,
    check_base2,
    frequencies,
    masked,
    oracle_dtype,
    over_libs,
    paged,
    slopes,
    starts,
    turned,
)
from oracle import normal

from cupyattn.compat import flashinfer

QUERIES, LENGTHS = [3, 0, 7, 1], [10, 4, 33, 17]
EVEN = [2, 2, 2, 2]


def expect(p, q, queries, **options) -> oracle.Expected:
    table = {"block_table": p.block_table, "seqused_k": p.lengths}
    return oracle.attention_varlen(q, p.k, p.v, starts(queries), **table, **options)


def planned(lib, p, q, queries, layout="NHD", kv_heads=2, **options):
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(), layout)
    options = {"q_data_type": q.dtype.name} | options
    sizes = q.shape[1], kv_heads, q.shape[2], p.page_size
    wrapper.plan(lib.put(starts(queries)), *lib.put(p.table), *sizes, **options)
    return wrapper


def ragged(lib, q, queries, lengths, kv_heads=2, **options):
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(lib.workspace())
    options = {"q_data_type": q.dtype.name} | options
    ends = lib.put(starts(queries)), lib.put(starts(lengths))
    wrapper.plan(*ends, q.shape[1], kv_heads, q.shape[2], **options)
    return wrapper


# ----------------------------------------------------------------------------------------------------------- paged


@over_libs()
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["pair", "one"])
@pytest.mark.parametrize("queries", [QUERIES, EVEN, [1, 1, 1, 1]], ids=["uneven", "even", "single"])
def test_layouts_and_page_sizes(rng, lib, page_size, layout, form, queries):
    p = paged(rng, LENGTHS, page_size, dtype="float16")
    q = normal(rng, (sum(queries), 8, 64), "float16")
    wrapper = planned(lib, p, q, queries, layout, causal=True)
    out, lse = wrapper.run(lib.put(q), p.cache(lib, layout, form), return_lse=True)
    check_base2(expect(p, q, queries, causal=True), lib.get(out), lib.get(lse), "float16")


@over_libs()
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"causal": True, "window_left": 0}, {"causal": True, "window": (0, -1)}),
        ({"window_left": 9}, {"window": (9, -1)}),
        ({"causal": True, "logits_soft_cap": 3.0, "sm_scale": 0.3}, None),
        ({"causal": True, "disable_split_kv": True, "use_fp16_qk_reduction": True}, {"causal": True}),
    ],
)
def test_masks(rng, lib, queries, theirs, ours):
    ours = {"causal": True, "softcap": 3.0, "softmax_scale": 0.3} if ours is None else ours
    p, q = paged(rng, LENGTHS, 5), normal(rng, (sum(queries), 8, 64), "float32")
    out, lse = planned(lib, p, q, queries, **theirs).run(lib.put(q), p.cache(lib), return_lse=True)
    check_base2(expect(p, q, queries, **ours), lib.get(out), lib.get(lse), "float32")


@over_libs()
def test_more_queries_than_keys(rng, lib):
    """Those before the first key see nothing."""
    p, q = paged(rng, [4, 9], 5), normal(rng, (13, 8, 64), "float32")
    out, lse = planned(lib, p, q, [9, 4], causal=True).run(lib.put(q), p.cache(lib), return_lse=True)
    check_base2(expect(p, q, [9, 4], causal=True), lib.get(out), lib.get(lse), "float32")
    assert (lib.get(lse)[:5] == -np.inf).all() and not lib.get(out)[:5].any()


@over_libs()
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
def test_values_of_another_head_dim(rng, lib, queries):
    p, q = paged(rng, LENGTHS, 5, head_dim_v=40), normal(rng, (sum(queries), 8, 64), "float32")
    wrapper = planned(lib, p, q, queries, causal=True, head_dim_vo=40)
    out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
    check_base2(expect(p, q, queries, causal=True), lib.get(out), lib.get(lse), "float32")


@over_libs()
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lse_bases_and_layouts(rng, lib, queries, dtype):
    p, q = paged(rng, LENGTHS, 5, dtype=dtype), normal(rng, (sum(queries), 8, 64), dtype)
    wrapper = planned(lib, p, q, queries, causal=True)
    expected = expect(p, q, queries, causal=True)
    for base, layout in (("ln", "NH"), ("log2", "HN"), ("ln", "HN"), ("log2", "NH")):
        shape = (8, len(q)) if layout == "HN" else (len(q), 8)
        target = lib.put(np.full(shape, np.nan, np.float32))
        options = {"lse_base": base, "lse_layout": layout, "return_lse": True}
        out, lse = wrapper.run(lib.put(q), p.cache(lib), **options, lse=target)
        assert lse is target
        assert lib.get(wrapper.run(lib.put(q), p.cache(lib), **options)[1]).tobytes() == lib.get(lse).tobytes()
        rows = lib.get(lse) if layout == "NH" else lib.get(lse).T
        in_base2 = rows if base == "log2" else (rows.astype(np.float64) * LOG2E).astype(np.float32)
        check_base2(expected, lib.get(out), in_base2, dtype)


@over_libs()
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
def test_out_sinks_and_scales(rng, lib, queries):
    p, q, sinks = paged(rng, LENGTHS, 5), normal(rng, (sum(queries), 8, 64), "float32"), normal(rng, (8,), "float32")
    wrapper = planned(lib, p, q, queries, causal=True)
    out = lib.put(np.full(q.shape, np.nan, np.float32))
    assert wrapper.run(lib.put(q), p.cache(lib), out=out, sinks=lib.put(sinks), k_scale=0.5, q_scale=3.0) is out
    expected = expect(p, q, queries, causal=True, sinks=sinks, softmax_scale=1.5 / 8)
    check_base2(expected, lib.get(out), None, "float32")
    wide = lib.put(np.full((len(q), 8, 90), np.nan, np.float32))
    assert wrapper.run(lib.put(q), p.cache(lib), out=wide[..., 3:67]).shape == q.shape
    check_base2(expect(p, q, queries, causal=True), lib.get(wide)[..., 3:67], None, "float32")


@over_libs()
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
def test_alibi(rng, lib, queries):
    """FlashInfer's bias counts from the first query, so that its lse is larger by slope * (keys - queries)."""
    p, q = paged(rng, LENGTHS, 5), normal(rng, (sum(queries), 8, 64), "float32")
    wrapper = planned(lib, p, q, queries, causal=True, pos_encoding_mode="ALIBI")
    out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
    more = np.repeat(p.lengths - queries, queries)[:, None] * slopes(8)
    expected = expect(p, q, queries, causal=True, alibi_slopes=slopes(8))
    check_base2(expected, lib.get(out), lib.get(lse), "float32", more)
    biased = by_definition(p, q, queries)
    assert np.allclose(lib.get(lse), biased * LOG2E, rtol=0, atol=1e-4)
    for layout in ("NH", "HN"):
        _, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True, lse_base="ln", lse_layout=layout)
        assert np.allclose(lib.get(lse), biased if layout == "NH" else biased.T, rtol=0, atol=1e-4)


def by_definition(p, q, queries):
    """The natural lse with a bias of slope * (key - query), query counted from its sequence's first: (rows, heads)."""
    rows = []
    for b, count in enumerate(queries):
        at = np.arange(p.lengths[b])
        k = p.k[p.block_table[b, at // p.page_size], at % p.page_size].astype(np.float64)
        for i in range(count):
            row = q[starts(queries)[b] + i].astype(np.float64)
            seen = at <= i + p.lengths[b] - count
            bias = slopes(8)[:, None] * (at - i)
            scores = np.einsum("hd,khd->hk", row, np.repeat(k, 4, axis=1)) / 8 + bias
            rows.append(np.log(np.exp(scores[:, seen]).sum(axis=1)))
    return np.array(rows)


@over_libs()
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
def test_rope(rng, lib, layout, causal, queries):
    p, q = paged(rng, LENGTHS, 5), normal(rng, (sum(queries), 8, 64), "float32")
    options = {"causal": causal, "pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 5e3, "rope_scale": 2.0}
    wrapper = planned(lib, p, q, queries, layout, **options)
    cache = p.cache(lib, layout)
    before = [lib.get(x).copy() for x in cache]
    out, lse = wrapper.run(lib.put(q), cache, return_lse=True)
    query, keys = rotated(p, q, queries, frequencies(64, 2.0, 5e3))
    p.k = keys
    expected = expect(p, query, queries, causal=causal)
    assert np.allclose(lib.get(out), expected.out, rtol=0, atol=2e-5)
    assert np.allclose(lib.get(lse), expected.lse.T * LOG2E, rtol=0, atol=2e-5)
    for array, old in zip(cache, before, strict=True):
        assert lib.get(array).tobytes() == old.tobytes(), "the cache is not to be changed"


def rotated(p, q, queries, freq):
    """(queries, cache) turned by their positions; the last query is where the last key is."""
    positions = np.concatenate([p.lengths[b] - n + np.arange(n) for b, n in enumerate(queries)])
    k = np.zeros_like(p.k)
    for b, length in enumerate(p.lengths):
        at = np.arange(length)
        place = p.block_table[b, at // p.page_size], at % p.page_size
        k[place] = turned(p.k[place], at, freq).astype(p.k.dtype)
    return turned(q, positions, freq).astype(q.dtype), k


@over_libs()
def test_rope_in_half_precision(rng, lib):
    p, q = paged(rng, LENGTHS, 16, dtype="float16"), normal(rng, (sum(QUERIES), 8, 64), "float16")
    wrapper = planned(lib, p, q, QUERIES, causal=True, pos_encoding_mode="ROPE_LLAMA")
    out = lib.get(wrapper.run(lib.put(q), p.cache(lib)))
    query, keys = rotated(p, q, QUERIES, frequencies(64))
    p.k = keys
    assert np.allclose(out.astype(np.float64), expect(p, query, QUERIES, causal=True).out, rtol=0, atol=6e-3)


@over_libs()
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("causal", [True, False])
def test_fp8(rng, lib, queries, causal):
    p, q = paged(rng, LENGTHS, 16, dtype="bfloat16"), normal(rng, (sum(queries), 8, 64), "bfloat16")
    stored = [oracle.to_fp8(np.nan_to_num(x.astype(np.float64)), "float8_e4m3fn") for x in (p.k, p.v)]
    fp8 = oracle_dtype("float8_e4m3fn")
    cache = lib.put(tuple(bits if lib.name == "cupy" else bits.view(fp8) for bits in stored))
    wrapper = planned(lib, p, q, queries, kv_data_type="float8_e4m3fn", causal=causal)
    scales = {"k_scale": 0.5, "v_scale": 2.0}
    target = lib.put(np.full(q.shape, np.nan, np.float32).astype(q.dtype))
    out, lse = wrapper.run(lib.put(q), cache, out=target, return_lse=True, **scales)
    assert out is target
    for b, count in enumerate(queries):
        own = slice(starts(queries)[b], starts(queries)[b + 1])
        where = {"cache_seqlens": p.lengths[b : b + 1], "block_table": p.block_table[b : b + 1]}
        expected = oracle.attention_with_kvcache(
            q[None, own], *stored, kv_dtype="float8_e4m3fn", causal=causal, **where, **scales
        )
        if count:
            check_base2(expected, lib.get(out)[own], lib.get(lse)[own], "bfloat16")


# ---------------------------------------------------------------------------------------------------- custom masks


def draw_masks(rng, queries, lengths):
    """Any masks; some rows see nothing."""
    masks = [rng.random((n, m)) < 0.4 for n, m in zip(queries, lengths, strict=True)]
    masks[0][0] = False
    return masks


def causal_masks(queries, lengths):
    return [
        np.arange(m) <= np.arange(n)[:, None] + m - n for n, m in zip(queries, lengths, strict=True)
    ]  # fmt: skip


def flat(masks):
    return np.concatenate([mask.ravel() for mask in masks])


def packed(masks):
    return np.concatenate([np.packbits(mask.ravel(), bitorder="little") for mask in masks])


def check_masked(lib, out, lse, q, keys_of, masks, dtype, **options):
    """Rows of each sequence against the oracle, key by key."""
    at = 0
    for b, mask in enumerate(masks):
        k, v = keys_of(b)
        own = slice(at, at + len(mask))
        at += len(mask)
        if not len(mask):
            continue
        exact, bound, natural, lse_bound = masked(q[own], k, v, mask, **options)
        assert (np.abs(lib.get(out)[own].astype(np.float64) - exact) <= bound).all()
        got, wanted = lib.get(lse)[own], natural * LOG2E
        with np.errstate(invalid="ignore"):
            near = np.abs(got - wanted) <= 4 * lse_bound + 1e-6 * np.abs(wanted)
        assert ((got == wanted) | near).all()


def keys_in_pages(p):
    def keys(b):
        at = np.arange(p.lengths[b])
        place = p.block_table[b, at // p.page_size], at % p.page_size
        return p.k[place], p.v[place]

    return keys


@over_libs()
@pytest.mark.parametrize("page_size", [1, 5])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["pair", "one"])
@pytest.mark.parametrize("given", ["custom_mask", "packed_custom_mask"])
def test_custom_masks(rng, lib, page_size, layout, form, given):
    p, q = paged(rng, LENGTHS, page_size), normal(rng, (sum(QUERIES), 8, 64), "float32")
    masks = draw_masks(rng, QUERIES, LENGTHS)
    mask = flat(masks) if given == "custom_mask" else packed(masks)
    wrapper = planned(lib, p, q, QUERIES, layout, causal=True, logits_soft_cap=4.0, **{given: lib.put(mask)})
    for _ in range(2):
        out, lse = wrapper.run(lib.put(q), p.cache(lib, layout, form), return_lse=True)
        check_masked(lib, out, lse, q, keys_in_pages(p), masks, "float32", softcap=4.0)


@over_libs()
@pytest.mark.parametrize("uneven", ["pages", "pair"])
def test_custom_masks_where_rows_are_unevenly_spaced(rng, lib, uneven):
    """Rows from one page to the next that are no whole number, or not the same for keys as for values."""
    p, q = paged(rng, LENGTHS, 5), normal(rng, (sum(QUERIES), 8, 64), "float32")
    masks = draw_masks(rng, QUERIES, LENGTHS)
    wrapper = planned(lib, p, q, QUERIES, custom_mask=lib.put(flat(masks)))

    def apart(cache, between):
        pages, size = len(cache), cache[0].size
        base = lib.put(np.full((pages, size + between), np.nan, np.float32))
        base[:, :size] = lib.put(cache.reshape(pages, size))
        return base[:, :size].reshape(cache.shape)  # a view: the axis that is split is contiguous

    spaces = (7, 7) if uneven == "pages" else (0, 2 * 64)
    cache = tuple(apart(x, space) for x, space in zip((p.k, p.v), spaces, strict=True))
    out, lse = wrapper.run(lib.put(q), cache, return_lse=True)
    check_masked(lib, out, lse, q, keys_in_pages(p), masks, "float32")


@over_libs()
def test_custom_mask_and_window(rng, lib):
    """Both hold."""
    p, q = paged(rng, LENGTHS, 5), normal(rng, (sum(QUERIES), 8, 64), "float32")
    masks = draw_masks(rng, QUERIES, LENGTHS)
    wrapper = planned(lib, p, q, QUERIES, window_left=6, custom_mask=lib.put(flat(masks)))
    out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
    diagonals = [np.arange(n)[:, None] + m - n - np.arange(m) for n, m in zip(QUERIES, LENGTHS, strict=True)]
    both = [mask & (distance <= 6) for mask, distance in zip(masks, diagonals, strict=True)]
    check_masked(lib, out, lse, q, keys_in_pages(p), both, "float32")


@over_libs()
@pytest.mark.parametrize("kind", ["causal", "full"])
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
def test_custom_masks_that_the_kernels_have(rng, lib, kind, queries):
    """They go before causal, whatever that says, and take the kernels' own way."""
    p, q = paged(rng, LENGTHS, 5), normal(rng, (sum(queries), 8, 64), "float32")
    masks = causal_masks(queries, LENGTHS)
    masks = masks if kind == "causal" else [np.ones_like(mask) for mask in masks]
    wrapper = planned(lib, p, q, queries, causal=kind == "full", custom_mask=lib.put(flat(masks)))
    out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
    check_base2(expect(p, q, queries, causal=kind == "causal"), lib.get(out), lib.get(lse), "float32")
    assert type(wrapper._step).__name__ in ("DenseStep", "PackedStep")


@over_libs()
def test_custom_mask_and_rope(rng, lib):
    p, q = paged(rng, LENGTHS, 5), normal(rng, (sum(QUERIES), 8, 64), "float32")
    masks = draw_masks(rng, QUERIES, LENGTHS)
    wrapper = planned(lib, p, q, QUERIES, custom_mask=lib.put(flat(masks)), pos_encoding_mode="ROPE_LLAMA")
    out = lib.get(wrapper.run(lib.put(q), p.cache(lib)))
    query, p.k = rotated(p, q, QUERIES, frequencies(64))
    keys = keys_in_pages(p)
    for b, mask in enumerate(masks):
        own = slice(starts(QUERIES)[b], starts(QUERIES)[b + 1])
        if len(mask):
            assert np.allclose(out[own], masked(query[own], *keys(b), mask)[0], rtol=0, atol=2e-5)


@over_libs()
@pytest.mark.parametrize("given", ["custom_mask", "packed_custom_mask", "causal_mask"])
def test_ragged_custom_masks(rng, lib, given):
    q = normal(rng, (sum(QUERIES), 8, 64), "float32")
    k, v = normal(rng, (2, sum(LENGTHS), 2, 64), "float32")
    masks = causal_masks(QUERIES, LENGTHS) if given == "causal_mask" else draw_masks(rng, QUERIES, LENGTHS)
    mask = {"packed_custom_mask": packed(masks)} if given == "packed_custom_mask" else {"custom_mask": flat(masks)}
    wrapper = ragged(lib, q, QUERIES, LENGTHS, **{name: lib.put(array) for name, array in mask.items()})
    out, lse = wrapper.run(*lib.put((q, k, v)), return_lse=True)

    def keys(b):
        own = slice(starts(LENGTHS)[b], starts(LENGTHS)[b + 1])
        return k[own], v[own]

    check_masked(lib, out, lse, q, keys, masks, "float32")


# ---------------------------------------------------------------------------------------------------------- ragged


@over_libs()
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("lengths", [LENGTHS, [5, 0, 2, 9]])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"causal": True}, {"causal": True}),
        ({"window_left": 4, "logits_soft_cap": 2.0}, {"window": (4, -1), "softcap": 2.0}),
        ({"causal": True, "sm_scale": 0.4}, {"causal": True, "softmax_scale": 0.4}),
    ],
)
def test_ragged(rng, lib, dtype, lengths, theirs, ours):
    q, (k, v) = normal(rng, (sum(QUERIES), 8, 64), dtype), normal(rng, (2, sum(lengths), 2, 64), dtype)
    wrapper = ragged(lib, q, QUERIES, lengths, **theirs)
    out, lse = wrapper.run(*lib.put((q, k, v)), return_lse=True)
    expected = oracle.attention_varlen(q, k, v, starts(QUERIES), starts(lengths), **ours)
    check_base2(expected, lib.get(out), lib.get(lse), dtype)
    target = lib.put(np.zeros(q.shape).astype(q.dtype))
    assert wrapper.run(*lib.put((q, k, v)), out=target) is target
    assert lib.get(target).tobytes() == lib.get(out).tobytes()


@over_libs()
def test_ragged_alibi_and_other_head_dim(rng, lib):
    q, k = normal(rng, (sum(QUERIES), 8, 64), "float32"), normal(rng, (sum(LENGTHS), 2, 64), "float32")
    v = normal(rng, (sum(LENGTHS), 2, 48), "float32")
    wrapper = ragged(lib, q, QUERIES, LENGTHS, causal=True, pos_encoding_mode="ALIBI", head_dim_vo=48)
    out, lse = wrapper.run(*lib.put((q, k, v)), return_lse=True)
    expected = oracle.attention_varlen(
        q, k, v, starts(QUERIES), starts(LENGTHS), causal=True, alibi_slopes=slopes(8)
    )  # fmt: skip
    more = np.repeat(np.subtract(LENGTHS, QUERIES), QUERIES)[:, None] * slopes(8)
    check_base2(expected, lib.get(out), lib.get(lse), "float32", more)


@over_libs()
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_rope(rng, lib, causal):
    q, (k, v) = normal(rng, (sum(QUERIES), 8, 64), "float32"), normal(rng, (2, sum(LENGTHS), 2, 64), "float32")
    there = lib.put((q, k, v))
    wrapper = ragged(lib, q, QUERIES, LENGTHS, causal=causal, pos_encoding_mode="ROPE_LLAMA")
    out, lse = wrapper.run(*there, return_lse=True)
    at = np.concatenate([np.arange(m) for m in LENGTHS])
    ahead = np.concatenate([np.arange(n) + m - n for n, m in zip(QUERIES, LENGTHS, strict=True)])
    query, keys = (turned(x, where, frequencies(64)).astype(np.float32) for x, where in ((q, ahead), (k, at)))
    expected = oracle.attention_varlen(query, keys, v, starts(QUERIES), starts(LENGTHS), causal=causal)
    assert np.allclose(lib.get(out), expected.out, rtol=0, atol=2e-5)
    assert np.allclose(lib.get(lse), expected.lse.T * LOG2E, rtol=0, atol=2e-5)
    for array, old in zip(there, (q, k, v), strict=True):
        assert lib.get(array).tobytes() == old.tobytes()


@over_libs()
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
def test_ragged_fp8(rng, lib, queries):
    q = normal(rng, (sum(queries), 8, 64), "float16")
    stored = [oracle.to_fp8(x, "float8_e5m2") for x in normal(rng, (2, sum(LENGTHS), 2, 64), "float16")]
    fp8 = oracle_dtype("float8_e5m2")
    there = lib.put(tuple(bits if lib.name == "cupy" else bits.view(fp8) for bits in stored))
    wrapper = ragged(lib, q, queries, LENGTHS, causal=True, kv_data_type="float8_e5m2")
    out, lse = wrapper.run(lib.put(q), *there, return_lse=True, k_scale=0.5)
    for b, count in enumerate(queries):
        own, keys = (slice(starts(n)[b], starts(n)[b + 1]) for n in (queries, LENGTHS))
        k, v = (bits[None, keys] for bits in stored)
        expected = oracle.attention_with_kvcache(q[None, own], k, v, kv_dtype="float8_e5m2", causal=True, k_scale=0.5)
        if count:
            check_base2(expected, lib.get(out)[own], lib.get(lse)[own], "float16")


@over_libs()
def test_ragged_plans_one_after_another(rng, lib):
    """Other splits of as many rows, other rows, and options of the older forward."""
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(lib.workspace())
    for queries, lengths in (([3, 5], [9, 8]), ([6, 2], [10, 7]), ([1, 1, 4], [3, 2, 8])):
        q = normal(rng, (sum(queries), 8, 64), "float32")
        k, v = normal(rng, (2, sum(lengths), 2, 64), "float32")
        ends = lib.put(starts(queries)), lib.put(starts(lengths))
        wrapper.begin_forward(*ends, 8, 2, 64, q_data_type="float32")
        for causal, window in ((True, -1), (False, 3), (True, -1)):
            options = {"causal": causal, "window_left": window}
            out, lse = wrapper.forward_return_lse(*lib.put((q, k, v)), **options)
            expected = oracle.attention_varlen(
                q, k, v, starts(queries), starts(lengths), causal=causal, window=(window, -1)
            )  # fmt: skip
            check_base2(expected, lib.get(out), lib.get(lse), "float32")
            assert lib.get(wrapper.forward(*lib.put((q, k, v)), **options)).tobytes() == lib.get(out).tobytes()
        wrapper.end_forward()


# --------------------------------------------------------------------------------------------------- plans and graphs


PLANS = [  # queries and keys of one plan after another; what they share with those before, they go on with
    ([3, 0, 7, 1], [10, 4, 33, 17]),
    ([1, 2, 5, 3], [12, 3, 50, 9]),  # as many rows in another split, over other pages
    ([1, 2, 8, 3], [12, 3, 50, 9]),  # more rows
    ([2, 2, 2, 2], [40, 5, 6, 7]),  # as many queries of each
    ([1, 1, 1, 1], [41, 6, 7, 8]),
    ([4, 7], [100, 20]),  # another batch, and a wider table
    ([3, 0, 7, 1], [10, 4, 33, 17]),
]


@over_libs()
@pytest.mark.parametrize("here", ["none", "all", "every other time", "qo_indptr", "all but qo_indptr", "page ids"])
def test_plans_one_after_another(rng, lib, here):
    """Each run is of the last plan, wherever its index arrays lie: beside the workspace, or those named on the host."""
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace())
    on_host = {"none": (), "qo_indptr": (0,), "all but qo_indptr": (1, 2, 3), "page ids": (2,)}.get(here, (0, 1, 2, 3))
    for i, (queries, lengths) in enumerate(PLANS):
        p, q = paged(rng, lengths, 16), normal(rng, (sum(queries), 8, 64), "float32")
        stay = () if here == "every other time" and i % 2 else on_host
        table = [x if j in stay else lib.put(x) for j, x in enumerate((starts(queries), *p.table))]
        wrapper.plan(*table, 8, 2, 64, 16, causal=True, q_data_type="float32")
        for _ in range(2):
            out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
            check_base2(expect(p, q, queries, causal=True), lib.get(out), lib.get(lse), "float32")


@over_libs()
@pytest.mark.parametrize("queries", [QUERIES, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("host", [True, False], ids=["on the host", "beside the workspace"])
def test_a_refused_plan_leaves_the_one_before_in_force(rng, lib, queries, host):
    """Whatever is wrong: with the queries, with the pages, or between the two; early or late."""
    p, q = paged(rng, LENGTHS, 16), normal(rng, (sum(queries), 8, 64), "float32")
    put = (lambda x: x) if host else lib.put
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace())
    options = {"causal": True, "q_data_type": "float32"}
    wrapper.plan(put(starts(queries)), *put(p.table), 8, 2, 64, 16, **options)
    other, broken = paged(rng, [9, 8, 7, 20], 16), np.array([1, 17, 2, 1], np.int32)
    own = {"block_tables": lib.put(np.zeros((4, 8), np.int32)), "pos_encoding_mode": "ROPE_LLAMA"}
    refused = [
        ((np.array([0, 3, 2, 9, 11], np.int32), *other.table), {}, "qo_indptr: got 3 followed by 2 at .2."),
        ((starts([1, 2, 1]), *other.table), {}, "qo_indptr: got 4 entries, expected 5"),
        ((starts(EVEN), *other.table[:2], broken), {}, "paged_kv_last_page_len: got 17 for sequence 1"),
        ((starts(EVEN), *other.table), {"block_tables": lib.put(np.zeros((3, 8), np.int32))}, "block_tables: got"),
        ((starts(EVEN), *other.table), own, "block_tables: got an array, expected None beside ROPE_LLAMA"),
    ]
    for table, more, message in refused:
        with pytest.raises(ValueError, match=message):
            wrapper.plan(*map(put, table), 8, 2, 64, 16, **options, **more)
        out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
        check_base2(expect(p, q, queries, causal=True), lib.get(out), lib.get(lse), "float32")


@over_libs()
@pytest.mark.parametrize("layout", ["NH", "HN"])
@pytest.mark.parametrize("base", ["log2", "ln"])
def test_the_lse_is_a_new_contiguous_array(rng, lib, layout, base):
    p, q = paged(rng, LENGTHS, 16), normal(rng, (sum(QUERIES), 8, 64), "float32")
    wrapper = planned(lib, p, q, QUERIES, causal=True)
    results = [
        wrapper.run(lib.put(q), p.cache(lib), return_lse=True, lse_base=base, lse_layout=layout) for _ in range(2)
    ]
    first, second = (lib.get(lse) for _, lse in results)
    assert first.flags.c_contiguous
    assert first.shape == ((8, len(q)) if layout == "HN" else (len(q), 8))
    assert first.tobytes() == second.tobytes()
    expected = expect(p, q, QUERIES, causal=True).lse * (LOG2E if base == "log2" else 1)
    np.testing.assert_allclose(first if layout == "HN" else first.T, expected, rtol=1e-5)


@over_libs()
def test_run_refuses_what_is_not_done_whatever_its_type(rng, lib):
    p, q = paged(rng, LENGTHS, 16), normal(rng, (sum(QUERIES), 8, 64), "float32")
    wrapper = planned(lib, p, q, QUERIES)
    for given in ({"kv_cache_sf": lib.put(np.ones(3, np.float32))}, {"use_fp16_softmax": True}):
        with pytest.raises(NotImplementedError, match=f"{next(iter(given))}: got a value, expected None"):
            wrapper.run(lib.put(q), p.cache(lib), **given)


@over_libs()
def test_older_calls(rng, lib):
    p, q = paged(rng, LENGTHS, 16), normal(rng, (sum(QUERIES), 8, 64), "float32")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace())
    wrapper.begin_forward(lib.put(starts(QUERIES)), *lib.put(p.table), 8, 2, 64, 16, q_data_type="float32")
    for causal in (True, False, True):
        out, lse = wrapper.forward_return_lse(lib.put(q), p.cache(lib), causal=causal, sm_scale=0.2)
        check_base2(expect(p, q, QUERIES, causal=causal, softmax_scale=0.2), lib.get(out), lib.get(lse), "float32")
        again = wrapper.forward(lib.put(q), p.cache(lib), causal=causal, sm_scale=0.2)
        assert lib.get(again).tobytes() == lib.get(out).tobytes()
    out, lse = wrapper.run_return_lse(lib.put(q), p.cache(lib))
    check_base2(expect(p, q, QUERIES, causal=True, softmax_scale=0.2), lib.get(out), lib.get(lse), "float32")
    wrapper.end_forward()


@over_libs()
def test_wrappers_for_graphs(rng, lib):
    """The first plan says how many rows there are; rows behind the last sequence give zeros."""
    buffers = [lib.put(np.zeros(size, np.int32)) for size in (4, 4, 20, 3)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(), "NHD", True, *buffers)
    plain = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(lib.workspace(), "NHD", True, *buffers[:2])
    for queries, lengths in (([4, 4, 4], [40, 50, 60]), ([3, 0, 7], [10, 4, 33]), ([1, 11, 0], [90, 12, 5])):
        p, q = paged(rng, lengths, 16), normal(rng, (12, 8, 64), "float32")
        options = {"causal": True, "q_data_type": "float32"}
        wrapper.plan(lib.put(starts(queries)), *lib.put(p.table), 8, 2, 64, 16, **options)
        out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
        check_base2(expect(p, q, queries, causal=True), lib.get(out), lib.get(lse), "float32")
        assert not lib.get(out)[sum(queries) :].any()
        k, v = normal(rng, (2, 150, 2, 64), "float32")
        plain.plan(lib.put(starts(queries)), lib.put(starts(lengths)), 8, 2, 64, **options)
        out, lse = plain.run(*lib.put((q, k, v)), return_lse=True)
        expected = oracle.attention_varlen(q, k, v, starts(queries), starts(lengths), causal=True)
        check_base2(expected, lib.get(out), lib.get(lse), "float32")


@over_libs()
def test_wrappers_for_graphs_take_as_many_rows_as_the_last_plan_says(rng, lib):
    """As FlashInfer's, in runs that no graph has captured; other numbers are refused."""
    buffers = [lib.put(np.zeros(size, np.int32)) for size in (4, 4, 20, 3)]
    paged_wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(), "NHD", True, *buffers)
    ragged_wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(lib.workspace(), "NHD", True, *buffers[:2])
    for queries, lengths in (([4, 4, 4], [40, 50, 60]), ([3, 0, 7], [10, 4, 33])):
        rows = sum(queries)
        p, q = paged(rng, lengths, 16), normal(rng, (rows, 8, 64), "float32")
        options = {"causal": True, "q_data_type": "float32"}
        paged_wrapper.plan(lib.put(starts(queries)), *lib.put(p.table), 8, 2, 64, 16, **options)
        target = lib.put(np.full(q.shape, np.nan, np.float32))
        out, lse = paged_wrapper.run(lib.put(q), p.cache(lib), out=target, return_lse=True)
        assert out is target
        check_base2(expect(p, q, queries, causal=True), lib.get(out), lib.get(lse), "float32")
        k, v = normal(rng, (2, sum(lengths), 2, 64), "float32")
        ragged_wrapper.plan(lib.put(starts(queries)), lib.put(starts(lengths)), 8, 2, 64, **options)
        out, lse = ragged_wrapper.run(*lib.put((q, k, v)), return_lse=True)
        expected = oracle.attention_varlen(q, k, v, starts(queries), starts(lengths), causal=True)
        check_base2(expected, lib.get(out), lib.get(lse), "float32")
        with pytest.raises(ValueError, match=r"q: got shape \(11, 8, 64\), expected \(12, 8, 64\)"):
            paged_wrapper.run(lib.put(np.ones((11, 8, 64), np.float32)), p.cache(lib))
        with pytest.raises(ValueError, match=r"k: got shape \(9, 2, 64\), expected \(150, 2, 64\)"):
            ragged_wrapper.run(*lib.put((q, k[:9], v[:9])))


@over_libs()
def test_no_queries(lib):
    """Neither of a batch of sequences, nor in an empty batch."""
    none = np.zeros(0, np.int32)
    for batch in (0, 2):
        ends = lib.put(np.zeros(batch + 1, np.int32))
        table = lib.put((np.zeros(batch + 1, np.int32), none, np.zeros(batch, np.int32)))
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace())
        wrapper.plan(ends, *table, 4, 2, 64, 16)
        q, cache = np.ones((0, 4, 64), np.float16), np.ones((3, 2, 16, 2, 64), np.float16)
        out, lse = wrapper.run(lib.put(q), lib.put(cache), return_lse=True)
        assert lib.get(out).shape == (0, 4, 64) and lib.get(lse).shape == (0, 4)


# ---------------------------------------------------------------------------------------------------------- single


@over_libs()
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("mode", ["NONE", "ROPE_LLAMA", "ALIBI"])
@pytest.mark.parametrize(("queries", "keys"), [(7, 29), (29, 29), (20, 9)])
def test_single(rng, lib, layout, mode, queries, keys):
    q, (k, v) = normal(rng, (queries, 8, 64), "float32"), normal(rng, (2, keys, 2, 64), "float32")
    there = lib.put(tuple(x.swapaxes(0, 1).copy() if layout == "HND" else x for x in (k, v)))
    options = {"causal": True, "kv_layout": layout, "pos_encoding_mode": mode, "window_left": 8}
    out, lse = flashinfer.single_prefill_with_kv_cache(lib.put(q), *there, **options, return_lse=True)
    both = flashinfer.single_prefill_with_kv_cache_return_lse(lib.put(q), *there, **options)
    assert lib.get(both[1]).tobytes() == lib.get(lse).tobytes()
    shift, extra = 0.0, {}
    if mode == "ALIBI":
        extra, shift = {"alibi_slopes": slopes(8)}, (keys - queries) * slopes(8)
    if mode == "ROPE_LLAMA":
        q = turned(q, np.arange(queries) + keys - queries, frequencies(64)).astype(np.float32)
        k = turned(k, np.arange(keys), frequencies(64)).astype(np.float32)
    expected = oracle.attention(q[None], k[None], v[None], causal=True, window=(8, -1), **extra)
    assert np.allclose(lib.get(out), expected.out[0], rtol=0, atol=2e-5)
    got, wanted = lib.get(lse), (expected.lse[0].T + shift) * LOG2E
    assert (np.isclose(got, wanted, rtol=0, atol=3e-5) | (got == wanted)).all()


@over_libs()
@pytest.mark.parametrize("given", ["custom_mask", "packed_custom_mask"])
def test_single_custom_mask(rng, lib, given):
    q, (k, v) = normal(rng, (9, 8, 64), "float16"), normal(rng, (2, 21, 2, 64), "float16")
    mask = rng.random((9, 21)) < 0.5
    mask[3] = False
    bits = flashinfer.packbits(lib.put(mask.ravel()), "little") if given == "packed_custom_mask" else lib.put(mask)
    out, lse = flashinfer.single_prefill_with_kv_cache(
        *lib.put((q, k, v)), **{given: bits}, causal=True, return_lse=True, window_left=15
    )  # fmt: skip
    seen = mask & (np.arange(9)[:, None] + 12 - np.arange(21) <= 15)
    check_masked(lib, out, lse, q, lambda b: (k, v), [seen], "float16")


@over_libs()
def test_single_fp8(rng, lib):
    if lib.name == "cupy":
        pytest.skip("CuPy has no such dtype, and these functions no argument for it")
    q, (k, v) = normal(rng, (9, 8, 64), "float16"), normal(rng, (2, 21, 2, 64), "float16")
    stored = [oracle.to_fp8(x, "float8_e4m3fn") for x in (k, v)]
    there = lib.put(tuple(bits.view(oracle_dtype("float8_e4m3fn")) for bits in stored))
    scale = np.array([0.5, 2.0], np.float32)
    out, lse = flashinfer.single_prefill_with_kv_cache(
        lib.put(q), *there, scale_k=lib.put(scale), v_scale=3.0, causal=True, return_lse=True
    )  # fmt: skip
    options = {"kv_dtype": "float8_e4m3fn", "causal": True, "k_scale": scale, "v_scale": 3.0}
    expected = oracle.attention_with_kvcache(q[None], stored[0][None], stored[1][None], **options)
    check_base2(expected, lib.get(out), lib.get(lse), "float16")


@over_libs()
def test_a_refused_plan_leaves_the_old_forward_its_arrays(rng, lib):
    """`forward` plans the same sequences again: not over the table that came with a refused plan."""
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    p = paged(rng, [10, 33], 16, dtype="float16")
    q, sizes = lib.put(normal(rng, (2, 8, 64), "float16")), (8, 2, 64, 16)
    table = lib.put((p.indptr, p.indices, p.last))
    wrapper.plan(*table, *sizes, data_type="float16")
    cache = p.cache(lib)
    expected = lib.get(wrapper.forward(q, cache, window_left=3))
    own = lib.put(np.full((2, 5), 7, np.int32))
    with pytest.raises(ValueError, match="block_tables: got an array, expected None beside ROPE_LLAMA"):
        wrapper.plan(*table, *sizes, pos_encoding_mode="ROPE_LLAMA", data_type="float16", block_tables=own)
    assert (lib.get(wrapper.forward(q, cache, window_left=3)) == expected).all()


def test_flags_are_no_strings():
    pages = [np.array(x, np.int32) for x in ([0, 1], [0, 1], [0], [3])]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(np.empty(64, np.uint8))
    with pytest.raises(TypeError, match="^causal: got 'False', expected True or False"):
        wrapper.plan(*pages, 4, 2, 32, 4, causal="False")
    wrapper.plan(*pages, 4, 2, 32, 4)
    cache = np.ones((1, 4, 2, 32), np.float16)
    for flag in ("False", "log2", None, np.array([True, False])):
        with pytest.raises(TypeError, match="^return_lse: got .*, expected True or False"):
            wrapper.run(np.ones((1, 4, 32), np.float16), (cache, cache), return_lse=flag)
