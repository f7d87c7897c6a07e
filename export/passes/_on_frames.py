"""What the layers of a network over clips become over frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from vmoe.export.passes._builder import attributes
from vmoe.export.passes._frames import TIME, Apart, Convolution, Frames, UnknownLayerError

POINTWISE = ("BatchNormalization", "Cast", "Clip", "Elu", "HardSigmoid", "HardSwish", "Identity",
             "LeakyRelu", "Relu", "Sigmoid", "Softplus", "Tanh")  # fmt: skip
ARITHMETIC = ("Add", "Sub", "Mul", "Div")


def write(node: NodeProto, apart: Apart) -> None:
    """Write a layer over frames.

    Raises:
        UnknownLayerError: it is not known here, or not in that form.
    """
    treat = LAYERS.get(node.op_type)
    if treat is None or len(node.output) != 1:
        raise UnknownLayerError(f"{node.op_type} {node.name} is not known")
    treat(apart, node, attributes(node))


def _pointwise(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    if given.get("training_mode"):
        raise UnknownLayerError(f"{node.name} is in training mode")
    for name in node.input[1:]:
        if name:
            apart.constant(name)
    apart.frames[node.output[0]] = apart.each(node, apart.of(node.input[0]), **given)


def _binary(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    a, b = node.input
    out = node.output[0]
    if a in apart.constants or b in apart.constants:
        operands = [
            _plain(apart, name) if name in apart.constants else apart.of(name) for name in (a, b)
        ]
    elif node.op_type == "Add" and a != b and {a, b} & set(apart.waiting):
        apart.frames[out] = _residual(apart, a, b)
        return
    else:
        operands = [apart.of(a), apart.of(b)]
    count = max(map(len, operands))
    if {len(operand) for operand in operands} - {1, count}:
        raise UnknownLayerError(f"{node.name} adds clips of different lengths")
    full = [operand * (count // len(operand)) for operand in operands]
    apart.frames[out] = [
        apart.build.node(node.op_type, pair, f"{out}/t{t}")
        for t, pair in enumerate(zip(*full, strict=True))
    ]


def _plain(apart: Apart, name: str) -> Frames:
    """Return a constant operand, the same for each frame, without its time axis."""
    value = apart.constant(name)
    if value.size == 1:
        return [apart.build.constant(f"{name}/frame", value.reshape(()))]
    if value.ndim != 5 or value.shape[TIME] != 1:
        raise UnknownLayerError(f"constant {name} has shape {list(value.shape)}")
    return [apart.build.constant(f"{name}/frame", value.squeeze(TIME))]


def _residual(apart: Apart, a: str, b: str) -> Frames:
    """Add a convolution to what is there already: the sum begins with that.

    Of two convolutions the smaller is written first, the other added to it.
    """
    both = [name for name in (a, b) if name in apart.waiting]
    last = max(both, key=lambda name: apart.waiting[name][0].weight.size)
    other = b if last == a else a
    conv, frames = apart.waiting[last]
    residual = apart.of(other)
    count = conv.frames_out(len(frames))
    if len(residual) not in (1, count):
        raise UnknownLayerError(f"{conv.name} is added to a clip of another length")
    return apart.convolved(last, residual * (count // len(residual)))


def _conv(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    frames, out = apart.of(node.input[0]), node.output[0]
    conv = _read_conv(apart, node, given)
    count = conv.frames_out(len(frames))
    if count < 1 or not all(conv.taps(t, len(frames)) for t in range(count)):
        raise UnknownLayerError(f"{node.name} has frames made of padding alone")
    apart.convolve(out, conv, frames)


def _read_conv(apart: Apart, node: NodeProto, given: dict[str, Any]) -> Convolution:
    weight = apart.constant(node.input[1])
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


def _max_pool(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    def join(frames: Frames, name: str) -> str:
        return frames[0] if len(frames) == 1 else apart.build.node("Max", frames, name)

    _pool(apart, node, given, join)


def _average_pool(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    size = given["kernel_shape"][0]

    def join(frames: Frames, name: str) -> str:
        count = size if given.get("count_include_pad") else len(frames)
        return _mean(apart, frames, count, name)

    _pool(apart, node, given, join)


def _mean(apart: Apart, frames: Frames, count: int, name: str) -> str:
    """Return the frames' sum over a count."""
    total: str | None = None
    for i, frame in enumerate(frames):
        total = apart.build.add(total, frame, f"{name}/sum{i}")
    assert total is not None
    if count == 1:
        return total
    share = apart.build.constant(f"one/{count}", np.asarray(1 / count, np.float32))
    return apart.build.node("Mul", [total, share], name)


