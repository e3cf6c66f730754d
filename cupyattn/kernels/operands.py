"""The arrays of one call, by role: what a backend takes beside a `Problem` or an `Append`."""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import View


@dataclass(slots=True)
class Operands:
    """Views of everything that attention reads and writes. Optional roles are None when the call has none.

    seqused_k also carries cache_seqlens: the length before this call's append, to which the backend adds
    `Problem.seqlen_new`.
    """

    q: View
    k: View
    v: View
    out: View
    lse: View | None = None
    cu_seqlens_q: View | None = None
    cu_seqlens_k: View | None = None
    seqused_k: View | None = None
    block_table: View | None = None
    cache_batch_idx: View | None = None
    cache_leftpad: View | None = None
    alibi_slopes: View | None = None
    sinks: View | None = None


@dataclass(slots=True)
class AppendOperands:
    """Views of everything that an append reads and writes. cache_seqlens None means that all caches are empty."""

    k_cache: View
    v_cache: View
    k: View
    v: View
    cu_seqlens_new: View | None = None
    cache_seqlens: View | None = None
    block_table: View | None = None
    cache_batch_idx: View | None = None
