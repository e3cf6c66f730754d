"""From `Problem` to a callable that launches: plan, compile or load, and keep everything but the addresses ready."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .. import jit
from ..arrays import View, current_stream, empty
from ..plan import COUNTER_BYTES, Device, Plan, choose_kernel, inline_capacity, plan, plan_append
from ..problem import NATURAL, Append, Problem, Rotation, contiguous_row_alignment, contiguous_row_strides
from . import params
from .operands import AppendOperands, Operands
from .tensor_map import MAP_BYTES, encode
from .workspace import Workspace, keep_if_captured, workspace

if TYPE_CHECKING:
    import cupy

    from .rotary import PreparedRotary


class Prepared:
    """One attention problem, planned, compiled and loaded for one device; call it with operands and a stream."""

    __slots__ = ("problem", "plan", "kernel", "_function", "_grid", "_block", "_shared", "_tail")

    def __init__(self, problem: Problem, plan: Plan, kernel: jit.Kernel) -> None:
        self.problem = problem
        self.plan = plan
        self.kernel = kernel
        self._function = kernel.function
        self._grid = (plan.grid,)
        self._block = (plan.threads,)
        self._shared = plan.shared_bytes
        self._tail = params.scalars(problem, plan)

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        if self._grid[0]:
            argument = params.pack(operands, self._tail)
            enqueue(self._function, self._grid, self._block, (argument,), self._shared, stream)


class PreparedHopper:
    """The same for forward_sm90, which also takes maps of its arrays and counts its tiles in the stream's workspace."""

    __slots__ = ("problem", "plan", "kernel", "_device", "_grid", "_block", "_tail", "_maps", "_launches")

    def __init__(self, problem: Problem, plan: Plan, kernel: jit.Kernel, device: int) -> None:
        self.problem = problem
        self.plan = plan
        self.kernel = kernel
        self._device = device
        self._grid = (plan.grid,)
        self._block = (plan.threads,)
        self._tail = params.scalars(problem, plan)
        self._maps = functools.lru_cache(KEPT_MAPS)(functools.partial(_encode_map, problem, plan))
        self._launches = functools.lru_cache(KEPT_MAPS)(self._join)

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        if self._grid[0]:
            o = operands
            counters = workspace(self._device, stream, self.plan.workspace_bytes).pointer
            maps = self._launches(o.q.pointer, o.k.pointer, o.v.pointer, o.out.pointer, counters)
            arguments = (params.pack(o, self._tail), maps)
            enqueue(self.kernel.function, self._grid, self._block, arguments, self.plan.shared_bytes, stream)

    def _join(self, q: int, k: int, v: int, out: int, counters: int) -> bytes:
        """`TensorMaps` of the kernel for arrays at these addresses."""
        # Parts in float32 are stored without a map.
        out_map = bytes(MAP_BYTES) if self.plan.kv_splits > 1 else self._maps("out", out)
        maps = self._maps("q", q) + self._maps("k", k) + self._maps("v", v) + out_map
        return maps + counters.to_bytes(8, "little") + bytes(56)


KEPT_MAPS = 256  # of one prepared problem: arrays come back at addresses that they had before


def _encode_map(problem: Problem, plan: Plan, role: str, pointer: int) -> bytes:
    """The tensor map of q, k, v or out at this address."""
    cache, group = problem.cache, plan.query_box[0]
    columns = problem.head_dim if role in ("q", "k") else problem.head_dim_v
    if role in ("q", "out"):
        outer, row, head = problem.q_strides if role == "q" else problem.o_strides
        sequences, tokens = (1, problem.total_q) if problem.packed_q else (problem.batch, problem.seqlen_q)
        shape = columns, group, tokens, problem.num_heads // group, sequences
        strides, box = (head, row, group * head, outer), (*plan.query_box, 1, 1)
    elif not plan.key_box:
        return bytes(MAP_BYTES)  # keys are gathered without a map
    else:
        outer, row, head = cache.k_strides if role == "k" else cache.v_strides
        shape = columns, cache.block_size or cache.rows, problem.num_kv_heads, cache.entries
        strides, box = (row, head, outer), (plan.key_box, 1, 1)
    return encode(pointer, problem.dtype, shape, strides, box)


