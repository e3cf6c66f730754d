"""Decoding: one query, or a few, for each sequence, under FlashInfer's names."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import numpy as np

from ...arrays import refuse, view
from .arguments import Options, check_int, make_options, refuse_given, refuse_unplanned, split_cache
from .library import Array
from .pages import BlockTables, FixedTables, Names, Pages, check_table, look_at_pages, read_together
from .single import attend_one, no_masks
from .steps import DenseStep, RotatedStep, dense_step
from .wrapper import Wrapper

_NAMES = Names()
_BUFFERS = Names("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")


def single_decode_with_kv_cache(
    q: Array,
    k: Array,
    v: Array,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention of one query over the keys of one request.

    Args:
        q: (num_qo_heads, head_dim), float16, bfloat16 or float32, of NumPy, CuPy or PyTorch.
        k, v: (kv_len, num_kv_heads, head_dim) for kv_layout "NHD", (num_kv_heads, kv_len, head_dim) for "HND"; of q's
            dtype, or FP8 where the library has that dtype.
        pos_encoding_mode: "NONE", "ALIBI", or "ROPE_LLAMA", which rotates q as the last position and a copy of k.
        use_tensor_cores: accepted; the kernels are chosen by this library.
        q_scale, k_scale, v_scale: numbers that stand for what q, k and v are to be multiplied with.
        window_left: how many keys before it the query sees besides its own; -1 for all.
        logits_soft_cap: c > 0 replaces a score s by c * tanh(s / c).
        sm_scale: the softmax scale, 1/sqrt(head_dim) if None.
        rope_scale, rope_theta: of ROPE_LLAMA, 1 and 1e4 if None.
        return_lse: also return the log-sum-exp.

    Returns:
        An array (num_qo_heads, head_dim) of q's dtype; with return_lse also the lse to **base 2**, float32
        (num_qo_heads,).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    found = view(q, "q")
    if len(found.shape) != 2:
        refuse("q", f"shape {found.shape}", "(num_qo_heads, head_dim)")
    results = attend_one(
        q[None],
        k,
        v,
        kv_layout,
        no_masks,
        (q_scale, k_scale, v_scale),
        return_lse,
        pos_encoding_mode=pos_encoding_mode,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        sm_scale=sm_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
    )
    return (results[0][0], results[1][0]) if return_lse else results[0]


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    """Attention of one query of each sequence, or of a few, over a paged cache.

    `plan` reads which pages hold which sequence, makes a block table of that, and keeps it; `run` then serves every
    layer. What a run needs beside it, a `cupyattn.DecodePlan`, is made by the first run of a form of arrays.

    pos_encoding_mode "ROPE_LLAMA" costs a copy of all keys and values of the batch in every run, which is rotated; the
    cache stays as it is. Rotating keys once, as they are appended, costs nothing: `apply_rope`, then "NONE".

    Plans and runs of one wrapper must be ordered, on one stream or by events: a plan writes to where runs read, on the
    current stream, and the partial sums of runs share memory.

    Args:
        float_workspace_buffer: an array of NumPy, CuPy or PyTorch. All others must be of its library and device. The
            kernels bring their own memory; a buffer smaller than what they take is refused.
        kv_layout: "NHD" for pages (page_size, num_kv_heads, head_dim), "HND" for (num_kv_heads, page_size, head_dim).
        use_cuda_graph: keep the block table in one place, so that a graph that captured a run sees what later plans
            write. The batch size is then that of paged_kv_last_page_len_buffer.
        use_tensor_cores: accepted; the kernels are chosen by this library.
        paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer: for use_cuda_graph, int32; only
            their sizes count: (batch_size + 1,), (the most pages in all,), (batch_size,).
        backend: one of FlashInfer's names, which all mean the same here.
        jit_args: must be None.
        max_pages_per_request: with use_cuda_graph, the most pages of one sequence, which is how wide the block table
            is, int32 (batch_size, so many); by default as many as paged_kv_indices_buffer has, or fewer where such a
            table took more than 256 MB. cupyattn's own.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat import flashinfer
    >>> wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
    >>> pages = np.array([0, 2, 3], np.int32), np.array([4, 0, 7], np.int32), np.array([5, 16], np.int32)
    >>> wrapper.plan(*pages, num_qo_heads=8, num_kv_heads=2, head_dim=64, page_size=16)
    >>> q, cache = np.ones((2, 8, 64), np.float16), np.ones((9, 2, 16, 2, 64), np.float16)
    >>> wrapper.run(q, cache).shape
    (2, 8, 64)
    """

    def __init__(
        self,
        float_workspace_buffer: Array,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Array | None = None,
        paged_kv_indices_buffer: Array | None = None,
        paged_kv_last_page_len_buffer: Array | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        *,
        max_pages_per_request: int | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args=jit_args)
        self._use_tensor_cores = bool(use_tensor_cores)
        self._tables, self._fixed = BlockTables(self._home.library), None
        if use_cuda_graph:
            buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
            self._fixed = FixedTables(self._home.library, _BUFFERS, buffers, max_pages_per_request)

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    def plan(
        self,
        indptr: Array,
        indices: Array,
        last_page_len: Array,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Array | None = None,
        seq_lens: Array | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
        is_causal: bool | None = None,
    ) -> None:
        """Take in the sequences. Arrays lie beside the workspace buffer or on the host, where planning is quickest.

        A plan that is refused leaves the one before in force.

        Args:
            indptr: int32 (batch + 1,), starting at 0, never decreasing: entries indptr[b] to indptr[b + 1] of indices
                are the pages of sequence b. Waited for if it is on a device, as is last_page_len; what is on a device
                may be read once more by work that is queued when this returns.
            indices: int32 (indptr[-1],) page ids, or more. Compared with the cache where they are on the host; on CUDA
                only if CUPYATTN_CHECK=1 asks for it, which waits for the device.
            last_page_len: int32 (batch,), 1 to page_size tokens in each last page.
            num_qo_heads, num_kv_heads: of queries, and of keys and values; the latter divides the former.
            head_dim: 1 to 256.
            page_size: 1 to 512.
            pos_encoding_mode: "NONE", "ROPE_LLAMA" or "ALIBI".
            window_left: how many keys before it a query sees besides its own; -1 for all.
            logits_soft_cap: c > 0 replaces a score s by c * tanh(s / c); not beside ALIBI.
            q_data_type, kv_data_type: what runs will get, as strings or dtypes. kv_data_type is q_data_type if None, or
                "float8_e4m3fn" or "float8_e5m2", which uint8 arrays can hold as well.
            o_data_type: q_data_type or None.
            data_type: of both, where the two are not given.
            sm_scale: the softmax scale, 1/sqrt(head_dim) if None.
            rope_scale, rope_theta: of ROPE_LLAMA, 1 and 1e4 if None.
            non_blocking: accepted.
            block_tables: int32 (batch, columns) beside the workspace, to be read instead of indices, with no copy.
            seq_lens: int32 (batch,), tokens of each sequence if not what the page table says.
            fixed_split_size: must be None.
            disable_split_kv: True to let one block read all keys of a sequence.
            q_len_per_req: queries of each sequence; several see only keys up to their own position.
            window_right: must be 0.
            is_causal: None, or whether q_len_per_req is over 1.

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
        """
        if fixed_split_size is not None:
            refuse_given("decode", fixed_split_size=fixed_split_size)
        queries = check_int("q_len_per_req", q_len_per_req, 1)
        if window_right != 0 or is_causal not in (None, queries > 1):
            name, value = ("window_right", window_right) if window_right != 0 else ("is_causal", is_causal)
            refuse(name, value, f"{0 if window_right != 0 else queries > 1} with q_len_per_req {queries}")
        q_data_type, kv_data_type = _dtypes(q_data_type, kv_data_type, data_type)
        options = make_options(
            num_qo_heads,
            num_kv_heads,
            head_dim,
            None,
            page_size,
            q_data_type,
            kv_data_type,
            o_data_type,
            causal=queries > 1,
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
            found = look_at_pages(indptr, indices, last_page_len, device, _NAMES, seq_lens)
            tables = self._tables if self._fixed is None else self._fixed.tables
            final = queries == 1 and block_tables is None and not options.rotates
            taken = tables.take(found, options.page_size, None, final)
            pages = found.pages(options.page_size, *read_together(found.to_read)) if taken is None else taken[0]
            self._take_in(options, pages, queries, block_tables)

    begin_forward = plan

    def _take_in(self, options: Options, pages: Pages, queries: int, block_tables: Array | None) -> None:
        if queries > 1 and pages.batch and pages.lengths.min() < queries:
            expected = f"at least q_len_per_req {queries} tokens in each: their keys must be appended already"
            refuse("last_page_len", f"a sequence of {int(pages.lengths.min())} tokens", expected)
        if block_tables is not None:
            check_table(block_tables, pages, self._home.library.device)
            if options.rotates:
                pages.ids()  # which there are not, and that is refused before anything changes
        tables = self._tables if self._fixed is None else self._fixed.tables_for(options, pages)
        tables.make_room(pages, block_tables)
        home, layout = self._home, self._kv_layout

        def over(options: Options, pages: Pages, tables: BlockTables) -> DenseStep:
            return dense_step(home, options, queries, pages, tables, layout)

        def make(options: Options) -> DenseStep | RotatedStep:
            if not options.rotates:
                return over(options, pages, tables)
            positions = (pages.lengths[:, None] - queries + np.arange(queries)).reshape(-1)
            return RotatedStep(home, options, pages, positions, layout, over)

        self._set(options, make, lambda: np.repeat(pages.lengths - queries, queries))
        tables.write(pages)
        self._queries = queries

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
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Array | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Array | tuple[Array, Array] | None = None,
    ) -> Array | tuple[Array, Array]:
        """Attention of q over the sequences of the last plan.

        Args:
            q: (batch * q_len_per_req, num_qo_heads, head_dim), of the planned dtype.
            paged_kv_cache: (k_cache, v_cache), which is quickest, each (num_pages, page_size, num_kv_heads, head_dim)
                for "NHD", (num_pages, num_kv_heads, page_size, head_dim) for "HND"; or one array with an axis of two
                behind the first. Without the axis of page_size, a page has one row.
            args: must be empty.
            q_scale, k_scale, v_scale: what q, k and v are to be multiplied with: numbers; those of an FP8 cache may be
                float32 arrays (), (1,) or (num_kv_heads,).
            out: (batch * q_len_per_req, num_qo_heads, head_dim) to write into.
            lse: float32 (batch * q_len_per_req, num_qo_heads) to write the lse into.
            return_lse: also return the lse, to **base 2**: this library's own is natural.
            enable_pdl: accepted.
            window_left: None, or what was planned.
            sinks: float32 (num_qo_heads,), one more logit for each head that adds no value.
            q_len_per_req: None, or what was planned.
            skip_softmax_threshold_scale_factor, kv_cache_sf: must be None.

        Returns:
            An array (batch * q_len_per_req, num_qo_heads, head_dim) of q's dtype, `out` itself if given; with
            return_lse also the lse, float32 (batch * q_len_per_req, num_qo_heads).

        Raises:
            TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
            RuntimeError: there was no plan.
        """
        if args:
            refuse("args", f"{len(args)} arguments", "none: there are no kernels of the caller's own", TypeError)
        if skip_softmax_threshold_scale_factor is not None or kv_cache_sf is not None:
            refuse_given("decode", skip_softmax=skip_softmax_threshold_scale_factor, kv_cache_sf=kv_cache_sf)
        if window_left is not None or q_len_per_req is not None:
            self._check_planned(window_left=window_left, q_len_per_req=q_len_per_req)
        k, v = split_cache(paged_kv_cache, self._kv_layout)
        return self._attend(q, k, v, out, lse, return_lse, sinks, q_scale, k_scale, v_scale)

    run_return_lse = partialmethod(run, return_lse=True)

    def _check_planned(self, **given: int | None) -> None:
        """Refuse what is not as planned."""
        if self._options is None:
            refuse_unplanned()
        planned = {"window_left": self._options.window_left, "q_len_per_req": self._queries}
        for name, value in given.items():
            if value is not None and value != planned[name]:
                refuse(name, value, f"None or {planned[name]}, as planned")

    def forward(
        self,
        q: Array,
        paged_kv_cache: Array | tuple[Array, Array],
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
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
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
        self,
        q: Array,
        paged_kv_cache: Array | tuple[Array, Array],
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
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
            pos_encoding_mode=pos_encoding_mode,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale,
            rope_scale=rope_scale,
            rope_theta=rope_theta,
        )
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=True)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` with use_cuda_graph, whose arguments it shares.

    Run once before a capture, which makes what a run needs; then capture `run`, with `out=` or without. A replay sees
    the sequences of the last plan, whose work must be ordered before it. `plan` itself cannot be captured.

    Args:
        workspace_buffer, kv_layout, use_tensor_cores, max_pages_per_request: as there.
        indptr_buffer, indices_buffer, last_page_len_buffer: the three buffers.
    """

    def __init__(
        self,
        workspace_buffer: Array,
        indptr_buffer: Array,
        indices_buffer: Array,
        last_page_len_buffer: Array,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
        *,
        max_pages_per_request: int | None = None,
    ) -> None:
        super().__init__(
            workspace_buffer,
            kv_layout,
            True,
            use_tensor_cores,
            indptr_buffer,
            indices_buffer,
            last_page_len_buffer,
            max_pages_per_request=max_pages_per_request,
        )


def _dtypes(q_data_type: Any, kv_data_type: Any, data_type: Any) -> tuple[Any, Any]:
    """(q_data_type, kv_data_type), where data_type stands in for what was not given."""
    if data_type is not None:
        q_data_type = data_type if q_data_type in (None, "float16") else q_data_type
        kv_data_type = data_type if kv_data_type is None else kv_data_type
    return "float16" if q_data_type is None else q_data_type, kv_data_type
