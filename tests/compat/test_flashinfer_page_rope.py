"""FlashInfer's names to append, rotate and pack, against plain loops, float64 rotations and numpy.packbits."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from compat.test_flashinfer_common import FLOAT32, frequencies, oracle_dtype, over_libs, paged, starts, turned
from oracle import TINIEST, UNIT_ROUNDOFF, normal

from cupyattn.compat import flashinfer

# ----------------------------------------------------------------------------------------------------------- pages


@over_libs()
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_seq_lens(rng, lib, page_size):
    p = paged(rng, [5, 33, 0, 1, 16, 17], page_size)
    got = lib.get(flashinfer.get_seq_lens(*lib.put((p.indptr, p.last)), page_size))
    assert got.dtype == np.int32 and got.tolist() == p.lengths.tolist()


@over_libs()
@pytest.mark.parametrize("new", [[3, 0, 2, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("behind", [0, 4])
def test_batch_indices_and_positions(rng, lib, new, behind):
    lengths = np.array([10, 3, 2, 40], np.int32)
    owner = [b for b, count in enumerate(new) for _ in range(count)] + [-1] * behind
    place = [lengths[b] - count + i for b, count in enumerate(new) for i in range(count)] + [0] * behind
    nnz = sum(new) + behind
    ends, there = lib.put(starts(new)), lib.put(lengths)
    for seq_lens in (there, lengths):
        got = flashinfer.get_batch_indices_positions(ends, seq_lens, nnz)
        assert [lib.get(x).tolist() for x in got] == [owner, place]
        assert all(lib.get(x).dtype == np.int32 for x in got)
    targets = [lib.put(np.full(nnz, 7, np.int32)) for _ in range(2)]
    got = flashinfer.get_batch_indices_positions(ends, there, nnz, *targets)
    assert got[0] is targets[0] and got[1] is targets[1]
    assert [lib.get(x).tolist() for x in targets] == [owner, place]


@over_libs()
def test_index_arrays_of_int64(rng, lib):
    """FlashInfer casts those of these functions, and its documentation passes them."""
    new, lengths = [3, 0, 2, 1], np.array([10, 3, 2, 40])
    wide = lib.put(starts(new).astype(np.int64)), lib.put(lengths)
    narrow = lib.put(starts(new)), lib.put(lengths.astype(np.int32))
    for one, other in zip(
        flashinfer.get_batch_indices_positions(*wide, 6),
        flashinfer.get_batch_indices_positions(*narrow, 6),
        strict=True,
    ):
        assert lib.get(one).tolist() == lib.get(other).tolist() and lib.get(one).dtype == np.int32
    p = paged(rng, [10, 4, 33, 17], 5)
    table = [lib.put(x.astype(np.int64)) for x in (p.indices, p.indptr, p.last)]
    got = lib.get(flashinfer.get_seq_lens(table[1], table[2], 5))
    assert got.tolist() == p.lengths.tolist() and got.dtype == np.int32
    k, v = normal(rng, (2, 6, 2, 64), "float32")
    owner, place = [0, 0, 0, 2, 2, 3], [7, 8, 9, 31, 32, 16]
    cache = p.cache(lib)
    flashinfer.append_paged_kv_cache(*lib.put((k, v, np.array(owner), np.array(place))), cache, *table)
    for array, expected in zip(cache, appended(p, new, k, v), strict=True):
        assert lib.get(array).tobytes() == expected.tobytes()
    x, ends, first = normal(rng, (5, 2, 64), "float32"), starts([2, 3]), np.array([7, 0], np.int32)
    turned_by = [
        flashinfer.apply_rope(*lib.put((x, x, ends.astype(kind), first.astype(kind)))) for kind in ("i8", "i4")
    ]
    assert lib.get(turned_by[0][0]).tobytes() == lib.get(turned_by[1][0]).tobytes()


def appended(p, new, k, v):
    """Copies of the caches with rows written one by one at the end of their sequences."""
    copies, row = (p.k.copy(), p.v.copy()), 0
    for b, count in enumerate(new):
        for i in range(count):
            at = p.lengths[b] - count + i
            for cache, rows in zip(copies, (k, v), strict=True):
                cache[p.block_table[b, at // p.page_size], at % p.page_size] = rows[row]
            row += 1
    return copies


@over_libs()
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["pair", "one"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_append(rng, lib, page_size, layout, form, dtype):
    new = [3, 0, 7, 1]
    p = paged(rng, [10, 4, 33, 17], page_size, dtype=dtype)
    k, v = normal(rng, (2, 11, 2, 64), dtype)
    cache = p.cache(lib, layout, form)
    table = lib.put((p.indices, p.indptr, p.last))
    lengths = flashinfer.get_seq_lens(table[1], table[2], page_size)
    rows = flashinfer.get_batch_indices_positions(lib.put(starts(new)), lengths, 11)
    assert flashinfer.append_paged_kv_cache(*lib.put((k, v)), *rows, cache, *table, layout) is None
    got = cache if form == "pair" else (cache[:, 0], cache[:, 1])
    for array, expected in zip(got, appended(p, new, k, v), strict=True):
        expected = np.ascontiguousarray(expected.swapaxes(1, 2)) if layout == "HND" else expected
        assert np.ascontiguousarray(lib.get(array)).tobytes() == expected.tobytes()


@over_libs()
def test_append_in_any_order_and_not_all(rng, lib):
    """Rows of sequence -1 are passed over, and the others can come in any order."""
    p = paged(rng, [10, 33], 5)
    k, v = normal(rng, (2, 4, 2, 64), "float32")
    owner, place = np.array([1, -1, 0, 1], np.int32), np.array([32, 0, 3, 7], np.int32)
    cache = p.cache(lib)
    table = lib.put((p.indices, p.indptr, p.last))
    flashinfer.append_paged_kv_cache(*lib.put((k, v, owner, place)), cache, *table)
    for array, held, rows in zip(cache, (p.k, p.v), (k, v), strict=True):
        for b, at, row in zip(owner, place, rows, strict=True):
            if b >= 0:
                held[p.block_table[b, at // 5], at % 5] = row
        assert lib.get(array).tobytes() == held.tobytes()


@over_libs()
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_append_to_fp8(rng, lib, dtype):
    """Rows are rounded to the format; those that are FP8 already keep their bits."""
    if lib.name == "cupy":
        pytest.skip("CuPy has no such dtype")
    kv_dtype = "float8_e4m3fn"
    cache = tuple(np.zeros((3, 5, 2, 64), np.uint8) for _ in "kv")
    rows = normal(rng, (2, 4, 2, 64), "float16")
    bits = oracle.to_fp8(rows, kv_dtype)
    there = lib.put(tuple(x.view(oracle_dtype(kv_dtype)) for x in cache))
    k, v = lib.put(tuple(bits.view(oracle_dtype(kv_dtype)) if dtype == kv_dtype else rows))
    table = lib.put((np.array([2, 0], np.int32), np.array([0, 2], np.int32), np.array([4], np.int32)))
    at = np.array([3, 4, 5, 6], np.int32)
    flashinfer.append_paged_kv_cache(k, v, *lib.put((np.zeros(4, np.int32), at)), there, *table)
    for array, held, written in zip(there, cache, bits, strict=True):
        held[np.array([2, 2, 0, 0]), at % 5] = written
        assert lib.get(array).view(np.uint8).tobytes() == held.tobytes()


# ------------------------------------------------------------------------------------------------------------ rotary


LLAMA31 = {
    "rope_scale": 8.0,
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}


def llama31(dim, rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len):
    """The rule as Llama 3.1's reference states it: by wavelengths, one frequency after the other."""
    found = []
    for plain in frequencies(dim, 1.0, rope_theta):
        wavelength = 2 * np.pi / plain
        if wavelength < old_context_len / high_freq_factor:
            found.append(plain)
        elif wavelength > old_context_len / low_freq_factor:
            found.append(plain / rope_scale)
        else:
            smooth = (old_context_len / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
            found.append((1 - smooth) * plain / rope_scale + smooth * plain)
    return np.array(found)


def check_turned(got, x, positions, freq, interleave):
    """Within rounding of the exact rotation: of cosine and sine, of two products and a sum, and to x's dtype."""
    dtype, exact = x.dtype.name, turned(x, positions, freq, interleave)
    size = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True)
    bound = UNIT_ROUNDOFF[dtype] * np.abs(exact) + TINIEST[dtype] / 2 + 10 * FLOAT32 * size
    assert got.dtype == x.dtype
    assert (np.abs(got.astype(np.float64) - exact) <= bound).all()
    width = 2 * len(freq)
    assert got[..., width:].tobytes() == x[..., width:].tobytes()


