"""What attention means, written out plainly: the thing that both backends are compared with.

Everything is float64, one sequence and one head after the other, with the full matrix of scores. Nothing is shared
with cupyattn: the functions carry the library's public names, take its arguments as NumPy arrays, and work out by
themselves which keys a row sees. `Expected.check` compares, within a bound derived for each element.

At the end stand the random inputs of the tests, with NaN in every row of a cache that no sequence owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

FLOAT32 = 2.0**-24  # unit roundoff: half the distance from 1 to the next number
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": FLOAT32, "float64": 2.0**-53}
TINIEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 0.0}
FP8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
FP8_NAN = 0x7F  # in both formats

Caches = tuple[np.ndarray, np.ndarray]


@dataclass
class Expected:
    """The exact result, and beside it what the bound on the error is made of."""

    out: np.ndarray  # float64, q's shape with the last axis of v
    lse: np.ndarray  # float64, (batch, heads, seqlen_q) or (heads, total_q)
    weight: np.ndarray  # as out: sum of p |v| over the keys seen, p being the softmax weights
    loss: np.ndarray  # as out: sum of |v| over the keys seen, divided by the sum of exp(score - largest score)
    size: np.ndarray  # as lse: the largest sum of magnitudes that one score of the row was added up from
    keys: np.ndarray  # as lse: how many keys the row sees
    drift: np.ndarray  # as lse: what a score may be off by because its query was rounded, beyond what is exact here
    head_dim: int  # of q and k
    half_weights: bool = False  # weights may be taken in float16 whatever the dtype, as beside an FP8 cache

    def bounds(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """The largest errors that honest arithmetic can make: for out and for lse, element by element.

        Write u for the unit roundoff of dtype (2**-11 float16, 2**-8 bfloat16), e = 2**-24 for float32's, n for the
        number of keys a row sees, d for head_dim, p for the softmax weights, W = sum p |v|.

        1. A score is a sum of d products, scaled, capped and biased in float32. Rounding errors add up like a random
           walk, so its absolute error is at most D = e ((8 + 2 sqrt d) S + 8), where S = scale * sum |q||k| + cap +
           |bias| is the largest sum of magnitudes behind a score of the row; the last 8 e are for exp and tanh.
        2. A score off by D multiplies its weight by at most exp(D). Since the weights are normalised, that moves
           the output by at most (exp(2 D) - 1) W.
        3. Tensor cores take the weights in dtype: another u W for half types, whereas the sum of weights stays
           float32. In float16 a weight below 2**-14 is subnormal and loses up to 2**-25 of the largest weight's 1.
        4. Summing n products in float32: e (8 + 2 sqrt n) W.
        5. Rounding the output to dtype: u |out|, or half of dtype's smallest number.

        lse takes the error of 1, and e (8 + 2 sqrt n) for the sum, and 4 e |lse| for the logarithm's last steps. As
        it is float32 whatever dtype is, it tells n keys from n + 1 also where the rounding of out hides one key.
        A row that sees no key must be exactly zeros and -inf.

        A rotated query is rounded to dtype, here as everywhere. Only where the exact number is within float32's error
        of the middle between two may the other of them be right too: D gets scale * sum |q's two - one| |k|. Beside an
        FP8 cache nothing is added for keys and values: what they stand for is a stored number of 3 or 2 bits, exact in
        float16, times a float32 scale, which costs less than the 8 e in 1 and 4. But products are then of float16: a
        bfloat16 query loses what lies below 2**-25 of its largest element, and weights lose what they do in 3.
        """
        u, tiniest = UNIT_ROUNDOFF[dtype], TINIEST[dtype]
        rounding = UNIT_ROUNDOFF[dtype] if dtype in ("float16", "bfloat16") else 0.0
        summing = FLOAT32 * (8 + 2 * np.sqrt(self.keys))
        score = FLOAT32 * ((8 + 2 * np.sqrt(self.head_dim)) * self.size + 8) + self.drift
        with np.errstate(invalid="ignore", over="ignore"):
            relative = _beside(rounding + np.expm1(2 * score) + summing, self.out.ndim)
            out = u * np.abs(self.out) + relative * self.weight + tiniest / 2
            out += 2.0**-25 * self.loss if dtype == "float16" or self.half_weights else 0.0
            lse = score + summing + 4 * FLOAT32 * np.abs(self.lse)
        blind = self.keys == 0
        out[_beside(blind, self.out.ndim)[..., 0]] = 0
        lse[blind] = 0
        return out, lse

    def check(self, out: np.ndarray, lse: np.ndarray | None, dtype: str, form: bool | str = True) -> None:
        """AssertionError if out (and lse, unless None) is further from this than `bounds` allows, or NaN elsewhere.

        form: what return_lse was.
        """
        out_bound, lse_bound = self.bounds(dtype)
        _compare("out", np.asarray(out).astype(np.float64), self.out, out_bound)
        if lse is not None:
            expected = self.lse
            if form == "log2":  # one rounding more, and log2(e) itself is rounded
                expected, lse_bound = expected / np.log(2), lse_bound / np.log(2)
                lse_bound += np.where(self.keys == 0, 0, 2 * FLOAT32 * np.abs(expected))
            elif form == "flash_attn":
                expected = np.where(self.keys == 0, np.inf, expected)
            _compare("lse", np.asarray(lse).astype(np.float64), expected, lse_bound)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, **masks: object) -> Expected:
    """q (batch, seqlen_q, heads, head_dim); k and v (batch, seqlen_k, kv_heads, head_dim), v's head_dim its own."""
    result = _blank(q, v, packed=False)
    for b in range(len(q)):
        _one_sequence(result, b, q[b], k[b], v[b], b, **masks)
    return result


