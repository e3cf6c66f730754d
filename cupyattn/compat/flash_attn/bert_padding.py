"""Padded batches to packed tokens and back, as flash_attn.bert_padding does it, on arrays of every library.

How many tokens a mask selects is known to the device alone, so these wait for it. PyTorch records gradients through
them.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ...arrays import ACCEPTED, refuse
from ...attention import Array
from ...kvcache.inference import create_cu_seqlens
from ...kvcache.placing import bits, take


def unpad_input(
    hidden_states: Array, attention_mask: Array, unused_mask: Array | None = None
) -> tuple[Array, Array, Array, int, Array]:
    """The tokens of a padded batch that count, one behind the other, and where they came from.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: bool or int (batch, seqlen), 1 for a token, 0 for padding.
        unused_mask: the same, 1 for a place that is to be kept although no token is in it yet; never where
            attention_mask has 1.

    Returns:
        hidden_states: (total, ...), of the places that one of the masks selects.
        indices: (total,), int64 (of JAX int32), of these among the batch * seqlen.
        cu_seqlens: int32 (batch + 1,), where each sequence begins among them.
        max_seqlen_in_batch: an int, the most places of a sequence.
        seqused: int32 (batch,), the tokens of each sequence, those of attention_mask alone.

    Raises:
        TypeError, ValueError: an argument does not fit.

    >>> import numpy as np
    >>> from cupyattn.compat.flash_attn.bert_padding import unpad_input
    >>> tokens, indices, cu_seqlens, longest, _ = unpad_input(np.ones((2, 3, 8)), np.array([[1, 1, 0], [1, 0, 0]]))
    >>> tokens.shape, indices.tolist(), cu_seqlens.tolist(), longest
    ((3, 8), [0, 1, 3], [0, 2, 3], 2)
    """
    xp = _module("hidden_states", hidden_states)
    shape = _shape_of_batch(hidden_states)
    _check_mask("attention_mask", attention_mask, xp, shape)
    kept = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, xp, shape)
        kept = attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=xp.int32)
    indices = xp.argwhere(kept.reshape(-1)).reshape(-1)
    tokens = index_first_axis(hidden_states.reshape(shape[0] * shape[1], *shape[2:]), indices)
    longest = int(lengths.max()) if shape[0] else 0
    return tokens, indices, create_cu_seqlens(lengths), longest, attention_mask.sum(-1, dtype=xp.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Array, attention_mask_in_length: Array
) -> tuple[Array, Array, Array, int]:
    """`unpad_input` of a batch whose rows hold several short sequences each, one behind the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: integers (batch, seqlen): the lengths of a row's sequences, anywhere in it, else 0.

    Returns:
        (hidden_states, indices, cu_seqlens, max_seqlen_in_batch) as of `unpad_input`, for all the short sequences.

    Raises:
        TypeError, ValueError: an argument does not fit.

    >>> import numpy as np
    >>> from cupyattn.compat.flash_attn.bert_padding import unpad_input_for_concatenated_sequences as unpad
    >>> tokens, indices, cu_seqlens, longest = unpad(np.ones((2, 4, 8)), np.array([[1, 2, 0, 0], [3, 0, 0, 0]]))
    >>> indices.tolist(), cu_seqlens.tolist(), longest
    ([0, 1, 2, 4, 5, 6], [0, 1, 3, 6], 3)
    """
    xp = _module("hidden_states", hidden_states)
    shape = _shape_of_batch(hidden_states)
    lengths = attention_mask_in_length
    _check_mask("attention_mask_in_length", lengths, xp, shape)
    kept = xp.cumsum(xp.ones_like(lengths), -1) <= lengths.sum(-1)[:, None]
    indices = xp.argwhere(kept.reshape(-1)).reshape(-1)
    tokens = index_first_axis(hidden_states.reshape(shape[0] * shape[1], *shape[2:]), indices)
    flat = lengths.reshape(-1)
    own = flat[flat > 0]
    return tokens, indices, create_cu_seqlens(own), int(own.max()) if own.shape[0] else 0


def pad_input(hidden_states: Array, indices: Array, batch: int, seqlen: int) -> Array:
    """The padded batch that `unpad_input` took tokens from, with zeros where there was none.

    Args:
        hidden_states: (total, ...).
        indices: (total,) integers, the place of each among the batch * seqlen.

    Returns:
        An array (batch, seqlen, ...) of hidden_states' dtype.

    Raises:
        TypeError, ValueError: an argument does not fit.

    >>> import numpy as np
    >>> from cupyattn.compat.flash_attn.bert_padding import pad_input
    >>> pad_input(np.ones((3, 1)), np.array([0, 1, 3]), batch=2, seqlen=3)[..., 0].tolist()
    [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.reshape(batch, seqlen, *padded.shape[1:])


def index_first_axis(input: Array, indices: Array) -> Array:
    """input[indices], a copy: rows of (rows, ...) by integers (total,). Raises TypeError or ValueError."""
    xp = _module("input", input)
    _check_indices(indices, xp)
    return take(input, (indices,)) if xp.__name__ == "cupy" else input[indices]  # CuPy cannot index bfloat16


def index_put_first_axis(values: Array, indices: Array, first_axis_dim: int) -> Array:
    """An array (first_axis_dim, ...) with values (total, ...) in the rows that integers (total,) name, else zeros.

    Raises TypeError or ValueError.
    """
    xp = _module("hidden_states", values)
    _check_indices(indices, xp)
    if not len(values.shape) or values.shape[0] != indices.shape[0]:
        refuse("indices", f"{indices.shape[0]} of them", f"one for each row of hidden_states {tuple(values.shape)}")
    shape = (first_axis_dim, *values.shape[1:])
    if xp.__name__ == "jax.numpy":
        return xp.zeros(shape, values.dtype).at[indices].set(values)
    if xp.__name__ == "torch":
        rows = values.new_zeros(shape)
        rows[indices] = values
        return rows
    rows = xp.zeros(shape, values.dtype)
    bits(rows)[indices] = bits(values)
    return rows


def _module(name: str, array: Array) -> Any:
    """The module with the functions of an array's library; no library is imported for it."""
    torch, cupy, jax = (sys.modules.get(library) for library in ("torch", "cupy", "jax"))
    if isinstance(array, np.ndarray):
        return np
    if torch is not None and isinstance(array, torch.Tensor):
        return torch
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    if jax is not None and isinstance(array, jax.Array):
        return jax.numpy
    refuse(name, "None" if array is None else f"a {type(array).__name__}", ACCEPTED, TypeError)


def _shape_of_batch(hidden_states: Array) -> tuple[int, ...]:
    shape = tuple(hidden_states.shape)
    if len(shape) < 2:
        refuse("hidden_states", f"shape {shape}", "(batch, seqlen, ...)")
    return shape


def _check_mask(name: str, mask: Array, xp: Any, shape: tuple[int, ...]) -> None:
    if _module(name, mask) is not xp:
        refuse(name, f"a {type(mask).__name__}", "an array of hidden_states' library", TypeError)
    if tuple(mask.shape) != shape[:2]:
        refuse(name, f"shape {tuple(mask.shape)}", f"{shape[:2]}, (batch, seqlen) of hidden_states")


def _check_indices(indices: Array, xp: Any) -> None:
    if _module("indices", indices) is not xp:
        refuse("indices", f"a {type(indices).__name__}", "an array of the same library as the rows", TypeError)
    if len(indices.shape) != 1:
        refuse("indices", f"shape {tuple(indices.shape)}", "1-D, one for each row")
