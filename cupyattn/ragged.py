"""RaggedArray: sequences of different lengths in one packed array, used like a list of arrays.

It works with NumPy, CuPy, torch and JAX arrays and imports none of them: an array that a caller holds has its
library loaded already. The lengths are mirrored on the host, so that indexing a GPU array never synchronises.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .problem import refuse

Array = Any  # an array of NumPy, CuPy, torch or JAX
INT32_MAX = np.iinfo(np.int32).max


@dataclass(slots=True)
class _Ends:
    """cu_seqlens on the host and beside the values, each None until it is needed; shared by arrays of one form."""

    host: np.ndarray | None = None  # int64 (batch + 1,), checked and read-only
    device: Array | None = None  # int32 (batch + 1,)


class RaggedArray:
    """Packed rows of several sequences, values (total, ...), and where each begins, cu_seqlens (batch + 1,).

    cu_seqlens starts at 0, never decreases and ends at most at total. It comes as a list, a NumPy array or an int32
    array of values' own library and device; one on a GPU is copied to the host once, when a length is first needed,
    and only then are its contents checked. Raises TypeError or ValueError naming the argument at fault.

    Indexing with an int or a plain slice is a view where the library has views (JAX copies); with a list, a boolean
    mask or a stepped slice it is a copy. `attention_varlen` takes them and gives one back:

    >>> import numpy as np
    >>> from cupyattn import RaggedArray, attention_varlen
    >>> q = RaggedArray.from_list([np.ones((length, 4, 64), np.float32) for length in (3, 0, 5)])
    >>> q
    RaggedArray(3 sequences of 0 to 5, 8 rows of (4, 64), float32, cpu)
    >>> out = attention_varlen(q, q, q, causal=True)
    >>> [sequence.shape for sequence in out]
    [(3, 4, 64), (0, 4, 64), (5, 4, 64)]
    >>> padded, lengths = out.to_padded()
    >>> padded.shape, lengths.tolist()
    ((3, 5, 4, 64), [3, 0, 5])
    """

    __slots__ = ("values", "_ends")

    def __init__(self, values: Array, cu_seqlens: Array | Sequence[int]) -> None:
        _library("values", values)
        if len(values.shape) < 1:
            refuse("values", "a 0-D array", "(total, ...)")
        self.values = values
        if _on_host(cu_seqlens):
            self._ends = _Ends(host=_checked(np.asarray(cu_seqlens), values.shape[0]))
        else:
            _check_device_offsets(cu_seqlens, values)
            self._ends = _Ends(device=cu_seqlens)

    @classmethod
    def from_list(cls, arrays: Sequence[Array]) -> RaggedArray:
        """Pack arrays (length, ...) of one library, dtype and trailing shape, in order. Copies. Needs at least one."""
        arrays = [array if hasattr(array, "shape") else np.asarray(array) for array in arrays]
        if not arrays:
            refuse("arrays", "an empty list", "at least one array: an empty list has no dtype")
        first = arrays[0]
        library = _library("arrays[0]", first)
        for i, array in enumerate(arrays):
            if _library(f"arrays[{i}]", array) != library:
                refuse(f"arrays[{i}]", f"a {_library('', array)} array", f"{library}, as arrays[0]", TypeError)
            if len(array.shape) < 1 or array.shape[1:] != first.shape[1:]:
                refuse(f"arrays[{i}]", f"shape {tuple(array.shape)}", f"(length, {_tail(first)}), as arrays[0]")
            if array.dtype != first.dtype:
                refuse(f"arrays[{i}]", array.dtype, f"{first.dtype}, as arrays[0]", TypeError)
            if _device_of(array) != _device_of(first):
                refuse(f"arrays[{i}]", f"an array on {_device_of(array)}", f"{_device_of(first)}, as arrays[0]")
        return cls(_concatenate(arrays), _cumulative([array.shape[0] for array in arrays]))

    @classmethod
    def from_padded(cls, padded: Array, lengths: Array | Sequence[int]) -> RaggedArray:
        """Pack the first lengths[b] rows of each padded[b]; padded is (batch, longest, ...). Copies.

        lengths is a sequence of ints or an integer array (batch,); one on a GPU is read, which synchronises.
        """
        _library("padded", padded)
        if len(padded.shape) < 2:
            refuse("padded", f"{len(padded.shape)}-D shape {tuple(padded.shape)}", "(batch, longest, ...)")
        lengths = _integers("lengths", np.asarray(lengths if _on_host(lengths) else _fetch(lengths)))
        if lengths.shape != tuple(padded.shape[:1]):
            refuse("lengths", f"shape {lengths.shape}", f"({padded.shape[0]},): one for each padded sequence")
        if len(lengths) and not 0 <= lengths.min() <= lengths.max() <= padded.shape[1]:
            refuse("lengths", f"{lengths.min()} to {lengths.max()}", f"0 to {padded.shape[1]}, the padded length")
        offsets = _cumulative(lengths)
        return cls(padded[_places(offsets, padded)], offsets)

    def to_padded(self, fill: float = 0) -> tuple[Array, Array]:
        """(padded (batch, max_seqlen, ...) with fill behind each sequence, lengths (batch,) int32 beside it)."""
        shape = (len(self), self.max_seqlen, *self.values.shape[1:])
        padded = _full(shape, fill, self.values)
        rows, total = _places(self._offsets, self.values), int(self._offsets[-1])
        if hasattr(padded, "at"):  # JAX arrays are immutable
            return padded.at[rows].set(self.values[:total]), self.lengths
        padded[rows] = self.values[:total]
        return padded, self.lengths

    def with_values(self, values: Array) -> RaggedArray:
        """The same sequences over other values (total, ...), such as the output of an attention call."""
        _library("values", values)
        if values.shape[:1] != self.values.shape[:1]:
            refuse("values", f"shape {tuple(values.shape)}", f"({self.values.shape[0]}, ...): as many rows as before")
        same_place = _namespace(values) is _namespace(self.values) and _device_of(values) == _device_of(self.values)
        if not same_place:
            return RaggedArray(values, self._offsets)
        other = object.__new__(RaggedArray)
        other.values, other._ends = values, self._ends
        return other

    def same_sequences(self, other: RaggedArray) -> bool:
        """Whether other has the same lengths; offsets of different origin are read, which can wait for a GPU."""
        return self._ends is other._ends or np.array_equal(self._offsets, other._offsets)

    @property
    def cu_seqlens(self) -> Array:
        """Where each sequence begins: int32 (batch + 1,), in values' library and on its device."""
        if self._ends.device is None:
            self._ends.device = _put(self._offsets.astype(np.int32), self.values)
        return self._ends.device

    @property
    def lengths(self) -> Array:
        """Rows of each sequence: int32 (batch,), in values' library and on its device."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def host_lengths(self) -> np.ndarray:
        """Rows of each sequence: int64 (batch,), a NumPy array."""
        return np.diff(self._offsets)

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence, 0 if there is none."""
        return int(self.host_lengths.max(initial=0))

    @property
    def shape(self) -> tuple[int | None, ...]:
        """(batch, None, ...): the second axis has a length for each sequence."""
        return (len(self), None, *self.values.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.values.shape) + 1

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values; the offsets are not counted."""
        return self.values.nbytes

    def __len__(self) -> int:
        """How many sequences there are."""
        return (self._ends.device if self._ends.host is None else self._ends.host).shape[0] - 1

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Array | RaggedArray:
        """An int gives that sequence's rows; a slice, a list of ints or a boolean mask gives a RaggedArray."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._span(start, max(start, stop))
            return self._pick(np.arange(start, stop, step))
        if isinstance(index, (list, np.ndarray)) and np.ndim(index) == 1:
            return self._pick(_selected(np.asarray(index), len(self)))
        try:
            i = operator.index(index)
        except TypeError:
            expected = "an int, a slice, or a 1-D list or NumPy array of ints or bools"
            refuse("index", type(index).__name__, expected, TypeError)
        if not -len(self) <= i < len(self):
            refuse("index", i, f"{-len(self)} to {len(self) - 1}", IndexError)
        i %= len(self)
        start, stop = self._offsets[i : i + 2].tolist()
        return self.values[start:stop]

    def __repr__(self) -> str:
        count = f"{len(self)} sequence" + ("" if len(self) == 1 else "s")
        span = " of unread lengths"
        if self._ends.host is not None:
            low, high = int(self.host_lengths.min(initial=self.max_seqlen)), self.max_seqlen
            span = f" of {low}" if low == high else f" of {low} to {high}"
        rows = f"{self.values.shape[0]} rows" + (f" of ({_tail(self.values)})" if self.ndim > 2 else "")
        return f"RaggedArray({count}{span}, {rows}, {str(self.dtype).rpartition('.')[2]}, {_device_of(self.values)})"

    @property
    def _offsets(self) -> np.ndarray:
        """The host mirror of cu_seqlens; reads a device array the first time."""
        if self._ends.host is None:
            self._ends.host = _checked(_fetch(self._ends.device), self.values.shape[0])
        return self._ends.host

    def _span(self, start: int, stop: int) -> RaggedArray:
        offsets = self._offsets[start : stop + 1]
        if len(offsets) == 0:
            offsets = self._offsets[:1]
        return RaggedArray(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])

    def _pick(self, sequences: np.ndarray) -> RaggedArray:
        offsets = _cumulative(self.host_lengths[sequences])
        sequence, row = _rows(offsets)
        return RaggedArray(self.values[_put(self._offsets[sequences][sequence] + row, self.values)], offsets)


