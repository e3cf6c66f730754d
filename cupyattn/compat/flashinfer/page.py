"""Appending keys and values to a paged cache, and the index arrays for that, under FlashInfer's names."""

from __future__ import annotations

import numpy as np

from ...arrays import View, device_name, host_array, refuse, view
from ...attention import append_kv, checking
from ...problem import FLOAT_DTYPES, FP8_DTYPES
from .arguments import LAYOUTS, MAX_PAGE_SIZE, check_choice, check_int, split_cache
from .library import Array, Library, library_of
from .pages import APPEND_NAMES, index_view, read_pages


def get_batch_indices_positions(
    append_indptr: Array,
    seq_lens: Array,
    nnz: int,
    batch_indices: Array | None = None,
    positions: Array | None = None,
) -> tuple[Array, Array]:
    """For each new row of packed keys, its sequence and its position there. Nothing waits for the device.

    Args:
        append_indptr: integers (batch + 1,): rows append_indptr[b] to append_indptr[b + 1] are new in sequence b.
        seq_lens: integers (batch,), tokens of each sequence with the new ones.
        nnz: how many rows there are: append_indptr[-1], or more.
        batch_indices, positions: int32 (nnz,) to write into.

    Returns:
        (batch_indices, positions), int32 (nnz,). Rows behind the last sequence have -1 and 0.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat import flashinfer
    >>> ends = np.array([0, 1, 3, 6], np.int32)
    >>> found = flashinfer.get_batch_indices_positions(ends, np.full(3, 5, np.int32), 6)
    >>> [array.tolist() for array in found]
    [[0, 1, 1, 2, 2, 2], [4, 3, 4, 2, 3, 4]]
    """
    ends = view(append_indptr, "append_indptr")
    library = library_of(ends, "append_indptr")
    index_view("append_indptr", append_indptr, ends.device, wide=True)
    lengths = index_view("seq_lens", seq_lens, ends.device, wide=True)
    check_int("nnz", nnz, 0)
    batch = ends.shape[0] - 1
    if batch < 0 or lengths.shape[0] != batch:
        refuse("seq_lens", f"{lengths.shape[0]} entries", f"{batch}, one fewer than append_indptr has")
    for name, target in (("batch_indices", batch_indices), ("positions", positions)):
        _check_target(name, target, nnz, library)
    with library.current():
        row = library.arange(nnz, ends.dtype)
        if batch:
            first = library.here(seq_lens, "seq_lens") - append_indptr[1:]
            owner, inside = owners(library, append_indptr, row)
            place = library.cast(library.xp.where(inside, row + first[owner], 0), "int32")
            owner = library.cast(library.xp.where(inside, owner, -1), "int32")
        else:
            row = library.cast(row, "int32")
            owner, place = row * 0 - 1, row * 0
        return _put(owner, batch_indices), _put(place, positions)


def owners(library: Library, starts: Array, rows: Array) -> tuple[Array, Array]:
    """(which sequence each of rows (n,) is in, whether it is in any) for starts (batch + 1,) with a batch."""
    found = library.xp.searchsorted(starts, rows, side="right") - 1
    batch = starts.shape[0] - 1
    return found.clip(0, max(batch - 1, 0)), found < batch


def _check_target(name: str, target: Array | None, nnz: int, library: Library) -> None:
    if target is None:
        return
    found = view(target, name)
    if (found.shape, found.dtype) != ((nnz,), "int32"):
        refuse(name, f"{found.dtype} of shape {found.shape}", f"int32 of shape {(nnz,)}")
    if (found.library, found.device) != (library.name, library.device):
        refuse(name, f"a {found.library} array on {device_name(found.device)}", "an array beside append_indptr")


def _put(values: Array, target: Array | None) -> Array:
    if target is None:
        return values
    target[...] = values
    return target


