"""The NumPy backend: attention on the CPU, and with float64 arithmetic the oracle of the tests.

It takes the same `Problem` and `Operands` as the CUDA kernels and knows every option that they know. Work goes
sequence by sequence, in blocks of queries times blocks of keys with an online softmax, so that memory beyond the
inputs stays O(block), whatever the sequence length. Scores and sums are BLAS products over all key/value heads
at once, with the query heads that share one of them stacked as rows of one matrix; keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from .arrays import INDEX_ROLES, View, host_array
from .kernels.operands import AppendOperands, Operands
from .problem import Append, Cache, Problem, check_indices

SCORES = 1 << 19  # scores held at once, over all heads: 2 MB of float32, which a core's caches hold
KEYS = 512  # keys in one block


def forward(problem: Problem, operands: Operands, precision: type = np.float32) -> None:
    """Compute attention into operands.out and, if the problem asks for it, operands.lse.

    precision (numpy.float32 or numpy.float64) is the dtype of all arithmetic; results are rounded to the dtype of
    the arrays that they are written to. Raises ValueError if the contents of an index array do not fit.
    """
    indices = _indices(operands)
    check_indices(problem, indices)
    out = host_array(operands.out)
    lse = host_array(operands.lse) if problem.lse else None
    if problem.packed_q:
        _fill_spare_rows(out, lse, int(indices["cu_seqlens_q"][-1]))
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN in the inputs travel as in any arithmetic
        for sequence in _sequences(problem, operands, indices, out, lse, np.dtype(precision)):
            _attend(problem, sequence)


def append(append: Append, operands: AppendOperands) -> None:
    """Write the new keys and values behind the tokens that the cache holds, in place, sequence after sequence.

    Raises ValueError, before anything is written, if the contents of an index array do not fit.
    """
    indices = _indices(operands)
    check_indices(append, indices)
    pairs = []
    for cache_view, new_view, strides in (
        (operands.k_cache, operands.k, append.cache.k_strides),
        (operands.v_cache, operands.v, append.cache.v_strides),
    ):
        held = _by_row(cache_view, append.cache, strides, append.num_kv_heads, append.head_dim)
        pairs.append((held, host_array(new_view)))
    for b in range(append.batch):
        place = _place(append.cache, indices, b)
        start = int(indices["cache_seqlens"][b]) if "cache_seqlens" in indices else 0
        for held, new in pairs:
            rows = new[slice(*indices["cu_seqlens_new"][b : b + 2])] if append.packed_new else new[b]
            held[place.rows(start, start + len(rows))] = rows


@dataclass(slots=True)
class _Place:
    """Where one sequence's rows lie in a cache seen as (outer, row, kv_head, head_dim)."""

    outer: int  # dense: the entry; packed: 0
    first: int  # row of the sequence's first token
    table: np.ndarray | None  # paged: the sequence's blocks
    block_size: int

    def rows(self, start: int, stop: int) -> tuple:
        """The index of tokens start to stop - 1 of the sequence."""
        if self.table is None:
            return self.outer, slice(self.first + start, self.first + stop)
        block, row = np.divmod(np.arange(self.first + start, self.first + stop), self.block_size)
        return self.table[block], row


@dataclass(slots=True)
class _Sequence:
    """One sequence's share of the call: views of its rows, and how to find its keys."""

    q: np.ndarray  # (seqlen_q, heads, head_dim)
    k: np.ndarray  # the whole of k as (outer, row, kv_head, head_dim)
    v: np.ndarray
    place: _Place
    seqlen_k: int
    slopes: np.ndarray | None  # (heads,)
    sinks: np.ndarray | None  # (heads,)
    out: np.ndarray  # (seqlen_q, heads, head_dim)
    lse: np.ndarray | None  # (heads, seqlen_q)
    dtype: np.dtype


def _indices(operands: Operands | AppendOperands) -> dict[str, np.ndarray]:
    views = {role: getattr(operands, role, None) for role in INDEX_ROLES}
    return {role: host_array(view) for role, view in views.items() if view is not None}


def _fill_spare_rows(out: np.ndarray, lse: np.ndarray | None, used: int) -> None:
    """Rows of a packed q that no sequence claims see no key."""
    out[used:] = 0
    if lse is not None:
        lse[:, used:] = -np.inf


def _by_row(view: View, cache: Cache, strides: tuple[int, int, int], heads: int, head_dim: int) -> np.ndarray:
    """k or v as (outer, row, kv_head, head_dim), whatever the layout: NHD and HND differ in strides alone."""
    array = host_array(view)
    shape = (cache.entries, cache.block_size or cache.rows, heads, head_dim)
    steps = tuple(step * array.itemsize for step in (*strides, 1))
    return np.lib.stride_tricks.as_strided(array, shape, steps)


