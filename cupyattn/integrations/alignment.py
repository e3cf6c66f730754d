"""Masks that other libraries align to the top left corner of the scores, in the bottom-right terms of this one."""

from __future__ import annotations


def from_top_left(seqlen_q: int, seqlen_k: int, left: int, right: int) -> tuple[int, tuple[int, int]]:
    """How many of the keys to attend to, and the window that then means: query i sees keys i - left <= j <= i + right.

    -1 leaves out a side. Keys that no query sees are left out, which moves the bottom-right corner to where a window
    reaches it. Every query must see a key: left is -1, or at least seqlen_q - seqlen_k.
    """
    keys = seqlen_k if right < 0 else min(seqlen_k, seqlen_q + right)
    ahead = keys - seqlen_q  # of the top-left diagonal is the bottom-right one
    return keys, (left if left < 0 else left + ahead, right if right < 0 else right - ahead)
