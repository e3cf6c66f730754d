"""The public functions: attention over dense, packed and cached keys, and appending to a cache in place.

Each reads its arrays as views, finds or builds what is prepared for calls of that form, makes the output and
runs. What is prepared depends on shapes, strides, dtypes, addresses modulo 16 and options alone, so that a
repeated call costs a dictionary look-up. Everything that can be refused is refused before anything is written.

The algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691): softmax in one pass over blocks of keys, the
scores never in memory. Names, shapes and the bottom-right alignment of masks are those of the flash_attn package.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NoReturn

import numpy as np

from .arrays import (
    INDEX_ROLES,
    View,
    current_device,
    current_stream,
    deliver,
    device_name,
    empty,
    fill,
    full,
    host_array,
    keep_until_done,
    on_device,
    other_stream,
    overlap,
    reach,
    view,
    wait,
)
from .kernels.operands import AppendOperands, Operands
from .problem import (
    ITEMSIZE,
    Append,
    Problem,
    check_indices,
    describe,
    describe_append,
    distinct,
    refuse,
    same_kind,
)
from .ragged import RaggedArray

Array = Any  # an array of NumPy, CuPy, PyTorch, JAX, or of any library that speaks DLPack

CPU_KERNELS = ("auto", "numpy", "numpy_float64")
CUDA_KERNELS = ("auto", "forward_sm80", "forward_simt")
CHECK_VARIABLE = "CUPYATTN_CHECK"


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    kernel: str = "auto",
    check: bool | None = None,
) -> Array | tuple[Array, Array]:
    """Attention over dense arrays: softmax(softmax_scale * q @ k.T + masks) @ v for each head.

    Arrays of one dtype (float16, bfloat16 or float32) on one device, of any library, mixed if you like. Work runs on
    the current stream of q's library, without a copy or a synchronisation; on the CPU it runs in NumPy. Any
    strides do, except that head_dim must be contiguous.

    Args:
        q: (batch, seqlen_q, heads, head_dim), head_dim 1 to 256.
        k, v: (batch, seqlen_k, kv_heads, head_dim), where kv_heads divides heads: query head h reads
            key/value head h // (heads // kv_heads).
        causal: query i sees keys j <= i + seqlen_k - seqlen_q: the last query sees every key.
        window: (left, right), how many keys before and after its diagonal a query sees besides it; -1 for
            unbounded, None for no window. causal makes right 0.
        softmax_scale: factor of the scores, 1/sqrt(head_dim) if None.
        softcap: c > 0 replaces the scaled score s by c * tanh(s / c); None or 0 for none.
        alibi_slopes: float32 (heads,) or (batch, heads); the score loses slope * |i + seqlen_k - seqlen_q - j|.
        sinks: float32 (heads,), one more logit for each head, that takes its share of the softmax and adds no value.
        return_lse: also return the natural logarithm of the softmax's denominator.
        out: an array of q's shape and dtype to write into, apart in memory from q, k and v.
        kernel: "auto", or on CUDA "forward_sm80" or "forward_simt", on the CPU "numpy" or "numpy_float64"
            (computes in, and returns, float64).
        check: check the contents of index arrays; of no effect here, where there are none.

    Returns:
        An array of q's shape and dtype in q's library (`out` itself if given); with return_lse a pair of it and the
        lse, float32 (batch, heads, seqlen_q). A query that sees no key gives zeros and lse -inf.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import attention
    >>> q = np.ones((1, 3, 8, 64), np.float32)
    >>> k = v = np.ones((1, 5, 2, 64), np.float32)
    >>> attention(q, k, v, causal=True).shape
    (1, 3, 8, 64)
    """
    operands = Operands(view(q, "q"), view(k, "k"), view(v, "v"), None)
    extras = None
    if alibi_slopes is not None or sinks is not None or out is not None:
        operands.alibi_slopes, operands.sinks = _optional(alibi_slopes, "alibi_slopes"), _optional(sinks, "sinks")
        operands.out = _optional(out, "out")
        extras = _signatures(operands)
    if check is not None:
        checking(check, operands.q.device)
    options = (causal, window, softmax_scale, softcap, return_lse, kernel, None, None, 0, "NHD")
    return _run(_find(operands, options, extras), operands, out)


def attention_varlen(
    q: Array | RaggedArray,
    k: Array | RaggedArray,
    v: Array | RaggedArray,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Array | None = None,
    seqused_k: Array | None = None,
    layout: str = "NHD",
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    kernel: str = "auto",
    check: bool | None = None,
) -> Array | RaggedArray | tuple[Array | RaggedArray, Array]:
    """Attention over sequences of different lengths, packed one behind the other without padding.

    Rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q are sequence b. Rows of q behind the last sequence give zeros and
    lse -inf. Masks, `out`, `kernel` and errors are as in `attention`, with each sequence's own lengths.

    Args:
        q: (total_q, heads, head_dim). q, k and v may each be a RaggedArray, which brings its own cu_seqlens.
        k, v: (total_k, kv_heads, head_dim), packed by cu_seqlens_k; or with block_table the blocks of a paged cache,
            (num_blocks, block_size, kv_heads, head_dim) for layout "NHD", (num_blocks, kv_heads, block_size,
            head_dim) for "HND".
        cu_seqlens_q: int32 (batch + 1,), starting at 0, never decreasing, at most total_q.
        cu_seqlens_k: the same for k, by default cu_seqlens_q if k has as many rows. With block_table only its
            differences count, as lengths.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more; may spare work, never needed. Smaller than the
            longest is refused wherever contents are checked, and on CUDA unchecked costs time but changes no result.
        block_table: int32 (batch, max_blocks): token n of sequence b is row n % block_size of block
            block_table[b, n // block_size].
        seqused_k: int32 (batch,), how many keys of each sequence are in use, if fewer than cu_seqlens_k says; with
            block_table either of the two must be given.
        check: read and check the index arrays' contents. On the CPU this always happens; on CUDA it waits for the
            device, and None means the environment variable CUPYATTN_CHECK (1: check). Unchecked, a bad cu_seqlens_q
            makes all rows NaN, any other bad index the rows it concerns, and nothing outside the arrays is read.
            Blocks that no query can see, behind a window or in the padding, may have any entry.

    Returns:
        An array of q's shape and dtype, a RaggedArray if q is one; with return_lse also the lse, float32 (heads,
        total_q).

    >>> import numpy as np
    >>> from cupyattn import attention_varlen
    >>> q = k = v = np.ones((7, 4, 64), np.float32)
    >>> cu_seqlens = np.array([0, 3, 7], np.int32)  # two sequences, of 3 and 4 tokens
    >>> attention_varlen(q, k, v, cu_seqlens, causal=True).shape
    (7, 4, 64)
    """
    if RaggedArray in (type(q), type(k), type(v), type(out)):
        q_values, k, v, cu_seqlens_q, cu_seqlens_k = unpack_ragged(q, k, v, cu_seqlens_q, cu_seqlens_k)
        out_values = out.values if type(out) is RaggedArray else out
        results = attention_varlen(
            q_values,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            block_table=block_table,
            seqused_k=seqused_k,
            layout=layout,
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
            out=out_values,
            kernel=kernel,
            check=check,
        )
        values, *lse = results if return_lse else (results,)
        packed = _ragged_result(values, q, out)
        return (packed, *lse) if lse else packed
    operands = Operands(
        view(q, "q"),
        view(k, "k"),
        view(v, "v"),
        _optional(out, "out"),
        cu_seqlens_q=view(cu_seqlens_q, "cu_seqlens_q"),
        cu_seqlens_k=_optional(cu_seqlens_k, "cu_seqlens_k"),
        seqused_k=_optional(seqused_k, "seqused_k"),
        block_table=_optional(block_table, "block_table"),
        alibi_slopes=_optional(alibi_slopes, "alibi_slopes"),
        sinks=_optional(sinks, "sinks"),
    )
    if cu_seqlens_k is None and block_table is None:
        share_cu_seqlens(operands)
    masks = (causal, window, softmax_scale, softcap, return_lse)
    options = (*masks, kernel, max_seqlen_q, max_seqlen_k, 0, layout)
    call = _find(operands, options, _signatures(operands))
    if checking(check, operands.q.device):
        check_indices(call.problem, index_contents(operands))
    return _run(call, operands, out)


def attention_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    k: Array | None = None,
    v: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    layout: str = "NHD",
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    kernel: str = "auto",
    check: bool | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of a few new queries over a cache of keys and values, the step of a decoder.

    With k and v given, they are first appended to the cache **in place**, sequence b's behind its cache_seqlens[b]
    tokens, and are attended to as well. A call that is refused leaves the cache as it was. cache_seqlens is not
    changed. Masks, `out`, `kernel`, `check` and errors are as in `attention` and `attention_varlen`.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (entries, capacity, kv_heads, head_dim); or with block_table the blocks of a paged cache,
            (num_blocks, block_size, kv_heads, head_dim) for layout "NHD", (num_blocks, kv_heads, block_size,
            head_dim) for "HND". JAX arrays can be read, but not appended to: they are immutable.
        k, v: (batch, seqlen_new, kv_heads, head_dim) to append; then cache_seqlens must be given.
        cache_seqlens: tokens that each sequence held before this call: int32 (batch,), or an int for all. None
            means that all of the cache is in use.
        cache_batch_idx: int32 (batch,), the dense cache's entry of each sequence; by default entry b, and then
            entries is batch. Appending needs distinct entries.
        cache_leftpad: int32 (batch,), how many rows at the start of each sequence are padding that nobody sees.
        block_table: int32 (batch, max_blocks): token n of sequence b is row n % block_size of block
            block_table[b, n // block_size].

    Returns:
        An array of q's shape and dtype; with return_lse also the lse, float32 (batch, heads, seqlen_q).

    >>> import numpy as np
    >>> from cupyattn import attention_with_kvcache
    >>> k_cache, v_cache = np.zeros((2, 1, 16, 2, 64), np.float32)  # room for 16 tokens
    >>> q, k, v = np.ones((1, 1, 8, 64), np.float32), *np.ones((2, 1, 1, 2, 64), np.float32)
    >>> out = attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=5)
    >>> out.shape, float(k_cache[0, 5, 0, 0])
    ((1, 1, 8, 64), 1.0)
    """
    operands = Operands(
        view(q, "q"),
        view(k_cache, "k_cache"),
        view(v_cache, "v_cache"),
        _optional(out, "out"),
        block_table=_optional(block_table, "block_table"),
        cache_batch_idx=_optional(cache_batch_idx, "cache_batch_idx"),
        cache_leftpad=_optional(cache_leftpad, "cache_leftpad"),
        alibi_slopes=_optional(alibi_slopes, "alibi_slopes"),
        sinks=_optional(sinks, "sinks"),
    )
    uniform = uniform_length("cache_seqlens", cache_seqlens)
    operands.seqused_k = lengths_view(cache_seqlens, uniform, operands.q, operands.q.shape[:1])
    new = appending = None
    seqlen_new = 0
    if k is not None or v is not None:
        new = new_rows(k, v, operands)
        seqlen_new = new.k.shape[1] if len(new.k.shape) == 4 else 0

    masks = (causal, window, softmax_scale, softcap, return_lse)
    options = (*masks, kernel, None, None, seqlen_new, layout)
    call = _find(operands, options, _signatures(operands), ("k_cache", "v_cache", "cache_seqlens"))
    if new is not None:
        check_new_rows(new, operands.q)
        appending = _find_append(new, layout)
    if uniform is not None:
        check_uniform(uniform, seqlen_new, call.problem)
    if checking(check, operands.q.device):
        contents = index_contents(operands, uniform, "cache_seqlens")
        if appending is not None:
            check_indices(appending.append, contents)
        check_indices(call.problem, contents)
    return _run(call, operands, out, uniform, appending, new)


