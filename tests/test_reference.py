"""The NumPy backend beside what both backends share: its blocks, its precision, its memory, and sums done by hand.

That its results are right is tested in test_forward.py and test_append.py, against the oracle.
"""

from __future__ import annotations

import math
import time
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import cumulative, dense_cache, normal, paged_cache

from cupyattn import append_kv, attention, attention_varlen, attention_with_kvcache, reference
from cupyattn.arrays import view
from cupyattn.kernels.operands import AppendOperands, Operands
from cupyattn.problem import describe, describe_append

MASKS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (9, 4)},
    "everything": {
        "window": (20, 3),
        "softcap": 2.5,
        "softmax_scale": -0.3,
        "alibi_slopes": np.array([0.1, 0.2, -0.1, 0.3], np.float32),
        "sinks": np.array([0.0, 1.0, -3.0, 4.0], np.float32),
    },
}


def dense(rng, dtype="float32", *, batch=2, seqlen_q=50, seqlen_k=90, heads=4, kv_heads=2, head_dim=16):
    q = normal(rng, (batch, seqlen_q, heads, head_dim), dtype)
    k, v = normal(rng, (2, batch, seqlen_k, kv_heads, head_dim), dtype)
    return q, k, v


# ------------------------------------------------------------------------------------------------ done by hand


def one_head(*rows):
    """(1, rows, 1, head_dim) float32."""
    return np.array(rows, np.float32)[None, :, None, :]


def test_equal_keys_give_the_mean_of_the_values():
    out, lse = attention(one_head([5, 5]), one_head([1, 0], [1, 0]), one_head([1, 2], [3, 6]), return_lse=True)
    np.testing.assert_allclose(out[0, 0, 0], [2, 4], rtol=1e-6)
    np.testing.assert_allclose(lse, 5 / math.sqrt(2) + math.log(2), rtol=1e-6)


def test_weights_are_exponentials_of_scaled_scores():
    """Scores log 3 and 0: weights 3/4 and 1/4."""
    q, k, v = one_head([math.log(3)]), one_head([1], [0]), one_head([4], [8])
    out, lse = attention(q, k, v, softmax_scale=1.0, return_lse=True)
    np.testing.assert_allclose([out.item(), lse.item()], [5, math.log(4)], rtol=1e-6)


def test_softcap_comes_after_the_scale_and_before_the_bias():
    """Score 2 * tanh(0.5 * 8 / 2) - 0.25 * 1 for the key one to the left, 0 for the query's own."""
    q, k, v = one_head([8]), one_head([1], [0]), one_head([1], [0])
    out = attention(q, k, v, softmax_scale=0.5, softcap=2.0, alibi_slopes=np.array([0.25], np.float32))
    score = 2 * math.tanh(2) - 0.25
    np.testing.assert_allclose(out.item(), 1 / (1 + math.exp(-score)), rtol=1e-6)


def test_sink_takes_its_share_and_gives_nothing():
    """Scores 0 and 0 and a sink of log 2: a quarter, a quarter and a half."""
    sink = np.array([math.log(2)], np.float32)
    out, lse = attention(one_head([0]), one_head([1], [2]), one_head([4], [8]), sinks=sink, return_lse=True)
    np.testing.assert_allclose([out.item(), lse.item()], [3, math.log(4)], rtol=1e-6)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "masks", "picture"),
    [
        (3, 3, {"causal": True}, ["x..", "xx.", "xxx"]),
        (2, 4, {"causal": True}, ["xxx.", "xxxx"]),
        (4, 2, {"causal": True}, ["..", "..", "x.", "xx"]),
        (3, 5, {"window": (1, 0)}, [".xx..", "..xx.", "...xx"]),
        (3, 3, {"window": (0, 1)}, ["xx.", ".xx", "..x"]),
        (3, 3, {"window": (-1, 1)}, ["xx.", "xxx", "xxx"]),
        (3, 3, {"window": (1, -1)}, ["xxx", "xxx", ".xx"]),
        (3, 3, {"window": (1, 1), "causal": True}, ["x..", "xx.", ".xx"]),
        (4, 2, {"window": (0, 0)}, ["..", "..", "x.", ".x"]),
    ],
    ids=str,
)
def test_masks_align_to_the_bottom_right(seqlen_q, seqlen_k, masks, picture):
    """With scores of 0 and the identity as values, row i of the output is nonzero where query i sees a key."""
    q, k = np.zeros((1, seqlen_q, 1, seqlen_k), np.float32), np.ones((1, seqlen_k, 1, seqlen_k), np.float32)
    v = np.eye(seqlen_k, dtype=np.float32)[None, :, None, :]
    out, lse = attention(q, k, v, return_lse=True, **masks)
    assert ["".join("x" if weight else "." for weight in row) for row in out[0, :, 0]] == picture
    seen = [row.count("x") for row in picture]
    np.testing.assert_allclose(lse[0, 0], [math.log(n) if n else -math.inf for n in seen], rtol=1e-6)
    np.testing.assert_allclose(out.sum(axis=-1)[0, :, 0], [float(n > 0) for n in seen], rtol=1e-6)


