"""The command line: `cupyattn demo | doctor | warmup | bench | explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import bench, demo, doctor, explain, warmup

app = typer.Typer(
    name="cupyattn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"cupyattn {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Attention kernels for every array library that speaks DLPack. A first look: cupyattn demo."""


app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(warmup.warmup)
app.command()(bench.bench)
app.command()(explain.explain)

__all__ = ["app"]
