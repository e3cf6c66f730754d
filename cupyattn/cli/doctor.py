"""`cupyattn doctor`: what works on this machine, what does not, and the one command that mends it.

Each check yields lines and may fail as it likes: an exception becomes a failed line. Only the NumPy backend decides
the exit code, since with it alone the main job runs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from ..jit import cache, compile
from .device import driver_cuda_version, nvidia_hardware

OK, NOTE, FAIL = "ok", "note", "fail"
STYLES = {OK: "green", NOTE: "yellow", FAIL: "bold red"}
INDENT = 20
COMPILED_ONLY = (75, 80, 86, 89, 100, 120)
TRIVIAL = 'extern "C" __global__ void trivial(float* x) { x[threadIdx.x] = 1; }\n'


@dataclass(frozen=True, slots=True)
class Line:
    """One finding. `mend` is the command that mends it, if it needs mending."""

    state: str
    name: str
    text: str
    mend: str = ""


def doctor() -> None:
    """Say what works on this machine, what does not, and the one command that mends it.

    Exit code 0 if the main job can run (on the CPU at least), 1 otherwise.
    """
    console = Console(highlight=False)
    lines = []
    for name, check in CHECKS.items():
        with console.status(f"checking {name}"):
            found = examine(name, check)
        for line in found:
            show(line, console)
        lines += found
    console.print(f"\n{verdict(lines)}")
    if not works(lines):
        raise typer.Exit(1)


def works(lines: list[Line]) -> bool:
    return any(line.name == BACKEND and line.state == OK for line in lines)


def verdict(lines: list[Line]) -> str:
    """What the findings come to, in one or two sentences."""
    faults = sum(line.state == FAIL for line in lines)
    failed = f" {faults} of {len(lines)} checks failed: the lines marked fail say what to run." if faults else ""
    if not works(lines):
        return f"cupyattn does not work here.{failed}"
    gpu = any(line.name.startswith("cuda:") and line.state == OK and line.text.startswith(RAN) for line in lines)
    return f"cupyattn works here, {'on the GPU and ' if gpu else ''}on NumPy.{failed} Try: cupyattn demo"


def examine(name: str, check: Callable[[], Iterator[Line]]) -> list[Line]:
    """The check's lines; what it raises becomes a failed one."""
    found: list[Line] = []
    try:
        found.extend(check())
    except Exception as error:  # whatever a broken installation raises
        found.append(Line(FAIL, name, f"{type(error).__name__}: {first_line(error)}", reinstall()))
    return found


def show(line: Line, console: Console) -> None:
    """Print a line, broken between words, and below it the command, unbroken so that it can be copied."""
    room = max(console.width - INDENT, 20)
    first, *rest = textwrap.wrap(line.text, room, break_long_words=False, break_on_hyphens=False) or [""]
    console.print(Text.assemble((f"{line.state:6}", STYLES[line.state]), f"{line.name:14}", first), soft_wrap=True)
    for text in rest:
        console.print(Text(" " * INDENT + text), soft_wrap=True)
    if line.mend:
        label = "mend: " if line.state == FAIL else "if wanted: "
        console.print(Text.assemble(" " * INDENT, (label, "bold"), line.mend), soft_wrap=True)


# ------------------------------------------------------------------------------------------------------ checks


def check_python() -> Iterator[Line]:
    from .. import __version__

    yield Line(OK, "cupyattn", f"{__version__} at {Path(__file__).parents[1]}")
    system = f"{platform.system()} {platform.machine()}"
    yield Line(OK, "Python", f"{platform.python_version()} at {sys.executable}, {system}")
    old = int(np.__version__.split(".")[0]) < 2
    yield Line(FAIL if old else OK, "NumPy", np.__version__, 'pip install -U "numpy>=2"' if old else "")


