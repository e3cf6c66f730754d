"""The log-sum-exp as FlashInfer has it: to base 2, rows before heads. In this library heads come before rows."""

from __future__ import annotations

import math

import numpy as np

from ...arrays import device_name, refuse, view
from .library import Array, Library

LOG2E = 1 / math.log(2)
LN2 = math.log(2)


def scaled(library: Library, lse: Array, factor: float) -> Array:
    """lse times factor, float32, in a new contiguous array."""
    target = library.empty(tuple(lse.shape), "float32")
    library.xp.multiply(lse, factor, out=target)
    return target


def lse_form(base: str) -> bool | str:
    """The return_lse of this library's functions for an lse to base "log2" or "ln"."""
    return "log2" if base == "log2" else True


def unit(form: bool | str) -> float:
    """What a natural logarithm is in this form of the lse."""
    return LOG2E if form == "log2" else 1.0


def deliver_lse(library: Library, lse: Array, layout: str, target: Array | None, shift: Array | None) -> Array:
    """An lse (rows, heads) in the layout that was asked for, contiguous.

    Args:
        library: of the arrays.
        lse: float32 (rows, heads), any strides; nobody else's, so that it may be what is returned.
        layout: "NH" for (rows, heads), "HN" for (heads, rows).
        target: an array of that shape to write into, or None.
        shift: float32 (rows, heads) to be added, or None.
    """
    if layout == "HN":
        lse, shift = lse.T, None if shift is None else shift.T
    if target is None and shift is None:
        return library.contiguous(lse)
    if target is None:
        target = library.empty(tuple(lse.shape), "float32")
    if shift is None:
        target[...] = lse
    else:
        library.xp.add(lse, shift, out=target)
    return target


def check_target(lse: Array, shape: tuple[int, int], library: Library) -> None:
    """Refuse an lse to write into that is not float32 of that shape beside the arrays."""
    found = view(lse, "lse")
    if found.shape != shape:
        refuse("lse", f"shape {found.shape}", shape)
    if found.dtype != "float32":
        refuse("lse", found.dtype, "float32", TypeError)
    if (found.library, found.device) != (library.name, library.device):
        got = f"a {found.library} array on {device_name(found.device)}"
        refuse("lse", got, f"one of {library.name} on {device_name(library.device)}")


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes, float32 (heads,), by the rule of its paper (Press, Smith and Lewis 2021, arXiv:2108.12409).

    A geometric sequence for the largest power of two among the heads, and every other number of the next finer one for
    the rest.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    rest = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([slopes, rest]).astype(np.float32)
