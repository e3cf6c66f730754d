"""On a GPU: calls run on the current stream without waiting, and are captured in CUDA graphs of every library."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import cupyattn

pytestmark = pytest.mark.gpu


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("needs PyTorch for CUDA")
    return module


def numbers(rng, batch=2, seqlen=128, head_dim=64):
    return [rng.standard_normal((batch, seqlen, heads, head_dim)).astype(np.float16) for heads in (8, 2, 2)]


def error(out, q, k, v, **options):
    """In units of what one rounding of weights and output makes of it."""
    exact = cupyattn.attention(q, k, v, kernel="numpy_float64", **options)
    return float(np.abs(out.astype(np.float64) - exact).max() / (np.abs(v).max().astype(float) * 2**-10 * 1.01))


# ---------------------------------------------------------------------------------- PyTorch's streams and graphs


def calls_of_torch(torch, rng):
    """Name -> (a call without arguments, what of it must be right), over tensors on the GPU."""
    from cupyattn.integrations import torch as ours

    q, k, v = (torch.from_numpy(x).cuda() for x in numbers(rng))
    first = [x.transpose(1, 2) for x in (q, k, v)]
    caches = torch.zeros(2, 2, 256, 2, 64, dtype=torch.float16, device="cuda")
    lengths = torch.tensor([100, 7], dtype=torch.int32, device="cuda")
    ends = torch.tensor([0, 100, 256], dtype=torch.int32, device="cuda")
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    return q, {
        "attention": lambda: ours.attention(q, k, v, causal=True),
        "sdpa": lambda: ours.scaled_dot_product_attention(*first, is_causal=True, enable_gqa=True),
        "varlen": lambda: ours.attention_varlen(*packed, ends, causal=True),
        "step": lambda: ours.attention_with_kvcache(
            q[:, :1], *caches, k=k[:, :1], v=v[:, :1], cache_seqlens=lengths, causal=True
        ),
        "prompt": lambda: ours.attention_with_kvcache(
            q[:, :100], *caches, k=k[:, :100], v=v[:, :100], cache_seqlens=0, causal=True
        ),
    }


@pytest.mark.parametrize("name", ["attention", "sdpa", "varlen", "step", "prompt"])
def test_a_torch_graph_sees_new_values(rng, torch, name):
    """A capture fails if anything in it waits for the device."""
    q, calls = calls_of_torch(torch, rng)
    call = calls[name]
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(2):
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(out, call())


@pytest.mark.parametrize("name", ["attention", "sdpa", "varlen", "step", "prompt"])
def test_calls_wait_for_nothing(rng, torch, name):
    """They return while the stream is still busy with what was queued before, and come after it."""
    q, calls = calls_of_torch(torch, rng)
    call, values = calls[name], torch.randn_like(q)
    call()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            call()
            torch.cuda._sleep(200_000_000)  # about 0.1 s
            q.copy_(values)
            out = call()
            busy = not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert busy
    stream.synchronize()
    assert torch.equal(out, call())


def test_graph_captures_on_a_stream_of_the_callers(rng, torch):
    """Captured by hand on a side stream, several calls of one form, which share nothing that they write to."""
    from cupyattn.integrations.torch import attention

    host = numbers(rng)
    q, k, v = (torch.from_numpy(x).cuda() for x in host)
    attention(q, k, v)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        outs = [attention(q, k, v), attention(q, v, k)]
        graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    assert error(outs[0].cpu().numpy(), *host) <= 1
    assert error(outs[1].cpu().numpy(), host[0], host[2], host[1]) <= 1


def test_compiled_with_cuda_graphs(rng, torch):
    pytest.importorskip("triton")
    from cupyattn.integrations.torch import attention

    q, k, v = (torch.from_numpy(x).cuda() for x in numbers(rng))
    call = torch.compile(
        lambda q, k, v: attention(q + 1, k, v, causal=True) * 2, mode="reduce-overhead", fullgraph=True
    )
    for _ in range(4):  # compiled, warmed up, recorded, replayed
        q.copy_(torch.randn_like(q))
        out = call(q, k, v).clone()
        torch.testing.assert_close(out, attention(q + 1, k, v, causal=True) * 2, atol=5e-3, rtol=5e-3)


def test_a_captured_plan_of_32_layers(rng, torch):
    """What `cupyattn bench integrations` times: one plan, a cache for each layer, one graph."""
    layers, batch, rows = 32, 2, 64
    q = torch.randn(batch, 1, 8, 64, dtype=torch.float16, device="cuda")
    caches = torch.randn(layers, 2, batch, rows, 2, 64, dtype=torch.float16, device="cuda")
    lengths = torch.full((batch,), 40, dtype=torch.int32, device="cuda")
    outs = torch.empty(layers, *q.shape, dtype=torch.float16, device="cuda")
    plan = cupyattn.DecodePlan(q, *caches[0], cache_seqlens=lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out, (k_cache, v_cache) in zip(outs, caches, strict=True):
            plan.run(q, k_cache, v_cache, cache_seqlens=lengths, out=out)
    lengths += 7
    graph.replay()
    torch.cuda.synchronize()
    for out, (k_cache, v_cache) in zip(outs, caches, strict=True):
        given = (x.cpu().numpy() for x in (q, k_cache[:, :47], v_cache[:, :47]))
        assert error(out.cpu().numpy(), *given) <= 1


# ------------------------------------------------------------------------------------------------ CuPy's streams


def test_cupy_calls_wait_for_nothing_and_come_in_order(rng):
    cupy = pytest.importorskip("cupy")
    host = numbers(rng)
    q, k, v = (cupy.asarray(x) for x in host)
    cupyattn.attention(cupy.negative(q), k, v, causal=True)  # all is compiled
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(int n) { for (int i = 0; i < n; ++i) __nanosleep(100000); }', "spin"
    )
    spin((1,), (1,), (1,))
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        spin((1,), (1,), (10000,))
        cupy.negative(q, out=q)
        out = cupyattn.attention(q, k, v, causal=True)
        assert not stream.done
        stream.synchronize()
        assert error(out.get(), -host[0], *host[1:], causal=True) <= 1


# ------------------------------------------------------------------------------------------ JAX's command buffers

COMMAND_BUFFERS = """
import sys
import numpy as np, jax, jax.numpy as jnp, cupyattn
from functools import partial
from cupyattn.integrations.jax import attention, attention_with_kvcache, calls

