"""PrefillPlan: runs of all three forms of call equal the plain call bit for bit, what is not as planned is refused
before anything happens, graphs stay right as what they read changes, and the host does little.

That a plan launches what a plain call launches, byte for byte, is also tested without a device, on CuPy arrays over
addresses that nobody reads, with stand-ins for CUDA's driver and runtime.
"""

from __future__ import annotations

import ctypes
import doctest
import importlib
import types
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import cumulative, normal
from test_arrays import at_address
from test_decode import FP8, SCALES, array, dense, held, ints, paged, tables
from test_decode_plan import OPTIONS, Driver, put, same, seconds
from test_forward import LSE_FORMS, features, masks, packed, qkv

import cupyattn
from cupyattn import DecodePlan, PrefillPlan, RaggedArray, arrays, attention, attention_varlen, prefill_plan
from cupyattn.kernels import launch, merge, rotary, workspace
from cupyattn.plan import COUNTER_BYTES, DEVICES

EVERYWHERE = pytest.mark.backends("numpy", "cuda")


def apart(options):
    """(what a run takes, what only the plan takes) of the options of a call."""
    fixed = (*OPTIONS, "max_seqlen_q", "max_seqlen_k")
    run = {name: value for name, value in options.items() if name not in fixed}
    return run, {name: value for name, value in options.items() if name in fixed}


def agrees(backend, function, make, **options):
    """A plan's runs, into new arrays and a given one, equal the plain call: results and caches, bit for bit.

    make() gives the arguments by position, anew each time.
    """
    run, fixed = apart(put(backend, options))
    example, eager, own = make(), make(), make()
    plan = PrefillPlan(*example, **run, **fixed)
    assert all(backend.get(x).tobytes() == backend.get(y).tobytes() for x, y in zip(example, own, strict=True))
    expected = getattr(cupyattn, function)(*eager, **run, **fixed)
    room = backend.put(np.full((*own[0].shape[:-1], own[2].shape[-1]), np.nan, own[0].dtype))
    for out in (None, room, None):
        got = plan.run(*own, **run, out=out)
        same(backend, got, expected)
        assert out is None or (got[0] if isinstance(got, tuple) else got) is out
    assert all(backend.get(x).tobytes() == backend.get(y).tobytes() for x, y in zip(own, eager, strict=True))
    return plan


def fixed_arrays(backend, *given):
    return lambda: tuple(backend.put(x) for x in given)


def with_cache(backend, q, cache):
    """q, and the keys and values of a fresh copy of the cache."""
    return lambda: (backend.put(q), *cache.split(backend.put(cache.array.copy())))


# ------------------------------------------------------------------------------------------------- results


@EVERYWHERE
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dense(backend, rng, dtype):
    make = fixed_arrays(backend, *qkv(rng, dtype))
    agrees(backend, "attention", make, causal=True)
    agrees(backend, "attention", make, return_lse=True, **features(rng, "softcap", "alibi", "sinks", "window"))


@EVERYWHERE
def test_few_rows_over_many_keys(backend, rng):
    """On CUDA several blocks share the keys, through a workspace of the plan's."""
    make = fixed_arrays(backend, *qkv(rng, "float16", batch=1, seqlen_q=60, seqlen_k=5000))
    for return_lse in (False, True):
        plan = agrees(backend, "attention", make, causal=True, return_lse=return_lse)
        assert (plan.workspace_bytes > COUNTER_BYTES) is backend.on_gpu


@EVERYWHERE
@pytest.mark.parametrize("form", LSE_FORMS)
def test_forms_of_the_lse(backend, rng, form):
    make = fixed_arrays(backend, *qkv(rng, "float16", seqlen_q=70, seqlen_k=50))
    agrees(backend, "attention", make, causal=True, return_lse=form)
    make = fixed_arrays(backend, *qkv(rng, "float16", batch=1, seqlen_q=60, seqlen_k=5000))
    plan = agrees(backend, "attention", make, causal=True, return_lse=form)
    assert (plan.workspace_bytes > COUNTER_BYTES) is backend.on_gpu  # keys that several blocks share
    make = fixed_arrays(backend, *packed(rng, "float16", [5, 0, 70, 33], [0, 4, 33, 33]))
    agrees(backend, "attention_varlen", make, causal=True, return_lse=form)
    nothing = fixed_arrays(backend, *packed(rng, "float16", [], []))
    agrees(backend, "attention_varlen", nothing, return_lse=form)


@EVERYWHERE
def test_few_queries(backend, rng):
    """A prefill of few rows is the decode kernel's."""
    plan = agrees(backend, "attention", fixed_arrays(backend, *qkv(rng, "float16", seqlen_q=3)), causal=True)
    assert plan.kernel == ("decode" if backend.on_gpu else "numpy")


@EVERYWHERE
def test_packed(backend, rng):
    q, k, v, ends_q, ends_k = packed(rng, "float16", [5, 0, 70, 33], [9, 4, 130, 33])
    hints = {"max_seqlen_q": 70, "max_seqlen_k": 130}
    make = fixed_arrays(backend, q, k, v, ends_q, ends_k)
    agrees(backend, "attention_varlen", make, causal=True, return_lse=True, **hints)
    agrees(backend, "attention_varlen", make, causal=True, seqused_k=ints(9, 0, 100, 33))
    agrees(backend, "attention_varlen", fixed_arrays(backend, k, k, v, ends_k), causal=True)  # one cu_seqlens for both


