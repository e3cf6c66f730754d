"""A call that is planned once and then run on arrays of the same forms: what `DecodePlan` and `PrefillPlan` share.

What the functions find out in every call is found out when the plan is made: the kernels, their workspace and their
launch parameters. A run compares the arrays' forms with the planned ones and launches. The division of such work into
plan and run is that of the wrappers in the flashinfer package (Ye et al. 2025, arXiv:2501.01005); here the plan depends
on shapes alone, never on lengths, so that it is made once and not for every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any, NoReturn

from .arrays import View, contiguous_strides, device_name, numpy_dtype, one_token, reach, refuse, view
from .attention import (
    Array,
    Call,
    check_caches,
    check_results,
    checking,
    index_contents,
    lengths,
    prepare_call,
    refuse_shared,
    run_call,
)
from .explain import counted, in_words
from .kernels.operands import Operands
from .plan import Plan
from .problem import ITEMSIZE, Problem, check_indices, check_uniform, check_writable, longest_uniform
from .streams import device_of

Roles = tuple[tuple[str, str], ...]
"""What a run takes, in the order in which a plan looks at it: (name in the signature, name in `Operands`)."""


class PlannedCall:
    """One form of call, prepared as far as can be. Subclasses call `_prepare` when made and `_run` to run."""

    __slots__ = ("_call", "_names", "_roles", "_checks", "_forms", "_out", "_numbers", "_longest")
    __slots__ += ("_addresses", "_planned", "_without_token")

    def _prepare(
        self,
        operands: Operands,
        options: tuple,
        names: tuple[str, str, str],
        roles: Roles,
        check: bool | None,
        without_token: bool = False,
    ) -> None:
        """Plan for arrays like these examples; options and names are as in `attention.find_call`.

        without_token: runs get q and out, and give out and lse, without the axis of tokens that these examples have.
        """
        self._call = call = prepare_call(operands, options, names)
        self._without_token = without_token
        self._names = names
        self._roles = roles
        check_results(operands, call.out_dtype, names)
        check_caches(call.problem, operands)
        self._checks = checking(check, operands.q.device)
        if operands.out is None:
            operands.out = _new_array(operands.q, call.out_shape, call.out_dtype)
        seen = operands
        if without_token:
            seen = replace(operands, q=_without_token(operands.q), out=_without_token(operands.out))
        self._forms = tuple([_form(role, seen, call) for _, role in roles])
        self._out = _form("out", seen, call)
        _, *self._numbers, _, _ = options[-1]  # scales that are numbers
        self._longest = None if operands.uniform_length is None else longest_uniform(call.problem)
        self._addresses = _Addresses(call, roles, self._forms, self._out)
        self._planned = self._bind(operands, seen)

    def _bind(self, operands: Operands, seen: Operands) -> Any:
        """The launches with memory of their own; the plan's call then goes through these. None where there are none.

        seen: the operands as runs get them.
        """
        if operands.q.device < 0:
            return None
        from .kernels.launch import on_stream_of  # these need CuPy
        from .kernels.launches import workspace_bytes
        from .kernels.planned import Planned
        from .kernels.workspace import Workspace

        call = self._call
        size = workspace_bytes(call.run)
        if size is None:
            return None
        roles = tuple([role for _, role in self._roles])
        lse_shape = call.lse_shape[: 2 if self._without_token else None] if call.problem.lse else None
        with device_of(operands.q):
            with on_stream_of(operands.q):
                memory = Workspace(operands.q.device, size) if size else None
            planned = Planned(call.run, memory, operands, roles, seen, lse_shape, self._addresses)
        self._call = replace(call, run=planned)
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
        """Device memory that the plan holds: 0 where its kernels need none beyond what a run allocates."""
        return 0 if self._planned is None or self._planned.memory is None else self._planned.memory.size

    @property
    def device(self) -> str:
        """Where the plan runs: "cpu" or "cuda:0"."""
        return device_name(self._forms[0].device)

    @property
    def kernel(self) -> str:
        """The attention kernel's name; "numpy" on the CPU, "none" where there is no query."""
        return "numpy" if self._forms[0].device < 0 else "none" if self.plan is None else self.plan.kernel

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kernel} on {self.device}: {in_words(self.problem)}>"

    def __str__(self) -> str:
        lines = [f"{type(self).__name__}: {self.kernel} on {self.device}", f"  {in_words(self.problem)}"]
        plan = self.plan
        if plan is not None:
            lines += [f"  because {reason}" for reason in plan.reasons]
            blocks = f"{counted(plan.grid, 'block')} of {counted(plan.threads, 'thread')}"
            lines.append(f"  tile {counted(plan.tile_rows, 'row')} x {counted(plan.tile_keys, 'key')}; {blocks}")
        lines.append(f"  workspace {counted(self.workspace_bytes, 'byte')}")
        return "\n".join(lines)

    def _run(self, arrays: tuple[Any, ...], length: int, out: Array | None) -> Array | tuple[Array, Array]:
        """Run on arrays in the order of the roles; length is that of all sequences, if an int was planned."""
        if self._planned is not None and not self._checks:
            results = self._planned.quick(arrays, length, out)
            if results is not None:
                return results
        return self._run_views(arrays, length, out)

    def _run_views(self, arrays: tuple[Any, ...], length: int, out: Array | None) -> Array | tuple[Array, Array]:
        """The same for arrays of any library, which is also where everything is refused."""
        given = zip(self._roles, arrays, self._forms, strict=True)
        views = {role: planned_view(name, array, form) for (name, role), array, form in given}
        operands, call = Operands(**views, out=None), self._call
        if out is not None:
            operands.out = planned_view("out", out, self._out)
            check_writable("out", operands.out)
        elif self._out.strides != _used_strides(_new_array(operands.q, self._out.shape, self._out.dtype)):
            refuse_unplanned("out", None, f"one with strides {self._out.strides}")
        if self._longest is not None:
            operands.uniform_length = length
        if call.problem.append is not None:
            check_writable("k_cache", operands.k)
            check_writable("v_cache", operands.v)
        check_results(operands, call.out_dtype, self._names)
        addresses = tuple([0 if found is None else found.pointer for found in views.values()])
        self._addresses(addresses, 0 if out is None else operands.out.pointer)
        if self._checks:
            check_indices(call.problem, index_contents(operands, call.problem.batch, self._names[2]))
        return self._run_without_token(operands, out) if self._without_token else run_call(call, operands, out)

    def _run_without_token(self, operands: Operands, out: Array | None) -> Array | tuple[Array, Array]:
        """Run with the axis of tokens, and take it from what comes back."""
        operands.q, operands.out = one_token(operands.q), None if out is None else one_token(operands.out)
        results = run_call(self._call, operands, out)
        if not self.problem.lse:
            return results if out is not None else results[:, 0]
        result, lse = results
        return result if out is not None else result[:, 0], lse[..., 0]

    def _length(self, length: Array | int | None) -> int:
        """The int that was planned for, checked."""
        if type(length) is int and 0 <= length <= self._longest:
            return length
        found, number = lengths("cache_seqlens", length)
        if number is None:
            refuse_unplanned("cache_seqlens", None if found is None else "an array", "an int", TypeError)
        check_uniform(self.problem, number)
        return number

    def _k_scale(self, scale: Array | float) -> Array | float | None:
        """A k_scale that was given to a run; None if it is the number that was planned."""
        return _unless_planned("k_scale", scale, self._numbers[0])

    def _v_scale(self, scale: Array | float) -> Array | float | None:
        """The same for v_scale."""
        return _unless_planned("v_scale", scale, self._numbers[1])


