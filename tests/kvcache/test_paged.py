"""PagedKVCache: every call on NumPy and on CUDA, and long random sequences of calls against a dict of lists."""

from __future__ import annotations

import importlib
import time
import weakref

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from oracle import normal

import cupyattn
from cupyattn import DoubleFree, OutOfBlocks, PagedKVCache, RaggedArray, SwappedOut, UnknownSequence, UseAfterFree
from cupyattn.kvcache import paged, transfer, writing

pytestmark = pytest.mark.backends("numpy", "cuda")

FORMS = [
    {},
    {"layout": "HND"},
    {"combined": True},
    {"layout": "HND", "combined": True, "num_layers": 2},
    {"num_layers": 3},
]
OPERATIONS = {"numpy": 100_000, "cuda": 5_000}


def make(backend, num_blocks=32, block_size=4, num_kv_heads=2, head_dim=8, **options):
    options = {"dtype": "float16", "device": 0 if backend.on_gpu else None} | options
    return PagedKVCache(num_blocks, block_size, num_kv_heads, head_dim, **options)


def new(rng, cache, *shape, dtype=None):
    """Random keys and values for `append`, with an axis of layers if the cache has several."""
    layers = (cache.num_layers,) if cache.num_layers > 1 else ()
    return normal(rng, (2, *layers, *shape, cache.num_kv_heads, cache.head_dim), dtype or cache.dtype)


def append(backend, cache, kv, seqs, **options):
    cache.append(backend.put(kv[0]), backend.put(kv[1]), seqs, **options)


def read(backend, cache, *key):
    return [backend.get(array) for array in cache[key if len(key) > 1 else key[0]]]


def state(backend, cache):
    """All that can be seen of it, but for memory behind the sequences."""
    arrays = {name: getattr(cache, name).tolist() for name in ("ids", "lengths", "tables")}
    kept = ("ref_counts", "contents", "parents", "hashes", "cached", "free_blocks", "evictable_blocks")
    kept = {name: getattr(cache.allocator, name).tolist() for name in kept} | {"stats": cache.allocator.stats()}
    data = backend.get(cache._store.data).tobytes()
    return arrays | kept | {"data": data, "away": sorted(cache._away)}


def unchanged(backend, cache, error, call, match=None):
    before = state(backend, cache)
    with pytest.raises(error, match=match) as caught:
        call()
    assert state(backend, cache) == before
    return caught.value


# --------------------------------------------------------------------------------------- writing and reading


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_append_and_read(backend, rng, options, dtype):
    """Dense and packed rows, sequences that end and begin anywhere in a block."""
    cache = make(backend, dtype=dtype, **options)
    seqs = [cache.add() for _ in range(3)]
    first, second = new(rng, cache, 3, 5), new(rng, cache, 9)
    append(backend, cache, first, seqs)
    append(backend, cache, second, seqs, lengths=[7, 0, 2])
    axis = -3
    for i, (seq, begin, end) in enumerate(zip(seqs, (0, 7, 7), (7, 7, 9), strict=True)):
        for j, got in enumerate(read(backend, cache, seq)):
            expected = np.concatenate([first[j][..., i, :, :, :], second[j][..., begin:end, :, :]], axis)
            assert got.tobytes() == expected.tobytes() and got.shape == expected.shape
            part = read(backend, cache, seq, slice(3, 6))[j]
            assert part.tobytes() == np.ascontiguousarray(expected[..., 3:6, :, :]).tobytes()
    assert cache.lengths.tolist() == [12, 5, 7] and len(cache) == 3 and [*cache] == seqs
    assert read(backend, cache, seqs[0], slice(-2, None))[0].shape[-3] == 2
    assert read(backend, cache, seqs[0], slice(9, 3))[0].shape[-3] == 0


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_shapes(backend, options):
    cache = make(backend, **options)
    block = (2, 4, 8) if options.get("layout") == "HND" else (4, 2, 8)
    layers = (cache.num_layers,) if cache.num_layers > 1 else ()
    assert cache.shape == cache.k.shape == cache.v.shape == (*layers, 32, *block)
    assert cache.dtype == "float16" and cache.nbytes == 2 * cache.num_layers * 32 * 64 * 2
    if cache.combined:
        assert cache.kv.shape == (*layers, 32, 2, *block)
    else:
        with pytest.raises(AttributeError, match="combined=False"):
            _ = cache.kv
    for array in (cache.k, cache.v):
        library = importlib.import_module("cupy" if backend.on_gpu else "numpy")
        assert library.from_dlpack(array).shape == array.shape


def test_ragged_arrays(backend, rng):
    cache = make(backend)
    seqs = [cache.add(), cache.add()]
    k, v = new(rng, cache, 7)
    rows = [RaggedArray(backend.put(x), [0, 6, 7]) for x in (k, v)]
    cache.append(*rows, seqs)
    assert read(backend, cache, seqs[0])[0].tobytes() == k[:6].tobytes()
    assert read(backend, cache, seqs[1])[1].tobytes() == v[6:].tobytes()


