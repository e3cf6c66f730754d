"""The attention function for transformers: padding, caches, windows; and with the library itself, whole models.

What transformers asks for is tested by the arguments that it gives; where it is installed, its models are run.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import oracle
import pytest
from oracle import normal
from test_forward import features

torch = pytest.importorskip("torch")

from cupyattn.integrations.torch import register_with_transformers, transformers_attention  # noqa: E402
from cupyattn.integrations.torch.transformers import padding_bounds  # noqa: E402

CAUSAL = torch.nn.Identity()
CAUSAL.is_causal = True


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs PyTorch for CUDA")
    return request.param


def heads_first(rng, batch, seqlen_q, seqlen_k, heads=4, kv_heads=2, head_dim=32):
    q = normal(rng, (batch, heads, seqlen_q, head_dim), "float32")
    return q, *normal(rng, (2, batch, kv_heads, seqlen_k, head_dim), "float32")


def mask_of(begins, ends, seqlen):
    columns = np.arange(seqlen)
    return torch.from_numpy((columns >= np.array(begins)[:, None]) & (columns < np.array(ends)[:, None])).long()


def ask(q, k, v, mask, device, **options):
    given = (torch.from_numpy(x).to(device) for x in (q, k, v))
    mask = None if mask is None else mask.to(device)
    out, weights = transformers_attention(CAUSAL, *given, mask, scaling=0.3, **options)
    assert weights is None and out.is_contiguous()
    return out.cpu().numpy()


def row(q, k, v, b, begin, end, first, rows, **masks):
    """The oracle's result for one sequence: `rows` queries from `first` on, its keys from begin to end."""
    arrays = q[b : b + 1, :, first : first + rows], k[b : b + 1, :, begin:end], v[b : b + 1, :, begin:end]
    expected = oracle.attention(*(np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays), softmax_scale=0.3, **masks)
    return expected


@pytest.mark.parametrize("begins, ends", [((0, 5, 1), (9, 9, 9)), ((0, 0, 0), (9, 3, 8)), ((2, 0, 4), (6, 9, 5))])
@pytest.mark.parametrize("names", [(), ("softcap", "sinks")])
@pytest.mark.parametrize("window", [None, 3])
def test_padded_prompts(rng, device, begins, ends, names, window):
    q, k, v = heads_first(rng, 3, 9, 9)
    bounds = padding_bounds(3, 9, 9, 0, attention_mask=mask_of(begins, ends, 9))
    masks = features(rng, *names)
    options = {"softcap": masks.get("softcap"), "sliding_window": window}
    options["s_aux"] = torch.from_numpy(masks["sinks"]).to(device) if "sinks" in masks else None
    out = ask(q, k, v, bounds, device, **options)
    for b, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        seen = {} if window is None else {"window": (window - 1, 0)}
        expected = row(q, k, v, b, begin, end, begin, end - begin, causal=True, **masks, **seen)
        expected.check(out[b : b + 1, begin:end], None, "float32")
        assert not out[b, :begin].any() and not out[b, end:].any()


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("room", [0, 7])
def test_steps_over_a_cache_that_is_padded_on_the_left(rng, device, seqlen_q, room):
    """Of as many rows as there are tokens, or with room behind them, as in a StaticCache."""
    begins, tokens = (0, 4, 2), 9
    q, k, v = heads_first(rng, 3, seqlen_q, tokens + room)
    k[:, :, tokens:] = v[:, :, tokens:] = np.nan
    offset = tokens - seqlen_q if room == 0 else torch.tensor(tokens - seqlen_q)
    mask = mask_of(begins, (tokens,) * 3, tokens)
    bounds = padding_bounds(3, seqlen_q, tokens + room, offset, attention_mask=mask)
    out = ask(q, k, v, bounds, device)
    for b, begin in enumerate(begins):
        expected = row(q, k, v, b, begin, tokens, 0, seqlen_q, causal=True)
        expected.check(out[b : b + 1], None, "float32")


def test_without_a_mask_the_offset_says_how_many_rows_are_tokens(rng, device):
    q, k, v = heads_first(rng, 2, 3, 12)
    k[:, :, 8:] = v[:, :, 8:] = np.nan
    for offset in (5, torch.tensor(5)):
        bounds = padding_bounds(2, 3, 12, offset, device="cpu")
        out = ask(q, k, v, bounds, device)
        for b in range(2):
            row(q, k, v, b, 0, 8, 0, 3, causal=True).check(out[b : b + 1], None, "float32")
    assert padding_bounds(2, 3, 8, 5) is None
    assert padding_bounds(2, 3, 6, 9, kv_offset=6) is None  # of a window that has forgotten six
    out = ask(q, k[:, :, :8], v[:, :, :8], None, device)
    row(q, k, v, 0, 0, 8, 0, 3, causal=True).check(out[:1], None, "float32")


