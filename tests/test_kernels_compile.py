"""Every kernel family compiles for every supported chip, without spills, within the chip's shared memory. No GPU."""

import dataclasses
import faulthandler
import struct
from collections import Counter

import pytest
from problems import CAUSAL, FULL, NO_STRIDES, make_problem, make_step

from cupyattn.plan import (
    DEVICES,
    INLINE_CAPACITIES,
    MERGE_CAPACITIES,
    STATIC_SHARED,
    DecodeTile,
    Defines,
    plan,
    plan_append,
    plan_copy,
    plan_fill_table,
    plan_merge,
    plan_rotary,
    plan_write,
)
from cupyattn.problem import Append, Problem, Rotary
from cupyattn.rotary import Rotation
from cupyattn.states import Merge

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


STEPS = {
    "mha": {"group": 1},
    "group": {},
    "mqa": {"group": 16},
    "draft": {"seqlen_q": 16},
    "shaped": {"seqlen_q": 2, "softcap": 30.0, "alibi": "heads", "window": (100, 0)},
    "dense": {"kind": "dense"},
    "e4m3": {"kv_dtype": "float8_e4m3fn", "group": 8},
    "e5m2": {"kv_dtype": "float8_e5m2", "dtype": "bfloat16"},
    "unaligned": {"alignment": 2, "out_alignment": 2},
    "few": {"batch": 1, "rows": 1024},
    "split": {"num_splits": 4, "block_size": 1},
}


@pytest.mark.parametrize("arch", ("80", "86", "89", "90a", "100a", "120a"))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("family", STEPS)
def test_decode_kernel(arch, head_dim, family):
    if arch not in ("80", "90a") and (head_dim == 64 or family in ("mha", "dense", "unaligned", "few", "split")):
        pytest.skip("compiled for this chip with other widths and families")
    _compile(_step(head_dim, **STEPS[family]), arch, "decode")


@pytest.mark.parametrize("head_dim", [8, 24, 40, 80, 96, 112, 160, 192, 224])
@pytest.mark.parametrize("family", ["shaped", "e4m3", "mqa"])
def test_decode_widths(head_dim, family):
    _compile(_step(head_dim, **STEPS[family]), "90a", "decode")


