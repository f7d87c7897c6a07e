"""Measuring: every form once a round, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .statistics import Times

Clock = Callable[[], int]  # nanoseconds


class Samples(NamedTuple):
    """What one form took, in the order of the rounds.

    Attributes:
        wall_ms: on the clock, [n].
        cpu_ms: of all threads of this process, [n].
    """

    wall_ms: Times
    cpu_ms: Times


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: at least so many.
        duration_s: at least so long, all forms together.
        warmup_s: rounds before the first that counts; at least one.
        seed: of the order within a round.
    """

    rounds: int
    duration_s: float = 0.0
    warmup_s: float = 0.0
    seed: int = 0


def _plainly(rounds: Iterable[int]) -> Iterable[int]:
    return rounds


def interleave(
    calls: Sequence[Callable[[int], object]],
    plan: Plan,
    *,
    show: Callable[[Iterable[int]], Iterable[int]] = _plainly,
    wall_ns: Clock = time.perf_counter_ns,
    cpu_ns: Clock = time.process_time_ns,
) -> list[Samples]:
    """Call everything once a round, in an order drawn anew each round; keep every time.

    A fixed order would give each form the same predecessor, and with it that one's caches.

    Args:
        calls: each takes the number of the round, so that all see the same clips in a round.
        plan: how long.
        show: wraps the rounds that count, for a progress bar.
        wall_ns: the clock.
        cpu_ns: the CPU time of this process.

    Returns:
        Samples of each call, in the order of `calls`.
    """
    rng = np.random.default_rng(plan.seed)
    wall: list[list[int]] = [[] for _ in calls]
    cpu: list[list[int]] = [[] for _ in calls]
    for number in _rounds(1, plan.warmup_s, wall_ns):
        for call in calls:
            call(number)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in show(_rounds(plan.rounds, plan.duration_s, wall_ns)):
            for i in rng.permutation(len(calls)):
                wall_began, cpu_began = wall_ns(), cpu_ns()
                calls[i](number)
                cpu_ended, wall_ended = cpu_ns(), wall_ns()
                wall[i].append(wall_ended - wall_began)
                cpu[i].append(cpu_ended - cpu_began)
    finally:
        if collecting:
            gc.enable()
    return [Samples(_ms(w), _ms(c)) for w, c in zip(wall, cpu, strict=True)]


def _rounds(least: int, duration_s: float, wall_ns: Clock) -> Iterator[int]:
    began, number = wall_ns(), 0
    while number < least or wall_ns() - began < duration_s * 1e9:
        yield number
        number += 1


def _ms(times_ns: list[int]) -> Times:
    return np.asarray(times_ns, dtype=np.float64) / 1e6