def _checked(offsets: np.ndarray, total: int) -> np.ndarray:
    """cu_seqlens as read-only int64; ValueError if it does not describe sequences of total rows."""
    if offsets.ndim != 1 or len(offsets) == 0:
        refuse("cu_seqlens", f"shape {offsets.shape}", "(batch + 1,)")
    offsets = _integers("cu_seqlens", offsets)
    if offsets[0] != 0:
        refuse("cu_seqlens", f"{offsets[0]} as its first entry", "0: cumulative lengths, as in [0, 4, 10]")
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if len(falls):
        at = int(falls[0]) + 1
        refuse("cu_seqlens", f"{offsets[at - 1]} followed by {offsets[at]} at [{at}]", "entries that never decrease")
    if offsets[-1] > min(total, INT32_MAX):
        refuse("cu_seqlens", f"{offsets[-1]} as its last entry", f"at most {min(total, INT32_MAX)}, the rows of values")
    offsets.flags.writeable = False
    return offsets


def _check_device_offsets(cu_seqlens: Array, values: Array) -> None:
    library = _library("cu_seqlens", cu_seqlens)
    if library != _library("values", values):
        refuse("cu_seqlens", f"a {library} array", "a list, a NumPy array or an array of values' library", TypeError)
    if not str(cu_seqlens.dtype).endswith("int32") or str(cu_seqlens.dtype).endswith("uint32"):
        refuse("cu_seqlens", cu_seqlens.dtype, "int32", TypeError)
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] == 0:
        refuse("cu_seqlens", f"shape {tuple(cu_seqlens.shape)}", "(batch + 1,)")
    if _device_of(cu_seqlens) != _device_of(values):
        refuse("cu_seqlens", f"an array on {_device_of(cu_seqlens)}", f"values' device {_device_of(values)}")