def attention_varlen(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cu_seqlens_q: np.ndarray,
    cu_seqlens_k: np.ndarray | None = None,
    *,
    block_table: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    layout: str = "NHD",
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **masks: object,
) -> Expected:
    """q (total_q, heads, head_dim); k and v packed, or paged with block_table. cu_seqlens_k None means cu_seqlens_q."""
    result = _blank(q, v, packed=True)
    if cu_seqlens_k is None and block_table is None:
        cu_seqlens_k = cu_seqlens_q
    for b in range(len(cu_seqlens_q) - 1):
        own = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        length = int(seqused_k[b]) if seqused_k is not None else int(cu_seqlens_k[b + 1] - cu_seqlens_k[b])
        if block_table is None:
            first = int(cu_seqlens_k[b])
            keys, values = k[first : first + length], v[first : first + length]
        else:
            keys, values = (_from_blocks(cache, block_table[b], length, layout) for cache in (k, v))
        _one_sequence(result, own, q[own], keys, values, b, **masks)
    return result


def attention_with_kvcache(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    *,
    k: np.ndarray | None = None,
    v: np.ndarray | None = None,
    cache_seqlens: np.ndarray | int | None = None,
    cache_batch_idx: np.ndarray | None = None,
    cache_leftpad: np.ndarray | None = None,
    block_table: np.ndarray | None = None,
    layout: str = "NHD",
    rotary_cos: np.ndarray | None = None,
    rotary_sin: np.ndarray | None = None,
    rotary_interleaved: bool = True,
    kv_dtype: str | None = None,
    k_scale: np.ndarray | float = 1.0,
    v_scale: np.ndarray | float = 1.0,
    num_splits: int = 0,
    stored: tuple[np.ndarray, np.ndarray] | None = None,
    **masks: object,
) -> Expected:
    """q (batch, seqlen_q, heads, head_dim) over dense or paged caches; k and v are appended to copies first.

    An FP8 cache is its bytes, and kv_dtype is given. stored: the caches as the call under test left them, where new
    rows that were rotated or rounded to FP8 are among `append_range`; by default they are as `append_kv` rounds them.
    """
    result = _blank(q, v_cache, packed=False)
    batch = len(q)
    places = {"cache_batch_idx": cache_batch_idx, "block_table": block_table, "layout": layout}
    if k is not None and stored is None:
        rotary = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "rotary_interleaved": rotary_interleaved}
        fp8 = {"kv_dtype": kv_dtype, "k_scale": k_scale, "v_scale": v_scale}
        stored = append_kv(k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, **places, **rotary, **fp8)
    if stored is not None:
        k_cache, v_cache = stored
    error = np.zeros(q.shape)
    if kv_dtype is not None:
        k_cache, v_cache = _from_fp8(k_cache, kv_dtype), _from_fp8(v_cache, kv_dtype)
        result.half_weights = True
        if q.dtype.name == "bfloat16":
            error += 2.0**-25 * np.abs(q.astype(np.float64)).max(axis=-1, keepdims=True)
    if rotary_cos is not None:
        along = masks.get("causal") or masks.get("window") not in (None, (-1, -1))
        first = np.broadcast_to(cache_seqlens, (batch,))[:, None]
        positions = first + (np.arange(q.shape[1]) if along else np.zeros(q.shape[1], int))
        ranges = [_rotated(q[b], rotary_cos, rotary_sin, positions[b], rotary_interleaved) for b in range(batch)]
        low, q, high = (np.array(numbers).astype(np.float64) for numbers in zip(*ranges, strict=True))
        error += high - low
    for b in range(batch):
        if cache_seqlens is not None:
            length = int(np.broadcast_to(cache_seqlens, (batch,))[b]) + (0 if k is None else k.shape[1])
        elif block_table is not None:
            length = block_table.shape[1] * _block_size(k_cache, layout)
        else:
            length = k_cache.shape[1]
        skipped = 0 if cache_leftpad is None else int(cache_leftpad[b])
        if block_table is None:
            entry = b if cache_batch_idx is None else int(cache_batch_idx[b])
            keys, values = k_cache[entry, :length], v_cache[entry, :length]
        else:
            keys, values = (_from_blocks(cache, block_table[b], length, layout) for cache in (k_cache, v_cache))
        keys, values = keys[skipped:], values[skipped:]
        if kv_dtype is not None:
            keys, values = keys * _per_head(k_scale), values * _per_head(v_scale)
        _one_sequence(result, b, q[b], keys, values, b, error[b], **masks)
    return result


