"""Where parity breaks: the part, the block and the layer in it, against the twin itself.

The twin runs the clips with a hook before every layer; the graph under test, in ONNX Runtime, gives
the same values out. Compared is what every layer is given, by its place in the twin, and what the
part answers: these values are there in every form of a graph, frame by frame where it is unrolled,
as they are after rounding in int8. The first of them that is off is made by the layers between it
and those before it, which are not off.

    clip -- stem -- (ok) conv1 -- (ok) conv2 -------- (off) next block
                      |                          |
                      +-------- downsample ------+    breaks in the block, at conv2 or downsample
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, ValueInfoProto
from torch import Tensor, nn

from vmoe.batches import to_tensor
from vmoe.clips import Clips
from vmoe.models import VideoMoE

from . import layers
from .onnx import Parts
from .passes import fold_stride

BATCH = 2  # clips whose values are held at a time
KINDS = (nn.modules.conv._ConvNd, nn.Linear)  # layers that get their one input from a call
CONTAINERS = (nn.Sequential, nn.ModuleList)
ROUNDED = ("Clip", "Identity", "Relu")  # that a quantiser leaves out where the range says as much

Values = list[NDArray[Any]]


class Step(NamedTuple):
    """A value that twin and graph both have.

    Attributes:
        place: of the layer that it is given to, in the twin; the part's own for its answer.
        error: largest difference, as a share of the largest value.
    """

    place: str
    error: float


class Break(NamedTuple):
    """Where parity breaks.

    Attributes:
        part: `router` or `expertI`; None where each part alone is as it should be.
        block: the module of the twin that holds `layers`; None where no value can be compared.
        layers: places in the twin; one of them is off. None: it is no layer, but what is between.
        before: the place that is given the first value that is off.
        error: of that value.
        error_before: the largest of the values before it.
        steps: every value of the part that was compared.
        why: why nothing can be said; else None.
    """

    part: str | None
    block: str | None = None
    layers: tuple[str, ...] = ()
    before: str | None = None
    error: float = 0.0
    error_before: float = 0.0
    steps: tuple[Step, ...] = ()
    why: str | None = None

    def line(self) -> str:
        """Return it as a line says it."""
        if self.why is not None:
            return f"bisect: nothing can be said: {self.why}"
        if self.part is None:
            return (
                "bisect: every part alone is within the bound of the twin in ONNX Runtime; what is "
                "off is the mean, the lowering or the backend."
            )
        if self.block is None:
            return f"bisect: {self.part} is off, and shares no value with the twin."
        at = " or ".join(self.layers) or f"what is done to the input of {self.before}, no layer"
        return (
            f"bisect: {self.part} breaks in {self.block}, at {at}: off by {self.error:.3g} of its "
            f"largest value, what comes before by {self.error_before:.3g}."
        )

    def to_report(self) -> dict[str, Any]:
        """Return it as report.json has it."""
        steps = [step._asdict() for step in self.steps]
        return {"said": self.line(), **self._asdict(), "layers": list(self.layers), "steps": steps}


class Found(NamedTuple):
    """A value of the twin in the graph under test.

    Attributes:
        names: of its frames there, or of itself.
        scale: what pixels in blocks are yet to be multiplied by; None of what is in no blocks.
    """

    names: list[str]
    scale: NDArray[Any] | None = None


class UnrunnableError(Exception):
    """A graph that ONNX Runtime does not run here."""


def find(
    twin: VideoMoE, named: Parts, tested: Parts, clips: Clips, bounds: Mapping[str, float]
) -> Break:
    """Name the part, the block and the layer that break parity.

    Args:
        twin: in eval mode, on the CPU.
        named: its graphs as exported, whose names of values every later form keeps.
        tested: the same parts as they would be deployed.
        clips: uint8 [N, T, H, W, 3].
        bounds: `router` and `experts`: the difference that is allowed, as a share of the largest
            value.
    """
    parts = dict(_pairs(twin, named, tested))
    try:
        off = {name: part.steps(clips, [])[-1].error for name, part in parts.items()}
        beyond = {name: error / bounds[parts[name].kind] for name, error in off.items()}
        worst = max(beyond, key=beyond.__getitem__)
        if not beyond[worst] > 1:
            return Break(None)
        return _break(parts[worst], clips, bounds[parts[worst].kind])
    except UnrunnableError as e:
        return Break(None, why=str(e))


def _pairs(twin: VideoMoE, named: Parts, tested: Parts) -> Iterator[tuple[str, _Part]]:
    if named.router is not None and tested.router is not None:
        yield "router", _Part(twin, "router", named.router, tested.router)
    for i, (plain, model) in enumerate(zip(named.experts, tested.experts, strict=True)):
        yield f"expert{i}", _Part(twin, f"expert{i}", plain, model)


def _break(part: _Part, clips: Clips, bound: float) -> Break:
    given = part.given()
    steps = part.steps(clips, given)
    if len(steps) == 1:
        return Break(part.name)
    at = next(i for i, step in enumerate(steps) if step.error > bound)
    values = {layer.place: layer.given for layer in given}
    fine = {values[step.place] for step in steps[:at]}
    off = values.get(steps[at].place, part.plain.graph.output[0].name)
    suspects = tuple(part.between(fine, off))
    block = part.block(suspects or (steps[at].place,))
    before = max((step.error for step in steps[:at]), default=0.0)
    return Break(part.name, block, suspects, steps[at].place, steps[at].error, before, tuple(steps))


class _Part:
    """A part of the twin, its graph as exported, and the graph under test."""

    def __init__(self, twin: VideoMoE, name: str, plain: ModelProto, tested: ModelProto) -> None:
        self.twin, self.name, self.plain, self.tested = twin, name, plain, tested
        self.root = layers.twin_place(name)
        self.kind = self.root.partition(".")[0]  # router or experts
        self._layers = layers.of_model(plain, name)

    def given(self) -> list[layers.Layer]:
        """Return the layers whose input twin and graph both have, in the order of the graph."""
        count = Counter(layer.place for layer in self._layers)
        modules = dict(self.twin.named_modules())
        return [
            layer
            for layer in self._layers
            if count[layer.place] == 1
            and isinstance(modules.get(layer.place), KINDS)
            and self._found(layer.given).names
        ]

    def steps(self, clips: Clips, given: Sequence[layers.Layer]) -> list[Step]:
        """Compare what these layers are given, and last the part's answer."""
        found = [self._found(layer.given) for layer in given]
        found.append(Found([self.tested.graph.output[0].name]))
        run = _session(self.tested, [name for value in found for name in value.names])
        places = [layer.place for layer in given]
        largest = np.zeros((2, len(found)))  # difference, value
        known = np.ones(len(found), bool)
        for start in range(0, len(clips), BATCH):
            some = clips[start : start + BATCH]
            values = iter(run(some))
            for i, (wanted, value) in enumerate(
                zip(self._of_twin(some, places), found, strict=True)
            ):
                got = _joined([next(values) for _ in value.names], value.scale, wanted)
                known[i] &= got is not None
                if got is not None:
                    pair = np.abs(wanted - got).max(initial=0.0), np.abs(wanted).max(initial=0.0)
                    largest[:, i] = np.maximum(largest[:, i], pair)  # NaN stays NaN
        errors = largest[0] / np.maximum(largest[1], 1e-12)
        errors[np.isnan(errors)] = np.inf
        made = map(Step, [*places, self.root], map(float, errors))
        return [step for step, is_known in zip(made, known, strict=True) if is_known]

    def between(self, fine: set[str], off: str) -> Iterator[str]:
        """Yield the layers that a value is made by, back to values that are fine."""
        by = {layer.output: layer for layer in self._layers}
        made = {name: node for node in self.plain.graph.node for name in node.output}
        seen, waiting = set(fine), [off]
        while waiting:
            name = waiting.pop()
            if name in seen or name not in made:
                continue
            seen.add(name)
            waiting += [by[name].given] if name in by else [*made[name].input]
            if name in by:
                yield by[name].place

    def block(self, places: Sequence[str]) -> str:
        """Return the innermost module around layers that is no mere list, below the network."""
        paths = zip(*(place.split(".")[:-1] for place in places), strict=False)
        around = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, paths)]
        for end in range(len(around), len(self.root.split(".")) + 1, -1):
            place = ".".join(around[:end])
            if not isinstance(self.twin.get_submodule(place), CONTAINERS):
                return place
        return ".".join(around) or self.root

    def _found(self, value: str) -> Found:
        """Return where a value as exported stands in the graph under test; nowhere: no names."""
        maker = {name: node for node in self.plain.graph.node for name in node.output}
        while True:
            names, blocks = self._tested(value), self._tested(fold_stride.in_blocks(value))
            if blocks:
                return Found(blocks, self._scale(value))
            if names or value not in maker or maker[value].op_type not in ROUNDED:
                return Found(names)
            value = maker[value].input[0]

    def _tested(self, value: str) -> list[str]:
        """Return a value's frames in the graph under test, or itself, as the layers see them."""
        graph = self.tested.graph
        made = {name for node in graph.node for name in node.output}
        frames: list[str] = []
        while (frame := f"{value}/t{len(frames)}") in made:
            frames.append(frame)
        return [_dequantised(graph, name) for name in frames or [value] * (value in made)]

    def _scale(self, value: str) -> NDArray[Any]:
        """Return what pixels are scaled by, as exported: of a white clip over a black one."""
        ends = np.stack([np.full(self.twin.spec.shape, end, np.uint8) for end in (0, 255)])
        black, white = _session(self.plain, [value])(ends)[0].astype(np.float64)
        scale: NDArray[Any] = (white - black) / 255
        return scale

    def _of_twin(self, clips: Clips, places: Sequence[str]) -> Values:
        """Return what the twin's layers are given, and last what the part answers."""
        seen: dict[str, Tensor] = {}

        def note(place: str) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen.setdefault(place, args[0].detach().clone())

            return hook

        hooks = [
            self.twin.get_submodule(place).register_forward_pre_hook(note(place))
            for place in places
        ]
        clip = to_tensor(clips)
        try:
            with torch.no_grad():
                if self.kind == "router":
                    answer = self.twin.scores(clip)
                else:
                    answer = self.twin.run_expert(int(self.root.partition(".")[2]), clip)
        finally:
            for hook in hooks:
                hook.remove()
        return [value.double().numpy() for value in (*(seen[p] for p in places), answer)]


