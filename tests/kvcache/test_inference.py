"""InferenceParams and the helpers of flash_attn's generation code and tests, on NumPy and CUDA."""

from __future__ import annotations

import doctest

import numpy as np
import oracle
import pytest
from oracle import normal

import cupyattn
from cupyattn import InferenceParams, allocate_inference_cache, create_cu_seqlens, generate_block_kvcache
from cupyattn.kvcache import inference

pytestmark = pytest.mark.backends("numpy", "cuda")

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 32


def device_of(backend):
    return "cuda" if backend.on_gpu else "cpu"


def rows(rng, batch, seqlen, heads=KV_HEADS, dtype="float16"):
    return normal(rng, (batch, seqlen, heads, HEAD_DIM), dtype)


class Steps:
    """A generation over several layers, and all keys and values of each layer and sequence as lists."""

    def __init__(self, backend, params, first, lengths):
        self.backend, self.params, self.first = backend, params, first
        self.held = [[(rows_of(n), rows_of(n)) for n in lengths] for _ in range(LAYERS)]

    def step(self, rng, seqlen, **masks):
        """One step of every layer, compared with the oracle."""
        batch = len(self.held[0])
        for layer, held in enumerate(self.held):
            q, k, v = rows(rng, batch, seqlen, HEADS), rows(rng, batch, seqlen), rows(rng, batch, seqlen)
            given = (self.backend.put(x) for x in (q, k, v))
            out, lse = self.params.attend(*given, layer, return_lse=True, **masks)
            for b in range(batch):
                held[b] = tuple(np.concatenate([old, new[b]]) for old, new in zip(held[b], (k, v), strict=True))
                expected = oracle.attention(q[b : b + 1], *(x[None] for x in held[b]), **masks)
                expected.check(self.backend.get(out)[b : b + 1], self.backend.get(lse)[b : b + 1], "float16")
        self.params.advance(seqlen)

    def check(self):
        """The batch's entries of the caches hold what was appended."""
        for layer, held in enumerate(self.held):
            cache = self.backend.get(self.params.key_value_memory_dict[layer])
            for b, pair in enumerate(held):
                for axis, expected in enumerate(pair):
                    got = cache[self.first + b, : len(expected), axis]
                    assert got.tobytes() == expected.tobytes()


def rows_of(length):
    return np.zeros((length, KV_HEADS, HEAD_DIM), np.float16)


@pytest.mark.parametrize("allocated", [False, True])
def test_a_generation(backend, rng, allocated):
    params = InferenceParams(max_seqlen=40, max_batch_size=5, batch_size_offset=1)
    if allocated:
        sizes = (5, 40, KV_HEADS, HEAD_DIM, LAYERS)
        params.key_value_memory_dict = allocate_inference_cache(*sizes, device=device_of(backend), dtype="float16")
    steps = Steps(backend, params, 1, [0, 0, 0])
    steps.step(rng, 20, causal=True)
    for _ in range(5):
        steps.step(rng, 1, causal=True)
    steps.step(rng, 3, window=(4, 0))
    steps.check()
    assert params.seqlen_offset == 28
    assert sorted(params.key_value_memory_dict) == list(range(LAYERS))
    assert params.key_value_memory_dict[0].shape == (5, 40, 2, KV_HEADS, HEAD_DIM)


def test_lengths_per_sample(backend, rng):
    """Sequences of different lengths go on from where each of them ends; seqlen_offset does not count."""
    lengths = np.array([9, 0, 13, 6], np.int32)
    caches = allocate_inference_cache(4, 32, KV_HEADS, HEAD_DIM, LAYERS, device_of(backend))
    for cache in caches.values():
        cache[...] = 0
    params = InferenceParams(32, 4, 99, 2, caches, backend.put(lengths.copy()))
    steps = Steps(backend, params, 2, lengths[2:])
    steps.step(rng, 4, causal=True)
    steps.step(rng, 1, causal=True)
    steps.check()
    assert backend.get(params.lengths_per_sample).tolist() == [9, 0, 18, 11]


def test_advance_counts_the_batch_alone(backend):
    lengths = backend.put(np.array([1, 2, 3], np.int32))
    params = InferenceParams(8, 3, batch_size_offset=1, lengths_per_sample=lengths)
    params.advance()
    assert backend.get(lengths).tolist() == [1, 3, 4] and params.seqlen_offset == 1


def test_micro_batches_of_a_step_are_counted_each_for_itself(backend):
    params = InferenceParams(16, 4, lengths_per_sample=backend.put(np.zeros(4, np.int32)))
    for params.batch_size_offset in (0, 2):
        assert params.seqlen_offset == 0
        params.advance(3, batch_size=2)
    assert params.seqlen_offset == 3
    assert backend.get(params.lengths_per_sample).tolist() == [3, 3, 3, 3]


