"""NVRTC without a GPU: options, resource use, architectures that are not present, and errors that show everything."""

import pickle
import sys

import pytest

from cupyattn.jit import compile

try:
    compile.nvrtc_version()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SCALE = """
extern "C" __global__ void scale(float* x) {
    __shared__ float tile[THREADS];
    tile[threadIdx.x] = x[threadIdx.x] * FACTOR;
    __syncthreads();
    x[threadIdx.x] = tile[THREADS - 1 - threadIdx.x];
}
"""
SPILL = """
extern "C" __global__ void plain(float* x) { x[0] = 1; }
extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x, int n) {
    float a[96];
    #pragma unroll
    for (int i = 0; i < 96; i++) a[i] = x[i * n];
    #pragma unroll
    for (int i = 0; i < 96; i++) x[i * n + 1] = a[i] * a[95 - i];
}
"""
DEFINES = (("THREADS", 256), ("FACTOR", "2.0f"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "scale.cu").write_text(SCALE)
    (tmp_path / "spill.cu").write_text(SPILL)
    (tmp_path / "wrong.cu").write_text('#include "broken.cuh"\n')
    (tmp_path / "broken.cuh").write_text("\n\nfloaty x;\n")
    return tmp_path


@pytest.mark.parametrize("arch", ["70", "75", "80", "86", "89", "90", "90a", "100", "100a", "120", "120a"])
def test_it_compiles_for_architectures_that_are_not_present(root, arch):
    if int(arch.rstrip("a")) not in compile.supported_archs():
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    built = compile.compile_cubin("scale", DEFINES, arch, root)
    assert built.cubin[:4] == b"\x7fELF"
    assert built.nvrtc == "{}.{}".format(*compile.nvrtc_version())
    assert built.shared_bytes == 1024
    assert 0 < built.registers < 64 and built.spill_bytes == 0
    assert 0 < built.seconds < 5
    assert f"sm_{arch}" in built.log


def test_resource_use_is_told_for_each_function(root):
    built = compile.compile_cubin("spill", (), "80", root)
    assert set(built.functions) == {"plain", "spill"}
    plain, spill = built.functions["plain"], built.functions["spill"]
    assert plain.spill_stores == plain.spill_loads == 0
    assert spill.registers == built.registers == 32
    assert spill.spill_stores > 0 and spill.spill_loads > 0
    assert built.spill_bytes == spill.spill_stores + spill.spill_loads


def test_a_second_compilation_tells_them_too(root):
    """NVRTC 12.9 and later find the cubin in the driver's cache, where there is a driver, unless told not to."""
    first, second = (compile.compile_cubin("spill", (), "80", root) for _ in range(2))
    assert first.functions == second.functions and "ptxas" in second.log


def test_spills_of_called_functions_count_for_their_caller():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'outer' for 'sm_90a'
ptxas info    : Function properties for outer
ptxas         .     160 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 160 bytes cumulative stack size, 2048 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 9.146 ms
ptxas info    : Function properties for _Z5innerPfi
ptxas         .     0 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert compile.usages(log) == {
        "outer": compile.Usage(registers=34, spill_stores=20, spill_loads=40, shared_bytes=2048),
        "other": compile.Usage(registers=8, spill_stores=0, spill_loads=0, shared_bytes=0),
    }


def test_an_error_shows_kernel_options_log_and_the_file_at_fault(root):
    with pytest.raises(compile.CompileError) as caught:
        compile.compile_cubin("wrong", (("HEAD_DIM", 64),), "80", root)
    message = str(caught.value)
    assert "kernel wrong does not compile" in message
    assert "-arch=sm_80" in message and "-DHEAD_DIM=64" in message
    assert 'broken.cuh(3): error: identifier "floaty" is undefined' in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # it crosses process borders whole


def test_an_option_that_nvrtc_does_not_know_is_shown(root):
    with pytest.raises(compile.CompileError, match="--bogus"):
        compile.compile_source("scale", SCALE, ("-arch=sm_80", "--bogus"), "80")


def test_options_do_not_depend_on_the_order_of_the_definitions():
    options = compile.options((("B", True), ("A", 1)), "90a")
    assert options == compile.options((("A", 1), ("B", 1)), "90a")
    assert options[-2:] == ("-DA=1", "-DB=1") and "-arch=sm_90a" in options
    assert not any("fast" in option for option in options)


@pytest.mark.parametrize(
    ("capability", "expected"), [("75", "75"), ("80", "80"), ("86", "86"), ("89", "89"), ("90", "90a"), ("120", "120a")]
)
def test_target_takes_the_a_variant_where_there_is_one(capability, expected):
    assert compile.target(capability) == expected


def test_target_falls_back_within_a_generation_and_refuses_beyond(monkeypatch):
    monkeypatch.setattr(compile, "supported_archs", lambda: (75, 80, 86, 90))
    assert compile.target("89") == "86"
    with pytest.raises(RuntimeError, match=r"compute capability 7.0, expected one .*pip install \"cupy-cuda12x"):
        compile.target("70")
    with pytest.raises(RuntimeError, match=r"compute capability 12.0, .*\(75, 80, 86, 90\): pip install -U"):
        compile.target("120")
    with pytest.raises(RuntimeError, match="compute capability 6.1, expected 7.0 or newer"):
        compile.target("61")


def test_an_architecture_that_nvrtc_does_not_know_is_refused(root):
    with pytest.raises(compile.CompileError, match="compute capability 6.0, expected 7.0 or newer"):
        compile.compile_cubin("scale", DEFINES, "60", root)


def test_without_cupy_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(ImportError, match=r'needs CuPy, which is not installed here .*pip install "cupy-cuda12x'):
        compile.nvrtc_version()


def test_without_libnvrtc_the_error_names_the_command(monkeypatch):
    from cupy_backends.cuda.libs import nvrtc

    def missing():
        raise RuntimeError("no such file: libnvrtc.so")

    monkeypatch.setattr(nvrtc, "getVersion", missing)
    with pytest.raises(ImportError, match=r'libnvrtc \(no such file.*pip install "cupy-cuda1[23]x'):
        compile.nvrtc_version()