def append_kv(
    k_cache: Array,
    v_cache: Array,
    k: Array,
    v: Array,
    *,
    cache_seqlens: Array | int | None = None,
    cu_seqlens_new: Array | None = None,
    cache_batch_idx: Array | None = None,
    block_table: Array | None = None,
    layout: str = "NHD",
    check: bool | None = None,
) -> None:
    """Write new keys and values into a cache **in place**, behind the tokens that it holds.

    All arrays have one dtype and one device. A call that is refused leaves the cache as it was. `check` and errors
    are as in `attention_varlen`; unchecked, rows whose place does not exist are not written.

    Args:
        k_cache, v_cache: (entries, capacity, kv_heads, head_dim), or with block_table the blocks of a paged cache,
            as in `attention_with_kvcache`; writable, and without a common element (halves of one array may interleave).
        k, v: (batch, seqlen_new, kv_heads, head_dim), or with cu_seqlens_new packed (total, kv_heads, head_dim).
        cache_seqlens: tokens that each sequence holds already: int32 (batch,), or an int for all; None for 0. It is
            not changed.
        cu_seqlens_new: int32 (batch + 1,), starting at 0: rows cu_seqlens_new[b] to cu_seqlens_new[b + 1] of k and v
            go to sequence b.
        cache_batch_idx: int32 (batch,), the dense cache's entry of each sequence, all different.
        block_table: int32 (batch, max_blocks), as in `attention_with_kvcache`.

    >>> import numpy as np
    >>> from cupyattn import append_kv
    >>> k_blocks, v_blocks = np.zeros((2, 8, 16, 2, 64), np.float32)  # 8 blocks of 16 tokens
    >>> k, v = np.ones((2, 1, 20, 2, 64), np.float32)
    >>> append_kv(k_blocks, v_blocks, k, v, block_table=np.array([[5, 2]], np.int32))
    >>> k_blocks[[5, 2], :, 0, 0].sum(axis=1).tolist()
    [16.0, 4.0]
    """
    operands = AppendOperands(
        view(k_cache, "k_cache"),
        view(v_cache, "v_cache"),
        view(k, "k"),
        view(v, "v"),
        cu_seqlens_new=_optional(cu_seqlens_new, "cu_seqlens_new"),
        block_table=_optional(block_table, "block_table"),
        cache_batch_idx=_optional(cache_batch_idx, "cache_batch_idx"),
    )
    uniform = uniform_length("cache_seqlens", cache_seqlens)
    sequences = operands.k.shape[:1]
    if operands.cu_seqlens_new is not None:
        sequences = tuple(ends - 1 for ends in operands.cu_seqlens_new.shape)
    operands.cache_seqlens = lengths_view(cache_seqlens, uniform, operands.k, sequences)
    appending = _find_append(operands, layout)
    append = appending.append
    if uniform is not None:
        check_uniform(uniform, 0 if append.packed_new else append.seqlen_new, append)
    if checking(check, operands.k.device):
        check_indices(append, index_contents(operands, uniform))
    if operands.k.device >= 0 and current_device() != operands.k.device:
        with on_device(operands.k.device):
            _append(appending, operands, uniform)
    else:
        _append(appending, operands, uniform)


