"""Where the blocks of a cache lie, and how their rows are moved: `HostStore` in NumPy arrays, `DeviceStore` on CUDA.

A store knows of bytes and block ids, and nothing of sequences. On the device each call is one launch, behind the copy
of its list of blocks, on the stream that it is given, and nothing waits. A call that raises has written nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import View, numpy_dtype, on_device, view
from .transfer import DeviceTransfer, HostTransfer

if TYPE_CHECKING:
    from ..kernels.copy_rows import Side

Array = Any  # of NumPy or CuPy
Pair = tuple[Array, Array]  # keys and values


@dataclass(frozen=True, slots=True)
class Form:
    """The blocks of one cache. float8 dtypes are stored as uint8, which every library can hold."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    layout: str  # "NHD" or "HND"
    combined: bool

    @property
    def stored(self) -> np.dtype:
        """The dtype of the arrays."""
        return np.dtype(np.uint8) if self.is_fp8 else numpy_dtype(self.dtype)

    @property
    def is_fp8(self) -> bool:
        return self.dtype.startswith("float8")

    @property
    def block(self) -> tuple[int, int, int]:
        """Shape of one block of keys or values."""
        rows, heads = self.block_size, self.num_kv_heads
        return (rows, heads, self.head_dim) if self.layout == "NHD" else (heads, rows, self.head_dim)

    @property
    def nbytes(self) -> int:
        return 2 * self.num_layers * self.num_blocks * math.prod(self.block) * self.stored.itemsize

    def shape(self) -> tuple[int, ...]:
        """Of the one array that holds all: (layers, blocks, 2, …) if combined, else (2, layers, blocks, …)."""
        outer = self.num_layers, self.num_blocks
        return (*outer, 2, *self.block) if self.combined else (2, *outer, *self.block)


class _Store:
    """What both have in common: the arrays, and views of them."""

    def __init__(self, form: Form, data: Array, transfer: HostTransfer | DeviceTransfer) -> None:
        self.form = form
        self.transfer = transfer
        self.data = data
        self.k, self.v = (data[:, :, 0], data[:, :, 1]) if form.combined else (data[0], data[1])
        # All layers' blocks in one line, for kernels that know of no layers: block b of layer n is n * num_blocks + b.
        flat = data.reshape(-1, *data.shape[2:]) if form.combined else data.reshape(2, -1, *data.shape[3:])
        flat = (flat[:, 0], flat[:, 1]) if form.combined else (flat[0], flat[1])
        self.flat: tuple[View, View] = (view(flat[0], "k_cache"), view(flat[1], "v_cache"))


class HostStore(_Store):
    """Blocks in NumPy arrays. A stream is nothing here."""

    def __init__(self, form: Form) -> None:
        super().__init__(form, np.zeros(form.shape(), form.stored), HostTransfer())

    def copy_blocks(self, source: np.ndarray, target: np.ndarray, stream: int) -> None:
        """Blocks of the store to others of it, in every layer."""
        self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]

    def gather(self, blocks: np.ndarray, start: int, stop: int, stream: int) -> Pair:
        """Tokens start to stop - 1 of the sequence in these blocks: two arrays (layers, tokens, heads, head_dim)."""
        block, row = np.divmod(np.arange(start, stop), self.form.block_size)
        k, v = (np.ascontiguousarray(self._rows(array)[:, blocks[block], row]) for array in (self.k, self.v))
        return k, v

    def swap_out(self, blocks: np.ndarray, stream: int) -> Pair:
        """Copies of these blocks in host memory: two arrays (layers, len(blocks), …) of the store's layout."""
        return self.k[:, blocks], self.v[:, blocks]

    def swap_in(self, held: Pair, picks: np.ndarray, blocks: np.ndarray, stream: int) -> None:
        """Blocks number `picks` of what `swap_out` gave, into these blocks."""
        self.k[:, blocks], self.v[:, blocks] = held[0][:, picks], held[1][:, picks]

    def _rows(self, array: np.ndarray) -> np.ndarray:
        """(layers, blocks, rows, heads, head_dim), whatever the layout."""
        return array if self.form.layout == "NHD" else array.swapaxes(2, 3)


