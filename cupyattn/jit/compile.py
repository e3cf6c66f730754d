"""NVRTC: flattened source in, cubin and resource use out. Needs CuPy's bindings and libnvrtc, no GPU and no driver."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import sources

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Defines = tuple[tuple[str, str | int], ...]

MIN_CAPABILITY = 70

# What the extras cu12 and cu13 install, as commands that work wherever this package came from.
INSTALL = {
    12: 'pip install "cupy-cuda12x>=14" nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12',
    13: 'pip install "cupy-cuda13x>=14" "nvidia-cuda-nvrtc<14" "nvidia-cuda-runtime<14"',
}


class CompileError(RuntimeError):
    """NVRTC refused a kernel. Holds the kernel's name, the options and the compiler's log, and shows all three."""

    def __init__(self, kernel: str, options: tuple[str, ...], log: str) -> None:
        super().__init__(kernel, options, log)
        self.kernel, self.options, self.log = kernel, options, log

    def __str__(self) -> str:
        return f"kernel {self.kernel} does not compile\noptions: {' '.join(self.options)}\n{self.log.strip()}"


@dataclass(frozen=True, slots=True)
class Usage:
    """What ptxas says of one __global__ function: registers a thread, and bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int  # static shared memory


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled kernel file. `functions` maps each __global__ function to its `Usage`."""

    cubin: bytes
    log: str
    nvrtc: str
    functions: dict[str, Usage]
    seconds: float

    @property
    def registers(self) -> int:
        """Registers a thread, of the function that takes most."""
        return max((usage.registers for usage in self.functions.values()), default=0)

    @property
    def spill_bytes(self) -> int:
        """Bytes a thread spills to local memory, stores and loads, over all functions."""
        return sum(usage.spill_stores + usage.spill_loads for usage in self.functions.values())

    @property
    def shared_bytes(self) -> int:
        """Static shared memory in bytes, of the function that takes most."""
        return max((usage.shared_bytes for usage in self.functions.values()), default=0)


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that compiles here. Raises ImportError with the command that brings it."""
    return _nvrtc().getVersion()


def supported_archs() -> tuple[int, ...]:
    """The compute capabilities that this NVRTC compiles for and this library can use, as in (70, 75, 80, …)."""
    return tuple(arch for arch in _nvrtc().getSupportedArchs() if arch >= MIN_CAPABILITY)


def target(capability: str) -> str:
    """The architecture to compile for so that a chip of this compute capability runs it: "90" -> "90a".

    The a-variants carry the chip's own instructions (wgmma on 9.0). A chip that this NVRTC does not know runs the
    code of an older one of its generation. Raises RuntimeError where there is none.
    """
    number, known = int(capability), supported_archs()
    if number in known:
        return f"{number}a" if number >= 90 else str(number)
    if older := [arch for arch in known if arch // 10 == number // 10 and arch < number]:
        return str(max(older))
    raise RuntimeError(_unsupported(number, known))


def options(defines: Defines, arch: str) -> tuple[str, ...]:
    """NVRTC's options for these preprocessor definitions and this architecture ("80", "90a", …).

    No fast-math and no --restrict: kernels name approximate instructions and __restrict__ pointers themselves
    where they hold, and an append reads what it writes. ptxas is verbose so that its log gives registers and spills.
    From 12.9 on NVRTC keeps cubins in the driver's cache, if there is a driver, and those come without that log.
    """
    cache = ("--no-cache",) if nvrtc_version() >= (12, 9) else ()
    macros = (f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in sorted(defines))
    return (f"-arch=sm_{arch}", "-std=c++17", "-default-device", "--ptxas-options=-v", *cache, *macros)


def compile_cubin(name: str, defines: Defines, arch: str, root: Traversable | None = None) -> Compiled:
    """Compile kernel file `name` for `arch` ("80", "90a", …), which need not be present. Raises CompileError."""
    return compile_source(name, sources.flatten(name, root), options(defines, arch), arch)


def compile_source(name: str, source: str, arguments: tuple[str, ...], arch: str) -> Compiled:
    """The same for a flattened source and finished options."""
    known = supported_archs()
    if int(arch.rstrip("af")) not in known:
        raise CompileError(name, arguments, _unsupported(int(arch.rstrip("af")), known))
    nvrtc, start = _nvrtc(), time.perf_counter()
    program = nvrtc.createProgram(source, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, arguments)
        cubin, log = nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise CompileError(name, arguments, f"{error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)
    version = "{}.{}".format(*nvrtc.getVersion())
    return Compiled(cubin, log.strip("\0\n "), version, usages(log), time.perf_counter() - start)


def usages(log: str) -> dict[str, Usage]:
    """The resource use of each __global__ function, read from a verbose ptxas log.

    Spills of device functions that were not inlined count for the function that calls them.
    """

    def total(pattern: str, block: str) -> int:
        return sum(int(number) for number in re.findall(pattern, block))

    found = {}
    for block in log.split("Compiling entry function '")[1:]:
        found[block[: block.index("'")]] = Usage(
            registers=total(r"Used (\d+) registers", block),
            spill_stores=total(r"(\d+) bytes spill stores", block),
            spill_loads=total(r"(\d+) bytes spill loads", block),
            shared_bytes=total(r"(\d+) bytes smem", block),
        )
    return found


def _nvrtc():
    """CuPy's binding of NVRTC, with libnvrtc loaded: the import alone does not show whether it is there."""
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        raise ImportError(
            f"compiling kernels needs CuPy, which is not installed here ({error}): {INSTALL[12]}"
        ) from error
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        from cupy_backends.cuda.api.runtime import runtimeGetVersion

        reason = str(error).split(",")[0].strip()
        install = INSTALL.get(runtimeGetVersion() // 1000, INSTALL[12])
        raise ImportError(f"compiling kernels needs libnvrtc ({reason}): {install}") from error
    return nvrtc


def _unsupported(number: int, known: tuple[int, ...]) -> str:
    capability = f"compute capability {number // 10}.{number % 10}"
    if number < MIN_CAPABILITY:
        return f"arch: got {capability}, expected 7.0 or newer"
    major, minor = nvrtc_version()
    listed = ", ".join(map(str, known))
    newer = f"pip install -U nvidia-cuda-nvrtc{'-cu12' if major == 12 else ''}"
    mend = INSTALL[12] if number < min(known) else newer
    return f"arch: got {capability}, expected one that NVRTC {major}.{minor} compiles for ({listed}): {mend}"
