"""One attention call, described once: shapes, strides and masks, validated before anything runs.

A `Problem` knows nothing of GPUs and holds no pointer, so that the NumPy backend and the CUDA kernels take
the same one and equal calls share one plan. `describe` builds it from the caller's views; `describe_append`
does the same for writing new keys and values into a cache. Both raise before any launch, with the argument's
name, what came and what was expected. What needs the *contents* of an index array is in `check_indices`.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .arrays import View, device_name, refuse

MAX_HEAD_DIM = 256
FLOAT_DTYPES = ("float16", "bfloat16", "float32")
OTHER_INTEGERS = ("int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64")
FLOAT32_MAX = float(np.finfo(np.float32).max)
COUNTS = 1 << 31  # what kernels count in int32 stays below this
FP8_DTYPES = {"float8_e4m3fn": "float8_e4m3fn", "e4m3": "float8_e4m3fn"}  # what a caller may say: what it means
FP8_DTYPES |= {"float8_e5m2": "float8_e5m2", "e5m2": "float8_e5m2"}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4}
ITEMSIZE |= {"uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}


class LseForm(NamedTuple):
    """How the lse is handed over; kernels_cu/common/lse.cuh has the same fields."""

    factor: float  # of the natural one
    unseen: float  # of a query that sees no key


NATURAL = LseForm(1.0, -math.inf)
# What return_lse may say beside True, which is for the natural one.
LSE_FORMS = {"log2": LseForm(math.log2(math.e), -math.inf), "flash_attn": LseForm(1.0, math.inf)}

Strides = tuple[int, int, int]
"""(outer, row, head) in elements: outer is the batch's, the block's, or 0 for a packed array."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Where keys and values lie: the geometry that attention and append share.

    kind "dense": (batch, seqlen, kv_heads, head_dim); "packed": (total, kv_heads, head_dim); "paged":
    (num_blocks, block_size, kv_heads, head_dim) for NHD, and the two middle axes swapped for HND, which is
    only another pair of strides. The head_dim of values may be another than that of keys.
    """

    kind: str
    entries: int  # dense: sequences held; paged: blocks held; packed: 1
    rows: int  # rows one sequence can hold (dense: seqlen; paged: max_blocks * block_size; packed: total)
    block_size: int  # paged only, else 0
    max_blocks: int  # paged only, else 0: columns of the block table
    table_stride: int  # paged only, else 0: elements from one row of the block table to the next
    k_strides: Strides
    v_strides: Strides


@dataclass(frozen=True, slots=True)
class Rotary:
    """How rows are rotated by their position: the tables are C-contiguous, (positions, dim / 2)."""

    dim: int  # the first elements of each head that are rotated; even
    interleaved: bool  # pairs (0, 1), (2, 3), …; else (i, i + dim / 2)
    positions: int
    dtype: str  # of the tables: the rows' own, or float32
    per_query: bool  # query i is at cache_seqlens + i; else every query is at cache_seqlens. New keys: always so


@dataclass(frozen=True, slots=True)
class Rotation:
    """A validated, frozen description of rotating the rows of one array. Strides count elements."""

    dtype: str
    batch: int
    total: int  # rows of x
    seqlen: int  # dense: rows of a sequence. packed: total
    num_heads: int
    head_dim: int
    packed: bool  # x is (total, heads, head_dim) with cu_seqlens, else (batch, seqlen, heads, head_dim)
    x_strides: Strides
    out_strides: Strides
    alignment: int  # bytes (16, 8, 4 or 2) that divide every address of a row of x and out
    rotary: Rotary  # per_query: row i is at offset + i, else every row at the offset

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Append:
    """A validated, frozen description of writing new keys and values into a cache, in place."""

    dtype: str  # of the new rows
    batch: int
    num_kv_heads: int
    head_dim: int  # of keys
    head_dim_v: int
    packed_new: bool  # new rows are (total, kv_heads, head_dim) with cu_seqlens_new, else (batch, seqlen_new, …)
    total_new: int
    seqlen_new: int  # dense: exact. packed: total_new
    cache: Cache
    k_strides: Strides  # of the new rows
    v_strides: Strides
    cache_batch_idx: bool
    alignment: int  # bytes (16, 8, 4, 2 or 1) that divide every address of a new or a cached row
    kv_dtype: str  # of the cache: the new rows' dtype, or an FP8 one
    k_scale: float  # FP8: what is stored is value / scale
    k_scales: str  # as in Problem
    v_scale: float
    v_scales: str
    rotary: Rotary | None  # new keys are rotated

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def kv_itemsize(self) -> int:
        return ITEMSIZE[self.kv_dtype]


@dataclass(frozen=True, slots=True)
class Problem:
    """A validated, frozen description of one attention call. Lengths count tokens, strides count elements."""

    dtype: str
    kv_dtype: str  # of the keys and values: q's dtype, or an FP8 one
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    head_dim_v: int  # of values and the output
    packed_q: bool  # q is (total_q, heads, head_dim) with cu_seqlens_q, else (batch, seqlen_q, heads, head_dim)
    total_q: int  # rows of q over the whole batch
    seqlen_q: int  # dense: exact. packed: the longest sequence if the caller said so, else total_q
    seqlen_k: int  # the most keys that one sequence can see, new ones included
    seqlen_new: int  # keys appended by this call: they extend every used length
    cache: Cache
    q_strides: Strides
    o_strides: Strides
    window: tuple[int, int]  # (left, right) after causal was folded in; -1 is unbounded
    softmax_scale: float
    softcap: float  # 0.0: none
    alibi: str  # "", "heads" or "batch_heads"
    sinks: bool
    lse: bool
    cu_seqlens_k: bool
    seqused_k: bool  # used lengths are given, as an array or as one number for all
    cache_batch_idx: bool
    leftpad: bool
    alignment: int  # bytes (16, 8, 4, 2 or 1) that divide every address of a q, k or v row
    out_alignment: int  # the same for the output
    k_scale: float  # FP8: a key is what is stored times this, unless k_scales says that an array is read instead
    k_scales: str  # "", or an array of float32: "tensor" holds one number, "heads" one for each kv head
    v_scale: float
    v_scales: str
    num_splits: int  # the most pieces that one sequence's keys are cut into; 0: as the plan finds best
    rotary: Rotary | None  # queries are rotated
    append: Append | None  # new keys and values are written first, and attended to
    lse_form: LseForm = NATURAL

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def kv_itemsize(self) -> int:
        return ITEMSIZE[self.kv_dtype]


def describe(
    q: View,
    k: View,
    v: View,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: View | None = None,
    sinks: View | None = None,
    out: View | None = None,
    return_lse: bool | str = False,
    cu_seqlens_q: View | None = None,
    cu_seqlens_k: View | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: View | None = None,
    block_table: View | None = None,
    cache_batch_idx: View | None = None,
    cache_leftpad: View | None = None,
    uniform_length: int | None = None,
    k_new: View | None = None,
    v_new: View | None = None,
    rotary_cos: View | None = None,
    rotary_sin: View | None = None,
    rotary_interleaved: bool = True,
    kv_dtype: str | None = None,
    k_scale: View | float | None = None,
    v_scale: View | float | None = None,
    num_splits: int = 0,
    layout: str = "NHD",
    out_dtype: str | None = None,
    k_name: str = "k",
    v_name: str = "v",
    lengths_name: str = "seqused_k",
) -> Problem:
    """The `Problem` of one call. Raises ValueError or TypeError naming the argument at fault.

    q is 4-D (batch, seqlen_q, heads, head_dim), or 3-D (total_q, heads, head_dim) with cu_seqlens_q.
    k and v are 4-D dense, 3-D packed with cu_seqlens_k, or 4-D paged with block_table, v and out with a head_dim of
    their own. With k_new and v_new (4-D, q dense) they are a cache that is appended to; of uniform_length, a length for
    all, only the presence counts here.
    out_dtype is what `out` must have, q's if None. The `_name`s are what the caller's signature calls the roles.
    """
    packed_q = cu_seqlens_q is not None
    if packed_q:
        check_rank("q", q, 3, "(total_q, heads, head_dim)")
    else:
        check_rank("q", q, 4, "(batch, seqlen_q, heads, head_dim)")
    _float_dtype("q", q)
    check_rows("q", q)
    _check_head_dim("q", q)
    head_dim, num_heads = q.shape[-1], q.shape[-2]
    if num_heads == 0:
        refuse("q", f"shape {q.shape} with no heads", "at least one head")

    if packed_q:
        check_index_array("cu_seqlens_q", cu_seqlens_q, q, ndim=1)
        if cu_seqlens_q.shape[0] < 1:
            refuse("cu_seqlens_q", "an empty array", "batch + 1 entries, the first of them 0")
        batch = cu_seqlens_q.shape[0] - 1
        total_q = q.shape[0]
        seqlen_q = total_q if max_seqlen_q is None else min(_length("max_seqlen_q", max_seqlen_q), total_q)
    else:
        batch, seqlen_q = q.shape[:2]
        total_q = batch * seqlen_q
    check_countable("q", total_q, "rows in all")
    check_countable("q", num_heads, "heads")

    if packed_q and block_table is None:
        for name, keys in ((k_name, k), (v_name, v)):
            check_rank(name, keys, 3, "packed (total_k, kv_heads, head_dim), or block_table for a paged cache")
        if cu_seqlens_k is None:
            refuse("cu_seqlens_k", None, f"an int32 array of {batch + 1} entries for packed keys")
    kv_dtype = _kv_dtype(kv_dtype, k, q, k_name)
    names = (k_name, v_name)
    cache = _cache_geometry(k, v, q, kv_dtype, batch, cu_seqlens_k, block_table, cache_batch_idx, layout, *names)
    head_dim_v = v.shape[-1]
    out_shape = (*q.shape[:-1], head_dim_v)
    num_kv_heads = k.shape[1] if cache.kind == "packed" else k.shape[_heads_axis(cache, layout)]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        hint = _layout_hint(cache, layout, lambda heads: heads and num_heads % heads == 0, k.shape)
        expected = f"a number of kv heads that divides q's heads{hint}"
        refuse(k_name, f"{num_kv_heads} heads where q has {num_heads}", expected)
    if cu_seqlens_k is not None:
        check_index_array("cu_seqlens_k", cu_seqlens_k, q, shape=(batch + 1,))
    if cache.kind == "paged" and cu_seqlens_k is None and seqused_k is None and packed_q:
        refuse("cu_seqlens_k", None, "it or seqused_k: a paged cache alone does not say how long a sequence is")
    for name, view in (
        (lengths_name, seqused_k),
        ("cache_batch_idx", cache_batch_idx),
        ("cache_leftpad", cache_leftpad),
    ):
        if view is not None:
            check_index_array(name, view, q, shape=(batch,))

    seqlen_k = cache.rows
    if max_seqlen_k is not None:
        seqlen_k = min(_length("max_seqlen_k", max_seqlen_k), seqlen_k)
    if out is not None:
        check_output("out", out, q, out_dtype or q.dtype, head_dim_v)
    precise = out_dtype == "float64"
    folded_window = _window(window, check_flag("causal", causal))
    scales = _scales(k_scale, v_scale, q, num_kv_heads, kv_dtype, precise)
    append = None
    if k_new is not None or v_new is not None:
        _check_new_rows(k_new, v_new, q, seqused_k is not None or uniform_length is not None)
        append = describe_append(
            k,
            v,
            k_new,
            v_new,
            cache_seqlens=seqused_k,
            block_table=block_table,
            cache_batch_idx=cache_batch_idx,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            kv_dtype=kv_dtype if kv_dtype in FP8_DTYPES else None,
            k_scale=k_scale,
            v_scale=v_scale,
            layout=layout,
            precise=precise,
        )
    rotary = describe_rotary(rotary_cos, rotary_sin, rotary_interleaved, q, per_query=folded_window != (-1, -1))
    if rotary is not None and append is None:
        refuse("k", None, "the new keys that go with the queries, when rotary_cos and rotary_sin are given")
    lse, lse_form = _lse(return_lse)
    return Problem(
        dtype=q.dtype,
        kv_dtype=kv_dtype,
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        packed_q=packed_q,
        total_q=total_q,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        seqlen_new=append.seqlen_new if append is not None else 0,
        cache=cache,
        q_strides=row_strides(q, packed_q),
        o_strides=row_strides(out, packed_q) if out is not None else contiguous_row_strides(out_shape, packed_q),
        window=folded_window,
        softmax_scale=_scale(softmax_scale, head_dim, precise),
        softcap=_softcap(softcap, precise),
        alibi=_alibi(alibi_slopes, q, batch, num_heads),
        sinks=_sinks(sinks, q, num_heads),
        lse=lse,
        cu_seqlens_k=cu_seqlens_k is not None,
        seqused_k=seqused_k is not None or uniform_length is not None,
        cache_batch_idx=cache_batch_idx is not None,
        leftpad=cache_leftpad is not None,
        alignment=row_alignment(q, k, v),
        out_alignment=row_alignment(out) if out is not None else contiguous_row_alignment(head_dim_v, q.dtype),
        k_scale=scales[0],
        k_scales=scales[1],
        v_scale=scales[2],
        v_scales=scales[3],
        num_splits=_splits(num_splits),
        rotary=rotary,
        append=append,
        lse_form=lse_form,
    )


def describe_append(
    k_cache: View,
    v_cache: View,
    k: View,
    v: View,
    *,
    cu_seqlens_new: View | None = None,
    cache_seqlens: View | None = None,
    block_table: View | None = None,
    cache_batch_idx: View | None = None,
    rotary_cos: View | None = None,
    rotary_sin: View | None = None,
    rotary_interleaved: bool = True,
    kv_dtype: str | None = None,
    k_scale: View | float | None = None,
    v_scale: View | float | None = None,
    layout: str = "NHD",
    precise: bool = False,
) -> Append:
    """The `Append` of one write into a cache. Raises ValueError or TypeError naming the argument at fault.

    precise: numbers are kept in float64, as for a call that computes in it.
    """
    packed = cu_seqlens_new is not None
    form = "(total_new, kv_heads, head_dim)" if packed else "(batch, seqlen_new, kv_heads, head_dim)"
    for name, view in (("k", k), ("v", v)):
        if not packed and len(view.shape) == 3:
            form += ", or cu_seqlens_new for packed rows"
        check_rank(name, view, 3 if packed else 4, form)
        _float_dtype(name, view)
        _check_head_dim(name, view)
        check_rows(name, view)
    _same_rows("v", v, "k", k)
    same_kind("v", v, k, "k")
    if k.shape[-2] == 0:
        refuse("k", f"shape {k.shape} with no heads", "at least one head")
    if packed:
        check_index_array("cu_seqlens_new", cu_seqlens_new, k, ndim=1)
        if cu_seqlens_new.shape[0] < 1:
            refuse("cu_seqlens_new", "an empty array", "batch + 1 entries, the first of them 0")
        batch, total = cu_seqlens_new.shape[0] - 1, k.shape[0]
        seqlen_new = total
    else:
        batch, seqlen_new = k.shape[:2]
        total = batch * seqlen_new
    check_countable("k", total, "rows in all")
    names = ("k_cache", "v_cache")
    kv_dtype = _kv_dtype(kv_dtype, k_cache, k, "k_cache", "k")
    cache = _cache_geometry(
        k_cache, v_cache, k, kv_dtype, batch, None, block_table, cache_batch_idx, layout, *names, "k"
    )
    heads_axis = _heads_axis(cache, layout)
    if k_cache.shape[heads_axis] != k.shape[-2]:
        hint = _layout_hint(cache, layout, lambda heads: heads == k.shape[-2], k_cache.shape)
        refuse("k", f"{k.shape[-2]} heads", f"the cache's {k_cache.shape[heads_axis]} heads{hint}")
    if v_cache.shape[-1] != v.shape[-1]:
        refuse("v_cache", f"head_dim {v_cache.shape[-1]}", f"{v.shape[-1]}, as in v")
    if not packed and batch and seqlen_new > cache.rows:
        refuse("k", f"{seqlen_new} new rows for a sequence", f"at most the {cache.rows} that the cache holds for one")
    for name, view in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_writable(name, view)
    for name, view in (("cache_seqlens", cache_seqlens), ("cache_batch_idx", cache_batch_idx)):
        if view is not None:
            check_index_array(name, view, k, shape=(batch,))
    scales = _scales(k_scale, v_scale, k, k.shape[-2], kv_dtype, precise)
    return Append(
        dtype=k.dtype,
        batch=batch,
        num_kv_heads=k.shape[-2],
        head_dim=k.shape[-1],
        head_dim_v=v.shape[-1],
        packed_new=packed,
        total_new=total,
        seqlen_new=seqlen_new,
        cache=cache,
        k_strides=row_strides(k, packed),
        v_strides=row_strides(v, packed),
        cache_batch_idx=cache_batch_idx is not None,
        alignment=row_alignment(k, v, k_cache, v_cache),
        kv_dtype=kv_dtype,
        k_scale=scales[0],
        k_scales=scales[1],
        v_scale=scales[2],
        v_scales=scales[3],
        rotary=describe_rotary(rotary_cos, rotary_sin, rotary_interleaved, k, per_query=True),
    )


SCALE_ROLES = ("k_scale", "v_scale")


def check_indices(problem: Problem | Append, arrays: Mapping[str, np.ndarray]) -> None:
    """Check the contents of the index arrays (host copies) against a problem; raises ValueError.

    Keys: cu_seqlens_q, cu_seqlens_k, cu_seqlens_new, seqused_k or cache_seqlens (complaints use the name that
    came), block_table, cache_batch_idx, cache_leftpad, and the scales k_scale and v_scale; absent ones are skipped. On
    a device this costs a synchronisation, so callers ask for it.
    """
    appending = isinstance(problem, Append)
    for name in SCALE_ROLES:
        numbers = np.ravel(arrays.get(name, ()))
        if len(bad := np.flatnonzero(~((numbers > 0) & np.isfinite(numbers)))):
            refuse(name, f"{numbers[bad[0]]} at [{bad[0]}]", "finite numbers above 0")
    arrays = {name: values for name, values in arrays.items() if name not in SCALE_ROLES}
    if not appending and problem.append is not None:
        check_indices(problem.append, arrays)
    arrays = {name: values.astype(np.int64) for name, values in arrays.items()}  # differences of int32 can overflow
    cache = problem.cache
    batch = problem.batch
    if not appending and problem.packed_q:
        check_cumulative("cu_seqlens_q", arrays["cu_seqlens_q"], problem.total_q, "q's rows")
        longest = int(np.diff(arrays["cu_seqlens_q"]).max(initial=0))
        if longest > problem.seqlen_q:
            refuse("max_seqlen_q", problem.seqlen_q, f"at least the longest sequence, {longest}")
    if appending and problem.packed_new:
        check_cumulative("cu_seqlens_new", arrays["cu_seqlens_new"], problem.total_new, "k's rows")
        new = np.diff(arrays["cu_seqlens_new"])
    else:
        new = np.full(batch, problem.seqlen_new, dtype=np.int64)

    capacity = np.full(batch, cache.rows, dtype=np.int64)
    lengths = capacity.copy()
    if "cu_seqlens_k" in arrays:
        limit = cache.rows if cache.kind == "packed" else np.iinfo(np.int32).max
        check_cumulative("cu_seqlens_k", arrays["cu_seqlens_k"], limit, "k's rows")
        lengths = np.diff(arrays["cu_seqlens_k"])
        capacity = lengths if cache.kind == "packed" else capacity
    length_name = "cu_seqlens_k"
    for name in ("seqused_k", "cache_seqlens"):
        if name in arrays:
            length_name, lengths = name, arrays[name]
    if appending and length_name == "cu_seqlens_k":  # no lengths came: new rows start at 0
        lengths = np.zeros(batch, dtype=np.int64)
    if appending or problem.seqused_k:
        lengths = lengths + new
    if (bad := first_true(lengths - new < 0)) is not None:
        refuse(length_name, f"{int(lengths[bad] - new[bad])} for sequence {bad}", "a length of at least 0")
    if (bad := first_true(lengths > capacity)) is not None:
        came = f"{int(lengths[bad] - new[bad])} tokens for sequence {bad}"
        came += f" plus {int(new[bad])} new" if new[bad] else ""
        refuse(length_name, came, f"at most the {int(capacity[bad])} that its rows hold")
    if not appending and (bad := first_true(lengths > problem.seqlen_k)) is not None:
        refuse("max_seqlen_k", problem.seqlen_k, f"at least the longest sequence, {int(lengths[bad])}")
    if problem.rotary is not None:
        _check_positions(problem, lengths - new, new)
    if "cache_leftpad" in arrays:
        pad = arrays["cache_leftpad"]
        if (bad := first_true((pad < 0) | (pad > lengths))) is not None:
            refuse("cache_leftpad", f"{int(pad[bad])} for sequence {bad}", f"0 to its length {int(lengths[bad])}")
    if "cache_batch_idx" in arrays:
        index = arrays["cache_batch_idx"]
        if (bad := first_true((index < 0) | (index >= cache.entries))) is not None:
            refuse("cache_batch_idx", f"{int(index[bad])} for sequence {bad}", f"0 to {cache.entries - 1}")
        written = index[new > 0]
        if appending and len(np.unique(written)) != len(written):
            refuse("cache_batch_idx", "the same cache entry twice", "distinct entries: each is written by one sequence")
    if "block_table" in arrays:
        # An append touches only the rows that it writes.
        first = lengths - new if appending else _first_rows(problem, arrays, lengths)
        _check_table(arrays["block_table"], cache, first, lengths)
        if appending:
            _check_distinct_rows(arrays["block_table"], cache, lengths - new, new)


def check_uniform(problem: Problem | Append, length: int) -> None:
    """Refuse a length that an int gave to all sequences, in the words of `check_indices`; nothing is read."""
    new, rows = problem.seqlen_new, problem.cache.rows
    if isinstance(problem, Append) and problem.packed_new:
        new = 0
    if length < 0:
        refuse("cache_seqlens", length, "a length of at least 0")
    if length > rows - new:
        came = f"{length} tokens plus {new} new" if new else f"{length} tokens"
        refuse("cache_seqlens", came, f"at most the {rows} that its rows hold")
    if problem.rotary is not None and problem.batch:
        _check_positions(problem, np.array([length]), np.array([new]))


def longest_uniform(problem: Problem) -> int:
    """The largest length that `check_uniform` accepts."""
    longest = problem.cache.rows - problem.seqlen_new
    if problem.rotary is None or not problem.batch:
        return longest
    reach = int(_positions_reached(problem, problem.seqlen_new))
    return min(longest, problem.rotary.positions - reach) if reach else longest


def _positions_reached(problem: Problem | Append, new: np.ndarray | int) -> np.ndarray | np.integer:
    """How many positions, from a sequence's length on, its new keys and its queries are rotated at."""
    if isinstance(problem, Append):
        return new
    return np.maximum(new, problem.seqlen_q if problem.rotary.per_query else min(problem.seqlen_q, 1))


