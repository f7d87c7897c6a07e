"""TensorRT's side of the routed kernels: three plugins (IPluginV3), for 10.3 to 11.x.

    VmoeTopK        scores -> weights, route (int32)         k
    RoutedLinear    x, expert, w [M, O, I], b [M, O] -> y    relu
    RoutedConv3d    x, expert, w [M, O, C, kt, kh, kw], b [M, O] -> y
                    strides, pads, relu, tf32

x, w, b and y are float32 or float16, and sums are float32; tf32 lets products of float32 be as
short as TensorRT's own convolutions have them where nobody forbids it. `register` makes the
plugins known, and comes before a plan with such nodes is built or deserialised. This file imports
no TensorRT: its classes are made of what stands here and of the bases of the TensorRT given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmoe.errors import EngineMismatchError, SettingError

from . import calls, compiled, launch
from .calls import Call, Conv3d

NAMESPACE = "vmoe"
VERSION = "1"
# Bindings of 10.3 crash the process some time after Python frees a plugin, those of 10.9 do not:
# below, plugins live as long as the process. They are small, and one a layer.
FREES_PLUGINS = (10, 9)
Fields = dict[str, NDArray[np.int32]]
Dims = tuple[int, ...]


class Node:
    """What the plugins have in common.

    It stands before TensorRT's bases: an attribute named as one of their properties would hide it,
    and what is set would never reach TensorRT.

    Attributes:
        trt: the TensorRT that the class was made for.
        op_type: of the ONNX node; no operator of ONNX has it, as parsers look at nothing else.
        fields: its attributes, int32, and what each is where it is left out.
        answers: how many outputs it has.
        values: the attributes as given.
    """

    trt: Any
    op_type: ClassVar[str]
    fields: ClassVar[dict[str, tuple[int, ...]]]
    answers: ClassVar[int] = 1

    def setup(self, values: Mapping[str, Any]) -> None:
        """Take the attributes.

        Raises:
            SettingError: one has another size than it should.
        """
        self.plugin_name, self.plugin_version = self.op_type, VERSION
        self.plugin_namespace = NAMESPACE
        self._key: tuple[Any, ...] | None = None  # what is bound
        self._bound: list[Callable[[int], None]] = []
        self.values: Fields = {}
        for name, default in self.fields.items():
            value = np.array(values.get(name, default), np.int32).reshape(-1)
            if len(value) != len(default):
                raise SettingError(
                    f"{self.op_type} has {name} {value.tolist()}; it takes {len(default)} "
                    "number(s). Export the bundle again."
                )
            self.values[name] = value

    def get_capability_interface(self, _kind: Any) -> Any:
        """Return what builds and runs it: itself."""
        return self

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the outputs' types: that of the first input."""
        return [input_types[0]]

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], _inputs: int) -> bool:
        """Return whether tensor `pos` may be of its type, those before it being settled."""
        trt, desc = self.trt, in_out[pos].desc
        if desc.format != trt.TensorFormat.LINEAR:
            return False
        if pos == 0:
            return desc.type in self.types()
        return bool(desc.type == (trt.int32 if pos in self.indices else in_out[0].desc.type))

    indices: ClassVar[tuple[int, ...]] = (1,)  # tensors of routes, inputs first

    def types(self) -> tuple[Any, ...]:
        """Return what x may be."""
        return self.trt.float32, self.trt.float16

    def configure_plugin(self, _inputs: Any, _outputs: Any) -> None:
        """Do nothing: all is said by the shapes of a run."""

    def on_shape_change(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> None:
        """Load the kernels of the shapes to come, so that no enqueue does."""
        self._key = None
        for name in {call.kernel for call in self.planned(inputs)}:
            launch.shared().prepare(name)

    def set_tactic(self, _tactic: int) -> None:
        """Do nothing, as there is one way to run; TensorRT demands the method."""

    def planned(self, inputs: Sequence[Any]) -> list[Call]:
        """Return the launches of inputs, without addresses."""
        return self.calls([tuple(d.dims) for d in inputs], self._half(inputs), [0] * 4, [0] * 2, 0)

    def enqueue(
        self, input_desc: Sequence[Any], _output_desc: Sequence[Any], inputs: Sequence[int],
        outputs: Sequence[int], workspace: int, stream: int,
    ) -> None:  # fmt: skip
        """Launch on the stream: nothing is allocated, waited for or copied.

        A context keeps its tensors where they are, so that arguments are packed once.
        """
        key = (tuple(input_desc[0].dims), tuple(inputs), tuple(outputs), workspace)
        if key != self._key:
            shapes = [tuple(desc.dims) for desc in input_desc]
            made = self.calls(shapes, self._half(input_desc), inputs, outputs, workspace or 0)
            self._bound = [launch.shared().bind(call) for call in made]
            self._key = key
        for go in self._bound:
            go(stream)

    def _half(self, inputs: Sequence[Any]) -> bool:
        return bool(inputs[0].type == self.trt.float16)

    def calls(
        self, shapes: Sequence[Dims], half: bool, inputs: Sequence[int], outputs: Sequence[int],
        workspace: int,
    ) -> list[Call]:  # fmt: skip
        """Return the launches."""
        raise NotImplementedError

    def get_workspace_size(self, _inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
        """Return bytes of workspace that any batch of the profile needs."""
        return 0

    def get_fields_to_serialize(self) -> Any:
        """Return the attributes; their memory belongs to this plugin, and lives as long."""
        self._fields = fields_of(self.trt, self.values)
        return self._fields[0]

    def attach_to_context(self, _context: Any) -> Any:
        """Return a copy for one execution context."""
        return self.clone()

    def clone(self) -> Any:
        """Return a copy."""
        made: Any = type(self)  # the class that `plugin` makes
        return made(self.values)


class TopK(Node):
    """VmoeTopK: softmax over the experts, the k highest, the lowest index on ties."""

    op_type = "VmoeTopK"
    fields: ClassVar[dict[str, tuple[int, ...]]] = {"k": (1,)}
    answers = 2
    indices = (2,)

    def types(self) -> tuple[Any, ...]:
        """Return what scores may be: in half precision, near-ties would flip."""
        return (self.trt.float32,)

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        """Return the types of weights and route."""
        return [input_types[0], self.trt.int32]

    def get_output_shapes(self, inputs: Sequence[Any], _shapes: Any, builder: Any) -> list[Any]:
        """Return [N, k], twice."""
        k = int(self.values["k"][0])
        return [self.trt.DimsExprs([inputs[0][0], builder.constant(k)]) for _ in range(2)]

    def calls(
        self, shapes: Sequence[Dims], half: bool, inputs: Sequence[int], outputs: Sequence[int],
        workspace: int,
    ) -> list[Call]:  # fmt: skip
        """Return the launch.

        Raises:
            SettingError: more experts than the kernel's block, or fewer than k.
        """
        (rows, experts), k = shapes[0], int(self.values["k"][0])
        if not 1 <= k <= experts <= calls.MOST_EXPERTS:
            raise SettingError(
                f"VmoeTopK is for 1 <= k <= experts <= {calls.MOST_EXPERTS}; here k is {k} and "
                f"there are {experts}. Use --lowering split."
            )
        return calls.topk(inputs[0], outputs[0], outputs[1], rows, experts, k)


class Linear(Node):
    """RoutedLinear: y[n] = W[expert[n]] x[n] + b[expert[n]]."""

    op_type = "RoutedLinear"
    fields: ClassVar[dict[str, tuple[int, ...]]] = {"relu": (0,)}

    def get_output_shapes(self, inputs: Sequence[Any], _shapes: Any, _builder: Any) -> list[Any]:
        """Return [N, O]."""
        return [self.trt.DimsExprs([inputs[0][0], inputs[2][1]])]

    def calls(
        self, shapes: Sequence[Dims], half: bool, inputs: Sequence[int], outputs: Sequence[int],
        workspace: int,
    ) -> list[Call]:  # fmt: skip
        """Return the launch."""
        (rows, inner), outer = shapes[0], shapes[2][1]
        x, expert, w, b = inputs
        return calls.routed_linear(
            x, expert, w, b, outputs[0], rows=rows, inner=inner, outer=outer,
            relu=bool(self.values["relu"][0]), half=half,
        )  # fmt: skip


class Convolution(Node):
    """RoutedConv3d: every clip is convolved with its own expert's weights."""

    op_type = "RoutedConv3d"
    fields: ClassVar[dict[str, tuple[int, ...]]] = {
        "strides": (1, 1, 1), "pads": (0, 0, 0, 0, 0, 0), "relu": (0,), "tf32": (0,),
    }  # fmt: skip

    def setup(self, values: Mapping[str, Any]) -> None:
        """Take the attributes.

        Raises:
            SettingError: pads of two sides differ.
        """
        super().setup(values)
        pads = self.values["pads"].tolist()
        if pads[:3] != pads[3:]:
            raise SettingError(
                f"RoutedConv3d has pads {pads}; those before and behind must be equal. "
                "Use --lowering split."
            )

    def get_output_shapes(self, inputs: Sequence[Any], _shapes: Any, builder: Any) -> list[Any]:
        """Return [N, O, T', H', W'], T' = (T + 2 pad - kernel) / stride + 1."""
        op, number = self.trt.DimensionOperation, builder.constant
        x, w = inputs[0], inputs[2]
        out = [x[0], w[1]]
        strides, pads = self.values["strides"].tolist(), self.values["pads"].tolist()
        for axis, (stride, pad) in enumerate(zip(strides, pads, strict=False)):
            room = builder.operation(op.SUM, x[2 + axis], number(2 * pad))
            room = builder.operation(op.SUB, room, w[3 + axis])
            steps = builder.operation(op.FLOOR_DIV, room, number(stride))
            out.append(builder.operation(op.SUM, steps, number(1)))
        return [self.trt.DimsExprs(out)]

    def get_workspace_size(self, inputs: Sequence[Any], _outputs: Sequence[Any]) -> int:
        """Return bytes for the splits of K: most of them where the batch is small."""
        x, w = tuple(inputs[0].max), tuple(inputs[2].max)
        return max(self.sizes((n, *x[1:]), w).workspace_bytes for n in range(1, x[0] + 1))

    def sizes(self, x: Dims, w: Dims) -> Conv3d:
        """Return the sizes of a run."""
        strides, pads = self.values["strides"].tolist(), self.values["pads"].tolist()
        return Conv3d(
            x[0], x[1], (x[2], x[3], x[4]), w[1], (w[3], w[4], w[5]), tuple(strides),
            tuple(pads[:3]), bool(self.values["relu"][0]),
        )  # fmt: skip

    def calls(
        self, shapes: Sequence[Dims], half: bool, inputs: Sequence[int], outputs: Sequence[int],
        workspace: int,
    ) -> list[Call]:  # fmt: skip
        """Return the launches."""
        conv = self.sizes(shapes[0], shapes[2])
        precision = "fp16" if half else "tf32" if self.values["tf32"][0] else "fp32"
        x, expert, w, b = inputs
        return calls.routed_conv3d(conv, x, expert, w, b, outputs[0], workspace, precision)


NODES: tuple[type[Node], ...] = (TopK, Linear, Convolution)


def fields_of(trt: Any, values: Mapping[str, NDArray[np.int32]]) -> tuple[Any, list[Any]]:
    """Return attributes as TensorRT takes them, and the fields inside.

    TensorRT takes addresses, and reads there later: of the collection's memory, of names, of
    arrays. Who gives it a collection has to keep both that are returned, and the arrays.
    """
    kind = trt.PluginFieldType.INT32
    fields = [trt.PluginField(name, value, kind) for name, value in values.items()]
    return trt.PluginFieldCollection(fields), fields


def plugin(trt: Any, node: type[Node]) -> type[Any]:
    """Return the plugin's class for one TensorRT."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)
    version = tuple(int(number) for number in trt.__version__.split(".")[:2])

    def __init__(self: Any, values: Mapping[str, Any]) -> None:  # noqa: N807
        for base in bases:
            base.__init__(self)
        if version < FREES_PLUGINS:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        self.num_outputs = node.answers
        node.setup(self, values)

    return type(node.op_type, (node, *bases), {"__init__": __init__, "trt": trt})


def creator(trt: Any, node: type[Node]) -> Any:
    """Return what makes the plugin of an ONNX node, or of a plan."""
    made = plugin(trt, node)

    def __init__(self: Any) -> None:  # noqa: N807
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version = node.op_type, VERSION
        self.plugin_namespace = NAMESPACE
        self.held = {name: np.array(value, np.int32) for name, value in node.fields.items()}
        self.fields = fields_of(trt, self.held)
        self.field_names = self.fields[0]

    def create_plugin(_self: Any, _name: str, given: Any, _phase: Any) -> Any:
        return made({
            field.name: np.array(field.data, np.int32)
            for field in given if field.name in node.fields
        })  # fmt: skip

    body: dict[str, Callable[..., Any]] = {"__init__": __init__, "create_plugin": create_plugin}
    return type(f"{node.op_type}Creator", (trt.IPluginCreatorV3One,), dict(body))()


def named(op_type: str, version: str, namespace: str) -> str:
    """Return what a manifest calls a plugin."""
    return f"{namespace}::{op_type} {version}"


def check(needed: Sequence[str], plan: str, capability: str) -> None:
    """Refuse a plan whose plugins are not among ours, or have no kernels for a GPU.

    Args:
        needed: as `named` calls them; nothing is asked of a plan without.
        plan: its file, for the message.
        capability: the GPU's, such as `8.7`.

    Raises:
        EngineMismatchError: one is of another vmoe, or of somebody else.
        BundleError: the GPU is older than the kernels.
    """
    if needed:
        major, _, minor = capability.partition(".")
        compiled.arch_for(10 * int(major) + int(minor or 0), compiled.archs())
    ours = [named(node.op_type, VERSION, NAMESPACE) for node in NODES]
    others = [name for name in needed if name not in ours]
    if others:
        raise EngineMismatchError(
            f"{plan} needs the plugins {', '.join(others)}; this vmoe has {', '.join(ours)}. "
            "Build it here: vmoe-export BUNDLE --trt."
        )


_kept: list[Any] = []  # the registry does not


def register(trt: Any) -> None:
    """Make the plugins known to TensorRT; a second time does nothing.

    Args:
        trt: the module `tensorrt`.

    Raises:
        EngineMismatchError: TensorRT refuses one.
    """
    registry = trt.get_plugin_registry()
    for node in NODES:
        if registry.get_creator(node.op_type, VERSION, NAMESPACE) is not None:
            continue
        made = creator(trt, node)
        if not registry.register_creator(made, NAMESPACE):
            raise EngineMismatchError(
                f"TensorRT {trt.__version__} refuses the plugin {node.op_type}; see vmoe doctor."
            )
        _kept.append(made)
