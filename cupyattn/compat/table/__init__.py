"""The table of the front doors: for every argument of the other libraries what becomes of it here, and why.

`python -m cupyattn.compat.table` prints it. It is made of the signatures that the other libraries have (`recorded`),
those that the functions here have, which are looked at anew, and `notes` on what differs.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from . import notes, recorded
from .notes import NOT_HERE, RETURNS, Notes
from .recorded import parameters, signatures

VERDICTS = ("same", "wider", "narrower", "own")


@dataclass(frozen=True)
class Door:
    """One library, and the module that stands for it."""

    name: str
    title: str
    module: str  # in cupyattn.compat
    calls: dict[str, str]  # with their signatures there
    notes: Notes
    earlier: dict[str, str]  # signatures of an earlier version, where they differ
    earlier_version: str = ""


DOORS = (
    Door(
        "flash_attn",
        f"flash_attn {recorded.FLASH_ATTN_VERSION}",
        "flash_attn",
        signatures(recorded.FLASH_ATTN),
        notes.FLASH_ATTN,
        {},
    ),
    Door(
        "flash_attn_interface",
        "flash_attn_interface (FlashAttention-3)",
        "flash_attn_3",
        signatures(recorded.FLASH_ATTN_3),
        notes.FLASH_ATTN_3,
        {},
    ),
    Door(
        "flashinfer",
        f"flashinfer {recorded.FLASHINFER_VERSION}",
        "flashinfer",
        signatures(recorded.FLASHINFER),
        notes.FLASHINFER,
        signatures(recorded.FLASHINFER_0_2),
        "0.2",
    ),
)


@dataclass(frozen=True)
class Row:
    """One argument of one call."""

    argument: str  # with its default there
    verdict: str
    why: str


def find(door: Door, call: str) -> Callable[..., Any]:
    """The function or method here."""
    found: Any = importlib.import_module(f"cupyattn.compat.{door.module}")
    for name in call.split("."):
        if not hasattr(found, name):
            found = importlib.import_module(f"{found.__name__}.{name}")
        else:
            found = getattr(found, name)
    return found


def own_parameters(function: Callable[..., Any]) -> list[str]:
    """The parameters of a function here, as `recorded.parameters` gives those of the others."""
    found: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not any(other.startswith("*") for other in found):
            found.append("*")
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        found.append(f"{star}{name}{default}")
    return found


def rows(door: Door, call: str) -> list[Row]:
    """What the table says of a call, in the order of its arguments there.

    Raises:
        ValueError: an argument is not here, or in another place or with another default, or has a note that says so of
            one that is new here.
    """
    theirs, ours = parameters(door.calls[call]), own_parameters(find(door, call))
    shared = [parameter for parameter in ours if parameter in theirs]
    if shared != [parameter for parameter in theirs if parameter != "*" or "*" in ours]:
        raise ValueError(f"{door.name}.{call}: got {', '.join(ours)}, expected {', '.join(theirs)}")
    earlier = [_name(parameter) for parameter in parameters(door.earlier.get(call, door.calls[call]))]
    made = []
    for parameter in [*theirs, *(one for one in ours if one not in theirs), RETURNS]:
        if parameter != "*":
            new = parameter not in (*theirs, RETURNS)
            verdict, why = _note(door, call, _name(parameter), "own" if new else "same")
            later = parameter != RETURNS and not new and _name(parameter) not in earlier
            why = "; ".join(part for part in (why, f"later than {door.earlier_version}" if later else "") if part)
            if (verdict == "own") is not new:
                raise ValueError(f"{door.name}.{call}: got verdict {verdict!r} for {parameter}")
            if parameter != RETURNS or why:
                made.append(Row(parameter, verdict, why))
    return made


def _name(parameter: str) -> str:
    return parameter.partition("=")[0]


def _note(door: Door, call: str, argument: str, default: str) -> tuple[str, str]:
    for calls, arguments, verdict, why in door.notes:
        if fnmatchcase(call, calls) and (verdict == "own") is (default == "own"):
            if any(fnmatchcase(argument, one) for one in _patterns(arguments)):
                return verdict, why
    return default, ""


def _patterns(arguments: str) -> Iterator[str]:
    """Glob patterns of arguments; *args is an argument, and what a call returns none that a pattern fits."""
    for one in arguments.split():
        yield one.replace("*args", "[*]args")


def unused_notes() -> list[tuple[str, str]]:
    """(calls, argument) of notes that say something of no argument."""
    unused = []
    for door in DOORS:
        seen = {(call, _name(row.argument)) for call in door.calls for row in rows(door, call)}
        for calls, arguments, _, _ in door.notes:
            for one in _patterns(arguments):
                if not any(fnmatchcase(call, calls) and fnmatchcase(argument, one) for call, argument in seen):
                    unused.append((calls, one))
    return unused


def render() -> str:
    """The whole table, in Markdown."""
    lines = [
        "# What the front doors of cupyattn.compat take",
        "",
        "Made by `python -m cupyattn.compat.table`; not written by hand.",
        "",
        "**same**: it takes what theirs takes, and means the same. **wider**: it takes more. **narrower**: some of",
        "what theirs takes is refused, by its name and before anything is written. **own**: theirs does not have it.",
        "All calls are for inference: no gradients are recorded.",
    ]
    for door in DOORS:
        lines += ["", f"## {door.title}: cupyattn.compat.{door.module}"]
        for call in door.calls:
            lines += ["", f"### {call}", "", "| argument | here | |", "|---|---|---|"]
            lines += [f"| `{row.argument}` | {row.verdict} | {row.why} |" for row in rows(door, call)]
        lines += ["", f"Not here: {NOT_HERE[door.name]}"]
    return "\n".join(lines) + "\n"
