"""forward_sm90 where a block takes many tiles one after the other, on a GPU: fresh data, poisoned outputs, repeats.

The results of a few (sequence, head) pairs are compared with the oracle, all of them must be finite.
"""

import numpy as np
import oracle
import pytest
from oracle import cumulative, normal

pytestmark = [pytest.mark.gpu, pytest.mark.backends("cuda-sm90")]

# (batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, options): more tiles than multiprocessors in all of them.
FORMS = {
    "full": (9, 400, 520, 16, 4, 128, {}),
    "causal": (9, 700, 700, 16, 16, 128, {"causal": True}),
    "causal, few keys": (7, 650, 500, 24, 8, 128, {"causal": True}),
    "window": (8, 900, 900, 12, 12, 64, {"window": (130, 40)}),
    "three warpgroups": (6, 512, 512, 40, 8, 64, {"causal": True}),
    "one column of Q": (6, 600, 600, 8, 8, 256, {"causal": True}),
    "short queries": (40, 20, 300, 20, 4, 128, {"causal": True}),
    "soft cap": (9, 300, 300, 16, 16, 96, {"causal": True, "softcap": 3.0}),
}


def check_pairs(rng, q, k, v, out, lse, dtype, options):
    """Six (sequence, head) pairs against the oracle; nothing anywhere that no kernel has written."""
    batch, _, heads, _ = q.shape
    group = heads // k.shape[2]
    assert not np.isnan(out.astype(np.float32)).any() and not np.isnan(lse).any()
    for _ in range(6):
        b, h = int(rng.integers(batch)), int(rng.integers(heads))
        one = [x[b : b + 1, :, i : i + 1] for x, i in ((q, h), (k, h // group), (v, h // group))]
        oracle.attention(*one, **options).check(out[b : b + 1, :, h : h + 1], lse[b : b + 1, h : h + 1], dtype)


@pytest.mark.parametrize("seed", range(20))
def test_many_tiles(backend, rng, seed):
    """Every form twice or more among the seeds, in float16 and bfloat16."""
    name = list(FORMS)[seed % len(FORMS)]
    batch, seqlen_q, seqlen_k, heads, kv_heads, head_dim, options = FORMS[name]
    dtype = ("float16", "bfloat16")[seed // len(FORMS) % 2]
    q = normal(rng, (batch, seqlen_q, heads, head_dim), dtype)
    k, v = normal(rng, (2, batch, seqlen_k, kv_heads, head_dim), dtype)
    check_pairs(rng, q, k, v, *backend.call("attention", q, k, v, **options), dtype, options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_maxima_that_rise_and_fall(backend, rng, head_dim):
    """Keys whose scores grow by more than the room of a guess from tile to tile, for some rows and not for others; a
    first tile of scores far below or above all others; rows of zeros."""
    batch, seqlen, heads = 4, 640, 8
    q = normal(rng, (batch, seqlen, heads, head_dim), "bfloat16")
    k, v = normal(rng, (2, batch, seqlen, heads, head_dim), "bfloat16")
    growth = np.ones(seqlen)
    growth[:] = np.repeat(2.0 ** rng.integers(-3, 6, seqlen // 64), 64)
    k = (k.astype(np.float32) * growth[None, :, None, None]).astype(k.dtype)
    q[:, ::7] = 0
    options = {"causal": True}
    check_pairs(rng, q, k, v, *backend.call("attention", q, k, v, **options), "bfloat16", options)


def test_packed_sequences_of_all_lengths(backend, rng):
    lengths = [0, 1, 700, 63, 64, 65, 127, 128, 129, 0, 1500, 2, 300, 500]
    heads, kv_heads, head_dim = 16, 4, 128
    q = normal(rng, (sum(lengths), heads, head_dim), "float16")
    k, v = normal(rng, (2, sum(lengths), kv_heads, head_dim), "float16")
    backend.agrees("attention_varlen", q, k, v, cumulative(lengths), cumulative(lengths), causal=True)


def _call(backend, function, *arrays, **options):
    import cupyattn

    here = [backend.put(array) for array in arrays]
    there = {name: backend.put(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    return lambda: getattr(cupyattn, function)(*here, **there, return_lse=True, kernel=backend.kernel)


def repeats(backend, rng):
    """Calls of every kind by name."""
    q, k, v = (normal(rng, (6, 520, 16, 128), "bfloat16") for _ in range(3))
    lengths = cumulative([500, 20, 1, 900, 333])
    packed = [normal(rng, (int(lengths[-1]), 16, 64), "float16") for _ in range(3)]
    few = normal(rng, (1, 40, 4, 128), "float16")
    cache = normal(rng, (2, 640, 16, 2, 128), "float16")
    table = rng.permutation(640).astype(np.int32)[None]
    paged = {"block_table": table, "cache_seqlens": np.array([10_200], np.int32), "causal": True}
    return {
        "dense": _call(backend, "attention", q, k, v, causal=True),
        "packed": _call(backend, "attention_varlen", *packed, lengths, lengths, causal=True),
        "split keys": _call(backend, "attention_with_kvcache", few, *cache, **paged),
    }


@pytest.mark.parametrize("kind", ["dense", "packed", "split keys"])
def test_a_hundred_repeats_are_identical(backend, rng, kind):
    call = repeats(backend, rng)[kind]
    first = [backend.get(array).tobytes() for array in call()]
    for _ in range(99):
        assert [backend.get(array).tobytes() for array in call()] == first


def test_what_others_leave_in_shared_memory_changes_no_bit(backend, rng):
    """Groups of 3 heads leave a row of each product unused, which still takes part in what a warp decides together."""
    q, k, v = (normal(rng, (8, n, heads, 128), "bfloat16") for n, heads in ((20, 24), (700, 8), (700, 8)))
    call = _call(backend, "attention", q, k, v, causal=True)
    first = [backend.get(array).tobytes() for array in call()]
    for number in (np.nan, np.inf, 1e4):
        filled = [np.full((8, 700, 16, 128), number, q.dtype) for _ in range(3)]
        _call(backend, "attention", *filled)()
        assert [backend.get(array).tobytes() for array in call()] == first


def test_broadcast_queries(backend, rng):
    """One set of queries for all sequences and all heads, without a copy."""
    q = normal(rng, (1, 300, 1, 64), "float16")
    k, v = normal(rng, (2, 3, 300, 4, 64), "float16")
    backend.agrees("attention", backend.place(q, lambda x: _broadcast(x, (3, 300, 4, 64))), k, v, causal=True)


def _broadcast(array, shape):
    strides = [0 if size == 1 else step for size, step in zip(array.shape, array.strides, strict=True)]
    tricks = __import__(type(array).__module__.partition(".")[0]).lib.stride_tricks
    return tricks.as_strided(array, shape, strides)