runs = []
call = calls.Callback.__call__
calls.Callback.__call__ = lambda self, *given: runs.append(self) or call(self, *given)
rng = np.random.default_rng({seed})
normal = lambda *shape: rng.standard_normal(shape).astype(np.float16)
options = dict(command_buffer={command_buffer})
caches, lengths = normal(2, 2, 96, 2, 64), np.array([60, 9], np.int32)

@jax.jit
def layers(q, k, v):
    one = attention(q, k, v, causal=True, **options)
    other = attention(q * 2, v, k, causal=True, **options)  # of the same form, and apart from it
    step = attention_with_kvcache(q[:, :1], *caches, cache_seqlens=lengths, **options)
    step = step + attention_with_kvcache(-q[:, :1], *caches, cache_seqlens=lengths, **options)
    return one + 1, other * 3, jnp.sin(step)

def close(got, expected):
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, atol=2e-2, rtol=2e-2)

exact = partial(cupyattn.attention, kernel="numpy_float64")
for i in range({times}):
    q, k, v = normal(2, 64, 8, 64), normal(2, 64, 2, 64), normal(2, 64, 2, 64)
    given = [jnp.asarray(x) for x in (q, k, v)]
    one, other, step = layers(*given)
    close(one, exact(q, k, v, causal=True) + 1)
    close(other, 3 * exact(q * 2, v, k, causal=True))
    ask = partial(cupyattn.attention_with_kvcache, cache_seqlens=lengths, kernel="numpy_float64")
    close(step, np.sin(ask(q[:, :1], *caches) + ask(-q[:, :1], *caches)))
    del given, one, other, step
print(len(runs))
"""


@pytest.mark.parametrize("mode", ["LHS", "CONCURRENT"])
@pytest.mark.parametrize("command_buffer", [False, True])
def test_command_buffers(rng, command_buffer, mode):
    """A graph of XLA's replays the launches without a callback, whichever of them it lets run side by side."""
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("needs JAX for CUDA")
    times = 12
    program = COMMAND_BUFFERS.format(seed=int(rng.integers(2**31)), command_buffer=command_buffer, times=times)
    flags = f"--xla_gpu_graph_min_graph_size=1 --xla_gpu_command_buffer_scheduling_mode={mode}"
    environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = int(done.stdout)
    assert runs < 4 * times if command_buffer else runs == 4 * times


def test_xlas_stream_is_not_waited_for(rng):
    """A jitted call returns before the work that it depends on is done."""
    import time

    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("needs JAX for CUDA")
    from cupyattn.integrations.jax import attention

    x = jax.numpy.asarray(rng.standard_normal((4096, 4096)).astype(np.float32))
    q, k, v = (jax.numpy.asarray(array) for array in numbers(rng))

    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 400, lambda i, x: x @ x * 1e-4, x)

    call = jax.jit(lambda q, k, v, x: attention(q + x[0, 0].astype(q.dtype) * 0, k, v))
    jax.block_until_ready(call(q, k, v, slow(x)))
    started = time.perf_counter()
    out = call(q, k, v, slow(x))
    returned = time.perf_counter() - started
    jax.block_until_ready(out)
    finished = time.perf_counter() - started
    assert returned < 0.5 * finished, (returned, finished)
