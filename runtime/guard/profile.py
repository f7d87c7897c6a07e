"""A profile: how the guard's terms are distributed on clean video, and its threshold.

    strangeness of a term x   -ln p, p = (1 + clean values >= x) / (1 + clean values); beyond u,
                              which 0.05 of the clean values exceed, -ln p(u) + (x - u) / b, b the
                              mean of what those exceed it by (an exponential tail)
    score                     the sum over the terms
    threshold                 exceeded by at most the stated share of clean windows

Half of the clean windows gives the distributions, the other half the threshold: the smallest score
that is at least as large as ceil((n + 1)(1 - share)) of its n scores (split conformal prediction:
Vovk, Gammerman, Shafer, 2005). The promise is exact where windows are exchangeable; overlapping
windows of one stream nearly repeat each other, so that many different scenes count, not many
windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vmoe import output
from vmoe.bundle import Bundle
from vmoe.errors import SettingError

from .terms import AGE, ENOUGH, FILTERS, NAMES, NEWEST, Floats, change, histogram

SCHEMA = 2
FILE = "guard.json"  # in a bundle's folder: the profile that is taken where none is named
LEVELS = 256  # quantiles that are kept of each term
TAIL = 0.95  # level from which clean values are taken to fall off exponentially
LEAST = 0.01  # of b: terms lie in [0, 1], and smaller differences say nothing
LATE = 10.0  # strangeness of a label that is older than its window is long, and more


@dataclass(frozen=True)
class Profile:
    """What a guard knows of clean video.

    Attributes:
        twin: sha256 of the twin whose bundle was calibrated.
        hop_s: time between two windows, in seconds.
        filter: off, median, jpeg or bilateral.
        false_alarms: the share of clean windows that may raise an alarm.
        windows: how many clean windows stand behind it.
        threshold: a score above is an alarm.
        histogram: share of each expert among the clean windows, [M].
        quantiles: of each term, rising, LEVELS + 1 of them.
        counts: how many clean values of each term.
    """

    twin: str
    hop_s: float
    filter: str
    false_alarms: float
    windows: int
    threshold: float
    histogram: Floats
    quantiles: dict[str, Floats]
    counts: dict[str, int]

    def strangeness(self, terms: dict[str, float]) -> dict[str, float]:
        """Return -ln p of each term that the profile knows, and of a label that is late."""
        parts = {
            name: _strangeness(self.quantiles[name], self.counts[name], value)
            for name, value in terms.items()
            if name in self.quantiles
        }
        if AGE in terms:
            parts[AGE] = LATE + terms[AGE]
        return parts

    def check(self, bundle: Bundle, hop_s: float) -> None:
        """Refuse another model, or windows of another pace.

        Raises:
            SettingError: the profile is of another twin or hop.
        """
        if self.twin != str(bundle.twin.get("sha256")):
            raise SettingError(
                f"the guard's profile is of another model ({self.twin[:12]}). Calibrate this one: "
                "vmoe-run BUNDLE --source CLEAN --guard-calibrate FILE."
            )
        if abs(self.hop_s - hop_s) > 0.01 * hop_s:
            raise SettingError(
                f"the guard's profile is for --hop {self.hop_s:g}, not {hop_s:g}. Use that hop, or "
                "calibrate again."
            )


def tail(quantiles: Floats) -> tuple[float, float]:
    """Return u and b: where the tail of clean values begins, and its scale."""
    beyond = quantiles[round(TAIL * (len(quantiles) - 1)) :]
    return float(beyond[0]), max(LEAST, float((beyond - beyond[0]).mean()))


def _strangeness(quantiles: Floats, count: int, value: float) -> float:
    start, scale = tail(quantiles)
    beyond = max(0.0, value - start) / scale
    return beyond - math.log(_tail(quantiles, count, min(value, start)))


def _tail(quantiles: Floats, count: int, value: float) -> float:
    """Return how often clean values are at least so large; never 0."""
    level = float(np.interp(value, quantiles, np.linspace(0, 1, len(quantiles))))
    if value <= quantiles[0]:
        level = 0.0
    return (1 + (1 - level) * count) / (1 + count)


def make(
    streams: Sequence[Sequence[tuple[dict[str, float], int]]],
    *,
    experts: int,
    twin: str,
    hop_s: float,
    filter: str,
    false_alarms: float,
) -> Profile:
    """Make a profile of clean windows.

    Args:
        streams: for each stream its windows in order: the terms, without drift, and the route.
        experts: M.
        twin: sha256 of the twin.
        hop_s: time between two windows, in seconds.
        filter: what the clips of `filter_change` went through.
        false_alarms: the share of clean windows that may raise an alarm, in (0, 1).

    Raises:
        SettingError: too few windows for such a rate.
    """
    routes = [route for stream in streams for _, route in stream]
    clean = histogram(routes, experts)
    windows = [terms for stream in streams for terms in _with_drift(stream, clean, experts)]
    needed = 2 * math.ceil(1 / false_alarms)
    if len(windows) < needed:
        raise SettingError(
            f"{len(windows)} clean windows cannot tell a false-alarm rate of {false_alarms:g}; it "
            f"takes {needed}. Give longer or more sources, or a higher --false-alarms."
        )
    known, judged = windows[::2], windows[1::2]
    quantiles, counts = {}, {}
    for name in NAMES:
        values = np.array([terms[name] for terms in known if name in terms])
        if len(values):
            quantiles[name] = np.quantile(values, np.linspace(0, 1, LEVELS + 1))
            counts[name] = len(values)
    profile = Profile(
        twin, hop_s, filter, false_alarms, len(windows), 0.0, clean, quantiles, counts
    )
    scores = np.sort([sum(profile.strangeness(terms).values()) for terms in judged])
    rank = min(len(scores), math.ceil((len(scores) + 1) * (1 - false_alarms)))
    return Profile(**{**vars(profile), "threshold": float(scores[rank - 1])})


def _with_drift(
    stream: Sequence[tuple[dict[str, float], int]], clean: Floats, experts: int
) -> list[dict[str, float]]:
    """Return a stream's terms with the drift of its routes, and without its labels' ages."""
    found, routes = [], [route for _, route in stream]
    for i, (terms, _) in enumerate(stream):
        terms = {name: value for name, value in terms.items() if name != AGE}
        newest = routes[max(0, i + 1 - NEWEST) : i + 1]
        if len(newest) >= ENOUGH and experts > 1:
            terms["route_drift"] = change(histogram(newest, experts), clean)
        found.append(terms)
    return found


def write(profile: Profile, path: Path) -> None:
    """Write a profile whole, as JSON."""
    value: dict[str, Any] = {"schema_version": SCHEMA, **vars(profile)}
    value["histogram"] = profile.histogram.tolist()
    value["quantiles"] = {name: q.tolist() for name, q in profile.quantiles.items()}
    output.write_text(path, json.dumps(value, indent=1) + "\n")


def read(path: Path) -> Profile:
    """Read a profile.

    Raises:
        SettingError: there is none, or it is damaged.
    """
    try:
        value = json.loads(path.read_text())
        if value.pop("schema_version") != SCHEMA:
            raise SettingError(f"{path} is of another version; this one reads {SCHEMA}.")
        value["histogram"] = np.array(value["histogram"], np.float64)
        value["quantiles"] = {
            str(name): np.array(q, np.float64) for name, q in value["quantiles"].items()
        }
        profile = Profile(**value)
        if profile.filter not in FILTERS or not set(profile.quantiles) <= set(profile.counts):
            raise ValueError("unknown filter or term")
    except OSError as e:
        raise SettingError(
            f"cannot read the guard's profile {path}: {e.strerror}. Make one: vmoe-run BUNDLE "
            "--source CLEAN --guard-calibrate FILE."
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SettingError(
            f"{path} is no guard's profile, or damaged. Make one: vmoe-run BUNDLE --source CLEAN "
            "--guard-calibrate FILE."
        ) from e
    return profile
