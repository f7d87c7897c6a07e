"""Unroll frames, and spare multiplications: temporal Winograd where it pays.

before: Conv3d(x, w), 3 taps in time, stride 1
after:  four frames y_0 .. y_3 of six frames d_0 .. d_5 by F(4, 3): 6 Conv2d instead of 12
            v_1 = (d_4 - 4 d_2) + (d_3 - 4 d_1) ...      sums over frames
            m_i = Conv2d(v_i, u_i)                       u: sums over taps, made at export
            y_1 = (m_1 - m_2) + 2 (m_3 - m_4) ...        sums over frames
        two frames that are left by F(2, 3): 4 instead of 6; a clip of two frames: 3 instead of 4

A sum a x + y is a depthwise 1x1 convolution and an Add, which ONNX Runtime fuses into one pass
over the frame in its blocked layout; Sub and Neg would leave that layout. Pixels are in none: a
tile's frames are stacked on their channels, and all its sums are one 1x1 convolution. A frame in
the padding is left out of the sums. Where the sums would cost more than they spare, frames are
unrolled directly.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, for the
matrices; along one axis only, float32's error is that of the plain form.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto

from vmoe.export.passes import unroll_frames
from vmoe.export.passes._frames import Convolution, Frames, Layer
from vmoe.export.passes._unroll import unroll

ALIGN = 16  # a depthwise convolution is in the blocked layout for multiples of so many channels
SUM_FLOPS = 64  # what a sum a x + y costs for each number, in FLOPs of a convolution

# The weights of each multiplication, as sums over the taps. A sign or a share that would cost a
# sum over frames stands here instead.
FOUR_U = np.array(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
     [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 4]]
)  # fmt: skip
FOUR_V = np.array(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 1, 0, -5 / 4, 0, 1 / 4]]
)  # fmt: skip
TWO_U = np.array([[-1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, -1]])
PAIR_U = np.array([[0, 1, 0], [0, -1, 1], [1, -1, 0]])


class Cost(NamedTuple):
    """What a tile costs.

    Attributes:
        frames: that it gives.
        convolutions: of one frame each.
        inner: sums over frames of the input.
        outer: sums over frames of the output.
        residual: sums over frames of the output more, where something is added.
    """

    frames: int
    convolutions: int
    inner: int
    outer: int
    residual: int

    def flops(self, conv: Convolution, *, added: bool) -> float:
        """Return FLOPs for one pixel of one frame that it gives."""
        outer, inner, _, high, wide = conv.weight.shape
        shrink = int(np.prod(conv.plane["strides"]))
        sums = self.inner * inner * shrink + (self.outer + added * self.residual) * outer
        multiplied = self.convolutions * 2 * inner * outer * high * wide
        return float(multiplied + SUM_FLOPS * sums) / self.frames


ONE = Cost(frames=1, convolutions=3, inner=0, outer=0, residual=0)
TWO = Cost(frames=2, convolutions=4, inner=4, outer=1, residual=2)
FOUR = Cost(frames=4, convolutions=6, inner=12, outer=6, residual=4)
# Of a clip of two frames, where two of the six taps are padding:
PAIR_ONE = Cost(frames=2, convolutions=4, inner=0, outer=0, residual=0)
PAIR = Cost(frames=2, convolutions=3, inner=1, outer=0, residual=2)


def apply(graph: GraphProto) -> bool:
    """Unroll a graph as `unroll_frames` does, with fewer multiplications; else leave it."""
    return unroll(graph, convolve)


def convolve(build: Layer, conv: Convolution, frames: Frames, residual: Frames | None) -> Frames:
    """Write a convolution over a clip's frames, added to `residual`; return its output's."""
    if not _fits(conv):
        return unroll_frames.convolve(build, conv, frames, residual)
    out: Frames = []
    count, added = conv.frames_out(len(frames)), residual is not None
    while len(out) < count:
        t, left = len(out), count - len(out)
        four, two = (_Tile(build, conv, frames, residual, t, size) for size in (4, 2))
        if left >= 4 and four.is_inside and _pays(FOUR, (TWO, ONE), conv, added):
            out += four.by_four()
        elif _is_narrow(conv):
            out.append(
                unroll_frames.frame(build, conv, frames, t, residual[t] if residual else None)
            )
        elif left >= 2 and two.is_alone and _pays(PAIR, (PAIR_ONE,), conv, added):
            out += two.by_pair()
        elif left >= 2 and two.is_inside and not two.is_alone and _pays(TWO, (ONE,), conv, added):
            out += two.by_two()
        else:
            plain = residual[t] if residual else None
            out.append(unroll_frames.frame(build, conv, frames, t, plain))
    return out


def _fits(conv: Convolution) -> bool:
    outer, inner, taps = conv.weight.shape[:3]
    aligned = outer % ALIGN == 0 and (inner % ALIGN == 0 or _is_narrow(conv)) and conv.group == 1
    return aligned and taps == 3 and conv.stride == conv.dilation == 1


def _is_narrow(conv: Convolution) -> bool:
    """Return whether a layer's input is pixels, that are in no blocked layout."""
    return bool(conv.weight.shape[1] * conv.weight.shape[2] < ALIGN)


