"""`cupyattn bench --tiles`, with NumPy in CuPy's place and a launch that takes as long as its tile is small."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from problems import make_problem
from rich.console import Console

from cupyattn.cli import tiles
from cupyattn.plan import DEVICES, STATIC_SHARED, HopperTile, plan

QUIET = Console(file=None, quiet=True)


class Stage:
    """A small sweep for a chip that is not here: the plans of all launches, in order, and what was compiled."""

    def __init__(self, monkeypatch, arch):
        self.plans, self.compiled = [], []
        self.device = DEVICES[arch]
        stage = self

        class Prepared:
            def __init__(self, problem, device, **insist):
                self.plan = plan(problem, stage.device, **insist)

            def __call__(self, operands, stream):
                assert operands.out is not None
                stage.plans.append(self.plan)

        monkeypatch.setattr(tiles, "prepare", Prepared)
        monkeypatch.setattr(tiles, "describe_device", lambda device: stage.device)
        monkeypatch.setattr(tiles, "compile_all", self.compile_all)
        monkeypatch.setattr(tiles, "TOKENS", 1024)
        monkeypatch.setattr(tiles, "SEQLENS", (512,))

    def compile_all(self, jobs):
        """Kernels of 96 keys spill, and those of 160 do not compile."""
        self.compiled += jobs
        keys = {job: dict(job.defines)["TILE_N"] for job in jobs}
        done = {job: SimpleNamespace(meta={"spill_bytes": 8 * (keys[job] == 96)}) for job in jobs if keys[job] != 160}
        return done, [RuntimeError()] * (len(jobs) - len(done))

    def timer(self, call):
        call()
        return 1000.0 / self.plans[-1].tile_rows

    def sweep(self):
        cuda = SimpleNamespace(Device=lambda: SimpleNamespace(id=0), get_current_stream=lambda: SimpleNamespace(ptr=0))
        cupy = SimpleNamespace(cuda=cuda, asarray=np.asarray, empty_like=np.empty_like)
        return json.loads(json.dumps(tiles.sweep(cupy, self.timer, QUIET)))["rows"]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("80", {"128 x 64, 4 warps, 2 stages", "64 x 64, 4 warps, 1 stages"}),
        ("90a", {"192 x 80, 2 stages, 2 of Q, 128 columns out", "128 x 64, 3 stages, 2 of Q, 128 columns out"}),
    ],
)
def test_sweep_compares_every_tile_and_order_with_the_plan(monkeypatch, arch, expected):
    rows = Stage(monkeypatch, arch).sweep()
    shapes = {(row["head_dim"], row["causal"]) for row in rows}
    assert shapes == {(d, causal) for d in tiles.HEAD_DIMS for causal in (False, True)}
    assert {row["varied"] for row in rows} == {"tile", "pairs_per_section"}
    for row in rows:
        assert row["tflops"] > 0
        if row["varied"] == "pairs_per_section":  # the tile is the plan's own, so the stand-in takes as long
            assert row["ratio"] == pytest.approx(1)
    assert expected <= {row["tile"] for row in rows if row["head_dim"] == 128 and row["varied"] == "tile"}
    named = [tuple(row[name] for name in ("head_dim", "causal", "seqlen", "tile", "section", "varied")) for row in rows]
    assert len(named) == len(set(named))


def test_kernels_are_compiled_ahead_and_those_that_spill_are_left_out(monkeypatch):
    stage = Stage(monkeypatch, "90a")
    rows = stage.sweep()
    compiled = {dict(job.defines)["TILE_N"] for job in stage.compiled}
    assert {96, 160} < compiled and len(stage.compiled) == len(set(stage.compiled))
    measured = {int(row["tile"].split(",")[0].split(" x ")[1]) for row in rows if row["head_dim"] == 64}
    assert {64, 128, 192} <= measured and not measured & {96, 160}


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_candidates_hold_every_choice_of_the_plan_and_fit(head_dim):
    device = DEVICES["80"]
    listed = tiles.candidates(head_dim, device)
    assert len(listed) == len(set(listed)) > 1
    assert all(tile.shared_bytes(head_dim) <= device.shared_per_block for tile in listed)


@pytest.mark.parametrize("head_dim", tiles.HEAD_DIMS)
def test_candidates_of_hopper_hold_the_choice_of_the_plan_and_fit(head_dim):
    device = DEVICES["90a"]
    problem = make_problem(head_dim)
    listed = tiles.hopper_candidates(problem, device)
    assert len(listed) == len(set(listed)) > 1
    assert plan(problem, device, tile=listed[0]).defines == plan(problem, device).defines
    for tile in listed:
        assert isinstance(tile, HopperTile)
        assert plan(problem, device, tile=tile).shared_bytes + STATIC_SHARED <= device.shared_per_block
