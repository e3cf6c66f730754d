"""cupyattn inside JAX: results under jit, vmap and shard_map, donated caches, what is refused and in which words.

Tests with `place` run on the CPU, and on a GPU where JAX has one. What a callback launches there is also tested without
a device, with the stand-ins of test_decode_plan.
"""

from __future__ import annotations

import ctypes
import inspect
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from oracle import cumulative, normal
from test_arrays import at_address
from test_decode import FP8, dense, held, ints, paged, tables
from test_decode_plan import driver  # noqa: F401 (a fixture)
from test_forward import features

import cupyattn
from cupyattn import DecodePlan
from cupyattn.integrations.alignment import from_top_left
from cupyattn.kernels import workspace

jax = pytest.importorskip("jax")
jnp = jax.numpy
pytest.importorskip("jax.experimental.buffer_callback")

from cupyattn.integrations import jax as ours  # noqa: E402
from cupyattn.integrations.jax import batching, calls  # noqa: E402
from cupyattn.integrations.jax.forms import ROLES, Abstract, Form, described  # noqa: E402

HALF_AND_SINGLE = ("float16", "bfloat16", "float32")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request):
    try:
        device = jax.devices(request.param)[0]
    except RuntimeError:
        pytest.skip("needs JAX for CUDA")
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield request.param


def dense_arrays(rng, dtype="float32", batch=2, seqlen_q=5, seqlen_k=7, heads=4, kv_heads=2, head_dim=32):
    q = normal(rng, (batch, seqlen_q, heads, head_dim), dtype)
    return q, *normal(rng, (2, batch, seqlen_k, kv_heads, head_dim), dtype)


def packed_arrays(rng, dtype="float32", lengths_q=(3, 0, 5), lengths_k=(4, 2, 9), spare=2):
    """q, k, v with rows to spare behind the last sequence, and their cu_seqlens."""
    q = normal(rng, (sum(lengths_q) + spare, 4, 32), dtype)
    return q, *normal(rng, (2, sum(lengths_k) + spare, 2, 32), dtype), cumulative(lengths_q), cumulative(lengths_k)


def jitted(function, *arrays, **given):
    """The function of arrays alone, inside jax.jit, called with them."""
    options = {name: value for name, value in given.items() if not isinstance(value, np.ndarray)}
    traced = {name: value for name, value in given.items() if isinstance(value, np.ndarray)}
    return jax.jit(partial(getattr(ours, function), **options))(*arrays, **traced)


def agrees(function, *arrays, **options):
    out, lse = jitted(function, *arrays, **options, return_lse=True)
    dtype = arrays[0].dtype.name
    assert out.dtype == dtype and lse.dtype == np.float32
    getattr(oracle, function)(*arrays, **options).check(np.asarray(out), np.asarray(lse), dtype)


def refused(argument, came, expected, kind=ValueError):
    return pytest.raises(kind, match=f"{argument}: got .*{came}.*, expected .*{expected}")


# ----------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("names", [(), ("causal",), ("window", "softcap", "batch_alibi", "sinks"), ("alibi", "causal")])
def test_dense_under_jit(rng, place, dtype, names):
    agrees("attention", *dense_arrays(rng, dtype), **features(rng, *names))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_packed_under_jit(rng, place, dtype):
    agrees("attention_varlen", *packed_arrays(rng, dtype), causal=True)
    q, _, _, ends, _ = packed_arrays(rng, dtype)
    k, v = normal(rng, (2, len(q), 2, 32), dtype)
    agrees("attention_varlen", q, k, v, ends, max_seqlen_q=6, window=(2, 1))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_paged_under_jit(rng, place, layout):
    lengths = (5, 33, 0)
    cache = paged(rng, held(rng, "float16", lengths, head_dim=32), 16, layout)
    caches = [np.ascontiguousarray(part) for part in cache.split(cache.array)]
    q, *_, ends, _ = packed_arrays(rng, "float16", (2, 4, 1))
    agrees("attention_varlen", q, *caches, ends, seqused_k=ints(*lengths), causal=True, **cache.places)
    step = {"cache_seqlens": ints(*lengths), "cache_leftpad": ints(1, 30, 0)} | cache.places
    agrees("attention_with_kvcache", normal(rng, (3, 2, 4, 32), "float16"), *caches, causal=True, **step)


def test_eager_calls_give_the_same(rng, place):
    q, k, v = dense_arrays(rng)
    assert np.array_equal(ours.attention(q, k, v, causal=True), jitted("attention", q, k, v, causal=True))
    out, lse = ours.attention(*map(jnp.asarray, (q, k, v)), return_lse=True)
    assert isinstance(out, jax.Array) and lse.shape == (2, 4, 5)


def test_a_call_that_was_traced_is_not_traced_again(rng, monkeypatch):
    q, k, v = dense_arrays(rng, head_dim=24)
    traced = []
    call = calls.call
    monkeypatch.setattr(batching, "call", lambda *x: traced.append(x) or call(*x))
    for _ in range(3):
        ours.attention(q, k, v, softmax_scale=0.3)
    assert len(traced) == 1
    ours.attention(q, k, v, softmax_scale=0.4)
    ours.attention(q[:1], k[:1], v[:1], softmax_scale=0.4)
    assert len(traced) == 3


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_do(place, shape):
    batch, seqlen = shape
    q, k = np.zeros((batch, seqlen, 4, 32), np.float16), np.zeros((batch, 5, 2, 32), np.float16)
    out, lse = jitted("attention", q, k, k, return_lse=True)
    assert out.shape == q.shape and lse.shape == (batch, 4, seqlen)


def test_packed_rows_without_a_sequence_see_nothing(place):
    q, k = np.ones((3, 4, 32), np.float16), np.ones((5, 2, 32), np.float16)
    out, lse = jitted("attention_varlen", q, k, k, ints(0), ints(0), return_lse=True)
    assert not np.asarray(out).any() and (np.asarray(lse) == -np.inf).all()


