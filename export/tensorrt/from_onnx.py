"""vmoe-export BUNDLE --trt --from-onnx: plans of a bundle's ONNX parts as they are, without torch.

For a machine that serves, a Jetson say: what a larger machine exported and judged against its twin
is built here, and compared with ONNX Runtime where that is installed.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import click

from vmoe import bundle as bundles
from vmoe import cli, latest, output, report
from vmoe.export.gates import Gate, refuse
from vmoe.runtime.backends import REPORTED
from vmoe.runtime.engines import _plan

from . import agreement, plans
from .settings import BuildSettings

log = logging.getLogger("vmoe.export")


@cli.command(
    "vmoe-export",
    "vmoe-export runs/export/mine-split --trt --from-onnx",
    "vmoe-export runs/export/mine-split --trt --from-onnx --workspace 1024 --out runs/plans",
    "vmoe-export --trt --from-onnx --dry-run",
)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--from-onnx", is_flag=True, help="Said already: this is its help.")
@click.option("--trt", is_flag=True, help="TensorRT plans, for this machine's GPU alone.")
@cli.options(BuildSettings, skip=["torch_trt"])
@click.option("--out", type=click.Path(path_type=Path),
              help="The bundle's folder. [default: BUNDLE-trt]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("--dry-run", is_flag=True, help="Show the plan of the build; build nothing.")
@cli.device_option
@cli.config_option
@cli.json_option
def main(
    bundle: Path | None, from_onnx: bool, trt: bool, out: Path | None, overwrite: bool,
    dry_run: bool, device: str, config: Path | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Build TensorRT plans of BUNDLE's ONNX parts as they are; needs onnx, and no torch.

    BUNDLE is what vmoe-export wrote, of any lowering but if; left out, the newest under runs/, else
    the one that ships. Its precision stays. The plans are compared with ONNX Runtime, where that
    is installed; plans that answer otherwise are refused (exit code 3).
    """
    settings = cli.resolve(BuildSettings, flags, config)
    command(bundle, out, settings, overwrite=overwrite, dry_run=dry_run, device=device,
            as_json=as_json)  # fmt: skip


def command(
    named: Path | None, out: Path | None, settings: BuildSettings, *, overwrite: bool,
    dry_run: bool, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Do what the command line says."""
    path, line = latest.bundle(named)
    log.info("%s", line)
    source = bundles.read(path)
    plans.check(source)
    folder = out or _default(path)
    output.refuse_existing(folder, overwrite=overwrite)
    if dry_run:
        precision = {n: part.precision["found"] for n, part in plans.sources(source).items()}
        lines = plans.planned(
            settings, precision, source.lowering, "ONNX Runtime, where it is: parity, routes"
        )
        planned = {"out": str(folder), "source": str(path), "build": lines}
        text = "\n".join([f"out: {folder}", *(f"build: {line}" for line in lines)])
        cli.print_json(planned) if as_json else click.echo(text)
        return
    said = run(source, folder, settings, overwrite=overwrite, device=device)
    if as_json:
        cli.print_json({"bundle": str(folder), **said})
    log.info("bundle: %s", folder)
    log.info("next: vmoe-run %s --camera 0", shlex.quote(str(folder)))


def _default(path: Path) -> Path:
    """Return where plans go if nothing is said: beside what they are built of, or below runs/."""
    if path.resolve() == latest.SHIPPED.resolve():
        return Path("runs/export") / f"{path.name}-trt"
    return path.with_name(f"{path.name}-trt")


def run(
    source: bundles.Bundle, out: Path, settings: BuildSettings, *, overwrite: bool, device: str
) -> dict[str, Any]:
    """Build a bundle of plans; return its report.

    Raises:
        MissingDependencyError: TensorRT, cuda-python or a GPU is missing; before any work.
        GateError: the plans are not what was asked, or answer otherwise; nothing is kept.
        VmoeError: TensorRT cannot build a part.
    """
    at = plans.here(device, settings)
    gpu = "cuda:0" if device == "auto" else device
    with output.whole_folder(out, overwrite=overwrite) as folder:
        made, gates = plans.write(source, folder, settings, at)
        _plan.note(part.hashes[part.file] for part in made.parts.values())
        compared = _agrees(source, folder, gpu, settings)
        gates += compared
        for gate in gates:
            log.info("%s", gate.line())
        refuse(gates, "Nothing was kept.")
        known = source.report()
        said = {
            **{key: value for key, value in known.items() if key in KEPT},
            "of_onnx": {key: value for key, value in known.items() if key in OF_ONNX},
            "gates": [gate.to_report() for gate in gates],
            "built_on": at.machine.to_json(),
            **({REPORTED: {"tensorrt": {"ok": True, "device": gpu}}} if compared else {}),
            "versions": made.versions,
        }
        output.write_json(folder / bundles.REPORT, said)
    plain: dict[str, Any] = report.plain(said)
    return plain


KEPT = ("model", "lowering", "calibration", "flops_per_clip")  # as true of plans
OF_ONNX = ("clean", "robust")  # measured on the ONNX: nobody looked whether the plans hold them


def _agrees(source: bundles.Bundle, folder: Path, gpu: str, settings: BuildSettings) -> list[Gate]:
    why = agreement.why_unavailable()
    if why:
        log.warning("the plans are not compared with their ONNX: %s", why)
        return []
    return agreement.compare(source, folder, gpu, tf32=settings.tf32).gates()


if __name__ == "__main__":
    main()
