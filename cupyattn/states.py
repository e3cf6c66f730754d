"""Merging attention over several sets of keys into attention over all of them.

Source: Flash-Decoding (Dao, Haziza, Massa and Sizov 2023), and merge_states of the flashinfer package. A state is what
attention over some of the keys gives: its output and the log-sum-exp of its scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_

import numpy as np

from .arrays import View, deliver, empty, host_array, numpy_dtype, overlap, refuse, view
from .attention import Array, optional_view, remember, remembered, signature
from .problem import (
    FLOAT_DTYPES,
    ITEMSIZE,
    Strides,
    check_countable,
    check_per_head,
    check_rows,
    check_writable,
    contiguous_row_alignment,
    contiguous_row_strides,
    row_alignment,
    row_strides,
    same_kind,
)
from .streams import device_of, in_order


@dataclass(frozen=True, slots=True)
class Merge:
    """A validated, frozen description of merging states of one form. A packed array is a batch of one sequence."""

    dtype: str
    states: int
    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    strides: Strides  # of every state's output
    out_strides: Strides
    alignment: int  # bytes (16, 8, 4 or 2) that divide every address of a row of the states and of the result

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


def merge_states(
    outs: Sequence[Array] | Array, lses: Sequence[Array] | Array, *, out: Array | None = None
) -> tuple[Array, Array]:
    """Attention over all keys, from attention over each part of them: n outputs weighted by their log-sum-exp.

    out = sum_i exp(lse_i - lse) outs[i], where lse = log sum_i exp(lses[i]). The parts must be disjoint and seen by the
    same queries. Arithmetic is float32, state after state, so that a repeated call gives the same bits. A state that
    saw no key (lse -inf) has no part, whatever its output holds; where none saw any, the result is 0 and -inf. Source:
    Flash-Decoding (Dao, Haziza, Massa and Sizov 2023), and merge_states of the flashinfer package.

    Args:
        outs: what `attention` and its kin returned: n arrays of shape (batch, seqlen, heads, head_dim) or packed
            (total, heads, head_dim), float16, bfloat16 or float32, or one array with a leading axis of n. head_dim must
            be contiguous, and all have the same strides.
        lses: the same for the lse: float32 (batch, heads, seqlen) or (heads, total), contiguous.
        out: an array of one state's shape and dtype to write into, apart in memory from the states.

    Returns:
        (out, lse): arrays of one state's shapes and dtypes, in the library of the first output.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import attention, merge_states
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 16, 2, 64), np.float32)
    >>> parts = [attention(q, k[:, own], v[:, own], return_lse=True) for own in (slice(0, 7), slice(7, 16))]
    >>> out, lse = merge_states(*zip(*parts))
    >>> bool(np.allclose(out, attention(q, k, v), atol=1e-6))
    True
    """
    sources, weights = _stack(outs, "outs"), _stack(lses, "lses")
    like = sources.views[0]
    target, lse = _merge(sources, weights, optional_view(out, "out"))
    with device_of(like):
        return (deliver(target, like) if out is None else out), deliver(lse, like)


def merge_views(outs: list[View], lses: list[View], target: View | None = None) -> tuple[View, View]:
    """The same of views, each list of one shape, dtype and strides; the results are in the first output's library."""
    return _merge(_as_stack("outs", outs), _as_stack("lses", lses), target)


def _merge(sources: _Stack, weights: _Stack, target: View | None) -> tuple[View, View]:
    like = sources.views[0]
    call = _find(sources, weights, target)
    if target is not None:
        _refuse_overlap(sources, weights, target)
    with device_of(like):
        target = empty(like, sources.one.shape, sources.one.dtype) if target is None else target
        lse = empty(like, weights.one.shape, "float32")
        others = (*sources.views, *weights.views, target, lse)
        in_order(partial(call.run, sources, weights, target, lse), like, others)
        return target, lse


