"""From a checkpoint to a bundle: export, lower, write, load it again, check, and only then keep."""

from __future__ import annotations

import logging
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import vmoe
from vmoe import bundle as bundles
from vmoe import checkpoint, output, registry
from vmoe.bundle import Bundle, Part
from vmoe.checkpoint import Checkpoint
from vmoe.errors import SettingError
from vmoe.models import build, dense_counterpart, flops
from vmoe.runtime import load
from vmoe.settings import opt, to_mapping

from . import gates
from .gates import Findings, GateSettings
from .onnx import OPSETS, Parts, from_twin, write_part

log = logging.getLogger("vmoe.export")

LOWERINGS = "vmoe.export.lowerings"


@dataclass(frozen=True)
class ExportSettings(GateSettings):
    """One plan of export."""

    lowering: str = opt("split", "how routing is deployed: split (host routes) or if (one file)")
    opset: int = opt(20, "version of the ONNX operators", at_least=OPSETS[0],
                     at_most=OPSETS[1])  # fmt: skip
    twin: bool = opt(True, "carry the twin in the bundle, for attacks on what was deployed")
    verify_data: str | None = opt(None, "data set of the check; default: camera motion and noise")
    group: str | None = opt(
        None, "regular expression that splits --verify-data; default: as the twin was trained"
    )
    name: str | None = opt(None, "the model's name; default: as the checkpoint is called")
    counterpart: bool = opt(
        False, "the dense counterpart with random weights instead, to compare latency"
    )

    def __post_init__(self) -> None:
        """Check every value; a lowering is a file of its folder, a name can name a folder."""
        super().__post_init__()
        registry.load(LOWERINGS, self.lowering, "lowering (--lowering)")
        if self.group is not None and self.verify_data is None:
            raise SettingError("--group splits --verify-data: give that too, or leave it out.")
        if self.name is not None and not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise SettingError(
                f"--name is {self.name!r}; use letters, digits and . _ + - only, to name a folder."
            )


class Exported(NamedTuple):
    """What an export made.

    Attributes:
        bundle: the manifest, at its final place.
        report: what stands in report.json.
        findings: what the gates measured.
    """

    bundle: Bundle
    report: dict[str, Any]
    findings: Findings


@dataclass
class Stages:
    """How long each stage took, in seconds, and a line for each."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, line: str) -> Iterator[None]:
        """Time the body as one stage."""
        begin = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begin, 3)
        log.info("%-8s %s (%.1f s)", name, line, self.seconds[name])


@dataclass(frozen=True)
class Plan:
    """What is to be exported.

    Attributes:
        checkpoint: the twin, its labels and provenance.
        file: where the twin lies; None where it was made here, from a seed.
        name: the model's name.
        settings: how.
        seed: of random weights and of the clips of the check.
    """

    checkpoint: Checkpoint
    file: Path | None
    name: str
    settings: ExportSettings
    seed: int = 0

    @property
    def default_out(self) -> Path:
        """Where the bundle goes if nothing is said."""
        return Path("runs/export") / f"{self.name}-{self.settings.lowering}"


def plan(path: Path, settings: ExportSettings, seed: int = 0) -> Plan:
    """Read a checkpoint, and decide what is to be exported.

    Raises:
        VmoeError: the checkpoint (or the bundle around it) is missing, damaged, or a pickle.
        SettingError: the counterpart of a model that is dense already.
    """
    held = checkpoint.load(path)
    name = settings.name or _name(path)
    if not settings.counterpart:
        return Plan(held, path, name, settings, seed)
    wider = dense_counterpart(held.twin.settings)
    twin = build(wider, held.twin.spec, seed).eval()
    recipe = {"weights": "random", "seed": seed}
    name = settings.name or f"{name}-dense"
    return Plan(Checkpoint(twin, held.labels, recipe), None, name, settings, seed)


def _name(path: Path) -> str:
    """Return what a model is called: as its bundle says, or its file, or the file's folder."""
    plain = path.resolve()
    said = plain.parent.name if plain.stem in ("best", "last", "twin") else plain.stem
    if plain.name == bundles.TWIN and plain.with_name(bundles.MANIFEST).is_file():
        said = str(bundles.read(plain.parent).model.get("name", said))
    return re.sub(r"[^\w.+-]+", "-", said).strip("-.+") or "model"


def export(
    path: Path | str,
    out: Path | str,
    settings: ExportSettings | None = None,
    *,
    overwrite: bool = False,
    seed: int = 0,
) -> Exported:
    """Export a checkpoint to a bundle that passed its gates.

    Args:
        path: the checkpoint.
        out: the bundle's folder; it is there whole, or not at all.
        settings: the plan; default: ONNX, fp32, split.
        overwrite: replace a bundle that is there.
        seed: of the clips of the check, and of a counterpart's weights.

    Raises:
        VmoeError: as `plan` and `run` say.
    """
    output.refuse_existing(Path(out), overwrite=overwrite)
    made = plan(Path(path), settings or ExportSettings(), seed)
    return run(made, Path(out), overwrite=overwrite)


