"""The border: what comes in as a view, what is refused, what goes back out, and how streams are ordered.

Tests marked `gpu` use real devices. The rest of what concerns CUDA runs on CuPy arrays over addresses that nobody
reads, with a stand-in for CuPy's runtime that writes down what it is asked to do.
"""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cupyattn import arrays
from cupyattn.arrays import (
    View,
    deliver,
    device_name,
    empty,
    fill,
    host_array,
    overlap,
    split_axis,
    turn,
    view,
)

FLOATS = ("float16", "bfloat16", "float32")


def bf16(*shape):
    return np.arange(np.prod(shape)).reshape(shape).astype(ml_dtypes.bfloat16)


def full(like, shape, value, dtype):
    made = empty(like, shape, dtype)
    fill(made, value)
    return made


class Foreign:
    """An array of a library that nobody has heard of: it speaks DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class Elsewhere(Foreign):
    """The same with another device type."""

    def __init__(self, array, device_type):
        super().__init__(array)
        self._device_type = device_type

    def __dlpack_device__(self):
        return self._device_type, 0


# ------------------------------------------------------------------------------------------------ arrays in


@pytest.mark.parametrize("dtype", [*FLOATS, "float64", "int32", "int64"])
def test_numpy_arrays_are_seen_as_they_lie_in_memory(dtype):
    array = np.zeros((2, 3, 4), np.dtype(dtype))
    found = view(array)
    assert found == View(array, array.ctypes.data, (2, 3, 4), (12, 4, 1), dtype, -1, "numpy", False)
    assert found.array is array and found.base is None


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_arrays_are_seen_in_their_own_dtype(name, library):
    bits = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    array = bits.view(np.dtype(name))
    if library == "torch":
        torch = pytest.importorskip("torch")
        array = torch.from_numpy(bits).view(getattr(torch, name))
    elif library == "jax":
        array = pytest.importorskip("jax.numpy").asarray(array)
    found = view(array[:, 1:])
    assert (found.shape, found.dtype, found.library) == ((2, 2, 4), name, library)
    host = host_array(found)
    assert host.dtype == np.dtype(name) and (host.view(np.uint8) == bits[:, 1:]).all()


def test_fp8_that_dlpack_does_not_carry_says_what_to_pass():
    array = np.zeros(3, ml_dtypes.float8_e5m2)
    foreign = Foreign(array)
    foreign.dtype = "float8_e5m2"
    with pytest.raises(TypeError, match="^k: got a Foreign that NumPy cannot import .*, expected its bytes as uint8"):
        view(foreign, "k")


def test_strides_count_elements_and_nothing_is_copied():
    array = np.zeros((8, 6, 4, 2), np.float32)
    found = view(array[::2, ::-1].swapaxes(1, 2))
    assert found.strides == (96, 2, -8, 1)
    assert found.shape == (4, 4, 6, 2)
    assert found.pointer == array.ctypes.data + 5 * 8 * 4


def test_read_only_numpy_arrays_are_marked():
    array = np.zeros(3)
    array.flags.writeable = False
    assert view(array).readonly


def test_memory_maps_are_arrays(tmp_path):
    mapped = np.memmap(tmp_path / "cache", np.float16, "w+", shape=(4, 8))
    assert view(mapped).library == "numpy"


@pytest.mark.parametrize("dtype", [*FLOATS, "float64", "int32"])
def test_torch_tensors_are_seen_without_a_copy(dtype):
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(4, 3, 8, dtype=getattr(torch, dtype))[::2].transpose(0, 1)
    found = view(tensor)
    assert found == View(tensor, tensor.data_ptr(), (3, 2, 8), (8, 48, 1), dtype, -1, "torch", False)
    assert type(found.shape) is tuple
    host = host_array(found)
    assert host.ctypes.data == tensor.data_ptr() and host.strides[1] == 48 * host.itemsize and host.dtype == dtype
    host[1, 1, 3] = 5
    assert tensor[1, 1, 3] == 5


@pytest.mark.parametrize("dtype", [*FLOATS, "int32"])
def test_jax_arrays_are_seen_without_a_copy_and_read_only(dtype):
    jnp = pytest.importorskip("jax.numpy")
    array = jnp.arange(24, dtype=dtype).reshape(2, 3, 4)
    found = view(array)
    assert (found.shape, found.strides, found.dtype, found.device) == ((2, 3, 4), (12, 4, 1), dtype, -1)
    assert found.library == "jax" and found.readonly and found.array is array
    assert found.pointer == array.unsafe_buffer_pointer()
    assert np.array_equal(host_array(found), np.asarray(array)) and host_array(found).dtype == dtype


def test_any_dlpack_object_on_the_cpu_is_seen_without_a_copy():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    foreign = Foreign(array)
    found = view(foreign)
    assert (found.pointer, found.library, found.device) == (array.ctypes.data, "dlpack", -1)
    assert found.array is foreign and not found.readonly
    host_array(found)[0, 0] = 9
    assert array[0, 0] == 9


def test_pinned_host_memory_is_host_memory():
    assert view(Elsewhere(np.zeros(3, np.float32), 3)).device == -1


def test_a_read_only_dlpack_object_is_marked():
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    assert view(Foreign(array)).readonly


@pytest.mark.parametrize(
    ("thing", "came"),
    [
        ([1.0, 2.0], "a list"),
        (3, "an int"),
        (None, "None"),
        (np.float32(1), "a float32"),
        ("q", "a str"),
        (np.ndarray, "the class ndarray"),
        (np.ma.masked_array([1.0], [True]), "a masked array"),
        (np.zeros(3, ">f4"), "dtype >f4 in the other byte order"),
        (Elsewhere(np.zeros(3, np.float32), 10), "an array on DLPack device type 10"),
        (Foreign(bf16(3)), "a Foreign that NumPy cannot import"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_array_is_refused_by_name(thing, came):
    with pytest.raises(TypeError, match=f"^q: got {came}.*, expected "):
        view(thing, "q")


@pytest.mark.parametrize("name", ["qo_indptr", "indices", "last_page_len", "seq_lens", "positions", "cu_seqlens_q"])
def test_lists_of_indices_are_to_be_int32(name):
    with pytest.raises(TypeError, match=rf"^{name}: got a list, .* as np.asarray\({name}, np.int32\) is"):
        view([0, 1], name)


def test_strides_between_elements_are_refused():
    records = np.zeros(4, np.dtype([("a", np.int8), ("b", np.float32)]))
    with pytest.raises(ValueError, match=r"^k: got strides of \(5,\) bytes, expected multiples of the 4-byte element"):
        view(records["b"], "k")


def torch_refusals():
    torch = pytest.importorskip("torch")
    complex_numbers = torch.ones(3, dtype=torch.complex64)
    yield torch.ones(3, requires_grad=True), "a tensor that requires grad", r"\.detach\(\)"
    yield torch.eye(3).to_sparse(), r"a sparse tensor \(torch.sparse_coo\)", "a strided tensor"
    yield torch.eye(3).to_sparse_csr(), r"a sparse tensor \(torch.sparse_csr\)", "a strided tensor"
    yield torch.empty(3, device="meta"), "a tensor on device 'meta'", "on a CUDA device or the CPU"
    yield complex_numbers.conj(), "negative or conjugate bit", "resolve_conj"
    yield complex_numbers.conj().imag, "negative or conjugate bit", "resolve_neg"
    parts = [torch.ones(2, 3), torch.ones(1, 3)]
    yield torch.nested.nested_tensor(parts, layout=torch.jagged), "a nested tensor", "a strided tensor"
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        tensor = torch.empty(3)
    yield tensor, "a FakeTensor that has no memory", "a strided tensor"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_cannot_be_read_as_memory_are_refused():
    for tensor, came, expected in torch_refusals():
        with pytest.raises(TypeError, match=f"^q: got .*{came}.*, expected .*{expected}"):
            view(tensor, "q")


def test_tensors_with_gradients_are_fine_where_nothing_is_recorded():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        assert host_array(view(parameter)).tolist() == [1, 1, 1]
    with torch.inference_mode():
        assert view(parameter).pointer == parameter.data_ptr()


def test_traced_jax_arrays_are_refused():
    jax = pytest.importorskip("jax")
    with pytest.raises(TypeError, match=r"^q: got a JAX tracer \(inside jax.jit, grad or vmap\), expected "):
        jax.jit(lambda x: view(x, "q"))(jax.numpy.ones(3))


def test_sharded_jax_arrays_are_refused():
    pytest.importorskip("jax")
    program = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
from jax.sharding import NamedSharding, PartitionSpec
from cupyattn.arrays import view
mesh = jax.make_mesh((2,), ("x",))
array = jax.device_put(jax.numpy.ones(4), NamedSharding(mesh, PartitionSpec("x")))
try:
    view(array, "q")
except TypeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "q: got a JAX array on " in done.stdout and "expected an array on one CUDA device" in done.stdout


# ----------------------------------------------------------------------------------------------- arrays out


def in_library(library, array):
    if library == "numpy":
        return array
    if library == "torch":
        torch = pytest.importorskip("torch")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    return pytest.importorskip("jax.numpy").asarray(array)


@pytest.mark.parametrize("shape", [(2, 8, 8, 64), (1, 4, 4, 16), (2, 8, 3, 64)])
def test_new_arrays_are_contiguous_whatever_they_are_like(shape):
    """Also where heads and tokens are as many, and the array has the window's shape but other strides."""
    torch = pytest.importorskip("torch")
    tensor = torch.ones(shape, dtype=torch.float16)
    for source in (tensor, tensor.transpose(1, 2), tensor.transpose(1, 2).contiguous().transpose(1, 2)):
        for like in (view(source), turn(view(source))):
            made = empty(like, like.shape, "float16")
            assert (made.array.stride(), tuple(made.array.shape)) == (made.strides, made.shape)
            assert made.strides == arrays.contiguous_strides(like.shape)