def test_reset(backend):
    lengths = backend.put(np.array([4, 5], np.int32))
    params = InferenceParams(8, 2, 7, key_value_memory_dict={0: "kept"}, lengths_per_sample=lengths)
    params.reset(16, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (16, 1, 0)
    assert params.lengths_per_sample is lengths and backend.get(lengths).tolist() == [0, 0]
    assert params.key_value_memory_dict == {0: "kept"}


def test_fields_are_those_of_flash_attn():
    params = InferenceParams(128, 4)
    assert list(vars(params)) == [
        "max_seqlen",
        "max_batch_size",
        "seqlen_offset",
        "batch_size_offset",
        "key_value_memory_dict",
        "lengths_per_sample",
    ]
    assert (params.seqlen_offset, params.batch_size_offset, params.key_value_memory_dict) == (0, 0, {})
    assert params.lengths_per_sample is None
    assert InferenceParams(1, 1).key_value_memory_dict is not params.key_value_memory_dict


def test_update_appends_and_gives_the_caches(backend, rng):
    params = InferenceParams(16, 3, batch_size_offset=1)
    k, v = rows(rng, 2, 5), rows(rng, 2, 5)
    k_cache, v_cache = params.update(backend.put(k), backend.put(v), "first")
    assert k_cache.shape == (2, 16, KV_HEADS, HEAD_DIM)
    assert (backend.get(k_cache)[:, :5] == k).all() and (backend.get(v_cache)[:, :5] == v).all()
    kv = backend.get(params.key_value_memory_dict["first"])
    assert (kv[1:, :5, 1] == v).all() and params.seqlen_offset == 0


@pytest.mark.parametrize(
    ("change", "batch", "seqlen", "dtype", "message"),
    [
        ({}, 4, 1, "float16", "k: got batch 4 from batch_size_offset 0 on, expected at most 3"),
        ({"batch_size_offset": 2}, 2, 1, "float16", "k: got batch 2 from batch_size_offset 2 on"),
        ({"seqlen_offset": 16}, 3, 1, "float16", "cache_seqlens: got 16 tokens plus 1 new, expected at most the 16"),
        ({}, 3, 17, "float16", "k: got 17 new rows"),
        ({}, 3, 1, "float32", "k_cache: got float16, expected"),
    ],
)
def test_refused_and_unchanged(backend, rng, change, batch, seqlen, dtype, message):
    params = InferenceParams(16, 3)
    kv = [backend.put(rows(rng, 3, 4)) for _ in "kv"]
    params.update(*kv, 0)
    before = backend.get(params.key_value_memory_dict[0]).tobytes()
    vars(params).update(change)
    q, k, v = (backend.put(rows(rng, batch, seqlen, heads, dtype)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for layer in (0, 1) if dtype == "float16" else (0,):
        with pytest.raises((TypeError, ValueError), match=message):
            params.attend(q, k, v, layer)
        with pytest.raises((TypeError, ValueError), match=message.replace("q's", "k's")):
            params.update(k, v, layer)
    assert list(params.key_value_memory_dict) == [0]
    assert backend.get(params.key_value_memory_dict[0]).tobytes() == before


def test_values_that_do_not_fit(rng):
    params = InferenceParams(16, 3)
    with pytest.raises(ValueError, match="v: got shape"):
        params.update(rows(rng, 1, 2), rows(rng, 1, 3), 0)
    with pytest.raises(ValueError, match="k: got 3-D"):
        params.update(rows(rng, 1, 2)[0], rows(rng, 1, 2)[0], 0)
    assert params.key_value_memory_dict == {}


# ------------------------------------------------------------------------------------------------------ helpers


def test_allocate_inference_cache(backend):
    caches = allocate_inference_cache(2, 9, 3, 8, ["a", "b"], device_of(backend), "bfloat16")
    assert list(caches) == ["a", "b"]
    for cache in caches.values():
        assert cache.shape == (2, 9, 2, 3, 8) and str(cache.dtype) == "bfloat16"
        assert isinstance(cache, type(backend.put(np.zeros(1))))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_allocate_for_torch(device):
    torch = pytest.importorskip("torch")
    for place, dtype in ((device, torch.float16), (torch.device(device), "float16")):
        caches = allocate_inference_cache(2, 9, 3, 8, 4, place, dtype)
        assert list(caches) == [0, 1, 2, 3] and caches[3].shape == (2, 9, 2, 3, 8)
        assert caches[0].dtype == torch.float16 and caches[0].device.type == device


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2, 9, 3, -1, 4, "cpu"), ValueError, "headdim: got -1"),
        ((2, 9, 1.5, 8, 4, "cpu"), TypeError, "nheads: got 1.5"),
        ((2, 9, 3, 8, 4, "tpu"), ValueError, "device: got 'tpu'"),
        ((2, 9, 3, 8, 4, "cpu", "float17"), TypeError, "dtype: got 'float17'"),
        ((2, 9, 3, 8, 4, None), TypeError, "device: got None"),
    ],
)
def test_allocation_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        allocate_inference_cache(*arguments)


