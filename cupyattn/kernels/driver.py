"""The CUDA driver's own library, for the few calls that CuPy does not offer; streams of other libraries for CuPy."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cupy


@functools.cache
def driver() -> Any:
    """libcuda, whose functions return 0 or an error."""
    return ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")


class _Foreign:
    """A stream of another library, by the protocol that CuPy asks for."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.lru_cache(maxsize=256)
def stream_object(pointer: int, device: int) -> cupy.cuda.Stream:
    """CuPy's object for a stream of the current device, which is `device`."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14.1
        return cupy.cuda.Stream.from_external(_Foreign(pointer))
    return cupy.cuda.ExternalStream(pointer)
