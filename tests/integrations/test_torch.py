"""cupyattn inside PyTorch: operators that compile whole, scaled_dot_product_attention and what is routed to it.

Tests with `device` run on the CPU, and on a GPU where PyTorch has one.
"""

from __future__ import annotations

import doctest
import functools
import inspect
import re
import shutil
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import oracle
import pytest
from oracle import cumulative, normal
from test_decode import dense, held, ints, paged, tables
from test_forward import features

import cupyattn

torch = pytest.importorskip("torch")

from torch._dynamo.backends.common import aot_autograd  # noqa: E402

from cupyattn.integrations import torch as ours  # noqa: E402
from cupyattn.integrations.torch import operators, sdpa  # noqa: E402

functional = torch.nn.functional
DTYPES = ("float16", "bfloat16", "float32")
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs PyTorch for CUDA")
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def put(array, device):
    """A NumPy array, bfloat16 too, as a tensor there."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def get(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()


def moved(values, device):
    return {name: put(x, device) if isinstance(x, np.ndarray) else x for name, x in values.items()}


def dense_arrays(rng, dtype="float32", batch=2, seqlen_q=5, seqlen_k=7, heads=4, kv_heads=2, head_dim=32):
    q = normal(rng, (batch, seqlen_q, heads, head_dim), dtype)
    return q, *normal(rng, (2, batch, seqlen_k, kv_heads, head_dim), dtype)


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, backend=options.pop("backend", "aot_eager"), **options)


def agrees(function, device, *arrays, **options):
    """Eager and compiled calls are within the oracle's bounds, and of the same form."""
    call = getattr(ours, function)
    expected = getattr(oracle, function)(*arrays, **options)
    here, options = [put(x, device) for x in arrays], moved(options, device)
    for run in (call, compiled(lambda *x: call(*x, **options, return_lse=True))):
        out, lse = run(*here, **options, return_lse=True) if run is call else run(*here)
        assert out.device.type == device and out.dtype == here[0].dtype and out.is_contiguous()
        expected.check(get(out), get(lse), arrays[0].dtype.name)


def refused(argument, came, expected, kind=ValueError):
    return pytest.raises(kind, match=f"^{argument}: got .*{came}.*, expected .*{expected}")


# ----------------------------------------------------------------------------------------------- the operators


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), ("causal",), ("window", "softcap", "batch_alibi", "sinks", "negative_scale")])
def test_dense(rng, device, dtype, names):
    agrees("attention", device, *dense_arrays(rng, dtype), **features(rng, *names))


def test_packed(rng, device):
    q = normal(rng, (10, 4, 32), "float16")
    k, v = normal(rng, (2, 17, 2, 32), "float16")
    agrees("attention_varlen", device, q, k, v, cumulative((3, 0, 5)), cumulative((4, 2, 9)), causal=True)
    agrees("attention_varlen", device, q, k[:10], v[:10], cumulative((3, 0, 5)), max_seqlen_q=7)


def test_paged(rng, device):
    lengths = (5, 33)
    cache = paged(rng, held(rng, "float16", lengths, head_dim=32), 16, "HND")
    caches = [np.ascontiguousarray(part) for part in cache.split(cache.array)]
    q = normal(rng, (2, 1, 4, 32), "float16")
    options = {"cache_seqlens": ints(*lengths), "cache_leftpad": ints(1, 3)} | cache.places
    agrees("attention_with_kvcache", device, q, *caches, **options)


