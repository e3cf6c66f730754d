"""`jax.nn.dot_product_attention` by its own signature, on this library's kernels."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ...arrays import refuse
from ...compat.flash_attn.complaints import named
from ..alignment import from_top_left
from .functions import attention, attention_with_kvcache


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """In place of `jax.nn.dot_product_attention`, whose arguments it takes: causal masks start in the top left corner.

    Masks are what the arguments say: an array in `bias` or `mask` is refused, as the kernels read none. Sequences of
    different lengths under a causal mask or a window are read backwards, which takes a copy of each array.

    Args:
        query: (batch, seqlen_q, heads, head_dim), or without batch.
        key, value: (batch, seqlen_k, kv_heads, head_dim), or without batch.
        bias, mask: None. What a mask of ones and zeros says, is_causal, local_window_size and the lengths may say too.
        scale: 1/sqrt(head_dim) if None; static.
        is_causal: query i sees keys j <= i; static.
        query_seq_lengths, key_value_seq_lengths: int32 (batch,). Rows of query behind them give zeros. As in `jax.nn`
            a sequence of more tokens than there are rows has all of them.
        local_window_size: (left, right) or one int for both: query i sees keys i - left <= j <= i + right; static.
        implementation: of no effect, as there is only this one.
        return_residual: also return the natural logarithm of the softmax's denominator.

    Returns:
        An array of query's shape and dtype; with return_residual a pair of it and (batch, seqlen_q, heads) of the same
        dtype. Queries that see no key give zeros and -inf, where `jax.nn` has a mean of all values and a large number.

    Raises:
        TypeError, ValueError: an argument does not fit, while JAX traces.
    """
    _refuse_scores("bias", bias)
    _refuse_scores("mask", mask)
    if implementation not in (None, "xla", "cudnn"):
        refuse("implementation", repr(implementation), "None, 'xla' or 'cudnn', of no effect here")
    query, key, value = map(jnp.asarray, (query, key, value))
    if isinstance(is_causal, jax.core.Tracer):
        refuse("is_causal", "a traced value", "True or False, static: see jax.jit's static_argnames", TypeError)
    if hasattr(key_value_seq_lengths, "dtype"):
        key_value_seq_lengths = jnp.clip(key_value_seq_lengths, 0, key.shape[-3])
    left, right = _window(local_window_size)
    sides = left, 0 if is_causal else right
    batched = query.ndim != 3
    if not batched:
        query, key, value = query[None], key[None], value[None]
    options = {"softmax_scale": scale, "return_lse": True}
    out, lse = named(_NAMES, _attend, (query, key, value, key_value_seq_lengths, *sides, options))
    lse = lse.swapaxes(1, 2).astype(out.dtype)
    if query_seq_lengths is not None:
        used = jnp.arange(query.shape[1]) < jnp.asarray(query_seq_lengths)[:, None]
        out = jnp.where(used[..., None, None], out, 0)
        lse = jnp.where(used[..., None], lse, -jnp.inf)
    out, lse = (out, lse) if batched else (out[0], lse[0])
    return (out, lse) if return_residual else out


_NAMES = {"q": "query", "k": "key", "v": "value", "k_cache": "key", "v_cache": "value", "softmax_scale": "scale"}
_NAMES |= {"cache_seqlens": "key_value_seq_lengths", "cache_leftpad": "key_value_seq_lengths"}


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, left: int, right: int, options: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    if lengths is None and left < 0 and right < 0:
        return attention(q, k, v, **options)
    if left < 0 and right < 0:
        return attention_with_kvcache(q, k, v, cache_seqlens=lengths, **options)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if left >= 0 and seqlen_q > seqlen_k + left:
        came = f"{left} on the left with {seqlen_q} queries and {seqlen_k} keys, so that the last queries see no key"
        refuse("local_window_size", came, f"at least {seqlen_q - seqlen_k} on the left")
    if lengths is None:
        keys, window = from_top_left(seqlen_q, seqlen_k, left, right)
        if keys == seqlen_k:
            return attention(q, k, v, window=window, **options)
        return attention_with_kvcache(q, k, v, cache_seqlens=keys, window=window, **options)
    # Backwards the first corner is the last, and what a sequence leaves unused of its keys lies before them.
    q, k, v = (jnp.flip(x, axis=1) for x in (q, k, v))
    unused = seqlen_k - jnp.asarray(lengths)
    out, lse = attention_with_kvcache(q, k, v, cache_leftpad=unused, window=(right, left), **options)
    return jnp.flip(out, axis=1), jnp.flip(lse, axis=2)


def _window(size: int | tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        return -1, -1
    sides = (size, size) if isinstance(size, int) else size
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side >= 0 for side in sides):
        refuse("local_window_size", repr(size), "(left, right) of at least 0 each, one such int for both, or None")
    return int(sides[0]), int(sides[1])


def _refuse_scores(name: str, array: Any) -> None:
    if array is not None:
        came = f"an array of shape {tuple(jnp.shape(array))}"
        instead = "is_causal, local_window_size, query_seq_lengths and key_value_seq_lengths say which keys are seen"
        refuse(name, came, f"None: the kernels read no {name}; {instead}")
