"""vmoe-export: a twin as a bundle that really runs sparse, checked against the twin."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from vmoe import bundle as bundles
from vmoe import cli, latest, output, report
from vmoe.errors import SettingError
from vmoe.models import flops
from vmoe.runtime.bench.certificate import BOUND
from vmoe.settings import to_mapping

from . import pipeline, triton
from .gates import judged_as
from .pipeline import Exported
from .plan import ExportSettings, Plan, calibration_of
from .tensorrt import pipeline as trt_pipeline
from .tensorrt.from_onnx import command as from_onnx_command
from .tensorrt.settings import BuildSettings
from .topics import TOPICS
from .triton import command as serving

log = cli.log


@cli.command(
    "vmoe-export",
    "vmoe-export",
    "vmoe-export runs/train/mine/best.safetensors --lowering if --int8 --out runs/export/mine",
    "vmoe-export runs/train/mine/best.safetensors --trt --fp16 --timing-cache runs/timing.cache",
    topics=TOPICS,
)
@click.argument("checkpoint", metavar="[CKPT]", required=False, type=click.Path(path_type=Path))
@click.option("--onnx", is_flag=True, help="ONNX parts, for ONNX Runtime. [default]")
@click.option("--trt", is_flag=True, help="TensorRT plans, for this machine's GPU alone.")
@click.option("--from-onnx", is_flag=True, help="With --trt: plans of the ONNX parts of a bundle "
              "as they are; on a machine without torch, too.")  # fmt: skip
@cli.options(ExportSettings)
@cli.options(BuildSettings)
@click.option("--out", type=click.Path(path_type=Path),
              help="The bundle's folder. [default: runs/export/NAME-LOWERING]")  # fmt: skip
@serving.options
@click.option("--overwrite", is_flag=True, help="Replace a bundle or repository that is there.")
@click.option("--dry-run", is_flag=True, help="Show the plan; export nothing.")
@cli.seed_option
@cli.device_option
@cli.config_option
@cli.json_option
def main(
    checkpoint: Path | None, onnx: bool, trt: bool, from_onnx: bool, out: Path | None,
    triton_repo: Path | None,
    overwrite: bool, dry_run: bool, seed: int, device: str, config: Path | None, as_json: bool,
    **flags: Any,
) -> None:  # fmt: skip
    """Export CKPT to a bundle: uint8 clips in; per clip, the router and one expert run.

    CKPT is a checkpoint, a training's folder, or a bundle that carries its twin; left out, it is
    the newest under runs/, else the one that ships. The bundle is loaded again and compared with
    the twin on --device (auto is the CPU); one that does not pass its gates is refused (exit
    code 3), and kept as NAME.rejected with its report. With --trt, plans are built of its parts,
    and are judged in the same way on the GPU that they were built for. With --triton-repo alone, a
    bundle (by default the newest) is taken as it is, and no twin is read.
    """
    settings, build = _settings(flags, config, onnx=onnx, trt=trt)
    how = serving.of_flags(triton_repo, flags)
    if from_onnx:
        build = _from_onnx(settings, build, served=how is not None)
        from_onnx_command(checkpoint, out, build, overwrite=overwrite, dry_run=dry_run,
                          device=device, as_json=as_json)  # fmt: skip
        return
    if how is not None:
        triton.refuse_existing(how.folder, overwrite=overwrite)
        as_it_is = settings == ExportSettings() and out is None and not onnx and not trt
        if as_it_is and serving.is_bundle(checkpoint):
            serving.run(checkpoint, how, overwrite=overwrite, dry_run=dry_run, as_json=as_json)
            return
        triton.check_lowering(settings.lowering)
    if out is not None:
        output.refuse_existing(out, overwrite=overwrite)
        output.probe(out)
    path, line = latest.checkpoint(checkpoint)
    log.info("%s", line)
    plan = pipeline.plan(path, settings, seed)
    folder = out or _default(plan, build)
    output.refuse_existing(folder, overwrite=overwrite)
    cost = flops.count(plan.checkpoint.twin)
    log.info("%s", _describe(plan, cost))
    if dry_run:
        pipeline.check(plan)
        planned = _planned(plan, folder, cost, tf32=build is not None and build.tf32)
        if build:
            planned |= trt_pipeline.planned(build, planned["parts"], settings)
        cli.print_json(planned) if as_json else click.echo(_lines(planned))
        return
    if build:
        made = trt_pipeline.run(plan, folder, build, overwrite=overwrite, device=device)
    else:
        made = pipeline.run(plan, folder, overwrite=overwrite, device=device)
    if how is not None:
        triton.write(made.bundle, how, overwrite=overwrite)
    _say(made, folder, as_json=as_json)
    for next_line in (*_next(made, folder), *serving.next_lines(folder, how)):
        log.info("next: %s", next_line)


def _settings(
    flags: dict[str, Any], config: Path | None, *, onnx: bool, trt: bool
) -> tuple[ExportSettings, BuildSettings | None]:
    """Return the plan of export, and, with --trt, how plans are built."""
    settings = cli.resolve(ExportSettings, flags, config)
    build = cli.resolve(BuildSettings, flags, config)
    if onnx and (trt or build.torch_trt):
        raise SettingError("--onnx and --trt exclude each other: choose one.")
    if trt or build.torch_trt:
        return trt_pipeline.as_asked(settings, build), build
    default = to_mapping(BuildSettings())
    given = [f"--{key.replace('_', '-')}" for key, value in to_mapping(build).items()
             if value != default[key]]  # fmt: skip
    if given:
        raise SettingError(f"{' and '.join(given)} is for --trt: give that too, or leave it out.")
    return settings, None


def _from_onnx(
    settings: ExportSettings, build: BuildSettings | None, *, served: bool
) -> BuildSettings:
    """Return how plans are built; refuse what would have to be exported anew, or is yet to come."""
    if served:
        raise SettingError(
            "--from-onnx makes a bundle: serve that, by vmoe-export BUNDLE --triton-repo DIR."
        )
    if build is None:
        raise SettingError("--from-onnx is for --trt: give that too, or leave it out.")
    if build.torch_trt:
        raise SettingError("--torch-trt builds from the twin, --from-onnx does not: choose one.")
    default = to_mapping(trt_pipeline.as_asked(ExportSettings(), build))
    given = [f"--{key.replace('_', '-')}" for key, value in to_mapping(settings).items()
             if value != default[key]]  # fmt: skip
    if given:
        raise SettingError(
            f"--from-onnx takes the parts as they are: leave {' and '.join(given)} out."
        )
    return build


def _default(plan: Plan, build: BuildSettings | None) -> Path:
    """Return where a bundle goes if nothing is said; plans do not take the ONNX's place."""
    if build is None:
        return plan.default_out
    how = "" if plan.settings.lowering == "split" else f"-{plan.settings.lowering}"
    return plan.default_out.with_name(f"{plan.name}{how}-trt")