def test_parts_of_what_numpy_has_no_name_for_are_left_to_the_kernels_checks():
    torch = pytest.importorskip("torch")
    for dtype in (torch.complex32, torch.float8_e4m3fnuz):
        whole = torch.empty(2, 3, 4, 8, dtype=dtype)
        for found in (turn(view(whole)), *split_axis(view(whole), 1)):
            assert found.dtype == str(dtype).removeprefix("torch.") and found.base is None


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_windows_onto_a_view_are_those_onto_its_array(library, dtype):
    host = np.arange(3 * 2 * 3 * 4 * 5).reshape(3, 2, 3, 4, 5).astype(dtype)[::2, :, :, 1:]
    whole = view(in_library(library, host if library == "numpy" else host.copy()))
    for i, part in enumerate(split_axis(whole, 2)):
        expected = host[:, :, i]
        turned = turn(replace(part))
        assert (part.shape, turned.shape) == (expected.shape, expected.swapaxes(1, 2).shape)
        assert (host_array(part) == expected).all() and (host_array(turned) == expected.swapaxes(1, 2)).all()
        for found in (part, turned):  # what a kernel would read
            base = host_array(found)
            assert found.pointer == base.__array_interface__["data"][0]
            assert tuple(step * base.itemsize for step in found.strides) == base.strides
            assert found.array is whole.array and (found.library, found.device) == (library, -1)
        assert view(turned, "q") is turned


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3, 4), (1, 1, 1)])
def test_results_are_of_the_callers_library_and_not_copied(library, dtype, shape):
    like = view(in_library(library, np.zeros(4, np.dtype(dtype))))
    made = full(like, shape, 3, dtype)
    made_at = made.pointer
    result = deliver(made, like)
    assert type(result) is type(like.array) and tuple(result.shape) == shape
    found = view(result)
    assert (found.dtype, found.device) == (dtype, -1) and (host_array(found) == 3).all()
    assert found.strides == made.strides or 0 in shape or 1 in shape
    if 0 not in shape:
        assert found.pointer == made_at


