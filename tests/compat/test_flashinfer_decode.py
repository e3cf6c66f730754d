"""FlashInfer's decode names against the float64 oracle: layouts, pages, encodings, scales, graphs' tables."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
from compat.test_flashinfer_common import (
    FLOAT32,
    LOG2E,
    Lib,
    check_base2,
    frequencies,
    oracle_dtype,
    over_libs,
    paged,
    slopes,
    turned,
)
from oracle import normal

from cupyattn import DecodePlan
from cupyattn.compat import flashinfer

LENGTHS = [5, 33, 1, 0, 17]


def expect(p, q, queries: int = 1, layout: str = "NHD", **options) -> oracle.Expected:
    dense = q.reshape(-1, queries, *q.shape[1:])
    return oracle.attention_with_kvcache(
        dense, p.k, p.v, cache_seqlens=p.lengths, block_table=p.block_table, causal=queries > 1, **options
    )


def planned(lib: Lib, p, q, kv_heads: int = 2, layout: str = "NHD", **options):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace(), layout)
    options = {"q_data_type": q.dtype.name} | options
    wrapper.plan(*lib.put(p.table), q.shape[1], kv_heads, q.shape[2], p.page_size, **options)
    return wrapper


# ------------------------------------------------------------------------------------------------ what it computes


@over_libs()
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["pair", "one"])
def test_layouts_and_page_sizes(rng, lib, page_size, layout, form):
    p = paged(rng, LENGTHS, page_size, dtype="float16")
    q = normal(rng, (5, 8, 64), "float16")
    out, lse = planned(lib, p, q, layout=layout).run(lib.put(q), p.cache(lib, layout, form), return_lse=True)
    check_base2(expect(p, q), lib.get(out), lib.get(lse), "float16")


@over_libs()
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (6, 2)])
def test_dtypes_and_heads(rng, lib, dtype, heads, kv_heads):
    p = paged(rng, LENGTHS, 16, kv_heads, 40, dtype)
    q = normal(rng, (5, heads, 40), dtype)
    wrapper = planned(lib, p, q, kv_heads, q_data_type=lib.dtype(dtype))
    out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
    check_base2(expect(p, q), lib.get(out), lib.get(lse), dtype)
    assert lib.get(out).dtype == oracle_dtype(dtype)


@over_libs()
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"window_left": 0}, {"window": (0, -1)}),
        ({"window_left": 9}, {"window": (9, -1)}),
        ({"logits_soft_cap": 3.0}, {"softcap": 3.0}),
        ({"sm_scale": 0.3}, {"softmax_scale": 0.3}),
        ({"window_left": 20, "logits_soft_cap": 1.5, "sm_scale": 0.7}, None),
        ({"disable_split_kv": True}, {}),
    ],
)
def test_masks(rng, lib, theirs, ours):
    ours = {"window": (20, -1), "softcap": 1.5, "softmax_scale": 0.7} if ours is None else ours
    p, q = paged(rng, LENGTHS, 5), normal(rng, (5, 8, 64), "float32")
    out, lse = planned(lib, p, q, **theirs).run(lib.put(q), p.cache(lib), return_lse=True)
    check_base2(expect(p, q, **ours), lib.get(out), lib.get(lse), "float32")


@over_libs()
@pytest.mark.parametrize("queries", [2, 4])
def test_several_queries_of_each_request(rng, lib, queries):
    """They see only keys up to their own."""
    p = paged(rng, [5, 33, 4, 17], 5)
    q = normal(rng, (4 * queries, 8, 64), "float32")
    wrapper = planned(lib, p, q, q_len_per_req=queries)
    out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True, q_len_per_req=queries)
    check_base2(expect(p, q, queries), lib.get(out), lib.get(lse), "float32")


@over_libs()
def test_alibi(rng, lib):
    """FlashInfer's bias is slope * key for the one query there is: its lse is larger by slope * (length - 1)."""
    p, q = paged(rng, [5, 33, 1, 17], 5), normal(rng, (4, 8, 64), "float32")
    out, lse = planned(lib, p, q, pos_encoding_mode="ALIBI").run(lib.put(q), p.cache(lib), return_lse=True)
    expected = expect(p, q, alibi_slopes=slopes(8))
    check_base2(expected, lib.get(out), lib.get(lse), "float32", (p.lengths - 1)[:, None] * slopes(8))


