"""FlashInfer's names as a whole: signatures, imports, and what is refused, by name and before anything changes."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
from compat.test_flashinfer_common import Lib, over_libs, paged, starts
from oracle import normal

from cupyattn.compat import flashinfer
from cupyattn.compat.flashinfer.steps import check_workspace

# ------------------------------------------------------------------------------------------------------------- names


def test_names_that_are_others():
    assert flashinfer.single_prefill_with_kv_cache_return_lse.keywords == {"return_lse": True}
    for name in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"):
        wrapper = getattr(flashinfer, name)
        assert wrapper.begin_forward is wrapper.plan and callable(wrapper.end_forward)
    for name in flashinfer.__all__:
        assert getattr(flashinfer, name) is not None
    for module in ("decode", "prefill", "cascade", "page", "rope", "quantization"):
        assert getattr(flashinfer, module).__name__ == f"cupyattn.compat.flashinfer.{module}"


def test_own_parameters_are_by_keyword():
    for name in ("BatchDecodeWithPagedKVCacheWrapper", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper"):
        parameter = inspect.signature(getattr(flashinfer, name)).parameters["max_pages_per_request"]
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is None


def test_import_brings_no_array_library():
    code = "import sys, cupyattn.compat.flashinfer; print({'cupy', 'torch', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"


# ----------------------------------------------------------------------------------------- what plans refuse, by name


def i32(*numbers):
    return np.array(numbers, np.int32)


GOOD = {
    "indptr": i32(0, 1, 4),
    "indices": i32(7, 0, 3, 5),
    "last_page_len": i32(5, 16),
    "num_qo_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "page_size": 16,
}
BAD_PLANS = {
    "decreasing": (
        {"indptr": i32(0, 4, 1)},
        "indptr: got 4 followed by 1 at [2], expected entries that never decrease",
    ),
    "first": ({"indptr": i32(1, 2, 4)}, "indptr: got 1 as its first entry, expected 0"),
    "beyond": (
        {"indptr": i32(0, 1, 5)},
        "indptr: got 5 as its last entry, expected at most 4, as indices has 4 entries",
    ),
    "longer": ({"indptr": i32(0, 1, 2, 4)}, "indptr: got 4 entries, expected 3: one more than last_page_len has"),
    "int64": ({"indptr": np.array([0, 1, 4])}, "indptr: got int64, expected int32: pass indptr."),
    "float": ({"indices": np.zeros(4)}, "indices: got float64, expected int32"),
    "2-D": ({"indices": np.zeros((2, 2), np.int32)}, "indices: got 2-D shape (2, 2), expected 1-D"),
    "empty last page": (
        {"last_page_len": i32(5, 0)},
        "last_page_len: got 0 for sequence 1, expected 1 to page_size 16",
    ),
    "overfull": ({"last_page_len": i32(17, 1)}, "last_page_len: got 17 for sequence 0, expected 1 to page_size 16"),
    "heads": ({"num_kv_heads": 3}, "num_qo_heads: got 8, expected a multiple of num_kv_heads 3"),
    "no heads": ({"num_kv_heads": 0}, "num_kv_heads: got 0, expected at least 1"),
    "head_dim": ({"head_dim": 257}, "head_dim_qk: got 257, expected 1 to 256"),
    "page_size": ({"page_size": 513}, "page_size: got 513, expected 1 to 512"),
    "page_size 0": ({"page_size": 0}, "page_size: got 0, expected 1 to 512"),
    "page_size float": ({"page_size": 16.0}, "page_size: got 16.0, expected an int"),
    "encoding": (
        {"pos_encoding_mode": "ROPE"},
        "pos_encoding_mode: got 'ROPE', expected 'NONE' or 'ROPE_LLAMA' or 'AL",
    ),
    "window": ({"window_left": -2}, "window_left: got -2, expected at least -1"),
    "cap": ({"logits_soft_cap": -1.0}, "logits_soft_cap: got -1.0, expected 0 or a finite number above it"),
    "scale": ({"sm_scale": float("nan")}, "sm_scale: got nan, expected a finite number"),
    "scale array": ({"sm_scale": np.ones(1)}, "sm_scale: got array([1.]), expected a number or None"),
    "theta": ({"rope_theta": 0.0}, "rope_theta: got 0.0, expected a finite number above 0"),
    "q_data_type": ({"q_data_type": "int8"}, "q_data_type: got int8, expected float16 or bfloat16 or float32"),
    "kv_data_type": ({"kv_data_type": "float32"}, "kv_data_type: got float32, expected float16 or float8_e4m3fn"),
    "o_data_type": ({"o_data_type": "bfloat16"}, "o_data_type: got bfloat16, expected float16"),
    "alibi and cap": (
        {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 1.0},
        "logits_soft_cap: got 1.0, expected None or",
    ),
    "rope and fp8": (
        {"pos_encoding_mode": "ROPE_LLAMA", "kv_data_type": "e4m3"},
        "pos_encoding_mode: got 'ROPE_LLAMA', ",
    ),
    "rope of odd": (
        {"pos_encoding_mode": "ROPE_LLAMA", "head_dim": 63},
        "head_dim_qk: got 63, expected an even number",
    ),
    "split": ({"fixed_split_size": 4}, "fixed_split_size: got a value, expected None"),
    "window_right": ({"window_right": 1}, "window_right: got 1, expected 0"),
    "is_causal": ({"is_causal": True}, "is_causal: got True, expected False with q_len_per_req 1"),
    "q_len_per_req": (
        {"q_len_per_req": 6},
        "last_page_len: got a sequence of 5 tokens, expected at least q_len_per_req 6",
    ),
    "seq_lens": ({"seq_lens": i32(17, 1)}, "seq_lens: got 17 for sequence 0, expected 0 to 16, which its pages hold"),
    "block_tables": (
        {"block_tables": np.zeros((2, 2), np.int32)},
        "block_tables: got shape (2, 2), expected (2, at least 3)",
    ),
    "list": ({"indptr": [0, 1, 4]}, "indptr: got a list, expected an array"),
}


@over_libs()
@pytest.mark.parametrize("case", BAD_PLANS)
def test_decode_plan_refuses(lib, case):
    changed, message = BAD_PLANS[case]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace(64))
    arguments = {name: lib.put(x) if isinstance(x, np.ndarray) else x for name, x in (GOOD | changed).items()}
    if case == "scale array":
        arguments["sm_scale"] = changed["sm_scale"]
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
        wrapper.plan(**arguments)
    with pytest.raises(RuntimeError, match="plan: got run before plan"):  # it was refused as a whole
        wrapper.run(lib.put(np.ones((2, 8, 64), np.float16)), lib.put(np.ones((8, 2, 16, 2, 64), np.float16)))


GOOD_PREFILL = {
    "qo_indptr": i32(0, 3, 5),
    "paged_kv_indptr": i32(0, 1, 4),
    "paged_kv_indices": i32(7, 0, 3, 5),
    "paged_kv_last_page_len": i32(5, 16),
    "num_qo_heads": 8,
    "num_kv_heads": 2,
    "head_dim_qk": 64,
    "page_size": 16,
}
BAD_PREFILLS = {
    "qo decreasing": ({"qo_indptr": i32(0, 3, 2)}, "qo_indptr: got 3 followed by 2 at [2]"),
    "qo length": ({"qo_indptr": i32(0, 3)}, "qo_indptr: got 2 entries, expected 3, as many as paged_kv_indptr has"),
    "qo int64": ({"qo_indptr": np.array([0, 3, 5])}, "qo_indptr: got int64, expected int32"),
    "pages": ({"paged_kv_indptr": i32(0, 2, 1)}, "paged_kv_indptr: got 2 followed by 1 at [2]"),
    "last page": (
        {"paged_kv_last_page_len": i32(0, 16)},
        "paged_kv_last_page_len: got 0 for sequence 0, expected 1 to",
    ),
    "mask size": ({"custom_mask": np.ones(5, bool)}, "custom_mask: got 5 elements, expected 111: queries times keys"),
    "mask dtype": ({"custom_mask": np.ones(111, np.int8)}, "custom_mask: got int8, expected bool"),
    "packed size": (
        {"packed_custom_mask": np.ones(15, np.uint8)},
        "packed_custom_mask: got shape (15,), expected (14,): every sequence's mask begins a new byte",
    ),
    "packed dtype": (
        {"packed_custom_mask": np.ones(14, np.int8)},
        "packed_custom_mask: got int8, expected uint8",
    ),
    "alibi": ({"pos_encoding_mode": "ALIBI"}, "causal: got False, expected True beside pos_encoding_mode='ALIBI'"),
    "items": ({"prefix_len_ptr": i32(1, 1)}, "prefix_len_ptr: got a value, expected None"),
    "items length": ({"token_pos_in_items_len": 4}, "token_pos_in_items_len: got a value, expected None"),
    "head_dim_vo": ({"head_dim_vo": 0}, "head_dim_vo: got 0, expected 1 to 256"),
}


@over_libs()
@pytest.mark.parametrize("case", BAD_PREFILLS)
def test_prefill_plan_refuses(lib, case):
    changed, message = BAD_PREFILLS[case]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(64))
    arguments = {name: lib.put(x) if isinstance(x, np.ndarray) else x for name, x in (GOOD_PREFILL | changed).items()}
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
        wrapper.plan(**arguments)
    with pytest.raises(RuntimeError, match="plan: got run before plan"):
        wrapper.run(lib.put(np.ones((5, 8, 64), np.float16)), lib.put(np.ones((8, 2, 16, 2, 64), np.float16)))


@over_libs()
def test_masks_and_alibi(rng, lib):
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(64))
    arguments = {name: lib.put(x) if isinstance(x, np.ndarray) else x for name, x in GOOD_PREFILL.items()}
    mask = lib.put(rng.random(111) < 0.5)
    with pytest.raises(
        ValueError, match="pos_encoding_mode: got 'ALIBI', expected 'NONE' or 'ROPE_LLAMA' beside a custom"
    ):
        wrapper.plan(**arguments, custom_mask=mask, causal=True, pos_encoding_mode="ALIBI")


@over_libs()
def test_ragged_plan_refuses(lib):
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(lib.workspace(64))
    for ends, message in [
        ((i32(0, 3, 5), i32(0, 9)), "kv_indptr: got 2 entries, expected 3, as many as qo_indptr has"),
        ((i32(0, 3, 5), i32(0, 9, 8)), "kv_indptr: got 9 followed by 8 at [2]"),
        ((i32(0, 3, 5), i32(2, 9, 18)), "kv_indptr: got 2 as its first entry"),
        ((i32(), i32()), "qo_indptr: got an empty array"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            wrapper.plan(*lib.put(ends), 8, 2, 64)
    wrapper.plan(*lib.put((i32(0, 3, 5), i32(0, 9, 18))), 8, 2, 64)
    q, k = np.ones((5, 8, 64), np.float16), np.ones((18, 2, 64), np.float16)
    with pytest.raises(ValueError, match=re.escape("k: got shape (17, 2, 64), expected (18, 2, 64): (kv_indptr[-1], ")):
        wrapper.run(*lib.put((q, k[1:], k[1:])))
    with pytest.raises(ValueError, match=re.escape("v: got shape (18, 2, 63), expected (18, 2, 64)")):
        wrapper.run(*lib.put((q, k, k[..., 1:])))
    with pytest.raises(NotImplementedError, match="o_scale: got a value, expected None"):
        wrapper.run(*lib.put((q, k, k)), o_scale=2.0)


# ------------------------------------------------------------------------------------------------ what runs refuse


def planned_decode(lib: Lib, layout: str = "NHD"):
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace(1 << 22), layout)
    wrapper.plan(**{name: lib.put(x) if isinstance(x, np.ndarray) else x for name, x in GOOD.items()})
    return wrapper


Q, PAGES = np.ones((2, 8, 64), np.float16), np.ones((8, 16, 2, 64), np.float16)
PAIR = (PAGES, PAGES)
BAD_RUNS = {
    "q rows": (
        (Q[:1], PAIR),
        "q: got shape (1, 8, 64), expected (2, 8, 64): (rows, num_qo_heads, head_dim), as planned",
    ),
    "q dtype": (
        (Q.astype(np.float32), PAIR),
        "q: got float32, expected float16, the q_data_type that plan was given or",
    ),
    "k dtype": ((Q, (PAGES.astype(np.float32), PAGES)), "k: got float32, expected float16, the kv_data_type that plan"),
    "v dtype": ((Q, (PAGES, PAGES.astype(np.float32))), "v: got float32, expected float16, the kv_data_type that plan"),
    "layout": (
        (Q, (PAGES.swapaxes(1, 2).copy(),) * 2),
        "as planned for kv_layout='NHD'; this would be kv_layout='HND'",
    ),
    "page_size": (
        (Q, (PAGES[:, :8].copy(),) * 2),
        "paged_kv_cache: got k of shape (8, 8, 2, 64), expected (num_pages, ",
    ),
    "kv heads": ((Q, (PAGES[:, :, :1].copy(),) * 2), "paged_kv_cache: got k of shape (8, 16, 1, 64), expected"),
    "v head_dim": ((Q, (PAGES, PAGES[..., :32].copy())), "paged_kv_cache: got v of shape (8, 16, 2, 32), expected"),
    "too few pages": (
        (Q, (PAGES[:5], PAGES[:5])),
        "indices: got page 7 at [0], of sequence 0, expected 0 to 4, as the cache",
    ),
    "pages of v": ((Q, (PAGES, PAGES[:7])), "paged_kv_cache: got v of 7 pages, expected as many as k has, 8"),
    "one array": (
        (Q, PAGES),
        "paged_kv_cache: got shape (8, 16, 2, 64), expected (num_pages, 2, page_size, num_kv_heads, ",
    ),
    "three arrays": ((Q, (PAGES,) * 3), "paged_kv_cache: got 3 arrays, expected the two of (k_cache, v_cache)"),
    "no array": ((Q, None), "paged_kv_cache: got NoneType, expected (num_pages, 2, page_size"),
}


@over_libs()
@pytest.mark.parametrize("case", BAD_RUNS)
@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
def test_decode_run_refuses(lib, case, before):
    """In the first run, and where a good one went before."""
    (q, cache), message = BAD_RUNS[case]
    if case == "too few pages" and lib.name in ("cupy", "torch-cuda"):
        pytest.skip("page ids on a device are not read")
    wrapper = planned_decode(lib)
    if before:
        wrapper.run(*lib.put((Q, PAIR)))
    out = lib.put(np.full((2, 8, 64), 7, np.float16))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        wrapper.run(lib.put(q), lib.put(cache), out=out)
    assert (lib.get(out) == 7).all()
    wrapper.run(*lib.put((Q, PAIR)))


@over_libs()
def test_decode_run_refuses_options(lib):
    wrapper, here = planned_decode(lib), lib.put((Q, PAIR))
    wide = np.zeros((2, 8, 65), np.float16)
    for options, message in [
        ({"out": lib.put(wide)}, "out: got shape (2, 8, 65), expected (2, 8, 64)"),
        ({"out": lib.put(wide[..., 1:].astype(np.float32))}, "out: got float32, expected float16, as q has"),
        ({"lse": lib.put(np.zeros((8, 2), np.float32)), "return_lse": True}, "lse: got shape (8, 2), expected (2, 8)"),
        ({"lse": lib.put(np.zeros((2, 8), np.float16)), "return_lse": True}, "lse: got float16, expected float32"),
        ({"window_left": 3}, "window_left: got 3, expected None or -1, as planned"),
        ({"q_len_per_req": 2}, "q_len_per_req: got 2, expected None or 1, as planned"),
        ({"k_scale": 0.0}, "k_scale: got 0.0, expected a finite number above 0"),
        ({"v_scale": "2"}, "v_scale: got '2', expected a number or None"),
        ({"kv_cache_sf": here[1]}, "kv_cache_sf: got a value, expected None"),
    ]:
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
            wrapper.run(*here, **options)
    with pytest.raises(TypeError, match="args: got 1 arguments, expected none"):
        wrapper.run(*here, 3)


def test_arrays_of_another_library_than_the_workspace():
    torch = pytest.importorskip("torch")
    wrapper = planned_decode(Lib("numpy"))
    with pytest.raises(
        ValueError, match="q: got a torch array on cpu, expected one of numpy on cpu, as float_workspace_buf"
    ):
        wrapper.run(torch.ones((2, 8, 64), dtype=torch.float16), PAIR)


@over_libs()
def test_own_block_table_is_not_for_what_goes_by_page_ids(rng, lib):
    table = lib.put(np.zeros((2, 3), np.int32))
    here = {name: lib.put(x) if isinstance(x, np.ndarray) else x for name, x in GOOD.items()}
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace(64))
    message = "block_tables: got an array, expected None beside ROPE_LLAMA and custom masks"
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**here, block_tables=table, pos_encoding_mode="ROPE_LLAMA")
    here = {name: lib.put(x) if isinstance(x, np.ndarray) else x for name, x in GOOD_PREFILL.items()}
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(64))
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**here, block_tables=table, custom_mask=lib.put(rng.random(111) < 0.5))


@over_libs()
def test_what_is_no_array(lib):
    """Refused in the first run, and where a good one went before."""
    wrapper = planned_decode(lib)
    for _ in range(2):
        for q, cache, message in [
            (None, PAIR, "q: got None, expected an array"),
            ([[1.0]], PAIR, "q: got a list, expected an array"),
            (
                Q,
                (PAGES, None),
                "paged_kv_cache[1]: got NoneType, expected (num_pages, page_size, num_kv_heads, head_dim)",
            ),
        ]:
            q = lib.put(q) if isinstance(q, np.ndarray) else q
            with pytest.raises((TypeError, ValueError), match=re.escape(message)):
                wrapper.run(q, lib.put(cache))
        wrapper.run(*lib.put((Q, PAIR)))


@over_libs()
def test_run_before_plan(lib):
    q = lib.put(Q)
    message = "plan: got run before plan, expected plan first, which says where the sequences are"
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace(64))
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(64))
    calls = [
        lambda: decode.run(q, lib.put(PAIR)),
        lambda: decode.run(q, lib.put(PAIR), window_left=3),
        lambda: decode.forward(q, lib.put(PAIR)),
        lambda: prefill.run(q, lib.put(PAIR)),
        lambda: prefill.run(q, lib.put(PAIR), window_left=3),
        lambda: flashinfer.BatchPrefillWithRaggedKVCacheWrapper(lib.workspace(64)).run(q, q, q),
        lambda: flashinfer.MultiLevelCascadeAttentionWrapper(2, lib.workspace(64)).run(q, lib.put(PAIR)),
        lambda: flashinfer.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(lib.workspace(64)).forward(
            q, q, q, lib.put(PAIR)
        ),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=message):
            call()


# ------------------------------------------------------------------------------------------- wrappers and workspaces


@over_libs()
def test_constructors_refuse(lib):
    buffers = [lib.put(np.zeros(size, np.int32)) for size in (4, 12, 3)]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    for arguments, options, message in [
        ((lib.workspace(64), "HDN"), {}, "kv_layout: got 'HDN', expected 'NHD' or 'HND'"),
        ((lib.workspace(64),), {"backend": "fa9"}, "backend: got 'fa9', expected 'auto' or 'fa2'"),
        ((lib.workspace(64),), {"jit_args": [1]}, "jit_args: got a value, expected None"),
        ((None,), {}, "float_workspace_buffer: got None, expected an array"),
        (
            (lib.workspace(64), "NHD", True),
            {},
            "paged_kv_indptr_buffer: got None, expected an int32 array, as use_cuda_",
        ),
        (
            (lib.workspace(64), "NHD", True, False, *buffers[::-1]),
            {},
            "paged_kv_indptr_buffer: got 3 entries, expected 5",
        ),
        (
            (lib.workspace(64), "NHD", True, False, *buffers),
            {"max_pages_per_request": 0},
            "max_pages_per_request: got 0, expected at least 1",
        ),
    ]:
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
            wrapper(*arguments, **options)


def test_small_workspace():
    check_workspace(1000, 1000)
    with pytest.raises(
        ValueError, match="float_workspace_buffer: got 999 bytes, expected at least 1000, which the partial"
    ):
        check_workspace(999, 1000)


@pytest.mark.gpu
@pytest.mark.parametrize("lib", [Lib("cupy")], ids=["cupy"])
def test_small_workspace_on_a_gpu(rng, lib):
    p, q = paged(rng, [5000, 3000], 16, dtype="float16"), normal(rng, (2, 8, 64), "float16")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(lib.workspace(16))
    wrapper.plan(*lib.put(p.table), 8, 2, 64, 16)
    with pytest.raises(ValueError, match="float_workspace_buffer: got 16 bytes, expected at least"):
        wrapper.run(lib.put(q), p.cache(lib))
    wrapper.reset_workspace_buffer(lib.workspace(), None)
    assert np.isfinite(lib.get(wrapper.run(lib.put(q), p.cache(lib)))).all()


@over_libs()
def test_reset_workspace_buffer(lib):
    wrapper = planned_decode(lib)
    wrapper.reset_workspace_buffer(lib.workspace(1 << 23), lib.workspace(64))
    assert wrapper._home.workspace_bytes == 1 << 23
    wrapper.run(*lib.put((Q, PAIR)))
    with pytest.raises(TypeError, match="float_workspace_buffer: got None"):
        wrapper.reset_workspace_buffer(None, None)


@over_libs()
def test_graphs_refuse(rng, lib):
    """What the tables at one place cannot hold; they keep what they had."""
    sizes = {"indptr": 4, "indices": 12, "last_page_len": 3}
    buffers = [lib.put(np.zeros(size, np.int32)) for size in sizes.values()]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        lib.workspace(1 << 22), *buffers, max_pages_per_request=5
    )
    p, q = paged(rng, [5, 33, 17], 16), normal(rng, (3, 8, 64), "float32")
    options = {"q_data_type": "float32"}
    wrapper.plan(*lib.put(p.table), 8, 2, 64, 16, **options)
    before = lib.get(wrapper.run(lib.put(q), p.cache(lib))).copy()
    for lengths, changed, message in [
        (
            [5, 33],
            {},
            "indptr: got 3 entries, expected 4, the batch size of a wrapper for CUDA graphs being that of its",
        ),
        (
            [100, 17, 17],
            {},
            "indptr: got a sequence of 7 pages, expected at most 5: make the wrapper with a larger max_pages",
        ),
        ([80, 80, 80], {}, "indices: got 15 pages, expected at most 12, which the buffer for them has"),
        ([5, 33, 17], {"pos_encoding_mode": "ROPE_LLAMA"}, "pos_encoding_mode: got 'ROPE_LLAMA', expected 'NONE' in a"),
    ]:
        other = paged(rng, lengths, 16)
        with pytest.raises(ValueError, match=re.escape(message)):
            wrapper.plan(*lib.put(other.table), 8, 2, 64, 16, **options, **changed)
        assert lib.get(wrapper.run(lib.put(q), p.cache(lib))).tobytes() == before.tobytes()
    wrapper.plan(*lib.put(p.table), 8, 2, 64, 16, **options, pos_encoding_mode="ALIBI")
    with pytest.raises(ValueError, match="return_lse: got True beside ALIBI"):
        wrapper.run(lib.put(q), p.cache(lib), return_lse=True)


@over_libs()
def test_prefill_graphs_refuse(rng, lib):
    buffers = [lib.put(np.zeros(size, np.int32)) for size in (3, 3, 12, 2)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(1 << 22), "NHD", True, *buffers)
    p, q = paged(rng, [20, 40], 16), normal(rng, (6, 8, 64), "float32")
    options = {"q_data_type": "float32", "causal": True}
    wrapper.plan(lib.put(i32(0, 2, 6)), *lib.put(p.table), 8, 2, 64, 16, **options)
    before = lib.get(wrapper.run(lib.put(q), p.cache(lib))).copy()
    mask = lib.put(np.ones(2 * 20 + 4 * 40, bool))
    for ends, changed, message in [
        (i32(0, 2, 7), {}, "qo_indptr: got 7 rows, expected at most 6, as in this wrapper's first plan"),
        (i32(0, 2, 6), {"custom_mask": mask}, "custom_mask: got a mask, expected None in a wrapper for CUDA graphs"),
        (
            i32(0, 1, 2),
            {"kv_data_type": "float8_e4m3fn"},
            "kv_data_type: got float8_e4m3fn, expected float32 in a prefill",
        ),
        (
            i32(0, 1, 2),
            {"pos_encoding_mode": "ROPE_LLAMA"},
            "pos_encoding_mode: got 'ROPE_LLAMA', expected 'NONE' in a",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            wrapper.plan(lib.put(ends), *lib.put(p.table), 8, 2, 64, 16, **(options | changed))
        assert lib.get(wrapper.run(lib.put(q), p.cache(lib))).tobytes() == before.tobytes()
    with pytest.raises(ValueError, match="qo_indptr_buf: got None"):
        flashinfer.BatchPrefillWithPagedKVCacheWrapper(lib.workspace(64), "NHD", True, None, *buffers[1:])


@over_libs()
def test_cascades_refuse(lib):
    with pytest.raises(ValueError, match="num_levels: got 0, expected at least 1"):
        flashinfer.MultiLevelCascadeAttentionWrapper(0, lib.workspace(64))
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, lib.workspace(1 << 22))
    ends = [i32(0, 2), i32(0, 1, 2)]
    tables = [[i32(0, 1), i32(0, 1, 2)], [i32(3), i32(0, 1)], [i32(16), i32(4, 5)]]
    sizes = 8, 2, 64, 16
    with pytest.raises(ValueError, match="qo_indptr_arr: got 1 arrays, expected 2, one for each level"):
        wrapper.plan(lib.put(ends[:1]), *map(lib.put, tables), *sizes)
    with pytest.raises(TypeError, match="paged_kv_indices_arr: got NoneType, expected a list of 2 arrays"):
        wrapper.plan(lib.put(ends), lib.put(tables[0]), None, lib.put(tables[2]), *sizes)
    wrapper.plan(lib.put(ends), *map(lib.put, tables), *sizes)
    wrapper.run(*lib.put((Q, PAIR)))
    tables[2] = [i32(16), i32(4, 17)]
    with pytest.raises(ValueError, match="paged_kv_last_page_len: got 17 for sequence 1"):
        wrapper.plan(lib.put(ends), *map(lib.put, tables), *sizes)
    with pytest.raises(RuntimeError, match="plan: got run before plan"):
        wrapper.run(*lib.put((Q, PAIR)))


# --------------------------------------------------------------------------------------------- functions by themselves


@over_libs()
def test_single_calls_refuse(rng, lib):
    q, k = lib.put(np.ones((5, 8, 64), np.float16)), lib.put(np.ones((9, 2, 64), np.float16))
    one = lib.put(np.ones((8, 64), np.float16))
    wide, other = lib.put(np.ones((9, 2, 63), np.float16)), lib.put(np.ones((9, 2, 64), np.float32))
    mask = lib.put(rng.random((5, 9)) < 0.5)
    three = lib.put(np.ones((9, 3, 64), np.float16))
    prefill, decode = flashinfer.single_prefill_with_kv_cache, flashinfer.single_decode_with_kv_cache
    for call, message in [
        (lambda: prefill(one, k, k), "q: got shape (8, 64), expected (queries, num_qo_heads, head_dim)"),
        (lambda: decode(q, k, k), "q: got shape (5, 8, 64), expected (num_qo_heads, head_dim)"),
        (lambda: prefill(q, k, k, kv_layout="DNH"), "kv_layout: got 'DNH', expected 'NHD' or 'HND'"),
        (
            lambda: prefill(q, k, k, kv_layout="HND"),
            "k: got 9 heads, of shape (9, 2, 64), expected a divisor of q's 8 for kv_layout='HND'; "
            "this would be kv_layout='NHD'",
        ),
        (lambda: prefill(q, three, three), "k: got 3 heads, of shape (9, 3, 64), expected a divisor of q's 8 for"),
        (lambda: prefill(q, k, k[:8]), "v: got (8, 2) keys and heads, expected k's (9, 2)"),
        (lambda: prefill(q, wide, k), "k: got head_dim 63, expected q's 64"),
        (lambda: prefill(q, other, other), "k: got float32, expected q's dtype float16, or an FP8 one"),
        (lambda: prefill(q, k, k, o_dtype="float32"), "o_dtype: got float32, expected float16"),
        (lambda: prefill(q, k, k, custom_mask=mask[:4]), "custom_mask: got 36 elements, expected 45"),
        (lambda: prefill(q, k, k, pos_encoding_mode="ALIBI"), "causal: got False, expected True beside"),
        (lambda: prefill(q, k, k, kv_cache_sf=(k, k)), "kv_cache_sf: got a value, expected None"),
        (
            lambda: decode(one, k[0], k[0]),
            "k: got shape (2, 64), expected (rows, num_kv_heads, head_dim) for kv_layout",
        ),
    ]:
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=re.escape(message)):
            call()


@over_libs()
def test_merges_refuse(lib):
    v, s = np.ones((5, 4, 64), np.float16), np.ones((5, 4), np.float32)
    for states, message in [
        ((v, s, v[:4], s[:4]), "v_b: got float16 of shape (4, 4, 64), expected v_a's float16 of shape (5, 4, 64)"),
        ((v, s, v.astype(np.float32), s), "v_b: got float32 of shape (5, 4, 64), expected v_a's float16"),
        ((v, s.T.copy(), v, s), "s_a: got shape (4, 5), expected (5, 4): (seq_len, num_heads), as in v_a"),
        ((v[0], s, v, s), "v_a: got shape (4, 64), expected (seq_len, num_heads, head_dim)"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            flashinfer.merge_state(*lib.put(states))
    here, weights = lib.put([v, s])
    with pytest.raises(ValueError, match=re.escape("mask: got shape (4,), expected (5,)")):
        flashinfer.merge_state_in_place(here, weights, *lib.put((v + v, s)), lib.put(np.ones(4, bool)))
    assert lib.get(here).tobytes() == v.tobytes() and lib.get(weights).tobytes() == s.tobytes()
    with pytest.raises(
        ValueError, match=re.escape("v: got shape (5, 4, 64), expected (seq_len, num_states, num_heads, h")
    ):
        flashinfer.merge_states(*lib.put((v, s)))
    with pytest.raises(ValueError, match=re.escape("s: got shape (5, 3, 4), expected (5, 2, 4)")):
        flashinfer.merge_states(*lib.put((np.ones((5, 2, 4, 64), np.float16), np.ones((5, 3, 4), np.float32))))


@over_libs()
def test_append_refuses(rng, lib):
    """And has written nothing."""
    if lib.name in ("cupy", "torch-cuda"):
        pytest.skip("contents of index arrays on a device are not read")
    p = paged(rng, [10, 33], 5)
    k, v = normal(rng, (2, 2, 2, 64), "float32")
    good = {"owner": i32(0, 1), "place": i32(9, 32), "indices": p.indices, "indptr": p.indptr, "last": p.last}
    for changed, message in [
        ({"owner": i32(0, 2)}, "batch_indices: got 2 at [1], expected 0 to 1, or -1 to pass a row over"),
        ({"owner": i32(0, -2)}, "batch_indices: got -2 at [1]"),
        ({"owner": i32(0)}, "batch_indices: got 1 entries, expected 2, one for each row of append_key"),
        (
            {"place": i32(10, 32)},
            "positions: got 10 at [0], expected 0 to 9: sequence 0 has 10 tokens, the new ones incl",
        ),
        ({"place": i32(9, -1)}, "positions: got -1 at [1]"),
        ({"place": np.array([9.0, 32.0])}, "positions: got float64, expected int32 or int64: pass positions."),
        ({"indices": p.indices + 20}, "kv_indices: got page"),
        ({"indptr": i32(0, 9, 2)}, "kv_indptr: got 9 followed by 2 at [2]"),
        ({"last": i32(6, 3)}, "kv_last_page_len: got 6 for sequence 0, expected 1 to page_size 5"),
    ]:
        at = {name: lib.put(x) for name, x in (good | changed).items()}
        cache = p.cache(lib)
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            flashinfer.append_paged_kv_cache(
                *lib.put((k, v)), at["owner"], at["place"], cache, at["indices"], at["indptr"], at["last"]
            )
        for array, held in zip(cache, (p.k, p.v), strict=True):
            assert lib.get(array).tobytes() == held.tobytes()
    table = lib.put((p.indices, p.indptr, p.last))
    with pytest.raises(TypeError, match="append_key: got float16, expected float32, as paged_kv_cache is"):
        flashinfer.append_paged_kv_cache(
            *lib.put((k.astype(np.float16), v)), *lib.put((i32(0, 1), i32(9, 32))), p.cache(lib), *table
        )
    with pytest.raises(ValueError, match="kv_layout: got 'NDH', expected 'NHD' or 'HND'"):
        flashinfer.append_paged_kv_cache(*lib.put((k, v, i32(0, 1), i32(9, 32))), p.cache(lib), *table, "NDH")
    with pytest.raises(ValueError, match="append_key: got 2 heads, expected 5, as .*; this would be kv_layout='NHD'"):
        flashinfer.append_paged_kv_cache(*lib.put((k, v, i32(0, 1), i32(9, 32))), p.cache(lib), *table, "HND")


@over_libs()
def test_rope_refuses(lib):
    """Both arrays are looked at before either is rotated."""
    q, k, ends, first = np.ones((5, 8, 64), np.float16), np.ones((5, 2, 64), np.float16), i32(0, 5), i32(0)
    for arrays, options, message in [
        ((q, k[:4], ends, first), {}, "k: got shape (4, 2, 64), expected 5 rows of head_dim 64, as in q"),
        ((q, k.astype(np.float32), ends, first), {}, "k: got float32 of"),
        ((q[0], k, ends, first), {}, "q: got shape (8, 64), expected (nnz, num_q_heads, head_dim)"),
        ((q, k, ends, i32(0, 1)), {}, "offsets: got 2 entries, expected 1, one fewer than indptr has"),
        ((q, k, np.array([0.0, 5.0]), first), {}, "indptr: got float64, expected int32 or int64"),
        ((q, k, ends, first), {"rotary_dim": 33}, "rotary_dim: got 33, expected an even number"),
        ((q, k, ends, first), {"rotary_dim": 66}, "rotary_dim: got 66, expected 2 to 64"),
        ((q, k, ends, first), {"rope_scale": 0}, "rope_scale: got 0.0, expected a finite number above 0"),
    ]:
        there = lib.put(list(arrays))
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            flashinfer.apply_rope_inplace(*there, **options)
        assert lib.get(there[0]).tobytes() == arrays[0].tobytes()
    with pytest.raises(ValueError, match=re.escape("pos_ids: got shape (4,), expected (5,), one for each row")):
        flashinfer.apply_rope_pos_ids(*lib.put((q, k, i32(0, 1, 2, 3))))
    with pytest.raises(ValueError, match="high_freq_factor: got 1.0, expected more than low_freq_factor 1.0"):
        flashinfer.apply_llama31_rope(*lib.put((q, k, ends, first)), high_freq_factor=1)
    table = np.ones((9, 64), np.float32)
    flat, places = np.ones((5, 512), np.float16), i32(0, 1, 2, 3, 4)
    with pytest.raises(TypeError, match="cos_sin_cache: got float16, expected float32"):
        flashinfer.apply_rope_with_cos_sin_cache(*lib.put((places, flat, flat)), 64, lib.put(table.astype(np.float16)))
    with pytest.raises(
        ValueError, match=re.escape("query: got shape (5, 512), expected (nnz, heads * head_size) with head")
    ):
        flashinfer.apply_rope_with_cos_sin_cache(*lib.put((places, flat, flat)), 60, lib.put(table))
    if lib.name in ("numpy", "torch"):
        with pytest.raises(ValueError, match="indptr: got 6 as its last entry, expected at most 5, as q has 5 rows"):
            flashinfer.apply_rope(*lib.put((q, k, i32(0, 6), first)))
        with pytest.raises(ValueError, match="positions: got 1 to 9, expected 0 to 8, the rows of cos_sin_cache"):
            flashinfer.apply_rope_with_cos_sin_cache(*lib.put((i32(1, 9, 2, 3, 4), flat, flat)), 64, lib.put(table))


@over_libs()
def test_index_functions_and_packing_refuse(lib):
    for call, message in [
        (lambda: flashinfer.packbits(lib.put(np.ones((2, 8), bool))), "x: got shape (2, 8), expected 1-D"),
        (
            lambda: flashinfer.packbits(lib.put(np.ones(8, bool)), "middle"),
            "bitorder: got 'middle', expected 'big' or 'lit",
        ),
        (
            lambda: flashinfer.segment_packbits(lib.put(np.ones(8, bool)), lib.put(i32(0, 5, 7))),
            "indptr: got 7 as its last entry, expected 8, the elements of x",
        ),
        (
            lambda: flashinfer.segment_packbits(lib.put(np.ones(8, bool)), lib.put(i32(0, 9, 8))),
            "indptr: got 9 followed by 8 at [2]",
        ),
        (
            lambda: flashinfer.get_batch_indices_positions(lib.put(starts([2, 3])), lib.put(i32(5)), 5),
            "seq_lens: got 1 entries, expected 2, one fewer than append_indptr has",
        ),
        (
            lambda: flashinfer.get_batch_indices_positions(*lib.put((i32(0, 2), i32(5))), -1),
            "nnz: got -1, expected at least 0",
        ),
        (
            lambda: flashinfer.get_batch_indices_positions(*lib.put((i32(0, 2), i32(5))), 2, lib.put(i32(1))),
            "batch_indices: got int32 of shape (1,), expected int32 of shape (2,)",
        ),
        (
            lambda: flashinfer.get_seq_lens(*lib.put((i32(0, 2), i32(5, 6))), 16),
            "kv_last_page_len: got 2 entries, expected 1, one fewer than kv_indptr has",
        ),
        (lambda: flashinfer.get_seq_lens(*lib.put((i32(0, 2), i32(5))), 0), "page_size: got 0, expected 1 to 512"),
    ]:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            call()
