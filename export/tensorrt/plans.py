"""From a bundle of ONNX parts to a bundle of plans for this machine; no torch is needed.

vmoe.json, router.plan, expert0.plan ...     the parts; moe.plan of the lowerings plugin and dense
router.layers.json ...                       what the engine inspector says of each
router.onnx ...                              of --strip alone: where a plan's weights come from
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto

from vmoe import output
from vmoe.bundle import Bundle, Part, check_part, sha256, write_manifest
from vmoe.errors import EngineMismatchError
from vmoe.export import optimize
from vmoe.export.gates import Gate
from vmoe.runtime.engines import _cuda, _plan, tensorrt
from vmoe.runtime.plugins import nodes

from . import builder, proof
from .settings import BuildSettings

log = logging.getLogger("vmoe.export")

LAYERS = ".layers.json"  # behind a part's name: what the inspector says
LOWERINGS = ("split", "plugin", "dense")
ENGINE = "tensorrt"  # by this name a bundle of the lowering plugin has a file for us
OURS = [nodes.named(node.op_type, nodes.VERSION, nodes.NAMESPACE) for node in nodes.NODES]
IF = ("TensorRT before 10.6 runs every branch of an If, and no version captures one as a CUDA "
      "graph")  # fmt: skip


class Here(NamedTuple):
    """A machine that can build.

    Attributes:
        trt: the module tensorrt.
        machine: its version, system and GPU.
        device: the GPU's number.
    """

    trt: Any
    machine: _plan.Machine
    device: int = 0

    @contextlib.contextmanager
    def current(self) -> Iterator[_cuda.Gpu]:
        """Make the GPU current in this thread: TensorRT builds and loads for that one."""
        gpu = _cuda.Gpu(self.device)
        try:
            yield gpu
        finally:
            gpu.close()


def here(device: str, settings: BuildSettings) -> Here:
    """Look at this machine, before any work.

    Raises:
        MissingDependencyError: TensorRT, cuda-python or a GPU is missing: what to install.
        EngineMismatchError: this version of TensorRT cannot do what is asked.
        SettingError: a device that is no GPU, or is not here.
    """
    trt = tensorrt.module()
    number = _cuda.index(device)
    gpu = _cuda.Gpu(number)
    try:
        found = Here(trt, _plan.machine(trt, gpu.facts()), number)
    finally:
        gpu.close()
    builder.check(trt, settings)
    return found


def check(bundle: Bundle) -> None:
    """Refuse a bundle that plans cannot be built of.

    Raises:
        EngineMismatchError: its parts are no ONNX, are lowered as no plan is, or are in int8 whose
            zero points are not 0, which TensorRT's parser refuses.
    """
    formats = sorted({part.format for part in bundle.parts.values()})
    if formats != ["onnx"]:
        raise EngineMismatchError(
            f"{bundle.path} has parts in {', '.join(formats)}; plans are built of ONNX parts."
        )
    if bundle.lowering not in LOWERINGS:
        raise EngineMismatchError(
            f"{bundle.path} is of the lowering {bundle.lowering}, of which no plan is built: {IF}. "
            "Export again with --lowering split."
        )
    if is_routed(bundle) and ENGINE not in bundle.others:
        raise EngineMismatchError(
            f"{bundle.path} has no file for TensorRT: its experts are int8 or bf16, or differ in "
            "more than their weights. Export again with --lowering split."
        )
    for part in sources(bundle).values():
        if "int8" in part.precision["found"] and _unsigned(bundle.path / part.file):
            raise EngineMismatchError(
                f"{bundle.path / part.file} is int8 of the form u8s8, which TensorRT does not "
                "read: export again with --int8-form s8s8."
            )


def is_routed(bundle: Bundle) -> bool:
    """Return whether a bundle's experts are routed layers, which are our plugins."""
    return bundle.lowering == "plugin" and bundle.experts > 1


def sources(bundle: Bundle) -> dict[str, Part]:
    """Return the ONNX that plans are built of, by the part that each becomes."""
    return {"moe": bundle.others[ENGINE]} if is_routed(bundle) else bundle.parts


def _unsigned(path: Path) -> bool:
    """Return whether a graph rounds to uint8, as the form u8s8 does."""
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return any(
        kinds.get(node.input[2], TensorProto.UINT8) == TensorProto.UINT8
        for node in graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2
    )


def write(
    source: Bundle,
    folder: Path,
    settings: BuildSettings,
    at: Here,
    make: Callable[[str], builder.Made] | None = None,
) -> tuple[Bundle, list[Gate]]:
    """Build every part of a bundle into a folder, with the manifest and what the proof found.

    Args:
        source: of ONNX parts, proven whole.
        folder: inside of `output.whole_folder`.
        settings: how.
        at: this machine.
        make: builds a part by its name, from something else than its ONNX.

    Raises:
        VmoeError: TensorRT cannot read a graph, or finds no plan; or no kernels are for this GPU.
    """
    check(source)
    routed, cache = is_routed(source), _read(settings.timing_cache)
    if routed:
        nodes.check(OURS, "moe.plan", at.machine.gpu.capability)
    parts, gates = {}, []
    for name, part in sources(source).items():
        begin = time.monotonic()
        check_part(source.path, part)
        if not part.layers:
            log.warning("%s: the bundle does not say what its layers compute in, so that nothing "
                        "proves what its plan's do", part.file)  # fmt: skip
        graph = as_read(source.path / part.file)
        with at.current():
            if routed:
                nodes.register(at.trt)
            made = make(name) if make else builder.build(at.trt, graph, name, settings, cache)
        cache = made.cache or cache
        parts[name] = _part(part, name, made, graph, folder, settings, at.machine)
        gates += proof.gates(name, part.layers, parts[name].layers)
        log.info("plan     %s: %.1f MiB, layers %s (%.1f s)", name, len(made.plan) / 2**20,
                 _counts(parts[name].layers), time.monotonic() - begin)  # fmt: skip
    _keep(settings.timing_cache, cache)
    made_of = replace(
        source, path=folder, parts=parts, others={},
        versions={**source.versions, "tensorrt": at.machine.tensorrt},
    )  # fmt: skip
    if "file" in source.twin:
        shutil.copyfile(source.path / source.twin["file"], folder / source.twin["file"])
    write_manifest(made_of, folder)
    return made_of, gates


