"""`cupyattn explain`: which kernel a call of a given shape takes, on this machine or on a chip that is elsewhere."""

from __future__ import annotations

import json
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer

from ..explain import explain as explain_call
from .arch import HELP, named_arch
from .device import Device, Precision, array_module, dtype_of, see_doctor, why_no_gpu

PERIOD = 8_388_593  # a prime: the numbers repeat, but no two rows are alike


def explain(
    batch: Annotated[int, typer.Option("--batch", min=0, metavar="N", help="Sequences.")] = 1,
    seqlen_q: Annotated[
        int, typer.Option("--seqlen-q", min=0, metavar="N", help="Queries of each sequence; 1 is a decode step.")
    ] = 2048,
    seqlen_k: Annotated[
        int | None,
        typer.Option(
            "--seqlen-k",
            min=0,
            metavar="N",
            help="Keys of each sequence. A decode step (--seqlen-q 1) has one alone unless this says how many.",
            show_default="as --seqlen-q",
        ),
    ] = None,
    heads: Annotated[int, typer.Option("--heads", min=1, metavar="N", help="Query heads.")] = 32,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            "--kv-heads",
            min=1,
            metavar="N",
            help="Key and value heads; must divide the query heads.",
            show_default="as --heads",
        ),
    ] = None,
    head_dim: Annotated[
        int, typer.Option("--head-dim", min=1, metavar="N", help="Numbers in a head, up to 256.")
    ] = 128,
    head_dim_v: Annotated[
        int | None,
        typer.Option(
            "--head-dim-v", min=1, metavar="N", help="Numbers in a head of values.", show_default="as --head-dim"
        ),
    ] = None,
    dtype: Annotated[
        Precision,
        typer.Option("--dtype", metavar="DTYPE", help="float16, bfloat16, float32, or auto for the best here."),
    ] = Precision.bfloat16,
    causal: Annotated[bool, typer.Option("--causal", help="Each query sees the keys up to its own position.")] = False,
    window: Annotated[
        tuple[int, int] | None,
        typer.Option(
            "--window",
            metavar="LEFT RIGHT",
            help="Keys that a query sees on both sides; -1 for all.",
            show_default=False,
        ),
    ] = None,
    softcap: Annotated[
        float | None, typer.Option("--softcap", metavar="C", help="Bend scores s to C tanh(s / C).", show_default=False)
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size", min=1, metavar="N", help="Take keys from a paged cache of such blocks.", show_default=False
        ),
    ] = None,
    seqlen_new: Annotated[
        int | None,
        typer.Option(
            "--seqlen-new",
            min=0,
            metavar="N",
            help="How many of the keys are new, and appended to the cache by this call.",
            show_default=False,
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            "--kv-dtype",
            metavar="DTYPE",
            help="Take keys from an FP8 cache: float8_e4m3fn or float8_e5m2.",
            show_default=False,
        ),
    ] = None,
    num_splits: Annotated[
        int | None,
        typer.Option(
            "--num-splits",
            min=0,
            metavar="N",
            help="Into how many parts the keys of a cache are split; 0 leaves it to the kernel.",
            show_default=False,
        ),
    ] = None,
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel",
            metavar="NAME",
            help="auto, decode, forward_sm90, forward_sm80, forward_simt, numpy or numpy_float64.",
        ),
    ] = "auto",
    arch: Annotated[
        str | None, typer.Option("--arch", metavar="ARCH", help=HELP, show_default="the GPU here, or NumPy")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also run the call on the GPU here, and say how near it comes to that time."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON.")] = False,
) -> None:
    """Say which kernel a call takes and why: tile, registers, shared memory, work, and the time no kernel can beat.

    Without --arch it is explained for the GPU here, or for NumPy if there is none.
    """
    arch = named_arch(arch) if arch else None
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    if (seqlen_new or 0) > seqlen_k:
        raise typer.BadParameter(f"got {seqlen_new}, expected at most the {seqlen_k} keys", param_hint="--seqlen-new")
    if measure and arch:
        raise typer.BadParameter(f"got it with --arch {arch}, expected the GPU here", param_hint="--measure")
    if measure and (reason := why_no_gpu()) is not None:
        raise typer.BadParameter(f"it needs an NVIDIA GPU; {reason}.{see_doctor(reason)}", param_hint="--measure")
    xp = np if arch else array_module(Device.auto)
    options = {"causal": causal, "window": window, "softcap": softcap, "kernel": kernel, "arch": arch}
    options |= {"kv_dtype": kv_dtype, "num_splits": num_splits, "measure": measure}
    options |= dict.fromkeys(("k_scale", "v_scale"), None if kv_dtype is None else 1.0)
    number = dtype_of(dtype, xp)
    stored = number if kv_dtype is None else np.dtype(np.uint8)

    def array(*shape: int, dtype: np.dtype = number) -> Any:
        made = xp.empty(shape, dtype)
        if measure:  # what memory happens to hold may be faster or slower than numbers are
            _fill(xp, made, dtype if dtype == number else np.dtype(ml_dtypes.float8_e5m2))
        return made

    rows = (batch, seqlen_k)
    if block_size is not None:
        columns = -(-seqlen_k // block_size)
        rows = (batch * columns, block_size)
        options["block_table"] = xp.arange(batch * columns, dtype=np.int32).reshape(batch, columns)
    if block_size is not None or seqlen_new is not None:
        options["cache_seqlens"] = xp.full(batch, seqlen_k - (seqlen_new or 0), dtype=np.int32)
    if seqlen_new is not None:
        options["k"], options["v"] = (array(batch, seqlen_new, kv_heads, d) for d in (head_dim, head_dim_v))
    q = array(batch, seqlen_q, heads, head_dim)
    k, v = (array(*rows, kv_heads, d, dtype=stored) for d in (head_dim, head_dim_v))
    try:
        explanation = explain_call(q, k, v, **options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except ImportError as error:  # no compiler: the message says how to get one
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(explanation.as_dict(), indent=2) if as_json else str(explanation))


def _fill(xp: Any, array: Any, dtype: np.dtype) -> None:
    """Write standard normal numbers of this dtype into memory, over and over."""
    numbers = np.random.default_rng(0).standard_normal(min(array.size, PERIOD), np.float32).astype(dtype)
    to, source = array.reshape(-1).view(np.uint8), xp.asarray(numbers.view(np.uint8))
    for start in range(0, to.size, max(source.size, 1)):
        part = to[start : start + source.size]
        part[...] = source[: part.size]
