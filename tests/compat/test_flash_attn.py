"""flash_attn's functions against the float64 oracle, their signatures, their edges, and the usage that people know.

Every function runs on NumPy, PyTorch and JAX arrays, and where there is a GPU on CuPy and PyTorch's there.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import subprocess
import sys

import numpy as np
import oracle
import pytest
from oracle import cumulative, normal
from test_arrays import in_library

import cupyattn
from cupyattn import arrays
from cupyattn.compat import flash_attn
from cupyattn.compat.flash_attn import bert_padding, caches, flash_attn_interface
from cupyattn.compat.table import recorded

DTYPES = ("float16", "bfloat16", "float32")
ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cupy", "torch-cuda")]
WRITABLE = ["numpy", "torch", *ON_GPU]
LIBRARIES = ["numpy", "torch", "jax", *ON_GPU]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


def put(library, array):
    """A copy of a NumPy array in a library; what is no array stays as it is."""
    if not isinstance(array, np.ndarray):
        return array
    if library == "cupy":
        return pytest.importorskip("cupy").asarray(array)
    if library == "torch-cuda":
        return in_library("torch", array).cuda()
    return in_library(library, array.copy())


def get(array):
    """An array of any library as NumPy's."""
    return np.array(arrays.host_array(arrays.view(array)))


def call(library, name, *given, **options):
    """A function of flash_attn on NumPy arrays that were put into a library."""
    options = {option: put(library, value) for option, value in options.items()}
    return getattr(flash_attn, name)(*(put(library, value) for value in given), **options)


def check(expected, out, lse, dtype):
    """Within the oracle's bounds; rows without keys have exactly zeros and +inf."""
    if lse is not None:
        lse, blind = get(lse), expected.keys == 0
        assert (lse[blind] == np.inf).all() and not (lse[~blind] == np.inf).any()
        lse[blind] = -np.inf
    expected.check(get(out), lse, dtype)


# ------------------------------------------------------------------------------------------------------- masks


MASKS = {
    "none": lambda rng, batch: {},
    "causal": lambda rng, batch: {"causal": True},
    "window": lambda rng, batch: {"window_size": (int(rng.integers(0, 6)), int(rng.integers(0, 6)))},
    "left": lambda rng, batch: {"window_size": [int(rng.integers(0, 6)), -1]},
    "causal window": lambda rng, batch: {"causal": True, "window_size": (int(rng.integers(0, 6)), 3)},
    "array window": lambda rng, batch: {"window_size": np.array([rng.integers(-9, 6), 4])},
    "softcap": lambda rng, batch: {"softcap": float(rng.uniform(1, 5))},
    "alibi": lambda rng, batch: {"alibi_slopes": rng.uniform(0.1, 1, HEADS).astype(np.float32)},
    "alibi of each": lambda rng, batch: {"alibi_slopes": rng.uniform(0.1, 1, (batch, HEADS)).astype(np.float32)},
    "alibi causal": lambda rng, batch: {"causal": True, "alibi_slopes": rng.uniform(0, 1, HEADS).astype(np.float32)},
    "scale": lambda rng, batch: {"softmax_scale": float(rng.uniform(0.1, 1)), "softcap": 0.0},
}


def for_oracle(masks):
    masks = {{"window_size": "window"}.get(name, name): value for name, value in masks.items()}
    if isinstance(masks.get("window"), np.ndarray):
        masks["window"] = tuple(max(int(side), -1) for side in masks["window"])
    return masks


def weights(q, k, **masks):
    """What softmax weights must be, (batch, seqlen_q, heads, seqlen_k): attention over values that are unit vectors."""
    batch, seqlen_k, kv_heads, _ = k.shape
    units = np.broadcast_to(np.eye(seqlen_k, dtype=q.dtype)[None, :, None], (batch, seqlen_k, kv_heads, seqlen_k))
    return oracle.attention(q, k, units, **masks)


# ---------------------------------------------------------------------------------------------- signatures


CALLS = recorded.signatures(recorded.FLASH_ATTN)
FLASH_ATTN_3 = (  # arguments of flash_attn_with_kvcache in FlashAttention-3, and learnable_sink and seqused_k of 4
    "page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale qv "
    "attention_chunk scheduler_metadata pack_gqa sm_margin learnable_sink seqused_k"
)


def test_own_arguments_are_by_keyword():
    """So that they take no place of 2.8's."""
    parameters = inspect.signature(flash_attn.flash_attn_with_kvcache).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(FLASH_ATTN_3.split())


def test_names_are_where_callers_import_them_from():
    for name in flash_attn.__all__:
        assert getattr(flash_attn, name) is getattr(flash_attn_interface, name)
    generation = importlib.import_module("cupyattn.compat.flash_attn.utils.generation")
    assert generation.InferenceParams is cupyattn.InferenceParams
    assert generation.allocate_inference_cache is cupyattn.allocate_inference_cache
    assert set(flash_attn.__all__) == {name for name in CALLS if "." not in name}


def test_no_array_library_is_imported():
    modules = "flash_attn, flash_attn.flash_attn_interface, flash_attn.bert_padding, flash_attn.utils.generation"
    named = ", ".join(f"cupyattn.compat.{module}" for module in modules.split(", "))
    code = f"import sys, {named}\nprint(sorted({{'torch', 'jax', 'cupy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------- dense


FORMS = ("apart", "kvpacked", "qkvpacked")


def dense_arguments(rng, form, dtype, seqlens=None):
    """(function, its arrays, q, k, v) for a batch of two."""
    if form == "qkvpacked":
        qkv = normal(rng, (2, int(rng.integers(1, 40)), 3, HEADS, HEAD_DIM), dtype)
        return "flash_attn_qkvpacked_func", (qkv,), *(qkv[:, :, i] for i in range(3))
    seqlen_q, seqlen_k = rng.integers(1, 40, 2) if seqlens is None else seqlens
    q = normal(rng, (2, seqlen_q, HEADS, HEAD_DIM), dtype)
    kv = normal(rng, (2, seqlen_k, 2, KV_HEADS, HEAD_DIM), dtype)
    k, v = kv[:, :, 0], kv[:, :, 1]
    if form == "kvpacked":
        return "flash_attn_kvpacked_func", (q, kv), q, k, v
    return "flash_attn_func", (q, k, v), q, k, v


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_dense(rng, library, form, masks):
    dtype = str(rng.choice(DTYPES))
    name, given, q, k, v = dense_arguments(rng, form, dtype)
    masks = MASKS[masks](rng, 2)
    expected = oracle.attention(q, k, v, **for_oracle(masks))
    out = call(library, name, *given, **masks)
    assert type(out) is type(put(library, q)) and arrays.view(out).dtype == dtype
    check(expected, out, None, dtype)

    out, lse, probabilities = call(library, name, *given, return_attn_probs=True, **masks)
    assert {type(result) for result in (out, lse, probabilities)} == {type(put(library, q))}
    check(expected, out, lse, dtype)
    assert arrays.view(probabilities).dtype == dtype
    assert tuple(probabilities.shape) == (2, HEADS, q.shape[1], k.shape[1])
    weights(q, k, **for_oracle(masks)).check(get(probabilities).swapaxes(1, 2), None, dtype)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("head_dim", [1, 7, 96])