def test_block_kvcache_is_the_dense_one_in_blocks(backend, rng):
    form = (70, 16, 3, KV_HEADS, HEAD_DIM, device_of(backend), "float16")
    k, v, table, k_paged, v_paged, num_blocks = generate_block_kvcache(*form, rng=rng)
    assert k.shape == v.shape == (3, 70, KV_HEADS, HEAD_DIM)
    assert num_blocks == 45 and k_paged.shape == v_paged.shape == (45, 16, KV_HEADS, HEAD_DIM)
    assert sorted(backend.get(table).ravel().tolist()) == list(range(45)) and table.shape == (3, 15)
    q = backend.put(rows(rng, 3, 4, HEADS))
    lengths = backend.put(np.array([70, 5, 33], np.int32))
    paged = cupyattn.attention_with_kvcache(q, k_paged, v_paged, cache_seqlens=lengths, block_table=table, causal=True)
    dense = cupyattn.attention_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
    difference = backend.get(paged).astype(np.float32) - backend.get(dense).astype(np.float32)
    assert np.abs(difference).max() <= 2e-3  # the two may sum in other orders


def test_block_kvcache_alone(backend, rng):
    form = (70, 16, 3, KV_HEADS, HEAD_DIM, device_of(backend), "bfloat16")
    first = generate_block_kvcache(*form, dense=False, rng=np.random.default_rng(5))
    again = generate_block_kvcache(*form, dense=False, rng=np.random.default_rng(5))
    assert [x.shape for x in first] == [(15, 16, KV_HEADS, HEAD_DIM)] * 2 + [(3, 5)]
    for x, y in zip(first, again, strict=True):
        assert backend.get(x).tobytes() == backend.get(y).tobytes()


def test_block_kvcache_refused():
    with pytest.raises(ValueError, match="paged_kv_block_size: got 0, expected at least 1"):
        generate_block_kvcache(20, 0, 2, 1, 8, "cpu", "float16")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_block_kvcache_of_torch(device):
    torch = pytest.importorskip("torch")
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(generate_block_kvcache(20, 8, 2, 1, 8, device, torch.bfloat16))
    k, v, table, k_paged, _, num_blocks = results[0]
    assert torch.equal(k, results[1][0]) and table.dtype == torch.int32 and num_blocks == 18
    assert torch.equal(k[1, 8:16], k_paged[table[1, 1].item()]) and k.device.type == device
    q = torch.randn(2, 3, 1, 8, dtype=torch.bfloat16, device=device)
    assert cupyattn.attention(q, k, v).shape == q.shape


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_cu_seqlens(backend, dtype):
    lengths = backend.put(np.array([4, 0, 6], dtype))
    for given in (lengths, lengths[::-1]):
        ends = create_cu_seqlens(given)
        assert type(ends) is type(lengths) and ends.dtype == np.int32
        assert backend.get(ends).tolist() == [0, *np.cumsum(backend.get(given))]
    assert backend.get(create_cu_seqlens([1, 2], device_of(backend))).tolist() == [0, 1, 3]
    assert backend.get(create_cu_seqlens(lengths, device_of(backend))).tolist() == [0, 4, 4, 10]
    assert backend.get(create_cu_seqlens(lengths[:0])).tolist() == [0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_cu_seqlens_of_torch(device):
    torch = pytest.importorskip("torch")
    lengths = torch.tensor([4, 0, 6], device=device)
    for given in (create_cu_seqlens(lengths), create_cu_seqlens(lengths, device), create_cu_seqlens(lengths, "cpu")):
        assert given.dtype == torch.int32 and given.tolist() == [0, 4, 4, 10]
    assert create_cu_seqlens(lengths).device.type == device
    assert isinstance(create_cu_seqlens([4, 6], torch.device(device)), torch.Tensor)


def test_cu_seqlens_of_jax():
    jax = pytest.importorskip("jax")
    ends = create_cu_seqlens(jax.numpy.asarray([4, 0, 6]))
    assert isinstance(ends, jax.Array) and ends.tolist() == [0, 4, 4, 10]


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([4, -1], ValueError, "lengths: got -1"),
        ([1.5], TypeError, "lengths: got float64"),
        ([[1]], ValueError, "lengths: got 2-D"),
        ([2**30, 2**30], ValueError, "lengths: got 2147483648 tokens"),
        (None, TypeError, "lengths: got None"),
    ],
)
def test_cu_seqlens_refused(lengths, error, message):
    with pytest.raises(error, match=message):
        create_cu_seqlens(lengths)


def test_docstring_examples():
    assert doctest.testmod(inference).failed == 0
