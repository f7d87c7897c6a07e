"""What no machine of the project could run: TensorRT itself, on a user's machine, in one report.

`vmoe doctor --self-test` does every step, keeps going where one fails, and writes a JSON file to
send. The model that ships is built as it is (ONNX, no torch), and once more in routed layers, which
are our plugins; where torch is installed, its twin is exported in fp16 as well, so that the
precision proof has something to prove. All that was built is compared, captured and timed. A step
that has nothing to look at fails.
"""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

import vmoe
from vmoe import bundle as bundles
from vmoe import latest
from vmoe.bundle import Bundle, Part
from vmoe.errors import GateError, MissingDependencyError, VmoeError
from vmoe.export import layers
from vmoe.export.gates import PARITY, SMALLEST
from vmoe.export.graphs import ports
from vmoe.export.lowerings import plugin as lowering
from vmoe.runtime import Engine, load
from vmoe.runtime.bench.measuring import Plan, interleave
from vmoe.runtime.bench.subjects import random_clips
from vmoe.runtime.engines import Times, _plan
from vmoe.runtime.engines.tensorrt import TensorRt
from vmoe.runtime.plugins import nodes

from . import acceptance, agreement, builder, plans
from .settings import BuildSettings

log = logging.getLogger("vmoe.export")

CLIPS = 32
ROUNDS = 200
BATCHES = (1, 2, 3, 4, 8)
ROUTED = "routed"  # the lowering plugin's plan, among those of a precision


@dataclass
class State:
    """What steps hand on.

    Attributes:
        folder: a temporary one.
        settings: how plans are built.
        device: the GPU.
        here: this machine, once it is known.
        built: by precision, or ROUTED, a bundle of ONNX parts and that of its plans.
    """

    folder: Path
    device: str
    settings: BuildSettings = field(default_factory=BuildSettings)
    here: plans.Here | None = None
    built: dict[str, tuple[Bundle, Path]] = field(default_factory=dict)

    def all_built(self) -> dict[str, tuple[Bundle, Path]]:
        """Return what earlier steps built."""
        if not self.built:
            raise VmoeError("no plans: see the steps that build them.")
        return self.built


Step = Callable[[State], dict[str, Any]]


def machine(state: State) -> dict[str, Any]:
    """TensorRT, CUDA, GPU, compute capability, system."""
    state.here = plans.here(state.device, state.settings)
    return state.here.machine.to_json()


def build(state: State) -> dict[str, Any]:
    """Plans of the model that ships, fp32: sizes, seconds, layers."""
    return _build(state, bundles.read(latest.shipped()), "fp32")


def build_fp16(state: State) -> dict[str, Any]:
    """The same in fp16, where torch is installed: the precision proof must find half layers."""
    if find_spec("torch") is None:
        return {"skipped": "torch is not installed: no fp16 ONNX can be made here"}
    from vmoe.export import ExportSettings, export

    asked = ExportSettings(fp16=True, optimize="none", robust_clips=0, verify_clips=16)
    made = export(latest.shipped() / bundles.TWIN, state.folder / "onnx-fp16", asked)
    return _build(state, made.bundle, "fp16")


def _build(state: State, source: Bundle, precision: str) -> dict[str, Any]:
    assert state.here is not None
    out = state.folder / f"plans-{precision}"
    out.mkdir()
    begin = time.monotonic()
    made, gates = plans.write(source, out, state.settings, state.here)
    _plan.note(part.hashes[part.file] for part in made.parts.values())
    state.built[precision] = source, out
    said = {
        "seconds": round(time.monotonic() - begin, 1),
        "bytes": {part.file: (out / part.file).stat().st_size for part in made.parts.values()},
        "layers": {name: part.layers for name, part in made.parts.items()},
        "gates": [gate.to_report() for gate in gates],
    }
    return said | _verdict(*[gate.refusal() for gate in gates if not gate.ok])


def parity(state: State) -> dict[str, Any]:
    """Answers against ONNX Runtime's on the CPU: logits of every expert, scores, routes."""
    said: dict[str, Any] = {}
    wrong = []
    for precision, (source, path) in state.all_built().items():
        found = agreement.compare(source, path, state.device, CLIPS)
        said[precision] = found.to_json()
        wrong += [f"{precision}: {g.refusal()}" for g in found.gates() if not g.ok]
    return said | _verdict(*wrong)


