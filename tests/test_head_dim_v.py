"""Values whose head_dim is another than that of queries and keys, as in DeepSeek's 192 and 128: every form of call on
every backend against the oracle, appends, plans and states, and what serves such a call.

On CUDA each pair of dimensions is compiled anew for each form, so that it runs in one half type, and in float32 without
tensor cores.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from oracle import cumulative, dense_cache, normal, paged_cache
from problems import make_problem, make_step
from test_append import append
from test_decode import tables
from test_forward import features
from test_prefill_plan import agrees, fixed_arrays
from test_problem import refused
from test_shared_prefix import check as check_merged

import cupyattn
from cupyattn import DecodePlan, RaggedArray, attention, attention_varlen, attention_with_kvcache
from cupyattn.arrays import view
from cupyattn.jit.compile import compile_cubin
from cupyattn.plan import DEVICES, HOPPER_TILES, choose_kernel, plan, plan_append, prefix_kernel
from cupyattn.problem import describe_append

DIMS = ((192, 128), (128, 64), (64, 128), (72, 40), (40, 72))  # of q and k, and of v and out
ODD_DIMS = ((7, 3), (1, 65), (33, 1), (64, 256), (256, 8))  # not for the copy engine, or not near one another

FORWARD = pytest.mark.backends("numpy", "cuda", "cuda-sm90", "cuda-simt")
EVERYWHERE = pytest.mark.backends("numpy", "cuda")


def dtype_of(backend, dims):
    """Half types in turn on tensor cores, else float32."""
    half = backend.on_gpu and backend.kernel != "forward_simt"
    return ("float16", "bfloat16")[sum(dims) // 8 % 2] if half else "float32"


def qkv(rng, dtype, dims, *, batch=2, seqlen_q=70, seqlen_k=150, heads=4, kv_heads=2):
    """Dense q, k and v."""
    q = normal(rng, (batch, seqlen_q, heads, dims[0]), dtype)
    return q, *(normal(rng, (batch, seqlen_k, kv_heads, dim), dtype) for dim in dims)


def held(rng, dtype, dims, lengths, kv_heads=2):
    """(keys, values) of each sequence."""
    return [tuple(normal(rng, (length, kv_heads, dim), dtype) for dim in dims) for length in lengths]


def paged(rng, pairs, block_size, layout="NHD", capacity=0):
    """(the base and the view of it that holds the keys), the same for the values, and the block table: halves of one
    array with room for the wider rows, whose other elements are NaN."""
    dims = [rows.shape[-1] for rows in pairs[0]]
    wide = max(dims)
    room = [
        tuple(np.pad(x, [(0, 0), (0, 0), (0, wide - x.shape[-1])], constant_values=np.nan) for x in p) for p in pairs
    ]
    cache, table = paged_cache(rng, room, block_size, capacity)
    if layout == "HND":
        cache = np.ascontiguousarray(cache.swapaxes(2, 3))
    return (cache, lambda c: c[:, 0, ..., : dims[0]]), (cache, lambda c: c[:, 1, ..., : dims[1]]), table


# ------------------------------------------------------------------------------------------------------ results


@FORWARD
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_dense(backend, rng, dims):
    q, k, v = qkv(rng, dtype_of(backend, dims), dims)
    backend.agrees("attention", q, k, v)
    backend.agrees("attention", q, k, v, causal=True)
    backend.agrees("attention", q, k, v, **features(rng, "window", "sinks"))


@EVERYWHERE
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dims", ODD_DIMS, ids=str)
@pytest.mark.when(holds=lambda backend, dtype, dims: not backend.on_gpu or (dtype == "float32") == (dims[0] % 8 > 0))
def test_odd_dims(backend, rng, dims, dtype):
    backend.agrees("attention", *qkv(rng, dtype, dims, batch=1), causal=True)


@FORWARD
def test_scores_that_are_shaped(backend, rng):
    q, k, v = qkv(rng, dtype_of(backend, (192, 128)), (192, 128))
    backend.agrees("attention", q, k, v, causal=True, **features(rng, "softcap", "alibi"))


@FORWARD
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_packed(backend, rng, dims):
    dtype, lengths_q, lengths_k = dtype_of(backend, dims), [5, 0, 130, 33], [9, 4, 200, 33]
    q = normal(rng, (sum(lengths_q) + 2, 6, dims[0]), dtype)  # the last rows are nobody's
    k, v = (normal(rng, (sum(lengths_k), 2, dim), dtype) for dim in dims)
    backend.agrees("attention_varlen", q, k, v, cumulative(lengths_q), cumulative(lengths_k), causal=True)


@FORWARD
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.when(holds=lambda backend, dims, layout: not backend.on_gpu or layout == "NHD" or dims == (192, 128))
def test_paged(backend, rng, dims, layout):
    """The rows of a wider array, and contiguous ones."""
    dtype, lengths_q, lengths_k = dtype_of(backend, dims), [5, 130, 33], [9, 200, 33]
    q = normal(rng, (sum(lengths_q), 4, dims[0]), dtype)
    *caches, table = paged(rng, held(rng, dtype, dims, lengths_k), 16, layout)
    ends = cumulative(lengths_q), cumulative(lengths_k)
    options = {"block_table": table, "layout": layout, "causal": True}
    backend.agrees("attention_varlen", q, *(backend.place(*cache) for cache in caches), *ends, **options)
    apart = [np.ascontiguousarray(view(base)) for base, view in caches]
    backend.agrees("attention_varlen", q, *apart, *ends, **options)


@FORWARD
@pytest.mark.parametrize("seqlen_q", [1, 5, 40])
@pytest.mark.parametrize("dims", [(192, 128), (40, 72)], ids=str)
def test_steps_over_caches(backend, rng, dims, seqlen_q):
    """Queries that decode would take if all dimensions were one."""
    dtype, lengths = dtype_of(backend, dims), [60, 43, 100]
    pairs = held(rng, dtype, dims, lengths)
    q = normal(rng, (3, seqlen_q, 8, dims[0]), dtype)
    options = {"cache_seqlens": np.array(lengths, np.int32), "causal": True}
    caches = [dense_cache([pair[i] for pair in pairs], 110, [4, 0, 2]) for i in range(2)]
    places = {"cache_batch_idx": np.array([4, 0, 2], np.int32), "cache_leftpad": np.array([0, 3, 10], np.int32)}
    backend.agrees("attention_with_kvcache", q, *caches, **options, **places)
    *caches, table = paged(rng, pairs, 16)
    caches = [backend.place(*cache) for cache in caches]
    backend.agrees("attention_with_kvcache", q, *caches, **options, block_table=table)


@FORWARD
@pytest.mark.parametrize("dims", [(192, 128), (64, 128)], ids=str)
def test_few_rows_over_many_keys(backend, rng, dims):
    """Several blocks of forward_sm90 share the keys, and a merge puts their outputs together."""
    dtype = dtype_of(backend, dims)
    q, k, v = qkv(rng, dtype, dims, batch=1, seqlen_q=40, seqlen_k=4000)
    backend.agrees("attention", q, k, v, causal=True)


@EVERYWHERE
@pytest.mark.parametrize("dims", [(192, 128), (40, 72)], ids=str)
def test_large_tiles(backend, rng, dims):
    """More tiles than a GPU has multiprocessors."""
    dtype = dtype_of(backend, dims)
    if backend.on_gpu:
        q, k, v = qkv(rng, dtype, dims, batch=4, seqlen_q=300, seqlen_k=700, heads=24, kv_heads=12)
    else:
        q, k, v = qkv(rng, dtype, dims, seqlen_q=300, seqlen_k=700)
    backend.agrees("attention", q, k, v)
    backend.agrees("attention", q, k, v, causal=True)


@pytest.mark.backends("numpy")
def test_float64(backend, rng):
    q, k, v = qkv(rng, "float32", (48, 20))
    out = attention(q, k, v, causal=True, kernel="numpy_float64")
    oracle.attention(q, k, v, causal=True).check(out, None, "float64")


@EVERYWHERE
def test_out_takes_the_last_axis_of_v(backend, rng):
    q, k, v = (backend.put(x) for x in qkv(rng, "float16", (192, 128)))
    assert attention(q, k, v).shape == (2, 70, 4, 128)
    wide = backend.put(np.full((2, 70, 4, 200), 7, np.float16))
    assert (attention(q, k, v, out=wide[..., 8:136]) == attention(q, k, v)).all()
    assert (wide[..., :8] == 7).all() and (wide[..., 136:] == 7).all()
    expected = r"\(2, 70, 4, 128\), q's shape but for v's head_dim"
    with refused("out", r"shape \(2, 70, 4, 192\)", expected):
        attention(q, k, v, out=backend.put(np.zeros((2, 70, 4, 192), np.float16)))


@EVERYWHERE
def test_ragged_arrays(backend, rng):
    q, k, v = (normal(rng, (70, 4, dim), "float16") for dim in (72, 72, 40))
    q, k, v, ends = (backend.put(x) for x in (q, k, v, cumulative([30, 0, 40])))
    out = attention_varlen(*(RaggedArray(x, ends) for x in (q, k, v)), causal=True)
    assert len(out) == 3 and out[2].shape == (40, 4, 40)
    assert (out.values == attention_varlen(q, k, v, ends, causal=True)).all()


# ------------------------------------------------------------------------------------------------------- caches


@EVERYWHERE
@pytest.mark.parametrize("dims", (*DIMS, *ODD_DIMS), ids=str)
@pytest.mark.when(holds=lambda backend, dims: not backend.on_gpu or dims[0] != 256)
def test_append(backend, rng, dims):
    for dtype in ("float16", "float32"):
        pairs, lengths = held(rng, dtype, dims, [3, 0, 20]), np.array([3, 0, 20], np.int32)
        k, v = (normal(rng, (3, 5, 2, dim), dtype) for dim in dims)
        caches = [dense_cache([pair[i] for pair in pairs], 30) for i in range(2)]
        append(backend, *caches, k, v, cache_seqlens=lengths)
        *caches, table = paged(rng, pairs, 16, capacity=30)
        append(backend, *caches, k, v, cache_seqlens=lengths, block_table=table)


@EVERYWHERE
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dims", [(64, 24), (64, 200), (40, 72)], ids=str)
def test_append_with_rotary(backend, rng, dims, interleaved):
    """All of a key is rotated, or half of it: more elements than a value has, or fewer."""
    for rotated in (dims[0], dims[0] // 2):
        pairs, lengths = held(rng, "float16", dims, [3, 20]), np.array([3, 20], np.int32)
        k, v = (normal(rng, (2, 5, 2, dim), "float16") for dim in dims)
        base = [dense_cache([pair[i] for pair in pairs], 30) for i in range(2)]
        options = {"cache_seqlens": lengths, "rotary_interleaved": interleaved}
        options |= tables(rng, 30, rotated // 2, "float32")
        caches = [backend.put(cache.copy()) for cache in base]
        here = {name: backend.put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        cupyattn.append_kv(*caches, backend.put(k), backend.put(v), **here)
        low, high = oracle.append_range(*base, k, v, **options)
        oracle.check_caches([backend.get(cache) for cache in caches], low, high)


@EVERYWHERE
def test_keys_and_values_side_by_side_in_one_row(backend, rng):
    """The last axis of one array holds a key and behind it a value, or the other way round."""
    lengths = np.array([3, 20], np.int32)
    for dims in ((72, 40), (40, 72)):
        k, v = (normal(rng, (2, 5, 2, dim), "float16") for dim in dims)
        cache = np.full((2, 30, 2, 112), np.nan, np.float16)
        append(backend, (cache, lambda c, d=dims[0]: c[..., :d]), (cache, lambda c, d=dims[0]: c[..., d:]), k, v)
        swapped = (cache, lambda c, d=dims[1]: c[..., d:]), (cache, lambda c, d=dims[1]: c[..., :d])
        append(backend, *swapped, k, v, cache_seqlens=lengths)


@EVERYWHERE
@pytest.mark.parametrize("start", [0, 71, 39], ids=["behind", "in", "among"])
def test_values_among_the_keys_are_refused(backend, start):
    cache = backend.put(np.zeros((1, 30, 2, 144), np.float16))
    k, v = (backend.put(np.ones((1, 5, 2, dim), np.float16)) for dim in (72, 40))
    with refused("v_cache", "overlaps k_cache", "a cache of its own"):
        cupyattn.append_kv(cache[..., :72], cache[..., start : start + 40], k, v)
    wide = backend.put(np.zeros((2, 30, 2, 72), np.float16))
    k, v = v[:1], k[:1]
    with refused("v_cache", "overlaps k_cache", "a cache of its own"):  # a row of values reaches into the next of keys
        cupyattn.append_kv(wide[:1, ..., 32:], wide[:1], k, v)


@EVERYWHERE
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("seqlen", [1, 20])
@pytest.mark.parametrize("is_paged", [False, True], ids=["dense", "paged"])
def test_append_and_attend(backend, rng, is_paged, seqlen, rotary):
    dims, lengths = (72, 40), [0, 15, 70]
    pairs = held(rng, "float16", dims, lengths)
    q = normal(rng, (3, seqlen, 8, dims[0]), "float16")
    k, v = (normal(rng, (3, seqlen, 2, dim), "float16") for dim in dims)
    options = {"k": k, "v": v, "cache_seqlens": np.array(lengths, np.int32), "causal": True}
    if rotary:
        options |= tables(rng, 100, 36, "float32")
    if is_paged:
        *caches, options["block_table"] = paged(rng, pairs, 16, capacity=100)
    else:
        caches = [(dense_cache([pair[i] for pair in pairs], 100), lambda cache: cache) for i in range(2)]
    bases = {id(base): backend.put(base.copy()) for base, _ in caches}
    moved = [view(bases[id(base)]) for base, view in caches]
    here = {name: backend.put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    out, lse = attention_with_kvcache(backend.put(q), *moved, **here, return_lse=True, kernel=backend.kernel)
    stored = tuple(backend.get(cache) for cache in moved)
    before = [view(base) for base, view in caches]
    placed = {name: x for name, x in options.items() if name not in ("k", "v", "causal")}
    oracle.check_caches(stored, *oracle.append_range(*before, k, v, **placed))
    expected = oracle.attention_with_kvcache(q, *before, **options, stored=stored)
    expected.check(backend.get(out), backend.get(lse), "float16")


@pytest.mark.backends("numpy")
def test_fp8(backend, rng):
    """The NumPy backend reads and writes such FP8 caches; on CUDA the decode kernel, which alone does, has none."""
    dims, lengths = (48, 20), np.array([3, 20], np.int32)
    caches = [np.full((2, 40, 2, dim), oracle.FP8_NAN, np.uint8) for dim in dims]
    scales = {"kv_dtype": "float8_e4m3fn", "k_scale": 0.02, "v_scale": np.array([0.02, 0.03], np.float32)}
    held_k, held_v = (normal(rng, (2, 20, 2, dim), "float32") for dim in dims)
    cupyattn.append_kv(*caches, held_k, held_v, **scales)
    q, k, v = normal(rng, (2, 4, 6, 48), "float32"), *(normal(rng, (2, 4, 2, dim), "float32") for dim in dims)
    options = {"k": k, "v": v, "cache_seqlens": lengths, "causal": True} | scales
    out, lse = attention_with_kvcache(q, *caches, **options, return_lse=True)
    oracle.attention_with_kvcache(q, *caches, **options, stored=tuple(caches)).check(out, lse, "float32")


# --------------------------------------------------------------------------------------------- plans and states


@EVERYWHERE
def test_prefill_plan(backend, rng):
    q, k, v = qkv(rng, "float16", (192, 128))
    made = agrees(backend, "attention", fixed_arrays(backend, q, k, v), causal=True, return_lse=True)
    assert made.problem.head_dim_v == 128
    packed = normal(rng, (70, 4, 192), "float16"), *(normal(rng, (70, 2, dim), "float16") for dim in (192, 128))
    agrees(backend, "attention_varlen", fixed_arrays(backend, *packed, cumulative([30, 0, 40])), causal=True)
    long = qkv(rng, "float16", (192, 128), batch=1, seqlen_q=40, seqlen_k=4000)
    agrees(backend, "attention", fixed_arrays(backend, *long), return_lse=True)


@EVERYWHERE
def test_decode_plan(backend, rng):
    dims, lengths = (72, 40), backend.put(np.array([9, 30], np.int32))
    q, k, v = normal(rng, (2, 1, 8, 72), "float16"), *(normal(rng, (2, 1, 2, dim), "float16") for dim in dims)
    q, k, v = (backend.put(x) for x in (q, k, v))
    held_rows = held(rng, "float16", dims, [9, 30])
    caches = [dense_cache([pair[i] for pair in held_rows], 40) for i in range(2)]
    step = {"k": k, "v": v, "cache_seqlens": lengths}
    step |= {name: backend.put(x) for name, x in tables(rng, 40, 36, "float32").items()}
    mine, eager = ([backend.put(cache.copy()) for cache in caches] for _ in range(2))
    made = DecodePlan(q, *mine, **step, causal=True)
    expected = attention_with_kvcache(q, *eager, **step, causal=True)
    for out in (None, backend.put(np.full((2, 1, 8, 40), np.nan, np.float16))):
        assert (made.run(q, *mine, **step, out=out) == expected).all()
    assert all(backend.get(x).tobytes() == backend.get(y).tobytes() for x, y in zip(mine, eager, strict=True))
    with refused("out", r"shape \(2, 1, 8, 72\)", r"\(2, 1, 8, 40\), as planned"):
        made.run(q, *mine, **step, out=backend.put(np.zeros((2, 1, 8, 72), np.float16)))


@EVERYWHERE
def test_states_are_merged(backend, rng):
    q, k, v = qkv(rng, "float32", (24, 40))
    here = [backend.put(x) for x in (q, k, v)]
    owns = slice(0, 60), slice(60, 150)
    parts = [attention(here[0], *(x[:, own] for x in here[1:]), return_lse=True) for own in owns]
    out, lse = cupyattn.merge_states(*zip(*parts, strict=True))
    oracle.attention(q, k, v).check(backend.get(out), backend.get(lse), "float32")


@EVERYWHERE
@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_a_shared_prefix(backend, rng, seqlen_q):
    dims = (72, 40)
    prefix, *pairs = held(rng, "float16", dims, [90, 50, 60])
    q = normal(rng, (2, seqlen_q, 4, 72), "float16")
    caches = [dense_cache([pair[i] for pair in pairs], 60) for i in range(2)]
    whole = [dense_cache([np.concatenate([prefix[i], pair[i]]) for pair in pairs], 150) for i in range(2)]
    lengths = np.array([50, 60], np.int32)
    arrays = [backend.put(x) for x in (q, *prefix, *caches)]
    room = backend.put(np.full((2, seqlen_q, 4, 40), np.nan, np.float16))
    expected = oracle.attention_with_kvcache(q, *whole, cache_seqlens=lengths + 90)
    for out in (None, room):
        options = {"cache_seqlens": backend.put(lengths), "out": out, "return_lse": True}
        got, lse = cupyattn.attention_with_shared_prefix(*arrays, **options)
        check_merged(expected, backend.get(got), backend.get(lse), "float16")
    arrays[2] = arrays[1]
    with refused("v_prefix", "head_dim 72", "v_cache's 40"):
        cupyattn.attention_with_shared_prefix(*arrays, cache_seqlens=backend.put(lengths))


# ------------------------------------------------------------------------------------------- kernels and refusals


@pytest.mark.parametrize("arch", ["80", "90a", "100a"])
def test_which_kernel_serves(arch):
    hopper = arch == "90a"
    for problem in (make_problem(192, head_dim_v=128), make_step(64, head_dim_v=128)):
        name, why = choose_kernel(problem, DEVICES[arch])
        assert name == ("forward_sm90" if hopper else "forward_simt")
        assert hopper or why == "head_dim_v differs from head_dim"
        for kernel in ("decode", "forward_sm80"):
            with refused("kernel", f"'{kernel}'", "head_dim_v differs from head_dim"):
                choose_kernel(problem, DEVICES[arch], kernel)
    name, why = choose_kernel(make_problem(192, head_dim_v=100), DEVICES[arch])
    assert name == "forward_simt" and ("multiples of 8" in why) is hopper
    with refused("kv_dtype", "float8_e4m3fn", "decode kernel, and head_dim_v differs from head_dim"):
        choose_kernel(make_step(64, head_dim_v=128, kv_dtype="float8_e4m3fn"), DEVICES[arch])
    assert prefix_kernel(make_step(64, head_dim_v=128), DEVICES[arch], False) == "auto"


def test_shared_memory_counts_each_head_dim():
    tile = HOPPER_TILES[-2].few
    columns = {192: 192, 128: 128, 100: 128, 64: 64, 8: 64}
    for head_dim in columns:
        for head_dim_v in columns:
            q, k = (rows * columns[head_dim] for rows in (tile.query_stages * tile.rows, tile.stages * tile.keys))
            v, out = tile.stages * tile.keys * columns[head_dim_v], tile.rows * 64 * tile.out_blocks(head_dim_v)
            assert tile.shared_bytes(head_dim, head_dim_v) == 2 * (q + k + v + out) + 1024


@pytest.mark.parametrize(
    "dims", [(a, b) for a in (8, 64, 96, 128, 192, 256) for b in (8, 64, 96, 128, 192, 256)], ids=str
)
def test_the_output_leaves_in_equal_parts_and_fits(dims):
    made = plan(make_problem(dims[0], head_dim_v=dims[1]), DEVICES["90a"], "forward_sm90")
    defines = dict(made.defines)
    assert (defines["HEAD_DIM"], defines["HEAD_DIM_V"]) == dims
    assert -(-dims[1] // 64) % defines["OUT_BLOCKS"] == 0
    assert made.shared_bytes + 1024 <= DEVICES["90a"].shared_per_block


def test_parts_of_split_keys_have_the_output_s_width():
    step = dict(batch=1, seqlen_q=40, total_q=40, packed_q=False)
    made = plan(make_problem(192, head_dim_v=128, **step), DEVICES["90a"])
    rows = 40 * 32
    assert made.kv_splits > 1
    assert made.workspace_bytes == 4096 + 4 * rows * (made.kv_splits * 128 + made.kv_splits + 1)


@pytest.mark.parametrize("arch", ["70", "80", "90a", "120a"])
@pytest.mark.parametrize("dims", [(192, 128), (40, 72), (256, 1)], ids=str)
def test_forward_simt_compiles(arch, dims):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    made = plan(make_problem(dims[0], "paged", head_dim_v=dims[1]), DEVICES[arch], "forward_simt")
    assert compile_cubin(made.kernel, made.defines, arch).spill_bytes == 0


@pytest.mark.parametrize("rotary", [None, True, False], ids=["plain", "interleaved", "halves"])
@pytest.mark.parametrize("dims", [(192, 128), (40, 72), (7, 100)], ids=str)
def test_append_compiles(dims, rotary):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    caches, rows = ([view(np.zeros((2, n, 4, dim), np.float16)) for dim in dims] for n in (16, 3))
    options = {}
    if rotary is not None:
        options = dict.fromkeys(("rotary_cos", "rotary_sin"), view(np.zeros((16, dims[0] // 2), np.float32)))
        options["rotary_interleaved"] = rotary
    defines, _, _ = plan_append(describe_append(*caches, *rows, **options))
    assert compile_cubin("append_kv", defines, "80").spill_bytes == 0


@EVERYWHERE
def test_explain_counts_both(backend):
    q, k, v = (backend.put(np.ones((1, 100, 4, dim), np.float16)) for dim in (192, 192, 128))
    found = cupyattn.explain(q, k, v)
    assert found.flops == 2 * 4 * 100 * 100 * (192 + 128)
    assert found.bytes == 2 * 2 * 4 * 100 * (192 + 128)
    assert "head_dim 192 (128 of v)" in found.shape


@EVERYWHERE
def test_refusals(backend):
    q, k, v = (backend.put(np.ones((1, 100, 4, dim), np.float16)) for dim in (72, 72, 40))
    with refused("k", "head_dim 40", "72, as in q"):
        attention(q, v, k)
    with refused("v", r"shape \(1, 99, 4, 40\)", r"k's shape \(1, 100, 4, 72\), but for head_dim"):
        attention(q, k, v[:, 1:])
    new = {"k": k[:, :3], "v": v[:, :3], "cache_seqlens": 5}
    with refused("v_cache", "head_dim 72", "40, as in v"):
        attention_with_kvcache(q[:, :3], k, q, **new)