@pytest.mark.parametrize("lengths", ["array", "number"])
def test_appending_in_a_compiled_graph(rng, device, lengths):
    q = normal(rng, (2, 1, 4, 64), "float16")
    k, v = normal(rng, (2, 2, 1, 2, 64), "float16")
    cache = dense(held(rng, "float16", (9, 9)), 32)
    options = {"k": k, "v": v, "causal": True} | tables(rng, 32, 32, "float32")
    options["cache_seqlens"] = ints(9, 9) if lengths == "array" else 9
    caches = cache.split(cache.array)
    placed = {name: option for name, option in options.items() if name not in ("k", "v", "causal")}
    eager, own = ([put(part.copy(), device) for part in caches] for _ in range(2))
    given, options = options, moved(options, device)
    ours.attention_with_kvcache(put(q, device), *eager, **options)
    stored = tuple(map(get, eager))
    oracle.check_caches(stored, *oracle.append_range(*caches, k, v, **placed))
    expected = oracle.attention_with_kvcache(q, *caches, **given, stored=stored)

    @compiled
    def step(q, k_cache, v_cache):
        out, lse = ours.attention_with_kvcache(q, k_cache, v_cache, **options, return_lse=True)
        return out, lse, k_cache[:, 9].clone()

    out, lse, row = step(put(q, device), *own)
    expected.check(get(out), get(lse), "float16")
    for one, other in zip(own, eager, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    assert torch.equal(row, own[0][:, 9])


def test_fp8_caches_and_both_kinds_of_scales(rng, device):
    cache = dense(held(rng, "float16", (9, 20), kv_dtype="float8_e4m3fn"), 32)
    options = {"cache_seqlens": ints(9, 20), "k_scale": 0.5, "v_scale": np.float32([2.0]), "kv_dtype": "e4m3"}
    q = normal(rng, (2, 1, 4, 64), "float16")
    expected = oracle.attention_with_kvcache(q, *cache.split(cache.array), **options | {"kv_dtype": "float8_e4m3fn"})
    given = [put(x, device) for x in (q, *cache.split(cache.array))]
    options = moved(options, device)
    out = compiled(lambda *x: ours.attention_with_kvcache(*x, **options))(*given)
    expected.check(get(out), None, "float16")


@pytest.mark.parametrize("form", ["log2", "flash_attn"])
def test_forms_of_the_lse_are_compiled(rng, device, form):
    """Queries without keys among them."""
    q, k, v = (put(x, device) for x in dense_arrays(rng, seqlen_k=3))
    options = {"causal": True, "return_lse": form}
    expected = ours.attention(q, k, v, **options)
    for got, own in zip(compiled(lambda *x: ours.attention(*x, **options))(q, k, v), expected, strict=True):
        torch.testing.assert_close(got, own)
    assert torch.isinf(expected[1]).any()
    got = torch.ops.cupyattn.attention(q, k, v, causal=True, lse_form=form)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_flag_is_no_string(rng, device):
    q, k, v = (put(x, device) for x in dense_arrays(rng, kv_heads=4))
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    for name in ("is_causal", "enable_gqa"):
        with pytest.raises(ValueError, match=f"^{name}: got 'False', expected True or False"):
            ours.scaled_dot_product_attention(*turned, **{name: "False"})


needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler"
)


def both_but_first_cleared(pair):
    pair[:, :, 9:].zero_()
    return pair[0], pair[1]


VIEWS = {  # how a layer's caches are made of what comes into the graph, and what of 3 x (keys, values) comes in
    "parts of one tensor": (lambda k, v: (k, v), lambda pool: (pool[0, 0], pool[0, 1])),
    "parts of a pool": (lambda k, v: (k, v), lambda pool: (pool[2, 0], pool[2, 1])),
    "parts of two pools": (lambda k, v: (k[1], v[1]), lambda pool: (pool[:, 0], pool[:, 1])),
    "the whole pool": (lambda pool: (pool[1, 0], pool[1, 1]), lambda pool: (pool,)),
    "selected from a view": (lambda pair: (pair[0], pair[1]), lambda pool: (pool[1],)),
    "sliced from a view": (lambda both: (both[:, :8], both[:, 8:]), lambda pool: (pool[1, 1],)),
    "of a view, written to before": (both_but_first_cleared, lambda pool: (pool[1],)),
}


