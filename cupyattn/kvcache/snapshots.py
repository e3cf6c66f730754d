"""Snapshots of caches: what of a PagedKVCache or a KVCache is in a file, and how it comes back.

In a file of a paged cache blocks go by their rows in the tensors `k` and `v`, (num_layers, rows, …) of the cache's
layout; float8 is stored as uint8, and the string `dtype` says what it is. First come the blocks in the pool,
`pool_rows` of them, the last `evictable_rows` of these without a sequence but kept for their prefix, then those that
are swapped out. Beside them are

- `sequences` int64 (s,), ids; `lengths` int64 (s,), tokens; `table` int32 (s, m), rows of `k` and `v`, then -1;
- `swapped_out` int32 (s,), 1 for sequences that are; `ref_counts` int32 (rows,), sequences that hold a block;
- `committed` int32 (c,), rows of blocks of known content, and for each of these `hashes` uint64 (c,), `contents` int64
  (c,), a number for each content, `parents` int64 (c,), that of the content before it or 0, and `tokens` int64
  (c, block_size).

In a file of a dense cache there are `lengths` int64 (batch,) and `k` and `v` (batch, rows, kv_heads, head_dim), or
packed `kv` (batch, rows, 2, kv_heads, head_dim): rows up to the longest sequence, of a ring as they lie.

What lies behind the last token of a sequence was some other sequence's once: it is saved as zeros.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import host_array, numpy_dtype, refuse, view
from ..streams import device_of
from .allocator import count_of
from .block_table import PADDING
from .errors import OutOfBlocks
from .placing import bits, prototype, put
from .report import holders_and_fill
from .snapshot_file import CHUNK, Reader, Writer
from .store import Form, Pair

if TYPE_CHECKING:
    from .dense import KVCache
    from .paged import PagedKVCache, Sequences

Path = str | os.PathLike
_INDEX: dict[str, Any] = dict.fromkeys(("table", "swapped_out", "ref_counts", "committed"), np.int32)
_INDEX |= dict.fromkeys(("sequences", "lengths", "contents", "parents", "tokens"), np.int64) | {"hashes": np.uint64}
Part = tuple[Pair, np.ndarray]  # arrays (layers, blocks, …), and which of their blocks; -1 for none


def save(cache: PagedKVCache, path: Path, seqs: Sequences | None = None) -> None:
    """`PagedKVCache.save`."""
    slots = cache._all_slots() if seqs is None else cache._slots(seqs, away=True)
    id_of = {slot: seq for seq, slot in cache._slot_of.items()}
    lengths, allocator = cache._lengths[slots], cache.allocator
    held = cache._table[slots]
    used = np.unique(held[held != PADDING])
    evictable = allocator.evictable_blocks if seqs is None else np.empty(0, np.int32)
    blocks = np.concatenate([used, evictable])
    table = np.full((len(slots), -(-lengths.max(initial=0) // cache.block_size)), PADDING, np.int32)
    at = np.nonzero(held != PADDING)
    table[at] = np.searchsorted(used, held[at])
    parts: list[Part] = [((cache._store.k, cache._store.v), blocks)]
    rows = len(blocks)
    for group, away in _groups(cache, slots):
        picks = np.unique(np.concatenate([cache._away[slots[i]][1] for i in group]))
        for i in group:
            own = cache._away[slots[i]][1]
            table[i, : len(own)] = rows + np.searchsorted(picks, own)
        parts.append((away, picks))
        rows += len(picks)
    holders, fill = holders_and_fill(table, lengths, cache.block_size, rows)
    fill[len(used) : len(blocks)] = cache.block_size
    strings = asdict(cache._form) | {
        "low_watermark": allocator.low_watermark,
        "high_watermark": allocator.high_watermark,
        "next_sequence": cache._next,
        "pool_rows": len(blocks),
        "evictable_rows": len(evictable),
    }
    committed = np.flatnonzero(allocator.contents[blocks])
    # Contents are numbered as they become known, parents first; of equal ones the block that is found comes first.
    order = np.lexsort((~allocator.cached[blocks[committed]], allocator.contents[blocks[committed]]))
    committed = committed[order]
    known = blocks[committed]
    fill[committed] = cache.block_size  # a known block is whole, however short the sequence that has it
    index = {
        "sequences": np.array([id_of[slot] for slot in slots.tolist()], np.int64),
        "lengths": lengths,
        "hashes": allocator.hashes[known],
        "contents": allocator.contents[known],
        "parents": allocator.parents[known],
        "tokens": allocator.tokens[known],
        "table": table,
        "swapped_out": np.array([slot in cache._away for slot in slots.tolist()], np.int32),
        "ref_counts": holders.astype(np.int32),
        "committed": committed.astype(np.int32),
    }
    shape = (cache.num_layers, rows, *cache._form.block)
    staging = _Staging(cache)
    with Writer(path, "paged", strings, index, dict.fromkeys("kv", (cache._form.stored, shape))) as file:
        for array, picks, first in _pieces(cache._form, parts):
            found = staging.take(array, picks)
            for i in np.flatnonzero(fill[first : first + len(picks)] < cache.block_size):
                tail = found[i] if cache.layout == "NHD" else found[i].swapaxes(0, 1)
                tail[fill[first + i] :] = 0
            file.write(found)


def load(kind: type[PagedKVCache], path: Path, num_blocks: int | None, device: int | None) -> PagedKVCache:
    """`PagedKVCache.load`."""
    with Reader(path, "paged") as file:
        saved = _Saved(file)
        form = asdict(saved.form)
        if num_blocks is not None:
            form["num_blocks"] = count_of("num_blocks", num_blocks, 1)
        if form["num_blocks"] < saved.used:
            raise OutOfBlocks(saved.used, form["num_blocks"], 0)
        cache = kind(**form, device=device, **saved.watermarks)
        kept = min(saved.pool - saved.used, cache.num_blocks - saved.used)
        _fill(cache, file, saved, saved.sequences.tolist(), kept)
        cache._next = saved.next
        return cache


def restore(cache: PagedKVCache, path: Path) -> list[int]:
    """`PagedKVCache.restore`."""
    with Reader(path, "paged") as file:
        saved = _Saved(file)
        for name in ("num_layers", "block_size", "num_kv_heads", "head_dim", "dtype", "layout"):
            theirs, ours = getattr(saved.form, name), getattr(cache, name)
            if theirs != ours:
                refuse("path", f"a snapshot of {name} {theirs}", f"one of the cache's {ours}")
        # Room is made by evicting prefixes, which cannot be undone: the data is checked before as well.
        buffers = cycle(np.empty((2, CHUNK), np.uint8))
        sizes = (min(CHUNK, file.data_bytes - start) for start in range(0, file.data_bytes, CHUNK))
        for _ in file.read(next(buffers)[:size] for size in sizes):
            pass
        file.finish()
        file.rewind()
        seqs = list(range(cache._next, cache._next + len(saved.sequences)))
        _fill(cache, file, saved, seqs, 0)
        cache._next += len(seqs)
        return seqs


def _fill(cache: PagedKVCache, file: Reader, saved: _Saved, seqs: list[int], kept: int) -> None:
    """Put what a file has into a cache, under these ids, with the last `kept` of its evictable blocks, or nothing."""
    allocator = cache.allocator
    blocks = allocator.allocate(saved.used + kept)
    undo = allocator._undo
    try:
        block_of = np.full(saved.pool, PADDING, np.int32)
        block_of[: saved.used] = blocks[: saved.used]
        block_of[saved.pool - kept :] = blocks[saved.used :]
        staging = _Staging(cache)
        away = staging.pair(saved.rows - saved.pool)
        parts = [((cache._store.k, cache._store.v), block_of), (away, np.arange(saved.rows - saved.pool))]
        rooms = (staging.room(len(picks)) for _, picks, _ in _pieces(cache._form, parts))
        with closing(file.read(rooms)) as found:
            for (array, picks, _), room in zip(_pieces(cache._form, parts), found, strict=True):
                undo = allocator.free  # what was evicted is gone
                staging.put(array, picks, room)
        file.finish()
        saved.commit(cache, block_of)
    except BaseException:
        allocator.forget(blocks)
        undo(blocks)
        raise
    allocator.share(np.repeat(blocks[: saved.used], saved.ref_counts[: saved.used] - 1))
    allocator.free(blocks[saved.used :][::-1])
    from .paged import _Held

    held = _Held(away)
    numbers = saved.lengths.tolist(), saved.swapped_out.tolist()
    for seq, length, gone, row in zip(seqs, *numbers, saved.table, strict=True):
        row = row[row != PADDING]
        slot = cache._new_slot(len(row))
        cache._lengths[slot] = length
        cache._slot_of[seq] = slot
        if gone:
            cache._away[slot] = held, row - saved.pool
        else:
            cache._table[slot, : len(row)] = block_of[row]


def save_dense(cache: KVCache, path: Path) -> None:
    """`KVCache.save`."""
    storage = cache._storage
    if storage is None:
        refuse("cache", "one that has no memory yet", "tokens appended to it first")
    name, rows = storage.like.dtype, min(cache.seqlen, storage.rows)
    stored = np.dtype(np.uint8) if name.startswith("float8") else numpy_dtype(name)
    strings = {"layout": cache.layout, "dtype": name, "rows": storage.rows}
    strings |= {"window": json.dumps(cache.window), "max_seqlen": json.dumps(cache.max_seqlen)}
    names = ["kv"] if cache.packed else ["k", "v"]
    shapes = [(cache.batch_size, rows, *base.shape[2:]) for base in storage.bases]
    data = {name: (stored, tuple(shape)) for name, shape in zip(names, shapes, strict=True)}
    lengths = cache.lengths
    with device_of(storage.like), Writer(path, "dense", strings, {"lengths": lengths}, data) as file:
        for base, b, tokens in _dense_pieces(storage.bases, stored.itemsize, rows):
            found = np.array(host_array(view(bits(base)[b, tokens], "cache")))
            found[max(int(lengths[b]) - tokens.start, 0) :] = 0
            file.write(found)


def load_dense(kind: type[KVCache], path: Path, device: Any) -> KVCache:
    """`KVCache.load`."""
    with Reader(path, "dense") as file:
        strings, lengths = file.strings, file.index["lengths"]
        (stored, first), (_, last) = (*file.data.values(),) * (2 // len(file.data))
        name, rows = strings["dtype"], first[1]
        window, most = json.loads(strings["window"]), json.loads(strings["max_seqlen"])
        like = prototype(name, device)
        if like.library == "cupy" and name.startswith("float8"):  # CuPy has no such dtype
            like = prototype("uint8", device)
        cache = object.__new__(kind)
        heads, packed = (*first[-2:], last[-1]), len(file.data) == 1
        cache._begin(len(lengths), heads, strings["layout"], most, window and tuple(window), packed)
        cache._storage, cache._lengths = cache._new_storage(like, int(strings["rows"])), lengths
        with device_of(like):
            pieces = [*_dense_pieces(cache._storage.bases, stored.itemsize, rows)]
            rooms = (np.empty((tokens.stop - tokens.start, *base.shape[2:]), stored) for base, _, tokens in pieces)
            with closing(file.read(rooms)) as found:
                for (base, b, tokens), room in zip(pieces, found, strict=True):
                    words = bits(base)
                    words[b, tokens] = put(room.view(str(words.dtype).removeprefix("torch.")), like)
        file.finish()
        return cache


def _dense_pieces(bases: Sequence[Any], itemsize: int, rows: int) -> Iterator[tuple[Any, int, slice]]:
    """A file's `k` and `v`, or `kv`, in order and in pieces of about CHUNK bytes: array, sequence, and rows of it."""
    for base in bases:
        step = max(CHUNK // (math.prod(base.shape[2:]) * itemsize), 1)
        for b in range(base.shape[0]):
            for start in range(0, rows, step):
                yield base, b, slice(start, min(start + step, rows))


class _Saved:
    """What the header and index of a file say; BadSnapshot if that makes no sense."""

    def __init__(self, file: Reader) -> None:
        strings, index = file.strings, file.index
        try:
            numbers = ("num_layers", "num_blocks", "block_size", "num_kv_heads", "head_dim")
            sizes = {name: int(strings[name]) for name in numbers}
            self.form = Form(
                **sizes, dtype=strings["dtype"], layout=strings["layout"], combined=strings["combined"] == "True"
            )
            self.watermarks = {name: float(strings[name]) for name in ("low_watermark", "high_watermark")}
            self.next, self.pool = int(strings["next_sequence"]), int(strings["pool_rows"])
            self.used = self.pool - int(strings["evictable_rows"])
            self.sequences, self.lengths, self.table = (index[name] for name in ("sequences", "lengths", "table"))
            self.ref_counts, self.rows = index["ref_counts"], len(index["ref_counts"])
            self.swapped_out = index["swapped_out"]
            known = [index[name] for name in ("committed", "hashes", "contents", "parents", "tokens")]
            self.committed, _, self.contents, self.parents, self.tokens = known
            whole = self._fits(file, sizes.values(), known)
        except (KeyError, ValueError, TypeError, IndexError):
            whole = False
        if not whole:
            file.refuse("whose header and index contradict each other")

    def _fits(self, file: Reader, sizes: Iterable[int], known: list[np.ndarray]) -> bool:
        form, count = self.form, len(self.sequences)
        shape = (form.num_layers, self.rows, *form.block)
        blocks = -(-self.lengths // form.block_size)
        used = np.arange(self.table.shape[1]) < blocks[:, None]
        away = used & (self.swapped_out != 0)[:, None]
        holders, _ = holders_and_fill(self.table, self.lengths, form.block_size, self.rows)
        first, contents = len(np.unique(self.sequences)), self.contents
        return (
            file.data == dict.fromkeys("kv", (form.stored, shape))
            and {name: array.dtype for name, array in file.index.items()} == _INDEX
            and (self.lengths.shape, self.table.shape[0], first) == ((count,), count, count)
            and [len(array) for array in known] == [len(contents)] * 5
            and self.tokens.shape == (len(contents), form.block_size)
            and min(sizes) >= 1
            and self.swapped_out.shape == (count,)
            and self.sequences.min(initial=0) >= 0
            and self.sequences.max(initial=-1) < self.next
            and self.lengths.min(initial=0) >= 0
            and blocks.max(initial=0) == self.table.shape[1]
            and bool(((self.table >= 0) == used).all())
            and np.array_equal(self.table >= self.pool, away)
            and np.array_equal(holders, self.ref_counts)
            and 0 <= self.used <= self.pool <= self.rows
            and bool((np.delete(self.ref_counts, np.s_[self.used : self.pool]) > 0).all())
            and not self.ref_counts[self.used : self.pool].any()
            and bool(((self.committed >= 0) & (self.committed < self.pool)).all())
            and len(np.unique(self.committed)) == len(self.committed)
            and bool(((contents > self.parents) & (self.parents >= 0)).all())
            and bool((np.diff(contents) >= 0).all())
        )

    def commit(self, cache: PagedKVCache, block_of: np.ndarray) -> None:
        """Make known what blocks hold: parents before what follows them, as they lie in the file."""
        blocks = block_of[self.committed]
        block_with: dict[int, int] = {}
        for content, block in zip(self.contents.tolist(), blocks.tolist(), strict=True):
            if block != PADDING:
                block_with.setdefault(content, block)
        # Runs in which each is the parent of the next are committed in one call.
        ends = np.flatnonzero((self.parents[1:] != self.contents[:-1]) | (blocks[1:] < 0) | (blocks[:-1] < 0)) + 1
        for run in np.split(np.arange(len(blocks)), ends):
            if not len(run) or blocks[run[0]] == PADDING:
                continue
            parent = int(self.parents[run[0]])
            before = block_with.get(parent)
            if not parent or (before is not None and cache.allocator.contents[before]):
                cache.allocator.commit(blocks[run], self.tokens[run].reshape(-1), before)


def _groups(cache: PagedKVCache, slots: np.ndarray) -> Iterator[tuple[list[int], Pair]]:
    """Which of these sequences were swapped out together, and where their blocks are."""
    groups: dict[int, list[int]] = {}
    for i, slot in enumerate(slots.tolist()):
        if slot in cache._away:
            groups.setdefault(id(cache._away[slot][0]), []).append(i)
    for group in groups.values():
        yield group, cache._away[slots[group[0]]][0].blocks


def _pieces(form: Form, parts: Sequence[Part]) -> Iterator[tuple[Any, np.ndarray, int]]:
    """A file's `k` and `v` in order and in pieces of about CHUNK bytes: one layer's array of blocks, which of these,
    and the first row."""
    step = _step(form)
    for side in (0, 1):
        for layer in range(form.num_layers):
            row = 0
            for pair, picks in parts:
                for start in range(0, len(picks), step):
                    yield pair[side][layer], picks[start : start + step], row + start
                row += len(picks)


def _step(form: Form) -> int:
    """Blocks in a piece."""
    return max(CHUNK // (math.prod(form.block) * form.stored.itemsize), 1)


class _Staging:
    """Host memory for two pieces, through which blocks of NumPy or CuPy arrays come and go. It waits for the device, so
    that it does not matter which streams wrote them."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._form, self._device = cache._form, cache.device
        self._rooms = [self._empty((_step(self._form), *self._form.block)) for _ in range(2)]
        self._wait()

    def room(self, count: int) -> np.ndarray:
        """(count, …) of the blocks' shape, with anything in it; two by turns, so that one can be written from."""
        self._rooms.reverse()
        return self._rooms[0][:count]

    def pair(self, count: int) -> Pair:
        """Keys and values of blocks in host memory, as `swap_out` makes them."""
        both = self._empty((2, self._form.num_layers, count, *self._form.block))
        return both[0], both[1]

    def take(self, array: Any, picks: np.ndarray) -> np.ndarray:
        """Copies of these blocks of an array (blocks, …)."""
        room = self.room(len(picks))
        if isinstance(array, np.ndarray):
            if array.flags.c_contiguous:
                np.take(bits(array), picks, axis=0, out=bits(room), mode="clip")  # twice as fast as an index
            else:
                bits(room)[...] = bits(array)[picks]
            return room
        cupy, device = self._on_device()
        with device:
            bits(array)[cupy.asarray(picks)].get(out=bits(room))
        return room

    def put(self, array: Any, picks: np.ndarray, blocks: np.ndarray) -> None:
        """Blocks into these places of an array (blocks, …); where -1 is said, none."""
        wanted = picks >= 0
        picks, blocks = picks[wanted], bits(blocks if wanted.all() else blocks[wanted])
        if isinstance(array, np.ndarray):
            bits(array)[picks] = blocks
            return
        cupy, device = self._on_device()
        with device:
            bits(array)[cupy.asarray(picks)] = cupy.asarray(blocks)
        self._wait()

    def _empty(self, shape: tuple[int, ...]) -> np.ndarray:
        if self._device is None:
            return np.empty(shape, self._form.stored)
        import cupyx

        return cupyx.empty_pinned(shape, self._form.stored)

    def _on_device(self) -> tuple[Any, Any]:
        import cupy

        return cupy, cupy.cuda.Device(self._device)

    def _wait(self) -> None:
        if self._device is not None:
            self._on_device()[1].synchronize()
