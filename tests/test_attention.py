"""The public functions as their callers meet them: arrays of every library, in-place appends, refusals that change
nothing, `out`, `check`, and how a call is prepared, ordered and launched. Numbers are the business of test_forward.

What concerns CUDA runs without a device on CuPy arrays over addresses that nobody reads, with stand-ins for the
runtime and the launchers (see test_arrays); tests marked `gpu` use real devices.
"""

from __future__ import annotations

import doctest
import re
import sys
import time
import types

import ml_dtypes
import numpy as np
import pytest
from test_arrays import Elsewhere, Foreign, Runtime, at_address, in_library

import cupyattn
import cupyattn.kernels.launch
from cupyattn import append_kv, arrays, attention, attention_varlen, attention_with_kvcache

module = sys.modules["cupyattn.attention"]  # the attribute of that name is the function

FLOATS = ("float16", "bfloat16", "float32")
LIBRARIES = ("numpy", "torch", "jax")


def ints(*values):
    return np.array(values, np.int32)


def normal(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape).astype(np.dtype(dtype))


def plain(q, k, v, causal=False):
    """Attention of one dense batch in float64, one head at a time."""
    out = np.zeros(q.shape)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        head = h * k.shape[2] // q.shape[2]
        scores = q[b, :, h].astype(float) @ k[b, :, head].astype(float).T / np.sqrt(q.shape[-1])
        if causal:
            hidden = np.triu(np.ones_like(scores, bool), 1 + k.shape[1] - q.shape[1])
            scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, head].astype(float)
    return out


def to_numpy(array):
    return arrays.host_array(arrays.view(array)).astype(np.float64)


def close(array, expected, dtype="float32"):
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(to_numpy(array), expected, atol=tolerance, rtol=tolerance)


def refused(argument, came, expected, kind=ValueError):
    return pytest.raises(kind, match=f"^{argument}: got .*{came}.*, expected .*{expected}")


# ------------------------------------------------------------------------------- the caller's own library back


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_dense_arrays_of_every_library(rng, library, dtype):
    q, k, v = normal(rng, 2, 3, 4, 16, dtype=dtype), *normal(rng, 2, 2, 5, 2, 16, dtype=dtype)
    given = [in_library(library, array) for array in (q, k, v)]
    out, lse = attention(*given, causal=True, return_lse=True)
    assert type(out) is type(lse) is type(given[0])
    assert out.dtype == given[0].dtype and arrays.view(lse).dtype == "float32" and tuple(lse.shape) == (2, 4, 3)
    close(out, plain(q, k, v, causal=True), dtype)


@pytest.mark.parametrize("library", LIBRARIES)
def test_packed_arrays_of_every_library(rng, library):
    q, k, v = normal(rng, 7, 4, 16), *normal(rng, 2, 9, 2, 16)
    given = [in_library(library, array) for array in (q, k, v, ints(0, 3, 7), ints(0, 4, 9))]
    out, lse = attention_varlen(*given, return_lse=True)
    assert type(out) is type(lse) is type(given[0]) and tuple(lse.shape) == (4, 7)
    close(out[:3], plain(q[None, :3], k[None, :4], v[None, :4])[0])
    close(out[3:], plain(q[None, 3:], k[None, 4:], v[None, 4:])[0])


@pytest.mark.parametrize("library", LIBRARIES)
def test_caches_of_every_library_can_be_read(rng, library):
    q, caches = normal(rng, 2, 1, 4, 16), normal(rng, 2, 2, 8, 2, 16)
    given = [in_library(library, array) for array in (q, *caches)]
    out = attention_with_kvcache(*given, cache_seqlens=in_library(library, ints(5, 5)))
    assert type(out) is type(given[0])
    close(out, plain(q, *caches[:, :, :5]))
    close(attention_with_kvcache(*given, cache_seqlens=5), plain(q, *caches[:, :, :5]))
    close(attention_with_kvcache(*given), plain(q, *caches))


def test_objects_of_unknown_libraries(rng):
    q, k, v = normal(rng, 1, 3, 2, 8), *normal(rng, 2, 1, 5, 2, 8)
    close(attention(Foreign(q), Foreign(k), v), plain(q, k, v))


def test_libraries_may_be_mixed_and_the_queries_library_comes_back(rng):
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    q, k, v = normal(rng, 1, 3, 2, 8), *normal(rng, 2, 1, 5, 2, 8)
    assert type(attention(torch.from_numpy(q), jnp.asarray(k), v)) is torch.Tensor
    out = attention(jnp.asarray(q), torch.from_numpy(k), Foreign(v))
    assert type(out) is type(jnp.ones(1))
    close(out, plain(q, k, v))


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_strided_views_are_used_where_they_lie(rng, library, monkeypatch):
    qkv = normal(rng, 2, 6, 3, 4, 16)
    given = in_library(library, qkv)
    q, k, v = given[:, ::2, 0], given[:, :, 1], given[:, :, 2]
    seen = []
    import cupyattn.reference

    forward = cupyattn.reference.forward
    monkeypatch.setattr(cupyattn.reference, "forward", lambda p, o, **kw: seen.append(o) or forward(p, o, **kw))
    module.remembered.clear()
    out = attention(q, k, v)
    close(out, plain(qkv[:, ::2, 0], qkv[:, :, 1], qkv[:, :, 2]))
    assert [found.pointer - qkv.ctypes.data for found in (seen[0].q, seen[0].k, seen[0].v)] == [0, 256, 512]
    module.remembered.clear()


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_to_do(library):
    def zeros(*shape, dtype=np.float16):
        return in_library(library, np.zeros(shape, dtype))

    out, lse = attention(zeros(0, 3, 4, 8), zeros(0, 5, 4, 8), zeros(0, 5, 4, 8), return_lse=True)
    assert tuple(out.shape) == (0, 3, 4, 8) and tuple(lse.shape) == (0, 4, 3)
    out, lse = attention(zeros(2, 0, 4, 8), zeros(2, 5, 4, 8), zeros(2, 5, 4, 8), return_lse=True)
    assert tuple(out.shape) == (2, 0, 4, 8) and tuple(lse.shape) == (2, 4, 0)
    out, lse = attention(zeros(2, 3, 4, 8), zeros(2, 0, 4, 8), zeros(2, 0, 4, 8), return_lse=True)
    assert (to_numpy(out) == 0).all() and (to_numpy(lse) == -np.inf).all()
    nobody = in_library(library, ints(0))
    out, lse = attention_varlen(*[zeros(3, 4, 8)] * 3, nobody, nobody, return_lse=True)
    assert (to_numpy(out) == 0).all() and (to_numpy(lse) == -np.inf).all() and tuple(lse.shape) == (4, 3)