@pytest.fixture
def compiled_anew(monkeypatch, tmp_path):
    """Without what PyTorch keeps on disk, which it takes for a graph's though this library has changed."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


@needs_a_compiler
@pytest.mark.parametrize("views, dynamic", [*zip(VIEWS, 7 * [None], strict=True), ("the whole pool", True)])
def test_inductor_compiles_a_layer_whole(rng, device, compiled_anew, views, dynamic):
    """With a matmul before and after, and caches that are written in place and read before and after that."""
    inside, outside = VIEWS[views]
    q, k, v = (put(x, device) for x in dense_arrays(rng, seqlen_k=5, kv_heads=4))
    weight = put(normal(rng, (32, 32), "float32"), device) / 6
    pool = put(normal(rng, (3, 2, 2, 16, 4, 32), "float32"), device)
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=device)

    def layer(q, *given):
        k_cache, v_cache = inside(*given)
        q = q @ weight + v_cache.mean()
        out = ours.attention_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, causal=True)
        return (out @ weight).relu() + k_cache.mean() - v_cache.mean()

    before, own = pool.clone(), pool.clone()
    expected = layer(q, *outside(own))
    out = compiled(layer, backend="inductor", dynamic=dynamic)(q, *outside(pool))
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(pool, own) and not torch.equal(pool, before)


@needs_a_compiler
@pytest.mark.parametrize("cleared", [False, True])
def test_inductor_writes_to_views_of_another_dtype(rng, device, compiled_anew, cleared):
    """FP8 caches that come as bytes, and those of the keys written to before."""
    q, k, v = (put(x, device).half() for x in dense_arrays(rng, seqlen_k=5, kv_heads=4))
    pools = put(rng.integers(0, 100, (3, 2, 2, 16, 4, 32)).astype(np.uint8), device)
    own = pools.clone()

    def layer(q, keys, values):
        if cleared:
            keys[:, :, 9:].zero_()
        caches = keys[1].view(torch.float8_e4m3fn), values[1].view(torch.float8_e4m3fn)
        scales = {"k_scale": 0.5, "v_scale": 2.0}
        return ours.attention_with_kvcache(q * 2, *caches, k=k, v=v, cache_seqlens=3, causal=True, **scales) / 2

    parts = [(both[1], both[2]) for both in (pools, own)]
    out, expected = (
        call(q, *each) for call, each in zip((compiled(layer, backend="inductor"), layer), parts, strict=True)
    )
    torch.testing.assert_close(out, expected)
    assert torch.equal(pools, own)


@needs_a_compiler
def test_a_compiled_layer_takes_the_caches_of_any_layer(rng, device, compiled_anew):
    """What is compiled for parts at one place of a pool serves those at others."""
    q, k, v = (put(x, device) for x in dense_arrays(rng, seqlen_k=5, kv_heads=4))
    pool = put(normal(rng, (3, 2, 2, 16, 4, 32), "float32"), device)
    own = pool.clone()

    def layer(q, k_cache, v_cache):
        return ours.attention_with_kvcache(q * 2, k_cache, v_cache, k=k, v=v, cache_seqlens=3, causal=True) / 2

    call = compiled(layer, backend="inductor")
    for i in (2, 0, 1):
        torch.testing.assert_close(call(q, *pool[i]), layer(q, *own[i]), atol=1e-4, rtol=1e-4)
        assert torch.equal(pool, own)


def test_caches_are_copied_only_where_pytorch_misplaces_them(rng):
    q, k, v = (put(x, "cpu") for x in dense_arrays(rng, seqlen_k=5, kv_heads=4))
    pool = torch.zeros(3, 2, 2, 16, 4, 32)
    expected = dict(zip(VIEWS, (1, 1, 0, 0, 2, 2, 2), strict=True))  # of two interleaved pools PyTorch makes one
    for views, (inside, outside) in VIEWS.items():
        graphs = []
        torch._dynamo.reset()  # or what changes from one to the next is taken for dynamic

        def layer(q, *given, inside=inside):
            return ours.attention_with_kvcache(q, *inside(*given), k=k, v=v, cache_seqlens=3)

        backend = aot_autograd(fw_compiler=lambda graph, examples: graphs.append(graph) or graph)  # noqa: B023
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            compiled(layer, backend=backend)(q, *outside(pool))
        assert bool(expected[views]) == any("PyTorch's compiler would" in str(one.message) for one in told), views
        copies = [node for node in graphs[0].graph.nodes if node.target is torch.ops.cupyattn.copy_of.default]
        assert len(copies) == expected[views], views


def test_shapes_may_be_dynamic(rng, device):
    lengths = []

    def backend(graph, examples):
        lengths.append(examples)
        return graph

    call = compiled(lambda q, k, v: ours.attention(q, k, v, causal=True) * 2, backend=backend, dynamic=True)
    for seqlen in (7, 9, 33):
        q, k, v = (put(x, device) for x in dense_arrays(rng, seqlen_q=seqlen, seqlen_k=seqlen))
        assert torch.equal(call(q, k, v), ours.attention(q, k, v, causal=True) * 2)
    assert len(lengths) == 1


def test_operators_pass_pytorchs_own_checks(rng, device):
    q, k, v = (put(x, device) for x in dense_arrays(rng))
    packed = [x.flatten(0, 1) for x in (q, k, v)], [put(cumulative(n), device) for n in ((3, 7), (5, 9))]
    step = {"k": k[:, :1].contiguous(), "v": v[:, :1].contiguous()}
    step["cache_seqlens"] = put(ints(3, 5), device)
    cases = [
        (operators.attend, (q, k, v), {"causal": True, "window": [3, 0], "return_lse": True}),
        (operators.attend, (q, k, v), {"kernel_name": "numpy_float64" if device == "cpu" else "auto"}),
        (operators.attend_packed, (*packed[0], *packed[1]), {"softmax_scale": 0.3}),
        (operators.attend_cached, (q[:, :1], k.clone(), v.clone()), {"uniform_length": 4}),
        (operators.append_and_attend, (q[:, :1], k.clone(), v.clone()), step),
    ]
    for operator, arguments, options in cases:
        torch.library.opcheck(operator, arguments, options)


def test_fake_tensors_have_the_results_form(rng):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = torch.empty(2, 5, 4, 32), torch.empty(2, 7, 2, 32), torch.empty(2, 7, 2, 16)
        out, lse = ours.attention(q, k, v, return_lse=True)
        assert out.shape == (2, 5, 4, 16) and lse.shape == (2, 4, 5) and lse.dtype == torch.float32
        assert ours.attention(q, k, v, kernel="numpy_float64").dtype == torch.float64


def test_signatures_and_results_are_those_of_the_library(rng, device):
    for name in ("attention", "attention_varlen", "attention_with_kvcache"):
        assert inspect.signature(getattr(ours, name)) == inspect.signature(getattr(cupyattn, name))
    q, k, v = (put(x, device) for x in dense_arrays(rng))
    out = torch.empty_like(q)
    assert ours.attention(q, k, v, out=out) is out
    assert torch.equal(out, cupyattn.attention(q, k, v))


def test_out_is_refused_in_a_compiled_graph(rng):
    q, k, v = (put(x, "cpu") for x in dense_arrays(rng))
    with pytest.raises(Exception, match="out: got a tensor, while PyTorch traces, expected None"):
        compiled(lambda q: ours.attention(q, k, v, out=torch.empty_like(q)))(q)


# --------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused_in_a_sentence(rng, name):
    given = dict(zip("qkv", (put(x, "cpu") for x in dense_arrays(rng)), strict=True))
    given[name].requires_grad_()
    with refused(name, "requires grad", "no backward pass: pass .detach", TypeError):
        ours.attention(**given)
    sentence = f"{name}: got a tensor that requires grad, while gradients are recorded, expected .* no backward pass"
    with pytest.raises(Exception, match=sentence):
        compiled(lambda **x: ours.attention(**x))(**given)
    with pytest.raises(TypeError, match=f"^{sentence}"):
        torch.ops.cupyattn.attention(**given)
    with pytest.raises(Exception, match=sentence):
        compiled(lambda **x: torch.ops.cupyattn.attention(**x)[0])(**given)
    with torch.no_grad():
        ours.attention(**given)
        compiled(lambda **x: ours.attention(**x))(**given)


def test_gradients_by_transformations_are_refused(rng):
    """Where the tensors inside require none."""
    q, k, v = (put(x, "cpu") for x in dense_arrays(rng))

    def total(q, attend=torch.ops.cupyattn.attention):
        return attend(q, k, v)[0].sum()

    for take in (torch.func.grad, torch.func.jacrev, lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(()))):
        with refused("q", "requires grad", "no backward pass", TypeError):
            take(total)(q)
    with pytest.raises(Exception, match="q: got a tensor that requires grad"):
        torch.compile(lambda q: torch.func.grad(lambda x: total(x, ours.attention))(q), backend="eager")(q)
    mapped = torch.vmap(lambda x: torch.ops.cupyattn.attention(x[None], k[:1], v[:1])[0][0])(q)
    torch.testing.assert_close(mapped, ours.attention(q, k[:1].expand_as(k), v[:1].expand_as(v)))


def test_forward_derivatives_are_refused_and_left_to_pytorch(rng):
    q, k, v = (put(x, "cpu") for x in dense_arrays(rng, kv_heads=4))
    for function in (ours.attention, lambda *x: torch.ops.cupyattn.attention(*x)[0], ours.scaled_dot_product_attention):
        with pytest.raises((TypeError, ValueError), match="got a tensor with a tangent, expected one without"):
            torch.func.jvp(lambda q, function=function: function(q, k, v), (q,), (q,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, q)
            with pytest.raises((TypeError, ValueError), match="got a tensor with a tangent, expected one without"):
                function(dual, k, v)
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(ours.attention(q, k, v), cupyattn.attention(q, k, v))
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    ask = functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # others of PyTorch's give none
        expected = torch.func.jvp(lambda q: ask(q, *turned[1:]), (turned[0],), (turned[0],))
        with ours.route_scaled_dot_product_attention(devices="cpu"):
            got = torch.func.jvp(lambda q: ask(q, *turned[1:]), (turned[0],), (turned[0],))
    torch.testing.assert_close(got, expected)


def test_caches_that_are_written_count_as_changed(rng):
    q, k, v = (put(x, "cpu") for x in dense_arrays(rng))
    weight = torch.ones_like(k, requires_grad=True)
    product = (weight * k).sum()
    with torch.no_grad():
        new = {"k": k[:, :1].clone(), "v": v[:, :1].clone(), "uniform_length": 3}
        torch.ops.cupyattn.append_and_attend(q[:, :1], k, v, **new)
    assert (k._version, v._version) == (1, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        torch.ops.cupyattn.append_and_attend(q[:, :1], k.clone(), v.clone(), **new)


def test_options_are_refused_in_the_functions_words_while_pytorch_traces(rng):
    q, k, v = (put(x, "cpu") for x in dense_arrays(rng))
    for options, sentence in (
        ({"window": 3}, r"window: got 3, expected \(left, right\) as two ints"),
        ({"is_causal": True}, r"attention\(\) got an unexpected keyword argument 'is_causal'"),
    ):
        with pytest.raises(Exception, match=sentence):
            compiled(lambda q, options=options: ours.attention(q, k, v, **options))(q)


def test_sparse_and_nested_tensors_are_named(rng):
    q, k, v = (put(x, "cpu") for x in dense_arrays(rng))
    with refused("k", "a sparse tensor", "strided", TypeError):
        torch.ops.cupyattn.attention(q, k.to_sparse(), v)
    nested = torch.nested.nested_tensor(list(q), layout=torch.jagged)
    with refused("q", "a tensor of layout torch.jagged", "a strided tensor", TypeError):
        ours.attention(nested, k, v)
    for query, came in ((q.to_sparse(), "tensor of layout torch.sparse_coo"), (nested, "nested tensor of layout")):
        with refused("query", f"a {came}", "a strided tensor"):
            ours.scaled_dot_product_attention(query, k, v)


def test_functions_under_vmap(rng, device):
    q, k, v = (put(x, device) for x in dense_arrays(rng))
    expected = ours.attention(q, k, v, causal=True)
    got = torch.vmap(lambda *x: ours.attention(*(part[None] for part in x), causal=True)[0])(q, k, v)
    torch.testing.assert_close(got, expected)
    turned = [x.transpose(1, 2) for x in (q, q, q)]
    got = torch.vmap(ours.scaled_dot_product_attention)(*turned)
    torch.testing.assert_close(got, ours.scaled_dot_product_attention(*turned))


def test_a_second_import_defines_the_operators_again():
    program = """
