"""FlashInfer's page table, read on the host, and made into the padded block table that this library's kernels read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ...arrays import View, current_stream, device_name, host_array, refuse, view
from ...attention import checking
from .arguments import Options, check_int
from .library import Array, Library


@dataclass(frozen=True, slots=True)
class Names:
    """What the caller's signature calls the three arrays."""

    indptr: str = "indptr"
    indices: str = "indices"
    last_page_len: str = "last_page_len"


PREFILL_NAMES = Names("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
_LARGE_TABLE = 1 << 26  # elements of int32
APPEND_NAMES = Names("kv_indptr", "kv_indices", "kv_last_page_len")


@dataclass(slots=True)
class Pages:
    """Which pages hold which sequence. The host knows how many, and which ones if `indices` came to it."""

    starts: np.ndarray  # int64 (batch + 1,): sequence b has entries starts[b] to starts[b + 1] of indices
    counts: np.ndarray  # int64 (batch,): pages of each sequence
    lengths: np.ndarray  # int64 (batch,): tokens of each sequence
    page_size: int
    indices: View  # int32 (starts[-1],) or more page ids
    names: Names
    known: bool = True  # the ids count, and are on the host, or read because CUPYATTN_CHECK asks for it
    own_table: bool = False  # the caller gave a block table, which is read instead of indices

    @property
    def batch(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    @property
    def widest(self) -> int:
        """Pages of the sequence that has most."""
        return int(np.maximum.reduce(self.counts, initial=0))

    def ids(self) -> np.ndarray:
        """int32 (total,) page ids; waits for the device if they are there."""
        if self.own_table:
            refuse("block_tables", "an array", "None beside ROPE_LLAMA and custom masks, which go by the page ids")
        return host_array(self.indices)[: self.total]

    @property
    def needed(self) -> int:
        """Pages that a cache must have by the ids that are known, or more than there can be if one is negative."""
        return int(np.maximum.reduce(self.ids().view(np.uint32))) + 1 if self.known and self.total else 0

    def check_ids(self, num_pages: int) -> None:
        """Refuse a page that the cache does not have, where the ids are known."""
        if num_pages >= self.needed:
            return
        ids = self.ids()
        at = int(np.flatnonzero((ids < 0) | (ids >= num_pages))[0])
        owner = int(np.searchsorted(self.starts, at, side="right")) - 1
        expected = f"0 to {num_pages - 1}, as the cache has {num_pages} pages" if num_pages else "a cache with pages"
        refuse(self.names.indices, f"page {int(ids[at])} at [{at}], of sequence {owner}", expected)

    def used(self, width: int) -> np.ndarray:
        """bool (batch, width): which entries of a table of so many columns are pages, in the order of indices."""
        return np.arange(width) < self.counts[:, None]


@dataclass(slots=True)
class PageViews:
    """The arrays of a page table, of the right forms; their contents have not been looked at."""

    starts: View
    ids: View
    last: View
    names: Names
    lengths: View | None  # of each sequence, if not what the others say

    @property
    def to_read(self) -> list[View]:
        """What the host must know: all but the ids."""
        return [self.starts, self.last] if self.lengths is None else [self.starts, self.last, self.lengths]

    def pages(self, page_size: int, starts: np.ndarray, last: np.ndarray, lengths: np.ndarray | None = None) -> Pages:
        """The page table, from what the arrays to be read hold, int64; refused by the names of the arguments."""
        names, batch, entries = self.names, len(last), self.ids.shape[0]
        counts = check_starts(names.indptr, starts, entries, f"{names.indices} has {entries} entries")
        inside = last.view(np.uint64) - 1 < page_size  # 0 wraps around
        if np.count_nonzero(inside) != batch:
            _refuse_last_page(names, last, (counts > 0) & ~inside, page_size)
        if lengths is not None:
            _check_lengths(lengths, counts * page_size)
        else:
            lengths = (counts - 1) * page_size + last
            if np.count_nonzero(counts) != batch:
                lengths[counts == 0] = 0
        return Pages(starts, counts, lengths, page_size, self.ids, names, checking(None, self.ids.device))


def _refuse_last_page(names: Names, last: np.ndarray, wrong: np.ndarray, page_size: int) -> None:
    """Refuse what sequences with pages must not have; others may have anything."""
    if wrong.any():
        at = int(np.argmax(wrong))
        expected = f"1 to page_size {page_size}: a last page is never empty, and a full one has page_size tokens"
        refuse(names.last_page_len, f"{int(last[at])} for sequence {at}", expected)


def _check_lengths(lengths: np.ndarray, capacity: np.ndarray) -> None:
    wrong = (lengths < 0) | (lengths > capacity)
    if wrong.any():
        at = int(np.argmax(wrong))
        expected = f"0 to {int(capacity[at])}, which its pages hold"
        refuse("seq_lens", f"{int(lengths[at])} for sequence {at}", expected)


def look_at_pages(
    indptr: Array, indices: Array, last_page_len: Array, device: int, names: Names, seq_lens: Array | None = None
) -> PageViews:
    """The arrays of a page table, refused by the names of the arguments where their forms are wrong.

    Args:
        indptr: int32 (batch + 1,).
        indices: int32 (n,).
        last_page_len: int32 (batch,).
        device: where the wrapper works, -1 for the CPU; arrays are there or on the host.
        names: of the three arguments.
        seq_lens: int32 (batch,) tokens of each sequence, if not what the three say.
    """
    starts = index_view(names.indptr, indptr, device)
    ids = index_view(names.indices, indices, device)
    last = index_view(names.last_page_len, last_page_len, device)
    batch = last.shape[0]
    if starts.shape[0] != batch + 1:
        refuse(names.indptr, f"{starts.shape[0]} entries", f"{batch + 1}: one more than {names.last_page_len} has")
    lengths = None if seq_lens is None else index_view("seq_lens", seq_lens, device)
    if lengths is not None and lengths.shape[0] != batch:
        refuse("seq_lens", f"{lengths.shape[0]} entries", f"{batch}, one for each sequence")
    return PageViews(starts, ids, last, names, lengths)


def read_pages(
    indptr: Array,
    indices: Array,
    last_page_len: Array,
    page_size: int,
    device: int,
    names: Names,
    seq_lens: Array | None = None,
) -> Pages:
    """The page table, checked. Arrays on a device are waited for, all but indices, which are not read there.

    Args:
        indptr: int32 (batch + 1,), starting at 0, never decreasing.
        indices: int32, at least (indptr[-1],).
        last_page_len: int32 (batch,), 1 to page_size, of any value for a sequence without pages.
        page_size: rows of a page.
        device, names, seq_lens: as in `look_at_pages`.

    Raises:
        TypeError, ValueError: an array does not fit. The message names it, what came and what was expected.
    """
    found = look_at_pages(indptr, indices, last_page_len, device, names, seq_lens)
    return found.pages(page_size, *read_together(found.to_read))


def index_view(name: str, array: Array, device: int, wide: bool = False) -> View:
    """The view of an int32 array (n,), or with `wide` an int64 one too, on the host, or on the wrapper's device."""
    found = view(array, name)
    if found.dtype != "int32" and not (wide and found.dtype == "int64"):
        cast = f"{name}.to(torch.int32)" if found.library == "torch" else f"{name}.astype(np.int32)"
        refuse(name, found.dtype, f"int32{' or int64' if wide else ''}: pass {cast}", TypeError)
    if len(found.shape) != 1:
        refuse(name, f"{len(found.shape)}-D shape {found.shape}", "1-D")
    if found.device >= 0 and found.device != device:
        refuse(name, f"an array on {device_name(found.device)}", f"one on {device_name(device)} or on the host")
    if found.shape[0] > 1 and found.strides[0] != 1:
        refuse(name, f"stride {found.strides[0]}", "a contiguous array")
    return found


def check_starts(name: str, starts: np.ndarray, most: int, because: str) -> np.ndarray:
    """The counts, int64 (batch,), of cumulative ones, which must start at 0, never decrease, and not exceed `most`."""
    if not len(starts):
        refuse(name, "an empty array", "batch + 1 entries, the first of them 0")
    if starts[0] != 0:
        refuse(name, f"{int(starts[0])} as its first entry", "0: cumulative counts, as in [0, 4, 10]")
    counts = starts[1:] - starts[:-1]
    falls = counts < 0
    if np.count_nonzero(falls):
        at = int(np.argmax(falls))
        got = f"{int(starts[at])} followed by {int(starts[at + 1])} at [{at + 1}]"
        refuse(name, got, "entries that never decrease")
    if starts[-1] > most:
        refuse(name, f"{int(starts[-1])} as its last entry", f"at most {most}, as {because}")
    return counts


def read_together(views: Sequence[View]) -> list[np.ndarray]:
    """int64 host arrays of int32 arrays (n,); those of one library on a device are waited for once."""
    on_device = [found for found in views if found.device >= 0]
    if not on_device or {found.library for found in on_device} not in ({"cupy"}, {"torch"}):
        return [host_array(found).astype(np.int64) for found in views]
    read = iter(_read_from_device(on_device))
    return [next(read) if found.device >= 0 else host_array(found).astype(np.int64) for found in views]


class _Room(threading.local):
    """Pinned memory of this thread, int32, that a device writes to and that is read at once."""

    array = np.empty(0, np.int32)

    def of(self, size: int) -> np.ndarray:
        """At least so many elements."""
        if len(self.array) < size:
            import cupyx

            self.array = cupyx.empty_pinned(1 << (size - 1).bit_length(), np.int32)
            self.address = self.array.ctypes.data
        return self.array


_room = _Room()


def _read_from_device(views: Sequence[View]) -> list[np.ndarray]:
    import cupy

    runtime, stream = cupy.cuda.runtime, current_stream(views[0])
    ends = [0, *accumulate(found.shape[0] for found in views)]
    room = _room.of(ends[-1])
    for found, start in zip(views, ends, strict=False):
        if found.shape[0]:
            place, size = _room.address + 4 * start, 4 * found.shape[0]
            runtime.memcpyAsync(place, found.pointer, size, runtime.memcpyDeviceToHost, stream)
    runtime.streamSynchronize(stream)
    return [room[start:end].astype(np.int64) for start, end in zip(ends, ends[1:], strict=False)]


class BlockTables:
    """The block table and the lengths that runs read, beside the wrapper's arrays.

    Every plan of as many sequences writes them to the same place, in the order of the current stream, as FlashInfer's
    plans write to its workspace. The table is as wide as a power of two, so that few forms occur.

    They are the last parts of one array, which begins with room for the ids of pages and for their places in the table.
    A mirror of it on the host says what goes there, in one transfer; on the CPU it is the array itself.

    Args:
        library: of the arrays.
        fixed: for CUDA graphs, whose arrays never move: (batch, columns, the most pages in all) of all plans.
    """

    __slots__ = (
        "library",
        "table",
        "lengths",
        "_fixed",
        "_form",
        "_own",
        "_address",
        "_first",
        "_table",
        "_mirror",
        "_mirrored",
    )

    def __init__(self, library: Library, fixed: tuple[int, int, int] | None = None) -> None:
        self.library = library
        self.table: Array = None  # int32 (batch, columns)
        self.lengths: Array = None  # int32 (batch,)
        self._fixed = fixed is not None
        self._form: tuple[int, int] | None = None
        if fixed is not None:
            batch, columns, most = fixed
            self._allocate(batch, columns, 2 * most)
            self.table = self._own

    def make_room(self, pages: Pages, table: Array | None = None) -> None:
        """Say which arrays these pages will be in: the caller's own table, if there is one. The device is current."""
        if not self._fixed:
            columns = 1 if table is not None else 1 << (max(pages.widest, 1) - 1).bit_length()
            if self._form != (pages.batch, columns):
                self._allocate(pages.batch, columns, pages.batch * columns)
        self.table = self._own if table is None else table

    def _allocate(self, batch: int, columns: int, spare: int) -> None:
        """A new array, with so much room before the lengths and the table."""
        library, first = self.library, _rounded(spare)
        self._table = table = first + _rounded(batch)
        size = table + batch * columns
        room = library.zeros((size,), "int32") if self._fixed else library.empty((size,), "int32")
        self.lengths, self._own = room[first : first + batch], room[table:].reshape(batch, columns)
        self._form, self._first, self._address = (batch, columns), first, view(room).pointer
        if library.device < 0:
            self._mirror = host_array(view(room))
        else:  # of a fixed table there is none: it is as wide as any sequence can become
            self._mirror = np.zeros(table if self._fixed else size, np.int32)
        self._mirrored = self._mirror.ctypes.data

    def write(self, pages: Pages) -> None:
        """Make the arrays those of the pages that there is room for. The device is the current one."""
        (batch, columns), first, mirror = self._form, self._first, self._mirror
        mirror[first : first + batch] = pages.lengths
        if self.table is not self._own:
            self._send(first, first + batch)
        elif pages.known and len(mirror) > self._table:
            used, table = pages.used(columns), self._table
            mirror[table:].reshape(batch, columns)[used] = pages.ids()
            self._send(first, len(mirror))
        elif not pages.total:
            self._send(first, first + batch)
        else:
            self._scatter(pages)

    def _scatter(self, pages: Pages) -> None:
        """Send the lengths and the places of the ids, and the ids if the host has them; put these there on the device.

        What no sequence reaches is never read.
        """
        from ...kernels.copy_rows import write_entries  # needs CuPy

        (batch, columns), mirror, total = self._form, self._mirror, pages.total
        places = self._first - total
        sent = places - total if pages.known else places
        mirror[places : self._first] = _places(pages, columns)
        if pages.known:
            mirror[sent:places] = pages.ids()
        self._send(sent, self._first + batch)
        ids = self._address + 4 * sent if pages.known else pages.indices.pointer
        table = self._address + 4 * self._table
        write_entries(self.library.device, table, self._address + 4 * places, ids, total, self.library.stream)

    def _send(self, first: int, last: int) -> None:
        if self.library.device >= 0:
            self.library.send(self._mirrored + 4 * first, self._address + 4 * first, 4 * (last - first))


def tables_of(library: Library, pages: Pages) -> BlockTables:
    """New tables that hold these pages. The device is the current one."""
    tables = BlockTables(library)
    tables.make_room(pages)
    tables.write(pages)
    return tables


def _places(pages: Pages, columns: int) -> np.ndarray:
    """int64 (total,): where the ids belong in a table of so many columns."""
    width = min(columns, pages.widest)
    places = np.flatnonzero(pages.used(width))
    return places if width == columns else places + places // width * (columns - width)


def _rounded(elements: int) -> int:
    """Up to a multiple of 16 bytes of int32, so that all tables are aligned alike."""
    return -(-elements // 4) * 4


class FixedTables:
    """The tables of a wrapper for CUDA graphs, which stay where they are.

    Args:
        library: of the arrays.
        names: of the three buffers.
        buffers: int32 (batch + 1,), (most pages in all,) and (batch,), whose sizes count.
        max_pages: the most of one sequence; if None as many as there are in all, but for tables of 256 MB and more.
    """

    def __init__(
        self, library: Library, names: Names, buffers: tuple[Array, Array, Array], max_pages: int | None
    ) -> None:
        found = []
        for name, buffer in zip((names.indptr, names.indices, names.last_page_len), buffers, strict=True):
            if buffer is None:
                refuse(name, None, "an int32 array, as use_cuda_graph is given")
            found.append(index_view(name, buffer, library.device).shape[0])
        starts, self._most, self.batch = found
        if starts != self.batch + 1:
            refuse(names.indptr, f"{starts} entries", f"{self.batch + 1}: one more than {names.last_page_len} has")
        if max_pages is None:  # of large batches no sequence has all that there are
            columns = min(self._most, max(_LARGE_TABLE, self._most) // max(self.batch, 1) + 1)
        else:
            columns = check_int("max_pages_per_request", max_pages, 1)
        self._columns = max(columns, 1)
        self._tables = BlockTables(library, (self.batch, self._columns, self._most))

    def tables_for(self, options: Options, pages: Pages) -> BlockTables:
        """The tables, if what is planned can stand in them."""
        names = pages.names
        if options.rotates:
            expected = "'NONE' in a wrapper for CUDA graphs: rotate keys before they are appended, by apply_rope"
            refuse("pos_encoding_mode", "'ROPE_LLAMA'", expected)
        if pages.batch != self.batch:
            expected = f"{self.batch + 1}, the batch size of a wrapper for CUDA graphs being that of its buffers"
            refuse(names.indptr, f"{pages.batch + 1} entries", expected)
        if pages.total > self._most:
            refuse(names.indices, f"{pages.total} pages", f"at most {self._most}, which the buffer for them has")
        if pages.widest > self._columns:
            expected = f"at most {self._columns}: make the wrapper with a larger max_pages_per_request"
            refuse(names.indptr, f"a sequence of {pages.widest} pages", expected)
        return self._tables


def check_table(block_tables: Array, pages: Pages, device: int) -> None:
    """Refuse a block table of the caller's unless it is int32 (batch, pages of the longest or more) on the device."""
    found = view(block_tables, "block_tables")
    if found.dtype != "int32":
        refuse("block_tables", found.dtype, "int32", TypeError)
    if len(found.shape) != 2 or found.shape[0] != pages.batch or found.shape[1] < pages.widest:
        refuse("block_tables", f"shape {found.shape}", f"({pages.batch}, at least {pages.widest})")
    if found.device != device:
        refuse("block_tables", f"an array on {device_name(found.device)}", f"one on {device_name(device)}")
    pages.own_table, pages.known = True, False
