r"""The whole line: does the sparsity that FLOPs promise arrive, and how soon is vmoe-run ready?

    python benchmarks/line.py --quick
    python benchmarks/line.py --out benchmarks/results/line.json --out benchmarks/results/line.md \
        --overwrite

Figures, for experts r3d18 of width 0.5 on clips 8x64x64, and `shipped_` for the model that ships:

split_overhead_b1, if_overhead_b1
    Latency of a forced route at batch 1 over router alone + expert alone. The value is the median
    over the routes of the ratio of medians; `minima`, `cpu` (CPU time, medians) and `worst` (the
    worst route) stand beside it. The parts alone are those of the split bundle, for `if` too.
moe_vs_dense_wallclock_split, moe_vs_dense_wallclock_if
    Latency of a forced route over the dense counterpart in the same lowering; likewise.
run_ready_cpu_s
    CPU time of a vmoe-run process, of all its threads and from its start, until the first frame of
    a video file is in its hands: interpreter, imports, the bundle's hashes, the first graph loaded,
    the capture opened and one frame decoded. A child process runs vmoe-run's own entry point with
    small changes: what `sources.open` returns notes `time.process_time()` (which counts from the
    process's start) when it is asked for its first frame (`asked_s`) and when it has it; then it
    loads what of the bundle is not loaded yet (vmoe-run itself loads an expert of a file when it
    is first routed to) and notes it once more (`loaded_s`).
run_imports_torch_or_onnx
    How many of torch and onnx are imported in that process by then.
flops_saved_default
    Share of the dense counterpart's FLOPs that a clip does not cost, in the default configuration.

The weights are random where nothing else is said: latency does not depend on them. Bundles are
made by the exporter's own functions and compared with the twin on two clips; its gates, which take
minutes for experts of this size, are left to vmoe-export. Of a latency figure, `spread` is half of
the widest 95 % interval (sign test) of a route's rounds; of a CPU time half of the range.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import cv2
import figures
import numpy as np
from figures import Figure

from vmoe import bundle as bundles
from vmoe import checkpoint, cli, latest, output
from vmoe.batches import to_tensor
from vmoe.checkpoint import Checkpoint
from vmoe.clips import ClipSpec
from vmoe.errors import VmoeError
from vmoe.export import onnx, pipeline
from vmoe.export.pipeline import ExportSettings, Plan
from vmoe.models import ModelSettings, VideoMoE, build, dense_counterpart, flops
from vmoe.runtime import load
from vmoe.runtime.bench import context, forms, render
from vmoe.runtime.bench import run as bench
from vmoe.runtime.bench.record import Record
from vmoe.runtime.bench.settings import BenchSettings
from vmoe.runtime.bench.statistics import Ratio, Times, ratio
from vmoe.runtime.bench.subjects import random_clips

log = logging.getLogger("vmoe")

LOWERINGS = ("split", "if")
OVERHEAD, AGAINST_DENSE, READY_S, FLOPS_SAVED = 1.05, 0.45, 1.5, 0.60  # what is to be reached
PARITY = 1e-4  # as a share of the largest logit
NOTHING_SHIPS = "no twin ships with this checkout (vmoe/shipped/camera-motion)"

# Runs vmoe-run, and notes what it cost until the first frame was asked for and was there, and
# until every part of the bundle was loaded.
WATCHED = """
import json, os, sys, time
from vmoe.runtime import sources
from vmoe.runtime.engine import Engine

place, engines = sys.argv.pop(1), []
opened, load_parts = sources.open, Engine.load_parts

def open_watched(*args):
    source = opened(*args)
    frames = source.frames
    def watched(stop):
        noted = {"asked": time.process_time()}
        next(frames(stop))
        noted["ready"] = time.process_time()
        noted["heavy"] = [name for name in ("torch", "onnx") if name in sys.modules]
        load_parts(engines[0])
        noted["loaded"] = time.process_time()
        with open(place, "w") as file:
            json.dump(noted, file)
        os._exit(0)
        yield
    source.frames = watched
    return source

def load_watched(self, names=None):
    engines.append(self)
    load_parts(self, names)