class DeviceStore(_Store):
    """Blocks in CuPy arrays of one device, which is the current one in every call but the first."""

    def __init__(self, form: Form, device: int) -> None:
        import cupy

        with on_device(device):
            data = cupy.zeros(form.shape(), form.stored)
            cupy.cuda.get_current_stream().synchronize()  # whatever stream writes to it first
        super().__init__(form, data, DeviceTransfer(device))
        self._moving: list[tuple[Any, Pair]] = []  # host memory that is in use, and until when
        self._in_cache = self._strides(self.k)

    def copy_blocks(self, source: np.ndarray, target: np.ndarray, stream: int) -> None:
        lists = self.transfer.send(np.stack([source, target]).astype(np.int32), stream)
        sides = (self._cache_side(self._pointer(lists)), self._cache_side(self._pointer(lists, len(source))))
        self._copy(*sides, 0, len(source) * self.form.block_size, stream)

    def gather(self, blocks: np.ndarray, start: int, stop: int, stream: int) -> Pair:
        import cupy

        form = self.form
        rows = cupy.ndarray((2, form.num_layers, stop - start, form.num_kv_heads, form.head_dim), form.stored)
        if rows.size:
            first = start // form.block_size
            wanted = blocks[first : -(-stop // form.block_size)].astype(np.int32)
            listed = self.transfer.send(wanted, stream)
            target = self._side(rows[0], rows[1], self._token_strides(rows[0]))
            source = self._cache_side(self._pointer(listed))
            self._copy(source, target, start - first * form.block_size, stop - start, stream)
        return rows[0], rows[1]

    def swap_out(self, blocks: np.ndarray, stream: int) -> Pair:
        """To pinned memory, which the kernel writes across the bus. It holds the blocks when the stream is done."""
        import cupyx

        form = self.form
        self._let_go()
        held = cupyx.empty_pinned((2, form.num_layers, len(blocks), *form.block), form.stored)
        if held.size:
            listed = self.transfer.send(blocks.astype(np.int32), stream)
            target = self._side(held[0], held[1], self._strides(held[0]))
            self._copy(self._cache_side(self._pointer(listed)), target, 0, len(blocks) * form.block_size, stream)
        pair = held[0], held[1]
        self._hold(pair, stream)
        return pair

    def swap_in(self, held: Pair, picks: np.ndarray, blocks: np.ndarray, stream: int) -> None:
        if not len(picks):
            return
        lists = self.transfer.send(np.stack([picks, blocks]).astype(np.int32), stream)
        source = self._side(*held, self._strides(held[0]), self._pointer(lists))
        self._copy(
            source, self._cache_side(self._pointer(lists, len(picks))), 0, len(picks) * self.form.block_size, stream
        )
        self._hold(held, stream)

    def _hold(self, held: Pair, stream: int) -> None:
        """Keep host memory from its pool until the work on this stream that reads or writes it is done."""
        import cupy

        self._let_go()
        done = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(done.ptr, stream)
        self._moving.append((done, held))

    def _let_go(self) -> None:
        """Give host memory back to its pool that nothing reads or writes any more."""
        self._moving = [moving for moving in self._moving if not moving[0].done]

    def _copy(self, source: Side, target: Side, first: int, tokens: int, stream: int) -> None:
        from ..kernels.copy_rows import copy_rows

        form = self.form
        copy_rows(
            self.transfer.device,
            source,
            target,
            stream,
            first=first,
            tokens=tokens,
            layers=form.num_layers,
            block_size=form.block_size,
            heads=form.num_kv_heads,
            head_bytes=form.head_dim * form.stored.itemsize,
        )

    def _cache_side(self, blocks: int) -> Side:
        return self._side(self.k, self.v, self._in_cache, blocks)

    @staticmethod
    def _side(k: Array, v: Array, strides: tuple[int, int, int, int], blocks: int = 0) -> Side:
        from ..kernels.copy_rows import Side

        return Side(DeviceStore._pointer(k), DeviceStore._pointer(v), blocks, strides)

    @staticmethod
    def _pointer(array: Array, entries: int = 0) -> int:
        """The address of an array of either library, or so many entries behind it."""
        base = array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
        return base + entries * array.dtype.itemsize

    def _strides(self, array: Array) -> tuple[int, int, int, int]:
        """Bytes from layer to layer, block to block, row to row, head to head of an array of the store's layout."""
        layer, block, *inner, _ = array.strides
        row, head = inner if self.form.layout == "NHD" else reversed(inner)
        return layer, block, row, head

    def _token_strides(self, rows: Array) -> tuple[int, int, int, int]:
        """The same of (layers, tokens, heads, head_dim), cut into blocks."""
        layer, row, head, _ = rows.strides
        return layer, self.form.block_size * row, row, head
