"""FlashAttention-3's functions against the float64 oracle: its positional order, its lse, and what is not here."""

from __future__ import annotations

import doctest
import subprocess
import sys

import numpy as np
import oracle
import pytest
from compat.test_flash_attn import HEAD_DIM, HEADS, KV_HEADS, LIBRARIES, WRITABLE, Step, get, put
from oracle import cumulative, normal

from cupyattn import arrays
from cupyattn.compat import flash_attn_3

MASKS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "causal window, scale": {"causal": True, "window_size": (2, -1), "softmax_scale": 0.4},
    "softcap": {"softcap": 2.0},
}


def for_oracle(masks):
    return {{"window_size": "window"}.get(name, name): value for name, value in masks.items()}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_dense(rng, library, masks):
    """Rows without keys have -inf, where flash_attn 2 has +inf."""
    seqlen_q, seqlen_k = rng.integers(1, 20, 2)
    q = normal(rng, (2, seqlen_q, HEADS, HEAD_DIM), "float16")
    k, v = normal(rng, (2, 2, seqlen_k, KV_HEADS, HEAD_DIM), "float16")
    given = [put(library, x) for x in (q, k, v)]
    out = flash_attn_3.flash_attn_func(*given, **MASKS[masks])
    assert type(out) is type(given[0]) and arrays.view(out).dtype == "float16"
    again, lse = flash_attn_3.flash_attn_func(*given, **MASKS[masks], return_attn_probs=True)
    assert get(again).tobytes() == get(out).tobytes()
    oracle.attention(q, k, v, **for_oracle(MASKS[masks])).check(get(out), get(lse), "float16")