@EVERYWHERE
def test_rows_may_be_split_otherwise(backend, rng):
    """The same plan for another batch of as many rows and sequences."""
    q, k, v, ends, _ = packed(rng, "float16", [5, 100, 3, 92], [5, 100, 3, 92])
    q, k, v = (backend.put(x) for x in (q, k, v))
    plan = PrefillPlan(q, k, v, backend.put(ends), causal=True)
    for lengths in ([50, 50, 50, 50], [0, 0, 200, 0], [7, 130, 1, 2]):
        ends = backend.put(cumulative(lengths))
        same(backend, plan.run(q, k, v, ends), attention_varlen(q, k, v, ends, causal=True))


@EVERYWHERE
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_packed_queries_over_blocks(backend, rng, layout):
    lengths_q, lengths_k = [3, 1, 40, 66], [3, 20, 70, 130]
    cache = paged(rng, held(rng, "float16", lengths_k), 16, layout)
    q = normal(rng, (sum(lengths_q), 4, 64), "float16")
    run = cache.places | {"cu_seqlens_q": cumulative(lengths_q), "causal": True}
    make = with_cache(backend, q, cache)
    agrees(backend, "attention_varlen", make, **run, seqused_k=ints(*lengths_k), return_lse=True)
    agrees(backend, "attention_varlen", make, **run, cu_seqlens_k=cumulative(lengths_k))


LENGTHS = [0, 5, 33, 64]


@EVERYWHERE
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("appends", [False, True], ids=["reads", "appends"])
def test_paged_cache(backend, rng, appends, layout):
    q, (k, v) = normal(rng, (4, 20, 8, 64), "float16"), normal(rng, (2, 4, 20, 2, 64), "float16")
    cache = paged(rng, held(rng, "float16", LENGTHS), 16, layout, capacity=90)
    new = {"k": k, "v": v} | tables(rng, 90, 32, "float32") if appends else {}
    options = {"cache_seqlens": ints(*LENGTHS), "causal": True, "return_lse": True}
    plan = agrees(backend, "attention_with_kvcache", with_cache(backend, q, cache), **cache.places, **options, **new)
    assert (plan.problem.append is not None) is appends
    if appends and backend.on_gpu:
        assert plan.workspace_bytes >= q.nbytes, "for the rotated queries"


@EVERYWHERE
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dense_cache_with_everything(backend, rng, dtype):
    q, (k, v) = normal(rng, (4, 20, 8, 64), dtype), normal(rng, (2, 4, 20, 2, 64), dtype)
    cache = dense(held(rng, dtype, LENGTHS), 90, [3, 0, 5, 1])
    options = {"cache_seqlens": ints(*LENGTHS), "cache_leftpad": ints(0, 1, 4, 60), "rotary_interleaved": False}
    options |= {"k": k, "v": v} | tables(rng, 90, 16, dtype) | features(rng, "softcap", "alibi", "sinks", heads=8)
    agrees(backend, "attention_with_kvcache", with_cache(backend, q, cache), **cache.places, **options, window=(40, 0))


@EVERYWHERE
@pytest.mark.parametrize("rotates", [False, True], ids=["stays", "rotates"])
def test_chunk_after_chunk_with_one_length_for_all(backend, rng, rotates):
    """One plan for all chunks of a prompt: the lengths are an int that grows."""
    own, eager = (backend.put(np.zeros((2, 2, 100, 2, 64), np.float16)) for _ in range(2))
    run = put(backend, tables(rng, 90, 32, "float16") if rotates else {})
    plan = None
    for length in (0, 20, 40, 60):
        q = backend.put(normal(rng, (2, 20, 4, 64), "float16"))
        k, v = backend.put(normal(rng, (2, 2, 20, 2, 64), "float16"))
        run |= {"k": k, "v": v, "cache_seqlens": length}
        plan = plan or PrefillPlan(q, *own, **run, causal=True)
        same(backend, plan.run(q, *own, **run), cupyattn.attention_with_kvcache(q, *eager, **run, causal=True))
        assert backend.get(own).tobytes() == backend.get(eager).tobytes()
    too_long = (75, "rotary_cos: got 90 positions") if rotates else (81, "cache_seqlens: got 81 tokens plus 20 new")
    for length, message in (too_long, (-1, "cache_seqlens: got -1")):
        with pytest.raises(ValueError, match=f"^{message}"):
            plan.run(q, *own, **run | {"cache_seqlens": length})


@EVERYWHERE
@pytest.mark.parametrize("scales", SCALES)
def test_fp8(backend, rng, scales):
    q, (k, v) = normal(rng, (4, 20, 8, 64), "float16"), normal(rng, (2, 4, 20, 2, 64), "float16")
    cache = paged(rng, held(rng, "float16", LENGTHS, kv_dtype=FP8[0]), 16, capacity=90)
    options = {"cache_seqlens": ints(*LENGTHS), "k": k, "v": v, "kv_dtype": FP8[0]} | SCALES[scales](2)
    agrees(backend, "attention_with_kvcache", with_cache(backend, q, cache), **cache.places, **options)


