"""A prefill that is planned once and then run for every layer, chunk or batch of one form, with little host time."""

from __future__ import annotations

from .arrays import view
from .attention import (
    CACHE_NAMES,
    Array,
    form_of_call,
    optional_view,
    ragged_results,
    read_cache_arguments,
    share_cu_seqlens,
    unpack_ragged,
)
from .kernels.operands import Operands
from .planned_call import PlannedCall, Roles, planned_view
from .ragged import RaggedArray


class PrefillPlan(PlannedCall):
    """`attention`, `attention_varlen` or `attention_with_kvcache` for one form of arrays, prepared as far as can be.

    Takes what one of the three takes, as examples, the arrays q, k (or k_cache) and v (or v_cache) by position: with
    cu_seqlens_q, or a RaggedArray, it plans `attention_varlen`; else with anything that only a cache has
    `attention_with_kvcache`, to which new rows are appended as k= and v=; else `attention`. What is planned are the
    shapes, strides, dtypes, device and alignment of the arrays, which of them there are, and all options. Contents are
    not read and no array is kept. `run` then takes arrays of exactly those forms: another layer's, or those of another
    batch of as many rows and sequences, however the rows are split.

    On CUDA a plan has a workspace of its own where its kernels need one (`workspace_bytes` is not 0): for counters and
    partial sums, and with rotary embedding for the rotated queries. **Runs of one plan must therefore not overlap**:
    queue them on one stream, or order streams by events, replays of graphs that hold them included, or make one plan
    for each stream. Threads may share a plan under the same condition. When a plan is dropped, its memory is reused in
    the order of the stream that was current when it was made; what a graph has captured is kept for good.

    A run can be captured in a CUDA graph, by CuPy's stream capture or by torch.cuda.graph, with `out=` given or not. A
    replay reads lengths, tables, caches and all other arrays as they are then. Lengths that are an int are captured as
    they were.

    Args:
        q, k_cache, v_cache, cu_seqlens_q, cu_seqlens_k, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
            cache_leftpad, block_table, seqused_k, k_scale, v_scale, alibi_slopes, sinks: examples of what each run will
            get, or None for what none will get. A cache_seqlens that is an int stands for any, scales that are numbers
            are part of the plan. Without cu_seqlens_k packed keys have cu_seqlens_q, in each run.
        max_seqlen_q, max_seqlen_k: as in `attention_varlen`, for all runs: the longest sequence of any, or None.
        out: an example of `run`'s out, if its strides are not those of a new array.
        rotary_interleaved, layout, kv_dtype, num_splits, causal, window, softmax_scale, softcap, return_lse, kernel: as
            in the function that is planned.
        check: read and check the contents of index arrays in each run, as in `attention_varlen`: always on the CPU.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import PrefillPlan
    >>> q, k, v = np.ones((3, 2, 100, 8, 64), np.float32)
    >>> plan = PrefillPlan(q, k, v, causal=True)
    >>> plan.run(q, k, v).shape
    (2, 100, 8, 64)

    Packed, where only the sums of the lengths are planned:

    >>> packed = np.ones((200, 8, 64), np.float32)
    >>> plan = PrefillPlan(packed, packed, packed, np.array([0, 50, 200], np.int32), causal=True)
    >>> plan.run(packed, packed, packed, np.array([0, 120, 180], np.int32)).shape
    (200, 8, 64)

    A chunk of a prompt, appended to a cache with room for 1000 tokens, of which it holds any number:

    >>> cache = np.zeros((2, 2, 1000, 8, 64), np.float32)
    >>> plan = PrefillPlan(q, *cache, k=k, v=v, cache_seqlens=0, causal=True)
    >>> for chunk in range(3):
    ...     out = plan.run(q, *cache, k=k, v=v, cache_seqlens=100 * chunk)
    >>> int(cache[0, 0, :, 0, 0].sum())
    300
    """

    __slots__ = ("_cached", "_one_cu_seqlens")

    def __init__(
        self,
        q: Array | RaggedArray,
        k_cache: Array | RaggedArray,
        v_cache: Array | RaggedArray,
        cu_seqlens_q: Array | None = None,
        cu_seqlens_k: Array | None = None,
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
        num_splits: int | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqused_k: Array | None = None,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        return_lse: bool | str = False,
        out: Array | RaggedArray | None = None,
        kernel: str = "auto",
        check: bool | None = None,
    ) -> None:
        only_cached = {"k": k, "v": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
        only_cached |= {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx}
        only_cached |= {"cache_leftpad": cache_leftpad, "kv_dtype": kv_dtype}
        only_cached |= {"k_scale": k_scale, "v_scale": v_scale, "num_splits": num_splits}
        only_varlen = {"cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
        only_varlen |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        arrays = q, k_cache, v_cache
        form = form_of_call(*arrays, cu_seqlens_q, block_table, only_varlen, only_cached)
        varlen, self._cached = form == "attention_varlen", form == "attention_with_kvcache"
        names = CACHE_NAMES if self._cached else ("k", "v", "seqused_k")
        if varlen:
            *arrays, cu_seqlens_q, cu_seqlens_k = unpack_ragged(*arrays, cu_seqlens_q, cu_seqlens_k)
        found = map(view, arrays, ("q", *names))
        operands = Operands(*found, optional_view(out.values if type(out) is RaggedArray else out, "out"))
        optional = k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
        scales = read_cache_arguments(operands, *optional, alibi_slopes, sinks, k_scale, v_scale)
        if varlen:
            operands.cu_seqlens_q = view(cu_seqlens_q, "cu_seqlens_q")
            operands.cu_seqlens_k = optional_view(cu_seqlens_k, "cu_seqlens_k")
            operands.seqused_k = optional_view(seqused_k, "seqused_k")
            if cu_seqlens_k is None and block_table is None:
                share_cu_seqlens(operands)
        self._one_cu_seqlens = cu_seqlens_k is None and operands.cu_seqlens_k is not None
        masks = (causal, window, softmax_scale, softcap, return_lse)
        cache_options = (kv_dtype, *scales, rotary_interleaved, 0 if num_splits is None else num_splits)
        options = (*masks, kernel, max_seqlen_q, max_seqlen_k, layout, cache_options)
        self._prepare(operands, options, names, _roles(names), check)

    def run(
        self,
        q: Array | RaggedArray,
        k_cache: Array | RaggedArray,
        v_cache: Array | RaggedArray,
        cu_seqlens_q: Array | None = None,
        cu_seqlens_k: Array | None = None,
        *,
        k: Array | None = None,
        v: Array | None = None,
        rotary_cos: Array | None = None,
        rotary_sin: Array | None = None,
        cache_seqlens: Array | int | None = None,
        cache_batch_idx: Array | None = None,
        cache_leftpad: Array | None = None,
        block_table: Array | None = None,
        seqused_k: Array | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        k_scale: Array | float | None = None,
        v_scale: Array | float | None = None,
        out: Array | RaggedArray | None = None,
    ) -> Array | RaggedArray | tuple[Array | RaggedArray, Array]:
        """What the planned function does with these arrays, on the current stream of q's library.

        Arrays may be of any library and lie anywhere. Each must have the planned shape, strides, dtype, device and
        alignment; an array that was planned must be given, any other must not. k and v are appended in place. A run
        that is refused has launched and written nothing.

        Args:
            q: (batch, seqlen_q, heads, head_dim), or packed (total_q, heads, head_dim).
            k_cache, v_cache: keys and values, dense, packed or paged, as in the planned function.
            cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,). RaggedArrays bring their own.
            k, v: (batch, seqlen_new, kv_heads, head_dim), to append.
            rotary_cos, rotary_sin: (positions, rotary_dim / 2).
            cache_seqlens, cache_batch_idx, cache_leftpad, seqused_k: int32 (batch,); cache_seqlens is an int if an int
                was planned.
            block_table: int32 (batch, max_blocks).
            alibi_slopes: float32 (heads,) or (batch, heads), sinks: float32 (heads,).
            k_scale, v_scale: float32 (), (1,) or (kv_heads,); numbers were planned and need not be given again.
            out: an array of the result's shape and dtype to write into, apart in memory from q, keys and values.

        Returns:
            An array of q's shape, but for the head_dim of the values, and of q's dtype, in q's library, a RaggedArray
            if q is one, `out` itself if given; where return_lse was planned a pair of it and the lse, float32 (batch,
            heads, seqlen_q), packed (heads, total_q).

        Raises:
            TypeError, ValueError: an argument is not as planned. The message names it, what came and what was planned.
        """
        if RaggedArray in (type(q), type(k_cache), type(v_cache), type(out)):
            values, k_cache, v_cache, cu_seqlens_q, cu_seqlens_k = unpack_ragged(
                q, k_cache, v_cache, cu_seqlens_q, cu_seqlens_k
            )
            into = out.values if type(out) is RaggedArray else out
        else:
            values, into = q, out
        lengths, other = (cache_seqlens, seqused_k) if self._cached else (seqused_k, cache_seqlens)
        if other is not None:
            planned_view("seqused_k" if self._cached else "cache_seqlens", other, None)
        length = -1
        if self._longest is not None:
            length, lengths = self._length(lengths), None
        if cu_seqlens_k is None and self._one_cu_seqlens:
            cu_seqlens_k = cu_seqlens_q
        if k_scale is not None:
            k_scale = self._k_scale(k_scale)
        if v_scale is not None:
            v_scale = self._v_scale(v_scale)
        arrays = (
            values,
            k_cache,
            v_cache,
            cu_seqlens_q,
            cu_seqlens_k,
            lengths,
            block_table,
            cache_batch_idx,
            cache_leftpad,
            alibi_slopes,
            sinks,
            k,
            v,
            rotary_cos,
            rotary_sin,
            k_scale,
            v_scale,
        )
        results = self._run(arrays, length, into)
        return results if values is q and into is out else ragged_results(results, q, out)


def _roles(names: tuple[str, str, str]) -> Roles:
    """What a run takes; names are those of keys, values and lengths."""
    k, v, lengths = names
    return (
        ("q", "q"),
        (k, "k"),
        (v, "v"),
        ("cu_seqlens_q", "cu_seqlens_q"),
        ("cu_seqlens_k", "cu_seqlens_k"),
        (lengths, "seqused_k"),
        ("block_table", "block_table"),
        ("cache_batch_idx", "cache_batch_idx"),
        ("cache_leftpad", "cache_leftpad"),
        ("alibi_slopes", "alibi_slopes"),
        ("sinks", "sinks"),
        ("k", "k_new"),
        ("v", "v_new"),
        ("rotary_cos", "rotary_cos"),
        ("rotary_sin", "rotary_sin"),
        ("k_scale", "k_scale"),
        ("v_scale", "v_scale"),
    )
