"""The public functions for tensors: called directly, and as operators while PyTorch traces."""

from __future__ import annotations

import sys
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...arrays import refuse
from .operators import (
    append_and_attend,
    attend,
    attend_cached,
    attend_packed,
    named,
    refuse_gradients,
    transformations,
)

_FUNCTIONS = ("attention", "attention_varlen", "attention_with_kvcache")
_eager = sys.modules["cupyattn.attention"]  # the attribute of that name is the function

Results = Tensor | tuple[Tensor, Tensor]


def traced(q: Tensor) -> bool:
    """Whether PyTorch is looking at the call rather than making it. Tensors of its tracers are of other classes."""
    if torch.compiler.is_compiling() or type(q) is not Tensor:
        return True
    return transformations() is not None or forward_ad._current_level >= 0


@wraps(_eager.attention)
def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Results:
    if not traced(q):
        return _eager.attention(q, k, v, **options)
    _check("attention", {"q": q, "k": k, "v": v}, options)
    return _asked_for(attend(q, k, v, **named(options)), options)


@wraps(_eager.attention_varlen)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    **options: Any,
) -> Results:
    if not traced(q):
        return _eager.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    _check("attention_varlen", {"q": q, "k": k, "v": v}, options)
    return _asked_for(attend_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, **named(options)), options)


@wraps(_eager.attention_with_kvcache)
def attention_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Results:
    if not traced(q):
        return _eager.attention_with_kvcache(q, k_cache, v_cache, **options)
    _check("attention_with_kvcache", {"q": q, "k_cache": k_cache, "v_cache": v_cache}, options)
    operator = attend_cached if options.get("k") is None else append_and_attend
    return _asked_for(operator(q, k_cache, v_cache, **named(options)), options)


_PARAMETERS = {name: frozenset(signature(getattr(_eager, name)).parameters) for name in _FUNCTIONS}


def _check(function: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Refuse what the operators would in other words."""
    for name in options:
        if name not in _PARAMETERS[function]:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    window = options.get("window")
    if window is not None and not (isinstance(window, (tuple, list)) and len(window) == 2):
        refuse("window", repr(window), "(left, right) as two ints, -1 for no bound, or None", TypeError)
    if torch.is_grad_enabled():
        refuse_gradients(tensors | options)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            refuse(name, f"a tensor of layout {tensor.layout}", "a strided tensor", TypeError)
    if options.pop("out", None) is not None:
        refuse("out", "a tensor, while PyTorch traces", "None: a compiled graph places its results itself")


def _asked_for(results: tuple[Tensor, Tensor], options: dict[str, Any]) -> Results:
    return results if options.get("return_lse") else results[0]
