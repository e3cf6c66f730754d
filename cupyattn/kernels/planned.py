"""A decode launch that costs the host little more than the driver's own call: what `DecodePlan` runs on CUDA.

A RawKernel looks at its arguments anew in every call. Here the kernel's argument stays in memory, one copy for each
thread, and only addresses that have changed are looked at and written into it.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any
from weakref import ref

import numpy as np

from ..arrays import View, contiguous_strides, numpy_dtype
from . import params
from .launch import PreparedDecode
from .operands import Operands
from .workspace import Workspace, keep_if_captured

INPUTS = ("q", "k", "v", "seqused_k", "block_table", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "sinks")
INPUTS += ("k_new", "v_new", "rotary_cos", "rotary_sin", "k_scale", "v_scale")
"""The arrays that a decode launch reads, by their names in `Operands`."""

Addresses = Sequence[int]
"""Of `INPUTS`, in that order; 0 for an array that there is not."""

Check = Callable[[Addresses, int], None]
"""(addresses, address of out): raises where these do not fit."""

# Where they stand in the kernel's argument, in 8-byte words (kernels/params.py).
_NEW = (params.POINTERS.size + params.SCALARS.size) // 8
_WORDS = (0, 1, 2, 7, 8, 9, 10, 11, 12, *range(_NEW, _NEW + 6))
_OUT, _LSE, _LENGTH = 3, 4, 13

_inputs = attrgetter(*INPUTS)

_Form = tuple[tuple[int, ...], tuple[int, ...], np.dtype, int]
"""Shape, strides in bytes, dtype and device, as a CuPy array has them."""


class PlannedDecode:
    """A decode kernel with a workspace of its own, for arrays of one form; launches must not overlap one another."""

    __slots__ = ("prepared", "memory", "_check", "_template", "_launch", "_of_thread", "_kept", "_quick")

    def __init__(self, prepared: PreparedDecode, memory: Workspace, operands: Operands, check: Check) -> None:
        """The device is the current one. `operands` are an example; `check` sees all addresses before they are used."""
        from cupy_backends.cuda.api import driver

        self.prepared = prepared
        self.memory = memory
        self._check = check
        self._template = prepared.argument(operands, memory).tobytes()
        plan = prepared.plan
        form = prepared.kernel.function.kernel.ptr, plan.grid, 1, 1, plan.threads, 1, 1, plan.shared_bytes
        self._launch = partial(driver.launchKernel, *form)
        self._of_thread = threading.local()
        self._kept = False
        self._quick = _Quick(operands, prepared.problem.lse)
        self._argument()  # a graph may be captured before anything else is run

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        argument = self._argument()
        for i, found in enumerate(_inputs(operands)):
            argument.put(i, 0 if found is None else found.pointer, _never)
        argument.put_out(operands.out.pointer, _never)
        lse = 0 if operands.lse is None else operands.lse.pointer
        length = -1 if operands.uniform_length is None else operands.uniform_length
        self._enqueue(argument, lse, length, stream)

    def quick(self, arrays: tuple[Any, ...], length: int, out: Any) -> Any:
        """Launch for CuPy arrays (in the order of `INPUTS`) that are in every way as the example was, on CuPy's stream.

        length is that of all sequences, -1 if an array has them or all rows are in use. Returns the result, or None and
        launches nothing if that is not what came.
        """
        quick = self._quick
        if quick.current_device() != quick.device:
            return None
        argument = self._argument()
        for array, reference in zip(arrays, argument.references):  # noqa: B905 (a check of the lengths takes its time)
            if reference() is not array or (array is None and reference is not _absent):
                if not self._look(argument, arrays):
                    return None
                break
        if out is not None:
            if argument.out_reference() is not out:
                address = quick.address_of(out, quick.out_form)
                if address is None:
                    return None
                argument.put_out(address, ref(out))
        elif quick.makes_out:
            memory = quick.allocate(quick.out_bytes)
            out = quick.kind(quick.out_form[0], quick.out_form[2], memory)
            argument.put_out(memory.ptr, _never)
        else:
            return None
        stream = quick.current_stream().ptr
        if quick.lse_shape is None:
            self._enqueue(argument, 0, length, stream)
            return out
        memory = quick.allocate(quick.lse_bytes)
        self._enqueue(argument, memory.ptr, length, stream)
        return out, quick.kind(quick.lse_shape, quick.lse_dtype, memory)

    def _look(self, argument: _Argument, arrays: tuple[Any, ...]) -> bool:
        """Take in the arrays that are not those of the last launch. False if one is not as planned."""
        references, forms = argument.references, self._quick.forms
        for i, array in enumerate(arrays):
            # The reference to an array that is gone gives None too.
            if references[i]() is not array or (array is None and references[i] is not _absent):
                address = self._quick.address_of(array, forms[i])
                if address is None:
                    return False
                argument.put(i, address, ref(array))
        return True

    def _argument(self) -> _Argument:
        """This thread's."""
        try:
            return self._of_thread.argument
        except AttributeError:
            absent = [form is None for form in self._quick.forms]
            self._of_thread.argument = made = _Argument(self._template, absent)
            return made

    def _enqueue(self, argument: _Argument, lse: int, length: int, stream: int) -> None:
        if not argument.checked:
            self._check(argument.addresses, argument.out)
            argument.checked = True
        if stream and not self._kept:  # a graph that holds this launch may outlive the plan
            self._kept = keep_if_captured(self.memory, stream)
        argument.words[_LSE], argument.words[_LENGTH] = lse, length
        self._launch(stream, argument.location, 0)


