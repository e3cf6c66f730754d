"""The functions of flash_attn.flash_attn_interface, version 2.8: each hands its arrays on in one call, as they are.

What they have in common, beyond the shapes in each docstring:

- Arrays are of any library, of one dtype (float16, bfloat16, and float32 besides), on one device. headdim is 1 to 256
  and must be contiguous; v may have one of its own. nheads_k divides nheads.
- dropout_p: 0.0. Anything else is refused, as dropout belongs to training.
- softmax_scale: 1 / sqrt(headdim) if None.
- causal, window_size: aligned to the bottom right. Query i is at position i + seqlen_k - seqlen_q and sees
  window_size[0] keys before it, itself and window_size[1] behind it; -1 is unbounded, and causal makes the second 0.
- softcap: above 0, scores become softcap * tanh(score / softcap); 0.0 is none.
- alibi_slopes: float32 (nheads,) or (batch, nheads); a score loses slope * |i + seqlen_k - seqlen_q - j|.
- deterministic: without effect, as there is no backward pass.
- softmax_lse: the natural logarithm of the softmax's denominator, float32; +inf for a row that sees no key, whose
  output is zeros. Under causal and ALiBi it is that of the scores as above, where flash_attn leaves out a term that
  every key of a row shares.
- S_dmask, the third of what return_attn_probs=True returns: the softmax's weights in q's dtype, (batch, nheads,
  seqlen_q, seqlen_k), where flash_attn rounds both lengths up to multiples of 128, and without dropout returns an array
  without elements. They are computed by several calls, take memory that grows with seqlen_q * seqlen_k, and are meant
  for tests, as in flash_attn. For the lse alone call `cupyattn.attention` or `attention_varlen` with
  return_lse="flash_attn".

Bad arguments raise TypeError or ValueError before anything is written, by their names here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...arrays import View, refuse, split_axis, view
from ...attention import Array, attention, attention_varlen
from ...problem import check_flag
from .caches import NAMES, attend_cache, cache_names, either, masks_of
from .complaints import named, refuse_dropout
from .results import probabilities, varlen_probabilities

Results = Array | tuple[Array, Array, Array]

LSE = "flash_attn"  # the return_lse of this library's functions for the softmax_lse here

KV_NAMES = {**NAMES, "k": "kv", "v": "kv"}
QKV_NAMES = {**KV_NAMES, "q": "qkv", "k": "qkv", "v": "qkv"}
VARLEN_QKV_NAMES = {
    **QKV_NAMES,
    "cu_seqlens_q": "cu_seqlens",
    "cu_seqlens_k": "cu_seqlens",
    "max_seqlen_q": "max_seqlen",
    "max_seqlen_k": "max_seqlen",
}


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """Attention over dense arrays: `cupyattn.attention`.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k, v: (batch, seqlen_k, nheads_k, headdim).
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        An array (batch, seqlen_q, nheads, headdim), or with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse
        (batch, nheads, seqlen_q), S_dmask the softmax's weights (batch, nheads, seqlen_q, seqlen_k).

    >>> import numpy as np
    >>> from cupyattn.compat.flash_attn import flash_attn_func
    >>> q, k, v = np.ones((2, 3, 8, 64), np.float16), *np.ones((2, 2, 5, 2, 64), np.float16)
    >>> out, softmax_lse, S_dmask = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    >>> softmax_lse.shape, S_dmask[0, 0, 0].tolist()
    ((2, 8, 3), [0.333251953125, 0.333251953125, 0.333251953125, 0.0, 0.0])
    """
    masks = masks_of(causal, window_size, softmax_scale, softcap, alibi_slopes)
    return _dense(q, k, v, dropout_p, return_attn_probs, masks, NAMES)


def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_func` with keys and values in one array, kv (batch, seqlen_k, 2, nheads_k, headdim)."""
    masks = masks_of(causal, window_size, softmax_scale, softcap, alibi_slopes)
    k, v = parts("kv", kv, 2, "(batch, seqlen_k, 2, nheads_k, headdim)", return_attn_probs)
    return _dense(q, k, v, dropout_p, return_attn_probs, masks, KV_NAMES)


