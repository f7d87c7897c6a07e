r"""What lowering and precision are worth, on this machine's own CPU.

    python benchmarks/export.py --quick
    python benchmarks/export.py --out benchmarks/results/export.json \
        --out benchmarks/results/export.md --overwrite

Experts r3d18 of width 0.5, four of them, and their dense counterpart of width 1.0; clips 8x64x64,
and 16x112x112 with the prefix `large_`. Naive is what torch.onnx.export gives, in ONNX Runtime.
Forms that are compared take turns in one run. A value is the ratio of the minima of the CPU time on
one thread; `medians` stands beside it, and `all_cores` is the ratio of the wall-clock minima with
every core. `spread` is half of the distance between the ratios of minima and medians. The weights
are random, as time does not depend on them.

fp32_lowered_vs_naive        naive expert over the lowered one (temporal Winograd)
fp32_lowered_vs_openvino     OpenVINO's expert over the lowered one
moe_vs_parts_b1              the mixture as deployed over router alone + expert alone
batch8_per_clip_vs_b1        eight clips, two to an expert, over eight times one clip
moe_vs_dense_naive           the dense counterpart as everybody exports it over the mixture
moe_vs_dense_same_lowering   the dense counterpart, lowered as the mixture is, over the mixture
moe_vs_all_then_mask         all experts run and one chosen, naive, over the mixture
if_load_ms                   the lowered `if` file with the device cache: CPU time of loading it
if_memory_mib                the naive `if` file: resident after loading and one clip, beyond what
                             router and one expert take as parts of their own
sgemm_executed, _nominal     FLOPs of the lowered expert that are executed, and of the plain one,
                             per second, over those of a matrix product of 2048
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import figures
import numpy as np
import torch
from figures import Figure
from onnx import ModelProto

from vmoe import cli, report
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips, ClipSpec
from vmoe.export import costs, onnx, optimize, pipeline
from vmoe.export.lowerings import dense
from vmoe.export.onnx import Parts
from vmoe.export.pipeline import ExportSettings, Plan
from vmoe.models import ModelSettings, VideoMoE, build, dense_counterpart
from vmoe.runtime import load
from vmoe.runtime.bench import context
from vmoe.runtime.bench.subjects import random_clips

log = logging.getLogger("vmoe")

LOWERED = "winograd"
SIZES = {
    "": ClipSpec(),
    "large_": ClipSpec(frames=16, spacing_s=0.1, height=112, width=112),
}
EXPERTS, OPSET, GEMM = 4, 20, 2048
MIB = 1 << 20
NO_VNNI = "this CPU has no AVX-512 VNNI, for which the figure was set"

Call = Callable[[], Any]


class Effort(NamedTuple):
    """How much is measured.

    Attributes:
        sizes: of the clips, by prefix.
        rounds: at least so many calls of each form.
        duration_s: and at least so long.
        starts: of a process that loads.
    """

    sizes: tuple[str, ...]
    rounds: int
    duration_s: float
    starts: int


QUICK = Effort(("",), rounds=3, duration_s=8, starts=2)
FULL = Effort(tuple(SIZES), rounds=15, duration_s=40, starts=7)


class Times(NamedTuple):
    """Seconds of the calls of one form."""

    cpu: list[float]
    wall: list[float]


Measured = dict[str, Times]


class Case(NamedTuple):
    """One size of clips, and all that is measured on it.

    Attributes:
        prefix: of its figures.
        spec: the clips.
        twin: the mixture.
        plain: its graphs as exported.
        lowered: the same, experts lowered.
        dense: the dense counterpart's graph as exported.
    """

    prefix: str
    spec: ClipSpec
    twin: VideoMoE
    plain: Parts
    lowered: Parts
    dense: ModelProto

    @property
    def clips(self) -> Clips:
        """Eight clips."""
        return random_clips(self.spec, 8, seed=0)


@cli.command(
    "export.py",
    "python benchmarks/export.py --quick",
    "python benchmarks/export.py --json",
    "python benchmarks/export.py --quick --out quick.json --out quick.md",
)
@click.option("--quick", is_flag=True, help="About a minute; small clips alone.")
@click.option("--out", multiple=True, type=click.Path(path_type=Path),
              help="Write the results, .json or .md; may be given again.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace results that exist.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a figure on stdout.")
def main(quick: bool, out: tuple[Path, ...], overwrite: bool, as_json: bool) -> None:
    """Measure the figures of export, everything that is compared interleaved in one run."""
    figures.check_files(out, overwrite=overwrite)
    machine = context.read()
    effort = QUICK if quick else FULL
    found: list[Figure] = []
    tables: dict[str, str] = {}
    times: dict[str, Any] = {}
    for prefix in effort.sizes:
        with tempfile.TemporaryDirectory() as folder:
            case = prepare(prefix)
            one, all_ = (
                measure(subjects(case, Path(folder) / str(n), n), effort) for n in (1, cores())
            )
            found += speed(case, one, all_) + loading(case, Path(folder) / "loading", effort)
        for title, measured in (("one thread", one), (f"{cores()} cores", all_)):
            tables[f"{_size(case.spec)}, {title}"] = table(measured)
        times[_size(case.spec)] = {"one_thread": _plain(one), "all_cores": _plain(all_)}
    if not has_vnni():
        found = [unjudged(figure) for figure in found]
    figures.say(found, as_json=as_json)
    figures.write(out, "Export", found, machine, tables,
                  {"effort": effort._asdict(), "seconds": times})  # fmt: skip


# ---- what is measured


def prepare(prefix: str) -> Case:
    """Export the mixture and its dense counterpart at one size of clips."""
    spec = SIZES[prefix]
    log.info("exporting for %s", _size(spec))
    twin = build(ModelSettings(experts=EXPERTS), spec).eval()
    plain = onnx.from_twin(twin, OPSET)
    wide = build(dense_counterpart(twin.settings), spec).eval()
    counterpart = onnx.trace([wide.experts[0]], "logits", spec.shape, OPSET)[0]
    lowered = Parts(plain.router, [_lowered(expert) for expert in plain.experts])
    return Case(prefix, spec, twin, plain, lowered, counterpart)


def _lowered(expert: ModelProto) -> ModelProto:
    made = optimize.lower(expert, LOWERED)
    assert made is not None
    return made


def subjects(case: Case, folder: Path, threads: int) -> dict[str, Call]:
    """Return every form as a call; `int8` ones are added by what knows them."""
    assert case.plain.router is not None
    one, eight = case.clips[:1], case.clips
    every = dense.lower(case.plain.router, case.plain.experts)["moe"]
    split, if_ = (deploy(case, case.lowered, folder / how, how, threads)
                  for how in ("split", "if"))  # fmt: skip
    mixed = [i % EXPERTS for i in range(len(eight))]
    found: dict[str, Call] = {
        "naive expert": session(case.plain.experts[0], one, threads),
        "lowered expert": session(case.lowered.experts[0], one, threads),
        "router": session(case.plain.router, one, threads),
        "split, one clip": lambda: split.infer(one, 0),
        "if, one clip": lambda: if_.infer(one, 0),
        "split, eight clips": lambda: split.infer(eight, mixed),
        "naive dense": session(case.dense, one, threads),
        "lowered dense": session(_lowered(case.dense), one, threads),
        "all experts, then mask": session(every, one, threads),
        "gemm": gemm(threads),
    }
    openvino = openvino_expert(case.plain.experts[0], one, threads)
    return found if openvino is None else found | {"OpenVINO expert": openvino}


def deploy(case: Case, parts: Parts, folder: Path, lowering: str, threads: int) -> Any:
    """Write a bundle of the mixture, and load all of it."""
    return load(write(case, parts, folder, lowering), threads=threads, device="cpu",
                backend="onnxruntime", all_parts=True)  # fmt: skip


def write(case: Case, parts: Parts, folder: Path, lowering: str) -> Path:
    """Write a bundle of the mixture."""
    folder.mkdir(parents=True)
    labels = tuple(f"label{i}" for i in range(case.twin.settings.classes))
    plan = Plan(Checkpoint(case.twin, labels), None, "mixture", ExportSettings(lowering=lowering))
    pipeline.write(plan, parts, folder)
    return folder


def session(model: ModelProto, clips: Clips, threads: int) -> Call:
    """Return a graph in ONNX Runtime as a call on clips."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    made = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: made.run(None, {"clip": clips})


