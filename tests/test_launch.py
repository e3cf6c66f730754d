"""How a step becomes launches: which kernels, in which order, over which arrays. CUDA is stood in for.

At the end, on a device, the numbers of steps that append and rotate without the decode kernel.
"""

from __future__ import annotations

import ctypes
import threading
import types

import numpy as np
import pytest
from oracle import normal
from test_arrays import Runtime, at_address
from test_decode import dense, held, ints, paged, tables
from test_decode import step as checked_step

from cupyattn import arrays, attention, attention_varlen, attention_with_kvcache
from cupyattn.attention import remembered
from cupyattn.kernels import launch, workspace
from cupyattn.kernels.tensor_map import MAP_BYTES
from cupyattn.plan import COUNTER_BYTES, DEVICES

ROTATED = OUT = 0xE0000000  # what the stand-in for CuPy's allocator gives
COUNTERS = 0x70000000  # at the beginning of the workspace


class Launches(Runtime):
    """CuPy's runtime, and what was launched: (kernel, its first argument as 8-byte words, stream).

    Of forward_sm90 also its second arguments: tensor maps are texts that say what of.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.maps = [], []
        self.arch = "90a"

    def enqueue(self, function, grid, block, arguments, shared, stream):
        assert grid[0] and block[0]
        words, *maps = arguments
        assert len(maps) == (function == "forward_sm90")
        self.seen.append((function, np.frombuffer(words, np.int64), stream))
        self.maps += maps

    def encode(self, pointer, dtype, shape, strides, box):
        assert len(shape) == len(strides) + 1 == len(box) + 1 <= 5
        return f"{pointer:#x} {dtype} {shape} {strides} {box}".encode().ljust(MAP_BYTES)

    @property
    def kernels(self):
        return [name for name, _, _ in self.seen]


@pytest.fixture
def launches(monkeypatch):
    made = Launches()
    cupy = made.module()
    monkeypatch.setattr(arrays, "_cupy", lambda: cupy)
    monkeypatch.setattr(launch, "describe_device", lambda device: DEVICES[made.arch])
    monkeypatch.setattr(launch.jit, "load", lambda name, *rest: types.SimpleNamespace(function=name, meta={}))
    monkeypatch.setattr(launch, "workspace", lambda *arguments: types.SimpleNamespace(pointer=COUNTERS))
    monkeypatch.setattr(launch, "encode", made.encode)
    monkeypatch.setattr(launch, "enqueue", made.enqueue)
    monkeypatch.setattr("cupyattn.kernels.rotary.enqueue", made.enqueue)
    monkeypatch.setattr("cupyattn.kernels.rotary.describe_device", launch.describe_device)
    monkeypatch.setattr(workspace, "_is_capturing", lambda: cupy.cuda.runtime.streamIsCapturing)
    monkeypatch.setattr(workspace, "_kept", [])
    remembered.clear()
    yield made
    remembered.clear()


def at(base, shape, dtype="float16"):
    return at_address(base, shape, dtype)


def new_rows(dtype="float16", count=2, rotary=True):
    """Options of a step of three sequences that appends `count` tokens to each."""
    options = {"k": at(0x400000, (3, count, 2, 64), dtype), "v": at(0x500000, (3, count, 2, 64), dtype)}
    if rotary:
        options |= {"rotary_cos": at(0x600000, (90, 32), "float32"), "rotary_sin": at(0x700000, (90, 32), "float32")}
    return options


def run(seqlen_q=2, dtype="float16", lengths=0x800, q=None, **options):
    lengths = at(lengths, (3,), "int32") if lengths >= 0x800 else lengths
    caches = (at(base, (3, 80, 2, 64), dtype) for base in (0x200000, 0x300000))
    q = at(0x100000, (3, seqlen_q, 8, 64), dtype) if q is None else q
    return attention_with_kvcache(q, *caches, cache_seqlens=lengths, causal=True, **options)


@pytest.mark.parametrize(
    ("arch", "dtype", "seqlen_q", "forward"),
    [
        ("90a", "float32", 1, "forward_simt"),
        ("75", "float16", 2, "forward_sm80"),
        ("80", "float16", 17, "forward_sm80"),
        ("90a", "float16", 17, "forward_sm90"),
        ("70", "bfloat16", 1, "forward_simt"),
    ],
)
def test_a_kernel_that_only_attends_comes_behind_an_append_and_a_rotation(launches, arch, dtype, seqlen_q, forward):
    launches.arch, launches.streams = arch, {0: 5}
    run(seqlen_q, dtype, **new_rows(dtype))
    assert launches.kernels == ["append_kv", "rotary", forward]
    assert [stream for _, _, stream in launches.seen] == [5, 5, 5]
    append, rotary, attend = (words.tolist() for _, words, _ in launches.seen)
    assert append[:4] == [0x400000, 0x500000, 0x200000, 0x300000] and append[5] == 0x800
    assert append[8:10] == [0x600000, 0x700000]
    assert rotary[:7] == [0x100000, ROTATED, 0x600000, 0x700000, 0x800, 0, 0]
    assert attend[:4] == [ROTATED, 0x200000, 0x300000, OUT] and attend[7] == 0x800


def test_the_decode_kernel_does_all_by_itself(launches):
    run(16, **new_rows())
    assert launches.kernels == ["decode"]


def test_only_what_there_is_is_launched(launches):
    launches.arch = "75"
    run(**new_rows(rotary=False))
    assert launches.kernels == ["append_kv", "forward_sm80"]
    assert launches.seen[1][1][0] == 0x100000, "q itself"
    launches.seen.clear()
    run(**new_rows(count=0))
    assert launches.kernels == ["rotary", "forward_sm80"]
    launches.seen.clear()
    run()
    assert launches.kernels == ["forward_sm80"]


def test_one_length_for_all_reaches_every_kernel(launches):
    launches.arch = "75"
    run(lengths=33, **new_rows())
    append, rotary, attend = (words for _, words, _ in launches.seen)
    assert append[5] == 0 and append[12] == 33
    assert rotary[4] == 0 and rotary[6] == 33
    assert attend[7] == 0 and attend[13] == 33


def test_rotated_queries_are_contiguous(launches):
    launches.arch = "75"
    qkv = at(0x100000, (3, 2, 12, 66))
    run(q=qkv[:, ::-1, 1:9, 1:65], **new_rows())
    rotary, attend = (words for _, words, _ in launches.seen[1:])
    assert rotary[7:13].tolist() == [2 * 12 * 66, -12 * 66, 66, 2 * 8 * 64, 8 * 64, 64]
    assert attend[14:17].tolist() == [2 * 8 * 64, 8 * 64, 64]


def test_rotated_queries_of_a_graph_are_kept(launches):
    launches.arch, launches.streams = "75", {0: 5}
    run(**new_rows())
    assert workspace._kept == []
    launches.capturing = True
    run(**new_rows())
    assert [kept.pointer for kept in workspace._kept] == [ROTATED]


def described(maps):
    """The texts of forward_sm90's tensor maps; behind them its counters' address, and zeros up to 64 bytes."""
    assert len(maps) == 4 * MAP_BYTES + 64
    assert maps[4 * MAP_BYTES :] == COUNTERS.to_bytes(8, "little") + bytes(56)
    return [maps[i * MAP_BYTES : (i + 1) * MAP_BYTES].rstrip().decode() for i in range(4)]


def test_the_hopper_kernel_takes_maps_of_its_arrays(launches):
    """Queries by groups of heads that share keys, where they are packed; keys and values of a dense cache as tiles."""
    run(17)
    ((function, _, _),) = launches.seen
    assert function == "forward_sm90"
    queries, strides = "(64, 4, 17, 2, 3)", "(64, 512, 256, 8704)"
    (tile,) = {x.split()[-3].strip("(,") for x in described(launches.maps[0])[1:3]}
    keys = f"float16 (64, 80, 2, 3) (128, 64, 10240) ({tile}, 1, 1)"
    assert described(launches.maps[0]) == [
        f"0x100000 float16 {queries} {strides} (4, 16, 1, 1)",
        f"0x200000 {keys}",
        f"0x300000 {keys}",
        f"{OUT:#x} float16 {queries} {strides} (4, 16, 1, 1)",
    ]


def test_maps_of_packed_queries_and_of_paged_keys(launches):
    q = at(0x100000, (90, 8, 64))
    blocks = (at(base, (50, 16, 2, 64)) for base in (0x200000, 0x300000))
    arrays = at(0x800, (4,), "int32"), None
    options = {"block_table": at(0x900, (3, 20), "int32"), "seqused_k": at(0xA00, (3,), "int32")}
    attention_varlen(q, *blocks, *arrays, **options, causal=True)
    found = described(launches.maps[0])
    queries = "float16 (64, 4, 90, 2, 1) (64, 512, 256, 0) (4, 16, 1, 1)"
    assert found[::3] == [f"{at} {queries}" for at in ("0x100000", f"{OUT:#x}")]
    assert found[1:3] == [f"{at} float16 (64, 16, 2, 50) (128, 64, 2048) (16, 1, 1)" for at in ("0x200000", "0x300000")]


def test_parts_of_split_keys_leave_without_a_map(launches, monkeypatch):
    """Behind the counters in the workspace, in float32, from where the merge takes them."""
    monkeypatch.setattr("cupyattn.kernels.merge.enqueue", launches.enqueue)
    monkeypatch.setattr("cupyattn.kernels.merge.describe_device", lambda device: DEVICES["90a"])
    q, *caches = (at(base, (1, rows, 2, 64)) for base, rows in ((0x100000, 64), (0x200000, 4096), (0x300000, 4096)))
    attention(q, *caches)
    assert launches.kernels == ["forward_sm90", "merge_states"]
    assert described(launches.maps[0])[3] == "\0" * MAP_BYTES
    assert launches.seen[0][1][3] == COUNTERS + COUNTER_BYTES


def lse_form(words):
    """The factor and the lse of an unseen row in a forward kernel's argument: behind scale and softcap."""
    return words.view(np.float32)[69:71].tolist()


