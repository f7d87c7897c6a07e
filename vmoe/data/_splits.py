"""Which split a file falls into where nobody has sorted it: drawn from a hash of its group."""

from __future__ import annotations

import hashlib

SHARES = (0.7, 0.85)  # up to here train, then val, then test


def share_of(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def split_of(group: str) -> str:
    """Return train, val or test; the same group always falls into the same."""
    share = share_of(group)
    return "train" if share < SHARES[0] else "val" if share < SHARES[1] else "test"
