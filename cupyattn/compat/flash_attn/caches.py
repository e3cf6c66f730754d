"""A step over a cache, for FlashAttention-2's flash_attn_with_kvcache and for FlashAttention-3's."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ...arrays import refuse, view
from ...attention import Array, attention_varlen, attention_with_kvcache
from ...kvcache.placing import put
from .complaints import named

NAMES = {"window": "window_size"}  # what cupyattn's functions call arguments, and what they are called here


@cache
def cache_names(packed_queries: bool, page_table: bool, seqused_k: bool) -> dict[str, str]:
    """What cupyattn calls arguments, and what they are called here, by the spellings that were used."""
    names = {**NAMES, "sinks": "learnable_sink", "k_scale": "k_descale", "v_scale": "v_descale"}
    if page_table:
        names["block_table"] = "page_table"
    if seqused_k:
        names["cache_seqlens"] = "seqused_k"
    if packed_queries:
        names |= {"k": "k_cache", "v": "v_cache"}
        names["seqused_k"] = "seqused_k" if seqused_k else "cache_seqlens"
    return names


MASKS = ("causal", "window", "softmax_scale", "softcap", "alibi_slopes")


def masks_of(
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Array | None,
) -> dict[str, Any]:
    """The options that all of this library's functions take, by their names there."""
    return {
        "causal": causal,
        "window": _window(window_size),
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


_UNBOUNDED = (-1, -1)


def _window(window_size: Any) -> Any:
    """window_size as cupyattn takes it: two numbers in an array are two ints, and any that is negative means -1."""
    if type(window_size) is tuple and window_size == _UNBOUNDED:
        return None  # for which nothing is to be looked at
    if hasattr(window_size, "tolist"):
        window_size = window_size.tolist()
    if isinstance(window_size, (tuple, list)) and all(isinstance(side, (int, np.integer)) for side in window_size):
        return tuple([max(int(side), -1) if not isinstance(side, bool) else side for side in window_size])
    return window_size


def attend_cache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    options: dict[str, Any],
    packed: tuple[Array | None, int | None],
    unsupported: tuple[Any, ...],
    names: dict[str, str],
) -> Array | tuple[Array, Array]:
    """`attention_with_kvcache`, or for packed queries `attention_varlen`.

    Args:
        q, k_cache, v_cache: as there.
        options: all of `attention_with_kvcache` but layout, kv_dtype, out, kernel and check.
        packed: (cu_seqlens_q, max_seqlen_q).
        unsupported: (qv, q_descale, rotary_seqlens, attention_chunk, cu_seqlens_k_new), which are refused if they ask
            for anything.
        names: as in `named`.
    """
    qv, q_descale, rotary_seqlens, attention_chunk, cu_seqlens_k_new = unsupported
    if attention_chunk or not (qv is q_descale is rotary_seqlens is cu_seqlens_k_new is None):
        _refuse_what_is_missing(*unsupported, options["k"])
    if packed[0] is not None:
        _refuse_beside_packed_queries(options)
        if options["block_table"] is None and options["cache_batch_idx"] is not None:
            names = names | {"block_table": "cache_batch_idx"}  # which is what becomes of it
        return named(names, _packed_queries, (q, k_cache, v_cache, *packed, options))
    if options["block_table"] is None and options["cache_batch_idx"] is None:
        k_cache, v_cache = _first_entries(q, k_cache, v_cache)
    return named(names, attention_with_kvcache, (q, k_cache, v_cache), options)


def _packed_queries(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    cu_seqlens_q: Array,
    max_seqlen_q: int | None,
    options: dict[str, Any],
) -> Array | tuple[Array, Array]:
    """`attention_varlen` over a cache. A dense one is paged, with one block for each of its entries."""
    block_table, cache_seqlens = options["block_table"], options["cache_seqlens"]
    cache_batch_idx = options["cache_batch_idx"]
    if block_table is None:
        block_table = _entries_as_blocks(q, k_cache, cu_seqlens_q, cache_batch_idx)
    elif cache_batch_idx is not None:
        refuse("cache_batch_idx", "given together with block_table", "one of the two")
    if cache_seqlens is None or isinstance(cache_seqlens, (int, np.integer)):
        cache_seqlens = _uniform_lengths(q, k_cache, cu_seqlens_q, block_table, cache_seqlens)
    return attention_varlen(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        block_table=block_table,
        seqused_k=cache_seqlens,
        **{name: options[name] for name in (*MASKS, "sinks", "return_lse")},
    )


