"""The disk cache of compiled kernels: one directory an entry, made beside its place and renamed into it.

An entry's name carries a hash of everything that decides its content: flattened source, options, NVRTC version and
architecture. Processes race freely, without locks: a rename either wins or finds the winner's entry. Whatever is
truncated, altered or not ours is compiled again. Cubins are code that runs with the user's rights, so the folder
must be one that nobody else can write.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import compile, sources

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

VARIABLE = "CUPYATTN_CACHE_DIR"
CUBIN, META = "kernel.cubin", "meta.json"
_FORMAT = 1
_STALE_SECONDS = 24 * 3600

_locks: dict[str, threading.Lock] = {}
_private: dict[Path, Path] = {}  # cache folder that cannot be written -> this process's own temporary one


class CacheRefused(PermissionError):
    """The cache folder could be written by somebody else; the message says how to mend it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A compiled kernel on disk. `compiled` is False when it was there already.

    meta: kernel, arch, options, nvrtc, source (sha256 of the flattened text), defines, functions, registers,
    spill_bytes, shared_bytes, seconds (of the compilation), log, sha256 (of the cubin), seal (of all the others).
    """

    path: Path
    meta: dict
    compiled: bool


def location() -> Path:
    """Where the cache is kept, made or not: $CUPYATTN_CACHE_DIR, or the user's cache folder."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser().absolute()
    try:
        from platformdirs import user_cache_path
    except ImportError:  # a checkout put on the path of an environment that lacks this one dependency
        return Path("~/.cache/cupyattn").expanduser()
    return user_cache_path("cupyattn", appauthor=False)


def folder() -> Path:
    """The folder to use: `location()`, made with mode 0700, or a temporary one where that cannot be written.

    Raises CacheRefused if another user owns the folder or could write into it.
    """
    path = location()
    if path not in _private:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if problem := weakness(path.stat()):
                raise CacheRefused(_refusal(path, problem))
        except CacheRefused:
            raise
        except OSError as error:
            return _temporary(path, error)
    return _private.get(path, path)


def weakness(status: os.stat_result) -> str:
    """How somebody else could write what this is the status of; "" if nobody could. Root is not somebody else."""
    if not hasattr(os, "geteuid"):  # Windows: the user's cache folder is private by its access list
        return ""
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {status.st_uid}, and you are user {os.geteuid()}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"its mode {stat.S_IMODE(status.st_mode):04o} lets other users write into it"
    return ""


def mend(path: Path) -> str:
    """The command that makes a refused folder usable, or names another."""
    if weakness(path.stat()).startswith("its mode"):
        return f"chmod 700 '{path}'"
    return f'export {VARIABLE}="$HOME/.cupyattn"'


def fetch(name: str, defines: compile.Defines, arch: str, root: Traversable | None = None) -> Entry:
    """The compiled kernel file `name` for these definitions and this architecture, from disk or from NVRTC.

    `root` is the sources' folder, by default the package's own. Threads that ask for the same kernel compile it
    once. Raises CompileError, CacheRefused, ImportError without CuPy or NVRTC, and what `sources.flatten` raises.
    """
    source, options = sources.flatten(name, root), compile.options(defines, arch)
    identity = {
        "format": _FORMAT,
        "kernel": name,
        "arch": arch,
        "options": list(options),
        "nvrtc": "{}.{}".format(*compile.nvrtc_version()),
        "source": hashlib.sha256(source.encode()).hexdigest(),
    }
    entry = f"{name}-sm_{arch}-{_digest(identity)[:16]}"
    with _locks.setdefault(entry, threading.Lock()):
        place = folder() / entry
        if meta := _read(place, identity):
            return Entry(place / CUBIN, meta, False)
        result = compile.compile_source(name, source, options, arch)
        meta = identity | {
            "defines": [list(pair) for pair in defines],
            "functions": {key: asdict(use) for key, use in result.functions.items()},
            "registers": result.registers,
            "spill_bytes": result.spill_bytes,
            "shared_bytes": result.shared_bytes,
            "seconds": round(result.seconds, 4),
            "log": result.log,
            "sha256": hashlib.sha256(result.cubin).hexdigest(),
        }
        meta["seal"] = _digest(meta)
        try:
            meta = _install(place, result.cubin, meta, identity)
        except OSError as error:  # read-only or full
            place = _temporary(location(), error) / entry
            meta = _install(place, result.cubin, meta, identity)
        return Entry(place / CUBIN, meta, True)


def contents() -> tuple[int, int]:
    """(entries, bytes) that the cache folder holds now. Makes nothing."""
    sizes = [path.stat().st_size for path in location().glob(f"[!.]*/{CUBIN}")]
    return len(sizes), sum(sizes)


def _digest(fields: dict) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read(place: Path, identity: dict) -> dict | None:
    """The metadata of an entry that is whole, ours and what was asked for; otherwise None."""
    try:
        status = place.lstat()
        meta = json.loads((place / META).read_bytes())
        cubin = (place / CUBIN).read_bytes()
    except (OSError, ValueError):
        return None
    if not stat.S_ISDIR(status.st_mode) or weakness(status) or not isinstance(meta, dict):
        return None
    sealed = {key: value for key, value in meta.items() if key != "seal"}
    whole = meta.get("seal") == _digest(sealed) and meta.get("sha256") == hashlib.sha256(cubin).hexdigest()
    return meta if whole and identity.items() <= meta.items() else None


def _install(place: Path, cubin: bytes, meta: dict, identity: dict) -> dict:
    """Put an entry into place; a whole one that another process put there first is used instead."""
    _sweep(place.parent)
    made = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
    try:
        (made / CUBIN).write_bytes(cubin)
        (made / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for _ in range(10):
            try:
                os.rename(made, place)  # onto nothing, or an empty directory: both atomic
                return meta
            except OSError as error:
                failure = error
            if theirs := _read(place, identity):
                return theirs
            _discard(place)
        raise failure
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _discard(place: Path) -> None:
    """Take away whatever stands at an entry's place: moved aside in one step, then deleted."""
    aside = Path(tempfile.mkdtemp(prefix=".old-", dir=place.parent))
    try:
        os.rename(place, aside / "entry")
    except FileNotFoundError:
        pass
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Delete what killed processes left half made, a day later."""
    for item in (*path.glob(".new-*"), *path.glob(".old-*")):
        try:
            if time.time() - item.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(item, ignore_errors=True)
        except OSError:
            pass  # another process was faster


def _temporary(path: Path, error: OSError) -> Path:
    """This process's own folder in place of one that cannot be written; warns once."""
    with _locks.setdefault("temporary", threading.Lock()):
        if path not in _private:
            _private[path] = Path(tempfile.mkdtemp(prefix="cupyattn-"))
            atexit.register(_remove, _private[path], os.getpid())
            warnings.warn(
                f"{path} cannot be written ({error.strerror or error}): kernels are compiled again in every process. "
                f"Set {VARIABLE} to a folder of your own.",
                RuntimeWarning,
                stacklevel=4,
            )
    return _private[path]


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child shares its parent's folder
        shutil.rmtree(path, ignore_errors=True)


def _refusal(path: Path, problem: str) -> str:
    return (
        f"cache folder {path}: got a folder that others control ({problem}), expected one that only you can write, "
        f"because the code in it runs with your rights. Mend it with: {mend(path)}"
    )


if hasattr(os, "register_at_fork"):  # a lock that some other thread held at the fork would never be released
    os.register_at_fork(after_in_child=_locks.clear)
