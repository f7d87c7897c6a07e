"""An attack on a stream that knows the guard, and the guard's scores with a gradient.

The terms are those of runtime/guard/terms.py, of the windows of one stream; `strangeness` is the
profile's, by the same linear interpolation of its quantiles. What has no gradient is left out: the
drift of routes, and how old a label is. Equality with the guard's own is tested.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vmoe.attacks.loop import as_found
from vmoe.errors import SettingError
from vmoe.models import VideoMoE
from vmoe.runtime.guard import terms as guard_terms
from vmoe.runtime.guard.profile import Profile, tail
from vmoe.settings import Settings, opt

TINY = 1e-30
SURE = 1.0  # a window whose logits are wrong by so much is left alone


@dataclass(frozen=True)
class StreamAttackSettings(Settings):
    """How a stream is attacked."""

    eps: float = opt(8 / 255, "L-infinity budget, on pixels in [0, 1]", at_least=0, at_most=1)
    steps: int = opt(30, "gradient steps", at_least=1)
    alpha: float = opt(0.125, "step size, as a share of eps", above=0)
    weight: float = opt(0.0, "of the guard's score in the loss; 0 does not know it", at_least=0)
    seed: int = opt(0, "of the start", at_least=0)


def entropy(shares: Tensor) -> Tensor:
    """Return the entropy of shares, [N, K], over its maximum, [N]."""
    logs = shares.clamp_min(TINY).log()
    return -(shares * logs).sum(dim=1) / math.log(shares.shape[1])


def closeness(shares: Tensor) -> Tensor:
    """Return 1 - the lead of the largest share over the second, [N]."""
    best = shares.topk(2, dim=1).values
    return 1 - (best[:, 0] - best[:, 1])


def change(one: Tensor, other: Tensor) -> Tensor:
    """Return the total variation between shares, [N]."""
    return (one - other).abs().sum(dim=1) / 2


def median(clip: Tensor) -> Tensor:
    """Return clips, [N, 3, T, H, W], each frame the median of itself and its neighbours."""
    padded = torch.cat([clip[:, :, :1], clip, clip[:, :, -1:]], dim=2)
    three = torch.stack([padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:]])
    return three.median(dim=0).values


def bilateral(clip: Tensor) -> Tensor:
    """Return clips, [N, 3, T, H, W] in [0, 1], each frame smoothed but for its edges.

    x_p <- sum_q w_pq x_q / sum_q w_pq, w_pq = exp(-|p - q|^2 / 2 s^2 - (sum |x_p - x_q|)^2 / 2 c^2)
    over q in a disc, as `cv2.bilateralFilter` does; the sum goes over channels.
    """
    across, colour, place = guard_terms.BILATERAL
    radius = across // 2
    frames = clip.transpose(1, 2).flatten(0, 1)
    height, width = frames.shape[-2:]
    padded = pad(frames, (radius,) * 4, mode="reflect")
    total, weights = torch.zeros_like(frames), torch.zeros_like(frames[:, :1])
    offsets = range(-radius, radius + 1)
    for down, right in itertools.product(offsets, offsets):
        far = down**2 + right**2
        if far > radius**2:
            continue
        top, left = radius + down, radius + right
        other = padded[..., top : top + height, left : left + width]
        apart = 255 * (other - frames).abs().sum(dim=1, keepdim=True)
        weight = (-far / (2 * place**2) - apart**2 / (2 * colour**2)).exp()
        total, weights = total + weight * other, weights + weight
    smoothed: Tensor = (total / weights).reshape(len(clip), -1, *frames.shape[1:]).transpose(1, 2)
    return smoothed


FILTERS = {"median": median, "bilateral": bilateral}  # those that have a gradient here


def terms(
    shares: Tensor, weights: Tensor, filtered: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the terms of a stream's windows, in order, each overlapping the one before.

    Args:
        shares: softmax of the logits, [N, K].
        weights: softmax of the router's scores, [N, M].
        filtered: shares of the filtered clips, [N, K]; None where the guard has no filter.

    Returns:
        By name the values, and the numbers of the windows that they are of.
    """
    every = torch.arange(len(shares))
    found = {"label_entropy": (entropy(shares), every)}
    if weights.shape[1] > 1:
        found["route_entropy"] = entropy(weights), every
        found["route_margin"] = closeness(weights), every
        found["route_change"] = change(weights[1:], weights[:-1]), every[1:]
    found["label_change"] = change(shares[1:], shares[:-1]), every[1:]
    if filtered is not None:
        found["filter_change"] = change(shares, filtered), every
    return found