def test_results_for_an_unknown_library_go_through_its_own_from_dlpack(monkeypatch):
    module = types.ModuleType("obscure")
    module.from_dlpack = Foreign
    monkeypatch.setitem(sys.modules, "obscure", module)
    kind = type("Array", (Foreign,), {"__module__": "obscure.core"})
    like = view(kind(np.zeros(2, np.float32)))
    result = deliver(full(like, (2,), 1, "float32"), like)
    assert type(result) is Foreign and np.from_dlpack(result).tolist() == [1, 1]


def test_results_for_an_unknown_library_use_its_array_namespace_first():
    namespace = types.SimpleNamespace(from_dlpack=lambda array: ("converted", array))
    kind = type("Array", (Foreign,), {"__array_namespace__": lambda self: namespace})
    like = view(kind(np.zeros(2, np.float32)))
    assert deliver(empty(like, (2,), "float32"), like)[0] == "converted"


def test_results_for_a_library_that_takes_nothing_are_numpy_arrays():
    like = view(Foreign(np.zeros(2, np.float32)))
    assert type(deliver(empty(like, (2,), "float16"), like)) is np.ndarray


def test_fill_writes_strided_arrays_of_every_library():
    base = np.zeros((4, 3), np.float32)
    fill(view(base[::2, 1:]), 2)
    assert base.sum() == 8
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(4, 3, dtype=torch.bfloat16)
    fill(view(tensor[::2, 1:]), -np.inf)
    assert torch.isinf(tensor).sum() == 4


