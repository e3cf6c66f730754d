"""compat.flash_attn beside flash_attn itself on the same tensors, or where it is not installed FlashAttention-2 as
PyTorch has it; needs a GPU. Steps over a cache, which PyTorch does not have, are beside flash_attn or the oracle alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools

import numpy as np
import pytest
from compat.test_flash_attn import Step, put
from oracle import cumulative

from cupyattn.compat import flash_attn as ours

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HEADS, KV_HEADS, BATCH = 8, 2, 3
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}  # of outputs of the size of standard normal values
SEQLENS = [(64, 64), (113, 203), (128, 64), (7, 3), (1, 200), (1, 1)]
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 4)},
    "left": {"window_size": (9, -1)},
    "causal window": {"causal": True, "window_size": (9, 4)},
    "scale": {"softmax_scale": 0.3},
    "alibi": {"alibi_slopes": (HEADS,)},
    "alibi of each": {"alibi_slopes": (BATCH, HEADS)},
    "alibi causal": {"causal": True, "alibi_slopes": (BATCH, HEADS)},
    "alibi causal window": {"causal": True, "window_size": (9, -1), "alibi_slopes": (HEADS,)},
    "softcap": {"causal": True, "softcap": 3.0},
}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def theirs():
    """flash_attn itself, or None; not what stands for it here."""
    try:
        importlib.metadata.version("flash-attn")
        return importlib.import_module("flash_attn")
    except ImportError:
        return None


def of_pytorch(torch, q, k, v, places=(None, None), longest=None, **masks):
    """(out, lse) of the FlashAttention-2 in PyTorch. It has no soft cap."""
    if masks.pop("softcap", 0.0):
        pytest.skip("PyTorch's FlashAttention-2 has no soft cap, and flash_attn is not installed")
    left, right = masks.pop("window_size", (-1, -1))
    causal, scale, slopes = (
        masks.pop("causal", False),
        masks.pop("softmax_scale", None),
        masks.pop("alibi_slopes", None),
    )
    longest = (q.shape[1], k.shape[1]) if longest is None else longest
    options = {"scale": scale, "alibi_slopes": slopes}
    options |= {"window_size_left": left, "window_size_right": 0 if causal else right}
    call = torch.ops.aten._flash_attention_forward
    try:
        out, lse, *_ = call(q, k, v, *places, *longest, 0.0, causal, False, **options)
    except RuntimeError as error:
        if "does not support alibi" in str(error):
            pytest.skip("PyTorch's FlashAttention-2 is built without ALiBi, and flash_attn is not installed")
        raise
    return out, lse


class Data:
    """Random tensors, and masks with their slopes."""

    def __init__(self, torch, rng, dtype, masks):
        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.generator = torch.Generator(DEVICE).manual_seed(int(rng.integers(2**31)))
        self.masks = dict(MASKS[masks])
        if "alibi_slopes" in self.masks:
            self.masks["alibi_slopes"] = torch.rand(self.masks["alibi_slopes"], device=DEVICE, generator=self.generator)

    def normal(self, *shape):
        return self.torch.randn(shape, device=DEVICE, generator=self.generator).to(self.dtype)

    def ints(self, numbers):
        return self.torch.tensor(np.asarray(numbers), dtype=self.torch.int32, device=DEVICE)

    def shift(self, lengths_q, lengths_k):
        """What their lse is more by under causal and ALiBi, (nheads, rows): a term that all keys of a row share."""
        left = self.masks.get("window_size", (-1, -1))[0]
        plain = self.masks.get("causal") and not 0 <= left < max(lengths_k)
        if "alibi_slopes" not in self.masks or not plain:
            return 0.0
        slopes = self.masks["alibi_slopes"].expand(BATCH, HEADS)
        ends = [np.arange(n) + m - n for n, m in zip(lengths_q, lengths_k, strict=True)]
        each = [slope[:, None] * self.torch.tensor(end, device=DEVICE) for slope, end in zip(slopes, ends, strict=True)]
        return self.torch.cat(each, dim=1)


def skip_a_window_of_its_own(masks, seqlen_q, seqlen_k):
    """To FlashAttention-2 a right side that is unbounded, or reaches over all keys, is one of seqlen_k keys beside a
    bounded left side. Where there are more queries than keys, that hides keys that its documentation lets them see."""
    left, right = masks.get("window_size", (-1, -1))
    if seqlen_q > seqlen_k and left >= 0 and not masks.get("causal") and not 0 <= right < seqlen_k:
        pytest.skip("FlashAttention-2 does not keep to the window that it documents")


def compare(got, expected, dtype, shift=0.0):
    """(out, lse) of both."""
    (out, lse), (their_out, their_lse) = got, expected
    assert out.shape == their_out.shape and out.dtype == their_out.dtype and lse.shape == their_lse.shape
    pairs = ((out, their_out, TOLERANCE[dtype]), (lse + shift, their_lse, 2e-3))
    for one, other, allowed in pairs:
        one, other = one.double().cpu().numpy(), other.double().cpu().numpy()
        near = np.isclose(one, other, rtol=1e-3, atol=allowed) | (one == other)
        assert near.all(), f"off by up to {np.nanmax(np.abs(one - other)[~near])}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("seqlens", SEQLENS)
def test_dense(torch, rng, seqlens, masks, head_dim, dtype):
    data, (seqlen_q, seqlen_k) = Data(torch, rng, dtype, masks), seqlens
    skip_a_window_of_its_own(data.masks, seqlen_q, seqlen_k)
    q = data.normal(BATCH, seqlen_q, HEADS, head_dim)
    k, v = (data.normal(BATCH, seqlen_k, KV_HEADS, head_dim) for _ in "kv")
    got = ours.flash_attn_func(q, k, v, return_attn_probs=True, **data.masks)[:2]
    if (real := theirs()) is not None:
        expected = real.flash_attn_func(q, k, v, return_attn_probs=True, **data.masks)[:2]
    else:
        expected = of_pytorch(torch, q, k, v, **data.masks)
    shift = data.shift([seqlen_q] * BATCH, [seqlen_k] * BATCH)
    if not isinstance(shift, float):
        shift = shift.reshape(HEADS, BATCH, seqlen_q).transpose(0, 1)
    compare(got, expected, dtype, shift)


LENGTHS = {"mixed": ([40, 1, 70], [64, 90, 20]), "empty": ([5, 0, 30], [9, 4, 0]), "same": ([17] * 3, [17] * 3)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(torch, rng, lengths, masks, dtype):
    data, (lengths_q, lengths_k) = Data(torch, rng, dtype, masks), LENGTHS[lengths]
    q = data.normal(sum(lengths_q), HEADS, 64)
    k, v = (data.normal(sum(lengths_k), KV_HEADS, 64) for _ in "kv")
    places = data.ints(cumulative(lengths_q)), data.ints(cumulative(lengths_k))
    longest = max(lengths_q), max(lengths_k)
    got = ours.flash_attn_varlen_func(q, k, v, *places, *longest, return_attn_probs=True, **data.masks)[:2]
    if (real := theirs()) is not None:
        expected = real.flash_attn_varlen_func(q, k, v, *places, *longest, return_attn_probs=True, **data.masks)[:2]
    else:
        expected = of_pytorch(torch, q, k, v, places, longest, **data.masks)
    compare(got, expected, dtype, data.shift(lengths_q, lengths_k))


STEPS = list(itertools.product(["dense", "larger", "entries", "paged"], ["none", "causal", "window", "causal window"]))


@pytest.mark.parametrize("rotary", [None, True, False])
@pytest.mark.parametrize("leftpad", [False, True])
@pytest.mark.parametrize(("store", "masks"), STEPS)
def test_steps_over_a_cache(torch, rng, store, masks, leftpad, rotary):
    """Append, rotary embedding, padding in front and fewer keys than queries, all in one call."""
    step = Step(rng, store, 3, 3, rotary=rotary, leftpad=leftpad and store != "paged", masks=masks, room=64)
    if store == "paged":  # in blocks that flash_attn takes
        step = Step(rng, "dense", 3, 3, rotary=rotary, masks=masks, room=256)
        step.places["block_table"] = np.arange(3, dtype=np.int32)[:, None]
    step.fill()
    if rotary is not None:  # of q's dtype, as many elements as flash_attn takes, and positions to the cache's end
        angles = np.outer(np.arange(step.caches[0].shape[1] + 8), 100.0 ** -np.linspace(0, 1, 8))
        for name, function in (("rotary_cos", np.cos), ("rotary_sin", np.sin)):
            step.new[name] = function(angles).astype(step.dtype)
    real = theirs()
    results = []
    for module in [ours] if real is None else [ours, real]:
        caches = [put("torch-cuda", cache) for cache in step.caches]
        given = {name: put("torch-cuda", x) for name, x in (step.places | step.new | step.options).items()}
        q = put("torch-cuda", step.q)
        results.append((module.flash_attn_with_kvcache(q, *caches, return_softmax_lse=True, **given), caches))
    (got, left), *others = results
    if others:
        ((expected, their_left),) = others
        compare(got, expected, step.dtype)
        for one, other in zip(left, their_left, strict=True):
            assert np.allclose(one.double().cpu(), other.double().cpu(), rtol=2e-2, atol=1e-2)
    else:
        step.check("torch-cuda", left, *got)