@pytest.mark.parametrize("form", [np.True_, 1, "log2", np.str_("log2"), "flash_attn"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_forms_of_the_lse(library, form):
    """Three queries of zeros over two keys: the first sees none, the others one and two."""
    q, k = (in_library(library, np.zeros(shape, np.float16)) for shape in ((1, 3, 4, 8), (1, 2, 4, 8)))
    out, lse = attention(q, k, k, causal=True, return_lse=form)
    assert type(lse) is type(q) and arrays.view(lse).dtype == "float32"
    seen = [0, 1] if form == "log2" else [0, np.log(2)]
    close(lse, np.broadcast_to([np.inf if form == "flash_attn" else -np.inf, *seen], (1, 4, 3)))
    nobody = in_library(library, ints(0))
    out, lse = attention_varlen(q[0], q[0], q[0], nobody, nobody, return_lse=form)
    assert (to_numpy(out) == 0).all() and (to_numpy(lse) == (np.inf if form == "flash_attn" else -np.inf)).all()


def test_forms_of_the_lse_in_float64(rng):
    q, k, v = normal(rng, 1, 3, 2, 8), *normal(rng, 2, 1, 2, 2, 8)
    options = {"causal": True, "kernel": "numpy_float64"}
    natural, base2 = (attention(q, k, v, **options, return_lse=form)[1] for form in (True, "log2"))
    assert base2.dtype == np.float64 and (base2[..., 0] == -np.inf).all()
    np.testing.assert_allclose(base2[..., 1:], natural[..., 1:] / np.log(2), rtol=1e-15)


def test_float64_on_the_cpu(rng):
    q, k, v = normal(rng, 1, 3, 2, 8), *normal(rng, 2, 1, 5, 2, 8)
    out, lse = attention(q, k, v, kernel="numpy_float64", return_lse=True)
    assert out.dtype == lse.dtype == np.float64
    np.testing.assert_allclose(out, plain(q, k, v), rtol=1e-13, atol=1e-14)
    given = np.empty(q.shape)
    assert attention(q, k, v, kernel="numpy_float64", out=given) is given
    with refused("out", "float32", "float64", TypeError):
        attention(q, k, v, kernel="numpy_float64", out=np.empty_like(q))
    torch = pytest.importorskip("torch")
    assert attention(*map(torch.from_numpy, (q, k, v)), kernel="numpy_float64").dtype == torch.float64


def test_float64_from_jax_needs_jaxs_leave(rng):
    jax = pytest.importorskip("jax")
    q = jax.numpy.ones((1, 3, 2, 8))
    with refused("kernel", "'numpy_float64' with JAX arrays", "jax_enable_x64"):
        attention(q, q, q, kernel="numpy_float64")
    jax.config.update("jax_enable_x64", True)
    try:
        assert attention(q, q, q, kernel="numpy_float64").dtype == np.float64
    finally:
        jax.config.update("jax_enable_x64", False)


def test_one_packed_array_can_be_its_own_keys(rng):
    x, cu_seqlens = normal(rng, 7, 2, 8), ints(0, 3, 7)
    np.testing.assert_array_equal(
        attention_varlen(x, x, x, cu_seqlens), attention_varlen(x, x, x, cu_seqlens, cu_seqlens)
    )
    with refused("cu_seqlens_k", "None", "k has 6 rows and q 7"):
        attention_varlen(x, x[:6], x[:6], cu_seqlens)


def test_hints_change_nothing_but_the_work(rng):
    x, cu_seqlens = normal(rng, 7, 2, 8), ints(0, 3, 7)
    hinted = attention_varlen(x, x, x, cu_seqlens, cu_seqlens, max_seqlen_q=4, max_seqlen_k=4)
    np.testing.assert_array_equal(hinted, attention_varlen(x, x, x, cu_seqlens, cu_seqlens))


# ------------------------------------------------------------------------------------------------------- append


def paged(dense, block_size, layout, rng):
    """The same cache in pages: (blocks of k, blocks of v, table), the blocks in random order."""
    _, batch, capacity, heads, width = dense.shape
    columns = capacity // block_size
    table = rng.permutation(batch * columns).reshape(batch, columns).astype(np.int32)
    blocks = np.empty((2, batch * columns, block_size, heads, width), dense.dtype)
    blocks[:, table] = dense.reshape(2, batch, columns, block_size, heads, width)
    return (*(np.ascontiguousarray(b.swapaxes(1, 2)) if layout == "HND" else b for b in blocks), table)


def dense_again(k_blocks, v_blocks, table, layout):
    blocks = [b.swapaxes(1, 2) if layout == "HND" else b for b in (k_blocks, v_blocks)]
    return np.stack([b[table].reshape(table.shape[0], -1, *b.shape[2:]) for b in blocks])


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("layout", ["dense", "NHD", "HND"])
@pytest.mark.parametrize("seqlen_new", [1, 3])
def test_new_rows_are_appended_in_place_and_attended_to(rng, library, layout, seqlen_new):
    held = normal(rng, 2, 3, 12, 2, 8)
    q, new, lengths = normal(rng, 3, seqlen_new, 4, 8), normal(rng, 2, 3, seqlen_new, 2, 8), ints(0, 9, 4)
    expected = held.copy()
    for b, length in enumerate(lengths):
        expected[:, b, length : length + seqlen_new] = new[:, b]
    options = {}
    if layout == "dense":
        caches = held.copy()
    else:
        *caches, table = paged(held, 4, layout, rng)
        options = {"block_table": in_library(library, table), "layout": layout}
    given = [in_library(library, array) for array in (q, *caches)]
    k, v, cache_seqlens = (in_library(library, array) for array in (*new, lengths))

    out = attention_with_kvcache(*given, k=k, v=v, cache_seqlens=cache_seqlens, causal=True, **options)

    written = np.stack(caches) if layout == "dense" else dense_again(*caches, table, layout)
    np.testing.assert_array_equal(written, expected)
    assert to_numpy(cache_seqlens).tolist() == [0, 9, 4]
    for b, length in enumerate(lengths):
        keys = expected[:, b : b + 1, : length + seqlen_new]
        close(out[b : b + 1], plain(q[b : b + 1], *keys, causal=True))


def test_an_int_length_holds_for_all_sequences(rng):
    caches, q, new = normal(rng, 2, 2, 8, 2, 8), normal(rng, 2, 1, 2, 8), normal(rng, 2, 2, 1, 2, 8)
    again = caches.copy()
    out = attention_with_kvcache(q, *caches, k=new[0], v=new[1], cache_seqlens=np.int64(7))
    expected = attention_with_kvcache(q, *again, k=new[0], v=new[1], cache_seqlens=ints(7, 7))
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(caches, again)


def test_an_append_to_chosen_entries(rng):
    caches, q, new = np.zeros((2, 5, 8, 2, 8), np.float32), normal(rng, 2, 1, 2, 8), normal(rng, 2, 2, 1, 2, 8)
    attention_with_kvcache(q, *caches, k=new[0], v=new[1], cache_seqlens=ints(1, 2), cache_batch_idx=ints(4, 0))
    assert [tuple(int(i) for i in place) for place in np.argwhere(caches[0].any(axis=(2, 3)))] == [(0, 2), (4, 1)]
    np.testing.assert_array_equal(caches[:, [4, 0], [1, 2]], new[:, :, 0])


def test_rows_are_appended_though_there_is_no_query(rng):
    caches, new = np.zeros((2, 1, 8, 2, 8), np.float32), normal(rng, 2, 1, 2, 2, 8)
    out = attention_with_kvcache(np.zeros((1, 0, 2, 8), np.float32), *caches, k=new[0], v=new[1], cache_seqlens=3)
    assert out.shape == (1, 0, 2, 8)
    np.testing.assert_array_equal(caches[:, 0, 3:5], new[:, 0])
    nobody = np.zeros((0, 1, 2, 8), np.float32)
    attention_with_kvcache(nobody, *caches[:, :0], k=nobody, v=nobody, cache_seqlens=0)


def test_jax_queries_over_a_cache_that_can_be_written(rng):
    jnp = pytest.importorskip("jax.numpy")
    caches, q, new = normal(rng, 2, 1, 8, 2, 8), normal(rng, 1, 1, 2, 8), normal(rng, 2, 1, 1, 2, 8)
    out = attention_with_kvcache(
        jnp.asarray(q), *caches, k=jnp.asarray(new[0]), v=jnp.asarray(new[1]), cache_seqlens=jnp.asarray(ints(4))
    )
    assert type(out) is type(jnp.ones(1))
    np.testing.assert_array_equal(caches[:, 0, 4], new[:, 0, 0])
    close(out, plain(q, *caches[:, :, :5]))


def test_jax_caches_cannot_be_written():
    jnp = pytest.importorskip("jax.numpy")
    cache, new = jnp.zeros((1, 8, 2, 8)), jnp.zeros((1, 1, 2, 8))
    with refused("k_cache", "a JAX array, and JAX arrays are immutable", "a NumPy array on the CPU"):
        append_kv(cache, cache, new, new)
    with refused("k_cache", "immutable", "in place"):
        attention_with_kvcache(new, cache, cache, k=new, v=new, cache_seqlens=0)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_append_packed_rows(rng, library, dtype):
    caches = np.zeros((2, 2, 8, 2, 8), np.dtype(dtype))
    new = normal(rng, 2, 5, 2, 8, dtype=dtype)
    given = [in_library(library, array) for array in (*caches, *new)]
    options = {"cu_seqlens_new": ints(0, 4, 5), "cache_seqlens": ints(2, 7)}
    append_kv(*given, **{name: in_library(library, values) for name, values in options.items()})
    np.testing.assert_array_equal(caches[:, 0, 2:6], new[:, :4])
    np.testing.assert_array_equal(caches[:, 1, 7], new[:, 4])
    assert np.count_nonzero(caches.any(axis=(0, 3, 4))) == 5


def test_append_without_lengths_fills_from_the_start(rng):
    caches, new = np.zeros((2, 2, 8, 2, 8), np.float32), normal(rng, 2, 2, 3, 2, 8)
    append_kv(*caches, *new)
    np.testing.assert_array_equal(caches[:, :, :3], new)
    append_kv(*caches, *new, cache_seqlens=5)
    np.testing.assert_array_equal(caches[:, :, 5:], new)


def test_append_packed_rows_behind_an_int_length(rng):
    caches, new = np.zeros((2, 2, 8, 2, 8), np.float32), normal(rng, 2, 3, 2, 8)
    append_kv(*caches, *new, cache_seqlens=6, cu_seqlens_new=ints(0, 1, 3))
    np.testing.assert_array_equal(caches[:, 1, 6:], new[:, 1:])
    with refused("cache_seqlens", "7 tokens for sequence 1 plus 2 new", "at most the 8"):
        append_kv(*caches, *new, cache_seqlens=7, cu_seqlens_new=ints(0, 1, 3))


# ---------------------------------------------------------------------- refusals, which leave everything as it was

CACHE = (2, 8, 2, 8)  # (entries, capacity, kv_heads, head_dim)
BAD_STEPS = [
    ({"k": None}, "k", "None", "k and v together"),
    ({"v": None}, "v", "None", "k and v together"),
    ({"cache_seqlens": None}, "cache_seqlens", "None", "how many tokens each sequence holds"),
    ({"cache_seqlens": 8}, "cache_seqlens", "8 tokens plus 1 new", "at most the 8 that its rows hold"),
    ({"cache_seqlens": -1}, "cache_seqlens", "-1", "a length of at least 0"),
    ({"cache_seqlens": 2**40}, "cache_seqlens", f"{2**40} tokens", "at most the 8"),
    ({"cache_seqlens": True}, "cache_seqlens", "True", "an int, or an int32 array", TypeError),
    ({"cache_seqlens": 3.0}, "cache_seqlens", "3.0", "an int, or an int32 array", TypeError),
    ({"cache_seqlens": ints(3, 8)}, "cache_seqlens", "8 tokens for sequence 1 plus 1 new", "at most the 8"),
    ({"cache_seqlens": ints(-1, 3)}, "cache_seqlens", "-1 for sequence 0", "at least 0"),
    ({"cache_seqlens": ints(3)}, "cache_seqlens", r"shape \(1,\)", r"\(2,\)"),
    ({"cache_seqlens": np.array([3, 3])}, "cache_seqlens", "int64", "int32", TypeError),
    ({"cache_batch_idx": ints(0, 2)}, "cache_batch_idx", "2 for sequence 1", "0 to 1"),
    ({"cache_batch_idx": ints(1, 1)}, "cache_batch_idx", "the same cache entry twice", "distinct entries"),
    ({"cache_leftpad": ints(9, 0)}, "cache_leftpad", "9 for sequence 0", "0 to its length 4"),
    ({"k": np.ones((2, 1, 2, 8), np.float16)}, "k", "float16", "q's dtype float32", TypeError),
    ({"v": np.ones((2, 1, 2, 8), np.float16)}, "v", "float16", "q's dtype float32", TypeError),
    ({"k": np.ones((2, 2, 8), np.float32)}, "k", "3-D", r"4-D \(batch, seqlen_new, kv_heads, head_dim\)"),
    ({"k": np.ones((3, 1, 2, 8), np.float32)}, "k", "batch 3", "q's batch 2"),
    ({"k": np.ones((2, 2, 2, 8), np.float32)}, "v", r"\(2, 1, 2, 8\)", r"k's shape \(2, 2, 2, 8\)"),
    ({"k": [1.0]}, "k", "a list", "an array of NumPy, CuPy, PyTorch or JAX", TypeError),
    ({"q": np.ones((2, 1, 3, 8), np.float32)}, "k_cache", "2 heads where q has 3", "divides q's heads"),
    ({"q": np.ones((3, 1, 2, 8), np.float32)}, "k_cache", "batch 2", "q's batch 3"),
    ({"q": np.ones((2, 1, 2, 8), np.float64)}, "q", "float64", "float16 or", TypeError),
    ({"q": np.float32(1)}, "q", "a float32", "an array of NumPy", TypeError),
    ({"layout": "HND"}, "layout", "'HND' without block_table", "'NHD'"),
    ({"window": (-2, 0)}, "window", r"\(-2, 0\)", "-1"),
    ({"softmax_scale": float("nan")}, "softmax_scale", "nan", "finite"),
    ({"softmax_scale": [1.0]}, "softmax_scale", r"\[1.0\]", "a number", TypeError),
    ({"kernel": "forward_sm80"}, "kernel", "'forward_sm80'", "auto, numpy, numpy_float64 for arrays on cpu"),
    ({"kernel": None}, "kernel", "None", "one of auto, numpy"),
    ({"check": "yes"}, "check", "'yes'", "True, False or None", TypeError),
    ({"out": np.ones((2, 1, 2, 4), np.float32)}, "out", r"\(2, 1, 2, 4\)", "q's shape"),
    ({"sinks": np.ones(2)}, "sinks", "float64", "float32", TypeError),
]


@pytest.mark.parametrize("case", BAD_STEPS, ids=lambda case: f"{case[1]}: {case[2]}")
def test_a_refused_step_changes_nothing(case):
    changes, argument, came, expected, *kind = case
    caches = np.zeros((2, *CACHE), np.float32)
    new = np.ones((2, 2, 1, 2, 8), np.float32)
    good = {"q": np.ones((2, 1, 2, 8), np.float32), "k": new[0], "v": new[1], "cache_seqlens": 3}
    options = good | changes
    with refused(argument, came, expected, *kind):
        attention_with_kvcache(options.pop("q"), *caches, **options)
    assert not caches.any()
    attention_with_kvcache(good.pop("q"), *caches, **good)
    assert caches.any()


def test_a_bad_block_is_refused_before_anything_is_written():
    blocks, new = np.zeros((2, 6, 4, 2, 8), np.float32), np.ones((2, 2, 1, 2, 8), np.float32)
    options = {"k": new[0], "v": new[1], "cache_seqlens": ints(1, 5)}
    with refused("block_table", r"block 6 at \[1, 1\]", "0 to 5"):
        attention_with_kvcache(new[0], *blocks, block_table=ints([0, 1], [2, 6]), **options)
    with refused("block_table", r"block -1 at \[1, 0\]", "0 to 5"):  # not written to, but read
        attention_with_kvcache(new[0], *blocks, block_table=ints([0, 1], [-1, 2]), **options)
    with refused("block_table", "written twice", "a block of its own"):
        options["cache_seqlens"] = ints(1, 1)
        attention_with_kvcache(new[0], *blocks, block_table=ints([3, 0], [3, 0]), **options)
    assert not blocks.any()


def test_read_only_caches_are_refused_whole():
    caches, new = np.zeros((2, *CACHE), np.float32), np.ones((2, 2, 1, 2, 8), np.float32)
    append_kv(*caches, *new)
    caches[:] = 0
    v_cache = caches[1].view()
    v_cache.flags.writeable = False
    with refused("v_cache", "a read-only numpy array", "a writable one"):
        append_kv(caches[0], v_cache, *new)
    with refused("v_cache", "a read-only numpy array", "a writable one"):
        attention_with_kvcache(new[0], caches[0], v_cache, k=new[0], v=new[1], cache_seqlens=0)
    assert not caches.any()
    attention_with_kvcache(new[0], caches[0], v_cache, cache_seqlens=1)


def test_one_cache_cannot_take_both():
    cache, new = np.zeros(CACHE, np.float32), np.ones((2, 1, 2, 8), np.float32)
    with refused("v_cache", "overlaps k_cache in memory", "a cache of its own"):
        append_kv(cache, cache, new, new)
    assert not cache.any()


def caches_within(shape, *views):
    """Writable caches cut from one array."""
    room = np.zeros(shape, np.float32)
    return room, [cut(room) for cut in views]


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        ((2, 2, 8, 2, 8), lambda c: c[:, 0], lambda c: c[:, 1]),
        ((2, 2, 8, 2, 8), lambda c: c[:, 1], lambda c: c[:, 0]),
        ((2, 8, 2, 2, 8), lambda c: c[:, :, 0], lambda c: c[:, :, 1]),
        ((2, 8, 2, 16), lambda c: c[..., :8], lambda c: c[..., 8:]),
        ((2, 16, 2, 8), lambda c: c[:, ::2], lambda c: c[:, 1::2]),
        ((2, 8, 4, 8), lambda c: c[:, :, :2], lambda c: c[:, :, 2:]),
    ],
)
def test_caches_may_interleave(shape, first, second):
    room, caches = caches_within(shape, first, second)
    new = np.ones((2, 2, 1, 2, 8), np.float32)
    append_kv(*caches, new[0], 2 * new[1], cache_seqlens=3)
    assert (caches[0][:, 3] == 1).all() and (caches[1][:, 3] == 2).all() and room.sum() == 3 * new[0].size


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [
        ((2, 8, 2, 8), lambda c: c, lambda c: c[:, ::-1]),
        ((2, 8, 2, 8), lambda c: c, lambda c: c[::-1]),
        ((2, 9, 2, 8), lambda c: c[:, 1:], lambda c: c[:, :-1]),
        ((2, 8, 3, 8), lambda c: c[:, :, 1:], lambda c: c[:, :, :-1]),
    ],
)
def test_caches_that_share_rows_are_refused(shape, first, second):
    room, caches = caches_within(shape, first, second)
    new = np.ones((2, 2, 1, 2, 8), np.float32)
    for _ in range(2):
        with refused("v_cache", "overlaps k_cache in memory", "a cache of its own"):
            append_kv(*caches, *new, cache_seqlens=3)
    with refused("v_cache", "overlaps k_cache in memory", "a cache of its own"):
        attention_with_kvcache(new[0], *caches, k=new[0], v=new[1], cache_seqlens=3)
    with refused("v_cache", "overlaps k_cache in memory", "a cache of its own"):
        cupyattn.explain(new[0], *caches, k=new[0], v=new[1], cache_seqlens=3)
    assert not room.any()