@EVERYWHERE
def test_nothing_to_do(backend, rng):
    for batch, seqlen_q in ((0, 5), (2, 0)):
        make = fixed_arrays(backend, *qkv(rng, "float16", batch=batch, seqlen_q=seqlen_q))
        plan = agrees(backend, "attention", make, return_lse=True)
        assert plan.workspace_bytes == 0 and plan.plan is None
    q, k, v, ends, _ = packed(rng, "float16", [], [])
    agrees(backend, "attention_varlen", fixed_arrays(backend, q, k, v, ends), return_lse=True)


@EVERYWHERE
def test_ragged_arrays(backend, rng):
    """They bring their cu_seqlens, and come back."""
    q, k, v, ends, _ = packed(rng, "float16", [5, 0, 70], [5, 0, 70])
    q, k, v = (RaggedArray(backend.put(x), ends) for x in (q, k, v))
    plan = PrefillPlan(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = attention_varlen(q, k, v, causal=True, return_lse=True)
    for out in (None, q.with_values(backend.put(np.empty((75, 4, 64), np.float16)))):
        got, lse = plan.run(q, k, v, out=out)
        assert type(got) is RaggedArray and (out is None or got is out)
        same(backend, (got.values, lse), (expected.values, expected_lse))
    got, lse = plan.run(q.values, k.values, v.values, q.cu_seqlens, q.cu_seqlens)
    same(backend, (got, lse), (expected.values, expected_lse))
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: got shape \(3,\), expected \(4,\), as planned"):
        plan.run(*(RaggedArray(x.values, [0, 5, 75]) for x in (q, k, v)))


@EVERYWHERE
def test_strided_outputs(backend, rng):
    q, k, v = (backend.put(x) for x in qkv(rng, "float16"))
    out = backend.put(np.zeros((2, 4, 70, 64), np.float16)).swapaxes(1, 2)
    plan = PrefillPlan(q, k, v, out=out)
    assert plan.run(q, k, v, out=out) is out
    same(backend, backend.put(np.ascontiguousarray(backend.get(out))), attention(q, k, v))
    with pytest.raises(
        ValueError, match=r"^out: got None, expected one with strides \(17920, 64, 4480, 1\), as planned"
    ):
        plan.run(q, k, v)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_arrays_of_other_libraries(rng, library):
    """A plan made with NumPy arrays runs with others; the result is of the queries' library."""
    made = pytest.importorskip("torch" if library == "torch" else "jax.numpy")
    convert = made.from_numpy if library == "torch" else made.asarray
    given = qkv(rng, "float32")
    plan = PrefillPlan(*given, return_lse=True)
    got = plan.run(*(convert(x) for x in given))
    assert all(type(x) is type(convert(given[0])) for x in got)
    for one, other in zip(got, attention(*given, return_lse=True), strict=True):
        np.testing.assert_array_equal(np.asarray(one), other)


def test_a_plan_keeps_no_array(rng):
    gone = []
    q, k, v = qkv(rng, "float16")
    for example in (q, k, v):
        weakref.finalize(example, gone.append, 1)
    plan = PrefillPlan(q, k, v)
    del q, k, v, example
    assert gone == [1, 1, 1] and plan.kernel == "numpy"


# ----------------------------------------------------------------------------------------------- random problems


@EVERYWHERE
def test_random_problems(backend):
    """All three forms, whatever their sizes and options: the plain call's bits."""

    @settings(max_examples=10 if backend.on_gpu else 150)
    @given(st.data())
    def holds(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        dtype = data.draw(st.sampled_from(["float16", "float32"]))
        heads, kv_heads = data.draw(st.sampled_from([(4, 2), (3, 3), (4, 1)]))
        pairs = st.tuples(st.integers(0, 30), st.integers(0, 50))
        lengths_q, lengths_k = zip(*data.draw(st.lists(pairs, min_size=1, max_size=4)), strict=True)
        batch, blocks = len(lengths_q), data.draw(st.booleans())
        options = data.draw(masks(batch, heads, backend.on_gpu)) | {"return_lse": data.draw(st.booleans())}
        pairs = held(rng, dtype, lengths_k, kv_heads=kv_heads)
        form = data.draw(st.sampled_from(["attention", "attention_varlen", "attention_with_kvcache"]))
        if form == "attention":
            sizes = {"batch": batch, "seqlen_q": lengths_q[0], "seqlen_k": lengths_k[0]}
            given = qkv(rng, dtype, **sizes, heads=heads, kv_heads=kv_heads)
            agrees(backend, form, fixed_arrays(backend, *given), **options)
        elif form == "attention_varlen":
            q, k, v, *ends = packed(rng, dtype, lengths_q, lengths_k, heads=heads, kv_heads=kv_heads)
            make = fixed_arrays(backend, q, k, v)
            if blocks:
                cache = paged(rng, pairs, 16, data.draw(st.sampled_from(["NHD", "HND"])), capacity=1)
                make, options = with_cache(backend, q, cache), options | cache.places
            agrees(backend, form, make, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], **options)
        else:
            seqlen_q, seqlen_new = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 20))
            options["cache_seqlens"] = np.array(lengths_k, np.int32)
            if data.draw(st.booleans()):
                k, v = normal(rng, (2, batch, seqlen_new, kv_heads, 64), dtype)
                options |= {"k": k, "v": v}
                options |= tables(rng, 80, 8, dtype) if data.draw(st.booleans()) else {}
            cache = paged(rng, pairs, 16, capacity=80) if blocks else dense(pairs, 80, range(batch)[::-1])
            make = with_cache(backend, normal(rng, (batch, seqlen_q, heads, 64), dtype), cache)
            agrees(backend, form, make, **options, **cache.places)

    holds()


