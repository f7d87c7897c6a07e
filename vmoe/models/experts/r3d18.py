"""R3D-18: an 18-layer ResNet of 3x3x3 convolutions.

Modules are named as torchvision's `r3d_18`, so that its weights fit by name at width 1.

Source: Tran et al., "A Closer Look at Spatiotemporal Convolutions", CVPR 2018 (R3D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from vmoe.models.experts import _pretrained
from vmoe.models.experts._channels import channels

PRETRAINED = _pretrained.Pretrained("torchvision's r3d_18", *_pretrained.KINETICS)


Convolution: TypeAlias = "Callable[[int, int, int], nn.Module]"  # of inner, outer, stride


def _conv(inner: int, outer: int, stride: int) -> nn.Conv3d:
    return nn.Conv3d(inner, outer, 3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """Two 3-D convolutions and a way around them."""

    def __init__(self, inner: int, outer: int, stride: int, conv: Convolution = _conv) -> None:
        """Make a block that divides time, height and width by the stride."""
        super().__init__()
        self.conv1 = nn.Sequential(conv(inner, outer, stride), nn.BatchNorm3d(outer), nn.ReLU())
        self.conv2 = nn.Sequential(conv(outer, outer, 1), nn.BatchNorm3d(outer))
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            projection = nn.Conv3d(inner, outer, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm3d(outer))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, outer, T/s, H/s, W/s] of [B, inner, T, H, W]."""
        y: Tensor = self.relu(self.conv2(self.conv1(x)) + self.downsample(x))
        return y


class R3D18(nn.Module):
    """Clip [B, 3, T, H, W], normalised, to logits [B, K]."""

    def __init__(self, width: float, classes: int) -> None:
        """Make the network at a share of its own width."""
        super().__init__()
        c = [channels(full, width) for full in (64, 64, 128, 256, 512)]
        stem = nn.Conv3d(3, c[0], (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm3d(c[0]), nn.ReLU())
        self.layer1 = nn.Sequential(Block(c[0], c[1], 1), Block(c[1], c[1], 1))
        self.layer2 = nn.Sequential(Block(c[1], c[2], 2), Block(c[2], c[2], 1))
        self.layer3 = nn.Sequential(Block(c[2], c[3], 2), Block(c[3], c[3], 1))
        self.layer4 = nn.Sequential(Block(c[3], c[4], 2), Block(c[4], c[4], 1))
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(c[4], classes)

    def forward(self, clip: Tensor) -> Tensor:
        """Return logits, [B, K]."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(clip)))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def build(width: float, classes: int) -> nn.Module:
    """Make an expert with fresh weights."""
    return R3D18(width, classes)
