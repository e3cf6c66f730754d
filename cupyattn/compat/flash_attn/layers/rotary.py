"""Rotary embedding by flash_attn.layers.rotary's function, on arrays of every library."""

from __future__ import annotations

from ....attention import Array
from ....rotary import apply_rotary
from ..complaints import named

__all__ = ["apply_rotary_emb"]

_NAMES = {"offsets": "seqlen_offsets"}


def apply_rotary_emb(
    x: Array,
    cos: Array,
    sin: Array,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Array = 0,
    cu_seqlens: Array | None = None,
    max_seqlen: int | None = None,
) -> Array:
    """x with the first elements of every head rotated by their positions: `cupyattn.apply_rotary`.

    Args:
        x: (batch, seqlen, nheads, headdim), or with cu_seqlens (total, nheads, headdim).
        cos, sin: (positions, rotary_dim / 2), of x's dtype or float32.
        interleaved: True to rotate elements (0, 1), (2, 3), … together, False for (i, i + rotary_dim / 2).
        inplace: write into x, and return it.
        seqlen_offsets: the position of each sequence's first row: int32 (batch,), or an int for all.
        cu_seqlens: int32 (batch + 1,), where each sequence begins.
        max_seqlen: without effect.

    Returns:
        An array of x's shape and dtype. There is no backward pass.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat.flash_attn.layers.rotary import apply_rotary_emb
    >>> angles = np.outer(np.arange(9), [1.0]).astype(np.float32)
    >>> x = np.ones((1, 3, 2, 2), np.float32)
    >>> rotated = apply_rotary_emb(x, np.cos(angles), np.sin(angles), seqlen_offsets=5)
    >>> bool(np.allclose(rotated[0, 2, 0, 0], np.cos(7.0) - np.sin(7.0)))
    True
    """
    where = {"offsets": seqlen_offsets, "interleaved": interleaved, "cu_seqlens": cu_seqlens}
    return named(_NAMES, apply_rotary, (x, cos, sin), {**where, "out": x if inplace else None})
