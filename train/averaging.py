"""An exponential moving average of a twin's weights and statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn

from vmoe.models import VideoMoE


class Average(nn.Module):
    """A twin whose weights are a moving average of another's, in eval mode.

    A <- d_t A + (1 - d_t) W after update t, d_t = min(decay, (1 + t) / (10 + t)): an average of a
    few updates at the beginning, when the weights move fast.

    Source: Polyak and Juditsky, 1992; the warm-up is that of TensorFlow's and timm's averages.
    """

    updates: torch.Tensor

    def __init__(self, twin: VideoMoE, decay: float) -> None:
        """Begin with the twin's weights."""
        super().__init__()
        self.twin = copy.deepcopy(twin).eval()
        self._decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, twin: VideoMoE) -> None:
        """Take a step towards the twin's weights."""
        self.updates += 1
        t = int(self.updates)
        weight = 1 - min(self._decay, (1 + t) / (10 + t))
        theirs = twin.state_dict()
        for name, mine in self.twin.state_dict().items():
            if mine.is_floating_point():
                mine.lerp_(theirs[name], weight)
            else:
                mine.copy_(theirs[name])