class PreparedSplits:
    """The same where several blocks share the keys of a tile: attention over the parts, then their merge."""

    __slots__ = ("problem", "plan", "kernel", "_device", "_attend", "_merge")

    def __init__(self, problem: Problem, plan: Plan, kernel: jit.Kernel, device: int) -> None:
        from ..states import Merge  # which leads back here
        from .merge import PreparedMerge

        self.problem = problem
        self.plan = plan
        self.kernel = kernel
        self._device = device
        shape = problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim_v
        strides = contiguous_row_strides(shape, False)
        parts = replace(problem, o_strides=strides, lse_form=NATURAL)
        self._attend = _prepare_attention(parts, plan, kernel, device)
        form = problem.dtype, plan.kv_splits, *shape
        merge = Merge(*form, strides, problem.o_strides, problem.out_alignment)
        self._merge = PreparedMerge(merge, device, True, problem.lse_form)

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        problem, splits = self.problem, self.plan.kv_splits
        memory = workspace(self._device, stream, self.plan.workspace_bytes).pointer + COUNTER_BYTES
        shape = problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim_v
        lse_shape = problem.batch, problem.num_heads, problem.seqlen_q
        outs = [memory + 4 * i * math.prod(shape) for i in range(splits)]
        behind = memory + 4 * splits * math.prod(shape)
        lses = [behind + 4 * i * math.prod(lse_shape) for i in range(splits + 1)]
        spare = lses.pop()
        parts, ends = replace(operands.out, pointer=outs[0]), replace(operands.out, pointer=lses[0])
        self._attend(replace(operands, out=parts, lse=ends), stream)
        lse = spare if operands.lse is None else operands.lse.pointer
        self._merge(outs, lses, operands.out.pointer, lse, _no_scratch, stream)


def _no_scratch(states: int) -> NoReturn:
    raise AssertionError("all splits are merged in one round")


class PreparedDecode:
    """The same for the decode kernel, which needs a workspace of the stream."""

    __slots__ = ("problem", "plan", "kernel", "_device", "_grid", "_block", "_tail", "_decode_tail")

    def __init__(self, problem: Problem, plan: Plan, kernel: jit.Kernel, device: int) -> None:
        self.problem = problem
        self.plan = plan
        self.kernel = kernel
        self._device = device
        self._grid = (plan.grid,)
        self._block = (plan.threads,)
        self._tail = params.scalars(problem, plan)
        self._decode_tail = params.decode_scalars(problem, plan)

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        if self._grid[0]:
            argument = self.argument(operands, workspace(self._device, stream, self.plan.workspace_bytes))
            enqueue(self.kernel.function, self._grid, self._block, (argument,), self.plan.shared_bytes, stream)

    def argument(self, operands: Operands, memory: Workspace) -> bytes:
        """The kernel's argument for a launch with this workspace, which no other launch may use at the same time."""
        return params.pack_decode(operands, self._tail, self._decode_tail, memory.pointer)


