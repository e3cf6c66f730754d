"""Every kernel family compiles for every supported chip, without spills, within the chip's shared memory. No GPU."""

import dataclasses

import pytest
from problems import FULL, NO_STRIDES, make_problem

from cupyattn.plan import DEVICES, STATIC_SHARED, plan, plan_append
from cupyattn.problem import Append, Problem

pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy")
from cupyattn.jit import compile  # noqa: E402

ARCHS = ("75", "80", "86", "89", "90a", "100a", "120a")
FAMILIES = {
    "dense": lambda head_dim: make_problem(head_dim, window=FULL),
    "causal": make_problem,
    "packed": lambda head_dim: make_problem(head_dim, "packed"),
    "paged": lambda head_dim: make_problem(head_dim, "paged"),
    "decode": lambda head_dim: make_problem(head_dim, "paged", packed_q=False, seqlen_q=1, total_q=64, window=FULL),
    "shaped": lambda head_dim: make_problem(head_dim, "paged", softcap=30.0, alibi="heads", window=(100, 100)),
    "unaligned": lambda head_dim: make_problem(head_dim, alignment=2, out_alignment=2),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_core_kernel(arch, head_dim, family):
    if arch != "90a" and head_dim != 128 and family in ("decode", "unaligned", "causal"):
        pytest.skip("the tile of this head_dim is compiled for this chip with other families")
    _compile(FAMILIES[family](head_dim), arch, "forward_sm80")


@pytest.mark.parametrize("head_dim", [8, 24, 40, 80, 96, 100, 112, 160, 192, 224])
def test_every_tile_row_width(head_dim):
    """The swizzle has a case for each power of two in a row, and a head_dim that is no multiple of 16 is padded."""
    _compile(make_problem(head_dim), "90a", "forward_sm80")


@pytest.mark.parametrize("arch", ["90a", "100a"])
@pytest.mark.parametrize("head_dim", [80, 96, 112])
@pytest.mark.parametrize("changes", [{}, {"alibi": "heads"}, {"softcap": 30.0}, {"alignment": 8}], ids=str)
def test_widths_that_leave_few_registers(arch, head_dim, changes):
    """Between the widths that tiles are made for, the same tile holds more accumulators."""
    _compile(make_problem(head_dim, "paged", dtype="bfloat16", **changes), arch, "forward_sm80")


@pytest.mark.parametrize("arch", ("70", *ARCHS))
@pytest.mark.parametrize("family", ["causal", "shaped"])
def test_float32_kernel(arch, family):
    if int(arch.rstrip("a")) not in compile.supported_archs():
        pytest.skip(f"NVRTC for CUDA {compile.nvrtc_version()[0]} no longer compiles for sm_{arch}")
    _compile(dataclasses.replace(FAMILIES[family](256), dtype="float32"), arch, "forward_simt")


def test_chips_without_16_bit_matrices_take_the_float32_kernel():
    _compile(make_problem(64, dtype="bfloat16"), "75", "forward_simt")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("packed", [False, True])
def test_append_kernel(arch, packed):
    cache = make_problem(128, "paged").cache
    append = Append("bfloat16", 64, 8, 128, packed, 1024, 16, cache, NO_STRIDES, NO_STRIDES, False, 16)
    compiled = compile.compile_cubin("append_kv", plan_append(append)[0], arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.spill_bytes == 0


def _compile(problem: Problem, arch: str, kernel: str) -> None:
    device = DEVICES[arch]
    made = plan(problem, device)
    assert made.kernel == kernel
    compiled = compile.compile_cubin(made.kernel, made.defines, arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.spill_bytes == 0, f"{compiled.spill_bytes} bytes spilled with {dict(made.defines)}"
    assert made.shared_bytes + compiled.shared_bytes <= device.shared_per_block
    if kernel == "forward_sm80":
        assert compiled.shared_bytes <= STATIC_SHARED, "plans count on this much beside the tiles"