def test_probabilities_of_more_keys_than_a_head_has_columns(rng, library, head_dim):
    q, k = normal(rng, (1, 5, 2, head_dim), "float32"), normal(rng, (1, 23, 1, head_dim), "float32")
    _, _, probabilities = call(library, "flash_attn_func", q, k, k, causal=True, return_attn_probs=True)
    weights(q, k, causal=True).check(get(probabilities).swapaxes(1, 2), None, "float32")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("seqlens", "masks", "blind"),
    [
        ((7, 3), {"causal": True}, 4),
        ((7, 3), {"causal": True, "window_size": (2, 5)}, 4),
        ((9, 3), {"window_size": (1, 2)}, 4),
        ((9, 3), {"window_size": (0, -1)}, 0),
        ((3, 7), {"causal": True}, 0),
        ((4, 0), {}, 4),
    ],
)
def test_rows_without_keys_give_zeros_and_plus_infinity(rng, library, seqlens, masks, blind):
    _, given, q, k, v = dense_arguments(rng, "apart", "float16", seqlens)
    expected = oracle.attention(q, k, v, **for_oracle(masks))
    assert (expected.keys[0, 0] == 0).sum() == blind  # the oracle knows them too
    out, lse, probabilities = call(library, "flash_attn_func", *given, return_attn_probs=True, **masks)
    check(expected, out, lse, "float16")
    assert (get(lse)[..., :blind] == np.inf).all() and (get(out)[:, :blind] == 0).all()
    assert (get(probabilities)[:, :, :blind] == 0).all()


def test_a_nan_score_is_no_missing_key(rng):
    q, k, v = normal(rng, (3, 1, 2, 1, 8), "float32")
    q[0, 0, 0, 0] = np.nan
    _, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert np.isnan(lse[0, 0, 0]) and np.isfinite(lse[0, 0, 1])


# --------------------------------------------------------------------------------------------------- packed


def packed_arguments(rng, form, dtype):
    """(function, its arrays and max lengths, q, k, v, cu_seqlens_q, cu_seqlens_k) for three sequences."""
    lengths_q, lengths_k = rng.integers(0, 30, (2, 3))
    lengths_q[rng.integers(3)] = rng.integers(1, 30)
    lengths_k = lengths_q if form == "qkvpacked" else lengths_k
    ends_q, ends_k = cumulative(lengths_q), cumulative(lengths_k)
    if form == "qkvpacked":
        qkv = normal(rng, (ends_q[-1], 3, HEADS, HEAD_DIM), dtype)
        given = (qkv, ends_q, int(lengths_q.max()))
        return "flash_attn_varlen_qkvpacked_func", given, *(qkv[:, i] for i in range(3)), ends_q, ends_k
    q, kv = normal(rng, (ends_q[-1], HEADS, HEAD_DIM), dtype), normal(rng, (ends_k[-1], 2, KV_HEADS, HEAD_DIM), dtype)
    k, v = kv[:, 0], kv[:, 1]
    places = (ends_q, ends_k, int(lengths_q.max()), int(lengths_k.max()) + 2)
    if form == "kvpacked":
        return "flash_attn_varlen_kvpacked_func", (q, kv, *places), q, k, v, ends_q, ends_k
    return "flash_attn_varlen_func", (q, k, v, *places), q, k, v, ends_q, ends_k


def check_varlen_weights(probabilities, dtype, q, k_of, ends_q, **masks):
    """One sequence after the other, and zeros behind each. k_of: the keys of sequence b."""
    slopes = masks.pop("alibi_slopes", None)
    probabilities = get(probabilities)
    for b in range(len(ends_q) - 1):
        queries, keys = q[None, ends_q[b] : ends_q[b + 1]], k_of(b)[None]
        own = slopes[b] if np.ndim(slopes) == 2 else slopes
        expected = weights(queries, keys, alibi_slopes=own, **masks)
        expected.check(probabilities[b : b + 1, :, : queries.shape[1], : keys.shape[1]].swapaxes(1, 2), None, dtype)
        assert not probabilities[b, :, queries.shape[1] :].any() and not probabilities[b, :, :, keys.shape[1] :].any()


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_packed(rng, library, form, masks):
    dtype = str(rng.choice(DTYPES))
    name, given, q, k, v, ends_q, ends_k = packed_arguments(rng, form, dtype)
    masks = MASKS[masks](rng, 3)
    expected = oracle.attention_varlen(q, k, v, ends_q, ends_k, **for_oracle(masks))
    out = call(library, name, *given, **masks)
    assert type(out) is type(put(library, q)) and arrays.view(out).dtype == dtype
    check(expected, out, None, dtype)

    out, lse, probabilities = call(library, name, *given, return_attn_probs=True, **masks)
    check(expected, out, lse, dtype)
    longest = (given[2], given[2]) if form == "qkvpacked" else given[-2:]
    assert type(probabilities) is type(out) and tuple(probabilities.shape) == (3, HEADS, *longest)
    check_varlen_weights(probabilities, dtype, q, lambda b: k[ends_k[b] : ends_k[b + 1]], ends_q, **for_oracle(masks))


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("library", LIBRARIES)
def test_packed_queries_over_blocks_of_any_size(rng, library, block_size, masks):
    dtype = str(rng.choice(DTYPES))
    lengths_q, lengths_k = rng.integers(1, 20, 3), rng.integers(0, 40, 3)
    pairs = [tuple(normal(rng, (2, n, KV_HEADS, HEAD_DIM), dtype)) for n in lengths_k]
    blocks, table = oracle.paged_cache(rng, pairs, block_size)
    k, v = blocks[:, 0].copy(), blocks[:, 1].copy()
    ends_q, ends_k = cumulative(lengths_q), cumulative(lengths_k)
    q = normal(rng, (ends_q[-1], HEADS, HEAD_DIM), dtype)
    masks = MASKS[masks](rng, 3)
    given = (q, k, v, ends_q, ends_k, int(lengths_q.max()), int(lengths_k.max()))
    options = {"block_table": table, "return_attn_probs": True} | masks
    out, lse, probabilities = call(library, "flash_attn_varlen_func", *given, **options)
    expected = oracle.attention_varlen(q, k, v, ends_q, ends_k, block_table=table, **for_oracle(masks))
    check(expected, out, lse, dtype)
    assert tuple(probabilities.shape) == (3, HEADS, *given[-2:])
    check_varlen_weights(probabilities, dtype, q, lambda b: pairs[b][0], ends_q, **for_oracle(masks))


@pytest.mark.parametrize("library", LIBRARIES)
def test_blocks_that_a_window_has_passed_may_have_any_entry(rng, library):
    keys = normal(rng, (20, KV_HEADS, HEAD_DIM), "float32")
    blocks, table = oracle.paged_cache(rng, [(keys, keys)], 4)
    table[0, 0], table[0, 1] = -1, oracle.JUNK_BLOCK
    q, masks = normal(rng, (2, HEADS, HEAD_DIM), "float32"), {"window": (9, 0)}
    caches = [np.nan_to_num(blocks[:, axis]) for axis in (0, 1)]  # the stand-in for such a block is one of these
    given = (q, *caches, cumulative([2]), cumulative([20]), 2, 20)
    options = {"block_table": table, "window_size": (9, 0), "return_attn_probs": True}
    out, lse, probabilities = call(library, "flash_attn_varlen_func", *given, **options)
    check(oracle.attention_varlen(q, keys, keys, cumulative([2]), cumulative([20]), **masks), out, lse, "float32")
    check_varlen_weights(probabilities, "float32", q, lambda b: keys, cumulative([2]), **masks)


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_behind_the_last_sequence(rng, library):
    q, k = normal(rng, (9, HEADS, HEAD_DIM), "float32"), normal(rng, (5, KV_HEADS, HEAD_DIM), "float32")
    places = (cumulative([2, 3]), cumulative([5, 0]), 3, 5)
    out, lse, _ = call(library, "flash_attn_varlen_func", q, k, k, *places, return_attn_probs=True)
    assert (get(out)[2:] == 0).all() and (get(lse)[:, 2:] == np.inf).all() and np.isfinite(get(lse)[:, :2]).all()


# --------------------------------------------------------------------------------------------------- caches


