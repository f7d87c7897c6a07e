r"""vmoe-bench itself: what does measuring cost, and do two runs agree?

    python benchmarks/bench.py --quick
    python benchmarks/bench.py --out benchmarks/results/bench.json \
        --out benchmarks/results/bench.md --overwrite

Figures, of the model that ships, on one thread:

bench_overhead
    Time of a measurement by vmoe-bench (interleaving, two clocks a call, the machine looked at
    between rounds) over that of a bare loop that makes the same calls of the same engine with the
    same clips. It is of one form, free: several share what is done once a round. Within a block
    both take turns every STRETCH calls, some tens of milliseconds, so that other processes meet
    them alike. The value is the median of the blocks' own ratios; `cpu` the same of CPU time, which
    other processes do not stretch, and `latency` the mean latency that is reported over the bare
    loop's time of a call.
bench_agreement
    Share of the forms (free, each route, each part alone, all experts) for which two runs of the
    command, one after another, agree: the spreads that the two records state (`low` to `high` of
    `latency_ms`) overlap. `apart` is the largest distance between two medians
    of a form, as a share, and `outside` the largest among those that do not agree; `cpu` is the
    share by CPU time, which other processes do not stretch.

Of a ratio, `spread` is half of its 95 % interval (sign test); of a share half of Wilson's.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import figures
import numpy as np
from figures import Figure

from vmoe import cli, latest, report
from vmoe.runtime import load
from vmoe.runtime.bench import context, measuring, render, subjects
from vmoe.runtime.bench import run as bench
from vmoe.runtime.bench.measuring import Plan, Samples
from vmoe.runtime.bench.record import Record
from vmoe.runtime.bench.settings import BenchSettings
from vmoe.runtime.bench.statistics import median_interval
from vmoe.runtime.bench.subjects import Subject
from vmoe.runtime.bench.watch import Watch

log = logging.getLogger("vmoe")

OVERHEAD, AGREEMENT = 1.02, 0.95  # what is to be reached
STRETCH = 20  # calls of one kind, before those of the other


class Effort(NamedTuple):
    """How much is measured.

    Attributes:
        blocks: of both kinds.
        block_s: of each kind in a block, about; vmoe-bench itself measures for 3 s unless told.
        runs: of the command.
        duration_s: of each.
    """

    blocks: int
    block_s: float
    runs: int
    duration_s: float


QUICK = Effort(blocks=6, block_s=2.0, runs=2, duration_s=2)
FULL = Effort(blocks=20, block_s=3.0, runs=7, duration_s=15)


class Block(NamedTuple):
    """What some calls took, in seconds: on the clock, and of all threads of this process."""

    wall: float
    cpu: float


@cli.command(
    "bench.py",
    "python benchmarks/bench.py --quick",
    "python benchmarks/bench.py --json",
    "python benchmarks/bench.py --quick --out quick.json --out quick.md",
)
@click.option("--quick", is_flag=True, help="Under a minute; tells the direction.")
@figures.result_options
def main(quick: bool, out: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Measure what vmoe-bench costs beside a bare loop, and whether two runs agree."""
    figures.check_files(out, overwrite=overwrite)
    machine = context.read()
    effort = QUICK if quick else FULL
    found = [_overhead(effort)]
    records = _runs(effort)
    found.append(_agreement(records))
    figures.say(found, as_json=as_json)
    tables = {"The last run": render.table(records[-1])}
    measured = {"effort": effort._asdict(), "runs": [record.to_json() for record in records]}
    figures.write(out, "vmoe-bench itself", found, machine, tables, measured)


# ---- what measuring costs


class Cost(NamedTuple):
    """What one block says of vmoe-bench, each over the bare loop's."""

    wall: float
    cpu: float
    latency: float