@pytest.mark.parametrize("arch", ("80", "90a"))
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_decode_with_append_and_rotary(arch, interleaved, kv_dtype):
    for head_dim, dtype in ((128, "float32"), (256, "bfloat16")):
        rotary = Rotary(head_dim // 2, interleaved, 4096, dtype, True)
        append = make_append(head_dim, kv_dtype=kv_dtype, rotary=rotary)
        _compile(_step(head_dim, dtype="bfloat16", kv_dtype=kv_dtype, append=append, rotary=rotary), arch, "decode")


@pytest.fixture
def in_time():
    """Ends the process if a test takes minutes: NVRTC 12.9 never finished some kernels, until these hid from it what it
    made too much of."""
    faulthandler.dump_traceback_later(180, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("kv_heads", [1, 2, 33, 44, 66, 132])
def test_shares_of_a_single_sequence(kv_heads, in_time):
    """132 multiprocessors share out the keys of each kv head, all of them to one down to one to each of them."""
    step = dataclasses.replace(_step(128, batch=1, group=1), num_heads=kv_heads, num_kv_heads=kv_heads)
    made = plan(step, DEVICES["90a"], "decode")
    assert kv_heads < 33 or dict(made.defines)["UNIT_SHARES"] == 132 // kv_heads
    _compile(step, "90a", "decode")


@pytest.mark.parametrize("teams", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "shares"), [(64, 1), (128, 2), (256, 4)])
@pytest.mark.parametrize("cluster", [1, 8])
def test_few_shares_and_few_teams(cluster, rows, shares, teams, in_time):
    tile = DecodeTile(teams, 1, 1, 1, 16, 2, cluster, 1, 4)
    for window in (FULL, CAUSAL):
        step = _step(128, batch=1, group=1, rows=rows, window=window)
        step = dataclasses.replace(step, num_heads=1, num_kv_heads=1)
        made = plan(step, DEVICES["90a"], "decode", decode_tile=tile)
        assert dict(made.defines)["UNIT_SHARES"] == shares and dict(made.defines)["KEY_TEAMS"] == teams
        found = compile.compile_cubin("decode", made.defines, "90a")
        assert not found.spill_bytes


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", [33, 128, 256])
@pytest.mark.parametrize("changes", [{}, {"softcap": 30.0, "alibi": "heads", "window": (100, 0)}], ids=str)
def test_tensor_core_kernel_of_split_keys(arch, head_dim, changes):
    dense = {"packed_q": False, "batch": 1, "seqlen_q": 70, "total_q": 70, "num_heads": 4, "num_kv_heads": 4}
    dense |= {"num_splits": 4, "window": FULL}
    problem = make_problem(head_dim, "paged", **dense | changes)
    assert dict(plan(problem, DEVICES[arch], "forward_sm80").defines)["KV_SPLITS"] == 1
    _compile(problem, arch, "forward_sm80")


def _step(head_dim: int, *, kind: str = "paged", block_size: int = 16, **changes) -> Problem:
    step = make_step(head_dim, **changes)
    cache = dataclasses.replace(step.cache, kind=kind, block_size=block_size if kind == "paged" else 0)
    return dataclasses.replace(step, cache=cache)


# ------------------------------------------------------------------------------------------------------- Hopper

# An instruction of sm_90 takes 16 bytes. The lowest 9 bits of the first word say which it is, 3 more where its operands
# are. As `nvdisasm -hex` shows them: HGMMA is a product of a warpgroup, HMMA of a warp; LDL and STL are local memory's.
OPCODE_BITS = 0x1FF
HGMMA, HMMA, LDL, STL = 0x1F0, 0x03C, 0x183, 0x187
# ptxas puts the products of a warpgroup one behind the other where it finds no other way, and says so.
SERIALIZED = ("C7510", "C7512", "C7514")

FEW = {"packed_q": False, "batch": 2, "seqlen_q": 20, "total_q": 40, "num_splits": 1}  # rows: a group shares a tile
BIAS = {"softcap": 30.0, "alibi": "heads"}
HOPPER_FORMS = {
    "full": {"window": FULL},
    "causal": {},
    "window": {"window": (100, 10)},
    "left": {"window": (100, -1), "kind": "packed", "dtype": "bfloat16"},
    "packed": {"kind": "packed"},
    "packed full": {"kind": "packed", "num_kv_heads": 32, "window": FULL},
    "lengths": {"seqused_k": True, "leftpad": True, "window": FULL, "dtype": "bfloat16"},
    "negative scale": {"softmax_scale": -0.125},
    "softcap": {"softcap": 30.0, "window": FULL},
    "alibi": {"alibi": "batch_heads", "kind": "packed"},
    "shaped": {"window": (100, 100), "kind": "paged", **BIAS},
    "sinks": {"sinks": True, "kind": "paged", "dtype": "bfloat16"},
    "group": {"kind": "paged", **FEW},
    "odd group": {"kind": "paged", "num_heads": 24, "window": (100, 10), **FEW, **BIAS},
    "split": {"kind": "paged", "num_heads": 8, **FEW, "num_splits": 4},
    "causal split": {"num_kv_heads": 32, **FEW, "num_splits": 4},
    "softcap window": {"kind": "packed", "window": (100, 100), "softcap": 30.0},
    "split, shaped": {"num_heads": 56, "dtype": "bfloat16", **FEW, "num_splits": 4, **BIAS},
    "paged": {"kind": "paged", "window": FULL},
    "paged, negative scale": {"kind": "paged", "window": FULL, "softmax_scale": -0.125, "dtype": "bfloat16"},
    "gathered": {"kind": "paged", "block_size": 1},
    "gathered, softcap": {"kind": "paged", "block_size": 1, "softcap": 30.0},
    "gathered, left": {"kind": "paged", "block_size": 3, "window": (100, 10), "dtype": "bfloat16"},
    "gathered, shifted": {"kind": "paged", "leftpad": True, "sinks": True},
}
HOPPER_TRAITS = {  # whether a form is what its name says
    "full": {"MASK": 0},
    "causal": {"MASK": 1, "LEFT": 0, "GATHER": 0, "KV_SPLITS": 0},
    "left": {"LEFT": 1},
    "lengths": {"RAGGED_KEYS": 1},
    "negative scale": {"SCALE_FIRST": 1},
    "group": {"GROUP": 4, "KV_SPLITS": 0},
    "odd group": {"GROUP": 3, "KV_SPLITS": 0, "LEFT": 1},
    "split": {"KV_SPLITS": 1},
    "split, shaped": {"KV_SPLITS": 1, "GROUP": 7},
    "causal split": {"KV_SPLITS": 1, "GROUP": 1, "MASK": 1},
    "gathered": {"GATHER": 1},
    "gathered, left": {"GATHER": 1, "LEFT": 1},
    "gathered, shifted": {"GATHER": 1},
}
# Everything at the most usual width; what needs registers or memory most at all others.
HOPPER_CASES = [(128, form) for form in HOPPER_FORMS]
HOPPER_CASES += [(head_dim, "full") for head_dim in (8, 64, 72, 96, 160, 192, 256)]
HOPPER_CASES += [(head_dim, "shaped") for head_dim in (64, 96, 192, 256)]
HOPPER_CASES += [(64, "split"), (96, "odd group"), (192, "causal"), (256, "split, shaped"), (256, "gathered, left")]
HOPPER_CASES += [
    (64, form) for form in ("gathered", "causal", "window", "packed", "packed full", "causal split", "softcap window")
]


@pytest.mark.parametrize(("head_dim", "form"), HOPPER_CASES)
def test_hopper_kernel(head_dim, form, in_time):
    defines = _compile_hopper(_prefill(head_dim, **HOPPER_FORMS[form]))
    assert HOPPER_TRAITS.get(form, {}).items() <= defines.items()


@pytest.mark.parametrize("block_size", [8, 64, 128, 256])
def test_hopper_kernel_of_blocks(block_size, in_time):
    _compile_hopper(_prefill(128, kind="paged", block_size=block_size, dtype="bfloat16"))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(192, 128), (64, 256), (256, 72), (96, 8)])
