"""RaggedArray as a list of arrays, in every library that is installed."""

from __future__ import annotations

import doctest
import sys

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import normal

import cupyattn.ragged
from cupyattn import RaggedArray, attention_varlen

LENGTHS = [3, 0, 5, 2]


class Library:
    """How the tests make arrays of a library and read them back."""

    def __init__(self, name):
        self.name = name

    def make(self, host):
        if self.name == "torch":
            return pytest.importorskip("torch").from_numpy(np.ascontiguousarray(host))
        if self.name == "jax":
            return pytest.importorskip("jax.numpy").asarray(host)
        return sys.modules["cupy"].asarray(host) if self.name == "cupy" else host

    def read(self, array):
        if self.name == "cupy":
            return array.get()
        return np.asarray(array)

    def is_own(self, array):
        return type(array) is type(self.make(np.zeros(1, np.float32)))


@pytest.fixture(params=["numpy", "torch", "jax", pytest.param("cupy", marks=pytest.mark.gpu)])
def library(request):
    pytest.importorskip(request.param)
    return Library(request.param)


def parts(rng, lengths=LENGTHS, dtype="float32"):
    return [normal(rng, (length, 2, 3), dtype) for length in lengths]


def assert_same(library, ragged, wanted):
    """The ragged array holds these NumPy arrays, and its offsets and lengths say so."""
    assert len(ragged) == len(wanted)
    for sequence, part in zip(ragged, wanted, strict=True):
        assert library.is_own(sequence)
        np.testing.assert_array_equal(library.read(sequence), part)
    lengths = [len(part) for part in wanted]
    assert library.is_own(ragged.cu_seqlens) and library.is_own(ragged.lengths)
    assert library.read(ragged.cu_seqlens).tolist() == np.concatenate([[0], np.cumsum(lengths)]).tolist()
    assert library.read(ragged.cu_seqlens).dtype == library.read(ragged.lengths).dtype == np.int32
    assert library.read(ragged.lengths).tolist() == ragged.host_lengths.tolist() == lengths
    assert ragged.max_seqlen == max(lengths, default=0)


def test_from_list(library, rng):
    wanted = parts(rng)
    ragged = RaggedArray.from_list([library.make(part) for part in wanted])
    assert_same(library, ragged, wanted)
    assert library.is_own(ragged.values) and ragged.values.shape == (10, 2, 3)
    assert ragged.shape == (4, None, 2, 3) and ragged.ndim == 4
    assert ragged.dtype == ragged.values.dtype and ragged.nbytes == 10 * 6 * 4


def test_from_lists_of_numbers():
    ragged = RaggedArray.from_list([[1, 2], [3]])
    assert [sequence.tolist() for sequence in ragged] == [[1, 2], [3]]


@pytest.mark.parametrize("offsets", ["list", "numpy int64", "own int32"])
def test_offsets_in_every_form(library, rng, offsets):
    wanted = parts(rng)
    values = library.make(np.concatenate(wanted))
    host = np.array([0, 3, 3, 8, 10])
    forms = {"list": host.tolist(), "numpy int64": host, "own int32": library.make(host.astype(np.int32))}
    assert_same(library, RaggedArray(values, forms[offsets]), wanted)


def test_bfloat16(rng):
    wanted = parts(rng, dtype="bfloat16")
    ragged = RaggedArray.from_list(wanted)
    assert_same(Library("numpy"), ragged, wanted)
    assert "bfloat16" in repr(ragged)


def test_ints(library, rng):
    wanted = parts(rng)
    ragged = RaggedArray.from_list([library.make(part) for part in wanted])
    for i in range(-4, 4):
        np.testing.assert_array_equal(library.read(ragged[i]), wanted[i])
    np.testing.assert_array_equal(library.read(ragged[np.int32(2)]), wanted[2])
    for i in (4, -5, 100):
        with pytest.raises(IndexError, match=rf"^index: got {i}, expected -4 to 3"):
            ragged[i]


def test_sequences_and_slices_are_views():
    ragged = RaggedArray(np.zeros((10, 2)), [0, 3, 3, 8, 10])
    ragged[2][:] = 1
    ragged[3:].values[:] = 2
    assert ragged.values[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]


