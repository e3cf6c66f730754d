"""The names that people have for a GPU architecture."""

from __future__ import annotations

import re

import typer

from ..plan import DEVICES

HELP = "GPU architecture, which need not be here: 80, 90a, sm_90 or 9.0."


def named_arch(name: str) -> str:
    """The architecture called so: "90", "9.0", "sm_90", "90a" and "sm_90a" are all "90a".

    Raises typer.BadParameter for one that is not supported.
    """
    number = re.fullmatch(r"(?:sm_?)?(\d{2,3})[af]?", name.strip().lower().replace(".", ""))
    for arch in (number[1], f"{number[1]}a") if number else ():
        if arch in DEVICES:
            return arch
    raise typer.BadParameter(f"got {name}, expected one of {', '.join(DEVICES)}", param_hint="--arch")
