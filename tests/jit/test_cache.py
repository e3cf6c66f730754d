"""The disk cache: many processes and threads at once, damage, foreign files, permissions, unwritable folders."""

import json
import multiprocessing
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cupyattn.jit import cache, compile

try:
    compile.nvrtc_version()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
SOURCE = 'extern "C" __global__ void fill(float* x) { x[threadIdx.x] = VALUE; }\n'
ASK = ("fill", (("VALUE", 1),), "80")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "kernels_cu"
    folder.mkdir()
    (folder / "fill.cu").write_text(SOURCE)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_private", {})
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """Counts the calls of the compiler."""
    calls, real = [], compile.compile_source

    def counted(*arguments):
        calls.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(compile, "compile_source", counted)
    return calls


def whole(entry):
    return cache._read(entry.path.parent, {"kernel": "fill", "arch": "80"}) == entry.meta


def test_a_second_fetch_comes_from_disk(home, root, compilations):
    first, second = cache.fetch(*ASK, root), cache.fetch(*ASK, root)
    assert first.compiled and not second.compiled and len(compilations) == 1
    assert first.path == second.path and first.meta == second.meta
    assert first.path.parent.parent == home and first.path.parent.name.startswith("fill-sm_80-")
    assert first.path.read_bytes()[:4] == b"\x7fELF"
    assert first.meta["kernel"] == "fill" and first.meta["arch"] == "80" and first.meta["defines"] == [["VALUE", 1]]
    assert first.meta["functions"]["fill"]["registers"] == first.meta["registers"] > 0
    assert "-DVALUE=1" in first.meta["options"] and "ptxas" in first.meta["log"]
    assert cache.contents() == (1, first.path.stat().st_size)


def test_a_warm_fetch_takes_under_ten_milliseconds(home, root):
    cache.fetch(*ASK, root)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        cache.fetch(*ASK, root)
        times.append(time.perf_counter() - start)
    assert sorted(times)[10] < 0.010


def test_source_options_arch_and_nvrtc_are_in_the_key(home, root, monkeypatch):
    paths = [cache.fetch(*ASK, root).path]
    paths.append(cache.fetch("fill", (("VALUE", 2),), "80", root).path)
    paths.append(cache.fetch("fill", (("VALUE", 1),), "86", root).path)
    monkeypatch.setattr(compile, "nvrtc_version", lambda: (99, 0))
    paths.append(cache.fetch(*ASK, root).path)
    (root / "fill.cu").write_text(SOURCE + "// changed\n")
    paths.append(cache.fetch(*ASK, root).path)
    assert len(set(paths)) == 5


def damage_cubin(place):
    path = place / cache.CUBIN
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_meta(place):
    path = place / cache.META
    path.write_text(json.dumps(json.loads(path.read_text()) | {"registers": 1}))


def replace_by_file(place):
    shutil.rmtree(place)
    place.write_text("not a directory")


def replace_by_link(place):
    place.rename(place.parent / "elsewhere")
    place.symlink_to(place.parent / "elsewhere")


@pytest.mark.parametrize(
    "damage",
    [
        damage_cubin,
        damage_meta,
        replace_by_file,
        replace_by_link,
        lambda place: (place / cache.CUBIN).write_bytes((place / cache.CUBIN).read_bytes()[:100]),
        lambda place: (place / cache.CUBIN).write_bytes(b""),
        lambda place: (place / cache.CUBIN).unlink(),
        lambda place: (place / cache.META).unlink(),
        lambda place: (place / cache.META).write_text('{"kernel": '),
        lambda place: (place / cache.META).write_text("[]"),
        lambda place: (place / cache.META).write_bytes(b"\xff\xfe"),
    ],
    ids=[
        "altered cubin",
        "altered metadata",
        "a file in its place",
        "a link in its place",
        "truncated cubin",
        "empty cubin",
        "no cubin",
        "no metadata",
        "truncated metadata",
        "foreign metadata",
        "binary metadata",
    ],
)
def test_damage_is_noticed_and_mended(home, root, damage):
    first = cache.fetch(*ASK, root)
    damage(first.path.parent)
    again = cache.fetch(*ASK, root)
    assert again.compiled and again.path == first.path and whole(again)
    assert not cache.fetch(*ASK, root).compiled
    assert not list(home.glob(".*"))


def test_an_entry_of_another_kernel_in_its_place_is_noticed(home, root):
    first, other = cache.fetch(*ASK, root), cache.fetch("fill", (("VALUE", 2),), "80", root)
    shutil.rmtree(first.path.parent)
    other.path.parent.rename(first.path.parent)
    again = cache.fetch(*ASK, root)
    assert again.compiled and again.meta["defines"] == [["VALUE", 1]]


def test_many_processes_at_once_each_get_a_valid_cubin(home, root):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.starmap(cache.fetch, [(*ASK, root)] * 8, chunksize=1)
    assert len({entry.path for entry in found}) == 1 and any(entry.compiled for entry in found)
    assert all(whole(entry) for entry in found)
    assert [path.name for path in home.iterdir()] == [found[0].path.parent.name]


