"""What a plan hands to its runs: how arrays as FlashInfer has them become those of a `DecodePlan` or a `PrefillPlan`.

A step is made by `plan`, and knows the sequences. Its `run` gives queries another shape, which copies nothing, and
passes them on. The first run of a form finds out which plan of this library serves it, and that is where arrays are
refused; those that follow only ask that plan, which looks at the arrays itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...arrays import View, device_name, refuse, view
from ...decode_plan import DecodePlan
from ...prefill_plan import PrefillPlan
from ...rotary import apply_rotary
from .arguments import Options, check_number
from .library import Array, Library
from .lse import alibi_slopes
from .masks import Visible
from .pages import BlockTables, Pages, tables_of
from .rotation import Frequencies, position_tables, rotate_rows

_HELD = 16  # plans of this library that a wrapper keeps, as each may hold memory of its own
_SCALES = 1024  # numbers kept as arrays; a model has two for each layer


class Home:
    """What all steps of a wrapper share: where its arrays lie, and the plans of this library made so far.

    Args:
        library: of all arrays.
        workspace_bytes: of the caller's workspace buffer.
    """

    __slots__ = ("library", "workspace_bytes", "last", "_plans", "_latest", "_scales", "_slopes")

    def __init__(self, library: Library, workspace_bytes: int) -> None:
        self.library, self.workspace_bytes = library, workspace_bytes
        self.last: DenseStep | PackedStep | None = None
        self._plans: dict[tuple, DecodePlan | PrefillPlan] = {}
        self._latest: dict[tuple, dict[tuple, DecodePlan | PrefillPlan]] = {}
        self._scales: dict[float, Array] = {}
        self._slopes: dict[int, Array] = {}

    def find_plan(self, key: tuple, make: Callable[[], DecodePlan | PrefillPlan]) -> DecodePlan | PrefillPlan:
        """The plan that was made for this key, or a new one."""
        found = self._plans.get(key)
        if found is None:
            found = make()
            check_workspace(self.workspace_bytes, found.workspace_bytes)
            _make_room(self._plans)
            self._plans[key] = found
        return found

    def latest(self, form: tuple) -> dict[tuple, DecodePlan | PrefillPlan]:
        """What the runs of one form of step last went by, for the steps of later plans to begin with."""
        found = self._latest.get(form)
        if found is None:
            _make_room(self._latest)
            self._latest[form] = found = {}
        return found

    def scale(self, name: str, scale: float | Array | None) -> Array:
        """A scale of an FP8 cache as an array, so that one plan serves all layers."""
        if scale is not None and not isinstance(scale, (int, float, np.number)):
            return scale
        number = check_number(name, scale, 1.0)
        if number not in self._scales:
            if len(self._scales) >= _SCALES:
                self._scales.clear()
            self._scales[number] = self.library.asarray(np.array([number], np.float32))
        return self._scales[number]

    def slopes(self, options: Options) -> Array | None:
        """ALiBi's, float32 (num_qo_heads,), if the options ask for it."""
        heads = options.num_qo_heads
        if not options.alibi:
            return None
        if heads not in self._slopes:
            self._slopes[heads] = self.library.asarray(alibi_slopes(heads))
        return self._slopes[heads]

    def check_here(self, name: str, found: View) -> None:
        """Refuse an array that is not beside the workspace buffer."""
        if (found.library, found.device) != (self.library.name, self.library.device):
            got = f"a {found.library} array on {device_name(found.device)}"
            expected = f"one of {self.library.name} on {device_name(self.library.device)}, as float_workspace_buffer is"
            refuse(name, got, expected)


def _make_room(held: dict[tuple, Any]) -> None:
    """Forget the oldest of what a wrapper keeps, if it is full."""
    while len(held) >= _HELD:
        del held[next(iter(held))]