def _place(cache: Cache, indices: dict[str, np.ndarray], b: int) -> _Place:
    outer = first = 0
    if cache.kind == "dense":
        outer = int(indices["cache_batch_idx"][b]) if "cache_batch_idx" in indices else b
    elif cache.kind == "packed":
        first = int(indices["cu_seqlens_k"][b])
    if "cache_leftpad" in indices:
        first += int(indices["cache_leftpad"][b])
    table = indices["block_table"][b] if cache.kind == "paged" else None
    return _Place(outer, first, table, cache.block_size)


def _key_length(problem: Problem, indices: dict[str, np.ndarray], b: int) -> int:
    """How many keys sequence b has, the skipped ones on its left not counted."""
    if "seqused_k" in indices:
        length = int(indices["seqused_k"][b]) + problem.seqlen_new
    elif "cu_seqlens_k" in indices:
        length = int(indices["cu_seqlens_k"][b + 1]) - int(indices["cu_seqlens_k"][b])
    else:
        length = problem.cache.rows
    return length - int(indices["cache_leftpad"][b]) if "cache_leftpad" in indices else length


def _sequences(
    problem: Problem,
    operands: Operands,
    indices: dict[str, np.ndarray],
    out: np.ndarray,
    lse: np.ndarray | None,
    dtype: np.dtype,
) -> Iterator[_Sequence]:
    heads, head_dim = problem.num_kv_heads, problem.head_dim
    q = host_array(operands.q)
    k = _by_row(operands.k, problem.cache, problem.cache.k_strides, heads, head_dim)
    v = _by_row(operands.v, problem.cache, problem.cache.v_strides, heads, head_dim)
    slopes = host_array(operands.alibi_slopes).astype(dtype) if problem.alibi else None
    sinks = host_array(operands.sinks).astype(dtype) if problem.sinks else None
    for b in range(problem.batch):
        own = slice(*indices["cu_seqlens_q"][b : b + 2]) if problem.packed_q else b
        own_lse = None
        if lse is not None:
            own_lse = lse[:, own] if problem.packed_q else lse[b]
        yield _Sequence(
            q=q[own],
            k=k,
            v=v,
            place=_place(problem.cache, indices, b),
            seqlen_k=_key_length(problem, indices, b),
            slopes=slopes[b] if problem.alibi == "batch_heads" else slopes,
            sinks=sinks,
            out=out[own],
            lse=own_lse,
            dtype=dtype,
        )


