"""`cupyattn explain`: which kernel a call of a given shape takes, on this machine or on a chip that is elsewhere."""

from __future__ import annotations

import json
from typing import Annotated

import numpy as np
import typer

from ..explain import explain as explain_call
from .arch import HELP, named_arch
from .device import Device, Precision, array_module, dtype_of


def explain(
    batch: Annotated[int, typer.Option("--batch", min=0, metavar="N", help="Sequences.")] = 1,
    seqlen_q: Annotated[
        int, typer.Option("--seqlen-q", min=0, metavar="N", help="Queries of each sequence; 1 is a decode step.")
    ] = 2048,
    seqlen_k: Annotated[
        int | None,
        typer.Option("--seqlen-k", min=0, metavar="N", help="Keys of each sequence.", show_default="as --seqlen-q"),
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
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel", metavar="NAME", help="auto, decode, forward_sm90, forward_sm80, forward_simt, numpy or numpy_float64."
        ),
    ] = "auto",
    arch: Annotated[
        str | None, typer.Option("--arch", metavar="ARCH", help=HELP, show_default="the GPU here, or NumPy")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the explanation as JSON.")] = False,
) -> None:
    """Say which kernel a call takes and why: tile, registers, shared memory, work, and the time no kernel can beat.

    Without --arch it is explained for the GPU here, or for NumPy if there is none.
    """
    arch = named_arch(arch) if arch else None
    xp = np if arch else array_module(Device.auto)
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    kv_heads = heads if kv_heads is None else kv_heads
    options = {"causal": causal, "window": window, "softcap": softcap, "kernel": kernel, "arch": arch}
    rows = (batch, seqlen_k)
    if block_size is not None:
        columns = -(-seqlen_k // block_size)
        rows = (batch * columns, block_size)
        options["block_table"] = xp.arange(batch * columns, dtype=np.int32).reshape(batch, columns)
        options["cache_seqlens"] = xp.full(batch, seqlen_k, dtype=np.int32)
    q = xp.empty((batch, seqlen_q, heads, head_dim), dtype_of(dtype, xp))
    k, v = (xp.empty((*rows, kv_heads, head_dim), q.dtype) for _ in range(2))
    try:
        explanation = explain_call(q, k, v, **options)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    except ImportError as error:  # no compiler: the message says how to get one
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(json.dumps(explanation.as_dict(), indent=2) if as_json else str(explanation))