def check_workspace(given: int, needed: int) -> None:
    """Refuse a workspace buffer smaller than what the kernels keep partial sums in."""
    if given < needed:
        expected = f"at least {needed}, which the partial sums of this plan take: pass a larger one to the wrapper"
        refuse("float_workspace_buffer", f"{given} bytes", f"{expected}, or to reset_workspace_buffer")


Results = tuple[Array, "Array | None"]
"""out (rows, heads, head_dim) and, if it was asked for, the lse as (rows, heads), of any strides."""

Scales = tuple["Array | None", "Array | None"]
"""Of the keys and the values of an FP8 cache, as arrays."""

_NO_SCALES: Scales = (None, None)


class Step(ABC):
    """One plan's way to run. Subclasses say which plan of this library serves it, and how it is called.

    Args:
        home, options: of the wrapper.
        rows: of q.
        form: what a plan of this library depends on beside the options and the arrays of the run.
        fewer: another number of rows that q may have: under CUDA graphs, those that the sequences have in all.
    """

    _pages_needed = 0  # page ids are below it, where they are known

    def __init__(self, home: Home, options: Options, rows: int, form: tuple, fewer: int | None = None) -> None:
        self._home, self._options = home, options
        self._q_shape = (rows, options.num_qo_heads, options.head_dim_qk)
        self._out_shape = (rows, options.num_qo_heads, options.head_dim_vo)
        self._fewer = fewer
        self._slopes = home.slopes(options)
        self._fp8 = options.kv_dtype if options.fp8 else None
        self._form = (type(self), options, *form)
        self._found = home.latest(self._form)

    @abstractmethod
    def _check(self, q: View, k: View, v: View) -> None:
        """Refuse keys and values that do not fit what was planned."""

    @abstractmethod
    def _make(
        self, q: Array, k: Array, v: Array, scales: Scales, out: Array | None, common: dict[str, Any]
    ) -> DecodePlan | PrefillPlan:
        """A plan for arrays like these; scales: of an FP8 cache; common: masks and other options that all have."""

    @abstractmethod
    def _call(
        self,
        plan: DecodePlan | PrefillPlan,
        q: Array,
        k: Array,
        v: Array,
        sinks: Array | None,
        scales: Scales,
        out: Array | None,
        return_lse: bool | str,
    ) -> Results:
        """Run it."""

    def run(
        self,
        q: Array,
        k: Array,
        v: Array,
        out: Array | None = None,
        return_lse: bool | str = False,
        sinks: Array | None = None,
        q_scale: float | None = None,
        k_scale: float | Array | None = None,
        v_scale: float | Array | None = None,
    ) -> Results:
        """Attention of q (rows, heads, head_dim) over keys and values as the wrapper has them.

        A scale of keys that are no FP8 goes into the softmax scale, one of values is applied to the result. return_lse:
        also the form of the lse, as in `attention`.
        """
        if getattr(q, "shape", None) != self._q_shape:
            self._check_rows(q)
        if self._fp8 is not None:
            scales = self._home.scale("k_scale", k_scale), self._home.scale("v_scale", v_scale)
            k_scale = v_scale = None
        else:
            scales = _NO_SCALES
        if q_scale is not None or k_scale is not None:
            check_number("q_scale", q_scale, 1.0)
            check_number("k_scale", k_scale, 1.0)
        variant = return_lse, sinks is None, q_scale, k_scale
        results = self._run_variant(variant, q, k, v, sinks, scales, out)
        if v_scale is not None:
            results = _times(results, check_number("v_scale", v_scale, 1.0))
        return results

    def _check_rows(self, q: Array) -> None:
        """Refuse q, unless it has the other number of rows that it may have."""
        shape = view(q, "q").shape
        if shape != (self._fewer, *self._q_shape[1:]):
            refuse("q", f"shape {shape}", f"{self._q_shape}: (rows, num_qo_heads, head_dim), as planned")

    def _run_variant(
        self,
        variant: tuple,
        q: Array,
        k: Array,
        v: Array,
        sinks: Array | None,
        scales: Scales,
        out: Array | None,
    ) -> Results:
        plan = self._found.get(variant)
        if plan is not None:
            try:
                if k.shape[0] >= self._pages_needed:
                    return self._call(plan, q, k, v, sinks, scales, out, variant[0])
            except (AttributeError, TypeError, ValueError):
                pass  # it looks at arrays before it does anything: they are of another form, or will be refused again
        self._found[variant] = plan = self._find(variant, q, k, v, sinks, scales, out)
        return self._call(plan, q, k, v, sinks, scales, out, variant[0])

    def _look(self, q: Array, k: Array, v: Array, out: Array | None = None) -> tuple[View, View, View]:
        """The views of q, k and v, with all refused that can be in FlashInfer's terms."""
        home, options = self._home, self._options
        views = view(q, "q"), view(k, "k"), view(v, "v")
        for name, found in zip("qkv", views, strict=True):
            home.check_here(name, found)
        if views[0].dtype != options.q_dtype:
            expected = f"{options.q_dtype}, the q_data_type that plan was given or has by default"
            refuse("q", views[0].dtype, expected, TypeError)
        for name, found in zip("kv", views[1:], strict=True):
            if found.dtype != options.kv_dtype and not (options.fp8 and found.dtype == "uint8"):
                expected = f"{options.kv_dtype}, the kv_data_type that plan was given, or else its q_data_type"
                refuse(name, found.dtype, expected, TypeError)
        self._check(*views)
        if out is not None:
            _check_out(view(out, "out"), (views[0].shape[0], *self._out_shape[1:]), options.q_dtype)
        return views

    def _find(
        self,
        variant: tuple,
        q: Array,
        k: Array,
        v: Array,
        sinks: Array | None,
        scales: Scales,
        out: Array | None,
    ) -> DecodePlan | PrefillPlan:
        """The plan for arrays of this form."""
        forms = [_form_of(found) for found in self._look(q, k, v, out)]
        forms += [_form_of_optional(array) for array in (sinks, *scales, out)]
        return_lse, _, q_scale, k_scale = variant
        common = self._options.masks | {
            "softmax_scale": self._options.softmax_scale(q_scale, k_scale),
            "alibi_slopes": self._slopes,
            "sinks": sinks,
            "return_lse": return_lse,
        }
        key = (self._form, variant, *forms)
        return self._home.find_plan(key, lambda: self._make(q, k, v, scales, out, common))


