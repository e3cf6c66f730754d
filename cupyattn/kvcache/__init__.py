"""Caches of keys and values as objects: paged with shared blocks, and dense."""

from __future__ import annotations

from .allocator import AllocatorStats, BlockAllocator
from .block_table import BlockTable
from .dense import (
    KVCache,
    flash_attention_with_kv_cache,
    incremental_attention,
    initialize_kv_cache,
    reorder_kv_cache,
    update_kv_cache,
)
from .errors import CacheFull, DoubleFree, OutOfBlocks, SwappedOut, UnknownSequence, UseAfterFree
from .inference import InferenceParams, allocate_inference_cache, create_cu_seqlens, generate_block_kvcache
from .paged import PagedKVCache
from .report import CacheReport, Leak, SequenceReport, find_leaks
from .snapshot_file import BadSnapshot

__all__ = [
    "AllocatorStats",
    "BadSnapshot",
    "BlockAllocator",
    "BlockTable",
    "CacheFull",
    "CacheReport",
    "DoubleFree",
    "InferenceParams",
    "KVCache",
    "Leak",
    "OutOfBlocks",
    "PagedKVCache",
    "SequenceReport",
    "SwappedOut",
    "UnknownSequence",
    "UseAfterFree",
    "allocate_inference_cache",
    "create_cu_seqlens",
    "find_leaks",
    "flash_attention_with_kv_cache",
    "generate_block_kvcache",
    "incremental_attention",
    "initialize_kv_cache",
    "reorder_kv_cache",
    "update_kv_cache",
]