def test_a_lost_race_uses_the_winners_entry(home, root, monkeypatch):
    real = compile.compile_source
    winner = []

    def slow(*arguments):
        result = real(*arguments)
        if not winner:  # while this one compiles, another process finishes the same kernel
            winner.append(None)
            cache._locks.clear()
            winner.append(cache.fetch(*ASK, root))
        return result

    monkeypatch.setattr(compile, "compile_source", slow)
    loser = cache.fetch(*ASK, root)
    assert loser.meta == winner[1].meta and loser.path == winner[1].path and whole(loser)
    assert len(list(home.iterdir())) == 1


def test_two_threads_compile_once(home, root, compilations):
    barrier = threading.Barrier(8)

    def work(_):
        barrier.wait()
        return cache.fetch(*ASK, root)

    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(work, range(8)))
    assert len(compilations) == 1 and sum(entry.compiled for entry in entries) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")  # Python's and JAX's: that is what the test is about
def test_a_fork_while_a_thread_compiles_does_not_deadlock_the_child(home, root, monkeypatch):
    real, compiling, release = compile.compile_source, threading.Event(), threading.Event()

    def held(*arguments):
        compiling.set()
        release.wait(30)
        return real(*arguments)

    monkeypatch.setattr(compile, "compile_source", held)
    thread = threading.Thread(target=cache.fetch, args=(*ASK, root))
    thread.start()
    compiling.wait(30)
    child = os.fork()
    if child == 0:
        compile.compile_source = real
        os._exit(0 if whole(cache.fetch(*ASK, root)) else 1)
    deadline, done = time.monotonic() + 30, 0
    while not done and time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    release.set()
    thread.join()
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done and status == 0


def test_a_failed_compilation_leaves_nothing(home, root):
    (root / "fill.cu").write_text("nonsense")
    with pytest.raises(compile.CompileError):
        cache.fetch(*ASK, root)
    assert list(home.iterdir()) == []


def test_what_killed_processes_left_is_swept_after_a_day(home, root):
    for name, age in ((".new-old", 2 * 24 * 3600), (".old-old", 2 * 24 * 3600), (".new-young", 60)):
        (home / name).mkdir(parents=True)
        os.utime(home / name, (time.time() - age,) * 2)
    home.chmod(0o700)
    cache.fetch(*ASK, root)
    assert sorted(path.name for path in home.glob(".*")) == [".new-young"]


@posix
def test_the_folder_is_made_private(home, root):
    previous = os.umask(0)
    try:
        entry = cache.fetch(*ASK, root)
    finally:
        os.umask(previous)
    assert home.stat().st_mode & 0o777 == 0o700
    assert entry.path.parent.stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_folder_that_others_can_write_is_refused(home, root, mode):
    home.mkdir()
    home.chmod(mode)
    with pytest.raises(cache.CacheRefused) as caught:
        cache.fetch(*ASK, root)
    message = str(caught.value)
    assert f"{mode:04o}" in message and "others" in message and f"chmod 700 '{home}'" in message
    assert list(home.iterdir()) == []
    home.chmod(0o700)
    assert cache.fetch(*ASK, root).compiled


@posix
def test_a_folder_of_another_user_is_refused(home, root, monkeypatch):
    home.mkdir(mode=0o700)
    other = home.stat().st_uid + 1
    if os.geteuid() == 0:
        os.chown(home, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(cache.CacheRefused, match=f"belongs to user .*export {cache.VARIABLE}="):
        cache.fetch(*ASK, root)


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="giving a file away needs root")
def test_an_entry_that_another_user_made_is_rebuilt(home, root):
    entry = cache.fetch(*ASK, root)
    os.chown(entry.path.parent, 12345, -1)
    assert cache.fetch(*ASK, root).compiled
    assert entry.path.parent.stat().st_uid == os.geteuid()


def test_an_unwritable_folder_falls_back_to_a_temporary_one_with_one_warning(tmp_path, root, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache, "_private", {})
    with pytest.warns(RuntimeWarning, match=f"cannot be written .*{cache.VARIABLE}") as warned:
        entries = [cache.fetch(*ASK, root), cache.fetch("fill", (("VALUE", 2),), "80", root), cache.fetch(*ASK, root)]
    assert len(warned) == 1
    assert [entry.compiled for entry in entries] == [True, True, False] and whole(entries[0])
    home = entries[0].path.parent.parent
    assert home == cache.folder() != cache.location()
    if hasattr(os, "geteuid"):
        assert home.stat().st_mode & 0o777 == 0o700
    cache._remove(home, os.getpid() + 1)  # a forked child leaves its parent's folder alone
    assert home.exists()
    cache._remove(home, os.getpid())
    assert not home.exists()


def test_a_read_only_folder_still_serves_what_it_holds(home, root, monkeypatch):
    kept = cache.fetch(*ASK, root)
    real = cache.tempfile.mkdtemp

    def read_only(prefix, dir=None):
        if dir == home:
            raise OSError(30, "Read-only file system", str(dir))
        return real(prefix=prefix, dir=dir)

    monkeypatch.setattr(cache.tempfile, "mkdtemp", read_only)
    assert cache.fetch(*ASK, root) == cache.Entry(kept.path, kept.meta, False)
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        fresh = cache.fetch("fill", (("VALUE", 2),), "80", root)
    assert fresh.compiled and home not in fresh.path.parents and whole(fresh)
    shutil.rmtree(fresh.path.parent.parent)
