r"""What the routed kernels and host routing are worth on a GPU.

    python benchmarks/gpu.py --quick
    python benchmarks/gpu.py --out benchmarks/results/gpu.json --out benchmarks/results/gpu.md \
        --overwrite

It runs wherever torch has CUDA; no TensorRT is needed, and none is measured: what a plugin of it
would launch is launched here in the same way, through the driver, from the same compiled text.
Sections, each on its own (--section); one that fails is told with its traceback, and the others
go on:

numbers      every kernel against torch in float64: the PTX for this GPU, the PTX of an older one,
             and machine code made of it ahead of time. kernels_wrong: how many are not close enough
driver       driver_wrong: how many checks fail of the runtime's own CUDA code: copies, graphs,
             waits, events, the plugins' enqueue
speed        topk_us: one launch, on the GPU. convs_vs_torch_*: all convolutions of one expert
             (r3d18, width 0.5) by our kernels over cuDNN's with one expert's weights for the batch
routing      host_routing_us: router, readback, expert, over the same two graphs without a look at
             the route; the host waits as the backend tensorrt does. host_routing_blocking_us: it
             sleeps at once. dense_vs_sparse_b1,
             _b8: the dense counterpart (width 1.0) as one graph over host routing; also over it:
             all_experts_vs_sparse, all four experts in one graph, and forward_vs_sparse, torch's
             own forward of the twin
onnxruntime  ort_cuda_*: the bundle that ships, on CUDA: how far its logits are from those on the
             CPU, and its latency
energy       energy_dense_vs_sparse_b1, _b8: joules of a clip, by the card's own counter

`spread` is half of the range of the middle half of the samples. The weights are random, as time
does not depend on them. Times are with the clips on the GPU.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import figures
import gpu_driver
import gpu_kernels
import gpu_power
import gpu_routing
import torch
from figures import Figure
from gpu_timing import Effort, Found, finish, median, spread, wall_us

from vmoe import cli, latest, report
from vmoe.errors import MissingDependencyError
from vmoe.runtime import load
from vmoe.runtime.bench import context
from vmoe.runtime.bench.subjects import random_clips

log = logging.getLogger("vmoe")

QUICK = Effort(5, 30, 15, 0.5, ((8, 64),))
FULL = Effort(15, 100, 30, 2.2, ((8, 64), (16, 112)))
PACKAGES = ("torch", "triton", "cuda-bindings", "nvidia-ml-py")
NO_GPU = "this machine has no CUDA GPU that torch can use"
UNMEASURED = {  # by section: the figures that a machine without a GPU says it has none of
    "numbers": [("kernels_wrong", "count", 0.0, "lower")],
    "driver": [("driver_wrong", "count", 0.0, "lower")],
    "routing": [("host_routing_us", "us", 20.0, "lower"),
                ("dense_vs_sparse_b1", "ratio", 1.0, "higher"),
                ("dense_vs_sparse_b8", "ratio", 1.0, "higher")],
    "speed": [("topk_us", "us", 10.0, "lower")],
    "energy": [("energy_dense_vs_sparse_b1", "ratio", 1.0, "higher")],
    "onnxruntime": [("ort_cuda_worst_difference", "share", 0.01, "lower")],
}  # fmt: skip


@cli.command(
    "gpu.py",
    "python benchmarks/gpu.py --quick",
    "python benchmarks/gpu.py --section numbers --section speed",
    "python benchmarks/gpu.py --quick --out quick.json --out quick.md",
)
@click.option("--quick", is_flag=True, help="Small clips and few rounds.")
@click.option("--section", "chosen", multiple=True, type=click.Choice(list(UNMEASURED)),
              help="Only this one; may be given again.")  # fmt: skip
@click.option("--limit-s", type=float, default=90.0, show_default=True,
              help="No section begins after so many seconds.")  # fmt: skip
@figures.result_options
def main(
    quick: bool, chosen: tuple[str, ...], limit_s: float, out: tuple[Path, ...], overwrite: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure kernels, host routing, ONNX Runtime and energy on a GPU."""
    figures.check_files(out, overwrite=overwrite)
    machine = read_context()
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 5  # plans of a convolution that are tried
    gc.freeze()  # torch collects garbage before each capture
    found, begin = Found(), time.monotonic()
    for name in chosen or UNMEASURED:
        since = time.monotonic()
        if since - begin > limit_s:
            add(found, without(name, f"not begun: {limit_s:g} s were over"), name)
        else:
            add(found, run_section(name, QUICK if quick else FULL), name)
        log.info("%s: %.1f s", name, time.monotonic() - since)
        figures.write(out, "GPU", found.figures, machine, found.tables, found.measured)
    if not as_json:
        for title, text in found.tables.items():
            click.echo(f"{title}\n\n{text}\n")
    figures.say(found.figures, as_json=as_json)


