"""BlockAllocator: which blocks of a paged cache are free, how often each is referenced, and what full ones hold.

Calls take and give NumPy arrays of block ids, and cost a few microseconds and then nanoseconds a block. Where engines
share prefixes, a full block is found again by the tokens that it and all before it hold, as automatic prefix caching
in vLLM does it (Kwon et al. 2023, arXiv:2309.06180, and its later releases).
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from ..arrays import refuse
from .errors import DoubleFree, OutOfBlocks, UseAfterFree

Blocks = Sequence[int] | np.ndarray
_ONE = np.int32(1)  # of ref_counts' own dtype, with which ufunc.at is fifty times faster


@dataclass(frozen=True, slots=True)
class AllocatorStats:
    """Counts of blocks at one moment, and of all that happened before it."""

    num_blocks: int
    used: int  # referenced at least once
    free: int  # neither referenced nor of known content
    evictable: int  # not referenced, but found again by their content until somebody needs the room
    shared: int  # referenced more than once
    references: int
    peak_used: int
    allocated: int  # blocks handed out by `allocate`
    hits: int  # blocks that `match` found
    misses: int  # full blocks of tokens that it did not find
    collisions: int  # times that a hash led to another content, which was not taken
    evictions: int


class BlockAllocator:
    """`num_blocks` blocks of `block_size` tokens, counted by reference. It holds numbers only, no keys and values.

    A block is free, used (referenced), or evictable: not referenced, but kept with its content as long as no one needs
    the room. `allocate` takes free blocks first, then evicts, the one longest out of use first.

    Arrays to look at, one entry for each block: `ref_counts` int32; `contents` int64, a number of its own for each
    content and 0 where it is not known; `parents` int64, the content before it; `hashes` uint64; `cached` bool, whether
    `match` can find it; `tokens` int64 (num_blocks, block_size).

    Args:
        num_blocks: how many there are, ids 0 to num_blocks - 1.
        block_size: tokens in a block.
        low_watermark, high_watermark: shares of the blocks. `pressure` begins when more than the high one is used, and
            ends when no more than the low one is; `admits` keeps to the high one.
        hash_function: (bytes, seed) -> a number of 64 bits; xxh3_64 of the xxhash package by default.

    >>> from cupyattn import BlockAllocator
    >>> allocator = BlockAllocator(8, 16)
    >>> blocks = allocator.allocate(3)
    >>> allocator.share(blocks[:1])  # a second sequence has the first block too
    >>> allocator.free(blocks)
    >>> allocator.num_used, allocator.num_free
    (1, 7)
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        low_watermark: float = 1.0,
        high_watermark: float = 1.0,
        hash_function: Callable[[Any, int], int] | None = None,
    ) -> None:
        num_blocks, block_size = count_of("num_blocks", num_blocks), count_of("block_size", block_size, least=1)
        if not 0 <= low_watermark <= high_watermark <= 1:
            refuse("low_watermark, high_watermark", (low_watermark, high_watermark), "0 <= low <= high <= 1")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.low_watermark, self.high_watermark = low_watermark, high_watermark
        self.pressure = False
        self.ref_counts = np.zeros(num_blocks, np.int32)
        self.contents = np.zeros(num_blocks, np.int64)
        self.parents = np.zeros(num_blocks, np.int64)
        self.hashes = np.zeros(num_blocks, np.uint64)
        self.cached = np.zeros(num_blocks, bool)
        self.tokens = np.zeros((num_blocks, block_size), np.int64)
        self._stack = np.arange(num_blocks)[::-1].copy()  # the free ones are the first num_free
        self._place = np.zeros(num_blocks, np.intp)  # scratch
        self._evictable: OrderedDict[int, None] = OrderedDict()  # the one longest out of use first
        self._found: dict[int, int] = {}  # hash -> the cached block
        self._twins: dict[int, list[int]] = {}  # content -> used blocks that have it as well, but are not cached
        self._hash = hash_function
        self._last_content = 0
        self._sharings = 0  # calls that gave references to blocks which may have had some
        self._before: tuple[Any, ...] = ()  # what `_undo` needs of the last call of `allocate`
        self._num_free, self._used, self._peak = num_blocks, 0, 0
        self._allocated = self._hits = self._misses = self._collisions = self._evictions = 0

    # -------------------------------------------------------------------------------------- taking, giving back

    def allocate(self, count: int) -> np.ndarray:
        """Take `count` blocks, each with one reference: int32 (count,).

        Raises OutOfBlocks, and takes none, if so many are neither free nor evictable.
        """
        count = count_of("count", count)
        free, evicted = self._num_free, ()
        if count > free:
            evicted = self._evict(count)
        self._before = free, self._peak, self.pressure, evicted
        self._num_free -= count
        blocks = self._stack[self._num_free : self._num_free + count][::-1]
        self.ref_counts[blocks] = 1
        self._allocated += count
        self._count_used(count)
        return blocks.astype(np.int32)

    def _undo(self, blocks: np.ndarray) -> None:
        """Take the last call here, `allocate`, back, which gave these blocks; nobody has written into them.

        Other than after `free`, what was evicted for them is known as before, and the statistics know nothing of it.
        """
        self.ref_counts[blocks] = 0
        self._used -= len(blocks)
        self._allocated -= len(blocks)
        self._num_free, self._peak, self.pressure, evicted = self._before
        for block, content in reversed(evicted):
            key = int(self.hashes[block])
            heir = self._found.get(key)
            if heir is not None:
                self.cached[heir] = False
                self._twins.setdefault(content, []).insert(0, heir)
            self._found[key] = block
            self.cached[block], self.contents[block] = True, content
            self._evictable[block] = None
            self._evictable.move_to_end(block, last=False)
        self._evictions -= len(evicted)

    def share(self, blocks: Blocks) -> None:
        """Add a reference to each of these blocks, which are used; one that is named twice gets two.

        Raises UseAfterFree if one is not used.
        """
        ids = self._ids(blocks)
        self._check_used(ids)
        self._refer(ids)

    def _refer(self, ids: np.ndarray, times: int = 1) -> None:
        """Add references to blocks that are known to be used: intp (n,)."""
        np.add.at(self.ref_counts, ids, np.int32(times))
        self._sharings += 1

    def free(self, blocks: Blocks) -> None:
        """Give a reference to each of these blocks back; for one that is named twice, two.

        What nobody references any more becomes evictable if it is cached, else free. Of blocks that end together the
        last ones are evicted first, because a prefix is of use without what follows it.

        Raises DoubleFree if a block has fewer references.
        """
        ids = self._ids(blocks)
        np.subtract.at(self.ref_counts, ids, _ONE)
        left = self.ref_counts[ids]
        if np.count_nonzero(left):
            if left.min() < 0:
                np.add.at(self.ref_counts, ids, _ONE)
                bad = int(ids[left < 0][0])
                came = f"block {bad} given back more often than its {self.ref_counts[bad]} references"
                raise DoubleFree(f"blocks: got {came}, expected one reference for each time that a block is named")
            ids = ids[left == 0]
        if len(ids):
            self._end(ids)

    def _end(self, ids: np.ndarray) -> None:
        """Sort blocks without a reference into free and evictable ones. They may be named more than once."""
        order = np.arange(len(ids))
        self._place[ids] = order
        last = self._place[ids] == order
        if np.count_nonzero(last) < len(ids):
            ids = ids[last]
        self._count_used(-len(ids))
        kept = self.cached[ids]
        if np.count_nonzero(kept):
            for block in ids[kept][::-1].tolist():
                self._evictable[block] = None
            ids = ids[~kept]
        self.contents[ids] = 0
        self._push(ids)

    def _push(self, ids: np.ndarray | Sequence[int]) -> None:
        self._stack[self._num_free : self._num_free + len(ids)] = ids[::-1]  # the first is taken first
        self._num_free += len(ids)

    def _evict(self, asked: int) -> list[tuple[int, int]]:
        """Make `asked` blocks free. Returns those that were evicted for it and their contents, in that order."""
        missing = asked - self._num_free
        if missing > len(self._evictable):
            raise OutOfBlocks(asked, self._num_free, len(self._evictable))
        evicted = [self._evictable.popitem(last=False)[0] for _ in range(missing)]
        contents = self.contents[evicted].tolist()
        self._lose(evicted)
        self._push(evicted)
        self._evictions += missing
        for content in contents:
            self._inherit(content)
        return list(zip(evicted, contents, strict=True))

    def _count_used(self, change: int) -> None:
        self._used += change
        if self._used > self._peak:
            self._peak = self._used
        if self._used > self.high_watermark * self.num_blocks:
            self.pressure = True
        elif self._used <= self.low_watermark * self.num_blocks:
            self.pressure = False

    def admits(self, count: int) -> bool:
        """Whether `count` more blocks could be allocated without using more than the high watermark."""
        return self._used + count_of("count", count) <= self.high_watermark * self.num_blocks

    # ------------------------------------------------------------------------------------------ prefix caching

    def match(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The blocks that hold the longest known beginning of these tokens, int32, each with one more reference.

        Only full blocks are known, by `commit`. A hash decides where to look; tokens and all that is before them must
        be equal as well.
        """
        rows = self._rows(tokens)
        blocks = self._find(rows, self._keys(rows))
        self._hits += len(blocks)
        self._misses += len(rows) - len(blocks)
        revived = blocks[self.ref_counts[blocks] == 0]
        for block in revived.tolist():
            del self._evictable[block]
        self.ref_counts[blocks] += _ONE
        self._sharings += len(blocks) > 0
        self._count_used(len(revived))
        return blocks

    def commit(self, blocks: Blocks, tokens: Sequence[int] | np.ndarray, parent: int | None = None) -> None:
        """Say that these full blocks hold the keys and values of these tokens, so that `match` finds them.

        Where another block is known by the same content already, that one goes on being found, and this one when the
        other is gone.

        Args:
            blocks: used blocks, in order and all different.
            tokens: (len(blocks) * block_size,) integers: token ids, or whatever the keys and values depend on.
            parent: the block before the first one, of known content; None at the beginning of a sequence.

        Raises UseAfterFree if a block is not used; ValueError or TypeError if the arguments do not fit.
        """
        ids = self._ids(blocks)
        self._check_used(ids)
        rows = self._rows(tokens)
        if len(rows) != len(ids) or len(tokens) != len(ids) * self.block_size:
            refuse("tokens", f"{len(tokens)} of them", f"{len(ids) * self.block_size} for {len(ids)} blocks")
        if len(np.unique(ids)) != len(ids):
            refuse("blocks", "a block twice", "each block once")
        content = seed = 0
        if parent is not None:
            parent = int(self._ids([parent])[0])
            content, seed = int(self.contents[parent]), int(self.hashes[parent])
            if not content:
                refuse("parent", f"block {parent}, of unknown content", "a block that was committed")
        keys = [*self._keys(rows, seed)]
        known = self._find(rows, keys, content)
        hits = len(known)
        if hits:
            same, contents = ids[:hits], self.contents[known]
            twins = same != known
            self.forget(same[twins])
            self.contents[same], self.parents[same] = contents, np.concatenate([[content], contents])[:-1]
            self.hashes[same], self.tokens[same] = np.array(keys[:hits], np.uint64), rows[:hits]
            for block, held in zip(same[twins].tolist(), contents[twins].tolist(), strict=True):
                others = [other for other in self._twins.get(held, ()) if other != block and self._is_twin(other, held)]
                self._twins[held] = [*others, block]
            content = int(contents[-1])
        self.forget(ids[hits:])
        self._record(ids[hits:], rows[hits:], keys[hits:], content)

    def _record(self, ids: np.ndarray, rows: np.ndarray, keys: list[int], content: int) -> None:
        """Blocks of new content, each behind the one before it and the first behind `content`."""
        # A chance collision, or what is left of a sequence whose beginning was evicted.
        for key in self._found.keys() & keys:
            self._twins.pop(int(self.contents[self._found[key]]), None)
            self._drop(self._found[key])
        if len({*keys}) < len(keys):  # a collision among these: the blocks up to it are kept
            count = next(i for i, key in enumerate(keys) if key in keys[:i])
            ids, rows, keys = ids[:count], rows[:count], keys[:count]
        contents = self._last_content + np.arange(1, len(ids) + 1)
        self._last_content += len(ids)
        self.contents[ids], self.parents[ids] = contents, np.concatenate([[content], contents])[:-1]
        self.hashes[ids], self.tokens[ids], self.cached[ids] = np.array(keys, np.uint64), rows, True
        self._found.update(zip(keys, ids.tolist(), strict=True))

    def _find(self, rows: np.ndarray, keys: Iterable[int], content: int = 0) -> np.ndarray:
        """The blocks of the longest known beginning of these rows behind `content`: int32, at most len(rows)."""
        blocks = np.array([*takewhile(_is_block, map(self._found.get, keys))], np.int32)
        before = np.concatenate([[content], self.contents[blocks]])[:-1]
        right = (self.parents[blocks] == before) & (self.tokens[blocks] == rows[: len(blocks)]).all(axis=1)
        hits = len(blocks) if right.all() else int(right.argmin())
        self._collisions += hits < len(blocks)
        return blocks[:hits]

    def forget(self, blocks: Blocks) -> None:
        """These blocks are about to hold something else: `match` no longer finds them. They stay what they are."""
        ids = self._ids(blocks)
        contents = self.contents[ids]
        if contents.any():
            cached = self.cached[ids]
            for block in ids[cached].tolist():
                self._drop(block)
            self.contents[ids] = 0
            for content in contents[cached].tolist():
                self._inherit(content)

    def _drop(self, block: int) -> None:
        """Let a cached block no longer be found."""
        self._lose([block])
        if block in self._evictable:
            del self._evictable[block]
            self._push([block])

    def _inherit(self, content: int) -> None:
        """Let a block be found whose cached twin is gone; what follows this content goes on being found then."""
        twins = [block for block in self._twins.pop(content, ()) if self._is_twin(block, content)]
        if twins:
            heir, *others = twins
            self.cached[heir] = True
            self._found[int(self.hashes[heir])] = heir
            if others:
                self._twins[content] = others

    def _is_twin(self, block: int, content: int) -> bool:
        """Whether a block still has a content, and is not the one that is found by it."""
        return bool(self.contents[block] == content and not self.cached[block])

    def _lose(self, blocks: list[int]) -> None:
        for key in self.hashes[blocks].tolist():
            del self._found[key]
        self.cached[blocks] = False
        self.contents[blocks] = 0

    def _rows(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The full blocks of tokens: int64 (n, block_size)."""
        tokens = token_ids(tokens)
        full = len(tokens) // self.block_size
        return tokens[: full * self.block_size].astype(np.int64).reshape(full, self.block_size)

    def _keys(self, rows: np.ndarray, seed: int = 0) -> Iterator[int]:
        """The hash of each full block and all before it."""
        if self._hash is None:
            from xxhash import xxh3_64_intdigest  # only those who share prefixes need to load it

            self._hash = xxh3_64_intdigest
        for row in rows:
            seed = self._hash(row, seed)
            yield seed

    # -------------------------------------------------------------------------------------------- looking inside

    @property
    def num_used(self) -> int:
        return self._used

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    @property
    def free_blocks(self) -> np.ndarray:
        """The free blocks, int32, in the order in which they will be taken."""
        return self._stack[: self._num_free][::-1].astype(np.int32)

    @property
    def evictable_blocks(self) -> np.ndarray:
        """The evictable blocks, int32, in the order in which they will be evicted."""
        return np.fromiter(self._evictable, np.int32, len(self._evictable))

    def stats(self) -> AllocatorStats:
        """Counts of this moment and of all that happened before it."""
        return AllocatorStats(
            num_blocks=self.num_blocks,
            used=self._used,
            free=self._num_free,
            evictable=len(self._evictable),
            shared=int((self.ref_counts > 1).sum()),
            references=int(self.ref_counts.sum()),
            peak_used=self._peak,
            allocated=self._allocated,
            hits=self._hits,
            misses=self._misses,
            collisions=self._collisions,
            evictions=self._evictions,
        )

    def __repr__(self) -> str:
        counts = f"{self._used} used, {len(self._evictable)} evictable, {self._num_free} free"
        return f"BlockAllocator({self.num_blocks} blocks of {self.block_size}: {counts})"

    def _ids(self, blocks: Blocks) -> np.ndarray:
        """Block ids as intp (n,); refuses what are none."""
        ids = np.asarray(blocks)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            refuse("blocks", f"{ids.dtype} of shape {ids.shape}", "a 1-D array of integers", TypeError)
        found = ids.astype(np.intp)
        if found.size:
            # Of unsigned numbers the negative ones are the greatest; argmax takes a third of the time of max.
            unsigned = found.view(np.uintp)
            if unsigned[unsigned.argmax()] >= self.num_blocks:
                refuse("blocks", f"{ids.min()} to {ids.max()}", f"0 to {self.num_blocks - 1}", IndexError)
        return found

    def _check_used(self, ids: np.ndarray) -> None:
        counts = self.ref_counts[ids]
        if counts.min(initial=1) < 1:
            raise UseAfterFree(f"blocks: got {ids[counts < 1][0]}, which nobody holds, expected used blocks")


def _is_block(found: int | None) -> bool:
    return found is not None


def token_ids(tokens: Any) -> np.ndarray:
    """Token ids as a NumPy array of integers (n,); refuses what is none."""
    found = np.asarray(tokens)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        refuse("tokens", f"{found.dtype} of shape {found.shape}", "a 1-D array of integers", TypeError)
    if found.dtype == np.uint64 and found.max(initial=0) > np.iinfo(np.int64).max:
        refuse("tokens", int(found.max()), "less than 2**63")
    return found


def count_of(name: str, value: Any, least: int = 0) -> int:
    """A number of things as an int; refuses what is none or too few."""
    number = value
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            refuse(name, repr(value), "an int", TypeError)
    if number < least:
        refuse(name, number, f"at least {least}")
    return number