sources.open, Engine.load_parts = open_watched, load_watched
from vmoe.runtime.cli import main
sys.argv[0] = "vmoe-run"
main()
"""


class Effort(NamedTuple):
    """How much is measured.

    Attributes:
        experts: of the full-size model.
        rounds: at least so many calls of each form.
        duration_s: and at least so long.
        starts: of vmoe-run.
    """

    experts: int
    rounds: int
    duration_s: float
    starts: int


QUICK = Effort(experts=2, rounds=6, duration_s=2, starts=2)
FULL = Effort(experts=4, rounds=60, duration_s=20, starts=9)


@cli.command(
    "line.py",
    "python benchmarks/line.py --quick",
    "python benchmarks/line.py --json",
    "python benchmarks/line.py --quick --out quick.json --out quick.md",
)
@click.option("--quick", is_flag=True, help="Under a minute; tells the direction.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads of an engine.")
@figures.result_options
def main(quick: bool, threads: int, out: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Measure the figures of the whole line, everything that is compared interleaved in one run."""
    figures.check_files(out, overwrite=overwrite)
    machine = context.read()
    effort = QUICK if quick else FULL
    settings = BenchSettings(
        threads=(str(threads),), iterations=effort.rounds, duration=effort.duration_s
    )
    found: list[Figure] = [_flops_saved()]
    records: dict[str, Record] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        full = build(ModelSettings(experts=effort.experts), ClipSpec()).eval()
        split = _latency(full, "", folder / "full", settings, found, records)
        shipped = _shipped_twin()
        if isinstance(shipped, str):
            found += [Figure("shipped_" + f.figure, None, f.unit, f.reach, why=shipped)
                      for f in found[1:]]  # fmt: skip
        else:
            _latency(shipped, "shipped_", folder / "shipped", settings, found, records)
        found += _ready(split, effort.starts, folder)
    figures.say(found, as_json=as_json)
    tables = {_title(key, threads): render.table(record) for key, record in records.items()}
    rows = {key or "full": _rows(record) for key, record in records.items()}
    measured = {"effort": effort._asdict(), "threads": threads, "rows": rows}
    figures.write(out, "The whole line", found, machine, tables, measured)


def _flops_saved() -> Figure:
    saved = flops.count(build(ModelSettings(), ClipSpec())).saved
    return Figure("flops_saved_default", saved, "share", FLOPS_SAVED, better="higher")


def _shipped_twin() -> VideoMoE | str:
    """Return the twin of the model that ships, or why there is none."""
    try:
        return checkpoint.load(latest.SHIPPED / bundles.TWIN).twin
    except VmoeError:
        return NOTHING_SHIPS


# ---- latency


def _latency(
    twin: VideoMoE,
    prefix: str,
    folder: Path,
    settings: BenchSettings,
    found: list[Figure],
    records: dict[str, Record],
) -> Path:
    """Measure a model against its parts and its dense counterpart; return its split bundle.

    Adds to `found` and `records`.
    """
    dense = build(dense_counterpart(twin.settings), twin.spec).eval()
    moes = _export(twin, folder / "moe")
    counterparts = _export(dense, folder / "dense")
    log.info("measuring %s", twin.settings)
    record = bench.run(moes, counterparts, settings)
    for about in record.bundles:
        log.info("%s: routes of the clips %s", about.name, about.routes)
    for lowering in LOWERINGS:
        found.append(
            _figure(f"{prefix}{lowering}_overhead_b1", OVERHEAD, record, f"moe-{lowering}",
                    lambda i: [("moe-split", forms.ROUTER), ("moe-split", forms.expert(i))])
        )  # fmt: skip
    for lowering in LOWERINGS:
        base = (f"dense-{lowering}", forms.FREE)
        found.append(
            _figure(f"{prefix}moe_vs_dense_wallclock_{lowering}", AGAINST_DENSE, record,
                    f"moe-{lowering}", lambda i, base=base: [base])  # type: ignore[misc]
        )  # fmt: skip
    records[prefix] = record
    return moes[0]


def _figure(
    name: str,
    reach: float,
    record: Record,
    bundle: str,
    under: Callable[[int], Sequence[tuple[str, str]]],
) -> Figure:
    """Return one ratio over all routes of a bundle; `under` names what a route is compared with."""
    took = {(row.bundle, row.form): row.samples for row in record.rows if row.samples is not None}
    wall = {key: samples.wall_ms for key, samples in took.items()}
    cpu = {key: samples.cpu_ms for key, samples in took.items()}
    about = next(about for about in record.bundles if about.name == bundle)

    def ratios(times: dict[tuple[str, str], Times]) -> list[Ratio]:
        return [
            ratio(times[bundle, forms.route(i)], *(times[key] for key in under(i)))
            for i in range(about.experts)
        ]

    on_clock, on_cpu = ratios(wall), ratios(cpu)
    widths = [(r.high or 0.0) - (r.low or 0.0) for r in on_clock]
    return Figure(
        name,
        _median([r.medians for r in on_clock]),
        "ratio",
        reach,
        n=len(wall[bundle, forms.route(0)]) * about.experts,
        spread=max(widths) / 2,
        more={
            "minima": _median([r.minima for r in on_clock]),
            "cpu": _median([r.medians for r in on_cpu]),
            "worst": max(r.medians for r in on_clock),
        },
    )