def run_section(name: str, effort: Effort) -> Found:
    """Run one section; what it raises is what it found."""
    if not torch.cuda.is_available():
        return without(name, NO_GPU)
    try:
        return SECTIONS[name]("cuda", effort)
    except Exception as e:  # the others are to be measured all the same
        made = without(name, f"{type(e).__name__}: {e}".splitlines()[0][:300])
        trace = traceback.format_exc()
        made.tables[f"What went wrong in {name}"] = f"```\n{trace}```"
        made.measured["error"] = trace
        log.error("%s", trace)
        return made


def without(name: str, why: str) -> Found:
    """Return a section's figures without values."""
    return Found([
        Figure(figure, None, unit, reach, better, why=why)
        for figure, unit, reach, better in UNMEASURED[name]
    ])  # fmt: skip


def add(found: Found, more: Found, name: str) -> None:
    """Add what a section found."""
    found.figures += more.figures
    found.tables |= more.tables
    found.measured[name] = more.measured


def read_context() -> dict[str, Any]:
    """Return the machine, with the GPU as torch sees it."""
    machine = context.read()
    for package in PACKAGES:
        try:
            machine["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            machine["versions"][package] = "not installed"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        machine["cuda"] = {
            "name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count, "memory_gib": gpu.total_memory / 2**30,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
        machine["versions"]["CUDA"] = torch.version.cuda
        machine["versions"]["cuDNN"] = torch.backends.cudnn.version()
        machine["gpu"] = machine["gpu"] or gpu.name
    return machine


def numbers(device: str, _effort: Effort) -> Found:
    """Compare every kernel with torch."""
    from vmoe.runtime.plugins.launch import Launcher

    torch.zeros(1, device=device)  # makes the context current
    return gpu_kernels.numbers(device, Launcher)


def speed(device: str, effort: Effort) -> Found:
    """Time every kernel."""
    from vmoe.runtime.plugins.launch import Launcher

    torch.zeros(1, device=device)
    return gpu_kernels.speed(device, effort, Launcher)


def onnxruntime(_device: str, effort: Effort) -> Found:
    """Run the bundle that ships on CUDA, beside the CPU."""
    try:
        engine = load(latest.shipped(), "onnxruntime", "cuda:0", all_parts=True)
    except MissingDependencyError as e:
        return without("onnxruntime", str(e))
    found, rows = Found(), []
    with engine, load(latest.shipped(), "onnxruntime", "cpu", all_parts=True) as plain:
        clips = random_clips(engine.bundle.spec, 8, seed=0)
        ours, theirs = engine.infer(clips), plain.infer(clips, None)
        worst = float(abs(ours.logits - theirs.logits).max() / abs(theirs.logits).max())
        agree = float((ours.route == theirs.route).mean())
        found.figures.append(
            Figure("ort_cuda_worst_difference", worst, "share", 0.01, n=8, more={"routes": agree})
        )
        for n in (1, 8):
            taken = wall_us({"cuda": lambda n=n: engine.infer(clips[:n]),  # type: ignore[misc]
                             "cpu": lambda n=n: plain.infer(clips[:n])}, effort.calls // 2)  # type: ignore[misc]  # fmt: skip
            rows += [[name, n, median(us), min(us), spread(us)] for name, us in taken.items()]
    columns = ["device", "N", "us, median", "least", "spread"]
    found.tables["ONNX Runtime, the bundle that ships, with upload"] = report.table(rows, columns)
    found.measured["rows"] = rows
    finish()
    return found


SECTIONS: dict[str, Callable[[str, Effort], Found]] = {
    "numbers": numbers, "driver": gpu_driver.measure, "routing": gpu_routing.measure,
    "speed": speed, "energy": gpu_power.measure, "onnxruntime": onnxruntime,
}  # fmt: skip

if __name__ == "__main__":
    main()