class Step:
    """A random step of a decoder: NumPy arguments of flash_attn_with_kvcache, and what must come of them."""

    def __init__(
        self, rng, store, seqlen_q=None, seqlen_new=0, rotary=None, leftpad=False, masks="none", room=40, lengths=None
    ):
        self.dtype = dtype = str(rng.choice(["float16", "bfloat16"]))
        batch = 3
        lengths = rng.integers(0, room - seqlen_new, batch) if lengths is None else np.array(lengths)
        pairs = [tuple(normal(rng, (2, n, KV_HEADS, HEAD_DIM), dtype)) for n in lengths]
        self.places = {"cache_seqlens": lengths.astype(np.int32)}
        if store == "paged":
            block_size = int(rng.choice([1, 5, 16, 256]))
            blocks, self.places["block_table"] = oracle.paged_cache(rng, pairs, block_size, room)
            self.caches = blocks[:, 0].copy(), blocks[:, 1].copy()
        else:
            entries = rng.permutation(5)[:batch] if store == "entries" else np.arange(batch)
            both = [oracle.dense_cache([pair[i] for pair in pairs], room, entries) for i in (0, 1)]
            spare = oracle.dense_cache([pairs[0][0]], room) if store == "larger" else both[0][:0]
            self.caches = tuple(np.concatenate([cache, spare]) for cache in both)
            if store == "entries":
                self.places["cache_batch_idx"] = entries.astype(np.int32)
        self.q = normal(rng, (batch, int(rng.integers(1, 6)) if seqlen_q is None else seqlen_q, HEADS, HEAD_DIM), dtype)
        self.options = MASKS[masks](rng, batch)
        if leftpad:
            self.places["cache_leftpad"] = rng.integers(0, lengths + 1).astype(np.int32)
        self.new = {}
        if seqlen_new:
            self.new = dict(zip("kv", normal(rng, (2, batch, seqlen_new, KV_HEADS, HEAD_DIM), dtype), strict=True))
        if rotary is not None:
            angles = np.outer(np.arange(room + 8), 100.0 ** -np.linspace(0, 1, 8))
            tables = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
            self.new |= dict(zip(("rotary_cos", "rotary_sin"), tables, strict=True)) | {"rotary_interleaved": rotary}

    def fill(self):
        """Let every row of the caches be one that may be read."""
        self.caches = tuple(np.where(np.isnan(cache), cache.dtype.type(0.5), cache) for cache in self.caches)

    def check(self, library, caches, out, lse):
        """The result, and that the caches hold what they held and the new rows, of which `caches` are the arrays."""
        masks, places = for_oracle(self.options), dict(self.places)
        left = tuple(get(cache) for cache in caches)
        batch = len(self.q)
        held = self.caches
        leftpad = {"cache_leftpad": places.pop("cache_leftpad")} if "cache_leftpad" in places else {}
        if not {"block_table", "cache_batch_idx"} & set(places):
            assert all(a[batch:].tobytes() == b[batch:].tobytes() for a, b in zip(left, self.caches, strict=True))
            left, held = (tuple(cache[:batch] for cache in pair) for pair in (left, self.caches))
        stored = {}
        if self.new:
            rows = self.new["k"], self.new["v"]
            rotary = {name: value for name, value in self.new.items() if name not in "kv"}
            oracle.check_caches(left, *oracle.append_range(*held, *rows, **places, **rotary))
            stored = {"stored": left}
        else:
            assert all(a.tobytes() == b.tobytes() for a, b in zip(left, held, strict=True))
        expected = oracle.attention_with_kvcache(self.q, *held, **self.new, **places, **leftpad, **masks, **stored)
        check(expected, out, lse, self.dtype)

    def run(self, library, **options):
        caches = [put(library, cache) for cache in self.caches]
        given = {name: put(library, x) for name, x in (self.places | self.new | self.options | options).items()}
        q = put(library, self.q)
        out, lse = flash_attn.flash_attn_with_kvcache(q, *caches, **given, return_softmax_lse=True)
        assert type(out) is type(lse) is type(q)
        self.check(library, caches, out, lse)
        return out, lse


STORES = ("dense", "larger", "entries", "paged")


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_reading_a_cache(rng, library, store, masks):
    Step(rng, store, masks=masks).run(library)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("library", WRITABLE)
def test_appending_in_place(rng, library, store, masks):
    Step(rng, store, seqlen_new=int(rng.integers(1, 5)), masks=masks).run(library)


