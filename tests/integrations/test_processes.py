"""Threads, forks and devices: many callers at once, a child process without CUDA, several GPUs, foreign streams."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from test_arrays import at_address

import cupyattn
from cupyattn import arrays, streams

THREADS = 16


def random_arrays(seed):
    """float16 q, k, v of a shape of their own."""
    rng = np.random.default_rng(seed)
    batch, seqlen_q, seqlen_k, head_dim = rng.integers(1, 4), rng.integers(1, 70), rng.integers(70, 140), 64
    q = rng.standard_normal((batch, seqlen_q, 4, head_dim))
    return [x.astype(np.float16) for x in (q, *rng.standard_normal((2, batch, seqlen_k, 2, head_dim)))]


def error(out, q, k, v):
    """In units of what one rounding of weights and output makes of it."""
    exact = cupyattn.attention(q, k, v, causal=True, kernel="numpy_float64")
    return float(np.abs(np.asarray(out, np.float64) - exact).max() / (np.abs(v).max().astype(float) * 2**-10 * 1.01))


def in_numpy(q, k, v):
    return cupyattn.attention(q, k, v, causal=True)


def in_torch(device):
    torch = pytest.importorskip("torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs PyTorch for CUDA")
    from cupyattn.integrations.torch import attention

    def call(*given):
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.cuda.stream(stream):
            return attention(*(torch.from_numpy(x).to(device) for x in given), causal=True).cpu().numpy()

    return call


def in_jax(device):
    jax = pytest.importorskip("jax")
    if device == "gpu" and jax.default_backend() != "gpu":
        pytest.skip("needs JAX for CUDA")
    from functools import partial

    from cupyattn.integrations.jax import attention

    call = jax.jit(partial(attention, causal=True))
    return lambda *given: call(*(jax.device_put(x, jax.devices(device)[0]) for x in given))


def in_cupy(*given):
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Stream(non_blocking=True):
        return cupyattn.attention(*map(cupy.asarray, given), causal=True).get()


CALLERS = {
    "numpy": lambda: in_numpy,
    "torch": lambda: in_torch("cpu"),
    "jax": lambda: in_jax("cpu"),
    "cupy-gpu": lambda: in_cupy,
    "torch-gpu": lambda: in_torch("cuda"),
    "jax-gpu": lambda: in_jax("gpu"),
}
LIBRARIES = [pytest.param(name, marks=[pytest.mark.gpu] if "gpu" in name else []) for name in CALLERS]


@pytest.mark.parametrize("library", LIBRARIES)
def test_many_threads(rng, library):
    """New forms of call, compiled and planned while others are; and each form in several threads at once."""
    call = CALLERS[library]()
    seeds = np.repeat(rng.integers(0, 2**31, 12), 4)

    def one(seed):
        given = random_arrays(seed)
        return error(call(*given), *given)

    with ThreadPoolExecutor(THREADS) as pool:
        assert max(pool.map(one, seeds)) <= 1


@pytest.mark.gpu
def test_threads_of_all_libraries_at_once(rng):
    callers = [CALLERS[name]() for name in ("cupy-gpu", "torch-gpu", "jax-gpu", "numpy")]
    seeds = rng.integers(0, 2**31, 48)

    def one(index):
        given = random_arrays(seeds[index])
        return error(callers[index % 4](*given), *given)

    with ThreadPoolExecutor(THREADS) as pool:
        assert max(pool.map(one, range(48))) <= 1


# -------------------------------------------------------------------------------------------------------- forks

FORKED = """
import os, sys
import numpy as np
import cupyattn

x = np.ones((1, 4, 2, 64), np.float16)
{before}
child = os.fork()
if child == 0:
    try:
        assert np.array_equal(cupyattn.attention(x, x, x), x)
{within}
    except BaseException as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)
        os._exit(1)
    os._exit(0)
