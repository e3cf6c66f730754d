"""What XLA calls back: on a GPU a plan for each stream, launched on buffers' bare addresses; on the CPU NumPy.

Such a callback costs the host nothing but what Python does in it. No array object is made of a GPU's buffer: its
address is read out of its DLPack capsule, and written into the arguments of prepared launches.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import Buffer, ExecutionContext, buffer_callback

from ...arrays import current_device, numpy_dtype, on_device
from ...attention import attention, attention_varlen, attention_with_kvcache
from ...planned_call import PlannedCall
from .forms import ROLES, Described, Form, abstracts, described

FUNCTIONS = {f.__name__: f for f in (attention, attention_varlen, attention_with_kvcache)}
_CPU = 1  # DLPack's device type

_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_words = (ctypes.c_uint64 * (1 << 57)).from_address(0)  # of this process's memory: the one at address 8 * i is number i
_HEAD_WORDS = object.__basicsize__ // 8  # what CPython has before an object's own fields


def call(form: Form, arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """(out[, lse][, k_cache, v_cache]) of one call, whatever JAX traces it for. arrays are by role."""
    found = described(form, abstracts(form, arrays))
    present = [array.role for array in found.arrays]
    problem = found.problem
    results = [jax.ShapeDtypeStruct(found.out_shape, numpy_dtype(problem.dtype))]
    if problem.lse:
        results.append(jax.ShapeDtypeStruct(found.lse_shape, np.float32))
    aliases = {}
    if found.appends:
        for role in ("k", "v"):
            aliases[present.index(role)] = len(results)
            results.append(jax.ShapeDtypeStruct(arrays[role].shape, arrays[role].dtype))
    elif not problem.batch or not problem.total_q:  # no kernel runs: a packed q can still have rows, which see nothing
        out, *lse = results
        return (jnp.zeros(out.shape, out.dtype), *(jnp.full(x.shape, -jnp.inf, x.dtype) for x in lse))
    callback = buffer_callback(
        _callback(found),
        tuple(results),
        input_output_aliases=aliases,
        command_buffer_compatible=form.command_buffer,
    )
    return callback(*(arrays[role] for role in present))


class Callback:
    """Runs calls of one form on whatever device their buffers are."""

    __slots__ = ("_described", "_positions", "_length", "_lse", "_appends", "_captures", "_plans", "_lock")
    __slots__ += ("__weakref__",)

    def __init__(self, found: Described) -> None:
        self._described = found
        present = [array.role for array in found.arrays]
        pairs = [(ROLES.index(role), i) for i, role in enumerate(present)]
        if found.shared_cu_seqlens:
            pairs.append((ROLES.index("cu_seqlens_k"), present.index("cu_seqlens_q")))
        if found.appends:
            pairs = [pair for pair in pairs if pair[0] not in (_K, _V)]  # these go by the results that they are
        self._positions = tuple(pairs)  # (in ROLES, among the buffers)
        self._length = -1 if found.form.length is None else found.form.length
        self._lse = found.problem.lse
        self._appends = found.appends
        self._captures = found.form.command_buffer
        self._plans: dict[tuple[int, int, int], _Plan] = {}
        self._lock = threading.Lock()

    def __call__(self, context: ExecutionContext, results: tuple[Buffer, ...], *buffers: Buffer) -> None:
        kind, device = buffers[0].__dlpack_device__()
        if kind == _CPU:
            self._on_host(results, buffers)
        elif current_device() == device:
            self._on_device(device, context.stream, results, buffers)
        else:
            with on_device(device):
                self._on_device(device, context.stream, results, buffers)

    def _on_device(self, device: int, stream: int, results: tuple[Buffer, ...], buffers: tuple[Buffer, ...]) -> None:
        addresses = [(position, address_of(buffers[i])) for position, i in self._positions]
        out = address_of(results[0])
        if self._appends:  # XLA makes a cache that was not donated a copy, and that is what comes in and goes out
            addresses += (_K, address_of(results[-2])), (_V, address_of(results[-1]))
        lse = address_of(results[1]) if self._lse else 0
        captured = self._captures and _is_captured()(stream)
        # Launches of one plan must not overlap. Those of a graph may run beside one another if XLA likes, but two that
        # are at work at once write to two places.
        key = device, stream, out if captured else 0
        plan = self._plans.get(key) or self._plan(key)
        plan.at(addresses, out, lse, self._length, stream, captured)

    def _plan(self, key: tuple[int, int, int]) -> _Plan:
        from ...kernels.workspace import outside_capture

        with self._lock, outside_capture():
            if key not in self._plans:
                self._plans[key] = _Plan(self._described, key[0])
            return self._plans[key]

    def _on_host(self, results: tuple[Buffer, ...], buffers: tuple[Buffer, ...]) -> None:
        form = self._described.form
        found = zip(self._described.arrays, buffers, strict=True)
        arrays = {array.role: np.asarray(buffer) for array, buffer in found}
        out, *others = map(np.asarray, results)
        if self._appends:
            arrays["k"], arrays["v"] = others[-2:]
        q, k, v = (arrays.pop(role) for role in ("q", "k", "v"))
        given = dict(form.options) | {form.name_of(role): array for role, array in arrays.items()}
        if form.length is not None:
            given["cache_seqlens"] = form.length
        returned = FUNCTIONS[form.function](q, k, v, **given, out=out)
        if self._lse:
            others[0][...] = returned[1]


_K, _V = ROLES.index("k"), ROLES.index("v")


@cache
def _is_captured() -> Callable[[int], bool]:
    from ...kernels.workspace import is_captured  # needs CuPy

    return is_captured


@lru_cache(maxsize=4096)
def _callback(found: Described) -> Callback:
    """One for each form: JAX takes what it compiled for a callback again only if the callback is the same."""
    return Callback(found)


class _Plan(PlannedCall):
    """A planned call whose arrays are known by their addresses alone."""

    __slots__ = ("_operands",)

    def __init__(self, found: Described, device: int) -> None:
        form = found.form
        self._operands = found.operands(device)
        roles = tuple([(form.name_of(role), role) for role in ROLES])
        self._prepare(self._operands, form.positional(), form.names, roles, False)
        if self._planned is not None:
            self._planned.trust_addresses()

    def at(
        self, addresses: list[tuple[int, int]], out: int, lse: int, length: int, stream: int, captured: bool
    ) -> None:
        """Launch on `stream`, a cudaStream_t of the current device. Addresses come with their places in ROLES."""
        if self._planned is not None:
            self._planned.at(addresses, out, lse, length, stream, captured)
        else:  # new rows and no query
            example = self._operands
            given = [(ROLES[place], address) for place, address in addresses]
            views = {role: replace(getattr(example, role), pointer=address) for role, address in given}
            self._call.run(replace(example, **views), stream)


def _by_asking(buffer: Buffer) -> int:
    capsule = buffer.__dlpack__()  # what it points to is gone with it
    return _words[_pointer_in(capsule, b"dltensor") >> 3]


def _by_layout(buffer: Buffer) -> int:
    capsule = buffer.__dlpack__()
    return _words[_words[(id(capsule) >> 3) + _HEAD_WORDS] >> 3]


def _quickest() -> Callable[[Buffer], int]:
    """To ask Python for a capsule's pointer takes longer than to read it behind the capsule's head."""
    array = np.empty(1)
    known = sys.implementation.name == "cpython" and sys.byteorder == "little" and object.__basicsize__ in (16, 32)
    return _by_layout if known and _by_layout(array) == _by_asking(array) == array.ctypes.data else _by_asking


address_of = _quickest()
"""Where a buffer's memory begins, 0 if it has none. Buffers are contiguous, and begin where their memory does."""
