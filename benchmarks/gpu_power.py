"""Energy of a clip on a GPU, by the counter of the card itself (NVML, millijoules)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from figures import Figure
from gpu_routing import BUCKETS, Routed, others
from gpu_timing import Effort, Found, finish

from vmoe import report
from vmoe.clips import ClipSpec
from vmoe.models import ModelSettings, build, dense_counterpart
from vmoe.runtime.bench.subjects import random_clips


class Counter:
    """The card's energy since it was loaded its driver, in joules."""

    def __init__(self, index: int = 0) -> None:
        """Open NVML."""
        import pynvml

        pynvml.nvmlInit()
        self._nvml = pynvml
        self._card = pynvml.nvmlDeviceGetHandleByIndex(index)

    def joules(self) -> float:
        """Return the counter; it moves every 20 to 100 ms."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card)) / 1000

    def state(self) -> dict[str, Any]:
        """Return what the card says of itself; what it does not say is left out."""
        nvml, card = self._nvml, self._card
        asked: dict[str, Callable[[], Any]] = {
            "driver": nvml.nvmlSystemGetDriverVersion,
            "sm_mhz": partial(nvml.nvmlDeviceGetClockInfo, card, nvml.NVML_CLOCK_SM),
            "memory_mhz": partial(nvml.nvmlDeviceGetClockInfo, card, nvml.NVML_CLOCK_MEM),
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(card) / 1000,
            "limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000,
            "celsius": partial(nvml.nvmlDeviceGetTemperature, card, nvml.NVML_TEMPERATURE_GPU),
        }
        said = {}
        for name, ask in asked.items():
            try:
                value = ask()
            except nvml.NVMLError:
                continue
            said[name] = value.decode() if isinstance(value, bytes) else value
        return said


def measure(device: str, effort: Effort) -> Found:
    """Count the energy of sparse and dense forms, beside that of doing nothing."""
    found = Found()
    counter = Counter()
    frames, pixels = effort.sizes[-1]
    spec = ClipSpec(frames=frames, height=pixels, width=pixels)
    twin = build(ModelSettings(experts=4), spec).eval().to(device)
    wide = build(dense_counterpart(twin.settings), spec).eval().to(device)
    clips = torch.from_numpy(random_clips(spec, 8, seed=0)).to(device)
    begin = counter.joules()
    time.sleep(effort.watched_s)
    idle = (counter.joules() - begin) / effort.watched_s
    rows: list[list[Any]] = [["nothing", None, None, idle, None, None]]
    spent: dict[str, float] = {}
    for n in (1, 8):
        routed = Routed(twin, clips[:n], BUCKETS if n > 1 else (1,))
        routed.steer([i % 4 for i in range(n)])
        finish()
        forms: dict[str, Callable[[], object]] = {
            "host routing": routed.grouped if n > 1 else routed.one
        }
        forms |= others(twin, wide, clips[:n])
        forms.pop("torch's forward of the twin")
        for name, call in forms.items():
            calls, seconds, joules = _watch(counter, call, effort.watched_s)
            spent[f"{name} {n}"] = joules / (calls * n)
            rows.append([name, n, calls, joules / seconds, 1e3 * joules / (calls * n),
                         1e3 * (joules - idle * seconds) / (calls * n)])  # fmt: skip
    columns = ["form", "N", "calls", "watts", "mJ a clip", "mJ a clip, without idling"]
    title = f"Energy by NVML, clips {frames}x{pixels}x{pixels}, fp32 (TF32)"
    found.tables[title] = report.table(rows, columns)
    found.measured |= {"rows": rows, "card": counter.state()}
    for n in (1, 8):
        value = spent[f"dense counterpart, one graph {n}"] / spent[f"host routing {n}"]
        name = f"energy_dense_vs_sparse_b{n}"
        more = {"mj_a_clip_sparse": 1e3 * spent[f"host routing {n}"]}
        found.figures.append(Figure(name, value, "ratio", 1, "higher", more=more))
    return found


def _watch(
    counter: Counter, call: Callable[[], object], seconds: float
) -> tuple[int, float, float]:
    """Call for some seconds; return how often, how long and the joules."""
    for _ in range(20):
        call()
    finish()
    calls, start, before = 0, time.perf_counter(), counter.joules()
    while (taken := time.perf_counter() - start) < seconds:
        call()
        finish()
        calls += 1
    return calls, taken, counter.joules() - before
