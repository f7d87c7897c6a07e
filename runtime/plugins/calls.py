"""Which compiled kernel answers a call, on what grid, with what arguments.

Written once for all who launch: TensorRT's plugins, the benchmark, the tests in Triton's
interpreter. A pointer is whatever the launcher takes: an address, or a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

MOST_EXPERTS = 64  # of one row of scores: the kernel's block
LINEAR_O, LINEAR_I = 16, 128
FINISH = 1024  # numbers of one program that sums splits
PROGRAMS = 264  # two for each multiprocessor of the largest GPU; fewer, and K is split
LEAST_STEPS = 4  # of a split: less work is not worth its sum


class Tile(NamedTuple):
    """The block of one program of the convolution: outputs, positions, and a step along K."""

    outputs: int
    positions: int
    step: int


TILES = {"wide": Tile(64, 128, 32), "small": Tile(32, 32, 64)}


class Call(NamedTuple):
    """One launch.

    Attributes:
        kernel: its name among the compiled ones.
        grid: programs along three axes.
        args: pointers and int32 numbers, in the order of the kernel's parameters.
    """

    kernel: str
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Conv3d:
    """A convolution's sizes.

    Attributes:
        clips: N.
        channels: C.
        size: (T, H, W).
        outputs: O.
        kernel: (kt, kh, kw).
        strides: along T, H, W.
        pads: the same before and behind, along T, H, W.
        relu: whether negative outputs become zero.
    """

    clips: int
    channels: int
    size: tuple[int, int, int]
    outputs: int
    kernel: tuple[int, int, int]
    strides: tuple[int, int, int]
    pads: tuple[int, int, int]
    relu: bool = False

    @property
    def out(self) -> tuple[int, int, int]:
        """(T', H', W')."""
        t, h, w = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                self.size, self.pads, self.kernel, self.strides, strict=True
            )
        )
        return t, h, w

    @property
    def tile(self) -> str:
        """The tile that suits: a small one where the wide would leave most of a GPU idle."""
        wide = TILES["wide"]
        return "wide" if self._programs(wide) >= PROGRAMS and self.outputs > 32 else "small"

    @property
    def steps(self) -> int:
        """Steps along K of one split."""
        tile = TILES[self.tile]
        every = ceil(self.channels * prod(self.kernel) / tile.step)
        wanted = max(1, round(PROGRAMS / self._programs(tile)))
        return max(ceil(every / wanted), min(every, LEAST_STEPS))

    @property
    def splits(self) -> int:
        """In how many parts K is summed."""
        return ceil(self.channels * prod(self.kernel) / (self.steps * TILES[self.tile].step))

    @property
    def workspace_bytes(self) -> int:
        """What `parts` needs: nothing where K is not split."""
        return 4 * self.clips * self.splits * self.outputs * prod(self.out) * (self.splits > 1)

    def _programs(self, tile: Tile) -> int:
        across = ceil(prod(self.out) / tile.positions) * ceil(self.outputs / tile.outputs)
        return self.clips * across


def topk(scores: Any, weights: Any, route: Any, rows: int, experts: int, k: int) -> list[Call]:
    """Return the launch for scores float32 [rows, experts] -> weights, route int32 [rows, k]."""
    return [Call("topk", (rows, 1, 1), (scores, weights, route, experts, k))]


def routed_linear(
    x: Any, expert: Any, w: Any, b: Any, y: Any, *, rows: int, inner: int, outer: int,
    relu: bool = False, half: bool = False,
) -> list[Call]:  # fmt: skip
    """Return the launch for x [rows, inner] -> y [rows, outer]."""
    grid = (rows, ceil(outer / LINEAR_O), 1)
    name = f"routed_linear_{'fp16' if half else 'fp32'}"
    return [Call(name, grid, (x, expert, w, b, y, inner, outer, int(relu)))]


def routed_conv3d(
    conv: Conv3d, x: Any, expert: Any, w: Any, b: Any, y: Any, parts: Any, precision: str = "fp32"
) -> list[Call]:
    """Return the launches of a convolution: one, or two where K is split.

    Args:
        conv: its sizes.
        x: [N, C, T, H, W].
        expert: int32 [N].
        w: [M, O, C, kt, kh, kw].
        b: [M, O].
        y: [N, O, T', H', W'].
        parts: room of `conv.workspace_bytes`; not read where that is 0.
        precision: fp32 (the sum of three TF32 products), tf32 (one of them), or fp16.
    """
    tile = TILES[conv.tile]
    positions = prod(conv.out)
    grid = (
        ceil(positions / tile.positions),
        ceil(conv.outputs / tile.outputs),
        conv.clips * conv.splits,
    )
    sizes = (conv.channels, *conv.size, conv.outputs, *conv.out)
    shape = (*conv.kernel, *conv.strides, *conv.pads)
    args = (x, expert, w, b, y, parts, *sizes, *shape, int(conv.relu), conv.splits, conv.steps)
    calls = [Call(f"routed_conv3d_{precision}_{conv.tile}", grid, args)]
    if conv.splits > 1:
        name = f"finish_{'fp16' if precision == 'fp16' else 'fp32'}"
        grid = (ceil(conv.outputs * positions / FINISH), conv.clips, 1)
        more = (parts, expert, b, y, conv.outputs, positions, int(conv.relu), conv.splits)
        calls.append(Call(name, grid, more))
    return calls