def _integers(name: str, numbers: np.ndarray) -> np.ndarray:
    if numbers.dtype.kind not in "iu" and numbers.size:
        refuse(name, numbers.dtype, "integers", TypeError)
    return numbers.astype(np.int64)


def _cumulative(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _rows(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each packed row: its sequence, and its place in that sequence."""
    sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return sequence, np.arange(offsets[-1]) - offsets[sequence]


def _places(offsets: np.ndarray, like: Array) -> tuple[Array, Array]:
    sequence, row = _rows(offsets)
    return _put(sequence, like), _put(row, like)


def _selected(index: np.ndarray, count: int) -> np.ndarray:
    """A list of ints or a boolean mask as non-negative sequence numbers."""
    if index.dtype == bool:
        if len(index) != count:
            refuse("index", f"a mask of {len(index)}", f"one entry for each of the {count} sequences")
        return np.flatnonzero(index)
    index = _integers("index", index)
    if len(index) and not -count <= index.min() <= index.max() < count:
        refuse("index", f"{index.min()} to {index.max()}", f"{-count} to {count - 1}", IndexError)
    return index % max(count, 1)


def _tail(array: Array) -> str:
    return ", ".join(str(size) for size in array.shape[1:])


# What differs from one array library to the next.


def _root(array: Array) -> str:
    root = type(array).__module__.partition(".")[0]
    return "jax" if root == "jaxlib" else root


def _library(name: str, array: Array) -> str:
    root = _root(array)
    if root not in ("numpy", "cupy", "torch", "jax") or not hasattr(array, "dtype"):
        refuse(name, f"a {type(array).__name__}", "a NumPy, CuPy, torch or JAX array", TypeError)
    return root


def _namespace(array: Array) -> Any:
    return sys.modules["jax.numpy" if _root(array) == "jax" else _root(array)]


def _device_of(array: Array) -> str:
    """The device's name, "cpu" or "cuda:0", whatever the library."""
    root = _root(array)
    if root == "torch":
        return str(array.device)
    if root == "cupy":
        return f"cuda:{array.device.id}"
    if root == "jax" and hasattr(array, "devices"):
        device = min(array.devices(), key=lambda one: one.id)
        return "cpu" if device.platform == "cpu" else f"cuda:{device.id}"
    return "cpu"


def _on_host(array: Array | Sequence[int]) -> bool:
    return _root(array) not in ("cupy", "torch", "jax") or (_root(array) == "torch" and _device_of(array) == "cpu")


def _fetch(array: Array) -> np.ndarray:
    """A device array on the host; waits for the work that makes it."""
    if _root(array) == "cupy":
        return array.get()
    return array.cpu().numpy() if _root(array) == "torch" else np.asarray(array)


def _put(host: np.ndarray, like: Array) -> Array:
    """A host array in like's library and on its device."""
    root, xp = _root(like), _namespace(like)
    if root == "cupy":
        with like.device:
            return xp.asarray(host)
    if root == "torch":
        return xp.tensor(host, device=like.device)
    return host if root == "numpy" else xp.asarray(host, device=like.device)


def _full(shape: tuple[int, ...], fill: float, like: Array) -> Array:
    root, xp = _root(like), _namespace(like)
    if root == "cupy":
        with like.device:
            return xp.full(shape, fill, dtype=like.dtype)
    if root == "numpy":
        return xp.full(shape, fill, dtype=like.dtype)
    return xp.full(shape, fill, dtype=like.dtype, device=like.device)


def _concatenate(arrays: list[Array]) -> Array:
    if _root(arrays[0]) == "cupy":
        with arrays[0].device:
            return _namespace(arrays[0]).concatenate(arrays)
    return _namespace(arrays[0]).concatenate(arrays)
