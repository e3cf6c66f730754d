"""FlashInfer's usage as people have written it down, run as it is: even the import, by `install_as`."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from compat.test_flashinfer_common import Lib, check_base2

from cupyattn import compat

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

COMPLETE = """
import torch
import flashinfer

# Configuration
batch_size = 2
seq_lens = [10, 15]
page_size = 16
num_kv_heads = 8
num_qo_heads = 32
head_dim = 128

# Allocate pages
total_pages = sum((seq_len + page_size - 1) // page_size for seq_len in seq_lens)
kv_cache = torch.randn(
    total_pages, 2, num_kv_heads, page_size, head_dim,
    dtype=torch.float16, device="cuda"
)

# Create queries
total_tokens = sum(seq_lens)
q = torch.randn(total_tokens, num_qo_heads, head_dim, dtype=torch.float16, device="cuda")

# Build indices
q_indptr = torch.tensor([0, seq_lens[0], sum(seq_lens)], dtype=torch.int32, device="cuda")
kv_indptr = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")
kv_indices = torch.arange(total_pages, dtype=torch.int32, device="cuda")
last_page_lens = torch.tensor([10, 15], dtype=torch.int32, device="cuda")

# Create and use wrapper
workspace = torch.empty(128 * 1024 * 1024, dtype=torch.uint8, device="cuda")
wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
    workspace, kv_layout="HND"
)

wrapper.plan(
    q_indptr, kv_indptr, kv_indices, last_page_lens,
    num_qo_heads, num_kv_heads, head_dim, page_size,
    causal=True, q_data_type=torch.float16, kv_data_type=torch.float16
)

output = wrapper.run(q, kv_cache)
"""

PIECES = """
output, lse = wrapper.run(q, kv_cache, return_lse=True)

# Get batch indices and positions for tokens
from flashinfer.page import get_batch_indices_positions

seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
batch_indices, positions = get_batch_indices_positions(
    q_indptr,      # Query indices pointer
    seq_lens,      # Sequence lengths
    total_tokens   # Total number of tokens
)

float_workspace_buffer = workspace
decode_wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
    float_workspace_buffer,
    kv_layout="NHD",        # or "HND"
    use_tensor_cores=True   # Enable tensor core acceleration
)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_complete_example(device):
    pytest.importorskip("torch")
    scope = {}
    with compat.install_as("flashinfer"):
        for code in (COMPLETE, PIECES):
            exec(code.replace('"cuda"', f'"{device}"'), scope)
    assert scope["wrapper"].__module__ == "cupyattn.compat.flashinfer.prefill"
    lib = Lib("torch")
    q, cache, out, lse = (lib.get(scope[name]) for name in ("q", "kv_cache", "output", "lse"))
    expected = oracle.attention_varlen(
        q,
        *(np.ascontiguousarray(cache[:, i].swapaxes(1, 2)) for i in range(2)),
        np.array([0, 10, 25], np.int32),
        block_table=np.array([[0], [1]], np.int32),
        seqused_k=np.array([10, 15], np.int32),
        causal=True,
    )
    check_base2(expected, out, lse, "float16")
    assert lib.get(scope["batch_indices"]).tolist() == [0] * 10 + [1] * 15
    assert lib.get(scope["positions"]).tolist() == [*range(10), *range(15)]
    assert scope["decode_wrapper"].use_tensor_cores
