"""The CUDA driver's own library, for the few calls that CuPy does not offer."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


@functools.cache
def driver() -> Any:
    """libcuda, whose functions return 0 or an error."""
    return ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "WinDLL") else "libcuda.so.1")
