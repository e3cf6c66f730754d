"""Rotary position embedding of queries and keys, in place or not.

Source: RoFormer (Su et al. 2021, arXiv:2104.09864). Arguments follow apply_rotary_emb of the flash_attn package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .arrays import View, deliver, empty, host_array, overlap, refuse, view
from .attention import Array, checking, lengths, optional_view, remember, remembered, signature
from .problem import (
    FLOAT_DTYPES,
    Rotation,
    check_countable,
    check_cumulative,
    check_index_array,
    check_rank,
    check_rows,
    check_writable,
    contiguous_row_alignment,
    contiguous_row_strides,
    describe_rotary,
    first_true,
    row_alignment,
    row_strides,
    same_kind,
)
from .streams import device_of, in_order


def apply_rotary(
    x: Array,
    cos: Array,
    sin: Array,
    *,
    offsets: Array | int = 0,
    interleaved: bool = True,
    cu_seqlens: Array | None = None,
    out: Array | None = None,
    check: bool | None = None,
) -> Array:
    """Rotate queries or keys by their positions: pairs (a, b) become (a cos - b sin, a sin + b cos).

    Row i of sequence b is at position offsets[b] + i, for which the tables' row of that number is taken. The first
    2 * columns elements of every head are rotated, the others stay as they are. Arithmetic is float32, the result
    rounded to x's dtype. Arrays may be of any library and have any strides, as in `attention`. Source: RoFormer
    (arXiv:2104.09864), with the arguments of flash_attn's apply_rotary_emb.

    Args:
        x: (batch, seqlen, heads, head_dim), or with cu_seqlens packed (total, heads, head_dim); float16, bfloat16 or
            float32. head_dim must be contiguous.
        cos, sin: (positions, rotary_dim / 2), of x's dtype or float32, contiguous.
        offsets: the position of each sequence's first row: int32 (batch,), or an int for all.
        interleaved: pair elements (0, 1), (2, 3), …; if False elements i and i + rotary_dim / 2.
        cu_seqlens: int32 (batch + 1,), starting at 0: rows cu_seqlens[b] to cu_seqlens[b + 1] of x are sequence b. Rows
            behind the last sequence are not rotated.
        out: an array of x's shape and dtype to write into: x itself, to rotate in place, or one apart from it.
        check: read and check offsets and cu_seqlens. On the CPU this always happens; on CUDA it waits for the device,
            and None means the environment variable CUPYATTN_CHECK (1: check). Unchecked, rows at positions that the
            tables do not have become NaN.

    Returns:
        An array of x's shape and dtype in x's library, `out` itself if given.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import apply_rotary
    >>> angles = np.outer(np.arange(32), 10000.0 ** -(np.arange(32) / 32)).astype(np.float32)
    >>> q = np.ones((1, 3, 8, 64), np.float32)
    >>> rotated = apply_rotary(q, np.cos(angles), np.sin(angles), offsets=5)
    >>> rotated.shape, bool(np.allclose(rotated[0, 2, 0, 0], np.cos(7.0) - np.sin(7.0)))
    ((1, 3, 8, 64), True)
    """
    source = view(x, "x")
    target = source if out is x else optional_view(out, "out")
    operands = _Operands(source, target, view(cos, "cos"), view(sin, "sin"), *lengths("offsets", offsets))
    operands.cu_seqlens = optional_view(cu_seqlens, "cu_seqlens")
    call = _find(operands, interleaved)
    if target is not None:
        _refuse_overlap(operands)
    if operands.offsets is None:
        _check_offset(call.rotation, operands.uniform_offset)
    if checking(check, source.device):
        _check_contents(call.rotation, operands)
    with device_of(source):
        if operands.out is None:
            operands.out = empty(source, source.shape, source.dtype)
        others = operands.out, operands.cos, operands.sin, operands.offsets, operands.cu_seqlens
        in_order(partial(call.run, operands), source, others)
        return deliver(operands.out, source) if out is None else out


@dataclass(slots=True)
class _Operands:
    x: View
    out: View | None
    cos: View
    sin: View
    offsets: View | None
    uniform_offset: int | None
    cu_seqlens: View | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    rotation: Rotation
    run: Callable[[_Operands, int], None]


def _find(operands: _Operands, interleaved: bool) -> _Call:
    """What is prepared for calls of this form, or else prepare it: that is where arguments are refused."""
    x, out = operands.x, operands.out
    optional = operands.offsets, operands.cu_seqlens
    key = (
        "rotary",
        signature(x),
        x.pointer & 15,
        None if out is None else (signature(out), out.pointer & 15, out.readonly),
        signature(operands.cos),
        signature(operands.sin),
        tuple([None if found is None else signature(found) for found in optional]),
        interleaved,
        type(interleaved),
    )
    try:
        call = remembered.get(key)
    except TypeError:  # refused below
        call = None
    if call is None:
        call = _prepare(operands, interleaved)
        remember(key, call)
    return call


def _prepare(operands: _Operands, interleaved: bool) -> _Call:
    rotation = _describe(operands, interleaved)
    if not rotation.total or not rotation.num_heads:
        return _Call(rotation, _nothing)
    if operands.x.device < 0:
        return _Call(rotation, partial(_rotate_on_host, rotation))
    from .kernels.rotary import prepare_rotary  # needs CuPy

    prepared = prepare_rotary(rotation, operands.x.device)

    def run(o: _Operands, stream: int) -> None:
        prepared(o.x, o.out, o.cos, o.sin, o.offsets, o.uniform_offset or 0, o.cu_seqlens, stream)

    return _Call(rotation, run)


def _describe(operands: _Operands, interleaved: bool) -> Rotation:
    x, out, offsets, cu_seqlens = operands.x, operands.out, operands.offsets, operands.cu_seqlens
    packed = cu_seqlens is not None
    if packed:
        check_rank("x", x, 3, "(total, heads, head_dim), as cu_seqlens is given")
    else:
        hint = ", or cu_seqlens for packed rows" if len(x.shape) == 3 else ""
        check_rank("x", x, 4, f"(batch, seqlen, heads, head_dim){hint}")
    if x.dtype not in FLOAT_DTYPES:
        refuse("x", x.dtype, " or ".join(FLOAT_DTYPES), TypeError)
    check_rows("x", x)
    if packed:
        check_index_array("cu_seqlens", cu_seqlens, x, ndim=1)
        if cu_seqlens.shape[0] < 1:
            refuse("cu_seqlens", "an empty array", "batch + 1 entries, the first of them 0")
        batch, total = cu_seqlens.shape[0] - 1, x.shape[0]
        seqlen = total
    else:
        batch, seqlen = x.shape[:2]
        total = batch * seqlen
    check_countable("x", total, "rows in all")
    if offsets is not None:
        check_index_array("offsets", offsets, x, shape=(batch,))
    rotary = describe_rotary(operands.cos, operands.sin, interleaved, x, per_query=True, prefix="")
    if out is not None:
        if out.shape != x.shape:
            refuse("out", f"shape {out.shape}", f"x's shape {x.shape}")
        same_kind("out", out, x, "x")
        check_rows("out", out)
        check_writable("out", out)
    return Rotation(
        dtype=x.dtype,
        batch=batch,
        total=total,
        seqlen=seqlen,
        num_heads=x.shape[-2],
        head_dim=x.shape[-1],
        packed=packed,
        x_strides=row_strides(x, packed),
        out_strides=row_strides(out, packed) if out is not None else contiguous_row_strides(x.shape, packed),
        alignment=row_alignment(x, out)
        if out is not None
        else min(row_alignment(x), contiguous_row_alignment(x.shape[-1], x.dtype)),
        rotary=rotary,
    )


def _refuse_overlap(operands: _Operands) -> None:
    """Refuse an out that meets an input, unless it is x itself."""
    x, out = operands.x, operands.out
    inputs = [("cos", operands.cos), ("sin", operands.sin)]
    if (out.pointer, out.strides) != (x.pointer, x.strides):
        inputs.append(("x", x))
    for name, source in inputs:
        if overlap(out, source):
            in_place = ", or x itself" if name == "x" else ""
            refuse("out", f"an array whose memory range meets {name}'s", f"memory of its own{in_place}")


def _check_offset(rotation: Rotation, offset: int) -> None:
    """An int is known here, whatever the device."""
    if offset < 0:
        refuse("offsets", offset, "a position of at least 0")
    rows = 0 if rotation.packed else rotation.seqlen
    if offset + rows > rotation.rotary.positions:
        came = f"{offset} for {rows} rows" if rows else offset
        refuse("offsets", came, f"positions within the {rotation.rotary.positions} that cos and sin have")


def _check_contents(rotation: Rotation, operands: _Operands) -> None:
    if operands.cu_seqlens is not None:
        ends = host_array(operands.cu_seqlens).astype(np.int64)
        check_cumulative("cu_seqlens", ends, rotation.total, "x's rows")
        rows = np.diff(ends)
    else:
        rows = np.full(rotation.batch, rotation.seqlen, np.int64)
    first = np.full(rotation.batch, operands.uniform_offset, np.int64) if operands.offsets is None else None
    first = host_array(operands.offsets).astype(np.int64) if first is None else first
    if (bad := first_true(first < 0)) is not None:
        refuse("offsets", f"{int(first[bad])} for sequence {bad}", "a position of at least 0")
    positions = rotation.rotary.positions
    if (bad := first_true((first + rows > positions) & (rows > 0))) is not None:
        came = f"{int(first[bad])} for the {int(rows[bad])} rows of sequence {bad}"
        refuse("offsets", came, f"positions within the {positions} that cos and sin have")


def _nothing(operands: _Operands, stream: int) -> None:
    """There are no rows."""


def _rotate_on_host(rotation: Rotation, operands: _Operands, stream: int) -> None:
    """The NumPy backend, sequence after sequence."""
    from .reference import RotaryTables, rotate

    x, out = host_array(operands.x), host_array(operands.out)
    tables = RotaryTables(rotation.rotary, host_array(operands.cos), host_array(operands.sin))
    offsets = None if operands.offsets is None else host_array(operands.offsets)
    ends = None if operands.cu_seqlens is None else host_array(operands.cu_seqlens)
    with np.errstate(all="ignore"):
        for b in range(rotation.batch):
            own = b if ends is None else slice(ends[b], ends[b + 1])
            rows = x[own]
            start = operands.uniform_offset if offsets is None else int(offsets[b])
            out[own] = rotate(rows, tables, np.arange(start, start + len(rows)), np.dtype(np.float32))
    if ends is not None:
        out[ends[-1] :] = x[ends[-1] :]