def run(plan: Plan, out: Path, *, overwrite: bool = False) -> Exported:
    """Carry a plan out.

    Raises:
        SettingError: `out` exists, or the data of the check cannot be read.
        GateError: a gate refused the bundle; nothing is left of it.
        OutputError: the disk is full; nothing is left of it.
    """
    output.refuse_existing(out, overwrite=overwrite)
    settings, twin = plan.settings, plan.checkpoint.twin
    stages = Stages()
    with stages.stage("clips", "to check the bundle with"):
        group = plan.checkpoint.group if settings.group is None else settings.group
        clips = gates.clips_for(twin.spec, settings.verify_data, plan.seed, group)
    with stages.stage("onnx", f"{len(twin.experts)} expert(s), opset {settings.opset}"):
        parts = from_twin(twin, settings.opset)
    with output.whole_folder(out, overwrite=overwrite) as folder:
        with stages.stage("write", f"lowering {settings.lowering}"):
            bundle = write(plan, parts, folder)
        checking = stages.stage("check", f"against the twin on {len(clips)} clips")
        with checking, load(folder, device="cpu") as engine:
            found = gates.check(twin, engine, clips, settings)
        for gate in found.gates:
            log.info("%s", gate.line())
        found.refuse()
        report = _report(plan, folder, bundle, found, stages)
        output.write_json(folder / bundles.REPORT, report)
    return Exported(bundles.read(out), report, found)


def write(plan: Plan, parts: Parts, folder: Path) -> Bundle:
    """Lower a twin's graphs as planned, and write them with their manifest into a folder.

    The same bytes for the same twin, plan and versions.
    """
    lowering = registry.load(LOWERINGS, plan.settings.lowering, "lowering (--lowering)")
    graphs = lowering.lower(*parts)
    made = {name: write_part(graph, folder, name) for name, graph in graphs.items()}
    others = lowering.others(*parts) if hasattr(lowering, "others") else {}
    beside = {name: write_part(graph, folder, f"moe-{name}") for name, graph in others.items()}
    bundle = _manifest(plan, folder, made, beside)
    bundles.write_manifest(bundle, folder)
    return bundle


def _manifest(plan: Plan, folder: Path, parts: dict[str, Part], others: dict[str, Part]) -> Bundle:
    twin = plan.checkpoint.twin
    return Bundle(
        path=folder,
        model={"name": plan.name, **to_mapping(twin.settings)},
        spec=twin.spec,
        labels=plan.checkpoint.labels,
        lowering=plan.settings.lowering,
        parts=parts,
        others=others,
        twin=_twin(plan, folder),
        versions={
            "vmoe": vmoe.__version__,
            **{tool: version(tool) for tool in ("torch", "onnx", "onnxscript")},
            "opset": str(plan.settings.opset),
        },
        extra={"weights": "random"} if plan.settings.counterpart else {},
    )


def _twin(plan: Plan, folder: Path) -> dict[str, str]:
    """Put the twin into the bundle where it is wanted; return its entry in the manifest.

    Random weights are never carried: a seed makes them again, and nobody attacks them.
    """
    inside = folder / bundles.TWIN
    if plan.file is None:
        checkpoint.save(plan.checkpoint, inside)
    else:
        inside.write_bytes(plan.file.read_bytes())
    entry = {"sha256": bundles.sha256(inside)}
    if plan.file is not None and plan.settings.twin:
        return entry | {"file": inside.name}
    inside.unlink()
    return entry


def _report(
    plan: Plan, folder: Path, bundle: Bundle, found: Findings, stages: Stages
) -> dict[str, Any]:
    cost = flops.count(plan.checkpoint.twin)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {
        "model": bundle.model,
        "lowering": bundle.lowering,
        **bundle.extra,
        **gates.to_report(found),
        "verified_on": plan.settings.verify_data or "camera-motion and noise",
        "seed": plan.seed,
        "flops_per_clip": {
            "router": cost.router, "expert": cost.expert, "moe": cost.moe,
            "dense_counterpart": cost.dense, "saved": cost.saved,
        },
        "seconds": stages.seconds,
        "size_bytes": sizes,
        "versions": {
            **bundle.versions, "numpy": version("numpy"), **_runtime(),
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
    }  # fmt: skip


def _runtime() -> dict[str, str]:
    """Return the package that ran the check; both flavours are imported by one name."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return {package: version(package)}
        except PackageNotFoundError:
            continue
    return {}
