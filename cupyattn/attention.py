"""The public functions: attention over dense, packed and cached keys, and appending to a cache in place.

Each reads its arrays as views, finds or builds what is prepared for calls of that form, makes the output and
runs. What is prepared depends on shapes, strides, dtypes, addresses modulo 16 and options alone, so that a
repeated call costs a dictionary look-up. Everything that can be refused is refused before anything is written.

The algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691): softmax in one pass over blocks of keys, the
scores never in memory. Names, shapes and the bottom-right alignment of masks are those of the flash_attn package.
"""

from __future__ import annotations

import numbers
import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NoReturn

import numpy as np

from .arrays import (
    INDEX_ROLES,
    View,
    deliver,
    device_name,
    empty,
    fill,
    host_array,
    overlap,
    reach,
    view,
)
from .kernels.operands import AppendOperands, Operands
from .problem import (
    ITEMSIZE,
    SCALE_ROLES,
    Append,
    Problem,
    check_indices,
    check_uniform,
    describe,
    describe_append,
    distinct,
    refuse,
)
from .ragged import RaggedArray
from .streams import device_of, in_order

Array = Any  # an array of NumPy, CuPy, PyTorch, JAX, or of any library that speaks DLPack

CPU_KERNELS = ("auto", "numpy", "numpy_float64")
CUDA_KERNELS = ("auto", "decode", "forward_sm90", "forward_sm80", "forward_simt")
CHECK_VARIABLE = "CUPYATTN_CHECK"
CACHE_NAMES = ("k_cache", "v_cache", "cache_seqlens")  # what attention_with_kvcache calls k, v and seqused_k
# The options of calls without a cache: kv_dtype, k_scale, v_scale, rotary_interleaved, num_splits.
NO_CACHE = (None, None, None, True, 0)


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
    return_lse: bool | str = False,
    out: Array | None = None,
    kernel: str = "auto",
    check: bool | None = None,
) -> Array | tuple[Array, Array]:
    """Attention over dense arrays: softmax(softmax_scale * q @ k.T + masks) @ v for each head.

    The algorithm is FlashAttention-2 (Dao 2023, arXiv:2307.08691), the arguments are those of flash_attn_func in the
    flash_attn package. alibi_slopes are ALiBi's (Press, Smith and Lewis 2021, arXiv:2108.12409), softcap is Gemma 2's
    (2024, arXiv:2408.00118), sinks are those of gpt-oss (2025, arXiv:2508.10925).

    Arrays of one dtype (float16, bfloat16 or float32) on one device, of any library, mixed if you like. Work runs on
    the current stream of q's library, without a copy or a synchronisation; on the CPU it runs in NumPy. Any
    strides do, except that head_dim must be contiguous.

    Args:
        q: (batch, seqlen_q, heads, head_dim), head_dim 1 to 256.
        k, v: (batch, seqlen_k, kv_heads, head_dim), where kv_heads divides heads: query head h reads
            key/value head h // (heads // kv_heads). v may have a head_dim of its own, 1 to 256, which is then that of
            the output; on CUDA forward_sm90 and forward_simt take that.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q: the last query sees every key.
        window: (left, right), how many keys before and after its diagonal a query sees besides it; -1 for
            unbounded, None for no window. causal makes right 0.
        softmax_scale: factor of the scores, 1/sqrt(head_dim) if None.
        softcap: c > 0 replaces the scaled score s by c * tanh(s / c); None or 0 for none.
        alibi_slopes: float32 (heads,) or (batch, heads); the score loses slope * |i + seqlen_k - seqlen_q - j|.
        sinks: float32 (heads,), one more logit for each head, that takes its share of the softmax and adds no value.
        return_lse: also return the lse, the logarithm of the softmax's denominator, in the form that is asked for: True
            for the natural logarithm, -inf for a query that sees no key; "log2" for the one to base 2, as flashinfer
            has it; "flash_attn" for the natural one, but +inf for a query that sees no key, as flash_attn has it.
        out: an array of the result's shape and q's dtype to write into, apart in memory from q, k and v.
        kernel: "auto", or on CUDA "decode", "forward_sm90", "forward_sm80" or "forward_simt", on the CPU "numpy" or
            "numpy_float64" (computes in, and returns, float64).
        check: check the contents of index arrays; of no effect here, where there are none.

    Returns:
        An array (batch, seqlen_q, heads, head_dim of v) of q's dtype in q's library (`out` itself if given); with
        return_lse a pair of it and the lse, float32 (batch, heads, seqlen_q). A query that sees no key gives zeros.

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
        operands.alibi_slopes = optional_view(alibi_slopes, "alibi_slopes")
        operands.sinks = optional_view(sinks, "sinks")
        operands.out = optional_view(out, "out")
        extras = signatures(operands)
    if check is not None:
        checking(check, operands.q.device)
    options = (causal, window, softmax_scale, softcap, return_lse, kernel, None, None, "NHD", NO_CACHE)
    return run_call(find_call(operands, options, extras), operands, out)


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
    return_lse: bool | str = False,
    out: Array | None = None,
    kernel: str = "auto",
    check: bool | None = None,
) -> Array | RaggedArray | tuple[Array | RaggedArray, Array]:
    """Attention over sequences of different lengths, packed one behind the other without padding.

    Rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q are sequence b. Rows of q behind the last sequence see no key.
    Masks, `return_lse`, `out` and `kernel` are as in `attention`, with each sequence's own lengths. The arguments are
    those of flash_attn_varlen_func in the flash_attn package; blocks are those of PagedAttention (Kwon et al. 2023,
    arXiv:2309.06180).

    Args:
        q: (total_q, heads, head_dim). q, k and v may each be a RaggedArray, which brings its own cu_seqlens.
        k, v: (total_k, kv_heads, head_dim), packed by cu_seqlens_k; or with block_table the blocks of a paged cache,
            (num_blocks, block_size, kv_heads, head_dim) for layout "NHD", (num_blocks, kv_heads, block_size,
            head_dim) for "HND". v's head_dim may be its own, as in `attention`.
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
        An array (total_q, heads, head_dim of v) of q's dtype, a RaggedArray if q is one; with return_lse also the lse,
        float32 (heads, total_q).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

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
        return ragged_results(results, q, out)
    operands = Operands(
        view(q, "q"),
        view(k, "k"),
        view(v, "v"),
        optional_view(out, "out"),
        cu_seqlens_q=view(cu_seqlens_q, "cu_seqlens_q"),
        cu_seqlens_k=optional_view(cu_seqlens_k, "cu_seqlens_k"),
        seqused_k=optional_view(seqused_k, "seqused_k"),
        block_table=optional_view(block_table, "block_table"),
        alibi_slopes=optional_view(alibi_slopes, "alibi_slopes"),
        sinks=optional_view(sinks, "sinks"),
    )
    if cu_seqlens_k is None and block_table is None:
        share_cu_seqlens(operands)
    masks = (causal, window, softmax_scale, softcap, return_lse)
    options = (*masks, kernel, max_seqlen_q, max_seqlen_k, layout, NO_CACHE)
    call = find_call(operands, options, signatures(operands))
    if checking(check, operands.q.device):
        check_indices(call.problem, index_contents(operands, call.problem.batch))
    return run_call(call, operands, out)


