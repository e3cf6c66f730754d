"""How new rows get into the blocks of a paged cache: `Writing`, one launch of the append kernel, and `Decoding`, the
same launch again and again while the same sequences grow by a token in each step.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import view
from ..attention import all_append_operands, find_append, refuse_shared, rotary_and_scales
from ..kernels.operands import AppendOperands
from ..streams import device_of, in_order
from .block_table import INT32_MAX
from .new_rows import Array, NewRows, form_of, without_layers
from .transfer import Held, index_view

if TYPE_CHECKING:
    from .paged import Growth, PagedKVCache


class Writing:
    """An append that is ready to be launched. Whatever can be refused is refused when it is made.

    The kernel is told of the blocks that are written to and of nothing else: a sequence's row of its table begins with
    the first of them.
    """

    __slots__ = ("cache", "slots", "rows", "layers", "operands", "appending", "packet", "_width")

    def __init__(
        self, cache: PagedKVCache, slots: np.ndarray, rows: NewRows, layers: range, k_scale: Any, v_scale: Any
    ) -> None:
        self.cache, self.slots, self.rows, self.layers = cache, slots, rows, layers
        most = rows.new if isinstance(rows.new, int) else int(rows.new.max(initial=0))
        # Wherever in a block a sequence ends.
        self._width = width = (cache.block_size + most - 2) // cache.block_size + 1 if most else 1
        batch, device = len(slots) * len(layers), cache._store.transfer.device
        ends = index_view((batch + 1,), device) if rows.packed else None
        held, table = index_view((batch,), device), index_view((batch, width), device)
        self.operands = AppendOperands(*cache._store.flat, rows.k, rows.v, ends, held, table)
        scales = rotary_and_scales(self.operands, None, None, k_scale, v_scale)
        self.appending = find_append(self.operands, (cache.layout, cache._kv_dtype, *scales, True))

    def launch(self, start: np.ndarray, growth: Growth | None = None) -> None:
        """Write the rows behind `start` tokens of each sequence, after the copies of a growth."""
        self.packet = self._packed(start)
        k = self.rows.k
        with device_of(k):
            in_order(partial(self._run, growth), k, all_append_operands(self.operands))

    def _run(self, growth: Growth | None, stream: int) -> None:
        transfer = self.cache._store.transfer
        with transfer.following(self.rows.k):
            if growth is not None:
                self.cache._copy_shared(growth, stream)
            transfer.run(self.appending.run, self.operands, self.packet, stream)

    def _packed(self, start: np.ndarray) -> np.ndarray:
        """What the append kernel reads, in one int32 array: for each layer and sequence the tokens in the first block
        that is written to; for each the blocks from that one on, `width` of them; where the rows of each begin."""
        cache, width = self.cache, self._width
        first = start // cache.block_size
        most = cache._table.shape[1] - 1
        if width == 1:
            blocks = cache._table[self.slots, np.minimum(first, most)][:, None]
        else:
            blocks = cache._table[self.slots[:, None], np.minimum(first[:, None] + np.arange(width), most)]
        batch, layers = len(self.slots), self.layers
        count = batch * len(layers)
        packet = np.empty(count * (1 + width) + (count + 1 if self.rows.packed else 0), np.int32)
        packet[:count].reshape(len(layers), batch)[...] = start - first * cache.block_size
        listed = packet[count : count * (1 + width)].reshape(len(layers), batch, width)
        for layer, part in zip(layers, listed, strict=True):
            np.add(blocks, layer * cache.num_blocks, out=part)
        if self.rows.packed:
            ends = packet[-count - 1 :]
            ends[0] = 0
            np.cumsum(np.tile(self.rows.new, len(layers)), out=ends[1:])
        return packet


class Decoding:
    """The last append, if it was of one token to each sequence, ready to go on: step by step nothing is looked at anew
    but the addresses of the rows, and nothing is found out anew but which sequences go on in another block.

    seqs: the sequences.
    """

    __slots__ = ("seqs", "_slots", "_scales", "_forms", "_operands", "_appending", "_packet", "_end")
    __slots__ += ("_longest", "_change", "_sharings", "_launch", "_inside", "_blocks", "_other_layers")

    def __init__(self, seqs: list[int], done: Writing, end: np.ndarray, scales: tuple[Any, Any]) -> None:
        """Go on behind `end` tokens of each sequence, with the same scales."""
        cache = done.cache  # not kept: it keeps this, and its memory should be free as soon as nobody has it
        self.seqs, self._slots = seqs, done.slots
        self._scales, self._forms = scales, done.rows.forms
        self._operands, self._appending, self._packet = done.operands, done.appending, done.packet
        self._operands.k, self._operands.v = cache._store.flat  # instead of rows that the caller has done with
        self._end, self._longest = end, int(end.max())
        self._change, self._sharings = cache._change, cache.allocator._sharings
        self._launch: Held | None = None

    def step(self, cache: PagedKVCache, k: Array, v: Array, k_scale: Any, v_scale: Any) -> bool:
        """Append a token to each sequence. False, and nothing is done, where something is not as it was before."""
        if k_scale is not self._scales[0] or v_scale is not self._scales[1]:
            return False
        k_found, v_found = view(k, "k"), view(v, "v")
        if (form_of(k_found), form_of(v_found)) != self._forms or not self._untouched(cache):
            return False
        k_rows = without_layers("k", k_found, cache.num_layers)
        v_rows = without_layers("v", v_found, cache.num_layers)
        k_cache, v_cache = cache._store.flat
        pointers = k_cache.pointer, v_cache.pointer, k_found.pointer, v_found.pointer, 0
        refuse_shared(self._appending.extents, *pointers)
        if self._launch is None:
            self._hold(cache)
        crossing = (self._inside == cache.block_size - 1).nonzero()[0]
        blocks = cache.allocator.allocate(len(crossing)) if len(crossing) else None
        try:
            self._move_on(cache, crossing, blocks)
            with device_of(k_rows):
                in_order(partial(self._launch, k_rows, v_rows), k_rows, (k_rows, v_rows, k_cache))
        except BaseException as error:
            cache._decoding = None
            if blocks is not None:
                # Interrupted, rows may have been written: what was evicted is gone.
                give_back = cache.allocator._undo if isinstance(error, Exception) else cache.allocator.free
                give_back(blocks)
            raise
        moved = self._slots[crossing]
        if blocks is not None:
            cache._table[moved, self._end[crossing] // cache.block_size] = blocks
        self._end += 1
        self._longest += 1
        cache._lengths[self._slots] = self._end
        cache._touch(self._slots, moved)
        self._change = cache._change
        return True

    def _untouched(self, cache: PagedKVCache) -> bool:
        """Whether the sequences end where they did, in blocks that are theirs alone, and may grow."""
        allocator = cache.allocator
        if self._change != cache._change and cache._changed[self._slots].max() > self._change:
            return False
        if self._sharings != allocator._sharings:
            last = cache._table[self._slots, (self._end - 1) // cache.block_size]
            if (allocator.ref_counts[last] > 1).any():
                return False
            self._sharings = allocator._sharings
        return self._longest < INT32_MAX

    def _hold(self, cache: PagedKVCache) -> None:
        indices, self._launch = cache._store.transfer.hold(self._appending.run, self._operands, self._packet)
        inside, blocks = indices.reshape(2, cache.num_layers, len(self._slots))
        self._inside, self._blocks = inside[0], blocks[0]
        first = cache.num_blocks * np.arange(1, cache.num_layers, dtype=np.int32)[:, None]
        self._other_layers = (inside[1:], blocks[1:], first) if len(first) else None

    def _move_on(self, cache: PagedKVCache, crossing: np.ndarray, blocks: np.ndarray | None) -> None:
        """Say in the launch's indices where the next token of each sequence goes: these go on in these new blocks."""
        self._inside += 1
        if blocks is not None:
            self._inside[crossing] = 0
            self._blocks[crossing] = blocks
            cache._widen(self._longest // cache.block_size + 1)
        if self._other_layers is not None:
            inside, others, first = self._other_layers
            inside[...] = self._inside
            np.add(self._blocks, first, out=others)