def append_kv(k_cache: np.ndarray, v_cache: np.ndarray, *new: np.ndarray, **options: object) -> Caches:
    """Copies of the caches with the new rows written: rotated exactly, then rounded once to each format on the way."""
    return tuple(nearest for _, nearest, _ in _append(k_cache, v_cache, *new, **options))


def append_range(
    k_cache: np.ndarray, v_cache: np.ndarray, *new: np.ndarray, **options: object
) -> tuple[Caches, Caches]:
    """The caches with the least and with the largest numbers that honest float32 arithmetic can leave in them."""
    (k_low, _, k_high), (v_low, _, v_high) = _append(k_cache, v_cache, *new, **options)
    return (k_low, v_low), (k_high, v_high)


def check_caches(got: Caches, low: Caches, high: Caches, kv_dtype: str | None = None) -> None:
    """AssertionError unless every number lies in its range; where that is one number, its bits must be right."""
    for name, *caches in zip(("k_cache", "v_cache"), got, low, high, strict=True):
        bits = [np.ascontiguousarray(cache).view(f"u{cache.itemsize}") for cache in caches]
        numbers = [cache.astype(np.float64) if kv_dtype is None else _from_fp8(cache, kv_dtype) for cache in caches]
        with np.errstate(invalid="ignore"):
            within = (numbers[1] <= numbers[0]) & (numbers[0] <= numbers[2])
        wrong = np.where(bits[1] == bits[2], bits[0] != bits[1], ~within)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            got_at, low_at, high_at = (array[at] for array in numbers)
            raise AssertionError(
                f"{name}: {wrong.sum()} of {wrong.size} numbers are wrong; the first at {at}: got {got_at:.9g}, "
                f"expected {low_at:.9g} to {high_at:.9g}"
            )