def test_hopper_kernel_of_other_values(head_dim, head_dim_v, in_time):
    _compile_hopper(_prefill(head_dim, head_dim_v=head_dim_v))


def test_opcodes_are_those_of_the_instructions():
    """Seen where the instructions must be."""
    source = """extern "C" __global__ void __launch_bounds__(256, 8) spill(float* x, int n) { float a[64];
    #pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = x[i * n];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; ++i) x[i * n + 1] = a[i] * a[63 - i]; }"""
    spilling = compile.compile_source("spill", source, compile.options((), "90a"), "90a")
    assert spilling.spill_bytes
    found = _opcodes(spilling.cubin)
    assert found[LDL] and found[STL] and not found[HMMA] and not found[HGMMA]
    found = _opcodes(compile.compile_cubin("forward_sm80", plan(_prefill(64), DEVICES["80"]).defines, "90a").cubin)
    assert found[HMMA] and not found[LDL] and not found[STL] and not found[HGMMA]


def _prefill(head_dim: int, *, kind: str = "dense", block_size: int = 16, **changes) -> Problem:
    problem = make_problem(head_dim, kind, **changes)
    block_size = block_size if kind == "paged" else 0
    return dataclasses.replace(problem, cache=dataclasses.replace(problem.cache, block_size=block_size))


def _compile_hopper(problem: Problem) -> dict[str, int]:
    """Products of whole warpgroups alone, side by side with the rest, and nothing in local memory."""
    device = DEVICES["90a"]
    made = plan(problem, device, "forward_sm90")
    compiled = compile.compile_cubin(made.kernel, made.defines, device.arch)
    what = dict(made.defines)
    assert compiled.spill_bytes == 0, f"{compiled.spill_bytes} bytes spilled with {what}"
    assert compiled.shared_bytes <= STATIC_SHARED, "plans count on this much beside the tiles"
    assert made.shared_bytes + compiled.shared_bytes <= device.shared_per_block
    assert not any(warning in compiled.log for warning in SERIALIZED), f"products in line with {what}\n{compiled.log}"
    found = _opcodes(compiled.cubin)
    assert found[HGMMA] and not found[HMMA] and not found[LDL] and not found[STL], what
    return what


def _opcodes(cubin: bytes) -> Counter[int]:
    """How often each instruction stands in the functions of a cubin, an ELF file of 64 bits."""
    headers, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    sections = [struct.unpack_from("<I20xQQ", cubin, headers + i * size) for i in range(count)]
    found = Counter()
    for name, offset, length in sections:
        if cubin.startswith(b".text.", sections[names][1] + name):
            found.update(word & OPCODE_BITS for word, _ in struct.iter_unpack("<QQ", cubin[offset : offset + length]))
    return found


# ------------------------------------------------------------------------------------------ append, rotary, merge

HALVES, INTERLEAVED = (
    Rotary(128, interleaved, 4096, dtype, True) for interleaved, dtype in ((0, "bfloat16"), (1, "float32"))
)
APPENDS = {
    "dense": {"packed_new": False},
    "packed": {"packed_new": True},
    "halves": {"rotary": HALVES},
    "interleaved": {"rotary": INTERLEAVED},
    "e4m3": {"kv_dtype": "float8_e4m3fn", "k_scales": "heads"},
    "e5m2": {"kv_dtype": "float8_e5m2", "rotary": HALVES},
    "float16": {"dtype": "float16", "kv_dtype": "float8_e4m3fn", "rotary": INTERLEAVED},
    "float32": {"dtype": "float32", "kv_dtype": "float32", "rotary": INTERLEAVED},
}


