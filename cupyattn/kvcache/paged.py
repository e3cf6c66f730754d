"""PagedKVCache: keys and values of many growing sequences in blocks of one pool, shared wherever they are the same.

Paging and copy-on-write are those of PagedAttention (Kwon et al. 2023, arXiv:2309.06180). Everything is decided on the
host, in arrays with a row for each sequence; the device is told what to write and what to copy, in one launch each.
A call that raises has changed nothing.
"""

from __future__ import annotations

import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from ..arrays import View, device_name, host_array, refuse, view
from ..attention import all_append_operands, find_append, rotary_and_scales
from ..kernels.operands import AppendOperands
from ..problem import FLOAT_DTYPES, FP8_DTYPES, MAX_HEAD_DIM
from ..ragged import RaggedArray
from ..streams import device_of, in_order
from . import snapshots
from .allocator import BlockAllocator, count_of
from .block_map import block_map
from .block_table import INT32_MAX, PADDING, BlockTable
from .errors import DoubleFree, SwappedOut, UnknownSequence, UseAfterFree
from .report import CacheReport, report
from .store import DeviceStore, Form, HostStore, Pair
from .transfer import device_number, index_view

Array = Any  # an array of NumPy, CuPy, PyTorch, JAX, or of any library that speaks DLPack
Sequences = int | Sequence[int] | np.ndarray
KEPT_TABLES = 16  # of different batches


@dataclass(slots=True, eq=False)
class _Held:
    """Blocks in host memory, of the sequences that one `swap_out` put there."""

    blocks: Pair


@dataclass(slots=True)
class _Growth:
    """Room that was made for new tokens of some sequences, and what it takes to give it back."""

    slots: np.ndarray
    start: np.ndarray  # tokens before
    end: np.ndarray
    blocks: np.ndarray  # newly allocated: copies of shared blocks, then new ones
    at: tuple[np.ndarray, np.ndarray]  # rows and columns of the table where these are
    copied: np.ndarray  # shared blocks that were at the first of these places, and are to be copied
    overwritten: np.ndarray  # blocks that are written to though they were full once


