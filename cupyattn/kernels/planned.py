"""A decode launch that costs the host little more than the driver's own call: what `DecodePlan` runs on CUDA.

A RawKernel looks at its arguments anew in every call. Here the kernel's argument stays in memory, one copy for each
thread, and only addresses that have changed are written into it.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from ..arrays import View, contiguous_strides, numpy_dtype
from . import params
from .launch import PreparedDecode
from .operands import Operands
from .workspace import Workspace, keep_if_captured

INPUTS = ("q", "k", "v", "seqused_k", "block_table", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "sinks")
INPUTS += ("k_new", "v_new", "rotary_cos", "rotary_sin", "k_scale", "v_scale")
"""The arrays that a decode launch reads, by their names in `Operands`, in the order of `Addresses`."""

Addresses = tuple[int, ...]
"""Of `INPUTS`; 0 for an array that there is not."""

Check = Callable[[Addresses, int], None]
"""(addresses, address of out): raises where these do not fit."""

_inputs = attrgetter(*INPUTS)


class PlannedDecode:
    """A decode kernel with a workspace of its own, for arrays of one form; launches must not overlap one another."""

    __slots__ = ("prepared", "memory", "_check", "_template", "_driver_launch", "_of_thread", "_kept", "_quick")

    def __init__(self, prepared: PreparedDecode, memory: Workspace, operands: Operands, check: Check) -> None:
        """The device is the current one. `operands` are an example; `check` sees all addresses before they are used."""
        from cupy_backends.cuda.api import driver

        self.prepared = prepared
        self.memory = memory
        self._check = check
        self._template = prepared.argument(operands, memory).tobytes()
        plan = prepared.plan
        form = prepared.kernel.function.kernel.ptr, plan.grid, 1, 1, plan.threads, 1, 1, plan.shared_bytes
        self._driver_launch = partial(driver.launchKernel, *form)
        self._of_thread = threading.local()
        self._kept = False
        self._quick = _Quick(operands, prepared.problem.lse)

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        addresses = tuple([0 if found is None else found.pointer for found in _inputs(operands)])
        lse = 0 if operands.lse is None else operands.lse.pointer
        length = -1 if operands.uniform_length is None else operands.uniform_length
        self.launch(addresses, operands.out.pointer, lse, length, stream)

    def launch(self, addresses: Addresses, out: int, lse: int, length: int, stream: int) -> None:
        """The same by addresses; `length` is that of all sequences, -1 if an array has them or all rows are in use."""
        if stream and not self._kept:  # a graph that holds this launch may outlive the plan
            self._kept = keep_if_captured(self.memory, stream)
        try:
            argument = self._of_thread.argument
        except AttributeError:
            argument = self._of_thread.argument = _Argument(self._template, self._check)
        argument.write(addresses, out, lse, length)
        self._driver_launch(stream, argument.address, 0)

    def quick(self, arrays: tuple[Any, ...], length: int, out: Any) -> Any:
        """Launch for CuPy arrays (in the order of `INPUTS`) that are in every way as the example was, on CuPy's stream.

        Returns the result, or None and does nothing if that is not what came.
        """
        quick = self._quick
        if quick.current_device() != quick.device:
            return None
        kind = quick.kind
        addresses = []
        for array, form in zip(arrays, quick.forms):  # noqa: B905 (a check of the lengths takes its time)
            if array is form:
                addresses.append(0)
            elif type(array) is kind:
                memory = array.data
                if (array.shape, array.strides, array.dtype, memory.device_id) != form:
                    return None
                addresses.append(memory.ptr)
            else:
                return None
        if out is not None:
            if type(out) is not kind:
                return None
            memory = out.data
            if (out.shape, out.strides, out.dtype, memory.device_id) != quick.out_form:
                return None
        elif quick.makes_out:
            memory = quick.allocate(quick.out_bytes)
            out = kind(quick.out_form[0], quick.out_form[2], memory)
        else:
            return None
        stream = quick.current_stream().ptr
        if quick.lse_shape is None:
            self.launch(tuple(addresses), memory.ptr, 0, length, stream)
            return out
        lse_memory = quick.allocate(quick.lse_bytes)
        self.launch(tuple(addresses), memory.ptr, lse_memory.ptr, length, stream)
        return out, kind(quick.lse_shape, quick.lse_dtype, lse_memory)


class _Quick:
    """What `PlannedDecode.quick` compares with, and CuPy's functions that it calls."""

    __slots__ = ("device", "kind", "forms", "out_form", "out_bytes", "makes_out", "lse_shape", "lse_bytes", "lse_dtype")
    __slots__ += ("current_device", "current_stream", "allocate")

    def __init__(self, operands: Operands, lse: bool) -> None:
        import cupy

        q, out = operands.q, operands.out
        self.device = q.device
        self.kind = cupy.ndarray
        self.current_device = cupy.cuda.runtime.getDevice
        self.current_stream = cupy.cuda.get_current_stream
        self.allocate = cupy.cuda.alloc
        self.forms = tuple([None if found is None else _form(found) for found in _inputs(operands)])
        self.out_form = _form(out)
        self.out_bytes = math.prod(out.shape) * numpy_dtype(out.dtype).itemsize
        self.makes_out = out.strides == contiguous_strides(out.shape)
        self.lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if lse else None
        self.lse_bytes = 4 * math.prod(q.shape[:3])
        self.lse_dtype = np.dtype(np.float32)


def _form(found: View) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype, int]:
    """Shape, strides in bytes, dtype and device, as a CuPy array has them."""
    dtype = numpy_dtype(found.dtype)
    return found.shape, tuple([step * dtype.itemsize for step in found.strides]), dtype, found.device


class _Argument:
    """The kernel's argument in memory that one thread writes. `address` is what the driver asks for."""

    __slots__ = ("address", "_bytes", "_pointers", "_check", "_written")

    def __init__(self, template: bytes, check: Check) -> None:
        import cupy

        cupy.cuda.runtime.memGetInfo()  # makes the device's context this thread's, which the driver takes for granted
        self._bytes = ctypes.create_string_buffer(template, len(template))
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._bytes))
        self.address = ctypes.addressof(self._pointers)
        self._check = check
        self._written: tuple[Addresses, int, int, int] | None = None

    def write(self, addresses: Addresses, out: int, lse: int, length: int) -> None:
        """Have these in the argument, once they are checked. The driver copies it when a launch is queued."""
        written = addresses, out, lse, length
        if written != self._written:
            self._check(addresses, out)
            params.write_decode(self._bytes, *written)
            self._written = written
