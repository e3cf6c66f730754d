"""The package as users get it: what it needs, what a wheel and a source distribution hold, what an import costs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cupyattn

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
IMPORT_ROOT = Path(cupyattn.__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run_python(code: str, *path: Path, cwd: Path | None = None) -> str:
    """What a fresh interpreter prints when it runs `code` with `path` before everything else."""
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*(str(p) for p in path), *inherited])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def names_of(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].replace("_", "-") for requirement in requirements}


def test_metadata(project):
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.10"
    assert "urls" not in project
    assert project["scripts"] == {"cupyattn": "cupyattn.cli:app"}
    assert "TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()


def test_base_dependencies(project):
    expected = {"numpy", "ml-dtypes", "einops", "platformdirs", "rich", "typer", "xxhash"}
    assert names_of(project["dependencies"]) == expected


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("cu12", {"cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"}),
        ("cu13", {"cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime"}),
        ("interop", {"torch", "jax"}),
        ("test", {"pytest", "hypothesis"}),
        ("notebooks", {"nbclient", "matplotlib"}),
    ],
)
def test_extras(project, extra, expected):
    assert expected <= names_of(project["optional-dependencies"][extra])


def test_changelog_has_this_version(project):
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_version(project):
    try:
        installed = importlib.metadata.version("cupyattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cupyattn runs from the checkout here")
    assert installed == project["version"]


def test_import_brings_no_array_library():
    code = "import sys, cupyattn; print(sorted({'cupy', 'torch', 'jax', 'typer'} & set(sys.modules)))"
    assert run_python(code, IMPORT_ROOT) == "[]"


def test_import_is_quick(monkeypatch, tmp_path):
    """At most 0.15 s where NumPy's own import takes 0.1 s: a machine with other work may be several times as slow."""
    # processor time: other tests may be running beside this one; and not that of compiling Python
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    clock = "times.append(time.process_time())"
    code = f"import time; times = []; {clock}; import numpy; {clock}; import cupyattn; {clock}; print(*times)"
    took = [[float(time) for time in run_python(code, IMPORT_ROOT).split()] for _ in range(5)]
    assert any(done - numpy <= 0.15 * max(1, (numpy - start) / 0.1) for start, numpy, done in took), took


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """A source distribution of the checkout, and a wheel that was built from it and nothing else."""
    pytest.importorskip("hatchling")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the tests run without a checkout")
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys; from hatchling import build; print(build.build_{}(sys.argv[1] if sys.argv[1:] else {!r}))"
    sdist = folder / run_python(build.format("sdist", str(folder)), cwd=ROOT).splitlines()[-1]
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    wheel = folder / run_python(build.format("wheel", str(folder)), cwd=unpacked).splitlines()[-1]
    return sdist, wheel


def test_wheel_holds_the_cuda_sources(distributions):
    members = set(zipfile.ZipFile(distributions[1]).namelist())
    for source in sorted((ROOT / "kernels_cu").rglob("*.cu*")):
        assert f"cupyattn/_kernels_cu/{source.relative_to(ROOT / 'kernels_cu').as_posix()}" in members
    assert "cupyattn/data/paged_memory.txt" in members
    assert any(name.endswith("licenses/LICENSE") for name in members)
    assert not [name for name in members if name.startswith(("tests", "kernels_cu", "notebooks"))]


def test_wheel_works_away_from_the_checkout(distributions, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(distributions[1]).extractall(site)
    code = """
import cupyattn
from cupyattn.jit.sources import flatten, folder, names
assert cupyattn.__file__.startswith({site!r}), cupyattn.__file__
assert all("__global__" in flatten(name) for name in names())
print(folder())
"""
    assert Path(run_python(code.format(site=str(site)), site, cwd=tmp_path)) == site / "cupyattn" / "_kernels_cu"
