"""What the tests share: backends to run on, seeds that are fresh but can be repeated, and the record of a run.

- `gpu` marks a test that needs a CUDA device and CuPy; where there is none it is skipped.
- A test with an argument `backend` runs once on every backend, or on those that `@pytest.mark.backends(...)` names;
  `@pytest.mark.when(holds=...)` leaves out combinations that would only compile what others cover.
- `rng` is seeded anew in every run. The seed is in the header and beside each failure; CUPYATTN_TEST_SEED repeats it.
- `pytest --record` writes what was run, where and how it went to tests/records/<gpu>.json, `--record=PATH` to PATH.
"""

# ruff: noqa: E402 (two settings must come before the imports that heed them)

from __future__ import annotations

import os

# Matrices here are small: threads would only wait for one another, for very long when other programs want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# JAX takes three quarters of a GPU's memory when it starts, and some tests need much of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import datetime
import hashlib
import importlib.metadata
import json
import platform
import re
import secrets
import shutil
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import oracle
import pytest

ROOT = Path(__file__).parent.parent
SEED_VARIABLE = "CUPYATTN_TEST_SEED"

# Drawing and the oracle take their time; a failing example is printed in a form that can be pasted into the test.
hypothesis.settings.register_profile("cupyattn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("cupyattn")


# ---------------------------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class Placed:
    """An array that is a view of another: tests of strides say here how it lies in memory."""

    base: np.ndarray
    view: Callable[[Any], Any]

    @property
    def array(self) -> np.ndarray:
        return self.view(self.base)


@dataclass(frozen=True)
class Backend:
    """Where a test's calls run. Tests hold NumPy arrays; they are moved there and back here."""

    name: str
    kernel: str  # the `kernel` argument of the public functions

    @property
    def on_gpu(self) -> bool:
        return self.name == "cuda"

    def takes(self, dtype: str) -> bool:
        """Whether the kernel knows this dtype."""
        return not (self.kernel in ("forward_sm90", "forward_sm80") and dtype == "float32")

    def put(self, array: np.ndarray) -> Any:
        """A NumPy array (bfloat16 too) as an array of the backend."""
        return _cupy().asarray(array) if self.on_gpu else array

    def get(self, array: Any) -> np.ndarray:
        return array.get() if self.on_gpu else array

    def place(self, base: np.ndarray, view: Callable[[Any], Any]) -> Placed:
        """An argument for `call` that is view(base), made after base was moved to the backend."""
        return Placed(base, view)

    def call(self, function: str, *arrays: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Run a public function of that name on NumPy and `Placed` arguments. Returns (out, lse) as NumPy arrays.

        The lse is natural unless return_lse says otherwise.
        Outputs are NaN beforehand, so that an element nobody writes is seen.
        """
        import cupyattn

        q, _, v, *_ = map(_plain, arrays)
        out = options.pop("out", None)
        shape = (*q.shape[:-1], v.shape[-1])
        out = self.place(np.full(shape, np.nan, q.dtype), lambda array: array) if out is None else out
        moved: dict[int, Any] = {}
        here = [self._move(value, moved) for value in (*arrays, out)]
        there = {name: self._move(value, moved) for name, value in options.items()}
        try:
            result, lse = getattr(cupyattn, function)(
                *here[:-1], **{"return_lse": True} | there, out=here[-1], kernel=self.kernel
            )
        except ValueError as error:  # forward_sm90 leaves some forms to other kernels
            if self.kernel == "forward_sm90" and str(error).startswith("kernel: got 'forward_sm90'"):
                pytest.skip(str(error))
            raise
        assert result is here[-1], "out= must be what is returned"
        return self.get(result), self.get(lse)

    def agrees(self, function: str, *arrays: Any, **options: Any) -> None:
        """Run a public function here and in the oracle; AssertionError unless they agree within the oracle's bounds."""
        masks = {name: _plain(value) for name, value in options.items() if name not in ("out", "return_lse")}
        expected = getattr(oracle, function)(*(_plain(array) for array in arrays), **masks)
        form = options.get("return_lse", True)
        expected.check(*self.call(function, *arrays, **options), _plain(arrays[0]).dtype.name, form)

    def _move(self, value: Any, moved: dict[int, Any]) -> Any:
        """value on this backend; views of one base stay views of one base."""
        if isinstance(value, Placed):
            if id(value.base) not in moved:
                moved[id(value.base)] = self.put(value.base)
            return value.view(moved[id(value.base)])
        return self.put(value) if isinstance(value, np.ndarray) else value


BACKENDS = {
    "numpy": Backend("numpy", "auto"),
    "cuda": Backend("cuda", "auto"),
    "cuda-sm90": Backend("cuda", "forward_sm90"),
    "cuda-sm80": Backend("cuda", "forward_sm80"),
    "cuda-simt": Backend("cuda", "forward_simt"),
}


def _plain(value: Any) -> Any:
    return value.array if isinstance(value, Placed) else value


def _cupy() -> Any:
    import cupy

    return cupy


@cache
def missing_gpu() -> str:
    """Why there is no CUDA device to test on, or ""."""
    from cupyattn.cli.device import why_no_gpu

    reason = why_no_gpu()
    return f"needs an NVIDIA GPU; {reason}" if reason else ""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device and CuPy; skipped where there is none")
    config.addinivalue_line("markers", "when(holds): drops combinations of parameters unless holds(**parameters)")
    config.addinivalue_line("markers", f"backends(*names): which of {', '.join(BACKENDS)} a test's `backend` runs over")
    os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(2**32)))  # workers of pytest-xdist inherit it
    config.stash[RECORD] = Record()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("backends")
        chosen = {name: BACKENDS[name] for name in (mark.args if mark else BACKENDS)}
        params = [
            pytest.param(backend, id=name, marks=[pytest.mark.gpu] if backend.on_gpu else [])
            for name, backend in chosen.items()
        ]
        metafunc.parametrize("backend", params)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop combinations of parameters that nobody wants; skip what needs a GPU where there is none."""
    senseless = [item for item in items if not _makes_sense(item)]
    if senseless:  # not reported as deselected: nobody left out a test that exists
        left_out = set(senseless)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if item.get_closest_marker("gpu") and missing_gpu():
            item.add_marker(pytest.mark.skip(reason=missing_gpu()))


def _makes_sense(item: pytest.Item) -> bool:
    values = getattr(getattr(item, "callspec", None), "params", {})
    if "backend" in values and "dtype" in values and not values["backend"].takes(values["dtype"]):
        return False
    return all(mark.kwargs["holds"](**values) for mark in item.iter_markers("when"))


# ------------------------------------------------------------------------------------------------------- seeds


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that differ from run to run and from test to test, and repeat with CUPYATTN_TEST_SEED."""
    return np.random.default_rng([int(os.environ[SEED_VARIABLE]), zlib.crc32(request.node.nodeid.encode())])


