"""Measuring: every form once a round, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .statistics import Times

DRAWN = 256  # orders of rounds, at once
Clock = Callable[[], int]  # nanoseconds
Call = Callable[[int], object]  # takes the number of a round
OnError = Callable[[int, Exception], None]


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


@dataclass(frozen=True)
class Took:
    """What a call answers that measured itself: its time stands in the place of the clock's."""

    ms: float


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
    calls: Sequence[Call],
    plan: Plan,
    *,
    show: Callable[[Iterable[int]], Iterable[int]] = _plainly,
    on_error: OnError | None = None,
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
            lets its error end the measurement.
        wall_ns: the clock.
        cpu_ns: the CPU time of this process.

    Returns:
        Samples of each call, in the order of `calls`; of one that failed, those before.

    Raises:
        Interrupted: by the user, after the first whole round.
    """
    taker = _Taker(calls, on_error, wall_ns, cpu_ns)
    orders = _orders(len(calls), plan.seed)
    for number in _rounds(1, plan.warmup_s, wall_ns):
        taker.round(range(len(calls)), number)
    taker.drop()
    collecting = gc.isenabled()
    gc.disable()  # it would stop some call in the middle
    whole = 0
    try:
        for number in show(_rounds(plan.rounds, plan.duration_s, wall_ns)):
            taker.round(next(orders), number)
            whole += 1
            if not taker.alive:
                break
    except KeyboardInterrupt:
        if not whole:
            raise
        raise Interrupted(taker.samples(whole)) from None
    finally:
        if collecting:
            gc.enable()
    return taker.samples(whole)


class _Taker:
    """Calls that are alive, and the times that they took."""

    def __init__(
        self, calls: Sequence[Call], on_error: OnError | None, wall_ns: Clock, cpu_ns: Clock
    ) -> None:
        self._calls, self._on_error = calls, on_error
        self._wall_ns, self._cpu_ns = wall_ns, cpu_ns
        self.alive = set(range(len(calls)))
        self.drop()

    def drop(self) -> None:
        """Forget the times so far: they were the warm-up's."""
        self._wall: list[list[float]] = [[] for _ in self._calls]
        self._cpu: list[list[float]] = [[] for _ in self._calls]

    def round(self, order: Iterable[int], number: int) -> None:
        """Make a call of each that is alive, by their places."""
        wall_ns, cpu_ns = self._wall_ns, self._cpu_ns
        for i in order:
            if i not in self.alive:
                continue
            call = self._calls[i]
            try:
                cpu_began, wall_began = cpu_ns(), wall_ns()
                answer = call(number)
                wall_ended, cpu_ended = wall_ns(), cpu_ns()  # the latency holds no other clock
            except Exception as e:
                if self._on_error is None:
                    raise
                self.alive.remove(i)
                self._on_error(i, e)
                continue
            took = answer.ms * 1e6 if isinstance(answer, Took) else wall_ended - wall_began
            self._wall[i].append(took)
            self._cpu[i].append(cpu_ended - cpu_began)

    def samples(self, whole: int) -> list[Samples]:
        """Return the times of the rounds that were whole."""
        return [
            Samples(_ms(wall[:whole]), _ms(cpu[:whole]))
            for wall, cpu in zip(self._wall, self._cpu, strict=True)
        ]


def _orders(n: int, seed: int) -> Iterator[list[int]]:
    """Yield an order of n calls for each round, without end.

    Many are drawn at once: numpy's code has left the caches when a call returns, and a draw takes
    30 us there, of the 2 ms of the shipped model.
    """
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permuted(np.tile(np.arange(n), (DRAWN, 1)), axis=1).tolist()


def _rounds(least: int, duration_s: float, wall_ns: Clock) -> Iterator[int]:
    began, number = wall_ns(), 0
    while number < least or wall_ns() - began < duration_s * 1e9:
        yield number
        number += 1


def _ms(times_ns: Sequence[float]) -> Times:
    return np.asarray(times_ns, dtype=np.float64) / 1e6
