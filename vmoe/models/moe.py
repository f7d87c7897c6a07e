"""VideoMoE: a router, some experts, and hard top-1 routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe import registry
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, UnknownNameError
from vmoe.models.denoiser import Denoiser
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
    denoise: bool = opt(False, "restore the clip in front of router and experts (oud-m)")

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
        """Normalise a clip, [B, 3, T, H, W] with pixels in [0, 1].

        On a CPU the channels of a pixel are neighbours from here on: its pooling and 3-D
        convolutions are up to a third faster so, with their gradients (r3d18 of width 0.125).
        """
        clip = (clip - self.mean) / self.std
        if clip.device.type == "cpu":
            clip = clip.contiguous(memory_format=torch.channels_last_3d)
        return clip


class VideoMoE(nn.Module):
    """A sparse mixture of video experts: F(x) = E_top1(x)(x), top1(x) = argmax_i R(x).

    A mixture of one expert is a dense model: it has no router, its scores are zeros [B, 1]. Where
    there is a denoiser, router and experts see what it makes of the clip.

    Attributes:
        total: from how many clips a part in training receives here to how many it receives in all
            processes that share the batch (`vmoe.train.together` sets it); by itself, the same.

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
        self.total: Callable[[int], int] = _alone
        self.denoiser: nn.Module | None = Denoiser() if settings.denoise else None
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
        return self._scores(self._restored(clip))

    def forward(
        self, clip: Tensor, route_grad: str = "straight-through", route: Tensor | None = None
    ) -> MoEOutput:
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
            route: force the choice, int64 [B]; None chooses freely. By `soft` it only names it.

        Raises:
            UnknownNameError: no such route_grad.
        """
        clip = self._restored(clip)
        scores = self._scores(clip)
        route = scores.argmax(dim=1) if route is None else route
        if route_grad == "frozen":
            return MoEOutput(self._routed(clip, route), scores, route)
        weights = scores.softmax(dim=1)
        if route_grad == "straight-through":
            p = weights.gather(1, route[:, None])
            return MoEOutput(self._routed(clip, route) * (1 + (p - p.detach())), scores, route)
        if route_grad not in ROUTE_GRADS:
            raise UnknownNameError("route_grad", route_grad, ROUTE_GRADS)
        every = self._every(clip)
        if route_grad == "all":
            hard = nn.functional.one_hot(route, weights.shape[1]).to(weights)
            weights = hard + (weights - weights.detach())
        return MoEOutput((weights[:, :, None] * every).sum(dim=1), scores, route)

    def run_routed(self, clip: Tensor, route: Tensor) -> Tensor:
        """Run each expert once, on the clips routed to it; return the logits, [B, K].

        Raises:
            SettingError: a route to an expert that does not exist.
        """
        strange = route[(route < 0) | (route >= len(self.experts))]
        if len(strange):
            last = len(self.experts) - 1
            raise SettingError(
                f"expert {int(strange[0])} does not exist: the twin has 0 to {last}."
            )
        return self._routed(self._restored(clip), route)

    def run_all(self, clip: Tensor) -> Tensor:
        """Run every expert on every clip; return the logits, [B, M, K]."""
        return self._every(self._restored(clip))

    def run_expert(self, index: int, clip: Tensor) -> Tensor:
        """Run one expert; return its logits, [B, K].

        In training, an expert that receives fewer than two clips uses its running statistics.
        """
        return self._run(self.experts[index], self._restored(clip), self.settings.classes)

    def _restored(self, clip: Tensor) -> Tensor:
        return clip if self.denoiser is None else self.denoiser(clip)

    def _scores(self, clip: Tensor) -> Tensor:
        if self.router is None:
            return clip.new_zeros(len(clip), 1)
        return self._run(self.router, clip, len(self.experts))

    def _routed(self, clip: Tensor, route: Tensor) -> Tensor:
        order = [torch.nonzero(route == i).flatten() for i in range(len(self.experts))]
        parts = [
            self._run(expert, clip[at], self.settings.classes)
            for expert, at in zip(self.experts, order, strict=True)
        ]
        return torch.cat(parts)[torch.argsort(torch.cat(order))]

    def _every(self, clip: Tensor) -> Tensor:
        classes = self.settings.classes
        return torch.stack([self._run(expert, clip, classes) for expert in self.experts], dim=1)

    def _run(self, part: nn.Module, clip: Tensor, outputs: int) -> Tensor:
        """Run a router or an expert; one that receives no clip does not run.

        In training, fewer than two clips of the whole batch use its running statistics.
        """
        count = self.total(len(clip)) if part.training else len(clip)
        if not count:
            return clip.new_zeros(0, outputs)
        if not part.training or count > 1:
            out: Tensor = part(clip)
            return out
        modes = {module: module.training for module in part.modules()}
        try:
            out = part.eval()(clip)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return out


def _alone(count: int) -> int:
    return count


def build(settings: ModelSettings, spec: ClipSpec, seed: int = 0) -> VideoMoE:
    """Make a twin with fresh weights from a seed; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VideoMoE(settings, spec)


def dense_counterpart(settings: ModelSettings) -> ModelSettings:
    """Return the dense counterpart: the same family, one network, twice the expert's width."""
    if settings.experts == 1:
        raise SettingError("this model is dense already (1 expert); it has no dense counterpart.")
    return dataclasses.replace(settings, experts=1, width=2 * settings.width, denoise=False)


def expert_shares(route: Sequence[int] | Tensor, experts: int) -> list[float]:
    """Return the share of clips that each expert receives."""
    counts = torch.bincount(torch.as_tensor(route), minlength=experts).double()
    return [float(share) for share in counts / counts.sum().clamp(min=1)]
