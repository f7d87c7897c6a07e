"""The balls that perturbations lie in, L-infinity and L2, on pixels in [0, 1]; and noise to start.

A norm is of one sample over all of its pixels. L2 budgets are in the same unit: a clip of n values
that all change by e has moved by e sqrt(n).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

NORMS = ("linf", "l2")


def project(clip: Tensor, moved: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """Return the clip nearest to `moved` on the way to the ball around `clip`, and in [0, 1].

    Args:
        clip: x, [B, C, T, H, W], pixels in [0, 1].
        moved: x + d, same shape.
        eps: radius.
        norm: linf or l2. Of l2, d is shortened, and then cut to [0, 1], which only shortens it.
    """
    if norm == "linf":
        return moved.clamp(*bounds(clip, eps))
    return (clip + shorten(moved - clip, eps, norm)).clamp_(0, 1)


def bounds(clip: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the L-infinity ball around each pixel, cut to [0, 1]."""
    return (clip - eps).clamp_(min=0), (clip + eps).clamp_(max=1)


def shorten(delta: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """Return the perturbation of a norm of at most eps that is nearest to each sample's."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    far = size(delta, "l2").clamp(min=torch.finfo(delta.dtype).tiny)
    return delta * spread((eps / far).clamp(max=1), delta)


def steepest(gradient: Tensor, norm: str = "linf") -> Tensor:
    """Return the direction of steepest ascent of length 1 in a norm; 0 of no gradient.

    Args:
        gradient: per sample, [B, C, T, H, W].
        norm: linf gives its sign, l2 the gradient over its length.
    """
    if norm == "linf":
        return gradient.sign()
    # divided by its largest value first, so that its square neither overflows nor vanishes
    largest = gradient.abs().flatten(1).amax(dim=1)
    scaled = gradient / spread(largest.clamp(min=torch.finfo(gradient.dtype).tiny), gradient)
    return scaled / spread(size(scaled, "l2").clamp(min=1e-12), gradient)


def size(delta: Tensor, norm: str = "linf") -> Tensor:
    """Return the norm of each sample's perturbation, [B]."""
    flat = delta.flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.square().sum(dim=1).sqrt()


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return one value for each sample, [B], shaped so that it multiplies [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def start(clip: Tensor, eps: float, norm: str, seed: int, indices: Tensor, number: int) -> Tensor:
    """Return a random point of the ball and of [0, 1]: of l2, on its surface.

    Each sample's is drawn from (seed, index, number).

    Args:
        clip: x, [B, C, T, H, W].
        eps: radius.
        norm: linf or l2.
        seed: of the attack.
        indices: of each sample in its data set, [B].
        number: of the restart.
    """
    noise = uniform(clip, seed, indices, number)
    if norm == "l2":  # of many values, as good as a draw from the surface
        noise = noise / spread(size(noise, "l2"), noise)
    return project(clip, clip + eps * noise, eps, norm)


def uniform(clip: Tensor, seed: int, indices: Tensor, number: int) -> Tensor:
    """Return noise in [-1, 1], shaped as the clip, each sample from (seed, index, number).

    It is drawn where the clip is: a GPU draws other numbers than a CPU.
    """
    rows = [
        torch.rand(clip.shape[1:], generator=own, dtype=torch.float32, device=clip.device)
        for own in generators(seed, indices, number, clip.device)
    ]
    return torch.stack(rows).mul_(2).sub_(1).to(clip)


def generators(
    seed: int, indices: Tensor, number: int, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """Return one source of randomness on a device for each sample, from (seed, index, number)."""
    made = []
    for index in indices.tolist():
        text = f"{seed}:{index}:{number}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        made.append(torch.Generator(device).manual_seed(key))
    return made