def attention_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    layout: str = "NHD",
    kv_dtype: str | None = None,
    k_scale: Array | float | None = None,
    v_scale: Array | float | None = None,
    num_splits: int = 0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    return_lse: bool | str = False,
    out: Array | None = None,
    kernel: str = "auto",
    check: bool | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of a few new queries over a cache of keys and values, the step of a decoder.

    With k and v given, they are first appended to the cache **in place**, sequence b's behind its cache_seqlens[b]
    tokens, and are attended to as well. A call that is refused leaves the cache as it was. cache_seqlens is not
    changed. Masks, `return_lse`, `out`, `kernel` and `check` are as in `attention` and `attention_varlen`.

    The arguments are those of flash_attn_with_kvcache in the flash_attn package, version 2.8, by name only, with window
    for window_size and return_lse for return_softmax_lse. On CUDA a step of few queries reads long caches in pieces
    that run side by side and are merged by their lse, which is Flash-Decoding (Dao, Haziza, Massa and Sizov 2023).
    Rotary embedding is RoFormer's (Su et al. 2021, arXiv:2104.09864), the FP8 formats are those of Micikevicius et al.
    2022 (arXiv:2209.05433).

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (entries, capacity, kv_heads, head_dim); or with block_table the blocks of a paged cache,
            (num_blocks, block_size, kv_heads, head_dim) for layout "NHD", (num_blocks, kv_heads, block_size,
            head_dim) for "HND". v_cache may have a head_dim of its own, as v in `attention`, but on CUDA not in FP8.
            JAX arrays can be read, but not appended to: they are immutable.
        k, v: (batch, seqlen_new, kv_heads, head_dim) to append, each with its cache's head_dim; then cache_seqlens must
            be given.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), of q's dtype or float32, to rotate q and k by: the first
            rotary_dim elements of every head. New row i is at position cache_seqlens + i; so is query i under causal
            or a window, and else every query is at cache_seqlens. Needs k and v. The cache holds rotated keys;
            cache_leftpad moves no position.
        rotary_interleaved: True to rotate elements (0, 1), (2, 3), … together, as GPT-J; False for (i, i +
            rotary_dim / 2), as GPT-NeoX and Llama.
        cache_seqlens: tokens that each sequence held before this call: int32 (batch,), or an int for all. None
            means that all of the cache is in use.
        cache_batch_idx: int32 (batch,), the dense cache's entry of each sequence; by default entry b, and then
            entries is batch. Appending needs distinct entries.
        cache_leftpad: int32 (batch,), how many rows at the start of each sequence are padding that nobody sees.
        block_table: int32 (batch, max_blocks): token n of sequence b is row n % block_size of block
            block_table[b, n // block_size]. Sequences may share blocks that nobody appends to.
        kv_dtype: "float8_e4m3fn" (or "e4m3") or "float8_e5m2" ("e5m2") for an FP8 cache given as its bytes, in uint8
            arrays; not needed where the library has the dtype, as torch and ml_dtypes have. q, k and v are then
            float16 or bfloat16 (on the CPU float32 too).
        k_scale, v_scale: with an FP8 cache, what its keys and values are to be multiplied with: a number, or a float32
            array of shape () or (1,), or (kv_heads,) for one each; finite and above 0, which of an array is checked as
            the contents of index arrays are. New rows are divided by it, rounded to nearest even, and stored as at
            most the largest number of the format.
        num_splits: into how many pieces at most each sequence's keys are cut on CUDA; 0 for what suits the GPU.

    Returns:
        An array (batch, seqlen_q, heads, head_dim of v_cache) of q's dtype; with return_lse also the lse, float32
        (batch, heads, seqlen_q).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import attention_with_kvcache
    >>> k_cache, v_cache = np.zeros((2, 1, 16, 2, 64), np.float32)  # room for 16 tokens
    >>> q, k, v = np.ones((1, 1, 8, 64), np.float32), *np.ones((2, 1, 1, 2, 64), np.float32)
    >>> out = attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=5)
    >>> out.shape, float(k_cache[0, 5, 0, 0])
    ((1, 1, 8, 64), 1.0)
    """
    operands = Operands(view(q, "q"), view(k_cache, "k_cache"), view(v_cache, "v_cache"), optional_view(out, "out"))
    scales = read_cache_arguments(
        operands,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
    )
    masks = (causal, window, softmax_scale, softcap, return_lse)
    options = (*masks, kernel, None, None, layout, (kv_dtype, *scales, rotary_interleaved, num_splits))
    call = find_call(operands, options, signatures(operands), CACHE_NAMES)
    if operands.uniform_length is not None:
        check_uniform(call.problem, operands.uniform_length)
    if checking(check, operands.q.device):
        check_indices(call.problem, index_contents(operands, call.problem.batch, "cache_seqlens"))
    return run_call(call, operands, out)


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
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    rotary_interleaved: bool = True,
    kv_dtype: str | None = None,
    k_scale: Array | float | None = None,
    v_scale: Array | float | None = None,
    check: bool | None = None,
) -> None:
    """Write new keys and values into a cache **in place**, behind the tokens that it holds.

    It is the first half of `attention_with_kvcache`, whose source and arguments it shares, with packed rows as well,
    as append_paged_kv_cache of the flashinfer package has them. A call that is refused leaves the cache as it was.
    `check` is as in `attention_varlen`; unchecked, rows whose place does not exist are not written.

    Args:
        k_cache, v_cache: (entries, capacity, kv_heads, head_dim), or with block_table the blocks of a paged cache,
            as in `attention_with_kvcache`, v_cache with a head_dim of its own or k_cache's; writable, and without a
            common element (parts of one array may interleave).
        k, v: (batch, seqlen_new, kv_heads, head_dim), or with cu_seqlens_new packed (total, kv_heads, head_dim), each
            with its cache's head_dim.
        cache_seqlens: tokens that each sequence holds already: int32 (batch,), or an int for all; None for 0. It is
            not changed.
        cu_seqlens_new: int32 (batch + 1,), starting at 0: rows cu_seqlens_new[b] to cu_seqlens_new[b + 1] of k and v
            go to sequence b.
        cache_batch_idx: int32 (batch,), the dense cache's entry of each sequence, all different.
        block_table: int32 (batch, max_blocks), as in `attention_with_kvcache`.
        rotary_cos, rotary_sin, rotary_interleaved: to rotate k by, as in `attention_with_kvcache`; new row i of a
            sequence is at position cache_seqlens + i.
        kv_dtype, k_scale, v_scale: for an FP8 cache, as in `attention_with_kvcache`.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

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
        cu_seqlens_new=optional_view(cu_seqlens_new, "cu_seqlens_new"),
        block_table=optional_view(block_table, "block_table"),
        cache_batch_idx=optional_view(cache_batch_idx, "cache_batch_idx"),
    )
    operands.cache_seqlens, operands.uniform_length = lengths("cache_seqlens", cache_seqlens)
    scales = rotary_and_scales(operands, rotary_cos, rotary_sin, k_scale, v_scale)
    appending = find_append(operands, (layout, kv_dtype, *scales, rotary_interleaved))
    append = appending.append
    if operands.uniform_length is not None:
        check_uniform(append, operands.uniform_length)
    if checking(check, operands.k.device):
        check_indices(append, index_contents(operands, append.batch))
    with device_of(operands.k):
        in_order(partial(appending.run, operands), operands.k, all_append_operands(operands))


