"""explain: what a call would run, for arrays here and for chips elsewhere."""

import dataclasses
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


@pytest.mark.parametrize(("window", "seen"), [((10, 0), 106), ((-1, 0), 160), ((0, 0), 96), ((200, -1), 160)])
def test_bytes_count_the_keys_that_some_query_sees(window, seen):
    q, k, v = arrays()
    assert cupyattn.explain(q, k, v, window=window).bytes == 2 * q.nbytes + (k.nbytes + v.nbytes) * seen // 160


def test_reasons_say_what_decode_does_and_why_it_is_not_taken():
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")

    def reasons(batch):
        return " ".join(cupyattn.explain(*arrays(batch=batch, seqlen_q=1, kv_heads=8), arch="90").reasons)

    assert "side by side" not in reasons(1) and "4 kv heads side by side" in reasons(64)
    assert "not decode: decode keeps the lengths of at most 2048" in reasons(3000)


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
    assert found.kernel == ("forward_sm90" if arch.startswith("90") else "forward_sm80")
    assert 0 < found.registers <= 255
    assert found.spill_bytes == 0
    assert found.blocks_per_multiprocessor >= 1 and found.stages >= 1
    assert 0 < found.occupancy <= 1
    assert found.roofline_seconds > 0
    assert found.bound in ("memory", "compute")
    text = str(found)
    assert "no spills" in text
    assert "because" in text
    json.dumps(found.as_dict())


def test_warps_of_two_trades_have_registers_of_their_own():
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    found = cupyattn.explain(*arrays(head_dim=128), arch="90")
    assert found.registers_by_role == {"loading": 40, "computing": 232}
    assert found.blocks_per_multiprocessor == 1 and found.occupancy == 12 / 64
    assert "168 registers a thread (40 loading, 232 computing), no spills" in str(found)
    assert "1 block on a multiprocessor, 19% of its warps" in str(found)
    assert cupyattn.explain(*arrays(head_dim=128), arch="80").registers_by_role is None


def test_reasons_say_why_the_hopper_kernel_is_not_taken():
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    found = cupyattn.explain(*arrays(head_dim=100), arch="90")
    assert found.kernel == "forward_sm80"
    assert "not forward_sm90: its head dimensions are multiples of 8 up to 256" in str(found)
    with pytest.raises(ValueError, match="kernel: got 'forward_sm90', .* its head dimensions are multiples of 8"):
        cupyattn.explain(*arrays(head_dim=100), arch="90", kernel="forward_sm90")


def test_only_arrays_on_a_gpu_are_measured():
    for options, message in (
        ({}, "measure: got True for arrays on cpu, expected arrays on a GPU"),
        ({"arch": "90"}, "measure: got True with arch '90', expected arch None: only a GPU that is here"),
    ):
        with pytest.raises(ValueError, match=message):
            cupyattn.explain(*arrays(), measure=True, **options)
    with pytest.raises(TypeError, match="measure: got 'yes', expected True or False"):
        cupyattn.explain(*arrays(), measure="yes")


def test_a_measured_time_has_a_share_of_the_roofline():
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    found = cupyattn.explain(*arrays(), arch="90")
    assert found.measured_seconds is None and "measured" not in str(found).replace("ceilings: measured", "")
    found = dataclasses.replace(found, measured_seconds=2e-6, roofline_share=0.355)
    assert str(found).endswith("\n  measured 2.0 us, 35.5% of that speed")


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
    with pytest.raises(TypeError, match=r"explain\(\) got an unexpected keyword argument 'colour'"):
        cupyattn.explain(q, k, v, colour="blue")


def outcome(function, *arrays, **options):
    try:
        function(*arrays, **options)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    return None