LSE_FORMS = {
    True: [1, -np.inf],
    "log2": [float(np.float32(np.log2(np.e))), -np.inf],
    "flash_attn": [1, np.inf],
}


@pytest.mark.parametrize("form", LSE_FORMS)
@pytest.mark.parametrize("seqlen_q", [2, 17])
def test_a_kernel_writes_the_lse_as_it_is_asked_for(launches, seqlen_q, form):
    out, lse = run(seqlen_q, return_lse=form)
    ((function, words, _),) = launches.seen
    assert function == ("decode" if seqlen_q == 2 else "forward_sm90")
    assert words[4] == lse.data.ptr and lse_form(words) == LSE_FORMS[form]


@pytest.mark.parametrize("form", LSE_FORMS)
def test_of_split_keys_the_merge_does(launches, monkeypatch, form):
    """The parts keep the natural lse, by which they are weighted."""
    monkeypatch.setattr("cupyattn.kernels.merge.enqueue", launches.enqueue)
    monkeypatch.setattr("cupyattn.kernels.merge.describe_device", lambda device: DEVICES["90a"])
    q, *caches = (at(base, (1, rows, 2, 64)) for base, rows in ((0x100000, 64), (0x200000, 4096), (0x300000, 4096)))
    attention(q, *caches, return_lse=form)
    (_, attend, _), (_, merge, _) = launches.seen
    assert launches.kernels == ["forward_sm90", "merge_states"]
    assert lse_form(attend) == LSE_FORMS[True] and merge.view(np.float32)[-2:].tolist() == LSE_FORMS[form]