def _overhead(effort: Effort) -> Figure:
    with load(latest.shipped(), "onnxruntime", "cpu", 1, all_parts=True) as engine:
        clips = subjects.random_clips(engine.bundle.spec, subjects.CALLS, seed=0)
        subject = Subject("shipped", engine, False, clips, 1)

        def call(number: int) -> object:
            return engine.infer(subject.of_round(number))

        once = _timed(lambda: _bare(call, range(100))).cpu / 100  # others do not enter it
        calls = max(2 * STRETCH, round(effort.block_s / once))
        costs = [_cost(call, calls) for _ in range(effort.blocks)]
    wall = np.array([cost.wall for cost in costs])
    low, high = median_interval(wall)
    return Figure(
        "bench_overhead",
        float(np.median(wall)),
        "ratio",
        OVERHEAD,
        n=effort.blocks,
        spread=None if low is None or high is None else (high - low) / 2,
        more={
            "cpu": float(np.median([cost.cpu for cost in costs])),
            "latency": float(np.median([cost.latency for cost in costs])),
            "calls": calls,
        },
    )


def _cost(call: Callable[[int], object], calls: int) -> Cost:
    """Measure a call as vmoe-bench does, with stretches of a bare loop between its rounds."""
    bare: list[Block] = []
    samples: list[Samples] = []

    def between(rounds: Iterable[int]) -> Iterator[int]:
        for number in Watch().rounds(rounds):
            if number % STRETCH == 0:
                stretch = range(number, min(number + STRETCH, calls))
                bare.append(_timed(partial(_bare, call, stretch)))
            yield number

    whole = _timed(
        lambda: samples.extend(measuring.interleave([call], Plan(rounds=calls), show=between))
    )
    wall, cpu = (sum(times) for times in zip(*bare, strict=True))
    warm = (calls + 1) / calls  # its one call of warm-up is no cost of measuring
    return Cost(
        wall=(whole.wall - wall) / (warm * wall),
        cpu=(whole.cpu - cpu) / (warm * cpu),
        latency=float(samples[0].wall_ms.mean()) / 1000 * calls / wall,
    )


def _bare(call: Callable[[int], object], numbers: Iterable[int]) -> None:
    for number in numbers:
        call(number)


def _timed(body: Callable[[], object]) -> Block:
    wall, cpu = time.perf_counter(), time.process_time()
    body()
    return Block(time.perf_counter() - wall, time.process_time() - cpu)


# ---- whether two runs agree


def _runs(effort: Effort) -> list[Record]:
    settings = BenchSettings(
        threads=("1",), backend="onnxruntime", device="cpu", duration=effort.duration_s,
        power="none",
    )  # fmt: skip
    log.info("running vmoe-bench %d times", effort.runs)
    return [bench.run([latest.shipped()], [], settings) for _ in range(effort.runs)]


def _agreement(records: list[Record]) -> Figure:
    """Compare each run with the next, form by form."""
    pairs = [
        (a, b)
        for one, other in itertools.pairwise(records)
        for a, b in zip(one.rows, other.rows, strict=True)
    ]
    apart = [_compared(a.wall, b.wall) for a, b in pairs]
    on_cpu = [_compared(a.cpu, b.cpu) for a, b in pairs]
    agree = sum(fits for _, fits in apart)
    low, high = report.wilson(agree, len(apart))
    return Figure(
        "bench_agreement",
        agree / len(apart),
        "share",
        AGREEMENT,
        better="higher",
        n=len(apart),
        spread=(high - low) / 2,
        more={
            "apart": max(distance for distance, _ in apart),
            "outside": max((distance for distance, fits in apart if not fits), default=0.0),
            "cpu": sum(fits for _, fits in on_cpu) / len(on_cpu),
        },
    )


def _compared(a: Any, b: Any) -> tuple[float, bool]:
    """Return how far apart two medians are, as a share, and whether their intervals overlap."""
    fits = a.low <= b.high and b.low <= a.high
    return abs(a.median - b.median) / min(a.median, b.median), fits


if __name__ == "__main__":
    main()
