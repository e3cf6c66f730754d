"""Attention kernels for every array library that speaks DLPack.

>>> import numpy as np
>>> import cupyattn
>>> q = k = v = np.ones((1, 16, 4, 64), np.float32)  # (batch, seqlen, heads, head_dim); CuPy, torch and JAX alike
>>> cupyattn.attention(q, k, v, causal=True).shape
(1, 16, 4, 64)
"""

from __future__ import annotations

from .attention import append_kv, attention, attention_varlen, attention_with_kvcache
from .decode_plan import DecodePlan
from .explain import Explanation, explain
from .kvcache import (
    BadSnapshot,
    BlockAllocator,
    BlockTable,
    CacheFull,
    DoubleFree,
    InferenceParams,
    KVCache,
    OutOfBlocks,
    PagedKVCache,
    SwappedOut,
    UnknownSequence,
    UseAfterFree,
    allocate_inference_cache,
    create_cu_seqlens,
    find_leaks,
    flash_attention_with_kv_cache,
    generate_block_kvcache,
    incremental_attention,
    initialize_kv_cache,
    reorder_kv_cache,
    update_kv_cache,
)
from .memory import memory_trace
from .prefill_plan import PrefillPlan
from .ragged import RaggedArray
from .rotary import apply_rotary
from .shared_prefix import attention_with_shared_prefix
from .states import merge_states

__all__ = [
    "BadSnapshot",
    "BlockAllocator",
    "BlockTable",
    "CacheFull",
    "DecodePlan",
    "DoubleFree",
    "Explanation",
    "InferenceParams",
    "KVCache",
    "OutOfBlocks",
    "PagedKVCache",
    "PrefillPlan",
    "RaggedArray",
    "SwappedOut",
    "UnknownSequence",
    "UseAfterFree",
    "allocate_inference_cache",
    "append_kv",
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "attention_with_shared_prefix",
    "create_cu_seqlens",
    "explain",
    "find_leaks",
    "flash_attention_with_kv_cache",
    "generate_block_kvcache",
    "incremental_attention",
    "initialize_kv_cache",
    "memory_trace",
    "merge_states",
    "reorder_kv_cache",
    "update_kv_cache",
]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version  # as slow to import as half of this package

    try:
        return version("cupyattn")
    except PackageNotFoundError:  # a source checkout that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), "__version__"])