SLICES = [slice(None), slice(1, 3), slice(1, None), slice(None, -1), slice(3, 1), slice(4, 9), slice(0, 0)]
SLICES += [slice(None, None, 2), slice(None, None, -1), slice(-2, None)]


@pytest.mark.parametrize("index", SLICES, ids=str)
def test_slices(library, rng, index):
    wanted = parts(rng)
    ragged = RaggedArray.from_list([library.make(part) for part in wanted])
    assert_same(library, ragged[index], wanted[index])


@pytest.mark.parametrize("index", [[2, 0], [], [-1, -1, 1], [True, False, True, True], [False] * 4], ids=str)
def test_lists_and_masks(library, rng, index):
    wanted = parts(rng)
    ragged = RaggedArray.from_list([library.make(part) for part in wanted])
    chosen = [i for i, yes in enumerate(index) if yes] if index and isinstance(index[0], bool) else index
    for form in (index, np.array(index, dtype=None if index else int)):
        assert_same(library, ragged[form], [wanted[i] for i in chosen])


@pytest.mark.parametrize("index", [1.5, "1", None, (0, 1), np.zeros((2, 2), int)], ids=str)
def test_what_is_no_index(index):
    with pytest.raises(TypeError, match="^index: got "):
        RaggedArray(np.zeros((10, 2)), [0, 3, 3, 8, 10])[index]


def test_index_arrays_that_do_not_fit():
    ragged = RaggedArray(np.zeros((10, 2)), [0, 3, 3, 8, 10])
    with pytest.raises(IndexError, match="^index: got 0 to 4, expected -4 to 3"):
        ragged[[0, 4]]
    with pytest.raises(ValueError, match="^index: got a mask of 3"):
        ragged[[True, False, True]]
    with pytest.raises(TypeError, match="^index: got float64"):
        ragged[[0.5]]


def test_to_padded_and_back(library, rng):
    wanted = parts(rng)
    ragged = RaggedArray.from_list([library.make(part) for part in wanted])
    padded, lengths = ragged.to_padded(fill=7)
    assert library.is_own(padded) and padded.shape == (4, 5, 2, 3) and padded.dtype == ragged.dtype
    host = library.read(padded)
    for row, part in zip(host, wanted, strict=True):
        np.testing.assert_array_equal(row[: len(part)], part)
        assert (row[len(part) :] == 7).all()
    assert library.read(lengths).tolist() == LENGTHS and library.read(lengths).dtype == np.int32
    assert_same(library, RaggedArray.from_padded(padded, lengths), wanted)
    assert_same(library, RaggedArray.from_padded(padded, LENGTHS), wanted)


def test_nothing_at_all(library):
    ragged = RaggedArray(library.make(np.zeros((0, 2, 3), np.float32)), [0])
    assert_same(library, ragged, [])
    assert ragged.to_padded()[0].shape == (0, 0, 2, 3)
    assert_same(library, ragged[:], [])
    none = np.zeros((0, 2), np.float32)
    assert_same(library, RaggedArray.from_list([library.make(none)] * 2), [none] * 2)


def test_spare_rows_belong_to_nobody(library, rng):
    wanted = parts(rng)
    values = library.make(np.concatenate([*wanted, parts(rng, [4])[0]]))
    ragged = RaggedArray(values, [0, 3, 3, 8, 10])
    assert_same(library, ragged, wanted)
    assert_same(library, RaggedArray.from_padded(*ragged.to_padded()), wanted)
    assert_same(library, ragged[[3, 2]], [wanted[3], wanted[2]])


def test_with_values(library, rng):
    wanted = parts(rng)
    ragged = RaggedArray.from_list([library.make(part) for part in wanted])
    twice = ragged.with_values(ragged.values[:, 0] * 2)
    assert_same(library, twice, [part[:, 0] * 2 for part in wanted])
    assert twice.cu_seqlens is ragged.cu_seqlens
    with pytest.raises(ValueError, match=r"^values: got shape \(9, 2, 3\)"):
        ragged.with_values(ragged.values[1:])