def _check_positions(problem: Problem | Append, start: np.ndarray, new: np.ndarray) -> None:
    """The tables must have every position that a new key, or a query, is rotated at."""
    rotary, reach = problem.rotary, _positions_reached(problem, new)
    if (bad := first_true((reach > 0) & (start + reach > rotary.positions))) is not None:
        needed = int(start[bad] + reach[bad])
        expected = f"at least {needed}: sequence {bad} holds {int(start[bad])} tokens before this call"
        refuse("rotary_cos", f"{rotary.positions} positions", expected)


def _cache_geometry(
    k: View,
    v: View,
    like: View,
    kv_dtype: str,
    batch: int,
    cu_seqlens_k: View | None,
    block_table: View | None,
    cache_batch_idx: View | None,
    layout: str,
    k_name: str,
    v_name: str,
    like_name: str = "q",
) -> Cache:
    if layout not in ("NHD", "HND"):
        refuse("layout", repr(layout), "'NHD' or 'HND'")
    packed = cu_seqlens_k is not None and block_table is None
    if block_table is not None and layout == "NHD":
        form = "(num_blocks, block_size, kv_heads, head_dim)"
    elif block_table is not None:
        form = "(num_blocks, kv_heads, block_size, head_dim)"
    elif packed:
        form = "(total_k, kv_heads, head_dim)"
    else:
        form = "(batch, seqlen_k, kv_heads, head_dim)"
        if layout == "HND":
            refuse("layout", "'HND' without block_table", "'NHD': for a dense cache pass a transposed view instead")
    for name, view in ((k_name, k), (v_name, v)):
        check_rank(name, view, 3 if packed else 4, form)
        _cache_kind(name, view, like, like_name, kv_dtype)
        check_rows(name, view)
    if k.shape[-1] != like.shape[-1]:
        refuse(k_name, f"head_dim {k.shape[-1]}", f"{like.shape[-1]}, as in {like_name}")
    _same_rows(v_name, v, k_name, k)
    _check_head_dim(v_name, v)
    check_countable(k_name, k.shape[0], {3: "rows", 4: "sequences" if block_table is None else "blocks"}[len(k.shape)])
    if packed:
        return Cache("packed", 1, k.shape[0], 0, 0, 0, row_strides(k, True), row_strides(v, True))
    if block_table is None:
        if cache_batch_idx is None and k.shape[0] != batch:
            hint = "; for a paged cache pass block_table, for a larger dense one cache_batch_idx"
            hint = hint if k_name == "k_cache" else ""
            refuse(k_name, f"batch {k.shape[0]}", f"{like_name}'s batch {batch}{hint}")
        check_countable(k_name, k.shape[1], "rows for a sequence")
        return Cache("dense", k.shape[0], k.shape[1], 0, 0, 0, row_strides(k, False), row_strides(v, False))
    if cache_batch_idx is not None:
        refuse("cache_batch_idx", "given together with block_table", "one of the two")
    check_index_array("block_table", block_table, like, ndim=2, rows_contiguous=True)
    if block_table.shape[0] != batch:
        refuse("block_table", f"{block_table.shape[0]} rows", f"one for each of the {batch} sequences")
    block_size = k.shape[1 if layout == "NHD" else 2]
    if block_size < 1:
        refuse(k_name, f"block_size {block_size}", "at least 1")
    swap = layout == "HND"
    max_blocks = block_table.shape[1]
    check_countable("block_table", max_blocks * block_size, "rows for a sequence")
    check_countable("block_table", abs(block_table.strides[0]), "elements from row to row")
    return Cache(
        "paged",
        k.shape[0],
        max_blocks * block_size,
        block_size,
        max_blocks,
        block_table.strides[0],
        row_strides(k, False, swap),
        row_strides(v, False, swap),
    )


