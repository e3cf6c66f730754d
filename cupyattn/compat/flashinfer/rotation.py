"""Angles of rotary embedding by FlashInfer's parameters, and rows rotated by them.

Sources: RoFormer (Su et al. 2021, arXiv:2104.09864), position interpolation (Chen et al. 2023, arXiv:2306.15595) for
rope_scale, and Llama 3.1's rule, which leaves high frequencies as they are and divides low ones by the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...rotary import apply_rotary
from .library import Array, Library


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Of rotary_dim / 2 pairs of elements, in radians per position."""

    rotary_dim: int
    scale: float
    theta: float
    low_freq_factor: float | None = None  # given for Llama 3.1's rule, with the other two
    high_freq_factor: float = 0.0
    old_context_len: float = 0.0

    def values(self) -> np.ndarray:
        """float64 (rotary_dim / 2,)."""
        plain = self.theta ** -(np.arange(0, self.rotary_dim, 2) / self.rotary_dim)
        if self.low_freq_factor is None:
            return plain / self.scale
        turns = self.old_context_len * plain / (2 * math.pi)  # within the context that the model was trained on
        span = self.high_freq_factor - self.low_freq_factor
        share = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        return (1 - share) * plain / self.scale + share * plain


Tables = tuple[Array, Array]
"""cos and sin, float32 (rows, rotary_dim / 2)."""


@lru_cache(maxsize=64)
def _on_device(library: Library, frequencies: Frequencies) -> Array:
    return library.asarray(frequencies.values())


def row_tables(library: Library, frequencies: Frequencies, positions: Array) -> Tables:
    """A row of the tables for each of positions (n,), whatever they are; nothing waits for the device."""
    angles = library.cast(positions, "float64")[:, None] * _on_device(library, frequencies)
    return library.cast(library.xp.cos(angles), "float32"), library.cast(library.xp.sin(angles), "float32")


@lru_cache(maxsize=8)
def position_tables(library: Library, frequencies: Frequencies, first: int, count: int) -> Tables:
    """Rows for the positions first, first + 1, …, of which there are at least `count`; kept for the next plan."""
    angles = np.outer(np.arange(first, first + count), frequencies.values())
    return library.asarray(np.cos(angles).astype(np.float32)), library.asarray(np.sin(angles).astype(np.float32))


def rotate_rows(x: Array, tables: Tables, rows: Array, interleave: bool, out: Array | None = None) -> Array:
    """x (n, heads, head_dim) with row i rotated by the tables' row rows[i], int32 (n,); into `out`, which may be x."""
    by_row = x[:, None]
    target = None if out is None else by_row if out is x else out[:, None]
    return apply_rotary(by_row, *tables, offsets=rows, interleaved=interleave, out=target)[:, 0]
