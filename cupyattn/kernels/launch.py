"""From `Problem` to a callable that launches: plan, compile or load, and keep everything but the addresses ready."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import jit
from ..plan import Device, Plan, plan, plan_append
from ..problem import Append, Problem
from . import params
from .operands import AppendOperands, Operands

if TYPE_CHECKING:
    import cupy


class Prepared:
    """One attention problem, planned, compiled and loaded for one device; call it with operands and a stream."""

    __slots__ = ("problem", "plan", "kernel", "_function", "_grid", "_block", "_shared", "_tail")

    def __init__(self, problem: Problem, plan: Plan, kernel: jit.Kernel) -> None:
        self.problem = problem
        self.plan = plan
        self.kernel = kernel
        self._function = kernel.function
        self._grid = (plan.grid,)
        self._block = (plan.threads,)
        self._shared = plan.shared_bytes
        self._tail = params.scalars(problem, plan)

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        if self._grid[0]:
            argument = params.pack(operands, self._tail)
            _launch(self._function, self._grid, self._block, argument, self._shared, stream)


class PreparedAppend:
    """One append, compiled and loaded for one device; call it with operands and a stream."""

    __slots__ = ("append", "kernel", "_grid", "_block", "_tail")

    def __init__(self, append: Append, kernel: jit.Kernel, grid: int, threads: int) -> None:
        self.append = append
        self.kernel = kernel
        self._grid = (grid,)
        self._block = (threads,)
        self._tail = params.append_scalars(append)

    def __call__(self, operands: AppendOperands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        if self._grid[0]:
            argument = params.pack_append(operands, self._tail)
            _launch(self.kernel.function, self._grid, self._block, argument, 0, stream)


def prepare(problem: Problem, device: int, kernel: str = "auto", **insist: Any) -> Prepared:
    """Plan, compile (or find) and load. Raises ValueError where `kernel` cannot serve the problem on this device.

    `insist` goes to `plan`.
    """
    described = describe_device(device)
    made = plan(problem, described, kernel, **insist)
    loaded = jit.load(made.kernel, made.defines, described.arch, made.kernel, device, made.shared_bytes)
    return Prepared(problem, made, loaded)


def prepare_append(append: Append, device: int) -> PreparedAppend:
    """Compile (or find) and load the append kernel for this problem."""
    defines, grid, threads = plan_append(append)
    loaded = jit.load("append_kv", defines, describe_device(device).arch, "append_kv", device, 0)
    return PreparedAppend(append, loaded, grid, threads)


@functools.cache
def describe_device(device: int) -> Device:
    """What plans need to know of a GPU that is present."""
    import cupy

    attributes = cupy.cuda.Device(device).attributes
    return Device(
        arch=jit.arch_of(device),
        multiprocessors=attributes["MultiProcessorCount"],
        shared_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
        shared_per_multiprocessor=attributes["MaxSharedMemoryPerMultiprocessor"],
        name=cupy.cuda.runtime.getDeviceProperties(device)["name"].decode(),
    )


def _launch(
    function: cupy.RawKernel,
    grid: tuple[int],
    block: tuple[int],
    argument: np.void,
    shared: int,
    stream: int,
) -> None:
    """Launch on the current device, whose stream `stream` must be."""
    current_stream, current_device = _current()
    if current_stream().ptr == stream:
        function(grid, block, (argument,), shared_mem=shared)
    else:
        with _stream(stream, current_device()):
            function(grid, block, (argument,), shared_mem=shared)


@functools.cache
def _current() -> tuple[Callable[[], cupy.cuda.Stream], Callable[[], int]]:
    import cupy

    return cupy.cuda.get_current_stream, cupy.cuda.runtime.getDevice


class _Foreign:
    """A stream of another library, by the protocol that CuPy asks for."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.lru_cache(maxsize=256)
def _stream(pointer: int, device: int) -> cupy.cuda.Stream:
    """CuPy's object for a stream of the current device, which is `device`."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14.1
        return cupy.cuda.Stream.from_external(_Foreign(pointer))
    return cupy.cuda.ExternalStream(pointer)
