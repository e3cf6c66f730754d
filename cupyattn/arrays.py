"""The border: arrays of any library come in as a `View`, results leave as arrays of the caller's library.

A `View` is an address with a shape, strides, a dtype and a device: all that a kernel wants to know. CuPy and
PyTorch arrays are read through their attributes, which is several times faster than DLPack; JAX arrays and
objects of unknown libraries come through DLPack, and those that have nothing else through
`__cuda_array_interface__`. No library is imported before an array of it arrives, no array is copied, and
nothing waits for the device except `host_array` on a CUDA array.

A process that forks after it has used CUDA leaves its child without it: there arrays on the CPU go on working, and
arrays on CUDA are refused.

Streams: work on CuPy arrays and on those that come through DLPack runs on CuPy's current stream, work on
PyTorch tensors on PyTorch's. DLPack and `__cuda_array_interface__` version 3 order the producer's pending work
before ours on the device, without blocking the host.
"""

from __future__ import annotations

import math
import operator
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NoReturn

import numpy as np

ACCEPTED = "an array of NumPy, CuPy, PyTorch or JAX, or any object with __dlpack__ or __cuda_array_interface__"

INDEX_ROLES = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_new", "seqused_k", "cache_seqlens")
INDEX_ROLES += ("block_table", "cache_batch_idx", "cache_leftpad")

_OF_INDICES = ("indptr", "indices", "_len", "positions")  # in the names that FlashInfer has for such arrays

# Device types of the DLPack specification.
_DL_CPU, _DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 1, 2, 3, 13

_OF_ML_DTYPES = frozenset(("bfloat16", "float8_e4m3fn", "float8_e5m2"))


@dataclass(slots=True)
class View:
    """An array of any library, seen as memory. `strides` count elements; `dtype` is NumPy's name for it."""

    array: Any  # the caller's own object, of which the rest may describe a part: see `split_axis`
    pointer: int  # address of the first element; may be 0 for an empty array
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int  # -1: CPU, n: cuda:n
    library: str  # "numpy", "cupy", "torch", "jax" or "dlpack" (any other)
    readonly: bool
    base: Any = None  # the NumPy or CuPy array of just this form, where the border had to make one