# ------------------------------------------------------------------------- what is prepared for a form of call


@dataclass(frozen=True, slots=True)
class _Call:
    """What a form of call needs beside its arrays: `run(operands, stream)` and the shape of the results."""

    problem: Problem
    run: Callable[[Operands, int], None]
    out_dtype: str
    lse_shape: tuple[int, ...]
    lse_dtype: str


@dataclass(frozen=True, slots=True)
class _Appending:
    append: Append
    run: Callable[[AppendOperands, int], None]
    reaches: tuple[int, ...]  # bytes from pointer to lowest and behind highest, of k_cache, v_cache, k and v
    form: tuple[tuple[int, ...], tuple[int, ...], int] | None  # shape, strides and itemsize if the caches share them


_HELD = 4096  # forms of call remembered; the oldest are forgotten first
_held: dict[tuple, _Call | _Appending] = {}
_held_lock = threading.Lock()


def _find(
    operands: Operands,
    options: tuple,
    extras: tuple | None,
    names: tuple[str, str, str] = ("k", "v", "seqused_k"),
) -> _Call:
    """What is prepared for calls of this form, or else prepare it: that is where arguments are refused."""
    q, k, v = operands.q, operands.k, operands.v
    window = options[1]
    kinds = tuple(map(type, options))  # True, 1 and 1.0 are equal keys, but not equally good arguments
    if window is not None and isinstance(window, (tuple, list)):
        kinds += tuple(map(type, window))
    key = (
        q.shape,
        q.strides,
        q.dtype,
        q.device,
        k.shape,
        k.strides,
        k.dtype,
        k.device,
        v.shape,
        v.strides,
        v.dtype,
        v.device,
        (q.pointer | k.pointer | v.pointer) & 15,
        options,
        kinds,
        extras,
    )
    try:
        call = _held.get(key)
    except TypeError:  # an option that cannot be hashed: a window given as a list, or what will be refused
        causal, _, *others = options
        if isinstance(window, list):
            return _find(operands, (causal, tuple(window), *others), extras, names)
        call = None
    if call is None:
        call = _prepare(operands, options, names)
        _hold(key, call)
    check_results(operands, call.out_dtype, names)
    return call


