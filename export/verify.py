"""A written bundle against its twin: every gate, and what report.json says of it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vmoe import registry
from vmoe.bundle import Bundle
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips
from vmoe.errors import GateError, VmoeError
from vmoe.runtime import Engine, load
from vmoe.runtime.backends import ENGINES, REPORTED
from vmoe.runtime.engines import TWIN
from vmoe.runtime.online import is_online

from . import accuracy, latency, layers, online, parity, sparsity
from .accuracy import Sample
from .gates import Gate, GateSettings
from .layers import twin_place
from .parity import Findings
from .precision import PrecisionSettings, Proof, prove

log = logging.getLogger("vmoe.export")

CLIPS_OTHERS = 16  # that a second backend is checked on
NAMED = 3  # how many layers a message names


@dataclass(frozen=True)
class VerifySettings(GateSettings, PrecisionSettings):
    """What a verification needs to know of a plan of export."""


@dataclass(frozen=True)
class Verdict:
    """What was measured of a bundle.

    Attributes:
        gates: all of them.
        findings: parity and routes, on the first backend that runs the bundle.
        report: for report.json.
    """

    gates: tuple[Gate, ...]
    findings: Findings
    report: dict[str, Any]


def verify(
    held: Checkpoint,
    bundle: Bundle,
    sample: Sample,
    settings: VerifySettings,
    *,
    device: str,
    seed: int,
    write_split: Callable[[Path], object],
) -> Verdict:
    """Judge a bundle by every gate.

    Args:
        held: the twin and what is known of it, on the device of the check.
        bundle: as written.
        sample: clips, labelled where they can be.
        settings: the bounds.
        device: cpu or cuda:N.
        seed: of what is drawn.
        write_split: writes the same model as a split bundle into a folder.

    Raises:
        GateError: no backend here can run the bundle.
        SettingError: adversarial clips that are not this twin's.
    """
    asked = settings.precision
    router = "fp32" if settings.keeps(twin_place("router")) else asked
    random = bundle.extra.get("weights") == "random"
    with ExitStack() as stack:
        engines, why_not = _open_all(stack, bundle, device)
        first = next(iter(engines.values()))
        found = parity.check(held.twin, first, sample.clips, settings, asked, router)
        gates = [*found.gates]
        if is_online(bundle):
            gates.append(_frame_by_frame(first, sample.clips[:CLIPS_OTHERS], found))
        report = parity.to_report(found)
        if not random:  # no accuracy to lose
            gate, said = accuracy.clean(found, sample, settings)
            gates.append(gate)
            report |= said
            if count := _attacked(settings, asked):
                gate, said = accuracy.robust(held, first, sample, settings, count, seed)
                gates.append(gate)
                report |= said
        own = all(gate.ok for gate in found.gates)
        few = sample.clips[:CLIPS_OTHERS]
        report[REPORTED] = {
            **_backends(held, engines, few, settings, own, (asked, router), device),
            **{name: {"ok": False, "device": device, "why": why} for name, why in why_not.items()},
        }
    if bundle.experts > 1:
        judged, said = sparsity.judge(
            bundle.path, bundle.lowering, first.backend_name, device, write_split, settings, seed
        )
        gates += [judged] if judged else []
        report |= said
    proofs = [
        prove(onnx.load(bundle.path / part.file, load_external_data=False), name, settings)
        for name, part in bundle.parts.items()
    ]
    ran = _runs_as(bundle) if asked != "fp32" else {}
    gates += _of_precision(proofs, ran, settings)
    report["precision"] = {
        proof.part: {
            "asked": proof.asked, "found": proof.found, "tensors": proof.tensors,
            "onnxruntime_runs": ran.get(proof.part),
        }
        for proof in proofs
    }  # fmt: skip
    return Verdict(tuple(gates), found, {"gates": [g.to_report() for g in gates], **report})


def _frame_by_frame(engine: Engine, clips: Clips, found: Findings) -> Gate:
    """Compare clips that come frame by frame with the same clips whole."""
    bound = next(gate.bound for gate in found.gates if gate.name == "parity")
    return Gate("parity", "max |d logits| frame by frame", online.error(engine, clips), bound)


def _attacked(settings: VerifySettings, precision: str) -> int:
    """Return how many clips the gate `robust` attacks; a folder of them counts as some."""
    if settings.robust is not None:
        return 1
    if settings.robust_clips is not None:
        return settings.robust_clips
    return accuracy.ATTACKED if precision == "fp32" else accuracy.ATTACKED_BELOW_FP32


def _open_all(
    stack: ExitStack, bundle: Bundle, device: str
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Load a bundle on every backend that is here; return why others cannot run it.

    Raises:
        GateError: none can.
    """
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
            why_not[name] = str(e).removeprefix(f"{bundle.path}/")
            log.debug("%s: %s", name, e)
    if not engines:
        reasons = "; ".join(f"{name}: {why}" for name, why in why_not.items()) or "none is here"
        raise GateError(f"no backend here runs this bundle, so that nothing is proven: {reasons}")
    return engines, why_not


def _backends(
    held: Checkpoint,
    engines: dict[str, Engine],
    clips: Clips,
    settings: VerifySettings,
    first_ok: bool,
    precisions: tuple[str, str],
    device: str,
) -> dict[str, dict[str, Any]]:
    """Check every backend, and measure one clip on each; the first is checked already."""
    ok: dict[str, bool] = {}
    for i, (name, engine) in enumerate(engines.items()):
        if not i:
            ok[name] = first_ok
            continue
        found = parity.check(held.twin, engine, clips, settings, *precisions)
        ok[name] = all(gate.ok for gate in found.gates)
        if not ok[name]:
            why = "; ".join(gate.refusal() for gate in found.gates if not gate.ok)
            log.warning("not verified for backend %s: %s", name, why)

    bundle = next(iter(engines.values())).bundle
    took = latency.measure(bundle, engines, device, clips[:1])
    return {name: {"ok": ok[name], **took[name]} for name in engines}


def _of_precision(
    proofs: Sequence[Proof], ran: dict[str, dict[str, int]], settings: PrecisionSettings
) -> Iterator[Gate]:
    """Yield the gate `precision`, of what stands in the graphs and of what ONNX Runtime runs."""
    differs = [place for proof in proofs for place in proof.differs]
    shown = f" ({', '.join(differs[:NAMED])})" if differs else ""
    yield Gate("precision", f"layers that are not as asked{shown}", len(differs), 0)
    if settings.precision == "int8" and settings.int8_form == "u8s8" and ran:
        missed = [proof.asked.get("int8", 0) - ran[proof.part].get("int8", 0) for proof in proofs]
        what = "int8 layers that ONNX Runtime runs in float"
        yield Gate("precision", what, max(0, sum(missed)), 0)


def _runs_as(bundle: Bundle) -> dict[str, dict[str, int]]:
    """Count what ONNX Runtime makes of each part's layers on this CPU; empty where it cannot."""
    import onnxruntime

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in bundle.parts.items():
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
            try:
                onnxruntime.InferenceSession(
                    str(bundle.path / part.file), options, providers=["CPUExecutionProvider"]
                )
            except Exception as e:  # ORT's errors share no base class but Exception
                log.debug("%s: %s", name, e)
                return {}
            optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
            found[name] = layers.runs_as(optimised)
    return found


@contextmanager
def on_device(held: Checkpoint, device: str) -> Iterator[None]:
    """Move a twin to where it is compared, and back."""
    try:
        held.twin.to(device)
        yield
    finally:
        held.twin.to("cpu")