def test_new_rows_among_a_caches_are_refused():
    caches, new = np.zeros((2, *CACHE), np.float32), np.ones((2, 2, 1, 2, 8), np.float32)
    append_kv(*caches, *new)
    caches[:] = 0
    for cache, name in zip(caches, ("k_cache", "v_cache"), strict=True):
        with refused("k", f"meets {name}'s", "memory of its own"):
            append_kv(*caches, cache[:, 2:3], new[1])
        with refused("v", f"meets {name}'s", "memory of its own"):
            append_kv(*caches, new[0], cache[:, 2:3])
    with refused("v", "meets k_cache's", "memory of its own"):
        attention_with_kvcache(new[0], *caches, k=new[0], v=caches[0][:, :1], cache_seqlens=1)
    assert not caches.any()


def misaligned(array, offset=1):
    """A copy of array that begins `offset` bytes behind an element's boundary."""
    room = np.zeros(array.nbytes + 32, np.uint8)
    start = -room.ctypes.data % 16 + offset
    made = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def test_misaligned_arrays_are_refused_though_the_form_is_known():
    x, cu_seqlens = np.ones((7, 2, 8), np.float32), ints(0, 3, 7)
    slopes = np.ones(2, np.float32)
    good = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "seqused_k": ints(3, 4)}
    good |= {"alibi_slopes": slopes, "sinks": slopes, "out": np.empty_like(x)}
    attention_varlen(**good)
    for name, array in good.items():
        with refused(name, "a misaligned array", "divisible by the 4 bytes"):
            attention_varlen(**good | {name: misaligned(array)})
    caches, new = np.zeros((2, *CACHE), np.float32), np.ones((2, 2, 1, 2, 8), np.float32)
    append_kv(*caches, *new, cache_seqlens=ints(0, 0))
    with refused("cache_seqlens", "a misaligned array", "divisible by the 4 bytes"):
        append_kv(*caches, *new, cache_seqlens=misaligned(ints(0, 0)))
    with refused("v_cache", "a misaligned array", "divisible by the 4 bytes"):
        append_kv(caches[0], misaligned(caches[1]), *new, cache_seqlens=ints(0, 0))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"softmax_scale": 1.0}, {"softmax_scale": True}),
        ({"softcap": 1.0}, {"softcap": True}),
        ({"causal": True}, {"causal": 1.0}),
        ({"return_lse": False}, {"return_lse": 0.0}),
        ({"return_lse": "log2"}, {"return_lse": "LOG2"}),
        ({"return_lse": "log2"}, {"return_lse": ["log2"]}),
        ({"window": (1, 0)}, {"window": (1.0, 0)}),
        ({"window": [1, 0]}, {"window": [1.0, 0]}),
    ],
    ids=str,
)
def test_equal_options_of_another_type_are_still_refused(good, bad):
    x = np.ones((1, 1, 1, 8), np.float32)
    for _ in range(2):
        attention(x, x, x, **good)
        with pytest.raises(TypeError, match=f"^{next(iter(bad))}: got "):
            attention(x, x, x, **bad)


