"""`cupyattn bench --tiles`: what `plan.py` chooses between, measured: tiles, and the order of a dense grid."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from ..arrays import view
from ..kernels.launch import Prepared, describe_device, prepare
from ..kernels.operands import Operands
from ..plan import LARGE_TILES, MAX_ACCUMULATORS, SMALL_TILES, Plan, Tile
from ..problem import describe

TOKENS, WIDTH = 16384, 2048
HEAD_DIMS, SEQLENS = (64, 128, 256), (512, 2048, 16384)
SECTIONS = (1, 4, 16, TOKENS)  # the last is every pair there is

Timer = Callable[[Callable[[], Any]], float]


def sweep(cupy: ModuleType, timer: Timer, console: Console) -> dict[str, Any]:
    """Time every tile that fits this device, and every order of the grid, against what the plan chooses.

    Returns rows of shape, tile, section, TFLOP/s and the ratio to the plan's own choice, ready for JSON.
    """
    device = cupy.cuda.Device().id
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((3, TOKENS * WIDTH), dtype=np.float32).astype(ml_dtypes.bfloat16)
    numbers = [cupy.asarray(x) for x in numbers]
    out = cupy.empty_like(numbers[0])
    stream = cupy.cuda.get_current_stream().ptr
    rows = []
    for head_dim, causal, seqlen in product(HEAD_DIMS, (False, True), SEQLENS):
        shape = (TOKENS // seqlen, seqlen, WIDTH // head_dim, head_dim)
        views = [view(x.reshape(shape)) for x in (*numbers, out)]
        operands = Operands(*views)
        problem = describe(*views[:3], causal=causal)
        flops = 4.0 * TOKENS * WIDTH * seqlen * (0.5 if causal else 1.0)
        chosen, _ = _speed(timer, prepare(problem, device), operands, stream, flops)
        variants = [dict(tile=tile) for tile in candidates(head_dim, device)]
        variants += [dict(pairs_per_section=section) for section in SECTIONS]
        for insist in variants:
            found, made = _speed(timer, prepare(problem, device, **insist), operands, stream, flops)
            tile = f"{made.tile_rows} x {made.tile_keys}, {made.warps} warps, {made.stages} stages"
            row = dict(head_dim=head_dim, causal=causal, seqlen=seqlen, tile=tile, section=made.pairs_per_section)
            rows.append(row | dict(varied=next(iter(insist)), tflops=found, ratio=found / chosen))
    show(rows, console)
    return {"tokens": TOKENS, "heads_times_head_dim": WIDTH, "dtype": "bfloat16", "rows": rows}


def _speed(timer: Timer, prepared: Prepared, operands: Operands, stream: int, flops: float) -> tuple[float, Plan]:
    """TFLOP/s of a prepared launch, and its plan."""
    return flops / timer(lambda: prepared(operands, stream)) / 1e9, prepared.plan


def candidates(head_dim: int, device: int) -> list[Tile]:
    """The tiles that the plan's tables list for this head_dim and that fit the device."""
    most = describe_device(device).shared_per_block
    listed = [next(tiles for limit, tiles in table if head_dim <= limit) for table in (LARGE_TILES, SMALL_TILES)]
    tiles = dict.fromkeys(tile for tiles in listed for tile in tiles)
    return [t for t in tiles if t.shared_bytes(head_dim) < most and t.accumulators(head_dim) <= MAX_ACCUMULATORS]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The variants that beat the plan's choice most, and the choice that a variant beats least."""
    table = Table(title="Variants against the plan's choice, fastest first", title_justify="left")
    for column in ("shape", "tile", "section", "TFLOP/s", "ratio"):
        table.add_column(column, justify="right" if column in ("TFLOP/s", "ratio", "section") else "left")
    for row in sorted(rows, key=lambda row: -row["ratio"])[:20]:
        shape = f"hd {row['head_dim']} {'causal' if row['causal'] else 'full'} {row['seqlen']}"
        table.add_row(shape, row["tile"], str(row["section"]), f"{row['tflops']:.0f}", f"{row['ratio']:.3f}")
    console.print(table)
