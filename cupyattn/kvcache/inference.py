"""What flash_attn's generation code keeps between steps, and the helpers beside it, for any array library.

The names, fields and meanings are those of flash_attn.utils.generation and of flash_attn's tests, version 2.8.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import deliver, empty, numpy_dtype, refuse, view
from ..attention import append_kv, attention_with_kvcache
from ..streams import device_of
from .placing import Array, allocate, host_integers, prototype, put, take


@dataclass
class InferenceParams:
    """The state of a generation that all layers of a model share.

    Nothing here moves on by itself: each layer appends behind the same tokens, and after the last one `advance` counts
    them. Arrays are (batch, seqlen, heads, head_dim), caches packed.

    Attributes:
        max_seqlen: tokens that a sequence can have.
        max_batch_size: sequences that there is room for.
        seqlen_offset: tokens that every sequence has, before this step.
        batch_size_offset: the first sequence of this batch among the max_batch_size.
        key_value_memory_dict: by layer, its cache (max_batch_size, max_seqlen, 2, kv_heads, head_dim), as
            `allocate_inference_cache` makes them; a layer that has none gets one with its first keys.
        lengths_per_sample: int32 (max_batch_size,), tokens that each sequence has, where they differ; it takes the
            place of seqlen_offset.

    >>> import numpy as np
    >>> from cupyattn import InferenceParams
    >>> params = InferenceParams(max_seqlen=16, max_batch_size=2)
    >>> q, k, v = np.ones((3, 2, 5, 4, 64), np.float32)
    >>> for layer in range(3):
    ...     out = params.attend(q, k, v, layer, causal=True)
    >>> params.advance(5)
    >>> params.seqlen_offset, params.key_value_memory_dict[2].shape
    (5, (2, 16, 2, 4, 64))
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Array | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew, with these limits. Caches are kept."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample[...] = 0

    def advance(self, tokens: int = 1, batch_size: int | None = None) -> None:
        """Count the tokens that every layer has appended in this step.

        batch_size: sequences of this batch, behind batch_size_offset; all from there on if None. seqlen_offset counts
            for every sequence: it moves with the last of them, so that micro-batches of a step begin at the same place.
        """
        end = self.max_batch_size if batch_size is None else self.batch_size_offset + batch_size
        if end >= self.max_batch_size:
            self.seqlen_offset += tokens
        if self.lengths_per_sample is not None:
            self.lengths_per_sample[self.batch_size_offset : end] += tokens

    def update(self, k: Array, v: Array, layer_idx: Any, **options: Any) -> tuple[Array, Array]:
        """Append k and v, (batch, seqlen_new, kv_heads, head_dim), to a layer's cache in place, in one launch.

        options are those of `append_kv`. Returns the batch's caches (batch, max_seqlen, kv_heads, head_dim), views.
        Raises TypeError or ValueError, and then nothing has changed.
        """
        cache = self._cache(k, v, layer_idx)
        k_cache, v_cache = self._batch(cache, k)
        append_kv(k_cache, v_cache, k, v, cache_seqlens=self._lengths(k), **options)
        self.key_value_memory_dict[layer_idx] = cache
        return k_cache, v_cache

    def attend(self, q: Array, k: Array, v: Array, layer_idx: Any, **options: Any) -> Array | tuple[Array, Array]:
        """Append k and v to a layer's cache and attend to all that it has, in one call of `attention_with_kvcache`.

        q: (batch, seqlen_q, heads, head_dim). options are that function's masks, rotary_cos, rotary_sin and so on.
        Returns and raises what it does; after an error nothing has changed.
        """
        cache = self._cache(k, v, layer_idx)
        k_cache, v_cache = self._batch(cache, k)
        out = attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=self._lengths(k), **options)
        self.key_value_memory_dict[layer_idx] = cache
        return out

    def _cache(self, k: Array, v: Array, layer_idx: Any) -> Array:
        """A layer's cache, or a new one that is not among them yet."""
        like = view(k, "k")
        if len(like.shape) != 4:
            refuse("k", f"{len(like.shape)}-D shape {like.shape}", "4-D (batch, seqlen_new, kv_heads, head_dim)")
        if (shape := view(v, "v").shape) != like.shape:
            refuse("v", f"shape {shape}", f"k's shape {like.shape}: they lie in one array")
        if self.batch_size_offset + like.shape[0] > self.max_batch_size:
            came = f"batch {like.shape[0]} from batch_size_offset {self.batch_size_offset} on"
            refuse("k", came, f"at most {self.max_batch_size} sequences in all, the max_batch_size")
        if layer_idx in self.key_value_memory_dict:
            return self.key_value_memory_dict[layer_idx]
        return allocate(like, (self.max_batch_size, self.max_seqlen, 2, *like.shape[2:]), like.dtype)

    def _batch(self, cache: Array, k: Array) -> tuple[Array, Array]:
        own = cache[self.batch_size_offset : self.batch_size_offset + k.shape[0]]
        return own[:, : self.max_seqlen, 0], own[:, : self.max_seqlen, 1]

    def _lengths(self, k: Array) -> Array | int:
        if self.lengths_per_sample is None:
            return self.seqlen_offset
        return self.lengths_per_sample[self.batch_size_offset : self.batch_size_offset + k.shape[0]]