def _same_rows(v_name: str, v: View, k_name: str, k: View) -> None:
    """Refuse values that do not lie as the keys do. Their head_dim may be another."""
    if v.shape[:-1] != k.shape[:-1]:
        refuse(v_name, f"shape {v.shape}", f"{k_name}'s shape {k.shape}, but for head_dim")


def _check_head_dim(name: str, view: View) -> None:
    if not 1 <= view.shape[-1] <= MAX_HEAD_DIM:
        refuse(name, f"head_dim {view.shape[-1]}", f"1 to {MAX_HEAD_DIM}")


def _heads_axis(cache: Cache, layout: str) -> int:
    return 1 if layout == "HND" and cache.kind == "paged" else 2


def _layout_hint(cache: Cache, layout: str, fits: Callable[[int], bool], shape: tuple[int, ...]) -> str:
    """What to say where the heads of a paged cache would be right if its layout were HND."""
    swapped = cache.kind == "paged" and layout == "NHD" and fits(shape[1])
    return ", or layout='HND', as axis 1 would fit" if swapped else ""


def check_rank(name: str, view: View, ndim: int, form: str) -> None:
    if len(view.shape) != ndim:
        refuse(name, f"{len(view.shape)}-D shape {view.shape}", f"{ndim}-D {form}")


