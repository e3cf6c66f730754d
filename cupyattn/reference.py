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

from .arrays import INDEX_ROLES, View, host_array, numpy_dtype
from .kernels.operands import AppendOperands, Operands
from .problem import Append, Cache, LseForm, Problem, Rotary, check_indices

SCORES = 1 << 19  # scores held at once, over all heads: 2 MB of float32, which a core's caches hold
KEYS = 512  # keys in one block


def forward(problem: Problem, operands: Operands, precision: type = np.float32) -> None:
    """Compute attention into operands.out and, if the problem asks for it, operands.lse.

    New keys and values are appended first, where the problem has any. precision (numpy.float32 or numpy.float64) is
    the dtype of all arithmetic; results are rounded to the dtype of the arrays that they are written to. Raises
    ValueError, before anything is written, if the contents of an index array do not fit.
    """
    indices = _indices(operands, problem.batch)
    check_indices(problem, indices)
    if problem.append is not None:
        _write(problem.append, operands.appending(), indices, np.dtype(precision))
    out = host_array(operands.out)
    lse = host_array(operands.lse) if problem.lse else None
    if problem.packed_q:
        _fill_spare_rows(out, lse, int(indices["cu_seqlens_q"][-1]), problem.lse_form.unseen)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN in the inputs travel as in any arithmetic
        for sequence in _sequences(problem, operands, indices, out, lse, np.dtype(precision)):
            _attend(problem, sequence)


def append(append: Append, operands: AppendOperands, precision: type = np.float32) -> None:
    """Write the new keys and values behind the tokens that the cache holds, in place, sequence after sequence.

    precision is that of rotation and of the division by a scale. Raises ValueError, before anything is written, if
    the contents of an index array do not fit.
    """
    indices = _indices(operands, append.batch)
    check_indices(append, indices)
    _write(append, operands, indices, np.dtype(precision))


def _write(append: Append, operands: AppendOperands, indices: dict[str, np.ndarray], dtype: np.dtype) -> None:
    """The append itself. Rotated keys are rounded to their own dtype before they are scaled to an FP8 cache's."""
    cache, heads = append.cache, append.num_kv_heads
    held_k = _by_row(operands.k_cache, cache, cache.k_strides, heads, append.head_dim)
    held_v = _by_row(operands.v_cache, cache, cache.v_strides, heads, append.head_dim_v)
    new_k, new_v = host_array(operands.k), host_array(operands.v)
    k_scale = _scales(append.k_scale, operands.k_scale, dtype)
    v_scale = _scales(append.v_scale, operands.v_scale, dtype)
    rotation = _rotation(append.rotary, operands)
    lengths = _used(indices)
    with np.errstate(all="ignore"):
        if rotation is not None:
            ends = indices["cu_seqlens_new"] if append.packed_new else None
            new_k = _rotated(new_k, rotation, 0 if lengths is None else lengths, ends, dtype).astype(new_k.dtype)
        for b in range(append.batch):
            own = slice(*indices["cu_seqlens_new"][b : b + 2]) if append.packed_new else b
            start = 0 if lengths is None else int(lengths[b])
            k, v = new_k[own], new_v[own]
            rows = _place(cache, indices, b).rows(start, start + len(k))
            if append.kv_dtype == append.dtype:
                held_k[rows], held_v[rows] = k, v
            else:
                held_k[rows] = _to_fp8(_widen(k, dtype) / k_scale, append.kv_dtype)
                held_v[rows] = _to_fp8(_widen(v, dtype) / v_scale, append.kv_dtype)


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

    q: np.ndarray  # (seqlen_q, heads, head_dim), rotated if they are to be
    k: np.ndarray  # the whole of k as (outer, row, kv_head, head_dim)
    v: np.ndarray  # the same of v, (outer, row, kv_head, head_dim_v)
    k_numbers: np.ndarray | None  # FP8: what each byte stands for, (1, 256) or (kv_heads, 256)
    v_numbers: np.ndarray | None
    place: _Place
    seqlen_k: int
    slopes: np.ndarray | None  # (heads,)
    sinks: np.ndarray | None  # (heads,)
    out: np.ndarray  # (seqlen_q, heads, head_dim_v)
    lse: np.ndarray | None  # (heads, seqlen_q)
    dtype: np.dtype


def _indices(operands: Operands | AppendOperands, batch: int) -> dict[str, np.ndarray]:
    views = {role: getattr(operands, role, None) for role in INDEX_ROLES}
    arrays = {role: host_array(view) for role, view in views.items() if view is not None}
    if operands.uniform_length is not None:
        arrays["cache_seqlens"] = np.full(batch, operands.uniform_length, np.int32)
    return arrays


