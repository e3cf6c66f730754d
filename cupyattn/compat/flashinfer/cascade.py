"""Merging of attention states, and attention over keys that many sequences share, under FlashInfer's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...arrays import refuse, view
from ...problem import check_writable
from ...shared_prefix import attention_with_shared_prefix
from ...states import merge_states as merge_natural
from .arguments import check_int, refuse_unplanned, split_cache
from .decode import BatchDecodeWithPagedKVCacheWrapper
from .library import Array, Library, library_of
from .lse import LN2, LOG2E, scaled
from .prefill import BatchPrefillWithPagedKVCacheWrapper
from .single import NO_SCALES, attend_rows, no_masks, rows_first
from .steps import Results

State = tuple[Array, Array]
"""v (rows, num_heads, head_dim) and its lse to base 2, (rows, num_heads)."""


def merge_state(v_a: Array, s_a: Array, v_b: Array, s_b: Array) -> State:
    """Attention over two disjoint sets of keys, from attention over each.

    Args:
        v_a, v_b: (seq_len, num_heads, head_dim), of one dtype.
        s_a, s_b: their lse **to base 2**, as the functions here return it: float32 (seq_len, num_heads).

    Returns:
        (v, s), of the shapes of v_a and s_a.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat import flashinfer
    >>> v, s = np.ones((5, 4, 64), np.float16), np.zeros((5, 4), np.float32)
    >>> merged, lse = flashinfer.merge_state(v, s, 3 * v, s)
    >>> float(merged[0, 0, 0]), float(lse[0, 0])
    (2.0, 1.0)
    """
    library = _check_states(("v_a", v_a, s_a), ("v_b", v_b, s_b))
    return _merged(library, [v_a, v_b], [s_a, s_b])


def merge_state_in_place(v: Array, s: Array, v_other: Array, s_other: Array, mask: Array | None = None) -> None:
    """`merge_state` of (v, s) and (v_other, s_other) into (v, s).

    Args:
        v, v_other: (seq_len, num_heads, head_dim), of one dtype.
        s, s_other: their lse to base 2, float32 (seq_len, num_heads).
        mask: bool (seq_len,), which rows are merged; the others stay as they are. None for all.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    library = _check_states(("v", v, s), ("v_other", v_other, s_other))
    for name, array in (("v", v), ("s", s)):
        check_writable(name, view(array, name))
    if mask is not None and (found := view(mask, "mask")).shape != (v.shape[0],):
        refuse("mask", f"shape {found.shape}", (v.shape[0],))
    merged, lse = _merged(library, [v, v_other], [s, s_other])
    with library.current():
        if mask is not None:
            chosen = library.cast(mask, "bool")
            merged = library.xp.where(chosen[:, None, None], merged, v)
            lse = library.xp.where(chosen[:, None], lse, s)
        v[...], s[...] = merged, lse


