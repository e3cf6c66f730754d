"""The fastest plain read of a number of bytes: what decode, which reads every key and value once, is measured against.

For many bytes it is the memory's read-only stream, for few the floor that launch and latency set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np

from ..timing import EventTimer
from .bench_common import Call

VECTOR_BYTES = 16
BLOCKS_PER_SM, THREADS, UNROLLS = (1, 2, 4, 8, 16), (256, 512, 1024), (1, 2, 4, 8)
FEW_BYTES = 64 << 20  # with more to read, one or two loads in flight in each thread are too few
FINALISTS = 3

SOURCE = r"""
extern "C" __global__ void nothing() {}

// Read `vectors` vectors of 16 bytes once, UNROLL loads of a thread in flight together, `load_step` apart. What was
// read is written only if a thread's XOR of it is `wanted`, so that no load can be left out.
extern "C" __global__ void __launch_bounds__(1024)
read_all(const uint4* data, long long vectors, long long block_step, long long load_step, long long advance,
         unsigned wanted, unsigned* found) {
    uint4 sum = make_uint4(0, 0, 0, 0);
    long long at = blockIdx.x * block_step + threadIdx.x;
    for (; at + (UNROLL - 1) * load_step < vectors; at += advance) {
        uint4 loaded[UNROLL];
        #pragma unroll
        for (int i = 0; i < UNROLL; ++i) loaded[i] = data[at + i * load_step];
        #pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            sum.x ^= loaded[i].x;
            sum.y ^= loaded[i].y;
            sum.z ^= loaded[i].z;
            sum.w ^= loaded[i].w;
        }
    }
    for (; at < vectors; at += load_step) {  // fewer than UNROLL loads are left
        uint4 loaded = data[at];
        sum.x ^= loaded.x;
        sum.y ^= loaded.y;
        sum.z ^= loaded.z;
        sum.w ^= loaded.w;
    }
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == wanted) *found = 1;
}
"""


@dataclass(frozen=True, slots=True)
class Grid:
    """A way to launch `read_all`."""

    blocks: int
    threads: int
    unroll: int
    scattered: bool  # whether the loads of a thread are a whole grid apart, or one block

    @property
    def steps(self) -> tuple[int, int, int]:
        """Vectors between the blocks, between the loads of a thread, and between its rounds of loads."""
        all_threads = self.blocks * self.threads
        if self.scattered:
            return self.threads, all_threads, all_threads * self.unroll
        return self.threads * self.unroll, self.threads, all_threads * self.unroll


def grids(nbytes: int, sms: int) -> Iterator[Grid]:
    """Every grid that is tried; none has more blocks than there is work for."""
    seen = set()
    for per_sm, threads, unroll, scattered in product(BLOCKS_PER_SM, THREADS, UNROLLS, (False, True)):
        if unroll < 4 and nbytes > FEW_BYTES:
            continue
        useful = -(-nbytes // (VECTOR_BYTES * threads * unroll))
        grid = Grid(max(1, min(per_sm * sms, useful)), threads, unroll, scattered)
        if grid not in seen:
            seen.add(grid)
            yield grid


class Stream:
    """Reads of the first bytes of an array on the GPU."""

    def __init__(self, cupy: ModuleType, timer: EventTimer, data: Any) -> None:
        self.cupy, self.timer, self.data = cupy, timer, data
        modules = {unroll: cupy.RawModule(code=SOURCE, options=(f"-DUNROLL={unroll}",)) for unroll in UNROLLS}
        self.kernels = {unroll: module.get_function("read_all") for unroll, module in modules.items()}
        self.nothing = modules[UNROLLS[0]].get_function("nothing")
        self.sms = cupy.cuda.Device().attributes["MultiProcessorCount"]
        self.found = cupy.zeros(1, np.uint32)
        self.fastest: dict[int, Grid] = {}

    def read(self, nbytes: int, grid: Grid, wanted: int = 0x9E3779B9) -> Call:
        """A call that reads so many bytes; it sets `found` if the XOR of what some thread read is `wanted`."""
        kernel = self.kernels[grid.unroll]
        steps = [np.int64(step) for step in grid.steps]
        arguments = (self.data, np.int64(nbytes // VECTOR_BYTES), *steps, np.uint32(wanted), self.found)
        return lambda: kernel((grid.blocks,), (grid.threads,), arguments)

    def best(self, nbytes: int) -> Call:
        """The call that reads so many bytes in the least time, found out once for each number of bytes."""
        if nbytes not in self.fastest:
            quick = {
                grid: self.timer(self.read(nbytes, grid), warmup_ms=1.0, measure_ms=4.0)
                for grid in grids(nbytes, self.sms)
            }
            finalists = sorted(quick, key=quick.get)[:FINALISTS]
            self.fastest[nbytes] = min(finalists, key=lambda grid: self.timer(self.read(nbytes, grid)))
        return self.read(nbytes, self.fastest[nbytes])

    def empty_launch_ms(self) -> float:
        """What a kernel takes that does nothing, one block on each multiprocessor."""
        return self.timer(lambda: self.nothing((self.sms,), (256,), ()))

    def as_record(self, nbytes: int) -> dict[str, Any]:
        """The grid that was fastest, ready for JSON."""
        return asdict(self.fastest[nbytes])
