"""Arrays of the namespaces that array_api_compat gives, and of array_api_strict, in and out again."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import normal

import cupyattn

NAMESPACES = ["numpy", "torch", "jax", "strict", pytest.param("cupy", marks=pytest.mark.gpu)]


def namespace(name):
    """The namespace, as array_api_compat has it."""
    if name == "strict":
        return pytest.importorskip("array_api_strict")
    if name == "jax":
        pytest.importorskip("array_api_compat")
        return pytest.importorskip("jax.numpy")
    pytest.importorskip(name)
    return pytest.importorskip(f"array_api_compat.{name}")


def host(array):
    return array.get() if hasattr(array, "get") else np.asarray(array)


@pytest.mark.parametrize("name", NAMESPACES)
def test_arrays_of_a_namespace(rng, name):
    xp = namespace(name)
    numbers = normal(rng, (2, 5, 4, 32), "float32"), *normal(rng, (2, 2, 7, 2, 32), "float32")
    q, k, v = (xp.asarray(x) for x in numbers)
    out, lse = cupyattn.attention(q, k, v, causal=True, return_lse=True)
    expected = cupyattn.attention(*numbers, causal=True, return_lse=True)
    assert type(out) is type(lse) is type(q) and out.dtype == q.dtype == xp.float32
    np.testing.assert_allclose(host(out), expected[0], atol=2e-5)
    np.testing.assert_allclose(host(lse), expected[1], atol=2e-5)
    xp.sum(out)  # it is an array of the namespace


@pytest.mark.parametrize("name", NAMESPACES)
def test_code_that_asks_for_the_namespace(rng, name):
    compat = pytest.importorskip("array_api_compat")
    q = namespace(name).asarray(normal(rng, (9, 4, 32), "float32"))
    xp = compat.array_namespace(q)
    ends = xp.asarray([0, 4, 9], dtype=xp.int32)
    out = cupyattn.attention_varlen(q, q, q, ends)
    assert compat.array_namespace(out) is xp and compat.device(out) == compat.device(q)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_arrays_on_the_cpu_are_computed_in_numpy(rng, name, monkeypatch):
    xp = namespace(name)
    seen = []
    import cupyattn.reference

    forward = cupyattn.reference.forward
    monkeypatch.setattr(cupyattn.reference, "forward", lambda *x, **o: seen.append(x) or forward(*x, **o))
    x = xp.asarray(normal(rng, (1, 3, 2, 24), "float32"))  # a form of its own, for which nothing is prepared yet
    if name == "jax":
        import jax

        x = jax.device_put(x, jax.devices("cpu")[0])
    cupyattn.attention(x, x, x, softmax_scale=float(rng.uniform(0.1, 1)))
    assert len(seen) == 1