def test_inside_a_scan(rng, place):
    """Layers of one form, one behind the other, as models have them."""
    q, k, v = dense_arrays(rng, seqlen_q=6, seqlen_k=6, kv_heads=4)
    keys, values = np.stack([k, 2 * k, -k]), np.stack([v, -v, v])

    def layer(x, own):
        return ours.attention(x, *own, causal=True), None

    out, _ = jax.jit(lambda *x: jax.lax.scan(layer, x[0], x[1:]))(q, keys, values)
    expected = q
    for own in zip(keys, values, strict=True):
        expected = cupyattn.attention(expected, *own, causal=True, kernel="numpy_float64").astype(np.float32)
    np.testing.assert_allclose(out, expected, atol=3e-5)


# ------------------------------------------------------------------------------------------------------ caches


def step_arrays(rng, dtype="float32", rows=64, lengths=(5, 40)):
    q = normal(rng, (len(lengths), 2, 4, 32), dtype)
    k, v = normal(rng, (2, len(lengths), 2, 2, 32), dtype)
    cache = dense(held(rng, dtype, lengths, head_dim=32), rows)
    return q, *(part.copy() for part in cache.split(cache.array)), {"k": k, "v": v, "cache_seqlens": ints(*lengths)}


def in_numpy(q, k_cache, v_cache, new):
    """The caches as they must be after the step."""
    expected = k_cache.copy(), v_cache.copy()
    cupyattn.attention_with_kvcache(q, *expected, **new)
    return expected


def same_caches(got, expected):
    for one, other in zip(got, expected, strict=True):
        one = np.asarray(one)
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_new_rows_come_back_in_new_caches(rng, place, dtype):
    q, *caches, new = step_arrays(rng, dtype)
    given = [jnp.asarray(cache) for cache in caches]
    out, lse, *appended = jitted("attention_with_kvcache", q, *given, **new, causal=True, return_lse=True)
    expected = oracle.attention_with_kvcache(q, *caches, **new, causal=True)
    expected.check(np.asarray(out), np.asarray(lse), dtype)
    same_caches(appended, in_numpy(q, *caches, new))
    same_caches(given, caches)  # without donation they are as they were


def test_donated_caches_are_written_in_place(rng, place):
    q, *caches, new = step_arrays(rng)
    expected = in_numpy(q, *caches, new)
    given = [jnp.array(cache) for cache in caches]
    where = [cache.unsafe_buffer_pointer() for cache in given]
    step = jax.jit(lambda q, k_cache, v_cache, new: ours.attention_with_kvcache(q, k_cache, v_cache, **new),
                   donate_argnums=(1, 2))  # fmt: skip
    _, *appended = step(q, *given, new)
    assert all(cache.is_deleted() for cache in given)
    assert [cache.unsafe_buffer_pointer() for cache in appended] == where
    same_caches(appended, expected)


def test_eager_calls_donate_the_caches(rng, place):
    q, *caches, new = step_arrays(rng)
    expected = in_numpy(q, *caches, new)
    given = [jnp.array(cache) for cache in caches]
    where = [cache.unsafe_buffer_pointer() for cache in given]
    _, *appended = ours.attention_with_kvcache(q, *given, **new)
    assert all(cache.is_deleted() for cache in given)
    assert [cache.unsafe_buffer_pointer() for cache in appended] == where
    same_caches(appended, expected)


def test_eager_calls_that_are_refused_leave_the_caches(rng):
    """By what their index arrays hold too, on the CPU."""
    q, *caches, new = step_arrays(rng)
    with jax.default_device(jax.devices("cpu")[0]):
        given = [jnp.array(cache) for cache in caches]
        full = new | {"cache_seqlens": np.full_like(new["cache_seqlens"], caches[0].shape[1])}
        with refused("cache_seqlens", "tokens for sequence 0 plus", "at most the"):
            ours.attention_with_kvcache(q, *given, **full)
        with refused("v_cache", "the array that is k_cache too", "a cache of its own"):
            ours.attention_with_kvcache(q, given[0], given[0], **new)
        same_caches(given, caches)


def test_one_length_for_all_is_static(rng, place):
    q, *caches, new = step_arrays(rng, lengths=(9, 9))
    out, *appended = jitted("attention_with_kvcache", q, *caches, **new | {"cache_seqlens": 9})
    other, *_ = jitted("attention_with_kvcache", q, *caches, **new)
    assert np.array_equal(out, other)
    same_caches(appended, in_numpy(q, *caches, new))


def test_a_decoding_loop(rng, place):
    """Steps inside a while loop, whose lengths and caches are carried along."""
    q, *caches, _ = step_arrays(rng, lengths=(0, 3))
    rows = normal(rng, (4, 2, 2, 1, 2, 32), "float32")
    starts = ints(0, 3)

    def step(i, carried):
        caches, outs = carried
        k, v = rows[i] if isinstance(i, int) else jnp.asarray(rows)[i]
        out, *caches = ours.attention_with_kvcache(q[:, :1], *caches, k=k, v=v, cache_seqlens=starts + i)
        return caches, outs.at[i].set(out)

    start = list(map(jnp.asarray, caches)), jnp.zeros((4, *q[:, :1].shape))
    appended, outs = jax.jit(lambda start: jax.lax.fori_loop(0, 4, step, start))(start)
    here = [cache.copy() for cache in caches]
    for i in range(4):
        k, v = rows[i]
        out = cupyattn.attention_with_kvcache(q[:, :1], *here, k=k, v=v, cache_seqlens=starts + np.int32(i))
        np.testing.assert_allclose(outs[i], out, atol=2e-6)
    same_caches(appended, here)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding_in_a_paged_cache(rng, place, interleaved):
    lengths = (5, 33)
    cache = paged(rng, held(rng, "float16", lengths), 16, capacity=40)
    caches = [np.ascontiguousarray(part) for part in cache.split(cache.array)]
    k, v = normal(rng, (2, 2, 2, 2, 64), "float16")
    options = {"cache_seqlens": ints(*lengths), "rotary_interleaved": interleaved}
    options |= tables(rng, 64, 32, "float32") | cache.places
    q = normal(rng, (2, 2, 4, 64), "float16")
    step = options | {"k": k, "v": v, "causal": True}
    out, lse, *appended = map(np.asarray, jitted("attention_with_kvcache", q, *caches, **step, return_lse=True))
    oracle.check_caches(appended, *oracle.append_range(*caches, k, v, **options))
    oracle.attention_with_kvcache(q, *caches, **step, stored=tuple(appended)).check(out, lse, "float16")


