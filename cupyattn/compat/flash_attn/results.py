"""The softmax probabilities that flash_attn returns beside the output and its lse, and calls S_dmask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...arrays import View, deliver, empty, fill, host_array, numpy_dtype, view
from ...attention import Array, attention
from ...kvcache.placing import put, take
from ...streams import device_of


def probabilities(q: Array, k: Array, masks: Mapping[str, Any]) -> Array:
    """Softmax weights of dense arrays, (batch, nheads, seqlen_q, seqlen_k) of q's dtype; zeros for a row without keys.

    masks: of `attention`, whose arguments have been checked.
    """
    like, keys = view(q, "q"), _workable(view(k, "k"))
    batch, seqlen_q, nheads, _ = like.shape
    with device_of(like):
        weights = empty(like, (batch, nheads, seqlen_q, keys.shape[1]), like.dtype)
        _weigh(weights.array, _workable(like), keys, masks)
        return deliver(weights, like)


def varlen_probabilities(
    q: Array,
    k: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    block_table: Array | None,
    masks: Mapping[str, Any],
) -> Array:
    """The same of packed sequences, (batch, nheads, max_seqlen_q, max_seqlen_k), with zeros behind a shorter one.

    Goes through the sequences one by one, and waits for index arrays that lie on a device. They have been checked.
    """
    like, keys = view(q, "q"), view(k, "k")
    ends_q, ends_k = (host_array(view(ends, "cu_seqlens")).tolist() for ends in (cu_seqlens_q, cu_seqlens_k))
    table = None if block_table is None else host_array(view(block_table, "block_table"))
    slopes = masks["alibi_slopes"]
    per_sequence = slopes is not None and len(slopes.shape) == 2
    longest_q, longest_k = _longest(max_seqlen_q, ends_q), _longest(max_seqlen_k, ends_k)
    with device_of(like):
        weights = empty(like, (len(ends_q) - 1, like.shape[1], longest_q, longest_k), like.dtype)
        fill(weights, 0)
        for b in range(len(ends_q) - 1):
            queries = _workable(like)[None, ends_q[b] : ends_q[b + 1]]
            if table is None:
                own = _workable(keys)[None, ends_k[b] : ends_k[b + 1]]
            else:
                own = _from_blocks(keys, table[b], ends_k[b + 1] - ends_k[b])
            into = weights.array[b : b + 1, :, : queries.shape[1], : own.shape[1]]
            _weigh(into, queries, own, {**masks, "alibi_slopes": slopes[b : b + 1] if per_sequence else slopes})
        return deliver(weights, like)


def _longest(given: int | None, ends: list[int]) -> int:
    """max_seqlen, or the longest sequence if the caller left it open."""
    return max(np.diff(ends), default=0) if given is None else given


def _weigh(into: Array, q: Array, k: Array, masks: Mapping[str, Any]) -> None:
    """Write softmax weights into (batch, nheads, seqlen_q, seqlen_k): attention over values that are unit vectors.

    So the kernels say themselves what they weigh and mask. As many keys are asked for in a call as there are columns
    in a head, since that is the form that every kernel takes.
    """
    batch, seqlen_k, kv_heads, width = k.shape
    for first in range(0, seqlen_k, width):
        part = into[..., first : first + width]
        values = np.zeros((batch, seqlen_k, kv_heads, part.shape[-1]), numpy_dtype(view(k).dtype))
        column = np.arange(part.shape[-1])
        values[:, first + column, :, column] = 1
        attention(q, k, _beside(values, view(k)), out=part.swapaxes(1, 2), **masks)


def _from_blocks(cache: View, blocks: np.ndarray, length: int) -> Array:
    """The first rows of a sequence that lies in blocks, (1, length, kv_heads, head_dim)."""
    num_blocks, block_size, *row = cache.shape
    needed = blocks[: -(-length // block_size)].astype(np.int64)
    needed[(needed < 0) | (needed >= num_blocks)] = 0  # nobody sees those: they may have any entry
    rows = take(_workable(cache), (put(needed, cache),))
    return rows.reshape(1, len(needed) * block_size, *row)[:, :length]


def _beside(host: np.ndarray, like: View) -> Array:
    """A host array of like's dtype, in bits of which every library has a type, where `_workable(like)` lies."""
    return put(host.view(f"i{host.itemsize}"), like).view(_workable(like).dtype)


def _workable(found: View) -> Array:
    """An array as PyTorch, CuPy or NumPy has it, over the same memory."""
    return found.array if found.base is None else found.base
