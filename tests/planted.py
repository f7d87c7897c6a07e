"""A clock that only work moves, and a backend whose parts take exactly as long as a test says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vmoe.bundle import Bundle, Part
from vmoe.clips import Clips
from vmoe.runtime.engines import Outputs, Run

MS = 1_000_000


class FakeClock:
    """Time that passes only when somebody works."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns

    def work(self, ms: float) -> None:
        self.ns += round(ms * MS)


class PlantedBackend:
    """Parts that only take time: the router 1 ms, an expert 10 ms, a graph in one file `moe_ms`.

    Attributes:
        ms: of single parts, by their names, instead.
        most: clips that a part takes at once; more fail.
        seen: names of the parts that were run, and how many clips each.
    """

    def __init__(self, clock: FakeClock, bundle: Bundle, moe_ms: float = 0.0, **ms: float) -> None:
        self.clock, self.bundle = clock, bundle
        self.ms = {"router": 1.0, "moe": moe_ms, **ms}
        self.most = 1 << 30
        self.seen: list[tuple[str, int]] = []

    def load(self, part: Part) -> Run:
        name = next(name for name, own in self.bundle.parts.items() if own is part)

        def run(inputs: Mapping[str, Any]) -> Outputs:
            n = len(inputs["clip"])
            if n > self.most:
                raise RuntimeError(f"out of memory\nat {n} clips")
            self.seen.append((name, n))
            self.clock.work(self.ms.get(name, 10.0))
            route = np.full(n, int(inputs.get("force_route", 0)))
            every = {
                "logits": np.zeros((n, len(self.bundle.labels)), np.float32),
                "scores": np.zeros((n, self.bundle.experts), np.float32),
                "route": route,
            }
            return {port.name: every[port.name] for port in part.outputs}

        return run

    def put(self, clips: Clips) -> Clips:
        return clips

    def close(self) -> None:
        pass
