"""Where parity breaks: the part, and in it the first layer whose answer is off.

The fp32 graph and the one under test run on the same clips, with every layer's answer as an
output; answers are compared by the layer's place in the twin, in the order of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, ValueInfoProto

from vmoe.clips import Clips

from . import layers
from .onnx import Parts

AROUND = ("Cast", "BatchNormalization")  # of a layer that stands apart from its normalisation


class Step(NamedTuple):
    """One layer.

    Attributes:
        place: in the twin.
        error: largest difference, as a share of the layer's largest value.
    """

    place: str
    error: float


class Break(NamedTuple):
    """Where parity breaks.

    Attributes:
        part: `router` or `expertI`; None where each part alone is as it should be.
        place: of the first layer that is off, in the twin; None where none can be compared.
        error: of that layer.
        before: of the layer before it; 0 of the first.
        steps: every layer of the part.
    """

    part: str | None
    place: str | None = None
    error: float = 0.0
    before: float = 0.0
    steps: tuple[Step, ...] = ()

    def line(self) -> str:
        """Return it as a line says it."""
        if self.part is None:
            return "bisect: every part alone is as it should be; it is the lowering or the backend."
        if self.place is None:
            return f"bisect: {self.part} is off, and shares no layer with its fp32 graph."
        return (
            f"bisect: {self.part} breaks at {self.place}: off by {self.error:.3g} of its largest "
            f"value, the layer before it by {self.before:.3g}."
        )

    def to_report(self) -> dict[str, Any]:
        """Return it as report.json has it."""
        steps = [step._asdict() for step in self.steps]
        return {"part": self.part, "place": self.place, "error": self.error, "layers": steps}


def find(plain: Parts, tested: Parts, clips: Clips, bound: float) -> Break:
    """Name the part and the layer that break parity.

    Args:
        plain: the twin's graphs in fp32.
        tested: the same parts as they would be deployed.
        clips: uint8 [N, T, H, W, 3].
        bound: the difference that is allowed, as a share of the largest value.

    Returns:
        Of the part whose answer is farthest off, the first layer beyond the bound; where none
        is, the one that is farthest off.
    """
    both = zip(plain.experts, tested.experts, strict=True)
    pairs = {f"expert{i}": pair for i, pair in enumerate(both)}
    if plain.router is not None and tested.router is not None:
        pairs["router"] = (plain.router, tested.router)
    off = {
        name: _error(_answers(a, [], clips)[-1], _answers(b, [], clips)[-1])
        for name, (a, b) in pairs.items()
    }
    worst = max(off, key=off.__getitem__)
    if not off[worst] > bound:
        return Break(None)
    plain_part, tested_part = pairs[worst]
    steps = _steps(plain_part, tested_part, worst, clips)
    if not steps:
        return Break(worst)
    beyond = [i for i, step in enumerate(steps) if step.error > bound]
    at = beyond[0] if beyond else max(range(len(steps)), key=lambda i: steps[i].error)
    before = steps[at - 1].error if at else 0.0
    return Break(worst, steps[at].place, steps[at].error, before, steps)


class _Pair(NamedTuple):
    """A layer's answer in both graphs: a value of the plain one, one or more of the other."""

    place: str
    plain: str
    tested: list[str]


def _steps(plain: ModelProto, tested: ModelProto, part: str, clips: Clips) -> tuple[Step, ...]:
    """Compare every layer that both graphs have."""
    pairs = list(_pairs(plain, tested, part))
    reference = _answers(plain, [pair.plain for pair in pairs], clips)
    asked = [name for pair in pairs for name in pair.tested]
    found = iter(_answers(tested, asked, clips))
    steps = []
    for pair, value in zip(pairs, reference, strict=False):  # last comes the graph's own answer
        frames = [next(found) for _ in pair.tested]
        got = frames[0] if len(frames) == 1 else np.stack(frames, axis=2)
        if got.ndim == value.ndim > 1:
            got = got[:, : value.shape[1]]  # without channels that a pass has padded
        if got.shape == value.shape:
            steps.append(Step(pair.place, _error(value, got)))
    return tuple(steps)


def _pairs(plain: ModelProto, tested: ModelProto, part: str) -> Iterator[_Pair]:
    """Yield the layers that both graphs have, in the order of the plain one."""
    known = {output for node in plain.graph.node for output in node.output}
    held = layers.of_model(tested, part)
    count = Counter(layer.place for layer in held)
    own = {layer.place: layer for layer in held}
    for layer in layers.of_model(plain, part):
        frames = _frames(tested.graph, layer.output)
        if frames:
            yield _Pair(layer.place, layer.output, frames)
        elif count[layer.place] == 1:
            value = _settled(tested.graph, own[layer.place].output)
            name = value if value in known else layer.output
            yield _Pair(layer.place, name, [_dequantised(tested.graph, value)])


def _frames(graph: GraphProto, name: str) -> list[str]:
    """Return the values that a clip's value was taken apart into, in time."""
    made = {output for node in graph.node for output in node.output}
    frames: list[str] = []
    while (frame := f"{name}/t{len(frames)}") in made:
        frames.append(_dequantised(graph, frame))
    return frames


def _settled(graph: GraphProto, value: str) -> str:
    """Follow a layer's answer through the normalisation that was not folded into it."""
    while True:
        readers = [node for node in graph.node if value in node.input]
        if len(readers) != 1 or readers[0].op_type not in AROUND:
            return value
        value = readers[0].output[0]


def _dequantised(graph: GraphProto, value: str) -> str:
    """Return a value after its Q/DQ pair, where it has one: as the layers behind it see it."""
    rounded = next((n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == value),
                   None)  # fmt: skip
    if rounded is None:
        return value
    back = next(n for n in graph.node if n.input and n.input[0] == rounded.output[0])
    return back.output[0] if back.op_type == "DequantizeLinear" else value


def _answers(model: ModelProto, names: list[str], clips: Clips) -> list[NDArray[Any]]:
    """Run a graph; return these values and, last, its own answer."""
    import onnxruntime

    made = ModelProto()
    made.CopyFrom(model)
    own = model.graph.output[0].name
    extra = dict.fromkeys(name for name in names if name != own)
    made.graph.output.extend(ValueInfoProto(name=name) for name in extra)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values: list[NDArray[Any]] = session.run([*names, own], {"clip": clips})
    return values


def _error(reference: NDArray[Any], found: NDArray[Any]) -> float:
    """Return the largest difference as a share of the largest value; infinite if not a number."""
    a, b = reference.astype(np.float64), found.astype(np.float64)
    scale = max(float(np.abs(a).max(initial=0.0)), 1e-12)
    error = float(np.abs(a - b).max(initial=0.0)) / scale
    return error if np.isfinite(error) else float("inf")