# ---------------------------------------------------------------------------------------------- what is refused


AS_PLANNED = "as planned: make another plan for anything else$"


@EVERYWHERE
def test_other_arrays_than_planned_are_refused(backend, rng):
    q, k, v, ends_q, ends_k = packed(rng, "float16", [5, 70], [9, 130])
    given = dict(
        zip(("q", "k_cache", "v_cache", "cu_seqlens_q", "cu_seqlens_k"), (q, k, v, ends_q, ends_k), strict=True)
    )
    run = put(backend, given | features(rng, "sinks"))
    plan = PrefillPlan(**run, causal=True)

    def refused(message, **changes):
        room = backend.put(np.full_like(q, 7))
        with pytest.raises((TypeError, ValueError), match=f"^{message}, {AS_PLANNED}"):
            plan.run(**{"out": room} | run | put(backend, changes))
        assert (backend.get(room) == 7).all()

    refused(r"q: got shape \(74, 4, 64\), expected \(75, 4, 64\)", q=q[1:])
    refused("q: got float32, expected float16", q=q.astype(np.float32))
    refused(r"k: got shape \(138, 2, 64\), expected \(139, 2, 64\)", k_cache=k[1:])
    wide = backend.put(np.concatenate([v, v], 2))[:, :, :64]
    refused(r"v: got strides \(256, 128, 1\), expected \(128, 64, 1\)", v_cache=wide)
    refused(r"cu_seqlens_q: got shape \(4,\), expected \(3,\)", cu_seqlens_q=ints(0, 1, 2, 3))
    refused(r"cu_seqlens_q: got None, expected an array of int32, shape \(3,\), on .*", cu_seqlens_q=None)
    refused("cu_seqlens_k: got None, expected an array of int32, .*", cu_seqlens_k=None)
    refused("cu_seqlens_k: got int64, expected int32", cu_seqlens_k=ends_k.astype(np.int64))
    refused("seqused_k: got an array, expected None", seqused_k=ints(1, 2))
    refused("cache_seqlens: got an array, expected None", cache_seqlens=ints(1, 2))
    refused("cache_seqlens: got 3, expected None", cache_seqlens=3)
    refused("block_table: got an array, expected None", block_table=ints(0)[None])
    refused("sinks: got None, expected an array of float32, .*", sinks=None)
    refused("k: got an array, expected None", k=array(2, 1, 2, 64))
    refused("k_scale: got 2.0, expected None", k_scale=2.0)
    refused(r"out: got shape \(75, 4, 63\), expected \(75, 4, 64\)", out=array(75, 4, 63))
    if backend.on_gpu:
        with pytest.raises(ValueError, match=f"^v: got an array on cpu, expected one on cuda:0, {AS_PLANNED}"):
            plan.run(**run | {"v_cache": v})
    else:
        with pytest.raises(ValueError, match="^cu_seqlens_q: got 99 as its last entry, expected at most 75"):
            plan.run(**run | {"cu_seqlens_q": ints(0, 5, 99)})


@EVERYWHERE
def test_lengths_have_the_name_that_was_planned(backend, rng):
    q, k, v = (backend.put(x) for x in qkv(rng, "float16"))
    lengths = backend.put(ints(9, 8))
    plan = PrefillPlan(q, k, v, cache_seqlens=lengths)
    plan.run(q, k, v, cache_seqlens=lengths)
    with pytest.raises(ValueError, match="^seqused_k: got an array, expected None, as planned"):
        plan.run(q, k, v, cache_seqlens=lengths, seqused_k=lengths)
    with pytest.raises(TypeError, match="^cache_seqlens: got None, expected an array of int32"):
        plan.run(q, k, v)
    with pytest.raises(TypeError, match="^k_cache: got float32"):
        plan.run(q, k.astype(np.float32), v, cache_seqlens=lengths)
    plan = PrefillPlan(q, k, v)
    with pytest.raises(TypeError, match="^k: got float32"):
        plan.run(q, k.astype(np.float32), v)


@EVERYWHERE
def test_memory_that_is_shared_is_refused(backend, rng):
    q, k, v = (backend.put(x) for x in qkv(rng, "float16", seqlen_q=20, seqlen_k=20, kv_heads=4))
    plan = PrefillPlan(q, k, v)
    for name, out in (("q", q), ("k", k), ("v", v)):
        with pytest.raises(ValueError, match=f"^out: got an array whose memory range meets {name}'s"):
            plan.run(q, k, v, out=out)
    caches = backend.put(np.zeros((2, 2, 40, 4, 64), np.float16))
    plan = PrefillPlan(q, *caches, k=k, v=v, cache_seqlens=3)
    inside = caches[0].reshape(-1)[: k.size].reshape(k.shape)
    with pytest.raises(ValueError, match="^k: got an array whose memory range meets k_cache's"):
        plan.run(q, *caches, k=inside, v=v, cache_seqlens=3)
    assert not backend.get(caches).any()


