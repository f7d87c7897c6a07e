"""A clip taken apart into its frames: what unroll_frames and temporal_winograd have in common.

Every value [N, C, T, H, W] becomes T values [N, C, H, W], once a layer reads it: pixels are scaled
before, in one node for all frames. N stays free, T must be known. What is done to a convolution is
the pass's own matter; all other layers are treated here. A layer that is not known here raises
UnknownLayerError, and the pass leaves the graph as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper

from vmoe.export.passes._builder import Builder, Constants, attributes, outer_names, readers

log = logging.getLogger("vmoe.export")

Frames = list[str]  # the names of a value's frames, in time
TO_CHANNELS_FIRST = [0, 4, 1, 2, 3]  # [N, T, H, W, C] -> [N, C, T, H, W]
TIME = 2
POINTWISE = {"BatchNormalization", "Cast", "Clip", "Elu", "HardSigmoid", "HardSwish", "Identity",
             "LeakyRelu", "Relu", "Sigmoid", "Softplus", "Tanh"}  # fmt: skip


class UnknownLayerError(Exception):
    """A layer that cannot be unrolled."""


class Convolution(NamedTuple):
    """A 3-D convolution.

    Attributes:
        name: of its output.
        weight_name: of its weights.
        weight: [O, I / group, K, kh, kw].
        bias: the name of its bias, or None.
        stride: in time.
        dilation: in time.
        pad: frames of zeros in front of the clip, and behind it.
        plane: attributes of the 2-D convolution of one tap.
    """

    name: str
    weight_name: str
    weight: NDArray[Any]
    bias: str | None
    stride: int
    dilation: int
    pad: tuple[int, int]
    plane: dict[str, Any]

    @property
    def group(self) -> int:
        """How many groups of channels are convolved apart."""
        return int(self.plane["group"])

    def frames_out(self, frames: int) -> int:
        """Return how many frames come out."""
        reach = self.dilation * (self.weight.shape[2] - 1) + 1
        return int((frames + sum(self.pad) - reach) // self.stride) + 1

    def taps(self, t: int, frames: int) -> list[tuple[int, int]]:
        """Return (tap, frame) of what makes frame t; taps that fall into the padding are out."""
        first = t * self.stride - self.pad[0]
        at = [(k, first + k * self.dilation) for k in range(self.weight.shape[2])]
        return [(k, frame) for k, frame in at if 0 <= frame < frames]


class Layer(Builder):
    """Nodes of 2-D layers over frames."""

    def conv(
        self, of: Convolution, frame: str, weight: str, name: str, bias: str | None = None
    ) -> str:
        """Convolve a frame."""
        return self.node("Conv", [frame, weight, *([bias] if bias else [])], name, **of.plane)

    def add(self, a: str | None, b: str, name: str) -> str:
        """Add b to a, where there is an a."""
        return b if a is None else self.node("Add", [a, b], name)


# (builder, convolution, its input's frames, what is added to its output's frames) -> its output's
Convolve = Callable[[Layer, Convolution, Frames, Frames | None], Frames]


def unroll(graph: GraphProto, convolve: Convolve) -> bool:
    """Take a graph's clips apart, in place; return whether it was done."""
    if not any(_is_3d(node, graph) for node in graph.node):
        return False
    try:
        made = _Unroll(graph, convolve).run()
    except UnknownLayerError as e:
        log.debug("%s is not unrolled: %s", graph.name or "a graph", e)
        return False
    made.put_into(graph)
    return True


def _is_3d(node: NodeProto, graph: GraphProto) -> bool:
    return node.op_type == "Conv" and any(
        tensor.name == node.input[1] and len(tensor.dims) == 5 for tensor in graph.initializer
    )


