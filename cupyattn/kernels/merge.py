"""Merging attention states: `Merge` -> a callable that launches kernels_cu/merge_states.cu, as often as it takes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import jit
from ..plan import MERGE_CAPACITIES, plan_merge
from ..problem import NATURAL, LseForm
from .launch import describe_device, enqueue

if TYPE_CHECKING:
    from ..states import Merge

_SCALARS = struct.Struct("<6q4i2f")

Addresses = Sequence[int]


class PreparedMerge:
    """One merge for one device; call it with addresses and a stream. Kernels are compiled when it is made."""

    __slots__ = ("merge", "rounds")

    def __init__(self, merge: Merge, device: int, from_float32: bool = False, lse_form: LseForm = NATURAL) -> None:
        """from_float32: the states are contiguous float32 ones, whatever `merge` says of their dtype and strides.

        lse_form: of the result; the states' lse is natural.
        """
        self.merge = merge
        counts = [merge.states]
        while counts[-1] > MERGE_CAPACITIES[-1]:
            counts.append(-(-counts[-1] // MERGE_CAPACITIES[-1]))
        last = len(counts) - 1
        self.rounds = [
            _Round(merge, count, from_float32 or i > 0, i < last, NATURAL if i < last else lse_form, device)
            for i, count in enumerate(counts)
        ]

    def __call__(
        self,
        outs: Addresses,
        lses: Addresses,
        out: int,
        lse: int,
        scratch: Callable[[int], tuple[Addresses, Addresses]],
        stream: int,
    ) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once.

        scratch(n) gives addresses of n contiguous float32 states, as outs and lses, for the sums of one round.
        """
        most = MERGE_CAPACITIES[-1]
        for merging in self.rounds[:-1]:
            sums, sum_lses = scratch(-(-len(outs) // most))
            for i, (target, target_lse) in enumerate(zip(sums, sum_lses, strict=True)):
                part = slice(i * most, (i + 1) * most)
                merging(outs[part], lses[part], target, target_lse, stream)
            outs, lses = sums, sum_lses
        self.rounds[-1](outs, lses, out, lse, stream)


class _Round:
    """One kernel: up to as many states as its argument holds, into one."""

    __slots__ = ("kernel", "grid", "threads", "_capacity", "_pointers", "_strides", "_sizes", "_lse_form")

    def __init__(
        self, merge: Merge, states: int, from_float32: bool, to_float32: bool, lse_form: LseForm, device: int
    ) -> None:
        states = min(states, MERGE_CAPACITIES[-1])
        defines, self.grid, self.threads = plan_merge(merge, states, from_float32, to_float32)
        self.kernel = jit.load("merge_states", defines, describe_device(device).arch, "merge_states", device, 0)
        self._capacity = dict(defines)["CAPACITY"]
        self._pointers = struct.Struct(f"<{2 * self._capacity + 2}Q")
        row = merge.num_heads * merge.head_dim
        contiguous = (merge.seqlen * row, row, merge.head_dim)
        self._strides = (
            *(contiguous if from_float32 else merge.strides),
            *(contiguous if to_float32 else merge.out_strides),
        )
        self._sizes = (merge.batch, merge.num_heads, merge.seqlen)
        self._lse_form = lse_form

    def __call__(self, outs: Addresses, lses: Addresses, out: int, lse: int, stream: int) -> None:
        argument = self.argument(outs, lses, out, lse)
        enqueue(self.kernel.function, (self.grid,), (self.threads,), (argument,), 0, stream)

    def argument(self, outs: Addresses, lses: Addresses, out: int, lse: int) -> bytes:
        """The kernel's argument."""
        room = (0,) * (self._capacity - len(outs))
        head = self._pointers.pack(*outs, *room, *lses, *room, out, lse)
        return head + _SCALARS.pack(*self._strides, len(outs), *self._sizes, *self._lse_form)
