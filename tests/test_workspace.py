"""Which launches share a workspace: those of one stream, or of one capture. Streams are told apart without a GPU."""

import ctypes
import threading
from types import SimpleNamespace

import pytest

from cupyattn.kernels import workspace

NUMBERS = {0x10: 7, 0x20: 8}  # of streams, by handle
CAPTURES = {0x20: 31}


@pytest.fixture
def streams(monkeypatch):
    """A driver that knows two streams, of which the second is being captured and may not be asked for its number."""

    def number(stream, out):
        assert stream.value not in CAPTURES, "asked for the number of a captured stream"
        if stream.value not in NUMBERS:
            return 400
        ctypes.cast(out, ctypes.POINTER(ctypes.c_uint64))[0] = NUMBERS[stream.value]
        return 0

    def capture(stream, status, out, *_):
        ctypes.cast(status, ctypes.POINTER(ctypes.c_int))[0] = workspace._CAPTURING
        ctypes.cast(out, ctypes.POINTER(ctypes.c_uint64))[0] = CAPTURES[stream.value]
        return 0

    driver = SimpleNamespace(cuStreamGetId=number, cuStreamGetCaptureInfo_v2=capture)
    monkeypatch.setattr(workspace, "driver", lambda: driver)
    monkeypatch.setattr(workspace, "_is_capturing", lambda: lambda stream: stream in CAPTURES)


def test_a_stream_is_known_by_its_number(streams, monkeypatch):
    first = workspace._identity(0x10)
    assert first == workspace._identity(0x10)
    monkeypatch.setitem(NUMBERS, 0x10, 9)  # destroyed, and its handle given to another
    assert workspace._identity(0x10) != first
    with pytest.raises(RuntimeError, match="stream: got one that the driver does not know"):
        workspace._identity(0x99)


def test_a_capture_has_a_workspace_of_its_own(streams, monkeypatch):
    first = workspace._identity(0x20)
    monkeypatch.setitem(CAPTURES, 0x20, 32)
    assert workspace._identity(0x20) != first
    monkeypatch.delitem(CAPTURES, 0x20)
    assert workspace._identity(0x20) not in (first, ("capture", 32))


def test_each_thread_has_its_own_default_stream(streams):
    found = {workspace._identity(workspace._PER_THREAD)}
    thread = threading.Thread(target=lambda: found.add(workspace._identity(workspace._PER_THREAD)))
    thread.start()
    thread.join()
    assert len(found) == 2
    assert workspace._identity(0) == workspace._identity(0)
