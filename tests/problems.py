"""Problems of a serving engine's size, for tests that plan and compile without arrays."""

import dataclasses

from cupyattn.problem import Cache, Problem

NO_STRIDES = (0, 0, 0)
FULL, CAUSAL = (-1, -1), (-1, 0)


def make_problem(head_dim: int, kind: str = "dense", **changes) -> Problem:
    """A problem of a serving engine's size: 64 sequences of 4096 tokens, 32 query heads over 8."""
    paged = kind == "paged"
    cache = Cache(
        kind, 1024, 4096, 16 if paged else 0, 256 if paged else 0, 256 if paged else 0, NO_STRIDES, NO_STRIDES
    )
    problem = Problem(
        dtype="float16",
        kv_dtype="float16",
        batch=64,
        num_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        head_dim_v=head_dim,
        packed_q=kind != "dense",
        total_q=64 * 4096,
        seqlen_q=4096,
        seqlen_k=4096,
        seqlen_new=0,
        cache=cache,
        q_strides=NO_STRIDES,
        o_strides=NO_STRIDES,
        window=CAUSAL,
        softmax_scale=0.125,
        softcap=0.0,
        alibi="",
        sinks=False,
        lse=False,
        cu_seqlens_k=kind == "packed",
        seqused_k=paged,
        cache_batch_idx=False,
        leftpad=False,
        alignment=16,
        out_alignment=16,
        k_scale=1.0,
        k_scales="",
        v_scale=1.0,
        v_scales="",
        num_splits=0,
        rotary=None,
        append=None,
    )
    return dataclasses.replace(problem, **changes)


def make_step(
    head_dim: int, *, batch: int = 64, seqlen_q: int = 1, group: int = 4, rows: int = 4096, **changes
) -> Problem:
    """A decoder's step over a paged cache: `group` query heads to each of 8 kv heads."""
    dtype = changes.get("dtype", "float16")
    options = {"kv_dtype": dtype, "window": CAUSAL} | changes
    step = make_problem(
        head_dim, "paged", packed_q=False, batch=batch, seqlen_q=seqlen_q, total_q=batch * seqlen_q,
        num_heads=8 * group, num_kv_heads=8, **options,
    )  # fmt: skip
    return dataclasses.replace(step, cache=dataclasses.replace(step.cache, rows=rows))
