"""The figures of time in benchmarks/export.py: forms take turns, and are ratios of each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from export_forms import GEMM, Call, Case
from figures import Figure
from onnx import ModelProto

from vmoe.export import costs


class Times(NamedTuple):
    """Seconds of the calls of one form."""

    cpu: list[float]
    wall: list[float]


Measured = dict[str, Times]


def measure(calls: dict[str, Call], rounds: int) -> Measured:
    """Time calls that take turns, after one that is not counted."""
    found = {name: Times([], []) for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            found[name].cpu.append(time.process_time() - cpu)
            found[name].wall.append(time.perf_counter() - wall)
    return found


def figures(case: Case, one: Measured, all_: Measured) -> list[Figure]:
    """Return the figures of time.

    Args:
        case: what was measured.
        one: its times on one thread.
        all_: on all cores; empty where there is but one.
    """

    def compare(name: str, reach: float, above: list[str], under: list[str],
                better: str = "higher", share: float = 1) -> Figure:  # fmt: skip
        return ratio(case.prefix + name, reach, above, under, one, all_, better, share)

    moe, naive, lowered = ["split, one clip"], ["naive expert"], ["lowered expert"]
    parts = ["router", "lowered expert"]
    return [
        compare("fp32_lowered_vs_naive", 2.6, naive, lowered),
        compare("fp32_lowered_vs_openvino", 1.15, ["OpenVINO expert"], lowered),
        compare("int8_vs_naive", 5.3, naive, ["int8 expert"]),
        compare("int8_openvino_vs_naive", 7.5, naive, ["OpenVINO int8 expert"]),
        compare("moe_vs_parts_b1", 1.06, moe, parts, "lower"),
        compare("moe_if_vs_parts_b1", 1.06, ["if, one clip"], parts, "lower"),
        compare("batch8_per_clip_vs_b1", 1.05, ["split, eight clips"], moe, "lower", 1 / 8),
        compare("moe_vs_dense_naive", 7.5, ["naive dense"], moe),
        compare("moe_vs_dense_same_lowering", 3.2, ["lowered dense"], moe),
        compare("moe_vs_all_then_mask", 10, ["all experts, then mask"], moe),
        share_of_peak(case, "sgemm_executed", case.lowered.experts[0], 0.95, one),
        share_of_peak(case, "sgemm_nominal", case.plain.experts[0], 1.4, one),
    ]


def ratio(
    name: str, reach: float, above: Sequence[str], under: Sequence[str], one: Measured,
    all_: Measured, better: str = "higher", share: float = 1,
) -> Figure:  # fmt: skip
    """Return a ratio of times; no value where one of them could not be measured here."""
    missing = [form for form in (*above, *under) if form not in one]
    if missing:
        why = "openvino is not installed: pip install 'vmoe[openvino]'"
        return Figure(name, None, "ratio", reach, better, why=why)

    def of(measured: Measured, kind: str, how: Callable[[Sequence[float]], Any]) -> float:
        sums = [sum(float(how(getattr(measured[form], kind))) for form in forms)
                for forms in (above, under)]  # fmt: skip
        return share * sums[0] / sums[1]

    value, medians = of(one, "cpu", min), of(one, "cpu", np.median)
    more = {"medians": medians} | ({"all_cores": of(all_, "wall", min)} if all_ else {})
    return Figure(name, value, "ratio", reach, better, len(one[above[0]].cpu),
                  abs(value - medians) / 2, more=more)  # fmt: skip


def share_of_peak(
    case: Case, name: str, counted: ModelProto, reach: float, one: Measured
) -> Figure:
    """Return FLOPs per second of the lowered expert, over those of a matrix product."""

    def of(how: Callable[[Sequence[float]], Any]) -> float:
        peak = 2 * GEMM**3 / float(how(one["gemm"].cpu))
        return costs.flops(counted) / float(how(one["lowered expert"].cpu)) / peak

    value, medians = of(min), of(np.median)
    peak = 2 * GEMM**3 / min(one["gemm"].cpu) / 1e9
    more = {"medians": medians, "gflop": costs.flops(counted) / 1e9, "gemm_gflop_s": peak}
    return Figure(case.prefix + name, value, "share", reach, "higher", len(one["gemm"].cpu),
                  abs(value - medians) / 2, more=more)  # fmt: skip