def test_packed_queries_over_dense_keys_are_refused():
    q, k, cu_seqlens = np.ones((7, 2, 8), np.float32), np.ones((2, 7, 2, 8), np.float32), ints(0, 3, 7)
    with refused("k", "4-D shape", "3-D packed .total_k, kv_heads, head_dim., or block_table for a paged cache"):
        attention_varlen(q, k, k, cu_seqlens)


def test_complaints_say_what_to_do():
    q, caches = np.ones((2, 1, 2, 8), np.float32), np.ones((2, 6, 8, 2, 8), np.float32)
    with refused(
        "k_cache", "batch 6", "q's batch 2; for a paged cache pass block_table, for a larger .*cache_batch_idx"
    ):
        attention_with_kvcache(q, *caches)
    with refused("cache_batch_idx", "a list", r"np.asarray\(cache_batch_idx, np.int32\)", TypeError):
        attention_with_kvcache(q, *caches, cache_batch_idx=[0, 1])
    with refused("cache_seqlens", "5.0", "an int, or an int32 array", TypeError):
        attention_with_kvcache(q, *caches[:, :2], cache_seqlens=5.0)
    x = np.ones((7, 2, 8), np.float32)
    with refused("cu_seqlens_q", "3 as its first entry", r"0: cumulative lengths, as in \[0, 4, 10\]"):
        attention_varlen(x, x, x, ints(3, 4))