def _used(indices: dict[str, np.ndarray]) -> np.ndarray | None:
    """Lengths before this call, where they are given."""
    return indices.get("seqused_k", indices.get("cache_seqlens"))


def _fill_spare_rows(out: np.ndarray, lse: np.ndarray | None, used: int, unseen: float) -> None:
    """Rows of a packed q that no sequence claims see no key."""
    out[used:] = 0
    if lse is not None:
        lse[:, used:] = unseen


def _by_row(view: View, cache: Cache, strides: tuple[int, int, int], heads: int, head_dim: int) -> np.ndarray:
    """k or v (FP8 as bytes) as (outer, row, kv_head, head_dim): NHD and HND differ in strides alone."""
    array = host_array(view)
    if array.itemsize == 1:
        array = array.view(np.uint8)
    shape = (cache.entries, cache.block_size or cache.rows, heads, head_dim)
    steps = tuple(step * array.itemsize for step in (*strides, 1))
    return np.lib.stride_tricks.as_strided(array, shape, steps)


def _place(cache: Cache, indices: dict[str, np.ndarray], b: int) -> _Place:
    outer = first = 0
    if cache.kind == "dense":
        outer = int(indices["cache_batch_idx"][b]) if "cache_batch_idx" in indices else b
    elif cache.kind == "packed":
        first = int(indices["cu_seqlens_k"][b])
    table = indices["block_table"][b] if cache.kind == "paged" else None
    return _Place(outer, first, table, cache.block_size)


