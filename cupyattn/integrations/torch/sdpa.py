"""`torch.nn.functional.scaled_dot_product_attention` by its own signature, and calls of it led here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ...arrays import refuse, turn, view
from ...attention import attention as attend_eagerly
from ...problem import MAX_HEAD_DIM
from ..alignment import from_top_left
from .functions import attention, traced
from .operators import has_tangent

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_torchs = functional.scaled_dot_product_attention

Complaint = tuple[str, object, object]
"""Of which argument, what came, what was expected."""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In place of `torch.nn.functional.scaled_dot_product_attention`, whose signature it has, without mask and dropout.

    Args:
        query: (batch, heads, seqlen_q, head_dim), or without batch; float16, bfloat16 or float32, head_dim up to 256.
            Any strides do, but head_dim must be contiguous. Autocast changes no dtype here.
        key, value: (batch, heads, seqlen_k, head_dim), value with a head_dim of its own if need be; with enable_gqa of
            fewer heads, whose number divides that of query's.
        attn_mask: None, as the kernels read no mask.
        dropout_p: 0.
        is_causal: query i sees keys j <= i: as PyTorch's, the mask starts in the top left corner.
        scale: 1/sqrt(head_dim) if None.
        enable_gqa: allow fewer heads of key and value.

    Returns:
        (batch, heads, seqlen_q, head_dim of value) of query's dtype, in memory with heads behind tokens.

    Raises:
        ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    out = _attend_at_once(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if out is None:
        complaint = _complaint(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if complaint is not None:
            refuse(*complaint)
        out = _attend(query, key, value, is_causal, scale)
    return out


def _attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """The common calls: the kernels' own checks are quicker than `_complaint`, and transposed views than tensors.

    None, and nothing is done, for others and for what is to be refused.
    """
    if attn_mask is not None or dropout_p or not isinstance(enable_gqa, bool) or traced(query):
        return None
    try:
        q, k, v = view(query, "query"), view(key, "key"), view(value, "value")
        if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
            return None
        if (is_causal and q.shape[2] != k.shape[2]) or (q.shape[1] != k.shape[1] and not enable_gqa):
            return None
        out = attend_eagerly(turn(q), turn(k), turn(v), causal=is_causal, softmax_scale=scale)
    except (TypeError, ValueError):
        return None
    return out.transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    batched = query.ndim == 4
    if not batched:
        query, key, value = query[None], key[None], value[None]
    causal, window = is_causal, None
    if is_causal and query.shape[2] != key.shape[2]:
        keys, window = from_top_left(query.shape[2], key.shape[2], -1, 0)
        causal, key, value = False, key[:, :, :keys], value[:, :, :keys]
    arrays = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = attention(*arrays, causal=causal, window=window, softmax_scale=scale).transpose(1, 2)
    return out if batched else out[0]


def _complaint(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Complaint | None:
    """What is wrong with the arguments, by the first of them that does not fit; None if the kernels take them."""
    if attn_mask is not None:
        return "attn_mask", "a tensor", "None: the kernels read no mask, and is_causal hides what follows a query"
    if dropout_p != 0.0:
        return "dropout_p", dropout_p, "0.0: the kernels drop nothing"
    if scale is not None and not isinstance(scale, (int, float)):
        return "scale", f"a {type(scale).__name__}", "a number or None"
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            return name, repr(flag), "True or False"
    recorded = torch.is_grad_enabled()
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            return name, None if tensor is None else f"a {type(tensor).__name__}", "a tensor"
        if not torch.compiler.is_compiling() and has_tangent(tensor):
            return name, "a tensor with a tangent", "one without, as no derivatives are computed here"
        if recorded and tensor.requires_grad:
            came = "a tensor that requires grad, while gradients are recorded"
            return (
                name,
                came,
                "one without gradients, as there is no backward pass: .detach() it, or use torch.no_grad()",
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            return name, f"a {'nested ' * tensor.is_nested}tensor of layout {tensor.layout}", "a strided tensor"
        if tensor.ndim != query.ndim or tensor.ndim not in (3, 4):
            shape = tuple(tensor.shape)
            return (
                name,
                f"shape {shape}",
                "(batch, heads, seqlen, head_dim) or (heads, seqlen, head_dim), as the others",
            )
        if tensor.dtype not in DTYPES:
            return name, tensor.dtype, "float16, bfloat16 or float32, the same for all"
        if tensor.dtype != query.dtype:
            return name, tensor.dtype, f"query's dtype {query.dtype}"
        if tensor.device != query.device:
            return name, f"a tensor on {tensor.device}", f"one on query's device {query.device}"
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            return name, f"head_dim {tensor.shape[-1]}", f"1 to {MAX_HEAD_DIM}"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return (
                name,
                f"stride {tensor.stride(-1)} of head_dim",
                "1: head_dim must be contiguous",
            )
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if key.shape[-1] != query.shape[-1] or key.shape[:-3] != query.shape[:-3]:
        return "key", f"shape {tuple(key.shape)}", f"query's batch and head_dim, as in {tuple(query.shape)}"
    if value.shape[:-1] != key.shape[:-1]:
        return "value", f"shape {tuple(value.shape)}", f"key's {tuple(key.shape)}, but for head_dim"
    if heads < 1 or kv_heads < 1 or (heads != kv_heads if not enable_gqa else heads % kv_heads):
        expected = "a divisor of that" if enable_gqa else "as many, or enable_gqa=True for a divisor of that"
        return "key", f"{kv_heads} heads where query has {heads}", expected
    return None


def _autocast_complaint(query: Tensor) -> Complaint | None:
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.get_autocast_dtype(kind):
        wanted = torch.get_autocast_dtype(kind)
        return "query", f"{query.dtype} under an autocast to {wanted}", f"{wanted}: the kernels' calls change no dtype"
    return None


class route_scaled_dot_product_attention(TorchFunctionMode):
    """A context in which this thread's calls of `F.scaled_dot_product_attention` (torch.nn.functional) come here.

    All calls are seen, in whatever module and under whatever name they are made, compiled ones too if they are compiled
    in the context. **Those that `scaled_dot_product_attention` here would refuse run in PyTorch as ever**: with a mask,
    dropout, recorded gradients, another dtype or a larger head_dim; and so do those on another device, under an
    autocast that changes their dtype, and of nested tensors. What PyTorch does without that function, as the fused
    kernels of nn.MultiheadAttention in eval mode, is not seen.

    Args:
        devices: types of the devices whose calls come here, "cuda" and "cpu"; a GPU's alone by default, as the NumPy
            backend is slower than PyTorch on the CPU.
        strict: raise ValueError for a call on these devices that does not fit, instead of leaving it to PyTorch.

    >>> import torch
    >>> from cupyattn.integrations.torch import route_scaled_dot_product_attention
    >>> q = k = v = torch.ones(1, 4, 16, 64)
    >>> with route_scaled_dot_product_attention(devices=("cpu",)):
    ...     torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([1, 4, 16, 64])
    """

    def __init__(self, devices: Iterable[str] = ("cuda",), strict: bool = False) -> None:
        super().__init__()
        self._multi_head = _multi_head_attention_over(self._call)
        self.devices = _types_of(devices)
        self.strict = strict

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._call(*args, **kwargs)
        if func is functional.multi_head_attention_forward:  # no mode sees what such a function of PyTorch's calls
            return self._multi_head(*args, **kwargs)
        return func(*args, **kwargs)

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kind = query.device.type
        if kind in self.devices:
            complaint = _autocast_complaint(query)
            if complaint is None:
                out = _attend_at_once(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
                if out is not None:
                    return out
                complaint = _complaint(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            if complaint is None:
                return _attend(query, key, value, is_causal, scale)
            if self.strict:
                refuse(*complaint)
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _torchs(query, key, value, attn_mask, dropout_p, **options)


def _types_of(devices: Iterable[str]) -> tuple[str, ...]:
    types = (devices,) if isinstance(devices, str) else tuple(devices) if isinstance(devices, Iterable) else ()
    if not types or not all(kind in ("cuda", "cpu") for kind in types):
        refuse("devices", repr(devices), "types of devices, as ('cuda',) or ('cuda', 'cpu')")
    return types


def _multi_head_attention_over(ask: Callable[..., Tensor]) -> Callable[..., Any]:
    """PyTorch's multi_head_attention_forward with `ask` in the place of scaled_dot_product_attention."""
    function = functional.multi_head_attention_forward
    names = vars(functional) | {"scaled_dot_product_attention": ask}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
