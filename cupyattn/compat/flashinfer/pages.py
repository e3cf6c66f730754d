"""FlashInfer's page table, read on the host, and made into the padded block table that this library's kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        return int(self.counts.max(initial=0))

    @property
    def known(self) -> bool:
        """Whether the page ids count, and are on the host, or read because CUPYATTN_CHECK asks for it."""
        return not self.own_table and (self.indices.device < 0 or checking(None, self.indices.device))

    def ids(self) -> np.ndarray:
        """int32 (total,) page ids; waits for the device if they are there."""
        if self.own_table:
            refuse("block_tables", "an array", "None beside ROPE_LLAMA and custom masks, which go by the page ids")
        return host_array(self.indices)[: self.total]

    def check_ids(self, num_pages: int) -> None:
        """Refuse a page that the cache does not have, where the ids are known."""
        if not self.known or not self.total:
            return
        ids = self.ids()
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= num_pages:
            at = int(np.flatnonzero((ids < 0) | (ids >= num_pages))[0])
            owner = int(np.searchsorted(self.starts, at, side="right")) - 1
            expected = (
                f"0 to {num_pages - 1}, as the cache has {num_pages} pages" if num_pages else "a cache with pages"
            )
            refuse(self.names.indices, f"page {int(ids[at])} at [{at}], of sequence {owner}", expected)

    def used(self, width: int) -> np.ndarray:
        """bool (batch, width): which entries of a table of so many columns are pages, in the order of indices."""
        return np.arange(width) < self.counts[:, None]


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
        device: where the wrapper works, -1 for the CPU; arrays are there or on the host.
        names: of the three arguments.
        seq_lens: int32 (batch,) tokens of each sequence, if not what the three say.

    Raises:
        TypeError, ValueError: an array does not fit. The message names it, what came and what was expected.
    """
    starts_view = index_view(names.indptr, indptr, device)
    ids_view = index_view(names.indices, indices, device)
    last_view = index_view(names.last_page_len, last_page_len, device)
    batch = last_view.shape[0]
    if starts_view.shape[0] != batch + 1:
        expected = f"{batch + 1}: one more than {names.last_page_len} has"
        refuse(names.indptr, f"{starts_view.shape[0]} entries", expected)
    starts, last = (found.astype(np.int64) for found in read_together([starts_view, last_view]))
    entries = ids_view.shape[0]
    counts = check_starts(names.indptr, starts, entries, f"{names.indices} has {entries} entries")
    wrong = (counts > 0) & ((last < 1) | (last > page_size))
    if wrong.any():
        at = int(np.argmax(wrong))
        expected = f"1 to page_size {page_size}: a last page is never empty, and a full one has page_size tokens"
        refuse(names.last_page_len, f"{int(last[at])} for sequence {at}", expected)
    lengths = np.where(counts > 0, (counts - 1) * page_size + last, 0)
    if seq_lens is not None:
        lengths = _given_lengths(seq_lens, counts * page_size, device)
    return Pages(starts, counts, lengths, page_size, ids_view, names)


def _given_lengths(seq_lens: Array, capacity: np.ndarray, device: int) -> np.ndarray:
    lengths = read_together([index_view("seq_lens", seq_lens, device)])[0].astype(np.int64)
    if len(lengths) != len(capacity):
        refuse("seq_lens", f"{len(lengths)} entries", f"{len(capacity)}, one for each sequence")
    wrong = (lengths < 0) | (lengths > capacity)
    if wrong.any():
        at = int(np.argmax(wrong))
        expected = f"0 to {int(capacity[at])}, which its pages hold"
        refuse("seq_lens", f"{int(lengths[at])} for sequence {at}", expected)
    return lengths


def index_view(name: str, array: Array, device: int) -> View:
    """The view of an int32 array (n,) on the host, or on the wrapper's device."""
    found = view(array, name)
    if found.dtype != "int32":
        cast = f"{name}.to(torch.int32)" if found.library == "torch" else f"{name}.astype(np.int32)"
        refuse(name, found.dtype, f"int32: pass {cast}", TypeError)
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
    if falls.any():
        at = int(np.argmax(falls))
        got = f"{int(starts[at])} followed by {int(starts[at + 1])} at [{at + 1}]"
        refuse(name, got, "entries that never decrease")
    if starts[-1] > most:
        refuse(name, f"{int(starts[-1])} as its last entry", f"at most {most}, as {because}")
    return counts


