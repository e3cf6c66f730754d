"""Int32 arrays, of lengths and block ids, from the host to where a cache lies: `HostTransfer`, `DeviceTransfer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..arrays import View, contiguous_strides, on_device, refuse
from ..jit.compile import INSTALL
from ..kernels.launch import PreparedAppend, on_stream_of
from ..kernels.operands import AppendOperands
from ..plan import INLINE_CAPACITIES
from .allocator import count_of

Array = Any  # of NumPy or CuPy
Append = Callable[[AppendOperands, int], None]
Held = Callable[[View, View, int], None]


class HostTransfer:
    """Within NumPy. A stream is nothing here."""

    device = -1

    def current(self) -> AbstractContextManager[int]:
        """A context in which the device is the current one; gives the stream for work that follows no other array's."""
        return nullcontext(0)

    def following(self, like: View) -> AbstractContextManager:
        """A context in which what is sent is held until work on the stream of like's library has read it."""
        return nullcontext()

    def run(self, append: Append, operands: AppendOperands, packet: np.ndarray, stream: int) -> None:
        """append(operands, stream) with its index arrays from a packet: int32 cache_seqlens, block_table and, if the
        operands have it, cu_seqlens_new, one behind the other. Those of the operands give their shapes."""
        for found, start in _within(operands):
            found.array = packet[start : start + math.prod(found.shape)].reshape(found.shape)
        append(operands, stream)

    def hold(self, append: Append, operands: AppendOperands, packet: np.ndarray) -> tuple[np.ndarray, Held]:
        """(indices, launch): `launch(k, v, stream)` runs the same append again for other rows of the same form and for
        what is in `indices` then, at first the packet's numbers. Packet and operands are taken over."""
        return packet, _again(self, append, operands, packet)

    def send(self, host: np.ndarray, stream: int) -> np.ndarray:
        """A copy of an int32 array."""
        return host.copy()

    def write(self, array: np.ndarray, index: np.ndarray, values: np.ndarray, stream: int) -> None:
        """array.flat[index] = values, for a C-contiguous int32 array."""
        array.reshape(-1)[index] = values


@dataclass(slots=True)
class _Chunk:
    """Pinned memory that numbers leave for the device from, and an event behind the last that did."""

    room: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    left: Any = None


class DeviceTransfer:
    """To one device, without waiting for it unless sixteen arrays are on their way already."""

    def __init__(self, device: int) -> None:
        self.device = device
        self._chunks = [_Chunk() for _ in range(16)]
        self._next = 0

    def current(self) -> AbstractContextManager[int]:
        return _Current(self.device)

    def following(self, like: View) -> AbstractContextManager:
        return on_stream_of(like)

    def run(self, append: Append, operands: AppendOperands, packet: np.ndarray, stream: int) -> None:
        """As in `HostTransfer`. Short packets travel with the launch, long ones are sent before it."""
        if _travels(append, packet):
            append.inline(operands, packet, stream)
            return
        sent = self.send(packet, stream)
        for found, start in _within(operands):
            found.array, found.pointer = sent, sent.data.ptr + 4 * start
        append(operands, stream)

    def hold(self, append: Append, operands: AppendOperands, packet: np.ndarray) -> tuple[np.ndarray, Held]:
        """As in `HostTransfer`. A launch with which its packet travels keeps all its arguments."""
        if not _travels(append, packet):
            return packet, _again(self, append, operands, packet)
        from ..kernels.held_append import HeldAppend

        held = HeldAppend(append, operands, packet)
        return held.indices, held

    def send(self, host: np.ndarray, stream: int) -> Array:
        """A copy of host on the device, which is the current one, as `stream` is CuPy's current stream."""
        import cupy

        array = cupy.ndarray(host.shape, np.int32)
        if host.size:
            chunk = self._free_chunk(host.size)
            chunk.room[: host.size] = host.reshape(-1)
            runtime = cupy.cuda.runtime
            source = chunk.room.ctypes.data
            runtime.memcpyAsync(array.data.ptr, source, array.nbytes, runtime.memcpyHostToDevice, stream)
            runtime.eventRecord(chunk.left.ptr, stream)
        return array

    def write(self, array: Array, index: np.ndarray, values: np.ndarray, stream: int) -> None:
        from ..kernels.copy_rows import write_entries

        if len(index):
            sent = self.send(np.stack([index, values]), stream)
            first = sent.data.ptr
            write_entries(self.device, array.data.ptr, first, first + 4 * len(index), len(index), stream)

    def _free_chunk(self, size: int) -> _Chunk:
        import cupy
        import cupyx

        chunk = self._chunks[self._next]
        self._next = (self._next + 1) % len(self._chunks)
        if chunk.left is None:
            chunk.left = cupy.cuda.Event(disable_timing=True)
        else:
            chunk.left.synchronize()
        if len(chunk.room) < size:
            chunk.room = cupyx.empty_pinned(max(2 * size, 4096), np.int32)
        return chunk


class _Current:
    """A context in which a device is the current one, which gives CuPy's current stream there."""

    __slots__ = ("_device", "_inside")

    def __init__(self, device: int) -> None:
        self._device = device

    def __enter__(self) -> int:
        import cupy

        self._inside = on_device(self._device)
        self._inside.__enter__()
        return cupy.cuda.get_current_stream().ptr

    def __exit__(self, *error: object) -> None:
        self._inside.__exit__(*error)


def index_view(shape: tuple[int, ...], device: int) -> View:
    """An int32 array that is yet to be made."""
    return View(None, 0, shape, contiguous_strides(shape), "int32", device, "numpy" if device < 0 else "cupy", False)


def _travels(append: Append, packet: np.ndarray) -> bool:
    """Whether a packet fits the kernel's argument."""
    return len(packet) <= INLINE_CAPACITIES[-1] and isinstance(append, PreparedAppend)


def _again(
    transfer: HostTransfer | DeviceTransfer, append: Append, operands: AppendOperands, packet: np.ndarray
) -> Held:
    def launch(k: View, v: View, stream: int) -> None:
        with transfer.following(k):
            transfer.run(append, replace(operands, k=k, v=v), packet, stream)

    return launch


def _within(operands: AppendOperands) -> Iterator[tuple[View, int]]:
    """The index arrays of an append, and where each begins in a packet."""
    start = 0
    for found in (operands.cache_seqlens, operands.block_table, operands.cu_seqlens_new):
        if found is not None:
            yield found, start
            start += math.prod(found.shape)


def transfer_to(device: int | None) -> HostTransfer | DeviceTransfer:
    """To a device: None for NumPy, or the number of a CUDA device. Refuses what is neither."""
    if device is None:
        return HostTransfer()
    return DeviceTransfer(device_number(device))


def device_number(device: int) -> int:
    """The number of a CUDA device that exists."""
    device = count_of("device", device)
    try:
        import cupy
    except ImportError as error:
        install = f"{INSTALL[12]} (or for CUDA 13: {INSTALL[13]})"
        raise ImportError(f"device: got {device}, which needs CuPy: {install}; None is NumPy") from error
    try:
        present = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        refuse("device", device, f"None for NumPy: there is no CUDA device ({error})")
    if device >= present:
        refuse("device", device, f"None for NumPy, or 0 to {present - 1}")
    return device
