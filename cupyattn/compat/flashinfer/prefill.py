"""Prefill: several queries of each sequence, over a paged cache or over packed keys, under FlashInfer's names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from typing import Any

import numpy as np

from ...arrays import View, refuse, view
from .arguments import (
    LSE_BASES,
    LSE_LAYOUTS,
    Options,
    check_choice,
    dtype_name,
    make_options,
    refuse_given,
    refuse_unplanned,
    split_cache,
)
from .library import Array, Library
from .masks import Masks, read_masks
from .pages import (
    PREFILL_NAMES,
    BlockTables,
    FixedTables,
    IndexArray,
    Names,
    PageArrays,
    Pages,
    check_starts,
    check_table,
    counts_of,
    index_array,
    index_view,
    largest,
    look_at_pages,
    read_together,
    tables_of,
)
from .single import attend_one, check_alibi
from .steps import (
    ByRowStep,
    MaskedStep,
    PaddedStep,
    RaggedStep,
    RotatedRaggedStep,
    RotatedStep,
    dense_step,
    packed_step,
)
from .wrapper import Wrapper

_BUFFERS = Names("paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
_ROW_NAMES = Names("kv_indptr", "kv_indptr", "kv_indptr")
_MOST_ROWS = np.iinfo(np.int32).max


def single_prefill_with_kv_cache(
    q: Array,
    k: Array,
    v: Array,
    scale_q: Array | None = None,
    scale_k: Array | None = None,
    scale_v: Array | None = None,
    o_dtype: Any = None,
    custom_mask: Array | None = None,
    packed_custom_mask: Array | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: tuple[Array, Array] | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
) -> Array | tuple[Array, Array]:
    """Attention of the queries of one request over its keys.

    Args:
        q: (qo_len, num_qo_heads, head_dim), float16, bfloat16 or float32, of NumPy, CuPy or PyTorch.
        k, v: (kv_len, num_kv_heads, head_dim) for kv_layout "NHD", (num_kv_heads, kv_len, head_dim) for "HND"; of q's
            dtype, or FP8 where the library has that dtype. v may have a head_dim of its own.
        scale_q: must be None.
        scale_k, scale_v: for FP8 keys and values, float32 (num_kv_heads,), instead of k_scale and v_scale.
        o_dtype: q's, or None.
        custom_mask: bool (qo_len, kv_len), True where a query sees a key; goes before causal. See
            `BatchPrefillWithPagedKVCacheWrapper.plan` for what it costs.
        packed_custom_mask: the same from `packbits(custom_mask.reshape(-1), "little")`; goes before custom_mask.
        causal: query i sees keys j <= i + kv_len - qo_len.
        pos_encoding_mode: "NONE"; "ALIBI", with causal or a single query; or "ROPE_LLAMA", which rotates copies of q
            and k, query i as position kv_len - qo_len + i.
        use_fp16_qk_reduction, backend: accepted.
        sm_scale: the softmax scale, 1/sqrt(head_dim) if None.
        window_left: how many keys before its diagonal a query sees besides it; -1 for all.
        logits_soft_cap: c > 0 replaces a score s by c * tanh(s / c); not beside ALIBI.
        rope_scale, rope_theta: of ROPE_LLAMA, 1 and 1e4 if None.
        return_lse: also return the log-sum-exp.
        kv_cache_sf: must be None.
        k_scale, v_scale: what k and v are to be multiplied with.

    Returns:
        An array (qo_len, num_qo_heads, head_dim of v) of q's dtype; with return_lse also the lse to **base 2**, float32
        (qo_len, num_qo_heads).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    refuse_given("single_prefill_with_kv_cache", scale_q=scale_q, kv_cache_sf=kv_cache_sf)
    if o_dtype is not None:
        dtype_name("o_dtype", o_dtype, (view(q, "q").dtype,))
    scales = (k_scale if scale_k is None else scale_k), (v_scale if scale_v is None else scale_v)
    return attend_one(
        q,
        k,
        v,
        kv_layout,
        partial(read_masks, custom_mask, packed_custom_mask),
        (None, *scales),
        return_lse,
        causal=causal,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
    )


single_prefill_with_kv_cache_return_lse = partial(single_prefill_with_kv_cache, return_lse=True)