@pytest.mark.parametrize("heads", ["equal", "fewer"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_packed_projection(rng, library, heads):
    qkv = normal(rng, (2, 9, 3, HEADS, HEAD_DIM) if heads == "equal" else (2, 9, 8, HEAD_DIM), "float16")
    options = {} if heads == "equal" else {"num_heads_q": HEADS}
    out = flash_attn_3.flash_attn_qkvpacked_func(put(library, qkv), None, True, **options)
    parts = [qkv[:, :, i] for i in range(3)] if heads == "equal" else np.split(qkv, [4, 6], axis=2)
    oracle.attention(*parts, causal=True).check(get(out), None, "float16")


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_packed_sequences(rng, library, masks, used):
    lengths_q, lengths_k = rng.integers(0, 20, (2, 3))
    ends_q, ends_k = cumulative(lengths_q), cumulative(lengths_k)
    q = normal(rng, (ends_q[-1], HEADS, HEAD_DIM), "bfloat16")
    k, v = normal(rng, (2, ends_k[-1], KV_HEADS, HEAD_DIM), "bfloat16")
    seqused = {"seqused_k": (lengths_k // 2).astype(np.int32)} if used else {}
    places = (ends_q, ends_k, int(lengths_q.max()), int(lengths_k.max()))
    given = [put(library, x) for x in (q, k, v, *places)]
    options = {name: put(library, x) for name, x in seqused.items()} | MASKS[masks]
    out, lse = flash_attn_3.flash_attn_varlen_func(*given, **options, return_attn_probs=True)
    expected = oracle.attention_varlen(q, k, v, ends_q, ends_k, **seqused, **for_oracle(MASKS[masks]))
    expected.check(get(out), get(lse), "bfloat16")


@pytest.mark.parametrize("masks", ["none", "causal", "window", "causal window"])
@pytest.mark.parametrize("store", ["dense", "larger", "entries", "paged"])
@pytest.mark.parametrize("library", WRITABLE)
def test_a_step(rng, library, store, masks):
    """As `compat.flash_attn` has it, with its own names, its order and -inf."""
    step = Step(rng, store, 2, 2, rotary=True, leftpad=store != "paged", masks=masks)
    places = {{"block_table": "page_table"}.get(name, name): x for name, x in step.places.items()}
    given = {name: put(library, x) for name, x in (places | step.new | step.options).items()}
    caches = [put(library, cache) for cache in step.caches]
    out, lse = flash_attn_3.flash_attn_with_kvcache(put(library, step.q), *caches, **given, return_softmax_lse=True)
    natural = get(lse)
    assert not (natural == np.inf).any()
    natural[natural == -np.inf] = np.inf  # which `Step.check` expects
    step.check(library, caches, out, natural)


@pytest.mark.parametrize("library", WRITABLE)
def test_positional_order_of_a_step(rng, library):
    step = Step(rng, "dense", 2, 2, rotary=False, leftpad=True, masks="causal window")
    caches = [put(library, cache) for cache in step.caches]
    new, places = step.new, step.places
    given = (new["k"], new["v"], None, new["rotary_cos"], new["rotary_sin"], places["cache_seqlens"], None)
    given += (places["cache_leftpad"], None, None, None, None, None, None, None, None)
    given += (0.25, True, step.options["window_size"], 0, 2.0, False, None, 0, None, 0, True)
    given = [put(library, x) for x in given]
    out, lse = flash_attn_3.flash_attn_with_kvcache(put(library, step.q), *caches, *given)
    step.options |= {"softmax_scale": 0.25, "softcap": 2.0}
    lse = get(lse)
    lse[lse == -np.inf] = np.inf
    step.check(library, caches, out, lse)


@pytest.mark.parametrize("library", LIBRARIES)
def test_packed_queries_over_pages(rng, library):
    step, ends = Step(rng, "paged", masks="causal"), cumulative([2, 0, 5])
    q = normal(rng, (7, HEADS, HEAD_DIM), step.dtype)
    table, lengths = step.places["block_table"], step.places["cache_seqlens"]
    options = {"page_table": table, "cache_seqlens": lengths, "cu_seqlens_q": ends, "cu_seqlens_k_new": ends}
    options = {name: put(library, x) for name, x in options.items()} | {"max_seqlen_q": 5, "causal": True}
    metadata = flash_attn_3.get_scheduler_metadata(3, 5, 40, HEADS, KV_HEADS, HEAD_DIM, lengths, page_size=16)
    given = [put(library, x) for x in (q, *step.caches)]
    out, lse = flash_attn_3.flash_attn_with_kvcache(
        *given, **options, scheduler_metadata=metadata, return_softmax_lse=True
    )
    expected = oracle.attention_varlen(q, *step.caches, ends, block_table=table, seqused_k=lengths, causal=True)
    expected.check(get(out), get(lse), step.dtype)


Q, K = np.ones((2, 3, HEADS, HEAD_DIM), np.float16), np.ones((2, 5, KV_HEADS, HEAD_DIM), np.float16)


@pytest.mark.parametrize(
    ("function", "wrong", "complaint"),
    [
        ("flash_attn_func", {"qv": Q}, "qv: got an array, expected None: there is nothing like it"),
        ("flash_attn_func", {"k_descale": Q}, "k_descale: got an array, expected None"),
        ("flash_attn_func", {"attention_chunk": 8}, "attention_chunk: got 8, expected 0"),
        ("flash_attn_func", {"window_size": (1,)}, r"window_size: got \(1,\), expected"),
        ("flash_attn_func", {"return_attn_probs": "yes"}, "return_attn_probs: got 'yes', expected True or False"),
        ("flash_attn_func", {"return_attn_probs": "log2"}, "return_attn_probs: got 'log2', expected True or False"),
        ("flash_attn_func", {"v": K[:, :4]}, r"v: got shape \(2, 4, 2, 32\), expected k's shape"),
        ("flash_attn_varlen_func", {"seqused_q": Q}, "seqused_q: got an array, expected None"),
        ("flash_attn_varlen_func", {"max_seqlen_q": 2}, "max_seqlen_q: got 2, expected at least the longest"),
        ("flash_attn_qkvpacked_func", {"qkv": Q}, "num_heads_q: got None, expected how many of the 4 heads"),
        ("flash_attn_qkvpacked_func", {"qkv": Q, "num_heads_q": 3}, "num_heads_q: got 3, expected how many of the 4"),
        ("flash_attn_qkvpacked_func", {"qkv": Q[0]}, r"qkv: got shape \(3, 4, 32\), expected \(batch, seqlen, 3,"),
        ("flash_attn_with_kvcache", {"qv": Q}, "qv: got an array, expected None"),
        ("flash_attn_with_kvcache", {"page_table": np.full((2, 1), 7, np.int32)}, r"page_table: got block 7 at \[0, 0"),
        ("flash_attn_with_kvcache", {"cache_seqlens": 9}, "cache_seqlens: got 9 tokens"),
    ],
)
def test_refusals_name_the_callers_argument(function, wrong, complaint):
    ends = cumulative([3, 3]), cumulative([5, 5])
    given = {
        "flash_attn_func": {"q": Q, "k": K, "v": K},
        "flash_attn_qkvpacked_func": {},
        "flash_attn_varlen_func": {"q": Q.reshape(6, HEADS, HEAD_DIM), "k": K.reshape(10, KV_HEADS, HEAD_DIM)}
        | {"v": K.reshape(10, KV_HEADS, HEAD_DIM), "cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
        | {"max_seqlen_q": 3, "max_seqlen_k": 5},
        "flash_attn_with_kvcache": {"q": Q, "k_cache": K, "v_cache": K, "cache_seqlens": 2},
    }[function]
    with pytest.raises((TypeError, ValueError), match=f"^{complaint}"):
        getattr(flash_attn_3, function)(**given | wrong)


def test_no_array_library_is_imported():
    code = "import sys, cupyattn.compat.flash_attn_3\nprint(sorted({'torch', 'jax', 'cupy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_examples():
    results = doctest.testmod(flash_attn_3)
    assert results.attempted and not results.failed
