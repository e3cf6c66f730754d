"""Validation: what `describe` and `describe_append` make of good arguments, every complaint about bad ones, and
`check_indices` against plain loops that say what a good index is."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cupyattn.arrays import View, view
from cupyattn.problem import (
    Append,
    Cache,
    Problem,
    Rotary,
    check_indices,
    check_uniform,
    describe,
    describe_append,
)

INT_MAX = np.iinfo(np.int32).max


def array(*shape, dtype=np.float16):
    return view(np.zeros(shape, dtype))


def ints(*values):
    return view(np.array(values, np.int32))


def moved(found: View, **changes) -> View:
    """The same array said to be elsewhere, or of another kind."""
    return dataclasses.replace(found, **changes)


def shifted(found: View, offset: int) -> View:
    """The same array said to lie some bytes behind a multiple of 16."""
    return moved(found, pointer=found.pointer // 16 * 16 + offset)


def broadcast(*shape) -> View:
    """An array of any size in the memory of one row."""
    return view(np.broadcast_to(np.zeros(shape[-1], np.float16), shape))


def refused(argument, came, expected, kind=ValueError):
    return pytest.raises(kind, match=f"^{argument}: got .*{came}.*, expected .*{expected}")


# -------------------------------------------------------------------------------------------------- describe


def test_a_dense_call():
    q, k, v = array(2, 5, 8, 64), array(2, 7, 2, 64), array(2, 7, 2, 64)
    problem = describe(q, k, v)
    assert problem == Problem(
        dtype="float16",
        kv_dtype="float16",
        batch=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        head_dim_v=64,
        packed_q=False,
        total_q=10,
        seqlen_q=5,
        seqlen_k=7,
        seqlen_new=0,
        cache=Cache("dense", 2, 7, 0, 0, 0, (896, 128, 64), (896, 128, 64)),
        q_strides=(2560, 512, 64),
        o_strides=(2560, 512, 64),
        window=(-1, -1),
        softmax_scale=0.125,
        softcap=0.0,
        alibi="",
        sinks=False,
        lse=False,
        cu_seqlens_k=False,
        seqused_k=False,
        cache_batch_idx=False,
        leftpad=False,
        alignment=problem.alignment,
        out_alignment=16,
        k_scale=1.0,
        k_scales="",
        v_scale=1.0,
        v_scales="",
        num_splits=0,
        rotary=None,
        append=None,
    )
    assert (problem.group, problem.itemsize, problem.kv_itemsize) == (4, 2, 2)


def test_equal_calls_make_equal_problems():
    calls = [describe(*(view(np.zeros((1, 4, 2, 8), np.float32)) for _ in range(3)), causal=True) for _ in range(2)]
    first, second = (dataclasses.replace(call, alignment=16) for call in calls)
    assert first == second and hash(first) == hash(second)


def test_a_packed_call():
    q, k = array(9, 4, 32), array(11, 4, 32)
    problem = describe(q, k, k, cu_seqlens_q=ints(0, 4, 9), cu_seqlens_k=ints(0, 0, 11), return_lse=True)
    assert (problem.batch, problem.total_q, problem.seqlen_q, problem.seqlen_k) == (2, 9, 9, 11)
    assert problem.packed_q and problem.cu_seqlens_k and problem.lse and not problem.seqused_k
    assert problem.cache == Cache("packed", 1, 11, 0, 0, 0, (0, 128, 32), (0, 128, 32))
    assert problem.q_strides == problem.o_strides == (0, 128, 32)


def test_longest_sequences_are_hints_bounded_by_the_arrays():
    q, cu_seqlens = array(9, 4, 32), ints(0, 9)
    hinted = describe(q, q, q, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=5, max_seqlen_k=100)
    assert (hinted.seqlen_q, hinted.seqlen_k) == (5, 9)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_paged_call_differs_by_layout_in_strides_alone(layout):
    q = array(2, 1, 8, 64)
    blocks = np.zeros((10, 16, 2, 64) if layout == "NHD" else (10, 2, 16, 64), np.float16)
    table = view(np.zeros((2, 6), np.int32)[:, :5])
    k = view(blocks)
    problem = describe(q, k, k, block_table=table, seqused_k=ints(3, 4), layout=layout)
    strides = (2048, 128, 64) if layout == "NHD" else (2048, 64, 1024)
    assert problem.cache == Cache("paged", 10, 80, 16, 5, 6, strides, strides)
    assert (problem.seqlen_k, problem.num_kv_heads, problem.seqused_k) == (80, 2, True)


def test_values_have_a_head_dim_of_their_own():
    q, k, v = array(2, 5, 8, 64), array(2, 7, 2, 64), array(2, 7, 2, 24)
    problem = describe(q, k, v)
    assert (problem.head_dim, problem.head_dim_v, problem.softmax_scale) == (64, 24, 0.125)
    assert problem.cache == Cache("dense", 2, 7, 0, 0, 0, (896, 128, 64), (336, 48, 24))
    assert (problem.q_strides, problem.o_strides) == ((2560, 512, 64), (960, 192, 24))
    assert describe(q, k, v, out=array(2, 5, 8, 24)).o_strides == problem.o_strides
    assert describe(q, k, array(2, 7, 2, 6)).out_alignment == 4
    packed = describe(
        q=array(9, 8, 64), k=array(9, 2, 64), v=array(9, 2, 24), cu_seqlens_q=ints(0, 9), cu_seqlens_k=ints(0, 9)
    )
    assert packed.o_strides == (0, 192, 24) and packed.cache.v_strides == (0, 48, 24)


def test_appended_values_have_the_caches_head_dim():
    found = describe_append(array(2, 16, 4, 64), array(2, 16, 4, 24), array(2, 3, 4, 64), array(2, 3, 4, 24))
    assert (found.head_dim, found.head_dim_v) == (64, 24)
    assert (found.k_strides, found.v_strides) == ((768, 256, 64), (288, 96, 24))
    narrow = array(2, 16, 4, 64), array(2, 16, 4, 6), array(2, 3, 4, 64), array(2, 3, 4, 6)
    assert describe_append(*(moved(found, pointer=found.pointer // 16 * 16) for found in narrow)).alignment == 4


def test_a_combined_cache_needs_no_copy():
    q, cache = array(1, 1, 4, 64), np.zeros((6, 2, 16, 4, 64), np.float16)
    k, v = view(cache[:, 0]), view(cache[:, 1])
    problem = describe(q, k, v, block_table=view(np.zeros((1, 3), np.int32)), seqused_k=ints(1))
    assert problem.cache.k_strides == problem.cache.v_strides == (8192, 256, 64)


def test_axes_with_one_entry_have_no_stride():
    q, k = array(1, 1, 4, 8), array(1, 5, 1, 8)
    problem = describe(q, k, k)
    assert problem.q_strides == (0, 0, 8) and problem.cache.k_strides == (0, 8, 0)


def test_strides_may_be_anything_outside_the_last_dimension():
    base = np.zeros((6, 4, 2, 10, 16), np.float32)
    q = view(base[::-2, :, 0].swapaxes(1, 2))
    problem = describe(q, q, q)
    assert q.shape == (3, 10, 4, 16) and problem.q_strides == (-2560, 16, 320)


@pytest.mark.parametrize(
    ("width", "offset", "alignment"),
    [(64, 0, 16), (64, 8, 16), (64, 4, 8), (64, 2, 4), (64, 1, 2), (68, 0, 8), (66, 0, 4), (65, 0, 2)],
)
def test_alignment_is_what_divides_every_rows_address(width, offset, alignment):
    room = np.zeros(4 * width + 64, np.float16)
    start = (-room.ctypes.data // 2) % 8 + offset
    rows = room[start : start + 4 * width].reshape(1, 4, 1, width)[..., :32]
    q = view(rows)
    clean = array(1, 4, 1, 32)
    clean = moved(clean, pointer=clean.pointer // 16 * 16)
    assert describe(q, clean, clean).alignment == alignment
    assert describe(clean, clean, q).alignment == alignment
    assert describe(clean, clean, clean, out=q).out_alignment == alignment
    assert describe(clean, clean, clean, out=q).alignment == 16


@pytest.mark.parametrize(
    ("window", "causal", "expected"),
    [
        (None, False, (-1, -1)),
        (None, True, (-1, 0)),
        ((-1, -1), False, (-1, -1)),
        ((5, 3), False, (5, 3)),
        ((5, 3), True, (5, 0)),
        ([np.int32(0), 0], np.True_, (0, 0)),
    ],
)
def test_causal_and_window_become_one(window, causal, expected):
    q = array(1, 2, 1, 8)
    problem = describe(q, q, q, window=window, causal=causal)
    assert problem.window == expected


@pytest.mark.parametrize(("softcap", "expected"), [(None, 0.0), (0, 0.0), (0.0, 0.0), (30, 30.0), (np.float32(2), 2.0)])
def test_softcap(softcap, expected):
    q = array(1, 2, 1, 8)
    assert describe(q, q, q, softcap=softcap).softcap == expected


@pytest.mark.parametrize(("scale", "expected"), [(None, 1 / math.sqrt(8)), (0, 0.0), (-2, -2.0), (np.float64(3), 3.0)])
def test_softmax_scale(scale, expected):
    q = array(1, 2, 1, 8)
    assert describe(q, q, q, softmax_scale=scale).softmax_scale == expected


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
def test_numbers_are_rounded_as_the_arithmetic_is(name):
    q = array(1, 2, 1, 8)
    assert getattr(describe(q, q, q, **{name: 0.1}), name) == float(np.float32(0.1))
    assert getattr(describe(q, q, q, **{name: 0.1}, out_dtype="float64"), name) == 0.1


def test_biases():
    q = array(2, 3, 4, 8)
    slopes = array(2, 4, dtype=np.float32)
    assert describe(q, q, q, alibi_slopes=slopes).alibi == "batch_heads"
    both = describe(q, q, q, alibi_slopes=array(4, dtype=np.float32), sinks=array(4, dtype=np.float32))
    assert both.alibi == "heads" and both.sinks


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8)])
def test_empty_arrays_are_fine_whatever_their_strides(shape):
    q = array(*shape)
    out = array(*shape)
    problem = describe(q, q, q, out=out)
    assert problem.total_q == 0
    no_rows = array(0, 4, 8)
    assert describe(no_rows, no_rows, no_rows, cu_seqlens_q=ints(0), cu_seqlens_k=ints(0)).batch == 0


# --------------------------------------------------------------------------------------------------- refusals

DENSE = {"q": array(2, 5, 8, 64), "k": array(2, 7, 4, 64), "v": array(2, 7, 4, 64)}
PACKED = {
    "q": array(9, 8, 64),
    "k": array(11, 4, 64),
    "v": array(11, 4, 64),
    "cu_seqlens_q": ints(0, 4, 9),
    "cu_seqlens_k": ints(0, 5, 11),
}
PAGED = {
    "q": array(2, 1, 8, 64),
    "k": array(10, 16, 4, 64),
    "v": array(10, 16, 4, 64),
    "block_table": view(np.zeros((2, 3), np.int32)),
    "seqused_k": ints(7, 8),
}
FLOAT32 = {"dtype": np.float32}
READ_ONLY = moved(array(2, 5, 8, 64), readonly=True)

BAD = [
    # rank
    (DENSE, {"q": array(5, 8, 64)}, "q", r"3-D shape \(5, 8, 64\)", r"4-D \(batch, seqlen_q, heads, head_dim\)"),
    (DENSE, {"k": array(2, 7, 4, 64, 1)}, "k", "5-D", r"4-D \(batch, seqlen_k, kv_heads, head_dim\)"),
    (DENSE, {"v": array(64)}, "v", "1-D", "4-D"),
    (PACKED, {"q": array(1, 9, 8, 64)}, "q", "4-D", r"3-D \(total_q, heads, head_dim\)"),
    (PACKED, {"k": array(1, 11, 4, 64)}, "k", "4-D", r"3-D packed \(total_k, kv_heads, head_dim\), or block"),
    (PAGED, {"k": array(160, 4, 64)}, "k", "3-D", r"4-D \(num_blocks, block_size, kv_heads, head_dim\)"),
    (PAGED, {"k": array(160, 4, 64), "layout": "HND"}, "k", "3-D", r"\(num_blocks, kv_heads, block_size, head_dim\)"),
    # head counts and head_dim
    (DENSE, {"q": array(2, 5, 6, 64)}, "k", "4 heads where q has 6", "divides q's heads"),
    (DENSE, {"q": array(2, 5, 2, 64)}, "k", "4 heads where q has 2", "divides q's heads"),
    (DENSE, {"k": array(2, 7, 0, 64), "v": array(2, 7, 0, 64)}, "k", "0 heads", "divides q's heads"),
    (DENSE, {"q": array(2, 5, 0, 64)}, "q", "no heads", "at least one head"),
    (DENSE, {"q": array(2, 5, 8, 0)}, "q", "head_dim 0", "1 to 256"),
    (DENSE, {"q": array(2, 5, 8, 257)}, "q", "head_dim 257", "1 to 256"),
    (DENSE, {"k": array(2, 7, 4, 32)}, "k", "head_dim 32", "64"),
    (DENSE, {"v": array(2, 7, 4, 0)}, "v", "head_dim 0", "1 to 256"),
    (PACKED, {"v": array(11, 4, 257)}, "v", "head_dim 257", "1 to 256"),
    (PAGED, {"v": array(10, 16, 4, 257), "v_name": "v_cache"}, "v_cache", "head_dim 257", "1 to 256"),
    (
        DENSE,
        {"v": array(2, 7, 4, 32), "out": array(2, 5, 8, 64)},
        "out",
        r"shape \(2, 5, 8, 64\)",
        r"\(2, 5, 8, 32\), q's shape but for v's head_dim",
    ),
    (PAGED, {"layout": "HND"}, "k", "16 heads where q has 8", "divides q's heads"),
    # shapes that must agree
    (DENSE, {"k": array(3, 7, 4, 64), "v": array(3, 7, 4, 64)}, "k", "batch 3", "q's batch 2"),
    (DENSE, {"v": array(2, 6, 4, 64)}, "v", r"shape \(2, 6, 4, 64\)", r"k's shape \(2, 7, 4, 64\), but for head_dim"),
    (PAGED, {"v": array(10, 4, 16, 32)}, "v", r"shape \(10, 4, 16, 32\)", r"k's shape \(10, 16, 4, 64\), but for"),
    # dtypes
    (DENSE, {"q": array(2, 5, 8, 64, dtype=np.float64)}, "q", "float64", "float16 or bfloat16 or float32", TypeError),
    (DENSE, {"q": array(2, 5, 8, 64, dtype=np.int32)}, "q", "int32", "float16 or", TypeError),
    (DENSE, {"k": array(2, 7, 4, 64, **FLOAT32)}, "k", "float32", "q's dtype float16", TypeError),
    (DENSE, {"v": array(2, 7, 4, 64, **FLOAT32)}, "v", "float32", "q's dtype float16", TypeError),
    # devices
    (DENSE, {"k": moved(DENSE["k"], device=1)}, "k", "an array on cuda:1", "the other arrays' device cpu"),
    (DENSE, {"q": moved(DENSE["q"], device=0)}, "k", "an array on cpu", "the other arrays' device cuda:0"),
    (PACKED, {"cu_seqlens_q": moved(ints(0, 4, 9), device=0)}, "cu_seqlens_q", "on cuda:0", "device cpu"),
    (DENSE, {"sinks": moved(array(8, **FLOAT32), device=0)}, "sinks", "on cuda:0", "device cpu"),
    (DENSE, {"out": moved(array(2, 5, 8, 64), device=0)}, "out", "on cuda:0", "device cpu"),
    # strides
    (DENSE, {"q": view(np.zeros((2, 5, 8, 128), np.float16)[..., ::2])}, "q", "stride 2 in the last", "contiguous"),
    (DENSE, {"k": view(np.zeros((64, 2, 7, 4), np.float16).transpose(1, 2, 3, 0))}, "k", "stride 56", "contiguous"),
    # cu_seqlens
    (PACKED, {"cu_seqlens_q": array(3, dtype=np.int64)}, "cu_seqlens_q", "int64", "int32", TypeError),
    (PACKED, {"cu_seqlens_q": array(2, 3, dtype=np.int32)}, "cu_seqlens_q", r"2-D shape \(2, 3\)", "1-D"),
    (PACKED, {"cu_seqlens_q": array(0, dtype=np.int32)}, "cu_seqlens_q", "an empty array", r"batch \+ 1 entries"),
    (PACKED, {"cu_seqlens_q": view(np.zeros(6, np.int32)[::2])}, "cu_seqlens_q", "stride 2", "a contiguous array"),
    (PACKED, {"cu_seqlens_k": ints(0, 11)}, "cu_seqlens_k", r"shape \(2,\)", r"\(3,\)"),
    (PACKED, {"cu_seqlens_k": array(3, dtype=np.int64)}, "cu_seqlens_k", "int64", "int32", TypeError),
    (PACKED, {"cu_seqlens_k": None}, "cu_seqlens_k", "None", "an int32 array of 3 entries"),
    (PACKED, {"seqused_k": ints(1, 2, 3)}, "seqused_k", r"shape \(3,\)", r"\(2,\)"),
    (PACKED, {"seqused_k": ints(1, 2, 3), "lengths_name": "cache_seqlens"}, "cache_seqlens", r"\(3,\)", r"\(2,\)"),
    (PACKED, {"max_seqlen_q": -1}, "max_seqlen_q", "-1", "at least 0"),
    (PACKED, {"max_seqlen_k": 2.0}, "max_seqlen_k", "2.0", "an int", TypeError),
    (PACKED, {"max_seqlen_k": True}, "max_seqlen_k", "True", "an int", TypeError),
    # caches
    (PAGED, {"block_table": array(2, 3, dtype=np.int64)}, "block_table", "int64", "int32", TypeError),
    (PAGED, {"block_table": ints(1, 2)}, "block_table", "1-D", "2-D"),
    (PAGED, {"block_table": array(3, 3, dtype=np.int32)}, "block_table", "3 rows", "one for each of the 2 sequences"),
    (PAGED, {"block_table": view(np.zeros((3, 2), np.int32).T)}, "block_table", "stride 2 in the last", "contiguous"),
    (PAGED, {"k": array(9, 0, 4, 64), "v": array(9, 0, 4, 64)}, "k", "block_size 0", "at least 1"),
    (PAGED, {"cache_batch_idx": ints(0, 1)}, "cache_batch_idx", "given together with block_table", "one of the two"),
    (PAGED, {"layout": "NHWC"}, "layout", "'NHWC'", "'NHD' or 'HND'"),
    (DENSE, {"layout": "HND"}, "layout", "'HND' without block_table", "'NHD'"),
    (DENSE, {"cache_batch_idx": array(2, dtype=np.int64)}, "cache_batch_idx", "int64", "int32", TypeError),
    (DENSE, {"cache_leftpad": ints(0, 0, 0)}, "cache_leftpad", r"shape \(3,\)", r"\(2,\)"),
    # packed queries over keys that are not packed
    (PACKED, {"k": array(2, 7, 4, 64), "cu_seqlens_k": None}, "k", "4-D", "3-D packed .*, or block_table for a paged"),
    (PACKED, {"v": array(2, 7, 4, 64)}, "v", "4-D", "3-D packed .*, or block_table for a paged cache"),
    # addresses
    (DENSE, {"q": shifted(DENSE["q"], 1)}, "q", "a misaligned array", "divisible by the 2 bytes"),
    (DENSE, {"k": shifted(DENSE["k"], 1)}, "k", "a misaligned array", "divisible by the 2 bytes"),
    (DENSE, {"v": shifted(DENSE["v"], 1)}, "v", "a misaligned array", "divisible by the 2 bytes"),
    (DENSE, {"out": shifted(DENSE["q"], 1)}, "out", "a misaligned array", "divisible by the 2 bytes"),
    (DENSE, {"sinks": shifted(array(8, **FLOAT32), 2)}, "sinks", "a misaligned array", "divisible by the 4 bytes"),
    (DENSE, {"alibi_slopes": shifted(array(8, **FLOAT32), 1)}, "alibi_slopes", "a misaligned array", "4 bytes"),
    (PACKED, {"cu_seqlens_q": shifted(ints(0, 4, 9), 2)}, "cu_seqlens_q", "a misaligned array", "4 bytes"),
    (PACKED, {"cu_seqlens_k": shifted(ints(0, 4, 9), 1)}, "cu_seqlens_k", "a misaligned array", "4 bytes"),
    (PAGED, {"seqused_k": shifted(ints(0, 4), 3)}, "seqused_k", "a misaligned array", "4 bytes"),
    (PAGED, {"block_table": shifted(array(2, 3, dtype=np.int32), 2)}, "block_table", "a misaligned array", "4 bytes"),
    (DENSE, {"cache_batch_idx": shifted(ints(0, 1), 2)}, "cache_batch_idx", "a misaligned array", "4 bytes"),
    (DENSE, {"cache_leftpad": shifted(ints(0, 1), 2)}, "cache_leftpad", "a misaligned array", "4 bytes"),
    # what kernels count in int32
    (DENSE, {"q": broadcast(2, 2**30, 8, 64)}, "q", f"{2**31} rows in all", r"fewer than 2\*\*31"),
    (PACKED, {"q": broadcast(2**31, 8, 64)}, "q", f"{2**31} rows in all", r"fewer than 2\*\*31"),
    (DENSE, {name: broadcast(2, 2**31, 4, 64) for name in "kv"}, "k", f"{2**31} rows for a sequence", "fewer"),
    (PACKED, {name: broadcast(2**31, 4, 64) for name in "kv"}, "k", f"{2**31} rows", "fewer"),
    (PAGED, {name: broadcast(2**31, 16, 4, 64) for name in "kv"}, "k", f"{2**31} blocks", "fewer"),
    (PAGED, {name: broadcast(2, 2**30, 4, 64) for name in "kv"}, "block_table", f"{3 * 2**30} rows", "fewer"),
    # what to do instead
    (
        DENSE,
        {"q": array(2, 5, 8, 64, dtype=np.float64)},
        "q",
        "float64",
        r"q.astype\(np.float32\), with kernel='numpy_f",
        TypeError,
    ),
    (
        DENSE,
        {"q": moved(array(2, 5, 8, 64, dtype=np.float64), library="torch")},
        "q",
        "float64",
        r"q.to\(torch.float32\)",
        TypeError,
    ),
    (
        PAGED,
        {"seqused_k": array(2, dtype=np.int64)},
        "seqused_k",
        "int64",
        r"int32: pass seqused_k.astype\(np.int32\)",
        TypeError,
    ),
    (
        PAGED,
        {name: array(10, 4, 3, 64) for name in "kv"},
        "k",
        "3 heads where q has 8",
        "or layout='HND', as axis 1 would fit",
    ),
    # masks
    (DENSE, {"softmax_scale": 1e39}, "softmax_scale", r"1e\+39", "at most 3.4e"),
    (DENSE, {"softmax_scale": 1e-60}, "softmax_scale", "1e-60", "float32 does not round to 0"),
    (DENSE, {"softmax_scale": 10**400}, "softmax_scale", "too large for any float", "at most 3.4e"),
    (DENSE, {"softcap": 1e39}, "softcap", r"1e\+39", "at most 3.4e"),
    (DENSE, {"softcap": 1e-60}, "softcap", "1e-60", "float32 does not round to 0"),
    (DENSE, {"softcap": 10**5000}, "softcap", "too large for any float", "at most 3.4e"),
    (DENSE, {"window": (-2, 0)}, "window", r"\(-2, 0\)", "-1"),
    (DENSE, {"window": (0, -7)}, "window", r"\(0, -7\)", "-1"),
    (DENSE, {"window": 5}, "window", "5", r"\(left, right\) as two ints", TypeError),
    (DENSE, {"window": (1, 2, 3)}, "window", r"\(1, 2, 3\)", "two ints", TypeError),
    (DENSE, {"window": (1.5, 2)}, "window", r"\(1.5, 2\)", "two ints", TypeError),
    (DENSE, {"window": {0, 5}}, "window", r"\{0, 5\}", "two ints", TypeError),
    (DENSE, {"window": np.array([0, 5])}, "window", r"array\(\[0, 5\]\)", "two ints", TypeError),
    (DENSE, {"window": "12"}, "window", "'12'", "two ints", TypeError),
    (DENSE, {"causal": "yes"}, "causal", "'yes'", "True or False", TypeError),
    (DENSE, {"causal": 2}, "causal", "2", "True or False", TypeError),
    (DENSE, {"return_lse": None}, "return_lse", "None", "True, False, 'log2' or 'flash_attn'", TypeError),
    (DENSE, {"return_lse": "base2"}, "return_lse", "'base2'", "True, False, 'log2' or 'flash_attn'", TypeError),
    (DENSE, {"return_lse": 2}, "return_lse", "2", "True, False, 'log2' or 'flash_attn'", TypeError),
    (DENSE, {"return_lse": 1.0}, "return_lse", "1.0", "True, False, 'log2' or 'flash_attn'", TypeError),
    (DENSE, {"return_lse": ("log2",)}, "return_lse", r"\('log2',\)", "True, False, 'log2' or 'flash_attn'", TypeError),
    (DENSE, {"softmax_scale": float("nan")}, "softmax_scale", "nan", "a finite number"),
    (DENSE, {"softmax_scale": float("inf")}, "softmax_scale", "inf", "a finite number"),
    (DENSE, {"softmax_scale": "0.1"}, "softmax_scale", "'0.1'", "a number", TypeError),
    (DENSE, {"softmax_scale": True}, "softmax_scale", "True", "a number", TypeError),
    (DENSE, {"softmax_scale": np.array(0.1)}, "softmax_scale", "array", "a number", TypeError),
    (DENSE, {"softcap": -1.0}, "softcap", "-1.0", "a positive number"),
    (DENSE, {"softcap": float("nan")}, "softcap", "nan", "a finite number"),
    (DENSE, {"alibi_slopes": array(8)}, "alibi_slopes", "float16", "float32", TypeError),
    (DENSE, {"alibi_slopes": array(4, **FLOAT32)}, "alibi_slopes", r"shape \(4,\)", r"\(8,\) or \(2, 8\)"),
    (DENSE, {"alibi_slopes": view(np.zeros(16, np.float32)[::2])}, "alibi_slopes", r"strides \(2,\)", "contiguous"),
    (DENSE, {"sinks": array(8)}, "sinks", "float16", "float32", TypeError),
    (DENSE, {"sinks": array(2, 8, **FLOAT32)}, "sinks", r"shape \(2, 8\)", r"\(8,\)"),
    # out
    (DENSE, {"out": array(2, 5, 8, 32)}, "out", r"shape \(2, 5, 8, 32\)", r"q's shape \(2, 5, 8, 64\)"),
    (DENSE, {"out": array(2, 5, 8, 64, **FLOAT32)}, "out", "float32", "q's dtype float16", TypeError),
    (DENSE, {"out": array(2, 5, 8, 64), "out_dtype": "float64"}, "out", "float16", "float64", TypeError),
    (DENSE, {"out": READ_ONLY}, "out", "a read-only numpy array", "a writable one"),
    (DENSE, {"out": moved(READ_ONLY, library="jax")}, "out", "JAX arrays are immutable", "CuPy array on CUDA, a NumPy"),
    (DENSE, {"out": moved(array(2, 5, 8, 64), strides=(0, 512, 64, 1))}, "out", "overlaps itself", "distinct"),
    (DENSE, {"out": view(np.zeros((2, 5, 8, 128), np.float16)[..., ::2])}, "out", "stride 2 in the last", "contiguous"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[2]}: {case[3]}")
def test_bad_arguments_are_refused_by_name(case):
    base, changes, argument, came, expected, *kind = case
    with refused(argument, came, expected, *kind):
        describe(**base | changes)


def test_a_paged_cache_needs_lengths_when_queries_are_packed():
    with refused("cu_seqlens_k", "None", "it or seqused_k"):
        describe(**PAGED | {"q": array(9, 8, 64), "cu_seqlens_q": ints(0, 4, 9), "seqused_k": None})


def test_complaints_use_the_names_of_the_callers_signature():
    with refused("k_cache", "batch 3", "q's batch 2"):
        describe(array(2, 5, 8, 64), *[array(3, 7, 4, 64)] * 2, k_name="k_cache", v_name="v_cache")


# ------------------------------------------------------------------------------------------------- caches of FP8


def fp8_step(dtype=np.uint8, **options):
    q, cache = array(2, 1, 8, 64), array(10, 16, 4, 64, dtype=dtype)
    table = view(np.zeros((2, 3), np.int32))
    return describe(q, cache, cache, block_table=table, seqused_k=ints(7, 8), k_name="k_cache", **options)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_an_fp8_cache_is_bytes_or_the_librarys_own(name):
    scales = {"k_scale": 0.5, "v_scale": view(np.ones(4, np.float32))}
    own = fp8_step(np.dtype(name), **scales)
    assert (own.dtype, own.kv_dtype, own.itemsize, own.kv_itemsize) == ("float16", name, 2, 1)
    assert (own.k_scale, own.k_scales, own.v_scale, own.v_scales) == (0.5, "", 1.0, "heads")
    for said in (name, name[7:].removesuffix("fn")):
        assert fp8_step(kv_dtype=said, **scales) == fp8_step(np.dtype(name), kv_dtype=said, **scales) == own


@pytest.mark.parametrize(
    ("scale", "number", "kind"),
    [
        (0.1, float(np.float32(0.1)), ""),
        (np.float64(2), 2.0, ""),
        (3, 3.0, ""),
        (view(np.array(0.1, np.float32)), 1.0, "tensor"),
        (view(np.ones(1, np.float32)), 1.0, "tensor"),
        (view(np.ones(4, np.float32)), 1.0, "heads"),
    ],
)
def test_scales_are_numbers_by_value_or_arrays_that_are_not_read(scale, number, kind):
    problem = fp8_step(kv_dtype="e4m3", k_scale=scale, v_scale=1)
    assert (problem.k_scale, problem.k_scales) == (number, kind)
    precise = fp8_step(kv_dtype="e4m3", k_scale=0.1, v_scale=1, out_dtype="float64")
    assert precise.k_scale == 0.1


def test_alignment_counts_each_arrays_own_bytes():
    q, cache = array(1, 1, 2, 24), array(1, 4, 2, 24, dtype=np.uint8)
    scaled = {"kv_dtype": "e5m2", "k_scale": 1, "v_scale": 1, "k_name": "k_cache"}
    assert describe(moved(q, pointer=64), *[moved(cache, pointer=64)] * 2, **scaled).alignment == 8
    assert describe(moved(q, pointer=64), *[moved(cache, pointer=67)] * 2, **scaled).alignment == 1
    new = {"k": moved(q, pointer=64), "v": moved(q, pointer=72)}
    del scaled["k_name"]
    caches = [moved(cache, pointer=64), moved(cache, pointer=256)]
    assert describe_append(*caches, **new, **scaled).alignment == 8


def test_fp8_is_for_caches():
    fp8 = array(2, 7, 4, 64, dtype=np.dtype("float8_e5m2"))
    with refused("k", "float8_e5m2", "q's dtype float16", TypeError):
        describe(**DENSE | {"k": fp8, "v": fp8})
    with refused("q", "float8_e5m2", "float16 or bfloat16 or float32", TypeError):
        describe(**DENSE | {"q": array(2, 5, 8, 64, dtype=np.dtype("float8_e5m2"))})
    with refused("v", "float16", "uint8 or float8_e5m2, as kv_dtype says", TypeError):
        describe(**DENSE | {"k": fp8}, k_name="k_cache", k_scale=1, v_scale=1)
    with refused("q", "float32", "float16 or bfloat16 beside an FP8 cache on CUDA", TypeError):
        on_cuda = [moved(array(2, 5, 8, 64, **FLOAT32), device=0), *[moved(fp8, device=0)] * 2]
        describe(*on_cuda, k_name="k_cache", k_scale=1, v_scale=1)


# --------------------------------------------------------------------------------------- new rows and rotation

TABLE = array(40, 16)
STEP = dict(
    q=array(2, 3, 8, 64),
    k=array(2, 16, 4, 64),
    v=array(2, 16, 4, 64),
    k_new=array(2, 3, 4, 64),
    v_new=array(2, 3, 4, 64),
    seqused_k=ints(5, 6),
    k_name="k_cache",
)


def test_new_rows_are_described_inside_the_problem():
    problem = describe(**STEP)
    alone = describe_append(STEP["k"], STEP["v"], STEP["k_new"], STEP["v_new"], cache_seqlens=STEP["seqused_k"])
    assert problem.append == alone and problem.seqlen_new == 3 and problem.seqused_k and problem.rotary is None
    uniform = describe(**STEP | {"seqused_k": None}, uniform_length=5)
    assert uniform == problem, "the length itself is no part of it"


@pytest.mark.parametrize(
    ("masks", "per_query"),
    [
        ({}, False),
        ({"window": (-1, -1)}, False),
        ({"causal": True}, True),
        ({"window": (4, -1)}, True),
        ({"window": (-1, 0)}, True),
    ],
    ids=str,
)
def test_queries_follow_positions_under_causal_or_a_window(masks, per_query):
    problem = describe(**STEP | masks, rotary_cos=TABLE, rotary_sin=TABLE, rotary_interleaved=False)
    assert problem.rotary == Rotary(32, False, 40, "float16", per_query)
    assert problem.append.rotary == Rotary(32, False, 40, "float16", True)


def test_tables_may_be_float32_and_cover_a_part_of_a_head():
    table = array(9, 3, **FLOAT32)
    assert describe(**STEP, rotary_cos=table, rotary_sin=table).rotary == Rotary(6, True, 9, "float32", False)


def rotated(positions, **changes):
    table = array(positions, 16)
    return describe(**STEP | changes, rotary_cos=table, rotary_sin=table)


@pytest.mark.parametrize(
    ("changes", "lengths", "needed"),
    [
        ({}, (5, 6), 9),
        ({"causal": True}, (5, 6), 9),
        ({"causal": True, "q": array(2, 7, 8, 64)}, (5, 6), 13),
        ({"q": array(2, 7, 8, 64)}, (5, 6), 9),
        ({"k_new": array(2, 0, 4, 64), "v_new": array(2, 0, 4, 64)}, (5, 6), 7),
        ({"k_new": array(2, 0, 4, 64), "v_new": array(2, 0, 4, 64), "q": array(2, 0, 8, 64)}, (5, 6), 0),
    ],
)
def test_tables_must_reach_the_last_position(changes, lengths, needed):
    check(rotated(needed, **changes), cache_seqlens=lengths)
    check_uniform(rotated(needed, **changes), max(lengths))
    if needed:
        with refused("rotary_cos", f"{needed - 1} positions", f"at least {needed}: sequence 1 holds 6 tokens"):
            check(rotated(needed - 1, **changes), cache_seqlens=lengths)
        with refused("rotary_cos", f"{needed - 1} positions", f"at least {needed}: sequence 0 holds 6 tokens"):
            check_uniform(rotated(needed - 1, **changes), max(lengths))


def test_what_an_append_refuses_is_refused_of_a_step():
    with refused("cache_batch_idx", "the same cache entry twice", "distinct"):
        check(describe(**STEP, cache_batch_idx=ints(0, 0)), cache_seqlens=[5, 6], cache_batch_idx=[1, 1])
    check(describe(**STEP, cache_batch_idx=ints(0, 0)), cache_seqlens=[5, 6], cache_batch_idx=[1, 0])
    with refused("k_cache", "a read-only numpy array", "a writable one"):
        describe(**STEP | {"k": moved(STEP["k"], readonly=True)})
    describe(**STEP | {"k": moved(STEP["k"], readonly=True), "k_new": None, "v_new": None})


@pytest.mark.parametrize(("splits", "kept"), [(0, 0), (7, 7), (np.int32(3), 3), (10**12, 2**31 - 1)])
def test_splits(splits, kept):
    problem = describe(**STEP, num_splits=splits)
    assert problem.num_splits == kept and type(problem.num_splits) is int


# ------------------------------------------------------------------------------------------- describe_append

CACHES = {"k_cache": array(2, 16, 4, 64), "v_cache": array(2, 16, 4, 64)}
NEW = CACHES | {"k": array(2, 3, 4, 64), "v": array(2, 3, 4, 64)}
BLOCKS = {"k_cache": array(10, 16, 4, 64), "v_cache": array(10, 16, 4, 64)}
NEW_PACKED = BLOCKS | {
    "k": array(7, 4, 64),
    "v": array(7, 4, 64),
    "cu_seqlens_new": ints(0, 3, 7),
    "cache_seqlens": ints(0, 5),
    "block_table": view(np.zeros((2, 3), np.int32)),
}


def test_a_dense_append():
    described = describe_append(**NEW)
    assert described == Append(
        dtype="float16",
        batch=2,
        num_kv_heads=4,
        head_dim=64,
        head_dim_v=64,
        packed_new=False,
        total_new=6,
        seqlen_new=3,
        cache=Cache("dense", 2, 16, 0, 0, 0, (4096, 256, 64), (4096, 256, 64)),
        k_strides=(768, 256, 64),
        v_strides=(768, 256, 64),
        cache_batch_idx=False,
        alignment=described.alignment,
        kv_dtype="float16",
        k_scale=1.0,
        k_scales="",
        v_scale=1.0,
        v_scales="",
        rotary=None,
    )
    assert (described.itemsize, described.kv_itemsize) == (2, 2)


@pytest.mark.parametrize(
    ("shape", "strides", "distinct"),
    [
        ((2, 16, 4, 64), (4096, 256, 64, 1), True),
        ((2, 4, 16, 64), (4096, 64, 256, 1), True),
        ((2, 16, 4, 64), (-8192, 256, -64, 1), True),
        ((2, 16, 1, 64), (4096, 256, 0, 1), True),
        ((2, 16, 4, 64), (0, 256, 64, 1), False),
        ((2, 16, 4, 64), (256, 256, 64, 1), False),
        ((2, 16, 4, 64), (4096, 192, 64, 1), False),
        ((2, 16, 4, 64), (4096, 256, 63, 1), False),
        ((2, 16, 4, 64), (4096, -192, 64, 1), False),
        ((0, 16, 4, 64), (0, 0, 0, 1), True),
    ],
)
def test_only_arrays_without_overlap_can_be_written(shape, strides, distinct):
    q = array(*shape)
    out = moved(q, strides=strides)
    if distinct:
        describe(q, q, q, out=out)
        return
    with refused("out", "overlaps itself", "distinct"):
        describe(q, q, q, out=out)
    with refused("k_cache", "overlaps itself", "distinct"):
        describe_append(**NEW | {"k_cache": out})


def test_a_packed_append_into_pages():
    described = describe_append(**NEW_PACKED)
    assert (described.batch, described.total_new, described.seqlen_new, described.packed_new) == (2, 7, 7, True)
    assert described.cache.kind == "paged" and described.k_strides == (0, 256, 64)


BAD_APPENDS = [
    (NEW, {"k": array(3, 4, 64)}, "k", "3-D", r"4-D \(batch, seqlen_new, kv_heads, head_dim\)"),
    (NEW_PACKED, {"v": array(1, 7, 4, 64)}, "v", "4-D", r"3-D \(total_new, kv_heads, head_dim\)"),
    (NEW, {"k": array(2, 3, 4, 64, dtype=np.int32)}, "k", "int32", "float16 or", TypeError),
    (NEW, {"v": array(2, 3, 4, 64, **FLOAT32)}, "v", "float32", "float16", TypeError),
    (NEW, {"v": moved(NEW["v"], device=0)}, "v", "on cuda:0", "device cpu"),
    (NEW, {"v": array(2, 4, 4, 64)}, "v", r"shape \(2, 4, 4, 64\)", "k's shape"),
    (NEW, {"k_cache": array(2, 16, 4, 64, **FLOAT32)}, "k_cache", "float32", "float16", TypeError),
    (NEW, {"v_cache": moved(NEW["v_cache"], device=0)}, "v_cache", "on cuda:0", "device cpu"),
    (NEW, {"k_cache": array(2, 16, 4, 32)}, "k_cache", "head_dim 32", "64, as in k"),
    (NEW, {"v_cache": array(2, 16, 4, 32)}, "v_cache", "head_dim 32", "64, as in v"),
    (NEW, {"v": array(2, 3, 4, 32)}, "v_cache", "head_dim 64", "32, as in v"),
    (NEW, {"v": array(2, 3, 4, 257)}, "v", "head_dim 257", "1 to 256"),
    (NEW, {"v_cache": array(2, 15, 4, 64)}, "v_cache", r"shape \(2, 15, 4, 64\)", "k_cache's shape .*, but for"),
    (NEW, {"k": array(2, 3, 2, 64), "v": array(2, 3, 2, 64)}, "k", "2 heads", "the cache's 4 heads"),
    (NEW, {"k": array(2, 3, 0, 64), "v": array(2, 3, 0, 64)}, "k", "no heads", "at least one head"),
    (NEW, {"k": array(2, 17, 4, 64), "v": array(2, 17, 4, 64)}, "k", "17 new rows", "at most the 16"),
    (NEW, {"k": array(3, 3, 4, 64), "v": array(3, 3, 4, 64)}, "k_cache", "batch 2", "k's batch 3"),
    (NEW, {"k_cache": moved(NEW["k_cache"], readonly=True)}, "k_cache", "a read-only numpy array", "a writable one"),
    (NEW, {"v_cache": moved(NEW["v_cache"], library="jax")}, "v_cache", "JAX arrays are immutable", "from_dlpack"),
    (NEW, {"v_cache": moved(NEW["v_cache"], strides=(0, 256, 64, 1))}, "v_cache", "overlaps itself", "distinct"),
    (NEW, {"k": array(6, 4, 64)}, "k", "3-D", "or cu_seqlens_new for packed rows"),
    (NEW, {"k": shifted(NEW["k"], 1)}, "k", "a misaligned array", "2 bytes"),
    (NEW, {"v_cache": shifted(NEW["v_cache"], 1)}, "v_cache", "a misaligned array", "2 bytes"),
    (NEW, {"cache_seqlens": shifted(ints(0, 1), 2)}, "cache_seqlens", "a misaligned array", "4 bytes"),
    (NEW_PACKED, {"k": broadcast(2**31, 4, 64), "v": broadcast(2**31, 4, 64)}, "k", f"{2**31} rows", "fewer"),
    (
        NEW_PACKED,
        {"k_cache": array(10, 4, 16, 64), "v_cache": array(10, 4, 16, 64)},
        "k",
        "4 heads",
        "16 heads, or layout='HND'",
    ),
    (NEW, {"cache_seqlens": array(2, dtype=np.int64)}, "cache_seqlens", "int64", "int32", TypeError),
    (NEW, {"cache_seqlens": ints(1)}, "cache_seqlens", r"shape \(1,\)", r"\(2,\)"),
    (NEW, {"cache_batch_idx": ints(1)}, "cache_batch_idx", r"shape \(1,\)", r"\(2,\)"),
    (NEW_PACKED, {"cu_seqlens_new": array(0, dtype=np.int32)}, "cu_seqlens_new", "an empty array", r"batch \+ 1"),
    (NEW_PACKED, {"cu_seqlens_new": array(3, dtype=np.int64)}, "cu_seqlens_new", "int64", "int32", TypeError),
    (NEW_PACKED, {"block_table": array(3, 3, dtype=np.int32)}, "block_table", "3 rows", "the 2 sequences"),
]


@pytest.mark.parametrize("case", BAD_APPENDS, ids=lambda case: f"{case[2]}: {case[3]}")
def test_bad_appends_are_refused_by_name(case):
    base, changes, argument, came, expected, *kind = case
    with refused(argument, came, expected, *kind):
        describe_append(**base | changes)


def test_heads_of_size_out_of_range_cannot_be_appended():
    big = {name: array(*found.shape[:-1], 257) for name, found in NEW.items()}
    with refused("k", "head_dim 257", "1 to 256"):
        describe_append(**big)


# --------------------------------------------------------------------------------------------- check_indices


def packed_problem(total_q=9, total_k=11, batch=2, **options):
    q, k = array(total_q, 2, 8), array(total_k, 2, 8)
    index = array(batch + 1, dtype=np.int32)
    return describe(q, k, k, cu_seqlens_q=index, cu_seqlens_k=index, **options)


def new_rows(batch, seqlen_new):
    """New rows for `describe`, or none."""
    return dict.fromkeys(("k_new", "v_new"), array(batch, seqlen_new, 2, 8)) if seqlen_new else {}


def paged_problem(batch=2, blocks=6, block_size=4, max_blocks=3, seqlen_new=0):
    q, k = array(batch, 1, 2, 8), array(blocks, block_size, 2, 8)
    table, lengths = array(batch, max_blocks, dtype=np.int32), array(batch, dtype=np.int32)
    return describe(q, k, k, block_table=table, seqused_k=lengths, **new_rows(batch, seqlen_new))


def paged_append(batch=2, blocks=6, block_size=4, max_blocks=3, seqlen_new=2):
    cache, new = array(blocks, block_size, 2, 8), array(batch, seqlen_new, 2, 8)
    table = array(batch, max_blocks, dtype=np.int32)
    return describe_append(cache, cache, new, new, block_table=table, cache_seqlens=array(batch, dtype=np.int32))


def dense_problem(batch=2, entries=3, capacity=10, seqlen_new=0):
    q, k, index = array(batch, 1, 2, 8), array(entries, capacity, 2, 8), array(batch, dtype=np.int32)
    new = new_rows(batch, seqlen_new)
    return describe(q, k, k, seqused_k=index, cache_batch_idx=index, cache_leftpad=index, **new)


def dense_append(batch=2, entries=3, capacity=10, seqlen_new=2):
    cache, new, index = array(entries, capacity, 2, 8), array(batch, seqlen_new, 2, 8), array(batch, dtype=np.int32)
    return describe_append(cache, cache, new, new, cache_seqlens=index, cache_batch_idx=index)


def check(problem, **arrays):
    check_indices(problem, {name: np.array(values, np.int32) for name, values in arrays.items()})


OUTSIDE = "block 6 at [1, 0], used by sequence 1 of length 1"

BAD_CONTENTS = [
    (packed_problem(), dict(cu_seqlens_q=[1, 4, 9], cu_seqlens_k=[0, 5, 11]), "cu_seqlens_q", "1 as its first", "0"),
    (packed_problem(), dict(cu_seqlens_q=[0, 7, 6], cu_seqlens_k=[0, 5, 11]), "cu_seqlens_q", "7 followed by 6 at", ""),
    (packed_problem(), dict(cu_seqlens_q=[0, 4, 10], cu_seqlens_k=[0, 5, 11]), "cu_seqlens_q", "10 as its last", "9"),
    (packed_problem(), dict(cu_seqlens_q=[0, 4, 9], cu_seqlens_k=[-1, 5, 11]), "cu_seqlens_k", "-1 as its first", "0"),
    (packed_problem(), dict(cu_seqlens_q=[0, 4, 9], cu_seqlens_k=[0, 5, 4]), "cu_seqlens_k", "5 followed by 4", ""),
    (packed_problem(), dict(cu_seqlens_q=[0, 4, 9], cu_seqlens_k=[0, 5, 12]), "cu_seqlens_k", "12 as its last", "11"),
    (
        packed_problem(max_seqlen_q=4),
        dict(cu_seqlens_q=[0, 4, 9], cu_seqlens_k=[0, 5, 11]),
        "max_seqlen_q",
        "4",
        "longest sequence, 5",
    ),
    (
        packed_problem(max_seqlen_k=5),
        dict(cu_seqlens_q=[0, 4, 9], cu_seqlens_k=[0, 5, 11]),
        "max_seqlen_k",
        "5",
        "longest sequence, 6",
    ),
    (
        packed_problem(seqused_k=ints(0, 0)),
        dict(cu_seqlens_q=[0, 4, 9], cu_seqlens_k=[0, 5, 11], seqused_k=[5, 7]),
        "seqused_k",
        "7 tokens for sequence 1",
        "at most the 6",
    ),
    (paged_problem(), dict(seqused_k=[1, 13], block_table=[[0] * 3] * 2), "seqused_k", "13 tokens", "at most the 12"),
    (paged_problem(), dict(cache_seqlens=[1, -1], block_table=[[0] * 3] * 2), "cache_seqlens", "-1", "at least 0"),
    (paged_problem(), dict(seqused_k=[5, 1], block_table=[[0, 1, 9], [6, 9, 9]]), "block_table", OUTSIDE, "0 to 5"),
    (paged_problem(), dict(seqused_k=[5, 1], block_table=[[0, -1, 9], [5, 9, 9]]), "block_table", "block -1", "0 to 5"),
    (
        paged_problem(blocks=0),
        dict(seqused_k=[0, 1], block_table=[[0] * 3] * 2),
        "block_table",
        "block 0",
        "has blocks",
    ),
    (
        paged_problem(seqlen_new=1),
        dict(cache_seqlens=[12, 1], block_table=[[0] * 3] * 2),
        "cache_seqlens",
        "12 tokens for sequence 0 plus 1 new",
        "at most the 12",
    ),
    (
        dense_problem(),
        dict(cache_seqlens=[1, 2], cache_batch_idx=[0, 3]),
        "cache_batch_idx",
        "3 for sequence 1",
        "0 to 2",
    ),
    (dense_problem(), dict(cache_seqlens=[1, 2], cache_leftpad=[2, 0]), "cache_leftpad", "2 for sequence 0", "0 to"),
    (dense_problem(), dict(cache_seqlens=[1, 2], cache_leftpad=[0, -1]), "cache_leftpad", "-1 for sequence 1", "0 to"),
    (
        dense_append(),
        dict(cache_seqlens=[1, 2], cache_batch_idx=[1, 1]),
        "cache_batch_idx",
        "same cache entry twice",
        "distinct",
    ),
    (dense_append(), dict(cache_seqlens=[1, 9], cache_batch_idx=[1, 0]), "cache_seqlens", "9 tokens .*plus 2", "10"),
    (
        paged_append(),
        dict(cache_seqlens=[0, 4], block_table=[[1, 0, 0], [2, 1, 0]]),
        "block_table",
        "block 1 at [1, 1], written twice",
        "a block of its own",
    ),
]


@pytest.mark.parametrize("case", BAD_CONTENTS, ids=lambda case: f"{case[2]}: {case[3]}")
def test_bad_contents_are_refused_by_name(case):
    problem, arrays, argument, came, expected = case
    came = came.replace("[", r"\[").replace("]", r"\]")
    with refused(argument, came, expected):
        check(problem, **arrays)


def test_decreasing_is_noticed_where_the_difference_overflows():
    with refused("cu_seqlens_q", f"{INT_MAX} followed by -5", "never decrease"):
        check(packed_problem(), cu_seqlens_q=[0, INT_MAX, -5], cu_seqlens_k=[0, 0, 0])


def test_spare_entries_of_a_table_may_hold_anything():
    check(paged_problem(), seqused_k=[5, 0], block_table=[[0, 5, -1], [INT_MAX, -1, 99]])


def windowed(left, seqlen_q=1, leftpad=False):
    q, k = array(2, seqlen_q, 2, 8), array(6, 4, 2, 8)
    index = array(2, dtype=np.int32)
    pad = {"cache_leftpad": index} if leftpad else {}
    table = array(2, 3, dtype=np.int32)
    return describe(q, k, k, block_table=table, seqused_k=index, window=(left, 0), **pad)


def test_blocks_that_no_query_sees_may_be_gone():
    table = [[-1, -1, 0], [-1, 1, 2]]
    check(windowed(3), seqused_k=[12, 8], block_table=table)  # the last query of 12 sees 8 to 11
    check(windowed(2, seqlen_q=2), seqused_k=[12, 8], block_table=table)
    with refused("block_table", r"block -1 at \[0, 1\]", "0 to 5"):
        check(windowed(4), seqused_k=[12, 8], block_table=table)
    with refused("block_table", r"block -1 at \[0, 1\]", "0 to 5"):
        check(windowed(3, seqlen_q=2), seqused_k=[12, 8], block_table=table)
    check(windowed(-1, leftpad=True), seqused_k=[12, 8], cache_leftpad=[8, 4], block_table=table)
    with refused("block_table", r"block -1 at \[0, 1\]", "0 to 5"):
        check(windowed(-1, leftpad=True), seqused_k=[12, 8], cache_leftpad=[7, 4], block_table=table)


def test_sequences_may_share_blocks_for_reading():
    check(paged_problem(), seqused_k=[5, 5], block_table=[[3, 1, 0], [3, 2, 0]])


def test_an_append_needs_only_the_blocks_that_it_writes():
    check(paged_append(), cache_seqlens=[4, 8], block_table=[[-1, 2, 0], [-1, -1, 1]])


def test_entries_may_repeat_if_nothing_is_written_to_them():
    check(dense_append(seqlen_new=0), cache_seqlens=[1, 2], cache_batch_idx=[1, 1])


def test_an_append_without_lengths_starts_at_the_beginning():
    check(paged_append(seqlen_new=12), block_table=[[0, 1, 2], [3, 4, 5]])


def test_rows_behind_the_last_sequence_are_fine():
    check(packed_problem(), cu_seqlens_q=[0, 4, 7], cu_seqlens_k=[0, 0, 3])


def test_no_sequences():
    check(packed_problem(batch=0), cu_seqlens_q=[0], cu_seqlens_k=[0])
    check(paged_problem(batch=0), seqused_k=[], block_table=np.zeros((0, 3)))


def accepted(problem, arrays):
    try:
        check(problem, **arrays)
    except ValueError as error:
        argument = str(error).split(":")[0]
        assert argument in (*arrays, "max_seqlen_q", "max_seqlen_k"), error
        assert "np.int" not in str(error)
        return False
    return True


near = st.integers(-2, 14) | st.sampled_from([INT_MAX, -INT_MAX - 1])


def good_cumulative(values, total):
    return values[0] == 0 and all(a <= b for a, b in itertools.pairwise(values)) and values[-1] <= total


@given(
    st.lists(st.integers(0, 6), max_size=4).flatmap(
        lambda lengths: st.tuples(
            st.just(len(lengths)),
            st.just([0, *itertools.accumulate(lengths)])
            | st.lists(near, min_size=len(lengths) + 1, max_size=len(lengths) + 1),
            st.just([0, *itertools.accumulate(lengths[::-1])])
            | st.lists(near, min_size=len(lengths) + 1, max_size=len(lengths) + 1),
        )
    ),
    st.integers(0, 24),
    st.integers(0, 24),
    st.none() | st.integers(0, 8),
)
def test_packed_lengths_are_accepted_exactly_if_they_fit(drawn, total_q, total_k, longest):
    batch, cu_seqlens_q, cu_seqlens_k = drawn
    problem = packed_problem(total_q, total_k, batch, max_seqlen_q=longest, max_seqlen_k=longest)
    good = good_cumulative(cu_seqlens_q, total_q) and good_cumulative(cu_seqlens_k, total_k)
    if good and longest is not None:
        pairs = (*itertools.pairwise(cu_seqlens_q), *itertools.pairwise(cu_seqlens_k))
        good = all(b - a <= longest for a, b in pairs)
    assert accepted(problem, {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}) == good


@st.composite
def paged_indices(draw):
    batch, blocks = draw(st.integers(0, 3)), draw(st.integers(0, 6))
    block_size, max_blocks = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    new = draw(st.integers(0, min(3, block_size * max_blocks)))
    rows = block_size * max_blocks
    length = st.integers(0, max(rows - new, 0)) | near
    block = st.integers(0, max(blocks - 1, 0)) | near
    lengths = draw(st.lists(length, min_size=batch, max_size=batch))
    table = draw(st.lists(st.lists(block, min_size=max_blocks, max_size=max_blocks), min_size=batch, max_size=batch))
    sizes = dict(batch=batch, blocks=blocks, block_size=block_size, max_blocks=max_blocks, seqlen_new=new)
    return sizes, lengths, np.array(table).reshape(batch, max_blocks)


def places(sizes, lengths, table, first):
    """The cache rows of tokens first(length) to the end of every sequence, or None if one does not exist."""
    size, found = sizes["block_size"], []
    for b, length in enumerate(lengths):
        end = length + sizes["seqlen_new"]
        if length < 0 or end > size * sizes["max_blocks"]:
            return None
        for n in range(first(length), end):
            block = int(table[b, n // size])
            if not 0 <= block < sizes["blocks"]:
                return None
            found.append(block * size + n % size)
    return found


@given(paged_indices())
def test_tables_are_accepted_exactly_if_every_token_has_a_block(drawn):
    sizes, lengths, table = drawn
    good = places(sizes, lengths, table, lambda length: 0) is not None
    if good and sizes["seqlen_new"]:
        rows = places(sizes, lengths, table, lambda length: length)
        good = len(set(rows)) == len(rows)
    assert accepted(paged_problem(**sizes), {"cache_seqlens": lengths, "block_table": table}) == good


@given(paged_indices())
def test_appends_are_accepted_exactly_if_every_new_token_has_a_row_of_its_own(drawn):
    sizes, lengths, table = drawn
    rows = places(sizes, lengths, table, lambda length: length)
    good = rows is not None and len(set(rows)) == len(rows)
    assert accepted(paged_append(**sizes), {"cache_seqlens": lengths, "block_table": table}) == good


@given(st.data())
def test_dense_caches_are_accepted_exactly_if_their_indices_fit(data):
    batch, entries, capacity, new = (data.draw(st.integers(0, top)) for top in (3, 4, 8, 3))
    appending = data.draw(st.booleans())
    new = min(new, capacity)
    column = lambda values: data.draw(st.lists(values | near, min_size=batch, max_size=batch))  # noqa: E731
    lengths = column(st.integers(0, capacity))
    index = column(st.integers(0, max(entries - 1, 0)))
    pad = column(st.integers(0, capacity))
    arrays = {"cache_seqlens": lengths, "cache_batch_idx": index}
    good = all(0 <= length <= capacity - new for length in lengths) and all(0 <= entry < entries for entry in index)
    good = good and (new == 0 or len(set(index)) == batch)
    if appending:
        problem = dense_append(batch, entries, capacity, new)
    else:
        problem = dense_problem(batch, entries, capacity, new)
        arrays["cache_leftpad"] = pad
        good = good and all(0 <= p <= length + new for p, length in zip(pad, lengths, strict=True))
    assert accepted(problem, arrays) == good
