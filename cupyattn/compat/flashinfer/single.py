"""One request: attention of packed queries over keys that lie in one piece, with everything found out in the call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ...arrays import View, refuse, view
from ...attention import attention, attention_with_kvcache
from ...problem import check_flag
from .arguments import FP8_FORMATS, LAYOUTS, Options, check_choice, check_number, make_options
from .library import Array, Library, library_at, library_of
from .lse import alibi_slopes, deliver_lse, unit
from .masks import Masks, Visible
from .pages import Names, Pages, tables_of
from .steps import Results, Rotation

ReadMasks = Callable[[np.ndarray, np.ndarray], "Masks | None"]
"""A custom mask from the number of queries and that of keys, each as an array (1,)."""

Scales = tuple["float | None", "Array | float | None", "Array | float | None"]
"""What q, k and v are to be multiplied with."""

NO_SCALES: Scales = (None, None, None)


def no_masks(queries: np.ndarray, keys: np.ndarray) -> None:
    """There is no custom mask."""


def attend_one(
    q: Array, k: Array, v: Array, kv_layout: str, read: ReadMasks, scales: Scales, return_lse: bool, **planned: Any
) -> Array | tuple[Array, Array]:
    """Attention of q; with return_lse also the lse to base 2, (queries, num_qo_heads).

    k and v are (keys, num_kv_heads, head_dim) for kv_layout "NHD", (num_kv_heads, keys, head_dim) for "HND". The other
    arguments are those of `attend_rows`.
    """
    check_choice("kv_layout", kv_layout, LAYOUTS)
    _check_heads(q, k, kv_layout)
    k, v = rows_first("k", k, kv_layout), rows_first("v", v, kv_layout)
    form = "log2" if check_flag("return_lse", return_lse) else False
    out, lse = attend_rows(q, k, v, read, scales, form, **planned)
    if not return_lse:
        return out
    library = library_at(q, "q")
    with library.current():
        return out, deliver_lse(library, lse, "NH", None, None)


def _check_heads(q: Array, k: Array, kv_layout: str) -> None:
    """Refuse keys whose heads do not go with q's, in the words of the layout, which may be the other one."""
    queries, keys = view(q, "q").shape, view(k, "k").shape
    if len(queries) != 3 or len(keys) != 3:
        return  # refused by their rank
    heads, rows = (keys[1], keys[0]) if kv_layout == "NHD" else (keys[0], keys[1])
    if heads and queries[1] % heads:
        turned = rows and queries[1] % rows == 0
        hint = f"; this would be kv_layout={'HND' if kv_layout == 'NHD' else 'NHD'!r}" if turned else ""
        expected = f"a divisor of q's {queries[1]} for kv_layout={kv_layout!r}{hint}"
        refuse("k", f"{heads} heads, of shape {keys}", expected)


def rows_first(name: str, keys: Array, kv_layout: str) -> Array:
    """Keys or values as (rows, num_kv_heads, head_dim), whatever the layout."""
    shape = view(keys, name).shape
    if len(shape) != 3:
        form = "rows, num_kv_heads" if kv_layout == "NHD" else "num_kv_heads, rows"
        refuse(name, f"shape {shape}", f"({form}, head_dim) for kv_layout {kv_layout!r}")
    return keys if kv_layout == "NHD" else keys.swapaxes(0, 1)


def attend_rows(
    q: Array, k: Array, v: Array, read: ReadMasks, scales: Scales, return_lse: bool | str, **planned: Any
) -> Results:
    """Attention of q, and with return_lse its lse, counted as FlashInfer does.

    Args:
        q: (queries, num_qo_heads, head_dim).
        k, v: (keys, num_kv_heads, head_dim).
        read: the custom mask.
        scales: of q, k and v.
        return_lse: whether the lse is wanted, and in which form, as in `attention`.
        planned: masks and encodings as `make_options` takes them.
    """
    views = view(q, "q"), view(k, "k"), view(v, "v")
    _check_shapes(*views)
    library, options = library_of(views[0], "q"), _options(*views, planned)
    queries, keys = views[0].shape[0], views[1].shape[0]
    masks = read(np.array([queries]), np.array([keys]))
    plain = options.causal if masks is None else masks.as_causal()
    check_alibi(options, plain, queries)
    options = replace(options, causal=bool(plain))
    common = _common(options, scales) | {"return_lse": return_lse}
    with library.current():
        slopes = library.asarray(alibi_slopes(options.num_qo_heads)) if options.alibi else None
        common["alibi_slopes"] = slopes
        if options.rotates:
            q, k = _rotated(library, options, q, k)
        if plain is None:
            out, lse = _by_list(library, q, k, v, masks.visible(options.window_left), common)
        else:
            out, lse = _whole(q, k, v, options.fp8, common)
        if scales[2] is not None and not options.fp8:
            out *= scales[2]
        if slopes is not None and return_lse:
            lse = lse + (keys - queries) * unit(return_lse) * slopes  # FlashInfer's bias counts from the first query
    return out, lse