def _prepare(operands: Operands, options: tuple, names: tuple[str, str, str]) -> _Call:
    q, kernel = operands.q, options[5]
    known = CUDA_KERNELS if q.device >= 0 else CPU_KERNELS
    check_kernel(kernel, known, f"arrays on {device_name(q.device)}")
    precise = kernel == "numpy_float64"
    problem = describe_call(operands, options, names)
    if not problem.batch or not problem.total_q:
        run = _fill_unseen
    elif q.device >= 0:
        from .kernels.launch import prepare  # needs CuPy

        run = prepare(problem, q.device, kernel)
    else:
        from .reference import forward

        run = _on_host(partial(forward, problem, precision=np.float64 if precise else np.float32))
    packed = problem.packed_q
    return _Call(
        problem,
        run,
        "float64" if precise else q.dtype,
        (problem.num_heads, problem.total_q) if packed else (problem.batch, problem.num_heads, problem.seqlen_q),
        "float64" if precise else "float32",
    )


def describe_call(operands: Operands, options: tuple, names: tuple[str, str, str]) -> Problem:
    """The problem of one call; options are in `_find`'s order, names what the signature calls k, v and seqused_k."""
    causal, window, softmax_scale, softcap, return_lse, kernel, max_seqlen_q, max_seqlen_k, seqlen_new, layout = options
    return describe(
        operands.q,
        operands.k,
        operands.v,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=operands.alibi_slopes,
        sinks=operands.sinks,
        out=operands.out,
        return_lse=return_lse,
        cu_seqlens_q=operands.cu_seqlens_q,
        cu_seqlens_k=operands.cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=operands.seqused_k,
        block_table=operands.block_table,
        cache_batch_idx=operands.cache_batch_idx,
        cache_leftpad=operands.cache_leftpad,
        seqlen_new=seqlen_new,
        layout=layout,
        out_dtype="float64" if kernel == "numpy_float64" else None,
        k_name=names[0],
        v_name=names[1],
        lengths_name=names[2],
    )


