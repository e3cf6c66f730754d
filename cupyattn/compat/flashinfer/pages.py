"""FlashInfer's page table, read on the host, and made into the padded block table that this library's kernels read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ...arrays import View, current_stream, device_name, host_array, refuse, view
from ...attention import checking
from ...kernels.page_table import FILLED, MOST_TOGETHER, REFUSED, SUMMARY_WORDS, fill_table, read_indices, take_table
from .arguments import Options, check_int
from .library import Array, Library, cuda_runtime


@dataclass(frozen=True, slots=True)
class Names:
    """What the caller's signature calls the three arrays."""

    indptr: str = "indptr"
    indices: str = "indices"
    last_page_len: str = "last_page_len"


PREFILL_NAMES = Names("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")
APPEND_NAMES = Names("kv_indptr", "kv_indices", "kv_last_page_len")
_LARGE_TABLE = 1 << 26  # elements of int32

IndexArray = np.ndarray | View
"""int32 (n,), contiguous: a NumPy array on the host, or the view of an array on the device."""


@dataclass(slots=True)
class Pages:
    """Which pages hold which sequence. The host knows how many, and which ones if `indices` came to it."""

    starts: np.ndarray  # integers (batch + 1,): sequence b has entries starts[b] to starts[b + 1] of indices
    found_counts: np.ndarray | None  # what `counts` comes to, once somebody asks
    page_size: int
    indices: IndexArray  # int32 (starts[-1],) or more page ids
    names: Names
    last: np.ndarray | None = None  # integers (batch,): tokens in each last page, of any number where there is no page
    tokens: np.ndarray | None = None  # int64 (batch,): of each sequence; what `last` comes to, once somebody asks
    known: bool = True  # the ids count, and are on the host, or read because CUPYATTN_CHECK asks for it
    own_table: bool = False  # the caller gave a block table, which is read instead of indices
    there: tuple[View, View] | None = None  # indptr and last_page_len, where both are on the device and say the lengths
    in_place: bool = False  # the device has already made the block table and the lengths of them
    widest: int = -1  # pages of the sequence that has most; found if -1
    batch: int = field(init=False)
    total: int = field(init=False)  # pages of all sequences

    def __post_init__(self) -> None:
        self.batch, self.total = len(self.starts) - 1, int(self.starts[-1])
        if self.widest < 0:
            self.widest = largest(self.counts)

    @property
    def counts(self) -> np.ndarray:
        """int64 (batch,): pages of each sequence."""
        if self.found_counts is None:
            self.found_counts = counts_of(self.starts)
        return self.found_counts

    @property
    def lengths(self) -> np.ndarray:
        """int64 (batch,): tokens of each sequence."""
        if self.tokens is None:
            self.tokens = tokens = (self.counts - 1) * self.page_size
            tokens += self.last
            if np.count_nonzero(self.counts) != self.batch:
                tokens[self.counts == 0] = 0
        return self.tokens

    def ids(self) -> np.ndarray:
        """int32 (total,) page ids; waits for the device if they are there."""
        if self.own_table:
            refuse("block_tables", "an array", "None beside ROPE_LLAMA and custom masks, which go by the page ids")
        indices = self.indices
        return (indices if type(indices) is np.ndarray else host_array(indices))[: self.total]

    @property
    def needed(self) -> int:
        """Pages that a cache must have by the ids that are known, or more than there can be if one is negative."""
        return largest(self.ids().view(np.uint32)) + 1 if self.known and self.total else 0

    def check_ids(self, num_pages: int) -> None:
        """Refuse a page that the cache does not have, where the ids are known."""
        if num_pages >= self.needed:
            return
        ids = self.ids()
        at = int(np.flatnonzero((ids < 0) | (ids >= num_pages))[0])
        owner = int(np.searchsorted(self.starts, at, side="right")) - 1
        expected = f"0 to {num_pages - 1}, as the cache has {num_pages} pages" if num_pages else "a cache with pages"
        refuse(self.names.indices, f"page {int(ids[at])} at [{at}], of sequence {owner}", expected)


def counts_of(starts: np.ndarray) -> np.ndarray:
    """int64 (n,) counts from cumulative ones, integers (n + 1,), that have been checked."""
    return np.diff(starts).astype(np.int64)


def largest(numbers: np.ndarray) -> int:
    """The largest of integers (n,) that are not negative; 0 if there are none."""
    return int(numbers[numbers.argmax()]) if len(numbers) else 0  # sooner than max() for few numbers