def _common(options: Options, scales: Scales) -> dict[str, Any]:
    """Masks and scales as this library's functions take them."""
    q_scale, k_scale, v_scale = scales
    check_number("q_scale", q_scale, 1.0)
    if options.fp8:
        k_scale, v_scale = (1.0 if scale is None else scale for scale in (k_scale, v_scale))
        fp8 = {"kv_dtype": options.kv_dtype, "k_scale": k_scale, "v_scale": v_scale}
        return options.masks | fp8 | {"softmax_scale": options.softmax_scale(q_scale)}
    check_number("k_scale", k_scale, 1.0)
    check_number("v_scale", v_scale, 1.0)
    return options.masks | {"softmax_scale": options.softmax_scale(q_scale, k_scale)}


def check_alibi(options: Options, plain: bool | None, most_queries: int) -> None:
    """Refuse ALiBi where its bias would not be that of this library; plain: the causal flag, None for other masks."""
    if not options.alibi:
        return
    if plain is None:
        expected = "'NONE' or 'ROPE_LLAMA' beside a custom mask that is neither causal nor everything"
        refuse("pos_encoding_mode", "'ALIBI'", expected)
    if not plain and most_queries > 1:
        expected = "True beside pos_encoding_mode='ALIBI' where a sequence has several queries"
        refuse("causal", "False", f"{expected}: FlashInfer's bias grows behind the diagonal, cupyattn's falls")


def _check_shapes(q: View, k: View, v: View) -> None:
    if len(q.shape) != 3:
        refuse("q", f"shape {q.shape}", "(queries, num_qo_heads, head_dim)")
    if v.shape[:2] != k.shape[:2]:
        refuse("v", f"{v.shape[:2]} keys and heads", f"k's {k.shape[:2]}")
    if k.shape[2] != q.shape[2]:
        refuse("k", f"head_dim {k.shape[2]}", f"q's {q.shape[2]}")


def _options(q: View, k: View, v: View, planned: dict[str, Any]) -> Options:
    if k.dtype not in (q.dtype, *FP8_FORMATS):
        refuse("k", k.dtype, f"q's dtype {q.dtype}, or an FP8 one", TypeError)
    return make_options(q.shape[1], *k.shape[1:], v.shape[2], None, q.dtype, k.dtype, None, **planned)


def _rotated(library: Library, options: Options, q: Array, k: Array) -> tuple[Array, Array]:
    queries, keys = q.shape[0], k.shape[0]
    rotation = Rotation(library, options, np.arange(queries) + keys - queries, np.arange(keys), 1)
    return rotation.turn_queries(q), rotation.turned_keys(k)


def _whole(q: Array, k: Array, v: Array, fp8: bool, common: dict[str, Any]) -> Results:
    function = attention_with_kvcache if fp8 else attention
    results = function(q[None], k[None], v[None], **common)
    return (results[0][0], results[1][0].T) if common["return_lse"] else (results[0], None)


def _by_list(library: Library, q: Array, k: Array, v: Array, visible: Visible, common: dict[str, Any]) -> Results:
    """Every query a sequence of its own, of the keys that it sees."""
    counts = visible.counts.astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    tables = tables_of(library, Pages(starts, counts, 1, visible.tokens.astype(np.int32), Names(), tokens=counts))
    common = common | {"causal": False, "window": None}
    rows = {"cache_seqlens": tables.lengths, "block_table": tables.table}
    results = attention_with_kvcache(q[:, None], k[:, None], v[:, None], **rows, **common)
    return (results[0][:, 0], results[1][:, :, 0]) if common["return_lse"] else (results[:, 0], None)
