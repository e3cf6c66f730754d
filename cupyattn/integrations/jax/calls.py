"""What XLA calls back: on a GPU a plan for each stream, launched on buffers' bare addresses; on the CPU NumPy.

Such a callback costs the host nothing but what Python does in it. No array object is made of a GPU's buffer: its
address is read, and the launches for these addresses are made again. Addresses come back: results take turns.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import Buffer, ExecutionContext, buffer_callback

from ...arrays import numpy_dtype, on_device
from ...attention import attention, attention_varlen, attention_with_kvcache
from ...kernels.planned import Bound
from ...planned_call import PlannedCall
from .forms import ROLES, Described, Form, abstracts, described

FUNCTIONS = {f.__name__: f for f in (attention, attention_varlen, attention_with_kvcache)}
_CPU = 1  # DLPack's device type

_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_words = (ctypes.c_uint64 * (1 << 57)).from_address(0)  # of this process's memory: the one at address 8 * i is number i

_HELD = 256  # launches that a callback keeps: those of all layers of a model, where results take turns


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
        return (jnp.zeros(out.shape, out.dtype), *(jnp.full(x.shape, problem.lse_form.unseen, x.dtype) for x in lse))
    callback = buffer_callback(
        _callback(found),
        tuple(results),
        input_output_aliases=aliases,
        command_buffer_compatible=form.command_buffer,
    )
    return callback(*(arrays[role] for role in present))


class Callback:
    """Runs calls of one form on whatever device their buffers are."""

    __slots__ = ("_described", "_roles", "_captures", "_out", "_plans", "_bound", "_word", "_lock", "__weakref__")

    def __init__(self, found: Described) -> None:
        self._described = found
        reads = [(array.role,) for array in found.arrays]
        if found.shared_cu_seqlens:
            reads = [("cu_seqlens_q", "cu_seqlens_k") if one == ("cu_seqlens_q",) else one for one in reads]
        writes = [("out",), ("lse",)] if found.problem.lse else [("out",)]
        if found.appends:  # XLA makes a cache that was not donated a copy, and that is what comes in and goes out
            reads = [() if one in (("k",), ("v",)) else one for one in reads]
            writes += [("k",), ("v",)]
        self._roles = tuple(reads + writes)  # what each buffer is for the kernels, those of the results behind
        self._out = len(reads)
        self._captures = found.form.command_buffer
        self._plans: dict[tuple[int, int, int], _Plan] = {}
        self._bound: dict[tuple[int, ...], Bound] = {}  # by stream and addresses; none of a capture
        self._word: int | None = None  # of a buffer, which holds its address; 0 if none does, None as long as none came
        self._lock = threading.Lock()

    def __call__(self, context: ExecutionContext, results: tuple[Buffer, ...], *buffers: Buffer) -> None:
        word = self._word
        if word:
            try:
                stream = context.stream
                bound = self._bound[(stream, *[_words[(id(buffer) >> 3) + word] for buffer in buffers + results])]
                if not self._captures or not _is_captured()(stream):
                    bound.launch()
                    return
            except Exception:  # new addresses, the CPU, or no context of the device: a launch that fails is made again
                pass  # below, those before it too, which do no more than before; and what is wrong is said there
        kind, device = buffers[0].__dlpack_device__()
        if kind == _CPU:
            self._on_host(results, buffers)
        elif _current_device()() == device:
            self._on_device(device, context.stream, buffers + results)
        else:
            with on_device(device):
                self._on_device(device, context.stream, buffers + results)

    def _on_device(self, device: int, stream: int, buffers: tuple[Buffer, ...]) -> None:
        addresses = self._addresses_of(buffers)
        captured = self._captures and _is_captured()(stream)
        # Launches of one plan must not overlap. Those of a graph may run beside one another if XLA likes, but two that
        # are at work at once write to two places.
        key = device, stream, addresses[self._out] if captured else 0
        plan = self._plans.get(key) or self._prepare(key)
        known = stream, *addresses
        bound = None if captured else self._bound.get(known)
        if bound is None:
            bound = plan.bind(addresses, stream)
            if not captured:
                self._keep(known, bound)
        plan.launch(bound, captured)

    def _addresses_of(self, buffers: tuple[Buffer, ...]) -> tuple[int, ...]:
        word = self._word
        if word:
            return tuple([_words[(id(buffer) >> 3) + word] for buffer in buffers])
        if word is None:
            self._word = _word_of_address(buffers)
        return _by_asking(buffers)

    def _keep(self, known: tuple[int, ...], bound: Bound) -> None:
        with self._lock:
            while len(self._bound) >= _HELD:
                del self._bound[next(iter(self._bound))]
            self._bound[known] = bound

    def _prepare(self, key: tuple[int, int, int]) -> _Plan:
        from ...kernels.workspace import outside_capture

        with self._lock, outside_capture():
            if key not in self._plans:
                self._plans[key] = _Plan(self._described, key[0], self._roles)
            return self._plans[key]

    def _on_host(self, results: tuple[Buffer, ...], buffers: tuple[Buffer, ...]) -> None:
        form = self._described.form
        found = zip(self._described.arrays, buffers, strict=True)
        arrays = {array.role: np.asarray(buffer) for array, buffer in found}
        out, *others = map(np.asarray, results)
        if self._described.appends:
            arrays["k"], arrays["v"] = others[-2:]
        q, k, v = (arrays.pop(role) for role in ("q", "k", "v"))
        given = dict(form.options) | {form.name_of(role): array for role, array in arrays.items()}
        if form.length is not None:
            given["cache_seqlens"] = form.length
        returned = FUNCTIONS[form.function](q, k, v, **given, out=out)
        if self._described.problem.lse:
            others[0][...] = returned[1]


@cache
def _current_device() -> Callable[[], int]:
    import cupy

    return cupy.cuda.runtime.getDevice


@cache
def _is_captured() -> Callable[[int], bool]:
    from ...kernels.workspace import is_captured  # needs CuPy

    return is_captured


@lru_cache(maxsize=4096)
def _callback(found: Described) -> Callback:
    """One for each form: JAX takes what it compiled for a callback again only if the callback is the same."""
    return Callback(found)


class _Plan(PlannedCall):
    """A planned call whose arrays are known by their addresses alone, in the order of these roles."""

    __slots__ = ("_operands", "_order")

    def __init__(self, found: Described, device: int, order: tuple[tuple[str, ...], ...]) -> None:
        form = found.form
        self._operands, self._order = found.operands(device), order
        roles = tuple([(form.name_of(role), role) for role in ROLES])
        self._prepare(self._operands, form.positional(), form.names, roles, False)
        if self._planned is not None:
            self._planned.trust_addresses(order, form.length)

    def bind(self, addresses: tuple[int, ...], stream: int) -> Bound:
        if self._planned is not None:
            return self._planned.bind(addresses, stream)
        example = self._operands  # new rows and no query
        given = {role: address for own, address in zip(self._order, addresses, strict=True) for role in own}
        views = {role: replace(getattr(example, role), pointer=given[role]) for role in ROLES if role in given}
        return Bound(partial(self._call.run, replace(example, **views), stream), stream, None)

    def launch(self, bound: Bound, captured: bool) -> None:
        if self._planned is not None:
            self._planned.launch(bound, captured)
        else:
            bound.launch()


def _by_asking(buffers: tuple[Buffer, ...]) -> tuple[int, ...]:
    """Where each buffer begins, which is where its memory does, as it is contiguous; 0 if it has none."""
    found = []
    for buffer in buffers:
        capsule = buffer.__dlpack__()  # what it points to is gone with it
        found.append(_words[_pointer_in(capsule, b"dltensor") >> 3])
    return tuple(found)


def _word_of_address(buffers: tuple[Buffer, ...]) -> int:
    """In which word of their own all these buffers, of one class of JAX's, hold their address: 0 for none.

    To read it there is sooner done than to ask.
    """
    known = _by_asking(buffers)
    if sys.implementation.name == "cpython" and sys.byteorder == "little" and any(known):
        for word in range(object.__basicsize__ // 8, min(type(buffer).__basicsize__ for buffer in buffers) // 8):
            if all(_words[(id(buffer) >> 3) + word] == one for buffer, one in zip(buffers, known, strict=True)):
                return word
    return 0
