"""New keys and values for a paged cache: `new_rows` looks at what a caller gave, and refuses what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays import View, device_name, host_array, refuse, view
from ..problem import FLOAT_DTYPES
from ..ragged import RaggedArray
from .block_table import INT32_MAX
from .store import Form

Array = Any  # an array of NumPy, CuPy, PyTorch, JAX, or of any library that speaks DLPack


@dataclass(slots=True)
class NewRows:
    """Views (layers * batch, seqlen_new, heads, head_dim), or packed (layers * total, …)."""

    k: View
    v: View
    new: int | np.ndarray  # rows of each sequence, if packed int64 (batch,)
    packed: bool
    forms: tuple  # `form_of` k and v as they came


def new_rows(
    cache: Form, device: int, k: Array | RaggedArray, v: Array | RaggedArray, batch: int, lengths: Any, layers: int
) -> NewRows:
    """The rows for a cache of this form, which lies on `device`, as arguments of `PagedKVCache.append` name them."""
    if isinstance(k, RaggedArray) or isinstance(v, RaggedArray):
        if not (isinstance(k, RaggedArray) and isinstance(v, RaggedArray) and k.same_sequences(v)):
            refuse("v", "other sequences than k", "RaggedArrays of the same lengths")
        if lengths is not None or layers > 1:
            refuse("k", "a RaggedArray", "an array of packed rows beside lengths, or for several layers")
        k, v, lengths = k.values, v.values, k.host_lengths
    packed = lengths is not None
    k_found, v_found = _fitting("k", k, cache, device, layers, packed), _fitting("v", v, cache, device, layers, packed)
    forms = form_of(k_found), form_of(v_found)
    if k_found.shape != v_found.shape:
        refuse("v", f"shape {v_found.shape}", f"k's shape {k_found.shape}")
    k_view, v_view = without_layers("k", k_found, layers), without_layers("v", v_found, layers)
    if not packed:
        if k_view.shape[0] != batch * layers:
            refuse("k", f"{k_view.shape[0] // layers} sequences", f"{batch}, as in seqs")
        return NewRows(k_view, v_view, k_view.shape[1], False, forms)
    new = per_sequence("lengths", lengths, batch)
    if new.sum() * layers != k_view.shape[0]:
        refuse("lengths", f"{new.sum()} rows in all", f"k's {k_view.shape[0] // layers}")
    return NewRows(k_view, v_view, new, True, forms)


def _fitting(name: str, array: Array, cache: Form, device: int, layers: int, packed: bool) -> View:
    """The view of an array of rows that the cache can hold."""
    found = view(array, name)
    shape = found.shape
    if len(shape) != 4 - packed + (layers > 1):
        form = ("num_layers, " if layers > 1 else "") + ("total" if packed else "batch, seqlen_new")
        refuse(name, f"{len(shape)}-D shape {shape}", f"({form}, kv_heads, head_dim)")
    if shape[-2] != cache.num_kv_heads or shape[-1] != cache.head_dim:
        came = f"{shape[-2]} heads of {shape[-1]}"
        refuse(name, came, f"the cache's {cache.num_kv_heads} heads of {cache.head_dim}")
    if found.dtype != cache.dtype and not (cache.is_fp8 and found.dtype in FLOAT_DTYPES):
        allowed = " or ".join(FLOAT_DTYPES if cache.is_fp8 else (cache.dtype,))
        refuse(name, found.dtype, f"{allowed}, as the cache holds {cache.dtype}", TypeError)
    if found.device != device:
        refuse(name, f"an array on {device_name(found.device)}", f"the cache's device {device_name(device)}")
    return found


def form_of(found: View) -> tuple:
    """All that a prepared append depends on in an array of new rows but its address."""
    return found.shape, found.strides, found.dtype, found.device, found.pointer & 15


def without_layers(name: str, found: View, layers: int) -> View:
    """(layers, n, …) seen as (layers * n, …); with one layer there is no such axis."""
    if layers == 1:
        return found
    if found.shape[0] != layers:
        refuse(name, f"{found.shape[0]} layers", f"the cache's {layers}")
    if found.shape[1] > 1 and found.strides[0] != found.shape[1] * found.strides[1]:
        refuse(name, f"strides {found.strides}", "layers that follow one another in memory")
    step = found.strides[1] if found.shape[1] > 1 else found.strides[0]
    shape, strides = (layers * found.shape[1], *found.shape[2:]), (step, *found.strides[2:])
    if found.device < 0:
        return replace(view(host_array(found).reshape(shape), name), strides=strides)
    return replace(found, shape=shape, strides=strides)


def per_sequence(name: str, numbers: Any, batch: int) -> np.ndarray:
    """One number for all or one for each, at least 0: int64 (batch,)."""
    found = np.asarray(numbers)
    if found.dtype.kind not in "iu" and found.size:
        refuse(name, f"{found.dtype}", "an int, or an integer for each sequence", TypeError)
    if found.shape not in ((), (batch,)):
        refuse(name, f"shape {found.shape}", f"an int, or one for each of {batch} sequences")
    if found.min(initial=0) < 0:
        refuse(name, int(found.min()), "at least 0")
    if found.max(initial=0) > INT32_MAX:
        refuse(name, int(found.max()), f"at most {INT32_MAX}")
    return np.broadcast_to(found.astype(np.int64), batch)