def test_query_heads_share_keys_in_consecutive_groups():
    q = np.zeros((1, 1, 6, 1), np.float32)
    v = np.array([10, 20], np.float32).reshape(1, 1, 2, 1)
    assert attention(q, np.zeros_like(v), v).ravel().tolist() == [10, 10, 10, 20, 20, 20]


# ------------------------------------------------------------------------------------------- blocks and precision


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("keys", [1, 7, 90, 1000])
def test_any_block_size_gives_the_same(monkeypatch, rng, keys, masks):
    """Rows go in blocks of at least 16, so that SCORES = 1 cuts 50 queries into four."""
    monkeypatch.setattr(reference, "KEYS", keys)
    monkeypatch.setattr(reference, "SCORES", 1)
    for seqlen_k in (90, 5, 0):
        q, k, v = dense(rng, seqlen_k=seqlen_k)
        out, lse = attention(q, k, v, return_lse=True, **MASKS[masks])
        oracle.attention(q, k, v, **MASKS[masks]).check(out, lse, "float32")


@pytest.mark.parametrize("keys", [4, 16])
def test_blocks_of_keys_cross_those_of_a_paged_cache(monkeypatch, rng, keys):
    monkeypatch.setattr(reference, "KEYS", keys)
    lengths = [0, 3, 40, 61]
    pairs = [tuple(normal(rng, (2, length, 2, 16), "float16")) for length in lengths]
    cache, table = paged_cache(rng, pairs, 7)
    q = normal(rng, (4, 5, 4, 16), "float16")
    masks = MASKS["everything"] | {"cache_seqlens": np.array(lengths, np.int32), "block_table": table}
    out, lse = attention_with_kvcache(q, cache[:, 0], cache[:, 1], return_lse=True, **masks)
    oracle.attention_with_kvcache(q, cache[:, 0], cache[:, 1], **masks).check(out, lse, "float16")


@given(
    left=st.integers(-1, 12),
    right=st.integers(-1, 12),
    start=st.integers(-20, 20),
    rows=st.integers(1, 20),
    seqlen_k=st.integers(0, 20),
)
def test_visible_keys_are_the_span_of_those_that_some_query_sees(left, right, start, rows, seqlen_k):
    def sees(position, key):
        return (left < 0 or key >= position - left) and (right < 0 or key <= position + right)

    positions = range(start, start + rows)
    seen = [key for key in range(seqlen_k) if any(sees(position, key) for position in positions)]
    assert list(range(*reference._visible_keys((left, right), start, start + rows, seqlen_k))) == seen


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_float64(rng, dtype, masks):
    q, k, v = dense(rng, dtype)
    out, lse = attention(q, k, v, return_lse=True, kernel="numpy_float64", **MASKS[masks])
    expected = oracle.attention(q, k, v, **MASKS[masks])
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, expected.out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, expected.lse, rtol=1e-6 if lse.dtype == np.float32 else 1e-13)


