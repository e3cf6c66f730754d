"""Loading: with a stand-in for CuPy what is asked of it, and on a GPU that the kernels run."""

import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupyattn.jit import cache, compile, module, sources

try:
    compile.nvrtc_version()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)


def count_devices():
    from cupy.cuda import runtime

    try:
        return runtime.getDeviceCount()
    except runtime.CUDARuntimeError:
        return 0


DEVICES = count_devices()
SOURCE = """
extern __shared__ float tile[];
extern "C" __global__ void reverse(float* x, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = tile[n - 1 - i] * FACTOR;
}
extern "C" __global__ void other(float* x) { x[0] = 0; }
"""
DEFINES = (("FACTOR", 2),)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    (tmp_path / "kernels_cu").mkdir()
    (tmp_path / "kernels_cu" / "reverse.cu").write_text(SOURCE)
    monkeypatch.setattr(sources, "folder", lambda: tmp_path / "kernels_cu")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_private", {})
    monkeypatch.setattr(module, "_kernels", {})
    module.arch_of.cache_clear()
    yield
    module.arch_of.cache_clear()


class FakeDriverError(RuntimeError):
    pass


@pytest.fixture
def fake(monkeypatch):
    """A CuPy of two devices that notes what is loaded where, and lets 100 KB of shared memory through."""
    current, log, default = [0], [], 48 * 1024

    class Device:
        attributes = {"MaxSharedMemoryPerBlockOptin": 100 * 1024}

        def __init__(self, number):
            self.number = number
            self.compute_capability = ("90", "86")[number]

        def __enter__(self):
            current.append(self.number)
            return self

        def __exit__(self, *_):
            current.pop()

    class Function:
        shared = default

        @property
        def max_dynamic_shared_size_bytes(self):
            return self.shared

        @max_dynamic_shared_size_bytes.setter
        def max_dynamic_shared_size_bytes(self, value):
            if value > 100 * 1024:
                raise FakeDriverError("invalid value")
            self.shared = value

    class RawModule:
        def __init__(self, *, path):
            self.path = path

        def get_function(self, name):
            if fake.failures:
                fake.failures.pop()()
                raise FakeDriverError("file not found")
            if name not in ("reverse", "other"):
                raise FakeDriverError("named symbol not found")
            log.append((self.path, name, current[-1]))
            return Function()

    driver = types.SimpleNamespace(CUDADriverError=FakeDriverError)
    fake = types.SimpleNamespace(
        RawModule=RawModule, cuda=types.SimpleNamespace(Device=Device, driver=driver), log=log, failures=[]
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def test_a_second_load_is_the_same_object(fake):
    first = module.load("reverse", DEFINES, "90a", "reverse", 0)
    assert module.load("reverse", DEFINES, "90a", "reverse", 0) is first
    assert len(fake.log) == 1 and fake.log[0][0].endswith(cache.CUBIN)
    assert first.meta["functions"].keys() == {"reverse", "other"} and first.meta["arch"] == "90a"


def test_a_hit_takes_under_two_microseconds(fake):
    defines = tuple((f"NAME_{i}", i) for i in range(10)) + DEFINES
    module.load("reverse", defines, "90a", "reverse", 0, 1024)
    best = min(_timed(lambda: module.load("reverse", defines, "90a", "reverse", 0, 1024)) for _ in range(5))
    assert best < 2e-6


def _timed(call, repeats=10_000):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def test_each_device_has_its_own(fake):
    kernels = [module.load("reverse", DEFINES, "86", "reverse", device) for device in (0, 1)]
    assert kernels[0] is not kernels[1]
    assert [device for _, _, device in fake.log] == [0, 1]
    assert module.arch_of(0) == "90a" and module.arch_of(1) == "86"


def test_shared_memory_is_raised_where_needed_and_never_lowered(fake):
    assert module.load("reverse", DEFINES, "86", "reverse", 0, 1024).function.shared == 48 * 1024
    assert module.load("reverse", DEFINES, "86", "reverse", 0, 64 * 1024).function.shared == 64 * 1024
    with pytest.raises(RuntimeError, match="kernel reverse: got 200000 bytes .*at most 102400 on cuda:1"):
        module.load("reverse", DEFINES, "86", "reverse", 1, 200_000)


def test_an_unknown_function_is_refused_with_the_known_ones(fake):
    with pytest.raises(RuntimeError, match="got function 'reversed', expected one of .*reverse"):
        module.load("reverse", DEFINES, "86", "reversed", 0)


def test_a_cache_cleared_between_fetch_and_load_is_made_again(fake, tmp_path):
    import shutil

    fake.failures.append(lambda: shutil.rmtree(tmp_path / "cache"))
    assert module.load("reverse", DEFINES, "86", "reverse", 0).meta["kernel"] == "reverse"
    fake.failures.append(lambda: None)  # the file is there: the driver means something else
    with pytest.raises(FakeDriverError):
        module.load("reverse", DEFINES, "86", "other", 0)


def test_threads_share_one_kernel(fake):
    barrier = threading.Barrier(8)

    def work(_):
        barrier.wait()
        return module.load("reverse", DEFINES, "86", "reverse", 0)

    with ThreadPoolExecutor(8) as pool:
        assert len({id(kernel) for kernel in pool.map(work, range(8))}) == 1


def test_without_cupy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r'GPU arrays need CuPy .*pip install "cupy-cuda12x'):
        module.load("reverse", DEFINES, "86", "reverse", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("device", range(max(DEVICES, 1)))
@pytest.mark.parametrize("kilobytes", [4, 64])
def test_a_loaded_kernel_runs_on_every_device(device, kilobytes):
    import cupy

    n = kilobytes * 256
    kernel = module.load("reverse", DEFINES, module.arch_of(device), "reverse", device, n * 4)
    assert cupy.cuda.runtime.getDevice() == 0
    with cupy.cuda.Device(device):
        x = cupy.arange(n, dtype=cupy.float32)
        kernel.function((1,), (256,), (x, n), shared_mem=n * 4)
        assert (x == 2 * cupy.arange(n, dtype=cupy.float32)[::-1]).all()
        assert kernel.function.num_regs == kernel.meta["functions"]["reverse"]["registers"]


@pytest.mark.gpu
def test_an_unknown_function_is_refused_by_the_driver_too():
    with pytest.raises(RuntimeError, match="got function 'reversed', expected one of .*reverse"):
        module.load("reverse", DEFINES, module.arch_of(0), "reversed", 0)


@pytest.mark.gpu
def test_too_much_shared_memory_is_refused_with_the_limit():
    with pytest.raises(RuntimeError, match="got 1000000 bytes .*at most [0-9]+ on cuda:0"):
        module.load("reverse", DEFINES, module.arch_of(0), "reverse", 0, 1_000_000)


@pytest.mark.gpu
def test_a_warm_load_takes_under_ten_milliseconds():
    arch, times = module.arch_of(0), []
    for factor in range(5):  # compile first, so that each timed load reads the disk and loads a module of its own
        cache.fetch("reverse", (("FACTOR", factor),), arch)
    for factor in range(5):
        start = time.perf_counter()
        module.load("reverse", (("FACTOR", factor),), arch, "reverse", 0)
        times.append(time.perf_counter() - start)
    assert sorted(times)[2] < 0.010