# ------------------------------------------------------------------------- what is prepared for a form of call


CacheForm = tuple[tuple[int, ...], tuple[int, ...], int, int, int]
"""Shape and strides of two caches without their last axes, those of k_cache and v_cache, itemsize."""


@dataclass(frozen=True, slots=True)
class Extents:
    """Where an append reads and writes, relative to its arrays' addresses."""

    reaches: tuple[int, ...]  # bytes from pointer to lowest and behind highest, of k_cache, v_cache, k, v and q
    form: CacheForm | None  # if the caches share their strides


@dataclass(frozen=True, slots=True)
class Call:
    """What a form of call needs beside its arrays: `run(operands, stream)` and the shape of the results."""

    problem: Problem
    run: Callable[[Operands, int], None]
    out_shape: tuple[int, ...]
    out_dtype: str
    lse_shape: tuple[int, ...]
    lse_dtype: str
    extents: Extents | None  # None: nothing is appended


@dataclass(frozen=True, slots=True)
class _Appending:
    """The same for an append by itself."""

    append: Append
    run: Callable[[AppendOperands, int], None]
    extents: Extents | None


_HELD = 4096  # forms of call remembered; the oldest are forgotten first
remembered: dict[tuple, Any] = {}
_held_lock = threading.Lock()


def find_call(
    operands: Operands,
    options: tuple,
    extras: tuple | None,
    names: tuple[str, str, str] = ("k", "v", "seqused_k"),
) -> Call:
    """What is prepared for calls of this form, or else prepare it: that is where arguments are refused.

    options: (causal, window, softmax_scale, softcap, return_lse, kernel, max_seqlen_q, max_seqlen_k, layout, (kv_dtype,
    k_scale, v_scale, rotary_interleaved, num_splits)), scales only if they are numbers. extras: of `signatures`. names:
    what the caller's signature calls k, v and seqused_k.
    """
    q, k, v = operands.q, operands.k, operands.v
    window = options[1]
    kinds = tuple(map(type, options))  # True, 1 and 1.0 are equal keys, but not equally good arguments
    if window is not None and isinstance(window, (tuple, list)):
        kinds += tuple(map(type, window))
    if options[-1] is not NO_CACHE:
        kinds += tuple(map(type, options[-1]))
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
        q.pointer & 15,
        (k.pointer | v.pointer) & 15,  # apart from q's, as an append counts these alone
        options,
        kinds,
        extras,
    )
    appending = operands.k_new is not None
    try:
        call = None if appending and (k.readonly or v.readonly) else remembered.get(key)
    except TypeError:  # an option that cannot be hashed: a window given as a list, or what will be refused
        causal, _, *others = options
        if isinstance(window, list):
            return find_call(operands, (causal, tuple(window), *others), extras, names)
        call = None
    if call is None:
        call = prepare_call(operands, options, names)
        remember(key, call)
    check_results(operands, call.out_dtype, names)
    if call.extents is not None:
        refuse_shared(call.extents, k.pointer, v.pointer, operands.k_new.pointer, operands.v_new.pointer, q.pointer)
    return call