def test_overlap_compares_address_ranges():
    base = np.zeros((4, 8), np.float32)
    assert overlap(view(base), view(base[2:]))
    assert overlap(view(base[::-1]), view(base[:1]))
    assert overlap(view(base[:, :4]), view(base[:, 4:])), "interleaved ranges meet"
    assert not overlap(view(base[:2]), view(base[2:]))
    assert not overlap(view(base[:2]), view(base[:0]))
    assert not overlap(view(base), view(base.copy()))


def test_device_names():
    assert (device_name(-1), device_name(0), device_name(3)) == ("cpu", "cuda:0", "cuda:3")


# ------------------------------------------------------------------------------------------------- imports


def run_python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_a_deleted_jax_array_is_refused_by_name():
    jnp = pytest.importorskip("jax.numpy")
    array = jnp.ones(3)
    array.delete()
    with pytest.raises(TypeError, match="^k: got a JAX array that has been deleted, .* what that call returned$"):
        view(array, "k")


def test_import_loads_no_array_library_and_no_user_interface():
    heavy = ("cupy", "torch", "jax", "rich", "typer", "platformdirs", "einops", "numba", "ml_dtypes")
    assert run_python(f"import sys, cupyattn; print(*[name for name in {heavy} if name in sys.modules])") == []


def test_attention_on_numpy_arrays_loads_no_array_library():
    program = """
import sys
import numpy as np
import cupyattn
cupyattn.attention(*np.ones((3, 1, 4, 2, 8), np.float32))
print(*[name for name in ("cupy", "torch", "jax") if name in sys.modules])
"""
    assert run_python(program) == []


def test_cuda_arrays_without_cupy_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install .cupy-cuda12x"):
        view(Elsewhere(np.zeros(3, np.float32), 2), "q")


# ------------------------------------------------------------------------- CUDA, with the runtime stood in for


