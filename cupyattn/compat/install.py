"""Other libraries' names in `sys.modules`, for code whose imports cannot be edited."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ..arrays import refuse

_FLASH_ATTN_3 = "flash_attn_3"
_DOORS: dict[str, dict[str, str]] = {  # name -> modules by their names there, and which of cupyattn.compat they are
    "flash_attn": {
        "flash_attn": "flash_attn",
        "flash_attn.flash_attn_interface": "flash_attn.flash_attn_interface",
        "flash_attn.bert_padding": "flash_attn.bert_padding",
        "flash_attn.layers": "flash_attn.layers",
        "flash_attn.layers.rotary": "flash_attn.layers.rotary",
        "flash_attn.utils": "flash_attn.utils",
        "flash_attn.utils.generation": "flash_attn.utils.generation",
    },
    "flash_attn_interface": {"flash_attn_interface": _FLASH_ATTN_3},
    "flash_attn_3": {"flash_attn_3": _FLASH_ATTN_3, "flash_attn_3.flash_attn_interface": _FLASH_ATTN_3},
    "flashinfer": {
        "flashinfer": "flashinfer",
        "flashinfer.cascade": "flashinfer.cascade",
        "flashinfer.decode": "flashinfer.decode",
        "flashinfer.page": "flashinfer.page",
        "flashinfer.prefill": "flashinfer.prefill",
        "flashinfer.quantization": "flashinfer.quantization",
        "flashinfer.rope": "flashinfer.rope",
    },
}
_DISTRIBUTIONS = {"flashinfer": "flashinfer-python"}  # where it is not the name of the module
_lock = threading.RLock()
_active: dict[str, _Door] = {}


class Installed:
    """What `install_as` did: undone by `undo`, or at the end of a `with` block. Both do nothing the second time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._in_force = True

    def undo(self) -> None:
        """Give the name back: what was imported under it before is what imports find again."""
        with _lock:
            if self._in_force:
                self._in_force = False
                _close(self.name)

    def __enter__(self) -> Installed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<cupyattn.compat as {self.name}{'' if self._in_force else ', undone'}>"


def install_as(name: str) -> Installed:
    """Let `import flash_attn`, or another library's name, find the modules here, in the whole process.

    Call it before the code that imports the library is imported itself: what has been imported already keeps the
    functions that it has. Submodules that there are not here give ModuleNotFoundError meanwhile, even if that library
    is installed. `importlib.metadata.version` gives the version whose arguments these are. Nothing is written anywhere,
    and an installed library is untouched. What is installed twice needs both to be undone, in any order.

    Args:
        name: "flash_attn", "flashinfer", or FlashAttention-3's "flash_attn_interface" and "flash_attn_3".

    Returns:
        A context manager, which undoes it at its end and need not be entered; or undo it by its method `undo`.

    Raises:
        TypeError, ValueError: there is no such front door.

    >>> from cupyattn.compat import install_as
    >>> with install_as("flash_attn"):
    ...     from flash_attn import flash_attn_func
    >>> flash_attn_func.__module__
    'cupyattn.compat.flash_attn.flash_attn_interface'
    """
    if not isinstance(name, str):
        refuse("name", f"a {type(name).__name__}", "a library's name, as 'flash_attn'", TypeError)
    if name not in _DOORS:
        refuse("name", repr(name), f"one of {', '.join(map(repr, _DOORS))}")
    with _lock:
        if name not in _active:
            _active[name] = _Door(name, _stand_ins(_DOORS[name]))
        _active[name].users += 1
    return Installed(name)


def _stand_ins(door: dict[str, str]) -> dict[str, ModuleType]:
    """Modules by the other library's names, with what those here have in them."""
    modules = {}
    for alias, ours in door.items():
        package = any(other.startswith(f"{alias}.") for other in door)
        modules[alias] = _stand_in(alias, importlib.import_module(f"cupyattn.compat.{ours}"), package)
    for alias, module in modules.items():
        parent, _, child = alias.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


def _stand_in(alias: str, ours: ModuleType, package: bool) -> ModuleType:
    module = ModuleType(alias, ours.__doc__)
    for name, value in vars(ours).items():
        if not isinstance(value, ModuleType) and (not name.startswith("__") or name in ("__all__", "__version__")):
            setattr(module, name, value)
    module.__file__, module.__spec__ = ours.__file__, ModuleSpec(alias, None, is_package=package)
    if package:
        module.__path__ = []  # nothing is to be found beside what stands here
    return module


def _close(name: str) -> None:
    door = _active[name]
    door.users -= 1
    if not door.users:
        del _active[name]
        door.take_away()


class _Door(DistributionFinder):
    """A name that is in force: the modules that stand for it, those that did before, and what the metadata says."""

    def __init__(self, name: str, modules: dict[str, ModuleType]) -> None:
        self.name, self.users = name, 0
        self._metadata = _Metadata(_DISTRIBUTIONS.get(name, name), modules[name].__version__, name)
        self._before = {alias: module for alias, module in sys.modules.items() if self._is_of_it(alias)}
        for alias in self._before:
            del sys.modules[alias]
        sys.modules.update(modules)
        sys.meta_path.insert(0, self)

    def take_away(self) -> None:
        sys.meta_path.remove(self)
        for alias in [alias for alias in sys.modules if self._is_of_it(alias)]:
            del sys.modules[alias]
        sys.modules.update(self._before)

    def _is_of_it(self, module: str) -> bool:
        return module == self.name or module.startswith(f"{self.name}.")

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Modules are found by `sys.modules`."""

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:
        """What callers ask the metadata for, to learn whether the library is there and which arguments it has."""
        if "path" in vars(context):  # of somewhere else
            return
        if context.name is None or _plain(context.name) == _plain(self._metadata.project):
            yield self._metadata


def _plain(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


@dataclass(eq=False)  # and so with a hash, as other distributions
class _Metadata(Distribution):
    """Name and version, the module that there is, and no files."""

    project: str
    release: str
    module: str

    def read_text(self, filename: str) -> str | None:
        head = f"Metadata-Version: 2.1\nName: {self.project}\nVersion: {self.release}\n"
        return {"METADATA": head, "top_level.txt": f"{self.module}\n"}.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(f"<cupyattn.compat as {self.project}>", path)  # where there is nothing
