"""PagedKVCache: keys and values of many growing sequences in blocks of one pool, shared wherever they are the same.

Paging and copy-on-write are those of PagedAttention (Kwon et al. 2023, arXiv:2309.06180). Everything is decided on the
host, in arrays with a row for each sequence; the device is told what to write and what to copy, in one launch each.
A call that raises has changed nothing.
"""

from __future__ import annotations

import operator
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..arrays import host_array, refuse, view
from ..problem import FLOAT_DTYPES, FP8_DTYPES, MAX_HEAD_DIM
from ..ragged import RaggedArray
from . import snapshots
from .allocator import BlockAllocator, count_of, token_ids
from .block_map import block_map
from .block_table import INT32_MAX, PADDING, BlockTable
from .errors import DoubleFree, SwappedOut, UnknownSequence, UseAfterFree
from .new_rows import new_rows, per_sequence
from .report import CacheReport, report
from .store import DeviceStore, Form, HostStore, Pair
from .transfer import device_number
from .writing import Decoding, Writing

Array = Any  # an array of NumPy, CuPy, PyTorch, JAX, or of any library that speaks DLPack
Sequences = int | Sequence[int] | np.ndarray
KEPT_TABLES = 16  # of different batches


@dataclass(slots=True, eq=False)
class _Held:
    """Blocks in host memory, of the sequences that one `swap_out` put there."""

    blocks: Pair


@dataclass(slots=True)
class Growth:
    """Room that was made for new tokens of some sequences, and what it takes to give it back."""

    slots: np.ndarray
    start: np.ndarray  # tokens before
    end: np.ndarray
    blocks: np.ndarray  # newly allocated: copies of shared blocks, then new ones
    at: tuple[np.ndarray, np.ndarray]  # rows and columns of the table where these are
    copied: np.ndarray  # shared blocks that were at the first of these places, and are to be copied
    overwritten: np.ndarray  # blocks that are written to though they were full once
    written: bool = False  # whether new blocks hold copies already


@dataclass(slots=True)
class _Tabled:
    """A BlockTable that was handed out, and up to which change it follows the cache."""

    key: tuple[tuple[int, ...], int]  # seqs and max_blocks
    table: BlockTable
    change: int


