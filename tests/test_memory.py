"""memory_trace: what calls take and keep, on the CPU and in CuPy's pools."""

from __future__ import annotations

import doctest
import json
import sys
import tracemalloc

import numpy as np
import pytest

import cupyattn
from cupyattn import PagedKVCache, attention, memory, memory_trace
from cupyattn.cli.device import why_no_gpu

MB = 1 << 20


@pytest.mark.backends("numpy", "cuda")
def test_calls(backend):
    q = backend.put(np.ones((1, 512, 16, 64), np.float16))
    attention(q, q, q)  # whatever is prepared once is prepared
    with memory_trace("cuda" if backend.on_gpu else "cpu") as trace:
        taken = backend.put(np.zeros(4 * MB, np.uint8))
        outs = [attention(q, q, q) for _ in range(3)]
        cache = PagedKVCache(64, 16, 2, 64, device=0 if backend.on_gpu else None)
        del taken
    found = {one.name: one for one in trace.calls}
    assert found["attention"].calls == 3
    assert found["attention"].peak >= outs[0].nbytes and found["attention"].kept >= 3 * outs[0].nbytes
    assert found["attention"].kept < 3 * outs[0].nbytes + MB
    assert cache.nbytes <= found["PagedKVCache"].kept < cache.nbytes + MB
    assert found["elsewhere"].peak > 3.9 * MB and abs(found["elsewhere"].kept) < MB
    assert trace.peak - trace.start >= 4 * MB + found["attention"].kept + cache.nbytes
    assert trace.start + 3 * outs[0].nbytes + cache.nbytes <= trace.end < trace.peak
    assert trace.device == ("cuda" if backend.on_gpu else "cpu")
    as_dict = json.loads(json.dumps(trace.as_dict()))
    assert as_dict["peak"] == trace.peak and len(as_dict["calls"]) == len(trace.calls)
    assert "attention" in str(trace) and str(trace) == repr(trace)


def test_an_exception_goes_through_and_ends_the_call():
    with pytest.raises(ValueError), memory_trace("cpu") as trace:
        with pytest.raises(ValueError):
            attention(np.ones((1, 1, 3, 8), np.float32), *np.ones((2, 1, 1, 2, 8), np.float32))
        kept = np.zeros(MB, np.uint8)
        raise ValueError
    found = {one.name: one for one in trace.calls}
    assert found["attention"].calls == 1 and found["elsewhere"].peak > kept.nbytes * 0.9
    assert sys.getprofile() is None and not tracemalloc.is_tracing()


def test_tracemalloc_stays_on_if_it_was():
    tracemalloc.start()
    try:
        with memory_trace("cpu"):
            pass
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_refusals():
    with pytest.raises(ValueError, match="device: got 'gpu', expected 'cuda', 'cpu' or None"):
        memory_trace("gpu")
    with memory_trace("cpu"), pytest.raises(ValueError, match="one trace or profiler at a time"), memory_trace("cpu"):
        pass
    if why_no_gpu():
        with pytest.raises(ValueError, match="device: got 'cuda', expected 'cpu' here"):
            memory_trace("cuda")
        assert memory_trace().device == "cpu"


def test_doctest():
    assert doctest.testmod(memory).failed == 0 and cupyattn.memory_trace is memory_trace


def test_what_measures_is_no_call():
    """CuPy calls the meter of its pools, whose functions are in the package too."""
    with memory_trace("cpu") as trace:
        held = [np.ones(MB, np.uint8)]
        memory._why_no_gpu()
        held.append(np.ones(MB, np.uint8))
    assert [one.name for one in trace.calls] == ["elsewhere"]
    assert trace.calls[0].kept >= 2 * MB
