"""`jax.vmap`: the mapped axis becomes part of the batch, so that one launch serves all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from .calls import call
from .forms import Form

Arrays = Mapping[str, jax.Array]
Results = tuple[jax.Array, ...]

_UNMAPPED = ("sinks", "rotary_cos", "rotary_sin", "k_scale", "v_scale")  # what a launch has only one of


def mappable(form: Form) -> Callable[[Arrays], Results]:
    """`call` for arrays by role, which `jax.vmap` may map over any of them, over several axes too."""

    @custom_vmap
    def attend(arrays: Arrays) -> Results:
        return call(form, arrays)

    @attend.def_vmap
    def attend_mapped(size: int, in_batched: list, arrays: Arrays) -> tuple[Results, tuple[bool, ...]]:
        (mapped,) = in_batched
        if any(mapped.get(role) for role in _UNMAPPED):
            over = {role: x for role, x in arrays.items() if mapped[role]}
            same = {role: x for role, x in arrays.items() if not mapped[role]}
            results = jax.lax.map(lambda one: attend({**same, **one}), over)
        else:
            fold = _FOLDS[form.function]
            results = fold(form, _Axis(size, mapped, arrays))
        return results, (True,) * len(results)

    return attend


class _Axis:
    """Arrays of which some have a mapped axis in front."""

    def __init__(self, size: int, mapped: Mapping[str, bool], arrays: Arrays) -> None:
        self.size = size
        self.mapped = mapped
        self.arrays = arrays

    def one(self, role: str) -> jax.ShapeDtypeStruct | None:
        """An array as one call has it."""
        x = self.arrays.get(role)
        return None if x is None else jax.ShapeDtypeStruct(x.shape[self.mapped[role] :], x.dtype)

    def own(self, role: str) -> jax.Array:
        """The array with the axis in front, repeated if it was not mapped."""
        x = self.arrays[role]
        return x if self.mapped[role] else jnp.broadcast_to(x, (self.size, *x.shape))

    def joined(self, role: str, offset: int = 0) -> jax.Array:
        """The array with the axis in its first one. The numbers of the i-th part grow by i * offset."""
        x = self.own(role)
        if offset:
            x = x + offset * jnp.arange(self.size, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
        return x.reshape(self.size * x.shape[1], *x.shape[2:])

    def split(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """A result, of which an axis holds all parts one behind the other, with the mapped axis in front."""
        parted = x.reshape(*x.shape[:axis], self.size, x.shape[axis] // self.size, *x.shape[axis + 1 :])
        return jnp.moveaxis(parted, axis, 0)


def _slopes(axis: _Axis, batch: int) -> jax.Array:
    """ALiBi's slopes for each sequence of each part; (heads,) if they are the same for all."""
    slopes = axis.arrays["alibi_slopes"]
    one = axis.one("alibi_slopes")
    if one.ndim == 1 and not axis.mapped["alibi_slopes"]:
        return slopes
    own = axis.own("alibi_slopes")
    if one.ndim == 1:
        own = jnp.broadcast_to(own[:, None], (axis.size, batch, *one.shape))
    return own.reshape(-1, own.shape[-1])


def _dense(form: Form, axis: _Axis) -> Results:
    arrays = {role: axis.joined(role) for role in ("q", "k", "v")}
    if "alibi_slopes" in axis.arrays:
        arrays["alibi_slopes"] = _slopes(axis, axis.one("q").shape[0])
    return tuple(map(axis.split, mappable(form)(axis.arrays | arrays)))


def _cached(form: Form, axis: _Axis) -> Results:
    batch = axis.one("q").shape[0]
    arrays = {role: axis.joined(role) for role in ("q", "k_new", "v_new") if role in axis.arrays}
    arrays |= {role: axis.joined(role) for role in ("seqused_k", "cache_leftpad") if role in axis.arrays}
    if "alibi_slopes" in axis.arrays:
        arrays["alibi_slopes"] = _slopes(axis, batch)
    entries = axis.one("k").shape[0]
    shared = "k_new" not in axis.arrays and not axis.mapped["k"] and not axis.mapped["v"]
    index = "block_table" if "block_table" in axis.arrays else "cache_batch_idx"
    if index in axis.arrays:
        arrays[index] = axis.joined(index, 0 if shared else entries)
    elif shared:
        arrays[index] = jnp.tile(jnp.arange(batch, dtype=jnp.int32), axis.size)
    if not shared:
        arrays |= {role: axis.joined(role) for role in ("k", "v")}
    return tuple(map(axis.split, mappable(form)(axis.arrays | arrays)))


def _packed(form: Form, axis: _Axis) -> Results:
    """Parts lie one behind the other. The rows that one leaves unused become a sequence that sees no key."""
    batch = axis.one("cu_seqlens_q").shape[0] - 1
    paged = "block_table" in axis.arrays
    arrays = {"q": axis.joined("q"), "cu_seqlens_q": _starts(axis, "cu_seqlens_q", axis.one("q").shape[0])}
    keys = "cu_seqlens_k" if "cu_seqlens_k" in axis.arrays else "cu_seqlens_q"
    if "seqused_k" in axis.arrays:
        used = axis.own("seqused_k")
    else:
        used = jnp.diff(axis.own(keys), axis=1)
    arrays["seqused_k"] = jnp.pad(used, ((0, 0), (0, 1))).reshape(-1)
    shared = paged and not axis.mapped["k"] and not axis.mapped["v"]
    if not shared:
        arrays |= {role: axis.joined(role) for role in ("k", "v")}
    if paged:
        table = axis.joined("block_table", 0 if shared else axis.one("k").shape[0])
        table = table.reshape(axis.size, batch, -1)
        arrays["block_table"] = jnp.pad(table, ((0, 0), (0, 1), (0, 0))).reshape(axis.size * (batch + 1), -1)
    else:
        arrays["cu_seqlens_k"] = _starts(axis, keys, axis.one("k").shape[0])
    if "alibi_slopes" in axis.arrays:
        slopes = _slopes(axis, batch)
        if slopes.ndim == 2:
            slopes = jnp.pad(slopes.reshape(axis.size, batch, -1), ((0, 0), (0, 1), (0, 0))).reshape(
                -1, slopes.shape[1]
            )
        arrays["alibi_slopes"] = slopes
    others = {role: x for role, x in axis.arrays.items() if role != "cu_seqlens_k"}
    out, *lse = mappable(form.without("max_seqlen_q", "max_seqlen_k"))(others | arrays)
    return (axis.split(out), *(axis.split(x, axis=1) for x in lse))


def _starts(axis: _Axis, role: str, rows: int) -> jax.Array:
    """cu_seqlens of all parts, each of so many rows: where its sequences begin, and the rows behind them."""
    own = axis.own(role)
    begin = own + rows * jnp.arange(axis.size, dtype=own.dtype)[:, None]
    return jnp.append(begin.reshape(-1), jnp.asarray([axis.size * rows], own.dtype))


_FOLDS: dict[str, Callable[[Form, _Axis], Any]] = {
    "attention": _dense,
    "attention_varlen": _packed,
    "attention_with_kvcache": _cached,
}