def prepare_call(operands: Operands, options: tuple, names: tuple[str, str, str]) -> Call:
    """What calls of this form need, made anew; arguments as in `find_call`."""
    q, kernel = operands.q, options[5]
    known = CUDA_KERNELS if q.device >= 0 else CPU_KERNELS
    check_kernel(kernel, known, f"arrays on {device_name(q.device)}")
    precise = kernel == "numpy_float64"
    problem = describe_call(operands, options, names)
    if not problem.batch or not problem.total_q:
        run = partial(_fill_unseen, problem.lse_form.unseen)
        if problem.append is not None and problem.append.total_new:
            run = _only_append(_append_runner(problem.append, q.device, precise))
    elif q.device >= 0:
        from .kernels.launch import prepare  # needs CuPy

        run = prepare(problem, q.device, kernel)
    else:
        from .reference import forward

        run = _on_host(partial(forward, problem, precision=np.float64 if precise else np.float32))
    packed = problem.packed_q
    return Call(
        problem,
        run,
        (*q.shape[:-1], problem.head_dim_v),
        "float64" if precise else q.dtype,
        (problem.num_heads, problem.total_q) if packed else (problem.batch, problem.num_heads, problem.seqlen_q),
        "float64" if precise else "float32",
        None if problem.append is None else _extents(problem.append, operands.appending(), q),
    )


