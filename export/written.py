"""A bundle's folder: parts and manifest, the same bytes for the same plan; and its report."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onnx import ModelProto

import vmoe
from vmoe import bundle as bundles
from vmoe import checkpoint, registry
from vmoe.bundle import Bundle, Part
from vmoe.errors import VmoeError
from vmoe.models import flops
from vmoe.runtime.online import FORM, ONLINE
from vmoe.settings import to_mapping

from . import optimize, precision
from .onnx import Parts, write_part
from .plan import LOWERINGS, ExportSettings, Plan, calibration_of
from .verify import Verdict


def write(plan: Plan, parts: Parts, folder: Path, plain: Parts | None = None) -> Bundle:
    """Lower a twin's graphs as planned, and write them with their manifest into a folder.

    The same bytes for the same twin, plan and versions.

    Args:
        plan: what is to be exported.
        parts: the graphs as they are run.
        folder: where.
        plain: the same as the exporter gave them: what other engines read, unless in int8.

    Raises:
        VmoeError: the twin's file is not the one that was read any more.
    """
    lowering = registry.load(LOWERINGS, plan.settings.lowering, "lowering (--lowering)")
    given = parts if plain is None or plan.settings.int8 else plain
    others = lowering.others(*given) if hasattr(lowering, "others") else {}
    for apply in optimize.TENSORRT:  # the one engine that has files of its own
        for model in others.values():
            apply(model.graph)
    bundle = _manifest(
        plan,
        folder,
        {name: _part(plan, g, folder, name) for name, g in lowering.lower(*parts).items()},
        {name: _part(plan, g, folder, f"moe-{name}") for name, g in others.items()},
    )
    bundles.write_manifest(bundle, folder)
    return bundle


def _part(plan: Plan, model: ModelProto, folder: Path, name: str) -> Part:
    """Write one part; its entry says what was asked of its layers, and what they are."""
    part = write_part(optimize.finish(model), folder, name)
    proof = precision.prove(model, name, plan.settings)
    said = {"asked": precision.text(proof.asked), "found": precision.text(proof.found)}
    return replace(
        part, precision={key: text or "none" for key, text in said.items()},
        layers=proof.found, tensors=proof.tensors,
    )  # fmt: skip


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
        extra=_extra(plan.settings),
    )


def _extra(settings: ExportSettings) -> dict[str, str]:
    found = {"weights": "random"} if settings.counterpart else {}
    return found | ({FORM: ONLINE} if settings.form == ONLINE else {})


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
    if plan.file is not None and entry["sha256"] != plan.sha256:
        raise VmoeError(
            f"{plan.file} has changed since it was read: the bundle would carry another twin than "
            "the one that was exported. Export again once it is written."
        )
    if plan.file is not None and plan.settings.twin:
        return entry | {"file": inside.name}
    inside.unlink()
    return entry


def report(
    plan: Plan, bundle: Bundle, verdict: Verdict, seconds: dict[str, float]
) -> dict[str, Any]:
    """Return what report.json says: what was measured, and with what."""
    cost = flops.count(plan.checkpoint.twin)
    sizes = {path.name: path.stat().st_size for path in sorted(bundle.path.iterdir())}
    return {
        "model": bundle.model,
        "lowering": bundle.lowering,
        **bundle.extra,
        **verdict.report,
        "calibration": calibration_of(plan),
        "verified_on": plan.settings.verify_data or "camera-motion and noise",
        "seed": plan.seed,
        "flops_per_clip": {
            "router": cost.router, "expert": cost.expert, "moe": cost.moe,
            "dense_counterpart": cost.dense, "saved": cost.saved,
        },
        "seconds": seconds,
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