def _kv_dtype(given: str | None, cache: View, like: View, name: str, like_name: str = "q") -> str:
    """The dtype of a cache: its array's own, or what kv_dtype says its bytes mean. Only caches can be FP8."""
    if given is None:
        fp8 = name == "k_cache" and cache.dtype in FP8_DTYPES
    elif isinstance(given, str) and given in FP8_DTYPES:
        fp8 = True
    else:
        known = "'float8_e4m3fn' or 'float8_e5m2'"
        refuse("kv_dtype", repr(given), f"{known}, or None for a cache of {like_name}'s dtype")
    if not fp8:
        return like.dtype
    if like.dtype == "float32" and like.device >= 0:
        refuse(like_name, "float32", "float16 or bfloat16 beside an FP8 cache on CUDA", TypeError)
    return FP8_DTYPES[given or cache.dtype]


def _cache_kind(name: str, view: View, like: View, like_name: str, kv_dtype: str) -> None:
    """Refuse keys or values whose dtype is not kv_dtype (FP8 may come as its bytes), or that lie elsewhere."""
    fp8 = kv_dtype in FP8_DTYPES
    if view.dtype != kv_dtype and not (fp8 and view.dtype == "uint8"):
        if fp8:
            refuse(name, view.dtype, f"uint8 or {kv_dtype}, as kv_dtype says", TypeError)
        hint = ", or kv_dtype='float8_e4m3fn' or 'float8_e5m2' for a cache of FP8" if view.dtype == "uint8" else ""
        refuse(name, view.dtype, f"{like_name}'s dtype {like.dtype}{hint}", TypeError)
    _same_device(name, view, like)