# ------------------------------------------------------------------------------------------------- RaggedArray


@pytest.mark.parametrize("library", LIBRARIES)
def test_ragged_arrays_bring_their_lengths(rng, library):
    q, k, v = normal(rng, 7, 4, 16), *normal(rng, 2, 9, 2, 16)
    given = [in_library(library, array) for array in (q, k, v)]
    ends_q, ends_k = [0, 3, 7], [0, 4, 9]
    ragged_q, ragged_k = cupyattn.RaggedArray(given[0], ends_q), cupyattn.RaggedArray(given[1], ends_k)
    expected = to_numpy(attention_varlen(*(q, k, v), ints(*ends_q), ints(*ends_k), causal=True))
    out, lse = attention_varlen(ragged_q, ragged_k, ragged_k.with_values(given[2]), causal=True, return_lse=True)
    assert type(out) is cupyattn.RaggedArray and out.lengths.tolist() == [3, 4] and tuple(lse.shape) == (4, 7)
    close(out.values, expected)
    again = cupyattn.RaggedArray(given[2], ends_k)
    close(attention_varlen(ragged_q, ragged_k, again, causal=True).values, expected)
    plain_q = attention_varlen(given[0], given[1], again, ragged_q.cu_seqlens, causal=True)
    assert type(plain_q) is type(given[0])
    close(plain_q, expected)
    if library != "jax":
        room = ragged_q.with_values(in_library(library, np.zeros_like(q)))
        assert attention_varlen(ragged_q, ragged_k, again, causal=True, out=room) is room
        close(room.values, expected)


def test_contradictory_lengths_are_refused():
    x = np.ones((7, 2, 8), np.float32)
    q, other = cupyattn.RaggedArray(x, [0, 3, 7]), cupyattn.RaggedArray(x, [0, 4, 7])
    attention_varlen(q, q, q, q.cu_seqlens, q.cu_seqlens)
    with refused("cu_seqlens_q", "an array besides q's own", "None, as q is a RaggedArray"):
        attention_varlen(q, q, q, ints(0, 4, 7))
    with refused("cu_seqlens_k", "an array besides k's own", "None, as k is a RaggedArray"):
        attention_varlen(q, q, q, None, ints(0, 4, 7))
    with refused("v", "a RaggedArray of other lengths", "k's lengths"):
        attention_varlen(q, q, other)


def test_unknown_options_are_pythons_to_refuse():
    x = np.ones((1, 1, 1, 8), np.float32)
    with pytest.raises(TypeError, match="dropout"):
        attention(x, x, x, dropout=0.1)
    with pytest.raises(TypeError, match="positional"):
        attention(x, x, x, True)


def test_packed_calls_name_their_arguments():
    x = np.ones((7, 2, 8), np.float32)
    with refused("cu_seqlens_q", "None", "an array", TypeError):
        attention_varlen(x, x, x, None)
    with refused("cu_seqlens_q", "9 as its last entry", "at most 7, q's rows"):
        attention_varlen(x, x, x, ints(0, 9))
    with refused("cu_seqlens_k", "8 as its last entry", "at most 7, k's rows"):
        attention_varlen(x, x, x, ints(0, 7), ints(0, 8))
    with refused("seqused_k", "8 tokens for sequence 0", "at most the 7"):
        attention_varlen(x, x, x, ints(0, 7), seqused_k=ints(8))
    with refused("max_seqlen_q", "6", "at least the longest sequence, 7"):
        attention_varlen(x, x, x, ints(0, 7), max_seqlen_q=6)
    blocks = np.ones((3, 4, 2, 8), np.float32)
    with refused("block_table", r"block 3 at \[0, 1\]", "0 to 2"):
        attention_varlen(x, blocks, blocks, ints(0, 7), block_table=ints([0, 3]), seqused_k=ints(5))


def test_a_refused_append_names_its_arguments():
    caches, new = np.zeros((2, *CACHE), np.float32), np.ones((2, 2, 3, 2, 8), np.float32)
    with refused("cache_seqlens", "6 tokens plus 3 new", "at most the 8"):
        append_kv(*caches, *new, cache_seqlens=6)
    with refused("cu_seqlens_new", "4 as its last entry", "at most 3, k's rows"):
        append_kv(*caches, *new[:, 0], cu_seqlens_new=ints(0, 1, 4))
    with refused("cu_seqlens_new", "0-D shape", "1-D"):
        append_kv(*caches, *new[:, 0], cu_seqlens_new=np.array(0, np.int32), cache_seqlens=1)
    with refused("check", "1", "True, False or None", TypeError):
        append_kv(*caches, *new, check=1)
    assert not caches.any()


def test_gradients_are_not_silently_lost():
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 2, 1, 8, requires_grad=True)
    with refused("k", "a tensor that requires grad", r"\.detach\(\), or call under torch.no_grad", TypeError):
        attention(x.detach(), x, x)
    with torch.no_grad():
        assert not attention(x, x, x).requires_grad


# -------------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_out_is_written_and_returned(rng, library, dtype):
    q, k, v = normal(rng, 2, 3, 4, 16, dtype=dtype), *normal(rng, 2, 2, 5, 4, 16, dtype=dtype)
    room = np.zeros((2, 4, 6, 16), np.dtype(dtype))
    given = [in_library(library, array) for array in (q, k, v)]
    out = in_library(library, room)[:, :, ::2].swapaxes(1, 2)
    result, lse = attention(*given, out=out, return_lse=True)
    assert result is out and type(lse) is type(out)
    close(result, plain(q, k, v), dtype)
    assert not room[:, :, 1::2].any()


def test_out_may_be_of_another_library(rng):
    jnp = pytest.importorskip("jax.numpy")
    q, k, v = normal(rng, 1, 3, 2, 8), *normal(rng, 2, 1, 5, 2, 8)
    out = np.empty_like(q)
    assert attention(jnp.asarray(q), k, v, out=out) is out
    close(out, plain(q, k, v))


@pytest.mark.parametrize("call", ["attention", "attention_varlen", "attention_with_kvcache"])
def test_out_in_every_function(rng, call):
    x = normal(rng, 2, 3, 2, 8) if call != "attention_varlen" else normal(rng, 6, 2, 8)
    more = [ints(0, 2, 6)] if call == "attention_varlen" else []
    out = np.full_like(x, np.nan)
    assert getattr(cupyattn, call)(x, x, x, *more, out=out) is out
    np.testing.assert_array_equal(out, getattr(cupyattn, call)(x, x, x, *more))


def test_out_that_cannot_be_written_is_refused(rng):
    x = normal(rng, 2, 3, 2, 8)
    read_only = np.zeros_like(x)
    attention(x, x, x, out=read_only)
    before = read_only.copy()
    read_only.flags.writeable = False
    with refused("out", "a read-only numpy array", "a writable one"):
        attention(x, x, x, out=read_only)
    with refused("out", "overlaps itself", "distinct"):
        attention(x, x, x, out=np.lib.stride_tricks.as_strided(before, x.shape, (0, *x.strides[1:])))
    jnp = pytest.importorskip("jax.numpy")
    with refused("out", "JAX arrays are immutable", "a NumPy array on the CPU"):
        attention(x, x, x, out=jnp.zeros(x.shape))