def pytest_report_header() -> str:
    return f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(("Random seed", f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} repeats this run's data"))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for all that was skipped, instead of one each; `pytest -rs` shows where they are."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in terminalreporter.stats.get("skipped", ())
    )
    if reasons:
        listed = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"{sum(reasons.values())} tests skipped: {listed}")


# ------------------------------------------------------------------------------------------------------ record


@dataclass
class Record:
    """Outcomes of a run as they come in."""

    started: float = field(default_factory=time.monotonic)
    outcomes: Counter = field(default_factory=Counter)
    gpu_outcomes: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


RECORD = pytest.StashKey[Record]()
_config: list[pytest.Config] = []  # pytest_runtest_logreport is not given the config


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        nargs="?",
        const="",
        metavar="PATH",
        help="write a JSON record of this run to PATH, or without a value to tests/records/<gpu>.json",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    _config[:] = [session.config]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    record = _config[0].stash[RECORD]
    if report.failed:
        outcome = "failed"
        record.failures.append(f"{report.nodeid} ({report.when})")
    elif report.skipped or report.when == "call":
        outcome = report.outcome
    else:
        return
    record.outcomes[outcome] += 1
    if "gpu" in report.keywords:
        record.gpu_outcomes[outcome] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--record")
    if path is None or hasattr(session.config, "workerinput"):
        return
    record = session.config.stash[RECORD]
    gpu = _gpu_facts()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu["gpu"].lower()).strip("-") if gpu else "no-gpu"
    target = Path(path) if path else ROOT / "tests" / "records" / f"{slug}.json"
    content = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seconds": round(time.monotonic() - record.started, 1),
        "exit_status": int(exitstatus),
        "tests": {outcome: record.outcomes[outcome] for outcome in ("passed", "failed", "skipped")},
        "gpu_tests": {outcome: record.gpu_outcomes[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": record.failures,
        "seed": int(os.environ[SEED_VARIABLE]),
        "sources_sha256": sources_digest(),
        "cupyattn": _version("cupyattn"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **gpu,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=2) + "\n")


def sources_digest() -> str:
    """sha256 over the paths and contents of the kernels and of the package's Python files, in sorted order."""
    digest = hashlib.sha256()
    files = [*(ROOT / "kernels_cu").rglob("*"), *(ROOT / "cupyattn").rglob("*.py")]
    for file in sorted(file for file in files if file.is_file()):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        import cupyattn

        return getattr(cupyattn, "__version__", "unknown")


def _gpu_facts() -> dict[str, str]:
    """The device that the tests ran on and what drives it; nothing where there is none."""
    if missing_gpu():
        return {}
    from cupy_backends.cuda.libs import nvrtc

    runtime = _cupy().cuda.runtime
    properties = runtime.getDeviceProperties(0)
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "driver": _driver_version(),
        "cuda_runtime": _dotted(runtime.runtimeGetVersion()),
        "nvrtc": ".".join(str(part) for part in nvrtc.getVersion()),
        "cupy": _cupy().__version__,
    }


def _driver_version() -> str:
    """The driver's own version where nvidia-smi can be asked, else the newest CUDA version that it supports."""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        if answer:
            return answer[0]
    return f"CUDA {_dotted(_cupy().cuda.runtime.driverGetVersion())}"


def _dotted(version: int) -> str:
    """CUDA's 12090 as 12.9."""
    return f"{version // 1000}.{version % 1000 // 10}"