def _find_append(operands: AppendOperands, layout: str) -> _Appending:
    k_cache, v_cache, k, v = operands.k_cache, operands.v_cache, operands.k, operands.v
    pointers = k_cache.pointer | v_cache.pointer | k.pointer | v.pointer
    key = (*(_signature(found) for found in (k_cache, v_cache, k, v)), pointers & 15, layout, _signatures(operands))
    writable = not (k_cache.readonly or v_cache.readonly)
    try:
        appending = _held.get(key) if writable else None
    except TypeError:
        appending = None
    if appending is None:
        appending = _prepare_append(operands, layout)
        _hold(key, appending)
    if appending.append.total_new:
        _refuse_shared(appending, operands)
    return appending


def check_append(operands: AppendOperands, layout: str) -> Append:
    """Everything that an append refuses but for contents."""
    append = _describe_append(operands, layout)
    if append.total_new:
        _refuse_shared(_appending(append, _nothing, operands), operands)
    return append


def _describe_append(operands: AppendOperands, layout: str) -> Append:
    return describe_append(
        operands.k_cache,
        operands.v_cache,
        operands.k,
        operands.v,
        cu_seqlens_new=operands.cu_seqlens_new,
        cache_seqlens=operands.cache_seqlens,
        block_table=operands.block_table,
        cache_batch_idx=operands.cache_batch_idx,
        layout=layout,
    )


def _prepare_append(operands: AppendOperands, layout: str) -> _Appending:
    append = _describe_append(operands, layout)
    device = operands.k.device
    if not append.batch or not append.total_new:
        run = _nothing
    elif device >= 0:
        from .kernels.launch import prepare_append  # needs CuPy

        run = prepare_append(append, device)
    else:
        from .reference import append as append_on_host

        run = _on_host(partial(append_on_host, append))
    return _appending(append, run, operands)


