"""The one loop that every gradient attack runs through.

Projection, random start, restarts, the temporal step, the best iterate and the counting of
passes stand here; a method's file says only what it maximises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vmoe.errors import SettingError
from vmoe.models import ROUTE_GRADS, VideoMoE
from vmoe.settings import Settings, opt


@dataclass(frozen=True)
class LoopSettings(Settings):
    """What every attack of this loop takes."""

    eps: float = opt(8 / 255, "L-infinity budget, on pixels in [0, 1]", at_least=0, at_most=1)
    steps: int = opt(20, "gradient steps", at_least=1)
    step: float = opt(0.25, "step size (the paper's alpha), as a share of eps", above=0)
    restarts: int = opt(1, "random starts; the best counts", at_least=1)
    random_start: bool = opt(True, "start from a random point in the ball")
    seed: int = opt(0, "seed of the starts")


@dataclass(frozen=True)
class TemporalSettings(LoopSettings):
    """What the temporal Lipschitz attacks take beside."""

    temporal: str = opt(
        "iterations",
        "temporal step: V over iterations, V along the frames of one, or off",
        choices=("iterations", "frames", "off"),
    )
    beta: float = opt(0.9, "decay of the temporal step's V", at_least=0, at_most=1)
    lam: float = opt(0.0, "weight of the Lipschitz term", at_least=0)
    lip: str = opt(
        "detached",
        "gradient through the Lipschitz term's denominator: no, or yes (the paper's literal form)",
        choices=("detached", "quotient"),
    )


def route_grad_option() -> Any:
    """Return the field that the settings of every attack on the whole model have."""
    return opt("straight-through", "how a gradient passes the hard choice", choices=ROUTE_GRADS)


class AttackResult(NamedTuple):
    """What an attack found, for each sample the best iterate: by success, then by loss.

    Attributes:
        adversarial: [B, C, T, H, W], within eps of the clip and in [0, 1].
        success: by the attack's own criterion, bool [B].
        loss: the attack's own, [B].
        route_before: route of the clean clip, [B].
        route_after: route of the adversarial clip, [B].
        forwards: forward passes of each sample through what is attacked, the one of the clean
            clip included: the router, an expert, or the whole model. A pass of the whole model is
            the router and one expert; by route_grad `all` and `soft`, the router and every
            expert. Its clean pass is the router's alone where no Lipschitz term needs more.
        backwards: backward passes of each sample.
    """

    adversarial: Tensor
    success: Tensor
    loss: Tensor
    route_before: Tensor
    route_after: Tensor
    forwards: int
    backwards: int


class Judged(NamedTuple):
    """What an objective says of some clips.

    Attributes:
        loss: to maximise, [B], with its graph.
        success: by the attack's criterion, bool [B].
        route: of each clip, [B].
    """

    loss: Tensor
    success: Tensor
    route: Tensor


class Aim(NamedTuple):
    """An objective that is ready for some clean clips, and their route, [B]."""

    objective: Objective
    route_before: Tensor


Objective: TypeAlias = Callable[[Tensor], Judged]


@contextmanager
def as_found(twin: VideoMoE) -> Iterator[None]:
    """Attack in eval mode, without gradients of parameters; put back what was found, always."""
    modes = {module: module.training for module in twin.modules()}
    wanted = {p: p.requires_grad for p in twin.parameters()}
    try:
        twin.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


def ascend(
    twin: VideoMoE,
    clip: Tensor,
    settings: LoopSettings,
    prepare: Callable[[Tensor], Aim],
    indices: Tensor | None = None,
) -> AttackResult:
    """Maximise an objective in the L-infinity ball around each clip.

    d <- clip_eps(d + a_f sign(grad_d loss)), x + d clipped to [0, 1]; a_f = step eps, or smaller
    where the settings have a temporal step.

    Args:
        twin: put in eval mode for the attack, and back.
        clip: x, [B, C, T, H, W], pixels in [0, 1].
        settings: LoopSettings; the temporal step only with TemporalSettings.
        prepare: called once with the clean clip (the twin being in eval mode), for one forward
            pass of it; the loss of its objective is summed over the batch, so that gradients
            are per sample.
        indices: number of each sample in its data set, [B]; starts are drawn from (seed, index,
            restart), so that sharding and order change nothing. Default: 0, 1, ...

    Returns:
        The best iterate of every sample, over all restarts.

    Raises:
        SettingError: clips of another shape or range than the method's, or too few indices.
    """
    clip = clip.detach()
    order = torch.arange(len(clip)) if indices is None else indices
    _check(clip, order)
    with as_found(twin):
        objective, before = prepare(clip)
        best = _Best(clip, before)
        for restart in range(settings.restarts):
            delta = torch.zeros_like(clip)
            if settings.random_start:
                delta = settings.eps * uniform(clip, settings.seed, order, restart)
            _climb(clip, delta, settings, objective, best)
    return AttackResult(
        best.adversarial, best.success, best.loss, before, best.route,
        forwards=settings.restarts * (settings.steps + 1) + 1,
        backwards=settings.restarts * settings.steps,
    )  # fmt: skip


def _check(clip: Tensor, order: Tensor) -> None:
    """Refuse what would make the attack void in silence, such as pixels of 0 to 255."""
    if clip.ndim != 5 or not len(clip) or not clip.is_floating_point():
        raise SettingError(
            f"clip is {clip.dtype} {list(clip.shape)}; an attack takes float [B, 3, T, H, W]."
        )
    low, high = float(clip.min()), float(clip.max())
    if not (low >= 0 and high <= 1):
        raise SettingError(
            f"clip has pixels from {low:g} to {high:g}; an attack takes [0, 1]: divide by 255."
        )
    if len(order) != len(clip):
        raise SettingError(f"{len(order)} indices for {len(clip)} clips; give one for each.")


def _climb(
    clip: Tensor, delta: Tensor, settings: LoopSettings, objective: Objective, best: _Best
) -> None:
    velocity = clip.new_zeros(clip.shape[0], clip.shape[2])
    adversarial = project(clip, delta, settings.eps)
    for _ in range(settings.steps):
        adversarial.requires_grad_()
        with torch.enable_grad():
            judged = objective(adversarial)
            (gradient,) = torch.autograd.grad(judged.loss.sum(), adversarial)
        gradient = gradient.nan_to_num()  # one that overflowed must not lead out of [0, 1]
        adversarial = adversarial.detach()
        best.offer(adversarial, judged)
        size = torch.full_like(velocity, settings.step * settings.eps)
        if isinstance(settings, TemporalSettings) and settings.temporal != "off":
            size, velocity = temporal_step(gradient, velocity, settings)
        delta = adversarial - clip + size[:, None, :, None, None] * gradient.sign()
        adversarial = project(clip, delta, settings.eps)
    with torch.no_grad():
        best.offer(adversarial, objective(adversarial))


class _Best:
    """The best iterate of each sample so far: by success, then by loss."""

    def __init__(self, clip: Tensor, route: Tensor) -> None:
        self.adversarial = clip.clone()
        self.route = route
        self.success = torch.zeros(len(clip), dtype=torch.bool, device=clip.device)
        self.loss = clip.new_full((len(clip),), -torch.inf)

    def offer(self, adversarial: Tensor, judged: Judged) -> None:
        loss, success = judged.loss.detach(), judged.success
        same = success == self.success
        better = (success & ~self.success) | (same & (loss > self.loss))
        self.adversarial[better] = adversarial[better]
        self.loss = torch.where(better, loss, self.loss)
        self.route = torch.where(better, judged.route, self.route)
        self.success = self.success | success


def project(clip: Tensor, delta: Tensor, eps: float) -> Tensor:
    """Return x + d within the ball and in [0, 1]."""
    return (clip + delta.clamp(-eps, eps)).clamp(0, 1)


def temporal_step(
    gradient: Tensor, velocity: Tensor, settings: TemporalSettings
) -> tuple[Tensor, Tensor]:
    """Return each frame's step size, smaller where gradients have been large, and the new V.

    V_f <- beta V_f + ||grad_f||_2;  a_f = step eps / (1 + log(1 + sqrt V_f)). With
    `temporal=frames` V runs along the frames instead: V_f = beta V_(f-1) + ||grad_f||_2.

    Args:
        gradient: of the loss with respect to the clip, [B, C, T, H, W], per sample.
        velocity: V, [B, T]; not used along frames.
        settings: eps, step, beta and the reading.

    Returns:
        Step sizes, [B, T], in (0, step eps], and V, [B, T].

    Source: arXiv 2602.01369, the temporal step of TLA, in both readings of its text.
    """
    norms = gradient.square().sum(dim=(1, 3, 4)).sqrt()
    # Ours: a norm whose square overflows would make V infinite, for good, and the step 0.
    norms = norms.clamp(max=torch.finfo(norms.dtype).max ** 0.5)
    if settings.temporal == "frames":
        running, rows = torch.zeros_like(norms[:, 0]), []
        for norm in norms.unbind(dim=1):
            running = settings.beta * running + norm
            rows.append(running)
        velocity = torch.stack(rows, dim=1)
    else:
        velocity = settings.beta * velocity + norms
    size = settings.step * settings.eps / (1 + torch.log1p(velocity.sqrt()))
    return size, velocity


def uniform(clip: Tensor, seed: int, indices: Tensor, restart: int) -> Tensor:
    """Return noise in [-1, 1], shaped as the clip, each sample from (seed, index, restart)."""
    rows = []
    for index in indices.tolist():
        text = f"{seed}:{index}:{restart}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
        generator = torch.Generator().manual_seed(key)
        rows.append(torch.rand(clip.shape[1:], generator=generator, dtype=torch.float32))
    return (2 * torch.stack(rows) - 1).to(clip)