@dataclass(slots=True)
class _Stack:
    """n arrays of one form, or the n that a leading axis of one array makes."""

    name: str
    views: list[View]  # the arrays that came
    pointers: list[int]  # of each of the n
    one: View  # the first of the n; its array is views[0]'s
    stacked: bool

    def name_of(self, i: int) -> str:
        return self.name if self.stacked else f"{self.name}[{i}]"

    def address_bits(self) -> int:
        """The low bits that any of the n has in its address."""
        return reduce(or_, self.pointers) & 15

    def host_arrays(self) -> list[np.ndarray]:
        return list(host_array(self.views[0])) if self.stacked else [host_array(found) for found in self.views]


@dataclass(frozen=True, slots=True)
class _Call:
    merge: Merge
    run: Callable[[_Stack, _Stack, View, View, int], None]


def _stack(arrays: Sequence[Array] | Array, name: str) -> _Stack:
    if not isinstance(arrays, (list, tuple)):
        whole = view(arrays, name)
        if not whole.shape or not whole.shape[0]:
            refuse(name, f"shape {whole.shape}", "a leading axis of at least one state")
        step = whole.strides[0] * numpy_dtype(whole.dtype).itemsize
        one = replace(whole, shape=whole.shape[1:], strides=whole.strides[1:])
        return _Stack(name, [whole], [whole.pointer + i * step for i in range(whole.shape[0])], one, True)
    if not arrays:
        refuse(name, "an empty sequence", "at least one array")
    views = [view(array, f"{name}[{i}]") for i, array in enumerate(arrays)]
    first = views[0]
    for i, found in enumerate(views):
        if found.shape != first.shape:
            refuse(f"{name}[{i}]", f"shape {found.shape}", f"{name}[0]'s shape {first.shape}")
        same_kind(f"{name}[{i}]", found, first, f"{name}[0]")
        if found.strides != first.strides and _strides_used(found) != _strides_used(first):
            refuse(f"{name}[{i}]", f"strides {found.strides}", f"{name}[0]'s strides {first.strides}")
    return _as_stack(name, views)


def _as_stack(name: str, views: list[View]) -> _Stack:
    return _Stack(name, views, [found.pointer for found in views], views[0], False)


def _strides_used(found: View) -> list[int]:
    """Strides without those that nothing ever steps by."""
    return [step for size, step in zip(found.shape, found.strides, strict=True) if size > 1 and 0 not in found.shape]


def _find(outs: _Stack, lses: _Stack, target: View | None) -> _Call:
    """What is prepared for calls of this form, or else prepare it: that is where arguments are refused."""
    key = (
        "merge",
        len(outs.pointers),
        len(lses.pointers),
        signature(outs.one),
        outs.address_bits(),
        signature(lses.one),
        lses.address_bits(),
        None if target is None else (signature(target), target.pointer & 15, target.readonly),
    )
    call = remembered.get(key)
    if call is None:
        call = _prepare(_describe(outs, lses, target), outs.one.device)
        remember(key, call)
    return call


