"""From a twin to a bundle of plans: the ONNX bundle, its gates, the plans, the same gates again.

What TensorRT builds is judged as any bundle is, on the GPU that it was built for, and by one gate
more: what its layers compute in (`proof`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmoe import bundle as bundles
from vmoe import output
from vmoe.errors import SettingError
from vmoe.export import latency, optimize, parity, verify
from vmoe.export import pipeline as onnx_pipeline
from vmoe.export.accuracy import Sample
from vmoe.export.gates import Gate
from vmoe.export.pipeline import Exported, Stages, sample_of, settle
from vmoe.export.plan import WINDOW, ExportSettings, Plan
from vmoe.latest import REJECTED
from vmoe.runtime import load
from vmoe.runtime.backends import REPORTED
from vmoe.runtime.engines import _plan

from . import plans, torch_trt
from .builder import Made
from .settings import BuildSettings

BACKEND = "tensorrt"
CPU_ONLY = ("joined", "flat", "direct", "winograd")  # forms of --optimize: for a CPU's kernels


def as_asked(settings: ExportSettings, build: BuildSettings) -> ExportSettings:
    """Return how the ONNX of plans is exported: symmetric int8, and no form that is for CPUs.

    Raises:
        SettingError: a lowering, a form or a precision that no plan is built of.
    """
    if settings.lowering not in plans.LOWERINGS:
        raise SettingError(
            f"--trt builds no plan of --lowering {settings.lowering}: {plans.IF}. Use split, where "
            "the host routes."
        )
    if settings.lowering == "plugin" and (settings.int8 or settings.bf16):
        raise SettingError(
            f"--lowering plugin has no routed layers in {settings.precision}, for TensorRT: use "
            "--lowering split, --fp16, or fp32."
        )
    if settings.form != WINDOW:
        raise SettingError(f"--trt is not for --form {settings.form}: leave one of them out.")
    if settings.optimize in CPU_ONLY:
        raise SettingError(f"--optimize {settings.optimize} is for CPUs: with --trt leave it out.")
    if build.torch_trt:
        torch_trt.check(settings, build)
    form = "s8s8" if settings.int8 else settings.int8_form
    return replace(settings, optimize="none", int8_form=form)


def run(
    plan: Plan, out: Path, settings: BuildSettings, *, overwrite: bool = False, device: str = "auto"
) -> Exported:
    """Carry a plan of export out, up to plans for this machine.

    Args:
        plan: what is to be exported, its settings as `as_asked` gives them.
        out: the bundle's folder.
        settings: how plans are built.
        overwrite: replace a bundle that is there.
        device: the GPU: cuda:N (auto is the first).

    Raises:
        MissingDependencyError: TensorRT, cuda-python or a GPU is missing; before any work.
        GateError: a gate refused the ONNX, or the plans, which are kept as NAME.rejected.
        VmoeError: TensorRT cannot build a part.
    """
    at = plans.here(device, settings)
    if settings.torch_trt:
        torch_trt.module()
    rejected = out.with_name(out.name + REJECTED)
    output.refuse_existing(out, overwrite=overwrite)
    output.refuse_existing(rejected, overwrite=True)
    output.probe(out)
    stages = Stages()
    with tempfile.TemporaryDirectory() as temporary:
        with stages.stage("onnx", "bundle, against the twin"):
            made = onnx_pipeline.run(plan, Path(temporary) / "onnx")
        with output.whole_folder(out, overwrite=overwrite) as folder:
            with stages.stage("build", f"TensorRT {at.machine.tensorrt}, {at.machine.gpu.name}"):
                make = _by_torch(plan, settings, at, device) if settings.torch_trt else None
                _, proven = plans.write(made.bundle, folder, settings, at, make)
            sample = sample_of(plan)
            with stages.stage("check", f"against the twin on {len(sample.clips)} clips"):
                gates, findings, said = _judge(plan, settings, at, sample, folder, device)
            gates = [*gates, *proven]
            said = {**_kept(made.report), **said, "seconds": stages.seconds,
                    "gates": [gate.to_report() for gate in gates],
                    "size_bytes": {file.name: file.stat().st_size for file in folder.iterdir()},
                    "built_on": at.machine.to_json()}  # fmt: skip
            settle(folder, rejected, said, gates, len(sample.clips))
    return Exported(bundles.read(out), said, findings)


def _by_torch(
    plan: Plan, settings: BuildSettings, at: plans.Here, device: str
) -> Callable[[str], Made]:
    gpu = "cuda:0" if device == "auto" else device
    return torch_trt.builder(plan.checkpoint, plan.settings, settings, at.trt, gpu)


def _write_split(plan: Plan, build: BuildSettings, at: plans.Here, folder: Path) -> None:
    """Write plans of router and experts apart: what --gate-sparsity compares one plan with."""
    alone = replace(plan, settings=replace(plan.settings, lowering="split"))
    with tempfile.TemporaryDirectory() as temporary:
        source = onnx_pipeline.write(alone, onnx_pipeline.graphs(alone).parts, Path(temporary))
        made, _ = plans.write(source, folder, build, at)
    _plan.note(part.hashes[part.file] for part in made.parts.values())


def _judge(
    plan: Plan, build: BuildSettings, at: plans.Here, sample: Sample, folder: Path, device: str
) -> tuple[list[Gate], parity.Findings, dict[str, Any]]:
    """Run every gate on the plans, as they will be loaded."""
    bundle = bundles.read(folder)
    _plan.note(part.hashes[part.file] for part in bundle.parts.values())
    gpu = "cuda:0" if device == "auto" else device
    case = verify.Case(
        plan.checkpoint, bundle, sample, plan.settings, gpu, plan.seed,
        write_split=lambda folder: _write_split(plan, build, at, folder), tf32=build.tf32,
    )  # fmt: skip
    with load(bundle, BACKEND, gpu, all_parts=True) as engine:
        judged = verify.judge(case, engine)
    took = latency.measure(bundle, [BACKEND], gpu, case.sample.clips[:1])
    ok = all(gate.ok for gate in judged.gates)
    return judged.gates, judged.findings, {**judged.report, REPORTED: {
        BACKEND: {"ok": ok, **took[BACKEND]}
    }}  # fmt: skip


def _kept(said: dict[str, Any]) -> dict[str, Any]:
    """Return what the ONNX bundle's report says that is as true of its plans."""
    lost = ("gates", "backends", "seconds", "size_bytes", "parity", "route", "sparsity", "machine")
    return {key: value for key, value in said.items() if key not in lost}


def planned(settings: BuildSettings, names: Iterable[str], asked: ExportSettings) -> dict[str, Any]:
    """Return what --dry-run says of the build."""
    precision = {
        name: asked.asked("router") if name == "router" else asked.precision for name in names
    }
    sparse = asked.gate_sparsity or asked.lowering == "split"
    against = f"the twin: parity, routes, accuracy{', sparsity' if sparse else ''}"
    return {
        "build": plans.planned(settings, precision, asked.lowering, against),
        "optimize": asked.optimize,
        "passes": [apply.__module__.rpartition(".")[2] for apply in optimize.TENSORRT],
        **({"int8_form": asked.int8_form} if asked.int8 else {}),
    }
