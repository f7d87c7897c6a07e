"""R(2+1)D-18: an 18-layer ResNet whose 3-D convolutions are one in space, then one in time.

Modules are named as torchvision's `r2plus1d_18`, so that its weights fit by name at width 1.

Source: Tran et al., "A Closer Look at Spatiotemporal Convolutions", CVPR 2018 (R(2+1)D).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from vmoe.models.experts import _pretrained
from vmoe.models.experts._channels import channels
from vmoe.models.experts.r3d18 import Block

PRETRAINED = _pretrained.Pretrained("torchvision's r2plus1d_18", *_pretrained.KINETICS)


class R2Plus1D18(nn.Module):
    """Clip [B, 3, T, H, W], normalised, to logits [B, K]."""

    def __init__(self, width: float, classes: int) -> None:
        """Make the network at a share of its own width."""
        super().__init__()
        c = [channels(full, width) for full in (64, 64, 128, 256, 512)]
        middle = _rounded(45, width)
        self.stem = nn.Sequential(
            nn.Conv3d(3, middle, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(middle),
            nn.ReLU(),
            nn.Conv3d(middle, c[0], (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(c[0]),
            nn.ReLU(),
        )
        self.layer1 = _stage(c[0], c[1], 1, width)
        self.layer2 = _stage(c[1], c[2], 2, width)
        self.layer3 = _stage(c[2], c[3], 2, width)
        self.layer4 = _stage(c[3], c[4], 2, width)
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(c[4], classes)

    def forward(self, clip: Tensor) -> Tensor:
        """Return logits, [B, K]."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(clip)))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def middle_planes(inner: int, outer: int, width: float) -> int:
    """Return the channels between the two halves of a convolution.

    So many that both halves have the weights of one 3x3x3 convolution: 9 i m + 3 m o = 27 i o. At
    width 1 exactly as published, at other widths rounded to a multiple of 16 as all channels are.
    """
    count = 27 * inner * outer // (9 * inner + 3 * outer)
    return count if width == 1 else channels(count, 1)


def _rounded(full: int, width: float) -> int:
    return full if width == 1 else channels(full, width)


def _stage(inner: int, outer: int, stride: int, width: float) -> nn.Sequential:
    first = partial(_conv, middle=middle_planes(inner, outer, width))
    second = partial(_conv, middle=middle_planes(outer, outer, width))
    return nn.Sequential(Block(inner, outer, stride, first), Block(outer, outer, 1, second))


def _conv(inner: int, outer: int, stride: int, middle: int) -> nn.Sequential:
    """Return a 1x3x3 convolution, then one of 3x1x1."""
    space, time = (1, stride, stride), (stride, 1, 1)
    return nn.Sequential(
        nn.Conv3d(inner, middle, (1, 3, 3), stride=space, padding=(0, 1, 1), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(),
        nn.Conv3d(middle, outer, (3, 1, 1), stride=time, padding=(1, 0, 0), bias=False),
    )


def build(width: float, classes: int) -> nn.Module:
    """Make an expert with fresh weights."""
    return R2Plus1D18(width, classes)