def read_together(views: Sequence[View]) -> list[np.ndarray]:
    """Host arrays of int32 arrays (n,); those of one library on a device are waited for once."""
    on_device = [found for found in views if found.device >= 0]
    if len(on_device) < 2 or len({found.library for found in on_device}) > 1 or "dlpack" in on_device[0].library:
        return [host_array(found) for found in views]
    read = iter(_read_from_device(on_device))
    return [next(read) if found.device >= 0 else host_array(found) for found in views]


def _read_from_device(views: Sequence[View]) -> list[np.ndarray]:
    import cupy
    import cupyx

    runtime, stream = cupy.cuda.runtime, current_stream(views[0])
    ends = np.cumsum([0, *[found.shape[0] for found in views]]).tolist()
    room = cupyx.empty_pinned(max(ends[-1], 1), np.int32)
    address = room.ctypes.data
    for found, start in zip(views, ends, strict=False):
        if found.shape[0]:
            size = 4 * found.shape[0]
            runtime.memcpyAsync(address + 4 * start, found.pointer, size, runtime.memcpyDeviceToHost, stream)
    runtime.streamSynchronize(stream)
    return [room[start:end] for start, end in zip(ends, ends[1:], strict=False)]


class BlockTables:
    """Block tables and lengths beside the wrapper's arrays, made by each plan.

    They are new arrays every time, of a width that is a power of two so that few forms occur; or, `fixed` for CUDA
    graphs, the same arrays with new contents.

    Args:
        library: of the arrays.
        fixed: (batch, columns) of the only table, or None.
    """

    __slots__ = ("library", "table", "lengths", "_fixed")

    def __init__(self, library: Library, fixed: tuple[int, int] | None = None) -> None:
        self.library = library
        self._fixed = fixed
        self.table: Array = None  # int32 (batch, columns)
        self.lengths: Array = None  # int32 (batch,)
        if fixed is not None:
            self.table, self.lengths = library.zeros(fixed, "int32"), library.zeros(fixed[:1], "int32")

    def take_in(self, pages: Pages, table: Array | None = None) -> None:
        """Make the table and the lengths those of `pages`, or the table the caller's own. The device is the current."""
        lengths = pages.lengths.astype(np.int32)
        if table is not None:
            sent = self.library.asarray(lengths)
            if self._fixed is None:
                self.lengths = sent
            else:
                self.lengths[...] = sent
            self.table = table
            return
        if self._fixed is None:
            columns = 1 << (max(pages.widest, 1) - 1).bit_length()
            self.lengths, self.table = self._sent(lengths, pages, columns)
            return
        new_lengths, new_table = self._sent(lengths, pages, max(pages.widest, 1))
        self.lengths[...] = new_lengths
        self.table[:, : new_table.shape[1]] = new_table

    def _sent(self, lengths: np.ndarray, pages: Pages, columns: int) -> tuple[Array, Array]:
        """(lengths, table) in new arrays; all that leaves the host goes in one transfer."""
        batch, used = pages.batch, pages.used(columns)
        if pages.known:
            packet = np.zeros(batch * (1 + columns), np.int32)
            packet[:batch] = lengths
            packet[batch:].reshape(batch, columns)[used] = pages.ids()
            sent = self.library.asarray(packet)
            return sent[:batch], sent[batch:].reshape(batch, columns)
        sent = self.library.asarray(np.concatenate([lengths, np.flatnonzero(used).astype(np.int32)]))
        table = self.library.empty((batch, columns), "int32")  # what no sequence reaches is never read
        self._scatter(pages.indices, view(sent), batch, view(table), pages.total)
        return sent[:batch], table

    def _scatter(self, ids: View, sent: View, first: int, table: View, count: int) -> None:
        """table[sent[first + i]] = ids[i] for i below count, on the device."""
        if count:
            from ...kernels.copy_rows import write_entries  # needs CuPy

            places = sent.pointer + 4 * first
            write_entries(ids.device, table.pointer, places, ids.pointer, count, current_stream(table))


class FixedTables:
    """The tables of a wrapper for CUDA graphs, which stay where they are.

    Args:
        library: of the arrays.
        names: of the three buffers.
        buffers: int32 (batch + 1,), (most pages in all,) and (batch,), whose sizes count.
        max_pages: the most of one sequence; as many as there are in all if None.
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
        columns = self._most if max_pages is None else check_int("max_pages_per_request", max_pages, 1)
        self._columns = max(columns, 1)
        self._tables = BlockTables(library, (self.batch, self._columns))

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
    pages.own_table = True
