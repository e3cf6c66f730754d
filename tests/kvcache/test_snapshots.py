"""Snapshots: the same bits come back, anything else is refused, and a file is whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracle import normal

import cupyattn
from cupyattn import KVCache, OutOfBlocks, PagedKVCache, initialize_kv_cache
from cupyattn.kvcache import BadSnapshot, find_leaks, snapshot_file, snapshots

pytestmark = pytest.mark.backends("numpy", "cuda")

DTYPES = ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"]
FORMS = [{}, {"layout": "HND", "num_layers": 2}, {"combined": True}, {"layout": "HND", "combined": True}]


def make(backend, num_blocks=64, block_size=4, **options):
    options = {"dtype": "float16", "device": 0 if backend.on_gpu else None} | options
    return PagedKVCache(num_blocks, block_size, 2, 8, **options)


def append(backend, rng, cache, seqs, count):
    layers = (cache.num_layers,) if cache.num_layers > 1 else ()
    fp8 = cache.dtype.startswith("float8")
    rows = normal(rng, (2, *layers, len(seqs), count, 2, 8), "float16" if fp8 else cache.dtype)
    scales = {"k_scale": 1.0, "v_scale": 1.0} if fp8 else {}
    cache.append(backend.put(rows[0]), backend.put(rows[1]), seqs, **scales)


def fill(backend, rng, cache):
    """Forks, shared prefixes, swapped-out sequences that share, an empty one, a hole in the ids, and prefixes that no
    sequence has any more. Returns the tokens of one of those."""
    prompt, gone = np.arange(22), np.arange(100, 112)
    first = cache.add(prompt)
    append(backend, rng, cache, [first], 22)
    cache.commit(first, prompt)
    append(backend, rng, cache, [cache.fork(first)], 3)
    cache.add(np.concatenate([prompt[:9], [5]]))
    away = cache.add()
    append(backend, rng, cache, [away], 9)
    other = cache.fork(away)
    cache.swap_out([away, other])
    cache.free(cache.add())
    cache.add()
    last = cache.add(gone)
    append(backend, rng, cache, [last], 12)
    cache.commit(last, gone)
    cache.free(last)
    return gone


def contents(backend, cache, seqs=None):
    """Keys and values of each sequence, as bytes, wherever it lies."""
    found = []
    for seq in list(cache) if seqs is None else seqs:
        if not cache.is_swapped_out(seq):
            found.append(tuple(backend.get(array).tobytes() for array in cache[seq]))
            continue
        if backend.on_gpu:
            backend.put(np.zeros(1)).device.synchronize()
        held, own = cache._away[cache._slot_of[seq]]
        blocks = [side[:, own] if cache.layout == "NHD" else side[:, own].swapaxes(2, 3) for side in held.blocks]
        rows = [side.reshape(cache.num_layers, -1, 2, 8)[:, : cache.length(seq)] for side in blocks]
        found.append(tuple(np.ascontiguousarray(side).tobytes() for side in rows))
    return found


def sharing(cache):
    """Which sequences share which blocks, whatever the numbers of these."""
    seen = {}
    return [[seen.setdefault(block, len(seen)) if block >= 0 else -1 for block in row] for row in cache.tables.tolist()]


def state(backend, cache):
    allocator = cache.allocator
    arrays = (allocator.ref_counts, allocator.contents, allocator.hashes, allocator.free_blocks)
    arrays += (allocator.evictable_blocks, cache.ids, cache.lengths, cache.tables)
    return [array.tolist() for array in arrays] + [sorted(cache._away), contents(backend, cache)]


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(backend, rng, tmp_path, dtype, options):
    cache = make(backend, dtype=dtype, low_watermark=0.5, high_watermark=0.75, **options)
    gone = fill(backend, rng, cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = PagedKVCache.load(tmp_path / "cache.safetensors", device=cache.device)
    assert repr(loaded) == repr(cache) and loaded.combined == cache.combined
    assert list(loaded) == list(cache) and loaded.lengths.tolist() == cache.lengths.tolist()
    assert [loaded.is_swapped_out(seq) for seq in loaded] == [cache.is_swapped_out(seq) for seq in cache]
    assert contents(backend, loaded) == contents(backend, cache) and sharing(loaded) == sharing(cache)
    assert find_leaks(loaded) == ()
    for name in ("used", "evictable", "free", "shared", "references"):
        assert getattr(loaded.allocator.stats(), name) == getattr(cache.allocator.stats(), name), name
    known = [set(made.allocator.hashes[made.allocator.cached].tolist()) for made in (cache, loaded)]
    assert known[0] == known[1] and len(known[0]) == 8
    for made in (cache, loaded):
        assert made.allocator.high_watermark == 0.75
        again = made.add(np.concatenate([gone, [1]]))
        assert made.length(again) == 12, "found by its content, after it was freed"
    assert again == cache._next - 1 and contents(backend, loaded, [again]) == contents(backend, cache, [again])
    append(backend, rng, loaded, [seq for seq in loaded if not loaded.is_swapped_out(seq)], 5)
    loaded.free(list(loaded))
    assert not loaded.allocator.ref_counts.any()


def test_a_file_of_one_device_is_loaded_on_another(backend, rng, tmp_path):
    cache = make(backend)
    fill(backend, rng, cache)
    cache.save(tmp_path / "a")
    host = PagedKVCache.load(tmp_path / "a")
    assert isinstance(host.k, np.ndarray) and host.device is None
    host.save(tmp_path / "b")
    back = PagedKVCache.load(tmp_path / "b", device=cache.device)
    assert contents(backend, back) == contents(backend, cache)


def test_chosen_sequences(backend, rng, tmp_path):
    """Only what they need is in the file, in the order in which they were named, and nothing of others."""
    cache = make(backend)
    fill(backend, rng, cache)
    chosen = [4, 1]
    cache.save(tmp_path / "some", chosen)
    loaded = PagedKVCache.load(tmp_path / "some", num_blocks=7, device=cache.device)
    assert list(loaded) == chosen and contents(backend, loaded) == contents(backend, cache, chosen)
    assert loaded.allocator.stats().used == 7 and loaded.allocator.stats().references == 7
    assert loaded.is_swapped_out(4) and not loaded.is_swapped_out(1)
    cache.save(tmp_path / "none", [])
    assert len(PagedKVCache.load(tmp_path / "none", device=cache.device)) == 0


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_rows_of_others_are_not_saved(backend, rng, tmp_path, options):
    """Memory behind a sequence's end holds what some other sequence had there before."""
    cache = make(backend, num_blocks=1, **options)
    before = cache.add()
    append(backend, rng, cache, [before], 4)
    cache.free(before)
    append(backend, rng, cache, [cache.add()], 1)
    cache.save(tmp_path / "one")
    loaded = PagedKVCache.load(tmp_path / "one", device=cache.device)
    assert contents(backend, loaded) == contents(backend, cache)
    rows = backend.get(loaded._store.data)
    assert np.count_nonzero(rows) <= 2 * loaded.num_layers * 2 * 8