def _describe(outs: _Stack, lses: _Stack, target: View | None) -> Merge:
    one, weight = outs.one, lses.one
    if len(one.shape) not in (3, 4):
        came = f"{len(one.shape)}-D shape {one.shape}"
        refuse(outs.name_of(0), came, "(batch, seqlen, heads, head_dim) or packed (total, heads, head_dim) for a state")
    if not one.shape[-1]:
        refuse(outs.name_of(0), f"shape {one.shape}", "a head_dim of at least 1")
    if one.dtype not in FLOAT_DTYPES:
        refuse(outs.name_of(0), one.dtype, " or ".join(FLOAT_DTYPES), TypeError)
    if len(lses.pointers) != len(outs.pointers):
        refuse("lses", f"{len(lses.pointers)} states", f"as many as outs has, {len(outs.pointers)}")
    packed = len(one.shape) == 3
    *sequences, heads, head_dim = one.shape
    batch, seqlen = (1, *sequences) if packed else sequences
    for stack in (outs, lses):
        itemsize = ITEMSIZE.get(stack.one.dtype, 1)
        for i, pointer in enumerate(stack.pointers):
            if pointer % itemsize and 0 not in stack.one.shape:
                came = f"an address divisible by the {itemsize} bytes of an element; copy it"
                refuse(stack.name_of(i), "a misaligned array", came)
    check_rows(outs.name_of(0), one)
    check_countable("outs", batch * seqlen, "rows in a state")
    check_per_head(lses.name_of(0), weight, one)
    shape = (heads, seqlen) if packed else (batch, heads, seqlen)
    if weight.shape != shape:
        refuse(lses.name_of(0), f"shape {weight.shape}", f"{shape}, as outs' states have shape {one.shape}")
    if target is not None:
        if target.shape != one.shape:
            refuse("out", f"shape {target.shape}", f"a state's shape {one.shape}")
        same_kind("out", target, one, outs.name_of(0))
        check_rows("out", target)
        check_writable("out", target)
    alignment = math.gcd(row_alignment(one), 16 if 0 in one.shape else outs.address_bits())
    result = contiguous_row_alignment(head_dim, one.dtype) if target is None else row_alignment(target)
    return Merge(
        dtype=one.dtype,
        states=len(outs.pointers),
        batch=batch,
        seqlen=seqlen,
        num_heads=heads,
        head_dim=head_dim,
        strides=row_strides(one, packed),
        out_strides=contiguous_row_strides(one.shape, packed) if target is None else row_strides(target, packed),
        alignment=min(alignment, result),
    )


def _prepare(merge: Merge, device: int) -> _Call:
    if not merge.batch * merge.seqlen * merge.num_heads:
        return _Call(merge, _nothing)
    if device < 0:
        return _Call(merge, _merge_on_host)
    from .kernels.merge import PreparedMerge  # these need CuPy
    from .kernels.workspace import keep_if_captured

    prepared = PreparedMerge(merge, device)

    def run(outs: _Stack, lses: _Stack, target: View, lse: View, stream: int) -> None:
        held: list[View] = []  # until all is queued

        def scratch(states: int) -> tuple[list[int], list[int]]:
            pointers = []
            for shape in (target.shape, lse.shape):
                sums = empty(outs.views[0], (states, *shape), "float32")
                held.append(sums)
                pointers.append([sums.pointer + 4 * i * math.prod(shape) for i in range(states)])
            return pointers[0], pointers[1]

        prepared(outs.pointers, lses.pointers, target.pointer, lse.pointer, scratch, stream)
        if held and held[0].library == "cupy":  # PyTorch keeps what was allocated for a graph by itself
            keep_if_captured(held, stream)

    return _Call(merge, run)


def _refuse_overlap(outs: _Stack, lses: _Stack, target: View) -> None:
    for stack in (outs, lses):
        for i, source in enumerate(stack.views):
            if overlap(target, source):
                refuse("out", f"an array whose memory range meets {stack.name_of(i)}'s", "memory of its own")


def _nothing(outs: _Stack, lses: _Stack, target: View, lse: View, stream: int) -> None:
    """The states have no rows."""


def _merge_on_host(outs: _Stack, lses: _Stack, target: View, lse: View, stream: int) -> None:
    """The NumPy backend: one state after the other, as the kernel adds them up."""
    weights = lses.host_arrays()
    merged = host_array(target)
    with np.errstate(all="ignore"):
        top = reduce(np.maximum, weights)
        base = np.where(top == -np.inf, np.float32(0), top)
        total = np.zeros_like(base)
        sums = np.zeros(merged.shape, np.float32)
        for values, weight in zip(outs.host_arrays(), weights, strict=True):
            share = np.exp(weight - base)
            total += share
            seen = _beside_rows(weight != -np.inf)  # 0 times NaN would be NaN
            np.add(sums, _beside_rows(share) * values.astype(np.float32), out=sums, where=seen)
        unseen = total == 0
        total[unseen] = 1
        merged[...] = sums / _beside_rows(total)
        host_array(lse)[...] = np.where(unseen, -np.inf, base + np.log(total))


def _beside_rows(values: np.ndarray) -> np.ndarray:
    """(…, heads, rows) of an lse -> (…, rows, heads, 1), to go with outputs."""
    return values.swapaxes(-1, -2)[..., None]
