"""Merging states on both backends: against float64, and against attention over all the keys at once."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import FLOAT32, TINIEST, UNIT_ROUNDOFF, normal

import cupyattn

DTYPES = ("float16", "bfloat16", "float32")
MOST = 200  # states that one launch takes

pytestmark = pytest.mark.backends("numpy", "cuda")


def states(rng, n, shape, dtype, spread=3.0):
    """n outputs of this shape, stacked, and their lse: (n, *shape) and (n, …, heads, rows)."""
    *batch, rows, heads, _ = shape
    return normal(rng, (n, *shape), dtype), (spread * rng.standard_normal((n, *batch, heads, rows))).astype(np.float32)


def exact(outs, lses):
    """(out, lse, bounds of both) in float64.

    With n states: an lse is off by half of float32's last place when it comes in, and its difference from the largest
    too, so that a weight is off by 2 e (|lse| + |top|) of itself; another 4 e for exp, and n e for the sums. The result
    is rounded to its dtype. More than one launch takes rounds sums to float32 in between, which adds as much again.
    """
    n, dtype = len(outs), outs.dtype.name
    weights = lses.astype(np.float64)
    top = weights.max(axis=0)
    base = np.where(np.isneginf(top), 0, top)
    share = np.exp(weights - base)
    total = share.sum(axis=0)
    seen = total > 0
    with np.errstate(divide="ignore"):
        lse = np.where(seen, base + np.log(total), -np.inf)
    share = np.where(seen, share / np.where(seen, total, 1), 0).swapaxes(-1, -2)[..., None]
    values = np.where(share > 0, outs.astype(np.float64), 0)
    out, size = (share * values).sum(axis=0), (share * np.abs(values)).sum(axis=0)
    finite = np.where(np.isneginf(weights), 0, np.abs(weights)).max(axis=0)
    error = 2 * FLOAT32 * (8 + 2 * n + 4 * finite)
    bound = UNIT_ROUNDOFF[dtype] * np.abs(out) + TINIEST[dtype] / 2 + error.swapaxes(-1, -2)[..., None] * size
    return out, lse, np.where(size > 0, bound, 0), np.where(seen, error + 2 * FLOAT32 * np.abs(base), 0)


def check(got, got_lse, outs, lses):
    """AssertionError unless the merged state is that of the stacked ones within the bounds."""
    out, lse, out_bound, lse_bound = exact(outs, lses)
    assert (got.shape, got.dtype, got_lse.shape, got_lse.dtype) == (out.shape, outs.dtype, lse.shape, np.float32)
    error = np.abs(got.astype(np.float64) - out)
    assert (error <= out_bound).all(), f"off by up to {np.nanmax(error):.3g}, NaN: {np.isnan(got).sum()}"
    with np.errstate(invalid="ignore"):
        assert ((got_lse == lse) | (np.abs(got_lse - lse) <= lse_bound)).all()


def merge(backend, outs, lses):
    """Merge the stacked states, as one array and as n, into a new array and a poisoned one: the same bits."""
    moved, moved_lses = backend.put(outs), backend.put(lses)
    apart, apart_lses = [backend.put(out) for out in outs], tuple(backend.put(lse) for lse in lses)
    target = backend.put(np.full(outs.shape[1:], np.nan, outs.dtype))
    results = [
        cupyattn.merge_states(moved, moved_lses),
        cupyattn.merge_states(apart, apart_lses),
        cupyattn.merge_states(moved, apart_lses, out=target),
    ]
    assert results[2][0] is target
    results = [tuple(backend.get(array) for array in pair) for pair in results]
    for out, lse in results[1:]:
        assert out.tobytes() == results[0][0].tobytes() and lse.tobytes() == results[0][1].tobytes()
    return results[0]


def agrees(backend, outs, lses):
    check(*merge(backend, outs, lses), outs, lses)


# ----------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states(backend, rng, dtype, n, packed):
    agrees(backend, *states(rng, n, (7, 3, 64) if packed else (2, 5, 3, 64), dtype))


@pytest.mark.parametrize("head_dim", [1, 3, 8, 12, 40, 65, 100, 128, 256, 512])
def test_widths(backend, rng, head_dim):
    for dtype in ("float16", "float32"):
        agrees(backend, *states(rng, 3, (2, 4, 2, head_dim), dtype))


@pytest.mark.parametrize("n", [MOST - 1, MOST, MOST + 1, 2 * MOST + 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_states(backend, rng, dtype, n):
    """More than one launch takes are merged in rounds, through float32."""
    agrees(backend, *states(rng, n, (2, 3, 2, 16), dtype))


def test_rounds_of_rounds(backend, rng):
    outs, lses = states(rng, 1, (1, 1, 1, 2), "float16")
    n = MOST * MOST + 3
    outs, lses = np.repeat(outs, n, axis=0), np.repeat(lses, n, axis=0)
    lses += rng.standard_normal(lses.shape).astype(np.float32)
    got, lse = cupyattn.merge_states(backend.put(outs), backend.put(lses))
    check(backend.get(got), backend.get(lse), outs, lses)


@pytest.mark.parametrize("spread", [0, 30, 1000])
def test_weights_that_differ_a_little_and_a_lot(backend, rng, spread):
    agrees(backend, *states(rng, 5, (2, 6, 3, 64), "float32", spread))


def test_large_lse(backend, rng):
    """Only differences of an lse count: exp of it would overflow, or vanish."""
    for offset in (-3000, 3000):
        outs, lses = states(rng, 3, (2, 6, 3, 64), "float16")
        agrees(backend, outs, lses + np.float32(offset))


@pytest.mark.parametrize("junk", [np.nan, np.inf, 60000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_that_saw_no_key(backend, rng, dtype, junk):
    """They have no part, whatever they hold; where none saw a key, the result is exactly 0 and -inf."""
    outs, lses = states(rng, 4, (2, 6, 3, 64), dtype)
    blind = rng.random(lses.shape) < 0.4
    blind[..., 2] = True
    lses[blind] = -np.inf
    outs[blind.swapaxes(-1, -2)] = junk
    out, lse = merge(backend, outs, lses)
    check(out, lse, outs, lses)
    assert (out[:, 2] == 0).all() and (lse[..., 2] == -np.inf).all()


def test_nan_is_not_lost(backend, rng):
    """A state that is NaN, as for indices that do not fit, makes its rows NaN and no other."""
    outs, lses = states(rng, 3, (2, 6, 3, 64), "float16")
    clean, clean_lse = merge(backend, outs, lses)
    lses[1, 0, 2, 4] = outs[1, 0, 4, 2] = np.nan
    outs[2, 1, 3, 0, 5] = np.nan
    out, lse = merge(backend, outs, lses)
    assert np.isnan(out[0, 4, 2]).all() and np.isnan(lse[0, 2, 4]) and np.isnan(out[1, 3, 0, 5])
    wrong, wrong_lse = np.zeros(out.shape, bool), np.zeros(lse.shape, bool)
    wrong[0, 4, 2] = wrong[1, 3, 0, 5] = wrong_lse[0, 2, 4] = True
    assert (out[~wrong] == clean[~wrong]).all() and (lse[~wrong_lse] == clean_lse[~wrong_lse]).all()


@pytest.mark.parametrize("shape", [(0, 5, 3, 64), (2, 0, 3, 64), (2, 5, 0, 64), (0, 3, 64)])
def test_no_rows(backend, rng, shape):
    agrees(backend, *states(rng, 3, shape, "float16"))


def test_strides(backend, rng):
    """States cut from larger arrays, with heads before rows; a result with strides of its own."""
    outs, lses = states(rng, 3, (2, 5, 4, 64), "float16")
    base = np.full((3, 2, 4, 5, 70), np.nan, np.float16)
    base[..., 3:67] = outs.swapaxes(2, 3)
    moved = backend.put(base)[..., 3:67].swapaxes(2, 3)
    out = backend.put(np.full((2, 5, 6, 64), np.nan, np.float16))[:, :, 1:5]
    got, lse = cupyattn.merge_states(moved, backend.put(lses), out=out)
    assert got is out
    check(backend.get(got), backend.get(lse), outs, lses)
    got, lse = cupyattn.merge_states([moved[2], moved[0]], [backend.put(lses[i]) for i in (2, 0)])
    check(backend.get(got), backend.get(lse), outs[[2, 0]], lses[[2, 0]])


def test_the_same_array_twice(backend, rng):
    """Two states that are one: the weights are halves, and the lse grows by log 2."""
    outs, lses = states(rng, 1, (2, 5, 3, 64), "float32")
    out, lse = (backend.put(x[0]) for x in (outs, lses))
    got, got_lse = cupyattn.merge_states([out, out], [lse, lse])
    check(backend.get(got), backend.get(got_lse), np.repeat(outs, 2, axis=0), np.repeat(lses, 2, axis=0))


# -------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cuts", [[17], [1, 2, 64], [0, 30, 30, 90]], ids=str)
def test_slices_of_the_keys(backend, rng, cuts, dtype):
    """Attention over slices of the keys, one of them possibly empty, merges to attention over all of them."""
    q, k, v = normal(rng, (2, 7, 4, 64), dtype), *normal(rng, (2, 2, 90, 2, 64), dtype)
    edges = [0, *cuts, 90]
    parts = [
        cupyattn.attention(*(backend.put(np.ascontiguousarray(x)) for x in (q, k[:, i:j], v[:, i:j])), return_lse=True)
        for i, j in zip(edges[:-1], edges[1:], strict=True)
    ]
    out, lse = cupyattn.merge_states(*zip(*parts, strict=True))
    expected = oracle.attention(q, k, v)
    out_bound, lse_bound = expected.bounds(dtype)
    # Every part was rounded to dtype before.
    out_bound += (UNIT_ROUNDOFF[dtype] + 64 * FLOAT32) * expected.weight
    assert (np.abs(backend.get(out).astype(np.float64) - expected.out) <= out_bound).all()
    assert (np.abs(backend.get(lse) - expected.lse) <= 4 * lse_bound).all()


def test_merging_in_any_order_and_grouping(backend, rng):
    """Associative and commutative, but for rounding."""
    outs, lses = states(rng, 6, (2, 5, 3, 64), "float32")

    def merged(pairs):
        return cupyattn.merge_states(*zip(*pairs, strict=True))

    pairs = [(backend.put(out), backend.put(lse)) for out, lse in zip(outs, lses, strict=True)]
    grouped = merged([merged(pairs[:2]), merged([merged(pairs[2:5]), pairs[5]])])
    for out, lse in (merged(pairs[::-1]), grouped):
        check(backend.get(out), backend.get(lse), outs, lses)


def test_calls_repeat_bit_for_bit(backend, rng):
    outs, lses = (backend.put(x) for x in states(rng, 300, (2, 9, 4, 64), "float16"))
    first = [backend.get(array).tobytes() for array in cupyattn.merge_states(outs, lses)]
    for _ in range(3):
        assert [backend.get(array).tobytes() for array in cupyattn.merge_states(outs, lses)] == first


def test_random_states(backend):
    @settings(max_examples=15 if backend.on_gpu else 150)
    @given(st.data())
    def holds(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        dtype = data.draw(st.sampled_from(DTYPES))
        head_dim = data.draw(st.sampled_from([16, 40]) if backend.on_gpu else st.integers(1, 70))
        rows = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=2))
        n, heads = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
        outs, lses = states(rng, n, (*rows, heads, head_dim), dtype, data.draw(st.sampled_from([0.1, 3, 50])))
        lses[rng.random(lses.shape) < data.draw(st.sampled_from([0, 0.5]))] = -np.inf
        agrees(backend, outs, lses)

    holds()


# ---------------------------------------------------------------------------------------------------- refusals


def zeros(*shape, dtype=np.float16):
    return np.zeros(shape, dtype)


OUT, LSE = zeros(2, 5, 3, 8), zeros(2, 3, 5, dtype=np.float32)
REFUSED = {
    "no outs": (([], []), {}, "^outs: got an empty sequence"),
    "no lses": (([OUT], []), {}, "^lses: got an empty sequence"),
    "empty axis": ((zeros(0, 2, 5, 3, 8), [LSE]), {}, r"^outs: got shape \(0, 2, 5, 3, 8\), expected a leading axis"),
    "not an array": (([OUT, 1.0], [LSE, LSE]), {}, r"^outs\[1\]: got a float"),
    "counts": (([OUT, OUT], [LSE]), {}, "^lses: got 1 states, expected as many as outs has, 2"),
    "rank": (([OUT[0, 0]], [LSE]), {}, r"^outs\[0\]: got 2-D shape"),
    "a state alone": ((OUT[0], LSE), {}, r"^outs: got 2-D shape \(3, 8\)"),
    "shapes": (([OUT, OUT[:1]], [LSE, LSE]), {}, r"^outs\[1\]: got shape .* expected outs\[0\]'s shape"),
    "dtypes": (([OUT, OUT.astype(np.float32)], [LSE, LSE]), {}, r"^outs\[1\]: got float32, expected outs\[0\]'s dtype"),
    "float64": (([OUT.astype(np.float64)], [LSE]), {}, r"^outs\[0\]: got float64, expected float16 or bfloat16 or"),
    "no head_dim": (([OUT[..., :0]], [LSE]), {}, r"^outs\[0\]: got shape .* at least 1"),
    "lse shape": (([OUT], [zeros(2, 5, 3, dtype=np.float32)]), {}, r"^lses\[0\]: got shape .* expected \(2, 3, 5\)"),
    "stacked lse shape": ((OUT[None], zeros(1, 3, 5, dtype=np.float32)), {}, r"^lses: got shape \(3, 5\)"),
    "packed lse shape": (([OUT[0]], [LSE]), {}, r"^lses\[0\]: got shape .* expected \(3, 5\)"),
    "lse dtype": (([OUT], [LSE.astype(np.float16)]), {}, r"^lses\[0\]: got float16, expected float32"),
    "out shape": (([OUT], [LSE]), {"out": OUT[:1]}, "^out: got shape .* expected a state's shape"),
    "out dtype": (([OUT], [LSE]), {"out": OUT.astype(np.float32)}, "^out: got float32"),
    "out": (([OUT], [LSE]), {"out": "new"}, "^out: got a str"),
}


def move(backend, value):
    if isinstance(value, (list, tuple)):
        return type(value)(move(backend, one) for one in value)
    return backend.put(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(backend, name):
    arguments, options, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        cupyattn.merge_states(*move(backend, arguments), **{key: move(backend, x) for key, x in options.items()})


def test_strides_that_are_refused(backend):
    out, lse = backend.put(OUT), backend.put(LSE)
    other = backend.put(zeros(2, 3, 5, 8)).swapaxes(1, 2)
    with pytest.raises(ValueError, match=r"^outs\[1\]: got strides .* expected outs\[0\]'s strides"):
        cupyattn.merge_states([out, other], [lse, lse])
    with pytest.raises(ValueError, match=r"^outs\[0\]: got stride 2 in the last dimension"):
        cupyattn.merge_states([backend.put(zeros(2, 5, 3, 16))[..., ::2]], [lse])
    with pytest.raises(ValueError, match=r"^lses\[0\]: got strides"):
        cupyattn.merge_states([out], [backend.put(np.float32(zeros(2, 5, 3))).swapaxes(1, 2)])


def test_an_out_that_meets_a_state(backend):
    outs, lses = backend.put(zeros(3, 2, 5, 3, 8)), backend.put(zeros(3, 2, 3, 5, dtype=np.float32))
    with pytest.raises(ValueError, match="^out: got an array whose memory range meets outs's, expected memory"):
        cupyattn.merge_states(outs, lses, out=outs[1])
    with pytest.raises(ValueError, match=r"^out: got an array whose memory range meets outs\[1\]'s"):
        cupyattn.merge_states(list(outs)[:2], list(lses)[:2], out=outs[1])
    assert cupyattn.merge_states(outs[:2], lses[:2], out=outs[2])[0].shape == (2, 5, 3, 8)


@pytest.mark.backends("numpy")
def test_misaligned_states(backend):
    room = np.zeros(2 * OUT.nbytes + 1, np.uint8)
    odd = room[1 : OUT.nbytes + 1].view(np.float16).reshape(OUT.shape)
    with pytest.raises(ValueError, match=r"^outs\[1\]: got a misaligned array, expected an address divisible by the 2"):
        cupyattn.merge_states([OUT, odd], [LSE, LSE])


# ---------------------------------------------------------------------------------------------- other libraries


@pytest.mark.backends("numpy")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_tensors(backend, rng, dtype):
    torch = pytest.importorskip("torch")
    outs, lses = states(rng, 3, (2, 5, 3, 16), dtype)
    expected = cupyattn.merge_states(outs, lses)
    moved = torch.from_numpy(outs.astype(np.float32)).to(getattr(torch, dtype))
    for given_outs in (moved, list(moved)):
        out, lse = cupyattn.merge_states(given_outs, [torch.from_numpy(one) for one in lses])
        assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor) and out.dtype == moved.dtype
        assert out.float().numpy().tobytes() == expected[0].astype(np.float32).tobytes()
        assert lse.numpy().tobytes() == expected[1].tobytes()


@pytest.mark.backends("numpy")
def test_jax_arrays(backend, rng):
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    outs, lses = states(rng, 3, (2, 5, 3, 16), "float32")
    expected = cupyattn.merge_states(outs, lses)
    stacked, moved_lses = jax.device_put(outs, cpu), jax.device_put(lses, cpu)
    for given_outs in (stacked, [jax.device_put(one, cpu) for one in outs]):
        out, lse = cupyattn.merge_states(given_outs, moved_lses)
        assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
        assert np.asarray(out).tobytes() == expected[0].tobytes()
        assert np.asarray(lse).tobytes() == expected[1].tobytes()
    with pytest.raises(ValueError, match="^out: got a JAX array, and JAX arrays are immutable"):
        cupyattn.merge_states(outs, lses, out=stacked[0])


@pytest.mark.gpu
@pytest.mark.backends("cuda")
def test_libraries_together(backend, rng):
    """States of two libraries, on two streams."""
    torch = pytest.importorskip("torch")
    outs, lses = states(rng, 2, (2, 5, 3, 64), "float16")
    with torch.cuda.stream(torch.cuda.Stream()):
        first = torch.from_numpy(outs[0]).cuda()
        out, lse = cupyattn.merge_states([first, backend.put(outs[1])], [backend.put(one) for one in lses])
        assert isinstance(out, torch.Tensor)
        check(out.cpu().numpy(), lse.cpu().numpy(), outs, lses)


@pytest.mark.gpu
@pytest.mark.backends("cuda")
@pytest.mark.parametrize("n", [3, 2 * MOST])
def test_both_backends_agree_closely(backend, rng, n):
    """They add up in the same order, so that only exp, log and the rounds between launches differ."""
    outs, lses = states(rng, n, (2, 50, 4, 128), "float32")
    (out, lse), (here, here_lse) = merge(backend, outs, lses), cupyattn.merge_states(outs, lses)
    assert np.abs(out - here).max() <= 64 * FLOAT32 * np.abs(outs).max()
    assert np.abs(lse - here_lse).max() <= 64 * FLOAT32 * np.abs(lses).max()