@pytest.mark.parametrize("count", [300, 600])
def test_many_sequences_at_once(backend, rng, count):
    """More index numbers than fit the kernel's argument, too."""
    cache = make(backend, 2 * count)
    seqs = [cache.add() for _ in range(count)]
    steps = [new(rng, cache, count, n) for n in (3, 1, 1)]
    for kv in steps:
        append(backend, cache, kv, seqs)
    for i in (0, count // 2, count - 1):
        expected = np.concatenate([kv[1][i] for kv in steps])
        assert read(backend, cache, seqs[i])[1].tobytes() == expected.tobytes()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_rows_of_torch(backend, rng, num_layers):
    torch = pytest.importorskip("torch")
    cache = make(backend, num_layers=num_layers, dtype="float32")
    seqs = [cache.add(), cache.add()]
    k, v = new(rng, cache, 2, 5)
    there = [torch.from_numpy(x).to("cuda" if backend.on_gpu else "cpu") for x in (k, v)]
    cache.append(*there, seqs)
    assert read(backend, cache, seqs[1])[0].tobytes() == np.ascontiguousarray(k[..., 1, :, :, :]).tobytes()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8(backend, rng, dtype):
    cache = make(backend, dtype=dtype)
    seq = cache.add()
    k, v = new(rng, cache, 1, 6, dtype="float16")
    cache.append(backend.put(k), backend.put(v), seq, k_scale=0.5, v_scale=2.0)
    got = read(backend, cache, seq)
    kind = getattr(ml_dtypes, dtype)
    assert got[0].dtype == np.uint8 and cache.nbytes == 2 * 32 * 64
    assert got[0].tobytes() == (k[0].astype(np.float32) / 0.5).astype(kind).tobytes()
    assert got[1].tobytes() == (v[0].astype(np.float32) / 2.0).astype(kind).tobytes()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("combined", [False, True])
def test_attention_over_it(backend, rng, layout, combined):
    cache = make(backend, 64, 16, 2, 64, layout=layout, combined=combined)
    seqs = [cache.add() for _ in range(3)]
    kv = new(rng, cache, 90)
    lengths = [50, 3, 37]
    append(backend, cache, kv, seqs, lengths=lengths)
    q = normal(rng, (3, 2, 4, 64), "float16")
    out = cupyattn.attention_with_kvcache(
        backend.put(q),
        cache.k,
        cache.v,
        block_table=cache.block_table(seqs),
        cache_seqlens=cache.seqlens(seqs),
        layout=layout,
        causal=True,
    )
    ends = np.cumsum([0, *lengths])
    for b in range(3):
        k, v = (x[None, ends[b] : ends[b + 1]] for x in kv)
        expected = oracle.attention(q[b : b + 1], k, v, causal=True)
        expected.check(backend.get(out)[b : b + 1], None, "float16")


def test_extend_then_append_inside_attention(backend, rng):
    """The room is made before, the rows are written by the attention call."""
    cache = make(backend, 64, 16, 2, 64)
    seqs = [cache.add() for _ in range(2)]
    append(backend, cache, new(rng, cache, 2, 16), seqs)
    fork = cache.fork(seqs[0])
    k, v = new(rng, cache, 2, 1)
    q = normal(rng, (2, 1, 4, 64), "float16")
    before = cache.extend(seqs, 1)
    assert backend.get(before).tolist() == [16, 16] and cache.lengths.tolist() == [17, 17, 16]
    cupyattn.attention_with_kvcache(
        backend.put(q),
        cache.k,
        cache.v,
        k=backend.put(k),
        v=backend.put(v),
        cache_seqlens=before,
        block_table=cache.block_table(seqs),
    )
    assert read(backend, cache, seqs[1], slice(16, 17))[0].tobytes() == k[1].tobytes()
    assert cache.length(fork) == 16


def test_write_layer_by_layer(backend, rng):
    cache, whole = make(backend, num_layers=3), make(backend, num_layers=3)
    for each in (cache, whole):
        each.add(), each.add()
    kv = new(rng, cache, 2, 6)
    append(backend, whole, kv, [0, 1])
    cache.extend([0, 1], 6)
    for layer in range(3):
        cache.write(backend.put(kv[0][layer]), backend.put(kv[1][layer]), [0, 1], layer=layer)
    assert state(backend, cache) == state(backend, whole)
    cache.fork(0)
    with pytest.raises(ValueError, match="^seqs: got sequences that share block"):
        cache.write(backend.put(kv[0][0]), backend.put(kv[1][0]), [0, 1])


# --------------------------------------------------------------------------------- a token each, step by step


@pytest.fixture
def anew(monkeypatch):
    """The appends that were prepared from the beginning; all others went on from the one before."""
    found = []

    class Counted(writing.Writing):
        def __init__(self, *arguments):
            found.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(paged, "Writing", Counted)
    return found


class Decoding:
    """Sequences that grow step by step, and what they should hold."""

    def __init__(self, backend, rng, lengths, **options):
        self.backend, self.rng = backend, rng
        self.cache = make(backend, **{"num_blocks": 256} | options)
        self.seqs = [self.cache.add() for _ in lengths]
        self.k = [self._none() for _ in lengths]
        first = new(rng, self.cache, sum(lengths))
        append(backend, self.cache, first, self.seqs, lengths=lengths)
        for i, part in enumerate(np.split(first[0], np.cumsum(lengths)[:-1], axis=-3)):
            self.k[i] = part

    def _none(self):
        return new(self.rng, self.cache, 0)[0]

    def step(self, kv=None, **scales):
        kv = new(self.rng, self.cache, len(self.seqs), 1) if kv is None else kv
        append(self.backend, self.cache, kv, self.seqs, **scales)
        for i in range(len(self.seqs)):
            self.k[i] = np.concatenate([self.k[i], kv[0][..., i, :, :, :]], axis=-3)

    def right(self):
        for seq, k in zip(self.seqs, self.k, strict=True):
            assert read(self.backend, self.cache, seq)[0].tobytes() == np.ascontiguousarray(k).tobytes()
        return True


@pytest.mark.parametrize("options", [*FORMS, {"block_size": 1}, {"block_size": 3, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_steps_of_a_token_each(backend, rng, anew, options, count):
    """Sequences that end anywhere in a block, none and full ones among them."""
    decoding = Decoding(backend, rng, [i % 9 for i in range(count)], num_blocks=40 * 24, **options)
    anew.clear()
    tables = decoding.cache.block_table(decoding.seqs)
    for _ in range(12):
        decoding.step()
        assert decoding.cache.block_table(decoding.seqs) is tables
        assert backend.get(tables.array)[:, : decoding.cache.tables.shape[1]].tolist() == decoding.cache.tables.tolist()
        assert backend.get(tables.seqlens).tolist() == decoding.cache.lengths.tolist()
    assert decoding.right() and len(anew) == 1
    assert not cupyattn.kvcache.find_leaks(decoding.cache)


@pytest.mark.parametrize("count", [300, 600])
def test_steps_of_many_sequences(backend, rng, anew, count):
    """More index numbers than fit the kernel's argument, too."""
    decoding = Decoding(backend, rng, [i % 5 for i in range(count)], num_blocks=4 * count)
    anew.clear()
    for _ in range(6):
        decoding.step()
    assert decoding.right() and len(anew) == 1


def last_block(d):
    """Of the second sequence."""
    return d.cache.tables[1, (d.cache.length(d.seqs[1]) - 1) // d.cache.block_size, None]


def touch_nothing(d):
    d.cache.length(d.seqs[1])
    _ = d.cache[d.seqs[2]]
    d.cache.seqlens(d.seqs)
    d.cache.commit(d.seqs[0], np.arange(100))
    d.cache.extend(d.cache.add(), 3)


def fork(d):
    d.forked = d.cache.fork(d.seqs[1])


def fork_and_free(d):
    d.cache.free(d.cache.fork(d.seqs[1]))


def share_a_block(d):
    d.cache.allocator.share(last_block(d))


def truncate(d):
    d.cache.truncate(d.seqs[1], 2)
    d.k[1] = d.k[1][..., :2, :, :]


def truncate_to_the_same_length(d):
    """The blocks are given back and others come."""
    longer = d.cache.length(d.seqs[1]) + 9
    d.cache.extend(d.seqs[1], 9)
    d.cache.truncate(d.seqs[1], longer - 9)


def reorder(d):
    d.cache.reorder([0, 0, 2], d.seqs)
    d.k[1] = d.k[0]


def swap(d):
    d.cache.swap_out(d.seqs[1:])
    d.cache.extend(d.cache.add(), 30)
    d.cache.swap_in(d.seqs[1:])


def end_another(d):
    d.cache.free(d.cache.add())


def grow_one(d):
    more = new(d.rng, d.cache, 1, 4)
    append(d.backend, d.cache, more, d.seqs[1])
    d.k[1] = np.concatenate([d.k[1], more[0][..., 0, :, :, :]], axis=-3)


def other_order(d):
    d.seqs.reverse()
    d.k.reverse()


def come_and_go(d):
    d.cache.free(d.seqs[1])
    d.seqs[1] = d.cache.add()
    d.k[1] = d._none()


def widen_the_table(d):
    d.cache.extend(d.cache.add(), 400)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(
    ("between", "most"),
    [
        *((touch_nothing, 1), (fork, 3), (fork_and_free, 3), (share_a_block, 3), (truncate, 3), (end_another, 3)),
        *((truncate_to_the_same_length, 3), (reorder, 3), (swap, 3), (grow_one, 3), (other_order, 3), (come_and_go, 3)),
        (widen_the_table, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_comes_between_two_steps(backend, rng, anew, num_layers, between, most):
    """It is seen, wherever in a block the sequences end; then it goes on as before."""
    for steps in range(1, 6):
        decoding = Decoding(backend, rng, [3, 6, 12], num_layers=num_layers)
        anew.clear()
        for _ in range(steps):
            decoding.step()
        held = read(backend, decoding.cache, decoding.seqs[1])[0].tobytes()
        last = last_block(decoding)
        bits = backend.get(decoding.cache.k)[..., last, :, :, :].tobytes()
        between(decoding)
        for _ in range(6):
            decoding.step()
        assert decoding.right() and len(anew) <= most
        if between is fork:
            assert read(backend, decoding.cache, decoding.forked)[0].tobytes() == held
        if between is share_a_block:
            full = (6 + steps) % 4 == 0
            assert decoding.cache.allocator.ref_counts[last] == (2 if full else 1)
            assert backend.get(decoding.cache.k)[..., last, :, :, :].tobytes() == bits


def test_steps_of_other_rows(backend, rng, anew):
    """Other places, strides, libraries and scales; what is as it was two steps ago is no reason to trust the last."""
    decoding = Decoding(backend, rng, [3, 6, 12], dtype="float32")
    for i in range(8):
        k, v = kv = new(rng, decoding.cache, 3, 1)
        if i % 2:
            there = [backend.put(np.zeros((3, 1, 4, 8), np.float32)) for _ in kv]
            for array, rows in zip(there, kv, strict=True):
                array[:, :, ::2] = backend.put(rows)
            decoding.cache.append(*(array[:, :, ::2] for array in there), decoding.seqs)
        else:
            decoding.cache.append(backend.put(k), backend.put(v), tuple(decoding.seqs))
        for j in range(3):
            decoding.k[j] = np.concatenate([decoding.k[j], k[j]])
    assert decoding.right()


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_steps_of_other_libraries(backend, rng, anew, library, num_layers):
    module = pytest.importorskip(library)
    decoding = Decoding(backend, rng, [3, 6, 12], dtype="float32", num_layers=num_layers)
    anew.clear()
    for _ in range(9):
        kv = new(rng, decoding.cache, 3, 1)
        if library == "torch":
            there = [module.from_numpy(rows).to("cuda" if backend.on_gpu else "cpu") for rows in kv]
        elif backend.on_gpu and module.default_backend() != "gpu":
            pytest.skip("JAX sees no GPU")
        else:
            place = module.devices("gpu" if backend.on_gpu else "cpu")[0]
            there = [module.device_put(rows, place) for rows in kv]
        decoding.cache.append(*there, decoding.seqs)
        for j in range(3):
            decoding.k[j] = np.concatenate([decoding.k[j], kv[0][..., j, :, :, :]], axis=-3)
    assert decoding.right() and len(anew) == 1


def test_steps_in_fp8(backend, rng, anew):
    cache = make(backend, dtype="float8_e4m3fn")
    seqs = [cache.add(), cache.add()]
    expected = [], []
    for scales in ((1.0, 1.0), (0.5, 1.0), (0.5, 1.0), (0.5, 2.0), (0.5, 2.0), (0.5, 2.0), (1.0, 1.0)):
        kv = new(rng, cache, 2, 1, dtype="bfloat16")
        append(backend, cache, kv, seqs, k_scale=scales[0], v_scale=scales[1])
        for rows, scale, side in zip(kv, scales, expected, strict=True):
            side.append((rows[1].astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn))
    for found, side in zip(read(backend, cache, seqs[1]), expected, strict=True):
        assert found.tobytes() == np.concatenate(side).tobytes()
    assert len(anew) == 4
    of_array = backend.put(np.ones(2, np.float32))
    for _ in range(3):
        append(backend, cache, new(rng, cache, 2, 1, dtype="bfloat16"), seqs, k_scale=of_array, v_scale=of_array)
    assert len(anew) == 7, "an array may hold something else every time"


def test_ragged_rows_behind_a_step(backend, rng):
    decoding = Decoding(backend, rng, [3, 6])
    k, v = kv = normal(rng, (2, 5, 2, 8), "float16")
    ends = backend.put(np.array([0, 2, 5], np.int32))
    decoding.cache.append(*(RaggedArray(backend.put(rows), ends) for rows in kv), decoding.seqs)
    for seq, was, rows in zip(decoding.seqs, (3, 6), ((0, 2), (2, 5)), strict=True):
        for found, source in zip(read(backend, decoding.cache, seq), (k, v), strict=True):
            assert found[-(rows[1] - rows[0]) :].tobytes() == source[slice(*rows)].tobytes() and len(found) > was


@pytest.mark.parametrize("step", [True, False])
def test_an_interrupted_append_leaves_no_prefix_that_is_not_there(backend, rng, monkeypatch, step):
    """The block that it took was known, and holds something else by now."""
    cache = make(backend, num_blocks=2, block_size=2)
    first = cache.add()
    append(backend, cache, new(rng, cache, 1, 2), [first])
    cache.commit(first, [1, 2])
    cache.free(first)
    seq = cache.add()
    for _ in range(2):
        append(backend, cache, new(rng, cache, 1, 1), [seq])
    if not step:
        cache._decoding = None
    launch = writing.in_order

    def interrupted(run, *views):
        launch(run, *views)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writing, "in_order", interrupted)
        with pytest.raises(KeyboardInterrupt):
            append(backend, cache, new(rng, cache, 1, 1), [seq])
    assert cache.length(seq) == 2 and cache.length(cache.add([1, 2, 3])) == 0
    append(backend, cache, new(rng, cache, 1, 1), [seq])
    assert cache.length(seq) == 3


def test_more_tokens_than_there_is_memory_to_count(backend):
    cache = make(backend, block_size=1)
    seq = cache.add()
    unchanged(backend, cache, OutOfBlocks, lambda: cache.extend(seq, 2**31 - 1), "asked for 2147483647 blocks")


def test_steps_that_are_refused_change_nothing(backend, rng, anew):
    decoding = Decoding(backend, rng, [4, 3, 2], num_blocks=4)
    cache, seqs = decoding.cache, decoding.seqs
    cache.truncate(seqs[0], 3)
    decoding.k[0] = decoding.k[0][:3]
    decoding.step()
    anew.clear()
    k, v = (backend.put(rows) for rows in new(rng, cache, 3, 1))

    def refused(error, match, *arguments, **options):
        return unchanged(backend, cache, error, lambda: cache.append(*arguments, **options), match)

    refused(TypeError, "^k: got a list", [1], v, seqs)
    refused(TypeError, "^v: got float32", k, v.astype(np.float32), seqs)
    refused(ValueError, "^k: got 2 sequences", k[:2], v[:2], seqs)
    refused(ValueError, "^v: got shape", k, v[:, :0], seqs)
    refused(ValueError, "^k: got an array whose memory range meets", cache.k.reshape(-1, 1, 2, 8)[:3], v, seqs)
    refused(ValueError, "k_scale", k, v, seqs, k_scale=2.0)
    refused(TypeError, "^lengths", k[:, 0], v[:, 0], seqs, lengths=[0.5] * 3)
    assert len(anew) == 1, "only the scale is found out where an append is prepared"
    error = refused(OutOfBlocks, "asked for 2 blocks, but 1 are free", k, v, seqs)
    assert (error.asked, error.free, error.evictable) == (2, 1, 0) and len(anew) == 1
    cache.free(seqs.pop())
    decoding.k.pop()
    for _ in range(4):
        decoding.step()
    assert decoding.right()


def test_a_cache_and_the_rows_are_gone_when_nobody_has_them(backend, rng):
    """At once, not when Python next looks for cycles: a cache may be most of a device's memory."""
    for count in (2, 500):  # the latter are too many for a kernel's argument
        cache = make(backend, 2 * count)
        seqs = [cache.add() for _ in range(count)]
        for _ in range(3):
            rows = [backend.put(side) for side in new(rng, cache, count, 1)]
            cache.append(*rows, seqs)
            held = [weakref.ref(side) for side in rows]
            del rows
            assert [reference() for reference in held] == [None, None]
        gone = weakref.ref(cache)
        del cache
        assert gone() is None


def test_a_step_that_fails_changes_nothing(backend, rng, monkeypatch):
    """Neither does what was evicted for it stay so. The next one goes well."""
    decoding = Decoding(backend, rng, [3, 3], num_blocks=5)
    cache = decoding.cache
    old = cache.add(np.arange(9))
    append(backend, cache, new(rng, cache, 1, 9), old)
    cache.commit(old, np.arange(9))
    cache.free(old)
    decoding.step()
    assert cache.allocator.num_free == 1 and cache.allocator.num_evictable == 2

    def fail(*arguments):
        raise RuntimeError("the device is gone")

    rows = new(rng, cache, 2, 1)
    with monkeypatch.context() as patch:
        for kind in (transfer.HostTransfer, transfer.DeviceTransfer):
            patch.setattr(kind, "hold", lambda *_: (np.array([3, 3, *cache.tables[:, 0]], np.int32), fail))
        unchanged(backend, cache, RuntimeError, lambda: append(backend, cache, rows, decoding.seqs))
    assert cache.length(cache.add(np.arange(9))) == 8
    cache.free(max(cache))
    for _ in range(3):
        decoding.step()
    assert decoding.right() and cache.length(cache.add(np.arange(9))) == 4


# ------------------------------------------------------------------------------------------ sharing of blocks


def test_fork_copies_when_it_writes(backend, rng):
    cache = make(backend)
    seq = cache.add()
    first, more = new(rng, cache, 1, 6), new(rng, cache, 2, 3)
    append(backend, cache, first, seq)
    data = backend.get(cache._store.data).tobytes()
    fork = cache.fork(seq)
    assert backend.get(cache._store.data).tobytes() == data, "nothing is copied"
    assert cache.allocator.num_used == 2 and cache.allocator.stats().shared == 2
    append(backend, cache, more, [seq, fork])
    assert cache.allocator.stats().shared == 1, "the full block is still shared"
    assert cache.allocator.num_used == 5, "one of the two goes on in the last block that they shared"
    for i, each in enumerate((seq, fork)):
        expected = np.concatenate([first[0][0], more[0][i]])
        assert read(backend, cache, each)[0].tobytes() == expected.tobytes()


def test_fork_of_many_and_one_that_goes_on(backend, rng):
    cache = make(backend)
    seq = cache.add()
    append(backend, cache, new(rng, cache, 1, 6), seq)
    before = read(backend, cache, seq)[0]
    forks = cache.fork(seq, 3)
    append(backend, cache, new(rng, cache, 2, 1), forks[:2])
    assert len({*cache.tables[:, 1].tolist()}) == 3, "two hold the shared block still"
    for each in (seq, *forks):
        assert read(backend, cache, each, slice(0, 6))[0].tobytes() == before.tobytes()
    assert cache.fork(seq, 0) == []


def test_reorder_is_a_gather_of_sequences(backend, rng):
    cache = make(backend, 64)
    beams = [cache.add() for _ in range(4)]
    other = cache.add()
    append(backend, cache, new(rng, cache, 16), beams, lengths=[6, 3, 0, 7])
    append(backend, cache, new(rng, cache, 1, 2), other)
    held = [read(backend, cache, beam) for beam in beams]
    data = backend.get(cache._store.data).tobytes()
    index = np.array([3, 0, 0, 1])
    cache.reorder(backend.put(index), beams)
    assert backend.get(cache._store.data).tobytes() == data
    for beam, source in zip(beams, index, strict=True):
        assert read(backend, cache, beam)[1].tobytes() == held[source][1].tobytes()
    assert cache.allocator.num_used == 2 + 1 + 2 + 1
    append(backend, cache, new(rng, cache, 4, 1), beams)
    assert read(backend, cache, beams[1], slice(0, 6))[0].tobytes() == held[0][0].tobytes()
    cache.reorder([4, 3, 2, 1, 0])
    assert cache.length(beams[0]) == 2 and cache.length(other) == 8


def test_truncate_and_free(backend, rng):
    cache = make(backend)
    seqs = [cache.add(), cache.add()]
    kv = new(rng, cache, 2, 11)
    append(backend, cache, kv, seqs)
    cache.truncate(seqs, [4, 9])
    assert cache.allocator.num_used == 1 + 3 and cache.lengths.tolist() == [4, 9]
    assert read(backend, cache, seqs[1])[0].tobytes() == kv[0][1, :9].tobytes()
    cache.truncate(seqs[1], 0)
    cache.free(seqs)
    assert len(cache) == 0 and cache.allocator.num_free == 32


def test_prefixes_are_shared(backend, rng):
    cache = make(backend)
    prompt = np.arange(10)
    seq = cache.add(prompt)
    assert cache.length(seq) == 0
    kv = new(rng, cache, 1, 10)
    append(backend, cache, kv, seq)
    cache.commit(seq, prompt)
    again = cache.add(prompt)
    assert cache.length(again) == 8 and cache.allocator.stats().shared == 2
    assert cache.length(cache.add(prompt[:8])) == 4, "a token is left for the query"
    cache.free([*cache])
    assert cache.allocator.num_evictable == 2
    revived = cache.add([*range(8), 99])
    assert read(backend, cache, revived)[1].tobytes() == kv[1][0, :8].tobytes()
    cache.truncate(revived, 6)
    append(backend, cache, new(rng, cache, 1, 2), revived)
    assert cache.length(cache.add(prompt)) == 4, "what was written over is not found"
    with pytest.raises(ValueError, match="^tokens: got others"):
        cache.commit(revived, np.ones(8, int))


def test_committing_goes_on(backend, rng):
    cache = make(backend)
    seq = cache.add()
    for _ in range(3):
        append(backend, cache, new(rng, cache, 1, 5), seq)
        cache.commit(seq, np.arange(cache.length(seq)))
    assert cache.length(cache.add(np.arange(100))) == 12


# --------------------------------------------------------------------------------------------------- swapping


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_swap_out_and_in(backend, rng, options):
    cache = make(backend, **options)
    seqs = [cache.add() for _ in range(3)]
    append(backend, cache, new(rng, cache, 3, 6), seqs)
    fork = cache.fork(seqs[0])
    held = {seq: read(backend, cache, seq) for seq in cache}
    cache.swap_out([seqs[0], fork, seqs[2]])
    assert cache.allocator.num_used == 2 and cache.is_swapped_out(fork) and not cache.is_swapped_out(seqs[1])
    assert cache.length(fork) == 6 and "(3 swapped out)" in repr(cache)
    unchanged(backend, cache, SwappedOut, lambda: cache[fork])
    unchanged(backend, cache, SwappedOut, lambda: append(backend, cache, new(rng, cache, 1, 1), fork))
    append(backend, cache, new(rng, cache, 1, 20), seqs[1])  # takes their blocks
    cache.swap_in([fork, seqs[0]])
    assert cache.allocator.num_used == 7 + 2, "what they shared is shared again"
    cache.swap_in(seqs[2])
    for seq in (seqs[0], fork, seqs[2]):
        assert [x.tobytes() for x in read(backend, cache, seq)] == [x.tobytes() for x in held[seq]]
    unchanged(backend, cache, ValueError, lambda: cache.swap_in(fork), "^seqs: got sequence")


def test_swapped_out_sequences_can_be_freed_and_do_not_fit_a_full_pool(backend, rng):
    cache = make(backend, 4)
    seqs = [cache.add(), cache.add()]
    append(backend, cache, new(rng, cache, 2, 8), seqs)
    cache.swap_out(seqs[0])
    third = cache.add()
    append(backend, cache, new(rng, cache, 1, 8), third)
    error = unchanged(backend, cache, OutOfBlocks, lambda: cache.swap_in(seqs[0]))
    assert (error.asked, error.free, error.evictable) == (2, 0, 0)
    unchanged(backend, cache, SwappedOut, lambda: cache.extend(seqs[0], 1))
    unchanged(backend, cache, SwappedOut, lambda: cache.seqlens([seqs[0]]))
    cache.free(seqs[0])
    assert len(cache) == 2 and cache.allocator.num_used == 4


# -------------------------------------------------------------------------------------- tables for attention


def test_block_table_is_brought_up_to_date_in_place(backend, rng):
    cache = make(backend, 64)
    seqs = [cache.add(), cache.add()]
    append(backend, cache, new(rng, cache, 2, 3), seqs)
    table = cache.block_table(seqs)
    array = table.array
    assert table.shape == (2, 8)
    append(backend, cache, new(rng, cache, 9), seqs, lengths=[9, 0])
    assert cache.block_table(seqs) is table and table.array is array
    assert backend.get(array)[:, :3].tolist() == [cache.tables[0].tolist(), [int(cache.tables[1, 0]), -1, -1]]
    assert backend.get(table.seqlens).tolist() == backend.get(cache.seqlens(seqs)).tolist() == [12, 3]
    assert cache.block_table(seqs[::-1]) is not table
    cache.fork(seqs[0])
    append(backend, cache, new(rng, cache, 1, 30), seqs[0])
    cache.truncate(seqs[1], 0)
    assert backend.get(cache.block_table(seqs).array).tolist() == table.host.tolist()
    assert table.shape == (2, 16) and table.counts.tolist() == [11, 0]
    assert cache.block_table(seqs, max_blocks=40).shape == (2, 40)
    cache.block_table(seqs).validate(64)


def test_tables_of_other_widths_are_kept_side_by_side(backend, rng):
    cache = make(backend, 64)
    seqs = [cache.add(), cache.add()]
    append(backend, cache, new(rng, cache, 2, 3), seqs)
    first, second = cache.block_table(seqs), cache.block_table(seqs, max_blocks=40)
    assert first is not second and (first.shape, second.shape) == ((2, 8), (2, 40))
    assert cache.block_table(seqs, max_blocks=20) is second, "it is wide enough"
    arrays = first.array, second.array
    for _ in range(9):
        append(backend, cache, new(rng, cache, 2, 2), seqs)
        assert cache.block_table(seqs) is first and cache.block_table(tuple(seqs), max_blocks=40) is second
        for table, array in zip((first, second), arrays, strict=True):
            width = cache.tables.shape[1]
            assert table.array is array and backend.get(array)[:, :width].tolist() == cache.tables.tolist()
            assert backend.get(table.seqlens).tolist() == cache.lengths.tolist()
    with pytest.raises(ValueError, match="^max_blocks: got -1"):
        cache.block_table(seqs, max_blocks=-1)


def test_tables_that_were_not_asked_for_longest_are_made_anew(backend):
    cache = make(backend)
    seqs = [cache.add() for _ in range(paged.KEPT_TABLES + 1)]
    tables = [cache.block_table([seq]) for seq in seqs[:-1]]
    assert cache.block_table([seqs[0]], max_blocks=5) is tables[0]
    cache.block_table([seqs[-1]])
    assert cache.block_table([seqs[0]]) is tables[0] and cache.block_table([seqs[2]]) is tables[2]
    assert cache.block_table([seqs[1]]) is not tables[1]


@pytest.mark.parametrize("kind", [list, tuple, np.array, "torch", "cupy"])
def test_ids_come_in_any_kind_of_sequence(backend, rng, kind):
    """What is known from the call before, too, is found out by the ids alone."""
    if isinstance(kind, str):
        kind = {"torch": "tensor", "cupy": "array"}[kind], pytest.importorskip(kind)
        if kind[0] == "array" and not backend.on_gpu:
            pytest.skip("CuPy's arrays need a GPU")
        kind = getattr(kind[1], kind[0])
    cache = make(backend)
    seqs = [cache.add() for _ in range(4)]
    for ids in (seqs[1:], seqs[1:], seqs[:-1], seqs[::-1], seqs[:1]):
        before = cache.lengths
        cache.extend(kind(ids), 3)
        assert (cache.lengths - before).tolist() == [3 * (seq in ids) for seq in seqs]
    assert cache.length(np.int64(2)) == 12 and cache.length(np.array(1)) == 12
    with pytest.raises(TypeError, match=r"^seqs: got \[0, 1\]"):
        cache.extend(np.array([[0, 1]]), 1)


def test_a_table_of_a_cache_is_changed_by_the_cache_alone(backend, rng):
    cache = make(backend, 64)
    seqs = [cache.add(), cache.add()]
    append(backend, cache, new(rng, cache, 2, 3), seqs)
    table = cache.block_table(seqs)
    with pytest.raises(ValueError, match="^update: got a table of a PagedKVCache"):
        table.update([0], [[5]], [4])
    cache.extend(seqs, 3)
    with pytest.raises(ValueError, match="^update"):
        cache.block_table(seqs).update([0], [[5]], [4])
    assert backend.get(table.array)[:, :2].tolist() == cache.tables.tolist() == table.host[:, :2].tolist()
    mine = cupyattn.BlockTable(cache.tables, cache.lengths, 4, device=cache.device)
    mine.update([0], [[5]], [4])
    assert cache.tables[0, 0] != 5


# --------------------------------------------------------------------------------------------------- refusals


def test_refusals_change_nothing(backend, rng):
    cache = make(backend, 6)
    seqs = [cache.add() for _ in range(3)]
    append(backend, cache, new(rng, cache, 3, 6), seqs)
    cache.free(seqs.pop())
    gone = 2
    one, two = new(rng, cache, 1, 1), new(rng, cache, 2, 1)
    k, v = (backend.put(x) for x in two)
    wide = backend.put(np.zeros((2, 1, 3, 8), np.float16))
    other = backend.put(np.zeros((2, 1, 2, 8), np.float32))

    def refused(error, match, call):
        return unchanged(backend, cache, error, call, match)

    refused(DoubleFree, "^seqs: got sequence 2, which was freed already", lambda: cache.free(gone))
    refused(DoubleFree, "^seqs", lambda: cache.free([0, gone]))
    refused(ValueError, "^seqs: got a sequence twice", lambda: cache.free([0, 0]))
    for call in (lambda s: cache[s], cache.fork, cache.seqlens, cache.block_table, cache.length, cache.swap_out):
        refused(UseAfterFree, "^seqs: got sequence 2, which was freed", lambda call=call: call(gone))
        refused(UnknownSequence, "^seqs: got 77, which this cache never gave out", lambda call=call: call(77))
    refused(UnknownSequence, "^seqs", lambda: append(backend, cache, one, -1))
    refused(TypeError, "^seqs", lambda: append(backend, cache, one, ["a"]))
    refused(TypeError, "^seqs", lambda: append(backend, cache, one, None))
    refused(ValueError, "^seqs: got a sequence twice", lambda: append(backend, cache, two, [0, 0]))
    refused(ValueError, "^k: got 2 sequences, expected 1, as in seqs", lambda: append(backend, cache, two, 0))
    refused(ValueError, "^k: got 3 heads of 8", lambda: cache.append(wide, v, seqs))
    refused(ValueError, "^v: got 3 heads of 8", lambda: cache.append(k, wide, seqs))
    refused(TypeError, "^k: got float32, expected float16", lambda: cache.append(other, v, seqs))
    refused(ValueError, "^k: got 3-D shape", lambda: cache.append(k[0], v[0], seqs))
    refused(ValueError, "^v: got shape", lambda: cache.append(k, v[:1], seqs))
    refused(ValueError, "^lengths: got 3 rows in all", lambda: cache.append(k[0], v[0], seqs, lengths=[1, 2]))
    refused(TypeError, "^lengths", lambda: cache.append(k[0], v[0], seqs, lengths=[0.5, 0.5]))
    refused(TypeError, "^k: got a list", lambda: cache.append([1], v, seqs))
    error = refused(OutOfBlocks, "asked for 4 blocks", lambda: append(backend, cache, new(rng, cache, 2, 7), seqs))
    assert (error.asked, error.free, error.evictable) == (4, 2, 0)
    refused(OutOfBlocks, "^blocks", lambda: cache.extend(seqs, 100))
    refused(ValueError, "^new: got -1", lambda: cache.extend(seqs, -1))
    refused(ValueError, "^lengths: got 7 for a sequence of 6", lambda: cache.truncate(seqs, 7))
    refused(ValueError, "^lengths: got -1", lambda: cache.truncate(seqs, [0, -1]))
    refused(IndexError, "^beam_idx: got 0 to 2, expected 0 to 1", lambda: cache.reorder([0, 2]))
    refused(IndexError, "^beam_idx: got -1", lambda: cache.reorder([0, -1]))
    refused(ValueError, "^beam_idx: got 3 entries", lambda: cache.reorder([0, 1, 1]))
    refused(TypeError, "^beam_idx", lambda: cache.reorder([0.0, 1.0]))
    refused(IndexError, "^layer", lambda: cache.write(k, v, seqs, layer=1))
    refused(ValueError, "^k: got 7 rows", lambda: cache.write(*map(backend.put, new(rng, cache, 2, 7)), seqs))
    refused(TypeError, "^index", lambda: cache[0, ::2])
    refused(TypeError, "^index", lambda: cache[0, 3])
    refused(TypeError, "^tokens", lambda: cache.add([0.5, 0.25]))
    for tokens in ([[1, 2]], 5, "abc", None, [10**30] * 9):
        if tokens is not None:
            refused(TypeError, "^tokens", lambda tokens=tokens: cache.add(tokens))
        refused(TypeError, "^tokens", lambda tokens=tokens: cache.commit(0, tokens))
    refused(ValueError, "^tokens: got 18446744073709551615", lambda: cache.add(np.full(9, 2**64 - 1, np.uint64)))
    for several in ([0, 1], []):
        for call in (lambda s: cache[s], cache.fork, cache.length, cache.is_swapped_out):
            refused(ValueError, "^seqs: got . of them", lambda call=call, several=several: call(several))
    refused(TypeError, "^index: got 3", lambda: cache[0, 1, 2])
    refused(TypeError, "^seqs", lambda: cache.append(k, v, [np.array([0, 1])]))


def test_room_is_given_back_when_the_device_fails(backend, rng, monkeypatch):
    cache = make(backend)
    seqs = [cache.add()]
    append(backend, cache, new(rng, cache, 1, 6), seqs)
    seqs.append(cache.fork(seqs[0]))

    def fail(*arguments):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(cache._store, "copy_blocks", fail)
    unchanged(backend, cache, RuntimeError, lambda: append(backend, cache, new(rng, cache, 2, 5), seqs))
    unchanged(backend, cache, RuntimeError, lambda: cache.extend(seqs, 5))


@pytest.mark.parametrize("call", ["append", "extend", "swap_in"])
def test_what_was_evicted_comes_back_when_the_device_fails(backend, rng, monkeypatch, call):
    cache = make(backend, 6)
    seqs = [cache.add(), cache.add()]
    append(backend, cache, new(rng, cache, 2, 4), seqs)
    if call == "swap_in":
        append(backend, cache, new(rng, cache, 1, 12), seqs[0])
        cache.swap_out(seqs[0])
    for prompt in (np.arange(9), np.arange(50, 59)):
        old = cache.add(prompt)
        append(backend, cache, new(rng, cache, 1, 8), old)
        cache.commit(old, prompt)
        cache.free(old)
    assert cache.allocator.num_evictable == 4
    rows = new(rng, cache, 2, 8)

    def fail(*arguments):
        raise RuntimeError("the device is gone")

    calls = {
        "append": lambda: append(backend, cache, rows, seqs),
        "extend": lambda: cache.extend(seqs, 8),
        "swap_in": lambda: cache.swap_in(seqs[0]),
    }
    with monkeypatch.context() as patch:
        for name in ("run", "send"):
            patch.setattr(cache._store.transfer, name, fail)
        patch.setattr(cache._store, "swap_in", fail)
        unchanged(backend, cache, RuntimeError, calls[call])
    calls[call]()
    assert cache.allocator.stats().evictions > 0 and not cupyattn.kvcache.find_leaks(cache)


def test_what_was_evicted_stays_so_when_some_of_it_is_swapped_in(backend, rng, monkeypatch):
    """Of two groups of sequences the first comes back, and then the device fails."""
    cache = make(backend, 4)
    seqs = [cache.add(), cache.add()]
    append(backend, cache, new(rng, cache, 2, 8), seqs)
    held = [read(backend, cache, seq)[0].tobytes() for seq in seqs]
    for seq in seqs:
        cache.swap_out(seq)
    old = cache.add(np.arange(17))
    append(backend, cache, new(rng, cache, 1, 16), old)
    cache.commit(old, np.arange(16))
    cache.free(old)
    swap_in, calls = cache._store.swap_in, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        swap_in(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache._store, "swap_in", fail)
        with pytest.raises(RuntimeError):
            cache.swap_in(seqs)
    assert cache.length(cache.add(np.arange(17))) == 0 and not cupyattn.kvcache.find_leaks(cache)
    cache.swap_in(seqs)
    assert [read(backend, cache, seq)[0].tobytes() for seq in seqs] == held


def test_what_was_evicted_stays_so_when_something_was_written_there(backend, rng, monkeypatch):
    """A copy of a shared block is made, and then the device fails."""
    cache = make(backend, 3)
    old = cache.add(np.arange(9))
    append(backend, cache, new(rng, cache, 1, 8), old)
    cache.commit(old, np.arange(9))
    cache.free(old)
    seq = cache.add()
    append(backend, cache, new(rng, cache, 1, 3), seq)
    fork = cache.fork(seq)
    held = [read(backend, cache, each)[0].tobytes() for each in (seq, fork)]
    with monkeypatch.context() as patch:
        patch.setattr(cache._store.transfer, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("gone")))
        with pytest.raises(RuntimeError):
            append(backend, cache, new(rng, cache, 1, 1), fork)
    assert [read(backend, cache, each)[0].tobytes() for each in (seq, fork)] == held
    assert cache.length(cache.add(np.arange(9))) == 4 and not cupyattn.kvcache.find_leaks(cache)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"num_blocks": 0}, ValueError, "num_blocks"),
        ({"block_size": 2.0}, TypeError, "block_size"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads"),
        ({"head_dim": 257}, ValueError, "head_dim"),
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"dtype": "int8"}, TypeError, "dtype"),
        ({"layout": "DNH"}, ValueError, "layout"),
        ({"device": "cuda"}, TypeError, "device"),
        ({"low_watermark": 2.0}, ValueError, "low_watermark"),
    ],
    ids=str,
)
@pytest.mark.backends("numpy")
def test_bad_caches(backend, options, error, name):
    with pytest.raises(error, match=f"^{name}"):
        make(backend, **options)


# ------------------------------------------------------------------------------------------------------- looks


def test_repr_and_picture(backend, rng):
    cache = make(backend, 8)
    seq = cache.add()
    append(backend, cache, new(rng, cache, 1, 6), seq)
    cache.fork(seq)
    other = cache.add()
    append(backend, cache, new(rng, cache, 1, 2), other)
    where = "cuda:0" if backend.on_gpu else "cpu"
    assert repr(cache) == (
        "PagedKVCache(3 sequences of 2 to 6 tokens, 3/8 blocks used (38 %), 2 shared; "
        f"blocks of 4, 2 × 8 float16, NHD, {where})"
    )
    html = cache._repr_html_()
    assert html.count('title="block ') == 8
    assert html.count("2 sequences, ") == 2 and html.count(": free") == 5
    assert f"block 2: sequence {other}, 2 of 4 tokens" in html


@pytest.mark.backends("numpy")
def test_fork_of_128k_tokens_is_quick(backend):
    """Best of many, so that other work on the machine does not count."""
    cache = make(backend, 8192, 16, 1, 1)
    seq = cache.add()
    cache.extend(seq, 131072)
    best = float("inf")
    for _ in range(50):
        begin = time.perf_counter()
        fork = cache.fork(seq)
        best = min(best, time.perf_counter() - begin)
        cache.free(fork)
    assert best <= 50e-6 and cache.allocator.num_used == 8192


# ------------------------------------------------------------------------------------- against a dict of lists


class Machine(RuleBasedStateMachine):
    """Operations come as bytes, three each, which is quick to draw and to shrink.

    The model is a dict of lists of tokens. In layer n a token has the key token + 100 n and the value -key, so that
    sequences that begin with the same tokens may share blocks.
    """

    backend = None
    done = 0

    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.sampled_from([1, 2, 3, 4]),
        options=st.sampled_from(FORMS),
    )
    def start(self, num_blocks, block_size, options):
        self.cache = make(self.backend, num_blocks, block_size, 1, 2, dtype="float32", **options)
        self.model: dict[int, list[int]] = {}
        self.away: set[int] = set()
        self.freed: list[int] = []
        self.batch: list[int] = []

    @rule(data=st.binary(min_size=150, max_size=150))
    def operations(self, data):
        kinds = (
            *(self.add, self.append, self.append, self.append_packed, self.extend_and_write, self.fork, self.free),
            *(self.steps, self.steps, self.steps, self.table),
            *(self.truncate, self.reorder, self.swap_out, self.swap_in, self.commit, self.read, self.wrong),
        )
        for code, a, b in zip(data[::3], data[1::3], data[2::3], strict=True):
            kinds[code % len(kinds)](a, b)
            type(self).done += 1
            self.agree()
        for seq in [seq for seq in self.model if seq not in self.away]:
            self.holds(seq, 0, len(self.model[seq]))

    # What the operations are made of.

    def here(self, a, most=4):
        """Some of the sequences that are not swapped out."""
        seqs = [seq for seq in self.model if seq not in self.away]
        start = a % max(len(seqs), 1)
        return (seqs[start:] + seqs[:start])[: 1 + a // 64 % most]

    def rows(self, tokens, shape):
        """Keys and values of tokens, of a shape without layers, heads and head_dim."""
        layers = np.arange(self.cache.num_layers)[:, None] * 100.0
        values = np.broadcast_to((np.array(tokens)[None] + layers)[..., None, None], (len(layers), len(tokens), 1, 2))
        shape = (*((len(layers),) if len(layers) > 1 else ()), *shape, 1, 2)
        k = values.astype(np.float32).reshape(shape)
        return self.backend.put(k), self.backend.put(-k)

    def grow(self, seqs, tokens, call):
        """Call what appends these lists of tokens; it works, or there is no room and nothing has changed."""
        before = self.seen()
        try:
            call()
        except OutOfBlocks as error:
            assert error.asked > error.free + error.evictable
            assert (error.free, error.evictable) == (self.cache.allocator.num_free, self.cache.allocator.num_evictable)
            assert self.seen() == before
            return
        for seq, more in zip(seqs, tokens, strict=True):
            self.model[seq] = self.model[seq] + more

    def seen(self):
        """What may not change; memory that no sequence has is compared as well."""
        cache = self.cache
        arrays = (cache.ids, cache.lengths, cache.tables, cache.allocator.ref_counts, cache.allocator.contents)
        return [array.tobytes() for array in arrays] + [self.backend.get(cache._store.data).tobytes()]

    def refused(self, error, call):
        before = self.seen()
        with pytest.raises(error):
            call()
        assert self.seen() == before

    # The operations.

    def add(self, a, b):
        if len(self.model) >= 8:
            return
        tokens = [(a >> i) & 1 for i in range(8)][: b % 9] if b & 16 else None
        seq = self.cache.add(tokens)
        self.model[seq] = tokens[: self.cache.length(seq)] if tokens else []

    def append(self, a, b):
        seqs = self.here(a)
        tokens = [[(b >> i) & 1 for i in range(b % 4)] for _ in seqs]
        k, v = self.rows(sum(tokens, []), (len(seqs), b % 4))
        self.grow(seqs, tokens, lambda: self.cache.append(k, v, seqs))

    def steps(self, a, b):
        """A token to each of some sequences, twice, and as a rule to those of the last steps."""
        if b % 16 == 0 or not self.batch or not {*self.batch} <= self.model.keys() - self.away:
            self.batch = self.here(a)
        seqs = self.batch
        for i in range(2):
            tokens = [[(b >> i) & 1]] * len(seqs)
            k, v = self.rows(sum(tokens, []), (len(seqs), 1))
            self.grow(seqs, tokens, lambda k=k, v=v: self.cache.append(k, v, seqs))
            self.agree()

    def table(self, a, b):
        """That of the last steps, and with another number of columns; both are those of every time before."""
        seqs, cache = self.batch, self.cache
        if {*seqs} <= self.model.keys() - self.away:
            for columns in (0, 12):
                table, width = cache.block_table(seqs, max_blocks=columns), cache.tables.shape[1]
                rows = [[*self.model].index(seq) for seq in seqs]
                for found in (table.host, self.backend.get(table.array)):
                    assert np.array_equal(found[:, :width], cache.tables[rows, : table.max_blocks])
                    assert (found[:, width:] == -1).all() and table.max_blocks >= columns
                assert self.backend.get(table.seqlens).tolist() == [len(self.model[seq]) for seq in seqs]

    def append_packed(self, a, b):
        seqs = self.here(a)
        tokens = [[(b + i) & 1] * ((b >> i) % 6) for i in range(len(seqs))]
        k, v = self.rows(sum(tokens, []), (sum(map(len, tokens)),))
        self.grow(seqs, tokens, lambda: self.cache.append(k, v, seqs, lengths=[*map(len, tokens)]))

    def extend_and_write(self, a, b):
        seqs = self.here(a)
        tokens = [[b & 1] * (b % 5) for _ in seqs]

        def call():
            before = self.cache.extend(seqs, b % 5)
            assert self.backend.get(before).tolist() == [len(self.model[seq]) for seq in seqs]
            k, v = self.rows(sum(tokens, []), (len(seqs), b % 5))
            for layer in range(self.cache.num_layers):
                own = (k[layer], v[layer]) if self.cache.num_layers > 1 else (k, v)
                self.cache.write(*own, seqs, layer=layer)

        self.grow(seqs, tokens, call)

    def fork(self, a, b):
        if len(self.model) < 8:
            for seq in self.here(a, 1):
                self.model[self.cache.fork(seq)] = self.model[seq]

    def free(self, a, b):
        seqs = [*self.model][a % max(len(self.model), 1) :][: 1 + b // 200]
        self.cache.free(seqs)
        for seq in seqs:
            del self.model[seq]
            self.away.discard(seq)
        self.freed += seqs

    def truncate(self, a, b):
        seqs = self.here(a, 2)
        lengths = [len(self.model[seq]) * b // 255 for seq in seqs]
        self.cache.truncate(seqs, lengths)
        for seq, length in zip(seqs, lengths, strict=True):
            self.model[seq] = self.model[seq][:length]

    def reorder(self, a, b):
        seqs = self.here(a)
        if seqs:
            beams = [(b >> i) % len(seqs) for i in range(len(seqs))]
            self.cache.reorder(np.array(beams), seqs)
            self.model.update(zip(seqs, [self.model[seqs[beam]] for beam in beams], strict=True))

    def swap_out(self, a, b):
        seqs = self.here(a, 3)
        self.cache.swap_out(seqs)
        self.away |= {*seqs}

    def swap_in(self, a, b):
        seqs = sorted(self.away)[: 1 + b % 3]
        before = self.seen()
        try:
            self.cache.swap_in(seqs)
            self.away -= {*seqs}
        except OutOfBlocks:
            assert self.seen() == before

    def commit(self, a, b):
        for seq in self.here(a, 1):
            self.cache.commit(seq, np.array(self.model[seq][: b % 32], int))

    def read(self, a, b):
        for seq in self.here(a, 1):
            self.holds(seq, min(b % 8, len(self.model[seq])), len(self.model[seq]))

    def wrong(self, a, b):
        seqs, cache = self.here(a), self.cache
        k, v = self.rows([0] * len(seqs), (len(seqs), 1))
        if self.freed:
            gone = self.freed[b % len(self.freed)]
            self.refused(DoubleFree, lambda: cache.free([*seqs, gone]))
            self.refused(UseAfterFree, lambda: cache.append(k, v, [*seqs[1:], gone]))
        self.refused(UnknownSequence, lambda: cache.fork(10**6))
        self.refused(IndexError, lambda: cache.reorder([len(seqs)] * len(seqs), seqs)) if seqs else None
        self.refused(TypeError, lambda: cache.append(k.astype(np.float16), v, seqs))
        self.refused(ValueError, lambda: cache.append(k[..., :1], v, seqs))
        if seqs:
            self.refused(OutOfBlocks, lambda: cache.extend(seqs, 24 * 4 + 1))
        if self.away:
            self.refused(SwappedOut, lambda: cache.append(k, v, [*seqs[1:], min(self.away)]))

    # What must hold.

    def holds(self, seq, start, stop):
        """Keys and values of tokens start to stop - 1 are those of the model."""
        layers = np.arange(self.cache.num_layers)[:, None] * 100.0
        expected = np.array(self.model[seq][start:stop], float)[None] + layers
        k, v = read(self.backend, self.cache, seq, slice(start, stop))
        k, v = (x.reshape(len(layers), stop - start, 2) for x in (k, v))
        assert (k == expected[..., None]).all() and (v == -expected[..., None]).all()

    def agree(self):
        cache, allocator = self.cache, self.cache.allocator
        assert [*cache] == [*self.model]
        assert cache.lengths.tolist() == [len(tokens) for tokens in self.model.values()]
        tables = cache.tables
        used = [-(-len(t) // cache.block_size) if seq not in self.away else 0 for seq, t in self.model.items()]
        assert (tables >= 0).sum(axis=1).tolist() == used
        counts = np.bincount(tables[tables >= 0], minlength=cache.num_blocks)
        assert np.array_equal(allocator.ref_counts, counts)
        assert allocator.num_used == np.count_nonzero(counts)
        assert allocator.num_used + allocator.num_free + allocator.num_evictable == cache.num_blocks


def test_random_operations(backend, monkeypatch):
    class Here(Machine):
        pass

    Here.backend = backend
    taken, step = {True: 0, False: 0}, writing.Decoding.step

    def counted(*arguments):
        went_on = step(*arguments)
        taken[went_on] += 1
        return went_on

    monkeypatch.setattr(writing.Decoding, "step", counted)
    examples = 8 if backend.on_gpu else 130
    run_state_machine_as_test(Here, settings=settings(max_examples=examples, stateful_step_count=20, deadline=None))
    assert Here.done >= OPERATIONS[backend.name]
    assert taken[True] >= OPERATIONS[backend.name] // 20 and taken[False] >= OPERATIONS[backend.name] // 200


@pytest.mark.backends("numpy")
def test_numbers_that_no_sequence_can_have(backend):
    cache = PagedKVCache(8, 4, 1, 8)
    seq = cache.add()
    cache.extend(seq, 6)
    for number in (2**31, 2**63 - 1, 2**63):
        with pytest.raises(ValueError, match="got .* expected at most"):
            cache.truncate(seq, number)
        with pytest.raises(ValueError, match="got .* expected at most"):
            cache.extend(seq, number)
    assert cache.length(seq) == 6


@pytest.mark.backends("numpy")
def test_sequences_that_are_as_long_as_can_be(backend, rng, monkeypatch):
    """Step by step and otherwise; a smaller number stands for 2**31 - 1."""
    cache = make(backend)
    for module in (paged, writing):
        monkeypatch.setattr(module, "INT32_MAX", 7)
    seqs = [cache.add(), cache.add()]
    cache.extend(seqs, [1, 4])
    for _ in range(3):
        append(backend, cache, new(rng, cache, 2, 1), seqs)
    for _ in range(2):
        rows = new(rng, cache, 2, 1)
        unchanged(
            backend, cache, ValueError, lambda rows=rows: append(backend, cache, rows, seqs), "^seqs: got .* grow"
        )
    append(backend, cache, new(rng, cache, 1, 1), seqs[0])
    assert cache.lengths.tolist() == [5, 7]


@pytest.mark.backends("numpy")
def test_iterators_are_refused(backend):
    """They can be read but once."""
    cache = PagedKVCache(8, 4, 1, 8)
    seqs = [cache.add(), cache.add()]
    for call in (cache.free, cache.block_table, cache.swap_out):
        with pytest.raises(TypeError, match="seqs: got an iterator"):
            call(seq for seq in seqs)
    assert list(cache) == seqs


def test_rows_of_several_layers_are_contiguous(backend):
    cache = PagedKVCache(8, 4, 1, 8, num_layers=3, layout="HND", device=0 if backend.on_gpu else None)
    seq = cache.add()
    cache.extend(seq, 6)
    assert all(rows.flags.c_contiguous for rows in cache[seq])


@pytest.mark.backends("numpy")
def test_a_table_that_could_not_be_sent_is_sent_again(backend, monkeypatch):
    cache = PagedKVCache(8, 4, 1, 8)
    seq = cache.add()
    cache.extend(seq, 4)
    table = cache.block_table([seq])
    cache.extend(seq, 4)
    with monkeypatch.context() as patch:
        patch.setattr(type(table._transfer), "write", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        patch.setattr(type(table._transfer), "send", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError):
            cache.block_table([seq])
    assert np.array_equal(cache.block_table([seq]).array[:, :2], cache.tables[:1, :2])
