"""Memory that launches leave sums and counters in: one piece for each stream, whose launches never overlap.

A workspace starts with counters that are zero between launches: each launch leaves them so. One that a CUDA graph has
captured is kept for good, because the graph may be replayed at any time; it is the capture's own, so that a replay
never meets an eager call of the stream that it was captured on. Replays of one captured graph share it: they must
follow one another, as a graph's replays on its own buffers must anyway.

Other memory that a launch needs for itself is kept in the same way where a graph has captured it.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

from .driver import driver

_CAPTURING = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PER_THREAD = 2  # cudaStreamPerThread


class Workspace:
    """`size` zeroed bytes on a device. `pointer` is their address."""

    __slots__ = ("pointer", "size", "_memory")

    def __init__(self, device: int, size: int) -> None:
        import cupy

        self.size = size
        with cupy.cuda.Device(device), outside_capture():
            # Not from the pool, whose free memory work queued on the current stream may still be writing.
            self._memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
            stream = cupy.cuda.Stream(non_blocking=True)
            self._memory.memset_async(0, size, stream)
            stream.synchronize()
        self.pointer = self._memory.ptr


_held: dict[tuple[int, int, str, int], Workspace] = {}
_kept: list[Any] = []  # outgrown workspaces and other memory that launches and graphs may still use
_lock = threading.Lock()


def workspace(device: int, stream: int, size: int) -> Workspace:
    """The workspace of a stream of the current device, of at least `size` bytes."""
    key = (device, stream, *_identity(stream))
    found = _held.get(key)
    if found is not None and found.size >= size:
        return found
    with _lock:
        found = _held.get(key)
        if found is None or found.size < size:
            if found is not None:
                _kept.append(found)
            _held[key] = found = Workspace(device, size if found is None else max(size, 2 * found.size))
    return found


def _identity(stream: int) -> tuple[str, int]:
    """What, beside its handle, tells a stream from all others, or one capture of it from the next.

    A handle may be that of a stream that was destroyed while at work, and the per-thread default stream's means
    another stream in each thread. A captured stream may not be asked for its number.
    """
    if stream == 0:
        return "default", 0
    if capture := _capture_id(stream):
        return "capture", capture
    if stream == _PER_THREAD:
        return "thread", threading.get_ident()
    number = ctypes.c_uint64()
    error = driver().cuStreamGetId(ctypes.c_void_p(stream), ctypes.byref(number))
    if error:
        raise RuntimeError(f"stream: got one that the driver does not know (cuStreamGetId: {error})")
    return "stream", number.value


@functools.cache
def _is_capturing() -> Any:
    import cupy

    return cupy.cuda.runtime.streamIsCapturing


def keep_if_captured(memory: Any, stream: int) -> bool:
    """Keep memory that work on `stream` uses for good if that is being captured. Says whether it is."""
    captured = is_captured(stream)
    if captured:
        _kept.append(memory)
    return captured


def is_captured(stream: int) -> bool:
    """Whether a stream of the current device is being captured. The default stream cannot be."""
    return bool(stream) and _is_capturing()(stream)


def _capture_id(stream: int) -> int:
    """Which capture a stream takes part in; 0 for none."""
    if not is_captured(stream):
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if error or status.value != _CAPTURING:
        raise RuntimeError(
            f"a stream capture that is no longer valid (cuStreamGetCaptureInfo: {error}, {status.value})"
        )
    return number.value


class outside_capture:
    """A context in which this thread may allocate and wait although a stream is being captured."""

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(_RELAXED)
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))

    def __exit__(self, *error: object) -> None:
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))