def _appending(append: Append, run: Callable[[AppendOperands, int], None], operands: AppendOperands) -> _Appending:
    cache = operands.k_cache
    itemsize = ITEMSIZE[append.dtype]
    views = (cache, operands.v_cache, operands.k, operands.v)
    reaches = tuple(edge for found in views for edge in reach(found.shape, found.strides, itemsize))
    alike = append.cache.k_strides == append.cache.v_strides
    return _Appending(append, run, reaches, (cache.shape, cache.strides, itemsize) if alike else None)


def _refuse_shared(appending: _Appending, operands: AppendOperands) -> None:
    """Refuse caches that share memory, unless they interleave, and new rows that lie among a cache's."""
    k_low, k_high, v_low, v_high, new_k_low, new_k_high, new_v_low, new_v_high = appending.reaches
    k_cache, v_cache, k, v = (
        operands.k_cache.pointer,
        operands.v_cache.pointer,
        operands.k.pointer,
        operands.v.pointer,
    )
    k_low += k_cache
    k_high += k_cache
    v_low += v_cache
    v_high += v_cache
    if k_low < v_high and v_low < k_high and not _interleaved(appending.form, v_cache - k_cache):
        refuse("v_cache", "an array that overlaps k_cache in memory", "a cache of its own")
    new_k_low += k
    new_k_high += k
    new_v_low += v
    new_v_high += v
    if new_k_low < k_high and k_low < new_k_high:
        _refuse_rows("k", "k_cache")
    if new_k_low < v_high and v_low < new_k_high:
        _refuse_rows("k", "v_cache")
    if new_v_low < k_high and k_low < new_v_high:
        _refuse_rows("v", "k_cache")
    if new_v_low < v_high and v_low < new_v_high:
        _refuse_rows("v", "v_cache")


def _refuse_rows(name: str, cache: str) -> NoReturn:
    refuse(name, f"an array whose memory range meets {cache}'s", "memory of its own")