import sys, torch
import cupyattn.integrations.torch
for name in [name for name in sys.modules if name.startswith("cupyattn")]:
    del sys.modules[name]
from cupyattn.integrations.torch import attention
q = torch.ones(1, 2, 3, 8)
assert torch.equal(torch.ops.cupyattn.attention(q, q, q)[0], attention(q, q, q))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gradients_of_appended_rows_are_refused(rng):
    q, k, v = (put(x, "cpu") for x in dense_arrays(rng))
    new = {"k": k[:, :1].clone().requires_grad_(), "v": v[:, :1].clone(), "cache_seqlens": 3}
    with refused("k", "requires grad", "no backward pass", TypeError):
        ours.attention_with_kvcache(q[:, :1], k, v, **new)
    with pytest.raises(Exception, match="k: got a tensor that requires grad, while gradients are recorded"):
        compiled(lambda q, k, v, new: ours.attention_with_kvcache(q, k, v, **new))(q[:, :1], k, v, new)


# --------------------------------------------------------------------------------- scaled_dot_product_attention


def heads_first(rng, dtype="float32", **sizes):
    return [np.ascontiguousarray(x.swapaxes(1, 2)) for x in dense_arrays(rng, dtype, **sizes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlens", [(5, 5), (1, 7), (5, 7), (7, 5), (7, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_as_pytorchs(rng, device, dtype, seqlens, is_causal, kv_heads):
    given = heads_first(rng, dtype, seqlen_q=seqlens[0], seqlen_k=seqlens[1], kv_heads=kv_heads)
    options = {"is_causal": is_causal, "scale": 0.3, "enable_gqa": kv_heads != 4}
    exact = functional.scaled_dot_product_attention(*(put(x.astype(np.float64), "cpu") for x in given), **options)
    out = ours.scaled_dot_product_attention(*(put(x, device) for x in given), **options)
    assert out.shape == exact.shape and out.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(get(out).astype(np.float64), exact.numpy(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_as_pytorchs_in_other_forms(rng, device):
    q, k, v = (put(x, device) for x in heads_first(rng, kv_heads=4))
    ask = functional.scaled_dot_product_attention
    for given in (
        (q[0], k[0], v[0]),  # without batch
        (q, k, v[..., :16]),  # values of another width
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)],
        [x[:, :, :4] for x in (q, k, v)],  # as many tokens as heads, which lie behind them or before
        [x[:, :, :4].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
    ):
        expected = ask(*given, is_causal=True)
        out = ours.scaled_dot_product_attention(*given, is_causal=True)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_the_default_scale(rng, device):
    q, k, v = (put(x, device) for x in heads_first(rng, kv_heads=4))
    expected = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours.scaled_dot_product_attention(q, k, v), expected, atol=2e-5, rtol=2e-5)


def test_a_compiled_call(rng, device):
    q, k, v = (put(x, device) for x in heads_first(rng, seqlen_q=7, kv_heads=4))
    for is_causal in (False, True):
        expected = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        call = compiled(lambda *x, c=is_causal: ours.scaled_dot_product_attention(*x, is_causal=c))
        torch.testing.assert_close(call(q, k, v), expected, atol=2e-5, rtol=2e-5)


MISFITS = [
    ({"attn_mask": torch.ones(5, 7, dtype=torch.bool)}, "attn_mask", "a tensor", "None: the kernels read no mask"),
    ({"dropout_p": 0.1}, "dropout_p", "0.1", "0.0"),
    ({"query": torch.zeros(5, 32)}, "query", r"shape \(5, 32\)", "batch, heads, seqlen, head_dim"),
    ({"key": torch.zeros(4, 7, 32)}, "key", r"shape \(4, 7, 32\)", "as the others"),
    ({"key": torch.zeros(2, 4, 7, 32, dtype=torch.float16)}, "key", "torch.float16", "query's dtype torch.float32"),
    ({"query": torch.zeros(2, 4, 5, 32, dtype=torch.float64)}, "query", "torch.float64", "float32"),
    ({"key": torch.zeros(2, 4, 7, 16)}, "key", r"\(2, 4, 7, 16\)", "query's batch and head_dim"),
    ({"value": torch.zeros(2, 4, 6, 32)}, "value", r"\(2, 4, 6, 32\)", "key's"),
    ({n: torch.zeros(2, 2, 7, 32) for n in ("key", "value")}, "key", "2 heads where query has 4", "enable_gqa=True"),
    ({n: torch.zeros(2, 3, 7, 32) for n in ("key", "value")} | {"enable_gqa": True}, "key", "3 heads", "a divisor"),
    ({"value": torch.zeros(2, 4, 7, 257)}, "value", "head_dim 257", "1 to 256"),
    ({"query": torch.zeros(2, 4, 32, 5).mT}, "query", "stride 5 of head_dim", "contiguous"),
    ({"query": torch.zeros(2, 4, 5, 32, requires_grad=True)}, "query", "requires grad", "no backward pass"),
    ({"scale": "big"}, "scale", "a str", "a number or None"),
]


@pytest.mark.parametrize("change, argument, came, expected", MISFITS, ids=[f"{m[1]}-{m[2][:9]}" for m in MISFITS])
def test_what_does_not_fit_is_refused_by_name(change, argument, came, expected):
    given = {"query": torch.zeros(2, 4, 5, 32), "key": torch.zeros(2, 4, 7, 32), "value": torch.zeros(2, 4, 7, 32)}
    with refused(argument, came, expected):
        ours.scaled_dot_product_attention(**given | change)


@pytest.mark.gpu
def test_tensors_on_other_devices_are_refused():
    q, k = torch.zeros(2, 4, 5, 32, device="cuda"), torch.zeros(2, 4, 7, 32)
    with refused("key", "a tensor on cpu", "query's device cuda:0"):
        ours.scaled_dot_product_attention(q, k, k)


# ------------------------------------------------------------------------------------------------------ routing


@pytest.fixture
def here(monkeypatch):
    """How many calls came here."""
    calls = []

    def counted(call, *given, **options):
        out = call(*given, **options)
        calls.append(given)
        return out

    for name in ("attend_eagerly", "attention"):
        monkeypatch.setattr(sdpa, name, functools.partial(counted, getattr(sdpa, name)))
    return calls


def test_calls_are_routed_whatever_their_name(rng, device, here):
    from torch.nn.functional import scaled_dot_product_attention as imported_before

    q, k, v = (put(x, device) for x in heads_first(rng, kv_heads=4))
    expected = imported_before(q, k, v, is_causal=True)
    with ours.route_scaled_dot_product_attention(devices=(device,)):
        outs = [
            imported_before(q, k, v, is_causal=True),
            functional.scaled_dot_product_attention(q, k, v, None, 0.0, True),
        ]
    assert len(here) == 2
    functional.scaled_dot_product_attention(q, k, v)
    assert len(here) == 2
    for out in outs:
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_a_models_layer_is_routed(rng, device, here):
    torch.manual_seed(int(rng.integers(2**31)))
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True, device=device)
    x = torch.randn(2, 9, 64, device=device)
    with torch.no_grad():
        expected, _ = layer.train()(x, x, x, need_weights=False)  # in eval mode a kernel of its own does it all
        with ours.route_scaled_dot_product_attention(devices=device):
            out, _ = layer(x, x, x, need_weights=False)
    assert len(here) == 1
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)