@over_libs()
def test_alibi_for_heads_that_are_no_power_of_two(rng, lib):
    p, q = paged(rng, [5, 33], 5, 6), normal(rng, (2, 6, 64), "float32")
    out = planned(lib, p, q, 6, pos_encoding_mode="ALIBI").run(lib.put(q), p.cache(lib))
    uneven = np.array([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    check_base2(expect(p, q, alibi_slopes=uneven), lib.get(out), None, "float32")


@over_libs()
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("queries", "scale", "theta"), [(1, None, None), (1, 4.0, 5e5), (3, None, 100.0)])
def test_rope(rng, lib, layout, queries, scale, theta):
    p = paged(rng, [5, 33, 3, 17], 5)
    q = normal(rng, (4 * queries, 8, 64), "float32")
    wrapper = planned(
        lib, p, q, 2, layout, pos_encoding_mode="ROPE_LLAMA", rope_scale=scale, rope_theta=theta, q_len_per_req=queries
    )
    cache = p.cache(lib, layout)
    before = [lib.get(x).copy() for x in cache]
    out, lse = wrapper.run(lib.put(q), cache, return_lse=True)
    freq = frequencies(64, scale or 1.0, theta or 1e4)
    positions = (p.lengths[:, None] - queries + np.arange(queries)).ravel()
    rotated = paged_rotated(p, freq)
    expected = expect(rotated, turned(q, positions, freq).astype(np.float32), queries)
    assert np.allclose(lib.get(out), expected.out.reshape(out.shape), rtol=0, atol=2e-5)
    natural = expected.lse.swapaxes(1, 2).reshape(lse.shape)
    assert np.allclose(lib.get(lse), natural * LOG2E, rtol=0, atol=2e-5)
    for array, old in zip(cache, before, strict=True):
        assert lib.get(array).tobytes() == old.tobytes(), "the cache is not to be changed"


def paged_rotated(p, freq):
    """The same sequences with keys turned by their positions, in pages of their own."""
    k = np.zeros_like(p.k)
    for b, length in enumerate(p.lengths):
        at = np.arange(length)
        place = p.block_table[b, at // p.page_size], at % p.page_size
        k[place] = turned(p.k[place], at, freq).astype(np.float32)
    return type(p)(p.lengths, p.page_size, p.indptr, p.indices, p.last, k, p.v, p.block_table)


@over_libs()
def test_rope_in_pages_that_sequences_share_at_different_positions(rng, lib):
    """Rotation on the fly lets one page stand at two places; a copy of the cache itself could not."""
    p, q = paged(rng, [20, 10], 10), normal(rng, (2, 4, 64), "float32")
    shared = p.indices[1]  # the second page of sequence 0 is all of sequence 1
    table = p.indptr, np.array([*p.indices[:2], shared], np.int32), p.last
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    wrapper.plan(*lib.put(table), 4, 2, 64, 10, pos_encoding_mode="ROPE_LLAMA", q_data_type="float32")
    got = lib.get(wrapper.run(lib.put(q), p.cache(lib)))
    freq = frequencies(64)
    for b, pages in enumerate(([p.indices[0], shared], [shared])):
        k, v = (np.concatenate([x[page] for page in pages]) for x in (p.k, p.v))
        keys = turned(k, np.arange(len(k)), freq).astype(np.float32)
        query = turned(q[b : b + 1], [len(k) - 1], freq).astype(np.float32)
        expected = oracle.attention(query[None], keys[None], v[None])
        assert np.allclose(got[b], expected.out[0, 0], rtol=0, atol=2e-5)


@over_libs()
@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("scales", ["none", "numbers", "arrays"])
def test_fp8(rng, lib, kv_dtype, scales):
    p, q = paged(rng, LENGTHS, 16, dtype="float16"), normal(rng, (5, 8, 64), "float16")
    stored = [oracle.to_fp8(np.nan_to_num(x.astype(np.float64)), kv_dtype) for x in (p.k, p.v)]
    cache = lib.put(tuple(bits if lib.name == "cupy" else bits.view(oracle_dtype(kv_dtype)) for bits in stored))
    numbers = {"none": (1.0, 1.0), "numbers": (0.75, 1.5), "arrays": ([0.75, 0.5], [1.5, 2.0])}[scales]
    scale_arrays = [np.array(number, np.float32) for number in numbers]
    given = {} if scales == "none" else dict(zip(("k_scale", "v_scale"), numbers, strict=True))
    if scales == "arrays":
        given = {name: lib.put(array) for name, array in zip(given, scale_arrays, strict=True)}
    wrapper = planned(lib, p, q, kv_data_type=kv_dtype)
    out, lse = wrapper.run(lib.put(q), cache, return_lse=True, **given)
    p.k, p.v = stored
    fp8 = {"kv_dtype": kv_dtype, "k_scale": scale_arrays[0], "v_scale": scale_arrays[1]}
    check_base2(expect(p, q, **fp8), lib.get(out), lib.get(lse), "float16")


@over_libs()
def test_scales_of_plain_keys_and_values(rng, lib):
    p, q = paged(rng, LENGTHS, 16), normal(rng, (5, 8, 64), "float32")
    wrapper = planned(lib, p, q, sm_scale=0.2)
    scales = {"q_scale": 1.5, "k_scale": 0.5, "v_scale": 3.0}
    out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True, **scales)
    expected = expect(p, q, softmax_scale=0.15)
    bound = 3 * expected.bounds("float32")[0].reshape(out.shape) + 4 * FLOAT32 * np.abs(lib.get(out))
    assert (np.abs(lib.get(out) - 3 * expected.out.reshape(out.shape)) <= bound).all()
    check_base2(expected, lib.get(wrapper.run(lib.put(q), p.cache(lib), q_scale=1.5, k_scale=0.5)), None, "float32")


@over_libs()
def test_sinks(rng, lib):
    p, q, sinks = paged(rng, [5, 33], 16), normal(rng, (2, 8, 64), "float32"), normal(rng, (8,), "float32")
    wrapper = planned(lib, p, q)
    for _ in range(2):
        out = wrapper.run(lib.put(q), p.cache(lib), sinks=lib.put(sinks))
        check_base2(expect(p, q, sinks=sinks), lib.get(out), None, "float32")
        check_base2(expect(p, q), lib.get(wrapper.run(lib.put(q), p.cache(lib))), None, "float32")


@over_libs()
def test_out_and_lse_are_written_into(rng, lib):
    p, q = paged(rng, LENGTHS, 16), normal(rng, (5, 8, 64), "float32")
    out, lse = lib.put(np.full((5, 8, 64), np.nan, np.float32)), lib.put(np.full((5, 8), np.nan, np.float32))
    wrapper = planned(lib, p, q)
    results = wrapper.run(lib.put(q), p.cache(lib), out=out, lse=lse, return_lse=True)
    assert results[0] is out and results[1] is lse
    check_base2(expect(p, q), lib.get(out), lib.get(lse), "float32")
    wide = lib.put(np.full((5, 8, 100), np.nan, np.float32))
    narrow = wide[:, :, 5:69]
    assert wrapper.run(lib.put(q), p.cache(lib), out=narrow) is narrow
    check_base2(expect(p, q), lib.get(wide)[:, :, 5:69], None, "float32")
    assert np.isnan(lib.get(wide)[:, :, :5]).all() and np.isnan(lib.get(wide)[:, :, 69:]).all()


@over_libs()
def test_the_lse_is_what_the_kernel_wrote(rng, lib, monkeypatch):
    """To base 2 already, and contiguous where each sequence has one query: nothing need follow the step."""
    made, run = [], DecodePlan.run
    monkeypatch.setattr(
        DecodePlan, "run", lambda plan, *given, **roles: made.append(run(plan, *given, **roles)) or made[-1]
    )
    p, q = paged(rng, LENGTHS, 16), normal(rng, (5, 8, 64), "float32")
    wrapper = planned(lib, p, q)
    for _ in range(2):
        out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
        wrote, as_asked = made.pop()
        assert out is wrote and lse is as_asked and not made
        check_base2(expect(p, q), lib.get(out), lib.get(lse), "float32")


@over_libs()
def test_strided_queries(rng, lib):
    """Cut from one projection, as models have them."""
    p, base = paged(rng, LENGTHS, 16), normal(rng, (5, 12, 64), "float32")
    q = lib.put(base)[:, 2:10]
    out = planned(lib, p, base[:, 2:10]).run(q, p.cache(lib))
    check_base2(expect(p, base[:, 2:10]), lib.get(out), None, "float32")


@over_libs()
def test_page_tables_on_the_host_and_longer_than_used(rng, lib):
    p, q = paged(rng, LENGTHS, 16), normal(rng, (5, 8, 64), "float32")
    indptr, indices, last = p.table
    longer = np.concatenate([indices, np.array([10**6, -5], np.int32)])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    for on_host in itertools.product([False, True], repeat=3):
        table = [x if host else lib.put(x) for x, host in zip((indptr, longer, last), on_host, strict=True)]
        wrapper.plan(*table, 8, 2, 64, 16, q_data_type="float32")
        check_base2(expect(p, q), lib.get(wrapper.run(lib.put(q), p.cache(lib))), None, "float32")


@over_libs()
def test_own_block_table_and_lengths(rng, lib):
    p, q = paged(rng, LENGTHS, 16), normal(rng, (5, 8, 64), "float32")
    table = np.where(p.block_table < 0, 0, p.block_table)
    shorter = np.array([4, 30, 1, 0, 2], np.int32)
    wrapper = planned(lib, p, q, block_tables=lib.put(table), seq_lens=lib.put(shorter))
    got = lib.get(wrapper.run(lib.put(q), p.cache(lib)))
    p.lengths = shorter
    check_base2(expect(p, q), got, None, "float32")
    wrong = np.zeros_like(p.indices)  # not looked at where the caller's own table is
    wrapper.plan(
        *lib.put((p.indptr, wrong, p.last)), 8, 2, 64, 16, q_data_type="float32", block_tables=lib.put(table),
        seq_lens=lib.put(shorter),
    )  # fmt: skip
    check_base2(expect(p, q), lib.get(wrapper.run(lib.put(q), p.cache(lib))), None, "float32")


@over_libs()
def test_no_sequences_and_no_pages(lib):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    none = np.zeros(0, np.int32)
    for batch in (0, 2):
        wrapper.plan(*lib.put((np.zeros(batch + 1, np.int32), none, np.zeros(batch, np.int32))), 4, 2, 64, 16)
        q, cache = np.ones((batch, 4, 64), np.float16), np.ones((3, 2, 16, 2, 64), np.float16)
        out, lse = wrapper.run(lib.put(q), lib.put(cache), return_lse=True)
        assert lib.get(out).shape == (batch, 4, 64) and not lib.get(out).any()
        assert (lib.get(lse) == -np.inf).all() and lib.get(lse).shape == (batch, 4)


# ----------------------------------------------------------------------------------------------- plans and their runs


@over_libs()
def test_one_plan_serves_layers_of_different_forms(rng, lib):
    """A run looks at its own arrays, whatever the one before had."""
    wrapper = None
    for pool, form, layout in [(3, "pair", "NHD"), (9, "pair", "NHD"), (9, "one", "NHD"), (3, "pair", "NHD")]:
        p, q = paged(rng, LENGTHS, 16, spare=pool), normal(rng, (5, 8, 64), "float32")
        if wrapper is None:
            wrapper, first = planned(lib, p, q), p
        p.indices, p.block_table = first.indices, first.block_table
        for cache, name in ((p.k, "k"), (p.v, "v")):
            setattr(p, name, np.where(np.isnan(cache), 0.5, cache))
        out, lse = wrapper.run(lib.put(q), p.cache(lib, layout, form), return_lse=True)
        check_base2(expect(p, q), lib.get(out), lib.get(lse), "float32")


@over_libs()
def test_plans_one_after_another(rng, lib):
    """Sequences grow, come and go; each run is of the last plan."""
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    for lengths in ([5, 33], [6, 34], [100, 1, 7], [6, 200], [6, 34]):
        p, q = paged(rng, lengths, 16), normal(rng, (len(lengths), 8, 64), "float32")
        wrapper.plan(*lib.put(p.table), 8, 2, 64, 16, q_data_type="float32")
        for _ in range(2):
            check_base2(expect(p, q), lib.get(wrapper.run(lib.put(q), p.cache(lib))), None, "float32")


@over_libs()
def test_plans_of_one_query_and_of_several_in_turn(rng, lib):
    """Single queries need no axis of their own, several do; arrays to write into are of the caller's form in both."""
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    p = paged(rng, [5, 33, 17], 16)
    for queries in (1, 2, 1, 3):
        q = normal(rng, (3 * queries, 8, 64), "float32")
        wrapper.plan(*lib.put(p.table), 8, 2, 64, 16, q_data_type="float32", q_len_per_req=queries)
        out, lse = lib.put(np.full(q.shape, np.nan, np.float32)), lib.put(np.full(q.shape[:2], np.nan, np.float32))
        assert wrapper.run(lib.put(q), p.cache(lib), out=out, lse=lse, return_lse=True)[1] is lse
        check_base2(expect(p, q, queries), lib.get(out), lib.get(lse), "float32")
        made, base2 = map(lib.get, wrapper.run(lib.put(q), p.cache(lib), return_lse=True))
        assert made.tobytes() == lib.get(out).tobytes() and base2.tobytes() == lib.get(lse).tobytes()
        assert made.flags.c_contiguous and base2.flags.c_contiguous


@over_libs()
def test_tables_that_grow_over_one_pool(rng, lib):
    """The arrays of the runs are as before, and only the block table is wider."""
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    for lengths, used in (([5, 33], 4), ([6, 100], 8), ([40, 16], 4)):
        p, q = paged(rng, lengths, 16, spare=20 - used), normal(rng, (2, 8, 64), "float32")
        assert len(p.k) == 20
        wrapper.plan(*lib.put(p.table), 8, 2, 64, 16, q_data_type="float32")
        check_base2(expect(p, q), lib.get(wrapper.run(lib.put(q), p.cache(lib))), None, "float32")


@over_libs()
def test_plans_of_one_form_write_to_the_same_place(rng, lib):
    """As FlashInfer's do to its workspace, so that a plan costs one transfer; other forms get places of their own."""
    wrapper, places = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace()), []
    for lengths in ([5, 33], [6, 40], [100, 1, 7], [6, 200], [7, 201]):
        p, q = paged(rng, lengths, 16), normal(rng, (len(lengths), 8, 64), "float32")
        wrapper.plan(*lib.put(p.table), 8, 2, 64, 16, q_data_type="float32")
        check_base2(expect(p, q), lib.get(wrapper.run(lib.put(q), p.cache(lib))), None, "float32")
        places.append((wrapper._tables.table, wrapper._tables.lengths))
    same = [all(one is other for one, other in zip(*pair, strict=True)) for pair in itertools.pairwise(places)]
    assert same == [True, False, False, True]