def _append(
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    cache_seqlens: np.ndarray | int | None = None,
    cu_seqlens_new: np.ndarray | None = None,
    cache_batch_idx: np.ndarray | None = None,
    block_table: np.ndarray | None = None,
    layout: str = "NHD",
    rotary_cos: np.ndarray | None = None,
    rotary_sin: np.ndarray | None = None,
    rotary_interleaved: bool = True,
    kv_dtype: str | None = None,
    k_scale: np.ndarray | float = 1.0,
    v_scale: np.ndarray | float = 1.0,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For keys and for values: copies of the cache with the least, the nearest and the largest numbers, row by row."""
    batch = len(k) if cu_seqlens_new is None else len(cu_seqlens_new) - 1
    starts = np.broadcast_to(0 if cache_seqlens is None else cache_seqlens, (batch,))
    results = []
    for cache, new, scale, cos in ((k_cache, k, k_scale, rotary_cos), (v_cache, v, v_scale, None)):
        copies = cache.copy(), cache.copy(), cache.copy()
        for b in range(batch):
            rows = new[b] if cu_seqlens_new is None else new[cu_seqlens_new[b] : cu_seqlens_new[b + 1]]
            ranges = rows, rows, rows
            if cos is not None:
                ranges = _rotated(rows, cos, rotary_sin, starts[b] + np.arange(len(rows)), rotary_interleaved)
            if kv_dtype is not None:
                ranges = _to_fp8_range(*ranges, scale, kv_dtype)
            for copy, written in zip(copies, ranges, strict=True):
                for i, row in enumerate(written):
                    at = int(starts[b]) + i
                    if block_table is None:
                        copy[b if cache_batch_idx is None else cache_batch_idx[b], at] = row
                    elif layout == "NHD":
                        copy[block_table[b, at // copy.shape[1]], at % copy.shape[1]] = row
                    else:
                        copy[block_table[b, at // copy.shape[2]], :, at % copy.shape[2]] = row
        results.append(copies)
    return results


def _rotated(
    rows: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, interleaved: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rows (n, heads, head_dim) turned as at positions (n,): the least, the nearest and the largest of rows' dtype.

    The two outer ones are the nearest to the exact numbers less and more what two products and a sum in float32 may be
    off by, so that they are one number unless the exact one is as close as that to the middle between two.
    """
    exact, error = rows.astype(np.float64), np.zeros(rows.shape)
    half = cos.shape[1]
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        a, b = rows[..., first].astype(np.float64), rows[..., second].astype(np.float64)
        c, s = (table[positions, i].astype(np.float64)[:, None] for table in (cos, sin))
        exact[..., first], exact[..., second] = a * c - b * s, a * s + b * c
        error[..., first] = 3 * FLOAT32 * (abs(a * c) + abs(b * s))
        error[..., second] = 3 * FLOAT32 * (abs(a * s) + abs(b * c))
    return tuple((exact + sign * error).astype(rows.dtype) for sign in (-1, 0, 1))


def to_fp8(numbers: np.ndarray, kv_dtype: str) -> np.ndarray:
    """The bytes of the nearest numbers of an FP8 format, of even ones where two are as near, of its largest at most."""
    held = np.arange(128, dtype=np.uint8).view(FP8[kv_dtype]).astype(np.float64)
    held = held[np.isfinite(held)]  # ascending, as the bytes are
    size = np.abs(numbers.astype(np.float64))
    above = np.clip(np.searchsorted(held, size), 1, len(held) - 1)
    to_above, to_below = held[above] - size, size - held[above - 1]
    nearest = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, above - 1)
    signed = nearest.astype(np.uint8) | np.where(np.signbit(numbers), 0x80, 0).astype(np.uint8)
    return np.where(np.isnan(numbers), np.uint8(FP8_NAN), signed)