class PreparedAppend:
    """One append, compiled and loaded for one device; call it with operands and a stream."""

    __slots__ = ("append", "kernel", "grid", "block", "tail", "_device", "_inline")

    def __init__(self, append: Append, kernel: jit.Kernel, device: int, grid: int, threads: int) -> None:
        self.append = append
        self.kernel = kernel
        self._device = device
        self._inline: dict[int, jit.Kernel] = {}
        self.grid = (grid,)
        self.block = (threads,)
        self.tail = params.append_scalars(append)

    def __call__(self, operands: AppendOperands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        if self.grid[0]:
            argument = params.pack_append(operands, self.tail)
            enqueue(self.kernel.function, self.grid, self.block, (argument,), 0, stream)

    def inline(self, operands: AppendOperands, indices: np.ndarray, stream: int) -> None:
        """The same with index arrays that are on the host, and travel as an argument of the kernel.

        indices: int32, at most INLINE_CAPACITIES[-1]: cache_seqlens, behind it block_table, and with packed rows
        cu_seqlens_new behind that. Those of the operands are not looked at.
        """
        if self.grid[0]:
            kernel, capacity = self.inline_kernel(len(indices))
            argument = params.pack_append(operands, self.tail)
            held = indices.tobytes().ljust(4 * capacity, b"\0")
            enqueue(kernel.function, self.grid, self.block, (argument, held), 0, stream)

    def inline_kernel(self, indices: int) -> tuple[jit.Kernel, int]:
        """The kernel that takes so many indices as an argument, and the room for them there."""
        capacity = inline_capacity(indices)
        kernel = self._inline.get(capacity)
        if kernel is None:
            defines, arch = plan_append(self.append, capacity)[0], describe_device(self._device).arch
            kernel = self._inline[capacity] = jit.load("append_kv", defines, arch, "append_kv", self._device, 0)
        return kernel, capacity


class PreparedSteps:
    """An append, a rotation of the queries and attention, a launch each, for kernels that do the last alone."""

    __slots__ = ("problem", "plan", "kernel", "_append", "_rotate", "_attend")

    def __init__(
        self,
        problem: Problem,
        append: PreparedAppend | None,
        rotate: PreparedRotary | None,
        attend: Prepared | PreparedHopper | PreparedSplits,
    ) -> None:
        self.problem = problem
        self.plan = attend.plan
        self.kernel = attend.kernel
        self._append = append
        self._rotate = rotate
        self._attend = attend

    def __call__(self, operands: Operands, stream: int) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Returns at once."""
        if self._append is not None:
            self._append(operands.appending(), stream)
        if self._rotate is not None:
            operands = replace(operands, q=self._rotated(operands, stream))
        self._attend(operands, stream)

    def _rotated(self, operands: Operands, stream: int) -> View:
        o = operands
        rotated = empty(o.q, o.q.shape, o.q.dtype)
        offsets = o.seqused_k, o.uniform_length or 0
        self._rotate(o.q, rotated, o.rotary_cos, o.rotary_sin, *offsets, None, stream)
        if rotated.library == "cupy":  # PyTorch keeps what was allocated for a graph by itself
            keep_if_captured(rotated, stream)
        return rotated


def prepare(
    problem: Problem, device: int, kernel: str = "auto", **insist: Any
) -> Prepared | PreparedHopper | PreparedSplits | PreparedDecode | PreparedSteps:
    """Plan, compile (or find) and load. Raises ValueError where `kernel` cannot serve the problem on this device.

    `insist` goes to `plan`.
    """
    described = describe_device(device)
    alone = choose_kernel(problem, described, kernel)[0] == "decode"
    attended = problem if alone or problem.rotary is None else _rotated_before(problem)
    made = plan(attended, described, kernel, **insist)
    loaded = jit.load(made.kernel, made.defines, described.arch, made.kernel, device, made.shared_bytes)
    if alone:
        return PreparedDecode(problem, made, loaded, device)
    if made.kv_splits > 1:
        attend = PreparedSplits(attended, made, loaded, device)
    else:
        attend = _prepare_attention(attended, made, loaded, device)
    if problem.append is None:
        return attend
    append = prepare_append(problem.append, device) if problem.append.total_new else None
    rotate = None
    if problem.rotary is not None:
        from .rotary import prepare_rotary  # which needs this module

        rotate = prepare_rotary(_rotation_of_queries(problem), device)
    return PreparedSteps(problem, append, rotate, attend)


def _prepare_attention(problem: Problem, plan: Plan, kernel: jit.Kernel, device: int) -> Prepared | PreparedHopper:
    if plan.kernel == "forward_sm90":
        return PreparedHopper(problem, plan, kernel, device)
    return Prepared(problem, plan, kernel)


def _rotated_before(problem: Problem) -> Problem:
    """The same problem for queries that lie in a new array."""
    shape = problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim
    alignment = math.gcd(problem.alignment, contiguous_row_alignment(problem.head_dim, problem.dtype))
    return replace(problem, q_strides=contiguous_row_strides(shape, False), alignment=alignment)


def _rotation_of_queries(problem: Problem) -> Rotation:
    """What rotates the queries into that array."""
    attended = _rotated_before(problem)
    return Rotation(
        dtype=problem.dtype,
        batch=problem.batch,
        total=problem.total_q,
        seqlen=problem.seqlen_q,
        num_heads=problem.num_heads,
        head_dim=problem.head_dim,
        packed=False,
        x_strides=problem.q_strides,
        out_strides=attended.q_strides,
        alignment=attended.alignment,
        rotary=problem.rotary,
    )


def prepare_append(append: Append, device: int) -> PreparedAppend:
    """Compile (or find) and load the append kernel for this problem."""
    defines, grid, threads = plan_append(append)
    loaded = jit.load("append_kv", defines, describe_device(device).arch, "append_kv", device, 0)
    return PreparedAppend(append, loaded, device, grid, threads)


@functools.cache
def describe_device(device: int) -> Device:
    """What plans need to know of a GPU that is present."""
    import cupy

    attributes = cupy.cuda.Device(device).attributes
    return Device(
        arch=jit.arch_of(device),
        multiprocessors=attributes["MultiProcessorCount"],
        shared_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
        shared_per_multiprocessor=attributes["MaxSharedMemoryPerMultiprocessor"],
        name=cupy.cuda.runtime.getDeviceProperties(device)["name"].decode(),
    )


def on_stream_of(like: View) -> AbstractContextManager:
    """A context in which CuPy works on the current stream of like's library. like's device is the current one.

    Memory that CuPy allocates there is reused in that stream's order.
    """
    stream, (current, device) = current_stream(like), _current()
    return nullcontext() if current().ptr == stream else _stream(stream, device())


def enqueue(
    function: cupy.RawKernel,
    grid: tuple[int, ...],
    block: tuple[int],
    arguments: tuple[bytes, ...],
    shared: int,
    stream: int,
) -> None:
    """Launch on the current device, whose stream `stream` must be.

    By the driver itself: a RawKernel looks at every argument, which takes the host longer than the launch.
    """
    launch = _launch_kernel()
    if not hasattr(_of_thread, "ready"):
        make_context()
    pointers = _POINTERS[len(arguments)](*arguments)  # to the bytes, which the driver has copied when it returns
    across, down, deep = (*grid, 1, 1)[:3]
    where = across, down, deep, block[0], 1, 1, shared, stream
    launch(function.kernel.ptr, *where, ctypes.addressof(pointers), 0)


_POINTERS = tuple([ctypes.c_char_p * count for count in range(8)])
_of_thread = threading.local()


def make_context() -> None:
    """Make the current device's context this thread's, which the driver takes for granted."""
    import cupy

    cupy.cuda.runtime.memGetInfo()
    _of_thread.ready = True


@functools.cache
def _launch_kernel() -> Callable[..., None]:
    from cupy_backends.cuda.api import driver

    return driver.launchKernel


@functools.cache
def _current() -> tuple[Callable[[], cupy.cuda.Stream], Callable[[], int]]:
    import cupy

    return cupy.cuda.get_current_stream, cupy.cuda.runtime.getDevice


class _Foreign:
    """A stream of another library, by the protocol that CuPy asks for."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.lru_cache(maxsize=256)
def _stream(pointer: int, device: int) -> cupy.cuda.Stream:
    """CuPy's object for a stream of the current device, which is `device`."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14.1
        return cupy.cuda.Stream.from_external(_Foreign(pointer))
    return cupy.cuda.ExternalStream(pointer)
