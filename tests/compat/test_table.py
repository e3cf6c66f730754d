"""The table of the front doors: it is what the code says, and the record of the others is what they say."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from pathlib import Path

import pytest

from cupyattn import compat
from cupyattn.compat import table
from cupyattn.compat.table import DOORS, VERDICTS, recorded

CALLS = [pytest.param(door, call, id=f"{door.name}.{call}") for door in DOORS for call in door.calls]
FILE = Path(compat.__file__).with_name("SIGNATURES.md")


@pytest.mark.parametrize(("door", "call"), CALLS)
def test_every_argument_has_its_row(door, call):
    """`rows` refuses an argument that is not here in the same place with the same default."""
    found = table.rows(door, call)
    theirs = [parameter for parameter in recorded.parameters(door.calls[call]) if parameter != "*"]
    assert [row.argument for row in found if row.verdict != "own" and row.argument != "returns"] == theirs
    for row in found:
        assert row.verdict in VERDICTS and (row.why or row.verdict == "same"), row


def test_every_note_is_of_some_argument():
    assert table.unused_notes() == []


def test_every_name_here_is_in_the_table():
    for door in DOORS:
        module = importlib.import_module(f"cupyattn.compat.{door.module}")
        named = {call.partition(".")[0] for call in door.calls}
        others = {"single_prefill_with_kv_cache_return_lse"}  # a partial
        exported = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
        assert exported - others <= named


def test_the_file_is_up_to_date():
    assert FILE.read_text() == table.render(), "write it with: python -m cupyattn.compat.table > " + FILE.name


@pytest.mark.parametrize(
    "changed",
    [
        lambda q, k, v, causal=False: None,  # arguments are missing
        lambda q, k, v, softmax_scale=None, dropout_p=0.0, causal=False, **others: None,  # in another order
    ],
)
def test_an_argument_in_another_place_is_seen(monkeypatch, changed):
    monkeypatch.setattr(table, "find", lambda door, call: changed)
    with pytest.raises(ValueError, match="^flash_attn.flash_attn_func: got q, k, v"):
        table.rows(DOORS[0], "flash_attn_func")


def test_another_default_is_seen(monkeypatch):
    ours = table.own_parameters(table.find(DOORS[0], "flash_attn_func"))
    changed = [parameter.replace("causal=False", "causal=True") for parameter in ours]
    monkeypatch.setattr(table, "own_parameters", lambda function: changed)
    with pytest.raises(ValueError, match="causal=True"):
        table.rows(DOORS[0], "flash_attn_func")


def test_it_is_printed(capsys):
    import runpy

    runpy.run_module("cupyattn.compat.table", run_name="__main__")
    assert capsys.readouterr().out == table.render()


# --------------------------------------------------------------------------- the record against what is installed


def written(parameters):
    """As the record has them: names of dtypes, no annotations, no self."""
    text = table.own_parameters(parameters)
    for dtype in ("float16", "bfloat16"):
        text = [parameter.replace(f"=torch.{dtype}", f"={dtype!r}") for parameter in text]
    return text


def installed(name, version):
    """The real package, if it is there in the version that was recorded."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    if not found.startswith(version):
        pytest.skip(f"{name} is {found}, recorded {version}")


@pytest.mark.parametrize("call", recorded.signatures(recorded.FLASHINFER))
def test_the_record_of_flashinfer(call):
    installed("flashinfer-python", recorded.FLASHINFER_VERSION)
    theirs = importlib.import_module("flashinfer")
    owner, _, method = call.partition(".")
    function = getattr(theirs, owner)
    function = getattr(function, method) if method else function
    expected = recorded.parameters(recorded.signatures(recorded.FLASHINFER)[call])
    if call == "BatchDecodeWithPagedKVCacheWrapper.plan":  # which hands on what comes by position
        function = theirs.BatchDecodeWithPagedKVCacheWrapper._plan_impl
        found = [parameter for parameter in written(function) if parameter != "*"]
        assert sorted(found) == sorted(parameter for parameter in expected if parameter != "*")
    else:
        assert written(function) == expected


@pytest.mark.parametrize("call", recorded.signatures(recorded.FLASH_ATTN))
def test_the_record_of_flash_attn(call):
    installed("flash-attn", recorded.FLASH_ATTN_VERSION)
    module, _, name = call.rpartition(".")
    function = getattr(importlib.import_module(f"flash_attn.{module}".rstrip(".")), name)
    if name in ("index_first_axis", "index_put_first_axis"):
        pytest.skip("an autograd function, whose signature cannot be read")
    assert written(function) == recorded.parameters(recorded.signatures(recorded.FLASH_ATTN)[call])
