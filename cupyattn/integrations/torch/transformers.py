"""An attention function for Hugging Face's transformers, which is not imported before it is asked for.

Padding reaches the kernels as lengths: where a model would make a mask, `padding_bounds` says once for all layers where
each sequence begins and ends, without waiting for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ...arrays import refuse
from ...attention import checking
from .functions import attention, attention_varlen, attention_with_kvcache


def register_with_transformers(name: str = "cupyattn") -> str:
    """Make these kernels an `attn_implementation` of transformers, and return its name.

    Models may pad prompts on either side, with ones in one run of each row of attention_mask; they may keep keys in a
    DynamicCache or, padded on the left, a StaticCache, and have a sliding window, softcap and sinks. Masks of a model's
    own, dropout and gradients are refused. Raises ImportError without transformers 4.53 or newer.

    >>> from cupyattn.integrations.torch import register_with_transformers
    >>> model.set_attn_implementation(register_with_transformers())  # doctest: +SKIP
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("register_with_transformers needs transformers 4.53 or newer") from error
    AttentionInterface.register(name, transformers_attention)
    AttentionMaskInterface.register(name, padding_bounds)
    return name


def padding_bounds(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    *,
    device: torch.device | str | None = None,
    use_vmap: bool = False,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Tensor | None:
    """What `transformers_attention` gets for a mask: where each sequence's tokens begin and end among the keys.

    Arguments are those of transformers' mask functions; attention_mask is (batch, tokens so far), ones in one run.
    Other rows are refused on the CPU, and on a GPU if CUPYATTN_CHECK=1 asks for it, which waits for the device; else
    they give wrong results.

    Returns int32 (batch, 1, 1, 2), as transformers leaves what is 4-D as it is; None where all keys are tokens.
    """
    both_ways = "allow_is_bidirectional_skip" in others
    packed = attention_mask is None and q_length > 1 and not allow_is_causal_skip and not both_ways
    if use_vmap or packed:
        # What transformers compiles without a mask and a cache, it takes for packed.
        came = "positions that may be of packed sequences" if packed else "a mask of the model's own"
        refuse("attention_mask", came, "(batch, tokens), ones in one run: the kernels read no other mask")
    if attention_mask is None:
        end = q_offset + q_length - kv_offset
        if both_ways or (isinstance(end, int) and end == kv_length):
            return None
        begins = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return torch.stack([begins, begins + end], dim=1).int()[:, None, None]
    seen = (attention_mask[:, -kv_length:] != 0).int()
    begins = seen.argmax(dim=1)
    ends = torch.where(seen.any(dim=1), seen.shape[1] - seen.flip(1).argmax(dim=1), 0)
    if _has_values(attention_mask) and checking(None, seen.get_device()):
        _refuse_holes(seen, ends - begins)
    return torch.stack([begins, ends], dim=1).int()[:, None, None]


def _has_values(mask: Tensor) -> bool:
    """Whether it is a tensor to be read now, not one that some tracer or transformation passes through."""
    traced = type(mask) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and mask.device.type in ("cpu", "cuda") and not is_functorch_wrapped_tensor(mask)


def _refuse_holes(seen: Tensor, lengths: Tensor) -> None:
    """Refuse rows whose ones are not in one run; waits for the device."""
    wrong = (seen.sum(dim=1) != torch.where(seen.any(dim=1), lengths, 0)).nonzero()
    if len(wrong):
        came = f"zeros among the ones of row {int(wrong[0])}"
        refuse("attention_mask", came, "ones in one run in each row: the kernels read no other mask")


def transformers_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention for the layers of transformers' models, by the signature that they call.

    Args:
        query: (batch, heads, seqlen_q, head_dim), whose last token is the last of the keys', or of `padding_bounds`.
        key, value: (batch, kv_heads, seqlen_k, head_dim).
        attention_mask: of `padding_bounds`, or None.
        dropout: 0.
        scaling: 1/sqrt(head_dim) if None.
        sliding_window: how many tokens a query sees, itself counted in.
        is_causal: module.is_causal if None.
        s_aux: (heads,) sinks.

    Returns:
        (batch, seqlen_q, heads, head_dim) of query's dtype, and None for the weights that are not kept. Rows of padding
        mean nothing.

    Raises:
        TypeError, ValueError: an argument does not fit. The message names it, what came and what was expected.
    """
    if attention_mask is not None and (attention_mask.dtype, *attention_mask.shape[1:]) != (torch.int32, 1, 1, 2):
        came = f"a {attention_mask.dtype} tensor of shape {tuple(attention_mask.shape)}"
        refuse("attention_mask", came, "None or (batch, tokens) given to the model: the kernels read no other mask")
    if dropout:
        refuse("dropout", dropout, "0.0: the kernels drop nothing (model.eval() or attention_dropout=0)")
    if others.get("position_bias") is not None:
        refuse("position_bias", "a tensor", "None: the kernels add none to the scores")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    near = None if sliding_window is None else sliding_window - 1
    options = {
        "causal": causal,
        "window": None if near is None else (near, 0 if causal else near),
        "softmax_scale": scaling,
        "softcap": softcap,
        "sinks": None if s_aux is None else s_aux.float(),
    }
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attention_mask is None:
        return attention(q, k, v, **options), None
    begins, ends = attention_mask[:, 0, 0].unbind(1)
    if causal and q.shape[1] == k.shape[1]:
        return _padded(q, k, v, begins, ends, options), None
    lengths = {"cache_seqlens": ends.contiguous(), "cache_leftpad": begins.contiguous()}
    return attention_with_kvcache(q, k, v, **lengths, **options), None


def _padded(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, options: dict[str, Any]) -> Tensor:
    """Prompts with padding on any side, as packed sequences; the padding around each is two more, which see no key."""
    batch, seqlen = q.shape[:2]
    rows = seqlen * torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    start = rows[:-1]
    cu_seqlens = torch.cat([torch.stack([start, start + begins, start + ends], dim=1).flatten(), rows[-1:]])
    none = torch.zeros_like(begins)
    used = torch.stack([none, ends - begins, none], dim=1).flatten()
    packed = (x.reshape(batch * seqlen, *x.shape[2:]) for x in (q, k, v))
    out = attention_varlen(*packed, cu_seqlens, cu_seqlens, seqused_k=used, **options)
    return out.reshape(batch, seqlen, *out.shape[1:])
