"""explain: what a call would run, for arrays here and for chips elsewhere."""

import json

import numpy as np
import pytest

import cupyattn


def arrays(batch=2, seqlen_q=96, seqlen_k=160, heads=8, kv_heads=2, head_dim=64, dtype=np.float16):
    q = np.ones((batch, seqlen_q, heads, head_dim), dtype)
    k = np.ones((batch, seqlen_k, kv_heads, head_dim), dtype)
    return q, k, k.copy()


def brute_force_flops(seqlen_q, seqlen_k, left, right, heads, head_dim):
    pairs = 0
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            at = i + seqlen_k - seqlen_q
            pairs += (left < 0 or j >= at - left) and (right < 0 or j <= at + right)
    return 4 * pairs * heads * head_dim


@pytest.mark.parametrize("window", [None, (-1, 0), (10, 3), (0, -1)])
def test_flops_count_the_visible_pairs(window):
    q, k, v = arrays(batch=1)
    left, right = window or (-1, -1)
    assert cupyattn.explain(q, k, v, window=window).flops == brute_force_flops(96, 160, left, right, 8, 64)


def test_bytes_count_each_operand_once():
    q, k, v = arrays()
    found = cupyattn.explain(q, k, v, return_lse=True)
    assert found.bytes == 2 * q.nbytes + k.nbytes + v.nbytes + 4 * 2 * 8 * 96


def test_only_keys_in_use_count():
    q, k, v = arrays(seqlen_q=1)
    half, whole = (cupyattn.explain(q, k, v, cache_seqlens=used) for used in (80, 160))
    assert half.flops * 2 == whole.flops
    new = np.ones((2, 1, 2, 64), np.float16)
    appended = cupyattn.explain(q, k, v, k=new, v=new, cache_seqlens=np.array([79, 79], np.int32))
    assert appended.flops == half.flops


def test_packed_and_paged_calls():
    q = np.ones((30, 8, 64), np.float16)
    cu_seqlens = np.array([0, 10, 30], np.int32)
    assert cupyattn.explain(q, q, q, cu_seqlens_q=cu_seqlens).flops == 4 * (100 + 400) * 8 * 64
    blocks = np.ones((6, 16, 2, 64), np.float16)
    table = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    used = np.array([10, 40], np.int32)
    found = cupyattn.explain(q, blocks, blocks, cu_seqlens_q=cu_seqlens, block_table=table, seqused_k=used)
    assert "paged (blocks of 16)" in found.shape
    assert found.flops == 4 * (10 * 10 + 20 * 40) * 8 * 64


def test_cpu_arrays_run_in_numpy():
    found = cupyattn.explain(*arrays())
    assert (found.kernel, found.device, found.registers) == ("numpy", "cpu", None)
    assert "numpy on cpu" in str(found)


@pytest.mark.parametrize("arch", ["75", "80", "90", "90a", "120a"])
def test_a_chip_that_is_not_present(arch):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    found = cupyattn.explain(*arrays(batch=8, seqlen_q=512, seqlen_k=512), causal=True, arch=arch)
    assert found.kernel == "forward_sm80"
    assert 0 < found.registers <= 255
    assert found.spill_bytes == 0
    assert found.blocks_per_multiprocessor >= 1
    assert found.roofline_seconds > 0
    assert found.bound in ("memory", "compute")
    text = str(found)
    assert "no spills" in text
    assert "because" in text
    json.dumps(found.as_dict())


def test_decode_is_bound_by_memory_and_prefill_by_arithmetic():
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    q, k, v = arrays(seqlen_q=1, seqlen_k=4096)
    assert cupyattn.explain(q, k, v, arch="90a").bound == "memory"
    q, k, v = arrays(seqlen_q=4096, seqlen_k=4096)
    assert cupyattn.explain(q, k, v, arch="90a").bound == "compute"


def test_bad_arguments_are_refused_as_by_the_call():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="arch: got '91', expected one of"):
        cupyattn.explain(q, k, v, arch="91")
    with pytest.raises(ValueError, match="kernel: got 'fast'"):
        cupyattn.explain(q, k, v, kernel="fast")
    with pytest.raises(ValueError, match="v: got None, expected k and v together"):
        cupyattn.explain(q, k, v, k=k, cache_seqlens=1)
    with pytest.raises(ValueError, match="window"):
        cupyattn.explain(q, k, v, window=(-2, 0))
    with pytest.raises(TypeError):
        cupyattn.explain(q, k, v, colour="blue")


@pytest.mark.gpu
def test_the_device_of_the_arrays():
    cupy = pytest.importorskip("cupy")
    q, k, v = (cupy.asarray(array) for array in arrays())
    found = cupyattn.explain(q, k, v, causal=True)
    assert found.kernel == "forward_sm80"
    assert found.registers
    simt = cupyattn.explain(*(array.astype(cupy.float32) for array in (q, k, v)))
    assert simt.kernel == "forward_simt"
