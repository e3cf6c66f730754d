"""What the demo is checked against: one float64 attention over whole sequences, which knows nothing of caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..attention import attention_varlen
from .tolerance import tolerance_of


@dataclass(frozen=True, slots=True)
class Check:
    """How far the outputs of one layer were from float64, and how far they may be."""

    outputs: int
    error: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class Rows:
    """One layer of one sequence, as the model has it, not yet rotated: k and v from its first token on, q and out of
    the last ones, those that attention was computed for. Each (tokens, heads, head_dim)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray


def check_layer(sequences: Sequence[Rows], cos: np.ndarray, sin: np.ndarray) -> Check:
    """Check one layer of sequences in a single packed pass. cos, sin: (positions, head_dim / 2)."""
    q, k, v, out = (np.concatenate([getattr(rows, role) for rows in sequences]) for role in ("q", "k", "v", "out"))
    ends = [(len(rows.q), len(rows.k)) for rows in sequences]
    cu_seqlens = [np.cumsum([0, *counts]).astype(np.int32) for counts in zip(*ends, strict=True)]
    at_q = np.concatenate([np.arange(total - asked, total) for asked, total in ends])
    at_k = np.concatenate([np.arange(total) for _, total in ends])
    q, k = _rotated(q, cos[at_q], sin[at_q]), _rotated(k, cos[at_k], sin[at_k])
    oracle = attention_varlen(q, k, v, *cu_seqlens, causal=True, kernel="numpy_float64")
    return Check(out.size, float(np.abs(out.astype(np.float64) - oracle).max()), tolerance_of(v))


def worst_of(checks: Sequence[Check]) -> Check:
    """Layers differ in scale: the one that comes closest to its own limit, or that is not a number."""
    return max(checks, key=lambda found: np.nan_to_num(found.error / found.tolerance, nan=np.inf))


def compared(outputs: int, error: float, tolerance: float) -> str:
    """PASS or FAIL, and what was compared with what."""
    told, limit = f"{outputs:,} attention outputs", f"(tolerance {tolerance:.1e})"
    if error <= tolerance:
        return f"PASS: {told} within {error:.1e} of float64 {limit}"
    return f"FAIL: {told}, off by up to {error:.1e} from float64 {limit}"


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x (tokens, heads, head_dim), turned in float64 by its tokens' cos and sin, and rounded to its dtype again."""
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)
