"""A clip taken apart into its frames: its values, and what 2-D layers over them are written with.

Every value [N, C, T, H, W] becomes T values [N, C, H, W], once a layer reads it: pixels are scaled
before, in one node for all frames. N stays free, T must be known. `_unroll.py` walks over a graph,
`_on_frames.py` says what its layers become.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto

from vmoe.export.passes._builder import Builder, Constants, readers

Frames = list[str]  # the names of a value's frames, in time
TIME = 2


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


class Apart:
    """The values of a graph whose clips are taken apart.

    Attributes:
        build: the nodes that make them.
        constants: of the graph.
        frames: of each value that is apart.
        whole: clips that are not apart yet: how many frames they have.
        waiting: convolutions, for the Add that reads them, and their inputs' frames; by output.
    """

    def __init__(self, graph: GraphProto, convolve: Convolve) -> None:
        """Begin with nothing, beside a graph."""
        self.build = Layer(graph)
        self.constants = Constants(graph)
        self.frames: dict[str, Frames] = {}
        self.whole: dict[str, int] = {}
        self.waiting: dict[str, tuple[Convolution, Frames]] = {}
        self._convolve, self._readers = convolve, readers(graph)

    def __contains__(self, name: object) -> bool:
        """Return whether a value is a clip, apart or not."""
        return name in self.frames or name in self.waiting or name in self.whole

    def of(self, name: str) -> Frames:
        """Return a value's frames; a convolution that was waiting is written now."""
        if name in self.waiting:
            self.frames[name] = self.convolved(name, None)
        if name in self.whole:
            self.frames[name] = self._taken_out(name)
        if name not in self.frames:
            raise UnknownLayerError(f"{name} has no frames")
        return self.frames[name]

    def convolve(self, out: str, conv: Convolution, frames: Frames) -> None:
        """Write a convolution, or let it wait for the Add that alone reads it."""
        self.waiting[out] = conv, frames
        if [node.op_type for node in self._readers[out]] != ["Add"]:
            self.of(out)

    def convolved(self, name: str, residual: Frames | None) -> Frames:
        """Write a convolution that was waiting, added to `residual`; return its output's frames."""
        conv, frames = self.waiting.pop(name)
        return self._convolve(self.build, conv, frames, residual)

    def _taken_out(self, clip: str) -> Frames:
        """Take every frame out of a clip, [N, C, T, H, W]."""
        at = [
            self.build.constant(f"frame{t}", np.asarray(t, np.int64))
            for t in range(self.whole.pop(clip))
        ]
        return [
            self.build.node("Gather", [clip, one], f"{clip}/t{t}", axis=TIME)
            for t, one in enumerate(at)
        ]

    def constant(self, name: str) -> NDArray[Any]:
        """Return a constant's value."""
        if name not in self.constants:
            raise UnknownLayerError(f"{name} is no constant")
        return self.constants[name]

    def each(self, node: NodeProto, frames: Frames, **given: Any) -> Frames:
        """Write a node once for each frame."""
        out, rest = node.output[0], node.input[1:]
        return [
            self.build.node(node.op_type, [frame, *rest], f"{out}/t{t}", **given)
            for t, frame in enumerate(frames)
        ]
