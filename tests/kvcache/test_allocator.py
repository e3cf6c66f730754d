"""BlockAllocator: counts, contents and errors, and long random sequences of calls against a plain model."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from cupyattn import BlockAllocator, DoubleFree, OutOfBlocks, UseAfterFree

OPERATIONS = 40_000


def state(allocator):
    """All that can be seen of it."""
    arrays = ("ref_counts", "contents", "parents", "hashes", "cached", "tokens", "free_blocks", "evictable_blocks")
    return {name: getattr(allocator, name).tolist() for name in arrays} | {"stats": allocator.stats()}


def unchanged(allocator, error, call):
    before = state(allocator)
    with pytest.raises(error) as caught:
        call()
    assert state(allocator) == before
    return caught.value


def test_allocate_share_free():
    allocator = BlockAllocator(8, 4)
    blocks = allocator.allocate(3)
    assert blocks.tolist() == [0, 1, 2] and blocks.dtype == np.int32
    allocator.share(blocks[1:])
    allocator.free(blocks)
    assert (allocator.num_used, allocator.num_free) == (2, 6)
    allocator.free([1, 2])
    assert allocator.num_free == 8 and not allocator.ref_counts.any()
    assert repr(allocator) == "BlockAllocator(8 blocks of 4: 0 used, 0 evictable, 8 free)"


def test_a_block_that_is_named_twice_counts_twice():
    allocator = BlockAllocator(4, 4)
    block = allocator.allocate(1)
    allocator.share([*block, *block])
    assert allocator.ref_counts[block] == 3
    allocator.free([*block] * 3)
    assert allocator.num_free == 4
    assert sorted(allocator.allocate(4).tolist()) == [0, 1, 2, 3], "it was given back once"


def test_out_of_blocks_tells_what_there_is():
    allocator = BlockAllocator(5, 2)
    kept = allocator.allocate(2)
    allocator.commit(kept, np.arange(4))
    allocator.free(kept)
    allocator.allocate(1)
    error = unchanged(allocator, OutOfBlocks, lambda: allocator.allocate(5))
    assert (error.asked, error.free, error.evictable) == (5, 2, 2)
    assert str(error) == "blocks: asked for 5 blocks, but 2 are free and 2 could be evicted"
    assert isinstance(error, MemoryError) and str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(allocator.allocate(4)) == 4 and allocator.stats().evictions == 2


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (DoubleFree, lambda a: a.free([3])),
        (DoubleFree, lambda a: a.free([0, 1, 0])),
        (UseAfterFree, lambda a: a.share([0, 5])),
        (UseAfterFree, lambda a: a.commit([5], np.arange(4))),
        (IndexError, lambda a: a.free([8])),
        (IndexError, lambda a: a.share([-1])),
        (TypeError, lambda a: a.free([0.5])),
        (TypeError, lambda a: a.free([[0]])),
        (TypeError, lambda a: a.allocate(1.0)),
        (TypeError, lambda a: a.allocate(True)),
        (ValueError, lambda a: a.allocate(-1)),
        (ValueError, lambda a: a.commit([0], np.arange(5))),
        (ValueError, lambda a: a.commit([0, 0], np.arange(8))),
        (ValueError, lambda a: a.commit([0], np.arange(4), parent=1)),
        (TypeError, lambda a: a.match(np.zeros(4))),
        (TypeError, lambda a: a.match([[1, 2]])),
    ],
)
def test_refusals_change_nothing(error, call):
    allocator = BlockAllocator(8, 4)
    allocator.allocate(2)
    assert str(unchanged(allocator, error, lambda: call(allocator))).split(":")[0] in (
        "blocks",
        "count",
        "tokens",
        "parent",
    )


@pytest.mark.parametrize(
    "options", [{"num_blocks": -1}, {"block_size": 0}, {"low_watermark": 0.9, "high_watermark": 0.5}], ids=str
)
def test_bad_pools(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BlockAllocator(**{"num_blocks": 8, "block_size": 4} | options)


def test_watermarks():
    allocator = BlockAllocator(10, 4, low_watermark=0.4, high_watermark=0.8)
    assert allocator.admits(8) and not allocator.admits(9)
    first, second = allocator.allocate(8), allocator.allocate(1)
    assert allocator.pressure and not allocator.admits(0)
    allocator.free(second)
    allocator.free(first[:3])
    assert allocator.pressure, "until no more than the low watermark is used"
    allocator.free(first[3:4])
    assert not allocator.pressure and allocator.admits(4)
    assert allocator.stats().peak_used == 9


# ---------------------------------------------------------------------------------------------- prefix caching


def test_a_prefix_is_found_again():
    allocator = BlockAllocator(8, 4)
    tokens = np.arange(11)
    blocks = allocator.allocate(2)
    allocator.commit(blocks, tokens[:8])
    assert allocator.match(tokens).tolist() == blocks.tolist()
    assert allocator.ref_counts[blocks].tolist() == [2, 2]
    assert allocator.match([0, 1, 2, 3, 9, 9, 9, 9]).tolist() == blocks[:1].tolist()
    assert allocator.match([9, 1, 2, 3, 4, 5, 6, 7]).tolist() == []
    assert (allocator.stats().hits, allocator.stats().misses) == (3, 3)


def test_the_same_tokens_behind_others_are_other_content():
    allocator = BlockAllocator(8, 2)
    first, second = allocator.allocate(2), allocator.allocate(2)
    allocator.commit(first, [1, 1, 5, 5])
    allocator.commit(second, [2, 2, 5, 5])
    assert allocator.match([2, 2, 5, 5]).tolist() == second.tolist()
    assert allocator.match([5, 5]).tolist() == []


def test_commit_goes_on_behind_a_parent():
    allocator = BlockAllocator(8, 2)
    blocks = allocator.allocate(3)
    allocator.commit(blocks[:1], [1, 2])
    allocator.commit(blocks[1:], [3, 4, 5, 6], parent=blocks[0])
    assert allocator.match([1, 2, 3, 4, 5, 6]).tolist() == blocks.tolist()


def test_a_second_block_of_the_same_content_is_not_found_but_can_be_gone_on_from():
    allocator = BlockAllocator(8, 2)
    first, second = allocator.allocate(1), allocator.allocate(2)
    allocator.commit(first, [1, 2])
    allocator.commit(second, [1, 2, 3, 4])
    assert allocator.match([1, 2, 3, 4]).tolist() == [first[0], second[1]]
    allocator.free(second[:1])
    assert allocator.num_evictable == 0 and allocator.num_free == 6


def test_a_second_block_of_the_same_content_is_found_when_the_first_is_gone():
    allocator = BlockAllocator(6, 2)
    first, second, third = (allocator.allocate(2) for _ in range(3))
    for blocks in (first, second, third):
        allocator.commit(blocks, [1, 1, 2, 2])
    allocator.free(first)
    before = state(allocator)
    taken = allocator.allocate(2)  # evicts what was found
    assert taken.tolist() == [first[1], first[0]]
    assert allocator.match([1, 1, 2, 2]).tolist() == second.tolist()
    allocator.free(second)
    allocator._undo(taken)
    after = state(allocator)
    assert after.pop("stats").hits == before.pop("stats").hits + 2 and after == before
    for expected in (second, third):
        allocator.forget(allocator.match([1, 1, 2, 2]))
        assert allocator.match([1, 1, 2, 2]).tolist() == expected.tolist()


def test_what_follows_a_second_block_is_found_when_the_first_is_gone():
    allocator = BlockAllocator(4, 2)
    first, second = allocator.allocate(1), allocator.allocate(1)
    allocator.commit(first, [1, 1])
    allocator.commit(second, [1, 1])
    allocator.free(first)
    allocator.allocate(3)
    allocator.free([first[0]])
    child = allocator.allocate(1)
    allocator.commit(child, [2, 2], parent=second[0])
    assert allocator.match([1, 1, 2, 2]).tolist() == [second[0], child[0]]


def test_the_longest_out_of_use_is_evicted_first_and_a_prefix_after_what_follows_it():
    allocator = BlockAllocator(4, 2)
    old, new = allocator.allocate(2), allocator.allocate(2)
    allocator.commit(old, [1, 1, 2, 2])
    allocator.commit(new, [3, 3, 4, 4])
    allocator.free(old)
    allocator.free(new)
    assert allocator.evictable_blocks.tolist() == [old[1], old[0], new[1], new[0]]
    allocator.free(allocator.match([1, 1]))
    assert allocator.allocate(3).tolist() == [old[1], new[1], new[0]]
    assert allocator.match([1, 1, 2, 2]).tolist() == [old[0]]


def test_what_is_written_over_is_forgotten():
    allocator = BlockAllocator(4, 2)
    blocks = allocator.allocate(2)
    allocator.commit(blocks, [1, 1, 2, 2])
    allocator.forget(blocks[1:])
    assert allocator.match([1, 1, 2, 2]).tolist() == [blocks[0]]
    allocator.free([blocks[0], *blocks])
    assert (allocator.num_evictable, allocator.num_free) == (1, 3)


@pytest.mark.parametrize("bits", [0, 1])
def test_a_hash_that_collides_is_no_hit(bits):
    """Every content has one of two hashes, or the same one: what is found is compared, all the same."""
    allocator = BlockAllocator(8, 2, hash_function=lambda row, seed: int(np.frombuffer(row, np.int64).sum()) & bits)
    first = allocator.allocate(2)
    allocator.commit(first, [1, 1, 2, 2])
    assert allocator.match([4, 4]).tolist() == [] and allocator.stats().collisions == 1
    second = allocator.allocate(1)
    allocator.commit(second, [4, 4])
    assert allocator.match([4, 4]).tolist() == second.tolist(), "the newer one is found"
    assert allocator.match([1, 1, 2, 2]).tolist() == []
    for blocks in (first, second, second):
        allocator.free(blocks)
    assert len(allocator.allocate(8)) == 8


def test_a_child_whose_parent_was_evicted_is_no_hit():
    allocator = BlockAllocator(3, 2)
    blocks = allocator.allocate(2)
    allocator.commit(blocks, [1, 1, 2, 2])
    allocator.free(blocks[:1])
    allocator.free(allocator.allocate(2))  # evicts the parent while the child is in use
    parent = allocator.allocate(1)
    allocator.commit(parent, [1, 1])
    assert allocator.match([1, 1, 2, 2]).tolist() == parent.tolist()


# -------------------------------------------------------------------------------------------- against a model


class Model:
    """Reference counts in a dict, and contents by the whole prefix, with the block that is found and then its twins."""

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.refs, self.found = {}, {}

    def prefixes(self, tokens):
        size = self.block_size
        return [tuple(tokens[:end]) for end in range(size, len(tokens) + 1, size)]

    def match(self, tokens):
        found = []
        for prefix in self.prefixes(tokens):
            if prefix not in self.found:
                break
            found.append(self.found[prefix][0])
        return found

    def take(self, block):
        self.refs[block] = self.refs.get(block, 0) + 1

    def give(self, block):
        self.refs[block] -= 1
        if not self.refs[block]:
            del self.refs[block]
            for prefix, known in self.found.items():
                self.found[prefix] = [known[0], *(twin for twin in known[1:] if twin != block)]

    def lose(self, block):
        """A twin takes the place of a block; without one nothing behind that prefix is found."""
        for prefix, known in [*self.found.items()]:
            if known[0] == block and len(known) > 1:
                self.found[prefix] = known[1:]
            elif known[0] == block:
                self.found = {other: held for other, held in self.found.items() if other[: len(prefix)] != prefix}


class Allocation(RuleBasedStateMachine):
    """Operations come as bytes, three each, which is quick to draw and to shrink."""

    done = 0

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 2))
    def start(self, num_blocks, block_size):
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.model = Model(num_blocks, block_size)
        self.held = []  # lists of blocks, as sequences have them, with their tokens

    @rule(data=st.binary(min_size=150, max_size=150))
    def operations(self, data):
        for code, a, b in zip(data[::3], data[1::3], data[2::3], strict=True):
            (self.add, self.add, self.drop, self.fork, self.extend, self.wrong)[code % 6](a, b)
            Allocation.done += 1
            self.agree()

    def add(self, a, b):
        """A sequence of tokens of few kinds: what is known of it is shared, the rest is new."""
        tokens = [(a >> i) & 1 for i in range(8)][: b % 9]
        tokens = tokens[: len(tokens) // self.model.block_size * self.model.block_size]
        expected = self.model.match(tokens)
        found = self.allocator.match(tokens)
        assert found.tolist() == expected
        for block in expected:
            self.model.take(block)
        self.grow([*expected], tokens)

    def extend(self, a, b):
        """A sequence goes on by full blocks of new tokens."""
        if self.held:
            blocks, tokens = self.held.pop(a % len(self.held))
            self.grow(blocks, tokens + [b & 1] * self.model.block_size)

    def grow(self, blocks, tokens):
        missing = len(tokens) // self.model.block_size - len(blocks)
        room = self.model.num_blocks - len(self.model.refs)
        if missing > room:
            error = unchanged(self.allocator, OutOfBlocks, lambda: self.allocator.allocate(missing))
            assert (error.asked, error.free + error.evictable) == (missing, room)
            self.held.append((blocks, tokens[: len(blocks) * self.model.block_size]))
            return
        evicted = [*self.allocator.evictable_blocks[: max(missing - self.allocator.num_free, 0)].tolist()]
        new = self.allocator.allocate(missing).tolist()
        for block in evicted:
            self.model.lose(block)
        assert not {*new} & self.model.refs.keys()
        for block in new:
            self.model.take(block)
        parent = blocks[-1] if blocks else None
        known = parent is None or self.allocator.contents[parent] != 0
        if new and known:
            self.allocator.commit(new, tokens[-missing * self.model.block_size :], parent)
            prefixes = self.model.prefixes(tokens)
            for i, block in enumerate([*blocks, *new]):
                if i >= len(blocks) and (i == 0 or prefixes[i - 1] in self.model.found):
                    self.model.found.setdefault(prefixes[i], []).append(block)
        self.held.append(([*blocks, *new], tokens))

    def drop(self, a, b):
        if self.held:
            blocks, _ = self.held.pop(a % len(self.held))
            self.allocator.free(blocks)
            for block in blocks:
                self.model.give(block)

    def fork(self, a, b):
        if self.held:
            blocks, tokens = self.held[a % len(self.held)]
            self.allocator.share(blocks)
            for block in blocks:
                self.model.take(block)
            self.held.append(([*blocks], tokens))

    def wrong(self, a, b):
        block = a % self.model.num_blocks
        if block in self.model.refs:
            times = self.model.refs[block] + 1
            unchanged(self.allocator, DoubleFree, lambda: self.allocator.free([block] * times))
        else:
            unchanged(self.allocator, UseAfterFree, lambda: self.allocator.share([block]))

    def agree(self):
        allocator, stats = self.allocator, self.allocator.stats()
        counts = np.zeros(allocator.num_blocks, np.int32)
        for block, refs in self.model.refs.items():
            counts[block] = refs
        assert np.array_equal(allocator.ref_counts, counts)
        assert stats.used == np.count_nonzero(counts) and stats.references == counts.sum()
        assert stats.shared == (counts > 1).sum()
        spare = [*allocator.free_blocks.tolist(), *allocator.evictable_blocks.tolist()]
        assert sorted(spare) == np.flatnonzero(counts == 0).tolist()
        assert (stats.free, stats.evictable) == (len(allocator.free_blocks), len(allocator.evictable_blocks))


def test_random_operations():
    Allocation.done = 0
    run_state_machine_as_test(Allocation, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))
    assert Allocation.done >= OPERATIONS


@pytest.mark.parametrize("batch", [16, 256, 4096])
def test_two_million_operations_a_second(batch):
    """Best of many over up to two seconds, so that other work on the machine does not count."""
    allocator = BlockAllocator(8192, 16)
    best = float("inf")
    for i in range(2000):
        begin = time.perf_counter()
        blocks = allocator.allocate(batch)
        allocator.share(blocks)
        allocator.free(blocks)
        allocator.free(blocks)
        best = min(best, time.perf_counter() - begin)
        if i % 50 == 49:
            if 4 * batch / best >= 2e6:
                break
            time.sleep(0.05)
    assert 4 * batch / best >= 2e6


def test_half_a_million_prefix_operations_a_second():
    allocator = BlockAllocator(8192, 16)
    tokens, best = np.arange(16 * 4096), float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        blocks = allocator.match(tokens)
        if not len(blocks):
            blocks = allocator.allocate(4096)
            allocator.commit(blocks, tokens)
        allocator.free(blocks)
        best = min(best, time.perf_counter() - begin)
    assert 2 * 4096 / best >= 5e5