def test_smaller_and_larger_pools(backend, rng, tmp_path):
    cache = make(backend)
    gone = fill(backend, rng, cache)
    cache.save(tmp_path / "cache")
    used, evictable = cache.allocator.num_used, cache.allocator.num_evictable
    for count in (used, used + 1, used + evictable, 500):
        loaded = PagedKVCache.load(tmp_path / "cache", num_blocks=count, device=cache.device)
        assert loaded.num_blocks == count and contents(backend, loaded) == contents(backend, cache)
        # The last block of a prefix goes first; without its beginning the rest could not be found.
        assert loaded.length(loaded.add(np.concatenate([gone, [1]]))) == 4 * min(count - used, evictable)
    with pytest.raises(OutOfBlocks) as caught:
        PagedKVCache.load(tmp_path / "cache", num_blocks=used - 1)
    assert (caught.value.asked, caught.value.free) == (used, used - 1)


def test_restore_adds_to_what_is_there(backend, rng, tmp_path):
    cache, other = make(backend), make(backend, num_blocks=24)
    fill(backend, rng, cache)
    cache.save(tmp_path / "cache")
    mine = fill(backend, rng, other)
    before = contents(backend, other)
    seqs = other.restore(tmp_path / "cache")
    assert list(other)[-len(seqs) :] == seqs and contents(backend, other) == before + contents(backend, cache)
    assert find_leaks(other) == () and other.length(other.add(np.concatenate([mine, [1]]))) == 12
    left = state(backend, other)
    with pytest.raises(OutOfBlocks):
        other.restore(tmp_path / "cache")
    with pytest.raises(ValueError, match="path: got a snapshot of block_size 4, expected one of the cache's 8"):
        make(backend, block_size=8).restore(tmp_path / "cache")
    assert state(backend, other) == left