def strangeness(profile: Profile, name: str, values: Tensor) -> Tensor:
    """Return -ln p of a term's values, as `Profile.strangeness` does, with a gradient."""
    at = torch.as_tensor(profile.quantiles[name], dtype=values.dtype)
    count, last = profile.counts[name], len(at) - 1
    start, scale = tail(profile.quantiles[name])
    within = values.clamp_max(start)
    right = torch.searchsorted(at, within.detach().contiguous(), right=True).clamp(1, last)
    low, high = at[right - 1], at[right]
    part = ((within - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    level = (right - 1 + part) / last
    level = torch.where(within <= at[0], torch.zeros_like(level), level)
    beyond = (values - start).clamp_min(0) / scale
    return beyond - ((1 + (1 - level) * count) / (1 + count)).log()


def score(
    profile: Profile, shares: Tensor, weights: Tensor, filtered: Tensor | None = None
) -> Tensor:
    """Return the guard's score of a stream's windows but for drift and age, [N]."""
    total = torch.zeros(len(shares), dtype=shares.dtype)
    for name, (values, where) in terms(shares, weights, filtered).items():
        if name in profile.quantiles:
            total = total.index_add(0, where, strangeness(profile, name, values))
    return total


def attack(
    twin: VideoMoE,
    frames: Tensor,
    windows: Tensor,
    profile: Profile,
    settings: StreamAttackSettings,
) -> Tensor:
    """Change a stream's frames once, so that its windows get other labels, past the guard.

    Maximises, by sign steps through the straight-through route, over the windows' mean:
    min(margin of another label, SURE) - weight * max(0, score - threshold + SURE).

    Args:
        twin: the model.
        frames: prepared, [F, 3, H, W], pixels in [0, 1].
        windows: numbers of the frames of each window, int [N, T]; each overlaps the one before.
        profile: of the guard that is to be passed; its filter is off or one of FILTERS.
        settings: budget, steps, and how much the guard counts.

    Returns:
        The frames of the last step, on the grid of uint8, within eps of the given ones.

    Raises:
        SettingError: the guard counts, and its filter has no gradient.
    """
    if settings.weight and profile.filter not in ("off", *FILTERS):
        raise SettingError(
            f"the guard's filter is {profile.filter!r}, which has no gradient here; attack a "
            f"profile of off, {' or '.join(FILTERS)}, or say weight 0."
        )
    generator = torch.Generator().manual_seed(settings.seed)
    radius = int(255 * settings.eps + 1e-6) / 255
    start = (2 * torch.rand(frames.shape, generator=generator) - 1) * settings.eps
    moved = (frames + start).clamp(0, 1)
    with as_found(twin):
        with torch.no_grad():
            before = twin(frames[windows].transpose(1, 2)).logits.argmax(dim=1)
        for _ in range(settings.steps):
            moved = moved.detach().requires_grad_()
            loss = _loss(twin, moved[windows].transpose(1, 2), before, profile, settings.weight)
            (slope,) = torch.autograd.grad(loss, moved)
            step = moved.detach() + settings.alpha * settings.eps * slope.sign()
            moved = torch.minimum(torch.maximum(step, frames - radius), frames + radius)
            moved = moved.clamp(0, 1)
    return torch.round(255 * moved.detach()) / 255


def _loss(twin: VideoMoE, clip: Tensor, before: Tensor, profile: Profile, weight: float) -> Tensor:
    out = twin(clip, route_grad="straight-through")
    own = out.logits.gather(1, before[:, None])[:, 0]
    others = out.logits.scatter(1, before[:, None], -torch.inf).amax(dim=1)
    loss: Tensor = (others - own).clamp_max(SURE).mean()
    if not weight:
        return loss
    filtered = None
    if profile.filter in FILTERS:
        again = FILTERS[profile.filter](clip)
        filtered = twin.run_routed(again, out.route).softmax(dim=1)
    found = score(profile, out.logits.softmax(dim=1), out.scores.softmax(dim=1), filtered)
    known: Tensor = (found - profile.threshold + SURE).clamp_min(0).mean()
    return loss - weight * known
