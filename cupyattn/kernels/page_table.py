"""Page tables on the device, read and made into block tables: launches of kernels_cu/page_table.cu.

Plans of `compat.flashinfer` make them each time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from .. import jit
from ..plan import plan_fill_table, plan_write
from .launch import describe_device, enqueue

if TYPE_CHECKING:
    import cupy

MOST_ARRAYS = 4  # that one launch reads
MOST_TOGETHER = 1024  # sequences of `take_table`, all of which every thread block looks at
SUMMARY_WORDS = 8
REFUSED, GOOD, FILLED = range(3)
_READ = struct.Struct(f"<{MOST_ARRAYS}Q{MOST_ARRAYS}iQ")
_FILL = struct.Struct("<5Q2i")
_TAKE = struct.Struct("<5Q3i4x2Q2i")
_plan_fill_table = lru_cache(maxsize=256)(plan_fill_table)


def read_indices(device: int, stream: int, addresses: Sequence[int], ends: Sequence[int], target: int) -> None:
    """Copy at most MOST_ARRAYS int32 arrays, one behind the other, to the host's pinned memory at `target`.

    Array i comes to stand from element ends[i - 1], or 0, to ends[i] there; the last end is not 0. Launched on
    `stream`, of the device, which is the current one; returns at once.
    """
    missing = MOST_ARRAYS - len(ends)
    _, blocks, threads = plan_write(ends[-1])
    params = *addresses, *(0,) * missing, *ends, *(ends[-1],) * missing, target
    enqueue(_kernel(device, "read_indices"), (blocks,), (threads,), (_READ.pack(*params),), 0, stream)


def fill_table(
    device: int,
    stream: int,
    starts: int,
    ids: int,
    last: int,
    table: int,
    lengths: int,
    *,
    batch: int,
    columns: int,
    widest: int,
    page_size: int,
) -> None:
    """Row b of the table becomes ids[starts[b]] to ids[starts[b + 1] - 1], for b below batch, which is not 0.

    Launched on `stream`, of the device, which is the current one; returns at once. All arrays are int32 and given by
    their addresses.

    Args:
        starts: (batch + 1,), never decreasing.
        ids: (starts[batch],) or more.
        last: (batch,), the tokens in each sequence's last page, of which lengths are made; 0 to leave those alone.
        table: (batch, columns); behind a sequence's ids nothing is written.
        lengths: (batch,).
        widest: the most ids of one sequence, at most columns.
        page_size: tokens of a page.
    """
    _, grid, threads = _plan_fill_table(batch, widest)
    argument = _FILL.pack(starts, ids, last, table, lengths, columns, page_size)
    enqueue(_kernel(device, "fill_table"), grid, (threads,), (argument,), 0, stream)


def take_table(
    device: int,
    stream: int,
    starts: int,
    ids: int,
    last: int,
    query_starts: int,
    table: int,
    lengths: int,
    target: int,
    *,
    batch: int,
    columns: int,
    least: int,
    page_size: int,
    most_ids: int,
) -> None:
    """Look at a page table, and fill a block table with it if it is in order and the table's width is right.

    Launched on `stream`, of the device, which is the current one; returns at once. Arrays are as in `fill_table`, with
    1 to MOST_TOGETHER sequences. What the host's pinned memory at `target` is told, int32: the state, which is REFUSED
    if anything is not as it says there, or in query_starts, FILLED with a new table, else GOOD; how many ids there are;
    the most of one sequence; how many queries; the most of one sequence. From element SUMMARY_WORDS follow starts,
    last and query_starts as they are.

    Args:
        query_starts: (batch + 1,), starting at 0 and never decreasing; or 0.
        columns: of the table, which is as many ids as a sequence may have there; 0 if none is to be filled.
        least: as many ids as the sequence that has most must have there, above 0 if there is no table.
        most_ids: as many as starts[batch] may be.
    """
    _, grid, threads = _plan_fill_table(batch if columns else 1, columns or 1)
    pointers = starts, ids, last, table, lengths
    argument = _TAKE.pack(*pointers, columns, page_size, least, query_starts, target, batch, most_ids)
    enqueue(_kernel(device, "take_table"), grid, (threads,), (argument,), 0, stream)


@cache
def _kernel(device: int, function: str) -> cupy.RawKernel:
    """One of the file's kernels, whose compile-time values are the same in every launch."""
    return jit.load("page_table", plan_fill_table(1, 1)[0], describe_device(device).arch, function, device).function