CASES = [(None, False), (None, True), (32, False), (32, True)]


@over_libs()
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("rotary_dim", "interleave"), CASES)
@pytest.mark.parametrize("kind", ["plain", "llama31"])
def test_rope(rng, lib, dtype, rotary_dim, interleave, kind):
    counts, offsets = [4, 0, 7, 1], np.array([0, 3, 100_000, 9], np.int32)
    q, k = normal(rng, (14, 8, 64), dtype), normal(rng, (14, 2, 64), dtype)  # two rows behind the last sequence
    positions = np.concatenate([offsets[b] + np.arange(n) for b, n in enumerate(counts)] + [[0, 0]])
    options = {"rotary_dim": rotary_dim, "interleave": interleave}
    if kind == "plain":
        rotate, in_place = flashinfer.apply_rope, flashinfer.apply_rope_inplace
        options |= {"rope_scale": 2.0, "rope_theta": 3e4}
        freq = frequencies(rotary_dim or 64, 2.0, 3e4)
    else:
        rotate, in_place = flashinfer.apply_llama31_rope, flashinfer.apply_llama31_rope_inplace
        freq = llama31(rotary_dim or 64, **LLAMA31)
    there, where = lib.put([q, k]), lib.put((starts(counts), offsets))
    results = rotate(*there, *where, **options)
    for got, x, held in zip(results, (q, k), there, strict=True):
        check_turned(lib.get(got), x, positions, freq, interleave)
        assert lib.get(held).tobytes() == x.tobytes()
    assert in_place(*there, *where, **options) is None
    for got, held in zip(results, there, strict=True):
        assert lib.get(got).tobytes() == lib.get(held).tobytes()