def describe_call(operands: Operands, options: tuple, names: tuple[str, str, str]) -> Problem:
    """The problem of one call; arguments as in `find_call`."""
    causal, window, softmax_scale, softcap, return_lse, kernel, max_seqlen_q, max_seqlen_k, layout, cached = options
    kv_dtype, k_scale, v_scale, rotary_interleaved, num_splits = cached
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
        uniform_length=operands.uniform_length,
        k_new=operands.k_new,
        v_new=operands.v_new,
        rotary_cos=operands.rotary_cos,
        rotary_sin=operands.rotary_sin,
        rotary_interleaved=rotary_interleaved,
        kv_dtype=kv_dtype,
        k_scale=k_scale if operands.k_scale is None else operands.k_scale,
        v_scale=v_scale if operands.v_scale is None else operands.v_scale,
        num_splits=num_splits,
        layout=layout,
        out_dtype="float64" if kernel == "numpy_float64" else None,
        k_name=names[0],
        v_name=names[1],
        lengths_name=names[2],
    )


def find_append(operands: AppendOperands, options: tuple) -> _Appending:
    k_cache, v_cache, k, v = operands.k_cache, operands.v_cache, operands.k, operands.v
    key = (
        *(signature(found) for found in (k_cache, v_cache, k, v)),
        (k_cache.pointer | v_cache.pointer | k.pointer | v.pointer) & 15,
        options,
        tuple(map(type, options)),
        _append_signatures(operands),
    )
    try:
        appending = None if k_cache.readonly or v_cache.readonly else remembered.get(key)
    except TypeError:
        appending = None
    if appending is None:
        appending = _prepare_append(operands, options)
        remember(key, appending)
    if appending.extents is not None:
        refuse_shared(appending.extents, k_cache.pointer, v_cache.pointer, k.pointer, v.pointer, 0)
    return appending


def _prepare_append(operands: AppendOperands, options: tuple) -> _Appending:
    layout, kv_dtype, k_scale, v_scale, rotary_interleaved = options
    append = describe_append(
        operands.k_cache,
        operands.v_cache,
        operands.k,
        operands.v,
        cu_seqlens_new=operands.cu_seqlens_new,
        cache_seqlens=operands.cache_seqlens,
        block_table=operands.block_table,
        cache_batch_idx=operands.cache_batch_idx,
        rotary_cos=operands.rotary_cos,
        rotary_sin=operands.rotary_sin,
        rotary_interleaved=rotary_interleaved,
        kv_dtype=kv_dtype,
        k_scale=k_scale if operands.k_scale is None else operands.k_scale,
        v_scale=v_scale if operands.v_scale is None else operands.v_scale,
        layout=layout,
    )
    run = _append_runner(append, operands.k.device, False)
    return _Appending(append, run, _extents(append, operands, None))