def _dequantised(graph: GraphProto, value: str) -> str:
    """Return a value after its Q/DQ pair, where it has one: as the layers behind it see it."""
    rounded = next((n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == value),
                   None)  # fmt: skip
    if rounded is None:
        return value
    back = next(n for n in graph.node if n.input and n.input[0] == rounded.output[0])
    return back.output[0] if back.op_type == "DequantizeLinear" else value


def _joined(frames: Values, scale: NDArray[Any] | None, like: NDArray[Any]) -> NDArray[Any] | None:
    """Return a value that may be in frames and in blocks, without padded channels.

    None where it is of another shape.
    """
    got = frames[0] if len(frames) == 1 and frames[0].ndim == like.ndim else np.stack(frames, 2)
    if scale is not None:
        got = fold_stride.pixels(got, like.shape[1]) * scale
    if got.ndim == like.ndim > 1:
        got = got[:, : like.shape[1]]
    return got.astype(np.float64) if got.shape == like.shape else None


def _session(model: ModelProto, names: Sequence[str]) -> Any:
    """Return a graph as a function from clips to these values; states begin as zeros.

    Raises:
        UnrunnableError: ONNX Runtime does not run it here.
    """
    import onnxruntime

    made = ModelProto()
    made.CopyFrom(model)
    own = {value.name for value in model.graph.output}
    made.graph.output.extend(ValueInfoProto(name=name) for name in dict.fromkeys(names)
                             if name not in own)  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with _named_errors():
        session = onnxruntime.InferenceSession(
            made.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    states = {port.name: port.shape[1:] for port in session.get_inputs() if port.name != "clip"}

    def run(clips: Clips) -> Values:
        zeros = {name: np.zeros((len(clips), *shape), np.float32) for name, shape in states.items()}
        with _named_errors():
            values: Values = session.run(list(names), {"clip": clips, **zeros})
        return values

    return run


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except Exception as e:  # ORT's errors share no base class but Exception
        said = next(iter(str(e).splitlines()), type(e).__name__)[:200].rstrip(".")
        raise UnrunnableError(f"ONNX Runtime does not run the graph here: {said}.") from e
