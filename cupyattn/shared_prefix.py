"""Decoding of many sequences that begin alike: the common prefix is read once for the whole batch.

Source: Hydragen (Juravsky et al. 2024, arXiv:2402.05099); the cascade wrappers of the flashinfer package do the same.
Attention over the prefix is one matrix product for the queries of all sequences, attention over each sequence's own
tokens is as ever, and the two are merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .arrays import View, contiguous_strides, current_stream, deliver, host_array, overlap, refuse, view
from .attention import (
    CACHE_NAMES,
    Array,
    checking,
    find_call,
    index_contents,
    lengths,
    optional_view,
    read_cache_arguments,
    run_into_views,
    signatures,
)
from .kernels.operands import Operands
from .plan import prefix_kernel
from .problem import (
    Problem,
    check_flag,
    check_index_array,
    check_indices,
    check_output,
    check_rank,
    check_uniform,
)
from .states import merge_views
from .streams import device_of

PREFIX_NAMES = ("k_prefix", "v_prefix", "prefix_seqlen")


def attention_with_shared_prefix(
    q: Array,
    k_prefix: Array,
    v_prefix: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    prefix_block_table: Array | None = None,
    prefix_seqlen: Array | int | None = None,
    k: Array | None = None,
    v: Array | None = None,
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
    return_lse: bool = False,
    out: Array | None = None,
    kernel: str = "auto",
    check: bool | None = None,
) -> Array | tuple[Array, Array]:
    """`attention_with_kvcache` for sequences that all begin with the same tokens, whose keys are stored and read once.

    Every query sees the whole prefix, and of its own sequence's cache what `attention_with_kvcache` says: the cache
    holds what comes behind the prefix, and cache_seqlens counts only that. With k and v given they are appended to the
    cache in place. There is no rotary embedding here: positions go on from the prefix, so rotate q and k for
    prefix length + cache_seqlens + i with `apply_rotary` first.

    The source is Hydragen (Juravsky et al. 2024, arXiv:2402.05099). The results of the two parts are rounded to q's
    dtype before they are merged. Arguments that are not named here are those of `attention_with_kvcache`.

    Args:
        q: (batch, seqlen_q, heads, head_dim), queries evenly spaced over the whole batch, as in a contiguous array.
        k_prefix, v_prefix: (seqlen, kv_heads, head_dim); or with prefix_block_table the blocks that hold the prefix, in
            k_cache's form (and often k_cache itself). Of the caches' head_dims, dtype, kv_dtype and scales.
        prefix_block_table: int32 (max_blocks,), which blocks.
        prefix_seqlen: how many tokens the prefix has, if not as many as there are rows: an int, or an int32 array (1,),
            which with sinks must not be 0.
        causal: among each sequence's own tokens.
        window, alibi_slopes: not possible here.
        sinks: float32 (heads,); counted once.
        kernel: as in `attention`, for both parts; "auto" reads the prefix by the kernel that suits the number of
            queries: both share its keys out over the chip. numpy_float64 is not possible: parts are merged in float32.

    Returns:
        An array (batch, seqlen_q, heads, head_dim of v_cache) of q's dtype; with return_lse also the lse, float32
        (batch, heads, seqlen_q).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import attention_with_shared_prefix
    >>> k_prefix = v_prefix = np.ones((100, 2, 64), np.float32)  # a system prompt of 100 tokens
    >>> k_cache, v_cache = np.zeros((2, 3, 16, 2, 64), np.float32)  # 3 sequences, room for 16 tokens of their own
    >>> q, k, v = np.ones((3, 1, 8, 64), np.float32), *np.ones((2, 3, 1, 2, 64), np.float32)
    >>> own = np.array([0, 5, 7], np.int32)
    >>> attention_with_shared_prefix(q, k_prefix, v_prefix, k_cache, v_cache, k=k, v=v, cache_seqlens=own).shape
    (3, 1, 8, 64)
    """
    if window is not None:
        refuse("window", repr(window), "None: every query sees the whole prefix, however far before it that lies")
    if alibi_slopes is not None:
        expected = "None: the bias depends on how far before a query a key lies, and the prefix is read for all at once"
        refuse("alibi_slopes", "an array", expected)
    if isinstance(kernel, str) and kernel == "numpy_float64":
        refuse("kernel", repr(kernel), "'numpy' or 'auto': the two parts are merged in float32")

    own = Operands(view(q, "q"), view(k_cache, "k_cache"), view(v_cache, "v_cache"), None)
    places = cache_seqlens, cache_batch_idx, cache_leftpad, block_table
    scales = read_cache_arguments(own, k, v, None, None, *places, None, sinks, k_scale, v_scale)
    target = optional_view(out, "out")
    prefix = _prefix_operands(own, k_prefix, v_prefix, prefix_block_table, prefix_seqlen)
    rows = prefix.k.shape[1] if prefix.block_table is None else prefix.block_table.shape[1]
    if rows and prefix.uniform_length != 0:
        own.sinks = None
    else:
        prefix.sinks = None  # where no key is seen, a sink does not count

    masks = (None, softmax_scale, softcap, True)
    options = (causal, *masks, kernel, None, None, layout, (kv_dtype, *scales, True, num_splits))
    own_call = find_call(own, options, signatures(own), CACHE_NAMES)
    if kernel == "auto":
        kernel = _kernel_for_prefix(own.q, own_call.problem, prefix.sinks is not None)
    prefix_layout = layout if prefix.block_table is not None else "NHD"
    held_as = own_call.problem.kv_dtype if own_call.problem.kv_dtype != own.q.dtype else None
    options = (False, *masks, kernel, None, None, prefix_layout, (held_as, *scales, True, num_splits))
    prefix_call = find_call(prefix, options, signatures(prefix), PREFIX_NAMES)
    return_lse = check_flag("return_lse", return_lse)
    _refuse_other_heads(own_call.problem, prefix_call.problem)
    if target is not None:
        _check_target(target, own, prefix, own_call.problem.head_dim_v)
    contents = checking(check, own.q.device)
    _check_prefix(prefix_call.problem, prefix, contents)
    if own.uniform_length is not None:
        check_uniform(own_call.problem, own.uniform_length)
    if contents:
        check_indices(own_call.problem, index_contents(own, own_call.problem.batch, "cache_seqlens"))

    with device_of(own.q):
        run_into_views(prefix_call, prefix)
        run_into_views(own_call, own)
        shape = own.out.shape
        outs = [own.out, _seen_as(prefix.out, shape, contiguous_strides(shape))]
        lses = [own.lse, _by_sequence(prefix.lse, shape)]
        merged, lse = merge_views(outs, lses, target)
        if own.out.library == "cupy":  # PyTorch keeps what was allocated for a graph by itself
            from .kernels.workspace import keep_if_captured  # needs CuPy

            keep_if_captured((outs, lses, prefix.lse), current_stream(own.q))
        result = deliver(merged, own.q) if out is None else out
        return (result, deliver(lse, own.q)) if return_lse else result


def _prefix_operands(
    own: Operands, k_prefix: Array, v_prefix: Array, block_table: Array | None, seqlen: Array | int | None
) -> Operands:
    """The queries of all sequences as those of one, whose cache is the prefix."""
    q, keys, values = own.q, view(k_prefix, "k_prefix"), view(v_prefix, "v_prefix")
    table = optional_view(block_table, "prefix_block_table")
    if table is not None:
        check_index_array("prefix_block_table", table, q, ndim=1)
        table = _seen_as(table, (1, *table.shape), (table.shape[0], 1))
    else:
        form = "(seqlen, kv_heads, head_dim), or prefix_block_table for blocks"
        check_rank("k_prefix", keys, 3, form)
        check_rank("v_prefix", values, 3, form)
        keys, values = (_seen_as(found, (1, *found.shape), (0, *found.strides)) for found in (keys, values))
    prefix = Operands(_all_as_one(q), keys, values, None, block_table=table)
    prefix.seqused_k, prefix.uniform_length = lengths("prefix_seqlen", seqlen)
    prefix.sinks, prefix.k_scale, prefix.v_scale = own.sinks, own.k_scale, own.v_scale
    return prefix


def _all_as_one(q: View) -> View:
    """q (batch, seqlen_q, heads, head_dim) seen as (1, batch * seqlen_q, heads, head_dim)."""
    check_rank("q", q, 4, "(batch, seqlen_q, heads, head_dim)")
    batch, seqlen, *head = q.shape
    outer, row, *steps = q.strides
    if seqlen == 1:
        row = outer
    elif batch > 1 and outer != seqlen * row and 0 not in q.shape:
        came = f"strides {q.strides}, queries that are not evenly spaced over the batch"
        refuse("q", came, f"a first stride of {seqlen} times the second, as in a contiguous array")
    return _seen_as(q, (1, batch * seqlen, *head), (batch * seqlen * row, row, *steps))


def _seen_as(found: View, shape: tuple[int, ...], strides: tuple[int, ...]) -> View:
    """The same memory in another shape. On the CPU as a NumPy array, since backends there take arrays as they are."""
    if found.device >= 0:
        return replace(found, shape=shape, strides=strides)
    array = host_array(found)
    steps = [step * array.itemsize for step in strides]
    return view(np.lib.stride_tricks.as_strided(array, shape, steps, writeable=array.flags.writeable))


def _by_sequence(lse: View, shape: tuple[int, ...]) -> View:
    """(1, heads, batch * seqlen_q) as (batch, heads, seqlen_q), contiguous like the lse of sequences."""
    batch, seqlen, heads, _ = shape
    if batch == 1 or heads == 1:
        return _seen_as(lse, (batch, heads, seqlen), contiguous_strides((batch, heads, seqlen)))
    by_head = lse.array.reshape(heads, batch, seqlen)
    if lse.library == "torch":
        return view(by_head.permute(1, 0, 2).contiguous())
    return view(by_head.transpose(1, 0, 2).copy())


def _kernel_for_prefix(q: View, own: Problem, sinks: bool) -> str:
    if q.device < 0:
        return "auto"
    from .kernels.launch import describe_device  # needs CuPy

    return prefix_kernel(own, describe_device(q.device), sinks)


def _refuse_other_heads(own: Problem, prefix: Problem) -> None:
    if prefix.num_kv_heads != own.num_kv_heads:
        refuse("k_prefix", f"{prefix.num_kv_heads} heads", f"k_cache's {own.num_kv_heads}")
    if prefix.head_dim_v != own.head_dim_v:
        refuse("v_prefix", f"head_dim {prefix.head_dim_v}", f"v_cache's {own.head_dim_v}")


def _check_target(target: View, own: Operands, prefix: Operands, head_dim_v: int) -> None:
    check_output("out", target, own.q, own.q.dtype, head_dim_v)
    read = {"q": own.q, "k_prefix": prefix.k, "v_prefix": prefix.v, "k_cache": own.k, "v_cache": own.v}
    for name, source in (read | {"k": own.k_new, "v": own.v_new}).items():
        if source is not None and overlap(target, source):
            refuse("out", f"an array whose memory range meets {name}'s", "memory of its own")


def _check_prefix(problem: Problem, prefix: Operands, contents: bool) -> None:
    """Refuse a length that the prefix does not have, and blocks that do not exist. Arrays are read if `contents`."""
    cache, length = problem.cache, problem.cache.rows
    if prefix.uniform_length is not None:
        length = prefix.uniform_length
    elif prefix.seqused_k is not None and contents:
        length = int(host_array(prefix.seqused_k)[0])
    if not 0 <= length <= cache.rows:
        refuse("prefix_seqlen", length, f"0 to {cache.rows}, the rows that the prefix has")
    if not length and problem.sinks:
        refuse("prefix_seqlen", "an array that holds 0", "at least 1 where there are sinks, or the int 0")
    if prefix.block_table is None or not contents:
        return
    blocks = host_array(prefix.block_table).reshape(-1)[: -(-length // cache.block_size)]
    bad = np.flatnonzero((blocks < 0) | (blocks >= cache.entries))
    if len(bad):
        expected = f"0 to {cache.entries - 1}" if cache.entries else "a cache that has blocks"
        refuse("prefix_block_table", f"block {int(blocks[bad[0]])} at [{bad[0]}]", expected)