def graphs(state: State) -> dict[str, Any]:
    """Every part captured as a CUDA graph, at every batch; batches between them answer alike."""
    said: dict[str, Any] = {}
    wrong = []
    for kind, (_, path) in state.all_built().items():
        clips = random_clips(bundles.read(path).spec, max(BATCHES), seed=1)
        with load(path, "tensorrt", state.device) as engine:
            every = engine.run_all(clips)
            worst = max(float(np.abs(engine.run_all(clips[:n]) - every[:n]).max()) for n in BATCHES)
            captured = _captured(engine)
        said[kind] = {"captured": {k: list(v) for k, v in captured.items()},
                      "max_d_between_batches": worst}  # fmt: skip
        without = [f"{name} at {size}" for name, of in captured.items()
                   for size, ok in of.items() if not ok]  # fmt: skip
        wrong += [f"{kind}: {name} runs without a graph" for name in without]
        bound = _bound(kind) * max(SMALLEST, float(np.abs(every).max()))
        if not worst <= bound:
            d = f"max |d logits| between batches is {worst:.2g}, at most {bound:.2g}"
            wrong.append(f"{kind}: {d}")
    return said | _verdict(*wrong)


def _bound(kind: str) -> float:
    """Return how far logits may be off, as a share of the largest."""
    return PARITY.get(kind, PARITY["fp32"])


def _captured(engine: Engine) -> dict[str, dict[int, bool]]:
    backend = engine._backend
    assert isinstance(backend, TensorRt)
    return backend.graphs()


def latency(state: State) -> dict[str, Any]:
    """What one clip costs by each route, and its parts alone, in ms; copies and work apart."""
    said: dict[str, Any] = {}
    for kind, (_, path) in state.all_built().items():
        with load(path, "tensorrt", state.device, all_parts=True) as engine:
            clip = random_clips(engine.bundle.spec, 1, seed=2)
            calls = dict(_calls(engine, clip))
            taken = interleave(list(calls.values()), Plan(ROUNDS, warmup_s=0.2))
            of_one = _times(engine, clip)
        times = {
            name: {"median": float(np.median(t.wall_ms)), "least": float(t.wall_ms.min()),
                   "p99": float(np.percentile(t.wall_ms, 99))}
            for name, t in zip(calls, taken, strict=True)
        }  # fmt: skip
        said[kind] = {"ms": times, "of_one_call": of_one,
                      **_worst(times, engine.bundle.experts)}  # fmt: skip
    return said


def _times(engine: Engine, clip: Any) -> dict[str, float]:
    """Return the medians of what one call's copies and graphs take, by events inside of them."""
    engine.time_calls()
    engine.infer(clip)  # captured anew
    engine.last_times()
    found = []
    for _ in range(ROUNDS):
        engine.infer(clip)
        found.append(engine.last_times() or Times())
    medians = np.median(np.array(found), axis=0).tolist()
    return dict(zip(Times._fields, medians, strict=True))


def _worst(times: Mapping[str, Mapping[str, float]], experts: int) -> dict[str, float]:
    """Return the worst route over router and expert alone; nothing where one plan holds all."""
    if "router alone" not in times:
        return {}
    router = times["router alone"]["median"]
    return {"worst_route_over_parts_alone": max(
        times[f"route{i}"]["median"] / (router + times[f"expert{i} alone"]["median"])
        for i in range(experts)
    )}  # fmt: skip


def _calls(engine: Engine, clip: Any) -> Iterator[tuple[str, Callable[[int], object]]]:
    yield "free", lambda _: engine.infer(clip)
    for i in range(engine.bundle.experts):
        yield f"route{i}", lambda _, i=i: engine.infer(clip, force_route=i)  # type: ignore[misc]
    for name in engine.bundle.parts:
        yield f"{name} alone", lambda _, name=name: engine.run_part(name, clip)  # type: ignore[misc]
    yield "all experts", lambda _: engine.run_all(clip)


