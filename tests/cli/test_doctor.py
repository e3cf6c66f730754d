"""`cupyattn doctor`: runs anywhere, and on machines with each kind of fault it names the command that mends it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import cupyattn.cli.doctor as doctor
from cupyattn.cli import app
from cupyattn.jit import cache, compile


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_private", {})
    return tmp_path / "cache"


def invoke():
    return CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "60", "NO_COLOR": "1"})


def lines(check) -> list[doctor.Line]:
    return doctor.examine("check", check)


def stand_in(monkeypatch, count=1, capability="90", runtime=12090, version="14.2.0"):
    """A CuPy with `count` devices, or one whose device count raises if that is a string."""

    class CUDARuntimeError(RuntimeError):
        pass

    def get_device_count():
        if isinstance(count, str):
            raise CUDARuntimeError(count)
        return count

    api = types.SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=get_device_count,
        runtimeGetVersion=lambda: runtime,
        getDeviceProperties=lambda device: {"name": b"NVIDIA Test", "totalGlobalMem": 80 * 2**30},
    )
    device = types.SimpleNamespace(compute_capability=capability)
    fake = types.SimpleNamespace(__version__=version, cuda=types.SimpleNamespace(runtime=api, Device=lambda _: device))
    monkeypatch.setattr(doctor, "cupy", lambda: fake)
    return fake


def test_it_runs_here_and_says_what_works():
    result = invoke()
    assert result.exit_code == 0, result.output
    for name in doctor.CHECKS:
        assert name in result.output or (name == "GPU" and "cuda:0" in result.output)
    assert "cupyattn works here" in result.output and "Try: cupyattn demo" in result.output
    text = [line for line in result.output.splitlines() if not line.strip().startswith(("mend:", "if wanted:"))]
    assert all(len(line) <= 60 or " " not in line[20:] for line in text)


def test_verdict():
    fine = [doctor.Line(doctor.OK, doctor.BACKEND, "good"), doctor.Line(doctor.OK, "cuda:0", f"{doctor.RAN} well")]
    assert doctor.verdict(fine) == "cupyattn works here, on the GPU and on NumPy. Try: cupyattn demo"
    assert doctor.verdict(fine[:1]) == "cupyattn works here, on NumPy. Try: cupyattn demo"
    assert "1 of 2 checks failed" in doctor.verdict([fine[0], doctor.Line(doctor.FAIL, "driver", "old", "new")])
    assert doctor.verdict([doctor.Line(doctor.FAIL, doctor.BACKEND, "bad")]).startswith("cupyattn does not work here.")


def test_it_runs_without_cupy(monkeypatch):
    for name in ("cupy", "cupy_backends", "cupy_backends.cuda.libs"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(doctor, "cupy_wheels", lambda: [])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    for hardware, state in ((True, doctor.FAIL), (False, doctor.NOTE)):
        monkeypatch.setattr(doctor, "nvidia_hardware", lambda hardware=hardware: hardware)
        (line,) = lines(doctor.check_cupy)
        assert line.state == state and line.mend == compile.INSTALL[12]
        result = invoke()
        assert result.exit_code == 0, result.output
        assert f"{compile.INSTALL[12]}\n" in result.output  # unbroken at 60 columns, and not eaten as markup


def test_importing_it_loads_no_library_of_arrays():
    code = "import sys, cupyattn.cli.doctor; print(sorted({'cupy', 'torch', 'jax'} & set(sys.modules)))"
    path = os.pathsep.join([str(Path(doctor.__file__).parents[2]), *sys.path])
    asked = [sys.executable, "-c", code]
    assert subprocess.check_output(asked, text=True, env=os.environ | {"PYTHONPATH": path}).strip() == "[]"


def test_a_wrong_numpy_backend_decides_the_exit_code(monkeypatch):
    module = importlib.import_module("cupyattn.attention")  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "attention", lambda q, k, v, causal: np.zeros_like(q))
    result = invoke()
    assert result.exit_code == 1 and "does not work here" in result.output
    monkeypatch.setattr(module, "attention", lambda q, k, v, causal: 1 / 0)
    assert invoke().exit_code == 1


def test_a_check_that_breaks_becomes_a_line_and_the_others_run(monkeypatch):
    def broken():
        yield doctor.Line(doctor.OK, "first", "works")
        raise RuntimeError("[bold]second\ndetails")

    monkeypatch.setitem(doctor.CHECKS, "driver", broken)
    result = invoke()
    assert result.exit_code == 0 and "first" in result.output and "1 of " in result.output
    assert "RuntimeError: [bold]second" in result.output and "details" not in result.output
    assert "mend: pip install --force-reinstall" in result.output


def test_cupy_faults(monkeypatch):
    monkeypatch.setattr(doctor, "cupy_wheels", lambda: ["cupy-cuda12x", "cupy-cuda13x"])
    stand_in(monkeypatch)
    both, fine = lines(doctor.check_cupy)
    assert both.state == doctor.FAIL
    assert both.mend == f"pip uninstall -y cupy-cuda12x cupy-cuda13x && {compile.INSTALL[12]}"
    assert fine == doctor.Line(doctor.OK, "CuPy", "14.2.0 for CUDA 12.9")
    monkeypatch.setattr(doctor, "cupy_wheels", lambda: ["cupy-cuda13x"])
    stand_in(monkeypatch, version="13.6.0")
    (old,) = lines(doctor.check_cupy)
    assert old.state == doctor.FAIL and old.mend == compile.INSTALL[13]
    monkeypatch.setattr(doctor, "cupy", lambda: None)
    monkeypatch.setattr(doctor, "why_no_cupy", lambda: "undefined symbol")
    (broken,) = lines(doctor.check_cupy)
    assert broken.state == doctor.FAIL and "undefined symbol" in broken.text and "cuda13x" in broken.mend


def test_driver_faults(monkeypatch):
    monkeypatch.setattr(doctor, "cupy_wheels", lambda: ["cupy-cuda13x"])
    monkeypatch.setattr(doctor, "driver_mend", lambda: "get a driver")
    stand_in(monkeypatch, runtime=13000)
    for version, state, mend in (
        (13020, doctor.OK, ""),
        (12080, doctor.FAIL, f"pip uninstall -y cupy-cuda13x && {compile.INSTALL[12]}"),
        (11040, doctor.FAIL, "get a driver"),
    ):
        monkeypatch.setattr(doctor, "driver_cuda_version", lambda version=version: version)
        (line,) = lines(doctor.check_driver)
        assert (line.state, line.mend) == (state, mend)
    monkeypatch.setattr(doctor, "driver_cuda_version", lambda: None)
    for hardware, state, mend in ((True, doctor.FAIL, "get a driver"), (False, doctor.NOTE, "")):
        monkeypatch.setattr(doctor, "nvidia_hardware", lambda hardware=hardware: hardware)
        (line,) = lines(doctor.check_driver)
        assert (line.state, line.mend) == (state, mend)


def test_gpu_lines(monkeypatch):
    monkeypatch.setattr(doctor, "run_on_gpu", lambda device: doctor.Line(doctor.OK, f"cuda:{device}", "runs"))
    monkeypatch.setattr(doctor, "driver_mend", lambda: "get a driver")
    stand_in(monkeypatch, count=2)
    found = lines(doctor.check_gpus)
    assert [line.name for line in found] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert found[0].text == "NVIDIA Test, compute capability 9.0, 80 GiB: tested"
    stand_in(monkeypatch, capability="61")
    (old,) = lines(doctor.check_gpus)
    assert old.state == doctor.NOTE and "6.1" in old.text and "not supported" in old.text
    stand_in(monkeypatch, count="cudaErrorNoDevice")
    monkeypatch.setattr(doctor, "nvidia_hardware", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (none,) = lines(doctor.check_gpus)
    assert (none.state, none.text, none.mend) == (doctor.FAIL, "cudaErrorNoDevice", "get a driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert lines(doctor.check_gpus)[0].mend == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(doctor, "nvidia_hardware", lambda: False)
    monkeypatch.setattr(doctor, "driver_cuda_version", lambda: None)
    assert lines(doctor.check_gpus)[0].state == doctor.NOTE


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (61, "not supported"),
        (70, "forward_simt"),
        (80, "never run"),
        (87, "not tested"),
        (90, "tested"),
        (120, "never run"),
    ],
)
def test_support(capability, expected):
    assert expected in doctor.support(capability)


def test_nvrtc_faults(monkeypatch):
    stand_in(monkeypatch, capability="70")
    with monkeypatch.context() as patch:
        patch.setattr(compile, "nvrtc_version", lambda: (13, 5))
        patch.setattr(compile, "supported_archs", lambda: (75, 80, 90))
        (line,) = lines(doctor.check_nvrtc)
        assert line.state == doctor.FAIL and "7.0" in line.text and line.mend == compile.INSTALL[12]

    def missing():
        raise ImportError(f"compiling kernels needs libnvrtc (no such file): {compile.INSTALL[13]}")

    monkeypatch.setattr(compile, "nvrtc_version", missing)
    (line,) = lines(doctor.check_nvrtc)
    assert line.state == doctor.FAIL and "libnvrtc" in line.text and line.mend == compile.INSTALL[13]


def test_cache_lines(home, monkeypatch):
    (line,) = lines(doctor.check_cache)
    assert line.state == doctor.OK and "when the first kernel" in line.text and not home.exists()
    (home / "kernel-sm_80-0").mkdir(parents=True)
    (home / "kernel-sm_80-0" / cache.CUBIN).write_bytes(bytes(2**20))
    home.chmod(0o700)
    (line,) = lines(doctor.check_cache)
    assert line.state == doctor.OK and "1 kernels, 1.0 MiB" in line.text
    if hasattr(os, "geteuid"):
        home.chmod(0o777)
        (line,) = lines(doctor.check_cache)
        assert line.state == doctor.FAIL and line.mend == f"chmod 700 '{home}'"
        home.chmod(0o700)

    def read_only(**_):
        raise OSError("read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", read_only)
    (line,) = lines(doctor.check_cache)
    assert line.state == doctor.FAIL and line.mend.startswith(f"export {cache.VARIABLE}=")


def test_optional_libraries(monkeypatch):
    missing = doctor.optional("no_such_library")
    assert missing == doctor.Line(
        doctor.NOTE, "no_such_library", "not installed (optional)", "pip install no_such_library"
    )
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    broken = doctor.optional("no_such_library")
    assert broken.state == doctor.FAIL and broken.mend == "pip install --force-reinstall no_such_library"


def test_sharing_is_checked_by_address(monkeypatch):
    array = np.zeros(8, np.float32)
    monkeypatch.setattr(doctor, "capabilities", lambda: [])
    shared = doctor.sharing("lib", "1.0", False, lambda on_gpu: (array, array.ctypes.data), "mend it")
    assert shared == doctor.Line(doctor.OK, "lib", "1.0 shares the CPU with NumPy, without a copy")
    copied = doctor.sharing("lib", "1.0", False, lambda on_gpu: (array, 1), "mend it")
    assert copied.state == doctor.FAIL and copied.mend == "pip install -U lib"
    monkeypatch.setattr(doctor, "capabilities", lambda: ["90"])
    apart = doctor.sharing("lib", "1.0", False, lambda on_gpu: (array, array.ctypes.data), "mend it")
    assert apart.state == doctor.NOTE and "does not see the GPU" in apart.text and apart.mend == "mend it"


def test_the_tiny_problem_is_what_the_formula_says():
    q, k, v, expected = doctor.tiny_problem()
    row, head = 3, 2  # sees keys 0 to 3 + 7 - 5
    scores = k[0, :6, head // 2].astype(np.float64) @ q[0, row, head] / 4
    weights = np.exp(scores) / np.exp(scores).sum()
    assert np.allclose(expected[0, row, head], weights @ v[0, :6, head // 2], atol=1e-12)


@pytest.mark.parametrize("tool", ["ubuntu-drivers", "apt-get", "dnf", "pacman", ""])
def test_driver_mend_fits_the_system(monkeypatch, tool):
    monkeypatch.setattr(doctor.Path, "exists", lambda path: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name == tool else None)
    assert (tool.split("-")[0] or "https://") in doctor.driver_mend()
    monkeypatch.setattr(doctor.Path, "exists", lambda path: str(path) == "/.dockerenv")
    assert "--gpus all" in doctor.driver_mend()


@pytest.mark.gpu
def test_a_gpu_is_found_and_run():
    found = lines(doctor.check_gpus)
    assert [line.state for line in found] == [doctor.OK] * len(found) and len(found) >= 2
    assert "float16 attention" in found[1].text
    (line,) = lines(doctor.check_driver)
    assert line.state == doctor.OK