def get_seq_lens(kv_indptr: Array, kv_last_page_len: Array, page_size: int) -> Array:
    """Tokens of each sequence, int32 (batch,), by its pages. Nothing waits for the device.

    Args:
        kv_indptr: integers (batch + 1,) of the page table.
        kv_last_page_len: integers (batch,), 1 to page_size; 0 for a sequence without pages.
        page_size: 1 to 512.

    >>> import numpy as np
    >>> from cupyattn.compat import flashinfer
    >>> flashinfer.get_seq_lens(np.array([0, 3, 3, 4], np.int32), np.array([5, 0, 16], np.int32), 16).tolist()
    [37, 0, 16]
    """
    ends = view(kv_indptr, "kv_indptr")
    index_view("kv_indptr", kv_indptr, ends.device, wide=True)
    last = index_view("kv_last_page_len", kv_last_page_len, ends.device, wide=True)
    check_int("page_size", page_size, 1, MAX_PAGE_SIZE)
    if last.shape[0] != ends.shape[0] - 1:
        expected = f"{ends.shape[0] - 1}, one fewer than kv_indptr has"
        refuse("kv_last_page_len", f"{last.shape[0]} entries", expected)
    library = library_of(ends, "kv_indptr")
    with library.current():
        full = (kv_indptr[1:] - kv_indptr[:-1] - 1).clip(0, None)
        return library.cast(full * page_size + library.here(kv_last_page_len, "kv_last_page_len"), "int32")


def append_paged_kv_cache(
    append_key: Array,
    append_value: Array,
    batch_indices: Array,
    positions: Array,
    paged_kv_cache: Array | tuple[Array, Array],
    kv_indices: Array,
    kv_indptr: Array,
    kv_last_page_len: Array,
    kv_layout: str = "NHD",
) -> None:
    """Write packed keys and values into the pages of their sequences, **in place**.

    Index arrays lie beside the cache. Their contents are checked on the CPU, and on CUDA where CUPYATTN_CHECK=1 asks
    for it, which waits for the device; unchecked, rows whose place does not exist are not written.

    Args:
        append_key, append_value: (nnz, num_kv_heads, head_dim): of the cache's dtype; or for an FP8 cache of a library
            that has the dtype, of any, rounded to nearest even.
        batch_indices, positions: integers (nnz,), which sequence, and which of its tokens, each row is, as
            `get_batch_indices_positions` gives them. Rows of sequence -1 are passed over.
        paged_kv_cache: (k_cache, v_cache), each (num_pages, page_size, num_kv_heads, head_dim) for "NHD", (num_pages,
            num_kv_heads, page_size, head_dim) for "HND"; or one array with an axis of two behind the first.
        kv_indices, kv_indptr, kv_last_page_len: integers, the pages of all sequences, the new rows included.
        kv_layout: "NHD" or "HND".

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat import flashinfer
    >>> cache = np.zeros((9, 2, 16, 2, 64), np.float16)
    >>> k = v = np.ones((3, 2, 64), np.float16)
    >>> rows = np.zeros(3, np.int32), np.array([15, 16, 17], np.int32)  # of sequence 0, in its pages 4 and 7
    >>> pages = np.array([4, 7], np.int32), np.array([0, 2], np.int32), np.array([2], np.int32)
    >>> flashinfer.append_paged_kv_cache(k, v, *rows, cache, *pages)
    >>> float(cache[4, 0, 15, 0, 0]), float(cache[7, 1, :, 1, 5].sum())
    (1.0, 2.0)
    """
    check_choice("kv_layout", kv_layout, LAYOUTS)
    k_cache, v_cache = split_cache(paged_kv_cache, kv_layout)
    cache = view(k_cache, "paged_kv_cache")
    library = library_of(cache, "paged_kv_cache")
    page_size = cache.shape[1 if kv_layout == "NHD" else 2]
    rows = _rows(append_key, append_value, cache, kv_layout)
    _check_rows_of(batch_indices, positions, rows, cache.device)
    names = APPEND_NAMES.indptr, APPEND_NAMES.indices, APPEND_NAMES.last_page_len, "batch_indices", "positions"
    given = kv_indptr, kv_indices, kv_last_page_len, batch_indices, positions
    with library.current():
        narrow = [_narrow(library, *one) for one in zip(names, given, strict=True)]
    kv_indptr, kv_indices, kv_last_page_len, batch_indices, positions = narrow
    if checking(None, cache.device):
        table = kv_indptr, kv_indices, kv_last_page_len
        _check_places(batch_indices, positions, table, page_size, cache)
    index = kv_indptr, kv_indices, batch_indices, positions
    if cache.device < 0:
        keep = np.flatnonzero(host_array(view(batch_indices)) >= 0)
        chosen = library.asarray(keep)
        append_key, append_value = append_key[chosen], append_value[chosen]
        index = kv_indptr, kv_indices, batch_indices[chosen], positions[chosen]
    scales = {"k_scale": 1.0, "v_scale": 1.0} if cache.dtype in FP8_DTYPES else {}
    with library.current():
        page, row = _places(library, *index, page_size)
        if rows.dtype in FP8_DTYPES:  # exact in float16, and rounded to itself
            append_key, append_value = (library.cast(x, "float16") for x in (append_key, append_value))
        new = append_key[:, None], append_value[:, None]
        append_kv(k_cache, v_cache, *new, cache_seqlens=row, block_table=page[:, None], layout=kv_layout, **scales)