class PagedKVCache:
    """A pool of blocks of keys and values, and the sequences in it, which are named by ints that `add` gives out.

    Every call takes one sequence or several. `append` writes new keys and values behind what a sequence holds; `extend`
    only makes the room, for `attention_with_kvcache` to write into in its own launch, or `write` layer by layer. `fork`
    and `reorder` copy nothing: blocks are shared and counted, and one that is shared is copied when a sequence is about
    to write into it. With token ids, `add` and `commit` share prefixes between requests as well.

    Arrays of the cache, and those that it makes, are NumPy's where `device` is None, else CuPy's. Work follows the
    current stream of the library that new keys come from, or else CuPy's. None of it may be captured in a CUDA graph;
    the attention that reads `block_table` may. A cache is for one thread at a time.

    Args:
        num_blocks, block_size: blocks in the pool, tokens in a block.
        num_kv_heads, head_dim: of keys and of values.
        num_layers: layers that have the same sequences and the same block ids, each with memory of its own.
        dtype: "float16", "bfloat16", "float32", "float8_e4m3fn" or "float8_e5m2"; FP8 is stored as uint8 and wants
            `kv_dtype=cache.dtype` in attention.
        layout: "NHD", blocks (block_size, kv_heads, head_dim), or "HND", (kv_heads, block_size, head_dim).
        combined: keys and values of a block side by side, in one array `kv` (num_blocks, 2, …).
        device: None for NumPy, or the number of a CUDA device.
        low_watermark, high_watermark: of the `allocator`.

    Raises:
        OutOfBlocks: a call needs more blocks than there are. UnknownSequence, UseAfterFree, DoubleFree, SwappedOut: a
            sequence is not there. TypeError, ValueError, IndexError: an argument does not fit. The message names it.

    >>> import numpy as np
    >>> from cupyattn import PagedKVCache, attention_with_kvcache
    >>> cache = PagedKVCache(64, 16, num_kv_heads=2, head_dim=64, dtype="float32")
    >>> seqs = [cache.add(), cache.add()]
    >>> k, v = np.ones((2, 2, 20, 2, 64), np.float32)
    >>> cache.append(k, v, seqs)
    >>> q = np.ones((2, 1, 8, 64), np.float32)
    >>> out = attention_with_kvcache(
    ...     q, cache.k, cache.v, block_table=cache.block_table(seqs), cache_seqlens=cache.seqlens(seqs)
    ... )
    >>> seqs.append(cache.fork(seqs[0]))
    >>> cache
    PagedKVCache(3 sequences of 20 tokens, 4/64 blocks used (6 %), 2 shared; blocks of 16, 2 × 64 float32, NHD, cpu)
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_layers: int = 1,
        dtype: Any = "float16",
        layout: str = "NHD",
        combined: bool = False,
        device: int | None = None,
        low_watermark: float = 1.0,
        high_watermark: float = 1.0,
    ) -> None:
        head_dim = count_of("head_dim", head_dim, 1)
        if head_dim > MAX_HEAD_DIM:
            refuse("head_dim", head_dim, f"1 to {MAX_HEAD_DIM}")
        if layout not in ("NHD", "HND"):
            refuse("layout", repr(layout), "'NHD' or 'HND'")
        form = Form(
            num_layers=count_of("num_layers", num_layers, 1),
            num_blocks=count_of("num_blocks", num_blocks, 1),
            block_size=count_of("block_size", block_size, 1),
            num_kv_heads=count_of("num_kv_heads", num_kv_heads, 1),
            head_dim=head_dim,
            dtype=_dtype_name(dtype),
            layout=layout,
            combined=bool(combined),
        )
        if form.num_layers * form.num_blocks > INT32_MAX:
            refuse("num_blocks", f"{num_blocks} for {num_layers} layers", f"at most {INT32_MAX} in all")
        self.allocator = BlockAllocator(
            form.num_blocks, form.block_size, low_watermark=low_watermark, high_watermark=high_watermark
        )
        self._form = form
        self._kv_dtype = form.dtype if form.is_fp8 else None
        self._store = HostStore(form) if device is None else DeviceStore(form, device_number(device))
        self._next = 0
        self._slot_of: dict[int, int] = {}  # row of the arrays below that a sequence has; in the order of `add`
        self._spare: list[int] = []
        self._lengths = np.zeros(0, np.int64)
        self._table = np.full((0, 1), PADDING, np.int32)  # as many blocks as the length needs, then padding
        self._changed = np.zeros(0, np.int64)  # when a row was last changed,
        self._moved = np.zeros(0, np.int64)  # and when its blocks were
        self._change = 0
        self._away: dict[int, tuple[_Held, np.ndarray]] = {}  # slot: what is swapped out, as numbers of blocks in it
        self._tables: OrderedDict[tuple[tuple[int, ...], int], _Tabled] = OrderedDict()  # last asked for, last
        self._last_asked: tuple[list[int], np.ndarray] | None = None
        self._decoding: Decoding | None = None

    # ------------------------------------------------------------------------------------ sequences come and go

    def add(self, tokens: Sequence[int] | np.ndarray | None = None) -> int:
        """A new sequence, and the id by which it goes. It is empty, unless the beginning of `tokens` is known.

        tokens: the ids of a prompt, 1-D. The longest prefix of full blocks that `commit` made known, of another
        sequence or of one long freed, is shared with it; `length` then tells how many tokens need not be computed. At
        least the last token is left, because a model needs a query.
        """
        blocks = np.empty(0, np.int32)
        if tokens is not None:
            blocks = self.allocator.match(token_ids(tokens)[:-1])
        slot = self._new_slot(len(blocks))
        self._table[slot, : len(blocks)] = blocks
        self._lengths[slot] = len(blocks) * self.block_size
        return self._name(slot)

    def free(self, seqs: Sequences) -> None:
        """End sequences. Blocks that no other has are free again, or kept for prefixes as long as there is room.

        Raises DoubleFree for a sequence that was freed already.
        """
        for seq in _listed(seqs):
            if seq not in self._slot_of and _is_id(seq, self._next):
                raise DoubleFree(f"seqs: got sequence {seq}, which was freed already, expected one that is there")
        slots = self._slots(seqs, away=True)
        self.allocator.free(self._blocks_of(slots))
        for slot, seq in zip(slots.tolist(), _listed(seqs), strict=True):
            self._away.pop(slot, None)
            del self._slot_of[seq]
        self._table[slots] = PADDING
        self._lengths[slots] = 0
        self._touch(slots, slots)
        self._spare += slots.tolist()
        self._last_asked = None
        for key in [key for key in self._tables if not self._slot_of.keys() >= {*key[0]}]:
            del self._tables[key]

    def fork(self, seq: int, count: int | None = None) -> Any:
        """A new sequence, or a list of `count`, that goes on from where seq is. Nothing is copied now: all blocks are
        shared, and of a last block that is not full each sequence gets its own when it writes into it."""
        slot = self._slot(seq)
        wanted = 1 if count is None else count_of("count", count)
        blocks = self._blocks(slot)
        self.allocator._refer(blocks.astype(np.intp), wanted)
        made = []
        for _ in range(wanted):
            new = self._new_slot(len(blocks))
            self._table[new, : len(blocks)] = blocks
            self._lengths[new] = self._lengths[slot]
            made.append(self._name(new))
        return made[0] if count is None else made

    def reorder(self, beam_idx: Sequence[int] | np.ndarray | Array, seqs: Sequences | None = None) -> None:
        """Sequence i of seqs becomes what sequence beam_idx[i] of them was: the step of a beam search.

        Ids stay, no block is copied now, and blocks that no beam continues are free.

        Args:
            beam_idx: (len(seqs),) integers, of any library (an array on a GPU is read, which waits for it).
            seqs: the beams; all sequences in their order if None.
        """
        slots = self._slots(list(self) if seqs is None else seqs)
        beams = host_array(view(beam_idx, "beam_idx")) if hasattr(beam_idx, "shape") else np.asarray(beam_idx)
        if beams.ndim != 1 or (beams.size and beams.dtype.kind not in "iu"):
            refuse("beam_idx", f"{beams.dtype} of shape {beams.shape}", "a 1-D array of integers", TypeError)
        if len(beams) != len(slots):
            refuse("beam_idx", f"{len(beams)} entries", f"{len(slots)}, one for each sequence")
        if len(beams) and not 0 <= beams.min() <= beams.max() < len(slots):
            refuse("beam_idx", f"{beams.min()} to {beams.max()}", f"0 to {len(slots) - 1}", IndexError)
        moved = slots[beams] != slots
        sources, targets = slots[beams][moved], slots[moved]
        self.allocator.share(self._blocks_of(sources))
        self.allocator.free(self._blocks_of(targets))
        self._table[targets], self._lengths[targets] = self._table[sources], self._lengths[sources]
        self._touch(targets, targets)

    def truncate(self, seqs: Sequences, lengths: int | Sequence[int] | np.ndarray) -> None:
        """Keep only the first `lengths` tokens of sequences, one number for all or one for each."""
        slots = self._slots(seqs)
        wanted = per_sequence("lengths", lengths, len(slots))
        held = self._lengths[slots]
        bad = np.flatnonzero(wanted > held)
        if len(bad):
            refuse("lengths", f"{wanted[bad[0]]} for a sequence of {held[bad[0]]}", "at most what the sequence holds")
        keep = self._num_blocks_for(wanted)
        columns = np.arange(self._table.shape[1])
        cut = (columns >= keep[:, None]) & (columns < self._num_blocks_for(held)[:, None])
        row, column = np.nonzero(cut)
        self.allocator.free(self._table[slots[row], column])
        self._table[slots[row], column] = PADDING
        self._lengths[slots] = wanted
        self._touch(slots, slots[row])

    # ------------------------------------------------------------------------------------------------- growing

    def append(
        self,
        k: Array | RaggedArray,
        v: Array | RaggedArray,
        seqs: Sequences,
        *,
        lengths: Sequence[int] | np.ndarray | None = None,
        k_scale: Array | float | None = None,
        v_scale: Array | float | None = None,
    ) -> None:
        """Write new keys and values behind what sequences hold, in one launch of the append kernel.

        Blocks that are shared and would be written into are copied before, in one launch for all. A token each for the
        same sequences as in the last call, and in the same form, is ready to be launched.

        Args:
            k, v: (batch, seqlen_new, kv_heads, head_dim); or with lengths packed (total, kv_heads, head_dim); or
                RaggedArrays. With several layers there is an axis (num_layers, …) before these. Of the cache's dtype,
                or float16 or bfloat16 beside FP8; of any library, on the cache's device.
            seqs: (batch,) the sequences, each once.
            lengths: (batch,) rows of each sequence in packed k and v.
            k_scale, v_scale: for an FP8 cache, as in `append_kv`.
        """
        seqs = seqs if type(seqs) is list else _listed(seqs)
        going_on = self._decoding
        plain = lengths is None and type(k) is not RaggedArray
        if going_on is not None and plain and _equal(seqs, going_on.seqs):
            if going_on.step(self, k, v, k_scale, v_scale):
                return
        slots, layers = self._slots(seqs), self.num_layers
        rows = new_rows(self._form, self._store.transfer.device, k, v, len(slots), lengths, layers)
        writing = Writing(self, slots, rows, range(layers), k_scale, v_scale)
        growth = self._reserve(slots, rows.new)
        with _Undone(self, growth):
            writing.launch(growth.start, growth)
        self._finish(growth)
        by_number = writing.operands.k_scale is None and writing.operands.v_scale is None
        if len(slots) and not rows.packed and rows.new == 1 and by_number:
            self._decoding = Decoding([*seqs], writing, growth.end, (k_scale, v_scale))

    def extend(self, seqs: Sequences, new: int | Sequence[int] | np.ndarray) -> Array:
        """Make sequences longer by `new` tokens, whose keys and values are yet to be written, and return the lengths
        before, int32 (batch,) on the cache's device.

        Those are the `cache_seqlens` of an `attention_with_kvcache` that appends in its own launch.
        """
        slots = self._slots(seqs)
        new = per_sequence("new", new, len(slots))
        growth = self._reserve(slots, new)
        with _Undone(self, growth), self._store.transfer.current() as stream:
            self._copy_shared(growth, stream)
            before = self._store.transfer.send(growth.start.astype(np.int32), stream)
        self._finish(growth)
        return before

    def write(
        self,
        k: Array | RaggedArray,
        v: Array | RaggedArray,
        seqs: Sequences,
        *,
        layer: int = 0,
        lengths: Sequence[int] | np.ndarray | None = None,
        k_scale: Array | float | None = None,
        v_scale: Array | float | None = None,
    ) -> None:
        """Write one layer's keys and values of the last tokens of sequences, those that `extend` made room for.

        Arguments as in `append`, without an axis of layers. Raises ValueError if a block is shared by now.
        """
        slots = self._slots(seqs)
        layer = count_of("layer", layer)
        if layer >= self.num_layers:
            refuse("layer", layer, f"0 to {self.num_layers - 1}", IndexError)
        rows = new_rows(self._form, self._store.transfer.device, k, v, len(slots), lengths, 1)
        held = self._lengths[slots]
        start = held - rows.new
        if len(bad := np.flatnonzero(start < 0)):
            came = f"{held[bad[0]] - start[bad[0]]} rows for a sequence of {held[bad[0]]}"
            refuse("k", came, "at most the tokens that the sequence holds")
        written = self._between(slots, start // self.block_size, np.where(start < held, self._num_blocks_for(held), 0))
        shared = written[self.allocator.ref_counts[written] > 1]
        if len(shared):
            refuse("seqs", f"sequences that share block {shared[0]}", "sequences that were not forked since `extend`")
        writing = Writing(self, slots, rows, range(layer, layer + 1), k_scale, v_scale)
        self._forget(written)
        writing.launch(start)

    def commit(self, seq: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Make the full blocks of a sequence known by the tokens they hold, so that `add` finds them.

        tokens: the ids of the sequence from its beginning; all that the sequence holds, or fewer. What is more is not
        looked at. Call it when the keys and values of all layers are written.
        """
        slot = self._slot(seq)
        tokens = token_ids(tokens)
        full = min(len(tokens), int(self._lengths[slot])) // self.block_size
        blocks = self._table[slot, :full]
        unknown = np.flatnonzero(self.allocator.contents[blocks] == 0)
        first = int(unknown[0]) if len(unknown) else full
        known = self.allocator.tokens[blocks[:first]].reshape(-1)
        if not np.array_equal(known, tokens[: len(known)]):
            refuse("tokens", "others than this sequence was made known by before", "the same ones, and more")
        wanted = tokens[first * self.block_size : full * self.block_size]
        self.allocator.commit(blocks[first:], wanted, int(blocks[first - 1]) if first else None)

    # ------------------------------------------------------------------------------------------------- swapping

    def swap_out(self, seqs: Sequences) -> None:
        """Move sequences to pinned host memory, in one launch, and give their blocks back.

        They keep their ids and lengths. What sequences of one call share is stored once and shared again when they
        come back in one call.
        """
        slots = self._slots(seqs)
        blocks, inverse = np.unique(self._blocks_of(slots), return_inverse=True)
        with self._store.transfer.current() as stream:
            held = _Held(self._store.swap_out(blocks, stream))
        self.allocator.free(self._blocks_of(slots))
        ends = np.cumsum(self._num_blocks_for(self._lengths[slots])).tolist()
        for slot, start, stop in zip(slots.tolist(), [0, *ends], ends, strict=False):
            self._away[slot] = held, inverse[start:stop]
        self._table[slots] = PADDING
        self._last_asked = None
        self._touch(slots, slots)

    def swap_in(self, seqs: Sequences) -> None:
        """Bring sequences back from host memory, in one launch for each `swap_out` that they left with.

        Raises ValueError for a sequence that is not there, OutOfBlocks if there is no room for all of them.
        """
        slots = self._slots(seqs, away=True)
        groups: dict[int, list[int]] = {}
        for i, slot in enumerate(slots.tolist()):
            if slot not in self._away:
                refuse("seqs", f"sequence {_listed(seqs)[i]}, which is not swapped out", "sequences that are")
            groups.setdefault(id(self._away[slot][0]), []).append(slot)
        picks = [np.unique(np.concatenate([self._away[slot][1] for slot in group])) for group in groups.values()]
        blocks = self.allocator.allocate(sum(map(len, picks)))
        parts = np.split(blocks, np.cumsum([len(pick) for pick in picks])[:-1]) if picks else []
        undo = self.allocator._undo
        try:
            with self._store.transfer.current() as stream:
                for group, pick, part in zip(groups.values(), picks, parts, strict=True):
                    self._store.swap_in(self._away[group[0]][0].blocks, pick, part, stream)
                    undo = self.allocator.free  # what was evicted is gone
        except BaseException:
            undo(blocks)
            raise
        for group, pick, part in zip(groups.values(), picks, parts, strict=True):
            for slot in group:
                own = part[np.searchsorted(pick, self._away.pop(slot)[1])]
                self.allocator.share(own)
                self._widen(len(own))
                self._table[slot, : len(own)] = own
        self.allocator.free(blocks)
        self._touch(slots, slots)

    # -------------------------------------------------------------------------------------- snapshots, inspection

    def save(self, path: str | os.PathLike, seqs: Sequences | None = None) -> None:
        """Write sequences to a safetensors file: all, and what is kept for prefixes, or only these with what they need.

        The file appears when it is complete, in the place of an older one; it has checksums, and nothing in it is run.
        Raises OSError if it cannot be written.
        """
        snapshots.save(self, path, seqs)

    @classmethod
    def load(cls, path: str | os.PathLike, *, num_blocks: int | None = None, device: int | None = None) -> PagedKVCache:
        """A cache as `save` found it: ids, sharing, known prefixes, the same bits; on any device.

        num_blocks: of the pool, by default as before. Raises OutOfBlocks if that is not enough, BadSnapshot for a file
        that is not whole, not as it was written, or of another kind.
        """
        return snapshots.load(cls, path, num_blocks, device)

    def restore(self, path: str | os.PathLike) -> list[int]:
        """Add the sequences of a file to this cache, under new ids, which are returned in the order of the file.

        Raises OutOfBlocks, BadSnapshot as `load`; ValueError if its blocks are of another form.
        """
        return snapshots.restore(self, path)

    def report(self, num_heads: int | None = None, max_seqlen: int | None = None) -> CacheReport:
        """Where the memory is: used, wasted, shared, by sequence; leaks; and what other ways would take.

        num_heads: of queries, for the scores of naive attention; num_kv_heads if None. max_seqlen: what a dense cache
        would have to have room for; the longest sequence if None.
        """
        return report(self, num_heads, max_seqlen)

    # ------------------------------------------------------------------------------------------- for attention

    def block_table(self, seqs: Sequences, *, max_blocks: int = 0) -> BlockTable:
        """The blocks of sequences, in that order, int32 (batch, max_blocks) on the cache's device.

        The same arguments give the same BlockTable again, brought up to date in place by one launch, so that a CUDA
        graph that reads it stays right; of 16 tables, those last asked for. It becomes wider, at another address, by
        doubling. Only the cache changes it.

        max_blocks: columns that there are at least.
        """
        slots = self._slots(seqs)
        key = tuple(seqs if type(seqs) is list else _listed(seqs)), count_of("max_blocks", max_blocks)
        found = self._tables.get(key) or self._wide_enough(*key) or self._new_table(key, slots)
        self._tables.move_to_end(found.key)
        if found.change < self._change:
            moved = (self._moved[slots] > found.change).nonzero()[0]
            lengths = self._lengths[slots]
            if len(moved):
                width = int(self._num_blocks_for(lengths[moved]).max())
                found.table._update(moved, self._table[slots[moved], :width], lengths[moved])
            found.table._set_lengths(lengths)
            found.change = self._change
        return found.table

    def _wide_enough(self, seqs: tuple[int, ...], columns: int) -> _Tabled | None:
        """A table of these sequences that was asked for with another number of columns."""
        for (others, _), found in self._tables.items():
            if others == seqs and found.table.max_blocks >= columns:
                return found
        return None

    def _new_table(self, key: tuple[tuple[int, ...], int], slots: np.ndarray) -> _Tabled:
        lengths = self._lengths[slots]
        width = int(self._num_blocks_for(lengths).max(initial=0))
        columns = max(key[1], min(1 << max(width - 1, 7).bit_length(), self.num_blocks))
        host = np.full((len(slots), columns), PADDING, np.int32)
        host[:, :width] = self._table[slots, :width]
        table = BlockTable._of_cache(host, lengths, self.block_size, self._store.transfer)
        found = self._tables[key] = _Tabled(key, table, self._change)
        if len(self._tables) > KEPT_TABLES:
            self._tables.popitem(last=False)
        return found

    def seqlens(self, seqs: Sequences) -> Array:
        """Tokens of each sequence, int32 (batch,), a new array on the cache's device."""
        slots = self._slots(seqs)
        with self._store.transfer.current() as stream:
            return self._store.transfer.send(self._lengths[slots].astype(np.int32), stream)

    # ------------------------------------------------------------------------------------------------- reading

    def length(self, seq: int) -> int:
        """Tokens that a sequence holds, wherever it lies."""
        return int(self._lengths[self._slot(seq, away=True)])

    def __getitem__(self, key: int | tuple[int, slice]) -> Pair:
        """`cache[seq]`, `cache[seq, a:b]`: keys and values of a sequence, or of its tokens a to b - 1, as contiguous
        copies (tokens, kv_heads, head_dim), with several layers (num_layers, …). One launch."""
        if isinstance(key, tuple) and len(key) != 2:
            refuse("index", f"{len(key)} of them", "a sequence, or a sequence and a slice a:b of tokens", TypeError)
        seq, tokens = key if isinstance(key, tuple) else (key, slice(None))
        slot = self._slot(seq)
        if not isinstance(tokens, slice) or tokens.step not in (None, 1):
            refuse("index", repr(tokens), "a slice a:b of tokens", TypeError)
        start, stop, _ = tokens.indices(int(self._lengths[slot]))
        with self._store.transfer.current() as stream:
            k, v = self._store.gather(self._blocks(slot), start, max(start, stop), stream)
        return (k, v) if self.num_layers > 1 else (k[0], v[0])

    def __len__(self) -> int:
        """How many sequences there are, those that are swapped out among them."""
        return len(self._slot_of)

    def __iter__(self) -> Iterator[int]:
        """The ids of the sequences, in the order in which they were added."""
        return iter([*self._slot_of])

    def __contains__(self, seq: object) -> bool:
        return seq in self._slot_of

    def is_swapped_out(self, seq: int) -> bool:
        """Whether a sequence lies in host memory."""
        return self._slot(seq, away=True) in self._away

    @property
    def ids(self) -> np.ndarray:
        """The ids of the sequences, int64, in the order of iteration."""
        return np.fromiter(self._slot_of, np.int64, len(self))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64, on the host."""
        return self._lengths[self._all_slots()]

    @property
    def tables(self) -> np.ndarray:
        """Blocks of each sequence, int32 (len(self), blocks of the longest), on the host; behind the last one -1, as
        in all of a row whose sequence is swapped out."""
        table = self._table[self._all_slots()]
        return table[:, : (table != PADDING).sum(axis=1).max(initial=0)]

    @property
    def k(self) -> Array:
        """Keys, (num_blocks, …) of the layout, with several layers (num_layers, num_blocks, …): a view."""
        return self._store.k if self.num_layers > 1 else self._store.k[0]

    @property
    def v(self) -> Array:
        """Values, as `k`."""
        return self._store.v if self.num_layers > 1 else self._store.v[0]

    @property
    def kv(self) -> Array:
        """With combined=True the one array of both, (num_blocks, 2, …), with several layers (num_layers, …)."""
        if not self._form.combined:
            raise AttributeError("kv: got a cache with combined=False, expected combined=True, which has one array")
        return self._store.data if self.num_layers > 1 else self._store.data[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of `k` and of `v`."""
        return self.k.shape

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype; FP8 is stored as uint8."""
        return self._form.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, keys and values."""
        return self._form.nbytes

    @property
    def num_blocks(self) -> int:
        return self._form.num_blocks

    @property
    def block_size(self) -> int:
        return self._form.block_size

    @property
    def num_kv_heads(self) -> int:
        return self._form.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self._form.head_dim

    @property
    def num_layers(self) -> int:
        return self._form.num_layers

    @property
    def layout(self) -> str:
        return self._form.layout

    @property
    def combined(self) -> bool:
        return self._form.combined

    @property
    def device(self) -> int | None:
        """The number of the CUDA device; None for NumPy."""
        return None if self._store.transfer.device < 0 else self._store.transfer.device

    def __repr__(self) -> str:
        form, stats, lengths = self._form, self.allocator.stats(), self.lengths
        count = f"{len(self)} sequence" + ("" if len(self) == 1 else "s")
        low, high = int(lengths.min(initial=INT32_MAX)), int(lengths.max(initial=0))
        span = "" if not len(self) else f" of {low} tokens" if low == high else f" of {low} to {high} tokens"
        away = f" ({len(self._away)} swapped out)" if self._away else ""
        share = f"{stats.used}/{form.num_blocks} blocks used ({stats.used / form.num_blocks:.0%})".replace("%", " %")
        layers = f"{form.num_layers} layers, " if form.num_layers > 1 else ""
        what = f"blocks of {form.block_size}, {layers}{form.num_kv_heads} × {form.head_dim} {form.dtype}"
        where = "cpu" if self.device is None else f"cuda:{self.device}"
        occupancy = f"{share}, {stats.shared} shared"
        return f"PagedKVCache({count}{span}{away}, {occupancy}; {what}, {form.layout}, {where})"

    def _repr_html_(self) -> str:
        return block_map(self)

    # --------------------------------------------------------------------------------------- arrays of sequences

    def _slots(self, seqs: Sequences, away: bool = False) -> np.ndarray:
        """The rows of these sequences, intp (batch,), all different. away: they may be swapped out."""
        listed = seqs if type(seqs) is list else _listed(seqs)
        if self._last_asked is not None and _equal(listed, self._last_asked[0]):
            return self._last_asked[1]
        try:
            found = np.fromiter(map(self._slot_of.__getitem__, listed), np.intp, len(listed))
        except (KeyError, TypeError):
            self._refuse_ids(listed)
        if len({*listed}) < len(listed):
            refuse("seqs", "a sequence twice", "each sequence once")
        if self._away:
            gone = [seq for seq, slot in zip(listed, found.tolist(), strict=True) if slot in self._away]
            if gone and not away:
                raise SwappedOut(f"seqs: got sequence {gone[0]}, which is swapped out, expected one that is not")
            if gone:
                return found
        self._last_asked = [*listed], found
        return found

    def _slot(self, seq: int, away: bool = False) -> int:
        """The row of one sequence."""
        slot = self._slot_of.get(seq) if type(seq) is int else None
        if slot is None or (slot in self._away and not away):
            slots = self._slots(seq, away).tolist()
            if len(slots) != 1:
                refuse("seqs", f"{len(slots)} of them", "one sequence")
            slot = slots[0]
        return slot

    def _refuse_ids(self, listed: list[Any]) -> NoReturn:
        for seq in listed:
            if not _is_id(seq, None):
                refuse("seqs", repr(seq), "ids that `add` or `fork` gave", TypeError)
            if seq not in self._slot_of and _is_id(seq, self._next):
                raise UseAfterFree(f"seqs: got sequence {seq}, which was freed, expected one that is there")
            if seq not in self._slot_of:
                raise UnknownSequence(f"seqs: got {seq}, which this cache never gave out, expected one of its ids")
        raise AssertionError("an id was refused for no reason")

    def _all_slots(self) -> np.ndarray:
        return np.fromiter(self._slot_of.values(), np.intp, len(self))

    def _num_blocks_for(self, lengths: Any) -> Any:
        return -(-lengths // self.block_size)

    def _blocks(self, slot: int) -> np.ndarray:
        """The blocks of one sequence."""
        return self._table[slot, : -(-int(self._lengths[slot]) // self.block_size)]

    def _blocks_of(self, slots: np.ndarray) -> np.ndarray:
        """The blocks of sequences, one behind the other; none of one that is swapped out."""
        if len(slots) == 1 and slots[0] not in self._away:
            return self._blocks(slots[0])
        table = self._table[slots]
        return table[table != PADDING]

    def _between(self, slots: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Blocks number first to stop - 1 of each sequence, one behind the other."""
        columns = np.arange(self._table.shape[1])
        return self._table[slots][(columns >= first[:, None]) & (columns < stop[:, None])]

    def _new_slot(self, blocks: int) -> int:
        """A row for a sequence of so many blocks; all of it is padding."""
        self._widen(blocks)
        if not self._spare:
            rows = len(self._lengths)
            more = max(rows, 16)
            self._spare = list(range(rows + more - 1, rows - 1, -1))
            self._lengths = np.concatenate([self._lengths, np.zeros(more, np.int64)])
            self._changed = np.concatenate([self._changed, np.zeros(more, np.int64)])
            self._moved = np.concatenate([self._moved, np.zeros(more, np.int64)])
            self._table = np.concatenate([self._table, np.full((more, self._table.shape[1]), PADDING, np.int32)])
        return self._spare.pop()

    def _widen(self, blocks: int) -> None:
        """Columns for sequences of so many blocks."""
        columns = self._table.shape[1]
        if blocks > columns:
            more = np.full((len(self._table), max(blocks, 2 * columns) - columns), PADDING, np.int32)
            self._table = np.concatenate([self._table, more], axis=1)

    def _name(self, slot: int) -> int:
        seq, self._next = self._next, self._next + 1
        self._slot_of[seq] = slot
        return seq

    def _touch(self, slots: np.ndarray, moved: np.ndarray) -> None:
        """Lengths of these rows have changed, or blocks; blocks in the second ones only."""
        self._change += 1
        self._changed[slots] = self._change
        self._moved[moved] = self._change

    # ---------------------------------------------------------------------------------------------- making room

    def _reserve(self, slots: np.ndarray, new: int | np.ndarray) -> Growth:
        """Blocks for `new` more tokens of each sequence, put into the table; lengths stay. All of it or OutOfBlocks."""
        start = self._lengths[slots]
        end = start + new
        if len(end) and end[end.argmax()] > INT32_MAX:
            refuse("seqs", "sequences that would grow past 2**31 - 1 tokens", "shorter ones")
        have, need = self._num_blocks_for(start), self._num_blocks_for(end)
        into_last = (have * self.block_size > start) & (end > start)
        writing = into_last.nonzero()[0]
        overwritten = self._table[slots[writing], have[writing] - 1]
        copying = self._shared(overwritten)
        missing = need - have
        if (wanted := int(missing.sum())) > self.num_blocks:
            self.allocator.allocate(wanted)  # raises, before there are arrays of so many
        grown = missing.nonzero()[0]
        columns, missing = have[grown], missing[grown]
        if len(missing) and missing[missing.argmax()] > 1:
            before = np.repeat(np.cumsum(missing) - missing, missing)
            grown, columns = np.repeat(grown, missing), np.repeat(columns, missing)
            columns = columns + np.arange(len(columns)) - before
        rows = slots[grown]
        copied = overwritten[:0]
        if copying is not None:
            copiers = writing[copying]
            copied, overwritten = overwritten[copying], overwritten[~copying]
            rows = np.concatenate([slots[copiers], rows])
            columns = np.concatenate([have[copiers] - 1, columns])
        blocks = self.allocator.allocate(len(rows))
        if len(columns):
            self._widen(int(columns[columns.argmax()]) + 1)
        self._table[rows, columns] = blocks
        return Growth(slots, start, end, blocks, (rows, columns), copied, overwritten)

    def _shared(self, last: np.ndarray) -> np.ndarray | None:
        """Which of these blocks, one for each sequence that writes, have to be copied first: those that others hold.

        If all who hold a block write into it in one call, the last one keeps it. None if there is nothing to copy.
        """
        shared = self.allocator.ref_counts.take(last) > 1
        if not np.count_nonzero(shared):
            return None
        blocks, final, writers = np.unique(last[::-1], return_index=True, return_counts=True)
        shared[len(last) - 1 - final[writers == self.allocator.ref_counts[blocks]]] = False
        return shared

    def _copy_shared(self, growth: Growth, stream: int) -> None:
        if len(growth.copied):
            self._store.copy_blocks(growth.copied, growth.blocks[: len(growth.copied)], stream)
            growth.written = True

    def _finish(self, growth: Growth) -> None:
        """The new tokens are there."""
        self._lengths[growth.slots] = growth.end
        if len(growth.copied):
            self.allocator.free(growth.copied)
        self._forget(growth.overwritten)
        self._touch(growth.slots, growth.at[0])

    def _forget(self, blocks: np.ndarray) -> None:
        """These blocks hold something else than before."""
        if np.count_nonzero(self.allocator.contents.take(blocks)):
            self.allocator.forget(blocks)


class _Undone:
    """A context that gives the room of a growth back if it is left by an exception."""

    def __init__(self, cache: PagedKVCache, growth: Growth) -> None:
        self._cache, self._growth = cache, growth

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            growth, cache = self._growth, self._cache
            rows, columns = growth.at
            cache._table[rows, columns] = PADDING
            cache._table[rows[: len(growth.copied)], columns[: len(growth.copied)]] = growth.copied
            if growth.written or not issubclass(kind, Exception):  # interrupted, maybe while rows were written
                cache.allocator.free(growth.blocks)  # what was evicted is gone
                cache._forget(growth.overwritten)
            else:
                cache.allocator._undo(growth.blocks)


def _listed(seqs: Sequences) -> list[Any]:
    if isinstance(seqs, Iterator):
        refuse("seqs", "an iterator, which can be read but once", "an int, a list or an array", TypeError)
    if hasattr(seqs, "tolist"):  # arrays of any library
        found = seqs.tolist()
        return found if isinstance(found, list) else [found]
    try:
        return [operator.index(seqs)]
    except TypeError:
        pass
    try:
        return list(seqs)
    except TypeError:
        refuse("seqs", type(seqs).__name__, "an id of a sequence, or several", TypeError)


def _equal(some: list[Any], others: list[Any]) -> bool:
    try:
        return some == others
    except ValueError:  # of arrays among them
        return False


def _is_id(seq: Any, stop: int | None) -> bool:
    """Whether this is an int, and one that was given out if those below `stop` were."""
    is_int = isinstance(seq, (int, np.integer)) and not isinstance(seq, bool)
    return is_int and (stop is None or 0 <= seq < stop)


def _dtype_name(dtype: Any) -> str:
    """The dtype of a cache by NumPy's name; refuses those that attention does not read."""
    known = (*FLOAT_DTYPES, *dict.fromkeys(FP8_DTYPES.values()))
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = str(dtype).removeprefix("torch.")
    name = FP8_DTYPES.get(name, name)
    if name not in known:
        refuse("dtype", repr(dtype), " or ".join(known), TypeError)
    return name