@dataclass(slots=True)
class PageArrays:
    """The arrays of a page table, of the right forms; their contents have not been looked at."""

    starts: IndexArray
    ids: IndexArray
    last: IndexArray
    names: Names
    lengths: IndexArray | None  # of each sequence, if not what the others say

    @property
    def to_read(self) -> list[IndexArray]:
        """What the host must know: all but the ids."""
        return [self.starts, self.last] if self.lengths is None else [self.starts, self.last, self.lengths]

    def pages(self, page_size: int, starts: np.ndarray, last: np.ndarray, lengths: np.ndarray | None = None) -> Pages:
        """The page table, from what the arrays to be read hold, int64; refused by the names of the arguments."""
        names, entries = self.names, self.ids.shape[0]
        counts = check_starts(names.indptr, starts, entries, f"{names.indices} has {entries} entries")
        if len(last) and (last[last.argmin()] < 1 or last[last.argmax()] > page_size):
            _check_last_pages(names, last, counts, page_size)
        if lengths is not None:
            _check_lengths(lengths, counts * page_size)
        there = None
        if lengths is None and type(self.starts) is View and type(self.last) is View:
            there = self.starts, self.last
        known = type(self.ids) is np.ndarray or checking(None, self.ids.device)
        return Pages(starts, counts, page_size, self.ids, names, last, lengths, known, there=there)


def _check_last_pages(names: Names, last: np.ndarray, counts: np.ndarray, page_size: int) -> None:
    """Refuse what sequences with pages must not have; others may have anything."""
    wrong = (counts > 0) & ((last < 1) | (last > page_size))
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
) -> PageArrays:
    """The arrays of a page table, refused by the names of the arguments where their forms are wrong.

    Args:
        indptr: int32 (batch + 1,).
        indices: int32 (n,).
        last_page_len: int32 (batch,).
        device: where the wrapper works, -1 for the CPU; arrays are there or on the host.
        names: of the three arguments.
        seq_lens: int32 (batch,) tokens of each sequence, if not what the three say.
    """
    starts = index_array(names.indptr, indptr, device)
    ids = index_array(names.indices, indices, device)
    last = index_array(names.last_page_len, last_page_len, device)
    batch = last.shape[0]
    if starts.shape[0] != batch + 1:
        refuse(names.indptr, f"{starts.shape[0]} entries", f"{batch + 1}: one more than {names.last_page_len} has")
    lengths = None if seq_lens is None else index_array("seq_lens", seq_lens, device)
    if lengths is not None and lengths.shape[0] != batch:
        refuse("seq_lens", f"{lengths.shape[0]} entries", f"{batch}, one for each sequence")
    return PageArrays(starts, ids, last, names, lengths)


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


_INT32 = np.dtype(np.int32)


def index_array(name: str, array: Array, device: int) -> IndexArray:
    """An int32 array (n,) on the host or on the wrapper's device."""
    if type(array) is np.ndarray and array.dtype is _INT32 and array.ndim == 1 and array.flags.c_contiguous:
        return array  # as nearly all that come on the host are; a view of them would cost several times as much
    found = view(array, name)
    if not (found.dtype == "int32" and found.device == device and found.strides == (1,)):  # as on the device
        _check_index(name, found, device, False)
    return found if found.device >= 0 else host_array(found)


def index_view(name: str, array: Array, device: int, wide: bool = False) -> View:
    """The view of an int32 array (n,), or with `wide` an int64 one too, on the host, or on the wrapper's device."""
    found = view(array, name)
    _check_index(name, found, device, wide)
    return found


def _check_index(name: str, found: View, device: int, wide: bool) -> None:
    if found.dtype != "int32" and not (wide and found.dtype == "int64"):
        cast = f"{name}.to(torch.int32)" if found.library == "torch" else f"{name}.astype(np.int32)"
        refuse(name, found.dtype, f"int32{' or int64' if wide else ''}: pass {cast}", TypeError)
    if len(found.shape) != 1:
        refuse(name, f"{len(found.shape)}-D shape {found.shape}", "1-D")
    if found.device >= 0 and found.device != device:
        refuse(name, f"an array on {device_name(found.device)}", f"one on {device_name(device)} or on the host")
    if found.shape[0] > 1 and found.strides[0] != 1:
        refuse(name, f"stride {found.strides[0]}", "a contiguous array")


def check_starts(name: str, starts: np.ndarray, most: int, because: str) -> np.ndarray:
    """The counts, int64 (batch,), of cumulative ones, which must start at 0, never decrease, and not exceed `most`."""
    if not len(starts):
        refuse(name, "an empty array", "batch + 1 entries, the first of them 0")
    if starts[0] != 0:
        refuse(name, f"{int(starts[0])} as its first entry", "0: cumulative counts, as in [0, 4, 10]")
    counts = starts[1:] - starts[:-1]
    if len(counts) and counts[counts.argmin()] < 0:
        at = int(np.argmax(counts < 0))
        got = f"{int(starts[at])} followed by {int(starts[at + 1])} at [{at + 1}]"
        refuse(name, got, "entries that never decrease")
    if starts[-1] > most:
        refuse(name, f"{int(starts[-1])} as its last entry", f"at most {most}, as {because}")
    return counts


