"""`cupyattn bench --tiles`, with NumPy in CuPy's place and a launch that takes as long as its tile is small."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from cupyattn.cli import tiles
from cupyattn.plan import DEVICES, plan


@pytest.fixture
def launched(monkeypatch):
    """The plans of all launches, in order; a small grid, planned for an H100."""
    plans = []

    class Prepared:
        def __init__(self, problem, device, **insist):
            self.plan = plan(problem, DEVICES["90a"], **insist)

        def __call__(self, operands, stream):
            assert operands.out is not None
            plans.append(self.plan)

    monkeypatch.setattr(tiles, "prepare", Prepared)
    monkeypatch.setattr(tiles, "describe_device", lambda device: DEVICES["90a"])
    monkeypatch.setattr(tiles, "TOKENS", 1024)
    monkeypatch.setattr(tiles, "SEQLENS", (512,))
    return plans


def stand_in():
    cuda = SimpleNamespace(Device=lambda: SimpleNamespace(id=0), get_current_stream=lambda: SimpleNamespace(ptr=0))
    return SimpleNamespace(cuda=cuda, asarray=np.asarray, empty_like=np.empty_like)


def test_sweep_compares_every_tile_and_order_with_the_plan(launched):
    def timer(call):
        call()
        return 1000.0 / launched[-1].tile_rows

    found = tiles.sweep(stand_in(), timer, Console(file=None, quiet=True))
    rows = json.loads(json.dumps(found))["rows"]
    assert {(row["head_dim"], row["causal"]) for row in rows} == {(d, c) for d in (64, 128, 256) for c in (False, True)}
    assert {row["varied"] for row in rows} == {"tile", "pairs_per_section"}
    for row in rows:
        assert row["tflops"] > 0
        if row["varied"] == "pairs_per_section":  # the tile is the plan's own, so the stand-in takes as long
            assert row["ratio"] == pytest.approx(1)
    compared = {row["tile"] for row in rows if row["head_dim"] == 128 and row["varied"] == "tile"}
    assert {"128 x 64, 4 warps, 2 stages", "64 x 64, 4 warps, 1 stages"} <= compared


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_candidates_hold_every_choice_of_the_plan_and_fit(launched, head_dim):
    listed = tiles.candidates(head_dim, 0)
    assert len(listed) == len(set(listed)) > 1
    assert all(tile.shared_bytes(head_dim) <= DEVICES["90a"].shared_per_block for tile in listed)
