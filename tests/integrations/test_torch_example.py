"""The example that serves a model: its tokens are the best by PyTorch's own attention, and it runs as it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from cupyattn.integrations import torch_example  # noqa: E402
from cupyattn.integrations.torch_example import PROMPTS, Shape  # noqa: E402

SMALL = Shape(layers=2, heads=4, kv_heads=2, head_dim=32, inner=64, vocabulary=50, positions=256)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs PyTorch for CUDA")
    return request.param


def test_tokens_are_the_best_that_there_are(device):
    sequences, seconds, shortfall = torch_example.serve(SMALL, device, torch.float32, 12)
    assert [len(sequence) for sequence in sequences] == [length + 12 for length in PROMPTS]
    assert shortfall < 1e-3 and seconds > 0


def test_a_wrong_token_would_be_seen(monkeypatch):
    """A cache that negates what it is given."""
    append = torch_example.append_kv

    def negated(k_cache, v_cache, k, v, cu_seqlens_new):
        append(k_cache, v_cache, k, v, cu_seqlens_new=cu_seqlens_new)
        v_cache.mul_(-1)

    monkeypatch.setattr(torch_example, "append_kv", negated)
    assert torch_example.serve(SMALL, "cpu", torch.float32, 12)[2] > 1e-3


@pytest.mark.gpu
def test_half_precision_in_a_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch for CUDA")
    assert torch_example.serve(Shape(), "cuda", torch.bfloat16, 32)[2] < 0.1


def test_with_transformers(device):
    pytest.importorskip("transformers")
    tokens = torch_example.generate_with_transformers(SMALL, device, torch.float32, 3)
    assert tokens.shape == (len(PROMPTS), max(PROMPTS) + 3)


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "cupyattn.integrations.torch_example", "--device", "cpu", "--steps", "2"]
    done = subprocess.run([*command, "--layers", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 sequences and 1 layers on cpu" in done.stdout and "below the best logit" in done.stdout