@over_libs()
def test_page_ids_are_compared_with_every_cache(rng, lib):
    """Where the host has them: also in a plan that is like the one before but for them, and over a smaller cache."""
    p, q = paged(rng, [5, 33], 16), normal(rng, (2, 8, 64), "float32")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    here = lib.put(q), p.cache(lib)
    for bad in (None, len(p.k), -1):
        indices = p.indices.copy()
        if bad is not None:
            indices[2] = bad
        wrapper.plan(lib.put(p.indptr), indices, lib.put(p.last), 8, 2, 64, 16, q_data_type="float32")
        if bad is None:
            check_base2(expect(p, q), lib.get(wrapper.run(*here)), None, "float32")
            continue
        for _ in range(2):
            with pytest.raises(ValueError, match=f"indices: got page {bad} at .2., of sequence 1, expected 0 to"):
                wrapper.run(*here)
    wrapper.plan(lib.put(p.indptr), p.indices, lib.put(p.last), 8, 2, 64, 16, q_data_type="float32")
    few = int(p.indices.max())
    with pytest.raises(ValueError, match=f"indices: got page {few} at"):
        wrapper.run(here[0], tuple(cache[:few] for cache in here[1]))
    check_base2(expect(p, q), lib.get(wrapper.run(*here)), None, "float32")


