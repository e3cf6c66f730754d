"""The bytes of `ForwardParams` (kernels_cu/common/params.cuh): the same fields in the same order."""

from __future__ import annotations

import struct

from ..plan import COUNTER_BYTES, Plan
from ..problem import Append, Problem
from .operands import AppendOperands, Operands

POINTERS = struct.Struct("<13Qq")
SCALARS = struct.Struct("<13q13i4f2i4x")


def scalars(problem: Problem, plan: Plan) -> bytes:
    """Everything in the argument that does not change from call to call."""
    cache = problem.cache
    return SCALARS.pack(
        *problem.q_strides,
        *cache.k_strides,
        *cache.v_strides,
        *problem.o_strides,
        problem.num_heads if problem.alibi == "batch_heads" else 0,
        problem.batch,
        problem.num_heads,
        problem.num_kv_heads,
        problem.total_q if problem.packed_q else 0,
        problem.seqlen_q,
        problem.seqlen_new,
        cache.entries,
        cache.rows,
        cache.table_stride,
        *plan.window,
        plan.tiles_per_sequence,
        plan.pairs_per_section,
        problem.softmax_scale,
        problem.softcap,
        *problem.lse_form,
        plan.kv_splits,
        plan.total_tiles,
    )


def pack(operands: Operands, tail: bytes) -> bytes:
    """The kernel argument: this call's addresses before the prepared scalars."""
    o = operands
    head = POINTERS.pack(
        o.q.pointer,
        o.k.pointer,
        o.v.pointer,
        o.out.pointer,
        o.lse.pointer if o.lse is not None else 0,
        o.cu_seqlens_q.pointer if o.cu_seqlens_q is not None else 0,
        o.cu_seqlens_k.pointer if o.cu_seqlens_k is not None else 0,
        o.seqused_k.pointer if o.seqused_k is not None else 0,
        o.block_table.pointer if o.block_table is not None else 0,
        o.cache_batch_idx.pointer if o.cache_batch_idx is not None else 0,
        o.cache_leftpad.pointer if o.cache_leftpad is not None else 0,
        o.alibi_slopes.pointer if o.alibi_slopes is not None else 0,
        o.sinks.pointer if o.sinks is not None else 0,
        -1 if o.uniform_length is None else o.uniform_length,
    )
    return head + tail


MOST_SPLITS = 1 << 24  # more pieces are never made; the kernel adds a sequence's tiles to this in 32 bits
DECODE_POINTERS = struct.Struct("<8Q")
DECODE_SCALARS = struct.Struct("<6q2f5i4x")


def decode_scalars(problem: Problem, plan: Plan) -> bytes:
    """What `DecodeParams` (kernels_cu/common/decode_params.cuh) has behind its pointers."""
    new = problem.append
    rotary = problem.rotary
    return DECODE_SCALARS.pack(
        *(new.k_strides if new is not None else (0, 0, 0)),
        *(new.v_strides if new is not None else (0, 0, 0)),
        problem.k_scale,
        problem.v_scale,
        int(problem.k_scales == "heads"),
        int(problem.v_scales == "heads"),
        rotary.positions if rotary is not None else 0,
        int(rotary is not None and rotary.per_query),
        min(problem.num_splits, MOST_SPLITS),
    )


def pack_decode(operands: Operands, tail: bytes, decode_tail: bytes, workspace: int) -> bytes:
    """The decode kernel's argument: a forward kernel's, then its own pointers and scalars."""
    o = operands
    head = DECODE_POINTERS.pack(
        o.k_new.pointer if o.k_new is not None else 0,
        o.v_new.pointer if o.v_new is not None else 0,
        o.rotary_cos.pointer if o.rotary_cos is not None else 0,
        o.rotary_sin.pointer if o.rotary_sin is not None else 0,
        o.k_scale.pointer if o.k_scale is not None else 0,
        o.v_scale.pointer if o.v_scale is not None else 0,
        workspace + COUNTER_BYTES,
        workspace,
    )
    return pack(operands, tail) + head + decode_tail


APPEND_POINTERS = struct.Struct("<12Qq")
APPEND_SCALARS = struct.Struct("<12q10i2f")


def append_scalars(append: Append) -> bytes:
    """The same for `AppendParams` (kernels_cu/common/append_params.cuh)."""
    cache = append.cache
    return APPEND_SCALARS.pack(
        *append.k_strides,
        *append.v_strides,
        *cache.k_strides,
        *cache.v_strides,
        append.batch,
        append.total_new,
        append.seqlen_new,
        append.num_kv_heads,
        cache.entries,
        cache.rows,
        cache.table_stride,
        append.rotary.positions if append.rotary is not None else 0,
        int(append.k_scales == "heads"),
        int(append.v_scales == "heads"),
        append.k_scale,
        append.v_scale,
    )


def pack_append(operands: AppendOperands, tail: bytes) -> bytes:
    """The kernel argument of an append."""
    o = operands
    head = APPEND_POINTERS.pack(
        o.k.pointer,
        o.v.pointer,
        o.k_cache.pointer,
        o.v_cache.pointer,
        o.cu_seqlens_new.pointer if o.cu_seqlens_new is not None else 0,
        o.cache_seqlens.pointer if o.cache_seqlens is not None else 0,
        o.block_table.pointer if o.block_table is not None else 0,
        o.cache_batch_idx.pointer if o.cache_batch_idx is not None else 0,
        o.rotary_cos.pointer if o.rotary_cos is not None else 0,
        o.rotary_sin.pointer if o.rotary_sin is not None else 0,
        o.k_scale.pointer if o.k_scale is not None else 0,
        o.v_scale.pointer if o.v_scale is not None else 0,
        o.uniform_length or 0,
    )
    return head + tail
