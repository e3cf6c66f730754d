"""Rotating the rows of one array by tables: `Rotation` -> a callable that launches kernels_cu/rotary.cu."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from .. import jit
from ..plan import plan_rotary
from .launch import describe_device, enqueue

if TYPE_CHECKING:
    from ..arrays import View
    from ..problem import Rotation

_POINTERS = struct.Struct("<6Qq")
_SCALARS = struct.Struct("<6q5i4x")


class PreparedRotary:
    """One rotation, compiled and loaded for one device; call it with views and a stream."""

    __slots__ = ("rotation", "kernel", "grid", "threads", "_tail")

    def __init__(self, rotation: Rotation, kernel: jit.Kernel, grid: int, threads: int) -> None:
        self.rotation = rotation
        self.kernel = kernel
        self.grid = grid
        self.threads = threads
        self._tail = _scalars(rotation)

    def __call__(
        self,
        x: View,
        out: View,
        cos: View,
        sin: View,
        offsets: View | None,
        uniform_offset: int,
        cu_seqlens: View | None,
        stream: int,
    ) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once.

        uniform_offset is every sequence's where offsets is None. out is x's own memory, or apart from it.
        """
        if self.grid:
            argument = self.argument(x, out, cos, sin, offsets, uniform_offset, cu_seqlens)
            enqueue(self.kernel.function, (self.grid,), (self.threads,), (argument,), 0, stream)

    def argument(
        self,
        x: View,
        out: View,
        cos: View,
        sin: View,
        offsets: View | None,
        uniform_offset: int,
        cu_seqlens: View | None,
    ) -> bytes:
        """The kernel's argument."""
        head = _POINTERS.pack(
            x.pointer,
            out.pointer,
            cos.pointer,
            sin.pointer,
            offsets.pointer if offsets is not None else 0,
            cu_seqlens.pointer if cu_seqlens is not None else 0,
            uniform_offset,
        )
        return head + self._tail


def prepare_rotary(rotation: Rotation, device: int) -> PreparedRotary:
    """Compile (or find) and load the kernel for this rotation."""
    defines, grid, threads = plan_rotary(rotation)
    loaded = jit.load("rotary", defines, describe_device(device).arch, "rotary", device, 0)
    return PreparedRotary(rotation, loaded, grid, threads)


def _scalars(rotation: Rotation) -> bytes:
    """What `RotaryParams` has behind its pointers."""
    return _SCALARS.pack(
        *rotation.x_strides,
        *rotation.out_strides,
        rotation.batch,
        rotation.total,
        rotation.seqlen,
        rotation.num_heads,
        rotation.rotary.positions,
    )
