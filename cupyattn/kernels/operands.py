"""The arrays of one call, by role: what a backend takes beside a `Problem` or an `Append`."""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import View


@dataclass(slots=True)
class Operands:
    """Views of everything that attention reads and writes. Optional roles are None when the call has none.

    seqused_k also carries cache_seqlens: the length before this call's append, to which the backend adds
    `Problem.seqlen_new`. One length for all sequences is uniform_length instead, and passed by value.
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
    k_new: View | None = None
    v_new: View | None = None
    rotary_cos: View | None = None
    rotary_sin: View | None = None
    k_scale: View | None = None
    v_scale: View | None = None
    uniform_length: int | None = None

    def appending(self) -> AppendOperands:
        """The operands of this call's append alone."""
        return AppendOperands(
            self.k,
            self.v,
            self.k_new,
            self.v_new,
            cache_seqlens=self.seqused_k,
            block_table=self.block_table,
            cache_batch_idx=self.cache_batch_idx,
            rotary_cos=self.rotary_cos,
            rotary_sin=self.rotary_sin,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            uniform_length=self.uniform_length,
        )


@dataclass(slots=True)
class AppendOperands:
    """Views of everything that an append reads and writes. Without lengths all caches are empty."""

    k_cache: View
    v_cache: View
    k: View
    v: View
    cu_seqlens_new: View | None = None
    cache_seqlens: View | None = None
    block_table: View | None = None
    cache_batch_idx: View | None = None
    rotary_cos: View | None = None
    rotary_sin: View | None = None
    k_scale: View | None = None
    v_scale: View | None = None
    uniform_length: int | None = None
