"""The README does what it says: its Python runs, its commands exist, its numbers are those of the committed record.

Blocks that import cupy need a GPU and are skipped, visibly, where there is none; so are blocks whose library is not
installed. Everything else runs everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cupyattn
from cupyattn import plan
from cupyattn.cli import app
from cupyattn.cli.device import why_no_gpu

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECORD = ROOT / "notebooks" / "results" / "prefill.json"
DECODE_RECORD = ROOT / "notebooks" / "results" / "decode.json"
HOST_RECORDS = tuple(ROOT / "notebooks" / "results" / f"{name}.json" for name in ("compat", "integrations"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def needs(block: str) -> list[str]:
    """The array libraries that a block imports."""
    return [name for name in ("cupy", "torch", "jax") if re.search(rf"^(import|from) {name}\b", block, re.MULTILINE)]


def tables(heading: str) -> list[list[str]]:
    """The rows of each table in the section with this heading, without the first row and the line below it."""
    section = re.split(r"^#", README.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return [table.splitlines()[2:] for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)]


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
    for command, argument, options in re.findall(
        r"^cupyattn (\w+)(?: (\w+))?((?: --?[\w-]+(?: [\w./]+)?)*)$", "".join(blocks("console")), re.M
    ):
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        assert re.search(rf"\[(\w+\|)*{argument}(\|\w+)*\]", text) or not argument, f"{command} {argument}"
        for option in re.findall(r"--[\w-]+", options):
            assert option in text, f"{command} {option}"


def test_every_public_function_is_in_the_table():
    (rows,) = tables("## The functions")
    assert sorted(re.match(r"\| `(\w+)", row)[1] for row in rows) == sorted(set(cupyattn.__all__) - {"Explanation"})


def test_limits_of_decode():
    assert f"at most {plan.DECODE_BATCH} sequences" in README
    assert f"at most {plan.MOST_DECODE_QUERIES} queries" in README


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


def best_peer_rows() -> list[str]:
    """The rows of the README's table of the best peer in each shape, as the record has them."""
    record = json.loads(RECORD.read_text())
    what = {
        "grid": "the 36 of the grid",
        "gqa": "32 heads over 8 of keys, causal, 4k to 64k",
        "varlen": "64 sequences of uneven lengths",
        "paged": "paged caches, blocks of 1, 16 and 64",
    }
    rows = []
    for section, words in what.items():
        cells = record["cells"] if section == "grid" else record[section]["cells"]
        ratios = []
        for cell in cells:
            timed = {name: found["ms"] for name, found in cell["contenders"].items() if "ms" in found}
            ours = timed.pop("cupyattn")
            if timed:
                ratios.append((min(timed.values()) / ours, cell["name"]))
        lowest, where = min(ratios)
        mean, lost = statistics.geometric_mean(ratio for ratio, _ in ratios), sum(ratio < 1 for ratio, _ in ratios)
        rows.append(f"| {words} | {mean:.2f} | {lowest:.2f} ({where}) | {lost} of {len(ratios)} |")
    return rows


def test_numbers_beside_the_best_peer_are_those_of_the_record():
    assert tables("### Prefill")[1] == best_peer_rows(), "paste these rows:\n" + "\n".join(best_peer_rows())


def decode_rows() -> tuple[list[str], list[str]]:
    """The rows of the README's two tables on decode, as the record has them: against peers, and all other figures.

    A peer is the faster in a cell if the two differ by more than either does from round to round. Of its kernels the
    fastest counts.
    """
    record = json.loads(DECODE_RECORD.read_text())
    peers, others = [], []
    for peer in record["summary"]:
        ratios: dict[str, list[tuple[float, str, bool]]] = {"all": []}
        for cell in record["cells"]:
            timed = {name: found for name, found in cell["contenders"].items() if "ms" in found}
            theirs = [found for name, found in timed.items() if name.removesuffix("_tc") == peer]
            if cell["section"] == "grid" and theirs and "cupyattn" in timed:
                best, ours = min(theirs, key=lambda found: found["ms"]), timed["cupyattn"]
                ratio = best["ms"] / ours["ms"]
                found = ratio, cell["name"], ratio < 1 - max(best["spread"], ours["spread"])
                ratios["all"].append(found)
                ratios.setdefault(f"{cell['heads']}/{cell['kv_heads']}", []).append(found)
        for heads in sorted(ratios, key=lambda heads: (heads != "all", min(ratios[heads]))):
            lowest, where, _ = min(ratios[heads])
            mean = statistics.geometric_mean(ratio for ratio, *_ in ratios[heads])
            lost = sum(peer_is_faster for *_, peer_is_faster in ratios[heads])
            count = len(ratios[heads])
            peers.append(f"| {peer} | {heads} | {mean:.2f} | {lowest:.2f} ({where}) | {lost} of {count} |")
    for target in record["targets"]:
        if not target["what"].startswith(("grid ", "16/1 ", "host time ")):  # these are above or below
            where = f" ({target['cell']})" if target["cell"] else ""
            others.append(f"| {target['what']} | {target['value']:.3g}{where} |")
    others += [f"| host time of {call}, µs | {time['median_us']:.3g} |" for call, time in record["host"].items()]
    return peers, others


def test_decode_numbers_are_those_of_the_record():
    quoted = tables("### Decode")
    if not DECODE_RECORD.is_file():
        assert quoted == [], "the README quotes speeds that no committed record backs"
        return
    record = json.loads(DECODE_RECORD.read_text())
    rows = decode_rows()
    assert quoted == list(rows), "paste these rows:\n" + "\n\n".join(map("\n".join, rows))
    for peer, line in record["summary"].items():
        assert f"| {peer} | all | {line['geometric_mean']:.2f} | {line['minimum']:.2f} (" in "".join(rows[0])
    assert f"in {sum(cell['section'] == 'grid' for cell in record['cells'])} shapes" in README
    assert record["machine"]["gpu"] in README


def host_rows() -> tuple[list[str], list[str]]:
    """The rows of the README's tables on the host's time: of the front doors, and what the integrations add."""
    compat, integrations = (json.loads(path.read_text()) for path in HOST_RECORDS)

    def us(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    sides = [{row["what"]: row for row in compat["rows"] if row["library"] == name} for name in ("cupy", "torch")]
    doors = []
    for what, ours in sides[0].items():
        theirs = sides[1][what]
        figures = [row[name] for row in (ours, theirs) for name in ("us", "native_us")] + [theirs["flashinfer_us"]]
        doors.append(f"| {what} | {' | '.join(map(us, figures))} |")
    return doors, [f"| {each['what']} | {each['value']:.3g} |" for each in integrations["findings"]]


def test_host_times_are_those_of_the_records():
    rows = host_rows()
    quoted = tables("### What the ways in cost the host")
    assert quoted == list(rows), "paste these:\n" + "\n\n".join(map("\n".join, rows))
    for path in HOST_RECORDS:
        assert json.loads(path.read_text())["machine"]["gpu"] in README


def test_decode_notebook_shows_the_record():
    if not DECODE_RECORD.is_file():
        pytest.skip("there is no record")
    record = json.loads(DECODE_RECORD.read_text())
    notebook = json.loads((ROOT / "notebooks" / "03_decode.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    shown = "".join(line for output in outputs for line in output.get("text", []))
    figures = [f"geometric mean {line['geometric_mean']:.3f}," for line in record["summary"].values()]
    figures += [f"{target['what']}: {target['value']:.3f}," for target in record["targets"]]
    missing = [figure for figure in figures if figure not in shown]
    assert not missing, f"run jupyter execute --inplace notebooks/03_decode.ipynb; it does not show {missing}"