def _scales(
    k_scale: View | float | None, v_scale: View | float | None, like: View, heads: int, kv_dtype: str, precise: bool
) -> tuple[float, str, float, str]:
    """(k_scale, k_scales, v_scale, v_scales) of a `Problem` or an `Append`."""
    return (
        *_cache_scale("k_scale", k_scale, like, heads, kv_dtype, precise),
        *_cache_scale("v_scale", v_scale, like, heads, kv_dtype, precise),
    )


def _cache_scale(
    name: str, scale: View | float | None, like: View, heads: int, kv_dtype: str, precise: bool
) -> tuple[float, str]:
    """One scale: the number and "", or 1.0 and the shape's name if an array holds it, whose contents are not read."""
    if kv_dtype not in FP8_DTYPES:
        if scale is not None:
            refuse(name, "a scale", f"None: the cache is {kv_dtype}, and only an FP8 one is scaled")
        return 1.0, ""
    if scale is None:
        form = f"a number, or a float32 array of shape (), (1,) or ({heads},)"
        refuse(name, None, f"{form}: a value of the {kv_dtype} cache is what is stored times it")
    if isinstance(scale, View):
        check_per_head(name, scale, like)
        if scale.shape in ((), (1,)):
            return 1.0, "tensor"
        if scale.shape == (heads,):
            return 1.0, "heads"
        refuse(name, f"shape {scale.shape}", f"(), (1,) or ({heads},)")
    number = _number(name, scale, precise)
    if number <= 0:
        refuse(name, number, "a number above 0")
    return number, ""