def _export(twin: VideoMoE, stem: Path) -> list[Path]:
    """Write a twin as one bundle for each lowering: the exporter's graphs, traced once."""
    log.info("exporting %s", twin.settings)
    held = Checkpoint(twin, tuple(f"label {k}" for k in range(twin.settings.classes)))
    parts = onnx.from_twin(twin, ExportSettings().opset)
    paths = []
    for lowering in LOWERINGS:
        how = ExportSettings(lowering=lowering, counterpart=twin.settings.experts == 1)
        plan = Plan(held, None, stem.name, how)
        path = stem.with_name(f"{stem.name}-{lowering}")
        with output.whole_folder(path) as folder:
            pipeline.write(plan, parts, folder)
        _check(twin, path)
        paths.append(path)
    return paths


def _check(twin: VideoMoE, path: Path) -> None:
    """Raise where a bundle does not answer as its twin, on two clips and every route."""
    import torch

    clips = random_clips(twin.spec, 2, seed=1)
    with load(path) as engine, torch.no_grad():
        for i in range(twin.settings.experts):
            wanted = twin.run_expert(i, to_tensor(clips)).numpy()
            away = np.abs(engine.infer(clips, force_route=i).logits - wanted).max()
            if away > PARITY * np.abs(wanted).max():
                raise VmoeError(f"{path.name}: expert {i} is {away:.2g} away from the twin.")


# ---- until vmoe-run is ready


def _ready(split: Path, starts: int, folder: Path) -> list[Figure]:
    """Start vmoe-run some times on each bundle, in turn."""
    video = _video(folder / "video.avi")
    places = {"": split}
    if (latest.SHIPPED / bundles.MANIFEST).is_file():
        places["shipped_"] = latest.SHIPPED
    seen: dict[str, list[dict[str, Any]]] = {prefix: [] for prefix in places}
    for _ in range(starts):
        for prefix, bundle in places.items():
            seen[prefix].append(_start(bundle, video, folder / "ready.json"))
    found = []
    for prefix in ("", "shipped_"):
        name = f"{prefix}run_ready_cpu_s"
        if prefix not in seen:
            found.append(Figure(name, None, "s", READY_S, why=NOTHING_SHIPS))
            continue
        times = [one["ready"] for one in seen[prefix]]
        more = {"minimum": min(times)}
        for moment in ("asked", "loaded"):
            more[f"{moment}_s"] = _median([one[moment] for one in seen[prefix]])
        half = (max(times) - min(times)) / 2
        found.append(Figure(name, _median(times), "s", READY_S, n=starts, spread=half, more=more))
    heavy = {name for all_ in seen.values() for one in all_ for name in one["heavy"]}
    n = sum(len(all_) for all_ in seen.values())
    return [*found, Figure("run_imports_torch_or_onnx", float(len(heavy)), "count", 0, n=n)]


def _start(bundle: Path, video: Path, place: Path) -> dict[str, Any]:
    """Run vmoe-run until its first frame; return CPU seconds, and which heavy modules it has."""
    place.unlink(missing_ok=True)
    args = [str(place), str(bundle), "--source", str(video)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *args], capture_output=True, text=True, check=False
    )
    if not place.is_file():
        raise VmoeError(f"vmoe-run did not read a frame: {done.stderr.strip()}")
    seen: dict[str, Any] = json.loads(place.read_text())
    return seen


def _video(path: Path) -> Path:
    """Write two seconds of moving texture, 25 frames per second, 480x360."""
    spec = ClipSpec(frames=50, spacing_s=0.04, height=360, width=480)
    fourcc = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), fourcc, 25, (spec.width, spec.height))
    for frame in random_clips(spec, 1, seed=0)[0]:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


# ---- the results


def _rows(record: Record) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = record.to_json()["rows"]
    return rows


def _title(prefix: str, threads: int) -> str:
    what = "the model that ships" if prefix else "r3d18, width 0.5, clips 8x64x64"
    return f"Latency of a call of one clip: {what}; {threads} thread(s)"


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


if __name__ == "__main__":
    main()
