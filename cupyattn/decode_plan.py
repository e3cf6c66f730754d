"""A decoding step that is planned once and then run for every token and layer: the host does next to nothing."""

from __future__ import annotations

from .arrays import one_token, refuse, view
from .attention import CACHE_NAMES, Array, optional_view, read_cache_arguments
from .kernels.operands import Operands
from .planned_call import PlannedCall

ROLES = (
    ("q", "q"),
    ("k_cache", "k"),
    ("v_cache", "v"),
    ("cache_seqlens", "seqused_k"),
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


class DecodePlan(PlannedCall):
    """`attention_with_kvcache` for one form of arrays, prepared as far as can be.

    Takes what `attention_with_kvcache` takes, as examples: shapes, strides, dtypes, the device and the alignment of the
    arrays are planned, which of them there are, and all options. Contents are not read and no array is kept. `run` then
    takes arrays of exactly those forms.

    On CUDA a plan has a workspace of its own, in which launches leave partial sums, and steps of other kernels than
    decode their rotated queries. **Runs of one plan must therefore not overlap**: queue them on one stream, or order
    streams by events, replays of graphs that hold them included, or make one plan for each stream. Threads may share a
    plan under the same condition. When a plan is dropped, its memory is reused in the order of the stream that was
    current when it was made; what a graph has captured is kept for good.

    Where q is planned as (batch, heads, head_dim), one query for each sequence, runs take it so, and give out (batch,
    heads, head_dim of v_cache) and lse (batch, heads), so that no array need be given another shape.

    A run can be captured in a CUDA graph, by CuPy's stream capture or by torch.cuda.graph, with `out=` given or not. A
    replay reads lengths, tables, caches and all other arrays as they are then: the graph stays right as sequences grow
    and blocks move. Lengths that are an int are captured as they were.

    Args:
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
            k_scale, v_scale, alibi_slopes, sinks: examples of what each run will get, or None for what none will get. A
            cache_seqlens that is an int stands for any, scales that are numbers are part of the plan.
        out: an example of `run`'s out, if its strides are not those of a new array.
        rotary_interleaved, layout, kv_dtype, num_splits, causal, window, softmax_scale, softcap, return_lse, kernel: as
            in `attention_with_kvcache`.
        check: read and check the contents of index arrays in each run, as in `attention_varlen`: always on the CPU.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import DecodePlan
    >>> q, (k_blocks, v_blocks) = np.ones((2, 1, 8, 64), np.float32), np.ones((2, 9, 16, 2, 64), np.float32)
    >>> step = {"cache_seqlens": np.array([5, 20], np.int32), "block_table": np.array([[0, 1], [2, 3]], np.int32)}
    >>> plan = DecodePlan(q, k_blocks, v_blocks, **step)
    >>> plan.run(q, k_blocks, v_blocks, **step).shape
    (2, 1, 8, 64)
    >>> plan.workspace_bytes, plan.device  # the NumPy backend needs none
    (0, 'cpu')
    """

    __slots__ = ()

    def __init__(
        self,
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
    ) -> None:
        queries, result = view(q, "q"), optional_view(out, "out")
        if len(queries.shape) not in (3, 4):
            expected = "(batch, seqlen_q, heads, head_dim), or (batch, heads, head_dim)"
            refuse("q", f"{len(queries.shape)}-D shape {queries.shape}", expected)
        without_token = len(queries.shape) == 3
        if without_token and result is not None:
            if len(result.shape) != 3 or result.shape[:2] != queries.shape[:2]:
                expected = f"({queries.shape[0]}, {queries.shape[1]}, head_dim of v_cache), as q has no axis of tokens"
                refuse("out", f"shape {result.shape}", expected)
            result = one_token(result)
        if without_token:
            queries = one_token(queries)
        operands = Operands(queries, view(k_cache, "k_cache"), view(v_cache, "v_cache"), result)
        optional = k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
        scales = read_cache_arguments(operands, *optional, alibi_slopes, sinks, k_scale, v_scale)
        masks = (causal, window, softmax_scale, softcap, return_lse)
        options = (*masks, kernel, None, None, layout, (kv_dtype, *scales, rotary_interleaved, num_splits))
        self._prepare(operands, options, CACHE_NAMES, ROLES, check, without_token)

    def run(
        self,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        *,
        k: Array | None = None,
        v: Array | None = None,
        rotary_cos: Array | None = None,
        rotary_sin: Array | None = None,
        cache_seqlens: Array | int | None = None,
        cache_batch_idx: Array | None = None,
        cache_leftpad: Array | None = None,
        block_table: Array | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        k_scale: Array | float | None = None,
        v_scale: Array | float | None = None,
        out: Array | None = None,
    ) -> Array | tuple[Array, Array]:
        """One step, on the current stream of q's library: what `attention_with_kvcache` does with these arrays.

        Arrays may be of any library and lie anywhere. Each must have the planned shape, strides, dtype, device and
        alignment; an array that was planned must be given, any other must not. k and v are appended in place. A run
        that is refused has launched and written nothing.

        Args:
            q: (batch, seqlen_q, heads, head_dim), or (batch, heads, head_dim) if that was planned.
            k_cache, v_cache: the caches or their blocks, as in `attention_with_kvcache`.
            k, v: (batch, seqlen_new, kv_heads, head_dim).
            rotary_cos, rotary_sin: (positions, rotary_dim / 2).
            cache_seqlens, cache_batch_idx, cache_leftpad: int32 (batch,); cache_seqlens is an int if that was planned.
            block_table: int32 (batch, max_blocks).
            alibi_slopes: float32 (heads,) or (batch, heads), sinks: float32 (heads,).
            k_scale, v_scale: float32 (), (1,) or (kv_heads,); numbers were planned and need not be given again.
            out: an array of the result's shape and dtype to write into, apart in memory from q, k, v and the caches.

        Returns:
            As `attention_with_kvcache`: an array (batch, seqlen_q, heads, head_dim of v_cache) of q's dtype in q's
            library, `out` itself if given; where return_lse was planned a pair of it and the lse, float32 (batch,
            heads, seqlen_q). Both without the axis of tokens if q has none.

        Raises:
            TypeError, ValueError: an argument is not as planned. The message names it, what came and what was planned.
        """
        length = -1
        if self._longest is not None:
            length, cache_seqlens = self._length(cache_seqlens), None
        if k_scale is not None:
            k_scale = self._k_scale(k_scale)
        if v_scale is not None:
            v_scale = self._v_scale(v_scale)
        arrays = (
            q,
            k_cache,
            v_cache,
            cache_seqlens,
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
        return self._run(arrays, length, out)