@lru_cache(maxsize=4096)
def _interleaved(form: tuple[tuple[int, ...], tuple[int, ...], int] | None, difference: int) -> bool:
    """Whether two arrays of one form, `difference` bytes apart, are the halves of a larger one without a collision."""
    if form is None:
        return False
    shape, strides, itemsize = form
    return distinct((2, *shape), (difference // itemsize, *strides))


def _hold(key: tuple, prepared: _Call | _Appending) -> None:
    with _held_lock:
        while len(_held) >= _HELD:
            del _held[next(iter(_held))]
        _held[key] = prepared


def _on_host(compute: Callable[[Any], None]) -> Callable[[Any, int], None]:
    return lambda operands, stream: compute(operands)


def _nothing(operands: AppendOperands, stream: int) -> None:
    """There are no new rows."""


def _fill_unseen(operands: Operands, stream: int) -> None:
    """No sequence has a query. A packed q can still have rows, which see nothing."""
    fill(operands.out, 0)
    if operands.lse is not None:
        fill(operands.lse, -np.inf)


def _signature(found: View | None) -> tuple | None:
    return None if found is None else (found.shape, found.strides, found.dtype, found.device, found.pointer & 3)


def _signatures(operands: Operands | AppendOperands) -> tuple:
    """What the prepared call depends on in the optional arrays."""
    if isinstance(operands, AppendOperands):
        optional = operands.cu_seqlens_new, operands.cache_seqlens, operands.block_table, operands.cache_batch_idx
        return tuple([_signature(found) for found in optional])
    out = operands.out
    return (
        None if out is None else (out.shape, out.strides, out.dtype, out.device, out.readonly, out.pointer & 15),
        _signature(operands.cu_seqlens_q),
        _signature(operands.cu_seqlens_k),
        _signature(operands.seqused_k),
        _signature(operands.block_table),
        _signature(operands.cache_batch_idx),
        _signature(operands.cache_leftpad),
        _signature(operands.alibi_slopes),
        _signature(operands.sinks),
    )


# ------------------------------------------------------------------------------------------------ running


def _run(
    call: _Call,
    operands: Operands,
    out: Array | None,
    uniform: int | None = None,
    appending: _Appending | None = None,
    new: AppendOperands | None = None,
) -> Array | tuple[Array, Array]:
    """Make the outputs, append the new rows if there are any, attend, and hand the results over."""
    q = operands.q
    if q.device >= 0 and current_device() != q.device:
        with on_device(q.device):
            return _run(call, operands, out, uniform, appending, new)
    if operands.out is None:
        operands.out = empty(q, q.shape, call.out_dtype)
    if call.problem.lse:
        operands.lse = empty(q, call.lse_shape, call.lse_dtype)
    if uniform is not None:
        operands.seqused_k = full(q, operands.seqused_k.shape, uniform, "int32")
    if appending is not None:
        new.cache_seqlens = operands.seqused_k
        _launch(appending.run, new, q)
    _launch(call.run, operands, q)
    result = deliver(operands.out, q) if out is None else out
    return (result, deliver(operands.lse, q)) if call.problem.lse else result


def _append(appending: _Appending, operands: AppendOperands, uniform: int | None) -> None:
    if uniform is not None:
        operands.cache_seqlens = full(operands.k, operands.cache_seqlens.shape, uniform, "int32")
    _launch(appending.run, operands, operands.k)


def _launch(run: Callable[[Any, int], None], operands: Operands | AppendOperands, like: View) -> None:
    """Run on the current stream of like's library, in order with the streams of the other arrays' libraries."""
    if like.device < 0:
        run(operands, 0)
        return
    stream = current_stream(like)
    views = _all_operands(operands) if type(operands) is Operands else _all_append_operands(operands)
    library = like.library
    for found in views:
        if found is not None and found.library != library:
            break
    else:
        if library == "cupy" or library == "torch":
            run(operands, stream)
            return
    views = [found for found in views if found is not None]
    other = other_stream(like, views)
    if other is not None:
        wait(stream, other)
    run(operands, stream)
    if other is not None:
        wait(other, stream)
    keep_until_done(views, stream)


_all_operands = attrgetter(*Operands.__slots__)
_all_append_operands = attrgetter(*AppendOperands.__slots__)


# ------------------------------------------------------------------------------------------------ arguments


def _optional(array: Array | None, name: str) -> View | None:
    return None if array is None else view(array, name)


def checking(check: bool | None, device: int) -> bool:
    """Whether to read the contents of index arrays: always on the CPU, where it costs nothing."""
    if check is None:
        return device < 0 or os.environ.get(CHECK_VARIABLE, "").lower() in ("1", "true", "yes", "on")
    if not isinstance(check, (bool, np.bool_)):
        refuse("check", repr(check), "True, False or None", TypeError)
    return bool(check) or device < 0


def index_contents(
    operands: Operands | AppendOperands, uniform: int | None = None, lengths_name: str = "seqused_k"
) -> dict[str, np.ndarray]:
    """Host arrays of the index arrays, by role; lengths_name is seqused_k's. On CUDA this waits for the device."""
    arrays = {}
    for role in INDEX_ROLES:
        found = getattr(operands, role, None)
        if found is not None:
            name = lengths_name if role == "seqused_k" else role
            arrays[name] = host_array(found) if found.array is not None else np.full(found.shape, uniform, np.int32)
    return arrays


def uniform_length(name: str, value: Array | int | None) -> int | None:
    """The one length given as an int for all sequences, or None."""
    if isinstance(value, (bool, np.bool_, float, np.floating)):
        refuse(name, repr(value), "an int, or an int32 array", TypeError)
    return int(value) if isinstance(value, (int, np.integer)) else None


def lengths_view(value: Array | int | None, uniform: int | None, like: View, shape: tuple[int, ...]) -> View | None:
    """The lengths' view. For an int one without memory stands in until everything is validated."""
    if uniform is None:
        return _optional(value, "cache_seqlens")
    return View(None, 0, shape, (1,) * len(shape), "int32", like.device, like.library, False)


def check_uniform(length: int, new: int, described: Problem | Append) -> None:
    """Refuse an int for all sequences in the words of `check_indices`."""
    rows = described.cache.rows
    if length < 0:
        refuse("cache_seqlens", length, "a length of at least 0")
    if length > rows - new:
        came = f"{length} tokens plus {new} new" if new else f"{length} tokens"
        refuse("cache_seqlens", came, f"at most the {rows} that its rows hold")


def new_rows(k: Array | None, v: Array | None, operands: Operands) -> AppendOperands:
    """The operands of the append inside attention_with_kvcache."""
    if k is None or v is None:
        missing = "k" if k is None else "v"
        refuse(missing, None, "k and v together")
    if operands.seqused_k is None:
        refuse("cache_seqlens", None, "how many tokens each sequence holds, when k and v are appended behind them")
    return AppendOperands(
        operands.k,
        operands.v,
        view(k, "k"),
        view(v, "v"),
        cache_seqlens=operands.seqused_k,
        block_table=operands.block_table,
        cache_batch_idx=operands.cache_batch_idx,
    )


def check_new_rows(new: AppendOperands, q: View) -> None:
    """Refuse new rows that do not go with the queries."""
    for name, rows in (("k", new.k), ("v", new.v)):
        same_kind(name, rows, q)
        if len(rows.shape) != 4:
            refuse(name, f"{len(rows.shape)}-D shape {rows.shape}", "4-D (batch, seqlen_new, kv_heads, head_dim)")
        if rows.shape[0] != q.shape[0]:
            refuse(name, f"batch {rows.shape[0]}", f"q's batch {q.shape[0]}")


def check_kernel(kernel: str, known: tuple[str, ...], where: str) -> None:
    """Refuse a kernel that does not exist there."""
    if not isinstance(kernel, str) or kernel not in known:
        refuse("kernel", repr(kernel), f"one of {', '.join(known)} for {where}")


def share_cu_seqlens(operands: Operands) -> None:
    """Packed keys without cu_seqlens_k have the sequences of the queries."""
    if len(operands.k.shape) != 3:
        return  # refused by its rank
    if operands.k.shape[0] != operands.q.shape[0]:
        rows = f"k has {operands.k.shape[0]} rows and q {operands.q.shape[0]}"
        refuse("cu_seqlens_k", None, f"int32 cumulative lengths of k's sequences, as {rows}")
    operands.cu_seqlens_k = operands.cu_seqlens_q


def unpack_ragged(
    q: Array | RaggedArray,
    k: Array | RaggedArray,
    v: Array | RaggedArray,
    cu_seqlens_q: Array | None,
    cu_seqlens_k: Array | None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Packed q, k, v and their cu_seqlens. k and v of different origin are compared on the host."""
    if type(k) is type(v) is RaggedArray and not k.same_sequences(v):
        refuse("v", "a RaggedArray of other lengths", "k's lengths")
    q, cu_seqlens_q = _unpack(q, "q", cu_seqlens_q, "cu_seqlens_q")
    if type(k) is RaggedArray:
        v = v.values if type(v) is RaggedArray else v
        k, cu_seqlens_k = _unpack(k, "k", cu_seqlens_k, "cu_seqlens_k")
    else:
        v, cu_seqlens_k = _unpack(v, "v", cu_seqlens_k, "cu_seqlens_k")
    return q, k, v, cu_seqlens_q, cu_seqlens_k


def _unpack(array: Array | RaggedArray, name: str, ends: Array | None, ends_name: str) -> tuple[Array, Array | None]:
    if type(array) is not RaggedArray:
        return array, ends
    if ends is not None and ends is not array.cu_seqlens:
        refuse(ends_name, f"an array besides {name}'s own", f"None, as {name} is a RaggedArray")
    return array.values, array.cu_seqlens


def _ragged_result(values: Array, q: Array | RaggedArray, out: Array | RaggedArray | None) -> Array | RaggedArray:
    if type(out) is RaggedArray:
        return out
    return q.with_values(values) if type(q) is RaggedArray else values


def check_results(operands: Operands, out_dtype: str, names: tuple[str, str, str]) -> None:
    """Refuse an out that lies on an input, and results that q's library cannot take."""
    q = operands.q
    if out_dtype == "float64" and q.library == "jax" and not sys.modules["jax"].config.jax_enable_x64:
        refuse("kernel", "'numpy_float64' with JAX arrays", "jax_enable_x64, without which JAX would round the result")
    if operands.out is not None:
        _refuse_overlap(operands, names)


def _refuse_overlap(operands: Operands, names: tuple[str, str, str]) -> None:
    for name, source in (("q", operands.q), (names[0], operands.k), (names[1], operands.v)):
        if overlap(operands.out, source):
            refuse("out", f"an array whose memory range meets {name}'s", "memory of its own")
