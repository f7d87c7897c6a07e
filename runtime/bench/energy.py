"""Energy of a clip: every form in blocks of some seconds, in turn, beside blocks of doing nothing.

A meter counts all that runs on what it covers, and its readings are 1 to 100 ms apart: a single
call is too short for it. So each form is called again and again for a block of at least
BLOCK_STEPS readings and MIN_BLOCK_S seconds; a turn holds one block of each form and an idle one,
in an order drawn anew; there are TURNS of them. It comes after the rounds that are timed, which it
would disturb. What a form draws above idle is its watts less the idle blocks': with it, what the
rest of the machine draws falls away, as far as that is steady.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .power import Meter

TURNS = 3
MIN_BLOCK_S = 1.0
BLOCK_STEPS = 20


@dataclass(frozen=True)
class Energy:
    """What one form draws; medians over its blocks.

    Attributes:
        joules_per_clip: all that the meters cover.
        low, high: the least and the most of a block.
        joules_per_clip_above_idle: beyond what idling in its time draws; noise may make it
            negative.
        watts: mean of a block.
        watts_above_idle: the same beyond idling.
        clips: how many, all blocks together.
    """

    joules_per_clip: float
    low: float
    high: float
    joules_per_clip_above_idle: float
    watts: float
    watts_above_idle: float
    clips: int


@dataclass(frozen=True)
class Method:
    """How energy was measured, or why it was not.

    Attributes:
        covers: what the meters count; none where energy is not available.
        why_not: of the meters that were tried, why they cannot be read.
        idle_watts: median of the idle blocks; None without a meter.
        block_s: how long a block lasted, at least.
        blocks: how many each form had.
    """

    covers: tuple[str, ...] = ()
    why_not: tuple[str, ...] = ()
    idle_watts: float | None = None
    block_s: float | None = None
    blocks: int = 0


class _Block(NamedTuple):
    joules: float
    seconds: float
    calls: int

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


def block_s(meters: Sequence[Meter]) -> float:
    """Return how long a block lasts: many readings of the slowest meter."""
    return max(MIN_BLOCK_S, BLOCK_STEPS * max(meter.step_s for meter in meters))


def _plainly(turns: Iterable[int]) -> Iterable[int]:
    return turns


def measure(
    calls: Sequence[Callable[[int], object]],
    clips: Sequence[int],
    meters: Sequence[Meter],
    *,
    seconds: float,
    seed: int = 0,
    show: Callable[[Iterable[int]], Iterable[int]] = _plainly,
    now_s: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> tuple[list[Energy], float]:
    """Measure what each form draws.

    Args:
        calls: each takes a number, from 0 on in every block.
        clips: how many one call of each answers.
        meters: at least one; what they cover is added.
        seconds: of a block, at least.
        seed: of the order within a turn.
        show: wraps the turns, for a progress bar.
        now_s: the clock, in seconds.
        sleep: lets time pass in an idle block.

    Returns:
        The energy of each form, and the watts of idling.

    Raises:
        VmoeError: a meter can no longer be read.
    """
    rng = np.random.default_rng(seed)
    blocks: list[list[_Block]] = [[] for _ in (*calls, sleep)]

    def joules() -> float:
        return sum(meter.joules() for meter in meters)

    for _ in show(range(TURNS)):
        for i in rng.permutation(len(blocks)):
            call = calls[i] if i < len(calls) else None
            if call is not None:
                call(0)  # what it finds cold is not its block's
            count, began_j, began_s = 0, joules(), now_s()
            while (passed := now_s() - began_s) < seconds or not passed:
                if call is None:
                    sleep(seconds)
                else:
                    call(count)
                count += 1
            blocks[i].append(_Block(joules() - began_j, passed, count))
    idle = float(np.median([block.watts for block in blocks[-1]]))
    found = zip(blocks, clips, strict=False)  # the last is idling
    return [_energy(of_form, per_call, idle) for of_form, per_call in found], idle


def _energy(blocks: Sequence[_Block], clips: int, idle_watts: float) -> Energy:
    each = [block.joules / (block.calls * clips) for block in blocks]
    above = [(b.joules - idle_watts * b.seconds) / (b.calls * clips) for b in blocks]
    watts = float(np.median([block.watts for block in blocks]))
    return Energy(
        joules_per_clip=float(np.median(each)),
        low=min(each),
        high=max(each),
        joules_per_clip_above_idle=float(np.median(above)),
        watts=watts,
        watts_above_idle=watts - idle_watts,
        clips=clips * sum(block.calls for block in blocks),
    )


def line(method: Method) -> str:
    """Return in one line how energy was measured, or why it is not available."""
    if not method.covers:
        why = " ".join(method.why_not) or "not asked for (--power none)"
        return f"energy: not available: {why}"
    lacks = f" Not counted: {' '.join(method.why_not)}" if method.why_not else ""
    return (
        f"energy: {' + '.join(method.covers)}; {method.blocks} blocks of {method.block_s:g} s of "
        f"each form, in turn; idle {method.idle_watts:.4g} W. It counts all that runs there.{lacks}"
    )
