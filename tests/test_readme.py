"""The README does what it says: its Python runs, its commands exist, its numbers are those of the committed record.

Blocks that import cupy need a GPU and are skipped, visibly, where there is none; so are blocks whose library is not
installed. Everything else runs everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cupyattn
from cupyattn.cli import app
from cupyattn.cli.device import why_no_gpu

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECORD = ROOT / "notebooks" / "results" / "prefill.json"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def needs(block: str) -> list[str]:
    """The array libraries that a block imports."""
    return [name for name in ("cupy", "torch", "jax") if re.search(rf"^(import|from) {name}\b", block, re.MULTILINE)]


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: "-".join(needs(block)) or "numpy")
def test_python_block(block, tmp_path):
    for library in needs(block):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
        if library == "cupy" and (reason := why_no_gpu()):
            pytest.skip(f"needs an NVIDIA GPU; {reason}")
    path = os.pathsep.join([str(Path(cupyattn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", block],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_every_library_has_an_example():
    shown = {name for block in blocks("python") for name in needs(block) or ["numpy"]}
    assert shown == {"numpy", "cupy", "torch", "jax"}


@pytest.mark.parametrize("command", sorted(set(re.findall(r"\bcupyattn (demo|doctor|warmup|bench|explain)\b", README))))
def test_command_exists(command):
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0, done.output


def test_options_exist():
    for command, options in re.findall(
        r"^cupyattn (\w+)((?: --?[\w-]+(?: [\w./]+)?)+)$", "".join(blocks("console")), re.M
    ):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        for option in re.findall(r"--[\w-]+", options):
            assert option in text, f"{command} {option}"


def test_setup_commands():
    setup = [line for line in "".join(blocks("console")).splitlines() if "python -m venv" in line]
    assert len(setup) == 2
    assert all("pip install" in line for line in setup)
    assert setup[0].endswith("&& cupyattn demo")
    assert setup[1].endswith("&& pytest")


def test_extras_exist():
    declared = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r'"\.\[([\w,]+)\]"', README):
        for extra in extras.split(","):
            assert f"\n{extra} = [" in declared, extra


def test_ci_installs_as_the_readme_says():
    script = ROOT / ".ci" / "run"
    if not script.is_file():
        pytest.skip("a source distribution has no CI")
    install = re.search(r'pip install "(\.\[[\w,]+\])" && pytest', README)[1]
    assert f'pip install --quiet "{install}"\n' in script.read_text()


def speed_rows() -> list[str]:
    """The rows of the README's speed table, as the record has them."""
    record = json.loads(RECORD.read_text())
    return [
        f"| {peer} | {line['geometric_mean']:.2f} | {line['minimum']:.2f} ({line['minimum_cell']}) | {line['cells']} |"
        for peer, line in record["summary"].items()
    ]


def test_speed_numbers_are_those_of_the_record():
    rows = re.findall(r"^\| \w+ \| \d+\.\d+ \| \d+\.\d+ \(.*\|$", README, re.MULTILINE)
    if not RECORD.is_file():
        assert rows == [], "the README quotes speeds that no committed record backs"
        return
    record = json.loads(RECORD.read_text())
    assert rows == speed_rows(), "paste these rows:\n" + "\n".join(speed_rows())
    assert record["machine"]["gpu"] in README
    for library in ("cupy", "torch"):
        if library in record["host"]:
            assert f"{record['host'][library]['median_us']:.0f} µs" in README
