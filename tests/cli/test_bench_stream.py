"""The plain read that decode is measured against: every grid reads every vector once."""

from __future__ import annotations

import numpy as np
import pytest

from cupyattn.cli.bench_stream import FEW_BYTES, Grid, Stream, grids
from cupyattn.timing import EventTimer

SMS = 3


def times_read(vectors: int, grid: Grid) -> np.ndarray:
    """How often each vector is read: the loops of the kernel, for all threads of a block together."""
    count = np.zeros(vectors, int)
    block_step, load_step, advance = grid.steps
    for block in range(grid.blocks):
        at = block * block_step + np.arange(grid.threads)
        while (full := at + (grid.unroll - 1) * load_step < vectors).any():
            for load in range(grid.unroll):
                np.add.at(count, at[full] + load * load_step, 1)
            at = np.where(full, at + advance, at)
        while (left := at < vectors).any():
            np.add.at(count, at[left], 1)
            at = at + load_step
    return count


@pytest.mark.parametrize("vectors", [1, 31, 5000, 32768, 40_009])
def test_every_grid_reads_every_vector_once(vectors):
    tried = list(grids(16 * vectors, SMS))
    assert len(tried) == len(set(tried)) > 1
    for grid in tried:
        assert (times_read(vectors, grid) == 1).all(), grid


def test_grids_fit_the_work():
    assert max(grid.blocks for grid in grids(1 << 30, 132)) == 16 * 132
    assert {grid.unroll for grid in grids(FEW_BYTES + 16, 132)} == {4, 8}
    assert {grid.unroll for grid in grids(FEW_BYTES, 132)} == {1, 2, 4, 8}
    assert all(grid.blocks * grid.threads * grid.unroll < 2 * 32768 for grid in grids(16 * 32768, 132))


@pytest.mark.gpu
def test_gpu_reads_all_that_it_should():
    import cupy

    vectors, marker = 100_003, 12345
    data = cupy.zeros((vectors, 4), np.uint32)
    stream = Stream(cupy, EventTimer(cupy), data)
    rng = np.random.default_rng(0)
    for grid in grids(data.nbytes, stream.sms):
        for place in (0, vectors - 1, int(rng.integers(vectors))):
            data[place, place % 4] = marker
            for seen in (place + 1, place):
                stream.found.fill(0)
                stream.read(16 * seen, grid, marker)()
                assert int(stream.found[0]) == (seen > place), (grid, place)
            data[place] = 0
    assert 0 < stream.empty_launch_ms() < 1
    stream.best(1 << 16)()
    assert Grid(**stream.as_record(1 << 16)) in grids(1 << 16, stream.sms)