def _entries_as_blocks(q: Array, k_cache: Array, cu_seqlens_q: Array, cache_batch_idx: Array | None) -> Array:
    """A block table (batch, 1) for a dense cache."""
    entries, batch = view(k_cache, "k_cache").shape[0], _batch_of(cu_seqlens_q)
    if cache_batch_idx is not None:
        index = view(cache_batch_idx, "cache_batch_idx")
        if index.shape != (batch,):
            refuse("cache_batch_idx", f"shape {index.shape}", f"({batch},)")
        return cache_batch_idx[:, None]
    if entries < batch:
        refuse("k_cache", f"{entries} entries", f"at least the {batch} sequences of cu_seqlens_q")
    return put(np.arange(batch, dtype=np.int32)[:, None], view(q, "q"))


def _uniform_lengths(q: Array, k_cache: Array, cu_seqlens_q: Array, block_table: Array, length: int | None) -> Array:
    """int32 (batch,), all of one length, or of all that the cache holds for a sequence."""
    cache, table = view(k_cache, "k_cache"), view(block_table, "block_table")
    if len(cache.shape) != 4 or len(table.shape) != 2:
        length = 0  # refused by its rank
    elif length is None:
        length = cache.shape[1] * table.shape[1]
    elif not 0 <= length <= cache.shape[1] * table.shape[1]:
        refuse("cache_seqlens", f"{length} tokens", f"0 to the {cache.shape[1] * table.shape[1]} that its rows hold")
    return put(np.full(_batch_of(cu_seqlens_q), length, np.int32), view(q, "q"))


def _batch_of(cu_seqlens_q: Array) -> int:
    shape = view(cu_seqlens_q, "cu_seqlens_q").shape
    return max(shape[0] - 1, 0) if shape else 0


def _first_entries(q: Array, k_cache: Array, v_cache: Array) -> tuple[Array, Array]:
    """The caches' entries for q's sequences: flash_attn lets a dense cache have more."""
    batch, entries, others = (_length(array) for array in (q, k_cache, v_cache))
    return (k_cache[:batch], v_cache[:batch]) if batch < entries == others else (k_cache, v_cache)


def _length(array: Array) -> int:
    """How long the first axis is; 0 for what is no array, and will be refused."""
    shape = getattr(array, "shape", None)
    return shape[0] if shape else 0


def either(name: str, given: Any, other: str, other_given: Any) -> Any:
    """An argument that can come under two names."""
    if other_given is None:
        return given
    if given is not None:
        refuse(other, f"given together with {name}", f"one of the two: {other} is another name of {name}")
    return other_given


def _refuse_what_is_missing(
    qv: Array | None,
    q_descale: Array | None,
    rotary_seqlens: Array | None,
    attention_chunk: int,
    cu_seqlens_k_new: Array | None,
    k: Array | None,
) -> None:
    """Refuse what FlashAttention-3 can do and this library cannot."""
    for name, given in (("qv", qv), ("q_descale", q_descale), ("rotary_seqlens", rotary_seqlens)):
        if given is not None:
            refuse(name, "an array", "None: there is nothing like it here")
    if attention_chunk:
        refuse("attention_chunk", attention_chunk, "0: attention in chunks does not exist here")
    if cu_seqlens_k_new is not None and k is not None:
        refuse("cu_seqlens_k_new", "an array", "None: k and v are appended as (batch, seqlen_new, nheads_k, headdim)")


def _refuse_beside_packed_queries(options: dict[str, Any]) -> None:
    alone = {"k": "k", "v": "v", "rotary_cos": "rotary_cos", "rotary_sin": "rotary_sin"}
    alone |= {"cache_leftpad": "cache_leftpad", "k_scale": "k_descale", "v_scale": "v_descale"}
    for option, name in alone.items():
        if options[option] is not None:
            instead = "; append with cupyattn.append_kv before" if name in ("k", "v") else ""
            refuse(name, "given together with cu_seqlens_q", f"None{instead}")
