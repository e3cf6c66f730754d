"""BlockTable: which blocks hold which sequence, as attention reads it, with a mirror on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..arrays import host_array, refuse, stands_for, view
from .allocator import count_of
from .transfer import DeviceTransfer, HostTransfer, transfer_to

Array = Any  # of NumPy, CuPy or any library that speaks DLPack
PADDING = -1
INT32_MAX = np.iinfo(np.int32).max


class BlockTable:
    """Block ids, int32 (batch, max_blocks): token n of sequence b is row n % block_size of block [b, n // block_size].

    A mirror on the host answers everything that is asked of it, so that looking never waits for the device. Entries
    behind a sequence's last block are -1. Give it as the `block_table` of any attention function, with `seqlens` as
    `cache_seqlens`; it also exports DLPack. Rows change through `update`, which sends the device only what is new. A
    table that becomes too narrow doubles, so that growing token by token seldom changes `max_blocks` or addresses.

    Args:
        blocks: the block ids of each sequence, (batch, max_blocks) or a list of rows; only the first
            ceil(seqlens[b] / block_size) of each count.
        seqlens: (batch,) tokens of each sequence.
        block_size: tokens in a block.
        device: None for NumPy, or the number of a CUDA device.
        max_blocks: columns that there are at least.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> from cupyattn import BlockTable
    >>> table = BlockTable([[5, 2], [7]], [20, 3], block_size=16)
    >>> table
    BlockTable(2 sequences of 3 to 20 tokens, blocks of 16, max_blocks 2, cpu)
    >>> [array.tolist() for array in table.to_flashinfer()]
    [[0, 2, 3], [5, 2, 7], [4, 3]]
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]] | np.ndarray,
        seqlens: Sequence[int] | np.ndarray,
        block_size: int,
        *,
        device: int | None = None,
        max_blocks: int = 0,
    ) -> None:
        block_size, max_blocks = count_of("block_size", block_size, 1), count_of("max_blocks", max_blocks)
        lengths = _lengths("seqlens", seqlens)
        if not hasattr(blocks, "__len__"):
            refuse("blocks", type(blocks).__name__, "a row of block ids for each sequence", TypeError)
        if len(blocks) != len(lengths):
            refuse("blocks", f"{len(blocks)} rows", f"{len(lengths)}, one for each of seqlens")
        counts = -(-lengths // block_size)
        host = np.full((len(lengths), max(max_blocks, counts.max(initial=0))), PADDING, np.int32)
        for b, (row, count) in enumerate(zip(blocks, counts.tolist(), strict=True)):
            host[b, :count] = _block_ids(f"blocks[{b}]", row, count)
        self._set(host, lengths, block_size, transfer_to(device), None)

    def _set(
        self,
        host: np.ndarray,
        lengths: np.ndarray,
        block_size: int,
        transfer: HostTransfer | DeviceTransfer,
        stream: int | None,
    ) -> None:
        self.block_size = block_size
        self._of_a_cache = False
        self._host, self._lengths, self._transfer = host, lengths, transfer
        self._sent_lengths: Array | None = None
        with transfer.current() as current:
            self._array = transfer.send(host, current if stream is None else stream)

    @classmethod
    def _of_cache(
        cls, host: np.ndarray, lengths: np.ndarray, block_size: int, transfer: HostTransfer | DeviceTransfer
    ) -> BlockTable:
        """A table that a cache keeps up to date: host int32 (batch, max_blocks), lengths int64 (batch,), its own."""
        table = object.__new__(cls)
        table._set(host, lengths, block_size, transfer, None)
        table._of_a_cache = True
        return table

    # ------------------------------------------------------------------------------------------- conversions

    @classmethod
    def from_flashinfer(
        cls,
        indptr: Array,
        indices: Array,
        last_page_len: Array,
        block_size: int,
        *,
        device: int | None = None,
        max_blocks: int = 0,
    ) -> BlockTable:
        """From FlashInfer's page table, integer arrays of any library (one on a GPU is read, which waits for it).

        Args:
            indptr: (batch + 1,): entries indptr[b] to indptr[b + 1] of indices are the blocks of sequence b.
            indices: (indptr[-1],) block ids, or more.
            last_page_len: (batch,) tokens in each sequence's last block, 1 to block_size; of any value for a sequence
                without blocks.
        """
        block_size = count_of("block_size", block_size, 1)
        indptr, indices = _integers("indptr", indptr), _integers("indices", indices)
        last = _integers("last_page_len", last_page_len)
        if not len(indptr) or indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] > len(indices):
            refuse("indptr", _short(indptr), f"numbers from 0 to at most {len(indices)} that never decrease")
        counts = np.diff(indptr)
        if len(last) != len(counts):
            refuse("last_page_len", f"{len(last)} entries", f"{len(counts)}, one for each sequence of indptr")
        bad = np.flatnonzero((counts > 0) & ((last < 1) | (last > block_size)))
        if len(bad):
            refuse("last_page_len", f"{last[bad[0]]} for sequence {bad[0]}", f"1 to {block_size}")
        lengths = np.where(counts > 0, (counts - 1) * block_size + last, 0)
        rows = np.split(indices[: indptr[-1]], indptr[1:-1]) if len(counts) else []
        return cls(rows, lengths, block_size, device=device, max_blocks=max_blocks)

    def to_flashinfer(self) -> tuple[Array, Array, Array]:
        """(indptr (batch + 1,), indices (blocks in all,), last_page_len (batch,)), int32, beside the table.

        The last page of an empty sequence has 0 tokens.
        """
        indptr = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        last = np.where(self._lengths > 0, (self._lengths - 1) % self.block_size + 1, 0).astype(np.int32)
        used = np.arange(self.max_blocks) < self.counts[:, None]
        with self._transfer.current() as stream:
            indptr, indices, last = (self._transfer.send(x, stream) for x in (indptr, self._host[used], last))
        return indptr, indices, last

    @classmethod
    def from_flash_attn(
        cls,
        block_table: Array,
        cache_seqlens: Array,
        block_size: int,
        *,
        device: int | None = None,
    ) -> BlockTable:
        """From flash_attn's arguments of these names, (batch, max_blocks) and (batch,), of any library."""
        table = _host("block_table", block_table)
        if table.ndim != 2:
            refuse("block_table", f"shape {table.shape}", "(batch, max_blocks)")
        return cls(table, _host("cache_seqlens", cache_seqlens), block_size, device=device, max_blocks=table.shape[1])

    def to_flash_attn(self, padding: int = 0) -> tuple[Array, Array]:
        """(block_table (batch, max_blocks), cache_seqlens (batch,)), int32: copies, with another padding than -1."""
        padding = count_of("padding", padding, -INT32_MAX - 1)
        if padding > INT32_MAX:
            refuse("padding", padding, "an int32")
        host = np.where(self._host == PADDING, np.int32(padding), self._host)
        with self._transfer.current() as stream:
            return self._transfer.send(host, stream), self._transfer.send(self._lengths.astype(np.int32), stream)

    # -------------------------------------------------------------------------------------- growth, validation

    def update(
        self, rows: Sequence[int] | np.ndarray, blocks: Sequence[Sequence[int]] | np.ndarray, seqlens: Sequence[int]
    ) -> None:
        """Make these rows say something else: `blocks` and `seqlens` as in the class, an entry for each of `rows`.

        Work is queued on CuPy's current stream, which must be the one that reads the table, or ordered with it. A table
        that `PagedKVCache.block_table` gave is not to be updated: ValueError.
        """
        if self._of_a_cache:
            refuse("update", "a table of a PagedKVCache, which keeps it as the cache is", "a BlockTable made by itself")
        index = _integers("rows", rows)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            refuse("rows", f"{index.min()} to {index.max()}", f"0 to {len(self) - 1}", IndexError)
        if len(np.unique(index)) != len(index):
            refuse("rows", "a row twice", "each row once")
        new = BlockTable(blocks, seqlens, self.block_size)
        if len(new) != len(index):
            refuse("seqlens", f"{len(new)} entries", f"{len(index)}, one for each of rows")
        self._update(index, new._host, new._lengths)

    def _update(self, rows: np.ndarray, blocks: np.ndarray, lengths: np.ndarray) -> None:
        """The same of what is known to fit: int32 (len(rows), any width), padded."""
        width = blocks.shape[1]
        with self._transfer.current() as stream:
            if width > self.max_blocks:
                grown = np.full((len(self), max(width, 2 * self.max_blocks)), PADDING, np.int32)
                grown[:, : self.max_blocks] = self._host
                grown[rows, :width] = blocks
                grown[rows, width:] = PADDING
                self._array = self._transfer.send(grown, stream)
                self._host = grown
                self._note_lengths(rows, lengths)
                return
            wanted = np.full((len(rows), self.max_blocks), PADDING, np.int32)
            wanted[:, :width] = blocks
            row, column = np.nonzero(self._host[rows] != wanted)
            values = wanted[row, column]
            index = (rows[row] * self.max_blocks + column).astype(np.int32)
            self._transfer.write(self._array, index, values, stream)
            self._host[rows[row], column] = values  # only now: what failed is to be sent again
            self._note_lengths(rows, lengths)

    def _set_lengths(self, lengths: np.ndarray) -> None:
        """Other lengths of all sequences, of as many blocks each: int64 (batch,), the table's own."""
        if not np.array_equal(lengths, self._lengths):
            self._lengths, self._sent_lengths = lengths, None

    def _note_lengths(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._lengths[rows] = lengths
        self._sent_lengths = None

    def validate(self, num_blocks: int, *, exclusive: bool = False) -> None:
        """Check that all blocks are among `num_blocks` and that no sequence has one twice.

        exclusive: nor do two sequences share one. Raises ValueError that names sequence and block.
        """
        num_blocks = count_of("num_blocks", num_blocks)
        used = np.arange(self.max_blocks) < self.counts[:, None]
        ids = np.where(used, self._host, 0)
        bad = np.argwhere((ids < 0) | (ids >= num_blocks))
        if len(bad):
            b, i = bad[0]
            refuse("block_table", f"block {ids[b, i]} at [{b}, {i}]", f"0 to {num_blocks - 1}")
        sequence, _ = np.nonzero(used)
        owner = np.zeros(len(sequence), np.int64) if exclusive else sequence
        keys, counts = np.unique(np.stack([owner, self._host[used]]), axis=1, return_counts=True)
        if (counts > 1).any():
            block = keys[1, counts > 1][0]
            who = ", ".join(map(str, sequence[self._host[used] == block][:2].tolist()))
            refuse("block_table", f"block {block} twice, in sequences {who}", "each block once")

    # --------------------------------------------------------------------------------------------- NumPy-like

    @property
    def array(self) -> Array:
        """The table itself, int32 (batch, max_blocks), a NumPy or a CuPy array. `update` writes into it."""
        return self._array

    @property
    def seqlens(self) -> Array:
        """Tokens of each sequence, int32 (batch,), beside the table. A new array after each change of lengths."""
        if self._sent_lengths is None:
            with self._transfer.current() as stream:
                self._sent_lengths = self._transfer.send(self._lengths.astype(np.int32), stream)
        return self._sent_lengths

    @property
    def host(self) -> np.ndarray:
        """The mirror: int32 (batch, max_blocks), read-only."""
        found = self._host.view()
        found.flags.writeable = False
        return found

    @property
    def host_seqlens(self) -> np.ndarray:
        """Tokens of each sequence: int64 (batch,), on the host."""
        return self._lengths.copy()

    @property
    def counts(self) -> np.ndarray:
        """Blocks of each sequence: int64 (batch,), on the host."""
        return -(-self._lengths // self.block_size)

    @property
    def device(self) -> int | None:
        """The number of the CUDA device; None for NumPy."""
        return None if self._transfer.device < 0 else self._transfer.device

    @property
    def max_blocks(self) -> int:
        return self._host.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self._host.shape

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> np.dtype:
        return self._host.dtype

    @property
    def nbytes(self) -> int:
        return self._host.nbytes

    def __len__(self) -> int:
        return len(self._host)

    def __getitem__(self, index: Any) -> Any:
        """As of the NumPy array (batch, max_blocks); from the mirror."""
        return self.host[index]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The blocks of each sequence without padding, from the mirror."""
        return (row[:count] for row, count in zip(self.host, self.counts.tolist(), strict=True))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._host, dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __repr__(self) -> str:
        low, high = self._lengths.min(initial=INT32_MAX), self._lengths.max(initial=0)
        span = "" if not len(self) else f" of {low} tokens" if low == high else f" of {low} to {high} tokens"
        count = f"{len(self)} sequence" + ("" if len(self) == 1 else "s")
        where = "cpu" if self.device is None else f"cuda:{self.device}"
        return f"BlockTable({count}{span}, blocks of {self.block_size}, max_blocks {self.max_blocks}, {where})"


stands_for(BlockTable, "array")


def _host(name: str, array: Any) -> np.ndarray:
    """Any array, or a list, on the host."""
    return np.asarray(array) if isinstance(array, (list, tuple, range)) else host_array(view(array, name))


def _integers(name: str, array: Any) -> np.ndarray:
    numbers = _host(name, array)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        refuse(name, f"{numbers.dtype} of shape {numbers.shape}", "a 1-D array of integers", TypeError)
    return numbers.astype(np.int64)


def _lengths(name: str, array: Any) -> np.ndarray:
    lengths = _integers(name, array)
    if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= INT32_MAX:
        refuse(name, f"{lengths.min()} to {lengths.max()}", f"0 to {INT32_MAX}")
    return lengths


def _block_ids(name: str, row: Any, count: int) -> np.ndarray:
    """The first `count` of a row, which are ids; those behind them may be anything."""
    ids = np.asarray(row)
    if ids.ndim != 1:
        refuse(name, f"shape {ids.shape}", "a 1-D row of block ids", TypeError)
    if len(ids) < count:
        refuse(name, f"{len(ids)} blocks", f"{count}, as seqlens says")
    ids = ids[:count]
    if ids.size and ids.dtype.kind not in "iu":
        refuse(name, ids.dtype, "integers", TypeError)
    if ids.size and not 0 <= ids.min() <= ids.max() <= INT32_MAX:
        refuse(name, f"{ids.min()} to {ids.max()}", f"0 to {INT32_MAX}")
    return ids


def _short(numbers: np.ndarray) -> str:
    return np.array2string(numbers, threshold=8, edgeitems=3)