def _append_runner(append: Append, device: int, precise: bool) -> Callable[[AppendOperands, int], None]:
    if not append.batch or not append.total_new:
        return _nothing
    if device >= 0:
        from .kernels.launch import prepare_append  # needs CuPy

        return prepare_append(append, device)
    from .reference import append as append_on_host

    return _on_host(partial(append_on_host, append, precision=np.float64 if precise else np.float32))


def _extents(append: Append, operands: AppendOperands, q: View | None) -> Extents | None:
    """None where nothing is written."""
    if not append.total_new:
        return None
    cache = operands.k_cache
    reaches = []
    for found in (cache, operands.v_cache, operands.k, operands.v):
        reaches += reach(found.shape, found.strides, ITEMSIZE[found.dtype])
    reaches += (0, 0) if q is None else reach(q.shape, q.strides, ITEMSIZE[q.dtype])
    alike = append.cache.k_strides == append.cache.v_strides
    form = cache.shape[:-1], cache.strides[:-1], append.head_dim, append.head_dim_v, append.kv_itemsize
    return Extents(tuple(reaches), form if alike else None)


def check_caches(problem: Problem, operands: Operands) -> None:
    """Refuse caches and new rows that share memory, where new rows are appended."""
    extents = None if problem.append is None else _extents(problem.append, operands.appending(), operands.q)
    if extents is not None:
        found = operands.k, operands.v, operands.k_new, operands.v_new, operands.q
        refuse_shared(extents, *(view.pointer for view in found))


def refuse_shared(extents: Extents, k_cache: int, v_cache: int, k: int, v: int, q: int) -> None:
    """Refuse caches that share memory, unless they interleave, and rows to be read that lie among a cache's."""
    k_low, k_high, v_low, v_high, new_k_low, new_k_high, new_v_low, new_v_high, q_low, q_high = extents.reaches
    k_low += k_cache
    k_high += k_cache
    v_low += v_cache
    v_high += v_cache
    if k_low < v_high and v_low < k_high and not _interleaved(extents.form, v_cache - k_cache):
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
    q_low += q
    q_high += q
    if q_low < k_high and k_low < q_high:
        _refuse_rows("q", "k_cache")
    if q_low < v_high and v_low < q_high:
        _refuse_rows("q", "v_cache")


def _refuse_rows(name: str, cache: str) -> NoReturn:
    refuse(name, f"an array whose memory range meets {cache}'s", "memory of its own")


@lru_cache(maxsize=4096)
def _interleaved(form: CacheForm | None, difference: int) -> bool:
    """Whether two caches of one form, `difference` bytes apart, are parts of a larger array without a collision."""
    if form is None:
        return False
    shape, strides, *columns, itemsize = form
    step = difference // itemsize
    if distinct((2, *shape, max(columns)), (step, *strides, 1)):
        return True
    first, second = columns if step > 0 else reversed(columns)  # of one row, if they lie side by side there
    return first <= abs(step) and distinct((*shape, abs(step) + second), (*strides, 1))


def remember(key: tuple, prepared: Any) -> None:
    """Keep what was prepared for calls of one form; the oldest is forgotten when there are too many."""
    with _held_lock:
        while len(remembered) >= _HELD:
            del remembered[next(iter(remembered))]
        remembered[key] = prepared


def _on_host(compute: Callable[[Any], None]) -> Callable[[Any, int], None]:
    return lambda operands, stream: compute(operands)


def _nothing(operands: AppendOperands, stream: int) -> None:
    """There are no new rows."""


def _only_append(run: Callable[[AppendOperands, int], None]) -> Callable[[Operands, int], None]:
    """There are new rows and no query."""
    return lambda operands, stream: run(operands.appending(), stream)


def _fill_unseen(unseen: float, operands: Operands, stream: int) -> None:
    """No sequence has a query. A packed q can still have rows, which see nothing."""
    fill(operands.out, 0)
    if operands.lse is not None:
        fill(operands.lse, unseen)


