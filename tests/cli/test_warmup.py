"""`cupyattn warmup`: what it compiles, what it says, and every way to ask for something that cannot be."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import cupyattn.cli.warmup as warmup  # the module: the package's attribute of that name could be the function
from cupyattn import plan
from cupyattn.cli import app
from cupyattn.jit import cache, compile, sources

try:
    compile.nvrtc_version()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

SOURCE = 'extern "C" __global__ void fill(float* x) { x[threadIdx.x] = HEAD_DIM + DTYPE; }\n'


@pytest.fixture(autouse=True)
def variants(tmp_path, monkeypatch):
    """A kernel that compiles at once stands for the real ones. Returns the arguments of each request for variants."""
    (tmp_path / "kernels_cu").mkdir()
    (tmp_path / "kernels_cu" / "fill.cu").write_text(SOURCE)
    monkeypatch.setattr(sources, "folder", lambda: tmp_path / "kernels_cu")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_private", {})
    asked = []

    def made(arch, head_dims, dtypes):
        asked.append((arch, head_dims, dtypes))
        kernels = [
            ("fill", (("DTYPE", len(name)), ("HEAD_DIM", dim), ("SAME", 7))) for name in dtypes for dim in head_dims
        ]
        return kernels + kernels[:1]  # a repeated one is compiled once

    monkeypatch.setattr(plan, "warmup_variants", made)
    return asked


def invoke(*arguments: object):
    environment = {"COLUMNS": "200", "NO_COLOR": "1", "TERMINAL_WIDTH": "200"}
    return CliRunner().invoke(app, ["warmup", *map(str, arguments)], env=environment)


def test_it_compiles_once_and_finds_it_again(variants):
    first = invoke("--arch", 80, "--arch", "86")
    assert first.exit_code == 0, first.output
    assert variants == [(arch, (64, 128), ("float16", "bfloat16")) for arch in ("80", "86")]
    assert "8 compiled, 0 were there already, 0 failed" in first.output
    assert first.output.count("hd 64 ") == 4 and "SAME" not in first.output and first.stderr == ""
    second = invoke("--arch", 80, "--arch", "86")
    assert second.output.startswith("0 compiled, 8 were there already, 0 failed"), "nothing new: only the summary"
    assert cache.contents()[0] == 8
    third = invoke("--arch", 80, "--verbose")
    assert third.output.count("cached") == 4 and "DTYPE=7 HEAD_DIM=64 SAME=7" in third.output


def test_a_line_says_in_words_what_a_kernel_is_for():
    paged = (("DTYPE", 1), ("HEAD_DIM", 64), ("PACKED_Q", 1), ("CACHE_KIND", 2), ("MASK", 1), ("GROUP", 4))
    assert warmup.describe(warmup.Job("f", paged, "80")) == "bfloat16  hd 64   packed, paged, masked, group 4"
    dense = (("DTYPE", 0), ("HEAD_DIM", 256), ("CACHE_KIND", 0), ("SOFTCAP", 1), ("GROUP", 1))
    assert warmup.describe(warmup.Job("f", dense, "80")) == "float16   hd 256  dense, softcap"


def test_lines_are_narrow_and_kernels_that_sound_alike_differ_by_tile(tmp_path):
    defines = (("DTYPE", 1), ("HEAD_DIM", 128), ("PACKED_Q", 1), ("CACHE_KIND", 2), ("MASK", 1))
    meta = {"registers": 255, "seconds": 1.26, "spill_bytes": 0}
    job = warmup.Job("forward_sm80", defines, "90a")
    (line,) = warmup.summary({job: cache.Entry(tmp_path, meta, True)}, False)
    assert line.plain == "forward_sm80  sm_90a  bfloat16  hd 128  packed, paged, masked  255 regs  1.3 s"
    tiles = [warmup.Job("f", (*defines, ("TILE_M", rows), ("TILE_N", 64)), "80") for rows in (64, 128)]
    first, second = warmup.summary(
        {job: cache.Entry(tmp_path, meta | {"spill_bytes": 8}, False) for job in tiles}, False
    )
    assert "64 x 64" in first.plain and "128 x 64" in second.plain
    assert "cached  8 bytes spilled" in first.plain


def test_options_choose_variants(variants):
    result = invoke("--arch", 80, "--head-dim", 96, "--dtype", "bf16", "--dtype", "float32")
    assert result.exit_code == 0 and variants == [("80", (96,), ("bfloat16", "float32"))]


@pytest.mark.parametrize("name", ["90", "9.0", "sm_90", "90a", "sm_90a"])
def test_an_architecture_has_many_names(variants, name):
    assert invoke("--arch", name).exit_code == 0
    assert variants[0][0] == "90a"


def test_all_takes_what_can_be_planned_and_compiled(variants, monkeypatch):
    monkeypatch.setattr(warmup.compile, "supported_archs", lambda: (75, 80, 90))
    assert warmup.choose_archs([], True) == ["75", "80", "90a"]


def test_without_arch_the_devices_here_count(monkeypatch):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(warmup, "why_no_gpu", lambda: None)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 3)
    monkeypatch.setattr(warmup, "arch_of", lambda device: ("80", "90a", "80")[device])
    assert warmup.choose_archs([], False) == ["80", "90a"]
    monkeypatch.setattr(warmup, "arch_of", lambda device: "87")
    with pytest.raises(warmup.typer.BadParameter, match="got 87, expected one of 70, 75"):
        warmup.choose_archs([], False)


def test_without_arch_and_without_a_gpu_the_error_names_the_option(monkeypatch):
    monkeypatch.setattr(warmup, "why_no_gpu", lambda: "no device")
    result = invoke()
    assert result.exit_code == 2 and "--arch" in result.output and "no device" in result.output
    assert "cupyattn warmup --arch 90" in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--arch", "61"), "--arch: got 61, expected one of 70"),
        (("--arch", "hopper"), "got hopper, expected one of 70"),
        (("--arch", "87"), "got 87, expected one of 70"),
        (("--arch", "80", "--head-dim", "0"), "--head-dim: got 0, expected 1 to 256"),
        (("--arch", "80", "--head-dim", "257"), "--head-dim: got 257, expected 1 to 256"),
        (("--arch", "80", "--dtype", "int8"), "--dtype: got int8, expected float16, bfloat16, float32"),
    ],
)
def test_bad_input_is_refused(arguments, expected):
    result = invoke(*arguments)
    assert result.exit_code == 2 and expected in " ".join(result.output.replace("│", " ").split())


def test_a_kernel_that_does_not_compile_is_shown_and_the_others_are_kept(monkeypatch):
    (sources.folder() / "bad.cu").write_text("nonsense;\n")
    monkeypatch.setattr(plan, "warmup_variants", lambda *_: [("bad", ()), ("fill", (("HEAD_DIM", 1), ("DTYPE", 1)))])
    result = invoke("--arch", 80)
    assert result.exit_code == 1
    assert "1 compiled, 0 were there already, 1 failed" in result.output
    assert "kernel bad does not compile" in result.output and "bad.cu(1): error" in result.output


def test_a_cache_that_cannot_be_used_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    result = invoke("--arch", 80)
    assert result.exit_code == 1 and "nothing compiled here would be kept" in result.output
    if hasattr(cache.os, "geteuid"):
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "open"))
        result = invoke("--arch", 80)
        assert result.exit_code == 1 and "chmod 700" in result.output


def test_without_cupy_it_says_what_to_install(monkeypatch):
    def missing():
        raise ImportError(f"compiling kernels needs CuPy: {compile.INSTALL[12]}")

    monkeypatch.setattr(warmup.compile, "supported_archs", missing)
    result = invoke("--arch", 80)
    assert result.exit_code == 1 and compile.INSTALL[12] in result.output


def test_progress_runs_in_threads(monkeypatch):
    """The interpreter stays responsive while NVRTC works: its lock is released."""
    import threading
    import time

    slow = (
        'extern "C" __global__ void slow(float* x, int n) { float a[64];\n#pragma unroll\nfor (int i = 0; i < 64; i++)'
    )
    slow += (
        " a[i] = __sinf(x[i * n]);\n#pragma unroll\nfor (int i = 0; i < 64; i++) x[i * n + 1] = a[i] * a[63 - i]; }\n"
    )
    thread = threading.Thread(target=compile.compile_source, args=("slow", slow, compile.options((), "80"), "80"))
    ticks, start = 0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        ticks += 1
        time.sleep(0.001)
    assert ticks > 0.1 * (time.perf_counter() - start) / 0.001