def _pool(
    apart: Apart, node: NodeProto, given: dict[str, Any], join: Callable[[Frames, str], str]
) -> None:
    """Pool each frame, then over time."""
    if given.get("ceil_mode") or given.get("storage_order"):
        raise UnknownLayerError(f"{node.name} rounds up")
    frames, out = apart.of(node.input[0]), node.output[0]
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
    flat = apart.each(node, frames, **plane) if _does_something(plane) else frames
    apart.frames[out] = [
        join([flat[at] for _, at in some], f"{out}/over/t{t}") for t, some in enumerate(taps)
    ]


def _reduce_mean(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    axes = apart.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    if axes is None or sorted(axis % 5 for axis in axes.tolist()) != [2, 3, 4]:
        raise UnknownLayerError(f"{node.name} is no mean over time, height and width")
    _head(apart, node, keep=bool(given.get("keepdims", 1)))


def _global_average_pool(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    _head(apart, node, keep=True)


def _head(apart: Apart, node: NodeProto, *, keep: bool) -> None:
    """Average over a clip: over its frames first, so that one frame is left to pool."""
    frames, out = apart.of(node.input[0]), node.output[0]
    mean = _mean(apart, frames, len(frames), f"{out}/mean")
    pooled = apart.build.node("GlobalAveragePool", [mean], f"{out}/t0")
    if keep:
        apart.frames[out] = [pooled]
    else:
        axes = apart.build.constant("height_width", np.asarray([2, 3], np.int64))
        _leave(apart, "Squeeze", [pooled, axes], out)


def _leave(apart: Apart, op: str, inputs: Sequence[str], out: str, **given: Any) -> None:
    """Write a node whose output has no time axis any more, under its own name."""
    apart.build.nodes.append(helper.make_node(op, list(inputs), [out], out, **given))


def _reshape(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    """Reshape one frame: without its time axis of 1 it is the same values in a row."""
    shape = apart.constant(node.input[1]).tolist()
    if 0 in shape[1:]:
        raise UnknownLayerError(f"{node.name} keeps sizes by their place")
    _leave(apart, "Reshape", [_only(apart, node), node.input[1]], node.output[0], **given)


def _flatten(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    if given.get("axis", 1) not in (0, 1):
        raise UnknownLayerError(f"{node.name} does not flatten all but the clips")
    _leave(apart, "Flatten", [_only(apart, node)], node.output[0], **given)


def _only(apart: Apart, node: NodeProto) -> str:
    frames = apart.of(node.input[0])
    if len(frames) != 1:
        raise UnknownLayerError(f"{node.name} takes {len(frames)} frames at once")
    return frames[0]


def _concat(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    parts, out = [apart.of(name) for name in node.input], node.output[0]
    axis = given["axis"] % 5
    if axis == TIME:
        apart.frames[out] = [frame for part in parts for frame in part]
        return
    if axis < TIME and len({len(part) for part in parts}) == 1:
        apart.frames[out] = [
            apart.build.node("Concat", some, f"{out}/t{t}", axis=axis)
            for t, some in enumerate(zip(*parts, strict=True))
        ]
        return
    raise UnknownLayerError(f"{node.name} joins clips along axis {axis}")


def _slice(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    """Choose frames; a slice that takes everything along another axis changes nothing."""
    frames = apart.of(node.input[0])
    starts, ends, *more = (apart.constant(name).tolist() for name in node.input[1:])
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
    apart.frames[node.output[0]] = frames


def _gather(apart: Apart, node: NodeProto, given: dict[str, Any]) -> None:
    index = apart.constant(node.input[1])
    if given.get("axis", 0) % 5 != TIME or index.ndim != 1:
        raise UnknownLayerError(f"{node.name} gathers no frames")
    frames = apart.of(node.input[0])
    apart.frames[node.output[0]] = [frames[i] for i in index.tolist()]


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


LAYERS: dict[str, Callable[[Apart, NodeProto, dict[str, Any]], None]] = {
    **dict.fromkeys(POINTWISE, _pointwise), **dict.fromkeys(ARITHMETIC, _binary),
    "Conv": _conv, "MaxPool": _max_pool, "AveragePool": _average_pool,
    "ReduceMean": _reduce_mean, "GlobalAveragePool": _global_average_pool, "Reshape": _reshape,
    "Flatten": _flatten, "Concat": _concat, "Slice": _slice, "Gather": _gather,
}  # fmt: skip
