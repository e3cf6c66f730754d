"""What a call inside JAX is before it has arrays: its form, checked while JAX traces, and its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from ...arrays import View, contiguous_strides, numpy_dtype, refuse
from ...attention import (
    CACHE_NAMES,
    CPU_KERNELS,
    CUDA_KERNELS,
    check_caches,
    check_kernel,
    describe_call,
    share_cu_seqlens,
)
from ...kernels.operands import Operands
from ...problem import Problem, check_uniform

ROLES = tuple(name for name in Operands.__slots__ if name not in ("out", "lse", "uniform_length"))
"""What is read, by its names in `Operands`. XLA gets the arrays of a call in this order."""

Options = tuple[tuple[str, Any], ...]

_DEFAULTS = {
    "max_seqlen_q": None,
    "max_seqlen_k": None,
    "layout": "NHD",
    "kv_dtype": None,
    "k_scale": None,
    "v_scale": None,
    "rotary_interleaved": True,
    "num_splits": 0,
}
_FIRST_ADDRESS, _APART = 1 << 40, 256  # of stand-ins: XLA's arrays never overlap, and begin at such multiples


@dataclass(frozen=True, slots=True)
class Form:
    """Everything about a call that is not an array. Part of the key under which JAX keeps what it traced."""

    function: str  # the public function's name
    options: Options  # in the order of `find_call`, as in the function's signature
    kinds: tuple[type, ...]  # of the options: True, 1 and 1.0 are equal keys, but not equally good arguments
    length: int | None  # of all sequences, where cache_seqlens is an int
    command_buffer: bool

    @property
    def cached(self) -> bool:
        return self.function == "attention_with_kvcache"

    @property
    def names(self) -> tuple[str, str, str]:
        """What the signature calls k, v and seqused_k."""
        return CACHE_NAMES if self.cached else ("k", "v", "seqused_k")

    def name_of(self, role: str) -> str:
        """What the signature calls a role of `Operands`."""
        named = dict(zip(("k", "v", "seqused_k"), self.names, strict=True)) | {"k_new": "k", "v_new": "v"}
        return named.get(role, role)

    def positional(self) -> tuple:
        """The options as `find_call` takes them."""
        given = _DEFAULTS | dict(self.options)
        masks = ("causal", "window", "softmax_scale", "softcap", "return_lse", "kernel")
        cache = ("kv_dtype", "k_scale", "v_scale", "rotary_interleaved", "num_splits")
        lengths = ("max_seqlen_q", "max_seqlen_k", "layout")
        return (*(given[name] for name in (*masks, *lengths)), tuple(given[name] for name in cache))

    def without(self, *names: str) -> Form:
        """The same form with these options left at their defaults."""
        kept = [(option, kind) for option, kind in zip(self.options, self.kinds, strict=True) if option[0] not in names]
        options, kinds = zip(*kept, strict=True)
        return Form(self.function, options, kinds, self.length, self.command_buffer)


@dataclass(frozen=True, slots=True)
class Abstract:
    """An array's shape and dtype."""

    role: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Described:
    """A form with the shapes of its arrays, validated."""

    form: Form
    arrays: tuple[Abstract, ...]  # in the order of ROLES
    problem: Problem
    shared_cu_seqlens: bool  # packed keys have those of the queries

    def operands(self, device: int) -> Operands:
        """Stand-ins for arrays of these shapes, contiguous and apart in memory, at addresses that nobody reads."""
        return _operands(self.form, self.arrays, device)

    @property
    def out_shape(self) -> tuple[int, ...]:
        q = next(array for array in self.arrays if array.role == "q")
        return *q.shape[:-1], self.problem.head_dim_v

    @property
    def lse_shape(self) -> tuple[int, ...]:
        p = self.problem
        return (p.num_heads, p.total_q) if p.packed_q else (p.batch, p.num_heads, p.seqlen_q)

    @property
    def appends(self) -> bool:
        return self.problem.append is not None


def abstracts(form: Form, arrays: Mapping[str, jax.Array]) -> tuple[Abstract, ...]:
    """Shapes and dtypes of the arrays, which are by role, in the order of ROLES."""
    found = []
    for role in ROLES:
        if role in arrays:
            shape = arrays[role].shape
            if not all(isinstance(size, int) for size in shape):
                came = f"a shape that is not static: ({', '.join(map(str, shape))})"
                refuse(form.name_of(role), came, "numbers alone: what to launch is planned while JAX traces")
            found.append(Abstract(role, tuple(shape), arrays[role].dtype.name))
    return tuple(found)


@lru_cache(maxsize=4096)
def described(form: Form, arrays: tuple[Abstract, ...]) -> Described:
    """Validate. Raises TypeError or ValueError in the terms of the function's signature."""
    on_gpu = jax.default_backend() in ("gpu", "cuda")
    known = CUDA_KERNELS if on_gpu else [name for name in CPU_KERNELS if name != "numpy_float64"]
    options = form.positional()
    check_kernel(options[5], tuple(known), f"JAX on {'a GPU' if on_gpu else 'the CPU'}")
    operands = _operands(form, arrays, 0 if on_gpu else -1)
    problem = describe_call(operands, options, form.names)
    check_caches(problem, operands)
    if form.length is not None:
        check_uniform(problem, form.length)
    given = {array.role for array in arrays}
    return Described(form, arrays, problem, "cu_seqlens_k" not in given and operands.cu_seqlens_k is not None)


def _operands(form: Form, arrays: tuple[Abstract, ...], device: int) -> Operands:
    views, address = {}, _FIRST_ADDRESS
    library = "cupy" if device >= 0 else "numpy"  # unlike JAX's own arrays, XLA's buffers can be written to
    for array in arrays:
        strides = contiguous_strides(array.shape)
        views[array.role] = View(None, address, array.shape, strides, array.dtype, device, library, False)
        size = int(np.prod(array.shape, dtype=np.int64)) * numpy_dtype(array.dtype).itemsize
        address += (-(-size // _APART) + 1) * _APART
    operands = Operands(views.pop("q"), views.pop("k"), views.pop("v"), None, **views, uniform_length=form.length)
    if form.function == "attention_varlen" and operands.cu_seqlens_k is None and operands.block_table is None:
        share_cu_seqlens(operands)
    return operands
