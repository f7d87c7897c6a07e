"""A quantised graph with gradients: what an int8 engine computes, its Q/DQ pairs straight through.

Going forward, a Q/DQ pair rounds and saturates as the engine's does. Going back it is not there:
rounding has no useful slope, and a quantiser that saturates would hide every gradient. Where its
range begins at 0, though, the quantiser has swallowed a ReLU, and below 0 there is no gradient.

Source: the straight-through estimator of Bengio, Leonard and Courville, 2013 (arXiv 1308.3432);
backward-pass approximation of Athalye, Carlini and Wagner, ICML 2018.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vmoe.bundle import Bundle
from vmoe.errors import MissingDependencyError
from vmoe.models import VideoMoE

SAME_GRID = ("Reshape", "Transpose", "Slice", "Concat", "MaxPool", "Expand", "Identity", "Squeeze",
             "Unsqueeze", "Gather", "Flatten")  # fmt: skip  # they only move values
ENDS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}

Attributes = Mapping[str, Any]
Value = Tensor | None


class UnknownOperatorError(Exception):
    """A graph holds an operator that is not known here."""


class Step(NamedTuple):
    """One node, ready to run."""

    run: Callable[..., Tensor]
    attributes: Attributes
    given: tuple[str, ...]
    output: str


class Straight(nn.Module):
    """One part of a bundle as a function of a clip, [B, 3, T, H, W] with pixels in [0, 1]."""

    def __init__(self, path: Path) -> None:
        """Read a graph.

        Raises:
            MissingDependencyError: onnx is not installed.
            UnknownOperatorError: names the operator.
        """
        super().__init__()
        graph = _read(path).graph
        self._names: dict[str, str] = {}
        self._steps: list[Step] = []
        self._input, self._output = graph.input[0].name, graph.output[0].name
        constants = _constants(graph)
        grids: dict[str, tuple[str, str]] = {}  # values that lie on one already, by scale and zero
        for node in graph.node:
            self._take(node, constants, grids)
        wanted = {name for step in self._steps for name in step.given} | {self._output}
        for name, value in constants.items():
            if name in wanted:
                self._names[name] = f"constant{len(self._names)}"
                self.register_buffer(self._names[name], value, persistent=False)

    def _take(self, node: Any, constants: dict[str, Tensor], grids: dict[str, Any]) -> None:
        from onnx import helper

        given, output = tuple(node.input), node.output[0]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "DequantizeLinear":
            if given[0] in constants:
                q, scale, *zero = (constants[n] for n in given)
                axis = int(attributes.get("axis", 1))
                constants[output] = _dequantised(q, scale, *zero[:1], axis=axis)
            else:  # of a Q, which gives what its DQ would
                self._steps.append(Step(_identity, {}, given[:1], output))
                grids[output] = grids[given[0]]
            return
        if node.op_type == "QuantizeLinear":
            scale, zero = given[1:]
            if given[0] in constants:  # weights whose pair is written out
                weight, by, at = (constants[n] for n in given)
                constants[output] = _levels(weight, by, at, int(attributes.get("axis", 1)))
                return
            grids[output] = scale, zero
            if grids.get(given[0]) == (scale, zero):
                self._steps.append(Step(_identity, {}, given[:1], output))
            else:
                self._steps.append(Step(_quantise, {}, given, output))
            return
        if node.op_type not in OPERATORS:
            raise UnknownOperatorError(node.op_type)
        self._steps.append(Step(OPERATORS[node.op_type], attributes, given, output))
        moved = {grids.get(name) for name in given if name in grids}
        if node.op_type in SAME_GRID and len(moved) == 1:
            on_it = all(name in grids or name in constants for name in given)
            if (on_it and node.op_type != "Concat") or all(name in grids for name in given):
                grids[output] = moved.pop()

    def forward(self, clip: Tensor) -> Tensor:
        """Return the part's first output."""
        known: dict[str, Value] = {"": None}
        known |= {name: getattr(self, held) for name, held in self._names.items()}
        known[self._input] = 255 * clip.permute(0, 2, 3, 4, 1)
        for step in self._steps:
            known[step.output] = step.run(*(known[n] for n in step.given), **step.attributes)
        return cast(Tensor, known[self._output])


def source(bundle: Bundle, twin: VideoMoE) -> tuple[VideoMoE, str]:
    """Return where a bundle's gradients come from, and what is to be said of it.

    That is its twin; of int8 parts, their own graphs in the place of the twin's modules.

    Args:
        bundle: with parts of ONNX, or of anything else.
        twin: that it was exported from.

    Raises:
        MissingDependencyError: onnx is not installed.
    """
    device = next(twin.parameters()).device
    int8 = {name: p for name, p in bundle.parts.items() if "int8" in p.precision.get("found", "")}
    if not int8:
        return twin, "gradients from the twin"
    if bundle.lowering != "split" or any(p.format != "onnx" for p in int8.values()):
        return twin, "gradients from the float twin: its int8 graphs cannot be read part by part"
    made = copy.copy(twin)  # the modules are shared; the tables of them are not
    made._modules = dict(twin._modules)
    made.experts = nn.ModuleList(twin.experts)
    try:
        for name, part in int8.items():
            of = Straight(bundle.path / part.file).to(device)
            if name == "router":
                made.router = of
            else:
                made.experts[int(name.removeprefix("expert"))] = of
    except UnknownOperatorError as e:
        return twin, f"gradients from the float twin: {e} of its int8 graphs is not known here"
    return made, "gradients from its fake-quantised graph, straight through"


