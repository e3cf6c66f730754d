"""Tensor maps: what Hopper's copy engine must know of an array. Encoded by the driver, 128 bytes each.

Source: CUDA driver API, cuTensorMapEncodeTiled. That costs a call into the driver for each, so launchers keep theirs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from .driver import driver

MAP_BYTES = 128
BLOCK_COLUMNS = 64  # 16-bit elements in the 128 bytes that the swizzle spans
_DTYPES = {"float16": 6, "bfloat16": 9}
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_L2_256B, _FILL_WITH_ZEROS = 0, 3, 3, 0


def encode(pointer: int, dtype: str, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """The map of an array of 16-bit elements, innermost axis first, whose stride of 1 is not given.

    strides: in elements, of the other axes. box: how many elements of each axis one copy moves; the innermost axis is
    always cut into blocks of `BLOCK_COLUMNS`. RuntimeError for what the copy engine cannot do.
    """
    rank = len(shape)
    # The step along an axis of one element is never taken, but must pass for one.
    steps = [2 * step if size > 1 else 2 * BLOCK_COLUMNS for size, step in zip(shape[1:], strides, strict=True)]
    room = ctypes.create_string_buffer(MAP_BYTES + 64)
    place = -(-ctypes.addressof(room) // 64) * 64  # the driver wants the map aligned
    error = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        _DTYPES[dtype],
        rank,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*steps),
        (ctypes.c_uint32 * rank)(BLOCK_COLUMNS, *box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _PROMOTE_L2_256B,
        _FILL_WITH_ZEROS,
    )
    if error:
        raise RuntimeError(
            f"cuTensorMapEncodeTiled: error {error} for shape {tuple(shape)}, steps of {steps} bytes, box {tuple(box)}"
        )
    return ctypes.string_at(place, MAP_BYTES)
