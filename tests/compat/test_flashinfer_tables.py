"""`BlockTables` on a device of pretence: what it sends there, and what it has put in place there, make the right table.

The device's memory is NumPy's, a transfer is a copy, and the launch that scatters page ids is done in Python. On a
real device the wrappers' own tests compare what attention reads; here every way to write is seen without one.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cupyattn.arrays import view
from cupyattn.compat.flashinfer.pages import BlockTables, Names, Pages

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
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries each launch wrote."""
    counts = []

    def write_entries(device: int, array: int, index: int, value: int, count: int, stream: int) -> None:
        places = _at(index, count)
        _at(array, int(places.max()) + 1)[places] = _at(value, count)
        counts.append(count)

    monkeypatch.setattr("cupyattn.kernels.copy_rows.write_entries", write_entries)
    return counts


def _pages(counts: list[int], known: bool, seed: int = 0, **more: Any) -> Pages:
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    ids = np.random.default_rng(seed).permutation(1000)[: starts[-1]].astype(np.int32)
    held = view(ids) if known else replace(view(ids), device=0)
    numbers = np.asarray(counts, np.int64)
    return Pages(starts, numbers, numbers * PAGE, PAGE, held, Names(), known, **more)


def _check(tables: BlockTables, pages: Pages, ids: np.ndarray) -> None:
    np.testing.assert_array_equal(tables.lengths, pages.lengths)
    for row, start, count in zip(tables.table, pages.starts, pages.counts, strict=False):
        np.testing.assert_array_equal(row[:count], ids[start : start + count])


def _write(tables: BlockTables, pages: Pages) -> None:
    tables.make_room(pages)
    tables.write(pages)


COUNTS = [
    pytest.param([1], id="one page"),
    pytest.param([3, 0, 5], id="three sequences, one of them empty"),
    pytest.param([2, 2, 2, 2], id="as many sequences as are sent rounded"),
    pytest.param([7, 1, 4, 0, 2], id="five sequences"),
    pytest.param([0, 0, 0], id="no pages"),
]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("known", [True, False], ids=["known ids", "ids on the device"])
@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
def test_tables_on_a_device_hold_every_sequences_pages(
    counts: list[int], known: bool, fixed: bool, launches: list[int]
) -> None:
    most = 20
    tables = BlockTables(PretendDevice(), (len(counts), most, most) if fixed else None)
    for seed in range(2):
        pages = _pages(counts, known, seed)
        _write(tables, pages)
        _check(tables, pages, _at(pages.indices.pointer, pages.total) if pages.total else np.empty(0, np.int32))
        assert len(tables.library.sent) == seed + 1, "one transfer for each plan"
    scattered = pages.total and (fixed or not known)
    assert launches == ([pages.total] * 2 if scattered else [])


def test_a_fixed_table_is_not_sent_whole(launches: list[int]) -> None:
    columns = 4096
    tables = BlockTables(PretendDevice(), (3, columns, columns))
    _write(tables, _pages([3, 1, 2], known=True))
    assert tables.library.sent == [4 * (6 + 6 + 3)]  # ids, their places, lengths
    assert launches == [6]


def test_plans_of_one_form_write_to_one_place(launches: list[int]) -> None:
    tables = BlockTables(PretendDevice())
    _write(tables, _pages([3, 4], known=True))
    table, lengths = tables.table, tables.lengths
    _write(tables, _pages([4, 1], known=False, seed=1))
    assert tables.table is table
    assert tables.lengths is lengths
    _write(tables, _pages([5, 1], known=True))
    assert tables.table.shape == (2, 8)


def test_beside_a_table_of_the_callers_only_lengths_are_sent(launches: list[int]) -> None:
    own = np.arange(6, dtype=np.int32).reshape(2, 3)
    tables, pages = BlockTables(PretendDevice()), _pages([3, 2], known=False, own_table=True)
    tables.make_room(pages, own)
    tables.write(pages)
    assert tables.table is own
    np.testing.assert_array_equal(tables.lengths, pages.lengths)
    assert tables.library.sent == [4 * 2]
    assert not launches
