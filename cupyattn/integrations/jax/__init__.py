"""cupyattn inside JAX's transformations: under `jax.jit`, `jax.vmap` and `jax.shard_map`, on XLA's own stream.

    from cupyattn.integrations.jax import attention

    out = jax.jit(functools.partial(attention, causal=True))(q, k, v)

The functions take JAX arrays, traced or not, and NumPy's, and give JAX arrays. On a GPU XLA allocates the results and
calls back to launch the kernels on its own stream, without a copy or a synchronisation; on the CPU it calls the NumPy
backend. Options are static. Shapes must be known while JAX traces, and arguments are validated then.

- **Under `jax.vmap`** the mapped axis joins the batch, so that there is still one launch: keys and values that are not
  mapped are repeated for it, but for a cache that is only read. An axis over sinks, rotary embedding or scales is gone
  through one by one.
- **Under `jax.shard_map`** each device attends to its own part: heads and batch can be divided. `jax.jit` alone, on
  arrays that are divided among devices, gathers them first.
- **Gradients** are refused, as there is no backward pass; `jax.lax.stop_gradient` lets values through.
- **Command buffers**: XLA may capture the launches into a CUDA graph and replay it. Pass command_buffer=False to leave
  them out of it. Each address that captured results are written to keeps a workspace of its own (some megabytes) where
  kernels need one, as XLA may let the parts of a graph run beside one another.
- Contents of index arrays are checked on the CPU alone; on a GPU bad ones give NaN, as without `check` elsewhere.

Needs JAX 0.10 or newer, for its `jax.experimental.buffer_callback`.
"""

from __future__ import annotations

from .dot_product import dot_product_attention
from .functions import attention, attention_varlen, attention_with_kvcache

__all__ = ["attention", "attention_varlen", "attention_with_kvcache", "dot_product_attention"]
