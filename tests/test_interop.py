"""On a GPU, beside the libraries that arrays come from: Numba arrays, captured graphs, threads with own streams."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cupyattn

pytestmark = pytest.mark.gpu


def error(out: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options) -> float:
    """The largest error in units of what float16 inputs of this size allow: one rounding of weights and output."""
    exact = cupyattn.attention(q, k, v, kernel="numpy_float64", **options)
    allowed = np.abs(v).max().astype(np.float64) * (np.finfo(np.float16).eps + 2**-17)
    return float(np.abs(out.astype(np.float64) - exact).max() / allowed)


def arrays(rng, seqlen=128, head_dim=64):
    return [rng.standard_normal((2, seqlen, heads, head_dim)).astype(np.float16) for heads in (4, 2, 2)]


def test_numba_arrays_come_back_as_numba_arrays(rng):
    cuda = pytest.importorskip("numba.cuda")
    host = arrays(rng)
    given = [cuda.to_device(array) for array in host]
    out = cupyattn.attention(*given, causal=True)
    assert type(out) is type(given[0])
    assert error(out.copy_to_host(), *host, causal=True) <= 1


def test_a_captured_torch_graph_sees_new_values(rng):
    torch = pytest.importorskip("torch")
    host = arrays(rng)
    q, k, v = (torch.from_numpy(array).cuda() for array in host)
    out = torch.empty_like(q)
    cupyattn.attention(q, k, v, causal=True, out=out)  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cupyattn.attention(q, k, v, causal=True, out=out)
    q.copy_(-q)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert error(out.cpu().numpy(), -host[0], *host[1:], causal=True) <= 1


def test_a_captured_cupy_graph_sees_new_values(rng):
    cupy = pytest.importorskip("cupy")
    host = arrays(rng)
    q, k, v = (cupy.asarray(array) for array in host)
    out = cupy.empty_like(q)
    cupyattn.attention(q, k, v, causal=True, out=out)  # compiles, which a capture must not
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        cupyattn.attention(q, k, v, causal=True, out=out)
        graph = stream.end_capture()
    out.fill(np.nan)
    cupy.negative(q, out=q)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    assert error(cupy.asnumpy(out), -host[0], *host[1:], causal=True) <= 1


def test_threads_with_streams_of_their_own(rng):
    cupy = pytest.importorskip("cupy")
    seeds = rng.integers(0, 2**31, 32)

    def one(index: int) -> float:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            host = arrays(np.random.default_rng(seeds[index]), 64 + index, 40 + 8 * (index % 4))
            out = cupyattn.attention(*(cupy.asarray(array) for array in host))
            stream.synchronize()
            return error(cupy.asnumpy(out), *host)

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(one, range(32))) <= 1
