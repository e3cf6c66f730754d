"""`cupyattn bench --tiles`: what `plan.py` chooses between, measured: tiles, and the order of a dense grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from ..arrays import view
from ..kernels.launch import describe_device, prepare
from ..kernels.operands import Operands
from ..plan import (
    BLOCK_COLUMNS,
    LARGE_TILES,
    MAX_ACCUMULATORS,
    SMALL_TILES,
    STATIC_SHARED,
    Device,
    HopperTile,
    Plan,
    Tile,
    plan,
)
from ..problem import Problem, describe
from .progress import progress_bars
from .warmup import Job, compile_all

TOKENS, WIDTH = 16384, 2048  # of a shape in all, and heads * head_dim at most
HEAD_DIMS, SEQLENS = (64, 96, 128, 192, 256), (512, 1024, 4096, 16384)
SECTIONS = (1, 4, 16, 64, TOKENS)  # the last is every pair there is
HOPPER_KEYS = (48, 64, 80, 96, 112, 128, 160, 176, 192)
SPARE_REGISTERS = 24  # that a thread of forward_sm90 needs beside accumulators and weights

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True, slots=True)
class Shape:
    """Self-attention of `TOKENS` tokens."""

    head_dim: int
    causal: bool
    seqlen: int

    @property
    def array(self) -> tuple[int, int, int, int]:
        return TOKENS // self.seqlen, self.seqlen, WIDTH // self.head_dim, self.head_dim

    @property
    def flops(self) -> float:
        return 4.0 * np.prod(self.array) * self.seqlen * (0.5 if self.causal else 1.0)

    def __str__(self) -> str:
        return f"hd {self.head_dim} {'causal' if self.causal else 'full'} {self.seqlen}"


def sweep(cupy: ModuleType, timer: Timer, console: Console) -> dict[str, Any]:
    """Time every tile that fits this device without spills, and every order of the grid, against the plan's choice.

    Returns rows of shape, tile, section, TFLOP/s and the ratio to the plan's own choice, ready for JSON.
    """
    device = cupy.cuda.Device().id
    described = describe_device(device)
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((3, TOKENS * WIDTH), dtype=np.float32).astype(ml_dtypes.bfloat16)
    numbers = [cupy.asarray(x) for x in numbers]
    numbers.append(cupy.empty_like(numbers[0]))
    stream = cupy.cuda.get_current_stream().ptr

    calls = {}
    for shape in (Shape(*values) for values in product(HEAD_DIMS, (False, True), SEQLENS)):
        views = [view(x[: np.prod(shape.array)].reshape(shape.array)) for x in numbers]
        problem = describe(*views[:3], causal=shape.causal)
        calls[shape] = problem, Operands(*views), list(variants(problem, described))
    plans = [made for _, _, found in calls.values() for _, made in found]
    usable = compile_ahead(plans, described, console)

    rows = []
    with progress_bars() as progress:
        task = progress.add_task("", total=len(calls))
        for shape, (problem, operands, found) in calls.items():
            progress.update(task, description=str(shape))

            def speed(problem: Problem = problem, operands: Operands = operands, **insist: Any) -> float:
                prepared = prepare(problem, device, **insist)
                return shape.flops / timer(lambda: prepared(operands, stream)) / 1e9  # noqa: B023 (called at once)

            speed()  # the first call of a shape is slower than others
            chosen = speed()
            for insist, made in found:
                if made.defines not in usable:
                    continue
                tflops = speed(**insist)
                row = dict(head_dim=shape.head_dim, causal=shape.causal, seqlen=shape.seqlen, tile=in_words(made))
                row |= dict(section=made.pairs_per_section, varied=next(iter(insist)))
                rows.append(row | dict(tflops=tflops, ratio=tflops / chosen))
            progress.advance(task)
    show(rows, console)
    return {"tokens": TOKENS, "heads_times_head_dim": WIDTH, "dtype": "bfloat16", "rows": rows}


def variants(problem: Problem, device: Device) -> Iterator[tuple[dict[str, Any], Plan]]:
    """What to insist on, and the plan that comes of it; none twice."""
    hopper = plan(problem, device).kernel == "forward_sm90"
    tiles = hopper_candidates(problem, device) if hopper else candidates(problem.head_dim, device)
    insists: list[dict[str, Any]] = [dict(tile=tile) for tile in tiles]
    insists += [dict(pairs_per_section=section) for section in SECTIONS]
    made = [(insist, plan(problem, device, **insist)) for insist in insists]
    seen = set()
    for insist, found in made:
        key = next(iter(insist)), found.defines, found.pairs_per_section
        if key not in seen:
            seen.add(key)
            yield insist, found


def candidates(head_dim: int, device: Device) -> list[Tile]:
    """The tiles that the plan's tables list for this head_dim and that fit the device."""
    most = device.shared_per_block
    listed = [next(tiles for limit, tiles in table if head_dim <= limit) for table in (LARGE_TILES, SMALL_TILES)]
    tiles = dict.fromkeys(tile for tiles in listed for tile in tiles)
    return [t for t in tiles if t.shared_bytes(head_dim) < most and t.accumulators(head_dim) <= MAX_ACCUMULATORS]


