"""Which split a file falls into where nobody has sorted it: drawn from a hash of its group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vmoe.errors import SettingError

SHARES = (0.7, 0.85)  # up to here train, then val, then test
HELD_OUT = 0.15  # of an official train list, for validation


def share_of(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) / 2**32


def split_of(group: str) -> str:
    """Return train, val or test; the same group always falls into the same."""
    share = share_of(group)
    return "train" if share < SHARES[0] else "val" if share < SHARES[1] else "test"


def in_drawn_order(paths: Iterable[Path]) -> list[Path]:
    """Return files in an order that is drawn from their names."""
    return sorted(paths, key=lambda path: (share_of(path.name), path))


def held_out(label: str, groups: Iterable[str]) -> set[str]:
    """Return the groups of a class that validate, where official lists know train and test alone.

    About 15 % of its groups, at least one; which, a hash of their names decides.

    Raises:
        SettingError: the class has one group, so that nothing would be left to train on.
    """
    ranked = sorted(set(groups), key=lambda group: (share_of(f"{label}/{group}"), group))
    if len(ranked) == 1:
        raise SettingError(
            f"all training videos of class {label!r} are of one group, {ranked[0]!r}: none can be "
            "held out for validation. Add videos of others."
        )
    return set(ranked[: max(1, round(HELD_OUT * len(ranked)))])