@EVERYWHERE
def test_what_no_call_could_be_is_refused_when_planned(backend, rng):
    q, k, v = (backend.put(x) for x in qkv(rng, "float16"))
    ends = backend.put(ints(0, 70))
    for message, options in (
        ("kernel: got 'none'", {"kernel": "none"}),
        ("check: got 'yes'", {"check": "yes"}),
        ("window: got 3", {"window": 3}),
        ("q: got 4-D shape", {"cu_seqlens_q": ends}),
        ("cache_seqlens: got given together with cu_seqlens_q", {"cu_seqlens_q": ends, "cache_seqlens": 3}),
        ("num_splits: got given together with cu_seqlens_q", {"cu_seqlens_q": ends, "num_splits": 2}),
        ("max_seqlen_q: got given without cu_seqlens_q", {"max_seqlen_q": 70}),
        ("seqused_k: got given without cu_seqlens_q", {"seqused_k": ends}),
        ("k: got None", {"rotary_cos": k, "rotary_sin": k}),
        ("cache_seqlens: got None", {"k": k, "v": v}),
        ("out: got an array whose memory range meets q's", {"out": q}),
    ):
        if message.startswith("k: got None"):
            options = put(backend, tables(rng, 100, 32, "float32"))
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            PrefillPlan(q, k, v, **options)


# --------------------------------------------------------------------------------------------------- properties


def test_properties_on_the_cpu(rng):
    q, k, v = qkv(rng, "float32")
    plan = PrefillPlan(q, k, v, window=(5, 0))
    assert (plan.workspace_bytes, plan.plan, plan.device, plan.kernel) == (0, None, "cpu", "numpy")
    assert plan.problem.window == (5, 0) and plan.problem.seqlen_q == 70
    numbers = "batch 2, 70 queries, dense keys, 4 heads over 2 kv heads, head_dim 64, float32"
    assert repr(plan) == f"<PrefillPlan numpy on cpu: {numbers}>"
    assert str(plan) == f"PrefillPlan: numpy on cpu\n  {numbers}\n  workspace 0 bytes"
    assert PrefillPlan(q, k, v, kernel="numpy_float64").run(q, k, v).dtype == np.float64


def test_examples():
    results = doctest.testmod(prefill_plan)
    assert results.attempted and not results.failed


# ----------------------------------------------------------------------------- launches, with a driver stood in for

NEW = 0xE0000000  # what the stand-in for CuPy's allocator gives
calls = importlib.import_module("cupyattn.attention")  # whose name in the package is the function's


class Launches(Driver):
    """Launches of plans, and apart from them those of plain calls.

    Each is (kernel, blocks, threads, shared bytes, stream, arguments); a plan's must come behind the same plain one.
    """

    def __init__(self, monkeypatch, arch="90a"):
        super().__init__(monkeypatch)
        self.plain, self.encoded, self.rotated = [], [], 0

        def load(name, *rest):
            function = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=name))
            return types.SimpleNamespace(function=function, meta={})

        def enqueue(function, grid, block, arguments, shared, stream):
            form = function.kernel.ptr, *grid, *block, shared, stream
            self.plain.append((*form, list(arguments)))

        def encode(pointer, *form):
            assert pointer % 16 == 0, "the driver refuses it"
            self.encoded.append(pointer)
            return pointer.to_bytes(8, "little") + repr(form).encode()[:120].ljust(120)

        def empty(like, shape, dtype):
            return arrays.view(at_address(NEW, shape, dtype))

        monkeypatch.setattr(launch.jit, "load", load)
        monkeypatch.setattr(launch, "encode", encode)
        monkeypatch.setattr(launch, "workspace", lambda *form: workspace.Workspace(0, 0))
        monkeypatch.setattr(launch, "empty", lambda like, *form: arrays.view(at_address(self.rotated, *form)))
        monkeypatch.setattr(calls, "empty", empty)
        monkeypatch.setattr(calls, "remembered", {})
        for module in (launch, merge, rotary):
            monkeypatch.setattr(module, "enqueue", enqueue)
            monkeypatch.setattr(module, "describe_device", lambda device: DEVICES[arch])

    def launch(self, *arguments):
        kernel, grid, _, _, threads, _, _, shared, stream, location, extra = arguments
        sizes = [len(text) for text in next(plain[-1] for plain in self.plain if plain[0] == kernel)]
        pointers = (ctypes.c_void_p * len(sizes)).from_address(location)
        texts = [ctypes.string_at(pointer, size) for pointer, size in zip(pointers, sizes, strict=True)]
        self.launches.append((kernel, grid, threads, shared, stream, texts))
        assert extra == 0


@pytest.fixture
def launches(monkeypatch):
    yield Launches(monkeypatch)
    for cached in (launch._current, workspace._is_capturing):
        cached.cache_clear()


