"""How an attack gets its forward values and gradients from what was deployed.

    transfer   both from the twin; the engine replays
    adaptive   values from the engine, gradients from the twin by the engine's route
    query      values from the engine, no gradients

A method is given a model that answers as a twin does, and never learns which of these it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vmoe.attacks.channel import Channel
from vmoe.attacks.judge import Judge
from vmoe.clips import Clips, ClipSpec
from vmoe.models import ModelSettings, MoEOutput, VideoMoE

TRANSFER, ADAPTIVE, QUERY = "transfer", "adaptive", "query"
MODES = (TRANSFER, ADAPTIVE, QUERY)


class Stand(VideoMoE):
    """What answers in the place of a twin: it has as many experts, but they are elsewhere."""

    def __init__(self, settings: ModelSettings, spec: ClipSpec) -> None:
        """Take what it stands for: the model's settings, and its clips."""
        nn.Module.__init__(self)
        self.settings, self.spec = settings, spec
        self.total, self.denoiser = len, None  # type: ignore[assignment]  # of a twin in training
        self.router = nn.Identity() if settings.experts > 1 else None
        self.experts = nn.ModuleList(nn.Identity() for _ in range(settings.experts))


class Through(Stand):
    """A twin that sees clips through a channel: the mean of what it answers to their likenesses."""

    def __init__(self, twin: VideoMoE, channel: Channel) -> None:
        """Take both."""
        super().__init__(twin.settings, twin.spec)
        self.twin, self.channel = twin, channel

    def scores(self, clip: Tensor) -> Tensor:
        """Return the mean of the router's scores, [B, M]."""
        return self._mean(self.twin.scores, clip)

    def forward(
        self, clip: Tensor, route_grad: str = "straight-through", route: Tensor | None = None
    ) -> MoEOutput:
        """Return the mean of logits and scores; the route is that of the mean."""
        found = [self.twin(one, route_grad, route) for one in self._likenesses(clip)]
        logits = torch.stack([each.logits for each in found]).mean(dim=0)
        scores = torch.stack([each.scores for each in found]).mean(dim=0)
        return MoEOutput(logits, scores, scores.argmax(dim=1) if route is None else route)

    def run_routed(self, clip: Tensor, route: Tensor) -> Tensor:
        """Return the mean of the routed logits, [B, K]."""
        return self._mean(lambda one: self.twin.run_routed(one, route), clip)

    def run_all(self, clip: Tensor) -> Tensor:
        """Return the mean of all experts' logits, [B, M, K]."""
        return self._mean(self.twin.run_all, clip)

    def run_expert(self, index: int, clip: Tensor) -> Tensor:
        """Return the mean of one expert's logits, [B, K]."""
        return self._mean(lambda one: self.twin.run_expert(index, one), clip)

    def _mean(self, of: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
        return torch.stack([of(one) for one in self._likenesses(clip)]).mean(dim=0)

    def _likenesses(self, clip: Tensor) -> list[Tensor]:
        return self.channel.likenesses(clip, self.spec)


class Deployed(Stand):
    """An engine in the place of its twin: its values, with a twin's gradients or none.

    What is asked of it is rounded to uint8 first. Where no gradient is wanted, the engine alone
    runs.

    Attributes:
        begin: of the numbers of clips in their data set, the clips that a first start begins
            from, [b, 3, T, H, W]; None where the attack's own choice stands.
        asked: clips that the engine has been asked about, each as often as it was.
    """

    def __init__(
        self,
        answer: Judge,
        settings: ModelSettings,
        spec: ClipSpec,
        twin: VideoMoE | None = None,
    ) -> None:
        """Take what answers.

        Args:
            answer: the engine, as a function of uint8 clips.
            settings: of the model that was deployed.
            spec: of its clips.
            twin: where gradients come from; None for none. It has as many experts.
        """
        super().__init__(settings, spec)
        self.begin: Callable[[Tensor], Tensor] | None = None
        self.asked = 0
        self._answer = answer
        self.twin = twin

    def scores(self, clip: Tensor) -> Tensor:
        """Return the engine's scores, [B, M]."""
        value = self._asked(clip)[1]
        return self._grafted(value, lambda twin: twin.scores(clip))

    def forward(
        self, clip: Tensor, route_grad: str = "straight-through", route: Tensor | None = None
    ) -> MoEOutput:
        """Answer clips by the engine's hard choice; the gradient passes it as the twin's would.

        By route_grad `soft`, as by `all`, every expert of the twin gives a gradient.
        """
        if clip.device.type == "cpu":  # the layout of uint8 clips, in which convolutions run faster
            clip = clip.contiguous(memory_format=torch.channels_last_3d)
        logits, scores, chosen = self._asked(clip, route)
        if self.twin is None or not torch.is_grad_enabled():
            return MoEOutput(logits, scores, chosen)
        of = self.twin(clip, route_grad, chosen)
        return MoEOutput(graft(logits, of.logits), graft(scores, of.scores), chosen)

    def run_routed(self, clip: Tensor, route: Tensor) -> Tensor:
        """Answer each clip by a given expert of the engine; return the logits, [B, K]."""
        value = self._asked(clip, route)[0]
        return self._grafted(value, lambda twin: twin.run_routed(clip, route))

    def run_all(self, clip: Tensor) -> Tensor:
        """Answer every clip by every expert; return the logits, [B, M, K]."""
        each = [self.run_expert(index, clip) for index in range(len(self.experts))]
        return torch.stack(each, dim=1)

    def run_expert(self, index: int, clip: Tensor) -> Tensor:
        """Answer every clip by one expert; return the logits, [B, K]."""
        route = torch.full((len(clip),), index, dtype=torch.int64, device=clip.device)
        value = self._asked(clip, route)[0]
        return self._grafted(value, lambda twin: twin.run_expert(index, clip))

    def _grafted(self, value: Tensor, of: Callable[[VideoMoE], Tensor]) -> Tensor:
        if self.twin is None or not torch.is_grad_enabled():
            return value
        return graft(value, of(self.twin))

    def _asked(self, clip: Tensor, route: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the engine's logits, scores and route of clips, rounded to uint8."""
        forced = None if route is None else route.tolist()
        found = self._answer(to_uint8(clip), forced)
        self.asked += len(clip)
        logits, scores, chosen = (torch.from_numpy(value).to(clip.device) for value in found)
        return logits.to(clip.dtype), scores.to(clip.dtype), chosen


def to_uint8(clip: Tensor) -> Clips:
    """Return clips, [B, 3, T, H, W], as an engine sees them: rounded, uint8 [B, T, H, W, 3]."""
    levels = (255 * clip.detach()).round_().clamp_(0, 255).byte()
    made: Clips = levels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
    return made


def graft(value: Tensor, of: Tensor) -> Tensor:
    """Return a value with the gradient of another tensor of its shape; the value is exact."""
    return cast(Tensor, _Graft.apply(of, value))  # type: ignore[no-untyped-call]


class _Graft(torch.autograd.Function):
    """Forward the second tensor, backward to the first."""

    @staticmethod
    def forward(ctx: Any, of: Tensor, value: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None