def test_offsets_on_a_device_are_read_once_and_only_when_needed(library, monkeypatch):
    """Stands in for a GPU where there is none: JAX's arrays count as a device's whatever they lie on."""
    if library.name in ("numpy", "torch"):
        pytest.skip("offsets on the host are read at once")
    reads = []
    fetch = cupyattn.ragged._fetch
    monkeypatch.setattr(cupyattn.ragged, "_fetch", lambda array: reads.append(1) or fetch(array))
    values, ends = (library.make(x) for x in (np.zeros((10, 2), np.float32), np.array([0, 3, 3, 8, 10], np.int32)))
    ragged = RaggedArray(values, ends)
    assert len(ragged) == 4 and ragged.cu_seqlens is ends and "unread" in repr(ragged)
    assert ragged.with_values(values).shape == (4, None, 2) and not reads
    for sequence in ragged:
        assert sequence.shape[1:] == (2,)
    assert ragged[1:].max_seqlen == 5 and ragged.host_lengths.tolist() == LENGTHS
    assert len(reads) == 1


def test_known_lengths_are_never_read_back(library, monkeypatch, rng):
    monkeypatch.setattr(cupyattn.ragged, "_fetch", None)
    ragged = RaggedArray.from_list([library.make(part) for part in parts(rng)])
    assert ragged.cu_seqlens is ragged.cu_seqlens
    ragged[1:].to_padded()
    assert ragged[[2, 0]].max_seqlen == 5 and repr(ragged)


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([3, 0, 5], "RaggedArray(3 sequences of 0 to 5, 8 rows of (8, 128), float16, cpu)"),
        ([4], "RaggedArray(1 sequence of 4, 4 rows of (8, 128), float16, cpu)"),
        ([], "RaggedArray(0 sequences of 0, 0 rows of (8, 128), float16, cpu)"),
    ],
)
def test_repr(lengths, text):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    assert repr(RaggedArray(np.zeros((sum(lengths), 8, 128), np.float16), offsets)) == text


def test_repr_fits_a_line(library):
    many = RaggedArray(library.make(np.zeros((100_000, 2, 1), np.float32)), np.arange(0, 100_001, 10))
    assert len(repr(many)) <= 100 and "\n" not in repr(many) and many.dtype == many.values.dtype
    assert repr(RaggedArray(np.zeros(5), [0, 5])) == "RaggedArray(1 sequence of 5, 5 rows, float64, cpu)"


VALUES = np.zeros((10, 2), np.float32)
REFUSED = [
    (lambda: RaggedArray([1, 2, 3], [0, 3]), TypeError, "^values: got a list, expected a NumPy, CuPy, torch or JAX"),
    (lambda: RaggedArray(np.float32(1), [0]), ValueError, "^values: got a 0-D array"),
    (lambda: RaggedArray(VALUES, []), ValueError, r"^cu_seqlens: got shape \(0,\), expected \(batch \+ 1,\)"),
    (lambda: RaggedArray(VALUES, [[0, 10]]), ValueError, r"^cu_seqlens: got shape \(1, 2\)"),
    (lambda: RaggedArray(VALUES, [0.0, 10.0]), TypeError, "^cu_seqlens: got float64, expected integers"),
    (lambda: RaggedArray(VALUES, [1, 10]), ValueError, "^cu_seqlens: got 1 as its first entry, expected 0"),
    (lambda: RaggedArray(VALUES, [0, 7, 3]), ValueError, r"^cu_seqlens: got 7 followed by 3 at \[2\]"),
    (lambda: RaggedArray(VALUES, [0, 11]), ValueError, "^cu_seqlens: got 11 as its last entry, expected at most 10"),
    (lambda: RaggedArray.from_list([]), ValueError, "^arrays: got an empty list"),
    (lambda: RaggedArray.from_list([VALUES, VALUES[:, :1]]), ValueError, r"^arrays\[1\]: got shape \(10, 1\)"),
    (lambda: RaggedArray.from_list([VALUES, VALUES.astype(int)]), TypeError, r"^arrays\[1\]: got int64"),
    (lambda: RaggedArray.from_padded(VALUES[0], [1]), ValueError, r"^padded: got 1-D shape \(2,\)"),
    (lambda: RaggedArray.from_padded(VALUES, [1]), ValueError, r"^lengths: got shape \(1,\)"),
    (lambda: RaggedArray.from_padded(VALUES[:2], [3, 1]), ValueError, "^lengths: got 1 to 3, expected 0 to 2"),
    (lambda: RaggedArray.from_padded(VALUES[:2], [-1, 1]), ValueError, "^lengths: got -1 to 1, expected 0 to 2"),
    (lambda: RaggedArray.from_padded(VALUES[:2], [0.5, 1]), TypeError, "^lengths: got float64"),
]


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_offsets_of_another_library_or_dtype_are_refused(library):
    if library.name in ("numpy", "torch"):
        pytest.skip("offsets on the host are read at once")
    values, ends = np.zeros((10, 2), np.float32), library.make(np.array([0, 10], np.int32))
    with pytest.raises(TypeError, match=f"^cu_seqlens: got a {library.name} array"):
        RaggedArray(values, ends)
    with pytest.raises(TypeError, match="^cu_seqlens: got float32, expected int32"):
        RaggedArray(library.make(values), ends.astype(np.float32))
    with pytest.raises(ValueError, match=r"^cu_seqlens: got shape \(1, 2\)"):
        RaggedArray(library.make(values), ends[None])


