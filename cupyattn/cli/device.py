"""Where a command runs and in which precision: on CuPy if there is a GPU, else on NumPy."""

from __future__ import annotations

import ctypes
import os
from enum import Enum
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import typer

NO_GPU = "this machine has none (no driver, no NVIDIA device)"


class Device(str, Enum):
    """Where a command runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    """The dtype of queries, keys and values."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def why_no_gpu() -> str | None:
    """Why no array can be put on a GPU here, to follow "needs an NVIDIA GPU;", or None if one can.

    NO_GPU means that there is nothing to mend. For all other reasons `cupyattn doctor` has a command.
    """
    if driver_cuda_version() is None and not nvidia_hardware():
        return NO_GPU
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error})"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device ({error})"
    return None if count else "CuPy finds no CUDA device"


def see_doctor(reason: str) -> str:
    """Where to read on about a reason that `why_no_gpu` gave: nowhere if there is nothing to mend."""
    return "" if reason == NO_GPU else " `cupyattn doctor` says what to do."


def driver_cuda_version() -> int | None:
    """The newest CUDA that the driver supports, 13000 for 13.0; None without a driver. Needs no CuPy."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def nvidia_hardware() -> bool:
    """Whether Linux sees an NVIDIA GPU, with or without a driver for it."""
    if Path("/dev/nvidiactl").exists():
        return True
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def array_module(device: Device) -> ModuleType:
    """The module, numpy or cupy, that makes arrays on `device`. Raises typer.BadParameter for cuda without a GPU."""
    if device is Device.cpu:
        return np
    reason = why_no_gpu()
    if reason is None:
        import cupy

        return cupy
    if device is Device.cuda:
        raise typer.BadParameter(
            f"cuda needs an NVIDIA GPU; {reason}.{see_doctor(reason) or ' --device cpu works.'}", param_hint="--device"
        )
    return np


def dtype_of(precision: Precision, xp: ModuleType) -> np.dtype:
    """NumPy's dtype for it; auto is float32 on the CPU and the best half type that the GPU's tensor cores take."""
    if precision is Precision.auto:
        half = (
            Precision.bfloat16 if xp is not np and int(xp.cuda.Device().compute_capability) >= 80 else Precision.float16
        )
        precision = Precision.float32 if xp is np else half
    return np.dtype(ml_dtypes.bfloat16 if precision is Precision.bfloat16 else precision.value)


def device_label(xp: ModuleType) -> str:
    """A name for people: "CPU (NumPy 2.1.0)" or "NVIDIA H200 (CuPy 14.2.0)"."""
    if xp is np:
        return f"CPU (NumPy {np.__version__})"
    name = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)["name"].decode()
    return f"{name} (CuPy {xp.__version__})"


def synchronize(xp: ModuleType) -> None:
    """Wait until all work on the current device is done; nothing to do for NumPy."""
    if xp is not np:
        xp.cuda.Device().synchronize()


def to_host(x) -> np.ndarray:
    """A NumPy copy of a NumPy or CuPy array."""
    return np.array(x) if isinstance(x, np.ndarray) else x.get()