def refuse_unplanned(name: str, got: object, planned: object, kind: type[Exception] = ValueError) -> NoReturn:
    """Refuse what is not as planned."""
    refuse(name, got, f"{planned}, as planned: make another plan for anything else", kind)


def _unless_planned(name: str, scale: Array | float, number: float | None) -> Array | float | None:
    if number is None:
        return scale
    if not isinstance(scale, Number):
        refuse_unplanned(name, "an array", f"None or {number}", TypeError)
    if scale != number:
        refuse_unplanned(name, scale, f"None or {number}")
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


def _without_token(found: View) -> View:
    """The form of an array (batch, 1, heads, head_dim) without its second axis."""
    (batch, _, *row), (step, _, *steps) = found.shape, found.strides
    return replace(found, shape=(batch, *row), strides=(step, *steps))


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


def planned_view(name: str, array: Array | None, form: _Form | None) -> View | None:
    """The view of one argument, None if there is to be none; TypeError or ValueError if it is not as planned."""
    if array is None and form is None:
        return None
    if form is None:
        refuse_unplanned(name, repr(array) if isinstance(array, Number) else "an array", None)
    if array is None or isinstance(array, Number):
        refuse_unplanned(name, array, form, TypeError)
    found = view(array, name)
    if found.dtype != form.dtype:
        refuse_unplanned(name, found.dtype, form.dtype, TypeError)
    if found.shape != form.shape:
        refuse_unplanned(name, f"shape {found.shape}", form.shape)
    if found.device != form.device:
        refuse_unplanned(name, f"an array on {device_name(found.device)}", f"one on {device_name(form.device)}")
    if _used_strides(found) != form.strides:
        refuse_unplanned(name, f"strides {found.strides}", form.strides)
    return found