def check_cupy() -> Iterator[Line]:
    wheels = cupy_wheels()
    if len(wheels) > 1:
        both = f"{' and '.join(wheels)} are installed together and overwrite each other"
        yield Line(FAIL, "CuPy", both, f"pip uninstall -y {' '.join(wheels)} && {install()}")
    cp = cupy()
    if cp is None:
        if wheels or importlib.util.find_spec("cupy"):
            yield Line(FAIL, "CuPy", f"installed, but cannot be imported: {why_no_cupy()}", reinstall())
        elif nvidia_hardware():
            yield Line(FAIL, "CuPy", "not installed, so the GPU here cannot be used", install())
        else:
            yield Line(NOTE, "CuPy", "not installed; only GPU arrays and compiling for GPUs need it", install())
        return
    if int(cp.__version__.split(".")[0]) < 14:
        yield Line(FAIL, "CuPy", f"{cp.__version__}: 14 or newer is needed", install())
    else:
        yield Line(OK, "CuPy", f"{cp.__version__} for CUDA {dotted(cp.cuda.runtime.runtimeGetVersion())}")


def check_driver() -> Iterator[Line]:
    version, cp = driver_cuda_version(), cupy()
    if version is None:
        if nvidia_hardware():
            yield Line(FAIL, "driver", "there is an NVIDIA GPU, but no driver library (libcuda)", driver_mend())
        else:
            yield Line(NOTE, "driver", "none, and no NVIDIA GPU to be seen: calls run on the NumPy backend")
        return
    runtime = cp.cuda.runtime.runtimeGetVersion() if cp else 0
    if version // 1000 >= runtime // 1000:
        yield Line(OK, "driver", f"supports CUDA up to {dotted(version)}")
    else:
        older = f"supports CUDA up to {dotted(version)}, and this CuPy is for {dotted(runtime)}"
        swap = f"pip uninstall -y {' '.join(cupy_wheels())} && {compile.INSTALL[12]}"
        yield Line(FAIL, "driver", older, swap if version >= 12000 else driver_mend())


def check_gpus() -> Iterator[Line]:
    cp = cupy()
    if cp is None:
        return
    try:
        count = cp.cuda.runtime.getDeviceCount()
    except cp.cuda.runtime.CUDARuntimeError as error:
        count, reason = 0, str(error)
    else:
        reason = "CuPy finds none"
    if not count and not nvidia_hardware() and driver_cuda_version() is None:
        yield Line(NOTE, "GPU", "none; kernels compile anyway: cupyattn warmup --arch 90")
    elif not count:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        yield Line(FAIL, "GPU", reason, "unset CUDA_VISIBLE_DEVICES" if hidden else driver_mend())
    for device in range(count):
        capability = int(cp.cuda.Device(device).compute_capability)
        properties = cp.cuda.runtime.getDeviceProperties(device)
        facts = (
            f"{properties['name'].decode()}, compute capability {capability // 10}.{capability % 10}, "
            f"{properties['totalGlobalMem'] / 2**30:.0f} GiB"
        )
        yield Line(NOTE if capability < 70 else OK, f"cuda:{device}", f"{facts}: {support(capability)}")
        if capability >= 70:
            yield run_on_gpu(device)


def check_nvrtc() -> Iterator[Line]:
    if cupy() is None:
        return
    try:
        version = compile.nvrtc_version()
        arch = compile.target(next((chip for chip in capabilities() if int(chip) >= 70), "80"))
    except (ImportError, RuntimeError) as error:
        message, _, command = str(error).rpartition(": ")
        yield Line(FAIL, "NVRTC", message, command)
        return
    start = time.perf_counter()
    compile.compile_source("trivial", TRIVIAL, compile.options((), arch), arch)
    milliseconds = (time.perf_counter() - start) * 1e3
    took = f"compiles a trivial kernel for sm_{arch} in {milliseconds:.0f} ms"
    yield Line(OK, "NVRTC", f"{version[0]}.{version[1]}, {took}")