def make_append(head_dim: int = 128, **changes) -> Append:
    append = Append(
        dtype="bfloat16",
        batch=64,
        num_kv_heads=8,
        head_dim=head_dim,
        head_dim_v=head_dim,
        packed_new=False,
        total_new=1024,
        seqlen_new=16,
        cache=make_problem(head_dim, "paged").cache,
        k_strides=NO_STRIDES,
        v_strides=NO_STRIDES,
        cache_batch_idx=False,
        alignment=16,
        kv_dtype="bfloat16",
        k_scale=1.0,
        k_scales="",
        v_scale=1.0,
        v_scales="",
        rotary=None,
    )
    return dataclasses.replace(append, **changes)


@pytest.mark.parametrize("arch", ("70", *ARCHS))
@pytest.mark.parametrize("family", APPENDS)
def test_append_kernel(arch, family):
    _compile_kernel("append_kv", plan_append(make_append(**APPENDS[family]))[0], arch)


@pytest.mark.parametrize("arch", ("70", *ARCHS))
@pytest.mark.parametrize("packed", [False, True])
def test_append_kernel_with_indices_in_its_argument(arch, packed):
    for capacity in INLINE_CAPACITIES:
        _compile_kernel("append_kv", plan_append(make_append(packed_new=packed), capacity)[0], arch)


@pytest.mark.parametrize("arch", ("70", *ARCHS))
def test_copy_and_write_kernels(arch):
    for head_bytes in (256, 24, 20, 6, 65):
        _compile_kernel("copy_rows", plan_copy(100, 2, 8, head_bytes)[0], arch)
    _compile_kernel("write_entries", plan_write(16)[0], arch)
    _compile_kernel("page_table", plan_fill_table(8, 32)[0], arch)


@pytest.mark.parametrize("alignment", [16, 4, 1])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(65, 64), (100, 30), (256, 256), (7, 2), (80, 32)])
def test_append_kernel_widths(head_dim, rotary_dim, alignment):
    rotary = Rotary(rotary_dim, True, 4096, "float32", True)
    for changes in ({"rotary": rotary}, {"kv_dtype": "float8_e4m3fn", "rotary": rotary}, {"kv_dtype": "float8_e5m2"}):
        append = make_append(head_dim, alignment=max(alignment, 1 if "kv_dtype" in changes else 2), **changes)
        _compile_kernel("append_kv", plan_append(append)[0], "90a")


@pytest.mark.parametrize("arch", ("70", *ARCHS))
@pytest.mark.parametrize("rotary", [HALVES, INTERLEAVED], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rotary_kernel(arch, dtype, rotary):
    for packed in (False, True):
        rotation = Rotation(dtype, 64, 1024, 16, 8, 128, packed, NO_STRIDES, NO_STRIDES, 16, rotary)
        _compile_kernel("rotary", plan_rotary(rotation)[0], arch)


@pytest.mark.parametrize("arch", ("70", *ARCHS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rounds", [(False, False), (False, True), (True, False)], ids=["one", "first", "last"])
def test_merge_kernel(arch, dtype, rounds):
    for states in MERGE_CAPACITIES:
        merge = Merge(dtype, states, 64, 16, 8, 128, NO_STRIDES, NO_STRIDES, 16)
        _compile_kernel("merge_states", plan_merge(merge, states, *rounds)[0], arch)


def _compile_kernel(name: str, defines: Defines, arch: str) -> None:
    if int(arch.rstrip("a")) not in compile.supported_archs():
        pytest.skip(f"NVRTC for CUDA {compile.nvrtc_version()[0]} no longer compiles for sm_{arch}")
    compiled = compile.compile_cubin(name, defines, arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.spill_bytes == 0, f"{compiled.spill_bytes} bytes spilled with {dict(defines)}"


def _compile(problem: Problem, arch: str, kernel: str) -> None:
    device = DEVICES[arch]
    made = plan(problem, device, kernel)
    compiled = compile.compile_cubin(made.kernel, made.defines, arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.spill_bytes == 0, f"{compiled.spill_bytes} bytes spilled with {dict(made.defines)}"
    assert made.shared_bytes + compiled.shared_bytes <= device.shared_per_block
    if kernel in ("forward_sm80", "decode"):
        assert compiled.shared_bytes <= STATIC_SHARED, "plans count on this much beside the tiles"