@over_libs()
@pytest.mark.parametrize(("rotary_dim", "interleave"), CASES)
@pytest.mark.parametrize("kind", ["plain", "llama31"])
@pytest.mark.parametrize("ids", ["int32", "int64"])
def test_rope_by_position(rng, lib, rotary_dim, interleave, kind, ids):
    q, k = normal(rng, (9, 8, 64), "float16"), normal(rng, (9, 2, 64), "float16")
    positions = rng.integers(0, 200_000, 9)
    options = {"rotary_dim": rotary_dim, "interleave": interleave}
    name = "apply_rope_pos_ids" if kind == "plain" else "apply_llama31_rope_pos_ids"
    freq = frequencies(rotary_dim or 64) if kind == "plain" else llama31(rotary_dim or 64, **LLAMA31)
    there, where = lib.put([q, k]), lib.put(positions.astype(ids))
    results = getattr(flashinfer, name)(*there, where, **options)
    for got, x in zip(results, (q, k), strict=True):
        check_turned(lib.get(got), x, positions, freq, interleave)
    assert getattr(flashinfer, f"{name}_inplace")(*there, where, **options) is None
    for got, held in zip(results, there, strict=True):
        assert lib.get(got).tobytes() == lib.get(held).tobytes()


@over_libs()
def test_rope_of_views(rng, lib):
    """Queries and keys that a projection left side by side are turned in place, and what lies between them stays."""
    base = normal(rng, (6, 12, 64), "float16")
    held = lib.put(base)
    positions = np.arange(6)
    flashinfer.apply_rope_pos_ids_inplace(held[:, :8], held[:, 8:10], lib.put(positions))
    got = lib.get(held)
    check_turned(got[:, :8], base[:, :8], positions, frequencies(64), False)
    check_turned(got[:, 8:10], base[:, 8:10], positions, frequencies(64), False)
    assert got[:, 10:].tobytes() == base[:, 10:].tobytes()


@over_libs()
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [64, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope_by_table(rng, lib, is_neox, rotary_dim, dtype):
    query, key = normal(rng, (7, 8 * 64), dtype), normal(rng, (7, 2 * 64), dtype)
    positions, freq = rng.integers(0, 50, 7), frequencies(rotary_dim)
    angles = np.outer(np.arange(50), freq)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    there, where = lib.put([query, key]), (lib.put(positions), lib.put(table))
    results = flashinfer.apply_rope_with_cos_sin_cache(where[0], *there, 64, where[1], is_neox)
    for got, x in zip(results, (query, key), strict=True):
        assert lib.get(got).shape == x.shape
        heads = (7, -1, 64)
        check_turned(lib.get(got).reshape(heads), x.reshape(heads), positions, freq, not is_neox)
    assert flashinfer.apply_rope_with_cos_sin_cache_inplace(where[0], *there, 64, where[1], is_neox) is None
    for got, held in zip(results, there, strict=True):
        assert lib.get(got).tobytes() == lib.get(held).tobytes()


@over_libs()
def test_rope_of_nothing(lib):
    none = np.zeros((0, 4, 64), np.float16)
    for batch in (0, 2):
        where = lib.put((np.zeros(batch + 1, np.int32), np.zeros(batch, np.int32)))
        results = flashinfer.apply_rope(lib.put(none), lib.put(none), *where)
        assert [lib.get(x).shape for x in results] == [none.shape] * 2


# ----------------------------------------------------------------------------------------------------------- packing


@over_libs()
@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_packbits(rng, lib, order, count):
    x = rng.random(count) < 0.5
    got = lib.get(flashinfer.packbits(lib.put(x), order))
    assert got.dtype == np.uint8 and got.tolist() == np.packbits(x, bitorder=order).tolist()
    numbers = np.where(x, 3, 0).astype(np.int32)
    assert lib.get(flashinfer.packbits(lib.put(numbers), order)).tolist() == got.tolist()


@over_libs()
@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_segment_packbits(rng, lib, order, kind):
    counts = [4, 0, 8, 9, 1, 30]
    x = rng.random(sum(counts)) < 0.5
    packed, ends = flashinfer.segment_packbits(lib.put(x), lib.put(starts(counts).astype(kind)), order)
    parts = np.split(x, starts(counts)[1:-1])
    assert lib.get(packed).tolist() == [byte for part in parts for byte in np.packbits(part, bitorder=order)]
    assert lib.get(ends).tolist() == starts([-(-count // 8) for count in counts]).tolist()