def check_cache() -> Iterator[Line]:
    path = cache.location()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    elsewhere = f'export {cache.VARIABLE}="$HOME/.cupyattn"'
    if there == path and (weakness := cache.weakness(path.stat())):
        yield Line(FAIL, "kernel cache", f"{path} is refused: {weakness}", cache.mend(path))
    elif not can_write(there):
        yield Line(FAIL, "kernel cache", f"{path} cannot be written: every process compiles again", elsewhere)
    elif there != path:
        yield Line(OK, "kernel cache", f"{path}, made when the first kernel is compiled")
    else:
        entries, size = cache.contents()
        mode = path.stat().st_mode & 0o777
        yield Line(OK, "kernel cache", f"{path}: {entries} kernels, {size / 2**20:.1f} MiB, mode {mode:04o}")


def check_torch() -> Iterator[Line]:
    torch = optional("torch")
    if isinstance(torch, Line):
        yield torch
        return
    gpu = torch.cuda.is_available()

    def make(on_gpu: bool) -> tuple[object, int]:
        tensor = torch.zeros(8, device="cuda" if on_gpu else "cpu")
        return tensor, tensor.data_ptr()

    yield sharing("torch", torch.__version__, gpu, make, "pip install --force-reinstall torch")


def check_jax() -> Iterator[Line]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of the GPU's memory
    jax = optional("jax")
    if isinstance(jax, Line):
        yield jax
        return
    gpu = jax.default_backend() == "gpu"

    def make(on_gpu: bool) -> tuple[object, int]:
        array = jax.device_put(np.zeros(8, np.float32), jax.devices("gpu" if on_gpu else "cpu")[0])
        return array, array.unsafe_buffer_pointer()

    yield sharing("jax", jax.__version__, gpu, make, f'pip install -U "jax[cuda{cuda_major()}]"')


def check_backend() -> Iterator[Line]:
    from ..attention import attention

    q, k, v, expected = tiny_problem()
    start = time.perf_counter()
    error = float(np.abs(attention(q, k, v, causal=True) - expected).max())
    milliseconds = (time.perf_counter() - start) * 1e3
    good = error < 1e-5
    text = f"largest error {error:.1e} against float64 in a tiny causal attention, {milliseconds:.0f} ms"
    yield Line(OK if good else FAIL, BACKEND, text, "" if good else "pip install --force-reinstall numpy")


BACKEND, RAN = "NumPy backend", "runs"
CHECKS: dict[str, Callable[[], Iterator[Line]]] = {
    "Python": check_python,
    BACKEND: check_backend,
    "driver": check_driver,
    "CuPy": check_cupy,
    "GPU": check_gpus,
    "NVRTC": check_nvrtc,
    "kernel cache": check_cache,
    "torch": check_torch,
    "jax": check_jax,
}


# ------------------------------------------------------------------------------------------------------- parts