def _used_strides(found: View) -> tuple[int, ...]:
    if 0 in found.shape:
        return (0,) * len(found.shape)
    return tuple([step if size > 1 else 0 for size, step in zip(found.shape, found.strides, strict=True)])


def _new_array(q: View, shape: tuple[int, ...], dtype: str) -> View:
    """The form of the output that a call makes where none is given."""
    return View(None, 0, shape, contiguous_strides(shape), dtype, q.device, q.library, False)


class _Addresses:
    """Refuses addresses that are not aligned as planned, and arrays that share memory and must not."""

    __slots__ = ("_names", "_masks", "_extents", "_of_extents", "_apart", "_out_mask", "_out_apart", "_between_caches")

    def __init__(self, call: Call, roles: Roles, forms: tuple[_Form | None, ...], out: _Form) -> None:
        self._names = [name for name, _ in roles]
        self._masks = [(i, form.alignment - 1) for i, form in enumerate(forms) if form is not None]
        self._masks = [(i, mask) for i, mask in self._masks if mask]
        self._out_mask = out.alignment - 1
        at = {role: i for i, (_, role) in enumerate(roles)}
        q, k_cache, v_cache, k, v = (at[role] for role in ("q", "k", "v", "k_new", "v_new"))
        read = [i for i in (q, k_cache, v_cache, k, v) if forms[i] is not None]
        self._out_apart = [(i, *bounds) for i in read if (bounds := _meeting(forms[i].reach, out.reach))]
        self._extents = call.extents
        self._of_extents = k_cache, v_cache, k, v, q
        self._apart = []
        if call.extents is not None:
            pairs = [(i, j) for i in (q, k, v) for j in (k_cache, v_cache)]
            bounds = [(*pair, _meeting(*(forms[i].reach for i in pair))) for pair in pairs]
            self._apart = [(i, j, *found) for i, j, found in bounds if found]
        self._between_caches: int | None = None

    def __call__(self, addresses: Sequence[int], out: int) -> None:
        """addresses in the order of the roles; out 0 if there is none yet."""
        for i, mask in self._masks:
            if addresses[i] & mask:
                _refuse_alignment(self._names[i], mask + 1)
        if self._extents is not None:
            k_cache, v_cache, *_ = self._of_extents
            meets = addresses[v_cache] - addresses[k_cache] != self._between_caches
            for i, j, low, high in self._apart:
                if low < addresses[i] - addresses[j] < high:
                    meets = True
            if meets:
                refuse_shared(self._extents, *(addresses[i] for i in self._of_extents))
                self._between_caches = addresses[v_cache] - addresses[k_cache]
        if out:
            if out & self._out_mask:
                _refuse_alignment("out", self._out_mask + 1)
            for i, low, high in self._out_apart:
                if low < addresses[i] - out < high:
                    refuse("out", f"an array whose memory range meets {self._names[i]}'s", "memory of its own")


def _meeting(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int] | None:
    """Between which differences of their addresses two arrays of these reaches meet; None if one is empty."""
    (low, high), (other_low, other_high) = one, other
    return (other_low - high, other_high - low) if low < high and other_low < other_high else None


def _refuse_alignment(name: str, alignment: int) -> NoReturn:
    came = f"an array at an address that {alignment} does not divide"
    refuse_unplanned(name, came, f"one at a multiple of {alignment} bytes")
