"""What the sections of benchmarks/gpu.py share: capture, clocks, and what they found."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from figures import Figure

Do = Callable[[], object]
WARM, LAUNCHES = 3, 20  # calls before a capture; launches of one graph


@dataclass
class Found:
    """What one section found."""

    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: replays of a graph that is timed by events.
        calls: calls that are timed by the clock of the host.
        kernels_s: no further layer's kernels are timed after so long.
        watched_s: how long the energy of one form is counted.
        sizes: frames and pixels of the clips.
    """

    rounds: int
    calls: int
    kernels_s: float
    watched_s: float
    sizes: tuple[tuple[int, int], ...]


def captured(call: Do) -> Callable[[], None]:
    """Return a CUDA graph of a call as a call: it ran before, so that all is loaded and chosen.

    On a CPU it is the call itself.
    """
    if not torch.cuda.is_available():
        return lambda: void(call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


def void(call: Do) -> None:
    """Call, and give nothing."""
    call()


def device_us(calls: Sequence[Do], rounds: int) -> float:
    """Return microseconds of one call on the GPU: median of graphs that hold LAUNCHES of them.

    Args:
        calls: the same work on different data, in turn.
        rounds: replays.
    """

    def every() -> None:
        for i in range(LAUNCHES):
            calls[i % len(calls)]()

    replay = captured(every)
    taken = []
    for i in range(WARM + rounds):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        if i >= WARM:
            taken.append(begin.elapsed_time(end) * 1000 / LAUNCHES)
    return statistics.median(taken)


def wall_us(forms: dict[str, Do], rounds: int) -> dict[str, list[float]]:
    """Return microseconds of calls that take turns, each from its start until it is done."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(WARM + rounds):
        for name, call in forms.items():
            begin = time.perf_counter()
            call()
            finish()
            if i >= WARM:
                taken[name].append((time.perf_counter() - begin) * 1e6)
    return taken


def finish() -> None:
    """Wait for the current stream."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Return half of the range that the middle half of the values lies in."""
    if len(values) < 4:
        return (max(values) - min(values)) / 2
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def stream() -> int:
    """Return the handle of the current stream; 0 on a CPU."""
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else 0
