"""The denoiser of OUD: restores a clip in front of router and experts, in two views of it.

    clip -> under: half the size, more channels: what is coarse ------------------.
         -> over: twice the size, so that a filter sees less of it: what is fine --+-> clip +

The over-complete view works at four times the pixels, and costs several times an expert: that is
the method's, and why its FLOPs are reported beside it.

Source: Lo et al., "Overcomplete Representations Against Adversarial Videos", ICIP 2021 (OUDefend:
an over- and an under-complete branch whose features are merged). Where it stands (in front of the
mixture) is that of arXiv 2602.01369's OUD-M; widths, and the residual that starts at zero so that
an untrained one changes nothing, are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

CHANNELS = 4


class Denoiser(nn.Module):
    """Clip [B, 3, T, H, W], pixels in [0, 1], to a restored one of the same shape, not clamped."""

    def __init__(self) -> None:
        """Make one that returns the clip as it is until it is trained."""
        super().__init__()
        self.under_in = _block(3, CHANNELS)
        self.under = _block(CHANNELS, 2 * CHANNELS)
        self.over_in = _block(3, CHANNELS)
        self.over = _block(CHANNELS, CHANNELS, frames=1)
        self.merge = nn.Conv3d(3 * CHANNELS, 3, 3, padding=1)
        nn.init.zeros_(self.merge.weight)
        assert self.merge.bias is not None
        nn.init.zeros_(self.merge.bias)

    def forward(self, clip: Tensor) -> Tensor:
        """Return the clip and what is to be added to it."""
        height, width = size = clip.shape[3:]
        half, twice = (height // 2, width // 2), (2 * height, 2 * width)
        small = self.under(_scaled(self.under_in(clip), half))
        large = self.over(_scaled(self.over_in(clip), twice))
        views = torch.cat([_scaled(small, size), _scaled(large, size)], dim=1)
        restored: Tensor = clip + self.merge(views)
        return restored


def _scaled(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Scale height and width of every frame."""
    frames = x.transpose(1, 2).flatten(0, 1)
    scaled = interpolate(frames, size=size, mode="bilinear", align_corners=False)
    back: Tensor = scaled.view(len(x), -1, *scaled.shape[1:])
    return back.transpose(1, 2)


def _block(inner: int, outer: int, frames: int = 3) -> nn.Sequential:
    convolution = nn.Conv3d(inner, outer, (frames, 3, 3), padding=(frames // 2, 1, 1), bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(outer), nn.ReLU())