@pytest.mark.parametrize("given_as", ["bytes", "numbers"])
def test_fp8_caches(rng, place, given_as):
    name = FP8[0]
    cache = dense(held(rng, "float16", (9, 20), kv_dtype=name), 32)
    caches = cache.split(cache.array)
    options = {"cache_seqlens": ints(9, 20), "k_scale": 0.5, "v_scale": ints(2).astype(np.float32)}
    q = normal(rng, (2, 1, 4, 64), "float16")
    expected = oracle.attention_with_kvcache(q, *caches, **options, kv_dtype=name)
    if given_as == "numbers":
        caches = [part.view(np.dtype(name)) for part in caches]
    else:
        options["kv_dtype"] = name
    out, lse = jitted("attention_with_kvcache", q, *caches, **options, return_lse=True)
    expected.check(np.asarray(out), np.asarray(lse), "float16")


# -------------------------------------------------------------------------------------------------------- vmap


def one_by_one(function, size, mapped, same, **options):
    """Calls in NumPy, one for each part; a list of all their results, stacked."""
    results = []
    for i in range(size):
        arrays = {name: x[i].copy() for name, x in mapped.items()} | {name: x.copy() for name, x in same.items()}
        caches = [arrays[name] for name in ("k_cache", "v_cache") if "k" in arrays and name in arrays]
        results.append((*getattr(cupyattn, function)(**arrays, **options, return_lse=True), *caches))
    return [np.stack(parts) for parts in zip(*results, strict=True)]


def maps(place, monkeypatch, function, mapped, same, launches=1, **options):
    """vmap over the mapped arrays equals calls one by one, in so many launches."""
    size = len(next(iter(mapped.values())))
    expected = one_by_one(function, size, mapped, same, **options)
    called = []
    run = calls.Callback.__call__
    monkeypatch.setattr(calls.Callback, "__call__", lambda self, *x: called.append(self) or run(self, *x))
    call = partial(getattr(ours, function), **options, return_lse=True, command_buffer=False)
    got = jax.jit(jax.vmap(lambda mapped: call(**mapped, **same)))(mapped)
    jax.block_until_ready(got)
    assert len(called) == launches
    tolerance = 2e-6 if place == "cpu" else 2e-5
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


def apart(names, arrays):
    """(mapped, same) of arrays by name: those that are named, and the first part of the others."""
    return {n: x for n, x in arrays.items() if n in names}, {n: x[0] for n, x in arrays.items() if n not in names}


@pytest.mark.parametrize("names", [("q", "k", "v"), ("q",), ("k",), ("v", "alibi_slopes"), ("alibi_slopes",)])
@pytest.mark.parametrize("slopes", [(4,), (2, 4)])
def test_vmap_of_dense_arrays_joins_the_batch(rng, place, monkeypatch, names, slopes):
    arrays = dict(zip("qkv", (normal(rng, (3, *x.shape), "float32") for x in dense_arrays(rng)), strict=True))
    arrays["alibi_slopes"] = rng.uniform(0, 0.3, (3, *slopes)).astype(np.float32)
    sinks = features(rng, "sinks")
    mapped, same = apart(names, arrays)
    maps(place, monkeypatch, "attention", mapped, same | sinks, causal=True)


def test_vmap_over_what_a_launch_has_one_of_goes_one_by_one(rng, place, monkeypatch):
    q, k, v = dense_arrays(rng)
    sinks = normal(rng, (3, 4), "float32")
    maps(place, monkeypatch, "attention", {"sinks": sinks}, {"q": q, "k": k, "v": v}, launches=3)


def packed_parts(rng):
    """Three parts of as many rows, split into sequences in other ways, with rows to spare in some."""
    ends_q, ends_k = ints(0, 3, 3, 8, 0, 0, 7, 9, 0, 9, 9, 9), ints(0, 4, 6, 13, 0, 2, 2, 2, 0, 0, 12, 15)
    arrays = {"q": normal(rng, (3, 9, 4, 32), "float32"), "cu_seqlens_q": ends_q.reshape(3, 4)}
    arrays |= dict(zip("kv", normal(rng, (2, 3, 15, 2, 32), "float32"), strict=True))
    return arrays | {"cu_seqlens_k": ends_k.reshape(3, 4), "seqused_k": ints(4, 1, 7, 2, 0, 0, 0, 9, 3).reshape(3, 3)}


@pytest.mark.parametrize("names", [("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k"), ("q",), ("k", "v")])
@pytest.mark.parametrize("used", [False, True])
def test_vmap_of_packed_arrays(rng, place, monkeypatch, names, used):
    arrays = packed_parts(rng)
    if not used:
        del arrays["seqused_k"]
    slopes = {"alibi_slopes": rng.uniform(0, 0.3, (3, 4)).astype(np.float32)}
    mapped, same = apart(names, arrays)
    maps(place, monkeypatch, "attention_varlen", mapped, same | slopes, causal=True, max_seqlen_q=9)


