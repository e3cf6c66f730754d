"""Rotary embedding on both backends, against complex multiplication in float64, and what it is made for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import FLOAT32, TINIEST, UNIT_ROUNDOFF, cumulative, normal

import cupyattn
from cupyattn.arrays import view

DTYPES = ("float16", "bfloat16", "float32")

pytestmark = pytest.mark.backends("numpy", "cuda")


def tables(rng, positions, half, dtype="float32"):
    """cos and sin (positions, half) of angles that grow with the position, as models have them."""
    angles = np.arange(positions)[:, None] * rng.uniform(1e-4, 1, half)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def rotated(x, cos, sin, positions, interleaved):
    """(exact, bound): rows x (n, heads, head_dim), row i as at positions[i], and the error honest arithmetic can make.

    A pair is a complex number, and the rotation a product with another. Two products and a sum in float32 are rounded,
    and then the result to x's dtype.
    """
    dim, dtype = 2 * cos.shape[1], x.dtype.name
    exact, size = x.astype(np.float64), np.zeros(x.shape)
    pairs = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, dim))
    a, b = (exact[..., own] for own in pairs)
    c, s = (table.astype(np.float64)[positions][:, None] for table in (cos, sin))
    turned = (a + 1j * b) * (c + 1j * s)
    size[..., pairs[0]] = np.abs(a * c) + np.abs(b * s)
    size[..., pairs[1]] = np.abs(a * s) + np.abs(b * c)
    exact[..., pairs[0]], exact[..., pairs[1]] = turned.real, turned.imag
    moved = UNIT_ROUNDOFF[dtype] * np.abs(exact) + TINIEST[dtype] / 2 + 3 * FLOAT32 * size
    return exact, np.where(size > 0, moved, 0)


def check(got, x, cos, sin, *, offsets=0, interleaved=True, cu_seqlens=None):
    """AssertionError unless got, an array of x's shape, is x rotated within the bound of every element."""
    ends = cu_seqlens if cu_seqlens is not None else np.arange(len(x) + 1) * x.shape[1]
    total = len(x) if cu_seqlens is not None else len(x) * x.shape[1]
    rows, got_rows = (np.ascontiguousarray(array).reshape(total, *x.shape[-2:]) for array in (x, got))
    offsets = np.broadcast_to(offsets, (len(ends) - 1,))
    for b, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        exact, bound = rotated(rows[start:stop], cos, sin, offsets[b] + np.arange(stop - start), interleaved)
        assert (np.abs(got_rows[start:stop].astype(np.float64) - exact) <= bound).all(), f"sequence {b}"
    assert got_rows[ends[-1] :].tobytes() == rows[ends[-1] :].tobytes()


