"""Where a cache lies: an array library and device from what a caller names, and host numbers put beside arrays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import View, empty, host_array, numpy_dtype, on_device, refuse, view
from ..streams import device_of

Array = Any  # an array of NumPy, CuPy, PyTorch, JAX, or of any library that speaks DLPack

DEVICES = "'cpu', 'cuda', 'cuda:N', a torch.device or a cupy.cuda.Device"


def allocate(like: View, shape: tuple[int, ...], dtype: str) -> Array:
    """A new array, not initialised, in like's library and on its device; beside JAX arrays NumPy's or CuPy's."""
    with device_of(like):
        return empty(like, shape, dtype).array


def prototype(dtype: Any, device: Any) -> View:
    """An array of no elements, of the library, dtype and device that these two name.

    A torch dtype or a torch.device means PyTorch; any other dtype CuPy on a CUDA device and NumPy on the CPU.

    Raises TypeError or ValueError for what is neither a dtype nor a device.
    """
    name = dtype_name(dtype)
    if "torch" in (_root(dtype), _root(device)):
        torch = sys.modules["torch"]
        return view(torch.empty(0, dtype=getattr(torch, name), device=_text(device)), "device")
    kind, _, index = _text(device).partition(":")
    if kind == "cpu" and not index:
        return view(np.empty(0, numpy_dtype(name)), "device")
    if kind != "cuda" or not (index.isdigit() or not index):
        refuse("device", repr(device), DEVICES)
    import cupy

    with on_device(int(index)) if index else cupy.cuda.Device():
        return view(cupy.empty(0, numpy_dtype(name)), "device")


def dtype_name(dtype: Any) -> str:
    """NumPy's name of a dtype that came as a name, as NumPy's, JAX's or PyTorch's own. Raises TypeError."""
    if _root(dtype) == "torch":
        return str(dtype).removeprefix("torch.")
    try:
        return numpy_dtype(dtype).name if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        refuse("dtype", repr(dtype), "a dtype of NumPy or PyTorch, or its name", TypeError)


def put(host: np.ndarray, like: View) -> Array:
    """A host array in like's library and on its device, without waiting for the device. NumPy's beside JAX arrays."""
    if like.library == "torch":
        return sys.modules["torch"].from_numpy(host).to(like.array.device, non_blocking=True)
    if like.device < 0:
        return host
    import cupy

    with device_of(like):
        return cupy.asarray(host)


def bits(array: Array) -> Array:
    """The same memory as integers: what libraries cannot index in bfloat16 or FP8, they can in these."""
    if _root(array) == "torch":
        torch = sys.modules["torch"]
        return array.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[array.element_size()])
    return array.view(f"u{array.dtype.itemsize}")


def take(array: Array, index: tuple[Array, ...]) -> Array:
    """array[index] for index arrays, a copy, of any dtype."""
    return bits(array)[index].view(array.dtype)


def host_integers(name: str, numbers: Array | Sequence[int]) -> np.ndarray:
    """A list or an array of integers as int64 (n,) on the host; one on a device is waited for.

    Raises TypeError for other numbers, ValueError for another shape.
    """
    numbers = np.asarray(numbers) if isinstance(numbers, (list, tuple, range)) else host_array(view(numbers, name))
    if numbers.ndim != 1:
        refuse(name, f"{numbers.ndim}-D shape {numbers.shape}", "1-D, one for each sequence")
    if numbers.dtype.kind not in "iu" and numbers.size:
        refuse(name, numbers.dtype, "integers", TypeError)
    return numbers.astype(np.int64)


def _root(thing: Any) -> str:
    return type(thing).__module__.partition(".")[0]


def _text(device: Any) -> str:
    """A device's name: "cpu", "cuda" or "cuda:0"."""
    if isinstance(device, str):
        return device
    if _root(device) == "torch":
        return str(device)
    if _root(device) == "cupy" and hasattr(device, "id"):
        return f"cuda:{device.id}"
    refuse("device", repr(device), DEVICES, TypeError)