def flash_attn_qkvpacked_func(
    qkv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_func` with all in one array, qkv (batch, seqlen, 3, nheads, headdim)."""
    masks = masks_of(causal, window_size, softmax_scale, softcap, alibi_slopes)
    q, k, v = parts("qkv", qkv, 3, "(batch, seqlen, 3, nheads, headdim)", return_attn_probs)
    return _dense(q, k, v, dropout_p, return_attn_probs, masks, QKV_NAMES)


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
) -> Results:
    """Attention over packed sequences, their keys packed too or in a paged cache: `cupyattn.attention_varlen`.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim), or with block_table (num_blocks, block_size, nheads_k, headdim), block_size
            of 1 or more, where flash_attn takes multiples of 256.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), where each sequence begins; with block_table only the
            differences of cu_seqlens_k count, as lengths.
        max_seqlen_q, max_seqlen_k: ints, the longest sequence, or more.
        return_attn_probs: also return softmax_lse and S_dmask; index arrays on a device are checked and waited for
            then.
        block_table: int32 (batch, max_blocks): token n of a sequence is in the block of entry n // block_size.

    Returns:
        An array (total_q, nheads, headdim), or with return_attn_probs (out, softmax_lse, S_dmask): softmax_lse
        (nheads, total_q), S_dmask the softmax's weights (batch, nheads, max_seqlen_q, max_seqlen_k), zeros behind a
        shorter sequence's end.
    """
    masks = masks_of(causal, window_size, softmax_scale, softcap, alibi_slopes)
    places = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    return _varlen(q, k, v, places, dropout_p, return_attn_probs, masks, NAMES)


def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_varlen_func` with keys and values in one array, kv (total_k, 2, nheads_k, headdim)."""
    masks = masks_of(causal, window_size, softmax_scale, softcap, alibi_slopes)
    k, v = parts("kv", kv, 2, "(total_k, 2, nheads_k, headdim)", return_attn_probs)
    places = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None)
    return _varlen(q, k, v, places, dropout_p, return_attn_probs, masks, KV_NAMES)


def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Results:
    """`flash_attn_varlen_func` with all in one array, qkv (total, 3, nheads, headdim)."""
    masks = masks_of(causal, window_size, softmax_scale, softcap, alibi_slopes)
    q, k, v = parts("qkv", qkv, 3, "(total, 3, nheads, headdim)", return_attn_probs)
    places = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, None)
    return _varlen(q, k, v, places, dropout_p, return_attn_probs, masks, VARLEN_QKV_NAMES)


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Array | int | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Array | None = None,
    seqused_k: Array | int | None = None,
    cu_seqlens_q: Array | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: Array | None = None,
    rotary_seqlens: Array | None = None,
    learnable_sink: Array | None = None,
    qv: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | float | None = None,
    v_descale: Array | float | None = None,
    attention_chunk: int = 0,
    scheduler_metadata: Any = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Array | tuple[Array, Array]:
    """Attention of new queries over a cache, to which k and v, if given, are appended **in place**.

    It is `cupyattn.attention_with_kvcache`, or for packed queries `attention_varlen`. cache_seqlens is not changed.
    The arguments behind the star are those that FlashAttention-3 and 4 add, or spell in another way.

    Args:
        q: (batch, seqlen_q, nheads, headdim), or with cu_seqlens_q (total_q, nheads, headdim).
        k_cache, v_cache: (entries, seqlen_cache, nheads_k, headdim), of which the first `batch` entries are used unless
            cache_batch_idx names others; or with block_table (num_blocks, block_size, nheads_k, headdim), block_size of
            1 or more, where flash_attn 2 takes multiples of 256.
        k, v: (batch, seqlen_new, nheads_k, headdim), written behind the cache_seqlens tokens of each sequence.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), of q's dtype or float32; k and q are rotated by them. Needs
            k and v. New row i is at position cache_seqlens + i; so is query i under causal or a window, and else every
            query is at cache_seqlens. cache_leftpad moves no position.
        cache_seqlens: int32 (batch,), or an int for all; None if all of the cache is in use.
        cache_batch_idx: int32 (batch,), the cache entry of each sequence; all different if k and v are given.
        cache_leftpad: int32 (batch,), how many rows at a sequence's start nobody sees.
        block_table: int32 (batch, max_blocks). page_table: another name of it.
        rotary_interleaved: True to rotate elements (0, 1), (2, 3), … together, False for (i, i + rotary_dim / 2).
        num_splits: into how many pieces at most each sequence's keys are cut on CUDA; 0 for what suits. Packed queries
            take no notice of it.
        return_softmax_lse: also return softmax_lse.
        seqused_k: another name of cache_seqlens.
        cu_seqlens_q: int32 (batch + 1,), where each sequence's queries begin in a packed q. Not together with k and v
            (append them with `cupyattn.append_kv` before), cache_leftpad, k_descale or v_descale.
        max_seqlen_q: the longest of them, or more; may spare work.
        cu_seqlens_k_new: without k it says nothing; packed k and v are refused.
        learnable_sink: float32 (nheads,), one more logit for each head, which adds no value.
        k_descale, v_descale: for a cache in FP8, what its keys and values are to be multiplied with, as k_scale and
            v_scale of `attention_with_kvcache`: a number, or float32 of shape (), (1,) or (nheads_k,). q is not in FP8.
        rotary_seqlens, qv, q_descale, attention_chunk: refused if they ask for anything.
        scheduler_metadata, pack_gqa, sm_margin: without effect. They tune FlashAttention-3's kernels; this library
            shares the work out on the device, by the lengths as they are there, and has nothing to prepare.

    Returns:
        An array of q's shape but for v_cache's headdim; with return_softmax_lse a pair of it and softmax_lse, (batch,
        nheads, seqlen_q), of packed queries (nheads, total_q).

    >>> import numpy as np
    >>> from cupyattn.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache = np.zeros((2, 1, 16, 2, 64), np.float16)  # room for 16 tokens
    >>> q, k, v = np.ones((1, 1, 8, 64), np.float16), *np.ones((2, 1, 1, 2, 64), np.float16)
    >>> out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=5)
    >>> out.shape, float(k_cache[0, 5, 0, 0])
    ((1, 1, 8, 64), 1.0)
    """
    if page_table is not None:
        block_table = either("block_table", block_table, "page_table", page_table)
    if seqused_k is not None:
        cache_seqlens = either("cache_seqlens", cache_seqlens, "seqused_k", seqused_k)
    options = masks_of(causal, window_size, softmax_scale, softcap, alibi_slopes)
    options |= {
        "sinks": learnable_sink,
        "return_lse": LSE if check_flag("return_softmax_lse", return_softmax_lse) else False,
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
        "k_scale": k_descale,
        "v_scale": v_descale,
        "num_splits": num_splits,
    }
    packed = cu_seqlens_q, max_seqlen_q
    unsupported = qv, q_descale, rotary_seqlens, attention_chunk, cu_seqlens_k_new
    names = cache_names(cu_seqlens_q is not None, page_table is not None, seqused_k is not None)
    return attend_cache(q, k_cache, v_cache, options, packed, unsupported, names)


def _dense(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float,
    return_attn_probs: bool,
    masks: dict[str, Any],
    names: dict[str, str],
) -> Results:
    """`attention`, and what flash_attn returns beside the output if that is asked for."""
    refuse_dropout(dropout_p)
    if return_attn_probs is not True and not check_flag("return_attn_probs", return_attn_probs):
        return named(names, attention, (q, k, v), masks)
    results = named(names, attention, (q, k, v), {**masks, "return_lse": LSE})
    return *results, named(names, probabilities, (q, k, masks))


def _varlen(
    q: Array,
    k: Array,
    v: Array,
    places: tuple[Array, Array, int, int, Array | None],
    dropout_p: float,
    return_attn_probs: bool,
    masks: dict[str, Any],
    names: dict[str, str],
) -> Results:
    """`attention_varlen`, as `_dense`. places: the arguments between v and dropout_p, and block_table."""
    refuse_dropout(dropout_p)
    return_attn_probs = check_flag("return_attn_probs", return_attn_probs)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table = places
    options = masks | {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "block_table": block_table,
        "return_lse": LSE if return_attn_probs else False,
        "check": True if return_attn_probs else None,  # they are waited for and read all the same
    }
    results = named(names, attention_varlen, (q, k, v, cu_seqlens_q, cu_seqlens_k), options)
    if not return_attn_probs:
        return results
    return *results, named(names, varlen_probabilities, (q, k, *places, masks))


def parts(name: str, packed: Array, count: int, form: str, as_arrays: bool) -> Sequence[Array | View]:
    """An array's parts on the axis before the heads: as views for the kernels, or as arrays to work on."""
    found = view(packed, name)
    if len(found.shape) != form.count(",") + 1 or found.shape[-3] != count:
        refuse(name, f"shape {found.shape}", form)
    if as_arrays or found.strides[-1] != 1:  # of which `named` makes copies
        return [packed[..., i, :, :] for i in range(count)]
    return split_axis(found, len(found.shape) - 3)
