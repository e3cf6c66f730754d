"""Custom masks: those that the kernels' own masks say too, and all others as lists of the keys that each query sees.

No kernel here reads a mask. But a query with a list of keys is a sequence of one query in a paged cache whose pages
have one row, which every kernel takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...arrays import refuse
from .library import Array, on_host


@dataclass(slots=True)
class Masks:
    """A mask for each sequence, on the host: bool (queries, keys)."""

    of_sequences: list[np.ndarray]

    def as_causal(self) -> bool | None:
        """True if all are the causal mask, False if all show everything, else None."""
        for causal in (False, True):
            if all(_is_plain(mask, causal) for mask in self.of_sequences):
                return causal
        return None

    def visible(self, window_left: int) -> Visible:
        """What the queries see, within a window of so many keys before their diagonal (-1: unbounded)."""
        counts, tokens, owners = [], [], []
        for b, mask in enumerate(self.of_sequences):
            seen = mask & _band(mask.shape, left=window_left) if window_left >= 0 else mask
            counts.append(seen.sum(axis=1))
            tokens.append(np.nonzero(seen)[1])
            owners.append(np.full(len(tokens[-1]), b))
        return Visible(
            *(np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in (counts, tokens, owners))
        )


@dataclass(slots=True)
class Visible:
    """The keys that queries see, query after query."""

    counts: np.ndarray  # (queries,): how many each sees
    tokens: np.ndarray  # (all of them,): which of its sequence's keys
    owners: np.ndarray  # the same: which sequence


def _is_plain(mask: np.ndarray, causal: bool) -> bool:
    return bool((mask == _band(mask.shape, right=0)).all() if causal else mask.all())


def _band(shape: tuple[int, int], *, left: int | None = None, right: int | None = None) -> np.ndarray:
    """The keys at most `left` before and `right` behind each query's diagonal, which ends at the last key."""
    queries, keys = shape
    distance = np.arange(queries)[:, None] + keys - queries - np.arange(keys)
    seen = np.ones(shape, bool)
    if left is not None:
        seen &= distance <= left
    if right is not None:
        seen &= -distance <= right
    return seen


def read_masks(
    custom_mask: Array | None, packed_custom_mask: Array | None, queries: np.ndarray, keys: np.ndarray
) -> Masks | None:
    """The masks of sequences with so many queries and keys, None if neither argument is given.

    Args:
        custom_mask: bool, all masks flattened one behind the other, or in any shape of as many elements.
        packed_custom_mask: uint8 (n,), from `segment_packbits` with bitorder "little"; goes before custom_mask.
        queries, keys: (batch,).

    Raises:
        TypeError, ValueError: a mask is of another dtype or size.
    """
    if custom_mask is None and packed_custom_mask is None:
        return None
    sizes = (queries * keys).tolist()
    if packed_custom_mask is not None:
        flat = _unpacked(on_host(packed_custom_mask, "packed_custom_mask"), sizes)
    else:
        flat = on_host(custom_mask, "custom_mask").reshape(-1)
        if flat.dtype != np.bool_:
            refuse("custom_mask", flat.dtype, "bool: True where a query sees a key", TypeError)
        if len(flat) != sum(sizes):
            expected = f"{sum(sizes)}: queries times keys of each sequence, one sequence behind the other"
            refuse("custom_mask", f"{len(flat)} elements", expected)
    ends = np.cumsum([0, *sizes])
    shapes = zip(ends, queries.tolist(), keys.tolist(), strict=False)
    return Masks([flat[start : start + q * k].reshape(q, k) for start, q, k in shapes])


def _unpacked(packed: np.ndarray, sizes: list[int]) -> np.ndarray:
    lengths = [-(-size // 8) for size in sizes]
    if packed.dtype != np.uint8:
        refuse(
            "packed_custom_mask", packed.dtype, "uint8, as segment_packbits(mask, indptr, 'little') gives", TypeError
        )
    if packed.ndim != 1 or len(packed) != sum(lengths):
        expected = f"({sum(lengths)},): every sequence's mask begins a new byte"
        refuse("packed_custom_mask", f"shape {packed.shape}", expected)
    parts = np.split(packed, np.cumsum(lengths)[:-1]) if lengths else []
    bits = [np.unpackbits(part, count=size, bitorder="little") for part, size in zip(parts, sizes, strict=True)]
    return np.concatenate(bits or [np.zeros(0, np.uint8)]).astype(bool)