def _times(results: Results, v_scale: float) -> Results:
    out, lse = results
    out *= v_scale
    return out, lse


def _check_out(out: View, shape: tuple[int, ...], dtype: str) -> None:
    if out.shape != shape:
        refuse("out", f"shape {out.shape}", shape)
    if out.dtype != dtype:
        refuse("out", out.dtype, f"{dtype}, as q has", TypeError)


def _form_of(found: View) -> tuple:
    return found.shape, found.strides, found.dtype, found.device, found.pointer & 15


def _form_of_optional(array: Array | None) -> tuple | None:
    return None if array is None else _form_of(view(array))


class PagedStep(Step):
    """Keys and values in pages."""

    def __init__(
        self,
        home: Home,
        options: Options,
        rows: int,
        form: tuple,
        pages: Pages,
        table: Array,
        lengths: Array,
        layout: str,
        fewer: int | None = None,
    ) -> None:
        super().__init__(home, options, rows, (*form, layout, *_form_of(view(table))), fewer)
        self._pages, self._table, self._lengths, self._layout = pages, table, lengths, layout
        self._pages_needed = pages.needed

    def _is_over(self, options: Options, tables: BlockTables, layout: str) -> bool:
        """Whether it is for these options and arrays, whatever the tables hold."""
        mine = self._options is options and self._layout == layout
        return mine and self._table is tables.table and self._lengths is tables.lengths

    def renew(self, pages: Pages) -> None:
        """Take other pages, which are in the same tables."""
        self._pages, self._pages_needed = pages, pages.needed

    def _check(self, q: View, k: View, v: View) -> None:
        check_cache(self._options, self._layout, k, v)
        self._pages.check_ids(k.shape[0])


