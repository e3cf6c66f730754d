"""The launches of a prepared call, one by one: what a plan keeps ready, to make them again for other addresses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .. import jit
from ..arrays import contiguous_strides
from ..plan import COUNTER_BYTES, plan_append
from . import params
from .launch import Prepared, PreparedDecode, PreparedHopper, PreparedSplits, PreparedSteps
from .operands import Operands
from .tensor_map import MAP_BYTES
from .workspace import Workspace


@dataclass(frozen=True, slots=True)
class Map:
    """A tensor map in an argument of a launch."""

    argument: int  # which of them
    offset: int  # bytes from its beginning
    address: int  # of the array that it is of
    encode: Callable[[int], bytes]  # the map of an array at another address


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel, but for its stream. Maps are zeros in the arguments."""

    kernel: jit.Kernel
    grid: int  # thread blocks
    threads: int  # of a block
    shared_bytes: int
    arguments: tuple[bytes, ...]
    maps: tuple[Map, ...] = ()


def workspace_bytes(prepared: Any) -> int | None:
    """Device memory that the launches need beside their operands; None for what is no call of a kernel."""
    if not isinstance(prepared, (Prepared, PreparedHopper, PreparedDecode, PreparedSplits, PreparedSteps)):
        return None
    problem, plan = prepared.problem, prepared.plan
    if not isinstance(prepared, PreparedSteps) or problem.rotary is None:
        return plan.workspace_bytes
    return _rotated(prepared) + problem.total_q * problem.num_heads * problem.head_dim * problem.itemsize


def launches(prepared: Any, operands: Operands, memory: Workspace | None) -> list[Launch]:
    """What a call of `prepared` launches, in that order, with `memory` of `workspace_bytes` (None for 0) of its own.

    The operands' addresses need not be those of anything.
    """
    if isinstance(prepared, PreparedSteps):
        return _steps(prepared, operands, memory)
    if isinstance(prepared, PreparedSplits):
        return _splits(prepared, operands, memory)
    plan = prepared.plan
    form = prepared.kernel, plan.grid, plan.threads, plan.shared_bytes
    if isinstance(prepared, PreparedDecode):
        return [Launch(*form, (prepared.argument(operands, memory),))]
    argument = params.pack(operands, params.scalars(prepared.problem, plan))
    if isinstance(prepared, PreparedHopper):
        return [Launch(*form, (argument, _without_maps(memory)), _maps(prepared, operands))]
    return [Launch(*form, (argument,))]


def _without_maps(memory: Workspace) -> bytes:
    """forward_sm90's second argument: four maps, the address of its counters, and room up to a multiple of 64 bytes."""
    return bytes(4 * MAP_BYTES) + memory.pointer.to_bytes(8, "little") + bytes(56)


def _maps(prepared: PreparedHopper, operands: Operands) -> tuple[Map, ...]:
    roles = ("q", "k", "v") if prepared.plan.kv_splits > 1 else ("q", "k", "v", "out")  # parts have no map
    return tuple(
        Map(1, i * MAP_BYTES, getattr(operands, role).pointer, partial(prepared._maps, role))
        for i, role in enumerate(roles)
    )


def _steps(prepared: PreparedSteps, operands: Operands, memory: Workspace | None) -> list[Launch]:
    made = []
    if prepared._append is not None:
        append = prepared._append.append
        _, grid, threads = plan_append(append)
        argument = params.pack_append(operands.appending(), params.append_scalars(append))
        made.append(Launch(prepared._append.kernel, grid, threads, 0, (argument,)))
    if prepared._rotate is not None:
        o, rotate = operands, prepared._rotate
        rotated = replace(o.q, pointer=memory.pointer + _rotated(prepared), strides=contiguous_strides(o.q.shape))
        offsets = o.seqused_k, o.uniform_length or 0
        argument = rotate.argument(o.q, rotated, o.rotary_cos, o.rotary_sin, *offsets, None)
        made.append(Launch(rotate.kernel, rotate.grid, rotate.threads, 0, (argument,)))
        operands = replace(operands, q=rotated)
    return made + launches(prepared._attend, operands, memory)


def _rotated(prepared: PreparedSteps) -> int:
    """Where the rotated queries lie: behind what attention itself needs, at a multiple of 16 bytes."""
    return -(-prepared.plan.workspace_bytes // 16) * 16


def _splits(prepared: PreparedSplits, operands: Operands, memory: Workspace) -> list[Launch]:
    problem, splits = prepared.problem, prepared.plan.kv_splits
    rows = problem.total_q * problem.num_heads
    outs = [memory.pointer + COUNTER_BYTES + 4 * i * rows * problem.head_dim_v for i in range(splits + 1)]
    behind = outs.pop()
    lses = [behind + 4 * i * rows for i in range(splits + 1)]
    spare = lses.pop()
    parts, ends = replace(operands.out, pointer=outs[0]), replace(operands.out, pointer=lses[0])
    lse = spare if operands.lse is None else operands.lse.pointer
    (merge,) = prepared._merge.rounds
    argument = merge.argument(outs, lses, operands.out.pointer, lse)
    return [
        *launches(prepared._attend, replace(operands, out=parts, lse=ends), memory),
        Launch(merge.kernel, merge.grid, merge.threads, 0, (argument,)),
    ]
