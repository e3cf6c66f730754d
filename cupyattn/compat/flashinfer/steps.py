"""What a plan hands to its runs: how arrays as FlashInfer has them become those of a `DecodePlan` or a `PrefillPlan`.

A step is made by `plan`, and knows the sequences. Its `run` gives queries another shape, which copies nothing, and
passes them on. The first run of a form finds out which plan of this library serves it, and that is where arrays are
refused; those that follow only ask that plan, which looks at the arrays itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from ...arrays import View, device_name, refuse, view
from ...decode_plan import DecodePlan
from ...prefill_plan import PrefillPlan
from ...rotary import apply_rotary
from .arguments import Options, check_number
from .library import Array, Library
from .lse import alibi_slopes
from .masks import Visible
from .pages import BlockTables, Pages
from .rotation import Frequencies, position_tables, rotate_rows

_HELD = 16  # plans of this library that a wrapper keeps, as each may hold memory of its own
_SCALES = 1024  # numbers kept as arrays; a model has two for each layer


class Home:
    """What all steps of a wrapper share: where its arrays lie, and the plans of this library made so far.

    Args:
        library: of all arrays.
        workspace_bytes: of the caller's workspace buffer.
    """

    __slots__ = ("library", "workspace_bytes", "_plans", "_scales", "_slopes")

    def __init__(self, library: Library, workspace_bytes: int) -> None:
        self.library, self.workspace_bytes = library, workspace_bytes
        self._plans: dict[tuple, DecodePlan | PrefillPlan] = {}
        self._scales: dict[float, Array] = {}
        self._slopes: dict[int, Array] = {}

    def find_plan(self, key: tuple, make: Callable[[], DecodePlan | PrefillPlan]) -> DecodePlan | PrefillPlan:
        """The plan that was made for this key, or a new one."""
        found = self._plans.get(key)
        if found is None:
            found = make()
            check_workspace(self.workspace_bytes, found.workspace_bytes)
            while len(self._plans) >= _HELD:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = found
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


def check_workspace(given: int, needed: int) -> None:
    """Refuse a workspace buffer smaller than what the kernels keep partial sums in."""
    if given < needed:
        expected = f"at least {needed}, which the partial sums of this plan take: pass a larger one to the wrapper"
        refuse("float_workspace_buffer", f"{given} bytes", f"{expected}, or to reset_workspace_buffer")


@dataclass(slots=True)
class Arrays:
    """What one run got, in the order of a plan's run. Scales are arrays, for an FP8 cache only."""

    q: Array
    k: Array
    v: Array
    sinks: Array | None = None
    k_scale: Array | None = None
    v_scale: Array | None = None
    out: Array | None = None


Results = tuple[Array, "Array | None"]
"""out (rows, heads, head_dim) and, if it was asked for, the natural lse as (rows, heads), of any strides."""


