"""A decoding step that is planned once and then run for every token and layer: the host does next to nothing.

What `attention_with_kvcache` finds out in every call is found out when the plan is made: the kernel, its workspace and
its launch parameters. A run compares the arrays' forms with the planned ones and launches. The division of such work
into plan and run is that of the decode wrappers in the flashinfer package (Ye et al. 2025, arXiv:2501.01005); here the
plan depends on shapes alone, never on lengths, so that it is made once and not for every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any, NoReturn

from .arrays import View, contiguous_strides, device_name, numpy_dtype, reach, refuse, view
from .attention import (
    CACHE_NAMES,
    Array,
    Call,
    check_caches,
    check_results,
    checking,
    index_contents,
    lengths,
    prepare_call,
    read_cache_arguments,
    refuse_shared,
    run_call,
)
from .explain import counted, in_words
from .kernels.operands import Operands
from .plan import Plan
from .problem import ITEMSIZE, Problem, check_indices, check_uniform, check_writable, longest_uniform
from .streams import device_of

# What `run` takes, in the order in which a plan looks at it: (name in the signature, name in Operands).
ROLES = (
    ("q", "q"),
    ("k_cache", "k"),
    ("v_cache", "v"),
    ("cache_seqlens", "seqused_k"),
    ("block_table", "block_table"),
    ("cache_batch_idx", "cache_batch_idx"),
    ("cache_leftpad", "cache_leftpad"),
    ("alibi_slopes", "alibi_slopes"),
    ("sinks", "sinks"),
    ("k", "k_new"),
    ("v", "v_new"),
    ("rotary_cos", "rotary_cos"),
    ("rotary_sin", "rotary_sin"),
    ("k_scale", "k_scale"),
    ("v_scale", "v_scale"),
)
_OF_TOKENS = ("q", "k_cache", "v_cache", "k", "v")


class DecodePlan:
    """`attention_with_kvcache` for one form of arrays, prepared as far as can be.

    Takes what `attention_with_kvcache` takes, as examples: shapes, strides, dtypes, the device and the alignment of the
    arrays are planned, which of them there are, and all options. Contents are not read and no array is kept. `run` then
    takes arrays of exactly those forms.

    On CUDA a plan has a workspace of its own, in which launches leave partial sums. **Runs of one plan must therefore
    not overlap**: queue them on one stream, or order streams by events, replays of graphs that hold them included, or
    make one plan for each stream. Threads may share a plan under the same condition. When a plan is dropped, its memory
    is reused in the order of the stream that was current when it was made; what a graph has captured is kept for good.

    A run can be captured in a CUDA graph, by CuPy's stream capture or by torch.cuda.graph, with `out=` given or not. A
    replay reads lengths, tables, caches and all other arrays as they are then: the graph stays right as sequences grow
    and blocks move. Lengths that are an int are captured as they were.

    Args:
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
            k_scale, v_scale, alibi_slopes, sinks: examples of what each run will get, or None for what none will get. A
            cache_seqlens that is an int stands for any, scales that are numbers are part of the plan.
        out: an example of `run`'s out, if its strides are not those of a new array.
        rotary_interleaved, layout, kv_dtype, num_splits, causal, window, softmax_scale, softcap, return_lse, kernel: as
            in `attention_with_kvcache`.
        check: read and check the contents of index arrays in each run, as in `attention_varlen`: always on the CPU.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.

    >>> import numpy as np
    >>> from cupyattn import DecodePlan
    >>> q, (k_blocks, v_blocks) = np.ones((2, 1, 8, 64), np.float32), np.ones((2, 9, 16, 2, 64), np.float32)
    >>> step = {"cache_seqlens": np.array([5, 20], np.int32), "block_table": np.array([[0, 1], [2, 3]], np.int32)}
    >>> plan = DecodePlan(q, k_blocks, v_blocks, **step)
    >>> plan.run(q, k_blocks, v_blocks, **step).shape
    (2, 1, 8, 64)
    >>> plan.workspace_bytes, plan.device  # the NumPy backend needs none
    (0, 'cpu')
    """

    __slots__ = ("_call", "_checks", "_forms", "_out", "_numbers", "_longest", "_addresses", "_planned")

    def __init__(
        self,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        *,
        k: Array | None = None,
        v: Array | None = None,
        rotary_cos: Array | None = None,
        rotary_sin: Array | None = None,
        rotary_interleaved: bool = True,
        cache_seqlens: Array | int | None = None,
        cache_batch_idx: Array | None = None,
        cache_leftpad: Array | None = None,
        block_table: Array | None = None,
        layout: str = "NHD",
        kv_dtype: str | None = None,
        k_scale: Array | float | None = None,
        v_scale: Array | float | None = None,
        num_splits: int = 0,
        causal: bool = False,
        window: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        return_lse: bool = False,
        out: Array | None = None,
        kernel: str = "auto",
        check: bool | None = None,
    ) -> None:
        operands = Operands(view(q, "q"), view(k_cache, "k_cache"), view(v_cache, "v_cache"), None)
        operands.out = None if out is None else view(out, "out")
        optional = k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
        scales = read_cache_arguments(operands, *optional, alibi_slopes, sinks, k_scale, v_scale)
        masks = (causal, window, softmax_scale, softcap, return_lse)
        options = (*masks, kernel, None, None, layout, (kv_dtype, *scales, rotary_interleaved, num_splits))
        self._call = call = prepare_call(operands, options, CACHE_NAMES)
        check_results(operands, call.out_dtype, CACHE_NAMES)
        check_caches(call.problem, operands)
        self._checks = checking(check, operands.q.device)
        if operands.out is None:
            operands.out = _new_array(operands.q, call.out_dtype)
        self._forms = tuple([_form(role, operands, call) for _, role in ROLES])
        self._out = _form("out", operands, call)
        self._numbers = scales
        self._longest = None if operands.uniform_length is None else longest_uniform(call.problem)
        self._addresses = _Addresses(call, self._forms, self._out)
        self._planned = self._bind(operands)

    def _bind(self, operands: Operands) -> Any:
        """The kernel with memory of its own, where it is decode; the plan's call then launches through that."""
        if operands.q.device < 0:
            return None
        from .kernels.launch import PreparedDecode, on_stream_of  # these need CuPy
        from .kernels.planned import PlannedDecode
        from .kernels.workspace import Workspace

        if not isinstance(self._call.run, PreparedDecode):
            return None
        with device_of(operands.q), on_stream_of(operands.q):
            memory = Workspace(operands.q.device, self._call.run.plan.workspace_bytes)
        with device_of(operands.q):
            planned = PlannedDecode(self._call.run, memory, operands, self._addresses)
        self._call = replace(self._call, run=planned)
        return planned

    @property
    def problem(self) -> Problem:
        """The validated description of the call."""
        return self._call.problem

    @property
    def plan(self) -> Plan | None:
        """What is launched, and why; None on the CPU, and where there is no query."""
        return self._planned.prepared.plan if self._planned is not None else getattr(self._call.run, "plan", None)

    @property
    def workspace_bytes(self) -> int:
        """Device memory that the plan holds: 0 where its kernel needs none beyond what a run allocates."""
        return 0 if self._planned is None else self._planned.memory.size

    @property
    def device(self) -> str:
        """Where the plan runs: "cpu" or "cuda:0"."""
        return device_name(self._forms[0].device)

    @property
    def kernel(self) -> str:
        """The kernel's name: "decode", or a forward kernel where decode cannot be; "numpy" on the CPU."""
        return "numpy" if self._forms[0].device < 0 else "none" if self.plan is None else self.plan.kernel

    def __repr__(self) -> str:
        return f"<DecodePlan {self.kernel} on {self.device}: {in_words(self.problem)}>"

    def __str__(self) -> str:
        lines = [f"DecodePlan: {self.kernel} on {self.device}", f"  {in_words(self.problem)}"]
        plan = self.plan
        if plan is not None:
            lines += [f"  because {reason}" for reason in plan.reasons]
            blocks = f"{counted(plan.grid, 'block')} of {counted(plan.threads, 'thread')}"
            lines.append(f"  tile {counted(plan.tile_rows, 'row')} x {counted(plan.tile_keys, 'key')}; {blocks}")
        lines.append(f"  workspace {counted(self.workspace_bytes, 'byte')}")
        return "\n".join(lines)

    def run(
        self,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        *,
        k: Array | None = None,
        v: Array | None = None,
        rotary_cos: Array | None = None,
        rotary_sin: Array | None = None,
        cache_seqlens: Array | int | None = None,
        cache_batch_idx: Array | None = None,
        cache_leftpad: Array | None = None,
        block_table: Array | None = None,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        k_scale: Array | float | None = None,
        v_scale: Array | float | None = None,
        out: Array | None = None,
    ) -> Array | tuple[Array, Array]:
        """One step, on the current stream of q's library: what `attention_with_kvcache` does with these arrays.

        Arrays may be of any library and lie anywhere. Each must have the planned shape, strides, dtype, device and
        alignment; an array that was planned must be given, any other must not. k and v are appended in place. A run
        that is refused has launched and written nothing.

        Args:
            q: (batch, seqlen_q, heads, head_dim).
            k_cache, v_cache: the caches or their blocks, as in `attention_with_kvcache`.
            k, v: (batch, seqlen_new, kv_heads, head_dim).
            rotary_cos, rotary_sin: (positions, rotary_dim / 2).
            cache_seqlens, cache_batch_idx, cache_leftpad: int32 (batch,); cache_seqlens is an int if that was planned.
            block_table: int32 (batch, max_blocks).
            alibi_slopes: float32 (heads,) or (batch, heads), sinks: float32 (heads,).
            k_scale, v_scale: float32 (), (1,) or (kv_heads,); numbers were planned and need not be given again.
            out: an array of q's shape and dtype to write into, apart in memory from q, k, v and the caches.

        Returns:
            As `attention_with_kvcache`: an array of q's shape and dtype in q's library, `out` itself if given; where
            return_lse was planned a pair of it and the lse, float32 (batch, heads, seqlen_q).

        Raises:
            TypeError, ValueError: an argument is not as planned. The message names it, what came and what was planned.
        """
        length = -1
        if self._longest is not None:
            length, cache_seqlens = self._length(cache_seqlens), None
        if k_scale is not None:
            k_scale = _unless_planned("k_scale", k_scale, self._numbers[0])
        if v_scale is not None:
            v_scale = _unless_planned("v_scale", v_scale, self._numbers[1])
        arrays = (
            q,
            k_cache,
            v_cache,
            cache_seqlens,
            block_table,
            cache_batch_idx,
            cache_leftpad,
            alibi_slopes,
            sinks,
            k,
            v,
            rotary_cos,
            rotary_sin,
            k_scale,
            v_scale,
        )
        if self._planned is not None and not self._checks:
            results = self._planned.quick(arrays, length, out)
            if results is not None:
                return results
        return self._run_views(arrays, length, out)

    def _run_views(self, arrays: tuple[Any, ...], length: int, out: Array | None) -> Array | tuple[Array, Array]:
        """The same for arrays of any library, which is also where everything is refused."""
        given = zip(ROLES, arrays, self._forms, strict=True)
        views = {role: _planned_view(name, array, form) for (name, role), array, form in given}
        operands, call = Operands(**views, out=None), self._call
        if out is not None:
            operands.out = _planned_view("out", out, self._out)
            check_writable("out", operands.out)
        elif self._out.strides != _used_strides(_new_array(operands.q, self._out.dtype)):
            refuse("out", None, f"one with strides {self._out.strides}, as planned")
        if self._longest is not None:
            operands.uniform_length = length
        if call.problem.append is not None:
            check_writable("k_cache", operands.k)
            check_writable("v_cache", operands.v)
        check_results(operands, call.out_dtype, CACHE_NAMES)
        addresses = tuple([0 if found is None else found.pointer for found in views.values()])
        self._addresses(addresses, 0 if out is None else operands.out.pointer)
        if self._checks:
            check_indices(call.problem, index_contents(operands, call.problem.batch, "cache_seqlens"))
        return run_call(call, operands, out)

    def _length(self, length: Array | int | None) -> int:
        """The int that was planned for, checked."""
        if type(length) is int and 0 <= length <= self._longest:
            return length
        found, number = lengths("cache_seqlens", length)
        if number is None:
            refuse("cache_seqlens", None if found is None else "an array", "an int, as planned", TypeError)
        check_uniform(self.problem, number)
        return number