def describe_rotary(
    cos: View | None, sin: View | None, interleaved: bool, rows: View, *, per_query: bool, prefix: str = "rotary_"
) -> Rotary | None:
    """The rotation of the queries (or of new keys) `rows` by two tables, whose arguments' names begin with `prefix`."""
    interleaved = check_flag(f"{prefix}interleaved", interleaved)
    if cos is None and sin is None:
        return None
    cos_name, sin_name = f"{prefix}cos", f"{prefix}sin"
    for name, view in ((cos_name, cos), (sin_name, sin)):
        if view is None:
            refuse(name, None, f"{cos_name} and {sin_name} together")
        check_rank(name, view, 2, "(positions, rotary_dim / 2)")
        if view.dtype not in (rows.dtype, "float32"):
            refuse(name, view.dtype, " or ".join(dict.fromkeys((rows.dtype, "float32"))), TypeError)
        _aligned(name, view)
        _same_device(name, view, rows)
        _contiguous(name, view)
    positions, half = cos.shape
    if not 1 <= half <= rows.shape[-1] // 2:
        came = f"{half} columns, which rotate the first {2 * half} elements of a head"
        refuse(cos_name, came, f"1 to {rows.shape[-1] // 2}, as head_dim is {rows.shape[-1]}")
    if sin.shape != cos.shape:
        refuse(sin_name, f"shape {sin.shape}", f"{cos_name}'s shape {cos.shape}")
    if sin.dtype != cos.dtype:
        refuse(sin_name, sin.dtype, f"{cos_name}'s dtype {cos.dtype}", TypeError)
    check_countable(cos_name, positions, "positions")
    return Rotary(2 * half, interleaved, positions, cos.dtype, per_query)


def _check_new_rows(k: View | None, v: View | None, q: View, lengths: bool) -> None:
    """Refuse new rows that do not go with the queries, or without the lengths that they go behind."""
    for name, rows in (("k", k), ("v", v)):
        if rows is None:
            refuse(name, None, "k and v together")
    if not lengths:
        refuse("cache_seqlens", None, "how many tokens each sequence holds, when k and v are appended behind them")
    for name, rows in (("k", k), ("v", v)):
        same_kind(name, rows, q)
        check_rank(name, rows, 4, "(batch, seqlen_new, kv_heads, head_dim)")
        if rows.shape[0] != q.shape[0]:
            refuse(name, f"batch {rows.shape[0]}", f"q's batch {q.shape[0]}")