class Made:
    """The arguments of calls, each array at an address of its own behind `base`."""

    def __init__(self, base=0x1000000):
        self.next = base

    def array(self, *shape, dtype="float16"):
        self.next += 0x1000000
        return at_address(self.next, shape, dtype)

    def ints(self, *shape):
        return self.array(*shape, dtype="int32")

    def dense(self, dtype="float16", seqlen_q=300, seqlen_k=700):
        keys = 2, seqlen_k, 2, 64
        return [self.array(*shape, dtype=dtype) for shape in ((2, seqlen_q, 8, 64), keys, keys)]

    def packed(self, *keys):
        return [self.array(500, 8, 64), self.array(*keys, 2, 64), self.array(*keys, 2, 64), self.ints(4)]

    def rows(self, dtype="float16", rotates=True):
        made = {name: self.array(2, 300, 2, 64, dtype=dtype) for name in "kv"}
        names = ("rotary_cos", "rotary_sin") if rotates else ()
        return made | {name: self.array(800, 32, dtype="float32") for name in names}


# (function, arguments by position, others), each of new arrays
FORMS = {
    "dense": lambda made: ("attention", made.dense(), {"causal": True, "return_lse": True}),
    "float32": lambda made: ("attention", made.dense("float32"), {"sinks": made.array(8, dtype="float32")}),
    "few queries": lambda made: ("attention", made.dense(seqlen_q=3), {"return_lse": True}),
    "many keys": lambda made: ("attention", made.dense(seqlen_q=20, seqlen_k=3000), {}),
    "many keys, lse": lambda made: ("attention", made.dense(seqlen_q=20, seqlen_k=9000), {"return_lse": True}),
    "many keys, lse to base 2": lambda made: (
        "attention",
        made.dense(seqlen_q=20, seqlen_k=9000),
        {"return_lse": "log2"},
    ),
    "packed": lambda made: (
        "attention_varlen",
        [*made.packed(700), made.ints(4)],
        {"seqused_k": made.ints(3), "max_seqlen_q": 200, "return_lse": True},
    ),
    "one cu_seqlens": lambda made: ("attention_varlen", made.packed(500), {"window": (9, 9)}),
    "packed over blocks": lambda made: (
        "attention_varlen",
        made.packed(50, 16),
        {"seqused_k": made.ints(3), "block_table": made.ints(3, 20), "alibi_slopes": made.array(8, dtype="float32")},
    ),
    "cache": lambda made: (
        "attention_with_kvcache",
        made.dense(),
        {"cache_seqlens": made.ints(2), "cache_leftpad": made.ints(2), "cache_batch_idx": made.ints(2)},
    ),
    "one length": lambda made: ("attention_with_kvcache", made.dense(), {"cache_seqlens": 17}),
    "append": lambda made: (
        "attention_with_kvcache",
        made.dense(),
        {"cache_seqlens": made.ints(2), **made.rows(rotates=False)},
    ),
    "rotary": lambda made: (
        "attention_with_kvcache",
        made.dense(),
        {"cache_seqlens": made.ints(2), **made.rows(), "causal": True, "return_lse": True},
    ),
    "rotary, one length, float32": lambda made: (
        "attention_with_kvcache",
        made.dense("float32"),
        {"cache_seqlens": 400, **made.rows("float32")},
    ),
    "rotary, many keys": lambda made: (
        "attention_with_kvcache",
        made.dense(seqlen_k=9000),
        {"cache_seqlens": made.ints(2), "num_splits": 3, **made.rows()},
    ),
}
STEPS = ["append_kv", "rotary"]


@pytest.mark.parametrize(
    ("form", "arch", "kernels"),
    [
        ("dense", "90a", ["forward_sm90"]),
        ("dense", "80", ["forward_sm80"]),
        ("float32", "90a", ["forward_simt"]),
        ("few queries", "90a", ["decode"]),
        ("many keys", "90a", ["forward_sm90", "merge_states"]),
        ("many keys, lse", "80", ["forward_sm80", "merge_states"]),
        ("many keys, lse to base 2", "90a", ["forward_sm90", "merge_states"]),
        ("packed", "90a", ["forward_sm90"]),
        ("packed", "75", ["forward_sm80"]),
        ("one cu_seqlens", "90a", ["forward_sm90"]),
        ("packed over blocks", "90a", ["forward_sm90"]),
        ("cache", "90a", ["forward_sm90"]),
        ("one length", "80", ["forward_sm80"]),
        ("append", "90a", ["append_kv", "forward_sm90"]),
        ("rotary", "90a", [*STEPS, "forward_sm90"]),
        ("rotary", "80", [*STEPS, "forward_sm80"]),
        ("rotary, one length, float32", "80", [*STEPS, "forward_simt"]),
        ("rotary, many keys", "90a", [*STEPS, "forward_sm90", "merge_states"]),
    ],
)
def test_a_run_launches_what_the_plain_call_does(launches, monkeypatch, form, arch, kernels):
    """The same kernels in the same order, with the same arguments byte for byte; also when all arrays are others."""
    function, example, options = FORMS[form](Made())
    for kind in (PrefillPlan, DecodePlan) if function == "attention_with_kvcache" else (PrefillPlan,):
        made = Launches(monkeypatch, arch)
        made.stream = 7
        plan = kind(*example, **options)
        if "rotary" in kernels:  # the plain call rotates into a new array
            made.rotated = workspace.Workspace(0, 0).pointer + plan.workspace_bytes - example[0].nbytes
        for base in (0x1000000, 0x100000000):
            _, given, others = FORMS[form](Made(base))
            out = at_address(base, given[0].shape, given[0].dtype)
            getattr(cupyattn, function)(*given, **others, out=out)
            plan.run(*given, **apart(others)[0], out=out)
            assert [kernel for kernel, *_ in made.launches] == kernels
            assert made.launches == made.plain
            made.launches.clear()
            made.plain.clear()


