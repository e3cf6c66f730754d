"""`cupyattn` itself: its version, and help that leaves no option unexplained."""

from __future__ import annotations

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import cupyattn
from cupyattn.cli import app, device


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"cupyattn {cupyattn.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "doctor", "warmup", "bench", "explain"])
def test_every_option_is_explained(command):
    for parameter in get_command(app).commands[command].params:
        assert parameter.help, f"{command} {parameter.name}"


@pytest.mark.parametrize(
    ("version", "hardware", "nothing_to_mend"), [(None, False, True), (None, True, False), (12080, False, False)]
)
def test_why_no_gpu(monkeypatch, version, hardware, nothing_to_mend):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(device, "driver_cuda_version", lambda: version)
    monkeypatch.setattr(device, "nvidia_hardware", lambda: hardware)
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    assert (device.why_no_gpu() == device.NO_GPU) == nothing_to_mend
    assert bool(device.see_doctor(device.why_no_gpu())) != nothing_to_mend
