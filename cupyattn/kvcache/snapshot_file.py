"""Files of snapshots: safetensors, written in one piece or not at all, and checked before they are believed.

A safetensors file is the length of its header (8 bytes), the header (JSON: dtype, shape and place of each tensor, and
strings by name) and the tensors' bytes (github.com/huggingface/safetensors). Its own library reads these files; they
are written and read here because a cache passes through in small pieces and never lies in memory a second time.

Small tensors, the index, come first and are read at once. Then comes the data. Each of the two has a checksum among
the header's strings, XXH3-128 in hex: `data_xxh3_128`, and `index_xxh3_128` of all bytes from the first of the file to
the last of the index, with zeros in its own place. So what decides how much memory is taken is checked before it is.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from xxhash import xxh3_128

from ..arrays import numpy_dtype

FORMAT, VERSION = "cupyattn.kvcache", 1
CHUNK = 32 << 20  # bytes that are on their way at once
PROGRESS_FROM = 1 << 30  # bytes of data that are worth a progress bar
MAX_HEADER = 100 << 20  # that of safetensors
INDEX, DATA = "index_xxh3_128", "data_xxh3_128"
_NO_SUM = "0" * 32
_TAGS = {"int32": "I32", "int64": "I64", "uint8": "U8", "uint64": "U64"}
_TAGS |= {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}
_DTYPES = {tag: name for name, tag in _TAGS.items()}

Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


class BadSnapshot(ValueError):
    """A file is no snapshot, or not a whole one, or was altered. Nothing was loaded from it."""


class Writer:
    """A context in which the data of a new file is written, from the first byte to the last, in any pieces.

    The file appears when the context is left, complete and on the disk, in the place of one that was there before. If
    it is left by an exception, or the process dies, nothing has happened.

    Args:
        path: of the file; its folder exists.
        kind: what is in it.
        strings: what else the header says.
        index: the small tensors.
        data: dtype and shape of each tensor that is about to be written.
    """

    def __init__(
        self, path: str | os.PathLike, kind: str, strings: Mapping[str, Any], index: Mapping[str, Any], data: Shapes
    ) -> None:
        self._path = Path(os.path.realpath(path))
        self._index = b"".join(np.ascontiguousarray(array).tobytes() for array in index.values())
        self._strings = {"format": FORMAT, "version": VERSION, "kind": kind, "data": " ".join(data), **strings}
        self._tensors: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in {**{name: (x.dtype, x.shape) for name, x in index.items()}, **data}.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            self._tensors[name] = {"dtype": _TAGS[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
        self._left = end - len(self._index)
        self._sum = xxh3_128()

    def __enter__(self) -> Writer:
        with ExitStack() as stack:
            self._folder = os.open(self._path.parent, os.O_RDONLY)
            stack.callback(os.close, self._folder)
            _check_name(self._folder, self._path)
            self._file, self._name = _open_nameless(self._folder, self._path.name)
            stack.callback(self._close)
            self._advance = stack.enter_context(_progress(f"saving {self._path.name}", self._left))
            self._writing = stack.enter_context(ThreadPoolExecutor(1))
            self._last: Future | None = None
            _write_all(self._file, self._header(_NO_SUM, _NO_SUM) + self._index)
            self._stack = stack.pop_all()
        return self

    def write(self, piece: np.ndarray) -> None:
        """The next bytes of the data: any C-contiguous array, which must stay as it is until the next call is done."""
        octets = _octets(piece)
        self._wait()
        self._last = self._writing.submit(_write_all, self._file, octets)
        self._sum.update(octets)
        self._left -= octets.nbytes
        self._advance(octets.nbytes)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._stack:
            if kind is None:
                self._finish()

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _finish(self) -> None:
        self._wait()
        if self._left:
            raise AssertionError(f"{self._left} bytes of the data were not written")
        data = self._sum.hexdigest()
        index = xxh3_128(self._header(_NO_SUM, data) + self._index).hexdigest()
        os.lseek(self._file, 0, os.SEEK_SET)
        _write_all(self._file, self._header(index, data))
        os.fsync(self._file)
        if self._name is None:
            self._name = _free_name(self._path.name)
            # With a folder's descriptor link() follows the link in /proc to the file that has no name yet.
            os.link(f"/proc/self/fd/{self._file}", self._name, dst_dir_fd=self._folder, follow_symlinks=True)
        os.replace(self._name, self._path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._name = None
        os.fsync(self._folder)

    def _header(self, index: str, data: str) -> bytes:
        """Length and header; padded, so that the tensors begin at a multiple of 8."""
        strings = {name: str(value) for name, value in self._strings.items()}
        text = json.dumps({"__metadata__": {**strings, INDEX: index, DATA: data}, **self._tensors}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _close(self) -> None:
        os.close(self._file)
        if self._name is not None:
            os.unlink(self._name, dir_fd=self._folder)


class Reader:
    """A context in which the data of a file is read, from the first byte to the last; `strings`, `index`, `data` are
    as in `Writer`, and are checked already. `finish` checks the data: do not use it before.

    Raises BadSnapshot for whatever is wrong with the file, OSError if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike, kind: str) -> None:
        self._path, self._kind = path, kind

    def __enter__(self) -> Reader:
        with ExitStack() as stack:
            self._file = stack.enter_context(open(self._path, "rb", buffering=0))
            self._read_front()
            self.data_bytes = self._size - self._start
            self._advance = stack.enter_context(_progress(f"loading {Path(self._path).name}", self.data_bytes))
            self._sum = xxh3_128()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Fill these C-contiguous arrays, one behind the other, with the next bytes of the data, and yield each.

        One is read while the one before it is checked and used, so that two by turns are enough. Close this before the
        file, if not all are taken.
        """
        with ThreadPoolExecutor(1) as reading:
            before: tuple[np.ndarray, Future] | None = None
            for piece in chain(pieces, [None]):
                coming = None if piece is None else (piece, reading.submit(self._fill, _octets(piece)))
                if before is not None:
                    filled, done = before
                    self._sum.update(done.result())
                    self._advance(filled.nbytes)
                    yield filled
                before = coming

    def finish(self) -> None:
        """Raise BadSnapshot unless all of the data was read, and is what was written."""
        if self._file.tell() != self._size or self._sum.hexdigest() != self.strings[DATA]:
            self.refuse("altered data: it does not have the checksum that the header says")

    def rewind(self) -> None:
        """Read the data from its beginning."""
        self._advance(self._start - self._file.tell())
        self._file.seek(self._start)
        self._sum.reset()

    def refuse(self, what: str) -> NoReturn:
        """Raise BadSnapshot that says what this file is."""
        raise BadSnapshot(f"path: got {os.fspath(self._path)!r}, {what}; expected a snapshot of this version, as saved")

    def _read_front(self) -> None:
        self._size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._fill(np.zeros(8, np.uint8)).tobytes(), "little")
        if length > min(self._size - 8, MAX_HEADER):
            self.refuse("no safetensors file, or a truncated one")
        header = self._fill(np.empty(length, np.uint8)).tobytes()
        try:
            tensors = json.loads(header)
            self.strings: dict[str, str] = tensors.pop("__metadata__")
            if not all(isinstance(value, str) for value in self.strings.values()):
                raise TypeError
            found = [self.strings[name] for name in ("format", "kind", "version", INDEX, DATA)]
            shapes = {name: (numpy_dtype(_DTYPES[x["dtype"]]), tuple(x["shape"])) for name, x in tensors.items()}
            ends = [(x["data_offsets"][0], x["data_offsets"][1]) for x in tensors.values()]
            sizes = [math.prod(map(_count, shape)) * dtype.itemsize for dtype, shape in shapes.values()]
            data = self.strings["data"].split()
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            self.refuse("no snapshot: its header is none")
        if found[0] != FORMAT or found[1] != self._kind:
            self.refuse(f"a file of {found[0]} {found[1]}")
        if found[2] != str(VERSION):
            self.refuse(f"of version {found[2]}, where {VERSION} is known")
        starts = np.cumsum([0, *sizes]).tolist()
        if ends != list(zip(starts, starts[1:], strict=False)) or self._size != 8 + length + starts[-1]:
            self.refuse(f"of {self._size} bytes, not of those that its header tells: truncated or altered")
        front = length.to_bytes(8, "little") + header.replace(found[3].encode(), _NO_SUM.encode(), 1)
        octets = {name: np.empty(size, np.uint8) for name, size in zip(shapes, sizes, strict=True) if name not in data}
        index_sum = xxh3_128(front)
        for array in octets.values():
            index_sum.update(self._fill(array))
        if index_sum.hexdigest() != found[3]:
            self.refuse("altered: its header or index do not have the checksum that it says")
        self.data = {name: shapes[name] for name in shapes if name in data}
        self.index = {name: array.view(shapes[name][0]).reshape(shapes[name][1]) for name, array in octets.items()}
        self._start = self._file.tell()

    def _fill(self, octets: np.ndarray) -> np.ndarray:
        rest = memoryview(octets)
        while len(rest):
            count = self._file.readinto(rest)
            if not count:
                self.refuse("a truncated file")
            rest = rest[count:]
        return octets


def _open_nameless(folder: int, name: str) -> tuple[int, str | None]:
    """A new file in a folder, without a name if that can be: then a process that dies leaves nothing behind."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        try:
            return os.open(".", os.O_TMPFILE | os.O_RDWR, 0o666, dir_fd=folder), None
        except OSError as error:  # file systems that know of no such files, NFS for one
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    name = _free_name(name)
    return os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666, dir_fd=folder), name


def _octets(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(number)
    return number


def _check_name(folder: int, path: Path) -> None:
    """Raise now the OSError that would keep a complete file from this name, or that should: /dev/null is a name too."""
    try:
        found = os.stat(path.name, dir_fd=folder)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(found.st_mode):
        raise FileExistsError(errno.EEXIST, "Not a regular file", os.fspath(path))


def _free_name(name: str) -> str:
    """A name beside this one, which itself may be as long as names can be."""
    return f".{os.fsencode(name)[:200].decode(errors='ignore')}.{secrets.token_hex(8)}.partial"


def _write_all(file: int, octets: Any) -> None:
    rest = memoryview(octets)
    while len(rest):
        rest = rest[os.write(file, rest) :]


class _progress:
    """A context that gives a function to be told of bytes that are done; they are shown if there are many."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._bars = what, total, None

    def __enter__(self) -> Any:
        if self._total < PROGRESS_FROM:
            return lambda count: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        self._bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bars.__enter__()
        task = self._bars.add_task(self._what, total=self._total)
        return lambda count: self._bars.advance(task, count)

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.__exit__(*error)