def test_after_many_random_calls(backend, rng, tmp_path):
    """Prefixes that were partly evicted, blocks of equal content, and whatever else comes about."""
    cache = make(backend, num_blocks=24)
    for step in range(200):
        seqs = [seq for seq in cache if not cache.is_swapped_out(seq)]
        try:
            match rng.integers(6):
                case 0 | 1:
                    tokens = rng.integers(2, size=rng.integers(1, 17))
                    seq = cache.add(tokens if rng.random() < 0.7 else None)
                    append(backend, rng, cache, [seq], len(tokens) - cache.length(seq))
                    cache.commit(seq, tokens)
                case 2 if seqs:
                    cache.fork(seqs[rng.integers(len(seqs))])
                case 3 if seqs:
                    append(backend, rng, cache, seqs[:2], int(rng.integers(1, 5)))
                case 4 if len(cache):
                    cache.free(list(cache)[rng.integers(len(cache))])
                case 5 if seqs:
                    cache.swap_out(seqs[: rng.integers(1, 3)])
        except OutOfBlocks:
            cache.free(list(cache)[: len(cache) // 2 + 1])
        if step % 20 == 0:
            cache.save(tmp_path / "cache")
            loaded = PagedKVCache.load(tmp_path / "cache", device=cache.device)
            assert list(loaded) == list(cache) and sharing(loaded) == sharing(cache) and find_leaks(loaded) == ()
            host = PagedKVCache.load(tmp_path / "cache")
            for seq in host:
                if not host.is_swapped_out(seq):
                    ours, theirs = cache[seq], host[seq]
                    assert all(backend.get(a).tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))
            for _ in range(8):
                tokens = rng.integers(2, size=17)
                lengths = [made.length(made.add(tokens)) for made in (cache, loaded)]
                # More is known where of two blocks of equal content the one that was found has been evicted.
                assert lengths[0] <= lengths[1]
            cache.free(list(cache)[-8:])


# ------------------------------------------------------------------------------------------------------ the format


@pytest.mark.parametrize("fork", [False, True])
def test_known_blocks_are_saved_whole(backend, rng, tmp_path, fork):
    """Also those that the only sequence in the file sees the beginning of."""
    cache = make(backend)
    seq = cache.add()
    append(backend, rng, cache, [seq], 8)
    cache.commit(seq, range(8))
    whole = [backend.get(x).copy() for x in cache[seq]]
    short = cache.fork(seq) if fork else seq
    cache.truncate(short, 5)
    cache.save(tmp_path / "cache", [short])
    loaded = PagedKVCache.load(tmp_path / "cache", device=cache.device)
    found = loaded[loaded.add([*range(8), 9])]
    assert all(np.array_equal(backend.get(x), y) for x, y in zip(found, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_it(backend, rng, tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors")
    cache = make(backend, dtype=dtype, num_layers=2)
    fill(backend, rng, cache)
    cache.save(tmp_path / "cache")
    with safetensors.safe_open(tmp_path / "cache", "numpy") as file:
        strings = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}
    assert strings["format"] == "cupyattn.kvcache" and strings["version"] == "1" and strings["dtype"] == dtype
    assert strings["layout"] == "NHD" and strings["block_size"] == "4" and strings["num_layers"] == "2"
    assert found["sequences"].tolist() == list(cache) and found["lengths"].tolist() == cache.lengths.tolist()
    assert found["k"].shape == found["v"].shape == (2, len(found["ref_counts"]), 4, 2, 8)
    seq, length = 1, cache.length(1)
    rows = [found[name][:, found["table"][seq]].reshape(2, -1, 2, 8)[:, :length] for name in "kv"]
    assert tuple(np.ascontiguousarray(x).tobytes() for x in rows) == contents(backend, cache, [seq])[0]
    holders = np.bincount(found["table"][found["table"] >= 0])
    assert holders.tolist() == found["ref_counts"].tolist() and holders[[0, 8]].tolist() == [3, 0]
    assert len(found["hashes"]) == len(found["tokens"]) == len(found["committed"]) == 8
    assert set(found["hashes"].tolist()) == set(cache.allocator.hashes[cache.allocator.cached].tolist())


def saved(rng, backend, path):
    cache = make(backend)
    fill(backend, rng, cache)
    cache.save(path)
    return path.read_bytes()


def test_altered_and_truncated_files_are_refused(backend, rng, tmp_path):
    octets = saved(rng, backend, tmp_path / "cache")
    header = int.from_bytes(octets[:8], "little")
    live = make(backend)
    fill(backend, rng, live)
    before = state(backend, live)
    places = [*range(8), *rng.integers(8, 8 + header, 150), *rng.integers(8 + header, len(octets), 150), -1]
    damaged = []
    for place in places:
        changed = bytearray(octets)
        changed[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(changed))
    damaged += [
        octets[:count] for count in (0, 1, 7, 8, 8 + header, len(octets) - 1, *rng.integers(len(octets), size=20))
    ]
    damaged += [octets + b"\0", octets + octets, b"\0" * len(octets), rng.bytes(1000)]
    for changed in damaged:
        (tmp_path / "bad").write_bytes(changed)
        with pytest.raises(BadSnapshot, match="path: got .*bad"):
            PagedKVCache.load(tmp_path / "bad")
        with pytest.raises(BadSnapshot):
            live.restore(tmp_path / "bad")
    assert state(backend, live) == before
    with pytest.raises(FileNotFoundError):
        PagedKVCache.load(tmp_path / "nowhere")


def test_other_versions_and_other_kinds(backend, rng, tmp_path, monkeypatch):
    saved(rng, backend, tmp_path / "cache")
    with pytest.raises(BadSnapshot, match="a file of cupyattn.kvcache paged"):
        KVCache.load(tmp_path / "cache")
    monkeypatch.setattr(snapshot_file, "VERSION", 2)
    with pytest.raises(BadSnapshot, match="of version 1, where 2 is known"):
        PagedKVCache.load(tmp_path / "cache")
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (tmp_path / "model").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BadSnapshot, match="no snapshot"):
        PagedKVCache.load(tmp_path / "model")


@pytest.mark.backends("numpy")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("table", lambda x: x.__setitem__((0, 0), 1000)),
        ("table", lambda x: x.__setitem__((0, 0), -1)),
        ("table", lambda x: x.__setitem__((0, 0), -5)),
        ("table", lambda x: x.__setitem__((0, 1), x[0, 0])),
        ("lengths", lambda x: x.__setitem__(0, 23456)),
        ("lengths", lambda x: x.__setitem__(0, -1)),
        ("sequences", lambda x: x.__setitem__(0, x[1])),
        ("sequences", lambda x: x.__setitem__(0, 99)),
        ("swapped_out", lambda x: x.__setitem__(0, 1)),
        ("ref_counts", lambda x: x.__setitem__(0, 9)),
        ("committed", lambda x: x.__setitem__(0, 60)),
        ("parents", lambda x: x.__setitem__(0, 60)),
        ("contents", lambda x: x.__setitem__(0, 60)),
    ],
)
def test_a_whole_file_of_nonsense_is_refused(backend, rng, tmp_path, monkeypatch, name, change):
    """Checksums are right where a program wrote what cannot be."""
    cache = make(backend)
    fill(backend, rng, cache)

    class Faulty(snapshot_file.Writer):
        def __init__(self, path, kind, strings, index, data):
            change(index[name])
            super().__init__(path, kind, strings, index, data)

    monkeypatch.setattr(snapshots, "Writer", Faulty)
    cache.save(tmp_path / "cache")
    with pytest.raises(BadSnapshot, match="contradict"):
        PagedKVCache.load(tmp_path / "cache")