def refuse(argument: str, got: object, expected: str, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise the library's one form of complaint: argument, what came, what was expected."""
    raise kind(f"{argument}: got {got}, expected {expected}")


def device_name(device: int) -> str:
    """The name of a `View.device`: "cpu" or "cuda:0"."""
    return "cpu" if device < 0 else f"cuda:{device}"


@cache
def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a `View.dtype`; ml_dtypes provides bfloat16 and FP8."""
    if name not in _OF_ML_DTYPES:
        return np.dtype(name)
    import ml_dtypes  # only here: some of its versions take a second to load

    return np.dtype(getattr(ml_dtypes, name))


# ---------------------------------------------------------------------------------------------- arrays in


def view(x: Any, name: str = "array") -> View:
    """The `View` of any array, or the one that came, without a copy. `name` is the argument's name, for complaints.

    Raises TypeError for an object that is no array, or whose memory cannot be addressed (sparse, traced,
    sharded, masked, on some other kind of device), and for a PyTorch tensor that records gradients.
    """
    reader = _readers.get(type(x))
    if reader is None:
        reader = _find_reader(x, name)
    return reader(x, name)


def _itself(x: View, name: str) -> View:
    return x


_readers: dict[type, Callable[[Any, str], View]] = {View: _itself}


def stands_for(kind: type, attribute: str) -> None:
    """Let objects of this class come in as the array that they have under this name."""
    _readers[kind] = lambda x, name: view(getattr(x, attribute), name)


def _find_reader(x: Any, name: str) -> Callable[[Any, str], View]:
    """The reader for objects like x, remembered by type. Libraries are looked up, never imported."""
    kind = type(x)
    torch, cupy, jax = (sys.modules.get(module) for module in ("torch", "cupy", "jax"))
    if isinstance(x, np.ma.MaskedArray):
        refuse(name, "a masked array, whose mask would be ignored", "a plain array", TypeError)
    if isinstance(x, np.ndarray):
        reader = _view_numpy
    elif cupy and isinstance(x, cupy.ndarray):
        reader = _view_cupy
    elif torch and isinstance(x, torch.Tensor):
        if getattr(torch.version, "hip", None):
            refuse(name, "a tensor of PyTorch for ROCm", "PyTorch for CUDA or for the CPU", TypeError)
        reader = _view_torch
    elif jax and isinstance(x, jax.Array):
        reader = _view_jax
    elif isinstance(x, type):
        refuse(name, f"the class {x.__name__}", ACCEPTED, TypeError)
    elif hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        reader = _view_dlpack
    elif hasattr(x, "__cuda_array_interface__"):
        reader = _view_cuda_interface
    elif isinstance(x, (list, tuple)):
        index = name in INDEX_ROLES or any(part in name for part in _OF_INDICES)
        made = f"np.asarray({name}, np.{'int32' if index else 'float32'})"
        refuse(name, _a(kind.__name__), f"{ACCEPTED}, as {made} is", TypeError)
    else:
        refuse(name, _a(kind.__name__) if x is not None else None, ACCEPTED, TypeError)
    _readers[kind] = reader = partial(_view_in_child, reader) if _forked else reader
    return reader


_forked = False  # whether this process was forked from one that had imported this module


def _view_in_child(reader: Callable[[Any, str], View], x: Any, name: str) -> View:
    """An array in a forked process."""
    found = reader(x, name)
    if found.device >= 0 and _cuda_was_lost():
        came = "an array on CUDA in a process that was forked after CUDA had been used"
        refuse(name, came, "a process started by 'spawn' or 'forkserver', or an array on the CPU", RuntimeError)
    return found


@cache
def _cuda_was_lost() -> bool:
    """CUDA has no context in the fork of a process that has used it."""
    runtime = _cupy().cuda.runtime
    try:
        runtime.memGetInfo()
    except runtime.CUDARuntimeError:
        return True
    return False


def _after_fork() -> None:
    global _forked
    if not _forked:
        _forked = True
        _readers.update({kind: partial(_view_in_child, reader) for kind, reader in _readers.items()})
    _cuda_was_lost.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _view_numpy(x: np.ndarray, name: str, array: Any = None, library: str = "numpy") -> View:
    """A NumPy array; or, with `array` and `library`, another library's array that `x` is a window onto."""
    dtype, strides = _form(x.dtype, x.strides, name)
    return View(
        x if array is None else array,
        x.__array_interface__["data"][0],
        x.shape,
        strides,
        dtype,
        -1,
        library,
        not x.flags.writeable,
        None if array is None else x,
    )


def _view_cupy(x: Any, name: str) -> View:
    memory = x.data
    dtype, strides = _form(x.dtype, x.strides, name)
    return View(x, memory.ptr, x.shape, strides, dtype, memory.device_id, "cupy", False)


def _view_torch(x: Any, name: str) -> View:
    try:
        pointer = x.data_ptr()
        strides = x.stride()
    except RuntimeError:
        _refuse_tensor(x, name)
    shape = tuple(x.shape)
    if not pointer and 0 not in shape:
        _refuse_tensor(x, name)
    if x.is_cuda:
        device = x.get_device()
    elif x.device.type == "cpu":
        device = -1
    else:
        _refuse_tensor(x, name)
    dtype = x.dtype
    if dtype.is_floating_point or dtype.is_complex or x.is_neg():
        _check_numbers(x, name)
    return View(x, pointer, shape, strides, _torch_dtype_name(dtype), device, "torch", False)


def _check_numbers(x: Any, name: str) -> None:
    """Refuse what tensors of integers hardly can be, which are not asked for all of it."""
    if x.requires_grad and sys.modules["torch"].is_grad_enabled():
        refuse(
            name,
            "a tensor that requires grad, while gradients are recorded",
            "a tensor without gradients, as there is no backward pass: pass .detach(), or call under torch.no_grad()",
            TypeError,
        )
    if x.is_neg() or (x.dtype.is_complex and x.is_conj()):
        refuse(
            name,
            "a tensor whose negative or conjugate bit is set",
            "its values in memory: pass .resolve_neg() or .resolve_conj()",
            TypeError,
        )


def _refuse_tensor(x: Any, name: str) -> NoReturn:
    if x.is_nested:
        got = f"a nested tensor ({x.layout})"
    elif str(x.layout) != "torch.strided":
        got = f"a sparse tensor ({x.layout})"
    elif x.device.type not in ("cpu", "cuda"):
        got = f"a tensor on device {str(x.device)!r}"
    else:
        got = f"{_a(type(x).__name__)} that has no memory of its own"
    refuse(name, got, "a strided tensor on a CUDA device or the CPU", TypeError)


def _view_jax(x: Any, name: str) -> View:
    if isinstance(x, sys.modules["jax"].core.Tracer):
        refuse(
            name,
            "a JAX tracer (inside jax.jit, grad or vmap)",
            "a JAX array with values: call outside the transformation, or use cupyattn.integrations.jax inside it",
            TypeError,
        )
    try:
        device_type, _ = x.__dlpack_device__()
    except Exception as error:  # BufferError if it is sharded, or on a TPU
        if x.is_deleted():
            came = "a JAX array that has been deleted, as what was donated to a call is"
            refuse(name, came, "an array with values: go on with what that call returned", TypeError)
        if not isinstance(error, BufferError):
            raise
        where = ", ".join(sorted(str(device) for device in x.devices()))
        refuse(name, f"a JAX array on {where}", "an array on one CUDA device or on the CPU", TypeError)
    if device_type == _DL_CPU:
        return _view_numpy(np.asarray(x), name, x, "jax")
    if device_type == _DL_CUDA:
        return _view_over_cupy(x, name, "jax", readonly=True)
    came = f"a JAX array in {x.sharding.memory_kind!r} memory (DLPack device type {int(device_type)})"
    refuse(name, came, "one in a CUDA device's own memory or on the CPU", TypeError)


def _view_dlpack(x: Any, name: str) -> View:
    try:
        device_type = int(x.__dlpack_device__()[0])
    except Exception as error:  # whatever a foreign object does
        _refuse_foreign(x, name, "whose __dlpack_device__ cannot be read", error)
    if device_type in (_DL_CUDA, _DL_CUDA_MANAGED):
        return _view_over_cupy(x, name, "dlpack", readonly=False)
    if device_type in (_DL_CPU, _DL_CUDA_HOST):  # pinned host memory is host memory
        try:
            host = np.from_dlpack(x)
        except Exception as error:
            _refuse_foreign(x, name, "that NumPy cannot import", error)
        return _view_numpy(host, name, x, "dlpack")
    refuse(name, f"an array on DLPack device type {device_type}", "CUDA (2, 13) or host memory (1, 3)", TypeError)


def _view_over_cupy(x: Any, name: str, library: str, readonly: bool) -> View:
    """An array that CuPy imports: __dlpack__(stream=…) makes CuPy's current stream wait for the producer."""
    cupy = _cupy()
    try:
        base = cupy.from_dlpack(x)
    except Exception as error:
        _refuse_foreign(x, name, "that CuPy cannot import", error)
    found = _view_cupy(base, name)
    found.array, found.base, found.library, found.readonly = x, base, library, readonly
    return found


def _view_cuda_interface(x: Any, name: str) -> View:
    """An array that has only __cuda_array_interface__; its stream, if it names one, is waited for on the device."""
    runtime = _cupy().cuda.runtime
    try:
        interface = x.__cuda_array_interface__
        masked, producer = interface.get("mask") is not None, interface.get("stream")
        pointer, readonly = interface["data"]
        pointer = operator.index(pointer or 0)
        shape = tuple(operator.index(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        strides = interface.get("strides")
        if strides is None:
            strides = (step * dtype.itemsize for step in contiguous_strides(shape))
        strides = tuple(operator.index(step) for step in strides)
        if len(strides) != len(shape):
            raise ValueError(f"{len(strides)} strides for {len(shape)} axes")
        device = runtime.pointerGetAttributes(pointer).device if pointer else runtime.getDevice()
    except Exception as error:
        _refuse_foreign(x, name, "whose __cuda_array_interface__ cannot be read", error)
    if masked:
        refuse(name, "a masked array, whose mask would be ignored", "a plain array", TypeError)
    if not pointer and 0 not in shape:
        refuse(name, f"{_a(type(x).__name__)} without memory", ACCEPTED, TypeError)
    dtype, strides = _form(dtype, strides, name)
    found = View(x, pointer, shape, strides, dtype, device, "dlpack", bool(readonly))
    if producer:
        with on_device(device):
            wait(current_stream(found), producer)
    return found


def _refuse_foreign(x: Any, name: str, what: str, error: Exception) -> NoReturn:
    """Refuse an object of another library by the argument's name, with what went wrong in one line."""
    first = (str(error).splitlines() or [""])[0]
    why = f"{type(error).__name__}: {first}" if first else type(error).__name__
    fp8 = str(getattr(x, "dtype", "")).startswith("float8")
    expected = "its bytes as uint8, with kv_dtype to say what they mean" if fp8 else ACCEPTED
    raise TypeError(f"{name}: got {_a(type(x).__name__)} {what} ({why}), expected {expected}") from error


@lru_cache(maxsize=4096)
def _form(dtype: np.dtype, strides: tuple[int, ...], name: str) -> tuple[str, tuple[int, ...]]:
    """NumPy's dtype and strides in bytes as a View has them: the dtype's name and strides in elements."""
    if not dtype.isnative:
        refuse(name, f"dtype {dtype.str} in the other byte order", "the machine's byte order", TypeError)
    if dtype.itemsize == 0 or any(step % dtype.itemsize for step in strides):
        refuse(name, f"strides of {strides} bytes", f"multiples of the {dtype.itemsize}-byte element")
    return dtype.name, tuple(step // dtype.itemsize for step in strides)


@cache
def _torch_dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def turn(found: View) -> View:
    """Make the view of an array (batch, heads, seqlen, head_dim) one of (batch, seqlen, heads, head_dim), or back.

    No library is asked, and the view itself is changed: it must be nobody else's.
    """
    base = found.base if found.device >= 0 else _worked_on(found)
    if base is not None:
        found.base = base.swapaxes(1, 2)
    found.shape, found.strides = _turned(found.shape, found.strides)
    return found


@lru_cache(maxsize=4096)
def _turned(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    turned = [(batch, tokens, heads, columns) for batch, heads, tokens, columns in (shape, strides)]
    return turned[0], turned[1]


def one_token(found: View) -> View:
    """An array (batch, heads, head_dim) as (batch, 1, heads, head_dim)."""
    (batch, *row), (step, *steps), base = found.shape, found.strides, _worked_on(found)
    form = (batch, 1, *row), (step, step, *steps), found.dtype, found.device, found.library, found.readonly
    return View(found.array, found.pointer, *form, None if base is None else base[:, None])


def split_axis(found: View, axis: int) -> list[View]:
    """The views of an array's parts along an axis, which they do not have. It is counted from the front."""
    shape, strides, step = _without_axis(found.shape, found.strides, found.dtype, axis)
    array, pointer, dtype, device = found.array, found.pointer, found.dtype, found.device
    library, readonly = found.library, found.readonly
    parts = [
        View(array, pointer + i * step, shape, strides, dtype, device, library, readonly)
        for i in range(found.shape[axis])
    ]
    base = found.base if device >= 0 else _worked_on(found)
    if base is not None:
        before = (slice(None),) * axis
        for i, part in enumerate(parts):
            part.base = base[(*before, i)]
    return parts


@lru_cache(maxsize=4096)
def _without_axis(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, axis: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape and strides of a part, and bytes from one part to the next."""
    left, steps = (sizes[:axis] + sizes[axis + 1 :] for sizes in (shape, strides))
    return left, steps, strides[axis] * _itemsize(dtype)


def _worked_on(found: View) -> Any:
    """The NumPy or CuPy array that must be cut like a view; None where its address is all that counts."""
    if found.device >= 0:
        return found.base
    try:
        return host_array(found)
    except TypeError:  # a dtype that NumPy lacks, which the kernels' own checks will refuse
        return None


@cache
def _itemsize(dtype: str) -> int:
    """Bytes of an element; 0 for a dtype that NumPy lacks."""
    try:
        return numpy_dtype(dtype).itemsize
    except TypeError:
        return 0


# --------------------------------------------------------------------------------------------- arrays out


def empty(like: View, shape: tuple[int, ...], dtype: str) -> View:
    """A new C-contiguous array, not initialised, of like's library on like's device.

    For JAX and for unknown libraries it is a CuPy or NumPy array, which `deliver` converts when it is filled.
    On CUDA the current device must be like's (see `on_device`).
    """
    strides = contiguous_strides(shape)
    if like.library == "torch":
        torch, source = sys.modules["torch"], like.array
        if type(source) is torch.Tensor and like.dtype == dtype:  # sooner done than to say all of it
            if source.shape == shape:
                array = torch.empty_like(source, memory_format=torch.contiguous_format)
            else:
                array = source.new_empty(shape)
        else:
            array = torch.empty(shape, dtype=getattr(torch, dtype), device=source.device)
        return View(array, array.data_ptr(), shape, strides, dtype, like.device, "torch", False)
    if like.device >= 0:
        array = _cupy().ndarray(shape, numpy_dtype(dtype))
        return View(array, array.data.ptr, shape, strides, dtype, like.device, "cupy", False)
    array = _aligned_empty(shape, numpy_dtype(dtype)) if like.library == "jax" else np.empty(shape, numpy_dtype(dtype))
    return View(array, array.__array_interface__["data"][0], shape, strides, dtype, -1, "numpy", False)


def fill(target: View, value: float) -> None:
    """Set every element of an array that `empty` made, or that the caller gave to be written into."""
    if 0 in target.shape:
        return
    if target.library == "torch":
        target.array.fill_(value)
    elif target.device >= 0:
        _cupy_array(target).fill(value)
    else:
        host_array(target)[...] = value


def deliver(out: View, like: View) -> Any:
    """The object that the caller receives: `out` in like's library, without a copy."""
    if like.library == out.library or like.library in ("numpy", "cupy", "torch"):
        return out.array
    if like.library == "jax":
        jax = sys.modules["jax"]
        if out.device >= 0:
            return jax.dlpack.from_dlpack(out.array)
        return jax.device_put(out.array, like.array.device)  # shares the memory, which is aligned as JAX wants it
    source = like.array
    root = type(source).__module__.partition(".")[0]
    namespace = source.__array_namespace__() if hasattr(source, "__array_namespace__") else sys.modules.get(root)
    if (convert := getattr(namespace, "from_dlpack", None)) is not None:
        return convert(out.array)
    if root.startswith("numba") and out.device >= 0:
        # The array carries its stream with it, so Numba need not block the host on it.
        return sys.modules["numba"].cuda.as_cuda_array(out.array, sync=False)
    return out.array


def host_array(source: View) -> np.ndarray:
    """A NumPy array over a CPU view's memory, without a copy; of a CUDA view a copy, which waits for the device."""
    if source.device < 0 and source.base is not None:
        return source.base
    if source.library == "torch":
        tensor = source.array.detach()
        tensor = tensor if source.device < 0 else tensor.cpu()
        if source.dtype in _OF_ML_DTYPES:  # torch does not export these to NumPy
            bits = numpy_dtype(source.dtype)
            same_size = "uint8" if bits.itemsize == 1 else "int16"
            return tensor.view(getattr(sys.modules["torch"], same_size)).numpy().view(bits)
        return tensor.numpy()
    if source.device >= 0:
        with on_device(source.device):
            return _cupy_array(source).get()
    return source.array


@lru_cache(maxsize=4096)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a C-contiguous array."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def overlap(a: View, b: View) -> bool:
    """Whether the address ranges of two arrays meet. Interleaved arrays count as meeting."""
    if a.device != b.device:
        return False
    first, second = _extent(a), _extent(b)
    return max(first[0], second[0]) < min(first[1], second[1])


def _extent(source: View) -> tuple[int, int]:
    """First byte, and the byte after the last; equal for an empty array."""
    low, high = reach(source.shape, source.strides, numpy_dtype(source.dtype).itemsize)
    return source.pointer + low, source.pointer + high


@lru_cache(maxsize=4096)
def reach(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Bytes from the first element to the lowest byte, and to the byte after the highest."""
    if 0 in shape:
        return 0, 0
    steps = [(size - 1) * step for size, step in zip(shape, strides, strict=True)]
    return sum(step for step in steps if step < 0) * itemsize, (sum(step for step in steps if step > 0) + 1) * itemsize


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array on a 64-byte boundary: JAX on the CPU takes such memory over, and copies any other."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.__array_interface__["data"][0] % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _cupy_array(source: View) -> Any:
    """A CuPy array over a CUDA view that is not PyTorch's."""
    if source.library == "cupy":
        return source.array
    return source.base if source.base is not None else _cupy().asarray(source.array)


# ------------------------------------------------------------------------------------ devices and streams


def current_stream(like: View) -> int:
    """The raw cudaStream_t that like's library works on now, on like's device; 0 on the CPU."""
    device = like.device
    if device < 0:
        return 0
    if like.library == "torch":
        return torch_stream(device)
    return _cupy().cuda.get_current_stream(device).ptr


def torch_stream(device: int) -> int:
    """PyTorch's current stream on this device."""
    torch = sys.modules["torch"]
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # the public way is far slower
    return raw(device) if raw is not None else torch.cuda.current_stream(device).cuda_stream


def other_stream(like: View, views: Iterable[View]) -> int | None:
    """The stream that must be ordered with like's: that of arrays of another library, if it is another one.

    There are two owners of streams, PyTorch and CuPy; all other libraries' arrays are ordered on CuPy's.
    """
    torch = like.library == "torch"
    for other in views:
        if (other.library == "torch") is not torch:
            stream = current_stream(other)
            return None if stream == current_stream(like) else stream
    return None


def wait(stream: int, producer: int) -> None:
    """Make `stream` wait, on the device, for all work queued on `producer` so far. Same current device."""
    cuda = _cupy().cuda
    event = cuda.Event(disable_timing=True)
    cuda.runtime.eventRecord(event.ptr, producer)
    cuda.runtime.streamWaitEvent(stream, event.ptr)


def on_device(device: int) -> Any:
    """A context in which `device` is CUDA's current device."""
    return _cupy().cuda.Device(device)


def current_device() -> int:
    """CUDA's current device."""
    return _cupy().cuda.runtime.getDevice()


_in_flight: deque[tuple[Any, list[Any]]] = deque()
_in_flight_lock = threading.Lock()


def keep_until_done(views: Iterable[View], stream: int) -> None:
    """Hold arrays whose owner cannot see our stream until the work queued on it has finished.

    PyTorch and CuPy reuse freed memory in stream order. JAX may hand a freed buffer to its own stream at once,
    while our kernel still reads it. Arrays are let go at the next call after the work is done; nothing waits.
    """
    cuda = _cupy().cuda
    if cuda.runtime.streamIsCapturing(stream):  # no event may be asked then; a graph's arrays are its owner's to keep
        return
    with _in_flight_lock:
        while _in_flight and _in_flight[0][0].done:
            _in_flight.popleft()
    foreign = [found for found in views if found.library in ("jax", "dlpack")]
    if not foreign:
        return
    event = cuda.Event(disable_timing=True)
    cuda.runtime.eventRecord(event.ptr, stream)
    _in_flight.append((event, [(found.array, found.base) for found in foreign]))


def _cupy() -> Any:
    module = sys.modules.get("cupy")
    if module is not None:
        return module
    try:
        import cupy
    except ImportError as error:
        from .jit.compile import INSTALL

        raise ImportError(f"CUDA arrays need CuPy: {INSTALL[12]} (or for CUDA 13: {INSTALL[13]})") from error
    return cupy
