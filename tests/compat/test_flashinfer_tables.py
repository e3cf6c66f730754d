"""`BlockTables` on a device of pretence: what it sends there, and what it has put in place there, make the right table.

The device's memory is NumPy's, a transfer is a copy, and the launches that make a table there and read index arrays
are done in Python. On a real device the wrappers' own tests compare what attention reads; here every way to write is
seen without one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from cupyattn.arrays import View, view
from cupyattn.compat.flashinfer.library import library_at
from cupyattn.compat.flashinfer.pages import BlockTables, Names, Pages, look_at_pages, read_pages
from cupyattn.kernels.page_table import FILLED, GOOD, MOST_TOGETHER, REFUSED, SUMMARY_WORDS

PAGE = 4
UNTOUCHED = -77


class PretendDevice:
    """A `Library` whose device 0 is memory of the host's."""

    name, device, stream = "numpy", 0, 0

    def __init__(self) -> None:
        self.sent: list[int] = []  # bytes of each transfer

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.full(shape, UNTOUCHED, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.zeros(shape, dtype)

    def send(self, host: int, target: int, size: int) -> None:
        self.sent.append(size)
        ctypes.memmove(target, host, size)


def _at(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each launch made."""
    made = []

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
        ends = _at(starts, batch + 1)
        assert np.diff(ends).max() == widest <= columns
        for b, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
            _at(table + 4 * b * columns, columns)[: end - first] = _at(ids, ends[-1])[first:end]
            if last:
                _at(lengths, batch)[b] = (end - first - 1) * page_size + _at(last, batch)[b] if end > first else 0
        made.append("table and lengths" if last else "table")

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
        ends, last_pages = _at(starts, batch + 1), _at(last, batch)
        queries = _at(query_starts, batch + 1) if query_starts else np.zeros(batch + 1, np.int32)
        counts, rows = np.diff(ends.astype(np.int64)), np.diff(queries.astype(np.int64))
        wrong = ends[0] != 0 or queries[0] != 0 or ends[-1] > most_ids or min(counts.min(), rows.min()) < 0
        wrong |= ((counts > 0) & ((last_pages < 1) | (last_pages > page_size))).any()
        widest = max(counts.max(), 0)
        state = REFUSED if wrong else FILLED if least <= widest <= columns else GOOD
        _at(target, 5)[:] = np.minimum([state, ends[-1], widest, queries[-1], max(rows.max(), 0)], 2**31 - 1)
        held = np.concatenate([ends, last_pages, queries if query_starts else []])
        _at(target + 4 * SUMMARY_WORDS, len(held))[:] = held
        made.append("a look")
        if state == FILLED:
            sizes = {"batch": batch, "columns": columns, "widest": widest, "page_size": page_size}
            fill_table(device, stream, starts, ids, last, table, lengths, **sizes)

    module = "cupyattn.compat.flashinfer.pages"
    monkeypatch.setattr(f"{module}.fill_table", fill_table)
    monkeypatch.setattr(f"{module}.take_table", take_table)
    return made


IDS = ["on the host", "on the device", "all on the device"]  # the page ids, or the whole page table


def _pages(counts: list[int], where: str, seed: int = 0, **more: Any) -> Pages:
    rng = np.random.default_rng(seed)
    starts, counts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), np.asarray(counts, np.int64)
    ids, last = rng.permutation(1000)[: starts[-1]].astype(np.int32), rng.integers(1, PAGE + 1, len(counts))
    if where != "on the host":
        more |= {"known": False}
        ids = _on_device(ids)
    if where == "all on the device":
        more |= {"there": (_on_device(starts.astype(np.int32)), _on_device(last.astype(np.int32)))}
    return Pages(starts, counts, PAGE, ids, Names(), last, **more)


def _on_device(array: np.ndarray) -> View:
    """As `view` finds a CuPy array."""
    return replace(view(array), device=0, library="cupy")


def _ids(pages: Pages) -> np.ndarray:
    return pages.indices if isinstance(pages.indices, np.ndarray) else pages.indices.array


def _check(tables: BlockTables, pages: Pages, ids: np.ndarray) -> None:
    np.testing.assert_array_equal(tables.lengths, pages.lengths)
    for row, start, count in zip(tables.table, pages.starts, pages.counts, strict=False):
        np.testing.assert_array_equal(row[:count], ids[start : start + count])


def _write(tables: BlockTables, pages: Pages, query_starts: np.ndarray | None = None) -> None:
    tables.make_room(pages)
    tables.write(pages, query_starts)


COUNTS = [
    pytest.param([1], id="one page"),
    pytest.param([3, 0, 5], id="three sequences, one of them empty"),
    pytest.param([2, 2, 2, 2], id="as many sequences as are sent rounded"),
    pytest.param([7, 1, 4, 0, 2], id="five sequences"),
    pytest.param([0, 0, 0], id="no pages"),
]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("where", IDS)
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
@pytest.mark.parametrize("packed", [True, False], ids=["with starts of queries", "without"])
def test_tables_on_a_device_hold_every_sequences_pages(
    counts: list[int], where: str, fixed: bool, packed: bool, launches: list[str]
) -> None:
    most = 20
    tables = BlockTables(PretendDevice(), (len(counts), most, most) if fixed else None)
    query_starts = np.arange(len(counts) + 1, dtype=np.int64) * 3 if packed else None
    for seed in range(2):
        pages = _pages(counts, where, seed)
        _write(tables, pages, query_starts)
        _check(tables, pages, _ids(pages))
        if packed:
            np.testing.assert_array_equal(tables.query_starts, query_starts)
    there = where == "all on the device" and pages.total
    assert len(tables.library.sent) == (0 if there and not packed else 2), "at most one transfer for each plan"
    made = [] if not pages.total or (where == "on the host" and not fixed) else ["table"]
    assert launches == 2 * (["table and lengths"] if there else made)


def test_a_fixed_table_is_not_sent_whole(launches: list[str]) -> None:
    columns = 4096
    tables = BlockTables(PretendDevice(), (3, columns, columns))
    _write(tables, _pages([3, 1, 2], "on the host"))
    assert tables.library.sent == [4 * (6 + 4 + 4 + 4)]  # ids, starts of pages and of queries, lengths
    assert launches == ["table"]


def test_plans_of_one_form_write_to_one_place(launches: list[str]) -> None:
    tables = BlockTables(PretendDevice())
    _write(tables, _pages([3, 4], "on the host"))
    held = tables.table, tables.lengths, tables.query_starts
    for where in ("on the device", "all on the device", "on the host"):
        pages = _pages([4, 1], where, seed=1)
        _write(tables, pages)
        _check(tables, pages, _ids(pages))
        assert all(one is other for one, other in zip(held, _arrays(tables), strict=True))
    _write(tables, _pages([5, 1], "on the host"))
    assert tables.table.shape == (2, 8)


def _arrays(tables: BlockTables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tables.table, tables.lengths, tables.query_starts


def test_beside_a_table_of_the_callers_only_lengths_are_sent(launches: list[str]) -> None:
    own = np.arange(6, dtype=np.int32).reshape(2, 3)
    tables, pages = BlockTables(PretendDevice()), _pages([3, 2], "all on the device", own_table=True)
    tables.make_room(pages, own)
    tables.write(pages)
    assert tables.table is own
    np.testing.assert_array_equal(tables.lengths, pages.lengths)
    assert tables.library.sent == [4 * 4]
    assert not launches


@pytest.mark.parametrize("lengths", ["of last pages", "given"])
@pytest.mark.parametrize("here", [(), (0,), (1,), (0, 1), (2,), (0, 1, 2)], ids=str)
def test_page_tables_that_lie_here_and_there(
    here: tuple[int, ...], lengths: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any of indptr, indices and last_page_len on the host, the others on the device, one launch reading those."""
    reads = []

    def read_indices(device: int, stream: int, addresses: list[int], ends: list[int], target: int) -> None:
        for address, first, end in zip(addresses, [0, *ends], ends, strict=False):
            _at(target + 4 * first, end - first)[:] = _at(address, end - first)
        reads.append(len(addresses))

    module = "cupyattn.compat.flashinfer.pages"
    monkeypatch.setattr(f"{module}.read_indices", read_indices)
    monkeypatch.setattr(f"{module}.current_stream", lambda found: 0)
    _pretend_to_wait(monkeypatch)
    table = [np.array(x, np.int32) for x in ([0, 3, 3, 5], [9, 8, 7, 6, 5, 4], [2, 77, 4])]
    given = None if lengths == "of last pages" else _on_device(np.array([4, 0, 5], np.int32))
    arrays = [x if i in here else _on_device(x) for i, x in enumerate(table)]
    pages = read_pages(*arrays, PAGE, 0, Names(), given)
    np.testing.assert_array_equal(pages.lengths, [10, 0, 8] if given is None else [4, 0, 5])
    tables = BlockTables(PretendDevice())
    _write(tables, pages)
    _check(tables, pages, table[1])
    to_read = sum(i not in here for i in (0, 2)) + (given is not None)
    assert reads == ([to_read] if to_read else [])
    assert (pages.there is not None) == (not {0, 2} & set(here) and given is None)


def _pretend_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device writes is there at once, in memory that is not pinned."""

    class Runtime:
        streamSynchronize = staticmethod(lambda stream: None)

    class Room:
        array = np.zeros(1 << 14, np.int32)
        address = array.ctypes.data

        def of(self, size: int) -> np.ndarray:
            return self.array

    module = "cupyattn.compat.flashinfer.pages"
    monkeypatch.setattr(f"{module}.cuda_runtime", lambda: Runtime)
    monkeypatch.setattr(f"{module}._room", Room())


@dataclass(frozen=True, slots=True)
class Place:
    """A device, or one of pretence."""

    library: Any
    put: Callable[[np.ndarray], Any]
    get: Callable[[Any], np.ndarray]

    def look(self, *table: Any) -> Any:
        """What the arrays of a page table are, looked at from outside."""
        return look_at_pages(*map(self.put, table), self.library.device, Names())

    def queries(self, starts: Any) -> View | None:
        return None if starts is None else view(self.put(np.array(starts, np.int32)))


@pytest.fixture(params=["pretence", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "gpu":
        cupy = pytest.importorskip("cupy")
        return Place(library_at(cupy.empty(1), "array"), cupy.asarray, cupy.asnumpy)
    request.getfixturevalue("launches")
    _pretend_to_wait(monkeypatch)

    def put(array: np.ndarray) -> View:
        return replace(view(array), device=0)

    return Place(PretendDevice(), put, np.asarray)


def _table(counts: list[int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pages = _pages(counts, "on the host", seed)
    return pages.starts.astype(np.int32), pages.indices, pages.last.astype(np.int32)


def _check_taken(place: Place, tables: BlockTables, pages: Pages, table: tuple[np.ndarray, ...]) -> None:
    starts, ids, last = table
    counts = np.diff(starts)
    expected = np.where(counts, (counts - 1) * PAGE + last, 0)
    np.testing.assert_array_equal(place.get(tables.lengths), expected)
    np.testing.assert_array_equal(pages.lengths, expected)
    assert (pages.batch, pages.total, pages.widest) == (len(counts), starts[-1], counts.max())
    for row, start, end in zip(place.get(tables.table), starts, starts[1:], strict=False):
        np.testing.assert_array_equal(row[: end - start], ids[start:end])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
@pytest.mark.parametrize("queries", [True, False], ids=["with starts of queries", "without"])
def test_a_device_takes_a_page_table_in(place: Place, counts: list[int], fixed: bool, queries: bool) -> None:
    """In one launch, from the second plan of a form on."""
    tables = BlockTables(place.library, (len(counts), 20, 20) if fixed else None)
    rows = np.arange(len(counts) + 1) ** 2 if queries else None
    for seed, final in enumerate((True, True, False, True)):
        table = _table(counts[seed % 2 :] + counts[: seed % 2], seed)
        taken = tables.take(place.look(*table), PAGE, place.queries(rows), final)
        pages, starts, longest = taken
        assert pages.in_place == (final and (fixed or seed > 0))
        tables.make_room(pages)
        tables.write(pages)
        _check_taken(place, tables, pages, table)
        assert starts.tolist() == ([] if rows is None else rows.tolist())
        assert longest == (0 if rows is None else np.diff(rows).max())


def test_a_table_that_is_too_narrow_is_made_anew(place: Place) -> None:
    tables = BlockTables(place.library)
    """And one that is wider than it would be made."""
    for counts, stays in (([2, 1], 0), ([2, 2], 1), ([9, 1], 0), ([16, 3], 1), ([8, 3], 0), ([1, 1], 0), ([0, 1], 1)):
        table = _table(counts, 0)
        pages, _, _ = tables.take(place.look(*table), PAGE, None, True)
        assert pages.in_place == stays
        tables.make_room(pages)
        tables.write(pages)
        _check_taken(place, tables, pages, table)


WRONG = [
    pytest.param([1, 2, 4], [2, 2], None, id="starts not at 0"),
    pytest.param([0, 3, 2], [2, 2], None, id="decreasing"),
    pytest.param([0, -(2**31), 2**31 - 1], [2, 2], None, id="decreasing by more than an int holds"),
    pytest.param([0, 2, 5], [2, 2], None, id="more than there are"),
    pytest.param([0, 2, 4], [2, PAGE + 1], None, id="a last page too full"),
    pytest.param([0, 2, 4], [0, 2], None, id="a last page that is empty"),
    pytest.param([0, 2, 4], [2, 2], [1, 2, 3], id="queries not from 0"),
    pytest.param([0, 2, 4], [2, 2], [0, 2, 1], id="queries that decrease"),
]


@pytest.mark.parametrize(("starts", "last", "queries"), WRONG)
def test_what_a_device_refuses_changes_no_table(
    place: Place, starts: list[int], last: list[int], queries: list[int] | None
) -> None:
    tables, table = BlockTables(place.library), _table([2, 2], 0)
    pages, _, _ = tables.take(place.look(*table), PAGE, None, True)
    tables.make_room(pages)
    tables.write(pages)
    other = np.array(starts, np.int32), table[1][::-1].copy(), np.array(last, np.int32)
    assert tables.take(place.look(*other), PAGE, place.queries(queries), True) is None
    _check_taken(place, tables, pages, table)
    assert tables.take(place.look(*table), PAGE, place.queries([0, 2, 2]), True) is not None


def test_many_sequences_are_left_to_the_host(place: Place) -> None:
    for count in (MOST_TOGETHER, MOST_TOGETHER + 1):
        starts, last = np.arange(count + 1, dtype=np.int32), np.full(count, 2, np.int32)
        taken = BlockTables(place.library).take(place.look(starts, starts[::-1].copy(), last), PAGE, None, True)
        assert (taken is None) == (count > MOST_TOGETHER)


@pytest.mark.gpu
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
@pytest.mark.parametrize("here", [(), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_many_and_long_sequences_on_a_gpu(fixed: bool, here: tuple[int, ...]) -> None:
    """More than a thread block has threads of either, through the kernels themselves."""
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    counts = np.append(rng.integers(0, 40, 600), [1000, 0, 257])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    table = starts, rng.permutation(starts[-1]).astype(np.int32), rng.integers(1, PAGE + 1, len(counts), np.int32)
    arrays = [x if i in here else cupy.asarray(x) for i, x in enumerate(table)]
    library = library_at(cupy.empty(1), "array")
    pages = read_pages(*arrays, PAGE, library.device, Names())
    tables = BlockTables(library, (len(counts), 1100, len(table[1])) if fixed else None)
    query_starts = np.arange(len(counts) + 1, dtype=np.int64)
    for sent in (None, query_starts):
        _write(tables, pages, sent)
        np.testing.assert_array_equal(tables.lengths.get(), np.where(counts, (counts - 1) * PAGE + table[2], 0))
        held = tables.table.get()
        for row, start, end in zip(held, starts, starts[1:], strict=False):
            np.testing.assert_array_equal(row[: end - start], table[1][start:end])
    np.testing.assert_array_equal(tables.query_starts.get(), query_starts)
