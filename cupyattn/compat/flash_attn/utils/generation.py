"""The state of a generation and its caches, under the names of flash_attn.utils.generation."""

from __future__ import annotations

from ....kvcache.inference import InferenceParams, allocate_inference_cache

__all__ = ["InferenceParams", "allocate_inference_cache"]