@dataclass(slots=True)
class _Tabled:
    """A BlockTable that was handed out, and up to which change it follows the cache."""

    table: BlockTable
    slots: np.ndarray
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
        self._changed = np.zeros(0, np.int64)  # when a row was last changed
        self._change = 0
        self._away: dict[int, tuple[_Held, np.ndarray]] = {}  # slot: what is swapped out, as numbers of blocks in it
        self._tables: OrderedDict[tuple[int, ...], _Tabled] = OrderedDict()
        self._last_asked: tuple[Any, np.ndarray] | None = None

    # ------------------------------------------------------------------------------------ sequences come and go

    def add(self, tokens: Sequence[int] | np.ndarray | None = None) -> int:
        """A new sequence, and the id by which it goes. It is empty, unless the beginning of `tokens` is known.

        tokens: the ids of a prompt, 1-D. The longest prefix of full blocks that `commit` made known, of another
        sequence or of one long freed, is shared with it; `length` then tells how many tokens need not be computed. At
        least the last token is left, because a model needs a query.
        """
        blocks = np.empty(0, np.int32)
        if tokens is not None:
            blocks = self.allocator.match(np.asarray(tokens)[..., :-1])
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
        self._spare += slots.tolist()
        self._last_asked = None
        for key in [key for key in self._tables if not self._slot_of.keys() >= {*key}]:
            del self._tables[key]

    def fork(self, seq: int, count: int | None = None) -> Any:
        """A new sequence, or a list of `count`, that goes on from where seq is. Nothing is copied now: all blocks are
        shared, and of a last block that is not full each sequence gets its own when it writes into it."""
        (slot,) = self._slots(seq)
        wanted = 1 if count is None else count_of("count", count)
        blocks = self._blocks(slot)
        made = []
        for _ in range(wanted):
            self.allocator.share(blocks)
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
        self._touch(targets)

    def truncate(self, seqs: Sequences, lengths: int | Sequence[int] | np.ndarray) -> None:
        """Keep only the first `lengths` tokens of sequences, one number for all or one for each."""
        slots = self._slots(seqs)
        wanted = self._per_sequence("lengths", lengths, slots)
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
        self._touch(slots)

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

        Blocks that are shared and would be written into are copied before, in one launch for all.

        Args:
            k, v: (batch, seqlen_new, kv_heads, head_dim); or with lengths packed (total, kv_heads, head_dim); or
                RaggedArrays. With several layers there is an axis (num_layers, …) before these. Of the cache's dtype,
                or float16 or bfloat16 beside FP8; of any library, on the cache's device.
            seqs: (batch,) the sequences, each once.
            lengths: (batch,) rows of each sequence in packed k and v.
            k_scale, v_scale: for an FP8 cache, as in `append_kv`.
        """
        slots = self._slots(seqs)
        rows = self._new_rows(k, v, slots, lengths, self.num_layers)
        launch = self._prepare_write(rows, slots, range(self.num_layers), k_scale, v_scale)
        growth = self._reserve(slots, rows.new)
        with _Undone(self, growth):
            launch(growth.start, growth)
        self._finish(growth)

    def extend(self, seqs: Sequences, new: int | Sequence[int] | np.ndarray) -> Array:
        """Make sequences longer by `new` tokens, whose keys and values are yet to be written, and return the lengths
        before, int32 (batch,) on the cache's device.

        Those are the `cache_seqlens` of an `attention_with_kvcache` that appends in its own launch.
        """
        slots = self._slots(seqs)
        new = self._per_sequence("new", new, slots)
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
        rows = self._new_rows(k, v, slots, lengths, 1)
        held = self._lengths[slots]
        start = held - rows.new
        if len(bad := np.flatnonzero(start < 0)):
            came = f"{held[bad[0]] - start[bad[0]]} rows for a sequence of {held[bad[0]]}"
            refuse("k", came, "at most the tokens that the sequence holds")
        written = self._between(slots, start // self.block_size, np.where(start < held, self._num_blocks_for(held), 0))
        shared = written[self.allocator.ref_counts[written] > 1]
        if len(shared):
            refuse("seqs", f"sequences that share block {shared[0]}", "sequences that were not forked since `extend`")
        self._prepare_write(rows, slots, range(layer, layer + 1), k_scale, v_scale)(start, None)
        self._forget(written)

    def commit(self, seq: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Make the full blocks of a sequence known by the tokens they hold, so that `add` finds them.

        tokens: the ids of the sequence from its beginning; all that the sequence holds, or fewer. Call it when the keys
        and values of all layers are written.
        """
        (slot,) = self._slots(seq)
        tokens = np.asarray(tokens)
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
        self._touch(slots)

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
        try:
            with self._store.transfer.current() as stream:
                for group, pick, part in zip(groups.values(), picks, parts, strict=True):
                    self._store.swap_in(self._away[group[0]][0].blocks, pick, part, stream)
        except BaseException:
            self.allocator.free(blocks)
            raise
        for group, pick, part in zip(groups.values(), picks, parts, strict=True):
            for slot in group:
                own = part[np.searchsorted(pick, self._away.pop(slot)[1])]
                self.allocator.share(own)
                self._widen(len(own))
                self._table[slot, : len(own)] = own
        self.allocator.free(blocks)
        self._touch(slots)

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

        The same seqs give the same BlockTable again, brought up to date in place by one launch, so that a CUDA graph
        that reads it stays right. It becomes wider, at another address, by doubling.

        max_blocks: columns that there are at least.
        """
        slots = self._slots(seqs)
        key = tuple(_listed(seqs))
        width = int(self._num_blocks_for(self._lengths[slots]).max(initial=0))
        found = self._tables.get(key)
        if found is None or found.table.max_blocks < max_blocks:
            columns = max(max_blocks, min(1 << max(width - 1, 7).bit_length(), self.num_blocks))
            host = np.full((len(slots), columns), PADDING, np.int32)
            host[:, :width] = self._table[slots, :width]
            table = BlockTable._of(host, self._lengths[slots], self.block_size, self._store.transfer)
            found = self._tables[key] = _Tabled(table, slots, self._change)
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        elif found.change < self._change:
            stale = np.flatnonzero(self._changed[slots] > found.change)
            if len(stale):
                found.table._update(stale, self._table[slots[stale], :width], self._lengths[slots[stale]])
            found.change = self._change
        self._tables.move_to_end(key)
        return found.table

    def seqlens(self, seqs: Sequences) -> Array:
        """Tokens of each sequence, int32 (batch,), a new array on the cache's device."""
        slots = self._slots(seqs)
        with self._store.transfer.current() as stream:
            return self._store.transfer.send(self._lengths[slots].astype(np.int32), stream)

    # ------------------------------------------------------------------------------------------------- reading

    def length(self, seq: int) -> int:
        """Tokens that a sequence holds, wherever it lies."""
        return int(self._lengths[self._slots(seq, away=True)[0]])

    def __getitem__(self, key: int | tuple[int, slice]) -> Pair:
        """`cache[seq]`, `cache[seq, a:b]`: keys and values of a sequence, or of its tokens a to b - 1, as contiguous
        copies (tokens, kv_heads, head_dim), with several layers (num_layers, …). One launch."""
        seq, tokens = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        (slot,) = self._slots(seq)
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
        return int(self._slots(seq, away=True)[0]) in self._away

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
        plain = isinstance(seqs, (int, tuple, list))
        if plain and self._last_asked is not None and seqs == self._last_asked[0]:
            return self._last_asked[1]
        listed = _listed(seqs)
        try:
            slots = [self._slot_of[seq] for seq in listed]
        except (KeyError, TypeError):
            self._refuse_ids(listed)
        if len({*slots}) < len(slots):
            refuse("seqs", "a sequence twice", "each sequence once")
        if self._away:
            gone = [seq for seq, slot in zip(listed, slots, strict=True) if slot in self._away]
            if gone and not away:
                raise SwappedOut(f"seqs: got sequence {gone[0]}, which is swapped out, expected one that is not")
        found = np.array(slots, np.intp)
        if plain and not self._away:
            self._last_asked = ([*seqs] if isinstance(seqs, list) else seqs), found
        return found

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

    def _touch(self, slots: np.ndarray) -> None:
        self._change += 1
        self._changed[slots] = self._change

    def _per_sequence(self, name: str, numbers: Any, slots: np.ndarray) -> np.ndarray:
        """One number for all or one for each, at least 0: int64 (batch,)."""
        found = np.asarray(numbers)
        if found.dtype.kind not in "iu" and found.size:
            refuse(name, f"{found.dtype}", "an int, or an integer for each sequence", TypeError)
        if found.shape not in ((), slots.shape):
            refuse(name, f"shape {found.shape}", f"an int, or one for each of {len(slots)} sequences")
        if found.min(initial=0) < 0:
            refuse(name, int(found.min()), "at least 0")
        if found.max(initial=0) > INT32_MAX:
            refuse(name, int(found.max()), f"at most {INT32_MAX}")
        return np.broadcast_to(found.astype(np.int64), slots.shape)

    # ---------------------------------------------------------------------------------------------- making room

    def _reserve(self, slots: np.ndarray, new: int | np.ndarray) -> _Growth:
        """Blocks for `new` more tokens of each sequence, put into the table; lengths stay. All of it or OutOfBlocks."""
        start = self._lengths[slots]
        end = start + new
        if len(end) and end.max() > INT32_MAX:
            refuse("seqs", "sequences that would grow past 2**31 - 1 tokens", "shorter ones")
        have, need = self._num_blocks_for(start), self._num_blocks_for(end)
        room = have * self.block_size - start  # in the last block
        writing = np.flatnonzero(np.minimum(room, new))  # into that
        overwritten = self._table[slots[writing], have[writing] - 1]
        copying = self._shared(overwritten)
        missing = need - have
        grown = np.repeat(np.arange(len(slots)), missing)
        rows, columns = slots[grown], have[grown] + np.arange(len(grown)) - (np.cumsum(missing) - missing)[grown]
        copied = overwritten[:0]
        if copying is not None:
            copiers = writing[copying]
            copied, overwritten = overwritten[copying], overwritten[~copying]
            rows = np.concatenate([slots[copiers], rows])
            columns = np.concatenate([have[copiers] - 1, columns])
        blocks = self.allocator.allocate(len(rows))
        if len(need):
            self._widen(int(need.max()))
        self._table[rows, columns] = blocks
        return _Growth(slots, start, end, blocks, (rows, columns), copied, overwritten)

    def _shared(self, last: np.ndarray) -> np.ndarray | None:
        """Which of these blocks, one for each sequence that writes, have to be copied first: those that others hold.

        If all who hold a block write into it in one call, the last one keeps it. None if there is nothing to copy.
        """
        shared = self.allocator.ref_counts[last] > 1
        if not shared.any():
            return None
        blocks, final, writers = np.unique(last[::-1], return_index=True, return_counts=True)
        shared[len(last) - 1 - final[writers == self.allocator.ref_counts[blocks]]] = False
        return shared

    def _copy_shared(self, growth: _Growth, stream: int) -> None:
        if len(growth.copied):
            self._store.copy_blocks(growth.copied, growth.blocks[: len(growth.copied)], stream)

    def _finish(self, growth: _Growth) -> None:
        """The new tokens are there."""
        self._lengths[growth.slots] = growth.end
        if len(growth.copied):
            self.allocator.free(growth.copied)
        self._forget(growth.overwritten)
        self._touch(growth.slots)

    def _forget(self, blocks: np.ndarray) -> None:
        """These blocks hold something else than before."""
        if self.allocator.contents[blocks].any():
            self.allocator.forget(blocks)

    # -------------------------------------------------------------------------------------------------- writing

    def _new_rows(
        self, k: Array | RaggedArray, v: Array | RaggedArray, slots: np.ndarray, lengths: Any, layers: int
    ) -> _Rows:
        """New keys and values as views without an axis of layers; refuses what does not fit the cache."""
        if isinstance(k, RaggedArray) or isinstance(v, RaggedArray):
            if not (isinstance(k, RaggedArray) and isinstance(v, RaggedArray) and k.same_sequences(v)):
                refuse("v", "other sequences than k", "RaggedArrays of the same lengths")
            if lengths is not None or layers > 1:
                refuse("k", "a RaggedArray", "an array of packed rows beside lengths, or for several layers")
            k, v, lengths = k.values, v.values, k.host_lengths
        packed = lengths is not None
        allowed = tuple(FLOAT_DTYPES) if self._form.is_fp8 else (self.dtype,)
        views = []
        for name, array in (("k", k), ("v", v)):
            found = view(array, name)
            if len(found.shape) != 4 - packed + (layers > 1):
                form = ("num_layers, " if layers > 1 else "") + ("total" if packed else "batch, seqlen_new")
                refuse(name, f"{len(found.shape)}-D shape {found.shape}", f"({form}, kv_heads, head_dim)")
            if found.shape[-2:] != (self.num_kv_heads, self.head_dim):
                came = f"{found.shape[-2]} heads of {found.shape[-1]}"
                refuse(name, came, f"the cache's {self.num_kv_heads} heads of {self.head_dim}")
            if found.dtype not in allowed:
                refuse(name, found.dtype, f"{' or '.join(allowed)}, as the cache holds {self.dtype}", TypeError)
            if found.device != self._store.transfer.device:
                here, there = device_name(found.device), device_name(self._store.transfer.device)
                refuse(name, f"an array on {here}", f"the cache's device {there}")
            views.append(_without_layers(name, found, layers) if layers > 1 else found)
        k_view, v_view = views
        if k_view.shape != v_view.shape:
            refuse("v", f"shape {tuple(v.shape)}", f"k's shape {tuple(k.shape)}")
        if not packed:
            if k_view.shape[0] != len(slots) * layers:
                refuse("k", f"{k_view.shape[0] // layers} sequences", f"{len(slots)}, as in seqs")
            return _Rows(k_view, v_view, k_view.shape[1], False)
        new = self._per_sequence("lengths", lengths, slots)
        if new.sum() * layers != k_view.shape[0]:
            refuse("lengths", f"{new.sum()} rows in all", f"k's {k_view.shape[0] // layers}")
        return _Rows(k_view, v_view, new, True)

    def _prepare_write(
        self, rows: _Rows, slots: np.ndarray, layers: range, k_scale: Any, v_scale: Any
    ) -> Callable[[np.ndarray, _Growth | None], None]:
        """launch(start, growth): write rows behind `start` tokens of each sequence, in these layers, after the copies
        of a growth.

        Everything that can be refused is refused here, before the cache is changed. The kernel is told of the blocks
        that are written to and of nothing else: a sequence's row of its table begins with the first of them.
        """
        most = rows.new if isinstance(rows.new, int) else int(rows.new.max(initial=0))
        width = (self.block_size + most - 2) // self.block_size + 1 if most else 1  # wherever a sequence ends
        batch, device = len(slots) * len(layers), self._store.transfer.device
        ends = index_view((batch + 1,), device) if rows.packed else None
        held, table = index_view((batch,), device), index_view((batch, width), device)
        operands = AppendOperands(*self._store.flat, rows.k, rows.v, ends, held, table)
        scales = rotary_and_scales(operands, None, None, k_scale, v_scale)
        appending = find_append(operands, (self.layout, self._kv_dtype, *scales, True))

        def launch(start: np.ndarray, growth: _Growth | None) -> None:
            packet = self._packet(rows, slots, start, layers, width)

            def run(stream: int) -> None:
                transfer = self._store.transfer
                with transfer.following(rows.k):
                    if growth is not None:
                        self._copy_shared(growth, stream)
                    transfer.run(appending.run, operands, packet, stream)

            with device_of(rows.k):
                in_order(run, rows.k, all_append_operands(operands))

        return launch

    def _packet(self, rows: _Rows, slots: np.ndarray, start: np.ndarray, layers: range, width: int) -> np.ndarray:
        """What the append kernel reads, in one int32 array: for each layer and sequence the tokens in the first block
        that is written to; for each the blocks from that one on, `width` of them; where the rows of each begin."""
        first, inside = np.divmod(start, self.block_size)
        columns = first[:, None] + np.arange(width)
        blocks = self._table[slots[:, None], np.minimum(columns, self._table.shape[1] - 1)]
        batch, count = len(slots), len(layers)
        packet = np.empty(batch * count * (1 + width) + (batch * count + 1 if rows.packed else 0), np.int32)
        packet[: batch * count].reshape(count, batch)[...] = inside
        listed = packet[batch * count :][: batch * count * width].reshape(count, batch, width)
        for layer, part in zip(layers, listed, strict=True):
            np.add(blocks, layer * self.num_blocks, out=part)
        if rows.packed:
            ends = packet[-batch * count - 1 :]
            ends[0] = 0
            np.cumsum(np.tile(rows.new, count), out=ends[1:])
        return packet


