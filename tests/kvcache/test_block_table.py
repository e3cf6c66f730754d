"""BlockTable: conversions there and back, growth in place, validation, and its looks as a NumPy array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import normal

import cupyattn
from cupyattn import BlockTable

pytestmark = pytest.mark.backends("numpy", "cuda")


def device_of(backend):
    return 0 if backend.on_gpu else None


@st.composite
def ragged_tables(draw):
    """(rows, lengths, block_size), with rows as long as lengths need."""
    block_size = draw(st.sampled_from([1, 2, 3, 16, 256]))
    lengths = draw(st.lists(st.integers(0, 5 * block_size), max_size=6))
    blocks = iter(draw(st.permutations(range(40))))
    rows = [[next(blocks) for _ in range(-(-length // block_size))] for length in lengths]
    return rows, lengths, block_size


@given(case=ragged_tables())
@settings(max_examples=60)
def test_to_flashinfer_and_back(backend, case):
    rows, lengths, block_size = case
    table = BlockTable(rows, lengths, block_size, device=device_of(backend))
    indptr, indices, last = (backend.get(array) for array in table.to_flashinfer())
    assert {array.dtype.name for array in (indptr, indices, last)} == {"int32"}
    assert indptr.tolist() == [0, *np.cumsum([len(row) for row in rows]).tolist()]
    assert indices.tolist() == sum(rows, [])
    for pages, tokens, length in zip(np.diff(indptr), last, lengths, strict=True):
        assert length == (max(pages - 1, 0) * block_size + tokens)
    back = BlockTable.from_flashinfer(*table.to_flashinfer(), block_size, device=device_of(backend))
    assert [row.tolist() for row in back] == rows and back.host_seqlens.tolist() == lengths


@given(case=ragged_tables(), padding=st.integers(0, 5))
@settings(max_examples=60)
def test_to_flash_attn_and_back(backend, case, padding):
    rows, lengths, block_size = case
    table = BlockTable(rows, lengths, block_size, device=device_of(backend), max_blocks=3)
    dense, seqlens = table.to_flash_attn(padding)
    assert backend.get(seqlens).tolist() == lengths and dense.shape == table.shape
    assert set(backend.get(dense)[table.host == -1].tolist()) <= {padding}
    back = BlockTable.from_flash_attn(dense, seqlens, block_size, device=device_of(backend))
    assert [row.tolist() for row in back] == rows and back.host_seqlens.tolist() == lengths
    assert np.array_equal(back, table) and back.shape == table.shape


@given(case=ragged_tables(), more=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), max_size=6))
@settings(max_examples=40)
def test_update_is_a_table_made_anew(backend, case, more):
    """Rows grow, shrink and change, within the columns there are and past them; the device follows."""
    rows, lengths, block_size = case
    table = BlockTable(rows, lengths, block_size, device=device_of(backend))
    for b, length in more:
        if b < len(rows):
            rows[b] = [(7 * i + length) % 1000 for i in range(-(-length // block_size))]
            lengths[b] = length
            table.update([b], [rows[b]], [length])
    assert [row.tolist() for row in table] == rows
    assert backend.get(table.array).tolist() == table.host.tolist()
    assert backend.get(table.seqlens).tolist() == lengths
    assert (table.host[np.arange(table.max_blocks) >= table.counts[:, None]] == -1).all()


def test_growth_keeps_the_array_until_it_is_too_narrow(backend):
    table = BlockTable([[0], [1]], [4, 4], 4, device=device_of(backend), max_blocks=4)
    array, seqlens = table.array, table.seqlens
    table.update([1], [[1, 2, 3]], [9])
    assert table.array is array and table.shape == (2, 4)
    assert backend.get(seqlens).tolist() == [4, 4] and backend.get(table.seqlens).tolist() == [4, 9]
    table.update([1], [[1, 2, 3, 4, 5]], [20])
    assert table.shape == (2, 8) and backend.get(table.array).tolist() == table.host.tolist()


def test_attention_takes_it(backend, rng):
    k_cache, v_cache = normal(rng, (2, 8, 16, 2, 64), "float16")
    q = normal(rng, (2, 1, 4, 64), "float16")
    table = BlockTable([[5, 2], [7]], [20, 3], 16, device=device_of(backend), max_blocks=2)
    arrays = [backend.put(array) for array in (q, k_cache, v_cache)]
    out = cupyattn.attention_with_kvcache(*arrays, block_table=table, cache_seqlens=table.seqlens)
    plain = {"block_table": backend.put(table.host.copy()), "cache_seqlens": backend.put(np.array([20, 3], np.int32))}
    assert np.array_equal(backend.get(out), backend.get(cupyattn.attention_with_kvcache(*arrays, **plain)))


def test_looks_like_an_array(backend):
    table = BlockTable([[5, 2], [7]], [20, 3], 16, device=device_of(backend))
    assert (table.shape, table.ndim, table.dtype, len(table), table.nbytes) == ((2, 2), 2, np.int32, 2, 16)
    assert table[0].tolist() == [5, 2] and table[1, 0] == 7 and np.asarray(table).tolist() == [[5, 2], [7, -1]]
    assert table[:, 0].tolist() == [5, 7] and not table.host.flags.writeable
    where = "cuda:0" if backend.on_gpu else "cpu"
    assert repr(table) == f"BlockTable(2 sequences of 3 to 20 tokens, blocks of 16, max_blocks 2, {where})"
    imported = backend.get(from_dlpack(backend, table))
    assert imported.tolist() == [[5, 2], [7, -1]]
    assert repr(BlockTable([], [], 16)) == "BlockTable(0 sequences, blocks of 16, max_blocks 0, cpu)"


def from_dlpack(backend, table):
    if backend.on_gpu:
        import cupy

        return cupy.from_dlpack(table)
    return np.from_dlpack(table)


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([[0, 8], [1]], {}, r"block 8 at \[0, 1\]"),
        ([[0, 3], [1]], {"exclusive": True}, ""),
        ([[0, 0], [1]], {}, "block 0 twice, in sequences 0, 0"),
        ([[0, 1], [1]], {"exclusive": True}, "block 1 twice, in sequences 0, 1"),
        ([[0, 1], [1]], {}, ""),
    ],
)
@pytest.mark.backends("numpy")
def test_validate(backend, rows, options, says):
    table = BlockTable(rows, [8, 4], 4)
    if says:
        with pytest.raises(ValueError, match=f"block_table: got {says}"):
            table.validate(8, **options)
    else:
        table.validate(8, **options)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: BlockTable([[0]], [4, 4], 4), ValueError, "blocks"),
        (lambda: BlockTable([[0]], [5], 4), ValueError, r"blocks\[0\]"),
        (lambda: BlockTable([[-1]], [4], 4), ValueError, r"blocks\[0\]"),
        (lambda: BlockTable([[0.5]], [4], 4), TypeError, r"blocks\[0\]"),
        (lambda: BlockTable(None, [4], 4), TypeError, "blocks"),
        (lambda: BlockTable([3], [4], 4), TypeError, r"blocks\[0\]"),
        (lambda: BlockTable([[[3]]], [4], 4), TypeError, r"blocks\[0\]"),
        (lambda: BlockTable([[0]], [4], 4).validate("8"), TypeError, "num_blocks"),
        (lambda: BlockTable([[0]], [4], 4).validate(-1), ValueError, "num_blocks"),
        (lambda: BlockTable([[0]], [4], 4).to_flash_attn(2**31), ValueError, "padding"),
        (lambda: BlockTable([[0]], [4], 4).to_flash_attn(0.5), TypeError, "padding"),
        (lambda: BlockTable([[0]], [-4], 4), ValueError, "seqlens"),
        (lambda: BlockTable([[0]], [1.5], 4), TypeError, "seqlens"),
        (lambda: BlockTable([[0]], [4], 0), ValueError, "block_size"),
        (lambda: BlockTable.from_flashinfer([0, 2], [1], [4], 4), ValueError, "indptr"),
        (lambda: BlockTable.from_flashinfer([1, 2], [1, 2], [4], 4), ValueError, "indptr"),
        (lambda: BlockTable.from_flashinfer([0, 2, 1], [1, 2], [4, 4], 4), ValueError, "indptr"),
        (lambda: BlockTable.from_flashinfer([0, 2], [1, 2], [5], 4), ValueError, "last_page_len"),
        (lambda: BlockTable.from_flashinfer([0, 2], [1, 2], [0], 4), ValueError, "last_page_len"),
        (lambda: BlockTable.from_flashinfer([0, 2], [1, 2], [], 4), ValueError, "last_page_len"),
        (lambda: BlockTable.from_flash_attn([1, 2], [4], 4), ValueError, "block_table"),
        (lambda: BlockTable([[0]], [4], 4).update([1], [[0]], [4]), IndexError, "rows"),
        (lambda: BlockTable([[0]], [4], 4).update([0, 0], [[0], [0]], [4, 4]), ValueError, "rows"),
        (lambda: BlockTable([[0]], [4], 4).update([0], [[0]], [5]), ValueError, r"blocks\[0\]"),
    ],
)
@pytest.mark.backends("numpy")
def test_refusals(backend, call, error, name):
    with pytest.raises(error, match=f"^{name}: got"):
        call()
