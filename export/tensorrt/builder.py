"""One ONNX graph as one TensorRT plan, with what the inspector says of its layers.

Only calls that the bindings of 10.3, 10.9, 10.16 and 11.4 all have; what a version lacks is looked
for by name before it is used. Every answer is checked: TensorRT says no by False or None.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from vmoe.errors import EngineMismatchError, VmoeError
from vmoe.runtime.engines import _plan, _trt
from vmoe.runtime.engines._trt import checked, constructed

from .settings import BuildSettings

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger("vmoe.export")

MIB = 1 << 20
FORMS = {  # of --hardware-compatible, as TensorRT has it
    _plan.NONE: "NONE",
    _plan.SAME_CAPABILITY: "SAME_COMPUTE_CAPABILITY",
    _plan.AMPERE_PLUS: "AMPERE_PLUS",
}


class Made(NamedTuple):
    """What a build gave.

    Attributes:
        plan: the plan's bytes.
        layers: what the engine inspector says, as JSON.
        cache: the timing cache with this build's measurements.
    """

    plan: bytes
    layers: dict[str, Any]
    cache: bytes


def flags(settings: BuildSettings) -> tuple[str, ...]:
    """Return the builder's flags by name: those that are set, and, with no- before, cleared."""
    found = [] if settings.tf32 else ["no-TF32"]
    if settings.version_compatible:
        found.append("VERSION_COMPATIBLE")
    if settings.strip:
        found += ["STRIP_PLAN", "REFIT_IDENTICAL"]
    return tuple(found)


def check(trt: Any, settings: BuildSettings) -> None:
    """Refuse what this version of TensorRT does not have.

    Raises:
        EngineMismatchError: with the name of what is missing.
    """
    level = FORMS[settings.hardware_compatible]
    if not hasattr(trt.HardwareCompatibilityLevel, level):
        raise EngineMismatchError(
            f"--hardware-compatible {settings.hardware_compatible} is of TensorRT 10.9 and newer; "
            f"here is {trt.__version__}."
        )


def build(trt: Any, onnx: bytes, name: str, settings: BuildSettings, cache: bytes = b"") -> Made:
    """Build one plan.

    Args:
        trt: the module tensorrt.
        onnx: the graph with its weights, as TensorRT reads it.
        name: the part's, for messages.
        settings: how.
        cache: a timing cache of earlier builds; one that is not this version's is started anew.

    Raises:
        VmoeError: TensorRT cannot read the graph, or finds no plan; with its own words.
    """
    log_ = _trt.logger(trt)
    builder = constructed(lambda: trt.Builder(log_), "Builder", log_)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # its number has moved
    network = checked(builder.create_network(typed), f"{name}: create_network", log_)
    parser = constructed(lambda: trt.OnnxParser(network, log_), "OnnxParser", log_)
    if not parser.parse(onnx):
        raise VmoeError(f"{name}: TensorRT cannot read the graph: {_errors(parser, log_)}.")
    config = checked(builder.create_builder_config(), f"{name}: create_builder_config", log_)
    _configure(trt, config, settings)
    _add_profile(builder, network, config, name, settings, log_)
    held = _timing_cache(config, cache, log_)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise VmoeError(f"{name}: TensorRT finds no plan: {log_.said()}.")
    made = bytes(memoryview(plan))
    measured = bytes(memoryview(held.serialize())) if held is not None else b""
    return Made(made, inspected(trt, made, name, settings, onnx), measured)


def _errors(parser: trt.OnnxParser, log_: Any) -> str:
    found = [_error(parser.get_error(i)) for i in range(parser.num_errors)]
    return "; ".join(dict.fromkeys(found)) or log_.said()


def _error(error: trt.ParserError) -> str:
    at = f"{error.node_operator()} {error.node_name()}".strip()
    return f"{at}: {' '.join(error.desc().split())}".rstrip(".")


def _configure(trt: Any, config: trt.IBuilderConfig, settings: BuildSettings) -> None:
    config.builder_optimization_level = settings.opt_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else no layer says its types
    config.max_aux_streams = 0  # one stream for all parts: what runs is captured whole
    level = FORMS[settings.hardware_compatible]
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace * MIB)
    for flag in flags(settings):
        name = flag.removeprefix("no-")
        change = config.clear_flag if flag != name else config.set_flag
        change(getattr(trt.BuilderFlag, name))


def _add_profile(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, name: str,
    settings: BuildSettings, log_: Any,
) -> None:  # fmt: skip
    """Let the batch of every input that is free lie between the least and the largest."""
    profile = checked(
        builder.create_optimization_profile(), f"{name}: create_optimization_profile", log_
    )
    for tensor, shape in _free(network):
        sizes = [tuple(n if d < 0 else d for d in shape) for n in settings.batch]
        profile.set_shape(tensor, *sizes)
    at = config.add_optimization_profile(profile)
    checked(at >= 0, f"{name}: add_optimization_profile", log_)


def _free(network: trt.INetworkDefinition) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the inputs whose first dimension, and no other, is free.

    Raises:
        VmoeError: another one is.
    """
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape[1:]):
            raise VmoeError(f"input {tensor.name} has the shape {list(shape)}: only N may be free.")
        if shape and shape[0] < 0:
            yield tensor.name, shape


def _timing_cache(config: trt.IBuilderConfig, cache: bytes, log_: Any) -> trt.ITimingCache | None:
    """Give the builder what was measured before; return the cache, None where it takes none."""
    for held in dict.fromkeys((cache, b"")):
        made = config.create_timing_cache(held)
        if made is not None and config.set_timing_cache(made, False):
            return made
        if held:
            log.warning("the timing cache is of another TensorRT or GPU: a new one is made")
    log.warning("TensorRT takes no timing cache: %s", log_.said())
    return None


def inspected(
    trt: Any, plan: bytes, name: str, settings: BuildSettings, onnx: bytes = b""
) -> dict[str, Any]:
    """Return what a plan's layers are, for the best batch: else sizes and types are not said.

    Args:
        trt: the module tensorrt.
        plan: its bytes.
        name: the part's, for messages.
        settings: how it was built.
        onnx: where a stripped plan gets its weights from; without them it has no context.

    Raises:
        VmoeError: the plan cannot be loaded, or what is said of it cannot be read.
    """
    log_ = _trt.logger(trt)
    runtime = constructed(lambda: trt.Runtime(log_), "Runtime", log_)
    if settings.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    checked(engine, f"{name}: deserialize_cuda_engine", log_)
    if settings.strip:
        _trt.refit(trt, engine, onnx, name, log_)
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED  # it will not be run
    context = checked(
        engine.create_execution_context(strategy), f"{name}: create_execution_context", log_
    )
    for i in range(engine.num_io_tensors):
        tensor = engine.get_tensor_name(i)
        shape = tuple(engine.get_tensor_shape(tensor))
        if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT and shape[:1] == (-1,):
            given = context.set_input_shape(tensor, (settings.opt_batch, *shape[1:]))
            checked(given, f"{name}: set_input_shape", log_)
    inspector = checked(engine.create_engine_inspector(), f"{name}: create_engine_inspector", log_)
    inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except ValueError as e:
        raise VmoeError(f"{name}: what TensorRT's inspector says cannot be read: {e}.") from e
    return found