def test_by_default_calls_on_the_cpu_stay_with_pytorch(rng, here):
    q, k, v = (put(x, "cpu") for x in heads_first(rng, kv_heads=4))
    with ours.route_scaled_dot_product_attention():
        functional.scaled_dot_product_attention(q, k, v)
    assert here == []


def test_strictly_no_autocast_and_no_nested_tensor_is_left_to_pytorch(rng):
    q, k, v = (put(x, "cpu") for x in heads_first(rng, kv_heads=4))
    nested = torch.nested.nested_tensor([x.transpose(0, 1) for x in q], layout=torch.jagged).transpose(1, 2)
    for given, came in (((q, k, v), "torch.float32 under an autocast to torch.bfloat16"), (3 * (nested,), "a nested")):
        with torch.autocast("cpu", torch.bfloat16, enabled=given[0] is q):
            with ours.route_scaled_dot_product_attention(devices="cpu"):
                functional.scaled_dot_product_attention(*given)
            with ours.route_scaled_dot_product_attention("cpu", strict=True), refused("query", came, ""):
                functional.scaled_dot_product_attention(*given)


WITH_PYTORCH = [m for m in MISFITS if m[1] in ("attn_mask", "dropout_p") or "5, 32" in m[2] or "requires" in m[2]]
WITH_PYTORCH += [m for m in MISFITS if "257" in m[2] or "stride" in m[2]]
WITH_PYTORCH += [({n: torch.zeros(2, 4, s, 32, dtype=torch.float64) for n, s in
                   (("query", 5), ("key", 7), ("value", 7))}, "query", "torch.float64", "float32")]  # fmt: skip