@over_libs()
def test_a_plan_that_is_refused_late_leaves_the_tables_as_they_were(rng, lib):
    """It is of the same form as the one before, and would write to the same place."""
    p, q = paged(rng, [5, 33], 16), normal(rng, (2, 8, 64), "float32")
    table = lib.put(np.where(p.block_table < 0, 0, p.block_table))
    wrapper = planned(lib, p, q, block_tables=table)
    other = paged(rng, [1, 40], 16)
    with pytest.raises(ValueError, match="block_tables: got an array, expected None beside ROPE_LLAMA"):
        wrapper.plan(
            *lib.put(other.table), 8, 2, 64, 16, block_tables=table, q_data_type="float32",
            pos_encoding_mode="ROPE_LLAMA",
        )  # fmt: skip
    check_base2(expect(p, q), lib.get(wrapper.run(lib.put(q), p.cache(lib))), None, "float32")


@over_libs()
def test_a_refused_plan_leaves_the_one_before_in_force(rng, lib):
    p, q = paged(rng, LENGTHS, 16), normal(rng, (5, 8, 64), "float32")
    wrapper = planned(lib, p, q)
    broken = p.last.copy()
    broken[1] = 17
    with pytest.raises(ValueError, match="last_page_len: got 17 for sequence 1"):
        wrapper.plan(*lib.put((p.indptr, p.indices, broken)), 8, 2, 64, 16, q_data_type="float32")
    check_base2(expect(p, q), lib.get(wrapper.run(lib.put(q), p.cache(lib))), None, "float32")