def _never() -> object:
    """In place of a reference to an array: nothing that could come is this."""
    return _never


_absent = type(None)  # in place of a reference where there is no array: NoneType() is None


class _Argument:
    """The kernel's argument in memory that one thread writes, and which arrays' addresses are in it.

    To look at an array takes half a microsecond, to see that it is the one of the last launch a tenth of that. All that
    can change in a CuPy array is its shape, and then it is still the same memory.
    """

    __slots__ = ("words", "location", "references", "addresses", "out_reference", "out", "checked", "_pointers")

    def __init__(self, template: bytes, absent: list[bool]) -> None:
        import cupy

        cupy.cuda.runtime.memGetInfo()  # makes the device's context this thread's, which the driver takes for granted
        self.words = (ctypes.c_int64 * -(-len(template) // 8))()
        ctypes.memmove(self.words, template, len(template))
        for word in (*_WORDS, _OUT):
            self.words[word] = 0
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.words))
        self.location = ctypes.addressof(self._pointers)  # of the argument's address: what the driver asks for
        self.references: list[Callable[[], Any]] = [_absent if missing else _never for missing in absent]
        self.addresses = [0] * len(absent)
        self.out_reference: Callable[[], Any] = _never
        self.out = 0
        self.checked = False

    def put(self, i: int, address: int, reference: Callable[[], Any]) -> None:
        """Write the address of `INPUTS`[i], and remember the array that has it by a weak reference."""
        if address != self.addresses[i]:
            self.words[_WORDS[i]] = self.addresses[i] = address
            self.checked = False
        if self.references[i] is not _absent:
            self.references[i] = reference

    def put_out(self, address: int, reference: Callable[[], Any]) -> None:
        """The same for the output."""
        if address != self.out:
            self.words[_OUT] = self.out = address
            self.checked = False
        self.out_reference = reference


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

    def address_of(self, array: Any, form: _Form | None) -> int | None:
        """The address of a CuPy array of that form, None for anything else."""
        if type(array) is not self.kind or form is None:
            return None
        memory = array.data
        shape, strides, dtype, device = form
        if array.strides != strides and any(
            size > 1 and one != other for size, one, other in zip(shape, array.strides, strides, strict=False)
        ):
            return None
        return memory.ptr if (array.shape, array.dtype, memory.device_id) == (shape, dtype, device) else None


def _form(found: View) -> _Form:
    dtype = numpy_dtype(found.dtype)
    return found.shape, tuple([step * dtype.itemsize for step in found.strides]), dtype, found.device