def test_attention_both_ways(rng, device):
    q, k, v = heads_first(rng, 2, 4, 9)
    assert padding_bounds(2, 4, 9, allow_is_causal_skip=False, allow_is_bidirectional_skip=True) is None
    bounds = padding_bounds(2, 4, 9, attention_mask=mask_of((0, 2), (9, 7), 9), allow_is_bidirectional_skip=True)
    out = ask(q, k, v, bounds, device, is_causal=False)
    for b, (begin, end) in enumerate(((0, 9), (2, 7))):
        row(q, k, v, b, begin, end, 0, 4).check(out[b : b + 1], None, "float32")


def test_bounds_of_masks():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    bounds = padding_bounds(4, 4, 4, attention_mask=mask.bool())
    assert bounds.dtype == torch.int32 and bounds[:, 0, 0].tolist() == [[0, 4], [1, 3], [3, 4], [0, 0]]
    assert padding_bounds(4, 1, 2, 3, attention_mask=mask)[:, 0, 0].tolist() == [[0, 2], [0, 1], [1, 2], [0, 0]]


@pytest.mark.parametrize(
    "options, argument, came",
    [
        ({"attention_mask": torch.zeros(2, 1, 4, 4)}, "attention_mask", r"shape \(2, 1, 4, 4\)"),
        ({"attention_mask": None, "dropout": 0.1}, "dropout", "0.1"),
        ({"attention_mask": None, "position_bias": torch.zeros(1)}, "position_bias", "a tensor"),
    ],
)
def test_what_the_kernels_do_not_read_is_refused(rng, options, argument, came):
    given = map(torch.from_numpy, heads_first(rng, 2, 4, 4))
    with pytest.raises(ValueError, match=f"^{argument}: got .*{came}.*, expected"):
        transformers_attention(CAUSAL, *given, **options)


def test_masks_of_a_models_own_are_refused():
    with pytest.raises(ValueError, match="^attention_mask: got a mask of the model's own"):
        padding_bounds(2, 4, 4, use_vmap=True)
    with pytest.raises(ValueError, match="^attention_mask: got positions that may be of packed"):
        padding_bounds(2, 4, 4, allow_is_causal_skip=False)


def test_without_transformers_it_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers 4.53"):
        register_with_transformers()


# ----------------------------------------------------------------------------------------------- whole models

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
MODELS = {"Llama": {}, "Mistral": {"sliding_window": 5}}


def make_model(rng, name, device):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(int(rng.integers(2**31)))
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().to(device)


def prompts(rng, side):
    ids = torch.from_numpy(rng.integers(1, 97, (3, 12)))
    ends = {"none": ((0, 0, 0), (12, 12, 12)), "left": ((5, 0, 1), (12, 12, 12)), "right": ((0, 0, 0), (7, 12, 11))}
    return ids, mask_of(*ends[side], 12)


def both(model, run):
    """What sdpa gives and what comes of these kernels."""
    results = []
    for implementation in ("sdpa", register_with_transformers()):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(run(model))
    return results


@pytest.mark.parametrize("name, side", product(MODELS, ("none", "left", "right")))
def test_logits_of_a_model(rng, device, name, side):
    model = make_model(rng, name, device)
    ids, mask = (x.to(device) for x in prompts(rng, side))
    expected, logits = both(model, lambda model: model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name, side", product(MODELS, ("none", "left")))
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_with_a_model(rng, device, name, side, cache):
    model = make_model(rng, name, device)
    ids, mask = (x.to(device) for x in prompts(rng, side))
    options = {"max_new_tokens": 7, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}

    def run(model):
        return torch.stack(model.generate(ids, attention_mask=mask, **options).logits)

    expected, logits = both(model, run)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


def test_packed_positions_are_refused_by_a_model(rng):
    model = make_model(rng, "Llama", "cpu")
    model.set_attn_implementation(register_with_transformers())
    ids, positions = torch.from_numpy(rng.integers(1, 97, (1, 6))), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad(), pytest.raises(ValueError, match="positions that may be of packed sequences"):
        model(ids, position_ids=positions, use_cache=False)


def test_a_compiled_model(rng, device):
    model = make_model(rng, "Llama", device)
    ids, mask = (x.to(device) for x in prompts(rng, "left"))
    expected, _ = both(model, lambda model: model(ids, attention_mask=mask, use_cache=False).logits)

    def run(ids, mask):
        return model(ids, attention_mask=mask, use_cache=False).logits

    with torch.no_grad():
        logits = torch.compile(run, fullgraph=True, backend="aot_eager")(ids, mask)
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=2e-5)
