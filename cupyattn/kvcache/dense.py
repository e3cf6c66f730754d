"""KVCache: keys and values of a batch in dense arrays, one row for each token, and how many tokens each sequence has.

Appending is a call of `append_kv`, a step one of `attention_with_kvcache`: one launch, wherever the decode kernel takes
it. Lengths are kept on the host: nothing here waits for a device, but for beam indices and lengths that lie on one.

With a window the cache is a ring: token n of a sequence lies in row n % rows. To the kernels it is a paged cache,
whose block table goes round: they are told true positions, so that masks, ALiBi and rotary embedding are right, and
they never read what a window hides, which is what has been overwritten.

The functions at the end carry the names of the incremental attention that people know from small projects.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import View, device_name, refuse, view
from ..attention import append_kv, attention_with_kvcache
from ..problem import same_kind
from ..streams import device_of
from . import snapshots
from .errors import CacheFull
from .placing import Array, allocate, bits, dtype_name, host_integers, prototype, put, take

LAYOUTS = ("BHSD", "BSHD")
RING_BLOCK = 16  # tokens; a ring has a multiple of it, and a block table an entry for each


class KVCache:
    """Keys and values of a batch, (batch, kv_heads, seqlen, head_dim) or (batch, seqlen, kv_heads, head_dim).

    A cache takes over two arrays with tokens in them, or is made empty by `initialize_kv_cache`. It takes what `layout`
    says and gives the same: "BHSD", heads before tokens as in the first shape above, or "BSHD", as everywhere else in
    this library. Arrays may be NumPy's, CuPy's or PyTorch's; beside JAX's the cache itself is NumPy's or CuPy's.

    A call that raises leaves the cache as it was.

    Args:
        keys, values: of one dtype on one device, writable. They are not copied: appending writes into them behind
            `lengths`, as long as there is room, and a longer cache moves to new arrays.
        lengths: how many rows of each sequence hold tokens, (batch,) ints; all of them by default.
        layout: "BHSD" or "BSHD".
        max_seqlen: the most tokens that a sequence can have; None for no limit.
        window: (left, right) as in `attention`, left at least 0: keep just the last left + 1 tokens, rounded up to a
            multiple of 16. Tokens are copied out of keys and values then. right is what queries may see of the tokens
            that were appended with them: 0 is causal.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import KVCache
    >>> cache = KVCache(*np.ones((2, 1, 2, 5, 64), np.float32))  # 5 tokens, two heads
    >>> q, k, v = np.ones((1, 8, 1, 64), np.float32), *np.ones((2, 1, 2, 1, 64), np.float32)
    >>> cache.attend(q, k, v).shape
    (1, 8, 1, 64)
    >>> cache
    KVCache(1 sequence of 6 tokens, room for 10, 2 heads of 64, float32, cpu, BHSD)
    """

    def __init__(
        self,
        keys: Array,
        values: Array,
        lengths: Sequence[int] | Array | None = None,
        *,
        layout: str = "BHSD",
        max_seqlen: int | None = None,
        window: tuple[int, int] | None = None,
    ) -> None:
        _check_layout(layout)
        k, v = (_tokens_first(name, array, layout) for name, array in (("keys", keys), ("values", values)))
        if tuple(v.shape[:-1]) != tuple(k.shape[:-1]):
            refuse("values", f"shape {tuple(values.shape)}", f"keys' {tuple(keys.shape)}, but for head_dim")
        self._begin(k.shape[0], (k.shape[2], k.shape[3], v.shape[3]), layout, max_seqlen, window)
        self._adopt((k, v), ("keys", "values"), lengths)

    @classmethod
    def from_packed(
        cls,
        kv: Array,
        lengths: Sequence[int] | Array | None = None,
        *,
        layout: str = "BSHD",
        max_seqlen: int | None = None,
        window: tuple[int, int] | None = None,
    ) -> KVCache:
        """A cache over flash_attn's packed array (batch, seqlen, 2, kv_heads, head_dim); arguments as for KVCache.

        `layout` is that of what the cache takes and gives; kv itself is as above for both.
        """
        _check_layout(layout)
        _check_array("kv", kv)
        if len(kv.shape) != 5 or kv.shape[2] != 2:
            refuse("kv", f"shape {tuple(kv.shape)}", "(batch, seqlen, 2, kv_heads, head_dim)")
        cache = object.__new__(cls)
        cache._begin(kv.shape[0], (kv.shape[3], kv.shape[4], kv.shape[4]), layout, max_seqlen, window, packed=True)
        cache._adopt((kv,), ("kv",), lengths)
        return cache

    def _begin(
        self,
        batch: int,
        heads: tuple[int, int, int],
        layout: str,
        max_seqlen: int | None,
        window: tuple[int, int] | None,
        packed: bool = False,
    ) -> None:
        """Set the form of an empty cache without memory. heads: (kv_heads, head_dim, head_dim of values)."""
        self.layout, self.packed, self._heads = layout, packed, heads
        self.window = None if window is None else _sides(window)
        self.max_seqlen = None if max_seqlen is None else _count("max_seqlen", max_seqlen)
        self._lengths = np.zeros(batch, np.int64)
        self._dtype: str | None = None  # what new memory is to be of; None: the dtype of the first keys
        self._storage: _Storage | None = None

    def _adopt(self, bases: tuple[Array, ...], names: tuple[str, ...], lengths: Sequence[int] | Array | None) -> None:
        views = [view(base, name) for name, base in zip(names, bases, strict=True)]
        for name, found in zip(names, views, strict=True):
            same_kind(name, found, views[0], names[0])
            if found.library not in ("numpy", "cupy", "torch") or found.readonly:
                kind = "read-only" if found.readonly else found.library
                refuse(name, f"a {kind} array", "a writable one of NumPy, CuPy or PyTorch", TypeError)
        rows = bases[0].shape[1]
        held = self._new_lengths(lengths, rows)
        self._refuse_beyond(held, np.zeros_like(held), "lengths")
        storage = _Storage(bases, ring=False)
        if self.window is not None:
            ring = self._new_storage(storage.like, self._first_rows(rows))
            _copy_last(storage, ring, held, np.minimum(held, ring.rows))
            storage = ring
        self._storage, self._lengths = storage, held

    # ------------------------------------------------------------------------------------------ what it holds

    @property
    def keys(self) -> Array:
        """The keys, as many as the longest sequence has; a view, in `layout`. Of a ring a copy, the oldest first.

        What lies behind the last token of a shorter sequence means nothing.
        """
        return self._contents()[0]

    @property
    def values(self) -> Array:
        """The values, as `keys`."""
        return self._contents()[1]

    @property
    def kv(self) -> Array:
        """Keys and values of a packed cache, (batch, seqlen, 2, kv_heads, head_dim), as `keys`. ValueError if not."""
        if not self.packed:
            refuse("kv", "a cache with keys and values apart", "a packed one: from_packed, or packed=True")
        return self._held()[0]

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each sequence has had, int64 (batch,), a copy; a ring has forgotten the first of them."""
        return self._lengths.copy()

    @property
    def seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return int(self._lengths.max(initial=0))

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def capacity(self) -> int:
        """Rows that there is memory for, for each sequence."""
        return 0 if self._storage is None else self._storage.rows

    @property
    def dtype(self) -> Any:
        """The arrays' dtype; None before the first tokens of a cache that was made without one."""
        return self._dtype if self._storage is None else self._storage.bases[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, in use or not."""
        return 0 if self._storage is None else sum(base.nbytes for base in self._storage.bases)

    def __repr__(self) -> str:
        low, high = int(self._lengths.min(initial=self.seqlen)), self.seqlen
        count = f"{self.batch_size} sequence" + ("" if self.batch_size == 1 else "s")
        span = f"{low} to {high} tokens" if low != high else f"{high} token" + ("" if high == 1 else "s")
        heads, head_dim, head_dim_v = self._heads
        dims = f"{head_dim}" if head_dim == head_dim_v else f"{head_dim} and {head_dim_v}"
        parts = [f"{count} of {span}", f"room for {self.capacity}", f"{heads} heads of {dims}"]
        if self._storage is not None:
            parts += [self._storage.like.dtype, device_name(self._storage.like.device)]
        parts += [self.layout + (", packed" if self.packed else "")]
        parts += [] if self.window is None else [f"window {self.window}"]
        return f"KVCache({', '.join(parts)})"

    # ---------------------------------------------------------------------------------- appending and attending

    def append(self, k: Array, v: Array, *, lengths: Sequence[int] | Array | None = None, **options: Any) -> None:
        """Write new tokens behind those that each sequence has.

        Args:
            k, v: (batch, kv_heads, seqlen_new, head_dim), or in the order that `layout` says.
            lengths: how many of the seqlen_new tokens count, (batch,) ints, for prompts that are padded behind their
                end; all of them by default.
            options: rotary_cos, rotary_sin, rotary_interleaved, kv_dtype, k_scale, v_scale and check of `append_kv`.

        Raises:
            CacheFull: a sequence would have more than max_seqlen tokens.
            TypeError, ValueError: an argument does not fit.
        """
        k, v = self._new_tokens(k, v)
        new = self._new_lengths(lengths, k.shape[1])
        total = self._lengths + new
        self._refuse_beyond(total, new, "k")
        longest = int(total.max(initial=0))
        storage = self._room(longest, view(k, "k"))
        kept = np.minimum(new, storage.rows)  # of a ring; else there are rows for all
        if lengths is None:
            skipped = k.shape[1] - int(kept.max(initial=0))
            given = {"k": k[:, skipped:], "v": v[:, skipped:]} if skipped else {"k": k, "v": v}
        else:
            sequence, token = _last(new, kept)
            index = put(sequence, view(k, "k")), put(token, view(k, "k"))
            ends = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
            given = {"k": take(k, index), "v": take(v, index), "cu_seqlens_new": put(ends, storage.like)}
        start = storage.lengths(total - kept)
        append_kv(storage.k, storage.v, **given, cache_seqlens=start, **storage.places(longest), **options)
        self._storage, self._lengths = storage, total

    def attend(
        self,
        q: Array,
        k: Array | None = None,
        v: Array | None = None,
        *,
        window: tuple[int, int] | None = None,
        return_lse: bool | str = False,
        out: Array | None = None,
        **options: Any,
    ) -> Array | tuple[Array, Array]:
        """Attention of queries over the cache, to which k and v, if given, are appended first, in the same call.

        Masks align to the bottom right: the last query sees the last token.

        Args:
            q: (batch, heads, seqlen_q, head_dim), or in the order that `layout` says.
            k, v: new tokens, as for `append`.
            window: as in `attention`; of a ring it can only be narrower than the cache's own, which is the default.
            return_lse: also return the lse, in the form that is asked for, as in `attention`.
            out: an array of the result's shape to write into.
            options: causal, softmax_scale, softcap, alibi_slopes, sinks, rotary_cos, rotary_sin, rotary_interleaved,
                kv_dtype, k_scale, v_scale, num_splits, kernel and check of `attention_with_kvcache`.

        Returns:
            An array of q's shape but for values' head_dim, in q's library, and `out` itself if given. In "BHSD" it is
            a transposed view of one with heads behind tokens. With return_lse a pair of it and the lse, float32
            (batch, heads, seqlen_q).

        Raises:
            CacheFull: a sequence would have more than max_seqlen tokens.
            TypeError, ValueError: an argument does not fit; or the queries would see tokens that a ring has forgotten.
        """
        queries = _tokens_first("q", q, self.layout)
        seqlen_q, seqlen_new = queries.shape[1], 0
        if k is not None or v is not None:
            k, v = self._new_tokens(k, v)
            seqlen_new = k.shape[1]
        total = self._lengths + seqlen_new
        self._refuse_beyond(total, np.full_like(total, seqlen_new), "k")
        if self.window is not None:
            window = self._narrower(window)
            self._refuse_forgotten(seqlen_q - seqlen_new, window[0])
        longest = int(total.max(initial=0))
        storage = room = self._room(longest, view(queries if k is None else k, "q"))
        if self.window is not None and max(min(longest, window[0] + seqlen_q), seqlen_new) > room.rows:
            # Queries see tokens that the new ones would push out of the ring: a larger one serves this call.
            storage = self._new_storage(room.like, _whole_blocks(room.rows + seqlen_new))
            _copy_last(room, storage, self._lengths, np.minimum(self._lengths, room.rows))
        results = attention_with_kvcache(
            queries,
            storage.k,
            storage.v,
            k=k,
            v=v,
            cache_seqlens=storage.lengths(self._lengths),
            **storage.places(longest),
            window=window,
            return_lse=return_lse,
            out=None if out is None else _tokens_first("out", out, self.layout),
            **options,
        )
        if k is not None:
            if storage is not room:
                _copy_last(storage, room, total, np.minimum(total, room.rows))
            self._storage, self._lengths = room, total
        result, *lse = results if return_lse else (results,)
        result = _in_layout(result, self.layout) if out is None else out
        return (result, *lse) if return_lse else result

    # ------------------------------------------------------------------------------------------- beams, batches

    def reorder(self, beam_idx: Sequence[int] | Array) -> None:
        """Let sequence i be what sequence beam_idx[i] was, in place: the arrays stay where they are.

        beam_idx: (batch,) ints, in any order and with repetitions, a list or an array; one on a device is waited for.
        Only the tokens of sequences that change are copied. Raises IndexError, TypeError or ValueError.
        """
        index = self._sequences("beam_idx", beam_idx)
        if len(index) != self.batch_size:
            refuse("beam_idx", f"{len(index)} indices", f"{self.batch_size}, one for each sequence; or use select")
        moved = np.flatnonzero(index != np.arange(len(index)))
        if self._storage is not None and len(moved):
            like, rows = self._storage.like, min(self.seqlen, self._storage.rows)
            target, source = put(moved, like), put(index[moved], like)
            with device_of(like):
                for base in self._storage.bits:
                    base[target, :rows] = base[source, :rows]  # the right side is a copy: it may be read in any order
        self._lengths = self._lengths[index]

    def select(self, sequences: Sequence[int] | Array) -> KVCache:
        """A new cache of copies of these sequences, (n,) ints as for `reorder`, of any number."""
        index = self._sequences("sequences", sequences)
        chosen = object.__new__(KVCache)
        chosen._begin(len(index), self._heads, self.layout, self.max_seqlen, self.window, self.packed)
        chosen._dtype, chosen._lengths = self._dtype, self._lengths[index]
        if self._storage is not None:
            like, rows = self._storage.like, min(self.seqlen, self._storage.rows)
            chosen._storage = chosen._new_storage(like, self._storage.rows)
            source = put(index, like)
            with device_of(like):
                for new, base in zip(chosen._storage.bits, self._storage.bits, strict=True):
                    new[:, :rows] = base[:, :rows][source]
        return chosen

    def expand(self, beam_size: int) -> KVCache:
        """A new cache with each sequence beam_size times, one beside the other, for beam search to begin with."""
        return self.select(np.repeat(np.arange(self.batch_size), _count("beam_size", beam_size)))

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self._lengths = np.zeros_like(self._lengths)

    def save(self, path: str | os.PathLike) -> None:
        """Write the cache to a safetensors file, which appears when it is complete. `select` before to save a part."""
        snapshots.save_dense(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: Any = "cpu") -> KVCache:
        """A cache as `save` found it, the same bits, on any device, which is named as in `initialize_kv_cache`.

        Raises BadSnapshot for a file that is not whole, not as it was written, or of another kind.
        """
        return snapshots.load_dense(cls, path, device)

    # ---------------------------------------------------------------------------------------------- memory

    def _room(self, length: int, like: View) -> _Storage:
        """Memory for `length` tokens a sequence: what there is, or new memory with the tokens copied into it.

        A cache that grows at least doubles, so that a token is copied a constant number of times.
        """
        old = self._storage
        if old is None:
            return self._new_storage(like, self._first_rows(length))
        if length <= old.rows or self.window is not None:
            return old
        rows = max(length, 2 * old.rows)
        larger = self._new_storage(old.like, rows if self.max_seqlen is None else min(rows, self.max_seqlen))
        used = self.seqlen
        with device_of(old.like):
            for new, base in zip(larger.bits, old.bits, strict=True):
                new[:, :used] = base[:, :used]
        return larger

    def _first_rows(self, length: int) -> int:
        """How many rows to begin with, for `length` tokens: all that there can be, if that is known."""
        if self.window is None:
            return length if self.max_seqlen is None else self.max_seqlen
        kept = self.window[0] + 1
        return _whole_blocks(kept if self.max_seqlen is None else min(kept, self.max_seqlen))

    def _new_storage(self, like: View, rows: int) -> _Storage:
        """Memory of `rows` rows for each sequence, in like's library and on its device; a ring's is initialised."""
        kv_heads, *dims = self._heads
        dtype = self._dtype or like.dtype
        if self.packed:
            bases = (allocate(like, (self.batch_size, rows, 2, kv_heads, dims[0]), dtype),)
        elif self.layout == "BSHD" or self.window is not None:
            bases = tuple(allocate(like, (self.batch_size, rows, kv_heads, dim), dtype) for dim in dims)
        else:
            shapes = [(self.batch_size, kv_heads, rows, dim) for dim in dims]
            bases = tuple(allocate(like, shape, dtype).swapaxes(1, 2) for shape in shapes)
        storage = _Storage(bases, ring=self.window is not None)
        if storage.ring:
            # Rows of tokens that the window has passed are masked, which a NaN in memory would survive (0 * NaN).
            with device_of(like):
                for base in storage.bits:
                    base[...] = 0
        return storage

    def _held(self) -> list[Array]:
        """The tokens that are there, in order, as the arrays that hold them: (batch, seqlen, …)."""
        storage = self._storage
        if storage is None:
            refuse("cache", "one that has no memory yet", "tokens appended to it first", ValueError)
        with device_of(storage.like):
            if self.window is None:
                return [base[:, : self.seqlen] for base in storage.bases]
            kept = min(self.seqlen, self.window[0] + 1)
            first = np.maximum(self._lengths - kept, 0)
            position = first[:, None] + np.arange(kept)
            row = put(position % storage.rows, storage.like)
            sequence = put(np.arange(self.batch_size)[:, None], storage.like)
            return [take(base, (sequence, row)) for base in storage.bases]

    def _contents(self) -> list[Array]:
        held = self._held()
        pair = (held[0][:, :, 0], held[0][:, :, 1]) if self.packed else held
        return [_in_layout(array, self.layout) for array in pair]

    # ---------------------------------------------------------------------------------------------- arguments

    def _new_tokens(self, k: Array | None, v: Array | None) -> tuple[Array, Array]:
        """k and v as (batch, seqlen_new, kv_heads, head_dim), refused if they do not fit the cache."""
        found, (kv_heads, *dims) = [], self._heads
        for name, array, dim in zip("kv", (k, v), dims, strict=True):
            tokens = _tokens_first(name, array, self.layout)
            expected = (self.batch_size, tokens.shape[1], kv_heads, dim)
            if tuple(tokens.shape) != expected:
                batch, seqlen, heads, dim = expected
                in_order = (batch, heads, seqlen, dim) if self.layout == "BHSD" else expected
                refuse(name, f"shape {tuple(array.shape)}", f"{in_order}, as the cache is {self.layout}")
            found.append(tokens)
        k, v = found
        if k.shape[1] != v.shape[1]:
            refuse("v", f"{v.shape[1]} tokens", f"{k.shape[1]}, as in k")
        return k, v

    def _new_lengths(self, lengths: Sequence[int] | Array | None, limit: int) -> np.ndarray:
        """How many of `limit` rows count, for each sequence."""
        if lengths is None:
            return np.full(self.batch_size, limit, np.int64)
        numbers = host_integers("lengths", lengths)
        if len(numbers) != self.batch_size:
            refuse("lengths", f"{len(numbers)} lengths", f"{self.batch_size}, one for each sequence")
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() <= limit:
            refuse("lengths", f"{numbers.min()} to {numbers.max()}", f"0 to {limit}, the rows that there are")
        return numbers

    def _sequences(self, name: str, index: Sequence[int] | Array) -> np.ndarray:
        """Indices of sequences, on the host."""
        index = host_integers(name, index)
        wrong = np.flatnonzero((index < 0) | (index >= self.batch_size))
        if len(wrong):
            came, sequences = f"{index[wrong[0]]} at [{wrong[0]}]", f"0 to {self.batch_size - 1}"
            refuse(name, came, sequences if self.batch_size else "nothing: there is no sequence", IndexError)
        return index

    def _refuse_beyond(self, total: np.ndarray, new: np.ndarray, name: str) -> None:
        if self.max_seqlen is None or total.max(initial=0) <= self.max_seqlen:
            return
        at = int(total.argmax())
        came = f"{new[at]} new tokens for sequence {at}, which has {total[at] - new[at]}"
        refuse(name, came, f"at most {self.max_seqlen} in all, the cache's max_seqlen", CacheFull)

    def _narrower(self, window: tuple[int, int] | None) -> tuple[int, int]:
        """The window of a call on a ring."""
        if window is None:
            return self.window
        sides = _sides(window)
        if sides[0] > self.window[0]:
            refuse("window", window, f"one within the cache's own, {self.window}")
        return sides

    def _refuse_forgotten(self, before: int, left: int) -> None:
        """Refuse `before` more queries than new tokens, if the first would see what the ring has overwritten."""
        if self._storage is not None and self.seqlen > self._storage.rows and left + before > self._storage.rows:
            came = f"{before} queries of tokens that are in the cache already, which holds {self._storage.rows}"
            expected = f"at most {self._storage.rows - left} with window {left}; append their tokens in the same call"
            refuse("q", came, expected)


class _Storage:
    """Arrays for the tokens of a batch, and how calls address them.

    bases: keys and values, each (batch, rows, kv_heads, head_dim) of any strides, or one array
    (batch, rows, 2, kv_heads, head_dim). k, v: the same as `append_kv` takes them, as they are, or of a ring as blocks.
    """

    def __init__(self, bases: tuple[Array, ...], ring: bool) -> None:
        self.bases, self.ring = bases, ring
        self.like = view(bases[0], "keys")
        self.batch, self.rows = self.like.shape[:2]
        self._table: Array | None = None
        if ring:
            blocks = self.batch * (self.rows // RING_BLOCK)
            bases = tuple(base.reshape(blocks, RING_BLOCK, *base.shape[2:]) for base in bases)
        self.k, self.v = bases if len(bases) == 2 else (bases[0][:, :, 0], bases[0][:, :, 1])

    @property
    def bits(self) -> list[Array]:
        """`bases` as integers, for copies."""
        return [bits(base) for base in self.bases]

    def places(self, length: int) -> dict[str, Array]:
        """The arguments that say where a sequence's tokens are, up to `length` of them."""
        if not self.ring:
            return {}
        needed = -(-length // RING_BLOCK)
        if self._table is None or self._table.shape[1] < needed:
            around = self.rows // RING_BLOCK
            # A power of two, since every other width is another form of call, to be prepared anew.
            column = np.arange(max(1 << (needed - 1).bit_length() if needed else 1, around))
            table = column % around + around * np.arange(self.batch)[:, None]
            self._table = put(table.astype(np.int32), self.like)
        return {"block_table": self._table}

    def lengths(self, lengths: np.ndarray) -> Array | int:
        """Lengths as calls take them: one number for all wherever that says it, which needs no array on the device."""
        first = int(lengths[0]) if len(lengths) else 0
        return first if (lengths == first).all() else put(lengths.astype(np.int32), self.like)


def _copy_last(source: _Storage, target: _Storage, lengths: np.ndarray, counts: np.ndarray) -> None:
    """Copy the last `counts` tokens of sequences that have `lengths`, each to the row of its position."""
    if not counts.sum():
        return
    sequence, position = _last(lengths, counts)
    like = target.like
    at, here, there = (put(x, like) for x in (sequence, position % source.rows, position % target.rows))
    with device_of(like):
        for new, base in zip(target.bits, source.bits, strict=True):
            new[at, there] = base[at, here]


def _last(lengths: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of the last counts[b] tokens of sequences b of these lengths: its sequence, and its position there."""
    sequence = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts  # of each sequence's tokens, in a line of all
    return sequence, np.arange(len(sequence)) + np.repeat(lengths - counts - first, counts)


def _whole_blocks(rows: int) -> int:
    return max(-(-rows // RING_BLOCK), 1) * RING_BLOCK


def _tokens_first(name: str, array: Array, layout: str) -> Array:
    """A 4-D array of this layout as (batch, seqlen, heads, head_dim), without a copy."""
    _check_array(name, array)
    form = "(batch, heads, seqlen, head_dim)" if layout == "BHSD" else "(batch, seqlen, heads, head_dim)"
    if len(array.shape) != 4:
        refuse(name, f"{len(array.shape)}-D shape {tuple(array.shape)}", f"4-D {form}")
    return _in_layout(array, layout)


def _in_layout(array: Array, layout: str) -> Array:
    """(batch, seqlen, heads, head_dim) in this layout; the same call leads back."""
    return array.swapaxes(1, 2) if layout == "BHSD" else array


def _check_array(name: str, array: Array) -> None:
    """Refuse what has no shape and axes to take a view of."""
    if not hasattr(array, "shape") or not hasattr(array, "swapaxes"):
        came = "None" if array is None else f"a {type(array).__name__}"
        refuse(name, came, "an array of NumPy, CuPy, PyTorch or JAX", TypeError)


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        refuse("layout", repr(layout), "'BHSD' or 'BSHD'")


def _count(name: str, number: int) -> int:
    try:
        number = operator.index(number)
    except TypeError:
        refuse(name, repr(number), "an int", TypeError)
    if number < 1:
        refuse(name, number, "at least 1")
    return number


def _sides(window: tuple[int, int]) -> tuple[int, int]:
    """The window of a ring."""
    try:
        left, right = (operator.index(side) for side in window)
    except (TypeError, ValueError):
        refuse("window", repr(window), "(left, right) as two ints", TypeError)
    if left < 0 or right < -1:
        refuse("window", window, "left of at least 0, as that many tokens are kept, and right of at least -1")
    return left, right


# ---------------------------------------------------------------------------------- the calls of small projects


def initialize_kv_cache(
    batch_size: int,
    num_heads: int,
    max_seqlen: int | None,
    head_dim: int,
    *,
    head_dim_v: int | None = None,
    dtype: Any = None,
    device: Any = None,
    layout: str = "BHSD",
    packed: bool = False,
    window: tuple[int, int] | None = None,
) -> KVCache:
    """An empty cache for `batch_size` sequences.

    Args:
        num_heads: of keys and values; queries may have a multiple of it.
        max_seqlen: the most tokens that a sequence can have, for which memory is taken at once; None for no limit.
        head_dim_v: of values, if it is not head_dim.
        dtype: NumPy's or PyTorch's dtype, or its name; by default that of the first keys.
        device: "cpu", "cuda", "cuda:1", a torch.device or CuPy's Device. With a dtype of PyTorch, or a torch.device,
            the arrays are PyTorch's, else NumPy's or CuPy's. None: memory is taken with the first keys, beside them and
            in their library.
        layout, window: as for KVCache.
        packed: keys and values lie in one array, (batch, seqlen, 2, heads, head_dim), whatever the layout.

    Raises:
        TypeError, ValueError: an argument does not fit.

    >>> from cupyattn import initialize_kv_cache
    >>> initialize_kv_cache(2, 8, 1024, 64, dtype="float16", device="cpu")
    KVCache(2 sequences of 0 tokens, room for 1024, 8 heads of 64, float16, cpu, BHSD)
    """
    _check_layout(layout)
    heads = tuple(_count(name, number) for name, number in (("num_heads", num_heads), ("head_dim", head_dim)))
    head_dim_v = heads[1] if head_dim_v is None else _count("head_dim_v", head_dim_v)
    if packed and head_dim_v != heads[1]:
        refuse("head_dim_v", head_dim_v, f"{heads[1]}, as keys and values share one array")
    cache = object.__new__(KVCache)
    cache._begin(_count("batch_size", batch_size), (*heads, head_dim_v), layout, max_seqlen, window, packed)
    cache._dtype = None if dtype is None else dtype_name(dtype)
    if device is not None:
        if dtype is None:
            refuse("dtype", None, "a dtype, as device says that memory is to be taken now")
        cache._storage = cache._new_storage(prototype(dtype, device), cache._first_rows(0))
    return cache


def update_kv_cache(
    kv_cache: KVCache, k: Array, v: Array, *, lengths: Sequence[int] | Array | None = None, **options: Any
) -> KVCache:
    """Append k and v to a cache in place, and return it: `KVCache.append`."""
    _check_cache(kv_cache)
    kv_cache.append(k, v, lengths=lengths, **options)
    return kv_cache


def incremental_attention(q: Array, kv_cache: KVCache, **options: Any) -> Array | tuple[Array, Array]:
    """Attention of the newest tokens' queries over a cache that has these tokens already: `KVCache.attend`."""
    _check_cache(kv_cache)
    return kv_cache.attend(q, **options)


def flash_attention_with_kv_cache(
    q: Array,
    k: Array,
    v: Array,
    kv_cache: KVCache | None = None,
    causal: bool = False,
    *,
    layout: str = "BHSD",
    max_seqlen: int | None = None,
    **options: Any,
) -> tuple[Array, KVCache] | tuple[tuple[Array, Array], KVCache]:
    """Append k and v to a cache, attend to all that it has, and return the result of `KVCache.attend` and the cache.

    kv_cache None makes one beside k, of `layout` and with room for max_seqlen tokens, by default without a limit; with
    a cache given they are its own and must not be said again. Raises as `KVCache.attend` does.
    """
    if kv_cache is None:
        _check_layout(layout)
        keys, values = (_tokens_first(name, array, layout) for name, array in (("k", k), ("v", v)))
        kv_cache = object.__new__(KVCache)
        kv_cache._begin(keys.shape[0], (*keys.shape[2:], values.shape[3]), layout, max_seqlen, None)
    elif layout != "BHSD" or max_seqlen is not None:
        refuse("kv_cache", "a cache with layout or max_seqlen", "one of the two: a cache brings its own")
    else:
        _check_cache(kv_cache)
    return kv_cache.attend(q, k, v, causal=causal, **options), kv_cache


def reorder_kv_cache(kv_cache: KVCache, beam_idx: Sequence[int] | Array) -> KVCache:
    """Let sequence i be what sequence beam_idx[i] was, in place, and return the cache: `KVCache.reorder`."""
    _check_cache(kv_cache)
    kv_cache.reorder(beam_idx)
    return kv_cache


def _check_cache(kv_cache: KVCache) -> None:
    if not isinstance(kv_cache, KVCache):
        refuse("kv_cache", f"a {type(kv_cache).__name__}", "a KVCache", TypeError)
