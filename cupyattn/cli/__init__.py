"""The command line: `cupyattn doctor | demo | bench | warmup | explain`."""

from __future__ import annotations

import typer

from . import bench, demo, doctor, explain, warmup

app = typer.Typer(
    name="cupyattn",
    help="Attention kernels for every array library that speaks DLPack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(warmup.warmup)
app.command()(bench.bench)
app.command()(explain.explain)

__all__ = ["app"]