def test_out_must_not_lie_on_an_input(rng):
    room = normal(rng, 4, 3, 2, 8)
    q, k, v = room[:1], room[1:2], room[2:3]
    before = room.copy()
    for out, name in ((q, "q"), (k, "k"), (v, "v"), (room.reshape(-1)[24:72].reshape(q.shape), "q")):
        with refused("out", f"an array whose memory range meets {name}'s", "memory of its own"):
            attention(q, k, v, out=out)
    with refused("out", "meets k_cache's", "memory of its own"):
        attention_with_kvcache(q, k, v, out=k)
    np.testing.assert_array_equal(room, before)
    attention(q, k, v, out=room[3:])
    assert (room[3:] != before[3:]).any()


# ---------------------------------------------------------------- CUDA, with the runtime and launchers stood in for


class Device(Runtime):
    """CuPy's runtime, and launchers that write down what they were prepared for and what they launched."""

    def __init__(self):
        super().__init__()
        self.prepared = []
        self.launches = []

    def prepare(self, problem, device, kernel="auto"):
        self.prepared.append((problem, device, kernel))
        return lambda operands, stream: self._launch("forward", operands, stream)

    def prepare_append(self, append, device):
        self.prepared.append((append, device, None))
        return lambda operands, stream: self._launch("append", operands, stream)

    def _launch(self, what, operands, stream):
        self.log.append(what)
        self.launches.append((what, operands, stream, self.device))


@pytest.fixture
def device(monkeypatch):
    made = Device()
    cupy = made.module()
    monkeypatch.setattr(arrays, "_cupy", lambda: cupy)
    monkeypatch.setattr(cupyattn.kernels.launch, "prepare", made.prepare)
    monkeypatch.setattr(cupyattn.kernels.launch, "prepare_append", made.prepare_append)
    monkeypatch.delenv(module.CHECK_VARIABLE, raising=False)
    module.remembered.clear()
    yield made
    module.remembered.clear()
    arrays._in_flight.clear()


def qkv(device=0, at=0x100000):
    return [at_address(at + i * 0x10000, (2, 5, 4, 64), device=device) for i in range(3)]


def test_a_repeated_call_is_prepared_once(device):
    q, k, v = qkv()
    for _ in range(3):
        out = attention(q, k, v)
    assert out.data.ptr == 0xE0000000 and len(device.launches) == 3
    ((problem, where, kernel),) = device.prepared
    assert (problem.batch, problem.seqlen_q, problem.num_heads, where, kernel) == (2, 5, 4, 0, "auto")
    operands, stream = device.launches[0][1:3]
    assert (operands.q.pointer, operands.out.pointer, operands.lse, stream) == (0x100000, 0xE0000000, None, 0)
    assert device.log == ["forward"] * 3, "nothing but launches: no event, no wait"


def test_what_is_prepared_depends_on_the_form_of_a_call_and_not_on_its_addresses(device):
    q, k, v = qkv()
    attention(q, k, v)
    attention(*qkv(at=0x900000))
    assert len(device.prepared) == 1
    forms = [
        lambda: attention(*qkv(at=0x900008)),
        lambda: attention(q, k, v, causal=True),
        lambda: attention(q, k, v, window=(3, 0)),
        lambda: attention(q, k, v, softcap=2.0),
        lambda: attention(q, k, v, softmax_scale=2.0),
        lambda: attention(q, k, v, return_lse=True),
        lambda: attention(q, k, v, kernel="forward_simt"),
        lambda: attention(q[:, :3], k, v),
        lambda: attention(q[:1], k[:1], v[:1]),
        lambda: attention(q, k[:, ::2], v[:, ::2]),
        lambda: attention(q, k, v, sinks=at_address(64, (4,), "float32")),
        lambda: attention(q, k, v, alibi_slopes=at_address(64, (4,), "float32")),
        lambda: attention(q, k, v, alibi_slopes=at_address(64, (2, 4), "float32")),
        lambda: attention(q, k, v, out=at_address(0x800000, (2, 5, 4, 64))),
        lambda: attention(q, k, v, out=at_address(0x800004, (2, 5, 4, 64))),
        lambda: attention_with_kvcache(q, k, v, cache_seqlens=at_address(64, (2,), "int32")),
        lambda: attention_with_kvcache(q, k, v, cache_leftpad=at_address(64, (2,), "int32")),
    ]
    row, scales = at_address(0x700000, (2, 1, 4, 64)), at_address(64, (4,), "float32")
    fp8 = [at_address(at, (2, 5, 4, 64), "uint8") for at in (0x200000, 0x300000)]
    scaled = {"kv_dtype": "e4m3", "k_scale": 1.0, "v_scale": 1.0}
    new = {"k": row, "v": row, "cache_seqlens": 2}
    table = at_address(64, (9, 32))
    forms += [
        lambda: attention_with_kvcache(q, k, v, cache_seqlens=4, causal=True),
        lambda: attention_with_kvcache(q, k, v, num_splits=3),
        lambda: attention_with_kvcache(q, k, v, **new),
        lambda: attention_with_kvcache(q, k, v, **new | {"k": at_address(0x700008, (2, 1, 4, 64))}),
        lambda: attention_with_kvcache(q, k, v, **new, rotary_cos=table, rotary_sin=table),
        lambda: attention_with_kvcache(q, k, v, **new, rotary_cos=table, rotary_sin=table, rotary_interleaved=False),
        lambda: attention_with_kvcache(q, *fp8, **scaled),
        lambda: attention_with_kvcache(q, *fp8, **scaled | {"k_scale": 2.0}),
        lambda: attention_with_kvcache(q, *fp8, **scaled | {"k_scale": scales}),
        lambda: attention_with_kvcache(q, *fp8, **scaled | {"v_scale": scales}),
        lambda: attention_with_kvcache(q, *fp8, **scaled | {"kv_dtype": "e5m2"}),
    ]
    for number, form in enumerate(forms, start=2):
        form()
        form()
        assert len(device.prepared) == number, number
    problems = {prepared[0] for prepared in device.prepared}
    assert len(problems) == len(device.prepared) - 2, "neither the kernel nor an aligned out is in a Problem"


def test_a_window_may_be_a_list_and_is_prepared_once(device):
    for window in ([3, 0], (3, 0), [3, 0]):
        attention(*qkv(), window=window)
    assert len(device.prepared) == 1


def test_the_number_of_forms_remembered_is_bounded(device, monkeypatch):
    monkeypatch.setattr(module, "_HELD", 3)
    for scale in (1.0, 2.0, 3.0, 4.0, 4.0, 1.0):
        attention(*qkv(), softmax_scale=scale)
    assert len(module.remembered) == 3 and len(device.prepared) == 5


def test_work_runs_on_the_current_stream_of_the_arrays_device(device):
    device.streams = {0: 5, 1: 6}
    attention(*qkv())
    attention(*qkv(device=1))
    assert [(stream, where) for _, _, stream, where in device.launches] == [(5, 0), (6, 1)]
    assert device.device == 0 and [where for _, where, _ in device.prepared] == [0, 1]