def _unless_planned(name: str, scale: Array | float, number: float | None) -> Array | float | None:
    """A scale that was given to a run; None if it is the number that was planned."""
    if number is None:
        return scale
    if not isinstance(scale, Number):
        refuse(name, "an array", f"None or {number}, as planned", TypeError)
    if scale != number:
        refuse(name, scale, f"None or {number}, as planned")
    return None


@dataclass(frozen=True, slots=True)
class _Form:
    """What an array must be like."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # 0 for those that nothing ever steps by
    dtype: str
    device: int
    alignment: int  # bytes that divide its address
    reach: tuple[int, int]  # bytes from its address to the lowest, and behind the highest

    def __str__(self) -> str:
        return f"an array of {self.dtype}, shape {self.shape}, on {device_name(self.device)}"


def _form(role: str, operands: Operands, call: Call) -> _Form | None:
    found = getattr(operands, role)
    if found is None:
        return None
    problem, append = call.problem, call.problem.append
    alignment = ITEMSIZE[found.dtype]
    if found.device < 0:  # NumPy asks for no more
        append = None
    elif role in ("q", "k", "v"):
        alignment = problem.alignment
    elif role == "out":
        alignment = problem.out_alignment
    if append is not None and role in ("k", "v", "k_new", "v_new"):
        alignment = max(alignment, append.alignment)
    return _Form(
        found.shape,
        _used_strides(found),
        found.dtype,
        found.device,
        1 if 0 in found.shape else alignment,
        reach(found.shape, found.strides, numpy_dtype(found.dtype).itemsize),
    )


def _planned_view(name: str, array: Array | None, form: _Form | None) -> View | None:
    """The view of one argument; TypeError or ValueError if it is not as planned."""
    if array is None and form is None:
        return None
    if form is None:
        refuse(name, repr(array) if isinstance(array, Number) else "an array", "None, as planned")
    if array is None or isinstance(array, Number):
        refuse(name, array, f"{form}, as planned", TypeError)
    found = view(array, name)
    if found.dtype != form.dtype:
        refuse(name, found.dtype, f"{form.dtype}, as planned", TypeError)
    if found.shape != form.shape:
        refuse(name, f"shape {found.shape}", f"{form.shape}, as planned")
    if found.device != form.device:
        refuse(name, f"an array on {device_name(found.device)}", f"one on {device_name(form.device)}, as planned")
    if _used_strides(found) != form.strides:
        refuse(name, f"strides {found.strides}", f"{form.strides}, as planned")
    return found


def _used_strides(found: View) -> tuple[int, ...]:
    if 0 in found.shape:
        return (0,) * len(found.shape)
    return tuple([step if size > 1 else 0 for size, step in zip(found.shape, found.strides, strict=True)])


def _new_array(q: View, dtype: str) -> View:
    """The form of the output that a call makes where none is given."""
    return View(None, 0, q.shape, contiguous_strides(q.shape), dtype, q.device, q.library, False)


class _Addresses:
    """Refuses addresses that are not aligned as planned, and arrays that share memory and must not."""

    __slots__ = ("_masks", "_extents", "_apart", "_out_mask", "_out_apart", "_between_caches")

    def __init__(self, call: Call, forms: tuple[_Form | None, ...], out: _Form) -> None:
        self._masks = [(i, form.alignment - 1) for i, form in enumerate(forms) if form is not None]
        self._masks = [(i, mask) for i, mask in self._masks if mask]
        self._out_mask = out.alignment - 1
        q, k_cache, v_cache, k, v = (i for i, (name, _) in enumerate(ROLES) if name in _OF_TOKENS)
        read = [i for i in (q, k_cache, v_cache, k, v) if forms[i] is not None]
        self._out_apart = [(i, *bounds) for i in read if (bounds := _meeting(forms[i].reach, out.reach))]
        self._extents = call.extents
        self._apart = []
        if call.extents is not None:
            pairs = [(i, j) for i in (q, k, v) for j in (k_cache, v_cache)]
            bounds = [(*pair, _meeting(*(forms[i].reach for i in pair))) for pair in pairs]
            self._apart = [(i, j, *found) for i, j, found in bounds if found]
        self._between_caches: int | None = None

    def __call__(self, addresses: Sequence[int], out: int) -> None:
        """addresses in the order of `ROLES`; out 0 if there is none yet."""
        for i, mask in self._masks:
            if addresses[i] & mask:
                _refuse_alignment(ROLES[i][0], mask + 1)
        if self._extents is not None:
            meets = addresses[2] - addresses[1] != self._between_caches
            for i, j, low, high in self._apart:
                if low < addresses[i] - addresses[j] < high:
                    meets = True
            if meets:
                refuse_shared(self._extents, *addresses[1:3], *addresses[9:11], addresses[0])
                self._between_caches = addresses[2] - addresses[1]
        if out:
            if out & self._out_mask:
                _refuse_alignment("out", self._out_mask + 1)
            for i, low, high in self._out_apart:
                if low < addresses[i] - out < high:
                    refuse("out", f"an array whose memory range meets {ROLES[i][0]}'s", "memory of its own")


def _meeting(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int] | None:
    """Between which differences of their addresses two arrays of these reaches meet; None if one is empty."""
    (low, high), (other_low, other_high) = one, other
    return (other_low - high, other_high - low) if low < high and other_low < other_high else None


def _refuse_alignment(name: str, alignment: int) -> NoReturn:
    came = f"an array at an address that {alignment} does not divide"
    refuse(name, came, f"one at a multiple of {alignment} bytes, as planned")