# ------------------------------------------------------------------------------------------------ whole or not there


SAVING = """
import sys
import numpy as np
from cupyattn import PagedKVCache

caches = []
for number in (1, 2):
    cache = PagedKVCache(640, 16, 8, 128, dtype="float16")
    cache.k[...] = cache.v[...] = number
    cache.extend(cache.add(), 640 * 16)
    caches.append(cache)
print("ready", flush=True)
while True:
    for cache in caches:
        cache.save(sys.argv[1])
"""


@pytest.mark.backends("numpy")
@pytest.mark.parametrize("nameless", [True, False])
def test_kill_9_while_saving(backend, rng, tmp_path, nameless):
    """The old file, or a new one, or none: but a whole one. Nothing else is left where the file system has files
    without names."""
    path = tmp_path / "cache.safetensors"
    code = SAVING if nameless else "import os\nif hasattr(os, 'O_TMPFILE'): del os.O_TMPFILE\n" + SAVING
    environment = os.environ | {"PYTHONPATH": str(Path(cupyattn.__file__).parents[1])}
    seen = set()
    for attempt in range(60):
        if attempt >= 10 and seen:
            break
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.02 if attempt < 3 else 0.3 if attempt < 10 else 3))  # a slow disk takes its time
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.exists():
            cache = PagedKVCache.load(path)
            k, v = cache[0]
            assert len(k) == 640 * 16 and (k == k[0, 0, 0]).all() and (v == k[0, 0, 0]).all()
            seen.add(float(k[0, 0, 0]))
        others = [name for name in os.listdir(tmp_path) if name != path.name]
        assert all(name.startswith(".cache.safetensors.") and name.endswith(".partial") for name in others)
        if nameless and os.path.isdir("/proc/self/fd") and hasattr(os, "O_TMPFILE"):
            assert len(others) <= 1, "only a death between the last two system calls can leave a name"
        for name in others:
            (tmp_path / name).unlink()
    assert seen <= {1.0, 2.0} and seen