class Runtime:
    """What the border asks of CuPy's runtime, written down."""

    def __init__(self, device=0, streams=None):
        self.log = []
        self.device = device
        self.streams = streams or {}
        self.events = 0
        self.finished = False
        self.capturing = False

    def module(self):
        runtime = self

        class Event:
            def __init__(self, disable_timing):
                assert disable_timing
                runtime.events += 1
                self.ptr = runtime.events

            @property
            def done(self):
                return runtime.finished

        class Device:
            def __init__(self, device):
                self.device = device

            def __enter__(self):
                self.before, runtime.device = runtime.device, self.device

            def __exit__(self, *error):
                runtime.device = self.before

        return types.SimpleNamespace(
            ndarray=lambda shape, dtype: at_address(0xE0000000, shape, dtype, runtime.device),
            from_dlpack=lambda array: array.imported,
            cuda=types.SimpleNamespace(
                Event=Event,
                Device=Device,
                get_current_stream=lambda device: types.SimpleNamespace(ptr=runtime.streams.get(device, 0)),
                runtime=types.SimpleNamespace(
                    getDevice=lambda: runtime.device,
                    eventRecord=lambda event, stream: runtime.log.append(("record", event, stream)),
                    streamWaitEvent=lambda stream, event: runtime.log.append(("wait", stream, event)),
                    streamIsCapturing=lambda stream: runtime.capturing,
                    pointerGetAttributes=lambda pointer: types.SimpleNamespace(device=1),
                ),
            ),
        )


def at_address(pointer, shape, dtype="float16", device=0):
    """A CuPy array over memory that does not exist: everything but its contents can be asked for."""
    cupy = pytest.importorskip("cupy")
    dtype = np.dtype(dtype)
    memory = cupy.cuda.memory.UnownedMemory(pointer, int(np.prod(shape)) * dtype.itemsize, None, device)
    return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    module = made.module()
    monkeypatch.setattr(arrays, "_cupy", lambda: module)
    arrays._in_flight.clear()
    yield made
    arrays._in_flight.clear()


@pytest.mark.parametrize("dtype", FLOATS)
def test_cupy_arrays_are_read_from_their_attributes(dtype):
    array = at_address(0x10000, (4, 6, 8), dtype, device=3)
    size = np.dtype(dtype).itemsize
    found = view(array[1::2].swapaxes(0, 1))
    assert (found.pointer, found.shape, found.strides) == (0x10000 + 48 * size, (6, 2, 8), (8, 96, 1))
    assert (found.dtype, found.device, found.library, found.readonly) == (dtype, 3, "cupy", False)


def test_cuda_interface_arrays_wait_for_their_stream_on_the_device(runtime):
    runtime.streams = {1: 77}
    interface = {"shape": (2, 3), "typestr": "<f4", "data": (4096, True), "strides": None, "stream": 5, "version": 3}
    found = view(types.SimpleNamespace(__cuda_array_interface__=interface), "q")
    assert (found.pointer, found.shape, found.strides, found.dtype) == (4096, (2, 3), (3, 1), "float32")
    assert (found.device, found.library, found.readonly) == (1, "dlpack", True)
    assert runtime.log == [("record", 1, 5), ("wait", 77, 1)]
    assert runtime.device == 0


def test_cuda_interface_arrays_without_a_stream_are_not_waited_for(runtime):
    interface = {"shape": (0, 3), "typestr": "<i4", "data": (0, False), "strides": (24, 8), "version": 2}
    found = view(types.SimpleNamespace(__cuda_array_interface__=interface), "q")
    assert (found.pointer, found.strides, found.dtype, found.device) == (0, (6, 2), "int32", 0)
    assert runtime.log == []


GOOD_INTERFACE = {"shape": (2, 3), "typestr": "<f4", "data": (4096, True), "strides": None, "version": 3}


