"""What caches refuse, by name. A call that raises one of these has changed nothing."""

from __future__ import annotations


class OutOfBlocks(MemoryError):
    """There are fewer blocks than a call needs. `asked`, `free` and `evictable` count blocks."""

    def __init__(self, asked: int, free: int, evictable: int) -> None:
        came = f"{asked} block" + ("" if asked == 1 else "s")
        super().__init__(f"blocks: asked for {came}, but {free} are free and {evictable} could be evicted")
        self.asked, self.free, self.evictable = asked, free, evictable

    def __reduce__(self) -> tuple:
        return type(self), (self.asked, self.free, self.evictable)


class DoubleFree(ValueError):
    """A block or a sequence was given back more often than it was taken."""


class UseAfterFree(LookupError):
    """A block or a sequence is used that was given back."""


class UnknownSequence(LookupError):
    """A sequence id that this cache never gave out."""


class SwappedOut(ValueError):
    """A sequence lies in host memory, where this call cannot use it: `swap_in` brings it back."""


class CacheFull(ValueError):
    """A dense cache has no room for the new tokens of some sequence."""