@dataclass(slots=True)
class _Rows:
    """New keys and values: views (layers * batch, seqlen_new, heads, head_dim), or packed (layers * total, …)."""

    k: View
    v: View
    new: int | np.ndarray  # rows of each sequence, if packed int64 (batch,)
    packed: bool


class _Undone:
    """A context that gives the room of a growth back if it is left by an exception."""

    def __init__(self, cache: PagedKVCache, growth: _Growth) -> None:
        self._cache, self._growth = cache, growth

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            growth, cache = self._growth, self._cache
            rows, columns = growth.at
            cache._table[rows, columns] = PADDING
            cache._table[rows[: len(growth.copied)], columns[: len(growth.copied)]] = growth.copied
            cache.allocator.free(growth.blocks)


def _without_layers(name: str, found: View, layers: int) -> View:
    """(layers, n, …) seen as (layers * n, …)."""
    if found.shape[0] != layers:
        refuse(name, f"{found.shape[0]} layers", f"the cache's {layers}")
    if found.shape[1] > 1 and found.strides[0] != found.shape[1] * found.strides[1]:
        refuse(name, f"strides {found.strides}", "layers that follow one another in memory")
    step = found.strides[1] if found.shape[1] > 1 else found.strides[0]
    shape, strides = (layers * found.shape[1], *found.shape[2:]), (step, *found.strides[2:])
    if found.device < 0:
        return replace(view(host_array(found).reshape(shape), name), strides=strides)
    return replace(found, shape=shape, strides=strides)


def _listed(seqs: Sequences) -> list[Any]:
    if isinstance(seqs, Iterator):
        refuse("seqs", "an iterator, which can be read but once", "an int, a list or an array", TypeError)
    if isinstance(seqs, np.ndarray):
        return np.atleast_1d(seqs).tolist()
    try:
        return [operator.index(seqs)]
    except TypeError:
        pass
    try:
        return list(seqs)
    except TypeError:
        refuse("seqs", type(seqs).__name__, "an id of a sequence, or several", TypeError)


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
