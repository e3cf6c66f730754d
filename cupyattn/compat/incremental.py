"""Attention with a growing cache and beam search, by the calls that small projects have for it.

Arrays are (batch, heads, seqlen, head_dim), heads before tokens. The cache is a `cupyattn.KVCache`; it and all but
`flash_attention` are those of `cupyattn.kvcache`.
"""

from __future__ import annotations

from typing import Any

from ..arrays import View, refuse, turn, view
from ..attention import Array, attention
from ..kvcache import (
    KVCache,
    flash_attention_with_kv_cache,
    incremental_attention,
    initialize_kv_cache,
    reorder_kv_cache,
    update_kv_cache,
)

__all__ = [
    "KVCache",
    "flash_attention",
    "flash_attention_with_kv_cache",
    "incremental_attention",
    "initialize_kv_cache",
    "reorder_kv_cache",
    "update_kv_cache",
]


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    return_lse: bool = False,
    out: Array | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """Attention over arrays with heads before tokens: `cupyattn.attention` of transposed views.

    Args:
        q: (batch, heads, seqlen_q, head_dim).
        k, v: (batch, kv_heads, seqlen_k, head_dim), v's head_dim its own.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q.
        return_lse: also return the natural logarithm of the softmax's denominator.
        out: an array of the result's shape to write into.
        options: window, softmax_scale, softcap, alibi_slopes, sinks, kernel and check of `cupyattn.attention`.

    Returns:
        An array (batch, heads, seqlen_q, head_dim of v) in q's library, `out` itself if given, else a transposed view
        of one with heads behind tokens. With return_lse a pair of it and the lse, float32 (batch, heads, seqlen_q).

    Raises:
        TypeError, ValueError: an argument does not fit.

    >>> import numpy as np
    >>> from cupyattn.compat.incremental import flash_attention
    >>> q = k = v = np.ones((2, 8, 16, 64), np.float32)
    >>> flash_attention(q, k, v, causal=True).shape
    (2, 8, 16, 64)
    """
    rows = _tokens_first("q", q), _tokens_first("k", k), _tokens_first("v", v)
    keys, values = rows[1].shape, rows[2].shape
    if values[:3] != keys[:3]:
        refuse("v", f"shape {tuple(v.shape)}", f"k's shape {tuple(k.shape)}, but for head_dim")
    if out is not None:
        options["out"] = _tokens_first("out", out)
    if not return_lse:
        result = attention(*rows, causal=causal, **options)
        return result.swapaxes(1, 2) if out is None else out
    result, lse = attention(*rows, causal=causal, return_lse=return_lse, **options)
    return result.swapaxes(1, 2) if out is None else out, lse


def _tokens_first(name: str, array: Array) -> View:
    """(batch, heads, seqlen, head_dim) as (batch, seqlen, heads, head_dim), without a copy."""
    found = view(array, name)
    if len(found.shape) != 4:
        refuse(name, f"{len(found.shape)}-D shape {found.shape}", "4-D (batch, heads, seqlen, head_dim)")
    return turn(found)
