"""Reports of a paged cache: numbers counted by hand, leaks, and the forms they come in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from cupyattn import PagedKVCache
from cupyattn.kvcache import Leak, find_leaks

pytestmark = pytest.mark.backends("numpy", "cuda")


def make(backend, num_blocks=32, **options):
    return PagedKVCache(num_blocks, 4, 2, 8, dtype="float16", device=0 if backend.on_gpu else None, **options)


def test_numbers(backend):
    """Two forks of ten tokens, of which one went on, one of four tokens, one in host memory, and a freed prompt."""
    cache = make(backend, num_layers=3)
    first, alone, away, kept = (cache.add() for _ in range(4))
    cache.extend(first, 10)
    other = cache.fork(first)
    cache.extend([other, alone, away, kept], [1, 4, 5, 8])
    cache.swap_out(away)
    cache.commit(kept, np.arange(8))
    cache.free(kept)
    found = cache.report(num_heads=16)
    token = 2 * 3 * 2 * 8 * 2  # keys and values, layers, heads, head_dim, bytes
    assert (found.num_blocks, found.block_size, found.num_layers) == (32, 4, 3)
    assert (found.used, found.shared, found.references, found.evictable, found.free) == (5, 2, 7, 2, 25)
    assert found.wasted == 2 + 1 and found.wasted_bytes == 3 * token
    assert found.allocated_bytes == cache.nbytes == 32 * 4 * token and found.used_bytes == 5 * 4 * token
    assert found.saved_bytes == 2 * 4 * token and found.token_bytes == token
    rows = [(x.seq, x.tokens, x.blocks, x.shared, x.wasted, x.swapped_out) for x in found.sequences]
    assert rows == [
        (first, 10, 3, 2, 2, False),
        (alone, 4, 1, 0, 0, False),
        (away, 5, 2, 0, 3, True),
        (other, 11, 3, 2, 1, False),
    ]
    assert found.max_seqlen == 11 and found.dense_bytes == 3 * 11 * token
    assert found.naive_bytes == (100 + 16 + 121) * 16 * 4 and found.fused_bytes == 25 * 16 * 4
    assert cache.report(max_seqlen=100).dense_bytes == 3 * 100 * token
    assert cache.report().num_heads == 2 and found.leaks == ()
    with pytest.raises(ValueError, match="max_seqlen: got 10, expected at least 11"):
        cache.report(max_seqlen=10)


def test_empty_cache(backend):
    found = make(backend).report()
    assert found.used == 0 and found.free == 32 and found.sequences == () and found.dense_bytes == 0
    assert "no leaks" in str(found)
    json.dumps(found.as_dict())


def test_leaks(backend):
    cache = make(backend)
    seq = cache.add()
    cache.extend(seq, 10)
    assert find_leaks(cache) == ()
    lost = cache.allocator.allocate(1)  # taken, and in no sequence
    held = cache.tables[0]
    cache.allocator.share(held[:1])  # once more than there are sequences
    cache.allocator.free(held[1:2])  # freed under a sequence
    expected = {Leak(int(held[0]), 2, 1), Leak(int(held[1]), 0, 1), Leak(int(lost[0]), 1, 0)}
    found = cache.report()
    assert set(found.leaks) == expected and list(found.leaks) == sorted(found.leaks, key=lambda leak: leak.block)
    text = str(found)
    assert f"leak: block {lost[0]} has 1 references and is in no sequence" in text
    assert f"leak: block {held[1]} has 0 references and is in 1 sequence" in text and "no leaks" not in text
    cache.allocator.free(lost)
    cache.allocator.free(held[:1])
    assert find_leaks(cache) == (Leak(int(held[1]), 0, 1),)


def test_a_block_that_the_allocator_lost(backend):
    cache = make(backend)
    cache.allocator._num_free -= 1
    (leak,) = find_leaks(cache)
    assert str(leak) == f"block {leak.block} is neither used nor free"


def test_forms(backend, tmp_path):
    cache = make(backend)
    seqs = [cache.add() for _ in range(25)]
    cache.extend(seqs[:20], 3)
    found = cache.report(num_heads=8)
    as_dict = json.loads(json.dumps(found.as_dict()))
    assert as_dict["used"] == 20 and as_dict["sequences"][0] == {
        "seq": 0,
        "tokens": 3,
        "blocks": 1,
        "shared": 0,
        "wasted": 1,
        "swapped_out": False,
    }
    assert as_dict["naive_bytes"] == found.naive_bytes and as_dict["leaks"] == []
    text = str(found)
    assert repr(found) == text and "… 5 more" in text and "62 %" in text
    assert "dense cache, 3 rows each" in text and "N², 8 heads" in text and "66.7 %" in text
    console = Console(record=True, width=100, file=open(tmp_path / "out", "w"))
    console.print(found)
    assert "saved by sharing" in console.export_text()


@pytest.mark.backends("numpy")
def test_n_squared_as_a_guide_prints_it(backend):
    """4096 tokens and one head: 16M scores, of which fused attention keeps 4096 numbers."""
    cache = PagedKVCache(256, 16, 1, 8, dtype="float16")
    cache.extend(cache.add(), 4096)
    found = cache.report()
    assert found.naive_bytes == 4 * 2**24 and found.fused_bytes == 4 * 4096
    assert "100.0 %" in str(found)


@pytest.mark.backends("numpy")
def test_plot(backend, tmp_path):
    pytest.importorskip("matplotlib")
    cache = make(backend)
    for made in (cache.report(), cache.report(num_heads=8)):
        figure = made.plot(tmp_path / "report.png")
        assert len(figure.axes) == 3 and (tmp_path / "report.png").read_bytes()[1:4] == b"PNG"
        cache.extend(cache.add(), 6)
        cache.fork(0)
    assert [axis.get_title() for axis in cache.report().plot().axes] == ["pool", "sequences", "in other ways"]
