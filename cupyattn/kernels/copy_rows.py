"""Moving rows of keys and values between caches: `Side`s -> a launch of kernels_cu/copy_rows.cu.

Also single entries of a block table, through kernels_cu/write_entries.cu.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .. import jit
from ..plan import plan_copy, plan_write
from .launch import describe_device, enqueue

_PARAMS = struct.Struct("<3Q4q3Q4q2q4i")


@dataclass(frozen=True, slots=True)
class Side:
    """Where rows are read or written. Strides count bytes; a list of blocks is int32, on the device."""

    k: int  # addresses
    v: int
    blocks: int  # 0: blocks in order
    strides: tuple[int, int, int, int]  # layer, block, row, head


def copy_rows(
    device: int,
    source: Side,
    target: Side,
    stream: int,
    *,
    first: int,
    tokens: int,
    layers: int,
    block_size: int,
    heads: int,
    head_bytes: int,
) -> None:
    """Tokens first to first + tokens - 1 of the source become tokens 0 to tokens - 1 of the target, in every layer.

    Both sides' blocks have block_size rows. Launched on `stream`, of the current device; returns at once.
    """
    if not tokens:
        return
    defines, word, chunk, grid, threads = plan_copy(tokens, layers, heads, head_bytes)
    loaded = jit.load("copy_rows", defines, describe_device(device).arch, "copy_rows", device, 0)
    sides = []
    for side in (source, target):
        sides += [side.k, side.v, side.blocks, *(stride // word for stride in side.strides)]
    argument = _PARAMS.pack(*sides, first, tokens, chunk, block_size, heads, head_bytes // word)
    enqueue(loaded.function, grid, (threads,), (argument,), 0, stream)


def write_entries(device: int, array: int, index: int, value: int, count: int, stream: int) -> None:
    """array[index[i]] = value[i] for i below count, all int32 at these addresses. Returns at once."""
    defines, grid, threads = plan_write(count)
    loaded = jit.load("write_entries", defines, describe_device(device).arch, "write_entries", device, 0)
    arguments = (*(struct.pack("<Q", address) for address in (array, index, value)), struct.pack("<i", count))
    enqueue(loaded.function, (grid,), (threads,), arguments, 0, stream)