def hopper_candidates(problem: Problem, device: Device) -> list[HopperTile]:
    """The plan's own tile, the same with other buffers, and other numbers of consumers, keys and stages with the most
    buffers of Q and columns of the output that there is room for. All fit shared memory and a thread's registers."""
    own = plan(problem, device)
    defines = dict(own.defines)
    buffers = defines["STAGES"], defines["QUERY_STAGES"], defines["OUT_BLOCKS"] * BLOCK_COLUMNS
    chosen = HopperTile(defines["CONSUMERS"], own.tile_keys, *buffers)
    columns = -(-problem.head_dim // BLOCK_COLUMNS) * BLOCK_COLUMNS

    def fits(tile: HopperTile) -> bool:
        made = plan(problem, device, tile=tile)
        held = columns // 2 + tile.keys // 2 + tile.keys // 4  # output, scores, and weights of 16 bits
        return (
            made.shared_bytes + STATIC_SHARED <= device.shared_per_block
            and held + SPARE_REGISTERS <= dict(made.defines)["CONSUMER_REGISTERS"]
        )

    found = [chosen]
    found += [replace(chosen, stages=stages) for stages in (2, 3, 4)]
    found += [replace(chosen, query_stages=stages) for stages in (1, 2)]
    found += [replace(chosen, out_columns=out) for out in range(BLOCK_COLUMNS, columns + 1, BLOCK_COLUMNS)]
    for form in product((2, 3), HOPPER_KEYS, (2, 3)):
        roomy = product((2, 1), range(columns, 0, -BLOCK_COLUMNS))
        found += [next((tile for rest in roomy if fits(tile := HopperTile(*form, *rest))), chosen)]
    return [tile for tile in dict.fromkeys(found) if fits(tile)]


def compile_ahead(plans: list[Plan], device: Device, console: Console) -> set[Any]:
    """Compile for all plans on all cores. Returns the definitions of kernels that compile and do not spill."""
    jobs = dict.fromkeys(Job(made.kernel, made.defines, device.arch) for made in plans)
    done, failures = compile_all(list(jobs))
    spilled = sum(entry.meta["spill_bytes"] > 0 for entry in done.values())
    if spilled or failures:
        text = f"left out: {spilled} variants that spill registers, {len(failures)} that do not compile"
        console.print(text, style="dim", highlight=False)
    return {job.defines for job, entry in done.items() if not entry.meta["spill_bytes"]}


def in_words(made: Plan) -> str:
    """A plan's tile, as in "128 x 64, 4 warps, 2 stages"."""
    tile, defines = f"{made.tile_rows} x {made.tile_keys}", dict(made.defines)
    if made.kernel != "forward_sm90":
        return f"{tile}, {made.warps} warps, {made.stages} stages"
    out = defines["OUT_BLOCKS"] * BLOCK_COLUMNS
    return f"{tile}, {made.stages} stages, {defines['QUERY_STAGES']} of Q, {out} columns out"


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The variants that beat the plan's choice most, and the choice that a variant beats least."""
    table = Table(title="Variants against the plan's choice, fastest first", title_justify="left")
    for column in ("shape", "tile", "section", "TFLOP/s", "ratio"):
        table.add_column(column, justify="right" if column in ("TFLOP/s", "ratio", "section") else "left")
    for row in sorted(rows, key=lambda row: -row["ratio"])[:20]:
        shape = str(Shape(row["head_dim"], row["causal"], row["seqlen"]))
        table.add_row(shape, row["tile"], str(row["section"]), f"{row['tflops']:.0f}", f"{row['ratio']:.3f}")
    console.print(table)