def _read(path: Path) -> Any:
    try:
        import onnx
    except ImportError as e:
        raise MissingDependencyError(
            "onnx, which reads int8 parts for --mode adaptive, is not installed: "
            "pip install 'vmoe[train]'."
        ) from e
    return onnx.load(path)


def _constants(graph: Any) -> dict[str, Tensor]:
    from onnx import numpy_helper

    return {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}


def _dequantised(value: Tensor, scale: Tensor, zero: Value = None, *, axis: int) -> Tensor:
    """Return weights as floats: scale (q - zero), by channel where the scale has several."""
    shape = _broad(value, scale, axis)
    levels = value.float() - (0 if zero is None else zero.float().reshape(shape))
    return levels * scale.reshape(shape)


def _levels(value: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """Return weights as levels, q = round(w / scale) + zero, saturated."""
    shape = _broad(value, scale, axis)
    levels = (value / scale.reshape(shape)).round() + zero.float().reshape(shape)
    return levels.clamp(*ENDS[zero.dtype])


def _broad(value: Tensor, scale: Tensor, axis: int) -> list[int]:
    """Return the shape by which a scale, one or one a channel, spreads over a value."""
    shape = [1] * value.ndim
    if scale.numel() > 1:
        shape[axis] = -1
    return shape


class _Quantise(torch.autograd.Function):
    """Round and saturate going forward; straight through going back, but for a swallowed ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        low, high = ENDS[zero.dtype]
        ctx.relu = int(zero) == low
        if ctx.relu:
            ctx.save_for_backward(x > 0)
        middle = float(zero)
        return (x / scale).round_().clamp_(low - middle, high - middle).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return slopes[0] * ctx.saved_tensors[0] if ctx.relu else slopes[0], None, None


def _quantise(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return cast(Tensor, _Quantise.apply(x, scale, zero))  # type: ignore[no-untyped-call]


def _identity(x: Tensor, **_: Any) -> Tensor:
    return x


def _convolve(
    x: Tensor, weight: Tensor, bias: Value = None, *, strides: Sequence[int] = (),
    pads: Sequence[int] = (), dilations: Sequence[int] = (), group: int = 1, **_: Any,
) -> Tensor:  # fmt: skip
    axes = weight.ndim - 2
    x, padding = _padded(x, pads or [0] * (2 * axes), 0.0)
    run: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    out: Tensor = run(x, weight, bias, strides or 1, padding, dilations or 1, group)
    return out


def _padded(x: Tensor, pads: Sequence[int], value: float) -> tuple[Tensor, list[int]]:
    """Return a tensor and the padding, the same on both ends, that is left to be done."""
    axes = len(pads) // 2
    first, last = list(pads[:axes]), list(pads[axes:])
    if first == last:
        return x, first
    flat = [n for pair in zip(reversed(first), reversed(last), strict=True) for n in pair]
    return functional.pad(x, flat, value=value), [0] * axes


def _max_pool(
    x: Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] = (),
    pads: Sequence[int] = (), ceil_mode: int = 0, **_: Any,
) -> Tensor:  # fmt: skip
    axes = len(kernel_shape)
    x, padding = _padded(x, pads or [0] * (2 * axes), -torch.inf)
    run: Any = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[axes - 1]
    out: Tensor = run(
        x, list(kernel_shape), list(strides or [1] * axes), padding, ceil_mode=bool(ceil_mode)
    )
    return out


def _slice(
    x: Tensor, starts: Tensor, ends: Tensor, axes: Value = None, steps: Value = None
) -> Tensor:
    along = range(len(starts)) if axes is None else axes.tolist()
    by = [1] * len(starts) if steps is None else steps.tolist()
    at = [slice(None)] * x.ndim
    for axis, start, end, step in zip(along, starts.tolist(), ends.tolist(), by, strict=True):
        at[axis] = slice(start, end, step)
    return x[tuple(at)]


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = shape.tolist()
    if not allowzero:
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _mean(
    x: Tensor, axes: Value = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0, **_: Any
) -> Tensor:
    along = list(range(x.ndim)) if axes is None else axes.tolist()
    return x.mean(dim=along, keepdim=bool(keepdims))


def _gemm(
    a: Tensor, b: Tensor, c: Value = None, *, alpha: float = 1.0, beta: float = 1.0,
    transA: int = 0, transB: int = 0,  # as ONNX spells them
) -> Tensor:  # fmt: skip
    out = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return out if c is None else out + beta * c


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.flatten(axis) if axis == 1 else x.reshape(int(torch.tensor(x.shape[:axis]).prod()), -1)


def _average(x: Tensor, **_: Any) -> Tensor:
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


def _gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    if index.ndim == 0:
        return x.select(axis, int(index))
    return x.index_select(axis, index.flatten())


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    for axis in sorted(axes.tolist()):
        x = x.unsqueeze(axis)
    return x


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda a, b: a + b,
    "Cast": lambda x, **_: x,  # of a clip to float, which it is
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _convolve,
    "Div": lambda a, b: a / b,
    "Expand": lambda x, shape: x.expand(np.broadcast_shapes(x.shape, shape.tolist())),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _average,
    "Identity": _identity,
    "MatMul": lambda a, b: a @ b,
    "MaxPool": _max_pool,
    "Mul": lambda a, b: a * b,
    "ReduceMean": _mean,
    "Relu": lambda x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda x, **_: torch.tensor(x.shape),
    "Slice": _slice,
    "Squeeze": lambda x, axes: x.squeeze(axes.tolist()),
    "Sub": lambda a, b: a - b,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
}