def _describe(plan: Plan, cost: flops.Flops) -> str:
    model = plan.checkpoint.twin.settings
    what = f"{plan.name}: {model.arch}, width {model.width:g}, {model.experts} expert(s)"
    if plan.settings.lowering == "dense":
        what += ", lowered dense: every expert runs on every clip, a baseline only"
    if plan.settings.counterpart:
        what += ", random weights: for latency only"
    saved = "" if cost.saved is None else f", {cost.saved:.0%} less than its dense counterpart"
    return f"{what}; {cost.moe / 1e9:.3g} GFLOP a clip{saved}"


def _planned(plan: Plan, folder: Path, cost: flops.Flops, *, tf32: bool) -> dict[str, Any]:
    settings, twin = plan.settings, plan.checkpoint.twin
    return {
        "out": str(folder),
        "name": plan.name,
        "model": report.plain(twin.settings),
        "clip": report.plain(twin.spec),
        "labels": list(plan.checkpoint.labels),
        "lowering": settings.lowering,
        "parts": bundles.part_names(settings.lowering, len(twin.experts)),
        "form": settings.form,
        "precision": settings.precision,
        "keep_fp32": settings.keep_fp32 if settings.precision != "fp32" else None,
        "calibration": calibration_of(plan),
        "optimize": settings.optimize,
        "opset": settings.opset,
        "gates": _gates(settings, judged_as(settings.precision, tf32=tf32)),
        "verify_data": settings.verify_data or "camera-motion and noise",
        "twin_inside": settings.twin and plan.file is not None,
        "flops_per_clip": cost.moe,
        "seed": plan.seed,
    }


def _gates(settings: ExportSettings, precision: str) -> dict[str, Any]:
    """Return the bounds, by the names of their flags."""
    most, mean = settings.parity(precision)
    sparse = None if settings.lowering == "dense" else BOUND
    return {
        "parity": most,
        "parity_mean": mean,
        "route_pct": settings.gate_route,
        "clean_points": settings.gate_clean,
        "robust_pct": settings.gate_robust,
        "sparsity": settings.gate_sparsity or sparse,
    }


def _lines(planned: dict[str, Any]) -> str:
    lines = []
    for key, value in planned.items():
        steps = value if key == "build" else [_said(value)]
        lines += [f"{key}: {step}" for step in steps]
    return "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(member)}" for key, member in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _say(made: Exported, folder: Path, *, as_json: bool) -> None:
    """Say what was made, and where it is."""
    if as_json:
        cli.print_json({"bundle": str(folder), **report.plain(made.report)})
    else:
        click.echo(_table(made))
    log.info("bundle: %s", folder)


def _table(made: Exported) -> str:
    """Return what was made and how it compares: one row for each part."""
    sizes, found = made.report["size_bytes"], made.findings
    rows = []
    for name, part in made.bundle.parts.items():
        size = sum(sizes[file] for file in part.hashes)
        d_logits, d_scores, routes = found.logits, found.scores, found.agreement_pct
        rows.append([
            name, part.precision["asked"], part.precision["found"], f"{size / 2**20:.2f}",
            max(d_logits, *found.experts) if name == "moe"
            else found.experts[int(name.removeprefix("expert"))] if name != "router" else None,
            d_scores if name in ("moe", "router") else None,
            routes if name in ("moe", "router") else None,
            "ok",
        ])  # fmt: skip
    columns = ["part", "asked", "found", "MiB", "max |d logits|", "max |d scores|", "routes %",
               "verdict"]  # fmt: skip
    return report.table(rows, columns)


def _next(made: Exported, out: Path) -> list[str]:
    folder = shlex.quote(str(out))
    lines = [f"vmoe-run {folder} --camera 0"]
    if "file" in made.bundle.twin:
        lines.append(f"vmoe-attack {folder} --n 100")
    if made.bundle.extra.get("weights") == "random":
        return [f"vmoe-bench BUNDLE --baseline {folder}"]
    return [*lines, f"vmoe-bench {folder}"]


if __name__ == "__main__":
    main()