class DenseStep(PagedStep):
    """The same number of queries for each sequence: `attention_with_kvcache`.

    Args:
        home, options: of the wrapper.
        queries: of each sequence.
        pages: the sequences.
        table: int32 (batch, columns) block table.
        lengths: int32 (batch,) tokens of each sequence.
        layout: of the caches.
    """

    def __init__(
        self, home: Home, options: Options, queries: int, pages: Pages, table: Array, lengths: Array, layout: str
    ) -> None:
        batch, heads = pages.batch, options.num_qo_heads
        super().__init__(home, options, batch * queries, (batch, queries), pages, table, lengths, layout)
        self._queries = queries
        self._dense_q = (batch, queries, heads, options.head_dim_qk)
        self._dense_out = (batch, queries, heads, options.head_dim_vo)

    def serves(self, options: Options, queries: int, tables: BlockTables, layout: str) -> bool:
        """Whether it is for this, whatever the tables hold."""
        return self._queries == queries and self._is_over(options, tables, layout)

    def sequences(self, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """(block table, lengths), where q and the caches are as planned."""
        if getattr(q, "shape", None) != self._q_shape:
            self._check_rows(q)
        self._look(q, k, v)
        return self._table, self._lengths

    def _make(
        self, q: Array, k: Array, v: Array, scales: Scales, out: Array | None, common: dict[str, Any]
    ) -> DecodePlan:
        return DecodePlan(
            self._as_planned(q, self._dense_q),
            k,
            v,
            cache_seqlens=self._lengths,
            block_table=self._table,
            layout=self._layout,
            kv_dtype=self._fp8,
            k_scale=scales[0],
            v_scale=scales[1],
            num_splits=0 if self._options.split_kv else 1,
            out=None if out is None else self._as_planned(out, self._dense_out),
            **common,
        )

    def _as_planned(self, array: Array, dense: tuple[int, ...]) -> Array:
        """(rows, heads, head_dim) as `DecodePlan` takes it: as it is, if the rows are sequences of one query."""
        return array if self._queries == 1 else array.reshape(dense)

    def _call(
        self,
        plan: DecodePlan,
        q: Array,
        k: Array,
        v: Array,
        sinks: Array | None,
        scales: Scales,
        out: Array | None,
        return_lse: bool | str,
    ) -> Results:
        results = plan.run(
            self._as_planned(q, self._dense_q),
            k,
            v,
            cache_seqlens=self._lengths,
            block_table=self._table,
            alibi_slopes=self._slopes,
            sinks=sinks,
            k_scale=scales[0],
            v_scale=scales[1],
            out=None if out is None else self._as_planned(out, self._dense_out),
        )
        result, lse = results if return_lse else (results, None)
        if self._queries == 1:
            return result, lse
        by_row = None if lse is None else lse.swapaxes(1, 2).reshape(self._out_shape[:2])
        return (result.reshape(self._out_shape) if out is None else out), by_row


def dense_step(home: Home, options: Options, queries: int, pages: Pages, tables: BlockTables, layout: str) -> DenseStep:
    """A `DenseStep`: the last one of this wrapper, if nothing but the pages is another."""
    step = home.last
    if type(step) is DenseStep and step.serves(options, queries, tables, layout):
        step.renew(pages)
    else:
        home.last = step = DenseStep(home, options, queries, pages, tables.table, tables.lengths, layout)
    return step


class PackedStep(PagedStep):
    """Queries of different numbers, packed: `attention_varlen` over pages.

    Args as in `DenseStep`, with rows of q in all, the most queries of one sequence, or None, and starts int32 (batch +
    1,) of the sequences among the rows; fewer: as in `Step`.
    """

    def __init__(
        self,
        home: Home,
        options: Options,
        rows: int,
        longest: int | None,
        starts: Array,
        pages: Pages,
        table: Array,
        lengths: Array,
        layout: str,
        fewer: int | None = None,
    ) -> None:
        super().__init__(home, options, rows, (rows, longest), pages, table, lengths, layout, fewer)
        self._starts, self._longest = starts, longest

    def serves(self, options: Options, form: tuple[int, int | None], tables: BlockTables, layout: str) -> bool:
        """Whether it is for this, whatever the tables hold; form: rows and longest."""
        return (self._q_shape[0], self._longest) == form and self._is_over(options, tables, layout)

    def take(self, starts: Array, fewer: int | None) -> None:
        """Take other starts of as many rows."""
        self._starts, self._fewer = starts, fewer

    def _make(
        self, q: Array, k: Array, v: Array, scales: Scales, out: Array | None, common: dict[str, Any]
    ) -> PrefillPlan:
        return PrefillPlan(
            q,
            k,
            v,
            self._starts,
            seqused_k=self._lengths,
            block_table=self._table,
            layout=self._layout,
            max_seqlen_q=self._longest,
            out=out,
            **common,
        )

    def _call(
        self,
        plan: PrefillPlan,
        q: Array,
        k: Array,
        v: Array,
        sinks: Array | None,
        scales: Scales,
        out: Array | None,
        return_lse: bool | str,
    ) -> Results:
        results = plan.run(
            q,
            k,
            v,
            self._starts,
            seqused_k=self._lengths,
            block_table=self._table,
            alibi_slopes=self._slopes,
            sinks=sinks,
            out=out,
        )
        return (results[0], results[1].T) if return_lse else (results, None)


def packed_step(
    home: Home,
    options: Options,
    form: tuple[int, int | None],
    starts: Array,
    pages: Pages,
    tables: BlockTables,
    layout: str,
    fewer: int | None,
) -> PackedStep:
    """A `PackedStep`, form being its rows and longest: the last one if nothing but the sequences is another."""
    step = home.last
    if type(step) is PackedStep and step.serves(options, form, tables, layout):
        step.renew(pages)
        step.take(starts, fewer)
    else:
        home.last = step = PackedStep(home, options, *form, starts, pages, tables.table, tables.lengths, layout, fewer)
    return step


class RaggedStep(Step):
    """Packed queries over packed keys: `attention_varlen`.

    Args:
        home, options: of the wrapper.
        rows, key_rows: of q, and of k and v.
        starts, key_starts: int32 (batch + 1,) of the sequences among them.
        longest: the most queries of one sequence, or None.
        fewer, fewer_keys: other numbers of rows that they may have, as in `Step`.
    """

    def __init__(
        self,
        home: Home,
        options: Options,
        rows: int,
        key_rows: int,
        starts: Array,
        key_starts: Array,
        longest: int | None,
        fewer: int | None = None,
        fewer_keys: int | None = None,
    ) -> None:
        form = rows, key_rows, longest, _form_of(view(starts)), _form_of(view(key_starts))
        super().__init__(home, options, rows, form, fewer)
        self._key_rows, self._fewer_keys = key_rows, fewer_keys
        self._starts, self._key_starts, self._longest = starts, key_starts, longest

    def _check(self, q: View, k: View, v: View) -> None:
        rows = self._fewer_keys if k.shape[:1] == (self._fewer_keys,) else self._key_rows
        check_rows(self._options, rows, k, v)

    def _make(
        self, q: Array, k: Array, v: Array, scales: Scales, out: Array | None, common: dict[str, Any]
    ) -> PrefillPlan:
        return PrefillPlan(q, k, v, self._starts, self._key_starts, max_seqlen_q=self._longest, out=out, **common)

    def _call(
        self,
        plan: PrefillPlan,
        q: Array,
        k: Array,
        v: Array,
        sinks: Array | None,
        scales: Scales,
        out: Array | None,
        return_lse: bool | str,
    ) -> Results:
        results = plan.run(q, k, v, self._starts, self._key_starts, alibi_slopes=self._slopes, sinks=sinks, out=out)
        return (results[0], results[1].T) if return_lse else (results, None)


def check_cache(options: Options, layout: str, k: View, v: View) -> None:
    """Refuse a cache whose pages are not as planned."""
    for name, found, head_dim in (("k", k, options.head_dim_qk), ("v", v, options.head_dim_vo)):
        rows = options.page_size, options.num_kv_heads
        page = (*(rows if layout == "NHD" else rows[::-1]), head_dim)
        if found.shape[1:] != page:
            turned = found.shape[1:] == (page[1], page[0], page[2])
            other = "HND" if layout == "NHD" else "NHD"
            hint = f"; this would be kv_layout={other!r}" if turned else ""
            names = "page_size, num_kv_heads" if layout == "NHD" else "num_kv_heads, page_size"
            expected = f"(num_pages, {names}, head_dim) with pages of {page}, as planned for kv_layout={layout!r}{hint}"
            refuse("paged_kv_cache", f"{name} of shape {found.shape}", expected)
    if k.shape[0] != v.shape[0]:
        refuse("paged_kv_cache", f"v of {v.shape[0]} pages", f"as many as k has, {k.shape[0]}")


def check_rows(options: Options, rows: int, k: View, v: View) -> None:
    """Refuse packed keys and values that are not as planned."""
    for name, found, head_dim in (("k", k, options.head_dim_qk), ("v", v, options.head_dim_vo)):
        shape = (rows, options.num_kv_heads, head_dim)
        if found.shape != shape:
            refuse(name, f"shape {found.shape}", f"{shape}: (kv_indptr[-1], num_kv_heads, head_dim), as planned")


# ------------------------------------------------------------------------------------------- steps around steps


class MaskedStep:
    """Any mask: each query is a sequence of its own, whose keys are the rows of the cache that it sees.

    The cache is looked at as pages of one row, which copies it only where its rows are not evenly spaced.

    Args:
        home, options: of the wrapper.
        pages: the sequences; their ids are read, which waits for the device if they are there.
        visible: what each query sees, windows included.
        layout: of the caches.
    """

    def __init__(self, home: Home, options: Options, pages: Pages, visible: Visible, layout: str) -> None:
        self._home, self._layout = home, layout
        self._planned, self._pages = options, pages
        self._options = replace(options, causal=False, window_left=-1, page_size=1)
        self._counts = visible.counts.astype(np.int64)
        entry = pages.starts[visible.owners] + visible.tokens // pages.page_size
        self._page, self._row = pages.ids()[entry].astype(np.int64), visible.tokens % pages.page_size
        self._inner: dict[int, DenseStep] = {}

    def run(self, q: Array, k: Array, v: Array, *how: Any) -> Results:
        """As `Step.run`."""
        k_view, v_view = view(k, "k"), view(v, "v")
        check_cache(self._planned, self._layout, k_view, v_view)
        self._pages.check_ids(k_view.shape[0])
        with self._home.library.current():
            keys, values, stride = self._by_row(k, v)
            return self._inner_step(stride).run(q, keys, values, *how)

    def _by_row(self, k: Array, v: Array) -> tuple[Array, Array, int]:
        """The caches as pages of one row, and how many rows lie from page to page."""
        if self._layout == "HND":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        strides = {_rows_per_page(view(cache)) for cache in (k, v)}
        if len(strides) > 1 or None in strides:
            k, v = self._home.library.contiguous(k), self._home.library.contiguous(v)
            strides = {k.shape[1]}
        (stride,) = strides
        return self._unfolded(k, stride), self._unfolded(v, stride), stride

    def _unfolded(self, cache: Array, stride: int) -> Array:
        """(pages, rows, heads, head_dim) as (all rows, 1, heads, head_dim), `stride` rows from page to page."""
        found = view(cache)
        pages, rows, heads, head_dim = found.shape
        if rows == 1:
            return cache
        count = (pages - 1) * stride + rows if pages else 0
        steps = (found.strides[1], found.strides[1], *found.strides[2:])
        return self._home.library.as_strided(cache, (count, 1, heads, head_dim), steps)

    def _inner_step(self, stride: int) -> DenseStep:
        if stride not in self._inner:
            starts = np.concatenate([[0], np.cumsum(self._counts)])
            ids = (self._page * stride + self._row).astype(np.int32)
            pages = Pages(starts, self._counts, 1, ids, self._pages.names, tokens=self._counts)
            tables = tables_of(self._home.library, pages)
            self._inner[stride] = DenseStep(self._home, self._options, 1, pages, tables.table, tables.lengths, "NHD")
        return self._inner[stride]


def _rows_per_page(cache: View) -> int | None:
    """Rows from one page (…, rows, heads, head_dim) to the next; None if that is not a whole number."""
    (pages, rows, *_), (page, row, *_) = cache.shape, cache.strides
    if rows == 1 or pages <= 1:
        return rows
    return page // row if row > 0 and page > 0 and not page % row else None


class PaddedStep:
    """Queries of different numbers where only the dense kernel will do: padded in front to the longest, and back.

    Args:
        step: for as many queries of each sequence as the longest has.
        options: as planned.
        library: of the arrays.
        starts: int64 (batch + 1,) of the sequences among the queries.
        longest: queries of the longest sequence.
    """

    def __init__(self, step: DenseStep, options: Options, library: Library, starts: np.ndarray, longest: int) -> None:
        self._step, self._options, self._library = step, options, library
        counts = np.diff(starts)
        row = np.arange(longest) + (starts[1:] - longest)[:, None]
        inside = row >= starts[:-1, None]
        self._padding = library.asarray(np.where(inside, row, 0).reshape(-1))
        place = np.arange(starts[-1]) + np.repeat((np.arange(len(counts)) + 1) * longest - starts[1:], counts)
        self._back = library.asarray(place)
        self._rows = int(starts[-1])

    def run(self, q: Array, k: Array, v: Array, out: Array | None = None, *how: Any) -> Results:
        """As `Step.run`."""
        check_queries(self._options, self._rows, view(q, "q"))
        if out is not None:
            shape = (self._rows, self._options.num_qo_heads, self._options.head_dim_vo)
            _check_out(view(out, "out"), shape, self._options.q_dtype)
        with self._library.current():
            padded, lse = self._step.run(q[self._padding], k, v, None, *how)
            result = padded[self._back]
            if out is not None:
                out[...] = result
                result = out
            return result, None if lse is None else lse[self._back]


class ByRowStep:
    """Packed keys as pages of one row, for steps that want pages.

    Args:
        step: over pages of one row, NHD.
        options: as planned.
        rows: of k and v.
    """

    def __init__(self, step: Any, options: Options, rows: int) -> None:
        self._step, self._options, self._rows = step, options, rows

    def run(self, q: Array, k: Array, v: Array, *how: Any) -> Results:
        """As `Step.run`."""
        check_rows(self._options, self._rows, view(k, "k"), view(v, "v"))
        return self._step.run(q, k[:, None], v[:, None], *how)


class RotatedStep:
    """ROPE_LLAMA over pages: the keys and values in use are copied, the keys rotated, and so are the queries.

    Args:
        home: of the wrapper.
        options: with the rotation.
        pages: the sequences.
        q_positions: int64 (rows,).
        layout: of the caches.
        make: an inner step over the pages of the copy, from the options without rotation, these pages and their tables.
    """

    def __init__(
        self,
        home: Home,
        options: Options,
        pages: Pages,
        q_positions: np.ndarray,
        layout: str,
        make: Callable[[Options, Pages, BlockTables], Any],
    ) -> None:
        self._home, self._options, self._pages, self._layout = home, options, pages, layout
        self._ids = home.library.asarray(pages.ids())
        copied = replace(pages, indices=np.arange(pages.total, dtype=np.int32), known=True)
        tables = tables_of(home.library, copied)
        self._inner = make(replace(options, pos_encoding_mode="NONE"), copied, tables)
        page = np.arange(pages.total) - np.repeat(pages.starts[:-1], pages.counts)
        self._rotation = Rotation(home.library, options, q_positions, page * pages.page_size, pages.page_size)

    def run(self, q: Array, k: Array, v: Array, *how: Any) -> Results:
        """As `Step.run`."""
        k_view, v_view = view(k, "k"), view(v, "v")
        check_cache(self._options, self._layout, k_view, v_view)
        self._pages.check_ids(k_view.shape[0])
        check_queries(self._options, self._rotation.rows, view(q, "q"))
        with self._home.library.current():
            keys, values = k[self._ids], v[self._ids]
            self._rotation.turn_pages(keys if self._layout == "NHD" else keys.swapaxes(1, 2))
            return self._inner.run(self._rotation.turn_queries(q), keys, values, *how)


class RotatedRaggedStep:
    """ROPE_LLAMA over packed keys, which are copied.

    Args:
        home: of the wrapper.
        options: with the rotation.
        q_positions, k_positions: int64, one for each row.
        make: an inner step, from the options without rotation.
    """

    def __init__(
        self,
        home: Home,
        options: Options,
        q_positions: np.ndarray,
        k_positions: np.ndarray,
        make: Callable[[Options], Any],
    ) -> None:
        self._options, self._key_rows = options, len(k_positions)
        self._inner = make(replace(options, pos_encoding_mode="NONE"))
        self._rotation = Rotation(home.library, options, q_positions, k_positions, 1)

    def run(self, q: Array, k: Array, v: Array, *how: Any) -> Results:
        """As `Step.run`."""
        check_rows(self._options, self._key_rows, view(k, "k"), view(v, "v"))
        check_queries(self._options, self._rotation.rows, view(q, "q"))
        return self._inner.run(self._rotation.turn_queries(q), self._rotation.turned_keys(k), v, *how)


def check_queries(options: Options, rows: int, q: View) -> None:
    """Refuse queries that are not as planned, before they are rotated."""
    shape = (rows, options.num_qo_heads, options.head_dim_qk)
    if q.shape != shape:
        refuse("q", f"shape {q.shape}", f"{shape}: (rows, num_qo_heads, head_dim), as planned")
    if q.dtype != options.q_dtype:
        refuse("q", q.dtype, f"{options.q_dtype}, the q_data_type that plan was given or has by default", TypeError)


class Rotation:
    """The rotations of one plan. Positions before the first key, of queries that outnumber the keys, count too.

    Args:
        library: of the arrays.
        options: head_dim, rope_scale and rope_theta.
        q_positions: int64 (rows,).
        k_positions: int64, of each page's first row, or of each row.
        page_size: rows of a page.
    """

    def __init__(
        self, library: Library, options: Options, q_positions: np.ndarray, k_positions: np.ndarray, page_size: int
    ) -> None:
        frequencies = Frequencies(options.head_dim_qk, options.rope_scale, options.rope_theta)
        first = min(0, int(q_positions.min(initial=0)))
        end = max(int(q_positions.max(initial=0)) + 1, int(k_positions.max(initial=0)) + page_size)
        self._tables = position_tables(library, frequencies, first, 1 << (end - first - 1).bit_length())
        self._q_rows = library.asarray((q_positions - first).astype(np.int32))
        self._k_rows = library.asarray((k_positions - first).astype(np.int32))
        self.rows = len(q_positions)

    def turn_queries(self, q: Array) -> Array:
        """A rotated copy."""
        return rotate_rows(q, self._tables, self._q_rows, False)

    def turned_keys(self, k: Array) -> Array:
        """A rotated copy of packed keys."""
        return rotate_rows(k, self._tables, self._k_rows, False)

    def turn_pages(self, pages: Array) -> None:
        """Rotate pages (pages, rows, heads, head_dim) in place."""
        apply_rotary(pages, *self._tables, offsets=self._k_rows, interleaved=False, out=pages)
