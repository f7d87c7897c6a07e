"""CPU threads, shared out so that decoding, the engine and the sinks do not fight.

Every source is decoded by one thread of its own (vmoe.opencv.ffmpeg asks for one), and OpenCV's
own pool is turned off: what it would speed up here (small resizes) takes microseconds, and its
threads would spin beside the engine's. The engine gets the cores that decoding leaves, at least
half of them: more threads than cores make every stage wait for all others.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from vmoe import opencv

STREAMS_A_CORE = 4  # of ordinary cameras: decoding one at 25 fps takes 5 to 15 % of a core


class Plan(NamedTuple):
    """Threads of the engine's runs, and of OpenCV's pool."""

    engine: int
    opencv: int


def plan(streams: int, asked: int | None = None, cores: int | None = None) -> Plan:
    """Return how many threads each gets.

    Args:
        streams: how many sources are decoded.
        asked: threads of the engine, where the user says.
        cores: that this process may use; None looks.
    """
    cores = cores or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    decoding = -(-streams // STREAMS_A_CORE)
    return Plan(asked or max(1, cores - decoding, cores // 2), 1)


def apply(plan: Plan) -> None:
    """Set what holds for the whole process."""
    opencv.quiet().setNumThreads(plan.opencv)
