"""Square: random search by space-time cuboids; it asks the model for scores, never for a gradient.

On clips of one frame it is the image attack; a window may reach the last row and column, as the
paper has it (the authors' code stops one short).

Source: Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box
adversarial attack via random search", ECCV 2020. Time beside space is ours.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from vmoe.attacks import ball, losses
from vmoe.attacks.loop import AttackResult, BallSettings, Search
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "model"
OPTIMAL = False  # it goes by chance
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries, of 10000
TILES = 5  # along each axis, of the first perturbation of L2

Sides: TypeAlias = tuple[int, int, int]  # frames, height, width
Window: TypeAlias = tuple[slice, slice, slice, slice]  # all channels, then the same axes


@dataclass(frozen=True)
class Settings(BallSettings):
    """Square's settings."""

    queries: int = opt(5000, "what each restart may ask the model about a clip", at_least=1)
    restarts: int = opt(1, "random starts; the best counts", at_least=1)
    p_init: float = opt(0.8, "share of a clip that the first cuboids change", above=0, at_most=1)
    rescale: bool = opt(True, "stretch the shrinking of the cuboids, made for 10000, to queries")


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise max_{i != y} F_i(x+d) - F_y(x+d); success: the label is wrong."""
    return losses.maximise(twin, clip, label, settings, indices, _climb, loss=losses.margin)


def _climb(search: Search, clip: Tensor) -> None:
    """Change a cuboid of the best clip, and keep the change where it raises the loss."""
    how, clean = search.settings, search.clip
    assert isinstance(how, Settings)
    first, change = (stripes, paint) if how.norm == "linf" else (tiles, exchange)
    own = ball.generators(how.seed, search.indices, search.number)
    best = _onto(
        search, how.eps * torch.stack([first(x, each) for x, each in zip(clean, own, strict=True)])
    )
    loss = search.judge(best)
    for query in range(how.queries - 1):
        if not search.standing.any():
            return
        sides = cuboid(share(query, how), *clean.shape[2:])
        delta = best - clean
        for row in torch.nonzero(search.standing).flatten().tolist():
            change(delta[row], sides, how.eps, own[row])
        moved = _onto(search, delta)
        found = search.judge(moved)
        better = found > loss
        loss = torch.where(better, found, loss)
        best = torch.where(ball.spread(better, best), moved, best)


def _onto(search: Search, delta: Tensor) -> Tensor:
    """Return the clips that perturbations make; of L2, each has the whole length eps."""
    if search.settings.norm == "l2":
        delta = search.settings.eps * ball.steepest(delta, "l2")
    return search.project(search.clip + delta)


def share(query: int, settings: Settings) -> float:
    """Return p, the share of a clip that a cuboid changes: halved as the queries go on."""
    at = int(query / settings.queries * 10000) if settings.rescale else query
    halvings = sum(at > mark for mark in HALVINGS)
    return settings.p_init * 0.5**halvings


def cuboid(p: float, frames: int, height: int, width: int) -> Sides:
    """Return the sides of a cuboid that is about a share p of a clip, each at least 1.

    It has a share p^(1/3) of the frames, and is square within them where a frame is high and wide
    enough: on one frame its side is sqrt(p height width).
    """
    t = min(max(round(p ** (1 / 3) * frames), 1), frames)
    area = p * frames * height * width / t
    side, short = max(round(math.sqrt(area)), 1), min(height, width)
    if side <= short:
        return t, side, side
    long = min(round(area / short), max(height, width))
    return (t, short, long) if height <= width else (t, long, short)


def stripes(clean: Tensor, own: Generator) -> Tensor:
    """Return vertical stripes of -1 and 1, drawn by channel and column, [C, T, H, W]."""
    channels, *_, width = clean.shape
    return _signs((channels, 1, 1, width), own, clean).expand(clean.shape)


def paint(delta: Tensor, sides: Sides, eps: float, own: Generator) -> None:
    """Set a cuboid of a perturbation, [C, T, H, W], to -eps or eps, drawn by channel."""
    delta[_window(delta, sides, own)] = eps * _signs((len(delta), 1, 1, 1), own, delta)


def tiles(clean: Tensor, own: Generator) -> Tensor:
    """Return a clip full of bumps, each with its sign by channel, [C, T, H, W]."""
    delta = torch.zeros_like(clean)
    sizes = [max(n // TILES, 1) for n in clean.shape[1:]]
    starts = [
        range(n % size // 2, n - size + 1, size)
        for n, size in zip(clean.shape[1:], sizes, strict=True)
    ]
    for at in itertools.product(*starts):
        t, h, w = (slice(a, a + size) for a, size in zip(at, sizes, strict=True))
        delta[:, t, h, w] = _bump(sizes, own, clean)
    return delta


def exchange(delta: Tensor, sides: Sides, eps: float, own: Generator) -> None:
    """Move the length that a perturbation, [C, T, H, W], has in one cuboid to another.

    What the other holds, at length 1 by channel, and a bump of random sign make its new shape; it
    gets the length of both, and a part of what is left of eps.
    """
    t, height, width = sides[0], *delta.shape[2:]
    sides = t, min(max(sides[1], 3) | 1, height), min(max(sides[2], 3) | 1, width)
    into, out_of = _window(delta, sides, own), _window(delta, sides, own)
    before = _squares(delta)
    unused = (eps**2 - before.sum()).clamp(min=0) / len(delta)
    shape = _unit(delta[into]) + _bump(sides, own, delta)
    delta[out_of] = 0
    delta[into] = 0
    freed = (before - _squares(delta)).clamp(min=0)
    delta[into] = _unit(shape) * (freed + unused).sqrt()


def _bump(sides: Sequence[int], own: Generator, like: Tensor) -> Tensor:
    """Return eta, [C, t, h, w]: two pyramids of opposite sign side by side, of length 1.

    They lie along a random axis, and channels have random signs.
    """
    long = [axis for axis, n in enumerate(sides) if n > 1] or [2]
    axis = long[int(torch.randint(len(long), (1,), generator=own))]
    bump = _halves(tuple(sides), axis).to(like)
    return bump * _signs((len(like), 1, 1, 1), own, like)


@functools.lru_cache(maxsize=64)
def _halves(sides: Sides, axis: int) -> Tensor:
    n = sides[axis]
    parts = [
        sign * _pyramid((*sides[:axis], size, *sides[axis + 1 :]))
        for sign, size in ((1, n // 2), (-1, n - n // 2))
        if size
    ]
    whole = torch.cat(parts, dim=axis)
    return ball.steepest(whole[None], "l2")[0]


def _pyramid(sides: Sequence[int]) -> Tensor:
    """Return sum_k 1 / (k + 1)^2 over the nested boxes k around the centre, of length 1.

    Box k holds the values that lie at most k from the centre along every axis.
    """
    far = torch.zeros(())
    for axis, n in enumerate(sides):
        along = (torch.arange(n) - n // 2).abs()
        far = torch.maximum(far, along.view([-1 if i == axis else 1 for i in range(len(sides))]))
    boxes = 1 / torch.arange(1, max(sides) // 2 + 2).square()
    bump = boxes.flip(0).cumsum(0).flip(0)[far.long()]
    return ball.steepest(bump[None], "l2")[0]


def _window(delta: Tensor, sides: Sides, own: Generator) -> Window:
    """Return a random place of a cuboid within a perturbation, [C, T, H, W]."""
    at = [
        int(torch.randint(n - side + 1, (1,), generator=own))
        for n, side in zip(delta.shape[1:], sides, strict=True)
    ]
    t, h, w = (slice(a, a + side) for a, side in zip(at, sides, strict=True))
    return slice(None), t, h, w


def _signs(shape: Sequence[int], own: Generator, like: Tensor) -> Tensor:
    """Return -1 and 1, equally likely."""
    return (2 * torch.randint(2, tuple(shape), generator=own) - 1).to(like)


def _squares(delta: Tensor) -> Tensor:
    """Return the sum of squares of each channel, [C, 1, 1, 1]."""
    return delta.square().sum(dim=(1, 2, 3), keepdim=True)


def _unit(delta: Tensor) -> Tensor:
    """Return each channel at length 1; of zeros, zeros."""
    return delta / _squares(delta).sqrt().clamp(min=1e-12)
