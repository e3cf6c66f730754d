"""How long a call takes on the GPU: what `explain(measure=True)` and `cupyattn bench` both report.

As Triton's do_bench times: the L2 cache is flushed before each call, CUDA events stand around it, the median counts.
The flush is a memset, whose last lines are still on their way to memory when the call begins; so it is for all calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any

FLUSH_BYTES = 256 << 20  # several times any chip's L2
WARMUP_MS, MEASURE_MS = 15.0, 60.0


class EventTimer:
    """Median milliseconds of a call with a cold L2, by CUDA events on CuPy's current stream."""

    def __init__(self, cupy: ModuleType) -> None:
        self.cuda = cupy.cuda
        self.flush = cupy.cuda.alloc(FLUSH_BYTES)

    def __call__(self, call: Callable[[], Any], warmup_ms: float = WARMUP_MS, measure_ms: float = MEASURE_MS) -> float:
        """Call as often as fits into so many milliseconds, flushes counted in."""
        call()
        pairs = self._times(call, 5)
        estimate = self.cuda.get_elapsed_time(pairs[0][0], pairs[-1][1]) / len(pairs)
        self._times(call, max(1, int(warmup_ms / estimate)))
        pairs = self._times(call, max(5, int(measure_ms / estimate)))
        return statistics.median(self.cuda.get_elapsed_time(start, stop) for start, stop in pairs)

    def _times(self, call: Callable[[], Any], count: int) -> list[tuple[Any, Any]]:
        pairs = [(self.cuda.Event(), self.cuda.Event()) for _ in range(count)]
        for start, stop in pairs:
            self.flush.memset_async(0, FLUSH_BYTES)
            start.record()
            call()
            stop.record()
        pairs[-1][1].synchronize()
        return pairs
