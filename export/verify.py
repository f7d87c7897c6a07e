"""A written bundle against its twin: every gate on every backend, and what report.json says of it.

The bundle is judged by the first backend here that answers it. On every other one the same gates
are measured, with the same clips: a backend that fails one is reported as not verified, which
`--backend auto` never takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from vmoe import registry
from vmoe.bundle import Bundle
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips
from vmoe.errors import VmoeError
from vmoe.runtime import Engine, load
from vmoe.runtime.backends import ENGINES, REPORTED
from vmoe.runtime.engines import TWIN
from vmoe.runtime.online import is_online

from . import accuracy, executed, latency, online, parity, routed, sparsity
from .accuracy import Adversarial, Sample
from .executed import Executed
from .gates import Gate, GateSettings, judged_as
from .parity import Findings, Reference
from .precision import PrecisionSettings, Proof, prove

log = logging.getLogger("vmoe.export")

FRAME_BY_FRAME = 16  # clips of the online form
ROUTER = "router"  # its place in the twin
NAMED = 3  # how many layers a message names


@dataclass(frozen=True)
class VerifySettings(GateSettings, PrecisionSettings):
    """What a verification needs to know of a plan of export."""


@dataclass(frozen=True)
class Verdict:
    """What was measured of a bundle.

    Attributes:
        gates: all of them, on the backend that the bundle is judged by.
        findings: parity and routes there; None where no backend answers the bundle.
        report: for report.json.
    """

    gates: tuple[Gate, ...]
    findings: Findings | None
    report: dict[str, Any]


class Judged(NamedTuple):
    """What was measured on one backend.

    Attributes:
        gates: of what it answers, what that costs, and what it runs in.
        findings: parity and routes.
        report: what else was found.
        ran: what the backend makes of each part's layers, of int8.
    """

    gates: list[Gate]
    findings: Findings
    report: dict[str, Any]
    ran: dict[str, Executed]


@dataclass
class Case:
    """A bundle to be judged.

    Attributes:
        held: the twin and what is known of it, on the device of the check.
        bundle: as written.
        sample: clips, labelled where they can be.
        settings: the bounds.
        device: cpu or cuda:N.
        seed: of what is drawn.
        write_split: writes the same model as a split bundle into a folder.
        tf32: whether the engine may round fp32 layers to it.
        known: what the twin said of the clips so far, so that it is asked once.
    """

    held: Checkpoint
    bundle: Bundle
    sample: Sample
    settings: VerifySettings
    device: str
    seed: int
    write_split: Callable[[Path], object]
    tf32: bool = False
    known: Reference | None = None

    @property
    def judged_as(self) -> tuple[str, str]:
        """By the bounds of which precisions experts and router are judged."""
        asked = self.settings.precision, self.settings.asked(ROUTER)
        experts, router = (judged_as(each, tf32=self.tf32) for each in asked)
        return experts, router

    @cached_property
    def proofs(self) -> list[Proof]:
        """What the parts' layers are stored in, and what was asked."""
        folder = self.bundle.path
        return [
            prove(onnx.load(folder / part.file, load_external_data=False), name, self.settings)
            for name, part in self.bundle.parts.items()
        ]

    @cached_property
    def adversarial(self) -> list[Adversarial]:
        """Clips that were made on the twin, once for all backends."""
        settings = self.settings
        if settings.robust is not None:
            return accuracy.given(self.held, settings.robust, self.bundle.twin["sha256"])
        fp32 = settings.precision == "fp32"
        count = accuracy.ATTACKED if fp32 else accuracy.ATTACKED_BELOW_FP32
        if settings.robust_clips is not None:
            count = settings.robust_clips
        return accuracy.attack(self.held, self.sample, count, self.seed) if count else []


def verify(case: Case) -> Verdict:
    """Judge a bundle by every gate.

    Raises:
        SettingError: adversarial clips that are not this twin's.
    """
    written = _written(case.proofs)
    asked = {p.part: {"asked": p.asked, "found": p.found, "tensors": p.tensors}
             for p in case.proofs}  # fmt: skip
    with ExitStack() as stack:
        engines, why_not = _open_all(stack, case.bundle, case.device)
        judged: dict[str, Judged] = {}
        for name in list(engines):
            try:
                judged[name] = judge(case, engines[name])
            except VmoeError as e:
                why_not[name] = _said(e, case.bundle)
                del engines[name]
        said = {REPORTED: _backends(case, judged, why_not)}
    if not judged:
        reasons = "; ".join(f"{name}: {why}" for name, why in why_not.items()) or "none is here"
        gates = [Gate("backend", f"backends here that run it ({reasons})", 0, 1, least=True)]
        return _verdict([*gates, written], None, {"precision": asked, **said})
    first = next(iter(judged.values()))
    said |= {"precision": asked, **first.report}
    return _verdict([*first.gates, *_of_others(case), written], first.findings, said)


