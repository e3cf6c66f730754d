"""The functions of FlashAttention-3 on arrays of every library.

What is imported from `flash_attn_interface` (or `flash_attn_3`) is imported from here instead. Names, positional order
and defaults are those of its hopper/flash_attn_interface.py; arguments have the meaning that they have in
`cupyattn.compat.flash_attn`, but for these:

- There is neither dropout nor ALiBi, and a row that sees no key has -inf in softmax_lse.
- num_splits, pack_gqa, sm_margin and deterministic have no effect but in `flash_attn_with_kvcache`, where num_splits is
  the most pieces that a sequence's keys are cut into.
- qv, q_descale, attention_chunk and seqused_q are refused if they ask for anything: there is nothing like them here.
  k_descale and v_descale are for an FP8 cache alone.

>>> import numpy as np
>>> from cupyattn.compat.flash_attn_3 import flash_attn_func
>>> q = k = v = np.ones((1, 16, 4, 64), np.float16)  # (batch, seqlen, nheads, headdim)
>>> flash_attn_func(q, k, v, causal=True).shape
(1, 16, 4, 64)
"""

from __future__ import annotations

from typing import Any

from ..arrays import refuse, view
from ..attention import Array, attention, attention_varlen
from ..problem import check_flag
from .flash_attn.caches import NAMES, attend_cache, cache_names, masks_of
from .flash_attn.complaints import named
from .flash_attn.flash_attn_interface import QKV_NAMES, parts

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

__version__ = "3.0.0"  # of flash_attn_3

Results = Array | tuple[Array, Array]


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Results:
    """Attention over dense arrays: `cupyattn.attention`.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k, v: (batch, seqlen_k, nheads_k, headdim), v's headdim its own.
        return_attn_probs: also return softmax_lse.

    Returns:
        An array (batch, seqlen_q, nheads, headdim of v), or with return_attn_probs a pair of it and softmax_lse,
        float32 (batch, nheads, seqlen_q).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    _refuse_missing(attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    masks = masks_of(causal, window_size, softmax_scale, softcap, None)
    lse = check_flag("return_attn_probs", return_attn_probs)
    return named(NAMES, attention, (q, k, v), {**masks, "return_lse": lse})


def flash_attn_qkvpacked_func(
    qkv: Array,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_func` with all in one array.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or with num_heads_q (batch, seqlen, nheads + 2 * nheads_k, headdim).
        num_heads_q: nheads.
    """
    _refuse_missing(attention_chunk, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    if len(view(qkv, "qkv").shape) == 4:
        q, k, v = _heads(qkv, num_heads_q)
    else:
        q, k, v = parts("qkv", qkv, 3, "(batch, seqlen, 3, nheads, headdim)", as_arrays=False)
    masks = masks_of(causal, window_size, softmax_scale, softcap, None)
    lse = check_flag("return_attn_probs", return_attn_probs)
    return named(QKV_NAMES, attention, (q, k, v), {**masks, "return_lse": lse})


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Array | None = None,
    seqused_k: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Results:
    """Attention over packed sequences: `cupyattn.attention_varlen`.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim), v's headdim its own.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where each sequence begins.
        max_seqlen_q, max_seqlen_k: ints, the longest sequence, or more.
        seqused_k: int32 (batch,), how many keys of each sequence are in use.
        return_attn_probs: also return softmax_lse.

    Returns:
        An array (total_q, nheads, headdim of v), or with return_attn_probs a pair of it and softmax_lse, float32
        (nheads, total_q).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    _refuse_missing(attention_chunk, qv=qv, seqused_q=seqused_q, **descales)
    options = masks_of(causal, window_size, softmax_scale, softcap, None) | {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_k": seqused_k,
        "return_lse": check_flag("return_attn_probs", return_attn_probs),
    }
    return named(NAMES, attention_varlen, (q, k, v, cu_seqlens_q, cu_seqlens_k), options)


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    qv: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    page_table: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | float | None = None,
    v_descale: Array | float | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Results:
    """Attention of new queries over a cache, to which k and v, if given, are appended **in place**.

    Every argument is as in `cupyattn.compat.flash_attn.flash_attn_with_kvcache`, page_table being its block_table.

    Returns:
        An array of q's shape but for v_cache's headdim; with return_softmax_lse a pair of it and softmax_lse, float32
        (batch, nheads, seqlen_q), of packed queries (nheads, total_q). FlashAttention-3 returns two partial results
        behind these.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat.flash_attn_3 import flash_attn_with_kvcache
    >>> pages = np.zeros((2, 8, 4, 2, 64), np.float16)  # of keys and of values, of 4 tokens each
    >>> q, k, v = np.ones((1, 1, 8, 64), np.float16), *np.ones((2, 1, 1, 2, 64), np.float16)
    >>> table = np.array([[6, 3]], np.int32)
    >>> out = flash_attn_with_kvcache(q, *pages, k, v, cache_seqlens=5, page_table=table)
    >>> out.shape, float(pages[0, 3, 1, 0, 0])
    ((1, 1, 8, 64), 1.0)
    """
    options = masks_of(causal, window_size, softmax_scale, softcap, None)
    options |= {
        "sinks": None,
        "return_lse": check_flag("return_softmax_lse", return_softmax_lse),
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": page_table,
        "k_scale": k_descale,
        "v_scale": v_descale,
        "num_splits": num_splits,
    }
    packed = cu_seqlens_q, max_seqlen_q
    unsupported = qv, q_descale, rotary_seqlens, attention_chunk, cu_seqlens_k_new
    names = cache_names(cu_seqlens_q is not None, True, False)
    return attend_cache(q, k_cache, v_cache, options, packed, unsupported, names)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Array,
    qkv_dtype: Any = "bfloat16",
    headdim_v: int | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    cache_leftpad: Array | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> None:
    """Nothing: there is no work to share out beforehand, and `flash_attn_with_kvcache` takes None for it."""


def _refuse_missing(attention_chunk: int, **given: Array | None) -> None:
    for name, array in given.items():
        if array is not None:
            refuse(name, "an array", "None: there is nothing like it here")
    if attention_chunk:
        refuse("attention_chunk", attention_chunk, "0: attention in chunks does not exist here")


def _heads(qkv: Array, nheads: int | None) -> tuple[Array, Array, Array]:
    """Views of q, k and v, whose heads follow one another."""
    total = qkv.shape[2]
    if type(nheads) is not int or not 0 < nheads < total or (total - nheads) % 2:
        expected = f"how many of the {total} heads of qkv are queries', with as many of keys as of values behind them"
        refuse("num_heads_q", nheads, expected)
    middle = (total + nheads) // 2
    return qkv[:, :, :nheads], qkv[:, :, nheads:middle], qkv[:, :, middle:]
