"""The CUDA C sources that ship with the package, each flattened into one text that needs no include path."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
_OPEN = re.compile(r"\s*#\s*if")  # also ifdef and ifndef
_CLOSE = re.compile(r"\s*#\s*endif\b")


def folder() -> Traversable:
    """The folder of the sources: `cupyattn/_kernels_cu` in an installed wheel, `kernels_cu` in a checkout."""
    installed = resources.files("cupyattn") / "_kernels_cu"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "kernels_cu"


def names(root: Traversable | None = None) -> list[str]:
    """The kernels that `flatten` accepts."""
    root = root or folder()
    return sorted(item.name[: -len(".cu")] for item in root.iterdir() if item.name.endswith(".cu"))


def flatten(name: str, root: Traversable | None = None) -> str:
    """The text of `<name>.cu` with every `#include "…"` replaced by that file's text.

    Include paths count from the sources' folder (`root`, by default `folder()`). A file included twice is inlined
    once. `#line` directives keep the compiler's messages pointing at the files that people edit. Raises
    FileNotFoundError for an unknown kernel or a missing include, ValueError for a cycle or an include inside #if.
    """
    root = root or folder()
    if name not in names(root):
        raise FileNotFoundError(f"kernel: got {name!r}, expected one of {', '.join(names(root)) or 'none'} in {root}")
    lines: list[str] = []
    _inline(root, f"{name}.cu", [], set(), lines)
    return "\n".join(lines) + "\n"


def _inline(root: Traversable, path: str, above: list[str], done: set[str], lines: list[str]) -> None:
    """Append the lines of one file; `above` is the chain of files that led here, `done` what is inlined already."""
    depth = 0
    lines.append(f'#line 1 "{path}"')
    for number, line in enumerate(root.joinpath(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.lstrip().startswith("#"):
            lines.append(line)
            continue
        depth += bool(_OPEN.match(line)) - bool(_CLOSE.match(line))
        if _ONCE.match(line):
            line = ""  # it would warn in a main file, and every file is inlined once anyway
        elif include := _INCLUDE.match(line):
            target, where = include[1], f"{path}:{number}"
            if target == path or target in above:
                raise ValueError(f"{where}: include cycle {' -> '.join([*above, path, target])}")
            if depth:  # it would be missing wherever the condition is false
                raise ValueError(f'{where}: #include "{target}" inside #if: includes stand outside conditions')
            if not root.joinpath(target).is_file():
                raise FileNotFoundError(f'{where}: #include "{target}": no such file in {root}')
            line = ""
            if target not in done:
                done.add(target)
                _inline(root, target, [*above, path], done, lines)
                line = f'#line {number + 1} "{path}"'
        lines.append(line)
