"""From a checkpoint to a bundle: export, lower, write, load it again, check, and only then keep.

A bundle that a gate refuses stays beside its place as NAME.rejected, with its report.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from onnx import ModelProto

from vmoe import bundle as bundles
from vmoe import checkpoint, output
from vmoe.bundle import Bundle
from vmoe.errors import VmoeError
from vmoe.latest import REJECTED
from vmoe.runtime.online import ONLINE

from . import accuracy, bisect, calibration, half, lowerable, online, optimize, precision, verify
from .accuracy import Sample
from .gates import Gate, refuse
from .onnx import Parts, from_twin
from .optimize import Choice
from .parity import Findings
from .plan import LOWERINGS, ExportSettings, Plan, plan
from .quantise import quantise
from .verify import Verdict
from .written import report, write

__all__ = [
    "LOWERINGS",
    "ExportSettings",
    "Exported",
    "Plan",
    "export",
    "graphs",
    "plan",
    "run",
    "write",
]

log = logging.getLogger("vmoe.export")

INT8_FORMS = ("joined", "flat")  # of --optimize auto
BISECTED = 16  # clips that --bisect runs


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


class Made(NamedTuple):
    """A twin's graphs as they will be lowered.

    Attributes:
        parts: in the precision and form that was asked.
        plain: as the exporter gave them; the same object where nothing was changed.
        choice: the form of the experts, and why.
    """

    parts: Parts
    plain: Parts
    choice: Choice


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


def export(
    path: Path | str,
    out: Path | str,
    settings: ExportSettings | None = None,
    *,
    overwrite: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Exported:
    """Export a checkpoint to a bundle that passed its gates.

    Args:
        path: the checkpoint.
        out: the bundle's folder; it is there whole, or not at all.
        settings: the plan; default: ONNX, fp32, split.
        overwrite: replace a bundle that is there.
        seed: of the clips of the check, and of a counterpart's weights.
        device: where it is checked.

    Raises:
        VmoeError: as `plan` and `run` say.
    """
    output.refuse_existing(Path(out), overwrite=overwrite)
    made = plan(Path(path), settings or ExportSettings(), seed)
    return run(made, Path(out), overwrite=overwrite, device=device)


def check(plan: Plan) -> None:
    """Refuse, before any work, what would else be told in the middle of it.

    Raises:
        VmoeError: an expression that keeps nothing or everything, calibration clips that cannot be
            had or are called as another split, adversarial clips that are not this twin's.
    """
    settings, held = plan.settings, plan.checkpoint
    precision.check(held.twin, settings)
    if settings.int8:
        calibration.opened(held, settings)
    if settings.robust is not None:
        accuracy.saved(held, settings.robust, plan.sha256)


def run(plan: Plan, out: Path, *, overwrite: bool = False, device: str = "cpu") -> Exported:
    """Carry a plan out.

    Args:
        plan: what is to be exported.
        out: the bundle's folder.
        overwrite: replace a bundle that is there.
        device: where it is checked: cpu (auto is that too) or cuda:N.

    Raises:
        SettingError: `out` exists, no such device is here, the data of the check cannot be read,
            the twin holds a layer that cannot be exported, or as `check` says.
        GateError: a gate refused the bundle, which is kept beside `out` as NAME.rejected.
        OutputError: the disk is full; nothing is left of it.
    """
    rejected = out.with_name(out.name + REJECTED)
    output.refuse_existing(out, overwrite=overwrite)
    output.refuse_existing(rejected, overwrite=True)
    output.probe(out)
    settings, held = plan.settings, plan.checkpoint
    device = "cpu" if device == "auto" else str(checkpoint.device(device))
    optimize.check()
    check(plan)
    stages = Stages()
    with stages.stage("clips", "to check the bundle with"):
        sample = sample_of(plan)
    with stages.stage("onnx", f"{len(held.twin.experts)} expert(s), opset {settings.opset}"):
        made = graphs(plan)
    with output.whole_folder(out, overwrite=overwrite) as folder:
        with stages.stage("write", f"lowering {settings.lowering}, {settings.precision}"):
            bundle = write(plan, made.parts, folder, made.plain)
        with stages.stage("check", f"against the twin on {len(sample.clips)} clips"):
            verdict = _judge(plan, made, bundle, sample, device)
        said = report(plan, bundle, verdict, stages.seconds)
        said |= _bisected(plan, made, verdict, sample)
        said["optimize"] = made.choice.to_report()
        settle(folder, rejected, said, verdict.gates, len(sample.clips))
    assert verdict.findings is not None  # else it was refused
    return Exported(bundles.read(out), said, verdict.findings)


def settle(
    folder: Path, rejected: Path, said: Mapping[str, Any], gates: Sequence[Gate], clips: int
) -> None:
    """Write a bundle's report; keep a bundle that a gate refuses beside its place, and say why.

    Raises:
        GateError: a gate refuses it.
    """
    for gate in gates:
        log.info("%s", gate.line())
    output.write_json(folder / bundles.REPORT, said)
    if not all(gate.ok for gate in gates):
        with output.whole_folder(rejected, overwrite=True) as kept:
            shutil.copytree(folder, kept, dirs_exist_ok=True)
    refuse(gates, f"It was measured on {clips} clips, and is kept as {rejected}.")


def sample_of(plan: Plan) -> Sample:
    """Return the clips of the check: more of them where answers may differ."""
    settings, held = plan.settings, plan.checkpoint
    default = accuracy.CLIPS if settings.precision == "fp32" else accuracy.CLIPS_BELOW_FP32
    return accuracy.sample(
        held.twin.spec,
        held.labels,
        settings.verify_data,
        plan.seed,
        held.group if settings.group is None else settings.group,
        settings.verify_clips or default,
        held.fold,
    )


def graphs(plan: Plan) -> Made:
    """Export a twin's parts in the precision and form that a plan asks for.

    Raises:
        SettingError: a layer that cannot be exported, by its place; or calibration clips that
            cannot be had.
    """
    settings, twin = plan.settings, plan.checkpoint.twin
    calibrating = settings.int8 and calibration.clips_for(plan.checkpoint, settings, plan.seed)
    try:
        if settings.form == ONLINE:
            parts = online.from_twin(twin, settings.opset)
            return Made(parts, parts, Choice(settings.optimize, "none", {}, {}))
        if settings.precision in half.DTYPES:
            parts = half.export(twin, settings, settings.opset)
            return Made(parts, parts, Choice(settings.optimize, "none", {}, {}))
        plain = from_twin(twin, settings.opset)
    except VmoeError:
        raise
    except Exception as e:  # the exporter's errors share no base class but Exception
        raise lowerable.explain(twin, settings.opset, e) from e
    experts, choice = _experts(plain.experts, settings)
    if calibrating is False:
        return Made(Parts(plain.router, experts), plain, choice)
    router = plain.router and quantise(plain.router, "router", calibrating, settings)
    quantised = [
        quantise(expert, f"expert{i}", calibrating, settings) for i, expert in enumerate(experts)
    ]
    return Made(Parts(router, quantised), plain, choice)


def _experts(
    plain: Sequence[ModelProto], settings: ExportSettings
) -> tuple[list[ModelProto], Choice]:
    """Return the experts in the form that is asked.

    That of int8 is known without measuring: the first of INT8_FORMS that there is of them; of
    s8s8, which is for TensorRT, the plain one.
    """
    asked = settings.optimize
    if not settings.int8 or asked != optimize.AUTO:
        made, choice = optimize.choose(plain, asked)
        if asked not in (optimize.AUTO, choice.form):
            log.warning("--optimize %s is not for these experts: they stay as exported", asked)
        return made, choice
    for form in (*INT8_FORMS, "none") if settings.int8_form == "u8s8" else ("none",):
        made, choice = optimize.choose(plain, form)
        if choice.form == form:
            break
    return made, choice._replace(asked=asked)


def _judge(plan: Plan, made: Made, bundle: Bundle, sample: Sample, device: str) -> Verdict:
    alone = replace(plan, settings=replace(plan.settings, lowering="split"))
    with verify.on_device(plan.checkpoint, device):
        return verify.verify(verify.Case(
            plan.checkpoint, bundle, sample, plan.settings, device, plan.seed,
            lambda folder: write(alone, made.parts, folder),
        ))  # fmt: skip


def _bisected(plan: Plan, made: Made, verdict: Verdict, sample: Sample) -> dict[str, Any]:
    """Name the part, the block and the layer that break parity, where asked and needed."""
    settings = plan.settings
    broken = any(not gate.ok for gate in verdict.gates if gate.name.startswith("parity"))
    if not settings.bisect or not broken:
        return {}
    router = settings.asked(verify.ROUTER)
    bounds = {"experts": settings.precision, "router": router}
    found = bisect.find(
        plan.checkpoint.twin, made.plain, made.parts, sample.clips[:BISECTED],
        {kind: settings.parity(precision)[0] for kind, precision in bounds.items()},
    )  # fmt: skip
    log.info("%s", found.line())
    return {"bisect": found.to_report()}