def signature(found: View) -> tuple:
    """What a prepared call depends on in an array that has no say in alignment."""
    return found.shape, found.strides, found.dtype, found.device, found.pointer & 3


def signatures(operands: Operands) -> tuple:
    """What the prepared call depends on in the optional arrays: which of them there are, and their forms."""
    out, k, v = operands.out, operands.k_new, operands.v_new
    present = tuple([None if found is None else signature(found) for found in _optional_operands(operands)])
    return (
        present,
        None if out is None else (out.shape, out.strides, out.dtype, out.device, out.readonly, out.pointer & 15),
        None if k is None or v is None else (k.pointer | v.pointer) & 15,
        operands.uniform_length is not None,
    )


def _append_signatures(operands: AppendOperands) -> tuple:
    """The same for an append."""
    present = [None if found is None else signature(found) for found in _optional_append_operands(operands)]
    return tuple(present), operands.uniform_length is not None


# ------------------------------------------------------------------------------------------------ running


def run_call(call: Call, operands: Operands, out: Array | None) -> Array | tuple[Array, Array]:
    """Run, and hand the results over in q's library; `out` is the caller's own array, if there is one."""
    q = operands.q
    with device_of(q):
        run_into_views(call, operands)
        result = deliver(operands.out, q) if out is None else out
        return (result, deliver(operands.lse, q)) if call.problem.lse else result


def run_into_views(call: Call, operands: Operands) -> None:
    """Make what outputs there are not yet, and run. q's device is the current one."""
    q = operands.q
    if operands.out is None:
        operands.out = empty(q, call.out_shape, call.out_dtype)
    if call.problem.lse:
        operands.lse = empty(q, call.lse_shape, call.lse_dtype)
    in_order(partial(call.run, operands), q, _all_operands(operands))


_all_operands = attrgetter(*(name for name in Operands.__slots__ if name != "uniform_length"))
all_append_operands = attrgetter(*(name for name in AppendOperands.__slots__ if name != "uniform_length"))
_optional_operands = attrgetter(*(name for name in Operands.__slots__[5:] if name != "uniform_length"))
_optional_append_operands = attrgetter(*(name for name in AppendOperands.__slots__[4:] if name != "uniform_length"))


# ------------------------------------------------------------------------------------------------ arguments


def optional_view(array: Array | None, name: str) -> View | None:
    """The view of an array that need not be given."""
    return None if array is None else view(array, name)


def checking(check: bool | None, device: int) -> bool:
    """Whether to read the contents of index arrays: always on the CPU, where it costs nothing."""
    if check is None:
        return device < 0 or (_variables.get(_variable) is not None and _checks_asked_for())
    if not isinstance(check, (bool, np.bool_)):
        refuse("check", repr(check), "True, False or None", TypeError)
    return bool(check) or device < 0


# As os.environ keeps them: it takes long itself to find out that there is no such variable.
_variables = getattr(os.environ, "_data", os.environ)
_variable = CHECK_VARIABLE if _variables is os.environ else os.environ.encodekey(CHECK_VARIABLE)


def _checks_asked_for() -> bool:
    return os.environ.get(CHECK_VARIABLE, "").lower() in ("1", "true", "yes", "on")


def index_contents(
    operands: Operands | AppendOperands, batch: int, lengths_name: str = "seqused_k"
) -> dict[str, np.ndarray]:
    """Host arrays of index arrays and scales, by role; lengths_name is that of lengths. On CUDA this has to wait."""
    arrays = {}
    if operands.uniform_length is not None:
        arrays["cache_seqlens"] = np.full(batch, operands.uniform_length, np.int32)
    for role in (*INDEX_ROLES, *SCALE_ROLES):
        found = getattr(operands, role, None)
        if found is not None:
            arrays[lengths_name if role == "seqused_k" else role] = host_array(found)
    return arrays


def lengths(name: str, value: Array | int | None) -> tuple[View | None, int | None]:
    """Lengths as (a view of an array, the one length for all sequences): at most one of the two is given."""
    if isinstance(value, (bool, np.bool_, float, np.floating)):
        refuse(name, repr(value), "an int, or an int32 array", TypeError)
    if isinstance(value, (int, np.integer)):
        return None, int(value)
    return optional_view(value, name), None