print("exit status", os.waitpid(child, 0)[1])
{after}
"""


def forked(before="", within="", after=""):
    within = "\n".join(f"        {line}" for line in within.strip().splitlines())
    program = FORKED.format(before=before, within=within, after=after)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_forked_child_works_on_numpy():
    before = "cupyattn.attention(x, x, x)"
    assert forked(before, "x = x[:, :3]; assert cupyattn.attention(x, x, x).shape == x.shape") == "exit status 0\n"


def test_a_child_refuses_arrays_on_cuda_if_its_parent_had_used_it(monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setattr(arrays, "_readers", {np.ndarray: arrays._view_numpy})
    monkeypatch.setattr(arrays, "_forked", False)
    arrays._after_fork()
    arrays._after_fork()  # a child's child
    monkeypatch.setattr(arrays, "_cuda_was_lost", lambda: True)
    x, there = np.ones((1, 4, 2, 64), np.float16), at_address(0x1000, (1, 4, 2, 64), "float16")
    assert np.array_equal(cupyattn.attention(x, x, x), x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^k: got an array on CUDA in a process that was forked .*'spawn'"):
            cupyattn.attention(x, there, x)
    monkeypatch.setattr(arrays, "_cuda_was_lost", lambda: False)
    assert arrays.view(there, "k").device == 0


USE = "import cupy; y = cupy.asarray(x); plan = cupyattn.PrefillPlan(y, y, y); plan.run(y, y, y)"
CAUGHT = """
for call in (lambda: cupyattn.attention(y, y, y), lambda: plan.run(y, y, y)):
    try:
        call()
    except RuntimeError as error:
        assert "forked after CUDA had been used" in str(error) and str(error).startswith("q: got"), error
    else:
        raise AssertionError("not refused")
"""


@pytest.mark.gpu
def test_a_child_of_a_process_with_cuda():
    pytest.importorskip("cupy")
    after = "assert cupyattn.attention(y, y, y).get().all()"
    assert forked(USE, CAUGHT, after) == "exit status 0\n"


@pytest.mark.gpu
def test_a_child_of_a_process_that_used_cuda_through_torch_alone():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch for CUDA")
    before = "import torch; y = torch.from_numpy(x).cuda(); plan = None"
    within = CAUGHT.replace(", lambda: plan.run(y, y, y)", ",")
    assert forked(before, within) == "exit status 0\n"


@pytest.mark.gpu
def test_a_child_that_is_the_first_to_use_cuda():
    pytest.importorskip("cupy")
    assert forked(within=USE + "\nassert (plan.run(y, y, y).get() == x).all()") == "exit status 0\n"


# ------------------------------------------------------------------------------------------ devices and streams


def two_gpus():
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    return cupy


def test_arrays_on_different_gpus_are_refused():
    pytest.importorskip("cupy")
    q, k = at_address(0x10000, (1, 4, 2, 64), "float16"), at_address(0x20000, (1, 4, 2, 64), "float16", device=1)
    with pytest.raises(ValueError, match="^k: got an array on cuda:1, expected the other arrays' device cuda:0"):
        cupyattn.attention(q, k, k)


@pytest.mark.gpu
def test_several_gpus_in_one_process(rng):
    cupy = two_gpus()
    seeds = rng.integers(0, 2**31, 24)

    def one(index):
        given = random_arrays(seeds[index % 8])  # the same forms on all devices
        with cupy.cuda.Device(index % cupy.cuda.runtime.getDeviceCount()):
            here = [cupy.asarray(x) for x in given]
        out = cupyattn.attention(*here, causal=True)  # whatever the current device is
        assert out.device == here[0].device
        with out.device:
            return error(out.get(), *given)

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(one, range(24))) <= 1


class Stranger(Exception):
    """As CUDA complains of a stream that it does not know there."""


@pytest.mark.parametrize(
    "sign", ["CUDA_ERROR_INVALID_HANDLE: invalid resource handle", "cudaErrorInvalidResourceHandle"]
)
def test_a_stream_of_another_device_is_named(monkeypatch, sign):
    monkeypatch.setattr(streams, "current_stream", lambda like: 7)
    view = SimpleNamespace(device=0, library="cupy")

    def run(stream):
        raise Stranger(sign)

    with pytest.raises(
        ValueError, match="^stream: got a current stream that is not one of cuda:0's, expected a stream"
    ):
        streams.in_order(run, view, [view])
    sign = "something else"
    with pytest.raises(Stranger):
        streams.in_order(run, view, [view])


@pytest.mark.gpu
@pytest.mark.parametrize("planned", [False, True])
def test_a_stream_of_another_gpu_is_refused(planned):
    cupy = two_gpus()
    x = cupy.ones((1, 4, 2, 64), np.float16)
    plan = cupyattn.PrefillPlan(x, x, x)
    with cupy.cuda.Device(1):
        there = cupy.cuda.Stream(non_blocking=True)
    with (
        cupy.cuda.ExternalStream(there.ptr),
        pytest.raises(ValueError, match="^stream: got a current stream that is not"),
    ):
        plan.run(x, x, x) if planned else cupyattn.attention(x, x, x)
    cupyattn.attention(x, x, x)