class _Unroll:
    """One walk over a graph, from its input on."""

    def __init__(self, graph: GraphProto, convolve: Convolve) -> None:
        self.graph = graph
        self.convolve = convolve
        self.constants = Constants(graph)
        self.readers = readers(graph)
        self.build = Layer(graph)
        self.frames: dict[str, Frames] = {}
        self.whole: dict[str, int] = {}  # clips that are not apart yet: how many frames they have
        self.waiting: dict[str, Convolution] = {}  # for the Add that reads them, by their output
        self.waiting_on: dict[str, Frames] = {}

    def run(self) -> Layer:
        for node in self.graph.node:
            if outer_names(node):
                raise UnknownLayerError(f"{node.op_type} {node.name} has a subgraph")
            known = (self.frames, self.waiting, self.whole)
            if self._is_scaling(node):
                self.build.nodes.append(node)
                self.whole[node.output[0]] = self.whole[node.input[0]]
            elif any(name in some for name in node.input for some in known):
                self._layer(node)
            elif not self._enter(node):
                self.build.nodes.append(node)
        left = {v.name for v in self.graph.output} & (set(self.frames) | set(self.waiting))
        if left:
            raise UnknownLayerError(f"output {left.pop()} has a time axis")
        return self.build

    def _enter(self, node: NodeProto) -> bool:
        """Split the clip where its channels are moved to the front."""
        if node.op_type != "Transpose" or attributes(node).get("perm") != TO_CHANNELS_FIRST:
            return False
        clip = node.input[0]
        sizes = self._clips().get(clip)
        if sizes is None:
            return False
        if len(sizes) < 5 or not sizes[1]:
            raise UnknownLayerError(f"{clip} has a free number of frames")
        self.build.nodes.append(node)
        self.whole[node.output[0]] = sizes[1]
        return True

    def _clips(self) -> dict[str, list[int]]:
        """Return the sizes of what may be a clip: inputs, and what is reshaped before any layer."""
        sizes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in self.graph.input
        }
        for node in self.build.nodes:
            if node.op_type == "Reshape" and node.input[1] in self.constants:
                sizes[node.output[0]] = self.constants[node.input[1]].tolist()
        return sizes

    def _is_scaling(self, node: NodeProto) -> bool:
        """Return whether a node scales or shifts a clip that is whole: one node for all frames."""
        steps = node.op_type in ("Cast", "Add", "Sub", "Mul", "Div")
        first, *others = [*node.input] or [""]
        return steps and first in self.whole and all(name in self.constants for name in others)

    def _apart(self, clip: str) -> Frames:
        """Take every frame out of a clip, [N, C, T, H, W]."""
        at = [
            self.build.constant(f"frame{t}", np.asarray(t, np.int64))
            for t in range(self.whole.pop(clip))
        ]
        return [
            self.build.node("Gather", [clip, one], f"{clip}/t{t}", axis=TIME)
            for t, one in enumerate(at)
        ]

    def _layer(self, node: NodeProto) -> None:
        op = node.op_type
        treat = getattr(self, f"_{op.lower()}", None)
        if op in POINTWISE:
            treat = self._pointwise
        elif op in ("Add", "Sub", "Mul", "Div"):
            treat = self._binary
        if treat is None or len(node.output) != 1:
            raise UnknownLayerError(f"{op} {node.name} is not known")
        treat(node, attributes(node))

    def _of(self, name: str) -> Frames:
        """Return a value's frames; a convolution that was waiting is written now."""
        if name in self.waiting:
            conv = self.waiting.pop(name)
            self.frames[name] = self.convolve(self.build, conv, self.waiting_on.pop(name), None)
        if name in self.whole:
            self.frames[name] = self._apart(name)
        if name not in self.frames:
            raise UnknownLayerError(f"{name} has no frames")
        return self.frames[name]

    def _constant(self, name: str) -> NDArray[Any]:
        if name not in self.constants:
            raise UnknownLayerError(f"{name} is no constant")
        return self.constants[name]

    def _each(self, node: NodeProto, frames: Frames, op: str | None = None, **given: Any) -> Frames:
        """Write a node once for each frame."""
        out, rest = node.output[0], node.input[1:]
        return [
            self.build.node(op or node.op_type, [frame, *rest], f"{out}/t{t}", **given)
            for t, frame in enumerate(frames)
        ]

    # ---- layers

    def _pointwise(self, node: NodeProto, given: dict[str, Any]) -> None:
        if given.get("training_mode"):
            raise UnknownLayerError(f"{node.name} is in training mode")
        for name in node.input[1:]:
            if name:
                self._constant(name)
        self.frames[node.output[0]] = self._each(node, self._of(node.input[0]), **given)

    def _binary(self, node: NodeProto, given: dict[str, Any]) -> None:
        a, b = node.input
        out = node.output[0]
        if a in self.constants or b in self.constants:
            operands = [
                self._plain(name) if name in self.constants else self._of(name) for name in (a, b)
            ]
        elif node.op_type == "Add" and a != b and {a, b} & set(self.waiting):
            self.frames[out] = self._residual(a, b)
            return
        else:
            operands = [self._of(a), self._of(b)]
        count = max(map(len, operands))
        if {len(operand) for operand in operands} - {1, count}:
            raise UnknownLayerError(f"{node.name} adds clips of different lengths")
        full = [operand * (count // len(operand)) for operand in operands]
        self.frames[out] = [
            self.build.node(node.op_type, pair, f"{out}/t{t}")
            for t, pair in enumerate(zip(*full, strict=True))
        ]

    def _plain(self, name: str) -> Frames:
        """Return a constant operand, the same for each frame, without its time axis."""
        value = self._constant(name)
        if value.size == 1:
            return [self.build.constant(f"{name}/frame", value.reshape(()))]
        if value.ndim != 5 or value.shape[TIME] != 1:
            raise UnknownLayerError(f"constant {name} has shape {list(value.shape)}")
        return [self.build.constant(f"{name}/frame", value.squeeze(TIME))]

    def _residual(self, a: str, b: str) -> Frames:
        """Add a convolution to what is there already: the sum begins with that.

        Of two convolutions the smaller is written first, the other added to it.
        """
        both = [name for name in (a, b) if name in self.waiting]
        last = max(both, key=lambda name: self.waiting[name].weight.size)
        other = b if last == a else a
        conv, frames = self.waiting.pop(last), self.waiting_on.pop(last)
        residual = self._of(other)
        count = conv.frames_out(len(frames))
        if len(residual) not in (1, count):
            raise UnknownLayerError(f"{conv.name} is added to a clip of another length")
        return self.convolve(self.build, conv, frames, residual * (count // len(residual)))

    def _conv(self, node: NodeProto, given: dict[str, Any]) -> None:
        frames, out = self._of(node.input[0]), node.output[0]
        conv = self._read_conv(node, given)
        count = conv.frames_out(len(frames))
        if count < 1 or not all(conv.taps(t, len(frames)) for t in range(count)):
            raise UnknownLayerError(f"{node.name} has frames made of padding alone")
        reading = self.readers[out]
        if len(reading) == 1 and reading[0].op_type == "Add":
            self.waiting[out], self.waiting_on[out] = conv, frames
        else:
            self.frames[out] = self.convolve(self.build, conv, frames, None)

    def _read_conv(self, node: NodeProto, given: dict[str, Any]) -> Convolution:
        weight = self._constant(node.input[1])
        bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
        if weight.ndim != 5:
            raise UnknownLayerError(f"{node.name} is no 3-D convolution")
        pads, strides, dilations = _window(node, given)
        plane = {
            "kernel_shape": list(weight.shape[3:]), "strides": strides[1:], "pads": _plane(pads),
            "dilations": dilations[1:], "group": given.get("group", 1),
        }  # fmt: skip
        return Convolution(node.output[0], node.input[1], weight, bias, strides[0], dilations[0],
                           (pads[0], pads[3]), plane)  # fmt: skip

    def _maxpool(self, node: NodeProto, given: dict[str, Any]) -> None:
        def join(frames: Frames, name: str) -> str:
            return frames[0] if len(frames) == 1 else self.build.node("Max", frames, name)

        self._pool(node, given, join)

    def _averagepool(self, node: NodeProto, given: dict[str, Any]) -> None:
        size = given["kernel_shape"][0]

        def join(frames: Frames, name: str) -> str:
            count = size if given.get("count_include_pad") else len(frames)
            return self._mean(frames, count, name)

        self._pool(node, given, join)

    def _mean(self, frames: Frames, count: int, name: str) -> str:
        """Return the frames' sum over a count."""
        total: str | None = None
        for i, frame in enumerate(frames):
            total = self.build.add(total, frame, f"{name}/sum{i}")
        assert total is not None
        if count == 1:
            return total
        share = self.build.constant(f"one/{count}", np.asarray(1 / count, np.float32))
        return self.build.node("Mul", [total, share], name)

    def _pool(
        self, node: NodeProto, given: dict[str, Any], join: Callable[[Frames, str], str]
    ) -> None:
        """Pool each frame, then over time."""
        if given.get("ceil_mode") or given.get("storage_order"):
            raise UnknownLayerError(f"{node.name} rounds up")
        frames, out = self._of(node.input[0]), node.output[0]
        pads, strides, dilations = _window(node, given)
        size = given["kernel_shape"][0]
        plane: dict[str, Any] = {"kernel_shape": given["kernel_shape"][1:], "strides": strides[1:],
                                 "pads": _plane(pads)}  # fmt: skip
        if dilations[1:] != [1, 1]:  # an AveragePool has none before opset 19
            plane["dilations"] = dilations[1:]
        if "count_include_pad" in given:
            plane["count_include_pad"] = given["count_include_pad"]
        over = Convolution(out, "", np.empty((0, 0, size)), None, strides[0], dilations[0],
                           (pads[0], pads[3]), {})  # fmt: skip
        taps = [over.taps(t, len(frames)) for t in range(over.frames_out(len(frames)))]
        if not taps or not all(taps):
            raise UnknownLayerError(f"{node.name} has frames made of padding alone")
        flat = self._each(node, frames, **plane) if _does_something(plane) else frames
        self.frames[out] = [
            join([flat[at] for _, at in some], f"{out}/over/t{t}") for t, some in enumerate(taps)
        ]

    def _reducemean(self, node: NodeProto, given: dict[str, Any]) -> None:
        axes = self._constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        if axes is None or sorted(axis % 5 for axis in axes.tolist()) != [2, 3, 4]:
            raise UnknownLayerError(f"{node.name} is no mean over time, height and width")
        self._head(node, keep=bool(given.get("keepdims", 1)))

    def _globalaveragepool(self, node: NodeProto, given: dict[str, Any]) -> None:
        self._head(node, keep=True)

    def _head(self, node: NodeProto, *, keep: bool) -> None:
        """Average over a clip: over its frames first, so that one frame is left to pool."""
        frames, out = self._of(node.input[0]), node.output[0]
        mean = self._mean(frames, len(frames), f"{out}/mean")
        pooled = self.build.node("GlobalAveragePool", [mean], f"{out}/t0")
        if keep:
            self.frames[out] = [pooled]
        else:
            axes = self.build.constant("height_width", np.asarray([2, 3], np.int64))
            self._leave("Squeeze", [pooled, axes], out)

    def _leave(self, op: str, inputs: Sequence[str], out: str, **given: Any) -> None:
        """Write a node whose output has no time axis any more, under its own name."""
        self.build.nodes.append(_named(op, inputs, out, **given))

    def _reshape(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Reshape one frame: without its time axis of 1 it is the same values in a row."""
        shape = self._constant(node.input[1]).tolist()
        if 0 in shape[1:]:
            raise UnknownLayerError(f"{node.name} keeps sizes by their place")
        self._leave("Reshape", [self._only(node), node.input[1]], node.output[0], **given)

    def _flatten(self, node: NodeProto, given: dict[str, Any]) -> None:
        if given.get("axis", 1) not in (0, 1):
            raise UnknownLayerError(f"{node.name} does not flatten all but the clips")
        self._leave("Flatten", [self._only(node)], node.output[0], **given)

    def _only(self, node: NodeProto) -> str:
        frames = self._of(node.input[0])
        if len(frames) != 1:
            raise UnknownLayerError(f"{node.name} takes {len(frames)} frames at once")
        return frames[0]

    def _concat(self, node: NodeProto, given: dict[str, Any]) -> None:
        parts, out = [self._of(name) for name in node.input], node.output[0]
        axis = given["axis"] % 5
        if axis == TIME:
            self.frames[out] = [frame for part in parts for frame in part]
            return
        if axis < TIME and len({len(part) for part in parts}) == 1:
            self.frames[out] = [
                self.build.node("Concat", some, f"{out}/t{t}", axis=axis)
                for t, some in enumerate(zip(*parts, strict=True))
            ]
            return
        raise UnknownLayerError(f"{node.name} joins clips along axis {axis}")

    def _slice(self, node: NodeProto, given: dict[str, Any]) -> None:
        """Choose frames; a slice that takes everything along another axis changes nothing."""
        frames = self._of(node.input[0])
        starts, ends, *more = (self._constant(name).tolist() for name in node.input[1:])
        axes = more[0] if more else list(range(len(starts)))
        steps = more[1] if len(more) > 1 else [1] * len(starts)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            if axis % 5 == TIME:
                if step < 1:
                    raise UnknownLayerError(f"{node.name} goes back in time")
                frames = frames[start:end:step]
            elif (start, step) != (0, 1) or end < np.iinfo(np.int32).max:
                raise UnknownLayerError(f"{node.name} cuts along axis {axis}")
        if not frames:
            raise UnknownLayerError(f"{node.name} leaves no frame")
        self.frames[node.output[0]] = frames

    def _gather(self, node: NodeProto, given: dict[str, Any]) -> None:
        index = self._constant(node.input[1])
        if given.get("axis", 0) % 5 != TIME or index.ndim != 1:
            raise UnknownLayerError(f"{node.name} gathers no frames")
        frames = self._of(node.input[0])
        self.frames[node.output[0]] = [frames[i] for i in index.tolist()]


def _does_something(plane: dict[str, Any]) -> bool:
    """Return whether a pool does anything inside of a frame."""
    return plane["kernel_shape"] != [1, 1] or plane["strides"] != [1, 1] or any(plane["pads"])


def _window(node: NodeProto, given: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Return pads, strides and dilations of a layer over time, height and width."""
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b""):
        raise UnknownLayerError(f"{node.name} pads by itself")
    ones = [1, 1, 1]
    return (
        list(given.get("pads", [0] * 6)),
        list(given.get("strides", ones)),
        list(given.get("dilations", ones)),
    )


def _plane(pads: list[int]) -> list[int]:
    """Return the padding of height and width alone."""
    return [*pads[1:3], *pads[4:6]]


def _named(op: str, inputs: Sequence[str], out: str, **given: Any) -> NodeProto:
    return helper.make_node(op, list(inputs), [out], out, **given)