class Step(ABC):
    """One plan's way to run. Subclasses say which plan of this library serves it, and how it is called."""

    def __init__(self, home: Home, options: Options, rows: int) -> None:
        self._home, self._options = home, options
        self._q_shape = (rows, options.num_qo_heads, options.head_dim_qk)
        self._out_shape = (rows, options.num_qo_heads, options.head_dim_vo)
        self._slopes = home.slopes(options)
        self._found: dict[tuple, DecodePlan | PrefillPlan] = {}

    @abstractmethod
    def _check(self, q: View, k: View, v: View) -> None:
        """Refuse keys and values that do not fit what was planned."""

    @abstractmethod
    def _form(self) -> tuple:
        """What a plan of this library depends on beside the options and the arrays of the run."""

    @abstractmethod
    def _make(self, arrays: Arrays, common: dict[str, Any]) -> DecodePlan | PrefillPlan:
        """A plan for arrays like these; common: masks and other options that all have."""

    @abstractmethod
    def _call(self, plan: DecodePlan | PrefillPlan, arrays: Arrays, return_lse: bool) -> Results:
        """Run it."""

    def run(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        out: Array | None = None,
        sinks: Array | None = None,
        q_scale: float | None = None,
        k_scale: float | Array | None = None,
        v_scale: float | Array | None = None,
        return_lse: bool = False,
    ) -> Results:
        """Attention of q (rows, heads, head_dim) over keys and values as the wrapper has them.

        A scale of keys that are no FP8 goes into the softmax scale, one of values is applied to the result.
        """
        if getattr(q, "shape", None) != self._q_shape:
            self._refuse_shape(q)
        if self._options.fp8:
            scales = self._home.scale("k_scale", k_scale), self._home.scale("v_scale", v_scale)
            k_scale = None
        else:
            scales = None, None
        if q_scale is not None or k_scale is not None:
            check_number("q_scale", q_scale, 1.0)
            check_number("k_scale", k_scale, 1.0)
        variant = return_lse, sinks is None, q_scale, k_scale
        results = self._run_variant(variant, Arrays(q, k, v, sinks, *scales, out))
        if v_scale is not None and not self._options.fp8:
            results = _times(results, check_number("v_scale", v_scale, 1.0))
        return results

    def _refuse_shape(self, q: Array) -> NoReturn:
        shape = view(q, "q").shape
        refuse("q", f"shape {shape}", f"{self._q_shape}: (rows, num_qo_heads, head_dim), as planned")

    def _run_variant(self, variant: tuple, arrays: Arrays) -> Results:
        plan = self._found.get(variant)
        if plan is not None:
            try:
                return self._call(plan, arrays, variant[0])
            except (TypeError, ValueError):
                pass  # it looks at arrays before it does anything: they are of another form, or will be refused again
        self._found[variant] = plan = self._find(variant, arrays)
        return self._call(plan, arrays, variant[0])

    def _look(self, arrays: Arrays) -> tuple[View, View, View]:
        """The views of q, k and v, with all refused that can be in FlashInfer's terms."""
        home, options = self._home, self._options
        q, k, v = view(arrays.q, "q"), view(arrays.k, "k"), view(arrays.v, "v")
        for name, found in (("q", q), ("k", k), ("v", v)):
            home.check_here(name, found)
        if q.dtype != options.q_dtype:
            expected = f"{options.q_dtype}, the q_data_type that plan was given or has by default"
            refuse("q", q.dtype, expected, TypeError)
        for name, found in (("k", k), ("v", v)):
            if found.dtype != options.kv_dtype and not (options.fp8 and found.dtype == "uint8"):
                expected = f"{options.kv_dtype}, the kv_data_type that plan was given, or else its q_data_type"
                refuse(name, found.dtype, expected, TypeError)
        self._check(q, k, v)
        if arrays.out is not None:
            _check_out(view(arrays.out, "out"), self._out_shape, options.q_dtype)
        return q, k, v

    def _find(self, variant: tuple, arrays: Arrays) -> DecodePlan | PrefillPlan:
        """The plan for arrays of this form."""
        home, options = self._home, self._options
        q, k, v = self._look(arrays)
        others = arrays.sinks, arrays.k_scale, arrays.v_scale, arrays.out
        forms = tuple([_form_of(q), _form_of(k), _form_of(v), *map(_form_of_optional, others)])
        return_lse, _, q_scale, k_scale = variant
        common = options.masks | {
            "softmax_scale": options.softmax_scale(q_scale, k_scale),
            "alibi_slopes": self._slopes,
            "sinks": arrays.sinks,
            "return_lse": return_lse,
        }
        key = (type(self), options, self._form(), variant, forms)
        return home.find_plan(key, lambda: self._make(arrays, common))


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
        self, home: Home, options: Options, rows: int, pages: Pages, table: Array, lengths: Array, layout: str
    ) -> None:
        super().__init__(home, options, rows)
        self._pages, self._table, self._lengths, self._layout = pages, table, lengths, layout

    def _check(self, q: View, k: View, v: View) -> None:
        check_cache(self._options, self._layout, k, v)
        self._pages.check_ids(k.shape[0])

    @property
    def _fp8(self) -> str | None:
        return self._options.kv_dtype if self._options.fp8 else None


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
        super().__init__(home, options, pages.batch * queries, pages, table, lengths, layout)
        heads = options.num_qo_heads
        self._dense_q = (pages.batch, queries, heads, options.head_dim_qk)
        self._dense_out = (pages.batch, queries, heads, options.head_dim_vo)

    def sequences(self, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """(block table, lengths), where q and the caches are as planned."""
        if getattr(q, "shape", None) != self._q_shape:
            self._refuse_shape(q)
        self._look(Arrays(q, k, v))
        return self._table, self._lengths

    def _form(self) -> tuple:
        return self._dense_q, self._layout, _form_of(view(self._table))

    def _make(self, arrays: Arrays, common: dict[str, Any]) -> DecodePlan:
        return DecodePlan(
            arrays.q.reshape(self._dense_q),
            arrays.k,
            arrays.v,
            cache_seqlens=self._lengths,
            block_table=self._table,
            layout=self._layout,
            kv_dtype=self._fp8,
            k_scale=arrays.k_scale,
            v_scale=arrays.v_scale,
            num_splits=0 if self._options.split_kv else 1,
            out=None if arrays.out is None else arrays.out.reshape(self._dense_out),
            **common,
        )

    def _call(self, plan: DecodePlan, arrays: Arrays, return_lse: bool) -> Results:
        out = arrays.out
        results = plan.run(
            arrays.q.reshape(self._dense_q),
            arrays.k,
            arrays.v,
            cache_seqlens=self._lengths,
            block_table=self._table,
            alibi_slopes=self._slopes,
            sinks=arrays.sinks,
            k_scale=arrays.k_scale,
            v_scale=arrays.v_scale,
            out=None if out is None else out.reshape(self._dense_out),
        )
        if not return_lse:
            return (results.reshape(self._out_shape) if out is None else out), None
        result, lse = results
        by_row = lse.swapaxes(1, 2).reshape(self._out_shape[:2])
        return (result.reshape(self._out_shape) if out is None else out), by_row


class PackedStep(PagedStep):
    """Queries of different numbers, packed: `attention_varlen` over pages.

    Args as in `DenseStep`, with rows of q in all, starts int32 (batch + 1,) of the sequences among them, and the most
    queries of one sequence, or None.
    """

    def __init__(
        self,
        home: Home,
        options: Options,
        rows: int,
        starts: Array,
        longest: int | None,
        pages: Pages,
        table: Array,
        lengths: Array,
        layout: str,
    ) -> None:
        super().__init__(home, options, rows, pages, table, lengths, layout)
        self._starts, self._longest = starts, longest

    def _form(self) -> tuple:
        return self._longest, self._layout, _form_of(view(self._table))

    def _make(self, arrays: Arrays, common: dict[str, Any]) -> PrefillPlan:
        return PrefillPlan(
            arrays.q,
            arrays.k,
            arrays.v,
            self._starts,
            seqused_k=self._lengths,
            block_table=self._table,
            layout=self._layout,
            max_seqlen_q=self._longest,
            out=arrays.out,
            **common,
        )

    def _call(self, plan: PrefillPlan, arrays: Arrays, return_lse: bool) -> Results:
        results = plan.run(
            arrays.q,
            arrays.k,
            arrays.v,
            self._starts,
            seqused_k=self._lengths,
            block_table=self._table,
            alibi_slopes=self._slopes,
            sinks=arrays.sinks,
            out=arrays.out,
        )
        return (results[0], results[1].T) if return_lse else (results, None)


class RaggedStep(Step):
    """Packed queries over packed keys: `attention_varlen`.

    Args:
        home, options: of the wrapper.
        rows, key_rows: of q, and of k and v.
        starts, key_starts: int32 (batch + 1,) of the sequences among them.
        longest: the most queries of one sequence, or None.
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
    ) -> None:
        super().__init__(home, options, rows)
        self._key_rows, self._starts, self._key_starts, self._longest = key_rows, starts, key_starts, longest

    def _check(self, q: View, k: View, v: View) -> None:
        check_rows(self._options, self._key_rows, k, v)

    def _form(self) -> tuple:
        return self._longest, _form_of(view(self._starts)), _form_of(view(self._key_starts))

    def _make(self, arrays: Arrays, common: dict[str, Any]) -> PrefillPlan:
        starts = self._starts, self._key_starts
        return PrefillPlan(arrays.q, arrays.k, arrays.v, *starts, max_seqlen_q=self._longest, out=arrays.out, **common)

    def _call(self, plan: PrefillPlan, arrays: Arrays, return_lse: bool) -> Results:
        results = plan.run(
            arrays.q,
            arrays.k,
            arrays.v,
            self._starts,
            self._key_starts,
            alibi_slopes=self._slopes,
            sinks=arrays.sinks,
            out=arrays.out,
        )
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

    def run(self, q: Array, k: Array, v: Array, **options: Any) -> Results:
        """As `Step.run`."""
        k_view, v_view = view(k, "k"), view(v, "v")
        check_cache(self._planned, self._layout, k_view, v_view)
        self._pages.check_ids(k_view.shape[0])
        with self._home.library.current():
            keys, values, stride = self._by_row(k, v)
            return self._inner_step(stride).run(q, keys, values, **options)

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
            ids = view((self._page * stride + self._row).astype(np.int32))
            pages = Pages(starts, self._counts, self._counts, 1, ids, self._pages.names)
            tables = BlockTables(self._home.library)
            tables.take_in(pages)
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

    def run(self, q: Array, k: Array, v: Array, *, out: Array | None = None, **options: Any) -> Results:
        """As `Step.run`."""
        check_queries(self._options, self._rows, view(q, "q"))
        if out is not None:
            shape = (self._rows, self._options.num_qo_heads, self._options.head_dim_vo)
            _check_out(view(out, "out"), shape, self._options.q_dtype)
        with self._library.current():
            padded, lse = self._step.run(q[self._padding], k, v, **options)
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

    def run(self, q: Array, k: Array, v: Array, **options: Any) -> Results:
        """As `Step.run`."""
        check_rows(self._options, self._rows, view(k, "k"), view(v, "v"))
        return self._step.run(q, k[:, None], v[:, None], **options)


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
        copied = replace(pages, indices=view(np.arange(pages.total, dtype=np.int32)))
        tables = BlockTables(home.library)
        tables.take_in(copied)
        self._inner = make(replace(options, pos_encoding_mode="NONE"), copied, tables)
        page = np.arange(pages.total) - np.repeat(pages.starts[:-1], pages.counts)
        self._rotation = Rotation(home.library, options, q_positions, page * pages.page_size, pages.page_size)

    def run(self, q: Array, k: Array, v: Array, **options: Any) -> Results:
        """As `Step.run`."""
        k_view, v_view = view(k, "k"), view(v, "v")
        check_cache(self._options, self._layout, k_view, v_view)
        self._pages.check_ids(k_view.shape[0])
        check_queries(self._options, self._rotation.rows, view(q, "q"))
        with self._home.library.current():
            keys, values = k[self._ids], v[self._ids]
            self._rotation.turn_pages(keys if self._layout == "NHD" else keys.swapaxes(1, 2))
            return self._inner.run(self._rotation.turn_queries(q), keys, values, **options)


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

    def run(self, q: Array, k: Array, v: Array, **options: Any) -> Results:
        """As `Step.run`."""
        check_rows(self._options, self._key_rows, view(k, "k"), view(v, "v"))
        check_queries(self._options, self._rotation.rows, view(q, "q"))
        return self._inner.run(self._rotation.turn_queries(q), self._rotation.turned_keys(k), v, **options)


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
