"""What one clip costs on each backend: by this, `auto` chooses among those that were verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from vmoe.bundle import Bundle
from vmoe.clips import Clips
from vmoe.runtime import Engine, load
from vmoe.runtime.bench.measuring import Plan, interleave
from vmoe.runtime.online import is_online

ROUNDS = 10  # at least
SECONDS = 0.3  # of measuring, for each backend


def measure(
    bundle: Bundle, backends: Iterable[str], device: str, clip: Clips
) -> dict[str, dict[str, Any]]:
    """Measure one clip on each backend, in turn, on one thread; of an online bundle one frame.

    What disturbs a machine only adds to a time, so that the least counts. On the CPU it is CPU
    time: that of one thread that nothing interrupts is its latency, and other processes do not
    enter it. With more threads it would be their sum.

    Args:
        bundle: as written.
        backends: names of those that run it.
        device: cpu or cuda:N.
        clip: uint8 [1, T, H, W, 3].

    Returns:
        For report.json, of each backend `latency_ms` and the `device`.
    """
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(load(bundle, name, device, threads=1)) for name in backends
        }
        plan = Plan(ROUNDS, SECONDS * len(engines))
        took = interleave([_call(engine, clip) for engine in engines.values()], plan)
    on_cpu = device == "cpu"
    return {
        name: {
            "device": device,
            "latency_ms": float((times.cpu_ms if on_cpu else times.wall_ms).min()),
        }
        for name, times in zip(engines, took, strict=True)
    }


def _call(engine: Engine, clip: Clips) -> Callable[[int], object]:
    if not is_online(engine.bundle):
        return lambda _: engine.infer(clip)
    _, states = engine.follow(0, clip)
    return lambda _: engine.follow(0, clip[:, -1:], states)  # what a stream asks of it