def can_write(folder: Path) -> bool:
    """Whether a file can be made there. It is tried: the rights alone do not show a read-only or full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"cupyattn")
        return True
    except OSError:
        return False


def support(capability: int) -> str:
    """How far a chip of this compute capability (times ten) is supported."""
    if capability < 70:
        return "not supported (7.0 or newer is); NumPy arrays work"
    if capability < 75:
        return "the forward_simt kernel only, compiled in the tests but never run"
    if capability == 90:
        return "tested"
    if capability in COMPILED_ONLY:
        return "compiled in the tests but never run"
    return "not tested; it takes the code of its generation"


def run_on_gpu(device: int) -> Line:
    """A tiny float16 attention on a device, against float64."""
    from ..attention import attention

    cp, name = cupy(), f"cuda:{device}"
    q, k, v, expected = tiny_problem()
    try:
        with cp.cuda.Device(device):
            start = time.perf_counter()
            out = attention(*(cp.asarray(x, dtype=cp.float16) for x in (q, k, v)), causal=True).get()
            seconds = time.perf_counter() - start
    except Exception as error:  # a driver's, a compiler's or a cache folder's: the line says which
        mend = cache.mend(cache.location()) if isinstance(error, cache.CacheRefused) else reinstall()
        return Line(FAIL, name, f"attention fails: {type(error).__name__}: {first_line(error)}", mend)
    error = float(np.abs(out.astype(np.float64) - expected).max())
    text = f"{RAN} a tiny float16 attention: largest error {error:.1e} against float64, first call {seconds:.2f} s"
    return Line(OK if error < 1e-2 else FAIL, name, text, "" if error < 1e-2 else reinstall())


def tiny_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v in float32, (1, 5, 4, 16) and (1, 7, 2, 16), and their causal attention in float64."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 5, 4, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, 7, 2, 16), dtype=np.float32)
    wide_k, wide_v = (np.repeat(x, 2, axis=2).astype(np.float64) for x in (k, v))
    scores = np.einsum("bihd,bjhd->bhij", q.astype(np.float64), wide_k) / 4
    scores[..., ~np.tri(5, 7, 2, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return q, k, v, np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), wide_v)


def sharing(name: str, version: str, gpu: bool, make: Callable[[bool], tuple[object, int]], mend: str) -> Line:
    """Whether an array of that library, from make(on_gpu) with its address, is seen in place by CuPy or NumPy."""
    ours = bool(capabilities())
    together = gpu and ours
    array, address = make(together)
    if together:
        seen, place = cupy().from_dlpack(array).data.ptr, "cuda:0 with CuPy"
    else:
        seen, place = np.from_dlpack(array).ctypes.data, "the CPU with NumPy"
    if seen != address:
        return Line(FAIL, name, f"{version}: arrays are copied on their way through DLPack", f"pip install -U {name}")
    if ours and not gpu:
        return Line(NOTE, name, f"{version} shares {place}, but does not see the GPU", mend)
    return Line(OK, name, f"{version} shares {place}, without a copy")


def optional(name: str) -> ModuleType | Line:
    """An optional library, or the line that says why it is not there."""
    if importlib.util.find_spec(name) is None:
        return Line(NOTE, name, "not installed (optional)", f"pip install {name}")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken library can raise anything
        text = f"cannot be imported: {type(error).__name__}: {first_line(error)}"
        return Line(FAIL, name, text, f"pip install --force-reinstall {name}")


def cupy() -> ModuleType | None:
    """CuPy, or None where it cannot be imported."""
    try:
        return importlib.import_module("cupy")
    except Exception:  # ImportError, or what a mixed-up installation raises
        return None


def why_no_cupy() -> str:
    try:
        importlib.import_module("cupy")
    except Exception as error:
        return first_line(error)
    return ""


def capabilities() -> list[str]:
    """The compute capabilities of the devices that CuPy sees: "90" for 9.0."""
    cp = cupy()
    try:
        count = cp.cuda.runtime.getDeviceCount() if cp else 0
    except cp.cuda.runtime.CUDARuntimeError:
        return []
    return [cp.cuda.Device(device).compute_capability for device in range(count)]


def cupy_wheels() -> list[str]:
    """The installed distributions that bring the package cupy."""
    names = {distribution.name or "" for distribution in importlib.metadata.distributions()}
    return sorted(name for name in names if name.lower() == "cupy" or name.lower().startswith("cupy-"))


def cuda_major() -> int:
    """The CUDA that the installed CuPy is for; 12 where none is, or two are."""
    return 13 if [name for name in cupy_wheels() if "cuda1" in name] == ["cupy-cuda13x"] else 12


def install() -> str:
    """The command that brings CuPy and the compiler."""
    return compile.INSTALL[cuda_major()]


def reinstall() -> str:
    return install().replace("pip install", "pip install --force-reinstall")


def driver_mend() -> str:
    """The command that brings a driver, as far as one can tell from here."""
    if any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")):
        return "docker run --gpus all ... (the host's driver enters a container only so)"
    for tool, command in (
        ("ubuntu-drivers", "sudo ubuntu-drivers install"),
        ("apt-get", "sudo apt-get install nvidia-driver"),
        ("dnf", "sudo dnf install akmod-nvidia"),
        ("pacman", "sudo pacman -S nvidia"),
    ):
        if shutil.which(tool):
            return command
    return "install the driver from https://www.nvidia.com/drivers"


def dotted(version: int) -> str:
    """CUDA's 12090 as 12.9."""
    return f"{version // 1000}.{version % 1000 // 10}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