def _rows(append_key: Array, append_value: Array, cache: View, layout: str) -> View:
    """The view of append_key, where the two are as the cache is; append_kv looks at the rest."""
    heads, other = (cache.shape[2], cache.shape[1]) if layout == "NHD" else (cache.shape[1], cache.shape[2])
    rows, values = view(append_key, "append_key"), view(append_value, "append_value")
    for name, found in (("append_key", rows), ("append_value", values)):
        if len(found.shape) != 3:
            refuse(name, f"shape {found.shape}", "(nnz, num_kv_heads, head_dim)")
        if found.shape[1] != heads:
            turned = f"; this would be kv_layout={'HND' if layout == 'NHD' else 'NHD'!r}"
            hint = turned if found.shape[1] == other else ""
            expected = f"{heads}, as paged_kv_cache of shape {cache.shape} has for kv_layout={layout!r}{hint}"
            refuse(name, f"{found.shape[1]} heads", expected)
        if (found.library, found.device) != (cache.library, cache.device):
            refuse(name, f"a {found.library} array on {device_name(found.device)}", "an array beside paged_kv_cache")
        fits = (*FLOAT_DTYPES, cache.dtype) if cache.dtype in FP8_DTYPES else (cache.dtype,)
        if found.dtype not in fits:
            refuse(name, found.dtype, f"{' or '.join(dict.fromkeys(fits))}, as paged_kv_cache is", TypeError)
        if found.dtype == "uint8":
            expected = "float16 rows through cupyattn.append_kv, which is told what the bytes mean"
            refuse(name, "uint8 bytes", expected, TypeError)
    if values.shape[:2] != rows.shape[:2]:
        refuse("append_value", f"shape {values.shape}", f"append_key's {rows.shape}, but for head_dim")
    return rows


def _narrow(library: Library, name: str, array: Array) -> Array:
    """An index array as int32."""
    return (
        library.cast(array, "int32") if index_view(name, array, library.device, wide=True).dtype != "int32" else array
    )


def _check_rows_of(batch_indices: Array, positions: Array, rows: View, device: int) -> None:
    for name, array in (("batch_indices", batch_indices), ("positions", positions)):
        found = index_view(name, array, device, wide=True)
        if found.shape != rows.shape[:1]:
            refuse(name, f"{found.shape[0]} entries", f"{rows.shape[0]}, one for each row of append_key")
        if found.device != device:
            refuse(name, f"an array on {device_name(found.device)}", f"one on {device_name(device)}")


def _check_places(
    batch_indices: Array, positions: Array, table: tuple[Array, Array, Array], page_size: int, cache: View
) -> None:
    """Refuse rows whose sequence, position or page does not exist, by what the arrays hold."""
    pages = read_pages(*table, page_size, cache.device, APPEND_NAMES)
    pages.check_ids(cache.shape[0])
    owner, place = (host_array(view(array)).astype(np.int64) for array in (batch_indices, positions))
    wrong = (owner < -1) | (owner >= pages.batch)
    if wrong.any():
        at = int(np.argmax(wrong))
        refuse("batch_indices", f"{int(owner[at])} at [{at}]", f"0 to {pages.batch - 1}, or -1 to pass a row over")
    if not pages.batch:
        return
    wrong = (owner >= 0) & ((place < 0) | (place >= pages.lengths[owner]))
    if wrong.any():
        at = int(np.argmax(wrong))
        length = int(pages.lengths[owner[at]])
        expected = f"0 to {length - 1}: sequence {int(owner[at])} has {length} tokens, the new ones included"
        refuse("positions", f"{int(place[at])} at [{at}]", expected)


def _places(
    library: Library, indptr: Array, indices: Array, owner: Array, place: Array, page_size: int
) -> tuple[Array, Array]:
    """(page, row in it) of each new row, int32 (nnz,); the page is -1 where the sequence is."""
    if not indices.shape[0] or indptr.shape[0] < 2:
        return library.zeros(tuple(owner.shape), "int32") - 1, place % page_size
    entry = indptr[owner.clip(0, None)] + place // page_size
    page = indices[entry.clip(0, indices.shape[0] - 1)]
    return library.cast(library.xp.where(owner < 0, -1, page), "int32"), library.cast(place % page_size, "int32")