def test_float64_of_packed_sequences(rng):
    q = normal(rng, (30, 4, 16), "float16")
    k, v = normal(rng, (2, 50, 2, 16), "float16")
    ends = cumulative([10, 0, 17]), cumulative([20, 5, 25])
    out = attention_varlen(q, k, v, *ends, kernel="numpy_float64")
    np.testing.assert_allclose(out, oracle.attention_varlen(q, k, v, *ends).out, rtol=0, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn", "float8_e5m2"])
def test_float64_of_a_step(rng, kv_dtype, interleaved, causal):
    """Queries are rotated and not rounded; keys are what the cache holds, rounded to their dtype and to the cache's."""
    q = normal(rng, (2, 3, 4, 16), "float16")
    k, v = normal(rng, (2, 2, 3, 2, 16), "float16")
    caches = normal(rng, (2, 2, 20, 2, 16), "float16")
    options = {"k": k, "v": v, "cache_seqlens": np.array([4, 17], np.int32), "rotary_interleaved": interleaved}
    angles = rng.uniform(0, 7, (20, 5))
    options |= {"rotary_cos": np.cos(angles).astype(np.float16), "rotary_sin": np.sin(angles).astype(np.float16)}
    if kv_dtype is not None:
        caches = oracle.to_fp8(caches, kv_dtype)
        scales = {"k_scale": 1 / 3, "v_scale": np.array([0.3, 1.7], np.float32)}
        options |= {"kv_dtype": kv_dtype} | scales
    ends = oracle.append_range(*caches, **options)
    out, lse = attention_with_kvcache(q, *caches, **options, causal=causal, kernel="numpy_float64", return_lse=True)
    oracle.check_caches(caches, *ends, kv_dtype)
    turned = np.array([rotated_by_hand(q[b], angles, interleaved, options, b, causal) for b in range(2)])
    plain = {"cache_seqlens": np.array([7, 20], np.int32), "causal": causal}
    if kv_dtype is not None:
        plain |= {"kv_dtype": kv_dtype} | scales
    expected = oracle.attention_with_kvcache(turned, *caches, **plain)
    np.testing.assert_allclose(out, expected.out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse, expected.lse, rtol=1e-12)


def rotated_by_hand(q, angles, interleaved, options, b, causal):
    """Complex numbers turned: the first ten elements of each head as five of them."""
    turned = q.astype(np.float64)
    for i in range(len(q)):
        position = options["cache_seqlens"][b] + (i if causal else 0)
        first, second = (slice(0, 10, 2), slice(1, 10, 2)) if interleaved else (slice(0, 5), slice(5, 10))
        number = turned[i, :, first] + 1j * turned[i, :, second]
        by = options["rotary_cos"][position].astype(float) + 1j * options["rotary_sin"][position].astype(float)
        turned[i, :, first], turned[i, :, second] = (number * by).real, (number * by).imag
    return turned


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_every_16_bit_number_is_widened_exactly(dtype, wide):
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signalling NaN
        np.testing.assert_array_equal(reference._widen(numbers, np.dtype(wide)), numbers.astype(wide))
        np.testing.assert_array_equal(reference._widen(numbers[::3], np.dtype(wide)), numbers[::3].astype(wide))


# ------------------------------------------------------------------------------------------------ memory and time


def peak_memory(seqlen):
    """Bytes at the peak of a call, beyond inputs and outputs."""
    q, k, v, out = (np.zeros((1, seqlen, 1, 16), np.float32) for _ in range(4))
    attention(q, k, v, out=out, causal=True)
    tracemalloc.start()
    attention(q, k, v, out=out, causal=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_sequence():
    """A full matrix of scores would take 16 times as much for 4 times the length: 268 MB here."""
    short, long = peak_memory(2048), peak_memory(8192)
    assert long < 1.2 * short < 20e6


def test_speed(rng):
    """A tenth of a second at most where nothing else runs; three times that is an error."""
    q, k, v = dense(rng, batch=1, seqlen_q=1024, seqlen_k=1024, heads=8, kv_heads=8, head_dim=64)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        attention(q, k, v, causal=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


# ----------------------------------------------------------------------------------------------------- edges


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("masks", MASKS)
def test_no_warnings(rng, masks):
    """Rows that see nothing, infinities, NaN and scores beyond float32 are no reason to warn."""
    q, k, v = dense(rng, seqlen_q=90, seqlen_k=20)
    attention(q, k, v, **MASKS[masks])
    q[0, 3] = np.inf
    k[0, 4] = -np.inf
    v[1, 5] = np.nan
    attention(q * 1e30, k * 1e30, v, return_lse=True, **MASKS[masks])
    attention(q, k[:, :0], v[:, :0], return_lse=True, **MASKS[masks])


def test_forward_itself_checks_the_contents_of_indices(rng):
    """Whoever calls the backend without the public functions is told, too, and before anything is written."""
    q, k, v = (view(normal(rng, (9, 2, 8), "float32")) for _ in range(3))
    good, bad = (view(np.array(ends, np.int32)) for ends in ([0, 4, 9], [0, 4, 10]))
    out = view(np.full((9, 2, 8), 7, np.float32))
    problem = describe(q, k, v, cu_seqlens_q=good, cu_seqlens_k=bad, out=out)
    with pytest.raises(ValueError, match="^cu_seqlens_k: got 10 as its last entry, expected at most 9"):
        reference.forward(problem, Operands(q, k, v, out, cu_seqlens_q=good, cu_seqlens_k=bad))
    assert (out.array == 7).all()


def test_append_itself_checks_the_contents_of_indices(rng):
    k_cache, v_cache = (view(np.full((2, 9, 2, 8), 7, np.float32)) for _ in range(2))
    k, v = (view(normal(rng, (2, 3, 2, 8), "float32")) for _ in range(2))
    lengths = view(np.array([0, 7], np.int32))
    append = describe_append(k_cache, v_cache, k, v, cache_seqlens=lengths)
    with pytest.raises(ValueError, match="^cache_seqlens: got 7 tokens for sequence 1 plus 3 new"):
        reference.append(append, AppendOperands(k_cache, v_cache, k, v, cache_seqlens=lengths))
    assert (k_cache.array == 7).all() and (v_cache.array == 7).all()


@pytest.mark.parametrize("bad", [{"cache_seqlens": [0, 8]}, {"block_table": [[0], [4]]}, {"block_table": [[1], [1]]}])
def test_a_step_itself_checks_the_contents_of_indices(rng, bad):
    """Those of the append and those of attention, before either writes."""
    k_cache, v_cache = (view(np.full((4, 9, 2, 8), 7, np.float32)) for _ in range(2))
    q, k, v = (view(normal(rng, (2, 2, 2, 8), "float32")) for _ in range(3))
    indices = {"cache_seqlens": [3, 3], "block_table": [[1], [0]]} | bad
    lengths, table = (view(np.array(values, np.int32)) for values in indices.values())
    out = view(np.full((2, 2, 2, 8), 7, np.float32))
    problem = describe(q, k_cache, v_cache, k_new=k, v_new=v, seqused_k=lengths, block_table=table, out=out)
    operands = Operands(q, k_cache, v_cache, out, seqused_k=lengths, block_table=table, k_new=k, v_new=v)
    with pytest.raises(ValueError, match="^(seqused_k|cache_seqlens|block_table): got "):
        reference.forward(problem, operands)
    for written in (k_cache, v_cache, out):
        assert (written.array == 7).all()


def test_a_number_for_all_lengths(rng):
    k_cache, v_cache = (view(np.zeros((2, 9, 2, 8), np.float32)) for _ in range(2))
    k, v = (view(normal(rng, (2, 3, 2, 8), "float32")) for _ in range(2))
    append = describe_append(k_cache, v_cache, k, v)
    with pytest.raises(ValueError, match="^cache_seqlens: got 7 tokens for sequence 0 plus 3 new"):
        reference.append(append, AppendOperands(k_cache, v_cache, k, v, uniform_length=7))
    reference.append(append, AppendOperands(k_cache, v_cache, k, v, uniform_length=6))
    assert (k_cache.array[:, 6:] == k.array).all() and not k_cache.array[:, :6].any()


def test_decoding_does_not_widen_the_tables_or_the_cache(rng):
    """Memory for one step is that of the rows in use, however long the tables and the FP8 cache are."""
    tables = {name: np.ones((200_000, 32), np.float16) for name in ("rotary_cos", "rotary_sin")}
    caches = np.zeros((2, 1, 200_000, 1, 64), np.uint8)
    q, k, v = normal(rng, (3, 1, 1, 1, 64), "float16")
    options = {"k": k, "v": v, "cache_seqlens": 100, "kv_dtype": "e4m3", "k_scale": 1.0, "v_scale": 1.0} | tables
    attention_with_kvcache(q, *caches, **options)
    tracemalloc.start()
    attention_with_kvcache(q, *caches, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_read_only_inputs(rng):
    arrays = dense(rng, "float16")
    for array in arrays:
        array.flags.writeable = False
    oracle.attention(*arrays, causal=True).check(attention(*arrays, causal=True), None, "float16")


def test_append_into_every_order_of_axes(rng):
    """The view's strides decide where rows go: here heads lie outermost in memory."""
    k, v = normal(rng, (2, 2, 3, 2, 8), "float16")
    memory = np.zeros((2, 2, 2, 6, 8), np.float16)  # keys and values, heads, entries, rows, head_dim
    append_kv(memory[0].transpose(1, 2, 0, 3), memory[1].transpose(1, 2, 0, 3), k, v, cache_seqlens=2)
    for held, new in zip(memory, (k, v), strict=True):
        assert (held[:, :, 2:5] == new.transpose(2, 0, 1, 3)).all()
        assert (held[:, :, [0, 1, 5]] == 0).all()


def test_dense_cache_of_many_entries_is_not_copied(rng):
    """One sequence of a large cache costs memory for its own blocks alone."""
    lengths = [30, 40]
    k, v = (dense_cache([normal(rng, (n, 2, 16), "float32") for n in lengths], 40, [0, 2000]) for _ in range(2))
    q = normal(rng, (2, 1, 4, 16), "float32")
    options = {"cache_seqlens": np.array(lengths, np.int32), "cache_batch_idx": np.array([0, 2000], np.int32)}
    tracemalloc.start()
    out = attention_with_kvcache(q, k, v, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < k.nbytes / 10
    oracle.attention_with_kvcache(q, k, v, **options).check(out, None, "float32")
