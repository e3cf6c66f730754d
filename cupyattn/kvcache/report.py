"""Reports: where the memory of a PagedKVCache is, what sharing saves, and what would be leaked."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np

from .allocator import count_of

if TYPE_CHECKING:
    from .paged import PagedKVCache

SHOWN_SEQUENCES = 20
SCORE_BYTES = 4  # float32, as softmax wants it


@dataclass(frozen=True, slots=True)
class SequenceReport:
    """One sequence of a cache. Numbers of blocks and tokens; times `block_bytes` or `token_bytes` they are memory."""

    seq: int
    tokens: int
    blocks: int
    shared: int  # of these blocks, those that other sequences have too
    wasted: int  # rows of its last block that hold no token
    swapped_out: bool


@dataclass(frozen=True, slots=True)
class Leak:
    """A block whose references do not match the sequences that have it.

    references over holders: somebody took the block and did not give it back, so that it will never be free. Under:
    it will be free while it is in use. Neither, but counted here: the allocator has lost it.
    """

    block: int
    references: int
    holders: int  # sequences

    def __str__(self) -> str:
        if self.references == self.holders:
            return f"block {self.block} is neither used nor free"
        who = "no sequence" if not self.holders else f"{self.holders} sequence" + "s" * (self.holders > 1)
        return f"block {self.block} has {self.references} references and is in {who}"


@dataclass(frozen=True, repr=False)
class CacheReport:
    """What `PagedKVCache.report` found at one moment. Printed it is a few tables; bytes are those of all layers."""

    num_blocks: int
    block_size: int
    num_layers: int
    num_heads: int  # of queries
    max_seqlen: int  # rows of each sequence in the dense cache that this one is compared with
    block_bytes: int
    used: int  # blocks with a reference
    free: int
    evictable: int  # without one, but kept for their prefix as long as there is room
    shared: int  # blocks with several references
    references: int
    wasted: int  # rows of used blocks that hold no token
    sequences: tuple[SequenceReport, ...]
    leaks: tuple[Leak, ...]

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token."""
        return self.block_bytes // self.block_size

    @property
    def allocated_bytes(self) -> int:
        """The pool."""
        return self.num_blocks * self.block_bytes

    @property
    def used_bytes(self) -> int:
        return self.used * self.block_bytes

    @property
    def wasted_bytes(self) -> int:
        return self.wasted * self.token_bytes

    @property
    def saved_bytes(self) -> int:
        """What the same sequences would take beyond `used_bytes` if they shared nothing."""
        return (self.references - self.used) * self.block_bytes

    @property
    def dense_bytes(self) -> int:
        """A dense cache of the same sequences, without those swapped out, each padded to `max_seqlen`."""
        return len(self._here) * self.max_seqlen * self.token_bytes

    @property
    def naive_bytes(self) -> int:
        """The scores that naive attention over these sequences holds, each queries by keys, N² a head, in one layer."""
        return sum(found.tokens**2 for found in self._here) * self.num_heads * SCORE_BYTES

    @property
    def fused_bytes(self) -> int:
        """What fused attention keeps in their place: the log-sum-exp, one number for each query and head."""
        return sum(found.tokens for found in self._here) * self.num_heads * SCORE_BYTES

    @property
    def _here(self) -> list[SequenceReport]:
        return [found for found in self.sequences if not found.swapped_out]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, lists and dicts, as JSON has them."""
        names = ("token", "allocated", "used", "wasted", "saved", "dense", "naive", "fused")
        found = asdict(self) | {f"{name}_bytes": getattr(self, f"{name}_bytes") for name in names}
        return found | {name: list(found[name]) for name in ("sequences", "leaks")}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        def table(title: str, *columns: str) -> Table:
            made = Table(title=title, title_justify="left")
            for column in columns:
                made.add_column(column, justify="left" if column == columns[0] else "right")
            return made

        pool = table(f"{self.num_blocks} blocks of {self.block_size} tokens", "pool", "blocks", "memory", "of pool")
        for name, blocks in self._shares().items():
            memory = round(blocks * self.block_bytes)
            count = "" if name.startswith("  ") else str(round(blocks))
            pool.add_row(name, count, size(memory), percent(memory, self.allocated_bytes))
        pool.add_row("saved by sharing", str(self.references - self.used), size(self.saved_bytes), "")

        rows = table(
            f"{len(self.sequences)} sequences", "sequence", "tokens", "blocks", "shared", "wasted rows", "memory"
        )
        for found in self.sequences[:SHOWN_SEQUENCES]:
            name = f"{found.seq}, swapped out" if found.swapped_out else str(found.seq)
            numbers = (found.tokens, found.blocks, found.shared, found.wasted)
            rows.add_row(name, *map(str, numbers), size(found.blocks * self.block_bytes))
        if len(self.sequences) > SHOWN_SEQUENCES:
            rows.add_row(f"… {len(self.sequences) - SHOWN_SEQUENCES} more")

        other = table("The same sequences in other ways", "memory of", "", "less is", "reduction")
        padded = f"a dense cache, {self.max_seqlen} rows each"
        for name, bigger, smaller, by in (
            (padded, self.dense_bytes, self.used_bytes, "paged"),
            (f"naive attention's scores, N², {self.num_heads} heads", self.naive_bytes, self.fused_bytes, "fused"),
        ):
            saved = percent(bigger - smaller, bigger, digits=1) if smaller <= bigger else "none"
            other.add_row(name, size(bigger), f"{by}: {size(smaller)}", saved)
        leaks = [Text(f"leak: {leak}") for leak in self.leaks[:SHOWN_SEQUENCES]]
        more = len(self.leaks) - len(leaks)
        leaks += [Text(f"… and {more} more leaks")] if more else []
        return Group(pool, rows, other, *(leaks or [Text("no leaks")]))

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """The pool, the sequences and the comparison as bars: a matplotlib Figure, written to `path` if given."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('plot needs matplotlib: pip install "cupyattn[notebooks]"') from error
        figure = Figure(figsize=(12, 4), layout="constrained")
        pool, rows, other = figure.subplots(1, 3, width_ratios=(1, 3, 2))
        shares, low = self._shares(), 0.0
        for name, colour in (("  tokens", "C0"), ("  wasted", "C3"), ("evictable", "0.6"), ("free", "0.9")):
            pool.bar([""], [shares[name]], bottom=low, color=colour, label=name.strip())
            low += shares[name]
        pool.set(title="pool", ylabel="blocks", ylim=(0, self.num_blocks))
        pool.legend(fontsize="small")
        names = [str(found.seq) for found in self.sequences]
        own = np.array([found.blocks - found.shared for found in self.sequences])
        shared = np.array([found.shared for found in self.sequences])
        wasted = np.array([found.wasted / self.block_size for found in self.sequences])
        rows.bar(names, shared, color="0.3", label="shared")
        rows.bar(names, own, bottom=shared, color="C0", label="own")
        rows.bar(names, wasted, bottom=own + shared - wasted, color="C3", label="wasted")
        rows.set(title="sequences", ylabel="blocks", xlabel="id")
        rows.legend(fontsize="small")
        if len(names) > SHOWN_SEQUENCES:
            rows.set_xticks([])
        compared = {"paged": self.used_bytes, "dense": self.dense_bytes}
        compared |= {"fused\nlog-sum-exp": self.fused_bytes, "naive\nscores": self.naive_bytes}
        bars = other.bar(list(compared), list(compared.values()), color=["C0", "0.6", "C0", "0.6"])
        other.bar_label(bars, [size(count) for count in compared.values()], fontsize="small")
        other.set(title="in other ways", ylabel="bytes", yscale="log" if all(compared.values()) else "linear")
        if path is not None:
            figure.savefig(path)
        return figure

    def _shares(self) -> dict[str, float]:
        """Blocks of the pool by what they are; the indented ones are parts of the used ones."""
        wasted = self.wasted / self.block_size
        used = {"used": self.used, "  tokens": self.used - wasted, "  wasted": wasted, "  shared": self.shared}
        return {**used, "evictable": self.evictable, "free": self.free}