def plugins(state: State) -> dict[str, Any]:
    """A plan of each routed plugin, run once against NumPy."""
    assert state.here is not None
    trt = state.here.trt
    nodes.register(trt)
    said: dict[str, Any] = {}
    wrong = []
    with state.here.current() as gpu:
        for name, trial in acceptance.trials().items():
            try:
                made = builder.build(trt, trial.graph, name, state.settings)
                d = acceptance.difference(trt, gpu, made.plan, name, trial)
            except VmoeError as e:
                wrong.append(str(e))
                continue
            said[name] = {"bytes": len(made.plan), "layers": made.layers, "max_d": d}
            if not d <= acceptance.BOUND:
                wrong.append(f"{name}: max |d| to NumPy is {d:.2g}, at most {acceptance.BOUND:g}")
    return said | _verdict(*wrong)


def build_routed(state: State) -> dict[str, Any]:
    """One plan of the model in routed layers, by our plugins: what --lowering plugin writes."""
    return _build(state, _routed(state.folder / "onnx-routed"), ROUTED)


def _routed(folder: Path) -> Bundle:
    """Write the model that ships as the lowering `plugin` does, of its parts: no torch is here."""
    source = bundles.read(latest.shipped())
    folder.mkdir()
    graphs_of = [onnx.load(source.path / part.file) for part in source.parts.values()]
    whole = lowering.lower(graphs_of[0], graphs_of[1:])["moe"]
    routed = lowering.routed(graphs_of[0], graphs_of[1:])
    made = replace(
        source, path=folder, lowering="plugin", twin={"sha256": source.twin["sha256"]},
        parts={"moe": _part(whole, folder, "moe")},
        others={plans.ENGINE: _part(routed, folder, f"moe-{plans.ENGINE}")},
    )  # fmt: skip
    bundles.write_manifest(made, folder)
    return bundles.read(folder)


def _part(model: ModelProto, folder: Path, name: str) -> Part:
    file = folder / f"{name}.onnx"
    onnx.save(model, file)
    held = layers.counts(layer.precision for layer in layers.of_model(model, "moe"))
    found = "+".join(held)
    return Part(
        file.name, "onnx", {file.name: bundles.sha256(file)}, ports(model.graph.input),
        ports(model.graph.output), {"asked": found, "found": found}, held,
    )  # fmt: skip


STEPS: tuple[Step, ...] = (
    machine, build, build_fp16, plugins, build_routed, parity, graphs, latency,
)  # fmt: skip


def listed() -> list[dict[str, str]]:
    """Return what would be done: for --dry-run."""
    return [{"step": step.__name__, "what": (step.__doc__ or "").strip()} for step in STEPS]


def run(device: str = "auto") -> dict[str, Any]:
    """Do every step; return the report.

    Raises:
        MissingDependencyError: TensorRT, cuda-python or a GPU is missing; before any work.
    """
    found: dict[str, Any] = {
        "vmoe": vmoe.__version__, "python": platform.python_version(),
        "system": platform.platform(), "steps": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        state = State(Path(folder), "cuda:0" if device == "auto" else device)
        for step in STEPS:
            said = _done(step, state)
            found["steps"][step.__name__] = said
            log.info("%-10s %s", step.__name__, said.get("why") or said.get("skipped") or "ok")
    found["ok"] = all(said["ok"] for said in found["steps"].values())
    return found


def _done(step: Step, state: State) -> dict[str, Any]:
    """Do one step; what fails is a line of the report, unless nothing can be done at all."""
    try:
        return {"ok": True, **step(state)}
    except MissingDependencyError as e:
        if state.here is None:
            raise
        return {"ok": False, "why": str(e)}
    except Exception as e:  # a report of what broke is what the user is asked to send
        if state.here is None and isinstance(e, VmoeError):
            raise
        return {"ok": False, "why": f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"}


def _verdict(*wrong: str) -> dict[str, Any]:
    return {"ok": False, "why": "; ".join(wrong)} if wrong else {}


def refuse(found: Mapping[str, Any], file: Path) -> None:
    """Raise GateError where a step failed, once the report is written."""
    failed = [name for name, said in found["steps"].items() if not said["ok"]]
    if failed:
        raise GateError(f"self-test: {', '.join(failed)} failed. {file} says why: please send it.")