@over_libs()
def test_older_calls(rng, lib):
    """begin_forward, forward with options of its own, forward_return_lse, end_forward."""
    p, q = paged(rng, LENGTHS, 16), normal(rng, (5, 8, 64), "float32")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace())
    wrapper.begin_forward(*lib.put(p.table), 8, 2, 64, 16, data_type="float32")
    here = lib.put(q), p.cache(lib)
    check_base2(expect(p, q), lib.get(wrapper.forward(*here)), None, "float32")
    out = wrapper.forward(*here, window_left=3, logits_soft_cap=2.0)
    check_base2(expect(p, q, window=(3, -1), softcap=2.0), lib.get(out), None, "float32")
    out, lse = wrapper.forward_return_lse(*here, sm_scale=0.5)
    check_base2(expect(p, q, softmax_scale=0.5), lib.get(out), lib.get(lse), "float32")
    out, lse = wrapper.run_return_lse(*here)
    check_base2(expect(p, q, softmax_scale=0.5), lib.get(out), lib.get(lse), "float32")
    wrapper.end_forward()


@over_libs()
def test_tables_for_graphs_stay_where_they_are(rng, lib):
    """What a captured run reads is written anew by each plan, in the same place, also where pages are on the device."""
    buffers = [lib.put(np.zeros(size, np.int32)) for size in (4, 12, 3)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(lib.workspace(), *buffers)
    assert wrapper.is_cuda_graph_enabled
    tables = wrapper._fixed.tables
    where = tables.table, tables.lengths
    for lengths in ([5, 33, 17], [1, 100, 30], [0, 2, 64]):
        p, q = paged(rng, lengths, 16), normal(rng, (3, 8, 64), "float32")
        wrapper.plan(*lib.put(p.table), 8, 2, 64, 16, q_data_type="float32")
        assert tables.table is where[0] and tables.lengths is where[1]
        out, lse = wrapper.run(lib.put(q), p.cache(lib), return_lse=True)
        check_base2(expect(p, q), lib.get(out), lib.get(lse), "float32")


@over_libs()
def test_block_tables_for_graphs_do_not_grow_with_the_batch_without_bound(lib):
    """An engine's buffer is for all sequences: a table of so many columns for each would not fit a GPU."""
    buffers = [lib.put(np.zeros(size, np.int32)) for size in (1001, 10_000_000, 1000)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(lib.workspace(64), *buffers)
    columns = wrapper._fixed._columns
    assert 10_000 <= columns and columns * 1000 <= (1 << 26) + 1000
    small = [lib.put(np.zeros(size, np.int32)) for size in (4, 12, 3)]
    assert flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(lib.workspace(64), *small)._fixed._columns == 12


@pytest.mark.gpu
def test_a_captured_run_follows_later_plans(rng):
    import cupy

    lib = Lib("cupy")
    buffers = [lib.put(np.zeros(size, np.int32)) for size in (4, 12, 3)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(lib.workspace(), *buffers)
    q, out = cupy.zeros((3, 8, 64), np.float16), cupy.zeros((3, 8, 64), np.float16)
    pools = [cupy.zeros((20, 16, 2, 64), np.float16) for _ in "kv"]
    graph = None
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for lengths in ([1, 1, 1], [5, 33, 17], [1, 100, 30]):
            p, new = paged(rng, lengths, 16, dtype="float16"), normal(rng, (3, 8, 64), "float16")
            q.set(new)
            for pool, held in zip(pools, (p.k, p.v), strict=True):
                pool[: len(held)] = cupy.asarray(held)
            wrapper.plan(*lib.put(p.table), 8, 2, 64, 16)
            if graph is None:
                wrapper.run(q, tuple(pools), out=out)
                stream.begin_capture()
                wrapper.run(q, tuple(pools), out=out)
                graph = stream.end_capture()
            out.fill(np.nan)
            graph.launch(stream)
            stream.synchronize()
            check_base2(expect(p, new), out.get(), None, "float16")


@over_libs()
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("mode", ["NONE", "ROPE_LLAMA", "ALIBI"])
def test_single(rng, lib, layout, mode):
    q, k, v = normal(rng, (8, 64), "float32"), *normal(rng, (2, 29, 2, 64), "float32")
    there = lib.put(tuple(x.swapaxes(0, 1).copy() if layout == "HND" else x for x in (k, v)))
    options = {"kv_layout": layout, "pos_encoding_mode": mode, "window_left": 20, "sm_scale": 0.2}
    out, lse = flashinfer.single_decode_with_kv_cache(lib.put(q), *there, **options, return_lse=True)
    only = flashinfer.single_decode_with_kv_cache(lib.put(q), *there, **options)
    assert lib.get(only).tobytes() == lib.get(out).tobytes() and lib.get(out).shape == (8, 64)
    shift, extra, query = 0.0, {}, q[None]
    if mode == "ALIBI":
        extra, shift = {"alibi_slopes": slopes(8)}, 28 * slopes(8)
    if mode == "ROPE_LLAMA":
        query = turned(query, [28], frequencies(64)).astype(np.float32)
        k = turned(k, np.arange(29), frequencies(64)).astype(np.float32)
    expected = oracle.attention(query[None], k[None], v[None], window=(20, -1), softmax_scale=0.2, **extra)
    assert np.allclose(lib.get(out), expected.out[0, 0], rtol=0, atol=2e-5)
    assert np.allclose(lib.get(lse), (expected.lse[0, :, 0] + shift) * LOG2E, rtol=0, atol=2e-5)


@over_libs()
def test_single_scales_and_cap(rng, lib):
    q, k, v = normal(rng, (8, 64), "float16"), *normal(rng, (2, 29, 2, 64), "float16")
    options = {"q_scale": 2.0, "k_scale": 0.25, "v_scale": 2.0, "logits_soft_cap": 5.0}
    out = flashinfer.single_decode_with_kv_cache(*lib.put((q, k, v)), **options)
    expected = oracle.attention(q[None, None], k[None], v[None], softmax_scale=0.5 / 8, softcap=5.0)
    bound = 2 * expected.bounds("float16")[0][0, 0]
    assert (np.abs(lib.get(out).astype(np.float64) - 2 * expected.out[0, 0]) <= bound).all()  # times 2 is exact