@dataclass(slots=True)
class Queries:
    """The sequences among the packed queries, and what they see of their keys."""

    starts: np.ndarray  # integers (batch + 1,)
    found_counts: np.ndarray | None  # what `counts` comes to, once somebody asks
    frozen: bool  # the next plan may say otherwise under a graph that was captured
    masks: Masks | None = None  # where the kernels' own say it, None
    causal: bool | None = None  # what a custom mask came to; None where there is none, or `masks`
    array: Array | None = None  # `starts`, int32, beside the queries, once they are placed
    longest: int = -1  # found if -1
    total: int = field(init=False)  # rows that the sequences have in all
    rows: int = field(init=False)  # of q: as many, unless the wrapper says otherwise

    def __post_init__(self) -> None:
        self.total = self.rows = int(self.starts[-1])
        if self.longest < 0:
            self.longest = largest(self.counts)

    @property
    def counts(self) -> np.ndarray:
        """int64 (batch,): queries of each sequence."""
        if self.found_counts is None:
            self.found_counts = counts_of(self.starts)
        return self.found_counts

    @property
    def fewer(self) -> int | None:
        """The rows that the sequences have in all, where q may have others."""
        return self.total if self.frozen else None

    @property
    def same(self) -> int | None:
        """The number of queries of every sequence, if that is one number and they are all of q."""
        if self.frozen or self.longest * (len(self.starts) - 1) != self.total:
            return None
        return self.longest or None

    def positions(self, lengths: np.ndarray) -> np.ndarray:
        """int64 (rows,): of each query among its sequence's keys, the last being at the last key."""
        return np.arange(self.total) + np.repeat(lengths - self.starts[1:], self.counts)

    def rounded_longest(self) -> int | None:
        """At least the longest, and one of few numbers, on which plans depend; None where any may come."""
        return None if self.frozen else 1 << (max(self.longest, 1) - 1).bit_length()


class _FixedStarts:
    """int32 (batch + 1,) that stays where it is, and as many rows as the first plan had."""

    def __init__(self, library: Library, name: str, buffer: Array | None) -> None:
        if buffer is None:
            refuse(name, None, "an int32 array, as use_cuda_graph is given")
        self._array = library.zeros(index_view(name, buffer, library.device).shape, "int32")
        self._library = library
        self._rows: int | None = None

    def check(self, name: str, starts: np.ndarray) -> None:
        """Refuse what cannot stand in the array, or has more rows than graphs have captured."""
        if self._array.shape != starts.shape:
            expected = f"{self._array.shape[0]}, the batch size of a wrapper for CUDA graphs being that of its buffers"
            refuse(name, f"{len(starts)} entries", expected)
        if self._rows is not None and starts[-1] > self._rows:
            expected = f"at most {self._rows}, as in this wrapper's first plan, whose rows graphs have captured"
            refuse(name, f"{int(starts[-1])} rows", expected)

    def take_in(self, starts: np.ndarray) -> tuple[Array, int]:
        """The array with these numbers, which were checked, and the rows."""
        self._rows = int(starts[-1]) if self._rows is None else self._rows
        self._library.write(self._array, starts.astype(np.int32))
        return self._array, self._rows


class _Prefill(Wrapper):
    """What prefill over pages and over packed keys share."""

    _fixed_queries: _FixedStarts | None = None

    def _describe(
        self,
        options: Options,
        starts: np.ndarray,
        counts: np.ndarray | None,
        masks: Masks | None = None,
        longest: int = -1,
    ) -> Queries:
        """The queries, checked; where they lie follows in `_take_in`. What is not known of them is found."""
        frozen = self._fixed_queries is not None
        if frozen:
            self._fixed_queries.check("qo_indptr", starts)
            if masks is not None:
                refuse("custom_mask", "a mask", "None in a wrapper for CUDA graphs")
            if options.fp8:
                refuse("kv_data_type", options.kv_dtype, f"{options.q_dtype} in a prefill wrapper for CUDA graphs")
        plain = None if masks is None else masks.as_causal()
        queries = Queries(starts, counts, frozen, masks if plain is None else None, plain, longest=longest)
        masked(options, queries)
        return queries

    def _over_pages(self, options: Options, queries: Queries, pages: Pages, tables: BlockTables, layout: str) -> Any:
        """The step of queries over pages, without rotation."""
        home = self._home
        if queries.masks is not None:
            return MaskedStep(home, options, pages, queries.masks.visible(options.window_left), layout)
        if queries.same is not None:
            return dense_step(home, options, queries.same, pages, tables, layout)
        if not options.fp8:
            form = queries.rows, queries.rounded_longest()
            return packed_step(home, options, form, queries.array, pages, tables, layout, queries.fewer)
        dense = dense_step(home, options, queries.longest, pages, tables, layout)
        return PaddedStep(dense, options, home.library, queries.starts, queries.longest)


