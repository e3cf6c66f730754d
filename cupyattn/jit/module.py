"""Compiled kernels, loaded: one `Kernel` for each function, device and shared-memory need, kept for the process.

The compiler and the disk cache are imported by the first load, so that importing the library stays quick.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import cupy

    from . import cache, compile


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded __global__ function. Launch it while its device is current: CuPy binds a launch to that one."""

    function: cupy.RawKernel
    meta: dict  # as in cache.Entry


_kernels: dict[tuple, Kernel] = {}


def load(name: str, defines: compile.Defines, arch: str, function: str, device: int, shared_bytes: int = 0) -> Kernel:
    """The kernel `function` of file `name`, compiled for `arch` if need be and loaded on `device`.

    `shared_bytes` of dynamic shared memory are allowed to its launches. Raises what `cache.fetch` raises, and
    RuntimeError for a function that the file lacks or more shared memory than the device has.
    """
    key = (name, defines, arch, function, device, shared_bytes)
    kernel = _kernels.get(key)
    return kernel if kernel is not None else _kernels.setdefault(key, load_again(*key))


@functools.cache
def arch_of(device: int) -> str:
    """The architecture to compile for on this device: "90a" on an H100 or H200, "80" on an A100."""
    from . import compile

    return compile.target(_cupy().cuda.Device(device).compute_capability)


def load_again(
    name: str, defines: compile.Defines, arch: str, function: str, device: int, shared_bytes: int = 0
) -> Kernel:
    """`load` from the disk cache or the compiler, whatever this process holds already."""
    cp = _cupy()
    with cp.cuda.Device(device) as current:
        entry, raw = _open(name, defines, arch, function)
        if shared_bytes > raw.max_dynamic_shared_size_bytes:  # never lowered: all who load the function share it
            try:
                raw.max_dynamic_shared_size_bytes = shared_bytes
            except cp.cuda.driver.CUDADriverError as error:
                most = current.attributes["MaxSharedMemoryPerBlockOptin"] - entry.meta["shared_bytes"]
                came = f"{shared_bytes} bytes of dynamic shared memory"
                raise RuntimeError(f"kernel {name}: got {came}, expected at most {most} on cuda:{device}") from error
    return Kernel(raw, entry.meta)


def _open(name: str, defines: compile.Defines, arch: str, function: str) -> tuple[cache.Entry, cupy.RawKernel]:
    from . import cache

    cp = _cupy()
    while True:
        entry = cache.fetch(name, defines, arch)
        try:
            return entry, cp.RawModule(path=str(entry.path)).get_function(function)  # loads on the current device
        except cp.cuda.driver.CUDADriverError as error:
            if function not in entry.meta["functions"]:
                there = ", ".join(entry.meta["functions"])
                raise RuntimeError(f"kernel {name}: got function {function!r}, expected one of {there}") from error
            if entry.path.exists():
                raise  # else somebody cleared the cache between the two lines: once more


def _cupy():
    try:
        import cupy
    except ImportError as error:
        from .compile import INSTALL

        raise ImportError(f"GPU arrays need CuPy ({error}): {INSTALL[12]}") from error
    return cupy