def test_each_refusal_is_that_of_the_call():
    """Word for word, for every way in."""
    q, k, v = arrays(seqlen_q=1)
    new = np.ones((2, 1, 2, 64), np.float16)
    used = np.array([3, 3], np.int32)
    cached = [
        {"k": new},
        {"k": new, "v": new},
        {"k": new, "v": new, "cache_seqlens": 160},
        {"k": new, "v": new, "cache_seqlens": np.array([3, 160], np.int32)},
        {"k": new[:1], "v": new[:1], "cache_seqlens": 3},
        {"k": new[0], "v": new[0], "cache_seqlens": 3},
        {"k": k[:, :1], "v": new, "cache_seqlens": 3},
        {"k": new, "v": new, "cache_seqlens": 3, "cache_batch_idx": np.array([1, 1], np.int32)},
        {"cache_seqlens": True},
        {"cache_seqlens": 5.0},
        {"cache_seqlens": -1},
        {"cache_seqlens": 161},
        {"cache_seqlens": used.astype(np.int64)},
        {"cache_seqlens": used, "kernel": "fast"},
        {"cache_seqlens": used, "window": (-2, 0)},
        {"cache_seqlens": used, "check": "yes"},
        {"cache_seqlens": used, "out": k},
        {"cache_seqlens": used, "out": q},
        {"cache_leftpad": np.array([161, 0], np.int32)},
    ]
    for options in cached:
        expected = outcome(cupyattn.attention_with_kvcache, q, k, v, **options)
        assert expected is not None, options
        assert outcome(cupyattn.explain, q, k, v, **options) == expected
    x = np.ones((7, 2, 64), np.float16)
    ends = np.array([0, 3, 7], np.int32)
    for packed in (
        (x, x[:6], x[:6], ends),
        (x, x, x, ends + 1),
        (x, x, x, ends, ends[:2]),
        (x, k, k, ends),
        (x, x, x, [0, 3, 7]),
    ):
        expected = outcome(cupyattn.attention_varlen, *packed)
        assert expected is not None
        assert outcome(cupyattn.explain, *packed) == expected


def test_arguments_of_two_functions_do_not_mix():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="^seqused_k: got given without cu_seqlens_q"):
        cupyattn.explain(q, k, v, seqused_k=np.array([1, 1], np.int32))
    x, ends = np.ones((7, 2, 64), np.float16), np.array([0, 3, 7], np.int32)
    with pytest.raises(ValueError, match="^cache_seqlens: got given together with cu_seqlens_q"):
        cupyattn.explain(x, x, x, ends, cache_seqlens=3)


def test_ragged_arrays():
    q = cupyattn.RaggedArray(np.ones((30, 8, 64), np.float16), [0, 10, 30])
    assert cupyattn.explain(q, q, q).flops == 4 * (100 + 400) * 8 * 64


@pytest.mark.parametrize("arch", ["90", "90a", "sm_90", "sm_90a", "9.0", 9.0, 90])
def test_spellings_of_a_chip(arch):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    assert cupyattn.explain(*arrays(), arch=arch).device == "H100, H200 (sm_90a)"


def test_singular_and_plural_and_long_times():
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    text = str(cupyattn.explain(*arrays(batch=1, seqlen_q=1, seqlen_k=64, heads=1, kv_heads=1), arch="90"))
    assert "1 query," in text and "1 head over 1 kv head," in text and "us, bound by" in text
    q = np.broadcast_to(np.ones(128, np.float16), (1, 1 << 17, 8, 128))
    assert "ms, bound by" in str(cupyattn.explain(q, q, q, arch="90"))


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_no_work(batch, seqlen_q, seqlen_k):
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
    for arch in (None, "90"):
        found = cupyattn.explain(*arrays(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k), arch=arch)
        assert found.flops == 0 and "work 0 FLOP" in str(found)
        assert (found.kernel == "none") == (not batch or not seqlen_q)


@pytest.mark.gpu
def test_the_device_of_the_arrays():
    cupy = pytest.importorskip("cupy")
    q, k, v = (cupy.asarray(array) for array in arrays())
    found = cupyattn.explain(q, k, v, causal=True)
    hopper = cupy.cuda.Device().compute_capability == "90"
    assert found.kernel == ("forward_sm90" if hopper else "forward_sm80")
    assert found.registers
    simt = cupyattn.explain(*(array.astype(cupy.float32) for array in (q, k, v)))
    assert simt.kernel == "forward_simt"


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_a_call_is_measured(library):
    """On the library's own stream; new rows are stored as by the call."""
    made = pytest.importorskip(library)
    convert = made.asarray if library == "cupy" else lambda array: made.from_numpy(array).cuda()
    q, k, v = map(convert, arrays(seqlen_q=2048, seqlen_k=2048))
    found = cupyattn.explain(q, k, v, causal=True, return_lse=True, measure=True)
    assert 0 < found.roofline_share < 1.2
    assert found.measured_seconds == pytest.approx(found.roofline_seconds / found.roofline_share)
    assert "of that speed" in str(found)
    new = [convert(2 * array) for array in arrays(seqlen_k=3)[1:]]
    length = convert(np.array([5, 2045], np.int32))
    appended = cupyattn.explain(q[:, :1], k, v, k=new[0], v=new[1], cache_seqlens=length, measure=True)
    assert appended.kernel == "decode" and appended.measured_seconds > 0
    assert float(k[0, 5:8].min()) == float(v[1, 2045:].min()) == 2
    none = cupyattn.explain(q[:, :0], k, v, measure=True)
    assert none.kernel == "none" and none.measured_seconds is None
