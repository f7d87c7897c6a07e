"""VideoMoE: a router, some experts, and hard top-1 routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe import registry
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, UnknownNameError
from vmoe.models.router import Router
from vmoe.settings import Settings, opt

FAMILIES = "vmoe.models.experts"
ROUTE_GRADS = ("frozen", "straight-through", "all", "soft")
WIDEST = 4.0  # of an expert; its dense counterpart is twice as wide


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The architecture of a twin."""

    arch: str = opt("r3d18", "family of the experts")
    width: float = opt(0.5, "channels of an expert, as a share of the family's own", above=0)
    experts: int = opt(4, "how many experts; 1 is a dense model, without a router", at_least=1)
    classes: int = opt(10, "how many labels (K)", at_least=2)

    def __post_init__(self) -> None:
        """Check every value; a dense model may be as wide as the widest counterpart."""
        super().__post_init__()
        most = WIDEST if self.experts > 1 else 2 * WIDEST
        if self.width > most:
            raise SettingError(f"--width is {self.width:g}; it must be at most {most:g}.")


class MoEOutput(NamedTuple):
    """What a twin answers.

    Attributes:
        logits: [B, K], of the routed expert (`soft`: of the softmax mixture).
        scores: the router's logits, [B, M].
        route: index of the routed expert, int64 [B]; the lowest index on ties.
    """

    logits: Tensor
    scores: Tensor
    route: Tensor


class Normalise(nn.Module):
    """(clip - mean) / std per channel, so that every budget is on pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ClipSpec) -> None:
        """Take mean and deviation from the clip spec; they are no parameters."""
        super().__init__()
        shape = (1, 3, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(spec.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(shape), persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        """Normalise a clip, [B, 3, T, H, W] with pixels in [0, 1]."""
        return (clip - self.mean) / self.std


class VideoMoE(nn.Module):
    """A sparse mixture of video experts: F(x) = E_top1(x)(x), top1(x) = argmax_i R(x).

    A mixture of one expert is a dense model: it has no router, its scores are zeros [B, 1].

    Source: arXiv 2602.01369, section 3; how a gradient passes the hard choice is ours.
    """

    def __init__(self, settings: ModelSettings, spec: ClipSpec) -> None:
        """Make a twin with fresh weights.

        Args:
            settings: the architecture.
            spec: the clips that it takes; mean and std are applied inside router and experts.

        Raises:
            UnknownNameError: no such family.
        """
        super().__init__()
        family = registry.load(FAMILIES, settings.arch, "expert family (--arch)")
        self.settings = settings
        self.spec = spec
        self.router: nn.Module | None = None
        if settings.experts > 1:
            self.router = nn.Sequential(Normalise(spec), Router(settings.experts))
        self.experts = nn.ModuleList(
            nn.Sequential(Normalise(spec), family.build(settings.width, settings.classes))
            for _ in range(settings.experts)
        )

    def scores(self, clip: Tensor) -> Tensor:
        """Return the router's logits, [B, M]; zeros [B, 1] for a dense model.

        In training, a router that receives fewer than two clips uses its running statistics.
        """
        if self.router is None:
            return clip.new_zeros(len(clip), 1)
        return _run(self.router, clip, len(self.experts))

    def forward(self, clip: Tensor, route_grad: str = "straight-through") -> MoEOutput:
        """Answer clips; in a batch, an expert runs once, on the clips that are routed to it.

        `straight-through` scales the routed logits by 1 + (p - stop_gradient(p)), p the softmax
        weight of the routed expert: the value is unchanged, to the last bit, and the router gets
        a gradient.

        Args:
            clip: [B, 3, T, H, W], RGB, pixels in [0, 1].
            route_grad: how a gradient passes the hard choice. `frozen`: not at all, the true
                derivative. `straight-through`: by the weight of the routed expert. `all`: every
                expert run, straight-through over all weights. `soft`: the softmax mixture, the
                only one that changes the value.

        Raises:
            UnknownNameError: no such route_grad.
        """
        scores = self.scores(clip)
        route = scores.argmax(dim=1)
        if route_grad == "frozen":
            return MoEOutput(self.run_routed(clip, route), scores, route)
        weights = scores.softmax(dim=1)
        if route_grad == "straight-through":
            p = weights.gather(1, route[:, None])
            return MoEOutput(self.run_routed(clip, route) * (1 + (p - p.detach())), scores, route)
        if route_grad not in ROUTE_GRADS:
            raise UnknownNameError("route_grad", route_grad, ROUTE_GRADS)
        every = self.run_all(clip)
        if route_grad == "all":
            hard = nn.functional.one_hot(route, weights.shape[1]).to(weights)
            weights = hard + (weights - weights.detach())
        return MoEOutput((weights[:, :, None] * every).sum(dim=1), scores, route)

    def run_routed(self, clip: Tensor, route: Tensor) -> Tensor:
        """Run each expert once, on the clips routed to it; return the logits, [B, K].

        Raises:
            SettingError: a route to an expert that does not exist.
        """
        experts = len(self.experts)
        order = [torch.nonzero(route == i).flatten() for i in range(experts)]
        if sum(map(len, order)) < len(route):
            strange = int(route[(route < 0) | (route >= experts)][0])
            raise SettingError(f"expert {strange} does not exist: the twin has 0 to {experts - 1}.")
        if not len(clip):
            return self.run_expert(0, clip)
        parts = [self.run_expert(i, clip[at]) for i, at in enumerate(order) if len(at)]
        return torch.cat(parts)[torch.argsort(torch.cat(order))]

    def run_all(self, clip: Tensor) -> Tensor:
        """Run every expert on every clip; return the logits, [B, M, K]."""
        return torch.stack([self.run_expert(i, clip) for i in range(len(self.experts))], dim=1)

    def run_expert(self, index: int, clip: Tensor) -> Tensor:
        """Run one expert; return its logits, [B, K].

        In training, an expert that receives fewer than two clips uses its running statistics.
        """
        return _run(self.experts[index], clip, self.settings.classes)


def _run(part: nn.Module, clip: Tensor, outputs: int) -> Tensor:
    """Run a router or an expert; in training, fewer than two clips use its running statistics."""
    if not len(clip):
        return clip.new_zeros(0, outputs)
    if not part.training or len(clip) > 1:
        out: Tensor = part(clip)
        return out
    modes = {module: module.training for module in part.modules()}
    try:
        out = part.eval()(clip)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return out


def build(settings: ModelSettings, spec: ClipSpec, seed: int = 0) -> VideoMoE:
    """Make a twin with fresh weights from a seed; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VideoMoE(settings, spec)


def dense_counterpart(settings: ModelSettings) -> ModelSettings:
    """Return the dense counterpart: the same family, one network, twice the expert's width."""
    if settings.experts == 1:
        raise SettingError("this model is dense already (1 expert); it has no dense counterpart.")
    return dataclasses.replace(settings, experts=1, width=2 * settings.width)


def expert_shares(route: Sequence[int] | Tensor, experts: int) -> list[float]:
    """Return the share of clips that each expert receives."""
    counts = torch.bincount(torch.as_tensor(route), minlength=experts).double()
    return [float(share) for share in counts / counts.sum().clamp(min=1)]
