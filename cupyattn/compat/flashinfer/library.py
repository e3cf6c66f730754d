"""The few operations that NumPy, CuPy and PyTorch spell differently. None is imported before its arrays come."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from ...arrays import (
    View,
    current_device,
    device_name,
    host_array,
    numpy_dtype,
    on_device,
    refuse,
    torch_stream,
    view,
)
from ...streams import device_of

Array = Any  # an array of NumPy, CuPy or PyTorch


class Library:
    """One library's arrays on one device. `xp` is its module, for what all three spell alike."""

    __slots__ = ("name", "device", "xp", "_torch_device")

    def __init__(self, name: str, device: int) -> None:
        self.name, self.device = name, device
        self.xp: ModuleType = sys.modules[name]
        self._torch_device = self.xp.device("cpu" if device < 0 else f"cuda:{device}") if name == "torch" else None

    def asarray(self, host: np.ndarray) -> Array:
        """The numbers of a NumPy array, here; on the CPU it may be the same memory."""
        host = np.ascontiguousarray(host)
        if self.device < 0:
            return self.xp.from_numpy(host) if self.name == "torch" else host
        made = self.empty(host.shape, host.dtype.name)
        self.write(made, host)
        return made

    def write(self, target: Array, host: np.ndarray) -> None:
        """Write the numbers of a contiguous NumPy array into a contiguous one here, of that shape and dtype."""
        found = view(target)
        if self.device < 0:
            host_array(found)[...] = host
        else:
            with device_of(found):
                self.send(host.ctypes.data, found.pointer, host.nbytes)

    def send(self, host: int, target: int, size: int) -> None:
        """Copy so many bytes of the host's to a device address, in the order of the current stream.

        The host's memory is its owner's again when this returns, which the libraries' own ways to copy wait for the
        device for. The device is the current one.
        """
        if size:
            runtime = cuda_runtime()
            runtime.memcpyAsync(target, host, size, runtime.memcpyHostToDevice, self.stream)

    @property
    def stream(self) -> int:
        """The raw stream that this library works on now, on this device, which is the current one."""
        return torch_stream(self.device) if self.name == "torch" else self.xp.cuda.get_current_stream().ptr

    def current(self) -> AbstractContextManager:
        """A context in which CuPy works on this device. PyTorch goes by its operands."""
        return on_device(self.device) if self.name == "cupy" and current_device() != self.device else nullcontext()

    def here(self, array: Array, argument: str) -> Array:
        """The array itself if it is one of these, or a copy of one on the host; refuses others."""
        found = view(array, argument)
        if (found.library, found.device) == (self.name, self.device):
            return array
        if found.device >= 0:
            got, expected = device_name(found.device), f"{self.name} on {device_name(self.device)}, or one on the host"
            refuse(argument, f"a {found.library} array on {got}", f"one of {expected}")
        return self.asarray(host_array(found))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        if self.name == "torch":
            return self.xp.empty(shape, dtype=getattr(self.xp, dtype), device=self._torch_device)
        with self.current():
            return self.xp.ndarray(shape, numpy_dtype(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        made = self.empty(shape, dtype)
        made[...] = 0
        return made

    def arange(self, stop: int, dtype: str) -> Array:
        if self.name == "torch":
            return self.xp.arange(stop, dtype=getattr(self.xp, dtype), device=self._torch_device)
        with self.current():
            return self.xp.arange(stop, dtype=dtype)

    def cast(self, array: Array, dtype: str) -> Array:
        """The array itself where it has that dtype."""
        if self.name == "torch":
            return array.to(getattr(self.xp, dtype))
        return array.astype(numpy_dtype(dtype), copy=False)

    def contiguous(self, array: Array) -> Array:
        """The array itself if it is C-contiguous, else a copy that is."""
        return array.contiguous() if self.name == "torch" else self.xp.ascontiguousarray(array)

    def as_strided(self, array: Array, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
        """The same memory in another shape. Strides count elements."""
        if self.name == "torch":
            return self.xp.as_strided(array, shape, strides, array.storage_offset())
        steps = tuple([step * array.itemsize for step in strides])
        return self.xp.lib.stride_tricks.as_strided(array, shape, steps)


@cache
def cuda_runtime() -> ModuleType:
    """CuPy's calls of the CUDA runtime."""
    import cupy

    return cupy.cuda.runtime


@lru_cache(maxsize=64)
def _library(name: str, device: int) -> Library:
    return Library(name, device)


def library_of(found: View, argument: str) -> Library:
    """The library of an argument's view; refuses what is neither of the three."""
    if found.library not in ("numpy", "cupy", "torch"):
        refuse(argument, f"a {found.library} array", "an array of NumPy, CuPy or PyTorch", TypeError)
    return _library(found.library, found.device)


def library_at(array: Array, argument: str) -> Library:
    """The same of the argument itself."""
    return library_of(view(array, argument), argument)


def on_host(array: Array, argument: str) -> np.ndarray:
    """A NumPy array of the same numbers; waits for the device if it is on one."""
    return host_array(view(array, argument))