def test_new_outputs(launches):
    for form, lse_shape in (("dense", (2, 8, 300)), ("packed", (8, 500))):
        function, given, options = FORMS[form](Made())
        run, _ = apart(options)
        getattr(cupyattn, function)(*given, **options)
        out, lse = PrefillPlan(*given, **options).run(*given, **run)
        assert (out.data.ptr, out.shape, out.dtype) == (NEW, given[0].shape, np.float16)
        assert (lse.data.ptr, lse.shape, lse.dtype) == (NEW, lse_shape, np.float32)
        assert launches.launches == launches.plain


def test_maps_are_made_of_what_has_moved(launches):
    """A tensor map takes the host longer than all else; those of layers that come back are kept."""
    layers = [FORMS["dense"](Made(base))[1] for base in (0x1000000, 0x100000000)]
    out = at_address(0x9000000, (2, 300, 8, 64))
    attention(*layers[0], causal=True, out=out)
    launches.encoded.clear()
    plan = PrefillPlan(*layers[0], causal=True)
    for layer in (*layers, *layers):
        plan.run(*layer, out=out)
    q = at_address(0xA000000, (2, 300, 8, 64))
    plan.run(q, *layers[0][1:], out=out)
    pointers = [x.data.ptr for x in (*layers[0], out, *layers[1], q)]
    assert launches.encoded == pointers
    assert len(launches.launches) == 5 and launches.launches[0] == launches.launches[2] == launches.plain[0]