def test_maps_are_kept_while_arrays_come_back(launches, monkeypatch):
    encoded = []

    def encode(pointer, *form):
        encoded.append(pointer)
        return bytes(MAP_BYTES)

    monkeypatch.setattr(launch, "encode", encode)
    run(17)
    run(17)
    assert sorted(encoded) == [0x100000, 0x200000, 0x300000, OUT]
    run(17, q=at(0x1000000, (3, 17, 8, 64)))
    assert encoded[4:] == [0x1000000]
    assert launches.kernels == ["forward_sm90"] * 3


# ---------------------------------------------------------------------------------------------- on a real device

FORWARD = [("float32", 1), ("float32", 3), ("float16", 17), ("bfloat16", 40)]


@pytest.mark.backends("numpy", "cuda")
@pytest.mark.parametrize(("dtype", "seqlen_q"), FORWARD)
def test_steps_of_other_kernels(backend, rng, dtype, seqlen_q):
    """Appending and rotating, paged and dense, with lengths in an array and one for all, causal or not."""
    lengths = [0, 5, 33, 64]
    pairs = held(rng, dtype, lengths)
    q = normal(rng, (4, seqlen_q, 8, 64), dtype)
    k, v = normal(rng, (2, 4, 3, 2, 64), dtype)
    options = {"k": k, "v": v, "cache_seqlens": ints(*lengths)}
    rotary = tables(rng, 110, 32, "float32")
    for cache in (paged(rng, pairs, 16, capacity=70), dense(pairs, 70, [3, 0, 5, 1])):
        checked_step(backend, q, cache, **options, causal=True)
        checked_step(backend, q, cache, **options, **rotary, causal=True)
        checked_step(backend, q, cache, **options, **rotary, rotary_interleaved=False)
    pairs = held(rng, dtype, [20] * 4)
    checked_step(backend, q, dense(pairs, 70), **options | {"cache_seqlens": 20}, **rotary, window=(9, 0))
    none = {"k": k[:, :0].copy(), "v": v[:, :0].copy()}
    checked_step(backend, q, dense(pairs, 70), **options | none | {"cache_seqlens": 20}, **rotary, causal=True)


def test_a_launch_hands_the_driver_the_places_of_its_arguments(monkeypatch):
    """In any thread, each of which gets the device's context before its first launch."""
    import cupy
    from cupy_backends.cuda.api import driver

    seen, contexts = [], []

    def launch_kernel(*given):
        *form, location, extra = given
        pointers = (ctypes.c_void_p * 3).from_address(location)
        seen.append((form, extra, [ctypes.string_at(at, size) for at, size in zip(pointers, (24, 4, 0), strict=True)]))

    monkeypatch.setattr(driver, "launchKernel", launch_kernel)
    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: contexts.append(threading.get_ident()))
    launch._launch_kernel.cache_clear()
    function = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=0xF00))
    arguments = bytes(range(24)), b"\0\1\0\2", b""

    def twice():
        for grid in ((5,), (5, 6, 7)):
            launch.enqueue(function, grid, (128,), arguments, 4096, 77)

    threads = [threading.Thread(target=twice) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    launch._launch_kernel.cache_clear()
    expected = [[0xF00, *grid, 128, 1, 1, 4096, 77] for grid in ((5, 1, 1), (5, 6, 7))]
    assert [form for form, _, _ in seen] == 2 * expected
    assert all(extra == 0 and texts == [*arguments] for _, extra, texts in seen)
    assert len(contexts) == 2 and threading.get_ident() not in contexts