@pytest.mark.parametrize(
    "interface",
    [
        None,
        {},
        {name: value for name, value in GOOD_INTERFACE.items() if name != "data"},
        GOOD_INTERFACE | {"data": 4096},
        GOOD_INTERFACE | {"data": ("4096", True)},
        GOOD_INTERFACE | {"data": (0, True)},
        GOOD_INTERFACE | {"shape": 3},
        GOOD_INTERFACE | {"shape": (2.5, 3)},
        GOOD_INTERFACE | {"typestr": "<z4"},
        GOOD_INTERFACE | {"strides": (4,)},
        GOOD_INTERFACE | {"strides": ("a", "b")},
    ],
    ids=str,
)
def test_malformed_cuda_interfaces_are_refused_by_name(runtime, interface):
    with pytest.raises(TypeError, match="^q: got a SimpleNamespace (whose __cuda_array_interface__|without memory)"):
        view(types.SimpleNamespace(__cuda_array_interface__=interface), "q")


class Malformed(Foreign):
    def __init__(self, answer):
        self._answer = answer

    def __dlpack_device__(self):
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.mark.parametrize("answer", [None, (), 5, ("cpu", 0), RuntimeError("lost\nand more")], ids=repr)
def test_malformed_dlpack_devices_are_refused_by_name(answer):
    with pytest.raises(
        TypeError, match="^k: got a Malformed whose __dlpack_device__ cannot be read .*, expected an array"
    ):
        view(Malformed(answer), "k")


def test_what_cupy_cannot_import_is_refused_by_name(monkeypatch):
    def from_dlpack(x):
        raise BufferError("no stream for you")

    monkeypatch.setattr(arrays, "_cupy", lambda: types.SimpleNamespace(from_dlpack=from_dlpack))
    why = r"\(BufferError: no stream for you\)"
    with pytest.raises(TypeError, match=f"^v: got an Elsewhere that CuPy cannot import {why}, expected an array"):
        view(Elsewhere(np.zeros(2), 2), "v")


def test_lists_are_refused_with_what_makes_an_array():
    with pytest.raises(TypeError, match=r"^block_table: got a list, .*np.asarray\(block_table, np.int32\)"):
        view([[0, 1]], "block_table")
    with pytest.raises(TypeError, match=r"^sinks: got a tuple, .*np.asarray\(sinks, np.float32\)"):
        view((0.0, 1.0), "sinks")


def test_dlpack_objects_on_cuda_are_imported_by_cupy(runtime):
    foreign = Elsewhere(np.zeros(2), 2)
    foreign.imported = at_address(0x20000, (2, 8), "bfloat16")
    for device_type in (2, 13):  # device and managed memory
        foreign._device_type = device_type
        found = view(foreign)
        assert (found.array, found.base, found.library) == (foreign, foreign.imported, "dlpack")
        assert (found.pointer, found.dtype, found.device) == (0x20000, "bfloat16", 0)


def test_new_cuda_arrays_are_contiguous_and_in_the_right_place(runtime):
    like = view(at_address(0x1000, (4, 4)))
    made = empty(like, (2, 3, 8), "bfloat16")
    assert (made.shape, made.strides, made.dtype, made.device) == ((2, 3, 8), (24, 8, 1), "bfloat16", 0)
    assert made.pointer == made.array.data.ptr and deliver(made, like) is made.array


def cuda_view(library, pointer=0x1000, base=None):
    return View(object(), pointer, (4,), (1,), "float16", 0, library, False, base)


def test_streams_of_two_libraries_are_ordered_only_if_they_differ(runtime, monkeypatch):
    torch = types.SimpleNamespace(_C=types.SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 9))
    monkeypatch.setitem(sys.modules, "torch", torch)
    q, k = cuda_view("torch"), cuda_view("cupy")
    assert arrays.current_stream(q) == 9 and arrays.current_stream(k) == 0
    assert arrays.other_stream(q, [q, k]) == 0
    assert arrays.other_stream(k, [q, k]) == 9
    assert arrays.other_stream(q, [q, q]) is None
    assert arrays.other_stream(k, [k, cuda_view("jax"), cuda_view("dlpack")]) is None
    runtime.streams = {0: 9}
    assert arrays.other_stream(q, [q, k]) is None