@pytest.mark.backends("numpy")
@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.parametrize("name", ["a" * 255, "é" * 127], ids=["ascii", "two bytes each"])
def test_names_as_long_as_can_be(backend, rng, tmp_path, monkeypatch, nameless, name):
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    for _ in range(2):  # a new file, and one in its place
        saved(rng, backend, tmp_path / name)
        assert os.listdir(tmp_path) == [name] and len(PagedKVCache.load(tmp_path / name)) > 0


@pytest.mark.backends("numpy")
def test_names_that_no_file_can_have_are_refused_before_anything_is_written(backend, rng, tmp_path, monkeypatch):
    cache = make(backend)
    fill(backend, rng, cache)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(snapshots._Staging, "take", lambda *_: pytest.fail("something is written"))
    with pytest.raises(OSError, match="name too long"):
        cache.save(tmp_path / ("a" * 256))
    with pytest.raises(IsADirectoryError, match="folder"):
        cache.save(tmp_path / "folder")
    with pytest.raises(FileExistsError, match="Not a regular file.*pipe"):
        cache.save(tmp_path / "pipe")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


@pytest.mark.backends("numpy")
@pytest.mark.parametrize("nameless", [True, False])
def test_an_exception_while_saving_changes_nothing(backend, rng, tmp_path, monkeypatch, nameless):
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    before = saved(rng, backend, tmp_path / "cache")
    calls = []

    def failing(self, array, picks):
        calls.append(picks)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return take(self, array, picks)

    take = snapshots._Staging.take
    monkeypatch.setattr(snapshots._Staging, "take", failing)
    cache = make(backend)
    fill(backend, rng, cache)
    with pytest.raises(KeyboardInterrupt):
        cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before and os.listdir(tmp_path) == ["cache"]
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "nowhere" / "cache")
    monkeypatch.undo()
    cache.save(tmp_path / "cache")
    assert os.listdir(tmp_path) == ["cache"] and contents(backend, PagedKVCache.load(tmp_path / "cache"))
    assert os.stat(tmp_path / "cache").st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.backends("numpy")