def _attend(problem: Problem, sequence: _Sequence) -> None:
    """All rows of one sequence, block of queries by block of queries."""
    seqlen_q = len(sequence.q)
    step = max(16, SCORES // (problem.num_heads * min(KEYS, max(sequence.seqlen_k, 1))))
    for start in range(0, seqlen_q, step):
        _attend_block(problem, sequence, start, min(start + step, seqlen_q))


def _attend_block(problem: Problem, sequence: _Sequence, start: int, stop: int) -> None:
    """Rows start to stop - 1 of one sequence against every block of keys that one of them sees."""
    q = _stack_heads(sequence.q[start:stop], problem, sequence.dtype)
    state = _Softmax.empty(q)
    offset = sequence.seqlen_k - len(sequence.q)
    first, last = _visible_keys(problem.window, start + offset, stop + offset, sequence.seqlen_k)
    for lo in range(first, last, KEYS):
        hi = min(lo + KEYS, last)
        rows = sequence.place.rows(lo, hi)
        scores = q @ _widen(sequence.k[rows], sequence.dtype).transpose(1, 2, 0)
        distance = np.arange(start + offset, stop + offset)[:, None] - np.arange(lo, hi)
        _shape_scores(problem, sequence, scores, distance)
        state.add(scores, _widen(sequence.v[rows], sequence.dtype).transpose(1, 0, 2))
    out, lse = state.result(None if sequence.sinks is None else _per_row(sequence.sinks, problem, stop - start))
    sequence.out[start:stop] = out.reshape(problem.num_heads, stop - start, problem.head_dim).transpose(1, 0, 2)
    if sequence.lse is not None:
        sequence.lse[:, start:stop] = lse.reshape(problem.num_heads, stop - start)


def _stack_heads(q: np.ndarray, problem: Problem, dtype: np.dtype) -> np.ndarray:
    """(rows, heads, head_dim) -> (kv_heads, group * rows, head_dim), scaled: heads that share keys in one matrix."""
    stacked = np.ascontiguousarray(_widen(q, dtype).transpose(1, 0, 2)) * dtype.type(problem.softmax_scale)
    return stacked.reshape(problem.num_kv_heads, problem.group * q.shape[0], problem.head_dim)


def _per_row(values: np.ndarray, problem: Problem, rows: int) -> np.ndarray:
    """One value per head -> (kv_heads, group * rows, 1), beside the rows of `_stack_heads`."""
    return np.repeat(values, rows).reshape(problem.num_kv_heads, problem.group * rows, 1)


def _visible_keys(window: tuple[int, int], start: int, stop: int, seqlen_k: int) -> tuple[int, int]:
    """The span of keys that queries at key positions start to stop - 1 see at least in part."""
    left, right = window
    first = 0 if left < 0 else max(0, start - left)
    last = seqlen_k if right < 0 else min(seqlen_k, stop + right)
    return first, last


def _shape_scores(problem: Problem, sequence: _Sequence, scores: np.ndarray, distance: np.ndarray) -> None:
    """Softcap, ALiBi and mask, in place. distance (rows, keys) is each query's position less each key's."""
    if problem.softcap:
        scores /= problem.softcap
        np.tanh(scores, out=scores)
        scores *= problem.softcap
    by_head = scores.reshape(problem.num_heads, *distance.shape)
    if sequence.slopes is not None:
        by_head -= sequence.slopes[:, None, None] * np.abs(distance).astype(scores.dtype)
    left, right = problem.window
    if left >= 0 and distance[-1, 0] > left:
        np.copyto(by_head, -np.inf, where=distance > left)
    if right >= 0 and -distance[0, -1] > right:
        np.copyto(by_head, -np.inf, where=-distance > right)


@dataclass(slots=True)
class _Softmax:
    """Softmax-weighted sums of values, gathered block of keys by block of keys. Rows are (kv_heads, group * rows)."""

    peak: np.ndarray  # (..., 1) largest score so far, -inf before the first
    total: np.ndarray  # (..., 1) sum of exp(score - peak)
    sums: np.ndarray  # (..., head_dim) sum of exp(score - peak) * value

    @classmethod
    def empty(cls, q: np.ndarray) -> _Softmax:
        column = (*q.shape[:-1], 1)
        return cls(np.full(column, -np.inf, q.dtype), np.zeros(column, q.dtype), np.zeros_like(q))

    def add(self, scores: np.ndarray, values: np.ndarray) -> None:
        """Take in one block: scores (..., keys), which is overwritten, and values (kv_heads, keys, head_dim)."""
        peak = np.maximum(self.peak, scores.max(axis=-1, keepdims=True))
        self._rescale(peak)
        scores -= _finite_or_zero(peak)
        np.exp(scores, out=scores)
        self.total += scores.sum(axis=-1, keepdims=True)
        self.sums += _weigh(scores, values)

    def result(self, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Weighted means (..., head_dim) and log-sum-exp (..., 1); zeros and -inf for rows that saw no key."""
        blind = self.peak == -np.inf
        if sinks is not None:
            self._rescale(np.maximum(self.peak, sinks))
            self.total += np.exp(sinks - _finite_or_zero(self.peak))
        self.total[blind] = 1
        lse = self.peak + np.log(self.total)
        lse[blind] = -np.inf
        return self.sums / self.total, lse

    def _rescale(self, peak: np.ndarray) -> None:
        """Express the sums so far relative to a new peak."""
        shrink = np.exp(self.peak - _finite_or_zero(peak))
        self.total *= shrink
        self.sums *= shrink
        self.peak = peak


def _weigh(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """weights @ values, where a weight of 0 takes nothing: a hidden key cannot hand its NaN or infinity to a row."""
    product = weights @ values
    for head, row in np.argwhere(~np.isfinite(product).all(axis=-1)):
        taken = weights[head, row] != 0
        product[head, row] = weights[head, row, taken] @ values[head, taken]
    return product


def _finite_or_zero(peak: np.ndarray) -> np.ndarray:
    """-inf becomes 0, so that a row with no key yet has exp(-inf - 0) = 0 and no NaN."""
    return np.where(peak == -np.inf, peak.dtype.type(0), peak)


def _widen(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A block in the precision of the arithmetic. A table is 2.5 times as fast as NumPy's own float16 -> float32."""
    if block.dtype == np.float16 and dtype == np.float32:
        return _float16_table().take(block.view(np.uint16))
    return block.astype(dtype, copy=False)


@cache
def _float16_table() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
