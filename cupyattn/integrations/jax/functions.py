"""The public functions as functions of JAX arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ...arrays import refuse
from ...attention import INDEX_ROLES, SCALE_ROLES
from ...problem import check_indices
from .batching import mappable
from .forms import ROLES, Form, abstracts, described

Arrays = Mapping[str, jax.Array]
Results = jax.Array | tuple[jax.Array, ...]

REQUIRED = ("q", "k", "v", "cu_seqlens_q")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
    command_buffer: bool = True,
) -> Results:
    """`cupyattn.attention` in JAX: dense q, k and v, masks aligned to the bottom right.

    Args:
        q: (batch, seqlen_q, heads, head_dim), float16, bfloat16 or float32.
        k, v: (batch, seqlen_k, kv_heads, head_dim), where kv_heads divides heads; v may have a head_dim of its own.
        alibi_slopes: float32 (heads,) or (batch, heads).
        sinks: float32 (heads,).
        causal, window, softmax_scale, softcap, return_lse, kernel: as in `cupyattn.attention`; static.
        command_buffer: let XLA capture the launch into a command buffer.

    Returns:
        (batch, seqlen_q, heads, head_dim of v) of q's dtype; with return_lse a pair of it and the lse, float32 (batch,
        heads, seqlen_q).

    Raises:
        TypeError, ValueError: an argument does not fit, while JAX traces.
    """
    masks = _masks(causal, window, softmax_scale, softcap, return_lse, kernel)
    arrays = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, "sinks": sinks}
    return _call("attention", masks, arrays, command_buffer)


def attention_varlen(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: jax.Array | None = None,
    seqused_k: jax.Array | None = None,
    layout: str = "NHD",
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
    command_buffer: bool = True,
) -> Results:
    """`cupyattn.attention_varlen` in JAX: sequences packed one behind the other, or paged keys and values.

    Lengths are arrays and may be traced; only the sums of rows are shapes.

    Args:
        q: (total_q, heads, head_dim).
        k, v: (total_k, kv_heads, head_dim), or with block_table the blocks of a paged cache, (num_blocks, block_size,
            kv_heads, head_dim) for layout "NHD", (num_blocks, kv_heads, block_size, head_dim) for "HND".
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,); without cu_seqlens_k packed keys have those of the queries.
        block_table: int32 (batch, max_blocks), seqused_k: int32 (batch,).
        max_seqlen_q, max_seqlen_k, layout, causal, window, softmax_scale, softcap, return_lse, kernel: as in
            `cupyattn.attention_varlen`; static.
        alibi_slopes, sinks, command_buffer: as in `attention`.

    Returns:
        (total_q, heads, head_dim of v) of q's dtype; with return_lse a pair of it and the lse, float32 (heads,
        total_q).

    Raises:
        TypeError, ValueError: an argument does not fit, while JAX traces.
        jax.errors.JaxRuntimeError: so do the contents of an index array, on the CPU, when the call runs.
    """
    options = _masks(causal, window, softmax_scale, softcap, return_lse, kernel)
    options |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "layout": layout}
    arrays = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, "sinks": sinks}
    arrays |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    arrays |= {"block_table": block_table, "seqused_k": seqused_k}
    return _call("attention_varlen", options, arrays, command_buffer)


def attention_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    *,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    rotary_cos: jax.Array | None = None,
    rotary_sin: jax.Array | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: jax.Array | int | None = None,
    cache_batch_idx: jax.Array | None = None,
    cache_leftpad: jax.Array | None = None,
    block_table: jax.Array | None = None,
    layout: str = "NHD",
    kv_dtype: str | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    num_splits: int = 0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
    command_buffer: bool = True,
) -> Results:
    """`cupyattn.attention_with_kvcache` as a function of its arrays: with k and v given, new caches come back.

    **The caches are donated** where k and v are given: outside `jax.jit` the arrays passed as k_cache and v_cache are
    given up, and the new rows are written in place. A call that is refused before it runs leaves them; one that fails
    while it runs, as XLA has it, does not. To a `jax.jit` of yours around the call pass donate_argnames for them, else
    XLA copies them first.

        step = jax.jit(step, donate_argnames=("k_cache", "v_cache"))
        out, k_cache, v_cache = step(q, k_cache, v_cache, k, v, lengths)

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (entries, capacity, kv_heads, head_dim), or with block_table blocks as in `attention_varlen`.
        k, v: (batch, seqlen_new, kv_heads, head_dim) to append behind cache_seqlens tokens.
        cache_seqlens: int32 (batch,), or an int for all, which is then static.
        rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table, k_scale, v_scale: arrays as in
            `cupyattn.attention_with_kvcache`; scales that are numbers are static.
        rotary_interleaved, layout, kv_dtype, num_splits, causal, window, softmax_scale, softcap, return_lse, kernel: as
            there; static.
        alibi_slopes, sinks, command_buffer: as in `attention`.

    Returns:
        out, (batch, seqlen_q, heads, head_dim of v_cache) of q's dtype; with return_lse (out, lse), the lse float32
        (batch, heads, seqlen_q); with k and v (out, k_cache, v_cache), or (out, lse, k_cache, v_cache).

    Raises:
        TypeError, ValueError: an argument does not fit, while JAX traces; or what an index array holds, on the CPU
            outside of JAX's transformations where k and v are given.
        jax.errors.JaxRuntimeError: what an index array holds does not fit, on the CPU, when the call runs.
    """
    options = _masks(causal, window, softmax_scale, softcap, return_lse, kernel)
    options |= {"layout": layout, "kv_dtype": kv_dtype, "k_scale": None, "v_scale": None}
    options |= {"rotary_interleaved": rotary_interleaved, "num_splits": num_splits}
    arrays = {"q": q, "k": k_cache, "v": v_cache, "alibi_slopes": alibi_slopes, "sinks": sinks}
    arrays |= {"k_new": k, "v_new": v, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    arrays |= {"block_table": block_table, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        where = arrays if isinstance(scale, (jax.Array, np.ndarray)) else options
        where[name] = scale
    length = None
    if isinstance(cache_seqlens, (int, np.integer)) and not isinstance(cache_seqlens, bool):
        length = int(cache_seqlens)
    else:
        arrays["seqused_k"] = cache_seqlens
    return _call("attention_with_kvcache", options, arrays, command_buffer, length)


def _masks(causal: Any, window: Any, softmax_scale: Any, softcap: Any, return_lse: Any, kernel: Any) -> dict[str, Any]:
    return {
        "causal": causal,
        "window": tuple(window) if isinstance(window, list) else window,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "return_lse": return_lse,
        "kernel": kernel,
    }


def _call(
    function: str,
    options: dict[str, Any],
    arrays: Mapping[str, jax.Array | None],
    command_buffer: bool,
    length: int | None = None,
) -> Results:
    kinds = tuple([type(value) for value in options.values()])
    form = Form(function, tuple(options.items()), kinds, length, bool(command_buffer))
    arrays = {role: array for role, array in arrays.items() if array is not None or role in REQUIRED}
    for role, array in arrays.items():
        if not isinstance(array, (jax.Array, np.ndarray)):
            came = None if array is None else f"a {type(array).__name__}"
            refuse(form.name_of(role), came, "a JAX array, traced or not, or a NumPy array", TypeError)
    for name, value in options.items():
        if isinstance(value, jax.core.Tracer):
            refuse(
                name,
                "a traced value",
                "a Python value, as options are static: see jax.jit's static_argnames",
                TypeError,
            )
    try:
        hash(form)
    except TypeError:  # no option that is right is without a hash: this one is refused by its name
        described.__wrapped__(form, abstracts(form, arrays))
        raise
    if "k_new" in arrays:
        _check_before_donating(form, arrays)
    caches = {role: arrays.pop(role) for role in ("k", "v")} if "k_new" in arrays else {}
    results = (_append if caches else _read)(form, caches, arrays)
    varying = frozenset().union(*(_varying(x) for x in (*caches.values(), *arrays.values())))
    if varying:
        results = tuple([jax.lax.pcast(x, tuple(varying - _varying(x)), to="varying") for x in results])
    return results if len(results) > 1 else results[0]


def _check_before_donating(form: Form, arrays: Arrays) -> None:
    """Refuse what would fail when the caches are given up already, where arrays have values that are at hand."""
    if any(isinstance(array, jax.core.Tracer) for array in arrays.values()):
        return
    found = described(form, abstracts(form, arrays))
    if arrays["k"] is arrays["v"]:
        refuse("v_cache", "the array that is k_cache too", "a cache of its own")
    if all(device.platform == "cpu" for device in jnp.asarray(arrays["k"]).devices()):
        roles = [role for role in (*INDEX_ROLES, *SCALE_ROLES) if role in arrays]
        check_indices(found.problem, {form.name_of(role): np.asarray(arrays[role]) for role in roles})


def _varying(array: jax.Array | np.ndarray) -> frozenset[str]:
    """The axes of `jax.shard_map`'s mesh along which an array differs: results do where any argument does."""
    if not isinstance(array, jax.core.Tracer):
        return frozenset()
    kind = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)  # in some versions of JAX, in others vma
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(form: Form, caches: Arrays, arrays: Arrays) -> tuple[jax.Array, ...]:
    return mappable(form)({**caches, **arrays})


@partial(_attend.defjvp, symbolic_zeros=True)
def _refuse_gradients(form: Form, primals: tuple, tangents: tuple[Arrays, Arrays]) -> NoReturn:
    moving = {role for part in tangents for role, x in part.items() if type(x) is not SymbolicZero}
    names = ", ".join(form.name_of(role) for role in ROLES if role in moving)
    came = "an array that gradients are taken of (by jax.grad, jax.vjp or jax.jvp)"
    refuse(names, came, "its values alone, as there is no backward pass: jax.lax.stop_gradient gives them", TypeError)


_read = jax.jit(_attend, static_argnums=0, inline=True)
_append = jax.jit(_attend, static_argnums=0, donate_argnums=1, inline=True)