@pytest.mark.parametrize("masks", ["none", "causal", "window", "causal window"])
@pytest.mark.parametrize("leftpad", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("library", WRITABLE)
def test_rotary_and_leftpad(rng, library, store, interleaved, leftpad, masks):
    seqlen = int(rng.integers(1, 5))
    Step(rng, store, seqlen, seqlen, rotary=interleaved, leftpad=leftpad, masks=masks).run(library)


@pytest.mark.parametrize("library", WRITABLE)
def test_positional_order_of_a_step(rng, library):
    """As the signature says, without a single name."""
    step = Step(rng, "dense", 2, 2, rotary=False, leftpad=True, masks="causal window")
    caches = [put(library, cache) for cache in step.caches]
    new, places = step.new, step.places
    given = (new["k"], new["v"], new["rotary_cos"], new["rotary_sin"], places["cache_seqlens"], None)
    given += (places["cache_leftpad"], None, 0.25, True, step.options["window_size"], 2.0, False)
    slopes = rng.uniform(0, 1, HEADS).astype(np.float32)
    given = [put(library, x) for x in (*given, slopes, 1, True)]
    out, lse = flash_attn.flash_attn_with_kvcache(put(library, step.q), *caches, *given)
    step.options |= {"softmax_scale": 0.25, "softcap": 2.0, "alibi_slopes": slopes}
    step.check(library, caches, out, lse)


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("library", WRITABLE)
def test_num_splits(rng, library, num_splits):
    Step(rng, "paged", 1, 1).run(library, num_splits=num_splits)


@pytest.mark.parametrize("kind", [int, np.int64])
@pytest.mark.parametrize("library", WRITABLE)
def test_one_length_for_all(rng, library, kind):
    step = Step(rng, "dense", 1, 1)
    step.fill()
    step.places["cache_seqlens"] = 7
    step.run(library, cache_seqlens=kind(7))


@pytest.mark.parametrize("library", LIBRARIES)
def test_all_of_the_cache_without_lengths(rng, library):
    step = Step(rng, "dense", masks="causal")
    step.fill()
    caches = [put(library, cache) for cache in step.caches]
    out, lse = call(library, "flash_attn_with_kvcache", step.q, *caches, causal=True, return_softmax_lse=True)
    check(oracle.attention(step.q, *step.caches, causal=True), out, lse, step.dtype)


@pytest.mark.parametrize("library", WRITABLE)
@pytest.mark.parametrize("seqlen_new", [0, 1, 3])
def test_steps_that_may_have_rows_without_keys(rng, library, seqlen_new):
    """Empty sequences, and more queries than keys: each is known by another sign on the host."""
    step = Step(rng, "paged", 3, seqlen_new, masks="causal", lengths=[0, 1, 9])
    _, lse = step.run(library)
    assert (get(lse)[0] == np.inf).sum() == HEADS * (3 - seqlen_new)


# ------------------------------------------------------------------------------------ FlashAttention-3's spellings


@pytest.mark.parametrize("masks", ["none", "causal", "window", "alibi of each", "softcap"])
@pytest.mark.parametrize("lengths", ["cache_seqlens", "seqused_k", "int", "none"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_packed_queries_over_a_cache(rng, library, store, lengths, masks):
    step = Step(rng, store, masks=masks)
    if lengths in ("int", "none"):
        step.fill()
    ends = cumulative(rng.integers(0, 7, 3))
    q = normal(rng, (ends[-1], HEADS, HEAD_DIM), step.dtype)
    places = dict(step.places)
    room = 40 if store != "paged" else places["block_table"].shape[1] * step.caches[0].shape[1]
    if lengths == "none" and store == "paged":
        places["block_table"][places["block_table"] >= len(step.caches[0])] = 0
    held = places.pop("cache_seqlens")
    held = {"int": np.full(3, 11, np.int32), "none": np.full(3, room, np.int32)}.get(lengths, held)
    length = {"int": {"cache_seqlens": 11}, "none": {}, "seqused_k": {"seqused_k": held}}
    length = length.get(lengths, {"cache_seqlens": held})
    table = places.get("block_table", places.get("cache_batch_idx", np.arange(3, dtype=np.int32)).reshape(3, -1))
    if store == "paged":
        places = {"page_table": table}
    options = {"cu_seqlens_q": ends, "max_seqlen_q": 7, "scheduler_metadata": object()} | step.options
    options |= {"cu_seqlens_k_new": ends, "pack_gqa": True, "sm_margin": 2, "return_softmax_lse": True}
    out, lse = call(library, "flash_attn_with_kvcache", q, *step.caches, **places, **length, **options)
    expected = oracle.attention_varlen(
        q, *step.caches, ends, block_table=table, seqused_k=held, **for_oracle(step.options)
    )
    check(expected, out, lse, step.dtype)
    assert tuple(lse.shape) == (HEADS, len(q))


@pytest.mark.parametrize("library", WRITABLE)
def test_other_names_of_the_same_arguments(rng, library):
    step = Step(rng, "paged", 2, 2, masks="causal")
    expected = step.run(library)
    given = {name: put(library, x) for name, x in (step.new | step.options).items()}
    caches = [put(library, cache) for cache in step.caches]
    got = flash_attn.flash_attn_with_kvcache(
        put(library, step.q),
        *caches,
        **given,
        page_table=put(library, step.places["block_table"]),
        seqused_k=put(library, step.places["cache_seqlens"]),
        return_softmax_lse=True,
    )
    step.check(library, caches, *got)
    assert all((get(a) == get(b)).all() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_learnable_sink(rng, library, packed):
    step, sinks = Step(rng, "paged", 2), normal(rng, (HEADS,), "float32")
    options = step.places | {"learnable_sink": sinks, "causal": True, "return_softmax_lse": True}
    expected = oracle.attention_with_kvcache(step.q, *step.caches, **step.places, sinks=sinks, causal=True)
    q = step.q
    if packed:
        q, options["cu_seqlens_q"] = q.reshape(6, HEADS, HEAD_DIM), cumulative([2, 2, 2])
    out, lse = call(library, "flash_attn_with_kvcache", q, *step.caches, **options)
    if packed:
        lse = np.moveaxis(get(lse).reshape(HEADS, 3, 2), 1, 0).copy()
        out = get(out).reshape(step.q.shape)
    check(expected, out, lse, step.dtype)


def test_descale_of_an_fp8_cache(rng):
    q, caches = normal(rng, (2, 1, HEADS, HEAD_DIM), "float16"), rng.integers(0, 100, (2, 2, 16, KV_HEADS, HEAD_DIM))
    caches = [cache.astype(np.uint8).view(oracle.FP8["float8_e4m3fn"]) for cache in caches]
    scales = {"k_descale": 0.5, "v_descale": rng.uniform(0.5, 2, KV_HEADS).astype(np.float32)}
    out, lse = flash_attn.flash_attn_with_kvcache(q, *caches, cache_seqlens=9, **scales, return_softmax_lse=True)
    bytes_of = [cache.view(np.uint8) for cache in caches]
    expected = oracle.attention_with_kvcache(
        q, *bytes_of, cache_seqlens=9, kv_dtype="float8_e4m3fn", k_scale=0.5, v_scale=scales["v_descale"]
    )
    check(expected, out, lse, "float16")


def scattered(library, array):
    """The same numbers in an array of the library whose head_dim lies far apart."""
    turned = put(library, np.ascontiguousarray(array.swapaxes(-1, -2)))
    return turned.swapaxes(turned.ndim - 1, turned.ndim - 2)


@pytest.mark.parametrize("library", WRITABLE)
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("flash_attn")])
def test_queries_keys_and_values_whose_head_dim_is_scattered(rng, library, name):
    """They are copied, as by flash_attn; caches are not, as there."""
    plain, apart = {}, {}
    for key, x in arguments(name).items():
        if not isinstance(x, np.ndarray):
            plain[key] = apart[key] = x
            continue
        numbers = normal(rng, x.shape, "float16") if x.dtype == np.float16 else x
        plain[key] = put(library, numbers.copy())
        apart[key] = scattered(library, numbers) if key in {"q", "k", "v", "kv", "qkv"} else put(library, numbers)
    assert any(arrays.view(x).strides[-1] != 1 for x in apart.values() if hasattr(x, "dtype"))
    call, with_cache = getattr(flash_attn, name), name == "flash_attn_with_kvcache"
    options = {} if with_cache else {"return_attn_probs": True}
    got, expected = call(**apart, **options), call(**plain, **options)
    for one, other in [(got, expected)] if with_cache else zip(got, expected, strict=True):
        assert get(one).tobytes() == get(other).tobytes()


def test_a_cache_whose_head_dim_is_scattered_is_refused():
    given = arguments("flash_attn_with_kvcache")
    given["k_cache"] = scattered("numpy", given["k_cache"])
    with pytest.raises(ValueError, match="^k_cache: got stride 2 in the last dimension"):
        flash_attn.flash_attn_with_kvcache(**given)


@pytest.mark.parametrize("name", ["attention_with_kvcache", "attention_varlen"])
def test_the_lse_is_what_the_kernels_wrote(rng, monkeypatch, name):
    """Rows without keys are theirs to know: nobody looks through the lse behind them, which would cost a kernel."""
    made, function = [], getattr(caches, name)
    monkeypatch.setattr(caches, name, lambda *given, **options: made.append(function(*given, **options)) or made[-1])
    q, held = normal(rng, (2, 3, HEADS, HEAD_DIM), "float16"), normal(rng, (2, 2, 9, KV_HEADS, HEAD_DIM), "float16")
    options = {"cache_seqlens": np.array([2, 5], np.int32), "causal": True, "return_softmax_lse": True}
    if name == "attention_varlen":
        q, options["cu_seqlens_q"] = q.reshape(6, HEADS, HEAD_DIM), cumulative([3, 3])
    out, lse = flash_attn.flash_attn_with_kvcache(q, *held, **options)
    ((wrote, as_asked),) = made
    assert out is wrote and lse is as_asked
    assert (lse == np.inf).sum() == HEADS and not (lse == -np.inf).any()


# -------------------------------------------------------------------------------------------------- refusals


def arguments(name):
    """Arguments that a function takes, NumPy arrays."""
    q, k = np.ones((2, 3, HEADS, HEAD_DIM), np.float16), np.ones((2, 5, KV_HEADS, HEAD_DIM), np.float16)
    rows, keys = q.reshape(6, HEADS, HEAD_DIM), k.reshape(10, KV_HEADS, HEAD_DIM)
    ends_q, ends_k = cumulative([3, 3]), cumulative([5, 5])
    places = {"cu_seqlens_q": ends_q, "cu_seqlens_k": ends_k, "max_seqlen_q": 3, "max_seqlen_k": 5}
    return {
        "flash_attn_func": {"q": q, "k": k, "v": k},
        "flash_attn_kvpacked_func": {"q": q, "kv": np.stack([k, k], 2)},
        "flash_attn_qkvpacked_func": {"qkv": np.stack([q, q, q], 2)},
        "flash_attn_varlen_func": {"q": rows, "k": keys, "v": keys} | places,
        "flash_attn_varlen_kvpacked_func": {"q": rows, "kv": np.stack([keys, keys], 1)} | places,
        "flash_attn_varlen_qkvpacked_func": {"qkv": np.stack([rows] * 3, 1), "cu_seqlens": ends_q, "max_seqlen": 3},
        "flash_attn_with_kvcache": {"q": q, "k_cache": np.zeros_like(k), "v_cache": np.zeros_like(k), "k": k[:, :2]}
        | {"v": k[:, :2], "cache_seqlens": np.array([1, 3], np.int32)},
    }[name]


def halves(*shape):
    return np.ones(shape, np.float16)


FUNCTIONS = [name for name in CALLS if name.startswith("flash_attn")]
EVERYWHERE = [
    ({"window_size": (1,)}, r"window_size: got \(1,\), expected \(left, right\) as two ints"),
    ({"window_size": (1.5, 0)}, r"window_size: got \(1.5, 0\), expected \(left, right\) as two ints"),
    ({"softcap": -1.0}, "softcap: got -1.0, expected a positive number"),
    ({"causal": 2}, "causal: got 2, expected True or False"),
    ({"softmax_scale": "1"}, "softmax_scale: got '1', expected a number"),
    ({"alibi_slopes": np.ones(3, np.float32)}, r"alibi_slopes: got shape \(3,\), expected \(4,\) or \(2, 4\)"),
]
DROPOUT = {"dropout_p": 0.1}, "dropout_p: got 0.1, expected 0.0: dropout belongs to training"
PAGED = {"k": None, "v": None, "page_table": np.array([[0], [1]], np.int32)}
PACKED = {"k": None, "v": None, "q": halves(6, HEADS, HEAD_DIM), "cu_seqlens_q": cumulative([3, 3])}
OWN = {
    "flash_attn_func": [
        ({"q": None}, "q: got None, expected an array"),
        ({"q": np.ones((2, 3, 4, 32))}, r"q: got float64, expected .*: pass q.astype\(np.float32\)$"),
        ({"v": halves(2, 4, 2, 32)}, r"v: got shape \(2, 4, 2, 32\), expected k's shape"),
    ],
    "flash_attn_kvpacked_func": [
        ({"kv": halves(2, 5, 3, 2, 32)}, r"kv: got shape \(2, 5, 3, 2, 32\), expected \(batch, seqlen_k, 2,"),
        ({"kv": np.ones((2, 5, 2, 2, 32), np.float32)}, "kv: got float32, expected q's dtype float16"),
        ({"kv": halves(2, 5, 2, 3, 32)}, "kv: got 3 heads where q has 4"),
        ({"kv": [1]}, "kv: got a list, expected an array"),
    ],
    "flash_attn_qkvpacked_func": [
        ({"qkv": halves(2, 3, 4, 32)}, r"qkv: got shape \(2, 3, 4, 32\), expected \(batch, seqlen, 3,"),
        ({"qkv": np.ones((2, 3, 3, 4, 32))}, r"qkv: got float64, .*: pass qkv.astype\(np.float32\)$"),
        ({"qkv": None}, "qkv: got None, expected an array"),
    ],
    "flash_attn_varlen_func": [
        ({"cu_seqlens_k": cumulative([5, 6])}, "cu_seqlens_k: got 11 as its last entry"),
        ({"max_seqlen_q": 2}, "max_seqlen_q: got 2, expected at least the longest sequence, 3"),
        ({"max_seqlen_k": 5.0}, "max_seqlen_k: got 5.0, expected an int"),
        ({"block_table": np.zeros((2, 1), np.int32)}, r"k: got 3-D shape .* 4-D \(num_blocks, block_size"),
    ],
    "flash_attn_varlen_kvpacked_func": [
        ({"kv": halves(10, 2, 3, 32)}, "kv: got 3 heads where q has 4"),
        ({"kv": halves(2, 10, 2, 32)}, r"kv: got shape \(2, 10, 2, 32\), expected \(total_k, 2,"),
    ],
    "flash_attn_varlen_qkvpacked_func": [
        ({"max_seqlen": 2}, "max_seqlen: got 2, expected at least the longest"),
        ({"cu_seqlens": np.array([0, 3, 6])}, r"cu_seqlens: got int64, .* cu_seqlens.astype\(np.int32\)"),
    ],
    "flash_attn_with_kvcache": [
        ({"cache_seqlens": np.array([1, 4], np.int32)}, "cache_seqlens: got 4 tokens for sequence 1 plus 2 new"),
        ({"cache_seqlens": None}, "cache_seqlens: got None, expected how many tokens"),
        ({"cache_seqlens": 4}, "cache_seqlens: got 4 tokens plus 2 new, expected at most the 5"),
        ({"v": None}, "v: got None, expected k and v together"),
        ({"k_cache": None}, "k_cache: got None, expected an array"),
        ({"k_cache": halves(1, 5, 2, 32)}, "v_cache: got shape .* k_cache's shape"),
        ({"k_cache": np.zeros((2, 5, 2, 32), np.uint8)}, "k_cache: got uint8, expected q's dtype float16$"),
        ({"q": halves(3, 3, 4, 32), "k": None, "v": None, "cache_seqlens": None}, "k_cache: got batch 2, expected q's"),
        ({"return_softmax_lse": "yes"}, "return_softmax_lse: got 'yes', expected True or False"),
        ({"return_softmax_lse": "log2"}, "return_softmax_lse: got 'log2', expected True or False"),
        ({"rotary_cos": halves(9, 8)}, "rotary_sin: got None, expected rotary_cos and rotary_sin"),
        ({"learnable_sink": np.ones(4)}, r"learnable_sink: got float64, .*pass learnable_sink.astype\(np.float32\)"),
        ({"learnable_sink": np.ones(3, np.float32)}, r"learnable_sink: got shape \(3,\)"),
        ({"k_descale": 1.0}, "k_descale: got a scale, expected None: the cache is float16"),
        ({"q_descale": np.ones(1)}, "q_descale: got an array, expected None"),
        ({"qv": np.ones(1)}, "qv: got an array, expected None"),
        ({"rotary_seqlens": np.ones(1)}, "rotary_seqlens: got an array, expected None"),
        ({"num_splits": -1}, "num_splits: got -1, expected 0"),
        ({"attention_chunk": 64}, "attention_chunk: got 64, expected 0"),
        ({"cu_seqlens_k_new": cumulative([2, 2])}, "cu_seqlens_k_new: got an array, expected None"),
        ({"seqused_k": 1}, "seqused_k: got given together with cache_seqlens"),
        (PAGED | {"block_table": PAGED["page_table"]}, "page_table: got given together with block_table"),
        (PAGED | {"page_table": np.array([[0], [7]], np.int32)}, r"page_table: got block 7 at \[1, 0\]"),
        (PAGED | {"cache_seqlens": None, "seqused_k": 6}, "seqused_k: got 6 tokens, expected at most the 5"),
        ({"cu_seqlens_q": cumulative([3, 3])}, "k: got given together with cu_seqlens_q, .* cupyattn.append_kv"),
        (PACKED | {"cache_leftpad": cumulative([1])}, "cache_leftpad: got given together with cu_seqlens_q"),
        (PACKED | {"cache_seqlens": 9}, "cache_seqlens: got 9 tokens, expected 0 to the 5"),
        (PACKED | {"cache_seqlens": None, "seqused_k": -1}, "seqused_k: got -1 tokens, expected 0 to the 5"),
        (PACKED | {"cache_seqlens": cumulative([9])}, "cache_seqlens: got 9 tokens for sequence 1"),
        (PACKED | {"cu_seqlens_q": [0, 6]}, "cu_seqlens_q: got a list, expected an array"),
        (PACKED | {"cu_seqlens_q": cumulative([2, 2, 2])}, "k_cache: got 2 entries, expected at least the 3"),
        (PACKED | {"cache_batch_idx": cumulative([])}, r"cache_batch_idx: got shape \(1,\), expected \(2,\)"),
        (PACKED | {"cache_batch_idx": np.array([0, 2], np.int32)}, r"cache_batch_idx: got .*2 at \[1, 0\]"),
        (
            PACKED | PAGED | {"q": PACKED["q"], "cache_batch_idx": cumulative([1])},
            "cache_batch_idx: got given together",
        ),
        (PACKED | {"k_cache": halves(2, 5, 3, 32)}, "v_cache: got shape .* k_cache's shape"),
        (PACKED | {"k_cache": halves(10, 2, 32)}, "k_cache: got 3-D shape"),
        (PACKED | {"k_cache": halves(10, 2, 32), "cache_seqlens": 1}, "k_cache: got 3-D shape"),
    ],
}
REFUSALS = [(name, *case) for name in FUNCTIONS for case in EVERYWHERE + OWN[name]]
REFUSALS += [(name, *DROPOUT) for name in FUNCTIONS if name != "flash_attn_with_kvcache"]


@pytest.mark.parametrize(("name", "wrong", "complaint"), REFUSALS)
def test_refusals_name_the_callers_argument_and_change_nothing(name, wrong, complaint):
    given = arguments(name) | wrong
    before = {key: value.copy() for key, value in given.items() if isinstance(value, np.ndarray)}
    with pytest.raises((TypeError, ValueError), match=f"^{complaint}") as refusal:
        getattr(flash_attn, name)(**given)
    assert not re.search(r"\b(window|sinks|[kv]_scale|kv_dtype|layout|kernel|return_lse)\b", str(refusal.value))
    assert all((given[key] == value).all() for key, value in before.items())


def test_what_is_refused_by_python_is_left_as_it_is():
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'v'$"):
        flash_attn.flash_attn_func(np.ones(1), np.ones(1))


def test_jax_caches_are_not_appended_to(rng):
    with pytest.raises(ValueError, match="^k_cache: got a JAX array, and JAX arrays are immutable"):
        Step(rng, "dense", 1, 1).run("jax")


def test_gradients_are_refused():
    torch = pytest.importorskip("torch")
    q = torch.ones(1, 2, 3, 1, 8, requires_grad=True)
    with pytest.raises(TypeError, match="^qkv: got a tensor that requires grad"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with torch.no_grad():
        assert flash_attn.flash_attn_qkvpacked_func(q).shape == (1, 2, 1, 8)


# --------------------------------------------------------------------------------------------------- thinness


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_call_of_this_library_with_the_callers_own_arrays(monkeypatch, name):
    calls = []
    for served in ("attention", "attention_varlen"):
        monkeypatch.setattr(flash_attn_interface, served, lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(caches, "attention_with_kvcache", lambda *given, **options: calls.append((given, options)))
    given = arguments(name)
    assert getattr(flash_attn, name)(**given) is None
    ((passed, options),) = calls
    passed = [*passed, *options.values()]
    for argument, array in given.items():
        if argument in ("kv", "qkv"):
            parts = [part for part in passed if isinstance(part, arrays.View)]
            assert len(parts) == (2 if argument == "kv" else 3)
            assert all(part.array is array and np.shares_memory(part.base, array) for part in parts)
        elif isinstance(array, np.ndarray):
            assert any(x is array for x in passed), argument


def test_deterministic_changes_nothing(rng):
    q, k, v = normal(rng, (3, 1, 9, 2, 16), "float16")
    deterministic = flash_attn.flash_attn_func(q, k, v, 0.0, None, True, (-1, -1), 0.0, None, True)
    assert (deterministic == flash_attn.flash_attn_func(q, k, v, causal=True)).all()


# ----------------------------------------------------------------------------------------------- bert_padding


def random_masks(rng, kind, unused):
    """(attention_mask, unused_mask or None): no place is in both."""
    which = rng.integers(0, 3 if unused else 2, (4, 9))
    which[rng.integers(4)] = 0
    return (which == 1).astype(kind), (which == 2).astype(kind) if unused else None


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("kind", ["bool", "int32", "int64"])
@pytest.mark.parametrize("dtype", [*DTYPES, "int32"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_unpadding_and_padding(rng, library, dtype, kind, unused):
    padded = normal(rng, (4, 9, 3, 2), "float32").astype(np.dtype(dtype))
    mask, unused_mask = random_masks(rng, kind, unused)
    kept = mask.astype(bool) if unused_mask is None else mask.astype(bool) | unused_mask.astype(bool)
    given = [put(library, array) for array in (padded, mask, unused_mask)]
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(*given)
    assert {type(result) for result in (tokens, indices, cu_seqlens, used)} == {type(given[0])}
    assert get(tokens).tobytes() == padded[kept].tobytes()
    assert get(indices).tolist() == np.flatnonzero(kept).tolist()
    assert get(cu_seqlens).tolist() == cumulative(kept.sum(axis=1)).tolist() and get(cu_seqlens).dtype == np.int32
    assert longest == kept.sum(axis=1).max() and type(longest) is int
    assert get(used).tolist() == mask.sum(axis=1).tolist() and get(used).dtype == np.int32

    back = bert_padding.pad_input(tokens, indices, 4, 9)
    assert type(back) is type(given[0]) and arrays.view(back).dtype == dtype
    assert get(back).tobytes() == np.where(kept[..., None, None], padded, np.zeros_like(padded)).tobytes()


@pytest.mark.parametrize("library", LIBRARIES)
def test_unpadding_rows_of_several_sequences(rng, library):
    lengths = np.array([[2, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [3, 0, 2, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    padded = normal(rng, (4, 6, 3), "float32")
    given = put(library, padded), put(library, lengths)
    tokens, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(*given)
    kept = np.arange(6) < lengths.sum(axis=1)[:, None]
    assert get(tokens).tobytes() == padded[kept].tobytes() and get(indices).tolist() == np.flatnonzero(kept).tolist()
    assert get(cu_seqlens).tolist() == cumulative([2, 3, 3, 2, 6]).tolist() and get(cu_seqlens).dtype == np.int32
    assert longest == 6 and type(longest) is int
    none = bert_padding.unpad_input_for_concatenated_sequences(given[0], put(library, np.zeros_like(lengths)))
    assert get(none[2]).tolist() == [0] and none[3] == 0 and none[0].shape[0] == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_by_their_indices(rng, library):
    rows, indices = normal(rng, (6, 2, 3), "bfloat16"), rng.integers(0, 6, 9)
    given = put(library, rows), put(library, indices)
    assert get(bert_padding.index_first_axis(*given)).tobytes() == rows[indices].tobytes()


def test_padding_keeps_gradients():
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 3, 4, requires_grad=True)
    tokens, indices, *_ = bert_padding.unpad_input(x, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    (bert_padding.pad_input(tokens, indices, 2, 3) * torch.arange(6).reshape(2, 3, 1)).sum().backward()
    assert x.grad[..., 0].tolist() == [[0, 1, 0], [3, 0, 0]]


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_a_padded_batch_from_mask_to_output(rng, library):
    """How models use these functions."""
    mask = np.arange(11) < np.array([[11], [4], [0], [7]])
    q, k, v = normal(rng, (3, 4, 11, 2, 16), "float32")
    unpadded = [bert_padding.unpad_input(put(library, x), put(library, mask)) for x in (q, k, v)]
    (q_rows, indices, cu_seqlens, longest, _), (k_rows, *_), (v_rows, *_) = unpadded
    out = flash_attn.flash_attn_varlen_func(
        q_rows, k_rows, v_rows, cu_seqlens, cu_seqlens, longest, longest, causal=True
    )
    out = get(bert_padding.pad_input(out, indices, 4, 11))
    for b, length in enumerate(mask.sum(axis=1)):
        own = slice(b, b + 1), slice(length)
        oracle.attention(q[own], k[own], v[own], causal=True).check(out[own], None, "float32")
        assert not out[b, length:].any()


@pytest.mark.parametrize(
    ("function", "wrong", "complaint"),
    [
        ("unpad_input", {"hidden_states": np.ones(3)}, r"hidden_states: got shape \(3,\)"),
        ("unpad_input", {"hidden_states": [1]}, "hidden_states: got a list"),
        ("unpad_input", {"attention_mask": np.ones((2, 4))}, r"attention_mask: got shape \(2, 4\), expected \(2, 3\)"),
        ("unpad_input", {"attention_mask": None}, "attention_mask: got None"),
        ("unpad_input", {"unused_mask": np.ones((3, 2))}, r"unused_mask: got shape \(3, 2\)"),
        (
            "unpad_input_for_concatenated_sequences",
            {"attention_mask_in_length": np.ones((3, 2), int)},
            r"attention_mask_in_length: got shape \(3, 2\)",
        ),
        ("pad_input", {"indices": np.arange(3)}, r"indices: got 3 of them, expected one for each row .*\(2, 8\)"),
        ("pad_input", {"indices": np.zeros((2, 1), int)}, r"indices: got shape \(2, 1\), expected 1-D"),
        ("pad_input", {"hidden_states": None}, "hidden_states: got None"),
        ("index_first_axis", {"indices": [0]}, "indices: got a list"),
    ],
)
def test_refusals_of_padding(function, wrong, complaint):
    given = {
        "unpad_input": {"hidden_states": np.ones((2, 3, 8)), "attention_mask": np.ones((2, 3), int)},
        "unpad_input_for_concatenated_sequences": {"hidden_states": np.ones((2, 3, 8))},
        "pad_input": {"hidden_states": np.ones((2, 8)), "indices": np.arange(2), "batch": 2, "seqlen": 3},
        "index_first_axis": {"input": np.ones((2, 8)), "indices": np.arange(2)},
    }[function]
    with pytest.raises((TypeError, ValueError), match=f"^{complaint}"):
        getattr(bert_padding, function)(**given | wrong)


def test_libraries_are_not_mixed_in_padding():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="^attention_mask: got a ndarray, expected an array of hidden_states' library"):
        bert_padding.unpad_input(torch.ones(2, 3, 4), np.ones((2, 3)))


def test_inference_params_drive_a_generation(rng):
    """flash_attn's own way to use a cache: a slice of the packed array, and its lengths."""
    generation = importlib.import_module("cupyattn.compat.flash_attn.utils.generation")
    params = generation.InferenceParams(max_seqlen=16, max_batch_size=2)
    params.key_value_memory_dict = generation.allocate_inference_cache(2, 16, KV_HEADS, HEAD_DIM, 1, "cpu", "float16")
    held = np.zeros((2, 0, 2, KV_HEADS, HEAD_DIM), np.float16)
    for seqlen in (5, 1, 1):
        q = normal(rng, (2, seqlen, HEADS, HEAD_DIM), "float16")
        kv = normal(rng, (2, seqlen, 2, KV_HEADS, HEAD_DIM), "float16")
        cache = params.key_value_memory_dict[0]
        out = flash_attn.flash_attn_with_kvcache(
            q, cache[:, :, 0], cache[:, :, 1], kv[:, :, 0], kv[:, :, 1], cache_seqlens=params.seqlen_offset, causal=True
        )
        held = np.concatenate([held, kv], axis=1)
        oracle.attention(q, held[:, :, 0], held[:, :, 1], causal=True).check(out, None, "float16")
        params.seqlen_offset += seqlen


# ----------------------------------------------------------------------------------- usage as people have written it


USAGE = """
def test_flash_attn_varlen_func_without_kvcache(
    device="cuda", seed=42, batch_size=10, num_heads=16, head_dim=16
):
    # Set seed for reproducibility
    torch.manual_seed(seed)
    # Calculate total hidden dimension
    hidden_dim = num_heads * head_dim
    # Generate random sequence lengths between 10 and 100
    seq_len = torch.randint(10, 100, (batch_size, 1), device=device)
    max_seq_len = torch.max(seq_len).item()
    total_seq_len = torch.sum(seq_len).item()
    # All of the q,k,v packs all the sequence into one tensor
    # Create query, key, value tensors (total_seq_len, num_heads, head_dim)
    q = torch.randn(total_seq_len, num_heads, head_dim, device=device, dtype=torch.float16)
    k = torch.randn(total_seq_len, num_heads, head_dim, device=device, dtype=torch.float16)
    v = torch.randn(total_seq_len, num_heads, head_dim, device=device, dtype=torch.float16)
    # Remove the extra dimension from seq_len
    seq_len = seq_len.squeeze(1)
    # Create cumulative sequence lengths with leading 0
    # This creates offsets: [0, len1, len1+len2, len1+len2+len3, ...]
    cu_seqlens_q = torch.cumsum(seq_len, dim=0, dtype=torch.int32)
    cu_seqlens_q = torch.cat([torch.zeros(1, dtype=torch.int32, device=device), cu_seqlens_q])
    cu_seqlens_k = cu_seqlens_q.clone() # Keys have same lengths as queries
    # Run flash attention with variable length sequences
    res = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seq_len,
        max_seqlen_k=max_seq_len,
        dropout_p=0.0,
        return_attn_probs=True,
    )
    output = res[0]
    attn_probs = res[1]
    S_mask = res[2]
    # Basic validation - check output shape matches input shape
    assert (
        output.shape == q.shape
    ), f"Output shape {output.shape} doesn't match input shape {q.shape}"
    # Verify output is not all zeros or NaNs
    assert not torch.isnan(output).any(), "Output contains NaN values"
    assert torch.any(output != 0), "Output is all zeros"
    print("output", output)
    print("attn_probs", attn_probs)
    print("S_mask", S_mask)
    return output


def generate_block_kvcache(
    max_seqlen_k: int,
    paged_kv_block_size: int,
    max_batch_size: int,
    nheads_k: int,
    d: int,
    device: torch.device,
    dtype: torch.dtype,
):
    # Calculate total number of blocks needed
    num_blocks = math.ceil(max_seqlen_k / paged_kv_block_size) * max_batch_size
    # Create randomized paged cache storage for keys and values
    k_cache_paged = torch.randn(
        num_blocks, paged_kv_block_size, nheads_k, d, device=device, dtype=dtype
    )
    v_cache_paged = torch.randn(
        num_blocks, paged_kv_block_size, nheads_k, d, device=device, dtype=dtype
    )
    # Create block table - a mapping from logical sequence positions to physical memory blocks
    # Using a random permutation to simulate realistic block allocation
    block_table = rearrange(
        torch.randperm(num_blocks, dtype=torch.int32, device=device),
        "(b nblocks) -> b nblocks",
        b=max_batch_size,
    )
    return k_cache_paged, v_cache_paged, block_table


def create_culens(seq_lens: torch.Tensor, device: torch.device):
    cu_seqlens = torch.cumsum(seq_lens, dim=0, dtype=torch.int32)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32, device=device), cu_seqlens])
    return cu_seqlens


def test_flash_attn_varlen_func_with_kvcache(
    device="cuda", seed=42, batch_size=10, num_heads=16, head_dim=16
):
    # Set seed for reproducibility
    torch.manual_seed(seed)
    # Generate random sequence lengths between 10 and 100
    seq_lens = torch.randint(10, 100, (batch_size, 1), device=device)
    max_seq_len = torch.max(seq_lens).item()
    total_seq_len = torch.sum(seq_lens).item()
    # KV cache parameters
    paged_kv_block_size = 256
    max_k_seq_len = 100
    k_seq_lens = torch.randint(0, max_k_seq_len, (batch_size, 1), device=device)
    # Create query tensor packed with all sequences (total_seq_len, num_heads, head_dim)
    q = torch.randn(total_seq_len, num_heads, head_dim, device=device, dtype=torch.float16)
    # Generate paged KV cache with extra room for new tokens
    k_cache_paged, v_cache_paged, block_table = generate_block_kvcache(
        max_k_seq_len + 100, # room for new tokens
        paged_kv_block_size,
        batch_size,
        num_heads,
        head_dim,
        device,
        dtype=torch.float16,
    )
    # Prepare sequence length information
    seq_lens = seq_lens.squeeze(1)
    k_seq_lens = k_seq_lens.squeeze(1)
    # Create cumulative sequence lengths for batched attention
    cu_seqlens_q = create_culens(seq_lens, device)
    cu_seqlens_k = create_culens(k_seq_lens, device)
    # Run flash attention with variable length sequences
    output, attn_probs, S_mask = flash_attn_varlen_func(
        q,
        k=k_cache_paged,
        v=v_cache_paged,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seq_len,
        max_seqlen_k=max_k_seq_len,
        block_table=block_table,
        dropout_p=0.0,
        return_attn_probs=True,
    )
    # Verify outputs
    assert output.shape == q.shape, f"Output shape {output.shape} doesn't match query shape {q.shape}"
    assert not torch.isnan(output).any(), "Output contains NaN values"
    assert torch.any(output != 0), "Output is all zeros"
    assert attn_probs is not None, "Attention probabilities not returned"
    assert S_mask is not None, "Attention mask not returned"
    # Return results for potential further testing
    return output, attn_probs, S_mask


def test_flash_attn_with_kvcache(device="cuda", seed=42, batch_size=10, num_heads=16, head_dim=16):
    # Set seed for reproducibility
    torch.manual_seed(seed)
    # Create query tensor - for incremental decoding, we only have one token per sequence
    q = torch.randn(batch_size, 1, num_heads, head_dim, device=device, dtype=torch.float16)
    # Generate random sequence lengths for the key-value cache (previous tokens)
    max_seq_len_k = 100
    seq_lens_k = torch.randint(10, max_seq_len_k, (batch_size,), device=device, dtype=torch.int32)
    max_seq_len_k = torch.max(seq_lens_k).item()
    # Create paged KV cache - block-based memory structure for efficient caching
    paged_kv_block_size = 256
    k_cache_paged, v_cache_paged, block_table = generate_block_kvcache(
        max_seq_len_k,
        paged_kv_block_size,
        batch_size,
        num_heads,
        head_dim,
        device,
        dtype=torch.float16,
    )
    # Create new key and value tensors for the current token
    # (These will be added to the cache in-place during the attention call)
    k = torch.randn(batch_size, 1, num_heads, head_dim, device=device, dtype=torch.float16)
    v = torch.randn(batch_size, 1, num_heads, head_dim, device=device, dtype=torch.float16)
    # Run flash attention with KV cache
    # This performs attention and updates the cache in a single operation
    output = flash_attn_with_kvcache(
        q=q,
        k_cache=k_cache_paged,
        v_cache=v_cache_paged,
        k=k,
        v=v,
        cache_seqlens=seq_lens_k,
        block_table=block_table,
    )
    # Validate output
    expected_shape = (batch_size, 1, num_heads, head_dim)
    assert output.shape == expected_shape, f"Output shape {output.shape} doesn't match expected {expected_shape}"
    assert not torch.isnan(output).any(), "Output contains NaN values"
    assert torch.any(output != 0), "Output is all zeros"
    # Verify cache was updated by checking if sequences grew by 1
    # (This assumes flash_attn_with_kvcache increments cache_seqlens internally)
    return output
"""
IMPORTS = """
import math
import torch
from einops import rearrange
from cupyattn.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
"""


def used(rng, function, device):
    """Run a function of USAGE with a fresh seed. Returns its results, and what it called ours with."""
    pytest.importorskip("torch")
    scope, calls = {}, []
    exec(IMPORTS + USAGE, scope)
    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):

        def recorded(*given, _ours=scope[name], **options):
            kept = inspect.signature(_ours).bind(*given, **options).arguments
            calls.append({key: get(x) if hasattr(x, "shape") else x for key, x in kept.items()})
            return _ours(*given, **options)

        scope[name] = recorded
    result = scope[function](device=device, seed=int(rng.integers(2**31)))
    (call,) = calls
    return result, call


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("paged", [False, True])
def test_prefilling_as_people_have_written_it(rng, paged, device):
    name = "test_flash_attn_varlen_func_" + ("with_kvcache" if paged else "without_kvcache")
    result, call = used(rng, name, device)
    expected = oracle.attention_varlen(
        *(call[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")), block_table=call.get("block_table")
    )
    out, lse, probabilities = result if paged else (result, None, None)
    check(expected, out, lse, "float16")
    if paged:
        assert tuple(probabilities.shape) == (10, 16, call["max_seqlen_q"], 100)
        sums, lengths = get(probabilities).astype(float).sum(axis=-1), np.diff(call["cu_seqlens_q"])
        seen = (np.arange(sums.shape[-1]) < lengths[:, None]) & (np.diff(call["cu_seqlens_k"]) > 0)[:, None]
        np.testing.assert_allclose(sums, np.broadcast_to(seen[:, None], sums.shape), atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_as_people_have_written_it(rng, device):
    out, call = used(rng, "test_flash_attn_with_kvcache", device)
    names = ("k", "v", "cache_seqlens", "block_table")
    expected = oracle.attention_with_kvcache(
        call["q"], call["k_cache"], call["v_cache"], **{name: call[name] for name in names}
    )
    check(expected, out, None, "float16")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("library", WRITABLE)
def test_rotary_embedding(rng, library, packed, interleaved):
    rotary = importlib.import_module("cupyattn.compat.flash_attn.layers.rotary")
    x, offsets = normal(rng, (2, 5, HEADS, HEAD_DIM), "float32"), np.array([3, 0], np.int32)
    angles = np.outer(np.arange(9), 100.0 ** -np.linspace(0, 1, 8))
    tables = [put(library, f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    turn = np.exp(1j * angles[offsets[:, None] + np.arange(5)])[:, :, None]
    first, second = (slice(0, 16, 2), slice(1, 16, 2)) if interleaved else (slice(8), slice(8, 16))
    expected = x.astype(np.float64)
    pairs = (x[..., first] + 1j * x[..., second]) * turn
    expected[..., first], expected[..., second] = pairs.real, pairs.imag
    options = {"interleaved": interleaved, "seqlen_offsets": put(library, offsets)}
    if packed:
        options |= {"cu_seqlens": put(library, cumulative([5, 5])), "max_seqlen": 5}
    given = put(library, x.reshape(10, HEADS, HEAD_DIM) if packed else x)
    out = rotary.apply_rotary_emb(given, *tables, **options)
    assert np.allclose(get(out).reshape(x.shape), expected, rtol=0, atol=1e-6) and get(given).tobytes() == x.tobytes()
    assert rotary.apply_rotary_emb(given, *tables, inplace=True, **options) is given
    assert get(given).tobytes() == get(out).tobytes()


def test_rotary_embedding_refuses_by_its_own_names():
    rotary = importlib.import_module("cupyattn.compat.flash_attn.layers.rotary")
    x, table = np.ones((2, 5, 4, 32), np.float32), np.ones((9, 8), np.float32)
    with pytest.raises(ValueError, match="^seqlen_offsets: got"):
        rotary.apply_rotary_emb(x, table, table, seqlen_offsets=5)


@pytest.mark.parametrize("name", ["", ".flash_attn_interface", ".bert_padding", ".layers.rotary"])
def test_examples(name):
    results = doctest.testmod(importlib.import_module(f"cupyattn.compat.flash_attn{name}"))
    assert results.attempted and not results.failed


@pytest.mark.parametrize("name", ["return_attn_probs", "return_softmax_lse", "dropout_p"])
def test_flags_and_numbers_are_no_strings(name):
    q, cache = np.ones((2, 1, 4, 32), np.float16), np.ones((2, 8, 2, 32), np.float16)
    call = flash_attn.flash_attn_with_kvcache if name == "return_softmax_lse" else flash_attn.flash_attn_func
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got 'False', expected"):
        call(q, cache, cache, **{name: "False"})