def test_vmap_of_packed_arrays_that_share_their_lengths(rng, place, monkeypatch):
    q, k, v = normal(rng, (3, 2, 9, 4, 32), "float32")
    mapped = {"q": q, "k": k, "v": v, "cu_seqlens_q": ints(0, 4, 8, 0, 9, 9).reshape(2, 3)}
    maps(place, monkeypatch, "attention_varlen", mapped, {}, window=(3, 0))


@pytest.mark.parametrize("pool", ["mapped", "shared"])
def test_vmap_of_paged_arrays(rng, place, monkeypatch, pool):
    k, v = normal(rng, (2, 2, 9, 4, 2, 32), "float32")
    table = np.stack([rng.permutation(9)[:6].reshape(2, 3) for _ in range(2)]).astype(np.int32)
    mapped = {"q": normal(rng, (2, 7, 4, 32), "float32"), "block_table": table}
    mapped |= {"cu_seqlens_q": ints(0, 3, 6, 0, 0, 7).reshape(2, 3), "seqused_k": ints(5, 12, 1, 9).reshape(2, 2)}
    same = {}
    if pool == "mapped":
        mapped |= {"k": k, "v": v}
    else:
        same = {"k": k[0], "v": v[0]}
    maps(place, monkeypatch, "attention_varlen", mapped, same, causal=True)


def cache_parts(rng, indexed):
    arrays = {"q": normal(rng, (3, 2, 2, 4, 32), "float32"), "cache_seqlens": ints(5, 9, 1, 14, 0, 3).reshape(3, 2)}
    caches = normal(rng, (2, 3, 4 if indexed else 2, 16, 2, 32), "float32")
    arrays |= {"k_cache": caches[0], "v_cache": caches[1], "cache_leftpad": ints(1, 0, 0, 4, 0, 3).reshape(3, 2)}
    if indexed:
        arrays["cache_batch_idx"] = np.stack([rng.permutation(4)[:2] for _ in range(3)]).astype(np.int32)
    return arrays


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("appends", [False, True])
def test_vmap_of_caches(rng, place, monkeypatch, indexed, shared, appends):
    arrays = cache_parts(rng, indexed)
    if appends:
        arrays |= dict(zip("kv", normal(rng, (2, 3, 2, 2, 2, 32), "float32"), strict=True))
    names = [name for name in arrays if not (shared and name in ("k_cache", "v_cache"))]
    mapped, same = apart(names, arrays)
    maps(place, monkeypatch, "attention_with_kvcache", mapped, same, causal=True)


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_of_paged_caches(rng, place, monkeypatch, shared, appends):
    k, v = normal(rng, (2, 3, 9, 4, 2, 32), "float32")
    mapped = {"q": normal(rng, (3, 2, 1, 4, 32), "float32"), "cache_seqlens": ints(5, 9, 1, 7, 0, 3).reshape(3, 2)}
    mapped["block_table"] = np.stack([rng.permutation(9)[:6].reshape(2, 3) for _ in range(3)]).astype(np.int32)
    if appends:
        mapped |= dict(zip("kv", normal(rng, (2, 3, 2, 1, 2, 32), "float32"), strict=True))
    same = {"k_cache": k[0], "v_cache": v[0]} if shared else {}
    mapped |= {} if shared else {"k_cache": k, "v_cache": v}
    maps(place, monkeypatch, "attention_with_kvcache", mapped, same)


def test_a_cache_that_is_only_read_is_not_repeated(rng):
    arrays = cache_parts(rng, False)
    mapped, same = apart(("q",), {name: arrays[name] for name in ("q", "k_cache", "v_cache")})
    text = str(jax.make_jaxpr(jax.vmap(lambda q: ours.attention_with_kvcache(q, **same)))(*mapped.values()))
    assert "3,2,16,2,32" not in text and "f32[6,16,2,32]" not in text


def test_vmap_in_vmap_over_other_axes(rng, place):
    q, k, v = normal(rng, (3, 2, 5, 3, 6, 4, 32), "float32")  # mapped, batch, mapped, seqlen
    call = jax.vmap(jax.vmap(partial(ours.attention, causal=True), in_axes=1, out_axes=1))
    out = np.asarray(jax.jit(call)(q, k, v))
    for i, j in np.ndindex(2, 3):
        own = (x[i, :, j] for x in (q, k, v))
        np.testing.assert_allclose(out[i, :, j], cupyattn.attention(*own, causal=True), atol=2e-5)


# --------------------------------------------------------------------------------------------------- shard_map

SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "{platform}"
import jax, numpy as np, cupyattn
from functools import partial
from jax.sharding import PartitionSpec as P
from cupyattn.integrations.jax import attention, attention_with_kvcache