def as_read(path: Path) -> bytes:
    """Return a part's graph with its weights inside, as TensorRT reads it.

    An input with a default, force_route, loses that: TensorRT would make a constant of it.
    """
    model = onnx.load(path)
    for apply in optimize.TENSORRT:
        apply(model.graph)
    inputs = {value.name for value in model.graph.input}
    held = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(held)
    return bytes(model.SerializeToString(deterministic=True))


def _part(
    part: Part, name: str, made: builder.Made, graph: bytes, folder: Path,
    settings: BuildSettings, machine: _plan.Machine,
) -> Part:  # fmt: skip
    """Write one plan and what belongs to it; return its entry in the manifest."""
    plan, weights = folder / f"{name}.plan", folder / f"{name}.onnx"
    plan.write_bytes(made.plan)
    output.write_json(folder / f"{name}{LAYERS}", made.layers)
    if settings.strip:
        weights.write_bytes(graph)
    files = [plan, weights] if settings.strip else [plan]
    found = proof.layers(made.layers)
    built = _plan.Built(
        tensorrt=machine.tensorrt, cuda=machine.gpu.driver, system=machine.system,
        gpu=machine.gpu.name, capability=machine.gpu.capability, flags=builder.flags(settings),
        batch=settings.batch, level=settings.opt_level, hardware=settings.hardware_compatible,
        version_compatible=settings.version_compatible, onnx=hashlib.sha256(graph).hexdigest(),
        weights=weights.name if settings.strip else "", plugins=plugins(graph),
    )  # fmt: skip
    return replace(
        part, file=plan.name, format="plan", hashes={file.name: sha256(file) for file in files},
        precision={"asked": part.precision["found"], "found": "+".join(found) or "none"},
        layers=found, tensors={}, extra={**part.extra, _plan.KEY: built.to_json()},
    )  # fmt: skip


def plugins(graph: bytes) -> tuple[str, ...]:
    """Return the plugins that a graph needs, as a manifest names them."""
    named = []
    for node in onnx.load_model_from_string(graph).graph.node:
        said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if "plugin_namespace" in said:
            version, space = (said[f"plugin_{k}"].decode() for k in ("version", "namespace"))
            named.append(nodes.named(node.op_type, version, space))
    return tuple(sorted(set(named)))


def _read(path: Path | None) -> bytes:
    """Return a timing cache that is there; empty where it is not yet."""
    return path.read_bytes() if path is not None and path.exists() else b""


def _keep(path: Path | None, cache: bytes) -> None:
    if path is not None:
        with output.whole_file(path) as file:
            file.write_bytes(cache)


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in found.items()) or "not said"


def planned(
    settings: BuildSettings, precision: Mapping[str, str], lowering: str, against: str
) -> list[str]:
    """Return, one line each, all that a build would do: for --dry-run, which needs no TensorRT.

    Args:
        settings: how plans are built.
        precision: of each part.
        lowering: of the bundle.
        against: what the plans are compared with.
    """
    routed = lowering == "plugin" and list(precision) == ["moe"]
    least, best, most = settings.batch
    cache = settings.timing_cache
    by = "torch-tensorrt, from the twin's modules" if settings.torch_trt else "the ONNX parser"
    lines = [
        f"by: {by}",
        "network: strongly typed, one for each part: a layer computes in what the ONNX says",
        f"profile: batch {least} to {most}, fastest at {best}",
        f"flags: {', '.join(builder.flags(settings)) or 'none'}; level {settings.opt_level}, "
        f"workspace {_workspace(settings)}, other GPUs {settings.hardware_compatible}, one stream",
        f"timing cache: {cache or 'none kept'}",
    ]
    if routed:
        lines.append(f"plugins: {', '.join(OURS)}; registered before the graph is read")
    for name, kind in precision.items():
        file = f"{name}-{ENGINE}" if routed else name
        lines.append(
            f"{name}: {file}.onnx ({kind}, cast of pixels first) -> {name}.plan, "
            f"{name}{LAYERS}{f', {name}.onnx' if settings.strip else ''}"
        )
    lines += [
        "proof: of each precision asked, the share of layers in the plan (exit 3 below it)",
        f"check: every plan loaded again, against {against}",
        f"run: CUDA graphs for batch {', '.join(map(str, buckets(settings)))}; {ROUTES[lowering]}",
    ]
    return lines


ROUTES = {
    "split": "host routes",
    "plugin": "the plan routes each clip's layers, by our kernels",
    "dense": "every expert runs on every clip, a baseline only",
}  # fmt: skip


def _workspace(settings: BuildSettings) -> str:
    return "not bounded" if settings.workspace is None else f"{settings.workspace} MiB"


def buckets(settings: BuildSettings) -> list[int]:
    """Return the batches that are run as graphs of their own."""
    least, _, most = settings.batch
    return sorted({_plan.bucket(n, least, most) for n in range(1, most + 1)})