@pytest.mark.parametrize("change, argument, came, expected", WITH_PYTORCH, ids=[m[1] + m[2][:9] for m in WITH_PYTORCH])
def test_calls_that_do_not_fit_stay_with_pytorch(here, change, argument, came, expected):
    given = {"query": torch.zeros(2, 4, 5, 32), "key": torch.zeros(2, 4, 7, 32), "value": torch.zeros(2, 4, 7, 32)}
    given |= change
    with ours.route_scaled_dot_product_attention(devices=("cpu",)):
        if "shape" not in came:
            functional.scaled_dot_product_attention(**given)
    with ours.route_scaled_dot_product_attention(devices=("cpu",), strict=True), refused(argument, came, expected):
        functional.scaled_dot_product_attention(**given)
    assert here == []


@pytest.mark.parametrize("devices", ["gpu", "cuda:0", (), ("cpu", "CUDA"), None, 0, (torch.device("cpu"),)])
def test_devices_that_nothing_would_be_routed_from_are_refused(devices):
    with refused("devices", re.escape(repr(devices)), r"types of devices, as \('cuda',\)"):
        ours.route_scaled_dot_product_attention(devices=devices)


def test_masks_with_holes_are_refused():
    from cupyattn.integrations.torch.transformers import padding_bounds

    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    bounds = padding_bounds(3, 4, 4, attention_mask=mask)
    assert bounds[:, 0, 0].tolist() == [[1, 3], [0, 0], [0, 4]]
    assert torch.equal(padding_bounds(3, 4, 4, attention_mask=2 * mask), bounds)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert padding_bounds(3, 4, 4, attention_mask=torch.ones(3, 4)).shape == bounds.shape
    assert padding_bounds(3, 4, 4, attention_mask=mask.to("meta")).shape == bounds.shape
    mapped = torch.vmap(lambda row: padding_bounds(3, 4, 4, attention_mask=row))(torch.stack([mask, mask]))
    assert torch.equal(mapped, torch.stack([bounds, bounds]))
    mask[2, 1] = 0
    with refused("attention_mask", "zeros among the ones of row 2", "ones in one run"):
        padding_bounds(3, 4, 4, attention_mask=mask)