def read_cache_arguments(
    operands: Operands,
    k: Array | None,
    v: Array | None,
    rotary_cos: Array | None,
    rotary_sin: Array | None,
    cache_seqlens: Array | int | None,
    cache_batch_idx: Array | None,
    cache_leftpad: Array | None,
    block_table: Array | None,
    alibi_slopes: Array | None,
    sinks: Array | None,
    k_scale: Array | float | None,
    v_scale: Array | float | None,
) -> tuple[float | None, float | None]:
    """Put the optional arrays of attention_with_kvcache into the operands. Scales that are numbers are returned."""
    operands.block_table = optional_view(block_table, "block_table")
    operands.cache_batch_idx = optional_view(cache_batch_idx, "cache_batch_idx")
    operands.cache_leftpad = optional_view(cache_leftpad, "cache_leftpad")
    operands.alibi_slopes = optional_view(alibi_slopes, "alibi_slopes")
    operands.sinks = optional_view(sinks, "sinks")
    operands.k_new, operands.v_new = optional_view(k, "k"), optional_view(v, "v")
    operands.seqused_k, operands.uniform_length = lengths("cache_seqlens", cache_seqlens)
    return rotary_and_scales(operands, rotary_cos, rotary_sin, k_scale, v_scale)


def rotary_and_scales(
    operands: Operands | AppendOperands,
    rotary_cos: Array | None,
    rotary_sin: Array | None,
    k_scale: Array | float | None,
    v_scale: Array | float | None,
) -> tuple[float | None, float | None]:
    """Put these into the operands. Scales that are numbers go by value: they are returned."""
    if rotary_cos is not None or rotary_sin is not None:
        operands.rotary_cos = optional_view(rotary_cos, "rotary_cos")
        operands.rotary_sin = optional_view(rotary_sin, "rotary_sin")
    if not (k_scale is None or isinstance(k_scale, numbers.Real)):
        operands.k_scale, k_scale = view(k_scale, "k_scale"), None
    if not (v_scale is None or isinstance(v_scale, numbers.Real)):
        operands.v_scale, v_scale = view(v_scale, "v_scale"), None
    return k_scale, v_scale


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


def form_of_call(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array | None,
    block_table: Array | None,
    only_varlen: Mapping[str, Any],
    only_cached: Mapping[str, Any],
) -> str:
    """Which function takes such arguments: "attention", "attention_varlen" or "attention_with_kvcache".

    The mappings are of arguments that only one of them takes, by name; what does not fit together is refused.
    """
    varlen = cu_seqlens_q is not None or RaggedArray in (type(q), type(k), type(v))
    for name, given in (only_cached if varlen else only_varlen).items():
        if given is not None and varlen:
            refuse(name, "given together with cu_seqlens_q", "None: attention_varlen does not take it")
        if given is not None:
            refuse(name, "given without cu_seqlens_q", "None: only attention_varlen takes it")
    if varlen:
        return "attention_varlen"
    cached = any(given is not None for given in (*only_cached.values(), block_table))
    return "attention_with_kvcache" if cached else "attention"


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


def ragged_results(
    results: Array | tuple[Array, Array], q: Array | RaggedArray, out: Array | RaggedArray | None
) -> Array | RaggedArray | tuple[Array | RaggedArray, Array]:
    """The results of a call on packed values as the caller receives them: a RaggedArray if q or `out` is one."""
    if isinstance(results, tuple):
        values, lse = results
        return ragged_results(values, q, out), lse
    if type(out) is RaggedArray:
        return out
    return q.with_values(results) if type(q) is RaggedArray else results


def check_results(operands: Operands, out_dtype: str, names: tuple[str, str, str]) -> None:
    """Refuse an out that lies on an input, and results that q's library cannot take."""
    q = operands.q
    if out_dtype == "float64" and q.library == "jax" and not sys.modules["jax"].config.jax_enable_x64:
        refuse("kernel", "'numpy_float64' with JAX arrays", "jax_enable_x64, without which JAX would round the result")
    if operands.out is not None:
        _refuse_overlap(operands, names)


def _refuse_overlap(operands: Operands, names: tuple[str, str, str]) -> None:
    read = (("q", operands.q), (names[0], operands.k), (names[1], operands.v))
    for name, source in (*read, ("k", operands.k_new), ("v", operands.v_new)):
        if source is not None and overlap(operands.out, source):
            refuse("out", f"an array whose memory range meets {name}'s", "memory of its own")