def test_pytorch_without_the_quick_way_to_its_stream(monkeypatch):
    stream = types.SimpleNamespace(cuda_stream=11)
    torch = types.SimpleNamespace(_C=object(), cuda=types.SimpleNamespace(current_stream=lambda device: stream))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert arrays.current_stream(cuda_view("torch")) == 11


def test_arrays_whose_owner_cannot_see_the_stream_live_until_the_work_is_done(runtime):
    mine, theirs = cuda_view("cupy"), cuda_view("jax", base=object())
    arrays.keep_until_done([mine, theirs], 5)
    assert runtime.log == [("record", 1, 5)]
    (event, held), *others = arrays._in_flight
    assert held == [(theirs.array, theirs.base)] and not others
    arrays.keep_until_done([mine], 5)
    assert len(arrays._in_flight) == 1, "not finished, so still held"
    runtime.finished = True
    arrays.keep_until_done([mine], 5)
    assert not arrays._in_flight
    runtime.capturing = True
    arrays.keep_until_done([theirs], 5)
    assert not arrays._in_flight, "in a graph there is no end of the work to wait for"
    runtime.capturing = False
    arrays.keep_until_done([theirs], 5)
    runtime.capturing = True
    arrays.keep_until_done([mine], 5)
    assert len(arrays._in_flight) == 1, "asking an event would end the capture"


# ---------------------------------------------------------------------------------------------- real devices


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_gpu_torch_round_trip(dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch without CUDA")
    tensor = torch.arange(24, device="cuda").to(getattr(torch, dtype)).reshape(2, 3, 4).transpose(0, 1)
    found = view(tensor)
    assert (found.pointer, found.device, found.dtype) == (tensor.data_ptr(), 0, dtype)
    assert np.array_equal(host_array(found).astype(np.float32), tensor.float().cpu().numpy())
    made = full(found, (3, 2), 2, dtype)
    assert deliver(made, found) is made.array and made.array.device == tensor.device
    with torch.cuda.stream(torch.cuda.Stream()):
        assert arrays.current_stream(found) == torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_gpu_jax_round_trip(dtype):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX without CUDA")
    array = jax.numpy.arange(24, dtype=dtype).reshape(2, 3, 4)
    found = view(array)
    assert (found.pointer, found.library, found.readonly) == (array.unsafe_buffer_pointer(), "jax", True)
    assert np.array_equal(host_array(found), np.asarray(array))
    made = full(found, (3, 2), 2, "float32")
    result = deliver(made, found)
    assert isinstance(result, jax.Array) and result.unsafe_buffer_pointer() == made.pointer
    assert (np.asarray(result) == 2).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_gpu_cupy_round_trip_and_stream(dtype):
    import cupy

    array = cupy.arange(24, dtype=np.float32).reshape(2, 3, 4).astype(np.dtype(dtype))
    found = view(array)
    assert np.array_equal(host_array(found), array.get())
    with cupy.cuda.Stream() as stream:
        assert arrays.current_stream(found) == stream.ptr
    assert (deliver(full(found, (5,), 0, dtype), found).get() == 0).all()


@pytest.mark.gpu
def test_gpu_managed_memory_is_on_its_device():
    import cupy

    memory = cupy.cuda.MemoryPointer(cupy.cuda.ManagedMemory(64), 0)
    array = cupy.ndarray((16,), np.float32, memptr=memory)
    assert view(Foreign(array)).device == 0


@pytest.mark.gpu
def test_gpu_cuda_array_interface():
    import cupy

    array = cupy.arange(6, dtype=np.float32).reshape(2, 3)
    interface = array.__cuda_array_interface__
    found = view(types.SimpleNamespace(__cuda_array_interface__=interface))
    assert (found.pointer, found.device, found.strides) == (array.data.ptr, 0, (3, 1))
    assert host_array(found).tolist() == [[0, 1, 2], [3, 4, 5]]