def test_what_is_refused_leaves_nothing_behind(launches):
    """A run that is refused, also for where an array lies, launches nothing, and the next has its own addresses."""
    _, given, _ = FORMS["dense"](Made())
    out = at_address(0x9000000, (2, 300, 8, 64))
    attention(*given, out=out)
    plan = PrefillPlan(*given)
    for changes, message in (
        ({"v_cache": at_address(0xA000002, (2, 700, 2, 64))}, "v: got an array at an address that 16 does not divide"),
        ({"q": at_address(0xA000000, (2, 301, 8, 64))}, "q: got shape"),
        ({"q": at_address(0x9000000, (2, 300, 8, 64))}, "out: got an array whose memory range meets q's"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            plan.run(**dict(zip(("q", "k_cache", "v_cache"), given, strict=True)) | changes, out=out)
        assert launches.launches == []
        plan.run(*given, out=out)
        assert launches.launches == launches.plain
        launches.launches.clear()


def test_only_a_plan_with_a_workspace_keeps_it_for_graphs(launches, monkeypatch):
    for arch, kept in (("80", 0), ("90a", 1)):
        made = Launches(monkeypatch, arch)
        _, given, _ = FORMS["dense"](Made())
        attention(*given)
        plan = PrefillPlan(*given)
        made.stream, made.capturing = 5, True
        plan.run(*given)
        plan.run(*given)
        assert len(workspace._kept) == kept and plan.workspace_bytes == kept * COUNTER_BYTES


def test_a_plan_describes_its_launch(launches):
    plan = PrefillPlan(*FORMS["rotary"](Made())[1], **FORMS["rotary"](Made())[2])
    assert plan.kernel == plan.plan.kernel == "forward_sm90"
    assert plan.workspace_bytes == plan.plan.workspace_bytes + 2 * 300 * 8 * 64 * 2
    text = str(plan)
    assert "forward_sm90 on cuda:0" in text and "because" in text and f"workspace {plan.workspace_bytes} bytes" in text


@pytest.mark.parametrize("form", ["dense", "packed", "rotary"])
def test_the_host_does_little(launches, form):
    """Python's own share of a run of arrays that stay and of one with other queries; the driver is stood in for."""
    _, (q, *given), options = FORMS[form](Made())
    options.pop("return_lse")
    run, _ = apart(options)
    plan = PrefillPlan(q, *given, **options)
    plan._planned._launches = [max for _ in plan._planned._launches]
    out = at_address(0x9000000, q.shape)
    others = [at_address(base, q.shape) for base in (0xA00000000, 0xB00000000)]
    for run_once, most in (
        (lambda i: plan.run(q, *given, **run, out=out), 15e-6),  # 3 on an idle core
        (lambda i: plan.run(others[i % 2], *given, **run, out=out), 30e-6),  # 6
    ):
        best = min(seconds(run_once, 2000) for _ in range(10))
        assert best < most, f"{best * 1e6:.1f} µs"


# --------------------------------------------------------------------------------------------- on a real device


class Prompts:
    """Chunks of prompts in fixed arrays whose contents change: each is appended and attended to where the last ended.

    A plan runs them on one cache, attention_with_kvcache on another.
    """

    def __init__(self, rng, convert, read, write):
        self.rng, self.read, self.write = rng, read, write
        cache = paged(rng, held(rng, "float16", [0, 3, 60, 17]), 16, capacity=400)
        self.own, self.eager = convert(cache.array), convert(cache.array)
        self.lengths = ints(0, 3, 60, 17)
        self.q = convert(normal(rng, (4, 32, 8, 64), "float16"))
        self.arrays = {"cache_seqlens": self.lengths, "block_table": cache.places["block_table"]}
        self.arrays |= {name: normal(rng, (4, 32, 2, 64), "float16") for name in "kv"} | tables(rng, 400, 32, "float32")
        self.arrays = {name: convert(x) for name, x in self.arrays.items()}
        self.fixed = {"causal": True, "return_lse": True}
        self.plan = PrefillPlan(self.q, *self.caches(self.own), **self.arrays, **self.fixed)

    @staticmethod
    def caches(whole):
        return whole[:, 0], whole[:, 1]

    def run(self):
        return self.plan.run(self.q, *self.caches(self.own), **self.arrays)

    def check(self, results):
        given = self.q, *self.caches(self.eager)
        expected = cupyattn.attention_with_kvcache(*given, **self.arrays, **self.fixed)
        for one, other in zip((*results, self.own), (*expected, self.eager), strict=True):
            assert self.read(one).tobytes() == self.read(other).tobytes()
        assert not np.isnan(self.read(results[0])).any()

    def change(self):
        """The next chunk of each prompt."""
        self.lengths += self.rng.integers(0, 32, 4, np.int32)
        self.write(self.arrays["cache_seqlens"], self.lengths)
        for written in (self.q, self.arrays["k"], self.arrays["v"]):
            self.write(written, normal(self.rng, tuple(written.shape), "float16"))


def test_what_arrays_hold_may_change(rng):
    prompts = Prompts(rng, np.array, np.asarray, np.copyto)
    for _ in range(10):
        prompts.check(prompts.run())
        prompts.change()


@pytest.mark.gpu
def test_a_cupy_graph_stays_right(rng):
    import cupy

    prompts = Prompts(rng, cupy.array, cupy.asnumpy, lambda array, values: array.set(values))
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        results = prompts.run()
        graph = stream.end_capture()
        for _ in range(10):
            results[0].fill(np.nan)
            graph.launch(stream)
            prompts.check(results)
            prompts.change()


@pytest.mark.gpu
def test_a_torch_graph_stays_right(rng):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    prompts = Prompts(
        rng,
        lambda array: torch.from_numpy(array.copy()).cuda(),
        lambda tensor: tensor.cpu().numpy(),
        lambda tensor, values: tensor.copy_(torch.from_numpy(values)),
    )
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = prompts.run()
    for _ in range(10):
        results[0].fill_(float("nan"))
        graph.replay()
        prompts.check(results)
        prompts.change()


@pytest.mark.gpu
def test_a_graph_of_packed_rows_that_are_split_otherwise(rng):
    """Replays read cu_seqlens as they are then. The graph outlives its plan and the plan's workspace."""
    import cupy

    q, k, v, ends, _ = (cupy.asarray(x) for x in packed(rng, "float16", [100, 0, 28], [100, 0, 28]))
    plan = PrefillPlan(q, k, v, ends, causal=True)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        out = plan.run(q, k, v, ends)
        graph = stream.end_capture()
        del plan
        others = [cupy.full(COUNTER_BYTES, 0xFF, np.uint8) for _ in range(3)]
        for lengths in ([100, 0, 28], [1, 126, 1], [0, 0, 5]):
            ends.set(cumulative(lengths))
            out.fill(np.nan)
            graph.launch(stream)
            assert out.get().tobytes() == attention_varlen(q, k, v, ends, causal=True).get().tobytes()
        assert len(others) == 3


@pytest.mark.gpu
def test_layers_in_turn(rng):
    """One plan for arrays at many addresses: each run reads its own."""
    import cupy

    layers = [[cupy.asarray(x) for x in qkv(rng, "float16")] for _ in range(8)]
    plan = PrefillPlan(*layers[0], causal=True)
    got = [plan.run(*layer) for _ in range(3) for layer in layers]
    for i, out in enumerate(got):
        assert out.get().tobytes() == attention(*layers[i % 8], causal=True).get().tobytes()


@pytest.mark.gpu
def test_torch_tensors_and_mixed_libraries_on_a_device(rng):
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    host = qkv(rng, "float16")
    ours, theirs = [cupy.asarray(x) for x in host], [torch.from_numpy(x).cuda() for x in host]
    plan = PrefillPlan(*ours)
    expected = plan.run(*ours).get().tobytes()
    assert plan.run(*theirs).cpu().numpy().tobytes() == expected
    assert plan.run(theirs[0], *ours[1:]).cpu().numpy().tobytes() == expected
    assert plan.run(ours[0], *theirs[1:], out=cupy.empty_like(ours[0])).get().tobytes() == expected