def _check_queries(starts: np.ndarray) -> np.ndarray:
    """The counts, int64 (batch,), of qo_indptr, int64."""
    return check_starts("qo_indptr", starts, _MOST_ROWS, "it is int32")


def if_there(indptr: Array, found: IndexArray) -> Array | None:
    """The caller's array if it is on the device, where the kernels read it, as FlashInfer's do."""
    return indptr if type(found) is View else None


def beside(library: Library, there: Array | None, starts: np.ndarray) -> Array:
    """int32 (batch + 1,) where the library's arrays are: the caller's own if there is one."""
    return library.asarray(starts.astype(np.int32)) if there is None else there


def masked(options: Options, queries: Queries) -> Options:
    """The options with the causal flag that a custom mask came to; refused where ALiBi does not go with the mask."""
    causal = options.causal if queries.causal is None else queries.causal
    check_alibi(options, None if queries.masks is not None else causal, queries.longest)
    return options if causal == options.causal else replace(options, causal=causal)


class BatchPrefillWithPagedKVCacheWrapper(_Prefill):
    """Attention of packed queries, a number of each sequence, over a paged cache.

    `plan` reads which rows and pages belong to which sequence and keeps a block table; `run` then serves every layer
    through a `cupyattn.DecodePlan`, where every sequence has the same number of queries, or a `cupyattn.PrefillPlan`,
    made by the first run of a form of arrays.

    pos_encoding_mode "ROPE_LLAMA" costs a copy of all keys and values of the batch in every run, which is rotated; the
    cache stays as it is. Rotating keys once, as they are appended, costs nothing: `apply_rope`, then "NONE".

    Beside an FP8 cache, sequences of different numbers of queries are padded to the longest, in a copy of q.

    Plans and runs of one wrapper must be ordered, on one stream or by events: a plan writes to where runs read, on the
    current stream, and the partial sums of runs share memory.

    Args:
        float_workspace_buffer, kv_layout, backend: as in `BatchDecodeWithPagedKVCacheWrapper`.
        use_cuda_graph: keep what graphs read in one place, as there. The first plan says how many rows q has; later
            ones may say fewer, and q then has as many, or rows behind the last sequence, which give zeros.
        qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf: for use_cuda_graph, int32;
            only their sizes count: (batch_size + 1,) twice, (the most pages in all,), (batch_size,).
        custom_mask_buf, mask_indptr_buf: accepted; there are no custom masks under CUDA graphs.
        jit_args, jit_kwargs, variant_owns_mask: must be None, None and False.
        max_pages_per_request: as there.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """

    def __init__(
        self,
        float_workspace_buffer: Array,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Array | None = None,
        paged_kv_indptr_buf: Array | None = None,
        paged_kv_indices_buf: Array | None = None,
        paged_kv_last_page_len_buf: Array | None = None,
        custom_mask_buf: Array | None = None,
        mask_indptr_buf: Array | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
        *,
        max_pages_per_request: int | None = None,
    ) -> None:
        unsupported = {"jit_args": jit_args, "jit_kwargs": jit_kwargs, "variant_owns_mask": variant_owns_mask}
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, **unsupported)
        self._tables, self._fixed = BlockTables(self._home.library), None
        if use_cuda_graph:
            buffers = paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf
            self._fixed = FixedTables(self._home.library, _BUFFERS, buffers, max_pages_per_request)
            self._fixed_queries = _FixedStarts(self._home.library, "qo_indptr_buf", qo_indptr_buf)

    def plan(
        self,
        qo_indptr: Array,
        paged_kv_indptr: Array,
        paged_kv_indices: Array,
        paged_kv_last_page_len: Array,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Array | None = None,
        packed_custom_mask: Array | None = None,
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
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Array | None = None,
        token_pos_in_items_ptr: Array | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Array | None = None,
        seq_lens: Array | None = None,
        seq_lens_q: Array | None = None,
        block_tables: Array | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Take in the sequences. Arrays lie beside the workspace buffer or on the host, where planning is quickest.

        A plan that is refused leaves the one before in force.

        Args:
            qo_indptr: int32 (batch + 1,), starting at 0: rows qo_indptr[b] to qo_indptr[b + 1] of q are sequence b.
                Waited for if it is on a device.
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len: the pages of the sequences, new tokens included,
                as in `BatchDecodeWithPagedKVCacheWrapper.plan`.
            num_qo_heads, num_kv_heads, head_dim_qk, page_size: as there.
            head_dim_vo: of values, head_dim_qk if None.
            custom_mask: bool, the masks of all sequences flattened one behind the other, (qo_len * kv_len of each
                together,), True where a query sees a key; goes before causal, and window_left holds as well. It is read
                on the host. One that shows everything, or is the causal mask, costs nothing further. For any other,
                each query becomes a sequence of its own with a list of keys, int32 (rows, most keys of one query): good
                for a few queries, as in speculative decoding, and slow for long prompts. Not beside ALIBI, nor under
                CUDA graphs.
            packed_custom_mask: the same from `segment_packbits` with bitorder "little"; goes before custom_mask.
            causal: query i sees keys j <= i + kv_len - qo_len.
            pos_encoding_mode: "NONE"; "ALIBI", with causal or single queries; or "ROPE_LLAMA", which takes query i as
                position kv_len - qo_len + i.
            use_fp16_qk_reduction, non_blocking, seq_lens_q, max_token_per_sequence, max_sequence_kv: accepted; they
                follow from qo_indptr and the pages.
            sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta, q_data_type, kv_data_type, o_data_type,
                seq_lens, block_tables: as in `BatchDecodeWithPagedKVCacheWrapper.plan`.
            prefix_len_ptr, token_pos_in_items_ptr, max_item_len_ptr, fixed_split_size: must be None.
            token_pos_in_items_len: must be 0.
            disable_split_kv: True to let one block read all keys of a row.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
        """
        items = prefix_len_ptr, token_pos_in_items_ptr, max_item_len_ptr
        if token_pos_in_items_len or fixed_split_size is not None or not all([given is None for given in items]):
            refuse_given(
                "prefill",
                prefix_len_ptr=prefix_len_ptr,
                token_pos_in_items_ptr=token_pos_in_items_ptr,
                token_pos_in_items_len=token_pos_in_items_len or None,
                max_item_len_ptr=max_item_len_ptr,
                fixed_split_size=fixed_split_size,
            )
        options = make_options(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_vo,
            page_size,
            q_data_type,
            kv_data_type,
            o_data_type,
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            disable_split_kv=disable_split_kv,
        )
        table = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        with self._on_device():
            device = self._home.library.device
            found = look_at_pages(*table, device, PREFILL_NAMES, seq_lens)
            found_starts = index_array("qo_indptr", qo_indptr, device)
            if found_starts.shape[0] != found.last.shape[0] + 1:
                expected = f"{found.last.shape[0] + 1}, as many as paged_kv_indptr has"
                refuse("qo_indptr", f"{found_starts.shape[0]} entries", expected)
            unmasked = custom_mask is None and packed_custom_mask is None
            final = unmasked and block_tables is None and options.pos_encoding_mode == "NONE" and self._fixed is None
            pages, starts, counts, longest = self._read(options, found, found_starts, final)
            masks = None
            if not unmasked:  # else nobody asks for the lengths
                counts = counts_of(starts) if counts is None else counts
                masks = read_masks(custom_mask, packed_custom_mask, counts, pages.lengths)
            if block_tables is not None:
                check_table(block_tables, pages, device)
            there, queries = if_there(qo_indptr, found_starts), self._describe(options, starts, counts, masks, longest)
            if block_tables is not None and (options.rotates or queries.masks is not None):
                pages.ids()  # which there are not, and that is refused before anything changes
            self._take_in(options, queries, there, pages, block_tables)

    begin_forward = plan

    def _read(
        self, options: Options, found: PageArrays, found_starts: IndexArray, final: bool
    ) -> tuple[Pages, np.ndarray, np.ndarray | None, int]:
        """(pages, starts and counts of the queries, the most of one sequence), checked; None and -1 if not found yet.

        final: as in `BlockTables.take`.
        """
        on_host = type(found_starts) is np.ndarray
        starts = counts = None
        if on_host:
            starts = found_starts.astype(np.int64)
            counts = _check_queries(starts)
        tables = self._tables if self._fixed is None else self._fixed.tables
        taken = tables.take(found, options.page_size, None if on_host else found_starts, final)
        if taken is None:
            held = read_together(found.to_read if on_host else [found_starts, *found.to_read])
            if not on_host:
                starts, *held = held
                counts = _check_queries(starts)
            return found.pages(options.page_size, *held), starts, counts, -1
        pages, taken_starts, longest = taken
        return (pages, starts, counts, -1) if on_host else (pages, taken_starts, None, longest)

    def _take_in(
        self, options: Options, queries: Queries, there: Array | None, pages: Pages, block_tables: Array | None
    ) -> None:
        """there: qo_indptr, `if_there`."""
        home, layout = self._home, self._kv_layout
        tables = self._tables if self._fixed is None else self._fixed.tables_for(options, pages)
        tables.make_room(pages, block_tables)
        sent = None  # where queries begin, if that goes along with the table
        if queries.frozen:
            queries.array, queries.rows = self._fixed_queries.take_in(queries.starts)
        elif there is not None:
            queries.array = there
        else:
            queries.array, sent = tables.query_starts, queries.starts

        def make(options: Options) -> Any:
            options = masked(options, queries)
            if not options.rotates:
                return self._over_pages(options, queries, pages, tables, layout)
            positions = queries.positions(pages.lengths)
            return RotatedStep(home, options, pages, positions, layout, over)

        def over(options: Options, pages: Pages, tables: BlockTables) -> Any:
            return self._over_pages(options, queries, pages, tables, layout)

        self._set(options, make, lambda: np.repeat(pages.lengths - queries.counts, queries.counts))
        tables.write(pages, sent)

    def run(
        self,
        q: Array,
        paged_kv_cache: Array | tuple[Array, Array],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | Array | None = None,
        v_scale: float | Array | None = None,
        out: Array | None = None,
        lse: Array | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Array | None = None,
        kv_cache_sf: Array | tuple[Array, Array] | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Array | tuple[Array, Array]:
        """Attention of q over the sequences of the last plan.

        Args:
            q: (qo_indptr[-1], num_qo_heads, head_dim_qk), of the planned dtype.
            paged_kv_cache, q_scale, k_scale, v_scale, enable_pdl, sinks: as in
                `BatchDecodeWithPagedKVCacheWrapper.run`.
            args: must be empty.
            out: (qo_indptr[-1], num_qo_heads, head_dim_vo) to write into.
            lse: float32, of the shape that lse_layout says, to write the lse into.
            return_lse: also return the log-sum-exp.
            lse_base: "log2", or "ln" for the natural logarithm.
            lse_layout: "NH" for (rows, heads), "HN" for (heads, rows).
            window_left: None, or what was planned.
            kv_cache_sf, skip_softmax_threshold_scale_factor, use_fp16_softmax, uses_spcompress: must be None.

        Returns:
            An array (qo_indptr[-1], num_qo_heads, head_dim_vo) of q's dtype, `out` itself if given; with return_lse
            also the lse, float32, to **base 2** unless lse_base says otherwise.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
            RuntimeError: there was no plan.
        """
        if args:
            refuse("args", f"{len(args)} arguments", "none: there are no kernels of the caller's own", TypeError)
        others = skip_softmax_threshold_scale_factor, use_fp16_softmax, uses_spcompress
        if kv_cache_sf is not None or any(given is not None for given in others):
            refuse_given(
                "prefill",
                kv_cache_sf=kv_cache_sf,
                skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
                use_fp16_softmax=use_fp16_softmax,
                uses_spcompress=uses_spcompress,
            )
        if window_left is not None:
            self._check_window(window_left)
        if return_lse is not False:
            check_lse(lse_base, lse_layout)
        k, v = split_cache(paged_kv_cache, self._kv_layout)
        scales = q_scale, k_scale, v_scale
        return self._attend(q, k, v, out, lse, return_lse, sinks, *scales, lse_base, lse_layout)

    run_return_lse = partialmethod(run, return_lse=True)

    def _check_window(self, window_left: int) -> None:
        if self._options is None:
            refuse_unplanned()
        if window_left != self._options.window_left:
            refuse("window_left", window_left, f"None or {self._options.window_left}, as planned")

    def forward(
        self,
        q: Array,
        paged_kv_cache: Array | tuple[Array, Array],
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Array:
        """`run` with options that take the place of those of the plan: the older way to call it."""
        self._again_with(
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
        self,
        q: Array,
        paged_kv_cache: Array | tuple[Array, Array],
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Array, Array]:
        """`forward` with the lse, to base 2."""
        self._again_with(
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=True)


def check_lse(base: str, layout: str) -> None:
    check_choice("lse_base", base, LSE_BASES)
    check_choice("lse_layout", layout, LSE_LAYOUTS)


class BatchPrefillWithRaggedKVCacheWrapper(_Prefill):
    """Attention of packed queries over packed keys, a number of each for every sequence.

    `plan` keeps where the sequences begin; `run` serves every layer through a `cupyattn.PrefillPlan`, made by the first
    run of a form of arrays. Keys in FP8, and custom masks, go the way of pages of one row.

    pos_encoding_mode "ROPE_LLAMA" costs a copy of the keys in every run, which is rotated. Rotating them before costs
    nothing: `apply_rope`, then "NONE".

    Plans and runs of one wrapper must be ordered, on one stream or by events.

    Args:
        float_workspace_buffer, kv_layout, backend: as in `BatchDecodeWithPagedKVCacheWrapper`; kv_layout is of no
            account, as packed keys are always (rows, num_kv_heads, head_dim).
        use_cuda_graph: keep what graphs read in one place. The first plan says how many rows q, k and v have; later
            ones may say fewer.
        qo_indptr_buf, kv_indptr_buf: for use_cuda_graph, int32 (batch_size + 1,), whose sizes count.
        custom_mask_buf, mask_indptr_buf: accepted; there are no custom masks under CUDA graphs.
        jit_args, jit_kwargs, variant_owns_mask: must be None, None and False.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """

    def __init__(
        self,
        float_workspace_buffer: Array,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Array | None = None,
        kv_indptr_buf: Array | None = None,
        custom_mask_buf: Array | None = None,
        mask_indptr_buf: Array | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        unsupported = {"jit_args": jit_args, "jit_kwargs": jit_kwargs, "variant_owns_mask": variant_owns_mask}
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, **unsupported)
        self._fixed_keys: _FixedStarts | None = None
        if use_cuda_graph:
            self._fixed_queries = _FixedStarts(self._home.library, "qo_indptr_buf", qo_indptr_buf)
            self._fixed_keys = _FixedStarts(self._home.library, "kv_indptr_buf", kv_indptr_buf)

    def plan(
        self,
        qo_indptr: Array,
        kv_indptr: Array,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Array | None = None,
        packed_custom_mask: Array | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Array | None = None,
        token_pos_in_items_ptr: Array | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Array | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Array | None = None,
        seq_lens_q: Array | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Array | None = None,
        o_indptr: Array | None = None,
    ) -> None:
        """Take in the sequences. Arrays lie beside the workspace buffer or on the host, where planning is quickest.

        A plan that is refused leaves the one before in force.

        Args:
            qo_indptr: int32 (batch + 1,), starting at 0: rows qo_indptr[b] to qo_indptr[b + 1] of q are sequence b.
                Waited for if it is on a device.
            kv_indptr: the same for k and v.
            seq_lens, v_indptr, o_indptr: must be None.
            disable_split_kv: accepted: nothing is split here.

        The other arguments are those of `BatchPrefillWithPagedKVCacheWrapper.plan`.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
        """
        refuse_given(
            "ragged prefill",
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            token_pos_in_items_len=token_pos_in_items_len or None,
            max_item_len_ptr=max_item_len_ptr,
            seq_lens=seq_lens,
            v_indptr=v_indptr,
            o_indptr=o_indptr,
            fixed_split_size=fixed_split_size,
        )
        options = make_options(
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            head_dim_vo,
            None,
            q_data_type,
            kv_data_type,
            o_data_type,
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
            disable_split_kv=disable_split_kv,
        )
        with self._on_device():
            device = self._home.library.device
            found = index_array("qo_indptr", qo_indptr, device), index_array("kv_indptr", kv_indptr, device)
            starts, key_starts = read_together(found)
            counts = _check_queries(starts)
            lengths = check_starts("kv_indptr", key_starts, _MOST_ROWS, "it is int32")
            if len(starts) != len(key_starts):
                refuse("kv_indptr", f"{len(key_starts)} entries", f"{len(starts)}, as many as qo_indptr has")
            masks = read_masks(custom_mask, packed_custom_mask, counts, lengths)
            queries = self._describe(options, starts, counts, masks)
            there = if_there(qo_indptr, found[0]), if_there(kv_indptr, found[1])
            self._take_in(options, queries, there, key_starts, lengths)

    begin_forward = plan

    def _take_in(
        self,
        options: Options,
        queries: Queries,
        there: tuple[Array | None, Array | None],
        key_starts: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        """there: qo_indptr and kv_indptr, `if_there`."""
        home = self._home
        keys = self._take_keys(options, there[1], key_starts)
        if queries.frozen:
            queries.array, queries.rows = self._fixed_queries.take_in(queries.starts)
        else:
            queries.array = beside(home.library, there[0], queries.starts)

        def make(options: Options) -> Any:
            options = masked(options, queries)
            if not options.rotates:
                return over(options)
            positions = np.arange(key_starts[-1]) - np.repeat(key_starts[:-1], lengths)
            return RotatedRaggedStep(home, options, queries.positions(lengths), positions, over)

        def over(options: Options) -> Any:
            if queries.masks is None and not options.fp8:
                rows, starts = (queries.rows, keys[1]), (queries.array, keys[0])
                fewer = queries.fewer, int(key_starts[-1])
                return RaggedStep(home, options, *rows, *starts, queries.rounded_longest(), *fewer)
            return self._by_row(options, queries, key_starts)

        self._set(options, make, lambda: np.repeat(lengths - queries.counts, queries.counts))

    def _take_keys(self, options: Options, there: Array | None, starts: np.ndarray) -> tuple[Array, int]:
        """(int32 (batch + 1,) beside the keys, rows of k and v)."""
        if self._fixed_keys is None:
            return beside(self._home.library, there, starts), int(starts[-1])
        if options.rotates:
            expected = "'NONE' in a wrapper for CUDA graphs: rotate keys before, by apply_rope"
            refuse("pos_encoding_mode", "'ROPE_LLAMA'", expected)
        self._fixed_keys.check("kv_indptr", starts)
        return self._fixed_keys.take_in(starts)

    def _by_row(self, options: Options, queries: Queries, starts: np.ndarray) -> ByRowStep:
        """Packed keys as pages of one row each."""
        lengths, ids = np.diff(starts), np.arange(starts[-1], dtype=np.int32)
        pages = Pages(starts, lengths, 1, ids, _ROW_NAMES, tokens=lengths)
        inner = replace(options, page_size=1)
        step = self._over_pages(inner, queries, pages, tables_of(self._home.library, pages), "NHD")
        return ByRowStep(step, options, int(starts[-1]))

    def run(
        self,
        q: Array,
        k: Array,
        v: Array,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        o_scale: float | None = None,
        out: Array | None = None,
        lse: Array | None = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: Array | tuple[Array, Array] | None = None,
    ) -> Array | tuple[Array, Array]:
        """Attention of q over the sequences of the last plan.

        Args:
            q: (qo_indptr[-1], num_qo_heads, head_dim_qk), of the planned dtype.
            k, v: (kv_indptr[-1], num_kv_heads, head_dim_qk or head_dim_vo).
            args: must be empty.
            o_scale, kv_cache_sf: must be None.

        The other arguments, and what is returned, are as in `BatchPrefillWithPagedKVCacheWrapper.run`.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
            RuntimeError: there was no plan.
        """
        if args:
            refuse("args", f"{len(args)} arguments", "none: there are no kernels of the caller's own", TypeError)
        if o_scale is not None or kv_cache_sf is not None:
            refuse_given("ragged prefill", o_scale=o_scale, kv_cache_sf=kv_cache_sf)
        if return_lse is not False:
            check_lse(lse_base, lse_layout)
        scales = q_scale, k_scale, v_scale
        return self._attend(q, k, v, out, lse, return_lse, None, *scales, lse_base, lse_layout)

    run_return_lse = partialmethod(run, return_lse=True)

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Array:
        """`run` with options that take the place of those of the plan: the older way to call it."""
        self._again_with(
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, k, v)

    def forward_return_lse(
        self,
        q: Array,
        k: Array,
        v: Array,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[Array, Array]:
        """`forward` with the lse, to base 2."""
        self._again_with(
            causal=causal,
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, k, v, return_lse=True)
