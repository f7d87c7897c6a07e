"""Channel widths."""

from __future__ import annotations


def channels(full: int, width: float) -> int:
    """Return a share of a channel count, rounded to a multiple of 16: fast layouts need it.

    Below 16 there is 8, for models that must be small before all.
    """
    share = full * width
    return 8 if share < 12 else max(16, round(share / 16) * 16)
