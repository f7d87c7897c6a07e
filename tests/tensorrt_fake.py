"""A TensorRT of which every name and signature is that of real bindings, and the rest is ours.

Classes, methods, properties and enums are made from what `tests.bindings` read of one version: a
call with an argument too many, a name that the version does not have, a property that cannot be
set, all fail as they would there. What a method does is written here, as far as vmoe calls it: a
"plan" carries its ONNX, and "running" it runs ONNX Runtime on the memory that was named.

    fake.calls                          every call, ("Builder.create_network", arguments)
    fake.answers["OnnxParser.parse"] = False      lets a method refuse; TensorRT logs why
"""

# ruff: noqa: N802  # the names are those of CUDA and of TensorRT
from __future__ import annotations

import ctypes
import enum
import json
import re
import sys
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from tests.cuda_fake import Driver
from vmoe.export.lowerings import plugin
from vmoe.export.tensorrt import acceptance

MAGIC = b"FAKE PLAN "
SPLIT = re.compile(r",\s*(?![^\[(<]*[\])>])")  # between parameters, not inside of a type
TYPES = {TensorProto.UINT8: "UINT8", TensorProto.FLOAT: "FLOAT", TensorProto.INT64: "INT64"}
WORDS = {TensorProto.FLOAT: "Float", TensorProto.FLOAT16: "Half", TensorProto.INT8: "Int8"}
ARENA = 4096  # bytes that a plan says it needs; a test may say more
WHY = "the fake was told to refuse"


class Signature:
    """One overload, as pybind11 writes it."""

    def __init__(self, line: str) -> None:
        inside = line[line.index("(") + 1 : line.rindex(")") if "->" not in line
                      else line.rindex(") ->")]  # fmt: skip
        self.line = line
        self.parameters: list[tuple[str, str, bool]] = []  # name, type, whether it has a default
        for text in SPLIT.split(inside) if inside else []:
            name, _, kind = text.partition(":")
            kind, has, _ = kind.partition(" = ")
            self.parameters.append((name.strip(), kind.strip(), bool(has)))

    def bind(self, fake: Fake, given: tuple[Any, ...], named: dict[str, Any]) -> str | None:
        """Return why a call does not fit, or None."""
        wanted = [p for p in self.parameters if p[0] != "self"]
        if len(given) > len(wanted):
            return f"takes {len(wanted)} arguments, {len(given)} given"
        values = dict(zip((p[0] for p in wanted), given, strict=False))
        for name, value in named.items():
            if name in values or name not in {p[0] for p in wanted}:
                return f"has no argument {name}"
            values[name] = value
        for name, kind, optional in wanted:
            if name not in values and not optional:
                return f"lacks {name}"
            if name in values and not fake.fits(values[name], kind):
                return f"{name} is {values[name]!r}, not {kind}"
        return None


