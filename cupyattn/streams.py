"""Work on arrays of several libraries, each of which has a current device and streams of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from .arrays import (
    View,
    current_device,
    current_stream,
    device_name,
    keep_until_done,
    on_device,
    other_stream,
    refuse,
    wait,
)

_UNCHANGED = nullcontext()


def device_of(like: View) -> AbstractContextManager:
    """A context in which like's device is CUDA's current one. An array on the CPU changes nothing."""
    if like.device < 0 or current_device() == like.device:
        return _UNCHANGED
    return on_device(like.device)


def in_order(run: Callable[[int], None], like: View, others: Sequence[View | None]) -> None:
    """run(stream) on the current stream of like's library, in order with the streams of the others' libraries.

    like's device is the current one. On the CPU the stream is 0. Others that are None are passed over.
    """
    if like.device < 0:
        run(0)
        return
    stream, library = current_stream(like), like.library
    try:
        for found in others:
            if found is not None and found.library != library:
                break
        else:
            if library == "cupy" or library == "torch":
                run(stream)
                return
        views = [like, *(found for found in others if found is not None and found is not like)]
        other = other_stream(like, views)
        if other is not None:
            wait(stream, other)
        run(stream)
        if other is not None:
            wait(other, stream)
    except Exception as error:
        refuse_foreign_stream(error, like.device)
        raise
    keep_until_done(views, stream)


def refuse_foreign_stream(error: Exception, device: int) -> None:
    """Say what is wrong where CUDA does not know a stream on this device: it is another device's, or gone."""
    if any(sign in str(error) for sign in ("CUDA_ERROR_INVALID_HANDLE", "cudaErrorInvalidResourceHandle")):
        came = f"a current stream that is not one of {device_name(device)}'s"
        refuse("stream", came, f"a stream that was made on {device_name(device)}, where the arrays are")