def openvino_expert(model: ModelProto, clips: Clips, threads: int) -> Call | None:
    """Return an expert in OpenVINO, in float32, as a call on clips; None without OpenVINO."""
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    read = core.read_model(model.SerializeToString())
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads,
             "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
    request = core.compile_model(read, "CPU", hints).create_infer_request()
    return lambda: request.infer({"clip": clips})


def gemm(threads: int) -> Call:
    """Return the product of two matrices, as what this CPU can do at most."""
    a = torch.rand(GEMM, GEMM)

    def call() -> None:
        torch.set_num_threads(threads)
        torch.mm(a, a)

    return call


def measure(calls: dict[str, Call], effort: Effort) -> Measured:
    """Time calls that take turns, after one that is not counted."""
    found = {name: Times([], []) for name in calls}
    for call in calls.values():
        call()
    begin, rounds = time.monotonic(), 0
    while rounds < effort.rounds or time.monotonic() - begin < effort.duration_s:
        rounds += 1
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            found[name].cpu.append(time.process_time() - cpu)
            found[name].wall.append(time.perf_counter() - wall)
    return found


# ---- figures


def speed(case: Case, one: Measured, all_: Measured) -> list[Figure]:
    """Return the figures of time."""

    def compare(name: str, reach: float, above: list[str], under: list[str],
                better: str = "higher", share: float = 1) -> Figure:  # fmt: skip
        return ratio(case.prefix + name, reach, above, under, one, all_, better, share)

    moe, naive, lowered = ["split, one clip"], ["naive expert"], ["lowered expert"]
    parts = ["router", "lowered expert"]
    openvino = ["OpenVINO expert"]
    return [
        compare("fp32_lowered_vs_naive", 2.6, naive, lowered),
        compare("fp32_lowered_vs_openvino", 1.15, openvino, lowered),
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
        why = f"{missing[0]} cannot be measured here: not installed (pip install openvino)"
        return Figure(name, None, "ratio", reach, better, why=why)

    def of(measured: Measured, kind: str, how: Callable[[Sequence[float]], Any]) -> float:
        sums = [sum(float(how(getattr(measured[form], kind))) for form in forms)
                for forms in (above, under)]  # fmt: skip
        return share * sums[0] / sums[1]

    value, medians = of(one, "cpu", min), of(one, "cpu", np.median)
    return Figure(name, value, "ratio", reach, better, len(one[above[0]].cpu),
                  abs(value - medians) / 2,
                  more={"medians": medians, "all_cores": of(all_, "wall", min)})  # fmt: skip


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


# ---- loading

# Loads a bundle in a process of its own and runs one clip; the part `only`, or all through routing.
LOADED = """
import json, sys, time
from pathlib import Path
import numpy as np
from vmoe import bundle as bundles
from vmoe.runtime import load
import onnxruntime

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

path, cache = sys.argv[1:]
bundle = bundles.read(Path(path))
clip = np.zeros((1, *bundle.spec.shape), np.uint8)
before, begin = resident(), time.process_time()
engine = load(bundle, backend="onnxruntime", device="cpu", threads=1,
              cache=Path(cache) if cache else None)
ms, loaded = (time.process_time() - begin) * 1e3, resident()
engine.infer(clip, 0 if bundle.experts > 1 else None)
after = resident()
print(json.dumps({"ms": ms, "loaded": (loaded - before) / 1024, "after": (after - before) / 1024}))
engine.close()
"""


def loading(case: Case, folder: Path, effort: Effort) -> list[Figure]:
    """Return the figures of the `if` file: how long it takes to load, and what stays in memory."""
    lowered = write(case, case.lowered, folder / "lowered", "if")
    naive = write(case, case.plain, folder / "naive", "if")
    apart = write(case, case.plain, folder / "apart", "split")
    cold = [loaded(lowered, None)["ms"] for _ in range(effort.starts)]
    loaded(lowered, folder / "cache")  # the first fills it
    warm = [loaded(lowered, folder / "cache") for _ in range(effort.starts)]
    plain = [loaded(naive, folder / "cache") for _ in range(effort.starts)]
    split = [loaded(apart, folder / "cache") for _ in range(effort.starts)]
    ms = [one["ms"] for one in warm]
    load_ms = Figure(
        case.prefix + "if_load_ms", min(ms), "ms", 150, n=len(ms),
        spread=(max(ms) - min(ms)) / 2,
        more={"without_cache": min(cold), "mib_after_one_clip": min(x["after"] for x in warm)},
    )  # fmt: skip
    one, both = (min(x["after"] for x in some) for some in (plain, split))
    memory = Figure(
        case.prefix + "if_memory_mib", one - both, "MiB", 30, n=len(plain),
        spread=(max(x["after"] for x in plain) - one) / 2,
        more={"if_mib": one, "router_and_one_expert_mib": both,
              "if_after_load_mib": min(x["loaded"] for x in plain)},
    )  # fmt: skip
    return [load_ms, memory]


def loaded(bundle: Path, cache: Path | None) -> dict[str, float]:
    """Load a bundle in another process; return CPU ms, and MiB that are resident more."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(bundle), str(cache or "")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


# ---- the results


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_vnni() -> bool:
    """Return whether this CPU is of the kind that the figures were set for."""
    try:
        return "avx512_vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def unjudged(figure: Figure) -> Figure:
    """Return a figure that is shown, and not judged."""
    if figure.value is None:
        return figure
    more = {"measured": figure.value, **figure.more}
    return dataclasses.replace(figure, value=None, why=NO_VNNI, more=more)


def table(measured: Measured) -> str:
    """Return the times of all forms."""
    rows = [
        [name, min(t.cpu) * 1e3, float(np.median(t.cpu)) * 1e3, min(t.wall) * 1e3,
         float(np.median(t.wall)) * 1e3, len(t.cpu)]
        for name, t in measured.items()
    ]  # fmt: skip
    columns = ["form", "CPU ms, least", "median", "wall ms, least", "median", "n"]
    return report.table(rows, columns)


def _plain(measured: Measured) -> dict[str, dict[str, list[float]]]:
    return {name: times._asdict() for name, times in measured.items()}


def _size(spec: ClipSpec) -> str:
    return f"{spec.frames}x{spec.height}x{spec.width}"


if __name__ == "__main__":
    main()