class Fake(ModuleType):
    """The module `tensorrt`.

    Attributes:
        calls: (Class.method, arguments) of every call.
        answers: what methods answer instead of doing their work.
        arena: bytes that plans say they need.
        skew: what plans answer instead, by an output's name and the true answer.
        memory: of the fake driver that "runs" plans.
    """

    def __init__(self, surface: dict[str, Any], driver: Driver) -> None:
        super().__init__("tensorrt")
        self.__version__ = surface["version"]
        self._surface, self._driver = surface, driver
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answers: dict[str, Any] = {}
        self.arena = ARENA
        self.skew: Callable[[str, Any], Any] = lambda name, answer: answer
        self.layers: str | None = None  # what the inspector says instead
        self._made: dict[str, Any] = {}
        for path in surface["classes"]:
            self._make(path)
        self.creators: dict[tuple[str, str, str], Any] = {}
        for path, made in self._made.items():
            outer, _, name = path.rpartition(".")
            setattr(self._made[outer] if outer else self, name, made)

    def _make(self, path: str) -> Any:
        """Make a class, and those that it descends from before it."""
        if path not in self._made:
            described = self._surface["classes"][path]
            above = [base for base in described["bases"] if base in self._surface["classes"]]
            bases = (self._make(above[0]),) if above else (object,)
            self._made[path] = _class(self, path, described, bases)
        return self._made[path]

    def fits(self, value: Any, kind: str) -> bool:
        """Return whether a value can be given for a type as a signature writes it."""
        kind = kind.replace("tensorrt_bindings.tensorrt.", "").rstrip("_")
        plain = {"int": int, "typing.SupportsInt": int, "str": str, "bool": bool, "float": float,
                 "FallbackString": str}  # fmt: skip
        if kind in plain:
            return isinstance(value, plain[kind]) and (kind == "bool" or value is not True)
        if kind.endswith(("buffer", "Buffer")):
            return isinstance(value, (bytes, bytearray, memoryview, np.ndarray))
        if kind in ("tuple", "list"):
            return type(value).__name__ == kind
        if kind == "Dims":
            return isinstance(value, tuple) and all(type(n) is int for n in value)
        return kind not in self._made or isinstance(value, self._made[kind])

    def call(self, path: str, name: str, me: Any, given: tuple[Any, ...]) -> Any:
        """Do what a method does, or what the test says instead."""
        self.calls.append((f"{path}.{name}", given))
        if f"{path}.{name}" in self.answers:
            self.complain()
            answer = self.answers[f"{path}.{name}"]
            if isinstance(answer, Exception):
                raise answer
            return answer
        work = getattr(self, f"_{path}_{name}", None)
        assert work is not None, f"the fake does not know what {path}.{name} does"
        return work(me, *given)

    def complain(self, why: str = WHY) -> None:
        """Say an error to the last logger."""
        logger = getattr(self, "_logger", None)
        if logger is not None:
            logger.log(self._made["ILogger.Severity"].ERROR, why)

    def new(self, path: str, **held: Any) -> Any:
        """Make an object as TensorRT hands it out, with what the fake keeps in it."""
        made = object.__new__(self._made[path])
        made.__dict__.update({f"_{key}": value for key, value in held.items()})
        return made

    def get_plugin_registry(self) -> Any:
        """Return the registry, as the function of the module does."""
        assert "get_plugin_registry" in self._surface["functions"]
        return self.new("IPluginRegistry")

    # What each method does.

    def _IPluginRegistry_get_creator(self, me: Any, kind: str, version: str, space: str) -> Any:
        return self.creators.get((kind, version, space))

    def _IPluginRegistry_register_creator(self, me: Any, creator: Any, space: str) -> bool:
        self.creators[creator.name, creator.plugin_version, space] = creator
        return True

    def _IPluginCreatorV3One___init__(self, me: Any) -> None:
        pass

    def _PluginField___init__(self, me: Any, name: str, data: Any, kind: Any) -> None:
        pass

    def _PluginFieldCollection___init__(self, me: Any, fields: Any) -> None:
        pass

    def _ILogger___init__(self, me: Any) -> None:
        assert not hasattr(self, "_logger"), "TensorRT writes to the first logger, gone or not"
        self._logger = me

    def _Builder___init__(self, me: Any, logger: Any) -> None:
        assert self._driver.current, "a builder without a GPU takes the first that there is"
        self._logger = logger

    def _Builder_create_network(self, me: Any, flags: int = 0) -> Any:
        typed = 1 << int(self._made["NetworkDefinitionCreationFlag"].STRONGLY_TYPED)
        assert flags == typed, "a network that is not strongly typed"
        return self.new("INetworkDefinition")

    def _Builder_create_builder_config(self, me: Any) -> Any:
        return self.new("IBuilderConfig", flags_={"TF32"})

    def _Builder_create_optimization_profile(self, me: Any) -> Any:
        return self.new("IOptimizationProfile", shapes={})

    def _Builder_build_serialized_network(self, me: Any, network: Any, config: Any) -> Any:
        head = {"flags": sorted(config._flags_), "profile": config._profile._shapes,
                "details": config.__dict__["_set"]}  # fmt: skip
        text = json.dumps(head, default=str).encode()
        plan = MAGIC + len(text).to_bytes(4, "big") + text + network._model.SerializeToString()
        return self._made["IHostMemory"](plan)

    def _OnnxParser___init__(self, me: Any, network: Any, logger: Any) -> None:
        me.__dict__.update(_network=network, _errors=[])

    def _OnnxParser_parse(self, me: Any, model: bytes, path: str | None = None) -> bool:
        read = onnx.load_model_from_string(bytes(model))
        for value in read.graph.input:
            readers = [n for n in read.graph.node if value.name in n.input]
            uint8 = value.type.tensor_type.elem_type == TensorProto.UINT8
            if uint8 and any(n.op_type != "Cast" for n in readers):
                me._errors.append(self.new("ParserError", node=readers[0]))
                return False
        for node in read.graph.node:  # what is no operator of ONNX is a plugin, or nothing
            if not self._plugin(node):
                me._errors.append(self.new("ParserError", node=node))
                return False
        me._network.__dict__["_model"] = read
        return True

    def _plugin(self, node: Any) -> bool:
        """Return whether a node is an operator of ONNX, or a plugin that is registered."""
        named = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        space, version = (named.get(f"plugin_{k}", b"").decode() for k in ("namespace", "version"))
        return not node.domain or (node.op_type, version, space) in self.creators

    def _OnnxParser_get_error(self, me: Any, index: int) -> Any:
        return me._errors[index]

    def _get_OnnxParser_num_errors(self, me: Any) -> int:
        return len(me._errors)

    def _ParserError_desc(self, me: Any) -> str:
        return "no plugin\nof that name." if me._node.domain else "UINT8 is\nnot supported here."

    def _ParserError_node_name(self, me: Any) -> str:
        return str(me._node.name)

    def _ParserError_node_operator(self, me: Any) -> str:
        return str(me._node.op_type)

    def _get_INetworkDefinition_num_inputs(self, me: Any) -> int:
        return len(_inputs(me._model))

    def _INetworkDefinition_get_input(self, me: Any, index: int) -> Any:
        return self.new("ITensor", value=_inputs(me._model)[index])

    def _get_ITensor_name(self, me: Any) -> str:
        return str(me._value.name)

    def _get_ITensor_shape(self, me: Any) -> tuple[int, ...]:
        return _shape(me._value)

    def _IBuilderConfig_set_memory_pool_limit(self, me: Any, pool: Any, size: int) -> None:
        me._set[f"pool {pool.name}"] = size

    def _IBuilderConfig_set_flag(self, me: Any, flag: Any) -> None:
        me._flags_.add(flag.name)

    def _IBuilderConfig_clear_flag(self, me: Any, flag: Any) -> None:
        me._flags_.discard(flag.name)

    def _IBuilderConfig_add_optimization_profile(self, me: Any, profile: Any) -> int:
        me.__dict__["_profile"] = profile
        return 0

    def _IOptimizationProfile_set_shape(self, me: Any, name: str, *sizes: Any) -> None:
        me._shapes[name] = sizes

    def _IBuilderConfig_create_timing_cache(self, me: Any, held: bytes) -> Any:
        return self.new("ITimingCache", held=bytes(held))

    def _IBuilderConfig_set_timing_cache(self, me: Any, cache: Any, ignore: bool) -> bool:
        assert not ignore
        return not cache._held or cache._held.startswith(b"timed ")

    def _ITimingCache_serialize(self, me: Any) -> Any:
        return self._made["IHostMemory"]((me._held or b"timed ") + b"+")

    def _Runtime___init__(self, me: Any, logger: Any) -> None:
        assert self._driver.current, "a runtime without a GPU takes the first that there is"
        self._logger = logger

    def _Runtime_deserialize_cuda_engine(self, me: Any, plan: bytes) -> Any:
        plan = bytes(plan)
        if not plan.startswith(MAGIC):
            self.complain("magic tag does not match")
            return None
        start = len(MAGIC) + 4
        size = int.from_bytes(plan[start - 4 : start], "big")
        head = json.loads(plan[start : start + size])
        if "VERSION_COMPATIBLE" in head["flags"] and not me._set.get("engine_host_code_allowed"):
            self.complain("host code is not allowed")
            return None
        model = onnx.load_model_from_string(plan[start + size :])
        unknown = [node for node in model.graph.node if not self._plugin(node)]
        if unknown:
            self.complain(f"no creator of {unknown[0].op_type}")
            return None
        full = "STRIP_PLAN" not in head["flags"]
        return self.new("ICudaEngine", model=model, head=head, full=full)

    def _values(self, engine: Any) -> list[Any]:
        return [*_inputs(engine._model), *engine._model.graph.output]

    def _value(self, engine: Any, name: str) -> Any:
        return next(value for value in self._values(engine) if value.name == name)

    def _get_ICudaEngine_num_io_tensors(self, me: Any) -> int:
        return len(self._values(me))

    def _get_ICudaEngine_device_memory_size_v2(self, me: Any) -> int:
        return self.arena

    def _ICudaEngine_get_tensor_name(self, me: Any, index: int) -> str:
        return str(self._values(me)[index].name)

    def _ICudaEngine_get_tensor_mode(self, me: Any, name: str) -> Any:
        taken = name in {value.name for value in me._model.graph.input}
        mode = self._made["TensorIOMode"]
        return mode.INPUT if taken else mode.OUTPUT

    def _ICudaEngine_get_tensor_dtype(self, me: Any, name: str) -> Any:
        kind = TYPES[self._value(me, name).type.tensor_type.elem_type]
        return getattr(self._made["DataType"], kind)

    def _ICudaEngine_get_tensor_location(self, me: Any, name: str) -> Any:
        self._value(me, name)
        return self._made["TensorLocation"].DEVICE

    def _ICudaEngine_get_tensor_shape(self, me: Any, name: str) -> tuple[int, ...]:
        return _shape(self._value(me, name))

    def _ICudaEngine_create_execution_context(self, me: Any, strategy: Any) -> Any:
        assert strategy.name == "USER_MANAGED"
        assert me._full, "a context of a stripped plan before it got its weights"
        return self.new("IExecutionContext", engine=me, arena=None, at={}, shapes={},
                        ran=False)  # fmt: skip

    def _IExecutionContext_set_device_memory(self, me: Any, memory: int, size: int) -> None:
        me.__dict__["_arena"] = memory, size

    def _IExecutionContext_set_optimization_profile_async(
        self, me: Any, index: int, stream: int
    ) -> bool:
        return index == 0

    def _IExecutionContext_set_input_shape(
        self, me: Any, name: str, shape: tuple[int, ...]
    ) -> bool:
        least, _, most = me._engine._head["profile"][name]
        me._shapes[name] = shape
        return all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

    def _IExecutionContext_infer_shapes(self, me: Any) -> list[str]:
        free = [v.name for v in _inputs(me._engine._model) if -1 in _shape(v)]
        return [name for name in free if name not in me._shapes]

    def _IExecutionContext_get_tensor_shape(self, me: Any, name: str) -> tuple[int, ...]:
        rows = next(iter(me._shapes.values()))[0]
        return tuple(rows if n < 0 else n for n in _shape(self._value(me._engine, name)))

    def _IExecutionContext_set_tensor_address(self, me: Any, name: str, memory: int) -> bool:
        self._value(me._engine, name)
        me._at[name] = memory
        return True

    def _IExecutionContext_execute_async_v3(self, me: Any, stream: int) -> bool:
        assert stream in self._driver.live["stream"]
        assert me._ran or not self._driver.captures, "captured before it ran once"
        me.__dict__["_ran"] = True
        address, size = me._arena
        self._driver.check(address, max(size, self.arena))
        shapes, mine = dict(me._shapes), weakref.ref(me)
        self._driver.run(lambda: self._compute(mine(), shapes))
        return True

    def _compute(self, context: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        assert context is not None, "a graph was launched whose context is gone, with its memory"
        engine, at = context._engine, context._at
        session = engine.__dict__.get("_session")
        if session is None:
            model = engine._model
            if any(node.domain for node in model.graph.node):
                model = plugin.with_functions(model, _experts(model))
            session = onnxruntime.InferenceSession(model.SerializeToString())
            engine.__dict__["_session"] = session
        given = {}
        for value in _inputs(engine._model):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = shapes.get(value.name, _shape(value))
            size = int(np.prod(shape)) * dtype.itemsize
            held = _memory(self._driver.check(at[value.name], size), size)
            given[value.name] = np.frombuffer(held, dtype).reshape(shape)
        names = [value.name for value in engine._model.graph.output]
        for name, true in zip(names, session.run(names, given), strict=True):
            answer = np.ascontiguousarray(self.skew(name, true))
            ctypes.memmove(self._driver.check(at[name], answer.nbytes), answer.ctypes.data,
                           answer.nbytes)  # fmt: skip

    def _ICudaEngine_create_engine_inspector(self, me: Any) -> Any:
        return self.new("EngineInspector", engine=me)

    def _EngineInspector_get_engine_information(self, me: Any, format: Any) -> str:
        assert format.name == "JSON"
        assert "execution_context" in me._set, "types are not said without a context"
        if self.layers is not None:
            return self.layers
        held = {t.name: t for t in me._engine._model.graph.initializer}
        layers = []
        for node in me._engine._model.graph.node:
            weight = next((held[n] for n in node.input if n in held), None)
            if node.domain:
                kind = WORDS[weight.data_type if weight is not None else TensorProto.FLOAT]
                given = [{"Format/Datatype": f"Row major linear {kind} format"}]
                layers.append({"LayerType": "PluginV3", "Inputs": given})
            elif node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None:
                word = WORDS[weight.data_type]
                weights = {"Type": word, "Count": int(np.prod(weight.dims))}
                layers.append({"LayerType": "CaskConvolution", "Weights": weights})
        return json.dumps({"Layers": [{"Name": "r", "LayerType": "Reformat"}, *layers]})

    def _Refitter___init__(self, me: Any, engine: Any, logger: Any) -> None:
        me.__dict__.update(_engine=engine, _ready=False)

    def _Refitter_refit_cuda_engine(self, me: Any) -> bool:
        me._engine.__dict__["_full"] = me._ready
        return bool(me._ready)

    def _OnnxParserRefitter___init__(self, me: Any, refitter: Any, logger: Any) -> None:
        me.__dict__["_refitter"] = refitter

    def _OnnxParserRefitter_refit_from_file(self, me: Any, model: str) -> bool:
        return self._OnnxParserRefitter_refit_from_bytes(me, onnx.load(model).SerializeToString())

    def _OnnxParserRefitter_refit_from_bytes(self, me: Any, model: bytes) -> bool:
        given = onnx.load_model_from_string(model).SerializeToString(deterministic=True)
        mine = me._refitter._engine._model.SerializeToString(deterministic=True)
        me._refitter.__dict__["_ready"] = given == mine
        return given == mine


def _class(fake: Fake, path: str, described: dict[str, Any], bases: tuple[Any, ...]) -> Any:
    """Make one class, or enum, as described."""
    if described["enum"]:
        return enum.IntEnum(path.rpartition(".")[2], described["enum"])
    if path == "IHostMemory":
        return type(path, (bytearray,), {"nbytes": property(len)})
    members: dict[str, Any] = {"__setattr__": _strict, "theirs": path}
    for name, member in described["members"].items():
        if member["kind"] == "method":
            members[name] = _method(fake, path, name, member["signatures"])
        elif member["kind"] == "property":
            members[name] = _property(fake, path, name, member)
    made = type(path.rpartition(".")[2], bases, members)
    if not described["members"].get("__init__", {}).get("signatures"):
        members_init = _method(fake, path, "__init__", [])
        made.__init__ = members_init  # type: ignore[misc]
    return made


def _strict(me: Any, name: str, value: Any) -> None:
    """Refuse an attribute that the class does not have; classes derived from it may have any."""
    held = getattr(type(me), name, None)
    derived = "theirs" not in vars(type(me))
    if not isinstance(held, property) and not derived:
        raise AttributeError(f"{type(me).__name__} has no attribute {name}")
    object.__setattr__(me, name, value)


def _method(fake: Fake, path: str, name: str, lines: list[str]) -> Any:
    overloads = [Signature(line) for line in lines]

    def call(me: Any, *given: Any, **named: Any) -> Any:
        if not overloads:
            raise TypeError(f"{path}: No constructor defined!")
        whys = [overload.bind(fake, given, named) for overload in overloads]
        if None not in whys:
            raise TypeError(f"{path}.{name}: {whys[0]}: {overloads[0].line}")
        if name == "__init__" and fake.answers.get(path, "") is None:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return fake.call(path, name, me, (*given, *named.values()))

    return call


def _property(fake: Fake, path: str, name: str, member: dict[str, Any]) -> property:
    def get(me: Any) -> Any:
        work = getattr(fake, f"_get_{path}_{name}", None)
        held = me.__dict__.setdefault("_set", {})
        assert work is not None or name in held, f"the fake does not know {path}.{name}"
        return work(me) if work else held[name]

    def put(me: Any, value: Any) -> None:
        assert fake.fits(value, member["type"]), f"{path}.{name} is {value!r}"
        me.__dict__.setdefault("_set", {})[name] = value

    return property(get, put if member["writable"] else None)


def _experts(model: Any) -> int:
    """Return how many experts the routed layers of a model have."""
    held = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    routed = [held[n.input[2]][0] for n in model.graph.node if n.op_type.startswith("Routed")]
    return int(routed[0]) if routed else acceptance.M


def _inputs(model: Any) -> list[Any]:
    """Return a graph's inputs; those with a default are constants to TensorRT's parser."""
    held = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in held]


def _shape(value: Any) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)


def _memory(address: int, size: int) -> Any:
    return (ctypes.c_uint8 * size).from_address(address)


def install(patch: pytest.MonkeyPatch, surface: dict[str, Any], driver: Driver) -> Fake:
    """Let `import tensorrt` find a fake of one version, until the test ends."""
    fake = Fake(surface, driver)
    fake.__spec__ = ModuleSpec("tensorrt", None)
    patch.setitem(sys.modules, "tensorrt", fake)
    return fake
