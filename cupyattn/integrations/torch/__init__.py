"""cupyattn inside PyTorch: operators that `torch.compile` keeps whole, and the places where models ask for attention.

    from cupyattn.integrations.torch import attention, route_scaled_dot_product_attention

    step = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), fullgraph=True)

    with route_scaled_dot_product_attention(), torch.no_grad():
        model(tokens)  # every F.scaled_dot_product_attention that fits runs here

Work runs on PyTorch's current stream, and results are allocated by its caching allocator. Called eagerly the functions
are those of `cupyattn` itself; while PyTorch traces they become the operators `torch.ops.cupyattn`, which have fake
kernels. Tensors that require gradients are refused where gradients are recorded, as there is no backward pass.

`register_with_transformers` makes these kernels known to Hugging Face's transformers, and
`python -m cupyattn.integrations.torch_example` serves a randomly initialised model of Llama's shape with them.
"""

from __future__ import annotations

from .functions import attention, attention_varlen, attention_with_kvcache
from .sdpa import route_scaled_dot_product_attention, scaled_dot_product_attention
from .transformers import register_with_transformers, transformers_attention

__all__ = [
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "register_with_transformers",
    "route_scaled_dot_product_attention",
    "scaled_dot_product_attention",
    "transformers_attention",
]
