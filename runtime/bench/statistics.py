"""What samples say: percentiles, spread, and ratios of what was measured in the same rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]  # one value for each round, in ms
LEVEL = 0.95
BLOCKS, LEAST = 12, 6  # stretches of a run; calls below which nothing is said of them


@dataclass(frozen=True)
class Summary:
    """One form's times.

    Attributes:
        n: how many calls.
        min, max, mean, median: in ms.
        percentiles: in ms, by the percentile's name: "50", "99.9".
        cv: coefficient of variation: deviation over mean; 0 of a single call.
        low, high: least and greatest median of a stretch (`spread`); None below 6 calls.
    """

    n: int
    min: float
    max: float
    mean: float
    median: float
    percentiles: dict[str, float]
    cv: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Ratio:
    """One form's time over the sum of others'.

    Attributes:
        medians: ratio of the medians.
        minima: ratio of the minima: what is left when nothing else runs on the machine.
        low, high: 95 % interval of the median of the rounds' own ratios; None below 6 rounds.
    """

    medians: float
    minima: float
    low: float | None
    high: float | None


def summarise(times: Times, percentiles: Sequence[float] = (50, 90, 95, 99)) -> Summary:
    """Summarise times in ms, at least one; percentiles between two samples are interpolated."""
    mean = float(times.mean())
    deviation = float(times.std(ddof=1)) if len(times) > 1 else 0.0
    low, high = spread(times)
    return Summary(
        n=len(times),
        min=float(times.min()),
        max=float(times.max()),
        mean=mean,
        median=float(np.median(times)),
        percentiles={f"{p:g}": float(np.percentile(times, p)) for p in percentiles},
        cv=deviation / mean if mean > 0 else 0.0,
        low=low,
        high=high,
    )


def spread(times: Times) -> tuple[float | None, float | None]:
    """Return how far a run's median moves meanwhile, of calls in order; (None, None) below 6.

    Calls that follow each other share what happens to the machine, so that each is no evidence of
    its own, and an interval of the median that takes them for that is too narrow to hold the next
    run's. The ends are the least and the greatest median of BLOCKS stretches of the run: were
    stretches alike, the next would lie between them in 11 of 13 cases.
    """
    if len(times) < LEAST:
        return None, None
    medians = _by_stretches(times)
    return float(medians.min()), float(medians.max())


def _by_stretches(times: Times) -> Times:
    """Return the medians of up to BLOCKS stretches of a run."""
    stretches = np.array_split(times, min(BLOCKS, len(times)))
    return np.array([np.median(stretch) for stretch in stretches])


def ratio(over: Times, *under: Times) -> Ratio:
    """Compare a form with the sum of others that were called in the same rounds.

    medians = median(over) / sum median(under); minima likewise. The interval is of the rounds'
    own ratios: what slows a whole round (another process, a clock that drops) leaves them alone.

    Args:
        over: times in ms, [n].
        under: times of the others in the same rounds, each [n].
    """
    low, high = median_interval(over / np.sum(under, axis=0))
    return Ratio(
        medians=float(np.median(over) / sum(np.median(times) for times in under)),
        minima=float(over.min() / sum(times.min() for times in under)),
        low=low,
        high=high,
    )


@dataclass(frozen=True)
class Drift:
    """How the second half of a run compares with the first.

    Attributes:
        ratio: of the halves' median slowness; 1.1 is 10 % slower at the end.
        sure: the 95 % intervals of the halves' medians, by stretches, lie apart.
    """

    ratio: float
    sure: bool


def drift(forms: Sequence[Times]) -> Drift | None:
    """Compare the halves of a run by all forms together; None of fewer than 12 rounds.

    A round's slowness is the geometric mean, over the forms, of the form's time in this round over
    its median: one call that was disturbed hardly moves it.

    Args:
        forms: times in ms of the same rounds, each [n].
    """
    if not forms or len(forms[0]) < 12:
        return None
    logs = [np.log(np.maximum(times, 1e-9) / max(float(np.median(times)), 1e-9)) for times in forms]
    slowness = np.exp(np.mean(logs, axis=0))
    first, second = np.array_split(slowness, 2)
    (low1, high1), (low2, high2) = (median_interval(_by_stretches(h)) for h in (first, second))
    apart = None not in (low1, low2) and bool(low2 > high1 or low1 > high2)  # type: ignore[operator]
    return Drift(float(np.median(second) / np.median(first)), apart)


def median_interval(values: Times) -> tuple[float | None, float | None]:
    """Return a 95 % interval of the median, by the sign test; (None, None) of fewer than 6 values.

    With k the largest count for which P(Binomial(n, 1/2) < k) <= 2.5 %, the k-th smallest and
    the k-th largest value enclose the median, whatever the values' distribution.

    Source: Conover, "Practical Nonparametric Statistics", the interval for a quantile.
    """
    n = len(values)
    log_half, tail, k = n * math.log(0.5), 0.0, 0
    while k <= n // 2:
        choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        tail += math.exp(choose + log_half)
        if tail > (1 - LEVEL) / 2:
            break
        k += 1
    if k == 0:
        return None, None
    ordered = np.sort(values)
    return float(ordered[k - 1]), float(ordered[n - k])