def _splits(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        refuse("num_splits", repr(value), "an int", TypeError)
    if value < 0:
        refuse("num_splits", value, "0 (automatic) or the most pieces to cut a sequence's keys into")
    return min(int(value), COUNTS - 1)


def check_countable(name: str, count: int, what: str) -> None:
    if count >= COUNTS:
        refuse(name, f"{count} {what}", "fewer than 2**31")


def _float_dtype(name: str, view: View) -> None:
    if view.dtype not in FLOAT_DTYPES:
        hint = f": pass {_converted(name, view, 'float32')}" if view.dtype == "float64" else ""
        if hint and view.device < 0 and name == "q":
            hint += ", with kernel='numpy_float64' for a float64 result"
        refuse(name, view.dtype, " or ".join(FLOAT_DTYPES) + hint, TypeError)


def _converted(name: str, view: View, dtype: str) -> str:
    """The expression that makes an array of another dtype in the caller's library."""
    return f"{name}.to(torch.{dtype})" if view.library == "torch" else f"{name}.astype(np.{dtype})"


def same_kind(name: str, view: View, like: View, like_name: str = "q") -> None:
    """Refuse an array whose dtype or device is not that of `like`."""
    if view.dtype != like.dtype:
        refuse(name, view.dtype, f"{like_name}'s dtype {like.dtype}", TypeError)
    _same_device(name, view, like)


def _same_device(name: str, view: View, like: View) -> None:
    if view.device != like.device:
        came = f"an array on {device_name(view.device)}"
        refuse(name, came, f"the other arrays' device {device_name(like.device)}")


def check_rows(name: str, view: View) -> None:
    """head_dim must be contiguous, and elements must lie at multiples of their size."""
    _aligned(name, view)
    if not _contiguous_last(view):
        came = f"stride {view.strides[-1]} in the last dimension"
        refuse(name, came, "1: head_dim must be contiguous (other strides are free)")


def _aligned(name: str, view: View) -> None:
    itemsize = ITEMSIZE[view.dtype]
    if view.pointer % itemsize and 0 not in view.shape:
        refuse(name, "a misaligned array", f"an address divisible by the {itemsize} bytes of an element; copy it")


def _contiguous_last(view: View) -> bool:
    """Whether the last dimension's elements follow one another. An empty array's strides mean nothing."""
    return view.shape[-1] <= 1 or view.strides[-1] == 1 or 0 in view.shape


def check_index_array(
    name: str,
    view: View,
    like: View,
    *,
    ndim: int | None = None,
    shape: tuple[int, ...] | None = None,
    rows_contiguous: bool = False,
) -> None:
    if view.dtype != "int32":
        hint = f": pass {_converted(name, view, 'int32')}" if view.dtype in OTHER_INTEGERS else ""
        refuse(name, view.dtype, f"int32{hint}", TypeError)
    _aligned(name, view)
    if shape is not None and view.shape != shape:
        refuse(name, f"shape {view.shape}", f"{shape}")
    if ndim is not None and len(view.shape) != ndim:
        refuse(name, f"{len(view.shape)}-D shape {view.shape}", f"{ndim}-D")
    _same_device(name, view, like)
    if not _contiguous_last(view):
        where = " in the last dimension" if rows_contiguous else ""
        refuse(name, f"stride {view.strides[-1]}{where}", "a contiguous array")


def check_writable(name: str, view: View) -> None:
    if view.library == "jax":
        refuse(
            name,
            "a JAX array, and JAX arrays are immutable",
            "an array that can be written in place: a CuPy array on CUDA, a NumPy array on the CPU, "
            "which JAX reads without a copy through jax.dlpack.from_dlpack; or a call of cupyattn.integrations.jax, "
            "which returns new caches",
        )
    if view.readonly:
        refuse(name, f"a read-only {view.library} array", "a writable one: this call writes into it")
    if not distinct(view.shape, view.strides):
        refuse(name, f"an array that overlaps itself (strides {view.strides})", "elements all distinct in memory")


@lru_cache(maxsize=4096)
def distinct(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether no two elements share memory, shown by axes that nest: each steps over all that smaller ones span."""
    span = 1
    for step, size in sorted((abs(step), size) for step, size in zip(strides, shape, strict=True) if size > 1):
        if step < span and 0 not in shape:
            return False
        span += step * (size - 1)
    return True


def check_output(name: str, out: View, q: View, dtype: str, head_dim_v: int) -> None:
    shape = (*q.shape[:-1], head_dim_v)
    if out.shape != shape:
        expected = f"q's shape {shape}" if shape == q.shape else f"{shape}, q's shape but for v's head_dim"
        refuse(name, f"shape {out.shape}", expected)
    if out.dtype != dtype:
        refuse(name, out.dtype, f"q's dtype {q.dtype}" if dtype == q.dtype else dtype, TypeError)
    _same_device(name, out, q)
    check_rows(name, out)
    check_writable(name, out)


def _length(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        refuse(name, repr(value), "an int", TypeError)
    if value < 0:
        refuse(name, value, "at least 0")
    return int(value)


def _window(window: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    if window is None:
        left = right = -1
    else:
        try:
            if not isinstance(window, (tuple, list)):
                raise TypeError
            left, right = (operator.index(side) for side in window)
        except (TypeError, ValueError):
            refuse("window", repr(window), "(left, right) as two ints, -1 for no bound, or None", TypeError)
        if left < -1 or right < -1:
            refuse("window", window, "sides of -1 (unbounded) or more")
    return left, 0 if causal else right


def _scale(value: float | None, head_dim: int, precise: bool) -> float:
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    return _number("softmax_scale", value, precise)


def _softcap(value: float | None, precise: bool) -> float:
    if value is None:
        return 0.0
    cap = _number("softcap", value, precise)
    if cap < 0:
        refuse("softcap", cap, "a positive number, or None or 0 for no cap")
    return cap


def _lse(value: object) -> tuple[bool, LseForm]:
    """Whether an lse is asked for, and in which form."""
    if isinstance(value, str) and value in LSE_FORMS:
        return True, LSE_FORMS[value]
    return check_flag("return_lse", value, f"True, False, {' or '.join(map(repr, LSE_FORMS))}"), NATURAL


def check_flag(name: str, value: object, expected: str = "True or False") -> bool:
    if not isinstance(value, (bool, np.bool_, int)) or value not in (0, 1):
        refuse(name, repr(value), expected, TypeError)
    return bool(value)


def _number(name: str, value: object, precise: bool) -> float:
    """A finite number that float32 can hold, rounded to float32 unless the call computes in float64."""
    # An array is refused even if it holds one number: reading it could wait for a device.
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        refuse(name, repr(value), "a number", TypeError)
    try:
        number = float(value)
    except OverflowError:
        refuse(name, "a number too large for any float", f"at most {FLOAT32_MAX:.3g} in size")
    if not math.isfinite(number):
        refuse(name, number, "a finite number")
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(number))
    if math.isinf(rounded):
        refuse(name, number, f"at most {FLOAT32_MAX:.3g} in size, the largest of float32")
    if number and not rounded:
        refuse(name, number, "0 or a number that float32 does not round to 0")
    return number if precise else rounded


def _alibi(slopes: View | None, q: View, batch: int, num_heads: int) -> str:
    if slopes is None:
        return ""
    check_per_head("alibi_slopes", slopes, q)
    if slopes.shape == (num_heads,):
        return "heads"
    if slopes.shape == (batch, num_heads):
        return "batch_heads"
    refuse("alibi_slopes", f"shape {slopes.shape}", f"({num_heads},) or ({batch}, {num_heads})")


def _sinks(sinks: View | None, q: View, num_heads: int) -> bool:
    if sinks is None:
        return False
    check_per_head("sinks", sinks, q)
    if sinks.shape != (num_heads,):
        refuse("sinks", f"shape {sinks.shape}", f"({num_heads},)")
    return True


def check_per_head(name: str, view: View, q: View) -> None:
    if view.dtype != "float32":
        refuse(name, view.dtype, f"float32: pass {_converted(name, view, 'float32')}", TypeError)
    _aligned(name, view)
    _same_device(name, view, q)
    _contiguous(name, view)


def _contiguous(name: str, view: View) -> None:
    stride = 1
    for size, step in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size > 1 and step != stride and 0 not in view.shape:
            refuse(name, f"strides {view.strides}", "a contiguous array")
        stride *= size


def row_strides(view: View, packed: bool, swap: bool = False) -> Strides:
    """(outer, row, head) strides; those of axes with one entry are 0, since nothing ever steps along them."""
    steps = tuple(step if size > 1 else 0 for size, step in zip(view.shape, view.strides, strict=True))
    if packed:
        return (0, steps[0], steps[1])
    return (steps[0], steps[2], steps[1]) if swap else (steps[0], steps[1], steps[2])


def contiguous_row_strides(shape: tuple[int, ...], packed: bool) -> Strides:
    row = shape[-1] * shape[-2]
    return (0, row, shape[-1]) if packed else (row * shape[1], row, shape[-1])


def contiguous_row_alignment(head_dim: int, dtype: str) -> int:
    return math.gcd(head_dim * ITEMSIZE[dtype], 16)


def row_alignment(*views: View) -> int:
    """The largest of 16, 8, 4, 2, 1 bytes that divides every row's address."""
    common = 16
    for view in views:
        if 0 in view.shape:
            continue
        common = math.gcd(common, view.pointer)
        for size, step in zip(view.shape[:-1], view.strides[:-1], strict=True):
            if size > 1:
                common = math.gcd(common, step * ITEMSIZE[view.dtype])
    return common


def check_cumulative(name: str, values: np.ndarray, total: int, what: str) -> None:
    if values[0] != 0:
        refuse(name, f"{int(values[0])} as its first entry", "0: cumulative lengths, as in [0, 4, 10]")
    if (bad := first_true(np.diff(values) < 0)) is not None:
        came = f"{int(values[bad])} followed by {int(values[bad + 1])} at [{bad + 1}]"
        refuse(name, came, "entries that never decrease")
    if values[-1] > total:
        refuse(name, f"{int(values[-1])} as its last entry", f"at most {total}, {what}")


def _first_rows(problem: Problem, arrays: Mapping[str, np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """The first row of every sequence that one of its queries sees: engines evict the blocks before a window."""
    first = arrays.get("cache_leftpad", np.zeros_like(lengths))
    queries = np.diff(arrays["cu_seqlens_q"]) if problem.packed_q else np.full_like(lengths, problem.seqlen_q)
    if problem.window[0] >= 0:
        first = np.maximum(first, lengths - queries - min(problem.window[0], COUNTS))
    return np.where(queries > 0, first, lengths)


def _check_table(table: np.ndarray, cache: Cache, first: np.ndarray, end: np.ndarray) -> None:
    """Every block that holds any of the rows first..end-1 of its sequence must exist."""
    column = np.arange(cache.max_blocks)[None, :]
    needed = (column >= (first // cache.block_size)[:, None]) & (column < -(-end // cache.block_size)[:, None])
    needed &= (end > first)[:, None]
    bad = np.argwhere(needed & ((table < 0) | (table >= cache.entries)))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        came = f"block {int(table[row, column])} at [{row}, {column}], used by sequence {row} of length {int(end[row])}"
        refuse("block_table", came, f"0 to {cache.entries - 1}" if cache.entries else "a cache that has blocks")


def _check_distinct_rows(table: np.ndarray, cache: Cache, start: np.ndarray, new: np.ndarray) -> None:
    """No row of a paged cache may be written twice: a block shared by two sequences is for reading."""
    sequence = np.repeat(np.arange(len(new)), new)
    position = np.arange(len(sequence)) - np.repeat(np.cumsum(new) - new, new) + start[sequence]
    block = table[sequence, position // cache.block_size]
    rows, owner = np.unique(block * cache.block_size + position % cache.block_size, return_index=True)
    if len(rows) != len(sequence):
        twice = int(np.setdiff1d(np.arange(len(sequence)), owner)[0])
        came = f"block {int(block[twice])} at [{sequence[twice]}, {position[twice] // cache.block_size}], written twice"
        refuse("block_table", came, "a block of its own wherever a sequence writes")


def first_true(mask: np.ndarray) -> int | None:
    return int(np.argmax(mask)) if mask.any() else None