def test_a_link_is_followed(backend, rng, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "cache")
    saved(rng, backend, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(PagedKVCache.load(tmp_path / "there" / "cache")) == 6


@pytest.mark.backends("numpy")
def test_no_second_copy_in_memory(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "CHUNK", 1 << 20)
    cache = make(backend, num_blocks=2**19)  # 2**26 bytes of keys, as many of values
    cache.extend(cache.add(), 2**21)
    tracemalloc.start()
    try:
        cache.save(tmp_path / "cache")
        bookkeeping = 2**19 * 4 * 40
        assert tracemalloc.get_traced_memory()[1] < bookkeeping, "a few numbers for each block"
        tracemalloc.reset_peak()
        loaded = PagedKVCache.load(tmp_path / "cache")
        now, peak = tracemalloc.get_traced_memory()
        assert loaded.nbytes < now and peak - now < bookkeeping
    finally:
        tracemalloc.stop()


@pytest.mark.backends("numpy")
def test_progress_of_large_files(backend, rng, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(snapshot_file, "PROGRESS_FROM", 1)
    saved(rng, backend, tmp_path / "cache")
    assert capsys.readouterr() == ("", ""), "nobody is watching"
    monkeypatch.setenv("FORCE_COLOR", "1")
    saved(rng, backend, tmp_path / "cache")
    PagedKVCache.load(tmp_path / "cache")
    shown = capsys.readouterr()
    assert "saving cache" in shown.err and "loading cache" in shown.err and shown.out == ""
    monkeypatch.setattr(snapshot_file, "PROGRESS_FROM", 1 << 30)
    saved(rng, backend, tmp_path / "cache")
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------- dense caches


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("window", [None, (9, 0)])
def test_dense_round_trip(backend, rng, tmp_path, dtype, packed, layout, window):
    device = "cuda" if backend.on_gpu else "cpu"
    cache = initialize_kv_cache(
        3, 2, None if window else 64, 8, dtype=dtype, device=device, layout=layout, packed=packed, window=window
    )
    for count, lengths in ((30, [30, 11, 0]), (4, None)):
        shape = (2, 3, 2, count, 8) if layout == "BHSD" else (2, 3, count, 2, 8)
        cache.append(*map(backend.put, normal(rng, shape, dtype)), lengths=lengths)
    cache.save(tmp_path / "dense")
    loaded = KVCache.load(tmp_path / "dense", device=device)
    assert repr(loaded) == repr(cache) and loaded.lengths.tolist() == [34, 15, 4]
    for ours, theirs in ((cache.keys, loaded.keys), (cache.values, loaded.values)):
        ours, theirs = (backend.get(x) if layout == "BSHD" else backend.get(x).swapaxes(1, 2) for x in (ours, theirs))
        for b, length in enumerate([34, 15, 4]):
            assert ours[b, : min(length, ours.shape[1])].tobytes() == theirs[b, : min(length, ours.shape[1])].tobytes()
    shape = (3, 2, 1, 8) if layout == "BHSD" else (3, 1, 2, 8)
    q, k, v = map(backend.put, normal(rng, (3, *shape), dtype))
    assert backend.get(cache.attend(q, k, v)).tobytes() == backend.get(loaded.attend(q, k, v)).tobytes()


@pytest.mark.backends("numpy")
def test_dense_of_torch_and_of_float8(backend, rng, tmp_path):
    made = normal(rng, (2, 2, 2, 5, 8), "float16").astype(ml_dtypes.float8_e4m3fn)
    KVCache(*made).save(tmp_path / "fp8")
    assert KVCache.load(tmp_path / "fp8").keys.tobytes() == made[0].tobytes()
    torch = pytest.importorskip("torch")
    k, v = torch.randn(2, 2, 2, 5, 8, dtype=torch.bfloat16)
    KVCache(k, v, [5, 3]).save(tmp_path / "dense")
    loaded = KVCache.load(tmp_path / "dense", device=torch.device("cpu"))
    assert loaded.keys.dtype == torch.bfloat16 and torch.equal(loaded.keys[0], k[0])
    assert torch.equal(loaded.values[1, :, :3], v[1, :, :3]) and not loaded.keys[1, :, 3:].any()
    with pytest.raises(ValueError, match="cache: got one that has no memory yet"):
        initialize_kv_cache(1, 1, 8, 8).save(tmp_path / "none")
    changed = bytearray((tmp_path / "dense").read_bytes())
    changed[-1] ^= 1
    (tmp_path / "dense").write_bytes(changed)
    with pytest.raises(BadSnapshot):
        KVCache.load(tmp_path / "dense")
