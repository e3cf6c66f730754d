"""The functions of the flash_attn package, version 2.8, on arrays of every library.

What is imported from `flash_attn` is imported from here instead: `from cupyattn.compat.flash_attn import
flash_attn_func`. Names, positional order and defaults are flash_attn's. CuPy, PyTorch, JAX and NumPy arrays all do,
and go as they are to `cupyattn.attention`, `attention_varlen` or `attention_with_kvcache`. There is no backward pass
here. The submodules are `flash_attn_interface`, `bert_padding`, `layers.rotary` and `utils.generation`. Code that
cannot be edited has its own `import flash_attn` lead here by `cupyattn.compat.install_as`.

>>> import numpy as np
>>> from cupyattn.compat.flash_attn import flash_attn_func
>>> q = k = v = np.ones((1, 16, 4, 64), np.float16)  # (batch, seqlen, nheads, headdim)
>>> flash_attn_func(q, k, v, causal=True).shape
(1, 16, 4, 64)
"""

from __future__ import annotations

from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__version__ = "2.8.3"  # of flash_attn: callers compare it to learn which arguments there are
