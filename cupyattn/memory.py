"""memory_trace: how much memory calls of this library take while they run, and how much they keep."""

from __future__ import annotations

import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from .arrays import refuse
from .kvcache.report import as_text, size

_PACKAGE = str(Path(__file__).parent) + "/"
ELSEWHERE = "elsewhere"


@dataclass(slots=True)
class CallMemory:
    """All calls of one function in a trace. Bytes."""

    name: str
    calls: int = 0
    peak: int = 0  # the most that one call had taken at one time beyond what there was before it
    kept: int = 0  # what all calls together left allocated; negative if they freed more


class memory_trace:
    """A context in which memory is watched: in all, and by call.

    A call is one of a function or method of cupyattn from outside of it. What is allocated between such calls is
    `elsewhere`. On a GPU it is CuPy's memory pools that are watched, through a hook of CuPy's, as the thread that
    enters uses them; memory of PyTorch and of CUDA itself is not seen. On the CPU it is what Python and NumPy
    allocate, as tracemalloc sees it, which makes Python a few times slower.

    Args:
        device: "cuda" or "cpu"; by default "cuda" where CuPy has a GPU.

    Attributes, final when the context is left:
        start, end, peak: bytes in use at the beginning and at the end, and the most at any time.
        calls: a CallMemory for each function that took any memory, the highest peak first.

    Raises ValueError if device is "cuda" and there is no GPU, or if another memory_trace or profiler is active.

    >>> import numpy as np
    >>> from cupyattn import attention, memory_trace
    >>> q = np.ones((1, 256, 4, 64), np.float32)
    >>> with memory_trace("cpu") as trace:
    ...     out = attention(q, q, q)
    >>> trace.calls[0].name, trace.calls[0].kept >= out.nbytes, trace.peak > trace.end
    ('attention', True, True)
    """

    def __init__(self, device: str | None = None) -> None:
        if device not in (None, "cpu", "cuda"):
            refuse("device", repr(device), "'cuda', 'cpu' or None")
        reason = "" if device == "cpu" else _why_no_gpu()
        if device == "cuda" and reason:
            refuse("device", "'cuda'", f"'cpu' here: {reason}")
        self.device = "cpu" if reason or device == "cpu" else "cuda"
        self.start = self.end = self.peak = 0
        self._found: dict[str, CallMemory] = {}

    def __enter__(self) -> memory_trace:
        if sys.getprofile() is not None:
            refuse("memory_trace", "a thread that is being profiled", "one trace or profiler at a time")
        self._meter = _TracedMeter() if self.device == "cpu" else _pool_meter()
        self._outer: FrameType | None = None
        self._name = ELSEWHERE
        self._meter.__enter__()
        self.start = self._before = self.peak = self._meter.take()[0]
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        self._account(0)
        self.end = self._before
        self._meter.__exit__(*error)

    @property
    def calls(self) -> list[CallMemory]:
        found = [one for one in self._found.values() if one.peak or one.kept]
        return sorted(found, key=lambda one: -one.peak)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, as JSON has them."""
        calls = [{name: getattr(one, name) for name in CallMemory.__slots__} for one in self.calls]
        return {"device": self.device, "start": self.start, "end": self.end, "peak": self.peak, "calls": calls}

    def __rich__(self) -> Any:
        from rich.table import Table

        title = f"memory on {self.device}: {size(self.start)} before, peak {size(self.peak)}, {size(self.end)} after"
        table = Table("call", title=title, title_justify="left")
        for column in ("calls", "peak of one", "kept by all"):
            table.add_column(column, justify="right")
        for one in self.calls:
            kept = f"-{size(-one.kept)}" if one.kept < 0 else size(one.kept)
            table.add_row(one.name, str(one.calls) if one.calls else "", size(one.peak), kept)
        return table

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def _event(self, frame: FrameType, event: str, argument: object) -> None:
        """Python tells of a call or a return, in this thread."""
        if event == "call" and self._outer is None:
            name = frame.f_code.co_filename
            if name.startswith(_PACKAGE) and name != __file__:  # this file's are those that measure
                self._account(0)
                self._outer, self._name = frame, _name_of(frame)
        elif event == "return" and frame is self._outer:
            self._account(1)
            self._outer, self._name = None, ELSEWHERE

    def _account(self, calls: int) -> None:
        """What happened since the last time belongs to the call of this name."""
        now, peak = self._meter.take()
        found = self._found.setdefault(self._name, CallMemory(self._name))
        found.calls += calls
        found.peak = max(found.peak, peak - self._before)
        found.kept += now - self._before
        self.peak = max(self.peak, peak)
        self._before = now


class _TracedMeter:
    """Memory of Python and NumPy. `take` gives the bytes in use, and the most since it was asked before."""

    def __enter__(self) -> None:
        self._running = tracemalloc.is_tracing()
        if not self._running:
            tracemalloc.start()

    def take(self) -> tuple[int, int]:
        found = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return found

    def __exit__(self, *error: object) -> None:
        if not self._running:
            tracemalloc.stop()


def _pool_meter() -> Any:
    """The same of CuPy's memory pools, beginning with what the current device's has in use."""
    import cupy

    class PoolMeter(cupy.cuda.MemoryHook):
        name = "cupyattn.memory_trace"

        def __enter__(self) -> None:
            self._used = self._peak = cupy.get_default_memory_pool().used_bytes()
            super().__enter__()

        def take(self) -> tuple[int, int]:
            found = self._used, self._peak
            self._peak = self._used
            return found

        def malloc_postprocess(self, **told: Any) -> None:
            self._used += told["mem_size"]
            self._peak = max(self._peak, self._used)

        def free_postprocess(self, **told: Any) -> None:
            self._used -= told["mem_size"]

    return PoolMeter()


def _why_no_gpu() -> str:
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "CuPy finds no CUDA device"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device ({error})"


def _name_of(frame: FrameType) -> str:
    """A function's name, or a method's behind that of its class."""
    code = frame.f_code
    if code.co_name == "__init__":
        return type(frame.f_locals["self"]).__name__
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    kind = owner if isinstance(owner, type) else type(owner)
    method = any(getattr(getattr(base, code.co_name, None), "__code__", None) is code for base in kind.__mro__)
    return f"{kind.__name__}.{code.co_name}" if method else code.co_name