def _to_fp8_range(
    low: np.ndarray, nearest: np.ndarray, high: np.ndarray, scale: np.ndarray | float, kv_dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (n, heads, head_dim) as the bytes of what they are divided by scale; the quotient may be off in float32."""
    low, nearest, high = (rows.astype(np.float64) / _per_head(scale) for rows in (low, nearest, high))
    error = 4 * FLOAT32
    low, high = low - error * np.abs(low), high + error * np.abs(high)
    return tuple(to_fp8(rows, kv_dtype) for rows in (low, nearest, high))


def _from_fp8(stored: np.ndarray, kv_dtype: str) -> np.ndarray:
    return stored.view(FP8[kv_dtype]).astype(np.float64)


def _per_head(scale: np.ndarray | float) -> np.ndarray:
    """A scale to multiply (…, kv_heads, head_dim) with."""
    return np.asarray(scale, np.float64).reshape(-1, 1)


def _one_sequence(
    result: Expected,
    place: int | slice,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    b: int,
    q_error: np.ndarray | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> None:
    """Fill in the rows of one sequence: q (seqlen_q, heads, head_dim), k and v (seqlen_k, kv_heads, head_dim).

    q_error, as q and only for a dense batch: what q may be off by.
    """
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scale = 1 / np.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    position = np.arange(len(q))[:, None] + len(k) - len(q)  # of each query among the keys: the last is at the last
    distance = position - np.arange(len(k))
    left, right = window or (-1, -1)
    right = 0 if causal else right
    seen = np.ones(distance.shape, bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= distance >= -right
    for head in range(q.shape[1]):
        slope = 0.0
        if alibi_slopes is not None:
            slope = float(alibi_slopes[head] if np.ndim(alibi_slopes) == 1 else alibi_slopes[b, head])
        with np.errstate(invalid="ignore", over="ignore"):
            scores = scale * (q[:, head] @ k[:, head // group].T)
            size = abs(scale) * (np.abs(q[:, head]) @ np.abs(k[:, head // group]).T)
            if q_error is not None:
                drift = abs(scale) * (q_error[:, head] @ np.abs(k[:, head // group]).T)
                result.drift[place, head] = np.where(seen & np.isfinite(drift), drift, 0).max(axis=1, initial=0)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            scores = scores - slope * np.abs(distance)
            size = size + (softcap or 0.0) + abs(slope) * np.abs(distance)
        sink = None if sinks is None else float(sinks[head])
        _one_head(result, place, head, scores, size, seen, v[:, head // group], sink)


def _one_head(
    result: Expected,
    place: int | slice,
    head: int,
    scores: np.ndarray,
    size: np.ndarray,
    seen: np.ndarray,
    values: np.ndarray,
    sink: float | None,
) -> None:
    """One head's softmax and weighted means, from scores, their size and whether they are seen (seqlen_q, seqlen_k)."""
    at = (place, slice(None), head) if isinstance(place, int) else (place, head)
    lse_at = (place, head) if isinstance(place, int) else (head, place)
    result.keys[lse_at] = seen.sum(axis=1)
    result.size[lse_at] = np.where(seen & np.isfinite(scores), size, 0).max(axis=1, initial=0)  # -inf is exact
    scores = np.where(seen, scores, -np.inf)
    largest = scores.max(axis=1, initial=-np.inf)
    live = largest != -np.inf  # the other rows keep their zeros and -inf
    top = largest if sink is None else np.maximum(largest, sink)
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = np.where(seen, np.exp(scores - top[:, None]), 0)
        total = weights.sum(axis=1) + (0 if sink is None else np.exp(sink - top))
        result.out[at][live] = (_over_seen(weights, values, seen) / total[:, None])[live]
        result.weight[at][live] = (_over_seen(weights, np.abs(values), seen) / total[:, None])[live]
        result.loss[at][live] = (_over_seen(seen * 1.0, np.abs(values), seen) / total[:, None])[live]
        result.lse[lse_at][live] = (top + np.log(total))[live]


def _over_seen(weights: np.ndarray, values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """weights @ values over the keys that each row sees: 0 times a hidden key's NaN must not count."""
    if np.isfinite(values).all():
        return weights @ values
    return np.array([weights[i, seen[i]] @ values[seen[i]] for i in range(len(seen))]).reshape(len(seen), -1)


def _blank(q: np.ndarray, v: np.ndarray, packed: bool) -> Expected:
    """Results of rows that see no key."""
    shape = (*q.shape[:-1], v.shape[-1])
    rows = (shape[1], shape[0]) if packed else (shape[0], shape[2], shape[1])
    out = (np.zeros(shape) for _ in range(3))
    per_row = np.zeros(rows), np.zeros(rows, dtype=int), np.zeros(rows)
    return Expected(next(out), np.full(rows, -np.inf), next(out), next(out), *per_row, q.shape[-1])


def _from_blocks(cache: np.ndarray, blocks: np.ndarray, length: int, layout: str) -> np.ndarray:
    """The first rows (length, kv_heads, head_dim) of a sequence that lies in blocks."""
    size = _block_size(cache, layout)
    rows = [
        cache[blocks[n // size], n % size] if layout == "NHD" else cache[blocks[n // size], :, n % size]
        for n in range(length)
    ]
    heads = cache.shape[2] if layout == "NHD" else cache.shape[1]
    return np.array(rows, dtype=cache.dtype).reshape(length, heads, cache.shape[-1])


def _block_size(cache: np.ndarray, layout: str) -> int:
    return cache.shape[1] if layout == "NHD" else cache.shape[2]


def _beside(rows: np.ndarray, ndim: int) -> np.ndarray:
    """Something per row in lse's order, in the order of out and ready to multiply it."""
    return np.moveaxis(rows, -1, -2)[..., None] if ndim == rows.ndim + 1 else rows


def _compare(name: str, got: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    with np.errstate(invalid="ignore"):
        error = np.abs(got - expected)
        wrong = ~((got == expected) | (error <= bound) | (np.isnan(got) & np.isnan(expected)))
    if wrong.any():
        excess = np.where(wrong, np.nan_to_num(error / np.maximum(bound, 1e-300), nan=np.inf), -1)
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements are out of bounds; the worst at "
            f"{tuple(int(i) for i in worst)}: got {got[worst]:.9g}, expected {expected[worst]:.9g}, "
            f"error {error[worst]:.3g}, bound {bound[worst]:.3g}"
        )


# Random inputs.

JUNK_BLOCK = 2**31 - 1  # stands in a block table wherever no block is needed


def _junk(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """NaN everywhere; uint8 is for the bytes of FP8."""
    return np.full(shape, FP8_NAN if dtype == np.uint8 else np.nan, dtype)


def normal(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Standard normal numbers, rounded to dtype."""
    return rng.standard_normal(tuple(shape)).astype(np.dtype(dtype))


def cumulative(lengths: Sequence[int]) -> np.ndarray:
    """cu_seqlens of sequences of these lengths."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def dense_cache(sequences: Sequence[np.ndarray], rows: int, entries: Sequence[int] | None = None) -> np.ndarray:
    """(max(entries) + 1, rows, kv_heads, head_dim) holding the sequences in these entries, NaN elsewhere."""
    entries = range(len(sequences)) if entries is None else entries
    cache = _junk((max(entries, default=-1) + 1, rows, *sequences[0].shape[1:]), sequences[0].dtype)
    for entry, sequence in zip(entries, sequences, strict=True):
        cache[entry, : len(sequence)] = sequence
    return cache


def paged_cache(
    rng: np.random.Generator, pairs: Sequence[tuple[np.ndarray, np.ndarray]], block_size: int, capacity: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of (keys, values) in shuffled blocks, and the block table.

    The cache is (num_blocks, 2, block_size, kv_heads, head_dim), with keys and values on axis 1, and NaN wherever
    no sequence's row lies. Each sequence owns blocks for at least `capacity` rows; table entries behind them are junk.
    """
    needed = [-(-max(len(keys), capacity) // block_size) for keys, _ in pairs]
    blocks = rng.permutation(sum(needed) + 2)
    heads_and_dim = pairs[0][0].shape[1:]
    cache = _junk((len(blocks), 2, block_size, *heads_and_dim), pairs[0][0].dtype)
    table = np.full((len(pairs), max(needed) + 1), JUNK_BLOCK, np.int32)
    taken = 0
    for b, pair in enumerate(pairs):
        table[b, : needed[b]] = blocks[taken : taken + needed[b]]
        taken += needed[b]
        for axis, rows in enumerate(pair):
            for n, row in enumerate(rows):
                cache[table[b, n // block_size], axis, n % block_size] = row
    return cache, table
