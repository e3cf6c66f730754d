"""HeldAppend without a GPU: what the driver is asked to launch is what the kernel's parameters say."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from cupyattn import jit
from cupyattn.arrays import View, contiguous_strides
from cupyattn.kernels import launch, params
from cupyattn.kernels.held_append import HeldAppend
from cupyattn.kernels.operands import AppendOperands
from cupyattn.kvcache.transfer import DeviceTransfer
from cupyattn.plan import INLINE_CAPACITIES, plan_append
from cupyattn.problem import describe_append

FUNCTION = 0xABC0


def on_gpu(pointer, *shape, dtype="float16"):
    return View(None, pointer, shape, contiguous_strides(shape), dtype, 0, "cupy", False)


@pytest.fixture
def driver(monkeypatch):
    """A driver that takes notes: `launches` (function and form, stream, arguments), `contexts` by thread."""
    cupy = pytest.importorskip("cupy")
    real = pytest.importorskip("cupy_backends.cuda.api.driver")
    notes = SimpleNamespace(launches=[], contexts=[], indices=0)

    def load(name, defines, *others):
        notes.indices = dict(defines).get("INLINE_INDICES", 0)
        return SimpleNamespace(function=SimpleNamespace(kernel=SimpleNamespace(ptr=FUNCTION)))

    def take(*given):
        *form, stream, arguments, extra = given
        first, second = (ctypes.c_void_p * 2).from_address(arguments)
        size = params.APPEND_POINTERS.size + params.APPEND_SCALARS.size
        held = ctypes.string_at(first, size), ctypes.string_at(second, 4 * notes.indices)
        notes.launches.append(((*form, extra), stream, *held))

    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(launch, "describe_device", lambda device: SimpleNamespace(arch="sm_90a"))
    monkeypatch.setattr(real, "launchKernel", take)
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: notes.contexts.append(threading.get_ident()))
    return notes


def prepared(batch):
    """An append of a token to each of so many sequences, and an example of its operands."""
    operands = AppendOperands(
        *(on_gpu(pointer, 64, 16, 2, 64) for pointer in (1 << 40, 1 << 41)),
        *(on_gpu(pointer, batch, 1, 2, 64) for pointer in (1 << 20, 1 << 21)),
        cache_seqlens=on_gpu(0, batch, dtype="int32"),
        block_table=on_gpu(0, batch, 1, dtype="int32"),
    )
    caches = operands.k_cache, operands.v_cache, operands.k, operands.v
    append = describe_append(*caches, cache_seqlens=operands.cache_seqlens, block_table=operands.block_table)
    return launch.prepare_append(append, 0), operands


@pytest.mark.parametrize("batch", [1, 20, 100, 464])
def test_each_launch_takes_the_new_rows_and_the_indices_of_that_moment(rng, driver, batch):
    append, operands = prepared(batch)
    numbers = rng.integers(0, 1 << 20, (3, 2 * batch), np.int32)
    indices, held = DeviceTransfer(0).hold(append, operands, numbers[0])
    assert isinstance(held, HeldAppend) and indices.tolist() == numbers[0].tolist()
    for i, expected in enumerate(numbers):
        indices[:] = expected
        operands.k, operands.v = (on_gpu((1 << 30) + 4096 * (2 * i + j), batch, 1, 2, 64) for j in range(2))
        held(operands.k, operands.v, 77 + i)
        form, stream, argument, inline = driver.launches[-1]
        _, grid, threads = plan_append(append.append)
        assert form == (FUNCTION, grid, 1, 1, threads, 1, 1, 0, 0) and stream == 77 + i
        assert argument == params.pack_append(operands, params.append_scalars(append.append))
        found = np.frombuffer(inline, np.int32)
        assert found[: 2 * batch].tolist() == expected.tolist() and not found[2 * batch :].any()
        assert len(found) in INLINE_CAPACITIES and len(found) >= 2 * batch
    assert len(driver.launches) == 3


def test_each_thread_gets_the_context_once(driver):
    append, operands = prepared(2)
    _, held = DeviceTransfer(0).hold(append, operands, np.zeros(4, np.int32))
    for _ in range(2):
        held(operands.k, operands.v, 0)
    thread = threading.Thread(target=held, args=(operands.k, operands.v, 0))
    thread.start()
    thread.join()
    assert len(driver.launches) == 3 and driver.contexts[0] == threading.get_ident()
    assert len(driver.contexts) == 2 and len({*driver.contexts}) == 2


def test_what_does_not_fit_an_argument_is_no_held_append(driver):
    append, operands = prepared(465)
    packet = np.arange(930, dtype=np.int32)
    indices, again = DeviceTransfer(0).hold(append, operands, packet)
    assert len(packet) > INLINE_CAPACITIES[-1] and indices is packet and not isinstance(again, HeldAppend)
