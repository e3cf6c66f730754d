"""Rotary embedding of packed queries and keys, under FlashInfer's names.

Angles are computed in float64 and rotations in float32, from tables that are made for the rows of the call: no position
is too large, and nothing waits for the device. `cupyattn.apply_rotary` with tables of the model is the quicker way.
"""

from __future__ import annotations

from typing import Any

from ...arrays import View, refuse, view
from ...attention import checking
from ...problem import check_writable
from .arguments import check_int, check_number
from .library import Array, Library, library_of, on_host
from .page import owners
from .pages import check_starts, index_view
from .rotation import Frequencies, Tables, rotate_rows, row_tables

Pair = tuple[Array, Array]


def apply_rope(
    q: Array,
    k: Array,
    indptr: Array,
    offsets: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """q and k rotated by their positions: row i of sequence b is at offsets[b] + i.

    Args:
        q: (nnz, num_q_heads, head_dim), float16, bfloat16 or float32, of NumPy, CuPy or PyTorch.
        k: (nnz, num_k_heads, head_dim).
        indptr: integers (batch + 1,), starting at 0: rows indptr[b] to indptr[b + 1] are sequence b. Rows behind the
            last sequence stay as they are.
        offsets: integers (batch,).
        rotary_dim: how many elements of each head are rotated, the first ones; all if None.
        interleave: True to rotate elements (0, 1), (2, 3), … together; False for (i, i + rotary_dim / 2).
        rope_scale: positions are divided by it.
        rope_theta: the base of the frequencies, rope_theta ** (-2 i / rotary_dim) for pair i.

    Returns:
        (q, k), new arrays of the same shapes and dtypes.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat import flashinfer
    >>> q, k = np.ones((3, 8, 64), np.float32), np.ones((3, 2, 64), np.float32)
    >>> rotated, _ = flashinfer.apply_rope(q, k, np.array([0, 3], np.int32), np.array([5], np.int32))
    >>> bool(np.allclose(rotated[2, 0, 0], np.cos(7.0) - np.sin(7.0)))
    True
    """
    return _by_sequence(q, k, indptr, offsets, _plain(q, rotary_dim, rope_scale, rope_theta), interleave, False)


def apply_rope_inplace(
    q: Array,
    k: Array,
    indptr: Array,
    offsets: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope` into q and k themselves."""
    _by_sequence(q, k, indptr, offsets, _plain(q, rotary_dim, rope_scale, rope_theta), interleave, True)


def apply_rope_pos_ids(
    q: Array,
    k: Array,
    pos_ids: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """`apply_rope` with the position of each row, pos_ids integers (nnz,)."""
    return _by_position(q, k, pos_ids, _plain(q, rotary_dim, rope_scale, rope_theta), interleave, False)


def apply_rope_pos_ids_inplace(
    q: Array,
    k: Array,
    pos_ids: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope_pos_ids` into q and k themselves."""
    _by_position(q, k, pos_ids, _plain(q, rotary_dim, rope_scale, rope_theta), interleave, True)


def apply_llama31_rope(
    q: Array,
    k: Array,
    indptr: Array,
    offsets: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """`apply_rope` with the frequencies of Llama 3.1.

    Those that turn more than high_freq_factor times within old_context_len tokens stay as they are, those that turn
    fewer than low_freq_factor times are divided by rope_scale, and between the two it goes over evenly.
    """
    llama = _llama(q, rotary_dim, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return _by_sequence(q, k, indptr, offsets, llama, interleave, False)


def apply_llama31_rope_inplace(
    q: Array,
    k: Array,
    indptr: Array,
    offsets: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope` into q and k themselves."""
    llama = _llama(q, rotary_dim, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    _by_sequence(q, k, indptr, offsets, llama, interleave, True)


def apply_llama31_rope_pos_ids(
    q: Array,
    k: Array,
    pos_ids: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """`apply_llama31_rope` with the position of each row, pos_ids integers (nnz,)."""
    llama = _llama(q, rotary_dim, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return _by_position(q, k, pos_ids, llama, interleave, False)


def apply_llama31_rope_pos_ids_inplace(
    q: Array,
    k: Array,
    pos_ids: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope_pos_ids` into q and k themselves."""
    llama = _llama(q, rotary_dim, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    _by_position(q, k, pos_ids, llama, interleave, True)


def apply_rope_with_cos_sin_cache(
    positions: Array, query: Array, key: Array, head_size: int, cos_sin_cache: Array, is_neox: bool = True
) -> Pair:
    """query and key rotated by rows of a table.

    Args:
        positions: integers (nnz,), rows of the table. On CUDA they are not compared with its length.
        query, key: (nnz, heads * head_size).
        head_size: elements of a head.
        cos_sin_cache: float32 (max_seq_len, rotary_dim): cosines in the first half of the columns, sines in the second.
        is_neox: True to rotate elements (i, i + rotary_dim / 2) together, False for (0, 1), (2, 3), ….

    Returns:
        (query, key), new arrays of the same shapes and dtypes.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    return _by_table(positions, query, key, head_size, cos_sin_cache, is_neox, False)


def apply_rope_with_cos_sin_cache_inplace(
    positions: Array, query: Array, key: Array, head_size: int, cos_sin_cache: Array, is_neox: bool = True
) -> None:
    """`apply_rope_with_cos_sin_cache` into query and key themselves."""
    _by_table(positions, query, key, head_size, cos_sin_cache, is_neox, True)


# ---------------------------------------------------------------------------------------------------- how it is done


def _plain(q: Array, rotary_dim: int | None, scale: float, theta: float) -> Frequencies:
    scale, theta = check_number("rope_scale", scale, 1.0), check_number("rope_theta", theta, 1e4)
    return Frequencies(_rotary_dim(q, rotary_dim), scale, theta)


def _llama(
    q: Array, rotary_dim: int | None, scale: float, theta: float, low: float, high: float, context: int
) -> Frequencies:
    plain = _plain(q, rotary_dim, scale, theta)
    low, high = check_number("low_freq_factor", low, 1.0), check_number("high_freq_factor", high, 4.0)
    if high <= low:
        refuse("high_freq_factor", high, f"more than low_freq_factor {low}")
    context = check_number("old_context_len", context, 8192.0)
    return Frequencies(plain.rotary_dim, plain.scale, plain.theta, low, high, context)


def _rotary_dim(q: Array, rotary_dim: int | None) -> int:
    shape = view(q, "q").shape
    if len(shape) != 3:
        refuse("q", f"shape {shape}", "(nnz, num_q_heads, head_dim)")
    rotary_dim = shape[2] if rotary_dim is None else check_int("rotary_dim", rotary_dim, 2, shape[2])
    if rotary_dim % 2:
        refuse("rotary_dim", rotary_dim, "an even number: elements are rotated in pairs")
    return rotary_dim


def _by_sequence(
    q: Array, k: Array, indptr: Array, offsets: Array, frequencies: Frequencies, interleave: bool, inplace: bool
) -> Pair:
    """Rotate by positions that go on from an offset in each sequence."""
    library = _check_rows(q, k, inplace)
    starts = index_view("indptr", indptr, library.device, wide=True)
    first = index_view("offsets", offsets, library.device, wide=True)
    if first.shape[0] != starts.shape[0] - 1:
        refuse("offsets", f"{first.shape[0]} entries", f"{starts.shape[0] - 1}, one fewer than indptr has")
    indptr, offsets = library.here(indptr, "indptr"), library.here(offsets, "offsets")
    if checking(None, library.device):
        check_starts("indptr", on_host(indptr, "indptr").astype("int64"), q.shape[0], f"q has {q.shape[0]} rows")
    with library.current():
        rows = library.arange(q.shape[0], starts.dtype)
        if first.shape[0]:
            owner, inside = owners(library, indptr, rows)
            rows = library.xp.where(inside, rows + (offsets - indptr[:-1])[owner], 0)  # by no angle: as they are
        else:
            rows = rows * 0
        return _rotated(library, q, k, row_tables(library, frequencies, rows), interleave, inplace)


def _by_position(q: Array, k: Array, pos_ids: Array, frequencies: Frequencies, interleave: bool, inplace: bool) -> Pair:
    """Rotate each row by a position of its own."""
    library = _check_rows(q, k, inplace)
    pos_ids = _checked_positions("pos_ids", pos_ids, q.shape[0], library)
    with library.current():
        return _rotated(library, q, k, row_tables(library, frequencies, pos_ids), interleave, inplace)


def _by_table(
    positions: Array, query: Array, key: Array, head_size: int, cache: Array, is_neox: bool, inplace: bool
) -> Pair:
    """Rotate each row by a row of the caller's table."""
    check_int("head_size", head_size, 1)
    q, k = _in_heads("query", query, head_size), _in_heads("key", key, head_size)
    library = _check_rows(q, k, inplace, ("query", "key"))
    positions = _checked_positions("positions", positions, q.shape[0], library)
    table = view(cache, "cos_sin_cache")
    if table.dtype != "float32":
        refuse("cos_sin_cache", table.dtype, "float32", TypeError)
    if len(table.shape) != 2 or table.shape[1] % 2 or not 2 <= table.shape[1] <= head_size:
        expected = f"(max_seq_len, rotary_dim) with an even rotary_dim of at most head_size {head_size}"
        refuse("cos_sin_cache", f"shape {table.shape}", expected)
    if checking(None, library.device):
        _check_table_rows(on_host(positions, "positions"), table)
    with library.current():
        rows, half = cache[positions], table.shape[1] // 2
        tables = library.contiguous(rows[:, :half]), library.contiguous(rows[:, half:])
        rotated = _rotated(library, q, k, tables, not is_neox, inplace)
        return rotated[0].reshape(query.shape), rotated[1].reshape(key.shape)


def _rotated(library: Library, q: Array, k: Array, tables: Tables, interleave: bool, inplace: bool) -> Pair:
    """Row i of both by row i of the tables."""
    rows = library.arange(q.shape[0], "int32")
    return tuple(rotate_rows(x, tables, rows, bool(interleave), x if inplace else None) for x in (q, k))


def _check_rows(q: Array, k: Array, inplace: bool, names: tuple[str, str] = ("q", "k")) -> Library:
    """The library of q and k; both are looked at before either is changed."""
    views = [view(x, name) for x, name in zip((q, k), names, strict=True)]
    library = library_of(views[0], names[0])
    for name, found in zip(names, views, strict=True):
        _check_form(name, found, views[0], names[0])
        if inplace:
            check_writable(name, found)
    return library


def _check_form(name: str, found: View, like: View, like_name: str) -> None:
    if len(found.shape) != 3:
        refuse(name, f"shape {found.shape}", "(nnz, heads, head_dim)")
    if (found.shape[0], found.shape[2]) != (like.shape[0], like.shape[2]):
        expected = f"{like.shape[0]} rows of head_dim {like.shape[2]}, as in {like_name}"
        refuse(name, f"shape {found.shape}", expected)
    if (found.library, found.device, found.dtype) != (like.library, like.device, like.dtype):
        got = f"{found.dtype} of {found.library}"
        refuse(name, got, f"{like.dtype} of {like.library} beside {like_name}", TypeError)


def _checked_positions(name: str, positions: Array, count: int, library: Library) -> Array:
    """The positions beside the rows."""
    found = view(positions, name)
    if found.shape != (count,):
        refuse(name, f"shape {found.shape}", f"({count},), one for each row")
    if found.dtype not in ("int32", "int64"):
        refuse(name, found.dtype, "int32 or int64", TypeError)
    return library.here(positions, name)


def _check_table_rows(positions: Any, table: View) -> None:
    if positions.size and not 0 <= positions.min() <= positions.max() < table.shape[0]:
        got = f"{int(positions.min())} to {int(positions.max())}"
        refuse("positions", got, f"0 to {table.shape[0] - 1}, the rows of cos_sin_cache")


def _in_heads(name: str, rows: Array, head_size: int) -> Array:
    """(nnz, heads * head_size) as (nnz, heads, head_size), without a copy."""
    found = view(rows, name)
    if len(found.shape) != 2 or found.shape[1] % head_size:
        refuse(name, f"shape {found.shape}", f"(nnz, heads * head_size) with head_size {head_size}")
    if found.shape[1] > 1 and found.strides[1] != 1:
        refuse(name, f"stride {found.strides[1]} in the last dimension", "1")
    return rows.reshape(found.shape[0], found.shape[1] // head_size, head_size)
