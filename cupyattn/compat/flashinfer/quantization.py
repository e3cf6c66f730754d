"""Packing of masks into bits, under FlashInfer's names."""

from __future__ import annotations

import numpy as np

from ...arrays import refuse, view
from .arguments import check_choice
from .library import Array, Library, library_of, on_host
from .pages import check_starts

_BIT_ORDERS = ("big", "little")


def packbits(x: Array, bitorder: str = "big") -> Array:
    """Eight elements to a byte, as numpy.packbits does; the last byte is filled up with zeros.

    Args:
        x: (n,), bool or numbers; what is not 0 is a 1.
        bitorder: "big" for the first element in the highest bit, "little" for the lowest.

    Returns:
        uint8 ((n + 7) // 8,), in x's library.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat import flashinfer
    >>> flashinfer.packbits(np.array([1, 0, 1, 1, 0, 0, 1, 1, 1], bool)).tolist()
    [179, 128]
    """
    library = _check(x, bitorder)
    count = x.shape[0]
    with library.current():
        return _packed(library, x, library.arange(count, "int64"), -(-count // 8), bitorder)


def segment_packbits(x: Array, indptr: Array, bitorder: str = "big") -> tuple[Array, Array]:
    """`packbits` of each segment by itself, so that every one begins a new byte. Waits for the device, for indptr.

    Args:
        x: (indptr[-1],), bool or numbers.
        indptr: integers (batch + 1,), starting at 0: x[indptr[i] : indptr[i + 1]] is segment i.
        bitorder: as in `packbits`.

    Returns:
        (y, new_indptr): uint8 (new_indptr[-1],), where y[new_indptr[i] : new_indptr[i + 1]] is segment i; and int32
        (batch + 1,).

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn.compat import flashinfer
    >>> packed, ends = flashinfer.segment_packbits(np.ones(11, bool), np.array([0, 4, 11], np.int32))
    >>> packed.tolist(), ends.tolist()
    ([240, 254], [0, 1, 2])
    """
    library = _check(x, bitorder)
    starts = on_host(indptr, "indptr")
    if starts.ndim != 1 or starts.dtype.kind not in "iu":
        refuse("indptr", f"{starts.dtype} of shape {starts.shape}", "integers (batch + 1,)", TypeError)
    starts = starts.astype(np.int64)
    counts = check_starts("indptr", starts, x.shape[0], f"x has {x.shape[0]} elements")
    if starts[-1] != x.shape[0]:
        refuse("indptr", f"{int(starts[-1])} as its last entry", f"{x.shape[0]}, the elements of x")
    ends = np.concatenate([[0], np.cumsum(-(-counts // 8))])
    places = np.arange(starts[-1]) + np.repeat(8 * ends[:-1] - starts[:-1], counts)
    with library.current():
        packed = _packed(library, x, library.asarray(places), int(ends[-1]), bitorder)
        return packed, library.asarray(ends.astype(np.int32))


def _check(x: Array, bitorder: str) -> Library:
    check_choice("bitorder", bitorder, _BIT_ORDERS)
    found = view(x, "x")
    if len(found.shape) != 1:
        refuse("x", f"shape {found.shape}", "1-D: pass x.reshape(-1)")
    return library_of(found, "x")


def _packed(library: Library, x: Array, places: Array, size: int, bitorder: str) -> Array:
    """uint8 (size,) whose bit places[i] is whether x[i] is not 0."""
    bits = library.zeros((8 * size,), "uint8")
    bits[places] = library.cast(x != 0, "uint8")
    weights = 1 << np.arange(8, dtype=np.uint8)
    weights = library.asarray(weights if bitorder == "little" else weights[::-1].copy())
    return library.cast((bits.reshape(-1, 8) * weights).sum(1), "uint8")