def _of_others(case: Case) -> list[Gate]:
    """Judge the file that only TensorRT reads; nothing where there is none."""
    part = case.bundle.others.get("tensorrt")
    if part is None or case.known is None:
        return []
    return routed.gates(case.bundle.path / part.file, case.held.twin, case.sample.clips,
                        case.settings, case.judged_as, case.known)  # fmt: skip


def _verdict(gates: Sequence[Gate], found: Findings | None, report: dict[str, Any]) -> Verdict:
    return Verdict(tuple(gates), found, {"gates": [g.to_report() for g in gates], **report})


def judge(case: Case, engine: Engine) -> Judged:
    """Measure a bundle on one backend, by every gate."""
    settings, clips = case.settings, case.sample.clips
    found = parity.check(case.held.twin, engine, clips, settings, *case.judged_as, case.known)
    case.known = found.reference
    gates, report = [*found.gates], parity.to_report(found)
    if is_online(case.bundle):
        gates.append(_frame_by_frame(engine, clips[:FRAME_BY_FRAME], found))
    if case.bundle.extra.get("weights") != "random":  # which have no accuracy to lose
        judged, said = accuracy.clean(found, case.sample, settings)
        gates.append(judged)
        report |= said
        if case.adversarial:
            judged, said = accuracy.robust(case.adversarial, engine, settings)
            gates.append(judged)
            report |= said
    if case.bundle.experts > 1:
        sparse, said = sparsity.judge(
            case.bundle.path, case.bundle.lowering, engine.backend_name, case.device,
            case.write_split, settings, case.seed,
        )  # fmt: skip
        gates += [sparse] if sparse else []
        report |= said
    ran = executed.on(engine.backend_name, case.bundle) if settings.int8 else {}
    if ran and settings.int8_form == "u8s8":  # s8s8 is for TensorRT: a CPU's own choice is said
        gates.append(executed.gate(engine.backend_name, case.proofs, ran))
    return Judged(gates, found, report, ran)


def _frame_by_frame(engine: Engine, clips: Clips, found: Findings) -> Gate:
    """Compare clips that come frame by frame with the same clips whole."""
    bound = next(gate.bound for gate in found.gates if gate.name == "parity")
    return Gate("parity", "max |d logits| frame by frame", online.error(engine, clips), bound)


def _open_all(
    stack: ExitStack, bundle: Bundle, device: str
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Load a bundle on every backend that is here; return why others cannot run it."""
    engines: dict[str, Engine] = {}
    why_not: dict[str, str] = {}
    formats = {part.format for part in bundle.parts.values()}
    kind = device.partition(":")[0]
    for name in registry.names(ENGINES):
        module = registry.load(ENGINES, name, "backend")
        reads = formats <= set(module.FORMATS) and TWIN not in module.FORMATS
        if not reads or kind not in module.DEVICES or module.why_unavailable():
            continue
        try:
            engine = stack.enter_context(load(bundle.path, name, device, all_parts=True))
            engine.infer(np.zeros((1, *bundle.spec.shape), np.uint8))
            engines[name] = engine
        except VmoeError as e:
            why_not[name] = _said(e, bundle)
            log.debug("%s: %s", name, e)
    return engines, why_not


def _said(e: VmoeError, bundle: Bundle) -> str:
    return str(e).removeprefix(f"{bundle.path}/").rstrip(".")


def _backends(
    case: Case, judged: Mapping[str, Judged], why_not: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return what is said of every backend: its gates, and what one clip costs on it."""
    said: dict[str, dict[str, Any]] = {}
    clip = case.sample.clips[:1]
    took = latency.measure(case.bundle, judged, case.device, clip) if judged else {}
    for i, (name, of) in enumerate(judged.items()):
        refused = "; ".join(gate.refusal() for gate in of.gates if not gate.ok)
        said[name] = {
            "ok": not refused, **took[name], **({"why": refused} if refused else {}),
            "gates": [gate.to_report() for gate in of.gates],
            **({"runs_as": {p: r.to_report() for p, r in of.ran.items()}} if of.ran else {}),
        }  # fmt: skip
        if refused and i:  # of the first, the bundle itself is refused
            log.warning("not verified for backend %s: %s", name, refused)
    for name, why in why_not.items():
        said[name] = {"ok": False, "device": case.device, "why": why}
    return said


def _written(proofs: Sequence[Proof]) -> Gate:
    """Judge what stands in the graphs."""
    differs = [place for proof in proofs for place in proof.differs]
    shown = f" ({', '.join(differs[:NAMED])})" if differs else ""
    return Gate("precision", f"layers that are not as asked{shown}", len(differs), 0)


@contextmanager
def on_device(held: Checkpoint, device: str) -> Iterator[None]:
    """Move a twin to where it is compared, and back."""
    try:
        held.twin.to(device)
        yield
    finally:
        held.twin.to("cpu")