def report(cache: PagedKVCache, num_heads: int | None = None, max_seqlen: int | None = None) -> CacheReport:
    """`PagedKVCache.report`."""
    stats, lengths, tables = cache.allocator.stats(), cache.lengths, cache.tables
    holders, fill = holders_and_fill(tables, lengths, cache.block_size, cache.num_blocks)
    blocks = -(-lengths // cache.block_size)
    shared = ((tables >= 0) & (cache.allocator.ref_counts[tables] > 1)).sum(axis=1)
    away = [cache.is_swapped_out(seq) for seq in cache]
    columns = cache.ids, lengths, blocks, shared, blocks * cache.block_size - lengths
    numbers = zip(*(column.tolist() for column in columns), away, strict=True)
    sequences = tuple(SequenceReport(*row) for row in numbers)
    longest = max((found.tokens for found in sequences if not found.swapped_out), default=0)
    return CacheReport(
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        num_layers=cache.num_layers,
        num_heads=cache.num_kv_heads if num_heads is None else count_of("num_heads", num_heads, 1),
        max_seqlen=longest if max_seqlen is None else count_of("max_seqlen", max_seqlen, longest),
        block_bytes=cache.nbytes // cache.num_blocks,
        used=stats.used,
        free=stats.free,
        evictable=stats.evictable,
        shared=stats.shared,
        references=stats.references,
        wasted=int((cache.block_size - fill[holders > 0]).sum()),
        sequences=sequences,
        leaks=find_leaks(cache),
    )


def find_leaks(cache: PagedKVCache) -> tuple[Leak, ...]:
    """Blocks whose references do not match the sequences that have them, in the order of their ids.

    Code that takes blocks of `cache.allocator` for itself is found here until it gives them back.
    """
    allocator = cache.allocator
    holders, _ = holders_and_fill(cache.tables, cache.lengths, cache.block_size, cache.num_blocks)
    known = allocator.ref_counts > 0
    known[allocator.free_blocks] = True
    known[allocator.evictable_blocks] = True
    wrong = np.flatnonzero((allocator.ref_counts != holders) | ~known)
    return tuple(Leak(block, int(allocator.ref_counts[block]), int(holders[block])) for block in wrong.tolist())


def holders_and_fill(
    table: np.ndarray, lengths: np.ndarray, block_size: int, num_blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each block how many sequences have it, and how many tokens it holds: int64 (num_blocks,), twice.

    table: int32 (batch, max_blocks), -1 where there is none; lengths: int64 (batch,).
    """
    sequence, column = np.nonzero(table >= 0)
    blocks = table[sequence, column]
    fill = np.zeros(num_blocks, np.int64)
    np.maximum.at(fill, blocks, np.minimum(lengths[sequence] - column * block_size, block_size))
    return np.bincount(blocks, minlength=num_blocks), fill


def as_text(shown: Any) -> str:
    """What rich prints of an object, without colours."""
    from rich.console import Console

    console = Console(file=StringIO(), width=100, force_jupyter=False)
    console.print(shown)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def size(count: int) -> str:
    """Bytes in units of 1000: "1.5 GB"."""
    number, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}"


def percent(part: int, whole: int, digits: int = 0) -> str:
    return f"{100 * part / whole:.{digits}f} %" if whole else ""
