"""Other libraries' names in sys.modules: what imports find while they are in force, and after."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import threading

import pytest

from cupyattn import compat
from cupyattn.compat import flash_attn, flash_attn_3, flashinfer, install, install_as

NAMES = ["flash_attn", "flash_attn_interface", "flash_attn_3", "flashinfer"]


@pytest.fixture(autouse=True)
def everything_is_as_before():
    modules, finders = dict(sys.modules), list(sys.meta_path)
    yield
    changed = {name for name in {*modules, *sys.modules} if modules.get(name) is not sys.modules.get(name)}
    assert not {name for name in changed if name.partition(".")[0] in NAMES}
    assert sys.meta_path == finders and not install._active


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A flash_attn that is installed, with a submodule that there is here and one that there is not."""
    package = tmp_path / "flash_attn"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").write_text("flash_attn_func = 'theirs'\n")
    (package / "bert_padding.py").write_text("pad_input = 'theirs'\n")
    (package / "ops" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_usage_as_people_have_written_it():
    with install_as("flash_attn"):
        import flash_attn as theirs
        from flash_attn import flash_attn_func, flash_attn_varlen_func
        from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
        from flash_attn.flash_attn_interface import flash_attn_with_kvcache
        from flash_attn.layers.rotary import apply_rotary_emb
        from flash_attn.utils.generation import InferenceParams

        assert theirs.__version__ == "2.8.3" and theirs.bert_padding.pad_input is pad_input
    assert flash_attn_func is flash_attn.flash_attn_func and flash_attn_varlen_func is flash_attn.flash_attn_varlen_func
    assert flash_attn_with_kvcache is flash_attn.flash_attn_with_kvcache
    assert unpad_input is importlib.import_module("cupyattn.compat.flash_attn.bert_padding").unpad_input
    assert index_first_axis.__module__ == "cupyattn.compat.flash_attn.bert_padding"
    assert apply_rotary_emb.__module__ == "cupyattn.compat.flash_attn.layers.rotary"
    assert InferenceParams.__module__.startswith("cupyattn.")


def test_flashinfer_and_flash_attention_3():
    with install_as("flashinfer"), install_as("flash_attn_interface"), install_as("flash_attn_3"):
        import flash_attn_3 as package
        import flash_attn_interface
        import flashinfer as theirs
        import flashinfer.decode
        from flash_attn_3.flash_attn_interface import flash_attn_varlen_func
        from flashinfer.cascade import merge_state
        from flashinfer.page import get_batch_indices_positions
        from flashinfer.quantization import packbits

        assert flash_attn_interface.flash_attn_func is flash_attn_3.flash_attn_func is package.flash_attn_func
        assert flash_attn_varlen_func is flash_attn_3.flash_attn_varlen_func
        assert theirs.BatchDecodeWithPagedKVCacheWrapper is flashinfer.BatchDecodeWithPagedKVCacheWrapper
        assert theirs.decode is sys.modules["flashinfer.decode"]
        assert theirs.decode.single_decode_with_kv_cache is flashinfer.single_decode_with_kv_cache
    assert merge_state is flashinfer.merge_state and packbits is flashinfer.packbits
    assert get_batch_indices_positions is flashinfer.get_batch_indices_positions


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_module_exports(name):
    with install_as(name):
        for alias, ours in install._DOORS[name].items():
            module = importlib.import_module(alias)
            source = importlib.import_module(f"cupyattn.compat.{ours}")
            assert module is not source and module.__name__ == alias and importlib.util.find_spec(alias) is not None
            for exported in getattr(source, "__all__", ()):
                found, expected = getattr(module, exported), getattr(source, exported)
                assert found is expected or found is sys.modules[f"{alias}.{exported}"]


def test_what_is_not_here_is_not_found():
    with install_as("flash_attn"):
        for missing in ("flash_attn.ops.triton.rotary", "flash_attn.cute", "flash_attn.complaints"):
            with pytest.raises(
                ModuleNotFoundError, match=f"No module named '{missing.rpartition('.triton')[0] or missing}"
            ):
                importlib.import_module(missing)
        assert importlib.util.find_spec("flash_attn.cute") is None
        with pytest.raises(ImportError, match="cannot import name 'flash_attn_gpu' from 'flash_attn'"):
            from flash_attn import flash_attn_gpu  # noqa: F401


def test_what_was_imported_before_is_back(real):
    theirs, padding = importlib.import_module("flash_attn"), importlib.import_module("flash_attn.bert_padding")
    ops = importlib.import_module("flash_attn.ops")
    assert theirs.flash_attn_func == "theirs"
    with install_as("flash_attn"):
        import flash_attn as ours

        assert ours is not theirs and ours.flash_attn_func is flash_attn.flash_attn_func
        with pytest.raises(ModuleNotFoundError):  # although it is installed
            importlib.import_module("flash_attn.ops")
        sys.modules["flash_attn.own"] = ours  # what others put there is theirs no longer
    assert importlib.import_module("flash_attn") is theirs and theirs.bert_padding is padding
    assert sys.modules["flash_attn.bert_padding"] is padding and sys.modules["flash_attn.ops"] is ops
    assert "flash_attn.own" not in sys.modules and theirs.flash_attn_func == padding.pad_input == "theirs"


def test_nothing_changes_by_an_import_of_this_library(real):
    importlib.import_module("cupyattn.compat.flash_attn")
    assert importlib.import_module("flash_attn").flash_attn_func == "theirs"


def test_a_monkeypatch_there_is_none_here():
    with install_as("flash_attn"):
        import flash_attn as theirs

        theirs.flash_attn_func = None
    assert callable(flash_attn.flash_attn_func)


def test_it_is_undone_where_an_error_comes(real):
    theirs = importlib.import_module("flash_attn")
    with pytest.raises(ZeroDivisionError), install_as("flash_attn"):
        1 / 0  # noqa: B018
    assert sys.modules["flash_attn"] is theirs


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_twice_in_any_order(order):
    handles = [install_as("flash_attn"), install_as("flash_attn")]
    module = sys.modules["flash_attn"]
    handles[order[0]].undo()
    handles[order[0]].undo()
    assert sys.modules["flash_attn"] is module
    handles[order[1]].undo()
    assert "flash_attn" not in sys.modules


def test_without_a_with_block():
    handle = install_as("flashinfer")
    assert isinstance(handle, compat.Installed) and repr(handle) == "<cupyattn.compat as flashinfer>"
    from flashinfer import merge_state

    handle.undo()
    assert merge_state is flashinfer.merge_state and "flashinfer" not in sys.modules
    assert repr(handle) == "<cupyattn.compat as flashinfer, undone>"


@pytest.mark.parametrize(
    ("name", "distributions", "version"),
    [("flash_attn", ["flash_attn", "flash-attn"], "2.8.3"), ("flashinfer", ["flashinfer-python"], "0.7.2")],
)
def test_the_version_in_the_metadata(name, distributions, version):
    before = [_version(distribution) for distribution in distributions]
    with install_as(name):
        assert [importlib.metadata.version(distribution) for distribution in distributions] == [version] * len(before)
        assert {*distributions} & {*importlib.metadata.packages_distributions()[name]}, "as transformers looks for it"
        found = set(importlib.metadata.distributions())
        assert not any(one.locate_file("x").exists() for one in found if one.name in distributions)
        assert not list(importlib.metadata.distributions(path=["/nowhere"]))
        assert importlib.metadata.version("numpy") and _version("no-such-thing") is None
    assert [_version(distribution) for distribution in distributions] == before


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_threads():
    failures = []

    def work():
        for _ in range(50):
            with install_as("flash_attn"):
                if importlib.import_module("flash_attn").flash_attn_func is not flash_attn.flash_attn_func:
                    failures.append("not ours")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("xformers", r"name: got 'xformers', expected one of 'flash_attn', .*'flashinfer'"),
        ("flash_attn.bert_padding", "name: got 'flash_attn.bert_padding', expected one of"),
        (flash_attn, "name: got a module, expected a library's name"),
        (None, "name: got a NoneType, expected a library's name"),
    ],
)
def test_refusals(name, complaint):
    with pytest.raises((TypeError, ValueError), match=f"^{complaint}"):
        install_as(name)


def test_no_array_library_is_imported():
    code = "import sys\nfrom cupyattn.compat import install_as\n"
    code += "".join(f"install_as({name!r})\n" for name in NAMES)
    code += "import flash_attn, flash_attn_interface, flashinfer\nprint({'cupy', 'torch', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
