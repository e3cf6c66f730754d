"""An append that is launched again and again: its arguments stay in memory, and only what is new is written there."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np

from ..arrays import View
from . import params
from .launch import PreparedAppend
from .operands import AppendOperands


class HeldAppend:
    """`PreparedAppend.inline` of one form, for new rows at any address; for one thread at a time.

    indices: int32, as for `PreparedAppend.inline`. What is in it when a launch is called is what the launch takes.
    """

    __slots__ = ("indices", "_words", "_addresses", "_launch", "_of_thread")

    def __init__(self, prepared: PreparedAppend, operands: AppendOperands, indices: np.ndarray) -> None:
        from cupy_backends.cuda.api import driver

        kernel, capacity = prepared.inline_kernel(len(indices))
        argument = params.pack_append(operands, prepared.tail)
        first = len(argument) // 8  # word of the indices: the other argument is a multiple of 8 bytes
        self._words = np.zeros(first + capacity // 2, np.int64)
        self._words[:first] = np.frombuffer(argument, np.int64)
        self.indices = self._words[first:].view(np.int32)[: len(indices)]
        self.indices[:] = indices
        begin = self._words.ctypes.data
        self._addresses = np.array([begin, begin + 8 * first], np.uintp)
        form = kernel.function.kernel.ptr, *prepared.grid, 1, 1, *prepared.block, 1, 1, 0
        self._launch = partial(driver.launchKernel, *form)
        self._of_thread = threading.local()

    def __call__(self, k: View, v: View, stream: int) -> None:
        """Launch on `stream`, of the current device, for rows like the operands'. Returns at once."""
        if not hasattr(self._of_thread, "has_context"):
            import cupy

            cupy.cuda.runtime.memGetInfo()  # makes the device's context this thread's, as the driver wants it
            self._of_thread.has_context = True
        self._words[0], self._words[1] = k.pointer, v.pointer  # the first two of `pack_append`
        self._launch(stream, self._addresses.ctypes.data, 0)