def fake_torch(monkeypatch, stream):
    """PyTorch as far as the border sees it, and a function that makes one of its tensors."""

    class Dtype:
        is_floating_point, is_complex = True, False
        __str__ = lambda self: "torch.float16"  # noqa: E731

    class Tensor:
        is_cuda, requires_grad, dtype = True, False, Dtype()
        device = types.SimpleNamespace(type="cuda", index=0)

        def __init__(self, pointer, shape):
            self.pointer, self.shape = pointer, shape

        data_ptr = lambda self: self.pointer  # noqa: E731
        stride = lambda self: arrays.contiguous_strides(self.shape)  # noqa: E731
        get_device = lambda self: 0  # noqa: E731
        is_neg = is_conj = lambda self: False  # noqa: E731

    torch = types.SimpleNamespace(
        Tensor=Tensor,
        version=types.SimpleNamespace(hip=None),
        float16=Tensor.dtype,
        empty=lambda shape, dtype, device: Tensor(0xF0000000, shape),
        contiguous_format="contiguous",
        empty_like=lambda tensor, memory_format: Tensor(0xF0000000, tensor.shape),
        _C=types.SimpleNamespace(_cuda_getCurrentRawStream=lambda device: stream),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    return Tensor


def test_torch_tensors_run_on_torchs_stream(device, monkeypatch):
    tensor = fake_torch(monkeypatch, stream=9)
    q, k, v = (tensor(0x100000 + i * 0x10000, (2, 5, 4, 64)) for i in range(3))
    out = attention(q, k, v)
    assert type(out) is tensor and out.pointer == 0xF0000000
    assert device.launches[0][2] == 9 and device.log == ["forward"]


def test_arrays_of_two_libraries_are_ordered_before_and_after(device, monkeypatch):
    tensor = fake_torch(monkeypatch, stream=9)
    device.streams = {0: 4}
    q, k, v = tensor(0x100000, (2, 5, 4, 64)), *qkv(at=0x200000)[1:]
    assert type(attention(q, k, v)) is tensor
    assert device.log == [("record", 1, 4), ("wait", 9, 1), "forward", ("record", 2, 9), ("wait", 4, 2)]


def test_foreign_arrays_are_kept_until_the_work_is_done(device):
    foreign = Elsewhere(np.zeros(1), 2)
    foreign.imported, k, v = qkv()
    out = attention(foreign, k, v)
    assert out.data.ptr == 0xE0000000, "no from_dlpack to convert with, so it stays CuPy's"
    assert arrays._in_flight[0][1] == [(foreign, foreign.imported)]


def test_an_append_and_its_attention_are_one_call(device):
    device.streams = {0: 5}
    q = at_address(0x100000, (2, 1, 8, 64))
    k, v = (at_address(at, (2, 1, 4, 64)) for at in (0x200000, 0x300000))
    blocks = [at_address(at, (9, 16, 4, 64)) for at in (0x400000, 0x800000)]
    options = {"block_table": at_address(0x110000, (2, 3), "int32"), "cache_seqlens": at_address(64, (2,), "int32")}
    for _ in range(2):
        attention_with_kvcache(q, *blocks, k=k, v=v, **options)
    ((problem, where, kernel),) = device.prepared
    assert device.log == ["forward"] * 2 and (where, kernel) == (0, "auto")
    assert problem.seqlen_new == problem.append.seqlen_new == 1 and problem.seqused_k
    (_, operands, stream, _) = device.launches[0]
    assert stream == 5
    assert (operands.k.pointer, operands.k_new.pointer, operands.v_new.pointer) == (0x400000, 0x200000, 0x300000)
    alone = operands.appending()
    assert (alone.k_cache.pointer, alone.v.pointer, alone.cache_seqlens.pointer) == (0x400000, 0x300000, 64)
    assert alone.block_table is operands.block_table


def test_an_int_length_goes_by_value(device):
    q, k, v = qkv()
    with refused("cache_seqlens", "6 tokens", "at most the 5"):
        attention_with_kvcache(q, k, v, cache_seqlens=6)
    with refused("k", "batch 1", "q's batch 2"):
        attention_with_kvcache(q, k, v, k=k[:1], v=v[:1], cache_seqlens=1)
    assert not device.launches
    for length in (5, np.int64(4), 0):
        attention_with_kvcache(q, k, v, cache_seqlens=length)
        operands = device.launches[-1][1]
        assert (operands.uniform_length, type(operands.uniform_length), operands.seqused_k) == (length, int, None)
    assert len(device.prepared) == 1 and device.prepared[0][0].seqused_k, "whatever the length"
    append_kv(k, v, q[:, :1], q[:, 1:2], cache_seqlens=3)
    assert device.launches[-1][1].uniform_length == 3 and device.launches[-1][1].cache_seqlens is None


@pytest.mark.parametrize(
    ("check", "variable", "reads"), [(None, None, 0), (None, "1", 2), (False, "1", 0), (True, "", 2)]
)
def test_indices_on_a_device_are_read_only_if_asked_for(device, monkeypatch, check, variable, reads):
    if variable is not None:
        monkeypatch.setenv(module.CHECK_VARIABLE, variable)
    contents, read = {64: ints(0, 5, 9), 96: ints(0, 5, 9)}, []
    monkeypatch.setattr(module, "host_array", lambda found: read.append(found.pointer) or contents[found.pointer])
    q = at_address(0x100000, (9, 4, 64))
    cu_seqlens_q, cu_seqlens_k = (at_address(at, (3,), "int32") for at in (64, 96))
    attention_varlen(q, q, q, cu_seqlens_q, cu_seqlens_k, check=check)
    assert len(read) == reads and len(device.launches) == 1
    contents[96] = ints(0, 5, 10)
    if reads:
        with refused("cu_seqlens_k", "10 as its last entry", "at most 9"):
            attention_varlen(q, q, q, cu_seqlens_q, cu_seqlens_k, check=check)
    assert len(device.launches) == 1


def test_an_int_length_is_checked_without_reading_the_device(device, monkeypatch):
    q, k, v = qkv()
    monkeypatch.setattr(module, "host_array", lambda found: pytest.fail("read"))
    attention_with_kvcache(q, k, v, cache_seqlens=5, check=True)
    assert len(device.launches) == 1
    with refused("cache_seqlens", "-1", "a length of at least 0"):
        attention_with_kvcache(q, k, v, cache_seqlens=-1, check=True)
    assert len(device.launches) == 1


def test_refusals_come_before_any_launch(device):
    q, k, v = qkv()
    with refused("v", "on cuda:1", "device cuda:0"):
        attention(q, k, qkv(device=1)[2])
    with refused("k", "on cpu", "device cuda:0"):
        attention(q, np.zeros((2, 5, 4, 64), np.float16), v)
    with refused("sinks", "on cpu", "device cuda:0"):
        attention(q, k, v, sinks=np.zeros(4, np.float32))
    with refused("v", "float32", "float16", TypeError):
        attention(q, k, at_address(0x500000, (2, 5, 4, 64), "float32"))
    with refused("kernel", "'numpy'", "auto, decode, forward_sm90, forward_sm80, forward_simt for arrays on cuda:0"):
        attention(q, k, v, kernel="numpy")
    with refused("out", "meets v's", "memory of its own"):
        attention(q, k, v, out=v)
    assert not device.launches and not device.prepared[1:]


def test_an_append_is_prepared_once_for_each_form(device):
    _, k, v = qkv()
    fp8 = [at_address(at, (2, 5, 4, 64), "uint8") for at in (0x200000, 0x300000)]
    row, table, scales = at_address(0x700000, (2, 1, 4, 64)), at_address(64, (9, 32)), at_address(64, (4,), "float32")
    scaled = {"kv_dtype": "e4m3", "k_scale": 1.0, "v_scale": 1.0}
    forms = [
        lambda: append_kv(k, v, row, row),
        lambda: append_kv(k, v, row, row, cache_seqlens=2),
        lambda: append_kv(k, v, row, row, cache_seqlens=at_address(64, (2,), "int32")),
        lambda: append_kv(k, v, row, row, rotary_cos=table, rotary_sin=table),
        lambda: append_kv(k, v, row, row, rotary_cos=table, rotary_sin=table, rotary_interleaved=False),
        lambda: append_kv(*fp8, row, row, **scaled),
        lambda: append_kv(*fp8, row, row, **scaled | {"v_scale": 2.0}),
        lambda: append_kv(*fp8, row, row, **scaled | {"v_scale": scales}),
        lambda: append_kv(*fp8, row, row, **scaled | {"kv_dtype": "e5m2"}),
    ]
    for number, form in enumerate(forms, start=1):
        form()
        form()
        assert len(device.prepared) == number, number
    assert device.log == ["append"] * 2 * len(forms)
    assert device.launches[-4][1].v_scale.pointer == 64 and device.launches[-1][1].v_scale is None


def test_new_rows_without_a_query_are_appended_all_the_same(device):
    q, k, v = qkv()
    row = at_address(0x700000, (2, 1, 4, 64))
    attention_with_kvcache(q[:, :0], k, v, k=row, v=row, cache_seqlens=at_address(64, (2,), "int32"))
    assert device.log == ["append"] and device.prepared[0][0].seqlen_new == 1
    operands = device.launches[0][1]
    assert (operands.k_cache.pointer, operands.k.pointer, operands.cache_seqlens.pointer) == (0x110000, 0x700000, 64)
    attention_with_kvcache(q[:, :0], k, v, k=row[:, :0], v=row[:, :0], cache_seqlens=0)
    assert device.log == ["append"]


def test_nothing_is_launched_where_there_is_nothing_to_do(device):
    q, k, v = (array[:0] for array in qkv())
    assert attention(q, k, v).shape == (0, 5, 4, 64)
    new = at_address(64, (2, 0, 4, 64))
    append_kv(*qkv()[:2], new, new)
    assert not device.launches and not device.prepared


def test_the_host_does_little(device):
    """Python's own share of a repeated call. The launch and the allocation of the output are stood in for."""
    q, k, v = qkv()
    made = attention(q, k, v)
    arrays._cupy().ndarray = lambda shape, dtype: made
    best = min(_seconds(lambda: attention(q, k, v), 2000) for _ in range(10))
    assert best < 40e-6, f"{best * 1e6:.1f} µs"  # 8 on an idle core; a call that is prepared anew takes 100 and more


def test_the_host_does_little_for_a_step(device):
    """The same of a decoding step with everything: new rows, rotary, a block table, lengths and FP8 scales."""
    q, row = at_address(0x100000, (2, 1, 8, 64)), at_address(0x200000, (2, 1, 4, 64))
    blocks = [at_address(at, (9, 16, 4, 64), "uint8") for at in (0x400000, 0x800000)]
    table, scale = at_address(64, (40, 32)), at_address(64, (4,), "float32")
    options = {"block_table": at_address(64, (2, 3), "int32"), "cache_seqlens": at_address(64, (2,), "int32")}
    options |= {"k": row, "v": row, "rotary_cos": table, "rotary_sin": table}
    options |= {"kv_dtype": "e4m3", "k_scale": scale, "v_scale": scale}
    made = attention_with_kvcache(q, *blocks, **options)
    arrays._cupy().ndarray = lambda shape, dtype: made
    best = min(_seconds(lambda: attention_with_kvcache(q, *blocks, **options), 1000) for _ in range(10))
    assert best < 80e-6, f"{best * 1e6:.1f} µs"
    assert len(device.prepared) == 1


def _seconds(function, times):
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


# ------------------------------------------------------------------------------------------------ real devices


def on_gpu(library, array):
    if library == "cupy":
        import cupy

        return cupy.asarray(array)
    if library == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch without CUDA")
        return in_library("torch", array).cuda()
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX without CUDA")
    return jax.numpy.asarray(array)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
def test_gpu_every_library(rng, library, dtype):
    q, k, v = normal(rng, 2, 33, 4, 64, dtype=dtype), *normal(rng, 2, 2, 50, 2, 64, dtype=dtype)
    given = [on_gpu(library, array) for array in (q, k, v)]
    out, lse = attention(*given, causal=True, return_lse=True)
    assert type(out) is type(lse) is type(given[0]) and out.dtype == given[0].dtype
    close(out, plain(q, k, v, causal=True), dtype)


@pytest.mark.gpu
def test_gpu_jax_temporaries_survive_until_the_kernel_is_done(rng):
    """Inputs dropped at once, outputs used at once, many times: freed buffers must not be reused under the kernel."""
    q = normal(rng, 4, 512, 8, 64, dtype="float16")
    given, expected = on_gpu("jax", q), None
    for i in range(50):
        out = attention(given * 1, given * 1, given * 1)
        noise = given * i
        result = np.asarray(out + 0 * noise, np.float32)
        expected = result if expected is None else expected
        np.testing.assert_array_equal(result, expected)


@pytest.mark.gpu
def test_gpu_streams_of_cupy_and_torch_are_ordered(rng):
    import cupy

    torch = pytest.importorskip("torch")
    q, k, v = (normal(rng, 8, 1024, 8, 64, dtype="float16") for _ in range(3))
    ours, theirs = on_gpu("cupy", k), on_gpu("torch", q)
    expected = attention(on_gpu("cupy", q), ours, on_gpu("cupy", v)).get()
    cupy.cuda.Device().synchronize()
    for _ in range(10):
        with cupy.cuda.Stream(non_blocking=True), torch.cuda.stream(torch.cuda.Stream()):
            late = cupy.zeros_like(ours)
            for _ in range(20):
                late += 0
            late += ours
            out = attention(theirs, late, on_gpu("cupy", v))
            late[...] = 0
            np.testing.assert_array_equal(out.cpu().numpy(), expected)


@pytest.mark.gpu
def test_gpu_append_in_place(rng):
    import cupy

    caches, new = (
        cupy.zeros((2, 2, 8, 2, 64), cupy.float16),
        on_gpu("cupy", normal(rng, 2, 2, 1, 2, 64, dtype="float16")),
    )
    attention_with_kvcache(new[0], *caches, k=new[0], v=new[1], cache_seqlens=on_gpu("cupy", ints(3, 7)))
    expected = np.zeros(caches.shape, np.float16)
    expected[:, [0, 1], [3, 7]] = new.get()[:, :, 0]
    np.testing.assert_array_equal(caches.get(), expected)
    attention_with_kvcache(new[0], *caches, k=new[0], v=new[1], cache_seqlens=0)
    expected[:, :, 0] = new.get()[:, :, 0]
    np.testing.assert_array_equal(caches.get(), expected)


@pytest.mark.gpu
def test_gpu_check_reads_the_indices(rng):
    q = on_gpu("cupy", normal(rng, 9, 4, 64, dtype="float16"))
    with refused("cu_seqlens_q", "10 as its last entry", "at most 9"):
        attention_varlen(q, q, q, on_gpu("cupy", ints(0, 5, 10)), check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_gpu_arrays_on_a_device_that_is_not_current(rng, library):
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    q, k, v = normal(rng, 1, 33, 4, 64, dtype="float16"), *normal(rng, 2, 1, 50, 4, 64, dtype="float16")
    with cupy.cuda.Device(1):
        given = [on_gpu(library, array) for array in (q, k, v)]
    if library == "torch":
        given = [tensor.to("cuda:1") for tensor in given]
    current = cupy.cuda.runtime.getDevice()
    out = attention(*given)
    assert arrays.view(out).device == 1 and cupy.cuda.runtime.getDevice() == current
    close(out, plain(q, k, v), "float16")


@pytest.mark.parametrize("name", ["cupyattn", "cupyattn.attention"])
def test_examples(name):
    results = doctest.testmod(sys.modules[name])
    assert results.attempted and not results.failed


def test_version_and_names():
    assert re.match(r"\d", cupyattn.__version__)
    assert set(cupyattn.__all__) | {"__version__"} <= set(dir(cupyattn))
    __import__("cupyattn.explain")  # a module of the same name must not take the function's place
    assert callable(cupyattn.attention) and callable(cupyattn.explain)
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        cupyattn.attend  # noqa: B018


def test_bfloat16_of_numpy_is_ml_dtypes(rng):
    x = normal(rng, 1, 2, 1, 8, dtype="bfloat16")
    assert attention(x, x, x).dtype == ml_dtypes.bfloat16