def test_training_in_the_context_is_pytorchs(rng, here):
    q, k, v = (put(x, "cpu").requires_grad_() for x in heads_first(rng, kv_heads=4))
    with ours.route_scaled_dot_product_attention(devices=("cpu",)):
        functional.scaled_dot_product_attention(q, k, v).sum().backward()
        with torch.no_grad():
            functional.scaled_dot_product_attention(q, k, v)
    assert q.grad is not None and len(here) == 1


def test_autocast_that_changes_the_dtype_is_pytorchs(rng, device, here):
    q, k, v = (put(x, device) for x in heads_first(rng, kv_heads=4))
    with ours.route_scaled_dot_product_attention(devices=(device,)), torch.autocast(device, torch.bfloat16):
        assert functional.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert here == []
        functional.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert len(here) == 1


def test_nested_tensors_are_pytorchs(here):
    parts = [torch.randn(n, 4, 32) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with ours.route_scaled_dot_product_attention(devices=("cpu",)):
        functional.scaled_dot_product_attention(x, x, x)
    assert here == []


def test_a_routed_call_compiles_whole(rng, device):
    q, k, v = (put(x, device) for x in heads_first(rng, seqlen_q=7, kv_heads=4))
    seen = []

    def backend(graph, examples):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True) + 1
    with ours.route_scaled_dot_product_attention(devices=(device,)):
        call = compiled(lambda *x: functional.scaled_dot_product_attention(*x, is_causal=True) + 1, backend=backend)
        out = call(q, k, v)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-5)
    assert any("cupyattn.attention" in name for name in seen)


