"""What the tests of `cupyattn.compat.flashinfer` share: libraries, page tables, and comparisons with the oracle."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from oracle import normal

LOG2E = 1 / np.log(2)
FLOAT32 = 2.0**-24


@dataclass(frozen=True)
class Lib:
    """A library's arrays on one device. Tests hold NumPy arrays; they are moved there and back here."""

    name: str

    def put(self, array: Any) -> Any:
        """A NumPy array (bfloat16 and FP8 too) here; None, lists and tuples of arrays likewise."""
        if array is None:
            return None
        if isinstance(array, (list, tuple)):
            return type(array)(map(self.put, array))
        if self.name == "numpy":
            return array.copy()
        if self.name == "cupy":
            import cupy

            return cupy.asarray(array)
        import torch

        held = array.dtype.name
        if held in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            tensor = torch.from_numpy(array.view(f"u{array.itemsize}").copy()).view(getattr(torch, held))
        else:
            tensor = torch.from_numpy(array.copy())
        return tensor.cuda() if self.name == "torch-cuda" else tensor

    def get(self, array: Any) -> np.ndarray:
        if self.name == "numpy":
            return array
        if self.name == "cupy":
            return array.get()
        import torch

        tensor = array.cpu()
        held = str(tensor.dtype).removeprefix("torch.")
        if held in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            bits = tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int16).numpy()
            return bits.view(getattr(ml_dtypes, held))
        return tensor.numpy()

    def workspace(self, size: int = 1 << 25) -> Any:
        return self.put(np.empty(size, np.uint8))

    def dtype(self, name: str) -> Any:
        """The library's own object for a dtype."""
        if self.name.startswith("torch"):
            return getattr(sys.modules["torch"], name)
        return np.dtype(getattr(ml_dtypes, name, name))


LIBS = [Lib("numpy"), Lib("torch"), Lib("cupy"), Lib("torch-cuda")]


def over_libs() -> Any:
    """Parametrises `lib`; those on a GPU are skipped where there is none, PyTorch where it is not installed."""
    params = []
    for lib in LIBS:
        marks = [pytest.mark.gpu] if lib.name in ("cupy", "torch-cuda") else []
        if lib.name.startswith("torch"):
            marks.append(pytest.mark.skipif(not _has_torch(), reason="needs torch"))
        params.append(pytest.param(lib, id=lib.name, marks=marks))
    return pytest.mark.parametrize("lib", params)


@lru_cache
def _has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- page tables


@dataclass
class Paged:
    """Sequences in pages of one pool, whose unused rows are NaN."""

    lengths: np.ndarray
    page_size: int
    indptr: np.ndarray
    indices: np.ndarray
    last: np.ndarray
    k: np.ndarray  # (pages, page_size, kv_heads, head_dim)
    v: np.ndarray
    block_table: np.ndarray  # for the oracle

    @property
    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.indptr, self.indices, self.last

    def cache(self, lib: Lib, layout: str = "NHD", form: str = "pair") -> Any:
        """The caches as FlashInfer has them: a pair, or one array with an axis of two."""
        k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) if layout == "HND" else x for x in (self.k, self.v))
        return lib.put((k, v)) if form == "pair" else lib.put(np.stack([k, v], axis=1))


def paged(
    rng: np.random.Generator,
    lengths: list[int],
    page_size: int,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: str = "float32",
    head_dim_v: int | None = None,
    spare: int = 3,
) -> Paged:
    """Random keys and values of sequences so long, in shuffled pages."""
    lengths = np.array(lengths)
    counts = -(-lengths // page_size)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    total = int(indptr[-1])
    indices = rng.permutation(total + spare)[:total].astype(np.int32)
    last = np.where(counts > 0, lengths - (counts - 1) * page_size, 0).astype(np.int32)
    shape = (total + spare, page_size, kv_heads)
    k = np.full((*shape, head_dim), np.nan).astype(oracle_dtype(dtype))
    v = np.full((*shape, head_dim_v or head_dim), np.nan).astype(oracle_dtype(dtype))
    table = np.full((len(lengths), max(counts.max(initial=1), 1)), -1, np.int32)
    for b, length in enumerate(lengths):
        own = indices[indptr[b] : indptr[b + 1]]
        table[b, : len(own)] = own
        at = np.arange(length)
        for cache in (k, v):
            cache[own[at // page_size], at % page_size] = normal(rng, (length, kv_heads, cache.shape[-1]), dtype)
    return Paged(lengths, page_size, indptr, indices, last, k, v, table)


def oracle_dtype(name: str) -> Any:
    return np.dtype(getattr(ml_dtypes, name, name))


def starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


# ---------------------------------------------------------------------------------------------------- comparisons


def check_base2(
    expected: oracle.Expected, out: np.ndarray, lse: np.ndarray | None, dtype: str, shift: Any = 0.0
) -> None:
    """AssertionError unless out (rows, heads, head_dim) and the lse to base 2 (rows, heads) agree with the oracle.

    shift: natural, (rows, heads), what FlashInfer's lse is more by.
    """
    rows, heads, _ = out.shape
    expected.check(out.reshape(expected.out.shape), None, dtype)
    if lse is None:
        return
    assert lse.dtype == np.float32 and lse.shape == (rows, heads)
    natural, bound = (by_row(x) for x in (expected.lse, expected.bounds(dtype)[1]))
    exact = (natural + shift) * LOG2E
    with np.errstate(invalid="ignore"):
        error = np.abs(lse.astype(np.float64) - exact)
        allowed = 2 * bound * LOG2E + 4 * FLOAT32 * (np.abs(exact) + np.abs(shift))
    wrong = ~((lse == exact) | (error <= allowed))
    assert not wrong.any(), f"lse: {wrong.sum()} of {wrong.size} are wrong, by up to {np.nanmax(error[wrong])}"


def by_row(lse: np.ndarray) -> np.ndarray:
    """The oracle's (batch, heads, queries) or (heads, rows) as (rows, heads)."""
    return lse.T if lse.ndim == 2 else lse.swapaxes(1, 2).reshape(-1, lse.shape[1])


def slopes(heads: int) -> np.ndarray:
    """ALiBi's, for a power of two: the paper's own example is 2**-1 to 2**-8 for 8 heads."""
    return 2.0 ** (-8 / heads * np.arange(1, heads + 1))


def turned(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, interleave: bool = False) -> np.ndarray:
    """Rows x (n, heads, head_dim) in float64, pair i turned by positions * frequencies[i], as complex numbers."""
    half = len(frequencies)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleave else (slice(half), slice(half, 2 * half))
    )
    out = x.astype(np.float64)
    angle = np.asarray(positions, np.float64)[:, None, None] * frequencies
    pairs = (out[..., first] + 1j * out[..., second]) * np.exp(1j * angle)
    out[..., first], out[..., second] = pairs.real, pairs.imag
    return out


def frequencies(dim: int, scale: float = 1.0, theta: float = 1e4) -> np.ndarray:
    return np.array([theta ** (-2 * i / dim) / scale for i in range(dim // 2)])


def masked(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Attention of each row of q (n, heads, head_dim) over the keys that mask (n, keys) shows it, in the oracle.

    Returns (out, out's bound, natural lse (n, heads), its bound).
    """
    rows = []
    for i in range(len(q)):
        seen = mask[i]
        one = oracle.attention(q[None, i : i + 1], k[None, seen], v[None, seen], **options)
        bound, lse_bound = one.bounds(q.dtype.name)
        rows.append((one.out[0, 0], bound[0, 0], one.lse[0, :, 0], lse_bound[0, :, 0]))
    return tuple(np.array(parts) for parts in zip(*rows, strict=True))