def allocate_inference_cache(
    max_batch_size: int,
    max_seqlen: int,
    nheads: int,
    headdim: int,
    layers: int | Iterable[Any],
    device: Any,
    dtype: Any = "float16",
) -> dict[Any, Array]:
    """A cache for each layer, (max_batch_size, max_seqlen, 2, nheads, headdim), not initialised, by layer.

    Args:
        layers: how many, or what to call them.
        device: "cpu", "cuda", "cuda:1", a torch.device or CuPy's Device.
        dtype: with PyTorch's dtype, or a torch.device, the arrays are PyTorch's, else NumPy's or CuPy's.

    Raises:
        TypeError, ValueError: an argument does not fit.

    >>> from cupyattn import allocate_inference_cache
    >>> caches = allocate_inference_cache(2, 128, 8, 64, layers=4, device="cpu")
    >>> sorted(caches), caches[0].shape, str(caches[0].dtype)
    ([0, 1, 2, 3], (2, 128, 2, 8, 64), 'float16')
    """
    like = prototype(dtype, device)
    shape = (max_batch_size, max_seqlen, 2, nheads, headdim)
    _check_sizes(max_batch_size=max_batch_size, max_seqlen=max_seqlen, nheads=nheads, headdim=headdim)
    names = range(layers) if isinstance(layers, (int, np.integer)) else layers
    return {layer: allocate(like, shape, like.dtype) for layer in names}