def apply(backend, x, cos, sin, **options):
    """Rotate into a new array, into a poisoned `out` and in place: three times the same bits, which are returned."""
    there = {name: backend.put(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    moved, cos, sin = backend.put(x.copy()), backend.put(cos), backend.put(sin)
    new = cupyattn.apply_rotary(moved, cos, sin, **there)
    assert backend.get(moved).tobytes() == x.tobytes(), "the input is not to be changed"
    out = backend.put(np.full(x.shape, np.nan, x.dtype))
    assert cupyattn.apply_rotary(moved, cos, sin, out=out, **there) is out
    assert cupyattn.apply_rotary(moved, cos, sin, out=moved, **there) is moved
    results = [backend.get(array) for array in (new, out, moved)]
    assert results[0].tobytes() == results[1].tobytes() == results[2].tobytes()
    assert results[0].dtype == x.dtype
    return results[0]


def agrees(backend, x, cos, sin, **options):
    check(apply(backend, x, cos, sin, **options), x, cos, sin, **options)


# ---------------------------------------------------------------------------------------------------- rotating


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("table", ["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(backend, rng, dtype, table, interleaved):
    x = normal(rng, (3, 5, 4, 64), dtype)
    offsets = np.array([0, 40, 7], np.int32)
    table = dtype if table == "own" else table
    agrees(backend, x, *tables(rng, 45, 32, table), offsets=offsets, interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(backend, rng, dtype):
    """Sequences of different lengths, one of them empty, and rows behind the last."""
    x = normal(rng, (15, 2, 64), dtype)
    options = {"cu_seqlens": cumulative([4, 0, 7, 1]), "offsets": np.array([3, 30, 0, 9], np.int32)}
    agrees(backend, x, *tables(rng, 32, 32), **options)
    agrees(backend, x, *tables(rng, 32, 32), cu_seqlens=options["cu_seqlens"], offsets=25, interleaved=False)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize(
    ("head_dim", "half"), [(2, 1), (3, 1), (8, 4), (40, 20), (64, 8), (65, 32), (100, 30), (128, 64), (256, 7)]
)
def test_widths(backend, rng, head_dim, half, interleaved):
    """What lies behind the rotated elements stays as it is, whatever the widths divide by."""
    for dtype in ("float16", "float32"):
        x = normal(rng, (2, 3, 3, head_dim), dtype)
        agrees(backend, x, *tables(rng, 9, half), offsets=6, interleaved=interleaved)


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_nothing_to_rotate(backend, rng, shape):
    agrees(backend, np.zeros(shape, np.float16), *tables(rng, 9, 4))


def test_no_sequences(backend, rng):
    agrees(backend, normal(rng, (3, 2, 8), "float16"), *tables(rng, 9, 4), cu_seqlens=np.zeros(1, np.int32))


def test_strides(backend, rng):
    """Cut from one projection, heads before rows, rows apart or from last to first; in place they stay there."""
    base = normal(rng, (2, 6, 8, 70), "float16")
    cos, sin = tables(rng, 20, 16)
    for cut in (
        lambda x: x[:, :, 2:5, 3:67],
        lambda x: x.swapaxes(1, 2)[..., :64],
        lambda x: x[:, ::2, :, 6:],
        lambda x: x[:, ::-1, ::3, 1:65],
    ):
        moved = backend.put(base.copy())
        x = cut(moved)
        out = cupyattn.apply_rotary(x, backend.put(cos), backend.put(sin), offsets=9)
        check(backend.get(out), cut(base), cos, sin, offsets=9)
        cupyattn.apply_rotary(x, backend.put(cos), backend.put(sin), offsets=9, out=x)
        whole = base.copy()
        cut(whole)[...] = backend.get(out)
        assert backend.get(moved).tobytes() == whole.tobytes()


def test_heads_and_rows_in_another_order(backend, rng):
    """x and out have strides of their own."""
    x, (cos, sin) = normal(rng, (2, 5, 4, 64), "bfloat16"), tables(rng, 9, 32)
    out = backend.put(np.full((2, 4, 5, 64), np.nan, x.dtype)).swapaxes(1, 2)
    cupyattn.apply_rotary(backend.put(x), backend.put(cos), backend.put(sin), out=out)
    check(backend.get(out), x, cos, sin)


def test_infinities_and_nan_stay_within_their_pair(backend, rng):
    x = normal(rng, (1, 3, 2, 64), "float16")
    cos, sin = tables(rng, 9, 32)
    clean = apply(backend, x, cos, sin, interleaved=False)
    x[0, 1, 0, 5], x[0, 2, 1, 40] = np.nan, np.inf
    out = apply(backend, x, cos, sin, interleaved=False)
    hit = np.zeros(x.shape, bool)
    hit[0, 1, 0, [5, 37]] = hit[0, 2, 1, [8, 40]] = True
    assert not np.isfinite(out[hit]).any()
    assert (out[~hit] == clean[~hit]).all()


def test_largest_numbers(backend, rng):
    """float32 holds what float16 cannot: a rotated pair may overflow only when it is rounded."""
    x = np.full((1, 4, 1, 64), 65504, np.float16)
    with np.errstate(over="ignore"):
        out = apply(backend, x, *tables(rng, 4, 32))
    assert (out[0, 0] == 65504).all()
    assert not np.isnan(out).any()


# ------------------------------------------------------------------------------------------------- properties


def test_rotating_back(backend, rng):
    x = normal(rng, (2, 8, 3, 64), "float32")
    cos, sin = tables(rng, 40, 32)
    for interleaved in (True, False):
        there = apply(backend, x, cos, sin, offsets=30, interleaved=interleaved)
        back = apply(backend, there, cos, -sin, offsets=30, interleaved=interleaved)
        assert np.abs(back - x).max() <= 16 * FLOAT32 * np.abs(x).max()


def test_scores_depend_on_distances_alone(backend, rng):
    """What RoFormer rotates for: the product of a query and a key does not change when both move on."""
    q, k = (normal(rng, (1, 6, 1, 64), "float32") for _ in range(2))
    cos, sin = tables(rng, 300, 32)
    scores = []
    for offset in (0, 17, 290):
        moved = [apply(backend, x, cos, sin, offsets=offset)[0, :, 0].astype(np.float64) for x in (q, k)]
        scores.append(moved[0] @ moved[1].T)
    assert np.abs(scores[0] - scores[1]).max() < 1e-4
    assert np.abs(scores[0] - scores[2]).max() < 1e-4


def test_halves_are_interleaved_pairs_in_another_order(backend, rng):
    x, (cos, sin) = normal(rng, (2, 5, 3, 64), "float16"), tables(rng, 9, 32)
    order = np.arange(64).reshape(2, 32).T.ravel()  # 0, 32, 1, 33, …
    halves = apply(backend, x, cos, sin, interleaved=False)
    pairs = apply(backend, np.ascontiguousarray(x[..., order]), cos, sin)
    assert halves[..., order].tobytes() == pairs.tobytes()


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_append_rotates_alike(backend, rng, dtype, interleaved):
    """append_kv with tables, and apply_rotary before an append without: the same bits in the cache."""
    lengths = np.array([3, 0, 11], np.int32)
    k, v = (backend.put(x) for x in normal(rng, (2, 3, 4, 2, 64), dtype))
    cos, sin = (backend.put(table) for table in tables(rng, 20, 24, dtype))
    once, twice = (backend.put(np.zeros((2, 3, 16, 2, 64), k.dtype)) for _ in range(2))
    options = {"cache_seqlens": backend.put(lengths)}
    tabled = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    cupyattn.append_kv(once[0], once[1], k, v, **options, **tabled)
    turned = cupyattn.apply_rotary(k, cos, sin, offsets=options["cache_seqlens"], interleaved=interleaved)
    cupyattn.append_kv(twice[0], twice[1], turned, v, **options)
    assert backend.get(once).tobytes() == backend.get(twice).tobytes()


def test_random_rotations(backend):
    @settings(max_examples=15 if backend.on_gpu else 150)
    @given(st.data())
    def holds(data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        dtype = data.draw(st.sampled_from(["float16"] if backend.on_gpu else DTYPES))
        head_dim = data.draw(st.sampled_from([64, 96])) if backend.on_gpu else data.draw(st.integers(2, 70))
        half = head_dim // 2 if backend.on_gpu else data.draw(st.integers(1, head_dim // 2))
        heads, lengths = data.draw(st.integers(1, 4)), data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
        options = {"interleaved": data.draw(st.booleans())}
        if data.draw(st.booleans()):
            x = normal(rng, (sum(lengths) + data.draw(st.integers(0, 3)), heads, head_dim), dtype)
            options["cu_seqlens"] = cumulative(lengths)
        else:
            x = normal(rng, (len(lengths), lengths[0], heads, head_dim), dtype)
        if data.draw(st.booleans()):
            options["offsets"] = rng.integers(0, 20, len(lengths)).astype(np.int32)
        else:
            options["offsets"] = data.draw(st.integers(0, 20))
        agrees(backend, x, *tables(rng, 30, half, data.draw(st.sampled_from([dtype, "float32"]))), **options)

    holds()


@pytest.mark.gpu
@pytest.mark.backends("cuda")
def test_both_backends_find_the_same_bits(backend, rng):
    for dtype in DTYPES:
        x, (cos, sin) = normal(rng, (3, 50, 4, 128), dtype), tables(rng, 99, 64)
        for interleaved in (True, False):
            options = {"offsets": 40, "interleaved": interleaved}
            assert (
                apply(backend, x, cos, sin, **options).tobytes()
                == cupyattn.apply_rotary(x, cos, sin, **options).tobytes()
            )


# ---------------------------------------------------------------------------------- positions and other refusals


@pytest.mark.parametrize("bad", [[0, 6], [-1, 0], [2**31 - 1, 0]], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_positions_that_the_tables_do_not_have(backend, rng, packed, bad):
    """Refused when checked; unchecked on CUDA, the rows there become NaN and all others are right."""
    x, (cos, sin) = normal(rng, (2, 5, 2, 64), "float16"), tables(rng, 10, 16)
    options = {"offsets": np.array(bad, np.int32)}
    if packed:
        x, options["cu_seqlens"] = x.reshape(10, 2, 64), cumulative([5, 5])
    moved, there = backend.put(x), {name: backend.put(value) for name, value in options.items()}
    moved_cos, moved_sin = backend.put(cos), backend.put(sin)
    with pytest.raises(ValueError, match=r"^offsets: got (6 for the 5 rows of sequence 1,|-1 |2147483647 )"):
        cupyattn.apply_rotary(moved, moved_cos, moved_sin, **there, check=True)
    if backend.on_gpu:
        out = backend.get(cupyattn.apply_rotary(moved, moved_cos, moved_sin, **there)).reshape(2, 5, 2, 64)
        for b, offset in enumerate(bad):
            positions = offset + np.arange(5)
            held = (positions >= 0) & (positions < 10)
            exact, bound = rotated(x.reshape(2, 5, 2, 64)[b, held], cos, sin, positions[held], True)
            assert (np.abs(out[b, held].astype(np.float64) - exact) <= bound).all()
            assert np.isnan(out[b, ~held]).all()


@pytest.mark.gpu
@pytest.mark.backends("cuda")
@pytest.mark.parametrize("ends", [[0, 9, 4], [3, 4, 5], [0, -5, 99], [-(2**31), 2**31 - 1, 0]], ids=str)
def test_offsets_of_sequences_that_are_wrong_read_nothing_else(backend, rng, ends):
    """Run under compute-sanitizer: whatever cu_seqlens holds, no access lies outside the arrays."""
    x, (cos, sin) = normal(rng, (9, 2, 64), "float16"), tables(rng, 10, 32)
    cu_seqlens = backend.put(np.array(ends, np.int32))
    out = cupyattn.apply_rotary(backend.put(x), backend.put(cos), backend.put(sin), cu_seqlens=cu_seqlens)
    assert backend.get(out).shape == x.shape


@pytest.mark.gpu
@pytest.mark.backends("cuda")
def test_all_rows_at_one_position(backend, rng):
    """What queries that see all keys need: `Rotary.per_query` False, with an offset for each sequence or for all."""
    from cupyattn.kernels.rotary import prepare_rotary
    from cupyattn.problem import Rotary
    from cupyattn.rotary import Rotation

    x, (cos, sin) = normal(rng, (2, 5, 4, 64), "float16"), tables(rng, 10, 32)
    moved, out, lengths = backend.put(x), backend.put(np.full_like(x, np.nan)), backend.put(np.array([9, 4], np.int32))
    strides = (5 * 4 * 64, 4 * 64, 64)
    rotation = Rotation("float16", 2, 10, 5, 4, 64, False, strides, strides, 16, Rotary(64, True, 10, "float32", False))
    prepared = prepare_rotary(rotation, 0)
    places = [view(array) for array in (moved, out, backend.put(cos), backend.put(sin))]
    for offsets, uniform, positions in ((view(lengths), 0, [9, 4]), (None, 7, [7, 7])):
        prepared(*places, offsets, uniform, None, 0)
        for b, position in enumerate(positions):
            exact, bound = rotated(x[b], cos, sin, np.full(5, position), True)
            assert (np.abs(backend.get(out)[b].astype(np.float64) - exact) <= bound).all()


def zeros(*shape, dtype=np.float16):
    return np.zeros(shape, dtype)


ROWS, TABLE, INDEX = zeros(2, 3, 4, 64), zeros(9, 32), zeros(2, dtype=np.int32)
PACKED, ENDS = zeros(6, 4, 64), cumulative([3, 3])
REFUSED = {
    "rank": ((PACKED, TABLE, TABLE), {}, "^x: got 3-D shape .* or cu_seqlens for packed rows"),
    "packed rank": ((ROWS, TABLE, TABLE), {"cu_seqlens": ENDS}, "^x: got 4-D shape .* as cu_seqlens is given"),
    "dtype": ((zeros(2, 3, 4, 64, dtype=np.float64), TABLE, TABLE), {}, "^x: got float64, expected float16 or"),
    "head_dim": ((zeros(2, 3, 4, 128)[..., ::2], TABLE, TABLE), {}, "^x: got stride 2 in the last dimension"),
    "not an array": (([1.0], TABLE, TABLE), {}, "^x: got a list"),
    "no cos": ((ROWS, None, TABLE), {}, "^cos: got None"),
    "cos rank": ((ROWS, TABLE[0], TABLE), {}, "^cos: got 1-D shape"),
    "cos dtype": ((ROWS, TABLE.astype(np.float64), TABLE), {}, "^cos: got float64, expected float16 or float32"),
    "cos strides": ((ROWS, zeros(9, 64)[:, ::2], TABLE), {}, "^cos: got strides"),
    "sin shape": ((ROWS, TABLE, zeros(9, 16)), {}, r"^sin: got shape \(9, 16\), expected cos's shape"),
    "sin dtype": ((ROWS, TABLE, TABLE.astype(np.float32)), {}, "^sin: got float32, expected cos's dtype"),
    "too wide": ((ROWS, zeros(9, 33), zeros(9, 33)), {}, "^cos: got 33 columns"),
    "no columns": ((ROWS, zeros(9, 0), zeros(9, 0)), {}, "^cos: got 0 columns"),
    "interleaved": ((ROWS, TABLE, TABLE), {"interleaved": "yes"}, "^interleaved: got 'yes'"),
    "interleaved list": ((ROWS, TABLE, TABLE), {"interleaved": [True]}, r"^interleaved: got \[True\]"),
    "offsets bool": ((ROWS, TABLE, TABLE), {"offsets": True}, "^offsets: got True"),
    "offsets float": ((ROWS, TABLE, TABLE), {"offsets": 1.5}, "^offsets: got 1.5"),
    "offsets dtype": ((ROWS, TABLE, TABLE), {"offsets": INDEX.astype(np.int64)}, "^offsets: got int64, expected int32"),
    "offsets shape": ((ROWS, TABLE, TABLE), {"offsets": zeros(3, dtype=np.int32)}, r"^offsets: got shape \(3,\)"),
    "negative offset": ((ROWS, TABLE, TABLE), {"offsets": -1}, "^offsets: got -1, expected a position of at least 0"),
    "offset too large": ((ROWS, TABLE, TABLE), {"offsets": 7}, "^offsets: got 7 for 3 rows, .* the 9 that cos and sin"),
    "empty cu_seqlens": ((PACKED, TABLE, TABLE), {"cu_seqlens": ENDS[:0]}, "^cu_seqlens: got an empty array"),
    "cu_seqlens start": ((PACKED, TABLE, TABLE), {"cu_seqlens": ENDS + 1}, "^cu_seqlens: got 1 as its first entry"),
    "cu_seqlens order": ((PACKED, TABLE, TABLE), {"cu_seqlens": ENDS[[0, 2, 1]]}, "^cu_seqlens: got 6 followed by 3"),
    "cu_seqlens end": ((PACKED, TABLE, TABLE), {"cu_seqlens": 2 * ENDS}, "^cu_seqlens: got 12 as its last entry"),
    "out shape": ((ROWS, TABLE, TABLE), {"out": zeros(2, 3, 4, 32)}, "^out: got shape .* expected x's shape"),
    "out dtype": ((ROWS, TABLE, TABLE), {"out": ROWS.astype(np.float32)}, "^out: got float32, expected x's dtype"),
    "check": ((ROWS, TABLE, TABLE), {"check": 1}, "^check: got 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(backend, name):
    arguments, options, message = REFUSED[name]
    if "strides" in name or name == "head_dim":
        moved = list(arguments)  # NumPy's own strides do not travel
        index = 0 if name == "head_dim" else 1
        moved = [backend.put(x) for x in moved]
        moved[index] = backend.put(np.repeat(arguments[index], 2, axis=-1))[..., ::2]
    else:
        moved = [backend.put(x) if isinstance(x, np.ndarray) else x for x in arguments]
    there = {key: backend.put(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    there.setdefault("check", True)
    with pytest.raises((TypeError, ValueError), match=message):
        cupyattn.apply_rotary(*moved, **there)


def test_an_out_that_meets_an_input(backend):
    x = backend.put(zeros(2, 4, 4, 64))
    cos, sin = backend.put(TABLE), backend.put(TABLE.copy())
    with pytest.raises(ValueError, match="^out: got an array whose memory range meets x's, expected .* or x itself"):
        cupyattn.apply_rotary(x[:, :3], cos, sin, out=x[:, 1:])
    table = backend.put(zeros(6, 64))
    with pytest.raises(ValueError, match="^out: got an array whose memory range meets sin's"):
        cupyattn.apply_rotary(
            table.reshape(1, 6, 1, 64)[:, :2], cos, table.reshape(12, 32)[:9], out=table[:2].reshape(1, 2, 1, 64)
        )
    again = x.reshape(x.shape)  # another object over the same memory
    assert cupyattn.apply_rotary(x, cos, sin, out=again) is again


@pytest.mark.backends("numpy")
def test_an_out_that_cannot_be_written(backend):
    out = ROWS.copy()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="^out: got a read-only numpy array"):
        cupyattn.apply_rotary(ROWS, TABLE, TABLE, out=out)
    with pytest.raises(ValueError, match="^out: got an array that overlaps itself"):
        shared = np.lib.stride_tricks.as_strided(ROWS.copy(), ROWS.shape, (0, *ROWS.strides[1:]))
        cupyattn.apply_rotary(ROWS, TABLE, TABLE, out=shared)


def test_repeated_calls_with_other_contents(backend, rng):
    """What is prepared for a form of call holds no values: not the offset's, not the tables'."""
    x = normal(rng, (2, 3, 2, 64), "float16")
    for offset in (0, 4, 6):
        agrees(backend, x, *tables(rng, 9, 32), offsets=offset)
    for offset in (0, 4, 6):
        agrees(backend, x, *tables(rng, 9, 32), offsets=np.full(2, offset, np.int32))


# -------------------------------------------------------------------------------------------- other libraries


@pytest.mark.backends("numpy")
def test_torch_tensors(backend, rng):
    torch = pytest.importorskip("torch")
    x, (cos, sin) = normal(rng, (2, 3, 2, 64), "float32"), tables(rng, 9, 32)
    expected = cupyattn.apply_rotary(x, cos, sin, offsets=2)
    moved = torch.from_numpy(x.copy())
    out = cupyattn.apply_rotary(moved, torch.from_numpy(cos), sin, offsets=torch.tensor([2, 2], dtype=torch.int32))
    assert isinstance(out, torch.Tensor) and out.numpy().tobytes() == expected.tobytes()
    assert cupyattn.apply_rotary(moved, cos, sin, offsets=2, out=moved) is moved
    assert moved.numpy().tobytes() == expected.tobytes()
    half = cupyattn.apply_rotary(moved.bfloat16(), torch.from_numpy(cos).bfloat16(), torch.from_numpy(sin).bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.backends("numpy")
def test_jax_arrays(backend, rng):
    jax = pytest.importorskip("jax")
    x, (cos, sin) = normal(rng, (2, 3, 2, 64), "float32"), tables(rng, 9, 32)
    cpu = jax.devices("cpu")[0]
    moved = jax.device_put(x, cpu)
    out = cupyattn.apply_rotary(moved, jax.device_put(cos, cpu), jax.device_put(sin, cpu), offsets=2)
    assert isinstance(out, jax.Array)
    assert np.asarray(out).tobytes() == cupyattn.apply_rotary(x, cos, sin, offsets=2).tobytes()
    with pytest.raises(ValueError, match="^out: got a JAX array, and JAX arrays are immutable"):
        cupyattn.apply_rotary(moved, cos, sin, out=moved)


@pytest.mark.gpu
@pytest.mark.backends("cuda")
def test_torch_and_cupy_together(backend, rng):
    """Tables of one library, rows of another, on its stream."""
    torch = pytest.importorskip("torch")
    x, (cos, sin) = normal(rng, (2, 3, 2, 64), "float16"), tables(rng, 9, 32)
    with torch.cuda.stream(torch.cuda.Stream()):
        moved = torch.from_numpy(x).cuda()
        out = cupyattn.apply_rotary(moved, backend.put(cos), backend.put(sin), offsets=2)
        assert isinstance(out, torch.Tensor)
        check(out.cpu().numpy(), x, cos, sin, offsets=2)


def test_bound_is_tight_enough_to_see_a_wrong_position():
    """The tests' own bound: rows one position off do not pass."""
    rng = np.random.default_rng(0)
    x, (cos, sin) = normal(rng, (2, 5, 4, 64), "bfloat16"), tables(rng, 9, 32)
    out = cupyattn.apply_rotary(x, cos, sin, offsets=1)
    check(out, x, cos, sin, offsets=1)
    for wrong in ({"offsets": 0}, {"offsets": 1, "interleaved": False}):
        with pytest.raises(AssertionError):
            check(out, x, cos, sin, **wrong)