def read_together(arrays: Sequence[IndexArray]) -> list[np.ndarray]:
    """int64 host arrays of index arrays; those of one library on a device are waited for once."""
    on_device = [array for array in arrays if type(array) is View]
    if not on_device:
        return [array.astype(np.int64) for array in arrays]
    libraries = [found.library for found in on_device]
    if libraries[0] not in ("cupy", "torch") or libraries.count(libraries[0]) != len(libraries):
        return [(host_array(one) if type(one) is View else one).astype(np.int64) for one in arrays]
    read = _read_from_device(on_device)
    if len(read) == len(arrays):
        return read
    following = iter(read)
    return [next(following) if type(array) is View else array.astype(np.int64) for array in arrays]


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
    """All of one library on one device, which is the current one."""
    ends = list(accumulate([found.shape[0] for found in views]))
    room, stream = _room.of(ends[-1]), current_stream(views[0])
    if ends[-1]:
        read_indices(views[0].device, stream, [found.pointer for found in views], ends, _room.address)
    cuda_runtime().streamSynchronize(stream)
    read = room[: ends[-1]].astype(np.int64)
    return [read[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class _Parts(NamedTuple):
    """Where the parts of the array of `BlockTables` begin."""

    ids: int
    page_starts: int
    query_starts: int
    lengths: int
    table: int
    end: int


class BlockTables:
    """The block table, the lengths, and where queries begin: what runs read, beside the wrapper's arrays.

    Every plan of as many sequences writes them to the same place, in the order of the current stream, as FlashInfer's
    plans write to its workspace. The table is as wide as a power of two, so that few forms occur.

    They are the last parts of one array, which begins with room for page ids, and for where those of each sequence
    begin. A mirror of it on the host says what goes there, in one transfer; on the CPU it is the array itself. The
    device itself puts a table together where the ids are there already, or where the table is too wide to be sent.

    Args:
        library: of the arrays.
        fixed: for CUDA graphs, whose arrays never move: (batch, columns, the most pages in all) of all plans.
    """

    __slots__ = ("library", "table", "lengths", "query_starts", "_most", "_form", "_own", "_first", "_address")
    __slots__ += ("_mirror", "_mirrored", "_page_starts_here", "_query_starts_here", "_lengths_here", "_table_here")

    def __init__(self, library: Library, fixed: tuple[int, int, int] | None = None) -> None:
        self.library = library
        self.table: Array = None  # int32 (batch, columns)
        self.lengths: Array = None  # int32 (batch,)
        self.query_starts: Array = None  # int32 (batch + 1,), where `write` is told them
        self._most = None if fixed is None else fixed[2]
        self._form: tuple[int, int] | None = None  # batch and columns
        if fixed is not None:
            self._allocate(*fixed)
            self.table = self._own

    def take(
        self, found: PageArrays, page_size: int, query_starts: View | None, final: bool
    ) -> tuple[Pages, np.ndarray, int] | None:
        """(pages, query starts, most queries of a sequence) of arrays on the device, which checks them, in one launch.

        None where it refuses them, or cannot know all that counts: then the host is to read them.

        Args:
            found: the page table.
            page_size: rows of a page.
            query_starts: int32 (batch + 1,), where each sequence's queries begin, if that is to be looked at too.
            final: nothing but these numbers can still be refused, so that the block table may be filled at once.
        """
        library, starts, ids, last = self.library, found.starts, found.ids, found.last
        arrays = (starts, ids, last) if query_starts is None else (starts, ids, last, query_starts)
        if found.lengths is not None or any([type(x) is not View or x.library != library.name for x in arrays]):
            return None
        batch = last.shape[0]
        if not 0 < batch <= MOST_TOGETHER or checking(None, library.device):
            return None
        columns = self._form[1] if final and self._form is not None and self._form[0] == batch else 0
        least = 1 if not columns else 0 if self._most is not None or columns == 1 else columns // 2 + 1
        behind = SUMMARY_WORDS + 2 * batch + 1
        size = behind if query_starts is None else behind + batch + 1
        room, stream, entries = _room.of(size), library.stream, ids.shape[0]
        take_table(
            library.device,
            stream,
            starts.pointer,
            ids.pointer,
            last.pointer,
            0 if query_starts is None else query_starts.pointer,
            self._address + 4 * self._first.table if columns else 0,
            self._address + 4 * self._first.lengths if columns else 0,
            _room.address,
            batch=batch,
            columns=columns,
            least=least,
            page_size=page_size,
            most_ids=entries if self._most is None else min(entries, self._most),
        )
        cuda_runtime().streamSynchronize(stream)
        state, _, widest, _, longest = room[:5].tolist()
        if state == REFUSED:
            return None
        held = room[SUMMARY_WORDS:size].copy()
        pages = Pages(
            held[: batch + 1],
            None,
            page_size,
            ids,
            found.names,
            held[batch + 1 : 2 * batch + 1],
            known=False,
            there=(starts, last),
            in_place=state == FILLED,
            widest=widest,
        )
        return pages, held[2 * batch + 1 :], longest

    def make_room(self, pages: Pages, table: Array | None = None) -> None:
        """Say which arrays these pages will be in: the caller's own table, if there is one. The device is current."""
        if self._most is None:
            form = pages.batch, 1 if table is not None else 1 << (max(pages.widest, 1) - 1).bit_length()
            if self._form != form:
                self._allocate(*form, 0)
                pages.in_place = False
        self.table = self._own if table is None else table

    def _allocate(self, batch: int, columns: int, most_ids: int) -> None:
        """A new array."""
        library, sizes = self.library, (most_ids, batch + 1, batch + 1, batch, batch * columns)
        self._form, self._first = (batch, columns), _Parts(*accumulate(map(_rounded, sizes), initial=0))
        first = self._first
        room = (library.empty if self._most is None else library.zeros)((first.end,), "int32")
        self._address = view(room).pointer
        if library.device < 0:
            mirror = host_array(view(room))
        else:  # of a fixed table there is none: it is as wide as any sequence can become
            mirror = np.zeros(first.end if self._most is None else first.table, np.int32)
        self._mirror, self._mirrored = mirror, mirror.ctypes.data

        def part(array: Array, start: int, size: int) -> Array:
            return array[start : start + size]

        self.query_starts = part(room, first.query_starts, batch + 1)
        self.lengths = part(room, first.lengths, batch)
        self._own = part(room, first.table, batch * columns).reshape(batch, columns)
        self._page_starts_here = part(mirror, first.page_starts, batch + 1)
        self._query_starts_here = part(mirror, first.query_starts, batch + 1)
        self._lengths_here = part(mirror, first.lengths, batch)
        self._table_here = None
        if len(mirror) == first.end:
            self._table_here = part(mirror, first.table, batch * columns).reshape(batch, columns)

    def write(self, pages: Pages, query_starts: np.ndarray | None = None) -> None:
        """Make the arrays those of the pages that there is room for. The device is the current one.

        query_starts: int64 (batch + 1,), where the caller has not put them beside the arrays himself.
        """
        first, own = self._first, self.table is self._own and pages.total
        begin = first.lengths
        if query_starts is not None:
            begin = first.query_starts
            self._query_starts_here[:] = query_starts
        if pages.in_place or (own and not pages.known and pages.there is not None):
            self._send(begin, first.lengths)
            if not pages.in_place:
                starts, last = pages.there
                self._fill(pages, starts.pointer, pages.indices.pointer, last.pointer)
            return
        self._lengths_here[:] = pages.lengths
        if not own:
            self._send(begin, first.table)
        elif pages.known and self._table_here is not None:
            self._table_here[_numbers(self._form[1]) < pages.counts[:, None]] = pages.ids()
            self._send(begin, first.end)
        else:
            self._send_and_fill(pages)

    def _send_and_fill(self, pages: Pages) -> None:
        """Send all but the table, which the device makes of the rest, and of ids that are there already."""
        starts = begin = self._first.page_starts
        self._page_starts_here[:] = pages.starts
        if pages.known:
            begin -= pages.total
            self._mirror[begin:starts] = pages.ids()
        self._send(begin, self._first.table)
        ids = self._address + 4 * begin if pages.known else pages.indices.pointer
        self._fill(pages, self._address + 4 * starts, ids, 0)

    def _fill(self, pages: Pages, starts: int, ids: int, last: int) -> None:
        """The table of what is at these addresses; and the lengths, unless last is 0."""
        library, (batch, columns) = self.library, self._form
        fill_table(
            library.device,
            library.stream,
            starts,
            ids,
            last,
            self._address + 4 * self._first.table,
            self._address + 4 * self._first.lengths,
            batch=batch,
            columns=columns,
            widest=pages.widest,
            page_size=pages.page_size,
        )

    def _send(self, first: int, last: int) -> None:
        if self.library.device >= 0 and first < last:
            self.library.send(self._mirrored + 4 * first, self._address + 4 * first, 4 * (last - first))


def tables_of(library: Library, pages: Pages) -> BlockTables:
    """New tables that hold these pages. The device is the current one."""
    tables = BlockTables(library)
    tables.make_room(pages)
    tables.write(pages)
    return tables


@lru_cache(maxsize=64)
def _numbers(count: int) -> np.ndarray:
    """0 to count - 1, of few counts: not to be written to."""
    return np.arange(count)


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
        self.tables = BlockTables(library, (self.batch, self._columns, self._most))

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
        return self.tables


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