def generate_block_kvcache(
    seqlen_k: int,
    paged_kv_block_size: int,
    batch_size: int,
    nheads_k: int,
    d: int,
    device: Any,
    dtype: Any,
    *,
    dense: bool = True,
    rng: np.random.Generator | None = None,
) -> tuple[Array, Array, Array, Array, Array, int] | tuple[Array, Array, Array]:
    """A random paged cache to try things on, whose blocks lie in no order.

    Args:
        seqlen_k: tokens of each sequence.
        device, dtype: as for `allocate_inference_cache`.
        dense: also return the same tokens as a dense cache, as flash_attn's tests have it, which takes three times the
            blocks that are needed. False: just the blocks that are needed and their table.
        rng: where NumPy's and CuPy's random numbers come from, by default a new generator. PyTorch's arrays are filled
            by PyTorch, so that torch.manual_seed counts.

    Returns:
        (k_cache, v_cache, block_table, k_cache_paged, v_cache_paged, num_blocks), with dense=False (k_cache_paged,
        v_cache_paged, block_table): dense caches (batch_size, seqlen_k, nheads_k, d), paged ones (num_blocks,
        paged_kv_block_size, nheads_k, d), the table int32 (batch_size, num_blocks / batch_size).

    >>> from cupyattn import generate_block_kvcache
    >>> k, v, table, k_paged, v_paged, num_blocks = generate_block_kvcache(100, 16, 2, 4, 64, "cpu", "float32")
    >>> k.shape, table.shape, k_paged.shape
    ((2, 100, 4, 64), (2, 21), (42, 16, 4, 64))
    >>> bool((k[1, 16:32] == k_paged[table[1, 1]]).all())
    True
    """
    _check_sizes(
        seqlen_k=seqlen_k, paged_kv_block_size=paged_kv_block_size, batch_size=batch_size, nheads_k=nheads_k, d=d
    )
    like = prototype(dtype, device)
    num_blocks = math.ceil(seqlen_k / paged_kv_block_size) * batch_size * (3 if dense else 1)
    shape = (num_blocks, paged_kv_block_size, nheads_k, d)
    if like.library == "torch":
        torch = sys.modules["torch"]
        place = {"device": like.array.device}
        paged = [torch.randn(shape, dtype=like.array.dtype, **place) for _ in "kv"]
        table = torch.randperm(num_blocks, dtype=torch.int32, **place).reshape(batch_size, -1)
    else:
        rng = np.random.default_rng() if rng is None else rng
        numbers = (rng.standard_normal(shape, np.float32).astype(numpy_dtype(like.dtype)) for _ in "kv")
        paged = [put(array, like) for array in numbers]
        table = put(rng.permutation(num_blocks).astype(np.int32).reshape(batch_size, -1), like)
    if not dense:
        return *paged, table
    caches = [take(cache, (table,)).reshape(batch_size, -1, nheads_k, d)[:, :seqlen_k] for cache in paged]
    return *caches, table, *paged, num_blocks


def create_cu_seqlens(lengths: Sequence[int] | Array, device: Any = None) -> Array:
    """Where sequences of these lengths begin in a packed array: int32 (batch + 1,), beginning with 0.

    Args:
        lengths: (batch,) ints, a list or an array of integers. The result is in an array's library and on its device,
            and on a device nothing is waited for.
        device: where the result is to be, else; of a list NumPy's array on "cpu", CuPy's on "cuda", PyTorch's on a
            torch.device.

    Raises:
        TypeError, ValueError: an argument does not fit; on the host also for lengths below 0, or 2**31 tokens in all.

    >>> from cupyattn import create_cu_seqlens
    >>> create_cu_seqlens([4, 0, 6]).tolist()
    [0, 4, 4, 10]
    """
    if isinstance(lengths, (list, tuple, range)):
        like = prototype("int32", "cpu" if device is None else device)
        return put(_checked_ends(host_integers("lengths", lengths)), like)
    given = like = view(lengths, "lengths")
    if device is not None:
        torch = sys.modules.get("torch")
        like = prototype(torch.int32 if given.library == "torch" else "int32", device)
    if given.device < 0 or like.device != given.device:
        ends = put(_checked_ends(host_integers("lengths", lengths)), like)
        return deliver(view(ends), like)
    if len(given.shape) != 1 or given.dtype not in ("int32", "int64"):
        refuse("lengths", f"{given.dtype} of shape {given.shape}", "int32 or int64, (batch,)")
    with device_of(given):
        ends = empty(given, (given.shape[0] + 1,), "int32")
        ends.array[:1] = 0
        ends.array[1:] = (lengths if given.base is None else given.base).cumsum(0)
        return deliver(ends, given)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            refuse(name, repr(size), "an int", TypeError)
        if size < 1:
            refuse(name, size, "at least 1")


def _checked_ends(lengths: np.ndarray) -> np.ndarray:
    """cu_seqlens on the host, int32 (batch + 1,)."""
    if len(lengths) and lengths.min() < 0:
        refuse("lengths", int(lengths.min()), "lengths of at least 0")
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if ends[-1] > np.iinfo(np.int32).max:
        refuse("lengths", f"{ends[-1]} tokens in all", "fewer than 2**31")
    return ends.astype(np.int32)