def _pays(tile: Cost, others: tuple[Cost, ...], conv: Convolution, added: bool) -> bool:
    return tile.flops(conv, added=added) < min(o.flops(conv, added=added) for o in others)


class _Tile:
    """Frames t .. t + size - 1 of a convolution's output, of size + 2 frames d of its input.

    A frame d in the padding is None.
    """

    def __init__(
        self, build: Layer, conv: Convolution, frames: Frames, residual: Frames | None,
        t: int, size: int,
    ) -> None:  # fmt: skip
        self.build, self.conv = build, conv
        self.t, self.name = t, f"{conv.name}/t{t}"
        at = range(t - conv.pad[0], t - conv.pad[0] + size + 2)
        self.d = [frames[i] if 0 <= i < len(frames) else None for i in at]
        self.residual = residual[t : t + size] if residual else [None] * size

    @property
    def is_inside(self) -> bool:
        """Whether no frame but the outermost is in the padding."""
        return None not in self.d[1:-1]

    @property
    def is_alone(self) -> bool:
        """Whether the outermost frames are in the padding, and no other."""
        return self.is_inside and self.d[0] is None and self.d[-1] is None

    def by_four(self) -> Frames:
        v0, v1, v2, v3, v4, v5 = self._mixed() if _is_narrow(self.conv) else self._summed()
        m0 = self._times("four0", FOUR_U[0], v0)
        m1 = self._times("four1", FOUR_U[1], v1, self.conv.bias)
        m2 = self._times("four2", FOUR_U[2], v2)
        m3 = self._times("four3", FOUR_U[3], v3)
        m4 = self._times("four4", FOUR_U[4], v4)
        m5 = self._times("four5", FOUR_U[5], v5)
        s1, s3 = self._add(m2, m1, "s1"), self._add(m4, m3, "s3")  # m1 + m2, m3 + m4
        s2, s4 = self._out(-2, m2, s1, "s2"), self._out(-2, m4, s3, "s4")  # m1 - m2, m3 - m4
        r = self.residual
        return [
            self._add(self._add(r[0], self._add(s3, s1, "y0-"), "y0+"), m0, "y0"),
            self._out(2, s4, self._add(r[1], s2, "y1-"), "y1"),
            self._out(4, s3, self._add(r[2], s1, "y2-"), "y2"),
            self._add(self._out(8, s4, self._add(r[3], s2, "y3-"), "y3+"), m5, "y3"),
        ]

    def _summed(self) -> Frames:
        """Return FOUR_V d, in as few sums as there are."""
        d0, d1, d2, d3, d4, d5 = self.d
        e, o = self._in(-4, d2, d4, "e"), self._in(-4, d1, d3, "o")
        p, q = self._in(-1, d2, d4, "p"), self._in(-1, d1, d3, "q")
        return [
            self._in(4, d0, self._in(-5, d2, d4, "v0-"), "v0"),
            self._in(1, o, e, "v1"), self._in(-1, o, e, "v2"),
            self._in(2, q, p, "v3"), self._in(-2, q, p, "v4"),
            self._in(1 / 4, d5, self._in(-5 / 4, d3, d1, "v5-"), "v5"),
        ]  # fmt: skip

    def _mixed(self) -> Frames:
        """Return FOUR_V d of frames of pixels: one product of matrices instead of 24 small sums."""
        inside = [i for i, frame in enumerate(self.d) if frame is not None]
        channels, kind = self.conv.weight.shape[1], self.conv.weight.dtype
        frames = [self.d[i] or "" for i in inside]
        stacked = self.build.node("Concat", frames, f"{self.name}/d", axis=1)
        mix = np.kron(FOUR_V[:, inside], np.eye(channels))[..., None, None].astype(kind)
        weight = f"four_v/{''.join(map(str, inside))}/{channels}/{kind}"
        made = self.build.node(
            "Conv", [stacked, self.build.constant(weight, mix)], f"{self.name}/v",
            kernel_shape=[1, 1],
        )  # fmt: skip
        axis = self.build.constant("channels", np.array([1], np.int64))
        ends = [
            self.build.constant(f"channel{at}", np.array([at], np.int64))
            for at in range(0, 6 * channels + 1, channels)
        ]
        return [
            self.build.node("Slice", [made, *pair, axis], f"{self.name}/v{i}")
            for i, pair in enumerate(pairwise(ends))
        ]

    def by_two(self) -> Frames:
        d0, d1, d2, d3 = self.d
        m0 = self._times("two0", TWO_U[0], self._in(-1, d0, d2, "v0"))
        m1 = self._times("two1", TWO_U[1], self._in(1, d2, d1, "v1"), self.conv.bias)
        m2 = self._times("two2", TWO_U[2], self._in(-1, d1, d2, "v2"))
        m3 = self._times("two3", TWO_U[3], self._in(-1, d3, d1, "v3"))
        s = self._add(m2, m1, "s")
        r = self.residual
        return [
            self._add(self._add(r[0], s, "y0-"), m0, "y0"),
            self._add(self._out(-2, m2, self._add(r[1], s, "y1-"), "y1+"), m3, "y1"),
        ]

    def by_pair(self) -> Frames:
        _, d1, d2, _ = self.d
        m0 = self._times("pair0", PAIR_U[0], self._in(1, d2, d1, "v0"), self.conv.bias)
        m1 = self._times("pair1", PAIR_U[1], d2)
        m2 = self._times("pair2", PAIR_U[2], d1)
        r = self.residual
        return [
            self._add(self._add(r[0], m0, "y0-"), m1, "y0"),
            self._add(self._add(r[1], m0, "y1-"), m2, "y1"),
        ]

    def _times(
        self, name: str, of_taps: NDArray[np.float64], frame: str | None, bias: str | None = None
    ) -> str:
        """Convolve a frame with a sum of the taps."""
        assert frame is not None
        conv = self.conv
        made = np.tensordot(conv.weight.astype(np.float64), of_taps, axes=(2, 0))
        weight = self.build.constant(f"{conv.weight_name}/{name}", made.astype(conv.weight.dtype))
        return self.build.conv(conv, frame, weight, f"{self.name}/m/{name}", bias)

    def _add(self, a: str | None, b: str, name: str) -> str:
        return self.build.add(a, b, f"{self.name}/{name}")

    def _in(self, a: float, x: str | None, y: str | None, name: str) -> str:
        """Return a x + y of frames of the input; x may lie in the padding."""
        assert y is not None
        return self._sum(a, x, y, name, self.conv.weight.shape[1])

    def _out(self, a: float, x: str, y: str, name: str) -> str:
        """Return a x + y of frames of the output."""
        return self._sum(a, x, y, name, self.conv.weight.shape[0])

    def _sum(self, a: float, x: str | None, y: str, name: str, channels: int) -> str:
        if x is None or a == 1:
            return self._add(x, y, name)
        values = np.full((channels, 1, 1, 1), a, self.conv.weight.dtype)
        scale = self.build.constant(f"scale{a:g}/{channels}/{values.dtype}", values)
        scaled = self.build.node(
            "Conv", [x, scale], f"{self.name}/{name}/scaled", kernel_shape=[1, 1], group=channels
        )
        return self._add(y, scaled, name)
