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


class Interrupted(KeyboardInterrupt):
    """The user ended a measurement of which something is there.

    Attributes:
        samples: of each call, of the rounds that were whole.
    """

    def __init__(self, samples: list[Samples]) -> None:
        """Take what is there."""
        super().__init__()
        self.samples = samples


def _plainly(rounds: Iterable[int]) -> Iterable[int]:
    return rounds


def interleave(
    calls: Sequence[Callable[[int], object]],
    plan: Plan,
    *,
    show: Callable[[Iterable[int]], Iterable[int]] = _plainly,
    on_error: Callable[[int, Exception], None] | None = None,
    wall_ns: Clock = time.perf_counter_ns,
    cpu_ns: Clock = time.process_time_ns,
) -> list[Samples]:
    """Call everything once a round, in an order drawn anew each round; keep every time.

    A fixed order would give each form the same predecessor, and with it that one's caches.

    Args:
        calls: each takes the number of the round, so that all see the same clips in a round.
        plan: how long.
        show: wraps the rounds that count, for a progress bar.
        on_error: is told of a call that fails, by its place; the others go on without it. None
            raises its error.
        wall_ns: the clock.
        cpu_ns: the CPU time of this process.

    Returns:
        Samples of each call, in the order of `calls`; of one that failed, those before.

    Raises:
        Interrupted: by the user, after the first whole round.
    """
    rng = np.random.default_rng(plan.seed)
    wall: list[list[int]] = [[] for _ in calls]
    cpu: list[list[int]] = [[] for _ in calls]
    alive = list(range(len(calls)))

    def failed(i: int, error: Exception) -> None:
        if on_error is None:
            raise error
        alive.remove(i)
        on_error(i, error)

    for number in _rounds(1, plan.warmup_s, wall_ns):
        for i in list(alive):
            try:
                calls[i](number)
            except Exception as e:
                failed(i, e)
    whole = 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in show(_rounds(plan.rounds, plan.duration_s, wall_ns)):
            for i in rng.permutation(alive):
                wall_began, cpu_began = wall_ns(), cpu_ns()
                try:
                    calls[i](number)
                except Exception as e:
                    failed(i, e)
                    continue
                cpu_ended, wall_ended = cpu_ns(), wall_ns()
                wall[i].append(wall_ended - wall_began)
                cpu[i].append(cpu_ended - cpu_began)
            whole += 1
            if not alive:
                break
    except KeyboardInterrupt:
        if not whole:
            raise
        raise Interrupted(
            [Samples(_ms(w[:whole]), _ms(c[:whole])) for w, c in zip(wall, cpu, strict=True)]
        ) from None
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