def test_mixed_libraries_in_a_list_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^arrays\[1\]: got a torch array, expected numpy"):
        RaggedArray.from_list([VALUES, torch.zeros(3, 2)])


def test_attention_over_ragged_arrays(library, rng):
    """A batch of sequences in, the same sequences out."""
    q, k, v = (parts(rng) for _ in range(3))
    ragged = [RaggedArray.from_list([library.make(part) for part in x]) for x in (q, k, v)]
    out = attention_varlen(*(x.values for x in ragged), ragged[0].cu_seqlens, ragged[1].cu_seqlens, causal=True)
    for b, sequence in enumerate(ragged[0].with_values(out)):
        expected = oracle.attention(q[b][None], k[b][None], v[b][None], causal=True)
        expected.check(library.read(sequence)[None], None, "float32")


def test_docstring():
    assert doctest.testmod(cupyattn.ragged).failed == 0


# --------------------------------------------------------------------------------------------- random arrays


lengths_of_sequences = st.lists(st.integers(0, 6), max_size=8)


def numbered(lengths):
    """Sequences of these lengths whose rows are numbered through."""
    rows = np.arange(2 * sum(lengths)).reshape(-1, 2)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    return RaggedArray(rows, offsets), [rows[offsets[b] : offsets[b + 1]] for b in range(len(lengths))]


@given(lengths_of_sequences, st.slices(8))
def test_slices_are_those_of_a_list(lengths, index):
    ragged, wanted = numbered(lengths)
    assert_same(Library("numpy"), ragged[index], wanted[index])


@given(st.data())
def test_index_lists_are_those_of_numpy(data):
    ragged, wanted = numbered(data.draw(lengths_of_sequences.filter(len)))
    index = data.draw(st.lists(st.integers(-len(wanted), len(wanted) - 1)))
    assert_same(Library("numpy"), ragged[index], [wanted[i] for i in index])
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(wanted), max_size=len(wanted))))
    assert_same(Library("numpy"), ragged[mask], [wanted[i] for i in np.flatnonzero(mask)])


@given(lengths_of_sequences, st.integers(-3, 3))
def test_padding_is_undone(lengths, fill):
    ragged, wanted = numbered(lengths)
    assert_same(Library("numpy"), RaggedArray.from_padded(*ragged.to_padded(fill)), wanted)


@given(st.lists(st.integers(-2, 6), min_size=1, max_size=6), st.integers(0, 6))
def test_offsets_are_taken_or_refused(offsets, rows):
    fits = offsets[0] == 0 and sorted(offsets) == offsets and offsets[-1] <= rows
    values = np.zeros((rows, 2))
    if fits:
        assert sum(len(sequence) for sequence in RaggedArray(values, offsets)) == offsets[-1]
    else:
        with pytest.raises(ValueError, match="^cu_seqlens: got "):
            RaggedArray(values, offsets)