def _key_length(problem: Problem, indices: dict[str, np.ndarray], b: int) -> int:
    """How many keys sequence b has, the skipped ones on its left not counted."""
    used = _used(indices)
    if used is not None:
        length = int(used[b]) + problem.seqlen_new
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
    heads = problem.num_kv_heads
    q = host_array(operands.q)
    k = _by_row(operands.k, problem.cache, problem.cache.k_strides, heads, problem.head_dim)
    v = _by_row(operands.v, problem.cache, problem.cache.v_strides, heads, problem.head_dim_v)
    slopes = host_array(operands.alibi_slopes).astype(dtype) if problem.alibi else None
    sinks = host_array(operands.sinks).astype(dtype) if problem.sinks else None
    k_numbers = v_numbers = None
    if problem.kv_dtype != problem.dtype:
        k_numbers = _fp8_numbers(problem.kv_dtype, dtype) * _scales(problem.k_scale, operands.k_scale, dtype)
        v_numbers = _fp8_numbers(problem.kv_dtype, dtype) * _scales(problem.v_scale, operands.v_scale, dtype)
    rotation = _rotation(problem.rotary, operands)
    if rotation is not None:
        rotated = _rotated(q, rotation, _used(indices), None, dtype)
        q = rotated if dtype == np.float64 else rotated.astype(q.dtype)
    for b in range(problem.batch):
        own = slice(*indices["cu_seqlens_q"][b : b + 2]) if problem.packed_q else b
        own_lse = None
        if lse is not None:
            own_lse = lse[:, own] if problem.packed_q else lse[b]
        place = _place(problem.cache, indices, b)
        if "cache_leftpad" in indices:
            place.first += int(indices["cache_leftpad"][b])
        yield _Sequence(
            q=q[own],
            k=k,
            v=v,
            k_numbers=k_numbers,
            v_numbers=v_numbers,
            place=place,
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
    state = _Softmax.empty(q, problem.head_dim_v)
    offset = sequence.seqlen_k - len(sequence.q)
    first, last = _visible_keys(problem.window, start + offset, stop + offset, sequence.seqlen_k)
    for lo in range(first, last, KEYS):
        hi = min(lo + KEYS, last)
        rows = sequence.place.rows(lo, hi)
        scores = q @ _read(sequence.k[rows], sequence.k_numbers, sequence.dtype).transpose(1, 2, 0)
        distance = np.arange(start + offset, stop + offset)[:, None] - np.arange(lo, hi)
        _shape_scores(problem, sequence, scores, distance)
        state.add(scores, _read(sequence.v[rows], sequence.v_numbers, sequence.dtype).transpose(1, 0, 2))
    out, lse = state.result(None if sequence.sinks is None else _per_row(sequence.sinks, problem, stop - start))
    sequence.out[start:stop] = out.reshape(problem.num_heads, stop - start, problem.head_dim_v).transpose(1, 0, 2)
    if sequence.lse is not None:
        sequence.lse[:, start:stop] = _in_form(problem.lse_form, lse).reshape(problem.num_heads, stop - start)


def _in_form(form: LseForm, natural: np.ndarray) -> np.ndarray:
    """A natural lse as it was asked for."""
    factor, unseen = map(natural.dtype.type, form)
    return np.where(natural == -np.inf, unseen, natural * factor)


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
    sums: np.ndarray  # (..., head_dim_v) sum of exp(score - peak) * value

    @classmethod
    def empty(cls, q: np.ndarray, head_dim_v: int) -> _Softmax:
        column, sums = (*q.shape[:-1], 1), (*q.shape[:-1], head_dim_v)
        return cls(np.full(column, -np.inf, q.dtype), np.zeros(column, q.dtype), np.zeros(sums, q.dtype))

    def add(self, scores: np.ndarray, values: np.ndarray) -> None:
        """Take in one block: scores (..., keys), which is overwritten, and values (kv_heads, keys, head_dim_v)."""
        peak = np.maximum(self.peak, scores.max(axis=-1, keepdims=True))
        self._rescale(peak)
        scores -= _finite_or_zero(peak)
        np.exp(scores, out=scores)
        self.total += scores.sum(axis=-1, keepdims=True)
        self.sums += _weigh(scores, values)

    def result(self, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Weighted means (..., head_dim_v) and log-sum-exp (..., 1); zeros and -inf for rows that saw no key."""
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
    """A block in the precision of the arithmetic. NumPy's own float16 -> float32 is slower than a table."""
    if block.dtype == np.float16 and dtype == np.float32:
        return _float16_table().take(block.view(np.uint16))
    return block.astype(dtype, copy=False)


@cache
def _float16_table() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@dataclass(slots=True)
class RotaryTables:
    """A rotation and its tables (positions, dim / 2), as they came."""

    rotary: Rotary
    cos: np.ndarray
    sin: np.ndarray


def _rotation(rotary: Rotary | None, operands: Operands | AppendOperands) -> RotaryTables | None:
    if rotary is None:
        return None
    return RotaryTables(rotary, host_array(operands.rotary_cos), host_array(operands.rotary_sin))


def _rotated(
    rows: np.ndarray, rotation: RotaryTables, starts: np.ndarray | int, ends: np.ndarray | None, dtype: np.dtype
) -> np.ndarray:
    """rows (batch, n, heads, head_dim), or packed by ends (total, heads, head_dim), in dtype and rotated.

    Sequence b's are at starts[b] and on, or all at starts[b] if the rotation says so.
    """
    if ends is None:
        batch, count = rows.shape[:2]
        steps = np.arange(count) if rotation.rotary.per_query else np.zeros(count, np.int64)
        positions = np.broadcast_to(starts, batch)[:, None] + steps
    else:
        batch, lengths = len(ends) - 1, np.diff(ends)
        rows = rows[: ends[-1]]
        positions = np.arange(len(rows)) + np.repeat(np.broadcast_to(starts, batch) - ends[:-1], lengths)
    return rotate(rows.reshape(-1, *rows.shape[-2:]), rotation, positions.ravel(), dtype).reshape(rows.shape)


def rotate(rows: np.ndarray, rotation: RotaryTables, positions: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """rows (n, heads, head_dim) in dtype, their first elements rotated in pairs, row i as at positions[i]."""
    dim = rotation.rotary.dim
    if rotation.rotary.interleaved:
        first, second = slice(0, dim, 2), slice(1, dim, 2)
    else:
        first, second = slice(0, dim // 2), slice(dim // 2, dim)
    cos, sin = (_widen(table[positions], dtype)[:, None] for table in (rotation.cos, rotation.sin))
    out = np.array(_widen(rows, dtype))
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def _scales(number: float, array: View | None, dtype: np.dtype) -> np.ndarray:
    """A cache's scale: (1, 1), or (kv_heads, 1) for one each."""
    scales = np.array([number]) if array is None else host_array(array).reshape(-1)
    return scales.astype(dtype)[:, None]


def _to_fp8(values: np.ndarray, kv_dtype: str) -> np.ndarray:
    """The bytes of values rounded to nearest even; what is too large becomes the largest number, NaN stays NaN."""
    import ml_dtypes  # as in `numpy_dtype`

    target = numpy_dtype(kv_dtype)
    largest = values.dtype.type(ml_dtypes.finfo(target).max)
    return np.clip(values, -largest, largest).astype(target).view(np.uint8)


@cache
def _fp8_numbers(kv_dtype: str, dtype: np.dtype) -> np.ndarray:
    """What the 256 bytes of an FP8 format stand for."""
    return np.arange(256, dtype=np.uint8).view(numpy_dtype(kv_dtype)).astype(dtype)


def _read(block: np.ndarray, numbers: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Rows (n, kv_heads, head_dim) of a cache in the precision of the arithmetic; `numbers` (1 or kv_heads, 256)."""
    if numbers is None:
        return _widen(block, dtype)
    if len(numbers) == 1:
        return numbers[0].take(block)
    return numbers[np.arange(len(numbers))[:, None], block]
