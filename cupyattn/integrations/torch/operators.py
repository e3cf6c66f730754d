"""`torch.ops.cupyattn`: the public functions as operators, with fake kernels for PyTorch's tracers.

Arguments are those of the functions, without `out`; some are named otherwise here. Each operator returns (out, lse),
where the lse is empty unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...arrays import refuse
from ...attention import attention, attention_varlen, attention_with_kvcache
from .functionalization import copy_misplaced_views, define_copies

_NUMBERS = {"cache_seqlens": "uniform_length", "k_scale": "k_scale_number", "v_scale": "v_scale_number"}
"""What such an argument is called if it is a number: an operator's argument has one type."""

_NAMES = {"kernel": "kernel_name"}  # torch.compile has a "kernel" of its own
_FORM = "lse_form"  # return_lse where that is a string
_OTHERWISE = {other: name for name, other in (_NUMBERS | _NAMES).items()} | {_FORM: "return_lse"}

_MASKS = (
    "bool causal=False, SymInt[]? window=None, float? softmax_scale=None, float? softcap=None, "
    'Tensor? alibi_slopes=None, Tensor? sinks=None, bool return_lse=False, str? lse_form=None, str kernel_name="auto", '
    "bool? check=None"
)
_PACKED = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, "
    'SymInt? max_seqlen_k=None, Tensor? block_table=None, Tensor? seqused_k=None, str layout="NHD"'
)
_STEP = (
    "Tensor? k=None, Tensor? v=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool rotary_interleaved=True, "
    "Tensor? cache_seqlens=None, SymInt? uniform_length=None, Tensor? cache_batch_idx=None, "
    'Tensor? cache_leftpad=None, Tensor? block_table=None, str layout="NHD", str? kv_dtype=None, Tensor? k_scale=None, '
    "float? k_scale_number=None, Tensor? v_scale=None, float? v_scale_number=None, SymInt num_splits=0"
)

Given = dict[str, Any]
Results = tuple[Tensor, Tensor]


def _library() -> torch.library.Library:
    """Where the operators are defined. What an earlier import of this module has defined is taken back."""
    earlier = vars(torch.library).get(_KEPT)
    if earlier is not None:
        earlier._destroy()
    made = torch.library.Library("cupyattn", "FRAGMENT")
    setattr(torch.library, _KEPT, made)
    return made


_KEPT = "_cupyattn_operators"
_LIBRARY = _library()
_COPY_OF = define_copies(_LIBRARY)


def _operator(name: str, arguments: str, function: Callable[..., Any], writes: tuple[str, ...] = ()) -> Any:
    """The operator cupyattn::name, which calls the function.

    It is defined without `torch.library.custom_op`, whose own work takes the host longer than the function. What that
    does beside is done here: gradients are refused, and tensors that are written to count as changed.
    """
    names = [argument.partition("=")[0].split()[-1] for argument in arguments.split(", ")]
    theirs = [_OTHERWISE.get(name, name) for name in names]

    def work(values: tuple[Any, ...], more: Given) -> Tensor | Results:
        given = {name: value for name, value in zip(theirs, values, strict=False) if value is not None}
        for other, value in more.items():
            if value is not None:
                given[_OTHERWISE.get(other, other)] = value
        results = function(**given)
        if writes:
            torch.autograd.graph.increment_version([given[name] for name in writes])
        return results

    def run(*values: Any, **more: Any) -> Results:
        results = work(values, more)
        return results if isinstance(results, tuple) else (results, results.new_empty(0, dtype=torch.float32))

    def in_front(*values: Any, **more: Any) -> Results:
        """Where PyTorch records gradients and its transformations take them."""
        records = torch.is_grad_enabled()
        # Whether the operator's kernel comes next: PyTorch itself takes long to go on to it.
        is_next = not _tracers() and transformations() is None
        for value in (*values, *more.values()):
            if isinstance(value, Tensor):
                if (records and value.requires_grad) or has_tangent(value):
                    refuse_gradients(dict(zip(names, values, strict=False)) | more)
                is_next &= type(value) in _PLAIN
        if is_next:
            results = work(values, more)
            return results if isinstance(results, tuple) else (results, _no_lse(results.device))
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*values, **more)

    def fake(*values: Any, **more: Any) -> Results:
        return _fake(dict(zip(names, values, strict=False)) | more)

    _LIBRARY.define(f"{name}({arguments}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, in_front, "Autograd")
    torch.library.register_fake(f"cupyattn::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.cupyattn, name).default
    if writes:
        copy_misplaced_views(operator, writes, _COPY_OF)
    return operator


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_tracers = torch._C._len_torch_dispatch_stack
transformations = torch._C._functorch.peek_interpreter_stack  # None outside vmap, grad and their like


@lru_cache(maxsize=64)
def _no_lse(device: torch.device) -> Tensor:
    """What comes where no lse is asked for, and no tracer is at work. It has no memory, so calls may have the same."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.float32, device=device)


def _fake(given: Given) -> Results:
    q, v = given["q"], given["v_cache" if "v_cache" in given else "v"]
    precise = given.get("kernel_name") == "numpy_float64"
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float64 if precise else q.dtype)
    if not (given.get("return_lse") or given.get(_FORM)):
        return out, q.new_empty(0, dtype=torch.float32)
    shape = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(shape, dtype=torch.float64 if precise else torch.float32)


def named(options: Given) -> Given:
    """A function's options by the operators' names."""
    numbers = {name: other for name, other in _NUMBERS.items() if not isinstance(options.get(name), Tensor)}
    forms = {"return_lse": _FORM} if isinstance(options.get("return_lse"), str) else {}
    return {(numbers | _NAMES | forms).get(name, name): value for name, value in options.items()}


def has_tangent(tensor: Tensor) -> bool:
    """Whether a forward-mode derivative is taken of it, as by torch.func.jvp."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def refuse_gradients(given: Given) -> None:
    """Refuse tensors that require gradients, by name."""
    for name, tensor in given.items():
        if isinstance(tensor, Tensor) and not torch.compiler.is_compiling() and has_tangent(tensor):
            refuse(name, "a tensor with a tangent", "one without, as no derivatives are computed here", TypeError)
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            came = "a tensor that requires grad, while gradients are recorded"
            without = "a tensor without gradients, as there is no backward pass"
            refuse(name, came, f"{without}: pass .detach(), or call under torch.no_grad()", TypeError)


attend = _operator("attention", f"Tensor q, Tensor k, Tensor v, {_MASKS}", attention)
attend_packed = _operator("attention_varlen", f"{_PACKED}, {_MASKS}", attention_varlen)
attend_cached = _operator(
    "attention_with_kvcache", f"Tensor q, Tensor k_cache, Tensor v_cache, {_STEP}, {_MASKS}", attention_with_kvcache
)
# An operator must say beforehand whether it writes: this one is for calls with k and v.
append_and_attend = _operator(
    "append_and_attend",
    f"Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, {_STEP}, {_MASKS}",
    attention_with_kvcache,
    ("k_cache", "v_cache"),
)
