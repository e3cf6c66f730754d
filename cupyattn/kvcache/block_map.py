"""The picture of a paged cache in a notebook: a square for each block, in the colour of the sequence that it is of."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .paged import PagedKVCache

SHOWN_BLOCKS = 1024
SHOWN_SEQUENCES = 24
FREE, EVICTABLE, SHARED = "#e8e8e8", "#b9b9b9", "#444444"
_SQUARE = (
    "display:inline-block;width:14px;height:14px;margin:1px;border-radius:2px;vertical-align:bottom;"
    "font:9px/14px sans-serif;text-align:center;color:white"
)


def block_map(cache: PagedKVCache) -> str:
    """HTML of a cache: what it says of itself, its sequences, and all blocks in the order of their ids.

    A square is filled as far as the block holds tokens; one that several sequences share is dark and says how many.
    """
    owners, fill = _owners(cache)
    refs = cache.allocator.ref_counts
    evictable = set(cache.allocator.evictable_blocks.tolist())
    squares = []
    for block in range(min(cache.num_blocks, SHOWN_BLOCKS)):
        count = int(refs[block])
        colour = SHARED if count > 1 else _colour(owners[block]) if count else EVICTABLE if block in evictable else FREE
        state = f"{count} sequences" if count > 1 else f"sequence {owners[block]}" if count else "free"
        state = "kept for its prefix" if block in evictable else state
        share = fill[block] / cache.block_size if count else 1
        paint = colour if share == 1 else f"linear-gradient(to right,{colour} {share:.0%},{FREE} {share:.0%})"
        told = f"block {block}: {state}" + (f", {fill[block]} of {cache.block_size} tokens" if count else "")
        squares.append(f'<span style="{_SQUARE};background:{paint}" title="{told}">{count if count > 1 else ""}</span>')
    rest = cache.num_blocks - len(squares)
    behind = f"<div>… and {rest} more blocks</div>" if rest else ""
    return (
        f'<div style="font:12px sans-serif"><div>{escape(repr(cache))}</div><div>{_legend(cache)}</div>'
        f'<div style="line-height:16px;max-width:1024px">{"".join(squares)}</div>{behind}</div>'
    )


def _owners(cache: PagedKVCache) -> tuple[np.ndarray, np.ndarray]:
    """For each block: a sequence that has it, or -1, and how many tokens it holds."""
    tables, lengths = cache.tables, cache.lengths
    sequence, column = np.nonzero(tables >= 0)
    owners, fill = np.full(cache.num_blocks, -1, np.int64), np.zeros(cache.num_blocks, np.int64)
    blocks = tables[sequence, column]
    owners[blocks] = cache.ids[sequence]
    np.maximum.at(fill, blocks, np.minimum(lengths[sequence] - column * cache.block_size, cache.block_size))
    return owners, fill


def _legend(cache: PagedKVCache) -> str:
    shown = list(zip(cache.ids.tolist(), cache.lengths.tolist(), strict=True))
    parts = [(_colour(seq), f"{seq}: {length} tokens") for seq, length in shown[:SHOWN_SEQUENCES]]
    parts += [(SHARED, "shared"), (EVICTABLE, "kept for its prefix"), (FREE, "free")]
    keys = "".join(f'<span style="{_SQUARE};background:{colour}"></span> {what} &ensp;' for colour, what in parts)
    return keys + (f"… and {len(shown) - SHOWN_SEQUENCES} more sequences" if len(shown) > SHOWN_SEQUENCES else "")


def _colour(seq: int) -> str:
    """Hues a golden section apart, so that neighbours differ."""
    return f"hsl({seq * 137.508 % 360:.0f},60%,50%)"