def test_the_context_is_this_threads_alone(rng, here):
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = (put(x, "cpu") for x in heads_first(rng, kv_heads=4))
    with ours.route_scaled_dot_product_attention(devices=("cpu",)), ThreadPoolExecutor(1) as pool:
        pool.submit(functional.scaled_dot_product_attention, q, k, v).result()
    assert here == []


# ------------------------------------------------------------------------------------------------------- others


def test_examples():
    results = doctest.testmod(sdpa)
    assert results.attempted and not results.failed


def test_importing_it_loads_neither_jax_nor_cupy_nor_transformers():
    program = (
        "import sys, cupyattn.integrations.torch; print(sorted({'jax', 'cupy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.gpu
def test_results_come_from_pytorchs_allocator(rng):
    q, k, v = (put(x, "cuda") for x in dense_arrays(rng, "float16", seqlen_q=512, seqlen_k=512, kv_heads=4))
    cupy = pytest.importorskip("cupy")
    ours.attention(q, k, v)
    pool, before = cupy.get_default_memory_pool().used_bytes(), torch.cuda.memory_allocated()
    out = ours.attention(q, k, v)
    assert torch.cuda.memory_allocated() - before == -(-out.nbytes // 512) * 512
    assert cupy.get_default_memory_pool().used_bytes() == pool


def test_the_sentence_about_gradients_is_the_borders():
    """The operators' and the border's are one sentence."""
    tensor = torch.zeros(1, requires_grad=True)
    with pytest.raises(TypeError) as border:
        cupyattn.arrays.view(tensor, "q")
    with pytest.raises(TypeError, match=f"^{re.escape(str(border.value))}$"):
        operators.refuse_gradients({"q": tensor})