rng = np.random.default_rng({seed})
normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
devices = len(jax.devices())
mesh = jax.make_mesh((2, devices // 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
heads = 2 * (devices // 2)
q, k, v = normal(4, 6, 2 * heads, 32), normal(4, 7, heads, 32), normal(4, 7, heads, 32)
cut = P("data", None, "heads")
for check in (True, False):
    local = jax.shard_map(partial(attention, causal=True, return_lse=True), mesh=mesh, in_specs=(cut,) * 3,
                          out_specs=(cut, P("data", "heads")), check_vma=check)
    out, lse = jax.jit(local)(q, k, v)
    assert len(out.sharding.device_set) == devices
    expected = cupyattn.attention(q, k, v, causal=True, return_lse=True)
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)

new = dict(k=normal(4, 1, heads, 32), v=normal(4, 1, heads, 32), cache_seqlens=np.array([2, 0, 6, 4], np.int32))
specs = dict(k=cut, v=cut, cache_seqlens=P("data"))
step = jax.shard_map(lambda q, k, v, new: attention_with_kvcache(q, k, v, **new), mesh=mesh,
                     in_specs=(cut, cut, cut, specs), out_specs=(cut,) * 3)
out, *caches = jax.jit(step, donate_argnums=(1, 2))(q[:, :1], jax.numpy.array(k), jax.numpy.array(v), new)
here = [k.copy(), v.copy()]
np.testing.assert_allclose(out, cupyattn.attention_with_kvcache(q[:, :1], *here, **new), atol=2e-5)
assert all(np.array_equal(one, other) for one, other in zip(caches, here))

# vmap inside: the mapped axis is not the divided one
inner = jax.shard_map(jax.vmap(attention), mesh=mesh, in_specs=(P(None, *cut),) * 3, out_specs=P(None, *cut))
np.testing.assert_allclose(jax.jit(inner)(q[None], k[None], v[None])[0], cupyattn.attention(q, k, v), atol=2e-5)

# A result differs from device to device where any argument does.
try:
    jax.shard_map(attention, mesh=mesh, in_specs=(P(), cut, cut), out_specs=P())(q[:2, :, :4], k, v)
except ValueError as error:
    print("refused:", "out_specs" in str(error))
print("done on", devices)
"""


def sharded(rng, platform):
    program = SHARDED.format(platform=platform, seed=int(rng.integers(2**31)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_heads_and_batch_divided_by_shard_map(rng):
    assert sharded(rng, "cpu").endswith("done on 4\n")


def test_a_result_that_differs_between_devices_is_not_taken_for_one(rng):
    assert "refused: True" in sharded(rng, "cpu")


@pytest.mark.gpu
def test_heads_and_batch_divided_among_gpus(rng):
    import cupy

    if cupy.cuda.runtime.getDeviceCount() not in (2, 4, 8) or jax.default_backend() != "gpu":
        pytest.skip("needs several GPUs and JAX for CUDA")
    assert "done on" in sharded(rng, "cuda")


# -------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: jax.grad(f),
        lambda f: jax.jit(jax.grad(f)),
        lambda f: jax.grad(jax.jit(f)),
        lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, x])),
        lambda f: lambda x: jax.jvp(f, (x,), (x,)),
        lambda f: lambda x: jax.vjp(f, x),
        lambda f: jax.grad(jax.checkpoint(f)),
    ],
    ids=["grad", "jit-grad", "grad-jit", "vmap-grad", "jvp", "vjp", "checkpoint"],
)
def test_gradients_are_refused_in_a_sentence(rng, transformed):
    q, k, v = dense_arrays(rng)
    call = transformed(lambda scale: ours.attention(q * scale, k, v).sum())
    with refused("q", "gradients are taken of", "no backward pass: jax.lax.stop_gradient", TypeError):
        call(1.0)


def test_gradients_name_the_argument(rng):
    q, *caches, new = step_arrays(rng)

    def total(x):
        out, *_ = ours.attention_with_kvcache(q, x * caches[0], caches[1], **new | {"v": x * new["v"]})
        return out.sum()

    with refused("k_cache, v", "gradients", "no backward pass", TypeError):
        jax.grad(total)(1.0)


def test_values_without_gradients_pass(rng):
    q, k, v = dense_arrays(rng)
    expected = cupyattn.attention(q, k, v)
    grad = jax.grad(lambda x: (ours.attention(*map(jax.lax.stop_gradient, (x * q, x * k, v))) * x).sum())(1.0)
    np.testing.assert_allclose(grad, expected.sum(), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- refusals


def test_shapes_that_are_not_static_are_refused(rng):
    q, k, v = dense_arrays(rng)
    shape = jax.export.symbolic_shape("2, seqlen, 4, 32")
    symbolic = jax.ShapeDtypeStruct(shape, np.float32)
    with refused("q", r"a shape that is not static: \(2, seqlen, 4, 32\)", "numbers alone"):
        jax.export.export(jax.jit(ours.attention))(symbolic, k, v)


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_traced_options_are_refused(rng, name):
    q, k, v = dense_arrays(rng)
    with refused(name, "a traced value", "a Python value, as options are static", TypeError):
        jax.jit(lambda x: ours.attention(q, k, v, **{name: x}))(0.5)


@pytest.mark.parametrize(
    "change, argument, came, expected, kind",
    [
        ({"q": [1.0]}, "q", "a list", "a JAX array", TypeError),
        ({"k": None}, "k", "None", "a JAX array", TypeError),
        ({"k": np.zeros((2, 7, 2, 16), np.float32)}, "k", "head_dim 16", "32", ValueError),
        ({"v": np.zeros((2, 7, 2, 32), np.float16)}, "v", "float16", "float32", TypeError),
        ({"window": "all"}, "window", "'all'", "two ints", TypeError),
        ({"window": [1, {}]}, "window", ".*", "two ints", TypeError),
        ({"softmax_scale": [1]}, "softmax_scale", r"\[1\]", "a number", TypeError),
        ({"kernel": "numpy_float64"}, "kernel", "'numpy_float64'", "auto", ValueError),
        ({"return_lse": "yes"}, "return_lse", "'yes'", "True, False, 'log2' or 'flash_attn'", TypeError),
        ({"sinks": np.zeros(3, np.float32)}, "sinks", r"shape \(3,\)", r"\(4,\)", ValueError),
    ],
)
def test_arguments_that_do_not_fit_are_refused_while_tracing(rng, change, argument, came, expected, kind):
    arrays = dict(zip("qkv", dense_arrays(rng), strict=True))
    with pytest.raises(kind, match=f"^{argument}: got .*{came}.*, expected .*{expected}"):
        ours.attention(**arrays | change)


def test_appends_that_do_not_fit_are_refused_while_tracing(rng):
    q, *caches, new = step_arrays(rng)
    with refused("cache_seqlens", "None", "how many tokens"):
        ours.attention_with_kvcache(q, *caches, k=new["k"], v=new["v"])
    with refused("cache_seqlens", "63 tokens plus 2 new", "64"):
        ours.attention_with_kvcache(q, *caches, **new | {"cache_seqlens": 63})
    packed = normal(rng, (9, 4, 32), "float32"), *normal(rng, (2, 15, 2, 32), "float32")
    with refused("cu_seqlens_k", "None", "k has 15 rows and q 9"):
        ours.attention_varlen(*packed, ints(0, 9))


def test_bad_contents_are_named_on_the_cpu(rng):
    with jax.default_device(jax.devices("cpu")[0]):
        q, k, v, ends, _ = packed_arrays(rng)
        with pytest.raises(Exception, match="cu_seqlens_k: got 99 as its last entry, expected at most 17"):
            jax.block_until_ready(ours.attention_varlen(q, k, v, ends, ints(0, 4, 6, 99)))


# --------------------------------------------------------------------------------------- dot_product_attention


def test_the_signature_is_that_of_jax():
    own, theirs = (inspect.signature(f).parameters for f in (ours.dot_product_attention, jax.nn.dot_product_attention))
    assert [(p.name, p.kind, p.default) for p in own.values()] == [(p.name, p.kind, p.default) for p in theirs.values()]


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("seqlens", [(7, 7), (1, 9), (7, 4), (4, 7)])
@pytest.mark.parametrize("masks", [{}, {"is_causal": True}, {"local_window_size": 3}, {"local_window_size": (8, 1)},
                                   {"is_causal": True, "local_window_size": (4, 2)}], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", ["", "q", "k", "qk"])
def test_as_jax_nn_dot_product_attention(rng, place, dtype, seqlens, masks, lengths):
    seqlen_q, seqlen_k = seqlens
    q, k, v = dense_arrays(rng, dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    options = masks | {"scale": 0.3, "return_residual": True}
    if "q" in lengths:
        options["query_seq_lengths"] = rng.integers(1, seqlen_q + 1, 2).astype(np.int32)
    if "k" in lengths:
        options["key_value_seq_lengths"] = rng.integers(1, seqlen_k + 4, 2).astype(np.int32)
    out, lse = ours.dot_product_attention(q, k, v, **options)
    exact = (x.astype(np.float32) for x in (q, k, v))
    expected, residual = (np.asarray(x) for x in jax.nn.dot_product_attention(*exact, **options))
    assert out.dtype == dtype and lse.dtype == dtype and out.shape == q.shape and lse.shape == residual.shape
    seen = residual > -1e30  # where jax.nn has a very low number, no key is seen
    tolerance = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    out, lse = (np.asarray(x, np.float32) for x in (out, lse))
    np.testing.assert_allclose(out[seen], expected[seen], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(lse[seen], residual[seen], atol=tolerance, rtol=tolerance)
    assert not out[~seen].any() and (lse[~seen] == -np.inf).all()


def test_without_a_batch(rng, place):
    q, k, v = (x[0] for x in dense_arrays(rng))
    with jax.default_matmul_precision("highest"):  # not TF32
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(ours.dot_product_attention(q, k, v, is_causal=True), expected, atol=2e-5)


def test_in_the_place_of_jax_nn_under_jit_and_vmap(rng, place):
    q, k, v = (normal(rng, (3, *x.shape), "float32") for x in dense_arrays(rng))
    lengths = ints(3, 7, 1, 2, 7, 4).reshape(3, 2)

    def call(function):
        one = partial(function, is_causal=True)
        return jax.jit(jax.vmap(lambda q, k, v, used: one(q, k, v, key_value_seq_lengths=used)))(q, k, v, lengths)

    with jax.default_matmul_precision("highest"):  # not TF32
        expected = call(jax.nn.dot_product_attention)
    np.testing.assert_allclose(call(ours.dot_product_attention), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_scores_given_as_arrays_are_refused_by_name(rng, name):
    array = np.ones((1, 1, 5, 7), bool if name == "mask" else np.float32)
    with refused(name, r"an array of shape \(1, 1, 5, 7\)", "None: the kernels read no .*key_value_seq_lengths"):
        ours.dot_product_attention(*dense_arrays(rng), **{name: array})


def test_complaints_are_in_the_words_of_the_signature(rng):
    q, k, v = dense_arrays(rng)
    with refused("key", "head_dim 16", "32, as in query"):
        ours.dot_product_attention(q, k[..., :16], v)
    with refused("scale", "'big'", "a number", TypeError):
        ours.dot_product_attention(q, k, v, scale="big")
    with refused("is_causal", "a traced value", "True or False, static", TypeError):
        jax.jit(lambda x: ours.dot_product_attention(q, k, v, is_causal=x))(True)
    with refused("key_value_seq_lengths", "float32", "int32", TypeError):
        ours.dot_product_attention(q, k, v, key_value_seq_lengths=np.ones(2, np.float32))
    with refused("local_window_size", "1 on the left with 9 queries and 7 keys", "at least 2"):
        ours.dot_product_attention(*dense_arrays(rng, seqlen_q=9), local_window_size=1)
    with refused("local_window_size", "-1", "at least 0"):
        ours.dot_product_attention(q, k, v, local_window_size=-1)
    with refused("implementation", "'mosaic'", "'cudnn'"):
        ours.dot_product_attention(q, k, v, implementation="mosaic")


@pytest.mark.parametrize("left", [-1, 0, 2, 6])
@pytest.mark.parametrize("right", [-1, 0, 1, 5])
def test_windows_from_the_top_left(left, right):
    for seqlen_q, seqlen_k in np.ndindex(7, 7):
        if 0 <= left < seqlen_q - seqlen_k:
            continue
        keys, (own_left, own_right) = from_top_left(seqlen_q, seqlen_k, left, right)
        assert own_left >= -1 and own_right >= -1
        i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
        wanted = (left < 0) | (j >= i - left)
        wanted &= (right < 0) | (j <= i + right)
        diagonal = i + keys - seqlen_q
        seen = (
            (j < keys) & ((own_left < 0) | (j >= diagonal - own_left)) & ((own_right < 0) | (j <= diagonal + own_right))
        )
        assert np.array_equal(seen, np.broadcast_to(wanted, seen.shape))


# --------------------------------------------------------------------------- launches, with a driver stood in for


class Buffer(np.ndarray):
    """A buffer of XLA's on a GPU: an object that holds its address. Nothing is there."""

    def __new__(cls, address, device=0):
        made = np.frombuffer((ctypes.c_char * 1).from_address(address), np.uint8).view(cls)
        made.address, made.gpu = address, device
        return made

    def __dlpack_device__(self):
        return 2, self.gpu

    def __repr__(self):
        return f"Buffer({self.address:#x}, {self.gpu})"


STEP = {"q": (4, 2, 8, 64), "k": (9, 16, 2, 64), "v": (9, 16, 2, 64), "k_new": (4, 2, 2, 64), "v_new": (4, 2, 2, 64)}
STEP |= {"seqused_k": (4,), "block_table": (4, 5)}
RESULTS = 0x8000000  # out, lse and the two caches, 1 MB apart


def step_callback(length=None):
    """The callback of a step over a paged cache, and its buffers: the i-th role lies at (i + 1) MB."""
    present = [role for role in ROLES if role in STEP and (length is None or role != "seqused_k")]
    arrays = tuple(
        Abstract(role, STEP[role], "int32" if role in ("seqused_k", "block_table") else "float16") for role in present
    )
    options = {"causal": True, "window": None, "softmax_scale": None, "softcap": None, "return_lse": True}
    options |= {"kernel": "auto"}
    form = Form("attention_with_kvcache", tuple(options.items()), tuple(map(type, options.values())), length, True)
    buffers = [Buffer((1 + ROLES.index(role)) << 20) for role in present]
    return calls.Callback(described(form, arrays)), buffers


def results_at(start):
    return tuple(Buffer(start + (i << 20)) for i in range(4))


@pytest.fixture(params=["read", "asked"])
def gpu(request, driver, monkeypatch):  # noqa: F811
    """A GPU that is not there, whose buffers' addresses are read where they are held, or are asked for."""
    monkeypatch.setattr(calls, "_by_asking", lambda buffers: tuple([buffer.address for buffer in buffers]))
    if request.param == "asked":
        monkeypatch.setattr(calls, "_word_of_address", lambda buffers: 0)
    monkeypatch.setattr(workspace, "outside_capture", nullcontext)
    calls._current_device.cache_clear()
    yield driver
    calls._current_device.cache_clear()


@pytest.mark.parametrize("length", [None, 7])
def test_a_callback_launches_what_a_plan_does(gpu, length):
    callback, buffers = step_callback(length)
    for _ in range(3):
        callback(SimpleNamespace(stream=5), results_at(RESULTS), *buffers)
    places = dict(zip([array.role for array in callback._described.arrays], buffers, strict=True))
    places |= dict(zip(("out", "lse", "k", "v"), results_at(RESULTS), strict=True))

    def given(role, dtype="float16"):
        return at_address(places[role].address, STEP.get(role, STEP["q"]), dtype)

    step = {"k": given("k_new"), "v": given("v_new"), "block_table": given("block_table", "int32")}
    step["cache_seqlens"] = given("seqused_k", "int32") if length is None else length
    arrays = given("q"), given("k"), given("v")
    plan = DecodePlan(*arrays, **step, causal=True, return_lse=True)
    plan._planned._quick.allocate = lambda size: at_address(places["lse"].address, (size,), "uint8").data
    gpu.stream = 5
    plan.run(*arrays, **step, out=given("out"))
    (form, stream, words), *again, expected = gpu.launches
    assert again == 2 * [(form, stream, words)]
    size = len(plan._planned._template.words)
    assert (form, stream, words[:size]) == (*expected[:2], expected[2][:size]) and stream == 5


def test_streams_and_captured_results_have_plans_of_their_own(gpu):
    callback, buffers = step_callback()

    def plans(stream, start, capturing=False):
        gpu.capturing = capturing
        callback(SimpleNamespace(stream=stream), results_at(start), *buffers)
        return len(callback._plans)

    assert [plans(5, RESULTS), plans(5, 2 * RESULTS), plans(6, RESULTS)] == [1, 1, 2]
    assert [plans(5, RESULTS, True), plans(5, RESULTS, True), plans(5, 2 * RESULTS, True)] == [3, 3, 4]
    assert [stream for _, stream, _ in gpu.launches] == [5, 5, 6, 5, 5, 5]
    assert len(workspace._kept) == 2  # those of the captures


def test_a_callback_launches_on_its_buffers_device(gpu):
    callback, _ = step_callback()
    buffers = [Buffer((1 + i) << 20, device=1) for i in range(len(STEP))]
    gpu.refuses = lambda: gpu.device != 1
    for gpu.device in (0, 1, 0):
        callback(SimpleNamespace(stream=5), results_at(RESULTS), *buffers)
    assert gpu.launches_on == [1, 1, 1] and len(callback._plans) == 1


def test_launches_of_known_addresses_are_made_again_at_once(gpu, request, monkeypatch):
    """Where addresses are read, nothing but the launches is done."""
    callback, buffers = step_callback()
    slow = []
    monkeypatch.setattr(
        calls.Callback, "_on_device", lambda self, *x, go=calls.Callback._on_device: slow.append(go(self, *x))
    )
    for _ in range(3):
        callback(SimpleNamespace(stream=5), results_at(RESULTS), *buffers)
    assert len(gpu.launches) == 3 and len(slow) == (1 if callback._word else 3)
    assert bool(callback._word) == ("read" in request.node.name)


def test_launches_of_a_plan_stay_together_among_threads(gpu):
    callback, buffers = step_callback()
    callback(SimpleNamespace(stream=5), results_at(RESULTS), *buffers)
    (plan,) = callback._plans.values()
    noted = []

    def launch(i, stream, location, extra):
        noted.append((threading.get_ident(), i))
        time.sleep(0.02)  # as the driver, who lets other threads go on

    plan._planned._launches = [partial(launch, i) for i in range(2)]
    plan._planned._template.firsts = [0, 0]
    callback._bound.clear()
    given = [(results_at((2 + i) * RESULTS), *buffers) for i in range(4)]
    threads = [threading.Thread(target=callback, args=(SimpleNamespace(stream=5), *each)) for each in 2 * given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(noted) == 16
    assert all(
        first == (second[0], 0) and second[1] == 1 for first, second in zip(noted[::2], noted[1::2], strict=True)
    )


def test_what_goes_wrong_in_a_launch_is_told(gpu):
    callback, buffers = step_callback()
    given = SimpleNamespace(stream=5), results_at(RESULTS), *buffers
    callback(*given)
    gpu.refuses = lambda: True
    with refused("stream", "a current stream that is not one of", "a stream that was made on"):
        callback(*given)
    gpu.refuses = lambda: False
    callback(*given)
    assert len(gpu.launches) == 2


def test_new_rows_without_a_query_are_launched_too(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(cupyattn.kernels.launch.PreparedAppend, "__call__", lambda self, *x: seen.append(x))
    monkeypatch.setitem(STEP, "q", (4, 0, 8, 64))
    callback, buffers = step_callback()
    callback(SimpleNamespace(stream=5), results_at(RESULTS), *buffers)
    ((operands, stream),) = seen
    assert stream == 5 and operands.k_cache.pointer == RESULTS + (2 << 20)
    assert operands.k.pointer == buffers[[a.role for a in callback._described.arrays].index("k_new")].address


def words_after(callback, results, buffers):
    """The arguments of the launches that a call makes."""
    callback(SimpleNamespace(stream=5), results, *buffers)
    addresses = tuple([buffer.address for buffer in (*buffers, *results)])
    return list(callback._bound[(5, *addresses)].memory.words)


def test_addresses_that_come_and_go_have_launches_of_their_own(gpu, monkeypatch):
    """As those of a callback of its own, and no more of them are kept than there is room for."""
    monkeypatch.setattr(calls, "_HELD", 8)
    callback, buffers = step_callback()
    seen = []
    turns = [(1, 2), (1, 3), (1, 2), (3, 2), (2, 1)] + [(1 + i % 11, 4 + i % 5) for i in range(60)]
    for queries, results in turns:
        buffers[0] = Buffer(queries * RESULTS)
        seen.append(words_after(callback, results_at(results * RESULTS), buffers))
        assert seen[-1] == words_after(step_callback()[0], results_at(results * RESULTS), buffers)
    assert len(set(map(tuple, seen))) == len(set(turns))
    assert len(callback._bound) == 8


def test_maps_are_those_of_the_addresses(gpu, monkeypatch):
    """Outputs alternate, and an input comes to lie where an output did."""
    made = []

    def encode(pointer, *form):
        made.append(pointer)
        return pointer.to_bytes(8, "little") * 16

    monkeypatch.setattr(cupyattn.kernels.launch, "encode", encode)
    shape, options = (1, 128, 8, 64), {"causal": True, "window": None, "softmax_scale": None, "softcap": None}
    options |= {"return_lse": False, "kernel": "auto"}
    form = Form("attention", tuple(options.items()), tuple(map(type, options.values())), None, False)
    callback = calls.Callback(described(form, tuple(Abstract(role, shape, "float16") for role in "qkv")))
    for *inputs, out in ((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4), (5, 2, 3, 4), (5, 4, 3, 2)):
        places = [one << 20 for one in (*inputs, out)]
        words = words_after(callback, (Buffer(places[3]),), [Buffer(place) for place in places[:3]])
        maps = [[place] * 16 for place in places]
        assert any(words[i : i + 64] == sum(maps, []) for i in range(len(words)))
    assert len(made) == 8  # once for each array at each address


def test_addresses_are_those_of_xlas_buffers(rng):
    """On the CPU, where NumPy tells them too."""
    seen = []

    def look(context, results, *arrays):
        buffers = results + arrays
        word = calls._word_of_address(buffers)
        held = [calls._words[id(buffer) // 8 + word] for buffer in buffers]
        seen.append((list(calls._by_asking(buffers)), held, [np.asarray(buffer).ctypes.data for buffer in buffers]))
        np.asarray(results[0])[...] = np.asarray(arrays[0])

    with jax.default_device(jax.devices("cpu")[0]):
        x, y = (jnp.asarray(normal(rng, (3, 5), "bfloat16")) for _ in "xy")
        made = calls.buffer_callback(look, (jax.ShapeDtypeStruct(x.shape, x.dtype),))(x, y)
        jax.block_until_ready(made)
    ((asked, held, expected),) = seen
    assert asked == held == expected and len(set(asked)) == 3


def test_buffers_that_do_not_hold_their_address_are_asked():
    class Foreign:
        def __init__(self):
            self.array = np.ones(3)

        def __dlpack__(self):
            return self.array.__dlpack__()

    buffers = tuple(Foreign() for _ in range(3))
    assert calls._word_of_address(buffers) == 0
    assert calls._by_asking(buffers) == tuple([buffer.array.ctypes.data for buffer in buffers])