def merge_states(v: Array, s: Array) -> State:
    """Attention over all keys, from attention over each of several disjoint sets.

    Args:
        v: (seq_len, num_states, num_heads, head_dim).
        s: their lse to base 2, float32 (seq_len, num_states, num_heads).

    Returns:
        (v, s): (seq_len, num_heads, head_dim) and float32 (seq_len, num_heads).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    values, weights = view(v, "v"), view(s, "s")
    if len(values.shape) != 4 or not values.shape[1]:
        refuse("v", f"shape {values.shape}", "(seq_len, num_states, num_heads, head_dim) with at least one state")
    if weights.shape != values.shape[:3]:
        refuse("s", f"shape {weights.shape}", f"{values.shape[:3]}: (seq_len, num_states, num_heads), as in v")
    library = library_of(values, "v")
    states = range(values.shape[1])
    return _merged(library, [v[:, i] for i in states], [s[:, i] for i in states])


def _check_states(*states: tuple[str, Array, Array]) -> Library:
    """The library of states (name of v, v, s), which must all be of one form."""
    first_name, first, _ = states[0]
    like = view(first, first_name)
    if len(like.shape) != 3:
        refuse(first_name, f"shape {like.shape}", "(seq_len, num_heads, head_dim)")
    for name, v, s in states:
        values, weights = view(v, name), view(s, name.replace("v", "s", 1))
        if (values.shape, values.dtype) != (like.shape, like.dtype):
            expected = f"{first_name}'s {like.dtype} of shape {like.shape}"
            refuse(name, f"{values.dtype} of shape {values.shape}", expected)
        if weights.shape != like.shape[:2]:
            expected = f"{like.shape[:2]}: (seq_len, num_heads), as in {name}"
            refuse(name.replace("v", "s", 1), f"shape {weights.shape}", expected)
    return library_of(like, first_name)


def _merged(library: Library, values: list[Array], weights: list[Array]) -> State:
    """Merged states, whose lses are to base 2."""
    with library.current():
        natural = [scaled(library, s.T, LN2) for s in weights]
        out, lse = merge_natural(_of_one_form(library, values), natural)
        return out, scaled(library, lse.T, LOG2E)


def _of_one_form(library: Library, values: list[Array]) -> list[Array]:
    """The arrays, contiguous where they do not have the same strides."""
    strides = {view(array).strides for array in values}
    return values if len(strides) == 1 else [library.contiguous(array) for array in values]


def merge_results(library: Library, results: list[Results]) -> Array:
    """The output over all keys, from what steps gave for each set of them."""
    if len(results) == 1:
        return results[0][0]
    with library.current():
        natural = [scaled(library, lse.T, 1.0) for _, lse in results]
        return merge_natural(_of_one_form(library, [out for out, _ in results]), natural)[0]


class MultiLevelCascadeAttentionWrapper:
    """Attention over keys in levels: each level's keys are shared by more sequences than those of the next.

    A level says which rows of q share which pages of one cache: a `BatchPrefillWithPagedKVCacheWrapper` each, whose
    results are merged. Where all rows share a level's pages, or each row has its own, it takes the decode kernel.

    Args:
        num_levels: at least 1.
        float_workspace_buffer, kv_layout, use_cuda_graph: as in that wrapper.
        qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr: lists of a
            level's buffers each.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Array,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[Array] | None = None,
        paged_kv_indptr_buf_arr: list[Array] | None = None,
        paged_kv_indices_buf_arr: list[Array] | None = None,
        paged_kv_last_page_len_buf_arr: list[Array] | None = None,
    ) -> None:
        self._num_levels = check_int("num_levels", num_levels, 1)
        self._use_cuda_graph = bool(use_cuda_graph)
        buffers = [()] * num_levels
        if use_cuda_graph:
            arrays = {
                "qo_indptr_buf_arr": qo_indptr_buf_arr,
                "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
                "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
                "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
            }
            buffers = self._by_level(arrays)
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, use_cuda_graph, *own)
            for own in buffers
        ]
        self._kv_layout = kv_layout

    def _by_level(self, lists: dict[str, Sequence[Array] | None]) -> list[tuple[Array, ...]]:
        for name, arrays in lists.items():
            if not isinstance(arrays, (list, tuple)):
                refuse(
                    name, type(arrays).__name__, f"a list of {self._num_levels} arrays, one for each level", TypeError
                )
            if len(arrays) != self._num_levels:
                refuse(name, f"{len(arrays)} arrays", f"{self._num_levels}, one for each level")
        return list(zip(*lists.values(), strict=True))

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Array, int_workspace_buffers: list[Array]) -> None:
        """Take another buffer, of the same library and device. Those for integers are accepted, and not needed."""
        for level in self._levels:
            level.reset_workspace_buffer(float_workspace_buffer, None)

    def plan(
        self,
        qo_indptr_arr: list[Array],
        paged_kv_indptr_arr: list[Array],
        paged_kv_indices_arr: list[Array],
        paged_kv_last_page_len: list[Array],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        """Take in the sequences of all levels, the most shared one first.

        If a level is refused, none has a plan any more.

        Args:
            qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len: lists of what
                `BatchPrefillWithPagedKVCacheWrapper.plan` takes, for each level. All levels cover the same rows of q.
            causal: in the last level; the others are seen as a whole.

        The other arguments are those of `BatchPrefillWithPagedKVCacheWrapper.plan`, for all levels.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
        """
        lists = {
            "qo_indptr_arr": qo_indptr_arr,
            "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        planned = zip(self._levels, self._by_level(lists), strict=True)
        try:
            for i, (level, arrays) in enumerate(planned):
                level.plan(
                    *arrays,
                    num_qo_heads,
                    num_kv_heads,
                    head_dim,
                    page_size,
                    causal=causal and i == self._num_levels - 1,
                    pos_encoding_mode=pos_encoding_mode,
                    use_fp16_qk_reduction=use_fp16_qk_reduction,
                    sm_scale=sm_scale,
                    window_left=window_left,
                    logits_soft_cap=logits_soft_cap,
                    rope_scale=rope_scale,
                    rope_theta=rope_theta,
                    q_data_type=q_data_type,
                    kv_data_type=kv_data_type,
                )
        except (TypeError, ValueError):
            for level in self._levels:
                level._forget()
            raise

    begin_forward = plan

    def run(self, q: Array, paged_kv_cache: Array | tuple[Array, Array]) -> Array:
        """Attention of q over all levels of the last plan.

        Args:
            q: (rows, num_qo_heads, head_dim).
            paged_kv_cache: as in `BatchDecodeWithPagedKVCacheWrapper.run`.

        Returns:
            An array (rows, num_qo_heads, head_dim) of q's dtype, to which the results of the levels are rounded before
            they are merged.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
            RuntimeError: there was no plan.
        """
        k, v = split_cache(paged_kv_cache, self._kv_layout)
        results = [level._natural(q, k, v) for level in reversed(self._levels)]
        return merge_results(self._levels[0]._home.library, results)

    forward = run

    def end_forward(self) -> None:
        """Of no effect, as in FlashInfer."""


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper:
    """Decoding of sequences that begin alike: the prefix is one array, what is a sequence's own is paged.

    Runs `cupyattn.attention_with_shared_prefix`.

    Args:
        float_workspace_buffer, kv_layout: as in `BatchDecodeWithPagedKVCacheWrapper`; the layout holds for the prefix
            too.
    """

    def __init__(self, float_workspace_buffer: Array, kv_layout: str = "NHD") -> None:
        self._own = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(self, float_workspace_buffer: Array, int_workspace_buffer: Array) -> None:
        """Take another buffer, of the same library and device. The one for integers is accepted, and not needed."""
        self._own.reset_workspace_buffer(float_workspace_buffer, None)

    def begin_forward(
        self,
        unique_kv_indptr: Array,
        unique_kv_indices: Array,
        unique_kv_last_page_len: Array,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: Any = "float16",
    ) -> None:
        """Take in what each sequence has of its own; arguments as in `BatchDecodeWithPagedKVCacheWrapper.plan`."""
        table = unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len
        self._own.plan(*table, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type=data_type)

    def forward(
        self, q: Array, k_shared: Array, v_shared: Array, unique_kv_cache: Array | tuple[Array, Array]
    ) -> Array:
        """Attention of one query of each sequence over the prefix and what is its own.

        Args:
            q: (batch, num_qo_heads, head_dim).
            k_shared, v_shared: (prefix_len, num_kv_heads, head_dim), or with "HND" heads first.
            unique_kv_cache: as in `BatchDecodeWithPagedKVCacheWrapper.run`.

        Returns:
            An array (batch, num_qo_heads, head_dim) of q's dtype.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
            RuntimeError: there was no plan.
        """
        step = self._own._step
        if step is None:
            refuse_unplanned()
        k, v = split_cache(unique_kv_cache, self._kv_layout)
        table, lengths = step.sequences(q, k, v)
        prefix = rows_first("k_shared", k_shared, self._kv_layout), rows_first("v_shared", v_shared, self._kv_layout)
        where = {"cache_seqlens": lengths, "block_table": table, "layout": self._kv_layout}
        return attention_with_shared_prefix(q[:, None], *prefix, k, v, **where)[:, 0]

    def end_forward(self) -> None:
        """Of no effect, as in FlashInfer."""


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper:
    """Prefill of sequences that begin alike: the prefix is one array, what is a sequence's own is paged.

    Args:
        float_workspace_buffer, kv_layout: as in `BatchPrefillWithPagedKVCacheWrapper`; the layout holds for the prefix
            too.
    """

    def __init__(self, float_workspace_buffer: Array, kv_layout: str = "NHD") -> None:
        self._own = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._kv_layout = kv_layout

    def reset_workspace_buffer(self, float_workspace_buffer: Array, int_workspace_buffer: Array) -> None:
        """Take another buffer, of the same library and device. The one for integers is accepted, and not needed."""
        self._own.reset_workspace_buffer(float_workspace_buffer, None)

    def begin_forward(
        self,
        qo_indptr: Array,
        paged_kv_indptr: Array,
        paged_kv_indices: Array,
        paged_kv_last_page_len: Array,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """Take in what each sequence has of its own; arguments as in `BatchPrefillWithPagedKVCacheWrapper.plan`.

        There is no argument for a dtype: that of q is taken, in the first `forward`.
        """
        table = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._own.plan(*table, num_qo_heads, num_kv_heads, head_dim, page_size)

    def forward(
        self,
        q: Array,
        k_shared: Array,
        v_shared: Array,
        unique_kv_cache: Array | tuple[Array, Array],
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Array:
        """Attention of packed queries over the prefix and what is their sequences' own.

        Args:
            q: (qo_indptr[-1], num_qo_heads, head_dim).
            k_shared, v_shared: (prefix_len, num_kv_heads, head_dim), or with "HND" heads first.
            unique_kv_cache: as in `BatchDecodeWithPagedKVCacheWrapper.run`.
            causal: among what is a sequence's own.
            use_fp16_qk_reduction, rope_scale, rope_theta: accepted; nothing is rotated here.
            sm_scale: the softmax scale, 1/sqrt(head_dim) if None.

        Returns:
            An array (qo_indptr[-1], num_qo_heads, head_dim) of q's dtype.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
            RuntimeError: there was no plan.
        """
        dtype = view(q, "q").dtype
        self._own._again_with(dtype, causal=causal, sm_scale=sm_scale)
        k, v = split_cache(unique_kv_cache, self._kv_layout)
        own = self._own._natural(q, k, v)
        prefix = rows_first("k_shared", k_shared, self._kv_layout), rows_first("v_shared", v_shared, self._kv_layout)
        shared = attend_rows(q, *prefix, no_masks, NO_SCALES, True, sm_scale=sm_scale)
        return merge_results(self._own._home.library, [shared, own])

    def end_forward(self) -> None:
        """Of no effect, as in FlashInfer."""
